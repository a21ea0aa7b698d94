"""MT-Bench (arXiv 2306.05685): answers to 80 questions of two turns, rated from 1 to 10 or compared with a baseline's.

RUN/model_answer/MODEL.jsonl, RUN/model_judgment/JUDGE_{single,pair}.jsonl    what was answered and judged, in FastChat's
forms (`fastchat`). Everything is computed from rows of these forms, ours and stored ones alike; standard errors are
clustered by question. Letters: N judged items.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

from rpo import dist
from rpo.data import answers
from rpo.errors import UserError, require
from rpo.evals.context import Context
from rpo.evals.judged import both_sides, of_orders, position_notes, rates
from rpo.evals.results import Cells, Evaluation, Item, mean_of
from rpo.evals.settings import Eval, Limit, answerers, check_judged, check_subjects, listed
from rpo.fields import Count, group
from rpo.judging import judge, mt_bench_files, verdicts
from rpo.judging.client import Reply, Request
from rpo.judging.mt_bench_files import ModelAnswers, Question
from rpo.judging.prompts import OURS, Kind, Template, filled, load
from rpo.text import redacted

# Of the answers, as in FastChat's gen_model_answer; of other categories OTHER.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
OTHER = 0.7
WITH_REFERENCE = ("math", "reasoning", "coding")
_SHOWN = ("model_1", "model_2"), ("model_2", "model_1")  # in games 1 and 2
_SCORES = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5, "error": None}  # of model_1
_UNPARSED, _UNANSWERED = "no verdict in the judge's reply", "the judge gave no reply"


@group
class Settings:
    kind: Literal["mt_bench"]
    mode: Literal["single", "pairwise"]
    questions: str | None
    references: str | None
    prompts: str | None
    limit: Limit
    max_new_tokens: Count
    batch_size: Count


def check(cfg: Eval) -> None:
    """Questions to go with answers, a baseline to go with pairs, verdicts in words."""
    task, stored = cfg.task, cfg.annotations is not None
    check_subjects(cfg, "model.path", "outputs", "annotations", "baseline", "judge.model")
    check_judged(cfg, "prompts", "references")
    require(stored or task.questions is not None, "task.questions=null: give FastChat's question.jsonl")
    require(
        stored or (cfg.baseline is not None) == (task.mode == "pairwise"),
        f"task.mode={task.mode}, baseline={cfg.baseline} with task=mt_bench: mode pairwise compares with a baseline's answers "
        "(baseline=FILE), single reads none; give both or neither",
    )
    require(not stored or cfg.baseline is None, f"baseline={cfg.baseline} with annotations: leave it out")
    require(cfg.judge.verdict != "logprobs", "judge.verdict=logprobs: MT-Bench's verdicts are words; set it to auto")


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """Scores by turn and category (mode single), or win rates of both models of each pair (pairwise).

    Raises UserError for files that do not belong together.
    """
    asked = mt_bench_files.questions(cfg.task.questions) if cfg.task.questions is not None else None
    return _of_stored(cfg, asked) if cfg.annotations is not None else _of_answers(cfg, asked, ctx)


def _of_stored(cfg: Eval, asked: Sequence[Question] | None) -> Evaluation:
    kind, rows = mt_bench_files.judgments(cfg.annotations)
    categories = _categories(asked, rows, cfg)
    kept = list(dict.fromkeys(row["question_id"] for row in rows))[: cfg.task.limit]
    rows = [row for row in rows if row["question_id"] in kept]
    details = {"kind": kind, "annotations": cfg.annotations, "judges": _judges(rows), "reread": _reread(rows)}
    return replace(of_judgments(kind, rows, categories), details=details)


def _of_answers(cfg: Eval, asked: Sequence[Question], ctx: Context) -> Evaluation:
    kind = "pair" if cfg.task.mode == "pairwise" else "single"
    questions = {question.question_id: question for question in asked[: cfg.task.limit]}
    prompts = cfg.task.prompts
    templates = OURS if prompts is None else load(prompts, kind)
    references = _references(cfg, list(questions.values()))
    known, details = _answers(cfg, asked, ctx)
    rows, requests = _asked(cfg.judge.model, kind, list(questions.values()), known, references, templates)
    replies = ctx.ask(requests)
    verdicts.announce("text", cfg.judge)
    games, fill = (1, _rating_of) if kind == "single" else (2, _games_of)  # of a row
    rows = [row | fill(*own) for row, *own in zip(rows, *(replies[i::games] for i in range(games)), strict=True)]
    name = f"{mt_bench_files.file_name(cfg.judge.model)}_{kind}.jsonl"
    ctx.begin()
    dist.on_main(mt_bench_files.write, ctx.run_dir / "model_judgment" / name, rows)
    evaluation = of_judgments(kind, rows, {number: question.category for number, question in questions.items()})
    empty = {one.model: sum(not turn.strip() for number in questions for turn in one.turns[number]) for one in known}
    details |= {"kind": kind, "judge": judge.facts(requests, replies, cfg.judge), "empty_answers": empty}
    notes = evaluation.notes + judge.notes(details["judge"])
    notes += answers.empty_notes(empty, mt_bench_files.TURNS * len(questions))
    return Evaluation(evaluation.models, _with_texts(evaluation.items, questions, known), notes, details)


# ---- stored judgments


def _categories(asked: Sequence[Question] | None, rows: Sequence[dict], cfg: Eval) -> dict[int, str]:
    """The category of every question that was judged: the questions file's, else by MT-Bench's own numbers."""
    numbers = list(dict.fromkeys(row["question_id"] for row in rows))
    known = {number: mt_bench_files.category_of(number) for number in numbers}
    if asked is not None:
        known = {question.question_id: question.category for question in asked}
    if unknown := [number for number in numbers if known.get(number) is None]:
        reason = "it is not MT-Bench's (81 to 160)" if asked is None else f"it is not in {cfg.task.questions}"
        raise UserError(
            f"annotations={cfg.annotations}: question {unknown[0]} ({len(unknown)} such): {reason}; give the file of these "
            "questions as task.questions"
        )
    return known


def _judges(rows: Sequence[dict]) -> list[str]:
    """Who judged, as the rows say it: [name, prompt], or a name."""
    judges = [row.get("judge") for row in rows]
    return sorted({str(one[0]) if isinstance(one, list) and one else str(one) for one in judges})


def _reread(rows: Sequence[dict]) -> dict[str, int]:
    """How many stored judgments our own parsers read, and how many of them otherwise than the file says.

    Rows with our own reason for an error are left out: what was said there was not all that counted.
    """
    pairs = []  # what the file says, what its text says to us
    for row in [row for row in rows if "error" not in row]:
        if isinstance(text := row.get("judgment"), str) and "score" in row:
            pairs.append((row["score"], verdicts.rating(text) or -1))
        for game, (a, b) in enumerate(_SHOWN, start=1):
            if isinstance(text := row.get(f"g{game}_judgment"), str):
                ours = {"A": a, "B": b, "C": "tie", None: "error"}[verdicts.pair_letter(text)]
                pairs.append((row[f"g{game}_winner"], ours))
    return {"judgments": len(pairs), "differ": sum(stored != ours for stored, ours in pairs)}


# ---- answers


def _answers(cfg: Eval, asked: Sequence[Question], ctx: Context) -> tuple[list[ModelAnswers], dict]:
    """The answers of all models, the baseline's last where there is one, and details."""
    known, cut = [mt_bench_files.answers(file) for file in listed(cfg.outputs) + listed(cfg.baseline)], {}
    for one in known:
        _check_covers(one, asked, cfg)
    if cfg.outputs is None:
        generated = [_generated(cfg, asked[: cfg.task.limit], path, ctx) for path in answerers(cfg)]
        known = [one for one, _ in generated] + known
        cut = {"cut_answers": {one.model: count for one, count in generated}}
    for i, one in enumerate(known):
        if one.model in [other.model for other in known[:i]]:
            raise UserError(f"{one.file}: answers of {one.model}, as are those of another file; give each model once")
    return known, {"outputs": [one.file for one in known], "questions": cfg.task.questions} | cut


def _check_covers(one: ModelAnswers, asked: Sequence[Question], cfg: Eval) -> None:
    """Raises UserError where the answers are to other questions, or not to all."""
    numbers = [question.question_id for question in asked]
    if unknown := [number for number in one.turns if number not in numbers]:
        raise UserError(
            f"{one.file}: {len(unknown)} of {len(one.turns)} answers are to questions that {cfg.task.questions} does "
            f"not have, such as {unknown[0]}; give the questions that were answered"
        )
    numbers = numbers[: cfg.task.limit]
    if lacking := [number for number in numbers if number not in one.turns]:
        raise UserError(
            f"{one.file}: lacks answers to {len(lacking)} of {len(numbers)} questions, such as {lacking[0]}; answer them "
            "too, or set task.limit"
        )


def _generated(cfg: Eval, questions: Sequence[Question], path: str, ctx: Context) -> tuple[ModelAnswers, int]:
    """A model's answers, the second turn's after its own first, and how many were cut at task.max_new_tokens."""
    from rpo.model.sampling import Sampling

    temperatures = [TEMPERATURES.get(question.category, OTHER) for question in questions]
    samplings = [Sampling(temperature, 1.0, 0, cfg.task.max_new_tokens) for temperature in temperatures]
    conversations = [[{"role": "user", "content": question.turns[0]}] for question in questions]
    first = ctx.answer(path, conversations, samplings)
    conversations = [
        [*asked, {"role": "assistant", "content": own.text}, {"role": "user", "content": question.turns[1]}]
        for asked, own, question in zip(conversations, first, questions, strict=True)
    ]
    second = ctx.answer(path, conversations, samplings)
    turns = {q.question_id: [a.text, b.text] for q, a, b in zip(questions, first, second, strict=True)}
    file = dist.on_main(mt_bench_files.write_answers, ctx.run_dir / "model_answer", redacted(path), turns)
    return ModelAnswers(redacted(path), str(file), turns), sum(not own.ended for own in (*first, *second))


# ---- the judge


def _references(cfg: Eval, questions: Sequence[Question]) -> dict[int, list[str]]:
    """The reference answers by question, where they are given and the category wants one; UserError where one is missing."""
    if cfg.task.references is None:
        return {}
    known = mt_bench_files.answers(cfg.task.references).turns
    wanting = [question for question in questions if question.category in WITH_REFERENCE]
    for question in wanting:
        if question.question_id not in known:
            raise UserError(
                f"task.references={cfg.task.references}: has no answer to question {question.question_id} ({question.category}); "
                "add it, or give no references"
            )
    return {question.question_id: known[question.question_id] for question in wanting}


def _asked(
    judge_name: str,
    kind: str,
    questions: Sequence[Question],
    known: Sequence[ModelAnswers],
    references: Mapping[int, list[str]],
    templates: Mapping[Kind, Template],
) -> tuple[list[dict], list[Request]]:
    """(rows of FastChat's form but for what the judge says, the requests: one a row, of a pair two)."""
    rows, requests = [], []
    models = known if kind == "single" else known[:-1]
    for one, turn, question in product(models, range(1, mt_bench_files.TURNS + 1), questions):
        turns, own = question.turns[:turn], one.turns[question.question_id][:turn]
        refs = references[question.question_id][:turn] if question.question_id in references else None
        template = templates[kind, refs is not None, turn]
        row = {"question_id": question.question_id, "turn": turn, "judge": [judge_name, template.name]}
        if kind == "single":
            asked = [filled(template, turns, [own], refs)]
            row |= {"model": one.model, "user_prompt": asked[0][1]["content"]}
        else:
            other = known[-1].turns[question.question_id][:turn]
            asked = [filled(template, turns, both, refs) for both in ((own, other), (other, own))]
            row |= {"model_1": one.model, "model_2": known[-1].model}
            row |= {f"g{game}_user_prompt": asked[game - 1][1]["content"] for game in (1, 2)}
        rows.append(row)
        requests += [Request(messages) for messages in asked]
    return rows, requests


def _rating_of(reply: Reply) -> dict:
    """The fields of a single judgment that the reply fills."""
    score, why = verdicts.rating(reply.text), reply.error
    if cut := verdicts.why_cut(reply.finish_reason):  # a number so far may be one that the judge only quotes
        score, why = None, cut
    if reply.error is None and score is not None:
        return {"judgment": reply.text, "score": score}
    return {"judgment": _text(reply), "score": -1, "error": why or "no rating from 1 to 10 in the judge's reply"}


def _games_of(*replies: Reply) -> dict:
    """The fields of a pairwise judgment that the replies to both orders fill."""
    fields, reasons = {}, []
    for game, (reply, (a, b)) in enumerate(zip(replies, _SHOWN, strict=True), start=1):
        score, why = verdicts.first_score("text", vars(reply))
        winner = {1.0: a, 0.0: b, 0.5: "tie", None: "error"}[score]
        fields |= {f"g{game}_winner": winner, f"g{game}_judgment": _text(reply)}
        reasons += [why] * (why is not None)
    return fields | ({"error": reasons[0]} if reasons else {})


def _text(reply: Reply) -> str:
    return reply.text if reply.error is None else mt_bench_files.FAILED


# ---- statistics


def of_judgments(kind: str, rows: Sequence[dict], categories: Mapping[int, str]) -> Evaluation:
    """Metrics of every model that the rows judge, and an item per model, question and turn (of a pair two).

    single: score, the mean rating. pair: those of `rates`; a win is one in both orders, all else but two losses is a tie
    (FastChat's adjusted win rate). Either also as NAME/turn_1, NAME/turn_2 and NAME/CATEGORY. Where a model meets several
    others, every pair has win_rate/against/OTHER on both sides, and that model has no rate over all: it would be as good as
    those it happened to meet.
    """
    items, several = _apart([item for row in rows for item in _items(kind, row, categories)])
    models = list(dict.fromkeys(item.model for item in items))
    of_model = {model: [item for item in items if item.model == model] for model in models}
    cells = {model: _metrics(kind, own, model in several, bool(several)) for model, own in of_model.items()}
    notes = [
        f"{model}: met {several[model]} models, so it has a rate against each and none over all" for model in several
    ]
    if kind == "pair":
        notes += position_notes(of_orders(items), "order_consistency")
    return Evaluation(cells, items, notes)


def _metrics(kind: str, items: Sequence[Item], met_several: bool, by_opponent: bool) -> Cells:
    """The cells of the one model whose items these are."""
    name = "score" if kind == "single" else "win_rate"
    in_order = sorted(items, key=lambda item: item.details["question"])

    def by(of: Callable[[Item], object], label: str) -> Cells:
        parts = dict.fromkeys(map(of, in_order))
        return {f"{name}/{label}{part}": mean_of([item for item in items if of(item) == part], name) for part in parts}

    metrics = {}
    if not met_several:
        metrics = rates(items) if kind == "pair" else {name: mean_of(items, name)}
    metrics |= of_orders(items) if kind == "pair" else {}
    if not met_several:
        metrics |= by(lambda item: item.details["turn"], "turn_") | by(lambda item: item.details["category"], "")
    return metrics | (by(lambda item: item.opponent, "against/") if by_opponent else {})


def _items(kind: str, row: dict, categories: Mapping[int, str]) -> list[Item]:
    """What a row says of the one model, or of either of the two."""
    number, turn = row["question_id"], row["turn"]
    id, cluster = f"{number}:{turn}", str(number)
    about = {"question": number, "turn": turn, "category": categories[number]}
    if kind == "single":
        failed = row["score"] == -1
        error = row.get("error") or (_UNANSWERED if row.get("judgment") == mt_bench_files.FAILED else _UNPARSED)
        return [
            Item(
                model=row["model"],
                id=id,
                cluster=cluster,
                scores={} if failed else {"score": float(row["score"])},
                error=error if failed else None,
                details=about | {"judgment": row.get("judgment")},
            )
        ]
    unanswered = mt_bench_files.FAILED in (row.get("g1_judgment"), row.get("g2_judgment"))
    return both_sides(
        (row["model_1"], row["model_2"]),
        [_SCORES[row["g1_winner"]], _SCORES[row["g2_winner"]]],
        replies=[row.get("g1_judgment"), row.get("g2_judgment")],
        error=row.get("error") or (_UNANSWERED if unanswered else _UNPARSED),
        details=about,
        id=id,
        cluster=cluster,
    )


def _apart(items: Sequence[Item]) -> tuple[list[Item], dict[str, int]]:
    """(the items, with the opponent in the ids of models that meet several; those models, with how many they meet)."""
    met: dict[str, set[str | None]] = {}
    for item in items:
        met.setdefault(item.model, set()).add(item.opponent)
    several = {model: len(others) for model, others in met.items() if len(others) > 1}
    renamed = [replace(item, id=f"{item.id}:{item.opponent}") if item.model in several else item for item in items]
    return renamed, several


def _with_texts(items: Sequence[Item], questions: Mapping[int, Question], known: Sequence[ModelAnswers]) -> list[Item]:
    """The items with question and answers."""
    turns, complete = {one.model: one.turns for one in known}, []
    for item in items:
        number, turn = item.details["question"], item.details["turn"] - 1
        against = item.against and item.against | {"response": turns[item.opponent][number][turn]}
        response = turns[item.model][number][turn]
        complete.append(replace(item, prompt=questions[number].turns[turn], response=response, against=against))
    return complete
