"""Duels: the items on which one model did worst against another, with both answers. Pure functions on items."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rpo.evals.pairing import met_alike
from rpo.evals.results import Item
from rpo.text import clean, number

# Metrics of which less is better, by a part of their names: kl, wikitext/word_perplexity,none
LOWER = {"kl", "nll", "brier", "brier_score", "loss", "calibration_error", "displacement_rate"}
LOWER |= {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
NEITHER = ("samples/length", "samples/ended", "length", "tokens")
EXCERPT = 400  # characters of an answer that are shown at once
LONGEST = 20_000  # and at all


@dataclass(frozen=True)
class Answer:
    """`start` is shown at once, `rest` on demand; `more`: characters that only samples.jsonl has."""

    model: str
    score: str
    start: str
    rest: str
    more: int


@dataclass(frozen=True)
class Duel:
    prompt: str
    left: Answer
    right: Answer


@dataclass(frozen=True)
class Comparison:
    """`summary`: on how many items the second model is worse; `duels`: the worst of them."""

    summary: str
    duels: list[Duel]


def is_lower_better(metric: str) -> bool:
    return bool(LOWER & set(re.split("[/,]", metric)))


def items_of(items: Sequence[Item], model: str) -> dict[str, Item]:
    """The items of `model` by id; those in error, or without a score, are left out."""
    return {item.id: item for item in items if item.model == model and item.scores and not item.error}


def start_and_end(items: Sequence[Item], runs: Sequence[str]) -> tuple[dict[str, Item], dict[str, Item]]:
    """(answers at step 0, at the last checkpoint) of these runs, from the items of task=overopt, whose ids end in @STEP.

    The two of one prompt and number are samples, not one answer that changed.
    """
    ends: tuple[dict[str, Item], dict[str, Item]] = ({}, {})
    for run in runs:
        own = [i for i in items if i.model == run and isinstance(i.details.get("step"), int) and "gold" in i.scores]
        for end, step in zip(ends, (0, max((i.details["step"] for i in own), default=0)), strict=True):
            for item in (item for item in own if item.details["step"] == step):
                end[f"{run} {item.id.rpartition('@')[0]}"] = replace(item, scores={"gold": item.scores["gold"]})
    return ends


def comparable(a: Mapping[str, Item], b: Mapping[str, Item], opponents: tuple[str, str] | None) -> dict[str, Item]:
    """The items of b comparable with a's: judged against one answer, or against each other, the two `opponents`."""
    return {
        key: item
        for key, item in b.items()
        if key in a and (met_alike(a[key], item) or (item.opponent, a[key].opponent) == opponents)
    }


def prompt_of(item: Item) -> str:
    """The prompt as text: messages with their roles, a lone one without."""
    prompt = item.prompt
    if isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt):
        turns = [f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in prompt]
        return str(prompt[0].get("content", "")) if len(prompt) == 1 else "\n".join(turns)
    return str(prompt or item.id)


def worst(base: str, a: Mapping[str, Item], other: str, b: Mapping[str, Item], most: int) -> Comparison | None:
    """The `most` items on which `other` (items b) fell furthest below `base` (items a); None where nothing is in common.

    By the first metric of quality that items of both have.
    """
    scores = {key: (a[key].scores, b[key].scores) for key in a if key in b}
    names = dict.fromkeys(name for first, second in scores.values() for name in first if name in second)
    metric = next((name for name in names if name not in NEITHER), None)
    if metric is None or not most:
        return None
    sign = -1 if is_lower_better(metric) else 1
    both = {key: pair for key, pair in scores.items() if metric in pair[0] and metric in pair[1]}
    change = {key: sign * (second[metric] - first[metric]) for key, (first, second) in both.items()}
    fell = sorted((key for key in change if change[key] < 0), key=lambda key: change[key])
    rose = sum(value > 0 for value in change.values())
    duels = [
        Duel(clean(prompt_of(b[key]))[:EXCERPT], _answer(base, a[key], metric), _answer(other, b[key], metric))
        for key in fell[:most]
    ]
    counts = f"worse on {len(fell)} of {len(both)} items, better on {rose}"
    return Comparison(f"{other} against {base}, by {metric}: {counts}.", duels)


def _answer(model: str, item: Item, metric: str) -> Answer:
    # Cleaned before it is cut: half a secret is not recognised.
    text = clean("(answer not kept)" if item.response is None else item.response)
    cut = EXCERPT if len(text) > 1.2 * EXCERPT else len(text)
    more = max(0, len(text) - LONGEST)
    return Answer(model, f"{metric} {number(item.scores[metric])}", text[:cut] or "(empty)", text[cut:LONGEST], more)
