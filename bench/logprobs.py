"""Speed, memory and error of tokens' log-probs from hidden states and a head: the naive form, ours, and peers'.

    python bench/logprobs.py --device cpu   # TRL is the extra `bench`; Liger is timed on CUDA where it is installed

All heads get the same random inputs, half of them confident tokens, and one upstream gradient per token, as DPO needs.
They take turns in one process (A B C A B C ...); quote the ratios, for times on a shared machine are noise. Memory is
measured in an untimed pass, and so is the error, against float64 on the same rounded inputs. Naive multiplies in fp32
whatever the dtype; `naive, half` multiplies as the dtype says, so on CUDA it is the plain form to beat.

Shapes: N scored tokens, D model width, V vocabulary entries. Raw numbers go to bench/results/.
"""

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench import report
from bench.systems import timed
from rpo.model.logprobs import KEPT, TILES, token_logps, token_logps_naive

SHAPES = {"cpu": (1024, 512, 32_000), "cuda": (8192, 4096, 151_936)}
LONG = (8192, 256, 32_000)  # too many logits to keep: only its memory is looked at
ROUNDS = {"cpu": 3, "cuda": 20}
SLOW = 1.5  # on a CPU a head that takes so many times naive's time in the first round has no further one
TRL_TILE_V = 32_768  # what its trainers pass
MIB = 2**20

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden_ND, head_VD, target_N -> logps_N


class Problem(NamedTuple):
    hidden_ND: Tensor
    head_VD: Tensor
    target_N: Tensor
    upstream_N: Tensor

    def first(self, count: int) -> "Problem":
        """The first tokens of it, as leaves of their own."""
        hidden_ND = self.hidden_ND[:count].detach().requires_grad_()
        return Problem(hidden_ND, self.head_VD, self.target_N[:count], self.upstream_N[:count])


@dataclass
class Result:
    seconds: list[float] = field(default_factory=list)  # of each round
    cpu_seconds: list[float] = field(default_factory=list)  # likewise, of all threads: what neighbours hardly touch
    peak_bytes: int = 0  # beyond inputs and gradients
    logp_error_max: float = 0.0  # nats
    logp_error_mean: float = 0.0  # nats
    hidden_grad_error: float = 0.0  # relative, L2
    head_grad_error: float = 0.0  # likewise


def make_problem(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    """Logits of standard deviation 3, and 20 for the target of every second token; signed upstream gradients."""
    N, D, V = shape
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(N, D, generator=generator)
    head_VD = torch.randn(V, D, generator=generator) * 3 / D**0.5
    target_N = torch.randint(V, (N,), generator=generator)
    head_VD[target_N[::2]] = hidden_ND[::2] * 20 / D
    upstream_N = torch.randn(N, generator=generator)
    hidden_ND, head_VD = (x.to(device, dtype).requires_grad_() for x in (hidden_ND, head_VD))
    return Problem(hidden_ND, head_VD, target_N.to(device), upstream_N.to(device))


# ---- heads


def naive_half(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Tensor:
    """Logits in the inputs' dtype, then upcast: what a library's model and a plain loss do."""
    return -F.cross_entropy(F.linear(hidden_ND, head_VD).float(), target_N, reduction="none")


def torch_plain() -> Head:
    losses = F.linear_cross_entropy
    return lambda *inputs: -losses(*inputs, reduction="none")


def torch_chunked() -> Head:
    losses, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    return lambda *inputs: -losses(*inputs, reduction="none", options=options)


def trl() -> Head:
    """Log-probs alone; its trainers ask for entropies, mean logits and ranks besides."""
    from trl.kernels import ChunkedLogProbFunction

    def logps(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden_ND, head_VD, None, target_N, 1.0, TRL_TILE_V, None, 1.0, ())[0]

    return logps


def liger() -> Head:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as losses

    return lambda *inputs: -losses(*inputs, reduction="none", accum_dtype=torch.float32)


def liger_scaled() -> Head:
    """Its CuTe kernels on Hopper, in bf16; 512-token chunks elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return lambda *inputs: -LigerFusedLinearScaledCrossEntropyFunction.apply(*inputs)


def heads(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> tuple[dict[str, Head], list[str]]:
    """The heads by name, naive first, and a line for each that cannot run here."""
    N, _, V = shape
    cuda = device.type == "cuda"
    found: dict[str, Head] = {"naive": token_logps_naive}
    if dtype != torch.float32:
        found["naive, half"] = naive_half
    found["ours, recomputing"] = partial(token_logps, keep=0)
    found["ours, keeping logits"] = partial(token_logps, keep=4 * N * V)
    found["ours, compiled"] = partial(token_logps, compile=True)
    peers = {"torch": torch_plain, "torch, chunked": torch_chunked, "TRL" if cuda else "TRL (torch fallback)": trl}
    absent = [] if cuda else ["Liger: it has no CPU kernels"]
    if cuda:
        peers |= {"Liger": liger, "Liger, scaled": liger_scaled}
    for name, make in peers.items():
        try:
            found[name] = make()
        except (ImportError, AttributeError) as error:  # not installed, or too old
            absent.append(f"{name}: {error}")
    return found, absent


# ---- measuring


def step(head: Head, problem: Problem) -> Tensor:
    """Forward and backward; the gradients are left in the leaves."""
    logps_N = head(*problem[:3])
    logps_N.backward(problem.upstream_N.to(logps_N.dtype))
    return logps_N.detach()


def clear(problem: Problem) -> None:
    problem.hidden_ND.grad = problem.head_VD.grad = None


def peak_bytes(device: torch.device, function: Callable[[], object]) -> int:
    """Most bytes alive at once during `function`, less those before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def exact(problem: Problem, rows: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """float64 log-probs and gradients of hidden and head, by the naive form on so many rows at a time."""
    head_VD = problem.head_VD.detach().double().requires_grad_()
    parts = []
    for hidden_ND, target_N, upstream_N in zip(
        *(x.detach().split(rows) for x in (problem.hidden_ND, problem.target_N, problem.upstream_N)), strict=True
    ):
        part = Problem(hidden_ND.double().requires_grad_(), head_VD, target_N, upstream_N)
        parts.append((step(token_logps_naive, part), part.hidden_ND.grad))  # the head's gradient adds up
    logps_N, grad_ND = map(torch.cat, zip(*parts, strict=True))
    return logps_N, grad_ND, head_VD.grad


def examine(head: Head, problem: Problem, truth: tuple[Tensor, Tensor, Tensor]) -> Result:
    """Peak memory and errors, after a warm-up on fewer tokens."""
    step(head, problem.first(len(problem.target_N) // 32))
    clear(problem)
    kept = {}
    peak = peak_bytes(problem.hidden_ND.device, lambda: kept.update(logps_N=step(head, problem)))
    exact_N, *exact_grads = truth
    grads = problem.hidden_ND.grad, problem.head_VD.grad
    error_N = (kept["logps_N"].double() - exact_N).abs()
    errors = [
        ((grad.double() - true).norm() / true.norm()).item() for grad, true in zip(grads, exact_grads, strict=True)
    ]
    beyond = peak - sum(grad.nbytes for grad in grads)
    return Result([], [], beyond, error_N.max().item(), error_N.mean().item(), *errors)


def measure(found: dict[str, Head], problem: Problem, rounds: int) -> tuple[dict[str, Result], list[str]]:
    """What became of each head that ran, and a line for each that did not."""
    device, truth = problem.hidden_ND.device, exact(problem)
    results, failed = {}, []
    for name, head in found.items():
        try:
            results[name] = examine(head, problem, truth)
        except Exception as error:  # a peer that does not run on this device is out, the others continue
            if name == "naive":
                raise
            failed.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        clear(problem)
    del truth
    for k in range(rounds):
        for name, result in results.items():
            if k and device.type == "cpu" and result.cpu_seconds[0] > SLOW * results["naive"].cpu_seconds[0]:
                continue
            seconds, cpu_seconds, _ = timed(device, partial(step, found[name], problem))
            result.seconds.append(seconds)
            result.cpu_seconds.append(cpu_seconds)
            clear(problem)
        shown = (f"{name} {r.seconds[k]:#.3g} s" for name, r in results.items() if len(r.seconds) > k)
        report.say(f"round {k + 1} of {rounds}: " + ", ".join(shown))
    return results, failed


def long_memory(device: torch.device) -> dict:
    """Peak of our head at its defaults at the shape `LONG`: two tiles beyond inputs and gradients, which is asserted."""
    problem = make_problem(LONG, torch.float32, device)
    N, _, V = LONG
    assert 4 * N * V > KEPT[device.type], (LONG, KEPT)
    peak = peak_bytes(device, lambda: step(token_logps, problem))
    beyond = peak - problem.hidden_ND.grad.nbytes - problem.head_VD.grad.nbytes
    tile = 4 * math.prod(TILES[device.type])
    token_vectors = 20 * 4 * N  # maximum, sum, target's logit, ... and their temporaries
    assert beyond <= 2 * tile + token_vectors, (beyond / tile, "tiles")
    print(
        f"ours at N={N} D={LONG[1]} V={V}, fp32: {beyond / MIB:.1f} MiB beyond inputs and gradients = "
        f"{beyond / tile:.2f} tiles of {tile / MIB:.0f} MiB (asserted: two tiles and {token_vectors / MIB:.1f} MiB of "
        f"token vectors); the N x V matrix: {4 * N * V / MIB:.0f} MiB"
    )
    return {"shape": LONG, "peak_bytes": beyond, "tile_bytes": tile, "token_vector_bytes": token_vectors}


# ---- the command


def ratios(results: dict[str, Result], by: str) -> dict[str, float]:
    """Median over a head's rounds of its time over naive's in the same round."""
    times = {name: np.array(getattr(result, by)) for name, result in results.items()}
    return {name: float(np.median(taken / times["naive"][: len(taken)])) for name, taken in times.items()}


def show(results: dict[str, Result], shape: tuple[int, int, int], device: torch.device) -> dict[str, dict[str, float]]:
    """Prints the table; returns the ratios to naive."""
    N, _, V = shape
    found = {by: ratios(results, by) for by in ("seconds", "cpu_seconds")}
    rows = [["", "time / naive", "CPU / naive", "s", "p90", "MiB", "N x V fp32"]]
    rows[0] += ["logp error max", "mean", "dhidden error", "dhead error"]
    for name, r in results.items():
        cpu_ratio = f"{found['cpu_seconds'][name]:.2f}" if device.type == "cpu" else ""
        row = [name, f"{found['seconds'][name]:.2f}", cpu_ratio]
        row += [f"{np.median(r.seconds):#.3g}", f"{np.quantile(r.seconds, 0.9):#.3g}"]
        row += [f"{r.peak_bytes / MIB:.0f}", f"{r.peak_bytes / (4 * N * V):.2f}"]
        errors = (r.logp_error_max, r.logp_error_mean, r.hidden_grad_error, r.head_grad_error)
        rows.append(row + [f"{error:.1e}" for error in errors])
    report.print_table(rows)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default cuda where there is a GPU")
    add("--shape", type=int, nargs=3, metavar=("N", "D", "V"), help=f"default {SHAPES}")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    add("--rounds", type=int, help=f"default {ROUNDS}")
    add("--threads", type=int, help="of torch on the CPU; default torch's")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    args.shape = tuple(args.shape or SHAPES[args.device])
    args.rounds = args.rounds or ROUNDS[args.device]
    if min(*args.shape, args.rounds) < 1 or args.shape[0] < 32:
        parser.error(f"--shape {args.shape} --rounds {args.rounds}: expected N of at least 32, the others at least 1")
    return args


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, (N, D, V) = torch.device(args.device), args.shape
    where = report.machine(device)
    default = "keeps the logits" if 4 * N * V <= KEPT[device.type] else "recomputes"
    print(f"{where['device']}, {where['threads']} threads; N={N} D={D} V={V}, forward and backward")
    print(f"ours {default} at this shape by default, and so does `compiled`", flush=True)
    measured = {}
    for kind in args.dtype:
        dtype = getattr(torch, kind)
        found, absent = heads(device, dtype, args.shape)
        results, failed = measure(found, make_problem(args.shape, dtype, device), args.rounds)
        slow = f" (1 where over {SLOW} x naive)" if device.type == "cpu" else ""
        print(f"\n{kind}, {args.rounds} rounds{slow}; memory beyond inputs and gradients; errors against float64")
        measured[kind] = {"ratios": show(results, args.shape, device), "left_out": absent + failed}
        measured[kind]["heads"] = {name: asdict(result) for name, result in results.items()}
        for line in absent + failed:
            print(f"left out: {line}", flush=True)
    print()
    long = long_memory(device)
    report.write(f"{args.device}_logprobs", device, arguments=vars(args), dtypes=measured, long=long)


if __name__ == "__main__":
    main()
