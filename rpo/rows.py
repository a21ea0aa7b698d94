"""Rows of preference and supervised data as they lie in files, brought to one form.

A file gives raw rows with their line numbers (`open_sources`); `parse` looks at each and makes an `Example` of it.
Nothing here knows of tokens. What is wrong with one row is a `RowError`, with a file a `UserError`.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from rpo.config import UserError

if TYPE_CHECKING:
    import pyarrow

Messages = list[dict[str, Any]]

UNINFORMATIVE = ("empty_response", "identical_responses", "identical_after_truncation")
MAX_UNINFORMATIVE = 0.05  # of a file's rows
WELL_FORMED = (*UNINFORMATIVE, "too_long")  # kinds of dropped rows that data.on_bad_row does not govern
EXAMPLES = 3  # kept in the report for each kind
# A file that unpacks without end must not fill the memory.
MAX_LINE = 2**26  # bytes of a row in a .jsonl; the rest of a longer one is read past
MAX_JSON = 2**32  # bytes of a .json, which is read whole


class RowError(Exception):
    """A row that can not be kept: `kind` is what the report counts it under, the text says what is wrong."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


class Example(NamedTuple):
    """One row, its form forgotten.

    Chat: `prompt` is a message list and the responses are message lists. Plain: all are strings. A document to be
    cut into blocks: `prompt` is None and `chosen` its text. `rejected` is None for supervised rows.
    """

    prompt: str | Messages | None
    chosen: str | Messages
    rejected: str | Messages | None


@dataclass(frozen=True)
class Source:
    """One file or dataset split: what to call it, a digest of its content, and its rows, each with its line number."""

    name: str
    digest: str
    rows: Callable[[], Iterator[tuple[int, Any]]]  # (1-based line or row number, decoded row or RowError)


# ---- files


def open_sources(spec: str | list[str], revision: str | None) -> list[Source]:
    """The sources that `data.train` or `data.eval` names, in order.

    An element is a .jsonl, .json (either with .gz) or .parquet file, or NAME:SPLIT with NAME a Hub dataset or a
    local directory that the datasets library can read. Raises UserError for anything else.
    """
    return [_open(item, revision) for item in ([spec] if isinstance(spec, str) else spec)]


def _open(spec: str, revision: str | None) -> Source:
    path = Path(os.path.expanduser(spec))
    try:
        found = path.is_file()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise UserError(f"{spec[:300]}: can not be looked up ({error.strerror}); give a file, or NAME:SPLIT") from None
    if found:
        readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
        suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        if suffix not in readers or path.name.endswith(".parquet.gz"):
            raise UserError(
                f"{spec}: expected a .jsonl, .json (either may end in .gz) or .parquet file; convert or rename it"
            )
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{spec}: can not be read ({error.strerror})") from None
        return Source(spec, digest, lambda: readers[suffix](path))
    if path.is_dir():
        raise UserError(f"{spec}: a directory is read as a dataset and needs a split; write {spec}:train")
    name, colon, split = spec.partition(":")
    if colon and split and (Path(name).expanduser().is_dir() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)):
        return _open_dataset(spec, name, split, revision)
    raise UserError(f"{spec}: no such file; give a .jsonl, .json or .parquet file, or HUB_NAME_OR_DIRECTORY:SPLIT")


def _open_dataset(spec: str, name: str, split: str, revision: str | None) -> Source:
    import datasets  # heavy, and not needed for plain files

    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            dataset = datasets.load_dataset(str(folder), split=split)
        else:
            dataset = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the library raises many unrelated types for a name, split or network it cannot use
        raise UserError(
            f"{spec}: cannot be loaded as a dataset split ({one_line(error)}); check name, split and data.revision"
        ) from None
    return Source(spec, dataset._fingerprint, lambda: _read_dataset(spec, dataset))


def _read_dataset(spec: str, dataset: Any) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(dataset, start=1)
    except Exception as error:  # a column of pictures or sounds is decoded only now
        raise UserError(f"{spec}: a row can not be read ({one_line(error)}); give text columns alone") from None


def one_line(error: Exception) -> str:
    """What the exception says, on one line and not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _stream(path: Path):
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _lines(stream: BinaryIO) -> Iterator[bytes | RowError]:
    while line := stream.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        while len(line) == MAX_LINE and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE)
        yield RowError("too_large", f"expected a line of less than {MAX_LINE >> 20} MiB; mend the row")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({one_line(error)}); it is damaged or cut short, fetch it again")


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with _stream(path) as stream:
            for number, line in enumerate(_lines(stream), start=1):
                if isinstance(line, RowError):
                    yield number, line
                elif line.strip():
                    yield number, _decode_line(line)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _decode_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"byte {error.start + 1} of the line: expected UTF-8; re-encode the file")
    except (ValueError, RecursionError) as error:
        return RowError(
            "invalid_json",
            f"expected one JSON object a line ({one_line(error)}); a JSON list of rows belongs in a .json file",
        )


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    content = bytearray()
    try:
        with _stream(path) as stream:
            while len(content) <= MAX_JSON and (chunk := stream.read(2**20)):
                content += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None
    if len(content) > MAX_JSON:
        raise UserError(f"{path}: over {MAX_JSON / 2**30:g} GiB; make it a .jsonl, which is read row by row")
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: expected one JSON list of rows ({one_line(error)}); name it .jsonl if it has one object a line"
        ) from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of rows, found {_type_name(rows)}; wrap the rows in [ ]")
    yield from enumerate(rows, start=1)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for row in _python_rows(batch):
                yield (number := number + 1), row
    except Exception as error:  # damage shows late and in many ways: a column's name that is not UTF-8, no memory
        raise _unreadable(path, error) from None


def _python_rows(batch: "pyarrow.RecordBatch") -> list[Any]:
    try:
        return batch.to_pylist()
    except Exception as error:  # text that is not UTF-8, a date that Python has not: each its own type
        if len(batch) > 1:
            return [row for i in range(len(batch)) for row in _python_rows(batch.slice(i, 1))]
        kind = "invalid_utf8" if isinstance(error, UnicodeDecodeError) else "wrong_type"
        return [RowError(kind, f"a value can not be read ({one_line(error)}); mend the row")]


# ---- forms


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "nothing" if value is None else type(value).__name__)


def _string(row: dict, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise RowError("wrong_type", f"field {field}: expected a string, found {_type_name(value)}; mend the row")
    return value


def _messages(row: dict, field: str) -> Messages:
    value = row[field]
    expected = f"field {field}: expected a non-empty list of {{role, content}} messages with text content"
    if not isinstance(value, list) or not value:
        raise RowError(
            "wrong_type", f"{expected}, found {'an empty list' if value == [] else _type_name(value)}; mend the row"
        )
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError("wrong_type", f"{expected}; message {number} has no role; mend the row")
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            raise RowError("wrong_type", f"{expected}; message {number} has {_type_name(content)}; mend the row")
        if calls and not isinstance(calls, list):
            raise RowError(
                "wrong_type", f"field {field}: expected tool_calls as a list, message {number} has {_type_name(calls)}"
            )
    return value


def _response(row: dict, field: str) -> Messages:
    if isinstance(row[field], str):
        return [{"role": "assistant", "content": row[field]}]
    messages = _messages(row, field)
    _check_response(messages, field)
    return messages


def _check_response(messages: Messages, field: str) -> None:
    for place, message in (("first", messages[0]), ("last", messages[-1])):
        if message["role"] != "assistant":
            raise RowError(
                "wrong_roles",
                f"field {field}: expected the {place} message of the response from the assistant, found role "
                f"{message['role'][:40]!r}; a response starts after the prompt and ends with the answer",
            )


def _check_prompt(messages: Messages, field: str) -> Messages:
    if not messages:
        raise RowError(
            "no_prompt", f"field {field}: expected messages before the answer, the prompt, found none; add them"
        )
    if messages[-1]["role"] == "assistant":
        raise RowError(
            "wrong_roles",
            f"field {field}: expected a prompt that does not end with an assistant message; mend the row",
        )
    return messages


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def _transcript(row: dict, field: str) -> Messages:
    """An HH transcript ("\\n\\nHuman: ...\\n\\nAssistant: ...") as messages, white space around turns removed."""
    _, *turns = _TURN.split(_string(row, field).strip())
    if not turns or turns[-2] != "Assistant":
        raise RowError(
            "wrong_roles",
            f"field {field}: expected a transcript 'Human: ...' that ends with an Assistant turn; mend the row",
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(turns[::2], turns[1::2], strict=True)]


def _split_last(messages: Messages, field: str) -> Example:
    _check_response(messages[-1:], field)
    return Example(_check_prompt(messages[:-1], field), messages[-1:], None)


def _split_shared(chosen: Messages, rejected: Messages) -> Example:
    shared = 0
    try:
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
    except RecursionError:
        raise RowError("wrong_type", "fields chosen, rejected: a message is nested too deeply; mend the row") from None
    if not shared:
        raise RowError(
            "no_prompt",
            "fields chosen, rejected: expected message lists that share the prompt at their beginning; mend the row",
        )
    _check_response(chosen[shared:], "chosen")
    _check_response(rejected[shared:], "rejected")
    return Example(_check_prompt(chosen[:shared], "chosen"), chosen[shared:], rejected[shared:])


def _transcripts(row: dict, pairs: bool) -> Example:
    chosen = _transcript(row, "chosen")
    if not pairs:
        return _split_last(chosen, "chosen")
    rejected = _transcript(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise RowError(
            "no_prompt",
            "fields chosen, rejected: expected transcripts equal up to the last Assistant turn; mend the row",
        )
    return Example(_check_prompt(chosen[:-1], "chosen"), chosen[-1:], rejected[-1:])


def _supervised(row: dict) -> Example:
    if "messages" in row:
        return _split_last(_messages(row, "messages"), "messages")
    if "instruction" in row or "output" in row:
        content = _string(row, "instruction")
        if "input" in row and (extra := _string(row, "input")):
            content += "\n\n" + extra
        return Example(
            [{"role": "user", "content": content}], [{"role": "assistant", "content": _string(row, "output")}], None
        )
    if "text" in row:
        return Example(None, _string(row, "text"), None)
    raise RowError(
        "missing_field", "field chosen: expected one of chosen, messages, instruction with output, or text; add it"
    )


def parse(row: Any, pairs: bool) -> Example:
    """The row as an `Example`, its form told from its fields; a field that holds null counts as absent.

    With `pairs` a row has `chosen` and `rejected`; without, `rejected` is neither needed nor looked at, and the
    supervised forms ({prompt, chosen}, {messages}, {instruction, input, output}, {text}) are read too.
    Raises RowError.
    """
    if not isinstance(row, dict):
        raise RowError("wrong_type", f"expected a JSON object with named fields, found {_type_name(row)}; mend the row")
    row = {field: value for field, value in row.items() if value is not None}
    if "chosen" not in row and not pairs:
        return _supervised(row)
    for field in ("chosen", "rejected") if pairs else ():
        if field not in row:
            raise RowError(
                "missing_field",
                f"field {field}: expected in every pair, found none; add it, or use loss=sft for data without pairs",
            )
    fields = ("chosen", "rejected") if pairs else ("chosen",)
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        _check_prompt(_messages(row, "prompt"), "prompt")
        return Example(prompt, _response(row, "chosen"), _response(row, "rejected") if pairs else None)
    if any(isinstance(row[field], list) for field in fields):  # UltraFeedback repeats its prompt as a string
        chosen = _messages(row, "chosen")
        return _split_shared(chosen, _messages(row, "rejected")) if pairs else _split_last(chosen, "chosen")
    if prompt is None and _is_transcript(row["chosen"]):
        return _transcripts(row, pairs)
    if prompt is None:
        raise RowError("missing_field", "field prompt: expected a string or a list of messages, found none; add it")
    return Example(_string(row, "prompt"), _string(row, "chosen"), _string(row, "rejected") if pairs else None)


def parse_prompt(row: Any) -> str | Messages:
    """The prompt of a row of any form that `parse` reads, or of one without an answer. Raises RowError."""
    if isinstance(row, dict) and row.get("chosen") is None:
        if isinstance(row.get("prompt"), list):
            return _check_prompt(_messages(row, "prompt"), "prompt")
        if row.get("prompt") is not None:
            return _string(row, "prompt")
        if row.get("messages") is not None:
            messages = _messages(row, "messages")
            return _check_prompt(messages[:-1] if messages[-1]["role"] == "assistant" else messages, "messages")
        row = row | {"output": "-"} if row.get("instruction") is not None else row
    prompt = parse(row, pairs=False).prompt
    if prompt is None:
        raise RowError("missing_field", "field prompt: expected a prompt, found a text to be continued; add one")
    return prompt


def is_empty(response: str | Messages) -> bool:
    """Whether nothing but white space would be learned: a blank text, or a last message that neither says nor calls."""
    if isinstance(response, str):
        return not response.strip()
    return not (response[-1].get("content") or "").strip() and not response[-1].get("tool_calls")


# ---- what became of them


class Tally:
    """Counts by kind, each with its first examples as [file index, line, why]."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict] = {}

    def add(self, kind: str, place: tuple[int, int], why: str, count: int = 1) -> None:
        entry = self.kinds.setdefault(kind, {"count": 0, "examples": []})
        entry["count"] += count
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append([*place, why])

    def count(self, *kinds: str) -> int:
        return sum(self.kinds[kind]["count"] for kind in kinds or self.kinds if kind in self.kinds)


def check_file(name: str, read: int, uninformative: int) -> None:
    """Raises UserError for a file without rows, or with too many that teach nothing."""
    if not read:
        raise UserError(f"{name}: has no rows; give a file with data")
    if uninformative > MAX_UNINFORMATIVE * read:
        raise UserError(
            f"{name}: {uninformative} of {read} rows have an empty response or two equal ones (after truncation), "
            f"expected at most {MAX_UNINFORMATIVE:.0%}; look at how the file was made and remove them"
        )
