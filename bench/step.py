"""Seconds per DPO step on the same pairs: ours, a plain cross-entropy step of the same model, and TRL's.

    python bench/step.py --device cpu --lengths hh --compare trl   # TRL is the extra `bench`
    python bench/step.py --device cpu --sweep 12 --compare trl     # a beta x eta sweep: T(1) and T(12)

All systems train the same random weights on the same frozen ids: AdamW with fp32 weights and moments, clip 1.0, no
dropout, every response token scored. On a CPU that has the memory they take turns step by step (A B C A B C ...); else
visit by visit, each rebuilt. A step's time spans batches, forward, backward, clip, optimizer and metrics, and
TRL's is its own loop's. Loading, compiling, tokenising and the reference pass are not in it; the pass is shown apart.

A speed counts only if its system passes the gates: log-probs of the first step's pairs against the library's model in
fp32 with eager attention, pair by pair; DPO's loss at step 0 = ln 2; cosine of its gradient with that of its twin,
padded+live; its last losses no further from the twin's than other seeds' are. Raw numbers go to bench/results/.
"""

import argparse
import gc
import importlib.util
import itertools
import math
import os
import resource
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from bench import data, report
from bench.report import BEST, CEILING, Cells, Result, say
from bench.systems import DPO, MODELS, CrossEntropy, Ours, Work, build, timed
from rpo import dist
from rpo.errors import UserError

SYSTEMS = ["padded+live", "padded+cached", "packed+live", BEST, CEILING]
SYSTEMS += [f"{name}+compile" for name in SYSTEMS] + [f"{BEST}+bf16", f"{CEILING}+bf16"]
ON_CUDA = [SYSTEMS[0], BEST, CEILING, f"{BEST}+compile", f"{CEILING}+compile"]  # minutes, where all take half an hour
# Gates: |log-prob difference| per scored token (bf16: what rounding alone explains), |loss - ln 2|, cosine.
LOGPS, STEP_0, COSINE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}, 1e-3, 0.999
CELLS = list(itertools.product((0.02, 0.05, 0.1), (0.0, 0.005, 0.02, 0.1)))  # beta x eta of a sweep, rpo_sum


# ---- gates


@torch.no_grad()
def library_logps(work: Work) -> np.ndarray:
    """Summed log-probs (pairs, 2) of the first step's pairs by the library's model: fp32, eager attention, full logits."""
    lm = build(work)
    lm.set_attn_implementation("eager")
    result = np.empty((work.pairs, 2))
    for i in range(work.pairs):
        prompt, *responses = (torch.from_numpy(part.astype(np.int64)).to(work.device) for part in work.rows.row(i))
        for side, response in enumerate(responses):
            logits_TV = lm(torch.cat([prompt, response])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            result[i, side] = logits_TV.log_softmax(-1).gather(1, response[:, None]).double().sum().item()
    return result


@dataclass
class Gates:
    """What a system has to agree with before its speed counts."""

    work: Work
    logps: np.ndarray  # of the first step's pairs, by the library
    gradient: dict[str, Tensor] = field(default_factory=dict)  # of the first system's first step, on the host

    def logps_error(self, logps: np.ndarray) -> float:
        _, chosen, rejected = self.work.lengths(0)
        return float((np.abs(logps - self.logps) / np.stack([chosen, rejected], axis=1)).max())

    def cosine(self, named: Iterator[tuple[str, Tensor]]) -> float:
        is_twin, sums = not self.gradient, np.zeros(3)
        for name, grad in named:  # one at a time: at 7b a gradient takes 30 GB
            grad = grad.float().flatten().cpu()
            if is_twin:
                self.gradient[name] = grad.clone()
            kept = self.gradient[name]
            sums += [(a @ b).item() for a, b in ((grad, kept), (grad, grad), (kept, kept))]
        return sums[0] / math.sqrt(sums[1] * sums[2])

    def judge(self, result: Result, twin: Result, noise: float, dtype: torch.dtype) -> str | None:
        """Why a speed does not count; None where it does. `noise`: how far seeds' last losses lie apart."""
        gap = abs(late(result.losses, self.work) - late(twin.losses, self.work))
        for passed, reason in (
            (result.logps_error <= LOGPS[dtype], f"{result.logps_error:.0e} nats a token from the library's"),
            (abs(result.losses[0] - math.log(2)) <= STEP_0, f"loss {result.losses[0]:.4f} at step 0, not ln 2"),
            (result.cosine >= COSINE, f"cosine {result.cosine:.4f} with its twin's gradient"),
            (gap <= noise, f"loss {gap:.4f} from its twin's after {self.work.steps} steps, seeds {noise:.4f} apart"),
        ):
            if not passed:
                return reason
        return None


def late(losses: list[float], work: Work) -> float:
    """The mean loss of the first visit's last quarter."""
    return statistics.fmean(losses[: work.steps][-max(1, work.steps // 4) :])


# ---- measuring


@contextmanager
def excused(name: str, result: Result) -> Iterator[None]:
    """A system that raises is out, the others continue."""
    try:
        yield
    except Exception as error:
        result.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        say(f"{name}: {result.failed}")


def visit(makers: dict[str, Callable], work: Work, results: dict[str, Result], gates: Gates | None = None) -> None:
    """Builds these systems and lets them take turns through all steps."""
    systems, cuda = {}, work.device.type == "cuda"
    for name, make in makers.items():
        if results[name].failed:  # in an earlier visit
            continue
        with excused(name, results[name]):
            systems[name] = make()
            results[name].ref_seconds = systems[name].ref_seconds
            if gates and hasattr(systems[name], "logps"):
                results[name].logps_error = gates.logps_error(systems[name].logps(work.members(0)))

    def turn(name: str, k: int) -> None:
        result = results[name]

        def inspect(named: Iterator[tuple[str, Tensor]]) -> None:
            result.cosine = gates.cosine(named)

        step = partial(systems[name].step, k, inspect if gates and k == 0 else None)
        seconds, cpu_seconds, loss = timed(work.device, step)
        result.seconds.append(seconds)
        result.cpu_seconds.append(cpu_seconds)
        result.losses.append(loss.item())

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for k in range(work.steps):
        for name in systems:
            if not results[name].failed:
                with excused(name, results[name]):
                    turn(name, k)
        shown = (f"{name} {results[name].seconds[-1]:.2f} s" for name in systems if not results[name].failed)
        say(f"step {k + 1} of {work.steps}: " + ", ".join(shown))
    for name, system in systems.items():
        if cuda:
            peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
            results[name].memory_gib = {kind: peak / 2**30 for kind, peak in peaks.items()}
        system.close()
    systems.clear()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def fit_together(work: Work, systems: int) -> bool:
    """Whether on this CPU so many weights, gradients, moments and references leave half of the memory to a step."""
    bytes_each = 20 * sum(param.numel() for param in build(replace(work, device=torch.device("meta"))).parameters())
    return work.device.type == "cpu" and systems * bytes_each < dist.memory(work.device) / 2


def best_of_grid(work: Work, compiled: bool) -> tuple[dict, list[dict]]:
    """The fastest settings of TRL's written grid, by two steps after a first, and what each took."""
    from bench import trl_step

    work = replace(work, rows=data.first(work.rows, 3 * work.pairs))
    tried = []
    for settings in trl_step.GRID + [trl_step.COMPILED] * compiled:
        if work.pairs % settings["microbatch"] == 0:
            result = Result()
            say(f"TRL's grid: {settings}")
            visit({"trl": partial(trl_step.Trl, work, **settings)}, work, {"trl": result})
            seconds = math.inf if result.failed else statistics.median(result.seconds[1:])
            tried.append({"settings": settings, "seconds": seconds, "failed": result.failed})
    return min(tried, key=lambda one: one["seconds"])["settings"], tried


def dtype_of(name: str, work: Work) -> torch.dtype:
    """Of compute: `+bf16` is for CPUs, where the others compute in fp32."""
    return torch.bfloat16 if name.endswith("+bf16") else work.dtype


def ours(name: str, work: Work) -> Ours | CrossEntropy:
    kind, *rest = name.split("+")
    work = replace(work, dtype=dtype_of(name, work))
    if kind == CEILING:
        return CrossEntropy(work, compile="compile" in rest)
    return Ours(work, layout=kind, cached="cached" in rest, compile="compile" in rest)


def measure_steps(args: argparse.Namespace, work: Work) -> dict:
    """Times all systems; what the JSON holds of it."""
    makers = {name: partial(ours, name, work) for name in args.systems}
    grid = None
    if args.compare:
        from bench import trl_step

        best, grid = best_of_grid(work, args.trl_compile)
        default = trl_step.DEFAULT | {"microbatch": min(trl_step.DEFAULT["microbatch"], work.pairs)}
        makers["trl default"] = partial(trl_step.Trl, work, **default)
        makers["trl best"] = partial(trl_step.Trl, work, **best)
        makers["trl best, patched"] = partial(trl_step.Trl, work, **best, patched=True)
    results = {name: Result() for name in makers}
    gates = Gates(work, library_logps(work))
    for group in [list(makers)] if fit_together(work, len(makers)) else [[name] for name in makers] * args.visits:
        visit({name: makers[name] for name in group}, work, results, gates)
    twin = results[args.systems[0]]
    if twin.failed:
        raise UserError(f"{args.systems[0]}, which the others are held to, failed: {twin.failed}")

    say("other seeds")
    ends = [late(twin.losses, work)]
    for seed in (1, 2):  # by the fastest of ours that has run
        other, result = replace(work, seed=seed), Result()
        name = next(name for name in (BEST, args.systems[0]) if name in results and not results[name].failed)
        visit({name: partial(ours, name, other)}, other, {name: result})
        ends.append(late(result.losses, work))
    noise = max(1e-3, max(ends) - min(ends))
    for name, result in results.items():
        if not result.failed and not name.startswith(CEILING):
            result.failed = gates.judge(result, twin, noise, dtype_of(name, work))
    systems = {name: report.rates(name, result, work, args.warmup) for name, result in results.items()}
    return {"systems": systems, "seed_noise": noise, "grid": grid, "warmup": args.warmup}


def measure_sweep(args: argparse.Namespace, work: Work) -> dict:
    """K cells as the product runs them, one process and one reference pass, and as K trainers of TRL in one process."""
    cells, systems, grid = CELLS[: args.sweep], {"ours": Cells()}, None
    if args.compare:
        from bench import trl_step

        best, grid = best_of_grid(work, args.trl_compile)
        systems["trl"] = Cells()
    system = ours(BEST, work)
    systems["ours"].reference.append(system.ref_seconds)
    start = [weight.clone() for weight in system.weights()]

    def run(beta: float, eta: float) -> None:
        for weight, value in zip(system.weights(), start, strict=True):
            weight.copy_(value)
        system.begin(replace(DPO, beta=beta, eta=eta, sft="sum" if eta else "none"))
        for k in range(work.steps):
            system.step(k)

    run(*cells[0])  # once for warmth
    for beta, eta in cells:
        systems["ours"].train.append(timed(work.device, partial(run, beta, eta))[:2])
        if args.compare:
            trl = trl_step.Trl(work, **best, beta=beta, eta=eta)
            systems["trl"].reference += [trl.ref_seconds] * trl.reference_passes
            systems["trl"].train.append(timed(work.device, trl.train)[:2])
            trl.close()
        say(f"beta {beta}, eta {eta}: " + ", ".join(f"{name} {s.train[-1][0]:.2f} s" for name, s in systems.items()))
    system.close()
    return {"systems": {name: asdict(s) for name, s in systems.items()}, "cells": cells, "grid": grid}


# ---- the command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default cuda where there is a GPU")
    add("--model", choices=MODELS, help="shape of the random model; default 11m on a CPU, 0.5b on CUDA")
    add("--lengths", choices=data.LENGTHS, default="hh", help="hh: short; uf: long responses; long: long prompts")
    add("--data", choices=("made", "real"), default="made", help="real: ids of files in the folder RPO_TEST_DATA")
    add(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        metavar="NAME",
        help=f"of {', '.join(SYSTEMS)}; the first padded one is what the others are held to; default on CUDA "
        + ", ".join(ON_CUDA),
    )
    add("--compare", choices=("trl",), help="TRL's DPOTrainer at its defaults and at the best of a written grid")
    add("--trl-compile", action="store_true", help="torch.compile in TRL's grid too")
    add("--sweep", type=int, metavar="K", help=f"time a sweep of K cells (1 to {len(CELLS)}) instead of steps")
    add("--sweep-steps", type=int, default=4, help="steps of each cell")
    add("--pairs-per-step", type=int, help="default 8 on a CPU, 64 on CUDA")
    add("--warmup", type=int, help="steps that are not timed; default 2, of a large model on a CPU 1")
    add("--steps", type=int, help="steps that are; default 8, of a large model on a CPU 3")
    add("--visits", type=int, help="where not all fit at once: how often each is built and timed; default 2, on CUDA 1")
    add("--tokens-per-microbatch", type=int, default=16_384)
    add("--activation-checkpointing", choices=("none", "selective", "full"), default="none", help="not TRL's")
    add("--lr", type=float, default=1e-4)
    args = parser.parse_args()

    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if args.compare and not importlib.util.find_spec("trl"):
        parser.error("--compare trl: TRL is not installed; pip install -c constraints.txt -e '.[bench]'")
    if args.sweep is not None and not 1 <= args.sweep <= len(CELLS):
        parser.error(f"--sweep {args.sweep}: expected 1 to {len(CELLS)} cells")
    args.model = args.model or ("0.5b" if cuda else "11m")
    args.pairs_per_step = args.pairs_per_step or (64 if cuda else 8)
    args.visits = args.visits or (1 if cuda else 2)
    slow = not cuda and args.model != "11m"  # minutes, where twice as many steps take three quarters of an hour
    args.warmup = (1 if slow else 2) if args.warmup is None else args.warmup
    args.steps = args.steps or (3 if slow else 8)
    chosen = args.systems or (ON_CUDA if cuda else SYSTEMS[: SYSTEMS.index(CEILING) + 1])
    twin = next((name for name in chosen if name.startswith("padded")), SYSTEMS[0])
    args.systems = list(dict.fromkeys([twin, *chosen]))
    return args


def main() -> None:
    args = parse()
    device = dist.init()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = {"made": data.made, "real": data.real}[args.data](args.lengths)
    digest = data.sha256(rows)
    print(f"{rows.files[0]}: {data.describe(rows)}; sha256 {digest}", flush=True)
    count = (args.sweep_steps if args.sweep else args.warmup + args.steps) * args.pairs_per_step
    limits = (args.tokens_per_microbatch, args.activation_checkpointing, args.lr)
    work = Work(data.first(rows, count), args.pairs_per_step, args.model, device, dtype, *limits)
    peak, how = report.peak_flops(device, dtype)
    where = report.machine(device)
    measured = (measure_sweep if args.sweep else measure_steps)(args, work)

    kind = str(dtype).removeprefix("torch.")
    print(
        f"{where['device']}, {where['threads']} threads; {args.model}, {kind}, {args.lengths}, {work.pairs} pairs a step"
    )
    print(f"MFU: share of {peak / 1e12:.3g} TFLOP/s ({how}) that each system's own least work comes to")
    if args.compare and device.type == "cpu":
        print("CPU: TRL's fused head has no fast path here, it scores all positions; `patched` lends it one")
    if args.sweep:
        summary = report.show_sweep({name: Cells(**s) for name, s in measured["systems"].items()})
    else:
        summary = report.show_steps(measured["systems"], args.systems[0], peak, args.lengths, device)

    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak RSS of the process, all systems together: {rss:.1f} GiB")
    report.write(
        f"{args.device}_{args.model}_{args.lengths}{'_sweep' * bool(args.sweep)}",
        device,
        arguments=vars(args),
        peak_flops=peak,
        peak_flops_is=how,
        data={"name": rows.files[0], "sha256": digest, "pairs": len(rows)},
        summary=summary,
        process_rss_gib=rss,
        **measured,
    )
    dist.shutdown()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
