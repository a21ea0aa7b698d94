"""Answers to the prompts of a file: samples.jsonl is what other tools, and other tasks, read as `outputs`."""

from typing import Annotated, Literal

import numpy as np

from rpo.config import Count, Field, group
from rpo.evals.context import Answer, Context, Prompts, sampling_of
from rpo.evals.results import Cells, Evaluation, Item
from rpo.evals.settings import Answers, Eval, check_subjects
from rpo.stats import clustered_mean


@group
class Settings(Answers):
    kind: Literal["generate"]
    samples: Count
    top_k: Annotated[int, Field(ge=0, description="0 (off) or more")]


def check(cfg: Eval) -> None:
    check_subjects(cfg, "model.path")


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """Length, ended and truncated shares of each model; an item per answer, `task.samples` of them per prompt.

    Stop tokens and template are those of training. An answer is truncated where max_new_tokens came before a stop token.
    """
    task, data = cfg.task, ctx.data
    prompts = ctx.prompts(task.limit, task.max_new_tokens)
    repeated = [ids for ids in prompts.ids for _ in range(task.samples)]
    models, items = {}, []
    for path in ctx.paths:
        answers = ctx.complete(path, repeated, sampling_of(task))
        models[path] = metrics(answers, np.repeat(np.arange(len(prompts.ids)), task.samples))
        items += _items(path, prompts, answers, ctx.tokenizer.batch_decode(prompts.ids), task.samples)
    return Evaluation(models, items, details={"data": data})


def metrics(answers: list[Answer], clusters: np.ndarray) -> Cells:
    return {
        "samples/length": clustered_mean([answer.tokens for answer in answers], clusters),
        "samples/ended": clustered_mean([answer.ended for answer in answers], clusters),
        "samples/truncated": clustered_mean([not answer.ended for answer in answers], clusters),
    }


def _items(path: str, prompts: Prompts, answers: list[Answer], rendered: list[str], samples: int) -> list[Item]:
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
