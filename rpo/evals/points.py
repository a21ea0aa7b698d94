"""What a long evaluation has measured so far, on disk as soon as it is known, so that a killed one goes on from there.

RUN_DIR/points.jsonl     one object per measurement: its key ("run", "step" or "bon"), what it was made of ("of": a
                         digest), and what was found
RUN_DIR/samples.jsonl    answers, each with the key of its measurement
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rpo import dist
from rpo.text import redacted

KEY = ("run", "step", "bon")


class Points:
    """The measurements of `run_dir`. A collective: rank 0 reads and writes, all ranks know what is there."""

    def __init__(self, run_dir: Path):
        self.points, self.samples = run_dir / "points.jsonl", run_dir / "samples.jsonl"
        self.known: dict[tuple, dict] = dist.on_main(self._read)

    def _read(self) -> dict[tuple, dict]:
        """The whole lines of an earlier start; what a kill left half written is taken out."""
        points = _whole_lines(self.points)
        known = {_key(point): point for point in points}  # of two of one key the later
        samples = [sample for sample in _whole_lines(self.samples) if _key(sample) in known]
        for path, lines in ((self.points, points), (self.samples, samples)):
            if path.exists():
                part = path.with_name(f"{path.name}.part")
                part.write_text("".join(json.dumps(line) + "\n" for line in lines))
                part.replace(path)
        return known

    def get(self, of: str, **key: Any) -> dict | None:
        """The measurement of that key, if there is one and it was made of the same things."""
        found = self.known.get(_key(redacted(key)))
        return found if found is not None and found["of"] == of else None

    def add(self, of: str, found: dict, samples: Sequence[dict] = (), **key: Any) -> dict:
        """Writes what was found, its samples first; returns it with its key."""
        key = redacted(key)  # text of models and data stays as it is, paths may hold a secret
        point = {**key, "of": of, **found}
        self.known[_key(point)] = point

        def write() -> None:
            for path, lines in ((self.samples, [key | sample for sample in samples]), (self.points, [point])):
                with path.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)

        dist.on_main(write)
        return point


def _key(line: dict) -> tuple:
    return tuple(line.get(name) for name in KEY)


def _whole_lines(path: Path) -> list[dict]:
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError):  # a kill came while it was written; what was measured after it stays
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]
