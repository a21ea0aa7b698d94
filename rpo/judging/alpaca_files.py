"""AlpacaEval's published files: judgments, difficulties, gamed rows, weights, and the judge's prompt.

Judgments come in three forms: annotations.json ({instruction, output_1, output_2, generator_1, generator_2, preference}),
the same without instruction and output_1 but with `index`, the place in the baseline's file, and a table of several models
without any text (model, index, len_baseline, len_model, preference). In all of them output_1 is the baseline's answer, and
preference is 1 to 2, with 2 if the model's is certainly better.
"""

import csv
import gzip
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from rpo.data.answers import Outputs, by_key, excerpt
from rpo.data.formats import Messages
from rpo.data.sources import check_new, rows_of
from rpo.errors import UserError, require
from rpo.fields import AfterValidator, Field, Number, Share, group, read_row
from rpo.judging.length_control import Gamed, Weights
from rpo.text import one_line

_SECTION = re.compile(r"<\|im_start\|>(system|user|assistant)\s*\n(.*?)<\|im_end\|>", re.DOTALL)
_FIELD = re.compile(r"\{(instruction|output_1|output_2)\}")


@dataclass(frozen=True)
class Judgment:
    """A model's answer to one instruction against the baseline's; `row` is its place among the model's rows in the file.

    `preference` is 1 to 2, or None with the reason in `error`. Answers are None where the file has only their lengths (in
    characters), the annotator where the file does not name the judge, `letter_mass` (of m and M) without log-probs.
    """

    model: str
    instruction: str
    row: int
    len_baseline: int
    len_model: int
    preference: float | None
    error: str | None = None
    baseline_answer: str | None = None
    answer: str | None = None
    annotator: str | None = None
    letter_mass: float | None = None


# ---- judgments


_Whole = Annotated[
    Number, Field(ge=0, multiple_of=1), AfterValidator(int), Field(description="a whole number, 0 or more")
]
_Preference = Annotated[Number, Field(ge=1, le=2)] | Literal[0] | None  # 0: a draw, in the first version's files


@group
class _Verdict:
    preference: Annotated[_Preference, Field(description="null or 1 to 2, 2 where output_2 is better")]
    annotator: str | None
    generator_1: str | None


@group
class _ByText(_Verdict):
    instruction: str
    output_1: str
    generator_2: str
    output_2: str
    letter_mass: Share | None


@group
class _ByPlace(_Verdict):
    index: _Whole
    generator_2: str
    output_2: str


@group
class _Lengths(_Verdict):
    index: _Whole
    model: str
    len_baseline: _Whole
    len_model: _Whole


def read_annotations(specs: Sequence[str], baseline: Outputs | None) -> tuple[str, dict[str, list[Judgment]]]:
    """(the baseline's name, model -> its judgments in the file's order).

    Raises UserError, by file and line: a malformed field, a preference outside [1, 2] that is not 0 (which the original
    counts as 1.5), an instruction twice or not the baseline's, another baseline's answers or name.
    """
    of_baseline = by_key(baseline) if baseline is not None else {}
    by_model: dict[str, list[Judgment]] = {}
    places: dict[tuple[str, str], str] = {}
    name: str | None = None
    for spec in specs:
        is_table = spec.removesuffix(".gz").endswith(".csv")
        for place, row in _csv(spec, _Lengths) if is_table else rows_of(spec):
            row_name, judgment = _judgment(row, place, baseline, of_baseline)
            name = name or row_name
            if row_name not in (None, name):
                raise UserError(f"{place}: judged against {row_name}, earlier rows against {name}; give one baseline's")
            key = (judgment.model, judgment.instruction)
            check_new(places, key, place, f"a judgment of {key[0]} on {excerpt(key[1])}")
            rows = by_model.setdefault(judgment.model, [])
            rows.append(replace(judgment, row=len(rows)))
    require(bool(by_model), f"{', '.join(specs)}: no judgments; give a file with one for each instruction")
    return name or baseline.name, by_model


def _judgment(row: Any, place: str, baseline: Outputs | None, of_baseline: dict) -> tuple[str | None, Judgment]:
    """(the baseline's name, if the row has it; its judgment, numbered as the model's first)."""
    form = _ByText
    if isinstance(row, dict):
        form = _ByText if "instruction" in row else _Lengths if "len_model" in row else _ByPlace
        if row.get("preference") == "" or row.get("preference") != row.get("preference"):  # NaN
            row = row | {"preference": None}
    read, fault = read_row(form, row, place), None
    if form is _ByText:
        instruction, own = read.instruction, read.output_1
        if baseline is not None and instruction not in of_baseline:
            fault = f"has no answer to {excerpt(instruction)}"
        elif baseline is not None and own != of_baseline[instruction].text:
            fault = "has another answer than output_1"
    else:
        if baseline is None:
            raise UserError(f"{place}: names instructions by index alone; give baseline= with its answers")
        if read.index >= len(baseline.rows):
            raise UserError(f"{place}: index {read.index}: {baseline.file} has answers 0 to {len(baseline.rows) - 1}")
        instruction, own = baseline.rows[read.index].key, baseline.rows[read.index].text
        if read.generator_1 not in (None, baseline.name):
            fault = f"is of {baseline.name}, not of generator_1={read.generator_1}"
        elif form is _Lengths and read.len_baseline != len(own):
            fault = f"has an answer of {len(own)} characters, not of len_baseline={read.len_baseline}"
    if fault is not None:
        raise UserError(f"{place}: {baseline.file} {fault}; give the file of the baseline that was judged against")
    return read.generator_1, Judgment(
        model=read.model if form is _Lengths else read.generator_2,
        instruction=instruction,
        row=0,
        len_baseline=len(own),
        len_model=read.len_model if form is _Lengths else len(read.output_2),
        preference=1.5 if read.preference == 0 else read.preference,
        error="no verdict is stored" if read.preference is None else None,
        baseline_answer=own,
        answer=None if form is _Lengths else read.output_2,
        annotator=read.annotator,
        letter_mass=read.letter_mass if form is _ByText else None,
    )


# ---- what length control needs


@group
class _Difficulty:
    index: _Whole
    instruction_difficulty: Number


@group
class _Gamed:
    std_delta_len: Number
    instruction_difficulty: Number
    preference: Annotated[Number, Field(ge=0, le=1, description="a share, 0 to 1, as in df_gamed.csv")]
    not_gamed_baseline: Annotated[Literal["False", "false", "0"], Field(description="False, as in df_gamed.csv")]


@group
class _Weights:
    model: str
    std_delta_len: Number
    instruction_difficulty: Number
    not_gamed_baseline: Number


def read_difficulty(path: str) -> np.ndarray:
    """The numbers in instruction_difficulty.csv, by index. Raises UserError unless there is one for each index."""
    difficulty, places = {}, {}
    for place, row in _csv(path, _Difficulty, first="index"):
        read = read_row(_Difficulty, row, place)
        check_new(places, read.index, place, f"index {read.index}")
        difficulty[read.index] = read.instruction_difficulty
    count = len(difficulty)
    if sorted(difficulty) != list(range(count)):
        raise UserError(f"{path}: {count} rows whose index is not 0 to {count - 1}; give one for each instruction")
    return np.array([difficulty[i] for i in range(count)])


def read_gamed(path: str) -> tuple[Gamed, bool]:
    """(df_gamed.csv, whether it is a stand-in: one with preference_pseudo in place of preference)."""
    rows = _csv(path, _Gamed)
    read = [read_row(_Gamed, row, place) for place, row in rows]
    columns = np.array([(row.std_delta_len, row.instruction_difficulty, row.preference) for row in read]).T
    return Gamed(*columns), "preference_pseudo" in rows[0][1]


def read_weights(path: str) -> dict[str, Weights]:
    """Model -> stored weights, from the file of one baseline."""
    weights, places = {}, {}
    for place, row in _csv(path, _Weights, first="model"):
        read = read_row(_Weights, row, place)
        check_new(places, read.model, place, f"model {read.model}")
        weights[read.model] = Weights(read.std_delta_len, read.instruction_difficulty, read.not_gamed_baseline)
    return weights


def _csv(path: str, cls: type, first: str | None = None) -> list[tuple[str, dict[str, str]]]:
    """(FILE:LINE, row) of each row of a CSV (.gz) that has all fields of `cls`, or columns whose names contain them, as
    np.tanh(std_delta_len). `first` renames the first column (pandas leaves an index without a name)."""
    file = Path(path).expanduser()
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            names = list(reader.fieldnames or [])
            reader.fieldnames = names = names if first is None else [first, *names[1:]]
            rows = [(f"{path}:{reader.line_num}", row) for row in reader]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({one_line(error)}); give a .csv or .csv.gz file") from None
    required = [field.name for field in fields(cls) if field.type != str | None]
    columns = {name: min((column for column in names if name in column), key=len, default=None) for name in required}
    if missing := [name for name in required if columns[name] is None]:
        raise UserError(f"{path}: no column {missing[0]}; there are {', '.join(names)[:200]}")
    require(bool(rows), f"{path}: a header and no rows; give a file with both")
    for place, row in rows:
        if None in row or None in row.values():  # more values than names, or fewer
            raise UserError(f"{place}: expected {len(names)} values, as the header has; fix the row")
        row |= {name: row[column] for name, column in columns.items()}
    return rows


# ---- the judge's prompt


def read_prompt(path: str) -> Messages:
    """The messages of a file like alpaca_eval_clf.txt, with the fields {instruction}, {output_1} and {output_2}."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task.prompts={path}: cannot be read ({one_line(error)}); give a text file") from None
    messages = [{"role": role, "content": content.strip()} for role, content in _SECTION.findall(text)]
    fields = {field for message in messages for field in _FIELD.findall(message["content"])}
    if not messages or fields != {"instruction", "output_1", "output_2"}:
        expected = "<|im_start|>ROLE ... <|im_end|> sections with {instruction}, {output_1} and {output_2}"
        raise UserError(f"task.prompts={path}: expected {expected}; give alpaca_eval_clf.txt or one like it")
    return messages


def filled(template: Messages, **values: str) -> Messages:
    """The template with its fields filled, in one pass: braces in an answer stay as they are."""
    fill = lambda text: _FIELD.sub(lambda field: values[field[1]], text)  # noqa: E731
    return [message | {"content": fill(message["content"])} for message in template]
