"""Text for people: without secrets, in one line, with units. What a run writes about itself and prints goes through `redacted`."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any

MINUS = "\u2212"
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

# What wraps a model's thinking: <think> of DeepSeek and Qwen, [THINK] of Mistral, and the like.
_TAGS = re.compile(
    r"(?:<(/?)(?:think|thinking|thought|reasoning|seed:think)>|\[(/?)THINK\]|\u25c1(/?)think\u25b7"
    r"|<\|(?:begin_of_thought|START_THINKING)\|>|<\|(end_of_thought|END_THINKING)\|>"
    r"|(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>)",
    re.I,
)
_ENDS = re.compile(r"(?:<\|\w{1,30}\|>\s{0,9}){1,9}\Z")  # special tokens that a server leaves behind the text
# Of gpt-oss where the server does not read its channels: what begins its answer, or a call of a tool.
_FINAL = re.compile(
    r"\A(?:.*<\|channel\|>(?:final|commentary)[^<\n]{0,99}<\|message\|>|analysis.{0,99999}?assistantfinal)", re.S
)


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
    values = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    values = [value for value in values if not (value.startswith("/") and os.path.exists(value))]
    lines = {line.strip() for value in values for line in value.splitlines()}
    return sorted((line for line in lines if len(line) >= LEAST), key=len, reverse=True)


def human(size: int) -> str:
    """A number of bytes as a person would say it."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(size / 2**20, 0.1):.1f} MiB"


def one_line(error: Exception) -> str:
    """What the exception says, on one line and not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_quotes(text: str) -> str:
    """The text as Hydra's quoted string, which reads back as this very text: backslashes count before a quote alone."""
    doubled = re.sub(r'(\\+)(?="|$)', r"\1\1", text).replace('"', '\\"')
    return f'"{doubled}"'


def significant(x: float, digits: int = 3) -> str:
    """So many significant digits, above 1000 a whole number."""
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.{digits}g}"


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def sentence(phrases: Sequence[str]) -> str:
    """Phrases as one sentence; "" of none."""
    text = "; ".join(phrases)
    return f"{text[0].upper()}{text[1:]}." if text else ""


# ---- what a model says


def spoken(text: str) -> str:
    """A model's reply without its thinking, of which no answer is a part; "" where it was cut while it thought."""
    text = _FINAL.sub("", text[:-300] + _ENDS.sub("", text[-300:]))
    kept, start, opened = [], 0, None
    for tag in _TAGS.finditer(text):
        closes, at, end = any(tag.groups()), tag.start(), tag.end()
        before, after = text[max(0, at - 1) : at], text[end : end + 1]
        # A tag in quotes is a word; not one that closes behind a quote (`18`</think>), or begins a line (<think>"You).
        if {*"'\"`"} & ({after} if closes else {before} if before in ("", "\n") else {before, after}):
            continue
        if not closes:
            opened = at if opened is None else opened
            continue
        if opened is None:  # the prompt opened what the reply only closes
            kept.clear()
        else:
            kept.append(text[start:opened])
        start, opened = end, None
    # A tag within a line is a word of the reply's.
    is_cut = opened is not None and text[start:opened].rstrip(" \t")[-1:] in ("", "\n")
    return "".join(kept) + text[start : opened if is_cut else None]


# ---- for a page


def clean(value: object) -> str:
    """Text that may be shown: without secrets; what no text may hold as a sign (control characters as their pictures)."""

    def shown(char: str) -> str:
        code = ord(char)
        if char in "\n\t" or 0x20 <= code < 0x7F:
            return char
        if code < 0x20 or code == 0x7F:
            return chr(0x2400 + code) if code < 0x20 else "\u2421"
        unsafe = code < 0xA0 or 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE
        return "\ufffd" if unsafe else char

    return "".join(map(shown, redacted(str(value)).replace("\r\n", "\n")))


def number(x: float) -> str:
    """At most four significant digits, no exponent where it can be helped."""
    return (f"{x:.2e}" if x and (abs(x) >= 1e5 or abs(x) < 1e-4) else f"{x:.4g}").replace("-", MINUS)


def decimals(errors: Sequence[float | None], *, of_smallest: bool = False) -> int | None:
    """As many as show two digits of the middle one of these errors, or the smallest, at most 4; None where there is none."""
    known = sorted(error for error in errors if error)
    if not known:
        return None
    return min(max(0, 1 - math.floor(math.log10(known[0 if of_smallest else len(known) // 2]))), 4)


def fixed(x: float, places: int | None) -> str:
    """`x` with so many decimals, which line up in a column; None: as `number`."""
    return number(x) if places is None or abs(x) >= 1e5 else f"{x:.{places}f}".replace("-", MINUS)


def typeset(sentence: str) -> str:
    """The +- and minus signs of a plain sentence as a page has them."""
    return sentence.replace(" +- ", " \u00b1 ").replace(" -", f" {MINUS}").replace("(-", f"({MINUS}")


def table(rows: Sequence[Sequence[str]], *, align: str = "<") -> str:
    """Rows of cells as text, every column as wide as its widest cell; `align`, < or >, is that of all but the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = ["<", *align * (len(widths) - 1)]
    lines = [
        "  ".join(f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True)) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
