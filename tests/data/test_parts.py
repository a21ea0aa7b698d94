"""Tokenising that takes long: what a kill leaves is not done again, megabytes are not tokenised in vain, and it says so."""

import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from rpo.data import dataset, parts
from rpo.data.tokenizer import tokenize
from rpo.errors import UserError
from tests.helpers.rows import CFG, make_rows_json, make_tokenizer, write_jsonl
from tests.helpers.runs import ROOT, script_env

READ_AS = replace(CFG, max_length=64)


def load(spec, cache, cfg=READ_AS):
    return dataset.load(spec, cfg, make_tokenizer(), pairs=True, cache_dir=cache)


KILLED = """
import os, sys
from rpo.data import dataset, parts
from tests.data.test_parts import load
parts.SECONDS, dataset.BATCH, left = -1, 10, [3]
tokenised = dataset._tokenised
def die(*args):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return tokenised(*args)
dataset._tokenised = die
load(sys.argv[1:3], sys.argv[3])
"""


@pytest.mark.filterwarnings("ignore:dropped of")
def test_a_killed_start_is_continued(tmp_path, monkeypatch):
    """Killed in the second file, the same rows, report and key as of an undisturbed start; only what was missing is done."""
    rows = make_rows_json(50)
    rows[7]["chosen"] = rows[7]["rejected"]
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    write_jsonl(tmp_path / "a.jsonl", rows[:25])
    write_jsonl(tmp_path / "b.jsonl", [*rows[25:], rows[7]])
    whole, report = load(files, tmp_path / "undisturbed")
    command = [sys.executable, "-c", KILLED, *files, str(tmp_path / "cache")]
    assert subprocess.run(command, env=script_env(), cwd=ROOT).returncode == -9
    done = []
    tokenised = dataset._tokenised
    monkeypatch.setattr(dataset, "_tokenised", lambda batch, *args: done.extend(batch) or tokenised(batch, *args))
    again, same = load(files, tmp_path / "cache")
    assert len(done) == 26 and report == same, len(done)
    for name in dataset.ARRAYS:
        assert np.array_equal(getattr(again, name), getattr(whole, name)), name
    assert not list((tmp_path / "cache/tokens").glob("*.parts"))


PROMPT = {"prompt": [{"role": "user", "content": "ba"}]}


@pytest.mark.parametrize("truncation", ["drop", "prompt_left", "response_right"])
def test_megabytes_are_dropped_by_their_beginning(truncation, tmp_path, monkeypatch):
    """Rows that length alone drops are counted as before, of every policy, with a thousandth of the text tokenised."""
    huge = "ba " * 100_000
    rows = [
        {"prompt": "ba", "chosen": huge, "rejected": "be"},
        {"prompt": huge, "chosen": "ba", "rejected": "be"},
        PROMPT | {"chosen": huge, "rejected": "be"},
        {"prompt": [{"role": "user", "content": huge}], "chosen": "ba", "rejected": "be"},
        *({"prompt": f"ba {i}", "chosen": "ba", "rejected": "be"} for i in range(20)),
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    cfg, sizes = replace(READ_AS, truncation=truncation), []
    monkeypatch.setattr(parts, "CHARACTERS", 10**9)
    plain, expected = load(str(tmp_path / "a.jsonl"), tmp_path / "plain", cfg)
    monkeypatch.setattr(parts, "CHARACTERS", 32)

    def counted(tokenizer, texts):
        sizes.append(sum(map(len, texts)))
        return tokenize(tokenizer, texts)

    monkeypatch.setattr(dataset, "tokenize", counted)
    monkeypatch.setattr(parts, "tokenize", counted)
    bounded, report = load(str(tmp_path / "a.jsonl"), tmp_path / "bounded", cfg)
    assert {k: v["count"] for k, v in report["dropped"].items()} == {
        k: v["count"] for k, v in expected["dropped"].items()
    }
    assert np.array_equal(bounded.ids, plain.ids) and report["lengths"] == expected["lengths"]
    cut = {"drop": 0, "prompt_left": 2, "response_right": 2}[truncation]  # rows that are cut, so tokenised in full
    assert sum(sizes) < (2 * cut + 0.5) * len(huge), sizes


def test_a_text_of_few_tokens_is_not_dropped():
    """What a tokenizer reads as few tokens, however long, is no reason: a word that it does not know, a run of blanks."""
    tokenizer = make_tokenizer()
    assert parts.is_over(tokenizer, "ba " * 10_000, 10)
    assert not parts.is_over(tokenizer, "x" * 100_000, 10) and not parts.is_over(tokenizer, " " * 100_000 + "ba", 10)
    assert parts.is_over(tokenizer, " " * 10_000 + "ba " * 100_000, 10)
    assert not parts.is_over(tokenizer, "ba " * 20, 10)


def test_a_long_prompt_alone_is_refused_by_its_beginning(tmp_path, monkeypatch):
    """task=generate's reading of prompts has the same bound, for texts and messages."""
    huge = "ba " * 100_000
    for i, prompt in enumerate([huge, [{"role": "user", "content": huge}]]):
        write_jsonl(tmp_path / f"{i}.jsonl", [{"prompt": prompt}])
        monkeypatch.setattr(dataset, "prompt_ids", None)  # not called
        with pytest.raises(UserError, match=rf"{i}.jsonl:1: the prompt has over data.max_length=64 tokens"):
            dataset.load_prompts(str(tmp_path / f"{i}.jsonl"), READ_AS, make_tokenizer())


def test_it_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    """A line with the file and the rows so far, while a single batch is tokenised too."""
    write_jsonl(tmp_path / "a.jsonl", make_rows_json(12))
    monkeypatch.setattr(parts, "PROGRESS", 0.05)
    tokenised = dataset._tokenised

    def slow(*args):
        time.sleep(0.2)
        yield from tokenised(*args)

    monkeypatch.setattr(dataset, "_tokenised", slow)
    load(str(tmp_path / "a.jsonl"), tmp_path / "cache")
    assert f"{tmp_path}/a.jsonl: 0 rows tokenised so far" in capsys.readouterr().out
