"""rpo.model.probe: pairs under two models, and how far one text's log-probs move by rounding alone."""

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from rpo.data.batch import make_batch, packed_batch, padded_batch
from rpo.model import attention
from rpo.model.policy import Policy, score
from rpo.model.probe import mean_gap, noise_floor
from tests.helpers.models import VOCABULARY, make_lm, own_logps, ragged
from tests.helpers.rows import LENGTHS, make_rows

CPU, ALL = torch.device("cpu"), np.arange(len(LENGTHS))
HOW = {"positions": 128, "compute_dtype": torch.float32}


def make_policy(seed=0, dtype=torch.float32):
    return Policy(make_lm(seed=seed).to(dtype), compile_tiles=False)


def test_score_sums_each_response_under_both_models():
    """Four log-probs per pair equal sums of the library's own, and only the policy gets gradients."""
    policy, reference = make_policy(), make_policy(seed=1)
    batch, alone = ragged()
    pairs = score(policy, reference, batch)
    for model, sides in ((policy, ("chosen_P", "rejected_P")), (reference, ("ref_chosen_P", "ref_rejected_P"))):
        expected_S = torch.stack([own_logps(model.lm, [text]).double().sum() for text in alone])
        torch.testing.assert_close(torch.cat([getattr(pairs, side) for side in sides]), expected_S)
    assert pairs.tokens_chosen_P.tolist() == [c for _, c, _ in LENGTHS]
    assert pairs.tokens_rejected_P.tolist() == [r for _, _, r in LENGTHS]
    (pairs.chosen_P - pairs.ref_chosen_P).sum().backward()
    assert all(param.grad is None for param in reference.parameters())
    assert any(param.grad is not None for param in policy.parameters())


def test_score_of_supervised_rows():
    """Rows without a rejected response have that side empty, with and without a reference."""
    rows = make_rows([(p, c, 0) for p, c, _ in LENGTHS], vocab_size=VOCABULARY)
    batch, policy = padded_batch(rows, ALL), make_policy()
    alone = score(policy, None, batch)
    beside = score(policy, make_policy(), batch)
    assert alone.chosen_P.shape == (len(LENGTHS),) and alone.ref_chosen_P is None
    assert torch.equal(beside.ref_chosen_P, alone.chosen_P)
    for pairs in (alone, beside):
        assert (pairs.rejected_P, pairs.ref_rejected_P, pairs.tokens_rejected_P) == (None, None, None)


def test_score_takes_the_reference_that_the_batch_carries():
    """Without a second model its log-probs are those stored beside the rows, in float64; with one they are its."""
    stored = np.arange(10, dtype=np.float64).reshape(5, 2) / 3
    rows = dataclasses.replace(make_rows(LENGTHS, vocab_size=VOCABULARY), ref_logps=stored)
    for layout in ("padded", "packed"):
        batch = make_batch(rows, np.array([4, 0, 2]), layout)
        pairs = score(make_policy(), None, batch)
        assert pairs.ref_chosen_P.dtype == pairs.chosen_P.dtype == torch.float64
        found = torch.stack([pairs.ref_chosen_P, pairs.ref_rejected_P], dim=1)
        torch.testing.assert_close(found, torch.from_numpy(stored[[4, 0, 2]]), rtol=0, atol=0)
        live = score(make_policy(), make_policy(), batch)
        assert torch.equal(live.ref_chosen_P, live.chosen_P)


def test_noise_floor_is_rounding():
    """In fp32 8 ulps of a log-prob, which nothing here moves by; where weights are bfloat16's what they move by."""
    rows = make_rows(LENGTHS, vocab_size=VOCABULARY)

    def floor(weights, compute):
        policy = make_policy(dtype=weights)
        return noise_floor(policy, rows, ALL, CPU, positions=128, compute_dtype=compute)

    assert floor(torch.float32, torch.float32) == 2**-20
    assert 0 < floor(torch.float64, torch.float64) < 1e-14
    measured = floor(torch.bfloat16, torch.float32)
    assert measured > 1e-5
    assert floor(torch.bfloat16, torch.bfloat16) == max(measured, 2**-11)


def test_noise_floor_of_supervised_rows():
    """Rows without a rejected response have a floor too."""
    rows = make_rows([(p, c, 0) for p, c, _ in LENGTHS], vocab_size=VOCABULARY)
    assert 0 < noise_floor(make_policy(), rows, ALL, CPU, **HOW) < 1e-5


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_mean_gap(layout):
    """Zero between a model and its copy; between others the mean |difference| over all scored tokens, by hand."""
    rows, policy, other = make_rows(LENGTHS, vocab_size=VOCABULARY), make_policy(), make_policy(seed=1)
    _, alone = ragged()
    gap = partial(mean_gap, rows=rows, indices=ALL, device=CPU)
    expected = (own_logps(policy.lm, alone) - own_logps(other.lm, alone)).abs().mean().item()
    np.testing.assert_allclose(gap((policy, layout), (other, layout)), expected, rtol=1e-5)
    assert gap((policy, layout), (copy.deepcopy(policy), layout)) == 0


def test_packed_gap(monkeypatch):
    """Rounding where packed is computed right; where rejected sees chosen, the mean |difference| per token, by hand."""

    def peeking(query, key, value, segments, **how):
        joined = tuple((p, c + r, 0) for p, c, r in segments.lengths)
        return attention.sdpa(query, key, value, dataclasses.replace(segments, lengths=joined), **how)

    rows, policy = make_rows(LENGTHS, vocab_size=VOCABULARY), make_policy()
    gap = partial(mean_gap, rows=rows, indices=ALL, device=CPU)
    assert gap((policy, "packed"), (policy, "padded")) < 1e-6
    monkeypatch.setitem(attention.BACKENDS, "peeking", peeking)
    policy.attention = "peeking"
    with torch.no_grad():
        wrong_N = policy(packed_batch(rows, ALL))
    expected = (wrong_N - own_logps(make_lm(), ragged()[1])).abs().mean().item()
    assert expected > 0.01
    np.testing.assert_allclose(gap((policy, "packed"), (policy, "padded")), expected, rtol=1e-4)
