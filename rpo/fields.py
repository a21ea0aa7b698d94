"""What a key may hold: groups of typed fields, filled from plain mappings, and a refusal in one line that names the key.

Types and ranges stand at the field, in its annotation; what two keys must not say together stands in the group that holds both.
"""

import datetime
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic import model_validator as model_validator  # for groups elsewhere

from rpo.errors import UserError

# A group of keys. Strict: 1 is a number and 1.0 no integer, true is neither, "1" is a string.
group = pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))

Count = Annotated[int, Field(ge=1, description="at least 1")]
Seed = Annotated[int, Field(ge=0, lt=2**31, description="0 or more, below 2^31")]
Share = Annotated[float, Field(ge=0, le=1, description="a share, 0 to 1")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Number = Annotated[
    float,
    BeforeValidator(lambda value: float(value) if isinstance(value, str) else value),
    Field(allow_inf_nan=False, description="a number"),
]  # which a table of text writes as 0.5 or 1e-3
Every = Annotated[int, Field(ge=0, description="0 (never) or a number of steps")]


def _is_date(value: str) -> str:
    datetime.date.fromisoformat(value)
    return value


Date = Annotated[str, AfterValidator(_is_date), Field(description="a date as YYYY-MM-DD")]
# A key that may differ between two starts of one run: its length, what it writes and where, what a device has to hold.
MAY_CHANGE = Field(json_schema_extra={"may_change": True})


def build(cls: Any, node: Any, key: str = "", **built: Any) -> Any:
    """`cls` filled from the mapping `node`; UserError names the first key that is absent, unknown or not what it should be.

    `key` is what stands before the keys' names; `built` are groups within it that were filled already.
    """
    hints = typing.get_type_hints(cls)
    if not isinstance(node, dict):
        raise UserError(f"{key}={node!r}: expected a group of keys ({', '.join(hints)})")
    prefix = f"{key}." if key else ""
    if unknown := [name for name in node if name not in hints]:
        raise UserError(f"{prefix}{unknown[0]}: no such key; the keys here are {', '.join(sorted(hints))}")
    values = node | built
    for name, hint in hints.items():
        if is_dataclass(hint) and name in node and name not in built:
            values[name] = build(hint, node[name], prefix + name)
    try:
        return cls(**values)
    except ValidationError as error:
        raise UserError(_refusal(cls, values, prefix, error)) from None


def _refusal(cls: Any, values: dict, prefix: str, error: ValidationError) -> str:
    """One line for the first field that pydantic refuses: key, value, what was expected."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:  # two keys contradict each other, and the group's own check says so
        return str(first["ctx"]["error"])
    name = first["loc"][0]
    if first["type"] == "missing":
        return f"{prefix}{name}: missing; give it on the command line or in the YAML"
    value, expected = values[name], _expected(cls, name, error)
    if isinstance(value, int | float) and any(each["type"] == "string_type" for each in error.errors()):
        expected += f"; a text of digits needs quotes within quotes: '{prefix}{name}=\"{value}\"'"
    return f"{prefix}{name}={value!r}: expected {expected}"


def read_row(cls: Any, row: Any, place: str) -> Any:
    """The group `cls` filled from `row` of a file, at `place` (FILE:LINE); fields that it does not name are ignored.

    A field that is absent is null. Raises UserError for a row that is not an object, and for the first field that is not
    what it should be.
    """
    names = [f.name for f in fields(cls)]
    if isinstance(row, Exception):  # one that could not be decoded
        raise UserError(f"{place}: {row}")
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object with {', '.join(names)}, got {row!r:.60}; fix the row")
    try:
        return cls(**{name: row.get(name) for name in names})
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        expected = _described(typing.get_type_hints(cls, include_extras=True)[name]) or _expected(cls, name, error)
    raise UserError(f"{place}: field {name}: expected {expected}, got {row.get(name)!r:.40}; fix the row")


_TYPES = {"int_type": "an integer", "float_type": "a number", "bool_type": "true or false", "string_type": "a string"}
_TYPES |= {"list_type": "a list", "dict_type": "a mapping", "finite_number": "a finite number"}
_SIGNS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}


def _expected(cls: Any, name: str, error: ValidationError) -> str:
    """What the field takes: its types where the value has another, else its own description."""
    hint = typing.get_type_hints(cls, include_extras=True)[name]
    errors = [each for each in error.errors(include_url=False) if each["loc"][0] == name]  # of a union one per member
    described = _described(hint)
    if described and not all(each["type"] in _TYPES and not isinstance(each["loc"][-1], int) for each in errors):
        phrases = [described]
    else:
        phrases = list(dict.fromkeys(map(_phrase, errors)))
    if types.NoneType in typing.get_args(typing.get_type_hints(cls)[name]) and not phrases[0].startswith("null"):
        phrases = ["null", *phrases]
    return " or ".join(phrases)


def _described(hint: Any) -> str | None:
    """What a field says of the values that it takes, the outermost word first."""
    notes = [note.description for note in getattr(hint, "__metadata__", ()) if hasattr(note, "description")]
    return next(filter(None, [*reversed(notes), *map(_described, typing.get_args(hint))]), None)


def _phrase(error: dict) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        return context["expected"].replace("'", "").replace(" or ", "|").replace(", ", "|")
    return f"{_SIGNS[kind]} {next(iter(context.values())):g}" if kind in _SIGNS else _TYPES.get(kind, error["msg"])
