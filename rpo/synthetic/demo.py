"""The results of the demo's sweep: a table of gold reward, and a picture of overoptimisation.

python -m rpo.synthetic.demo SWEEP_FOLDER [SWEEP_FOLDER ...]      # folders of train.py -m recipe=demo loss.eta=... seed=...
"""

import statistics
import sys
from collections import defaultdict
from itertools import cycle
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from rpo import config
from rpo.runs import log

matplotlib.use("Agg")

Curves = dict[float, list[list[dict]]]  # eta -> one list of evaluations per seed


def read(folders: list[Path]) -> Curves:
    """The evaluations of every cell, by eta, in the order of seeds."""
    curves = defaultdict(list)
    for folder in folders:
        for cell in sorted(path.parent for path in folder.glob("*/metrics.jsonl")):
            settings = config.read_yaml(cell / "config.yaml")
            events = [e for e in log.read_jsonl(cell / "metrics.jsonl") if e["split"] == "eval"]
            curves[settings["loss"]["eta"]].append((settings["seed"], events))
    return {eta: [events for _, events in sorted(runs, key=lambda run: run[0])] for eta, runs in sorted(curves.items())}


def summarise(events: list[dict]) -> dict[str, float]:
    """One run: gold at its peak and at the end, the drop between them, KL (nats) and chosen shift (nats) at the end."""
    golds = [event["gold"] for event in events]
    end = events[-1]
    summary = {"peak": max(golds), "end": end["gold"], "drop": max(golds) - end["gold"]}
    return summary | {"kl": end["kl"], "shift": end["shift/chosen"]}


def label(eta: float) -> str:
    return f"RPO eta {eta:g}" if eta else "DPO"


def table(curves: Curves) -> str:
    """Means over seeds, with the standard deviation of the drop; the SFT row is every run's evaluation at step 0."""
    start = statistics.mean(run[0]["gold"] for runs in curves.values() for run in runs)
    header = f"{'':14}{'gold peak':>10}{'gold end':>10}{'drop':>14}{'KL':>8}{'shift/chosen':>14}{'seeds':>7}"
    lines = [header, f"{'SFT':14}{start:10.2f}{start:10.2f}{'-':>14}{0:8.2f}{0:14.2f}{'':>7}"]
    for eta, runs in curves.items():
        rows = [summarise(run) for run in runs]
        mean = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
        spread = statistics.stdev(row["drop"] for row in rows) if len(rows) > 1 else 0.0
        drop = f"{mean['drop']:.2f} +- {spread:.2f}"
        gold = f"{label(eta):14}{mean['peak']:10.2f}{mean['end']:10.2f}{drop:>14}"
        lines.append(f"{gold}{mean['kl']:8.2f}{mean['shift']:14.2f}{len(rows):7d}")
    return "\n".join(lines)


def draw(curves: Curves, path: Path) -> None:
    """Gold against sqrt(KL), and chosen shift against step: thin lines are seeds, thick ones their mean."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colors = cycle(("C3", "C1", "C4", "C0", "C2", "C5", "C6", "C7", "C8"))
    for color, (eta, runs) in zip(colors, curves.items(), strict=False):
        points = {
            left: [[(e["kl"] ** 0.5, e["gold"]) for e in run] for run in runs],
            right: [[(e["step"], e["shift/chosen"]) for e in run] for run in runs],
        }
        for axes, lines in points.items():
            for line in lines:
                axes.plot(*zip(*line, strict=True), color=color, alpha=0.25, lw=1)
            mean = [tuple(map(statistics.mean, zip(*step, strict=True))) for step in zip(*lines, strict=True)]
            axes.plot(*zip(*mean, strict=True), color=color, lw=2.2, marker="o", ms=4, label=label(eta))
    left.set(xlabel="sqrt(KL to the reference)  (nats^0.5)", ylabel="exact gold reward")
    left.set_title("Gold reward as the policy moves away")
    right.set(xlabel="optimizer step", ylabel="nats per chosen response, policy minus reference")
    right.set_title("Log-probability of held-out chosen responses")
    right.axhline(0, color="black", lw=0.8, ls=":")
    left.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]]
    curves = read(folders)
    if not curves:
        sys.exit(f"error: no finished runs under {', '.join(map(str, folders)) or '(no folder given)'}")
    path = folders[0].parent / "demo.png"
    draw(curves, path)
    print(table(curves), f"\n{path.resolve()}", sep="\n")


if __name__ == "__main__":
    main()
