"""Raw times into rates, ratios and tables; and what was measured on: machine, versions, peak."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.systems import Work, cross_entropy_flops, dense_rows, size_of, timed
from rpo import text
from rpo.training import meter

ROOT = Path(__file__).resolve().parents[1]
BEST, CEILING = "packed+cached", "cross-entropy"
# Aims with the 11m model on a CPU: times TRL's default, TRL's best, padded+live; share of the ceiling's FLOP/s.
AIMS = {"hh": (8, 6, 3.5, 0.9), "uf": (5, 3, 2.2, 0.9)}
SWEEP_AIM = "; aim, for 12 hh-like cells on a CPU: 6"


@dataclass
class Result:
    """What became of one system."""

    seconds: list[float] = field(default_factory=list)  # of each step, visit after visit, warm-up included
    cpu_seconds: list[float] = field(default_factory=list)  # likewise, of all threads: what neighbours hardly touch
    losses: list[float] = field(default_factory=list)  # likewise
    logps_error: float | None = None  # against the library, nats per scored token of the worst response
    cosine: float | None = None  # of the first gradient, with the twin's
    ref_seconds: tuple[float, float] | None = None  # wall and CPU, of its reference pass over all the steps' pairs
    memory_gib: dict[str, float] = field(default_factory=dict)  # CUDA: peaks
    failed: str | None = None  # then its speed does not count


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- what it ran on


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that MFU is a share of: the data sheet's where known, else the best of 20 square matrix products."""
    if share := meter.performance({"mfu": 1.0}, device, 1).get("perf/mfu"):
        return 1 / share, "data sheet, dense bf16"
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(device, lambda: a @ b)[0] for _ in range(20))
    return 2 * 2048**3 / best, "best of 20 products of 2048 x 2048 matrices here"


def machine(device: torch.device) -> dict:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform()}


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "numpy", "trl", "accelerate", "datasets", "liger_kernel", "triton")
    found = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    return {"python": platform.python_version()} | found


def git() -> dict:
    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {
        "commit": ask("rev-parse", "HEAD"),
        "dirty": bool(ask("status", "--porcelain", "--", ".", ":!bench/results")),
    }


def write(name: str, device: torch.device, **measured: object) -> None:
    """Writes bench/results/TIME_`name`.json: what was `measured`, when, by which command and on what."""
    now = datetime.datetime.now()
    record = {
        "date": now.isoformat(timespec="seconds"),
        "command": [Path(word).name if word.startswith("/") else word for word in sys.argv],
        "machine": machine(device),
    }
    record |= {"versions": versions(), "git": git()} | measured
    path = ROOT / "bench" / "results" / f"{now:%Y-%m-%d_%H%M}_{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record) + "\n")
    print(path.relative_to(ROOT))


# ---- steps


def rates(name: str, result: Result, work: Work, warmup: int) -> dict:
    """The result with its rates: medians over the timed steps, FLOPs by each system's own least work."""
    if result.failed:
        return asdict(result)
    flops, tokens = (np.array(x)[warmup:] for x in _work(name, work))
    seconds, cpu = (np.array(x).reshape(-1, work.steps)[:, warmup:] for x in (result.seconds, result.cpu_seconds))
    median = float(np.median(seconds))
    return asdict(result) | {
        "pairs_per_second": None if name.startswith(CEILING) else work.pairs / median,
        "seconds_median": median,
        "seconds_p90": float(np.quantile(seconds, 0.9)),
        "unique_tokens_per_second": float(np.median(tokens / seconds)),
        "flops_per_second": float(np.median(flops / seconds)),
        "cpu_seconds_median": float(np.median(cpu)),
        "timed": {"seconds": seconds.tolist(), "cpu_seconds": cpu.tolist(), "flops": flops.tolist()},
    }


def _work(name: str, work: Work) -> tuple[list[float], list[int]]:
    """FLOPs needed and unique tokens of each step."""
    size, steps = size_of(work), range(work.steps)
    if not name.startswith(CEILING):
        lengths = [work.lengths(k) for k in steps]
        return [size.step_flops(*three) for three in lengths], [int(sum(map(np.sum, three))) for three in lengths]
    shapes = [[tuple(batch_BT.shape) for batch_BT in dense_rows(work, k)] for k in steps]
    return [cross_entropy_flops(size, s) for s in shapes], [sum(b * t for b, t in s) for s in shapes]


def ratio(systems: dict[str, dict], name: str, base: str, *, by: str = "seconds", flops: bool = False) -> float | None:
    """How many times as fast as `base`: the median over rounds, in each of which both had the same pairs.

    With `flops`: how many times its FLOP/s, each by its own least work. `by` may be cpu_seconds.
    """
    a, b = (systems.get(each, {"failed": True}) for each in (name, base))
    if a["failed"] or b["failed"]:
        return None
    times = np.array(b["timed"][by]) / np.array(a["timed"][by])
    if flops:
        times *= np.array(a["timed"]["flops"]) / np.array(b["timed"]["flops"])
    return float(np.median(times))


def show_steps(systems: dict[str, dict], twin: str, peak: float, lengths: str, device: torch.device) -> dict:
    """Prints the table, what failed and how the aims stand; returns the ratios."""
    base = "trl default" if "trl default" in systems else twin
    rows = [["", "pairs/s", f"x {base}", "s/step", "p90", "CPU s", "unique tok/s", "MFU", "ref. pass s", "peak GiB"]]
    for name, s in systems.items():
        if s["failed"]:
            print(f"{name}: FAILED, so no speed: {s['failed']}")
            continue
        times = None if name.startswith(CEILING) else ratio(systems, name, base)
        row = [name, _number(s["pairs_per_second"]), _number(times), f"{s['seconds_median']:.3f}"]
        row += [f"{s['seconds_p90']:.3f}", f"{s['cpu_seconds_median']:.3f}" if device.type == "cpu" else ""]
        row += [f"{s['unique_tokens_per_second']:,.0f}", f"{s['flops_per_second'] / peak:.1%}"]
        rows.append(
            row + [_number(s["ref_seconds"] and s["ref_seconds"][0]), _number(s["memory_gib"].get("allocated"))]
        )
    print_table(rows)
    ratios, aims = {}, AIMS.get(lengths, (None,) * 4)
    for base, aim in zip(("trl default", "trl best", twin, CEILING), aims, strict=True):
        flops = base == CEILING
        values = {by: ratio(systems, BEST, base, by=by, flops=flops) for by in ("seconds", "cpu_seconds")}
        if values["seconds"] is not None:
            name = f"{'FLOP/s of ' * flops}{BEST} / {base}"
            ratios[name] = values
            aimed = f" (by CPU time {values['cpu_seconds']:.2f}; aim {aim or '-'})" if device.type == "cpu" else ""
            print(f"{name}: {values['seconds']:.2f}{aimed}")
    return ratios


# ---- sweeps


@dataclass
class Cells:
    """(wall, CPU) seconds of each cell's training, and of each reference pass that was made for them."""

    train: list[tuple[float, float]] = field(default_factory=list)
    reference: list[tuple[float, float]] = field(default_factory=list)

    def totals(self, by: int) -> dict[str, float]:
        train, reference = ([both[by] for both in part] for part in (self.train, self.reference))
        totals = {"T_ref": sum(reference), "T_train": statistics.fmean(train)}
        totals |= {"T(1)": sum(reference[:1]) + totals["T_train"], "T(K)": sum(reference) + sum(train)}
        return totals | {"T(K), one pass": sum(reference[:1]) + sum(train)}


def show_sweep(systems: dict[str, Cells]) -> dict[str, dict]:
    """Prints and returns T(1) and T(K), each with the reference passes that it needs, and their ratios."""
    totals = {name: [cells.totals(by) for by in (0, 1)] for name, cells in systems.items()}
    print_table(
        [["seconds", "reference passes", *totals["ours"][0]]]
        + [
            [name, str(len(systems[name].reference)), *(f"{value:.2f}" for value in wall.values())]
            for name, (wall, _) in totals.items()
        ]
    )
    if "trl" in totals:
        for key in ("T(1)", "T(K)", "T(K), one pass"):
            wall, cpu = (theirs[key] / mine[key] for theirs, mine in zip(totals["trl"], totals["ours"], strict=True))
            print(f"{key} of trl / ours: {wall:.2f} (by CPU time {cpu:.2f})" + SWEEP_AIM * (key == "T(K)"))
    return totals


def _number(value: float | None) -> str:
    return f"{value:.2f}" if value else ""


def print_table(rows: list[list[str]]) -> None:
    """Without the columns that have a title alone."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    print(text.table(list(zip(*columns, strict=True)), align=">"))
