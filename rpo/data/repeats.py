"""Rows that say the same as others, or the opposite: counted for the report, and left as they are."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING

from rpo.data.sources import Tally

if TYPE_CHECKING:
    from rpo.data.dataset import Rows
    from rpo.data.formats import Example

ECHO = 20  # characters: a shorter prompt may begin an answer by itself ("Hi")

Key = tuple[bytes, bytes, bytes]  # digests of prompt, chosen, rejected


def _keys(rows: Rows) -> list[Key]:
    parts = (rows.row(i) for i in range(len(rows)))
    return [tuple(blake2b(part.tobytes(), digest_size=16).digest() for part in row) for row in parts]


def _place(rows: Rows, i: int) -> tuple[int, int]:
    return int(rows.file[i]), int(rows.line[i])


def notice(rows: Rows, noticed: Tally) -> None:
    """Adds to `noticed`, by the row that comes later: `repeated_pair`, the very tokens of an earlier row, and
    `label_conflict`, the responses of an earlier row the other way round. `chosen_is_rejected` is every row whose chosen
    response another row of the same prompt rejects, those in conflict too."""
    keys = _keys(rows)
    rejected = {(prompt, side): i for i, (prompt, _, side) in enumerate(keys) if rows.rejected[i]}
    first: dict[Key, int] = {}
    for i, (prompt, chosen, other) in enumerate(keys):
        earlier = {"repeated_pair": (prompt, chosen, other), "label_conflict": (prompt, other, chosen)}
        for kind, key in earlier.items():
            if key in first:
                noticed.add(kind, _place(rows, i), _as_in(rows, first[key]))
        first.setdefault((prompt, chosen, other), i)
        if (prompt, chosen) in rejected:
            noticed.add("chosen_is_rejected", _place(rows, i), _as_in(rows, rejected[prompt, chosen]))


def notice_train(held_out: Rows, train: Rows) -> Tally:
    """Of held-out rows: `pair_in_train`, both responses in any order, and `prompt_in_train`.

    A text's block has no prompt but its first token, which is no sign of anything.
    """
    noticed, prompts, pairs = Tally(), {}, {}
    for i, (prompt, *sides) in enumerate(_keys(train)):
        prompts.setdefault(prompt, i)
        pairs.setdefault((prompt, *sorted(sides)), i)
    for i, (prompt, *sides) in enumerate(_keys(held_out)):
        for kind, places, key in (
            ("pair_in_train", pairs, (prompt, *sorted(sides))),
            ("prompt_in_train", prompts, prompt),
        ):
            if key in places and not (kind == "prompt_in_train" and held_out.prompt[i] == 1):
                noticed.add(kind, _place(held_out, i), f"as {train.where(places[key])}")
    return noticed


def _as_in(rows: Rows, i: int) -> str:
    return f"as line {rows.line[i]}" + f" of file {rows.file[i] + 1}" * bool(rows.file.any())


def odd(example: Example) -> Iterator[tuple[str, str]]:
    """(kind, why) of what is odd in one row: `response_repeats_prompt`, others' turns in a response, answers before the last."""
    if _echoes(example):
        yield "response_repeats_prompt", "begins with the prompt"
    said = [m for side in (example.chosen, example.rejected) if isinstance(side, list) for m in side]
    if other := next((message["role"] for message in said if message["role"] != "assistant"), None):
        yield "other_turns_scored", f"a response has a turn of {other[:40]}"
    turns = example.prompt if example.rejected is None and isinstance(example.prompt, list) else []
    if any(message["role"] == "assistant" for message in turns):
        yield "earlier_answers_not_scored", "the last one is; give each a row of its own"


def _echoes(example: Example) -> bool:
    """Whether a response begins with its whole prompt, of a chat with its last message: a base model's output, or a slip."""
    prompt = example.prompt[-1].get("content") if isinstance(example.prompt, list) else example.prompt
    if not isinstance(prompt, str) or len(prompt.strip()) < ECHO:
        return False
    sides = [side[0].get("content") if isinstance(side, list) else side for side in (example.chosen, example.rejected)]
    return any(isinstance(side, str) and side.lstrip().startswith(prompt.strip()) for side in sides)
