"""MT-Bench's files, in the forms of FastChat's llm_judge (arXiv 2306.05685).

question.jsonl           {question_id, category, turns: [first, second]}
model_answer/ID.jsonl    {question_id, answer_id, model_id, choices: [{index, turns: [first, second]}], tstamp}; references too
model_judgment/JUDGE_single.jsonl   {question_id, model, judge: [name, prompt], user_prompt, judgment, score, turn, tstamp}
model_judgment/JUDGE_pair.jsonl     {question_id, model_1, model_2, g1_winner, g2_winner, judge, g1_user_prompt,
                                    g1_judgment, g2_user_prompt, g2_judgment, turn, tstamp}

In game 1 model_1 is shown first, in game 2 model_2; both winners are said in terms of model_1 and model_2. A score of -1 and
a winner "error" are judgments that failed; ours add "error", the reason.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo.data.formats import RowError
from rpo.data.sources import open_sources
from rpo.errors import UserError

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
FIRST, EACH = 81, 10  # MT-Bench's questions are 81 to 160, ten of each category in turn
TURNS = 2
WINNERS = ("model_1", "model_2", "tie", "error")
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


# ---- questions and answers


def questions(path: str) -> list[Question]:
    """The questions of a file, in order. Raises UserError: none, one twice, other than two turns."""
    found = {}
    for where, row in _rows(path, "question.jsonl"):
        number = _number(row, where)
        if number in found:
            raise UserError(f"{where}: question {number} is there twice; keep one")
        found[number] = Question(number, _text(row, "category", where), _turns(row, where))
    return list(found.values())


def answers(path: str) -> ModelAnswers:
    """One model's answers. Raises UserError: none, a question twice, other than two turns, several models or choices."""
    turns, names = {}, {}
    for where, row in _rows(path, "model_answer/ID.jsonl"):
        number = _number(row, where)
        if number in turns:
            raise UserError(f"{where}: question {number} is answered twice; keep one answer")
        choices = row.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise UserError(f"{where}: field choices: expected a list of one answer with its turns; mend the row")
        turns[number] = _turns(choices[0], where)
        names[_text(row, "model_id", where)] = where
    if len(names) > 1:
        raise UserError(
            f"{path}: holds answers of {len(names)} models ({', '.join(list(names)[:3])}); one file for each"
        )
    return ModelAnswers(next(iter(names)), path, turns)


def write_answers(folder: Path, model: str, turns: dict[int, list[str]]) -> Path:
    """The file of one model's answers, which `answers` reads back."""
    rows = []
    for number, texts in turns.items():
        digest = hashlib.sha256(json.dumps([model, number, texts]).encode()).hexdigest()[:22]
        rows.append({"question_id": number, "answer_id": digest, "model_id": model})
        rows[-1] |= {"choices": [{"index": 0, "turns": texts}], "tstamp": time.time()}
    return _write(folder / f"{file_name(model)}.jsonl", rows)


def file_name(model: str) -> str:
    """The model's name as a file's: ASCII letters, digits, _, dot and dash as they are, a slash as _, up to 80 characters.

    Of any other name what is left of its end and a digest, or models whose names end alike would share a file.
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", model).strip("_.")[-80:]
    if plain and plain == model.replace("/", "_").strip("_."):
        return plain
    return f"{plain}-{hashlib.sha256(model.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}".lstrip("-.")


# ---- judgments


def judgments(spec: str | list[str]) -> tuple[str, list[dict]]:
    """("single" or "pair", the rows of one or more files), told by their fields.

    Raises UserError: no rows, rows of neither kind or of both, a turn judged twice, turns that only some have.
    """
    kind, rows, places = None, [], {}
    for where, row in _rows(spec, "model_judgment/gpt-4_single.jsonl or gpt-4_pair.jsonl"):
        own = "pair" if "g1_winner" in row else "single" if "score" in row else None
        if own is None or kind not in (None, own):
            found = f"a {own} judgment after {kind} ones" if own else f"fields {', '.join(map(str, row))}"[:120]
            raise UserError(
                f"{where}: {found}; expected rows of FastChat's gpt-4_single.jsonl or gpt-4_pair.jsonl alone"
            )
        kind = own
        key = _checked(row, kind, where)
        if key in places:
            raise UserError(
                f"{where}: question {row['question_id']}, turn {row['turn']} of {' and '.join(sorted(key[0]))} is judged "
                f"already ({places[key]}); keep one of them"
            )
        places[key] = where
        rows.append(row)
    _check_complete(places, spec)
    return kind, rows


def _checked(row: dict, kind: str, where: str) -> tuple[frozenset, int, int]:
    """What the row judges: (models, question, turn). Raises UserError where a field is not what it has to be."""
    number, turn = _number(row, where), row.get("turn")
    if not isinstance(row.get("error"), str | None):
        raise UserError(f"{where}: field error: expected a string, found {row['error']!r:.40}; mend the row")
    if turn not in (1, 2) or type(turn) is not int:
        raise UserError(f"{where}: field turn: expected 1 or 2, found {turn!r:.40}; mend the row")
    if kind == "single":
        models = {_text(row, "model", where)}
        score = row["score"]
        if type(score) not in (int, float) or not (score == -1 or 0 <= score <= 10):
            raise UserError(
                f"{where}: field score: expected 1 to 10, or -1 for none, found {score!r:.40}; mend the row"
            )
        return frozenset(models), number, turn
    models = {_text(row, "model_1", where), _text(row, "model_2", where)}
    if len(models) < 2:
        raise UserError(f"{where}: fields model_1, model_2: expected two models, found {row['model_1']!r:.60} twice")
    for field in ("g1_winner", "g2_winner"):
        if row.get(field) not in WINNERS:
            raise UserError(
                f"{where}: field {field}: expected {', '.join(WINNERS)}, found {row.get(field)!r:.40}; mend the row"
            )
    return frozenset(models), number, turn


def _check_complete(places: dict[tuple[frozenset, int, int], str], spec: str | list[str]) -> None:
    """Raises UserError where turns were judged of some models, or of some questions, and not of others."""
    turns = sorted({turn for _, _, turn in places})
    numbers = sorted({number for _, number, _ in places})
    for models in dict.fromkeys(models for models, _, _ in places):
        if lacking := [(q, turn) for q in numbers for turn in turns if (models, q, turn) not in places]:
            raise UserError(
                f"annotations={spec}: {len(lacking)} of {len(numbers) * len(turns)} judgments of "
                f"{' and '.join(sorted(models))} are missing, the first of question {lacking[0][0]}, turn {lacking[0][1]}; "
                "judge them too"
            )


def write_judgments(file: Path, rows: Sequence[dict]) -> Path:
    """The file of judgments, which `judgments` reads back."""
    return _write(file, [row | {"tstamp": time.time()} for row in rows])


# ---- rows


def _rows(spec: str | list[str], form: str) -> Iterator[tuple[str, dict]]:
    """(FILE:LINE, object) of every row. Raises UserError for a row that is none, and where there is no row."""
    empty = True
    for source in open_sources(spec, None):
        for number, row in source.rows():
            empty, where = False, f"{source.name}:{number}"
            if isinstance(row, RowError):
                raise UserError(f"{where}: {row}")
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object, found {row!r:.40}; give a file of the form of {form}")
            yield where, row
    if empty:
        raise UserError(f"{spec}: has no rows; give a file of the form of FastChat's {form}")


def _number(row: dict, where: str) -> int:
    value = row.get("question_id")
    if type(value) is not int:
        raise UserError(
            f"{where}: field question_id: expected a whole number, found {value!r:.40}; is the file FastChat's?"
        )
    return value


def _text(row: dict, field: str, where: str) -> str:
    value: Any = row.get(field)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field}: expected a string, found {value!r:.40}; is the file FastChat's?")
    return value


def _turns(row: dict, where: str) -> list[str]:
    turns = row.get("turns")
    if not isinstance(turns, list) or len(turns) != TURNS or not all(isinstance(text, str) for text in turns):
        found = f"{len(turns)}" if isinstance(turns, list) else f"{turns!r:.40}"
        raise UserError(f"{where}: field turns: expected {TURNS} texts, found {found}; mend the row")
    return turns


def _write(file: Path, rows: Sequence[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        for row in rows:
            stream.write(json.dumps(row) + "\n")
    return file
