"""rpo.data.batch: every pair scored once, whoever scores it, however the step is cut and the rows are laid out."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo.data import schedule
from rpo.data.batch import check_budget, make_batch, packed_batch, padded_batch
from rpo.errors import UserError
from tests.helpers.rows import LENGTHS, make_rows

LAYOUTS = ("padded", "packed")


def test_padded_batch_reads_the_right_hidden_states():
    """source_N points at the token before each response token, target_N is that token, ordered chosen then rejected."""
    rows = make_rows(LENGTHS)
    batch = padded_batch(rows, np.arange(5))
    flat = batch.input_ids_BT.flatten()
    expected = [rows.row(i)[1] for i in range(5)] + [rows.row(i)[2] for i in range(5)]
    assert batch.target_N.tolist() == np.concatenate(expected).tolist()
    assert flat[batch.source_N + 1].tolist() == batch.target_N.tolist()
    firsts = np.cumsum([0, *map(len, expected)])[:-1]
    last_prompt = [rows.row(i)[0][-1] for i in range(5)] * 2
    assert flat[batch.source_N[firsts]].tolist() == last_prompt
    assert batch.length_S.tolist() == list(map(len, expected))


def test_packed_batch_by_hand():
    """Two pairs, 10 11 | 12 | 13 14 and 15 | 16 17 | 18: the prompt's last column is read for both of its responses."""
    rows = dataclasses.replace(make_rows([(2, 1, 2), (1, 2, 1)]), ids=np.arange(10, 19, dtype=np.int32))
    batch = packed_batch(rows, np.array([0, 1]), weight=0.5)
    assert batch.input_ids_BT.tolist() == [list(range(10, 19))]
    assert batch.position_BT.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 1]]
    assert batch.source_N.tolist() == [1, 5, 6, 1, 3, 5]
    assert batch.target_N.tolist() == [12, 16, 17, 13, 14, 18]
    assert batch.length_S.tolist() == [1, 2, 2, 1]
    assert batch.segments.lengths == ((2, 1, 2), (1, 2, 1))
    assert (batch.num_pairs, batch.weight, batch.ref_S) == (2, 0.5, None)
    swapped = packed_batch(rows, np.array([1, 0]))
    assert swapped.input_ids_BT.tolist() == [[15, 16, 17, 18, *range(10, 15)]]
    assert swapped.source_N.tolist() == [0, 1, 5, 0, 5, 7]


@pytest.mark.parametrize("supervised", [False, True])
def test_layouts_agree_on_what_is_scored(supervised):
    """Packed and padded name the same targets in the same order, and read each after the same token at the same place."""
    rows = make_rows([(p, c, 0 if supervised else r) for p, c, r in LENGTHS])
    padded, packed = (make_batch(rows, np.array([3, 0, 4, 1, 2]), layout) for layout in LAYOUTS)
    assert torch.equal(packed.target_N, padded.target_N) and torch.equal(packed.length_S, padded.length_S)
    read_padded, read_packed = (batch.input_ids_BT.flatten()[batch.source_N] for batch in (padded, packed))
    assert torch.equal(read_packed, read_padded)
    assert torch.equal(packed.position_BT[0, packed.source_N], padded.source_N % padded.input_ids_BT.shape[1])
    assert packed.input_ids_BT.numel() == rows.ids.size < padded.input_ids_BT.numel()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40),
    supervised=st.booleans(),
    world_size=st.integers(1, 5),
    budget=st.integers(1, 300),
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_covers_each_pair_once(layout, lengths, supervised, world_size, budget):
    """Over all ranks each pair has weight 1 exactly once; ranks have equally many micro-batches, within the budget."""
    rows = make_rows([(p, c, 0) for p, c, _ in lengths] if supervised else lengths)
    indices, options = np.arange(len(lengths)), {"layout": layout, "budget": budget, "world_size": world_size}
    plans = [schedule.plan_step(rows, indices, rank=rank, **options) for rank in range(world_size)]
    seen = [int(i) for plan in plans for members, weight in plan.microbatches if weight for i in members]
    assert sorted(seen) == indices.tolist()
    assert len({len(plan.microbatches) for plan in plans}) == 1
    counts = {(p.pairs, p.chosen_tokens, p.unique_tokens) for p in plans}
    assert counts == {(len(lengths), int(rows.chosen.sum()), rows.ids.size)}
    for plan in plans:
        for members, _ in plan.microbatches:
            size = make_batch(rows, members, layout).input_ids_BT.numel()
            assert len(members) == 1 or size <= budget


def log_normal(medians, spreads, count):
    """Rows whose P, C, R are log-normal."""
    draws = np.random.default_rng(0).normal(size=(count, 3))
    lengths = np.maximum(1, np.exp(np.log(medians) + np.array(spreads) * draws)).astype(int)
    return make_rows([tuple(row) for row in lengths.tolist()])


def padded_cost(rows, members):
    return padded_batch(rows, members).input_ids_BT.numel()


def packed_cost(rows, members):
    """Tokens, and what each of them sees, counted one by one."""
    tokens = seen = 0
    for i in members:
        p, c, r = map(len, rows.row(i))
        tokens += p + c + r
        seen += sum(range(1, p + c + 1)) + sum(range(p + 1, p + r + 1))
    return tokens + schedule.ATTENTION_COST * seen


@pytest.mark.parametrize(("layout", "cost", "bound"), [("padded", padded_cost, 1.15), ("packed", packed_cost, 1.02)])
def test_ranks_are_balanced(layout, cost, bound):
    """On log-normal lengths the slowest of 8 ranks has at most so much more to do than the mean, over 128 pairs."""
    rows = log_normal([55, 55, 55], [0.6, 0.6, 0.6], 128)
    loads = []
    for rank in range(8):
        plan = schedule.plan_step(rows, np.arange(128), layout=layout, budget=4096, rank=rank, world_size=8)
        loads.append(sum(cost(rows, members) for members, weight in plan.microbatches if weight))
    assert max(loads) / np.mean(loads) < bound, loads


def test_packed_rows_are_full():
    """4,096 pairs of HH's lengths fill rows of 16,384 tokens to 97% and more."""
    rows = log_normal([86, 43, 32], [0.85, 0.81, 0.85], 4096)
    plan = schedule.plan_step(rows, np.arange(4096), layout="packed", budget=16_384)
    assert rows.ids.size / (16_384 * len(plan.microbatches)) >= 0.97


@pytest.mark.parametrize(
    ("layout", "supervised", "worst", "least"),
    [
        ("packed", False, 3, 22),  # 4 + 9 + 9
        ("padded", False, 2, 26),  # twice 1 + 12
        ("packed", True, 2, 13),
        ("padded", True, 2, 13),
    ],
)
def test_the_budget_names_the_pair_that_needs_most(layout, supervised, worst, least):
    """One token too few names file and line of the pair, and the least value, with which every micro-batch then fits."""
    rows = make_rows([(3, 5, 0), (1, 12, 0), (4, 5, 0)] if supervised else [(3, 5, 5), (1, 12, 1), (4, 9, 9)])
    rows = dataclasses.replace(rows, line=np.arange(1, 4), files=("pairs.jsonl",))
    pair = f"the pair at pairs.jsonl:{worst} has {least} tokens in layout={layout}"
    fix = f"set it to {least} or more, or lower data.max_length"
    with pytest.raises(UserError, match=f"^tokens_per_microbatch={least - 1}: {pair}; {fix}$"):
        check_budget(rows, layout, least - 1)
    check_budget(rows, layout, least)
    plan = schedule.plan_step(rows, np.arange(3), layout=layout, budget=least)
    sizes = [make_batch(rows, members, layout).input_ids_BT.numel() for members, _ in plan.microbatches]
    assert max(sizes) <= least
