"""Tokenising that takes long: what a stretch of a file became, kept on disk until the whole is done, and a line on screen.

A text far over the bound on its tokens is recognised by its beginning.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rpo.data.sources import Tally
from rpo.data.tokenizer import Encoded, tokenize
from rpo.files import read_arrays, write_arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TALLIES = ("dropped", "changed", "noticed")
SECONDS = 30  # of work that a kill may cost
PROGRESS = 10  # seconds between two lines on screen
CHARACTERS = 32  # per token of the bound: of a longer text the beginning is tokenised first


@dataclass
class Part:
    """What the `read` rows of a stretch of a file became; the arrays have an entry per kept row, or block of a document."""

    read: int = 0
    documents: int = 0
    blocks: int = 0
    ids: list[np.ndarray] = field(default_factory=list)  # int32, of each row [prompt | chosen | rejected]
    lengths: list[tuple[int, int, int]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)  # (file, line)
    dropped: Tally = field(default_factory=Tally)
    changed: Tally = field(default_factory=Tally)
    noticed: Tally = field(default_factory=Tally)  # of rows that are kept as they are
    unread: set[str] = field(default_factory=set)

    def add(self, rows: list[Encoded], place: tuple[int, int]) -> None:
        self.ids += [np.array(sum(row, start=[]), np.int32) for row in rows]
        self.lengths += [tuple(map(len, row)) for row in rows]
        self.places += [place] * len(rows)

    def extend(self, other: Part) -> None:
        """Adds what came after it."""
        for name in ("read", "documents", "blocks", "ids", "lengths", "places"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped.merge(other.dropped)
        self.changed.merge(other.changed)
        self.noticed.merge(other.noticed)
        self.unread |= other.unread


class Kept:
    """The parts on disk, each found by its file and how many of the file's rows come before it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, file: int, start: int) -> Part | None:
        found = read_arrays(self.folder / f"{file}-{start}")
        if found is None:
            return None
        arrays, report = found
        part = Part(**{name: report[name] for name in ("read", "documents", "blocks")}, unread=set(report["unread"]))
        for name in TALLIES:
            getattr(part, name).kinds = report[name]
        part.lengths, part.places = ([tuple(row) for row in arrays[name].tolist()] for name in ("lengths", "places"))
        ends = np.cumsum(arrays["lengths"].sum(axis=1, dtype=np.int64))
        part.ids = np.split(np.array(arrays["ids"]), ends[:-1]) if len(ends) else []
        return part

    def write(self, file: int, start: int, part: Part) -> None:
        arrays = {
            "ids": np.concatenate(part.ids) if part.ids else np.zeros(0, np.int32),
            "lengths": np.array(part.lengths, np.int32).reshape(-1, 3),
            "places": np.array(part.places, np.int32).reshape(-1, 2),
        }
        report = {name: getattr(part, name) for name in ("read", "documents", "blocks")}
        report |= {name: getattr(part, name).kinds for name in TALLIES} | {"unread": sorted(part.unread)}
        write_arrays(self.folder / f"{file}-{start}", arrays, report)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def progress(name: str, start: int, part: Part) -> Iterator[None]:
    """While the block runs, a line every PROGRESS seconds, from a thread: a single row may take long."""
    ended = threading.Event()

    def say() -> None:
        while not ended.wait(PROGRESS):
            print(f"{name}: {start + part.read:,} rows tokenised so far", flush=True)

    thread = threading.Thread(target=say, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def is_over(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> bool:
    """True where the text's beginning has over twice `max_tokens` tokens; False of any text that may have fewer.

    Twice, because the tokens at the cut may be others than in the whole text. A beginning that comes to few tokens is
    made longer: a tokenizer may take a long run of blanks, or a long word that it does not know, for one token.
    """
    size = CHARACTERS * max_tokens
    while len(text) > size:
        if len(tokenize(tokenizer, [text[:size]])[0]) > 2 * max_tokens:
            return True
        size *= 8
    return False
