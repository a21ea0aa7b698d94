"""The first quarter of an hour on a GPU: ceilings, equality, steps at three sizes, what they hold, train.py, answers.

    python bench/gpu.py --seconds 420                                            # in order of worth, as far as that goes
    python bench/gpu.py --stages step_05b,tests,train,generate --seconds 400     # what is left, in a second call
    python bench/gpu.py --dry                                                    # every stage on a CPU, toy sizes

A stage is by itself: what fails becomes a line with its error, and the next begins. Each line is JSON, printed and written
as it is measured, so that a machine that is taken away leaves what it had. Pairs have UltraFeedback's lengths, rows 16,384
tokens, the reference is cached; a step spans batches, forward, backward, clip, optimizer and metrics.

Needs torch, transformers and NumPy alone: where pydantic is missing, settings stay unchecked. `train` and `tests` are
skipped, with the reason, where hydra or pytest cannot be imported.
"""

import argparse
import collections
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench import bare, data, report, step, systems  # bare first
from bench.systems import DPO, MODELS, CrossEntropy, Ours, Work
from rpo import dist
from rpo.data import schedule
from rpo.model import attention, hf, probe, shard
from rpo.model.logprobs import token_logps, token_logps_naive
from rpo.model.policy import prepare
from rpo.model.sampling import Sampling, sample
from rpo.training import memory, meter
from rpo.training import trace as training_trace

ROOT = report.ROOT
assert bare
MODELS["toy"] = {"model_type": "llama", "vocab_size": data.VOCABULARY, "hidden_size": 32, "intermediate_size": 64}
MODELS["toy"] |= {"num_hidden_layers": 2, "num_attention_heads": 2}
PEAK = 989e12  # FLOP/s of an H100's or H200's data sheet, dense bf16; of other cards the stage `env` says more
HEADS = {"1b": (32, 8, 64), "7b": (32, 8, 128), "gemma2": (16, 8, 256)}  # of queries, of keys, width
VOCABULARIES = {"0.5b": (896, 151_936), "7b": (4096, 32_000)}


@dataclass
class Hour:
    """Where stages note what they find, and how long they may go on."""

    device: torch.device
    dry: bool
    seconds: float
    out: Path
    name: str
    begun: float

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)

    def note(self, stage: str, **values: Any) -> None:
        line = json.dumps({"stage": stage, "at": round(time.monotonic() - self.begun, 1), **values}, default=str)
        with (self.out / f"{self.name}.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def write(self, what: str, text: str) -> None:
        (self.out / f"{self.name}_{what}.txt").write_text(text)

    def work(self, model: str, steps: int, *, tokens: int = 16_384, checkpointing: str = "none") -> Work:
        """`steps` of 64 pairs of UltraFeedback's lengths; in a rehearsal a toy and two short pairs."""
        pairs, lengths = (2, "hh") if self.dry else (64, "uf")
        model, tokens = ("toy", 2048) if self.dry else (model, tokens)
        dtype = torch.bfloat16 if self.cuda else torch.float32
        rows = data.first(data.made(lengths), steps * pairs)
        return Work(rows, pairs, model, self.device, dtype, tokens, checkpointing, lr=1e-6)

    @contextmanager
    def excused(self, stage: str, **facts: Any) -> Iterator[None]:
        """What fails is noted, and what it held is freed."""
        try:
            yield
        except Exception as failure:
            self.note(stage, failed=f"{type(failure).__name__}: {' '.join(str(failure).split())[:400]}", **facts)
        gc.collect()
        torch._dynamo.reset()
        if self.cuda:
            torch.cuda.empty_cache()


class Step(Ours):
    """The benchmark's step with a cached reference of zeros: without the pass that makes it, and its copy to the host."""

    def __init__(self, work: Work, *, compile: bool, attention: str = "auto", layout: str = "packed"):
        self.work, self.layout = work, layout
        self.rows = replace(work.rows, ref_logps=np.zeros((len(work.rows), 2)))
        sharding = systems._sharding(work, compile and work.device.type == "cuda")  # a rehearsal compiles nothing
        self.fsdp, self.live, self.ref_seconds = sharding["fsdp"], None, None
        self.policy = prepare(systems.build(work), **sharding, trainable=True, attention=attention)
        self.worker = ThreadPoolExecutor(1)
        self.begin(DPO)


# ---- steps


def _rates(work: Work, flops: list[float], seconds: list[float], warm: int) -> dict:
    median = float(np.median(seconds[warm:]))
    rate = float(np.median(np.array(flops[warm:]) / np.array(seconds[warm:])))
    rounded = [round(s, 4) for s in seconds]
    return {"seconds": rounded, "seconds_median": round(median, 4), "tflops": round(rate / 1e12, 1)} | {
        "mfu": round(rate / PEAK, 4)
    }


def _memory(hour: Hour) -> dict:
    if not hour.cuda:
        return {}
    peaks = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    return {name: round(peak / 2**30, 2) for name, peak in peaks.items()}


def _steps(hour: Hour, label: str, work: Work, **how: Any) -> None:
    """Times every step of `work`, all but the first two counted; beside the memory what the planner says of it."""
    eager_before = shard.eager_calls()
    system = Step(work, **how)
    warm, seconds, host, finite = min(2, work.steps - 1), [], [], True
    for k in range(work.steps):
        if k == warm and hour.cuda:
            torch.cuda.reset_peak_memory_stats()
        meter.wait(hour.device)
        at = time.perf_counter()
        loss = system.step(k)
        host.append(round(time.perf_counter() - at, 4))
        meter.wait(hour.device)
        seconds.append(time.perf_counter() - at)
        finite = finite and bool(loss.isfinite())
    size = systems.size_of(work)
    facts = _rates(work, [size.step_flops(*work.lengths(k)) for k in range(work.steps)], seconds, warm)
    facts |= {"pairs_per_second": round(work.pairs / facts["seconds_median"], 2), "host_seconds": host[-1]}
    facts |= {"backend": system.policy.attention, "eager_calls": shard.eager_calls() - eager_before} | _memory(hour)
    system.close()
    del system
    form = {"model": work.model, "tokens": work.tokens_per_microbatch, "checkpointing": work.activation_checkpointing}
    hour.note("step", form=label, **form, **how, **facts, planned_gib=planned(work, **how), finite=finite)


def planned(work: Work, *, compile: bool, layout: str = "packed", **_: Any) -> float:
    """GiB at the peak of a step of `work`, by the memory planner."""
    model = hf.config_for(MODELS[work.model] | {"max_position_embeddings": 4096})
    group = types.SimpleNamespace
    cfg = group(
        model=group(dtype=str(work.dtype).removeprefix("torch.")),
        optim=group(state_dtype="float32"),
        fsdp=replace(shard.PLAIN, activation_checkpointing=work.activation_checkpointing, reshard_after_forward=False),
        loss=DPO,
        reference=group(kind="cached"),
        data=group(train="files", eval=None, max_length=data.MAX_LENGTH),
        batch_size=work.pairs,
        tokens_per_microbatch=work.tokens_per_microbatch,
        compile=compile,
    )
    fullest, tokens, several = (), 0, False
    for k in range(work.steps):
        parts = schedule.plan_step(work.rows, work.members(k), layout=layout, budget=work.tokens_per_microbatch)
        several = several or len(parts.microbatches) > 1
        for members, _ in parts.microbatches:
            sizes = np.stack([work.rows.prompt[members], work.rows.chosen[members], work.rows.rejected[members]], 1)
            if sizes.sum() > tokens:
                fullest, tokens = tuple(map(tuple, sizes.tolist())), int(sizes.sum())
    how = {"lengths": fullest, "layout": layout, "device": work.device.type, "dtype": work.dtype}
    trace = cache(partial(training_trace.trace, model, **how))
    place = memory.Place(1, work.device.type, training_trace.sizes(model), trace, tokens, several)
    return round(sum(memory.peak(cfg, place)[1].values()) / memory.GIB, 2)


def _ceiling(hour: Hour, work: Work, *, compile: bool) -> None:
    """A plain cross-entropy step of the same model on the same tokens, dense rows."""
    system, seconds, warm = CrossEntropy(work, compile=compile and hour.cuda), [], min(2, work.steps - 1)
    for k in range(work.steps):
        if k == warm and hour.cuda:
            torch.cuda.reset_peak_memory_stats()
        meter.wait(hour.device)
        at = time.perf_counter()
        system.step(k)
        meter.wait(hour.device)
        seconds.append(time.perf_counter() - at)
    size = systems.size_of(work)
    shapes = [[tuple(batch.shape) for batch in systems.dense_rows(work, k)] for k in range(work.steps)]
    flops = [systems.cross_entropy_flops(size, s) for s in shapes]
    facts = _rates(work, flops, seconds, warm)
    hour.note("step", form="cross-entropy", model=work.model, compile=compile, **facts, **_memory(hour))


# ---- stages, in order of worth


def env(hour: Hour) -> None:
    """The machine and its two ceilings: TFLOP/s of a square product, TB/s of a copy (bytes read and written)."""
    facts = report.machine(hour.device) | report.versions()
    attention.register()
    facts["varlen_options"] = sorted(attention.VARLEN_OPTIONS)
    size, dtype = (256, torch.float32) if hour.dry else (8192, torch.bfloat16)
    a, b = (torch.randn(size, size, device=hour.device, dtype=dtype) for _ in range(2))
    big = torch.empty(2**20 if hour.dry else 2**31, device=hour.device, dtype=torch.uint8)
    jobs = {"gemm_tflops": (lambda: a @ b, 2 * size**3 / 1e12), "copy_tb_s": (big.clone, 2 * big.numel() / 1e12)}
    if hour.cuda:
        facts |= {"driver": torch.version.cuda, "gib": torch.cuda.get_device_properties(0).total_memory / 2**30}
        jobs["gemm_fp32_out_tflops"] = (
            lambda: torch.mm(a, b, out_dtype=torch.float32),
            jobs["gemm_tflops"][1],
        )
    for name, (job, amount) in jobs.items():
        systems.timed(hour.device, job)
        seconds = systems.timed(hour.device, lambda job=job: [job() for _ in range(10)])[0]
        facts[name] = round(10 * amount / seconds, 3)
    hour.note("env", **facts)


def gates(hour: Hour) -> None:
    """What is to be equal: the head and its float64 twin; packed rows and padded ones, against the bf16 noise floor."""
    for label, (width, vocabulary) in VOCABULARIES.items():
        tokens = 64 if hour.dry else 2048
        width, vocabulary = (32, 3000) if hour.dry else (width, vocabulary)
        for dtype in (torch.bfloat16, torch.float32):
            with hour.excused("head", shape=label, dtype=dtype):
                generator = torch.Generator().manual_seed(0)
                x, head = (torch.randn(n, width, generator=generator) * width**-0.25 for n in (tokens, vocabulary))
                target = torch.randint(vocabulary, (tokens,), generator=generator).to(hour.device)
                upstream = torch.randn(tokens, generator=generator).to(hour.device)
                results = []
                for function, wide in ((token_logps, dtype), (token_logps_naive, torch.float64)):
                    leaves = [t.to(hour.device, dtype).to(wide).requires_grad_() for t in (x, head)]
                    out = function(*leaves, target)
                    results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))])
                gaps = [(a.double() - b).norm() / b.norm() for a, b in zip(*results, strict=True)]
                most = (results[0][0].double() - results[1][0]).abs().max().item()
                named = dict(zip(("logps", "hidden_grad", "head_grad"), (g.item() for g in gaps), strict=True))
                hour.note("head", shape=label, dtype=dtype, nats=most, relative_l2=named)
    for model in ("0.5b", "1b"):
        with hour.excused("packed and padded", model=model):
            work = hour.work(model, 1)
            found: dict[str, Step] = {}
            for layout in ("padded", "packed"):
                found[layout] = Step(replace(work, activation_checkpointing="full"), compile=False, layout=layout)
            members = np.arange(min(8, work.pairs))
            how = {"rows": work.rows, "indices": members, "device": hour.device}
            policy = found["packed"].policy
            gap = probe.mean_gap((policy, "packed"), (policy, "padded"), **how)
            floor = probe.noise_floor(policy, work.rows, members, hour.device, positions=4096, compute_dtype=work.dtype)
            hosts = step.Gates(work, np.zeros((work.pairs, 2)))  # takes the first gradient as the twin's
            cosines = []
            for system in found.values():
                system.step(0, lambda named, hosts=hosts, cosines=cosines: cosines.append(hosts.cosine(named)))
                system.close()
            facts = {"nats_per_token": gap, "noise_floor": floor, "gradient_cosine": cosines[-1]}
            hour.note("packed and padded", model=work.model, attention=policy.attention, **facts)
            del found, system, policy, hosts


def backends(hour: Hour) -> None:
    """Each attention of packed rows: its distance from the loop in fp32, and milliseconds of one row of 16,384 tokens."""
    attention.register()
    dtype = torch.bfloat16 if hour.cuda else torch.float32
    work = hour.work("1b", 1)
    lengths = np.stack(work.lengths(0), 1).astype(np.int64)
    lengths = lengths[np.cumsum(lengths.sum(1)) <= work.tokens_per_microbatch]
    segments = attention.segments_of(lengths).to(hour.device)
    for label, heads in HEADS.items():
        softcap = 50.0 if label == "gemma2" else None
        for name, function in attention.BACKENDS.items():
            if (name == "varlen" and softcap) or (not hour.cuda and name != "sdpa"):
                continue
            with hour.excused("attention", backend=name, heads=label):
                measure = partial(attention.deviation, name, hour.device, dtype, softcap, heads)
                first, _, deviation = systems.timed(hour.device, measure)
                facts = {"first_seconds": round(first, 1), "deviation": deviation}
                shapes = [(1, n, len(segments.pair_T), heads[2]) for n in (heads[0], heads[1], heads[1])]
                leaves = [torch.randn(s, device=hour.device, dtype=dtype).requires_grad_() for s in shapes]

                def forward(function=function, leaves=leaves, heads=heads, softcap=softcap) -> torch.Tensor:
                    return function(*leaves, segments, scale=heads[2] ** -0.5, softcap=softcap)

                for kind, job in (("forward", forward), ("both", lambda f=forward: f().sum().backward())):
                    facts[f"{kind}_ms"] = round(1e3 * min(systems.timed(hour.device, job)[0] for _ in range(4)), 3)
                hour.note("attention", backend=name, heads=label, row=[*leaves[0].shape, len(lengths)], **facts)


def step_1b(hour: Hour) -> None:
    """Llama-3.2-1B's shape: eager, compiled, by the loop over segments, and the cross-entropy step."""
    for compile, backend in ((False, "auto"), (True, "auto"), (False, "sdpa")):
        with hour.excused("step", form=("1b", compile, backend)):
            _steps(hour, "1b", hour.work("1b", 8), compile=compile, attention=backend)
    with hour.excused("step", form="cross-entropy"):
        _ceiling(hour, hour.work("1b", 8), compile=True)
    with hour.excused("synchronisations"):
        system = Step(hour.work("1b", 2), compile=False)
        system.step(0)
        hour.note("synchronisations", of_an_update=_synchronisations(hour, partial(system.step, 1)))
        system.close()


def _synchronisations(hour: Hour, job: Callable) -> dict[str, int]:
    """Lines at which the host waited for the device, by torch's own audit; empty on a CPU."""
    if not hour.cuda:
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            job()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = (w for w in caught if "synchroniz" in str(w.message))
    return dict(collections.Counter(f"{w.filename.split('site-packages/')[-1]}:{w.lineno}" for w in found))


def step_7b(hour: Hour) -> None:
    """Mistral-7B's shape on one card, in four forms, each beside what the planner says of its memory."""
    for checkpointing, tokens, compile in (
        ("full", 16_384, True),
        ("selective", 4096, True),
        ("none", 4096, True),
        ("full", 16_384, False),
    ):
        if hour.left < 60:
            hour.note("step", form=("7b", checkpointing, tokens, compile), skipped="too little time left")
            continue
        with hour.excused("step", form=("7b", checkpointing, tokens, compile)):
            work = hour.work("mistral", 5, tokens=tokens, checkpointing=checkpointing)
            _steps(hour, "7b", work, compile=compile)


def profiles(hour: Hour) -> None:
    """One step of the 1B shape by torch's profiler: kernels, seconds that the device was busy, the 40 dearest."""
    for compile in (False, True):
        with hour.excused("profile", compile=compile):
            system = Step(hour.work("1b", 4), compile=compile)
            for k in range(3):
                system.step(k)
            with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * hour.cuda) as found:
                seconds = systems.timed(hour.device, partial(system.step, 3))[0]
            by = "self_device_time_total" if hour.cuda else "self_cpu_time_total"
            table = found.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90)
            hour.write(f"profile_{'compiled' if compile else 'eager'}", table)
            kernels = [e for e in found.events() if "CUDA" in str(e.device_type)]
            busy = sum(e.time_range.elapsed_us() for e in kernels) / 1e6
            facts = {"seconds": round(seconds, 4), "kernels": len(kernels), "busy_seconds": round(busy, 4)}
            hour.note("profile", compile=compile, **facts)
            system.close()


def step_05b(hour: Hour) -> None:
    """Qwen2.5-0.5B's shape, eager and compiled."""
    for compile in (False, True):
        with hour.excused("step", form=("0.5b", compile)):
            _steps(hour, "0.5b", hour.work("0.5b", 8), compile=compile)


def tests(hour: Hour) -> None:
    """The tests that are marked for a GPU."""
    if not importlib.util.find_spec("pytest"):
        hour.note("tests", skipped="pytest is not installed")
        return
    files = ("model/test_attention", "model/test_logprobs", "training/test_optim", "training/test_memory")
    files += ("runs/test_checkpoint",)
    names = [f"tests/{name}.py" for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider", *names]
    _run(hour, "tests", [*command, "--collect-only"] if hour.dry else command)


def train(hour: Hour) -> None:
    """train.py from end to end on the embedded task, twice, then with sampling, compiled: losses, attention, equality."""
    if not (importlib.util.find_spec("hydra") and importlib.util.find_spec("pydantic")):
        hour.note(
            "train", skipped="hydra and pydantic are needed: pip install hydra-core pydantic, or carry their wheels"
        )
        return
    runs, losses = Path(tempfile.mkdtemp()), {}  # not beside the results: a machine may give back few files
    common = ["loss=rpo_sum", "wandb.mode=disabled", f"cache_dir={runs}/cache", "log_every=1"]
    common += [f"max_steps={2 if hour.dry else 12}", "checkpoint.every=2", "data.gold.samples=8"]
    forms = {"once": ["eval_every=0"], "again": ["eval_every=0"], "sampled": ["sample_every=2", "eval_every=0"]}
    forms["padded_live"] = ["layout=padded", "reference=live", "eval_every=0"]
    for name, more in forms.items():
        if hour.left < 30:
            hour.note(f"train_{name}", skipped="too little time left")
            continue
        folder = runs / name
        _run(hour, f"train_{name}", [sys.executable, "train.py", *common, *more, f"run_dir={folder}"])
        if (folder / "metrics.jsonl").exists():
            lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            losses[name] = [line["loss"] for line in lines if line["split"] == "train"]
    same = losses.get("once") == losses.get("again") if losses.keys() >= {"once", "again"} else None
    hour.note("train", losses=losses, once_is_again=same)


def _run(hour: Hour, name: str, command: list[str]) -> None:
    at, limit = time.perf_counter(), max(20.0, hour.left)
    try:
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, **pipe, text=True, timeout=limit, cwd=ROOT)
        out, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as failure:
        out, code = (failure.stdout or b"").decode(errors="replace"), "timeout"
    hour.write(name, out[-200_000:])
    hour.note(name, exit_code=code, seconds=round(time.perf_counter() - at, 1), tail=out.strip().splitlines()[-6:])


def generate(hour: Hour) -> None:
    """Answers of the 1B shape, 16 at a time: tokens a second; whether layers still run compiled afterwards."""
    with hour.excused("generate"):
        work = hour.work("1b", 2)
        system = Step(work, compile=True)
        system.step(0)
        tokens, before = (8 if hour.dry else 128), shard.eager_calls()
        prompts = [work.rows.row(i % len(work.rows))[0].tolist() for i in range(4 if hour.dry else 16)]
        how = {"device": hour.device, "seed": [0], "batch_size": len(prompts), "reshard": False}
        job = partial(sample, system.policy, prompts, Sampling(1.0, 1.0, 0, tokens), [data.EOS], **how)
        first, second = (systems.timed(hour.device, job) for _ in range(2))
        count = sum(len(completion.ids) for completion in second[2])
        seconds = [round(first[0], 2), round(second[0], 2)]
        sampled = shard.eager_calls() - before
        system.step(1)
        later = shard.eager_calls() - before - sampled
        facts = {"tokens": count, "seconds": seconds, "tokens_per_second": round(count / second[0], 1)}
        hour.note("generate", **facts, eager_calls_while_sampling=sampled, eager_calls_of_the_next_step=later)
        system.close()


STAGES = [env, gates, backends, step_1b, step_7b, profiles, step_05b, generate, tests, train]


def main() -> None:
    names = [stage.__name__ for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=420, help="no stage begins after so many")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of what is written")
    parser.add_argument("--commit", help="where git cannot tell it")
    parser.add_argument("--dry", action="store_true", help="a rehearsal: every stage on a CPU, toy sizes")
    args = parser.parse_args()
    if unknown := set(args.stages.split(",")) - set(names):
        parser.error(f"--stages {', '.join(sorted(unknown))}: expected some of {', '.join(names)}")
    if args.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks
    elif not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --dry rehearses every stage on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y-%m-%d_%H%M%S')}_gpu{'_dry' * args.dry}"
    hour = Hour(dist.init(), args.dry, args.seconds, args.out.resolve(), name, time.monotonic())
    hour.note("begun", command=sys.argv, git={"commit": args.commit} if args.commit else report.git())
    for stage in STAGES:
        if stage.__name__ not in args.stages.split(","):
            continue
        if hour.left <= 0:
            hour.note(stage.__name__, skipped="out of time")
            continue
        with hour.excused(stage.__name__):
            stage(hour)
    hour.note("done")
    dist.shutdown()


if __name__ == "__main__":
    main()
