"""A Verdict on runs that differ in their seeds alone, by stated rules: overoptimised, a sign of it, or inconclusive.

A logged curve is a list of evaluations in the order of steps,
{"step": 50, "rewards/accuracies": .6, ...}, as metrics.jsonl has them: means without error bars. A summary is
`curve.summarise` of a run, as task=overopt leaves it: gold with paired errors.

Letters: S seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from rpo.overopt import curve as overopt_curve
from rpo.text import sentence, significant

# Signs of trouble, each from the final evaluation, a mean over seeds. They are what docs/METRICS.md calls bad values.
FELL = 20.0  # nats that chosen log-probs may fall
FELL_PER_TOKEN = 0.3  # and nats per token
DISPLACED = 0.95  # share of held-out pairs whose chosen answer lost log-prob
FAR = 20.0  # nats of KL to the reference
NO_INFORMATION = math.log(2)  # -log sigmoid of a margin of 0

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
    last = _last(curves, summaries)
    if not last:
        return Verdict("not measured", "No evaluation was recorded; set eval_every and data.eval.", [])
    notes, trouble = _missing(last, bool(summaries)), signs(last, sigmoid=sigmoid)
    facts, kind, says = sentence(_facts(curves, last, pairs)), None, ""
    if any(summary["gold/drop"] is not None for summary in summaries):
        kind = overopt_curve.group_kind([overopt_curve.kind(summary) for summary in summaries])
        says = overopt_curve.group_verdict(summaries)
        says += f" KL at the end {significant(last['kl'])} nats." if "kl" in last else ""
    elif (logged := over_seeds(curves)) is not None:
        kind, says = overopt_curve.kind(logged), overopt_curve.verdict(logged)
        says = f"{says} By the runs' own samples, with errors over {len(curves)} seeds. {facts}".strip()
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


def over_seeds(curves: Sequence[Sequence[dict]]) -> dict | None:
    """`curve.summarise` of the mean of logged gold over seeds, its clusters: errors are sd / sqrt(S), noise is by t_(S-1).

    Over the steps that all seeds have, with the largest KL of the seeds. None for fewer than two seeds, or three steps of
    which the first is 0.
    """
    with_gold = [{point["step"]: point for point in curve if "gold" in point} for curve in curves]
    steps = sorted(set.intersection(*map(set, with_gold))) if curves else []
    if len(curves) < 2 or len(steps) < 3 or steps[0] != 0:
        return None
    mean_curve = []
    has_kl = all("kl" in points[step] for points in with_gold for step in steps)
    for step in steps:
        gold_S = [points[step]["gold"] for points in with_gold]
        metrics = {"gold": {"value": mean(gold_S)}}
        metrics |= {"kl": {"value": max(points[step]["kl"] for points in with_gold)}} if has_kl else {}
        clusters = {"gold": {"mean": gold_S, "size": [1] * len(gold_S)}}
        mean_curve.append({"step": step, "metrics": metrics, "clusters": clusters})
    return overopt_curve.summarise(mean_curve)


# ---- in words


def beside(kind: str, says: str) -> str:
    """The sentence without its verdict, where it begins with that: to stand beside it."""
    rest = says[len(kind) :].lstrip(" ,:;")
    return f"{rest[0].upper()}{rest[1:]}" if rest and says.lower().startswith(kind) else says


def _last(curves: Sequence[Sequence[dict]], summaries: Sequence[dict]) -> dict[str, float]:
    """The final evaluation, a mean over the seeds of what every seed has; by task=overopt, of more samples, where it measured."""
    ends = [{k: v for k, v in curve[-1].items() if k not in ("step", "pairs", "time")} for curve in curves]
    names = {"kl": "kl/final", "shift/chosen": "shift/chosen", "rewards/accuracies": "accuracy/final"}
    measured = [{k: s[theirs] for k, theirs in names.items() if s[theirs] is not None} for s in summaries]
    last: dict[str, float] = {}
    for seeds in (ends, measured):
        shared = set.intersection(*map(set, seeds)) if seeds else set()
        last |= {name: mean(seed[name] for seed in seeds) for name in sorted(shared)}
    return last


def _facts(curves: Sequence[Sequence[dict]], last: dict[str, float], pairs: int | None) -> list[str]:
    facts = []
    if "shift/chosen" in last:
        shift = last["shift/chosen"]
        way = f"fell {significant(-shift)} nats below" if shift < 0 else f"rose {significant(shift)} nats above"
        facts.append(f"chosen log-probs {way} the reference" if shift else "chosen log-probs are the reference's")
    if "displacement_rate" in last:
        facts.append(f"{last['displacement_rate']:.0%} of the held-out pairs are displaced")
    if "rewards/accuracies" in last:
        facts.append(f"held-out accuracy {last['rewards/accuracies']:.3f}{_moved(curves, pairs)}")
    if "kl" in last:
        facts.append(f"KL {significant(last['kl'])} nats")
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


def _unjudged_gold(curves: Sequence[Sequence[dict]]) -> str:
    """Gold in the log of one seed, stated and not judged."""
    gold = [(point["gold"], point["step"]) for point in curves[0] if "gold" in point]
    if not gold:
        return "Gold was logged by some runs alone, and is not judged."
    high, step = max(gold)
    path = f"{significant(gold[0][0])} at step {gold[0][1]}, at most {significant(high)} (step {step}), {significant(gold[-1][0])} at the end"
    return f"Gold of the run's own samples has no error bars and is not judged: {path}. Use task=overopt or more seeds."


def _missing(last: dict[str, float], studied: bool) -> list[str]:
    named = {
        "the quality of answers (gold, a judge, a benchmark)": studied or "gold" in last,
        "KL to the reference": "kl" in last,
        "held-out pairs": "shift/chosen" in last,
    }
    absent = [name for name, measured in named.items() if not measured]
    return [f"Not measured: {'; '.join(absent)}."] if absent else []
