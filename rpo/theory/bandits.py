"""Finite contextual bandits with preference data: the tables that the theory is about, checked once.

Letters: X prompts, A actions. Every table may carry leading dimensions (instances; for example seeds). All is float64.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rpo.errors import UserError


@dataclass(frozen=True)
class Bandit:
    """A game from `make` or `empirical`, which check it. wins_XAA[x, w, l]: share of all comparisons; sums to 1."""

    d0_X: Tensor
    ref_XA: Tensor
    base_XA: Tensor
    wins_XAA: Tensor
    beta: float
    eta: float


def number(name: str, value: Any, low: float, high: float = math.inf, closed: bool = False) -> float:
    """`value`, a finite number in ]low, high[, or in [low, high] where `closed`; UserError names it otherwise."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (real and (low <= value <= high if closed else low < value < high)):
        left, right = "[]" if closed else "]["
        raise UserError(f"{name}={value!r}: expected a finite number in {left}{low:g}, {high:g}{right}")
    return float(value)


def table(name: str, values: Any, shape: tuple | None = None) -> Tensor:
    """`values` (nested lists, an array or a tensor) in float64; UserError where not finite or not of `shape`."""
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        message, shown = (" ".join(str(thing).split()) for thing in (error, values))
        raise UserError(f"{name}={shown[:60]}: expected a rectangular table of numbers ({message[:80]})") from None
    if shape is not None and numbers.shape != shape:
        raise UserError(f"{name}: shape {tuple(numbers.shape)}; expected {tuple(shape)}, to go with d0 and ref")
    if not numbers.isfinite().all():
        raise UserError(f"{name}: holds {float(numbers[~numbers.isfinite()][0])}; expected finite numbers")
    return numbers


def law(name: str, values: Any, shape: tuple | None = None, positive: bool = False) -> Tensor:
    """`values` as probabilities over the last axis; UserError where they are none (`positive`: a zero is none)."""
    probs = table(name, values, shape)
    if not probs.ndim or not probs.numel():
        raise UserError(f"{name}: shape {tuple(probs.shape)}; expected at least one probability")
    if probs.min() < 0 or (positive and probs.min() == 0):
        raise UserError(f"{name}: holds {float(probs.min()):g}; expected probabilities {'> 0' if positive else '>= 0'}")
    error = (probs.sum(-1) - 1).flatten()
    if error.abs().max() > 1e-9:
        total = 1 + float(error[error.abs().argmax()])
        raise UserError(f"{name}: probabilities sum to {total:.10g}; expected 1 within 1e-9; divide by the sum")
    return probs


def _counts(wins: Any, shape: tuple | None = None) -> Tensor:
    wins_XAA = table("wins", wins, shape)
    if wins_XAA.ndim < 3 or wins_XAA.shape[-1] != wins_XAA.shape[-2]:
        raise UserError(f"wins: shape {tuple(wins_XAA.shape)}; expected [..., X, A, A], wins[x, w, l]: w beat l at x")
    if wins_XAA.min() < 0 or wins_XAA.diagonal(dim1=-2, dim2=-1).any():
        raise UserError("wins: a negative count or an action against itself; expected wins[x, w, l] >= 0 with w != l")
    total = wins_XAA.sum((-3, -2, -1))
    if not (total.isfinite() & (total > 0)).all():
        raise UserError(f"wins: {float(total.min()):g} comparisons in all; expected a positive number per instance")
    return wins_XAA


def make(d0: Any, ref: Any, base: Any, wins: Any, *, beta: float, eta: float) -> Bandit:
    """The checked game of prompt law d0_X, laws ref_XA and base_XA, and win counts wins_XAA (w beat l at x).

    Counts are divided by their sum. eta = 0 is DPO: it has a loss but no game. Raises UserError where d0 or ref is not
    positive, a law does not sum to 1, a table has a wrong shape or a number that is not finite, an action beats itself,
    nothing was compared, beta <= 0, or eta < 0.
    """
    beta, eta = number("beta", beta, 0.0), number("eta", eta, 0.0, closed=True)
    d0_X = law("d0", d0, positive=True)
    ref_XA = law("ref", ref, positive=True)
    if ref_XA.shape[:-1] != d0_X.shape:
        raise UserError(f"ref: shape {tuple(ref_XA.shape)}; expected d0's {tuple(d0_X.shape)} and one axis of actions")
    base_XA = law("base", base, ref_XA.shape)
    wins_XAA = _counts(wins, (*ref_XA.shape, ref_XA.shape[-1]))
    return Bandit(d0_X, ref_XA, base_XA, wins_XAA / wins_XAA.sum((-3, -2, -1), keepdim=True), beta, eta)


def empirical(ref: Any, wins: Any, *, beta: float, eta: float) -> Bandit:
    """The game that `loss=rpo_sum` plays on a data set: d0 and base are its prompts' and chosen responses' shares.

    Remark 5.4 proposes this base. The proof of theorem 5.3 takes base as fixed beforehand, so its rate is not proved
    for this one; the equivalence (theorem 5.6) holds all the same. UserError as `make`, and for an uncompared prompt.
    """
    chosen_XA = _counts(wins).sum(-1)
    count_X = chosen_XA.sum(-1)
    if not count_X.all():
        raise UserError("wins: a prompt without a comparison; expected at least one each, or leave the prompt out")
    return make(count_X / count_X.sum(-1, keepdim=True), ref, chosen_XA / count_X[..., None], wins, beta=beta, eta=eta)


def random(instances: int, *, beta: float, eta: float, seed: int, prompts: int = 3, actions: int = 5) -> Bandit:
    """Random games side by side: random laws, 40 to 200 Bradley-Terry comparisons of random pairs, r* ~ N(0, 1).

    The last action of prompt 0 is never compared.
    """
    generator = torch.Generator().manual_seed(seed)

    def dirichlet(*shape: int) -> Tensor:
        weights = 0.05 - torch.rand(*shape, generator=generator, dtype=torch.float64).log()
        return weights / weights.sum(-1, keepdim=True)

    reward_XA = torch.randn(instances, prompts, actions, generator=generator, dtype=torch.float64)
    wins_XAA = torch.zeros(instances, prompts, actions, actions, dtype=torch.float64)
    for i in range(instances):
        for _ in range(int(torch.randint(40, 201, (), generator=generator))):
            x = int(torch.randint(prompts, (), generator=generator))
            w, k = torch.randperm(actions - (x == 0), generator=generator)[:2].tolist()
            if torch.rand((), generator=generator) > torch.sigmoid(reward_XA[i, x, w] - reward_XA[i, x, k]):
                w, k = k, w
            wins_XAA[i, x, w, k] += 1
    shape = (instances, prompts, actions)
    return make(dirichlet(instances, prompts), dirichlet(*shape), dirichlet(*shape), wins_XAA, beta=beta, eta=eta)
