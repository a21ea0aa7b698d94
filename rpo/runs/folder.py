"""A run's folder: where it is, that it is its own, how the run ended, and what it ran on."""

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from rpo import dist
from rpo.config import WITHOUT_REFERENCE, Train, differences, may_change, read_yaml, to_dict, to_yaml
from rpo.data.dataset import Splits
from rpo.errors import UserError, fixable, require
from rpo.files import write_atomic
from rpo.runs import checkpoint
from rpo.runs.checkpoint import Checkpoint
from rpo.runs.earlier import completed
from rpo.text import redacted

# The first found says what a folder is.
_MARKS = ("results.json", "sweep.json", "config.yaml", "status.json", "metrics.jsonl")


def choose(given: str | None, label: str, *, continues: str | None = None) -> Path:
    """The folder of this run, the same on every rank and not yet made.

    `given`, or outputs/ID under torchrun with a rendezvous id, or outputs/TIME_label_XXXX by rank 0's clock.
    Raises UserError where the folder holds another run already, save one that a file named `continues` begins, or a
    link that leads out of it: a run that came as an archive could write there.
    """
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's word for "no --rdzv-id"
    if given is None and launch != Path(launch).name:
        raise UserError(f"run_dir=null with --rdzv-id={launch}: not a folder's name; give run_dir")
    if given is None and launch == "none" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise UserError(
            "run_dir=null: torchrun restarted the run, and its folder's name is lost; give run_dir or --rdzv-id"
        )
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    default = f"outputs/{launch}" if launch != "none" else f"outputs/{stamp}_{label}_{uuid.uuid4().hex[:4]}"
    folder = Path(dist.broadcast(given or default)).expanduser()
    held = [name for name in _MARKS if (folder / name).exists()]
    if held and held[0] != continues:
        raise UserError(f"run_dir={folder}: already holds a run ({held[0]}); use another folder or remove it")
    inside = os.path.join(os.path.realpath(folder), "")
    for path in [*folder.glob("*"), *folder.glob("*/*")]:  # as deep as a run itself writes into what it finds
        if path.is_symlink() and not os.path.realpath(path).startswith(inside):
            raise UserError(
                f"run_dir={folder}: {path.relative_to(folder)} is a link out of it, and the run would write there; put in "
                "its place what it leads to, or make the folder itself the link"
            )
    return folder


EARLY = "stopped early"  # the reason in status.json of a run that stop.metric has ended
_MODELS = ("model", "model_merged")  # that a run leaves


@dataclass(frozen=True)
class RunFolder:
    """A training run's folder, and the checkpoint that the run resumes from, if there is one."""

    path: Path
    resume: Checkpoint | None
    seen: tuple[int, int] | None  # its `stamp` when this process first looked into it

    @classmethod
    def open(cls, cfg: Train) -> "RunFolder":
        """The folder that `cfg` names, the same on every rank and not yet made.

        Raises UserError: another run's folder, a resume=PATH that names no whole checkpoint.
        """
        continues = None if cfg.resume == "never" else "config.yaml"
        path = choose(cfg.run_dir, f"{cfg.loss.preference}_{cfg.loss.sft}", continues=continues)
        seen = stamp(path)
        return cls(path, checkpoint.find(path, cfg.resume, cfg.checkpoint.verify), seen)

    def check_settings(self, cfg: Train) -> None:
        """Raises UserError where the run, or the one that it is a fork of, has settings that one run may not change."""
        _check_settings(self.path, cfg)
        if self.resume is not None and self.resume.run_dir != self.path:
            _check_settings(self.resume.run_dir, cfg, fork=True)

    def is_finished(self, total_steps: int, data: Splits) -> bool:
        """Whether the run has made its `total_steps` and left its model; says so on rank 0.

        Raises UserError where resuming would undo steps, or overwrite a model/ without a checkpoint to resume from, and where
        it finished with other data than `data`, which without a checkpoint nothing else says.
        """
        first_step = self.resume.state["step"] if self.resume else 0
        status, has_model = dist.on_main(lambda: (read_status(self.path), (self.path / "model").exists()))
        early = status["reason"] == EARLY and first_step in (0, status["step"])
        done = status["state"] == "finished" and (status["step"] == total_steps or early) and has_model
        if done:
            dist.on_main(self._check_data, data.facts)
        if done and dist.is_main():
            fix = "it stopped early" if early else "for more, raise max_steps"
            print(f"{self.path}: finished after {status['step']} steps already; {fix}", flush=True)
        if not done and first_step > total_steps:
            raise UserError(
                f"max_steps: the run to resume has made {first_step} steps, of {total_steps} that max_steps or epochs "
                "ask for; ask for as many or more"
            )
        if not done and has_model and not first_step:
            raise UserError(f"run_dir={self.path}: holds a model/ and no checkpoint to resume from; use a new run_dir")
        return done

    def _check_data(self, facts: dict[str, str]) -> None:
        report = {}
        with suppress(FileNotFoundError, ValueError):
            report = read_json(self.path / "data_report.json")
        for key, then in report.get("digests", {}).items():  # which runs of earlier versions lack
            now = facts.get(key)
            require(now == then, f"{key}: {now}, but {then} when {self.path} ran; restore it, or use a new run_dir")

    @property
    def log_position(self) -> tuple[Path, dict] | None:
        """Whose log the run continues, and from where in it."""
        return (self.resume.run_dir, self.resume.state["position"]) if self.resume else None

    def write_running(self, step: int) -> None:
        """Notes in status.json that `step` updates are made; on rank 0."""
        if dist.is_main():
            write_status(self.path, "running", step=step)

    @contextmanager
    def recording(self, cfg: Train, total_steps: int, data: Splits) -> Iterator["Status"]:
        """`recording` of this run, with data_report.json and one line on screen: its rows, and where it starts."""
        first_step = self.resume.state["step"] if self.resume else 0
        with recording(self.path, to_yaml(cfg), first_step, self.seen) as status:
            if dist.is_main():
                write_json(self.path / "data_report.json", data.reports | {"digests": data.facts})
                start = ", restarting: no checkpoint found" if self.seen else ""
                if self.resume:
                    start = f", resuming from {self.resume.folder}"
                    for model in filter(Path.exists, [self.path / name for name in _MODELS]):
                        # Or an evaluation would take it for what the run is now; the next one replaces it.
                        old = model.with_name(f"{model.name}.old")
                        shutil.rmtree(old, ignore_errors=True)
                        model.rename(old)
                        start += f"; its {model.name}/ is {old.name} until it ends"
                    if (before := self.resume.state["total_steps"]) != total_steps:
                        start += f"; optim.schedule is now that of {total_steps} steps, not {before}"
                print(f"{self.path}: {data.summary}{start}", flush=True)
            yield status

    def write_environment(self, device: torch.device, **measured: object) -> None:
        """environment.json of the run, with what was `measured` of its models; on rank 0."""
        if dist.is_main():
            write_environment(self.path, device, first_step=self.resume.state["step"] if self.resume else 0, **measured)


def _check_settings(folder: Path, cfg: Train, *, fork: bool = False) -> None:
    key = f"resume={cfg.resume}" if fork else f"run_dir={folder}"
    path, here = folder / "config.yaml", redacted(to_dict(cfg))
    if not path.exists():
        if fork:
            raise UserError(f"{key}: {folder} has no config.yaml, so nothing says which run it was; give a run's own")
        return
    there = read_yaml(path)
    if not isinstance(there, dict) or not there.keys() & here.keys():
        raise UserError(f"run_dir={folder}: already holds a run (config.yaml) of another kind; use another folder")
    there = completed(there)
    if found := differences(there, here, may_change(Train)):
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        fix = "give its settings" if fork else "give its settings, or another run_dir"
        raise UserError(
            f"{key}: holds a run with other settings ({'; '.join(found[:5])}{more}); within a run only "
            f"{', '.join(sorted(may_change(Train)))} may change: {fix}"
        )


def settings_of(model: str | None) -> dict | None:
    """The settings of the run whose model/ or model_merged/ this is; None for any other model."""
    file = Path(model or "").parent / "config.yaml"
    if not model or Path(model).name not in _MODELS or not file.exists():
        return None
    settings = read_yaml(file)
    loss = settings.get("loss") if isinstance(settings, dict) else None
    return settings if isinstance(loss, dict) and "preference" in loss else None  # other tools have a config.yaml too


def check_starting_model(model: str | None) -> None:
    """Raises UserError where the weights at model.path cannot silently become the reference: a preference run's own."""
    made_by = settings_of(model)
    preference = made_by["loss"]["preference"] if made_by is not None else "none"
    if preference in WITHOUT_REFERENCE and preference != "none":
        raise UserError(
            f"reference.path=null with model.path={model}: a {preference} run made it, which had no reference; give reference.path: "
            "the model that it started from, or model.path again"
        )
    if preference != "none":
        raise UserError(
            f"reference.path=null with model.path={model}: a preference run made it, and its weights are not that run's "
            "reference; give reference.path, the run's own to continue it, or model.path again for a new round"
        )


def write_json(path: Path, value: object) -> None:
    """Written aside and renamed, so that a reader never sees half of it; without secrets."""
    write_atomic(path, json.dumps(redacted(value), indent=2) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_status(folder: Path) -> dict:
    """The run's `status.json`; a state of "absent" where it never came to write one, or a machine that died left half."""
    absent = {"state": "absent", "reason": "", "step": None}
    with suppress(FileNotFoundError, ValueError):
        found = read_json(folder / "status.json")
        return absent | found if isinstance(found, dict) else absent
    return absent


def stamp(folder: Path) -> tuple[int, int] | None:
    """What changes whenever a process writes the status of `folder`; None before the first."""
    with suppress(FileNotFoundError, NotADirectoryError):  # a file in the folder's place is refused by `recording`
        found = (folder / "status.json").stat()
        return found.st_ino, found.st_mtime_ns


def write_status(
    folder: Path, state: str, reason: str = "", step: int | None = None, model_step: int | None = None
) -> None:
    """`status.json`: state running | finished | interrupted | failed, the reason in one line, the updates made; `model_step`,
    where model/ is of an earlier step.

    Exit codes do not pass through torchrun, so this file is where a script looks.
    """
    of_model = {} if model_step is None else {"model_step": model_step}
    write_json(folder / "status.json", {"state": state, "reason": reason, "step": step} | of_model)


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_environment(folder: Path, device: torch.device, *, first_step: int = 0, **facts: object) -> None:
    """Writes `environment.json`: code revision, versions, devices, command line, and `facts`.

    Where a run resumes at `first_step`, `before` has the same of its earlier starts.
    """
    packages = ("transformers", "tokenizers", "numpy", "datasets", "wandb", "hydra-core")
    git_status = _git("status", "--porcelain")
    path = folder / "environment.json"
    before = []
    if first_step:
        with suppress(FileNotFoundError, ValueError):
            earlier = read_json(path)
            before = [*earlier.pop("before"), earlier]
    here = {
        "command": [sys.executable, *sys.argv],
        "git_revision": _git("rev-parse", "HEAD"),
        "git_dirty": None if git_status is None else bool(git_status),
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__} | {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "world_size": dist.world_size(),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "first_step": first_step,
        **facts,
    }
    write_json(path, here | {"before": before})


class Status:
    """How a run ends, as the loop sees it: `recording` writes it down whichever way the block is left."""

    state = "finished"
    reason = ""
    step = 0
    model_step: int | None = None


def lock(folder: Path) -> TextIO:
    """The file whose lock says that a process is at work in `folder`; the system frees it however that process ends."""
    with fixable(f"run_dir={folder}: cannot be written", "; use another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run_dir={folder}: another process is at work in it; wait for it, or give another"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"run_dir={folder}: cannot be locked ({error.strerror}); see that no second run uses it", flush=True)
    return file


@contextmanager
def recording(folder: Path, settings: str, step: int = 0, seen: tuple[int, int] | None = None) -> Iterator[Status]:
    """Makes the run's folder with its config.yaml, and keeps `status.json` true: running, then how it ended.

    `seen` is the folder's `stamp` from when this process first looked into it. Raises UserError, on all ranks: the folder
    cannot be written, another process is at work in it, or has been since.
    """
    status, held = Status(), []
    status.step = step

    def begin() -> None:
        held.append(lock(folder))
        if stamp(folder) != seen:
            raise UserError(f"run_dir={folder}: another process was at work in it until just now; start again")
        with fixable(f"run_dir={folder}: cannot be written", "; use another folder"):
            for left in [path for path in folder.glob("*.part") if path.is_file()]:  # by a start that was killed
                left.unlink()
            write_atomic(folder / "config.yaml", settings)
            write_status(folder, "running", step=step)

    dist.on_main(begin)
    try:
        yield status
        # Together: a launcher may kill rank 0 as soon as another has left.
        dist.on_main(write_status, folder, status.state, status.reason, status.step, status.model_step)
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
        with suppress(OSError):  # a full disk, or another node's folder, must not hide the error itself
            if read_status(folder)["state"] != "failed":  # the first rank to fail knows why, the others only that
                state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                if error.args and state == "interrupted":
                    reason = signal.Signals(error.args[0]).name
                write_status(folder, state, reason, status.step)
        raise
    finally:
        for file in held:
            file.close()
