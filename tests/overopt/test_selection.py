"""rpo.selection: limits, the one-standard-error rule and the label-free rule on curves made by hand."""

import math

import numpy as np
import pytest

from rpo.errors import UserError
from rpo.overopt import selection
from rpo.overopt.selection import Limits, select

OFF = Limits(max_kl=None, entropy_falls=None, max_displacement=None, min_ended=None)


def make_curve(se=0.1, **columns):
    """Checkpoints 50 steps apart; a column's name has __ for /."""
    names = [name.replace("__", "/") for name in columns]
    rows = zip(*columns.values(), strict=True)
    return [
        {"step": 50 * i, "metrics": {n: {"value": v, "se": se, "n": 9} for n, v in zip(names, row, strict=True)}}
        for i, row in enumerate(rows)
    ]


HEALTH = make_curve(
    gold=[1.0, 2.0, 2.9, 3.0, 2.0],
    kl=[0.0, 1.0, 2.0, 5.0, 9.0],
    displacement_rate=[0.0, 0.4, 0.5, 0.8, 0.9],
    samples__ended=[1.0, 0.995, 0.99, 0.98, 0.5],
    entropy__top10=[1.5, 1.4, 1.45, 1.3, 1.2],
)


def test_violations_by_hand():
    """Each limit by itself, each at its border, and all together; null is off."""
    assert selection.violations(HEALTH, OFF) == [[]] * 5
    found = selection.violations(HEALTH, Limits(5.0, 2, 0.8, 0.98))
    assert found == [
        [],
        [],
        [],
        [],
        ["kl 9 > 5", "displacement_rate 0.9 > 0.8", "samples/ended 0.5 < 0.98", "entropy/top10 fell 2 times in a row"],
    ]
    falls = selection.violations(HEALTH, Limits(None, 1, None, None))
    assert [bool(f) for f in falls] == [False, True, False, True, True]


def test_one_standard_error_rule_by_hand():
    """The best is 3.0 at step 150; 2.9 at step 100 is within sqrt(.1^2 + .1^2), 2.0 at step 50 is not."""
    found = select(HEALTH, OFF, score="gold")
    assert found["step"] == 100
    assert found["reason"] == "the earliest within one standard error (0.14) of the best feasible gold, 3, at step 150"
    assert found["over_reference"] == pytest.approx(1.9) and found["over_reference_se"] == pytest.approx(
        math.sqrt(0.02)
    )
    assert [row["score"] for row in found["checkpoints"]] == [1.0, 2.0, 2.9, 3.0, 2.0]
    found = select(HEALTH, Limits(1.5, None, None, None), score="gold")
    assert found["step"] == 50 and found["reason"] == "the best feasible gold, 2"
    assert found["checkpoints"][2] == {"step": 100, "score": 2.9, "failed": ["kl 2 > 1.5"]}


def test_the_error_is_paired_where_prompts_are_known():
    """The same scores, 0.05 apart on every prompt: of unpaired errors it is noise, of paired ones it is not."""
    base = np.random.default_rng(0).normal(size=30)
    base -= base.mean()
    curve = make_curve(gold=[0.0, 2.95, 3.0])
    assert select(curve, OFF, score="gold")["step"] == 50
    for point, shift in zip(curve, (0.0, 2.95, 3.0), strict=True):
        point["clusters"] = {"gold": {"mean": list(base + shift), "size": [1] * 30}}
    assert select(curve, OFF, score="gold")["step"] == 100


def test_a_score_may_be_better_where_it_is_lower():
    """The same rule mirrored."""
    curve = make_curve(nll=[0.69, 0.5, 0.3, 0.29, 0.6], se=0.01)
    found = select(curve, OFF, score="nll", direction="min")
    assert found["step"] == 100 and found["over_reference"] == pytest.approx(0.39)


def test_no_better_than_the_reference_is_said():
    """The reference itself is no candidate; where nothing beats it, the reason says so."""
    found = select(make_curve(gold=[3.0, 2.95, 3.05]), OFF, score="gold")
    assert found["step"] == 50
    assert found["reason"].endswith("; no better than the reference (-0.05 +- 0.14)")


def test_label_free_rule():
    """The last before the first that fails, though later ones may pass again; the last of all where none fails."""
    found = select(HEALTH, Limits(2.5, None, None, None))
    assert (found["step"], found["over_reference"]) == (100, None)
    assert found["reason"] == "the last checkpoint before the first that fails: step 150 has kl 5 > 2.5"
    back = make_curve(kl=[0.0, 1.0, 4.0, 1.0])
    assert select(back, Limits(2.0, None, None, None))["step"] == 50
    assert select(back, OFF)["step"] == 150
    assert select(back, OFF)["reason"] == "the last checkpoint: none fails"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: select(HEALTH, Limits(0.5, None, None, None), score="gold"),
            "step 50 has kl 1 > 0.5; raise task.max_kl",
        ),
        (
            lambda: select(HEALTH, Limits(0.5, None, 0.3, 0.999)),
            "samples/ended 0.995 < 0.999; raise task.max_kl, raise task.max_displacement, lower task.min_ended",
        ),
        (lambda: select(make_curve(kl=[0.0, 3.0, 1.0]), Limits(2, None, None, None)), "no checkpoint is feasible"),
        (lambda: select(HEALTH, OFF, score="win_rate"), "step 0: has no win_rate"),
        (lambda: select(make_curve(gold=[1.0, 2.0]), Limits(4.0, None, None, None)), "step 0: has no kl"),
        (lambda: select(make_curve(gold=[1.0, 2.0], se=None), OFF, score="gold"), "no known standard error"),
        (lambda: select(HEALTH[1:], OFF), "expected step 0 and at least one checkpoint"),
        (lambda: select(HEALTH[:1], OFF), "expected step 0 and at least one checkpoint"),
    ],
)
def test_what_can_not_be_selected(call, message):
    """One line that names the step or the key."""
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)
