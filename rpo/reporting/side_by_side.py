"""Duels: the items on which one model did worst against another, with both answers. Pure functions on samples.

A sample is a line of samples.jsonl: "model", "id", "cluster", "prompt", "response", "scores", "error", "against", "details".
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rpo.reporting.text import clean, number

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


def items_of(samples: Sequence[dict], model: str) -> dict[str, dict]:
    """The samples of `model` by id; those in error, or without a score, are left out."""
    return {s["id"]: s for s in samples if s["model"] == model and s["scores"] and not s.get("error")}


def opponent(sample: dict) -> str | None:
    """The model that a sample was judged against."""
    against = sample.get("against")
    return str(against["model"]) if isinstance(against, dict) and against.get("model") is not None else None


def start_and_end(samples: Sequence[dict], runs: Sequence[str]) -> tuple[dict[str, dict], dict[str, dict]]:
    """(answers at step 0, at the last checkpoint) of these runs, from the samples of task=overopt.

    An item is the k-th answer to a prompt by a run; the two are samples, not one answer that changed.
    """
    ends: tuple[dict[str, dict], dict[str, dict]] = ({}, {})
    for run in runs:
        by_step: dict[int, list[dict]] = {}
        for sample in samples:
            step = sample["details"].get("step") if isinstance(sample.get("details"), dict) else None
            if sample["model"] == run and isinstance(step, int) and "gold" in sample["scores"]:
                by_step.setdefault(step, []).append(sample | {"scores": {"gold": sample["scores"]["gold"]}})
        for items, step in zip(ends, (0, max(by_step, default=0)), strict=True):
            count: Counter[str] = Counter()
            for sample in by_step.get(step, ()):
                key = f"{run} {sample.get('cluster')} {prompt_of(sample)}"
                count[key] += 1
                items[f"{key} {count[key]}"] = sample
    return ends


def comparable(a: dict[str, dict], b: dict[str, dict], duel: tuple[str, str] | None) -> dict[str, dict]:
    """The items of b comparable with a's: judged against one model, or (`duel`: their names) against each other."""

    def fits(left: str | None, right: str | None) -> bool:
        return left == right or (duel is not None and (right, left) == duel)

    return {key: item for key, item in b.items() if key in a and fits(opponent(a[key]), opponent(item))}


def prompt_of(sample: dict) -> str:
    """The prompt as text: messages with their roles, a lone one without."""
    prompt = sample.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt):
        turns = [f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in prompt]
        return str(prompt[0].get("content", "")) if len(prompt) == 1 else "\n".join(turns)
    return str(prompt or sample["id"])


def worst(base: str, a: dict[str, dict], other: str, b: dict[str, dict], most: int) -> Comparison | None:
    """The `most` items on which `other` (items b) fell furthest below `base` (items a); None where nothing is in common.

    By the first metric of quality that items of both have.
    """
    scores = {key: (a[key]["scores"], b[key]["scores"]) for key in a if key in b}
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


def _answer(model: str, sample: dict, metric: str) -> Answer:
    score, response = f"{metric} {number(sample['scores'][metric])}", sample.get("response")
    text = clean(
        "(answer not kept)" if response is None else response
    )  # before it is cut: half a secret is not recognised
    cut = EXCERPT if len(text) > 1.2 * EXCERPT else len(text)
    return Answer(model, score, text[:cut] or "(empty)", text[cut:LONGEST], max(0, len(text) - LONGEST))
