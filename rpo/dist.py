"""Processes and sharding: one path for one process, one GPU, and many nodes."""

import atexit
import datetime
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.attention.flex_attention  # these two register operators that PRODUCTS names
import torch.nn.attention.varlen
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from rpo.config import Fsdp, UserError

T = TypeVar("T")
GRACE = 60  # seconds that a collective of a run outlasts its watchdog, which can tell the step that hangs
# Weights cut over all ranks and nothing else: for what only scores and generates, and has no such keys.
PLAIN = Fsdp(
    shard_degree=None,
    replicate_degree=1,
    activation_checkpointing="none",
    reshard_after_forward=True,
    accumulate="unsharded",
    cpu_offload=False,
)


def init(timeout: int = 1800) -> torch.device:
    """This process's device, with the default process group up: torchrun's, or a group of one in plain python.

    A collective may take `timeout` seconds. A group that exists already (an earlier job of the same sweep) is kept.
    """
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Both back-ends: objects and barriers go over gloo, which needs no device.
        backend, limit = "cpu:gloo,cuda:nccl" if use_cuda else "gloo", datetime.timedelta(seconds=timeout)
        if "WORLD_SIZE" in os.environ:
            store, *place = next(dist.rendezvous("env://", timeout=limit))
            store.set_timeout(limit)
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                # Or ranks that --max-restarts brings back would look for each other at the addresses of those before
                # them. Several agents do not count alike: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has to do it.
                store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            how = dict(zip(("rank", "world_size"), place, strict=True))
            dist.init_process_group(backend, store=store, **how, timeout=limit, device_id=device if use_cuda else None)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def shutdown() -> None:
    """Destroys the process group if there is one; safe to call twice."""
    _hybrid_mesh.cache_clear()
    aside.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


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
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def is_main() -> bool:
    """True on the one process that writes files and talks."""
    return rank() == 0


def broadcast(value: object) -> object:
    """Rank 0's `value` on every rank (any picklable object)."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    dist.barrier()


@cache
def aside() -> dist.ProcessGroup:
    """A second group of all ranks, on hosts: for a thread, whose collectives would mix with the loop's in the first."""
    return dist.new_group(timeout=_timeout("cpu"), backend="gloo")


def _timeout(device_type: str) -> datetime.timedelta:
    """Of the default group's collectives; a group made beside it would get torch's own."""
    return dist.group.WORLD._get_backend(torch.device(device_type)).options._timeout


def thread() -> ThreadPoolExecutor:
    """One thread on this process's device: a new one would be on the first GPU, and take memory there."""
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(1)
    return ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """What `work` returns on each rank, in order, on every rank; an error of any is raised on all: none waits in vain."""
    outcome = _outcome(work)
    outcomes = [outcome] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, _sendable(outcome), group)
    outcomes[dist.get_rank(group)] = outcome
    for each in outcomes:
        _raise_if_error(each)
    return outcomes


def on_main(work: Callable[..., T], *args: object) -> T:
    """What `work` returns on rank 0, on every rank; where it fails there, all fail alike."""
    outcome = _outcome(partial(work, *args)) if is_main() else None
    sent = broadcast(_sendable(outcome))
    return _raise_if_error(outcome if is_main() else sent)


def _outcome(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except Exception as error:
        return error


def _sendable(outcome: object) -> object:
    """A bug's exception may hold what can not be pickled, and its traceback does not travel: it goes as text."""
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
        self.work = dist.all_reduce(self.highest, dist.ReduceOp.MAX, async_op=True)
        return agreed


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block, then the others do: for work whose result rank 0 leaves in a cache on disk.

    Where rank 0 fails the others follow all the same, and fail alike instead of waiting for it.
    """
    if not is_main():
        dist.barrier()
    try:
        yield
    finally:
        if is_main():
            dist.barrier()


def mesh(device: torch.device, cfg: Fsdp) -> DeviceMesh:
    """("shard",) over all processes, or ("replicate", "shard") where there are replicas: what the model is cut along.

    Neighbouring ranks make up a shard group, so that one which fits a node stays within it. Raises UserError unless
    the two degrees multiply to the world size.
    """
    world, replicate = world_size(), cfg.replicate_degree
    shard = cfg.shard_degree or world // replicate
    if replicate * shard != world:
        given = "null" if cfg.shard_degree is None else cfg.shard_degree
        divisors = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise UserError(
            f"fsdp.shard_degree={given}, fsdp.replicate_degree={replicate}: their product must be the world size, "
            f"{world}; set fsdp.shard_degree=null and fsdp.replicate_degree to one of {divisors}"
        )
    if replicate == 1:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
    return _hybrid_mesh(device.type, replicate, shard)


@cache  # the groups hold device memory, and policy and reference may share them
def _hybrid_mesh(device_type: str, replicate: int, shard: int) -> DeviceMesh:
    timeout = _timeout(device_type)  # which init_device_mesh does not ask for
    ranks = torch.arange(replicate * shard).view(replicate, shard)
    parts = {"replicate": ranks.T.tolist(), "shard": ranks.tolist()}
    groups = [dist.new_subgroups_by_enumeration(p, timeout, group_desc=name)[0] for name, p in parts.items()]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=tuple(parts))


# What `selective` keeps: the results of attention and of every matrix product are dear to recompute and small
# beside the pointwise intermediates, which are recomputed.
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.higher_order.flex_attention,
}


def _save_products(_ctx: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(layer: nn.Module, how: str) -> nn.Module:
    if how == "selective":
        return checkpoint_wrapper(layer, context_fn=partial(create_selective_checkpoint_contexts, _save_products))
    return checkpoint_wrapper(layer)


def shard(
    root: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh, cfg: Fsdp, *, compute_dtype: torch.dtype, compile: bool
) -> None:
    """Shards `root` in place with FSDP2, one unit per decoder layer and one for the rest; also at degree 1.

    Order: activation checkpointing, compile, shard. Masters keep their dtype (fp32, or float64), compute runs in
    `compute_dtype`, gradients are summed in fp32 or wider and never averaged: the loss is divided by global counts
    before the backward pass.
    """
    master = next(root.parameters()).dtype
    half = compute_dtype.itemsize < master.itemsize
    mp_policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if half else None, reduce_dtype=master if half else None, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy() if cfg.cpu_offload and mesh.device_type == "cuda" else OffloadPolicy()
    options = {"mesh": mesh, "mp_policy": mp_policy, "offload_policy": offload}
    for i, layer in enumerate(layers):
        if cfg.activation_checkpointing != "none":
            layer = layers[i] = checkpointed(layer, cfg.activation_checkpointing)
        if compile:
            layer.compile(dynamic=True)
        fully_shard(layer, reshard_after_forward=cfg.reshard_after_forward, **options)
    # The root holds embedding, final norm and head. The head's backward reads its weight again, so it stays gathered.
    fully_shard(root, reshard_after_forward=False, **options)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo has no PREMUL_SUM, which the divide factor would otherwise be sent as.
            module.set_force_sum_reduction_for_comms(True)


def reshard(root: nn.Module) -> None:
    """Frees what a forward pass without a backward left gathered: the root always stays so, and its layers may."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(root: FSDPModule, *, reshard_after_forward: bool) -> Iterator[None]:
    """Within the block a layer, once gathered, stays gathered: for generation, which calls it once per token."""
    units = [m for m in root.modules() if isinstance(m, FSDPModule) and m is not root]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    yield
    for unit in units:
        unit.set_reshard_after_forward(reshard_after_forward, recurse=False)
        unit.reshard()
