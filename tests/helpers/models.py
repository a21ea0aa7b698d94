"""Tiny things that many tests share: a process group of one, a word tokenizer, a model, preference files."""

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from rpo.data.batch import padded_batch
from rpo.model import shard
from rpo.model.policy import prepare
from tests.helpers.rows import LENGTHS, make_rows, make_tokenizer

# Families that are proven, as tiny configs: model_type -> what differs from the common sizes.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GEMMA = {"head_dim": 8}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": GEMMA,
    "gemma2": GEMMA | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 0.05},
    "gemma3_text": GEMMA | {"query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
}


@contextmanager
def float64_throughout():
    """Float64 stays float64 where transformers' norms, rotary angles and soft-capped attention compute in fp32.

    They round a prompt's gradient once where it is packed, twice where it is padded: 6e-8, which would hide the rest.
    """

    def widened(function):
        def call(x, *args, **kwargs):
            if x.dtype == torch.float64:
                args = [torch.float64 if arg is torch.float32 else arg for arg in args]
                kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
            return function(x, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:  # not a TorchFunctionMode: backward recomputes layers outside of one
        patch.setattr(torch.Tensor, "to", widened(torch.Tensor.to))
        # Positions too: transformers 5.17 multiplies them with the angles as matrices, which have to agree.
        wide = (torch.float64, torch.int64)
        patch.setattr(torch.Tensor, "float", lambda x: x.double() if x.dtype in wide else x.to(torch.float32))
        patch.setattr(F, "softmax", widened(F.softmax))
        yield


def make_lm(family="llama", vocab_size=None, seed=0, scale=1.0, **sizes):
    """A random model whose logits are far from uniform, so that a wrong number shows."""
    tokens = {
        "vocab_size": vocab_size or len(make_tokenizer()),
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    sizes = ({} if family == "gpt2" else SIZES) | FAMILIES.get(family, {}) | sizes
    lm_config = AutoConfig.for_model(family, **tokens, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(lm_config, dtype=torch.float32)
        with torch.no_grad():
            for param in lm.parameters():
                param.add_(0.1 * scale * torch.randn_like(param))
    return lm.eval()


VOCABULARY = len(make_tokenizer())


def ragged(vocab_size=VOCABULARY):
    """Ragged right-padded pairs, and each response by itself as (ids, prompt's length) in the batch's order."""
    rows = make_rows(LENGTHS, vocab_size=vocab_size)
    texts = [(rows.row(i)[0], rows.row(i)[side]) for side in (1, 2) for i in range(len(LENGTHS))]
    alone = [(torch.from_numpy(np.concatenate(text).astype(np.int64)), len(text[0])) for text in texts]
    return padded_batch(rows, np.arange(len(LENGTHS))), alone


def own_logps(lm, alone):
    """The same log-probs by the library's logits, one unpadded response at a time."""
    logps = []
    for ids_T, start in alone:
        logits_TV = lm(input_ids=ids_T[None], use_cache=False).logits[0, start - 1 : -1]
        logps.append(logits_TV.log_softmax(-1).gather(-1, ids_T[start:, None]).squeeze(-1))
    return torch.cat(logps)


def prepared(lm, device, *, compile=False, **fsdp):
    options = {"compute_dtype": torch.float32, "compile": compile, "trainable": True}
    fsdp = dataclasses.replace(shard.PLAIN, **fsdp)
    return prepare(lm, shard.mesh(device, fsdp), fsdp, **options)
