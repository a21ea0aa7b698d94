"""The whole gradient of one step, by the production parts; run under torchrun by test_fsdp.

torchrun --nproc-per-node 2 tests/step_gradient.py OUT.pt DTYPE BUDGET ACCUMULATE LAYOUT
"""

import copy
import dataclasses
import sys
from contextlib import nullcontext

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from rpo import dist, losses, models, packing, score
from rpo.config import Fsdp, Loss
from tests.conftest import float64_throughout, make_lm
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


def exactly(dtype):
    """The block in which a model in `dtype` computes in nothing narrower."""
    return float64_throughout() if dtype == torch.float64 else nullcontext()


def logp(lm, prompt, response):
    """A response's log-prob by the library's own logits, full and by itself."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    logps = lm(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    return logps[len(prompt) - 1 :].sum()


@torch.no_grad()
def reference_logps(lm):
    """float64 (rows, 2): what a cache would hold, by `logp`."""
    texts = [(prompt, side) for prompt, *sides in map(rows().row, range(len(LENGTHS))) for side in sides]
    return np.array([logp(lm, *text).item() for text in texts]).reshape(-1, 2)


def step_gradient(dtype=torch.float64, **how):
    """name -> gradient on the CPU, for one step over LENGTHS cut by `budget` or by hand (`cuts`)."""
    with exactly(dtype):
        return _step_gradient(dtype, **how)


def _step_gradient(
    dtype,
    *,
    layout="padded",
    cached=False,
    budget=10**6,
    cuts=None,
    accumulate="unsharded",
    checkpointing="none",
    loss=LOSS,
    family="llama",
):
    device = dist.init()
    fsdp = Fsdp(
        activation_checkpointing=checkpointing, reshard_after_forward=True, accumulate=accumulate, cpu_offload=False
    )
    lm = make_lm(family, vocab_size=VOCABULARY).to(dtype)
    reference, pairs = moved_copy(lm), rows()
    if cached:
        pairs = dataclasses.replace(pairs, ref_logps=reference_logps(reference))
    shard = {"mesh": dist.mesh(device), "fsdp": fsdp, "compute_dtype": dtype, "compile": False}
    reference, policy = (models.prepare(m, **shard, trainable=m is lm) for m in (reference, lm))
    ranks = {"rank": dist.rank(), "world_size": dist.world_size()}
    plan = packing.plan_step(pairs, np.arange(8), layout=layout, budget=budget, **ranks)
    microbatches = plan.microbatches if cuts is None else [(np.array(cut), 1.0) for cut in cuts]
    for i, (members, weight) in enumerate(microbatches, start=1):
        policy.set_requires_gradient_sync(i == len(microbatches) or accumulate == "sharded")
        batch = packing.make_batch(pairs, members, layout, weight=weight).to(device)
        scored = score.score(policy, None if cached else reference, batch)
        terms = losses.objective(loss, scored, step_pairs=plan.pairs, step_chosen_tokens=plan.chosen_tokens)
        (sum(terms).sum() * (weight / plan.pairs)).backward()
    grads = {name: p.grad for name, p in policy.named_parameters()}
    grads = {name: (g.full_tensor() if isinstance(g, DTensor) else g).cpu() for name, g in grads.items()}
    return {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in grads.items()}


if __name__ == "__main__":
    out, dtype, budget, accumulate, layout = sys.argv[1:]
    how = {"budget": int(budget), "accumulate": accumulate, "layout": layout, "cached": layout == "packed"}
    gradients = step_gradient(getattr(torch, dtype), **how)
    if dist.is_main():
        torch.save(gradients, out)
    dist.leave(0)
