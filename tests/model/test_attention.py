"""rpo.model.attention: three ways to compute one masked softmax, and which of them a device is given.

Letters: H heads, T tokens of the row, D width of a head, S segments, K keys, Q queries.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import flex_attention

from rpo.data import batch as data_batch
from rpo.errors import UserError
from rpo.model import attention

# (P, C, R) of a row's pairs: one-token responses, a prompt of one token, a supervised row (R = 0), a pair by itself.
ROWS = {
    "pairs": [(3, 4, 2), (1, 1, 1), (6, 2, 5), (1, 5, 3), (4, 1, 6)],
    "supervised": [(4, 3, 0), (1, 1, 0), (2, 5, 0)],
    "mixed": [(4, 3, 0), (2, 2, 4)],
    "one": [(5, 7, 3)],
}
HEADS = {"own": (4, 4), "grouped": (4, 2), "one": (4, 1)}  # of queries, of keys and values
SCALE, CPU = 0.3, torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def segments_of(lengths):
    return data_batch.segments_of(np.array(lengths))


def make_inputs(lengths, heads, dtype=torch.float64):
    """query, key, value and an upstream gradient, each (1, H, T, 8)."""
    generator, length = torch.Generator().manual_seed(0), int(np.sum(lengths))
    shapes = [(1, h, length, 8) for h in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def dense(query, key, value, lengths, *, scale, softcap):
    """One softmax over the whole row under a mask that is written token by token, head by head."""
    branch = [(pair, part) for pair, (p, c, r) in enumerate(lengths) for part in "p" * p + "c" * c + "r" * r]

    def sees(q, k):
        return k <= q and branch[q][0] == branch[k][0] and (branch[q][1], branch[k][1]) != ("r", "c")

    visible = torch.tensor([[sees(q, k) for k in range(len(branch))] for q in range(len(branch))])
    group = query.shape[1] // key.shape[1]
    heads = []
    for h in range(query.shape[1]):
        scores = scale * query[0, h] @ key[0, h // group].T
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        heads.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value[0, h // group])
    return torch.stack(heads)[None]


def values_and_gradients(function, inputs, where, softcap):
    *leaves, upstream = (x.clone().requires_grad_() for x in inputs)
    out = function(*leaves, where, scale=SCALE, softcap=softcap)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def assert_close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (a - b).norm() <= tolerance * b.norm(), ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("row", ROWS)
def test_sdpa_is_a_masked_softmax(row, heads, softcap):
    """Values and gradients, float64 to 1e-12 and fp32 to 1e-5, of a dense softmax under the written-out mask."""
    inputs = make_inputs(ROWS[row], HEADS[heads])
    expected = values_and_gradients(dense, inputs, ROWS[row], softcap)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        narrow = [x.to(dtype) for x in inputs]
        ours = values_and_gradients(attention.sdpa, narrow, segments_of(ROWS[row]), softcap)
        assert {x.dtype for x in ours} == {dtype}
        assert_close(ours, expected, tolerance)


def slow_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=None, **options):
    """What FlashAttention computes, segment by segment: causal, aligned at the end where queries are fewer than keys."""
    assert window_size == (-1, 0) or options.pop("is_causal", False), "not causal"
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not options.pop("enable_gqa", False):
        assert query.shape[1] == key.shape[1], "fewer heads of keys without enable_gqa"
    assert not options and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    sizes_q, sizes_k = (starts.diff().tolist() for starts in (cu_seq_q, cu_seq_k))
    assert (max(sizes_q), max(sizes_k), sum(sizes_q), sum(sizes_k)) == (max_q, max_k, len(query), len(key))
    group = query.shape[1] // key.shape[1]
    out = []
    for q, k, v in zip(query.split(sizes_q), key.split(sizes_k), value.split(sizes_k), strict=True):
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores_HQK = torch.einsum("qhd,khd->hqk", q, k) * scale
        hidden_QK = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        out.append(torch.einsum("hqk,khd->qhd", scores_HQK.masked_fill(hidden_QK, -torch.inf).softmax(-1), v))
    return torch.cat(out)


# What varlen_attn takes by keyword: torch 2.13 and two older ones.
@pytest.mark.parametrize("options", [("window_size", "scale", "enable_gqa"), ("window_size", "scale"), ("is_causal",)])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("row", ROWS)
def test_flash_gathers_the_right_keys(row, heads, options, monkeypatch):
    """`flash` around a slow varlen_attn equals `sdpa`, values and gradients: its starts, keys and sizes are right."""
    monkeypatch.setattr(varlen, "varlen_attn", slow_varlen)
    monkeypatch.setattr(attention, "VARLEN_OPTIONS", set(options))
    inputs, where = make_inputs(ROWS[row], HEADS[heads]), segments_of(ROWS[row])
    ours, twin = (values_and_gradients(f, inputs, where, None) for f in (attention.flash, attention.sdpa))
    assert_close(ours, twin, 1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("row", ROWS)
def test_flex_hides_the_right_keys(row, softcap, monkeypatch):
    """`flex`, not compiled, has `sdpa`'s values to 1e-12; FlexAttention has no backward on a CPU."""
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    query, key, value, _ = make_inputs(ROWS[row], (4, 2))
    ours, twin = (
        function(query, key, value, segments_of(ROWS[row]), scale=SCALE, softcap=softcap)
        for function in (attention.flex, attention.sdpa)
    )
    assert_close([ours], [twin], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_flex_compiles(softcap):
    """Compiled, over rows of several lengths, it still has `sdpa`'s values, to 1e-5 in fp32."""
    for lengths in ROWS.values():
        query, key, value, _ = make_inputs(lengths, (4, 2), torch.float32)
        how = {"segments": segments_of(lengths), "scale": SCALE, "softcap": softcap}
        ours, twin = (function(query, key, value, **how) for function in (attention.flex, attention.sdpa))
        assert_close([ours], [twin], 1e-5)


def test_segments_by_hand():
    """Pairs (2, 1, 2) and (1, 2, 0): columns 0 to 4 and 5 to 7; three segments, the first prompt's keys twice."""
    segments = segments_of([(2, 1, 2), (1, 2, 0)])
    assert segments.lengths == ((2, 1, 2), (1, 2, 0)) and segments.reach == 4
    assert segments.query_starts_S.tolist() == [0, 3, 5, 8]
    assert segments.key_K.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert segments.key_starts_S.tolist() == [0, 3, 7, 10]
    assert segments.pair_T.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert segments.branch_T.tolist() == [0, 0, 1, 2, 2, 0, 1, 1]


# ---- what transformers calls


def test_attend_defaults(monkeypatch):
    """The interface's (1, T, H, D) by the named backend, with 1/sqrt(D) where the model gives no scale."""
    query, key, value, _ = make_inputs(ROWS["pairs"], (4, 2))
    where = {"segments": segments_of(ROWS["pairs"]), "backend": "sdpa"}
    out_1THD, weights = attention.attend(None, query, key, value, None, **where, dropout=0.0, is_causal=True)
    expected = dense(query, key, value, ROWS["pairs"], scale=8**-0.5, softcap=None)
    assert weights is None and out_1THD.is_contiguous()
    assert_close([out_1THD.transpose(1, 2)], [expected], 1e-12)
    out_1THD, _ = attention.attend(None, query, key, value, attention_mask=None, **where, scaling=0.1, softcap=0.5)
    expected = dense(query, key, value, ROWS["pairs"], scale=0.1, softcap=0.5)
    assert_close([out_1THD.transpose(1, 2)], [expected], 1e-12)


def test_attend_refuses_a_window_shorter_than_the_reach():
    """A layer that would not see the whole of the longest text is an error; one token more and it is computed."""
    query, key, value, _ = make_inputs(ROWS["pairs"], (4, 4))
    where = {"segments": segments_of(ROWS["pairs"]), "backend": "sdpa"}  # the longest texts: 6 + 5 and 4 + 6
    with pytest.raises(ValueError, match="a layer sees 10 tokens back, the longest text has 11"):
        attention.attend(None, query, key, value, None, **where, sliding_window=10)
    seen, _ = attention.attend(None, query, key, value, None, **where, sliding_window=11)
    assert torch.equal(seen, attention.attend(None, query, key, value, None, **where)[0])


# ---- which one


def test_choice_on_a_cpu():
    """auto is sdpa, as is sdpa by name; what needs CUDA is refused with the key, the value and the fix."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert attention.choose("auto", CPU, dtype) == attention.choose("sdpa", CPU, dtype, softcap=50.0) == "sdpa"
    for name in ("varlen", "flex"):
        message = f"layout.attention={name}: needs a CUDA device, this one is cpu; use layout.attention=auto"
        with pytest.raises(UserError, match=f"^{message}$"):
            attention.choose(name, CPU, torch.bfloat16)


@pytest.fixture
def pretended_cuda(monkeypatch):
    """A CUDA device in name, on which each backend is off by so much; `choose` starts with no memory of it."""
    errors = {"varlen": 0.0, "flex": 0.0}

    def deviation(name, *_):
        if isinstance(errors[name], Exception):
            raise errors[name]
        return errors[name]

    monkeypatch.setattr(attention, "deviation", deviation)
    attention._refusal.cache_clear()
    yield errors
    attention._refusal.cache_clear()


@pytest.mark.parametrize(
    ("errors", "dtype", "softcap", "chosen"),
    [
        ({}, torch.bfloat16, None, "varlen"),
        ({}, torch.bfloat16, 50.0, "flex"),
        ({}, torch.float32, None, "flex"),
        ({"varlen": 0.02}, torch.bfloat16, None, "flex"),
        ({"varlen": torch.nan, "flex": 9e-3}, torch.bfloat16, None, "flex"),
        ({"flex": 2e-4}, torch.float32, None, "sdpa"),
        ({"varlen": RuntimeError("no kernel\nfor this"), "flex": 0.02}, torch.bfloat16, None, "sdpa"),
    ],
)
def test_choice_by_measurement(errors, dtype, softcap, chosen, pretended_cuda):
    """On CUDA auto is the first backend that can compute it and agrees: 1e-2 in half types, 1e-4 in fp32."""
    pretended_cuda |= errors
    assert attention.choose("auto", torch.device("cuda"), dtype, softcap) == chosen


@pytest.mark.parametrize(
    ("error", "dtype", "softcap", "reason"),
    [
        (0.0, torch.float32, None, "computes in half types only, this run in torch.float32"),
        (0.0, torch.bfloat16, 50.0, "has no soft-cap, and the model's attention caps its scores at 50.0"),
        (0.02, torch.bfloat16, None, "differs from plain attention by 2e-02 on this device"),
        (RuntimeError("no kernel\nfor this"), torch.bfloat16, None, r"fails on this device \(no kernel\)"),
    ],
)
def test_a_backend_by_name_is_refused_with_its_reason(error, dtype, softcap, reason, pretended_cuda):
    """What was asked for by name and is not right here is one line with the reason and the fix."""
    pretended_cuda["varlen"] = error
    with pytest.raises(UserError, match=f"^layout.attention=varlen: {reason}; use layout.attention=auto$"):
        attention.choose("varlen", torch.device("cuda"), dtype, softcap)


def test_deviation_sees_a_wrong_backend(monkeypatch):
    """`sdpa` against itself is 0; one that lets rejected see chosen, or is right in values alone, is far beyond 1e-2."""

    def peeking(query, key, value, segments, **how):
        joined = tuple((p, c + r, 0) for p, c, r in segments.lengths)
        return attention.sdpa(query, key, value, dataclasses.replace(segments, lengths=joined), **how)

    def without_gradient(query, key, value, segments, **how):
        out = attention.sdpa(query, key, value, segments, **how)
        return out.detach() + 0 * (query.sum() + key.sum() + value.sum())

    for function, least, most in ((attention.sdpa, 0, 0), (peeking, 0.05, 9), (without_gradient, 0.5, 9)):
        monkeypatch.setitem(attention.BACKENDS, "varlen", function)
        assert least <= attention.deviation("varlen", CPU, torch.float32, None) <= most, function


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    ("name", "dtype", "softcap", "tolerance"),
    [
        ("varlen", torch.bfloat16, None, 1e-2),
        ("flex", torch.bfloat16, None, 1e-2),
        ("flex", torch.bfloat16, 30.0, 1e-2),
        ("flex", torch.float32, None, 1e-4),
        ("flex", torch.float32, 30.0, 1e-4),
        ("sdpa", torch.bfloat16, None, 1e-2),
    ],
)
def test_cuda_backends_are_sdpa(name, dtype, softcap, tolerance):
    """Output and gradients of each CUDA form are those of `sdpa` in fp32, to the tolerance that `choose` allows."""
    assert attention.deviation(name, torch.device("cuda"), dtype, softcap) <= tolerance


@pytest.mark.gpu
@needs_cuda
def test_choice_on_cuda():
    """A CUDA device has a fused backend for every dtype and head; varlen in fp32 is refused."""
    device = torch.device("cuda")
    assert attention.choose("auto", device, torch.bfloat16) in ("varlen", "flex")
    assert attention.choose("auto", device, torch.bfloat16, softcap=50.0) == "flex"
    assert attention.choose("auto", device, torch.float32) == "flex"
    with pytest.raises(UserError, match="layout.attention=varlen: computes in half types only"):
        attention.choose("varlen", device, torch.float32)
