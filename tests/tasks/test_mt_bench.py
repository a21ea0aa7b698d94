"""MT-Bench with judges that are plain functions, and on stored judgments, against counts by hand and published figures."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
from rpo import dist
from rpo.errors import UserError
from rpo.evals.context import Answer
from rpo.judging import mt_bench_files
from rpo.judging.client import Reply
from rpo.tasks import mt_bench
from tests.helpers.contexts import StubContext
from tests.helpers.evaluations import lines
from tests.helpers.judge_server import JudgeServer
from tests.helpers.rows import WORDS, write_jsonl
from tests.helpers.runs import settings

IDS = (81, 91, 101, 111, 121, 131, 141, 151)
DATA = pytest.mark.skipif("RPO_TEST_DATA" not in os.environ, reason="RPO_TEST_DATA names no folder with real data")
JUDGED = ("task=mt_bench", "judge.model=org/judge", "judge.base_url=http://localhost:1/v1")


def reply(text="", **more):
    given = {"top_logprobs": None, "finish_reason": "stop", "input_tokens": 10, "output_tokens": 5, "model": "j"}
    return Reply(**{"text": text, "error": None} | given | more)


def judge_of(say):
    """An `ask` whose judge replies say(what it is shown), a text or a Reply."""

    def ask(requests):
        ask.shown += [request.messages for request in requests]
        said = [say(request.messages[1]["content"]) for request in requests]
        return [one if isinstance(one, Reply) else reply(one) for one in said]

    ask.shown = []
    return ask


def answer_rows(model, text):
    return [
        {
            "question_id": number,
            "answer_id": f"{number}",
            "model_id": model,
            "choices": [{"index": 0, "turns": [f"{text} first {number}", f"{text} second {number}"]}],
            "tstamp": 0.0,
        }
        for number in IDS
    ]


@pytest.fixture
def files(tmp_path):
    """question.jsonl with one question of each category, references of three, answers of two models."""
    questions = [
        {"question_id": n, "category": mt_bench_files.category_of(n), "turns": [f"ask {n}", f"more {n}"]} for n in IDS
    ]
    write_jsonl(tmp_path / "question.jsonl", questions)
    needed = [row for row in answer_rows("gpt-4", "ref") if row["question_id"] in (101, 111, 121)]
    write_jsonl(tmp_path / "references.jsonl", needed)
    for model, text in (("good", "+"), ("bad", "-")):
        write_jsonl(tmp_path / f"{model}.jsonl", answer_rows(model, text))
    return tmp_path


def evaluate(files, ask, *more, answer=None):
    given = (f"task.questions={files / 'question.jsonl'}", *more)
    return mt_bench.run(settings(*JUDGED, *given, name="eval"), StubContext(files, answer=answer, ask=ask))


def values(cells):
    return {name: cell["value"] for name, cell in cells.items()}


def single(**changed):
    row = {"question_id": 81, "model": "m", "judge": ["gpt-4", "single-v1"], "user_prompt": "p", "turn": 1}
    return row | {"judgment": "Rating: [[7]]", "score": 7, "tstamp": 0.0} | changed


def pair(first="model_1", second="model_1", **changed):
    row = {"question_id": 81, "model_1": "a", "model_2": "b", "turn": 1, "judge": ["gpt-4", "pair-v2"]}
    return row | {"g1_winner": first, "g2_winner": second} | changed


def stored(tmp_path, rows, *more):
    write_jsonl(tmp_path / "stored.jsonl", rows)
    cfg = settings("task=mt_bench", f"annotations={tmp_path / 'stored.jsonl'}", *more, name="eval")
    return mt_bench.run(cfg, StubContext(tmp_path))


# ---- single


def test_ratings_by_turn_and_category(files, group):
    """A judge that gives 8 for first turns, 4 for second ones and one more for math: all means are as by hand."""

    def rate(shown):
        return f"So. Rating: [[{(4 if 'more' in shown else 8) + ('ask 111' in shown)}]]"

    made = evaluate(files, judge_of(rate), f"outputs={files / 'good.jsonl'}")
    found = values(made.models["good"])
    assert found["score"] == pytest.approx(6 + 1 / 8)
    assert (found["score/turn_1"], found["score/turn_2"]) == pytest.approx((8 + 1 / 8, 4 + 1 / 8))
    assert (found["score/math"], found["score/writing"], found["score/humanities"]) == (7, 6, 6)
    by_question = np.array([6, 6, 6, 7, 6, 6, 6, 6])  # the standard error is of questions: turns of one are together
    assert made.models["good"]["score"]["se"] == pytest.approx(by_question.std(ddof=1) / np.sqrt(8))
    assert made.models["good"]["score"]["n"] == 16
    assert made.items[0].response == "+ first 81" and made.items[0].prompt == "ask 81"


def test_what_the_judge_is_shown(files, group):
    """Second turns show the first, references are shown for reasoning, math and coding, and only where they are given."""
    for references in (True, False):
        more = (f"task.references={files / 'references.jsonl'}",) * references
        ask = judge_of(lambda shown: "[[5]]")
        evaluate(files, ask, f"outputs={files / 'good.jsonl'}", *more)
        assert len(ask.shown) == 16
        for messages in ask.shown:
            text = messages[1]["content"]
            (number,) = [n for n in IDS if f"ask {n}" in text]
            second = f"more {number}" in text
            assert f"+ first {number}" in text and (f"+ second {number}" in text) == second
            assert (f"ref first {number}" in text) == (references and number in (101, 111, 121))
            assert (f"ref second {number}" in text) == (references and second and number in (101, 111, 121))


def test_unparsed_ratings_are_counted(files, group):
    """A refusal, a rating off the scale, a reply cut short and a failed request are errors with reasons; none is a 0."""
    odd = {
        "ask 81": "I can not.",
        "ask 91": "[[0]]",
        "ask 101": reply("[[9]] would", finish_reason="length"),
        "ask 111": reply(error="HTTP 500: down"),
    }
    say = judge_of(lambda shown: next((said for key, said in odd.items() if key in shown), "[[6]]"))
    made = evaluate(files, say, f"outputs={files / 'good.jsonl'}")
    cell = made.models["good"]["score"]
    assert (cell["value"], cell["n"], cell["n_error"]) == (6, 8, 8)
    assert made.models["good"]["score/writing"] == {"value": None, "se": None, "interval": None, "n": 0, "n_error": 2}
    reasons = {sample.error for sample in made.items}
    assert {str(reason).split(":")[0] for reason in reasons} == {
        "None",
        "no rating from 1 to 10 in the judge's reply",
        "the judge's reply was cut at judge.max_tokens",
        "HTTP 500",
    }
    rows = lines(files / "model_judgment" / "org_judge_single.jsonl")
    assert sorted(row["score"] for row in rows) == [-1] * 8 + [6] * 8
    again = stored(files, rows)
    assert again.models == made.models
    assert [s.error for s in again.items] == [s.error for s in made.items]


def test_stored_ratings_with_errors(tmp_path):
    """FastChat's -1 and $ERROR$ are counted, not averaged, and turns of one question are one cluster."""
    rows = [single(question_id=n, turn=turn, score=s) for n, turn, s in ((81, 1, 8), (81, 2, 6), (82, 1, 5.5))]
    rows.append(single(question_id=82, turn=2, score=-1, judgment="$ERROR$"))
    rows += [single(question_id=83, turn=1, score=-1, judgment="no idea"), single(question_id=83, turn=2, score=10)]
    made = stored(tmp_path, rows)
    cell = made.models["m"]["score"]
    assert (cell["value"], cell["n"], cell["n_error"]) == (pytest.approx(29.5 / 4), 4, 2)
    assert [s.error for s in made.items if s.error] == [
        "the judge gave no reply",
        "no verdict in the judge's reply",
    ]
    assert made.details["kind"] == "single" and made.details["judges"] == ["gpt-4"]
    deviations = np.array([14 - 2 * 7.375, 5.5 - 7.375, 10 - 7.375])  # sums by question
    assert cell["se"] == pytest.approx(np.sqrt(3 / 2 * (deviations**2).sum()) / 4)


# ---- pairwise


def test_pairs_in_both_orders(files, group):
    """A judge that knows the good answers: one model wins all, the other none, FastChat's file says so in its own terms."""

    def prefer(shown):
        return "[[A]]" if shown.index("+ first") < shown.index("- first") else "[[B]]"

    more = ("task.mode=pairwise", f"outputs={files / 'good.jsonl'}", f"baseline={files / 'bad.jsonl'}")
    made = evaluate(files, judge_of(prefer), *more)
    good, bad = values(made.models["good"]), values(made.models["bad"])
    assert (good["win_rate"], bad["win_rate"], good["order_consistency"], good["first_position"]) == (1, 0, 1, 0.5)
    assert (good["win_rate/turn_2"], bad["win_rate/coding"]) == (1, 0)
    rows = lines(files / "model_judgment" / "org_judge_pair.jsonl")
    assert len(rows) == 16
    for row in rows:
        assert (row["model_1"], row["model_2"], row["g1_winner"], row["g2_winner"]) == (
            "good",
            "bad",
            "model_1",
            "model_1",
        )
        assert row["g1_user_prompt"].index("+ first") < row["g1_user_prompt"].index("- first")
        assert row["g2_user_prompt"].index("- first") < row["g2_user_prompt"].index("+ first")
        assert row["g1_judgment"] == "[[A]]" and row["g2_judgment"] == "[[B]]"
    assert stored(files, rows).models == made.models
    assert made.items[0].response.startswith("+") and made.items[0].against["response"].startswith("-")


def test_a_judge_that_sees_positions_alone(files, group):
    """Always the first: no order agrees, all are ties, half for both."""
    more = ("task.mode=pairwise", f"outputs={files / 'good.jsonl'}", f"baseline={files / 'bad.jsonl'}")
    for model in evaluate(files, judge_of(lambda shown: "[[A]]"), *more).models.values():
        found = values(model)
        assert (found["win_rate"], found["ties"], found["order_consistency"], found["first_position"]) == (0.5, 1, 0, 1)


def test_every_pair_of_winners(tmp_path):
    """A win counts only if both orders say so, an error in either is counted and no tie, as FastChat's adjusted rate has it."""
    names = ("model_1", "model_2", "tie", "error")
    outcomes = [(first, second) for first in names for second in names]
    rows = [pair(*games, question_id=81 + i) for i, games in enumerate(outcomes)]
    made = stored(tmp_path, rows)
    wins, losses = outcomes.count(("model_1", "model_1")), outcomes.count(("model_2", "model_2"))
    ties = sum("error" not in games for games in outcomes) - wins - losses
    for model, own in (("a", wins), ("b", losses)):
        cell = made.models[model]["win_rate"]
        assert cell["value"] == pytest.approx((own + ties / 2) / (wins + losses + ties))
        assert (cell["n"], cell["n_error"]) == (9, 7)
    shown_first = [{"model_1": 1, "tie": 0.5, "model_2": 0}[a] + {"model_1": 0, "tie": 0.5, "model_2": 1}[b]
                   for a, b in outcomes if "error" not in (a, b)]  # fmt: skip
    assert made.models["a"]["first_position"]["value"] == pytest.approx(np.mean(shown_first) / 2)


def test_swapped_models_have_one_minus_the_rate(tmp_path):
    """A file that names its models the other way round gives each model what it had."""
    other = {"model_1": "model_2", "model_2": "model_1", "tie": "tie"}
    rng = np.random.default_rng(0)
    rows = [pair(*rng.choice(list(other), 2).tolist(), question_id=n, turn=t) for n in range(81, 161) for t in (1, 2)]
    swapped = [
        row
        | {"model_1": "b", "model_2": "a", "g1_winner": other[row["g2_winner"]], "g2_winner": other[row["g1_winner"]]}
        for row in rows
    ]
    one, two = stored(tmp_path, rows).models, stored(tmp_path, swapped).models
    for model in "ab":
        assert values(one[model]) == pytest.approx(values(two[model]))
    assert one["a"]["win_rate"]["value"] + one["b"]["win_rate"]["value"] == pytest.approx(1)


def test_several_opponents_are_told_apart(tmp_path):
    """A model that meets two others has a rate against each and none over both, and its items have different ids; the others
    have their one rate by both names."""
    rows = [pair("model_1", "model_1"), pair("model_2", "model_2", model_2="c")]
    made = stored(tmp_path, rows)
    a, b = values(made.models["a"]), values(made.models["b"])
    assert {name: a[name] for name in a if "win" in name} == {"win_rate/against/b": 1, "win_rate/against/c": 0}
    assert not {"ties", "losses"} & a.keys() and (a["order_consistency"], a["first_position"]) == (1, 0.5)
    assert (b["win_rate"], b["win_rate/against/a"], b["win_rate/writing"]) == (0, 0, 0)
    assert made.notes == ["a: met 2 models, so it has a rate against each and none over all"]
    assert len({(s.model, s.id) for s in made.items}) == 4


def test_what_is_said_of_judge_and_answers(files, group):
    """Answers without text are counted, and a judge that goes by position is named."""
    rewrite(files / "good.jsonl", lambda rows: rows[1]["choices"][0].update(turns=["", " \n"]))
    more = ("task.mode=pairwise", f"outputs={files / 'good.jsonl'}", f"baseline={files / 'bad.jsonl'}")
    found = evaluate(files, judge_of(lambda shown: "[[A]]"), *more)
    notes = found.notes
    assert found.details["empty_answers"] == {"good": 2, "bad": 0}
    assert notes[0].startswith("order_consistency is 0%: this judge's verdict on most items depends on their order")
    assert notes[1:] == ["good: 2 of 16 answers are empty"]


def test_judgments_that_we_read_otherwise_are_counted(tmp_path):
    """The stored verdict counts; where its text says another, results.json has the number."""
    rows = [pair("model_1", "tie", g1_judgment="[[A]]", g2_judgment="[[B]]"), pair(turn=2)]
    made = stored(tmp_path, rows)
    assert made.details["reread"] == {"judgments": 2, "differ": 1}
    assert made.items[0].scores == {"win_rate": 0.5}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gpt-4", "gpt-4"),
        ("org/model-7b.v1", "org_model-7b.v1"),
        ("/runs/a/model", "runs_a_model"),
        ("", r"[0-9a-f]{8}"),
        ("../..", r"[0-9a-f]{8}"),
        ("模型", r"[0-9a-f]{8}"),
        ("\ud800", r"[0-9a-f]{8}"),
        ("/one/" + "x" * 90, r"x{80}-[0-9a-f]{8}"),
    ],
)
def test_file_names(name, file):
    """Short plain names stay, others get a digest; no name is empty, leaves the folder, or is too long for one."""
    found = mt_bench_files.file_name(name)
    assert re.fullmatch(file, found) and len(found.encode()) < 100
    assert mt_bench_files.file_name(name + "?") != found


# ---- generation


def test_models_answer_the_second_turn_after_their_first(files, group):
    """Temperatures are MT-Bench's by category; the second turn's conversation holds the model's own first answer."""
    calls = []

    def answer(path, conversations, samplings):
        calls.append((path, conversations, samplings))
        return [Answer(f"{path} says {c[-1]['content']}", 5, i > 0) for i, c in enumerate(conversations)]

    more = ("model.path=[x/one,two]", "task.max_new_tokens=77")
    made = evaluate(files, judge_of(lambda shown: "[[5]]"), *more, answer=answer)
    assert [path for path, _, _ in calls] == ["x/one", "x/one", "two", "two"]
    assert calls[1][1][1] == [
        {"role": "user", "content": "ask 91"},
        {"role": "assistant", "content": "x/one says ask 91"},
        {"role": "user", "content": "more 91"},
    ]
    expected = {81: 0.7, 91: 0.7, 101: 0, 111: 0, 121: 0, 131: 0, 141: 0.1, 151: 0.1}
    for _, _, samplings in calls:
        assert [sampling.temperature for sampling in samplings] == list(expected.values())
        assert all((s.top_p, s.top_k, s.max_new_tokens) == (1, 0, 77) for s in samplings)
    assert made.details["cut_answers"] == {"x/one": 2, "two": 2}
    back = mt_bench_files.answers(str(files / "model_answer" / "x_one.jsonl"))
    assert back.model == "x/one" and back.turns[81] == ["x/one says ask 81", "x/one says more 81"]
    again = evaluate(files, judge_of(lambda shown: "[[5]]"), f"outputs={files / 'model_answer' / 'x_one.jsonl'}")
    assert again.models["x/one"] == made.models["x/one"]


# ---- bad input


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no rows"),
        (["text"], ":1: expected an object"),
        ([single(), single()], ":2: question 81, turn 1 of m is there already, at"),
        (
            [single(), pair()],
            ":2: expected only rows of gpt-4_single.jsonl or gpt-4_pair.jsonl, got a pair judgment after",
        ),
        ([pair(), pair(model_1="b", model_2="a")], ":2: question 81, turn 1 of a and b is there already, at"),
        ([{"prompt": "p", "output": "o"}], "gpt-4_pair.jsonl, got fields prompt, output"),
        ([single(question_id=7)], "question 7 (1 such): it is not MT-Bench's (81 to 160)"),
        ([single(question_id="81")], ":1: field question_id: expected an integer, got '81'"),
        ([single(turn=3)], ":1: field turn: expected 1 or 2"),
        ([single(score=None)], ":1: field score"),
        ([single(score=11)], ":1: field score"),
        ([single(score=float("nan"))], ":1: field score"),
        ([single(model=None)], ":1: field model: expected a string"),
        ([pair("A", "B")], ":1: field g1_winner: expected model_1|model_2|tie|error, got 'A'"),
        ([pair(model_2="a")], "expected two models in model_1, model_2, got 'a' twice"),
        (
            [single(), single(turn=2), single(question_id=82)],
            "1 of 4 judgments are missing, the first of m, question 82, turn 2",
        ),
        (
            [single(), single(question_id=82, model="n")],
            "2 of 4 judgments are missing, the first of m, question 82, turn 1",
        ),
    ],
)
def test_bad_judgments(tmp_path, rows, said):
    """One line with the file, the row and what was expected."""
    with pytest.raises(UserError) as error:
        stored(tmp_path, rows)
    assert said in str(error.value) and "\n" not in str(error.value) and "stored.jsonl" in str(error.value)


def rewrite(path, change):
    rows = lines(path)
    change(rows)
    write_jsonl(path, rows)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("question.jsonl", lambda rows: rows.clear(), "has no rows"),
        ("question.jsonl", lambda rows: rows[2]["turns"].pop(), ":3: field turns: expected 2 texts, got ['ask 101']"),
        ("question.jsonl", lambda rows: rows.append(rows[0]), ":9: question 81 is there already, at"),
        ("question.jsonl", lambda rows: rows.pop(), "1 of 8 answers are to questions that"),
        ("good.jsonl", lambda rows: rows.pop(), "lacks answers to 1 of 8 questions, such as 151"),
        ("good.jsonl", lambda rows: rows.append(rows[0]), ":9: an answer to question 81 is there already, at"),
        ("good.jsonl", lambda rows: rows[1]["choices"].clear(), ":2: field choices"),
        (
            "good.jsonl",
            lambda rows: rows[1]["choices"][0]["turns"].pop(),
            ":2: field turns: expected 2 texts, got ['+ first 91']",
        ),
        ("good.jsonl", lambda rows: rows[1].update(model_id="x"), "holds answers of 2 models (good, x)"),
        ("references.jsonl", lambda rows: rows.pop(), "has no answer to question 121 (coding)"),
        (
            "bad.jsonl",
            lambda rows: [row.update(model_id="good") for row in rows],
            "answers of good, as are those of another",
        ),
    ],
)
def test_bad_files(files, group, file, change, said):
    """Questions, answers and references that are incomplete or do not belong together are one line."""
    rewrite(files / file, change)
    given = (f"outputs={files / 'good.jsonl'}", f"baseline={files / 'bad.jsonl'}", "task.mode=pairwise")
    with pytest.raises(UserError) as error:
        evaluate(files, judge_of(lambda shown: "[[C]]"), *given, f"task.references={files / 'references.jsonl'}")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("outputs=a",), "task.questions=null"),
        (("outputs=a", "task.questions=q", "task.mode=pairwise"), "mode pairwise compares with a baseline's answers"),
        (("outputs=a", "task.questions=q", "baseline=b"), "single reads none"),
        (("outputs=a", "task.questions=q", "judge.verdict=logprobs"), "MT-Bench's verdicts are words"),
        (("annotations=a", "judge.model=null", "task.references=r"), "task.references=r with annotations"),
        (("annotations=a", "judge.model=null", "baseline=b"), "baseline=b with annotations"),
    ],
)
def test_contradictions(more, said):
    """What can not go together is said in one line before anything is read."""
    with pytest.raises(UserError) as error:
        settings(*JUDGED, *more, name="eval")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_limit_and_questions_of_ones_own(tmp_path):
    """limit takes the first so many questions with both turns; other questions need their file, which has the categories."""
    rows = [single(question_id=n, turn=turn, score=5) for turn in (1, 2) for n in (81, 82, 83)]
    assert stored(tmp_path, rows, "task.limit=2").models["m"]["score"]["n"] == 4
    write_jsonl(tmp_path / "q.jsonl", [{"question_id": 7, "category": "law", "turns": ["a", "b"]}])
    made = stored(tmp_path, [single(question_id=7)], f"task.questions={tmp_path / 'q.jsonl'}")
    assert made.models["m"]["score/law"]["value"] == 7
    with pytest.raises(UserError, match="question 81 .1 such.: it is not in"):
        stored(tmp_path, [single()], f"task.questions={tmp_path / 'q.jsonl'}")


def test_categories_of_mt_bench():
    """81-90 are writing, 151-160 humanities, and other numbers nothing."""
    assert [mt_bench_files.category_of(n) for n in (80, 81, 90, 91, 151, 160, 161)] == [
        None, "writing", "writing", "roleplay", "humanities", "humanities", None]  # fmt: skip


# ---- real judgments


def real(name):
    return Path(os.environ["RPO_TEST_DATA"], "mt_bench", name)


@DATA
def test_categories_by_number_are_the_questions_own():
    """The categories that numbers stand for are those of MT-Bench's question.jsonl, all 80."""
    found = mt_bench_files.questions(str(real("question.jsonl")))
    assert len(found) == 80 and all(
        question.category == mt_bench_files.category_of(question.question_id) for question in found
    )


@DATA
@pytest.mark.parametrize(
    ("pair_of", "rate", "se", "counts"),
    [("dpo_rpo", 57.81, 2.56, (47, 91, 22)), ("sft_dpo", 78.75, 2.90, (103, 46, 11))],
)
def test_published_rates(tmp_path, pair_of, rate, se, counts):
    """The authors' judgments of the beta series give Table 4 of arXiv 2405.16436, with standard errors by question.

    The errors are without stats' factor sqrt(80/79). The command needs nothing but the file, and reads all 320 judgments
    as they are stored.
    """
    file = real("rpo_repo_model_judgment") / f"gpt-4_pair_{pair_of}.jsonl.gz"
    try:
        evaluation.evaluate(
            settings("task=mt_bench", f"annotations={file}", f"run_dir={tmp_path / 'run'}", name="eval")
        )
    finally:
        dist.shutdown()
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    first, second = found["models"].values()
    cell = second["win_rate"]
    assert round(100 * cell["value"], 2) == rate and round(100 * cell["se"] * np.sqrt(79 / 80), 2) == se
    assert (cell["n"], cell["n_error"]) == (160, 0)
    assert [second[name]["value"] * 160 for name in ("wins", "ties", "losses")] == pytest.approx(counts)
    assert first["win_rate"]["value"] + cell["value"] == pytest.approx(1)
    parts = [second[f"win_rate/turn_{turn}"] for turn in (1, 2)]
    assert np.mean([part["value"] for part in parts]) == pytest.approx(cell["value"])
    parts = [second[f"win_rate/{category}"] for category in mt_bench_files.CATEGORIES]
    assert all(part["n"] == 20 for part in parts)
    assert np.mean([part["value"] for part in parts]) == pytest.approx(cell["value"])
    assert found["details"]["reread"] == {"judgments": 320, "differ": 0}


@DATA
def test_stored_answers_are_read():
    """The authors' answer files and the references are of FastChat's form: two turns each of 80 questions, or of 30."""
    for file in sorted(real("rpo_repo_model_answer").glob("*.jsonl.gz")):
        assert len(mt_bench_files.answers(str(file)).turns) == 80
    assert len(mt_bench_files.answers(str(real("reference_answer_gpt-4.jsonl"))).turns) == 30


# ---- the command


def test_the_command_on_a_model_and_a_judge(tiny, files):
    """eval.py answers with a real (tiny) model, asks a server, and writes FastChat's files; again with both, it asks nothing."""
    short = [
        {"question_id": n, "category": mt_bench_files.category_of(n), "turns": [WORDS[i], WORDS[i + 1]]}
        for i, n in enumerate(IDS)
    ]
    write_jsonl(files / "question.jsonl", short)
    more = (f"task.questions={files / 'question.jsonl'}", "task.max_new_tokens=6", "task.batch_size=8")
    more += (f"model.path={tiny / 'model'}", f"run_dir={files / 'run'}", f"cache_dir={files / 'cache'}")
    with JudgeServer(answer=lambda body: "Fine. Rating: [[7]]") as host:
        for _ in range(2):
            try:
                evaluation.evaluate(settings(*JUDGED, f"judge.base_url={host.url}", *more, name="eval"))
            finally:
                dist.shutdown()
            assert host.tried <= 16
    found = json.loads((files / "run" / "results.json").read_text())
    assert found["models"][str(tiny / "model")]["score"] | {"interval": None} == {
        "value": 7, "se": 0, "interval": None, "n": 16, "n_error": 0}  # fmt: skip
    (answered,) = (files / "run" / "model_answer").glob("*.jsonl")
    assert mt_bench_files.answers(str(answered)).turns.keys() == set(IDS)
    assert len(lines(files / "run" / "model_judgment" / "org_judge_single.jsonl")) == 16
