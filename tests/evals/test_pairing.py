"""Paired differences against a t-test's arithmetic by hand."""

import math

import pytest

from rpo.evals.pairing import judged_apart, judged_by, with_differences
from rpo.evals.results import Item, Results


def sample(model, item, value, cluster=None):
    scores, error = ({}, "late") if value is None else ({"acc": value}, None)
    return Item(model=model, id=item, cluster=cluster or item, scores=scores, error=error)


def found(task, details, config=None):
    return Results({}, details=details, task=task, config=config or {})


def test_paired_by_id():
    """Whatever their order, items are paired by id; what failed in one is counted, and what one alone has is not in it."""
    rows = [sample("A", "x", 1.0), sample("A", "y", 0.0), sample("A", "z", 1.0), sample("A", "only", 1.0)]
    rows += [sample("B", "z", 0.0), sample("B", "y", 0.0), sample("B", "x", 0.0), sample("B", "failed", None)]
    rows += [sample("A", "failed", 1.0)]
    models = with_differences({"A": {"acc": {}}, "B": {}}, rows, "B")
    assert list(models["A"]) == ["acc", "difference/acc"] and models["B"] == {}
    cell = models["A"]["difference/acc"]
    assert cell["value"] == pytest.approx(2 / 3) and (cell["n"], cell["n_error"]) == (3, 1)
    assert cell["se"] == pytest.approx(math.sqrt(sum((d - 2 / 3) ** 2 for d in (1, 0, 1)) / 2 / 3))


def test_clusters_count_once():
    """Items of one cluster that all differ alike are one observation, not several."""
    rows = [sample(m, f"{c}{i}", (m == "A") * (c == "p") * 1.0, c) for m in "AB" for c in "pq" for i in range(4)]
    cell = with_differences({"A": {}, "B": {}}, rows, "B")["A"]["difference/acc"]
    assert cell["value"] == 0.5 and cell["se"] == pytest.approx(0.5)  # two observations, 1 and 0


def test_no_other_model():
    """The baseline alone gives no difference, nor do models without one."""
    for baseline in ("A", None):
        assert with_differences({"A": {}}, [sample("A", "x", 1.0)], baseline) == {"A": {}}


def test_who_judged():
    """By tasks' details: AlpacaEval's baseline is part of it, what only one side knows tells nothing apart, no judge is {}."""
    config = {"task": {"prompts": "p.jsonl"}}
    live = {"judge": {"model": "j", "served": ["j-2", "j-1"]}, "verdict": "logprobs", "baseline": "b"}
    known = {"judge": "j", "served": "j-1, j-2", "prompt": "p.jsonl", "verdict": "logprobs", "baseline": "b"}
    assert judged_by(found("alpaca_eval", live, config)) == known
    assert judged_by(found("winrate", live, config))["baseline"] is None
    stored = judged_by(found("alpaca_eval", {"annotations": "f", "baseline": "c"}))
    assert judged_apart(known, stored) == "baseline b and c"
    assert judged_apart(known, stored | {"baseline": "b"}) == judged_apart(known, {}) == ""
    assert judged_by(found("pairs", {"data": "d"})) == judged_by(found("judge_check", live, config)) == {}
