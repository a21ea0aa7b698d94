"""What every evaluation leaves, in one form: results.json, samples.jsonl, and a table on screen.

results.json    {"task": kind, "models": {model: {metric: cell}}, "notes": [...], "details": {what this task alone says},
                "config": settings, "versions": {package: version}}
a cell          {"value", "se", "interval", "n", "n_error"}: the mean, its standard error, its 95% interval, the number of
                items behind it, and of those that would belong to it and failed; "unusable": why there is no value
samples.jsonl   one `Item` per line
"""

import importlib.metadata
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rpo import config, fields, text
from rpo.errors import UserError
from rpo.evals.settings import Eval
from rpo.files import parse_lines, to_lines, write_atomic
from rpo.runs import folder as run_folder
from rpo.stats import clustered_mean, finite, with_errors
from rpo.text import redacted

MAX_ERRORS = 0.05  # a larger share of failures makes a result unusable: what failed is rarely like the rest
_VERSIONS = ("torch", "transformers", "tokenizers", "numpy")
Cells = dict[str, dict[str, Any]]  # by metric


@dataclass(frozen=True)
class Item:
    """What one model did on one item of the data.

    id         the same in every evaluation by one task; of pairs FILE:LINE
    cluster    items with one are not independent: of one prompt, question or pair
    scores     what the model's cells are means of; {} where it failed
    error      why there is no score
    against    whom the response was judged against: {"model", "response"}
    details    what else the task says of it
    """

    model: str
    id: str
    cluster: str
    prompt: str | list[dict] | None = None
    response: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    against: dict[str, str | None] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def opponent(self) -> str | None:
        return self.against and self.against["model"]


def mean_of(items: Sequence[Item], score: str | Callable[[Item], float]) -> dict[str, Any]:
    """The cell of one score, or of what a function says of each item without an error: its clustered mean, and how many
    of all failed."""
    if isinstance(score, str):
        scored = [(item.scores[score], item.cluster) for item in items if score in item.scores]
    else:
        scored = [(score(item), item.cluster) for item in items if item.error is None]
    cell = clustered_mean([value for value, _ in scored], [cluster for _, cluster in scored])
    return with_errors(cell, sum(item.error is not None for item in items))


@dataclass(frozen=True)
class Evaluation:
    """What a task found: `models` by name, an item each; `notes` are what a reader has to know of the numbers."""

    models: dict[str, Cells]
    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results(Evaluation):
    """An evaluation as read back from `folder`."""

    folder: Path = Path()
    task: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


# ---- writing


def write(run_dir: Path, cfg: Eval, evaluation: Evaluation, table: Callable[[Evaluation], str] | None = None) -> None:
    """Writes both files and prints a table, the notes and where the files are.

    Raises UserError, everything written, where a model's results are unusable.
    """
    models, unusable = _complete(evaluation, cfg.baseline)
    evaluation = replace(evaluation, models=models)
    write_atomic(run_dir / "samples.jsonl", to_lines(map(_to_json, evaluation.items)))
    content = {
        "task": cfg.task.kind,
        "models": models,
        "notes": evaluation.notes,
        "details": evaluation.details,
        "config": config.to_dict(cfg),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
    }
    run_folder.write_json(run_dir / "results.json", content)
    notes = [f"note: {note}" for note in evaluation.notes]
    files = [str(run_dir / name) for name in ("results.json", "samples.jsonl")]
    print(*map(redacted, [table(evaluation), *notes, *files]), sep="\n", flush=True)
    if unusable:
        name, reason = next(iter(unusable.items()))
        raise UserError(
            f"{redacted(name)}: {reason}; more than {MAX_ERRORS:.0%} failed, so results.json has no score of it. Fix the "
            "cause and start again: what was answered is kept, unreadable replies too (another cache_dir asks all again)"
        )


def _complete(evaluation: Evaluation, baseline: str | None) -> tuple[dict[str, Cells], dict[str, str]]:
    """(cells with all of their keys, blank where unusable; why, by model)."""
    items: dict[str, list[Item]] = {}
    for item in evaluation.items:
        items.setdefault(item.model, []).append(item)
    reasons = {name: _why_unusable(items.get(name, [])) for name in evaluation.models}
    unusable = {name: reason for name, reason in reasons.items() if reason}
    models = {}
    for name, cells in evaluation.models.items():
        models[name] = {}
        for metric, cell in cells.items():
            cell = {"value": None, "se": None, "interval": None, "n": 0, "n_error": 0} | cell
            of = name if name in unusable else baseline if metric.startswith("difference/") else None
            if of in unusable:
                counts = {key: value for key, value in cell.items() if isinstance(value, int) and key != "value"}
                cell = dict.fromkeys(cell) | counts | {"unusable": unusable[of]}
            models[name][metric] = cell
    return models, unusable


def _why_unusable(items: Sequence[Item]) -> str | None:
    """Why a model's results cannot be used: more than 5% of its items failed; None where they can."""
    failed = [" ".join(item.error.split()) for item in items if item.error]
    if len(failed) <= MAX_ERRORS * len(items):
        return None
    reason, count = Counter(failed).most_common(1)[0]
    return f"{len(failed)} of {len(items)} items failed, {count} with: {reason}"


def _to_json(item: Item) -> dict[str, Any]:
    """Text of models and data stays as it is; names and places may be paths, which may hold a secret."""
    row = asdict(item)
    row |= {key: redacted(row[key]) for key in ("model", "id", "cluster")}
    if item.against is not None:
        row["against"]["model"] = redacted(item.against["model"])
    return row


# ---- reading


@fields.group
class _Head:
    task: str
    models: dict[str, dict[str, dict[str, Any]]]
    notes: list[str]
    details: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]


_Line = config.group(Item)


def read(place: str | Path, *, strict: bool = True) -> Results:
    """The evaluation in a folder, or in its results.json. Raises UserError where there is none, or one of another form.

    Not strict: lines of samples.jsonl that hold no item are skipped and counted in the notes, and whatever is not finite
    among scores and the numbers of cells is dropped, or None.
    """
    try:
        path = Path(place).expanduser()
        path = path / "results.json" if path.is_dir() else path
        content = run_folder.read_json(path)
        samples = path.with_name("samples.jsonl")
        lines = samples.read_text(errors="strict" if strict else "replace") if samples.exists() else ""
        rows, skipped = ([json.loads(line) for line in lines.split("\n") if line], 0) if strict else parse_lines(lines)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nested too deep, no such ~user
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{str(place)[:300]}: no evaluation can be read there ({reason}); give its run_dir") from None
    head, items = fields.read_row(_Head, content, str(path)), []
    for number, row in enumerate(rows, start=1):
        try:
            items.append(Item(**vars(fields.read_row(_Line, row, f"{samples}:{number}"))))
        except UserError:
            if strict:
                raise
            skipped += 1
    results = Results(**vars(head), items=items, folder=path.parent)
    return results if strict else _sanitised(results, skipped)


def _sanitised(results: Results, skipped: int) -> Results:
    def cell(one: dict) -> dict:
        numbers = {name: one[name] if finite(one.get(name)) else None for name in ("value", "se", "n", "n_error")}
        bounds = one.get("interval")
        whole = isinstance(bounds, list) and len(bounds) == 2 and all(map(finite, bounds))
        return one | numbers | {"interval": bounds if whole else None}

    items = [
        replace(item, scores={name: score for name, score in item.scores.items() if finite(score)})
        for item in results.items
    ]
    notes = results.notes + ([f"{skipped} lines of samples.jsonl hold no item and were skipped."] if skipped else [])
    models = {model: {name: cell(one) for name, one in cells.items()} for model, cells in results.models.items()}
    return replace(results, models=models, items=items, notes=notes)


# ---- on screen


def table(evaluation: Evaluation) -> str:
    """Metrics down, models across, each value +- its standard error; of more than three models the other way round."""
    models = evaluation.models
    names = list(dict.fromkeys(name for cells in models.values() for name in cells))
    lines = [["", *models]]
    for name in names:
        lines.append([name, *(_cell(cells.get(name)) for cells in models.values())])
    if len(models) > 3:
        lines = [list(line) for line in zip(*lines, strict=True)]
    return text.table(lines)


def _cell(cell: dict | None) -> str:
    """The value with as many digits as its error has two of."""
    if cell is None or cell["value"] is None:
        return "unusable" if cell and "unusable" in cell else "-"
    value, se = cell["value"], cell["se"]
    if se is None or not abs(value) * 1e-9 < se < math.inf:  # none, or a rounding
        return f"{value:.4g}" + ("" if se is None else " +- 0")
    digits = max(0, 1 - math.floor(math.log10(se)))
    return f"{value:.{digits}f} +- {se:.{digits}f}"
