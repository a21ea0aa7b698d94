"""What an evaluation has computed so far, on disk, so that one that was killed computes nothing twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rpo import dist
from rpo.files import JsonLines
from rpo.text import redacted


class Store:
    """Values by key, on disk as soon as they are known. A collective: rank 0 reads and writes, all ranks know them."""

    def __init__(self, file: Path):
        self.file = file
        self._lines: JsonLines | None = None  # on rank 0 alone
        self._rows: dict[str, dict] = dict(dist.on_main(self._read))

    def _read(self) -> dict[str, dict]:
        self._lines = JsonLines(self.file)
        return self._lines.rows

    def get(self, key: str) -> Any | None:
        row = self._rows.get(key)
        return None if row is None else row["value"]

    def add(self, key: str, value: Any, **about: Any) -> Any:
        """Writes the value, with what a reader of the file should know `about` it; returns it."""
        row = {"key": key, **redacted(about), "value": value}  # texts stay as they are, a path may hold a secret
        self._rows[key] = row
        dist.on_main(lambda: self._lines.append([row]))
        return value

    def once(self, key: str, compute: Callable[[], Any], **about: Any) -> Any:
        """The value under `key`: known already, or what `compute` returns now (JSON types)."""
        known = self.get(key)
        return self.add(key, compute(), **about) if known is None else known
