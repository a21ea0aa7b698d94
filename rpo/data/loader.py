"""This rank's micro-batches of each step, prepared in a thread one step ahead."""

from collections.abc import Iterator

import numpy as np
import torch

from rpo import dist
from rpo.data.batch import Batch, make_batch
from rpo.data.dataset import Rows
from rpo.data.schedule import Plan, StepPlan, plan_step


def own_share(rows: Rows, indices: np.ndarray, *, layout: str, budget: int) -> StepPlan:
    """`plan_step` of this process among all ranks."""
    return plan_step(rows, indices, layout=layout, budget=budget, rank=dist.rank(), world_size=dist.world_size())


def load_steps(
    rows: Rows, plan: Plan, *, layout: str, budget: int, device: torch.device, start: int
) -> Iterator[tuple[StepPlan, list[Batch]]]:
    """This rank's share of each step from `start` to the end of `plan`: with the counts of the whole step, and its batches.

    `close` ends the thread, once what it has begun is done.
    """

    def prepare(step: int) -> tuple[StepPlan, list[Batch]]:
        share = own_share(rows, plan.rows(step), layout=layout, budget=budget)
        batches = [make_batch(rows, part, layout, weight=weight) for part, weight in share.microbatches]
        return share, [batch.pin() if device.type == "cuda" else batch for batch in batches]

    with dist.thread() as worker:
        upcoming = worker.submit(prepare, start) if start < plan.total_steps else None
        for step in range(start + 1, plan.total_steps + 1):
            ready = upcoming.result()
            upcoming = worker.submit(prepare, step) if step < plan.total_steps else None
            yield ready
