"""From tokenised pairs to the batches that a model sees: which rank scores which pair, and how rows are laid out.

Letters: B rows of a batch, T tokens of a row, N scored tokens, S responses (chosen first, then rejected).

Everything here is integer work on the host and a pure function of the step's rows, so every rank derives the whole
step's plan (and with it the counts that losses are divided by) without a collective.
"""

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class RowsLike(Protocol):
    """What is needed of `data.Rows`: lengths P, C, R of each row, and its ids as (prompt, chosen, rejected)."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


def longest(rows: RowsLike) -> int:
    """Tokens of the longest text that a model will see: max over rows of P + max(C, R)."""
    return int((rows.prompt + np.maximum(rows.chosen, rows.rejected)).max())


@dataclass(frozen=True)
class Batch:
    """One micro-batch; after this, nothing knows which layout it came from.

    `source_N` is the flat index (row x T + column) of the hidden state that predicts scored token `target_N`; scored
    tokens are ordered by response, `length_S` of them each. Where pairs have no rejected response, S = pairs.
    """

    input_ids_BT: Tensor
    source_N: Tensor
    target_N: Tensor
    length_S: Tensor
    num_pairs: int
    weight: float  # 0 for the filler that keeps ranks in step, else 1

    def to(self, device: torch.device) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if device.type == "cuda":  # pinned memory is what lets the copy overlap with compute
            values = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in values.items()}
        return Batch(**{k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in values.items()})


@dataclass(frozen=True)
class StepPlan:
    """One rank's share of a step, with the global counts of the whole step."""

    microbatches: list[tuple[np.ndarray, float]]  # row indices, weight
    pairs: int
    chosen_tokens: int
    unique_tokens: int


def padded_batch(rows: RowsLike, indices: np.ndarray, *, weight: float = 1.0, extra: int = 0) -> Batch:
    """One right-padded batch, rows [all chosen; all rejected], for plain causal attention.

    Padding stands to the right of everything real, so under a causal mask no real token sees it and no attention
    mask is needed. `extra` adds columns of padding (the noise-floor probe compares two paddings).
    """
    triples = [rows.row(int(i)) for i in indices]
    responses = [(prompt, chosen) for prompt, chosen, _ in triples]
    responses += [(prompt, rejected) for prompt, _, rejected in triples if len(rejected)]
    assert len(responses) in (len(triples), 2 * len(triples)), "a batch has rejected responses for all pairs or none"

    width = max(len(prompt) + len(response) for prompt, response in responses) + extra
    input_ids_BT = np.zeros((len(responses), width), dtype=np.int64)
    source, target = [], []
    for b, (prompt, response) in enumerate(responses):
        input_ids_BT[b, : len(prompt)] = prompt
        input_ids_BT[b, len(prompt) : len(prompt) + len(response)] = response
        source.append(b * width + np.arange(len(prompt) - 1, len(prompt) + len(response) - 1))
        target.append(response)
    return Batch(
        input_ids_BT=torch.from_numpy(input_ids_BT),
        source_N=torch.from_numpy(np.concatenate(source)),
        target_N=torch.from_numpy(np.concatenate(target).astype(np.int64)),
        length_S=torch.tensor([len(response) for _, response in responses]),
        num_pairs=len(indices),
        weight=weight,
    )


def _cut(longest: np.ndarray, rows_per_pair: np.ndarray, budget: int) -> list[slice]:
    """Slices of pairs sorted longest first, each as many as fit `budget` tokens (rows x longest) and at least one."""
    slices, start, num_rows = [], 0, 0
    for i in range(len(longest)):
        if i > start and (num_rows + rows_per_pair[i]) * longest[start] > budget:
            slices.append(slice(start, i))
            start, num_rows = i, 0
        num_rows += rows_per_pair[i]
    return slices + [slice(start, len(longest))] if len(longest) else slices


def plan_step(rows: RowsLike, indices: np.ndarray, *, budget: int, rank: int = 0, world_size: int = 1) -> StepPlan:
    """This rank's micro-batches of the step whose pairs are `indices`, and the step's global counts.

    Pairs are sorted by length (less padding) and dealt to the ranks in snake order (equal counts, near-equal
    lengths). Every rank gets the same number of micro-batches, because each is a collective under FSDP: short ranks
    are filled up with one pair of weight 0. `budget` bounds rows x longest; a longer single pair stands alone.
    """
    longest = rows.prompt[indices] + np.maximum(rows.chosen[indices], rows.rejected[indices])
    rows_per_pair = 1 + (rows.rejected[indices] > 0)
    by_length = np.argsort(-longest, kind="stable")

    rank_of = np.arange(len(indices)) % (2 * world_size)
    rank_of = np.where(rank_of < world_size, rank_of, 2 * world_size - 1 - rank_of)
    shares = [by_length[rank_of == r] for r in range(world_size)]
    cuts = [_cut(longest[share], rows_per_pair[share], budget) for share in shares]

    microbatches = [(indices[shares[rank][part]], 1.0) for part in cuts[rank]]
    filler = (indices[by_length[-1:]], 0.0)
    microbatches += [filler] * (max(map(len, cuts)) - len(microbatches))
    return StepPlan(
        microbatches=microbatches,
        pairs=len(indices),
        chosen_tokens=int(rows.chosen[indices].sum()),
        unique_tokens=int((rows.prompt[indices] + rows.chosen[indices] + rows.rejected[indices]).sum()),
    )


def response_sums(logps_N: Tensor, length_S: Tensor) -> Tensor:
    """Each response's summed log-prob, in the dtype of `logps_N` (fp32 or float64).

    A segmented sum, not index_add: the order of additions is fixed, on CUDA too.
    """
    return torch.segment_reduce(logps_N, "sum", lengths=length_S, unsafe=True)
