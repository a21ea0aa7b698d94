"""Which checkpoint of each run to take: the rules of `overopt.selection` on the curves of an evaluation by task=overopt."""

from typing import Annotated, Literal

from rpo.errors import require
from rpo.evals.context import Context
from rpo.evals.results import Evaluation
from rpo.evals.settings import Eval, check_subjects
from rpo.fields import Count, Field, Share, group
from rpo.overopt import selection


@group
class Settings:
    kind: Literal["select"]
    results: str | None
    score: Annotated[
        str,
        Field(pattern="^(min|max):", description="min:METRIC or max:METRIC, one of those in the folder's results.json"),
    ]
    split: bool
    max_kl: Annotated[float, Field(ge=0)] | None
    entropy_falls: Count | None
    max_displacement: Share | None
    min_ended: Share | None


def check(cfg: Eval) -> None:
    task = cfg.task
    require(task.results is not None, "task.results=null: give the folder of an evaluation by task=overopt")
    require(
        not task.split or task.score == "max:gold",
        f"task.split=true with task.score={task.score}: only gold is kept by prompt; set task.score=max:gold or "
        "task.split=false",
    )
    check_subjects(cfg)


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """A model per run, with the cells of the checkpoint that is chosen; `details` has the choices and their reasons."""
    task = cfg.task
    limits = selection.Limits(task.max_kl, task.entropy_falls, task.max_displacement, task.min_ended)
    runs = selection.read(task.results)
    chosen = selection.choose(runs, limits, score=task.score, split=task.split)
    models = {}
    for run, choice in zip(runs, chosen, strict=True):
        metrics = {point["step"]: point["metrics"] for point in run["curve"]}
        models[run["run"]] = metrics.get(choice["chosen"]["step"], {})
    limited = any(limit is not None for limit in vars(limits).values())
    return Evaluation(models, details={"score": task.score, "limited": limited, "runs": chosen})


def table(evaluation: Evaluation) -> str:
    """For each run the step that either rule takes, why, and its folder; the second rule where there is a limit."""
    details = evaluation.details
    return selection.lines(details["runs"], details["score"], limited=details["limited"])
