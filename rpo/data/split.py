"""Rows for training and held-out rows out of one file: python -m rpo.data.split DATA FOLDER eval=150 [train=1000]

DATA is anything that data.train takes. So many rows, the same on every call, go to FOLDER/eval.jsonl, and all others or
`train` of them to FOLDER/train.jsonl, both in their order. Rows with a held-out row's prompt go to neither.
"""

import json
import sys
from pathlib import Path

import numpy as np

from rpo.data.sources import rows_of
from rpo.errors import UserError, fixable, require
from rpo.files import write_atomic

USAGE = "python -m rpo.data.split DATA FOLDER eval=150 [train=1000]"


def split(spec: str, folder: Path, *, num_eval: int, num_train: int | None = None) -> tuple[int, int]:
    """(rows for training, held-out rows) that were written. Raises UserError: what cannot be read, too few rows."""
    rows = []
    for place, row in rows_of(spec):
        if isinstance(row, UserError):
            raise UserError(f"{place}: {row}")
        rows.append(row)
    prompts = [_prompt(row, i) for i, row in enumerate(rows)]
    order = [int(i) for i in np.random.default_rng(0).permutation(len(rows))]
    asked = {prompts[i] for i in order[:num_eval]}
    others = [i for i in order[num_eval:] if prompts[i] not in asked]
    wanted = 1 if num_train is None else num_train
    require(
        num_eval > 0 and wanted > 0 and len(others) >= wanted,
        f"{spec}: has {len(rows)} rows, of which eval={num_eval} leaves {len(others)} with other prompts; "
        f"expected at least {wanted}; lower eval or train",
    )
    for name, members in (("train", others[:num_train]), ("eval", order[:num_eval])):
        with fixable(f"{folder}: cannot be written", "; give another FOLDER"):
            folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(rows[i], default=str) + "\n" for i in sorted(members))
            write_atomic(folder / f"{name}.jsonl", lines)
    return len(others[:num_train]), num_eval


def _prompt(row: object, number: int) -> str:
    """What rows of one question have in common; the row's number where that cannot be told."""
    names = ("prompt", "system", "instruction", "question", "input") if isinstance(row, dict) else ()
    asked = {name: row[name] for name in names if row.get(name)}
    return json.dumps(asked or number, sort_keys=True, default=str)


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
