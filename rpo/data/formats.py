"""Raw rows of preference and supervised data, in any supported form, as one `Example` each (`parse`).

The form is detected row by row from the fields. What is wrong with a row is a `RowError` that names the field.
A null says that a field is absent, at every depth: parquet and Arrow write one wherever another row has a value.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from rpo.data.messages import is_media, messages_in, read_message, without_nulls
from rpo.data.row_errors import RowError, bad_row, type_name

Messages = list[dict[str, Any]]


class Example(NamedTuple):
    """One row, independent of its form.

    Chat: `prompt` and the responses are message lists, and the template is given `tools` and `template_kwargs`. Plain:
    all are strings. A document to be cut into blocks: `prompt` is None and `chosen` its text. `rejected` is None for
    supervised rows. `unread` are the row's other columns.
    """

    prompt: str | Messages | None
    chosen: str | Messages
    rejected: str | Messages | None
    tools: list | None = None
    template_kwargs: dict[str, Any] | None = None
    unread: frozenset[str] = frozenset()


# ---- forms


class _Fields(dict[str, Any]):
    """A row's fields that are not null, and the names of those that were `read`."""

    def __init__(self, row: dict):
        try:
            super().__init__(without_nulls(row))
        except RecursionError:
            raise bad_row("", "fields", "one that is nested too deeply") from None
        self.read: set[str] = set()

    def __getitem__(self, field: str) -> Any:
        self.read.add(field)
        if isinstance(value := super().__getitem__(field), str):
            self[field] = value = messages_in(value, field)
        return value

    def get(self, field: str, default: Any = None) -> Any:
        return self[field] if field in self else default


def _string(row: dict, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise bad_row(f"field {field}: ", "a string", type_name(value))
    return value


def _json(row: dict, field: str, kind: type) -> Any:
    """A list or an object, or the JSON of one; None where it is absent or empty."""
    value = row.get(field)
    if isinstance(value, str) and value.strip():
        try:
            value = without_nulls(json.loads(value))
        except (ValueError, RecursionError) as error:
            raise bad_row(f"field {field}: ", type_name(kind()), f"text that is no JSON ({error})") from None
    if value and not isinstance(value, kind):
        raise bad_row(f"field {field}: ", type_name(kind()), type_name(value))
    return value or None


def _messages(row: dict, field: str) -> Messages:
    value, name = row[field], f"field {field}: "
    expected = "a non-empty list of {role, content} messages with text content"
    if not isinstance(value, list) or not value:
        raise bad_row(name, expected, "an empty list" if value == [] else type_name(value))
    return [read_message(message, name, f"message {number}", expected) for number, message in enumerate(value, start=1)]


def _response(row: dict, field: str) -> Messages:
    value = row[field]
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return _check_response(_messages({field: [value] if isinstance(value, dict) else value}, field), field)


def _check_response(messages: Messages, field: str) -> Messages:
    for place, message in (("first", messages[0]), ("last", messages[-1])):
        if message["role"] != "assistant":
            expected = f"the {place} message of the response from the assistant"
            raise bad_row(f"field {field}: ", expected, f"role {message['role'][:40]!r}", kind="wrong_roles")
    for key in ("weight", "train", "training"):
        if other := [message[key] for message in messages if message.get(key, 1) != 1]:
            raise bad_row(
                f"field {field}: ", "a response that is scored whole", f"a message with {key} {other[0]!r:.40}"
            )
    return messages


def _check_prompt(messages: Messages, field: str) -> Messages:
    if not messages:
        raise bad_row(f"field {field}: ", "messages before the answer, the prompt", "none", kind="no_prompt")
    if messages[-1]["role"] == "assistant":
        raise bad_row(f"field {field}: ", "a prompt that does not end with an assistant message", kind="wrong_roles")
    return messages


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _transcript(row: dict, field: str) -> Messages:
    """An HH transcript ("\\n\\nHuman: ...\\n\\nAssistant: ...") as messages, white space around turns removed."""
    _, *turns = _TURN.split(_string(row, field).strip())
    if not turns or turns[-2] != "Assistant":
        expected = "a transcript 'Human: ...' that ends with an Assistant turn"
        raise bad_row(f"field {field}: ", expected, kind="wrong_roles")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(turns[::2], turns[1::2], strict=True)]


def _split_last(messages: Messages, field: str) -> Example:
    answer = _check_response(messages[-1:], field)
    return Example(_check_prompt(messages[:-1], field), answer, None)


def _split_shared(chosen: Messages, rejected: Messages, alike: Callable[[Messages, Messages], bool]) -> Example:
    names, shared = "fields chosen, rejected: ", 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        # What differs in a message may be nothing that is printed: an id, a weight.
        both = chosen[: shared + 1], rejected[: shared + 1]
        if one != other and not (one["role"] == other["role"] and alike(*both)):
            break
        shared += 1
    if not shared:
        raise bad_row(names, "message lists that share the prompt at their beginning", kind="no_prompt")
    sides = [_check_response(side[shared:], name) for name, side in (("chosen", chosen), ("rejected", rejected))]
    return Example(_check_prompt(chosen[:shared], "chosen"), *sides)


def _transcripts(row: dict, pairs: bool) -> Example:
    chosen = _transcript(row, "chosen")
    if not pairs:
        return _split_last(chosen, "chosen")
    rejected = _transcript(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        expected = "transcripts equal up to the last Assistant turn"
        raise bad_row("fields chosen, rejected: ", expected, kind="no_prompt")
    return Example(_check_prompt(chosen[:-1], "chosen"), chosen[-1:], rejected[-1:])


_ASKED = ("instruction", "question", "input")


def _asked(row: dict) -> Messages:
    """The user's turn in instruction or question, with what input adds to it."""
    asked = [field for field in ("instruction", "question") if _has(row, field)]
    if len({_string(row, field).strip() for field in asked}) > 1:
        raise bad_row("fields instruction, question: ", "one of them", "two texts", kind="ambiguous")
    fields = dict.fromkeys([*(asked or [field for field in _ASKED if field in row])[:1], "input"])
    parts = dict.fromkeys(_string(row, field) for field in fields if field in row)  # one that says the same is said
    return [*_history(row), {"role": "user", "content": "\n\n".join(part for part in parts if part)}]


def _history(row: dict) -> Messages:
    """The earlier turns that Alpaca's history has as [user, assistant] each; or messages."""
    turns, roles = _json(row, "history", list) or [], ("user", "assistant")
    if turns and isinstance(turns[0], dict):
        return _messages(row, "history")
    if any(not isinstance(turn, list) or list(map(type, turn)) != [str, str] for turn in turns):
        raise bad_row("field history: ", "a list of [user, assistant] texts", "other turns")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def _string_prompt(row: dict) -> str:
    prompt = _string(row, "prompt")
    for field in _ASKED:  # a text that is part of the prompt is said already
        text = dict.get(row, field)
        if isinstance(text, str) and text.strip() not in prompt:
            raise bad_row(f"fields prompt, {field}: ", "the whole prompt in prompt", "two texts", kind="ambiguous")
    return prompt


def _supervised(row: dict) -> Example:
    for field in ("messages", "conversations"):
        if field in row:
            return _split_last(_messages(row, field), field)
    if "completion" in row:  # TRL's name of a response
        if str(row.get("label")).lower() == "false":  # of KTO's rows
            raise bad_row("field label: ", "an answer that is to be learned", "false", kind="undesirable")
        dict.__setitem__(row, "chosen", row["completion"])
        return _of_form(row, pairs=False, alike=lambda *_: False)
    if "instruction" in row or "output" in row:
        if "instruction" not in row:
            _string(row, "instruction")
        return Example(_asked(row), [{"role": "assistant", "content": _string(row, "output")}], None)
    if "text" in row:
        return Example(None, _string(row, "text"), None)
    raise bad_row(
        "field chosen: ", "one of chosen, messages, instruction with output, or text", "none", "missing_field"
    )


def _fields(row: Any) -> _Fields:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise bad_row("", "a JSON object with named fields", type_name(row))
    fields = _Fields(row)
    if seen := next((field for field in filter(is_media, fields) if _has(fields, field)), None):
        raise bad_row(f"field {seen}: ", "a row of text alone", kind="not_text")
    if seen := next((field for field in ("functions", "function_list") if _has(fields, field)), None):
        raise bad_row(f"field {seen}: ", "the definitions of tools in a column called tools", kind="ambiguous")
    return fields


def _has(row: dict, field: str) -> bool:
    """Whether the row has more in it than an empty value, or the JSON of one."""
    value = row.get(field)
    return bool(value) and (not isinstance(value, str) or value.strip() not in ("[]", "{}"))


_SYSTEM = ("system", "system_prompt", "system_message")


def _with_columns(row: _Fields, example: Example) -> Example:
    """The example with what the row's system message, tools and chat_template_kwargs say of it."""
    systems = {text: field for field in _SYSTEM if field in row and (text := _string(row, field))}
    if len(systems) > 1:
        raise bad_row(f"fields {', '.join(systems.values())}: ", "one system message", "two", kind="ambiguous")
    if "history" not in row.read and _has(row, "history"):
        why = "earlier turns in the prompt's messages, or beside an instruction"
        raise bad_row("field history: ", why, kind="ambiguous")
    system, name = next(iter(systems.items()), ("", "system"))
    tools, kwargs = _json(row, "tools", list), _json(row, "chat_template_kwargs", dict)
    prompt = example.prompt
    if not isinstance(prompt, list):
        given = {name: system, "tools": tools, "chat_template_kwargs": kwargs}
        if name := next((name for name, value in given.items() if value), None):
            raise bad_row(f"field {name}: ", "a prompt of messages, which a chat template renders", type_name(prompt))
    elif system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    elif system and (prompt[0]["content"] or "").strip() != system.strip():
        raise bad_row(f"field {name}: ", "the text of the prompt's own system message", "another; keep one")
    return example._replace(prompt=prompt, tools=tools, template_kwargs=kwargs, unread=frozenset(set(row) - row.read))


def parse(row: Any, pairs: bool, alike: Callable[..., bool] = lambda *_, **__: False) -> Example:
    """The row as an `Example`.

    With `pairs` a row has `chosen` and `rejected`; without, `rejected` is ignored, and the supervised forms
    ({prompt, chosen}, {messages}, {conversations}, {instruction, input, output}, {text}) are read too. `alike`: whether two
    beginnings of a conversation that are not equal are rendered alike. Raises RowError, `row` itself where it is one.
    """
    fields = _fields(row)
    more = {"tools": _json(fields, "tools", list), "kwargs": _json(fields, "chat_template_kwargs", dict)}
    return _with_columns(fields, _of_form(fields, pairs, partial(alike, **more)))


def _of_form(row: _Fields, pairs: bool, alike: Callable[[Messages, Messages], bool]) -> Example:
    if "chosen" not in row and not pairs:
        return _supervised(row)
    fields = ("chosen", "rejected") if pairs else ("chosen",)
    for field in fields:
        if field not in row:
            why = "expected in every pair, got none; add it, or use loss=sft for data without pairs"
            raise RowError("missing_field", f"field {field}: {why}")
    prompt = row.get("prompt")
    if isinstance(prompt, list) or (prompt is None and "conversations" in row):
        field = "conversations" if prompt is None else "prompt"
        asked = _check_prompt(_messages(row, field), field)
        return Example(asked, _response(row, "chosen"), _response(row, "rejected") if pairs else None)
    if any(isinstance(row[field], list) for field in fields):  # UltraFeedback repeats its prompt as a string
        chosen = _messages(row, "chosen")
        by_itself = isinstance(prompt, str) or (prompt is None and any(field in row for field in _ASKED))
        if by_itself and chosen[0]["role"] == "assistant":
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _asked(row)
            return Example(asked, _check_response(chosen, "chosen"), _response(row, "rejected") if pairs else None)
        if isinstance(prompt, str) and prompt.strip() not in [(m["content"] or "").strip() for m in chosen]:
            row.read.discard("prompt")  # it says something else, and is not used
        return _split_shared(chosen, _messages(row, "rejected"), alike) if pairs else _split_last(chosen, "chosen")
    blank = prompt is None or (isinstance(prompt, str) and not prompt.strip())
    if blank and isinstance(row["chosen"], str) and row["chosen"].lstrip().startswith("Human:"):
        return _transcripts(row, pairs)
    if prompt is None and any(field in row for field in _ASKED):
        return Example(_asked(row), _response(row, "chosen"), _response(row, "rejected") if pairs else None)
    if prompt is None:
        raise bad_row("field prompt: ", "a string or a list of messages", "none", kind="missing_field")
    return Example(_string_prompt(row), _string(row, "chosen"), _string(row, "rejected") if pairs else None)


def parse_prompt(row: Any) -> Example:
    """The prompt of a row of any form that `parse` reads, or of one without an answer; responses mean nothing.

    Raises RowError as `parse`.
    """
    fields = _fields(row)
    example = _of_prompt(fields)
    if example.prompt is None:
        raise bad_row("field prompt: ", "a prompt", "a text to be continued", kind="missing_field")
    return _with_columns(fields, example)


def _of_prompt(row: _Fields) -> Example:
    if "chosen" in row:
        with suppress(RowError):  # what a pair's sides share, which is less than all before the chosen one's last turn
            return _of_form(row, pairs=True, alike=said_alike)
        return _of_form(row, pairs=False, alike=lambda *_: False)
    if isinstance(row.get("prompt"), list):
        return Example(_check_prompt(_messages(row, "prompt"), "prompt"), "", None)
    if "prompt" in row:
        return Example(_string_prompt(row), "", None)
    for field in ("messages", "conversations"):
        if field in row:
            messages = _messages(row, field)
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            return Example(_check_prompt(asked, field), "", None)
    return Example(_asked(row), "", None) if any(field in row for field in _ASKED) else _supervised(row)


def _said(messages: Messages) -> list[tuple]:
    return [(message["role"], message.get("content"), message.get("tool_calls")) for message in messages]


def said_alike(one: Messages, other: Messages, **_: Any) -> bool:
    """Whether two beginnings of a conversation differ in nothing but ids and the like: `parse`'s `alike` without a template."""
    return _said(one) == _said(other)


def is_empty(response: str | Messages) -> bool:
    """True if there is nothing but white space to learn: a blank text, or a last message without text and calls."""
    if isinstance(response, str):
        return not response.strip()
    return not (response[-1].get("content") or "").strip() and not response[-1].get("tool_calls")
