"""Hugging Face causal LMs: checked by their configs, loaded, built from scratch, saved in the same format."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rpo import dist, files
from rpo.errors import UserError
from rpo.model.policy import Policy, attention_heads
from rpo.model.probe import probe
from rpo.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CODE_IS_OFF = "which is not run; read it, then set model.trust_remote_code=true"


def check(
    path: str, revision: str | None = None, *, key: str = "model.path", trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of the causal LM at `path` (folder or Hub name), without loading a weight.

    Raises UserError: nothing there, not a causal LM, or one that needs code from elsewhere without `trust_remote_code`.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    folder = os.path.expanduser(path)
    if path.startswith(("/", "./", "../", "~")) and not os.path.isfile(os.path.join(folder, "config.json")):
        hint = f"; did you mean {path}/model?" if os.path.isdir(os.path.join(folder, "model")) else ""
        if os.path.isdir(os.path.join(os.path.dirname(folder), "checkpoints")):
            hint = (
                "; its run was stopped: the run's command with max_steps at the step of its last checkpoint writes it"
            )
        raise UserError(f"{key}={path}: no Hugging Face model there (no config.json){hint}")
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        names = config.architectures or []
        causal = all(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)  # BertForMaskedLM is none
        kernel = config.get_text_config()._attn_implementation or ""
    except Exception as error:  # each config class checks itself in its own way
        raise _unreadable(key, path, error, "no Hugging Face model could be read there") from None
    if "/" in kernel and not trust_remote_code:  # transformers would fetch and run it
        raise UserError(f"{key}={path}: its attention is {kernel} of the Hub, {_CODE_IS_OFF}")
    own = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own and (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not causal):
        kind = ", ".join(names) or type(config).__name__
        raise UserError(f"{key}={path}: holds {kind}, not a causal LM; give a model for AutoModelForCausalLM")
    weights = ("*.safetensors", "*.bin", "*.index.json")
    if Path(path).is_dir() and not any(any(Path(path).glob(pattern)) for pattern in weights):
        raise UserError(f"{key}={path}: has a config but no weights (*.safetensors or *.bin); give a complete model")
    return config


def check_offline(path: str, revision: str | None) -> PreTrainedConfig:
    """The config in the folder `path`, or what the cache has of a Hub name; nothing is fetched. Raises UserError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, revision=revision, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each config class checks itself in its own way
        raise _unreadable(
            "model.path", path, error, "no model's config could be read there without a network"
        ) from None


def config_for(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """The model config that `model.architecture` describes, sized to the tokenizer if there is one. Raises UserError."""
    from transformers import AutoConfig

    own = {}
    if tokenizer is not None:
        own = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        own["vocab_size"] = len(tokenizer)
    try:
        return AutoConfig.for_model(**own | architecture)
    except Exception as error:  # each config class checks itself in its own way
        raise UserError(f"model.architecture={architecture}: {first_line(error)}") from None


def positions_of(configs: dict[str, PreTrainedConfig]) -> int:
    """The longest text, in tokens, that all of the models have positions for."""
    found = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs.values()]
    return min((positions for positions in found if positions), default=sys.maxsize)


def check_fit(configs: dict[str, PreTrainedConfig], tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Raises UserError where the models' vocabularies differ, or tokens or positions would not fit them."""
    sizes = {key: config.get_text_config().vocab_size for key, config in configs.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{key} has {size}" for key, size in sizes.items())
        raise UserError(f"reference.path: policy and reference have different vocabularies ({listed} tokens)")
    for key, config in configs.items():
        if len(tokenizer) > sizes[key]:
            raise UserError(
                f"{key}: the tokenizer has {len(tokenizer)} tokens, the model {sizes[key]}; give its own tokenizer"
            )
        rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
        trained = rope.get("original_max_position_embeddings") or longest
        if rope.get("rope_type") in ("longrope", "dynamic") and longest > trained:
            raise UserError(
                f"data.max_length: a row of {longest} tokens is left; beyond {trained} {key} changes the rotary angles of "
                f"all texts in a batch with its longest, so no pair has log-probs of its own; set data.max_length={trained}"
            )
        if longest > (positions := positions_of({key: config})):
            raise UserError(
                f"data.max_length: a row of {longest} tokens is left, {key} has {positions} positions; "
                f"set data.max_length={positions} or less"
            )


def _unreadable(key: str, path: str, error: Exception, what: str) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(f"{key}={path}: comes with code of its own, {_CODE_IS_OFF}")
    return UserError(f"{key}={path}: {what} ({first_line(error)})")


def load(
    path: str, revision: str | None, master: torch.dtype, *, key: str = "model.path", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal LM at `path` on the CPU with weights in `master` (float32 or float64), verified by `probe`.

    Raises UserError: unreadable (a pickle that is more than tensors is), weights missing (another kind of model), or a
    probe that disagrees.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per rank and model says nothing that the run does not
    try:
        lm, info = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=master,
            trust_remote_code=trust_remote_code,
            weights_only=True,
            output_loading_info=True,
        )
    except pickle.UnpicklingError:
        raise UserError(
            f"{key}={path}: its *.bin is a pickle of more than tensors, which could run code and is not loaded; "
            "give safetensors"
        ) from None
    except Exception as error:  # files, the library and a model's own code: each its own type
        raise _unreadable(key, path, error, "the weights could not be loaded") from None
    if info["missing_keys"]:
        name = sorted(info["missing_keys"])[0]
        raise UserError(f"{key}={path}: the checkpoint lacks {name}; it is incomplete or not a causal LM")
    probe(lm, key=f"{key}={path}")
    return lm


def build(config: PreTrainedConfig, seed: int, master: torch.dtype) -> PreTrainedModel:
    """A causal LM of that config with random weights, a function of `seed`."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    probe(lm, key=f"model.architecture={config.model_type}")
    return lm.to(master)


def sizes(lm: PreTrainedModel) -> dict[str, int]:
    """Parameters of the trunk (without embeddings) and of the head, number of layers, width of attention."""
    config, head = lm.config.get_text_config(), lm.get_output_embeddings().weight
    embeddings = {id(p): p.numel() for p in (lm.get_input_embeddings().weight, head)}
    num_heads, _, width = attention_heads(lm)
    return {
        "trunk": sum(p.numel() for p in lm.parameters()) - sum(embeddings.values()),
        "head": head.numel(),
        "layers": config.num_hidden_layers,
        "attention_width": num_heads * width,
    }


def save(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes `folder` in Hugging Face format: config, generation config, tokenizer, chat template and fp32 weights.

    A collective: every rank calls it, rank 0 writes. The weights are the masters, so nothing learned is rounded
    away. The folder appears whole or not at all.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(policy, options=options)
    if dist.is_main():
        _write(policy.lm, state, tokenizer, folder)
    dist.barrier()  # or a rank that exits now would have torchrun end rank 0 in the middle of its files


def _write(lm: PreTrainedModel, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with torch.device("meta"):
        whole = type(lm)(lm.config)
    whole.load_state_dict({k.removeprefix("lm."): v for k, v in state.items()}, strict=False, assign=True)
    whole.tie_weights()  # with several ranks the gathered state names a tied head too
    whole.generation_config = lm.generation_config
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    whole.save_pretrained(part)
    tokenizer.save_pretrained(part)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    files.sync(part)
    if folder.exists():  # of the same run, which has continued since
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
