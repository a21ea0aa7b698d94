"""One page about runs and evaluations: verdicts in plain words, tables, figures, worst answers, provenance.

RUN/report.html      one file that needs no server, no network and no script
RUN/report.md        the same; its charts are SVG files in RUN/report_figures
RUN/results.json     the verdicts and what they are of
"""

from pathlib import Path

import torch

from rpo.evals.settings import Eval
from rpo.reporting import eval_verdicts, gather, page, sections
from rpo.reporting.batches import Gathered, gather_all
from rpo.reporting.run_verdicts import beside
from rpo.reporting.svg import visible
from rpo.runs import folder as run_folder
from rpo.text import redacted


def read(cfg: Eval) -> Gathered:
    """What is below `runs` and in `task.results`.

    Raises UserError where there is nothing to report on, or what was named can not be read. What lies below `runs` and
    can not be read is named in it.
    """
    specs = _listed(cfg.runs)
    found = gather.find(specs) if specs else gather.Found([], [], [])
    return gather_all(found, _listed(cfg.task.results))


def write(cfg: Eval, gathered: Gathered, *, run_dir: Path) -> list[str]:
    """Writes the page into `run_dir`; returns the verdicts and the files, to be printed."""
    specs, given = (_listed(value) for value in (cfg.runs, cfg.task.results))
    run_folder.write_environment(run_dir, torch.device("cpu"))
    title = cfg.task.title or ", ".join(Path(spec).expanduser().resolve().name for spec in specs or given)
    made = sections.layout(
        gathered, title, [*specs, *given], cfg.task.worst, run_folder.read_json(run_dir / "environment.json")
    )
    text, figures = page.markdown(made, "report_figures")
    files = [run_dir / "report.html", run_dir / "report.md"]
    (run_dir / "report_figures").mkdir(exist_ok=True)
    for path, content in {files[0]: page.html(made), files[1]: text}.items():
        path.write_text(content, encoding="utf-8")
    for name, content in figures.items():
        (run_dir / "report_figures" / name).write_text(content, encoding="utf-8")
    verdicts = [
        {"label": b.label, "runs": [m.name for m in b.members], "verdict": b.finding.kind, "says": b.finding.says}
        | {"notes": b.finding.notes}
        for b in gathered.batches
    ]
    facts = {"task": "report", "of": [*specs, *given], "title": title, "groups": verdicts, "notes": gathered.notes}
    run_folder.write_json(run_dir / "results.json", facts)
    said = [f"{b.label}: {b.finding.kind}. {beside(b.finding.kind, b.finding.says)}" for b in gathered.batches]
    said += eval_verdicts.over_seeds(gathered.batches)
    for each in gathered.evaluations:
        of = sections.differences if each.task == "compare" else eval_verdicts.of_evaluation
        said += [f"{each.task}, {each.folder.name}: {line}" for line in of(each)]
    few = len(gathered.notes) <= sections.NOTES
    said += gathered.notes if few else [f"{len(gathered.notes)} notes on what was left out are on the page"]
    return [visible(redacted(line)) for line in [*said, *map(str, files)]]


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
