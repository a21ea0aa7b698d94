"""One gradient, whatever the micro-batches, the ranks, the sharding; and one run, whatever the ranks."""

import dataclasses
import json
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rpo import dist
from rpo.data import schedule
from rpo.errors import UserError
from rpo.model.shard import PLAIN, mesh
from tests.helpers.models import float64_throughout, make_lm
from tests.helpers.rows import make_tokenizer
from tests.helpers.runs import command, script_env, tiny_args
from tests.helpers.step_gradient import (
    LOSS,
    TIMEOUT,
    VOCABULARY,
    logp,
    moved_copy,
    naive_split,
    reference_logps,
    rows,
    step_gradient,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def relative(a, b):
    """Relative L2 distance over all parameters."""
    assert a.keys() == b.keys()
    gap = sum(((a[k].double() - b[k].double()) ** 2).sum() for k in a).sqrt()
    return (gap / sum((b[k].double() ** 2).sum() for k in b).sqrt()).item()


def naive_gradient():
    """The same step by one plain loop: one response at a time, full logits, the formulas written out; float64."""
    lm = make_lm(vocab_size=VOCABULARY).double()
    with float64_throughout():
        ref_logps = reference_logps(moved_copy(lm))
        dpo = nll = 0
        for i in range(8):
            prompt, chosen, rejected = rows().row(i)
            chosen_logp = logp(lm, prompt, chosen)
            margin = chosen_logp - logp(lm, prompt, rejected) - (ref_logps[i, 0] - ref_logps[i, 1])
            dpo = dpo - F.logsigmoid(LOSS.beta * margin)
            nll = nll - chosen_logp
        (dpo / 8 + LOSS.eta * nll / int(rows().chosen.sum())).backward()
    return {f"lm.{name}": param.grad for name, param in lm.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_one_gradient_under_any_cut(group, layout, dtype):
    """1x8, 8x1, 3+5 by hand, token budgets, sharded accumulation, checkpointing, a cached reference: the naive loop's.

    28 tokens are the longest pair's, which fills its packed row; others stand alone or together.
    """
    expected = naive_gradient()
    one_by_one, three_five = [[i] for i in range(8)], [[0, 3, 6], [1, 2, 4, 5, 7]]
    cases = [{}, {"cuts": one_by_one}, {"cuts": three_five}, {"budget": 70}, {"budget": 28}, {"cached": True}]
    cases += [{"budget": 70, "accumulate": "sharded"}, {"checkpointing": "full"}, {"checkpointing": "selective"}]
    cases += [{"budget": 28, "accumulate": "sharded", "checkpointing": "full", "cached": True}]
    for case in cases:
        assert relative(step_gradient(dtype, layout=layout, **case), expected) <= TOLERANCE[dtype], case


def run_on(ranks, cases, tmp_path):
    """(gradient, facts) of each case, by so many processes."""
    out = tmp_path / "gradients.pt"
    args = command("tests/helpers/step_gradient.py", out, json.dumps(cases), ranks=ranks)
    subprocess.run(args, env=script_env(), check=True, capture_output=True, timeout=120)
    return torch.load(out)


def expected_traffic(case, shard, replicate, microbatches):
    """Bytes of a float64 step by the formula of docs/CLUSTER.md: gathers, sums over shards, sums over replicas."""
    lm = make_lm(vocab_size=VOCABULARY)
    psi = 8 * sum(p.numel() for p in lm.parameters())
    layers = 8 * sum(p.numel() for p in lm.model.layers.parameters())
    traffic = {}
    if shard > 1:
        times = 2 * microbatches if case.get("reshard_after_forward", True) else 1
        traffic["allgather_base"] = psi + (times - 1) * layers
        traffic["reduce_scatter_base"] = psi * (microbatches if case.get("accumulate") == "sharded" else 1)
    return traffic | ({"allreduce": psi // shard} if replicate > 1 else {})


PACKED, PADDED = {"layout": "packed", "budget": 40, "cached": True}, {"layout": "padded", "budget": 54}
SPLIT = {"dtype": "float64", "split": True}
COUNTED = {"dtype": "float64", **PADDED, "cached": True, "count": True}  # of the policy's collectives alone


def check_gradients(group, ranks, cases, tmp_path):
    """Each case has the naive loop's gradient and norm, the group's timeout, the formula's traffic where counted, and,
    where it was split before, the naive loop's norms and cosine of its two terms. Returns the gradients.
    """
    expected = naive_gradient()
    norm = sum((grad**2).sum() for grad in expected.values()).sqrt().item()
    pulls, results = naive_split(), run_on(ranks, cases, tmp_path)
    for case, (gradient, facts) in zip(cases, results, strict=True):
        tolerance = TOLERANCE[getattr(torch, case["dtype"])]
        assert relative(gradient, expected) <= tolerance, case
        assert facts["norm"] == pytest.approx(norm, rel=tolerance), case
        assert facts["split"] == (pytest.approx(pulls, rel=tolerance) if case.get("split") else {}), case
        assert facts["microbatches"] > 1 and set(facts["timeouts"]) == {TIMEOUT}, case
        if case.get("count"):
            replicate = case.get("replicate_degree", 1)
            assert facts["traffic"] == expected_traffic(case, ranks // replicate, replicate, facts["microbatches"]), (
                case
            )
    return [gradient for gradient, _ in results]


def test_two_ranks_have_the_gradient_of_one(group, tmp_path):
    """Two gloo ranks, three or four micro-batches each, one with a filler: the naive loop's gradient to the dtype's bound.

    Whether they share one copy of the weights or hold one each (HSDP); replicas are summed once per step, even where
    gradients are sharded between micro-batches. So have the two terms, looked at one by one before (`split`).
    """
    for how in ({"layout": "packed", "budget": 40}, {"layout": "padded", "budget": 54}):
        plans = [schedule.plan_step(rows(), np.arange(8), rank=rank, world_size=2, **how) for rank in range(2)]
        assert len(plans[0].microbatches) >= 3, how
        assert any(weight == 0 for plan in plans for _, weight in plan.microbatches), how
    cases = [SPLIT | PACKED, SPLIT | PADDED | {"dtype": "float32", "accumulate": "sharded"}, COUNTED]
    cases += [SPLIT | PACKED | {"replicate_degree": 2}, COUNTED | {"accumulate": "sharded"}]
    cases += [SPLIT | COUNTED | {"accumulate": how, "replicate_degree": 2} for how in ("unsharded", "sharded")]
    cases += [COUNTED | {"reshard_after_forward": False, "accumulate": how} for how in ("unsharded", "sharded")]
    gradients = check_gradients(group, 2, cases, tmp_path)
    for i, j in ((2, -2), (4, -1)):  # weights gathered once, and twice a micro-batch
        assert all(torch.equal(grad, gradients[j][name]) for name, grad in gradients[i].items())


@pytest.mark.slow
def test_four_ranks_have_the_gradient_of_one(group, tmp_path):
    """The same on four ranks as two replicas of two shards, and as four of either."""
    cases = [COUNTED | {"accumulate": how, "replicate_degree": 2} for how in ("unsharded", "sharded")]
    cases = [case | {"budget": 28} for case in cases + [COUNTED, COUNTED | {"replicate_degree": 4}]]
    cases += [SPLIT | {"layout": "packed", "budget": 28, "replicate_degree": 2, "shard_degree": 2}]
    check_gradients(group, 4, cases, tmp_path)


def test_two_ranks_make_the_run_of_one(tiny, tmp_path):
    """torchrun with two ranks logs one process's losses to 1e-4 relative over 20 steps; packed, and each scores its cache.

    A tied model, an epoch whose last step has fewer pairs (1) than ranks, and sampling on the way; the saved folder
    has the same tensors and the same answers.
    """
    make_lm("gemma").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    runs, folders = [], [tmp_path / "1", tmp_path / "2"]
    for ranks, run_dir in enumerate(folders, start=1):
        args = tiny_args(tiny, "loss=rpo_avg", "batch_size=13", "max_steps=20", "log_every=1", "eval_every=10")
        args += [
            f"model.path={tmp_path / 'model'}",
            "tokens_per_microbatch=150",
            "sample_every=20",
            f"run_dir={run_dir}",
            f"reference.cache_dir={tmp_path / f'cache{ranks}'}",
        ]
        done = subprocess.run(command("train.py", *args, ranks=ranks), env=script_env(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        runs.append([json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()])
        environment = json.loads((run_dir / "environment.json").read_text())
        assert (environment["layout"], environment["world_size"]) == ("packed", ranks)
        assert {name: found["scored"] for name, found in environment["reference"].items()} == {"train": 40, "eval": 12}
    one, two = runs
    assert [(e["split"], e["step"], e["pairs"]) for e in one] == [(e["split"], e["step"], e["pairs"]) for e in two]
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "loss/preference", "loss/sft", "logps/chosen", "nll/chosen"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["split"], a["step"], name)
    assert one[0]["loss/preference"] == pytest.approx(np.log(2), abs=1e-5)
    weights = [load_file(folder / "model/model.safetensors") for folder in folders]
    assert weights[0].keys() == weights[1].keys() and not any("lm_head" in name for name in weights[0])
    assert relative(weights[1], weights[0]) < 1e-3
    first = [(folder / "samples.jsonl").read_text().splitlines()[:4] for folder in folders]
    assert first[0] == first[1] and len(first[0]) == 4


@pytest.mark.slow
def test_two_ranks_stop_alike(tiny, tmp_path):
    """Ctrl-C under torchrun ends both ranks after one step, with a checkpoint of it; a loss that is not finite saves the
    model before it.
    """
    args = tiny_args(tiny, "loss=dpo", "batch_size=4", "log_every=100000", "eval_every=0")
    stopped, broken = tmp_path / "stopped", tmp_path / "broken"
    process = subprocess.Popen(
        command("train.py", *args, "epochs=100000", f"run_dir={stopped}", ranks=2),
        env=script_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    for _ in range(600):
        if (stopped / "metrics.jsonl").exists() and (stopped / "metrics.jsonl").read_text():
            break
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    status = json.loads((stopped / "status.json").read_text())
    assert status["state"] == "interrupted" and status["step"] > 0, status
    assert json.loads((stopped / "checkpoints/latest/state.json").read_text())["step"] == status["step"]

    args = [*args, "optim.lr=1e30", "optim.warmup_ratio=0", "max_steps=6", "log_every=3", f"run_dir={broken}"]
    done = subprocess.run(command("train.py", *args, ranks=2), env=script_env(), capture_output=True, text=True)
    assert done.returncode == 1 and "not finite" in done.stderr
    assert all(tensor.isfinite().all() for tensor in load_file(broken / "model/model.safetensors").values())


@pytest.mark.parametrize(
    ("degrees", "named"),
    [
        ({"shard_degree": 2}, "fsdp.shard_degree=2, fsdp.replicate_degree=1: "),
        ({"replicate_degree": 2}, "fsdp.shard_degree=null, fsdp.replicate_degree=2: "),
        ({"shard_degree": 1, "replicate_degree": 3}, "fsdp.shard_degree=1, fsdp.replicate_degree=3: "),
    ],
)
def test_degrees_are_the_world_size(group, degrees, named):
    """Degrees that do not multiply to the world size are refused in one line with both, the world size and the fix."""
    fix = "must be the world size, 1; set fsdp.shard_degree=null and fsdp.replicate_degree to one of 1"
    with pytest.raises(UserError, match=re.escape(named) + ".*" + re.escape(fix) + "$"):
        mesh(group, dataclasses.replace(PLAIN, **degrees))


def test_a_group_of_one_is_left_alone_between_jobs(group):
    """A second init keeps the group that is up, as a sweep's next cell needs; shutdown twice is harmless."""
    assert dist.init() == group and dist.world_size() == 1
    dist.shutdown()
    dist.shutdown()
