"""Linear layers whose frozen weights are stored in four bits (NF4 of QLoRA, arXiv 2305.14314) and computed with in the compute dtype.

bitsandbytes quantises and multiplies: blocks of 64 weights share a scale, 256 scales share another, 4.13 bits a weight. Everything
of it is a buffer here, so that FSDP2 leaves it whole on every rank, in a share of memory that is small beside all else.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rpo.errors import UserError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK, NESTED_BLOCK = 64, 256  # weights under one scale, scales under one: bitsandbytes' own
BYTES = 0.5 + 1 / BLOCK + 4 / BLOCK / NESTED_BLOCK  # of a weight


def check(device: torch.device) -> None:
    """Raises UserError where there is no CUDA device, or no bitsandbytes."""
    require(
        device.type == "cuda",
        f"model.load_in_4bit=true on a {device.type.upper()}: its kernels are CUDA's; set it to false, which trains the same adapter on "
        "the whole base",
    )
    require(
        find_spec("bitsandbytes") is not None,
        "model.load_in_4bit=true: needs bitsandbytes; pip install -e '.[lora,4bit]'",
    )


class Linear4bit(nn.Module):
    """x W' + b with W in four bits; no gradient reaches W.

    `linear` gives W and b; on the meta device it gives their shapes, and the buffers have no data either.
    """

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = compute_dtype
        for name, buffer in _quantised(linear.weight, compute_dtype, device).items():
            self.register_buffer(name, buffer, persistent=False)
        self.bias = linear.bias

    @property
    def _state(self) -> Any:
        from bitsandbytes.functional import QuantState

        nested = QuantState(self.scale_absmax, None, self.scale_code, NESTED_BLOCK, None, torch.float32)
        shape = torch.Size((self.out_features, self.in_features))
        return QuantState(self.absmax, shape, self.code, BLOCK, "nf4", self.compute_dtype, self.offset, nested)

    @property
    def weight(self) -> Tensor:
        """W as it is computed with, made anew each time: for what reads it."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed, self._state)

    def forward(self, x: Tensor) -> Tensor:
        import bitsandbytes

        bias = None if self.bias is None else self.bias.to(x.dtype)
        return bitsandbytes.matmul_4bit(x.to(self.compute_dtype), self.packed.t(), self._state, bias=bias).to(x.dtype)


def _quantised(weight: Tensor, compute_dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    blocks = -(-weight.numel() // BLOCK)
    if weight.is_meta:
        sizes = {
            "packed": ((weight.numel() + 1) // 2, 1),
            "absmax": (blocks,),
            "code": (16,),
            "offset": (),
            "scale_absmax": (-(-blocks // NESTED_BLOCK),),
            "scale_code": (256,),
        }
        dtypes = {"packed": torch.uint8, "absmax": torch.uint8}
        return {
            name: torch.empty(size, dtype=dtypes.get(name, torch.float32), device="meta")
            for name, size in sizes.items()
        }
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.detach().to(device, compute_dtype), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    assert state.state2.blocksize == NESTED_BLOCK, state.state2.blocksize
    return {
        "packed": packed,
        "absmax": state.absmax,
        "code": state.code,
        "offset": state.offset,
        "scale_absmax": state.state2.absmax,
        "scale_code": state.state2.code,
    }


def linears(lm: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers that are stored so: all but the head, adapters, and what is trained whole (modules_to_save)."""
    head = lm.get_output_embeddings()
    return {
        path: module
        for path, module in lm.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not any(
            part.startswith("lora_") or part in ("modules_to_save", "original_module") for part in path.split(".")
        )
    }


def others(model: nn.Module) -> dict[str, Tensor]:
    """The buffers by name, save those that hold a base in four bits: they never change, and are made of it anew."""
    own = {id(buffer) for module in model.modules() if isinstance(module, Linear4bit) for buffer in module.buffers()}
    return {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in own}


@torch.no_grad()
def quantise(lm: PreTrainedModel, compute_dtype: torch.dtype, device: torch.device) -> None:
    """Puts `lm`'s base, which has an adapter or is frozen, into four bits, one layer after the other, on `device`.

    Raises UserError for a class without linear layers, and for float64.
    """
    require(
        compute_dtype != torch.float64,
        "model.load_in_4bit=true with model.dtype=float64: there is no such kernel; use bfloat16",
    )
    found = linears(lm)
    if not found:
        raise UserError(f"model.load_in_4bit=true: {type(lm).__name__} has no linear layers; set it to false")
    for path, linear in found.items():
        lm.set_submodule(path, Linear4bit(linear, compute_dtype, device))
