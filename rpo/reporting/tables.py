"""The page's tables: arms (or models) for the first screen, runs, evaluations, and what all of it ran with.

Columns of numbers have one number of decimals, so that they line up.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rpo.config import WITHOUT_REFERENCE
from rpo.evals import pairing
from rpo.reporting import eval_verdicts, figures, run_verdicts
from rpo.reporting.collect import Group, Member, Report, Results, compared, mean_and_error, shortened
from rpo.runs import catalog, groups
from rpo.stats import finite
from rpo.text import MINUS, decimals, fixed

NOT_OF_MODELS = ("compare", "overopt", "select")  # tasks whose results.json has something else as models
_SETTINGS = 6  # columns of swept settings in the table of runs
_PRINTED = 12  # rows of an evaluation's table on paper

Value = tuple[float, float | None]  # with its standard error


@dataclass(frozen=True)
class Cell:
    """`error` stands small after the text; `tone` and `style` draw a verdict's mark or an arm's line before it."""

    text: str
    error: str = ""
    tone: str | None = None
    style: int | None = None


@dataclass(frozen=True)
class Table:
    """The first cell of a row is its header; a row of one cell is a heading for those below it. Columns in `right` are numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    right: frozenset[int] = frozenset()
    note: str = ""
    printed: int | None = None  # rows on paper; None: all


def column(values: Sequence[Value | None], *, unit: str = "", exact: bool = False) -> list[Cell]:
    """Values with the same number of decimals, enough for the middle or (exact) any error; None: a dash."""
    known = [value for value in values if value is not None]
    places = decimals([error for _, error in known], of_smallest=exact)
    places = 0 if unit and places == 1 else places
    if places is None and known and (largest := max(abs(value) for value, _ in known)) < 1e4:
        places = sum(largest < bound for bound in (100, 10, 1))

    def cell(value: float, error: float | None) -> Cell:
        return Cell(f"{fixed(value, places)}{unit}", f"\u00b1\u00a0{fixed(error, places)}" if error else "")

    return [Cell("-") if value is None else cell(*value) for value in values]


def _value_cells(cells: Sequence[dict | None], *, exact: bool = False) -> list[Cell]:
    """Cells of results.json as `column` shows them; None: a dash."""
    shown = column([(c["value"], c["se"]) if c and c["value"] is not None else None for c in cells], exact=exact)
    bad = Cell("unusable", tone="bad")
    return [bad if c and "unusable" in c else value for c, value in zip(cells, shown, strict=True)]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


# ---- the first screen's


def _of_likelihood(arm: Group) -> bool:
    """Whether its accuracy is by likelihood alone, which is none beside those against a reference."""
    preference = arm.members[0].settings.get("loss", {}).get("preference")
    return preference in WITHOUT_REFERENCE and arm.end("shift/chosen") is None


def arms(report: Report) -> Table | None:
    """A row per arm; without runs a row per model. Columns that nobody has are left out."""
    if not report.groups:
        return _models(report)
    gold = [arm.end("gold") for arm in report.groups]
    columns = {
        "Gold": column(gold),
        "Drop": column(list(map(_drop, report.groups))),
        "Win rate": column(_win_rates(report), unit="%"),
        "Accuracy": column(
            [None if any(gold) or _of_likelihood(arm) else arm.end("rewards/accuracies") for arm in report.groups]
        ),
        "KL": column([arm.end("kl") for arm in report.groups]),
        "Chosen shift": column([arm.end("shift/chosen") for arm in report.groups]),
    }
    shown = {name: cells for name, cells in columns.items() if any(cell.text != "-" for cell in cells)}
    rows = []
    for i, arm in enumerate(report.groups):
        seeds = f"\u00d7{len(arm.members)}" if len(arm.members) > 1 else f"run {arm.members[0].name}"
        verdict = Cell(arm.verdict.kind, tone=arm.verdict.tone)
        rows.append([Cell(arm.short, seeds, style=arm.style), *(cells[i] for cells in shown.values()), verdict])
    note = "At the end of training; \u00b1 one standard error, over seeds (\u00d7 seeds) or, of one seed, over prompts."
    note += " Drop: of gold from its peak." if "Drop" in shown else ""
    note += " KL to the reference and the shift of chosen log-probs from it in nats." if "KL" in shown else ""
    _, common = shortened([arm.label for arm in report.groups])
    note += f" All arms: {', '.join(common)}." if common else ""
    return Table("Arms", ["Arm", *shown, "Verdict"], rows, frozenset(range(1, len(shown) + 1)), note)


def _drop(arm: Group) -> Value | None:
    """How far gold fell from its peak: by task=overopt, else by the logs of several seeds."""
    measured = [member.measured["summary"] for member in arm.judged if member.measured]
    known = [summary for summary in measured if summary["gold/drop"] is not None]
    if len(known) > 1:
        return mean_and_error([summary["gold/drop"] for summary in known])
    of = known[0] if known else run_verdicts.over_seeds([member.curve for member in arm.judged])
    return of and (of["gold/drop"], of["gold/drop_se"])


def _win_rates(report: Report) -> list[Value | None]:
    """In percent by arm, where the model of one of its runs was judged as the first one is: in one evaluation with it, or by
    the same judge against the same model."""
    rates: list[Value | None] = [None] * len(report.groups)
    first = None
    for i, arm in enumerate(report.groups):
        for each in report.evaluations:
            for model, cells in each.models.items():
                cell = cells.get("win_rate", {"value": None})
                if cell["value"] is None or rates[i] or not any(member.made(model) for member in arm.members):
                    continue
                met = each.task, eval_verdicts.opponents(each, model)
                first = first or (each, met)
                if each is first[0] or (
                    met == first[1] and not pairing.judged_apart(first[0].judged_by, each.judged_by)
                ):
                    percent = 1 if each.task == "alpaca_eval" else 100
                    rates[i] = percent * cell["value"], cell["se"] and percent * cell["se"]
    return rates


def _models(report: Report) -> Table | None:
    """A row per model, a column per evaluation by its first metric of quality."""
    scored = [(each, quality(each)) for each in report.evaluations if each.task not in NOT_OF_MODELS and quality(each)][
        :4
    ]
    names = {model: each.name(model) for each, _ in reversed(scored) for model in each.models}
    if not names:
        return None
    columns = [_value_cells([each.models.get(m, {}).get(metric) for m in names]) for each, metric in scored]
    rows = [list(row) for row in zip(map(Cell, names.values()), *columns, strict=True)]
    head = ["Model", *(f"{each.task} {metric}" for each, metric in scored)]
    return Table("Models", head, rows, frozenset(range(1, len(head))), "Value \u00b1 standard error.")


def quality(results: Results) -> str | None:
    """The first metric that says how good answers are."""
    return next(filter(eval_verdicts.is_quality, results.metrics), None)


def metrics(report: Report) -> dict[str, dict[str, dict]]:
    """The first screen's numbers as cells of results.json: arm -> metric -> cell, an interval over seeds where there are several."""
    arms: dict[str, dict[str, dict]] = {}
    for arm in report.groups:
        cells = arms[arm.label] = {}
        for name in figures.SHOWN:
            if values := [end[name] for end in arm.ends(name)]:
                (value, se), interval = arm.end(name), groups.interval(values)["ci"]
                cells[name] = {"value": value, "se": se, "interval": interval, "n": len(values), "n_error": 0}
    return arms


# ---- runs


def swept(members: Sequence[Member]) -> list[str]:
    """The keys that differ and change what is learnt; not those that a label already has."""
    settings = [member.settings for member in members if member.settings]
    kept = [key for key in groups.swept(settings) if key not in ("loss.preference", "loss.sft")]
    if all(own.get("data.gold.seed") == own.get("seed") for own in map(groups.flat, settings)):
        kept = [key for key in kept if key != "data.gold.seed"]
    return kept


def runs(report: Report) -> Table:
    members, keys = report.members, swept(report.members)
    names = [name for name in figures.SHOWN if any(name in m.curve[-1] for m in members if m.curve)]
    ends = {name: iter(column([_end(member, name) for member in members])) for name in names}
    rows: list[list[Cell]] = []
    for arm in report.groups:
        several = len(arm.members) > 1  # else the run's own row is enough
        rows += [[Cell(arm.short, style=arm.style)]] if several else []
        for member in arm.members:
            settings, step = groups.flat(member.settings) or member.record.overrides, member.record.step
            step = member.curve[-1]["step"] if step is None and member.curve else step
            name = Cell(member.name, style=None if several else arm.style)
            own = [Cell(_text(settings.get(key))) for key in keys[:_SETTINGS]]
            own += [Cell(member.record.state, tone=None if member.done else "bad"), Cell(_text(step))]
            rows.append([name, *own, *map(next, ends.values())])
    caption = "The last evaluation of each run; \u00b1 one standard error by prompt, where task=overopt measured it"
    note = f"Other settings that differ: {', '.join(keys[_SETTINGS:])}." if keys[_SETTINGS:] else ""
    head = ["Run", *keys[:_SETTINGS], "state", "step", *names]
    return Table(caption, head, rows, frozenset(range(1, len(head))) - {head.index("state")}, note)


def _end(member: Member, metric: str) -> Value | None:
    end = member.curve[-1] if member.curve else {}
    return (end[metric], member.error(end["step"], metric)) if metric in end else None


# ---- evaluations


def evaluation(results: Results) -> Table | None:
    """A row per metric, those of quality first, and model; of a comparison with its p."""
    names = sorted(results.metrics, key=lambda name: not eval_verdicts.is_quality(name))
    if not names or results.task == "overopt":
        return None
    of, extra, labels, note = "Model", {}, list(map(results.name, results.models)), ""
    if results.task == "compare":
        of, labels = f"first {MINUS} second", differences(results)
        extra = {"p": "p", "p_holm": "Holm p", "detectable": "detectable"}
        note = "detectable: the smallest true difference that is seen in 80% of such comparisons."
    head = ["Metric", of, "Value", "95% interval", *extra.values(), "n", "errors"]
    rows = []
    for name in names:
        cells = [cells.get(name) for cells in results.models.values()]
        for label, cell, value in zip(labels, cells, _value_cells(cells, exact=True), strict=True):
            if cell is not None:
                bounds = [fixed(bound, decimals([cell["se"]])) for bound in cell["interval"] or ()]
                ps = [f"{cell[key]:.2g}" if finite(cell.get(key)) else "-" for key in extra]
                texts = [" to ".join(bounds) or "-", *ps, _text(cell["n"]), _text(cell["n_error"])]
                rows.append([Cell(name), Cell(label), value, *map(Cell, texts)])
    caption = f"{results.folder}, value \u00b1 standard error"
    return Table(caption, head, rows, frozenset(range(2, len(head))), note, printed=_PRINTED)


def differences(results: Results) -> list[str]:
    """The two models of each comparison by task=compare as "first minus second"."""
    return [f" {MINUS} ".join(map(results.name, pair)) for pair in compared(results)]


# ---- what it ran with


def environments(report: Report) -> list[dict]:
    """Of runs and evaluations."""
    ran = [member.record.environment for member in report.members]
    return [each for each in [*ran, *(catalog.environment(e.folder) for e in report.evaluations)] if each]


def sources(report: Report) -> Table | None:
    """Code, device and versions, a value or values with counts over the environments; the data and models of the runs."""
    ran = []
    for each in environments(report):
        versions = each["versions"] if isinstance(each.get("versions"), dict) else {}
        ran.append({"code": revision(each), "device": each.get("device"), "python": each.get("python")} | versions)
    rows = {}
    for what in dict.fromkeys(key for each in ran for key in each):
        counts = Counter(str(each.get(what)) for each in ran)
        if set(counts) - {"None"}:
            rows[what] = [v if len(counts) == 1 else f"{v} ({count} of {len(ran)})" for v, count in counts.items()]
    flats = [groups.flat(member.settings) for member in report.members if member.settings]
    for key in ("data.train", "data.eval", "model.path") if flats else ():
        rows[key] = dict.fromkeys(_text(flat.get(key)) for flat in flats)
    cells = [[Cell(what), Cell("; ".join(values))] for what, values in rows.items()]
    return Table("Versions and sources", ["What", "Value"], cells) if cells else None


def revision(environment: dict) -> str:
    code = str(environment.get("git_revision") or "unknown")[:12]
    return code + (" with uncommitted changes" if environment.get("git_dirty") else "")
