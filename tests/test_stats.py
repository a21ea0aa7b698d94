"""rpo.stats against closed forms, printed tables, brute force and simulation: rates are 5% +- 1%, coverage 95% +- 1%.

A simulated rate of 6000 repetitions has a standard error of 0.28%, so that the margin of 1% is above three of them.
"""

import itertools
import math

import numpy as np
import pytest

from rpo import stats

REPEATS = 6000
MARGIN = 0.01


def make_data(rng, num_clusters, *, sizes=(1, 5), shared=1.0):
    """(values of mean zero, their clusters): a shift that a cluster shares, and noise of each row."""
    size_G = rng.integers(sizes[0], sizes[1] + 1, num_clusters)
    clusters = np.repeat(np.arange(num_clusters), size_G)
    return shared * rng.normal(size=num_clusters)[clusters] + rng.normal(size=len(clusters)), clusters


# ---- quantiles


def test_t_quantile_is_that_of_printed_tables():
    """Two-sided 5% and 1% points to the printed digits, odd and even degrees, and the normal's as their limit."""
    two_sided = {1: (12.7062, 63.6567), 2: (4.30265, 9.92484), 3: (3.18245, 5.84091), 5: (2.57058, 4.03214)}
    two_sided |= {10: (2.22814, 3.16927), 29: (2.04523, 2.75639), 30: (2.04227, 2.75000), 120: (1.97993, 2.61742)}
    for df, points in two_sided.items():
        for p, expected in zip((0.975, 0.995), points, strict=True):
            assert stats.t_quantile(p, df) == pytest.approx(expected, abs=6e-5 if expected > 10 else 6e-6), df
    assert stats.t_quantile(0.975, None) == pytest.approx(1.959963984540054, abs=1e-12)
    assert stats.t_quantile(0.975, 100_000) == pytest.approx(1.959963984540054, abs=1e-4)


# ---- the mean


def test_clustered_mean_by_hand():
    """Clusters {1, 2}, {6}: deviations -3 and 3, SE sqrt(2/1 (9 + 9)) / 3 = 2; one degree of freedom, t = 12.7062."""
    cell = stats.clustered_mean([1, 2, 6], ["x", "x", "y"])
    half = 2 * math.tan(0.475 * math.pi)
    assert list(cell) == ["value", "se", "interval", "n"]
    assert cell == {"value": 3.0, "se": pytest.approx(2.0), "interval": pytest.approx([3 - half, 3 + half]), "n": 3}
    ratio = stats.clustered_mean([2, 6], [7, 1000], [1, 3])  # 8 / 4; deviations 0 and 0
    assert ratio == {"value": 2.0, "se": 0.0, "interval": None, "n": 2}
    for alike in ([0.1] * 20, [0] * 20, [1e6 + 0.1] * 7):
        assert stats.clustered_mean(alike, range(len(alike))) == {
            "value": pytest.approx(alike[0]), "se": 0.0, "interval": None, "n": len(alike)}  # fmt: skip
    nearly = stats.clustered_mean([1e6, 1e6 + 1e-3], [0, 1])
    assert nearly["se"] == pytest.approx(5e-4) and nearly["interval"] is not None
    values = np.random.default_rng(0).normal(
        size=30
    )  # a row a cluster: the ordinary error, and rows told twice do not shrink it
    for told in (1, 2):
        cell = stats.clustered_mean(np.repeat(values, told), np.repeat(np.arange(30), told))
        assert cell["se"] == pytest.approx(values.std(ddof=1) / 30**0.5)
    assert stats.clustered_mean([1, 2], [0, 0]) == {"value": 1.5, "se": None, "interval": None, "n": 2}
    assert stats.clustered_mean([], []) == {"value": None, "se": None, "interval": None, "n": 0}


@pytest.mark.parametrize(("num_clusters", "sizes"), [(6, (3, 3)), (40, (1, 5))])
def test_the_interval_covers_and_the_paired_test_errs_at_its_rate(num_clusters, sizes):
    """Zero is outside of the interval of a mean difference of zero 5% of the time, on few clusters and on unequal ones.

    Of six clusters the normal's quantile would err 11% of the time; without clusters both err more than 15%.
    """
    rng = np.random.default_rng(1)
    missed = naive = 0
    for _ in range(REPEATS):
        values, clusters = make_data(rng, num_clusters, sizes=sizes)
        low, high = stats.clustered_mean(values, clusters)["interval"]
        missed += not low <= 0 <= high
        naive += abs(values.mean()) > 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert missed / REPEATS == pytest.approx(stats.ALPHA, abs=MARGIN)
    assert naive / REPEATS > 0.15


def test_the_interval_of_a_ratio_covers():
    """Sums over sums of sizes (nats per token): the linearised ratio's interval has the true rate 95% of the time."""
    rng, missed = np.random.default_rng(2), 0
    for _ in range(REPEATS):
        size = rng.integers(5, 60, 80)
        low, high = stats.clustered_mean(size * (2 + rng.normal(size=80)), np.arange(80) // 2, size)["interval"]
        missed += not low <= 2 <= high
    assert missed / REPEATS == pytest.approx(stats.ALPHA, abs=MARGIN)


# ---- tests


def test_sign_test_is_the_binomial_tail():
    """Against every sequence of n fair throws; ties of the two tails are counted once; a large n keeps its digits."""
    for n in range(11):
        throws = [sum(each) for each in itertools.product((0, 1), repeat=n)]
        for wins in range(n + 1):
            exact = sum(abs(2 * k - n) >= abs(2 * wins - n) for k in throws) / 2**n
            assert stats.sign_test(wins, n - wins) == pytest.approx(exact, abs=1e-15), (wins, n)
    assert stats.sign_test(0, 2000) == pytest.approx(2.0**-1999, rel=1e-12, abs=0)
    z = (5100 - 5000 - 0.5) / 50  # the normal with its continuity correction
    assert stats.sign_test(5100, 4900) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


def test_sign_flips_of_few_clusters_are_all_gone_through():
    """The p-value is the share of all 2^G patterns, found by brute force row by row, with ties and a cluster of sum 0."""
    rng = np.random.default_rng(3)
    for num_clusters in (1, 2, 5, 9):
        values, clusters = make_data(rng, num_clusters)
        for differences in (values, np.round(values), np.abs(values)):
            sums = []
            for signs in itertools.product((-1, 1), repeat=num_clusters):
                sums.append(abs(sum(signs[c] * d for c, d in zip(clusters, differences, strict=True))))
            exact = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9)
            found = stats.sign_flip_test(differences, [f"prompt {c}" for c in clusters], seed=0)
            assert found == pytest.approx(exact, abs=1e-15), num_clusters
    assert stats.sign_flip_test(np.full(15, 0.1), np.arange(15), seed=0) == 2 / 2**15
    assert stats.sign_flip_test([1, -1, 0], [0, 0, 1], seed=0) == 1.0


def test_random_sign_flips_estimate_the_same(monkeypatch):
    """Drawn patterns give the exact p within four standard errors; the same again by the seed; never zero."""
    values, clusters = make_data(np.random.default_rng(4), 12)
    values += 0.3
    exact = stats.sign_flip_test(values, clusters, seed=0)
    monkeypatch.setattr(stats, "ENUMERATED", 0)
    monkeypatch.setattr(stats, "_CHUNK", 5000)  # several batches, the last one smaller
    found = stats.sign_flip_test(values, clusters, seed=0, draws=20_000)
    assert 0.01 < exact < 0.6 and abs(found - exact) < 4 * math.sqrt(exact * (1 - exact) / 20_000)
    assert found == stats.sign_flip_test(values, clusters, seed=0, draws=20_000)
    assert found != stats.sign_flip_test(values, clusters, seed=1, draws=20_000)
    assert stats.sign_flip_test(np.ones(60), np.arange(60), seed=0, draws=999) == 1 / 1000
    assert (found * 20_001) % 1 == pytest.approx(0, abs=1e-6) or (found * 20_001) % 1 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("num_clusters", "draws"), [(10, 0), (30, 199)])
def test_the_permutation_test_errs_at_its_rate(num_clusters, draws):
    """p <= 5% in 5% of datasets without a difference, with all patterns and with 199 of them; row by row it would not."""
    rng, rejected, by_row = np.random.default_rng(5), 0, 0
    for i in range(REPEATS):
        values, clusters = make_data(rng, num_clusters)
        rejected += stats.sign_flip_test(values, clusters, seed=i, draws=draws) <= stats.ALPHA
        if i % 10 == 0:
            by_row += stats.sign_flip_test(values, np.arange(len(values)), seed=i, draws=199) <= stats.ALPHA
    assert rejected / REPEATS == pytest.approx(stats.ALPHA, abs=MARGIN)
    assert by_row / (REPEATS / 10) > 0.12


def test_holm_by_hand():
    """The example in order, reversed, with ties and above one; equal to the step-down rejections at every level."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9, 0.6]) == [1.0, 1.0, 1.0]
    assert stats.holm([0.02]) == [0.02] and stats.holm([]) == []
    rng = np.random.default_rng(6)
    for _ in range(50):
        ps = rng.random(7) ** 3
        ps[3] = ps[5]
        for alpha in (0.01, 0.05, 0.3):
            rejected, order = set(), np.argsort(ps, kind="stable")
            for rank, i in enumerate(order):
                if ps[i] > alpha / (len(ps) - rank):
                    break
                rejected.add(int(i))
            assert {i for i, p in enumerate(stats.holm(ps.tolist())) if p <= alpha} == rejected


def test_holm_keeps_the_chance_of_any_false_claim():
    """Of twenty tests without a difference at least one has p <= 5% in 64% of cases, after Holm in 4.9%."""
    ps = np.random.default_rng(7).random((REPEATS, 20))
    assert np.mean(ps.min(1) <= 0.05) > 0.6
    assert np.mean([min(stats.holm(row)) <= 0.05 for row in ps.tolist()]) == pytest.approx(0.05, abs=MARGIN)


# ---- how large a study


def test_a_detectable_difference_is_seen_in_80_percent():
    """By simulation, on few clusters and on many: |t| is above its quantile in 80% of samples whose mean is that.

    With the normal's quantiles it would be seen in 62% on six clusters.
    """
    rng = np.random.default_rng(10)
    for num_clusters, margin in ((2, MARGIN), (3, MARGIN), (6, MARGIN), (12, MARGIN), (200, MARGIN)):
        drawn = rng.normal(size=(40_000, num_clusters)) + stats.detectable(1 / math.sqrt(num_clusters), num_clusters)
        t = drawn.mean(1) / drawn.std(1, ddof=1) * math.sqrt(num_clusters)
        assert np.mean(np.abs(t) > stats.t_quantile(0.975, num_clusters - 1)) == pytest.approx(0.8, abs=margin)


def test_clusters_needed_by_tables():
    """Cohen's d of 0.5 needs 34 pairs (Cohen 1988; 32 by the normal), 55% against 50% wins 785 prompts and two; the least n."""
    assert stats.detectable(1.0, 100_000) == pytest.approx(1.959964 + 0.841621, abs=1e-4)
    assert stats.clusters_needed(0.5, 1 / math.sqrt(100), 100) == stats.clusters_needed(-0.5, 1 / math.sqrt(7), 7) == 34
    assert stats.clusters_needed(1.0, 0.0, 9) == 2
    assert stats.clusters_needed(0.05, 0.5 / math.sqrt(805), 805) == 787
    assert stats.clusters_needed(1e-6, 1.0, 25) == pytest.approx(25 * (2.801585218 / 1e-6) ** 2, rel=1e-9)
    for difference in (0.3, 0.7, 2.0, 9.0):
        n = stats.clusters_needed(difference, 0.5, 16)
        assert stats.detectable(2 / math.sqrt(n), n) <= difference
        assert n == 2 or stats.detectable(2 / math.sqrt(n - 1), n - 1) > difference
