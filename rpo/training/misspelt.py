"""Keys and choices that the command line names and nobody has, with those that were probably meant."""

from __future__ import annotations

import difflib
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpo.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CONF = Path(__file__).parents[1] / "conf"
# What other trainers call it.
ELSEWHERE = {
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "rpo_alpha": "loss.eta",
    "loss_type": "loss",
    "simpo_gamma": "loss.gamma",
    "dpop_lambda": "loss.lam",
    "model_name_or_path": "model.path",
    "ref_model": "reference.path",
    "torch_dtype": "model.dtype",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target",
    "dataset_name": "data.train",
    "eval_dataset": "data.eval",
    "num_train_epochs": "epochs",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "tokens_per_microbatch",
    "gradient_checkpointing": "fsdp.activation_checkpointing",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "output_dir": "run_dir",
    "report_to": "wandb.mode",
}


def check_key(text: str, override: Override, settings: type) -> None:
    """Raises UserError where the override `text` sets what `settings` do not have, with the keys that come nearest."""
    key = override.key_or_group
    if _is_foreign(override) or is_group(key) or _has(settings, key.split(".")):
        return
    known = keys(settings)
    near = nearest(key, known)
    if near:
        raise UserError(f"{text}: no such key; did you mean {' or '.join(near)}?")
    if not override.is_add():  # what is added may be a group of the user's own
        groups = dict.fromkeys(name.partition(".")[0] for name in known)
        raise UserError(f"{text}: no such key; the keys here are {', '.join(groups)}")


def check_choice(text: str, override: Override) -> None:
    """Raises UserError where the override `text` chooses a file that is not in conf/, with those that come nearest."""
    group = override.key_or_group
    if _is_foreign(override) or not is_group(group):
        return
    values = [override.value()]
    if override.is_sweep_override():
        values = list(override.sweep_string_iterator()) if override.is_choice_sweep() else []
    there = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if values == [None] and group != "recipe":
        raise UserError(f"{text}: expected one of conf/{group}: {', '.join(there)}")
    for value in values:
        value = value.removesuffix(".yaml") if isinstance(value, str) else value
        if isinstance(value, str) and "$" not in value and value not in there:
            near = [name for name in there if name.startswith(value)] or difflib.get_close_matches(value, there, 3)
            hint = f"did you mean {group}={'|'.join(near)}?" if near else f"there are {', '.join(there)}"
            raise UserError(f"{text}: conf/{group} has no {value}; {hint}")


def is_group(key: str) -> bool:
    return "." not in key and (CONF / key).is_dir()


def _is_foreign(override: Override) -> bool:
    """Hydra's own, one of a package, or one that takes something away."""
    return override.is_hydra_override() or override.package is not None or override.is_delete()


def _has(hint: Any, path: list[str]) -> bool:
    """Whether the group `hint` has the key at `path`; of a mapping, and of what a task decides, any."""
    if not path:
        return True
    if not is_dataclass(hint):
        return hint is not None and any(typing.get_origin(one) is dict for one in (hint, *typing.get_args(hint)))
    inner = typing.get_type_hints(hint)
    return path[0] in inner and (path[0] == "task" or _has(inner[path[0]], path[1:]))


def keys(hint: Any, prefix: str = "") -> list[str]:
    """All keys of the group `hint`, the groups' own names among them."""
    found = []
    for name, inner in typing.get_type_hints(hint).items():
        found.append(prefix + name)
        found += keys(inner, f"{prefix}{name}.") if is_dataclass(inner) else []
    return found


def nearest(key: str, known: list[str]) -> list[str]:
    """The keys of `known` that were probably meant by `key`, best first."""
    leaf = key.rpartition(".")[2]
    if (meant := ELSEWHERE.get(leaf)) in known:
        return [meant]
    if same := [name for name in known if name.rpartition(".")[2] == leaf]:
        return same
    close = difflib.get_close_matches(key, known, 3, cutoff=0.75)
    leaves = difflib.get_close_matches(leaf, {name.rpartition(".")[2] for name in known}, 2, cutoff=0.75)
    return list(dict.fromkeys([*close, *(name for name in known if name.rpartition(".")[2] in leaves)]))[:3]
