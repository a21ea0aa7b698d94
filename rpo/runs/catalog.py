"""Runs as they were left in their folders: which there are, what each was made of, and its checkpoints."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpo import config, files
from rpo.config import EvalData, Loss, Reference
from rpo.config import Model as Start
from rpo.data.tokenizer import identity, load_tokenizer
from rpo.errors import UserError
from rpo.runs import checkpoint
from rpo.runs import folder as run_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = tuple[str, str | None]  # folder or Hub name, revision


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
        return None if self.loss.preference == "none" else self.loss.beta


def find(specs: list[str]) -> tuple[list[Run], list[str]]:
    """Every run with checkpoints in the folders `specs` or below them, and of each that cannot be used why, one phrase.

    A folder is a run's where its config.yaml has a loss. Left out are those that failed, and those that left no
    checkpoint. Runs stand in the order of their folders, 2 before 10. Raises UserError: a folder that is not there, or
    in which no run remains.
    """
    runs, left_out = [], []
    for spec in specs:
        top = Path(spec).expanduser().resolve()
        if not top.is_dir():
            raise UserError(f"runs={spec}: no such folder; give a run's, or a sweep's with runs in it")
        folders = {path.parent for pattern in ("config.yaml", "status.json") for path in top.rglob(pattern)}
        for folder in sorted(folders, key=_natural):
            found = _look(folder)
            if isinstance(found, Run):
                runs += [found] if all(run.folder != folder for run in runs) else []
            elif found:
                left_out.append(f"{folder} ({found})")
    if not runs:
        why = f": {'; '.join(left_out[:3])}" if left_out else "; a run's folder has a config.yaml and checkpoints/"
        raise UserError(f"runs={', '.join(specs)}: no run with checkpoints there{why}")
    return runs, left_out


def _natural(folder: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(folder))]


def _look(folder: Path) -> Run | str | None:
    """The run in `folder`, why it cannot be used, or None where no run has its folder there."""
    file = folder / "config.yaml"
    settings = config.read_yaml(file) if file.is_file() else None
    if settings is not None and not (isinstance(settings, dict) and isinstance(settings.get("loss"), dict)):
        return None
    status = run_folder.read_status(folder)
    if status["state"] == "failed":
        return f"failed: {status['reason'][:120]}"
    checkpoints = checkpoint.of_run(folder)
    if settings is None or not checkpoints:
        return None if settings is None else "no checkpoints; checkpoint.every=N keeps them"
    run = run_of(folder, settings, checkpoints, status["state"])
    return run if run.model.path else "began with random weights, so there is no reference"


def run_of(folder: Path, settings: dict[str, Any], checkpoints: dict[int, Path], state: str) -> Run:
    """Raises UserError where the settings are not those of a run of this version."""

    def part(cls: type, name: str, **more: Any) -> Any:
        node = settings.get(name)
        if not isinstance(node, dict):
            raise UserError(f"{folder}/config.yaml: {name}={node}: expected a group of keys")
        names = {field for field in cls.__dataclass_fields__}
        try:
            return config.build(cls, {key: value for key, value in node.items() if key in names} | more, name)
        except UserError as error:
            raise UserError(f"{folder}/config.yaml: {error}") from None

    model = part(Start, "model", trust_remote_code=False)  # what a run allowed is no permission of this user's
    given = part(Reference, "reference").path
    source = (given, None) if given is not None else (model.path, model.revision)
    return Run(folder, settings, part(Loss, "loss"), model, part(EvalData, "data"), source, checkpoints, state)


def tokenizer_of(run: Run, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The run's tokenizer, with its chat template."""
    path, template = run.model.tokenizer or run.model.path, run.data.chat_template
    how = {"revision": run.model.revision, "trust_remote_code": trust_remote_code}
    return load_tokenizer(path, chat_template=template, **how)


def identity_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer as a run's checkpoints record it."""
    return files.digest(json.dumps(identity(tokenizer)).encode())
