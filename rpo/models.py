"""Hugging Face causal LMs in, per-token log-probs out, and back to a Hugging Face folder.

Letters: B rows, T tokens of a row, N scored tokens, D model width, V vocabulary.
"""

import os
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from rpo import dist, packing, store
from rpo.attention import PACKED, attend
from rpo.attention import choose as choose_attention
from rpo.config import Fsdp, Model, Reference, UserError
from rpo.logprobs import full_logits, token_logps
from rpo.packing import Batch

transformers_logging.disable_progress_bar()  # one bar per rank and model says nothing that the run does not
AttentionInterface.register(PACKED, attend)
UNMASKED = "rpo_unmasked"  # the library's sdpa, under a name that it makes no mask for
AttentionInterface.register(UNMASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])
_CODE_IS_OFF = "which is not run; read it, then set model.trust_remote_code=true"


class Head(NamedTuple):
    """How a model turns hidden states into logits; `form` is bias_V, scale and softcap of `logprobs.full_logits`."""

    weight_VD: Tensor
    form: dict[str, Any]


def head_of(lm: PreTrainedModel) -> Head:
    """The head of `lm`, read off its output embedding and config; `probe` is what proves the reading right."""
    linear = lm.get_output_embeddings()
    config = lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(linear.weight, {"bias_V": getattr(linear, "bias", None), "scale": scale, "softcap": softcap})


class Policy(nn.Module):
    """The FSDP root: backbone and log-probs behind one `forward`, so nothing calls inside the root's back."""

    def __init__(self, lm: PreTrainedModel, *, compile_tiles: bool, attention: str = "sdpa"):
        super().__init__()
        self.lm = lm
        self.compile_tiles = compile_tiles
        self.attention = attention  # of packed rows; all else goes the model's own way
        self._own_attention = lm.config._attn_implementation
        self.eval()  # for good: train mode would only switch dropout on, and a reference has none

    def _hidden(self, batch: Batch) -> Tensor:
        packed = {}
        if batch.segments is not None:
            # Packed positions without a mask of their own would pass for documents: transformers would cut the rejected
            # branch off its prompt. Under a name it has no mask for, it makes none.
            packed = {"position_ids": batch.position_BT, "segments": batch.segments, "backend": self.attention}
        self._attend_by(PACKED if packed else self._own_attention)
        hidden_BTD = self.lm.base_model(input_ids=batch.input_ids_BT, use_cache=False, **packed).last_hidden_state
        return hidden_BTD.flatten(0, 1).index_select(0, batch.source_N)

    def _attend_by(self, name: str) -> None:
        # It stays until the next forward pass: a checkpointed layer runs again in backward, and must do the same again.
        self.lm.config._attn_implementation = name

    def forward(self, batch: Batch) -> Tensor:
        """logps_N: natural-log probability of each scored token, fp32 (float64 for a float64 model)."""
        head = head_of(self.lm)
        return token_logps(self._hidden(batch), head.weight_VD, batch.target_N, **head.form, compile=self.compile_tiles)

    def hidden(self, batch: Batch) -> Tensor:
        """hidden_ND at the positions that predict scored tokens, for `logits_of`."""
        return self._hidden(batch)

    def logits_of(self, hidden_ND: Tensor) -> Tensor:
        """logits_NV of hidden states that `hidden` gave, fp32 (float64 for a float64 model): of as many as N x V may hold."""
        head = head_of(self.lm)
        return full_logits(hidden_ND, head.weight_VD, **head.form)

    def generate(self, *, generation_config: GenerationConfig, **inputs: Any) -> Tensor:
        """Token ids from the library's `generate`, by `generation_config` alone.

        The library would fill what it leaves open from the model's own generation config, so that steps aside.
        """
        own, self.lm.generation_config = self.lm.generation_config, generation_config
        self._attend_by(self._own_attention)
        try:
            return self.lm.generate(generation_config=generation_config, **inputs)
        finally:
            self.lm.generation_config = own


def layers_of(lm: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers: the outermost list of as many modules as the config says there are layers."""
    num_layers = lm.config.get_text_config().num_hidden_layers
    for module in lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise UserError(
        f"model.path: {type(lm).__name__} has no list of {num_layers} decoder layers; it can not be sharded"
    )


def check(
    path: str, revision: str | None = None, *, key: str = "model.path", trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of the causal LM at `path` (folder or Hub name), without loading a weight.

    Raises UserError: nothing there, not a causal LM, or one that needs code from elsewhere without `trust_remote_code`.
    """
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


def check_paths(model: Model, reference: Reference) -> dict[str, PreTrainedConfig]:
    """The configs of the models that a run names, by the key that names them. Raises UserError as `check` does."""
    named = {"model.path": (model.path, model.revision), "reference.path": (reference.path, None)}
    trust = {"trust_remote_code": model.trust_remote_code}
    return {key: check(path, revision, key=key, **trust) for key, (path, revision) in named.items() if path is not None}


def check_offline(path: str, revision: str | None = None, *, key: str = "model.path") -> PreTrainedConfig:
    """The config in the folder `path`, or what the cache has of a Hub name; no weights are needed, nothing is fetched.

    Raises UserError.
    """
    try:
        return AutoConfig.from_pretrained(path, revision=revision, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each config class checks itself in its own way
        raise _unreadable(key, path, error, "no model's config could be read there without a network") from None


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM of that config without meaning, unproven: for a mode in which tensors have shapes but no data."""
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    if lm.config._attn_implementation == "sdpa":  # which would be given a mask where positions can not be looked at
        lm.config._attn_implementation = UNMASKED
    return lm


def config_for(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """The model config that `model.architecture` describes, sized to the tokenizer if there is one. Raises UserError."""
    own = {}
    if tokenizer is not None:
        own = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        own["vocab_size"] = len(tokenizer)
    try:
        return AutoConfig.for_model(**own | architecture)
    except Exception as error:  # each config class checks itself in its own way
        raise UserError(f"model.architecture={architecture}: {_first_line(error)}") from None


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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _unreadable(key: str, path: str, error: Exception, what: str) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(f"{key}={path}: comes with code of its own, {_CODE_IS_OFF}")
    return UserError(f"{key}={path}: {what} ({_first_line(error)})")


def load(
    path: str, revision: str | None, master: torch.dtype, *, key: str = "model.path", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal LM at `path` on the CPU with weights in `master` (float32 or float64), proven by `probe`.

    Raises UserError: unreadable (a pickle that is more than tensors is), weights missing (another kind of model), or a
    probe that disagrees.
    """
    how = {"trust_remote_code": trust_remote_code, "weights_only": True, "output_loading_info": True}
    try:
        lm, info = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=master, **how)
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    probe(lm, key=f"model.architecture={config.model_type}")
    return lm.to(master)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """What `model.dtype` comes to on this device: auto is bfloat16 on CUDA and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def sizes(lm: PreTrainedModel) -> dict[str, int]:
    """Parameters of the trunk (without embeddings) and of the head, number of layers, width of attention."""
    config, head = lm.config.get_text_config(), lm.get_output_embeddings().weight
    embeddings = {id(p): p.numel() for p in (lm.get_input_embeddings().weight, head)}
    num_heads, _, width = _heads(lm)
    return {
        "trunk": sum(p.numel() for p in lm.parameters()) - sum(embeddings.values()),
        "head": head.numel(),
        "layers": config.num_hidden_layers,
        "attention_width": num_heads * width,
    }


def _heads(lm: PreTrainedModel) -> tuple[int, int, int]:
    """Heads of queries, heads of keys, and their width; zeros where a model has no attention."""
    config = lm.config.get_text_config()
    if not (num_heads := getattr(config, "num_attention_heads", 0)):
        return 0, 0, 0
    width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return num_heads, getattr(config, "num_key_value_heads", None) or num_heads, width


@torch.no_grad()
def probe(lm: PreTrainedModel, *, key: str) -> None:
    """Raises UserError unless our log-probs equal the model's own on a short input, and the model is causal.

    A head with a scale, cap or projection that `head_of` does not know would otherwise train silently on other
    numbers (a skipped soft-cap is off by 4e-5 on a tiny random Gemma 2; Cohere's scale by 1.2). The comparison is of
    the same fp32 weights, so only rounding is allowed: 1e-5 of the largest logit.
    """
    lm.eval()
    if lm.base_model is lm:  # Llama 4
        raise UserError(f"{key}: {type(lm).__name__} names no backbone to take hidden states from")
    vocab_size = lm.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    input_ids_BT = torch.randint(vocab_size, (2, 16), generator=generator)
    source_N = torch.cat([torch.arange(15), 16 + torch.arange(15)])
    target_N = input_ids_BT[:, 1:].flatten()
    batch = Batch(input_ids_BT, source_N, target_N, torch.tensor([15, 15]), num_pairs=1, weight=1.0)

    logps_N = Policy(lm, compile_tiles=False)(batch)
    logits_BTV = lm(input_ids=input_ids_BT, use_cache=False).logits
    own_N = logits_BTV.log_softmax(-1)[:, :-1].gather(-1, input_ids_BT[:, 1:, None]).flatten()
    error, tolerance = (logps_N - own_N).abs().max().item(), 1e-5 * max(1.0, logits_BTV.abs().max().item())
    if not error <= tolerance:
        raise UserError(
            f"{key}: our log-probs differ from the model's own by {error:.1e} nats (allowed {tolerance:.0e}); "
            f"{type(lm).__name__} has a head that rpo does not compute"
        )
    changed_BT = input_ids_BT.clone()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % vocab_size
    changed_BTV = lm(input_ids=changed_BT, use_cache=False).logits
    if not (changed_BTV - logits_BTV)[:, :-1].abs().max().item() <= tolerance:
        raise UserError(f"{key}: {type(lm).__name__} is not causal: a later token changes earlier predictions")


@torch.no_grad()
def why_not_packed(lm: PreTrainedModel, longest: int) -> str | None:
    """Why `lm` can not be trained on packed rows; None where two pairs, packed, score as they do padded.

    A probe and not a list: Falcon ignores the attention interface with only a log line (off by .09 nats), StableLM
    drops what it is told about the pairs, recurrent layers carry chosen into rejected. `longest` is the longest text of
    the run (P + max(C, R)): the model's sliding window must not be shorter.
    """
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])  # Mistral's window is in every layer
    if other := kinds - {"full_attention", "sliding_attention"}:
        return f"it has {', '.join(sorted(other))} layers"
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds and window is not None and window < longest:  # PhiMoE does not tell `attend`
        return f"a layer sees {window} tokens back, the longest text has {longest}"
    ids = torch.randint(config.vocab_size, (40,), generator=torch.Generator().manual_seed(0)).numpy()
    triples = [tuple(np.split(ids[:23], [6, 15])), tuple(np.split(ids[23:], [9, 11]))]
    prompt, chosen, rejected = np.array([list(map(len, triple)) for triple in triples]).T
    lengths = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    rows = SimpleNamespace(row=triples.__getitem__, ref_logps=None, **lengths)
    policy, both = Policy(lm, compile_tiles=False), np.arange(2)
    padded_N = policy(packing.padded_batch(rows, both))
    batch = packing.packed_batch(rows, both)
    try:
        packed_N = policy(replace(batch, segments=replace(batch.segments, reach=longest)))
    except UserError as error:
        return str(error)
    except Exception as error:  # what can not take the positions or the pairs says so in its own way
        return f"its code does not pass on which pair a token belongs to ({_first_line(error)})"
    finally:
        policy._attend_by(policy._own_attention)
    error, allowed = (packed_N - padded_N).abs().max().item(), 1e-5 * max(1.0, padded_N.abs().max().item())
    return None if error <= allowed else f"packed and padded differ by {error:.0e} nats"


def prepare(
    lm: PreTrainedModel,
    mesh: DeviceMesh,
    fsdp: Fsdp,
    *,
    compute_dtype: torch.dtype,
    compile: bool,
    trainable: bool,
    attention: str = "sdpa",
) -> Policy:
    """`lm` as a sharded `Policy` on the mesh's device; frozen where it is a reference.

    `attention` is layout.attention, for packed rows. Raises UserError where this device lacks it.
    """
    lm.requires_grad_(trainable)
    softcap = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
    backend = choose_attention(attention, torch.device(mesh.device_type), compute_dtype, softcap, _heads(lm))
    policy = Policy(lm, compile_tiles=compile, attention=backend)
    dist.shard(policy, layers_of(lm), mesh, fsdp, compute_dtype=compute_dtype, compile=compile)
    for method in (
        "hidden",
        "logits_of",
        "generate",
    ):  # FSDP gathers the root's weights around these as it does around forward
        register_fsdp_forward_method(policy, method)
    return policy


def save(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes `folder` in Hugging Face format: config, generation config, tokenizer, chat template and fp32 weights.

    A collective: every rank calls it, rank 0 writes. The weights are the masters, so nothing learned is rounded
    away. The folder appears whole or not at all.
    """
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
    store.sync(part)
    if folder.exists():  # of the same run, which has gone on since
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
