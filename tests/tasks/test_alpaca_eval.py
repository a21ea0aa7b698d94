"""AlpacaEval: stored judgments and a judge's give the same rates, the leaderboard's where its files are there."""

import csv
import gzip
import json
import math
import os
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rpo.data import answers
from rpo.errors import UserError
from rpo.evals import results
from rpo.judging import alpaca_files, verdicts
from rpo.judging.client import Reply
from rpo.tasks import alpaca_eval
from tests.helpers.contexts import StubContext
from tests.helpers.rows import write_jsonl
from tests.helpers.runs import settings

NUM = 40
CHARACTERS = np.random.default_rng(0).integers(20, 200, (NUM, 2))
DIFFICULTY = np.random.default_rng(2).normal(size=NUM)


def instructions():
    return [f"Say {i} in a way of your own." for i in range(NUM)]


def baseline_rows():
    return [
        {"instruction": text, "output": "b" * int(n), "generator": "base"}
        for text, n in zip(instructions(), CHARACTERS[:, 0], strict=True)
    ]


def model_rows(name="own"):
    return [
        {"instruction": text, "output": "m" * int(n), "generator": name}
        for text, n in zip(instructions(), CHARACTERS[:, 1], strict=True)
    ]


def preferences(seed=1):
    """Those of a judge who prefers the baseline, less so where the instruction is difficult."""
    logit = 2 * DIFFICULTY - 1 + np.random.default_rng(seed).normal(size=NUM)
    return (1 + 1 / (1 + np.exp(-logit))).round(6).tolist()


def annotations(seed=1, name="own"):
    return [
        {
            "instruction": a["instruction"],
            "output_1": a["output"],
            "generator_1": "base",
            "output_2": b["output"],
            "generator_2": name,
            "preference": preference,
        }
        for a, b, preference in zip(baseline_rows(), model_rows(name), preferences(seed), strict=True)
    ]


def write_json(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        json.dump(rows, file)
    return path


def write_csv(path, header, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def files(tmp_path, group):
    """Paths of a baseline's answers, difficulties and gamed rows."""
    rng = np.random.default_rng(3)
    write_json(tmp_path / "baseline.json.gz", baseline_rows())
    write_csv(tmp_path / "difficulty.csv", ["", "instruction_difficulty"], enumerate(DIFFICULTY))
    header = ["model", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline", "preference"]
    gamed = [["verbose", i, rng.normal(), rng.normal(), False, rng.uniform()] for i in range(2 * NUM)]
    write_csv(tmp_path / "gamed.csv", header, gamed)
    header[-1] = "preference_pseudo"
    write_csv(tmp_path / "standin.csv.gz", header, gamed)
    return tmp_path


def evaluated(files, *overrides, answer=None, ask=None, run_dir=None):
    cfg = settings("task=alpaca_eval", "task.bootstrap=0", *overrides, name="eval")
    return alpaca_eval.run(cfg, StubContext(run_dir or files, answer=answer, ask=ask))


def stored(files, rows, *overrides, **how):
    return evaluated(files, f"annotations={write_json(files / 'annotations.json', rows)}", *overrides, **how)


def full(files):
    return (
        f"baseline={files}/baseline.json.gz",
        f"task.difficulty={files}/difficulty.csv",
        f"task.gamed={files}/gamed.csv",
    )


def reply(text="m", top_logprobs=None, error=None):
    return Reply(text, top_logprobs, "stop", 100, 1, "judge-1", error)


def length_judge(requests):
    """Prefers the longer answer, by log-probs; what is shown as m is the first section of the prompt."""
    made = []
    for request in requests:
        text = request.messages[-1]["content"]
        first = text.split("[Answer m]\n")[1].split("\n[End")[0]
        second = text.split("[Answer M]\n")[1].split("\n[End")[0]
        logit = (len(first) - len(second)) / 50
        made.append(reply("m", {"m": -math.log1p(math.exp(-logit)), "M": -math.log1p(math.exp(logit)), "x": -9.0}))
    return made


# ---- stored judgments


def test_rates_are_those_of_the_definition(files):
    """Win rate with the sample's standard error, discrete rate with ties as half, by position, lengths."""
    rows = annotations()
    rows[3]["preference"], rows[4]["preference"], rows[5]["preference"] = 1.5, 0, None
    made = stored(files, rows)
    cells, wins = made.models["own"], np.array([x["preference"] or 1.5 for i, x in enumerate(rows) if i != 5]) - 1
    assert cells["win_rate"]["value"] == pytest.approx(100 * wins.mean())
    assert cells["win_rate"]["se"] == pytest.approx(100 * wins.std(ddof=1) / math.sqrt(NUM - 1))
    assert cells["discrete_win_rate"]["value"] == pytest.approx(100 * np.mean((wins > 0.5) + 0.5 * (wins == 0.5)))
    assert (cells["win_rate"]["n"], cells["win_rate"]["n_error"]) == (NUM - 1, 1)
    assert cells["avg_length"]["value"] == pytest.approx(CHARACTERS[:, 1].mean())
    assert [s.error for s in made.items if s.error] == ["no verdict is stored"]
    first = [verdicts.switched(x["instruction"]) for i, x in enumerate(rows) if i != 5]
    assert cells["win_rate/shown_first"]["value"] == pytest.approx(100 * wins[first].mean())
    assert cells["first_preferred"]["value"] == pytest.approx(100 * np.where(first, wins, 1 - wins).mean())


def test_all_forms_of_judgments_give_the_same(files):
    """annotations.json, lines with an index and the table with lengths alone agree, whatever the order of their rows."""
    rows, order = annotations(), np.random.default_rng(3).permutation(NUM)
    official = stored(files, rows, *full(files))
    by_index = [
        {"index": int(i), **{k: rows[i][k] for k in ("generator_1", "generator_2", "output_2", "preference")}}
        for i in order
    ]
    lines = write_jsonl(files / "lines.jsonl.gz", by_index)
    table = [["own", row, i, *CHARACTERS[i], rows[i]["preference"]] for row, i in enumerate(order)]
    compact = write_csv(
        files / "table.csv.gz", ["model", "row", "index", "len_baseline", "len_model", "preference"], table
    )
    for file in (lines, compact):
        made = evaluated(files, f"annotations={file}", *full(files))
        for name, cell in official.models["own"].items():
            # Folds go by row, so another order may fit another C.
            close = 2.0 if name == "length_controlled_win_rate" else 1e-9
            assert made.models["own"][name]["value"] == pytest.approx(cell["value"], abs=close), name
        scores = {sample.id: sample.scores for sample in made.items}
        assert scores == {sample.id: sample.scores for sample in official.items}


def test_forms_of_length_control_and_what_is_said_of_them(files):
    """The files given decide the form; one that is not the leaderboard's says so, also in its name, and a stand-in does."""
    rows, (baseline, difficulty, gamed) = annotations(), full(files)
    for overrides, form, said in [
        ((baseline, difficulty, gamed), "full", []),
        ((baseline, difficulty, f"task.gamed={files}/standin.csv.gz"), "full", ["stand-in"]),
        ((baseline, difficulty), "no_gamed", ["without gamed rows"]),
        ((), "minimal", ["without gamed rows and difficulty"]),
        (("task.length_control=none",), "none", []),
    ]:
        made = stored(files, rows, *overrides)
        control = made.details["length_control"]
        notes = made.notes
        assert control["form"] == form and len(notes) == len(said)
        assert all(part in note and "not the leaderboard's" in note for part, note in zip(said, notes, strict=True))
        name = "length_controlled_win_rate"
        names = {"full": [name], "none": []}.get(form, [f"{name}/{form}"])
        assert [each for each in made.models["own"] if each.startswith(name)] == names
    pair = [
        stored(files, rows, *full(files)),
        stored(files, rows, baseline, difficulty, f"task.gamed={files}/standin.csv.gz"),
    ]
    assert pair[0].models == pair[1].models


def test_difficulty_is_matched_by_instruction_or_by_row(files):
    """Without its first judgment a file keeps every instruction's difficulty; compat=row gives it the one before."""
    rows = annotations()[1:]
    weights = write_csv(
        files / "weights.csv",
        ["", "np.tanh(std_delta_len)", "instruction_difficulty", "not_gamed_baseline.astype(float)"],
        [["base", 0, 0, 0], ["own", -1.5, 0.75, -0.5]],
    )
    args = (full(files)[0], full(files)[1], f"task.weights={weights}")
    made = stored(files, rows, *args)
    cell = made.models["own"]["length_controlled_win_rate"]
    assert cell["value"] == pytest.approx(100 * np.mean(1 / (1 + np.exp(-(0.75 * DIFFICULTY - 0.5)))))
    assert cell["se"] is None and made.details["without_judgment"] == {"own": 1}
    by_row = stored(files, rows, *args, "task.compat=row").models["own"]["length_controlled_win_rate"]
    assert by_row["value"] == pytest.approx(100 * np.mean(1 / (1 + np.exp(-(0.75 * DIFFICULTY[:-1] - 0.5)))))
    fitted = [stored(files, rows, *full(files), *more) for more in ((), ("task.compat=row",))]
    values = [one.models["own"]["length_controlled_win_rate"]["value"] for one in fitted]
    assert abs(values[0] - values[1]) > 0.1


def test_limit_takes_the_baselines_first(files):
    """The first instructions of the baseline's file, wherever the judgments have them."""
    rows = annotations()
    made = stored(files, rows[::-1], f"baseline={files}/baseline.json.gz", "task.limit=12")
    assert {sample.prompt for sample in made.items} == set(instructions()[:12])
    wins = [row["preference"] - 1 for row in rows[:12]]
    assert made.models["own"]["win_rate"]["value"] == pytest.approx(100 * np.mean(wins))


def test_baseline_against_itself_is_50(files):
    """A baseline judged against itself has 50 in all rates, the fit's by definition."""
    rows = [row | {"output_2": row["output_1"], "generator_2": "base", "preference": 1.5} for row in annotations()]
    cells = stored(files, rows, *full(files)).models["base"]
    for name in ("win_rate", "discrete_win_rate", "length_controlled_win_rate"):
        assert (cells[name]["value"], cells[name]["se"]) == (50, 0)
    assert cells["first_preferred"]["n"] == 0  # of answers that differ


def test_no_verdict_at_all_is_unusable(files, capsys):
    """A file of nulls is written with its reasons, without a number, and refused in one line."""
    rows = [row | {"preference": None} for row in annotations()]
    file = write_json(files / "nulls.json", rows)
    cfg = settings("task=alpaca_eval", f"annotations={file}", name="eval")
    made = alpaca_eval.run(cfg, StubContext(files))
    with pytest.raises(UserError, match="40 of 40 items failed"):
        results.write(files, cfg, made, results.table)
    cells = results.read(files).models["own"]
    assert cells["win_rate"]["value"] is None and cells["win_rate"]["n_error"] == NUM


# ---- a judge


def judged(files, *overrides, ask=length_judge, rows=None):
    write_json(files / "model_outputs_given.json", rows or model_rows())
    return evaluated(
        files,
        f"outputs={files}/model_outputs_given.json",
        f"baseline={files}/baseline.json.gz",
        "judge.model=judge",
        *overrides,
        ask=ask,
        run_dir=files / "run",
    )


def test_judged_answers_are_read_back_the_same(files):
    """A judge's log-probs become preferences, whichever answer was shown first; annotations= of what was written agrees."""
    made = judged(files)
    expected = 1 / (1 + np.exp(-(CHARACTERS[:, 1] - CHARACTERS[:, 0]) / 50))
    by_id = {sample.id: sample.scores["win_rate"] for sample in made.items}
    found = [by_id[answers.id_of(text)] for text in instructions()]
    np.testing.assert_allclose(found, 100 * expected, rtol=1e-9)
    written = json.loads((files / "run" / "annotations.json").read_text())
    assert set(written[0]) == {*annotations()[0], "annotator", "letter_mass"}
    assert made.models["own"]["letter_mass"]["value"] == pytest.approx(100) and made.details["verdict"] == "logprobs"
    again = evaluated(files, f"annotations={files}/run/annotations.json", f"baseline={files}/baseline.json.gz")
    assert again.models == made.models and again.items == made.items
    outputs_written = json.loads((files / "run" / "model_outputs.json").read_text())
    assert outputs_written == model_rows()


def test_equal_answers_are_half_a_win_without_asking(files):
    """An answer that is the baseline's has preference 1.5, as the original sets it; a baseline against itself is 50 with
    nothing asked."""
    rows, asked = model_rows(), []
    rows[3]["output"] = baseline_rows()[3]["output"]

    def ask(requests):
        asked.append(len(requests))
        return length_judge(requests)

    made = judged(files, rows=rows, ask=ask)
    written = json.loads((files / "run" / "annotations.json").read_text())
    assert written[3]["preference"] == 1.5 and made.details["equal_answers"] == {"own": 1}
    assert "own: 1 of 40 answers equal the baseline's: half a win each" in made.notes
    assert (made.models["own"]["win_rate"]["n"], made.models["own"]["first_preferred"]["n"]) == (NUM, NUM - 1)
    both_lengths = CHARACTERS[:, 1] - CHARACTERS[:, 0]
    expected = np.where(np.arange(NUM) == 3, 0.5, 1 / (1 + np.exp(-both_lengths / 50)))
    assert made.models["own"]["win_rate"]["value"] == pytest.approx(100 * expected.mean())
    cells = judged(files, rows=baseline_rows(), ask=ask).models["base"]
    assert asked == [2, NUM - 1, 0] and cells["win_rate"]["value"] == 50  # two to see whether there are log-probs


def test_limit_needs_no_more_answers_than_it_takes(files):
    """Answers to the baseline's first instructions alone are enough for task.limit, and more than these do no harm."""
    few = judged(files, "task.limit=15", rows=model_rows()[:15])
    assert few.models["own"]["win_rate"]["n"] == 15
    assert judged(files, "task.limit=15").models == few.models
    with pytest.raises(UserError, match="lacks 1 of the 16 prompts"):
        judged(files, "task.limit=16", rows=model_rows()[:15])


def test_answers_are_written_as_they_are(files):
    """An address with a password in an answer is the model's text: what was written is what was judged, and is read back."""
    rows = model_rows()
    rows[0]["output"] = "postgres://me:password@host"
    made = judged(files, rows=rows)
    written = json.loads((files / "run" / "annotations.json").read_text())
    assert written[0]["output_2"] == rows[0]["output"]
    again = evaluated(files, f"annotations={files}/run/annotations.json", f"baseline={files}/baseline.json.gz")
    assert again.items == made.items


def test_position_is_the_originals():
    """Where the draw from an instruction's text says so, the model's answer is the one that is shown as m."""
    both = {text: verdicts.switched(text) for text in instructions()}
    assert len(set(both.values())) == 2
    template = [{"role": "user", "content": "{instruction}|{output_1}|{output_2}"}]
    for text, switched in both.items():
        row = alpaca_files.Judgment("own", text, 0, 1, 1, None, None, "base's {output_2}", "own's {instruction}")
        (message,) = alpaca_eval._shown(template, row)
        shown = ["base's {output_2}", "own's {instruction}"]
        assert message["content"] == "|".join([text, *(shown[::-1] if switched else shown)])


@pytest.mark.parametrize(
    ("given", "verdict", "expected"),
    [
        (reply("m", {"m": math.log(0.2), "M": math.log(0.6)}), "logprobs", 0.25),
        (reply("M", {"M": -0.005}), "logprobs", 0.0),
        (reply("M", {"M": -0.1}), "logprobs", "m is not among"),
        (reply("m", {"m": -0.05, "x": -3.0}), "logprobs", 1.0),
        (reply("m", {" m": math.log(0.2), " M": math.log(0.3), "M": math.log(0.3)}), "logprobs", 0.25),
        (
            reply("M", {"The": -1.5, "M": math.log(0.2), "m": math.log(0.05)}),
            "logprobs",
            "hold 25% of the judge's first",
        ),
        (reply("m", None), "text", 1.0),
        (reply(" 'M'.\n", None), "text", 0.0),
        (reply("**Answer M**", None), "text", 0.0),
        (reply("The better answer is m.", None), "text", 1.0),
        (reply("[[M]]", None), "text", 0.0),
        (reply("<think>M is fuller, m is right</think>\n\nm", None), "text", 1.0),
        (reply("m, no: </think>M", None), "text", 0.0),
        (reply("<think>M", None), "text", "the judge said ''"),
        (reply("M", {"m": -0.1}), "text", 0.0),
        (reply("m", None), "logprobs", "no log-probs"),
        (reply("model", {"model": -0.1}), "logprobs", "neither m nor M among the judge's first tokens ('model')"),
        (reply("I can not judge", None), "text", "the judge said 'I can not judge'"),
        (reply("m or M", None), "text", "the judge said 'm or M'"),
        (reply("", None, "timed out"), "text", "timed out"),
    ],
)
def test_verdicts(given, verdict, expected):
    """By the mass of all tokens that spell m or M, or by a reply that is one of them alone; else an error with its reason."""
    found, why = alpaca_eval.first_preferred(given, verdict)
    if isinstance(expected, str):
        assert found is None and expected in why
    else:
        assert found == pytest.approx(expected) and why is None


def test_a_server_without_logprobs_is_read_by_its_words(files):
    """After two tries all are asked in words, which count as won or lost; a refusal is an error."""
    seen = []

    def ask(requests):
        seen.append([len(requests), *{(request.max_tokens, request.top_logprobs) for request in requests}])
        made = [reply("m" if one.top_logprobs["m"] > one.top_logprobs["M"] else "M") for one in length_judge(requests)]
        return [reply("Sorry"), *made[1:]]

    made = judged(files, ask=ask)
    cells = made.models["own"]
    wins = CHARACTERS[1:, 1] > CHARACTERS[1:, 0]
    assert cells["win_rate"]["value"] == pytest.approx(100 * wins.mean()) and cells["win_rate"]["n_error"] == 1
    assert made.details["verdict"] == "text" and seen == [[2, (1, 5)], [NUM, (None, 0)]]
    assert "letter_mass" not in cells
    written = json.loads((files / "run" / "annotations.json").read_text())
    assert written[0]["preference"] is None


def test_several_models_and_an_empty_answer(files):
    """Each model has its rates and files of its own; an empty answer is judged like any other and counted."""
    other = model_rows("other/one")
    other[2]["output"] = " \n"
    write_json(files / "other.json", other)
    made = judged(files, f"outputs=[{files}/model_outputs_given.json,{files}/other.json]")
    assert made.details["empty_answers"] == {"own": 0, "other/one": 1}
    assert len(made.items) == 2 * NUM and set(made.models) == {"own", "other/one"}
    for folder, name in (("1_own", "own"), ("2_other_one", "other/one")):
        rows = json.loads((files / "run" / folder / "annotations.json").read_text())
        assert {row["generator_2"] for row in rows} == {name} and len(rows) == NUM


def test_a_models_answers_are_made_and_judged(files):
    """model.path answers the baseline's instructions as chats, with the task's sampling."""

    def answer(path, conversations, sampling):
        assert [c[-1] for c in conversations] == [{"role": "user", "content": text} for text in instructions()[:15]]
        assert asdict(sampling) == {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_new_tokens": 2048}
        return [SimpleNamespace(text=row["output"], ended=i > 0) for i, row in enumerate(model_rows()[:15])]

    args = (f"baseline={files}/baseline.json.gz", "judge.model=judge", "task.limit=15")
    made = evaluated(files, "model.path=some/model", *args, answer=answer, ask=length_judge)
    assert made.details["cut_answers"] == {"some/model": 1}
    assert made.models["some/model"]["win_rate"]["n"] == 15
    from_file = judged(files, "task.limit=15")
    values = [next(iter(one.models.values()))["win_rate"]["value"] for one in (made, from_file)]
    assert values[0] == values[1]


def test_prompt_file(files):
    """A file in the original's form is cut into messages, its fields filled once; one without its fields is refused."""
    path = files / "prompt.txt"
    path.write_text(
        "<|im_start|>system\nBe fair. {not a field}\n<|im_end|>\n<|im_start|>user\n{instruction}\n[Answer m]\n{output_1}\n[End]\n"
        "[Answer M]\n{output_2}\n[End]\n<|im_end|>"
    )
    seen = []

    def ask(requests):
        seen.extend(requests)
        return length_judge(requests)

    made = judged(files, f"task.prompts={path}", ask=ask)
    assert [message["role"] for message in seen[0].messages] == ["system", "user"]
    assert seen[0].messages[0]["content"] == "Be fair. {not a field}"
    assert made.models == judged(files).models and made.details["judge"]["prompt"] == str(path)
    path.write_text("<|im_start|>user\n{instruction} {output_1}\n<|im_end|>")
    with pytest.raises(UserError, match=r"prompt.txt: expected .* sections") as error:
        judged(files, f"task.prompts={path}", ask=None)
    assert "\n" not in str(error.value)


# ---- bad input


def _changed(rows, i, **fields):
    rows[i] = rows[i] | fields
    return rows


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "no judgments"),
        (["text"], "annotations.json:1: expected an object with "),
        (_changed(annotations(), 3, preference=3), "annotations.json:4: field preference: expected null or 1 to 2"),
        (
            _changed(annotations(), 3, preference="good"),
            "annotations.json:4: field preference: expected null or 1 to 2.* got .good",
        ),
        (_changed(annotations(), 3, annotator=["x"]), "annotations.json:4: field annotator: expected null or a string"),
        (_changed(annotations(), 3, preference=True), "annotations.json:4: field preference: expected null or 1 to 2"),
        (_changed(annotations(), 3, output_2=None), "annotations.json:4: field output_2: expected a string"),
        (_changed(annotations(), 3, instruction="Other"), "annotations.json:4: .* has no answer to 'Other'"),
        (
            _changed(annotations(), 3, output_1="Other"),
            "annotations.json:4: .*baseline.json.gz has another answer than output_1",
        ),
        (
            _changed(annotations(), 3, generator_1="x"),
            "annotations.json:4: judged against x, earlier rows against base",
        ),
        (
            [annotations()[0]] * 2,
            "annotations.json:2: a judgment of own on 'Say 0 .* is there already, at .*annotations.json:1",
        ),
        (
            [{"generator_2": "own", "output_2": "x", "preference": 1}],
            "annotations.json:1: field index: expected a whole number, 0 or more, got None",
        ),
        (
            [{"index": NUM, "generator_2": "own", "output_2": "x"}],
            f"annotations.json:1: index {NUM}: .* answers 0 to 39",
        ),
        (
            [{"index": 0, "generator_1": "x", "generator_2": "own", "output_2": "x"}],
            "baseline.json.gz is of base, not of generator_1=x",
        ),
        (
            [{"index": 10**400, "generator_2": "own", "output_2": "x"}],
            "field index: expected a whole number, 0 or more, got 1000",
        ),
        (
            [{"index": 0, "model": "own", "len_baseline": 1, "len_model": 2}],
            "characters, not of len_baseline=1",
        ),
    ],
)
def test_bad_judgments(files, rows, match):
    """Each is one line with the file, the line and the value."""
    with pytest.raises(UserError, match=match) as error:
        stored(files, rows, f"baseline={files}/baseline.json.gz")
    assert "\n" not in str(error.value)


def _difficulty(files, rows, header=("index", "instruction_difficulty")):
    return f"task.difficulty={write_csv(files / 'bad.csv', header, rows)}"


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (lambda f: (_difficulty(f, [[i, 0.5] for i in range(NUM - 1)]),), "has 39 difficulties, the baseline has 40"),
        (
            lambda f: (_difficulty(f, [[1, 0.5], [1, 0.5]]),),
            "bad.csv:3: index 1 is there already, at .*bad.csv:2",
        ),
        (lambda f: (_difficulty(f, [[1, 0.5], [2, 0.5]]),), "bad.csv: 2 rows whose index is not 0 to 1"),
        (
            lambda f: (_difficulty(f, [[0, "nan"]]),),
            "bad.csv:2: field instruction_difficulty: expected a number, got 'nan'",
        ),
        (
            lambda f: (_difficulty(f, [[0, 1, 2]]),),
            "bad.csv:2: expected 2 values, as the header has",
        ),
        (lambda f: (_difficulty(f, []),), "bad.csv: a header and no rows"),
        (
            lambda f: (_difficulty(f, [[0, 1]], ("a", "b")),),
            "bad.csv: no column instruction_difficulty; there are index, b",
        ),
        (lambda f: (f"task.difficulty={f}/none.csv",), "none.csv: cannot be read as a table .*No such file"),
        (
            lambda f: (f"task.difficulty={f}/baseline.json.gz", "task.compat=row"),
            "baseline.json.gz: no column",
        ),
        (lambda f: (_difficulty(f, [[0, 1]]), "task.compat=row"), "has 1 rows, own has a judgment in row 39"),
        (lambda f: (full(f)[1], f"task.gamed={f}/difficulty.csv"), "difficulty.csv: no column std_delta_len"),
        (lambda f: (full(f)[1], f"task.weights={f}/difficulty.csv"), "difficulty.csv: no column std_delta_len"),
        (
            lambda f: (
                full(f)[1],
                f"task.weights={write_csv(f / 'twice.csv', ['', 'np.tanh(std_delta_len)', 'instruction_difficulty', 'not_gamed_baseline'], [['own', 0, 0, 0]] * 2)}",
            ),
            "twice.csv:3: model own is there already, at .*twice.csv:2",
        ),
        (lambda f: ("task.length_control=full",), "needs task.difficulty and task.gamed"),
        (lambda f: (full(f)[2],), "task.gamed=.*gamed.csv: needs task.difficulty; give the file"),
        (lambda f: ("task.weights=w.csv",), "task.weights=w.csv: needs task.difficulty; give the file"),
        (lambda f: (full(f)[1], "task.length_control=minimal"), "task.difficulty with .*minimal: would not be read"),
        (lambda f: (*full(f)[1:], "task.weights=x.csv"), "task.gamed with .*and task.weights: would not be read"),
        (lambda f: ("task.compat=row",), "task.compat=row without task.difficulty"),
        (lambda f: ("task.bootstrap=5",), "task.bootstrap=5: expected 0"),
        (lambda f: ("task.top_p=0",), "task.top_p=0"),
    ],
)
def test_bad_length_control(files, overrides, match):
    """Files that do not belong to the instructions, and settings that contradict each other: one line each."""
    with pytest.raises(UserError, match=match) as error:
        stored(files, annotations(), f"baseline={files}/baseline.json.gz", *overrides(files))
    assert "\n" not in str(error.value)


def test_what_is_missing_is_said_before_anything_is_paid_for(files):
    """No baseline, none for difficulties, answers to other prompts, one model twice: refused without asking."""

    def never(requests):
        raise AssertionError("asked")

    write_json(files / "few.json", model_rows()[:-1])
    write_json(files / "twice.json", [*model_rows(), model_rows()[0]])
    own = f"outputs={write_json(files / 'own.json', model_rows())}"
    baseline, judge = f"baseline={files}/baseline.json.gz", "judge.model=judge"
    for overrides, match in [
        ((own, judge), "baseline=null"),
        ((f"outputs={files}/few.json", baseline, judge), "few.json lacks 1 of the 40 prompts"),
        ((f"outputs={files}/twice.json", baseline, judge), "1 prompts have more than one answer"),
        ((f"outputs=[{files}/own.json,{files}/own.json]", baseline, judge), "two files are of own"),
        ((own, baseline, judge, f"task.prompts={files}/none.txt"), "none.txt: cannot be read"),
        ((own, baseline, judge, _difficulty(files, [[0, 1]])), "has 1 difficulties"),
    ]:
        with pytest.raises(UserError, match=match) as error:
            evaluated(files, *overrides, ask=never)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is in the order of the baseline.s file; give baseline="):
        stored(files, annotations(), full(files)[1])
    with pytest.raises(UserError, match="by index alone; give baseline="):
        stored(files, [{"index": 0, "generator_2": "own", "output_2": "x", "preference": 1.5}])


# ---- the published files


needs_data = pytest.mark.skipif("RPO_TEST_DATA" not in os.environ, reason="RPO_TEST_DATA names no data")


def data(name):
    return Path(os.environ["RPO_TEST_DATA"]) / "nc_alpaca_eval" / name


@cache
def leaderboard():
    with data("leaderboard_v2_weighted_gpt4_turbo.csv").open() as file:
        return {row[""]: row for row in csv.DictReader(file)}


@cache
def published(*overrides):
    """The evaluation of all stored judgments."""
    return evaluated(
        None,
        f"annotations={data('annotations_compact.csv.gz')}",
        f"baseline={data('baseline_gpt4_1106_preview.json.gz')}",
        f"task.difficulty={data('derived_instruction_difficulty.csv')}",
        *overrides,
        run_dir=Path("unused"),
    )


def stored_weights():
    return f"task.weights={data('lc_weights_baseline_gpt4_1106_preview.csv')}"


def lc_errors(made):
    """Model -> length-controlled rate minus the leaderboard's, of the models that it lists."""
    rates = {name: cells["length_controlled_win_rate"]["value"] for name, cells in made.models.items()}
    board = leaderboard()
    return {
        name: rate - float(board[name]["length_controlled_winrate"]) for name, rate in rates.items() if name in board
    }


@needs_data
def test_rates_are_the_leaderboards():
    """Win rate, standard error and discrete rate of all 41 models within 1e-9: stored preferences have ten digits."""
    made, board = published(stored_weights()), leaderboard()
    assert len(made.models.keys() & board.keys()) == 41
    for name in made.models.keys() & board.keys():
        cells, row = made.models[name], board[name]
        assert cells["win_rate"]["value"] == pytest.approx(float(row["win_rate"]), abs=1e-9, rel=0)
        assert cells["win_rate"]["se"] == pytest.approx(float(row["standard_error"]), abs=1e-9, rel=0)
        assert cells["discrete_win_rate"]["value"] == pytest.approx(float(row["discrete_win_rate"]), abs=1e-9, rel=0)
        assert cells["win_rate"]["n"] == int(row["n_total"])
        if int(row["n_total"]) == 805:
            assert int(cells["avg_length"]["value"]) == int(row["avg_length"])


@needs_data
def test_stored_weights_give_the_leaderboards_length_controlled_rate():
    """Within .002 points for 35 of 41; five lack judgments, which shifted the original's difficulties, and NullModel is off
    by .13 for no known reason. Matched by row as the original did, NullModel alone is left."""
    errors = lc_errors(published(stored_weights()))
    shifted = {"alpaca-7b_concise", "gpt35_turbo_instruct", "minotaur-13b", "phi-2", "text_davinci_001"}
    assert {name for name, error in errors.items() if abs(error) > 0.002} == shifted | {"NullModel"}
    assert max(abs(errors[name]) for name in shifted) < 0.01
    assert abs(errors["NullModel"]) < 0.14
    by_row = lc_errors(published(stored_weights(), "task.compat=row"))
    assert {name for name, error in by_row.items() if abs(error) > 1e-5} == {"NullModel"}


@needs_data
def test_a_refit_is_near_the_leaderboard():
    """Mean absolute error over 41 models, with gamed rows that stand in for the original's: below .6 points matched by
    instruction, most of it of the models whose difficulties the original shifted; below .15 by row, as the original did."""
    gamed = f"task.gamed={data('derived_df_gamed_pseudo.csv.gz')}"
    made = published(gamed)
    assert "stand-in" in made.notes[0]
    assert np.mean(np.abs(list(lc_errors(made).values()))) < 0.6
    by_row = np.abs(list(lc_errors(published(gamed, "task.compat=row")).values()))
    assert by_row.mean() < 0.15 and by_row.max() < 0.4


@needs_data
def test_position_draw_splits_the_stored_judgments():
    """Over all models the answer that was shown second wins far more often: the draw is the one that judgments were made by."""
    by_instruction = {}
    for sample in published(stored_weights()).items:
        if sample.scores:
            by_instruction.setdefault(sample.prompt, []).append(sample.scores["win_rate"])
    means = {prompt: np.mean(wins) for prompt, wins in by_instruction.items()}
    first, second = (
        [mean for prompt, mean in means.items() if verdicts.switched(prompt) is side] for side in (True, False)
    )
    gap = np.mean(second) - np.mean(first)
    z = gap / math.sqrt(np.var(first, ddof=1) / len(first) + np.var(second, ddof=1) / len(second))
    assert z > 5


@needs_data
@pytest.mark.parametrize("model", ["vicuna-7b-v1.5", "gpt4_gamed"])
def test_full_files_agree_with_the_table(model):
    """Judgments with their answers give what the table of lengths gives."""
    made = evaluated(
        None,
        f"annotations={data(f'annotations_full/{model}.jsonl.gz')}",
        f"baseline={data('baseline_gpt4_1106_preview.json.gz')}",
        f"task.difficulty={data('derived_instruction_difficulty.csv')}",
        stored_weights(),
        run_dir=Path("unused"),
    )
    for name, cell in published(stored_weights()).models[model].items():
        assert made.models[model][name]["value"] == pytest.approx(cell["value"], abs=1e-9), name


@needs_data
def test_the_published_prompt_is_read():
    """alpaca_eval_clf.txt is a system and a user message, with all three fields."""
    (system, user) = alpaca_files.read_prompt(str(data("judge_prompt_alpaca_eval_clf.txt")))
    assert (system["role"], user["role"]) == ("system", "user")
    assert user["content"].endswith("## Best Model Identifier")
    assert (
        user["content"].index("{instruction}")
        < user["content"].index("{output_1}")
        < user["content"].index("{output_2}")
    )
