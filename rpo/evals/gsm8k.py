r"""The answer in a solution of GSM8K (arXiv 2110.14168): the harness's two rules (its task gsm8k, version 3), implemented on
our own, and one that compares by value, however a number is written.
"""

import re
import unicodedata
from fractions import Fraction

from rpo.text import spoken

_LAST_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_MONEY = "$\u00a2-\u00a5\u20a0-\u20cf"
# A number as people write it: a minus that is no difference, a currency, thousands apart, decimals, a fraction behind it.
_WRITTEN = re.compile(
    rf"(?:(?<![\w)])(-))?(?:[{_MONEY}] ?(-)?)?(?<![0-9])(?=\.?[0-9])"
    r"([0-9]{1,3}(?:[,'\u2019][0-9]{2,3}){0,9}[,'\u2019][0-9]{3}|[0-9]{1,99})?((?<!\.)\.[0-9]{1,99})?"
    r"((?(3) {1,2}[0-9]{1,9}(?=/)|(?!)))?(?:/([0-9]{1,99}(?:\.[0-9]{1,99})?))?(?![0-9])"
)
_SIGNS = str.maketrans(
    {**dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"), "\uff0e": ".", "\uff0c": ",", "\uff04": "$"}
    | {"\uffe1": "\u00a3", "\uffe5": "\u00a5"}
    | {0xFF10 + digit: str(digit) for digit in range(10)}
)
_THIN = re.compile(r"(?<=[0-9])(?:[~\u00a0\u2009\u202f]|\\[ ,;:!]|\{\\?,\})(?=[0-9]{3}(?![0-9]))")
# What GSM8K's own solutions have before each result; without one behind it the sum's own counts.
_CALCULATED = (
    (re.compile(rf"<<[^<>\n]{{0,200}}>>(?=\s?-?[{_MONEY}]?-?\.?[0-9])"), ""),
    (re.compile(r"<<[^<>\n]{0,200}=([^<>=\n]{1,50})>>"), r"\1"),
)
_TEX = (
    (re.compile(r"\\(?:[ ,;:!]|(?:text|mathrm|mathbf|textbf|mbox|left|right)(?![A-Za-z]))|\{,\}|\\(?=[$%])"), ""),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "\u00f7"),
)
_ABOVE, _BELOW = (rf"(?:\{{\s{{0,9}}[{_MONEY}]?(-?[0-9][0-9,.]{{0,99}})\s{{0,9}}\}}|([0-9]))" for _ in range(2))
_FRACTION = re.compile(rf"\\[dtc]?frac\s?{_ABOVE}\s?{_BELOW}")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_MOST, _LONGEST = 64, 2000  # boxes of one reply that are read, and characters of each
_SUM = re.compile(r"[0-9\s.,$()%xX\u00d7\u00f7\u00b7\u2217\u22c5+*/=^{}-]*")
# #### 2. Change, which numbers a step; not #### 72. Natalia sold 72 clips: nobody takes as many steps.
_STEP = re.compile(r"[\s*_]*\(?1?[0-9][.):][\s*_]+[^\W\d_]")


def gsm8k_strict(text: str, anchor: str = "####") -> str | None:
    """The number after the first `anchor` and a space; None where there is none."""
    match = re.search(rf"{re.escape(anchor)} (-?[0-9.,]+)", text)
    return match and match[1]


def gsm8k_flexible(text: str) -> str | None:
    """The last number of the text, a sum of money's $ with it; None where there is none."""
    numbers = _LAST_NUMBER.findall(text)
    return (numbers[-1][0] or numbers[-1][1]) if numbers else None


def gsm8k_same(answer: str | None, target: str) -> bool:
    """Whether both are the same number, written alike but for $, thousands' commas and a dot at the end."""
    plain = [re.sub(r"\.$", "", re.sub("[,$]", "", number)) for number in (answer or "", target)]
    return answer is not None and plain[0] == plain[1]


def gsm8k_number(text: str) -> Fraction | None:
    """The value of the answer, however it is written: of what follows a #### and is no heading, or is in \\boxed{}, the last
    that has a number, else the last number there is; of an equation its right side. Signs of money, what sets thousands
    apart, TeX's commands, Unicode's signs and decimals that are 0 make no difference; None: no number outside the thinking.
    """
    text = _without_tex(spoken(text))
    answers = [(found.end(), text[found.end() :].partition("####")[0]) for found in re.finditer("####", text)]
    # A heading of Markdown is no answer: that begins with its number.
    begins = re.compile(rf"[\s*_{_MONEY}(-]*\.?[0-9]")
    answers = [(at, part) for at, part in answers if begins.match(part) and not _STEP.match(part)]
    for _, part in sorted([*_boxed(text), *answers], reverse=True):
        part = re.sub(r"^([\s*$]*-) ", r"\1", re.sub(r"(?<=[0-9]) (?=[0-9]{3}(?![0-9/]))", "", part.strip()))
        line = part.partition("\n")[0]
        for side in (_right_side(line), line, part):
            if values := _values(side):
                return values[0]
    values = _values(text)
    return values[-1] if values else None


def gsm8k_right(response: str, target: str) -> bool:
    """Whether the response's number is the target's, by value: $18.00 is 18, 1,234.50 is 1234.5."""
    value = gsm8k_number(response)
    return value is not None and value == gsm8k_number(target)


def _without_tex(text: str) -> str:
    """The text with plain signs, sums and fractions."""
    text = _THIN.sub(",", text.translate(_SIGNS))
    for pattern, instead in (*_CALCULATED, *_TEX):
        text = pattern.sub(instead, text)

    def over(match: re.Match) -> str:
        above, below = ((a or b).rstrip(".").replace(",", "") for a, b in (match.groups()[:2], match.groups()[2:]))
        minus = "-" * ((above[0] == "-") != (below[0] == "-"))
        return _apart(match) + f"{minus}{above.lstrip('-')}/{below.lstrip('-')}"

    text = _FRACTION.sub(over, text)
    return _VULGAR.sub(lambda m: _apart(m) + unicodedata.normalize("NFKC", m[0]).replace("\u2044", "/"), text)


def _apart(fraction: re.Match) -> str:
    """A space, where a whole number is before the fraction."""
    return " " * fraction.string[: fraction.start()][-1:].isdigit()


def _right_side(line: str) -> str:
    """Of 3 * 6 = 18 what it comes to; of 18 dollars = 1800 cents all, since no sum stands on the left."""
    left, _, right = line.rpartition("=")
    return right if _SUM.fullmatch(left) and re.search(r"[xX\u00d7\u00f7\u00b7\u2217\u22c5+*/^-]", left) else line


def _boxed(text: str) -> list[tuple[int, str]]:
    """(where it begins, what stands in it) of each \\boxed{}, braces within it balanced."""
    parts = []
    for begun in list(re.finditer(r"\\f?boxed\s{0,9}\{", text))[-_MOST:]:  # a loop of repetitions has many
        depth, end = 1, begun.end()
        while end < min(len(text), begun.end() + _LONGEST) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        parts.append((begun.end(), text[begun.end() : end - (depth == 0)]))
    return parts


def _values(text: str) -> list[Fraction]:
    """The numbers in a text, by value."""
    values = []
    for minus, other_minus, whole, decimals, above, below in _WRITTEN.findall(text):
        if not (whole or decimals) or not Fraction(below or 1):
            continue
        value, sign = Fraction(re.sub("[^0-9]", "", whole or "0") + decimals), -1 if minus or other_minus else 1
        if not above:
            values.append(sign * value / Fraction(below or 1))
        elif (part := Fraction(int(above)) / Fraction(below)) < 1:  # 3 1/2
            values.append(sign * (value + part))
        else:  # 12 24/7
            values += [sign * value, part]
    return values
