"""Hydra's multirun: cells checked before the first starts, what they share, how a failed one is recorded, and the table.

A sweep's folder holds one numbered child per cell, `sweep.csv`, `sweep.json` and `sweep.png`.
"""

import csv
import datetime
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch.distributed as torch_dist
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode

from rpo import dist
from rpo.config import set_sweep_dir, train_config
from rpo.errors import UserError
from rpo.runs import folder as run_folder
from rpo.runs import log, process
from rpo.text import redacted

T = TypeVar("T")
Settings = TypeVar("Settings")  # Train, or Eval
# Where a rank waits for the others to fail too; past it they are taken to hang in a collective.
_PATIENCE = datetime.timedelta(seconds=60)
_SHOWN = tuple(
    f"{split}/{name}"
    for split in ("eval", "train")
    for name in ("gold", "rewards/accuracies", "shift/chosen", "nll/chosen")
)

_ROWS = 12  # of panels in a picture


def in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


_KEPT: dict[Callable[..., Any], tuple[tuple, Any]] = {}


def shared(build: Callable[..., T]) -> Callable[..., T]:
    """`build`; in a sweep, with arguments equal to those of the last cell that called it, the very object it returned then.

    The arguments are the whole key: a builder sees nothing else, so no setting that it reads can be left out. One value
    is kept per builder. Whoever changes what is shared puts it back (`prepare.policy`).
    """

    @wraps(build)
    def call(*args: Any, **kwargs: Any) -> T:
        if not in_sweep():
            return build(*args, **kwargs)
        key = args, kwargs
        if call not in _KEPT or _KEPT[call][0] != key:
            if _KEPT.pop(call, None) is not None:
                gc.collect()  # before the next is built: a sharded model is full of cycles
            _KEPT[call] = key, build(*args, **kwargs)
        return _KEPT[call][1]

    return call


def placed(cfg: Settings) -> Settings:
    """`cfg` with the run_dir that Hydra's own keys name, or in a sweep its numbered child, and the sweep's wandb group.

    Raises UserError for keys of Hydra's that would put files or the working directory elsewhere.
    """
    if not in_sweep():
        return replace(cfg, run_dir=_run_dir(cfg.run_dir, HydraConfig.get()))
    folder = Path(HydraConfig.get().sweep.dir)
    wandb = replace(cfg.wandb, group=cfg.wandb.group or folder.name)
    return replace(cfg, run_dir=str(folder / str(HydraConfig.get().job.num)), wandb=wandb)


def _run_dir(run_dir: str | None, hydra: Any) -> str | None:
    """`run_dir`, which Hydra calls hydra.run.dir, and hydra.sweep.dir in a sweep. Raises UserError."""
    used, other = ("sweep", "run") if hydra.mode == RunMode.MULTIRUN else ("run", "sweep")
    refused = {
        f"hydra.{other}.dir": (".", "give run_dir"),
        "hydra.sweep.subdir": (".", "a cell's folder is its number"),
        "hydra.output_subdir": ("null", "the run's folder has its config.yaml"),
        "hydra.job.chdir": ("false", "paths start from the folder of the command"),
    }
    for key, _, value in (text.lstrip("+").partition("=") for text in sys.argv[1:]):  # as typed, nothing resolved
        if key in refused and value.lower() != refused[key][0]:
            raise UserError(f"{key}={value}: not used here, {refused[key][1]}; remove it")
    folder = hydra[used].dir
    if folder == ".":
        return run_dir
    if run_dir is not None:
        raise UserError(
            f"hydra.{used}.dir={folder} with run_dir={run_dir}: two names for one folder; give run_dir alone"
        )
    return folder


def run_job(job: Callable[[], str]) -> None:
    """Runs a job to the end of its process, which exits with the code of its `process.outcome`.

    Or as a cell of a sweep, whose failure is a row of the table. A signal ends the sweep: in a cell, while one ends, and
    between two.
    """
    if not in_sweep():
        code, _ = process.outcome(job)
        dist.leave(code)
        return
    between = process.Interrupt.innermost  # None in a launcher's own process
    if between is not None and (signum := dist.highest(between.received)):
        print(f"interrupted before cell {HydraConfig.get().job.num}", file=sys.stderr, flush=True)
        code = 128 + signum
    else:
        code, reason = process.outcome(job)
    if code >= 128:
        if dist.is_main():
            _closed(Path(HydraConfig.get().sweep.dir))
        dist.leave(code)
    if code:
        _KEPT.clear()  # a cell that breaks off leaves gradients where no one looks for them
        _record_failure(reason)
    gc.collect()  # a sharded model is full of cycles; the next cell needs its memory


def _record_failure(reason: str) -> None:
    """Records the failed cell and continues, if all ranks failed; a rank that failed alone leaves the others hanging."""
    folder, number = Path(HydraConfig.get().sweep.dir), HydraConfig.get().job.num
    cell = folder / str(number)
    cell.mkdir(parents=True, exist_ok=True)
    status = run_folder.read_status(cell)
    if status["state"] != "failed":  # with a reason of its own, perhaps of an earlier start
        run_folder.write_status(cell, "failed", reason, status["step"])
    if torch_dist.is_initialized() and dist.world_size() > 1:
        store = torch_dist.distributed_c10d._get_default_store()
        store.set(f"failed/{number}/{dist.rank()}", "yes")
        try:
            store.wait([f"failed/{number}/{rank}" for rank in range(dist.world_size())], _PATIENCE)
        except torch_dist.DistStoreError:
            write_table(folder)
            print(f"error: cell {number} failed on rank {dist.rank()} alone; the sweep ends here", file=sys.stderr)
            sys.exit(1)


class Sweep(Callback):
    """Hydra's hooks around a multirun: all cells are checked before the first starts, the table made after the last.

    SystemExit is how they refuse, because Hydra turns a callback's exceptions into warnings. Launchers send a copy to
    their processes, which needs no lock and no handlers.
    """

    def __getstate__(self) -> dict:
        return {}

    def on_multirun_start(self, config: Any, **_: object) -> None:
        self.interrupt = process.Interrupt().__enter__()  # as long as this process lives
        try:
            cells = _checked_cells(config)
            dist.init(config.timeout + dist.GRACE)  # kept for all cells; also how ranks agree on the folder
            rows = [{"cell": i} | cell for i, cell in enumerate(cells)]
            folder = _folder(config, rows)
            self.held: list[TextIO] = []  # as long as this process lives
            dist.on_main(lambda: self.held.append(run_folder.lock(folder)))
        except Exception as error:  # Hydra would warn of it and start the sweep unchecked
            print(f"error: {redacted(str(error))}", file=sys.stderr, flush=True)
            dist.shutdown()
            sys.exit(2 if isinstance(error, UserError) else 1)
        except KeyboardInterrupt as stop:
            print("interrupted before the first cell", file=sys.stderr, flush=True)
            dist.leave(128 + stop.args[0])
        self.interrupt.defer()  # between cells, where `run_job` looks
        set_sweep_dir(config, folder)
        torch_dist.barrier()  # the look above comes before rank 0's first file
        if dist.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            run_folder.write_json(folder / "sweep.json", rows)
            print(f"{folder}: {len(cells)} cells", flush=True)

    def on_job_start(self, config: Any, **_: object) -> None:
        if in_sweep():  # Hydra's own copy of the settings has the secrets that sweep.json and config.yaml leave out
            (Path(HydraConfig.get().sweep.dir) / "multirun.yaml").unlink(missing_ok=True)

    def on_multirun_end(self, config: Any, **_: object) -> None:
        dist.leave(dist.broadcast(_closed(Path(config.hydra.sweep.dir)) if dist.is_main() else 0))


def _folder(config: Any, rows: list[dict]) -> Path:
    """The sweep's folder: a new one, or with resume=auto one that holds these very cells. Raises UserError."""
    run_dir = _run_dir(config.run_dir, config.hydra)
    folder = run_folder.choose(run_dir, "sweep", continues="sweep.json" if config.resume == "auto" else None)
    held = run_folder.read_json(folder / "sweep.json") if (folder / "sweep.json").exists() else []
    if held and [{key: row.get(key) for key in rows[0]} for row in held] != redacted(rows):
        raise UserError(f"run_dir={folder}: holds a sweep of other cells; give its command again, or another run_dir")
    return folder


class NoSweep(Callback):
    """Refuses -m for eval.py, whose several models belong into one table."""

    def on_multirun_start(self, config: Any, **_: object) -> None:
        print("error: -m: eval.py makes one table of several models: use model.path=[A,B] instead", file=sys.stderr)
        sys.exit(2)


def _checked_cells(config: Any) -> list[dict[str, str]]:
    """The overrides of every cell, each composed and checked as its run will be. Raises UserError."""
    if config.hydra.sweeper._target_ != f"{BasicSweeper.__module__}.BasicSweeper":
        raise UserError(
            f"hydra/sweeper={config.hydra.sweeper._target_}: only Hydra's basic sweeper lists its cells ahead"
        )
    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(config.hydra.overrides.task))
    for override in overrides:
        text = override.input_line
        if getattr(override.value(), "shuffle", False):  # sweep.csv's labels would be of another shuffle than the cells
            raise UserError(f"{text}: gives its values in another order each time; list them without shuffle")
        if override.key_or_group == "run_dir" and override.is_sweep_override():
            raise UserError(f"{text}: a cell's folder is its number; give one run_dir for the sweep")
    (cells,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    for cell in cells:
        train_config(loader.load_sweep_config(config, list(cell)))
    return [dict(override.split("=", 1) for override in cell) for cell in cells]


def _closed(folder: Path) -> int:
    """The sweep's exit code, its table written: 1 where a cell failed, or the table. Never an error, which Hydra drops."""
    try:
        return int(write_table(folder) > 0)
    except Exception as error:
        print(f"error: {folder}: the sweep's table could not be written: {error}; the cells are kept", file=sys.stderr)
        return 1


def write_table(folder: Path) -> int:
    """`sweep.csv`, `sweep.json` and `sweep.png` from what the cells have left so far; returns how many failed.

    A row is a cell: its overrides, how it ended, and its last evaluation (its last training line where it has none).
    """
    table = run_folder.read_json(folder / "sweep.json")
    told = {"cell", "seed"}  # what is no setting of a cell
    for row in table:
        cell = folder / str(row["cell"])
        row |= (status := run_folder.read_status(cell))
        events = log.read_jsonl(cell / "metrics.jsonl") if (cell / "metrics.jsonl").exists() else []
        evals = [event for event in events if event["split"] == "eval"] or events
        last = evals[-1] if evals else {}
        # Prefixed, because `loss` is also the name of a group that a sweep sets.
        row |= {f"{last['split']}/{k}": v for k, v in last.items() if k not in ("split", "time", "step", "pairs")}
        told |= status.keys() | {key for key in row if key.startswith(("eval/", "train/"))}
    run_folder.write_json(folder / "sweep.json", table)
    columns = list(dict.fromkeys(key for row in table for key in row))
    with (folder / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)
    swept = [key for key in table[0] if key not in told and len({row.get(key) for row in table}) > 1]
    axes = sorted((key for key in swept if "." in key), key=lambda key: key not in ("loss.beta", "loss.eta"))[:2]
    if axes and any(value in row for row in table for value in _SHOWN):
        _draw(table, axes, [key for key in swept if key not in axes], folder / "sweep.png")
    num_failed = sum(row["state"] == "failed" for row in table)
    print(f"{folder / 'sweep.csv'}: {len(table)} cells, {num_failed} failed", flush=True)
    return num_failed


def _draw(table: list[dict], axes: list[str], apart: list[str], path: Path) -> None:
    """The picture, a row of panels for each setting of `apart`; none, and one line, where they are too many to look at."""
    from rpo.training import figures  # matplotlib takes a second

    if (rows := len(figures.settings_of(table, apart))) > _ROWS:
        path.unlink(missing_ok=True)
        print(f"{path}: not drawn, {', '.join(apart)} have {rows} settings; sweep.csv has all cells", flush=True)
        return
    draw = figures.draw_line if len(axes) == 1 else figures.draw_heatmap
    draw(table, *axes, _SHOWN, path, apart)
