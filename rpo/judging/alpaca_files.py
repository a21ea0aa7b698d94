"""AlpacaEval's files as it publishes them: judgments, difficulties, gamed rows, weights, and the judge's prompt.

Judgments come in three forms: annotations.json ({instruction, output_1, output_2, generator_1, generator_2, preference}),
the same without instruction and output_1 but with `index`, the place in the baseline's file, and a table of several models
without any text (model, index, len_baseline, len_model, preference). In all of them output_1 is the baseline's answer, and
preference is 1 to 2, 2 where the model's is the better one for sure.
"""

import csv
import gzip
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from rpo.config import Field, Number, group, read_row
from rpo.data.answers import Outputs, by_key, excerpt
from rpo.data.formats import Messages
from rpo.data.sources import open_sources
from rpo.errors import UserError, require
from rpo.judging.length_control import Gamed, Weights
from rpo.text import one_line

_SECTION = re.compile(r"<\|im_start\|>(system|user|assistant)\s*\n(.*?)<\|im_end\|>", re.DOTALL)
_FIELD = re.compile(r"\{(instruction|output_1|output_2)\}")


@dataclass(frozen=True)
class Judgment:
    """One model's answer to one instruction against the baseline's; `row` is its place among the model's rows in the file.

    `preference` is 1 to 2, None where there is no verdict, and `error` then says why. Answers are None where the file has
    only their lengths (in characters), the annotator where the file does not name the judge.
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


# ---- judgments


_Whole = Annotated[Number, Field(ge=0, multiple_of=1, description="a whole number, 0 or more")]
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

    Raises UserError, by file and line: a field missing or of another kind, a preference outside [1, 2] that is not 0 (which
    the original counts as 1.5), an instruction twice or not the baseline's, another baseline's answers or name.
    """
    of_baseline = by_key(baseline) if baseline is not None else {}
    by_model: dict[str, list[Judgment]] = {}
    seen: dict[tuple[str, str], str] = {}
    name: str | None = None
    for spec in specs:
        for place, row in _rows(spec):
            base, judgment = _judgment(row, place, baseline, of_baseline)
            if None not in (name, base) and name != base:
                raise UserError(
                    f"{place}: judged against {base}, earlier rows against {name}; give judgments against one baseline"
                )
            key = (judgment.model, judgment.instruction)
            if key in seen:
                raise UserError(
                    f"{place}: {key[0]} has a judgment of {excerpt(key[1])} already, at {seen[key]}; keep one"
                )
            name, seen[key] = base or name, place
            rows = by_model.setdefault(judgment.model, [])
            rows.append(replace(judgment, row=len(rows)))
    require(bool(by_model), f"{', '.join(specs)}: no judgments; give a file with one for each instruction")
    return name or baseline.name, by_model


def _rows(spec: str) -> Iterable[tuple[str, Any]]:
    """(FILE:LINE, row) of a file in any of the three forms."""
    if spec.removesuffix(".gz").endswith(".csv"):
        return _csv(spec, _Lengths)
    (source,) = open_sources(spec, None)
    return ((f"{spec}:{number}", row) for number, row in source.rows())


def _judgment(row: Any, place: str, baseline: Outputs | None, of_baseline: dict) -> tuple[str | None, Judgment]:
    """(the baseline's name, where the row has it; its judgment, numbered as the model's first)."""
    form = _ByText
    if isinstance(row, dict):
        form = _ByText if "instruction" in row else _Lengths if "len_model" in row else _ByPlace
        if "instruction" not in row and "index" not in row:
            raise UserError(f"{place}: expected instruction or index, got neither; add what was judged")
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
            raise UserError(f"{place}: index {read.index:g}: {baseline.file} has answers 0 to {len(baseline.rows) - 1}")
        instruction, own = baseline.rows[int(read.index)].key, baseline.rows[int(read.index)].text
        if read.generator_1 not in (None, baseline.name):
            fault = f"is of {baseline.name}, not of generator_1={read.generator_1}"
        elif form is _Lengths and read.len_baseline != len(own):
            fault = f"has an answer of {len(own)} characters, not of len_baseline={read.len_baseline:g}"
    if fault is not None:
        raise UserError(f"{place}: {baseline.file} {fault}; give the file of the baseline that was judged against")
    return read.generator_1, Judgment(
        model=read.model if form is _Lengths else read.generator_2,
        instruction=instruction,
        row=0,
        len_baseline=len(own),
        len_model=int(read.len_model) if form is _Lengths else len(read.output_2),
        preference=1.5 if read.preference == 0 else read.preference,
        error="no verdict is stored" if read.preference is None else None,
        baseline_answer=own,
        answer=None if form is _Lengths else read.output_2,
        annotator=read.annotator,
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
    """instruction_difficulty.csv as one number per instruction, by index; UserError unless there is one for each."""
    difficulty: dict[float, float] = {}
    for place, row in _csv(path, _Difficulty, first="index"):
        read = read_row(_Difficulty, row, place)
        require(read.index not in difficulty, f"{place}: index {read.index:g} is there twice; keep one")
        difficulty[read.index] = read.instruction_difficulty
    count = len(difficulty)
    require(
        sorted(difficulty) == list(range(count)),
        f"{path}: {count} rows whose index is not 0 to {count - 1}; give one for each instruction",
    )
    return np.array([difficulty[i] for i in range(count)])


def read_gamed(path: str) -> tuple[Gamed, bool]:
    """(df_gamed.csv, whether it is a stand-in): one with preference_pseudo in the place of preference is."""
    rows = _csv(path, _Gamed)
    read = [read_row(_Gamed, row, place) for place, row in rows]
    columns = np.array([(row.std_delta_len, row.instruction_difficulty, row.preference) for row in read]).T
    return Gamed(*columns), "preference_pseudo" in rows[0][1]


def read_weights(path: str) -> dict[str, Weights]:
    """Model -> stored weights, from the file of one baseline."""
    weights: dict[str, Weights] = {}
    for place, row in _csv(path, _Weights, first="model"):
        read = read_row(_Weights, row, place)
        require(read.model not in weights, f"{place}: model {read.model} has more than one row; keep one")
        weights[read.model] = Weights(read.std_delta_len, read.instruction_difficulty, read.not_gamed_baseline)
    return weights


def _csv(path: str, cls: type, first: str | None = None) -> list[tuple[str, dict[str, str]]]:
    """(FILE:LINE, row) of a CSV (.gz) with a column for every field of `cls`, or one in whose name it is: the weight
    np.tanh(std_delta_len). `first` is what the first column is called (pandas leaves an index without a name)."""
    file = Path(path).expanduser()
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            names = list(reader.fieldnames or [])
            names[:1] = names[:1] if first is None else [first]
            reader.fieldnames = names
            rows = [(f"{path}:{reader.line_num}", row) for row in reader]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path}: cannot be read as a table ({reason}); give a .csv or .csv.gz file") from None
    columns = {}
    for name in [field.name for field in fields(cls) if field.type != str | None]:
        columns[name] = min((column for column in names if name in column), key=len, default=None)
        require(columns[name] is not None, f"{path}: no column {name}; there are {', '.join(names)[:200]}")
    require(bool(rows), f"{path}: a header and no rows; give a file with both")
    for place, row in rows:
        if None in row or None in row.values():  # more values than names, or fewer
            raise UserError(f"{place}: expected {len(names)} values, as the header has; fix the row")
        row |= {name: row[column] for name, column in columns.items()}
    return rows


# ---- the judge's prompt


def read_prompt(path: str) -> Messages:
    """The messages of a file in the form of alpaca_eval_clf.txt, with {instruction}, {output_1} and {output_2} still in them."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"task.prompts={path}: cannot be read ({getattr(error, 'strerror', None) or one_line(error)})"
        ) from None
    messages = [{"role": role, "content": content.strip()} for role, content in _SECTION.findall(text)]
    fields = {field for message in messages for field in _FIELD.findall(message["content"])}
    if not messages or fields != {"instruction", "output_1", "output_2"}:
        raise UserError(
            f"task.prompts={path}: expected <|im_start|>ROLE ... <|im_end|> sections with {{instruction}}, {{output_1}} and "
            "{output_2}; give alpaca_eval_clf.txt or one like it"
        )
    return messages


def filled(template: Messages, **values: str) -> Messages:
    """The template with its fields filled, in one pass: braces in an answer stay as they are."""
    return [
        {"role": message["role"], "content": _FIELD.sub(lambda field: values[field[1]], message["content"])}
        for message in template
    ]
