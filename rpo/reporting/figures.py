"""Figures as SVG text for inside a page: metrics along training, gold against distance, the end against what was swept.

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
from statistics import mean, stdev

import matplotlib
from matplotlib.figure import Figure

from rpo.overopt.figures import COLORS, style
from rpo.reporting.collect import Group
from rpo.reporting.text import clean, number
from rpo.runs import groups

# Metric: title, unit.
SHOWN = {
    "gold": ("Gold reward", ""),
    "kl": ("KL to the reference", "nats per answer"),
    "shift/chosen": ("Chosen log-probs", "nats, policy minus reference"),
    "rewards/accuracies": ("Held-out accuracy", "share of pairs"),
    "loss/preference": ("Held-out preference loss", "nats"),
    "displacement_rate": ("Displaced pairs", "share"),
}
_INK, _QUIET, _RULE, _BLACK = "#1c1c1a", "#5f5f58", "#d9d8d2", "#010101"  # matplotlib leaves #000000 out of fills
_VARIABLES = {_INK: "ink", _QUIET: "quiet", _RULE: "rule"} | {c.lower(): f"c{i}" for i, c in enumerate(COLORS)}
_VARIABLES[_BLACK] = f"c{COLORS.index('#000000')}"
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
    """`ticks`: words at positions of x; `level`: a dotted line at a y, and its name."""

    title: str
    unit: str
    x: str
    lines: Sequence[Line]
    ticks: Sequence[tuple[float, str]] | None = None
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


def against_distance(arms: Sequence[Group], name: str = "gold") -> Chart | None:
    """A metric against sqrt(KL), a line per arm from the left to its end; None where no run has both at two steps."""
    lines = [line for arm in arms for line in _lines(arm, name, _distance)]
    if not any(len(line.points) > 1 for line in lines):
        return None
    starts = [m.curve[0] for arm in arms for m in arm.judged if name in m.curve[0] and "kl" in m.curve[0]]
    level = (mean(point[name] for point in starts), "start") if starts and name == "gold" else None
    return Chart(*SHOWN[name], "\u221aKL to the reference (\u221anats)", lines, level=level)


def _distance(point: dict) -> float | None:
    return math.sqrt(max(point["kl"], 0)) if "kl" in point else None


def _lines(arm: Group, name: str, x: Callable[[dict], float | None]) -> list[Line]:
    curves = [[p for p in member.curve if name in p and x(p) is not None] for member in arm.judged]
    curves = [curve for curve in curves if curve]
    if not curves:
        return []
    by_step = [{point["step"]: point for point in curve} for curve in curves]
    points = []
    for step in sorted(set.intersection(*map(set, by_step))):
        there = [of[step] for of in by_step]
        points.append((mean(map(x, there)), *mean_and_error(arm, name, there)))
    thick = [Line(arm.short, arm.style, points)] if points else []
    if len(curves) == 1:
        return thick
    return [*(Line(arm.short, arm.style, [(x(p), p[name], None) for p in c], faint=True) for c in curves), *thick]


def mean_and_error(arm: Group, name: str, points: Sequence[dict]) -> tuple[float, float | None]:
    """Of a metric at one evaluation of each seed: the error over seeds, of one seed that of task=overopt, or None."""
    values = [point[name] for point in points]
    if len(values) > 1:
        return mean(values), stdev(values) / math.sqrt(len(values))
    return values[0], arm.judged[0].errors().get((points[0]["step"], name))


def against_swept(arms: Sequence[Group], key: str) -> list[Chart]:
    """The last evaluation against a swept key, its values evenly spaced; arms that differ in it alone are joined."""
    flats = {arm.label: groups.flat(arm.members[0].settings) for arm in arms}
    values = sorted({flat[key] for flat in flats.values() if _is_number(flat.get(key))})
    if len(values) < 2:
        return []
    place = {value: float(i) for i, value in enumerate(values)}
    charts = []
    for name in ("gold", "shift/chosen", "rewards/accuracies"):
        series: dict[str, list[Line]] = {}
        for arm in arms:
            ends = [member.curve[-1] for member in arm.judged if name in member.curve[-1]]
            if ends and flats[arm.label].get(key) in place:
                rest = repr(sorted((k, repr(v)) for k, v in _identity(arm).items() if k != key))
                end = (place[flats[arm.label][key]], *mean_and_error(arm, name, ends))
                series.setdefault(rest, []).append(Line(arm.short, arm.style, [end]))
        joined = [members for members in series.values() if len(members) > 1]
        grey = [Line("", -1, sorted((x, y, None) for line in members for x, y, _ in line.points)) for members in joined]
        lines = [*grey, *(line for members in joined for line in members)]
        if lines:
            there = {x for line in lines for x, *_ in line.points}
            ticks = [(x, f"{value:g}") for value, x in place.items() if x in there]
            charts.append(Chart(*SHOWN[name], key, lines, ticks=ticks))
    return charts


def _identity(arm: Group) -> dict:
    """The settings in which two arms have to agree, save the swept one, to be joined by a line."""
    settings = arm.members[0].settings
    try:
        own, _ = groups.identity(settings)
    except (KeyError, TypeError, ValueError):  # of another version: equal to nothing
        return {"label": arm.label}
    return own | {"loss.sft": settings["loss"]["sft"]}  # identity calls it none where eta is 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
    return [line for line in chart.lines if not line.faint and line.style >= 0]


def svg(chart: Chart | Forest, *, wide: bool = False) -> str:
    """The SVG element. Its ids begin with "chart-", to be made unique in a page."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that only the page's font has
        if isinstance(chart, Forest):
            figure = Figure(figsize=(5.6, 0.55 + 0.24 * len(chart.rows)), layout="constrained")
            _draw_forest(figure.subplots(), chart)
        else:
            figure = Figure(figsize=(5.0, 3.7) if wide else (3.7, 2.6), layout="constrained")
            _draw_lines(figure.subplots(), chart)
        return _for_page(figure, "chart", describe(chart))


@lru_cache(maxsize=64)
def swatch(number: int) -> str:
    """A short piece of an arm's line with its marker, for a legend; decoration beside its name. Its ids begin with "swatch-"."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(0.34, 0.17))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.plot([0, 1, 2], [0, 0, 0], lw=1.6, ms=5, markevery=[1], clip_on=False, **_style(number))
        axes.set(xlim=(0, 2), ylim=(-1, 1))
        axes.axis("off")
        return _for_page(figure, "swatch", None)


def _style(number: int) -> dict[str, str]:
    if number < 0:
        return {"color": _QUIET, "marker": "", "ls": "-"}
    of = style(number)
    return of | {"color": _BLACK} if of["color"] == "#000000" else of


def _draw_lines(axes, chart: Chart) -> None:
    for line in chart.lines:
        x, y, errors = zip(*line.points, strict=True)
        own = _style(line.style)
        if line.faint or line.style < 0:
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
    if chart.ticks:
        axes.set_xticks([x for x, _ in chart.ticks], [clean(word) for _, word in chart.ticks])
        axes.set_xlim(-0.4, max(x for x, _ in chart.ticks) + 0.4)
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
        for child in list(parent):
            if child.tag.endswith(("metadata", "style")):
                parent.remove(child)
    text = " ".join(value for element in root.iter() for value in element.attrib.values() if "#" in value)
    used = set(re.findall(r"(?:^|\s|\()#([\w-]+)", text))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if not (element.text or "").strip():
            element.text = None
        element.tail = None
        if "d" in element.attrib:
            element.set("d", " ".join(re.sub(r"(\.\d\d)\d+", r"\1", element.get("d")).split()))
        if element.get("id") in used:
            element.set("id", f"{prefix}-{element.get('id')}")
        else:
            element.attrib.pop("id", None)
        if _HREF in element.attrib:
            element.set("href", f"#{prefix}-{element.attrib.pop(_HREF)[1:]}")
        if "style" in element.attrib:
            element.set("style", re.sub(r"#[0-9a-f]{6}\b", _variable, element.get("style")))
        if "clip-path" in element.attrib:
            element.set("clip-path", element.get("clip-path").replace("#", f"#{prefix}-"))
    shape = {"viewBox": root.get("viewBox")}
    spoken = {"aria-hidden": "true"} if label is None else {"role": "img", "aria-label": clean(label)}
    root.attrib.clear()
    root.attrib.update({"class": "swatch" if label is None else "chart"} | shape | spoken)
    return ET.tostring(root, encoding="unicode")


def _variable(color: re.Match) -> str:
    return f"var(--{_VARIABLES[color[0]]})" if color[0] in _VARIABLES else color[0]
