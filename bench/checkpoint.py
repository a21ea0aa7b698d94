"""What a checkpoint costs the steps beside it: saved in the background, saved while the loop waits, not saved.

    python bench/checkpoint.py --device cpu --model 11m

Our packed step with a cached reference trains the same pairs in three ways that take turns, round by round. In each
round a way has `--every` steps; the two that save do so before the first of them, as train.py does, and the background's
is on disk before the round ends, or the round says it was not. The ratio of a round's times is what checkpoint.every so
long costs; the ratio over those steps alone that began while the save was under way is the stricter one.
Raw numbers go to bench/results/.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import data, report
from bench.systems import MODELS, Ours, Work, timed
from rpo import dist
from rpo.config import Checkpoint
from rpo.runs import checkpoint
from rpo.runs.state import TrainState, tensors_of

WAYS = ("none", "background", "blocking")


def under_way(checkpoints: checkpoint.Checkpoints) -> bool:
    return checkpoints.pending is not None and not checkpoints.pending[1].done()


def measure(args: argparse.Namespace, work: Work, folder: Path) -> dict:
    """Seconds of every round by way: the saving call, each step, and which steps began while a save was under way."""
    system = Ours(work, layout="packed", cached=True, compile=args.compile)
    tensors = tensors_of(system.policy, system.optimizer)
    state = TrainState(tensors, system.meter.sums, seed=0, total_steps=0, facts={})
    cells = {way: [] for way in WAYS}
    with checkpoint.Checkpoints(folder, Checkpoint(args.every, 2, None, blocking=False, verify="full")) as checkpoints:
        for _ in range(args.warmup):
            system.step(0)
        for turn in range(args.rounds):
            for way in WAYS:
                call, steps, beside = 0.0, [], []
                for k in range(args.every):
                    if k == 0 and way != "none":
                        state.step = len(WAYS) * turn + WAYS.index(way)
                        call, _, _ = timed(
                            work.device, lambda way=way: checkpoints.save(state, None, {}, wait=way == "blocking")
                        )
                    beside.append(under_way(checkpoints))
                    seconds, _, _ = timed(work.device, lambda turn=turn, k=k: system.step(turn * args.every + k))
                    steps.append(seconds)
                late = under_way(checkpoints)
                assert checkpoints.wait(), "the disk is full"
                cells[way].append({"call": call, "steps": steps, "beside": beside, "late": late})
    system.close()
    size = sum(path.stat().st_size for path in (folder / "checkpoints" / "latest").iterdir())
    return {"bytes": size, "rounds": cells}


def summary(rounds: dict[str, list[dict]]) -> dict[str, float]:
    """Medians over rounds of each saving way's times as shares of the same round's without saving."""

    def whole(cell: dict) -> float:
        return cell["call"] + sum(cell["steps"])

    found = {}
    for way in WAYS[1:]:
        pairs = list(zip(rounds[way], rounds["none"], strict=True))
        found[f"{way}: round, call included"] = statistics.median(whole(a) / whole(b) for a, b in pairs)
        found[f"{way}: seconds of the call"] = statistics.median(a["call"] for a, _ in pairs)
    beside = [
        sum(s for s, busy in zip(a["steps"], a["beside"], strict=True) if busy)
        / sum(s for s, busy in zip(b["steps"], a["beside"], strict=True) if busy)
        for a, b in zip(rounds["background"], rounds["none"], strict=True)
        if any(a["beside"])
    ]
    found["background: steps beside the save"] = statistics.median(beside)
    found["background: rounds that ended before the save"] = sum(cell["late"] for cell in rounds["background"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=MODELS, default="11m")
    parser.add_argument("--lengths", choices=["hh", "uf"], default="hh")
    parser.add_argument("--pairs-per-step", type=int, default=32)
    parser.add_argument("--tokens-per-microbatch", type=int, default=4096)
    parser.add_argument("--every", type=int, default=4, help="steps of a round; a save before the first")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--folder", help="where checkpoints are written; a scratch folder by default")
    args = parser.parse_args()
    device = dist.init()
    if device.type != args.device:
        sys.exit(f"error: --device {args.device}: this machine computes on {device.type}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = data.first(data.made(args.lengths), args.every * args.rounds * args.pairs_per_step)
    work = Work(rows, args.pairs_per_step, args.model, device, dtype, args.tokens_per_microbatch, "none", lr=1e-6)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measured = measure(args, work, Path(folder))
    found = summary(measured["rounds"])
    print(f"a checkpoint: {measured['bytes'] / 2**20:.0f} MiB; {args.rounds} rounds of {args.every} steps")
    report.print_table([["", "median"], *([name, f"{value:.3f}"] for name, value in found.items())])
    report.write(f"{args.device}_{args.model}_checkpoint", device, arguments=vars(args), summary=found, **measured)
    dist.shutdown()


if __name__ == "__main__":
    main()
