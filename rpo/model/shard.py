"""A model cut over ranks with FSDP2: the mesh, activation checkpointing, compile, shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from rpo import dist
from rpo.config import Fsdp
from rpo.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.utils.checkpoint import CheckpointPolicy

RECOMPILATIONS = 64  # of one layer's code, before torch gives up on it and all layers run eagerly

# Weights cut over all ranks and nothing else: for what only scores and generates, and has no such keys.
PLAIN = Fsdp(
    shard_degree=None,
    replicate_degree=1,
    activation_checkpointing="none",
    reshard_after_forward=True,
    accumulate="unsharded",
    cpu_offload=False,
)


def mesh(device: torch.device, cfg: Fsdp) -> DeviceMesh:
    """("shard",) over all processes, or ("replicate", "shard") where there are replicas: what the model is cut along.

    Neighbouring ranks make up a shard group, so that one which fits a node stays within it. Raises UserError unless
    the two degrees multiply to the world size.
    """
    from torch.distributed.device_mesh import init_device_mesh

    world, replicate = dist.world_size(), cfg.replicate_degree
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


@dist.until_shutdown  # the groups hold device memory, and policy and reference may share them
def _hybrid_mesh(device_type: str, replicate: int, shard: int) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    timeout = dist.timeout_of(device_type)  # which init_device_mesh does not ask for
    ranks = torch.arange(replicate * shard).view(replicate, shard)
    parts = {"replicate": ranks.T.tolist(), "shard": ranks.tolist()}
    groups = [torch_dist.new_subgroups_by_enumeration(p, timeout, group_desc=name)[0] for name, p in parts.items()]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=tuple(parts))


@cache
def products() -> set[Any]:
    """What `selective` keeps: attention and every matrix product, whose results cost much to recompute and are small.

    The pointwise intermediates are recomputed.
    """
    import torch.nn.attention.flex_attention  # these two register operators named below
    import torch.nn.attention.varlen

    aten = torch.ops.aten
    return {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.higher_order.flex_attention,
    }


def checkpointed(layer: nn.Module, how: str) -> nn.Module:
    """`layer`, whose activations are recomputed in backward: all of them (full), or all but `products` (selective)."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def save_products(_ctx: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in products() else CheckpointPolicy.PREFER_RECOMPUTE

    if how == "selective":
        return checkpoint_wrapper(layer, context_fn=partial(create_selective_checkpoint_contexts, save_products))
    return checkpoint_wrapper(layer)


@contextmanager
def not_recomputing(root: nn.Module) -> Iterator[None]:
    """Within the block checkpointed layers keep their activations."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    wrappers = [module for module in root.modules() if isinstance(module, CheckpointWrapper)]
    kept = [wrapper.checkpoint_fn for wrapper in wrappers]
    for wrapper in wrappers:
        wrapper.checkpoint_fn = lambda layer, *args, **kwargs: layer(*args, **kwargs)
    try:
        yield
    finally:
        for wrapper, recomputing in zip(wrappers, kept, strict=True):
            wrapper.checkpoint_fn = recomputing


def shared(root: nn.Module, layers: nn.ModuleList) -> str | None:
    """Which parameter two layers have in common, or a layer and the rest, so that FSDP cannot cut it; None without one."""
    owners: dict[int, int] = {}
    for i, layer in enumerate(layers):
        for name, param in layer.named_parameters():
            if owners.setdefault(id(param), i) != i:
                return f"{name} of layers {owners[id(param)]} and {i}"
    inside = {id(module) for module in layers.modules()}
    for name, module in root.named_modules():
        for own, param in module.named_parameters(recurse=False):
            if id(module) not in inside and id(param) in owners:
                return f"{name}.{own}, and in layer {owners[id(param)]}"
    return None


def shard(
    root: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh, cfg: Fsdp, *, compute_dtype: torch.dtype, compile: bool
) -> None:
    """Shards `root` in place with FSDP2, one unit per decoder layer and one for the rest; also at degree 1.

    Order: activation checkpointing, compile, shard. Masters keep their dtype (fp32, or float64), compute runs in
    `compute_dtype`, gradients are summed in fp32 or wider and never averaged: the loss is divided by global counts
    before the backward pass.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    master = max(
        (param.dtype for param in root.parameters()), key=lambda dtype: dtype.itemsize
    )  # an adapter's base is half
    half = compute_dtype.itemsize < master.itemsize
    mp_policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if half else None, reduce_dtype=master if half else None, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy() if cfg.cpu_offload and mesh.device_type == "cuda" else OffloadPolicy()
    if compile:  # all layers share code: two kinds of them, a live reference and padded rows use up torch's limit of 8
        torch._dynamo.config.recompile_limit = max(RECOMPILATIONS, torch._dynamo.config.recompile_limit)
    fully = partial(fully_shard, mesh=mesh, mp_policy=mp_policy, offload_policy=offload)
    for i, layer in enumerate(layers):
        if cfg.activation_checkpointing != "none":
            layer = layers[i] = checkpointed(layer, cfg.activation_checkpointing)
        if compile:
            next(layer.children()).register_forward_pre_hook(_note_eager)
            layer.compile(dynamic=True)
        fully(layer, reshard_after_forward=cfg.reshard_after_forward)
    # The root holds embedding, final norm and head. The head's backward reads its weight again, so it stays gathered.
    fully(root, reshard_after_forward=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            if mesh.size() > 1:  # alone it is 1, and torch would divide by it into a copy of the gradients
                module.set_gradient_divide_factor(1.0)
            # Gloo has no PREMUL_SUM, which the divide factor would otherwise be sent as.
            module.set_force_sum_reduction_for_comms(True)


_eager_calls = [0]  # of layers that are meant to run compiled


def _note_eager(_child: nn.Module, _args: object) -> None:
    if not torch.compiler.is_compiling():  # compiled code does not contain this hook
        _eager_calls[0] += 1


def eager_calls() -> int:
    """How often, in this process, a layer that is meant to run compiled did not."""
    return _eager_calls[0]


def sync_gradients(root: FSDPModule, *, last: bool, fsdp: Fsdp) -> None:
    """Before a micro-batch: whether its backward pass reduces gradients over the ranks, and frees the gathered weights.

    Until the `last` the root stays gathered, and so do layers that do not reshard after forward.
    """
    root.set_requires_gradient_sync(last or fsdp.accumulate == "sharded")
    root.set_requires_all_reduce(last)  # over replicas, of which there may be one
    root.set_reshard_after_backward(last, recurse=not fsdp.reshard_after_forward)


def shares(root: nn.Module, *, trained: bool = False) -> list[Tensor]:
    """This rank's share of each parameter, or of those that are `trained`."""
    from torch.distributed.tensor import DTensor

    params = [param for param in root.parameters() if param.requires_grad or not trained]
    return [(param.to_local() if isinstance(param, DTensor) else param).detach() for param in params]


def reshard(root: nn.Module) -> None:
    """Frees what a forward pass without a backward left gathered: the root always stays so, and its layers may."""
    from torch.distributed.fsdp import FSDPModule

    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(root: FSDPModule, *, reshard_after_forward: bool) -> Iterator[None]:
    """Within the block a layer, once gathered, stays gathered: for generation, which calls it once per token."""
    from torch.distributed.fsdp import FSDPModule

    _, *units = [module for module in root.modules() if isinstance(module, FSDPModule)]  # the first is the root
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:  # also where memory ran out: a sweep's next cell trains the same model
        for unit in units:
            unit.set_reshard_after_forward(reshard_after_forward, recurse=False)
            unit.reshard()


def compiles(setting: bool | str, device_type: str) -> bool:
    """What `compile` comes to on this kind of device: auto is on for CUDA and off for a CPU."""
    return device_type == "cuda" if setting == "auto" else setting


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """What `model.dtype` comes to on this device: auto is bfloat16 on CUDA and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
