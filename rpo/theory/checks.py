"""The theorem's checks as data: the value in theory, and the value from the training code (or a second solver).

`golden` and `equivalence` fail if `losses` is wrong by half a percent in a coefficient. Every problem checks its policy as
well as its value: the optimum is flat, so a policy trained with a wrong coefficient loses little.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rpo.theory import bandits, closed_forms
from rpo.theory.bandits import Bandit
from rpo.theory.game import (
    best_response,
    cap,
    constant,
    gibbs,
    kl,
    mass_excess,
    maximin,
    minimax,
    phi,
    practical,
    practical_optimum,
    production_loss,
    stationarity,
    worst_case,
)

VALUE, POLICY, IDENTITY = 1e-10, 1e-8, 1e-12  # tolerances
# (beta, eta), ten random games each: wide, but with policies that the dual resolves in float64.
SETTINGS = [(0.3, 0.5), (0.5, 3), (1, 0.1), (2, 0.3), (3, 0.03)]


@dataclass(frozen=True)
class Check:
    """One line of the table: the two numbers where they differ most, and the tolerance."""

    what: str
    theory: float
    computed: float
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN


def compare(what: str, expected: Any, computed: Any, tolerance: float) -> Check:
    """The entry in which two tables of one shape differ most."""
    expected, computed = (torch.as_tensor(t, dtype=torch.float64).flatten() for t in (expected, computed))
    assert expected.shape == computed.shape, f"{what}: {tuple(expected.shape)} and {tuple(computed.shape)}"
    difference = (computed - expected).abs().nan_to_num(nan=torch.inf)
    worst = int(difference.argmax())
    return Check(what, float(expected[worst]), float(computed[worst]), float(difference[worst]), tolerance)


def require(checks: list[Check]) -> None:
    """Fails with every check that does not hold."""
    failed = [f"{c.what}: {c.computed:.12g}, theory {c.theory:.12g}" for c in checks if not c.holds]
    assert not failed, "; ".join(failed)


# ---- golden values ----------------------------------------------------------------------------------------------


def _wins(prompts: int, actions: int, *counts: tuple[int, int, int, float]) -> Tensor:
    """Win counts from tuples (prompt, winner, loser, times)."""
    wins_XAA = torch.zeros(prompts, actions, actions, dtype=torch.float64)
    for x, w, k, times in counts:
        wins_XAA[x, w, k] = times
    return wins_XAA


def two_actions(*, p: float, base: float, ref: float, beta: float, eta: float) -> Bandit:
    """One prompt; action 0 wins a share p, has base and ref as given."""
    laws = [[ref, 1 - ref]], [[base, 1 - base]]
    return bandits.make([1.0], *laws, _wins(1, 2, (0, 0, 1, p), (0, 1, 0, 1 - p)), beta=beta, eta=eta)


def golden24() -> Bandit:
    """24 comparisons at two prompts, general d0 and base; at prompt 1 action 2 is never compared."""
    counts = ((0, 0, 1, 6), (0, 1, 0, 2), (0, 1, 2, 5), (0, 2, 1, 1), (0, 0, 2, 3), (1, 0, 1, 7))
    ref, base = [[0.5, 0.3, 0.2], [0.25, 0.25, 0.5]], [[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]
    return bandits.make([0.4, 0.6], ref, base, _wins(2, 3, *counts), beta=0.4, eta=0.5)


def chosen13() -> Bandit:
    """13 comparisons at one prompt, base the chosen law: exactly the mean loss of 13 training pairs."""
    counts = ((0, 0, 1, 6), (0, 1, 0, 3), (0, 2, 1, 1), (0, 1, 2, 1), (0, 0, 2, 2))
    return bandits.empirical([[0.2, 0.5, 0.3]], _wins(1, 3, *counts), beta=0.3, eta=0.2)


def golden() -> list[Check]:
    """The training loss at its exact minimum against closed forms and stored digits. Shared by tests and the page."""
    half = {"p": 1.0, "base": 0.5, "ref": 0.5}
    two = [  # (problem, r_0 - r_1, pi_0 or nan, L_RPO or nan)
        (half | {"beta": 1.0, "eta": 0.5}, 1.6094379124341, 5 / 6, 0.675841813299457),
        (half | {"beta": 1.0, "eta": 0.1}, 3.04452243772342, 1.05 / 1.1, 0.203398139084553),
        (half | {"beta": 1.0, "eta": 0.01}, 5.30330490805909, 1.005 / 1.01, 0.0315289417758457),
        (half | {"beta": 0.5, "eta": 0.5}, 1.29457261167577, math.nan, math.nan),
        (half | {"beta": 0.1, "eta": 0.5}, 1.09865742826703, math.nan, math.nan),
        ({"p": 1.0, "base": 0.3, "ref": 0.2, "beta": 1.0, "eta": 0.5}, 1.76249469588007, 0.59295634398771, math.nan),
    ]
    stored, closed, computed = [], [], []
    for problem, *digits in two:
        best = practical_optimum(two_actions(**problem))
        pairs = {name: (problem[name], 1 - problem[name]) for name in ("base", "ref")}
        delta, (share, _) = closed_forms.compared_pair(**problem | pairs)
        stored.append(digits)
        closed.append([delta, share])
        margin = best.reward_XA[0, 0] - best.reward_XA[0, 1]
        computed.append([float(margin), float(best.policy_XA[0, 0]), float(best.value)])
    stored, closed, computed = (torch.tensor(t, dtype=torch.float64) for t in (stored, closed, computed))
    known = ~stored.isnan()
    checks = [
        compare("two actions, 6 problems: reward margins", stored[:, 0], computed[:, 0], POLICY),
        compare("two actions: policies", stored[known[:, 1], 1], computed[known[:, 1], 1], POLICY),
        compare("two actions: losses", stored[known[:, 2], 2], computed[known[:, 2], 2], VALUE),
        compare("two actions: closed form's margins and policies", closed, computed[:, :2], POLICY),
    ]
    three = [
        (1.0, 1.0, (8 / 15, 2 / 15, 1 / 3)),
        (1.0, 0.5, (7 / 12, 1 / 12, 1 / 3)),
        (1.0, 0.1, (31 / 48, 1 / 48, 1 / 3)),
        (0.5, 0.5, (0.644739256989288, 0.021927409677378, 1 / 3)),
    ]
    # One prompt, uniform ref and base; action 0 always beats 1, action 2 is never compared.
    uniform, wins = [[1 / 3] * 3], _wins(1, 3, (0, 0, 1, 1))
    stored, closed, computed = [], [], []
    for beta, eta, digits in three:
        _, pair = closed_forms.compared_pair(p=1.0, base=(1 / 3, 1 / 3), ref=(1 / 3, 1 / 3), beta=beta, eta=eta)
        stored.append(digits)
        closed.append((*pair, 1 / 3))
        game = bandits.make([1.0], uniform, uniform, wins, beta=beta, eta=eta)
        computed.append(practical_optimum(game).policy_XA[0].tolist())
    checks += [
        compare("three actions, 4 problems: policies", stored, computed, POLICY),
        compare("three actions: closed form's policies", closed, computed, POLICY),
    ]
    game = golden24()
    best = practical_optimum(game)
    dpo = practical(game, best.policy_XA, production_loss(game, sft="none", eta=0.0))
    sft = practical(game, best.policy_XA, production_loss(game, preference="none"))
    policy = [
        [0.7015401419575978, 0.2822703032495175, 0.0161895547928846],
        [0.8446337689355902, 0.0553662310644099, 0.1],
    ]
    checks += [
        compare("golden24: loss", 0.7576515023264767, best.value, VALUE),
        compare("golden24: its DPO term", 0.4584582743894357, dpo, VALUE),
        compare("golden24: its SFT term / (eta beta)", 1.4959661396852055, sft / (0.5 * 0.4), VALUE),
        compare("golden24: K", -0.2559133341280825, constant(game), IDENTITY),
        compare("golden24: value of the game", 0.5017381681983942, best.value + constant(game), VALUE),
        compare("golden24: policy", policy, best.policy_XA, POLICY),
    ]
    game = chosen13()
    best = practical_optimum(game)
    policy = [[0.7861090396226006, 0.1968470239637973, 0.0170439364136022]]
    checks += [
        compare("chosen13: loss", 0.6494282604496548, best.value, VALUE),
        compare("chosen13: value of the game", 0.5716494997140924, best.value + constant(game), VALUE),
        compare("chosen13: policy", policy, best.policy_XA, POLICY),
    ]
    return checks


# ---- the theorem ------------------------------------------------------------------------------------------------


def random_games() -> list[Bandit]:
    """50 random games of three prompts and five actions, ten per (beta, eta) of SETTINGS."""
    return [bandits.random(10, beta=beta, eta=eta, seed=seed) for seed, (beta, eta) in enumerate(SETTINGS)]


def equivalence(games: list[Bandit]) -> list[Check]:
    """Minimax, maximin, certificate and training loss, each by a solver of its own; the identities that link them."""
    columns: dict[tuple[str, float], tuple[list, list]] = {}

    def add(what: str, expected: Tensor, computed: Tensor, tolerance: float) -> None:
        pair = columns.setdefault((what, tolerance), ([], []))
        pair[0].append(expected.flatten())
        pair[1].append(computed.flatten())

    for seed, game in enumerate(games):
        outer, dual, trained = minimax(game), maximin(game), practical_optimum(game)
        add("max_p T (dual) = min_r F: value", outer.value, dual.value, VALUE)
        add("max_p T (dual) = min_r F: policy", outer.policy_XA, dual.policy_XA, POLICY)
        add("T(pi_hat) = F(r_hat)", outer.value, worst_case(game, outer.policy_XA), VALUE)
        add("min L_RPO + K = min_r F: value", outer.value, trained.value + constant(game), VALUE)
        add("min L_RPO + K = min_r F: policy", outer.policy_XA, trained.policy_XA, POLICY)
        generator = torch.Generator().manual_seed(seed)
        reward_XA = torch.randn(game.ref_XA.shape, generator=generator, dtype=torch.float64)
        answer_XA, value = gibbs(game, reward_XA), best_response(game, reward_XA)
        rhs = practical(game, answer_XA) + constant(game)
        add("F(r) = L_RPO(p_r) + K, any r", value, rhs, IDENTITY)
        lost = game.eta * game.beta * (game.d0_X * kl(game.base_XA, answer_XA)).sum(-1)
        add("F(r) - phi(q, r) = eta beta KL(q || p_r)", lost, value - phi(game, game.base_XA, reward_XA), IDENTITY)
        zeros = torch.zeros_like(game.ref_XA)
        add("stationarity of pi_hat", zeros, stationarity(game, trained.policy_XA), VALUE)
        add("mass of every component = base's", zeros, mass_excess(game, trained.policy_XA), POLICY)
        add("never compared: pi_hat = base", game.base_XA[:, 0, -1], trained.policy_XA[:, 0, -1], POLICY)
        # As in a run: base is the chosen law, and pi_hat <= (1 + 1/eta) x the frequency as chosen.
        played = bandits.empirical(game.ref_XA, game.wins_XAA, beta=game.beta, eta=game.eta)
        limit_XA, policy_XA = cap(played), practical_optimum(played).policy_XA
        add("base chosen: pi_hat over (1 + 1/eta) chosen", zeros, (policy_XA - limit_XA).clamp(min=0), POLICY)
        # Other convex losses: smoothed labels are the game on mixed wins. And `rpo_avg`'s eta is eta beta.
        mixed = replace(game, wins_XAA=0.9 * game.wins_XAA + 0.1 * game.wins_XAA.mT)
        smooth = practical_optimum(game, production_loss(game, label_smoothing=0.1))
        add("label smoothing = mixed wins: policy", minimax(mixed).policy_XA, smooth.policy_XA, POLICY)
        avg = practical_optimum(game, production_loss(game, sft="avg", eta=game.eta * game.beta))
        add("loss.sft=avg at eta beta: policy", outer.policy_XA, avg.policy_XA, POLICY)
        boxed = minimax(game, box=1.5)
        worst = worst_case(game, boxed.policy_XA, 1.5)
        add("rewards in [0, 1.5]: T(pi_hat) = F(r_hat)", boxed.value, worst, VALUE)
    return [compare(what, torch.cat(a), torch.cat(b), tol) for (what, tol), (a, b) in columns.items()]


def nonconvex() -> list[Check]:
    """The class {(c, 0), (0, c)} by brute force: the two orders disagree by what the closed form says."""
    c, beta, eta = 2.0, 1.0, 1.0
    share_G = torch.linspace(0, 1, 2001, dtype=torch.float64)  # all policies, on a grid that holds 1/2
    half = torch.full((2001, 1, 2), 0.5, dtype=torch.float64)
    wins = _wins(1, 2, (0, 0, 1, 1), (0, 1, 0, 1)).expand(2001, 1, 2, 2)
    game = bandits.make(torch.ones(2001, 1, dtype=torch.float64), half, half, wins, beta=beta, eta=eta)
    policy_GXA = torch.stack([share_G, 1 - share_G], -1)[:, None]
    rewards = [torch.tensor(r, dtype=torch.float64).expand(2001, 1, 2) for r in ([c, 0.0], [0.0, c])]
    outer, inner, share = closed_forms.nonconvex_gap(reward=c, beta=beta, eta=eta)
    worst_G = torch.minimum(*(phi(game, policy_GXA, r) for r in rewards))
    best = min(best_response(game, r)[0] for r in rewards)
    answer = gibbs(game, rewards[0])[0, 0, 0]
    return [
        compare("two rewards, not convex: minimax", outer, best, IDENTITY),
        compare("two rewards, not convex: maximin", inner, worst_G.max(), IDENTITY),
        compare("two rewards: gap (0 if convex)", 0.433780830483, best - worst_G.max(), 1e-12),
        compare("two rewards: policies", [share, 0.5], [answer, share_G[worst_G.argmax()]], POLICY),
    ]
