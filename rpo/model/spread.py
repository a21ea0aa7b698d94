"""A model read by one process for all: rank 0 loads it, the others get its structure, and each its share of the weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as torch_dist
from torch import nn

from rpo import dist
from rpo.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_once(load: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel | None, PreTrainedModel]:
    """(what `load` returns, on rank 0 alone; the model to be sharded, on every rank).

    With one process they are the same. With several the second has no data yet (`fill`): no process but rank 0 ever holds
    the whole. A class whose structure cannot be sent is loaded by every process, with a line. Raises UserError, on all ranks,
    as `load` does.
    """
    if dist.world_size() == 1:
        lm = load()
        return lm, lm
    held: list[PreTrainedModel] = []

    def load_and_check() -> str | None:
        held.extend([lm := load(), _structure(lm)])
        return _why_not_sent(held[1])

    reason, own = dist.on_main(load_and_check), None
    if reason is None:
        try:
            own = dist.broadcast(held[1] if held else None)
        except Exception as error:  # of a module that is not to be imported here
            reason = first_line(error)
    if reason := next(filter(None, dist.together(lambda: reason)), None):
        if dist.is_main():
            print(
                f"{type(held[0]).__name__} cannot be sent to other processes ({reason}); each loads it itself",
                flush=True,
            )
        own = held[0] if held else load()
        return own, own
    return held[0] if held else None, own


def _structure(lm: PreTrainedModel) -> PreTrainedModel:
    """The model without the data of its parameters and buffers, which are on the meta device."""
    memo = {}  # what deepcopy takes for copied already
    for tensor in [*lm.parameters(), *lm.buffers()]:
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(lm, memo)


def _why_not_sent(structure: PreTrainedModel) -> str | None:
    try:
        torch.save(structure, io.BytesIO())
    except Exception as error:  # of a class's own objects: each its own type
        return first_line(error)
    return None


def fill(policy: nn.Module, whole: PreTrainedModel | None, device: str) -> None:
    """Gives the sharded `policy`, which has no data yet, the weights and buffers of rank 0's `whole`, on `device`; a collective.

    One tensor is under way at a time. A policy that has its data is left alone.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if not next(policy.parameters()).is_meta:
        return
    policy.to_empty(device=device)
    state = {f"lm.{name}": tensor for name, tensor in whole.state_dict().items()} if whole is not None else {}
    set_model_state_dict(policy, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in policy.named_buffers():  # those that are in no state dict too, as rotary angles
        if whole is not None:
            buffer.copy_(whole.get_buffer(name.removeprefix("lm.").replace("_checkpoint_wrapped_module.", "")))
        torch_dist.broadcast(buffer, 0)
