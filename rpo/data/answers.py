"""Files of answers, one model each, matched by prompt.

Three forms of answers are read: AlpacaEval's model_outputs ({instruction, output, generator}), what task=generate writes
({messages, response, model}), and {prompt, response | output | completion} with a prompt in text or messages.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo.data.formats import Example, Messages, RowError, bad_row, parse_prompt
from rpo.data.sources import open_sources, parse_rows, rows_of
from rpo.errors import UserError
from rpo.files import DIGITS, sha256, to_lines

_TEXT_FIELDS = ("response", "output", "completion")
_MODEL_FIELDS = ("generator", "model")
EXCERPT = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class Output:
    """A prompt and its answer. An empty `text` is an answer like any other."""

    prompt: str | Messages
    text: str

    @property
    def key(self) -> str:
        return key_of(self.prompt)

    @property
    def id(self) -> str:
        return id_of(self.key)


@dataclass(frozen=True)
class Outputs:
    """The answers of one model, in the file's order. `name` is the model's name in the file, else the file's name."""

    name: str
    file: str
    rows: list[Output]


def key_of(prompt: str | Messages) -> str:
    """The prompt as text: a lone user message as it is, any other conversation as JSON of roles and contents."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    turns = [{"role": message["role"], "content": message["content"]} for message in prompt]
    return json.dumps(turns, ensure_ascii=False)


def id_of(key: str) -> str:
    """The first hexadecimal digits of the key's SHA-256."""
    return sha256(key.encode("utf-8", "surrogatepass"))[:DIGITS]


def read(spec: str) -> Outputs:
    """The answers of one model in a .json, .jsonl (either with .gz) or .parquet file.

    Raises UserError as `read_models`, and for answers of more than one model.
    """
    models = read_models(spec)
    if len(models) > 1:
        largest = sorted(models, key=lambda model: -len(model.rows))[:3]
        counts = ", ".join(f"{model.name} ({len(model.rows)})" for model in largest)
        raise UserError(f"{spec}: holds answers of {len(models)} models ({counts}); give a file for each")
    return models[0]


def read_models(spec: str) -> list[Outputs]:
    """The answers of each model in the file, in order of first appearance; of several, `file` says which it is, too.

    Raises UserError for a file without answers and a row of none of the forms.
    """
    outputs: dict[str, list[Output]] = {}
    stem = re.sub(r"(?<=.)\.[^.]*$", "", Path(spec).name.removesuffix(".gz"))
    for place, row in rows_of(spec):
        try:
            output = _parse(row)
        except RowError as error:
            raise UserError(f"{place}: {error}") from None
        name = next((str(row[field]) for field in _MODEL_FIELDS if row.get(field) is not None), "")
        outputs.setdefault(name or stem, []).append(output)
    if not outputs:
        raise UserError(f"{spec}: holds no answers; give a file with one for each prompt")
    return [Outputs(name, spec if len(outputs) == 1 else f"{spec} ({name})", own) for name, own in outputs.items()]


def _parse(row: Any) -> Output:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise bad_row("", "an object with a prompt and an answer", f"{row!r:.60}")
    field, *others = [field for field in _TEXT_FIELDS if row.get(field) is not None] or [None]
    if field is None:
        raise bad_row("", f"an answer in one of {', '.join(_TEXT_FIELDS)}", "none", kind="missing_field")
    if any(row[other] != row[field] for other in others):  # a reference answer, say, and the model's
        raise bad_row("", "one answer", f"{' and '.join([field, *others])}, which differ")
    if not isinstance(row[field], str):
        raise bad_row(f"field {field}: ", "a string", f"{row[field]!r:.60}")
    return Output(prompt_of(row), row[field])


def prompt_of(row: dict) -> str | Messages:
    """The prompt in a row's messages, prompt or instruction. Raises RowError."""
    fields = ("messages", "prompt", "instruction")
    field = next((field for field in fields if row.get(field) is not None), None)
    if field is None:
        raise bad_row("", f"the prompt in one of {', '.join(fields)}", "none", kind="missing_field")
    prompt = row[field]
    if isinstance(prompt, str):
        extra = row.get("input") if field == "instruction" else None
        return f"{prompt}\n\n{extra}" if extra else prompt
    are_messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )
    if not are_messages or not prompt or prompt[-1]["role"] == "assistant":
        raise bad_row(f"field {field}: ", "text, or {role, content} messages before the answer")
    return prompt


def prompts(spec: str | list[str], revision: str | None, on_bad_row: str) -> tuple[list[str | Messages], dict]:
    """The distinct prompts of rows in any form that training reads, in order, and {"read", "repeated", "dropped"}.

    Raises UserError for a malformed row (unless `on_bad_row` is drop), and where no prompt is left.
    """
    placed, report = examples(spec, revision, on_bad_row)
    return [example.prompt for _, example in placed], report


def examples(spec: str | list[str], revision: str | None, on_bad_row: str) -> tuple[list[tuple[str, Example]], dict]:
    """`prompts` with their places (FILE:LINE), and with what else their rows have for a template."""
    rows, read, dropped = parse_rows(open_sources(spec, revision), parse_prompt, on_bad_row)
    distinct: dict[str, tuple[str, Example]] = {}
    for place, example in rows:
        distinct.setdefault(key_of(example.prompt), (place, example))
    if not distinct:
        raise UserError(f"data.eval={spec}: none of {read} rows has a prompt; give a file of prompts")
    report = {"read": read, "repeated": len(rows) - len(distinct), "dropped": dropped.count()}
    return list(distinct.values()), report


def write(file: Path, name: str, rows: Sequence[Output]) -> None:
    """One object a line that `read` reads back: messages or prompt, response, model."""
    asked = ({"prompt": row.prompt} if isinstance(row.prompt, str) else {"messages": row.prompt} for row in rows)
    file.write_text(to_lines(one | {"response": row.text, "model": name} for one, row in zip(asked, rows, strict=True)))


def aligned(a: Outputs, b: Outputs, limit: int | None = None) -> list[tuple[Output, Output]]:
    """The answers to the same prompts side by side, in the order of `a`, whose first `limit` prompts count (None: all).

    Raises UserError where a prompt is twice in a file, or in one of the two alone; past the limit `b` may lack some.
    """
    of_a, of_b = by_key(a), by_key(b)
    beyond = set(list(of_a)[len(of_a) if limit is None else limit :])
    of_a, of_b = ({key: output for key, output in of.items() if key not in beyond} for of in (of_a, of_b))
    lacking = {a.file: [key for key in of_b if key not in of_a], b.file: [key for key in of_a if key not in of_b]}
    if any(lacking.values()):
        reasons = [
            f"{file} lacks {len(keys)} of the {len(of_a.keys() | of_b.keys())} prompts, such as {excerpt(keys[0])}"
            for file, keys in lacking.items()
            if keys
        ]
        raise UserError(f"{' and '.join(reasons)}; give answers of both models to the same prompts")
    return [(output, of_b[key]) for key, output in of_a.items()]


def by_key(outputs: Outputs) -> dict[str, Output]:
    """The answers by prompt. Raises UserError for a prompt with more than one answer."""
    counts = Counter(output.key for output in outputs.rows)
    if twice := [key for key, count in counts.items() if count > 1]:
        most = f"{excerpt(twice[0])} with {counts[twice[0]]}"
        raise UserError(
            f"{outputs.file}: {len(twice)} prompts have more than one answer, such as {most}; keep one each"
        )
    return {output.key: output for output in outputs.rows}


def empty_notes(counts: dict[str, int], num: int) -> list[str]:
    """A note for each model with empty answers, `counts` of its `num`."""
    return [f"{model}: {count} of {num} answers are empty" for model, count in counts.items() if count]


def excerpt(key: str) -> str:
    """The beginning of a prompt on one line, quoted."""
    text = " ".join(key.split())
    return repr(text if len(text) <= EXCERPT else text[: EXCERPT - 3] + "...")
