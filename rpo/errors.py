"""Errors that the user can fix."""


class UserError(ValueError):
    """An error the user can fix: the scripts print it as one line, without a traceback, and exit with 2."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)
