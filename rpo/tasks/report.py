"""One page about runs and evaluations, RUN/report.html: did it get better, by which numbers, and where did it get worse?

The file needs no server, no network and no script. RUN/results.json has the table of arms and the verdicts.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch

from rpo import config, dist
from rpo.config import Field, group
from rpo.errors import require
from rpo.evals.results import Evaluation
from rpo.evals.settings import Eval
from rpo.reporting.run_verdicts import beside
from rpo.reporting.text import clean
from rpo.runs import folder as run_folder


@group
class Settings:
    kind: Literal["report"]
    results: str | list[str] | None
    title: str | None
    worst: Annotated[int, Field(ge=0, description="0 (none) or a number of answers")]


def check(cfg: Eval) -> None:
    """Raises UserError where there is nothing to report on."""
    require(
        cfg.task.results != [], "task.results=[]: expected a folder or a list of them; null: those found below runs"
    )
    require(
        bool(cfg.runs or cfg.task.results),
        "runs=null, task.results=null with task=report: nothing to report on; give runs=FOLDER or task.results=FOLDER",
    )


def run(cfg: Eval, ctx: Any) -> Evaluation:
    """Writes ctx.run_dir/report.html; models are the arms, each with what gold, KL and shift came to.

    Raises UserError where a path given explicitly cannot be read, or holds neither a run nor an evaluation.
    """
    from rpo.reporting import (
        collect,
        first_screen,
        render,
        sections,  # matplotlib and jinja2: no other task needs them
    )

    runs, results = _listed(cfg.runs), _listed(cfg.task.results)
    report = collect.collect(runs, results)
    ctx.begin()
    title = cfg.task.title or ", ".join(Path(spec).expanduser().resolve().name for spec in runs or results)
    folder = Path(ctx.run_dir)
    if dist.is_main():
        run_folder.write_environment(folder, torch.device("cpu"))
    page = sections.layout(report, title, [*runs, *results], cfg.task.worst, collect.environment(folder))
    file = folder / "report.html"
    if dist.is_main():
        file.write_text(render.html(page), encoding="utf-8")
    arms = [
        {"label": arm.label, "runs": [member.name for member in arm.members]}
        | {"verdict": arm.verdict.kind, "says": arm.verdict.says, "notes": arm.verdict.notes}
        for arm in report.groups
    ]
    details = {"of": [*runs, *results], "title": title, "headline": page.headline, "asides": page.asides}
    details |= {"groups": arms, "file": str(file)}
    return Evaluation(first_screen.metrics(report), [], {"notes": report.notes, "details": details})


def table(made: Evaluation) -> str:
    """The headline, a verdict per arm, and where the page is: what is printed."""
    details = made.facts["details"]
    arms = [f"{arm['label']}: {arm['verdict']}. {beside(arm['verdict'], arm['says'])}" for arm in details["groups"]]
    return "\n".join(map(clean, [details["headline"], *details["asides"], *arms, details["file"]]))


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


# ---- for eval.py as it is: to go with it


def read(cfg: Eval) -> None:
    """Raises UserError as `run` does, before a folder is made."""
    from rpo.reporting import collect

    collect.collect(_listed(cfg.runs), _listed(cfg.task.results))


def write(cfg: Eval, _: None, *, run_dir: Path) -> list[str]:
    """Runs the task and writes results.json; returns what is printed."""
    made = run(cfg, SimpleNamespace(run_dir=run_dir, begin=lambda: None))
    content = {"task": "report", "models": made.models, **made.facts, "config": config.to_dict(cfg)}
    run_folder.write_json(run_dir / "results.json", content)
    notes = [f"note: {clean(note)}" for note in made.facts["notes"]]
    return [table(made), *notes, clean(run_dir / "results.json")]
