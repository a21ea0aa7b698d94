"""rpo.packing: every pair scored once, whoever scores it and however the step is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo import packing
from rpo.data import Rows


def make_rows(lengths, seed=0, vocab_size=50):
    rng = np.random.default_rng(seed)
    prompt, chosen, rejected = (np.array(column, dtype=np.int32) for column in zip(*lengths, strict=True))
    ids = rng.integers(1, vocab_size, size=int((prompt + chosen + rejected).sum())).astype(np.int32)
    none = np.zeros(len(lengths), np.int32)
    return Rows(ids, prompt, chosen, rejected, none, none, ("made",))


LENGTHS = [(3, 2, 5), (1, 1, 1), (7, 4, 2), (2, 9, 3), (5, 5, 5)]


def test_padded_batch_reads_the_right_hidden_states():
    """source_N points at the token before each response token, target_N is that token, ordered chosen then rejected."""
    rows = make_rows(LENGTHS)
    batch = packing.padded_batch(rows, np.arange(5))
    flat = batch.input_ids_BT.flatten()
    expected = [rows.row(i)[1] for i in range(5)] + [rows.row(i)[2] for i in range(5)]
    assert batch.target_N.tolist() == np.concatenate(expected).tolist()
    assert flat[batch.source_N + 1].tolist() == batch.target_N.tolist()
    firsts = np.cumsum([0, *map(len, expected)])[:-1]
    last_prompt = [rows.row(i)[0][-1] for i in range(5)] * 2
    assert flat[batch.source_N[firsts]].tolist() == last_prompt
    assert batch.length_S.tolist() == list(map(len, expected))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40),
    world_size=st.integers(1, 5),
    budget=st.integers(1, 300),
)
def test_plan_covers_each_pair_once(lengths, world_size, budget):
    """Over all ranks each pair has weight 1 exactly once; ranks have equally many micro-batches, within the budget."""
    rows, indices = make_rows(lengths), np.arange(len(lengths))
    plans = [packing.plan_step(rows, indices, budget=budget, rank=r, world_size=world_size) for r in range(world_size)]
    seen = [int(i) for plan in plans for members, weight in plan.microbatches if weight for i in members]
    assert sorted(seen) == indices.tolist()
    assert len({len(plan.microbatches) for plan in plans}) == 1
    assert {(p.pairs, p.chosen_tokens) for p in plans} == {(len(lengths), int(rows.chosen.sum()))}
    for plan in plans:
        for members, _ in plan.microbatches:
            size = packing.padded_batch(rows, members).input_ids_BT.numel()
            assert len(members) == 1 or size <= budget


def test_ranks_are_balanced():
    """On log-normal lengths the slowest of 8 ranks has at most 15% more padded tokens than the mean."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(4, 0.6, size=(128, 3))).astype(int)
    rows = make_rows([tuple(row) for row in lengths])
    loads = []
    for rank in range(8):
        plan = packing.plan_step(rows, np.arange(128), budget=4096, rank=rank, world_size=8)
        loads.append(sum(packing.padded_batch(rows, m).input_ids_BT.numel() for m, w in plan.microbatches if w))
    assert max(loads) / np.mean(loads) < 1.15, loads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_response_sums_and_their_gradient(dtype):
    """Segment sums equal a loop's, and each token's gradient is its own response's."""
    lengths = torch.tensor([3, 1, 4])
    logps_N = torch.randn(8, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
    sums_S = packing.response_sums(logps_N, lengths)
    torch.testing.assert_close(sums_S, torch.stack([part.sum() for part in logps_N.split(lengths.tolist())]))
    (grad_N,) = torch.autograd.grad(sums_S @ torch.tensor([1.0, -2.0, 3.0], dtype=dtype), logps_N)
    assert grad_N.tolist() == [1, 1, 1, -2, 3, 3, 3, 3]
