"""Held-out pairs: does the policy rank them as people did, how far has it moved, and is it calibrated?

Letters: P pairs. All standard errors are clustered by prompt.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as torch_dist

from rpo import dist
from rpo.files import short_hash
from rpo.stats import clustered_mean

if TYPE_CHECKING:
    from rpo.data.dataset import Rows
    from rpo.evals.context import Loaded
    from rpo.model.policy import Policy

BINS = 10  # of the calibration error
PROBED = 8  # pairs that the noise floor is measured on
WRITTEN = 64  # micro-batches between two writes
Once = Callable[[str, Callable[[], dict]], dict]  # `Store.once`


def score(
    policy: "Callable[[], Policy]",
    rows: "Rows",
    device: torch.device,
    *,
    tokens_per_microbatch: int,
    once: Once = lambda key, compute: compute(),
) -> dict[str, np.ndarray]:
    """Summed log-probs in nats of the rows' chosen and rejected responses, one entry per row, the same on every rank.

    `policy` is called where something is left to score; `once` keeps what was scored, WRITTEN micro-batches at a time,
    under a digest of which rows they hold.
    """
    from rpo.data import schedule

    every = np.arange(len(rows))
    ranks, rank = dist.world_size(), dist.rank()
    budget = tokens_per_microbatch
    plan = schedule.plan_step(rows, every, layout="padded", budget=budget, rank=rank, world_size=ranks)
    table = np.zeros((2, len(rows)))
    for start in range(0, len(plan.microbatches), WRITTEN):
        batches = plan.microbatches[start : start + WRITTEN]
        scored = once(
            short_hash([start, WRITTEN, len(rows), budget, ranks]),
            lambda batches=batches: _scored(policy(), rows, batches, device),
        )
        table[:, scored["rows"]] = [scored["chosen"], scored["rejected"]]
    return {"chosen": table[0], "rejected": table[1]}


@torch.no_grad()
def _scored(
    policy: "Policy", rows: "Rows", batches: list[tuple[np.ndarray, float]], device: torch.device
) -> dict[str, list]:
    """{"rows": indices, "chosen", "rejected": their log-probs} of the micro-batches, of all ranks together."""
    from rpo.data.batch import padded_batch
    from rpo.model.policy import score as score_batch

    table = torch.zeros(3, len(rows), dtype=torch.float64, device=device)
    for members, weight in batches:
        pairs = score_batch(policy, None, padded_batch(rows, members, weight=weight).to(device))
        sides = torch.stack([pairs.chosen_P, pairs.rejected_P, torch.ones_like(pairs.chosen_P)]).double()
        table[:, torch.from_numpy(members).to(device)] += weight * sides
    torch_dist.all_reduce(table)
    chosen, rejected, scored = table.cpu().numpy()
    members = np.flatnonzero(scored)
    return {"rows": members.tolist(), "chosen": chosen[members].tolist(), "rejected": rejected[members].tolist()}


def noise_floor(
    model: "Loaded", rows: "Rows", device: torch.device, *, positions: int, tokens_per_microbatch: int
) -> float:
    """`probe.noise_floor` of the first PROBED pairs: nats per token by which rounding alone moves a log-prob."""
    from rpo.data import schedule
    from rpo.model import probe

    some = np.arange(min(PROBED, len(rows)))
    plan = schedule.plan_step(rows, some, layout="padded", budget=tokens_per_microbatch)
    members = plan.microbatches[0][0]
    floor = probe.noise_floor(model.policy, rows, members, device, positions=positions, compute_dtype=model.compute)
    return dist.broadcast(floor)


def won(margin_P: np.ndarray) -> np.ndarray:
    """1 where the chosen response is ahead, a tie is half."""
    return (margin_P > 0) + 0.5 * (margin_P == 0)


def calibration_error(margin_P: np.ndarray, seed: int) -> float:
    """Expected calibration error of sigmoid(margin) as the probability that the first response is the chosen one.

    Each pair is put in random order first (else every label is 1); 10 equal bins of probability, weighted by size.
    """
    first_P = np.random.default_rng(seed).random(len(margin_P)) < 0.5
    prob_P = _sigmoid(np.where(first_P, margin_P, -margin_P))
    bin_P = np.minimum((prob_P * BINS).astype(int), BINS - 1)
    gaps = [abs((prob_P - first_P)[bin_P == b].sum()) for b in range(BINS)]
    return float(sum(gaps) / len(margin_P))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def statistics(
    logps: dict[str, np.ndarray], rows: "Rows", *, beta: float | None, noise_floor: float, seed: int
) -> dict[str, dict]:
    """The metrics of `rows`, each a value with its clustered standard error and n; without a `beta` those that need none.

    `logps` has the summed log-probs of chosen, rejected, ref_chosen and ref_rejected (`score`). Accuracy counts a tie as
    half. A pair is displaced where its chosen response fell by more than the noise floor. nll is -log sigmoid(beta D), to
    be held against ln 2 = 0.693 (no information); lengths are in tokens.
    """
    prompts = [rows.row(i)[0].tobytes() for i in range(len(rows))]
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    clusters = np.array([number[prompt] for prompt in prompts])
    shift_P, shift_rejected_P = logps["chosen"] - logps["ref_chosen"], logps["rejected"] - logps["ref_rejected"]
    margin_P = shift_P - shift_rejected_P
    correct_P = won(margin_P)
    chosen_P = rows.chosen.astype(np.float64)
    ref_margin_P = logps["ref_chosen"] - logps["ref_rejected"]

    of_beta = {}
    if beta is not None:
        of_beta = {
            "rewards/chosen": beta * shift_P,
            "rewards/rejected": beta * shift_rejected_P,
            "rewards/margins": beta * margin_P,
            "nll/preference": np.logaddexp(0, -beta * margin_P),
            "brier": _sigmoid(-beta * margin_P) ** 2,
        }
    columns = {
        "rewards/accuracies": correct_P,
        **of_beta,
        "logps/chosen": logps["chosen"],
        "logps/rejected": logps["rejected"],
        "shift/chosen": shift_P,
        "shift/rejected": shift_rejected_P,
        "displacement_rate": shift_P < -noise_floor * chosen_P,
        "reference/accuracies": won(ref_margin_P),
    }
    result = {name: clustered_mean(values, clusters) for name, values in columns.items()}
    for name, values in {"nll/chosen": -logps["chosen"], "shift_per_token/chosen": shift_P}.items():
        result[name] = clustered_mean(values, clusters, chosen_P)
    for name, part_P in {
        "chosen_longer": rows.chosen > rows.rejected,
        "chosen_shorter": rows.chosen < rows.rejected,
        "same_length": rows.chosen == rows.rejected,
    }.items():
        result[f"rewards/accuracies/{name}"] = clustered_mean(correct_P[part_P], clusters[part_P])
    if beta is not None:
        result["calibration_error"] = {"value": calibration_error(beta * margin_P, seed), "se": None, "n": len(rows)}
    return result
