"""Which of two models' answers does a judge prefer? Every pair is judged in both orders.

RUN/outputs_1.jsonl, outputs_2.jsonl    the answers, where models made them; outputs= reads them
RUN/annotations.jsonl                   all that the judge said, one object per prompt; annotations= reads it

A tie is half a win, and so is a prompt on which the orders disagree (`verdicts.two_orders`). Equal answers are a tie that
nobody is asked about. Letters: N prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np

from rpo import dist
from rpo.data import answers as data_answers
from rpo.data.answers import Output, Outputs
from rpo.data.formats import RowError
from rpo.data.sources import check_new, rows_of
from rpo.errors import UserError, require
from rpo.evals.context import Context, sampling_of
from rpo.evals.judged import both_sides, of_masses, of_orders, position_notes, rates
from rpo.evals.results import Evaluation, Item, mean_of
from rpo.evals.settings import Answers, Draws, Eval, answerers, check_judged, check_subjects, check_words, listed
from rpo.fields import Field, group, read_row
from rpo.files import to_lines, write_atomic
from rpo.judging import verdicts
from rpo.judging.length_control import length_controlled
from rpo.judging.prompts import load
from rpo.judging.settings import Judge
from rpo.judging.verdicts import Shown
from rpo.stats import clustered_mean, sign_test, with_errors
from rpo.text import redacted

_SAID = ("text", "top_logprobs", "finish_reason", "error")


@group
class Settings(Answers):
    kind: Literal["winrate"]
    prompts: str | None
    bootstrap: Draws


def check(cfg: Eval) -> None:
    """Two models' answers, and one way to have them judged."""
    check_subjects(cfg, "model.path", "outputs", "annotations", "baseline", "judge.model")
    check_judged(cfg, "prompts")
    check_words(cfg)
    asked = "server.model" if cfg.server.model else "model.path"
    for key, value in {"outputs": cfg.outputs, asked: answerers(cfg) or None}.items():
        count = len(listed(value)) + (cfg.baseline is not None and key == "outputs")
        require(
            value is None or count == 2 or (key == "outputs" and count == 1),
            f"{key}={value}, baseline={cfg.baseline} with task=winrate: expected two models: {key}=[A,B]"
            + (", outputs=A baseline=B, or outputs=FILE with the answers of both" if key == "outputs" else ""),
        )
    require(cfg.outputs is not None or cfg.baseline is None, f"baseline={cfg.baseline}: goes with outputs=FILE alone")
    require(not answerers(cfg) or cfg.data.eval is not None, "data.eval=null: give the prompts to be answered")


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """Win rates of both models with what they have to be read with: ties, order, position, lengths.

    Raises UserError for files that cannot be paired.
    """
    if cfg.annotations is not None:
        judged = read(cfg.annotations)[: cfg.task.limit]
        details = {"annotations": cfg.annotations, "judges": sorted({one.judge for one in judged if one.judge})}
    else:
        if cfg.task.prompts is not None:  # a bad file is to be found before models answer
            load(cfg.task.prompts, "pair")
        pairs, names, details = _answers(cfg, ctx)
        judged, of_judge = _judged(cfg, pairs, names, ctx.ask)
        details |= {"judge": of_judge}
        ctx.begin()
        dist.on_main(write_atomic, ctx.run_dir / "annotations.jsonl", to_lines(map(vars, judged)))
    evaluation = summarise(judged, cfg.judge, seed=cfg.seed, bootstrap=cfg.task.bootstrap)
    notes = evaluation.notes
    if cfg.annotations is None:
        notes = notes + verdicts.judge_notes(details["judge"], evaluation.details["verdict"])
    return replace(evaluation, notes=notes, details=details | evaluation.details)


_Two = Annotated[list[str], Field(min_length=2, max_length=2, description="two texts")]


@group
class Judged:
    """One prompt: both models' answers, and what the judge said with the first model's shown first, then second.

    `said` are two objects with text, top_logprobs, finish_reason and error; None: equal answers. `judge` is the name that
    was asked.
    """

    prompt: Any  # text or messages
    models: _Two
    answers: _Two
    verdict: Literal["text", "logprobs"]
    said: Annotated[list[dict], Field(min_length=2, max_length=2, description="two replies")] | None
    judge: str | None

    @property
    def id(self) -> str:
        return data_answers.id_of(data_answers.key_of(self.prompt))


# ---- answers


def _answers(cfg: Eval, ctx: Context) -> tuple[list[tuple[Output, Output]], tuple[str, str], dict]:
    """(answers to the same prompts, names of the two models, details)."""
    if cfg.outputs is None:
        return _generated(cfg, ctx)
    files = listed(cfg.outputs) + listed(cfg.baseline)
    both = data_answers.read_models(files[0]) if len(files) == 1 else [data_answers.read(file) for file in files]
    if len(both) != 2:
        raise UserError(f"outputs={cfg.outputs}: holds answers of {len(both)} models; expected answers of two")
    names = (both[0].name, both[1].name)
    if names[0] == names[1]:  # two decodings of one model, or files that do not say whose they are
        names = (redacted(both[0].file), redacted(both[1].file))
    if names[0] == names[1]:
        raise UserError(f"outputs={cfg.outputs}, baseline={cfg.baseline}: one file twice; give answers of two models")
    return data_answers.aligned(*both, cfg.task.limit), names, {"outputs": [both[0].file, both[1].file]}


def _generated(cfg: Eval, ctx: Context) -> tuple[list[tuple[Output, Output]], tuple[str, str], dict]:
    prompts, report = data_answers.prompts(cfg.data.eval, cfg.data.revision, cfg.data.on_bad_row)
    prompts = prompts[: cfg.task.limit]
    both, names, cut = [], tuple(map(redacted, answerers(cfg))), {}
    for number, (path, name) in enumerate(zip(answerers(cfg), names, strict=True), start=1):
        answers = ctx.answer(path, prompts, sampling_of(cfg.task))
        rows = [Output(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]
        file = ctx.run_dir / f"outputs_{number}.jsonl"
        dist.on_main(data_answers.write, file, name, rows)
        both.append(Outputs(name, str(file), rows))
        cut[name] = sum(not answer.ended for answer in answers)
    details = {"data": {"eval": cfg.data.eval} | report, "outputs": [one.file for one in both], "cut_answers": cut}
    return data_answers.aligned(*both), names, details


# ---- the judge


def _judged(
    cfg: Eval, pairs: Sequence[tuple[Output, Output]], names: tuple[str, str], ask: Callable
) -> tuple[list[Judged], dict]:
    """Every pair with what the judge said of it, and details about the judge."""
    differ = [(a, b) for a, b in pairs if a.text != b.text]
    shown = [Shown(a.prompt, *texts) for a, b in differ for texts in ((a.text, b.text), (b.text, a.text))]
    verdict, replies, details = verdicts.judged(shown, cfg.judge, cfg.task.prompts, ask)
    said = iter([{field: getattr(reply, field) for field in _SAID} for reply in replies])
    judged = []
    for a, b in pairs:
        both = None if a.text == b.text else [next(said), next(said)]
        judged.append(Judged(a.prompt, list(names), [a.text, b.text], verdict, both, cfg.judge.model))
    return judged, details


# ---- stored annotations


def read(spec: str | list[str]) -> list[Judged]:
    """The annotations of one or more files. Raises UserError: none, of another kind, of other models, a prompt twice."""
    judged, places = [], {}
    for place, row in rows_of(spec):
        one = _parse(row, place)
        if judged and (one.models, one.verdict) != (judged[0].models, judged[0].verdict):
            raise UserError(
                f"{place}: of {' and '.join(one.models)} by {one.verdict}, expected {' and '.join(judged[0].models)} by "
                f"{judged[0].verdict} as before it; give annotations of one pair of models"
            )
        check_new(places, one.id, place, f"the prompt {data_answers.excerpt(data_answers.key_of(one.prompt))}")
        judged.append(one)
    if not judged:
        raise UserError(f"annotations={spec}: no annotations there; give an annotations.jsonl of task=winrate")
    return judged


@group
class _Reply:
    text: str
    top_logprobs: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None
    finish_reason: Any
    error: str | None


def _parse(row: Any, place: str) -> Judged:
    fields = row if isinstance(row, dict) else {}
    for field, task in {"g1_winner": "mt_bench", "score": "mt_bench", "preference": "alpaca_eval"}.items():
        if field in fields:
            raise UserError(f"{place}: has {field}, as judgments for task={task} have; evaluate it by that task")
    read = read_row(Judged, row, place)
    replies = read.said and [vars(read_row(_Reply, reply, f"{place}: said")) for reply in read.said]
    whole = read.answers[0] == read.answers[1] if replies is None else all(set(_SAID) <= set(one) for one in read.said)
    if read.models[0] == read.models[1] or not whole:
        raise UserError(f"{place}: expected two models, and whole replies where their answers differ; fix the row")
    try:
        return replace(read, prompt=data_answers.prompt_of(row), said=replies)
    except RowError as error:
        raise UserError(f"{place}: {error}") from None


# ---- statistics


def summarise(judged: Sequence[Judged], judge: Judge, *, seed: int, bootstrap: int) -> Evaluation:
    """Metrics of both models, two items per prompt (one per model), and the sign test; of `judge` the least mass counts.

    Those of `rates`, with items clustered by prompt (of the orders: where answers differ), and
    win_rate/length_controlled  share as it would be at equal lengths: the minimal form of `length_control`
    longer_wins                 mean score of the longer answer, where lengths differ
    length                      mean characters of the model's answers
    letter_mass                 of verdicts by log-probs: probability that the first token is one of the letters

    A prompt whose judgment failed in either order has no score: it is in n_error, and in no mean but that of lengths.
    """
    models, sides = judged[0].models, [_sides(one, judge.min_mass) for one in judged]
    items = {model: [both[m] for both in sides] for m, model in enumerate(models)}
    firsts = items[models[0]]
    score_N = np.array([item.scores.get("win_rate", np.nan) for item in firsts])
    gap_N = np.array([_gap(item) for item in firsts])
    mass, masses = of_masses(firsts)
    orders = of_orders(firsts) | mass
    controlled, _ = length_controlled(score_N, -gap_N, draws=bootstrap, seed=seed)
    controlled = with_errors(_share(controlled), int(np.isnan(score_N).sum()))
    metrics, empty = {}, {}
    for model, own in items.items():
        own_rates = rates(own)
        metrics[model] = {"win_rate": own_rates.pop("win_rate")}
        metrics[model]["win_rate/length_controlled"] = controlled if own is firsts else _opposite(controlled)
        metrics[model] |= own_rates | orders
        metrics[model]["longer_wins"] = mean_of([item for item in firsts if _gap(item)], _longer_wins)
        lengths = clustered_mean([len(item.response) for item in own], [item.cluster for item in own])
        metrics[model]["length"] = with_errors(lengths, 0)
        empty[model] = sum(not item.response.strip() for item in own)
    wins, losses = int((score_N > 0.5).sum()), int((score_N < 0.5).sum())
    even, num_equal = int((score_N == 0.5).sum()), sum(one.answers[0] == one.answers[1] for one in judged)
    p = sign_test(wins, losses)
    notes = [f"sign test: {models[0]} won {wins} and lost {losses} of {len(judged)} prompts, p {p:.2g}"]
    notes += position_notes(orders, "order_consistency") + data_answers.empty_notes(empty, len(judged))
    notes += verdicts.mass_notes(masses, judge)
    if num_equal:
        notes.append(f"{num_equal} of {len(judged)} pairs of answers are equal: ties that nobody was asked about")
    if "note" in controlled:
        notes.append(f"win_rate/length_controlled: {controlled['note']}")
    details = {
        "verdict": judged[0].verdict,
        "sign_test": {"of": models[0], "wins": wins, "losses": losses, "even": even, "p": p},
        "empty_answers": empty,
        "equal_answers": num_equal,
    }
    return Evaluation(metrics, [item for own in items.values() for item in own], notes, details)


def _gap(item: Item) -> int:
    """By how many characters the item's answer is the longer one."""
    return len(item.response) - len(item.against["response"])


def _longer_wins(item: Item) -> float:
    return item.scores["win_rate"] if _gap(item) > 0 else 1 - item.scores["win_rate"]


def _sides(one: Judged, min_mass: float) -> list[Item]:
    """The prompt as either model's item. Equal answers are a tie, asked or not."""
    scores, error, replies, masses = (0.5, 0.5), None, (), ()
    if one.answers[0] != one.answers[1]:
        replies = one.said
        (first, why), (second, also) = (verdicts.first_score(one.verdict, reply, min_mass) for reply in replies)
        scores, error = (first, None if second is None else 1 - second), why or also
        if one.verdict == "logprobs":
            masses = [verdicts.letter_mass(reply["top_logprobs"]) for reply in replies]
    return both_sides(
        one.models,
        scores,
        replies=[reply["text"] for reply in replies],
        error=error,
        responses=one.answers,
        masses=masses,
        id=one.id,
        cluster=one.id,
        prompt=one.prompt,
    )


def _share(percent: dict) -> dict:
    """A cell in shares, of one in percent."""
    scaled = {name: None if percent[name] is None else percent[name] / 100 for name in ("value", "se")}
    return percent | scaled | {"interval": percent["interval"] and [bound / 100 for bound in percent["interval"]]}


def _opposite(cell: dict) -> dict:
    """The other model's cell of a rate."""
    if cell["value"] is None:
        return cell
    interval = cell["interval"] and [1 - bound for bound in reversed(cell["interval"])]
    return cell | {"value": 1 - cell["value"], "interval": interval}
