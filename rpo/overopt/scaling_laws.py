"""Gao et al.'s two laws of gold reward against distance, fitted to checkpoints (arXiv 2210.10760, section 3.1).

With d = sqrt(KL) and R = gold - gold of the reference, so that R(0) = 0 is given and not fitted:

    bon   R(d) = d (alpha - beta d)          best-of-n
    rl    R(d) = d (alpha - beta log d)      reinforcement learning

Letters: N points, D draws. `beta` here is the law's, no loss's.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from rpo.errors import UserError
from rpo.overopt.curve import STAYED, difference, distance

FORMS = ("bon", "rl")
MIN_POINTS = 3  # two make any law of two parameters fit


def peak(form: str, alpha: float, beta: float) -> tuple[float | None, float | None]:
    """(d*, R(d*)): where the law is highest, and how high; (None, None) where it rises for ever (beta <= 0).

    bon: d* = alpha / (2 beta), R = alpha^2 / (4 beta), or (0, 0) where alpha <= 0; rl: d* = exp(alpha/beta - 1),
    R = beta d*.
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        d, height = (float(v) for v in _peaks(form, np.float64(alpha), np.float64(beta)))
    return (d, height) if math.isfinite(d) and math.isfinite(height) else (None, None)


def _peaks(form: str, alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if form == "bon":
        alpha = np.maximum(alpha, 0)
        d, height = alpha / (2 * beta), alpha**2 / (4 * beta)
    else:
        d = np.exp(alpha / beta - 1)
        height = beta * d
    return np.where(beta > 0, d, np.inf), np.where(beta > 0, height, np.inf)


def _design(form: str, d: np.ndarray) -> np.ndarray:
    """(..., N, 2): the columns of the linear model in (alpha, beta)."""
    return np.stack([d, -(d**2) if form == "bon" else -d * np.log(np.where(d > 0, d, 1.0))], axis=-1)


def _solve(design: np.ndarray, gain: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(..., 2): weighted least squares for each leading index; NaN where the points do not determine both."""
    scale = np.sqrt((weight[..., None] * design**2).sum(-2))
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = design / scale[..., None, :]
        cosine = (weight * unit[..., 0] * unit[..., 1]).sum(-1)
        moment = (weight[..., None] * unit * gain[..., None]).sum(-2)
        # Inverse of the 2 x 2 normal matrix [[1, cosine], [cosine, 1]]; singular where all points have one d.
        rest = np.where(1 - cosine**2 > 1e-12, 1 - cosine**2, np.nan)
        return (moment - cosine[..., None] * moment[..., ::-1]) / rest[..., None] / scale


def fit(form: str, d: ArrayLike, gain: ArrayLike) -> dict:
    """Least squares of R(d): {"form", "alpha", "beta", "r2", "d_peak", "gain_peak", "points", "reason"}.

    `gain` is R. Points with d = 0 are left out: they are the reference. r2 = 1 - sum of squared residuals / sum of
    squared deviations from the mean, negative where a constant does better. With fewer than three points or a single d
    every number is None and `reason` says why; else `reason` is None.
    """
    d, gain = np.asarray(d, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    kept = d > 0
    d, gain = d[kept], gain[kept]
    result = {"form": form, "points": len(d)} | dict.fromkeys(("alpha", "beta", "r2", "d_peak", "gain_peak", "reason"))
    if len(d) < MIN_POINTS:
        return result | {"reason": f"{len(d)} checkpoints away from the reference; the fit needs {MIN_POINTS}"}
    design = _design(form, d)
    alpha, beta = _solve(design, gain, np.ones_like(d))
    if not np.isfinite([alpha, beta]).all():
        return result | {"reason": "all checkpoints are at one distance; the fit needs several"}
    spread, left = ((gain - gain.mean()) ** 2).sum(), ((gain - design @ [alpha, beta]) ** 2).sum()
    result |= {"alpha": float(alpha), "beta": float(beta), "r2": float(1 - left / spread) if spread else None}
    return result | dict(zip(("d_peak", "gain_peak"), peak(form, alpha, beta), strict=True))


def fit_curves(
    curves: Sequence[Sequence[dict]], form: str, *, over: str | None = None, draws: int = 2000, seed: int = 0
) -> dict:
    """`fit` of all checkpoints of `curves` pooled, each against its own reference, with bootstrapped "intervals".

    `over` is what is resampled: "runs" (whole curves: seeds), "prompts" (all curves on the same prompts, reference
    included, which needs `clusters`; see `curve`) or None. The intervals are percentiles 2.5 and 97.5 of `draws` refits;
    a bound on a peak is None where it is at infinity, and there are none of one prompt. Percentiles of few units are
    too narrow: of fewer than about ten runs or twenty prompts they are an indication. Draws that do not determine the
    law are left out. Where step 0 is further than STAYED from the reference nothing is fitted: the laws start
    there. UserError where a number is not finite (`curve.value`), and where there are no prompts to draw.
    """
    d = np.concatenate([distance(curve) for curve in curves])
    gains = [difference(point, curve[0], "gold") for curve in curves for point in curve]
    run = np.repeat(np.arange(len(curves)), [len(curve) for curve in curves])
    trained = np.concatenate([np.arange(len(curve)) > 0 for curve in curves])
    gain, kept = np.array([gap["value"] for gap in gains]), (d > 0) & trained
    if (start := d[~trained].max() ** 2) > STAYED:
        result = fit(form, [], []) | {"points": int(kept.sum())}
        return result | {"reason": f"step 0 is {start:.3g} nats from the reference", "over": over, "intervals": None}
    result = fit(form, d[kept], gain[kept]) | {"over": over, "intervals": None}
    if over is None or result["reason"]:
        return result
    rng, d_DN, gain_DN, count_DN = np.random.default_rng(seed), d[kept], gain[kept], np.ones(kept.sum())
    if over == "runs":
        count_DN = rng.multinomial(len(curves), np.full(len(curves), 1 / len(curves)), size=draws)[:, run[kept]]
    else:
        d_DN, gain_DN = (table[:, kept] for table in _redrawn(curves, d, draws, rng))
        if len(curves[0][0]["clusters"]["gold"]["size"]) < 2:
            return result
    alpha_D, beta_D = np.moveaxis(_solve(_design(form, d_DN), gain_DN, count_DN), -1, 0)
    known = np.isfinite(alpha_D) & np.isfinite(beta_D)
    alpha_D, beta_D = alpha_D[known], beta_D[known]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        peaks = _peaks(form, alpha_D, beta_D)
    names = ("alpha", "beta", "d_peak", "gain_peak")
    result["intervals"] = {n: _interval(v) for n, v in zip(names, (alpha_D, beta_D, *peaks), strict=True)}
    return result


def _interval(draws: np.ndarray) -> list[float | None]:
    # No interpolation: between a number and infinity it is not a number.
    bounds = np.quantile(draws, [0.025, 0.975], method="inverted_cdf") if len(draws) else [math.inf] * 2
    return [float(bound) if math.isfinite(bound) else None for bound in bounds]


def _redrawn(curves: Sequence, d: np.ndarray, draws: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(d, gain), each (D, all points), with the prompts resampled, the same ones for every point of every curve."""
    clusters = [point.get("clusters", {}) for curve in curves for point in curve]
    if not all("gold" in cluster for cluster in clusters):
        raise UserError("over=prompts: a checkpoint has no gold per prompt (clusters); draw over=runs")
    with_kl = all("kl" in cluster for cluster in clusters)
    sizes = np.asarray(clusters[0]["gold"]["size"], dtype=np.float64)
    names = ("gold", "kl") if with_kl else ("gold",)
    if any(not np.array_equal(cluster[name]["size"], sizes) for cluster in clusters for name in names):
        raise UserError("over=prompts: the runs answered other prompts; draw over=runs")
    weight_DG = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws) * sizes
    weight_DG /= weight_DG.sum(1, keepdims=True)
    gold = weight_DG @ np.array([cluster["gold"]["mean"] for cluster in clusters], dtype=np.float64).T
    starts = np.cumsum([0, *(len(curve) for curve in curves[:-1])])
    gain = gold - np.repeat(gold[:, starts], [len(curve) for curve in curves], axis=1)
    if not with_kl:
        return np.broadcast_to(d, gain.shape), gain
    kl = weight_DG @ np.array([cluster["kl"]["mean"] for cluster in clusters], dtype=np.float64).T
    return np.sqrt(np.maximum(kl, 0)), gain
