"""What a policy is compared with, and the reference's log-probs on disk: one number per response token, computed once per pair and never stale.

    CACHE_DIR/reference/KEY/facts.json   what the numbers depend on beside the tokens; KEY is its hash
    CACHE_DIR/reference/KEY/shard_*/     pairs of one chunk of a pass, each found by the hash of its tokens

A pair's entry depends on nothing but the facts and its own tokens. So a sweep, a subset, another order, another run hit;
changed weights miss everywhere, a changed token misses one pair; and what is missing is filled in, not recomputed. Shards
are checksummed, written whole or not at all under names of their own, so runs that fill one cache at once do no harm.

Rank 0 alone touches the disk, the folder may be its node's own. N: scored tokens of a micro-batch.
"""

import fcntl
import hashlib
import json
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch.distributed import gather_object
from tqdm import tqdm

from rpo import dist
from rpo.config import differences
from rpo.data import schedule
from rpo.data.batch import make_batch
from rpo.data.dataset import Rows
from rpo.errors import UserError, fixable
from rpo.files import key_of, read_arrays, write_arrays, write_atomic
from rpo.model import shard
from rpo.model.policy import Policy
from rpo.text import human

CHUNK = 1024  # pairs per shard: what an interrupted pass loses at most
RESCORED = 4  # pairs scored once more whenever a cache is used

Logps = dict[int, np.ndarray]  # row -> log-probs of its chosen, then of its rejected tokens


@dataclass(frozen=True, eq=False)
class Reference:
    """What a run compares its policy with: log-probs of every split, or a model; nothing where its loss has none."""

    logps: dict[str, np.ndarray] = field(default_factory=dict)  # by split, float64 (rows, 2), where they are cached
    reports: dict[str, dict] = field(default_factory=dict)  # by split: where they came from
    live: Policy | None = None  # scores in the loop
    frozen: Policy | None = None  # resident: the live one, or one for the embedded task's KL
    layout: str = "packed"  # how rows are laid out for it
    weights: str | None = None  # their digest; of a moving one at the start
    alpha: float = 0.0  # of a moving one
    every: int = 0  # updates between its moves; 0: it stands still

    @torch.no_grad()
    def follow(self, policy: Policy, updates: int) -> None:
        """Moves it after so many updates: theta_ref <- alpha theta + (1 - alpha) theta_ref (TR-DPO, arXiv 2404.09656, eq. 3)."""
        if not self.every or updates % self.every:
            return
        shard.reshard(self.live)  # what it gathered is of the weights before
        for own, other in zip(shard.shares(self.live), shard.shares(policy), strict=True):
            own.lerp_(other, self.alpha)


# ---- all rows


@torch.no_grad()
def score_rows(
    policy: Policy,
    rows: Rows,
    facts: dict,
    *,
    name: str,
    cache_dir: str | Path,
    layout: str,
    budget: int,
    device: torch.device,
    noise_floor: float,
) -> tuple[np.ndarray, dict]:
    """The summed log-probs of chosen and rejected of all `rows`, float64 (rows, 2) in nats (0 where a row has no
    rejected), and a JSON-able report.

    A collective, with the same result on all ranks. Pairs that the cache lacks are scored by `policy`, whose `identity` is
    `facts`, in one pass with a bar and `name` on it. Then a few random pairs, of those found where there are any, are
    scored once more: stored and new must agree to 3 `noise_floor` + 1e-6 nats per token. `cache_dir` is the folder above
    reference/, or one cache's own folder. The root of a sharded `policy` stays gathered.

    Raises UserError, on all ranks: a folder that cannot be written or has not the room (before the pass), one made by
    other weights, a log-prob that is not finite, the re-score.
    """
    cache_dir = Path(cache_dir).expanduser()
    folder = dist.on_main(_folder, cache_dir, facts)
    found: Logps = {}  # filled on rank 0 alone
    holes = dist.on_main(_look_up, folder, rows, found)
    scored = partial(_score, policy, rows, layout=layout, budget=budget, device=device)
    if len(holes):
        with _turn(folder, name):
            holes = dist.on_main(_look_up, folder, rows, found)  # another run may just have filled them
            if len(holes):
                dist.on_main(_make_room, folder, cache_dir, rows, holes, facts)
                _fill(scored, rows, holes, folder, found, name)
    _rescore(scored, rows, holes, folder, found, noise_floor)
    if dist.is_main():
        cached = f"{len(rows) - len(holes)} from the cache"
        done = f"scored {len(holes)} of {len(rows)} {name} pairs, {cached}"
        print("reference:", done if len(holes) else f"all {len(rows)} {name} pairs from the cache", flush=True)
    report = {"key": folder.name, "weights": facts["weights"], "folder": str(folder)}
    report |= {"pairs": len(rows), "scored": len(holes), "cached": len(rows) - len(holes)}
    return dist.broadcast(_sums(rows, found) if dist.is_main() else None), report


def _sums(rows: Rows, found: Logps) -> np.ndarray:
    sides = ((found[i][:c], found[i][c:]) for i, c in enumerate(rows.chosen.tolist()))
    return np.array([[side.sum(dtype=np.float64) for side in pair] for pair in sides])


# ---- on disk


def _folder(cache_dir: Path, facts: dict) -> Path:
    """Where the cache of `facts` is: `cache_dir` itself where that is one cache. Raises UserError where it is another."""
    if not (cache_dir / "facts.json").is_file():
        return cache_dir / "reference" / key_of(facts)
    try:
        there = json.loads((cache_dir / "facts.json").read_text())
    except ValueError:
        raise UserError(f"reference.cache_dir={cache_dir}: its facts.json is damaged; delete that folder") from None
    if there == facts:
        return cache_dir
    raise UserError(
        f"reference.cache_dir={cache_dir}: is the cache of another reference ({differences(there, facts)[0]}); give the "
        "folder above reference/, where each has its own"
    )


def _digest(rows: Rows, i: int) -> bytes:
    """sha256 of the ids of row `i` and of which of them are scored, which the three lengths say."""
    parts = rows.row(i)
    return hashlib.sha256(np.concatenate([list(map(len, parts)), *parts]).astype("<i4").tobytes()).digest()


def _look_up(folder: Path, rows: Rows, found: Logps) -> np.ndarray:
    """Fills `found` from the shards and returns the rows that none has. A damaged shard is removed, and said."""
    wanted: dict[bytes, list[int]] = {}
    for i in range(len(rows)):
        wanted.setdefault(_digest(rows, i), []).append(i)
    for part in sorted(folder.glob("shard_*")):
        stored = read_arrays(part)
        if stored is None:
            print(f"reference: {part} is damaged and removed; its pairs are scored again", flush=True)
            shutil.rmtree(part, ignore_errors=True)
            continue
        digests, lengths, logps = (stored[0][name] for name in ("digests", "lengths", "logps"))
        ends = lengths.cumsum().tolist()
        for digest, start, end in zip(digests.view("V32").ravel().tolist(), [0, *ends[:-1]], ends, strict=True):
            if digest in wanted:
                found |= dict.fromkeys(wanted[digest], np.array(logps[start:end]))  # a copy: a map costs a file handle
    return np.array([i for i in range(len(rows)) if i not in found], dtype=np.int64)


@contextmanager
def _turn(folder: Path, name: str) -> Iterator[None]:
    """One run at a time scores for one cache on one machine: those beside it, as of a parallel sweep, wait and then read.

    The system frees the lock however a run ends. Where there can be none all score, which does no harm.
    """
    held: list[TextIO] = []
    with dist.main_first():
        if dist.is_main():
            with suppress(OSError):  # a file system without locks; what cannot be written `_make_room` says
                folder.mkdir(parents=True, exist_ok=True)
                held.append((folder / "lock").open("a"))
                try:
                    fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"reference: another run scores {name} pairs for {folder}; waiting for it", flush=True)
                    fcntl.flock(held[0], fcntl.LOCK_EX)
    try:
        yield
    finally:
        for file in held:
            file.close()


def _make_room(folder: Path, cache_dir: Path, rows: Rows, holes: np.ndarray, facts: dict) -> None:
    """Makes the folder with its facts.json. Raises UserError where it cannot be written or is too small for `holes`."""
    tokens = int((rows.chosen[holes].astype(np.int64) + rows.rejected[holes]).sum())
    needed = tokens * (8 if facts["compute_dtype"] == "float64" else 4) + 64 * len(holes) + 4096
    with _writing(cache_dir, f"{human(needed)} are needed"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "facts.json", json.dumps(facts, indent=2))
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"reference.cache_dir={cache_dir}: has {human(free)} free, the log-probs of {len(holes)} pairs need "
            f"{human(needed)}; make room or give another folder"
        )


def _writing(cache_dir: Path, note: str) -> AbstractContextManager[None]:
    return fixable(f"reference.cache_dir={cache_dir}: cannot be written", f", {note}; use another folder")


def _write_shard(folder: Path, rows: Rows, fresh: Logps) -> None:
    """Writes the log-probs of a chunk as one shard. Raises UserError where one is not finite or the disk is full."""
    for i, logps in fresh.items():
        if not np.isfinite(logps).all():
            raise UserError(
                f"reference.path: the log-prob of a token of {rows.where(i)} is not finite; the reference's weights are "
                "damaged, or its activations overflow model.dtype"
            )
    digests = np.frombuffer(b"".join(_digest(rows, i) for i in fresh), np.uint8).reshape(-1, 32)
    lengths = np.array([len(logps) for logps in fresh.values()])
    arrays = {"digests": digests, "lengths": lengths, "logps": np.concatenate(list(fresh.values()))}
    with _writing(folder, "what was written before is kept"):
        write_arrays(folder / f"shard_{uuid.uuid4().hex}", arrays, {"pairs": len(fresh)})


# ---- scoring


def _fill(scored: Callable[..., Logps], rows: Rows, holes: np.ndarray, folder: Path, found: Logps, name: str) -> None:
    """One pass over `holes`, shared by the ranks, into `found` and the folder, a shard per chunk."""
    ranks = {"rank": dist.rank(), "world_size": dist.world_size()}
    interval = 0.2 if sys.stderr.isatty() else 30  # seconds; a log file gets few lines
    bar = {"desc": f"reference, {name}", "unit": "pair", "disable": not dist.is_main(), "mininterval": interval}
    with tqdm(total=len(holes), **bar) as progress:
        for start in range(0, len(holes), CHUNK):
            mine = scored(holes[start : start + CHUNK], progress, **ranks)
            shares = [{}] * dist.world_size()
            gather_object(mine, shares if dist.is_main() else None)
            fresh = {i: logps for share in shares for i, logps in share.items()}  # a filler's pair, scored twice, once
            dist.on_main(_write_shard, folder, rows, fresh)
            found |= fresh


def _score(
    policy: Policy,
    rows: Rows,
    indices: np.ndarray,
    progress: tqdm,
    *,
    layout: str,
    budget: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Logps:
    """This rank's share of the rows `indices`."""
    plan = schedule.plan_step(rows, indices, layout=layout, budget=budget, rank=rank, world_size=world_size)
    ticks = np.diff(np.linspace(0, len(indices), len(plan.microbatches) + 1, dtype=int)).tolist()
    scored = []
    for (members, weight), tick in zip(plan.microbatches, ticks, strict=True):
        batch = make_batch(rows, members, layout, weight=weight)
        logps_N = policy((batch.pin() if device.type == "cuda" else batch).to(device))
        scored.append((members, logps_N))
        progress.update(tick)
    # Only now off the device: the host stays ahead of it.
    return {i: logps for members, logps_N in scored for i, logps in _by_row(rows, members, logps_N.cpu().numpy())}


def _by_row(rows: Rows, members: np.ndarray, logps_N: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Row and its log-probs, from those of a micro-batch, where all chosen come before all rejected."""
    lengths = np.concatenate([rows.chosen[members], rows.rejected[members]])
    parts = np.split(logps_N, np.cumsum(lengths)[:-1])
    for i, chosen, rejected in zip(members.tolist(), parts, parts[len(members) :], strict=False):
        yield i, np.concatenate([chosen, rejected])


def _rescore(
    scored: Callable[..., Logps], rows: Rows, holes: np.ndarray, folder: Path, found: Logps, noise_floor: float
) -> None:
    """Raises UserError where random pairs, scored once more, differ from what is stored by more than rounding."""
    cached = np.setdiff1d(np.arange(len(rows)), holes)
    some = cached if len(cached) else holes
    some = dist.broadcast(np.random.default_rng().choice(some, min(RESCORED, len(some)), replace=False))
    again = scored(some, tqdm(disable=True))
    errors = [np.abs(again[i] - found[i]) for i in again if dist.is_main()]
    gap = dist.broadcast(float(np.concatenate(errors).mean()) if errors else None)
    bound = 3 * noise_floor + 1e-6
    if gap <= bound:
        return
    figure = f"differ by {gap:.1e} nats per token (allowed {bound:.1e})"
    if len(cached):
        raise UserError(
            f"reference.cache_dir: the log-probs in {folder} and the model's {figure}; usual causes: files edited by hand, "
            "or written by another torch, driver or kind of GPU; delete that folder"
        )
    raise UserError(
        f"step 0: log-probs scored twice by the same weights {figure}; usual causes: dropout, or a kernel whose result "
        f"depends on the batch; fix it and delete {folder}"
    )
