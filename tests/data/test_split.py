"""python -m rpo.data.split: what is held out is the same each time, and shares no prompt with what is trained on."""

import json
import subprocess
import sys

import pytest

from rpo.data.split import main, split
from rpo.errors import UserError
from rpo.files import parse_lines


def rows(count):
    """Two rows to a prompt."""
    return [{"prompt": f"question {i // 2}", "chosen": f"yes {i}", "rejected": "no"} for i in range(count)]


def read(folder):
    return [parse_lines((folder / f"{name}.jsonl").read_text())[0] for name in ("train", "eval")]


def test_prompts_are_apart_and_rows_in_order(tmp_path):
    """So many rows are held out, none is changed or there twice, and no prompt is on both sides; again gives the same."""
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows(60)))
    num_train, num_eval = split(str(file), tmp_path / "a", num_eval=10)
    train, held_out = read(tmp_path / "a")
    assert (len(train), len(held_out)) == (num_train, num_eval) and num_eval == 10 and 30 <= num_train <= 50
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    for part in (train, held_out):
        places = [rows(60).index(row) for row in part]
        assert places == sorted(set(places))
    split(str(file), tmp_path / "b", num_eval=10, num_train=7)
    assert read(tmp_path / "b")[1] == held_out and len(read(tmp_path / "b")[0]) == 7


def said(role, content):
    return {"role": role, "content": content}


FORMS = {
    "messages": lambda q, a: {s: [said("user", q), said("assistant", f"{s} {a}")] for s in ("chosen", "rejected")},
    "transcripts": lambda q, a: {s: f"\n\nHuman: {q}\n\nAssistant: {s} {a}" for s in ("chosen", "rejected")},
    "supervised": lambda q, a: {"messages": [said("user", q), said("assistant", str(a))]},
    "instructions": lambda q, a: {"instruction": q, "input": "", "output": str(a)},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_prompts_are_apart_in_every_form(tmp_path, form):
    """Twenty questions with three answers each: none is asked on both sides, in whichever form a row has it."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([form(f"question {i // 3}", i) for i in range(60)]))
    split(str(file), tmp_path / "a", num_eval=6)
    train, held_out = (json.dumps(part).replace("question ", "\0") for part in read(tmp_path / "a"))
    asked = [{each[:2].strip('\\"') for each in part.split("\0")[1:]} for part in (train, held_out)]
    assert asked[1] and not asked[0] & asked[1]


def test_files_that_are_there_are_kept(tmp_path):
    """Another file of the folder by that name, the data's own it may be, is not written over."""
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    before = file.read_text()
    with pytest.raises(UserError, match="train.jsonl: is there already, and holds other rows"):
        split(str(file), tmp_path, num_eval=10)
    assert file.read_text() == before and not (tmp_path / "eval.jsonl").exists()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"num_eval": 60}, "has 60 rows, of which eval=60 leaves 0 with other prompts"),
        ({"num_eval": 0}, "lower eval or train"),
        ({"num_eval": 4, "num_train": 58}, "expected at least 58"),
    ],
)
def test_too_few_rows(tmp_path, counts, message):
    """Counts that the file does not have are one line, and nothing is written."""
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows(60)))
    with pytest.raises(UserError, match=message):
        split(str(file), tmp_path / "a", **counts)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "b", "eval=x"], ["a", "b", "eval=1", "test=2"]])
def test_usage(arguments):
    """What is no such command gets the usage."""
    with pytest.raises(UserError, match="usage: python -m rpo.data.split DATA FOLDER"):
        main(arguments)


def test_a_file_that_is_not_there(tmp_path):
    """One line and exit status 2, as every command."""
    command = [sys.executable, "-m", "rpo.data.split", str(tmp_path / "no.jsonl"), str(tmp_path), "eval=1"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "no.jsonl" in ended.stderr
