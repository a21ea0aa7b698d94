"""Sampled answers: prompts in, token ids out, every sampling parameter said out loud."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as torch_dist

from rpo import dist
from rpo.model import shard
from rpo.model.policy import Policy

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; top_p 1 and top_k 0 are off."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """`ids` without padding; the stop token is their last where `ended`, else the answer was cut at max_new_tokens."""

    ids: list[int]
    ended: bool

    @property
    def text_ids(self) -> list[int]:
        """The ids without the stop token."""
        return self.ids[:-1] if self.ended else self.ids


def _config(sampling: Sampling, stop_ids: list[int]) -> GenerationConfig:
    from transformers import GenerationConfig

    # The library's defaults are top-50 and whatever the model's generation config says; nothing here is left to them.
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        do_sample=sampling.temperature > 0,
        **(sampled if sampling.temperature > 0 else {}),
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
    )


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    stop_ids: list[int],
    *,
    device: torch.device,
    seed: list[int],
    batch_size: int,
    reshard: bool,
    first: int = 0,
) -> list[Completion]:
    """One completion per prompt (token ids), in order, the same on every rank.

    Prompts are cut into batches of `batch_size`, each sampled with a seed of its own (`seed` and its number, from
    `first` on: a caller may sample batches in several calls), and dealt to the ranks: so the samples do not depend on the world size beyond rounding, and the caller's random
    state is left alone. A collective: every rank calls it with the same arguments; `reshard` is the policy's
    fsdp.reshard_after_forward.
    """
    starts = list(range(0, len(prompts), batch_size))
    config, world = _config(sampling, stop_ids), dist.world_size()
    mine: dict[int, list[Completion]] = {}
    with shard.gathered(policy, reshard_after_forward=reshard):
        for turn in range(0, len(starts), world):  # FSDP gathers in step: every rank takes as many turns
            number = min(turn + dist.rank(), len(starts) - 1)
            chosen = prompts[starts[number] : starts[number] + batch_size]
            mine[number] = _sample_batch(policy, chosen, config, stop_ids, device, [*seed, first + number])
    gathered: list[dict[int, list[Completion]]] = [{}] * world
    torch_dist.all_gather_object(gathered, mine)
    by_number = {number: batch for share in gathered for number, batch in share.items()}
    return [completion for number in range(len(starts)) for completion in by_number[number]]


def _sample_batch(
    policy: Policy,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    stop_ids: list[int],
    device: torch.device,
    seed: list[int],
) -> list[Completion]:
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]  # on the left: every row's next token stands last
    input_ids_BT = torch.tensor([[stop_ids[0]] * pad + list(p) for pad, p in zip(padding, prompts, strict=True)])
    mask_BT = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
        output_BT = policy.generate(
            generation_config=config,
            input_ids=input_ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            synced_gpus=dist.world_size() > 1,  # a rank that is done keeps calling, or the others would wait for it
        )
    completions = []
    for ids in output_BT[:, width:].tolist():
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        completions.append(Completion(ids if end is None else ids[: end + 1], end is not None))
    return completions
