"""The rows of step k, divided among ranks and micro-batches.

Everything here is integer work on the host and a pure function of its arguments, so every rank derives the whole step's
plan (and with it the counts that losses are divided by) without a collective. P, C, R: a pair's token counts.
"""

from __future__ import annotations

import bisect
import heapq
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from rpo.data.batch import pair_sizes, text_lengths

if TYPE_CHECKING:
    from rpo.data.dataset import Rows

# ---- order


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """The number of steps in one pass over the rows, including a last short one."""
    return math.ceil(num_rows / batch_size)


@lru_cache(maxsize=1)
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the rows (int64, read-only), a function of its arguments alone."""
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    order.flags.writeable = False
    return order


def step_rows(step: int, num_rows: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of optimizer step `step`, counted from 0 over all epochs: a slice of that epoch's permutation.

    `batch_size` of them, fewer in an epoch's last step.
    """
    epoch, k = divmod(step, steps_per_epoch(num_rows, batch_size))
    return epoch_order(num_rows, seed, epoch)[k * batch_size : (k + 1) * batch_size]


@dataclass(frozen=True)
class Plan:
    """The rows of each step of a run: a function of these numbers alone, independent of ranks and layout."""

    num_rows: int
    batch_size: int
    seed: int
    epochs: int
    max_steps: int | None  # in place of epochs

    @property
    def total_steps(self) -> int:
        return self.max_steps or self.epochs * steps_per_epoch(self.num_rows, self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """The rows of the step that follows `step` updates."""
        return step_rows(step, self.num_rows, self.batch_size, self.seed)


# Work of one visible query-key pair, in tokens of the trunk: 12 L D over 6 x 12 L D^2 FLOPs, at a width D of 2,700.
ATTENTION_COST = 1 / 16_384


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
    rows: Rows, indices: np.ndarray, *, layout: str, budget: int, rank: int = 0, world_size: int = 1
) -> StepPlan:
    """This rank's micro-batches of the step whose pairs are `indices`, and the step's global counts.

    Every rank gets the same number of micro-batches, because each is a collective under FSDP: short ranks are filled
    up with one pair of weight 0. `budget` bounds a packed row's tokens, and rows x longest of a padded batch; a pair
    that is larger by itself (`check_budget` refuses those) stands alone.
    """
    divide = _divide_packed if layout == "packed" else _divide_padded
    shares = divide(rows, indices, budget, world_size)
    smallest = indices[pair_sizes(rows, indices).argmin()]
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


def _divide_packed(rows: Rows, indices: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
    """Rows of each rank: pairs go, costliest first, to the least loaded rank; each rank packs best-fit."""
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
    """Rows of at most `budget` tokens: each pair, largest first, goes to the fullest row that has room."""
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


def _divide_padded(rows: Rows, indices: np.ndarray, budget: int, world_size: int) -> list[list[np.ndarray]]:
    """Batches of each rank: pairs sorted by length (less padding), dealt in snake order (equal counts), cut by `budget`."""
    longest, rows_per_pair = text_lengths(rows, indices), 1 + (rows.rejected[indices] > 0)
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
