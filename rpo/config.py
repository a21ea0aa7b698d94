"""What can be set for a run: frozen dataclasses, filled once from Hydra's composed YAML and checked for types.

Values live in `conf/*.yaml` alone: no dataclass here has a default, so what a run used is what its
`config.yaml` says. This is the only module that imports omegaconf, and only to convert: the library is usable
without it.
"""

import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from rpo.errors import UserError
from rpo.text import redacted

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Loss:
    preference: Literal["sigmoid", "ipo", "hinge", "none"]
    sft: Literal["none", "sum", "avg", "token"]
    beta: float
    eta: float
    label_smoothing: float
    normalize: bool


@dataclass(frozen=True)
class Model:
    path: str | None
    revision: str | None
    tokenizer: str | None
    trust_remote_code: bool
    architecture: dict[str, Any] | None
    dtype: Literal["auto", "bfloat16", "float32", "float64"]


@dataclass(frozen=True)
class Gold:
    pairs: int
    eval_pairs: int
    flip: float
    hidden_weight: float
    length_weight: float
    samples: int
    seed: int


@dataclass(frozen=True)
class Data:
    train: str | list[str]
    eval: str | list[str] | None
    revision: str | None
    chat_template: str | None
    template_date: str
    max_length: int
    truncation: Literal["drop", "prompt_left", "response_right"]
    on_bad_row: Literal["error", "drop"]
    gold: Gold


@dataclass(frozen=True)
class Reference:
    kind: Literal["cached", "live"]
    path: str | None
    cache_dir: str


@dataclass(frozen=True)
class Layout:
    kind: Literal["auto", "packed", "padded"]
    attention: Literal["auto", "varlen", "flex", "sdpa"]


@dataclass(frozen=True)
class Optim:
    lr: float | Literal["auto"]
    warmup_ratio: float
    schedule: Literal["constant", "linear", "cosine"]
    min_lr_ratio: float
    betas: list[float]
    weight_decay: float
    max_grad_norm: float
    state_dtype: Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Fsdp:
    shard_degree: int | None
    replicate_degree: int
    activation_checkpointing: Literal["none", "full", "selective"]
    reshard_after_forward: bool
    accumulate: Literal["unsharded", "sharded"]
    cpu_offload: bool


@dataclass(frozen=True)
class Checkpoint:
    every: int
    keep: int | Literal["all"]
    best: str | None
    blocking: bool


@dataclass(frozen=True)
class Log:
    gradient_split: int


@dataclass(frozen=True)
class Wandb:
    mode: Literal["auto", "disabled", "offline", "online"]
    project: str
    group: str | None


@dataclass(frozen=True)
class Train:
    loss: Loss
    model: Model
    data: Data
    reference: Reference
    layout: Layout
    optim: Optim
    fsdp: Fsdp
    checkpoint: Checkpoint
    log: Log
    wandb: Wandb
    seed: int
    epochs: int
    max_steps: int | None
    batch_size: int
    tokens_per_microbatch: int
    compile: bool
    eval_every: int
    sample_every: int
    log_every: int
    run_dir: str | None
    resume: str
    timeout: int
    cache_dir: str


@dataclass(frozen=True)
class EvalData:
    eval: str | list[str] | None
    revision: str | None
    chat_template: str | None
    template_date: str
    max_length: int
    truncation: Literal["drop", "prompt_left", "response_right"]
    on_bad_row: Literal["error", "drop"]


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join("null" if arg is types.NoneType else _describe(arg) for arg in args)
    if origin in (list, dict):
        return "a list" if origin is list else "a mapping"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[hint]


def _matches(hint: Any, value: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is types.UnionType or origin is typing.Union:
        return any(_matches(arg, value) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(_matches(args[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:  # YAML's `1` is a fine number; True is not, though Python calls it an int
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _is_group(hint: Any) -> bool:
    """Whether a key of this type holds keys: a dataclass, or a union of them."""
    return all(is_dataclass(arg) for arg in (typing.get_args(hint) or [hint]))


def _of_kind(union: Any, node: Any, key: str) -> type:
    """The dataclass of `union` whose `kind` is that of `node`. Raises UserError where there is none."""
    by_kind = {typing.get_args(typing.get_type_hints(cls)["kind"])[0]: cls for cls in typing.get_args(union)}
    kind = node.get("kind") if isinstance(node, dict) else None
    if kind not in by_kind:
        raise UserError(f"{key}.kind={kind}: expected {', '.join(by_kind)}")
    return by_kind[kind]


def typed(cls: Any, node: Any, key: str = "") -> Any:
    """`cls` filled from the mapping `node`; UserError names the first key that is absent, unknown or of another type.

    Of a union of dataclasses, each of its own `kind`, the one that `node` names.
    """
    if isinstance(cls, types.UnionType):
        cls = _of_kind(cls, node, key)
    if not isinstance(node, dict):
        raise UserError(f"{key}={node!r}: expected a group of keys ({', '.join(f.name for f in fields(cls))})")
    names = {field.name for field in fields(cls)}
    prefix = f"{key}." if key else ""
    if unknown := sorted(set(node) - names):
        raise UserError(f"{prefix}{unknown[0]}: no such key; the keys here are {', '.join(sorted(names))}")
    values = {}
    for name, hint in typing.get_type_hints(cls).items():
        if name not in node:
            raise UserError(f"{prefix}{name}: missing; give it on the command line or in the YAML")
        value = node[name]
        if _is_group(hint):
            values[name] = typed(hint, value, prefix + name)
        elif _matches(hint, value):
            values[name] = float(value) if hint is float else value
        else:
            raise UserError(f"{prefix}{name}={value!r}: expected {_describe(hint)}")
    return cls(**values)


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


def to_dict(cfg: Any) -> dict:
    """The settings as nested plain dicts (JSON types)."""
    return {f.name: to_dict(v) if is_dataclass(v := getattr(cfg, f.name)) else v for f in fields(cfg)}


# What may differ between two starts of one run: how long it goes on, what it writes and where, and what a device has to
# hold. The last changes a gradient's rounding and no more, as another number of ranks does.
MAY_CHANGE = ("max_steps", "epochs", "eval_every", "sample_every", "log_every", "log", "checkpoint", "wandb")
MAY_CHANGE += ("run_dir", "resume", "timeout", "cache_dir", "reference.cache_dir", "tokens_per_microbatch", "fsdp")


def differences(there: dict, here: dict, may_change: Sequence[str] = MAY_CHANGE, prefix: str = "") -> list[str]:
    """The keys outside `may_change` whose values differ between two settings, each as `key: there, here value`."""
    found = []
    for name in dict.fromkeys([*there, *here]):
        key, a, b = prefix + name, there.get(name), here.get(name)
        if key in may_change or a == b:
            continue
        both = isinstance(a, dict) and isinstance(b, dict)
        found += differences(a, b, may_change, f"{key}.") if both else [f"{key}={a}, here {b}"]
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
        cfg.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")
