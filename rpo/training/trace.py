"""What a model is made of, and what its trunk keeps and needs per token, by its own code on tensors without data.

Nothing is computed and no weight is read: tensors have shapes only (torch's FakeTensorMode), so a 70B model takes seconds
on a laptop. What is summed up is the size of every storage that an operator makes, until it is freed.

Letters: N scored tokens, D model width; P, C, R are a pair's token counts.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rpo.config import NO_ADAPTER, Lora
from rpo.data.batch import make_batch
from rpo.data.dataset import Rows
from rpo.errors import UserError
from rpo.model import attention, four_bit, lora, shard
from rpo.model.policy import Policy, layers_of


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    all: int
    layer: int  # the largest decoder layer
    root: int  # what is in no layer: embedding, final norm, head
    vocabulary: int
    width: int
    tied: bool  # embedding and head are one
    layers: int  # how many
    trained: "Sizes | None" = None  # the part that gets gradients, where that is not all: an adapter
    four_bit: int = 0  # those of `all` that are stored in four bits
    four_bit_layer: int = 0  # of the largest decoder layer
    largest: int = 0  # of one of their matrices


@dataclass(frozen=True)
class Trace:
    """Bytes per token of a micro-batch, in the trunk; no weights and no gradients of weights among them."""

    kept: float  # alive between forward and backward
    products: float  # those of them that a matrix product or attention has read or written
    working: float  # the most that the backward pass has beyond `kept`
    scored: float  # tokens, not bytes: the share that enters the head


class _Alive(TorchDispatchMode):
    """Sums the bytes of the storages that operators make within the block, and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.size: dict[int, int] = {}
        self.in_products: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, op: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = op(*args, **(kwargs or {}))
        read, made = ([x.untyped_storage() for x in tree_leaves(t) if isinstance(x, Tensor)] for t in (args, out))
        there = {storage._cdata for storage in read}
        for storage in made:
            if (key := storage._cdata) not in self.size and key not in there:  # else a view, or written in place
                self.size[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        if op in shard.products():
            self.in_products |= there | {storage._cdata for storage in made}
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int) -> None:
        self.now -= self.size.pop(key)
        self.in_products.discard(key)


def _skeleton(model: PreTrainedConfig, dtype: torch.dtype, adapter: Lora, *, flex: bool = False) -> PreTrainedModel:
    own = type(model).from_dict(model.to_dict())  # a forward pass writes its kind of attention into the config
    own.pad_token_id = None  # or GPT-2 looks whether there is padding in what has no data
    if flex:  # it keeps with a soft-cap what varlen keeps without
        own.get_text_config().attn_logit_softcapping = None
    attention.register()
    lm = AutoModelForCausalLM.from_config(own, dtype=dtype, trust_remote_code=False).eval()
    if lm.config._attn_implementation == "sdpa":  # which would be given a mask where positions cannot be looked at
        lm.config._attn_implementation = attention.UNMASKED
    if adapter.r is not None:
        with (
            unset_fake_temporarily(),
            torch.device("meta"),
        ):  # PEFT moves what it makes, which torch's fake tensors cannot
            lora.inject(lm, adapter)
        for name, param in lora.named(lm):
            path, _, own = name.rpartition(".")
            lm.get_submodule(path).register_parameter(own, torch.nn.Parameter(torch.empty(param.shape, dtype=dtype)))
    return lm


@contextmanager
def _without_data(model: PreTrainedConfig) -> Iterator[None]:
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    except UserError:
        raise
    except Exception as error:  # each model's code fails in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"model: {model.model_type} of these sizes does not run on tensors without data ({reason})"
        ) from None


def sizes(model: PreTrainedConfig, adapter: Lora = NO_ADAPTER, *, load_in_4bit: bool = False) -> Sizes:
    """What the decoder layers of `model` have, and what is outside of them. Raises UserError as `trace` does."""
    with _without_data(model):
        lm = _skeleton(model, torch.float32, adapter)
    head = lm.get_output_embeddings().weight
    tied = head is lm.get_input_embeddings().weight

    def counted(least: bool, vocabulary: int, trained: Sizes | None = None) -> Sizes:
        layers = [sum(p.numel() for p in layer.parameters() if p.requires_grad >= least) for layer in layers_of(lm)]
        total = sum(p.numel() for p in lm.parameters() if p.requires_grad >= least)
        return Sizes(total, max(layers), total - sum(layers), vocabulary, head.shape[1], tied, len(layers), trained)

    trained = counted(True, head.shape[0] * head.requires_grad) if adapter.r is not None else None
    whole = counted(False, head.shape[0], trained)
    if not load_in_4bit:
        return whole
    found = {path: linear.weight.numel() for path, linear in four_bit.linears(lm).items()}
    layers = [
        sum(found[path] for path in found if lm.get_submodule(path) in set(layer.modules())) for layer in layers_of(lm)
    ]
    return replace(whole, four_bit=sum(found.values()), four_bit_layer=max(layers), largest=max(found.values()))


def trace(
    model: PreTrainedConfig,
    checkpointing: str,
    *,
    lengths: tuple[tuple[int, int, int], ...],
    layout: str,
    device: str,
    dtype: torch.dtype,
    adapter: Lora = NO_ADAPTER,
) -> Trace:
    """The eager trunk on one micro-batch of pairs with these `lengths`, (P, C, R) each.

    CUDA's packed attention is traced as varlen, its padded one as the CPU's flash attention, which keeps the same tensors.
    Raises UserError where the model's code needs to look at data.
    """
    rows = Rows.of([[np.zeros(length, np.int32) for length in pair] for pair in lengths], "trace")
    batch = make_batch(rows, np.arange(len(lengths)), layout)
    with _without_data(model):
        lm = _skeleton(model, dtype, adapter, flex=device == "cuda" and layout == "packed")
        policy = Policy(lm, compile_tiles=False, attention="varlen" if device == "cuda" else "sdpa")
        layers = layers_of(lm)
        for i, layer in enumerate(layers):
            layers[i] = layer if checkpointing == "none" else shard.checkpointed(layer, checkpointing)
        for param in filter(
            lambda param: param.requires_grad, lm.parameters()
        ):  # FSDP takes them away: `moments` counts them
            param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
        with _Alive() as alive:
            hidden_ND = policy._hidden(batch)
            kept, alive.peak = alive.now, alive.now
            products = sum(alive.size.get(key, 0) for key in alive.in_products)
            hidden_ND.backward(torch.ones_like(hidden_ND))
    tokens = batch.input_ids_BT.numel()
    return Trace(kept / tokens, products / tokens, (alive.peak - kept) / tokens, len(hidden_ND) / tokens)
