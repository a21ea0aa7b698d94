"""rpo.training.gradients: each term's gradient against plain autograd, and a run that cannot tell whether it was looked at."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rpo.data import schedule
from rpo.data.batch import make_batch
from rpo.model import policy as model_policy
from rpo.model.policy import score
from rpo.model.shard import PLAIN
from rpo.training import gradients, meter
from tests.helpers.models import make_lm, prepared
from tests.helpers.runs import run, timeless, weights
from tests.helpers.step_gradient import (
    LOSS,
    VOCABULARY,
    naive_split,
    rows,
    step_and_facts,
)

NAMES = NORM, SFT_NORM, COSINE = meter.GRADIENT_SPLIT
TOTAL = 8  # pairs of LENGTHS


@pytest.mark.parametrize("sft", ["token", "sum", "avg"])
def test_each_term_is_autograds(group, sft):
    """Both norms and the cosine are plain autograd's to 1e-10 in float64, however the step is cut, laid out and scored."""
    loss = dataclasses.replace(LOSS, sft=sft, eta=0.3 if sft == "token" else 0.05)
    expected = naive_split(loss)
    assert all(math.isfinite(value) and abs(value) > 1e-3 for value in expected.values()), expected
    cases = [{"layout": "packed"}, {"budget": 70, "accumulate": "sharded", "checkpointing": "full"}]
    cases += [{"cuts": [[0, 3, 6], [1, 2, 4, 5, 7]], "cached": True}]
    for case in cases if sft == "token" else cases[1:2]:
        _, facts = step_and_facts(loss=loss, split=True, **case)
        assert facts["split"] == pytest.approx(expected, rel=1e-10), case
        a, b, cosine = facts["split"].values()
        assert facts["norm"] ** 2 == pytest.approx(a**2 + b**2 + 2 * a * b * cosine, rel=1e-10), case


def test_a_zero_gradient_has_no_direction(group):
    """Where hinge has every margin it wants its norm is 0, the SFT term's is not, and there is no cosine."""
    policy = prepared(make_lm(vocab_size=VOCABULARY), group)
    beaten = dataclasses.replace(rows(), ref_logps=np.tile([-1e4, 0.0], (TOTAL, 1)))
    plan = schedule.plan_step(beaten, np.arange(TOTAL), layout="padded", budget=10**6)
    batches = [make_batch(beaten, members, "padded") for members, _ in plan.microbatches]
    cfg = SimpleNamespace(loss=dataclasses.replace(LOSS, preference="hinge"), fsdp=PLAIN)
    found = gradients.gradient_split(policy, None, beaten, plan, batches, cfg, group)
    assert set(found) == {NORM, SFT_NORM} and found[NORM] == 0 < found[SFT_NORM]
    assert all(param.grad is None for param in policy.parameters())


def test_nothing_of_a_run_changes(tiny, tmp_path, monkeypatch):
    """A run that is looked at every second step ends in the weights of one that is not, bit for bit, even if its
    log-probs draw random numbers; its log has GRADIENT_SPLIT there, and is else the same.

    Those belong to the very update: with its norm before clipping they obey the law of cosines. A run that is begun
    without, and goes on with it, has the same from there on.
    """
    scored = score

    def noisy(policy, reference, batch):
        pairs = scored(policy, reference, batch)
        return dataclasses.replace(pairs, chosen_P=pairs.chosen_P * (1 + 0.1 * torch.rand(batch.num_pairs)))

    monkeypatch.setattr(model_policy, "score", noisy)
    args = ["loss=rpo_avg", "tokens_per_microbatch=150", "optim.max_grad_norm=0.01", "optim.schedule=constant"]
    args += ["data.eval=null", "checkpoint.every=1"]
    looked = "log.gradient_split=2"
    plain, every_second = run(tiny, tmp_path / "off", *args), run(tiny, tmp_path / "on", *args, looked)
    theirs, ours = (weights(tmp_path / name / "model") for name in ("off", "on"))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert not set(NAMES) & set().union(*plain)
    assert [set(NAMES) & set(event) for event in every_second] == [set(), set(NAMES)] * 2
    for event in every_second[1::2]:
        a, b, cosine = (event[name] for name in NAMES)
        assert event["grad_norm"] ** 2 == pytest.approx(a**2 + b**2 + 2 * a * b * cosine, rel=1e-5)
        assert event["grad_norm"] > 0.1
    assert timeless([{k: v for k, v in e.items() if k not in NAMES} for e in every_second]) == timeless(plain)

    run(tiny, tmp_path / "later", *args, "max_steps=2")
    later = run(tiny, tmp_path / "later", *args, looked)
    assert timeless(later[2:]) == timeless(every_second[2:])


@pytest.mark.parametrize(("loss", "name"), [("rpo_sum", NORM), ("dpo", NORM), ("sft", SFT_NORM)])
def test_one_term_alone_is_the_whole_gradient(tiny, tmp_path, loss, name):
    """Where a term is off, a run logs the other's norm, which is the update's before clipping."""
    args = [f"loss={loss}", "data.eval=null", "optim.max_grad_norm=0.01", "log.gradient_split=2"]
    events = run(tiny, tmp_path / "run", *args, *(["loss.eta=0"] if loss == "rpo_sum" else []))
    assert [set(NAMES) & set(event) for event in events] == [set(), {name}] * 2
    assert all(
        event[name] == pytest.approx(event["grad_norm"], rel=1e-5) and event[name] > 0.01 for event in events[1::2]
    )
