"""Which is better: a sentence or a few on every evaluation, and on groups of runs over the seeds they share, by stated rules.

Evaluations are as `gather.evaluation` reads them: every number in a cell finite or None, their facts as they were found.
Letters: S seeds.
"""

import math
from collections.abc import Sequence
from statistics import mean, stdev

from rpo.evals import pairing
from rpo.evals.results import Results
from rpo.reporting import gather, side_by_side
from rpo.reporting.batches import Batch
from rpo.runs import groups
from rpo.stats import ALPHA, t_quantile

RULES = (
    "Evaluations: a model is called preferred, above or below where the 95% interval leaves out no difference (half of the "
    "prompts, or 0); where nothing varied and there is no interval, a preference by the sign test at 5%. Else no difference is "
    "seen, which does not mean that there is none. These intervals are not corrected for how many there are. Models that are "
    "listed with an interval each are not compared: task=compare does that, item by item.",
    "Groups on the same seeds: the mean over seeds of the difference at the last evaluation, its interval by Student's t with "
    "one degree of freedom less than seeds, and Bonferroni's correction over the differences listed: all intervals hold "
    "together with a chance of 95%. It is of training anew, on prompts that are the same ones.",
)
_ITEMS = {"winrate": "prompts", "alpaca_eval": "instructions", "mt_bench": "turns"}
_MOST = 4  # metrics of an evaluation that are told of models one by one


# ---- evaluations


def of_evaluation(found: Results) -> list[str]:
    """What the evaluation says of which model is better; [] where nothing in it says that, or its results are unusable.

    task=compare has words of its own for what it finds (`compare.verdict`).
    """
    if found.task == "compare":
        return []
    short = dict(zip(found.models, groups.short(list(found.models)), strict=True))
    models = {m: cells for m, cells in found.models.items() if not any("unusable" in cell for cell in cells.values())}
    told, met = [], set()
    for model, cells in models.items():
        others = _opponents(found, model)
        if len(others) == 1 and "win_rate" in cells and {model, *others} not in met:
            met.add(frozenset({model, *others}))
            told += _preferred(found, short[model], short.get(others[0], others[0]), cells)
    baseline = _config(found).get("baseline")
    for model, cells in models.items() if isinstance(baseline, str) else ():
        compared = {name: cell for name, cell in cells.items() if name.startswith("difference/")}
        told += [
            _above(short[model], short.get(baseline, baseline), name.partition("/")[2], cell)
            for name, cell in compared.items()
            if cell["value"] is not None
        ]
    return told or _each(found.task, {short[model]: cells for model, cells in models.items()})


def _config(found: Results) -> dict:
    config = found.facts.get("config")
    return config if isinstance(config, dict) else {}


def _opponents(found: Results, model: str) -> list[str]:
    """Whom the model's answers were judged against, other than itself."""
    if found.task == "alpaca_eval":
        met = [found.facts.get("baseline")]
    else:
        met = {
            str(sample["against"]) for sample in found.samples if sample.get("model") == model and "against" in sample
        }
    return sorted(other for other in met if isinstance(other, str) and other != model)


def _preferred(found: Results, model: str, other: str, cells: dict[str, dict]) -> list[str]:
    """The sentence on a win rate; AlpacaEval's are in percent."""
    full = 100 if found.task == "alpaca_eval" else 1
    cell, p = cells["win_rate"], None
    if cell["value"] is None:
        return []
    test = found.facts.get("sign_test")
    if isinstance(test, dict) and gather.finite(test.get("p")):
        p = test["p"]
    side = (cell["value"] > full / 2) - (cell["value"] < full / 2)
    sure = cell["interval"] is not None and not cell["interval"][0] <= full / 2 <= cell["interval"][1]
    sure |= cell["interval"] is None and cell["se"] == 0 and p is not None and p <= ALPHA
    names = (model, other) if side >= 0 or not sure else (other, model)
    mirrored = names[0] != model
    facts = [_share(cell, full, mirrored)[1]] + ([] if p is None else [f"sign test p {p:.2g}"])
    control = next((c for n, c in cells.items() if "length_controlled" in n and c["value"] is not None), None)
    if control is not None:
        facts.append("at equal length " + ", ".join(_share(control, full, mirrored)))
    judge = pairing.judged_by(found.task, found.facts).get("judge")
    by = f", by judge {judge}" if judge else ""
    share = (
        f"{_share(cell, full, mirrored)[0]} of {cell['n']} {_ITEMS.get(found.task, 'items')} ({'; '.join(facts)}){by}."
    )
    if sure:
        return [f"{names[0]} is preferred to {names[1]} in {share}"]
    return [f"No preference seen between {model} and {other}: {model} is preferred in {share}"]


def _share(cell: dict, full: int, mirrored: bool) -> tuple[str, str]:
    """(the rate, its interval) in percent, of the other side where `mirrored`."""

    def percent(value: float) -> str:
        share = value / full
        return f"{100 * (1 - share if mirrored else share):.1f}%"

    if cell["interval"] is None:
        return percent(cell["value"]), "nothing varied: no interval" if cell["se"] == 0 else "no interval"
    bounds = list(map(percent, reversed(cell["interval"]) if mirrored else cell["interval"]))
    return percent(cell["value"]), f"95% {bounds[0]} to {bounds[1]}"


def _above(model: str, baseline: str, metric: str, cell: dict) -> str:
    value, interval = cell["value"], cell["interval"]
    told = f"{_signed(value)} ({_interval(cell)}; {cell['n']} items)"
    if interval is None or interval[0] <= 0 <= interval[1]:
        return f"{metric}: no difference seen between {model} and {baseline}: {told}."
    return f"{metric}: {model} is {'above' if value > 0 else 'below'} {baseline}: {told}."


def _each(task: str, models: dict[str, dict[str, dict]]) -> list[str]:
    """What is told of models one by one: gold, else the first metric that says how good; of a harness one for each of its tasks."""
    names = [
        name
        for name in dict.fromkeys(name for cells in models.values() for name in cells)
        if name not in side_by_side.NEITHER and not name.startswith("samples/")
    ]
    if "gold" in names:
        names = ["gold"]
    elif task == "lm_eval":
        names = list({name.partition("/")[0]: name for name in reversed(names)}.values())[::-1][:_MOST]
    told = []
    for name in names[: _MOST if task == "lm_eval" else 1]:
        own = [
            f"{model} {_number(cells[name]['value'])} ({_interval(cells[name])})"
            for model, cells in models.items()
            if name in cells and cells[name]["value"] is not None
        ]
        told += [f"{name}: {', '.join(own)}."] if own else []
    return told


def _interval(cell: dict) -> str:
    if cell["interval"] is None:
        return "nothing varied: no interval" if cell["se"] == 0 else "no interval"
    return "95% " + " to ".join(map(_number, cell["interval"]))


def _number(value: float) -> str:
    return f"{value:.4g}"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + _number(value)


def context(found: Results) -> list[str]:
    """What the numbers have to be read with: the judge, how it was asked, the opponents, and the evaluation's own notes."""
    judged, lines = pairing.judged_by(found.task, found.facts), []
    if judged:
        who = judged["judge"] or "not named by the stored judgments"
        how = [f"served as {judged['served']}"] * bool(judged["served"])
        how += [
            f"{what} {judged[key]}" for key, what in (("prompt", "prompt"), ("verdict", "verdict by")) if judged[key]
        ]
        lines.append(f"Judge: {'; '.join([who, *how])}.")
    against = {other for model in found.models for other in _opponents(found, model)}
    if against and against <= set(found.models):
        lines.append("The models were judged against each other.")
    elif against:
        lines.append(f"Judged against: {', '.join(sorted(against))}.")
    notes = found.facts.get("notes")
    return [*lines, *map(str, notes)] if isinstance(notes, list) else lines


# ---- groups of runs


def over_seeds(batches: Sequence[Batch]) -> list[str]:
    """Each group minus the first that is DPO (else the first), paired over two or more seeds that both finished.

    Gold where both measured it in the same way, else held-out accuracy and the shift of chosen log-probs; d_s = a_s - b_s at
    the last evaluation, mean +- t_(S-1, 1 - 5% / 2m) sd / sqrt(S) with m the number of differences told.
    """
    ends = {batch.label: _ends(batch) for batch in batches if len(batch.members) > 1}
    if len(ends) < 2:
        return []
    base = next((label for label in ends if label.startswith("DPO")), next(iter(ends)))
    found = [
        (f"{label} minus {base}: {name}", step, values)
        for label in ends
        if label != base
        for name, step, values in _differences(ends[label], ends[base])
    ]
    told = []
    for what, step, values_S in found:
        value, spread = mean(values_S), stdev(values_S)
        half = t_quantile(1 - ALPHA / (2 * len(found)), len(values_S) - 1) * spread / math.sqrt(len(values_S))
        over = f"over {len(values_S)} shared seeds, step {step}"
        if spread <= 1e-12 * max(map(abs, values_S)):
            told.append(f"{what} {_signed(value)}, the same for every seed, so there is no interval ({over}).")
            continue
        said = "above" if value > half else "below" if value < -half else "no difference seen"
        told.append(
            f"{what} {_signed(value)} (95% {_number(value - half)} to {_number(value + half)}, {over}): {said}."
        )
    return told


def _ends(batch: Batch) -> dict[tuple, dict]:
    """(seeds, step, whether task=overopt measured it) -> the last evaluation of each run that finished."""
    done = [member for member in batch.members if member.done and member.curve]
    return {(groups.identity(m.settings)[1], m.curve[-1]["step"], m.studied is not None): m.curve[-1] for m in done}


def _differences(a: dict[tuple, dict], b: dict[tuple, dict]) -> list[tuple[str, int, list[float]]]:
    """(metric, step, difference by seed) of what all seeds that both have measured; [] for fewer than two."""
    shared = [key for key in a if key in b]
    if len(shared) < 2 or len({key[1:] for key in shared}) > 1:
        return []
    known = [
        name
        for name in ("gold", "rewards/accuracies", "shift/chosen")
        if all(name in x[k] for x in (a, b) for k in shared)
    ]
    if "gold" in known:
        known = ["gold"]
    return [(name, shared[0][1], [a[key][name] - b[key][name] for key in shared]) for name in known]
