"""One gradient, whatever the micro-batches, the ranks, the sharding; and one run, whatever the ranks."""

import json
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rpo import dist
from tests.conftest import command, make_lm, script_env, tiny_args
from tests.step_gradient import LOSS, VOCABULARY, moved_copy, rows, step_gradient

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def relative(a, b):
    """Relative L2 distance over all parameters."""
    assert a.keys() == b.keys()
    gap = sum(((a[k].double() - b[k].double()) ** 2).sum() for k in a).sqrt()
    return (gap / sum((b[k].double() ** 2).sum() for k in b).sqrt()).item()


def naive_gradient():
    """The same step by one plain loop: one response at a time, full logits, the formulas written out; float64."""
    lm = make_lm(vocab_size=VOCABULARY).double()
    reference = moved_copy(lm)

    def logp(model, prompt, response):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        return logps[len(prompt) - 1 :].sum()

    dpo = nll = 0
    for i in range(8):
        prompt, chosen, rejected = rows().row(i)
        with torch.no_grad():
            ref_margin = logp(reference, prompt, chosen) - logp(reference, prompt, rejected)
        chosen_logp = logp(lm, prompt, chosen)
        dpo = dpo - F.logsigmoid(LOSS.beta * (chosen_logp - logp(lm, prompt, rejected) - ref_margin))
        nll = nll - chosen_logp
    (dpo / 8 + LOSS.eta * nll / int(rows().chosen.sum())).backward()
    return {f"lm.{name}": param.grad for name, param in lm.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_gradient_under_any_cut(group, dtype):
    """1x8, 8x1, 3+5 by hand, a token budget, sharded accumulation and checkpointing all equal the naive loop."""
    expected = naive_gradient()
    one_by_one, three_five = [[i] for i in range(8)], [[0, 3, 6], [1, 2, 4, 5, 7]]
    cases = [{}, {"cuts": one_by_one}, {"cuts": three_five}, {"budget": 70}]
    cases += [{"budget": 70, "accumulate": "sharded"}, {"checkpointing": "full"}, {"checkpointing": "selective"}]
    for case in cases:
        assert relative(step_gradient(dtype, **case), expected) <= TOLERANCE[dtype], case


@pytest.mark.parametrize("accumulate", ["unsharded", "sharded"])
def test_two_ranks_have_the_gradient_of_one(group, tmp_path, accumulate):
    """Two gloo ranks, several micro-batches each, one with a filler: the naive loop's gradient to 1e-12."""
    out = tmp_path / "gradients.pt"
    args = command("tests/step_gradient.py", out, "float64", 110, accumulate, ranks=2)
    subprocess.run(args, env=script_env(), check=True, capture_output=True, timeout=120)
    assert relative(torch.load(out), naive_gradient()) <= 1e-12


def test_two_ranks_make_the_run_of_one(tiny, tmp_path):
    """torchrun with two ranks and the live reference logs one process's losses to 1e-4 relative over 20 steps."""
    runs = []
    for ranks in (1, 2):
        run_dir = tmp_path / str(ranks)
        args = tiny_args(tiny, "loss=rpo_avg", "batch_size=8", "max_steps=20", "log_every=1", "eval_every=10")
        args += ["tokens_per_microbatch=150", f"run_dir={run_dir}"]
        done = subprocess.run(command("train.py", *args, ranks=ranks), env=script_env(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        runs.append([json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()])
    one, two = runs
    assert [(e["split"], e["step"], e["pairs"]) for e in one] == [(e["split"], e["step"], e["pairs"]) for e in two]
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "loss/preference", "loss/sft", "logps/chosen", "nll/chosen"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["split"], a["step"], name)
    assert one[0]["loss/preference"] == pytest.approx(np.log(2), abs=1e-5)


def test_a_group_of_one_is_left_alone_between_jobs(group):
    """A second init keeps the group that is up, as a sweep's next cell needs; shutdown twice is harmless."""
    assert dist.init() == group and dist.world_size() == 1
    dist.shutdown()
    dist.shutdown()
