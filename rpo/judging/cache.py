"""Judges' replies on disk, which several processes may read and add to at once.

CACHE/DIGEST.jsonl      the replies of one model, one object a line: "key", a digest of everything that the reply depends on,
                        and "reply". A line is appended as soon as its reply comes: a kill loses pending replies. Locked
                        while a process looks which requests are left, and takes them.
CACHE/DIGEST.*.asking   the keys of the requests that a process is sending now. It holds the file's lock, which the system
                        frees however it ends.

DIGEST is of the model's name alone: where it is served does not matter.
"""

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from rpo.errors import UserError
from rpo.files import JsonLines
from rpo.judging.client import KEPT, Reply, Request
from rpo.judging.settings import Asked


def key_of(request: Request, judge: Asked) -> str:
    """SHA-256 of what a reply depends on: the model's name, sampling, all messages, the repeat's number; not the server's URL."""
    parameters = {
        "temperature": judge.temperature,
        "max_tokens": request.max_tokens or judge.max_tokens,
        "top_logprobs": request.top_logprobs,
        "system": judge.system,
        "extra_body": judge.extra_body or {},
    }
    if request.sampling:
        parameters["sampling"] = dict(request.sampling)
    what = list(request.messages) if request.prompt is None else {"prompt": request.prompt}
    return _digest([_name(judge), parameters, request.repeat, what])


def _name(judge: Asked) -> str | None:
    return judge.cache_as or judge.model


def _digest(values: list) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Cache:
    """The replies of one model, `replies` by key: those that were on disk (`cached`) and those added since."""

    def __init__(self, folder: Path, judge: Asked):
        self._folder, self._stem = folder, _digest([_name(judge)])[:16]
        file = folder / f"{self._stem}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(file)
        except OSError as error:
            raise UserError(f"{file}: cannot be read or written ({error.strerror}); use another cache_dir") from None
        self.replies: dict[str, Reply] = {}
        self._take(self._lines.rows)

    def _take(self, rows: dict[str, dict]) -> None:
        for key, row in rows.items():
            if key in self.replies:
                continue
            try:
                fields = dict(row["reply"])
                dropped = tuple(fields.pop("dropped"))
                self.replies[key] = Reply(**fields, error=None, cached=True, dropped=dropped)
            except (KeyError, TypeError, ValueError):
                print(f"note: {self._lines.path}: skipping a damaged reply", flush=True)

    def add(self, key: str, reply: Reply) -> None:
        """Keeps the reply. Raises UserError: the file cannot be written."""
        fields = {name: value for name, value in asdict(reply).items() if name not in ("error", "cached")}
        try:
            self._lines.append([{"key": key, "reply": fields}])
        except OSError as error:
            path = self._lines.path
            raise UserError(f"{path}: cannot be written ({error.strerror}); free some space; {KEPT}") from None
        self.replies[key] = reply

    @contextmanager
    def claimed(self, keys: Collection[str]) -> Iterator[set[str]]:
        """Those of the keys without a reply, on disk or here, that no other process is asking for; until the block ends others
        leave these to this one."""
        with self._locked():
            self._take(self._lines.refresh())
            free = {key for key in keys if key not in self.replies} - self._asked_elsewhere()
            own = self._announced(free) if free else None
        try:
            yield free
        finally:
            if own is not None:
                Path(own.name).unlink(missing_ok=True)
                own.close()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lines.path.open("a") as file:
            with suppress(OSError):  # a file system without locks: two processes may pay for one reply
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _announced(self, keys: Collection[str]) -> TextIO:
        path = self._folder / f"{self._stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.asking"
        file = path.open("w")
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write("\n".join(keys))
        file.flush()
        return file

    def _asked_elsewhere(self) -> set[str]:
        """The keys that living processes are asking for; what others left behind is removed."""
        keys: set[str] = set()
        for path in self._folder.glob(f"{self._stem}.*.asking"):
            try:
                with path.open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)  # nobody holds it: its process was killed
            except BlockingIOError:
                with suppress(FileNotFoundError):
                    keys |= set(path.read_text().split())
            except OSError:  # removed by its owner since, or a file system without locks
                continue
        return keys
