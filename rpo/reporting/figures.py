"""Figures as SVG text for inside a page: metrics along training, gold against distance, intervals of evaluations.

matplotlib draws, with the styles of a study's own figures; colours become the page's variables (--ink, --c0, ...), so that
one figure is legible on white and on black. Thin lines are seeds, thick ones their mean at the steps that all seeds have;
bars are one standard error, over seeds, or of the prompts where there is one seed and task=overopt measured its error.
"""

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean

import matplotlib
from matplotlib.figure import Figure

from rpo.overopt.figures import COLORS, style
from rpo.reporting.collect import Group
from rpo.text import clean, number

# Metric: title, unit.
SHOWN = {
    "gold": ("Gold reward", ""),
    "kl": ("KL to the reference", "nats per answer"),
    "shift/chosen": ("Chosen log-probs", "nats, policy minus reference"),
    "rewards/accuracies": ("Held-out accuracy", "share of pairs"),
    "loss/preference": ("Held-out preference loss", "nats"),
    "displacement_rate": ("Displaced pairs", "share"),
}
_INK, _QUIET, _RULE = "#1c1c1a", "#5f5f58", "#d9d8d2"
_VARIABLES = {color.lower(): f"var(--c{i})" for i, color in enumerate(COLORS)}
_VARIABLES |= {_INK: "var(--ink)", _QUIET: "var(--quiet)", _RULE: "var(--rule)"}
_RC = {"svg.fonttype": "none", "svg.hashsalt": "rpo", "text.parse_math": False, "font.size": 8.5, "axes.linewidth": 0.7}
_RC |= {f"axes.spines.{side}": False for side in ("left", "right", "top")}
_RC |= {name: _QUIET for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")}
_RC |= {"axes.grid": True, "axes.grid.axis": "y", "grid.color": _RULE, "grid.linewidth": 0.6, "axes.axisbelow": True}
_RC |= {"ytick.major.size": 0, "xtick.major.size": 3, "xtick.major.width": 0.7, "axes.unicode_minus": True}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Line:
    """`points`: (x, y, standard error or None) in the order of x; a faint line is one seed of several."""

    label: str
    style: int
    points: Sequence[tuple[float, float, float | None]]
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """`level`: a dotted line at a y, and its name."""

    title: str
    unit: str
    x: str
    lines: Sequence[Line]
    level: tuple[float, str] | None = None


@dataclass(frozen=True)
class Forest:
    """A row per interval: (name, value, low, high), about a dotted line at `zero`."""

    title: str
    unit: str
    rows: Sequence[tuple[str, float, float, float]]
    zero: float | None = 0.0


# ---- which charts


def along(arms: Sequence[Group]) -> list[Chart]:
    """Metrics by step, those that are known at two steps of some run."""
    charts = []
    for name, (title, unit) in SHOWN.items():
        lines = [line for arm in arms for line in _lines(arm, name, lambda point: point["step"])]
        if any(len(line.points) > 1 for line in lines):
            level = (0.0, "reference") if name == "shift/chosen" else None
            charts.append(Chart(title, unit, "optimizer step", lines, level=level))
    return charts


def against_distance(arms: Sequence[Group]) -> Chart | None:
    """Gold against sqrt(KL), a line per arm from the left to its end; None where no run has both at two steps."""

    def distance(point: dict) -> float | None:
        return math.sqrt(max(point["kl"], 0)) if "kl" in point else None

    lines = [line for arm in arms for line in _lines(arm, "gold", distance)]
    if not any(len(line.points) > 1 for line in lines):
        return None
    starts = [m.curve[0]["gold"] for arm in arms for m in arm.judged if m.curve[0].keys() >= {"gold", "kl"}]
    level = (mean(starts), "start") if starts else None
    return Chart(*SHOWN["gold"], "\u221aKL to the reference (\u221anats)", lines, level=level)


def _lines(arm: Group, name: str, x: Callable[[dict], float | None]) -> list[Line]:
    curves = [[p for p in member.curve if name in p and x(p) is not None] for member in arm.judged]
    curves = [curve for curve in curves if curve]
    by_step = [{point["step"]: point for point in curve} for curve in curves]
    points = []
    for step in sorted(set.intersection(*map(set, by_step))) if curves else ():
        at_step = [of[step] for of in by_step]
        points.append((mean(map(x, at_step)), *arm.average(name, at_step)))
    thick = [Line(arm.short, arm.style, points)] if points else []
    if len(curves) < 2:
        return thick
    return [*(Line(arm.short, arm.style, [(x(p), p[name], None) for p in c], faint=True) for c in curves), *thick]


# ---- drawing


def describe(chart: Chart | Forest) -> str:
    """What a chart shows, in words, for those who cannot see it."""
    unit = f" ({chart.unit})" if chart.unit else ""
    if isinstance(chart, Forest):
        rows = "; ".join(f"{name}: {number(v)} [{number(low)}, {number(high)}]" for name, v, low, high in chart.rows)
        return f"{chart.title}{unit}. {rows}"
    ends = [f"{line.label} from {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in thick(chart)]
    return f"{chart.title}{unit} against {chart.x}. {'; '.join(ends)}"


def thick(chart: Chart) -> list[Line]:
    return [line for line in chart.lines if not line.faint]


def svg(chart: Chart | Forest, *, wide: bool = False) -> str:
    """The SVG element. Its ids begin with "chart-", to be made unique in a page."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that only the page's font has
        size, draw = (5.0, 3.7) if wide else (3.7, 2.6), _draw_lines
        if isinstance(chart, Forest):
            size, draw = (5.6, 0.55 + 0.24 * len(chart.rows)), _draw_forest
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), chart)
        return _for_page(figure, "chart", describe(chart))


@lru_cache(maxsize=64)
def swatch(number: int) -> str:
    """A short piece of an arm's line with its marker, for a legend; decoration beside its name. Its ids begin with "swatch-"."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(0.34, 0.17))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.plot([0, 1, 2], [0, 0, 0], lw=1.6, ms=5, markevery=[1], clip_on=False, **style(number))
        axes.set(xlim=(0, 2), ylim=(-1, 1))
        axes.axis("off")
        return _for_page(figure, "swatch", None)


def _draw_lines(axes, chart: Chart) -> None:
    for line in chart.lines:
        x, y, errors = zip(*line.points, strict=True)
        own = style(line.style)
        if line.faint:
            lone = own | {"marker": own["marker"] if len(x) == 1 else ""}
            axes.plot(x, y, lw=0.9, alpha=0.4, ms=3, **lone)
        else:
            errors = [error or 0 for error in errors]
            bars = errors if any(errors) else None
            axes.errorbar(x, y, bars, lw=1.8, ms=4.6, elinewidth=0.9, capsize=2, zorder=3, **own)
    if chart.level:
        axes.axhline(chart.level[0], color=_INK, lw=0.8, ls=":", zorder=2)
        at = {"xy": (1, chart.level[0]), "xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate(clean(chart.level[1]), **at, xytext=(0, 1), textcoords="offset points", fontsize=7.5)
    axes.set_xlabel(clean(chart.x))


def _draw_forest(axes, forest: Forest) -> None:
    for i, (_, value, low, high) in enumerate(forest.rows):
        axes.plot([low, high], [i, i], lw=1.8, color=COLORS[0], solid_capstyle="butt")
        axes.plot([value], [i], "o", ms=4.8, color=COLORS[0])
    if forest.zero is not None:
        axes.axvline(forest.zero, color=_INK, lw=0.8, ls=":")
    names = [clean(name) for name, *_ in forest.rows]
    axes.set_yticks(range(len(names)), [n if len(n) <= 40 else f"{n[:18]}\u2026{n[-21:]}" for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(clean(forest.unit))


def _for_page(figure: Figure, prefix: str, label: str | None) -> str:
    """matplotlib's file as one element: no prolog, metadata or style sheet, ids of its own, colours of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.endswith(("metadata", "style"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag, element.tail = element.tag.removeprefix(_SVG), None
        element.text = element.text if (element.text or "").strip() else None
        own = element.attrib
        if element.tag == "g":  # of the others each is referred to
            own.pop("id", None)
        if "id" in own:
            own["id"] = f"{prefix}-{own['id']}"
        if _HREF in own:
            own["href"] = f"#{prefix}-{own.pop(_HREF)[1:]}"
        if "clip-path" in own:
            own["clip-path"] = own["clip-path"].replace("#", f"#{prefix}-")
        if "d" in own:
            own["d"] = " ".join(re.sub(r"(\.\d\d)\d+", r"\1", own["d"]).split())
        if "style" in own:
            own["style"] = re.sub(r"#[0-9a-f]{6}\b", lambda color: _VARIABLES.get(color[0], color[0]), own["style"])
    spoken = {"aria-hidden": "true"} if label is None else {"role": "img", "aria-label": clean(label)}
    root.attrib = {"class": "swatch" if label is None else "chart", "viewBox": root.get("viewBox")} | spoken
    return ET.tostring(root, encoding="unicode")
