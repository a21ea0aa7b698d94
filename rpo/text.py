"""Text for people: without secrets, in one line, with units. What a run writes about itself and prints goes through `redacted`."""

import os
import re
from typing import Any

LEAST = 8  # characters: a shorter value is no secret, and would be found inside ordinary words
# Whole words at their end: HF_TOKEN, AWS_ACCESS_KEY_ID, PGPASSWORD; not TOKENIZERS_PARALLELISM, KEYBOARD, MAX_TOKENS.
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)(_|$)", re.I)
_FORMS = [
    (re.compile(r"(?<=://)[^\s/@:]*:[^\s/]*@"), "***@"),  # scheme://user:password@host
    (re.compile(r"((?:key|token|secret|password)[\"']?\s*[=:]\s*[\"']?)[0-9a-f]{40}(?![0-9a-f])", re.I), r"\1***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}"), "***"),  # no underscore: hf_checkpoints_of_zephyr is a folder
    (re.compile(r"\b(?:gh[a-z]_|github_pat_|wandb_v1_)\w{30,}"), "***"),
    (re.compile(r"\bsk-(?=[\w-]*\d)[\w-]*[A-Za-z0-9]{16}[\w-]*"), "***"),  # sk-learn-some-model has no such run
]


def redacted(value: Any) -> Any:
    """`value` with `***` for every secret in its strings; lists, tuples and dicts (their keys too) all the way down.

    Secrets are the values of environment variables whose names say so, of LEAST characters or more (for one of several
    lines each line), passwords in URLs, and tokens of well-known forms: Hugging Face's, OpenAI's, GitHub's, W&B's.
    """
    secrets = _in_environment()

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            for form, instead in _FORMS:
                value = form.sub(instead, value)
            for secret in secrets:
                value = value.replace(secret, "***")
            return value
        if isinstance(value, dict):
            return {clean(key): clean(item) for key, item in value.items()}
        return type(value)(map(clean, value)) if type(value) in (list, tuple) else value

    return clean(value)


def _in_environment() -> list[str]:
    """Longest first: one may be part of another. A file that is there is where a secret lies, not the secret."""
    values = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and not _is_file(value)]
    lines = {line.strip() for value in values for line in value.splitlines()}
    return sorted((line for line in lines if len(line) >= LEAST), key=len, reverse=True)


def _is_file(value: str) -> bool:
    return value.startswith("/") and os.path.exists(value)


def human(size: int) -> str:
    """A number of bytes as a person would say it."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(size / 2**20, 0.1):.1f} MiB"


def one_line(error: Exception) -> str:
    """What the exception says, on one line and not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
