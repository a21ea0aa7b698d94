"""Raw rows of preference and supervised data, in any supported form, as one `Example` each (`parse`).

The form is detected row by row from the fields. What is wrong with a row is a `RowError` that names the field.
"""

import re
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]


class RowError(Exception):
    """A row that cannot be kept: `kind` is what the report counts it under, the text says what is wrong."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


class Example(NamedTuple):
    """One row, independent of its form.

    Chat: `prompt` and the responses are message lists. Plain: all are strings. A document to be cut into blocks:
    `prompt` is None and `chosen` its text. `rejected` is None for supervised rows.
    """

    prompt: str | Messages | None
    chosen: str | Messages
    rejected: str | Messages | None


# ---- forms


def type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "nothing" if value is None else type(value).__name__)


def bad_row(where: str, expected: str, got: str = "", kind: str = "wrong_type") -> RowError:
    """The error of a row in which `where` (such as "field prompt: "; "" is the whole row) is not what was expected."""
    return RowError(kind, f"{where}expected {expected}{got and f', got {got}'}; fix the row")


def _string(row: dict, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise bad_row(f"field {field}: ", "a string", type_name(value))
    return value


def _messages(row: dict, field: str) -> Messages:
    value, name = row[field], f"field {field}: "
    expected = "a non-empty list of {role, content} messages with text content"
    if not isinstance(value, list) or not value:
        raise bad_row(name, expected, "an empty list" if value == [] else type_name(value))
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_row(name, expected, f"message {number} without a role")
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            raise bad_row(name, expected, f"{type_name(content)} in message {number}")
        if calls and not isinstance(calls, list):
            raise bad_row(name, "tool_calls as a list", f"{type_name(calls)} in message {number}")
    return value


def _response(row: dict, field: str) -> Messages:
    if isinstance(row[field], str):
        return [{"role": "assistant", "content": row[field]}]
    return _check_response(_messages(row, field), field)


def _check_response(messages: Messages, field: str) -> Messages:
    for place, message in (("first", messages[0]), ("last", messages[-1])):
        if message["role"] != "assistant":
            expected = f"the {place} message of the response from the assistant"
            raise bad_row(f"field {field}: ", expected, f"role {message['role'][:40]!r}", kind="wrong_roles")
    return messages


def _check_prompt(messages: Messages, field: str) -> Messages:
    if not messages:
        raise bad_row(f"field {field}: ", "messages before the answer, the prompt", "none", kind="no_prompt")
    if messages[-1]["role"] == "assistant":
        raise bad_row(f"field {field}: ", "a prompt that does not end with an assistant message", kind="wrong_roles")
    return messages


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


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


def _split_shared(chosen: Messages, rejected: Messages) -> Example:
    names, shared = "fields chosen, rejected: ", 0
    try:
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
    except RecursionError:
        raise bad_row(names, "messages", "one that is nested too deeply") from None
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


def _supervised(row: dict) -> Example:
    if "messages" in row:
        return _split_last(_messages(row, "messages"), "messages")
    if "instruction" in row or "output" in row:
        content = _string(row, "instruction")
        if "input" in row and (extra := _string(row, "input")):
            content += "\n\n" + extra
        answer = [{"role": "assistant", "content": _string(row, "output")}]
        return Example([{"role": "user", "content": content}], answer, None)
    if "text" in row:
        return Example(None, _string(row, "text"), None)
    raise bad_row(
        "field chosen: ", "one of chosen, messages, instruction with output, or text", "none", "missing_field"
    )


def parse(row: Any, pairs: bool) -> Example:
    """The row as an `Example`; a field that holds null counts as absent.

    With `pairs` a row has `chosen` and `rejected`; without, `rejected` is ignored, and the supervised forms
    ({prompt, chosen}, {messages}, {instruction, input, output}, {text}) are read too. Raises RowError, `row` itself
    where it is one.
    """
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise bad_row("", "a JSON object with named fields", type_name(row))
    row = {field: value for field, value in row.items() if value is not None}
    if "chosen" not in row and not pairs:
        return _supervised(row)
    fields = ("chosen", "rejected") if pairs else ("chosen",)
    for field in fields:
        if field not in row:
            why = "expected in every pair, got none; add it, or use loss=sft for data without pairs"
            raise RowError("missing_field", f"field {field}: {why}")
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        _check_prompt(_messages(row, "prompt"), "prompt")
        return Example(prompt, _response(row, "chosen"), _response(row, "rejected") if pairs else None)
    if any(isinstance(row[field], list) for field in fields):  # UltraFeedback repeats its prompt as a string
        chosen = _messages(row, "chosen")
        return _split_shared(chosen, _messages(row, "rejected")) if pairs else _split_last(chosen, "chosen")
    if prompt is None and _is_transcript(row["chosen"]):
        return _transcripts(row, pairs)
    if prompt is None:
        raise bad_row("field prompt: ", "a string or a list of messages", "none", kind="missing_field")
    return Example(_string(row, "prompt"), _string(row, "chosen"), _string(row, "rejected") if pairs else None)


def parse_prompt(row: Any) -> str | Messages:
    """The prompt of a row of any form that `parse` reads, or of one without an answer. Raises RowError as `parse`."""
    if isinstance(row, dict) and row.get("chosen") is None:
        if isinstance(row.get("prompt"), list):
            return _check_prompt(_messages(row, "prompt"), "prompt")
        if row.get("prompt") is not None:
            return _string(row, "prompt")
        if row.get("messages") is not None:
            messages = _messages(row, "messages")
            return _check_prompt(messages[:-1] if messages[-1]["role"] == "assistant" else messages, "messages")
        row = row | {"output": "-"} if row.get("instruction") is not None else row
    prompt = parse(row, pairs=False).prompt
    if prompt is None:
        raise bad_row("field prompt: ", "a prompt", "a text to be continued", kind="missing_field")
    return prompt


def is_empty(response: str | Messages) -> bool:
    """True if there is nothing but white space to learn: a blank text, or a last message without text and calls."""
    if isinstance(response, str):
        return not response.strip()
    return not (response[-1].get("content") or "").strip() and not response[-1].get("tool_calls")
