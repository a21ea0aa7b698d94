"""rpo.overopt.curve: one run's curve: differences with their errors, the summary, and what is said of it."""

import math

import numpy as np
import pytest

from rpo import stats
from rpo.errors import UserError
from rpo.overopt import curve as overopt


def make_point(step, *, clusters=None, size=None, se=0.1, **metrics):
    """A point with `metrics` (a_b is a/b), and with the gold means per prompt of `clusters`."""
    point = {"step": step, "metrics": {k: {"value": v, "se": se, "n": 100} for k, v in metrics.items()}}
    if clusters is not None:
        size = np.ones(len(clusters)) if size is None else np.asarray(size)
        gold = float(np.average(clusters, weights=size))
        point["metrics"]["gold"] = {"value": gold, "se": se, "n": int(size.sum())}
        point["clusters"] = {"gold": {"mean": list(clusters), "size": list(size)}}
    return point


def make_curve(golds, kls=None, se=0.1, **columns):
    """Checkpoints 50 steps apart without clusters."""
    kls = [float(i) for i in range(len(golds))] if kls is None else kls
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)] or [{}] * len(
        kls
    )
    return [
        make_point(50 * i, se=se, gold=g, kl=k, **row)
        for i, (g, k, row) in enumerate(zip(golds, kls, rows, strict=True))
    ]


def test_difference_is_paired_where_clusters_are_known():
    """SE^2 = (Var_a + Var_b - 2 Cov) / G; with unequal sizes the linearised ratio, by the sum over prompts."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=40)
    a, b = base + 0.3 * rng.normal(size=40), base + 0.3 * rng.normal(size=40)
    found = overopt.difference(make_point(50, clusters=a), make_point(0, clusters=b), "gold")
    covariance = np.cov(a, b)
    assert found["value"] == pytest.approx(a.mean() - b.mean())
    assert found["se"] == pytest.approx(math.sqrt((covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / 40))
    assert found["df"] == 39

    size = rng.integers(1, 6, size=40)
    found = overopt.difference(make_point(50, clusters=a, size=size), make_point(0, clusters=b, size=size), "gold")
    gap = sum(s * (x - y) for s, x, y in zip(size, a, b, strict=True)) / sum(size)
    square = sum((s * (x - y - gap)) ** 2 for s, x, y in zip(size, a, b, strict=True))
    assert found["value"] == pytest.approx(gap)
    assert found["se"] == pytest.approx(math.sqrt(40 / 39 * square) / sum(size))


def test_difference_without_clusters():
    """The two errors added in squares, none where one is unknown, and a point does not differ from itself."""
    a, b = make_point(50, gold=2.0, se=0.3), make_point(0, gold=1.5, se=0.4)
    assert overopt.difference(a, b, "gold") == {"value": 0.5, "se": pytest.approx(0.5), "df": None}
    assert overopt.difference(a, make_point(0, gold=1.0, se=None), "gold")["se"] is None
    assert overopt.difference(a, a, "gold") == {"value": 0.0, "se": 0.0, "df": None}


def test_gold_at_matched_kl():
    """By hand: linear in sqrt(KL), at the first passage of a KL that falls again, exact at a checkpoint, else None."""
    curve = make_curve([1.0, 3.0, 5.0, 4.0], kls=[0.0, 1.0, 9.0, 4.0])
    assert overopt.gold_at(curve, 0.25) == pytest.approx(2.0)  # d = .5, halfway from 0 to 1
    assert overopt.gold_at(curve, 1) == pytest.approx(3.0)
    assert overopt.gold_at(curve, 4) == pytest.approx(4.0)  # d = 2, halfway from 1 to 3, not the last checkpoint
    assert overopt.gold_at(curve, 9) == pytest.approx(5.0)
    assert overopt.gold_at(curve, 9.01) is None


def test_summary_by_hand():
    """Peak, end, drop, gain, their errors, the steps and what held-out pairs say."""
    columns = {"rewards/accuracies": [0.5, 0.6, 0.61, 0.62], "shift/chosen": [0.0, -5.0, -9.0, -63.0]}
    curve = make_curve([2.0, 4.0, 3.0, 0.5], kls=[0.0, 1.0, 4.0, 16.0], **columns)
    summary = overopt.summarise(curve, levels=(1, 2.25, 20))
    error = math.hypot(0.1, 0.1)
    expected = {
        "checkpoints": 3,
        "gold/reference": 2.0,
        "gold/peak": 4.0,
        "gold/final": 0.5,
        "gold/drop": 3.5,
        "gold/drop_se": error,
        "gold/drop_z": 3.5 / error,
        "gold/gain": 2.0,
        "gold/gain_se": error,
        "gold/final_gain": -1.5,
        "gold/final_gain_se": error,
        "gold/noise": stats.t_quantile(1 - 0.05 / 3, None),
        "gold/at_1": 4.0,
        "gold/at_2.25": 3.5,
        "gold/at_20": None,
        "step/peak": 50,
        "step/final": 150,
        "step/below_reference": 150,
        "kl/peak": 1.0,
        "kl/final": 16.0,
        "kl/max": 16.0,
        "accuracy/peak": 0.6,
        "accuracy/final": 0.62,
        "shift/chosen": -63.0,
    }
    assert summary.keys() == expected.keys()
    for name, value in expected.items():
        assert summary[name] == (pytest.approx(value) if value is not None else None), name


def test_summary_without_gold_or_kl():
    """What was not measured is None, under the same names; without an error nothing is below the reference for sure."""
    full = overopt.summarise(make_curve([1.0, 2.0]))
    without = overopt.summarise([make_point(0, kl=0.0), make_point(50, kl=1.0)])
    assert without.keys() == full.keys()
    assert without["gold/peak"] is None and without["kl/final"] == 1.0
    without = overopt.summarise([make_point(0, gold=0.0), make_point(50, gold=1.0)])
    assert without.keys() == full.keys()
    assert without["gold/at_1"] is None and without["kl/max"] is None and without["gold/peak"] == 1.0
    unsure = overopt.summarise(make_curve([2.0, 1.0], se=None))
    assert unsure["gold/drop"] == 1.0 and unsure["gold/drop_se"] is unsure["step/below_reference"] is None


def test_noise_is_seldom_called_overoptimisation():
    """Of 600 runs whose gold never changes at most ALPHA are called overoptimised, although every peak is a maximum."""
    rng, called, drops = np.random.default_rng(0), 0, []
    for _ in range(600):
        base = rng.normal(size=20)
        points = [make_point(i, clusters=base + rng.normal(size=20), kl=float(i)) for i in range(9)]
        summary = overopt.summarise(points, levels=())
        called += overopt.kind(summary) == "overoptimised"
        drops.append(summary["gold/drop"])
    assert np.mean(drops) > 0.3  # the choice of the peak alone
    assert called <= 600 * overopt.ALPHA + 2 * math.sqrt(600 * overopt.ALPHA * (1 - overopt.ALPHA)), called


PAIRS = {"rewards/accuracies": [0.5, 0.601, 0.605, 0.605], "shift/chosen": [0.0, -9.0, -30.0, -63.2]}


@pytest.mark.parametrize(
    ("kind", "golds", "how", "sentence"),
    [
        (
            "overoptimised",
            [2.9, 4.25, 2.0, 0.05],
            PAIRS,
            "Overoptimised: gold fell 4.2 +- 0.14 from its peak at step 50 (KL 1 nats) to 2.85 +- 0.14 below the "
            "reference, while held-out accuracy moved by 0.004 and chosen log-probs fell 63.2 nats.",
        ),
        (
            "overoptimised",
            [2.9, 4.25, 3.8, 3.6],
            {},
            "Overoptimised: gold fell 0.65 +- 0.14 from its peak at step 50 (KL 1 nats) and is still 0.7 +- 0.14 above the "
            "reference.",
        ),
        (
            "overoptimised",
            [2.9, 4.25, 3.3, 2.8],
            {},
            "Overoptimised: gold fell 1.45 +- 0.14 from its peak at step 50 (KL 1 nats) to 0.1 +- 0.14 below the "
            "reference.",
        ),
        (
            "overoptimised",  # 0.1 is within noise
            [2.9, 3.0, 2.5, 2.0],
            {},
            "Overoptimised: gold never rose beyond noise, and fell 1 +- 0.14 from its highest at step 50 (KL 1 nats) to "
            "0.9 +- 0.14 below the reference.",
        ),
        (
            "overoptimised",
            [2.9, 2.0, 1.0, 0.0],
            {},
            "Overoptimised: gold fell 2.9 +- 0.14 from the reference, which no checkpoint was above.",
        ),
        (
            "none",
            [2.9, 4.0, 4.2, 4.15],
            {},
            "No overoptimisation seen: gold ended 1.25 +- 0.14 above the reference and fell 0.05 +- 0.14 from its peak; "
            "over 0.351 is ruled out.",
        ),
        (
            "none",
            [2.9, 3.4, 3.9, 4.2],
            {},
            "No overoptimisation seen: gold ended 1.3 +- 0.14 above the reference and is at its highest at the end.",
        ),
        (
            "none",  # surely fell, but by little of what was won
            [0.0, 40.0, 39.5, 39.0],
            {},
            "No overoptimisation seen: gold ended 39 +- 0.14 above the reference and fell 1 +- 0.14 from its peak; "
            "over 1.3 is ruled out.",
        ),
        (
            "under-optimised",
            [2.9, 2.95, 3.0, 2.98],
            {"kls": [0.0, 0.01, 0.02, 0.03]},
            "Under-optimised: the policy never left the reference (KL at most 0.03 nats), nor did gold.",
        ),
        (
            "unclear",
            [2.9, 3.0, 2.95, 2.85],
            {},
            "Inconclusive: gold neither rose (0.1 +- 0.14) nor fell (0.15 +- 0.14) beyond noise; sample more prompts.",
        ),
        ("unclear", [1.0] * 4, {"se": 0.0}, "Inconclusive: gold is the same for every answer to a prompt."),
        (
            "unclear",
            [2.9, 3.3, 3.25, 3.1],
            {},
            "Inconclusive: gold rose 0.4 +- 0.14; its drop of 0.2 +- 0.14 is within noise, which allows 0.501.",
        ),
        (
            "unclear",
            [2.9, 4.0, 1.0, 0.0],
            {"se": None},
            "Inconclusive: gold has no standard error; sample more prompts.",
        ),
    ],
)
def test_verdict(kind, golds, how, sentence):
    """Each kind of run is told as it is, in one sentence."""
    summary = overopt.summarise(make_curve(golds, **how))
    assert overopt.kind(summary) == kind
    assert overopt.verdict(summary) == sentence


def test_verdict_without_gold():
    """No gold reward, no judgement."""
    summary = overopt.summarise([make_point(0, kl=0.0), make_point(50, kl=1.0)])
    assert overopt.kind(summary) == "unclear"
    assert overopt.verdict(summary) == "Inconclusive: no gold reward was measured."


def test_group_verdict():
    """What the group is with its count, the others, and means over seeds; a seed alone is judged as a run."""
    collapsed = [overopt.summarise(make_curve([2.9, 4.0, 2.0, end], **PAIRS)) for end in (0.0, 1.0)]
    fine = overopt.summarise(make_curve([2.9, 4.0, 4.2, 4.2], **PAIRS))
    bare = overopt.summarise([make_point(0, kl=0.0), make_point(50, kl=1.0)])
    assert overopt.group_verdict(collapsed) == (
        "Overoptimised in 2 of 2 seeds: gold fell 3.5 (sd 0.71) from its peak near step 50 (KL 1 nats) to 2.4 (sd 0.71) "
        "below the reference, while held-out accuracy moved by 0.004 and chosen log-probs fell 63.2 nats."
    )
    assert overopt.group_verdict([*collapsed, fine]).startswith(
        "Overoptimised in 2 of 3 seeds, no overoptimisation seen in 1: gold fell 2.33 (sd 2.1) from its peak near"
    )
    assert overopt.group_verdict([fine, fine]).startswith(
        "No overoptimisation seen in 2 of 2 seeds: gold ended 1.3 above the reference and 0 (sd 0) below its peak"
    )
    assert overopt.group_verdict([fine, collapsed[0], fine]).startswith(
        "Overoptimised in 1 of 3 seeds, no overoptimisation seen in 2: gold ended"
    )
    flat = [overopt.summarise(make_curve([2.9, 2.95, end])) for end in (2.8, 2.7)]
    assert overopt.group_verdict([fine, flat[0]]).startswith(
        "Inconclusive in 1 of 2 seeds, no overoptimisation seen in 1: gold ended"
    )
    stayed = overopt.summarise(make_curve([2.9, 2.95, 2.9], [0.0, 0.01, 0.01]))
    assert overopt.group_verdict([fine, stayed]).startswith(
        "Inconclusive, no overoptimisation seen in 1 of 2 seeds, under-optimised in 1: gold ended"
    )
    assert overopt.group_verdict(flat) == (
        "Inconclusive in 2 of 2 seeds: gold ended 0.15 below the reference and 0.2 (sd 0.071) below its peak."
    )
    assert overopt.group_verdict([fine]) == overopt.verdict(fine)
    constant = overopt.summarise(make_curve([1.0] * 3, se=0.0))
    assert overopt.group_verdict([constant] * 2) == (
        "Inconclusive in 2 of 2 seeds: gold is the same for every answer to a prompt."
    )
    assert overopt.group_verdict([bare, bare]) == "Inconclusive in 2 of 2 seeds: not every seed has a gold reward."


def test_cut_answers_are_told():
    """The worst checkpoint of all curves, where fewer than nine answers of ten ended; nothing at the border, or where
    it was not measured; gold is spoken of where there is one."""
    curves = [make_curve([1.0] * 3, samples__ended=shares) for shares in ([1.0, 0.9, 0.95], [1.0, 0.06, 0.5])]
    for point in curves[0] + curves[1]:
        point["metrics"]["samples/ended"] = point["metrics"].pop("samples__ended")
    said = "up to 94% of the answers (step 50) were cut at 48 tokens; gold is of cut answers"
    assert overopt.cut(curves, 48) == said
    assert overopt.cut(curves[:1], 48) is None and overopt.cut([make_curve([1.0, 2.0])], 48) is None
    for point in curves[1]:
        del point["metrics"]["gold"]
    assert overopt.cut(curves[1:], 48) == said.replace("; gold is of cut answers", "")


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        ([], "steps []: expected a curve"),
        (make_curve([1.0]), "steps [0]: expected a curve"),
        (make_curve([1.0, 2.0, 3.0])[1:], "steps [50, 100]: expected a curve"),
        (make_curve([1.0, 2.0])[::-1], "steps [50, 0]: expected a curve"),
        ([make_point(0, gold=1.0), make_point(50, kl=1.0)], "step 0: has no kl"),
        ([make_point(0, gold=1.0), make_point(50, proxy=1.0)], "step 50: has no gold"),
        (make_curve([1.0, math.nan]), "step 50: gold=nan; expected a finite number"),
        (make_curve([1.0, 2.0], kls=[0.0, math.inf]), "step 50: kl=inf"),
        ([make_point(0, clusters=[1.0, 2.0]), make_point(50, clusters=[1.0, 2.0, 3.0])], "measured on other prompts"),
        (
            [make_point(0, clusters=[1.0, 2.0]), make_point(50, clusters=[1.0, 2.0]) | make_point(50, gold=7.0)],
            "steps 50 and 0: gold differs by 5.5, its means per prompt by 0",
        ),
    ],
)
def test_what_is_no_curve(curve, message):
    """One line that names the step and what was found."""
    with pytest.raises(UserError) as error:
        overopt.summarise(curve)
    assert message in str(error.value) and "\n" not in str(error.value)
