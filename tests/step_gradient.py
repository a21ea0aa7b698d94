"""The whole gradient of one step, by the production parts; run under torchrun by test_fsdp.

torchrun --nproc-per-node 2 tests/step_gradient.py OUT.pt DTYPE BUDGET ACCUMULATE
"""

import copy
import sys

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from rpo import dist, losses, models, packing, score
from rpo.config import Fsdp, Loss
from tests.conftest import make_lm
from tests.test_packing import make_rows

LENGTHS = [(5, 9, 4), (2, 3, 17), (8, 1, 2), (3, 12, 12), (6, 2, 7), (1, 8, 3), (4, 4, 20), (7, 15, 1)]
VOCABULARY = 3000  # whole batches take the tiled log-probs, single pairs the naive ones (too small to tile)
LOSS = Loss(preference="sigmoid", sft="token", beta=0.1, eta=0.3, label_smoothing=0.0, normalize=True)


def rows():
    return make_rows(LENGTHS, vocab_size=VOCABULARY)


def moved_copy(lm):
    """A reference that is not the policy, so that every margin is its own."""
    other = copy.deepcopy(lm)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype))
    return other


def step_gradient(
    dtype=torch.float64,
    budget=10**6,
    cuts=None,
    accumulate="unsharded",
    checkpointing="none",
    loss=LOSS,
    family="llama",
):
    """name -> gradient on the CPU, for one step over LENGTHS cut by `budget` or by hand (`cuts`)."""
    device = dist.init()
    fsdp = Fsdp(
        activation_checkpointing=checkpointing, reshard_after_forward=True, accumulate=accumulate, cpu_offload=False
    )
    lm = make_lm(family, vocab_size=VOCABULARY).to(dtype)
    reference = moved_copy(lm)
    shard = {"mesh": dist.mesh(device), "fsdp": fsdp, "compute_dtype": dtype, "compile": False}
    reference, policy = (models.prepare(m, **shard, trainable=m is lm) for m in (reference, lm))
    plan = packing.plan_step(rows(), np.arange(8), budget=budget, rank=dist.rank(), world_size=dist.world_size())
    microbatches = plan.microbatches if cuts is None else [(np.array(cut), 1.0) for cut in cuts]
    for i, (members, weight) in enumerate(microbatches, start=1):
        policy.set_requires_gradient_sync(i == len(microbatches) or accumulate == "sharded")
        pairs = score.score(policy, reference, packing.padded_batch(rows(), members, weight=weight).to(device))
        terms = losses.objective(loss, pairs, step_pairs=plan.pairs, step_chosen_tokens=plan.chosen_tokens)
        (sum(terms).sum() * (weight / plan.pairs)).backward()
    grads = {name: p.grad for name, p in policy.named_parameters()}
    grads = {name: (g.full_tensor() if isinstance(g, DTensor) else g).cpu() for name, g in grads.items()}
    return {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in grads.items()}


if __name__ == "__main__":
    out, dtype, budget, accumulate = sys.argv[1:]
    gradients = step_gradient(getattr(torch, dtype), int(budget), accumulate=accumulate)
    if dist.is_main():
        torch.save(gradients, out)
    dist.leave(0)
