"""Which charts a report shows of its runs: metrics along training, gold against distance, the end against what was swept.

A group has one colour, line and marker in all of them. Thin lines are seeds, thick ones their mean at the steps that all
seeds have; bars are one standard error, over seeds, or of the prompts where there is one seed and its error is known.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from rpo.reporting.page import Figure
from rpo.reporting.svg import Chart, Line

# Metric: title, unit.
SHOWN = {
    "gold": ("Gold reward", ""),
    "kl": ("KL to the reference", "nats per answer"),
    "shift/chosen": ("Chosen answers", "nats, policy minus reference"),
    "rewards/accuracies": ("Held-out accuracy", "share of pairs"),
    "loss/preference": ("Held-out preference loss", "nats"),
    "displacement_rate": ("Displaced pairs", "share"),
}
_MOST = 6  # panels of a figure
_GREY = 6  # the style of what joins points of different groups


@dataclass(frozen=True)
class Curves:
    """A group as charts need it: of each seed a curve {"step", metric: value}, of one seed the errors too; what was swept."""

    label: str
    style: int
    seeds: Sequence[Sequence[dict]]
    errors: dict[tuple[int, str], float]  # (step, metric) -> standard error, of a group of one
    swept: dict[str, Any]
    form: str  # of the loss, which no number says


def along(groups: Sequence[Curves]) -> list[Figure]:
    """Metrics by step, those that are known at two steps of some run."""
    charts = []
    for name, (title, unit) in SHOWN.items():
        lines = [line for group in groups for line in _lines(group, name, lambda point: point["step"])]
        if any(len(line.points) > 1 for line in lines):
            level = (0.0, "reference") if name == "shift/chosen" else None
            charts.append(Chart(title, unit, "optimizer step", lines, level=level))
    caption = (
        "Evaluations along training. Thin lines are seeds, thick ones their mean; bars are one standard error. Runs that did not "
        "finish are drawn only where none of their group did."
    )
    return [Figure("training", caption, charts[:_MOST])] if charts else []


def against_distance(groups: Sequence[Curves]) -> list[Figure]:
    """Gold against sqrt(KL), and beside it what does not need a gold, where both were measured at two steps or more."""
    charts = []
    for name in ("gold", "shift/chosen", "rewards/accuracies"):
        lines = [line for group in groups for line in _lines(group, name, _distance)]
        if any(len(line.points) > 1 for line in lines):
            starts = [curve[0] for group in groups for curve in group.seeds if curve and _has(curve[0], name, "kl")]
            level = (mean(point[name] for point in starts), "at the start") if starts and name == "gold" else None
            charts.append(Chart(*SHOWN[name], "sqrt(KL to the reference), sqrt nats", lines, level=level))
    caption = (
        "The same against how far the policy went, a line per group from the left to its end. Where gold turns down while "
        "accuracy stays, the policy is overoptimised; of two lines at one distance the higher gold is the better use of it."
    )
    return [Figure("distance", caption, charts)] if charts and charts[0].title == SHOWN["gold"][0] else []


def _distance(point: dict) -> float | None:
    return math.sqrt(max(point["kl"], 0)) if "kl" in point else None


def _has(point: dict, *names: str) -> bool:
    return all(name in point for name in names)


def _lines(group: Curves, name: str, x: Callable[[dict], float | None]) -> list[Line]:
    curves = [[point for point in curve if name in point and x(point) is not None] for curve in group.seeds]
    curves = [curve for curve in curves if curve]
    if not curves:
        return []
    by_step = [{point["step"]: point for point in curve} for curve in curves]
    points = []
    for step in sorted(set.intersection(*map(set, by_step))):
        there = [of[step] for of in by_step]
        values = [point[name] for point in there]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else group.errors.get((step, name))
        points.append((mean(map(x, there)), mean(values), error))
    thick = [Line(group.label, group.style, points)] if points else []
    if len(curves) == 1:
        return thick
    thin = [Line(group.label, group.style, [(x(p), p[name], None) for p in curve], faint=True) for curve in curves]
    return [*thin, *thick]


def _order(value: Any) -> tuple[float, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (float(value), "") if number else (math.inf, str(value))


def against_swept(groups: Sequence[Curves], keys: Sequence[str]) -> list[Figure]:
    """The last evaluation against each of the swept `keys`, evenly spaced; what differs in that key alone is joined."""
    figures = []
    for key in keys[:2]:
        values = sorted({group.swept[key] for group in groups if key in group.swept}, key=_order)
        if len(values) < 2:
            continue
        place = {value: float(i) for i, value in enumerate(values)}
        charts = []
        for name in ("gold", "shift/chosen", "rewards/accuracies"):
            series: dict[tuple, list[tuple[Curves, tuple[float, float, float | None]]]] = {}
            for group in groups:
                if key in group.swept and (end := _end(group, name)):
                    rest = tuple((k, repr(v)) for k, v in sorted(group.swept.items()) if k != key)
                    series.setdefault((group.form, rest), []).append((group, (place[group.swept[key]], *end)))
            joined = [members for members in series.values() if len(members) > 1]
            lines = [
                Line("", _GREY, sorted((x, y, None) for _, (x, y, _) in members), faint=True) for members in joined
            ]
            lines += [Line(group.label, group.style, [end]) for members in joined for group, end in members]
            if lines:
                title, unit = SHOWN[name]
                there = {x for line in lines for x, *_ in line.points}
                words = {x: f"{value:g}" if isinstance(value, float) else str(value) for value, x in place.items()}
                words = [(x, word) for x, word in words.items() if x in there]
                charts.append(Chart(title, unit, key, lines, ticks=words))
        caption = f"The last evaluation against {key} (evenly spaced). Grey lines join what is otherwise equal; bars as above."
        name = re.sub(r"\W", "_", f"swept_{key}")  # a file's: keys are what a config.yaml says
        figures += [Figure(name, caption, charts)] if charts else []
    return figures


def _end(group: Curves, name: str) -> tuple[float, float | None] | None:
    last = [curve[-1] for curve in group.seeds if curve and name in curve[-1]]
    if not last:
        return None
    values = [point[name] for point in last]
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else group.errors.get((last[0]["step"], name))
    return mean(values), error
