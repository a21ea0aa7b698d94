"""What a chat template renders: messages as text, what it puts after a response, and what it leaves out of a message."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from rpo.data.formats import Example, Messages, RowError
from rpo.errors import UserError
from rpo.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rpo.config import EvalData


class Chat(NamedTuple):
    """What a chat template is given beside the messages and the tools: the date that it may print, and arguments by name."""

    date: str
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, cfg: EvalData) -> Chat:
        return cls(cfg.template_date, cfg.chat_template_kwargs or {})


@lru_cache
def _fix_date(template: str, template_date: str) -> str:
    """The template with a macro `strftime_now` that returns `template_date` at midnight in place of the clock.

    A macro, because apply_chat_template turns a function among its arguments into text.
    """
    if "strftime_now" not in template:
        return template
    day = datetime.fromisoformat(template_date)
    directives = [f"%{c}" for c in "aAwdbBmyYHIMSfpjUWcxXGuVeFTDR"] + [f"%-{c}" for c in "dmyHIMSj"]
    filters = "".join(f"|replace({d!r}, {day.strftime(d)!r})" for d in directives)
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n" + template


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    chat: Chat,
    *,
    prompt: bool,
    tools: list | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text of the messages by the chat template, with the generation prompt if they are a `prompt`.

    `kwargs` are the row's own and win over `chat`'s. Raises RowError where the template refuses, UserError without one.
    """
    if tokenizer.chat_template is None:
        why = "the data has messages, the tokenizer no chat template"
        raise UserError(f"data.chat_template=null: {why}; give jinja text or a file")
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except Exception as error:  # templates by name of which none is the default
        why = f"the tokenizer's chat templates have no default ({one_line(error)})"
        raise UserError(f"data.chat_template=null: {why}; give jinja text or a file") from None
    given = {**chat.kwargs, **(kwargs or {})}
    if own := sorted(set(given) & _LIBRARY_ARGUMENTS):
        raise RowError("wrong_type", f"chat_template_kwargs: {own[0]} is not the template's to read; remove it")
    if given and (read := _variables(template)) is not None and (unread := sorted(set(given) - read - {"documents"})):
        raise RowError(
            "not_rendered", f"chat_template_kwargs: the template reads no {unread[0]}; remove it, or fix its name"
        )
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=_fix_date(template, chat.date),
            add_generation_prompt=prompt,
            tokenize=False,
            **given,
        )
    except Exception as error:  # the template is a program of the user's and may raise anything
        if (as_text := _arguments_as_text(messages)) != messages:  # of a template that adds them to a text
            return render(tokenizer, as_text, chat, prompt=prompt, tools=tools, kwargs=kwargs)
        text = f"the chat template refuses the messages ({one_line(error)}); fix them or data.chat_template"
        raise RowError("template_error", text) from None


def _arguments_as_text(messages: Messages) -> Messages:
    """The messages with the arguments of calls as JSON, as OpenAI's API has them."""

    def as_text(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return call | {"function": as_text(call["function"])}
        arguments = call.get("arguments")
        return call | {"arguments": json.dumps(arguments)} if isinstance(arguments, dict) else call

    return [
        message | {"tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


# Names that apply_chat_template keeps to itself.
_LIBRARY_ARGUMENTS = frozenset(
    "conversation messages tools chat_template add_generation_prompt continue_final_message tokenize padding truncation "
    "max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)


def alike(
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    one: Messages,
    other: Messages,
    tools: list | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> bool:
    """Whether the chat template renders two beginnings of a conversation as one text."""
    for more in ([], [{"role": "user", "content": "a"}]):  # some refuse a system message alone
        try:
            a, b = (
                render(tokenizer, messages + more, chat, prompt=False, tools=tools, kwargs=kwargs)
                for messages in (one, other)
            )
        except RowError:
            continue
        return a == b
    return False


def unnamed(tools: list | None, text: str) -> str | None:
    """The name of a tool that is not in the rendered text, if any."""
    own = [tool.get("function", tool) if isinstance(tool, dict) else {} for tool in tools or ()]
    names = [tool["name"] for tool in own if isinstance(tool, dict) and isinstance(tool.get("name"), str)]
    return next((name for name in names if not _is_in(name, text)), None)


@lru_cache
def _variables(template: str) -> frozenset[str] | None:
    """The names that a template reads; None where jinja2 alone cannot tell."""
    import jinja2.meta

    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        return frozenset(jinja2.meta.find_undeclared_variables(parsed))
    except jinja2.TemplateError:
        return None


def closing(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, example: Example | None = None, *, prompt: bool = False
) -> str | None:
    """What the chat template renders after a response's text: the common end of two renderings that differ in that text.

    Of `example`'s chosen response, else of a plain exchange. None where the text is not rendered, or refused.
    """
    example = example or Example([{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}], None)
    *before, last = [*example.prompt, *example.chosen]
    more = {"tools": example.tools, "kwargs": example.template_kwargs}
    for one, other in zip(_varied(last, "x"), _varied(last, "y"), strict=True):
        try:
            both = [render(tokenizer, [*before, new], chat, prompt=prompt, **more)[::-1] for new in (one, other)]
        except UserError:
            continue
        if both[0] != both[1]:
            return os.path.commonprefix(both)[::-1]
    return None


def _varied(message: dict[str, Any], text: str) -> list[dict[str, Any]]:
    """The message with other arguments of its last call, and with another content."""
    called = [_called_with(message, -1, text)] if _is_call(message.get("tool_calls")) else []
    return [*called, message | {"content": text}]


def _is_call(calls: Any) -> bool:
    return bool(calls) and all(isinstance(call, dict) for call in calls)


def _called_with(message: dict[str, Any], which: int, text: str) -> dict[str, Any]:
    """The message with other arguments of one of its calls."""
    calls = list(message["tool_calls"])
    call, own = calls[which], calls[which].get("function", calls[which])
    new = own | {"arguments": json.dumps({text: text}) if isinstance(own.get("arguments"), str) else {text: text}}
    calls[which] = call | ({"function": new} if "function" in call else new)
    return message | {"tool_calls": calls}


def lost_call(tokenizer: PreTrainedTokenizerBase, chat: Chat, example: Example, side: Messages) -> str | None:
    """The name of one of several calls of a message whose arguments the template does not print."""
    more = {"prompt": False, "tools": example.tools, "kwargs": example.template_kwargs}
    for at, message in enumerate(side):
        calls = message.get("tool_calls") or []
        for which in range(len(calls) if len(calls) > 1 and _is_call(calls) else 0):
            one, other = ([*side[:at], _called_with(message, which, text), *side[at + 1 :]] for text in "xy")
            if render(tokenizer, example.prompt + one, chat, **more) == render(
                tokenizer, example.prompt + other, chat, **more
            ):
                return str(calls[which].get("function", calls[which]).get("name"))
    return None


_SWITCHES = re.compile(r"/(no_)?think\b")  # Qwen 3, SmolLM 3, Nemotron: obeyed by templates, which take them out


def unheard(prompt: Messages, text: str) -> str | None:
    """The role of a message, of the user's and the system's, of which nothing is in the rendered `text`."""
    for message in prompt:
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str) or not content.strip():
            continue
        if not _is_in(content, text) and not _is_in(_SWITCHES.sub("", content), text):
            return message["role"]
    return None


def left_out(messages: Messages, text: str) -> str | None:
    """A part of the messages that is not in their rendered `text`, white space aside; None if all is there."""
    for message in messages:
        said = [message.get(field) for field in _SAID]
        for part in sorted((part for part in said if isinstance(part, str)), key=len, reverse=True):
            if not _is_in(part, text):
                return part
            text = text.replace(part, "", 1)  # or one place would vouch for two parts
        calls = [
            call.get("function", call) if isinstance(call, dict) else call for call in message.get("tool_calls") or ()
        ]
        calls += [message[field] for field in _CALLED if message.get(field)]
        said = [
            [call.get("name"), call.get("arguments")] if isinstance(call, dict) and "name" in call else call
            for call in calls
        ]
        if (
            lost := _lost_of(said + [message[field] for field in _SAID if isinstance(message.get(field), list)], text)
        ) is not None:
            return lost
    return None


_SAID = ("content", "reasoning_content", "reasoning", "reasoning_details", "thinking", "thoughts", "tool_plan")
_CALLED = ("function_call",)


def _is_in(part: str, text: str) -> bool:
    if part in text:
        return True
    spellings = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
    return any("".join(spelling.split()) in "".join(text.split()) for spelling in spellings)


def _lost_of(value: Any, text: str) -> str | None:
    """A name, key or text of a call that is not in `text`; arguments given as JSON may be printed anew."""
    if isinstance(value, str) and not _is_in(value, text):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return _lost_of(value, text) if isinstance(value, dict | list) else str(value)
    if isinstance(value, bool | int | float):
        return None if any(form in text for form in (json.dumps(value), str(value))) else json.dumps(value)
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((lost for part in parts if (lost := _lost_of(part, text)) is not None), None)
