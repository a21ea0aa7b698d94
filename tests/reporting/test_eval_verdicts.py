"""Sentences on which is better: by hand, from evaluations as they are read, from groups of runs, and from all of it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from rpo.reporting import collect, eval_verdicts
from rpo.reporting.collect import Group, Member, Report, Results
from rpo.reporting.run_verdicts import Verdict
from rpo.runs.catalog import RunRecord
from rpo.stats import clustered_mean, sign_test, t_quantile
from tests.helpers.left_behind import items

BLANK = {"value": None, "se": None, "interval": None, "n": 0, "n_error": 0}


def results(task, models, own=(), config=None, **details):
    """An evaluation: {model: {metric: scores, or a cell}}."""
    cells = {
        model: {
            name: BLANK | (one if isinstance(one, dict) else clustered_mean(one, range(len(one))))
            for name, one in metrics.items()
        }
        for model, metrics in models.items()
    }
    read = Results(models=cells, items=list(own), details=details, folder=Path("e"), task=task, config=config or {})
    return replace(read, names=collect._names(read, []))


def duel(wins):
    """A win rate of A against B with its sign test."""
    scores = [float(i < wins) for i in range(60)]
    own = [*items("A", {"q": {}}, against={"model": "B"}), *items("B", {"q": {}}, against={"model": "A"})]
    test = {"of": "A", "p": sign_test(wins, 60 - wins)}
    models = {"A": {"win_rate": scores}, "B": {"win_rate": [1 - score for score in scores]}}
    return results("winrate", models, own, sign_test=test, judge={"model": "j"})


def test_a_win_rate_in_one_sentence():
    """The winner first, whichever it is, with rate, interval, test and judge, once for both sides; a rate near half says so."""
    half = t_quantile(0.975, 59) * math.sqrt(50 * 10 / 60 / 59 / 60)
    low, high = 100 * (5 / 6 - half), 100 * (5 / 6 + half)
    rest = (
        f"to B in 83.3% of 60 prompts (95% {low:.1f}% to {high:.1f}%; sign test p {sign_test(50, 10):.2g}), by judge j."
    )
    assert eval_verdicts.of_evaluation(duel(50)) == [f"A is preferred {rest}"]
    assert eval_verdicts.of_evaluation(duel(10)) == [f"B is preferred {rest.replace('to B', 'to A', 1)}"]
    (line,) = eval_verdicts.of_evaluation(duel(31))
    assert line.startswith("No preference seen between A and B: A is preferred in 51.7% of 60 prompts (95% 38.")
    (line,) = eval_verdicts.of_evaluation(duel(60))
    assert line.startswith(
        "A is preferred to B in 100.0% of 60 prompts (nothing varied: no interval; sign test p 1.7e-18)"
    )


def test_alpaca_eval_is_in_percent():
    """Against the baseline of its facts, with the rate at equal length."""
    cells = {"win_rate": {"value": 30.0, "se": 2.0, "interval": [26.0, 34.0], "n": 805}}
    cells["length_controlled_win_rate"] = {"value": 40.0, "se": 2.0, "interval": [36.0, 44.0], "n": 805}
    read = results("alpaca_eval", {"m": cells, "base": cells}, baseline="base", annotations="f", judges=["w"])
    assert eval_verdicts.of_evaluation(read) == [
        "base is preferred to m in 70.0% of 805 instructions (95% 66.0% to 74.0%; at equal length 60.0%, 95% 56.0% to 64.0%), "
        "by judge w."
    ]
    assert eval_verdicts.context(read) == ["Judge: w.", "The models were judged against each other."]
    alone = results("alpaca_eval", {"m": cells}, baseline="base", annotations="f", judges=["w"])
    assert eval_verdicts.context(alone) == ["Judge: w.", "Judged against: base."]


def test_benchmarks_and_scores():
    """A difference to the baseline says above, below or not seen; without one models are listed with their intervals."""
    cells = {"acc": [1, 0] * 9, "difference/acc": {"value": 0.1, "se": 0.02, "interval": [0.06, 0.14], "n": 18}}
    cells["difference/f1"] = {"value": -0.1, "se": 0.09, "interval": [-0.3, 0.1], "n": 18}
    config = {"baseline": "runs/b"}
    assert eval_verdicts.of_evaluation(
        results("lm_eval", {"runs/a": cells, "runs/b": {"acc": [0] * 18}}, config=config)
    ) == [
        "acc: a is above b: +0.1 (95% 0.06 to 0.14; 18 items).",
        "f1: no difference seen between a and b: -0.1 (95% -0.3 to 0.1; 18 items).",
    ]
    scores = {"a": {"samples/length": [1, 2], "gold": [1, 3]}, "b": {"gold": [2, 2], "kl": [0, 1]}}
    (line,) = eval_verdicts.of_evaluation(results("gold", scores))
    assert line.startswith("gold: a 2 (95% -10.7") and line.endswith(", b 2 (nothing varied: no interval).")
    assert eval_verdicts.of_evaluation(results("generate", {"a": {"samples/length": [1, 2]}})) == []
    assert eval_verdicts.of_evaluation(results("gold", {"a": {"gold": {"value": None, "unusable": "late"}}})) == []


@pytest.mark.parametrize(("task", "full"), [("alpaca_eval", 100), ("mt_bench", 1)])
def test_all_on_one_side_is_a_preference(task, full):
    """Where every verdict is alike there is no interval: the sign test of the clusters decides, whoever wrote none down."""

    def said(value, clusters, each=1):
        scores = [value * full] * clusters * each
        own = items("m", {f"q{i}": {"win_rate": value * full} for i in range(clusters * each)}, against={"model": "b"})
        own = [replace(item, cluster=str(i % clusters)) for i, item in enumerate(own)]
        (line,) = eval_verdicts.of_evaluation(results(task, {"m": {"win_rate": scores}}, own, baseline="b"))
        return line

    assert said(0, 60).startswith("b is preferred to m in 100.0% of 60 ")
    assert f"sign test p {2 / 2**60:.2g}" in said(0, 60)
    assert said(1, 30, each=2).startswith("m is preferred to b in 100.0% of 60 ")
    assert f"sign test p {2 / 2**30:.2g}" in said(1, 30, each=2)  # two turns of a question are one
    assert said(1, 5).startswith("No preference seen between m and b") and "sign test p 0.062" in said(1, 5)
    assert said(0.5, 60).startswith("No preference seen between m and b")


def test_a_difference_that_nothing_varies():
    """One model right everywhere and the other nowhere is a difference, of clusters enough."""
    for count, said in ((18, "acc: a is above b: +1 ("), (5, "acc: no difference seen between a and b: +1 (")):
        cells = {"a": {"acc": [1] * count, "difference/acc": [1] * count}, "b": {"acc": [0] * count}}
        own = items("a", {f"q{i}": {"acc": 1.0} for i in range(count)})
        (line,) = eval_verdicts.of_evaluation(results("lm_eval", cells, own, config={"baseline": "b"}))
        assert line.startswith(said) and f"sign test p {2 / 2**count:.2g}; {count} items" in line


def test_a_choice_of_checkpoints():
    """task=select's steps and reasons; what is none of them is passed over."""
    runs = [{"run": "r", "chosen": {"step": 50, "reason": "highest gold"}}, {"run": "x", "chosen": 3}, 7]
    assert eval_verdicts.of_evaluation(results("select", {"r": {}}, runs=runs)) == ["r: step 50 (highest gold)."]
    assert eval_verdicts.of_evaluation(results("select", {"r": {}}, runs=3)) == []


def group(label, ends, kind="not measured", start=None):
    """A group of runs, {seed: the last evaluation}."""
    settings = {"loss": {"sft": "none", "preference": "sigmoid", "eta": 0.0, "beta": 0.1}}
    members = []
    for seed, end in ends.items():
        curve = [{"step": 0} | (start or {}), {"step": 30} | end]
        record = RunRecord(Path("r"), settings | {"seed": seed}, state="finished", step=30, curve=curve)
        members.append(Member(f"{label}{seed}", record, None))
    return Group(label, label, 0, members, Verdict(kind, "", []))


def golds(*values):
    return {seed: {"gold": value, "shift/chosen": -1.0} for seed, value in enumerate(values)}


def test_groups_that_share_seeds():
    """The paired difference by seed against DPO, its interval by t with Bonferroni over those listed; one lone seed is none."""
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
def test_details_of_another_form(baseline):
    """Nothing in the details of a file from elsewhere raises."""
    odd = {"judge": [], "sign_test": 3, "annotations": 3, "baseline": baseline, "judges": 3, "pairs": baseline}
    read = results("alpaca_eval", {"m": {"win_rate": [0.0, 1.0]}}, config={"baseline": baseline, "task": 3}, **odd)
    assert eval_verdicts.of_evaluation(read)[0].startswith("win_rate: m 0.5")
    assert eval_verdicts.context(read) == ["Judge: not named by the stored judgments."]
    assert collect.compared(read) == [("m, the first", "the second")]


# ---- the sentence at the top


def arm(label, changes, kind="no overoptimisation seen"):
    """A group whose gold was 1 at the start and changed so."""
    return group(label, {i: {"gold": 1 + change} for i, change in enumerate(changes)}, kind, {"gold": 1.0})


def top(*arms, evaluations=()):
    return eval_verdicts.headline(Report(list(arms), list(evaluations), []))


def test_the_headline_by_gold():
    """The best arm beyond noise by Bonferroni over the arms, and how the others did; else the worst; else inconclusive."""
    up, down, flat = arm("UP", [2, 2.1, 1.9]), arm("DOWN", [-3, -3.1, -2.9], "overoptimised"), arm("FLAT", [1, -1, 0.1])
    half = t_quantile(1 - 0.05 / 6, 2) * 0.1 / math.sqrt(3)
    bounds = f"2.00 gold (95% {2 - half:.2f} to {2 + half:.2f})"
    assert top(down, up, flat) == f"Better: UP gained {bounds} and kept it; 1 of 3 arms is overoptimised."
    assert top(up, flat).endswith("and kept it; 1 of 2 arms improved.")
    assert top(down, flat).startswith("Worse: DOWN lost 3.00 gold (95% 2.") and top(down, flat).endswith(
        "no arm of 2 improved."
    )
    assert top(flat) == "Inconclusive: gold changed beyond noise in none of 1 arm."
    assert top(arm("ONE", [5])).startswith("Inconclusive: gold has one seed and no error bars")
    assert top(arm("SAME", [2, 2])).startswith("Inconclusive")  # no spread is no error


def test_the_headline_without_gold():
    """A conclusive evaluation is quoted; else it says that quality was not measured, with the signs there are."""
    signs = group("A", {0: {"kl": 40.0}}, "signs of overoptimisation")
    assert top(signs, evaluations=[duel(50)]).startswith("A is preferred to B in 83.3%")
    assert eval_verdicts.asides(Report([signs], [duel(50)], [])) == []  # line already
    assert top(signs, evaluations=[duel(31)]) == (
        "Inconclusive: the quality of answers was not measured; 1 of 1 arm shows signs of overoptimisation."
    )
    assert top(evaluations=[duel(31)]).startswith("No preference seen between A and B")
    best = eval_verdicts.asides(Report([arm("UP", [2, 2.1, 1.9])], [duel(50)], []))
    assert best == eval_verdicts.of_evaluation(duel(50))


def test_only_more_of_what_is_good_is_better():
    """A comparison by KL, by lengths, or one that may be luck does not make the headline."""
    for sentence in (
        "kl: A is above B by 3",
        "samples/length: A is above B by 9",
        "acc: A is above B, which may be luck",
    ):
        assert not eval_verdicts._says_better(sentence), sentence
    assert eval_verdicts._says_better("acc: A is below B: -0.1") and eval_verdicts._says_better(
        "A is preferred to B in 9%"
    )
