"""Files of answers, one model each, and what pairs them: the prompt.

Three forms of answers are read: AlpacaEval's model_outputs ({instruction, output, generator}), what task=generate writes
({messages, response, model}), and {prompt, response | output | completion} with a prompt in text or messages.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo.data.formats import Messages, RowError, parse_prompt
from rpo.data.sources import open_sources
from rpo.errors import UserError

_TEXT_FIELDS = ("response", "output", "completion")
_MODEL_FIELDS = ("generator", "model")
EXCERPT = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class Output:
    """An answer and what it answers. An empty `text` is an answer like any other."""

    prompt: str | Messages
    text: str

    @property
    def key(self) -> str:
        """The prompt as text, equal for equal prompts: a single user message is what it says."""
        return key_of(self.prompt)

    @property
    def id(self) -> str:
        """A short digest of the key."""
        return id_of(self.key)


@dataclass(frozen=True)
class Outputs:
    """The answers of one model, in the file's order. `name` is what the file calls the model, else the file's own."""

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
    """The first 16 hexadecimal digits of the key's SHA-256."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read(spec: str) -> Outputs:
    """The answers of one model in a .json, .jsonl (either with .gz) or .parquet file.

    Raises UserError for a file without answers, a row of none of the forms, and answers of more than one model.
    """
    models = read_models(spec)
    if len(models) > 1:
        sizes = sorted(((len(one.rows), one.name) for one in models), key=lambda one: -one[0])
        found = ", ".join(f"{name} ({count})" for count, name in sizes[:3])
        raise UserError(f"{spec}: holds answers of {len(models)} models ({found}); give a file for each")
    return models[0]


def read_models(spec: str) -> list[Outputs]:
    """The answers of each model in the file, in the order in which models come; of several, `file` says which it is, too.

    Raises UserError for a file without answers and a row of none of the forms.
    """
    rows: dict[str, list[Output]] = {}
    (source,) = open_sources(spec, None)
    for number, row in source.rows():
        try:
            made = _parse(row)
        except RowError as error:
            raise UserError(f"{spec}:{number}: {error}") from None
        name = next((str(row[field]) for field in _MODEL_FIELDS if row.get(field) is not None), "")
        rows.setdefault(name or _stem(spec), []).append(made)
    if not rows:
        raise UserError(f"{spec}: holds no answers; give a file with one for each prompt")
    return [Outputs(name, spec if len(rows) == 1 else f"{spec} ({name})", own) for name, own in rows.items()]


def _stem(spec: str) -> str:
    name = Path(spec).name.removesuffix(".gz")
    return name.rpartition(".")[0] or name


def _parse(row: Any) -> Output:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError("wrong_type", f"expected an object with a prompt and an answer, found {row!r:.60}; mend the row")
    field = next((field for field in _TEXT_FIELDS if row.get(field) is not None), None)
    if field is None:
        raise RowError("missing_field", f"expected an answer in one of {', '.join(_TEXT_FIELDS)}, found none; add it")
    if not isinstance(row[field], str):
        raise RowError("wrong_type", f"field {field}: expected a string, found {row[field]!r:.60}; mend the row")
    return Output(prompt_of(row), row[field])


def prompt_of(row: dict) -> str | Messages:
    """What a row says was asked: its messages, prompt or instruction. Raises RowError."""
    for field in ("messages", "prompt", "instruction"):
        prompt = row.get(field)
        if prompt is None:
            continue
        if isinstance(prompt, str):
            extra = row.get("input") if field == "instruction" else None
            return f"{prompt}\n\n{extra}" if extra else prompt
        said = isinstance(prompt, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
        )
        if not said or not prompt or prompt[-1]["role"] == "assistant":
            raise RowError(
                "wrong_type",
                f"field {field}: expected text, or {{role, content}} messages before the answer; mend the row",
            )
        return prompt
    raise RowError(
        "missing_field", "expected what was asked in one of messages, prompt, instruction, found none; add it"
    )


def prompts(spec: str | list[str], revision: str | None, on_bad_row: str) -> tuple[list[str | Messages], dict]:
    """The distinct prompts of rows in any form that training reads, in order, and {"read", "repeated", "dropped"}.

    Raises UserError for a malformed row (unless `on_bad_row` is drop), and where no prompt is left.
    """
    found, read, dropped = {}, 0, 0
    for source in open_sources(spec, revision):
        for number, row in source.rows():
            read += 1
            try:
                if isinstance(row, RowError):
                    raise row
                prompt = parse_prompt(row)
            except RowError as error:
                if on_bad_row == "error":
                    raise UserError(f"{source.name}:{number}: {error} (or data.on_bad_row=drop)") from None
                dropped += 1
                continue
            found.setdefault(key_of(prompt), prompt)
    if not found:
        raise UserError(f"data.eval={spec}: none of {read} rows has a prompt; give a file of prompts")
    return list(found.values()), {"read": read, "repeated": read - dropped - len(found), "dropped": dropped}


def write(file: Path, name: str, rows: Sequence[Output]) -> None:
    """One object a line that `read` reads back: messages or prompt, response, model."""
    with file.open("w") as stream:
        for row in rows:
            asked = {"prompt": row.prompt} if isinstance(row.prompt, str) else {"messages": row.prompt}
            stream.write(json.dumps(asked | {"response": row.text, "model": name}) + "\n")


def aligned(a: Outputs, b: Outputs, limit: int | None = None) -> list[tuple[Output, Output]]:
    """The answers to the same prompts side by side, in the order of `a`, whose first `limit` prompts count (None: all).

    Raises UserError where a prompt is twice in a file, or in one of the two alone; past the limit `b` may lack some.
    """
    of_a, of_b = by_key(a), by_key(b)
    beyond = set(list(of_a)[len(of_a) if limit is None else limit :])
    of_a, of_b = ({key: output for key, output in of.items() if key not in beyond} for of in (of_a, of_b))
    lacking = {a.file: [key for key in of_b if key not in of_a], b.file: [key for key in of_a if key not in of_b]}
    if any(lacking.values()):
        said = [
            f"{file} lacks {len(keys)} of the {len(of_a.keys() | of_b.keys())} prompts, such as {excerpt(keys[0])}"
            for file, keys in lacking.items()
            if keys
        ]
        raise UserError(f"{' and '.join(said)}; give answers of both models to the same prompts")
    return [(output, of_b[key]) for key, output in of_a.items()]


def by_key(outputs: Outputs) -> dict[str, Output]:
    """The answers by prompt. Raises UserError where a prompt is there twice."""
    counts = Counter(output.key for output in outputs.rows)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise UserError(
            f"{outputs.file}: {len(twice)} prompts have more than one answer, such as {excerpt(twice[0])} with "
            f"{counts[twice[0]]}; keep one of each"
        )
    return {output.key: output for output in outputs.rows}


def empty_notes(counts: dict[str, int], num: int) -> list[str]:
    """What to say of models of whose `num` answers some are empty."""
    return [f"{model}: {count} of {num} answers are empty" for model, count in counts.items() if count]


def excerpt(key: str) -> str:
    """The beginning of a prompt on one line, quoted."""
    text = " ".join(key.split())
    return repr(text if len(text) <= EXCERPT else text[: EXCERPT - 3] + "...")
