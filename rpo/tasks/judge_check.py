"""Can a judge be trusted? Pairs whose better answer is known, judged in both orders, several times.

RUN/samples.jsonl holds all that it takes, an object per judgment; annotations= reads it again. Letters:
M = (pair, repeat) with both orders, K = (pair, order) with all repeats.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, Literal

import numpy as np

from rpo.config import EvalData
from rpo.data import answers
from rpo.data.formats import Messages, RowError, is_empty, parse
from rpo.data.sources import Tally, check_file, check_new, open_sources, rows_of
from rpo.errors import UserError, require
from rpo.evals.context import Context
from rpo.evals.judged import position_notes
from rpo.evals.results import Evaluation, Item, mean_of
from rpo.evals.settings import Eval, Limit, check_judged, check_subjects, check_words
from rpo.fields import Count, Share, group, read_row
from rpo.judging import verdicts
from rpo.judging.client import Reply, Request
from rpo.judging.prompts import transcript
from rpo.judging.verdicts import Shown
from rpo.stats import clustered_mean, with_errors

SIDES = ("chosen", "rejected")


@group
class Settings:
    kind: Literal["judge_check"]
    limit: Limit
    prompts: str | None
    repeats: Count


def check(cfg: Eval) -> None:
    """Labelled pairs, or what a judge said of them."""
    check_subjects(cfg, "annotations", "judge.model", optional=True)
    check_judged(cfg, "prompts")
    check_words(cfg)
    require(
        (cfg.annotations is None) != (cfg.data.eval is None),
        f"data.eval={cfg.data.eval}, annotations={cfg.annotations} with task=judge_check: judges labelled pairs "
        "(data.eval=FILE) or reads stored judgments, which hold their pairs (annotations); give one of them",
    )


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """Metrics of the judge (of each, from stored annotations): see `statistics`.

    Raises UserError for data without pairs and annotations of another form.
    """
    if cfg.annotations is not None:
        judgments, details = read(cfg.annotations, cfg.task.limit), {"annotations": cfg.annotations}
    else:
        pairs, report = labelled(cfg.data, cfg.task.limit)
        ctx.write_report(report)
        judgments, details = _judged(cfg, pairs, ctx.ask)
        details |= {"data": cfg.data.eval}
    judges = dict.fromkeys(one.model for one in judgments)
    by_judge = {model: [one for one in judgments if one.model == model] for model in judges}
    cells, notes = {}, []
    for model, own in by_judge.items():
        cells[model] = statistics(own)
        masses = [mass for one in own if (mass := one.details["letter_mass"]) is not None]
        notes += [f"{model}: {note}" for note in position_notes(cells[model], "swap_agreement")]
        notes += [f"{model}: {note}" for note in verdicts.mass_notes(masses, cfg.judge)]
    if cfg.annotations is None:
        notes += verdicts.judge_notes(details["judge"], details["verdict"])
    return Evaluation(cells, judgments, notes, details)


# ---- pairs


def labelled(data: EvalData, limit: int | None) -> tuple[list[tuple[str | Messages, str, str]], dict]:
    """The distinct (prompt, chosen, rejected) of data.eval, in any form that training reads, and what became of its rows.

    Raises UserError as training does: a malformed row (unless data.on_bad_row=drop), too many empty or equal answers.
    """
    pairs, dropped, read_per_file = {}, Tally(), []
    sources = open_sources(data.eval, data.revision)
    for file, source in enumerate(sources):
        read, uninformative = 0, 0
        for line, row in source.rows():
            read += 1
            try:
                pair = _pair(row)
            except RowError as error:
                if data.on_bad_row == "error":
                    raise UserError(f"{source.name}:{line}: {error} (or data.on_bad_row=drop)") from None
                dropped.add(error.kind, (file, line), str(error))
                continue
            if any(is_empty(answer) for answer in pair[1:]) or pair[1] == pair[2]:
                uninformative += 1
                dropped.add("uninformative", (file, line), "an answer is empty, or both are equal")
            elif (key := (answers.key_of(pair[0]), *pair[1:])) in pairs:
                dropped.add("repeated", (file, line), "the same pair came before")
            else:
                pairs[key] = pair
        check_file(source.name, read, uninformative)
        read_per_file.append(read)
    if not pairs:
        raise UserError(f"data.eval={data.eval}: none of {sum(read_per_file)} rows is left; change what drops them")
    report = {"files": [source.name for source in sources], "read": sum(read_per_file)}
    report |= {"read_per_file": read_per_file, "kept": len(pairs), "dropped": dropped.kinds}
    return list(pairs.values())[:limit], report


def _pair(row: Any) -> tuple[str | Messages, str, str]:
    if isinstance(row, RowError):
        raise row
    example = parse(row, pairs=True)
    if isinstance(example.prompt, list) and any(message["content"] is None for message in example.prompt):
        raise RowError("wrong_type", "field prompt: expected messages with text, found a bare tool call; drop the row")
    return example.prompt, _text(example.chosen), _text(example.rejected)


def _text(answer: str | Messages) -> str:
    if isinstance(answer, str):
        return answer
    if any(message["content"] is None for message in answer):
        raise RowError("wrong_type", "expected answers with text, found a bare tool call; drop the row")
    return answer[0]["content"] if len(answer) == 1 else transcript(answer)


# ---- judgments


def _judged(
    cfg: Eval, pairs: Sequence[tuple[str | Messages, str, str]], ask: Callable[[Sequence[Request]], list[Reply]]
) -> tuple[list[Item], dict]:
    """Every pair in both orders, task.repeats times, and details about the judge."""
    looks = [(*pair, side, repeat) for pair in pairs for repeat in range(cfg.task.repeats) for side in SIDES]
    shown = [
        Shown(prompt, *(both if side == "chosen" else both[::-1]), repeat) for prompt, *both, side, repeat in looks
    ]
    form, replies, details = verdicts.judged(shown, cfg.judge, cfg.task.prompts, ask)
    judgments = []
    for (prompt, chosen, rejected, side, repeat), reply in zip(looks, replies, strict=True):
        first, error = verdicts.first_score(form, vars(reply), cfg.judge.min_mass)
        score = first if first is None or side == "chosen" else 1 - first
        mass = verdicts.letter_mass(reply.top_logprobs) if form == "logprobs" else None
        look = _Details(chosen, rejected, side, repeat, score, mass)
        judgments.append(_item(cfg.judge.model, prompt, look, error, reply.text))
    return judgments, {"verdict": form, "judge": details}


@group
class _Details:
    """One look at a pair. `score` of the chosen answer: 1, .5, 0 or a probability; None: an error. `letter_mass` of a
    verdict by log-probs."""

    chosen: str
    rejected: str
    shown_first: Literal["chosen", "rejected"]
    repeat: int
    score: Share | None
    letter_mass: Share | None


def _item(judge: str, prompt: str | Messages, look: _Details, error: str | None, reply: str) -> Item:
    """The id begins with the pair's own digest: the same in every file that has it."""
    key = json.dumps([answers.key_of(prompt), look.chosen, look.rejected])
    pair = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Item(
        model=judge,
        id=f"{pair}:{look.shown_first}_first:{look.repeat}",
        cluster=answers.id_of(answers.key_of(prompt)),
        prompt=prompt,
        response=reply,
        scores={} if look.score is None else {"accuracy": float(_verdict(look.score))},
        error=error,
        details=asdict(look),
    )


def _pair_of(item: Item) -> str:
    return item.id.partition(":")[0]


def _verdict(score: float) -> float:
    """1 for the chosen answer, 0 for the other, half for neither."""
    return (score > 0.5) + 0.5 * (score == 0.5)


def read(spec: str | list[str], limit: int | None) -> list[Item]:
    """The judgments in samples.jsonl of one or more evaluations by this task, of the first `limit` pairs.

    Raises UserError: none, a line of another form, a judgment twice.
    """
    judgments, places = [], {}
    for place, row in rows_of(spec):
        one = _parse(row, place)
        check_new(places, (one.model, one.id), place, f"{one.model}'s judgment {one.id}")
        judgments.append(one)
    if not judgments:
        raise UserError(f"annotations={spec}: no judgments there; give samples.jsonl of an evaluation by this task")
    kept = set(list(dict.fromkeys(map(_pair_of, judgments)))[:limit])
    return [one for one in judgments if _pair_of(one) in kept]


@group
class _Sample:
    model: str
    response: str
    error: str | None
    details: dict


def _parse(row: Any, place: str) -> Item:
    sample = read_row(_Sample, row, place)
    look = read_row(_Details, sample.details, place)
    if (look.score is None) == (sample.error is None):
        raise UserError(f"{place}: expected either a score or an error; fix the row")
    try:
        return _item(sample.model, answers.prompt_of(row), look, sample.error, sample.response)
    except RowError as error:
        raise UserError(f"{place}: {error}") from None


# ---- statistics


def statistics(judgments: Sequence[Item]) -> dict[str, dict]:
    """One judge's cells by name, in shares, clustered by prompt. A verdict is the answer with more than half, or neither: a tie.

    accuracy                 share of judgments for the chosen answer, a tie half
    accuracy/chosen_longer   the same where the chosen answer has more characters; chosen_shorter: fewer
    swap_agreement           share of M where both orders have the same verdict
    stability                share of pairs of repeats with the same verdict, mean over K; absent without repeats
    first_position           mean score of the answer shown first, over M: .5 without a bias for a position
    longer_preferred         share of verdicts for the longer answer, over judgments of unequal lengths that are no tie
    longer_chosen            share of pairs of unequal lengths whose chosen answer is the longer: what the one above is for a
                             judge that is right. One that is blind to length lies between it and half
    letter_mass              of verdicts by log-probs: mean probability that the first token is one of the letters
    """

    def over(some: Callable[[Item], bool], value: str | Callable[[Item], float] = "accuracy") -> dict:
        return mean_of([one for one in judgments if some(one)], value)

    def grouped(key: Callable[[Item], tuple], value: Callable[[list[Item]], float]) -> dict:
        """The cell of `value` over groups of judgments with the same key; one failure fails its group."""
        members = defaultdict(list)
        for one in judgments:
            members[key(one)].append(one)
        groups = [group for group in members.values() if len(group) > 1]
        whole = [group for group in groups if not any(one.error for one in group)]
        cell = clustered_mean([value(group) for group in whole], [group[0].cluster for group in whole])
        return with_errors(cell, len(groups) - len(whole))

    def same(group: list[Item]) -> float:
        return float(np.mean([a.scores == b.scores for a, b in combinations(group, 2)]))

    def both_orders(one: Item) -> tuple:
        return _pair_of(one), one.details["repeat"]

    cells = {
        "accuracy": mean_of(judgments, "accuracy"),
        "accuracy/chosen_longer": over(lambda one: _longer(one) > 0),
        "accuracy/chosen_shorter": over(lambda one: _longer(one) < 0),
        "swap_agreement": grouped(both_orders, same),
    }
    if len({one.details["repeat"] for one in judgments}) > 1:
        cells["stability"] = grouped(lambda one: (_pair_of(one), one.details["shown_first"]), same)
    cells["first_position"] = grouped(both_orders, lambda group: float(np.mean(list(map(_of_first, group)))))
    cells["longer_preferred"] = over(
        lambda one: _longer(one) != 0 and one.scores.get("accuracy") != 0.5,
        lambda one: one.scores["accuracy"] if _longer(one) > 0 else 1 - one.scores["accuracy"],
    )
    pairs: dict[str, Item] = {}
    for one in judgments:
        pairs.setdefault(_pair_of(one), one)
    unequal = [one for one in pairs.values() if _longer(one)]
    chosen = clustered_mean([_longer(one) > 0 for one in unequal], [one.cluster for one in unequal])
    cells["longer_chosen"] = with_errors(chosen, 0)
    held = [one for one in judgments if one.details["letter_mass"] is not None]
    if held:
        mass = clustered_mean([one.details["letter_mass"] for one in held], [one.cluster for one in held])
        cells["letter_mass"] = with_errors(mass, 0)
    return cells


def _longer(one: Item) -> int:
    """By how many characters the chosen answer is the longer one."""
    return len(one.details["chosen"]) - len(one.details["rejected"])


def _of_first(one: Item) -> float:
    """The score of the answer shown first."""
    score = one.details["score"]
    return score if one.details["shown_first"] == "chosen" else 1 - score
