"""One message in any notation, as {role, content, ...}; and messages that a text holds as JSON.

A null says that a field is absent, at every depth: parquet and Arrow write one wherever another row has a value.
"""

import json
import re
from contextlib import suppress
from typing import Any

from rpo.data.row_errors import bad_row, type_name

is_media = re.compile(r"(image|video|audio)s?(_(path|url|file|bytes|base64)s?)?").fullmatch

_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
_SHAREGPT |= {
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "prompter": "user",
    "model": "assistant",
}
_SHAREGPT |= {role: role for role in ("system", "user", "assistant", "tool")}


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


_MAY_BE_MESSAGES = re.compile(r"""\s*("\s*)?(array\(\s*)?(\[\s*)?\{""")
# What no JSON is: a repr, NumPy's, or a list that was cut. A first key that says it, or a role beside a content.
_BEGIN_AS_MESSAGES = re.compile(
    r"""\s*"?\s*(array\(\s*)?(\[\s*\{\s*\\?['"](role|content|from|value)\\?['"]\s*:"""
    r"""|\[?\s*\{(?=[^{}]*['"](role|from)\\?['"]\s*:)(?=[^{}]*['"](content|value)\\?['"]\s*:))"""
)


def messages_in(text: str, field: str) -> Any:
    """The messages that the text is as JSON, a list or one alone; else the text. As text their JSON would be learned."""
    if not _MAY_BE_MESSAGES.match(text):
        return text
    try:
        value = without_nulls(json.loads(text))
        if isinstance(value, str):  # JSON in JSON
            inner = messages_in(value, field)
            return text if isinstance(inner, str) else inner
    except (ValueError, RecursionError):
        if not _BEGIN_AS_MESSAGES.match(text):
            return text
        raise bad_row(f"field {field}: ", "messages as JSON", "another notation, or a part of it") from None
    if isinstance(value, dict) and len(value) == 1 and isinstance(only := [*value.values()][0], list) and only:
        return only if value.keys() < {"messages", "conversations"} and all(map(_looks_like_message, only)) else text
    if isinstance(value, dict):
        return value if _looks_like_message(value) and str(value.get("role", value.get("from"))) in _SHAREGPT else text
    if value and all(isinstance(part, dict) and part.keys() == {"type", "text"} for part in value):
        raise bad_row(f"field {field}: ", "a text or messages", "the JSON of a content's parts")
    return value if all(map(_looks_like_message, value)) else text


def _looks_like_message(value: Any) -> bool:
    pairs = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
    return isinstance(value, dict) and any(pair <= value.keys() for pair in pairs)


def read_message(message: Any, name: str, which: str, expected: str) -> dict[str, Any]:
    """A message with a role and, as text, its content: parts of text joined, ShareGPT's names replaced."""
    if (
        isinstance(message, dict)
        and isinstance(message.get("from"), str)
        and "value" in message
        and "role" not in message
    ):
        own = {key: part for key, part in message.items() if key not in ("from", "value")}
        role = _SHAREGPT.get(message["from"].lower())
        if role is None:
            raise bad_row(
                name, "from human, gpt, system or observation", f"{message['from'][:40]!r} in {which}", "wrong_roles"
            )
        message = own | {"role": role, "content": message["value"]}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise bad_row(name, expected, f"{which} without a role")
    message = {key: part for key, part in message.items() if part or key not in ("tool_calls", "function_call")}
    content, calls = message.get("content"), message.get("tool_calls")
    if seen := next((field for field in message if is_media(field) and message[field]), None):
        raise bad_row(name, "messages of text alone", f"{seen} in {which}", kind="not_text")
    if isinstance(content, list):
        texts = (None, "text", "input_text", "output_text")
        if other := [
            part
            for part in content
            if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type") not in texts
        ]:
            what = other[0].get("type") if isinstance(other[0], dict) else type_name(other[0])
            raise bad_row(name, expected, f"{which} with a part that is no text ({what})", kind="not_text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and calls):
        raise bad_row(name, expected, f"{type_name(content)} in {which}")
    if calls and not isinstance(calls, list):
        raise bad_row(name, "tool_calls as a list", f"{type_name(calls)} in {which}")
    called = {"tool_calls": list(map(_with_arguments, calls))} if calls else {}
    lower = message["role"].lower()  # human, gpt and User are nobody's own roles
    return message | {"role": _SHAREGPT.get(lower, message["role"]), "content": content} | called


def _with_arguments(call: Any) -> Any:
    """A call with its arguments as an object, which templates print, where they are the JSON of one, as OpenAI's API has them."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_arguments(call["function"])}
    if isinstance(text := call.get("arguments"), str):
        with suppress(ValueError, RecursionError):
            if isinstance(value := json.loads(text), dict):
                return call | {"arguments": value}
    return call
