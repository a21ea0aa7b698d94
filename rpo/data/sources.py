"""The raw rows of files and data sets, with their line numbers, whatever a row means.

What is wrong with one row is a `RowError`, with a file a `UserError`.
"""

import contextlib
import csv
import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from rpo.data.directories import below, is_beside, is_hidden, once, splits_of
from rpo.data.row_errors import RowError, type_name
from rpo.errors import UserError, fixable
from rpo.text import one_line

if TYPE_CHECKING:
    import pyarrow

UNINFORMATIVE = ("empty_response", "identical_responses", "identical_after_truncation")
MAX_UNINFORMATIVE = 0.05  # of a file's rows
WELL_FORMED = (*UNINFORMATIVE, "too_long")  # kinds of dropped rows that data.on_bad_row does not govern
EXAMPLES = 3  # kept in the report for each kind
# A file that unpacks without end must not fill the memory.
MAX_LINE = 2**26  # bytes of a row in a .jsonl; the rest of a longer one is skipped
MAX_JSON = 2**32  # bytes of a .json, which is read whole
Row = TypeVar("Row")
_ENDINGS = ".jsonl, .ndjson, .json, .csv (any of them with .gz) or .parquet"


@dataclass(frozen=True)
class Source:
    """One file or dataset split: what to call it, a digest of its content, and its rows, each with its line number."""

    name: str
    digest: str
    rows: Callable[[], Iterator[tuple[int, Any]]]  # (1-based line or row number, decoded row or RowError)
    weight: float = 1  # how often an epoch has each row of its part; of 0.5 every second
    part: int = 0  # which element of the mixture named it


# What names rows: see `open_sources`.
Spec = str | list[str | dict[str, Any]]


def rows_of(spec: Spec) -> Iterator[tuple[str, Any]]:
    """(FILE:LINE, row) of every row of the files `spec`; a row that cannot be decoded is a RowError."""
    for source in open_sources(spec, None):
        for line, row in source.rows():
            yield f"{source.name}:{line}", row


def check_new(places: dict[Any, str], key: Any, place: str, name: str) -> None:
    """Records in `places` that `key`, called `name`, is at `place`. Raises UserError if it was at another already."""
    if key in places:
        raise UserError(f"{place}: {name} is there already, at {places[key]}; keep one")
    places[key] = place


# ---- files


def open_sources(spec: Spec, revision: str | None) -> list[Source]:
    """The sources that `data.train` or `data.eval` names, in order; those of a pattern or a directory by name.

    An element is a file of FORMS, a pattern of files (*, ?, ** for any folders), a directory of files or one that
    datasets.save_to_disk wrote, or NAME:SPLIT with NAME a Hub dataset or a local directory that the datasets library can
    read; or one of these as `path` beside a `weight`. Raises UserError for anything else.
    """
    sources = []
    for part, item in enumerate(spec if isinstance(spec, list) else [spec]):
        path, weight = (item["path"], item["weight"]) if isinstance(item, dict) else (item, 1)
        sources += [replace(source, weight=weight, part=part) for source in _open(path, revision)]
    return sources


def _open(spec: str, revision: str | None) -> list[Source]:
    path = Path(os.path.expanduser(spec))
    # A name may be too long, a folder not to be entered.
    with fixable(f"{spec[:300]}: cannot be looked up", "; give a file, or NAME:SPLIT"):
        is_file, is_directory = path.is_file(), path.is_dir()
        matches = [] if is_file or is_directory else glob.glob(str(path), recursive=True)
    if is_file:
        return [_open_file(spec, path)]
    if is_directory:
        return _open_directory(spec, path)
    name, colon, split = spec.partition(":")
    if colon and split and (Path(name).expanduser().is_dir() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)):
        return [_open_dataset(spec, name, split, revision)]
    if matches:
        return _open_matches(spec, path, [Path(match) for match in matches])
    raise UserError(f"{spec}: no such file; give a {_ENDINGS} file, a directory, or HUB_NAME_OR_DIRECTORY:SPLIT")


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[int, Any]]] | None:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes[-1:] == [".gz"]
    suffix = "".join(suffixes[-2:-1] if packed else suffixes[-1:])
    return None if packed and suffix == ".parquet" else _READERS.get(suffix)


def _open_file(spec: str, path: Path) -> Source:
    if (reader := _reader(path)) is None:
        raise UserError(f"{spec}: expected a {_ENDINGS} file; convert or rename it")
    with fixable(f"{spec}: cannot be read", "; give a file that can"):
        digest = _digest([path])
    return Source(spec, digest, lambda: reader(path))


def _digest(paths: Sequence[Path]) -> str:
    if len(paths) > 1:
        return hashlib.sha256("".join(_digest([path]) for path in paths).encode()).hexdigest()
    with paths[0].open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _open_directory(spec: str, path: Path) -> list[Source]:
    """The data files in it and below, none left out without a word; or what datasets.save_to_disk wrote there."""
    with fixable(f"{spec}: cannot be read", "; give a directory that can"):
        if (path / "dataset_dict.json").is_file():
            raise UserError(f"{spec}: holds several splits; write {spec}:train")
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return [_open_saved(spec, path)]
        files = below(path)
    return _open_files(spec, path, files)


def _open_matches(spec: str, pattern: Path, matches: list[Path]) -> list[Source]:
    """The files that match a pattern, none twice where a link leads back; a directory that matches it is refused."""
    start = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    folders = [match for match in matches if match.is_dir() and not is_hidden(match.name)]
    if folders and "**" not in pattern.parts:
        fix = "give it, or a pattern of files such as *.jsonl"
        raise UserError(f"{spec}: matches the directory {min(folders)}, which a pattern does not enter; {fix}")
    return _open_files(spec, Path(*pattern.parts[:start]), once(match for match in matches if not match.is_dir()))


def _open_files(spec: str, root: Path, files: list[Path]) -> list[Source]:
    """All of them but README.md and the like, by name. Raises UserError for another kind of file, and for several splits."""
    files = [file for file in files if not is_beside(file)]
    if not files:
        raise UserError(f"{spec}: no data file in this directory; give a {_ENDINGS} file, or a dataset as {spec}:train")
    for file in files:
        if _reader(file) is None or not file.is_file():
            raise UserError(
                f"{file}: not a {_ENDINGS} file; remove it, or give files by a pattern such as {root}/*.jsonl"
            )
    first = {split: file for file in reversed(files) for split in splits_of(file.relative_to(root)) or {"no split"}}
    if len(first) > 1 and first.keys() != {"train", "no split"}:
        named = ", ".join(f"{split}: {first[split].relative_to(root)}" for split in sorted(first))
        is_directory = root == Path(spec).expanduser()
        by_name = is_directory and "train" in first and "no split" not in first
        fix = f"write {spec}:train" if by_name else "give the files of one"
        raise UserError(f"{spec}: holds files of several splits ({named}); {fix}")
    stems: dict[Path, Path] = {}
    for file in files:
        plain = file.with_suffix("") if file.suffix.lower() == ".gz" else file
        if (other := stems.setdefault(plain.with_suffix(""), file)) != file:
            raise UserError(f"{file}: by its name the rows of {other.name} in another form; give the files to be read")
    return [_open_file(str(file), file) for file in files]


def _open_saved(spec: str, path: Path) -> Source:
    import datasets  # heavy, and not needed for plain files

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # as of load_dataset
        raise UserError(f"{spec}: cannot be read as a saved dataset ({one_line(error)}); save it again") from None
    digest = _digest(sorted(file for file in path.iterdir() if file.is_file()))
    return Source(spec, digest, lambda: _read_dataset(spec, dataset))


def _open_dataset(spec: str, name: str, split: str, revision: str | None) -> Source:
    import datasets  # heavy, and not needed for plain files

    if (folder := Path(name).expanduser()).is_dir():
        name, revision = str(folder), None
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split / "state.json").is_file():
            names = ", ".join(sorted(file.parent.name for file in folder.glob("*/state.json")))
            raise UserError(f"{spec}: no such split; it has {names}")
        return _open_saved(spec, folder / split)
    if folder.is_dir():  # where no name says train, the library takes all for it that it does not know as another
        splits = {file: splits_of(file.relative_to(folder)) for file in below(folder) if _reader(file)}
        held_out = [file for file, names in splits.items() if "held-out" in names]
        if split == "train" and held_out and not any("train" in names for names in splits.values()):
            raise UserError(f"{spec}: would have the rows of {held_out[0]} too; give the files to be trained on")
    try:
        if folder.is_dir() and not any("data_files" in card.read_text() for card in folder.glob("README.md")):
            taken = datasets.load_dataset_builder(name).config.data_files or {}
            there = {os.path.realpath(file) for part in taken.values() for file in part}
            ours = (file for file, names in splits.items() if not names or split in names)
            if left := [file for file in ours if os.path.realpath(file) not in there]:
                raise UserError(f"{spec}: the datasets library would leave out {left[0]}; give the files to be read")
        dataset = datasets.load_dataset(name, split=split, revision=revision)
    except UserError:
        raise
    except Exception as error:  # the library raises many unrelated types for a name, split or network it cannot use
        fix = "check name, split and data.revision"
        raise UserError(f"{spec}: cannot be loaded as a dataset split ({one_line(error)}); {fix}") from None
    return Source(spec, dataset._fingerprint, lambda: _read_dataset(spec, dataset))


def _read_dataset(spec: str, dataset: Any) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(dataset, start=1)
    except Exception as error:  # a column of pictures or sounds is decoded only now
        raise UserError(f"{spec}: a row cannot be read ({one_line(error)}); give only text columns") from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file as a stream of bytes. Raises UserError if it cannot be read."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            if (start := stream.peek(4)[:4])[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
                raise UserError(f"{path}: is UTF-16 or UTF-32; re-encode it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _lines(stream: BinaryIO) -> Iterator[bytes | RowError]:
    while line := stream.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        while len(line) == MAX_LINE and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE)
        yield RowError("too_large", f"expected a line of less than {MAX_LINE >> 20} MiB; fix the row")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({one_line(error)}); it is damaged or cut short, fetch it again")


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with _opened(path) as stream:
        for number, line in enumerate(_lines(stream), start=1):
            if isinstance(line, RowError):
                yield number, line
            elif line.strip():
                yield number, _decode_line(line)


def _decode_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"byte {error.start + 1} of the line: expected UTF-8; re-encode the file")
    except (ValueError, RecursionError) as error:
        why = f"expected one JSON object a line ({one_line(error)}); a JSON list of rows belongs in a .json file"
        return RowError("invalid_json", why)


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    content = bytearray()
    with _opened(path) as stream:
        while len(content) <= MAX_JSON and (chunk := stream.read(2**20)):
            content += chunk
    if len(content) > MAX_JSON:
        raise UserError(f"{path}: over {MAX_JSON / 2**30:g} GiB; make it a .jsonl, which is read row by row")
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        fix = "name it .jsonl if it has one object a line"
        raise UserError(f"{path}: expected one JSON list of rows ({one_line(error)}); {fix}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of rows, got {type_name(rows)}; wrap the rows in [ ]")
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


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows under a header; an empty cell is absent. The number is that of a row's first line."""
    comma, name = ("\t", "tab") if ".tsv" in path.name.lower() else (",", "comma")
    csv.field_size_limit(MAX_LINE)
    with _opened(path) as stream:
        reader = csv.reader(_csv_lines(path, stream), delimiter=comma, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise UserError(f"{path}:1: expected a header ({error}); fix the line") from None
        if len(header) == 1 and any(other in header[0] for other in ",;\t|"):
            raise UserError(f"{path}:1: expected the header's names with a {name} between them; separate fields by it")
        if twice := sorted({field for field in header if header.count(field) > 1}):
            raise UserError(f"{path}:1: the header has {twice[0]!r} twice; rename one")
        while True:
            line = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                why = f"expected fields in double quotes or without any ({error}); fix the row"
                row = RowError("invalid_csv", why)
            else:
                row = _csv_row(header, values) if values else None
            if isinstance(row, RowError) and row.kind == "invalid_csv" and reader.line_num > line:
                until = f"takes lines {line} to {reader.line_num} for one row ({row})"
                raise UserError(f"{path}:{line}: a double quote that is not closed {until}")  # others are lost with it
            if row is not None:
                yield line, row


def _csv_lines(path: Path, stream: BinaryIO) -> Iterator[str]:
    encoding = "utf-8-sig"
    for number, line in enumerate(_lines(stream), start=1):
        if isinstance(line, RowError):
            raise UserError(f"{path}:{number}: {line}")
        yield line.decode(encoding, "surrogateescape")
        encoding = "utf-8"


def _csv_row(header: list[str], values: list[str]) -> Any:
    if len(values) != len(header):
        why = f"expected {len(header)} fields as in the header, got {len(values)}; quote fields with commas or newlines"
        return RowError("invalid_csv", why)
    row = {}
    for field, value in zip(header, values, strict=True):
        if any("\udc80" <= char <= "\udcff" for char in value):
            return RowError("invalid_utf8", f"field {field}: expected UTF-8; re-encode the file")
        row[field] = value or None
    return row


def _python_rows(batch: "pyarrow.RecordBatch") -> list[Any]:
    try:
        return batch.to_pylist()
    except Exception as error:  # text that is not UTF-8, a date that Python has not: each its own type
        if len(batch) > 1:
            return [row for i in range(len(batch)) for row in _python_rows(batch.slice(i, 1))]
        kind = "invalid_utf8" if isinstance(error, UnicodeDecodeError) else "wrong_type"
        return [RowError(kind, f"a value cannot be read ({one_line(error)}); fix the row")]


_READERS = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".jsonlines": _read_jsonl, ".json": _read_json}
_READERS |= {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}


# ---- kept and dropped rows


class Tally:
    """Counts by kind, each with its first examples as [file index, line, why]."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict] = {}

    def add(self, kind: str, place: tuple[int, int], why: str, count: int = 1) -> None:
        entry = self.kinds.setdefault(kind, {"count": 0, "examples": []})
        entry["count"] += count
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append([*place, why])

    def merge(self, later: "Tally") -> None:
        for kind, entry in later.kinds.items():
            mine = self.kinds.setdefault(kind, {"count": 0, "examples": []})
            mine["count"] += entry["count"]
            mine["examples"] = [*mine["examples"], *entry["examples"]][:EXAMPLES]

    def count(self, *kinds: str) -> int:
        return sum(self.kinds[kind]["count"] for kind in kinds or self.kinds if kind in self.kinds)


def parse_rows(
    sources: Sequence[Source], parse: Callable[[Any], Row], on_bad_row: str
) -> tuple[list[tuple[str, Row]], int, Tally]:
    """(each row that `parse` takes with its FILE:LINE; how many were read; the rows that `parse` refuses).

    Raises UserError for the first refused row, unless `on_bad_row` is drop.
    """
    rows, read, dropped = [], 0, Tally()
    for file, source in enumerate(sources):
        for line, raw in source.rows():
            read += 1
            try:
                rows.append((f"{source.name}:{line}", parse(raw)))
            except RowError as error:
                if on_bad_row == "error":
                    raise UserError(f"{source.name}:{line}: {error} (or data.on_bad_row=drop)") from None
                dropped.add(error.kind, (file, line), str(error))
    return rows, read, dropped


def check_file(name: str, read: int, uninformative: int) -> None:
    """Raises UserError for a file without rows, or with too many that teach nothing."""
    if not read:
        raise UserError(f"{name}: has no rows; give a file with data")
    if uninformative > MAX_UNINFORMATIVE * read:
        raise UserError(
            f"{name}: {uninformative} of {read} rows have an empty response or two equal ones (after truncation), "
            f"expected at most {MAX_UNINFORMATIVE:.0%}; remove them"
        )
