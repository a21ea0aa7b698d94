"""Scores from a judge's replies: letters and ratings, and both orders of a pair."""

import math
import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rpo import dist
from rpo.data.formats import Messages
from rpo.judging import judge, prompts
from rpo.judging.client import Reply, Request, log_sum
from rpo.judging.settings import Judge
from rpo.text import redacted, spoken

LETTERS = ("A", "B")
LOWEST, HIGHEST = 1.0, 10.0  # of MT-Bench's scale
CUT = "the judge's reply was cut at judge.max_tokens"
TOP = 5  # log-probs to ask for: the most that the vendor gives to everyone
TRIAL = 2  # requests that show whether a judge's log-probs are verdicts
MOST_UNREAD = 0.05  # share of replies without a verdict by log-probs above which all are asked for in words
ALL_LISTED = 0.99  # mass of the tokens that a server lists beside which another has none, where it lists fewer than TOP
NEARLY_ALL = 0.9  # mean mass of the letters below which it is noted

# Repetitions have bounds: a judge may go on with white space until judge.max_tokens.
_MARKUP = r"[\s*_`\"']{0,9}"
# Not [[a]], which is code: x[[a]]; but a verdict right behind a letter of a language without spaces.
_LETTER = re.compile(
    rf"(?<![A-Za-z0-9)\]])\[\[{_MARKUP}(?:(?i:assistant|answer|verdict)\W{{1,3}})?([ABC]|(?i:tie|draw)){_MARKUP}\]\]"
)
_SCALE = r"(?:\s{0,3}(?:/|out of)\s{0,3}([0-9]{1,9}))?"
_NUMBER = r"([0-9]{1,9}(?:\.[0-9]{0,9}|,[0-9]{1,2})?)" + _SCALE
_LABEL = r"(?:rating|score)"
_BRACKETS = rf"(?<![A-Za-z0-9)\]])\[\[{_MARKUP}(?:{_LABEL}\W{{1,3}})?{_NUMBER}{_MARKUP}\]\](?!\(){_MARKUP}{_SCALE}"
_BETWEEN = re.compile(r"\]\]\s{0,3}(?:-|\u2013|to|or|and)\s{0,3}\[\[")
# Where a line or sentence begins: "Rating:", "**My final score (of 10)** =". Within quotes it is the instructions' example.
_LABELLED = (
    rf"(?:^|[.!?:]\s)[ \t*_#]{{0,9}}(?:(?:final|overall|my|the)\s{{1,3}}){{0,3}}{_LABEL}[\s*_]{{0,9}}"
    rf"(?:\([^()\n]{{1,30}}\)[\s*_]{{0,9}})?[:=]{_MARKUP}"
)
_END = r"[ \t*_`.]{0,9}$"
_RATINGS = (
    re.compile(_LABELLED + _BRACKETS, re.I | re.M),
    re.compile(_BRACKETS, re.I),
    # "Rating: [8]", "Score: 8/10", or [8] alone on a line: other numbers in brackets may be footnotes.
    re.compile(rf"{_LABELLED}\[?{_NUMBER}\]?[\s*_]{{0,3}}{_SCALE}{_END}", re.I | re.M),
    re.compile(rf"^[ \t*_`]{{0,9}}\[{_NUMBER}\]{_SCALE}{_END}", re.M),
)

# (a perfect answer would be [[10]]), but not (Final rating: [[8]])
_ASIDE = re.compile(rf"\((?!(?:(?:final|overall|my|the)\s)*{_LABEL}[\s*_]*[:=])[^()\n]{{1,80}}\Z", re.I)
_WIDE = str.maketrans("\uff3b\uff3d\uff08\uff09\uff1a\uff1b\uff01\uff1f\u3002\uff0f", "[]():;!?./")


# ---- one reply


def _plain(text: str) -> str:
    """What was spoken, without the backslashes that escape brackets, its signs those of ASCII."""
    return re.sub(r"\\{1,4}(?=[\[\]])", "", spoken(text)).translate(_WIDE)


# Words in a server's reason: FINISH_REASON_MAX_TOKENS, model_context_window_exceeded; end_turn, FinishReason.STOP, tool_calls.
_FULL = re.compile(r"length|max|limit|exceed|window")
_BROKEN = re.compile(r"filter|safety|error|abort|cancel|fail|timeout|suspend|pause|backend|incomplete|pending")
_ENDED = re.compile(r"stop|end|eos|complete|call|\A(?:none|null)?\Z|unspecified")


def pair_letter(text: str) -> str | None:
    """A, B or C by the last sentence with [[A]], [[B]], [[C]] or [[Tie]]; None without one, or where it has several.

    The last, because earlier ones may quote the instructions; several ("[[A]] is better than [[B]]") are not guessed at.
    """
    sentences = [found for part in re.split(r"[.;:!?\n]", _plain(text)) if (found := _LETTER.findall(part))]
    last = sentences[-1] if sentences else ()
    letters = {{"TIE": "C", "DRAW": "C"}.get(letter.upper(), letter.upper()) for letter in last}
    return letters.pop() if len(letters) == 1 else None


def why_cut(finish_reason: Any) -> str | None:
    """That a reply was ended before its end, by a server's reason of whatever name; None where it was not."""
    if not isinstance(finish_reason, str):
        return None
    reason = finish_reason.strip().lower()
    if _FULL.search(reason):
        return CUT
    whole = _ENDED.search(reason) and not _BROKEN.search(reason)
    return None if whole else f"the judge's reply was not finished (finish_reason {finish_reason[:60]!r})"


def rating(text: str) -> float | None:
    """The rating from 1 to 10: the last "Rating: [[7]]", else the last [[7]] or [[7.5]] (also [[7,5]], [[7/10]], [[7]]/10),
    else the last line "Rating: [7]" or "[7]".

    The last, because the reasons before it may quote a rating in the answer; FastChat takes the first, and where there are
    no double brackets any number in single ones, which may be a footnote. None if there is none or it is outside the scale.
    """
    text = _plain(text)
    for pattern in _RATINGS:
        if found := list(pattern.finditer(text)):
            found = [one for one in found if not _ASIDE.search(text, max(0, one.start() - 81), one.start())] or found
            number, *scales = found[-1].groups("")
            if _BETWEEN.search(text, max(0, found[-1].start() - 20), found[-1].end() + 20):
                return None
            value = float(number.replace(",", "."))
            return value if LOWEST <= value <= HIGHEST and {*scales} <= {"", "10"} else None
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


def by_letter(top_logprobs: Mapping[str, float], letters: Sequence[str] = LETTERS) -> dict[str, float]:
    """The log-prob of each letter, summed over all tokens that spell it: with white space, brackets, quotes or markup around
    it, and in either case where the letters differ in more than their case. A letter that no token spells is left out."""
    folds = len({letter.lower() for letter in letters}) == len(letters)
    tokens: dict[str, list[float]] = {letter: [] for letter in letters}
    for token, logprob in top_logprobs.items():
        text = unicodedata.normalize("NFKC", token.strip("\u0120\u010a\u2581")).strip(
            " \t\r\n()[]{}<>*_`\"'.,:;\\\u201c\u201d"
        )
        for letter in letters:
            if text == letter or (folds and text.lower() == letter.lower()):
                tokens[letter].append(logprob)
    return {letter: log_sum(each) for letter, each in tokens.items() if each}


def letter_mass(top_logprobs: Mapping[str, float] | None, letters: Sequence[str] = LETTERS) -> float | None:
    """The probability that the reply's first token is one of the letters; None without log-probs."""
    if top_logprobs is None:
        return None
    return min(1.0, sum(map(math.exp, (min(0.0, one) for one in by_letter(top_logprobs, letters).values()))))


def letter_score(
    top_logprobs: Mapping[str, float] | None, letters: Sequence[str] = LETTERS, min_mass: float = 0.5
) -> tuple[float | None, str | None]:
    """(P(first letter), None) by the log-probs of the reply's first token, or (None, why they are no verdict).

    Where the letters hold less than `min_mass` together, what the judge begins to say is something else, and which of
    the two is likelier says nothing. A letter that is not listed is unlikely only where as many tokens as were asked for are.
    """
    names, mass = " nor ".join(letters), letter_mass(top_logprobs, letters)
    if mass is None:
        return None, "no log-probs in the judge's reply"
    found = by_letter(top_logprobs, letters)
    score = first_wins(found, *letters)
    if score is None:
        return None, f"neither {names} among the judge's first tokens ({', '.join(map(repr, top_logprobs))})"
    if _is_low(mass, min_mass):
        both = " and ".join(letters)
        return None, f"{both} hold {mass:.0%} of the judge's first token, less than judge.min_mass={min_mass:g}"
    listed = sum(map(math.exp, top_logprobs.values()))
    if len(found) < len(letters) and len(top_logprobs) < TOP and listed < ALL_LISTED:
        (lacking,) = set(letters) - set(found)
        return None, f"{lacking} is not among the judge's {len(top_logprobs)} first tokens, which hold {listed:.0%}"
    return score, None


def _is_low(mass: float, min_mass: float) -> bool:
    return mass < min_mass - 1e-9  # less is rounding


def switched(instruction: str, seed: int = 0) -> bool:
    """True if AlpacaEval shows the model's answer first for this instruction: a function of its text and the seed."""
    return random.Random(f"is_switched_outputs{instruction}{seed}").choices([False, True])[0]


def first_score(form: str, reply: Mapping[str, Any], min_mass: float = 0.5) -> tuple[float | None, str | None]:
    """(score of the answer shown first: 1, .5, 0, or a probability; None) or (None, why there is none).

    `reply` has the fields of a Reply: text, top_logprobs, finish_reason, error. In `form` "text" the verdict is a letter in
    brackets, in "logprobs" a lone A or B.
    """
    if reply["error"] is not None:
        return None, reply["error"]
    if form == "logprobs":
        return letter_score(reply["top_logprobs"], min_mass=min_mass)
    if cut := why_cut(reply["finish_reason"]):  # a letter before the cut may not be the verdict
        return None, cut
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


Ask = Callable[[Sequence[Request]], list[Reply]]


def judged(shown: Sequence[Shown], cfg: Judge, prompts_file: str | None, ask: Ask) -> tuple[str, list[Reply], dict]:
    """(the form of verdict: "text" or "logprobs", a reply for each, facts about the judge), for `first_score`.

    The templates of `prompts_file` ask for a verdict in words.
    """
    templates = prompts.OURS if prompts_file is None else prompts.load(prompts_file, "pair")
    in_words = [Request(prompts.pair(*pair[:3], templates=templates), repeat=pair.repeat) for pair in shown]
    in_letters = [
        Request(prompts.letter(*pair[:3]), max_tokens=1, top_logprobs=TOP, repeat=pair.repeat)
        for pair in shown
        if prompts_file is None
    ]
    form, replies, about = in_one_form(in_letters, in_words, LETTERS, cfg, ask)
    return form, replies, about | {"prompt": "rpo-letter" if form == "logprobs" else templates["pair", False, 1].name}


def in_one_form(
    in_letters: Sequence[Request], in_words: Sequence[Request], letters: Sequence[str], cfg: Judge, ask: Ask
) -> tuple[str, list[Reply], dict]:
    """(the form of verdict: "text" or "logprobs", a reply to each request of that form, facts about the judge).

    judge.verdict=auto asks the first two by log-probs, and if these are verdicts all; where then more than 5% are none, all
    are asked in words. All get one form, since the two are not on one scale. No `in_letters`: in words.
    """

    def unread(replies: Sequence[Reply]) -> float:
        answered = [reply for reply in replies if reply.error is None]
        scores = [letter_score(reply.top_logprobs, letters, cfg.min_mass)[0] for reply in answered]
        return scores.count(None) / len(scores) if scores else 1.0

    form, trial, heard, replies = cfg.verdict if in_letters else "text", [], [], []
    if form == "auto":
        trial = list(in_letters[:TRIAL])
        heard = ask(trial)
        form = "logprobs" if unread(heard) == 0 else "text"
    if form == "logprobs":
        replies = ask(in_letters)
        if cfg.verdict == "auto" and unread(replies) > MOST_UNREAD:
            trial, heard, form = [*in_letters, *trial], [*replies, *heard], "text"
    requests = in_letters if form == "logprobs" else in_words
    replies = replies if form == "logprobs" else ask(in_words)
    announce(form, cfg, letters)
    # The trial comes last: of equal requests facts counts the last, and the trial was paid for, not cached.
    about = judge.facts([*requests, *trial], [*replies, *heard], cfg)
    masses = [letter_mass(reply.top_logprobs, letters) for reply in (replies if form == "logprobs" else heard)]
    known = [mass for mass in masses if mass is not None]
    return form, replies, about | {"letter_mass": sum(known) / len(known) if known else None}


def announce(form: str, cfg: Judge, letters: Sequence[str] = LETTERS) -> None:
    """Prints the form of the judge's verdicts, once for all ranks."""
    words = f"by the log-probs of {' and '.join(letters)}" if form == "logprobs" else "in words"
    if dist.is_main():
        print(redacted(f"judge {cfg.model}: verdicts {words}"), flush=True)


def judge_notes(about: Mapping[str, Any], form: str, letters: Sequence[str] = LETTERS) -> list[str]:
    """Those of `judge.notes`, and one where the letters' mass, in the facts of `in_one_form`, made words of all verdicts."""
    mass = about["letter_mass"]
    if form == "logprobs" or mass is None:
        return judge.notes(about)
    too_little = f"{_held(mass, letters)}, too little for verdicts by log-probs: all were asked for in words"
    return [*judge.notes(about), too_little]


def _held(mass: float, letters: Sequence[str]) -> str:
    return f"letter_mass: {' and '.join(letters)} hold {mass:.0%} of the judge's first token on average"


def mass_notes(masses: Sequence[float], cfg: Judge, letters: Sequence[str] = LETTERS) -> list[str]:
    """A note where the mass that the letters have in replies by log-probs, `masses`, is low in some, or on average."""
    if not masses:
        return []
    mean = sum(masses) / len(masses)
    held = _held(mean, letters)
    low = sum(_is_low(mass, cfg.min_mass) for mass in masses)
    if low:
        least = f"less than judge.min_mass={cfg.min_mass:g}"
        return [f"{held}; {low} of {len(masses)} replies have {least}, and are no verdicts"]
    return [f"{held}: the judge often begins with something else"] if mean < NEARLY_ALL else []
