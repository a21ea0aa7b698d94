"""The theorem of arXiv 2405.16436, by the code that trains: golden digits, closed forms, second solvers, mutations."""

import math
from dataclasses import replace

import pytest
import torch

from rpo import losses
from rpo.errors import UserError
from rpo.theory import bandits, closed_forms, toy
from rpo.theory.checks import (
    chosen13,
    compare,
    equivalence,
    golden,
    golden24,
    nonconvex,
    random_games,
    require,
    two_actions,
)
from rpo.theory.game import (
    best_response,
    cap,
    constant,
    gibbs,
    kl,
    maximin,
    minimax,
    phi,
    practical,
    practical_optimum,
    production_loss,
    stationarity,
    worst_case,
)
from tests.helpers.mutations import scaled
from tests.helpers.runs import ROOT, settings


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tables of a few numbers: a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- the checks of the page, and that they bite -----------------------------------------------------------------


def test_golden_values():
    """The training loss at its minimum: closed forms and stored digits to 1e-10 in value, 1e-8 in policy."""
    require(golden())


def test_equivalence_on_random_games():
    """Minimax, reward-free dual, certificate and training loss agree on 50 random games, with the identities of the theorem."""
    games = random_games()
    assert sum(len(game.d0_X) for game in games) == 50
    require(equivalence(games))


def test_gap_of_a_class_that_is_not_convex():
    """With two rewards the orders of play differ by eta beta log cosh(c / (2 beta)), found by brute force."""
    require(nonconvex())


def sft_without_beta(loss, pairs, **counts):
    return -loss.eta * pairs.chosen_P


def sft_by_hand(loss, pairs, **counts):
    return -loss.eta * {"sum": loss.beta, "avg": 1}[loss.sft] * pairs.chosen_P


def sigmoid_of_another_beta(factor):
    right = losses.sigmoid
    return lambda margin_P, beta, *rest: right(margin_P, factor * beta, *rest)


MUTATIONS = {
    "SFT term without beta": ("sft_loss", lambda: sft_without_beta),
    "SFT coefficient 0.5% too large": ("sft_loss", lambda: scaled("sft_loss", 1.005)),
    "SFT coefficient 0.5% too small": ("sft_loss", lambda: scaled("sft_loss", 0.995)),
    "preference term 0.5% too large": ("sigmoid", lambda: scaled("sigmoid", 1.005)),
    "beta of the margin 0.5% too small": ("sigmoid", lambda: sigmoid_of_another_beta(0.995)),
    "SFT by hand, right": ("sft_loss", lambda: sft_by_hand),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_coefficient_fails_the_checks(mutation, monkeypatch):
    """A forgotten beta or half a percent in `losses` breaks the policies of both sets of checks; a right rewrite does not."""
    name, make = MUTATIONS[mutation]
    monkeypatch.setattr(losses, name, make())
    checks = golden() + equivalence([bandits.random(2, beta=0.5, eta=1, seed=7)])
    if mutation.endswith("right"):
        return require(checks)
    failed = {check.what for check in checks if not check.holds}
    assert {"golden24: policy", "chosen13: policy", "min L_RPO + K = min_r F: policy"} <= failed
    with pytest.raises(AssertionError, match="golden24: policy"):
        require(checks)


def test_nan_and_infinity_do_not_pass_a_check():
    """A check of NaN or infinity fails, and names itself."""
    for bad in (math.nan, math.inf):
        with pytest.raises(AssertionError, match="broken"):
            require([compare("broken", [1.0, 2.0], [1.0, bad], 1e-8)])


# ---- the objective is the one that trains -----------------------------------------------------------------------


def test_the_loss_is_the_preset():
    """What is minimised here is `loss=rpo_sum` of conf/, field by field."""
    game = golden24()
    keys = ("loss=rpo_sum", f"loss.beta={game.beta}", f"loss.eta={game.eta}")
    assert settings(*keys, "model.path=x", "data.train=x", "data.eval=null").loss == production_loss(game)


def test_practical_is_the_mean_over_pairs():
    """On `empirical` data L_RPO is the mean over 13 written-out pairs of the two terms, as train.py forms it."""
    game = chosen13()
    logps_A = torch.log_softmax(float64(0.3, -1.2, 0.4), 0)
    log_ref_A = game.ref_XA[0].log()
    listed = 6 * [(0, 1)] + 3 * [(1, 0)] + [(2, 1), (1, 2)] + 2 * [(0, 2)]
    chosen_P, rejected_P = torch.tensor(listed).T
    sides = [table[side] for table in (logps_A, log_ref_A) for side in (chosen_P, rejected_P)]
    pairs = losses.PairLogps(*sides, torch.ones(13), torch.ones(13))
    terms = losses.objective(production_loss(game), pairs, step_pairs=13, step_chosen_tokens=13)
    written_out = (terms[0] + terms[1]).sum() / 13
    torch.testing.assert_close(practical(game, logps_A.exp()[None]), written_out, rtol=1e-14, atol=0)


def test_instances_side_by_side_are_solved_apart():
    """Five games at once have the optima that each has alone, in all three solvers."""
    games = bandits.random(5, beta=0.5, eta=0.3, seed=3)
    for solve in (minimax, maximin, practical_optimum):
        together = solve(games)
        for i in range(5):
            tables = [table[i] for table in (games.d0_X, games.ref_XA, games.base_XA, games.wins_XAA)]
            alone = solve(bandits.make(*tables, beta=0.5, eta=0.3))
            torch.testing.assert_close(together.policy_XA[i], alone.policy_XA, rtol=0, atol=1e-10)
            torch.testing.assert_close(together.value[i], alone.value, rtol=0, atol=1e-12)


def test_a_gradient_free_iteration_finds_the_same_policy():
    """beta = 1, uniform ref, one prompt: RPO is Bradley-Terry with eta base(a) pseudo-choices; minorise-maximise finds it."""
    generator = torch.Generator().manual_seed(0)
    wins = torch.randint(1, 9, (1, 4, 4), generator=generator).double() * (1 - torch.eye(4))
    base_A, eta = float64(0.1, 0.2, 0.3, 0.4), 0.7
    game = bandits.make([1.0], [[0.25] * 4], base_A[None], wins, beta=1, eta=eta)
    share_AA = game.wins_XAA[0]
    met_AA, policy_A = share_AA + share_AA.T, float64(0.25, 0.25, 0.25, 0.25)
    for _ in range(400):
        policy_A = (share_AA.sum(1) + eta * base_A) / ((met_AA / (policy_A[:, None] + policy_A)).sum(1) + eta)
    torch.testing.assert_close(practical_optimum(game).policy_XA[0], policy_A, rtol=0, atol=1e-10)


def test_dpo_does_not_identify_the_unseen():
    """With eta = 0 and one compared pair the loss is H(p) for every mass on the unseen action."""
    wins = torch.zeros(1, 3, 3)
    wins[0, 0, 1], wins[0, 1, 0] = 7, 3
    game = bandits.make([1.0], [[1 / 3] * 3], [[0.7, 0.3, 0.0]], wins, beta=0.5, eta=0)
    ratio = (0.7 / 0.3) ** 2  # pi_w / pi_l at the Bradley-Terry optimum, beta 1/2
    for unseen in (0.001, 0.3, 0.999):
        policy = float64(ratio / (1 + ratio), 1 / (1 + ratio), 0) * (1 - unseen) + float64(0, 0, unseen)
        assert float(practical(game, policy[None])) == pytest.approx(0.610864302054894, abs=1e-13)


# ---- the game ---------------------------------------------------------------------------------------------------


def test_best_response_is_the_best_of_many():
    """phi(q, r) <= F(r) for 2,000 policies q, and the Gibbs policy attains it."""
    game = bandits.random(1, beta=0.4, eta=0.5, seed=1)
    generator = torch.Generator().manual_seed(1)
    reward = torch.randn(1, 3, 5, generator=generator, dtype=torch.float64)
    value = best_response(game, reward)
    torch.testing.assert_close(phi(game, gibbs(game, reward), reward), value, rtol=1e-13, atol=0)
    weights = torch.rand(2000, 3, 5, generator=generator, dtype=torch.float64) ** 3
    wide = replace(game, **{n: getattr(game, n).expand(2000, *getattr(game, n).shape[1:])
                            for n in ("d0_X", "ref_XA", "base_XA", "wins_XAA")})  # fmt: skip
    policies = weights / weights.sum(-1, keepdim=True)
    assert (phi(wide, policies, reward.expand(2000, 3, 5)) <= value + 1e-13).all()


@pytest.mark.parametrize(("beta", "eta"), [(1, 1e-4), (0.2, 1e-4), (0.1, 1000), (1, 1e-8), (1, 1e6)])
def test_the_certificate_holds_far_from_one(beta, eta):
    """T(pi_hat) = F(r_hat) to 1e-10 of its size, where eta is tiny or huge too."""
    game = bandits.random(4, beta=beta, eta=eta, seed=11)
    best = minimax(game)
    torch.testing.assert_close(worst_case(game, best.policy_XA), best.value, rtol=1e-10, atol=1e-10)


def test_the_dual_is_right_or_refuses():
    """With pulls that float64 cannot distinguish from 0 or 1 the dual stops in one line: no wrong policy comes out."""
    game = bandits.random(3, beta=100, eta=1e-3, seed=1)
    with pytest.raises(UserError, match="^beta, eta: Newton is stuck"):
        maximin(game)


def test_one_way_wins_with_the_chosen_law():
    """One pair, always won, base all on it: the infimum is at infinity; training's reward does not drift by c(x) on the way."""
    game = bandits.empirical([[0.5, 0.5]], [[[0, 5], [0, 0]]], beta=0.1, eta=0.1)
    best = practical_optimum(game)
    torch.testing.assert_close(best.policy_XA, float64([1.0, 0.0]), rtol=0, atol=1e-12)
    assert float(best.value) < 1e-12 and abs(float(best.reward_XA.mean())) < 1e-3


def test_shifts_of_the_reward_change_nothing():
    """phi and F are the same for r + c(x): what subtracting the baseline's reward is for."""
    game = bandits.random(4, beta=0.4, eta=0.5, seed=2)
    generator = torch.Generator().manual_seed(2)
    reward = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    shifted = reward + torch.randn(4, 3, 1, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(best_response(game, reward), best_response(game, shifted))
    torch.testing.assert_close(phi(game, game.ref_XA, reward), phi(game, game.ref_XA, shifted))


def test_box_class():
    """Rewards in [0, R]: spans stay within R, bounds are active, pi_hat beats other policies by eta beta KL at least."""
    game = bandits.random(5, beta=0.5, eta=0.3, seed=4)
    best = minimax(game, box=1.0)
    assert best.reward_XA.min() >= 0 and best.reward_XA.max() <= 1
    assert ((best.reward_XA == 0) | (best.reward_XA == 1)).any((-2, -1)).all()
    for other_XA in (game.ref_XA, game.base_XA, minimax(game).policy_XA):
        lost = game.eta * game.beta * (game.d0_X * kl(other_XA, best.policy_XA)).sum(-1)
        assert (worst_case(game, other_XA, box=1.0) <= best.value - lost + 1e-12).all()
    # The deterministic heart of theorem 5.3: pi_hat's value under any reward of the class is at least T(pi_hat).
    reward_XA = torch.rand(5, 3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert (phi(game, best.policy_XA, reward_XA) >= best.value - 1e-12).all()
    wide = minimax(game, box=50.0)
    torch.testing.assert_close(wide.policy_XA, minimax(game).policy_XA, rtol=0, atol=1e-8)


def test_worst_case_without_a_bound():
    """T = -inf where a component's mass differs from base's or more pull is asked than there are wins; finite at base."""
    game = golden24()
    assert worst_case(game, game.ref_XA) == -math.inf  # the uncompared action has .5, base .1
    assert worst_case(game, game.base_XA).isfinite()
    two = two_actions(p=1.0, base=0.5, ref=0.5, beta=1.0, eta=4.0)
    assert worst_case(two, [[0.7, 0.3]]).isfinite()
    assert worst_case(two, [[0.8, 0.2]]) == -math.inf  # base + 1/eta = .75 is all that one win can carry
    assert worst_case(two, [[0.4, 0.6]]) == -math.inf  # nobody ever beat action 0
    assert worst_case(two, [[0.8, 0.2]], box=3.0).isfinite()


def test_no_action_is_overoptimised_beyond_its_cap():
    """One lucky win in 100: DPO goes all the way, RPO's mass on it falls with eta as computed, below (1 + 1/eta)/N."""
    wins = torch.zeros(1, 3, 3)
    wins[0, 0, 1], wins[0, 1, 0], wins[0, 2, 1] = 69.3, 29.7, 1  # 70:30, and t beat the mediocre one once
    uniform = [[1 / 3] * 3]
    for eta, mass in ((0.01, 0.325), (0.05, 0.0830), (0.1, 0.0494), (0.5, 0.0204), (1.0, 0.0155)):
        game = bandits.empirical(uniform, wins, beta=0.1, eta=eta)
        policy_XA = practical_optimum(game).policy_XA
        assert float(policy_XA[0, 2]) == pytest.approx(mass, rel=0.01)
        assert float(policy_XA[0, 2]) <= float(cap(game)[0, 2]) == pytest.approx((1 + 1 / eta) / 100)
    dpo = bandits.empirical(uniform, wins, beta=0.1, eta=0)
    assert practical_optimum(dpo, ridge=1e-8).policy_XA[0, 2] > 0.999


def test_base_without_support():
    """Where base is 0 and the action never wins, its mass falls to nothing as the box grows; in each box T = F."""
    wins = torch.zeros(1, 3, 3)
    wins[0, 0, 1], wins[0, 1, 0], wins[0, 1, 2] = 6, 3, 1
    game = bandits.empirical([[0.2, 0.2, 0.6]], wins, beta=0.3, eta=0.5)
    masses = []
    for box in (2.0, 4.0, 8.0):
        best = minimax(game, box=box)
        torch.testing.assert_close(worst_case(game, best.policy_XA, box=box), best.value, rtol=0, atol=1e-10)
        masses.append(float(best.policy_XA[0, 2]))
    assert masses[0] > 100 * masses[1] > 10000 * masses[2]
    free, trained = minimax(game), practical_optimum(game)
    assert float(free.policy_XA[0, 2]) < 1e-12
    torch.testing.assert_close(free.policy_XA, trained.policy_XA, rtol=0, atol=1e-8)
    torch.testing.assert_close(free.value, trained.value + constant(game), rtol=0, atol=1e-10)


# ---- closed forms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_compared_pair_is_the_optimum(seed):
    """The one-dimensional root gives Newton's policy and margin on random problems, a third action beside the two."""
    generator = torch.Generator().manual_seed(seed)
    base, ref = (torch.rand(3, generator=generator, dtype=torch.float64) + 0.05 for _ in range(2))
    base, ref = base / base.sum(), ref / ref.sum()
    p, beta, eta = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    beta, eta, p = 0.3 + beta, 0.1 + eta, (1.0 if seed % 4 == 0 else p)
    wins = torch.zeros(1, 3, 3, dtype=torch.float64)
    wins[0, 0, 1], wins[0, 1, 0] = p, 1 - p
    best = minimax(bandits.make([1.0], ref[None], base[None], wins, beta=beta, eta=eta))
    pairs = {"base": tuple(base[:2].tolist()), "ref": tuple(ref[:2].tolist())}
    delta, pair = closed_forms.compared_pair(p=p, beta=beta, eta=eta, **pairs)
    torch.testing.assert_close(best.policy_XA[0], float64(*pair, float(base[2])), rtol=0, atol=1e-10)
    assert delta == pytest.approx(float(best.reward_XA[0, 0] - best.reward_XA[0, 1]), abs=1e-8)


def test_compared_pair_in_special_cases():
    """beta = 1: additive smoothing, the quadratic for any ref, three actions; one-way wins; beta -> 0."""
    p, b, q, eta = 0.6, 0.3, 0.2, 0.7
    _, (share, _) = closed_forms.compared_pair(p=p, base=(b, 1 - b), ref=(0.5, 0.5), beta=1, eta=eta)
    assert share == pytest.approx((p + eta * b) / (1 + eta), abs=1e-14)
    delta, _ = closed_forms.compared_pair(p=p, base=(b, 1 - b), ref=(q, 1 - q), beta=1, eta=eta)
    k, c, z = q / (1 - q), p + eta * b, math.exp(delta)
    assert k * (1 + eta - c) * z**2 + (eta * k + 1 - (1 + k) * c) * z - c == pytest.approx(0, abs=1e-13)
    _, (share, _) = closed_forms.compared_pair(p=p, base=(0.2, 0.4), ref=(0.1, 0.1), beta=1, eta=eta)
    assert share == pytest.approx(0.6 * (p + eta * 0.2) / (1 + eta * 0.6), abs=1e-14)
    delta, _ = closed_forms.compared_pair(p=1, base=(b, 1 - b), ref=(0.5, 0.5), beta=1, eta=eta)
    assert delta == pytest.approx(math.log((1 + eta * b) / (eta * (1 - b))), abs=1e-13)
    delta, _ = closed_forms.compared_pair(p=1, base=(b, 1 - b), ref=(q, 1 - q), beta=1e-5, eta=0.3)
    h = 0.3 * (1 - b)
    assert delta == pytest.approx(math.log((1 - h) / h), abs=1e-3)


# ---- bad input --------------------------------------------------------------------------------------------------


GOOD = {"d0": [1.0], "ref": [[0.5, 0.5]], "base": [[0.3, 0.7]], "wins": [[[0, 3], [1, 0]]], "beta": 0.5, "eta": 0.2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0}, r"beta=0: expected a finite number in \]0"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": math.nan}, "beta=nan"),
        ({"beta": math.inf}, "beta=inf"),
        ({"beta": "0.1"}, "beta='0.1'"),
        ({"eta": -1e-3}, "eta=-0.001"),
        ({"eta": True}, "eta=True"),
        ({"d0": [0.5]}, "d0: probabilities sum to 0.5"),
        ({"d0": 1.0}, r"d0: shape \(\)"),
        ({"d0": []}, r"d0: shape \(0,\)"),
        ({"d0": [0.0, 1.0]}, "d0: holds 0"),
        ({"ref": [[1.0, 0.0]]}, "ref: holds 0; expected probabilities > 0"),
        ({"ref": [[0.5, 0.4]]}, "ref: probabilities sum to 0.9"),
        ({"ref": [[0.5, math.nan]]}, "ref: holds nan"),
        ({"ref": [0.5, 0.5]}, "ref: shape"),
        ({"ref": [[0.5, 0.5], [1.0]]}, "ref=.*rectangular"),
        ({"ref": "uniform"}, "ref=uniform: expected a rectangular table"),
        ({"ref": "two\nlines"}, "ref=two lines: expected a rectangular table"),
        ({"base": [[0.3, 0.6]]}, "base: probabilities sum to 0.9"),
        ({"base": [[-0.5, 1.5]]}, "base: holds -0.5"),
        ({"base": [[0.3, 0.3, 0.4]]}, r"base: shape \(1, 3\); expected \(1, 2\)"),
        ({"wins": [[0, 3], [1, 0]]}, r"wins: shape \(2, 2\); expected \(1, 2, 2\)"),
        ({"wins": [[[0, 3, 0], [1, 0, 0]]]}, r"wins: shape \(1, 2, 3\)"),
        ({"wins": [[[1, 3], [1, 0]]]}, "wins: .*against itself"),
        ({"wins": [[[0, -3], [1, 0]]]}, "wins: a negative count"),
        ({"wins": [[[0, 0], [0, 0]]]}, "wins: 0 comparisons"),
        ({"wins": [[[0, math.inf], [0, 0]]]}, "wins: holds inf"),
    ],
)
def test_bad_games_are_named(change, message):
    """Each bad table or number is one line that names it and says what was expected."""
    with pytest.raises(UserError, match=message) as caught:
        bandits.make(**GOOD | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: minimax(replace(g, eta=0.0)), "eta=0.0"),
        (lambda g: maximin(replace(g, eta=0.0)), "eta=0.0"),
        (lambda g: maximin(replace(g, base_XA=float64([1.0, 0.0]))), "base: has a zero"),
        (lambda g: maximin(replace(g, beta=1e-6)), "beta, eta: Newton is stuck"),
        (lambda g: minimax(g, box=0.0), "box=0.0"),
        (lambda g: minimax(g, box=math.nan), "box=nan"),
        (lambda g: minimax(g, box=3e6), "box=3000000.0"),
        (lambda g: worst_case(g, g.ref_XA, box=3e6), "box=3000000.0"),
        (
            lambda g: minimax(bandits.empirical([[0.5, 0.5]], [[[0, 1], [0, 0]]], beta=1e6, eta=1.0)),
            "beta, eta: a reward passes",
        ),
        (lambda g: worst_case(g, [[0.5, 0.6]]), "policy: probabilities sum to 1.1"),
        (lambda g: phi(g, [[0.5, 0.5]], [[0.0, math.inf]]), "reward: holds inf"),
        (lambda g: gibbs(g, [[0.0, 1.0, 2.0]]), "reward: shape"),
        (lambda g: practical(g, [[1.0, 0.0]]), "policy: holds 0"),
        (lambda g: stationarity(g, [[1.0, 0.0]]), "policy: holds 0"),
        (lambda g: practical_optimum(g, ridge=-1.0), "ridge=-1.0"),
        (lambda g: practical_optimum(g, production_loss(g, preference="hinge")), "loss.preference=hinge"),
        (lambda g: cap(replace(g, eta=0.0)), "eta=0.0"),
        (lambda g: bandits.empirical([[0.5, 0.5]], [[0, 1], [1, 0]], beta=1, eta=1), "wins: shape"),
        (
            lambda g: bandits.empirical(2 * [[0.5, 0.5]], [[[0, 1], [1, 0]], [[0, 0], [0, 0]]], beta=1, eta=1),
            "a prompt",
        ),
        (lambda g: closed_forms.nonconvex_gap(reward=0.0, beta=1.0, eta=1.0), "reward=0.0"),
    ],
)
def test_bad_questions_are_named(call, message):
    """Solvers and closed forms refuse what they have no answer for, in one line."""
    with pytest.raises(UserError, match=message) as caught:
        call(bandits.make(**GOOD))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": -0.1}, "p=-0.1"),
        ({"p": 1.1}, "p=1.1"),
        ({"p": math.nan}, "p=nan"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"eta": 0.0}, "eta=0.0"),
        ({"eta": -1.0}, "eta=-1.0"),
        ({"base": (0.5, 0.6)}, "base=.*sums to 1.1"),
        ({"base": (0.0, 0.0)}, "base=.*sums to 0"),
        ({"base": (0.5, 0.2, 0.3)}, "base=.*two numbers"),
        ({"base": 0.5}, "base=0.5: expected the two numbers"),
        ({"ref": (0.0, 1.0)}, "ref=0.0"),
        ({"ref": (0.8, 0.8)}, "ref=.*sums to 1.6"),
        ({"p": 1.0, "base": (1.0, 0.0)}, "root is infinite"),
        ({"p": 0.0, "base": (0.0, 0.6)}, "root is infinite"),
    ],
)
def test_closed_form_domain(change, message):
    """The closed form refuses numbers outside its domain, among them the case whose root is at infinity."""
    good = {"p": 0.7, "base": (0.5, 0.5), "ref": (0.5, 0.5), "beta": 0.5, "eta": 0.2}
    with pytest.raises(UserError, match=message) as caught:
        closed_forms.compared_pair(**good | change)
    assert "\n" not in str(caught.value)


# ---- the toy ----------------------------------------------------------------------------------------------------


def test_toy_data():
    """N comparisons per seed, rare ones as many whatever N, seeds independent of their number; J(ref) = -0.25."""
    small, large = toy.draw(100, 6), toy.draw(25600, 6)
    assert (small.sum((1, 2, 3)) == 100).all() and (large.sum((1, 2, 3)) == 25600).all()
    for part in (toy.draw(25600, 2), large[:2]):
        assert torch.equal(part[:, :, toy.RARE, :], small[:2, :, toy.RARE, :])
    assert not large[..., toy.NEVER, :].any() and not large[..., :, toy.NEVER].any()
    assert float(toy.true_value(toy.REF_A)) == pytest.approx(-0.25)
    lucky = (small[:, 0, toy.RARE, 1] > 0) & (small[:, 0, 1, toy.RARE] == 0)
    assert lucky.any()
    many = toy.draw(100, 400)
    undefeated = ((many[:, 0, toy.RARE, 1] > 0) & (many[:, 0, 1, toy.RARE] == 0)).any(-1).double().mean()
    assert float(undefeated) == pytest.approx(0.868, abs=4 * math.sqrt(0.868 * 0.132 / 400))


def test_toy_training_overoptimises_without_the_sft_term():
    """Along Adam's path DPO's true value rises and falls below the reference; RPO's ends at its exact optimum."""
    wins = toy.draw(1000, 8)
    dpo, rpo = (toy.game(wins, beta=0.1, eta=eta) for eta in (0.0, 0.1))
    fallen, kept = toy.train(dpo, 600), toy.train(rpo, 600)
    mean_K = fallen["value"].mean(1)
    assert float(mean_K[0]) == pytest.approx(-0.25) and mean_K.max() > 0.4 and mean_K[-1] < -0.25
    torch.testing.assert_close(kept["value"][-1], toy.true_value(toy.optimum(rpo)), rtol=0, atol=2e-3)
    assert fallen["chosen"][-1].mean() < kept["chosen"][-1].mean() - 3
    assert fallen["uncovered"][-1].mean() > 0.5 > 0.05 > kept["uncovered"][-1].mean()


def test_slope_recovers_a_power():
    """Gaps 3 N^-0.7 have the slope -0.7."""
    assert toy.slope([10, 100, 1000], [3 * n**-0.7 for n in (10, 100, 1000)]) == pytest.approx(-0.7)


def test_the_example_of_the_docs():
    """The code in docs/THEORY.md runs, and prints what its comments say."""
    code = (ROOT / "docs" / "THEORY.md").read_text().split("```python")[1].split("```")[0]

    exec(code.replace("print(", "shown.append("), {"shown": (shown := [])})
    *zeros, slack = shown
    assert len(zeros) == 3 and all(float(zero.abs().max()) < 1e-8 for zero in zeros) and float(slack.min()) >= 0
