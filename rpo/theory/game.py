"""The theorem behind RPO (arXiv 2405.16436) on finite contextual bandits, exact: the game, both its orders, the loss.

Letters: X prompts, A actions, P rows of the loss. Every table may carry leading dimensions (instances; for example
seeds) that are solved side by side. Everything is float64, in nats. Equation numbers in brackets are the paper's.

    L(r)      = sum_{x,w,l} W softplus(-(r_w - r_l))                                  Bradley-Terry loss         [3.2]
    phi(p,r)  = eta E_{x~d0}[ <p - base, r> - beta KL(p||ref) ] + L(r)                the game                   [3.3]
    T(p)      = min_r phi(p, r)          max_p T: Algorithm 1, the maximin, which carries the statistical guarantee
    F(r)      = max_p phi(p, r)          min_r F: the minimax, attained by p_r ~ ref exp(r / beta)               [4.3]
    L_RPO(p)  = L(beta log(p / ref)) + eta beta E_{x~d0, a~base}[ -log p(a|x) ]       Algorithm 2, what is run   [4.8]

W[x,w,l] is the share of all comparisons in which w beat l at x. The theorem, which this module checks numerically:
max_p T(p) = min_r F(r) = min_p L_RPO(p) + K with one policy at all three optima. L_RPO is the training code's own
`losses.objective` on one-token responses.

Where the paper slips: [4.6] drops the constant K; [5.4] writes ref where base is meant; below [4.10] r_hat should read
beta log(pi / ref); [A.45] lacks the kappa that [A.44] and [A.46] need; [B.6] lacks the + between its two brackets.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rpo import losses
from rpo.config import Loss
from rpo.errors import UserError
from rpo.theory.bandits import Bandit, law, number, table


@dataclass(frozen=True)
class Optimum:
    """The value of a game (one per instance), the policy there, and the reward; r is unique up to a shift c(x)."""

    value: Tensor
    policy_XA: Tensor
    reward_XA: Tensor


# ---- the game ---------------------------------------------------------------------------------------------------


def gibbs(game: Bandit, reward: Any) -> Tensor:
    """p_r ~ ref exp(r / beta), the policy that is best against r [4.3]; eta scales reward and KL alike and drops out."""
    return _gibbs_XA(game, table("reward", reward, game.ref_XA.shape))


def _gibbs_XA(game: Bandit, reward_XA: Tensor) -> Tensor:
    return torch.softmax(game.ref_XA.log() + reward_XA / game.beta, -1)


def kl(policy_XA: Tensor, other_XA: Tensor) -> Tensor:
    """KL(policy || other) at each prompt, nats; 0 log 0 = 0."""
    return (torch.xlogy(policy_XA, policy_XA) - torch.xlogy(policy_XA, other_XA)).sum(-1)


def _preference_X(game: Bandit, reward_XA: Tensor) -> Tensor:
    margin_XAA = reward_XA[..., :, None] - reward_XA[..., None, :]
    return (game.wins_XAA * softplus(-margin_XAA)).sum((-2, -1))


def _pull_XAA(game: Bandit, reward_XA: Tensor) -> Tensor:
    """W u with u = sigmoid(-(r_w - r_l)): how much each comparison still pulls its two actions apart."""
    return game.wins_XAA * torch.sigmoid(reward_XA[..., None, :] - reward_XA[..., :, None])


def _moved_XA(flow_XAA: Tensor) -> Tensor:
    """The net gain of each action from a flow from losers to winners."""
    return flow_XAA.sum(-1) - flow_XAA.sum(-2)


def _laplacian_XAA(game: Bandit, reward_XA: Tensor) -> Tensor:
    """The Hessian of L at each prompt."""
    u_XAA = torch.sigmoid(reward_XA[..., None, :] - reward_XA[..., :, None])
    edges_XAA = game.wins_XAA * u_XAA * (1 - u_XAA)
    edges_XAA = edges_XAA + edges_XAA.mT
    return torch.diag_embed(edges_XAA.sum(-1)) - edges_XAA


def _phi_X(game: Bandit, policy_XA: Tensor, reward_XA: Tensor) -> Tensor:
    gain_X = ((policy_XA - game.base_XA) * reward_XA).sum(-1) - game.beta * kl(policy_XA, game.ref_XA)
    return game.eta * game.d0_X * gain_X + _preference_X(game, reward_XA)


def _best_X(game: Bandit, reward_XA: Tensor) -> Tensor:
    log_z_X = torch.logsumexp(game.ref_XA.log() + reward_XA / game.beta, -1)
    gain_X = game.beta * log_z_X - (game.base_XA * reward_XA).sum(-1)
    return game.eta * game.d0_X * gain_X + _preference_X(game, reward_XA)


def phi(game: Bandit, policy: Any, reward: Any) -> Tensor:
    """phi(p, r), the game's value, per instance [3.3]; unchanged by r -> r + c(x), which is what base is for."""
    policy_XA, reward_XA = law("policy", policy, game.ref_XA.shape), table("reward", reward, game.ref_XA.shape)
    return _phi_X(game, policy_XA, reward_XA).sum(-1)


def best_response(game: Bandit, reward: Any) -> Tensor:
    """F(r) = max_p phi(p, r) = eta E_d0[beta log Z_r - <base, r>] + L(r), per instance [4.3]."""
    return _best_X(game, table("reward", reward, game.ref_XA.shape)).sum(-1)


def _components_XAA(game: Bandit) -> Tensor:
    """1 where two actions lie in one connected component of the prompt's comparison graph, else 0."""
    num = game.ref_XA.shape[-1]
    reach_XAA = ((game.wins_XAA + game.wins_XAA.mT) > 0).double() + torch.eye(num, dtype=torch.float64)
    for _ in range(num.bit_length()):
        reach_XAA = (reach_XAA @ reach_XAA > 0).double()
    return reach_XAA


# ---- a small convex solver --------------------------------------------------------------------------------------


def _newton(
    value: Callable, derivatives: Callable, start: Tensor, box: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """(minimiser over [0, box]^A of a convex function, row by row; which rows diverged).

    Damped Newton; in a box by projection, coordinates held at a bound following the gradient alone (Bertsekas 1982).
    `box` is inf for the whole space. A row is done if its projected gradient is at most `tolerance`, or at most 1e6 times
    that with a last step that promised a decrease below 1e-7 of it: rounding error. On the whole space a row beyond 1e6
    has diverged: it has no minimum. Raises UserError if neither happens in 200 steps or no step decreases the value:
    probabilities too small for float64.
    """
    low = 0.0 if math.isfinite(box) else -math.inf
    point, eye = start, torch.eye(start.shape[-1], dtype=start.dtype)
    done = torch.zeros_like(start[..., :1], dtype=torch.bool)
    for _ in range(200):
        gradient, hessian = derivatives(point)
        residual = gradient.clamp(point - box, point - low).abs().amax(-1, keepdim=True)
        away = (point.abs().amax(-1, keepdim=True) > 1e6) & math.isinf(box)
        done |= (residual <= tolerance) | away
        if done.all():
            return point, away[..., 0]
        margin = residual.clamp(max=1e-6)
        held = ((point <= low + margin) & (gradient > 0)) | ((point >= box - margin) & (gradient < 0)) | done
        hessian = torch.where(held[..., :, None] | held[..., None, :], eye, hessian)
        # Directions without curvature (shifts, actions never compared) have no gradient either: damping keeps them fixed.
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        damping = 1e-14 * torch.maximum(diagonal, 1e-6 * diagonal.amax(-1, keepdim=True)) + 1e-30
        step = -torch.linalg.solve_ex(hessian + torch.diag_embed(damping), gradient)[0]  # singular: no step leads down
        before, scale = value(point)[..., None], (~done).to(point.dtype)
        for _ in range(60):
            trial = (point + scale * step).clamp(low, box)
            fall = (gradient * (point - trial)).sum(-1, keepdim=True)
            slack = 1e-14 * (1 + before.abs())  # near the optimum the value no longer resolves what the gradient does
            short = ~(value(trial)[..., None] <= before - 1e-4 * fall + slack)
            if not short.any():
                break
            scale = torch.where(short, scale / 2, scale)
        else:
            break
        point = torch.where(done, point, trial)
        done |= (fall.abs() <= 1e-7 * tolerance) & (scale == 1) & (residual <= 1e6 * tolerance)
    slope = float(residual[~done].max())
    raise UserError(f"beta, eta: Newton is stuck at a slope of {slope:.1e}; expected values nearer 1")


# ---- the two orders of play -------------------------------------------------------------------------------------


def _check_game(game: Bandit, box: float | None) -> float:
    number("eta", game.eta, 0.0)
    return math.inf if box is None else number("box", box, 0.0, 1e4)


def _check_bounded(reward_XA: Tensor, away_X: Tensor) -> None:
    if away_X.any():
        most = float(reward_XA[away_X].abs().max())
        raise UserError(f"beta, eta: a reward passes {most:.1g} at the optimum; expected values nearer 1")


def minimax(game: Bandit, box: float | None = None) -> Optimum:
    """min_r F(r) and its policy p_r, over all rewards or those in [0, box]; Newton with the exact Hessian.

    If an action has base 0 and never wins, F without a box decreases for ever towards r_a = -inf: the result is the
    point where the slope is below 1e-13, and pi(a) is zero to that accuracy. UserError if eta = 0 or a reward exceeds
    1e6 (beta above 1e4).
    """
    limit = _check_game(game, box)
    scale_X1 = (game.eta * game.d0_X)[..., None]

    def derivatives(reward_XA: Tensor) -> tuple[Tensor, Tensor]:
        policy_XA = _gibbs_XA(game, reward_XA)
        gradient_XA = scale_X1 * (policy_XA - game.base_XA) - _moved_XA(_pull_XAA(game, reward_XA))
        spread_XAA = torch.diag_embed(policy_XA) - policy_XA[..., :, None] * policy_XA[..., None, :]
        return gradient_XA, scale_X1[..., None] / game.beta * spread_XAA + _laplacian_XAA(game, reward_XA)

    start_XA = torch.full_like(game.ref_XA, 0.0 if box is None else limit / 2)
    reward_XA, away_X = _newton(lambda r: _best_X(game, r), derivatives, start_XA, limit, 1e-13 * max(1.0, game.eta))
    _check_bounded(reward_XA, away_X)
    return Optimum(_best_X(game, reward_XA).sum(-1), _gibbs_XA(game, reward_XA), reward_XA)


def worst_case(game: Bandit, policy: Any, box: float | None = None) -> Tensor:
    """T(p) = min_r phi(p, r) per instance, over all rewards or those in [0, box]; its own Newton, on r alone.

    -inf where phi(p, .) has no lower bound: on the whole space that is every p that does not give each connected
    component of a prompt's comparisons the mass that base gives it (and every p that would need more pull than the
    comparisons have). T(pi_hat) = F(r_hat) is a certificate for both: T(pi_hat) <= max T <= min F <= F(r_hat).
    No policy in float64 has base's mass exactly: a miss of up to 1e-9, or 1e-12 / (eta d0) where that is more, is
    spread over its component before r is sought.
    Where pi_hat needs rewards beyond about 30, its rounding may already ask for too much: -inf, or a UserError.
    """
    limit = _check_game(game, box)
    policy_XA = law("policy", policy, game.ref_XA.shape)
    drift_XA, off_X = policy_XA - game.base_XA, torch.zeros_like(game.d0_X, dtype=torch.bool)
    if box is None:
        # No curvature along a component's shift: a slope there, however small, would be followed for ever.
        excess_XA, size_XA = mass_excess(game, policy_XA), _components_XAA(game).sum(-1)
        allowed_X = (1e-12 / (game.eta * game.d0_X)).clamp(min=1e-9)  # what a solver's last slope of 1e-13 may leave
        off_X, drift_XA = excess_XA.abs().amax(-1) > allowed_X, drift_XA - excess_XA / size_XA
    slope_XA = (game.eta * game.d0_X)[..., None] * drift_XA

    def derivatives(reward_XA: Tensor) -> tuple[Tensor, Tensor]:
        return slope_XA - _moved_XA(_pull_XAA(game, reward_XA)), _laplacian_XAA(game, reward_XA)

    def value(reward_XA: Tensor) -> Tensor:  # phi without KL, which r does not move
        return (slope_XA * reward_XA).sum(-1) + _preference_X(game, reward_XA)

    start_XA = torch.full_like(policy_XA, 0.0 if box is None else limit / 2)
    reward_XA, away_X = _newton(value, derivatives, start_XA, limit, 1e-13 * max(1.0, game.eta))
    value_X = _phi_X(game, policy_XA, reward_XA)
    return torch.where(off_X | away_X, -math.inf, value_X).sum(-1)


def maximin(game: Bandit) -> Optimum:
    """max_p min_r phi(p, r) over all rewards, without any reward: Newton on the dual in the pulls u of comparisons.

    With softplus's conjugate, T's inner minimum is a maximum over 0 < u < 1, one u per compared pair:

        max_u  -eta beta E_d0 KL(p_u||ref) + sum W H(u),     p_u = base + (1 / (eta d0)) sum W u (1{w} - 1{l})

    (H: binary entropy in nats.) It shares no equation with `minimax`. `reward` is read off the policy: beta log(p/ref).
    Raises UserError where eta = 0 or base has a zero, for which p_u need not be a law.
    So it does where a probability is below about 1e-9, or a pull nearer 0 or 1 than float64 tells (rewards beyond 30).
    """
    _check_game(game, None)
    if game.base_XA.min() == 0:
        raise UserError("base: has a zero; expected every action to have base > 0 for the dual; use minimax instead")
    shape, num = game.wins_XAA.shape, game.ref_XA.shape[-1]
    weight_XP = game.wins_XAA.flatten(-2)
    compared_XP = weight_XP > 0
    scale_X1 = (game.eta * game.d0_X)[..., None]
    eye = torch.eye(num, dtype=torch.float64)
    flow_AP = (eye[:, :, None] - eye[:, None, :]).flatten(-2)

    def policy(u_XP: Tensor) -> Tensor:
        return game.base_XA + _moved_XA((weight_XP * u_XP).reshape(shape)) / scale_X1

    def value(u_XP: Tensor) -> Tensor:
        policy_XA = policy(u_XP)
        inside_X = (policy_XA > 0).all(-1) & ((u_XP > 0) & (u_XP < 1)).all(-1)
        entropy_XP = -torch.xlogy(u_XP, u_XP) - torch.xlogy(1 - u_XP, 1 - u_XP)
        dual_X = (weight_XP * entropy_XP).sum(-1) - game.beta * scale_X1[..., 0] * kl(policy_XA, game.ref_XA)
        return torch.where(inside_X, -dual_X, math.inf)

    def derivatives(u_XP: Tensor) -> tuple[Tensor, Tensor]:
        policy_XA = policy(u_XP)
        ratio_XA = game.beta * (policy_XA / game.ref_XA).log()
        gradient_XP = weight_XP * (torch.logit(u_XP) + ratio_XA @ flow_AP)
        flow_XAP = flow_AP * weight_XP[..., None, :]
        curve_X = game.beta / scale_X1[..., None]
        hessian_XPP = curve_X * flow_XAP.mT @ (flow_XAP / policy_XA[..., :, None])
        own_XP = torch.where(compared_XP, weight_XP / (u_XP * (1 - u_XP)), 1.0)
        return gradient_XP, hessian_XPP + torch.diag_embed(own_XP)

    # So small a pull that no action can lose all of base's mass.
    room_XA = scale_X1 * game.base_XA / game.wins_XAA.sum(-2).clamp(min=1e-300)
    start_XP = (0.5 * room_XA.amin(-1, keepdim=True).clamp(max=1.0)).expand_as(weight_XP).clone()
    u_XP, _ = _newton(value, derivatives, start_XP, math.inf, 1e-14)
    policy_XA = policy(u_XP)
    return Optimum(-value(u_XP).sum(-1), policy_XA, game.beta * (policy_XA / game.ref_XA).log())


# ---- the practical objective ------------------------------------------------------------------------------------


def production_loss(game: Bandit, **changes: Any) -> Loss:
    """The `loss=rpo_sum` of a training run with the game's beta and eta; `changes` replace its fields."""
    return replace(
        Loss("sigmoid", "sum", game.beta, game.eta, 0.0, normalize=False, lam=None, clip=None, gamma=None), **changes
    )


def practical_X(game: Bandit, loss: Loss) -> Callable[[Tensor], Tensor]:
    """logits_XA -> the loss of a training run at each prompt, differentiable; the sum over prompts is L_RPO [4.8].

    A row of the loss is a comparison of one-token responses; its preference term is weighted by W, its SFT term by
    nothing. A second kind of row holds base's actions as chosen ones, weighted by d0 base, for the SFT term alone. With
    d0 and base of `empirical` both weightings are the mean over pairs that `train.py` takes.
    """
    num, prompts = game.ref_XA.shape[-1], game.d0_X.numel()
    wins_XAA, base_XA = game.wins_XAA.reshape(-1, num, num), (game.d0_X[..., None] * game.base_XA).reshape(-1, num)
    (x, w, k), (x_base, a_base) = wins_XAA.nonzero(as_tuple=True), base_XA.nonzero(as_tuple=True)
    prompt_P = torch.cat([x, x_base])
    chosen_P, rejected_P = (prompt_P * num + torch.cat([i, a_base]) for i in (w, k))
    weight_P = torch.cat([wins_XAA[x, w, k], base_XA[x_base, a_base]])
    compared_P = torch.arange(len(weight_P)) < len(x)
    log_ref, ones_P = game.ref_XA.log().flatten(), torch.ones_like(weight_P)
    reference = log_ref[chosen_P], log_ref[rejected_P]

    def value(logits_XA: Tensor) -> Tensor:
        logps = torch.log_softmax(logits_XA, -1).flatten()
        pairs = losses.PairLogps(logps[chosen_P], logps[rejected_P], *reference, ones_P, ones_P)
        terms = losses.objective(loss, pairs, step_pairs=len(ones_P), step_chosen_tokens=len(ones_P))
        loss_P = weight_P * torch.where(compared_P, *terms)
        return torch.zeros(prompts, dtype=torch.float64).index_add(0, prompt_P, loss_P).reshape(logits_XA.shape[:-1])

    return value


def practical(game: Bandit, policy: Any, loss: Loss | None = None) -> Tensor:
    """L_RPO(p) of a positive policy per instance [4.8], by the training code."""
    policy_XA = law("policy", policy, game.ref_XA.shape, positive=True)
    return practical_X(game, loss or production_loss(game))(policy_XA.log()).sum(-1)


def practical_optimum(game: Bandit, loss: Loss | None = None, ridge: float = 0.0) -> Optimum:
    """The minimum of L_RPO over all policies, by Newton on autograd's gradient and Hessian of the training code.

    The variable is r = beta log(pi/ref) (+ any shift). `ridge` adds ridge/2 |r|^2 to what is minimised, not to the
    value returned: DPO (eta = 0) has no unique minimiser, and a tiny ridge picks the one of least norm. Raises
    UserError for `loss.preference=hinge|none`, whose curvature is zero, and a negative ridge.
    """
    loss, ridge = loss or production_loss(game), number("ridge", ridge, 0.0, closed=True)
    if loss.preference not in ("sigmoid", "ipo"):
        raise UserError(f"loss.preference={loss.preference}: Newton needs curvature; expected sigmoid or ipo")
    log_ref_XA, loss_X = game.ref_XA.log(), practical_X(game, loss)

    def value(reward_XA: Tensor) -> Tensor:
        return loss_X(log_ref_XA + reward_XA / loss.beta) + ridge / 2 * reward_XA.square().sum(-1)

    def derivatives(reward_XA: Tensor) -> tuple[Tensor, Tensor]:
        reward_XA, (*lead, num) = reward_XA.detach().requires_grad_(), reward_XA.shape
        (gradient_XA,) = torch.autograd.grad(value(reward_XA).sum(), reward_XA, create_graph=True)
        ones = torch.eye(num, dtype=torch.float64).reshape(num, *[1] * len(lead), num).expand(num, *reward_XA.shape)
        (hessian_AXA,) = torch.autograd.grad(gradient_XA, reward_XA, ones, is_grads_batched=True)
        hessian_XAA = hessian_AXA.movedim(0, -2)
        # Shifts of r move no loss, but autograd's rounding would move r along them: curvature there keeps its mean near 0.
        return gradient_XA.detach(), hessian_XAA + hessian_XAA.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]

    start_XA = torch.zeros_like(game.ref_XA)
    reward_XA, away_X = _newton(value, derivatives, start_XA, math.inf, 1e-13 * max(1.0, game.eta))
    _check_bounded(reward_XA, away_X)
    logits_XA = log_ref_XA + reward_XA / loss.beta
    return Optimum(loss_X(logits_XA).sum(-1), torch.softmax(logits_XA, -1), reward_XA)


def constant(game: Bandit) -> Tensor:
    """K = eta beta E_{d0, base}[log ref], per instance: F(r) = L_RPO(p_r) + K for every r. [4.6] drops it."""
    return game.eta * game.beta * (game.d0_X * (game.base_XA * game.ref_XA.log()).sum(-1)).sum(-1)


# ---- what the optimum looks like --------------------------------------------------------------------------------


def stationarity(game: Bandit, policy: Any) -> Tensor:
    """[..., X, A], zero exactly at pi_hat: d0 eta (pi - base) - sum_i W_i u_i (1{w_i} - 1{l_i}).

    u_i = sigmoid(-beta log(pi_w ref_l / (pi_l ref_w))) lies in ]0, 1[: the gradient of F in the policy's own terms.
    """
    policy_XA = law("policy", policy, game.ref_XA.shape, positive=True)
    flow_XA = _moved_XA(_pull_XAA(game, game.beta * (policy_XA / game.ref_XA).log()))
    return game.eta * game.d0_X[..., None] * (policy_XA - game.base_XA) - flow_XA


def mass_excess(game: Bandit, policy: Any) -> Tensor:
    """[..., X, A]: the mass that pi gives to the connected component of each action, minus base's.

    Components are those of the prompt's comparison graph. Zero at pi_hat for every beta, eta > 0 and ref: the pulls
    only move mass between compared actions. So an action that was never compared keeps exactly base's mass.
    """
    policy_XA = law("policy", policy, game.ref_XA.shape)
    return (_components_XAA(game) @ (policy_XA - game.base_XA)[..., None])[..., 0]


def cap(game: Bandit) -> Tensor:
    """[..., X, A], an upper bound on pi_hat: base + (share of the prompt's comparisons won) N(x) / (eta N d0(x)).

    With d0 and base of `empirical` that is (1 + 1/eta) times an action's frequency as the chosen one: no response
    can be over-optimised beyond it. From `stationarity`, as u < 1.
    """
    number("eta", game.eta, 0.0)
    return game.base_XA + game.wins_XAA.sum(-1) / (game.eta * game.d0_X[..., None])
