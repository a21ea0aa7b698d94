"""What stands behind train.py and eval.py on the command line, checked before Hydra reads it: its errors name no fix."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rpo.errors import UserError
from rpo.text import in_quotes, one_line


def run(main: Callable[[], None]) -> None:
    """Runs the script's `main`, whose arguments Hydra reads; exits with 2 and one line where it would misread them."""
    try:
        args = get_args_parser().parse_args()
        check(args.overrides, multirun=args.multirun or "hydra.mode=MULTIRUN" in args.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    main()


def check(overrides: Sequence[str], *, multirun: bool) -> None:
    """Raises UserError for an override that Hydra cannot read, or would take apart at a comma, with its quoted form."""
    parser = OverridesParser.create()
    for text, previous in zip(overrides, ["", *overrides], strict=False):
        key, equals, value = text.partition("=")
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            why = "special characters need quotes within quotes"
            if not equals and not key.startswith("~"):
                why = "expected KEY=VALUE"
                if "=" in previous:  # a space that the shell has split at
                    key, _, value = f"{previous} {text}".partition("=")
                    why += "; if a space in a value was meant"
            quoted = _quoted(parser, key, value)
            fix = f": write {quoted}" if quoted else f" ({one_line(error)})"
            raise UserError(f"{text}: {why}{fix}") from None
        if not override.is_sweep_override() or override.is_hydra_override():
            continue
        if os.path.exists(os.path.expanduser(value)):
            raise UserError(f"{text}: a comma separates the values of a sweep; write {_quoted(parser, key, value)}")
        if not multirun:
            raise UserError(
                f"{text}: several values make a sweep: add -m, or for one value write {_quoted(parser, key, value)}"
            )


def _quoted(parser: OverridesParser, key: str, value: str) -> str | None:
    """KEY=VALUE for a shell, the value (of a list each element that needs it) in Hydra's quotes; None for a bad key."""
    bare = value.strip()
    if bare.startswith("[") and bare.endswith("]"):
        elements = [element.strip() for element in bare[1:-1].split(",")]
        text = f"{key}=[{','.join(_in_quotes(parser, element) for element in elements)}]"
    else:
        text = f"{key}={in_quotes(value)}"
    try:
        parser.parse_override(text)
    except HydraException:
        return None
    return shlex.quote(text)


def _in_quotes(parser: OverridesParser, element: str) -> str:
    try:
        parser.parse_override(f"key={element}")
        return element
    except HydraException:
        return in_quotes(element)
