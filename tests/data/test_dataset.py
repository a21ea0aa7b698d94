"""Rows of every form become the tokens that they should, bad ones are named, and every row read is accounted for."""

import csv
import gzip
import json
import os
import tempfile
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from rpo.data import dataset, formats, schedule
from rpo.data.tokenizer import close, encode_prompt, facts_of, load_tokenizer, stop_ids
from rpo.errors import UserError
from tests.helpers.rows import CFG, CHAT, WORDS, make_tokenizer
from tests.helpers.templates import CHATML, FORMATS, LLAMA3, PLAIN, tokenizer_for

USER = [{"role": "user", "content": "Hi there"}]
GOOD = {"prompt": "ask", "chosen": "good", "rejected": "bad"}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def plain():
    """A tokenizer with one token a byte, no template and no BOS."""
    return tokenizer_for()


@pytest.fixture(scope="module")
def chatml():
    return tokenizer_for(FORMATS["chatml"])


def write(path: Path, *table: dict | str | bytes) -> str:
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in table
    ]
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def load(spec: str | list[str], tokenizer, folder: Path, *, pairs: bool = True, **settings_):
    return dataset.load(spec, replace(CFG, **settings_), tokenizer, pairs=pairs, cache_dir=folder / "cache")


def load_rows(folder: Path, tokenizer, *table: dict | str | bytes, **settings_):
    return load(write(folder / "rows.jsonl", *table), tokenizer, folder, **settings_)


def texts(rows: dataset.Rows, tokenizer, i: int = 0) -> list[str]:
    return [tokenizer.decode(part) for part in rows.row(i)]


# ---- templates


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("turns", [1, 3])
def test_templates(name: str, add_bos: bool, turns: int, tmp_path: Path) -> None:
    """Published formats: the prompt is a prefix, one BOS, one scored end-of-turn per response, nothing after it."""
    form = FORMATS[name]
    tokenizer = tokenizer_for(form, add_bos=add_bos)
    history = [
        message for i in range(turns - 1) for message in ({"role": "user", "content": f"q{i}"}, assistant(f"a{i}"))
    ]
    prompt = history + USER
    rows, report = load_rows(tmp_path, tokenizer, {"prompt": prompt, "chosen": "Good day", "rejected": "Go\naway"})
    prompt_ids, chosen, rejected = (part.tolist() for part in rows.row(0))

    rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    if name == "llama3":
        today = rendered.split("Today Date: ")[1].split("\n")[0]
        rendered = rendered.replace(today, "04 Mar 2021")
    bos = form.bos if form.bos and (add_bos or rendered.startswith(form.bos)) else ""
    assert tokenizer.decode(prompt_ids) == bos + rendered.removeprefix(bos)
    assert [tokenizer.bos_token_id] * bool(bos) == [id for id in prompt_ids if id == tokenizer.bos_token_id]
    newlines = "\n\n" if name == "plain" else ""  # its template ends turns so, and has no end-of-turn token
    assert tokenizer.decode(chosen) == "Good day" + newlines + form.end_of_turn
    assert tokenizer.decode(rejected) == "Go\naway" + newlines + form.end_of_turn

    end = tokenizer.convert_tokens_to_ids(form.end_of_turn)
    stops = stop_ids(tokenizer, CHAT)
    assert stops == list(dict.fromkeys([tokenizer.eos_token_id, end]))
    for response in (chosen, rejected):
        assert response[-1] == end and not set(response[:-1]) & set(stops)
    assert encode_prompt(tokenizer, prompt, CHAT) == prompt_ids
    assert report["kept"] == 1


def test_a_word_that_is_not_known_ends_nothing(tmp_path: Path) -> None:
    """An unknown last word is scored and followed by the end-of-turn; it is no stop token (GPT-2's is its EOS, and stays one)."""
    known = make_tokenizer()
    messages = [{"role": "user", "content": WORDS[0]}, {"role": "assistant", "content": f"{WORDS[1]} unheard-of"}]
    ids = known.apply_chat_template(messages, return_dict=False)
    facts = facts_of(known)
    assert close(ids, facts, None)[-2:] == [known.unk_token_id, known.eos_token_id]
    assert stop_ids(known, CHAT) == [known.eos_token_id]
    known.unk_token = known.eos_token
    assert known.eos_token_id in facts_of(known).special


def test_template_date(tmp_path: Path) -> None:
    """What a template reads of the clock is data.template_date, in every spelling, also inside a template's macro."""
    template = (
        "{%- macro head() %}{{ strftime_now('%d %b %Y|%Y-%m-%d|%-d %B|%A|%H:%M') }}{% endmacro %}"
        "{{ head() }}{% for m in messages %}<{{ m.content }}>{% endfor %}"
    )
    tokenizer = tokenizer_for(FORMATS["plain"]._replace(template=template))
    ids = encode_prompt(tokenizer, USER, CHAT)
    assert tokenizer.decode(ids) == "04 Mar 2021|2021-03-04|4 March|Thursday|00:00<Hi there>"


def test_template_from_file_or_text(tmp_path: Path) -> None:
    """data.chat_template replaces the tokenizer's, as text or as a file; a name that is neither is refused."""
    tokenizer_for(FORMATS["chatml"]).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "mine.jinja").write_text(PLAIN)
    for template in (PLAIN, str(tmp_path / "mine.jinja")):
        assert load_tokenizer(tmp_path / "tokenizer", chat_template=template).chat_template == PLAIN
    assert load_tokenizer(tmp_path / "tokenizer").chat_template == CHATML
    with pytest.raises(UserError, match=r"data.chat_template=nowhere.jinja: no such file"):
        load_tokenizer(tmp_path / "tokenizer", chat_template="nowhere.jinja")


def test_tokenizers_refused(tmp_path: Path, plain) -> None:
    """No EOS, and a folder without a tokenizer, are one-line errors."""
    tokenizer_for().save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole/tokenizer_config.json").read_text())
    (tmp_path / "whole/tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    for path, message in ((tmp_path / "whole", "has no EOS token"), (tmp_path, "cannot be loaded")):
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)


def test_slow_tokenizer(tmp_path: Path) -> None:
    """A tokenizer without the fast backend gives the same kind of rows."""
    tokenizer = ByT5Tokenizer()
    rows, _ = load_rows(tmp_path, tokenizer, GOOD)
    assert texts(rows, tokenizer) == ["ask", "good</s>", "bad</s>"]
    tokenizer.chat_template = PLAIN
    rows, _ = load_rows(tmp_path, tokenizer, {"prompt": USER, "chosen": "yes", "rejected": "no"})
    assert texts(rows, tokenizer) == ["user:\nHi there\n\nassistant:\n", "yes\n\n</s>", "no\n\n</s>"]


# ---- forms


HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant:"
CHATML_PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER, "chosen": "yes", "rejected": "no"},
        {"prompt": USER, "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        {"prompt": USER, "chosen": [assistant("yes")], "rejected": "no", "score": 1.0},
        {"chosen": [*USER, assistant("yes")], "rejected": [*USER, assistant("no")]},
        {"prompt": "Hi there", "chosen": [*USER, assistant("yes")], "rejected": [*USER, assistant("no")]},
        {
            "prompt": None,
            "chosen": "\n\nHuman: Hi there\n\nAssistant: yes",
            "rejected": "Human: Hi there \n\nAssistant: no\n",
        },
    ],
)
def test_chat_forms(row: dict, tmp_path: Path, chatml) -> None:
    """Every way to write a chat pair gives the same three token lists."""
    rows, _ = load_rows(tmp_path, chatml, row)
    assert texts(rows, chatml) == [CHATML_PROMPT, "yes<|im_end|>", "no<|im_end|>"]
    assert encode_prompt(chatml, USER, CHAT) == rows.row(0)[0].tolist()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_messages_as_json_text_are_messages(kind: str, tmp_path: Path, chatml) -> None:
    """In any field and kind of file; other JSON, and JSON within a message, is a text like any other."""
    shared = {"chosen": [*USER, assistant("yes")], "rejected": [*USER, assistant("no")]}
    sharegpt = [{"from": "human", "value": "Hi there"}]
    table = [
        {"prompt": None} | shared,
        {"prompt": USER, "chosen": "yes", "rejected": assistant("no")},
        {"prompt": sharegpt, "chosen": "yes", "rejected": "no"},
        {"prompt": "[{}]", "chosen": '{"role": [1], "content": 7}', "rejected": "{1}"},
        {"prompt": USER, "chosen": [assistant(json.dumps(USER))], "rejected": "no"},
    ]
    table = [{k: v if v is None or isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in table]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
            writer.writeheader()
            writer.writerows(table)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    else:
        path.write_text(json.dumps(table) if kind == "json" else "\n".join(map(json.dumps, table)))
    rows, _ = load(str(path), chatml, tmp_path)
    for i in range(3):
        assert texts(rows, chatml, i) == [CHATML_PROMPT, "yes<|im_end|>", "no<|im_end|>"], i
    assert texts(rows, chatml, 3)[:2] == ["[{}]", '{"role": [1], "content": 7}<|im_end|>']
    assert texts(rows, chatml, 4)[1] == json.dumps(USER) + "<|im_end|>"


def test_shared_prefix_and_transcripts(tmp_path: Path, chatml) -> None:
    """The shared messages are the prompt, never the last one; a transcript's turns become messages."""
    chosen = [*USER, assistant("a"), *USER, assistant("b")]
    rows, _ = load_rows(
        tmp_path,
        chatml,
        {"chosen": chosen, "rejected": [*USER, assistant("c")]},
        {"chosen": HUMAN + " yes\n\nindeed ", "rejected": HUMAN + " no"},
    )
    assert texts(rows, chatml, 0)[1:] == [
        "a<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nb<|im_end|>",
        "c<|im_end|>",
    ]
    messages = [{"role": "user", "content": "Hi"}, assistant("Hello"), {"role": "user", "content": "More"}]
    assert rows.row(1)[0].tolist() == encode_prompt(chatml, messages, CHAT)
    assert texts(rows, chatml, 1)[1:] == ["yes\n\nindeed<|im_end|>", "no<|im_end|>"]
    with pytest.warns(UserWarning, match="1 identical_responses"):
        load_rows(tmp_path, chatml, *[GOOD] * 30, {"chosen": chosen, "rejected": chosen})


def test_string_rows(tmp_path: Path) -> None:
    """Strings take no template: parts tokenised apart, BOS where the tokenizer adds one, never twice, EOS appended."""
    for add_bos, prompt, expected in ((True, "ask", "<s>ask"), (True, "<s>ask", "<s>ask"), (False, "ask", "ask")):
        tokenizer = tokenizer_for(FORMATS["mistral"], add_bos=add_bos)
        rows, _ = load_rows(tmp_path, tokenizer, GOOD | {"prompt": prompt})
        assert texts(rows, tokenizer) == [expected, "good</s>", "bad</s>"]
        assert encode_prompt(tokenizer, prompt, CHAT) == rows.row(0)[0].tolist()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER, "chosen": "yes"},
        {"prompt": USER, "chosen": "yes", "rejected": ["ignored"]},
        {"messages": [*USER, assistant("yes")]},
        {"chosen": [*USER, assistant("yes")]},
        {"chosen": "\n\nHuman: Hi there\n\nAssistant: yes"},
        {"instruction": "Hi there", "input": "", "output": "yes"},
        {"instruction": "Hi there", "output": "yes"},
    ],
)
def test_supervised_forms(row: dict, tmp_path: Path, chatml) -> None:
    """Supervised rows have no rejected tokens, whatever their form."""
    rows, _ = load_rows(tmp_path, chatml, row, pairs=False)
    assert texts(rows, chatml) == [CHATML_PROMPT, "yes<|im_end|>", ""]
    assert rows.rejected.tolist() == [0]


def test_alpaca_input_and_plain_supervised(tmp_path: Path, chatml, plain) -> None:
    """An instruction's input follows after a blank line; {prompt, chosen} strings take no template."""
    rows, _ = load_rows(tmp_path, chatml, {"instruction": "Add", "input": "1 2", "output": "3"}, pairs=False)
    assert rows.row(0)[0].tolist() == encode_prompt(chatml, [{"role": "user", "content": "Add\n\n1 2"}], CHAT)
    rows, _ = load_rows(tmp_path, plain, {"prompt": "ask", "chosen": "good"}, pairs=False)
    assert texts(rows, plain) == ["ask", "good<|endoftext|>", ""]


@pytest.mark.parametrize("length", [6, 7, 8, 9, 23])
def test_text_blocks(length: int, tmp_path: Path) -> None:
    """A document is [BOS] text EOS in blocks of max_length, all but a block's first token scored."""
    tokenizer = tokenizer_for(FORMATS["mistral"])
    document = "abcdefghijklmnopqrstuvwxyz"[:length]
    rows, report = load_rows(tmp_path, tokenizer, {"text": document}, {"text": "xy"}, pairs=False, max_length=8)
    whole = [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    blocks = [whole[i : i + 8] for i in range(0, len(whole), 8)]
    lost = len(blocks[-1]) == 1
    blocks = blocks[: len(blocks) - lost]
    assert [np.concatenate(rows.row(i)).tolist() for i in range(len(blocks))] == blocks
    assert rows.prompt.tolist() == [1] * (len(blocks) + 1) and not rows.rejected.any()
    assert report["text"] == {"documents": 2, "blocks": len(blocks) + 1} and report["read"] == report["kept"] == 2
    assert report["rows"] == len(rows)
    assert report["changed"].get("lost_end_of_turn", {"count": 0})["count"] == lost
    assert rows.where(len(blocks)).endswith("rows.jsonl:2")


# ---- files


def test_file_kinds(tmp_path: Path, plain) -> None:
    """The same rows come out of jsonl, json, both gzipped, parquet, a dataset folder, and a list of several."""
    table = [GOOD | {"prompt": f"ask {i}"} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(table, indent=2))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(table).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder/train.jsonl", *table)
    specs = [write(tmp_path / "a.jsonl", *table), write(tmp_path / "a.jsonl.gz", *table)]
    specs += [str(tmp_path / name) for name in ("a.json", "a.json.gz", "a.parquet", "folder:train")]
    for spec in [*specs, specs]:
        rows, report = load(spec, plain, tmp_path)
        copies = len(specs) if spec is specs else 1
        assert [texts(rows, plain, i)[0] for i in range(len(rows))] == [f"ask {i}" for i in range(3)] * copies
        assert report["read_per_file"] == [3] * copies
        assert rows.line.tolist() == [1, 2, 3] * copies and rows.files == tuple(specs if spec is specs else [spec])
    assert rows.where(len(rows) - 1) == f"{tmp_path}/folder:train:3"


def test_line_numbers_skip_blank_lines(tmp_path: Path, plain) -> None:
    """A blank line is no row but counts as a line; a byte-order mark is no error."""
    rows, report = load_rows(tmp_path, plain, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "", "   ", GOOD)
    assert rows.line.tolist() == [1, 4] and report["read"] == 2


def test_bad_files(tmp_path: Path, plain, monkeypatch) -> None:
    """A file that is missing, empty, of another kind, cut short or not a list is one line that names it."""
    whole = gzip.compress(
        b"".join(json.dumps(GOOD | {"prompt": os.urandom(9).hex()}).encode() + b"\n" for _ in range(500))
    )
    bad = {
        "missing.jsonl": (None, "no such file"),
        "empty.jsonl": (b"", "has no rows"),
        "blank.jsonl": (b"\n\n", "has no rows"),
        "empty.json": (b"[]", "has no rows"),
        "rows.xlsx": (b"a,b", "expected a .jsonl"),
        "cut.jsonl.gz": (whole[: len(whole) // 2], "damaged or cut short"),
        "cut.json.gz": (whole[: len(whole) // 2], "damaged or cut short"),
        "not.jsonl.gz": (b'{"a": 1}', "damaged or cut short"),
        "object.json": (b'{"a": 1}', "expected a JSON list"),
        "lines.json": (b'{"a": 1}\n{"a": 2}\n', r"name it .jsonl"),
        "latin.json": (b'["\xe9"]', "expected one JSON list"),
        "bad.parquet": (b"PAR1", "damaged or cut short"),
    }
    for name, (content, message) in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            load(str(tmp_path / name), plain, tmp_path, on_bad_row="drop")
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        load(str(tmp_path / "nowhere") + ":train", plain, tmp_path)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder/train.jsonl", GOOD)
    with pytest.raises(UserError, match="cannot be loaded as a dataset split"):
        load(f"{tmp_path}/folder:test", plain, tmp_path)

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=r"^some/name:train: .*Couldn't reach the Hub") as caught:
        load("some/name:train", plain, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


# ---- bad rows


MALFORMED = {
    "no object": ([1, 2], "wrong_type", "expected a JSON object"),
    "not JSON": ('{"prompt": "a", "cho', "invalid_json", "expected one JSON object a line"),
    "not UTF-8": (b'{"prompt": "a\xff"}', "invalid_utf8", "byte 14 of the line"),
    "half a character": (GOOD | {"prompt": "\ud800"}, "invalid_utf8", "half a character"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "missing_field", "field rejected: .*loss=sft"),
    "null rejected": (GOOD | {"rejected": None}, "missing_field", "field rejected: .*loss=sft"),
    "supervised row": ({"messages": [*USER, assistant("a")]}, "missing_field", "field chosen: .*loss=sft"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "missing_field", "field prompt: "),
    "no fields": ({}, "missing_field", "field chosen: "),
    "number": (GOOD | {"chosen": 3}, "wrong_type", "field chosen: expected a string, got a number"),
    "prompt object": (GOOD | {"prompt": {}}, "wrong_type", "field prompt: expected a string, got an object"),
    "messages in Python": (
        GOOD | {"chosen": str(USER)},
        "wrong_type",
        "field chosen: expected messages as JSON, got another notation",
    ),
    "messages, cut": (GOOD | {"prompt": json.dumps(USER)[:-3]}, "wrong_type", "field prompt: .*or a part of it"),
    "empty prompt": (GOOD | {"prompt": ""}, "no_prompt", "field prompt: expected at least one token"),
    "empty list": (GOOD | {"prompt": []}, "wrong_type", "field prompt: .*got an empty list"),
    "no role": (GOOD | {"prompt": [{"content": "a"}]}, "wrong_type", "field prompt: .*message 1 without a role"),
    "no content": (GOOD | {"prompt": [{"role": "user"}]}, "wrong_type", "field prompt: .*nothing in message 1"),
    "assistant prompt": (
        GOOD | {"prompt": [*USER, assistant("a")]},
        "wrong_roles",
        "field prompt: .*does not end with",
    ),
    "user response": (
        {"prompt": USER, "chosen": USER, "rejected": "a"},
        "wrong_roles",
        "field chosen: .*first message",
    ),
    "response ends with user": (
        {"prompt": USER, "chosen": "a", "rejected": [assistant("a"), *USER]},
        "wrong_roles",
        "field rejected: .*last message",
    ),
    "nothing shared": (
        {"chosen": [*USER, assistant("a")], "rejected": [{"role": "user", "content": "b"}, assistant("a")]},
        "no_prompt",
        "share the prompt",
    ),
    "list and string": ({"chosen": [*USER, assistant("a")], "rejected": "b"}, "wrong_type", "field rejected: "),
    "transcript ends with Human": (
        {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "wrong_roles",
        "field chosen: .*Assistant turn",
    ),
    "transcripts differ": (
        {"chosen": HUMAN + " a", "rejected": HUMAN.replace("More", "Else") + " b"},
        "no_prompt",
        "equal up to the last",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_rows(case: str, tmp_path: Path, chatml) -> None:
    """Each malformed kind stops with FILE:LINE, field and fix, or is dropped, counted and shown as an example."""
    bad, kind, message = MALFORMED[case]
    table = (GOOD, GOOD, bad, GOOD)
    table = tuple(json.dumps(row) if isinstance(row, list) else row for row in table)
    with pytest.raises(UserError, match=message) as caught:
        load_rows(tmp_path, chatml, *table)
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:3: ")
    assert str(caught.value).endswith("(or data.on_bad_row=drop)") and "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
    rows, report = load_rows(tmp_path, chatml, *table, on_bad_row="drop")
    assert rows.line.tolist() == [1, 2, 4] and (report["read"], report["kept"]) == (4, 3)
    assert list(report["dropped"]) == [kind] and report["dropped"][kind]["count"] == 1
    assert report["dropped"][kind]["examples"][0].startswith(f"{tmp_path}/rows.jsonl:3: ")


SUPERVISED_MALFORMED = {
    "nothing known": ({"question": "a"}, "missing_field", "field chosen: .*messages"),
    "messages end with user": ({"messages": USER}, "wrong_roles", "field messages: "),
    "only an answer": ({"messages": [assistant("a")]}, "no_prompt", "field messages: "),
    "no instruction": ({"output": "a"}, "wrong_type", "field instruction: "),
    "text list": ({"text": ["a"]}, "wrong_type", "field text: "),
    "no prompt": ({"chosen": "a"}, "missing_field", "field prompt: "),
}


@pytest.mark.parametrize("case", SUPERVISED_MALFORMED)
def test_malformed_supervised_rows(case: str, tmp_path: Path, chatml) -> None:
    """The supervised forms are checked as the pairs are."""
    bad, kind, message = SUPERVISED_MALFORMED[case]
    with pytest.raises(UserError, match=f"rows.jsonl:2: {message}"):
        load_rows(tmp_path, chatml, GOOD, bad, pairs=False)
    _, report = load_rows(tmp_path, chatml, GOOD, bad, pairs=False, on_bad_row="drop")
    assert {kind: entry["count"] for kind, entry in report["dropped"].items()} == {kind: 1}


def test_first_bad_row_is_named_whatever_is_wrong(tmp_path: Path) -> None:
    """A later row that fails an earlier check does not hide the file's first bad row."""
    tokenizer = tokenizer_for(
        FORMATS["plain"]._replace(template="{% for m in messages %}{{ m.content }}{{ messages|length }}{% endfor %}")
    )
    with pytest.raises(
        UserError, match=r"rows.jsonl:2: .*token 8 is '1' in the prompt, '2' .*renders the prompt differently"
    ):
        load_rows(tmp_path, tokenizer, GOOD, {"prompt": USER, "chosen": "a", "rejected": "b"}, "not JSON")


def test_prompt_is_not_a_prefix(tmp_path: Path) -> None:
    """A token over the border is a bad row that says so; never a shifted one."""
    form = FORMATS["plain"]._replace(template="{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = tokenizer_for(form, texts=["hello"] * 9, vocab_size=270)
    row = {"prompt": [{"role": "user", "content": "hel"}], "chosen": "lo", "rejected": " no"}
    with pytest.raises(UserError, match="rows.jsonl:1: field chosen: .*a token spans the border"):
        load_rows(tmp_path, tokenizer, row)
    good = row | {"chosen": " yes"}
    rows, report = load_rows(tmp_path, tokenizer, row, good, on_bad_row="drop")
    assert texts(rows, tokenizer) == ["hel", " yes<|endoftext|>", " no<|endoftext|>"]
    assert report["dropped"]["not_a_prefix"]["count"] == 1


def test_template_errors(tmp_path: Path, plain) -> None:
    """What a template raises is the row's error; no template at all is the user's, under either policy."""
    tokenizer = tokenizer_for(FORMATS["gemma"])
    row = {"prompt": [{"role": "system", "content": "x"}, *USER], "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match="rows.jsonl:1: the chat template refuses .*System role not supported"):
        load_rows(tmp_path, tokenizer, row)
    with pytest.raises(UserError, match="System role not supported"):
        encode_prompt(tokenizer, row["prompt"], CHAT)
    for policy in ("error", "drop"):
        with pytest.raises(UserError, match="^data.chat_template=null"):
            load_rows(tmp_path, plain, {"prompt": USER, "chosen": "a", "rejected": "b"}, on_bad_row=policy)


def test_uninformative_rows(tmp_path: Path, plain) -> None:
    """Empty and identical responses are dropped with one warning; over 5% of a file is an error under either policy."""
    table = [GOOD] * 38 + [GOOD | {"chosen": " \n"}, GOOD | {"chosen": "bad"}]
    for _ in range(2):  # also when it comes from the cache
        with pytest.warns(UserWarning, match="1 empty_response .*1 identical_responses") as caught:
            rows, report = load_rows(tmp_path, plain, *table)
        assert len(caught) == 1 and len(rows) == report["kept"] == 38
        assert {kind: entry["count"] for kind, entry in report["dropped"].items()} == {
            "empty_response": 1,
            "identical_responses": 1,
        }
    for policy in ("error", "drop"):
        with pytest.raises(UserError, match="rows.jsonl: 2 of 39 rows have an empty response or two equal ones"):
            load_rows(tmp_path, plain, *table[1:], on_bad_row=policy)
    others = write(tmp_path / "others.jsonl", *[GOOD] * 100)
    with pytest.raises(UserError, match="rows.jsonl: 2 of 39"):
        load([others, str(tmp_path / "rows.jsonl")], plain, tmp_path)


def test_nothing_left(tmp_path: Path, plain) -> None:
    """Where no row is kept the error has the counts and the limit."""
    with pytest.raises(UserError, match=r"none of 2 rows is left \(2 too_long; data.max_length=4"):
        load_rows(tmp_path, plain, GOOD, GOOD, max_length=4)


# ---- truncation


LONG = {"prompt": "0123456789", "chosen": "abcdef", "rejected": "xyz"}  # P=10, C=7, R=4 with the EOS


@pytest.mark.parametrize(
    ("max_length", "truncation", "bos", "expected"),
    [
        (17, "drop", "", ["0123456789", "abcdef$", "xyz$"]),
        (16, "drop", "", None),
        (12, "prompt_left", "", ["56789", "abcdef$", "xyz$"]),
        (8, "prompt_left", "", ["9", "abcdef$", "xyz$"]),
        (7, "prompt_left", "", None),
        (12, "prompt_left", "<s>", ["<s>6789", "abcdef$", "xyz$"]),
        (9, "prompt_left", "<s>", ["<s>9", "abcdef$", "xyz$"]),
        (8, "prompt_left", "<s>", None),
        (15, "response_right", "", ["0123456789", "abcde", "xyz$"]),
        (12, "response_right", "", ["0123456789", "ab", "xy"]),
        (11, "response_right", "", ["0123456789", "a", "x"]),
        (10, "response_right", "", None),
    ],
)
def test_truncation(max_length: int, truncation: str, bos: str, expected: list[str] | None, tmp_path: Path) -> None:
    """Each policy against hand-made rows: same prompt for both responses, no made-up end-of-turn, all counted."""
    tokenizer = tokenizer_for(FORMATS["mistral"], add_bos=bool(bos))
    short = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows, report = load_rows(tmp_path, tokenizer, LONG, short, max_length=max_length, truncation=truncation)
    assert texts(rows, tokenizer, len(rows) - 1) == [bos + "q", "a</s>", "b</s>"]
    changed = {kind: entry["count"] for kind, entry in report["changed"].items()}
    if expected is None:
        assert rows.line.tolist() == [2] and report["dropped"]["too_long"]["count"] == 1 and not changed
        return
    assert texts(rows, tokenizer) == [text.replace("$", "</s>") for text in expected]
    lost = sum(not text.endswith("$") for text in expected[1:])
    wanted = {"truncated_prompt": int(expected[0] != bos + LONG["prompt"]), "truncated_response": int(lost > 0)}
    wanted["lost_end_of_turn"] = lost
    assert changed == {kind: count for kind, count in wanted.items() if count}


def test_prompt_left_keeps_the_templates_bos(tmp_path: Path) -> None:
    """A BOS that only the template writes is kept too, with the prompt's end: the generation prompt."""
    tokenizer = tokenizer_for(FORMATS["llama3"], add_bos=False)
    row = {"prompt": USER, "chosen": "yes", "rejected": "no"}
    rows, _ = load_rows(tmp_path, tokenizer, row, max_length=4 + 1 + 13, truncation="prompt_left")
    end = "<|start_header_id|>assistant<|end_header_id|>\n\n"  # 13 tokens
    assert texts(rows, tokenizer) == ["<|begin_of_text|>" + end, "yes<|eot_id|>", "no<|eot_id|>"]


def test_identical_after_truncation(tmp_path: Path, plain) -> None:
    """Responses that truncation makes equal teach nothing and are counted so."""
    twins = {"prompt": "0123", "chosen": "same, then this", "rejected": "same, then that"}
    table = [GOOD] * 30 + [twins]
    with pytest.warns(UserWarning, match="1 identical_after_truncation"):
        rows, report = load_rows(tmp_path, plain, *table, max_length=10, truncation="response_right")
    assert len(rows) == 30 and report["dropped"]["identical_after_truncation"]["count"] == 1


# ---- accounting


KINDS = {
    "good": GOOD,
    "invalid_json": "{",
    "missing_field": {"prompt": "a", "chosen": "b"},
    "wrong_type": GOOD | {"rejected": 1},
    "empty_response": GOOD | {"rejected": " "},
    "identical_responses": GOOD | {"rejected": "good"},
    "too_long": GOOD | {"prompt": "p" * 40},
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=60))
def test_every_row_is_accounted_for(kinds: list[str]) -> None:
    """read = kept + dropped, each kind's count is right, and the rows kept are the good ones in order."""
    tokenizer = tokenizer_for()
    wanted = {kind: kinds.count(kind) for kind in kinds if kind != "good"}
    useless = wanted.get("empty_response", 0) + wanted.get("identical_responses", 0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = (Path(folder), tokenizer, *[KINDS[kind] for kind in kinds])
        if useless > 0.05 * len(kinds) or "good" not in kinds:
            with pytest.raises(UserError, match="equal ones|is left"):
                load_rows(*arguments, max_length=20, on_bad_row="drop")
            return
        rows, report = load_rows(*arguments, max_length=20, on_bad_row="drop")
        assert {kind: entry["count"] for kind, entry in report["dropped"].items()} == wanted
        assert report["read"] == len(kinds) == report["kept"] + sum(wanted.values())
        assert rows.line.tolist() == [i for i, kind in enumerate(kinds, start=1) if kind == "good"]
        assert report["tokens"] == len(rows.ids) == len(rows) * (3 + 5 + 4)
        assert report["lengths"]["total"]["p50"] == 12
        assert json.loads(json.dumps(report)) == report


# ---- cache


def test_cache_hit_and_keys(tmp_path: Path, monkeypatch) -> None:
    """A second load is read from disk, equal; anything that decides tokens or what is kept changes the key."""
    tokenizer = tokenizer_for(FORMATS["llama3"])
    spec = write(tmp_path / "rows.jsonl", GOOD, {"prompt": USER, "chosen": "a", "rejected": "b"})
    first, report = load(spec, tokenizer, tmp_path)
    keys = {report["cache_key"]}
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_build", None)  # nothing is tokenised again
        again, report_again = load(spec, tokenizer, tmp_path)
        moved = tmp_path / "moved.jsonl"
        moved.write_bytes(Path(spec).read_bytes())
        elsewhere, _ = load(str(moved), tokenizer, tmp_path)
    assert report_again == report and isinstance(again.ids, np.memmap)
    for name in dataset.ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert elsewhere.where(1) == f"{moved}:2"

    changes = [
        {"template_date": "2022-01-01"},
        {"max_length": 400},
        {"truncation": "prompt_left"},
        {"on_bad_row": "drop"},
        {"pairs": False},
    ]
    for change in changes:
        keys.add(load(spec, tokenizer, tmp_path, **change)[1]["cache_key"])
    tokenizer.chat_template = LLAMA3.replace("Today", "This")
    keys.add(load(spec, tokenizer, tmp_path)[1]["cache_key"])
    for other in (tokenizer_for(FORMATS["llama3"], add_bos=False), tokenizer_for(FORMATS["chatml"])):
        keys.add(load(spec, other, tmp_path)[1]["cache_key"])
    write(Path(spec), GOOD, {"prompt": USER, "chosen": "a", "rejected": "c"})
    keys.add(load(spec, tokenizer, tmp_path)[1]["cache_key"])
    assert len(keys) == 1 + len(changes) + 4

    tokenizer("text", truncation=True, max_length=3)  # a tokenizer's last call is no part of it
    assert load(spec, tokenizer, tmp_path)[1]["cache_key"] in keys


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "no report", "bad report"])
def test_damaged_cache_is_made_again(damage: str, tmp_path: Path, plain) -> None:
    """A cache folder that lost a file, an end, a byte or its report is replaced by a whole one."""
    spec = write(tmp_path / "rows.jsonl", GOOD)
    first, report = load(spec, plain, tmp_path)
    folder = tmp_path / "cache/tokens" / report["cache_key"]
    ids = folder / "ids.npy"
    match damage:
        case "missing":
            ids.unlink()
        case "cut":
            ids.write_bytes(ids.read_bytes()[:-4])
        case "flipped":
            ids.write_bytes(ids.read_bytes()[:-4] + b"\1\0\0\0")
        case "no report":
            (folder / "report.json").unlink()
        case "bad report":
            (folder / "report.json").write_text("[]")
    assert load(spec, plain, tmp_path)[1] == report
    again, _ = load(spec, plain, tmp_path)
    assert isinstance(again.ids, np.memmap) and again.ids.tolist() == first.ids.tolist()
    assert [path.name for path in folder.parent.iterdir()] == [report["cache_key"]]


def test_two_writers_share_a_cache(tmp_path: Path, plain) -> None:
    """Loads at the same moment all succeed, agree, and leave one whole folder."""
    spec = write(tmp_path / "rows.jsonl", *[GOOD] * 200)
    results = []
    threads = [threading.Thread(target=lambda: results.append(load(spec, plain, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(report == results[0][1] for _, report in results)
    assert [path.name for path in (tmp_path / "cache/tokens").iterdir()] == [results[0][1]["cache_key"]]


# ---- order


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 4), (8, 4), (3, 8), (101, 7)])
def test_order(num_rows: int, batch_size: int) -> None:
    """Every row once an epoch, the last slice short, epochs and seeds in different orders, each step on its own."""
    steps = schedule.steps_per_epoch(num_rows, batch_size)
    epochs = [
        [schedule.step_rows(epoch * steps + k, num_rows, batch_size, seed=3) for k in range(steps)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert [len(step) for step in epoch[:-1]] == [batch_size] * (steps - 1)
        assert len(epoch[-1]) == num_rows - batch_size * (steps - 1)
        assert sorted(np.concatenate(epoch)) == list(range(num_rows))
    schedule.epoch_order.cache_clear()
    late = schedule.step_rows(2 * steps, num_rows, batch_size, seed=3)  # without the steps before
    assert late.tolist() == epochs[2][0].tolist()
    if num_rows > 8:
        orders = [np.concatenate(epoch).tolist() for epoch in epochs]
        orders += [schedule.epoch_order(num_rows, 4, 0).tolist()]
        assert len({tuple(order) for order in orders}) == len(orders)


# ---- real data


REAL = os.environ.get("RPO_TEST_DATA")


@pytest.mark.skipif(REAL is None, reason="RPO_TEST_DATA names no folder with real data")
@pytest.mark.parametrize(
    ("name", "count", "multi_turn"),
    [
        ("hh_rlhf_helpful_test", 2333, True),
        ("rasbt_polite_1100", 1094, False),
        ("llamafactory_dpo_en_demo_300", 300, True),
    ],
)
def test_real_pairs(name: str, count: int, multi_turn: bool, tmp_path: Path) -> None:
    """Real pairs all load, their texts come back from the tokens, and each response ends in one end-of-turn."""
    path = Path(REAL, name, "pairs.jsonl.gz")
    with gzip.open(path, "rt") as stream:
        table = [json.loads(line) for line in stream]
    tokenizer = tokenizer_for(FORMATS["llama3"], texts=[row["chosen"] for row in table[:200]], vocab_size=1000)
    rows, report = load(str(path), tokenizer, tmp_path, max_length=16384)
    assert len(rows) == len(table) == report["read"] == report["kept"] == count
    end = tokenizer.eos_token_id
    for i in range(0, count, 7):
        prompt, chosen, rejected = rows.row(i)
        assert tokenizer.decode(chosen) == table[i]["chosen"].strip() + "<|eot_id|>"
        assert tokenizer.decode(rejected) == table[i]["rejected"].strip() + "<|eot_id|>"
        assert (chosen == end).sum() == (rejected == end).sum() == 1
        assert (prompt == end).sum() == len(table[i]["prompt"]) + (table[i]["prompt"][0]["role"] != "system")
    turns = np.array([len(row["prompt"]) for row in table])
    assert (turns.max() > 1) == multi_turn

    limit = int(np.percentile(rows.prompt + np.maximum(rows.chosen, rows.rejected), 90))
    fits = rows.prompt + np.maximum(rows.chosen, rows.rejected) <= limit
    shorter, report = load(str(path), tokenizer, tmp_path, max_length=limit)
    assert shorter.line.tolist() == rows.line[fits].tolist()
    assert report["dropped"]["too_long"]["count"] == (~fits).sum()


@pytest.mark.skipif(REAL is None, reason="RPO_TEST_DATA names no folder with real data")
def test_real_instructions(tmp_path: Path, chatml) -> None:
    """Real {instruction, input, output} rows in a gzipped JSON list load as supervised rows."""
    rows, report = load(f"{REAL}/rasbt_polite_1100/sft_instruction_data.json.gz", chatml, tmp_path, pairs=False)
    assert len(rows) == report["read"] == 1100 and not rows.rejected.any()


def test_parse_ignores_rejected_of_supervised_rows() -> None:
    """Without pairs a bad or missing rejected response changes nothing."""
    assert formats.parse({"prompt": "a", "chosen": "b", "rejected": 3}, pairs=False)[:3] == ("a", "b", None)
