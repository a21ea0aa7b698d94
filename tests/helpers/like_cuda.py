"""CUDA's code paths on a CPU: an exact kernel under torch's own varlen operator, and compiled layers without Inductor."""

import functools

import torch
from torch import nn
from torch.nn.attention import varlen

from rpo.model import attention, logprobs

CALLS = {"forward": 0, "backward": 0}  # of the varlen kernels


def _segments(starts_q, starts_k):
    return zip(*(x[i : len(x) - 1 + i].tolist() for x in (starts_q, starts_k) for i in (0, 1)), strict=True)


def _wide(x, heads):
    """(T, H, D) in fp32 or wider, its heads repeated to as many as the queries have."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).repeat_interleave(heads // x.shape[1], dim=1)


def _scores(q, k, scale):
    """scores_HQK, causal and aligned at the end, as FlashAttention 2 does."""
    hidden_QK = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    return (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(hidden_QK, -torch.inf)


def forward(query, key, value, starts_q, starts_k, most_q, most_k, is_causal=False, scale=None, window=None, *_):
    CALLS["forward"] += 1
    assert starts_q.dtype == starts_k.dtype == torch.int32 and (is_causal or list(window) == [-1, 0])
    assert (starts_q[-1], starts_k[-1]) == (len(query), len(key))
    assert int(starts_q.diff().max()) <= most_q and int(starts_k.diff().max()) <= most_k
    heads, scale = query.shape[1], query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (_wide(x, heads) for x in (query, key, value))
    out, lse = torch.empty_like(q), q.new_empty(heads, len(q))
    for q0, q1, k0, k1 in _segments(starts_q, starts_k):
        scores_HQK = _scores(q[q0:q1], k[k0:k1], scale)
        lse[:, q0:q1] = scores_HQK.logsumexp(-1)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", scores_HQK.softmax(-1), v[k0:k1])
    return out.to(query.dtype), lse, torch.zeros(2, dtype=torch.uint64)


def backward(
    upstream, query, key, value, out, lse, starts_q, starts_k, _most_q, _most_k, _causal, _rng, scale=None, *_
):
    CALLS["backward"] += 1
    heads, scale = query.shape[1], query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, o, do = (_wide(x, heads) for x in (query, key, value, out, upstream))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for q0, q1, k0, k1 in _segments(starts_q, starts_k):
        p = (_scores(q[q0:q1], k[k0:k1], scale) - lse[:, q0:q1, None]).exp()
        dp = torch.einsum("qhd,khd->hqk", do[q0:q1], v[k0:k1])
        ds = p * (dp - torch.einsum("qhd,qhd->hq", do[q0:q1], o[q0:q1])[..., None]) * scale
        dq[q0:q1] = torch.einsum("hqk,khd->qhd", ds, k[k0:k1])
        dk[k0:k1] = torch.einsum("hqk,qhd->khd", ds, q[q0:q1])
        dv[k0:k1] = torch.einsum("hqk,qhd->khd", p, do[q0:q1])
    whole = (dq, *(x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (dk, dv)))
    return tuple(x.to(like.dtype) for x, like in zip(whole, (query, key, value), strict=True))


@functools.cache
def _register():
    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)


def admit(monkeypatch, backend):
    """Has `attention.choose` take `backend` (varlen or flex) on this CPU, where "auto" asks for the fastest."""
    _register()
    CALLS.update(forward=0, backward=0)

    def refusal(name, _device, _dtype, softcap, _heads):
        return None if name in (backend, "sdpa") and (name != "varlen" or softcap is None) else "is not tested"

    monkeypatch.setattr(attention, "_refusal", refusal)


def compile_by(monkeypatch, backend):
    """Has layers compile by `backend` and tiles not at all."""
    monkeypatch.setattr(logprobs, "_compiled", lambda function: function)
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
