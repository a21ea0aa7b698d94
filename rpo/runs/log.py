"""A run's log: metrics.jsonl and samples.jsonl always, the same in wandb and TensorBoard where they are wanted.

The only module that imports wandb, and only where a run wants it.
"""

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rpo.config import Log, Train, Wandb, to_dict
from rpo.errors import UserError, fixable, require
from rpo.files import to_lines, write_atomic
from rpo.text import first_line, redacted

INIT_TIMEOUT = 20  # seconds that wandb may take to reach its server before the run continues offline


def wandb_mode(cfg: Wandb) -> str:
    """What `wandb.mode` comes to: disabled, offline or online. Looks for a key, asks nobody.

    Raises UserError where `online` was asked for by name and no key is configured, or WANDB_MODE is no mode.
    """
    wanted = cfg.mode
    if wanted == "auto":
        named = os.environ.get("WANDB_MODE") or "auto"
        wanted = {"dryrun": "offline", "run": "online", "shared": "online"}.get(named, named)  # wandb's other names
        known = ("auto", "disabled", "offline", "online")
        require(wanted in known, f"WANDB_MODE={named}: expected online, offline or disabled")
    if wanted in ("disabled", "offline") or (wanted == "online" and cfg.mode == "auto"):
        return wanted
    if _has_key():
        return "online"
    if cfg.mode == "online":
        raise UserError(
            "wandb.mode=online: no API key is configured; run `wandb login`, set WANDB_API_KEY, or use wandb.mode=offline"
        )
    return "offline"


def _has_key() -> bool:
    """Whether wandb itself finds a key for its server: in the environment, .netrc or its settings."""
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        host = wandb.setup().settings.base_url
        return bool(wbauth.authenticate_session(host=host, source="rpo", prompt=False, update_session=False))
    except Exception:  # a key of the wrong form, settings that cannot be read: when a run begins wandb says which
        return True


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """wandb records it of its own accord when it starts."""
    argv, sys.argv = sys.argv, redacted(sys.argv)
    try:
        yield
    finally:
        sys.argv = argv


FILES = ("metrics.jsonl", "samples.jsonl")
# What wandb's table of runs shows beside the last value, where one direction is the better.
BEST = {"eval/rewards/accuracies": "max", "eval/gold": "max", "eval/loss/preference": "min", "eval/nll/chosen": "min"}


def check_tensorboard(cfg: Log) -> None:
    """Raises UserError where its files are wanted and nothing can write them."""
    require(
        not cfg.tensorboard or find_spec("tensorboard") is not None,
        "log.tensorboard=true: needs tensorboard; pip install -e '.[tensorboard]'",
    )


class RunLog:
    """The run's log: FILES in its folder, and the wandb run where there is one.

    Every rank calls it, the one with `enabled` writes. A context manager: what is open is closed however it is left. Given
    the folder and `position` of a checkpointed log it resumes `after` it: later lines are cut off and will be written
    again, but not sent to wandb again. Another folder's files are copied.
    """

    def __init__(self, run_dir: Path, cfg: Train, *, enabled: bool, after: tuple[Path, dict] | None = None):
        self.run_dir, self.enabled, self.run, self.writer = run_dir, enabled, None, None
        if not enabled:
            return
        source, position = after or (run_dir, {"events": 0, "seconds": 0.0} | dict.fromkeys(FILES, 0))
        if source.resolve() != run_dir.resolve():
            for path in [source / name for name in FILES if (source / name).exists()]:
                shutil.copyfile(path, run_dir / path.name)
        self.num_events, self.start = position["events"], time.monotonic() - position["seconds"]
        num_cut = sum(_cut(run_dir / name, position[name]) for name in FILES)
        if cfg.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            path = run_dir / FILES[0]
            last = max((event["step"] for event in read_jsonl(path)), default=-1) if path.exists() else -1
            # Purged: what a stopped run had beyond its last checkpoint.
            self.writer = SummaryWriter(run_dir / "tensorboard", purge_step=last + 1)
        if (mode := wandb_mode(cfg.wandb)) != "disabled":
            self._start(cfg.wandb, to_dict(cfg), mode, num_cut)

    def _start(self, cfg: Wandb, settings: dict, mode: str, num_cut: int) -> None:
        import wandb

        kept = self.run_dir / "wandb" / "resume.json"  # the run's id, and how many of its events wandb has had
        try:
            earlier = json.loads(kept.read_text())
            sent = max(earlier["sent"], self.num_events + num_cut)
        except (FileNotFoundError, ValueError):  # a new run, or a fork, or a machine that died while it was written
            earlier, sent = {"id": uuid.uuid4().hex[:8]}, self.num_events
        name = self.run_dir.name if cfg.group is None else f"{cfg.group}/{self.run_dir.name}"
        own = {key: getattr(cfg, key) for key in ("entity", "project", "group", "job_type", "tags", "notes")}
        shown = redacted(own | {"name": name, "config": settings})
        for attempt in dict.fromkeys([mode, "offline"]):
            try:  # create_new, because a sweep makes several runs in one process
                with _redacted_command_line():
                    self.run = wandb.init(
                        id=earlier["id"],
                        dir=self.run_dir,
                        mode=attempt,
                        reinit="create_new",
                        resume="allow" if attempt == "online" else None,
                        settings=wandb.Settings(silent=True, init_timeout=INIT_TIMEOUT),
                        **shown,
                    )
                break
            except Exception as error:  # no server, a broken environment: a run is worth more than its dashboard
                reason = redacted(" ".join(str(error).split())[:200])
                if cfg.mode == "online":
                    raise UserError(
                        f"wandb.mode=online: {reason}; use wandb.mode=offline, `wandb sync` later"
                    ) from None
                instead = "this run is offline" if attempt == "online" else "this run goes without"
                print(f"wandb: {reason}; {instead}", flush=True)
        else:
            return
        if self.run.id != earlier["id"]:  # an agent's run takes the agent's id, and has had no event yet
            sent = self.num_events
        self.num_sent = self.run.starting_step if self.run.resumed else sent
        kept.parent.mkdir(exist_ok=True)
        write_atomic(kept, json.dumps({"id": self.run.id, "sent": self.num_sent}))
        self.run.define_metric("pairs")
        self.run.define_metric("*", step_metric="pairs")
        for metric, best in BEST.items():
            self.run.define_metric(metric, step_metric="pairs", summary=f"{best},last")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()
        if kind is not None and issubclass(kind, Exception):
            self.alert(f"ended by {kind.__name__}: {first_line(error)}")
        if self.run is not None:
            self.run.finish(exit_code=0 if kind is None else 1)

    def alert(self, text: str) -> None:
        """A message to whoever watches the run in wandb; wandb decides how it arrives."""
        if self.run is not None:
            self.run.alert(self.run_dir.name, redacted(text))

    def position(self) -> dict | None:
        """How long the log is, for a resumed run to continue it: events, seconds, bytes on disk. None on other ranks."""
        if not self.enabled:
            return None
        sizes = {name: _on_disk(self.run_dir / name) for name in FILES}
        return {"events": self.num_events, "seconds": round(time.monotonic() - self.start, 3), **sizes}

    def metrics(self, split: str, step: int, pairs: int, values: dict[str, float]) -> None:
        """One event, after `step` updates and `pairs` pairs."""
        if not self.enabled:
            return
        event = {"split": split, "step": step, "pairs": pairs, "time": round(time.monotonic() - self.start, 3)}
        self._append("metrics.jsonl", [event | values])
        for name, value in values.items() if self.writer is not None else ():
            self.writer.add_scalar(f"{split}/{name}", value, step, new_style=True, double_precision=True)
        self._send({"pairs": pairs, "step": step} | {f"{split}/{name}": v for name, v in values.items()})

    def samples(self, step: int, pairs: int, rows: list[dict[str, str]]) -> None:
        """Held-out prompts with the policy's and the reference's answers."""
        if not self.enabled:
            return
        self._append("samples.jsonl", [{"step": step, **row} for row in rows])
        if self.run is not None:
            import wandb

            columns = ["step", *rows[0]]
            table = wandb.Table(columns=columns, data=[[step, *row.values()] for row in rows])
            self._send({"pairs": pairs, "samples": table})

    def _append(self, name: str, events: list[dict]) -> None:
        path = self.run_dir / name
        fix = f"repeat the command with run_dir={self.run_dir} to resume from the newest checkpoint"
        with fixable(f"{path}: cannot be written", f"; free some space, and {fix}"), path.open("a") as file:
            file.write(to_lines(events))
        self.num_events += 1

    def _send(self, values: dict[str, Any]) -> None:
        if self.run is not None and self.num_events > self.num_sent:
            self.run.log(values, step=self.num_events - 1, commit=True)


def _on_disk(path: Path) -> int:
    """The bytes of a file, made sure to survive the machine; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _cut(path: Path, size: int) -> int:
    """Cuts a file of JSON lines back to `size` bytes; returns how many events that takes away (samples of a step are one)."""
    if not path.exists():
        if size:
            print(f"{path}: is gone; what it held until here is lost", flush=True)
        return 0
    whole = path.read_bytes()
    if len(whole) < size:
        print(f"{path}: ends {size - len(whole)} bytes before the checkpoint; what is missing is lost", flush=True)
    lines = whole[size:].split(b"\n")[:-1]  # not one that a full disk or a kill cut short, which was sent to nobody
    os.truncate(path, whole.rfind(b"\n", 0, size) + 1)
    return len(lines) if path.name == FILES[0] else len({line.split(b",")[0] for line in lines})


def read_jsonl(path: Path) -> list[dict]:
    """The events of a run's `metrics.jsonl`, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()]
