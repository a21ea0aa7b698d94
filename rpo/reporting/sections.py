"""A Report as the dict that report.html.j2 lays out. Text is plain here; it is escaped when the page is rendered."""

import datetime
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rpo.evals import pairing
from rpo.reporting import eval_verdicts, figures, side_by_side, tables
from rpo.reporting.collect import Report, Results
from rpo.reporting.figures import Chart, Forest
from rpo.reporting.side_by_side import Comparison
from rpo.text import counted, typeset


def layout(report: Report, title: str, sources: Sequence[str], most: int, environment: dict) -> dict[str, Any]:
    """The page of a report on the folders `sources`, with `most` answers side by side per comparison.

    `environment` is that of the report itself. In the page `figure` is the first screen's, `charts` are along training.
    """
    counts = [counted(len(report.members), "run"), counted(len(report.evaluations), "evaluation")]
    facts = [", ".join(count for count in counts if not count.startswith("0 ")), ", ".join(sources)]
    facts += [f"{datetime.datetime.now():%Y-%m-%d %H:%M}", f"code {tables.revision(environment)}"]
    commands = [each["command"] for each in tables.environments(report) if isinstance(each.get("command"), list)]
    states = Counter(member.record.state for member in report.members)
    return dict(
        title=title,
        facts=facts,
        headline=typeset(eval_verdicts.headline(report)),
        asides=list(map(typeset, eval_verdicts.asides(report))),
        arms=tables.arms(report),
        figure=main_figure(report),
        groups=report.groups,
        over_seeds=list(map(typeset, eval_verdicts.over_seeds(report.groups))),
        charts=figures.along(report.groups),
        runs=tables.runs(report) if report.groups else None,
        states=", ".join(f"{count} {state}" for state, count in states.items()),
        evaluations=list(map(_evaluated, report.evaluations)),
        comparisons=[each for each in [*_of_models(report, most), *_of_studies(report, most)] if each is not None],
        notes=report.notes,
        sources=tables.sources(report),
        commands=list(dict.fromkeys(shlex.join(map(str, command)) for command in commands)),
    )


def main_figure(report: Report) -> Chart | Forest | None:
    """Gold against distance, else win rates or scores with intervals, else what moved along training."""
    along = {chart.title: chart for chart in figures.along(report.groups)}
    gold, shift = (along.get(figures.SHOWN[name][0]) for name in ("gold", "shift/chosen"))
    forests = filter(None, map(_forest, report.evaluations))
    chart = figures.against_distance(report.groups) or gold or next(forests, None) or shift
    return chart or next(iter(along.values()), None)


def _forest(results: Results) -> Forest | None:
    """The intervals of an evaluation's first metric of quality."""
    metric, compare = tables.quality(results), results.task == "compare"
    if metric is None or results.task == "overopt":
        return None
    names = tables.differences(results) if compare else map(results.name, results.models)
    cells = [(name, cells.get(metric)) for name, cells in zip(names, results.models.values(), strict=True)]
    rows = [(name, c["value"], *c["interval"]) for name, c in cells if c and c["interval"] and c["value"] is not None]
    half = (50 if results.task == "alpaca_eval" else 0.5) if metric == "win_rate" else None
    unit = "paired difference, 95% interval" if compare else "95% interval"
    return Forest(f"{results.task}: {metric}", unit, rows[:24], 0.0 if compare else half) if rows else None


def _evaluated(results: Results) -> dict[str, Any]:
    lines = [*eval_verdicts.of_evaluation(results), *eval_verdicts.context(results)]
    if results.curves:
        curves = [run["curve"] for run in results.curves]
        what = f"{counted(sum(map(len, curves)), 'checkpoint')} of {counted(len(curves), 'run')}"
        lines.append(f"Measured {what}: the curves and verdicts of these runs are by them.")
    name = results.folder.name
    title = results.task if name == results.task else f"{results.task}: {name}"
    return {"title": title, "lines": list(map(typeset, lines)), "table": tables.evaluation(results)}


def _of_models(report: Report, most: int) -> Iterator[Comparison | None]:
    """Where it got worse: models of one task against its baseline or first."""
    sources = [each for each in report.evaluations if each.task not in tables.NOT_OF_MODELS]
    for task in dict.fromkeys(each.task for each in sources):
        models = [(m, each) for each in sources if each.task == task for m in each.models if not each.unusable(m)]
        twice = Counter(model for model, _ in models)
        labels = [each.name(model) + (f" ({each.folder})" if twice[model] > 1 else "") for model, each in models]
        items = [side_by_side.items_of(each.items, model) for model, each in models]
        named = [i for i, (model, each) in enumerate(models) if model == each.config.get("baseline")]
        base = named[0] if named else 0
        for i, (model, each) in enumerate(models):
            first, its = models[base]
            apart = pairing.judged_apart(its.judged_by, each.judged_by) or pairing.data_apart(its, each)
            if i != base and not apart:
                opponents = (first, model) if its is each else None
                shared = side_by_side.comparable(items[base], items[i], opponents)
                yield side_by_side.worst(labels[base], items[base], labels[i], shared, most)


def _of_studies(report: Report, most: int) -> Iterator[Comparison | None]:
    """And each arm's end against its start."""
    for each in report.evaluations:
        for arm in report.groups if each.curves else ():
            runs = [run["run"] for run in each.curves if any(run is member.measured for member in arm.members)]
            before, after = side_by_side.start_and_end(each.items, runs)
            yield side_by_side.worst("the start", before, f"{arm.short}, last checkpoint", after, most)
