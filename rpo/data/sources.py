"""Files and data sets to raw rows with their line numbers; nothing here knows what a row means.

What is wrong with one row is a `RowError`, with a file a `UserError`.
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
from typing import TYPE_CHECKING, Any, BinaryIO

from rpo.data.formats import RowError, type_name
from rpo.errors import UserError
from rpo.text import one_line

if TYPE_CHECKING:
    import pyarrow

UNINFORMATIVE = ("empty_response", "identical_responses", "identical_after_truncation")
MAX_UNINFORMATIVE = 0.05  # of a file's rows
WELL_FORMED = (*UNINFORMATIVE, "too_long")  # kinds of dropped rows that data.on_bad_row does not govern
EXAMPLES = 3  # kept in the report for each kind
# A file that unpacks without end must not fill the memory.
MAX_LINE = 2**26  # bytes of a row in a .jsonl; the rest of a longer one is read past
MAX_JSON = 2**32  # bytes of a .json, which is read whole


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
        raise UserError(f"{path}: expected a JSON list of rows, found {type_name(rows)}; wrap the rows in [ ]")
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
