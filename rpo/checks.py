"""Settings of one run, made from Hydra's composed YAML and checked for contradictions.

Every check names the key, its value and the fix, before a model is loaded.
"""

import datetime
import math
import os
from dataclasses import replace
from typing import Any

from rpo import config
from rpo.config import Loss, Train
from rpo.errors import UserError


def require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _finite(key: str, value: float) -> None:
    require(math.isfinite(value), f"{key}={value}: expected a finite number")


def check_loss(loss: Loss) -> None:
    for name in ("beta", "eta", "label_smoothing"):
        _finite(f"loss.{name}", getattr(loss, name))
    require(loss.beta > 0, f"loss.beta={loss.beta}: expected > 0; for pure supervised training use loss=sft")
    require(
        loss.eta >= 0, f"loss.eta={loss.eta}: expected >= 0; the SFT term is a penalty and is added, never subtracted"
    )
    require(
        loss.eta == 0 or loss.sft != "none",
        f"loss.eta={loss.eta} with loss.sft=none: eta would do nothing; set loss.sft=sum|avg|token or loss.eta=0",
    )
    require(
        loss.preference != "none" or (loss.sft != "none" and loss.eta > 0),
        f"loss.preference=none with loss.sft={loss.sft}, loss.eta={loss.eta}: nothing to train on; use loss=sft",
    )
    require(
        0 <= loss.label_smoothing < 0.5,
        f"loss.label_smoothing={loss.label_smoothing}: expected 0 <= e < 0.5, the share of labels believed flipped",
    )
    require(
        loss.label_smoothing == 0 or loss.preference == "sigmoid",
        f"loss.label_smoothing={loss.label_smoothing} with loss.preference={loss.preference}: "
        "only sigmoid reads it; set it to 0",
    )


def check_seed(key: str, value: int) -> None:
    require(0 <= value < 2**31, f"{key}={value}: expected 0 or more, below 2^31")


def check_date(value: str) -> None:
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        raise UserError(f"data.template_date={value!r}: expected a date as YYYY-MM-DD") from None


def _check_checkpoint(cfg: Train) -> None:
    every, keep, best = cfg.checkpoint.every, cfg.checkpoint.keep, cfg.checkpoint.best
    require(every >= 0, f"checkpoint.every={every}: expected 0 (none) or a number of steps")
    require(keep == "all" or keep >= 1, f"checkpoint.keep={keep}: expected all or at least 1")
    if best is None:
        return
    require(
        best.startswith(("min:", "max:")),
        f"checkpoint.best={best}: expected min:METRIC or max:METRIC, one of data.eval's as docs/METRICS.md names them",
    )
    require(cfg.data.eval is not None, f"checkpoint.best={best} with data.eval=null: nothing is there to choose by")
    require(
        every > 0 and cfg.eval_every > 0 and every % cfg.eval_every == 0,
        f"checkpoint.best={best} with checkpoint.every={every}, eval_every={cfg.eval_every}: each checkpoint needs an "
        "evaluation; make checkpoint.every a multiple of eval_every",
    )


def _check_log(cfg: Train) -> None:
    every = cfg.log.gradient_split
    require(every >= 0, f"log.gradient_split={every}: expected 0 (off) or a number of steps")
    require(
        every % cfg.log_every == 0,
        f"log.gradient_split={every} with log_every={cfg.log_every}: what it finds stands in those lines; make it a "
        "multiple of log_every",
    )


def _check_train(cfg: Train) -> None:
    check_loss(cfg.loss)
    for name in ("epochs", "batch_size", "tokens_per_microbatch", "log_every", "timeout"):
        value = getattr(cfg, name)
        require(value >= 1, f"{name}={value}: expected at least 1")
    for name in ("eval_every", "sample_every"):
        value = getattr(cfg, name)
        require(value >= 0, f"{name}={value}: expected 0 (never) or a number of steps")
    require(cfg.max_steps is None or cfg.max_steps >= 1, f"max_steps={cfg.max_steps}: expected null or at least 1")
    _check_checkpoint(cfg)
    _check_log(cfg)
    check_seed("seed", cfg.seed)
    check_seed("data.gold.seed", cfg.data.gold.seed)
    require(cfg.data.train != [], "data.train=[]: expected a file, a list of files, or NAME:SPLIT")
    require(cfg.data.eval != [], "data.eval=[]: expected a file, a list of files, or NAME:SPLIT; null: no evaluation")
    optim = cfg.optim
    require(optim.lr == "auto" or optim.lr > 0, f"optim.lr={optim.lr}: expected auto or > 0")
    for name in ("warmup_ratio", "min_lr_ratio"):
        value = getattr(optim, name)
        require(0 <= value <= 1, f"optim.{name}={value}: expected a share of the run, 0 to 1")
    require(
        len(optim.betas) == 2 and all(0 <= b < 1 for b in optim.betas),
        f"optim.betas={optim.betas}: expected two numbers in [0, 1)",
    )
    require(optim.weight_decay >= 0, f"optim.weight_decay={optim.weight_decay}: expected >= 0")
    require(optim.max_grad_norm > 0, f"optim.max_grad_norm={optim.max_grad_norm}: expected > 0 (.inf: no clipping)")
    shard, replicate = cfg.fsdp.shard_degree, cfg.fsdp.replicate_degree
    require(
        shard is None or shard >= 1,
        f"fsdp.shard_degree={shard}: expected null (all the ranks that replicate_degree leaves) or at least 1",
    )
    require(replicate >= 1, f"fsdp.replicate_degree={replicate}: expected at least 1 (1: no replicas)")
    require(cfg.data.max_length >= 2, f"data.max_length={cfg.data.max_length}: expected at least 2 tokens")
    check_date(cfg.data.template_date)
    gold = cfg.data.gold
    require(
        gold.pairs >= 1 and gold.eval_pairs >= 1,
        f"data.gold.pairs={gold.pairs}, eval_pairs={gold.eval_pairs}: expected at least 1",
    )
    require(gold.samples >= 1, f"data.gold.samples={gold.samples}: expected at least 1")
    require(
        cfg.data.train != "gold" or cfg.data.eval in ("gold", None),
        f"data.eval={cfg.data.eval} with data.train=gold: the embedded task is evaluated on its own prompts; "
        "use data.eval=gold or null, or give data.train=FILE",
    )
    require(
        cfg.data.train != "gold" or cfg.data.chat_template is None,
        "data.chat_template with data.train=gold: the embedded task has its own template; set it to null",
    )
    require(
        cfg.data.train != "gold" or cfg.model.architecture is not None,
        "model.architecture=null with data.train=gold: the embedded task makes a model of that architecture; use "
        "model=tiny, or give data.train=FILE",
    )
    require(0 <= gold.flip < 0.5, f"data.gold.flip={gold.flip}: expected 0 <= share < 0.5")
    require(
        cfg.data.train == "gold" or cfg.data.eval != "gold",
        f"data.eval=gold with data.train={cfg.data.train}: give data.eval=FILE of your own, or data.eval=null",
    )
    require(
        cfg.data.train == "gold" or cfg.model.path or (cfg.model.architecture and cfg.model.tokenizer),
        f"model.path=null with data.train={cfg.data.train}: give model.path=DIR_OR_HUB_NAME, or "
        "model.tokenizer=DIR to start model.architecture from random weights",
    )
    require(
        cfg.model.path is not None or cfg.data.train == "gold" or cfg.loss.preference == "none" or cfg.reference.path,
        "model.path=null with a preference loss: a policy with random weights has no reference; train it with "
        "loss=sft first, or give reference.path",
    )


def _auto_lr(cfg: Train) -> float:
    """The learning rate that `optim.lr: auto` stands for: the papers' for a given model, this project's for its tiny one."""
    if cfg.model.path is not None:
        return 2e-5 if cfg.loss.preference == "none" else 5e-7
    return 3e-3 if cfg.loss.preference == "none" else 5e-4


def resolved(spec: Any) -> Any:
    """Local paths made absolute, so that a run's config.yaml means the same from any folder; names stay as they are."""
    if isinstance(spec, list):
        return [resolved(item) for item in spec]
    if not spec or spec == "gold":
        return spec
    path = os.path.expanduser(spec)
    return os.path.realpath(path) if os.path.exists(path) else spec


def train_config(cfg: Any) -> Train:
    """Checked settings of one training run, from Hydra's DictConfig.

    Raises UserError: a missing, unknown, mistyped or contradictory key, in one line with its value and the fix.
    """
    typed = config.typed(Train, config.plain(cfg))
    typed = replace(
        typed,
        model=replace(typed.model, path=resolved(typed.model.path), tokenizer=resolved(typed.model.tokenizer)),
        reference=replace(typed.reference, path=resolved(typed.reference.path)),
        data=replace(typed.data, train=resolved(typed.data.train), eval=resolved(typed.data.eval)),
    )
    _check_train(typed)
    if typed.optim.lr == "auto":
        typed = replace(typed, optim=replace(typed.optim, lr=_auto_lr(typed)))
    return typed
