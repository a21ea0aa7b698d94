"""A run's curves as PNG files, drawn from its `metrics.jsonl`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# One picture each: file name, y label, and the metrics it shows (those that the run has).
_PICTURES = (
    ("loss", "loss (nats)", ("loss", "loss/preference", "loss/sft")),
    ("rewards", "implicit reward (beta x nats)", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("shift", "policy minus reference (nats per response)", ("shift/chosen", "shift/rejected")),
    ("accuracy", "share of pairs", ("rewards/accuracies", "displacement_rate")),
    ("gold", "exact gold reward", ("gold",)),
)
# Fixed, because measuring them draws the picture several times over: in a sweep of short cells that was most of the time.
_MARGINS = {"left": 0.11, "right": 0.97, "top": 0.96, "bottom": 0.13}


def draw_run(events: list[dict], folder: Path) -> list[Path]:
    """Writes one PNG per group of metrics that `events` holds; returns their paths."""
    folder.mkdir(exist_ok=True)
    paths = []
    for name, label, metrics in _PICTURES:
        figure, axes = plt.subplots(figsize=(7, 4), gridspec_kw=_MARGINS)
        for color, metric in zip(("C0", "C1", "C2"), metrics, strict=False):
            for split, style in (("train", {"alpha": 0.4, "lw": 1}), ("eval", {"marker": "o", "ms": 4})):
                points = [(e["pairs"], e[metric]) for e in events if e["split"] == split and metric in e]
                if points:
                    axes.plot(*zip(*points, strict=True), color=color, label=f"{split}/{metric}", **style)
        if axes.lines:
            if name == "shift":
                axes.axhline(0, color="black", lw=0.8, ls=":")
            axes.set(xlabel="pairs seen", ylabel=label)
            axes.legend(frameon=False, fontsize=8)
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=100)
        plt.close(figure)
    return paths


def draw_heatmap(table: list[dict], x: str, y: str, values: tuple[str, ...], path: Path) -> None:
    """A sweep's final values over two swept keys, one panel per metric; repeated cells (seeds) are averaged."""
    xs, ys = (sorted({row[key] for row in table}, key=_as_number) for key in (x, y))
    shown = [value for value in values if any(row.get(value) is not None for row in table)]
    figure, panels = plt.subplots(1, len(shown), figsize=(4.4 * len(shown), 3.6), layout="constrained", squeeze=False)
    for axes, value in zip(panels[0], shown, strict=True):
        cells = [
            [[r[value] for r in table if (r[x], r[y]) == (a, b) and r.get(value) is not None] for a in xs] for b in ys
        ]
        grid = [[sum(cell) / len(cell) if cell else float("nan") for cell in row] for row in cells]
        image = axes.imshow(grid, origin="lower", aspect="auto")
        for i, row in enumerate(grid):
            for j, mean in enumerate(row):
                text = f"{mean:.3g}" if mean == mean else "failed"
                axes.text(j, i, text, ha="center", va="center", bbox={"fc": "white", "alpha": 0.7, "lw": 0})
        axes.set(xlabel=x, ylabel=y, title=value, xticks=range(len(xs)), yticks=range(len(ys)))
        axes.set_xticklabels(xs)
        axes.set_yticklabels(ys)
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _as_number(value: str) -> tuple[float, str]:
    """Orders 2 before 10, and words after numbers."""
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value
