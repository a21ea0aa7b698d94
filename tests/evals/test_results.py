"""The form of results: what is written is read back, failures are counted, and too many of them leave no score."""

import json
from dataclasses import replace

import pytest

from rpo.errors import UserError
from rpo.evals import results
from rpo.evals.results import Evaluation, Item
from rpo.stats import clustered_mean, with_errors
from tests.helpers.runs import settings


def make_items(model, n, failed):
    return [
        Item(
            model=model,
            id=f"q{i}",
            cluster=f"q{i}",
            scores={} if i < failed else {"acc": i % 2},
            error="timed\n out" if i < failed else None,
        )
        for i in range(n)
    ]


def make(failed, n=100, **more):
    """An evaluation with so many failures of each model; `more` cells of all of them."""
    items = [item for model, count in failed.items() for item in make_items(model, n, count)]
    models = {}
    for model, count in failed.items():
        scores = [item.scores["acc"] for item in items if item.model == model and item.scores]
        models[model] = {"acc": with_errors(clustered_mean(scores, range(len(scores))), count)} | more
    return Evaluation(models, items, ["read with care"], {"data": "d.jsonl"})


def written(folder, made, *given):
    cfg = settings("task=pairs", "model.path=[A,B]", *given, name="eval")
    try:
        results.write(folder, cfg, made, results.table)
        return None
    except UserError as error:
        return str(error)


def test_what_is_written_is_read_back(tmp_path):
    """Samples and cells are the same again, from the folder and from its results.json; a share of 5% failures is a score."""
    made = make({"A": 0, "B": 5})
    assert written(tmp_path, made) is None
    for given in (tmp_path, tmp_path / "results.json"):
        found = results.read(given)
        assert (found.models, found.items, found.task) == (made.models, made.items, "pairs")
        assert found.details == {"data": "d.jsonl"} and found.notes == ["read with care"]
        assert found.config["model"]["path"] == ["A", "B"] and found.versions["torch"]
    assert not list(tmp_path.glob("*.part"))


def test_the_form_of_both_files(tmp_path):
    """Six keys of results.json, five of a cell, nine of a line; what an item lacks is null or empty, never absent."""
    models = {"A": {"acc": {"value": 1.0, "n": 2}, "gone": {}}}
    against = {"model": "B", "response": "b"}
    items = [Item("A", "1", "c"), Item("A", "2", "c", "p", "r", {"acc": 1.0}, None, against, {"row": 2})]
    assert written(tmp_path, Evaluation(models, items)) is None
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == ["task", "models", "notes", "details", "config", "versions"]
    blank = {"value": None, "se": None, "interval": None, "n": 0, "n_error": 0}
    assert found["models"]["A"] == {"acc": blank | {"value": 1.0, "n": 2}, "gone": blank}
    first, second = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    keys = ["model", "id", "cluster", "prompt", "response", "scores", "error", "against", "details"]
    assert list(first) == list(second) == keys
    assert [first[key] for key in keys] == ["A", "1", "c", None, None, {}, None, None, {}]
    assert second["against"] == against and second["details"] == {"row": 2}


def test_too_many_failures_are_no_score(tmp_path, capsys):
    """6 of 100: value, se and interval of that model are null, its counts stay, the other's score too; then one line."""
    made = make({"A": 6, "B": 5}, count={"value": 3, "se": None, "n": 7})
    error = written(tmp_path, made)
    assert error.startswith("A: 6 of 100 items failed, 6 with: timed out; more than 5% failed") and "\n" not in error
    found = results.read(tmp_path)
    reason = "6 of 100 items failed, 6 with: timed out"
    nothing = {"value": None, "se": None, "interval": None, "unusable": reason}
    assert found.models["A"] == {"acc": nothing | {"n": 94, "n_error": 6}, "count": nothing | {"n": 7, "n_error": 0}}
    assert found.models["B"]["acc"] == made.models["B"]["acc"] and found.models["B"]["count"]["value"] == 3
    assert len(found.items) == 200
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:3]] == ["unusable", "unusable"]


def test_a_difference_from_an_unusable_baseline_is_none(tmp_path):
    """The other model keeps its own score, not its difference from what has none."""
    made = make({"A": 0, "B": 50}, **{"difference/acc": {"value": 0.1, "se": 0.1, "n": 50}})
    cfg = ("task=lm_eval", "baseline=B")
    assert written(tmp_path, made, *cfg).startswith("B: 50 of 100")
    cells = results.read(tmp_path).models["A"]
    assert cells["acc"]["value"] == pytest.approx(0.5)
    assert cells["difference/acc"]["value"] is None and cells["difference/acc"]["unusable"].startswith("50 of 100")


def test_no_secret_is_written(tmp_path, monkeypatch, capsys):
    """A key inside a model's path is in neither file and not on screen."""
    monkeypatch.setenv("SOME_API_KEY", "s3cretvalue")
    made = make({"https://u:pw12345678@host/s3cretvalue/m": 9})
    made.items[0] = replace(made.items[0], against={"model": "models/s3cretvalue", "response": None})
    assert "s3cretvalue" not in written(tmp_path, made)
    said = capsys.readouterr().out + "".join(path.read_text() for path in tmp_path.iterdir())
    assert "s3cretvalue" not in said and "pw12345678" not in said and "***" in said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", b""),
        ("results.json", b"[]"),
        ("results.json", b"{}"),
        ("results.json", b"\xff\xfe"),
        ("results.json", b"[" * 100_000),
        ("results.json", b'{"task": ["x"], "models": {}}'),
        ("results.json", b'{"task": "x", "models": [1]}'),
        ("results.json", b'{"task": "x", "models": {"A": null}}'),
        ("results.json", b'{"task": "x", "models": {}, "config": [1]}'),
        ("results.json", b'{"task": "x", "models": {}, "notes": [], "details": {}, "config": {}}'),
        ("samples.jsonl", b'{"model": "A"'),
        ("samples.jsonl", b"3\n"),
        ("samples.jsonl", b'{"model": "A", "id": "1", "cluster": "1", "scores": {}, "error": null}\n'),
        ("samples.jsonl", b"\x1f\x8b\x08\x00"),
    ],
)
def test_what_is_no_evaluation(tmp_path, name, content):
    """Damaged files and JSON of another shape are one line that names the place."""
    written(tmp_path, make({"A": 0}))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        results.read(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_folders_that_hold_none(tmp_path):
    """No folder, an empty one, a folder in a file's place, and a name too long are one line too."""
    (tmp_path / "results.json").mkdir()
    for given in (tmp_path / "none", tmp_path, "x" * 5000, "~no_such_user/x", "a\0b"):
        with pytest.raises(UserError, match="^[^\n]*no evaluation can be read there"):
            results.read(given)
