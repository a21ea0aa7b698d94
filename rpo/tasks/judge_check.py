"""Can a judge be trusted? Pairs whose better answer is known, judged in both orders, several times.

RUN/samples.jsonl holds all that it takes, an object per judgment; annotations= reads it again. Letters: N judgments,
M = (pair, repeat) with both orders, K = (pair, order) with all repeats.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from rpo.config import Count, EvalData, group
from rpo.data import answers
from rpo.data.formats import Messages, RowError, is_empty, parse
from rpo.data.sources import Tally, check_file, open_sources
from rpo.errors import UserError, require
from rpo.evals import results
from rpo.evals.context import Context
from rpo.evals.results import Evaluation, Item
from rpo.evals.settings import Eval, Limit, check_judged, check_subjects, check_words
from rpo.judging import verdicts
from rpo.judging.client import Reply, Request
from rpo.judging.prompts import transcript
from rpo.judging.verdicts import Shown, cell, position_notes

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
    of_judge = defaultdict(list)
    for one in judgments:
        of_judge[one.model].append(one)
    cells = {model: statistics(some) for model, some in of_judge.items()}
    notes = [f"{model}: {note}" for model in cells for note in position_notes(cells[model], "swap_agreement")]
    return Evaluation(cells, [_item(one) for one in judgments], notes, details)


table = results.table


@dataclass(frozen=True)
class Judgment:
    """One look of `model`, the judge, at one pair. `score` of the chosen answer: 1, .5, 0 or a probability; None: `error`."""

    model: str
    prompt: str | Messages
    chosen: str
    rejected: str
    shown_first: str  # chosen or rejected
    repeat: int
    score: float | None
    error: str | None
    reply: str

    @property
    def pair(self) -> str:
        """The pair's own digest: the same in every file that has it."""
        key = json.dumps([answers.key_of(self.prompt), self.chosen, self.rejected])
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    @property
    def id(self) -> str:
        return f"{self.pair}:{self.shown_first}_first:{self.repeat}"


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
) -> tuple[list[Judgment], dict]:
    """Every pair in both orders, task.repeats times, and details about the judge."""
    looks = [(pair, side, repeat) for pair in pairs for repeat in range(cfg.task.repeats) for side in SIDES]
    shown = [
        Shown(prompt, chosen, rejected, repeat) if side == "chosen" else Shown(prompt, rejected, chosen, repeat)
        for (prompt, chosen, rejected), side, repeat in looks
    ]
    form, replies, details = verdicts.judged(shown, cfg.judge, cfg.task.prompts, ask)
    judgments = []
    for (pair, side, repeat), reply in zip(looks, replies, strict=True):
        first, error = verdicts.first_score(form, vars(reply))
        score = first if first is None or side == "chosen" else 1 - first
        judgments.append(Judgment(cfg.judge.model, *pair, side, repeat, score, error, reply.text))
    return judgments, {"verdict": form, "judge": details}


_DETAILS = ("chosen", "rejected", "shown_first", "repeat", "score")  # of an item


def _item(one: Judgment) -> Item:
    return Item(
        model=one.model,
        id=one.id,
        cluster=answers.id_of(answers.key_of(one.prompt)),
        prompt=one.prompt,
        response=one.reply,
        scores={} if one.score is None else {"accuracy": float(_verdict(one.score))},
        error=one.error,
        details={name: getattr(one, name) for name in _DETAILS},
    )


def _verdict(score: float) -> float:
    """1 for the chosen answer, 0 for the other, half for neither."""
    return (score > 0.5) + 0.5 * (score == 0.5)


def read(spec: str | list[str], limit: int | None) -> list[Judgment]:
    """The judgments in samples.jsonl of one or more evaluations by this task, of the first `limit` pairs.

    Raises UserError: none, a line of another form, a judgment twice.
    """
    found: dict[tuple[str, str], tuple[Judgment, str]] = {}
    for source in open_sources(spec, None):
        for number, row in source.rows():
            where = f"{source.name}:{number}"
            one = _parse(row, where)
            if (one.model, one.id) in found:
                raise UserError(
                    f"{where}: {one.model}'s judgment {one.id} is there already ({found[one.model, one.id][1]}); keep "
                    "one of them"
                )
            found[one.model, one.id] = one, where
    if not found:
        raise UserError(f"annotations={spec}: no judgments there; give samples.jsonl of an evaluation by this task")
    judgments = [one for one, _ in found.values()]
    kept = set(list(dict.fromkeys(one.pair for one in judgments))[:limit])
    return [one for one in judgments if one.pair in kept]


def _parse(row: Any, where: str) -> Judgment:
    if isinstance(row, RowError):
        raise UserError(f"{where}: {row}")
    row = row if isinstance(row, dict) else {}
    details = row["details"] if isinstance(row.get("details"), dict) else {}
    fields = {name: row.get(name) for name in ("model", "error")} | {name: details.get(name) for name in _DETAILS}
    fields["reply"] = row.get("response")
    score, texts = fields["score"], ("model", "chosen", "rejected", "reply")
    is_score = type(score) in (int, float) and math.isfinite(score) and 0 <= score <= 1
    well_formed = (
        all(isinstance(fields[name], str) for name in texts)
        and fields["shown_first"] in SIDES
        and type(fields["repeat"]) is int
        and (is_score and fields["error"] is None or score is None and isinstance(fields["error"], str))
    )
    if not well_formed:
        raise UserError(f"{where}: is no judgment of task=judge_check; give samples.jsonl of an evaluation by it")
    try:
        return Judgment(**fields | {"prompt": answers.prompt_of(row)})
    except RowError as error:
        raise UserError(f"{where}: {error}") from None


# ---- statistics


def statistics(judgments: Sequence[Judgment]) -> dict[str, dict]:
    """One judge's cells by name, in shares, clustered by prompt. A verdict is the answer with more than half, or neither: a tie.

    accuracy                 share of judgments for the chosen answer, a tie half
    accuracy/chosen_longer   the same where the chosen answer has more characters; chosen_shorter: fewer
    swap_agreement           share of M where both orders have the same verdict
    stability                share of pairs of repeats with the same verdict, mean over K; absent without repeats
    first_position           mean score of the answer shown first, over M: .5 without a bias for a position
    longer_preferred         share of verdicts for the longer answer, over judgments of unequal lengths that are no tie
    longer_chosen            share of pairs of unequal lengths whose chosen answer is the longer: what the one above is for a
                             judge that is right. One that is blind to length lies between it and half
    """
    ids_N = np.array([answers.id_of(answers.key_of(one.prompt)) for one in judgments])
    score_N = np.array([np.nan if one.score is None else one.score for one in judgments])
    failed_N = np.isnan(score_N)
    verdict_N = np.where(failed_N, np.nan, _verdict(score_N))
    longer_N = np.sign([len(one.chosen) - len(one.rejected) for one in judgments])
    first_N = np.where([one.shown_first == "chosen" for one in judgments], score_N, 1 - score_N)

    def over(values_N: np.ndarray, some_N: np.ndarray) -> dict:
        return cell(values_N[some_N], ids_N[some_N], failed_N[some_N])

    def grouped(key: Callable[[Judgment], tuple], value: Callable[[list[int]], float]) -> dict:
        """The cell of `value` over groups of judgments with the same key; one failure fails its group."""
        members = defaultdict(list)
        for i, one in enumerate(judgments):
            members[key(one)].append(i)
        groups = [group for group in members.values() if len(group) > 1]
        failed = np.array([bool(failed_N[group].any()) for group in groups], dtype=bool)
        values = np.array([np.nan if bad else value(group) for group, bad in zip(groups, failed, strict=True)])
        return cell(values, [ids_N[group[0]] for group in groups], failed)

    def same(group: list[int]) -> float:
        return float(np.mean([verdict_N[i] == verdict_N[j] for i, j in combinations(group, 2)]))

    both_orders = {"key": lambda one: (one.pair, one.repeat)}
    cells = {
        "accuracy": cell(verdict_N, ids_N, failed_N),
        "accuracy/chosen_longer": over(verdict_N, longer_N > 0),
        "accuracy/chosen_shorter": over(verdict_N, longer_N < 0),
        "swap_agreement": grouped(**both_orders, value=same),
    }
    if len({one.repeat for one in judgments}) > 1:
        cells["stability"] = grouped(key=lambda one: (one.pair, one.shown_first), value=same)
    cells["first_position"] = grouped(**both_orders, value=lambda group: float(first_N[group].mean()))
    of_longer_N = np.where(longer_N > 0, verdict_N, 1 - verdict_N)
    cells["longer_preferred"] = over(of_longer_N, (longer_N != 0) & (verdict_N != 0.5))
    first_of_pair = {one.pair: i for i, one in reversed(list(enumerate(judgments)))}
    unequal = [i for i in sorted(first_of_pair.values()) if longer_N[i] != 0]
    cells["longer_chosen"] = cell(longer_N[unequal] > 0, ids_N[unequal], np.zeros(len(unequal), dtype=bool))
    return cells
