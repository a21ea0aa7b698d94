"""A Verdict on runs that differ in their seeds alone, by stated rules: overoptimised, a sign of it, or inconclusive.

A logged curve is a list of evaluations in the order of steps,
{"step": 50, "rewards/accuracies": .6, ...}, as metrics.jsonl has them: means without error bars. A summary is
`overopt.summarise` of a run, as task=overopt leaves it: gold with paired errors.

Letters: S seeds, C evaluations that all seeds have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from rpo.overopt import curve as overopt_curve
from rpo.reporting.text import sentence
from rpo.stats import t_quantile

# Signs of trouble, each from the final evaluation, a mean over seeds. They are what docs/METRICS.md calls bad values.
FELL = 20.0  # nats that chosen log-probs may fall
FELL_PER_TOKEN = 0.3  # and nats per token
DISPLACED = 0.95  # share of held-out pairs whose chosen answer lost log-prob
FAR = 20.0  # nats of KL to the reference
NO_INFORMATION = math.log(2)  # -log sigmoid of a margin of 0

RULES = (
    "Overoptimised: gold fell from its peak beyond noise, and by at least "
    f"{overopt_curve.SLIGHT:.0%} of what it had gained. No overoptimisation seen: its gain is beyond noise, and noise leaves no room "
    f"for a drop of {overopt_curve.LARGE:.0%} of it. Under-optimised: neither, and KL never exceeded {overopt_curve.STAYED:g} nats. Anything "
    "else: inconclusive.",
    "Noise, where task=overopt measured gold: the standard error paired by prompt, times the number that the largest of all "
    "comparisons between checkpoints exceeds with a chance of 5% while nothing changes (Bonferroni, Student's t). Each seed is "
    f"judged by itself; a group has the verdict of more than half of its seeds, {overopt_curve.SOME} where others are more and any is, "
    "else inconclusive.",
    "Noise, where gold is only in the runs' own logs: the standard error over seeds, times that number. One seed decides "
    "nothing.",
    "Where gold decides nothing, there are signs, from the last evaluation of held-out pairs and samples: chosen log-probs "
    f"more than {FELL:g} nats or {FELL_PER_TOKEN:g} nats per token below the reference; over {DISPLACED:.0%} of the pairs "
    f"displaced; KL above {FAR:g} nats; held-out loss above ln 2 although most pairs are ranked correctly (overconfident); fewer "
    f"than {overopt_curve.ENDED:.0%} of the answers ended. A sign is not a verdict: it says where to look.",
    "Accuracy and margin decide nothing: they stay flat through a collapse.",
    "Every judgment has a chance of up to 5% of a false alarm, corrected neither for the number of seeds of a group nor for the "
    "number of groups: of 20 runs one may be called overoptimised by chance.",
)
# Tone of each verdict; the page adds a shape, so that colour is not the only carrier.
_TONES = {
    "overoptimised": "bad",
    overopt_curve.SOME: "doubt",
    "no overoptimisation seen": "good",
    "under-optimised": "news",
    "signs of overoptimisation": "doubt",
    "no sign in what was measured": "news",
    "inconclusive": "unknown",
    "not measured": "unknown",
    "no run finished": "bad",
}
_KIND_OF = {"none": "no overoptimisation seen", "unclear": "inconclusive"}


@dataclass(frozen=True)
class Verdict:
    kind: str  # one of _TONES
    says: str
    notes: list[str]

    @property
    def tone(self) -> str:
        return _TONES[self.kind]


def judge(
    curves: Sequence[Sequence[dict]], summaries: Sequence[dict], *, pairs: int | None = None, sigmoid: bool = True
) -> Verdict:
    """The verdict on runs that differ in seeds alone, from their logged `curves` and the `summaries` of task=overopt.

    `pairs`: how many held-out pairs the log's accuracy is of; `sigmoid`: whether ln 2 is the loss of no information.
    """
    curves = [curve for curve in curves if curve]
    last = _last(curves) | _of_summaries(summaries)
    if not last:
        return Verdict("not measured", "No evaluation was recorded; set eval_every and data.eval.", [])
    notes, trouble = _missing(last, bool(summaries)), signs(last, sigmoid=sigmoid)
    facts, kind, says = sentence(_facts(curves, last, pairs)), None, ""
    if any(summary["gold/drop"] is not None for summary in summaries):
        kind = overopt_curve.group_kind([overopt_curve.kind(summary) for summary in summaries])
        says = overopt_curve.group_verdict(summaries)
        says += f" KL at the end {_number(last['kl'])} nats." if "kl" in last else ""
    elif (logged := spread(curves)) is not None:
        kind, says = overopt_curve.kind(logged), f"{_of_logged_gold(logged, len(curves))} {facts}".strip()
    elif "gold" in last:
        notes = [_unjudged_gold(curves), *notes]
    if kind is not None and (kind != "unclear" or not trouble):
        return Verdict(_KIND_OF.get(kind, kind), says, notes)
    if trouble:
        return Verdict("signs of overoptimisation", f"{says or facts} {sentence(trouble)}".strip(), notes)
    if not last.keys() & {"shift/chosen", "kl", "displacement_rate"}:
        return Verdict("not measured", f"{facts} No metric says how far the policy moved.".strip(), notes)
    return Verdict("no sign in what was measured", facts, notes)


def signs(last: dict[str, float], *, sigmoid: bool = True) -> list[str]:
    """Phrases on what of the final evaluation is out of bounds, by the thresholds above; [] where nothing is."""

    def below(name: str, limit: float) -> bool:
        return name in last and last[name] < limit

    trouble = []
    if below("shift/chosen", -FELL) or below("shift_per_token/chosen", -FELL_PER_TOKEN):
        trouble.append("chosen answers became far less likely than under the reference")
    if last.get("displacement_rate", 0) > DISPLACED:
        trouble.append("nearly all chosen answers lost log-prob")
    if last.get("kl", 0) > FAR:
        trouble.append("the policy is far from the data that it was trained on")
    if sigmoid and last.get("loss/preference", 0) > NO_INFORMATION and last.get("rewards/accuracies", 0) > 0.5:
        trouble.append(f"held-out loss {last['loss/preference']:.3f} is above ln 2: overconfident rankings")
    if below("samples/ended", overopt_curve.ENDED):
        trouble.append(f"{1 - last['samples/ended']:.0%} of the answers did not end")
    return trouble


def spread(curves: Sequence[Sequence[dict]]) -> dict | None:
    """Drop and gain of logged gold with errors over seeds, in the form that `overopt.kind` reads; None where they cannot be computed.

        drop_s = gold_s[p] - gold_s[C],  gain_s = gold_s[p] - gold_s[0],  p = argmax of the seeds' mean gold

    over the steps that all seeds have; se = sd / sqrt(S). The peak is the highest of several noisy means; for that a drop is
    beyond noise above t_(S-1, 1 - 5% / (C-1)) errors alone (Bonferroni), as in `overopt.summarise`. Needs two seeds,
    and a step between the first and the last.
    """
    steps = sorted(set.intersection(*({p["step"] for p in curve if "gold" in p} for curve in curves))) if curves else []
    if len(curves) < 2 or len(steps) < 3:
        return None
    gold_SC = np.array([[{p["step"]: p for p in curve}[step]["gold"] for step in steps] for curve in curves])
    peak = int(gold_SC.mean(0).argmax())
    noise = t_quantile(1 - overopt_curve.ALPHA / (len(steps) - 1), len(curves) - 1)
    summary = {"gold/noise": noise, "step/final": steps[-1], "step/peak": steps[peak]}
    for name, value_S in {"drop": gold_SC[:, peak] - gold_SC[:, -1], "gain": gold_SC[:, peak] - gold_SC[:, 0]}.items():
        summary[f"gold/{name}"] = float(value_S.mean())
        summary[f"gold/{name}_se"] = float(value_S.std(ddof=1) / math.sqrt(len(curves)))
    kl = [point["kl"] for curve in curves for point in curve if "kl" in point]
    return summary | {"kl/max": max(kl, default=None), "gold/final": float(gold_SC[:, -1].mean())}


# ---- in words


def beside(kind: str, says: str) -> str:
    """The sentence without its verdict, where it begins with that: to stand beside it."""
    rest = says[len(kind) :].lstrip(" ,:;")
    return f"{rest[0].upper()}{rest[1:]}" if rest and says.lower().startswith(kind) else says


def _number(x: float, digits: int = 3) -> str:
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.{digits}g}"


def _last(curves: Sequence[Sequence[dict]]) -> dict[str, float]:
    """The final evaluation, a mean over the seeds; what every seed has."""
    if not curves:
        return {}
    shared = set.intersection(*(set(curve[-1]) for curve in curves)) - {"step", "pairs", "time"}
    return {name: mean(curve[-1][name] for curve in curves) for name in sorted(shared)}


def _of_summaries(summaries: Sequence[dict]) -> dict[str, float]:
    """The same where task=overopt measured it, from more samples and with its errors."""
    names = {"kl/final": "kl", "shift/chosen": "shift/chosen", "accuracy/final": "rewards/accuracies"}
    known = {theirs: [summary.get(theirs) for summary in summaries] for theirs in names} if summaries else {}
    return {names[theirs]: mean(values) for theirs, values in known.items() if None not in values}


def _facts(curves: Sequence[Sequence[dict]], last: dict[str, float], pairs: int | None) -> list[str]:
    facts = []
    if "shift/chosen" in last:
        shift = last["shift/chosen"]
        way = f"fell {_number(-shift)} nats below" if shift < 0 else f"rose {_number(shift)} nats above"
        facts.append(f"chosen log-probs {way} the reference" if shift else "chosen log-probs are the reference's")
    if "displacement_rate" in last:
        facts.append(f"{last['displacement_rate']:.0%} of the held-out pairs are displaced")
    if "rewards/accuracies" in last:
        facts.append(f"held-out accuracy {last['rewards/accuracies']:.3f}{_moved(curves, pairs)}")
    if "kl" in last:
        facts.append(f"KL {_number(last['kl'])} nats")
    return facts


def _moved(curves: Sequence[Sequence[dict]], pairs: int | None) -> str:
    """How accuracy moved after the first evaluation of a trained policy, and what of that could be noise."""
    inner = [[p for p in curve if p["step"] > 0 and "rewards/accuracies" in p] for curve in curves]
    noise = f"{1.96 * math.sqrt(0.5 / pairs):.2g}" if pairs else None
    if not inner or any(len(points) < 2 for points in inner) or len({points[0]["step"] for points in inner}) > 1:
        return "" if noise is None else f" on {pairs:,} pairs"
    change = mean(points[-1]["rewards/accuracies"] - points[0]["rewards/accuracies"] for points in inner)
    moved = f", moved by {change:+.2g} since step {inner[0][0]['step']}"
    return moved if noise is None else f"{moved} (on {pairs:,} pairs, under {noise} may be noise)"


def _of_logged_gold(logged: dict, seeds: int) -> str:
    drop, se, end = logged["gold/drop"], logged["gold/drop_se"], _number(logged["gold/final"])
    if logged["step/peak"] == logged["step/final"]:
        return f"Gold of the runs' own samples is at its highest at the end, {end} ({seeds} seeds)."
    return (
        f"Gold of the runs' own samples fell {_number(drop)} +- {_number(se, 2)} ({seeds} seeds) from its peak at step "
        f"{logged['step/peak']} to {end}; up to {_number(logged['gold/noise'], 2)} such errors may be noise."
    )


def _unjudged_gold(curves: Sequence[Sequence[dict]]) -> str:
    """Gold in the log of one seed, stated and not judged."""
    gold = [(point["gold"], point["step"]) for point in curves[0] if "gold" in point]
    if not gold:
        return "Gold was logged by some runs alone, and is not judged."
    high, step = max(gold)
    path = f"{_number(gold[0][0])} at step {gold[0][1]}, at most {_number(high)} (step {step}), {_number(gold[-1][0])} at the end"
    return f"Gold of the run's own samples has no error bars and is not judged: {path}. Use task=overopt or more seeds."


def _missing(last: dict[str, float], studied: bool) -> list[str]:
    absent = []
    if not studied and "gold" not in last:
        absent.append("the quality of answers (gold, a judge, a benchmark)")
    if "kl" not in last:
        absent.append("KL to the reference")
    if "shift/chosen" not in last:
        absent.append("held-out pairs")
    return [f"Not measured: {'; '.join(absent)}."] if absent else []
