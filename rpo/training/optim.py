"""AdamW, the learning-rate schedule, and an update that a non-finite number cannot reach."""

import math
import re

import torch
from torch import Tensor, nn

from rpo.config import Optim
from rpo.errors import UserError

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(^|\.|_)norm($|\.)")


def adamw(model: nn.Module, cfg: Optim) -> torch.optim.AdamW:
    """Fused AdamW over the sharded fp32 masters; vectors, norms and biases take no weight decay.

    Moments are in cfg.state_dtype; bfloat16 halves them (CUDA only). To be made while nothing is gathered: FSDP's root
    stays so after a forward without a backward, and what `parameters()` then gives are copies that nobody reads again.
    """
    from torch.distributed.tensor import DTensor

    params = [p for p in model.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) for p in params), "a gathered parameter would be updated in vain"
    exempt = _exempt(model)
    groups = [
        {"params": [p for p in params if id(p) not in exempt], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if id(p) in exempt], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=tuple(cfg.betas), fused=True)
    for p in params:  # what the first update would make; the fused kernel keeps the dtype that it finds
        dtype = torch.bfloat16 if cfg.state_dtype == "bfloat16" else p.dtype
        moments = {name: torch.zeros_like(p, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def _exempt(model: nn.Module) -> set[int]:
    """The ids of vectors, and of what a norm has or a name calls a bias or norm, as Trainer does: both may be matrices."""
    found = {id(p) for p in model.parameters() if p.ndim < 2}
    for path, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if "Norm" in type(module).__name__ or _NO_DECAY.search(f"{path}.{name}".lower()):
                found.add(id(param))
    return found


def check_moments(state_dtype: str, device_type: str) -> None:
    """Raises UserError where the fused AdamW of this torch has no such moments on this kind of device."""
    if state_dtype == "bfloat16" and device_type == "cpu":
        raise UserError("optim.state_dtype=bfloat16: the CPU's fused AdamW has no such moments; use float32")
    if state_dtype == "bfloat16" and torch.__version__ < (2, 12):
        raise UserError(
            f"optim.state_dtype=bfloat16: needs torch 2.12 or newer, this is {torch.__version__}; use float32, or "
            "pip install -U torch"
        )


def lr_at(step: int, total_steps: int, cfg: Optim) -> float:
    """The learning rate of update `step` (0-based) of `total_steps`.

    Linear warm-up over `warmup_ratio` of the run, the first update at lr/warmup, then `schedule` down to
    `min_lr_ratio` x lr, reached by the last update's successor (as Hugging Face's schedules do).
    """
    warmup = math.ceil(cfg.warmup_ratio * total_steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    match cfg.schedule:
        case "constant":
            return cfg.lr
        case "linear":
            shape = 1 - progress
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * shape)


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """The gradient's global L2 norm before clipping, fp32 or wider, as a device scalar (no synchronisation)."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    from torch.distributed.tensor import DTensor

    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def step_if_finite(optimizer: torch.optim.AdamW, bad: Tensor, lr: float) -> None:
    """One update, unless the device flag `bad` (bool scalar) is set: then weights, moments and step count stay.

    The fused kernel reads the flag on the device (the hook that GradScaler uses), so nothing waits for the host.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    where = optimizer.param_groups[0]["params"][0].device  # the host's with fsdp.cpu_offload, which waits for the copy
    optimizer.found_inf = bad.to(where, torch.float32)
    optimizer.step()
