"""What a run needs before its loop: a machine that can run it, rows, a policy verified at load, the reference's log-probs.

A builder marked `shared` is called once per sweep where its arguments are equal: they are all that it sees.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rpo import config, dist
from rpo.config import Train
from rpo.data import dataset, schedule
from rpo.data.batch import check_budget
from rpo.data.dataset import Rows, Splits
from rpo.data.tokenizer import check_vocabulary
from rpo.errors import UserError, require
from rpo.model import attention, fingerprint, four_bit, hf, lora, shard, spread
from rpo.model import policy as model_policy
from rpo.model import probe as model_probe
from rpo.model.policy import Policy
from rpo.model.probe import mean_gap, why_not_packed
from rpo.runs import folder as run_folder
from rpo.runs import log
from rpo.text import human
from rpo.training import meter, optim
from rpo.training import reference as reference_cache
from rpo.training.meter import ModelSize
from rpo.training.reference import Reference
from rpo.training.sweep import in_sweep, shared

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NUM_PROBE_PAIRS = 4  # in four passes: seconds of a small model on a CPU

load_splits = shared(dataset.load_splits)


# ---- before a model is loaded


def check_machine(cfg: Train, device: torch.device) -> None:
    """Raises UserError for what these processes, this device or this environment cannot do."""
    log.wandb_mode(cfg.wandb)
    log.check_tensorboard(cfg.log)
    embedded = cfg.data.train == "gold"
    for key, metric in {"checkpoint.best": cfg.checkpoint.best, "stop.metric": cfg.stop.metric}.items():
        meter.check_metric(key, metric, cfg.loss, embedded=embedded)
    if cfg.batch_size < dist.world_size():
        raise UserError(f"batch_size={cfg.batch_size}: fewer pairs than the {dist.world_size()} ranks; raise it")
    shard.mesh(device, cfg.fsdp)  # its degrees must fit the world size
    if cfg.fsdp.cpu_offload and device.type == "cpu":
        raise UserError("fsdp.cpu_offload=true: there is no GPU to offload from; set it to false")
    optim.check_moments(cfg.optim.state_dtype, "cpu" if cfg.fsdp.cpu_offload else device.type)
    if cfg.model.load_in_4bit:
        four_bit.check(device)
    if cfg.layout.kind != "padded" and cfg.layout.attention != "auto":
        attention.choose(cfg.layout.attention, device, shard.compute_dtype(cfg.model.dtype, device))


def model_configs(cfg: Train) -> dict[str, PreTrainedConfig]:
    """The configs of the models that `cfg` names, by key; no weight is loaded.

    Raises UserError: no causal LM there, a preference run's own model as its silent reference.
    """
    named = {"model.path": (cfg.model.path, cfg.model.revision), "reference.path": (cfg.reference.path, None)}
    configs = {
        key: hf.check(path, revision, key=key, trust_remote_code=cfg.model.trust_remote_code)
        for key, (path, revision) in named.items()
        if path is not None
    }
    if cfg.loss.has_reference and cfg.reference.path is None:
        run_folder.check_starting_model(cfg.model.path)
    require(
        cfg.loss.has_reference or cfg.reference.path is None,
        f"reference.path={cfg.reference.path} with loss.preference={cfg.loss.preference}: it has no reference; leave it null",
    )
    moves, has_adapter = cfg.reference.kind == "moving", cfg.model.lora.r is not None
    require(
        cfg.loss.has_reference or not moves,
        f"reference=moving with loss.preference={cfg.loss.preference}: it has no reference; leave it out",
    )
    if cfg.model.path is not None and (own := lora.found(cfg.model.path, cfg.model.revision)):
        has_adapter, base = True, own.base_model_name_or_path
        fix = "leave it null to train that on, or merge it (python -m rpo.export) to start a new one"
        require(
            cfg.model.lora.r is None, f"model.lora.r={cfg.model.lora.r}: {cfg.model.path} is an adapter already; {fix}"
        )
        require(
            not cfg.loss.has_reference or cfg.reference.path is not None,
            f"reference.path=null with model.path={cfg.model.path}: which is an adapter on {base}, and either may be the "
            f"reference; set reference.path={cfg.model.path} (as it starts) or reference.path={base}",
        )
    require(
        not (moves and has_adapter),
        "reference=moving: an adapter's reference is its base, which stands still; use live or cached",
    )
    merged, dtype = cfg.model.save_merged, cfg.model.save_dtype
    require(has_adapter or not merged, "model.save_merged=true: there is no adapter; give model.lora.r=16")
    require(
        not has_adapter or merged or dtype == "auto",
        f"model.save_dtype={dtype} with an adapter, whose few weights stay float32; leave it auto, or set "
        "model.save_merged=true, whose folder it is for",
    )
    require(
        has_adapter or not cfg.model.load_in_4bit,
        "model.load_in_4bit=true: weights of four bits cannot be trained, only an adapter on them; give model.lora.r=16",
    )
    return configs


def check_fit(
    cfg: Train, configs: dict[str, PreTrainedConfig], data: Splits, device: torch.device, *, embedded: bool
) -> dict[str, PreTrainedConfig]:
    """`configs`, and that of a model to be built. Raises UserError where tokens, positions, the budget or memory do not fit."""
    if cfg.model.path is None:
        configs = configs | {"model.architecture": hf.config_for(cfg.model.architecture, data.tokenizer)}
    trust = cfg.model.trust_remote_code
    if cfg.model.tokenizer is not None and cfg.model.path is not None:
        check_vocabulary(data.tokenizer, cfg.model.path, cfg.model.revision, key="model.path", trust=trust)
    if cfg.reference.path is not None:
        path, used = cfg.reference.path, data.used_ids
        check_vocabulary(data.tokenizer, path, None, key="reference.path", trust=trust, used=used)
    hf.check_fit(configs, data.longest, data.largest_id, distributions=embedded)  # whose KL is measured
    check_memory(cfg, configs.get("model.path") or configs["model.architecture"], device)
    check_budgets(data, "padded" if cfg.layout.kind == "padded" else "packed", cfg.tokens_per_microbatch)
    return configs


def check_memory(cfg: Train, config: PreTrainedConfig, device: torch.device) -> None:
    """Raises UserError where a process's share of weights, gradients and moments alone exceeds the memory that it has."""
    if cfg.fsdp.cpu_offload:
        return
    compute = shard.compute_dtype(cfg.model.dtype, device).itemsize
    master = max(4, compute)
    moment = 2 if cfg.optim.state_dtype == "bfloat16" else master
    count = hf.count_parameters(config, trust_remote_code=cfg.model.trust_remote_code)
    has_adapter = cfg.model.lora.r is not None or (cfg.model.path and lora.found(cfg.model.path, cfg.model.revision))
    each = 2 * (master + moment)
    if has_adapter:  # its own are few
        each = four_bit.BYTES if cfg.model.load_in_4bit else compute
    # Four bits are whole on each process.
    sharers = 1 if cfg.model.load_in_4bit else dist.world_size() // cfg.fsdp.replicate_degree
    needed = int(each * count) // sharers
    room = dist.memory(device)
    if needed > room:
        key = "model.architecture" if cfg.model.path is None else f"model.path={cfg.model.path}"
        less = "more GPUs share them, optim.state_dtype=bfloat16 halves the moments"
        raise UserError(
            f"{key}: {'weights' if has_adapter else 'weights, gradients and moments'} take {human(needed)} of each process, "
            f"which has {human(room)}; "
            f"{less if device.type == 'cuda' else 'use a smaller model or more machines'}"
        )


def check_budgets(data: Splits, layout: str, budget: int) -> None:
    """Raises UserError where a pair of any split is larger than a micro-batch."""
    for rows in data.by_name.values():
        check_budget(rows, layout, budget)


# ---- models


@dataclass(frozen=True)
class Spec:
    """All that a run's settings say of one of its models."""

    key: str  # model.path or reference.path: what names it
    path: str | None  # None: random weights by `seed`
    revision: str | None
    trainable: bool
    model: config.Model
    layout: config.Layout
    fsdp: config.Fsdp
    compile: bool | str
    tokens_per_microbatch: int
    seed: int
    positions: int  # context length of policy and reference

    @classmethod
    def of_policy(cls, cfg: Train, configs: dict[str, PreTrainedConfig]) -> Spec:
        return cls(
            key="model.path",
            path=cfg.model.path,
            revision=cfg.model.revision,
            trainable=True,
            model=cfg.model,
            layout=cfg.layout,
            fsdp=cfg.fsdp,
            compile=cfg.compile,
            tokens_per_microbatch=cfg.tokens_per_microbatch,
            seed=cfg.seed,
            positions=hf.positions_of(configs),
        )

    def of_reference(self, path: str | None) -> Spec:
        """That of the frozen model at `path`, or of the policy's own starting weights."""
        source, revision = (path, None) if path else (self.path, self.revision)
        model = replace(self.model, lora=config.NO_ADAPTER)
        return replace(self, key="reference.path", path=source, revision=revision, trainable=False, model=model)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A sharded model and what was measured of it."""

    spec: Spec
    model: Policy
    size: ModelSize
    layout: str  # packed or padded: how this model's rows are laid out
    noise_floor: float  # nats per token by which rounding alone moves a log-prob
    identity: dict  # what its log-probs depend on beside the tokens
    base: dict | None  # the same of its base, where it has an adapter
    beginning: list[Tensor] = field(repr=False)  # this rank's weights and buffers, on the host; empty outside of sweeps


def load(spec: Spec, data: Splits, device: torch.device) -> Prepared:
    """The model of `spec`, verified, sharded, and ready to score `data` and to be trained.

    No weight is left gathered, so an optimizer may be made. Prints its size, and a line where layout=auto comes to padded.
    Raises UserError: what `hf.load` refuses; a model that cannot be packed where layout=packed was asked for.
    """
    compute = shard.compute_dtype(spec.model.dtype, device)
    master = torch.promote_types(compute, torch.float32)
    if spec.path is None:
        read = partial(hf.build, hf.config_for(spec.model.architecture, data.tokenizer), spec.seed, master)
    else:
        trust = spec.model.trust_remote_code
        read = partial(
            hf.load,
            spec.path,
            spec.revision,
            master,
            key=spec.key,
            trust_remote_code=trust,
            saved=spec.trainable,
            adapter=spec.model.lora,
            seed=spec.seed,
        )
    whole, lm = spread.load_once(read)
    size = ModelSize(**hf.sizes(lm))
    adapter = lora.named(lm)
    if dist.is_main():  # what follows takes seconds, of a large model a minute
        count = f"{sum(param.numel() for param in lm.parameters()):,} parameters"
        if adapter:
            count += f", {sum(param.numel() for _, param in adapter):,} of an adapter on {lora.targets(lm)}"
        print(f"{spec.key}: {count}; measuring what rounding and packing do to its log-probs", flush=True)
    layout = "padded"
    if spec.layout.kind != "padded":
        layout = _packed_unless(dist.on_main(why_not_packed, whole, data.longest), spec)
    weights = fingerprint.weights_digest(whole, adapter=spec.model.lora.r is None)  # a new one is made of the settings
    base = fingerprint.weights_digest(whole, adapter=False) if adapter else weights
    lm.base_digest = base if adapter and master == torch.float32 else None  # for who loads the adapter
    model = model_policy.prepare(
        lm,
        shard.mesh(device, spec.fsdp),
        spec.fsdp,
        compute_dtype=compute,
        compile=shard.compiles(spec.compile, device.type),
        trainable=spec.trainable,
        attention=spec.layout.attention if layout == "packed" else "sdpa",
        whole=whole,
        load_in_4bit=spec.model.load_in_4bit,
    )
    del whole
    rows = data.train
    indices = schedule.step_rows(0, len(rows), NUM_PROBE_PAIRS, spec.seed)
    plan = schedule.plan_step(rows, indices, layout="padded", budget=spec.tokens_per_microbatch)
    probe = plan.microbatches[0][0]
    with model_probe.naming_dtype(model):
        noise_floor = dist.broadcast(
            model_probe.noise_floor(model, rows, probe, device, positions=spec.positions, compute_dtype=compute)
        )
    if layout == "packed":  # again on these weights, this device, this backend, these rows
        gap = dist.broadcast(mean_gap((model, "packed"), (model, "padded"), rows=rows, indices=probe, device=device))
        differ = f"packed and padded differ by {gap:.1e} nats per token, rounding explains {noise_floor:.1e}"
        layout = _packed_unless(differ if not gap <= 3 * noise_floor + 1e-6 else None, spec)
    if spec.trainable and (compute != master or spec.fsdp.activation_checkpointing != "none"):
        with model_probe.naming_dtype(model):
            gap = model_probe.gradient_gap(model, rows, probe[:2], device, layout=layout)
        if not gap <= max(1e-4, 4 * torch.finfo(compute).eps):
            how = f"fsdp.activation_checkpointing={spec.fsdp.activation_checkpointing}"
            away = f"its gradient is {gap:.1%} away from that of none"
            raise UserError(
                f"{how}: {spec.key}={spec.path} does not recompute what it computed ({away}); use full or none"
            )
    shard.reshard(model)
    identity = fingerprint.identity(weights, model, compute_dtype=compute, device=device, layout=layout)
    model.dropouts = lora.dropouts(lm) if spec.trainable else []
    beginning = []
    if spec.trainable and in_sweep():
        beginning = [tensor.cpu().pin_memory() if tensor.is_cuda else tensor.clone() for tensor in _tensors(model)]
    of_base = identity | {"weights": base} if adapter else None
    return Prepared(spec, model, size, layout, noise_floor, identity, of_base, beginning)


_shared_policy = shared(load)


@shared
def _frozen(spec: Spec | None, data: Splits, device: torch.device) -> Prepared | None:
    """The resident reference of `spec`; None lets go of that of an earlier cell."""
    return None if spec is None else load(spec, data, device)


def policy(spec: Spec, data: Splits, device: torch.device) -> Prepared:
    """The model that is trained, at its starting weights; in a sweep loaded once and put back for each cell."""
    prepared = _shared_policy(spec, data, device)
    if prepared.beginning:
        restore(prepared)
    return prepared


@torch.no_grad()
def restore(prepared: Prepared) -> None:
    """Puts the weights back to what they were, bit for bit, and drops what an earlier cell left on them."""
    shard.reshard(prepared.model)
    for param in prepared.model.parameters():
        param.grad = None
    for tensor, start in zip(_tensors(prepared.model), prepared.beginning, strict=True):
        tensor.copy_(start)


def reference(cfg: Train, policy: Prepared, data: Splits, device: torch.device, *, embedded: bool) -> Reference:
    """The reference of a run that has one, `policy` being at its starting weights; an empty one for any other run.

    Raises UserError: what `load` and `reference.score_rows` refuse, and where policy and live reference are the same
    weights but disagree.
    """
    has_reference, cfg = cfg.loss.has_reference, cfg.reference
    kl = embedded and data.eval is not None  # on the embedded task, which needs more than log-probs of rows
    switched = is_own_base(policy, cfg)
    resident = has_reference and not switched and (kl or cfg.kind == "live")
    spec = policy.spec.of_reference(cfg.path)
    frozen = _frozen(spec if resident else None, data, device)
    if not has_reference:
        return Reference()
    if switched:
        frozen = replace(policy, model=lora.Base(policy.model), identity=policy.base)
    if cfg.kind == "live":
        weights = frozen.identity["weights"]
        if starts_as_reference(policy.spec, cfg):  # with a cache, reading it has shown the same
            layout = "padded" if "padded" in (policy.layout, frozen.layout) else "packed"
            _check_step_0(policy, frozen.model, data.train, device, layout=layout)
        return Reference({}, {"train": {"weights": weights}}, frozen.model, frozen.model, frozen.layout, weights)
    looked_up = _look_up(cfg, spec, _Borrowed(policy.spec, weakref.ref(policy)), data, device)
    logps = {name: sums for name, (sums, _) in looked_up.items()}
    reports = {name: report for name, (_, report) in looked_up.items()}
    model, weights = frozen.model if frozen else None, reports["train"]["weights"]
    if cfg.kind != "moving":
        return Reference(logps, reports, None, model, policy.layout, weights)
    moving = load(spec, data, device)  # not that which cells may share, and KL is against
    layout = "padded" if "padded" in (policy.layout, moving.layout) else "packed"
    _check_step_0(policy, moving.model, data.train, device, layout=layout)
    shard.reshard(moving.model)  # its own weights, not gathered ones, are part of the checkpoints
    return Reference(logps, reports, moving.model, model, moving.layout, weights, cfg.alpha, cfg.every)


def is_own_base(policy: Prepared, cfg: config.Reference) -> bool:
    """Whether the reference is the policy with its adapter off."""
    if policy.base is None:
        return False
    adapter = lora.found(policy.spec.path, policy.spec.revision)
    return starts_as_reference(policy.spec, cfg) if adapter is None else cfg.path == adapter.base_model_name_or_path


def starts_as_reference(policy: Spec, cfg: config.Reference) -> bool:
    """Whether the reference is the policy's own starting weights."""
    spec = policy.of_reference(cfg.path)
    return (spec.path, spec.revision) == (policy.path, policy.revision)


@dataclass(frozen=True)
class _Borrowed:
    """A model at the weights that its spec names: equal where the spec is, and not kept alive by being a key."""

    spec: Spec
    prepared: weakref.ref[Prepared] = field(compare=False)


@shared
def _look_up(
    cfg: config.Reference, spec: Spec, borrowed: _Borrowed, data: Splits, device: torch.device
) -> dict[str, tuple[np.ndarray, dict]]:
    """By split: the rows' log-probs, from the cache or scored into it, and where they came from."""
    policy = borrowed.prepared()
    if is_own_base(policy, cfg):
        model = replace(policy, model=lora.Base(policy.model), identity=policy.base)
    else:
        model = policy if starts_as_reference(policy.spec, cfg) else load(spec, data, device)
    looked_up = {}
    for name, rows in data.by_name.items():
        check_budget(rows, model.layout, spec.tokens_per_microbatch)
        looked_up[name] = reference_cache.score_rows(
            model.model,
            rows,
            model.identity,
            cache_dir=cfg.cache_dir,
            layout=model.layout,
            budget=spec.tokens_per_microbatch,
            device=device,
            noise_floor=model.noise_floor,
            name=name,
        )
        shard.reshard(model.model)
    del model
    gc.collect()  # a reference with a path of its own was resident until here, and is full of cycles
    return looked_up


def _check_step_0(policy: Prepared, live: Policy, rows: Rows, device: torch.device, *, layout: str) -> None:
    """Raises UserError unless two copies of the same weights agree on some pairs within rounding."""
    some, budget = np.arange(min(NUM_PROBE_PAIRS, len(rows))), policy.spec.tokens_per_microbatch
    members = schedule.plan_step(rows, some, layout=layout, budget=budget).microbatches[0][0]
    gap = dist.broadcast(mean_gap((policy.model, layout), (live, layout), rows=rows, indices=members, device=device))
    shard.reshard(policy.model)
    if not gap <= 3 * policy.noise_floor + 1e-6:
        raise UserError(
            f"step 0: policy and reference are the same weights but differ by {gap:.1e} nats per token (rounding "
            f"explains {policy.noise_floor:.1e}); usual causes: dropout, or two ways of computing one model"
        )


def _packed_unless(reason: str | None, spec: Spec) -> str:
    """The layout: packed where there is no reason against it. Raises UserError where it was asked for by name."""
    if reason is None:
        return "packed"
    if spec.layout.kind == "packed":
        raise UserError(f"layout=packed: {spec.key}={spec.path} cannot be packed ({reason}); use layout=padded or auto")
    if dist.is_main():
        print(f"layout=padded, because {spec.key}={spec.path} cannot be packed: {reason}", flush=True)
    return "padded"


def _tensors(policy: Policy) -> list[Tensor]:
    """This rank's share of each parameter that is trained, and the buffers (some rotary embeddings write theirs)."""
    return shard.shares(policy, trained=True) + list(four_bit.others(policy).values())
