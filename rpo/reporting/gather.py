"""Runs and evaluations as they were left in their folders, failed and half-written ones too, for a report to read.

Nothing is trusted: lines that are not JSON, numbers that are not finite and folders of other kinds are named, not
raised; what a user named himself and can not be read raises UserError.
"""

import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rpo import config
from rpo.errors import UserError
from rpo.evals import results
from rpo.evals.results import Results
from rpo.overopt.curve import verdict
from rpo.runs import folder as run_folder

_PASSED_BY = {"checkpoints", "model", "wandb", "plots", "__pycache__"}  # where no run has its folder


@dataclass(frozen=True)
class Run:
    """`curve`: its evaluations, {"step", metric: finite number}, a step once; `pairs`: how many held out, where it is known."""

    folder: Path
    settings: dict[str, Any] | None  # None: it failed before it had any
    overrides: dict[str, str]  # what its sweep set
    state: str
    reason: str
    step: int | None
    curve: list[dict] = field(repr=False)
    pairs: int | None
    environment: dict[str, Any] = field(repr=False)
    flaws: list[str]  # of its metrics.jsonl


@dataclass(frozen=True)
class Found:
    """`evaluations`: folders with a results.json."""

    runs: list[Run]
    evaluations: list[Path]
    notes: list[str]


def find(specs: Sequence[str]) -> Found:
    """What lies in the folders `specs` and below them, in the order of the folders, 2 before 10.

    Raises UserError: a folder that is not there, or with neither a run nor an evaluation in it.
    """
    runs, evaluations, notes = {}, {}, []
    for spec in specs:
        top = Path(spec).expanduser().resolve()
        if not top.is_dir():
            raise UserError(f"runs={spec}: no such folder; give a run's, a sweep's or one with either in it")
        before = len(runs), len(evaluations), len(notes)
        for folder in sorted(_folders(top), key=_natural):
            _look(folder, runs, evaluations, notes)
        if (len(runs), len(evaluations), len(notes)) == before and top not in runs:
            raise UserError(
                f"runs={spec}: no run and no evaluation there; a run's folder has a config.yaml with a loss"
            )
    return Found(list(runs.values()), list(evaluations), notes)


def _folders(top: Path) -> list[Path]:
    found = []
    for folder, inner, files in os.walk(top):
        inner[:] = [name for name in inner if name not in _PASSED_BY and not name.startswith(".")]
        if {"config.yaml", "status.json", "sweep.json"} & set(files):
            found.append(Path(folder))
    return found


def _natural(folder: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(folder))]


def _look(folder: Path, runs: dict[Path, Run], evaluations: dict[Path, None], notes: list[str]) -> None:
    """Enters what `folder` is; a note on what it should be and is not."""
    if (folder / "sweep.json").exists():
        absent = [str(i) for i in range(len(_sweep(folder))) if not (folder / str(i)).is_dir()]
        notes += [f"{folder}: cells of the sweep that were not started: {', '.join(absent)}"] if absent else []
    try:
        settings = config.read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
    except UserError as error:
        notes.append(str(error))
        return
    status = run_folder.read_status(folder)
    if isinstance(settings, dict) and isinstance(settings.get("loss"), dict):
        runs[folder] = _run(folder, settings, status)
    elif isinstance(settings, dict) and isinstance(settings.get("task"), dict):
        if settings["task"].get("kind") == "report":
            return
        if (folder / "results.json").is_file():
            evaluations[folder] = None
        else:
            kind, why = settings["task"].get("kind"), f"{status['state']}: {status['reason']}".rstrip(": ")
            notes.append(f"{folder}: an evaluation by task={kind} that left no results ({why})")
    elif settings is None and status["state"] != "absent":
        runs[folder] = _run(folder, None, status)
    elif settings is not None:
        notes.append(f"{folder}: its config.yaml is of another kind; left out")


def _sweep(folder: Path) -> list[dict]:
    """The rows of the sweep in `folder`; [] where it is none."""
    table = _json(folder / "sweep.json")
    return [row for row in table if isinstance(row, dict)] if isinstance(table, list) else []


def _json(path: Path) -> Any:
    try:
        return run_folder.read_json(path)
    except (OSError, ValueError, RecursionError):
        return None


def environment(folder: Path) -> dict[str, Any]:
    """What a run or an evaluation was made with; {} where it left nothing readable."""
    found = _json(folder / "environment.json")
    return found if isinstance(found, dict) else {}


def lines(path: Path) -> tuple[list[dict], int]:
    """(the objects of a JSON lines file, how many lines hold none): a kill leaves the last one half written."""
    found, broken = [], 0
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:  # not splitlines, which parts at characters that JSON leaves inside a text
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                found.append(value)
            else:
                broken += bool(line.strip())
    return found, broken


def finite(value: Any) -> bool:
    """Whether `value` is a number to count with: its square is one too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e150


def _run(folder: Path, settings: dict | None, status: dict) -> Run:
    events, broken = lines(folder / "metrics.jsonl")
    curve: dict[int, dict] = {}
    flaws = [f"{broken} line{'s' * (broken > 1)} of metrics.jsonl not readable, left out."] if broken else []
    for event in events:
        if event.get("split") == "eval" and finite(event.get("step")):
            point = {name: value for name, value in event.items() if finite(value)}
            lost = [name for name, value in event.items() if isinstance(value, float) and not finite(value)]
            flaws += [f"{', '.join(lost)} at step {event['step']} not finite, left out."] if lost else []
            curve[event["step"]] = point  # of two of a step, one of them before a stop, the later
    row = _sweep(folder.parent)[int(folder.name) :][:1] if folder.name.isdecimal() else []
    overrides = {k: v for k, v in row[0].items() if isinstance(v, str) and "/" not in k} if row else {}
    report = _json(folder / "data_report.json")
    held_out = report.get("eval") if isinstance(report, dict) else None
    pairs = held_out.get("kept") if isinstance(held_out, dict) else None
    return Run(
        folder,
        settings,
        {k: v for k, v in overrides.items() if k not in ("cell", "run_dir", "state", "reason")},
        str(status["state"]),
        " ".join(str(status["reason"]).split()),
        status["step"] if finite(status["step"]) else None,
        [curve[step] for step in sorted(curve)],
        pairs if finite(pairs) and pairs > 0 else None,
        environment(folder),
        flaws,
    )


# ---- evaluations


# What a verdict reads of a summary, and what of it is there wherever gold was measured.
_OF_GOLD = {"gold/drop", "gold/gain", "gold/final_gain", "gold/noise", "step/peak", "step/final"}
_SUMMARY = _OF_GOLD | {"gold/drop_se", "gold/gain_se", "gold/final_gain_se", "kl/peak", "kl/max", "kl/final"}
_SUMMARY |= {"accuracy/peak", "accuracy/final", "shift/chosen", "step/below_reference"}


@dataclass(frozen=True)
class Study:
    """An evaluation by task=overopt: `runs` as it left them, {"run", "settings", "curve", "summary", "max_new_tokens"}."""

    folder: Path
    runs: list[dict]
    left_out: list[str]
    samples: list[dict]


@dataclass(frozen=True)
class Chosen:
    """An evaluation by task=select: (run, label, step or None, reason) each."""

    folder: Path
    rows: list[tuple[str, str, int | None, str]]


def evaluation(given: str | Path) -> Results | Study | Chosen:
    """The evaluation in a folder, or in its results.json, of any task. Raises UserError where none can be read there."""
    path = Path(given).expanduser()
    path = path / "results.json" if path.is_dir() else path
    facts = _json(path)
    task = facts.get("task") if isinstance(facts, dict) else None
    if task not in ("overopt", "select"):
        return _of_models(results.read(given))
    try:
        if task == "overopt":
            samples, _ = lines(path.with_name("samples.jsonl"))
            return Study(
                path.parent, [_studied(run) for run in facts["runs"]], list(map(str, facts["left_out"])), samples
            )
        rows = [
            (str(r["run"]), str(r["label"]), r["chosen"]["step"], str(r["chosen"]["reason"])) for r in facts["runs"]
        ]
        return Chosen(path.parent, rows)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"{path}: not in the form that task={task} writes ({what}); make it again") from None


def _studied(run: dict) -> dict:
    """A run of a study, every number in it finite or None. Raises one of Python's own errors where it is not in form."""
    curve = []
    for point in run["curve"]:
        metrics = {name: cell for name, cell in point["metrics"].items() if finite(cell["value"])}
        curve.append({"step": int(point["step"]), "metrics": metrics})
    summary = {name: value if finite(value) else None for name, value in run["summary"].items()}
    needed = set() if summary.get("gold/drop") is None else _OF_GOLD
    if not curve or not _SUMMARY <= summary.keys() or any(summary[name] is None for name in needed):
        raise ValueError("a curve or its summary is not whole")
    verdict(summary)  # which reads all of it
    settings = run["settings"]
    if not isinstance(settings["loss"], dict):
        raise TypeError("settings without a loss")
    new = int(run["max_new_tokens"])
    return {"run": str(run["run"]), "settings": settings, "curve": curve, "summary": summary, "max_new_tokens": new}


def _of_models(found: Results) -> Results:
    """With what is no cell left out of its models, and what is no number of its cells as None."""
    models = {}
    for model, metrics in found.models.items():
        cells = metrics.items() if isinstance(metrics, dict) else ()
        models[str(model)] = {name: _cell(cell) for name, cell in cells if isinstance(cell, dict)}
    samples = [sample for sample in found.samples if isinstance(sample, dict)]
    return Results(found.folder, str(found.task), models, samples, found.facts)


def _cell(cell: dict) -> dict:
    interval = cell.get("interval")
    whole = isinstance(interval, list) and len(interval) == 2 and all(map(finite, interval))
    numbers = {
        name: value if finite(value) else None
        for name, value in cell.items()
        if name in ("value", "se", "n", "n_error")
    }
    return (
        cell
        | {"value": None, "se": None, "n": None, "n_error": None}
        | numbers
        | {"interval": interval if whole else None}
    )
