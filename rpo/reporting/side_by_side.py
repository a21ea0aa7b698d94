"""Items on which one model did worst against another, as answers side by side. Pure functions on samples of evaluations."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rpo.reporting.gather import finite
from rpo.reporting.page import Block, Duel, Fold, Prose, Table
from rpo.reporting.svg import number

# Metrics of which less is better, by a part of their names: kl, wikitext/word_perplexity,none
LOWER = {"kl", "nll", "brier", "brier_score", "loss", "calibration_error", "displacement_rate"}
LOWER |= {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
NEITHER = ("samples/length", "samples/ended", "length", "tokens")
MOST = 12  # comparisons that are shown


@dataclass(frozen=True)
class Item:
    """One model's answer to one question; `text` None: its evaluation keeps none; `against`: whom it was judged against."""

    prompt: str
    text: str | None
    scores: dict[str, float]
    against: str | None = None


def items_of(samples: Sequence[dict], model: str) -> dict[str, Item]:
    """The items of `model` by id, from lines of samples.jsonl; those in error, or without a score, are left out."""
    items = {}
    for sample in samples:
        scores = sample.get("scores")
        if sample.get("model") != model or "id" not in sample or sample.get("error") or not isinstance(scores, dict):
            continue
        known = {name: float(value) for name, value in scores.items() if finite(value)}
        if known:
            against = None if sample.get("against") is None else str(sample["against"])
            items[str(sample["id"])] = Item(_prompt(sample), _answer(sample), known, against)
    return items


def _prompt(sample: dict) -> str:
    said = next((sample[name] for name in ("prompt", "messages", "instruction") if sample.get(name)), None)
    if isinstance(said, list) and all(isinstance(turn, dict) for turn in said):
        turns = [f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in said]
        return str(said[0].get("content", "")) if len(said) == 1 else "\n".join(turns)
    return str(sample["id"] if said is None else said)


def _answer(sample: dict) -> str | None:
    """What the model said, its programs with what became of them; where samples do not keep it, what the judge said of it."""
    names = ("response", "answer", "programs", "judgments", "judgment", "reply")
    name = next((name for name in names if sample.get(name) is not None), None)
    if name is None:
        return None
    said = sample[name]
    said = "\n\n".join(map(_part, said)) if isinstance(said, list) else str(said)
    return f"[judge] {said}" if name in ("judgment", "reply") else said


def _part(said: Any) -> str:
    match said:
        case {"program": str(program), "why": why}:
            return f"{program.strip()}\n# {why or 'passed'}"
        case {"shown_first": first, "reply": reply}:
            return f"[judge, {first} shown first] {reply}"
    return said if isinstance(said, str) else json.dumps(said)


def study_items(samples: Sequence[dict], runs: Sequence[str]) -> tuple[dict[str, Item], dict[str, Item]]:
    """(answers at the start, at the last checkpoint) of these runs, from the samples of task=overopt, by gold reward.

    An item is the k-th answer to a prompt that a run gave; the two are samples, not one answer that changed.
    """
    before, after = {}, {}
    for run in runs:
        own = [sample for sample in samples if sample.get("run") == run and finite(sample.get("step"))]
        last = max((sample["step"] for sample in own), default=0)
        for step, items in ((0, before), (last, after)):
            count: dict[str, int] = {}
            for sample in own:
                if sample["step"] == step and finite(sample.get("gold")):
                    row = f"{sample.get('row')} {sample.get('prompt')}"
                    count[row] = count.get(row, 0) + 1
                    gold = {"gold": float(sample["gold"])}
                    items[f"{run} {row} {count[row]}"] = Item(_prompt(sample | {"id": row}), _answer(sample), gold)
    return before, after


def alike(a: dict[str, Item], b: dict[str, Item], duel: tuple[str, str] | None) -> dict[str, Item]:
    """The items of b whose scores stand beside a's: both judged against one model, or (`duel`) a's and b's against each other."""

    def fits(left: Item, right: Item) -> bool:
        return left.against == right.against or (duel is not None and (right.against, left.against) == duel)

    return {key: item for key, item in b.items() if key in a and fits(a[key], item)}


def metric_of(a: dict[str, Item], b: dict[str, Item]) -> str | None:
    """The first metric that says which of two answers is better, of items that both have."""
    names = [name for key in a if key in b for name in a[key].scores if name in b[key].scores]
    return next((name for name in dict.fromkeys(names) if name not in NEITHER), None)


def compared(base: str, a: dict[str, Item], other: str, b: dict[str, Item], most: int) -> list[Block]:
    """The `most` items on which `other` (items b) fell furthest below `base` (items a); [] where nothing is in common."""
    metric = metric_of(a, b)
    if metric is None or not most:
        return []
    sign = -1 if LOWER & set(re.split("[/,]", metric)) else 1
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
