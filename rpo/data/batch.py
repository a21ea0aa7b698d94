"""Micro-batches from tokenised pairs, in one of two layouts.

`padded` has a right-padded row per response and plain causal attention; it is the specification. `packed` has one row of
several pairs, each laid out once as [prompt | chosen | rejected].

Letters: B rows of a batch, T tokens of a row, N scored tokens, S responses (chosen first, then rejected); P, C, R are
a pair's token counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rpo.errors import UserError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from rpo.data.dataset import Rows


@dataclass(frozen=True)
class Segments:
    """The attention pattern of a packed row: `sdpa` reads `lengths`, `varlen` starts and keys, `flex` pair and branch."""

    lengths: tuple[tuple[int, int, int], ...]  # P, C, R of each pair, on the host
    reach: int  # the longest text in the row, max over pairs of P + max(C, R)
    most_queries: int  # of a segment
    key_K: Tensor  # the row's column of each key: segments [P|C], [P|R] of all pairs, end to end
    query_starts_S: Tensor  # int32, where each segment's queries begin, and the end of the last
    key_starts_S: Tensor  # int32, the same for its keys
    pair_T: Tensor  # which pair a column belongs to
    branch_T: Tensor  # 0 prompt, 1 chosen, 2 rejected

    def to(self, device: torch.device) -> Segments:
        return _map(self, lambda x: x.to(device))

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        from torch.nn.attention.flex_attention import create_block_mask

        pair_T, branch_T = self.pair_T, self.branch_T

        def visible(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (pair_T[q] == pair_T[k]) & (q >= k) & ((branch_T[q] != 2) | (branch_T[k] != 1))

        return create_block_mask(visible, None, None, len(pair_T), len(pair_T), device=pair_T.device)


def segments_of(lengths: np.ndarray) -> Segments:
    """The segments of a row that holds pairs of these `lengths`, (P, C, R) per pair; R may be 0."""
    keys, queries, num_keys = [], [], []
    start = 0
    for p, c, r in lengths.tolist():
        columns = np.arange(start, start + p + c + r)
        keys += [columns[: p + c]] + ([columns[:p], columns[p + c :]] if r else [])
        queries += [p + c] + ([r] if r else [])
        num_keys += [p + c] + ([p + r] if r else [])
        start += p + c + r
    return Segments(
        lengths=tuple(map(tuple, lengths.tolist())),
        reach=int((lengths[:, 0] + lengths[:, 1:].max(1)).max()),
        most_queries=max(queries),
        key_K=torch.from_numpy(np.concatenate(keys)),
        query_starts_S=torch.tensor(np.cumsum([0, *queries]), dtype=torch.int32),
        key_starts_S=torch.tensor(np.cumsum([0, *num_keys]), dtype=torch.int32),
        pair_T=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths.sum(1))),
        branch_T=torch.from_numpy(np.repeat(np.tile([0, 1, 2], len(lengths)), lengths.ravel())),
    )


def longest(rows: Rows) -> int:
    """Tokens of the longest text that a model will see: max over rows of P + max(C, R)."""
    return int(text_lengths(rows).max())


def text_lengths(rows: Rows, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
    return rows.prompt[indices] + np.maximum(rows.chosen[indices], rows.rejected[indices])


def pair_sizes(rows: Rows, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
    return rows.prompt[indices] + rows.chosen[indices] + rows.rejected[indices]


def check_budget(rows: Rows, layout: str, budget: int) -> None:
    """Raises UserError, naming the largest pair, if that alone exceeds `tokens_per_microbatch`."""
    sizes = pair_sizes(rows) if layout == "packed" else text_lengths(rows) * (1 + (rows.rejected > 0))
    worst = int(sizes.argmax())
    if sizes[worst] > budget:
        raise UserError(
            f"tokens_per_microbatch={budget}: the pair at {rows.where(worst)} has {sizes[worst]} tokens in "
            f"layout={layout}; set it to {sizes[worst]} or more, or lower data.max_length"
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch; only the model's backbone depends on its layout.

    `source_N` is the flat index (row x T + column) of the hidden state that predicts scored token `target_N`; scored
    tokens are ordered by response, `length_S` of them each. Where pairs have no rejected response, S = pairs.
    """

    input_ids_BT: Tensor
    source_N: Tensor
    target_N: Tensor
    length_S: Tensor
    num_pairs: int
    weight: float  # 0 for filler, which gives ranks equally many micro-batches, else 1
    ref_S: Tensor | None = None  # the reference's log-prob of each response, where it was computed beforehand
    position_BT: Tensor | None = None  # None: 0, 1, 2, ... in each row
    segments: Segments | None = None  # None: plain causal attention

    def pin(self) -> Batch:
        """In page-locked memory, from which a copy to CUDA overlaps with compute."""
        return _map(self, Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        return _map(self, lambda x: x.to(device, non_blocking=True))


def _map(record: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The dataclass `record` with its tensors, nested ones too, through `function`."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    changed = {k: function(v) for k, v in values.items() if isinstance(v, Tensor)}
    changed |= {k: _map(v, function) for k, v in values.items() if is_dataclass(v)}
    return replace(record, **changed)


# ---- laying out a micro-batch


def make_batch(rows: Rows, indices: np.ndarray, layout: str, *, weight: float = 1.0) -> Batch:
    """The rows `indices` in one micro-batch of the given layout."""
    return (packed_batch if layout == "packed" else padded_batch)(rows, indices, weight=weight)


def padded_batch(rows: Rows, indices: np.ndarray, *, weight: float = 1.0, extra: int = 0) -> Batch:
    """One right-padded batch, rows [all chosen; all rejected], for plain causal attention.

    Padding is right of every real token, so under a causal mask none sees it and no attention mask is needed.
    `extra` adds columns of padding (the noise-floor probe compares two paddings).
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


def packed_batch(rows: Rows, indices: np.ndarray, *, weight: float = 1.0) -> Batch:
    """One row of all pairs, each [prompt | chosen | rejected] once; positions of rejected restart at P.

    The prompt's last hidden state predicts the first token of both responses.
    """
    triples = [rows.row(int(i)) for i in indices]
    lengths = np.array([[len(part) for part in triple] for triple in triples])
    starts = np.cumsum(lengths.sum(1)) - lengths.sum(1)
    chosen, rejected, positions = [], [], []
    for start, (p, c, r) in zip(starts.tolist(), lengths.tolist(), strict=True):
        last = start + p - 1
        chosen.append(np.arange(last, last + c))
        if r:
            rejected.append(np.concatenate([[last], np.arange(last + c + 1, last + c + r)]))
        positions += [np.arange(p + c), np.arange(p, p + r)]
    targets = [chosen for _, chosen, _ in triples] + [rejected for *_, rejected in triples if len(rejected)]
    input_ids_BT = np.concatenate([part for triple in triples for part in triple])[None]
    batch = _batch(rows, indices, input_ids_BT, chosen + rejected, targets, weight)
    position_BT = torch.from_numpy(np.concatenate(positions)[None])
    return replace(batch, position_BT=position_BT, segments=segments_of(lengths))


def _batch(
    rows: Rows,
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
