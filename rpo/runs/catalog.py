"""Runs as they were left in their folders: which there are, what each was made of, and its checkpoints."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

from rpo import config, fields, files
from rpo.config import EvalData, Loss, Reference
from rpo.data.tokenizer import identity, load_tokenizer
from rpo.errors import UserError
from rpo.runs import checkpoint
from rpo.runs import folder as run_folder
from rpo.runs.earlier import completed_loss
from rpo.stats import finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = tuple[str, str | None]  # folder or Hub name, revision


_PASSED_BY = {"checkpoints", "model", "wandb", "plots", "__pycache__"}  # where no run has its folder


@dataclass(frozen=True)
class RunRecord:
    """What a run left. Nothing is trusted: what cannot be read is absent, and `flaws` says so of its metrics.jsonl.

    `settings`: None where it failed before it had any; `overrides`: what its sweep set; `curve`: its evaluations by step,
    {"step", metric: finite number}; `pairs`: how many were held out; `digests`: of tokenizer and rows, by key.
    """

    folder: Path
    settings: dict[str, Any] | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    state: str = "absent"  # or finished, interrupted, running (or killed), failed
    reason: str = ""
    step: int | None = None
    curve: list[dict] = field(default_factory=list, repr=False)
    pairs: int | None = None
    digests: dict[str, str] = field(default_factory=dict, repr=False)
    environment: dict[str, Any] = field(default_factory=dict, repr=False)
    flaws: list[str] = field(default_factory=list)

    @property
    def checkpoints(self) -> dict[int, Path]:
        """By step."""
        return checkpoint.of_run(self.folder)


@dataclass(frozen=True)
class Catalog:
    """`evaluations`: folders with a results.json; `unreadable`: a line on each config.yaml that is not YAML; `notes`: on
    other folders that should hold something and do not."""

    runs: list[RunRecord]
    evaluations: list[Path]
    unreadable: list[str]
    notes: list[str]


@fields.group
class Start:
    """The model that a run started from, as its settings say."""

    path: str | None
    revision: str | None
    tokenizer: str | None
    trust_remote_code: bool
    dtype: Literal["auto", "bfloat16", "float32", "float64"]
    lora: config.Lora
    load_in_4bit: bool


@dataclass(frozen=True)
class Run:
    """A run with checkpoints: what of its settings an evaluation reads, typed, and all of them as its config.yaml says."""

    folder: Path
    settings: dict[str, Any]
    loss: Loss
    model: Start
    data: EvalData
    reference: Source
    checkpoints: dict[int, Path]  # by step
    state: str  # finished, interrupted, running (or killed), absent

    @property
    def start(self) -> Source:
        return self.model.path, self.model.revision

    @property
    def beta(self) -> float | None:
        """Of the implicit reward; None where the run had none."""
        return self.loss.beta if self.loss.has_reference else None


def walk(specs: Sequence[str]) -> Catalog:
    """What lies in the folders `specs` and below them, in the order of the folders, 2 before 10; links are followed.

    A folder is a run's where its config.yaml has a loss, an evaluation's where it has a task. Raises UserError on a
    folder that is not there.
    """
    folders: dict[Path, None] = {}
    for spec in specs:
        top = Path(spec).expanduser().resolve()
        if not top.is_dir():
            raise UserError(f"runs={spec}: no such folder; give a run's, or a sweep's with runs in it")
        below: dict[Path, bool] = {}  # whether it holds anything
        for path, inner, names in os.walk(top, followlinks=True):
            if (folder := Path(path).resolve()) in below:  # by another link, perhaps to what it is in
                inner.clear()
            inner[:] = [name for name in inner if name not in _PASSED_BY and not name.startswith(".")]
            below[folder] = bool({"config.yaml", "status.json", "sweep.json"} & set(names))
        folders |= dict.fromkeys(sorted(filter(below.get, below), key=_natural))
    catalog = Catalog([], [], [], [])
    for folder in folders:
        try:
            _look(folder, catalog)
        except UserError as error:
            catalog.unreadable.append(str(error))
            continue
        absent = [str(i) for i in range(len(_sweep(folder))) if not (folder / str(i)).is_dir()]
        if absent:
            catalog.notes.append(f"{folder}: cells of the sweep that were not started: {', '.join(absent)}")
    return catalog


def find(specs: list[str]) -> tuple[list[Run], list[str]]:
    """Every run with checkpoints below `specs`, and of each that cannot be used why, one phrase.

    Left out are those that failed, have no checkpoint or cannot be read. Raises UserError as `walk` does, and where no run
    remains.
    """
    catalog = walk(specs)
    runs, left_out = [], list(catalog.unreadable)
    for record in catalog.runs:
        if record.state == "failed":
            left_out.append(f"{record.folder} (failed: {shorten(record.reason, 120, placeholder=' ...')})")
        elif record.settings is not None and not record.checkpoints:
            left_out.append(f"{record.folder} (no checkpoints; checkpoint.every=N keeps them)")
        elif record.settings is not None and (run := typed(record)).model.path:
            runs.append(run)
        elif record.settings is not None:
            left_out.append(f"{record.folder} (began with random weights, so there is no reference)")
    if not runs:
        reason = f": {'; '.join(left_out[:3])}" if left_out else "; a run's folder has a config.yaml and checkpoints/"
        raise UserError(f"runs={', '.join(specs)}: no run with checkpoints there{reason}")
    return runs, left_out


def _natural(folder: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(folder))]


def _look(folder: Path, catalog: Catalog) -> None:
    """Adds to the catalog the run or the evaluation in `folder`, or a note on what it should hold and does not."""
    settings = config.read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
    status = run_folder.read_status(folder)
    known = settings if isinstance(settings, dict) else {}
    if isinstance(known.get("loss"), dict) or (settings is None and status["state"] != "absent"):
        catalog.runs.append(_record(folder, settings, status))
    elif isinstance(known.get("task"), dict):
        kind = known["task"].get("kind")
        if kind != "report" and (folder / "results.json").is_file():
            catalog.evaluations.append(folder)
        elif kind != "report":
            why = f"{status['state']}: {status['reason']}".rstrip(": ")
            catalog.notes.append(f"{folder}: an evaluation by task={kind} without results ({why})")
    elif settings is not None:
        catalog.notes.append(f"{folder}: skipped, its config.yaml is not that of a run or an evaluation")


def _record(folder: Path, settings: dict | None, status: dict) -> RunRecord:
    try:
        events, broken = files.parse_lines((folder / "metrics.jsonl").read_text(errors="replace"))
    except OSError:
        events, broken = [], 0
    curve: dict[int, dict] = {}
    flaws = [f"{broken} unreadable line{'s' * (broken > 1)} of metrics.jsonl skipped."] if broken else []
    for event in events:
        if event.get("split") == "eval" and finite(event.get("step")):
            lost = [name for name, value in event.items() if isinstance(value, float) and not finite(value)]
            flaws += [f"{', '.join(lost)} at step {event['step']} not finite, skipped."] if lost else []
            # Of two evaluations of one step, one of them before an interruption, the later counts.
            curve[event["step"]] = {name: value for name, value in event.items() if finite(value)}
    cells = _sweep(folder.parent)[int(folder.name) :] if folder.name.isdecimal() else []
    own = cells[0] if cells else {}
    not_set = ("cell", "run_dir", "state", "reason")
    data_report = _read(folder / "data_report.json", dict)
    parts = [data_report.get(key) for key in ("eval", "digests")]
    held_out, digests = (part if isinstance(part, dict) else {} for part in parts)
    pairs = held_out.get("kept")
    return RunRecord(
        folder=folder,
        settings=settings,
        overrides={k: v for k, v in own.items() if isinstance(v, str) and "/" not in k and k not in not_set},
        state=str(status["state"]),
        reason=" ".join(str(status["reason"]).split()),
        step=status["step"] if finite(status["step"]) else None,
        curve=[curve[step] for step in sorted(curve)],
        pairs=pairs if finite(pairs) and pairs > 0 else None,
        digests=digests,
        environment=environment(folder),
        flaws=flaws,
    )


def _sweep(folder: Path) -> list[dict]:
    """The rows of the sweep in `folder`; [] where it is none."""
    return [row for row in _read(folder / "sweep.json", list) if isinstance(row, dict)]


def environment(folder: Path) -> dict[str, Any]:
    """What a run or an evaluation ran with; {} where it left nothing readable."""
    return _read(folder / "environment.json", dict)


def _read(path: Path, kind: type) -> Any:
    """The JSON value of a file; an empty `kind` where there is none, or one of another kind."""
    try:
        value = run_folder.read_json(path)
    except (OSError, ValueError, RecursionError):
        value = None
    return value if isinstance(value, kind) else kind()


def typed(record: RunRecord) -> Run:
    """Raises UserError where the settings are not those of a run of this version."""
    file = record.folder / "config.yaml"

    def part(cls: type, name: str, absent: dict | None = None, **more: Any) -> Any:
        node = record.settings.get(name)
        if not isinstance(node, dict):
            raise UserError(f"{file}: {name}={node}: expected a group of keys")
        try:
            node = completed_loss(node) if cls is Loss else node
            own = {k: v for k, v in node.items() if k in cls.__dataclass_fields__}
            return fields.build(cls, (absent or {}) | own | more, name)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None

    # What a run allowed is no permission of this user's; older runs have no adapter.
    model = part(
        Start, "model", {"lora": config.to_dict(config.NO_ADAPTER), "load_in_4bit": False}, trust_remote_code=False
    )
    given = part(Reference, "reference", {"alpha": None, "every": None}).path
    source = (model.path, model.revision) if given is None else (given, None)
    loss, data = part(Loss, "loss"), part(EvalData, "data")
    return Run(record.folder, record.settings, loss, model, data, source, record.checkpoints, record.state)


def tokenizer_of(run: Run, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The run's tokenizer, with its chat template."""
    return load_tokenizer(
        run.model.tokenizer or run.model.path,
        chat_template=run.data.chat_template,
        revision=run.model.revision,
        trust_remote_code=trust_remote_code,
    )


def identity_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer as a run's checkpoints record it."""
    return files.digest(json.dumps(identity(tokenizer)).encode())
