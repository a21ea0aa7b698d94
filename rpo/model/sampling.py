"""Sampled answers: prompts in, token ids out, every sampling parameter said out loud."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from rpo import dist
from rpo.model import shard
from rpo.model.policy import Policy

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


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


def with_listed(stop_ids: list[int], lm: PreTrainedModel) -> list[int]:
    """The stop ids, and those that the model's generation config lists: Llama 3, Gemma and GLM-4 end by several."""
    listed = lm.generation_config.eos_token_id if lm.generation_config else None
    return list(dict.fromkeys([*stop_ids, *([listed] if isinstance(listed, int) else listed or [])]))


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

    It ends at one of `stop_ids` or of the model's own. Prompts are cut into batches of `batch_size` (of one length, or of one
    prompt, where a model answers by its neighbours in a batch), each sampled with a seed of its own (`seed` and its
    number, from `first` on: a caller may sample batches in several calls), and dealt to the ranks: so the samples do not
    depend on the world size beyond rounding, and the caller's random state is left alone. A collective: every rank calls
    it with the same arguments; `reshard` is the policy's fsdp.reshard_after_forward.
    """
    stop_ids = with_listed(stop_ids, policy.lm)
    config, world = _config(sampling, stop_ids), dist.world_size()
    mine: dict[int, Completion] = {}
    with shard.gathered(policy, reshard_after_forward=reshard):
        batches = _batches(prompts, batch_size, _neighbours(policy, prompts, stop_ids[0], device))
        for turn in range(0, len(batches), world):  # FSDP gathers in step: every rank takes as many turns
            number = min(turn + dist.rank(), len(batches) - 1)
            chosen = [prompts[i] for i in batches[number]]
            made = _sample_batch(policy, chosen, config, stop_ids, device, [*seed, first + number])
            mine |= dict(zip(batches[number], made, strict=True))
    gathered: list[dict[int, Completion]] = [{}] * world
    torch_dist.all_gather_object(gathered, mine)
    by_prompt = {i: completion for share in gathered for i, completion in share.items()}
    return [by_prompt[i] for i in range(len(prompts))]


def _batches(prompts: Sequence[list[int]], size: int, neighbours: str) -> list[list[int]]:
    """The prompts' numbers in batches whose `_neighbours` change no answer."""
    if neighbours == "none":
        return [[i] for i in range(len(prompts))]
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(len(prompt) if neighbours == "equal" else 0, []).append(i)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _neighbours(policy: Policy, prompts: Sequence[list[int]], pad: int, device: torch.device) -> str:
    """What a prompt's batch may hold beside it: any prompts, those of equal length, or none.

    Measured once per policy, over two steps of the shortest prompt: recurrent classes read padding as text.
    """
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    if policy.neighbours is None and len(prompts) > 1:
        config = _config(Sampling(0, 1, 0, max_new_tokens=2), [pad])
        config.update(min_new_tokens=2, output_logits=True, return_dict_in_generate=True)

        def logits(*others: list[int]) -> Tensor:
            made = _generate(policy, [shortest, *others], config, device)
            return torch.stack([step[0].float() for step in made.logits])

        alone = logits()
        allowed = max(1e-4, 4 * torch.finfo(policy.compute_dtype).eps) * max(1.0, alone.abs().max().item())
        rows = {"any": longest if len(longest) > len(shortest) else [*shortest, pad], "equal": shortest[::-1]}
        gaps = {kind: dist.broadcast((logits(other) - alone).abs().max().item()) for kind, other in rows.items()}
        policy.neighbours = next((kind for kind, gap in gaps.items() if gap <= allowed), "none")
    return policy.neighbours or "any"


def _sample_batch(
    policy: Policy,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    stop_ids: list[int],
    device: torch.device,
    seed: list[int],
) -> list[Completion]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
        output_BT = _generate(policy, prompts, config, device)
    completions = []
    for ids in output_BT[:, max(map(len, prompts)) :].tolist():
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        completions.append(Completion(ids if end is None else ids[: end + 1], end is not None))
    return completions


def _generate(policy: Policy, prompts: Sequence[list[int]], config: GenerationConfig, device: torch.device) -> Any:
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]  # on the left: every row's next token stands last
    input_ids_BT = torch.tensor(
        [[config.pad_token_id] * pad + list(p) for pad, p in zip(padding, prompts, strict=True)]
    )
    mask_BT = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    return policy.generate(
        generation_config=config,
        input_ids=input_ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        synced_gpus=dist.world_size() > 1,  # a rank that is done keeps calling, or the others would wait for it
    )
