"""Files of answers: their forms, what pairs them, and what is wrong with them in one line."""

import gzip
import json

import pytest

from rpo.data import answers as data_answers
from rpo.data.answers import Output
from rpo.errors import UserError
from tests.helpers.rows import write_jsonl


def write_json(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def lines(path, rows):
    write_jsonl(path, rows)
    return str(path)


def user(text):
    return [{"role": "user", "content": text}]


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_forms_say_the_same(tmp_path):
    """AlpacaEval's form, task=generate's and plain ones, packed or not, are the same answers to the same prompts."""
    alpaca = [{"instruction": p, "output": o, "generator": "m"} for p, o in (("ask", "say"), ("tell", ""))]
    generated = [
        {"messages": user(p), "prompt": f"[user] {p}", "response": o, "model": "m"}
        for p, o in (("ask", "say"), ("tell", ""))
    ]
    files = [write_json(tmp_path / "a.json", alpaca), lines(tmp_path / "b.jsonl", generated)]
    for field in ("response", "output", "completion"):
        rows = [{"prompt": "ask", field: "say", "model": "m"}, {"prompt": user("tell"), field: "", "model": "m"}]
        files.append(lines(tmp_path / f"{field}.jsonl", rows))
    with gzip.open(tmp_path / "c.json.gz", "wt") as file:
        json.dump(alpaca, file)
    for file in [*files, str(tmp_path / "c.json.gz")]:
        outputs = data_answers.read(file)
        assert outputs.name == "m"
        assert [(row.key, row.text) for row in outputs.rows] == [("ask", "say"), ("tell", "")]
        assert [a.id == b.id for a, b in data_answers.aligned(outputs, data_answers.read(files[0]))] == [True, True]


def test_a_row_of_two_answers_is_refused(tmp_path):
    """A reference answer beside the model's is not judged in its place: which is which, no field's name says."""
    for other in ("output", "completion"):
        file = lines(tmp_path / "two.jsonl", [{"prompt": "p", "response": "reference", other: "the model's"}])
        with pytest.raises(UserError) as error:
            data_answers.read(file)
        assert f"expected one answer, got response and {other}, which differ" in one_line(error)
    same = lines(tmp_path / "same.jsonl", [{"prompt": "p", "response": "a", "output": "a", "completion": None}])
    assert data_answers.read(same).rows == [Output("p", "a")]


def test_written_answers_are_read_back(tmp_path):
    """What `write` writes `read` reads: conversations, text with braces and odd characters, empty answers."""
    conversation = [*user("a"), {"role": "assistant", "content": "b"}, *user("c")]
    rows = [Output(conversation, "{x}\n\u2028"), Output("plain {question}", ""), Output(user("é\ud800"), "[[A]]")]
    data_answers.write(tmp_path / "o.jsonl", "path/to/model", rows)
    outputs = data_answers.read(str(tmp_path / "o.jsonl"))
    assert (outputs.name, outputs.rows) == ("path/to/model", rows)
    assert all(len(row.id) == 16 for row in outputs.rows)


def test_the_name_is_the_files_where_no_row_has_one(tmp_path):
    """Without generator or model a file is called by its own name."""
    assert (
        data_answers.read(lines(tmp_path / "zephyr-7b.v1.jsonl", [{"prompt": "p", "output": "o"}])).name
        == "zephyr-7b.v1"
    )


def test_a_key_tells_conversations_apart():
    """A lone user message is its text; any other role or turn makes another prompt."""
    assert data_answers.key_of(user("p")) == data_answers.key_of("p") == "p"
    others = [
        [{"role": "system", "content": "p"}],
        [{"role": "system", "content": "s"}, *user("p")],
        [*user("p"), {"role": "assistant", "content": "p"}, *user("p")],
    ]
    assert len({data_answers.key_of(prompt) for prompt in [user("p"), *others]}) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no answers"),
        (["text"], ":1: expected an object"),
        ([{"prompt": "p"}], ":1: expected an answer in one of response, output, completion"),
        ([{"prompt": "p", "output": 3}], ":1: field output: expected a string"),
        ([{"output": "o"}], ":1: expected the prompt in one of"),
        ([{"prompt": [], "output": "o"}], ":1: field prompt"),
        ([{"prompt": [{"role": "user"}], "output": "o"}], ":1: field prompt"),
        ([{"prompt": [{"role": "assistant", "content": "x"}], "output": "o"}], ":1: field prompt"),
        ([{"prompt": "p", "output": "o", "generator": g} for g in "xy"], "answers of 2 models (x (1), y (1))"),
    ],
)
def test_bad_files(tmp_path, rows, message):
    """One line with the file, the row and what was expected."""
    with pytest.raises(UserError) as error:
        data_answers.read(lines(tmp_path / "bad.jsonl", rows))
    assert message in one_line(error)
    assert "bad.jsonl" in str(error.value)


def test_damaged_and_missing_files(tmp_path):
    """A row that is not JSON, and a file that is not there, are one line too."""
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "output": "o"}\n{"prompt": \n')
    for file, message in (
        (tmp_path / "bad.jsonl", "bad.jsonl:2: expected one JSON object a line"),
        (tmp_path / "none.json", "no such file"),
    ):
        with pytest.raises(UserError) as error:
            data_answers.read(str(file))
        assert message in one_line(error)


def answers(path, prompts):
    return data_answers.read(lines(path, [{"prompt": prompt, "output": "o"} for prompt in prompts]))


def test_mismatched_prompts_are_counted_and_shown(tmp_path):
    """Prompts that one file lacks are an error with a count and an example for either side; so is one that is twice."""
    a, b = answers(tmp_path / "a.jsonl", "pqr"), answers(tmp_path / "b.jsonl", "pst")
    with pytest.raises(UserError) as error:
        data_answers.aligned(a, b)
    assert f"{a.file} lacks 2 of the 5 prompts, such as 's'" in one_line(error)
    assert f"{b.file} lacks 2 of the 5 prompts, such as 'q'" in str(error.value)
    with pytest.raises(UserError) as error:
        data_answers.aligned(a, answers(tmp_path / "c.jsonl", ["p", "q", "r", "q"]))
    assert "1 prompts have more than one answer, such as 'q' with 2" in one_line(error)


def test_a_limit_takes_the_first_prompts_of_the_first_file(tmp_path):
    """The other file may lack the prompts beyond the limit, and no others; one that is nowhere in the first is refused."""
    a, b = answers(tmp_path / "a.jsonl", "pqrs"), answers(tmp_path / "b.jsonl", "sqp")
    assert [(x.key, y.key) for x, y in data_answers.aligned(a, b, 2)] == [("p", "p"), ("q", "q")]
    for limit, message in ((3, "b.jsonl lacks 1 of the 3 prompts, such as 'r'"), (None, "lacks 1 of the 4 prompts")):
        with pytest.raises(UserError, match=message):
            data_answers.aligned(a, b, limit)
    with pytest.raises(UserError, match="a.jsonl lacks 1 of the 3 prompts, such as 't'"):
        data_answers.aligned(a, answers(tmp_path / "c.jsonl", "pqt"), 2)


def test_a_file_of_several_models_by_model(tmp_path):
    """Each model's answers in the file's order, with rows that name none under the file's own name."""
    rows = [{"prompt": p, "output": p + str(m), "model": m} for m, p in (("x", "p"), (None, "p"), ("x", "q"))]
    x, own = data_answers.read_models(lines(tmp_path / "two.jsonl", rows))
    assert (x.name, [row.text for row in x.rows]) == ("x", ["px", "qx"])
    assert (own.name, [row.text for row in own.rows]) == ("two", ["pNone"])
    assert x.file.endswith("two.jsonl (x)")


def test_order_of_the_first_file(tmp_path):
    """Files in another order are paired by prompt, and an example in a message is short and on one line."""
    a, b = answers(tmp_path / "a.jsonl", "pqr"), answers(tmp_path / "b.jsonl", "rqp")
    assert [(x.key, y.key) for x, y in data_answers.aligned(a, b)] == [("p", "p"), ("q", "q"), ("r", "r")]
    shown = data_answers.excerpt("line\nline " * 50)
    assert len(shown) <= data_answers.EXCERPT + 2 and "\n" not in shown


def test_prompts_of_training_rows(tmp_path):
    """Prompts come from pairs, supervised rows and bare ones; a repeated one counts once; a bad row is named or counted."""
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": "p", "chosen": "d", "rejected": "r"},
        {"messages": [*user("q"), {"role": "assistant", "content": "x"}]},
        {"instruction": "r"},
    ]
    good = lines(tmp_path / "good.jsonl", rows)
    distinct, report = data_answers.prompts(good, None, "error")
    assert [data_answers.key_of(prompt) for prompt in distinct] == ["p", "q", "r"]
    assert report == {"read": 4, "repeated": 1, "dropped": 0}
    bad = lines(tmp_path / "bad.jsonl", [{"text": "t"}, *rows])
    with pytest.raises(UserError) as error:
        data_answers.prompts(bad, None, "error")
    assert "bad.jsonl:1" in one_line(error)
    assert data_answers.prompts(bad, None, "drop")[1] == {"read": 5, "repeated": 1, "dropped": 1}
    with pytest.raises(UserError, match="none of 1 rows has a prompt"):
        data_answers.prompts(lines(tmp_path / "none.jsonl", [{"text": "t"}]), None, "drop")
