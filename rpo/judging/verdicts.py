"""Scores from a judge's replies: letters and ratings, and both orders of a pair."""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rpo.data.formats import Messages
from rpo.judging import prompts
from rpo.judging.client import Reply, Request
from rpo.judging.judge import facts
from rpo.judging.settings import Judge

_LETTER = re.compile(r"\[\[([ABC])\]\]")
_RATINGS = (re.compile(r"\[\[([0-9]+\.?[0-9]*)\]\]"), re.compile(r"\[([0-9]+\.?[0-9]*)\]"))
LOWEST, HIGHEST = 1.0, 10.0  # of MT-Bench's scale
CUT = "the judge's reply was cut at judge.max_tokens"
TOP = 5  # log-probs to ask for: the most that the vendor gives to everyone


# ---- one reply


def pair_letter(text: str) -> str | None:
    """A, B or C by the last [[A]], [[B]] or [[C]] of the reply (earlier ones may quote the instructions), or None."""
    return next(reversed(_LETTER.findall(text)), None)


def rating(text: str) -> float | None:
    """The rating from 1 to 10: the last [[7]] or [[7.5]], else the last [7] (MT-Bench's two patterns).

    The last, because the reasons before it may quote a rating in the answer; FastChat takes the first. None if there is none
    or it is outside the scale.
    """
    for pattern in _RATINGS:
        if numbers := pattern.findall(text):
            value = float(numbers[-1])
            return value if LOWEST <= value <= HIGHEST else None
    return None


def first_wins(top_logprobs: Mapping[str, float], first: str, second: str) -> float | None:
    """P(first) = e^a / (e^a + e^b), a and b the log-probs of the tokens `first` and `second` as the reply's first token.

    A token that is not among the top ones has log-prob -inf; None if neither is.
    """
    a, b = (top_logprobs.get(token, -math.inf) for token in (first, second))
    if a == b == -math.inf:
        return None
    ratio = math.exp(min(a, b) - max(a, b))
    return (1 if a >= b else ratio) / (1 + ratio)


def by_letter(top_logprobs: Mapping[str, float]) -> dict[str, float]:
    """The log-probs, summed over tokens that differ only in white space: "A" and " A" are one verdict."""
    sums: dict[str, float] = {}
    for token, logprob in top_logprobs.items():
        sums[token.strip()] = float(np.logaddexp(sums.get(token.strip(), -math.inf), logprob))
    return sums


def switched(instruction: str, seed: int = 0) -> bool:
    """True if AlpacaEval shows the model's answer first for this instruction: a function of its text and the seed."""
    return random.Random(f"is_switched_outputs{instruction}{seed}").choices([False, True])[0]


def first_score(form: str, reply: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """(score of the answer shown first: 1, .5, 0, or a probability; None) or (None, why there is none).

    `reply` has the fields of a Reply: text, top_logprobs, finish_reason, error. In `form` "text" the verdict is a letter in
    brackets, in "logprobs" a lone A or B.
    """
    if reply["error"] is not None:
        return None, reply["error"]
    if form == "logprobs":
        if reply["top_logprobs"] is None:
            return None, "no log-probs in the judge's reply"
        score = first_wins(by_letter(reply["top_logprobs"]), "A", "B")
        return score, "neither A nor B among the judge's first tokens" if score is None else None
    if reply["finish_reason"] == "length":  # a letter before the cut may not be the verdict
        return None, CUT
    letter = pair_letter(reply["text"])
    if letter is None:
        return None, "no [[A]], [[B]] or [[C]] in the judge's reply"
    return {"A": 1.0, "B": 0.0, "C": 0.5}[letter], None


# ---- both orders of a pair


def two_orders(first: float | None, second: float | None) -> tuple[float, bool] | None:
    """(the model's score, whether the orders agree) from its scores in the two (1: better, .5: a tie, 0: worse, or a
    probability).

    Orders agree if both are above half, both below, or both half; the score is then their mean. Otherwise position
    decided, and the score is half. None if either is missing.
    """
    if first is None or second is None:
        return None
    assert 0 <= first <= 1 and 0 <= second <= 1, (first, second)
    agree = (first > 0.5) == (second > 0.5) and (first < 0.5) == (second < 0.5)
    return ((first + second) / 2 if agree else 0.5), agree


class Shown(NamedTuple):
    """Two answers to a prompt in the judge's order, and the number of the repeat."""

    prompt: str | Messages
    first: str
    second: str
    repeat: int = 0


def judged(
    shown: Sequence[Shown], cfg: Judge, prompts_file: str | None, ask: Callable[[Sequence[Request]], list[Reply]]
) -> tuple[str, list[Reply], dict]:
    """(the form of verdict: "text" or "logprobs", a reply for each, facts about the judge), for `first_score`.

    judge.verdict=auto tries log-probs on the first two; all get one form, since the two are not on one scale. The
    templates of `prompts_file` ask for a verdict in words.
    """
    templates = prompts.OURS if prompts_file is None else prompts.load(prompts_file, "pair")

    def request(pair: Shown, form: str) -> Request:
        if form == "logprobs":
            return Request(prompts.letter(*pair[:3]), max_tokens=1, top_logprobs=TOP, repeat=pair.repeat)
        return Request(prompts.pair(*pair[:3], templates=templates), repeat=pair.repeat)

    form, trial, trial_replies = cfg.verdict, [], []
    if form == "auto":
        trial = [request(pair, "logprobs") for pair in shown[:2] if prompts_file is None]
        trial_replies = ask(trial) if trial else []
        scores = [first_score("logprobs", vars(reply))[0] for reply in trial_replies]
        form = "logprobs" if scores and None not in scores else "text"
    requests = [request(pair, form) for pair in shown]
    replies = ask(requests)
    # The trial comes last: of equal requests facts counts the last, and the trial was paid for, not cached.
    about = facts([*requests, *trial], [*replies, *trial_replies], cfg)
    return form, replies, about | {"prompt": "rpo-letter" if form == "logprobs" else templates["pair", False, 1].name}
