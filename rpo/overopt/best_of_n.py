"""What many sampled answers to a prompt say: the reward of the best of n, and how varied they are.

Letters: K answers to one prompt.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from rpo.errors import UserError
from rpo.stats import clustered_mean


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n || reference) in nats: log n - (n - 1)/n (arXiv 2210.10760); an upper bound where proxies tie."""
    return math.log(n) - (n - 1) / n


def best_of_n_weights(proxy_K: ArrayLike, n: int) -> np.ndarray:
    """The chance of each of K answers to be the best by proxy of n that are drawn from them without replacement.

    The i-th smallest has C(i-1, n-1)/C(K, n) (arXiv 2310.02743). Equal proxies share theirs, which is the exact
    expectation over a fair choice among them. Made by w_K = n/K, w_i = w_(i+1) (i-n+1)/i, which cannot overflow.
    UserError where a proxy is not finite.
    """
    proxy_K = np.asarray(proxy_K, dtype=np.float64)
    size = len(proxy_K)
    assert 1 <= n <= size, (n, size)
    if not np.isfinite(proxy_K).all():
        raise UserError(f"best of n={n}: a proxy is {proxy_K[~np.isfinite(proxy_K)][0]}; expected finite numbers")
    i = np.arange(size - 1, 0, -1)
    ranked_K = n / size * np.concatenate([[1.0], np.cumprod(np.maximum(i - n + 1, 0) / i)])[::-1]
    _, level_K, count = np.unique(proxy_K, return_inverse=True, return_counts=True)
    shared = np.add.reduceat(ranked_K, np.cumsum(count) - count) / count
    return shared[level_K]


def best_of_n(proxies: Sequence[ArrayLike], golds: Sequence[ArrayLike], sizes: Sequence[int]) -> list[dict]:
    """For each n of `sizes` {"n", "kl" (nats), "gold", "proxy"} of best-of-n by proxy, unbiased.

    `proxies` and `golds` hold one array of K answers per prompt (K may differ). gold and proxy are means over prompts
    with their standard errors, the prompts weighing equally. UserError as `best_of_n_weights`.
    """
    curve = []
    for n in sizes:
        weights = [best_of_n_weights(proxy_K, n) for proxy_K in proxies]
        point = {"n": n, "kl": best_of_n_kl(n)}
        for name, values in (("gold", golds), ("proxy", proxies)):
            per_prompt = [weight_K @ np.asarray(v_K, np.float64) for weight_K, v_K in zip(weights, values, strict=True)]
            point[name] = clustered_mean(per_prompt, np.arange(len(per_prompt)))
        curve.append(point)
    return curve


def distinct(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct-n: different n-grams of tokens as a share of all n-grams in `texts` (arXiv 1510.03055).

    None where no text has n tokens. It falls as texts get more or longer: compare sets of equal size, beside length.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
