"""A run's folder: where it is, that it is its own, how the run ended, and what it ran on."""

import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from rpo import dist
from rpo.config import UserError, read_yaml

_MARKS = ("config.yaml", "status.json", "metrics.jsonl", "results.json", "sweep.json")


def choose(given: str | None, label: str) -> Path:
    """The folder of this run, the same on every rank and not yet made.

    `given`, or outputs/ID under torchrun with a rendezvous id, or outputs/TIME_label_XXXX by rank 0's clock.
    Raises UserError where the folder holds another run already.
    """
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's word for "no --rdzv-id"
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    default = f"outputs/{launch}" if launch != "none" else f"outputs/{stamp}_{label}_{uuid.uuid4().hex[:4]}"
    folder = Path(dist.broadcast(given or default)).expanduser()
    if held := [name for name in _MARKS if (folder / name).exists()]:
        raise UserError(f"run_dir={folder}: already holds a run ({held[0]}); give another folder or remove it")
    return folder


def settings_of(model: str | None) -> dict | None:
    """The settings of the run whose model/ this is; None for any other model."""
    file = Path(model or "").parent / "config.yaml"
    return read_yaml(file) if model and Path(model).name == "model" and file.exists() else None


def check_starting_model(model: str | None) -> None:
    """Raises UserError where the weights at model.path can not silently become the reference: a preference run's own."""
    made_by = settings_of(model)
    if made_by is not None and made_by["loss"]["preference"] != "none":
        raise UserError(
            f"reference.path=null with model.path={model}: a preference run made it, and its weights are not that run's "
            "reference; give reference.path, the run's own to go on with it, or model.path again for a new round"
        )


def write_json(path: Path, value: object) -> None:
    """Written aside and renamed, so that a reader never sees half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # several failing ranks may write the same file
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.rename(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_status(folder: Path) -> dict:
    """The run's `status.json`; a state of "absent" where it never came to write one."""
    path = folder / "status.json"
    return read_json(path) if path.exists() else {"state": "absent", "reason": "", "step": None}


def write_status(folder: Path, state: str, reason: str = "", step: int | None = None) -> None:
    """`status.json`: state running | finished | interrupted | failed, the reason in one line, the updates made.

    Exit codes do not pass through torchrun, so this file is where a script looks.
    """
    write_json(folder / "status.json", {"state": state, "reason": reason, "step": step})


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def environment(device: torch.device, **facts: object) -> dict:
    """What the numbers depend on besides the settings: code revision, versions, devices, command line, and `facts`."""
    packages = ("torch", "transformers", "tokenizers", "numpy", "datasets", "wandb", "hydra-core")
    status = _git("status", "--porcelain")
    return {
        "command": [sys.executable, *sys.argv],
        "git_revision": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "world_size": dist.world_size(),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        **facts,
    }


class Status:
    """How a run ends, as the loop sees it: `recording` writes it down whichever way the block is left."""

    state = "finished"
    step = 0


@contextmanager
def recording(folder: Path) -> Iterator[Status]:
    """Makes the run's folder and keeps its `status.json` true: running, then finished, interrupted or failed."""
    status = Status()
    if dist.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "status.json").open("x").close()  # of two runs that chose the folder at once, one gets it
            write_status(folder, "running", step=0)
        except OSError as error:
            raise UserError(f"run_dir={folder}: can not be written ({error.strerror}); give another folder") from None
    try:
        yield status
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
        with suppress(OSError):  # a full disk, or another node's folder, must not hide the error itself
            if read_status(folder)["state"] != "failed":  # the first rank to fail knows why, the others only that
                state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                write_status(folder, state, reason, status.step)
        raise
    if dist.is_main():
        write_status(folder, status.state, step=status.step)


class Interrupt:
    """From `defer` on SIGINT once sets `received`, for the loop to end after the step in hand; twice raises KeyboardInterrupt.

    Before, it raises at once: while models load and the reference is scored nothing is there to be saved.
    """

    received = False

    def __enter__(self) -> "Interrupt":
        self.before = signal.getsignal(signal.SIGINT)
        return self

    def defer(self) -> None:
        signal.signal(signal.SIGINT, self._receive)

    def _receive(self, _signum: int, _frame: object) -> None:
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_exc: object) -> None:
        signal.signal(signal.SIGINT, self.before)
