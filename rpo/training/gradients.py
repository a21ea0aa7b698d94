"""How hard the preference and the SFT term pull on the weights, and whether they pull the same way."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as torch_dist
from torch import Tensor

from rpo import losses
from rpo.config import Train
from rpo.data.batch import Batch
from rpo.data.dataset import Rows
from rpo.data.schedule import StepPlan
from rpo.losses import PairLogps
from rpo.model import policy as model_policy
from rpo.model import shard
from rpo.model.policy import Policy
from rpo.training import guards
from rpo.training.meter import GRADIENT_SPLIT

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

CHUNK = 2**22  # numbers of a shard that are widened to float64 at a time


def gradient_split(
    policy: Policy,
    reference: Policy | None,
    rows: Rows,
    plan: StepPlan,
    batches: list[Batch],
    cfg: Train,
    device: torch.device,
) -> dict[str, float]:
    """GRADIENT_SPLIT of one step's pairs at the present weights: |g_p|, |g_s|, and cosine = g_p.g_s / (|g_p| |g_s|).

    g_p and g_s are the gradients of the step's preference and SFT terms (eta included), over all parameters and before
    clipping; so the update's own g has |g|^2 = |g_p|^2 + |g_s|^2 + 2 |g_p| |g_s| cosine. A zero gradient (hinge with
    every margin reached) has no direction: the cosine is then left out. Of a term that is off nothing is said.

    A collective, to which each rank brings its `plan` and `batches`, while no parameter has a gradient. It takes a forward
    and a backward pass per term and waits for the device; weights, gradients and random state stay as they were. Raises
    UserError where memory runs out.
    """

    def gradient(term: Callable[[PairLogps], Tensor], reference: Policy | None) -> list[DTensor]:
        """Of one term alone, by parameter, cut and summed as the update's is; it leaves none behind."""
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # the update draws the same
            for i, batch in enumerate(batches, start=1):
                shard.sync_gradients(policy, last=i == len(batches), fsdp=cfg.fsdp)
                with guards.naming_memory(rows, plan.microbatches[i - 1][0], cfg):
                    pairs = model_policy.score(policy, reference, batch.to(device))
                    (term(pairs).sum() * (batch.weight / plan.pairs)).backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters() if p.requires_grad]
        policy.zero_grad()
        return found

    # A pass for each: where one term is much the smaller, the whole gradient less the other's would be rounding.
    (name, sft_name, cosine_name), terms = GRADIENT_SPLIT, {}
    if cfg.loss.has_pairs:
        terms[name] = gradient(partial(losses.preference_loss, cfg.loss), reference)
    if cfg.loss.sft != "none" and cfg.loss.eta:
        sft = partial(losses.sft_loss, cfg.loss, step_pairs=plan.pairs, step_chosen_tokens=plan.chosen_tokens)
        terms[sft_name] = gradient(sft, None)  # it reads no reference
    first, *_, last = [*terms.values()] * 2
    norm, other, product = _products(first, last, device)
    split = dict(zip(terms, (norm, other), strict=False))
    return split | ({cosine_name: product / (norm * other)} if len(terms) == 2 and norm and other else {})


def _products(a: list[DTensor], b: list[DTensor], device: torch.device) -> tuple[float, float, float]:
    """|a|, |b| and a.b over all parameters, summed in float64; of replicas, which hold the same, one counts."""
    from torch.distributed.tensor import DTensor

    assert all(isinstance(grad, DTensor) for grad in a + b), "a gradient is gathered: its shards would count twice"
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for both in zip(a, b, strict=True):
        for x, y in zip(*(grad.to_local().flatten().split(CHUNK) for grad in both), strict=True):
            x, y = x.to(device).double(), y.to(device).double()  # an offloaded shard is on the host
            sums += torch.stack([(x * x).sum(), (y * y).sum(), (x * y).sum()])
    torch_dist.all_reduce(sums, group=a[0].device_mesh.get_group("shard"))
    squared_a, squared_b, product = sums.tolist()
    return math.sqrt(squared_a), math.sqrt(squared_b), product
