"""Processes: ranks, their process group, and what all of them agree on; one path for one process, one GPU, and many nodes."""

import atexit
import datetime
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist

from rpo.errors import UserError

T = TypeVar("T")
GRACE = 60  # seconds that a collective of a run outlasts its watchdog, which can tell the step that hangs


_CACHES: list[Any] = []


def until_shutdown(make: Callable[..., T]) -> Callable[..., T]:
    """`make`, cached until the process group is destroyed: for what holds groups of its ranks."""
    _CACHES.append(cache(make))
    return _CACHES[-1]


def init(timeout: int = 1800, *, deterministic: bool = False) -> torch.device:
    """This process's device, with the default process group up: torchrun's, or a group of one in plain python.

    A collective may take `timeout` seconds. A group that exists already (an earlier job of the same sweep) is kept.
    `deterministic`: whether torch's operators have to give the same bits again, where the default ones on CUDA do not.
    """
    if deterministic != torch.are_deterministic_algorithms_enabled():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not, and torch raises
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # for code that reads it; ours does not
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if not torch_dist.is_initialized():
        # Both back-ends: objects and barriers go over gloo, which needs no device.
        backend, limit = "cpu:gloo,cuda:nccl" if use_cuda else "gloo", datetime.timedelta(seconds=timeout)
        if "WORLD_SIZE" in os.environ:
            store, rank, world_size = next(torch_dist.rendezvous("env://", timeout=limit))
            store.set_timeout(limit)
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                # Or ranks that --max-restarts brings back would look for each other at the addresses of those before
                # them. Several agents do not count alike: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has to do it.
                store = torch_dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            torch_dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=limit,
                device_id=device if use_cuda else None,
            )
        else:
            torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1)
    return device


def shutdown() -> None:
    """Destroys the process group if there is one; safe to call twice."""
    for cached in _CACHES:
        cached.cache_clear()
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def leave(code: int) -> None:
    """Ends the process with this exit code, the group destroyed; in plain python a code of 0 just returns.

    Under torchrun Python's finalisation is left out: gloo's threads outlive the group (DTensor's caches keep it), and one
    that comes late to free a tensor then aborts the process, which torchrun takes for a failure of the whole run. So it is
    after a signal: who interrupts twice does not want to wait for a thread that still writes a checkpoint.
    """
    shutdown()
    if "WORLD_SIZE" in os.environ or code >= 128:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def rank() -> int:
    return torch_dist.get_rank()


def world_size() -> int:
    return torch_dist.get_world_size()


def memory(device: torch.device) -> int:
    """Bytes that this process can have: its GPU's, or its share of this machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    """True on the one process that writes files and talks."""
    return rank() == 0


def broadcast(value: object) -> object:
    """Rank 0's `value` on every rank (any picklable object)."""
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def highest(value: int) -> int:
    """The highest `value` of any rank, on every rank."""
    box = torch.tensor([value])
    torch_dist.all_reduce(box, torch_dist.ReduceOp.MAX)
    return int(box)


def barrier() -> None:
    torch_dist.barrier()


@until_shutdown
def aside() -> torch_dist.ProcessGroup:
    """A second group of all ranks, on hosts: for a thread, whose collectives would mix with the loop's in the first."""
    return torch_dist.new_group(timeout=timeout_of("cpu"), backend="gloo")


def timeout_of(device_type: str) -> datetime.timedelta:
    """Of the default group's collectives; a group made beside it would get torch's own."""
    return torch_dist.group.WORLD._get_backend(torch.device(device_type)).options._timeout


def thread() -> ThreadPoolExecutor:
    """One thread on this process's device: a new one would be on the first GPU, and take memory there."""
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(1)
    return ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))


def together(work: Callable[[], T], group: torch_dist.ProcessGroup | None = None) -> list[T]:
    """What `work` returns on each rank, in order, on every rank; an error of any is raised on all: none waits in vain."""
    outcome = _outcome(work)
    outcomes = [outcome] * torch_dist.get_world_size(group)
    torch_dist.all_gather_object(outcomes, _sendable(outcome), group)
    outcomes[torch_dist.get_rank(group)] = outcome
    for each in outcomes:
        _raise_if_error(each)
    return outcomes


@until_shutdown
def _turns() -> Iterator[int]:
    return itertools.count(1)


@contextmanager
def _waiting_for_main() -> Iterator[None]:
    """On rank 0 the block; the others end theirs when rank 0 has ended its own.

    They ask the store, which has no limit of time as a collective has: rank 0 may tokenise or ask a judge for hours. It
    lives as long as rank 0 or its agent, so nobody waits for a rank that is lost.
    """
    if world_size() == 1:
        yield
        return
    store, turn, pause = torch_dist.distributed_c10d._get_default_store(), next(_turns()), 0.001
    try:
        yield
    finally:
        if is_main():
            store.add("turns of rank 0", 1)
    while not is_main() and store.add("turns of rank 0", 0) < turn:
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def on_main(work: Callable[..., T], *args: object) -> T:
    """What `work` returns on rank 0, on every rank; where it fails there, all fail alike. It may take as long as it likes."""
    outcome = None
    with _waiting_for_main():
        if is_main():
            outcome = _outcome(partial(work, *args))
    sent = broadcast(_sendable(outcome))
    return _raise_if_error(outcome if is_main() else sent)


def _outcome(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except Exception as error:
        return error


def _sendable(outcome: object) -> object:
    """A bug's exception may hold what cannot be pickled, and its traceback does not travel: it goes as text."""
    if not isinstance(outcome, Exception) or isinstance(outcome, (UserError, OSError)):
        return outcome
    return RuntimeError("".join(traceback.format_exception(outcome)))


def _raise_if_error(outcome: T) -> T:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class Vote:
    """Which signal any rank has received, agreed once per step without a wait: the answer is a step old.

    A tiny all-reduce between hosts that runs beside the step; the device knows nothing of it.
    """

    def __init__(self) -> None:
        self.highest, self.work = torch.zeros(1, dtype=torch.int64), None

    def cast(self, signum: int) -> int:
        """Casts this step's vote, 0 for none; returns, on all ranks alike, the highest of the step before."""
        if world_size() == 1:
            return signum
        agreed = 0
        if self.work is not None:
            self.work.wait()
            agreed = int(self.highest)
        self.highest = torch.tensor([signum])
        self.work = torch_dist.all_reduce(self.highest, torch_dist.ReduceOp.MAX, async_op=True)
        return agreed


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block, then the others do: for work whose result rank 0 leaves in a cache on disk.

    Where rank 0 fails the others follow all the same, and fail alike instead of waiting for it.
    """
    with _waiting_for_main():
        if is_main():
            yield
    if not is_main():
        yield
