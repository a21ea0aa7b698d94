"""rpo.scaling: planted laws are found again, with intervals that hold what they promise."""

import math

import numpy as np
import pytest

from rpo.errors import UserError
from rpo.overopt import scaling_laws as scaling

LAWS = [("bon", 1.3, 0.21), ("rl", 0.9, 0.5)]


def law(form, alpha, beta, d):
    """R(d), written a second time."""
    return d * (alpha - beta * d) if form == "bon" else d * (alpha - beta * np.log(d))


def make_curve(kl, gold, se=0.1, clusters=None, size=None):
    """Checkpoints one step apart; `clusters` holds a row of means per prompt for each."""
    points = []
    for i, (k, g) in enumerate(zip(kl, gold, strict=True)):
        point = {"step": i, "metrics": {"kl": {"value": float(k), "se": se}, "gold": {"value": float(g), "se": se}}}
        if clusters is not None:
            point["metrics"]["gold"]["value"] = float(np.average(clusters[i], weights=size))
            point["clusters"] = {"gold": {"mean": list(clusters[i]), "size": list(size)}}
        points.append(point)
    return points


@pytest.mark.parametrize(("form", "alpha", "beta"), LAWS)
def test_planted_law_is_recovered(form, alpha, beta):
    """Without noise to 1e-9, points at d = 0 aside; R^2 is 1 and the other form fits worse."""
    d = np.array([0.0, 0.3, 0.9, 1.7, 2.5, 4.0, 5.5])
    gain = np.where(d > 0, law(form, alpha, beta, np.maximum(d, 1e-9)), 0.0)
    found = scaling.fit(form, d, gain)
    np.testing.assert_allclose([found["alpha"], found["beta"], found["r2"]], [alpha, beta, 1], rtol=1e-9)
    assert found["points"] == 6 and found["reason"] is None
    other = "rl" if form == "bon" else "bon"
    assert scaling.fit(other, d, gain)["r2"] < 0.999

    pooled = [make_curve(d**2, start + gain) for start in (2.0, -7.0)]  # each against its own reference
    found = scaling.fit_curves(pooled, form)
    np.testing.assert_allclose([found["alpha"], found["beta"]], [alpha, beta], rtol=1e-9)
    assert found["points"] == 12 and found["intervals"] is None


def test_least_squares():
    """Against numpy's own solution, and R^2 by its definition."""
    rng = np.random.default_rng(0)
    d, gain = rng.uniform(0.2, 4, 9), rng.normal(size=9)
    for form in scaling.FORMS:
        design = np.stack([d, -(d**2) if form == "bon" else -d * np.log(d)], axis=1)
        (alpha, beta), *_ = np.linalg.lstsq(design, gain, rcond=None)
        found = scaling.fit(form, d, gain)
        np.testing.assert_allclose([found["alpha"], found["beta"]], [alpha, beta], rtol=1e-9)
        left = ((gain - law(form, alpha, beta, d)) ** 2).sum()
        assert found["r2"] == pytest.approx(1 - left / ((gain - gain.mean()) ** 2).sum())


@pytest.mark.parametrize(("form", "alpha", "beta"), LAWS)
def test_peak(form, alpha, beta):
    """d* and R(d*) are those of a fine grid; a law that never turns has none, and one that only falls is highest at 0."""
    d = np.linspace(1e-6, 20, 200_001)
    gain = law(form, alpha, beta, d)
    np.testing.assert_allclose(scaling.peak(form, alpha, beta), [d[gain.argmax()], gain.max()], rtol=1e-4)
    for never in ((1.0, 0.0), (1.0, -0.5), (-1.0, -0.5), (0.0, 0.0)):
        assert scaling.peak(form, *never) == (None, None)
    if form == "bon":
        assert scaling.peak(form, -1.0, 0.5) == (0, 0)
    else:
        assert scaling.peak(form, 1.0, 1e-6) == (None, None)  # e^(10^6) is past any float


@pytest.mark.parametrize(("form", "alpha", "beta"), LAWS)
def test_intervals_over_prompts_cover(form, alpha, beta):
    """Prompts of unequal size that every checkpoint shares, the reference too: of 200 curves about 95% have the planted
    alpha, beta and peak of all prompts inside their bootstrapped intervals."""
    rng, runs = np.random.default_rng(2), 200
    d = np.array([0.0, 0.5, 1.0, 2.0, 3.0])
    gain = np.array([0.0, *law(form, alpha, beta, d[1:])])[:, None]
    truth = dict(
        zip(("alpha", "beta", "d_peak", "gain_peak"), (alpha, beta, *scaling.peak(form, alpha, beta)), strict=True)
    )
    inside = dict.fromkeys(truth, 0)
    for draw in range(runs):
        size = rng.integers(1, 5, size=80)
        slope = 0.8 * rng.normal(size=80)  # prompts differ in how much they gain
        clusters = rng.normal(size=80) + np.outer(d, slope) + gain + 0.2 * rng.normal(size=(5, 80))
        curve = make_curve(d**2, d, clusters=clusters, size=size)
        found = scaling.fit_curves([curve], form, over="prompts", draws=300, seed=draw)
        for name, value in truth.items():
            low, high = found["intervals"][name]
            inside[name] += low <= value <= (math.inf if high is None else high)
    for name, count in inside.items():
        assert 0.90 <= count / runs <= 0.98, (name, count / runs)


def test_prompts_are_drawn_with_their_kl():
    """Where the KL per prompt is known it is drawn beside gold: gold that is a law of the KL leaves nothing to chance."""
    rng, size = np.random.default_rng(3), np.ones(30)
    kl = np.array([0.0, 1.0, 4.0, 9.0])[:, None] * rng.uniform(0.8, 1.2, size=30)
    curve = make_curve(kl.mean(1), kl.mean(1), clusters=-0.5 * kl, size=size)  # R = -.5 d^2: alpha 0, beta .5
    for point, row in zip(curve, kl, strict=True):
        point["clusters"]["kl"] = {"mean": list(row), "size": list(size)}
    found = scaling.fit_curves([curve], "bon", over="prompts", draws=100)
    np.testing.assert_allclose(found["intervals"]["beta"], [0.5, 0.5], rtol=1e-9)
    del curve[2]["clusters"]["kl"]
    low, high = scaling.fit_curves([curve], "bon", over="prompts", draws=100)["intervals"]["beta"]
    assert high - low > 0.001


def test_runs_are_drawn_whole():
    """Two seeds with laws of their own, noise-free: each draw is one of three mixtures, so the ends are the seeds' laws."""
    d = np.array([0.0, 1.0, 2.0, 3.0])
    curves = [make_curve(d**2, d * (alpha - 0.2 * d)) for alpha in (1.0, 1.4)]
    found = scaling.fit_curves(curves, "bon", over="runs", draws=200, seed=0)
    assert found["alpha"] == pytest.approx(1.2)
    np.testing.assert_allclose(found["intervals"]["alpha"], [1.0, 1.4], rtol=1e-9)
    again = scaling.fit_curves(curves, "bon", over="runs", draws=200, seed=0)
    assert again == found


def test_a_peak_that_may_be_at_infinity_has_an_open_interval():
    """A law that rises over all that was seen: its turning point has no upper bound, and no NaN comes of it."""
    rng, d = np.random.default_rng(4), np.linspace(0, 2, 9)
    clusters = d[:, None] + 0.3 * rng.normal(size=(9, 20))
    found = scaling.fit_curves([make_curve(d**2, d, clusters=clusters, size=np.ones(20))], "bon", over="prompts")
    low, high = found["intervals"]["d_peak"]
    assert high is None and (low is None or math.isfinite(low))


def test_too_little_to_fit_says_why():
    """Fewer than three checkpoints away from the reference, or all at one distance: no numbers, and the reason."""
    found = scaling.fit("rl", [0.0, 1.0, 2.0], [0.0, 1.0, 1.0])
    assert found["alpha"] is None and found["reason"] == "2 checkpoints away from the reference; the fit needs 3"
    found = scaling.fit("bon", [2.0, 2.0, 2.0], [0.5, 1.0, 1.0])
    assert found["r2"] is None and found["reason"].startswith("all checkpoints are at one distance")
    found = scaling.fit_curves([make_curve([0, 1], [0, 1])], "bon", over="prompts")
    assert found["reason"] and found["intervals"] is None
    apart = [make_curve([start, 4, 9, 16], range(4)) for start in (0, 1.5)]
    found = scaling.fit_curves(apart, "rl", over="runs")
    assert found["alpha"] is found["intervals"] is None and found["reason"] == "step 0 is 1.5 nats from the reference"
    assert found.keys() == scaling.fit_curves(apart[:1], "rl").keys()


def test_one_prompt_has_no_interval():
    """The law itself is fitted; drawing one prompt anew would give an interval of no width."""
    curve = make_curve([0, 1, 4, 9], range(4), clusters=np.array([[0.0], [1.0], [1.5], [1.0]]), size=[8])
    found = scaling.fit_curves([curve], "bon", over="prompts")
    assert found["alpha"] is not None and found["intervals"] is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c: scaling.fit_curves([make_curve([0, 1, 2, 3], [0, 1, math.nan, 2])], "rl"),
            "gold=nan; expected a finite",
        ),
        (lambda c: scaling.fit_curves([c], "rl", over="prompts"), "over=prompts: a checkpoint has no gold per prompt"),
    ],
)
def test_what_can_not_be_fitted(call, message):
    """One line."""
    with pytest.raises(UserError) as error:
        call(make_curve([0, 1, 2, 3], [0, 1, 2, 2]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_prompts_of_other_runs_are_not_drawn_together():
    """Two runs whose prompts differ in number have no common draw."""
    curves = [make_curve([0, 1, 4, 9], range(4), clusters=np.ones((4, n)), size=np.ones(n)) for n in (5, 6)]
    with pytest.raises(UserError, match="the runs answered other prompts"):
        scaling.fit_curves(curves, "bon", over="prompts")
