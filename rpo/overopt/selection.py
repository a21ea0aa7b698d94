"""Which checkpoint of a run to keep: those within limits, and among them the earliest that is as good as the best.

A curve is what `overopt` says it is. Its step 0, the reference, is compared with and never chosen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rpo.errors import UserError
from rpo.overopt.curve import column, difference


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

    def __post_init__(self) -> None:
        for name, high in (("max_kl", math.inf), ("max_displacement", 1), ("min_ended", 1)):
            limit = getattr(self, name)
            if limit is not None and not 0 <= limit <= high:
                wanted = "a share in 0..1" if high == 1 else "0 nats or more"
                raise UserError(f"{name}={limit}: expected {wanted}, or null")
        if self.entropy_falls is not None and self.entropy_falls < 1:
            raise UserError(f"entropy_falls={self.entropy_falls}: expected 1 or more evaluations, or null")


def violations(curve: Sequence[dict], limits: Limits) -> list[list[str]]:
    """For each point of the curve what it violates, in words ("kl 5.1 > 4"). UserError where a limit's metric is missing."""
    found = [[] for _ in curve]
    for limit, name, sign in (
        (limits.max_kl, "kl", ">"),
        (limits.max_displacement, "displacement_rate", ">"),
        (limits.min_ended, "samples/ended", "<"),
    ):
        if limit is not None:
            for failed, measured in zip(found, column(curve, name), strict=True):
                if measured > limit if sign == ">" else measured < limit:
                    failed.append(f"{name} {measured:.4g} {sign} {limit:g}")
    if limits.entropy_falls is not None:
        entropy, falls = column(curve, "entropy/top10"), 0
        for i in range(1, len(curve)):
            falls = falls + 1 if entropy[i] < entropy[i - 1] else 0
            if falls >= limits.entropy_falls:
                found[i].append(f"entropy/top10 fell {falls} times in a row")
    return found


def select(curve: Sequence[dict], limits: Limits, *, score: str | None = None, direction: str = "max") -> dict:
    """{"step", "reason", "over_reference", "over_reference_se", "checkpoints"}: the checkpoint to keep, and why.

    With a `score` the one-standard-error rule: the earliest feasible checkpoint whose score is within one standard
    error, paired where the curve has `clusters`, of the best feasible one's. over_reference is how much better than
    the reference the chosen one is; the best of many is flattered by the choice, so report scores of other prompts.
    Without one (no labels at all) the last checkpoint before the first that violates a limit. `checkpoints` has for
    each {"step", "score", "failed"}. UserError where nothing is feasible, or a metric or its error is missing.
    """
    if direction not in ("max", "min"):
        raise UserError(f"direction={direction}: expected max or min")
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
        mend = [f"raise task.{key}" for key, word in words.items() if any(f.startswith(word) for f in failed[1])]
        mend += ["lower task.min_ended"] * any(f.startswith("samples/ended ") for f in failed[1])
        raise UserError(
            f"no checkpoint is feasible: step {curve[1]['step']} has {', '.join(failed[1])}; {', '.join(mend)}"
        )
    if score is None:
        why = "the last checkpoint: none fails"
        if first < len(curve):
            why = f"the last checkpoint before the first that fails: step {curve[first]['step']} has {', '.join(failed[first])}"
        return _chosen(curve, feasible[-1], rows, why)

    sign = 1 if direction == "max" else -1
    best = max(feasible, key=lambda i: sign * scores[i])
    for i in feasible:
        gap = _gap(curve[best], curve[i], score)
        if sign * gap["value"] <= gap["se"]:
            break
    near = f"the best feasible {score}, {scores[best]:.4g}"
    if i != best:
        near = f"the earliest within one standard error ({gap['se']:.2g}) of {near}, at step {curve[best]['step']}"
    gain = _gap(curve[i], curve[0], score)
    over = sign * gain["value"]
    if over <= gain["se"]:
        near += f"; no better than the reference ({over:.3g} +- {gain['se']:.2g})"
    return _chosen(curve, i, rows, near) | {"over_reference": over, "over_reference_se": gain["se"]}


def _gap(a: dict, b: dict, score: str) -> dict:
    gap = difference(a, b, score)
    if gap["se"] is None:
        steps = f"steps {a['step']} and {b['step']}"
        raise UserError(
            f"score={score}: {steps} differ by no known standard error, which the rule needs; use more prompts"
        )
    return gap


def _chosen(curve: Sequence[dict], i: int, rows: list[dict], reason: str) -> dict:
    facts = {"over_reference": None, "over_reference_se": None, "checkpoints": rows}
    return {"step": curve[i]["step"], "reason": reason} | facts
