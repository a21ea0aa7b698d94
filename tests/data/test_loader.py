"""The steps' shares, made in a thread: those that a plan and a layout say, from any step on."""

import numpy as np
import torch

from rpo.data.batch import make_batch
from rpo.data.loader import load_steps
from rpo.data.schedule import Plan, plan_step
from tests.helpers.rows import make_rows


def test_shares_are_the_plans_from_any_step_on(group):
    """Over two epochs, the last step of each short, every share has the rows, counts and batches of its step, and no more."""
    rows = make_rows([(3 + i % 4, 2 + i % 3, 1 + i % 5) for i in range(10)])
    plan = Plan(len(rows), batch_size=4, seed=7, epochs=2, max_steps=None)
    assert plan.total_steps == 6
    for start in (0, 4, 6):
        shares = list(load_steps(rows, plan, layout="packed", budget=30, device=torch.device("cpu"), start=start))
        assert len(shares) == 6 - start
        for step, (share, batches) in enumerate(shares, start=start):
            expected = plan_step(rows, plan.rows(step), layout="packed", budget=30)
            assert share.pairs == len(plan.rows(step)) == (2 if step % 3 == 2 else 4)
            members = np.sort(np.concatenate([part for part, _ in share.microbatches]))
            assert members.tolist() == np.sort(plan.rows(step)).tolist()
            for batch, (part, weight) in zip(batches, expected.microbatches, strict=True):
                assert torch.equal(batch.input_ids_BT, make_batch(rows, part, "packed", weight=weight).input_ids_BT)
    assert Plan(10, batch_size=4, seed=7, epochs=2, max_steps=2).total_steps == 2
