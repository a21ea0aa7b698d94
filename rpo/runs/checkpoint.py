"""A run's checkpoints: all that its next update depends on, written aside in the background, whole or not at all.

    RUN/checkpoints/step_00000100/
        shard-*.safetensors    weights and AdamW's state, a file per rank; any number of ranks can read them
        state.json             counters, what the run is of, and of every rank its RNG and running sums
        manifest.json          size and sha256 of the others; the folder takes its name when this is written
    RUN/checkpoints/latest, best    links to two of them

Nothing here is pickled: torch's own metadata would be, the Hugging Face storage has none. A checkpoint from elsewhere
can be wrong, but it cannot run code.
"""

import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rpo import config, dist
from rpo.errors import UserError, require
from rpo.files import sync, write_atomic
from rpo.model.shard import reshard
from rpo.runs.state import Tensors, TrainState, set_rng_state, tensors_of
from rpo.text import human

FILE_BYTES = 2**28  # of a rank's share in one file, about: it is put together in memory


# ---- finding and reading


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, and its `state.json`."""

    folder: Path
    state: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        return self.folder.parent.parent

    def check_same(self, facts: dict[str, str]) -> None:
        """Raises UserError where the run started with other data, tokenizer or weights than `facts` says of ours."""
        for key, ours in facts.items():
            if self.state["facts"].get(key) != ours:
                raise UserError(
                    f"{key}: {ours}, but {self.state['facts'].get(key)} when {self.run_dir} started; restore the file or "
                    "folder, or use a new run_dir"
                )

    def load(self, tensors: Tensors) -> dict[str, Any]:
        """Fills `tensors`, sharded as they may be, and returns this rank's own part of the state.

        With as many ranks as wrote it each gets its RNG and running sums back; with another number rank 0 gets the total
        of the sums, and the generators stay as they are. Raises UserError where the checkpoint is of another model.
        """
        _fill(self, tensors)
        ranks = self.state["ranks"]
        if len(ranks) == dist.world_size():
            set_rng_state(ranks[dist.rank()]["rng"])
            return ranks[dist.rank()]
        total = np.sum([rank["sums"] for rank in ranks], axis=0)
        return {"sums": (total if dist.is_main() else 0 * total).tolist()}

    def lay_over(self, weights: Tensors) -> None:
        """Fills `weights`, as `tensors_of` gave them of a policy alone, and reads nothing else: no moments, no random state.

        A root that a forward pass left gathered has to be resharded first. Raises UserError where the checkpoint is of
        another model.
        """
        there = {name for name in _stored(self) if name.startswith(("weight/", "buffer/"))}
        if other := sorted(there - weights.keys()):
            raise UserError(
                f"{self.folder}: holds {other[0]}, which the model has not; it is the checkpoint of another model"
            )
        _fill(self, weights)


def find(run_dir: Path, resume: str, verify: str = "full") -> Checkpoint | None:
    """The checkpoint that a run in `run_dir` resumes from, the same on every rank; None where it starts from the beginning.

    `resume` is auto, the newest whole one of `run_dir`; never; or a run's folder, or one of its checkpoints, for a
    run_dir that has none of its own yet. A damaged one is named and skipped; `verify` full reads every byte, shared by the
    ranks, sizes none. A collective. Raises UserError where `resume` names none.
    """
    if resume == "never":
        return None
    folders = dist.on_main(_steps, run_dir / "checkpoints")
    if own := _newest(folders, verify):
        return own
    if folders:
        raise UserError(
            f"run_dir={run_dir}: none of its checkpoints is whole; put one back, give another run_dir, or remove the "
            "folder to restart"
        )
    if resume == "auto":
        return None
    named = _newest(dist.on_main(_named, resume), verify)
    if named is None:
        raise UserError(
            f"resume={resume}: no whole checkpoint there; expected auto, never, a run's folder, or RUN/checkpoints/step_NUMBER"
        )
    return named


def _named(resume: str) -> list[Path]:
    given = Path(resume).expanduser().resolve()  # latest and best are links
    return [given] if _step(given) is not None else _steps(given / "checkpoints")


def _newest(folders: list[Path], verify: str) -> Checkpoint | None:
    for folder in reversed(folders):
        if isinstance(whole := _open(folder, verify), Checkpoint):
            return whole
        if dist.is_main():
            print(f"checkpoint: {folder} is damaged ({whole}) and skipped", flush=True)
    return None


def _open(folder: Path, verify: str = "full") -> Checkpoint | str:
    """The checkpoint in `folder`, or what of it is damaged. A collective. Raises UserError where it cannot be read."""
    try:
        listed = dist.on_main(_listed, folder)
        if isinstance(listed, str):
            return listed
        files, state = listed
        if verify == "full" and (wrong := _other_bytes(folder, files)):
            return f"{wrong}: not the bytes that were written"
        return Checkpoint(folder, state)
    except OSError as error:  # a disk that does not answer is no reason to begin earlier
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check the disk, then start again") from None


def _step(folder: Path) -> int | None:
    named = re.fullmatch(r"step_(\d{8,})", folder.name)
    return int(named[1]) if named else None


def of_run(run_dir: Path) -> dict[int, Path]:
    """The folders of a run's checkpoints by step, in order; not looked into."""
    return {_step(folder): folder for folder in _steps(run_dir / "checkpoints")}


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, the same on every rank. Raises UserError where it is damaged."""
    whole = _open(folder)
    require(isinstance(whole, Checkpoint), f"{folder}: is damaged ({whole}); put it back or remove it")
    return whole


def _steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted((path for path in folder.glob("step_*") if _step(path) is not None), key=_step)


def _listed(folder: Path) -> tuple[dict[str, str], dict[str, Any]] | str:
    """(the sha256 of each file by its name, the state), or what is not as the manifest says; no file of weights is read."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "manifest.json: missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json: {type(error).__name__}"
    there = {path.name for path in folder.iterdir()}
    if other := sorted(there ^ (expected.keys() | {"manifest.json"})):
        return f"{other[0]}: {'not in its manifest' if other[0] in there else 'missing'}"
    if "state.json" not in expected:
        return "state.json: not in its manifest"
    wrong = [name for name, (size, _) in expected.items() if (folder / name).stat().st_size != size]
    if wrong or _sha256(folder / "state.json") != expected["state.json"][1]:
        return f"{(wrong or ['state.json'])[0]}: not the bytes that were written"
    return {name: sha256 for name, (_, sha256) in expected.items()}, json.loads((folder / "state.json").read_text())


def _other_bytes(folder: Path, expected: dict[str, str]) -> str | None:
    """The first file whose bytes are not those of its digest; each rank reads its share of them, in threads."""

    def of_mine() -> dict[str, str]:
        mine = list(expected)[dist.rank() :: dist.world_size()]
        if not (folder / "manifest.json").is_file():  # a node that does not see the folder, as will be said
            return {}
        with ThreadPoolExecutor() as pool:  # hashlib lets go of the GIL
            return dict(zip(mine, pool.map(lambda name: _sha256(folder / name), mine), strict=True))

    found = {name: sha256 for share in dist.together(of_mine) for name, sha256 in share.items()}
    left = [name for name in expected if name not in found]
    found |= dist.on_main(lambda: {name: _sha256(folder / name) for name in left})
    return next((name for name in expected if found[name] != expected[name]), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored(checkpoint: Checkpoint) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    return dcp.HuggingFaceStorageReader(str(checkpoint.folder)).read_metadata().state_dict_metadata


def _fill(checkpoint: Checkpoint, tensors: Tensors) -> None:
    import torch.distributed.checkpoint as dcp

    there = _stored(checkpoint)
    for name, tensor in tensors.items():
        stored = there.get(name)
        if stored is None or (tuple(stored.size), stored.properties.dtype) != (tuple(tensor.shape), tensor.dtype):
            what = f"{tuple(stored.size)} {stored.properties.dtype}" if stored else "nothing"
            raise UserError(
                f"{checkpoint.folder}: holds {what} for {name}, the model has {tuple(tensor.shape)} {tensor.dtype}; it is "
                "the checkpoint of another model"
            )
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint.folder)))


# ---- writing


class Checkpoints:
    """The run's checkpoints as the loop sees them. A context manager; a collective throughout.

    `save` copies what it is given to the host and returns, a thread does the rest; of two saves the second waits. One
    that the loop waits for needs no copy on a CPU.
    """

    def __init__(self, run_dir: Path, cfg: config.Checkpoint, resume: Checkpoint | None = None):
        self.folder, self.cfg = run_dir / "checkpoints", cfg
        self.start = resume.folder if resume and resume.run_dir == run_dir else None  # not a fork's
        best = resume.state["best"] if self.start else None
        self.best = best if best and best["by"] == cfg.best else None
        self.group = dist.aside()
        self.stager = _stager()
        self.worker, self.pending = dist.thread(), None
        if cfg.every:
            dist.on_main(self._clean)
            if not all(dist.together(self._is_seen)):
                raise UserError(f"run_dir={run_dir}: not every rank sees it; give a folder that all nodes share")

    def _clean(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*.part"):
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
        damaged = [path for path in _steps(self.folder) if self.start is None or _step(path) > _step(self.start)]
        links = [self.folder / name for name in ("latest", "best")]
        copied = [path for path in links if path.is_dir() and not path.is_symlink()]  # as scp -r and cp -L leave links
        for folder in damaged + copied:  # the former as `find` said
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        if self.start:  # a kill may have come between a rename and its links
            self._link("latest", self.start)
            self._link_best(self.best)

    def _is_seen(self) -> bool:
        for _ in range(60):  # another node may remember for a while that there was no such folder
            if self.folder.is_dir():
                return True
            time.sleep(1)
        return False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is KeyboardInterrupt:  # Ctrl-C twice: the process ends, and with it what the thread was at
            self.worker.shutdown(wait=False)
            return
        self.worker.shutdown()
        self.stager.close()

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether `step` belongs on disk: every checkpoint.every steps, and the last."""
        return bool(self.cfg.every and step and (last or step % self.cfg.every == 0))

    def save(self, state: TrainState, position: dict | None, held_out: dict[str, float], *, wait: bool = False) -> bool:
        """Writes `state` after its `step` updates, and how far rank 0's log has come (`position`).

        `held_out` has the metric that checkpoint.best names, or nothing. False where this save, or with neither `wait` nor
        checkpoint.blocking the one before it, could not be written.
        """
        written = self.wait()
        best = self._best_with(state.step, held_out)
        shared = state.counts() | {"best": best, "position": position}
        wait |= self.cfg.blocking
        tensors = state.tensors
        if not wait or torch.cuda.is_available():
            tensors = self.stager.stage(tensors)  # a copy on the host: the loop may change them from here on
            if torch.__version__ < (2, 13):  # it closes itself after one use, and the pinned memory goes with it
                self.stager = _stager()
        self.pending = best, self.worker.submit(self._write, state.step, tensors, shared, state.own())
        return self.wait() if wait else written

    def judge(self, step: int, held_out: dict[str, float]) -> None:
        """Notes whether `step`, saved by an interruption before it was evaluated, is the best so far."""
        self.best = self._best_with(step, held_out)
        if dist.is_main():
            self._link_best(self.best)

    def lay_best_over(self, policy: nn.Module) -> int | None:
        """Gives `policy` the weights of the best checkpoint and returns its step; None where none was the best."""
        self.wait()
        if self.best is None:
            return None
        reshard(policy)
        read(self.folder / f"step_{self.best['step']:08d}").lay_over(tensors_of(policy))
        return self.best["step"]

    def _best_with(self, step: int, held_out: dict[str, float]) -> dict[str, Any] | None:
        kind, _, name = (self.cfg.best or "").partition(":")
        score = held_out.get(name, math.nan) * (1 if kind == "max" else -1)
        better = not math.isnan(score) and (self.best is None or score > self.best["score"])
        return {"by": self.cfg.best, "step": step, "score": score} if better else self.best

    def wait(self) -> bool:
        """Waits for the save in hand; False where it failed, which is said and costs nothing that was there before."""
        if self.pending is None:
            return True
        (best, written), self.pending = self.pending, None
        try:
            written.result()
        except OSError as error:
            if dist.is_main():
                print(f"checkpoint: {error}; earlier ones are kept, the run continues", flush=True)
            return False
        self.best = best
        return True

    def _write(self, step: int, staged: Tensors, state: dict[str, Any], own: dict[str, Any]) -> None:
        """The thread's work. Raises OSError, on all ranks, where the disk refuses; nothing of the save is then left."""
        folder = self.folder / f"step_{step:08d}"
        part = folder.with_name(f"{folder.name}.part")
        try:
            self._on_main(self._make_room, part, staged)
            shares = dist.together(lambda: (own, self._write_share(part, staged)), self.group)
            self._on_main(self._commit, part, folder, state, shares)
        except OSError as error:
            if dist.is_main():
                shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"step {step} could not be written to {self.folder} ({error.strerror or error})") from None

    def _on_main(self, work: Callable[..., None], *args: object) -> None:
        dist.together(lambda: work(*args) if dist.is_main() else None, self.group)

    def _make_room(self, part: Path, staged: Tensors) -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        needed = sum(tensor.numel() * tensor.itemsize for tensor in staged.values())  # of all ranks together
        free = shutil.disk_usage(part).free
        if free < needed:
            raise OSError(f"{human(needed)} are needed, {human(free)} are free")

    def _write_share(self, part: Path, staged: Tensors) -> dict[str, dict]:
        """Writes this rank's tensors and returns its files' part of the manifest."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        # One thread: torch loses the error of any other, and a shard cut off by a full disk would pass for whole.
        writer = dcp.HuggingFaceStorageWriter(
            str(part), save_distributed=True, thread_count=1, fqn_to_index_mapping=_files_of(staged)
        )
        writer.per_thread_copy_ahead = 0  # or it waits on the loop's CUDA stream for copies that are made already
        try:
            dcp.save(staged, storage_writer=writer, process_group=self.group)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, cause.strerror) from None
        mine = part.glob(f"shard-{dist.rank() + 1:05d}-*")
        return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in mine}

    def _commit(self, part: Path, folder: Path, state: dict[str, Any], shares: list[tuple[dict, dict]]) -> None:
        write_atomic(part / "state.json", json.dumps(state | {"ranks": [own for own, _ in shares]}))
        files = {name: entry for _, mine in shares for name, entry in mine.items()}
        path = part / "state.json"
        files["state.json"] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        write_atomic(part / "manifest.json", json.dumps({"files": files}))
        sync(part)
        part.rename(folder)
        sync(self.folder)  # a rename lasts once the folder that holds the name does
        self._link("latest", folder)
        self._link_best(state["best"])
        self._prune(state["best"])

    def _link(self, name: str, folder: Path) -> None:
        part = self.folder / f"{name}.part"
        part.unlink(missing_ok=True)
        part.symlink_to(folder.name)
        part.replace(self.folder / name)

    def _link_best(self, best: dict[str, Any] | None) -> None:
        folder = self.folder / f"step_{best['step']:08d}" if best else None
        if folder is not None and folder.exists():
            self._link("best", folder)
        else:
            (self.folder / "best").unlink(missing_ok=True)

    def _prune(self, best: dict[str, Any] | None) -> None:
        if self.cfg.keep == "all":
            return
        for folder in _steps(self.folder)[: -self.cfg.keep]:
            if best is None or _step(folder) != best["step"]:
                # Renamed first: what a kill leaves half deleted is no checkpoint.
                part = folder.with_name(f"{folder.name}.old.part")
                shutil.rmtree(part, ignore_errors=True)
                folder.rename(part)
                shutil.rmtree(part, ignore_errors=True)


def _stager() -> Any:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    cuda = torch.cuda.is_available()
    # By position, for a name has changed: pinned memory, shared memory, in a thread, copies that overlap one another.
    return DefaultStager(StagingOptions(cuda, False, False, cuda))


def _files_of(tensors: Tensors) -> dict[str, int]:
    """Which file of a rank each tensor goes to, from 1: a file is put together in memory before it is written."""
    ends = np.cumsum([tensor.numel() * tensor.itemsize for tensor in tensors.values()])
    _, files = np.unique(ends // (FILE_BYTES * dist.world_size()), return_inverse=True)
    return dict(zip(tensors, (1 + files).tolist(), strict=True))
