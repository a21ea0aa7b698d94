"""Held-out pairs: does the policy rank them as people did, how far has it moved, and is it calibrated?

Letters: P pairs. All standard errors are clustered by prompt.
"""

import hashlib

import numpy as np
import torch
import torch.distributed as torch_dist

from rpo import dist
from rpo.data import schedule
from rpo.data.batch import padded_batch
from rpo.data.dataset import Rows
from rpo.model.policy import Policy, score
from rpo.stats import clustered_mean

BINS = 10  # of the calibration error


def score_rows(
    policy: Policy, reference: Policy | None, rows: Rows, device: torch.device, *, tokens_per_microbatch: int
) -> dict[str, np.ndarray]:
    """Summed log-probs in nats, one entry per row and side: chosen, rejected, ref_chosen, ref_rejected (all ranks).

    Without a `reference` its log-probs are the rows' own; where these have none, ref_chosen and ref_rejected are absent.
    """
    ranks = {"rank": dist.rank(), "world_size": dist.world_size()}
    plan = schedule.plan_step(rows, np.arange(len(rows)), layout="padded", budget=tokens_per_microbatch, **ranks)
    known = reference is not None or rows.ref_logps is not None
    sides = ("chosen", "rejected", *(("ref_chosen", "ref_rejected") if known else ()))
    table = torch.zeros(len(sides), len(rows), dtype=torch.float64, device=device)
    with torch.no_grad():
        for members, weight in plan.microbatches:
            pairs = score(policy, reference, padded_batch(rows, members, weight=weight).to(device))
            values = torch.stack([getattr(pairs, f"{side}_P").to(torch.float64) for side in sides])
            table[:, torch.from_numpy(members).to(device)] += weight * values
    torch_dist.all_reduce(table)
    return dict(zip(sides, table.cpu().numpy(), strict=True))


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


def _won(margin_P: np.ndarray) -> np.ndarray:
    """1 where the chosen response is ahead, a tie is half."""
    return (margin_P > 0) + 0.5 * (margin_P == 0)


def evaluate(
    policy: Policy,
    reference: Policy,
    rows: Rows,
    device: torch.device,
    *,
    beta: float,
    noise_floor: float,
    tokens_per_microbatch: int,
    seed: int,
) -> tuple[dict, list[dict]]:
    """(metrics by name, one sample per row): each metric a value with its standard error and n.

    Accuracy counts a tie as half. A pair is displaced where its chosen response fell by more than the noise floor.
    nll is -log sigmoid(beta D), to be held against ln 2 = 0.693 (no information); lengths are in tokens.
    """
    logps = score_rows(policy, reference, rows, device, tokens_per_microbatch=tokens_per_microbatch)
    margin_P = (logps["chosen"] - logps["ref_chosen"]) - (logps["rejected"] - logps["ref_rejected"])
    samples = [
        {"id": rows.where(i), "cluster": hashlib.sha256(rows.row(i)[0].tobytes()).hexdigest()[:16]}
        | {"scores": {"rewards/accuracies": _won(margin_P[i]), "rewards/margins": beta * float(margin_P[i])}}
        | {"row": rows.where(i), "tokens_chosen": int(rows.chosen[i]), "tokens_rejected": int(rows.rejected[i])}
        | {side: float(values[i]) for side, values in logps.items()}
        for i in range(len(rows))
    ]
    return statistics(logps, rows, beta=beta, noise_floor=noise_floor, seed=seed), samples


def statistics(
    logps: dict[str, np.ndarray], rows: Rows, *, beta: float | None, noise_floor: float, seed: int
) -> dict[str, dict]:
    """The metrics of `evaluate` from what `score_rows` gives; without a `beta` those that do not need one."""
    prompts = [rows.row(i)[0].tobytes() for i in range(len(rows))]
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    clusters = np.array([number[prompt] for prompt in prompts])
    shift_P, shift_rejected_P = logps["chosen"] - logps["ref_chosen"], logps["rejected"] - logps["ref_rejected"]
    margin_P = shift_P - shift_rejected_P
    correct_P = _won(margin_P)
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
        "reference/accuracies": _won(ref_margin_P),
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
