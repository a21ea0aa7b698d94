"""Files that are written whole or not at all: folders of named arrays with a report; digests of contents."""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from rpo.errors import UserError, fixable
from rpo.text import first_line, human

DIGITS = 16  # hexadecimal digits of a digest that are kept: 64 bits


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes beside `path` and renames: a reader sees the old file or the whole new one, after a power cut too."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # several failing ranks may write the same file
    try:
        with part.open("wb") as file:
            file.write(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or a machine that dies leaves an empty file under the name
        part.rename(path)
    except OSError:  # a full disk
        part.unlink(missing_ok=True)
        raise


def to_lines(rows: Iterable[dict]) -> str:
    """One JSON object per line; ASCII, so that no line separator of Unicode's stands inside a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def parse_lines(text: str) -> tuple[list[dict], int]:
    """(the objects of JSON lines, how many lines hold none): a killed writer leaves the last one half written."""
    objects, broken = [], 0
    # Not splitlines, which splits at characters that JSON leaves in a text.
    for line in filter(str.strip, text.split("\n")):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            broken += 1
    return objects, broken


class JsonLines:
    """Objects in a JSON lines file, found again by one of their fields; several processes may add to it at once.

    `rows` maps the field `key` to the object; of two with one key the later counts. A line that a killed writer left
    half written is skipped, and costs no other line.
    """

    def __init__(self, path: Path, key: str = "key"):
        self.path, self._key = path, key
        self.rows: dict[str, dict] = {}
        self._read = 0  # bytes of whole lines that are in `rows`
        self._torn = False
        self.refresh()

    def refresh(self) -> dict[str, dict]:
        """The rows that were added to the file since it was last read, by key."""
        data = b""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        whole = data.rfind(b"\n") + 1
        self._read += whole
        self._torn = whole < len(data)
        added = {row[self._key]: row for row in parse_lines(data.decode("utf-8", "replace"))[0] if self._has_key(row)}
        self.rows |= added
        return added

    def _has_key(self, row: dict) -> bool:
        return isinstance(row.get(self._key), str)

    def append(self, rows: Sequence[dict]) -> None:
        """Adds the rows, each with its key, at the end of the file."""
        data = ("\n" * self._torn + to_lines(rows)).encode()
        with self.path.open("ab", buffering=0) as file:  # one write: lines of two processes do not mix
            while data:
                data = data[file.write(data) :]
        self._torn = False
        self.rows |= {row[self._key]: row for row in rows}


def short_hash(*parts: str | bytes | list | dict) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of text, bytes and JSON values, each counted with its length."""
    texts = [json.dumps(part) if isinstance(part, list | dict) else part for part in parts]
    encoded = [text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text for text in texts]
    return sha256(*(len(data).to_bytes(8, "big") + data for data in encoded))[:DIGITS]


def read_arrays(folder: Path) -> tuple[dict[str, np.ndarray], dict] | None:
    """The arrays (read-only memory maps) and the report of `write_arrays`; None where they are absent or damaged."""
    try:
        report = json.loads((folder / "report.json").read_text())
        checksum, names = report.pop("checksum"), report.pop("arrays")
        if not all(re.fullmatch(r"\w{1,64}", name) for name in names):  # ../../x would be read from elsewhere
            return None
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        return (arrays, report) if checksum == sha256(*arrays.values()) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # a disk that does not answer is no reason to remake, or to delete, what is on it
        raise UserError(
            f"cache_dir: {folder} cannot be read ({error.strerror}); fix it or use another folder"
        ) from None
    except (EOFError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def write_arrays(folder: Path, arrays: dict[str, np.ndarray], report: dict) -> None:
    """Writes beside `folder` and renames: a reader sees all or nothing, a damaged folder is replaced, and of two
    writers (same content: the folder's name is its hash) the first stays."""
    fresh = folder.with_name(f".new-{uuid.uuid4().hex}")
    with fixable(f"cache_dir={folder.parent}: cannot be written", "; use another folder"):
        fresh.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            np.save(fresh / f"{name}.npy", array)
        contents = {**report, "arrays": list(arrays), "checksum": sha256(*arrays.values())}
        (fresh / "report.json").write_text(json.dumps(contents))
        if folder.exists() and read_arrays(folder) is None:
            folder.rename(fresh / "damaged")
        fresh.rename(folder)
        shutil.rmtree(folder / "damaged", ignore_errors=True)
    except OSError:
        if read_arrays(folder) is None:  # else the other writer was first
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def replacing(folder: Path, size: int, then: str) -> Iterator[Path]:
    """A new folder of `size` bytes, which is put into the place of `folder` when the block ends; until then that is as it was.

    Raises UserError, saying what to do `then`, where the disk refuses; of any failure nothing is left.
    """
    part = part_of(folder)
    with discarding(part, folder, size, then):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        put(part, folder)


def part_of(folder: Path) -> Path:
    """Where what becomes `folder` is written."""
    return folder.with_name(f"{folder.name}.part")


@contextmanager
def discarding(part: Path, folder: Path, size: int, then: str) -> Iterator[None]:
    """A block that writes into `part`, of which nothing is left where it fails; UserError where the disk refused."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        if not isinstance(error, OSError) and "(os error " not in str(error):  # so safetensors and tokenizers say it
            raise
        is_full = any(words in str(error) for words in ("No space", "quota", "os error 28", "Errno 28"))
        fix = f"make room for {human(size)}" if is_full else "see that its place can be written"
        raise UserError(f"{folder}: cannot be written ({first_line(error)}); {fix} and {then}") from None


def put(part: Path, folder: Path) -> None:
    """Puts the written `part` into the place of `folder`."""
    old = folder.with_name(f"{folder.name}.old")
    sync(part)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def sync(folder: Path) -> None:
    """Makes the names in `folder`, and what its files hold, survive the machine."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def sha256(*parts: np.ndarray | bytes) -> str:
    """Of arrays and bytes, end to end."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return whole.hexdigest()


def digest(*parts: np.ndarray | bytes) -> str:
    """`sha256 XXXXXXXXXXXXXXXX`, to tell whether a file still holds what the run started with."""
    return f"sha256 {sha256(*parts)[:DIGITS]}"


def key_of(facts: dict) -> str:
    """A name for what depends on `facts`, JSON values whose order does not matter: of a folder in a cache."""
    return sha256(json.dumps(facts, sort_keys=True).encode())[:DIGITS]
