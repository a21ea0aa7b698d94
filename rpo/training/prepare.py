"""What a run starts from: a model loaded, proven, sharded and measured; in a sweep made once and put back for each cell."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from rpo import dist
from rpo.config import Train
from rpo.data import schedule
from rpo.data.batch import check_budget
from rpo.data.dataset import Rows
from rpo.errors import UserError
from rpo.model import fingerprint, hf, shard
from rpo.model import policy as model_policy
from rpo.model import probe as model_probe
from rpo.model.policy import Policy
from rpo.model.probe import mean_gap, packed_gap, why_not_packed
from rpo.training import reference
from rpo.training.meter import ModelSize

NUM_PROBE_PAIRS = 8


@dataclass(frozen=True)
class Ready:
    """A sharded model and what was found out about it."""

    policy: Policy
    size: ModelSize
    layout: str  # packed or padded: how this model's rows are laid out
    noise_floor: float  # nats per token by which rounding alone moves a log-prob
    identity: dict  # what its log-probs depend on beside the tokens
    state: list[Tensor] = field(repr=False)  # this rank's weights and buffers as they began, on the host; may be empty


def ready(
    cfg: Train,
    configs: dict[str, PreTrainedConfig],
    rows: Rows,
    device: torch.device,
    key: str,
    path: str | None,
    revision: str | None,
    *,
    longest: int,
    trainable: bool,
    keep_state: bool,
) -> Ready:
    """The model at `path`, which `key` names (None: random weights by cfg.seed), ready to score `rows` and be trained.

    No weight is left gathered, so an optimizer may be made. Prints one line where layout=auto comes to padded. Raises
    UserError: what `models.load` refuses; a model that can not be packed where layout=packed was asked for.
    """
    compute = shard.compute_dtype(cfg.model.dtype, device)
    master = torch.promote_types(compute, torch.float32)
    if path is None:
        lm = hf.build(configs["model.architecture"], cfg.seed, master)
    else:
        lm = hf.load(path, revision, master, key=key, trust_remote_code=cfg.model.trust_remote_code)
    size = ModelSize(**hf.sizes(lm))
    layout = "padded"
    if cfg.layout.kind != "padded":
        layout = _packed_unless(why_not_packed(lm, longest), cfg.layout.kind, key, path)
    weights = fingerprint.weights_digest(lm)
    policy = model_policy.prepare(
        lm,
        shard.mesh(device, cfg.fsdp),
        cfg.fsdp,
        compute_dtype=compute,
        compile=cfg.compile,
        trainable=trainable,
        attention=cfg.layout.attention if layout == "packed" else "sdpa",
    )
    indices = schedule.step_rows(0, len(rows), NUM_PROBE_PAIRS, cfg.seed)
    probe = schedule.plan_step(rows, indices, layout="padded", budget=cfg.tokens_per_microbatch).microbatches[0][0]
    how = {"positions": hf.positions_of(configs), "compute_dtype": compute}
    noise_floor = dist.broadcast(model_probe.noise_floor(policy, rows, probe, device, **how))
    if layout == "packed":  # again on these weights, this device, this backend, these rows
        gap = dist.broadcast(packed_gap(policy, rows, probe, device))
        differ = f"packed and padded differ by {gap:.1e} nats per token, rounding explains {noise_floor:.1e}"
        layout = _packed_unless(differ if not gap <= 3 * noise_floor + 1e-6 else None, cfg.layout.kind, key, path)
    shard.reshard(policy)
    how = {"compute_dtype": compute, "device": device, "layout": layout}
    identity = fingerprint.identity(weights, policy, **how)
    state = [_host_copy(tensor) for tensor in _tensors(policy)] if keep_state else []
    return Ready(policy, size, layout, noise_floor, identity, state)


def reference_logps(
    cfg: Train, model: Ready, rows: Rows, name: str, device: torch.device
) -> tuple[np.ndarray, dict[str, object]]:
    """Rows' log-probs under `model`, float64 (rows, 2), from the cache or scored into it; and where they came from."""
    check_budget(rows, model.layout, cfg.tokens_per_microbatch)
    found = reference.score_rows(
        model.policy,
        rows,
        model.identity,
        cache_dir=cfg.reference.cache_dir,
        layout=model.layout,
        budget=cfg.tokens_per_microbatch,
        device=device,
        noise_floor=model.noise_floor,
        name=name,
    )
    shard.reshard(model.policy)
    return found


def check_step_0(
    policy: Policy, live: Policy, rows: Rows, noise_floor: float, device: torch.device, *, layout: str, budget: int
) -> None:
    """Raises UserError unless two copies of the same weights agree on some pairs within rounding."""
    plan = schedule.plan_step(rows, np.arange(min(NUM_PROBE_PAIRS, len(rows))), layout=layout, budget=budget)
    gap = dist.broadcast(mean_gap(policy, live, rows, plan.microbatches[0][0], device, layout=layout))
    shard.reshard(policy)
    if not gap <= 3 * noise_floor + 1e-6:
        raise UserError(
            f"step 0: policy and reference are the same weights but differ by {gap:.1e} nats per token (rounding "
            f"explains {noise_floor:.1e}); usual causes: dropout, or two ways of computing one model"
        )


def _packed_unless(reason: str | None, asked: str, key: str, path: str | None) -> str:
    """The layout: packed where there is no reason against it. Raises UserError where it was asked for by name."""
    if reason is None:
        return "packed"
    if asked == "packed":
        raise UserError(f"layout=packed: {key}={path} can not be packed ({reason}); use layout=padded or auto")
    if dist.is_main():
        print(f"layout=padded, because {key}={path} can not be packed: {reason}", flush=True)
    return "padded"


@torch.no_grad()
def restore(ready: Ready) -> None:
    """Puts the weights back to what they were, bit for bit, and drops what an earlier cell left on them."""
    shard.reshard(ready.policy)
    for param in ready.policy.parameters():
        param.grad = None
    for tensor, start in zip(_tensors(ready.policy), ready.state, strict=True):
        tensor.copy_(start)


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor.clone()


def _tensors(policy: Policy) -> list[Tensor]:
    """This rank's share of each parameter, and the buffers (some rotary embeddings write theirs)."""
    params = [p.to_local() if isinstance(p, DTensor) else p for p in policy.parameters()]
    return [tensor.detach() for tensor in params] + list(policy.buffers())
