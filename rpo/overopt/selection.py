"""Which checkpoint of a run to keep: those within limits, and among them the earliest that is as good as the best.

A curve is what `curve` says it is. Its step 0, the reference, is compared with and never chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rpo.errors import UserError
from rpo.evals import results
from rpo.overopt.curve import column, difference
from rpo.stats import clustered_mean

LEAST = 4  # prompts in a half: fewer have no standard error to speak of


@dataclass(frozen=True)
class Limits:
    """What a checkpoint has to keep to; None turns a limit off.

    max_kl: nats to the reference. entropy_falls: so many evaluations in a row, the checkpoint's the last, at each of
    which `entropy/top10` was below the one before (the first sign of overoptimisation in arXiv 2410.11677).
    max_displacement: share of held-out pairs whose chosen response fell. min_ended: share of samples that ended of
    themselves, and were not cut.
    """

    max_kl: float | None
    entropy_falls: int | None
    max_displacement: float | None
    min_ended: float | None


def violations(curve: Sequence[dict], limits: Limits) -> list[list[str]]:
    """For each point of the curve what it violates, in words ("kl 5.1 > 4"). UserError where a limit's metric is missing."""
    failed = [[] for _ in curve]
    most = {"kl": limits.max_kl, "displacement_rate": limits.max_displacement}
    for name, limit in (most | {"samples/ended": limits.min_ended}).items():
        sign, side = (">", 1) if name in most else ("<", -1)
        for reasons, measured in zip(failed, column(curve, name), strict=True) if limit is not None else ():
            if side * measured > side * limit:
                reasons.append(f"{name} {measured:.4g} {sign} {limit:g}")
    if limits.entropy_falls is not None:
        entropy, falls = column(curve, "entropy/top10"), 0
        for i in range(1, len(curve)):
            falls = falls + 1 if entropy[i] < entropy[i - 1] else 0
            if falls >= limits.entropy_falls:
                failed[i].append(f"entropy/top10 fell {falls} times in a row")
    return failed


def select(curve: Sequence[dict], limits: Limits, *, score: str | None = None, direction: str = "max") -> dict:
    """{"step", "reason", "over_reference", "over_reference_se", "checkpoints"}: the checkpoint to keep, and why.

    With a `score` the one-standard-error rule: the earliest feasible checkpoint whose score is within one standard
    error, paired where the curve has `clusters`, of the best feasible one's. over_reference is how much better than
    the reference the chosen one is; the best of many is flattered by the choice, so report scores of other prompts.
    Without one (no labels at all) the last checkpoint before the first that violates a limit. `checkpoints` has for
    each {"step", "score", "failed"}. UserError where nothing is feasible, or a metric or its error is missing.
    """
    if len(curve) < 2 or curve[0]["step"] != 0:
        raise UserError(f"steps {[p['step'] for p in curve]}: expected step 0 and at least one checkpoint")
    failed = violations(curve, limits)
    scores = [None] * len(curve) if score is None else column(curve, score).tolist()
    rows = [{"step": p["step"], "score": s, "failed": f} for p, s, f in zip(curve, scores, failed, strict=True)]
    feasible = [i for i in range(1, len(curve)) if not failed[i]]
    if score is None:
        first = next((i for i in range(1, len(curve)) if failed[i]), len(curve))
        feasible = [i for i in feasible if i < first]
    if not feasible:
        words = {"max_kl": "kl ", "max_displacement": "displacement_rate ", "entropy_falls": "entropy/top10 "}
        fixes = [f"raise task.{key}" for key, word in words.items() if any(f.startswith(word) for f in failed[1])]
        fixes += ["lower task.min_ended"] * any(f.startswith("samples/ended ") for f in failed[1])
        reasons = ", ".join(failed[1])
        raise UserError(f"no checkpoint is feasible: step {curve[1]['step']} has {reasons}; {', '.join(fixes)}")
    chosen = {"step": None, "reason": "", "over_reference": None, "over_reference_se": None, "checkpoints": rows}
    if score is None:
        why = "the last checkpoint: none fails"
        if first < len(curve):
            why = f"the last checkpoint before the first that fails: step {curve[first]['step']} has {', '.join(failed[first])}"
        return chosen | {"step": curve[feasible[-1]]["step"], "reason": why}

    sign = 1 if direction == "max" else -1
    best = max(feasible, key=lambda i: sign * scores[i])
    for i in feasible:
        gap = _gap(curve[best], curve[i], score)
        if sign * gap["value"] <= gap["se"]:
            break
    why = f"the best feasible {score}, {scores[best]:.4g}"
    if i != best:
        why = f"the earliest within one standard error ({gap['se']:.2g}) of {why}, at step {curve[best]['step']}"
    gain = _gap(curve[i], curve[0], score)
    over = sign * gain["value"]
    if over <= gain["se"]:
        why += f"; no better than the reference ({over:.3g} +- {gain['se']:.2g})"
    chosen |= {"step": curve[i]["step"], "reason": why}
    return chosen | {"over_reference": over, "over_reference_se": gain["se"]}


def _gap(a: dict, b: dict, score: str) -> dict:
    gap = difference(a, b, score)
    if gap["se"] is None:
        steps = f"steps {a['step']} and {b['step']}"
        raise UserError(f"score={score}: {steps} differ by no known standard error; use more prompts")
    return gap


# ---- of runs


def read(folder: str) -> list[dict]:
    """The runs of an evaluation by task=overopt. Raises UserError where `folder` holds none."""
    evaluation = results.read(folder)
    if evaluation.task != "overopt":
        raise UserError(f"task.results={folder}: is of task={evaluation.task}; give an evaluation by task=overopt")
    return evaluation.details["runs"]


def choose(runs: Sequence[dict], limits: Limits, *, score: str, split: bool) -> list[dict]:
    """For each run {"run", "label", "chosen", "label_free"}: by `score` (max:METRIC or min:METRIC), and by the limits alone.

    `chosen` is `select` with the checkpoint's folder, or {"step": null, "reason"} where nothing is feasible. With `split`
    its score is of one half of the prompts, by hash, and "report" has the other half's: gold there, and its difference
    from the reference's, which the choice does not flatter. Raises UserError where the score was not measured.
    """
    direction, _, name = score.partition(":")
    chosen = []
    for run in runs:
        names = sorted({metric for point in run["curve"] for metric in point["metrics"]})
        if name not in names:
            raise UserError(f"task.score={score}: {run['run']} has no {name}; there are {', '.join(names)}")
        curve, reported = run["curve"], None
        if split:
            curve, reported = (part_of(run["curve"], half) for half in halves(run["prompts"]))
        best = _selected(run, curve, limits, score=name, direction=direction)
        if reported is not None and best["step"] is not None:
            point = next(point for point in reported if point["step"] == best["step"])
            over = difference(point, reported[0], "gold")
            best["report"] = {"gold": point["metrics"]["gold"], "over_reference": over}
        label_free = _selected(run, run["curve"], limits)
        chosen.append({"run": run["run"], "label": run["label"], "chosen": best, "label_free": label_free})
    return chosen


def _selected(
    run: dict, curve: Sequence[dict], limits: Limits, *, score: str | None = None, direction: str = "max"
) -> dict:
    try:
        chosen = select(curve, limits, score=score, direction=direction)
    except UserError as error:
        if not str(error).startswith("no checkpoint is feasible"):
            raise UserError(f"{run['run']}: {error}") from None
        return {"step": None, "checkpoint": None, "reason": str(error)}
    return chosen | {"checkpoint": f"{run['run']}/checkpoints/step_{chosen['step']:08d}"}


def halves(prompts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of the prompts to select on and of those to report on, by the order of their digests: a function of the set.

    Raises UserError where a half would have fewer than LEAST.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    if len(order) < 2 * LEAST:
        raise UserError(f"task.split=true: {len(order)} prompts; two halves need {2 * LEAST}: set task.split=false")
    return sorted(order[::2]), sorted(order[1::2])


def part_of(curve: Sequence[dict], prompts: Sequence[int]) -> list[dict]:
    """The curve with gold of these prompts alone; what else there is stays of all."""
    part = []
    for point in curve:
        whole = point["clusters"]["gold"]
        mean_G, size_G = (np.asarray(whole[name], dtype=np.float64)[list(prompts)] for name in ("mean", "size"))
        gold = clustered_mean(mean_G * size_G, np.arange(len(mean_G)), size_G)
        clusters = {"gold": {"mean": mean_G.tolist(), "size": size_G.tolist()}}
        part.append(point | {"metrics": point["metrics"] | {"gold": gold}, "clusters": clusters})
    return part


def lines(chosen: Sequence[dict], score: str, *, limited: bool) -> str:
    """For each run the step that either rule takes, why, and its folder; the second rule where there is a limit."""
    shown = []
    for run in chosen:
        best, report = run["chosen"], ""
        if "report" in best:
            gold, over = best["report"]["gold"], best["report"]["over_reference"]
            report = f"; on the other half of the prompts gold {gold['value']:.3g}"
            report += f", {over['value']:+.2g} +- {over['se']:.2g} over the reference"
        shown.append(f"{run['run']} ({run['label']})")
        rules = {score: best} | ({"limits alone": run["label_free"]} if limited else {})
        for name, taken in rules.items():
            step = "" if taken["step"] is None else f"step {taken['step']}, "
            shown.append(f"  {name}: {step}{taken['reason']}{report if taken is best else ''}")
            shown += [f"    {taken['checkpoint']}"] * (taken["step"] is not None)
    return "\n".join(shown)
