"""task=compare on results written by hand: every number from an independent computation, every bad input one line."""

import json
import math

import numpy as np
import pytest

from rpo import config, stats
from rpo.errors import UserError
from rpo.evals import pairing, results
from rpo.evals.results import Evaluation, Item
from rpo.tasks import compare
from tests.helpers.runs import settings


def make_items(scores, metric="win", per_cluster=1, **more):
    """One sample per score; None is an item in error."""
    blank = {"prompt": None, "response": None, "against": None, "details": {}}
    return [
        {"id": f"q{i}", "cluster": f"c{i // per_cluster}", "scores": {} if s is None else {metric: s}}
        | {"error": "no answer" if s is None else None}
        | blank
        | more
        for i, s in enumerate(scores)
    ]


def write_results(folder, models, task="winrate", unusable=None, config=None, **details):
    """An evaluation as `results.write` leaves it: {model: items}."""
    folder.mkdir()
    cells = {name: {"win": {"value": 0.5, "se": 0.1, "n": 9} | (unusable or {})} for name in models}
    made = {"task": task, "models": cells, "notes": [], "details": details, "config": config or {}}
    made |= {"versions": {"rpo": "1"}}
    (folder / "results.json").write_text(json.dumps(made))
    rows = [{"model": name} | item for name, items in models.items() for item in items]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_cfg(*folders, **more):
    return settings(
        "task=compare",
        f"task.results=[{','.join(map(str, folders))}]",
        *(f"{name.replace('__', '.')}={value}" for name, value in more.items()),
        name="eval",
    )


def compared(*folders, **more):
    return compare.run(make_cfg(*folders, **more), None)


def test_two_models_against_plain_arithmetic(tmp_path):
    """Value, error, interval, p, detectable and needed of clustered differences, computed here by loops and formulas.

    The second folder's items come in another order and under other names of clusters: pairing is by id.
    """
    rng = np.random.default_rng(0)
    hard = np.repeat(rng.normal(size=10), 2)
    a, b = hard + 0.4 + 0.3 * rng.normal(size=20), hard + 0.3 * rng.normal(size=20)
    one = write_results(tmp_path / "one", {"A": make_items(a.tolist(), per_cluster=2)})
    items = [item | {"cluster": item["cluster"].upper()} for item in make_items(b.tolist(), per_cluster=2)]
    two = write_results(tmp_path / "two", {"B": items[::-1]})
    made = compared(one, two)
    cell = made.models["A - B"]["win"]
    d = a - b
    se = math.sqrt(10 / 9 * sum((d[i : i + 2] - d.mean()).sum() ** 2 for i in range(0, 20, 2))) / 20
    signs = np.array([[1 - 2 * (pattern >> g & 1) for g in range(10)] for pattern in range(1024)])
    p = np.mean(np.abs(signs @ (d[::2] + d[1::2])) >= abs(d.sum()) - 1e-9)
    assert cell == {
        "value": pytest.approx(d.mean()),
        "se": pytest.approx(se),
        "interval": pytest.approx([d.mean() - 2.2621571628 * se, d.mean() + 2.2621571628 * se]),
        "n": 20,
        "n_error": 0,
        "clusters": 10,
        "n_first": 0,
        "n_second": 0,
        "p": pytest.approx(p),
        "p_holm": pytest.approx(p),
        "detectable": pytest.approx(3.1496356783 * se),  # P(t of 9 df and this noncentrality > 2.2621571628) = .8
        "needed": 26,
    }
    sigma = se * math.sqrt(10)  # of 25 and 24 degrees of freedom, the .975 and .8-quantiles
    assert (2.05954 + 0.85624) * sigma / math.sqrt(26) <= d.mean() < (2.06390 + 0.85686) * sigma / math.sqrt(25)
    assert se < math.sqrt(a.var() + b.var()) / math.sqrt(20) / 2  # what pairing is for
    assert [sample.id for sample in made.items] == [f"q{i}" for i in range(20)]
    assert made.items[3] == Item(
        model="A - B",
        id="q3",
        cluster="c1",
        scores={"win": pytest.approx(d[3])},
        details={"first": {"win": a[3]}, "second": {"win": b[3]}},
    )
    assert made.notes == [] and made.details == {
        "results": [str(one), str(two)],
        "of_task": "winrate",
        "pairs": [["A", "B"]],
        "comparisons": 1,
    }
    flipped = compared(two, one).models["B - A"]["win"]
    assert (flipped["value"], flipped["p"]) == (pytest.approx(-cell["value"]), cell["p"])


def test_items_that_failed_or_are_of_one_model(tmp_path):
    """Failures of either model and items of one are counted apart, and none is in the mean."""
    one = {"A": [*make_items([1, 1, None, 0, None, 1, 1]), *make_items([1.0], metric="turn_2", turn=2)]}
    one["A"][-1]["id"] = "second"
    two = {"B": make_items([0, 1, 1, None, None])}
    (blank,) = make_items([1], metric="win")
    two["B"] += [blank | {"id": "new", "cluster": "new"}]
    two["B"] += [blank | {"id": "second", "scores": {"turn_2": 0.5}}]
    one["A"] += [blank | {"id": "third", "scores": {}, "error": "late"}]  # of turn 2, as B's shows
    two["B"] += [blank | {"id": "third", "scores": {"turn_2": 0.5}}]
    made = compared(write_results(tmp_path / "one", one), write_results(tmp_path / "two", two))
    cell = made.models["A - B"]["win"]
    assert (cell["value"], cell["n"], cell["n_error"]) == (0.5, 2, 3)
    assert (cell["n_first"], cell["n_second"]) == (2, 1)
    turn_2 = made.models["A - B"]["turn_2"]
    assert (turn_2["n"], turn_2["n_error"], turn_2["n_second"]) == (1, 2, 0)  # third, and the one that both failed
    assert [sample.error for sample in made.items] == [
        None,
        None,
        "A: no answer",
        "B: no answer",
        "A: no answer; B: no answer",
        None,
        "A: late",
    ]
    said = compare.table(made)
    assert "win: inconclusive" in said and "left out: 2 that only A has and 1 that only B has; 3 failed" in said
    assert made.models["A - B"]["turn_2"]["se"] is made.models["A - B"]["turn_2"]["detectable"] is None


def test_many_models_are_adjusted_together(tmp_path):
    """All pairs of models by all metrics share one Holm adjustment; a baseline leaves the comparisons with it."""
    rng = np.random.default_rng(1)
    models = {}
    for i, name in enumerate("ABC"):
        items = make_items((rng.random(40) + 0.1 * i).tolist())
        models[name] = [item | {"scores": item["scores"] | {"length": float(rng.integers(9, 50))}} for item in items]
    folder = write_results(tmp_path / "all", models)
    made = compared(folder)
    assert list(made.models) == ["A - B", "A - C", "B - C"] and made.details["comparisons"] == 6
    cells = [made.models[pair][metric] for pair in made.models for metric in ("win", "length")]
    assert [cell["p_holm"] for cell in cells] == pytest.approx(stats.holm([cell["p"] for cell in cells]))
    assert any(cell["p_holm"] > cell["p"] for cell in cells)
    against = compared(folder, baseline="B", task__metrics="win")
    assert {pair: list(by_metric) for pair, by_metric in against.models.items()} == {"A - B": ["win"], "C - B": ["win"]}
    assert against.models["A - B"]["win"]["p"] == made.models["A - B"]["win"]["p"]
    assert against.models["C - B"]["win"]["value"] == pytest.approx(-made.models["B - C"]["win"]["value"])
    assert list(compared(folder, task__metrics="[length,win]").models["A - B"]) == ["length", "win"]


def test_a_metric_that_one_model_lacks_is_said(tmp_path):
    """It is left out of that pair, with a note."""
    items = [item | {"scores": item["scores"] | {"length": 3}} for item in make_items([1, 0, 1])]
    made = compared(write_results(tmp_path / "all", {"A": items, "B": make_items([1, 1, 0])}))
    assert list(made.models["A - B"]) == ["win"]
    assert made.notes == ["A - B: no item has scores of both by length"]


def judged(model, scores, against, suffix=""):
    """Items of a win rate, as both pairwise tasks write them."""
    return [
        item | {"id": item["id"] + suffix, "against": {"model": against, "response": None}}
        for item in make_items(scores)
    ]


def test_two_that_were_judged_against_each_other(tmp_path):
    """The second's rate is one less the first's: items count once, p and interval are those of the rate against a half."""
    scores = [1, 1, 0.5, 1, 0, 1, 1, 0.75, 1, 1]
    models = {"A": judged("A", scores, "B"), "B": judged("B", [1 - s for s in scores], "A")}
    made = compared(write_results(tmp_path / "one", models))
    cell, rate = made.models["A - B"]["win"], stats.clustered_mean(scores, range(10))
    assert cell["n"] == 10 and cell["value"] == pytest.approx(2 * rate["value"] - 1)
    assert cell["interval"] == pytest.approx([2 * bound - 1 for bound in rate["interval"]])
    assert cell["p"] == stats.sign_flip_test(np.array(scores) - 0.5, range(10), seed=0)
    (note,) = made.notes
    assert note == "A - B: they were judged against each other, so that win_rate is twice the first's, less 1"


def test_win_rates_against_different_opponents_are_left_out(tmp_path):
    """Rates against one opponent pair; against several, or ones of different folders, they are left out with a note."""
    a, b = [1, 0, 1, 1], [1, 0, 0, 1]
    one = write_results(tmp_path / "one", {"A": judged("A", a, "X"), "X": judged("X", [1 - s for s in a], "A")})
    two = write_results(tmp_path / "two", {"B": judged("B", b, "X"), "X": judged("X", [1 - s for s in b], "B")})
    made = compared(one, two)
    assert list(made.models) == ["A - X (one)", "A - B", "B - X (two)"] and made.details["comparisons"] == 3
    assert made.models["A - B"]["win"]["value"] == 0.25
    left_out = [note for note in made.notes if "left out" in note]
    assert len(left_out) == 3
    assert left_out[0] == "A - X (two): left out: they were judged against X and B, not against one model"
    x = [*judged("X", [0, 1], "A", ":A"), *judged("X", [0, 1], "B", ":B")]  # as MT-Bench's baseline has its items
    three = write_results(tmp_path / "three", {"A": judged("A", [1, 0], "X"), "B": judged("B", [1, 0], "X"), "X": x})
    made = compared(three)
    assert list(made.models) == ["A - B"] and len(made.notes) == 2
    with pytest.raises(UserError, match="nothing to compare: A - X: left out: they were judged against each other"):
        compared(three, baseline="X")
    other = write_results(tmp_path / "other", {"C": judged("C", [1, 0], "Y")})
    only = write_results(tmp_path / "only", {"D": judged("D", [1, 0], "X")})
    with pytest.raises(UserError, match="nothing to compare: C - D: left out: they were judged against Y and X"):
        compared(other, only)


def asked(**more):
    """Facts of an evaluation that asked a judge."""
    return {"judge": {"model": "j", "served": ["j-1"], "prompt": "own"} | more}


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        (asked(), asked(model="k"), "judge j and k"),
        (asked(), asked(served=["j-2"]), "served j-1 and j-2"),
        (asked(), asked(prompt="pair-v2"), "prompt own and pair-v2"),
        (asked(), asked() | {"verdict": "logprobs"}, "verdict text and logprobs"),
        (asked() | {"verdict": "text"}, {"annotations": "a", "verdict": "logprobs"}, "verdict text and logprobs"),
        (asked(), {"annotations": "a", "judges": ["k"]}, "judge j and k"),
        ({"annotations": "a", "judges": ["j"]}, {"annotations": "b", "judges": ["k"]}, "judge j and k"),
    ],
)
def test_scores_by_different_judges_are_left_out(one, two, said, tmp_path):
    """Another judge, served model, prompt or form of verdict: no difference between the models; one judge: they pair."""
    first = write_results(tmp_path / "one", {"A": make_items([1, 0, 1])}, **one)
    second = write_results(tmp_path / "two", {"B": make_items([0, 0, 1])}, **two)
    with pytest.raises(UserError, match=f"nothing to compare: A - B: left out: they were not judged alike: {said}$"):
        compared(first, second)
    third = write_results(tmp_path / "three", {"C": make_items([0, 1, 1])}, **one)
    made = compared(first, second, third)
    assert list(made.models) == ["A - C"] and sum("left out" in note for note in made.notes) == 2


def test_judgments_that_do_not_say_by_whom(tmp_path):
    """They are compared, and it is said; two judges that task=judge_check looks at are what it compares."""
    first = write_results(tmp_path / "one", {"A": make_items([1, 0, 1])}, **asked())
    second = write_results(tmp_path / "two", {"B": make_items([0, 0, 1])}, annotations="a.jsonl")
    told = f"{second}: who judged is not said there; see that it is the judge of the others"
    assert compared(first, second).notes.count(told) == 1
    judges = [
        write_results(tmp_path / name, {name: make_items([1, 0, 1])}, task="judge_check", **asked(model=name))
        for name in "jk"
    ]
    assert list(compared(*judges).models) == ["j - k"]


def test_one_name_in_two_folders(tmp_path):
    """Two evaluations of one path are told apart by their folders; a name that is there once stays as it is."""
    (tmp_path / "x").mkdir()
    one = write_results(tmp_path / "one", {"A": make_items([1, 0]), "B": make_items([0, 0])})
    two = write_results(tmp_path / "two", {"A": make_items([0, 0])})
    assert list(compared(one, two).models) == ["A (one) - B", "A (one) - A (two)", "B - A (two)"]
    deep = write_results(tmp_path / "x" / "one", {"A": make_items([0, 0])})
    assert list(compared(one, deep, baseline="B").models) == [f"A ({one}) - B", f"A ({deep}) - B"]


def test_an_opponent_that_gave_other_answers_is_another(tmp_path):
    """Rates against one name whose answers differ are left out, with how many do; answers that are not known do not count."""

    def met(name, *answers):
        items = judged(name, [1, 0, 1], "X")
        return [i | {"against": {"model": "X", "response": said}} for i, said in zip(items, answers, strict=True)]

    one, two, three = (
        write_results(tmp_path / name, {name: met(name, *answers)})
        for name, answers in (("A", "abc"), ("B", "aBC"), ("C", ("a", None, "c")))
    )
    said = "A - B: left out: X gave other answers on 2 of 3 items; judge both against the same ones"
    with pytest.raises(UserError, match=f"nothing to compare: {said}"):
        compared(one, two)
    assert list(compared(one, three).models) == ["A - C"]


@pytest.mark.parametrize("task", ["pairs", "generate", "mbpp"])
def test_lines_of_another_content_are_not_paired(tmp_path, task):
    """Ids that number lines pair only where the files' digests are the same, or one is not known; mbpp numbers problems."""
    one, two, old = (
        write_results(tmp_path / name, {name: make_items([1, 0])}, task=task, data=data)
        for name, data in (("A", {"digest": "1"}), ("B", {"digest": "2"}), ("C", "a.jsonl"))
    )
    assert list(compared(one, old).models) == ["A - C"]
    if task == "mbpp":
        assert list(compared(one, two).models) == ["A - B"]
    else:
        with pytest.raises(UserError, match=f"{one} and {two}: the data had another content"):
            compared(one, two)


@pytest.mark.parametrize("task", ["mt_bench", "mbpp"])
def test_numbers_of_other_questions_are_not_paired(tmp_path, task):
    """Ids that number questions pair only where what was asked is the same, or not known of one; alike ones do as before."""
    one, other, same, old = (
        write_results(tmp_path / name, {name: make_items([1, 0], prompt=asked)}, task=task)
        for name, asked in (("A", "Add."), ("B", "Subtract."), ("C", "Add."), ("D", None))
    )
    with pytest.raises(UserError, match=f"{one} and {other}: the data had another content"):
        compared(one, other)
    assert list(compared(one, same).models) == ["A - C"] and list(compared(other, old).models) == ["B - D"]


def test_notes_say_what_was_made_otherwise(tmp_path):
    """Other settings, data or versions are named; the models, their answers and run_dir differ by nature."""
    one = {"model": {"path": "A"}, "run_dir": "x", "task": {"temperature": 0.0, "limit": 5}}
    two = {"model": {"path": "B"}, "run_dir": "y", "task": {"temperature": 1.0, "limit": None}}
    folders = [
        write_results(tmp_path / "one", {"A": make_items([1, 0])}, config=one, data="a.jsonl"),
        write_results(tmp_path / "two", {"B": make_items([1, 0])}, config=two, data="b.jsonl"),
    ]
    made = compared(*folders)
    assert made.notes == [
        f"{folders[0]} and {folders[1]} were not made alike: task.temperature=0.0, here 1.0; data=a.jsonl, here b.jsonl"
    ]


def test_too_few_draws_for_so_many_comparisons_are_said(tmp_path):
    """Where m / (1 + draws) is above 5%, no Holm-adjusted p can be below."""
    models = {f"m{i}": make_items([float(i), 1.0, 0.0] * 6) for i in range(11)}
    folder = write_results(tmp_path / "all", models)
    made = compared(folder, task__draws=1000)
    assert made.notes == [
        "of 55 comparisons with task.draws=1000 none by more than 15 clusters can be detected above chance (Holm p at least "
        "0.055); raise task.draws, or give baseline"
    ]
    assert compared(folder).notes == compared(folder, task__draws=1000, baseline="m0").notes == []
    few = write_results(tmp_path / "few", {name: items[:15] for name, items in models.items()})
    assert compared(few, task__draws=1000).notes == []
    sure = write_results(tmp_path / "sure", {"A": make_items([1] * 40), "B": make_items([0] * 40)})
    assert compared(sure, task__draws=2000).models["A - B"]["win"]["p"] == 1 / 2001


def make_cell(**more):
    return {
        "value": 0.031,
        "se": 0.01,
        "interval": [0.01, 0.052],
        "n": 400,
        "n_error": 0,
        "clusters": 200,
        "n_first": 0,
        "n_second": 0,
        "p": 0.004,
        "p_holm": 0.012,
        "detectable": 0.028,
        "needed": 164,
    } | more


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "A is above B by 0.031 (95% 0.01 to 0.052; p 0.004, Holm 0.012)"),
        (
            {"value": -0.031, "interval": [-0.052, -0.01]},
            "B is above A by 0.031 (95% 0.01 to 0.052; p 0.004, Holm 0.012)",
        ),
        (
            {"p": 0.03, "p_holm": 0.09, "n_error": 3},
            "A is above B by 0.031 (95% 0.01 to 0.052; p 0.03, Holm 0.09), which among 3 comparisons may be luck; 3 failed",
        ),
        (
            {"value": -0.01, "interval": [-0.03, 0.01], "p": 0.3, "p_holm": 0.6, "needed": 1570, "n_second": 7},
            "no difference seen between A and B: B is above by 0.01 (95% -0.01 to 0.03; p 0.3, Holm 0.6); a true "
            "difference of 0.028 would be seen in 80% of such comparisons, a smaller one in fewer; one as large as that "
            "seen needs about 1570 clusters; left out: 7 that only B has",
        ),
        (
            {"value": 0.0, "interval": [-0.02, 0.02], "p": 1.0, "p_holm": 1.0, "needed": None},
            "no difference seen between A and B: it is 0 (95% -0.02 to 0.02; p 1, Holm 1); a true difference of 0.028 would "
            "be seen in 80% of such comparisons, a smaller one in fewer",
        ),
        (
            {"value": 0.0, "se": 0.0, "interval": None, "p": 1.0, "p_holm": 1.0, "detectable": None, "needed": None},
            "A and B have the same mean in each cluster: nothing varied over 200 clusters, so there is no interval, nor a "
            "smallest difference to be seen",
        ),
        (
            {"value": -0.5, "se": 0.0, "interval": None, "detectable": None, "needed": None},
            "B is above A by 0.5 (nothing varied over 200 clusters, so there is no interval; p 0.004, Holm 0.012)",
        ),
        (
            {"clusters": 5, "p": 0.0625, "p_holm": 0.1875},
            "inconclusive: with 5 clusters the smallest possible p is 0.062; use more prompts",
        ),
    ],
)
def test_the_verdict_in_words(more, said):
    """What is said of a difference that is sure, sure alone, not seen, none at all, or of too few clusters."""
    assert pairing.verdict(make_cell(**more), "A", "B", 3) == said


def test_lines_are_a_table_and_verdicts(tmp_path):
    """One row and one sentence per comparison; folders that all names share are left out of them."""
    scores = {"runs/a/model": [1] * 30, "runs/b/model": [0, 1] * 15, "runs/c/x/model": [0, 1] * 15}
    folder = write_results(tmp_path / "all", {name: make_items(each) for name, each in scores.items()})
    made = compared(folder)
    table = compare.table(made).splitlines()
    assert table[0].split() == "metric model minus difference 95% p Holm n detectable".split()
    assert table[1].split()[:4] == ["win", "a", "b", "0.5"]
    assert len(table) == 7
    assert table[4].startswith("win: a is above b by 0.5 (95% 0.31 to 0.69; p 6.1e-05, Holm 0.00018)")
    assert table[6].startswith("win: b and c/x have the same mean in each cluster: nothing varied over 30 clusters")
    cell = made.models["runs/b/model - runs/c/x/model"]["win"]
    assert cell["se"] == 0 and cell["interval"] is cell["detectable"] is cell["needed"] is None


def test_what_results_write_leaves_is_compared(tmp_path):
    """Through the files: an evaluation is written, read and compared, and so is the comparison written and read back."""
    cfg = settings("task=pairs", "model.path=[A,B]", name="eval")
    for i, name in enumerate(("one", "two")):
        scores = np.random.default_rng(i).random(12).tolist()
        (tmp_path / name).mkdir()
        models = {name: {"win": stats.with_errors(stats.clustered_mean(scores, range(12)), 0)}}
        made = Evaluation(models, [Item(model=name, **item) for item in make_items(scores)], details={"data": "x"})
        results.write(tmp_path / name, cfg, made, results.table)
    cfg = make_cfg(tmp_path / "one", tmp_path / "two", run_dir=tmp_path)
    made = compare.run(cfg, None)
    (tmp_path / "out").mkdir()
    results.write(tmp_path / "out", cfg, made, results.table)
    back = results.read(tmp_path / "out")
    assert back.models == made.models and back.items == made.items and back.task == "compare"
    assert back.details["pairs"] == [["one", "two"]] and back.config == config.to_dict(cfg)
    with pytest.raises(UserError, match="is a comparison; give the evaluations"):
        compared(tmp_path / "out")


def broken(case, tmp_path):
    """The folders of one bad input."""
    good = make_items([1, 0, 1])
    two = {"B": make_items([0, 0, 1])}
    match case:
        case "two tasks":
            return [write_results(tmp_path / "one", {"A": good}), write_results(tmp_path / "two", two, task="mbpp")]
        case "one model":
            return [write_results(tmp_path / "one", {"A": good})]
        case "no models":
            return [write_results(tmp_path / "one", {})]
        case "twice":
            return [write_results(tmp_path / "one", {"A": good}), tmp_path / "one" / "results.json"]
        case "an id twice":
            return [write_results(tmp_path / "one", {"A": [*good, good[1]]} | two)]
        case "no common ids":
            return [write_results(tmp_path / "one", {"A": [i | {"id": "x" + i["id"]} for i in good]} | two)]
        case "no scores":
            return [write_results(tmp_path / "one", {"A": [i | {"scores": {}} for i in good]} | two)]
        case "no ids":
            return [write_results(tmp_path / "one", {"A": [{"text": "x"}], "B": [{"text": "y"}]}, task="generate")]
        case "no samples":
            folder = write_results(tmp_path / "one", {"A": good} | two)
            (folder / "samples.jsonl").unlink()
            return [folder]
        case "nan":
            return [write_results(tmp_path / "one", {"A": make_items([1, math.nan])} | two)]
        case "null":
            return [write_results(tmp_path / "one", {"A": [good[0] | {"scores": {"win": None}}]} | two)]
        case "huge":
            return [write_results(tmp_path / "one", {"A": make_items([10**400, 1])} | two)]
        case "scores":
            return [write_results(tmp_path / "one", {"A": [good[0] | {"scores": [1]}]} | two)]
        case "cluster" | "against":
            return [
                write_results(
                    tmp_path / "one", {"A": [good[0] | {case: [1] if case == "cluster" else {"model": 1}}]} | two
                )
            ]
        case "lines" | "deep" | "not utf-8":
            folder = write_results(tmp_path / "one", {"A": good} | two)
            text = {"lines": b"[1]\n", "deep": b"[" * 100_000, "not utf-8": b'{"model": "\xff"}\n'}[case]
            (folder / "samples.jsonl").write_bytes(text)
            return [folder]
        case "cells":
            folder = write_results(tmp_path / "one", {"A": good} | two)
            (folder / "results.json").write_text('{"task": "winrate", "models": {"A": 3}}')
            return [folder]
        case "unusable":
            reason = {"value": None, "se": None, "unusable": "12 of 160 items failed"}
            return [write_results(tmp_path / "one", {"A": good} | two, unusable=reason)]
        case "clusters":
            return [write_results(tmp_path / "one", {"A": make_items([1, 0, 1, 1], per_cluster=2)} | two)]
        case "nothing there":
            return [tmp_path / "one"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("two tasks", "one (task=winrate), {}/two (task=mbpp); expected evaluations by one task"),
        ("one model", "{}/one: has one model, A; give another folder of the same task"),
        ("no models", "{}/one: has no models; give another folder"),
        ("twice", "{}/one is given twice"),
        ("an id twice", "{}/one/samples.jsonl: A: id q1 is there twice"),
        ("no common ids", "no item has scores of both by win; their ids are like xq0 and q0"),
        ("no scores", "{}/one: samples.jsonl has no scores of A"),
        ("no ids", "{}/one/samples.jsonl:1: field id: expected a string, got None; fix the row"),
        ("no samples", "{}/one: samples.jsonl has no scores of A"),
        ("nan", "{}/one/samples.jsonl: A: id q1: win=nan: expected a finite number"),
        ("null", "{}/one/samples.jsonl:1: field scores: expected a number, got {'win': None}"),
        ("unusable", "{}/one: A is unusable (12 of 160 items failed)"),
        ("huge", "{}/one/samples.jsonl:1: field scores: expected a number, got {'win': 1000"),
        ("scores", "{}/one/samples.jsonl:1: field scores: expected a mapping, got [1]"),
        ("cluster", "{}/one/samples.jsonl:1: field cluster: expected a string, got [1]"),
        ("against", "{}/one/samples.jsonl:1: field against: expected null or a string, got {'model': 1}"),
        ("lines", "{}/one/samples.jsonl:1: expected an object with"),
        ("deep", "{}/one: no evaluation can be read there"),
        ("not utf-8", "{}/one: no evaluation can be read there"),
        ("cells", "{}/one/results.json: field models: expected a mapping, got {'A': 3}"),
        ("clusters", "the items that belong together (cluster in samples.jsonl) are not the same ones"),
        ("nothing there", "{}/one: no evaluation can be read there"),
    ],
)
def test_what_can_not_be_compared(case, message, tmp_path):
    """One line that names the folder and what was expected."""
    with pytest.raises(UserError) as error:
        compared(*broken(case, tmp_path))
    assert message.replace("{}", str(tmp_path)) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"baseline": "C"}, "baseline=C: expected one of A, B"),
        ({"task__metrics": "[win,elo]"}, "task.metrics: no item has a score elo; there are win"),
        ({"task__metrics": "[]"}, "task.metrics=[]: expected null or one or a list of them"),
        ({"task__results": "null"}, "task.results=null: give the folders"),
        ({"task__draws": 10}, "task.draws=10: expected at least 1000"),
        ({"model__path": "A"}, "model.path=A with task=compare: it reads none"),
    ],
)
def test_settings_that_do_not_fit(more, message, tmp_path):
    """One line that names the key."""
    folder = write_results(tmp_path / "one", {"A": make_items([1, 0]), "B": make_items([0, 0])})
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        compared(folder, **more)
    assert message in str(error.value)
