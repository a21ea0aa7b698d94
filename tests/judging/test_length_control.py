"""Length control: its fit against a naive one, what it must leave unchanged, and its error bars."""

import numpy as np
import pytest

from rpo.judging.length_control import (
    CS,
    FOLDS,
    GAMED_WEIGHT,
    Gamed,
    Weights,
    _minimum_of_model,
    bootstrap,
    difference,
    fit,
    length_controlled,
    win_rate,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def judged(num, seed, *, phi=-1.5, psi=0.8, theta=-0.6):
    """(wins, lengths, difficulty) of a judge who follows the model of the fit, with some noise; soft labels."""
    rng = np.random.default_rng(seed)
    length, difficulty = rng.normal(300, 700, num).round(), rng.normal(0, 1, num)
    logit = phi * np.tanh(length / length.std(ddof=1)) + psi * difficulty + theta
    return sigmoid(logit + rng.normal(0, 1, num)), length, difficulty


def gamed_rows(num, seed):
    rng = np.random.default_rng(seed)
    length, difficulty = rng.normal(0, 1.5, num), rng.normal(0, 1, num)
    return Gamed(length, difficulty, sigmoid(-1.5 * np.tanh(length) + rng.normal(0, 1, num)))


def design(wins, length, difficulty, gamed):
    """(features, labels, weights) row by row, from the definition; rows without a verdict count in s alone."""
    s = np.sqrt(sum((x - sum(length) / len(length)) ** 2 for x in length) / (len(length) - 1))
    rows = [([np.tanh(x), g, 0.0], y, GAMED_WEIGHT) for x, g, y in zip(*vars(gamed).values(), strict=True)]
    rows += [([np.tanh(x / s), g, 1.0], y, 1.0) for x, g, y in zip(length, difficulty, wins, strict=True) if y == y]
    return tuple(np.array(column) for column in zip(*rows, strict=True))


def descend(X, y, weight_PR):
    """argmin of |u| + sum weight x cross-entropy for each row of weights: one coordinate at a time, by bisection."""
    u_PK = np.zeros((len(weight_PR), 3))
    for _ in range(60):
        for k in range(3):
            low, high = np.full(len(u_PK), -30.0), np.full(len(u_PK), 30.0)
            for _ in range(45):
                u_PK[:, k] = (low + high) / 2
                slope = (weight_PR * (sigmoid(u_PK @ X.T) - y)) @ X[:, k] + np.where(u_PK[:, k] >= 0, 1, -1)
                low, high = np.where(slope < 0, u_PK[:, k], low), np.where(slope < 0, high, u_PK[:, k])
    return u_PK


def group_folds(num):
    """The fold of each of `num` groups of one size: the last first, each to the fold with the fewest so far."""
    sizes, fold = [0] * FOLDS, {}
    for group in reversed(range(num)):
        fold[group] = sizes.index(min(sizes))
        sizes[fold[group]] += 1
    return np.array([fold[i] for i in range(num)])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fit_is_that_of_a_naive_search(seed):
    """Coefficients and C are those of coordinate bisection over all ten C and five folds, with gamed and missing rows."""
    wins, length, difficulty = judged(43, seed)
    wins[[5, 17]] = np.nan
    gamed = gamed_rows(18, seed)
    X, y, weight = design(wins, length, difficulty, gamed)
    fold = group_folds(len(y))
    train = np.array([c * weight * (fold != f) for c in CS for f in range(FOLDS)])
    scores = []
    for i, u in enumerate(descend(X, y, train)):
        p, held = sigmoid(X @ u), fold == i % FOLDS
        scores.append(np.mean((-weight * (y * np.log(p) + (1 - y) * np.log(1 - p)))[held]))
    c = CS[np.mean(np.reshape(scores, (len(CS), FOLDS)), axis=1).argmin()]
    weights = fit(wins, length, difficulty, gamed)
    assert weights.c == c
    naive = descend(X, y, c * weight[None])[0]
    np.testing.assert_allclose([weights.length, weights.difficulty, weights.model], naive, atol=1e-6)


def test_folds_are_those_of_scikit_learn():
    """The naive fit's folds, which the fit shares, are GroupKFold's for groups of two rows, as soft labels make them."""
    selection = pytest.importorskip("sklearn.model_selection", reason="scikit-learn is not installed")
    groups = np.tile(np.arange(2415), 2)
    fold = group_folds(2415)
    for _, held in selection.GroupKFold(FOLDS).split(groups, groups=groups):
        assert len(set(fold[groups[held]])) == 1


def test_fit_is_that_of_scikit_learn():
    """At the C that was chosen the coefficients are those of its L1 regression on every row as a win and as a loss."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    wins, length, difficulty = judged(200, 3)
    gamed = gamed_rows(80, 3)
    X, y, weight = design(wins, length, difficulty, gamed)
    weights = fit(wins, length, difficulty, gamed)
    options = {"l1_ratio": 1, "solver": "liblinear", "fit_intercept": False, "tol": 1e-10, "max_iter": 10_000}
    other = linear_model.LogisticRegression(C=weights.c, **options)
    other.fit(np.concatenate([X, X]), np.repeat([1, 0], len(y)), np.concatenate([weight * y, weight * (1 - y)]))
    np.testing.assert_allclose([weights.length, weights.difficulty, weights.model], other.coef_[0], atol=1e-5)


@pytest.mark.parametrize("with_difficulty", [False, True])
def test_swapped_models_share_100(with_difficulty):
    """The baseline judged against the model has 100 minus the model's rate, where no gamed rows take a side."""
    wins, length, difficulty = judged(150, 4)
    known = difficulty if with_difficulty else None
    own, other = fit(wins, length, known), fit(1 - wins, -length, known)
    known = np.zeros(1) if known is None else known
    assert own.c == other.c
    assert win_rate(own, known) + win_rate(other, known) == pytest.approx(100, abs=1e-6)


def test_baseline_against_itself_is_50():
    """Draws everywhere and no difference in length leave all weights at 0."""
    weights = fit(np.full(40, 0.5), np.zeros(40), np.random.default_rng(0).normal(size=40))
    assert (weights.length, weights.difficulty, weights.model) == (0, 0, 0)
    assert win_rate(weights, np.linspace(-2, 2, 40)) == 50


def test_a_judge_that_ignores_length_leaves_the_win_rate():
    """Where longer and shorter answers win alike, phi is 0 and the rate is the raw one but for the penalty's pull."""
    rng = np.random.default_rng(5)
    half, length = rng.uniform(0, 1, 100), rng.normal(0, 500, 100)
    wins, lengths = np.concatenate([half, half]), np.concatenate([length, -length])
    weights = fit(wins, lengths)
    assert abs(weights.length) < 1e-8
    # At the minimum C |sum (p - wins)| <= 1 for theta, so the two means differ by 1 / (C N) at most.
    assert abs(win_rate(weights, np.zeros(1)) - 100 * wins.mean()) <= 100 / (weights.c * len(wins)) + 1e-6


def test_a_judge_that_sees_only_length_leaves_50():
    """A model that wins by its length alone is worth 50 at the baseline's length."""
    length = np.random.default_rng(6).normal(-800, 600, 600)
    wins = sigmoid(-2 * np.tanh(length / length.std(ddof=1)))
    assert 100 * wins.mean() > 75
    assert win_rate(fit(wins, length), np.zeros(1)) == pytest.approx(50, abs=2)


def test_gamed_rows_pin_length():
    """A model that is always far longer cannot tell length from quality by itself; gamed rows separate them."""
    rng = np.random.default_rng(7)
    length = -1000 - rng.exponential(1, 300)
    wins = np.full(300, sigmoid(1.0))
    gamed_length = np.concatenate([rng.normal(-1, 1, 2000), rng.normal(1, 1, 2000)])
    gamed = Gamed(gamed_length, np.zeros(4000), sigmoid(-2 * np.tanh(gamed_length)))
    pinned = fit(wins, length, np.zeros(300), gamed)
    assert pinned.length == pytest.approx(-2, abs=0.1) and pinned.model == pytest.approx(-1, abs=0.2)


def test_constant_lengths_are_no_feature():
    """Without any spread in length there is nothing to control for, and no division by zero."""
    wins = np.random.default_rng(8).uniform(size=30)
    assert fit(wins, np.full(30, 17.0)) == fit(wins, np.zeros(30))


def test_models_are_compared_by_their_weights():
    """Two models' weights differ by what tells one from the other; a model against itself is 50."""
    a, b = Weights(-1.0, 0.5, -2.0), Weights(-2.0, 0.25, -3.0)
    assert difference(a, b) == Weights(1.0, 0.25, 1.0)
    assert win_rate(difference(a, a), np.linspace(-3, 3, 9)) == 50


def test_a_draw_is_the_fit_of_its_own_instructions():
    """A draw's rate is that of a fit to the instructions drawn, each as often, in the folds they have in the whole."""
    wins, length, difficulty = judged(60, 9)
    gamed = gamed_rows(20, 9)
    rate = bootstrap(wins, length, difficulty, gamed, draws=1, seed=3)[0]
    counts = np.random.default_rng(3).multinomial(60, np.full(60, 1 / 60))
    drawn = np.repeat(np.arange(60), counts)
    X, y, weight = design(wins[drawn], length[drawn], difficulty[drawn], gamed)
    own = np.concatenate([np.arange(20), 20 + drawn])
    fold = group_folds(80)[own]
    train = np.array([c * weight * (fold != f) for c in CS for f in range(FOLDS)])
    p = sigmoid(descend(X, y, train) @ X.T)
    loss = -weight * (y * np.log(p) + (1 - y) * np.log(1 - p))
    scores = [loss[i][fold == i % FOLDS].mean() for i in range(len(train))]
    c = CS[np.mean(np.reshape(scores, (len(CS), FOLDS)), axis=1).argmin()]
    _, psi, theta = descend(X, y, c * weight[None])[0]
    assert rate == pytest.approx(100 * sigmoid(psi * difficulty[drawn] + theta).mean(), abs=1e-4)


def test_bootstrap_standard_error_is_right_and_covers():
    """Over simulated judges the bootstrap's error is the spread of the estimate, and value +- 1.96 of it covers the truth.

    An error of the predictions alone, which leaves the fit out, is far smaller.
    """
    theta, num, runs = -0.8, 150, 100
    rng = np.random.default_rng(10)
    values, errors = [], []
    for seed in range(runs):
        length = rng.normal(200, 600, num)
        p = sigmoid(-1.2 * np.tanh(length / 600) + theta)
        cell, _ = length_controlled((rng.uniform(size=num) < p).astype(float), length, draws=25, seed=seed)
        values.append(cell["value"])
        errors.append(cell["se"])
    values, errors = np.array(values), np.array(errors)
    assert values.std(ddof=1) == pytest.approx(errors.mean(), rel=0.2)
    # 95% +- 3 standard errors of a share of 100
    assert 0.885 <= np.mean(np.abs(values - 100 * sigmoid(theta)) < 1.96 * errors) <= 1


def test_interval_and_seed():
    """The same seed gives the same error; the interval holds the value; without draws there is neither."""
    wins, length, difficulty = judged(100, 11)
    cell, weights = length_controlled(wins, length, difficulty, draws=50, seed=1)
    assert (cell, weights) == length_controlled(wins, length, difficulty, draws=50, seed=1)
    assert cell["se"] != length_controlled(wins, length, difficulty, draws=50, seed=2)[0]["se"]
    assert cell["interval"][0] < cell["value"] < cell["interval"][1] and cell["n"] == 100
    bare, _ = length_controlled(wins, length, difficulty, draws=0, seed=1)
    assert bare == cell | {"se": None, "interval": None}


def test_too_few_verdicts_are_not_fitted():
    """Below ten verdicts there is no rate; at ten there is."""
    wins, length, _ = judged(12, 12)
    length, wins[:3] = np.abs(length) * np.tile([1, -1], 6), np.nan
    nothing = {"value": None, "se": None, "interval": None, "n": 9, "note": "not fitted: 9 verdicts, fewer than 10"}
    assert length_controlled(wins, length, draws=20, seed=0) == (nothing, None)
    wins[0] = 0.5
    assert length_controlled(wins, length, draws=20, seed=0)[0]["value"] is not None


def test_equal_length_has_to_be_seen():
    """With fewer than five verdicts on either side of equal length there is no rate and a note, unless gamed rows pin phi."""
    wins, length, difficulty = judged(60, 14)
    length = -np.abs(length) - 1
    length[:4] = 50
    for lengths in (length, -length):
        cell, weights = length_controlled(wins, lengths, difficulty, draws=20, seed=0)
        assert weights is None and (cell["value"], cell["se"], cell["interval"], cell["n"]) == (None, None, None, 60)
        assert "all but 4 of 60 items" in cell["note"]
    assert length_controlled(wins, length, difficulty, gamed_rows(20, 0), draws=0, seed=0)[0]["value"] is not None
    length[4] = 0  # on both sides
    assert "note" not in length_controlled(wins, length, difficulty, draws=0, seed=0)[0]


def test_no_error_is_better_than_none_at_all():
    """Verdicts that length alone tells give no rate, ties among them or not; one exception gives one. All alike they have
    an error of 0 and no interval, as raw rates."""
    rng = np.random.default_rng(15)
    length = rng.choice([-300.0, 300.0], 80)
    for wins in (
        (length < 0).astype(float),
        (length > 0).astype(float),
        np.where(rng.random(80) < 0.4, 0.5, length < 0),
    ):
        cell, weights = length_controlled(wins, length, draws=30, seed=0)
        assert weights is None and cell["value"] is None and cell["note"].startswith("not fitted: length alone")
        wins[:20] = 1 - wins[:20]
        assert length_controlled(wins, length, draws=0, seed=0)[0]["value"] is not None
    cell, _ = length_controlled(np.ones(80), length, draws=30, seed=0)
    assert cell["value"] > 99.9 and (cell["se"], cell["interval"]) == (0, None) and "note" not in cell


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_features_that_are_nearly_one(spread):
    """However near features are to each other, nothing about the minimum of a quadratic model is lower than it."""
    rng = np.random.default_rng(16)
    X_NK = rng.normal(size=(30, 1)) + spread * rng.normal(size=(30, 3))
    curvature, gradient, coefs = X_NK.T @ X_NK, X_NK.T @ rng.normal(size=30), rng.normal(size=3)

    def value(u):
        return np.abs(u).sum(-1) + (u - coefs) @ gradient + (((u - coefs) @ curvature) * (u - coefs)).sum(-1) / 2

    weights = _minimum_of_model(coefs, gradient, curvature)
    near = weights + np.concatenate([10.0**-k * rng.normal(size=(4000, 3)) for k in range(7)])
    assert value(weights) <= value(near).min() + 1e-7


def test_extreme_judgments_have_a_fit():
    """All lost, all won, and labels that length separates: finite weights, a rate on the right side."""
    length = np.random.default_rng(13).normal(0, 400, 50)
    assert win_rate(fit(np.zeros(50), length), np.zeros(1)) < 5
    assert win_rate(fit(np.ones(50), length), np.zeros(1)) > 95
    separated = fit((length < 0).astype(float), length, np.ones(50))  # difficulty that is theta's column over again
    assert separated.length < -5 and np.isfinite([separated.difficulty, separated.model]).all()
