"""rpo.losses against hand arithmetic, closed forms, the two published implementations, and finite differences."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from rpo import losses
from rpo.config import Loss
from rpo.errors import UserError
from rpo.losses import PairLogps
from tests.helpers.runs import settings


def make_loss(**keys):
    defaults = {
        "preference": "sigmoid",
        "sft": "none",
        "beta": 0.1,
        "eta": 0.0,
        "label_smoothing": 0.0,
        "normalize": keys.get("preference") == "ipo",
        "lam": None,
        "clip": None,
        "gamma": None,
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


OWN = {"robust": {"label_smoothing": 0.2}, "dpop": {"lam": 3.0}, "chi_po": {"clip": 5.0}, "simpo": {"gamma": 0.7}}
PREFERENCES = ["sigmoid", "ipo", "hinge", "robust", "dpop", "chi_po", "simpo", "cpo", "orpo"]


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("sft", ["none", "sum", "avg", "token"])
def test_every_mix_has_the_gradient_of_its_value(preference, sft):
    """Any preference form with any SFT form: autograd equals finite differences in float64."""
    own = OWN.get(preference, {})
    loss = make_loss(preference=preference, sft=sft, eta=0.0 if sft == "none" else 0.7, beta=0.13, **own)
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
        others = [make_loss(preference=each, **OWN.get(each, {})) for each in PREFERENCES]
        for loss in (make_loss(sft="avg", eta=0.2), make_loss(preference="ipo", sft="token", eta=1.0), *others):
            for term_P in losses.objective(loss, make_pairs(dtype=dtype), **counts):
                assert term_P.dtype == wide


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("far", [1e5, 1e-30, 0.0])
def test_far_and_certain_responses_stay_finite(preference, far):
    """Log-probs of -1e5 and of 0, where a response is certain: finite losses and gradients of every form, in fp32."""
    certain_P, far_P = torch.zeros(2, requires_grad=True), torch.tensor([-far, -1.0], requires_grad=True)
    for sides in ((certain_P, far_P), (far_P, certain_P)):
        for reference in (torch.zeros(2), torch.full((2,), -1e5)):
            pairs = PairLogps(*sides, reference, reference.flip(0), torch.ones(2), torch.ones(2))
            loss = total(make_loss(preference=preference, **OWN.get(preference, {})), pairs)
            grads = torch.autograd.grad(loss, sides)
            assert loss.isfinite() and all(grad.isfinite().all() for grad in grads), (loss, grads)


def test_far_margins_stay_finite():
    """beta D of +-1e4 gives finite losses and gradients (a naive log(sigmoid) is -inf there)."""
    chosen_P = torch.tensor([0.0, -1e5], requires_grad=True)
    zeros_P = torch.zeros(2)
    pairs = PairLogps(chosen_P, torch.tensor([-1e5, 0.0]), zeros_P, zeros_P, torch.ones(2), torch.ones(2))
    loss = total(make_loss(), pairs)
    loss.backward()
    assert loss.isfinite() and chosen_P.grad.isfinite().all()


# ---- baselines: each paper's formula, in numpy ------------------------------------------------------------------------------


def softplus(x):
    return np.logaddexp(0, x)


def arrays(pairs):
    """c, r, their references and token counts, as float64 arrays."""
    names = ("chosen_P", "rejected_P", "ref_chosen_P", "ref_rejected_P", "tokens_chosen_P", "tokens_rejected_P")
    return [getattr(pairs, name).double().numpy() for name in names]


def preference_of(pairs, **keys):
    return losses.preference_loss(make_loss(**keys), pairs).numpy()


def test_length_normalised_dpo():
    """Tulu 3's DPO, TRL's sigmoid_norm: each side's log-ratio divided by its own tokens; with one token each it is DPO."""
    pairs = make_pairs()
    c, r, ref_c, ref_r, tokens_c, tokens_r = arrays(pairs)
    expected = softplus(-5 * ((c - ref_c) / tokens_c - (r - ref_r) / tokens_r))
    np.testing.assert_allclose(preference_of(pairs, normalize=True, beta=5.0), expected, rtol=1e-13)
    ones = replace(pairs, tokens_chosen_P=torch.ones(7), tokens_rejected_P=torch.ones(7))
    np.testing.assert_array_equal(preference_of(ones, normalize=True), preference_of(ones))


def test_robust_dpo_is_unbiased():
    """With the labels flipped with chance e its mean is DPO's loss under the true ones; e = 0 is DPO, and TRL's formula holds."""
    pairs, e, beta = make_pairs(), 0.3, 0.2
    flipped = PairLogps(pairs.rejected_P, pairs.chosen_P, pairs.ref_rejected_P, pairs.ref_chosen_P,
                        pairs.tokens_rejected_P, pairs.tokens_chosen_P)  # fmt: skip
    own = {"preference": "robust", "beta": beta, "label_smoothing": e}
    seen = (1 - e) * preference_of(pairs, **own) + e * preference_of(flipped, **own)
    np.testing.assert_allclose(seen, preference_of(pairs, beta=beta), rtol=1e-12)
    c, r, ref_c, ref_r, *_ = arrays(pairs)
    logits = beta * ((c - ref_c) - (r - ref_r))
    theirs = (softplus(-logits) * (1 - e) - softplus(logits) * e) / (1 - 2 * e)
    np.testing.assert_allclose(preference_of(pairs, **own), theirs, rtol=1e-12)
    np.testing.assert_array_equal(
        preference_of(pairs, **own | {"label_smoothing": 0.0}), preference_of(pairs, beta=beta)
    )


def test_dpop():
    """Smaug's formula; chosen responses that have risen are DPO's pairs; a fallen one is pulled up beta lambda times harder."""
    pairs, beta, lam = make_pairs(grad=True), 0.3, 50.0
    own = {"preference": "dpop", "beta": beta, "lam": lam}
    loss_P = losses.preference_loss(make_loss(**own), pairs)
    loss_P.sum().backward()
    c, r, ref_c, ref_r, *_ = arrays(detached(pairs))
    logits = beta * (c - ref_c - (r - ref_r) - lam * np.maximum(0, ref_c - c))
    np.testing.assert_allclose(loss_P.detach().numpy(), softplus(-logits), rtol=1e-12)
    fell = c < ref_c
    assert fell.any() and not fell.all()
    np.testing.assert_allclose(pairs.chosen_P.grad, -beta * (1 + lam * fell) / (1 + np.exp(logits)), rtol=1e-12)
    dpo = preference_of(detached(pairs), beta=beta)
    np.testing.assert_array_equal(loss_P.detach().numpy()[~fell], dpo[~fell])


def detached(pairs):
    return PairLogps(*(getattr(pairs, each.name).detach() for each in fields(pairs)))


def test_chi_po():
    """Algorithm 1 by probabilities, not logs: the link z + log z, the clip at +-2 R_max, and no gradient beyond it."""
    pairs, beta, clip = make_pairs(grad=True), 0.05, 0.4
    loss_P = losses.preference_loss(make_loss(preference="chi_po", beta=beta, clip=clip), pairs)
    loss_P.sum().backward()
    c, r, ref_c, ref_r, *_ = arrays(detached(pairs))
    z_c, z_r = (np.minimum(np.exp(x), math.exp(20)) for x in (c - ref_c, r - ref_r))
    logits = beta * (z_c + c - ref_c) - beta * (z_r + r - ref_r)
    np.testing.assert_allclose(loss_P.detach().numpy(), softplus(-np.clip(logits, -clip, clip)), rtol=1e-12)
    beyond = np.abs(logits) > clip
    assert beyond.any() and not beyond.all()
    np.testing.assert_array_equal(pairs.chosen_P.grad.numpy() == 0, beyond)
    whole = preference_of(detached(pairs), preference="chi_po", beta=beta)
    np.testing.assert_allclose(whole, softplus(-logits), rtol=1e-12)


def test_chi_po_meets_dpo_near_the_reference():
    """To first order in a small shift the link is 1 + 2 log z: chi-PO with beta is DPO with 2 beta there."""
    pairs = make_pairs()
    near = replace(pairs, ref_chosen_P=pairs.chosen_P - 1e-7, ref_rejected_P=pairs.rejected_P + 2e-7)
    np.testing.assert_allclose(
        preference_of(near, preference="chi_po", beta=0.05), preference_of(near, beta=0.1), rtol=1e-13
    )


def test_reference_free_losses():
    """SimPO, CPO and ORPO by their papers' formulas; no reference is read."""
    pairs = replace(make_pairs(), ref_chosen_P=None, ref_rejected_P=None)
    c, r, _, _, tokens_c, tokens_r = arrays(replace(pairs, ref_chosen_P=pairs.chosen_P, ref_rejected_P=pairs.chosen_P))
    simpo = softplus(-(2.0 * c / tokens_c - 2.0 * r / tokens_r - 1.0))
    np.testing.assert_allclose(preference_of(pairs, preference="simpo", beta=2.0, gamma=1.0), simpo, rtol=1e-12)
    np.testing.assert_allclose(preference_of(pairs, preference="cpo"), softplus(-0.1 * (c - r)), rtol=1e-12)
    p_c, p_r = np.exp(c / tokens_c), np.exp(r / tokens_r)
    ratio = (p_c / (1 - p_c)) / (p_r / (1 - p_r))
    orpo = -0.1 * np.log(1 / (1 + 1 / ratio))
    np.testing.assert_allclose(preference_of(pairs, preference="orpo"), orpo, rtol=1e-10)


def test_implicit_rewards():
    """beta times the shift where there is a reference, whatever the loss makes of it; TRL's rewards where there is none."""
    pairs = make_pairs()
    c, r, ref_c, ref_r, tokens_c, tokens_r = arrays(pairs)
    expected = {"simpo": (c / tokens_c, r / tokens_r), "orpo": (c / tokens_c, r / tokens_r), "cpo": (c, r)}
    for preference in PREFERENCES:
        loss = make_loss(preference=preference, **OWN.get(preference, {}))
        for ours, side in zip(
            losses.implicit_rewards(loss, pairs), expected.get(preference, (c - ref_c, r - ref_r)), strict=True
        ):
            np.testing.assert_allclose(ours, 0.1 * side, rtol=1e-12)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["loss=hinge", "loss.normalize=true"],
            "loss.normalize=True with loss.preference=hinge: only sigmoid and ipo read it",
        ),
        (["loss=dpo", "loss.lam=5"], "loss.lam=5.0 with loss.preference=sigmoid: only dpop reads it; set it to null"),
        (["loss=dpop", "loss.lam=null"], "loss.lam=null with loss.preference=dpop, which needs it; use loss=dpop"),
        (["loss.preference=simpo"], "loss.gamma=null with loss.preference=simpo, which needs it"),
        (["loss=ipo", "loss.clip=1"], "only chi_po reads it"),
        (["loss=dpop", "loss.label_smoothing=0.1"], "only sigmoid and robust read it; set it to 0"),
        (
            ["reference.alpha=0.5"],
            "reference.alpha=0.5 with reference.kind=cached: moving needs it and nothing else reads it",
        ),
        (
            ["reference=moving", "reference.every=null"],
            "reference.every=null with reference.kind=moving: moving needs it",
        ),
        (
            ["reference=moving", "reference.path=x"],
            "reference.path=.*x with reference=moving, which starts as the policy does",
        ),
    ],
)
def test_keys_that_are_not_read_are_refused(given, words):
    """A key of another loss or reference would do nothing, and one that is missing has no value: one line."""
    with pytest.raises(UserError, match=words):
        settings(*given)
