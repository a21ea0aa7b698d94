"""Pairs scored by a policy and its reference, and how far two scorings of one text may differ by rounding alone.

Letters: N scored tokens, S responses, P pairs.
"""

import numpy as np
import torch
from torch import Tensor

from rpo import packing
from rpo.losses import PairLogps
from rpo.models import Policy
from rpo.packing import Batch

# Nats per token that rounding may always explain, however few bits moved in a measurement: 8 ulps of the log-probs; in
# bfloat16 1/16 ulp of what enters the head.
LEAST_NOISE = {torch.float64: 2**-49, torch.float32: 2**-20, torch.bfloat16: 2**-11}


def score(policy: Policy, reference: Policy | None, batch: Batch) -> PairLogps:
    """The batch's pairs under both models; gradients flow to `policy` unless the caller has turned them off.

    Without a `reference` its log-probs are those that the batch carries, if any.
    """
    logps_S = packing.response_sums(policy(batch), batch.length_S)
    ref_S = batch.ref_S
    if reference is not None:
        with torch.no_grad():
            ref_S = packing.response_sums(reference(batch), batch.length_S)

    def sides(x_S: Tensor | None) -> list[Tensor | None]:
        parts = [] if x_S is None else list(x_S.split(batch.num_pairs))
        return parts + [None] * (2 - len(parts))  # supervised rows have no rejected side

    return PairLogps(
        *sides(logps_S), *sides(None if ref_S is None else ref_S.to(logps_S.dtype)), *sides(batch.length_S)
    )


@torch.no_grad()
def noise_floor(
    policy: Policy,
    rows: packing.RowsLike,
    indices: np.ndarray,
    device: torch.device,
    *,
    positions: int,
    compute_dtype: torch.dtype,
) -> float:
    """Nats per scored token by which one text's log-probs move with padding and batch make-up alone.

    The mean |difference| over the scored tokens of `indices`, scored in one batch and again one pair at a time with
    17 more columns of padding (fewer where the model's `positions` end), and at least LEAST_NOISE. What "equal" means on
    these weights, in this dtype, on this device.
    """
    together_S = _responses(policy, packing.padded_batch(rows, indices).to(device))
    extra = min(17, positions - packing.longest(rows))
    alone = [packing.padded_batch(rows, indices[i : i + 1], extra=extra).to(device) for i in range(len(indices))]
    apart = [_responses(policy, batch) for batch in alone]
    apart_S = [pair[side] for side in range(len(apart[0])) for pair in apart]
    return max((torch.cat(together_S) - torch.cat(apart_S)).abs().mean().item(), LEAST_NOISE[compute_dtype])


def _responses(policy: Policy, batch: Batch) -> list[Tensor]:
    return list(policy(batch).split(batch.length_S.tolist()))


@torch.no_grad()
def mean_gap(
    policy: Policy, reference: Policy, rows: packing.RowsLike, indices: np.ndarray, device: torch.device, *, layout: str
) -> float:
    """Mean |logp_pi - logp_ref| in nats per scored token over the pairs of `indices`, in one batch; beta-free."""
    batch = packing.make_batch(rows, indices, layout).to(device)
    return (policy(batch) - reference(batch)).abs().mean().item()


@torch.no_grad()
def packed_gap(policy: Policy, rows: packing.RowsLike, indices: np.ndarray, device: torch.device) -> float:
    """Mean |packed - padded| in nats per scored token over the pairs of `indices`, by the same weights."""
    padded, packed = (packing.make_batch(rows, indices, layout).to(device) for layout in ("padded", "packed"))
    return (policy(packed) - policy(padded)).abs().mean().item()
