"""The whole gradient of one step, by the production parts; run under torchrun by test_fsdp.

torchrun --nproc-per-node 2 tests/helpers/step_gradient.py OUT.pt '[{"layout": "packed", "replicate_degree": 2}, {...}]'
"""

import copy
import dataclasses
import json
import math
import sys
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from rpo import dist, losses
from rpo.config import Loss
from rpo.data import schedule
from rpo.data.batch import make_batch
from rpo.model.policy import prepare, score
from rpo.model.shard import PLAIN, mesh, sync_gradients
from rpo.training import gradients, meter, optim
from tests.helpers.models import float64_throughout, make_lm
from tests.helpers.rows import make_rows

LENGTHS = [(5, 9, 4), (2, 3, 17), (8, 1, 2), (3, 12, 12), (6, 2, 7), (1, 8, 3), (4, 4, 20), (7, 15, 1)]
VOCABULARY = 3000  # whole batches take the tiled log-probs, single pairs the naive ones (too small to tile)
TIMEOUT = 77  # seconds; no default of torch's
LOSS = Loss(
    "sigmoid", "token", beta=0.1, eta=0.3, label_smoothing=0.0, normalize=False, lam=None, clip=None, gamma=None
)


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


def naive_split(loss=LOSS):
    """Both terms' gradient norms and their cosine by autograd on the whole model: a response at a time, full logits, the formulas written out; float64."""
    lm = make_lm(vocab_size=VOCABULARY).double()
    nll_scale = {"sum": lambda _: loss.beta / len(LENGTHS), "avg": lambda c: 1 / c / len(LENGTHS)}
    nll_scale["token"] = lambda _: 1 / sum(c for _, c, _ in LENGTHS)
    with float64_throughout():
        ref_logps, preference, sft = reference_logps(moved_copy(lm)), 0, 0
        for i in range(len(LENGTHS)):
            prompt, chosen, rejected = rows().row(i)
            chosen_logp = logp(lm, prompt, chosen)
            margin = chosen_logp - logp(lm, prompt, rejected) - (ref_logps[i, 0] - ref_logps[i, 1])
            preference = preference - F.logsigmoid(loss.beta * margin) / len(LENGTHS)
            sft = sft - loss.eta * nll_scale[loss.sft](len(chosen)) * chosen_logp
        params = list(lm.parameters())
        both = [torch.autograd.grad(term, params, retain_graph=True) for term in (preference, sft)]
    a, b = (torch.cat([grad.flatten() for grad in gradient]) for gradient in both)
    return dict(
        zip(
            meter.GRADIENT_SPLIT,
            (a.norm().item(), b.norm().item(), (a @ b / (a.norm() * b.norm())).item()),
            strict=True,
        )
    )


class Traffic(TorchDispatchMode):
    """Bytes by collective, of the whole tensor that one rank gathers or has reduced, over the block."""

    WHOLE = {"_allgather_base_": lambda out, _: out, "_reduce_scatter_base_": lambda _, whole: whole}
    WHOLE |= {"allreduce_": lambda whole, _: whole[0]}

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._opname
            self.bytes[name.strip("_")] += self.WHOLE[name](*args[:2]).nbytes
        return func(*args, **kwargs or {})


def step_gradient(dtype=torch.float64, **how):
    """name -> gradient on the CPU, for one step over LENGTHS cut by `budget` or by hand (`cuts`)."""
    return step_and_facts(dtype, **how)[0]


def step_and_facts(dtype=torch.float64, **how):
    """That, and what `_step_gradient` found out beside it."""
    with exactly(dtype):
        return _step_gradient(dtype, **how)


def _step_gradient(
    dtype,
    *,
    layout="padded",
    cached=False,
    budget=10**6,
    cuts=None,
    checkpointing="none",
    loss=LOSS,
    family="llama",
    count=False,
    split=False,
    **fsdp,
):
    """The gradient, its norm as the run clips it, the number of micro-batches, the traffic in bytes; before, the split."""
    device = dist.init(TIMEOUT)
    fsdp = dataclasses.replace(PLAIN, activation_checkpointing=checkpointing, **fsdp)
    lm = make_lm(family, vocab_size=VOCABULARY).to(dtype)
    reference, pairs = moved_copy(lm), rows()
    if cached:
        pairs = dataclasses.replace(pairs, ref_logps=reference_logps(reference))
    shard = {"mesh": mesh(device, fsdp), "fsdp": fsdp, "compute_dtype": dtype, "compile": False}
    reference, policy = (prepare(m, **shard, trainable=m is lm) for m in (reference, lm))
    ranks = {"rank": dist.rank(), "world_size": dist.world_size()}
    plan = schedule.plan_step(pairs, np.arange(8), layout=layout, budget=budget, **ranks)
    if cuts is not None:
        plan = dataclasses.replace(plan, microbatches=[(np.array(cut), 1.0) for cut in cuts])
    microbatches = plan.microbatches
    live, pulls = None if cached else reference, {}
    if split:
        batches = [make_batch(pairs, members, layout, weight=weight) for members, weight in microbatches]
        cfg = SimpleNamespace(loss=loss, fsdp=fsdp)
        pulls = gradients.gradient_split(policy, live, pairs, plan, batches, cfg, device)
    with Traffic() if count else nullcontext() as traffic:
        for i, (members, weight) in enumerate(microbatches, start=1):
            sync_gradients(policy, last=i == len(microbatches), fsdp=fsdp)
            batch = make_batch(pairs, members, layout, weight=weight).to(device)
            scored = score(policy, live, batch)
            terms = losses.objective(loss, scored, step_pairs=plan.pairs, step_chosen_tokens=plan.chosen_tokens)
            (sum(terms).sum() * (weight / plan.pairs)).backward()
    grads = {name: p.grad for name, p in policy.named_parameters()}
    grads = {name: (g.full_tensor() if isinstance(g, DTensor) else g).cpu() for name, g in grads.items()}
    grads = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in grads.items()}
    groups = [group._get_backend(device) for group in shard["mesh"].get_all_groups()]
    facts = {"timeouts": [group.options._timeout.total_seconds() for group in groups]}
    facts |= {"norm": optim.clip_grad_norm(policy, math.inf).item(), "microbatches": len(microbatches)}
    return grads, facts | {"traffic": dict(traffic.bytes) if count else {}, "split": pulls}


if __name__ == "__main__":
    out, cases = sys.argv[1], json.loads(sys.argv[2])
    results = []
    for case in cases:
        dtype = getattr(torch, case.pop("dtype"))
        with exactly(dtype):
            results.append(_step_gradient(dtype, **case))
    if dist.is_main():
        torch.save(results, out)
    dist.leave(0)
