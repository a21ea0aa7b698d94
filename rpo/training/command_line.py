"""What stands behind train.py and eval.py on the command line, checked before Hydra reads it: its errors name no fix."""

import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rpo.errors import UserError
from rpo.text import in_quotes, one_line
from rpo.training import misspelt


def run(main: Callable[[], None], settings: type) -> None:
    """Runs the script's `main`, whose arguments Hydra reads; exits with 2 and one line where it would misread them.

    `settings`: the group that they fill.
    """
    try:
        args = get_args_parser().parse_args()
        multirun = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
        # Configs of the user's own may have groups of theirs.
        elsewhere = args.config_dir or args.config_path or any("hydra.searchpath" in text for text in args.overrides)
        check(args.overrides, settings, multirun=multirun, names=not elsewhere)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    main()


def check(overrides: Sequence[str], settings: type, *, multirun: bool, names: bool = True) -> None:
    """Raises UserError for an override that Hydra cannot read, or reads as numbers or several values, with its quoted form.

    With `names` also for a key that `settings` do not have, and for a file that is not in conf/.
    """
    parser = OverridesParser.create()
    for i, text in enumerate(overrides):
        key, equals, value = text.partition("=")
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            why = "special characters need quotes within quotes"
            if not equals and not key.startswith("~"):
                why = "expected KEY=VALUE"
                if "=" in (previous := overrides[i - 1] if i else ""):  # a space that the shell has split at
                    key, _, value = f"{previous} {text}".partition("=")
                    why += "; if a space in a value was meant"
            elif value.startswith(("[", "{")):  # the same within brackets
                ends = [" ".join([value, *overrides[i + 1 : j]]) for j in range(i + 1, len(overrides) + 1)]
                value = next(filter(_is_closed, ends), value)
            quoted = _quoted(parser, key, value)
            fix = f": write {quoted}" if quoted else f" ({one_line(error)})"
            raise UserError(f"{text}: {why}{fix}") from None
        if names:
            misspelt.check_key(text, override, settings)
            misspelt.check_choice(text, override)
        if (
            not override.is_sweep_override()
            and _takes_text(settings, key.lstrip("+"))
            and _has_number(override.value())
        ):
            raise UserError(f"{text}: reads as a number or true, not as text; write {_quoted(parser, key, value)}")
        if not override.is_sweep_override() or override.is_hydra_override():
            continue
        if os.path.exists(os.path.expanduser(value)):
            raise UserError(f"{text}: a comma separates the values of a sweep; write {_quoted(parser, key, value)}")
        if not multirun and _takes_only_lists(settings, key):
            raise UserError(f"{text}: expected a list; write {key}=[{value}]")
        if not multirun:
            raise UserError(
                f"{text}: several values make a sweep: add -m, or for one value write {_quoted(parser, key, value)}"
            )


def _is_closed(value: str) -> bool:
    return all(value.count(one) == value.count(other) for one, other in ("[]", "{}"))


def _has_number(value: Any) -> bool:
    if isinstance(value, list):
        return any(_has_number(item.get("path") if isinstance(item, dict) else item) for item in value)
    return isinstance(value, bool | int | float)


def _quoted(parser: OverridesParser, key: str, value: str) -> str | None:
    """KEY=VALUE for a shell, the value (of a list or braces each part that needs it) in Hydra's quotes; None for a bad key."""
    bare = value.strip()
    in_brackets = bare[:1] + bare[-1:] in ("[]", "{}")
    text = f"{key}={_parts_quoted(parser, bare) if in_brackets else in_quotes(value)}"
    try:
        parser.parse_override(text)
    except HydraException:
        return None
    return shlex.quote(text)


_GROUP = re.compile(r"(\{\s*\w+\s*:[^{}]*\})")
_PAIR = re.compile(r"((?<=[{,])\s*(\w+)\s*:\s*)(.*?)(?=\s*(?:\}|,\s*\w+\s*:))")  # a comma before no key is of the value
_ELEMENT = re.compile(r"""(\s*)("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\[\],\s](?:[^\[\],]*[^\[\],\s])?)""")


def _parts_quoted(parser: OverridesParser, text: str) -> str:
    def of_pair(match: re.Match) -> str:
        return match[1] + _in_quotes(parser, match[3], is_text=match[2] == "path")

    def of_element(match: re.Match) -> str:
        return match[1] + _in_quotes(parser, match[2], is_text=True)

    pieces = enumerate(_GROUP.split(text))
    return "".join(_PAIR.sub(of_pair, piece) if i % 2 else _ELEMENT.sub(of_element, piece) for i, piece in pieces)


def _in_quotes(parser: OverridesParser, element: str, *, is_text: bool) -> str:
    try:
        override = parser.parse_override(f"key={element}")
    except HydraException:
        return in_quotes(element)
    is_other = override.is_sweep_override() or (is_text and _has_number(override.value()))
    return in_quotes(element) if is_other else element


def _hint_of(settings: Any, key: str) -> Any:
    """The type of `key` by the fields of the group `settings`; None for one that it does not have."""
    for name in key.split("."):
        settings = typing.get_type_hints(settings).get(name) if is_dataclass(settings) else None
    return settings


def _takes_only_lists(settings: Any, key: str) -> bool:
    hint = _hint_of(settings, key)
    kinds = (
        [hint]
        if typing.get_origin(hint) in (list, tuple)
        else [k for k in typing.get_args(hint) if k is not type(None)]
    )
    return bool(kinds) and all(typing.get_origin(kind) in (list, tuple) for kind in kinds)


def _takes_text(settings: Any, key: str) -> bool:
    """Whether the value of `key`, or an element of it, is a text and no number."""
    hint = _hint_of(settings, key)
    return any(one is str or str in typing.get_args(one) for one in (hint, *typing.get_args(hint)))
