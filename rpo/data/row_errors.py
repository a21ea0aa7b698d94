"""What is wrong with a row."""

from typing import Any

from rpo.errors import UserError


class RowError(UserError):
    """A row that cannot be kept: `kind` is what the report counts it under, the text says what is wrong."""

    def __init__(self, kind: str, text: str):
        super().__init__(kind, text)
        self.kind, self.text = kind, text

    def __str__(self) -> str:
        return self.text


def type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "nothing" if value is None else type(value).__name__)


def bad_row(where: str, expected: str, got: str = "", kind: str = "wrong_type") -> RowError:
    """The error of a row in which `where` (such as "field prompt: "; "" is the whole row) is not what was expected."""
    return RowError(kind, f"{where}expected {expected}{got and f', got {got}'}; fix the row")
