"""Log-probabilities of given tokens from hidden states and an output head, without an N x V matrix; their sums.

Shapes: N scored tokens, S responses, D model width, V vocabulary entries; inside the tiled code N and V also stand for the
rows and columns of one tile. Half means bfloat16 or float16.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of up to so many bytes are kept for the backward pass instead of being recomputed.
KEPT = {"cuda": 2**29, "cpu": 2**27}
# (tile_N, tile_V). CUDA: the fp32 accumulators cross memory once per tile, which from 4096 on is a few per cent of the
# tile's GEMM. CPU: the fastest of eight at N=1024, D=512, V=32000, one thread.
TILES = {"cuda": (4096, 8192), "cpu": (1024, 1024)}


def response_sums(logps_N: Tensor, length_S: Tensor) -> Tensor:
    """Each response's summed log-prob, in float64.

    A segmented sum, not index_add: the order of additions is fixed, on CUDA too. In float64 up to the margin, because the
    sums of a thousand tokens, under policy and reference, are subtracted from each other: rounded to fp32 before, margins
    of an update's size have the wrong sign in a quarter of real pairs.
    """
    return torch.segment_reduce(logps_N.double(), "sum", lengths=length_S, unsafe=True)


def full_logits(
    hidden_ND: Tensor,
    head_VD: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """logits_NV = cap(scale * (hidden @ head^T + bias)), in fp32 (float64 stays float64; half inputs are upcast first).

    cap(x) = softcap * tanh(x / softcap), or x where softcap is None.
    """
    bias_V = None if bias_V is None else bias_V.to(_wide_dtype(hidden_ND))
    logits_NV = F.linear(_wide(hidden_ND), _wide(head_VD), bias_V)
    if scale != 1.0:
        logits_NV = logits_NV * scale
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def token_logps_naive(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, **head: Any) -> Tensor:
    """log softmax(full_logits(hidden, head))[target] in nats: the specification of `token_logps`.

    `head` takes bias_V, scale and softcap. Holds several N x V matrices.
    """
    return -F.cross_entropy(full_logits(hidden_ND, head_VD, **head), target_N, reduction="none")


def token_logps(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    tile_N: int | None = None,
    tile_V: int | None = None,
    keep: int | None = None,
    compile: bool = False,
) -> Tensor:
    """Log-probabilities (N,) in nats of `target_N`; fp32, or float64 for float64 inputs.

    Same function as `token_logps_naive` (and that very code where N x V is under a quarter of a tile), by an online
    log-sum-exp over tiles of N x V. The backward pass recomputes the tiles, 8NDV FLOPs instead of 6NDV, unless all of
    them together have at most `keep` bytes. Otherwise, beyond inputs and gradients at most two tile_N x tile_V fp32
    tiles are alive; half inputs add fp32 accumulators (N x D and tile_V x D) and, on CPU, which has no half GEMM with an
    fp32 result, upcast operands of the same sizes.

    hidden_ND and head_VD share dtype and device; target_N is int64, bias_V any float. Every token may have its own
    upstream gradient of either sign; hidden, head and bias get gradients in their own dtype, summed in fp32, and only
    those that need one are computed. No double backward. `scale` and `softcap` are constants, not differentiated.
    `compile` fuses the tile arithmetic (not the GEMMs) by torch.compile. Nothing synchronises with the device, so a
    target outside [0, V) is a RuntimeError on CPU but a device-side assertion, reported later, on CUDA.
    """
    assert hidden_ND.dtype == head_VD.dtype, (hidden_ND.dtype, head_VD.dtype)
    torch._assert_async(((target_N >= 0) & (target_N < len(head_VD))).all(), "target_N outside [0, V)")
    bias_V = None if bias_V is None else bias_V.to(_wide_dtype(hidden_ND))
    default_N, default_V = TILES[hidden_ND.device.type]
    tile_V = tile_V or min(default_V, len(head_VD))
    tile_N = tile_N or default_N * default_V // tile_V  # a small vocabulary's tiles are as large, so as few
    if 4 * len(target_N) * len(head_VD) <= tile_N * tile_V and not _is_half(hidden_ND):
        # A toy's few N x V matrices fit in our tiles, and without the recompute it takes half the time.
        return token_logps_naive(hidden_ND, head_VD, target_N, bias_V=bias_V, scale=scale, softcap=softcap)
    keep = KEPT[hidden_ND.device.type] if keep is None else keep
    kept = torch.is_grad_enabled() and len(target_N) * len(head_VD) * _wide_dtype(hidden_ND).itemsize <= keep
    return _TokenLogps.apply(hidden_ND, head_VD, bias_V, target_N, scale, softcap, tile_N, tile_V, kept, compile)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, bias_V, target_N, scale, softcap, tile_N, tile_V, keep, compile):
        fold = _compiled(_fold) if compile else _fold
        hidden = _operand(hidden_ND)
        target_logit_N = hidden_ND.new_zeros(len(target_N), dtype=_wide_dtype(hidden_ND))
        # The running maximum starts finite: -inf - -inf would turn a tile that a bias masks out (-inf) into NaN.
        max_N = torch.full_like(target_logit_N, torch.finfo(target_logit_N.dtype).min)
        sum_N = torch.zeros_like(target_logit_N)
        kept: list[Tensor] = []

        for v in _slices(len(head_VD), tile_V):
            head, bias = _operand(head_VD[v]), None if bias_V is None else bias_V[v]
            for n in _slices(len(target_N), tile_N):
                index_N, before = target_N[n] - v.start, (max_N[n], sum_N[n], target_logit_N[n])
                kept += [_matmul_fp32(hidden[n], head.T)] if keep else []
                max_N[n], sum_N[n], target_logit_N[n] = fold(
                    kept[-1] if keep else _matmul_fp32(hidden[n], head.T), bias, index_N, before, scale, softcap
                )

        ctx.save_for_backward(hidden_ND, head_VD, bias_V, target_N, max_N, sum_N, *kept)
        ctx.settings = scale, softcap, tile_N, tile_V, compile
        # In this order: max + log(sum) would round at the size of the largest logit.
        return (target_logit_N - max_N) - sum_N.log()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        hidden_ND, head_VD, bias_V, target_N, max_N, sum_N, *kept = ctx.saved_tensors
        scale, softcap, tile_N, tile_V, compile = ctx.settings
        need_hidden, need_head, need_bias = ctx.needs_input_grad[:3]
        tile_grad = _compiled(_tile_grad) if compile else _tile_grad
        wide = upstream_N.dtype
        hidden = _operand(hidden_ND)
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=wide) if need_hidden else None
        grad_head_VD = torch.zeros_like(head_VD) if need_head else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if need_bias else None

        # Vocabulary outside: half inputs then need fp32 sums for one block of the head at a time, not for all of it.
        for v in _slices(len(head_VD), tile_V):
            head, bias = _operand(head_VD[v]), None if bias_V is None else bias_V[v]
            sum_VD = grad_head_VD[v].to(wide) if need_head else None  # a view of grad_head_VD where that is wide
            for n in _slices(len(target_N), tile_N):
                index_N, rows = target_N[n] - v.start, (max_N[n], sum_N[n], upstream_N[n])
                grad_NV = tile_grad(
                    kept.pop(0) if kept else _matmul_fp32(hidden[n], head.T),
                    bias,
                    index_N,
                    rows,
                    scale,
                    softcap,
                    head.dtype,
                )
                if need_hidden:
                    _add_matmul_fp32(grad_hidden_ND[n], grad_NV, head)
                if need_head:
                    _add_matmul_fp32(sum_VD, grad_NV.T, hidden[n])
                if need_bias:
                    grad_bias_V[v] += grad_NV.sum(0, dtype=wide)
                del grad_NV  # else it outlives the next tile's GEMM: a third tile
            if need_head and sum_VD.dtype != head_VD.dtype:
                grad_head_VD[v] = sum_VD

        grads = (grad_hidden_ND, hidden_ND), (grad_head_VD, head_VD), (grad_bias_V, bias_V)
        return *(None if grad is None else grad.to(like.dtype) for grad, like in grads), *[None] * 7


def _fold(logits_NV, bias_V, index_N, before, scale, softcap):
    """Running maximum, sum of exp(logit - maximum) and target's logit, after one more tile of raw logits."""
    max_N, sum_N, target_logit_N = before
    logits_NV = _final_logits(logits_NV, bias_V, scale, softcap)
    inside_N, column_N1 = _locate(index_N, logits_NV)
    target_logit_N = torch.where(inside_N, logits_NV.gather(1, column_N1).squeeze(1), target_logit_N)
    new_max_N = torch.maximum(max_N, logits_NV.amax(1))
    tile_sum_N = (logits_NV - new_max_N[:, None]).exp_().sum(1)
    return new_max_N, sum_N * (max_N - new_max_N).exp() + tile_sum_N, target_logit_N


def _tile_grad(logits_NV, bias_V, index_N, rows, scale, softcap, dtype):
    """Gradient of sum(upstream * logp) by a tile of raw logits: upstream (1[target] - softmax) cap'(logit) scale."""
    max_N, sum_N, upstream_N = rows
    logits_NV = _final_logits(logits_NV, bias_V, scale, softcap)
    inside_N, column_N1 = _locate(index_N, logits_NV)
    weight_N1 = (scale * upstream_N)[:, None]
    # The target's column is worked out apart, in fp32, and written over the tile: no N x V mask, and softmax - 1 of a
    # confident token is rounded to half after the subtraction, not before.
    target_logit_N1 = logits_NV.gather(1, column_N1)
    target_softmax_N1 = (target_logit_N1 - max_N[:, None]).exp() / sum_N[:, None]
    target_grad_N1 = weight_N1 * (inside_N[:, None].to(sum_N.dtype) - target_softmax_N1)
    grad_NV = (logits_NV - max_N[:, None]).exp_().mul_(-weight_N1 / sum_N[:, None])
    if softcap is not None:
        target_grad_N1.mul_(_cap_slope_(target_logit_N1, softcap))
        grad_NV.mul_(_cap_slope_(logits_NV, softcap))
    del logits_NV  # before the cast, which would be a third tile
    return grad_NV.to(dtype).scatter_(1, column_N1, target_grad_N1.to(dtype))


def _final_logits(logits_NV, bias_V, scale, softcap):
    """cap(scale * (logits + bias)); the argument itself where there is nothing to do."""
    if bias_V is None and scale == 1.0 and softcap is None:
        return logits_NV
    logits_NV = logits_NV.clone()
    if bias_V is not None:
        logits_NV.add_(bias_V)
    if scale != 1.0:
        logits_NV.mul_(scale)
    if softcap is not None:
        logits_NV.div_(softcap).tanh_().mul_(softcap)
    return logits_NV


def _cap_slope_(capped, softcap):
    """cap'(x) = 1 - (cap(x) / softcap)^2, written over cap(x)."""
    return capped.div_(softcap).square_().neg_().add_(1)


def _locate(index_N, logits_NV):
    """Whether a row's target is in this tile, and a column that may always be read: the target's where it is."""
    width = logits_NV.shape[1]
    return (index_N >= 0) & (index_N < width), index_N.clamp(0, width - 1)[:, None]


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as fp32; float64 stays float64."""
    return torch.mm(a, b, out_dtype=torch.float32) if _is_half(a) else torch.mm(a, b)


def _add_matmul_fp32(sum: Tensor, a: Tensor, b: Tensor) -> None:
    """sum += a @ b, in place, for a wide sum."""
    if _is_half(a):
        torch.addmm(sum, a, b, out_dtype=torch.float32, out=sum)
    else:
        sum.addmm_(a, b)


def _operand(x: Tensor) -> Tensor:
    return x if x.is_cuda else _wide(x)


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _slices(size: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, size)) for start in range(0, size, tile)]
