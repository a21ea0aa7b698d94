"""Which is better, in sentences by stated rules: one or a few on every evaluation, on groups over shared seeds, on all of it.

Letters: S seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rpo.evals import pairing
from rpo.reporting import side_by_side
from rpo.reporting.collect import Group, Member, Report
from rpo.reporting.evaluations import Results, as_dict, finite
from rpo.reporting.text import counted, decimals, fixed
from rpo.runs import groups
from rpo.stats import ALPHA, t_quantile

RULES = (
    "Top of the page: an arm improved (or got worse) where the 95% interval of its gold at the end minus at the start leaves out "
    "0: over seeds by Student's t with Bonferroni's correction over the arms; of a single seed, by the paired error that "
    "task=overopt measured and its noise. Without gold the first conclusive evaluation is quoted.",
    "Evaluations: a model is called preferred, above or below where the 95% interval leaves out no difference (half of the "
    "prompts, or 0); where nothing varied and there is no interval, preferred by the sign test at 5%. Otherwise no difference is "
    "seen, which does not mean that there is none. These intervals are not corrected for their number. Models that are "
    "listed with an interval each are not compared: task=compare does that, item by item.",
    "Arms on the same seeds: the mean over seeds of the difference at the last evaluation, its interval by Student's t with "
    "one degree of freedom less than seeds, and Bonferroni's correction over the differences listed: all intervals hold "
    "together with a chance of 95%. It is about training again on the same prompts.",
)
_ITEMS = {"winrate": "prompts", "alpaca_eval": "instructions", "mt_bench": "turns"}
_MOST = 4  # metrics of an evaluation that are quoted model by model


# ---- evaluations


def of_evaluation(results: Results) -> list[str]:
    """What the evaluation says about which model is better; [] where it says nothing of that, or is unusable."""
    if results.task == "compare":
        return [text for _, text in _differences(results)]
    if results.task == "select":
        return _choices(results)
    if results.task == "overopt":  # its verdicts are those of the groups
        return []
    models = {model: cells for model, cells in results.models.items() if not results.unusable(model)}
    sentences, met = [], set()
    for model, cells in models.items():
        others = _opponents(results, model)
        if len(others) == 1 and "win_rate" in cells and frozenset({model, *others}) not in met:
            met.add(frozenset({model, *others}))
            sentences += _preferred(results, results.name(model), results.name(others[0]), cells)
    baseline = results.config.get("baseline")
    for model, cells in models.items() if isinstance(baseline, str) else ():
        sentences += [
            _above(results.name(model), results.name(baseline), name.partition("/")[2], cell)
            for name, cell in cells.items()
            if name.startswith("difference/") and cell["value"] is not None
        ]
    return sentences or _each(results.task, {results.name(model): cells for model, cells in models.items()})


def _differences(results: Results) -> list[tuple[float, str]]:
    """(adjusted p, sentence) of each comparison by task=compare, in its own words; smallest p first."""
    sentences = []
    for (first, second), metrics in zip(compared(results), results.models.values(), strict=True):
        for name, cell in metrics.items():
            try:
                text = pairing.verdict(cell, first, second, int(results.details.get("comparisons") or 1))
                sentences.append((float(cell["p_holm"]), f"{name}: {text}."))
            except (KeyError, TypeError, ValueError):  # written by another version: its table is shown all the same
                continue
    return sorted(sentences)


def _choices(results: Results) -> list[str]:
    """The checkpoint that task=select chose of each run, and why."""
    runs = results.details.get("runs")
    chosen = {
        str(run.get("run")): as_dict(run.get("chosen")) for run in map(as_dict, runs if isinstance(runs, list) else ())
    }
    return [
        f"{results.name(run)}: step {one['step']} ({one.get('reason')})."
        for run, one in chosen.items()
        if "step" in one
    ]


def compared(results: Results) -> list[list[str]]:
    """The names of the two models of each comparison by task=compare."""
    pairs = results.details.get("pairs")
    whole = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    if not whole or len(pairs) != len(results.models):
        return [[f"{name}, the first", "the second"] for name in results.models]
    return [[results.name(str(name)) for name in pair] for pair in pairs]


def _opponents(results: Results, model: str) -> list[str]:
    """Whom the model's answers were judged against, other than itself."""
    if results.task == "alpaca_eval":
        met = {results.details.get("baseline")} if isinstance(results.details.get("baseline"), str) else set()
    else:
        met = {side_by_side.opponent(sample) for sample in results.samples if sample.get("model") == model}
    return sorted(other for other in met if other is not None and other != model)


def _preferred(results: Results, model: str, other: str, cells: dict[str, dict]) -> list[str]:
    """The sentence on a win rate; AlpacaEval's are in percent."""
    full = 100 if results.task == "alpaca_eval" else 1
    cell, test = cells["win_rate"], results.details.get("sign_test")
    if cell["value"] is None:
        return []
    p = test["p"] if isinstance(test, dict) and finite(test.get("p")) else None
    side = (cell["value"] > full / 2) - (cell["value"] < full / 2)
    sure = cell["interval"] is not None and not cell["interval"][0] <= full / 2 <= cell["interval"][1]
    sure |= cell["interval"] is None and cell["se"] == 0 and p is not None and p <= ALPHA
    names = (model, other) if side >= 0 or not sure else (other, model)
    mirrored = names[0] != model
    facts = [_share(cell, full, mirrored)[1]] + ([] if p is None else [f"sign test p {p:.2g}"])
    control = next((c for n, c in cells.items() if "length_controlled" in n and c["value"] is not None), None)
    if control is not None:
        facts.append("at equal length " + ", ".join(_share(control, full, mirrored)))
    judge = results.judged_by.get("judge")
    rate = f"{_share(cell, full, mirrored)[0]} of {cell['n']} {_ITEMS.get(results.task, 'items')} ({'; '.join(facts)})"
    rate += f", by judge {judge}." if judge else "."
    if sure:
        return [f"{names[0]} is preferred to {names[1]} in {rate}"]
    return [f"No preference seen between {model} and {other}: {model} is preferred in {rate}"]


def _share(cell: dict, full: int, mirrored: bool) -> tuple[str, str]:
    """(the rate, its interval) in percent, of the other side where `mirrored`."""

    def percent(value: float) -> str:
        share = value / full
        return f"{100 * (1 - share if mirrored else share):.1f}%"

    if cell["interval"] is None:
        return percent(cell["value"]), _no_interval(cell)
    bounds = list(map(percent, reversed(cell["interval"]) if mirrored else cell["interval"]))
    return percent(cell["value"]), f"95% {bounds[0]} to {bounds[1]}"


def _no_interval(cell: dict) -> str:
    return "nothing varied: no interval" if cell["se"] == 0 else "no interval"


def _above(model: str, baseline: str, metric: str, cell: dict) -> str:
    value, interval = cell["value"], cell["interval"]
    size = f"{_signed(value)} ({_interval(cell)}; {cell['n']} items)"
    if interval is None or interval[0] <= 0 <= interval[1]:
        return f"{metric}: no difference seen between {model} and {baseline}: {size}."
    return f"{metric}: {model} is {'above' if value > 0 else 'below'} {baseline}: {size}."


def _each(task: str, models: dict[str, dict[str, dict]]) -> list[str]:
    """Models one by one: gold, else the first metric of quality; of a harness, one for each of its tasks."""
    names = [name for name in dict.fromkeys(n for cells in models.values() for n in cells) if is_quality(name)]
    if "gold" in names:
        names = ["gold"]
    elif task == "lm_eval":
        names = list({name.partition("/")[0]: name for name in reversed(names)}.values())[::-1]
    sentences = []
    for name in names[: _MOST if task == "lm_eval" else 1]:
        own = [
            f"{model} {_number(cells[name]['value'])} ({_interval(cells[name])})"
            for model, cells in models.items()
            if name in cells and cells[name]["value"] is not None
        ]
        sentences += [f"{name}: {', '.join(own)}."] if own else []
    return sentences


def is_quality(metric: str) -> bool:
    """Whether a metric says how good answers are: not their lengths, nor whether they ended."""
    return metric not in side_by_side.NEITHER and not metric.startswith("samples/")


def _interval(cell: dict) -> str:
    return _no_interval(cell) if cell["interval"] is None else "95% " + " to ".join(map(_number, cell["interval"]))


def _number(value: float) -> str:
    return f"{value:.4g}"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + _number(value)


def context(results: Results) -> list[str]:
    """What the numbers have to be read with: the judge, how it was asked, the opponents, and the evaluation's own notes."""
    judged, facts = results.judged_by, []
    if judged:
        who = [judged["judge"] or "not named by the stored judgments"]
        who += [f"served as {judged['served']}"] * bool(judged["served"])
        who += [
            f"{what} {judged[key]}"
            for key, what in {"prompt": "prompt", "verdict": "verdict by"}.items()
            if judged[key]
        ]
        facts.append(f"Judge: {'; '.join(who)}.")
    against = {other for model in results.models for other in _opponents(results, model)}
    if against and against <= set(results.models):
        facts.append("The models were judged against each other.")
    elif against:
        facts.append(f"Judged against: {', '.join(sorted(against))}.")
    return [*facts, *results.notes]


# ---- groups of runs


def over_seeds(arms: Sequence[Group]) -> list[str]:
    """Each group minus the first that is DPO (else the first), paired over two or more seeds that both finished.

    Gold where both measured it in the same way, else held-out accuracy and the shift of chosen log-probs; d_s = a_s - b_s at
    the last evaluation, mean +- t_(S-1, 1 - 5% / 2m) sd / sqrt(S) with m the number of differences listed.
    """
    ends = {group.short: _ends(group) for group in arms if len(group.members) > 1}
    if len(ends) < 2:
        return []
    base = next((label for label in ends if label.startswith("DPO")), next(iter(ends)))
    differences = [
        (f"{label} minus {base}: {name}", step, values)
        for label in ends
        if label != base
        for name, step, values in _by_seed(ends[label], ends[base])
    ]
    sentences = []
    for what, step, values_S in differences:
        value, spread = mean(values_S), stdev(values_S)
        half = t_quantile(1 - ALPHA / (2 * len(differences)), len(values_S) - 1) * spread / math.sqrt(len(values_S))
        over = f"over {len(values_S)} shared seeds, step {step}"
        if spread <= 1e-12 * max(map(abs, values_S)):
            sentences.append(f"{what} {_signed(value)}, the same for every seed, so there is no interval ({over}).")
            continue
        side = "above" if value > half else "below" if value < -half else "no difference seen"
        bounds = f"95% {_number(value - half)} to {_number(value + half)}"
        sentences.append(f"{what} {_signed(value)} ({bounds}, {over}): {side}.")
    return sentences


def _ends(group: Group) -> dict[tuple, dict]:
    """(seeds, step, whether task=overopt measured it) -> the last evaluation of each run that finished."""
    done = [member for member in group.members if member.done and member.curve]
    return {(groups.identity(m.settings)[1], m.curve[-1]["step"], m.measured is not None): m.curve[-1] for m in done}


def _by_seed(a: dict[tuple, dict], b: dict[tuple, dict]) -> list[tuple[str, int, list[float]]]:
    """(metric, step, difference by seed) of what all seeds that both have measured; [] for fewer than two."""
    shared = [key for key in a if key in b]
    if len(shared) < 2 or len({key[1:] for key in shared}) > 1:
        return []
    names = ("gold", "rewards/accuracies", "shift/chosen")
    known = [name for name in names if all(name in x[k] for x in (a, b) for k in shared)]
    known = ["gold"] if "gold" in known else known
    return [(name, shared[0][1], [a[key][name] - b[key][name] for key in shared]) for name in known]


# ---- the sentence at the top


@dataclass(frozen=True)
class Gain:
    """Gold at the end minus at the start, a mean over seeds, and half of its interval; None: not known."""

    value: float
    half: float | None

    @property
    def side(self) -> int | None:
        """1 better, -1 worse, 0 within noise; None where noise is not known."""
        return None if self.half is None else (self.value > self.half) - (self.value < -self.half)

    def __str__(self) -> str:
        value, places = abs(self.value), decimals([self.half])
        low, high = (fixed(bound, places) for bound in (value - self.half, value + self.half))
        return f"{fixed(value, places)} gold (95% {low} to {high})"


def gains(arms: Sequence[Group]) -> dict[str, Gain]:
    """Arm -> Gain, where gold was measured at the start and the end.

    Over S seeds mean +- t_(S-1, 1 - 5% / 2m) sd / sqrt(S) with m the number of arms, because the best of them is quoted; of one
    seed the error and noise of task=overopt.
    """
    curves = {arm.short: [c for m in arm.judged if len(c := [p for p in m.curve if "gold" in p]) > 1] for arm in arms}
    curves = {name: own for name, own in curves.items() if own}
    by_arm = {}
    for arm in (arm for arm in arms if arm.short in curves):
        values_S = [curve[-1]["gold"] - curve[0]["gold"] for curve in curves[arm.short]]
        half = _paired_half(arm.judged[0]) if len(arm.judged) == 1 else None
        spread = stdev(values_S) if len(values_S) > 1 else 0.0
        if spread > 1e-12 * max(map(abs, values_S)):  # equal for every seed: no interval
            half = t_quantile(1 - ALPHA / (2 * len(curves)), len(values_S) - 1) * spread / math.sqrt(len(values_S))
        by_arm[arm.short] = Gain(mean(values_S), half)
    return by_arm


def _paired_half(member: Member) -> float | None:
    summary = member.measured["summary"] if member.measured else {}
    known = finite(summary.get("gold/final_gain_se")) and finite(summary.get("gold/noise"))
    return summary["gold/noise"] * summary["gold/final_gain_se"] if known else None


def headline(report: Report) -> str:
    """Did it get better? One sentence: by gold, else by the first conclusive evaluation, else by signs."""
    gained = gains(report.groups)
    kinds = {arm.short: arm.verdict.kind for arm in report.groups}
    better = [name for name, g in gained.items() if g.side == 1]
    if better:
        best = max(better, key=lambda name: gained[name].value)
        kept = {"no overoptimisation seen": " and kept it", "overoptimised": ", though it had been higher before"}
        return f"Better: {best} gained {gained[best]}{kept.get(kinds[best], '')}{_rest(gained, kinds)}."
    if worse := [name for name, g in gained.items() if g.side == -1]:
        most = min(worse, key=lambda name: gained[name].value)
        of = f"; no arm of {len(gained)} improved" if len(gained) > 1 else ""
        return f"Worse: {most} lost {gained[most]}{of}."
    lines = [line for each in report.evaluations for line in of_evaluation(each)]
    if conclusive := [line for line in lines if _says_better(line)]:
        return conclusive[0]
    if any(g.side == 0 for g in gained.values()):
        return f"Inconclusive: gold changed beyond noise in none of {counted(len(gained), 'arm')}."
    if gained:
        return "Inconclusive: gold has one seed and no error bars; use task=overopt or more seeds."
    if report.groups:
        signs = sum(kind == "signs of overoptimisation" for kind in kinds.values())
        of = f"{signs} of {counted(len(kinds), 'arm')} show{'s' * (signs == 1)} signs of overoptimisation"
        return (
            f"Inconclusive: the quality of answers was not measured; {of if signs else 'no sign of overoptimisation'}."
        )
    lines = [line for each in report.evaluations for line in of_evaluation(each)]
    no_difference = [line for line in lines if line.startswith("No preference") or "no difference seen" in line]
    alone = lines if all(len(each.models) == 1 for each in report.evaluations) else []
    one_by_one = ["Inconclusive: models were scored one by one; task=compare compares them item by item."]
    return [*no_difference, *alone, *one_by_one][0]


def _says_better(sentence: str) -> bool:
    """Whether a sentence on an evaluation is conclusive, by a metric of which more is better."""
    if "No preference seen" in sentence or "no difference seen" in sentence or "may be luck" in sentence:
        return False
    metric = sentence.partition(": ")[0]
    by_metric = is_quality(metric) and not side_by_side.is_lower_better(metric)
    return " is preferred to " in sentence or (by_metric and (" is above " in sentence or " is below " in sentence))


def _rest(gained: dict[str, Gain], kinds: dict[str, str]) -> str:
    """How the arms beside the best one did."""
    bad = sum(kind.startswith("overoptimised") for kind in kinds.values())
    if bad:
        return f"; {bad} of {counted(len(kinds), 'arm')} {'are' if bad > 1 else 'is'} overoptimised"
    better = sum(g.side == 1 for g in gained.values())
    return f"; {better} of {counted(len(gained), 'arm')} improved" if len(gained) > 1 else ""


def asides(report: Report) -> list[str]:
    """What judges prefer, to stand below the headline."""
    lines = [line for each in report.evaluations if each.task in _ITEMS for line in of_evaluation(each)[:1]]
    return [line for line in lines if "prefer" in line and line != headline(report)][:2]


def unusable(results: Results) -> list[str]:
    reasons = {model: results.unusable(model) for model in results.models}
    return [f"{model} by task={results.task} ({results.folder}): {why}" for model, why in reasons.items() if why]
