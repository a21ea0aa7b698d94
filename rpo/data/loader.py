"""This rank's micro-batches of each step, prepared in a thread one step ahead."""

from dataclasses import dataclass

import torch

from rpo import dist
from rpo.data.batch import Batch, make_batch
from rpo.data.dataset import Rows
from rpo.data.schedule import Plan, StepPlan, plan_step


@dataclass(frozen=True)
class Share:
    """One rank's share of a step: `plan` with the counts of the whole step, and this rank's batches."""

    plan: StepPlan
    batches: list[Batch]


class Loader:
    """An iterator over this rank's shares of the steps from `start` to the end of `plan`."""

    def __init__(self, rows: Rows, plan: Plan, *, layout: str, budget: int, device: torch.device, start: int):
        self.rows, self.plan, self.layout, self.budget, self.device = rows, plan, layout, budget, device
        self.worker = dist.thread()
        self.step = start
        self.upcoming = self.worker.submit(self._share, start) if start < plan.total_steps else None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Share:
        if self.upcoming is None:
            raise StopIteration
        share = self.upcoming.result()
        self.step += 1
        more = self.step < self.plan.total_steps
        self.upcoming = self.worker.submit(self._share, self.step) if more else None
        return share

    def close(self) -> None:
        """Ends the thread, once what it has begun is done."""
        self.worker.shutdown()

    def _share(self, step: int) -> Share:
        plan = plan_step(
            self.rows,
            self.plan.rows(step),
            layout=self.layout,
            budget=self.budget,
            rank=dist.rank(),
            world_size=dist.world_size(),
        )
        batches = [make_batch(self.rows, part, self.layout, weight=weight) for part, weight in plan.microbatches]
        return Share(plan, [batch.pin() if self.device.type == "cuda" else batch for batch in batches])
