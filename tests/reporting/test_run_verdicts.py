"""Verdicts on runs: the rules as a table of cases, the spread over seeds against arithmetic by hand and pure noise."""

import math
import statistics

import numpy as np
import pytest

from rpo.overopt.curve import SOME, summarise
from rpo.reporting import run_verdicts
from rpo.stats import t_quantile

HEALTHY = {"shift/chosen": -2.0, "shift_per_token/chosen": -0.05, "displacement_rate": 0.6, "kl": 3.0}
HEALTHY |= {"rewards/accuracies": 0.62, "loss/preference": 0.66, "samples/ended": 1.0}


def test_a_verdict_is_said_once():
    """Beside its kind a sentence goes without it; one that begins otherwise stays."""
    kind = "no overoptimisation seen"
    assert run_verdicts.beside(kind, "No overoptimisation seen in 2 of 2 seeds: it") == "In 2 of 2 seeds: it"
    assert run_verdicts.beside("inconclusive", "Inconclusive: gold.") == "Gold."
    assert run_verdicts.beside(SOME, "Overoptimised in 1 of 2 seeds") == "Overoptimised in 1 of 2 seeds"
    assert run_verdicts.beside(kind, "") == ""


def curve(*golds, **last):
    """An evaluation every ten steps with these golds (None: not measured); the last one has `last` too."""
    points = [{"step": 10 * i} | ({} if gold is None else {"gold": gold}) for i, gold in enumerate(golds)]
    points[-1] |= last
    return points


def summary(*golds, se=0.1, kl=4.0):
    """What task=overopt makes of such a curve where every gold has the standard error `se`."""
    points = [
        {"step": 10 * i, "metrics": {"gold": {"value": g, "se": se}, "kl": {"value": kl * i, "se": 0.1}}}
        for i, g in enumerate(golds)
    ]
    return summarise(points)


COLLAPSED, HELD, NOISY = (1.0, 3.0, 0.0), (1.0, 3.0, 2.95), (1.0, 1.05, 1.0)
CASES = {
    "nothing recorded": ([], [], "not measured"),
    "no held-out pairs": ([curve(None, None, **{"samples/ended": 1.0})], [], "not measured"),
    "healthy": ([curve(None, None, **HEALTHY)], [], "no sign in what was measured"),
    "chosen fell": ([curve(None, None, **HEALTHY | {"shift/chosen": -63.0})], [], "signs of overoptimisation"),
    "per token": ([curve(None, None, **HEALTHY | {"shift_per_token/chosen": -0.4})], [], "signs of overoptimisation"),
    "displaced": ([curve(None, None, **HEALTHY | {"displacement_rate": 0.99})], [], "signs of overoptimisation"),
    "far": ([curve(None, None, **HEALTHY | {"kl": 32.0})], [], "signs of overoptimisation"),
    "too sure": ([curve(None, None, **HEALTHY | {"loss/preference": 0.7})], [], "signs of overoptimisation"),
    "endless": ([curve(None, None, **HEALTHY | {"samples/ended": 0.7})], [], "signs of overoptimisation"),
    "one seed's logged gold decides nothing": ([curve(*COLLAPSED, **HEALTHY)], [], "no sign in what was measured"),
    "seeds that agree": (
        [curve(*(g + e for g in COLLAPSED), **HEALTHY) for e in (0, 0.1, 0.2)],
        [],
        "overoptimised",
    ),
    "seeds that hold": (
        [curve(1, 3 + e, 2.98 + e, **HEALTHY) for e in (0, 0.01, 0.02)],
        [],
        "no overoptimisation seen",
    ),
    "seeds that differ": ([curve(1, 3, end, **HEALTHY) for end in (3, 0)], [], "inconclusive"),
    "seeds that differ, with a sign": (
        [curve(1, 3, end, **HEALTHY | {"kl": 40.0}) for end in (3, 0)],
        [],
        "signs of overoptimisation",
    ),
    "measured collapse": ([curve(None, None, **HEALTHY)], [summary(*COLLAPSED)], "overoptimised"),
    "measured, held": ([curve(None, None, **HEALTHY)], [summary(*HELD)], "no overoptimisation seen"),
    "measured, noise": ([curve(None, None, **HEALTHY)], [summary(*NOISY)], "inconclusive"),
    "measured, never left": ([], [summary(*NOISY, kl=0.01)], "under-optimised"),
    "most of the seeds": ([], [summary(*COLLAPSED), summary(*COLLAPSED), summary(*HELD)], "overoptimised"),
    "half of the seeds": ([], [summary(*COLLAPSED), summary(*HELD)], "overoptimised in some seeds"),
    "one of three seeds": ([], [summary(*HELD), summary(*COLLAPSED), summary(*HELD)], "overoptimised in some seeds"),
    "no half": ([], [summary(*HELD), summary(*NOISY)], "inconclusive"),
    "gold measured beats signs": (
        [curve(None, None, **HEALTHY | {"shift/chosen": -63.0})],
        [summary(*HELD)],
        "no overoptimisation seen",
    ),
    "a drop without an error": ([], [summary(*COLLAPSED, se=None)], "inconclusive"),
}


@pytest.mark.parametrize("case", CASES)
def test_rules(case):
    """Each case is called what the rules say, in one or more whole sentences with a tone that the page knows."""
    curves, summaries, kind = CASES[case]
    verdict = run_verdicts.judge(curves, summaries, pairs=2000)
    assert verdict.kind == kind
    assert verdict.says.endswith(".") and verdict.tone in ("bad", "doubt", "good", "unknown", "news")
    assert "nan" not in verdict.says.lower()
    if summaries:  # the sentence of task=overopt begins with the same kind
        assert verdict.says.startswith(kind.removesuffix(" in some seeds").capitalize())


def test_the_sentence_has_the_numbers():
    """Shift, accuracy with what may be noise, KL and what was not measured are said as they are."""
    first = {"step": 10, "rewards/accuracies": 0.614}
    points = [{"step": 0}, first, {"step": 20} | HEALTHY | {"shift/chosen": -63.2}]
    verdict = run_verdicts.judge([points], [], pairs=2000)
    noise = 1.96 * math.sqrt(2 * 0.25 / 2000)
    assert "fell 63.2 nats below the reference" in verdict.says and "KL 3 nats" in verdict.says
    assert (
        f"accuracy 0.620, moved by +0.006 since step 10 (on 2,000 pairs, under {noise:.2g} may be noise)"
        in verdict.says
    )
    assert verdict.notes == ["Not measured: the quality of answers (gold, a judge, a benchmark)."]
    assert "KL to the reference" in run_verdicts.judge([[{"step": 0}, {"step": 10, "shift/chosen": -1.0}]], []).notes[0]


def test_too_sure_is_a_matter_of_the_sigmoid_loss():
    """Other losses have no value of no information at ln 2."""
    last = HEALTHY | {"loss/preference": 2.0}
    assert run_verdicts.signs(last) and not run_verdicts.signs(last, sigmoid=False)


def test_spread_by_hand():
    """Drop and gain of logged gold are means over seeds from the peak of their mean, with sd / sqrt(S); None where it cannot be computed."""
    golds = [(1.0, 4.0, 2.0, 1.0), (1.2, 3.0, 3.5, 0.5), (0.9, 3.6, 2.2, 1.4)]
    verdict = run_verdicts.over_seeds([curve(*g) for g in golds])
    drops = [g[1] - g[3] for g in golds]
    assert verdict["step/peak"] == 10 and verdict["gold/drop"] == pytest.approx(statistics.mean(drops))
    assert verdict["gold/drop_se"] == pytest.approx(statistics.stdev(drops) / math.sqrt(3))
    assert verdict["gold/gain"] == pytest.approx(statistics.mean(g[1] - g[0] for g in golds))
    assert verdict["gold/noise"] == t_quantile(1 - 0.05 / 3, 2)
    assert run_verdicts.over_seeds([curve(*golds[0])]) is None and run_verdicts.over_seeds([]) is None
    assert run_verdicts.over_seeds([curve(1.0, 2.0), curve(1.0, 2.0)]) is None
    ragged = [curve(*golds[0]), curve(*golds[1])[:-1]]
    assert run_verdicts.over_seeds(ragged)["step/final"] == 20  # the last step that both have


@pytest.mark.parametrize("seeds", [2, 5])
def test_noise_is_not_called_a_drop(seeds):
    """Gold that rises and then stays, with noise at every step, is said to have dropped in at most 5% of 300 trials (+- 2 se)."""
    rng, called = np.random.default_rng(seeds), 0
    for _ in range(300):
        gold_SC = rng.normal(size=(seeds, 8)) + np.array([0, *[2] * 7])
        verdict = run_verdicts.over_seeds([curve(*row) for row in gold_SC.tolist()])
        called += verdict["gold/drop"] > verdict["gold/noise"] * verdict["gold/drop_se"]
    assert called / 300 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)
