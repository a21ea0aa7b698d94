"""Means, tests and intervals that know which numbers belong together.

Whatever shares a cluster (answers to one prompt, both orders of a pair) is drawn, flipped and counted as one. All in
float64. Letters: N numbers, G clusters, B draws.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

ALPHA = 0.05  # of tests, two-sided; intervals cover 1 - ALPHA
POWER = 0.8  # chance of seeing a difference that is said to be detectable
ENUMERATED = 15  # clusters: up to so many, every sign pattern is gone through
_CHUNK = 1 << 20  # numbers drawn at once


def clustered_mean(values: ArrayLike, clusters: ArrayLike, sizes: ArrayLike | None = None) -> dict:
    """Sum of `values` over sum of `sizes` (default 1 each: the mean), its standard error by cluster, 95% interval and n.

    SE^2 = G/(G-1) * sum over the G clusters of (sum of values - mean x sizes in the cluster)^2 / (sum of sizes)^2
    (arXiv 2411.00640, with the small-sample factor; the linearised ratio where sizes differ). With one row per cluster
    it is the ordinary standard error. The interval is value +- t SE, t the .975-quantile of Student's t with G - 1
    degrees of freedom. One cluster has no error and no interval, no row no value (null).
    """
    values = np.asarray(values, dtype=np.float64)
    sizes = np.ones(len(values)) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if not len(values):
        return {"value": None, "se": None, "interval": None, "n": 0}
    mean, (number_N, num_clusters) = values.sum() / sizes.sum(), _numbered(clusters)
    if num_clusters == 1:
        return {"value": float(mean), "se": None, "interval": None, "n": len(values)}
    sum_G = np.bincount(number_N, weights=values - mean * sizes)
    se = np.sqrt(num_clusters / (num_clusters - 1) * (sum_G**2).sum()) / sizes.sum()
    half = t_quantile(1 - ALPHA / 2, num_clusters - 1) * se
    interval = [float(mean - half), float(mean + half)]
    return {"value": float(mean), "se": float(se), "interval": interval, "n": len(values)}


def _numbered(clusters: ArrayLike) -> tuple[np.ndarray, int]:
    """The number of each row's cluster, 0 to G - 1, and G."""
    names, number_N = np.unique(np.asarray(clusters), return_inverse=True)
    return number_N, len(names)


# ---- quantiles


def normal_quantile(p: float) -> float:
    """The p-quantile of the standard normal."""
    return NormalDist().inv_cdf(p)


@lru_cache(maxsize=4096)
def t_quantile(p: float, df: int | None) -> float:
    """The p-quantile (.5 <= p < 1) of Student's t with a whole number of degrees of freedom; None: of the normal.

    Newton's method on P(|T| < t), in closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4). That is concave in t, so
    steps from the normal's quantile, which is too small, never go too far. Within 1e-10 for p <= .999.
    """
    assert 0.5 <= p < 1 and (df is None or df >= 1), (p, df)
    t = normal_quantile(p)
    if df is None:
        return t
    odd = df % 2
    i = np.arange(1, (df - odd) // 2)
    terms = np.concatenate([[1.0], np.cumprod((2 * i - 1 + odd) / (2 * i + odd))])

    def inside(t: float) -> float:
        angle = math.atan(t / math.sqrt(df))
        series = math.sin(angle) * float((terms * math.cos(angle) ** (2 * np.arange(len(terms)))).sum())
        return series if not odd else 2 / math.pi * (angle + (math.cos(angle) * series if df > 1 else 0))

    norm = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    for _ in range(100):  # nearly always fewer than ten
        step = (2 * p - 1 - inside(t)) / (2 * norm * math.exp(-(df + 1) / 2 * math.log1p(t * t / df)))
        t += step
        if step <= 1e-12 * t:
            break
    return t


# ---- tests


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of wins and losses being equally likely, exact; ties are left out beforehand.

    min(1, 2 P(X <= min(wins, losses))), X binomial of wins + losses throws of a fair coin. (Of two binary scores of
    the same items it is McNemar's exact test.) For independent decisions: one per cluster.
    """
    assert wins >= 0 and losses >= 0, (wins, losses)
    n, count, tail = wins + losses, 1, 0
    for i in range(min(wins, losses) + 1):
        tail += count
        count = count * (n - i) // (i + 1)  # n over i + 1
    return min(1.0, 2 * tail / 2**n)


def sign_flip_test(differences: ArrayLike, clusters: ArrayLike, seed: int, draws: int = 10_000) -> float:
    """Two-sided p of paired `differences` that are as likely to have the other sign, whole clusters at a time.

    The share of sign patterns whose |sum| is at least the observed one: of all 2^G with up to ENUMERATED clusters (least
    p: 2 / 2^G), else (1 + those at least as large) / (1 + draws) of random ones (Phipson and Smyth 2010), which
    is valid for any number of draws. Clusters that sum to zero change nothing and do not count.
    """
    number_N, _ = _numbered(clusters)
    sum_G = np.bincount(number_N, weights=np.asarray(differences, dtype=np.float64))
    scale = np.abs(sum_G).sum()
    sum_G = sum_G[np.abs(sum_G) > 1e-12 * scale]
    if not len(sum_G):
        return 1.0
    least = abs(sum_G.sum()) - 1e-12 * scale  # equal sums differ by rounding
    if len(sum_G) <= ENUMERATED:
        bits = np.arange(2 ** (len(sum_G) - 1))[:, None] >> np.arange(
            len(sum_G)
        )  # the last keeps its sign: by symmetry
        return float((np.abs((1.0 - 2 * (bits & 1)) @ sum_G) >= least).mean())
    rng, extreme, done = np.random.default_rng(seed), 0, 0
    while done < draws:
        count = min(draws - done, max(1, _CHUNK // len(sum_G)))
        flip_BG = np.unpackbits(
            np.frombuffer(rng.bytes(count * -(-len(sum_G) // 8)), np.uint8).reshape(count, -1), axis=1
        )
        flipped_B = sum_G.sum() - 2 * (flip_BG[:, : len(sum_G)] @ sum_G)
        extreme += int((np.abs(flipped_B) >= least).sum())
        done += count
    return (1 + extreme) / (1 + draws)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for there being several, in the order given: of m, the i-th smallest times m - i + 1.

    None is below one before it or above 1. Rejecting those <= alpha rejects a true hypothesis with a chance of at most alpha,
    however they depend (Holm 1979).
    """
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


# ---- intervals


def wilson(successes: int, n: int) -> list[float]:
    """The 95% score interval of a proportion of n independent outcomes (Wilson 1927); not empty at 0 or n successes.

    (k + z^2/2 +- z sqrt(k (n - k) / n + z^2/4)) / (n + z^2).
    """
    assert 0 <= successes <= n and n > 0, (successes, n)
    z = normal_quantile(1 - ALPHA / 2)
    middle, half = successes + z * z / 2, z * math.sqrt(successes * (n - successes) / n + z * z / 4)
    low, high = (middle - half) / (n + z * z), (middle + half) / (n + z * z)
    return [0.0 if successes == 0 else low, 1.0 if successes == n else high]  # which they are but for rounding


def bootstrap(
    statistic: Callable[[np.ndarray], ArrayLike], clusters: ArrayLike, seed: int, draws: int = 2000
) -> dict[str, float | list[float] | None]:
    """{"se", "interval"} of a statistic when G whole clusters are drawn with replacement, `draws` times.

    `statistic` gets weights_BN, how often each row was drawn (float64, a batch of draws), and gives its B values; a
    fit is made anew inside it, so that the error includes the fit's own. se is the standard deviation of the values,
    interval the percentile one, 95%; both are somewhat small with few clusters (se by sqrt((G-1)/G) for a mean). One
    cluster has none.
    """
    number_N, num_clusters = _numbered(clusters)
    if num_clusters < 2:
        return {"se": None, "interval": None}
    rng, values, done = np.random.default_rng(seed), np.empty(draws), 0
    while done < draws:
        count = min(draws - done, max(1, _CHUNK // len(number_N)))
        drawn_BG = rng.integers(num_clusters, size=(count, num_clusters)) + num_clusters * np.arange(count)[:, None]
        times_BG = np.bincount(drawn_BG.ravel(), minlength=count * num_clusters).reshape(count, num_clusters)
        values[done : done + count] = statistic(times_BG[:, number_N].astype(np.float64))
        done += count
    assert np.isfinite(values).all(), f"{(~np.isfinite(values)).sum()} of {draws} draws have no finite statistic"
    return {"se": float(values.std(ddof=1)), "interval": np.quantile(values, [ALPHA / 2, 1 - ALPHA / 2]).tolist()}


# ---- how large a study


def power(difference: float, se: float) -> float:
    """The chance that a true `difference` is told from zero at level ALPHA when its standard error is `se` (normal)."""
    normal, shift = NormalDist(), difference / se
    z = normal_quantile(1 - ALPHA / 2)
    return normal.cdf(shift - z) + normal.cdf(-shift - z)


def detectable(se: float) -> float:
    """The smallest true difference that is told from zero with a chance of POWER: (z_{1-ALPHA/2} + z_POWER) se."""
    return (normal_quantile(1 - ALPHA / 2) + normal_quantile(POWER)) * se


def clusters_needed(difference: float, se: float, num_clusters: int) -> int:
    """As many clusters as make a true `difference` detectable, from the error that `num_clusters` of them gave.

    n = (z_{1-ALPHA/2} + z_POWER)^2 sigma^2 / difference^2 with sigma^2 = num_clusters se^2 (arXiv 2411.00640).
    """
    assert difference != 0 and num_clusters > 1, (difference, num_clusters)
    return max(2, math.ceil(num_clusters * (detectable(se) / difference) ** 2))
