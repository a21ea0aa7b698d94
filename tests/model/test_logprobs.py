"""rpo.model.logprobs: tiled log-probs against the plain form in float64. Shapes: N tokens, D width, V vocabulary."""

import itertools
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rpo.model.logprobs import response_sums, token_logps, token_logps_naive

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.0625},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 9.0},
}


def make_inputs(dtype, *, bias=False, sizes=(251, 123, 507), seed=0, device="cpu", **settings):
    """Leaf tensors of an odd-sized problem, peaked in a third of its rows, and signed upstream gradients.

    The logits have unit variance but for the peaked rows, where the target's, or another token's, reaches about 15.
    """
    N, D, V = sizes
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=generator, dtype=DOUBLE)
    head_VD = torch.randn(V, D, generator=generator, dtype=DOUBLE) / D**0.5
    target_N = torch.randint(V, (N,), generator=generator)
    peaked = torch.arange(0, N, 3)
    head_VD[target_N[peaked]] = hidden_ND[peaked] * 15 / D
    target_N[peaked[::2]] = torch.randint(V, (len(peaked[::2]),), generator=generator)
    bias_V = torch.randn(V, generator=generator, dtype=DOUBLE) if bias else None
    upstream_N = torch.randn(N, generator=generator, dtype=DOUBLE).to(device)
    leaves = [x if x is None else x.to(device, dtype).requires_grad_() for x in (hidden_ND, head_VD, bias_V)]
    return leaves, target_N.to(device), upstream_N, settings


def value_and_grads(function, leaves, target_N, upstream_N, settings, dtype=None, **options):
    """float64 copies of function's logps and of the gradients of sum(upstream * logps), all at `dtype`."""
    hidden_ND, head_VD, bias_V = (x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves)
    logps_N = function(hidden_ND, head_VD, target_N, bias_V=bias_V, **settings, **options)
    logps_N.backward(upstream_N.to(logps_N.dtype))
    results = {"logps": logps_N.detach(), "hidden": hidden_ND.grad, "head": head_VD.grad}
    if bias_V is not None:
        results["bias"] = bias_V.grad
    return {name: x.to(DOUBLE) for name, x in results.items()}


def assert_three_way(fused, naive, exact, tolerance):
    """|fused - exact| <= max |naive - exact| + tolerance * (1 + |exact|) in every element."""
    for name, truth in exact.items():
        error, allowed = (fused[name] - truth).abs(), (naive[name] - truth).abs().max() + tolerance * (1 + truth.abs())
        worst = (error - allowed).argmax()
        assert (error <= allowed).all(), (name, worst, *(x[name].flatten()[worst] for x in (fused, naive, exact)))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tile_N,tile_V", [(64, 100), (300, 600), (1, 507), (251, 13)])
def test_fp32_is_as_accurate_as_naive(head, tile_N, tile_V):
    """fp32 values and gradients are as near to float64 as the plain form's, + 1e-6, whatever the tiles.

    A tile that was kept is the tile that would be recomputed: the same bits.
    """
    problem = make_inputs(SINGLE, **HEADS[head])
    fused = value_and_grads(token_logps, *problem, tile_N=tile_N, tile_V=tile_V, keep=0)
    assert_three_way(
        fused, value_and_grads(token_logps_naive, *problem), value_and_grads(token_logps_naive, *problem, DOUBLE), 1e-6
    )
    kept = value_and_grads(token_logps, *problem, tile_N=tile_N, tile_V=tile_V, keep=10**9)
    assert all(torch.equal(kept[name], value) for name, value in fused.items())


@pytest.mark.parametrize("head", HEADS)
def test_float64_stays_float64(head):
    """In float64 tiled and plain agree to rounding (1e-12), so nothing inside is fp32."""
    problem = make_inputs(DOUBLE, **HEADS[head])
    fused, naive = (
        value_and_grads(token_logps, *problem, tile_N=64, tile_V=100),
        value_and_grads(token_logps_naive, *problem),
    )
    for name, truth in naive.items():
        torch.testing.assert_close(fused[name], truth, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("head", HEADS)
def test_half_inputs_keep_fp32_logps(head):
    """bf16 inputs: logps are fp32, within 1e-3 nats of float64 on the same values (on CPU within 1e-5), and gradients
    are those of float64 rounded to bf16 once."""
    problem = make_inputs(HALF, **HEADS[head])
    leaves, target_N, _, settings = problem
    logps_N = token_logps(*leaves[:2], target_N, bias_V=leaves[2], **settings)
    assert logps_N.dtype == SINGLE
    fused = value_and_grads(token_logps, *problem, tile_N=64, tile_V=100)
    exact = value_and_grads(token_logps_naive, *problem, DOUBLE)
    assert (fused["logps"] - exact["logps"]).abs().max() <= 1e-5
    for name in exact.keys() - {"logps"}:
        # 2^-8 is bf16's largest single rounding; sums in bf16 would exceed it many times.
        torch.testing.assert_close(fused[name], exact[name], rtol=2**-8, atol=1e-5)


def test_confident_tokens():
    """Logits of several hundred: logps keep the plain form's fp32 accuracy, and tiny probabilities stay finite."""
    leaves, target_N, upstream_N, _ = make_inputs(SINGLE)
    problem = leaves, target_N, upstream_N, {"scale": 40.0}
    fused = value_and_grads(token_logps, *problem, tile_N=64, tile_V=100)
    naive, exact = value_and_grads(token_logps_naive, *problem), value_and_grads(token_logps_naive, *problem, DOUBLE)
    assert exact["logps"].min() < -400 and exact["logps"].max() > -1e-12
    assert_three_way(fused, naive, exact, 1e-6)


def test_large_logits_do_not_round_the_logp():
    """Two equal logits of 600 in different tiles give -ln 2 to 1e-6, though fp32 numbers near 600 are 6e-5 apart."""
    head_VD = torch.zeros(57, 3)
    head_VD[[4, 50]] = torch.tensor([600.0, 0, 0])
    logps_N = token_logps(torch.eye(3)[:1], head_VD, torch.tensor([50]), tile_N=1, tile_V=10)
    assert abs(logps_N.item() + math.log(2)) <= 1e-6


def test_masked_vocabulary():
    """A bias of -inf over whole tiles (padding entries of a head) removes those entries and makes no NaN."""
    (hidden_ND, head_VD, _), target_N, upstream_N, _ = make_inputs(DOUBLE)
    target_N = target_N % 200 + 200
    bias_V = torch.full((507,), -torch.inf, dtype=DOUBLE)
    bias_V[200:400] = 0
    logps_N = token_logps(hidden_ND, head_VD, target_N, bias_V=bias_V, tile_N=64, tile_V=100)
    cut_N = token_logps_naive(hidden_ND, head_VD[200:400], target_N - 200)
    torch.testing.assert_close(logps_N, cut_N)
    for masked, cut in zip(
        *(torch.autograd.grad(x, (hidden_ND, head_VD), upstream_N) for x in (logps_N, cut_N)), strict=True
    ):
        torch.testing.assert_close(masked, cut)


def test_default_tiles_and_toys():
    """Without tile sizes, above and below the size where the plain form takes over, results are the plain form's."""
    for sizes in (700, 16, 3001), (50, 16, 60):
        problem = make_inputs(DOUBLE, sizes=sizes)
        fused, naive = value_and_grads(token_logps, *problem), value_and_grads(token_logps_naive, *problem)
        for name in naive:
            torch.testing.assert_close(fused[name], naive[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3)))
def test_only_the_needed_gradients(needed):
    """Each subset of hidden, head and bias that requires a gradient gets the full set's, the rest none."""
    leaves, target_N, upstream_N, _ = make_inputs(DOUBLE, bias=True, sizes=(31, 12, 57))
    full = value_and_grads(token_logps_naive, leaves, target_N, upstream_N, {})
    leaves = [x.detach().requires_grad_(need) for x, need in zip(leaves, needed, strict=True)]
    logps_N = token_logps(*leaves[:2], target_N, bias_V=leaves[2], tile_N=8, tile_V=10)
    assert logps_N.requires_grad == any(needed)
    if any(needed):
        logps_N.backward(upstream_N)
    for x, need, name in zip(leaves, needed, ("hidden", "head", "bias"), strict=True):
        assert (x.grad is not None) == need
        if need:
            torch.testing.assert_close(x.grad, full[name])


def test_gradcheck():
    """Analytic gradients equal finite differences in float64, with bias, scale, soft-cap and ragged tiles."""
    leaves, target_N, _, settings = make_inputs(DOUBLE, **HEADS["all"], sizes=(7, 5, 11))
    tiles = {"tile_N": 3, "tile_V": 4}
    assert torch.autograd.gradcheck(
        lambda hidden, head, bias: token_logps(hidden, head, target_N, bias_V=bias, **settings, **tiles), leaves
    )


def test_no_double_backward():
    """Differentiating the backward pass raises instead of returning a wrong second derivative."""
    leaves, target_N, _, _ = make_inputs(DOUBLE, sizes=(7, 5, 11))
    logps_N = token_logps(*leaves[:2], target_N, tile_N=3, tile_V=4)
    (grad_ND,) = torch.autograd.grad(logps_N.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_ND.sum().backward()


def test_upstream_gradients_are_per_token():
    """Each token's own upstream value scales its gradient: it flips with its sign and is zero with it."""
    leaves, target_N, upstream_N, _ = make_inputs(DOUBLE, sizes=(31, 12, 57))
    upstream_N[::2] = 0
    plus, minus = (
        value_and_grads(token_logps, leaves, target_N, u, {}, tile_N=8, tile_V=10) for u in (upstream_N, -upstream_N)
    )
    assert torch.equal(plus["hidden"], -minus["hidden"]) and torch.equal(plus["head"], -minus["head"])
    assert not plus["hidden"][::2].any() and plus["hidden"][1::2].any(1).all()


@pytest.mark.parametrize("dtype", [HALF, SINGLE, DOUBLE])
def test_no_tokens(dtype):
    """N = 0 (a rank's empty micro-batch) gives an empty result and zero gradients."""
    leaves, target_N, _, settings = make_inputs(dtype, **HEADS["all"], sizes=(0, 12, 57))
    token_logps(*leaves[:2], target_N, bias_V=leaves[2], **settings, tile_N=8, tile_V=10).sum().backward()
    for x in leaves:
        assert x.grad.shape == x.shape and not x.grad.any()


@pytest.mark.parametrize("target", [-1, 57])
@pytest.mark.parametrize("tile_V", [10, None])
def test_target_outside_the_vocabulary(target, tile_V):
    """A target outside [0, V) raises on CPU, whichever path is taken."""
    leaves, target_N, _, _ = make_inputs(SINGLE, sizes=(31, 12, 57))
    target_N[3] = target
    with pytest.raises(RuntimeError, match="target_N outside"):
        token_logps(*leaves[:2], target_N, tile_N=8, tile_V=tile_V)


def peak_allocated(function):
    """Most bytes alive at once during function(), less those before, by the CPU allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_memory(dtype, head):
    """Forward and backward allocate at most two tiles beyond outputs and gradients (here 1/8 of the N x V matrix each),
    and with half inputs on CPU the documented fp32 sums and operands; where logits are kept, those and two tiles."""
    N, D, V, tile_N, tile_V = 1024, 16, 4096, 512, 1024
    leaves, target_N, upstream_N, settings = make_inputs(dtype, **HEADS[head], sizes=(N, D, V))
    upstream_N = upstream_N.float()
    tile = 4 * tile_N * tile_V
    gradients = sum(x.nbytes for x in leaves if x is not None)
    operands_and_sums = 2 * 4 * D * (N + tile_V) if dtype == HALF else 0
    token_vectors = 40 * 4 * N  # maximum, sum, target's logit, ... and their temporaries: 8 % of a tile here

    def step(function, **options):
        function(*leaves[:2], target_N, bias_V=leaves[2], **settings, **options).backward(upstream_N)

    for keep, matrix in ((0, 0), (4 * N * V, 4 * N * V)):
        peak = peak_allocated(lambda keep=keep: step(token_logps, tile_N=tile_N, tile_V=tile_V, keep=keep))
        extra = peak - gradients - operands_and_sums - matrix
        assert extra <= 2 * tile + token_vectors, (keep, extra / tile)
        for x in leaves:
            if x is not None:
                x.grad = None
    assert peak_allocated(lambda: step(token_logps_naive)) > 2 * 4 * N * V  # the counter does see N x V matrices


@pytest.mark.slow
def test_compiled():
    """compile=True is as accurate as eager, and ragged last tiles do not compile again."""
    problem = make_inputs(SINGLE, **HEADS["all"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        fused = value_and_grads(token_logps, *problem, tile_N=64, tile_V=100, compile=True)
    naive, exact = value_and_grads(token_logps_naive, *problem), value_and_grads(token_logps_naive, *problem, DOUBLE)
    assert_three_way(fused, naive, exact, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_half(compile):
    """CUDA bf16: logps within 1e-3 nats of float64 on the same values, gradients as near as bf16 autograd's, and no
    synchronisation with the device."""
    problem = make_inputs(HALF, **HEADS["all"], sizes=(1000, 256, 5000), device="cuda")
    options = {"tile_N": 256, "tile_V": 1024, "compile": compile}
    value_and_grads(token_logps, *problem, **options)  # compiling and cuBLAS's start may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused = value_and_grads(token_logps, *problem, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = value_and_grads(token_logps_naive, *problem, DOUBLE)
    assert (fused["logps"] - exact["logps"]).abs().max() <= 1e-3
    for name in exact.keys() - {"logps"}:
        assert (fused[name] - exact[name]).norm() <= 2**-8 * exact[name].norm(), name


@pytest.mark.parametrize("keep", [0, 10**9])
def test_a_bias_of_another_float_is_taken(keep):
    """bfloat16, fp32 and float64 biases beside fp32 and float64 inputs: both paths give the same, and a gradient of its dtype."""
    generator = torch.Generator().manual_seed(0)
    target_N = torch.randint(50, (40,), generator=generator)
    for dtype in (SINGLE, DOUBLE):
        hidden_ND, head_VD = (torch.randn(n, 8, generator=generator, dtype=dtype) for n in (40, 50))
        for bias in (HALF, SINGLE, DOUBLE):
            bias_V = torch.randn(50, generator=generator).to(bias).requires_grad_()
            tiled = token_logps(hidden_ND, head_VD, target_N, bias_V=bias_V, tile_N=8, tile_V=16, keep=keep)
            naive = token_logps_naive(hidden_ND, head_VD, target_N, bias_V=bias_V)
            torch.testing.assert_close(tiled, naive, rtol=0, atol=1e-5)
            (grad_V,) = torch.autograd.grad(tiled.sum(), bias_V)
            assert tiled.dtype == dtype and grad_V.dtype == bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_response_sums_and_their_gradient(dtype):
    """Segment sums equal a loop's, and each token's gradient is its own response's."""
    lengths = torch.tensor([3, 1, 4])
    logps_N = torch.randn(8, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
    sums_S = response_sums(logps_N, lengths)
    torch.testing.assert_close(sums_S, torch.stack([part.double().sum() for part in logps_N.split(lengths.tolist())]))
    (grad_N,) = torch.autograd.grad(sums_S @ torch.tensor([1.0, -2.0, 3.0]).double(), logps_N)
    assert grad_N.tolist() == [1, 1, 1, -2, 3, 3, 3, 3]


def test_margins_after_a_small_update_have_their_sign():
    """Sums of 500 tokens under policy and reference differ by 4e-4 nats: rounded to fp32 before the margin, many signs are lost."""
    generator = torch.Generator().manual_seed(0)
    ref_N = -3 * torch.rand(64 * 500, generator=generator)
    logps_N = ref_N + 1e-6 * torch.randn(64 * 500, generator=generator)
    lengths_S = torch.full((64,), 500)
    exact_S = (logps_N.double() - ref_N.double()).view(64, 500).sum(1)
    shift_S = response_sums(logps_N, lengths_S) - response_sums(ref_N, lengths_S)
    torch.testing.assert_close(shift_S, exact_S, rtol=1e-6, atol=1e-12)
    rounded_S = response_sums(logps_N, lengths_S).float() - response_sums(ref_N, lengths_S).float()
    assert (rounded_S.sign() != exact_S.sign()).sum() > 10
