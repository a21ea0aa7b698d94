"""Scores of answers to GSM8K (arXiv 2110.14168): the number that an answer gives, and whether it is the right one.

An implementation of lm-evaluation-harness's rules (its task gsm8k, version 3) of our own: `tasks.lm_eval` holds the
harness's scores to it, so that a release with other rules does not pass for a better model.
"""

import re

_LAST = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def strict(text: str, anchor: str = "####") -> str | None:
    """The number after the first `anchor` and a space; None where there is none."""
    found = re.search(rf"{re.escape(anchor)} (-?[0-9.,]+)", text)
    return found and found[1]


def flexible(text: str) -> str | None:
    """The last number of the text, a sum of money's $ with it; None where there is none."""
    found = _LAST.findall(text)
    return (found[-1][0] or found[-1][1]) if found else None


def same(answer: str | None, target: str) -> bool:
    """Whether both are the same number, written alike but for $, thousands' commas and a dot at the end."""
    return answer is not None and _plain(answer) == _plain(target)


def _plain(number: str) -> str:
    return re.sub(r"\.$", "", number.replace(",", "").replace("$", ""))
