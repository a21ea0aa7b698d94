"""Paired differences against a t-test's arithmetic by hand."""

import math

import pytest

from rpo.paired import differences


def sample(model, item, value, cluster=None):
    scores, error = ({}, "late") if value is None else ({"acc": value}, None)
    return {"model": model, "id": item, "cluster": cluster or item, "scores": scores, "error": error}


def test_paired_by_id():
    """Whatever their order, items are paired by id; what failed in one is counted, and what one alone has is not in it."""
    rows = [sample("A", "x", 1.0), sample("A", "y", 0.0), sample("A", "z", 1.0), sample("A", "only", 1.0)]
    rows += [sample("B", "z", 0.0), sample("B", "y", 0.0), sample("B", "x", 0.0), sample("B", "failed", None)]
    rows += [sample("A", "failed", 1.0)]
    (made,) = differences(rows, "B").items()
    assert made[0] == "A"
    cell = made[1]["difference/acc"]
    assert cell["value"] == pytest.approx(2 / 3) and (cell["n"], cell["n_error"]) == (3, 1)
    assert cell["se"] == pytest.approx(math.sqrt(sum((d - 2 / 3) ** 2 for d in (1, 0, 1)) / 2 / 3))


def test_clusters_count_once():
    """Items of one cluster that all differ alike are one observation, not several."""
    rows = [sample(m, f"{c}{i}", (m == "A") * (c == "p") * 1.0, c) for m in "AB" for c in "pq" for i in range(4)]
    cell = differences(rows, "B")["A"]["difference/acc"]
    assert cell["value"] == 0.5 and cell["se"] == pytest.approx(0.5)  # two observations, 1 and 0


def test_no_other_model():
    """The baseline alone gives no difference."""
    assert differences([sample("A", "x", 1.0)], "A") == {}
