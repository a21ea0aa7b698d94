"""Items on which one model did worst against another, as answers side by side. Pure functions on samples of evaluations."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rpo.page import Block, Duel, Fold, Prose, Table
from rpo.svg import number

LOWER = ("kl", "nll", "brier", "loss", "calibration_error", "displacement_rate")  # metrics of which less is better
NEITHER = ("samples/length", "samples/ended", "length", "tokens")
MOST = 12  # comparisons that are shown


@dataclass(frozen=True)
class Item:
    """One model's answer to one question; `text` None: its evaluation keeps none."""

    prompt: str
    text: str | None
    scores: dict[str, float]


def items_of(samples: Sequence[dict], model: str) -> dict[str, Item]:
    """The items of `model` by id, from lines of samples.jsonl; those in error, or without a score, are left out."""
    items = {}
    for sample in samples:
        scores = sample.get("scores")
        if sample.get("model") != model or "id" not in sample or sample.get("error") or not isinstance(scores, dict):
            continue
        known = {name: float(value) for name, value in scores.items() if _finite(value)}
        if known:
            items[str(sample["id"])] = Item(_prompt(sample), _answer(sample), known)
    return items


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _prompt(sample: dict) -> str:
    said = next((sample[name] for name in ("prompt", "messages", "question", "instruction") if sample.get(name)), None)
    if isinstance(said, list) and all(isinstance(turn, dict) for turn in said):
        turns = [f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in said]
        return str(said[0].get("content", "")) if len(said) == 1 else "\n".join(turns)
    return str(sample["id"] if said is None else said)


def _answer(sample: dict) -> str | None:
    names = ("response", "responses", "answer", "answers", "output", "program", "programs", "text", "completion")
    said = next((sample[name] for name in names if name in sample), None)
    if isinstance(said, list):
        return "\n\n".join(turn if isinstance(turn, str) else json.dumps(turn) for turn in said)
    return None if said is None else str(said)


def study_items(samples: Sequence[dict], runs: Sequence[str]) -> tuple[dict[str, Item], dict[str, Item]]:
    """(answers at the start, at the last checkpoint) of these runs, from the samples of task=overopt, by gold reward.

    An item is the k-th answer to a prompt that a run gave; the two are samples, not one answer that changed.
    """
    before, after = {}, {}
    for run in runs:
        own = [sample for sample in samples if sample.get("run") == run and _finite(sample.get("step"))]
        last = max((sample["step"] for sample in own), default=0)
        for step, items in ((0, before), (last, after)):
            count: dict[str, int] = {}
            for sample in own:
                if sample["step"] == step and _finite(sample.get("gold")):
                    row = f"{sample.get('row')} {sample.get('prompt')}"
                    count[row] = count.get(row, 0) + 1
                    gold = {"gold": float(sample["gold"])}
                    items[f"{run} {row} {count[row]}"] = Item(_prompt(sample | {"id": row}), _answer(sample), gold)
    return before, after


def metric_of(a: dict[str, Item], b: dict[str, Item]) -> str | None:
    """The first metric that says which of two answers is better, of items that both have."""
    names = [name for key in a if key in b for name in a[key].scores if name in b[key].scores]
    return next((name for name in dict.fromkeys(names) if name not in NEITHER), None)


def compared(base: str, a: dict[str, Item], other: str, b: dict[str, Item], most: int) -> list[Block]:
    """The `most` items on which `other` (items b) fell furthest below `base` (items a); [] where nothing is in common."""
    metric = metric_of(a, b)
    if metric is None or not most:
        return []
    sign = -1 if metric.split("/")[0] in LOWER else 1
    both = [key for key in a if key in b and metric in a[key].scores and metric in b[key].scores]
    fell = {key: sign * (b[key].scores[metric] - a[key].scores[metric]) for key in both}
    worst = sorted((key for key in both if fell[key] < 0), key=lambda key: fell[key])[:most]
    below = sum(change < 0 for change in fell.values())
    rose = sum(change > 0 for change in fell.values())
    head = f"{other} against {base}, by {metric}: worse on {below} of {len(both)} items, better on {rose}."
    if not worst:
        return [Prose(head)]
    shown = [(b[key].prompt, a[key], b[key]) for key in worst]
    if all(left.text is None and right.text is None for _, left, right in shown):
        rows = [[prompt, number(left.scores[metric]), number(right.scores[metric])] for prompt, left, right in shown]
        return [Prose(head), Table(f"The {len(rows)} worst", ["item", base, other], rows)]
    duels = [
        Duel(
            f"{metric} {number(left.scores[metric])} \u2192 {number(right.scores[metric])}",
            prompt,
            (base, f"{metric} {number(left.scores[metric])}", left.text or ""),
            (other, f"{metric} {number(right.scores[metric])}", right.text or ""),
        )
        for prompt, left, right in shown
    ]
    return [Prose(f"{head} The {len(duels)} worst:"), *duels]


def folded(comparisons: Sequence[list[Block]]) -> list[Block]:
    """The first comparison as it is, the others folded, those beyond MOST named by number alone."""
    blocks: list[Block] = []
    for i, (head, *rest) in enumerate(comparisons[:MOST]):
        blocks += [head, *rest] if not i or not rest else [Fold(head.text, rest)]
    if len(comparisons) > MOST:
        blocks.append(Prose(f"{len(comparisons) - MOST} more comparisons are not shown."))
    return blocks
