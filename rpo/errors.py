"""Errors that the user can fix."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """An error the user can fix: the scripts print it as one line, without a traceback, and exit with 2."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


@contextmanager
def fixable(failure: str, advice: str) -> Iterator[None]:
    """An OSError within the block as an error of the user's: `failure`, the system's reason in brackets, `advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{failure} ({error.strerror}){advice}") from None
