"""A Hugging Face LM as the FSDP root that scores: per-token log-probs out of one `forward`; pairs under policy and reference.

Letters: B rows, T tokens of a row, N scored tokens, D model width, V vocabulary, S responses, P pairs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rpo.config import NO_ADAPTER, Fsdp, Lora
from rpo.data.batch import Batch
from rpo.errors import UserError
from rpo.losses import PairLogps
from rpo.model import four_bit, lora, shard, spread
from rpo.model.attention import PACKED, register
from rpo.model.attention import choose as choose_attention
from rpo.model.logprobs import full_logits, response_sums, token_logps

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel


class Head(NamedTuple):
    """How a model turns hidden states into logits; `form` is bias_V, scale and softcap of `logprobs.full_logits`."""

    weight_VD: Tensor
    form: dict[str, Any]


_TIMES = ("logit_scale", "lm_head_multiplier")  # of Cohere, of Falcon-H1
_OVER = ("logits_scaling", "logits_mup_width_multiplier")  # of Granite, of Inkling
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # of Gemma, RecurrentGemma, xLSTM


def head_of(lm: PreTrainedModel) -> Head:
    """The head of `lm`, read off its output embedding and config; `probe` is what proves the reading right."""
    linear = lm.get_output_embeddings()
    config = lm.config.get_text_config()
    times, over = [[getattr(config, name, None) or 1.0 for name in names] for names in (_TIMES, _OVER)]
    if config.model_type == "hyperclovax":  # multiplies by what Granite divides by
        times, over = times + over, []
    scale = math.prod(times) / math.prod(over)
    softcap = next(filter(None, (getattr(config, name, None) for name in _SOFTCAPS)), None)
    return Head(linear.weight, {"bias_V": getattr(linear, "bias", None), "scale": scale, "softcap": softcap})


class Policy(nn.Module):
    """The FSDP root: backbone and log-probs behind one `forward`, so nothing calls inside the root's back."""

    def __init__(self, lm: PreTrainedModel, *, compile_tiles: bool, attention: str = "sdpa"):
        super().__init__()
        register()
        self.lm = lm
        self.compile_tiles = compile_tiles
        self.attention = attention  # of packed rows; all else goes the model's own way
        self._own_attention = lm.config._attn_implementation
        self.compute_dtype = lm.dtype
        self.load_in_4bit = False
        self.compiled_layers = 0  # that ran as compiled code in the last forward pass
        self.neighbours: str | None = None  # what `sampling` has measured of its batches
        self.dropouts: list[nn.Module] = []  # of an adapter: on wherever a gradient is taken
        self.eval()  # for good: train mode would only switch dropout on, and a reference has none

    def _hidden(self, batch: Batch) -> Tensor:
        packed = {}
        if batch.segments is not None:
            # Packed positions without a mask of their own would pass for documents: transformers would cut the rejected
            # branch off its prompt. Under a name it has no mask for, it makes none.
            if self.attention == "flex":
                _ = batch.segments.block_mask  # made now: within a compiled layer it would break each layer's graph
            packed = {"position_ids": batch.position_BT, "segments": batch.segments, "backend": self.attention}
        self._attend_by(PACKED if packed else self._own_attention)
        self._drop(torch.is_grad_enabled())
        eager = shard.eager_calls()
        hidden_BTD = self.lm.base_model(input_ids=batch.input_ids_BT, use_cache=False, **packed).last_hidden_state
        if self.compile_tiles:
            eager = shard.eager_calls() - eager
            self.compiled_layers = self.lm.config.get_text_config().num_hidden_layers - eager
        return hidden_BTD.flatten(0, 1).index_select(0, batch.source_N)

    def _attend_by(self, name: str) -> None:
        # It stays until the next forward pass: a checkpointed layer runs again in backward, and must do the same again.
        self.lm.config._attn_implementation = name

    def _drop(self, on: bool) -> None:
        for dropout in self.dropouts:  # until the next forward pass, as above
            dropout.train(on)

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
        self._drop(False)
        try:
            # Eagerly: a layer's number in the KV cache is a guard, so each would be compiled by itself and use up the limit.
            with torch.compiler.set_stance("force_eager"):
                return self.lm.generate(generation_config=generation_config, **inputs)
        finally:
            self.lm.generation_config = own


def layers_of(lm: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers: the outermost list of as many modules as the config says there are layers."""
    num_layers = lm.config.get_text_config().num_hidden_layers
    for module in lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise UserError(f"model.path: {type(lm).__name__} has no list of {num_layers} decoder layers; it cannot be sharded")


def attention_heads(lm: PreTrainedModel) -> tuple[int, int, int]:
    """Heads of queries, heads of keys, and their width; zeros where a model has no attention."""
    config = lm.config.get_text_config()
    if not (num_heads := getattr(config, "num_attention_heads", 0)):
        return 0, 0, 0
    width = widest(config, "head_dim") or config.hidden_size // num_heads
    return num_heads, widest(config, "num_key_value_heads") or num_heads, width


def widest(config: PreTrainedConfig, name: str) -> int | None:
    """A config's number, the largest of its layers' where each has its own (Gemma 4), None if it has none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers refuses to give one for all
        own = [getattr(layer, name, None) for layer in config.per_layer_config]
        return max(filter(None, own), default=None)


def prepare(
    lm: PreTrainedModel,
    mesh: DeviceMesh,
    fsdp: Fsdp,
    *,
    compute_dtype: torch.dtype,
    compile: bool,
    trainable: bool,
    attention: str = "auto",
    whole: PreTrainedModel | None = None,
    load_in_4bit: bool = False,
) -> Policy:
    """`lm` as a sharded `Policy` on the mesh's device; frozen where it is a reference.

    `attention` is layout.attention, for packed rows. Where `lm` has no data it is that of `whole`, on rank 0 (`spread`).
    Raises UserError where this device lacks the attention.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    if not trainable:  # else what the class itself has frozen stays so
        lm.requires_grad_(False)
    softcap = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
    backend = choose_attention(attention, torch.device(mesh.device_type), compute_dtype, softcap, attention_heads(lm))
    if load_in_4bit:
        for each in {id(model): model for model in (whole, lm) if model is not None}.values():
            four_bit.quantise(each, compute_dtype, torch.device(mesh.device_type))
    if lora.named(lm):
        lora.freeze(lm, compute_dtype)
    policy = Policy(lm, compile_tiles=compile, attention=backend)
    policy.compute_dtype, policy.load_in_4bit = compute_dtype, load_in_4bit
    layers = layers_of(lm)
    if shared := shard.shared(policy, layers):
        raise UserError(
            f"model.path: {type(lm).__name__} has one weight in two places ({shared}), but each layer is sharded by itself; "
            "give a model whose layers have weights of their own"
        )
    shard.shard(policy, layers, mesh, fsdp, compute_dtype=compute_dtype, compile=compile)
    spread.fill(policy, whole, "cpu" if fsdp.cpu_offload else mesh.device_type)
    for method in ("hidden", "logits_of", "generate"):  # FSDP gathers the root's weights as it does around forward
        register_fsdp_forward_method(policy, method)
    return policy


class Loaded(NamedTuple):
    """A frozen sharded model, the digest of the weights that it was loaded with, and the dtype that it computes in."""

    policy: Policy
    digest: str
    compute: torch.dtype


def load_policy(
    path: str,
    revision: str | None = None,
    *,
    device: torch.device,
    dtype: str,
    compute: str = "auto",
    key: str = "model.path",
    trust_remote_code: bool = False,
    fsdp: Fsdp = shard.PLAIN,
    adapter: Lora = NO_ADAPTER,
    load_in_4bit: bool = False,
) -> Loaded:
    """The model at `path` (a folder or a Hub name), frozen, sharded, and ready to score and to sample.

    Its weights are as wide as those of a run with model.dtype=`dtype`, so that the run's checkpoints fit it, as does its `adapter`; it
    computes in `compute` (auto: as the run did), with `load_in_4bit` on weights of four bits. Raises UserError: what `hf.load` refuses, naming `key`, or a `compute` wider than
    the weights.
    """
    from rpo.model import hf
    from rpo.model.fingerprint import weights_digest

    if load_in_4bit:
        four_bit.check(device)
    computed = shard.compute_dtype(dtype if compute == "auto" else compute, device)
    master = torch.promote_types(shard.compute_dtype(dtype, device), torch.float32)
    if torch.promote_types(computed, master) != master:
        raise UserError(
            f"model.dtype={compute}: the run's weights are {str(master)[6:]}; give auto, or no wider a type"
        )
    read = partial(hf.load, path, revision, master, key=key, trust_remote_code=trust_remote_code, adapter=adapter)
    whole, lm = spread.load_once(read)
    digest, mesh = weights_digest(whole, adapter=adapter.r is None), shard.mesh(device, fsdp)
    # An evaluation's rows are padded, so no fused backend is looked for.
    policy = prepare(
        lm,
        mesh,
        fsdp,
        compute_dtype=computed,
        compile=False,
        trainable=False,
        attention="sdpa",
        whole=whole,
        load_in_4bit=load_in_4bit,
    )
    return Loaded(policy, digest, computed)


def since_start(pairs: PairLogps, batch: Batch) -> PairLogps:
    """The pairs beside the reference's log-probs that the batch carries, where it does: those of a moving one's start."""
    if batch.ref_S is None:
        return pairs
    ref_chosen_P, ref_rejected_P = batch.ref_S.split(batch.num_pairs)
    return replace(pairs, ref_chosen_P=ref_chosen_P, ref_rejected_P=ref_rejected_P)


def score(policy: Policy, reference: Policy | None, batch: Batch) -> PairLogps:
    """The batch's pairs under both models; gradients flow to `policy` unless the caller has turned them off.

    Without a `reference` its log-probs are those that the batch carries, if any.
    """
    ref_S = batch.ref_S
    if reference is not None:  # first: it may be the policy with its adapter off, and backward recomputes with it on
        with torch.no_grad():
            ref_S = response_sums(reference(batch), batch.length_S)
    logps_S = response_sums(policy(batch), batch.length_S)

    def sides(x_S: Tensor | None) -> list[Tensor | None]:
        parts = [] if x_S is None else list(x_S.split(batch.num_pairs))
        return parts + [None] * (2 - len(parts))  # supervised rows have no rejected side

    return PairLogps(*sides(logps_S), *sides(ref_S), *sides(batch.length_S))
