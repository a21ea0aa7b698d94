"""A Report as a Page: headline, table of arms and one figure for the first screen; below, sections that fold.

A block's class says how report.html.j2 shows it. Text is plain here; it is escaped when the page is rendered.
"""

import datetime
import itertools
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rpo.evals import pairing
from rpo.reporting import collect, eval_verdicts, figures, run_verdicts, side_by_side
from rpo.reporting.collect import Group, Member, Report
from rpo.reporting.evaluations import Results, finite
from rpo.reporting.figures import Chart, Forest
from rpo.reporting.first_screen import NOT_OF_MODELS, Cell, Table, arms_table, column, main_figure, value_cells
from rpo.reporting.side_by_side import Comparison
from rpo.reporting.text import MINUS, counted, decimals, fixed, typeset
from rpo.runs import groups

ARMS = 10  # rows of the first screen's table
_SETTINGS = 6  # columns of swept settings in the table of runs
_ACROSS = 4  # models side by side in an evaluation's table
_PRINTED = 6  # rows of an evaluation's table on paper
_COMPARISONS = 12  # side by side, of which PRINTED_DUELS on paper
PRINTED_DUELS = 2


@dataclass(frozen=True)
class Points:
    items: Sequence[str]
    title: str = ""
    small: bool = False


@dataclass(frozen=True)
class Verdicts:
    arms: Sequence[Group]


@dataclass(frozen=True)
class Charts:
    """Beside one another; `legend`: (label, style) of their lines."""

    charts: Sequence[Chart | Forest]
    caption: str = ""
    legend: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class Duels:
    comparison: Comparison
    printed: int


@dataclass(frozen=True)
class Code:
    lines: Sequence[str]


Block = Table | Points | Verdicts | Charts | Duels | Code


@dataclass(frozen=True)
class Section:
    """Folded: its title and the line beside it show."""

    title: str
    line: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    title: str
    facts: Sequence[str]
    headline: str
    asides: Sequence[str]
    arms: Table | None
    figure: Chart | Forest | None
    sections: Sequence[Section]


def layout(report: Report, title: str, sources: Sequence[str], most: int, environment: dict) -> Page:
    """The page of a report on the folders `sources`, with `most` answers side by side per comparison.

    `environment` is that of the report itself.
    """
    counts = [counted(len(report.members), "run"), counted(len(report.evaluations), "evaluation")]
    facts = [", ".join(count for count in counts if not count.startswith("0 ")), ", ".join(sources)]
    facts += [f"{datetime.datetime.now():%Y-%m-%d %H:%M}", f"code {_revision(environment)}"]
    arms = arms_table(report)
    parts = [_verdicts(report), _evaluations(report), _training(report), _runs(report), *_answers(report, most)]
    parts += [_notes(report), _rules(report), _provenance(report)]
    if report.groups and len(report.groups) > ARMS:
        parts.insert(0, Section("All arms", counted(len(report.groups), "arm"), [arms]))
        arms = Table(
            arms.caption,
            arms.head,
            arms.rows[:ARMS],
            arms.right,
            f"{len(arms.rows) - ARMS} more arms below. {arms.note}",
        )
    return Page(
        title=title,
        facts=facts,
        headline=typeset(eval_verdicts.headline(report)),
        asides=list(map(typeset, eval_verdicts.asides(report))),
        arms=arms,
        figure=main_figure(report),
        sections=[part for part in parts if part is not None and part.blocks],
    )


def _revision(environment: dict) -> str:
    revision = str(environment.get("git_revision") or "unknown")[:12]
    return revision + (" with uncommitted changes" if environment.get("git_dirty") else "")


# ---- sections


def _verdicts(report: Report) -> Section | None:
    if not report.groups:
        return None
    kinds = Counter(arm.verdict.kind for arm in report.groups)
    blocks: list[Block] = [Verdicts(report.groups)]
    if over_seeds := eval_verdicts.over_seeds(report.groups):
        blocks.append(Points(list(map(typeset, over_seeds)), "Arms on the same seeds"))
    return Section("Verdicts in words", "; ".join(f"{kind}: {count}" for kind, count in kinds.items()), blocks)


def _training(report: Report) -> Section | None:
    charts = figures.along(report.groups)
    swept = [key for key in _swept(report.members) if key not in groups.SEEDS]
    blocks: list[Block] = []
    if charts:
        legend = {line.style: line.label for chart in charts for line in figures.thick(chart)}
        caption = "Thin lines are seeds, thick ones their mean; bars are one standard error."
        blocks.append(Charts(charts, caption, [(label, i) for i, label in sorted(legend.items())]))
    for key in swept[:2]:
        ends = figures.against_swept(report.groups, key)
        caption = (
            f"The last evaluation against {key}, its values evenly spaced; grey lines join what is otherwise equal."
        )
        blocks += [Charts(ends, caption)] if ends else []
    titles = ", ".join(chart.title.lower() for chart in charts[:3])
    return Section("Along training", titles, blocks)


def _swept(members: Sequence[Member]) -> list[str]:
    """The keys that differ and change what is learnt; not those that a label already has."""
    flats = [groups.flat(member.settings) for member in members if member.settings]
    keys = groups.differing([member.settings for member in members if member.settings])
    ignored = [key for key in groups.IGNORED if key not in groups.SEEDS] + ["loss.preference", "loss.sft"]
    kept = [key for key in keys if not any(key == no or key.startswith(f"{no}.") for no in ignored)]
    if all(flat.get("data.gold.seed") == flat.get("seed") for flat in flats):
        kept = [key for key in kept if key != "data.gold.seed"]
    return kept


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


def _runs(report: Report) -> Section | None:
    members = report.members
    if not members:
        return None
    swept = _swept(members)
    names = [name for name in figures.SHOWN if any(name in m.curve[-1] for m in members if m.curve)]
    ends = {name: column([_of_run(member, name) for member in members]) for name in names}
    rows: list[list[Cell]] = []
    number = itertools.count()
    for arm in report.groups:
        several = len(arm.members) > 1  # else the run's own row is enough
        rows += [[Cell(arm.short, style=arm.style)]] if several else []
        for member in arm.members:
            settings = groups.flat(member.settings) or dict(each.split("=", 1) for each in member.overrides())
            step = member.record.step if member.record else None
            step = member.curve[-1]["step"] if step is None and member.curve else step
            cells = [Cell(_value(settings.get(key))) for key in swept[:_SETTINGS]]
            i = next(number)
            state = Cell(member.state, tone=None if member.done else "bad")
            name = Cell(member.name, style=None if several else arm.style)
            rows.append([name, *cells, state, Cell(_value(step)), *(ends[name][i] for name in names)])
    more = f"Other settings that differ: {', '.join(swept[_SETTINGS:])}." if swept[_SETTINGS:] else ""
    caption = "The last evaluation of each run; \u00b1 one standard error by prompt, where task=overopt measured it"
    head = ["Run", *swept[:_SETTINGS], "state", "step", *names]
    right = frozenset(i for i in range(1, len(head)) if i != 1 + len(swept[:_SETTINGS]))
    states = Counter(member.state for member in members)
    line = ", ".join(f"{count} {state}" for state, count in states.items())
    return Section("Runs", line, [Table(caption, head, rows, right, more)])


def _of_run(member: Member, metric: str) -> tuple[float, float | None] | None:
    end = member.curve[-1] if member.curve else {}
    return (end[metric], member.errors().get((end["step"], metric))) if metric in end else None


def _evaluations(report: Report) -> Section | None:
    blocks: list[Block] = []
    for each in report.evaluations:
        lines = [*eval_verdicts.of_evaluation(each), *(f"Unusable: {line}" for line in eval_verdicts.unusable(each))]
        lines += eval_verdicts.context(each)
        tables = _of_overopt(each) if each.task == "overopt" else _table(each)
        name = each.folder.name
        blocks += [
            Points(list(map(typeset, lines)), each.task if name == each.task else f"{each.task}: {name}"),
            *tables,
        ]
    tasks = ", ".join(dict.fromkeys(each.task for each in report.evaluations))
    return Section("Evaluations", tasks, blocks) if blocks else None


def _of_overopt(results: Results) -> list[Block]:
    curves = [run["curve"] for run in results.curves]
    num_metrics = len({name for curve in curves for point in curve for name in point["metrics"]})
    checkpoints = counted(sum(map(len, curves)), "checkpoint")
    measured = f"{counted(num_metrics, 'metric')} at {checkpoints} of {counted(len(curves), 'run')}"
    return [Points([f"Measured {measured}: the curves and verdicts of these runs are by them."])]


def _table(results: Results) -> list[Block]:
    """Metrics of quality first. Up to four models stand side by side, more below one another; a comparison has its p."""
    names = list(dict.fromkeys(name for cells in results.models.values() for name in cells))
    names.sort(key=lambda name: not eval_verdicts.is_quality(name))
    if not names:
        return []
    across = results.task != "compare" and 1 < len(results.models) <= _ACROSS
    numbers = _across(results, names) if across else _down(results, names)
    notes = [
        f"{results.name(m)}: {name}: {cell['note']}."
        for m, cells in results.models.items()
        for name, cell in cells.items()
        if cell.get("note") and not any(str(cell["note"]) in note for note in results.notes)
    ]
    return [numbers, *([Points(notes, small=True)] if notes else [])]


def _across(results: Results, names: Sequence[str]) -> Table:
    rows = []
    for name in names:
        cells = [of.get(name) for of in results.models.values()]
        ns = dict.fromkeys(_value(c["n"]) + (f" ({c['n_error']} failed)" if c["n_error"] else "") for c in cells if c)
        rows.append([Cell(name), *value_cells(cells), Cell(" / ".join(ns))])
    head = ["Metric", *map(results.name, results.models), "n"]
    return Table(_caption(results), head, rows, frozenset(range(1, len(head))), printed=_PRINTED)


def _caption(results: Results) -> str:
    return f"{results.folder}, value \u00b1 standard error"


def _down(results: Results, names: Sequence[str]) -> Table:
    extra, labels, note = {}, list(map(results.name, results.models)), ""
    if results.task == "compare":
        labels = [f" {MINUS} ".join(pair) for pair in eval_verdicts.compared(results)]
        extra = {"p": "p", "p_holm": "Holm p", "detectable": "detectable"}
        note = "detectable: the smallest true difference that is seen in 80% of such comparisons."
    rows = []
    for name in names:
        cells = [of.get(name) for of in results.models.values()]
        for label, cell, value in zip(labels, cells, value_cells(cells, exact=True), strict=True):
            if cell is not None:
                bounds = [fixed(bound, decimals([cell["se"]])) for bound in cell["interval"] or ()]
                ps = [f"{cell[key]:.2g}" if finite(cell.get(key)) else "-" for key in extra]
                texts = [" to ".join(bounds) or "-", *ps, _value(cell["n"]), _value(cell["n_error"])]
                rows.append([Cell(name), Cell(label), value, *map(Cell, texts)])
    head = [
        "Metric",
        "first \u2212 second" if extra else "Model",
        "Value",
        "95% interval",
        *extra.values(),
        "n",
        "errors",
    ]
    return Table(_caption(results), head, rows, frozenset(range(2, len(head))), note, printed=_PRINTED)


def _answers(report: Report, most: int) -> list[Section]:
    """Where it got worse: models of one task against its baseline or first, and each arm's end against its start."""
    comparisons = [each for each in [*_of_models(report, most), *_of_studies(report, most)] if each is not None]
    blocks: list[Block] = []
    left = PRINTED_DUELS
    for comparison in comparisons[:_COMPARISONS]:
        blocks.append(Duels(comparison, min(left, len(comparison.duels), 1)))
        left -= min(left, len(comparison.duels), 1)
    if len(comparisons) > _COMPARISONS:
        blocks.append(Points([f"{len(comparisons) - _COMPARISONS} more comparisons are not shown."]))
    line = f"the worst answers of {counted(len(comparisons[:_COMPARISONS]), 'comparison')}"
    return [Section("Side by side", line, blocks)]


def _of_models(report: Report, most: int) -> Iterable[Comparison | None]:
    sources = [each for each in report.evaluations if each.task not in NOT_OF_MODELS]
    for task in dict.fromkeys(each.task for each in sources):
        models = [(m, each) for each in sources if each.task == task for m in each.models if not each.unusable(m)]
        twice = Counter(model for model, _ in models)
        labels = [each.name(model) + (f" ({each.folder})" if twice[model] > 1 else "") for model, each in models]
        items = [side_by_side.items_of(each.samples, model) for model, each in models]
        named = [i for i, (model, each) in enumerate(models) if model == each.config.get("baseline")]
        base = named[0] if named else 0
        for i, (model, each) in enumerate(models):
            first, its = models[base]
            if i != base and not pairing.judged_apart(its.judged_by, each.judged_by):
                duel = (first, model) if its is each else None
                met = side_by_side.comparable(items[base], items[i], duel)
                yield side_by_side.worst(labels[base], items[base], labels[i], met, most)


def _of_studies(report: Report, most: int) -> Iterable[Comparison | None]:
    for each in report.evaluations:
        for arm in report.groups if each.curves else ():
            runs = [run["run"] for run in each.curves if any(run is member.measured for member in arm.members)]
            before, after = side_by_side.start_and_end(each.samples, runs)
            yield side_by_side.worst("the start", before, f"{arm.short}, last checkpoint", after, most)


def _notes(report: Report) -> Section | None:
    notes = Points(report.notes)
    return (
        Section("Left out, or to be read with care", counted(len(report.notes), "note"), [notes])
        if report.notes
        else None
    )


def _rules(report: Report) -> Section:
    rules = [*(run_verdicts.RULES if report.groups else ()), *eval_verdicts.RULES]
    return Section("How verdicts are reached", "the rules", [Points(rules, small=True)])


# ---- provenance


def _provenance(report: Report) -> Section | None:
    ran = [member.record.environment for member in report.members if member.record and member.record.environment]
    ran += [found for each in report.evaluations if (found := collect.environment(each.folder))]
    settings = {m.name: groups.flat(m.settings) for m in report.members if m.settings}
    blocks: list[Block] = []
    versions = _versions(ran)
    read = {
        key: "; ".join(dict.fromkeys(_value(flat.get(key)) for flat in settings.values()))
        for key in ("data.train", "data.eval", "model.path")
    }
    rows = [*versions, *read.items()] if settings else versions
    if rows:
        blocks.append(Table("Versions and sources", ["What", "Value"], [[Cell(a), Cell(b)] for a, b in rows]))
    commands = dict.fromkeys(shlex.join(map(str, e["command"])) for e in ran if isinstance(e.get("command"), list))
    if commands:
        blocks.append(Code(list(commands)))
    return Section("Provenance", "versions, sources, commands", blocks)


def _versions(ran: Sequence[dict]) -> list[tuple[str, str]]:
    """(what, its value or values with counts) over the environments of runs and evaluations."""
    kinds: dict[str, Callable[[dict], str]] = {"code": _revision}
    kinds |= {name: lambda e, name=name: str(e.get(name)) for name in ("device", "python")}
    packages = dict.fromkeys(p for e in ran if isinstance(e.get("versions"), dict) for p in e["versions"])
    kinds |= {name: lambda e, name=name: str((e.get("versions") or {}).get(name)) for name in packages}
    rows = []
    for what, read in kinds.items():
        counts = Counter(map(read, ran))
        values = [v if len(counts) == 1 else f"{v} ({count} of {len(ran)})" for v, count in counts.items()]
        rows += [(what, "; ".join(values))] if set(counts) - {"None"} else []
    return rows
