"""A run's curves as PNG files, drawn from its `metrics.jsonl`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")

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


def draw_heatmap(
    table: list[dict], x: str, y: str, values: tuple[str, ...], path: Path, apart: Sequence[str] = ()
) -> None:
    """A sweep's final values over two swept keys, one panel per metric; repeated cells (seeds) are averaged.

    Cells that differ in the keys `apart` too have a row of panels each. A square without a value is blank, and says so
    where its cells failed or were interrupted.
    """
    xs, ys = (_values_of(table, key) for key in (x, y))
    figure, panels = _panels(table, values, apart)
    for axes, value, title, rows in panels:
        cells = [[_mean([r for r in rows if (r[x], r[y]) == (a, b)], value) for a in xs] for b in ys]
        image = axes.imshow([[mean for mean, _ in row] for row in cells], origin="lower", aspect="auto")
        for i, row in enumerate(cells):
            for j, (_, text) in enumerate(row):
                if text:
                    axes.text(j, i, text, ha="center", va="center", bbox={"fc": "white", "alpha": 0.7, "lw": 0})
        axes.set(xlabel=x, ylabel=y, title=title, xticks=range(len(xs)), yticks=range(len(ys)))
        axes.set_xticklabels(xs)
        axes.set_yticklabels(ys)
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_line(table: list[dict], x: str, values: tuple[str, ...], path: Path, apart: Sequence[str] = ()) -> None:
    """The same over one swept key, evenly spaced; the line has a gap where a cell left no value."""
    xs = _values_of(table, x)
    figure, panels = _panels(table, values, apart)
    for axes, value, title, rows in panels:
        cells = [_mean([row for row in rows if row[x] == a], value) for a in xs]
        axes.plot(range(len(xs)), [mean for mean, _ in cells], marker="o")
        for j, (mean, text) in enumerate(cells):
            y, across = (mean, axes.transData) if mean == mean else (0.02, axes.get_xaxis_transform())
            axes.annotate(text, (j, y), (0, 5), xycoords=across, textcoords="offset points", ha="center")
        axes.set(xlabel=x, title=title, xticks=range(len(xs)), xlim=(-0.5, len(xs) - 0.5))  # also where no value is
        axes.set_xticklabels(xs)
        axes.margins(y=0.15)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _values_of(table: list[dict], key: str) -> list[str]:
    return sorted({row[key] for row in table}, key=_as_number)


def settings_of(table: list[dict], keys: Sequence[str]) -> list[tuple[str, ...]]:
    """The values that the keys have together, each once, in order."""
    return sorted({tuple(row[key] for key in keys) for row in table}, key=lambda own: [*map(_as_number, own)])


def _panels(
    table: list[dict], values: tuple[str, ...], apart: Sequence[str]
) -> tuple[plt.Figure, list[tuple[plt.Axes, str, str, list[dict]]]]:
    """A figure, and its panels with metric, title and cells: a row of them for each setting of `apart`."""
    shown, settings = [v for v in values if any(row.get(v) is not None for row in table)], settings_of(table, apart)
    size = (4.4 * len(shown), 3.6 * len(settings))
    figure, grid = plt.subplots(len(settings), len(shown), figsize=size, layout="constrained", squeeze=False)
    panels = []
    for line, own in zip(grid, settings, strict=True):
        rows = [row for row in table if tuple(row[key] for key in apart) == own]
        where = ", ".join(f"{key}={value}" for key, value in zip(apart, own, strict=True))
        panels += [(axes, v, f"{v}\n{where}".strip(), rows) for axes, v in zip(line, shown, strict=True)]
    return figure, panels


def _mean(rows: list[dict], value: str) -> tuple[float, str]:
    """The finished rows' mean (NaN without one), and what to write there; another cell's last evaluation is no result."""
    values = [row[value] for row in rows if row.get(value) is not None and row["state"] == "finished"]
    if values:
        return sum(values) / len(values), f"{sum(values) / len(values):.3g}"
    states = {row["state"] for row in rows}
    return float("nan"), next((state for state in ("failed", "interrupted") if state in states), "")


def _as_number(value: str) -> tuple[float, str]:
    """Orders 2 before 10, and words after numbers."""
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value
