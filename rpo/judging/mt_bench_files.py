"""MT-Bench's files, in the forms of FastChat's llm_judge (arXiv 2306.05685).

question.jsonl           {question_id, category, turns: [first, second]}
model_answer/ID.jsonl    {question_id, answer_id, model_id, choices: [{index, turns: [first, second]}], tstamp}; references too
model_judgment/JUDGE_single.jsonl   {question_id, model, judge: [name, prompt], user_prompt, judgment, score, turn, tstamp}
model_judgment/JUDGE_pair.jsonl     {question_id, model_1, model_2, g1_winner, g2_winner, judge, g1_user_prompt,
                                    g1_judgment, g2_user_prompt, g2_judgment, turn, tstamp}

In game 1 model_1 is shown first, in game 2 model_2; winners name model_1 or model_2. A score of -1 and a winner "error" are
judgments that failed; ours add "error", the reason.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from rpo.data.sources import check_new, rows_of
from rpo.errors import UserError, require
from rpo.fields import Field, group, read_row
from rpo.files import short_hash, to_lines, write_atomic

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
FIRST, EACH = 81, 10  # MT-Bench's questions are 81 to 160, ten of each category in turn
TURNS = 2
FAILED = "$ERROR$"  # FastChat's judgment where its judge could not be asked


@dataclass(frozen=True)
class ModelAnswers:
    """One model's answers, two to each question."""

    model: str
    file: str
    turns: dict[int, list[str]]


def category_of(question: int) -> str | None:
    """The category of one of MT-Bench's own questions, or None for another number."""
    place = (question - FIRST) // EACH
    return CATEGORIES[place] if 0 <= place < len(CATEGORIES) else None


# ---- rows


_Turns = Annotated[list[str], Field(min_length=TURNS, max_length=TURNS, description=f"{TURNS} texts")]
_Winner = Literal["model_1", "model_2", "tie", "error"]


@group
class Question:
    """A row of question.jsonl; `turns` are the user's two messages."""

    question_id: int
    category: str
    turns: _Turns


@group
class _Answer:
    question_id: int
    model_id: str
    choices: Annotated[list[dict], Field(min_length=1, max_length=1, description="a list of one answer with its turns")]


@group
class _Choice:
    turns: _Turns


@group
class _Judgment:
    question_id: int
    turn: Annotated[int, Field(ge=1, le=TURNS, description="1 or 2")]
    error: str | None


@group
class _Single(_Judgment):
    model: str
    score: Annotated[Literal[-1] | Annotated[float, Field(ge=0, le=10)], Field(description="1 to 10, or -1 for none")]


@group
class _Pair(_Judgment):
    model_1: str
    model_2: str
    g1_winner: _Winner
    g2_winner: _Winner


def _rows(spec: str | list[str], form: str) -> list[tuple[str, Any]]:
    """(FILE:LINE, row) of every row. Raises UserError if there is none."""
    rows = list(rows_of(spec))
    require(bool(rows), f"{spec}: has no rows; give a file in the form of FastChat's {form}")
    return rows


# ---- questions and answers


def questions(path: str) -> list[Question]:
    """The questions of a file, in order. Raises UserError: none, one twice, other than two turns."""
    asked, places = [], {}
    for place, row in _rows(path, "question.jsonl"):
        asked.append(read_row(Question, row, place))
        check_new(places, asked[-1].question_id, place, f"question {asked[-1].question_id}")
    return asked


def answers(path: str) -> ModelAnswers:
    """One model's answers. Raises UserError: none, a question twice, other than two turns, several models or choices."""
    turns, places, models = {}, {}, {}
    for place, row in _rows(path, "model_answer/ID.jsonl"):
        read = read_row(_Answer, row, place)
        check_new(places, read.question_id, place, f"an answer to question {read.question_id}")
        turns[read.question_id] = read_row(_Choice, read.choices[0], place).turns
        models[read.model_id] = None
    names = ", ".join(models)[:200]
    require(len(models) == 1, f"{path}: holds answers of {len(models)} models ({names}); give a file for each")
    return ModelAnswers(read.model_id, path, turns)


def write_answers(folder: Path, model: str, turns: dict[int, list[str]]) -> Path:
    """The file of one model's answers, which `answers` reads back."""
    rows = []
    for number, texts in turns.items():
        row = {"question_id": number, "answer_id": short_hash([model, number, texts]), "model_id": model}
        rows.append(row | {"choices": [{"index": 0, "turns": texts}]})
    return write(folder / f"{file_name(model)}.jsonl", rows)


def file_name(model: str) -> str:
    """A file name for the model: ASCII letters, digits, _, dot and dash are kept, a slash becomes _, up to 80 characters.

    Any other name is shortened to its end and a digest, so that models whose names end alike get different files.
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", model).strip("_.")[-80:]
    if plain and plain == model.replace("/", "_").strip("_."):
        return plain
    return f"{plain}-{short_hash(model)[:8]}".lstrip("-.")


# ---- judgments


def judgments(spec: str | list[str]) -> tuple[str, list[dict]]:
    """("single" or "pair", by their fields; the rows of one or more files).

    Raises UserError: no rows, rows of neither kind or of both, a turn judged twice, turns that only some have.
    """
    kind, rows, places = None, [], {}
    for place, row in _rows(spec, "model_judgment/gpt-4_single.jsonl or gpt-4_pair.jsonl"):
        keys = row if isinstance(row, dict) else {}
        own = "pair" if "g1_winner" in keys else "single" if "score" in keys else None
        if keys and (own is None or kind not in (None, own)):
            got = f"a {own} judgment after {kind} ones" if own else f"fields {', '.join(map(str, keys))}"[:120]
            raise UserError(f"{place}: expected only rows of gpt-4_single.jsonl or gpt-4_pair.jsonl, got {got}")
        read = read_row(_Pair if own == "pair" else _Single, row, place)
        kind, names = own, sorted({read.model_1, read.model_2}) if own == "pair" else [read.model]
        if own == "pair" and len(names) < 2:
            raise UserError(f"{place}: expected two models in model_1, model_2, got {names[0]!r} twice; fix the row")
        key = (tuple(names), read.question_id, read.turn)
        check_new(places, key, place, f"question {read.question_id}, turn {read.turn} of {' and '.join(names)}")
        rows.append(row)
    expected = list(product(*(sorted(set(column)) for column in zip(*places, strict=True))))
    if missing := [key for key in expected if key not in places]:
        names, number, turn = missing[0]
        first, share = f"{' and '.join(names)}, question {number}, turn {turn}", f"{len(missing)} of {len(expected)}"
        raise UserError(f"annotations={spec}: {share} judgments are missing, the first of {first}; judge them too")
    return kind, rows


def write(file: Path, rows: Sequence[dict]) -> Path:
    """The file of the rows, answers or judgments, each with the time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, to_lines(row | {"tstamp": time.time()} for row in rows))
    return file
