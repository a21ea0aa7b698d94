"""One page about runs and evaluations, RUN/report.html: did it get better, by which numbers, and where did it get worse?

The file needs no server, no network and no script. RUN/results.json has the table of arms and the verdicts.
"""

from pathlib import Path
from typing import Annotated, Literal

from rpo import dist
from rpo.errors import require
from rpo.evals.context import Context
from rpo.evals.results import Evaluation
from rpo.evals.settings import Eval, Listed, check_subjects, listed
from rpo.fields import Field, group
from rpo.reporting.run_verdicts import beside
from rpo.runs import catalog
from rpo.runs import folder as run_folder
from rpo.text import clean


@group
class Settings:
    kind: Literal["report"]
    results: Listed | None
    title: str | None
    worst: Annotated[int, Field(ge=0, description="0 (none) or a number of answers")]


def check(cfg: Eval) -> None:
    check_subjects(cfg, "runs", optional=True)
    require(
        bool(cfg.runs or cfg.task.results),
        "runs=null, task.results=null with task=report: nothing to report on; give runs=FOLDER or task.results=FOLDER",
    )


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """Writes ctx.run_dir/report.html; models are the arms, each with what gold, KL and shift came to.

    Raises UserError where a path given explicitly cannot be read, or holds neither a run nor an evaluation.
    """
    from rpo.reporting import collect, render, sections, tables  # matplotlib, jinja2: no other task needs them

    runs, results = listed(cfg.runs), listed(cfg.task.results)
    report = collect.collect(runs, results)
    ctx.begin()
    title = cfg.task.title or ", ".join(Path(spec).expanduser().resolve().name for spec in runs or results)
    if dist.is_main():
        run_folder.write_environment(ctx.run_dir, ctx.device)
    environment = catalog.environment(ctx.run_dir)
    page = sections.layout(report, title, [*runs, *results], cfg.task.worst, environment)
    file = ctx.run_dir / "report.html"
    if dist.is_main():
        file.write_text(render.html(page), encoding="utf-8")
    arms = [
        {"label": arm.label, "runs": [member.name for member in arm.members]}
        | {"verdict": arm.verdict.kind, "says": arm.verdict.says, "notes": arm.verdict.notes}
        for arm in report.groups
    ]
    details = {"of": [*runs, *results], "title": title, "headline": page["headline"], "asides": page["asides"]}
    details |= {"groups": arms, "file": str(file)}
    return Evaluation(tables.metrics(report), notes=report.notes, details=details)


def table(evaluation: Evaluation) -> str:
    """The headline, a verdict per arm, and where the page is: what is printed."""
    details = evaluation.details
    arms = [f"{arm['label']}: {arm['verdict']}. {beside(arm['verdict'], arm['says'])}" for arm in details["groups"]]
    return "\n".join(map(clean, [details["headline"], *details["asides"], *arms, details["file"]]))
