"""Which is better, in sentences by stated rules: one or a few on every evaluation, on groups over shared seeds, on all of it.

The rules are in report.html.j2, as the page states them.
"""

from collections.abc import Sequence

from rpo.evals import pairing
from rpo.reporting import side_by_side
from rpo.reporting.collect import Group, Report, Results, compared
from rpo.runs import groups
from rpo.stats import ALPHA, finite, sign_test
from rpo.text import counted, decimals, fixed

_ITEMS = {"winrate": "prompts", "alpaca_eval": "instructions", "mt_bench": "turns"}
_MOST = 4  # metrics of an evaluation that are quoted model by model


# ---- evaluations


def of_evaluation(results: Results) -> list[str]:
    """What the evaluation says about which model is better; [] where it says nothing of that, or is unusable."""
    if results.task == "compare":
        return _differences(results)
    if results.task == "select":
        return _choices(results)
    if results.task == "overopt":  # its verdicts are those of the groups
        return []
    models = {model: cells for model, cells in results.models.items() if not results.unusable(model)}
    sentences, met = [], set()
    for model, cells in models.items():
        others = opponents(results, model)
        if len(others) == 1 and "win_rate" in cells and frozenset({model, *others}) not in met:
            met.add(frozenset({model, *others}))
            sentences += _preferred(results, model, others[0], cells)
    baseline = results.config.get("baseline")
    for model, cells in models.items() if isinstance(baseline, str) else ():
        sentences += [
            _above(results, model, baseline, name.partition("/")[2], cell)
            for name, cell in cells.items()
            if name.startswith("difference/") and cell["value"] is not None
        ]
    return sentences or _each(results.task, {results.name(model): cells for model, cells in models.items()})


def _differences(results: Results) -> list[str]:
    """A sentence on each comparison by task=compare, in its own words; smallest adjusted p first."""
    sentences = []
    for pair, metrics in zip(compared(results), results.models.values(), strict=True):
        for name, cell in metrics.items():
            try:
                first, second = map(results.name, pair)
                text = pairing.verdict(cell, first, second, int(results.details.get("comparisons") or 1))
                sentences.append((float(cell["p_holm"]), f"{name}: {text}."))
            except (KeyError, TypeError, ValueError):  # written by another version: its table is shown all the same
                continue
    return [text for _, text in sorted(sentences)]


def _choices(results: Results) -> list[str]:
    """The checkpoint that task=select chose of each run, and why."""
    runs, sentences = results.details.get("runs"), []
    for run in runs if isinstance(runs, list) else ():
        chosen = run.get("chosen") if isinstance(run, dict) else None
        if isinstance(chosen, dict) and "step" in chosen:
            name = results.name(str(run.get("run")))
            sentences.append(f"{name}: step {chosen['step']} ({chosen.get('reason')}).")
    return sentences


def opponents(results: Results, model: str) -> list[str]:
    """Whom the model's answers were judged against, other than itself."""
    met = {item.opponent for item in results.items if item.model == model}
    if results.task == "alpaca_eval":
        met = {results.details.get("baseline")} if isinstance(results.details.get("baseline"), str) else set()
    return sorted(other for other in met if other is not None and other != model)


def _preferred(results: Results, model: str, other: str, cells: dict[str, dict]) -> list[str]:
    """The sentence on a win rate; AlpacaEval's are in percent."""
    full = 100 if results.task == "alpaca_eval" else 1
    cell, test = cells["win_rate"], results.details.get("sign_test")
    if cell["value"] is None:
        return []
    p = test["p"] if isinstance(test, dict) and finite(test.get("p")) else _p_flat(results, model, cell, full / 2)
    sure = cell["se"] == 0 and p <= ALPHA if cell["interval"] is None and p is not None else _side(cell, full / 2)
    model, other = results.name(model), results.name(other)
    mirrored = sure and cell["value"] < full / 2
    rate, bounds = _share(cell, full, mirrored)
    facts = [bounds] + ([] if p is None else [f"sign test p {p:.2g}"])
    control = next((c for n, c in cells.items() if "length_controlled" in n and c["value"] is not None), None)
    if control is not None:
        facts.append("at equal length " + ", ".join(_share(control, full, mirrored)))
    judge = results.judged_by.get("judge")
    rate = f"{rate} of {cell['n']} {_ITEMS.get(results.task, 'items')} ({'; '.join(facts)})"
    rate += f", by judge {judge}." if judge else "."
    if sure:
        first, second = (other, model) if mirrored else (model, other)
        return [f"{first} is preferred to {second} in {rate}"]
    return [f"No preference seen between {model} and {other}: {model} is preferred in {rate}"]


def _share(cell: dict, full: int, mirrored: bool) -> tuple[str, str]:
    """(the rate, its interval) in percent, of the other side where `mirrored`."""
    shares = [value / full for value in (cell["value"], *(cell["interval"] or ()))]
    value, *bounds = (f"{100 * (1 - share if mirrored else share):.1f}%" for share in shares)
    return value, f"95% {' to '.join(reversed(bounds) if mirrored else bounds)}" if bounds else _interval(cell)


def _interval(cell: dict) -> str:
    if cell["interval"] is None:
        return "nothing varied: no interval" if cell["se"] == 0 else "no interval"
    return "95% " + " to ".join(f"{bound:.4g}" for bound in cell["interval"])


def _above(results: Results, model: str, baseline: str, metric: str, cell: dict) -> str:
    p = _p_flat(results, model, cell)
    model, baseline = results.name(model), results.name(baseline)
    size = f"{_signed(cell['value'])} ({_interval(cell)}; {'' if p is None else f'sign test p {p:.2g}; '}{cell['n']} items)"
    if not _side(cell) and (p is None or p > ALPHA):
        return f"{metric}: no difference seen between {model} and {baseline}: {size}."
    return f"{metric}: {model} is {'above' if cell['value'] > 0 else 'below'} {baseline}: {size}."


def _p_flat(results: Results, model: str, cell: dict, zero: float = 0.0) -> float | None:
    """Where nothing varied the p of the sign test, of clusters that are all on one side of `zero`; None where something did."""
    if cell["se"] != 0 or cell["interval"] is not None:
        return None
    clusters = {item.cluster for item in results.items if item.model == model and item.scores}
    return sign_test(len(clusters), 0) if cell["value"] != zero else 1.0


def _side(cell: dict, zero: float = 0.0) -> int | None:
    """1 where the interval is above `zero`, -1 below, 0 around it; None without one."""
    interval = cell["interval"]
    return interval and (interval[0] > zero) - (interval[1] < zero)


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + f"{value:.4g}"


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
            f"{model} {cells[name]['value']:.4g} ({_interval(cells[name])})"
            for model, cells in models.items()
            if name in cells and cells[name]["value"] is not None
        ]
        sentences += [f"{name}: {', '.join(own)}."] if own else []
    return sentences


def is_quality(metric: str) -> bool:
    """Whether a metric says how good answers are: not their lengths, nor whether they ended."""
    return metric not in side_by_side.NEITHER and not metric.startswith("samples/")


def context(results: Results) -> list[str]:
    """What the numbers have to be read with: what is unusable, the judge, the opponents, and its own notes."""
    judged = results.judged_by
    facts = [f"Unusable: {model}: {reason}" for model in results.models if (reason := results.unusable(model))]
    if judged:
        words = {"served": "served as", "prompt": "prompt", "verdict": "verdict by"}
        who = [judged["judge"] or "not named by the stored judgments"]
        facts.append(
            f"Judge: {'; '.join(who + [f'{word} {judged[key]}' for key, word in words.items() if judged[key]])}."
        )
    against = {other for model in results.models for other in opponents(results, model)}
    if against and against <= set(results.models):
        facts.append("The models were judged against each other.")
    elif against:
        facts.append(f"Judged against: {', '.join(sorted(against))}.")
    return [*facts, *results.notes]


# ---- groups of runs


def over_seeds(arms: Sequence[Group]) -> list[str]:
    """Each group minus the first that is DPO (else the first), paired over two or more seeds that both finished.

    Gold where both measured it in the same way, else held-out accuracy and the shift of chosen log-probs; the interval of
    the mean difference at the last evaluation by `groups.interval`, with as many comparisons as differences listed.
    """
    ends = {group.short: _ends(group) for group in arms if len(group.members) > 1}
    base = next((label for label in ends if label.startswith("DPO")), next(iter(ends), None))
    differences = []
    for label in ends:
        shared = [key for key in ends[label] if key in ends[base]]
        if label == base or len(shared) < 2 or len({key[1:] for key in shared}) > 1:
            continue
        pairs = [(ends[label][key], ends[base][key]) for key in shared]
        names = ("gold", "rewards/accuracies", "shift/chosen")
        known = [name for name in names if all(name in end for pair in pairs for end in pair)]
        for name in ["gold"] if "gold" in known else known:
            values = [end[name] - base_end[name] for end, base_end in pairs]
            differences.append((f"{label} minus {base}: {name}", shared[0][1], values))
    sentences = []
    for what, step, values in differences:
        cell = _mean(values, len(differences))
        over, size = f"over {len(values)} shared seeds, step {step}", _signed(cell["value"])
        if cell["interval"] is None:
            sentences.append(f"{what} {size}, the same for every seed, so there is no interval ({over}).")
            continue
        side = {1: "above", -1: "below", 0: "no difference seen"}[_side(cell)]
        sentences.append(f"{what} {size} ({_interval(cell)}, {over}): {side}.")
    return sentences


def _mean(values: Sequence[float], comparisons: int) -> dict:
    """{"value", "interval"} over seeds; no interval of one value, or of equal ones, which are no measure of noise."""
    over = groups.interval(values, comparisons)
    varied = over["sd"] is not None and over["sd"] > 1e-12 * max(map(abs, values))
    return {"value": over["mean"], "interval": over["ci"] if varied else None}


def _ends(group: Group) -> dict[tuple, dict]:
    """(seeds, step, whether task=overopt measured it) -> the last evaluation of each run that finished."""
    done = [member for member in group.members if member.done and member.curve]
    return {(groups.identity(m.settings)[1], m.curve[-1]["step"], m.measured is not None): m.curve[-1] for m in done}


# ---- the sentence at the top


def gains(arms: Sequence[Group]) -> dict[str, dict]:
    """Arm -> {"value", "interval"} of gold at the end minus at the start, where it was measured at both: a mean over seeds.

    Over seeds by `groups.interval` with as many comparisons as arms, because the best of them is quoted; of one seed by the
    error and noise of task=overopt. No interval where noise is not known.
    """
    changes = []
    for arm in arms:
        curves = [[point["gold"] for point in member.curve if "gold" in point] for member in arm.judged]
        own = [curve[-1] - curve[0] for curve in curves if len(curve) > 1]
        changes += [(arm, own)] if own else []
    cells = {}
    for arm, values in changes:
        cell = cells[arm.short] = _mean(values, len(changes))
        summary = arm.judged[0].measured["summary"] if len(arm.judged) == 1 and arm.judged[0].measured else {}
        if summary.get("gold/final_gain_se") is not None:
            half = summary["gold/noise"] * summary["gold/final_gain_se"]
            cell["interval"] = [cell["value"] - half, cell["value"] + half]
    return cells


def _gold(cell: dict) -> str:
    low, high = sorted(map(abs, cell["interval"]))
    places = decimals([(high - low) / 2])
    return f"{fixed(abs(cell['value']), places)} gold (95% {fixed(low, places)} to {fixed(high, places)})"


def headline(report: Report) -> str:
    """Did it get better? One sentence: by gold, else by the first conclusive evaluation, else by signs."""
    gained = gains(report.groups)
    sides = {name: _side(cell) for name, cell in gained.items()}
    kinds = {arm.short: arm.verdict.kind for arm in report.groups}
    if better := [name for name in gained if sides[name] == 1]:
        best = max(better, key=lambda name: gained[name]["value"])
        rest, bad = "", sum(kind.startswith("overoptimised") for kind in kinds.values())
        if bad:
            rest = f"; {bad} of {counted(len(kinds), 'arm')} {'are' if bad > 1 else 'is'} overoptimised"
        elif len(gained) > 1:
            rest = f"; {len(better)} of {counted(len(gained), 'arm')} improved"
        kept = {"no overoptimisation seen": " and kept it", "overoptimised": ", though it had been higher before"}
        return f"Better: {best} gained {_gold(gained[best])}{kept.get(kinds[best], '')}{rest}."
    if worse := [name for name in gained if sides[name] == -1]:
        most = min(worse, key=lambda name: gained[name]["value"])
        of = f"; no arm of {len(gained)} improved" if len(gained) > 1 else ""
        return f"Worse: {most} lost {_gold(gained[most])}{of}."
    lines = [line for each in report.evaluations for line in of_evaluation(each)]
    if conclusive := [line for line in lines if _says_better(line)]:
        return conclusive[0]
    if 0 in sides.values():
        return f"Inconclusive: gold changed beyond noise in none of {counted(len(gained), 'arm')}."
    if gained:
        return "Inconclusive: gold has one seed and no error bars; use task=overopt or more seeds."
    if report.groups:
        signs = sum(kind == "signs of overoptimisation" for kind in kinds.values())
        of = f"{signs} of {counted(len(kinds), 'arm')} show{'s' * (signs == 1)} signs of overoptimisation"
        of = of if signs else "no sign of overoptimisation"
        return f"Inconclusive: the quality of answers was not measured; {of}."
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


def asides(report: Report) -> list[str]:
    """What judges prefer, to stand below the headline."""
    lines = [line for each in report.evaluations for line in of_evaluation(each)[:1]]
    return [line for line in lines if "prefer" in line and line != headline(report)][:2]
