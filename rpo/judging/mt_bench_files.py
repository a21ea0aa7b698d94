"""MT-Bench's files, in the forms of FastChat's llm_judge (arXiv 2306.05685).

question.jsonl           {question_id, category, turns: [first, second]}
model_answer/ID.jsonl    {question_id, answer_id, model_id, choices: [{index, turns: [first, second]}], tstamp}; references too
model_judgment/JUDGE_single.jsonl   {question_id, model, judge: [name, prompt], user_prompt, judgment, score, turn, tstamp}
model_judgment/JUDGE_pair.jsonl     {question_id, model_1, model_2, g1_winner, g2_winner, judge, g1_user_prompt,
                                    g1_judgment, g2_user_prompt, g2_judgment, turn, tstamp}

In game 1 model_1 is shown first, in game 2 model_2; both winners are in terms of model_1 and model_2. A score of -1 and a
winner "error" are judgments that failed; ours add "error", the reason.
"""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rpo.config import Field, group, read_row
from rpo.data.sources import open_sources
from rpo.errors import UserError
from rpo.files import short_hash, to_lines, write_atomic

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
FIRST, EACH = 81, 10  # MT-Bench's questions are 81 to 160, ten of each category in turn
TURNS = 2
FAILED = "$ERROR$"  # FastChat's judgment where its judge could not be asked


@dataclass(frozen=True)
class Question:
    """`turns`: what the user says first, and second."""

    id: int
    category: str
    turns: list[str]


@dataclass(frozen=True)
class ModelAnswers:
    """`turns` by question: the answers to its first and second turn."""

    model: str
    file: str
    turns: dict[int, list[str]]


def category_of(question: int) -> str | None:
    """The category of one of MT-Bench's own questions; None for another number."""
    place = (question - FIRST) // EACH
    return CATEGORIES[place] if 0 <= place < len(CATEGORIES) else None


# ---- rows


_Turns = Annotated[list[str], Field(min_length=TURNS, max_length=TURNS, description=f"{TURNS} texts")]
_Winner = Literal["model_1", "model_2", "tie", "error"]


@group
class _Question:
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


def _rows(spec: str | list[str], form: str) -> Iterator[tuple[str, Any]]:
    """(FILE:LINE, row) of every row. Raises UserError where there is none."""
    empty = True
    for source in open_sources(spec, None):
        for number, row in source.rows():
            empty = False
            yield f"{source.name}:{number}", row
    if empty:
        raise UserError(f"{spec}: has no rows; give a file of the form of FastChat's {form}")


# ---- questions and answers


def questions(path: str) -> list[Question]:
    """The questions of a file, in order. Raises UserError: none, one twice, other than two turns."""
    by_id: dict[int, Question] = {}
    for place, row in _rows(path, "question.jsonl"):
        read = read_row(_Question, row, place)
        if read.question_id in by_id:
            raise UserError(f"{place}: question {read.question_id} is there twice; keep one")
        by_id[read.question_id] = Question(read.question_id, read.category, read.turns)
    return list(by_id.values())


def answers(path: str) -> ModelAnswers:
    """One model's answers. Raises UserError: none, a question twice, other than two turns, several models or choices."""
    turns: dict[int, list[str]] = {}
    models: dict[str, None] = {}
    for place, row in _rows(path, "model_answer/ID.jsonl"):
        read = read_row(_Answer, row, place)
        if read.question_id in turns:
            raise UserError(f"{place}: question {read.question_id} is answered twice; keep one answer")
        turns[read.question_id] = read_row(_Choice, read.choices[0], place).turns
        models[read.model_id] = None
    if len(models) > 1:
        raise UserError(
            f"{path}: holds answers of {len(models)} models ({', '.join(list(models)[:3])}); give one file for each"
        )
    return ModelAnswers(next(iter(models)), path, turns)


def write_answers(folder: Path, model: str, turns: dict[int, list[str]]) -> Path:
    """The file of one model's answers, which `answers` reads back."""
    rows = []
    for number, texts in turns.items():
        row = {"question_id": number, "answer_id": short_hash([model, number, texts]), "model_id": model}
        rows.append(row | {"choices": [{"index": 0, "turns": texts}], "tstamp": time.time()})
    return _write(folder / f"{file_name(model)}.jsonl", rows)


def file_name(model: str) -> str:
    """The model's name as a file's: ASCII letters, digits, _, dot and dash as they are, a slash as _, up to 80 characters.

    Of any other name what is left of its end and a digest, or models whose names end alike would share a file.
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", model).strip("_.")[-80:]
    if plain and plain == model.replace("/", "_").strip("_."):
        return plain
    return f"{plain}-{short_hash(model)[:8]}".lstrip("-.")


# ---- judgments


def judgments(spec: str | list[str]) -> tuple[str, list[dict]]:
    """("single" or "pair", the rows of one or more files), by their fields.

    Raises UserError: no rows, rows of neither kind or of both, a turn judged twice, turns that only some have.
    """
    kind, rows, places = None, [], {}
    for place, row in _rows(spec, "model_judgment/gpt-4_single.jsonl or gpt-4_pair.jsonl"):
        keys = row if isinstance(row, dict) else {}
        own = "pair" if "g1_winner" in keys else "single" if "score" in keys else None
        if keys and (own is None or kind not in (None, own)):
            other = f"a {own} judgment after {kind} ones" if own else f"fields {', '.join(map(str, keys))}"[:120]
            raise UserError(
                f"{place}: {other}; expected rows of FastChat's gpt-4_single.jsonl or gpt-4_pair.jsonl alone"
            )
        read = read_row(_Pair if own == "pair" else _Single, row, place)
        kind, names = own, sorted({read.model_1, read.model_2}) if own == "pair" else [read.model]
        if own == "pair" and len(names) < 2:
            raise UserError(
                f"{place}: fields model_1, model_2: expected two models, got {names[0]!r:.60} twice; fix the row"
            )
        key = (tuple(names), read.question_id, read.turn)
        if key in places:
            raise UserError(
                f"{place}: question {read.question_id}, turn {read.turn} of {' and '.join(names)} is judged already "
                f"({places[key]}); keep one of them"
            )
        places[key] = place
        rows.append(row)
    _check_complete(places, spec)
    return kind, rows


def _check_complete(places: dict[tuple[tuple, int, int], str], spec: str | list[str]) -> None:
    """Raises UserError where turns were judged of some models, or of some questions, and not of others."""
    turns = sorted({turn for _, _, turn in places})
    numbers = sorted({number for _, number, _ in places})
    for models in dict.fromkeys(models for models, _, _ in places):
        if lacking := [(q, turn) for q in numbers for turn in turns if (models, q, turn) not in places]:
            raise UserError(
                f"annotations={spec}: {len(lacking)} of {len(numbers) * len(turns)} judgments of {' and '.join(models)} are "
                f"missing, the first of question {lacking[0][0]}, turn {lacking[0][1]}; judge them too"
            )


def write_judgments(file: Path, rows: Sequence[dict]) -> Path:
    """The file of judgments, which `judgments` reads back."""
    return _write(file, [row | {"tstamp": time.time()} for row in rows])


def _write(file: Path, rows: Sequence[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, to_lines(rows))
    return file
