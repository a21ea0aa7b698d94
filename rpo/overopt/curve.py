"""Overoptimisation of one run: gold reward along its checkpoints, where it peaked, how far it fell, and how surely.

A curve is a list of points, one per checkpoint in the order of steps; the first is step 0, the weights that the run
started from, which are its reference unless reference.path names others, and are called so here:

    {"step": 50, "metrics": {"gold": {"value": 3.1, "se": .1, "n": 512}, "kl": ..., "rewards/accuracies": ...},
     "clusters": {"gold": {"mean": [...], "size": [...]}}}

`clusters` is optional: a metric's mean and number of rows for each prompt, the prompts in one order at every point.
Checkpoints of a run answer the same prompts, so with it a difference between two of them has the paired standard
error. Letters: G prompts. Gold is in its own unit, KL in nats.
"""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np

from rpo.errors import UserError
from rpo.stats import clustered_mean, t_quantile
from rpo.text import significant

LEVELS = (1.0, 2.0, 4.0, 8.0)  # nats at which runs are compared
# What `verdict` goes by. A difference is "beyond noise" where it exceeds `gold/noise` standard errors (see `summarise`).
ALPHA = 0.05  # chance of a run whose gold is flat being called overoptimised
SLIGHT = 0.1  # of the gain over the reference: a smaller drop is no overoptimisation, however sure
LARGE = 0.5  # of the gain: where noise leaves room for such a drop, nothing is said
STAYED = 0.1  # nats: a policy that never was further than this has not left the reference
SOME = "overoptimised in some seeds"
ENDED = 0.9  # share of answers: where fewer end of themselves, gold is of cut ones
_GAPS = [f"gold/{name}{part}" for name in ("drop", "gain", "final_gain") for part in ("", "_se")]


def value(point: dict, name: str) -> float | None:
    """Metric `name` of a point; None where it was not measured. UserError where it is not finite."""
    measured = point["metrics"].get(name, {}).get("value")
    if measured is not None and not math.isfinite(measured):
        raise UserError(f"step {point['step']}: {name}={measured}; expected a finite number")
    return measured


def column(curve: Sequence[dict], name: str) -> np.ndarray:
    """Metric `name` at every point, float64. UserError names the first step that lacks it."""
    values = [value(point, name) for point in curve]
    if None in values:
        raise UserError(f"step {curve[values.index(None)]['step']}: has no {name}; it has to be measured at every step")
    return np.array(values, dtype=np.float64)


def distance(curve: Sequence[dict]) -> np.ndarray:
    """d = sqrt(KL) at every point, nats^0.5; an estimate below zero counts as zero."""
    return np.sqrt(np.maximum(column(curve, "kl"), 0))


def difference(a: dict, b: dict, name: str) -> dict:
    """Metric `name` at point a minus at point b: its value, standard error and degrees of freedom (None: many).

    With `clusters` at both points the error is the paired one, of the weighted mean of the per-prompt differences
    (SE^2 = Var_a + Var_b - 2 Cov), with G - 1 degrees of freedom; otherwise sqrt(se_a^2 + se_b^2), which is too large
    where prompts are shared. None where a point has no error. UserError where the clusters are of other prompts, or
    do not average to the value.
    """
    gap = float(column([a], name)[0] - column([b], name)[0])
    clusters = [point.get("clusters", {}).get(name) for point in (a, b)]
    if None in clusters:
        errors = [0.0] if a is b else [point["metrics"][name].get("se") for point in (a, b)]
        return {"value": gap, "se": None if None in errors else math.hypot(*errors), "df": None}
    (mean_a_G, size_G), (mean_b_G, other_G) = (
        (np.asarray(cluster["mean"], dtype=np.float64), np.asarray(cluster["size"])) for cluster in clusters
    )
    steps = f"steps {a['step']} and {b['step']}"
    if not np.array_equal(size_G, other_G) or len(mean_a_G) != len(size_G) or len(mean_b_G) != len(size_G):
        raise UserError(f"{steps}: {name} was measured on other prompts; paired errors need the same ones")
    paired = clustered_mean(size_G * (mean_a_G - mean_b_G), np.arange(len(size_G)), size_G)
    if not abs(paired["value"] - gap) <= 1e-6 * max(1.0, abs(gap)):
        raise UserError(f"{steps}: {name} differs by {gap:.6g}, its means per prompt by {paired['value']:.6g}")
    return {"value": gap, "se": paired["se"], "df": max(len(size_G) - 1, 1)}


def gold_at(curve: Sequence[dict], level: float) -> float | None:
    """Gold reward where the run first passes a KL of `level` nats, linear in sqrt(KL) between checkpoints.

    None where it never gets there. KL may fall along a run: the first passage in the order of steps is taken.
    """
    d, gold, target = distance(curve), column(curve, "gold"), math.sqrt(level)
    for i in range(len(d) - 1):
        if min(d[i], d[i + 1]) <= target <= max(d[i], d[i + 1]):
            share = (target - d[i]) / (d[i + 1] - d[i]) if d[i] != d[i + 1] else 0.0
            return float(gold[i] + share * (gold[i + 1] - gold[i]))
    return None


def summarise(curve: Sequence[dict], levels: Sequence[float] = LEVELS) -> dict[str, float | None]:
    """One run as a flat table; entries are None where the metrics were not measured.

    gold/{reference,peak,final}; gold/drop = peak - final, gold/gain = peak - reference and gold/final_gain = final -
    reference, each with _se (see `difference`); gold/drop_z = drop / se; gold/at_KL for each level (see `gold_at`);
    step/ and kl/ {peak,final}, kl/max; step/below_reference, the first at which gold is below the reference's beyond
    noise; accuracy/{peak,final}; shift/chosen, nats at the end; checkpoints, how many were trained.

    The peak is the highest of many noisy numbers, so that gold/peak, gain and drop are biased upwards by the choice.
    gold/noise makes up for it: as many standard errors as the largest of all comparisons with one checkpoint exceeds
    with a chance of at most ALPHA while nothing changes (Bonferroni; Student's t where `clusters` are known). A drop of
    fewer standard errors is within noise. UserError where the curve is not one.
    """
    steps = [point["step"] for point in curve]
    if len(curve) < 2 or steps[0] != 0 or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
        raise UserError(f"steps {str(steps)[:80]}: expected a curve, two or more rising steps of which the first is 0")
    has_kl = value(curve[-1], "kl") is not None
    summary = dict.fromkeys(
        ["gold/reference", "gold/peak", "gold/final", "gold/noise", "gold/drop_z", "step/peak", "step/below_reference"]
        + [*_GAPS, *(f"gold/at_{level:g}" for level in levels), "kl/peak", "accuracy/peak"]
    )
    summary |= {"checkpoints": len(curve) - 1, "step/final": steps[-1], "kl/final": value(curve[-1], "kl")}
    summary["kl/max"] = float(column(curve, "kl").max()) if has_kl else None
    summary["accuracy/final"] = value(curve[-1], "rewards/accuracies")
    summary["shift/chosen"] = value(curve[-1], "shift/chosen")
    if all(value(point, "gold") is None for point in curve):
        return summary
    gold = column(curve, "gold")
    reference, peak, final = curve[0], curve[int(gold.argmax())], curve[-1]
    for name, (a, b) in {"drop": (peak, final), "gain": (peak, reference), "final_gain": (final, reference)}.items():
        gap = difference(a, b, "gold")
        summary |= {f"gold/{name}": gap["value"], f"gold/{name}_se": gap["se"]}
    noise = t_quantile(1 - ALPHA / (len(curve) - 1), gap["df"])
    below = [difference(reference, point, "gold") for point in curve]

    def surely(gap: dict) -> bool:
        return gap["se"] is not None and gap["value"] > noise * gap["se"]

    summary |= {
        "gold/reference": float(gold[0]),
        "gold/peak": float(gold.max()),
        "gold/final": float(gold[-1]),
        "gold/noise": noise,
        "gold/drop_z": summary["gold/drop"] / summary["gold/drop_se"] if summary["gold/drop_se"] else None,
        "step/peak": peak["step"],
        "kl/peak": value(peak, "kl"),
        "accuracy/peak": value(peak, "rewards/accuracies"),
        "step/below_reference": next((step for step, gap in zip(steps, below, strict=True) if surely(gap)), None),
    }
    return summary | ({f"gold/at_{level:g}": gold_at(curve, level) for level in levels} if has_kl else {})


# ---- in words


def kind(summary: dict) -> str:
    """overoptimised | none | under-optimised | unclear, of one run. All of the conditions, in this order:

    unclear          no gold reward, or no standard error of it
    overoptimised    the drop is beyond noise and at least SLIGHT of the gain over the reference
    none             the gain is beyond noise, and drop + noise is below LARGE of it
    under-optimised  neither is beyond noise, and KL never passed STAYED
    unclear          anything else
    """
    if summary["gold/drop"] is None or None in (summary["gold/drop_se"], summary["gold/gain_se"]):
        return "unclear"
    drop, gain, noise = summary["gold/drop"], summary["gold/gain"], summary["gold/noise"]
    if drop > noise * summary["gold/drop_se"] and drop >= SLIGHT * gain:
        return "overoptimised"
    if gain > noise * summary["gold/gain_se"]:
        return "none" if drop + noise * summary["gold/drop_se"] < LARGE * gain else "unclear"
    stayed = summary["kl/max"] is not None and summary["kl/max"] <= STAYED
    return "under-optimised" if stayed else "unclear"


def _beside(summary: dict) -> str:
    """What held-out pairs show meanwhile, as the end of a sentence."""
    parts = []
    before, after, shift = (summary[key] for key in ("accuracy/peak", "accuracy/final", "shift/chosen"))
    if None not in (before, after) and 0 < summary["step/peak"] < summary["step/final"]:
        parts.append(f"held-out accuracy moved by {significant(after - before, 2)}")
    if shift is not None:
        parts.append(f"chosen log-probs {'fell' if shift < 0 else 'rose'} {significant(abs(shift))} nats")
    return f", while {' and '.join(parts)}" if parts else ""


def cut(curves: Sequence[Sequence[dict]], max_new_tokens: int) -> str | None:
    """One sentence where fewer than ENDED of the answers of a checkpoint ended of themselves; the worst of all curves."""
    shares = [(value(point, "samples/ended"), point["step"]) for curve in curves for point in curve]
    share, step = min((each for each in shares if each[0] is not None), default=(1.0, 0))
    if share >= ENDED:
        return None
    of_gold = "; gold is of cut answers" if any("gold" in point["metrics"] for point in curves[0]) else ""
    return f"up to {1 - share:.0%} of the answers (step {step}) were cut at {max_new_tokens} tokens{of_gold}"


def _drop(summary: dict, drop: str, end: str) -> str:
    """`drop` with where it started and where it led: `end`, how far from the reference, with its error."""
    if summary["step/peak"] == 0:
        return f"gold fell {drop} from the reference, which no checkpoint was above"
    at = f"at step {significant(summary['step/peak'])}"
    at += "" if summary["kl/peak"] is None else f" (KL {significant(summary['kl/peak'])} nats)"
    over, margin = (summary["gold/final_gain"], summary["gold/noise"] * (summary["gold/final_gain_se"] or 0))
    level = f"{'and is still' if over > margin else 'to'} {end} {'above' if over >= 0 else 'below'} the reference"
    if summary["gold/gain"] <= summary["gold/noise"] * (summary["gold/gain_se"] or 0):
        return f"gold never rose beyond noise, and fell {drop} from its highest {at} {level}"
    return f"gold fell {drop} from its peak {at} {level}"


def _constant(summary: dict) -> bool:
    """Whether gold did not move at all, on any prompt: noise of training or sampling would have shown."""
    return summary["step/below_reference"] is None and all(summary[entry] == 0 for entry in _GAPS)


def verdict(summary: dict) -> str:
    """One plain sentence on one run, from `summarise`; `kind` has the conditions."""
    what, kl = kind(summary), summary["kl/max"]
    if summary["gold/drop"] is None:
        return "Inconclusive: no gold reward was measured."
    if summary["gold/drop_se"] is None or summary["gold/gain_se"] is None:
        return "Inconclusive: gold has no standard error; sample more prompts."
    drop, gain, end = (
        f"{significant(abs(summary[f'gold/{name}']))} +- {significant(summary[f'gold/{name}_se'], 2)}"
        for name in ("drop", "gain", "final_gain")
    )
    bound = summary["gold/drop"] + summary["gold/noise"] * summary["gold/drop_se"]
    match what:
        case "overoptimised":
            return f"Overoptimised: {_drop(summary, drop, end)}{_beside(summary)}."
        case "none":
            fell = "is at its highest at the end"
            if summary["step/peak"] != summary["step/final"]:
                fell = f"fell {drop} from its peak; over {significant(bound)} is ruled out"
            return f"No overoptimisation seen: gold ended {end} above the reference and {fell}{_beside(summary)}."
        case "under-optimised":
            return f"Under-optimised: the policy never left the reference (KL at most {significant(kl)} nats), nor did gold."
    if _constant(summary):
        return "Inconclusive: gold is the same for every answer to a prompt."
    if summary["gold/gain"] > summary["gold/noise"] * summary["gold/gain_se"]:
        return f"Inconclusive: gold rose {gain}; its drop of {drop} is within noise, which allows {significant(bound)}."
    return f"Inconclusive: gold neither rose ({gain}) nor fell ({drop}) beyond noise; sample more prompts."


def group_kind(kinds: Sequence[str]) -> str:
    """The kind of runs that differ in their seeds alone: that of more than half of them, else unclear.

    Where any seed is overoptimised and not more than half are, it is "overoptimised in some seeds", never none.
    """
    (most, count), *_ = Counter(kinds).most_common()
    if "overoptimised" in kinds and (most != "overoptimised" or 2 * count <= len(kinds)):
        return SOME
    return most if 2 * count > len(kinds) else "unclear"


def group_verdict(summaries: Sequence[dict]) -> str:
    """One plain sentence on runs that differ in their seeds alone, by `group_kind`: what they are, and means over them.

    Each seed is judged by itself, so that a group is no surer than its runs; with one seed it is `verdict`.
    """
    if len(summaries) == 1:
        return verdict(summaries[0])
    words = {"overoptimised": "Overoptimised", "none": "No overoptimisation seen"}
    words |= {"under-optimised": "Under-optimised", "unclear": "Inconclusive"}
    counts, seeds = Counter(map(kind, summaries)), len(summaries)
    agreed = group_kind(list(counts.elements()))
    lead = "overoptimised" if agreed == SOME else agreed
    first, *others = sorted(counts, key=lambda each: (each != lead, -counts[each]))
    head = f"{words[first]} in {counts[first]} of {seeds} seeds"
    head += "".join(f", {words[other].lower()} in {counts[other]}" for other in others)
    if first != lead:  # no two of them agree
        head = f"{words[lead]}, {head[0].lower()}{head[1:]}"
    shared = [key for key in summaries[0] if all(summary[key] is not None for summary in summaries)]
    means = dict.fromkeys(summaries[0]) | {key: mean(summary[key] for summary in summaries) for key in shared}
    if means["gold/drop"] is None:
        return f"{head}: not every seed has a gold reward."

    def over_seeds(entry: str) -> str:
        sd = stdev(summary[entry] for summary in summaries)
        return f"{significant(abs(means[entry]))} (sd {significant(sd, 2)})"

    drop, over = over_seeds("gold/drop"), means["gold/final_gain"]
    if agreed == "overoptimised":
        what = _drop(means, drop, over_seeds("gold/final_gain")).replace("at step", "near step")
    elif all(map(_constant, summaries)):
        what = "gold is the same for every answer to a prompt"
    else:
        side = "above" if over >= 0 else "below"
        what = f"gold ended {significant(abs(over))} {side} the reference and {drop} below its peak"
    return f"{head}: {what}{_beside(means)}."
