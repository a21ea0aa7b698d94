"""From tokenised pairs to the batches that a model sees: which rank scores which pair, and how rows are laid out.

Two layouts, one `Batch`: `padded` has a right-padded row per response and plain causal attention, it is the
specification; `packed` has one row of several pairs, each laid out once as [prompt | chosen | rejected].

Letters: B rows of a batch, T tokens of a row, N scored tokens, S responses (chosen first, then rejected); P, C, R are
a pair's token counts.

Everything here is integer work on the host and a pure function of the step's rows, so every rank derives the whole
step's plan (and with it the counts that losses are divided by) without a collective.
"""

import bisect
import heapq
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rpo.attention import Segments, segments_of
from rpo.config import UserError

# Work of one visible query-key pair, in tokens of the trunk: 12 L D over 6 x 12 L D^2 FLOPs, at a width D of 2,700.
ATTENTION_COST = 1 / 16_384


class RowsLike(Protocol):
    """What is needed of `data.Rows`: lengths P, C, R of each row, and its ids as (prompt, chosen, rejected)."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    ref_logps: np.ndarray | None  # float64 (rows, 2), the reference's log-probs of chosen and rejected

    def __len__(self) -> int: ...

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...

    def where(self, i: int) -> str: ...


def longest(rows: RowsLike) -> int:
    """Tokens of the longest text that a model will see: max over rows of P + max(C, R)."""
    return int(_longest(rows).max())


def _longest(rows: RowsLike, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
    return rows.prompt[indices] + np.maximum(rows.chosen[indices], rows.rejected[indices])


def _unique(rows: RowsLike, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
    return rows.prompt[indices] + rows.chosen[indices] + rows.rejected[indices]


def check_budget(rows: RowsLike, layout: str, budget: int) -> None:
    """Raises UserError where a pair by itself is more than `tokens_per_microbatch`; names the largest such pair."""
    sizes = _unique(rows) if layout == "packed" else _longest(rows) * (1 + (rows.rejected > 0))
    worst = int(sizes.argmax())
    if sizes[worst] > budget:
        raise UserError(
            f"tokens_per_microbatch={budget}: the pair at {rows.where(worst)} has {sizes[worst]} tokens in "
            f"layout={layout}; set it to {sizes[worst]} or more, or lower data.max_length"
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch; beyond the model's backbone nothing knows which layout it came from.

    `source_N` is the flat index (row x T + column) of the hidden state that predicts scored token `target_N`; scored
    tokens are ordered by response, `length_S` of them each. Where pairs have no rejected response, S = pairs.
    """

    input_ids_BT: Tensor
    source_N: Tensor
    target_N: Tensor
    length_S: Tensor
    num_pairs: int
    weight: float  # 0 for the filler that keeps ranks in step, else 1
    ref_S: Tensor | None = None  # the reference's log-prob of each response, where it was computed beforehand
    position_BT: Tensor | None = None  # None: 0, 1, 2, ... in each row
    segments: Segments | None = None  # None: plain causal attention

    def pin(self) -> "Batch":
        """In page-locked memory, from which a copy to CUDA overlaps with compute."""
        return _map(self, Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        return _map(self, lambda x: x.to(device, non_blocking=True))


def _map(record: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The dataclass `record` with its tensors, nested ones too, through `function`."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    changed = {k: function(v) for k, v in values.items() if isinstance(v, Tensor)}
    changed |= {k: _map(v, function) for k, v in values.items() if is_dataclass(v)}
    return replace(record, **changed)


# ---- laying out a micro-batch


def make_batch(rows: RowsLike, indices: np.ndarray, layout: str, *, weight: float = 1.0) -> Batch:
    """The rows `indices` in one micro-batch of the given layout."""
    return (packed_batch if layout == "packed" else padded_batch)(rows, indices, weight=weight)


def padded_batch(rows: RowsLike, indices: np.ndarray, *, weight: float = 1.0, extra: int = 0) -> Batch:
    """One right-padded batch, rows [all chosen; all rejected], for plain causal attention.

    Padding stands to the right of everything real, so under a causal mask no real token sees it and no attention
    mask is needed. `extra` adds columns of padding (the noise-floor probe compares two paddings).
    """
    triples = [rows.row(int(i)) for i in indices]
    responses = [(prompt, chosen) for prompt, chosen, _ in triples]
    responses += [(prompt, rejected) for prompt, _, rejected in triples if len(rejected)]

    width = max(len(prompt) + len(response) for prompt, response in responses) + extra
    input_ids_BT = np.zeros((len(responses), width), dtype=np.int64)
    sources = []
    for b, (prompt, response) in enumerate(responses):
        input_ids_BT[b, : len(prompt)] = prompt
        input_ids_BT[b, len(prompt) : len(prompt) + len(response)] = response
        sources.append(b * width + np.arange(len(prompt) - 1, len(prompt) + len(response) - 1))
    targets = [response for _, response in responses]
    return _batch(rows, indices, input_ids_BT, sources, targets, weight)


def packed_batch(rows: RowsLike, indices: np.ndarray, *, weight: float = 1.0) -> Batch:
    """One row of all pairs, each [prompt | chosen | rejected] once; positions of rejected restart at P.

    The prompt's last hidden state predicts the first token of both responses.
    """
    lengths = np.stack([column[indices] for column in (rows.prompt, rows.chosen, rows.rejected)], axis=1).astype(
        np.int64
    )
    starts = np.cumsum(lengths.sum(1)) - lengths.sum(1)
    triples = [rows.row(int(i)) for i in indices]
    chosen, rejected, positions = [], [], []
    for start, (p, c, r) in zip(starts.tolist(), lengths.tolist(), strict=True):
        last = start + p - 1
        chosen.append(np.arange(last, last + c))
        if r:
            rejected.append(np.concatenate([[last], np.arange(last + c + 1, last + c + r)]))
        positions += [np.arange(p + c), np.arange(p, p + r)]
    targets = [chosen for _, chosen, _ in triples] + [rejected for *_, rejected in triples if len(rejected)]
    batch = _batch(
        rows, indices, np.concatenate([part for t in triples for part in t])[None], chosen + rejected, targets, weight
    )
    position_BT = torch.from_numpy(np.concatenate(positions)[None])
    return replace(batch, position_BT=position_BT, segments=segments_of(lengths))


def _batch(
    rows: RowsLike,
    indices: np.ndarray,
    input_ids_BT: np.ndarray,
    sources: list[np.ndarray],
    targets: list[np.ndarray],
    weight: float,
) -> Batch:
    sides = len(targets) // len(indices)
    assert len(targets) == sides * len(indices), "a batch has rejected responses for all pairs or none"
    ref_S = None if rows.ref_logps is None else torch.from_numpy(rows.ref_logps[indices, :sides].T.flatten())
    return Batch(
        input_ids_BT=torch.from_numpy(input_ids_BT.astype(np.int64)),
        source_N=torch.from_numpy(np.concatenate(sources)),
        target_N=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        length_S=torch.tensor([len(target) for target in targets]),
        num_pairs=len(indices),
        weight=weight,
        ref_S=ref_S,
    )


# ---- dividing a step


@dataclass(frozen=True)
class StepPlan:
    """One rank's share of a step, with the global counts of the whole step."""

    microbatches: list[tuple[np.ndarray, float]]  # row indices, weight
    lengths: tuple[np.ndarray, np.ndarray, np.ndarray]  # P, C, R of the step's pairs
    pairs: int
    chosen_tokens: int
    unique_tokens: int


def plan_step(
    rows: RowsLike, indices: np.ndarray, *, layout: str, budget: int, rank: int = 0, world_size: int = 1
) -> StepPlan:
    """This rank's micro-batches of the step whose pairs are `indices`, and the step's global counts.

    Every rank gets the same number of micro-batches, because each is a collective under FSDP: short ranks are filled
    up with one pair of weight 0. `budget` bounds a packed row's tokens, and rows x longest of a padded batch; a pair
    that is larger by itself (`check_budget` refuses those) stands alone.
    """
    divide = _divide_packed if layout == "packed" else _divide_padded
    shares = divide(rows, indices, budget, world_size)
    smallest = indices[_unique(rows, indices).argmin()]
    microbatches = [(members, 1.0) for members in shares[rank]]
    microbatches += [(np.array([smallest]), 0.0)] * (max(map(len, shares)) - len(microbatches))
    lengths = rows.prompt[indices], rows.chosen[indices], rows.rejected[indices]
    return StepPlan(
        microbatches=microbatches,
        lengths=lengths,
        pairs=len(indices),
        chosen_tokens=int(lengths[1].sum()),
        unique_tokens=int(sum(lengths).sum()),
    )


def _divide_packed(rows: RowsLike, indices: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
    """Per rank its rows: the dearest pair goes to the rank with least to do, then each rank packs best-fit."""
    p, c, r = (x[indices].astype(np.int64) for x in (rows.prompt, rows.chosen, rows.rejected))
    visible = (p + c) * (p + c + 1) // 2 + r * p + r * (r + 1) // 2
    cost = p + c + r + ATTENTION_COST * visible
    loads = [(0.0, rank) for rank in range(world_size)]
    shares: list[list[int]] = [[] for _ in loads]
    for i in np.argsort(-cost, kind="stable").tolist():
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + float(cost[i]), rank))
        shares[rank].append(i)
    return [[indices[row] for row in _best_fit(share, p + c + r, budget)] for share in shares]


def _best_fit(members: list[int], sizes: np.ndarray, budget: int) -> list[list[int]]:
    """Rows of at most `budget` tokens: each pair, largest first, into the row with the least room that holds it."""
    filled: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), sorted
    for i in sorted(members, key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, (int(sizes[i]), -1))
        room, row = rooms.pop(at) if at < len(rooms) else (budget, len(filled))
        if row == len(filled):
            filled.append([])
        filled[row].append(i)
        bisect.insort(rooms, (room - int(sizes[i]), row))
    return filled


def _divide_padded(rows: RowsLike, indices: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
    """Per rank its batches: pairs sorted by length (less padding), dealt in snake order (equal counts), cut by `budget`."""
    longest, rows_per_pair = _longest(rows, indices), 1 + (rows.rejected[indices] > 0)
    by_length = np.argsort(-longest, kind="stable")
    rank_of = np.arange(len(indices)) % (2 * world_size)
    rank_of = np.where(rank_of < world_size, rank_of, 2 * world_size - 1 - rank_of)
    shares = [by_length[rank_of == rank] for rank in range(world_size)]
    return [[indices[s[part]] for part in _cut(longest[s], rows_per_pair[s], budget)] for s in shares]


def _cut(longest: np.ndarray, rows_per_pair: np.ndarray, budget: int) -> list[slice]:
    """Slices of pairs sorted longest first, each as many as fit `budget` tokens (rows x longest) and at least one."""
    slices, start, num_rows = [], 0, 0
    for i in range(len(longest)):
        if i > start and (num_rows + rows_per_pair[i]) * longest[start] > budget:
            slices.append(slice(start, i))
            start, num_rows = i, 0
        num_rows += rows_per_pair[i]
    return slices + [slice(start, len(longest))] if len(longest) else slices


def response_sums(logps_N: Tensor, length_S: Tensor) -> Tensor:
    """Each response's summed log-prob, in the dtype of `logps_N` (fp32 or float64).

    A segmented sum, not index_add: the order of additions is fixed, on CUDA too. In float64, because the sums of a
    thousand tokens, under policy and reference, are subtracted from each other.
    """
    return torch.segment_reduce(logps_N.double(), "sum", lengths=length_S, unsafe=True).to(logps_N.dtype)
