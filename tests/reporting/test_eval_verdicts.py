"""Sentences on which is better: by hand, from evaluations as they are read and from groups of runs."""

import math
from pathlib import Path

import pytest

from rpo.evals.results import Results
from rpo.reporting import batches, eval_verdicts, gather, run_verdicts
from rpo.reporting.batches import Batch
from rpo.stats import clustered_mean, sign_test, t_quantile


def made(task, models, samples=(), **facts):
    """An evaluation: {model: {metric: scores, or a cell}}."""
    cells = {
        model: {
            name: one if isinstance(one, dict) else clustered_mean(one, range(len(one))) | {"n_error": 0}
            for name, one in metrics.items()
        }
        for model, metrics in models.items()
    }
    return gather._of_models(Results(Path("e"), task, cells, list(samples), facts))


def duel(wins, **facts):
    """A win rate of A against B with its sign test."""
    scores = [float(i < wins) for i in range(60)]
    samples = [{"model": a, "id": "q", "against": b} for a, b in (("A", "B"), ("B", "A"))]
    test = {"of": "A", "p": sign_test(wins, 60 - wins)}
    models = {"A": {"win_rate": scores}, "B": {"win_rate": [1 - score for score in scores]}}
    return made("winrate", models, samples, sign_test=test, judge={"model": "j"}, **facts)


def test_a_win_rate_in_one_sentence():
    """The winner first, whichever it is, with rate, interval, test and judge, once for both sides; a rate near half says so."""
    half = t_quantile(0.975, 59) * math.sqrt(50 * 10 / 60 / 59 / 60)
    low, high = 100 * (5 / 6 - half), 100 * (5 / 6 + half)
    rest = (
        f"to B in 83.3% of 60 prompts (95% {low:.1f}% to {high:.1f}%; sign test p {sign_test(50, 10):.2g}), by judge j."
    )
    assert eval_verdicts.of_evaluation(duel(50)) == [f"A is preferred {rest}"]
    assert eval_verdicts.of_evaluation(duel(10)) == [f"B is preferred {rest.replace('to B', 'to A', 1)}"]
    (said,) = eval_verdicts.of_evaluation(duel(31))
    assert said.startswith("No preference seen between A and B: A is preferred in 51.7% of 60 prompts (95% 38.")
    (said,) = eval_verdicts.of_evaluation(duel(60))
    assert said.startswith(
        "A is preferred to B in 100.0% of 60 prompts (nothing varied: no interval; sign test p 1.7e-18)"
    )


def test_alpaca_eval_is_in_percent():
    """Against the baseline of its facts, with the rate at equal length."""
    cells = {"win_rate": {"value": 30.0, "se": 2.0, "interval": [26.0, 34.0], "n": 805}}
    cells["length_controlled_win_rate"] = {"value": 40.0, "se": 2.0, "interval": [36.0, 44.0], "n": 805}
    found = made("alpaca_eval", {"m": cells, "base": cells}, baseline="base", annotations="f", judges=["w"])
    assert eval_verdicts.of_evaluation(found) == [
        "base is preferred to m in 70.0% of 805 instructions (95% 66.0% to 74.0%; at equal length 60.0%, 95% 56.0% to 64.0%), "
        "by judge w."
    ]
    assert eval_verdicts.context(found) == ["Judge: w.", "The models were judged against each other."]
    alone = made("alpaca_eval", {"m": cells}, baseline="base", annotations="f", judges=["w"])
    assert eval_verdicts.context(alone) == ["Judge: w.", "Judged against: base."]


def test_benchmarks_and_scores():
    """A difference to the baseline says above, below or not seen; without one models are listed with their intervals."""
    cells = {"acc": [1, 0] * 9, "difference/acc": {"value": 0.1, "se": 0.02, "interval": [0.06, 0.14], "n": 18}}
    cells["difference/f1"] = {"value": -0.1, "se": 0.09, "interval": [-0.3, 0.1], "n": 18}
    config = {"baseline": "runs/b"}
    assert eval_verdicts.of_evaluation(
        made("lm_eval", {"runs/a": cells, "runs/b": {"acc": [0] * 18}}, config=config)
    ) == [
        "acc: a is above b: +0.1 (95% 0.06 to 0.14; 18 items).",
        "f1: no difference seen between a and b: -0.1 (95% -0.3 to 0.1; 18 items).",
    ]
    scores = {"a": {"samples/length": [1, 2], "gold": [1, 3]}, "b": {"gold": [2, 2], "kl": [0, 1]}}
    (said,) = eval_verdicts.of_evaluation(made("gold", scores))
    assert said.startswith("gold: a 2 (95% -10.7") and said.endswith(", b 2 (nothing varied: no interval).")
    assert eval_verdicts.of_evaluation(made("generate", {"a": {"samples/length": [1, 2]}})) == []
    assert eval_verdicts.of_evaluation(made("gold", {"a": {"gold": {"value": None, "unusable": "late"}}})) == []


def group(label, ends, **more):
    """A group of runs, {seed: the last evaluation}."""
    members = [
        batches.Member(
            f"{label}{seed}",
            {"seed": seed, "loss": {"sft": "none", "preference": "sigmoid", "eta": 0.0, "beta": 0.1}} | more,
            gather.Run(Path("r"), {}, {}, "finished", "", 30, [{"step": 0}, {"step": 30} | end], None, {}, []),
            None,
        )
        for seed, end in ends.items()
    ]
    return Batch(label, 0, members, run_verdicts.Finding("not measured", "", []))


def golds(*values):
    return {seed: {"gold": value, "shift/chosen": -1.0} for seed, value in enumerate(values)}


def test_groups_that_share_seeds():
    """The paired difference by seed against DPO, its interval by t with Bonferroni over what is told; one lone seed is none."""
    dpo, rpo = group("DPO beta 0.1", golds(1, 2, 3)), group("RPO", golds(3, 5, 4))
    mean, sd = 2.0, 1.0  # of 2, 3, 1
    half = t_quantile(0.975, 2) * sd / math.sqrt(3)
    rest = f"over 3 shared seeds, step 30): {'above' if mean > half else 'no difference seen'}."
    assert eval_verdicts.over_seeds([dpo, rpo]) == [
        f"RPO minus DPO beta 0.1: gold +2 (95% {2 - half:.4g} to {2 + half:.4g}, {rest}"
    ]
    other = group("SFT", {0: {"rewards/accuracies": 0.5}, 1: {"rewards/accuracies": 0.5}})
    assert eval_verdicts.over_seeds([other, dpo, group("RPO", golds(3))]) == []
    more = eval_verdicts.over_seeds([dpo, rpo, group("IPO", golds(2, 3, 4, 9))])
    wide = t_quantile(1 - 0.025 / 2, 2) / math.sqrt(3)
    assert f"(95% {2 - wide:.4g} to {2 + wide:.4g}, over 3" in more[0]
    assert more[1] == (
        "IPO minus DPO beta 0.1: gold +1, the same for every seed, so there is no interval (over 3 shared seeds, step 30)."
    )


@pytest.mark.parametrize("baseline", [None, 3, ["x"], {"y": 1}])
def test_facts_of_another_form(baseline):
    """Nothing in the facts of a file from elsewhere raises."""
    cells = {"m": {"win_rate": [0.0, 1.0]}}
    odd = {"judge": [], "sign_test": 3, "config": {"baseline": baseline, "task": 3}, "notes": 3, "annotations": 3}
    found = made("alpaca_eval", cells, [{"model": "m"}], baseline=baseline, judges=3, **odd)
    assert eval_verdicts.of_evaluation(found)[0].startswith("win_rate: m 0.5")
    assert eval_verdicts.context(found) == ["Judge: not named by the stored judgments."]
