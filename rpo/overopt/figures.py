"""A study's figures as PNG files: gold reward against distance, and what else moves on the way.

A group is `groups.Group`. Thin lines are seeds, thick lines with markers (one per checkpoint) their mean at the steps
that all seeds have; bars are one standard error, over seeds, or of its prompts where there is one seed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rpo.overopt.curve import column, distance, value
from rpo.runs.groups import Group

# Distinct with any colour vision (Okabe and Ito), and dark enough for a thin line on white. Black is not #000000, which
# matplotlib leaves out of the fills of an SVG, where reports set colours of their own.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#010101", "#8C6D31")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLES = ("-", "--", ":", "-.")  # after eight groups the colours begin again with another line and marker
_REFERENCE = {"color": "black", "lw": 0.8, "ls": ":"}
_DISTANCE = "sqrt(KL to the reference)  (nats^0.5)"
_SIGNALS = (("shift/chosen", "chosen, policy minus reference (nats)"), ("rewards/accuracies", "held-out accuracy"))
_HEALTH = (
    ("entropy", "entropy (nats per token)"),
    ("entropy/top10", "entropy of the top 10 (nats)"),
    ("mass/top10", "probability of the top 10"),
    ("samples/length", "length of answers (tokens)"),
    ("samples/ended", "share of answers that ended"),
)


def draw_study(groups: Sequence[Group], folder: Path, best_of_n: Sequence[dict] = ()) -> list[Path]:
    """Writes into `folder` every figure whose metrics were measured; returns the paths.

    `best_of_n` is the reference's own curve (`best_of_n`), a yardstick.
    """
    folder.mkdir(parents=True, exist_ok=True)
    styles = _styles(groups)
    figures = {
        "overoptimisation": lambda: _distance_figure(groups, styles, best_of_n),
        "beta": lambda: _beta_figure(groups),
        "signals": lambda: _step_figure(groups, styles, _SIGNALS, columns=2),
        "accuracy": lambda: _accuracy_figure(groups, styles),
        "health": lambda: _step_figure(groups, styles, _HEALTH, columns=3),
    }
    paths = []
    for name, draw in figures.items():
        if (figure := draw()) is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
            plt.close(figure)
    return paths


def style(i: int) -> dict[str, str]:
    """Colour, marker and line style of the i-th group, as keyword arguments of matplotlib."""
    again = i // len(COLORS)
    marker = _MARKERS[(i + again) % len(_MARKERS)]
    return {"color": COLORS[i % len(COLORS)], "marker": marker, "ls": _STYLES[again % len(_STYLES)]}


def _styles(groups: Sequence[Group]) -> dict[str, dict]:
    return {group.label: style(i) for i, group in enumerate(groups)}


def _measured(groups: Sequence[Group], *names: str) -> list[Group]:
    """The groups in which every checkpoint of every seed has all of `names`."""

    def complete(group: Group) -> bool:
        points = [point for run in group.runs for point in run["curve"]]
        return all(value(point, name) is not None for point in points for name in names)

    return [group for group in groups if complete(group)]


def _panels(number: int, columns: int, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    rows, columns = -(-number // columns), min(number, columns)
    size = (5.2 * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for empty in axes.flat[number:]:
        empty.remove()
    return figure, list(axes.flat[:number])


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend of all panels, below them: it hides no point, however many groups there are."""
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    entries = dict(sorted(entries.items(), key=lambda entry: entry[0] == "reference"))  # last; the rest in their order
    widest = max(map(len, entries), default=1)
    columns = max(1, min(len(entries), int(figure.get_figwidth() * 13 / (widest + 7))))
    rows = -(-len(entries) // columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.19 * rows)
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def _line(axes: Axes, group: Group, style: dict, x: Callable, name: str) -> None:
    """The group's metric `name` against `x` of a curve: its seeds thin, their mean with one standard error."""
    curves = [run["curve"] for run in group.runs]
    common = set.intersection(*({point["step"] for point in curve} for curve in curves))
    kept = [[point for point in curve if point["step"] in common] for curve in curves]
    x_SC, y_SC = np.array([x(curve) for curve in kept]), np.array([column(curve, name) for curve in kept])
    if len(curves) > 1:
        for curve in curves:
            axes.plot(x(curve), column(curve, name), color=style["color"], ls=style["ls"], alpha=0.3, lw=0.8)
        error_C = y_SC.std(0, ddof=1) / np.sqrt(len(curves))
    else:
        error_C = np.array([point["metrics"][name].get("se") or 0 for point in curves[0]])
    axes.errorbar(
        x_SC.mean(0), y_SC.mean(0), error_C, label=group.label, lw=1.8, ms=4, elinewidth=1, capsize=2, **style
    )


def _reference(axes: Axes, groups: Sequence[Group]) -> None:
    start = np.mean([value(run["curve"][0], "gold") for group in groups for run in group.runs])
    axes.axhline(start, **_REFERENCE, label="reference")


def _distance_figure(groups: Sequence[Group], styles: dict, best_of_n: Sequence[dict]) -> Figure | None:
    """Gold reward, and beside it the proxy that training raises, against sqrt(KL)."""
    shown = {name: _measured(groups, "kl", name) for name in ("gold", "proxy")}
    names = [name for name, having in shown.items() if having]
    if not names:
        return None
    figure, panels = _panels(len(names), 2, height=4.4)
    for axes, name in zip(panels, names, strict=True):
        for group in shown[name]:
            _line(axes, group, styles[group.label], distance, name)
        axes.set(xlabel=_DISTANCE, ylabel={"gold": "gold reward", "proxy": "implicit reward (beta x nats)"}[name])
        axes.set_title({"gold": "Gold reward", "proxy": "Proxy: the implicit reward"}[name])
    if "gold" in names:
        _reference(panels[0], shown["gold"])
        if best_of_n:
            d = [point["kl"] ** 0.5 for point in best_of_n]
            gold, error = ([point["gold"][key] or 0 for point in best_of_n] for key in ("value", "se"))
            label = f"best of n <= {max(point['n'] for point in best_of_n)} of the reference"
            panels[0].errorbar(d, gold, error, color="0.45", lw=1.8, elinewidth=1, zorder=4, label=label)
    _legend(figure, panels)
    return figure


def _beta_figure(groups: Sequence[Group]) -> Figure | None:
    """Final gold reward against beta: a line for each form and eta that was run at two or more betas, else a point."""
    lines: dict[str, list[Group]] = {}
    for group in _measured(groups, "gold"):
        if "beta" in group.loss:
            # The label without its beta: groups that differ in anything else stay apart.
            beta = f" beta {group.loss['beta']:g}"
            lines.setdefault(group.label.replace(beta, "", 1), []).append(group)
    drawn = [group for line in lines.values() for group in line]
    betas = sorted({group.loss["beta"] for group in drawn})
    if len(betas) < 2:
        return None
    figure, (axes,) = _panels(1, 1, height=4.2)
    for i, (label, line) in enumerate(lines.items()):
        line = sorted(line, key=lambda group: group.loss["beta"])
        finals = [[column(run["curve"], "gold")[-1] for run in group.runs] for group in line]
        mean = np.array([np.mean(final) for final in finals])
        spread = np.array([np.std(final, ddof=1) if len(final) > 1 else 0 for final in finals])
        # Beside one another, so that bars do not hide each other.
        x = np.array([group.loss["beta"] for group in line]) * 1.03 ** (i - (len(lines) - 1) / 2)
        axes.errorbar(x, mean, spread, label=label, lw=1.8, ms=5, elinewidth=1, capsize=3, **style(i))
    _reference(axes, drawn)
    axes.set(xscale="log", xlabel="beta", ylabel="gold reward at the end (bars: sd over seeds)")
    axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
    axes.minorticks_off()
    _legend(figure, [axes])
    return figure


def _step_figure(
    groups: Sequence[Group], styles: dict, names: Sequence[tuple[str, str]], columns: int
) -> Figure | None:
    """One panel for each of `names`, against the optimizer step."""
    shown = [(name, label, having) for name, label in names if (having := _measured(groups, name))]
    if not shown:
        return None
    figure, panels = _panels(len(shown), columns)
    for axes, (name, label, having) in zip(panels, shown, strict=True):
        for group in having:
            _line(axes, group, styles[group.label], lambda curve: [point["step"] for point in curve], name)
        if name == "shift/chosen":
            axes.axhline(0, **_REFERENCE)
        axes.set(xlabel="optimizer step", ylabel=label)
    _legend(figure, panels)
    return figure


def _accuracy_figure(groups: Sequence[Group], styles: dict) -> Figure | None:
    """Every trained checkpoint by held-out accuracy and gold reward; the last of each run is outlined."""
    shown = _measured(groups, "gold", "rewards/accuracies")
    if not shown:
        return None
    figure, (axes,) = _panels(1, 1, height=4.4)
    for group in shown:
        style = {"color": styles[group.label]["color"], "marker": styles[group.label]["marker"]}
        columns = [[column(run["curve"], name) for run in group.runs] for name in ("rewards/accuracies", "gold")]
        axes.scatter(*(np.concatenate([c[1:] for c in column]) for column in columns), s=18, alpha=0.5, lw=0, **style)
        last = [[c[-1] for c in column] for column in columns]
        axes.scatter(*last, s=55, edgecolors="black", linewidths=1, label=group.label, **style)
    axes.set(xlabel="held-out accuracy", ylabel="gold reward", title="Large and outlined: the end of a run")
    _legend(figure, [axes])
    return figure
