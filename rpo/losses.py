"""The objective: preference and SFT terms as pure functions of per-response log-probs.

Letters: P pairs. Log-probs are natural-log sums over a response's scored tokens (nats), `tokens_*` the counts of
those tokens. Everything returned is per pair and unreduced: the caller divides a step's sum by the
step's global number of pairs, which is what makes the gradient independent of micro-batches and world size.
Half types are computed in fp32; float64 stays float64.

A new loss is one function and its `case` in `preference_loss` (or `sft_loss`), one name in `config.Loss`, one YAML in
`conf/loss/` and one test.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rpo.config import Loss


@dataclass(frozen=True)
class PairLogps:
    """What a loss may read of P pairs; the rejected or the reference sides are None where a run has none."""

    chosen_P: Tensor
    rejected_P: Tensor | None
    ref_chosen_P: Tensor | None
    ref_rejected_P: Tensor | None
    tokens_chosen_P: Tensor
    tokens_rejected_P: Tensor | None


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def margins(chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor) -> Tensor:
    """D_P, how many nats more the policy moved towards chosen than towards rejected.

    D = (logp_pi(c) - logp_ref(c)) - (logp_pi(r) - logp_ref(r)); the implicit reward margin of DPO
    (arXiv 2305.18290, eq. 6) is beta D.
    """
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P = _wide(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
    return (chosen_P - ref_chosen_P) - (rejected_P - ref_rejected_P)


def sigmoid(margin_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss per pair (arXiv 2305.18290, eq. 7), or cDPO's where `label_smoothing` e > 0.

    -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D), with e the believed share of flipped labels.
    """
    (logits_P,) = _wide(margin_P)
    logits_P = beta * logits_P
    loss_P = -F.logsigmoid(logits_P)
    if label_smoothing:
        loss_P = (1 - label_smoothing) * loss_P - label_smoothing * F.logsigmoid(-logits_P)
    return loss_P


def ipo(margin_P: Tensor, beta: float) -> Tensor:
    """IPO's squared distance of the margin from 1/(2 beta), per pair (arXiv 2310.12036, eq. 17; its tau is beta).

    `margin_P` is made of per-token means where `loss.normalize=true` (as TRL and LLaMA-Factory do), of the
    original's sums otherwise; the caller chooses which.
    """
    (margin_P,) = _wide(margin_P)
    return (margin_P - 1 / (2 * beta)) ** 2


def hinge(margin_P: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta D) per pair (SLiC-HF, arXiv 2305.10425)."""
    (margin_P,) = _wide(margin_P)
    return F.relu(1 - beta * margin_P)


def robust(margin_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The unbiased estimate of DPO's loss under flipped labels, per pair (robust DPO, arXiv 2403.00409).

    ((1 - e) l(D) - e l(-D)) / (1 - 2 e) with l(D) = -log sigmoid(beta D) and e the share of flipped labels. It can be negative.
    """
    (logits_P,) = _wide(margin_P)
    kept_P, flipped_P = -F.logsigmoid(beta * logits_P), -F.logsigmoid(-beta * logits_P)
    return ((1 - label_smoothing) * kept_P - label_smoothing * flipped_P) / (1 - 2 * label_smoothing)


def dpop(margin_P: Tensor, shift_chosen_P: Tensor, beta: float, lam: float) -> Tensor:
    """DPO-Positive per pair (arXiv 2402.13228): the margin less `lam` times what chosen has lost against the reference.

    -log sigmoid(beta (D - lambda max(0, logp_ref(c) - logp_pi(c)))), the penalty within the sigmoid and within beta;
    `shift_chosen_P` is logp_pi(c) - logp_ref(c).
    """
    margin_P, shift_chosen_P = _wide(margin_P, shift_chosen_P)
    return sigmoid(margin_P - lam * F.relu(-shift_chosen_P), beta)


LOG_RATIO_MAX = 20.0  # of chi-PO's exponential, a bound of this project: e^89 is more than fp32 holds


def chi_po(shift_chosen_P: Tensor, shift_rejected_P: Tensor, beta: float, clip: float | None) -> Tensor:
    """chi-PO per pair (arXiv 2407.13399, Algorithm 1): DPO with the link phi(z) = z + log z of a KL and a chi-squared penalty.

    -log sigmoid(clip(beta phi(z_c) - beta phi(z_r))), z = pi/pi_ref of a whole response, clipped to +-`clip`, the paper's
    2 R_max, beyond which there is no gradient. log z is kept below LOG_RATIO_MAX where it is exponentiated.
    """

    def link(log_ratio_P: Tensor) -> Tensor:
        return log_ratio_P.clamp(max=LOG_RATIO_MAX).exp() + log_ratio_P

    shift_chosen_P, shift_rejected_P = _wide(shift_chosen_P, shift_rejected_P)
    logits_P = beta * (link(shift_chosen_P) - link(shift_rejected_P))
    return -F.logsigmoid(logits_P if clip is None else logits_P.clamp(-clip, clip))


def simpo(mean_chosen_P: Tensor, mean_rejected_P: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO per pair (arXiv 2405.14734, eq. 6), without a reference: -log sigmoid(beta logp(c)/C - beta logp(r)/R - gamma)."""
    mean_chosen_P, mean_rejected_P = _wide(mean_chosen_P, mean_rejected_P)
    return -F.logsigmoid(beta * (mean_chosen_P - mean_rejected_P) - gamma)


def orpo(mean_chosen_P: Tensor, mean_rejected_P: Tensor, beta: float) -> Tensor:
    """ORPO's odds ratio term per pair (arXiv 2403.07691, eq. 7), times its lambda, here beta; without a reference.

    -beta log sigmoid(log odds(c) - log odds(r)), odds = p / (1 - p), p = exp(logp / tokens) < 1.
    """

    def log_odds(mean_P: Tensor) -> Tensor:
        below_P = mean_P.clamp(max=-torch.finfo(mean_P.dtype).tiny)  # a certain response has infinite odds
        return mean_P - torch.log(-torch.expm1(below_P))

    mean_chosen_P, mean_rejected_P = _wide(mean_chosen_P, mean_rejected_P)
    return -beta * F.logsigmoid(log_odds(mean_chosen_P) - log_odds(mean_rejected_P))


def shifts(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """(of chosen_P, of rejected_P): nats by which the policy has moved from the reference, logp_pi - logp_ref."""
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P = _wide(
        pairs.chosen_P, pairs.rejected_P, pairs.ref_chosen_P, pairs.ref_rejected_P
    )
    return chosen_P - ref_chosen_P, rejected_P - ref_rejected_P


def means(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P): the policy's log-probs divided by their tokens."""
    chosen_P, rejected_P = _wide(pairs.chosen_P, pairs.rejected_P)
    return chosen_P / pairs.tokens_chosen_P, rejected_P / pairs.tokens_rejected_P


def implicit_rewards(loss: Loss, pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P): beta (logp_pi - logp_ref) for every loss that has a reference, so that runs compare.

    Without one: beta logp / tokens (SimPO, ORPO), beta logp (CPO).
    """
    if loss.has_reference:
        chosen_P, rejected_P = shifts(pairs)
    elif loss.preference == "cpo":
        chosen_P, rejected_P = _wide(pairs.chosen_P, pairs.rejected_P)
    else:
        chosen_P, rejected_P = means(pairs)
    return loss.beta * chosen_P, loss.beta * rejected_P


def preference_loss(loss: Loss, pairs: PairLogps) -> Tensor:
    """The configured preference term per pair. No reduction.

    With `loss.normalize` every log-prob in D is divided by its own response's token count (for sigmoid: the length-normalised DPO
    of arXiv 2411.15124).
    """
    beta = loss.beta
    match loss.preference:
        case "simpo":
            return simpo(*means(pairs), beta, loss.gamma)
        case "orpo":
            return orpo(*means(pairs), beta)
        case "cpo":  # arXiv 2401.08417: DPO under a uniform reference
            chosen_P, rejected_P = _wide(pairs.chosen_P, pairs.rejected_P)
            return sigmoid(chosen_P - rejected_P, beta)
        case "chi_po":
            return chi_po(*shifts(pairs), beta, loss.clip)
    sums_P = (pairs.chosen_P, pairs.rejected_P, pairs.ref_chosen_P, pairs.ref_rejected_P)
    if loss.normalize:
        tokens_P = (pairs.tokens_chosen_P, pairs.tokens_rejected_P) * 2
        margin_P = margins(*(logps_P / n_P for logps_P, n_P in zip(_wide(*sums_P), tokens_P, strict=True)))
    else:
        margin_P = margins(*sums_P)
    match loss.preference:
        case "sigmoid":
            return sigmoid(margin_P, beta, loss.label_smoothing)
        case "ipo":
            return ipo(margin_P, beta)
        case "hinge":
            return hinge(margin_P, beta)
        case "robust":
            return robust(margin_P, beta, loss.label_smoothing)
        case "dpop":
            return dpop(margin_P, shifts(pairs)[0], beta, loss.lam)
    raise AssertionError(f"loss.preference={loss.preference} has no preference term")


def sft_loss(loss: Loss, pairs: PairLogps, *, step_pairs: int, step_chosen_tokens: int) -> Tensor:
    """The configured SFT term per pair, its coefficient included. No reduction.

    sum    eta beta (-logp(c))          arXiv 2405.16436, eq. 4.8: the paper's main results
    avg    eta (-logp(c) / C)           the paper's appendix, the authors' default
    token  eta (-logp(c)) pairs/tokens  so that the mean over the step's pairs is eta x all chosen NLL of the step
                                        over all its chosen tokens: TRL's and Liger's "sft" term, made exact

    `step_pairs` and `step_chosen_tokens` count the whole optimizer step: all ranks, all micro-batches.
    """
    (nll_P,) = _wide(-pairs.chosen_P)
    match loss.sft:
        case "sum":
            return loss.eta * loss.beta * nll_P
        case "avg":
            return loss.eta * (nll_P / pairs.tokens_chosen_P)
        case "token":
            return loss.eta * nll_P * (step_pairs / step_chosen_tokens)
    raise AssertionError(f"loss.sft={loss.sft} has no SFT term")


def objective(loss: Loss, pairs: PairLogps, *, step_pairs: int, step_chosen_tokens: int) -> tuple[Tensor, Tensor]:
    """(preference_P, sft_P): the two terms of the configured loss, zeros where a term is off.

    The step's loss is the sum of both over all its pairs, divided by `step_pairs`. A term that is off, or eta = 0,
    does not enter the graph at all: eta = 0 is the preference loss bit for bit.
    """
    zeros_P = torch.zeros_like(_wide(pairs.chosen_P)[0])
    preference_P = preference_loss(loss, pairs) if loss.preference != "none" else zeros_P
    if loss.sft == "none" or not loss.eta:
        return preference_P, zeros_P
    return preference_P, sft_loss(loss, pairs, step_pairs=step_pairs, step_chosen_tokens=step_chosen_tokens)
