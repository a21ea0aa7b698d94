"""Every class that AutoModelForCausalLM knows, tried as a run would load and train it: writes docs/MODELS.md.

    python -m bench.models [TYPE ...]     # of named model types: prints their rows, writes nothing

A tiny random model of each type is saved, loaded by `hf.load` and, where that admits it, held to its own logits, one
unpadded text at a time: log-probs and the gradient, padded and packed, in float32. Then bfloat16, activation checkpointing,
and what a prompt's neighbours in a batch may be. A class that is neither right nor refused is "wrong".
"""

import contextlib
import copy
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
from transformers.utils import logging

from rpo import dist
from rpo.data.batch import make_batch
from rpo.data.dataset import Rows
from rpo.errors import UserError
from rpo.model import hf, probe, sampling, shard
from rpo.model.policy import Policy, prepare

PAGE = Path(__file__).resolve().parents[1] / "docs" / "MODELS.md"
VOCABULARY = 64
# Sizes of a tiny model by the names that configs give them; a config takes those that it has.
SMALL = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim_model", "word_embed_proj_dim", "embed_dim"], 32),
    **dict.fromkeys(["attention_hidden_size", "lru_width", "embedding_size", "index_topk"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "n_inner"], 48),
    **dict.fromkeys(["ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp", "hidden_dim"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "linear_num_value_heads", "conv_kernel", "time_step_rank"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_global_key_value_heads", "linear_num_key_heads", "index_n_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "rotary_dim", "v_head_dim", "global_head_dim", "index_head_dim"], 8),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "kv_lora_rank", "q_lora_rank", "laurel_rank"], 8),
    **dict.fromkeys(["state_size", "ssm_state_size", "mamba_d_state", "mamba_num_heads", "mamba_head_dim"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_d_head", "mamba_headdim", "hidden_size_per_layer_input"], 8),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "zero_expert_num"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "shared_intermediate_size", "chunk_size"], 16),
    **dict.fromkeys(["mamba_chunk_size"], 16),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["n_groups", "mamba_n_groups", "mamba_ngroups", "n_mamba_heads", "bos_token_id"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "context_length", "n_ctx"], 128),
    **dict.fromkeys(["sliding_window", "attention_window_size"], 64),
    **{"adapter_rank": 4, "num_kv_shared_layers": 0, "mamba_expand": 2, "expand": 2},
    **{"pad_token_id": 0, "eos_token_id": 2},
}
LATENT = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "qk_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2}
# What some types need beside or in place of them; None: no tiny model is made.
MORE = {
    "bailing_hybrid": {"layer_group_size": 2, "linear_head_dim": 8, "linear_num_heads": 4, "num_expert_group": 1}
    | {"topk_group": 1, "num_experts_per_token": 2},
    "bamba": {"attn_layer_indices": [1]},
    "bert-generation": {"is_decoder": True},
    "blt": None,
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]}
    | {
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 1e4} for name in ("sliding_attention", "full_attention")
        }
    },
    "dbrx": None,
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": ROUTED | {"n_shared_experts": 1},
    "dots3_note": None,
    "dots3_note_text": None,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2},
    "gemma4_assistant": None,
    "gemma4_unified_assistant": None,
    "git": None,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": {"num_experts_per_token": 2, "num_expert_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "phi4_multimodal": None,
    "qwen4_exp": None,
    "qwen4_exp_text": None,
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 48, "is_decoder": True},
    "roc_bert": {
        "pronunciation_vocab_size": 8,
        "shape_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "rwkv": {"num_hidden_layers": 4, "rescale_every": 2},
    "xlm": None,
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": None,
    # As in Zyphra's: more hybrid layers than blocks, so that they share one.
    "zamba2": {"num_hidden_layers": 4, "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3], "attention_head_dim": 16}
    | dict.fromkeys(["layers_block_type", "layer_types"], ["mamba", "hybrid", "mamba", "hybrid"])
    | {"attention_hidden_size": 64, "n_mamba_heads": 8, "mamba_headdim": 8},
    "zaya": None,
}


@dataclass(frozen=True)
class Row:
    """What became of a type: `trains` is packed, padded, refused (why) or wrong (how); the others are of one that trains."""

    kind: str
    name: str
    trains: str
    why: str = ""
    bfloat16: str = ""
    recomputed: str = ""
    neighbours: str = ""


def config_of(kind: str):
    """A tiny config of the type."""
    return AutoConfig.for_model(kind, **_small(AutoConfig.for_model(kind), kind))


def _small(config, kind: str) -> dict:
    own = config.to_dict()
    sizes = {name: SMALL[name] for name, value in own.items() if name in SMALL and isinstance(value, int | None)}
    sizes = {name: value for name, value in sizes.items() if own[name] is not None or "token_id" in name}
    if "qk_rope_head_dim" in own:
        sizes |= LATENT
    if own.get("text_config"):
        sizes["text_config"] = _small(config.get_text_config(), "") | {
            "model_type": own["text_config"].get("model_type")
        }
    if isinstance(own.get("layer_types"), list):
        kinds = list(dict.fromkeys(own["layer_types"]))
        sizes["layer_types"] = [*kinds, *kinds][:2]
    return sizes | (MORE.get(kind) or {})


def made(kind: str) -> PreTrainedModel:
    """A random tiny model of the type, its logits far from uniform."""
    config = config_of(kind)
    with torch.device("meta"):
        size = sum(param.numel() for param in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 4e6, f"not tiny: {size / 1e6:.0f} million parameters"
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in lm.parameters():
            param.add_(0.05 * torch.randn_like(param))
    return lm


ROWS = Rows.of(
    [
        tuple(np.random.default_rng(i).integers(3, VOCABULARY, size) for size in sizes)
        for i, sizes in enumerate([(6, 5, 7), (4, 3, 9), (9, 6, 2)])
    ],
    "tiny",
)
BOTH = np.arange(len(ROWS))


def own(lm: PreTrainedModel) -> tuple[list[float], torch.Tensor]:
    """Each response's summed log-prob and the gradient of their alternating sum, by the library, one text at a time."""
    lm.zero_grad()
    sums = []
    for side in (1, 2):
        for i in BOTH:
            parts = ROWS.row(i)
            ids = torch.from_numpy(np.concatenate([parts[0], parts[side]]).astype(np.int64))
            logps = lm(input_ids=ids[None], use_cache=False).logits[0, len(parts[0]) - 1 : -1].log_softmax(-1)
            sums.append(logps.gather(-1, ids[len(parts[0]) :, None]).sum())
    return _result(lm, sums)


def ours(policy: Policy, layout: str) -> tuple[list[float], torch.Tensor]:
    """The same by the policy."""
    batch = make_batch(ROWS, BOTH, layout)
    return _result(policy, [part.sum() for part in policy(batch).split(batch.length_S.tolist())])


def _result(module: torch.nn.Module, sums: list[torch.Tensor]) -> tuple[list[float], torch.Tensor]:
    sum((-1) ** i * each for i, each in enumerate(sums)).backward()
    grads = [param.grad for param in module.parameters()]
    whole = [torch.zeros(0) if g is None else getattr(g, "full_tensor", lambda g=g: g)().flatten() for g in grads]
    module.zero_grad()
    return [float(each) for each in sums], torch.cat(whole)


def why_wrong(found: tuple[list[float], torch.Tensor], exact: tuple[list[float], torch.Tensor]) -> str:
    """How log-probs or gradient differ beyond rounding; empty where they do not."""
    gap = max(abs(a - b) for a, b in zip(found[0], exact[0], strict=True))
    turn = float((found[1] - exact[1]).norm() / exact[1].norm())
    if not gap <= 1e-4 * max(1.0, *map(abs, exact[0])):
        return f"log-probs off by {gap:.1e} nats"
    return "" if turn <= 1e-4 else f"gradient off by {turn:.1e}"


def tried(kind: str, folder: Path, device: torch.device) -> Row:
    """The row of one type."""
    name = CLASSES[kind]
    if kind in MORE and MORE[kind] is None:
        return Row(kind, name, "not tried", "no tiny model of it was made")
    config = AutoConfig.for_model(kind)
    config.architectures = [name]
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    try:
        hf.check(str(folder))
        made(kind).save_pretrained(folder)
        lm = hf.load(str(folder), None, torch.float32, saved=True)
    except UserError as error:
        return Row(kind, name, "refused", _brief(error, folder))
    why = probe.why_not_packed(lm, 64)
    layout, exact = "padded" if why else "packed", own(copy.deepcopy(lm))  # some keep states of what they have read

    def policy(dtype: torch.dtype = torch.float32, how: str = "none") -> Policy:
        fsdp = replace(shard.PLAIN, activation_checkpointing=how)
        return prepare(
            copy.deepcopy(lm), shard.mesh(device, fsdp), fsdp, compute_dtype=dtype, compile=False, trainable=True
        )

    try:
        plain = policy()
    except UserError as error:
        return Row(kind, name, "refused", _brief(error, folder))
    for each in dict.fromkeys(["padded", layout]):
        if wrong := why_wrong(ours(plain, each), exact):
            return Row(kind, name, "wrong", f"{each}: {wrong}")
    return Row(
        kind,
        name,
        layout,
        why or "",
        bfloat16=_in_bfloat16(lambda: policy(torch.bfloat16), layout, exact[0], device),
        recomputed=_recomputed(policy, layout, device),
        neighbours=_neighbours(policy(), device),
    )


def _brief(error: Exception, folder: Path) -> str:
    return (
        str(error)
        .replace(str(folder), "PATH")
        .removeprefix("model.path=PATH: ")
        .removeprefix("model.path: ")
        .replace("|", "\\|")
    )


def _in_bfloat16(make, layout: str, exact: list[float], device: torch.device) -> str:
    try:
        model = make()
        with probe.naming_dtype(model):
            found = ours(model, layout)[0]
    except UserError as error:
        return f"refused ({_brief(error, Path('-')).split(': ', 1)[-1].split(';')[0]})"
    tokens = [len(ROWS.row(i)[side]) for side in (1, 2) for i in BOTH]
    gap = max(abs(a - b) / n for a, b, n in zip(found, exact, tokens, strict=True))
    return "trains" if gap <= 0.25 else f"wrong: off by {gap:.1e} nats per token"


def _recomputed(make: Callable[..., Policy], layout: str, device: torch.device) -> str:
    ways = ("full", "selective")
    gaps = [probe.gradient_gap(make(how=how), ROWS, BOTH, device, layout=layout) for how in ways]
    return ", ".join(how for how, gap in zip(ways, gaps, strict=True) if gap <= 1e-4) or "none"


def _neighbours(policy: Policy, device: torch.device) -> str:
    prompts = [ROWS.row(i)[0].tolist() for i in BOTH]
    greedy = sampling.Sampling(0, 1, 0, max_new_tokens=6)
    how = {"device": device, "seed": [0], "reshard": True}
    try:
        together = sampling.sample(policy, prompts, greedy, [1], batch_size=8, **how)
        alone = [sampling.sample(policy, [prompt], greedy, [1], batch_size=8, **how)[0] for prompt in prompts]
    except Exception as error:  # generation is the library's, and some of its tiny models cannot
        return f"no answers ({type(error).__name__})"
    return policy.neighbours if together == alone else "wrong: answers differ"


def table(kinds: list[str]) -> list[Row]:
    """The rows of the named types, sorted by type."""
    logging.set_verbosity_error()
    device, rows = dist.init(), []
    for kind in sorted(kinds):
        with (
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            try:
                rows.append(tried(kind, Path(folder), device))
            except Exception as error:  # neither right nor refused
                what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                rows.append(Row(kind, CLASSES[kind], "wrong", what))
    return rows


def page(rows: list[Row]) -> str:
    """The rows as docs/MODELS.md."""
    counts = {
        trains: sum(row.trains == trains for row in rows) for trains in ("packed", "padded", "refused", "not tried")
    }
    said = [f"{count} {trains}" for trains, count in counts.items()]
    head = f"""# Models

Every type of model that `AutoModelForCausalLM` of transformers {transformers.__version__} knows, tried on a CPU with torch
{torch.__version__.partition("+")[0]}. A tiny random model of it is loaded as a run would load it, and what it trains on is
held to its own logits, one unpadded text at a time: log-probs to 1e-4 of their size, the gradient to 1e-4, in float32.
Of {len(rows)} types: {", ".join(said)}. `python -m bench.models` writes this page.

- *trains*: on packed rows, on padded rows and why not packed, or the line that refuses it.
- *bfloat16*: `model.dtype=bfloat16`, the default on CUDA.
- *recomputed*: the values of `fsdp.activation_checkpointing` whose gradient is that of `none`; a run refuses the others.
- *neighbours*: what may stand beside a prompt in a batch without changing its greedy answer: `any` prompt, those of `equal`
  length, or `none`. Batches are made accordingly.

| type | class | trains | bfloat16 | recomputed | neighbours |
|---|---|---|---|---|---|
"""
    lines = []
    for row in rows:
        trains = f"{row.trains}: {row.why}" if row.why else row.trains
        lines.append(f"| {row.kind} | {row.name} | {trains} | {row.bfloat16} | {row.recomputed} | {row.neighbours} |\n")
    return head + "".join(lines)


if __name__ == "__main__":
    found = table(sys.argv[1:] or list(CLASSES))
    if sys.argv[1:]:
        print(page(found))
    else:
        PAGE.write_text(page(found))
        print(f"{PAGE}: {len(found)} types")
