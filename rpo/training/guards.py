"""Watches over a run: hangs, out-of-memory errors, and losses or gradients that are not finite."""

import faulthandler
import os
import platform
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from rpo import dist
from rpo.config import Train
from rpo.data.dataset import Rows
from rpo.data.schedule import Plan
from rpo.errors import UserError
from rpo.runs import folder as run_folder


@contextmanager
def watchdog(run_dir: Path, timeout: int) -> Iterator[Callable[[str], None]]:
    """A function that says what this rank begins; what then takes over `timeout` seconds ends the process with 1.

    status.json and stderr name rank, host and what it was, and all threads' tracebacks show where it stood. Needed beside
    the collectives' own timeouts, which know no step, and NCCL's, which aborts.
    """
    steps = queue.SimpleQueue()

    def watch() -> None:
        what, patience = "", None
        while True:
            try:
                what, patience = steps.get(timeout=patience), timeout
            except queue.Empty:
                where = f"rank {dist.rank()} ({platform.node()})"
                _give_up(run_dir, f"{what} on {where} took over timeout={timeout} seconds")
            if not what:
                return

    thread = threading.Thread(target=watch, daemon=True, name="watchdog")
    thread.start()
    try:
        yield steps.put
    finally:
        steps.put("")
        thread.join()


def _give_up(run_dir: Path, why: str) -> None:
    why += ": a rank is lost, or waits in another collective; raise timeout if it was only slow"
    faulthandler.dump_traceback(all_threads=True)
    print(f"error: {why}", file=sys.stderr, flush=True)
    with suppress(OSError):
        status = run_folder.read_status(run_dir)
        if status["state"] != "failed":
            run_folder.write_status(run_dir, "failed", why, status["step"])
    os._exit(1)


@contextmanager
def naming_memory(rows: Rows, members: np.ndarray, cfg: Train) -> Iterator[None]:
    """Within the block running out of memory becomes a UserError: rank, micro-batch, its longest row, the key to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if not out:
            raise
        lengths = rows.prompt[members] + rows.chosen[members] + rows.rejected[members]
        worst = int(lengths.argmax())
        lower = f"tokens_per_microbatch={cfg.tokens_per_microbatch}"
        if len(members) == 1:
            lower = f"data.max_length={cfg.data.max_length}"
        raise UserError(
            f"out of memory on rank {dist.rank()} in a micro-batch of {len(members)} pairs and {lengths.sum()} tokens, the "
            f"longest {rows.where(int(members[worst]))} with {lengths[worst]}: lower {lower}, or set "
            "fsdp.activation_checkpointing=full"
        ) from None


def not_finite(step: int, rows: Rows, plan: Plan) -> str:
    """What to tell of a step whose loss or gradient was not finite: its rows, and what to try."""
    indices = plan.rows(step)
    lines = {
        name: sorted(int(rows.line[i]) for i in indices if rows.files[rows.file[i]] == name) for name in rows.files
    }
    places = "; ".join(f"{name}:{','.join(map(str, numbers))}" for name, numbers in lines.items() if numbers)
    return (
        f"step {step}: the loss or its gradient is not finite; no update was made from it on, and model/ holds the "
        f"weights before it. Start another run with a lower optim.lr, or look at the step's rows: {places}"
    )


def broken(step: int) -> str:
    """What to tell of weights that an update of finite numbers has made infinite or NaN."""
    return (
        f"step {step}: the weights are not finite, which an update since the last checkpoint has made them; they are not "
        "saved. Start another run with a lower optim.lr"
    )
