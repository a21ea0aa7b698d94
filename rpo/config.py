"""What can be set for a run: frozen groups of keys, filled once from Hydra's composed YAML and checked.

`rpo.fields` fills them. Values live in `conf/*.yaml` alone: no group has a default, so what a run used is what its
`config.yaml` says. This is the only module that imports omegaconf, and only to convert: the library is usable without it.
"""

import typing
from collections.abc import Collection
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from rpo.errors import UserError, require
from rpo.fields import MAY_CHANGE, Count, Date, Every, Positive, Seed, Share, build, group
from rpo.paths import part_of_mixture, resolved
from rpo.text import in_quotes, redacted

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig


Source = Annotated[str, AfterValidator(lambda spec: resolved(spec, follow=True))]
_FILES = Field(min_length=1, description="a file, a list of files, or NAME:SPLIT")
Files = Annotated[str | list[str], _FILES, AfterValidator(resolved)]
_PARTS = "a file, a list of files or of {path: FILE, weight: a number > 0, < 10000}, or NAME:SPLIT"
Part = Annotated[dict[str, Any], AfterValidator(part_of_mixture)]
Mixture = Annotated[str | list[str | Part], Field(min_length=1, description=_PARTS), AfterValidator(resolved)]


WITHOUT_REFERENCE = ("simpo", "cpo", "orpo", "none")  # of loss.preference


@group
class Loss:
    preference: Literal["sigmoid", "ipo", "hinge", "robust", "dpop", "chi_po", "simpo", "cpo", "orpo", "none"]
    sft: Literal["none", "sum", "avg", "token"]
    beta: Annotated[Positive, Field(description="> 0; for pure supervised training use loss=sft")]
    eta: Annotated[float, Field(ge=0, allow_inf_nan=False, description=">= 0; the SFT term is a penalty and is added")]
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5, description="0 <= e < 0.5, the share of flipped labels")]
    normalize: bool
    lam: Annotated[float | None, Field(ge=0, allow_inf_nan=False)]
    clip: Positive | None
    gamma: Annotated[float | None, Field(ge=0, allow_inf_nan=False)]

    @property
    def has_pairs(self) -> bool:
        return self.preference != "none"

    @property
    def has_reference(self) -> bool:
        return self.preference not in WITHOUT_REFERENCE

    @model_validator(mode="after")
    def _check(self) -> "Loss":
        require(
            self.eta == 0 or self.sft != "none",
            f"loss.eta={self.eta} with loss.sft=none: eta would do nothing; set loss.sft=sum|avg|token or loss.eta=0",
        )
        require(
            self.preference != "none" or (self.sft != "none" and self.eta > 0),
            f"loss.preference=none with loss.sft={self.sft}, loss.eta={self.eta}: nothing to train on; use loss=sft",
        )
        readers = {
            "label_smoothing": ("sigmoid", "robust"),
            "normalize": ("sigmoid", "ipo"),
            "lam": ("dpop",),
            "clip": ("chi_po",),
            "gamma": ("simpo",),
        }
        for name, unset in {"label_smoothing": 0, "normalize": False, "lam": None, "clip": None, "gamma": None}.items():
            value = getattr(self, name)
            require(
                value == unset or self.preference in readers[name],
                f"loss.{name}={value} with loss.preference={self.preference}: only {' and '.join(readers[name])} "
                f"read{'s' * (len(readers[name]) == 1)} it; set it to {'null' if unset is None else str(unset).lower()}",
            )
        for name, reader in {"lam": "dpop", "gamma": "simpo"}.items():
            require(
                self.preference != reader or getattr(self, name) is not None,
                f"loss.{name}=null with loss.preference={reader}, which needs it; use loss={reader}, or give a number",
            )
        return self


@group
class Lora:
    r: Annotated[Count | None, Field(description="null (no adapter: all weights are trained) or at least 1")]
    alpha: Annotated[Positive | None, Field(description="null (2 r) or > 0")]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target: Annotated[
        str | list[str], Field(min_length=1, description="all-linear, a list of modules' names, or a regex")
    ]
    dora: bool
    modules_to_save: list[str] | None

    @model_validator(mode="after")
    def _check(self) -> "Lora":
        for name, unset in {"alpha": None, "dropout": 0, "dora": False, "modules_to_save": None}.items():
            value = getattr(self, name)
            require(
                self.r is not None or value == unset,
                f"model.lora.{name}={value} with model.lora.r=null: there is no adapter; give model.lora.r=16",
            )
        return self


NO_ADAPTER = Lora(r=None, alpha=None, dropout=0.0, target="all-linear", dora=False, modules_to_save=None)


@group
class Model:
    path: Source | None
    revision: str | None
    tokenizer: Source | None
    trust_remote_code: bool
    architecture: dict[str, Any] | None
    dtype: Literal["auto", "bfloat16", "float32", "float64"]
    lora: Lora
    load_in_4bit: bool
    save_dtype: Literal["auto", "float32", "bfloat16"]
    save_merged: bool
    save: Literal["last", "best"]


@group
class SyntheticTask:
    pairs: Count
    eval_pairs: Count
    flip: Annotated[float, Field(ge=0, lt=0.5, description="0 <= share < 0.5")]
    hidden_weight: float
    length_weight: float
    samples: Count
    seed: Seed


@group
class EvalData:
    eval: Files | None
    revision: str | None
    chat_template: str | None
    template_date: Date
    chat_template_kwargs: dict[str, Any] | None
    max_length: Annotated[int, Field(ge=2, description="at least 2 tokens")]
    truncation: Literal["drop", "prompt_left", "response_right"]
    on_bad_row: Literal["error", "drop"]


@group
class Data(EvalData):
    train: Mixture
    gold: SyntheticTask

    @model_validator(mode="after")
    def _check(self) -> "Data":
        embedded = self.train == "gold"
        require(
            not embedded or self.eval in ("gold", None),
            f"data.eval={self.eval} with data.train=gold: the embedded task is evaluated on its own prompts; "
            "use data.eval=gold or null, or give data.train=FILE",
        )
        require(
            not embedded or self.chat_template is None,
            "data.chat_template with data.train=gold: the embedded task has its own template; set it to null",
        )
        require(
            embedded or self.eval != "gold",
            f"data.eval=gold with data.train={self.train}: give data.eval=FILE of your own, or data.eval=null",
        )
        return self


@group
class Reference:
    kind: Literal["cached", "live", "moving"]
    path: Source | None
    cache_dir: Annotated[str, MAY_CHANGE]
    alpha: Annotated[float | None, Field(gt=0, le=1, description="0 < alpha <= 1, or null")]
    every: Count | None

    @model_validator(mode="after")
    def _check(self) -> "Reference":
        moves = self.kind == "moving"
        for name in ("alpha", "every"):
            value = getattr(self, name)
            require(
                (value is not None) == moves,
                f"reference.{name}={'null' if value is None else value} with reference.kind={self.kind}: moving needs it and nothing "
                f"else reads it; use reference=moving, or set reference.{name}=null",
            )
        require(
            not moves or self.path is None,
            f"reference.path={self.path} with reference=moving, which starts as the policy does; set it to null",
        )
        return self


@group
class Layout:
    kind: Literal["auto", "packed", "padded"]
    attention: Literal["auto", "varlen", "flex", "sdpa"]


_MOMENT = Annotated[float, Field(ge=0, lt=1)]


@group
class Optim:
    lr: Annotated[float, Field(gt=0, description="auto or > 0")] | Literal["auto"]
    warmup_ratio: Share
    schedule: Literal["constant", "linear", "cosine"]
    min_lr_ratio: Share
    betas: Annotated[list[_MOMENT], Field(min_length=2, max_length=2, description="two numbers in [0, 1)")]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0, description="> 0 (.inf: no clipping)")]
    state_dtype: Literal["float32", "bfloat16"]

    @model_validator(mode="after")
    def _check(self) -> "Optim":
        dead = (
            f"optim.min_lr_ratio={self.min_lr_ratio} with optim.schedule=constant: only the others read it; set it to 0"
        )
        require(self.schedule != "constant" or self.min_lr_ratio == 0, dead)
        return self


@group
class Fsdp:
    shard_degree: Annotated[Count | None, Field(description="null (what replicate_degree leaves) or at least 1")]
    replicate_degree: Annotated[Count, Field(description="at least 1 (1: no replicas)")]
    activation_checkpointing: Literal["none", "full", "selective"]
    reshard_after_forward: bool
    accumulate: Literal["unsharded", "sharded"]
    cpu_offload: bool


_DIRECTED = Field(pattern="^(min|max):", description="min:METRIC or max:METRIC (docs/METRICS.md)")
Directed = Annotated[str | None, _DIRECTED]


@group
class Checkpoint:
    every: Annotated[int, Field(ge=0, description="0 (none) or a number of steps")]
    keep: Annotated[Count | Literal["all"], Field(description="all or at least 1")]
    best: Directed
    blocking: bool
    verify: Literal["full", "sizes"]


@group
class Stop:
    metric: Directed
    patience: Count
    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@group
class Log:
    gradient_split: Annotated[int, Field(ge=0, description="0 (off) or a number of steps")]
    tensorboard: bool


@group
class Wandb:
    mode: Literal["auto", "disabled", "offline", "online"]
    entity: str | None
    project: str
    group: str | None
    job_type: str
    tags: list[str]
    notes: str | None


@group
class Train:
    loss: Loss
    model: Model
    data: Data
    reference: Reference
    layout: Layout
    optim: Optim
    fsdp: Annotated[Fsdp, MAY_CHANGE]
    checkpoint: Annotated[Checkpoint, MAY_CHANGE]
    stop: Stop
    log: Annotated[Log, MAY_CHANGE]
    wandb: Annotated[Wandb, MAY_CHANGE]
    seed: Seed
    epochs: Annotated[Count, MAY_CHANGE]
    max_steps: Annotated[Count | None, MAY_CHANGE]
    batch_size: Count
    tokens_per_microbatch: Annotated[Count, MAY_CHANGE]
    deterministic: bool
    compile: Annotated[bool | Literal["auto"], Field(description="auto, true or false")]
    eval_every: Annotated[Every, MAY_CHANGE]
    sample_every: Annotated[Every, MAY_CHANGE]
    log_every: Annotated[Count, MAY_CHANGE]
    run_dir: Annotated[str | None, MAY_CHANGE]
    resume: Annotated[str, MAY_CHANGE]
    timeout: Annotated[Count, MAY_CHANGE]
    cache_dir: Annotated[str, MAY_CHANGE]

    @model_validator(mode="after")
    def _check(self) -> "Train":
        self._check_best()
        self._check_model()
        split = self.log.gradient_split
        require(
            split % self.log_every == 0,
            f"log.gradient_split={split} with log_every={self.log_every}: what it finds stands in those lines; make it a "
            "multiple of log_every",
        )
        return self

    def _check_best(self) -> None:
        best, every, stop = self.checkpoint.best, self.checkpoint.every, self.stop.metric
        require(
            stop is None or (self.data.eval is not None and self.eval_every > 0),
            f"stop.metric={stop} with data.eval={self.data.eval or 'null'}, eval_every={self.eval_every}: nothing to stop by; "
            "give data.eval and evaluate every few steps",
        )
        require(
            self.model.save == "last" or best is not None,
            "model.save=best with checkpoint.best=null: nothing says which; give checkpoint.best=max:rewards/accuracies",
        )
        if best is None:
            return
        require(self.data.eval is not None, f"checkpoint.best={best} with data.eval=null: nothing to choose by")
        require(
            every > 0 and self.eval_every > 0 and every % self.eval_every == 0,
            f"checkpoint.best={best} with checkpoint.every={every}, eval_every={self.eval_every}: each checkpoint needs an "
            "evaluation; make checkpoint.every a multiple of eval_every",
        )

    def _check_model(self) -> None:
        model, train = self.model, self.data.train
        require(
            model.lora.r is None or model.path is not None or train == "gold",
            f"model.lora.r={model.lora.r} with model.path=null: random weights are no base of an adapter; give model.path",
        )
        require(
            train != "gold" or model.architecture is not None,
            "model.architecture=null with data.train=gold: the embedded task makes a model of that architecture; use "
            "model=tiny, or give data.train=FILE",
        )
        require(
            train == "gold" or model.path or (model.architecture and model.tokenizer),
            f"model.path=null with data.train={train}: give model.path=DIR_OR_HUB_NAME, or "
            "model.tokenizer=DIR to start model.architecture from random weights",
        )
        require(
            model.path is not None or train == "gold" or not self.loss.has_reference or self.reference.path,
            "model.path=null with a preference loss: a policy with random weights has no reference; train it with "
            "loss=sft first, or give reference.path",
        )


# ---- as YAML


def plain(cfg: "DictConfig") -> dict:
    """`cfg` as nested plain dicts, everything resolved; UserError where a value is missing."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        # Hydra's own settings have holes of their own; a recipe only sets other keys, its node is empty.
        ours = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in ("hydra", "recipe")])
        node = OmegaConf.to_container(ours, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise UserError(f"{error.full_key or 'config'}: {message}; give it on the command line") from None
    return node


def to_yaml(cfg: Any) -> str:
    """The settings as YAML, every key resolved, in the order of the dataclasses; secrets are `***`."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(redacted(to_dict(cfg))))


to_dict = asdict  # the settings as nested plain dicts (JSON types)


def may_change(cls: Any, prefix: str = "") -> set[str]:
    """The keys of `cls` that carry MAY_CHANGE, with their groups' names."""
    found = set()
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if MAY_CHANGE in getattr(hint, "__metadata__", ()):
            found.add(prefix + name)
        elif is_dataclass(hint):
            found |= may_change(hint, f"{prefix}{name}.")
    return found


def differences(there: dict, here: dict, apart_from: Collection[str] = (), prefix: str = "") -> list[str]:
    """The keys outside `apart_from` whose values differ between two settings, each as `key: there, here value`."""
    found = []
    for name in dict.fromkeys([*there, *here]):
        key, a, b = prefix + name, there.get(name), here.get(name)
        if key in apart_from or a == b:
            continue
        both = isinstance(a, dict) and isinstance(b, dict)
        shown = ["null" if value is None else value for value in (a, b)]
        found += differences(a, b, apart_from, f"{key}.") if both else [f"{key}={shown[0]}, here {shown[1]}"]
    return found


def read_yaml(path: Path) -> dict:
    """A run's `config.yaml` as nested dicts, nothing in it resolved. Raises UserError where it is not YAML."""
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml's and omegaconf's own; a file from elsewhere may hold anything
        raise UserError(f"{path}: is not the settings of a run ({' '.join(str(error).split())[:200]})") from None


def set_sweep_dir(cfg: "DictConfig", folder: Path) -> None:
    """Makes `folder` the sweep's folder, for Hydra itself and for the cells that it composes from now on."""
    from omegaconf import open_dict, read_write

    with read_write(cfg), open_dict(cfg):
        cfg.hydra.sweep.dir = str(folder)
        cfg.hydra.overrides.hydra.append(f"hydra.sweep.dir={in_quotes(str(folder))}")


# ---- one run


def _auto_lr(cfg: Train) -> float:
    """The learning rate that `optim.lr: auto` stands for: the papers' for a given model, this project's for its tiny one.

    An adapter gets ten times as much, as in Hugging Face's handbook.
    """
    if cfg.model.path is not None:
        continued = (Path(cfg.model.path).expanduser() / "adapter_config.json").is_file()
        papers, adapters = (2e-5, 2e-4) if cfg.loss.preference == "none" else (5e-7, 5e-6)
        return adapters if cfg.model.lora.r or continued else papers
    return 3e-3 if cfg.loss.preference == "none" else 5e-4


def train_config(cfg: Any) -> Train:
    """Checked settings of one training run, from Hydra's DictConfig.

    Raises UserError: a missing, unknown, mistyped or contradictory key, in one line with its value and the fix.
    """
    run = build(Train, plain(cfg))
    return replace(run, optim=replace(run.optim, lr=_auto_lr(run))) if run.optim.lr == "auto" else run
