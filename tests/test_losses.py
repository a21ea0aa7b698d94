"""rpo.losses against hand arithmetic, closed forms, the two published implementations, and finite differences."""

import math

import pytest
import torch

from rpo import losses
from rpo.config import Loss
from rpo.losses import PairLogps


def make_loss(**keys):
    defaults = {
        "preference": "sigmoid",
        "sft": "none",
        "beta": 0.1,
        "eta": 0.0,
        "label_smoothing": 0.0,
        "normalize": True,
    }
    return Loss(**(defaults | keys))


def make_pairs(num_pairs=7, dtype=torch.float64, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    sides = [-30 * torch.rand(num_pairs, generator=generator, dtype=torch.float64) for _ in range(4)]
    tokens = [torch.randint(3, 40, (num_pairs,), generator=generator) for _ in range(2)]
    sides = [side.to(dtype) for side in sides]
    for side in sides[:2]:
        side.requires_grad_(grad)
    return PairLogps(*sides, *tokens)


def total(loss, pairs):
    """The step's loss as train.py forms it: both terms summed over pairs, divided by the number of pairs."""
    counts = {"step_pairs": len(pairs.chosen_P), "step_chosen_tokens": int(pairs.tokens_chosen_P.sum())}
    preference_P, sft_P = losses.objective(loss, pairs, **counts)
    return (preference_P + sft_P).sum() / counts["step_pairs"]


@pytest.mark.parametrize(("beta", "eta"), [(0.01, 0.005), (0.02, 0.25), (0.5, 0.2), (2.0, 1.0)])
def test_rpo_sum_gradient_identity(beta, eta):
    """dL/dlogp(c) = -beta (sigmoid(-beta D) + eta)/pairs and dL/dlogp(r) = +beta sigmoid(-beta D)/pairs, exactly."""
    pairs = make_pairs(grad=True)
    total(make_loss(sft="sum", beta=beta, eta=eta), pairs).backward()
    with torch.no_grad():
        margin_P = (pairs.chosen_P - pairs.ref_chosen_P) - (pairs.rejected_P - pairs.ref_rejected_P)
        weight_P = 1 / (1 + torch.exp(beta * margin_P))
        torch.testing.assert_close(pairs.chosen_P.grad, -beta * (weight_P + eta) / 7, rtol=1e-13, atol=0)
        torch.testing.assert_close(pairs.rejected_P.grad, beta * weight_P / 7, rtol=1e-13, atol=0)


@pytest.mark.parametrize("sft", ["sum", "avg", "token"])
def test_eta_zero_is_dpo_bit_for_bit(sft):
    """With eta = 0 value and gradients equal DPO's in every bit, in fp32, whatever the SFT form."""
    ours, dpo = make_pairs(dtype=torch.float32, grad=True), make_pairs(dtype=torch.float32, grad=True)
    a, b = total(make_loss(sft=sft, eta=0.0), ours), total(make_loss(), dpo)
    a.backward()
    b.backward()
    assert torch.equal(a, b)
    assert torch.equal(ours.chosen_P.grad, dpo.chosen_P.grad)
    assert torch.equal(ours.rejected_P.grad, dpo.rejected_P.grad)


def two_pairs():
    """Chosen logps -6 (3 tokens) and -20 (5 tokens); D = 2 and -1 with the reference at zero shift for rejected."""
    values = [[-6.0, -20.0], [-9.0, -4.0], [-8.0, -19.0], [-9.0, -4.0]]
    return PairLogps(*map(torch.tensor, values), torch.tensor([3, 5]), torch.tensor([2, 4]))


@pytest.mark.parametrize(
    ("sft", "expected"),
    [
        ("sum", 0.5 * 0.1 * (6 + 20) / 2),  # eta beta, mean over pairs of sums
        ("avg", 0.5 * (6 / 3 + 20 / 5) / 2),  # eta, mean over pairs of per-token means: (2 + 4)/2
        ("token", 0.5 * (6 + 20) / (3 + 5)),  # eta, all NLL over all tokens: 26/8
    ],
)
def test_three_sft_forms_by_hand(sft, expected):
    """sum, avg and token on two pairs with NLL 6 and 20 nats over 3 and 5 tokens, beta 0.1, eta 0.5."""
    loss = make_loss(preference="none", sft=sft, eta=0.5)
    assert total(loss, two_pairs()).item() == pytest.approx(expected, rel=1e-6)


def test_preference_forms_by_hand():
    """Margins D = 2 and -1: DPO, cDPO, hinge and IPO (sums and per-token means) worked out on paper."""
    pairs = two_pairs()
    softplus = lambda z: math.log1p(math.exp(z))  # noqa: E731
    dpo = (softplus(-0.2) + softplus(0.1)) / 2
    assert total(make_loss(), pairs).item() == pytest.approx(dpo, rel=1e-6)
    smooth = (0.8 * softplus(-0.2) + 0.2 * softplus(0.2) + 0.8 * softplus(0.1) + 0.2 * softplus(-0.1)) / 2
    assert total(make_loss(label_smoothing=0.2), pairs).item() == pytest.approx(smooth, rel=1e-6)
    assert total(make_loss(preference="hinge"), pairs).item() == pytest.approx((0.8 + 1.1) / 2, rel=1e-6)
    sums = ((2 - 5) ** 2 + (-1 - 5) ** 2) / 2
    assert total(make_loss(preference="ipo", normalize=False), pairs).item() == pytest.approx(sums, rel=1e-6)
    means = ((2 / 3 - 5) ** 2 + (-1 / 5 - 5) ** 2) / 2
    assert total(make_loss(preference="ipo"), pairs).item() == pytest.approx(means, rel=1e-6)


def test_rpo_sum_is_the_handbook_code():
    """The authors' main-paper code: losses = -logsigmoid(beta * logits), then losses -= eta * beta * sum logp(chosen)."""
    pairs, beta, eta = make_pairs(), 0.01, 0.005
    logits_P = (pairs.chosen_P - pairs.rejected_P) - (pairs.ref_chosen_P - pairs.ref_rejected_P)
    published_P = -torch.nn.functional.logsigmoid(beta * logits_P) - eta * beta * pairs.chosen_P
    ours = total(make_loss(sft="sum", beta=beta, eta=eta), pairs)
    torch.testing.assert_close(ours, published_P.mean(), rtol=1e-13, atol=0)


def test_rpo_avg_is_the_openrlhf_code():
    """The authors' appendix code: DPO on summed log-ratios + nll_loss_coef * mean over rows of per-token mean NLL."""
    pairs, beta, coefficient = make_pairs(), 0.5, 0.2
    logits_P = (pairs.chosen_P - pairs.rejected_P) - (pairs.ref_chosen_P - pairs.ref_rejected_P)
    nll = -(pairs.chosen_P / pairs.tokens_chosen_P).mean()
    published = -torch.nn.functional.logsigmoid(beta * logits_P).mean() + coefficient * nll
    torch.testing.assert_close(
        total(make_loss(sft="avg", beta=beta, eta=coefficient), pairs), published, rtol=1e-13, atol=0
    )


def test_sft_forms_agree_where_lengths_are_equal():
    """With all chosen of T tokens: avg = token, and sum with eta' = eta / (beta T) is the same loss."""
    pairs = make_pairs()
    pairs = PairLogps(*[getattr(pairs, f"{s}_P") for s in ("chosen", "rejected", "ref_chosen", "ref_rejected")],
                      torch.full((7,), 12), pairs.tokens_rejected_P)  # fmt: skip
    avg, token = (total(make_loss(sft=sft, eta=0.3), pairs) for sft in ("avg", "token"))
    summed = total(make_loss(sft="sum", eta=0.3 / (0.1 * 12)), pairs)
    torch.testing.assert_close(avg, token, rtol=1e-13, atol=0)
    torch.testing.assert_close(avg, summed, rtol=1e-13, atol=0)


@pytest.mark.parametrize("preference", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("sft", ["none", "sum", "avg", "token"])
def test_every_mix_has_the_gradient_of_its_value(preference, sft):
    """Any preference form with any SFT form: autograd equals finite differences in float64."""
    loss = make_loss(preference=preference, sft=sft, eta=0.0 if sft == "none" else 0.7, beta=0.13)
    base = make_pairs()

    def value(chosen_P, rejected_P):
        return total(loss, PairLogps(chosen_P, rejected_P, base.ref_chosen_P, base.ref_rejected_P,
                                     base.tokens_chosen_P, base.tokens_rejected_P))  # fmt: skip

    inputs = (base.chosen_P.clone().requires_grad_(), base.rejected_P.clone().requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)


def test_dtypes():
    """Half log-probs are computed in fp32, float64 stays float64."""
    counts = {"step_pairs": 7, "step_chosen_tokens": 100}
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        for loss in (make_loss(sft="avg", eta=0.2), make_loss(preference="ipo", sft="token", eta=1.0)):
            for term_P in losses.objective(loss, make_pairs(dtype=dtype), **counts):
                assert term_P.dtype == wide


def test_far_margins_stay_finite():
    """beta D of +-1e4 gives finite losses and gradients (a naive log(sigmoid) is -inf there)."""
    chosen_P = torch.tensor([0.0, -1e5], requires_grad=True)
    zeros_P = torch.zeros(2)
    pairs = PairLogps(chosen_P, torch.tensor([-1e5, 0.0]), zeros_P, zeros_P, torch.ones(2), torch.ones(2))
    loss = total(make_loss(), pairs)
    loss.backward()
    assert loss.isfinite() and chosen_P.grad.isfinite().all()
