"""LoRA (arXiv 2106.09685) through PEFT: adapters put into a model in place, switched off for the reference, read and written.

A Linear with weight W computes x W' + (alpha / r) (x A') B', A random and B zero at first, so that the policy starts as its base;
DoRA (arXiv 2402.09353) also learns the length of each column of the sum. W is frozen in the compute dtype, A and B are
masters. Nothing here imports PEFT unless an adapter is asked for or found.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rpo import config, dist, files
from rpo.errors import UserError
from rpo.text import first_line

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rpo.data.batch import Batch
    from rpo.model.policy import Policy

_NAME = "default"  # of the adapter within the model, as PEFT calls its first
_PREFIX = "base_model.model."  # of names in PEFT's files
_OF_BASE = "base.json"  # beside the adapter: the digest of the weights that it was trained on, as fp32
_QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
# What an adapter from elsewhere may set; anything else changes what is computed in ways that are not known here.
_UNDERSTOOD = set(
    "r lora_alpha lora_dropout use_dora use_rslora rank_pattern alpha_pattern target_modules exclude_modules modules_to_save "
    "layers_to_transform layers_pattern fan_in_fan_out init_lora_weights ensure_weight_tying loftq_config qalora_group_size "
    "base_model_name_or_path revision inference_mode task_type peft_type peft_version auto_mapping runtime_config".split()
)


# ---- an adapter's folder


def found(path: str, revision: str | None, *, key: str = "model.path") -> LoraConfig | None:
    """The settings of the LoRA adapter at `path` (folder or Hub name); None where that is no adapter.

    Raises UserError: PEFT is not installed, an adapter of another kind or with parts that are not understood, or without a base.
    """
    from transformers.utils import cached_file

    folder = os.path.expanduser(path)
    try:
        file = cached_file(folder, "adapter_config.json", revision=revision, **_QUIET)
    except OSError:  # no such name, or no network: what loads the config says so
        return None
    if file is None:
        return None
    where = f"{key}={path}"
    _require_peft(where)
    from peft import LoraConfig, PeftConfig

    try:
        adapter = PeftConfig.from_peft_type(**json.loads(Path(file).read_text()))
    except Exception as error:  # of JSON, of a config class that this PEFT does not have
        raise UserError(f"{where}: its adapter_config.json cannot be read ({first_line(error)})") from None
    if any(Path(folder).glob("model*.safetensors")):
        raise UserError(
            f"{where}: holds both a whole model and an adapter (adapter_config.json); give a folder of one of them"
        )
    if type(adapter) is PeftConfig:
        raise UserError(
            f"{where}: its adapter_config.json names no kind of adapter (peft_type); give a complete adapter"
        )
    if type(adapter) is not LoraConfig:
        raise UserError(
            f"{where}: is an adapter of kind {type(adapter).__name__[:-6]}; merge it into its base, and give that"
        )
    default = LoraConfig()
    names = {each.name for each in fields(LoraConfig)} - _UNDERSTOOD
    odd = [
        name for name in sorted(names) if getattr(adapter, name) not in (getattr(default, name), None, [], {}, False)
    ]
    if adapter.bias == "none" and adapter.init_lora_weights not in (True, False, "gaussian"):
        odd = ["init_lora_weights"]  # PiSSA and others move a part of the base's weights into the adapter
    if odd:
        raise UserError(
            f"{where}: its adapter has {odd[0]}={getattr(adapter, odd[0])!r}, which is not supported; merge it into its base "
            "(peft: merge_and_unload), and give that"
        )
    if not adapter.base_model_name_or_path:
        raise UserError(f"{where}: its adapter_config.json names no base_model_name_or_path; write it there")
    return adapter


def _require_peft(where: str) -> None:
    if find_spec("peft") is None:
        raise UserError(f"{where}: LoRA needs peft; pip install -e '.[lora]'")


# ---- in a model


def add(lm: PreTrainedModel, cfg: config.Lora, base: str, revision: str | None, *, seed: int, where: str) -> None:
    """Freezes `lm`, the model at `base`, and puts a new adapter into it: A random by `seed`, B zero, in the dtype of the weights.

    Raises UserError: as `inject` does, and where a class would not train it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject(lm, cfg, base, revision)
    _check_reached(lm, where)


def inject(lm: PreTrainedModel, cfg: config.Lora, base: str | None = None, revision: str | None = None) -> None:
    """`add` without a look at the class.

    Raises UserError: PEFT is not installed, names in target or modules_to_save that are not in the model, a head among them
    that is not trained as it is used.
    """
    _require_peft("model.lora.r")
    from peft import LoraConfig

    for key in ("target", "modules_to_save"):
        names = getattr(cfg, key)
        _check_names(lm, names if isinstance(names, list) else [], f"model.lora.{key}")
    adapter = LoraConfig(
        r=cfg.r,
        lora_alpha=cfg.alpha or 2 * cfg.r,
        lora_dropout=cfg.dropout,
        target_modules=cfg.target,
        use_dora=cfg.dora,
        modules_to_save=cfg.modules_to_save,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
    )
    _inject(lm, adapter, "model.lora.target")


def attach(lm: PreTrainedModel, adapter: LoraConfig, path: str, revision: str | None, *, where: str) -> None:
    """Freezes `lm` and puts the adapter at `path`, of settings `adapter`, into it. Raises UserError where it is another base's."""
    from peft import load_peft_weights

    adapter.inference_mode, adapter.init_lora_weights = False, True
    base = f"its base {adapter.base_model_name_or_path}"
    _inject(lm, adapter, f"{where}: target_modules")
    try:
        weights = load_peft_weights(
            os.path.expanduser(path), device="cpu", **({"revision": revision} if revision else {})
        )
    except Exception as error:  # files, the Hub, the library: each its own type
        raise UserError(f"{where}: the adapter's weights cannot be loaded ({first_line(error)})") from None
    stored = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
    beside = [
        name for name in stored if name.endswith(".base_layer.weight")
    ]  # an embedding that PEFT adapts is written too
    for name in beside:
        own, there = dict(lm.named_parameters()).get(name), stored.pop(name)
        if own is None or own.shape != there.shape or not torch.equal(own, there.to(own.dtype)):
            raise UserError(
                f"{where}: its {name} is not that of {base}, which was resized or changed; give its own base"
            )
    places = {stored_name(name): param for name, param in named(lm)}
    if unknown := sorted(stored.keys() - places.keys()):
        raise UserError(f"{where}: has {unknown[0]}, for which {base} has no place; give its own base")
    for name, param in places.items():
        if name not in stored:
            raise UserError(f"{where}: lacks {name}, which its adapter_config.json asks for; give a complete adapter")
        if stored[name].shape != param.shape:
            sizes = f"{tuple(stored[name].shape)}, there it would be {tuple(param.shape)}"
            raise UserError(f"{where}: does not fit {base}: {name} is {sizes}; give its own base")
        param.data.copy_(stored[name])
    _check_reached(lm, where)
    recorded = Path(path).expanduser() / _OF_BASE
    if recorded.is_file() and lm.dtype == torch.float32:
        from rpo.model.fingerprint import hash_of

        then, now = json.loads(recorded.read_text())["weights"], hash_of(lm, adapter=False)
        if then != now:
            raise UserError(
                f"{where}: {base} had weights of digest {then[:16]} when it was trained, now {now[:16]}; restore them"
            )


def _inject(lm: PreTrainedModel, adapter: LoraConfig, where: str) -> None:
    from peft import inject_adapter_in_model

    there = _modules(lm)  # as long as it is only the model's own
    try:
        inject_adapter_in_model(adapter, lm, adapter_name=_NAME)
    except ValueError as error:  # no module of that name, or of a kind that PEFT has no LoRA for
        raise UserError(f"{where}: {first_line(error)}; {there}") from None
    if adapter.target_parameters:  # PEFT's all-linear adds them
        raise UserError(
            f"{where}: the experts of {type(lm).__name__} are one tensor ({', '.join(sorted(adapter.target_parameters))}), which "
            f"cannot have LoRA here; name modules in model.lora.target: {there}"
        )
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    if _is_switched(head) and hasattr(head, "base_layer"):
        raise UserError(
            f"{where}: the head cannot have LoRA here; name it in model.lora.modules_to_save, or leave it out"
        )
    if lm.config.get_text_config().tie_word_embeddings and (_is_switched(head) or _is_switched(embedding)):
        raise UserError(
            f"{where}: embedding and head of {type(lm).__name__} are one weight, so neither can be adapted alone"
        )


def targets(lm: nn.Module) -> str:
    """The names of the modules that have LoRA, each once."""
    leaves = {path.rpartition(".")[2] for path, module in lm.named_modules() if hasattr(module, "lora_A")}
    return ", ".join(sorted(leaves))


def _check_names(lm: nn.Module, names: list[str], key: str) -> None:
    """PEFT passes over a name that is not there as long as another is."""
    paths = [path for path, _ in lm.named_modules()]
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise UserError(f"{key}: {type(lm).__name__} has no module {name}; {_modules(lm)}")


def _modules(lm: nn.Module) -> str:
    leaves = {path.rpartition(".")[2] for path, module in lm.named_modules() if hasattr(module, "weight") and path}
    return f"it has {', '.join(sorted(leaves - {'0', '1'}))}"


def _check_reached(lm: PreTrainedModel, where: str) -> None:
    """Raises UserError where a class computes with a target's weight itself, so that its adapter would never be trained.

    Detected by the gradients of a short input; of modules that come many times (experts) one that is reached is enough.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = lm.config.get_text_config().vocab_size
    input_ids_BT = torch.randint(vocab_size, (2, 16), generator=generator)
    lm.eval()
    with torch.enable_grad():
        lm(input_ids=input_ids_BT, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    reached: dict[str, bool] = {}
    for name, param in named(lm):
        kind = re.sub(r"\.\d+\.", ".N.", name)
        reached[kind] = reached.get(kind, False) or param.grad is not None
        param.grad = None
    if lost := [kind for kind, is_reached in reached.items() if not is_reached]:
        module = lost[0].partition(".lora_")[0].rpartition(".")[2]
        raise UserError(
            f"{where}: {type(lm).__name__} does not call {module} but reads its weight, so LoRA there would train nothing; "
            "name other modules in model.lora.target"
        )


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The adapter's parameters, those of modules_to_save among them, by their names in `model`; empty without an adapter."""
    return [(name, param) for name, param in model.named_parameters() if _is_adapter(name)]


def _is_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def base_name(name: str) -> str | None:
    """What a tensor of a model with an adapter is called in its base; None for the adapter's own."""
    return None if _is_adapter(name) else re.sub(r"(\.base_layer|\.original_module)+\.", ".", name)


def stored_name(name: str) -> str:
    """What PEFT calls an adapter's parameter in its files."""
    name = re.sub(r"\.modules_to_save\.\w+\.", ".", name)
    return re.sub(rf"(\.lora_\w+)\.{_NAME}", r"\1", name).replace(
        ".lora_magnitude_vector.weight", ".lora_magnitude_vector"
    )


@torch.no_grad()
def merge(lm: PreTrainedModel) -> None:
    """Adds the adapter to the weights of its base and takes it out: the plain model that computes the same to rounding."""
    for path, module in list(lm.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge(safe_merge=True)  # which raises where a sum is not finite
            lm.set_submodule(path, module.get_base_layer())
        elif hasattr(module, "modules_to_save"):
            lm.set_submodule(path, module.modules_to_save[_NAME])
    del lm.peft_config
    lm.requires_grad_(True)


def freeze(lm: nn.Module, compute_dtype: torch.dtype) -> None:
    """Stores the base under an adapter in `compute_dtype`; the adapter keeps its own."""
    for name, param in lm.named_parameters():
        if not _is_adapter(name):
            param.data = param.data.to(compute_dtype)


def dropouts(model: nn.Module) -> list[nn.Module]:
    """The adapter's dropouts that drop anything."""
    return [m for name, m in model.named_modules() if ".lora_dropout." in name and getattr(m, "p", 0)]


def _is_switched(module: nn.Module) -> bool:
    return hasattr(module, "_disable_adapters")


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Within the block `model` computes as its base.

    PEFT's flag alone: its `enable_adapters` also takes requires_grad away, which FSDP2 would keep for weights that it gathers
    within the block.
    """
    layers = [module for module in model.modules() if _is_switched(module)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class Base:
    """`policy` without its adapter: the reference of a LoRA run, which takes no memory of its own."""

    def __init__(self, policy: Policy):
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def __call__(self, batch: Batch) -> Tensor:
        with switched_off(self._policy):
            return self._policy(batch)

    def hidden(self, batch: Batch) -> Tensor:
        with switched_off(self._policy):
            return self._policy.hidden(batch)

    def logits_of(self, hidden_ND: Tensor) -> Tensor:
        with switched_off(self._policy):
            return self._policy.logits_of(hidden_ND)

    def generate(self, *, generation_config: GenerationConfig, **inputs: Any) -> Tensor:
        with switched_off(self._policy):
            return self._policy.generate(generation_config=generation_config, **inputs)


# ---- on disk


def save(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes `folder` in PEFT's format: adapter_config.json, the adapter's masters, tokenizer and template.

    A collective: every rank calls it, rank 0 writes. The folder appears whole or not at all.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(policy, options=options)
    dist.on_main(
        write, policy.lm, {name.removeprefix("lm."): tensor for name, tensor in state.items()}, tokenizer, folder
    )


def _targets(lm: PreTrainedModel, names: set[str] | str) -> list[str] | str:
    """The targets as servers expect them: by the last part of their paths where that names the same modules."""
    adapted = {path for path, module in lm.named_modules() if hasattr(module, "lora_A")}
    leaves = {path.rpartition(".")[2] for path in adapted}
    everywhere = {path for path, module in lm.named_modules() if path.rpartition(".")[2] in leaves}
    return sorted(leaves) if everywhere == adapted else names if isinstance(names, str) else sorted(names)


def write(
    lm: PreTrainedModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str | None = None,
) -> None:
    """Writes the adapter of `lm`, whose tensors `state` has by their names in it, and a README.md. Of one process."""
    from safetensors.torch import save_file

    tensors = {_PREFIX + stored_name(name): tensor.detach() for name, tensor in state.items() if _is_adapter(name)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    with files.replacing(folder, size, "repeat the command") as part:
        adapter = copy.deepcopy(lm.peft_config[_NAME])
        adapter.target_modules = _targets(lm, adapter.target_modules)
        adapter.save_pretrained(str(part))
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        if digest := getattr(lm, "base_digest", None):
            (part / _OF_BASE).write_text(json.dumps({"weights": digest}) + "\n")
        tokenizer.save_pretrained(part)
        if card is not None:
            (part / "README.md").write_text(card)
