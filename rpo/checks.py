"""Settings of one run or one evaluation, made from Hydra's composed YAML and checked for contradictions.

Every check names the key, its value and the fix, before a model is loaded.
"""

import datetime
import math
import os
from dataclasses import replace
from typing import Any

from rpo import config
from rpo.config import (
    Eval,
    GenerateTask,
    GoldTask,
    Loss,
    ModelTask,
    OveroptTask,
    PairsTask,
    RunTask,
    SelectTask,
    Task,
    Train,
    UserError,
)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _finite(key: str, value: float) -> None:
    _require(math.isfinite(value), f"{key}={value}: expected a finite number")


def check_loss(loss: Loss) -> None:
    for name in ("beta", "eta", "label_smoothing"):
        _finite(f"loss.{name}", getattr(loss, name))
    _require(loss.beta > 0, f"loss.beta={loss.beta}: expected > 0; for pure supervised training use loss=sft")
    _require(
        loss.eta >= 0, f"loss.eta={loss.eta}: expected >= 0; the SFT term is a penalty and is added, never subtracted"
    )
    _require(
        loss.eta == 0 or loss.sft != "none",
        f"loss.eta={loss.eta} with loss.sft=none: eta would do nothing; set loss.sft=sum|avg|token or loss.eta=0",
    )
    _require(
        loss.preference != "none" or (loss.sft != "none" and loss.eta > 0),
        f"loss.preference=none with loss.sft={loss.sft}, loss.eta={loss.eta}: nothing to train on; use loss=sft",
    )
    _require(
        0 <= loss.label_smoothing < 0.5,
        f"loss.label_smoothing={loss.label_smoothing}: expected 0 <= e < 0.5, the share of labels believed flipped",
    )
    _require(
        loss.label_smoothing == 0 or loss.preference == "sigmoid",
        f"loss.label_smoothing={loss.label_smoothing} with loss.preference={loss.preference}: "
        "only sigmoid reads it; set it to 0",
    )


def _check_seed(key: str, value: int) -> None:
    _require(0 <= value < 2**31, f"{key}={value}: expected 0 or more, below 2^31")


def _check_date(value: str) -> None:
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        raise UserError(f"data.template_date={value!r}: expected a date as YYYY-MM-DD") from None


def _check_checkpoint(cfg: Train) -> None:
    every, keep, best = cfg.checkpoint.every, cfg.checkpoint.keep, cfg.checkpoint.best
    _require(every >= 0, f"checkpoint.every={every}: expected 0 (none) or a number of steps")
    _require(keep == "all" or keep >= 1, f"checkpoint.keep={keep}: expected all or at least 1")
    if best is None:
        return
    _require(
        best.startswith(("min:", "max:")),
        f"checkpoint.best={best}: expected min:METRIC or max:METRIC, one of data.eval's as docs/METRICS.md names them",
    )
    _require(cfg.data.eval is not None, f"checkpoint.best={best} with data.eval=null: nothing is there to choose by")
    _require(
        every > 0 and cfg.eval_every > 0 and every % cfg.eval_every == 0,
        f"checkpoint.best={best} with checkpoint.every={every}, eval_every={cfg.eval_every}: each checkpoint needs an "
        "evaluation; make checkpoint.every a multiple of eval_every",
    )


def _check_log(cfg: Train) -> None:
    every = cfg.log.gradient_split
    _require(every >= 0, f"log.gradient_split={every}: expected 0 (off) or a number of steps")
    _require(
        every % cfg.log_every == 0,
        f"log.gradient_split={every} with log_every={cfg.log_every}: what it finds stands in those lines; make it a "
        "multiple of log_every",
    )


def _check_train(cfg: Train) -> None:
    check_loss(cfg.loss)
    for name in ("epochs", "batch_size", "tokens_per_microbatch", "log_every", "timeout"):
        value = getattr(cfg, name)
        _require(value >= 1, f"{name}={value}: expected at least 1")
    for name in ("eval_every", "sample_every"):
        value = getattr(cfg, name)
        _require(value >= 0, f"{name}={value}: expected 0 (never) or a number of steps")
    _require(cfg.max_steps is None or cfg.max_steps >= 1, f"max_steps={cfg.max_steps}: expected null or at least 1")
    _check_checkpoint(cfg)
    _check_log(cfg)
    _check_seed("seed", cfg.seed)
    _check_seed("data.gold.seed", cfg.data.gold.seed)
    _require(cfg.data.train != [], "data.train=[]: expected a file, a list of files, or NAME:SPLIT")
    _require(cfg.data.eval != [], "data.eval=[]: expected a file, a list of files, or NAME:SPLIT; null: no evaluation")
    optim = cfg.optim
    _require(optim.lr == "auto" or optim.lr > 0, f"optim.lr={optim.lr}: expected auto or > 0")
    for name in ("warmup_ratio", "min_lr_ratio"):
        value = getattr(optim, name)
        _require(0 <= value <= 1, f"optim.{name}={value}: expected a share of the run, 0 to 1")
    _require(
        len(optim.betas) == 2 and all(0 <= b < 1 for b in optim.betas),
        f"optim.betas={optim.betas}: expected two numbers in [0, 1)",
    )
    _require(optim.weight_decay >= 0, f"optim.weight_decay={optim.weight_decay}: expected >= 0")
    _require(optim.max_grad_norm > 0, f"optim.max_grad_norm={optim.max_grad_norm}: expected > 0 (.inf: no clipping)")
    shard, replicate = cfg.fsdp.shard_degree, cfg.fsdp.replicate_degree
    _require(
        shard is None or shard >= 1,
        f"fsdp.shard_degree={shard}: expected null (all the ranks that replicate_degree leaves) or at least 1",
    )
    _require(replicate >= 1, f"fsdp.replicate_degree={replicate}: expected at least 1 (1: no replicas)")
    _require(cfg.data.max_length >= 2, f"data.max_length={cfg.data.max_length}: expected at least 2 tokens")
    _check_date(cfg.data.template_date)
    gold = cfg.data.gold
    _require(
        gold.pairs >= 1 and gold.eval_pairs >= 1,
        f"data.gold.pairs={gold.pairs}, eval_pairs={gold.eval_pairs}: expected at least 1",
    )
    _require(gold.samples >= 1, f"data.gold.samples={gold.samples}: expected at least 1")
    _require(
        cfg.data.train != "gold" or cfg.data.eval in ("gold", None),
        f"data.eval={cfg.data.eval} with data.train=gold: the embedded task is evaluated on its own prompts; "
        "use data.eval=gold or null, or give data.train=FILE",
    )
    _require(
        cfg.data.train != "gold" or cfg.data.chat_template is None,
        "data.chat_template with data.train=gold: the embedded task has its own template; set it to null",
    )
    _require(
        cfg.data.train != "gold" or cfg.model.architecture is not None,
        "model.architecture=null with data.train=gold: the embedded task makes a model of that architecture; use "
        "model=tiny, or give data.train=FILE",
    )
    _require(0 <= gold.flip < 0.5, f"data.gold.flip={gold.flip}: expected 0 <= share < 0.5")
    _require(
        cfg.data.train == "gold" or cfg.data.eval != "gold",
        f"data.eval=gold with data.train={cfg.data.train}: give data.eval=FILE of your own, or data.eval=null",
    )
    _require(
        cfg.data.train == "gold" or cfg.model.path or (cfg.model.architecture and cfg.model.tokenizer),
        f"model.path=null with data.train={cfg.data.train}: give model.path=DIR_OR_HUB_NAME, or "
        "model.tokenizer=DIR to start model.architecture from random weights",
    )
    _require(
        cfg.model.path is not None or cfg.data.train == "gold" or cfg.loss.preference == "none" or cfg.reference.path,
        "model.path=null with a preference loss: a policy with random weights has no reference; train it with "
        "loss=sft first, or give reference.path",
    )


def _check_at_least(least: int, task: Task, *names: str) -> None:
    for name in names:
        value = getattr(task, name)
        _require(value is None or value == "auto" or value >= least, f"task.{name}={value}: expected at least {least}")


def _check_overopt(task: OveroptTask) -> None:
    _check_at_least(1, task, "limit", "samples", "max_new_tokens", "batch_size", "bon_samples")
    _check_at_least(0, task, "pairs", "written")
    _require(all(n >= 1 for n in task.bon), f"task.bon={task.bon}: expected numbers of answers, each at least 1")
    drawn = task.bon_samples or max(task.bon, default=1)
    _require(
        drawn >= max(task.bon, default=1),
        f"task.bon_samples={drawn} with task.bon={task.bon}: the best of n needs n answers; set it to {max(task.bon, default=1)} "
        "or more, or null",
    )


def _check_select(task: SelectTask) -> None:
    _require(task.results is not None, "task.results=null: give the folder of an evaluation by task=overopt")
    _require(
        task.score.startswith(("min:", "max:")),
        f"task.score={task.score}: expected min:METRIC or max:METRIC, one of those in the folder's results.json",
    )
    _require(
        not task.split or task.score == "max:gold",
        f"task.split=true with task.score={task.score}: only gold is kept by prompt; set task.score=max:gold or "
        "task.split=false",
    )
    _check_at_least(0, task, "max_kl")
    _check_at_least(1, task, "entropy_falls")
    for name in ("max_displacement", "min_ended"):
        value = getattr(task, name)
        _require(value is None or 0 <= value <= 1, f"task.{name}={value}: expected null or a share, 0 to 1")


def _check_task(task: Task) -> None:
    match task:
        case PairsTask():
            _require(task.beta == "auto" or task.beta > 0, f"task.beta={task.beta}: expected auto or > 0")
            _check_at_least(1, task, "limit")
        case GenerateTask():
            _check_at_least(1, task, "limit", "samples", "max_new_tokens", "batch_size")
            _require(task.temperature >= 0, f"task.temperature={task.temperature}: expected >= 0 (0: greedy)")
            _require(0 < task.top_p <= 1, f"task.top_p={task.top_p}: expected in (0, 1]")
            _require(task.top_k >= 0, f"task.top_k={task.top_k}: expected 0 (off) or more")
        case GoldTask():
            _check_at_least(1, task, "limit", "samples", "batch_size")
        case OveroptTask():
            _check_overopt(task)
        case SelectTask():
            _check_select(task)


def _check_what(cfg: Eval) -> None:
    """Raises UserError unless what the task evaluates is given, and nothing that it does not read."""
    kind, path = cfg.task.kind, cfg.model.path
    on_models, on_runs = isinstance(cfg.task, ModelTask), isinstance(cfg.task, RunTask)
    _require(
        not on_models or path is not None,
        f"model.path: missing; task={kind} evaluates a model: give a folder or Hub name",
    )
    _require(path != [], "model.path=[]: expected a model or a list of models")
    _require(on_models or path is None, f"model.path={path} with task={kind}: it reads no model of yours; leave it out")
    _require(
        not on_runs or cfg.runs not in (None, []),
        f"runs={cfg.runs}: task={kind} evaluates runs: give a run's folder, a sweep's, or a list",
    )
    _require(on_runs or cfg.runs is None, f"runs={cfg.runs} with task={kind}: it reads no runs; leave it out")
    own = {"model.revision": cfg.model.revision, "model.tokenizer": cfg.model.tokenizer} | {
        "reference.path": cfg.reference.path
    }
    for key, value in own.items():
        _require(on_models or value is None, f"{key}={value} with task={kind}: a run has its own; leave it out")
    _require(cfg.data.eval != [], "data.eval=[]: expected a file, a list of files, or NAME:SPLIT; null: the runs' own")


def _check_eval(cfg: Eval) -> None:
    _check_task(cfg.task)
    _check_what(cfg)
    _require(cfg.tokens_per_microbatch >= 1, f"tokens_per_microbatch={cfg.tokens_per_microbatch}: expected at least 1")
    _check_date(cfg.data.template_date)
    _check_seed("seed", cfg.seed)


def _auto_lr(cfg: Train) -> float:
    """The learning rate that `optim.lr: auto` stands for: the papers' for a given model, this project's for its tiny one."""
    if cfg.model.path is not None:
        return 2e-5 if cfg.loss.preference == "none" else 5e-7
    return 3e-3 if cfg.loss.preference == "none" else 5e-4


def _resolved(spec: Any) -> Any:
    """Local paths made absolute, so that a run's config.yaml means the same from any folder; names stay as they are."""
    if isinstance(spec, list):
        return [_resolved(item) for item in spec]
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
        model=replace(typed.model, path=_resolved(typed.model.path), tokenizer=_resolved(typed.model.tokenizer)),
        reference=replace(typed.reference, path=_resolved(typed.reference.path)),
        data=replace(typed.data, train=_resolved(typed.data.train), eval=_resolved(typed.data.eval)),
    )
    _check_train(typed)
    if typed.optim.lr == "auto":
        typed = replace(typed, optim=replace(typed.optim, lr=_auto_lr(typed)))
    return typed


def eval_config(cfg: Any) -> Eval:
    """Checked settings of one evaluation. Raises UserError as `train_config` does."""
    typed = config.typed(Eval, config.plain(cfg))
    if isinstance(typed.task, RunTask):  # config.yaml of an evaluation that goes on means the same from any folder
        typed = replace(typed, runs=_resolved(typed.runs))
    _check_eval(typed)
    return typed
