"""Raw rows of preference and supervised data, whichever form they have, to one form: `parse` makes an `Example` of each.

One reader per form, told apart by looking, row by row. What is wrong with a row is a `RowError` that names the field.
"""

import re
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]


class RowError(Exception):
    """A row that can not be kept: `kind` is what the report counts it under, the text says what is wrong."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


class Example(NamedTuple):
    """One row, its form forgotten.

    Chat: `prompt` is a message list and the responses are message lists. Plain: all are strings. A document to be
    cut into blocks: `prompt` is None and `chosen` its text. `rejected` is None for supervised rows.
    """

    prompt: str | Messages | None
    chosen: str | Messages
    rejected: str | Messages | None


# ---- forms


def type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "nothing" if value is None else type(value).__name__)


def _string(row: dict, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise RowError("wrong_type", f"field {field}: expected a string, found {type_name(value)}; mend the row")
    return value


def _messages(row: dict, field: str) -> Messages:
    value = row[field]
    expected = f"field {field}: expected a non-empty list of {{role, content}} messages with text content"
    if not isinstance(value, list) or not value:
        raise RowError(
            "wrong_type", f"{expected}, found {'an empty list' if value == [] else type_name(value)}; mend the row"
        )
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError("wrong_type", f"{expected}; message {number} has no role; mend the row")
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            raise RowError("wrong_type", f"{expected}; message {number} has {type_name(content)}; mend the row")
        if calls and not isinstance(calls, list):
            raise RowError(
                "wrong_type", f"field {field}: expected tool_calls as a list, message {number} has {type_name(calls)}"
            )
    return value


def _response(row: dict, field: str) -> Messages:
    if isinstance(row[field], str):
        return [{"role": "assistant", "content": row[field]}]
    messages = _messages(row, field)
    _check_response(messages, field)
    return messages


def _check_response(messages: Messages, field: str) -> None:
    for place, message in (("first", messages[0]), ("last", messages[-1])):
        if message["role"] != "assistant":
            raise RowError(
                "wrong_roles",
                f"field {field}: expected the {place} message of the response from the assistant, found role "
                f"{message['role'][:40]!r}; a response starts after the prompt and ends with the answer",
            )


def _check_prompt(messages: Messages, field: str) -> Messages:
    if not messages:
        raise RowError(
            "no_prompt", f"field {field}: expected messages before the answer, the prompt, found none; add them"
        )
    if messages[-1]["role"] == "assistant":
        raise RowError(
            "wrong_roles",
            f"field {field}: expected a prompt that does not end with an assistant message; mend the row",
        )
    return messages


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def _transcript(row: dict, field: str) -> Messages:
    """An HH transcript ("\\n\\nHuman: ...\\n\\nAssistant: ...") as messages, white space around turns removed."""
    _, *turns = _TURN.split(_string(row, field).strip())
    if not turns or turns[-2] != "Assistant":
        raise RowError(
            "wrong_roles",
            f"field {field}: expected a transcript 'Human: ...' that ends with an Assistant turn; mend the row",
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(turns[::2], turns[1::2], strict=True)]


def _split_last(messages: Messages, field: str) -> Example:
    _check_response(messages[-1:], field)
    return Example(_check_prompt(messages[:-1], field), messages[-1:], None)


def _split_shared(chosen: Messages, rejected: Messages) -> Example:
    shared = 0
    try:
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
    except RecursionError:
        raise RowError("wrong_type", "fields chosen, rejected: a message is nested too deeply; mend the row") from None
    if not shared:
        raise RowError(
            "no_prompt",
            "fields chosen, rejected: expected message lists that share the prompt at their beginning; mend the row",
        )
    _check_response(chosen[shared:], "chosen")
    _check_response(rejected[shared:], "rejected")
    return Example(_check_prompt(chosen[:shared], "chosen"), chosen[shared:], rejected[shared:])


def _transcripts(row: dict, pairs: bool) -> Example:
    chosen = _transcript(row, "chosen")
    if not pairs:
        return _split_last(chosen, "chosen")
    rejected = _transcript(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise RowError(
            "no_prompt",
            "fields chosen, rejected: expected transcripts equal up to the last Assistant turn; mend the row",
        )
    return Example(_check_prompt(chosen[:-1], "chosen"), chosen[-1:], rejected[-1:])


def _supervised(row: dict) -> Example:
    if "messages" in row:
        return _split_last(_messages(row, "messages"), "messages")
    if "instruction" in row or "output" in row:
        content = _string(row, "instruction")
        if "input" in row and (extra := _string(row, "input")):
            content += "\n\n" + extra
        return Example(
            [{"role": "user", "content": content}], [{"role": "assistant", "content": _string(row, "output")}], None
        )
    if "text" in row:
        return Example(None, _string(row, "text"), None)
    raise RowError(
        "missing_field", "field chosen: expected one of chosen, messages, instruction with output, or text; add it"
    )


def parse(row: Any, pairs: bool) -> Example:
    """The row as an `Example`, its form told from its fields; a field that holds null counts as absent.

    With `pairs` a row has `chosen` and `rejected`; without, `rejected` is neither needed nor looked at, and the
    supervised forms ({prompt, chosen}, {messages}, {instruction, input, output}, {text}) are read too.
    Raises RowError.
    """
    if not isinstance(row, dict):
        raise RowError("wrong_type", f"expected a JSON object with named fields, found {type_name(row)}; mend the row")
    row = {field: value for field, value in row.items() if value is not None}
    if "chosen" not in row and not pairs:
        return _supervised(row)
    for field in ("chosen", "rejected") if pairs else ():
        if field not in row:
            raise RowError(
                "missing_field",
                f"field {field}: expected in every pair, found none; add it, or use loss=sft for data without pairs",
            )
    fields = ("chosen", "rejected") if pairs else ("chosen",)
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
        raise RowError("missing_field", "field prompt: expected a string or a list of messages, found none; add it")
    return Example(_string(row, "prompt"), _string(row, "chosen"), _string(row, "rejected") if pairs else None)


def parse_prompt(row: Any) -> str | Messages:
    """The prompt of a row of any form that `parse` reads, or of one without an answer. Raises RowError."""
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
        raise RowError("missing_field", "field prompt: expected a prompt, found a text to be continued; add one")
    return prompt


def is_empty(response: str | Messages) -> bool:
    """Whether nothing but white space would be learned: a blank text, or a last message that neither says nor calls."""
    if isinstance(response, str):
        return not response.strip()
    return not (response[-1].get("content") or "").strip() and not response[-1].get("tool_calls")
