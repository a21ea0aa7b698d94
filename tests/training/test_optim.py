"""rpo.training.optim: the schedule by hand, AdamW as torch's plain one, and updates that a non-finite number cannot reach."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.torch_version import TorchVersion
from transformers import Trainer

from rpo import losses
from rpo.config import Optim
from rpo.errors import UserError
from rpo.model.shard import PLAIN, mesh
from rpo.training import optim
from tests.helpers.models import make_lm, prepared
from tests.helpers.runs import settings, tiny_args
from train import train

CFG = Optim(
    lr=1e-2,
    warmup_ratio=0.2,
    schedule="cosine",
    min_lr_ratio=0.0,
    betas=[0.9, 0.99],
    weight_decay=0.1,
    max_grad_norm=1.0,
    state_dtype="float32",
)
CPU = torch.device("cpu")


def make_model(*, shard=True, device=CPU):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3)).to(device)
    return fully_shard(model, mesh=mesh(device, PLAIN)) if shard else model


def set_gradients(model, seed, poison=0.0):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=generator).to(param.device) + poison
        is_sharded = isinstance(param, DTensor)
        param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if is_sharded else grad


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def flat_gradient(model):
    return torch.cat([whole(param.grad).flatten() for param in model.parameters()])


@pytest.mark.parametrize(
    "schedule,min_lr_ratio,expected",
    [
        # 10 updates, 2 of them warm-up; the decay is seen at shares 0, 1/4, 1/2 and 7/8 of what is left
        ("constant", 0.0, {0: 0.5, 1: 1, 2: 1, 4: 1, 6: 1, 9: 1}),
        ("linear", 0.0, {0: 0.5, 1: 1, 2: 1, 4: 0.75, 6: 0.5, 9: 0.125}),
        ("linear", 0.1, {0: 0.5, 1: 1, 2: 1, 4: 0.775, 6: 0.55, 9: 0.2125}),
        ("cosine", 0.0, {0: 0.5, 1: 1, 2: 1, 4: 0.853553, 6: 0.5, 9: 0.038060}),
        ("cosine", 0.1, {0: 0.5, 1: 1, 2: 1, 4: 0.868198, 6: 0.55, 9: 0.134254}),
    ],
)
def test_schedule_by_hand(schedule, min_lr_ratio, expected):
    """The rate of chosen updates, as a share of the peak."""
    cfg = replace(CFG, schedule=schedule, min_lr_ratio=min_lr_ratio)
    shares = {step: optim.lr_at(step, 10, cfg) / cfg.lr for step in expected}
    assert shares == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 1.0])
def test_schedule_has_no_dead_update(schedule, warmup_ratio):
    """Whatever the length and warm-up, every update has a positive rate of at most the peak; a run of one has the peak."""
    cfg = replace(CFG, schedule=schedule, warmup_ratio=warmup_ratio)
    for total in (1, 2, 7, 100):
        assert all(0 < optim.lr_at(step, total, cfg) <= cfg.lr for step in range(total))
    assert optim.lr_at(0, 1, cfg) == cfg.lr


def test_only_matrices_decay(group):
    """Weight decay is on exactly the trainable parameters of two or more dimensions; frozen ones are left out."""
    model = make_model()
    model[2].requires_grad_(False)
    decay = {id(p): g["weight_decay"] for g in optim.adamw(model, CFG).param_groups for p in g["params"]}
    named = {name: decay.get(id(param)) for name, param in model.named_parameters()}
    assert named == {"0.weight": 0.1, "0.bias": 0, "1.weight": 0, "1.bias": 0, "2.weight": None, "2.bias": None}


@pytest.mark.parametrize(
    ("family", "sizes", "exempt"),
    [
        ("cohere", {"use_qk_norm": True}, "q_norm.weight k_norm.weight"),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 2}, "up_proj_bias down_proj_bias"),
    ],
)
def test_matrices_that_are_norms_or_biases_do_not_decay(family, sizes, exempt, group):
    """Of the parameters of two or more dimensions those decay that transformers' Trainer decays."""
    lm = make_lm(family, **sizes)
    theirs = set(Trainer.get_decay_parameter_names(None, lm))
    matrices = {name for name, param in lm.named_parameters() if param.ndim >= 2}
    assert all(any(name.endswith(end) for name in matrices - theirs) for end in exempt.split())
    model = prepared(lm, group, activation_checkpointing="full")
    decay = {id(p) for g in optim.adamw(model, CFG).param_groups if g["weight_decay"] for p in g["params"]}
    ours = {name.replace("_checkpoint_wrapped_module.", "") for name, p in model.named_parameters() if id(p) in decay}
    assert ours == {f"lm.{name}" for name in theirs & matrices}


def test_fused_is_plain_adamw(group):
    """Six updates with changing rates equal torch's single-tensor AdamW, to 1e-6."""
    model, plain = make_model(), make_model(shard=False)
    ours = optim.adamw(model, CFG)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.99), foreach=False, fused=False)
    for step in range(6):
        lr = optim.lr_at(step, 6, CFG)
        set_gradients(model, step), set_gradients(plain, step)
        optim.step_if_finite(ours, torch.tensor(False), lr)
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
    for ours_param, theirs_param in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(ours_param), theirs_param, rtol=1e-6, atol=1e-6)


def test_a_flagged_step_changes_nothing(group):
    """With the flag set weights, moments and step count stay bit for bit, NaN gradients or not; then it goes on."""
    model, untouched = make_model(), make_model()
    optimizer, other = optim.adamw(model, CFG), optim.adamw(untouched, CFG)
    for step in range(3):
        for seed, bad, poison in ((step, False, 0.0), (99, True, 0.0), (99, True, math.nan)):
            set_gradients(model, seed, poison)
            optim.step_if_finite(optimizer, torch.tensor(bad), 1e-2)
        set_gradients(untouched, step)
        optim.step_if_finite(other, torch.tensor(False), 1e-2)
    for ours, theirs in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(whole(ours), whole(theirs))
        assert optimizer.state[ours]["step"] == other.state[theirs]["step"] == 3
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(whole(optimizer.state[ours][moment]), whole(other.state[theirs][moment]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_begin_at_zero(dtype, group):
    """Each parameter has moments in state_dtype and a step count of 0 from the start, sharded as it is itself."""
    model = make_model()
    optimizer = optim.adamw(model, replace(CFG, state_dtype=str(dtype).removeprefix("torch.")))
    for param in model.parameters():
        state = optimizer.state[param]
        assert state["step"] == 0
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == dtype and state[name].placements == param.placements
            assert state[name].shape == param.shape and not whole(state[name]).any()


def test_moments_are_what_the_first_update_makes(group):
    """Updates that find their state equal, bit for bit, those of an AdamW that makes it itself."""
    ours, theirs = make_model(), make_model()
    optimizer, lazy = optim.adamw(ours, CFG), optim.adamw(theirs, CFG)
    lazy.state.clear()
    for _ in range(3):
        for model, steps in ((ours, optimizer), (theirs, lazy)):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optim.step_if_finite(steps, torch.tensor(False), 1e-2)
    assert all(torch.equal(whole(a), whole(b)) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    ("device_type", "version", "message"),
    [
        ("cpu", "2.13.0", "the CPU's fused"),
        ("cuda", "2.11.0+cu130", "torch 2.12 or newer, this is 2.11"),
        ("cuda", "2.12.1", None),
    ],
)
def test_moments_that_a_kernel_lacks_are_refused(device_type, version, message, monkeypatch):
    """bfloat16 moments need CUDA and torch 2.12: else one line; float32 ones are always there."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    optim.check_moments("float32", device_type)
    with pytest.raises(UserError, match=f"optim.state_dtype=bfloat16: .*{message}") if message else nullcontext():
        optim.check_moments("bfloat16", device_type)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.__version__ < (2, 12), reason="needs a CUDA device, torch 2.12"
)
def test_bfloat16_moments(group):
    """Updates by moments that stay bfloat16 leave fp32 weights within 2% of the way that fp32 moments take them.

    A flagged step leaves weights, moments and step count alone, NaN gradients or not.
    """
    models = [make_model(device=group) for _ in range(2)]
    ours, theirs = optim.adamw(models[0], replace(CFG, state_dtype="bfloat16")), optim.adamw(models[1], CFG)
    start = [whole(param).clone() for param in models[0].parameters()]
    for step in range(6):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            set_gradients(model, step)
            optim.step_if_finite(optimizer, torch.tensor(False, device=group), 1e-2)
            set_gradients(model, 99, math.nan)
            optim.step_if_finite(optimizer, torch.tensor(True, device=group), 1e-2)
    for half, full, begun in zip(*(model.parameters() for model in models), start, strict=True):
        assert {ours.state[half][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
        assert half.dtype == torch.float32 and ours.state[half]["step"] == 6
        gap, way = (whole(half) - whole(full)).norm(), (whole(full) - begun).norm()
        assert 0 < gap <= 0.02 * way, (gap / way).item()


def test_clip_grad_norm(group):
    """Returns the norm before clipping; gradients are scaled to max_norm where above it and left alone below."""
    model = make_model()
    set_gradients(model, 0)
    before = flat_gradient(model)
    for max_norm in (math.inf, 1e3, 1.0):
        norm = optim.clip_grad_norm(model, max_norm)
        torch.testing.assert_close(norm, before.norm())
        torch.testing.assert_close(
            flat_gradient(model), before * min(1, max_norm / before.norm().item()), rtol=1e-5, atol=1e-7
        )


def test_a_non_finite_loss_never_reaches_the_weights(tiny, tmp_path, monkeypatch):
    """One micro-batch's loss of step 2 is infinite with finite gradients: the saved model is that of two steps.

    The run stops at the next log and names the step and its rows; the micro-batches and updates after are lost.
    """
    args = ["batch_size=8", "tokens_per_microbatch=100", "optim.warmup_ratio=0", "optim.schedule=constant"]
    args += ["eval_every=0", "log_every=4", "data.eval=null"]
    train(settings(*tiny_args(tiny, *args, "max_steps=2", f"run_dir={tmp_path / 'two'}")))

    pairs_left, objective = [2 * 8 + 1], losses.objective

    def poisoned(loss, pairs, **counts):
        preference_P, sft_P = objective(loss, pairs, **counts)
        before, pairs_left[0] = pairs_left[0], pairs_left[0] - len(preference_P)
        return (preference_P + math.inf if pairs_left[0] <= 0 < before else preference_P), sft_P

    monkeypatch.setattr(losses, "objective", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 2: .*train.jsonl.gz:\d+,"):
        train(settings(*tiny_args(tiny, *args, "max_steps=5", f"run_dir={tmp_path / 'five'}")))
    two, five = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("two", "five"))
    assert all(torch.equal(two[name], five[name]) for name in two)
    status = json.loads((tmp_path / "five" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 2) and "step 2" in status["reason"]
