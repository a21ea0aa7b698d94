"""What a judge's reply says: a letter, a rating, or the probability that the first answer is the better one.

Only the judge's own reply is looked at, never the answers that it was shown: these may hold a verdict of their own.
"""

import math
import random
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_LETTER = re.compile(r"\[\[([ABC])\]\]")
_RATINGS = (re.compile(r"\[\[([0-9]+\.?[0-9]*)\]\]"), re.compile(r"\[([0-9]+\.?[0-9]*)\]"))
LOWEST, HIGHEST = 1.0, 10.0  # of MT-Bench's scale
CUT = "the judge's reply was cut at judge.max_tokens"


def pair_letter(text: str) -> str | None:
    """A, B or C: the last [[A]], [[B]] or [[C]] of the reply, which may have quoted its instructions; None without one."""
    found = _LETTER.findall(text)
    return found[-1] if found else None


def rating(text: str) -> float | None:
    """The rating from 1 to 10: the last [[7]] or [[7.5]], else the last [7] (MT-Bench's two patterns).

    The last, since a judge gives its reasons first, and these may quote a rating that the answer gave itself; FastChat takes
    the first. None where there is none, or one outside the scale.
    """
    for pattern in _RATINGS:
        if found := pattern.findall(text):
            value = float(found[-1])
            return value if LOWEST <= value <= HIGHEST else None
    return None


def first_wins(top_logprobs: Mapping[str, float], first: str, second: str) -> float | None:
    """P(first) = e^a / (e^a + e^b), a and b the log-probs of the tokens `first` and `second` as the reply's first token.

    A token that is not among the top ones has log-prob -inf; None where neither is.
    """
    a, b = (top_logprobs.get(token, -math.inf) for token in (first, second))
    if a == b == -math.inf:
        return None
    if a < b:
        return math.exp(a - b) / (1 + math.exp(a - b))
    return 1 / (1 + math.exp(b - a))


def by_letter(top_logprobs: Mapping[str, float]) -> dict[str, float]:
    """The log-probs with those of tokens that differ in white space alone added up: "A" and " A" are one verdict."""
    added: dict[str, float] = {}
    for token, logprob in top_logprobs.items():
        letter = token.strip()
        high, low = max(logprob, added.get(letter, -math.inf)), min(logprob, added.get(letter, -math.inf))
        added[letter] = high if low == -math.inf else high + math.log1p(math.exp(low - high))
    return added


def switched(instruction: str, seed: int = 0) -> bool:
    """Whether AlpacaEval shows the model's answer first for this instruction: a function of its text and the seed."""
    return random.Random(f"is_switched_outputs{instruction}{seed}").choices([False, True])[0]


def first_score(form: str, said: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """(score of the answer that was shown first: 1, .5, 0, or a probability; None) or (None, why there is none).

    `said` has what a reply has: text, top_logprobs, finish_reason, error. By `form` "text" the verdict is a letter in
    brackets, by "logprobs" a lone A or B.
    """
    if said["error"] is not None:
        return None, said["error"]
    if form == "logprobs":
        if said["top_logprobs"] is None:
            return None, "no log-probs in the judge's reply"
        score = first_wins(by_letter(said["top_logprobs"]), "A", "B")
        return score, "neither A nor B among the judge's first tokens" if score is None else None
    if said["finish_reason"] == "length":  # a letter so far may be one that the judge only weighs or quotes
        return None, CUT
    letter = pair_letter(said["text"])
    if letter is None:
        return None, "no [[A]], [[B]] or [[C]] in the judge's reply"
    return {"A": 1.0, "B": 0.0, "C": 0.5}[letter], None


class TwoOrders(NamedTuple):
    """A model's score for one prompt, and whether both orders say the same."""

    score: float
    agree: bool


def two_orders(first: float | None, second: float | None) -> TwoOrders | None:
    """One score of the model's in either order (1: it is better, .5: a tie, 0, or its probability between).

    Orders agree where both are above half, both below, or both half; the score is then their mean. Where they do not,
    position decided, and the score is half. None where either is missing: an error.
    """
    if first is None or second is None:
        return None
    assert 0 <= first <= 1 and 0 <= second <= 1, (first, second)
    agree = (first > 0.5) == (second > 0.5) and (first < 0.5) == (second < 0.5)
    return TwoOrders((first + second) / 2 if agree else 0.5, agree)
