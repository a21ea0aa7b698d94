"""Answers to the prompts of a file: samples.jsonl is what other tools, and other tasks, read as `outputs`."""

from typing import Annotated, Literal

import numpy as np

from rpo.data import answers as data_answers
from rpo.data.answers import key_of
from rpo.errors import require
from rpo.evals.context import Answer, Context, Prompts, print_main, sampling_of, tokenizer_of
from rpo.evals.results import Cells, Evaluation, Item
from rpo.evals.settings import Answers, Eval, check_subjects
from rpo.fields import Count, Field, group
from rpo.stats import clustered_mean
from rpo.text import redacted


@group
class Settings(Answers):
    kind: Literal["generate"]
    samples: Count
    top_k: Annotated[int, Field(ge=0, description="0 (off) or more")]


def check(cfg: Eval) -> None:
    check_subjects(cfg, "model.path")
    require(cfg.server.model is None or cfg.data.eval is not None, "data.eval=null with server.model: give the prompts")


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """Length, ended and truncated shares of each model; an item per answer, `task.samples` of them per distinct prompt.

    Stop tokens and template are those of training. An answer is truncated where max_new_tokens came before a stop token.
    """
    task, data = cfg.task, ctx.data_facts
    if cfg.server.model is not None:
        return _of_server(cfg, ctx)
    # By each model's own template; all are read, so that what does not fit is refused, before the first is loaded.
    asked = {path: _distinct(ctx.prompts(task.limit, task.max_new_tokens, path)) for path in ctx.paths}
    models, items = {}, []
    for path, prompts in asked.items():
        repeated = [ids for ids in prompts.ids for _ in range(task.samples)]
        answers = ctx.complete(path, repeated, sampling_of(task))
        models[path] = metrics(answers, np.repeat(np.arange(len(prompts.ids)), task.samples))
        items += _items(path, prompts, answers, tokenizer_of(cfg, path).batch_decode(prompts.ids), task.samples)
    return Evaluation(models, items, details={"data": data})


def _of_server(cfg: Eval, ctx: Context) -> Evaluation:
    task = cfg.task
    placed, report = data_answers.examples(cfg.data.eval, cfg.data.revision, cfg.data.on_bad_row)
    places, examples = zip(*placed[: task.limit], strict=True)
    prompts = Prompts([], [example.prompt for example in examples], list(places))
    ctx.write_report(report)
    models, items = {}, []
    for name in ctx.paths:
        answers = ctx.answer(name, [one for one in examples for _ in range(task.samples)], sampling_of(task))
        models[name] = metrics(answers, np.repeat(np.arange(len(examples)), task.samples))
        items += _items(name, prompts, answers, [None] * len(examples), task.samples)
    return Evaluation(models, items, ctx.notes, {"data": ctx.data_facts, "server": redacted(cfg.server.base_url)})


def _distinct(prompts: Prompts) -> Prompts:
    """Each prompt once, where it is first; those that are left out are counted on the screen."""
    first: dict[str, int] = {}
    for row, text in enumerate(prompts.texts):
        first.setdefault(key_of(text), row)
    if repeated := len(prompts.texts) - len(first):
        print_main(f"note: {repeated} of {len(prompts.texts)} prompts repeat an earlier one, and are asked once")
    return Prompts(*([column[row] for row in first.values()] for column in prompts))


def metrics(answers: list[Answer], clusters: np.ndarray) -> Cells:
    return {
        "samples/length": clustered_mean([answer.tokens for answer in answers], clusters),
        "samples/ended": clustered_mean([answer.ended for answer in answers], clusters),
        "samples/truncated": clustered_mean([not answer.ended for answer in answers], clusters),
    }


def _items(path: str, prompts: Prompts, answers: list[Answer], rendered: list[str | None], samples: int) -> list[Item]:
    return [
        Item(
            model=path,
            id=f"{prompts.places[row]}#{i % samples}",
            cluster=prompts.places[row],
            prompt=prompts.texts[row],
            response=answer.text,
            scores={"samples/length": answer.tokens, "samples/ended": float(answer.ended)},
            details={"rendered": rendered[row], "ended": answer.ended},
        )
        for i, answer in enumerate(answers)
        for row in [i // samples]
    ]
