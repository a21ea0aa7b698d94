"""Hugging Face causal LMs: checked by their configs, loaded, built from scratch, saved in the same format."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from rpo import config as settings
from rpo import dist
from rpo.errors import UserError
from rpo.model import lora
from rpo.model.policy import attention_heads
from rpo.model.probe import border, probe, rotary
from rpo.model.stored import integer_weight, left_behind, lost_of, stored_dtype, stored_tensors
from rpo.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CODE_IS_OFF = "which is not run; read it, then set model.trust_remote_code=true"


def check(
    path: str, revision: str | None = None, *, key: str = "model.path", trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of the causal LM at `path` (folder or Hub name), without loading a weight; that of its base for an adapter.

    Raises UserError: nothing there, not a causal LM, an adapter that `lora.found` refuses, weights that are not numbers to be
    trained (quantised), one that needs code from elsewhere without `trust_remote_code`, or whose soft-cap this transformers would leave out.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    folder = os.path.expanduser(path)
    if revision is not None and os.path.isdir(folder):
        raise UserError(f"model.revision={revision}: {key}={path} is a folder, which has no revisions; set it to null")
    if adapter := lora.found(path, revision, key=key):
        base, where = adapter.base_model_name_or_path, f"{key}={path}: base_model_name_or_path"
        if lora.found(base, adapter.revision, key=where):
            raise UserError(f"{where}={base}: is an adapter itself; merge one of them")
        return check(base, adapter.revision, key=where, trust_remote_code=trust_remote_code)
    if path.endswith(".gguf") or (
        os.path.isdir(folder) and not _holds(folder, "config.json") and _holds(folder, "*.gguf")
    ):
        raise UserError(
            f"{key}={path}: is a GGUF file, for inference alone; give the Hugging Face model that it was made of"
        )
    is_local = path.startswith(("/", "./", "../", "~")) or os.path.isdir(os.path.dirname(folder))
    if is_local and not os.path.isfile(os.path.join(folder, "config.json")):
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
    if quantised := getattr(config, "quantization_config", None):
        kind = (
            quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
        )
        raise UserError(
            f"{key}={path}: is quantised ({kind}), so its weights cannot be trained; give the original model"
        )
    if "/" in kernel and not trust_remote_code:  # transformers would fetch and run it
        raise UserError(f"{key}={path}: its attention is {kernel} of the Hub, {_CODE_IS_OFF}")
    own = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own and (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not causal):
        kind = ", ".join(names) or type(config).__name__
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and config.get_text_config() is not config:
            raise UserError(
                f"{key}={path}: holds {kind}, of which only the language model can be trained; take it out with "
                f"python -m rpo.model.language_model {path} DIR, and give DIR"
            )
        raise UserError(f"{key}={path}: holds {kind}, not a causal LM; give a model for AutoModelForCausalLM")
    check_softcap(config, f"{key}={path}")
    weights = ("*.safetensors", "*.bin", "*.index.json")
    if os.path.isdir(folder) and not any(_holds(folder, pattern) for pattern in weights):
        raise UserError(f"{key}={path}: has a config but no weights (*.safetensors or *.bin); give a complete model")
    return config


def check_softcap(config: PreTrainedConfig, where: str) -> None:
    """Raises UserError for a soft-cap of attention scores that this transformers leaves out: by sdpa, before 5.21.1."""
    text = config.get_text_config()
    softcap, kernel = getattr(text, "attn_logit_softcapping", None), text._attn_implementation
    if softcap and kernel in (None, "sdpa") and Version(version("transformers")) < Version("5.21.1"):
        raise UserError(
            f"{where}: its attention caps scores at {softcap:g} (attn_logit_softcapping), which transformers "
            f"{version('transformers')} leaves out; pip install -U 'transformers>=5.21.1'"
        )


def _holds(folder: str, pattern: str) -> bool:
    return any(Path(folder).glob(pattern))


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
    """The longest text, in tokens, that all of the models have positions for, be it by scaled rotary angles."""
    return min(map(_positions, configs.values()), default=sys.maxsize)


def _positions(config: PreTrainedConfig) -> int:
    names = ("max_target_positions", "max_position_embeddings", "max_seq_len")  # the first of Whisper, the last of MPT
    own = next(filter(None, (getattr(config.get_text_config(), name, None) for name in names)), sys.maxsize)
    # YaRN's max_position_embeddings may be the context before the scaling or after it, linear's too.
    scaled = [
        int((rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or own))
        for rope in rotary(config)
        if rope.get("rope_type") in ("yarn", "linear")
    ]
    return max([own, *scaled])


def check_fit(
    configs: dict[str, PreTrainedConfig], longest: int, largest_id: int, *, distributions: bool = False
) -> None:
    """Raises UserError where tokens or positions would not fit the models.

    `longest` and `largest_id` are of the data: a tokenizer may know more tokens than a model, or fewer, and embeddings may
    be padded to different sizes, save where whole `distributions` of the next token are compared, as for a KL.
    """
    sizes = {key: config.get_text_config().vocab_size for key, config in configs.items()}
    if distributions and len(set(sizes.values())) > 1:
        listed = ", ".join(f"{key} has {size}" for key, size in sizes.items())
        raise UserError(f"reference.path: policy and reference have different vocabularies ({listed} tokens)")
    for key, config in configs.items():
        if largest_id >= sizes[key]:
            raise UserError(
                f"{key}: the data has a token of id {largest_id}, the model {sizes[key]} embeddings; "
                "set model.tokenizer to the model's own, or resize the model"
            )
        if longest > (trained := border(config)):
            raise UserError(
                f"data.max_length: a row of {longest} tokens is left; beyond {trained} {key} changes the rotary angles of "
                f"all texts in a batch with its longest, so no pair has log-probs of its own; set data.max_length={trained}"
            )
        if longest > (positions := positions_of({key: config})):
            raise UserError(
                f"data.max_length: a row of {longest} tokens is left, {key} has {positions} positions; "
                f"set data.max_length={positions} or less"
            )


def count_parameters(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> int:
    """How many parameters a model of this config has; 0 where its class cannot be made without data, as loading will say."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    except Exception:  # of a class's own code
        return 0
    return sum(param.numel() for param in lm.parameters())


def _unreadable(key: str, path: str, error: Exception, what: str) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(f"{key}={path}: comes with code of its own, {_CODE_IS_OFF}")
    return UserError(f"{key}={path}: {what} ({first_line(error)})")


def load(
    path: str,
    revision: str | None,
    master: torch.dtype,
    *,
    key: str = "model.path",
    trust_remote_code: bool = False,
    saved: bool = False,
    adapter: settings.Lora = settings.NO_ADAPTER,
    seed: int = 0,
) -> PreTrainedModel:
    """The causal LM at `path` on the CPU with weights in `master` (float32 or float64), verified by `probe`.

    An adapter's folder is loaded as its base with the adapter in it, which is not merged; another model gets a new one as
    `adapter` and `seed` say, where it has an r.

    Raises UserError: unreadable (a pickle that is more than tensors is), weights missing (another kind of model), a probe
    that disagrees, or, of one that is to be trained and `saved`, more weights than its class writes or a loss of its own.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    where = f"{key}={path}"
    if own := lora.found(path, revision, key=key):
        base = own.base_model_name_or_path
        lm = load(
            base, own.revision, master, key=f"{where}: its base", trust_remote_code=trust_remote_code, saved=saved
        )
        lora.attach(lm, own, path, revision, where=where)
        return lm
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
            f"{where}: its *.bin is a pickle of more than tensors, which could run code and is not loaded; "
            "give safetensors"
        ) from None
    except Exception as error:  # files, the library and a model's own code: each its own type
        raise _unreadable(key, path, error, "the weights could not be loaded") from None
    stored = stored_tensors(path, revision)
    if integer := integer_weight(stored):
        raise UserError(
            f"{where}: {integer}, but its config.json has no quantization_config to read it by; give the original model"
        )
    if info["missing_keys"]:
        name = sorted(info["missing_keys"])[0]
        raise UserError(f"{where}: the checkpoint lacks {name}; it is incomplete or not a causal LM")
    if lost := lost_of(info["unexpected_keys"]):
        what = f"does not load {lost[0]} ({len(lost)} such tensors), so it is not the model that the file is of"
        raise UserError(f"{where}: {type(lm).__name__} {what}; give a model of this class alone")
    if saved:
        _check_router(lm, where)
        _check_saveable(lm, where)
        if (left := left_behind(lm, stored)) and dist.is_main():
            listed = f"{left[0]}{', ...' if len(left) > 1 else ''}"
            what = f"{len(left)} tensors of its files ({listed}) are not loaded by {type(lm).__name__}"
            print(f"{where}: {what} and will not be in model/", flush=True)
    lm.stored_dtype = stored_dtype(stored)
    _compute_as_stored(lm)
    _keep_wide(lm)
    probe(lm, key=where)
    if adapter.r is not None:
        lora.add(lm, adapter, path, revision, seed=seed, where=where)
    return lm


def _compute_as_stored(lm: PreTrainedModel) -> None:
    """Keeps RWKV from dividing its own weights in eval mode, and states alike, which changes no logit but what is saved.

    The backbone reads a config of its own from then on: the one that is saved stays as it came.
    """
    if getattr(lm.config, "rescale_every", 0):
        lm.base_model.config = copy.copy(lm.config)
        lm.base_model.config.rescale_every = 0


def _keep_wide(lm: PreTrainedModel) -> None:
    """Makes a buffer of what the class froze and computes with in fp32 alone, as the bias of Ernie 4.5's router.

    Parameters are rounded to the compute dtype, buffers are not.
    """
    if not (wide := lm._keep_in_fp32_modules_strict):
        return
    with torch.device("meta"):
        whole = type(lm)(lm.config)
    for name, param in whole.named_parameters():
        if not param.requires_grad and any(part in name for part in wide):
            path, _, own = name.rpartition(".")
            module = lm.get_submodule(path)
            module.register_buffer(own, module._parameters.pop(own).detach())


_ROUTER_LOSSES = (
    "router_aux_loss_coef",
    "aux_loss_alpha",
    "moe_aux_loss_coeff",
    "router_z_loss_coef",
    "z_loss_coefficient",
)


def _check_router(lm: PreTrainedModel, where: str) -> None:
    """Raises UserError for a mixture of experts whose config asks for its router's loss, which is no part of the objective.

    One line where the config has a coefficient and does not ask: as in transformers and TRL, training is without it.
    """
    configs = (lm.config.get_text_config(), lm.config)
    coefficient = next((c for config in configs for name in _ROUTER_LOSSES if (c := getattr(config, name, None))), 0)
    if any(getattr(config, "output_router_logits", False) for config in configs):
        raise UserError(
            f"{where}: its config asks for the router's balancing loss (output_router_logits=true, coefficient {coefficient}), "
            "which is not part of the objective here; set output_router_logits to false in its config.json to train without"
        )
    if coefficient and dist.is_main():
        print(
            f"{where}: a mixture of experts; its router's balancing loss (coefficient {coefficient}) is not trained on",
            flush=True,
        )


def _check_saveable(lm: PreTrainedModel, where: str) -> None:
    """Raises UserError where `lm` has weights that its class does not write.

    A head of its own under a config that says tied is written as its own: the config is put right. What the class froze
    when it made them, as sinusoidal positions, is frozen again, which loading undoes.
    """
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        for config in (lm.config, lm.config.get_text_config()):
            config.tie_word_embeddings = False
    with torch.device("meta"):
        whole = type(lm)(lm.config)
    whole.tie_weights()
    if differing := sorted(ties(lm) ^ ties(whole)):
        raise UserError(
            f"{where}: {type(lm).__name__} has other weights, or ties them otherwise, than its class writes "
            f"({', '.join(differing[0][:2])}); give a model as the class saves it"
        )
    for name, param in whole.named_parameters():
        if not param.requires_grad:
            lm.get_parameter(name).requires_grad_(False)


def ties(lm: PreTrainedModel) -> set[tuple[str, ...]]:
    """The names of each parameter and persistent buffer; of a tied one all."""
    names: dict[int, list[str]] = {}
    for name, tensor in lm.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {tuple(sorted(own)) for own in names.values()}


def build(config: PreTrainedConfig, seed: int, master: torch.dtype) -> PreTrainedModel:
    """A causal LM of that config with random weights, a function of `seed`."""
    from transformers import AutoModelForCausalLM

    check_softcap(config, f"model.architecture={config.model_type}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    _compute_as_stored(lm)
    _keep_wide(lm)
    probe(lm, key=f"model.architecture={config.model_type}")
    return lm.to(master)


def sizes(lm: PreTrainedModel) -> dict[str, int]:
    """Parameters of the trunk (without embeddings) and of the head, number of layers, width of attention."""
    config, head = lm.config.get_text_config(), lm.get_output_embeddings().weight
    embeddings = {id(p): p for p in (lm.get_input_embeddings().weight, head)}
    trunk = [p for p in lm.parameters() if id(p) not in embeddings]
    num_heads, _, width = attention_heads(lm)
    return {
        "trunk": sum(p.numel() for p in trunk),
        "head": head.numel(),
        "frozen_trunk": sum(p.numel() for p in trunk if not p.requires_grad),
        "frozen_head": 0 if head.requires_grad else head.numel(),
        "layers": config.num_hidden_layers,
        "attention_width": num_heads * width,
    }
