"""AlpacaEval's files as it publishes them: judgments, difficulties, gamed rows, weights, and the judge's prompt.

Judgments come in three forms: annotations.json ({instruction, output_1, output_2, generator_1, generator_2, preference}),
the same without instruction and output_1 but with `index`, the place in the baseline's file, and a table of several models
without any text (model, index, len_baseline, len_model, preference). In all of them output_1 is the baseline's answer, and
preference is 1 to 2, 2 where the model's is the better one for sure.
"""

import csv
import gzip
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rpo.data.answers import Outputs, by_key, excerpt
from rpo.data.formats import Messages, RowError
from rpo.data.sources import open_sources
from rpo.errors import UserError
from rpo.judging.length_control import Gamed, Weights
from rpo.text import one_line

_WEIGHTS = {"length": "np.tanh(std_delta_len)", "difficulty": "instruction_difficulty", "model": "not_gamed_baseline"}
_SECTION = re.compile(r"<\|im_start\|>(system|user|assistant)\s*\n(.*?)<\|im_end\|>", re.DOTALL)
_FIELD = re.compile(r"\{(instruction|output_1|output_2)\}")


@dataclass(frozen=True)
class Judgment:
    """One model's answer to one instruction against the baseline's; `row` is its place among the model's rows in the file.

    `preference` is 1 to 2, None where there is no verdict, and `error` then says why. Answers are None where the file has
    only their lengths (in characters), the annotator where it does not say who judged.
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


def read_annotations(specs: Sequence[str], baseline: Outputs | None) -> tuple[str, dict[str, list[Judgment]]]:
    """(the baseline's name, model -> its judgments in the file's order).

    Raises UserError, by file and line: a field missing or of another kind, a preference outside [1, 2] that is not 0 (which
    the original counts as 1.5), an instruction twice or not the baseline's, another baseline's answers or name.
    """
    of_baseline = by_key(baseline) if baseline is not None else {}
    found: dict[str, list[Judgment]] = {}
    seen: dict[tuple[str, str], str] = {}
    names: set[str] = set()
    for spec in specs:
        for number, row in _rows(spec):
            where = f"{spec}:{number}"
            try:
                name, made = _judgment(row, baseline, of_baseline, found)
            except RowError as error:
                raise UserError(f"{where}: {error}") from None
            names |= {name} if name is not None else set()
            if len(names) > 1:
                raise UserError(
                    f"{where}: judged against {name}, what was read before against {(names - {name}).pop()}; give "
                    "judgments against one baseline"
                )
            key = (made.model, made.instruction)
            if key in seen:
                raise UserError(
                    f"{where}: {made.model} has a judgment of {excerpt(made.instruction)} already, at {seen[key]}; keep one"
                )
            seen[key] = where
            found.setdefault(made.model, []).append(made)
    if not found:
        raise UserError(f"{', '.join(specs)}: no judgments; give a file with one for each instruction")
    return names.pop() if names else baseline.name, found


def _rows(spec: str) -> list[tuple[int, Any]]:
    if not spec.removesuffix(".gz").endswith(".csv"):
        (source,) = open_sources(spec, None)
        return list(source.rows())
    return _table(spec, dict.fromkeys(("model", "index", "len_baseline", "len_model", "preference"), str))


def _judgment(row: Any, baseline: Outputs | None, of_baseline: dict, found: dict) -> tuple[str | None, Judgment]:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError("wrong_type", f"expected an object with a judgment, found {row!r:.60}; mend the row")
    if "instruction" not in row and "index" not in row:
        raise RowError(
            "missing_field", "neither instruction nor index: expected one of them, as what was judged; add it"
        )
    if "instruction" in row:
        instruction, output_1 = _text(row, "instruction"), _text(row, "output_1")
        if baseline is not None and instruction not in of_baseline:
            raise RowError(
                "mismatch", f"{baseline.file} has no answer to {excerpt(instruction)}; give the baseline's file"
            )
    else:
        if baseline is None:
            raise RowError("mismatch", "tells instructions by index alone; give baseline= with the baseline's answers")
        index = _number(row, "index")
        if index != int(index) or not 0 <= index < len(baseline.rows):
            raise RowError(
                "mismatch", f"index {row['index']}: {baseline.file} has answers 0 to {len(baseline.rows) - 1}"
            )
        instruction, output_1 = baseline.rows[int(index)].key, None
        if row.get("generator_1", baseline.name) != baseline.name:
            raise RowError(
                "mismatch", f"judged against {row['generator_1']}, {baseline.file} is of {baseline.name}; give its file"
            )
    own = of_baseline[instruction].text if baseline is not None else output_1
    if output_1 is not None and output_1 != own:
        raise RowError(
            "mismatch", f"output_1 is not the answer in {baseline.file}; give baseline= that it was judged against"
        )
    if "len_model" in row:
        model, answer = _text(row, "model"), None
        len_baseline, len_model = int(_number(row, "len_baseline")), int(_number(row, "len_model"))
        if len_baseline != len(own):
            raise RowError(
                "mismatch",
                f"len_baseline={len_baseline}, but the baseline's answer has {len(own)} characters; give baseline= that it "
                "was judged against",
            )
    else:
        model, answer = _text(row, "generator_2"), _text(row, "output_2")
        len_baseline, len_model = len(own), len(answer)
    preference = _preference(row.get("preference"))
    error = None if preference is not None else "no verdict is stored"
    place = len(found.get(model, []))
    return row.get("generator_1"), Judgment(
        model, instruction, place, len_baseline, len_model, preference, error, own, answer, row.get("annotator")
    )


def _preference(value: Any) -> float | None:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    preference = _number({"preference": value}, "preference")
    if preference == 0:
        return 1.5  # of a draw, in the first version's files
    if not 1 <= preference <= 2:
        raise RowError("wrong_type", f"preference={value}: expected null or 1 to 2, 2 where output_2 is better")
    return preference


def _text(row: dict, field: str) -> str:
    if not isinstance(row.get(field), str):
        raise RowError("missing_field", f"field {field}: expected a string, found {row.get(field)!r:.40}; mend the row")
    return row[field]


def _number(row: dict, field: str) -> float:
    value = row.get(field)
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError("wrong_type", f"field {field}: expected a number, found {value!r:.40}; mend the row")
    return number


# ---- what length control needs


def read_difficulty(path: str) -> np.ndarray:
    """instruction_difficulty.csv as one number per instruction, by index; UserError unless there is one for each."""
    rows = _table(path, {"index": float, "instruction_difficulty": float}, unnamed_first=True)
    found: dict[float, float] = {}
    for number, row in rows:
        if row["index"] in found or row["index"] != int(row["index"]):
            raise UserError(f"{path}:{number}: index {row['index']:g}: expected each place of an instruction once")
        found[row["index"]] = row["instruction_difficulty"]
    if sorted(found) != list(range(len(found))):
        raise UserError(
            f"{path}: {len(found)} rows whose index is not 0 to {len(found) - 1}; give one for each instruction"
        )
    return np.array([found[i] for i in range(len(found))])


def read_gamed(path: str) -> tuple[Gamed, bool]:
    """(df_gamed.csv, whether it is a stand-in): one with preference_pseudo in the place of preference is."""
    columns = {"std_delta_len": float, "instruction_difficulty": float}
    standin = "preference_pseudo" in _csv(path)[0][1]
    name = "preference_pseudo" if standin else "preference"
    rows = _table(path, columns | {name: float, "not_gamed_baseline": str})
    for number, row in rows:
        if not 0 <= row[name] <= 1 or row["not_gamed_baseline"] not in ("False", "false", "0"):
            raise UserError(
                f"{path}:{number}: expected {name} from 0 to 1 and not_gamed_baseline False; give df_gamed.csv"
            )
    return Gamed(*(np.array([row[field] for _, row in rows]) for field in (*columns, name))), standin


def read_weights(path: str) -> dict[str, Weights]:
    """Model -> stored weights, from the file of one baseline."""
    names = _csv(path)[0][1]
    column = {
        field: next((name for name in names if name.startswith(begins)), begins) for field, begins in _WEIGHTS.items()
    }
    rows = _table(path, {"model": str} | dict.fromkeys(column.values(), float), unnamed_first=True)
    models = [row["model"] for _, row in rows]
    for number, row in rows:
        if models.count(row["model"]) > 1:
            raise UserError(f"{path}:{number}: model {row['model']} has more than one row; keep one")
    return {row["model"]: Weights(**{field: row[name] for field, name in column.items()}) for _, row in rows}


def _table(path: str, columns: dict[str, type], *, unnamed_first: bool = False) -> list[tuple[int, dict]]:
    """(line, {column: value}) for a CSV (.gz) with these columns, of str or float.

    `unnamed_first`: the file's first column is the first of these, whatever it is called (pandas leaves an index without a
    name). Raises UserError: no table, a column missing, no rows, a value that is no finite number.
    """
    (_, names), *lines = _csv(path)
    if unnamed_first:
        names = [next(iter(columns)), *names[1:]]
    if lacking := [name for name in columns if name not in names]:
        raise UserError(f"{path}: no column {lacking[0]}; there are {', '.join(names)[:200]}")
    if not lines:
        raise UserError(f"{path}: a header and no rows; give a file with both")
    made = []
    for number, values in lines:
        if len(values) != len(names):
            raise UserError(f"{path}:{number}: {len(values)} values, the header has {len(names)}; mend the row")
        row = dict(zip(names, values, strict=True))
        try:
            made.append((number, {n: _number(row, n) if kind is float else row[n] for n, kind in columns.items()}))
        except RowError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    return made


def _csv(path: str) -> list[tuple[int, list[str]]]:
    file = Path(path).expanduser()
    open_as = gzip.open if file.suffix == ".gz" else open
    try:
        with open_as(file, "rt", newline="", encoding="utf-8") as stream:
            reader = csv.reader(stream)
            lines = [(reader.line_num, line) for line in reader if line]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path}: can not be read as a table ({reason}); give a .csv or .csv.gz file") from None
    if not lines:
        raise UserError(f"{path}: is empty; expected a table with a header")
    return lines


# ---- the judge's prompt


def read_prompt(path: str) -> Messages:
    """The messages of a file in the form of alpaca_eval_clf.txt, with {instruction}, {output_1} and {output_2} still in them."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"task.prompts={path}: can not be read ({getattr(error, 'strerror', None) or one_line(error)})"
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
        {"role": message["role"], "content": _FIELD.sub(lambda found: values[found[1]], message["content"])}
        for message in template
    ]
