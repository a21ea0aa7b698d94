"""Runs without a reference, and with one that moves: what is loaded, what is measured, and the weights that come out."""

import math

import pytest
import torch
from safetensors.torch import load_file

from rpo.errors import UserError
from rpo.training import prepare
from rpo.training.meter import PER_PAIR_REFERENCE
from tests.helpers.runs import run, timeless, weights

MOVING = (
    "reference=moving",
    "reference.every=2",
    "reference.alpha=0.25",
    "optim.schedule=constant",
    "optim.warmup_ratio=0",
)


@pytest.mark.parametrize("loss", ["simpo", "cpo", "orpo"])
def test_without_a_reference_none_is_loaded_or_scored(loss, tiny, tmp_path, monkeypatch):
    """No second model, no cache, no metric against one; the loss falls; killed and resumed it is the same to the bit."""
    monkeypatch.setattr(prepare.reference_cache, "score_rows", None)
    monkeypatch.setattr(prepare, "_frozen", lambda spec, *_: spec and 1 / 0)
    args = (f"loss={loss}", "optim.lr=1e-2", "optim.schedule=constant", "optim.warmup_ratio=0", "checkpoint.every=2")
    events = run(tiny, tmp_path / "run", f"cache_dir={tmp_path / 'cache'}", *args, "max_steps=6")
    assert not (tmp_path / "cache" / "reference").exists()
    assert not any(event.keys() & {*PER_PAIR_REFERENCE, "shift_per_token/chosen"} for event in events)
    held_out = [event for event in events if event["split"] == "eval"]
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    assert all(0 <= event["rewards/accuracies"] <= 1 for event in held_out)
    margin = held_out[-1]["rewards/chosen"] - held_out[-1]["rewards/rejected"]
    assert held_out[-1]["rewards/margins"] == pytest.approx(margin)
    run(tiny, tmp_path / "half", *args, "max_steps=4")
    resumed = run(tiny, tmp_path / "half", *args, "max_steps=6")
    assert timeless(resumed)[-1] == timeless(events)[-1]
    with pytest.raises(
        UserError, match=f"reference.path=.* with loss.preference={loss}: it has no reference; leave it null"
    ):
        run(tiny, tmp_path / "path", *args, f"reference.path={tiny / 'model'}")
    with pytest.raises(UserError, match="checkpoint.best=min:shift/chosen: no such metric of data.eval"):
        run(tiny, tmp_path / "best", *args, "checkpoint.best=min:shift/chosen", "eval_every=2")


def test_a_reference_moves_as_its_formula_says(tiny, tmp_path):
    """Every second update theta_ref <- alpha theta + (1 - alpha) theta_ref, by the checkpoints of one run."""
    run(tiny, tmp_path / "run", *MOVING, "max_steps=4", "checkpoint.every=1", "checkpoint.keep=4")
    saved = {step: checkpoint(tmp_path / "run", step) for step in (1, 2, 3, 4)}
    start = load_file(tiny / "model" / "model.safetensors")
    assert len(start) > 5
    for name, weight in start.items():
        of = {step: saved[step][f"reference/lm.{name}"] for step in saved}
        assert torch.equal(of[1], weight) and torch.equal(of[3], of[2])
        expected = weight.double()
        for step in (2, 4):
            expected = 0.25 * saved[step][f"weight/lm.{name}"].double() + 0.75 * expected
            assert not torch.equal(of[step], of[step - 1])
            torch.testing.assert_close(of[step].double(), expected, rtol=0, atol=1e-6)


def test_a_moving_reference_is_of_the_loss_alone(tiny, tmp_path):
    """alpha = 1 after every update: the policy is its own reference, so every loss is ln 2; metrics are against the start."""
    args = ("loss=dpo", "reference=moving", f"cache_dir={tmp_path / 'cache'}")
    events = run(tiny, tmp_path / "run", *args, "reference.every=1", "reference.alpha=1")
    for event in events:
        assert event["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(events[-1]["shift/chosen"]) > 1e-3 and abs(events[-1]["rewards/margins"]) > 1e-4
    still = run(tiny, tmp_path / "still", *args, "reference.every=99")
    live = run(tiny, tmp_path / "live", "loss=dpo", "reference=live")
    for a, b in zip(still, live, strict=True):
        assert a["loss"] == b["loss"] and a["shift/chosen"] == pytest.approx(b["shift/chosen"], abs=1e-4)
    cached = run(tiny, tmp_path / "cached", "loss=dpo", f"cache_dir={tmp_path / 'cache'}")
    assert [e["shift/chosen"] for e in still] == [e["shift/chosen"] for e in cached]


def test_a_moving_reference_of_no_loss_or_adapter_is_refused(tiny, tmp_path):
    """A loss without a reference would not read it; an adapter's is its own base, which stands still."""
    with pytest.raises(UserError, match="reference=moving with loss.preference=simpo: it has no reference"):
        run(tiny, tmp_path / "run", "loss=simpo", *MOVING)
    pytest.importorskip("peft", reason="peft is not installed (pip install -e '.[lora]')")
    with pytest.raises(UserError, match="reference=moving: an adapter's reference is its base, which stands still"):
        run(tiny, tmp_path / "run", "model.lora.r=2", *MOVING)


@pytest.mark.parametrize("more", [(), ("fsdp.reshard_after_forward=false", "fsdp.activation_checkpointing=full")])
def test_a_moving_reference_resumes_to_the_bit(more, tiny, tmp_path):
    """Its weights are in the checkpoint: three updates and three more are six."""
    args = (*MOVING, *more, "checkpoint.every=1")
    whole = run(tiny, tmp_path / "whole", *args, "max_steps=6")
    run(tiny, tmp_path / "half", *args, "max_steps=3")
    assert timeless(run(tiny, tmp_path / "half", *args, "max_steps=6"))[-1] == timeless(whole)[-1]
    half, whole = (weights(tmp_path / name / "model") for name in ("half", "whole"))
    assert all(torch.equal(half[name], whole[name]) for name in whole)


def checkpoint(folder, step):
    files = (folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
