"""Numbers and foreign text as the report shows them: few digits, true minus signs, no secrets, no control characters."""

import math
from collections.abc import Sequence

from rpo.text import redacted

MINUS = "\u2212"


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


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def sentence(phrases: Sequence[str]) -> str:
    """Phrases as one sentence; "" of none."""
    text = "; ".join(phrases)
    return f"{text[0].upper()}{text[1:]}." if text else ""
