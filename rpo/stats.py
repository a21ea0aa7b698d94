"""Means, tests and intervals that know which numbers belong together.

Whatever shares a cluster (answers to one prompt, both orders of a pair) is drawn, flipped and counted as one. All in
float64. Letters: N numbers, G clusters, B draws.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

ALPHA = 0.05  # of tests, two-sided; intervals cover 1 - ALPHA
POWER = 0.8  # chance of seeing a difference that is said to be detectable
ENUMERATED = 15  # clusters: up to so many, every sign pattern is gone through
_CHUNK = 1 << 20  # numbers drawn at once
_MANY = 1000  # clusters for which t is as good as normal


def clustered_mean(values: ArrayLike, clusters: ArrayLike, sizes: ArrayLike | None = None) -> dict:
    """Sum of `values` over sum of `sizes` (default 1 each: the mean), its standard error by cluster, 95% interval and n.

    SE^2 = G/(G-1) * sum over the G clusters of (sum of values - mean x sizes in the cluster)^2 / (sum of sizes)^2
    (arXiv 2411.00640, with the small-sample factor; the linearised ratio where sizes differ). With one row per cluster
    it is the ordinary standard error. The interval is value +- t SE, t the .975-quantile of Student's t with G - 1
    degrees of freedom. One cluster has no error and no interval, clusters that are all alike have SE 0 and no interval
    (0 of 20 is not a range from 0 to 0), no row has no value (null).
    """
    values = np.asarray(values, dtype=np.float64)
    sizes = np.ones(len(values)) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if not len(values):
        return {"value": None, "se": None, "interval": None, "n": 0}
    mean, (number_N, num_clusters) = values.sum() / sizes.sum(), _numbered(clusters)
    if num_clusters == 1:
        return {"value": float(mean), "se": None, "interval": None, "n": len(values)}
    sum_G = np.bincount(number_N, weights=values - mean * sizes)
    if np.abs(sum_G).max() <= 1e-12 * np.abs(values).sum():  # a mean of equal numbers is off by its rounding
        return {"value": float(mean), "se": 0.0, "interval": None, "n": len(values)}
    se = np.sqrt(num_clusters / (num_clusters - 1) * (sum_G**2).sum()) / sizes.sum()
    half = t_quantile(1 - ALPHA / 2, num_clusters - 1) * se
    interval = [float(mean - half), float(mean + half)]
    return {"value": float(mean), "se": float(se), "interval": interval, "n": len(values)}


def with_errors(cell: dict, n_error: int) -> dict:
    """The cell with the number of items that would belong to it and failed."""
    return cell | {"n_error": n_error}


def finite(value: object) -> bool:
    """Whether `value` is a number to count with: its square is finite too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e150


def _numbered(clusters: ArrayLike) -> tuple[np.ndarray, int]:
    """The number of each row's cluster, 0 to G - 1, and G."""
    names, number_N = np.unique(np.asarray(clusters), return_inverse=True)
    return number_N, len(names)


# ---- quantiles


def t_quantile(p: float, df: int | None) -> float:
    """The p-quantile of Student's t with `df` degrees of freedom; None: of the standard normal."""
    from scipy.special import ndtri, stdtrit

    assert 0 < p < 1 and (df is None or df >= 1), (p, df)
    return float(ndtri(p) if df is None else stdtrit(df, p))


# ---- tests


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of wins and losses being equally likely, exact; ties are left out beforehand.

    min(1, 2 P(X <= min(wins, losses))), X binomial of wins + losses throws of a fair coin. (Of two binary scores of
    the same items it is McNemar's exact test.) For independent decisions: one per cluster.
    """
    from scipy.special import bdtr

    assert wins >= 0 and losses >= 0, (wins, losses)
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


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
        patterns = np.arange(2 ** (len(sum_G) - 1))[:, None]  # the last keeps its sign: by symmetry
        bits = patterns >> np.arange(len(sum_G))
        return float((np.abs((1.0 - 2 * (bits & 1)) @ sum_G) >= least).mean())
    rng, extreme, done = np.random.default_rng(seed), 0, 0
    while done < draws:
        count = min(draws - done, max(1, _CHUNK // len(sum_G)))
        drawn = np.frombuffer(rng.bytes(count * -(-len(sum_G) // 8)), np.uint8)
        flip_BG = np.unpackbits(drawn.reshape(count, -1), axis=1)
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


# ---- how large a study


def detectable(se: float, num_clusters: int) -> float:
    """The smallest true difference that is detected with a probability of POWER, its error from G = `num_clusters`.

    se times the noncentrality at which t with G - 1 degrees of freedom exceeds its (1 - ALPHA/2)-quantile with probability
    POWER: 16.3 se of two clusters, 2.80 se of many. (Bloom's t_{1-ALPHA/2} + t_POWER, 1995, has a power of .73 at two.)
    """
    from scipy.special import nctdtrinc

    df = num_clusters - 1
    if num_clusters > _MANY:
        return (t_quantile(1 - ALPHA / 2, df) + t_quantile(POWER, df)) * se
    return float(nctdtrinc(df, 1 - POWER, t_quantile(1 - ALPHA / 2, df))) * se


def clusters_needed(difference: float, se: float, num_clusters: int) -> int:
    """As many clusters as make a true `difference` detectable, from the error that `num_clusters` of them gave.

    The least n with detectable(sigma / sqrt n, n) <= |difference|, sigma^2 = num_clusters se^2; for many it is
    n = (z_{1-ALPHA/2} + z_POWER)^2 sigma^2 / difference^2 (arXiv 2411.00640).
    """
    assert difference != 0 and num_clusters > 1, (difference, num_clusters)
    sigma = math.sqrt(num_clusters) * se
    z = t_quantile(1 - ALPHA / 2, None) + t_quantile(POWER, None)
    n = max(2, math.ceil((z * sigma / difference) ** 2))
    while n < _MANY and detectable(sigma / math.sqrt(n), n) > abs(difference):
        n += 1
    return n
