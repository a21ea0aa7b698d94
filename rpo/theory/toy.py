"""A toy of overoptimisation: one prompt, where rarely compared bad actions sometimes win by luck.

Letters: S seeds (solved side by side), A actions. Actions: one good (true reward 1), one mediocre (0), 20 rare bad (-1)
and 3 bad ones that are never compared (-1). Of N comparisons nearly all are good against mediocre; each rare action
meets the mediocre one Poisson(2) times, *whatever N*. So the instance changes with N, the usual device of a worst
case: on one fixed instance every action is compared often in the end, and DPO learns too. Outcomes are Bradley-Terry.
With probability 0.87 some rare action wins all of its few comparisons; its maximum likelihood reward is infinite.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from rpo.theory import bandits
from rpo.theory.bandits import Bandit
from rpo.theory.game import practical_optimum, practical_X, production_loss

RARE = slice(2, 22)
NEVER = slice(22, 25)
REWARD_A = torch.tensor([1.0, 0.0] + 23 * [-1.0], dtype=torch.float64)
REF_A = torch.tensor([0.25, 0.25] + 23 * [0.5 / 23], dtype=torch.float64)
RIDGE = 1e-8  # on rewards, for DPO alone: it has no minimiser (or many), the ridge picks the one of least norm


def draw(num_comparisons: int, seeds: int) -> Tensor:
    """Win counts wins_S1AA of `seeds` data sets; seed s is the same whatever `seeds` is.

    Its rare comparisons are the same at every N too, so that errors of different N are not independent.
    """
    wins = torch.zeros(seeds, 1, len(REWARD_A), len(REWARD_A), dtype=torch.float64)
    upset = torch.sigmoid(torch.tensor(-1.0))  # the worse of two actions that are a reward of 1 apart wins
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        met = torch.poisson(torch.full((20,), 2.0), generator=generator)
        rare_won = torch.binomial(met, upset.expand(20), generator=generator)
        rest = num_comparisons - met.sum()
        assert rest > 0, f"{num_comparisons} comparisons, {int(met.sum())} of them with rare actions"
        mediocre_won = torch.binomial(rest, upset, generator=generator)
        wins[seed, 0, 0, 1], wins[seed, 0, 1, 0] = rest - mediocre_won, mediocre_won
        wins[seed, 0, RARE, 1], wins[seed, 0, 1, RARE] = rare_won.double(), (met - rare_won).double()
    return wins


def game(wins: Tensor, *, beta: float, eta: float, base: str = "chosen") -> Bandit:
    """The seeds' games; base is the chosen responses' law, as `loss=rpo_sum` has it, or `ref`."""
    ref_SXA = REF_A.expand(*wins.shape[:-1])
    played = bandits.empirical(ref_SXA, wins, beta=beta, eta=eta)
    return replace(played, base_XA=ref_SXA) if base == "ref" else played


def optimum(played: Bandit) -> Tensor:
    """policy_SA at the exact minimum of the training loss; eta = 0 is DPO's, of least norm."""
    return practical_optimum(played, ridge=0.0 if played.eta else RIDGE).policy_XA[:, 0]


def true_value(policy_SA: Tensor) -> Tensor:
    """J_S, the expected true reward; 1 is the best policy's, -0.25 the reference's."""
    return policy_SA @ REWARD_A


def train(played: Bandit, steps: int, lr: float = 0.05) -> dict[str, Tensor]:
    """A training run by full-batch Adam on tabular logits from ref, on the training loss: what moves, step by step.

    `step_K`, and of shape [K, S]: `value` (true), `chosen` (mean log pi of the chosen responses, nats), `uncovered`
    (mass on rare and never compared actions). K steps spaced evenly in log(step), the start included.
    """
    loss_X = practical_X(played, production_loss(played))
    logits = played.ref_XA.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    watched = {0, steps} | {round(steps ** (k / 60)) for k in range(61)}
    seen: dict[str, list] = {"step_K": [], "value": [], "chosen": [], "uncovered": []}
    chosen_SA = played.wins_XAA.sum(-1)[:, 0]
    for step in range(steps + 1):
        if step in watched:
            with torch.no_grad():
                logps_SA = torch.log_softmax(logits, -1)[:, 0]
            seen["step_K"].append(torch.tensor(step))
            seen["value"].append(true_value(logps_SA.exp()))
            seen["chosen"].append((chosen_SA * logps_SA).sum(-1))
            seen["uncovered"].append(logps_SA[:, 2:].exp().sum(-1))
        optimizer.zero_grad()
        loss_X(logits).sum().backward()  # seeds do not meet: Adam works per number
        optimizer.step()
    return {name: torch.stack(values) for name, values in seen.items()}


def mean_error(values_S: Tensor) -> tuple[float, float]:
    """(mean, standard error) over seeds."""
    return float(values_S.mean()), float(values_S.std() / math.sqrt(len(values_S)))


def slope(sizes: list[int], gaps: list[float]) -> float:
    """The least-squares slope of log(gap) against log(N)."""
    x, y = torch.tensor(sizes, dtype=torch.float64).log(), torch.tensor(gaps, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())
