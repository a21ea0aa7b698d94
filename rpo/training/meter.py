"""What a run measures: sums kept on the device, one reduction per logging interval; pairs, tokens and FLOPs per second.

docs/METRICS.md explains every name. Letters: P pairs.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from rpo import dist
from rpo.config import Loss
from rpo.data.schedule import StepPlan
from rpo.errors import UserError
from rpo.losses import PairLogps, implicit_rewards, shifts
from rpo.model.policy import Policy

# Means over pairs, and means over chosen tokens; the order is that of `_sums`.
PER_PAIR_SUPERVISED = ("loss", "loss/preference", "loss/sft", "logps/chosen")
PER_PAIR_PREFERENCE = (
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
)
PER_PAIR_REFERENCE = (
    "shift/chosen",
    "shift/rejected",
    "displacement_rate",
)
PER_CHOSEN_TOKEN = ("nll/chosen", "shift_per_token/chosen")
PERF = ("perf/pairs_per_second", "perf/tokens_per_second", "perf/mfu", "perf/memory_gib", "perf/compiled_layers")
TRAIN_ONLY = ("grad_norm", "lr", *PERF)
GRADIENT_SPLIT = ("grad_norm/preference", "grad_norm/sft", "grad_cosine")  # every log.gradient_split steps
GOLD = ("gold", "kl", "samples/length", "samples/ended")

# Dense bf16 peaks in FLOP/s, without sparsity, by what CUDA calls the device.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}


def check_metric(key: str, metric: str | None, loss: Loss, *, embedded: bool) -> None:
    """Raises UserError where the setting `key` names what data.eval will not have."""
    names = sum(_names(loss), ()) + (GOLD if embedded and loss.has_reference else ())
    if metric is not None and metric[4:] not in names:
        raise UserError(f"{key}={metric}: no such metric of data.eval; there are {', '.join(names)}")


def _names(loss: Loss) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The means over pairs, and over chosen tokens, that a run with this loss has."""
    per_pair = PER_PAIR_SUPERVISED + PER_PAIR_PREFERENCE * loss.has_pairs + PER_PAIR_REFERENCE * loss.has_reference
    return per_pair, PER_CHOSEN_TOKEN[: 1 + loss.has_reference]


class Meter:
    """Running sums of one split, on the device. `add` never waits; `read` reduces over ranks and empties it."""

    def __init__(self, loss: Loss, noise_floor: float, device: torch.device):
        self.loss, self.noise_floor = loss, noise_floor
        self.per_pair, self.per_token = _names(loss)
        self.sums = torch.zeros(2 + len(self.per_pair) + len(self.per_token), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, pairs: PairLogps, preference_P: Tensor, sft_P: Tensor, weight: float = 1.0) -> None:
        chosen_P, tokens_P = pairs.chosen_P, pairs.tokens_chosen_P
        per_pair = [preference_P + sft_P, preference_P, sft_P, chosen_P]
        per_token = [-chosen_P]
        if self.loss.has_pairs:
            reward_P, reward_rejected_P = implicit_rewards(self.loss, pairs)
            margin_P = reward_P - reward_rejected_P
            per_pair += [pairs.rejected_P, reward_P, reward_rejected_P, margin_P]
            per_pair += [(margin_P > 0) + 0.5 * (margin_P == 0)]
        if self.loss.has_reference:
            shift_P, shift_rejected_P = shifts(pairs)
            per_pair += [shift_P, shift_rejected_P]
            per_pair += [shift_P < -self.noise_floor * tokens_P]  # a fall within rounding is not a fall
            per_token += [shift_P]
        sums = [torch.ones_like(chosen_P), tokens_P, *per_pair, *per_token]
        self.sums += weight * torch.stack([x.to(torch.float64).sum() for x in sums])

    def read(self) -> dict[str, float]:
        """Means since the last read over all ranks, by metric name: the interval's one all-reduce and one wait."""
        torch_dist.all_reduce(self.sums)
        num_pairs, num_tokens, *values = self.sums.tolist()
        self.sums.zero_()
        assert num_pairs > 0, "read() without a pair added"
        counts = [num_pairs] * len(self.per_pair) + [num_tokens] * len(self.per_token)
        return {name: v / n for name, v, n in zip(self.per_pair + self.per_token, values, counts, strict=True)}


@dataclass(frozen=True)
class ModelSize:
    """What the FLOP count needs: parameters of the trunk (no embeddings) and of the head, layers, attention width."""

    trunk: int
    head: int
    layers: int
    attention_width: int
    frozen_trunk: int = 0  # of the trunk's, those that get no gradient
    frozen_head: int = 0

    def step_flops(self, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> float:
        """FLOPs that a step over these pairs needs at least, forward and backward, each prompt counted once.

        6 (trunk x unique + head x scored) + 12 x layers x attention width x visible query-key pairs, for a frozen
        parameter 4 in place of 6; recomputation and the reference's pass are not counted (numpy arrays of token counts, one
        entry per pair).
        """
        unique, scored = (prompt + chosen + rejected).sum(), (chosen + rejected).sum()
        prompt, chosen, rejected = (x.astype(np.int64) for x in (prompt, chosen, rejected))
        context = prompt + chosen
        visible = (context * (context + 1) // 2 + rejected * prompt + rejected * (rejected + 1) // 2).sum()
        trunk, head = 6 * self.trunk - 2 * self.frozen_trunk, 6 * self.head - 2 * self.frozen_head
        trunk_and_head = trunk * int(unique) + head * int(scored)
        return float(trunk_and_head + 12 * self.layers * self.attention_width * int(visible))


def wait(device: torch.device) -> float:
    """Waits until the device has done what it was given; returns the seconds that took."""
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def performance(rates: dict[str, float], device: torch.device, world_size: int) -> dict[str, float]:
    """perf/ metrics from `rates` per second (pairs, unique tokens, needed FLOPs), and peak memory in GiB.

    `mfu` is there only where the device's peak is known, which is no CPU's.
    """
    values = {f"perf/{name}": rate for name, rate in rates.items() if name != "mfu"}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if peak := next((flops for key, flops in _PEAK_FLOPS.items() if key in name), None):
        values["perf/mfu"] = rates["mfu"] / (peak * world_size)
    if device.type == "cuda":
        values["perf/memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        values["perf/memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    return values


class Throughput:
    """Pairs, tokens and FLOPs per second of updates alone: `paused` blocks do not count."""

    def __init__(self, size: ModelSize, device: torch.device, policy: Policy):
        self.size, self.device, self.policy = size, device, policy
        self.compiled_layers: int | None = None  # as of the last read
        self._reset()

    def _reset(self) -> None:
        self.began, self.done = time.perf_counter(), np.zeros(3)  # done: pairs, unique tokens, FLOPs

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block the clock stands; what the device still has to do of the updates before belongs to them."""
        if self.done.any():
            wait(self.device)
        stopped = time.perf_counter()
        yield
        self.began += time.perf_counter() - stopped

    def count(self, plan: StepPlan) -> None:
        """One step of all ranks together."""
        self.done += plan.pairs, plan.unique_tokens, self.size.step_flops(*plan.lengths)

    def read(self) -> dict[str, float]:
        """The perf/ metrics since the last read; call it where the device has just been waited for."""
        rates = self.done / (time.perf_counter() - self.began)
        self._reset()
        names = ("pairs_per_second", "tokens_per_second", "mfu")
        values = performance(dict(zip(names, rates.tolist(), strict=True)), self.device, dist.world_size())
        return values | {"perf/compiled_layers": self._compiled_layers()}

    def _compiled_layers(self) -> int:
        """How many layers ran compiled in the last forward pass; printed by a run that compiles where it has changed."""
        compiled, of = self.policy.compiled_layers, self.size.layers
        if self.policy.compile_tiles and compiled != self.compiled_layers and dist.is_main():
            why = "" if compiled == of else "; TORCH_LOGS=graph_breaks,recompiles says why the others do not"
            print(f"compile: {compiled} of {of} layers run compiled{why}", flush=True)
        self.compiled_layers = compiled
        return compiled
