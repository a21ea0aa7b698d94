"""Runs along their checkpoints: gold reward, proxy, KL and what else moves, where it peaks and how far it falls."""

from typing import Annotated, Literal

from rpo import dist
from rpo.errors import require
from rpo.evals.context import Context
from rpo.evals.results import Evaluation
from rpo.evals.settings import Eval, Limit, check_subjects, listed
from rpo.fields import Count, Field, group
from rpo.overopt import study
from rpo.text import redacted

_OrNone = Annotated[int, Field(ge=0, description="at least 0")]


@group
class Settings:
    kind: Literal["overopt"]
    gold: str
    limit: Limit
    samples: Count
    max_new_tokens: Count | Literal["auto"]
    batch_size: Count
    written: _OrNone
    pairs: _OrNone | None
    bon: Annotated[list[Count], Field(description="numbers of answers, each at least 1")]
    bon_samples: Count | None


def check(cfg: Eval) -> None:
    largest = max(cfg.task.bon, default=1)
    require(
        (cfg.task.bon_samples or largest) >= largest,
        f"task.bon_samples={cfg.task.bon_samples} with task.bon={cfg.task.bon}: the best of n needs n answers; set it to "
        f"{largest} or more, or null",
    )
    check_subjects(cfg, "runs")


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """The checkpoints of all runs below `runs`: a model per run, whose metrics are its summary's entries.

    `details` has the curves, the groups of runs that differ in seeds alone, what was left out, and the figures' paths.
    """
    from rpo.overopt import figures, measure
    from rpo.runs import catalog, groups

    runs, left_out = dist.on_main(catalog.find, listed(cfg.runs))
    groups.group(
        [{"run": str(run.folder), "settings": run.settings} for run in runs]
    )  # refuses a run that is there twice
    unfinished = [f"{run.folder} ({run.state})" for run in runs if run.state != "finished"]
    for what, named in (("left out", left_out), ("not finished, and evaluated as far as it is", unfinished)):
        if named and dist.is_main():
            print(f"{what}: {'; '.join(map(redacted, named))}", flush=True)
    asked = measure.ask(runs, cfg, ctx.device)
    ctx.begin()
    measured, items = measure.measure_all(runs, asked, ctx)
    of_runs, of_groups, grouped = study.summarise(measured, cfg.seed)
    drawn = dist.on_main(figures.draw_study, grouped, ctx.run_dir / "plots", study.mean_best_of_n(of_runs))
    models = {run["run"]: study.cells_of(run) for run in of_runs}
    details = {"left_out": left_out, "groups": of_groups, "runs": of_runs, "figures": list(map(str, drawn))}
    return Evaluation(models, items, details=details)


def table(evaluation: Evaluation) -> str:
    """A row and a sentence per group, and where its figures are."""
    return "\n".join([study.lines(evaluation.details["groups"]), *evaluation.details["figures"]])
