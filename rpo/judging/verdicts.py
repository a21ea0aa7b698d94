"""How often one model's answers are preferred to another's, from its scores in two orders.

Letters: N judged items; a score is NaN where the judgment failed.
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rpo.data.formats import Messages
from rpo.judging import judge, verdicts
from rpo.judging.client import Reply, Request
from rpo.judging.prompts import OURS, letter, load, pair
from rpo.judging.settings import Judge
from rpo.stats import clustered_mean, with_errors

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


TOP = 5  # log-probs asked for: the most that the vendor gives to all


class Shown(NamedTuple):
    """Two answers to a prompt as the judge sees them, and which repeat of this it is."""

    prompt: str | Messages
    first: str
    second: str
    repeat: int = 0


def judged(
    shown: Sequence[Shown], cfg: Judge, prompts: str | None, ask: Callable[[Sequence[Request]], list[Reply]]
) -> tuple[str, list[Reply], dict]:
    """(the form of verdict: "text" or "logprobs", a reply for each, facts about the judge), for `verdicts.first_score`.

    judge.verdict=auto tries log-probs on the first two; one form for all, since the two are not on one scale. The
    templates of a file (`prompts`) ask for a verdict in words.
    """
    templates = OURS if prompts is None else load(prompts, "pair")

    def requests(form: str, some: Sequence[Shown]) -> list[Request]:
        if form == "logprobs":
            letters = [letter(one.prompt, one.first, one.second) for one in some]
            return [
                Request(messages, max_tokens=1, top_logprobs=TOP, repeat=one.repeat)
                for messages, one in zip(letters, some, strict=True)
            ]
        return [
            Request(pair(one.prompt, one.first, one.second, templates=templates), repeat=one.repeat) for one in some
        ]

    form, trial, tried = cfg.verdict, [], []
    if form == "auto":
        trial = requests("logprobs", shown[:2]) if prompts is None else []
        tried = ask(trial) if trial else []
        given = bool(tried) and all(verdicts.first_score("logprobs", vars(reply))[0] is not None for reply in tried)
        form = "logprobs" if given else "text"
    asked = requests(form, shown)
    replies = ask(asked)
    facts = judge.facts([*asked, *trial], [*replies, *tried], cfg)  # the trial last: it was paid for, not cached
    return form, replies, facts | {"prompt": "rpo-letter" if form == "logprobs" else templates["pair", False, 1].name}


LOW = 0.5  # agreement of the two orders below which most items go by the order, not by the answers


def cell(values_N: np.ndarray, clusters_N: Sequence[str], failed_N: np.ndarray) -> dict:
    """The clustered mean of what did not fail, with the number that did."""
    ok_N = ~failed_N
    return with_errors(clustered_mean(values_N[ok_N], np.asarray(clusters_N)[ok_N]), int(failed_N.sum()))


def rates(score_N: np.ndarray, clusters_N: Sequence[str]) -> dict[str, dict]:
    """The cells of one model by name, in shares.

    win_rate             mean score: (wins + ties / 2) / all where verdicts are in words
    wins, ties, losses   shares of scores above, at and below half; where the orders disagree the score is half
    """
    failed_N = np.isnan(score_N)
    columns = {"win_rate": score_N, "wins": score_N > 0.5, "ties": score_N == 0.5, "losses": score_N < 0.5}
    return {name: cell(values_N, clusters_N, failed_N) for name, values_N in columns.items()}


def of_orders(
    agree_N: np.ndarray, first_N: np.ndarray, clusters_N: Sequence[str], failed_N: np.ndarray
) -> dict[str, dict]:
    """The judge's cells by name, in shares, of items that it was asked about in both orders.

    order_consistency    share of items on which both orders say the same
    first_position       mean score of the answer that is shown first: .5 without a bias for a position
    """
    columns = {"order_consistency": agree_N, "first_position": first_N}
    return {name: cell(values_N, clusters_N, failed_N) for name, values_N in columns.items()}


def position_notes(cells: dict[str, dict], name: str) -> list[str]:
    """What to say of a judge whose two orders say the same (cell `name`) less often than not."""
    share = cells[name]["value"]
    if share is None or share >= LOW:
        return []
    return [
        f"{name} is {share:.0%}: on most items what this judge says changes with the order in which it sees the answers, so "
        "these rates say little of them"
    ]
