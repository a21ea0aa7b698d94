"""rpo.answers: best-of-n from samples, its KL, and distinct-n."""

import itertools
import math
from statistics import mean

import numpy as np
import pytest

from rpo.errors import UserError
from rpo.overopt import best_of_n


@pytest.mark.parametrize("levels", [100, 3, 1])
def test_best_of_n_is_the_mean_over_all_subsets(levels):
    """Brute force: every subset of n, the answer of the highest proxy, tied ones in equal parts; proxies with many ties."""
    rng = np.random.default_rng(levels)
    for size in (1, 5, 8):
        proxy, gold = rng.integers(levels, size=size).astype(float), rng.normal(size=size)
        for n in range(1, size + 1):
            values = []
            for subset in itertools.combinations(range(size), n):
                top = max(proxy[i] for i in subset)
                values.append(mean(gold[i] for i in subset if proxy[i] == top))
            weights = best_of_n.best_of_n_weights(proxy, n)
            assert weights @ gold == pytest.approx(mean(values), abs=1e-12), (size, n)
            assert weights.sum() == pytest.approx(1)


def test_best_of_n_weights_of_many_samples():
    """Up to n = 1024 of 4096: C(i-1, n-1)/C(K, n) in whole numbers."""
    size = 4096
    for n in (1, 2, 256, 1024):
        weights = best_of_n.best_of_n_weights(np.arange(size), n)
        for i in (n, n + 1, 3000, size - 1, size):
            expected = math.comb(i - 1, n - 1) * 10**400 // math.comb(size, n) / 10**400
            assert weights[i - 1] == pytest.approx(expected, rel=1e-10, abs=1e-300), (n, i)
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert not weights[: n - 1].any()


def test_best_of_n_over_prompts():
    """Prompts weigh equally whatever their number of answers; the error is that of the prompts' means."""
    proxies, golds = [[1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 5.0]], [[0.0, 1.0], [4.0, 0.0, 2.0], [3.0, -1.0]]
    first, second = best_of_n.best_of_n(proxies, golds, [1, 2])
    per_prompt = [1.0, (4 + 4 + 2) / 3, -1.0]  # the better of two; of three answers the subsets are 01, 02 and 12
    assert second["gold"]["value"] == pytest.approx(mean(per_prompt))
    assert second["gold"]["se"] == pytest.approx(np.std(per_prompt, ddof=1) / math.sqrt(3))
    assert second["gold"]["n"] == 3
    assert second["proxy"]["value"] == pytest.approx(mean([2.0, (3 + 3 + 2) / 3, 5.0]))
    assert first["gold"]["value"] == pytest.approx(mean([0.5, 2.0, 1.0]))
    assert (first["n"], first["kl"], second["n"]) == (1, 0.0, 2)


def test_best_of_n_is_unbiased():
    """The mean of the estimator over many sample sets is the enumerated reward of best-of-n of that distribution."""
    rng, n = np.random.default_rng(0), 3
    law, proxy, gold = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0.0, 1.0, 1.0, 2.0]), np.array([1.0, 4.0, 0.0, -2.0])
    exact = sum(
        math.prod(law[i] for i in drawn) * mean(gold[i] for i in drawn if proxy[i] == max(proxy[list(drawn)]))
        for drawn in itertools.product(range(4), repeat=n)
    )
    drawn = rng.choice(4, p=law, size=(4000, 6))
    (found,) = best_of_n.best_of_n(proxy[drawn], gold[drawn], [n])
    assert abs(found["gold"]["value"] - exact) < 4 * found["gold"]["se"]


def test_kl_of_best_of_n():
    """The enumerated KL of best-of-n over M equally likely answers tends to log n - (n - 1)/n; ties keep it below."""
    for n in (1, 2, 4, 64):
        gaps = []
        for size in (100, 100_000):
            upper = np.arange(1, size + 1) / size
            best = upper**n - (upper - 1 / size) ** n
            best = best[best > 0]
            gaps.append(best_of_n.best_of_n_kl(n) - (best * np.log(best * size)).sum())
        assert gaps[0] > gaps[1] - 1e-9 and -1e-9 < gaps[1] < 1e-4, (n, gaps)
    assert best_of_n.best_of_n_kl(1) == 0


def test_distinct():
    """By hand: different n-grams over all, across texts and not over their borders."""
    texts = [[1, 2, 1, 2], [1, 2], [3]]
    assert best_of_n.distinct(texts, 1) == 3 / 7
    assert best_of_n.distinct(texts, 2) == 2 / 4
    assert best_of_n.distinct(texts, 3) == 1.0
    assert best_of_n.distinct(texts, 5) is None
    assert best_of_n.distinct([], 1) is None


@pytest.mark.parametrize(
    ("proxy", "n", "message"),
    [
        ([1.0, math.nan], 1, "a proxy is nan; expected finite numbers"),
        ([1.0, -math.inf], 1, "a proxy is -inf"),
    ],
)
def test_what_best_of_n_can_not_be_made_of(proxy, n, message):
    """One line."""
    with pytest.raises(UserError) as error:
        best_of_n.best_of_n([proxy], [proxy], [n])
    assert message in str(error.value) and "\n" not in str(error.value)
