"""No file leads the data readers to anything but rows, counted bad rows, or one line that names the file."""

import contextlib
import datetime
import decimal
import gzip
import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpo import files
from rpo.data import dataset, sources
from rpo.errors import UserError
from tests.helpers.rows import CFG, make_tokenizer
from tests.helpers.templates import FORMATS, tokenizer_for

# derandomize: the same inputs on every machine; the slow version below draws many more.
QUICK = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
TOKENIZERS = [make_tokenizer(), tokenizer_for(FORMATS["chatml"]), tokenizer_for(FORMATS["gemma"])]


# ---- what a file may hold


odd_text = st.one_of(
    st.text(max_size=30),
    st.text(alphabet=st.characters(categories=["Cs", "Cc", "Cf", "Zl", "Zp", "Lo"]), max_size=8),
    st.sampled_from(
        ["", " ", "\n", "\0", "\ufeff", "\ud800", "ba be", "\n\nHuman: a\n\nAssistant: b", "Human:", "<|im_end|>"]
    ),
    st.text(alphabet="ab ", min_size=1, max_size=3).map(lambda text: text * 3000),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**18), 2**63]),
    st.floats(allow_nan=True, allow_infinity=True),
    odd_text,
)
names = st.one_of(st.sampled_from(["prompt", "chosen", "rejected", "messages", "role", "content", "text"]), odd_text)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "", "\n", "assistant\n"]) | odd_text
messages = st.lists(
    st.fixed_dictionaries(
        {"role": roles | values},
        optional={"content": odd_text | values, "tool_calls": values, "name": values},
    )
    | values,
    max_size=4,
)
nested = st.sampled_from(["[" * n + "]" * n for n in (50, 400, 900, 5000)] + ['{"a":' * 300 + "1" + "}" * 300])
sides = odd_text | messages | values
fields = ["prompt", "chosen", "rejected", "messages", "instruction", "input", "output", "text"]
good = {"prompt": "ba be", "chosen": "bi bo", "rejected": "bu"}
ask, answer = ({"role": role, "content": "ba be"} for role in ("user", "assistant"))
near = [  # a row of each form; one field of it is changed
    good,
    {"prompt": [ask], "chosen": "bi", "rejected": [answer]},
    {"chosen": [ask, answer], "rejected": [ask, answer | {"content": "bo"}]},
    {"chosen": "Human: ba\n\nAssistant: be", "rejected": "Human: ba\n\nAssistant: bi"},
    {"messages": [ask, answer]},
    {"instruction": "ba", "input": "be", "output": "bi"},
    {"text": "ba be bi " * 40},
]
changed = st.builds(lambda row, name, side: row | {name: side}, st.sampled_from(near), st.sampled_from(fields), sides)
table_rows = st.one_of(
    st.sampled_from(near), changed, st.fixed_dictionaries({}, optional=dict.fromkeys(fields, sides)), values
)


@st.composite
def jsonl(draw):
    """Lines of JSON, near-JSON and bytes, with every kind of line end."""
    lines = draw(
        st.lists(
            st.one_of(
                table_rows.map(lambda row: json.dumps(row).encode()),
                table_rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
                nested.map(lambda text: f'{{"prompt": {text}, "chosen": {text}, "rejected": "a"}}'.encode()),
                st.sampled_from(
                    [
                        b"",
                        b"\xef\xbb\xbf" + json.dumps(good).encode(),
                        json.dumps(good).encode("utf-16"),
                        b'{"prompt": "a", "prompt": 1, "chosen": "b", "chosen": "c", "rejected": "d"}',
                        b'{"prompt": NaN, "chosen": Infinity, "rejected": -Infinity}',
                        b'{"prompt": ' + b"9" * 5000 + b"}",
                        json.dumps(good).encode()[:-1],
                    ]
                ),
                st.binary(max_size=40),
            ),
            max_size=6,
        )
    )
    return draw(st.sampled_from([b"\n", b"\r\n", b"\r"])).join([*lines, *draw(st.sampled_from([[], [b""]]))])


@st.composite
def damaged(draw, content):
    """`content`, cut short or with a byte changed."""
    whole = draw(content)
    at = draw(st.integers(0, max(len(whole) - 1, 0)))
    kind = draw(st.sampled_from(["whole", "cut", "flipped", "longer"]))
    if kind == "cut":
        return whole[:at]
    if kind == "flipped" and whole:
        return whole[:at] + bytes([whole[at] ^ draw(st.integers(1, 255))]) + whole[at + 1 :]
    return whole + (draw(st.binary(max_size=8)) if kind == "longer" else b"")


message_type = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
MESSAGES = [[{"role": "user", "content": "ba"}, {"role": "assistant", "content": "be"}], None]
COLUMNS = [  # (a column of two values, its type)
    (["ba be", "bi"], pyarrow.string()),
    (["ba be", None], pyarrow.large_string()),
    (["ba be", "ba be"], pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
    (MESSAGES, message_type),
    ([[{"role": "user", "content": None}], []], message_type),
    ([b"\xff\xfe", b"ba"], pyarrow.binary()),
    ([1, 2**62], pyarrow.int64()),
    ([float("nan"), float("inf")], pyarrow.float64()),
    ([decimal.Decimal("1.50"), None], pyarrow.decimal128(10, 2)),
    ([datetime.datetime(2020, 1, 1), None], pyarrow.timestamp("ns")),
    ([2**50, 0], pyarrow.timestamp("ms")),
    ([2**60, 0], pyarrow.duration("us")),
    ([[("a", "b")], [("a", "c"), ("a", "d")]], pyarrow.map_(pyarrow.string(), pyarrow.string())),
    ([None, None], pyarrow.null()),
]


@st.composite
def parquet(draw):
    """A table with odd types under the names that matter, some names twice, and text that is not UTF-8."""
    columns = draw(st.lists(st.tuples(st.sampled_from(fields), st.sampled_from(COLUMNS)), min_size=1, max_size=5))
    arrays = []
    for _, (column, kind) in columns:
        try:
            arrays.append(pyarrow.array(column, kind))
        except pyarrow.ArrowInvalid:  # numbers as the dates that they would be
            arrays.append(pyarrow.array(column, pyarrow.int64()).cast(kind, safe=False))
    if draw(st.booleans()):  # a string that claims to be text
        bad = pyarrow.array([b"\xff\xfe", b"ba"], pyarrow.binary())
        arrays[0] = pyarrow.Array.from_buffers(pyarrow.string(), 2, bad.buffers())
    table = pyarrow.Table.from_arrays(arrays, [name for name, _ in columns])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


FILES = {
    ".jsonl": st.one_of(jsonl(), st.binary(max_size=60)),
    ".jsonl.gz": damaged(st.one_of(jsonl(), st.just(json.dumps(good).encode() * 200)).map(gzip.compress)),
    ".json": st.one_of(
        st.lists(table_rows, max_size=5).map(lambda table: json.dumps(table).encode()),
        values.map(lambda value: json.dumps(value).encode()),
        nested.map(str.encode),
        damaged(st.just(json.dumps([good] * 3).encode())),
    ),
    ".json.gz": damaged(st.lists(table_rows, max_size=3).map(lambda table: gzip.compress(json.dumps(table).encode()))),
    ".parquet": damaged(parquet()),
}


# ---- what may come of it


def check(suffix, content, tokenizer, folder):
    """Both policies of both readers on one file; returns how many rows were kept in all."""
    path, kept = Path(folder) / f"rows{suffix}", 0
    path.write_bytes(content)
    for policy in ("error", "drop"):
        cfg = replace(CFG, on_bad_row=policy, max_length=64)
        for pairs in (True, False, None):
            try:
                if pairs is None:
                    loaded, prompts, places, report = dataset.load_prompts(str(path), cfg, tokenizer)
                    assert len(loaded) == len(prompts) == len(places) == report["kept"] and all(loaded)
                else:
                    loaded, report = dataset.load(
                        str(path), cfg, tokenizer, pairs=pairs, cache_dir=Path(folder) / "cache"
                    )
                    assert len(loaded) == report["rows"] and (report["kept"] == len(loaded) or not pairs)
                    assert (
                        (loaded.prompt > 0).all()
                        and (loaded.chosen > 0).all()
                        and ((loaded.rejected > 0) == pairs).all()
                    )
                    assert len(loaded.ids) == loaded.starts[-1] and loaded.ids.max() < len(tokenizer)
                counts = [entry["count"] for entry in report["dropped"].values()]
                assert report["read"] == report["kept"] + sum(counts)
                for entry in report["dropped"].values():
                    assert entry["examples"] and all(line.startswith(f"{path}:") for line in entry["examples"])
                    assert all(len(line.splitlines()) == 1 and len(line) < 1000 for line in entry["examples"])
                json.dumps(report)
                kept += len(loaded)
            except UserError as error:
                message = str(error)
                assert len(message.splitlines()) == 1 and len(message) < 1000, message
                assert message.startswith((str(path), f"data.eval={path}", "data.chat_template=")), message
    return kept


def fuzz(suffix, num_files):
    @settings(max_examples=num_files, **QUICK)
    @given(content=FILES[suffix], tokenizer=st.sampled_from(TOKENIZERS))
    def run(content, tokenizer):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(suffix, content, tokenizer, folder)

    run()


def deep(depth):
    message = f'{{"role": "user", "content": "ba", "more": {"[" * depth}{"]" * depth}}}'
    sides = (f'[{message}, {{"role": "assistant", "content": "{word}"}}]' for word in ("be", "bi"))
    return '{{"chosen": {}, "rejected": {}}}'.format(*sides).encode()


def with_bad_text():
    texts = pyarrow.array([b"ba be", b"\xff\xfe"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, texts.buffers())
    table = pyarrow.table({"prompt": ["ba", "be"], "chosen": texts, "rejected": ["bu", "bu"]})
    pyarrow.parquet.write_table(table, sink := pyarrow.BufferOutputStream())
    return sink.getvalue().to_pybytes()


def lines(*table):
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in table)


SYSTEM = [{"role": "system", "content": "be"}, {"role": "user", "content": "ba"}]
KNOWN = {  # what once was a traceback, an unnamed file or all the memory: (suffix, content, rows dropped of each reader)
    "half a character": (".jsonl", lines(good, good | {"prompt": "\ud800"}), {"invalid_utf8": 1}),
    "a call without text": (
        ".jsonl",
        lines(good, good | {"chosen": [answer | {"content": 5, "tool_calls": [1]}], "prompt": [ask]}),
        {"wrong_type": 1},
    ),
    "calls that are text": (
        ".jsonl",
        lines(good, {"prompt": [ask], "chosen": [answer | {"tool_calls": "f()"}], "rejected": "bi"}),
        {"wrong_type": 1},
    ),
    "deep": (".jsonl", lines(good, *map(deep, (300, 470, 500, 700, 900, 960, 980, 2000))), None),
    "a template's refusal": (
        ".jsonl",
        lines(good, {"prompt": SYSTEM, "chosen": "a", "rejected": "b"}),
        {"template_error": 1},
    ),
    "a long line": (".jsonl", lines(good, good | {"chosen": "be " * 500}, good), {"too_large": 1}),
    "a long last line": (".jsonl.gz", gzip.compress(lines(good, b" " * 1024, b"x" * 2048)), {"too_large": 2}),
    "a roleplay": (
        ".jsonl",
        lines(good, {"prompt": [ask], "chosen": [answer | {"role": "a\n" * 900}], "rejected": "bi"}),
        {"wrong_roles": 1},
    ),
    "text in parquet": (".parquet", with_bad_text(), {"invalid_utf8": 1}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_once_broke(name, tmp_path, monkeypatch):
    """Each of these rows is a bad row, counted by both readers, and the rows around it are kept."""
    suffix, content, dropped = KNOWN[name]
    monkeypatch.setattr(sources, "MAX_LINE", 1024 if dropped and "too_large" in dropped else sources.MAX_LINE)
    tokenizer = TOKENIZERS[2]  # its template takes no system message
    assert check(suffix, content, tokenizer, tmp_path) >= 3
    cfg, path = replace(CFG, on_bad_row="drop"), str(tmp_path / f"rows{suffix}")
    for reader in ("load", "load_prompts"):
        if dropped is None or (reader == "load_prompts" and {"wrong_roles", "wrong_type"} & set(dropped)):
            continue  # as many as Python's stack has room for; a prompt is read where the answer is wrong
        options = {"pairs": True, "cache_dir": tmp_path / "again"} if reader == "load" else {}
        *_, report = getattr(dataset, reader)(path, cfg, tokenizer, **options)
        assert {kind: entry["count"] for kind, entry in report["dropped"].items()} == dropped


def test_a_file_that_unpacks_without_end(tmp_path, monkeypatch):
    """A .json past the limit is refused by name before it is whole in memory."""
    monkeypatch.setattr(sources, "MAX_JSON", 2**21)
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(b"[" + b" " * 2**23 + b"]"))
    with pytest.raises(UserError, match=f"^{path}: over 0.00195312 GiB; make it a .jsonl, which is read row by row$"):
        dataset.load(str(path), CFG, TOKENIZERS[0], pairs=True, cache_dir=tmp_path)


@settings(max_examples=100, **QUICK)
@given(
    name=st.one_of(st.sampled_from(["~nobody/x.jsonl", "x" * 5000 + ".jsonl", "x\0.jsonl", "", ":", "/:x"]), st.text())
)
def test_any_name(name):
    """Whatever stands where a file's name should: one line."""
    # "./:/nowhere" is the folder "." as a data set: a checkout with its virtual environment is looked through for minutes.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), pytest.raises(UserError) as caught:
        sources.open_sources(f"./{name}/nowhere" if not name.startswith(("~", "x")) else name, None)
    assert len(str(caught.value)) < 1000 + len(name)


cells = st.one_of(values, st.sampled_from(["ids", "../ids", 0, ["ids"], {"ids": 1}]))


@settings(max_examples=60, **QUICK)
@given(
    report=st.fixed_dictionaries({}, optional={"arrays": cells, "checksum": cells, "more": cells}) | values,
    array=st.binary(max_size=80),
    header=st.booleans(),
)
def test_any_cache(report, array, header):
    """Whatever lies in a cache's folder: the arrays that were written, or damage that is rebuilt."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(report))
        (folder / "ids.npy").write_bytes(b"\x93NUMPY\x01\x00" * header + array)
        assert files.read_arrays(folder) is None


@pytest.mark.parametrize("suffix", FILES)
def test_any_file(suffix):
    """Bytes, JSON, gzip and parquet of any kind, whole or damaged, under both policies: rows, counts, or one line."""
    fuzz(suffix, 40)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FILES)
def test_very_many_files(suffix):
    """The same with many more files."""
    fuzz(suffix, 300)
