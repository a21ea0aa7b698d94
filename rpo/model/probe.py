"""What is verified of a model at load, on the model itself: its log-probs, its causality, packed rows, and its noise floor.

Letters: B rows, T tokens of a row, N scored tokens, V vocabulary, S responses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from rpo.data.batch import Batch, longest, make_batch, packed_batch, padded_batch
from rpo.data.dataset import Rows
from rpo.errors import UserError
from rpo.model import shard
from rpo.model.policy import Policy
from rpo.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@torch.no_grad()
def probe(lm: PreTrainedModel, *, key: str) -> None:
    """Raises UserError unless our log-probs equal the model's own on a short input, and the model is causal.

    A head with a scale, cap or projection that `head_of` does not know would otherwise train silently on other
    numbers (a skipped soft-cap is off by 4e-5 on a tiny random Gemma 2; Cohere's scale by 1.2). The comparison is of
    the same fp32 weights, so only rounding is allowed: 1e-5 of the largest logit.
    """
    lm.eval()
    if lm.base_model is lm:  # Llama 4
        raise UserError(f"{key}: {type(lm).__name__} names no backbone to take hidden states from")
    vocab_size = lm.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    input_ids_BT = torch.randint(vocab_size, (2, 16), generator=generator)
    source_N = torch.cat([torch.arange(15), 16 + torch.arange(15)])
    target_N = input_ids_BT[:, 1:].flatten()
    batch = Batch(input_ids_BT, source_N, target_N, torch.tensor([15, 15]), num_pairs=1, weight=1.0)

    before = _state(lm)
    try:
        logps_N = Policy(lm, compile_tiles=False)(batch)
    except (RuntimeError, TypeError, AttributeError) as error:  # of a head on other than the last hidden states
        what = f"{type(lm).__name__} has a head that rpo does not compute ({first_line(error)})"
        raise UserError(f"{key}: {what}") from None
    logits_BTV = lm(input_ids=input_ids_BT, use_cache=False).logits
    if changed := [name for name, value in _state(lm).items() if before.get(name) != value]:
        raise UserError(
            f"{key}: {type(lm).__name__} changes {changed[0]} whenever it computes, in eval mode too, so what is trained "
            "would not be what is saved; it cannot be trained here"
        )
    if not logits_BTV.isfinite().all():
        broken = [name for name, weight in lm.state_dict().items() if not weight.isfinite().all()]
        what = f"{broken[0]} has NaN or infinite values" if broken else "its logits are NaN or infinite"
        raise UserError(f"{key}: {what}; give a model whose weights are whole")
    if logits_BTV.shape[-1] != vocab_size:  # Inkling cuts off the padding of its vocabulary
        raise UserError(f"{key}: {type(lm).__name__} has a head that rpo does not compute ({vocab_size} rows)")
    own_N = logits_BTV.log_softmax(-1)[:, :-1].gather(-1, input_ids_BT[:, 1:, None]).flatten()
    error, tolerance = (logps_N - own_N).abs().max().item(), 1e-5 * max(1.0, logits_BTV.abs().max().item())
    if not error <= tolerance:
        again = (lm(input_ids=input_ids_BT, use_cache=False).logits - logits_BTV).abs().max().item()
        random = "gives other logits each time it reads one text, in eval mode too (dropout?)"
        what = "has a head that rpo does not compute" if again <= tolerance else random
        raise UserError(
            f"{key}: our log-probs differ from the model's own by {error:.1e} nats (allowed {tolerance:.0e}); "
            f"{type(lm).__name__} {what}"
        )
    changed_BT = input_ids_BT.clone()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % vocab_size
    changed_BTV = lm(input_ids=changed_BT, use_cache=False).logits
    if not (changed_BTV - logits_BTV)[:, :-1].abs().max().item() <= tolerance:
        raise UserError(f"{key}: {type(lm).__name__} is not causal: a later token changes earlier predictions")


def _state(lm: PreTrainedModel) -> dict[str, tuple]:
    """Each parameter's and buffer's shape and sum of bits, which nearly every change of a value changes."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = [*lm.named_parameters(), *lm.named_buffers()]
    return {
        name: (t.shape, t.detach().contiguous().view(integer[t.element_size()]).sum().item()) for name, t in tensors
    }


@torch.no_grad()
def why_not_packed(lm: PreTrainedModel, longest: int) -> str | None:
    """Why `lm` cannot be trained on packed rows; None where two pairs, packed, score as they do padded.

    A probe and not a list: Falcon ignores the attention interface with only a log line (off by .09 nats), StableLM
    drops the arguments that describe the pairs, recurrent layers carry chosen into rejected. `longest` is the longest text of
    the run (P + max(C, R)): the model's sliding window must not be shorter.
    """
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])  # Mistral's window is in every layer
    if other := kinds - {"full_attention", "sliding_attention"}:
        return f"it has {', '.join(sorted(other))} layers"
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds and window is not None and window < longest:  # PhiMoE does not tell `attend`
        return f"a layer sees {window} tokens back, the longest text has {longest}"
    ids = torch.randint(config.vocab_size, (40,), generator=torch.Generator().manual_seed(0)).numpy()
    rows = Rows.of([np.split(ids[:23], [6, 15]), np.split(ids[23:], [9, 11])], "probe")
    policy, both = Policy(lm, compile_tiles=False), np.arange(2)
    padded_N = policy(padded_batch(rows, both))
    batch = packed_batch(rows, both)
    try:
        packed_N = policy(replace(batch, segments=replace(batch.segments, reach=longest)))
    except UserError as error:
        return str(error)
    except Exception as error:  # what cannot take the positions or the pairs says so in its own way
        return f"its code does not pass on which pair a token belongs to ({first_line(error)})"
    finally:
        policy._attend_by(policy._own_attention)
    error, allowed = (packed_N - padded_N).abs().max().item(), 1e-5 * max(1.0, padded_N.abs().max().item())
    return None if error <= allowed else f"packed and padded differ by {error:.0e} nats"


def rotary(config: PreTrainedConfig) -> list[dict]:
    """The parameters of a model's rotary angles: one set, or one for each kind of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [own for own in rope.values() if isinstance(own, dict)]


def border(config: PreTrainedConfig) -> int:
    """Tokens beyond which a text changes the rotary angles of all texts in its batch (longrope, dynamic)."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    jumps = [rope for rope in rotary(config) if rope.get("rope_type") in ("longrope", "dynamic")]
    return min(
        [rope.get("original_max_position_embeddings") or own or sys.maxsize for rope in jumps], default=sys.maxsize
    )


# Nats per token that rounding may always explain, however few bits moved in a measurement: 8 ulps of the log-probs; in
# bfloat16 1/16 ulp of what enters the head.
LEAST_NOISE = {torch.float64: 2**-49, torch.float32: 2**-20, torch.bfloat16: 2**-11}


@torch.no_grad()
def noise_floor(
    policy: Policy, rows: Rows, indices: np.ndarray, device: torch.device, *, positions: int, compute_dtype: torch.dtype
) -> float:
    """Nats per scored token by which one text's log-probs move with padding and batch make-up alone.

    The mean |difference| over the scored tokens of `indices`, scored in one batch and again one pair at a time with
    17 more columns of padding (fewer where the model's `positions` end, or its angles change), and at least LEAST_NOISE.
    What "equal" means on these weights, in this dtype, on this device.
    """
    together_S = _responses(policy, padded_batch(rows, indices).to(device))
    extra = max(0, min(17, min(positions, border(policy.lm.config)) - longest(rows)))
    alone = [padded_batch(rows, indices[i : i + 1], extra=extra).to(device) for i in range(len(indices))]
    apart = [_responses(policy, batch) for batch in alone]
    apart_S = [pair[side] for side in range(len(apart[0])) for pair in apart]
    return max((torch.cat(together_S) - torch.cat(apart_S)).abs().mean().item(), LEAST_NOISE[compute_dtype])


def _responses(policy: Policy, batch: Batch) -> list[Tensor]:
    return list(policy(batch).split(batch.length_S.tolist()))


@torch.no_grad()
def mean_gap(*scored: tuple[Policy, str], rows: Rows, indices: np.ndarray, device: torch.device) -> float:
    """Mean |difference| in nats per scored token of the pairs of `indices`, by two models, each with a layout."""
    one_N, other_N = (policy(make_batch(rows, indices, layout).to(device)) for policy, layout in scored)
    return (one_N - other_N).abs().mean().item()


def gradient_gap(policy: Policy, rows: Rows, indices: np.ndarray, device: torch.device, *, layout: str) -> float:
    """The distance between the gradient as it is trained with and that without activation checkpointing, relative to it.

    Recomputation does not replay a class that changes in place what is kept (Gemma 3n under `selective`: off by half). A
    collective; leaves no gradient behind.
    """

    def gradient() -> list[Tensor]:
        logps_N = policy(make_batch(rows, indices, layout).to(device))
        (logps_N * torch.linspace(-1, 1, len(logps_N), device=device)).sum().backward()
        grads = [
            torch.zeros(()) if p.grad is None else p.grad.to_local() for p in policy.parameters() if p.requires_grad
        ]
        policy.zero_grad()
        return grads

    ours = gradient()
    with shard.not_recomputing(policy):
        exact = gradient()
    squares = [
        torch.stack([(a - b).double().square().sum(), b.double().square().sum()])
        for a, b in zip(ours, exact, strict=True)
    ]
    total = torch.stack([square.to(device) for square in squares]).sum(0)
    torch_dist.all_reduce(total)
    return (total[0] / total[1]).sqrt().item()


@contextmanager
def naming_dtype(policy: Policy) -> Iterator[None]:
    """Within the block what a class raises because it does not compute in model.dtype is a UserError with the way out."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        if policy.compute_dtype not in (torch.bfloat16, torch.float16) or "deterministic" in str(error):
            raise
        name = str(policy.compute_dtype).removeprefix("torch.")
        what = f"{type(policy.lm).__name__} does not compute in it ({first_line(error)})"
        raise UserError(f"model.dtype={name}: {what}; set model.dtype=float32") from None
