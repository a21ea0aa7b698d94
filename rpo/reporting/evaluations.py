"""Evaluations of any task as read from their folders: Results, and the readers of JSON that anybody may have written.

What a file says is not trusted: numbers that are not finite, lines that are torn and cells of another kind are dropped.
"""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rpo.errors import UserError
from rpo.evals import pairing
from rpo.overopt.curve import verdict
from rpo.runs import folder as run_folder

# ---- JSON


def json_or_none(path: Path) -> Any:
    try:
        return run_folder.read_json(path)
    except (OSError, ValueError, RecursionError):
        return None


def as_dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def lines(path: Path) -> tuple[list[dict], int]:
    """(the objects of a JSON lines file, how many lines hold none): a kill leaves the last one half written."""
    objects, broken = [], 0
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:  # not splitlines, which splits at characters that JSON leaves inside a text
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                objects.append(value)
            else:
                broken += bool(line.strip())
    return objects, broken


def finite(value: Any) -> bool:
    """Whether `value` is a number to count with: its square is one too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e150


# ---- evaluations

# What a verdict reads of a summary, and what of it is there wherever gold was measured.
_OF_GOLD = {"gold/drop", "gold/gain", "gold/final_gain", "gold/noise", "step/peak", "step/final"}
_SUMMARY = _OF_GOLD | {"gold/drop_se", "gold/gain_se", "gold/final_gain_se", "kl/peak", "kl/max", "kl/final"}
_SUMMARY |= {"accuracy/peak", "accuracy/final", "shift/chosen", "step/below_reference"}


@dataclass(frozen=True)
class Results:
    """An evaluation as read from its folder: numbers of cells finite or None, samples with a str id and numeric scores.

    `curves`: of task=overopt alone, {"run", "settings", "curve", "summary", "max_new_tokens"} of each run. `names`: what
    the page calls models.
    """

    folder: Path
    task: str
    models: dict[str, dict[str, dict]]
    samples: list[dict] = field(repr=False)
    notes: list[str]
    details: dict[str, Any] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    curves: list[dict] = field(repr=False)
    names: dict[str, str] = field(default_factory=dict, repr=False)

    def name(self, model: str) -> str:
        return self.names.get(model, model)

    @property
    def judged_by(self) -> dict[str, Any]:
        return pairing.judged_by(self)

    def unusable(self, model: str) -> str | None:
        """Why this model's results cannot be used; None where they can."""
        return next((str(cell["unusable"]) for cell in self.models[model].values() if "unusable" in cell), None)


def read_results(spec: str | Path) -> Results:
    """The evaluation in a folder, or in its results.json, of any task. Raises UserError where none can be read there."""
    try:
        path = Path(spec).expanduser()
        path = path / "results.json" if path.is_dir() else path
        content = run_folder.read_json(path)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nested too deep, no such ~user
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{str(spec)[:300]}: cannot read an evaluation ({reason}); give the run_dir of one") from None
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise UserError(f"{path}: holds no results of an evaluation; give the run_dir of one")
    samples, _ = lines(path.with_name("samples.jsonl"))
    details, settings = content.get("details") or {}, content.get("config") or {}
    models, notes = content.get("models"), content.get("notes")
    try:
        curves = [_measured(run) for run in details["runs"]] if content["task"] == "overopt" else []
        if not all(isinstance(each, dict) for each in (details, settings, models, *models.values())):
            raise TypeError("models, details and config have to be objects")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"{path}: is not what task={content['task']} writes ({what}); run it again") from None
    cells = {
        str(model): {name: _cell(cell) for name, cell in metrics.items() if isinstance(cell, dict)}
        for model, metrics in models.items()
    }
    samples = [
        sample
        | {"model": str(sample.get("model")), "id": str(sample["id"])}
        | {"scores": {name: value for name, value in as_dict(sample.get("scores")).items() if finite(value)}}
        for sample in samples
        if "id" in sample
    ]
    notes = list(map(str, notes)) if isinstance(notes, list) else []
    return Results(path.parent, content["task"], cells, samples, notes, details, settings, curves)


def _measured(run: dict) -> dict:
    """A run of task=overopt, every number in it finite or None. Raises one of Python's own errors where it is malformed."""
    curve = []
    for point in run["curve"]:
        metrics = {name: cell for name, cell in point["metrics"].items() if finite(cell["value"])}
        curve.append({"step": int(point["step"]), "metrics": metrics})
    summary = {name: value if finite(value) else None for name, value in run["summary"].items()}
    needed = set() if summary.get("gold/drop") is None else _OF_GOLD
    if not curve or not _SUMMARY <= summary.keys() or any(summary[name] is None for name in needed):
        raise ValueError("a curve or its summary is incomplete")
    verdict(summary)  # which reads all of it
    settings = run["settings"]
    if not isinstance(settings["loss"], dict):
        raise TypeError("settings without a loss")
    new = int(run["max_new_tokens"])
    return {"run": str(run["run"]), "settings": settings, "curve": curve, "summary": summary, "max_new_tokens": new}


def _cell(cell: dict) -> dict:
    interval = cell.get("interval")
    whole = isinstance(interval, list) and len(interval) == 2 and all(map(finite, interval))
    numbers = {name: cell.get(name) if finite(cell.get(name)) else None for name in ("value", "se", "n", "n_error")}
    return cell | numbers | {"interval": interval if whole else None}
