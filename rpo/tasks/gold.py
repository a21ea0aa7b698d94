"""The embedded task's exact gold reward and KL to the reference, of samples at temperature 1."""

from typing import TYPE_CHECKING, Literal

import numpy as np

from rpo.errors import UserError
from rpo.evals.context import Context
from rpo.evals.results import Evaluation, Item
from rpo.evals.settings import Eval, Limit, check_subjects
from rpo.fields import Count, group
from rpo.files import short_hash
from rpo.stats import clustered_mean

if TYPE_CHECKING:
    from rpo.config import SyntheticTask


@group
class Settings:
    kind: Literal["gold"]
    limit: Limit
    samples: Count
    batch_size: Count


def check(cfg: Eval) -> None:
    check_subjects(cfg, "model.path", "reference.path")


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """Gold, KL, length and ended share of each model; an item per answer, `task.samples` of them per prompt.

    The KL is nats per response, Rao-Blackwellised; its estimator needs samples of the policy itself.
    """
    from rpo.synthetic import task

    reference, data = ctx.reference_path, ctx.data
    weights = _weights(ctx.runs)
    prompts = ctx.prompts(cfg.task.limit, task.SAMPLING.max_new_tokens)
    repeated = [ids for ids in prompts.ids for _ in range(cfg.task.samples)]
    # Prompts repeat in this task (a topic has few wordings), and answers to one prompt are not independent questions.
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, repeated)))}
    clusters, rendered = [number[tuple(prompt)] for prompt in repeated], ctx.tokenizer.batch_decode(repeated)
    models, items = {}, []
    for path in ctx.paths:
        columns, texts = _measured(cfg, ctx, path, repeated, weights)
        models[path] = {name: clustered_mean(values, clusters) for name, values in columns.items()}
        for i, (prompt, text) in enumerate(zip(rendered, texts, strict=True)):
            scores = {name: float(values[i]) for name, values in columns.items()}
            id = f"{prompt}#{i}"
            items.append(Item(model=path, id=id, cluster=prompt, prompt=prompt, response=text, scores=scores))
    return Evaluation(models, items, details={"reference": reference, "data": data})


def _weights(runs: list[dict | None]) -> "SyntheticTask":
    from rpo.synthetic import task

    for run in runs:
        if run is not None and (weights := task.weights_of(run["data"]["train"])) is not None:
            return weights
    raise UserError("task=gold: no model.path is the model/ of a run with data=gold, so there is no reward to compute")


def _measured(
    cfg: Eval, ctx: Context, path: str, prompts: list[list[int]], weights: "SyntheticTask"
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(columns of `gold.measure`, texts) of one answer per prompt; resumes where it was killed."""
    from rpo.model.sampling import Completion
    from rpo.synthetic import task

    answers = ctx.complete(path, prompts, task.SAMPLING)

    def compute() -> dict[str, list]:
        completions = [Completion(answer.ids, answer.ended) for answer in answers]
        policy, reference = ctx.model(path).policy, ctx.reference.policy
        columns = task.measure(policy, reference, ctx.tokenizer, prompts, completions, weights, ctx.device)
        return {name: values.tolist() for name, values in columns.items()}

    key = short_hash(ctx.identity(path), ctx.identity(ctx.reference_path), str(weights), [prompts, answers])
    columns = ctx.store("points").once(key, compute, model=path)
    return {name: np.array(values) for name, values in columns.items()}, [answer.text for answer in answers]
