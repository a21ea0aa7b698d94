"""How far a policy has moved from its reference, and how sure of itself it is, on answers that it sampled.

Letters: N scored tokens (of a chunk, inside the chunked code), V vocabulary, D model width, S answers.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from rpo.data.batch import Batch, padded_batch
from rpo.data.dataset import Rows
from rpo.data.loader import own_share
from rpo.model.logprobs import response_sums
from rpo.model.policy import Policy
from rpo.model.sampling import Completion

TOP = 10  # next tokens whose mass and entropy warn of overoptimisation (arXiv 2410.11677)
CHUNK_BYTES = {"cuda": 2**28, "cpu": 2**24}  # of one N x V matrix; about eight of them are alive at once
COLUMNS = ("logp", "ref_logp", "kl", "entropy", "top_entropy", "top_mass")


def of_tokens(logits_NV: Tensor, ref_logits_NV: Tensor, target_N: Tensor) -> list[Tensor]:
    """COLUMNS at each token, (N,) in nats (top_mass: a probability), of policy and reference logits and what was sampled.

    kl           sum_v pi(v) (log pi(v) - log ref(v))
    entropy      -sum_v pi(v) log pi(v)
    top_mass     sum of pi over its TOP likeliest tokens (of all, where there are fewer)
    top_entropy  entropy of pi renormalised over these
    """
    logp_NV = logits_NV.log_softmax(-1)
    ref_NV = logp_NV if ref_logits_NV is logits_NV else ref_logits_NV.log_softmax(-1)
    prob_NV = logp_NV.exp()
    # Where a bias masks a token out of both models (-inf), 0 x (inf - inf) is 0, not NaN.
    gap_NV = torch.where(prob_NV > 0, logp_NV - ref_NV, 0.0)
    top_NK = logp_NV.topk(min(TOP, logp_NV.shape[-1])).values
    return [
        logp_NV.gather(-1, target_N[:, None])[:, 0],
        ref_NV.gather(-1, target_N[:, None])[:, 0],
        (prob_NV * gap_NV).sum(-1),
        torch.special.entr(prob_NV).sum(-1),
        torch.special.entr(top_NK.softmax(-1)).sum(-1),
        top_NK.exp().sum(-1),
    ]


@torch.no_grad()
def measure(
    policy: Policy,
    reference: Policy,
    prompts: list[list[int]],
    answers: list[Completion],
    device: torch.device,
    *,
    budget: int,
    chunk_bytes: int | None = None,
) -> dict[str, np.ndarray]:
    """Per answer the sums over its tokens of each of COLUMNS, float64 (S,), the same on every rank.

    With y sampled from the policy at temperature 1, `kl` is the Rao-Blackwellised KL(policy || reference) in nats,

        sum over t of sum over v of pi(v | y_<t) [log pi(v | y_<t) - log ref(v | y_<t)],

    unbiased for the sequence KL and of lower variance than k1 = logp - ref_logp, which is unbiased too (arXiv
    2504.10637). One forward pass of each model per micro-batch of `budget` tokens (one in all where both are the same
    object); logits exist for as many tokens at a time as make `chunk_bytes`. A collective.
    """
    of_batch = partial(_of_batch, policy, reference, chunk_bytes=chunk_bytes or CHUNK_BYTES[device.type])
    return dict(zip(COLUMNS, _sums(of_batch, len(COLUMNS), prompts, answers, device, budget), strict=True))


def _of_batch(policy: Policy, reference: Policy, batch: Batch, *, chunk_bytes: int) -> list[Tensor]:
    hidden_ND = policy.hidden(batch)
    ref_hidden_ND = hidden_ND if reference is policy else reference.hidden(batch)
    width = policy.lm.config.get_text_config().vocab_size * torch.promote_types(hidden_ND.dtype, torch.float32).itemsize
    length = max(chunk_bytes // width, 1)
    chunks = []
    for start in range(0, len(hidden_ND), length):
        n = slice(start, start + length)
        logits_NV = policy.logits_of(hidden_ND[n])
        ref_logits_NV = logits_NV if reference is policy else reference.logits_of(ref_hidden_ND[n])
        chunks.append(of_tokens(logits_NV, ref_logits_NV, batch.target_N[n]))
    return [torch.cat(column) for column in zip(*chunks, strict=True)]


@torch.no_grad()
def logps(
    policy: Policy, prompts: list[list[int]], answers: list[Completion], device: torch.device, *, budget: int
) -> np.ndarray:
    """log pi(answer | prompt) of each answer in nats, float64 (S,), the same on every rank; no N x V logits. A collective."""
    return _sums(lambda batch: [policy(batch)], 1, prompts, answers, device, budget)[0]


def _sums(
    of_batch: Callable[[Batch], list[Tensor]],
    num_columns: int,
    prompts: list[list[int]],
    answers: list[Completion],
    device: torch.device,
    budget: int,
) -> np.ndarray:
    """Float64 (C, S): each answer's sums of the C columns, (N,) each, that `of_batch` gives of supervised rows."""
    rows = Rows.of([(prompt, answer.ids, ()) for prompt, answer in zip(prompts, answers, strict=True)], "samples")
    table_CS = torch.zeros(num_columns, len(rows), dtype=torch.float64, device=device)
    for members, weight in own_share(rows, np.arange(len(rows)), layout="padded", budget=budget).microbatches:
        batch = padded_batch(rows, members, weight=weight).to(device)
        sums_CS = torch.stack([response_sums(column_N.double(), batch.length_S) for column_N in of_batch(batch)])
        table_CS[:, torch.from_numpy(members).to(device)] += weight * sums_CS
    torch_dist.all_reduce(table_CS)
    return table_CS.cpu().numpy()
