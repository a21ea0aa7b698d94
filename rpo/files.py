"""Files that are written whole or not at all: folders of named arrays with a report; digests of contents."""

import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path

import numpy as np

from rpo.errors import UserError


def read_arrays(folder: Path) -> tuple[dict[str, np.ndarray], dict] | None:
    """The arrays (read-only memory maps) and the report of `write_arrays`; None where they are absent or damaged."""
    try:
        report = json.loads((folder / "report.json").read_text())
        checksum, names = report.pop("checksum"), report.pop("arrays")
        if not all(re.fullmatch(r"\w{1,64}", name) for name in names):  # ../../x would be read from elsewhere
            return None
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        return (arrays, report) if checksum == _checksum(arrays) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # a disk that does not answer is no reason to make anew, or to delete, what is on it
        raise UserError(
            f"cache_dir: {folder} can not be read ({error.strerror}); mend it or give another folder"
        ) from None
    except (EOFError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def write_arrays(folder: Path, arrays: dict[str, np.ndarray], report: dict) -> None:
    """Writes beside `folder` and renames: a reader sees all or nothing, a damaged folder is replaced, and of two
    writers (same content: the folder's name is its hash) the first stays."""
    fresh = folder.with_name(f".new-{uuid.uuid4().hex}")
    try:
        fresh.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"cache_dir={folder.parent}: can not be written ({error.strerror}); give another folder"
        ) from None
    try:
        for name, array in arrays.items():
            np.save(fresh / f"{name}.npy", array)
        contents = {**report, "arrays": list(arrays), "checksum": _checksum(arrays)}
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


def sync(folder: Path) -> None:
    """Makes the names in `folder`, and what its files hold, survive the machine."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def digest(*parts: np.ndarray | bytes) -> str:
    """`sha256 XXXXXXXXXXXXXXXX` of arrays or bytes, to tell whether a file still holds what the run started with."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return f"sha256 {whole.hexdigest()[:16]}"
