"""Rows for training and held-out rows out of one file: python -m rpo.data.split DATA FOLDER eval=150 [train=1000]

DATA is anything that data.train takes. So many rows, the same on every call, go to FOLDER/eval.jsonl, and all others or
`train` of them to FOLDER/train.jsonl, both in their order. Rows with a held-out row's prompt go to neither.
"""

import json
import sys
from pathlib import Path

import numpy as np

from rpo.data import formats
from rpo.data.sources import rows_of
from rpo.errors import UserError, fixable, require
from rpo.files import write_atomic

USAGE = "python -m rpo.data.split DATA FOLDER eval=150 [train=1000]"


def split(spec: str, folder: Path, *, num_eval: int, num_train: int | None = None) -> tuple[int, int]:
    """(rows for training, held-out rows) that were written. Raises UserError: what cannot be read, too few rows."""
    placed = list(rows_of(spec))
    rows, prompts = [row for _, row in placed], [_prompt(row, place) for place, row in placed]
    order = [int(i) for i in np.random.default_rng(0).permutation(len(rows))]
    asked = {prompts[i] for i in order[:num_eval]}
    others = [i for i in order[num_eval:] if prompts[i] not in asked]
    wanted = 1 if num_train is None else num_train
    require(
        num_eval > 0 and wanted > 0 and len(others) >= wanted,
        f"{spec}: has {len(rows)} rows, of which eval={num_eval} leaves {len(others)} with other prompts; "
        f"expected at least {wanted}; lower eval or train",
    )
    chosen = {"train": others[:num_train], "eval": order[:num_eval]}
    files = {
        folder / f"{name}.jsonl": "".join(json.dumps(rows[i], default=str) + "\n" for i in sorted(members))
        for name, members in chosen.items()
    }
    with fixable(f"{folder}: cannot be written", "; give another FOLDER"):
        for file, lines in files.items():  # the data's own, it may be
            require(
                not file.exists() or file.read_bytes() == lines.encode(),
                f"{file}: is there already, and holds other rows; give another FOLDER",
            )
        folder.mkdir(parents=True, exist_ok=True)
        for file, lines in files.items():
            write_atomic(file, lines)
    return len(others[:num_train]), num_eval


def _prompt(row: object, place: str) -> str:
    """What rows of one question have in common."""
    try:
        pairs = isinstance(row, dict) and "chosen" in row and "rejected" in row
        example = formats.parse(row, pairs, formats.said_alike)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    if example.prompt is None:  # a text
        return str(example.chosen)
    turns = (
        [("", example.prompt)]
        if isinstance(example.prompt, str)
        else [(m["role"], m["content"]) for m in example.prompt]
    )
    return json.dumps([[role, *(content or "").split()] for role, content in turns])  # templates trim


def main(arguments: list[str]) -> None:
    given = dict(argument.partition("=")[::2] for argument in arguments[2:])
    right = "eval" in given and given.keys() <= {"eval", "train"} and all(map(str.isdecimal, given.values()))
    require(right, f"usage: {USAGE}")
    train, held_out = split(
        arguments[0], Path(arguments[1]), **{f"num_{name}": int(value) for name, value in given.items()}
    )
    print(f"{arguments[1]}: {train} rows in train.jsonl, {held_out} in eval.jsonl")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
