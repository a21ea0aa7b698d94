"""The first screen's table of arms (of models, without runs) and its one figure; cells and tables of all the page.

Columns of numbers have one number of decimals, so that they line up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rpo.reporting import collect, eval_verdicts, figures, run_verdicts
from rpo.reporting.collect import Group, Report
from rpo.reporting.evaluations import Results
from rpo.reporting.figures import Chart, Forest
from rpo.reporting.text import MINUS, decimals, fixed
from rpo.runs import groups

NOT_OF_MODELS = ("compare", "overopt", "select")  # tasks whose results.json has something else as models


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


def arms_table(report: Report) -> Table | None:
    """A row per arm; without runs a row per model. Columns that nobody has are left out."""
    if not report.groups:
        return _models(report)
    arms = report.groups
    ends = [[member.curve[-1] for member in arm.judged] for arm in arms]
    columns = {
        name: column([_end(arm, metric) for arm in arms])
        for name, metric in {"gold": "gold", "KL": "kl", "chosen shift": "shift/chosen"}.items()
    }
    columns |= {"drop": column(list(map(_drop, arms))), "win rate": column(_win_rates(report), percent=True)}
    if not any("gold" in end for each in ends for end in each):
        columns["accuracy"] = column([_end(arm, "rewards/accuracies") for arm in arms])
    order = ["gold", "drop", "win rate", "accuracy", "KL", "chosen shift"]
    shown = [name for name in order if any(cell.text != "-" for cell in columns.get(name, ()))]
    rows = [
        [
            Cell(
                arm.short,
                f"\u00d7{len(arm.members)}" if len(arm.members) > 1 else f"run {arm.members[0].name}",
                style=arm.style,
            ),
            *(columns[name][i] for name in shown),
            Cell(arm.verdict.kind, tone=arm.verdict.tone),
        ]
        for i, arm in enumerate(arms)
    ]
    note = "At the end of training; \u00b1 one standard error, over seeds (\u00d7 seeds) or, of one seed, over prompts."
    note += " Drop: of gold from its peak." if "drop" in shown else ""
    note += " KL to the reference and the shift of chosen log-probs from it in nats." if "KL" in shown else ""
    _, common = collect.shortened([arm.label for arm in arms])
    note += f" All arms: {', '.join(common)}." if common else ""
    head = ["Arm", *(f"{name[0].upper()}{name[1:]}" for name in shown), "Verdict"]
    return Table("Arms", head, rows, frozenset(range(1, len(shown) + 1)), note)


def column(
    values: Sequence[tuple[float, float | None] | None], *, percent: bool = False, exact: bool = False
) -> list[Cell]:
    """(value, error) as cells with the same number of decimals, enough for the middle or (exact) any error; None: a dash."""
    known = [value for value in values if value is not None]
    if percent:
        known, values = ([v and (100 * v[0], v[1] and 100 * v[1]) for v in each] for each in (known, values))
    places = decimals([error for _, error in known], of_smallest=exact)
    places = 0 if percent and places == 1 else places
    if places is None and known and (largest := max(abs(value) for value, _ in known)) < 1e4:
        places = sum(largest < bound for bound in (100, 10, 1))
    return [_pm(*value, places=places, unit="%" * percent) if value else Cell("-") for value in values]


def _pm(value: float, error: float | None, *, places: int | None = None, unit: str = "") -> Cell:
    places = decimals([error]) if places is None else places
    return Cell(f"{fixed(value, places)}{unit}", f"\u00b1\u00a0{fixed(error, places)}" if error else "")


def value_cells(cells: Sequence[dict | None], *, exact: bool = False) -> list[Cell]:
    """Cells of results.json as `column` shows them; None: a dash."""
    shown = column([(c["value"], c["se"]) if c and c["value"] is not None else None for c in cells], exact=exact)
    bad = Cell("unusable", tone="bad")
    return [bad if c and "unusable" in c else value for c, value in zip(cells, shown, strict=True)]


def _end(arm: Group, metric: str) -> tuple[float, float | None] | None:
    ends = [member.curve[-1] for member in arm.judged if metric in member.curve[-1]]
    return figures.mean_and_error(arm, metric, ends) if ends else None


def _drop(arm: Group) -> tuple[float, float | None] | None:
    """How far gold fell from its peak: by task=overopt, else by the logs of several seeds."""
    summaries = [member.measured["summary"] for member in arm.judged if member.measured]
    drops = [(s["gold/drop"], s["gold/drop_se"]) for s in summaries if s["gold/drop"] is not None]
    if len(drops) > 1:
        values = [drop for drop, _ in drops]
        return mean(values), stdev(values) / len(values) ** 0.5
    if drops:
        return drops[0]
    logged = run_verdicts.spread([member.curve for member in arm.judged])
    return (logged["gold/drop"], logged["gold/drop_se"]) if logged else None


def _win_rates(report: Report) -> list[tuple[float, float | None] | None]:
    """Of each arm, where an evaluation judged the model of one of its runs."""
    rates: list[tuple[float, float | None] | None] = []
    for arm in report.groups:
        folders = {member.folder for member in arm.members}
        cells = [
            cells["win_rate"] | {"full": 100 if each.task == "alpaca_eval" else 1}
            for each in report.evaluations
            for model, cells in each.models.items()
            if "win_rate" in cells and any(model == folder or model.startswith(f"{folder}/") for folder in folders)
        ]
        cell = next((cell for cell in cells if cell["value"] is not None), None)
        rates.append(cell and (cell["value"] / cell["full"], cell["se"] and cell["se"] / cell["full"]))
    return rates


def _models(report: Report) -> Table | None:
    """A row per model, a column per evaluation by its first metric of quality."""
    scored = [(each, _quality(each)) for each in report.evaluations if each.task not in NOT_OF_MODELS]
    scored = [(each, metric) for each, metric in scored if metric is not None][:4]
    models = list(dict.fromkeys(model for each, _ in scored for model in each.models))
    if not models:
        return None
    columns = [value_cells([each.models.get(m, {}).get(metric) for m in models]) for each, metric in scored]
    names = [next(each.name(m) for each in report.evaluations if m in each.models) for m in models]
    rows = [[Cell(names[i]), *(cells[i] for cells in columns)] for i in range(len(models))]
    head = ["Model", *(f"{each.task} {metric}" for each, metric in scored)]
    return Table("Models", head, rows, frozenset(range(1, len(head))), "Value \u00b1 standard error.")


def _quality(results: Results) -> str | None:
    names = dict.fromkeys(name for cells in results.models.values() for name in cells)
    return next((name for name in names if eval_verdicts.is_quality(name)), None)


def main_figure(report: Report) -> Chart | Forest | None:
    """Gold against distance, else win rates or scores with intervals, else what moved along training."""
    if (chart := figures.against_distance(report.groups)) is not None:
        return chart
    along = figures.along(report.groups)
    if along and along[0].title == figures.SHOWN["gold"][0]:
        return along[0]
    for each in report.evaluations:
        if (forest := _forest(each)) is not None:
            return forest
    shift = [chart for chart in along if chart.title == figures.SHOWN["shift/chosen"][0]]
    return next(iter([*shift, *along]), None)


def _forest(results: Results) -> Forest | None:
    """The intervals of an evaluation's first metric of quality."""
    metric = _quality(results)
    if metric is None or results.task == "overopt":
        return None
    names = list(map(results.name, results.models))
    if results.task == "compare":
        names = [f" {MINUS} ".join(pair) for pair in eval_verdicts.compared(results)]
    cells = [(name, cells.get(metric)) for name, cells in zip(names, results.models.values(), strict=True)]
    rows = [(name, c["value"], *c["interval"]) for name, c in cells if c and c["interval"] and c["value"] is not None]
    if not rows:
        return None
    rate = {"win_rate": 50 if results.task == "alpaca_eval" else 0.5}.get(metric)
    zero = 0.0 if results.task == "compare" else rate
    unit = "paired difference, 95% interval" if results.task == "compare" else "95% interval"
    return Forest(f"{results.task}: {metric}", unit, rows[:24], zero)


def metrics(report: Report) -> dict[str, dict[str, dict]]:
    """The first screen's numbers as cells of results.json: arm -> metric -> cell, an interval over seeds where there are several."""
    return {arm.label: {name: _seeds(arm, name) for name in figures.SHOWN if _end(arm, name)} for arm in report.groups}


def _seeds(arm: Group, metric: str) -> dict:
    ends = [member.curve[-1][metric] for member in arm.judged if metric in member.curve[-1]]
    value, se = figures.mean_and_error(arm, metric, [m.curve[-1] for m in arm.judged if metric in m.curve[-1]])
    return {"value": value, "se": se, "interval": groups.interval(ends)["ci"], "n": len(ends), "n_error": 0}
