"""rpo.score: pairs under two models, and how far one text's log-probs move by rounding alone."""

import copy

import numpy as np
import torch

from rpo import packing, score
from rpo.models import Policy
from tests.conftest import make_lm
from tests.test_models import VOCABULARY, own_logps, ragged
from tests.test_packing import LENGTHS, make_rows

CPU, ALL = torch.device("cpu"), np.arange(len(LENGTHS))


def make_policy(seed=0):
    return Policy(make_lm(seed=seed), compile_tiles=False)


def test_score_sums_each_response_under_both_models():
    """Four log-probs per pair equal sums of the library's own, and only the policy gets gradients."""
    policy, reference = make_policy(), make_policy(seed=1)
    batch, alone = ragged()
    pairs = score.score(policy, reference, batch)
    for model, sides in ((policy, ("chosen_P", "rejected_P")), (reference, ("ref_chosen_P", "ref_rejected_P"))):
        expected_S = torch.stack([own_logps(model.lm, [text]).sum() for text in alone])
        torch.testing.assert_close(torch.cat([getattr(pairs, side) for side in sides]), expected_S)
    assert pairs.tokens_chosen_P.tolist() == [c for _, c, _ in LENGTHS]
    assert pairs.tokens_rejected_P.tolist() == [r for _, _, r in LENGTHS]
    (pairs.chosen_P - pairs.ref_chosen_P).sum().backward()
    assert all(param.grad is None for param in reference.parameters())
    assert any(param.grad is not None for param in policy.parameters())


def test_score_of_supervised_rows():
    """Rows without a rejected response have that side empty, with and without a reference."""
    rows = make_rows([(p, c, 0) for p, c, _ in LENGTHS], vocab_size=VOCABULARY)
    batch, policy = packing.padded_batch(rows, ALL), make_policy()
    alone = score.score(policy, None, batch)
    beside = score.score(policy, make_policy(), batch)
    assert alone.chosen_P.shape == (len(LENGTHS),) and alone.ref_chosen_P is None
    assert torch.equal(beside.ref_chosen_P, alone.chosen_P)
    for pairs in (alone, beside):
        assert (pairs.rejected_P, pairs.ref_rejected_P, pairs.tokens_rejected_P) == (None, None, None)


def test_noise_floor_is_rounding():
    """Positive, of fp32's size in fp32, and far larger where the weights are bfloat16's."""
    rows, policy = make_rows(LENGTHS, vocab_size=VOCABULARY), make_policy()
    floor = score.noise_floor(policy, rows, ALL, CPU, positions=128)
    assert 0 < floor < 1e-5
    half = score.noise_floor(Policy(make_lm().bfloat16(), compile_tiles=False), rows, ALL, CPU, positions=128)
    assert half > 100 * floor


def test_noise_floor_of_supervised_rows():
    """Rows without a rejected response have a floor too."""
    rows = make_rows([(p, c, 0) for p, c, _ in LENGTHS], vocab_size=VOCABULARY)
    assert 0 < score.noise_floor(make_policy(), rows, ALL, CPU, positions=128) < 1e-5


def test_mean_gap():
    """Zero between a model and its copy; between others the mean |difference| over all scored tokens, by hand."""
    rows, policy, other = make_rows(LENGTHS, vocab_size=VOCABULARY), make_policy(), make_policy(seed=1)
    assert score.mean_gap(policy, copy.deepcopy(policy), rows, ALL, CPU) == 0
    _, alone = ragged()
    expected = (own_logps(policy.lm, alone) - own_logps(other.lm, alone)).abs().mean().item()
    np.testing.assert_allclose(score.mean_gap(policy, other, rows, ALL, CPU), expected, rtol=1e-5)
