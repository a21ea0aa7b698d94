"""Attention over packed rows: several pairs in one row, each laid out once as [prompt | chosen | rejected].

A pair is two segments: prompt + chosen, causal; and rejected, whose queries see the prompt and themselves but nothing of
chosen. `sdpa` computes that segment by segment on any device: it is the twin that the two CUDA forms are held to.

Letters: H heads, T tokens of the row, D width of a head, S segments, K keys (a prompt's stand there twice), Q queries.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rpo.data.batch import Segments, segments_of
from rpo.errors import UserError

PACKED = "rpo_packed"  # under which transformers knows `attend`
VARLEN_OPTIONS: set[str] = set()  # what this torch's varlen_attn takes; filled by `register`
UNMASKED = "rpo_unmasked"  # the library's sdpa, under a name that it makes no mask for


@functools.cache
def register() -> None:
    """Makes `attend` and the unmasked sdpa known to transformers; whoever runs a model calls it first.

    Not on import: transformers and torch.compile take seconds to load.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    AttentionInterface.register(PACKED, attend)
    AttentionInterface.register(UNMASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])
    from torch.nn.attention import varlen

    VARLEN_OPTIONS.update(inspect.signature(varlen.varlen_attn).parameters)
    BACKENDS["sdpa"] = torch.compiler.disable(sdpa)  # it is a loop over the pairs: a graph of it would fit one row only


# ---- three ways to compute it: query_1HTD, key_1HTD, value_1HTD -> out_1HTD; key and value may have fewer heads


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, softcap: float | None
) -> Tensor:
    """Segment by segment, by torch's scaled_dot_product_attention (written out where there is a soft-cap)."""
    sizes = [size for p, c, r in segments.lengths for size in (p + c, r)]
    query_S, key_S, value_S = (x.split(sizes, dim=2) for x in (query, key, value))
    out = []
    for i, (prompt, _, rejected) in enumerate(segments.lengths):
        first, second = 2 * i, 2 * i + 1
        out.append(_one(query_S[first], key_S[first], value_S[first], None, scale, softcap))
        if rejected:
            key_1HKD, value_1HKD = (torch.cat([x[first][:, :, :prompt], x[second]], dim=2) for x in (key_S, value_S))
            mask_QK = torch.ones(rejected, prompt + rejected, dtype=torch.bool, device=query.device).tril(prompt)
            out.append(_one(query_S[second], key_1HKD, value_1HKD, mask_QK, scale, softcap))
    return torch.cat(out, dim=2)


def _one(
    query: Tensor, key: Tensor, value: Tensor, mask_QK: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """One segment; a mask of None is causal."""
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        causal = {"attn_mask": mask_QK, "is_causal": mask_QK is None}
        return F.scaled_dot_product_attention(query, key, value, **causal, scale=scale, enable_gqa=grouped)
    if grouped:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    if mask_QK is None:
        mask_QK = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores_1HQK = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    scores_1HQK = scores_1HQK.masked_fill(~mask_QK, -torch.inf)
    wide = torch.promote_types(query.dtype, torch.float32)
    return scores_1HQK.softmax(-1, dtype=wide).to(query.dtype) @ value


def flash(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, softcap: float | None
) -> Tensor:
    """All segments in one call of FlashAttention: the queries as they stand, the keys of each prompt gathered twice.

    Causal with fewer queries than keys means aligned at the end, which torch leaves undocumented: `choose` measures it.
    """
    from torch.nn.attention import varlen

    assert softcap is None, softcap
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    options = {"window_size": (-1, 0)} if "window_size" in VARLEN_OPTIONS else {"is_causal": True}
    if "scale" in VARLEN_OPTIONS:  # torch 2.11 and 2.12 lack some of these
        options["scale"] = scale
    else:
        query_THD = query_THD * (scale * query.shape[-1] ** 0.5)
    if "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = True
    else:
        key_THD, value_THD = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key_THD, value_THD))
    key_KHD, value_KHD = (x.index_select(0, segments.key_K) for x in (key_THD, value_THD))
    starts = (segments.query_starts_S, segments.key_starts_S, segments.most_queries, segments.reach)
    return varlen.varlen_attn(query_THD, key_KHD, value_KHD, *starts, **options).transpose(0, 1)[None]


def flex(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float, softcap: float | None
) -> Tensor:
    """The whole row by FlexAttention, with a block mask made once per row."""
    options = {"scale": scale, "block_mask": segments.block_mask, "enable_gqa": query.shape[1] != key.shape[1]}
    if softcap is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        cap = torch.full((), softcap, dtype=wide, device=query.device)  # a plain number breaks its lowering
        options["score_mod"] = lambda score, *_: cap * torch.tanh(score / cap)
    return _compiled_flex()(query, key, value, **options)


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)  # or every new length would cost 15 s


BACKENDS = {"varlen": flash, "flex": flex, "sdpa": sdpa}  # the order in which `auto` tries them on CUDA


def attend(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,  # always: who sees whom is in `segments`
    *,
    segments: Segments,
    backend: str,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer of a packed forward pass: (1, T, H, D), as its attention interface wants."""
    if sliding_window is not None and sliding_window < segments.reach:
        raise UserError(f"a layer sees {sliding_window} tokens back, the longest text has {segments.reach}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_1HTD = BACKENDS[backend](query, key, value, segments, scale=scale, softcap=softcap)
    return out_1HTD.transpose(1, 2).contiguous(), None


# ---- which one


def choose(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    softcap: float | None = None,
    heads: tuple[int, int, int] = (4, 2, 64),
) -> str:
    """The backend for packed rows on this device: `wanted`, or for "auto" the fastest that computes the right thing here.

    `heads` are the model's: of queries, of keys, and the width of each.
    Raises UserError where `wanted` cannot run here, or differs from `sdpa` on a ragged example.
    """
    if device.type == "cuda":
        register()  # which backends are tried here
    if wanted != "auto":
        if reason := _refusal(wanted, device, dtype, softcap, heads):
            raise UserError(f"layout.attention={wanted}: {reason}; use layout.attention=auto")
        return wanted
    for name in BACKENDS:
        if not (reason := _refusal(name, device, dtype, softcap, heads)):
            return name
        if device.type == "cuda":  # on a CPU there is nothing to be missed
            warnings.warn(f"packed rows do without {name} attention: it {reason}", stacklevel=2)
    raise AssertionError("sdpa is never refused")


@functools.cache
def _refusal(
    name: str, device: torch.device, dtype: torch.dtype, softcap: float | None, heads: tuple[int, int, int]
) -> str | None:
    """Why a backend is not to be used here; None where it is right."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, this one is {device.type}"
    if name == "varlen" and softcap is not None:
        return f"has no soft-cap, and the model's attention caps its scores at {softcap}"
    if name == "varlen" and dtype.itemsize != 2:
        return f"computes in half types only, this run in {dtype}"
    try:
        error = deviation(name, device, dtype, softcap, heads)
    except Exception as failure:  # a kernel that is not built for this card says so in its own way
        return f"fails on this device ({str(failure).strip().splitlines()[0]})"
    allowed = 1e-2 if dtype.itemsize == 2 else 1e-4
    return None if error <= allowed else f"differs from plain attention by {error:.0e} on this device"


def deviation(
    name: str, device: torch.device, dtype: torch.dtype, softcap: float | None, heads: tuple[int, int, int] = (4, 2, 64)
) -> float:
    """Largest relative L2 distance of a backend's output and three gradients from `sdpa`'s in fp32 or wider."""
    segments = segments_of(np.array([(37, 61, 5), (1, 1, 1), (130, 3, 200), (16, 128, 0)])).to(device)
    generator = torch.Generator().manual_seed(0)
    num_queries, num_keys, width = heads
    shapes = [(1, num, len(segments.pair_T), width) for num in (num_queries, num_keys, num_keys, num_queries)]
    *inputs, upstream = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    results = []
    for function, wide in ((BACKENDS[name], dtype), (sdpa, torch.promote_types(dtype, torch.float32))):
        leaves = [x.detach().to(wide).requires_grad_() for x in inputs]
        out = function(*leaves, segments, scale=width**-0.5, softcap=softcap)
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(wide))])
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))
