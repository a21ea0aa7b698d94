"""What an evaluation leaves: results.json, samples.jsonl and a table on screen, in one form for all that read them.

results.json    {"task", what it is of ..., "models": {model: {metric: cell}}, "config", "versions"}
a cell          {"value", "se", "interval", "n", "n_error"}: the mean, its standard error, its 95% interval, what it is the
                mean of, and what would belong to it and failed
samples.jsonl   one object per item: "model", "id" (the same item has the same one in every evaluation), "cluster" (what
                belongs together), "scores" ({metric: number}, what cells are means of), "error" (null, or why it has none)
"""

import importlib.metadata
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rpo import config
from rpo.errors import UserError
from rpo.evals.settings import Eval
from rpo.runs import folder as run_folder
from rpo.text import redacted

MAX_ERRORS = 0.05  # a larger share of failures makes a result unusable: what failed is rarely like the rest
_PLACES = ("model", "against", "id", "cluster", "row")  # of a sample: paths among them, which may hold a secret
_VERSIONS = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Evaluation:
    """`models`: model -> metric -> cell; `samples`: one per item; `facts`: what else results.json says."""

    models: dict[str, dict[str, dict]]
    samples: list[dict]
    facts: dict


@dataclass(frozen=True)
class Results:
    """An evaluation as read back from `folder`."""

    folder: Path
    task: str
    models: dict[str, dict[str, dict]]
    samples: list[dict]
    facts: dict


def with_errors(cell: dict, n_error: int) -> dict:
    """The cell with the number of items that would belong to it and failed."""
    return cell | {"n_error": n_error}


def unusable(samples: list[dict]) -> str | None:
    """Why a model's results can not be used: more than 5% of its items failed; None where they can."""
    failed = [" ".join(sample["error"].split()) for sample in samples if sample.get("error")]
    if len(failed) <= MAX_ERRORS * len(samples):
        return None
    reason, count = Counter(failed).most_common(1)[0]
    return f"{len(failed)} of {len(samples)} items failed, {count} with: {reason}"


def write(run_dir: Path, cfg: Eval, made: Evaluation, shown: str | None = None) -> None:
    """Writes both files and prints a table (or what is `shown`) and the notes.

    `facts["notes"]` are what a reader has to know of the numbers. Raises UserError, all written, where a model's results are
    unusable.
    """
    models, why = {}, {}
    for name, cells in made.models.items():
        models[name] = {metric: {"interval": None, "n_error": 0} | cell for metric, cell in cells.items()}
        if reason := unusable([sample for sample in made.samples if sample.get("model") == name]):
            why[name] = reason
    for name, cells in models.items():
        for metric, cell in cells.items():
            of = name if name in why else cfg.baseline if metric.startswith("difference/") else None
            if of in why:
                cells[metric] = _blank(cell) | {"unusable": why[of]}
    installed = {name: importlib.metadata.version(name) for name in _VERSIONS}
    facts = {"models": models, "config": config.to_dict(cfg), "versions": installed}
    part = run_dir / "samples.jsonl.part"  # renamed when whole: a file cut between two lines would look whole
    with part.open("w") as file:
        for sample in made.samples:  # text of models and data stays as it is, paths may hold a secret
            secretless = {key: redacted(sample[key]) for key in _PLACES if key in sample}
            file.write(json.dumps(sample | secretless) + "\n")
    part.rename(run_dir / "samples.jsonl")
    run_folder.write_json(run_dir / "results.json", {"task": cfg.task.kind, **made.facts, **facts})
    notes = [f"note: {note}" for note in made.facts.get("notes", [])]
    files = [str(run_dir / name) for name in ("results.json", "samples.jsonl")]
    print(*map(redacted, [shown or table(models), *notes, *files]), sep="\n", flush=True)
    if why:
        name, reason = next(iter(why.items()))
        raise UserError(
            f"{redacted(name)}: {reason}; more than {MAX_ERRORS:.0%} failed, so results.json has no score of it. Mend the "
            "cause and start again: what was answered is kept, unreadable replies too (another cache_dir asks all again)"
        )


def _blank(cell: dict) -> dict:
    """The cell's counts alone."""
    return {key: value if isinstance(value, int) and key != "value" else None for key, value in cell.items()}


def read(given: str | Path) -> Results:
    """The evaluation in a folder, or in its results.json. Raises UserError where there is none."""
    try:
        path = Path(given).expanduser()
        path = path / "results.json" if path.is_dir() else path
        facts = run_folder.read_json(path)
        text = path.with_name("samples.jsonl").read_text() if path.with_name("samples.jsonl").exists() else ""
        samples = [json.loads(line) for line in text.split("\n") if line]
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nested too deep, no such ~user
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"{str(given)[:300]}: no evaluation can be read there ({reason}); give the run_dir of one"
        ) from None
    models = facts.get("models") if isinstance(facts, dict) else None
    well_formed = isinstance(models, dict) and isinstance(facts.get("task"), str)
    if not well_formed or not all(isinstance(each, dict) for each in (facts.get("config", {}), *models.values())):
        raise UserError(f"{path}: holds no results by model; give the run_dir of an evaluation of models")
    if not all(isinstance(sample, dict) for sample in samples):
        raise UserError(
            f"{path.with_name('samples.jsonl')}: expected an object on each line, as an evaluation writes them"
        )
    rest = {key: value for key, value in facts.items() if key not in ("task", "models")}
    return Results(path.parent, facts["task"], models, samples, rest)


def table(models: dict[str, dict[str, dict]]) -> str:
    """Metrics down, models across, each value +- its standard error; of more than three models the other way round."""
    names = list(dict.fromkeys(name for result in models.values() for name in result))
    lines = [["", *models]]
    for name in names:
        lines.append([name, *(_cell(result.get(name)) for result in models.values())])
    if len(models) > 3:
        lines = [list(line) for line in zip(*lines, strict=True)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in padded)


def _cell(cell: dict | None) -> str:
    """The value with as many digits as its error has two of."""
    if cell is None or cell["value"] is None:
        return "unusable" if cell and "unusable" in cell else "-"
    value, se = cell["value"], cell["se"]
    if se is None or not abs(value) * 1e-9 < se < math.inf:  # none, or a rounding
        return f"{value:.4g}" + ("" if se is None else " +- 0")
    digits = max(0, 1 - math.floor(math.log10(se)))
    return f"{value:.{digits}f} +- {se:.{digits}f}"
