"""rpo.model.hf: our log-probs are the model's own, in every proven family, sharded or not; what is not so is refused."""

import gzip
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    Gemma3Config,
    LlamaForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from rpo.data import batch as data_batch
from rpo.data import dataset, schedule
from rpo.data.batch import make_batch, packed_batch, padded_batch
from rpo.errors import UserError
from rpo.model import hf, language_model, logprobs, saving, shard
from rpo.model import policy as model_policy
from rpo.model.logprobs import response_sums
from rpo.model.policy import Head, Policy
from rpo.model.probe import gradient_gap, noise_floor, probe, why_not_packed
from rpo.training import optim
from tests.helpers.models import FAMILIES, SIZES, VOCABULARY, float64_throughout, make_lm, own_logps, prepared, ragged
from tests.helpers.rows import LENGTHS, make_rows, make_tokenizer
from tests.helpers.runs import settings
from tests.helpers.templates import FORMATS, tokenizer_for

OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that even a toy's log-probs are cut into many along both sides."""
    monkeypatch.setitem(logprobs.TILES, "cpu", (8, 17))


def gradients(model, logps_N):
    """Gradients of a signed sum of log-probs, by parameter name without what wraps it."""
    sign_N = torch.randn(len(logps_N), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (sign_N * logps_N).sum().backward()
    grads = {name.removeprefix("lm."): param.grad for name, param in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad.clone() for name, grad in grads.items()}


def assert_same_gradients(ours, own, tolerance=1e-5):
    gap = sum(((ours[name] - grad).double() ** 2).sum() for name, grad in own.items()).sqrt()
    assert ours.keys() == own.keys()
    assert gap <= tolerance * sum((grad.double() ** 2).sum() for grad in own.values()).sqrt()


@pytest.mark.parametrize("family", [*FAMILIES, "phi"])
def test_logps_are_the_models_own(family, small_tiles):
    """Values (to 1e-6 of the logits' size) and gradients (1e-5) of a padded batch equal the library's logits row by row."""
    lm = make_lm(family)
    probe(lm, key="model.path")
    batch, alone = ragged()
    logps_N = Policy(lm, compile_tiles=False)(batch)
    assert "_TokenLogps" in type(logps_N.grad_fn).__name__, "the tiled path was not reached"
    own_N = own_logps(lm, alone)
    assert (logps_N - own_N).abs().max() <= 1e-6 * max(1, lm(batch.input_ids_BT).logits.abs().max())
    ours, own = gradients(lm, logps_N), gradients(lm, own_N)
    assert_same_gradients(ours, own)


# P, C, R: a one-token prompt, one-token responses, and in rows of 15 tokens one that the longest pair fills by itself.
PACKED = [(3, 2, 5), (5, 5, 5), (1, 4, 3), (2, 4, 1), (1, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", [*FAMILIES, "phi", "starcoder2", "opt"])
def test_packed_logps_are_the_models_own(family, dtype):
    """Three packed rows have the values and gradients of each response by itself: float64 to 1e-12, fp32 to 1e-5."""
    lm = make_lm(family, **OPT if family == "opt" else {})
    try:
        hf.check_softcap(lm.config, family)
    except UserError as refusal:  # by transformers 5.17 to 5.20, of Gemma 2
        pytest.skip(str(refusal))
    assert why_not_packed(lm, longest=128) is None
    rows, policy = make_rows(PACKED, vocab_size=VOCABULARY), Policy(lm.to(dtype), compile_tiles=False)
    parts = [members for members, _ in schedule.plan_step(rows, np.arange(5), layout="packed", budget=15).microbatches]
    assert [part.tolist() for part in parts] == [[1], [0, 4], [2, 3]]
    with float64_throughout() if dtype == torch.float64 else nullcontext():
        texts = [(rows.row(i)[0], rows.row(i)[side]) for part in parts for side in (1, 2) for i in part]
        alone = [(torch.from_numpy(np.concatenate(text).astype(np.int64)), len(text[0])) for text in texts]
        own_N = own_logps(lm, alone)
        own = gradients(lm, own_N)
        packed_N = torch.cat([policy(packed_batch(rows, part)) for part in parts])
        ours = gradients(lm, packed_N)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert packed_N.dtype == dtype and (packed_N - own_N).norm() <= tolerance * own_N.norm()
    assert_same_gradients(ours, own, tolerance)


@pytest.mark.skipif("RPO_TEST_DATA" not in os.environ, reason="RPO_TEST_DATA names no folder with real data")
def test_real_pairs_packed_are_padded(tmp_path):
    """32 real pairs of HH's lengths: packed and padded micro-batches have one value and one gradient, float64 to 1e-12."""
    path = Path(os.environ["RPO_TEST_DATA"], "hh_rlhf_helpful_test", "pairs.jsonl.gz")
    with gzip.open(path, "rt") as stream:
        texts = [json.loads(line)["chosen"] for line, _ in zip(stream, range(200), strict=False)]
    tokenizer = tokenizer_for(FORMATS["llama3"], texts=texts, vocab_size=600)
    cfg = settings(f"data.train={path}", "data.eval=null", "model.path=any").data
    rows, _ = dataset.load(str(path), cfg, tokenizer, pairs=True, cache_dir=tmp_path)
    longest = data_batch.longest(rows)
    lm = make_lm(vocab_size=len(tokenizer), max_position_embeddings=longest).double()
    assert why_not_packed(lm, longest) is None
    policy, some = Policy(lm, compile_tiles=False), np.random.default_rng(0).choice(len(rows), 32, replace=False)
    budget = int(2 * max(rows.prompt[i] + max(rows.chosen[i], rows.rejected[i]) for i in some))
    found = {}
    with float64_throughout():
        for layout in ("padded", "packed"):
            lm.zero_grad()
            plan = schedule.plan_step(rows, some, layout=layout, budget=budget)
            sums = np.zeros((len(rows), 2))
            for members, _ in plan.microbatches:
                batch = make_batch(rows, members, layout)
                sums_S = response_sums(policy(batch), batch.length_S)
                sign_S = torch.tensor([(-1) ** i for i in members] + [1] * len(members))  # by pair, not by place
                (sign_S * sums_S).sum().backward()
                sums[members] = sums_S.detach().reshape(2, -1).T.numpy()
            found[layout] = sums, {name: param.grad.clone() for name, param in lm.named_parameters()}
    (padded, own), (packed, ours) = found["padded"], found["packed"]
    assert np.linalg.norm(packed - padded) <= 1e-12 * np.linalg.norm(padded)
    assert_same_gradients(ours, own, 1e-12)


@pytest.mark.parametrize(
    ("family", "sizes", "reason"),
    [
        ("stablelm", {}, "missing 2 required keyword-only arguments: 'segments' and 'backend'"),  # drops arguments
        ("falcon", {}, "NoneType"),  # does without the interface, and not without positions of its own
        ("bloom", {}, "differ by .* nats"),  # counts distances by column
        ("mamba", {"state_size": 4}, "it has linear_attention layers"),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "differ by .* nats"),  # sinks
        ("llama4_text", LLAMA4, "it has chunked_attention layers"),
    ],
)
def test_why_not_packed(family, sizes, reason):
    """A model that would be silently wrong on packed rows is found out, in one line, and scores padded rows as before."""
    lm = make_lm(family, **sizes)
    ids_BT = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        before_BTV = lm(input_ids=ids_BT, use_cache=False).logits
        found = why_not_packed(lm, longest=40)
        assert re.search(reason, found) and "\n" not in found, found
        assert torch.equal(lm(input_ids=ids_BT, use_cache=False).logits, before_BTV)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mistral", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
        ("gemma2", {}),
        ("phimoe", {"num_local_experts": 2}),  # does not tell the attention function
    ],
)
def test_a_window_must_not_be_shorter_than_the_longest_text(family, sizes):
    """A sliding window of 20 tokens admits texts of 20, where packed rows score as padded ones do, and refuses 21."""
    lm = make_lm(family, sliding_window=20, **sizes)
    assert why_not_packed(lm, longest=20) is None
    assert why_not_packed(lm, longest=21) == "a layer sees 20 tokens back, the longest text has 21"
    rows, policy = make_rows([(10, 10, 10), (12, 3, 8)], vocab_size=VOCABULARY), Policy(lm, compile_tiles=False)
    padded_N, packed_N = (policy(make_batch(rows, np.arange(2), layout)) for layout in ("padded", "packed"))
    torch.testing.assert_close(packed_N, padded_N, rtol=1e-5, atol=1e-5)


def test_a_window_that_the_config_does_not_tell():
    """One that only a layer knows of is found when the layer asks for attention, though the probe's texts are shorter."""
    lm = make_lm("qwen2")
    lm.model.layers[1].self_attn.sliding_window = 20
    assert why_not_packed(lm, longest=20) is None
    assert why_not_packed(lm, longest=21) == "a layer sees 20 tokens back, the longest text has 21"


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_sharded_logps_are_the_models_own(family, group, small_tiles):
    """The same through FSDP2 at degree 1, with a head of its own, a tied one and one with a bias."""
    lm = make_lm(family)
    batch, alone = ragged()
    own_N = own_logps(lm, alone)
    own = gradients(lm, own_N)
    policy = prepared(lm, group)
    logps_N = policy(batch)
    torch.testing.assert_close(logps_N, own_N, rtol=1e-6, atol=1e-6)
    assert_same_gradients(gradients(policy, logps_N), own)
    torch.testing.assert_close(
        policy.logits_of(policy.hidden(batch)).log_softmax(-1).gather(-1, batch.target_N[:, None])[:, 0], logps_N
    )


@pytest.mark.parametrize("family", [*FAMILIES, "phi"])
def test_saved_model_is_the_model(family, group, tmp_path):
    """from_pretrained gives back bit-equal logits, the tie, the tokenizer with its template and the generation config."""
    lm = make_lm(family)
    lm.generation_config.max_new_tokens = 77
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    batch, _ = ragged()
    with torch.no_grad():
        expected_BTV = lm(batch.input_ids_BT).logits
    saving.save(prepared(lm, group, activation_checkpointing="full"), make_tokenizer(), tmp_path / "model")

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(batch.input_ids_BT).logits, expected_BTV)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.generation_config.max_new_tokens == 77
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == make_tokenizer().chat_template and len(tokenizer) == VOCABULARY
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "something half-written stayed"


HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
XLSTM = {"num_heads": 4, "embedding_dim": 32, "num_blocks": 2}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("falcon_h1", HYBRID | {"lm_head_multiplier": 0.25}),
        ("hyperclovax", {"logits_scaling": 0.25}),
        ("recurrent_gemma", {"logits_soft_cap": 0.5, "lru_width": 32, "attention_window_size": 64}),
        ("xlstm", XLSTM | {"output_logit_soft_cap": 0.5}),
    ],
)
def test_heads_that_scale_or_cap_by_another_name(family, sizes):
    """What each class calls the scale or cap of its logits is read off its config: log-probs are the model's own."""
    lm = make_lm(family, **sizes)
    probe(lm, key="model.path")
    batch, alone = ragged()
    with torch.no_grad():
        torch.testing.assert_close(Policy(lm, compile_tiles=False)(batch), own_logps(lm, alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "phi"])
def test_probe_catches_a_head_read_wrong(family, monkeypatch):
    """Were a soft-cap, a scale or a bias skipped, loading would stop and name the model's class."""
    lm = make_lm(family)
    monkeypatch.setattr(model_policy, "head_of", lambda lm: Head(lm.get_output_embeddings().weight, {}))
    with pytest.raises(UserError, match=f"model.path=DIR: .*{type(lm).__name__} has a head that rpo does not compute"):
        probe(lm, key="model.path=DIR")


def test_probe_catches_a_head_of_another_kind():
    """A model that does something of its own to its logits is refused, though the difference is one part in 1000."""
    lm = make_lm()
    lm.lm_head.register_forward_hook(lambda _module, _args, logits: logits * 1.001)
    with pytest.raises(UserError, match="differ from the model's own by"):
        probe(lm, key="model.path")


def count_calls(module, _args, out):
    module.calls += 1
    return out * (1 + 1e-3 * module.calls)


def halve(module, _args, _out):
    module.weight.data.mul_(0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lm: lm.lm_head.weight[3, 3].fill_(torch.nan), "lm_head.weight has NaN or infinite values; give a"),
        (
            lambda lm: lm.model.norm.register_forward_hook(lambda _m, _a, out: F.dropout(out, 0.1)),
            "differ .*LlamaForCausalLM gives other logits each time it reads one text, in eval mode too",
        ),
        (
            lambda lm: (
                lm.model.norm.register_buffer("calls", torch.zeros(()), persistent=False),
                lm.model.norm.register_forward_hook(count_calls),
            ),
            "LlamaForCausalLM changes model.norm.calls whenever it computes, in eval mode too",
        ),
        (
            lambda lm: lm.model.norm.register_forward_hook(halve),
            "LlamaForCausalLM changes model.norm.weight whenever it computes",
        ),
    ],
    ids=["nan", "dropout", "buffer", "weight"],
)
def test_probe_says_what_is_wrong(change, words):
    """Weights that are no numbers, random logits, and a forward pass that changes what it computes with each have a line."""
    lm = make_lm()
    with torch.no_grad():
        change(lm)
    with pytest.raises(UserError, match=f"^model.path: .*{words}") as caught:
        probe(lm, key="model.path")
    assert "head" not in str(caught.value).replace("lm_head.weight", "")


def test_probe_refuses_a_model_without_a_backbone():
    """Llama 4, whose class names no module that gives hidden states, is refused by name."""
    lm = make_lm("llama4_text", **LLAMA4)
    with pytest.raises(UserError, match="^model.path: Llama4ForCausalLM names no backbone to take hidden states from$"):
        probe(lm, key="model.path")


def test_probe_refuses_what_is_not_causal():
    """A model that sees later tokens is refused by name: a Llama with the mask off, and BERT as a 'causal LM'."""
    lm = make_lm()
    for layer in lm.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UserError, match="LlamaForCausalLM is not causal"):
        probe(lm, key="model.path")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with pytest.raises(UserError, match="BertLMHeadModel"):
        probe(BertLMHeadModel(BertConfig(vocab_size=50, is_decoder=False, **sizes)), key="model.path")


@pytest.mark.parametrize(
    "model_type,architecture",
    [
        ("llama", "LlamaForSequenceClassification"),
        ("llama", "LlamaModel"),
        ("bert", "BertForMaskedLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("t5", None),
    ],
)
def test_check_refuses_other_kinds_of_model(model_type, architecture, tmp_path):
    """A checkpoint that is no causal LM is refused by its config alone, by the key and its own name."""
    config = AutoConfig.for_model(model_type)
    config.architectures = architecture and [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"reference.path={tmp_path}: holds {architecture or 'T5Config'}, not a causal"
    ):
        hf.check(str(tmp_path), key="reference.path")


def test_check_refuses_a_missing_path(tmp_path):
    """A folder that is not there and one without a model are one-line errors."""
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=f"model.path={path}: no Hugging Face model") as caught:
            hf.check(str(path))
        assert "\n" not in str(caught.value)


def test_load_refuses_missing_weights(tmp_path):
    """A checkpoint that lacks a weight is refused by that weight's name, not filled with random numbers."""
    make_lm().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks model.layers.1.mlp.up_proj.weight"):
        hf.load(str(tmp_path), None, torch.float32)


def test_check_refuses_a_revision_of_a_folder(tmp_path):
    """A folder has none, and would be trained as it is."""
    make_lm().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^model.revision=step1000: model.path={tmp_path} is a folder"):
        hf.check(str(tmp_path), "step1000")


def test_check_fit():
    """Ids beyond the embeddings and rows too long are each refused with the fix; a match passes."""
    configs = {"model.path": make_lm().config, "reference.path": make_lm(seed=1).config}
    hf.check_fit(configs, 128, VOCABULARY - 1)
    with pytest.raises(UserError, match="a row of 129 tokens is left, model.path has 128 .*data.max_length=128"):
        hf.check_fit(configs, 129, 0)
    small = {"model.path": make_lm(vocab_size=VOCABULARY - 1).config}
    hf.check_fit(small, 8, VOCABULARY - 2)  # whatever else the tokenizer knows
    with pytest.raises(UserError, match=f"a token of id {VOCABULARY - 1}, the model {VOCABULARY - 1} embeddings"):
        hf.check_fit(small, 8, VOCABULARY - 1)
    padded = {**configs, **small}
    hf.check_fit(padded, 8, VOCABULARY - 2)
    with pytest.raises(UserError, match="different vocabularies"):
        hf.check_fit(padded, 8, 0, distributions=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin"])
def test_weights_that_need_a_scale_are_refused_without_a_config_of_it(kind, dtype, tmp_path):
    """Read as numbers they would be another model; the first such weight is named. Integer buffers are none."""
    lm, name = make_lm(), "model.layers.1.mlp.up_proj.weight"
    lm.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "shards" else "1GB")
    (file,) = [f for f in tmp_path.glob("*.safetensors") if name in load_file(f)]
    weights = load_file(file)
    weights[name] = (weights[name] * 50).to(dtype)
    if kind == "bin":
        file.unlink()
        torch.save(weights | {"lm.attn.bias": torch.ones(2, 2, dtype=torch.uint8)}, tmp_path / "pytorch_model.bin")
    else:
        save_file(weights, file, metadata={"format": "pt"})
    assert (kind == "shards") == (tmp_path / "model.safetensors.index.json").is_file()
    with pytest.raises(
        UserError, match=rf"^model.path={tmp_path}: {name} is stored as \w+, but its config.json has no qu"
    ):
        hf.load(str(tmp_path), None, torch.float32)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_angles_that_depend_on_the_batch_are_refused(kind):
    """Both change a whole batch's angles once one text exceeds the original length: such rows are refused, by key."""
    config = make_lm("phi3").config
    config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": 64}
    hf.check_fit({"model.path": config}, 64, 0)
    with pytest.raises(UserError, match="a row of 65 tokens is left; .*set data.max_length=64"):
        hf.check_fit({"model.path": config}, 65, 0)
    config.rope_parameters = {"full_attention": {"rope_type": kind, "original_max_position_embeddings": 32}}
    with pytest.raises(UserError, match="set data.max_length=32"):
        hf.check_fit({"model.path": config}, 65, 0)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
        (
            {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}},
            1024,
        ),
    ],
)
def test_a_scaled_context_is_read_as_it_is_meant(rope, positions):
    """The config's positions are the context before a scaling (Qwen with YaRN) or after it: the longer one is allowed."""
    config = make_lm().config
    config.rope_parameters = rope
    assert hf.positions_of({"model.path": config}) == positions


WHISPER = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}


@pytest.mark.parametrize(
    ("family", "name"), [("whisper", "max_target_positions"), ("mpt", "max_seq_len"), ("gpt2", "n_positions")]
)
def test_positions_by_another_name(family, name):
    """Whatever a config calls its positions: a text that fills them is read, one token more is the library's error."""
    sizes = {"whisper": WHISPER, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2}, "gpt2": FAMILIES["gpt2"]}[family]
    lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=VOCABULARY, **sizes | {name: 20, "pad_token_id": 0})
    )
    positions = hf.positions_of({"model.path": lm.config})
    assert positions == 20
    lm(input_ids=torch.ones(1, positions, dtype=torch.int64))
    with pytest.raises((IndexError, RuntimeError)):
        lm(input_ids=torch.ones(1, positions + 1, dtype=torch.int64))


def test_a_noise_floor_does_not_cross_where_angles_jump(group):
    """longrope: padding that crosses the original length would measure another model (a floor of .05 nats and more)."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24, **factors}
    lm = make_lm("phi3", max_position_embeddings=512, rope_parameters=rope)
    rows = make_rows([(9, 8, 9), (5, 9, 4)], vocab_size=VOCABULARY)
    policy, how = Policy(lm, compile_tiles=False), {"positions": 512, "compute_dtype": torch.float32}
    assert noise_floor(policy, rows, np.arange(2), group, **how) < 1e-5
    if Version(transformers.__version__) < Version("5.23"):
        return  # 5.17 keeps the short factors, of whatever length a text is
    lm.config.rope_parameters["original_max_position_embeddings"] = 30  # what crossing it would measure
    jumps = padded_batch(rows, np.arange(2), extra=17)
    assert (policy(jumps) - policy(padded_batch(rows, np.arange(2)))).abs().mean() > 0.01


# ---- what is trained is what is saved


def test_a_head_of_its_own_is_saved_though_the_config_says_tied(tmp_path, group):
    """Adapters merged into a tied model leave such files: the head is loaded, trained and saved, and the config put right."""
    make_lm(tie_word_embeddings=False).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    lm = hf.load(str(tmp_path / "a"), None, torch.float32, saved=True)
    policy = prepared(lm, group)
    batch, _ = ragged()
    before = policy(batch).detach()
    saving.save(policy, make_tokenizer(), tmp_path / "b")
    again = Policy(AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval(), compile_tiles=False)
    torch.testing.assert_close(again(batch), before, rtol=0, atol=1e-6)
    assert "lm_head.weight" in load_file(tmp_path / "b/model.safetensors")


def test_weights_that_the_forward_pass_divides_are_saved_whole(tmp_path, group):
    """RWKV in eval mode halves the weights of later layers: loaded, scored and saved they are the file's, as is the config."""
    lm = make_lm("rwkv", num_hidden_layers=4, rescale_every=2, attention_hidden_size=32)
    lm.save_pretrained(tmp_path / "a")
    before, (batch, _) = load_file(tmp_path / "a/model.safetensors"), ragged()
    policy = prepared(hf.load(str(tmp_path / "a"), None, torch.float32, saved=True), group)
    with torch.no_grad():
        policy(batch)
        saving.save(policy, make_tokenizer(), tmp_path / "b")
        own = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(batch.input_ids_BT).logits for name in "ab"]
    after = load_file(tmp_path / "b/model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) and torch.equal(*own)
    assert AutoConfig.from_pretrained(tmp_path / "b").rescale_every == 2


def test_what_a_class_freezes_stays_frozen(tmp_path, group, monkeypatch):
    """Loading makes all weights trainable; one that the class froze has no gradient, and AdamW and the clip leave it out."""
    init = LlamaForCausalLM.__init__

    def freezing(lm, config):
        init(lm, config)
        lm.model.embed_tokens.requires_grad_(False)

    make_lm().save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", freezing)
    policy = prepared(hf.load(str(tmp_path), None, torch.float32, saved=True), group, activation_checkpointing="full")
    optimizer = optim.adamw(policy, settings("data=files", "model.path=X", "data.train=Y").optim)
    before = {name: param.full_tensor().clone() for name, param in policy.named_parameters()}
    policy(ragged()[0]).sum().backward()
    assert optim.clip_grad_norm(policy, 1.0).isfinite()
    optim.step_if_finite(optimizer, torch.tensor(False), 1e-2)
    same = [name for name, param in policy.named_parameters() if torch.equal(param.full_tensor(), before[name])]
    assert same == ["lm.model.embed_tokens.weight"]


def test_what_a_class_keeps_in_fp32_is_not_rounded(tmp_path, group):
    """The bias of Ernie 4.5's router decides between experts by less than a bfloat16 of its size: the model's own log-probs."""
    lm = make_lm("ernie4_5_moe", moe_num_experts=8, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=0)
    with torch.no_grad():
        for name, param in lm.named_parameters():
            if name.endswith("e_score_correction_bias"):
                param.copy_(20 + 0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(0)))
    lm.save_pretrained(tmp_path / "a")
    batch, alone = ragged()
    wide, narrow = (
        own_logps(AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype).eval(), alone).float()
        for dtype in (torch.float32, torch.bfloat16)
    )
    loaded, mesh = hf.load(str(tmp_path / "a"), None, torch.float32, saved=True), shard.mesh(group, shard.PLAIN)
    how = {"compute_dtype": torch.bfloat16, "compile": False, "trainable": True}
    policy = model_policy.prepare(loaded, mesh, shard.PLAIN, **how)
    assert (policy(batch) - wide).abs().mean() < 2 * (narrow - wide).abs().mean()
    saving.save(policy, make_tokenizer(), tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("where", ["layers", "rest"])
def test_layers_that_share_weights_are_refused(where, group):
    """FSDP cuts layer by layer: one weight of two layers, or of a layer and the rest, is named."""
    lm = make_lm()
    if where == "layers":
        lm.model.layers[1].mlp = lm.model.layers[0].mlp
    else:
        lm.model.norm.weight = lm.model.layers[0].input_layernorm.weight
    named = {"layers": r"mlp.gate_proj.weight of layers 0 and 1", "rest": "lm.model.norm.weight, and in layer 0"}[where]
    with pytest.raises(UserError, match=rf"^model.path: LlamaForCausalLM has one weight in two places \({named}\)"):
        prepared(lm, group)


def test_weights_that_a_class_ignores_are_told(tmp_path, group, monkeypatch, capsys):
    """Qwen's head for several tokens stays in the file without a warning of the library's: one line where it would be lost."""
    make_lm().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    extra = {"mtp.fc.weight": torch.ones(4), "mtp.norm.weight": torch.ones(4)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", ["^mtp", "layers.1"])
    for saved, lines in ((False, 0), (True, 1)):
        hf.load(str(tmp_path), None, torch.float32, saved=saved)
        line = (
            "2 tensors of its files (mtp.fc.weight, ...) are not loaded by LlamaForCausalLM and will not be in model/"
        )
        assert capsys.readouterr().out.count(line) == lines


def test_weights_that_would_be_lost_are_refused_before_training(tmp_path):
    """A value head in the file, a LoRA in the modules: neither would be in model/. Buffers of old files are no weights."""
    make_lm().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # CodeGen's mask is one too
    old["model.layers.0.attn.causal_mask"] = torch.ones(1, 1, 2, 2, dtype=torch.uint8)
    save_file(weights | old, file, metadata={"format": "pt"})
    lm = hf.load(str(tmp_path), None, torch.float32, saved=True)
    for lost in ("model.layers.0.self_attn.q_proj.bias", "lm_head.bias"):  # of another class
        save_file(weights | {lost: torch.ones(4)}, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"does not load {lost} "):
            hf.load(str(tmp_path), None, torch.float32, saved=True)
    save_file(weights | {"v_head.weight": torch.ones(4)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not load v_head.weight "):
        hf.load(str(tmp_path), None, torch.float32, saved=True)
    lm.model.layers[0].self_attn.q_proj.lora_A = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(UserError, match=r"other weights.*q_proj\.lora_A\.weight"):
        hf._check_saveable(lm, "model.path=X")


def test_a_save_that_is_not_what_was_trained_fails(tmp_path, group, monkeypatch):
    """Files are compared with the weights in memory, bit for bit: a writer that drops or changes one is caught."""
    policy = prepared(make_lm(), group)
    save_pretrained = type(policy.lm).save_pretrained

    def changing(lm, folder, state_dict):
        save_pretrained(lm, folder, state_dict=state_dict)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] += 1e-6
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(type(policy.lm), "save_pretrained", changing)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM does not write what was trained"):
        saving.save(policy, make_tokenizer(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")]
)
def test_a_full_disk_at_the_end_is_one_line(error, tmp_path, group, monkeypatch):
    """What cannot be written is told with its size and leaves nothing behind; an older model/ stays."""
    policy = prepared(make_lm(), group)
    saving.save(policy, make_tokenizer(), tmp_path / "model")

    def full(lm, folder, state_dict):
        raise error

    monkeypatch.setattr(type(policy.lm), "save_pretrained", full)
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/model: cannot be written \(.*No space left.*make room for .* MiB and repeat"
    ) as caught:
        saving.save(policy, make_tokenizer(), tmp_path / "model")
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_class_that_writes_other_names_is_saved_whole(tmp_path, group):
    """Mixtral's experts are one tensor in memory and many in the file: read back, they are what was trained."""
    lm = make_lm("mixtral", num_local_experts=4)
    saving.save(prepared(lm, group), make_tokenizer(), tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert {name: tensor.tolist() for name, tensor in again.items()} == {
        name: tensor.tolist() for name, tensor in make_lm("mixtral", num_local_experts=4).state_dict().items()
    }


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("adapter_config.json", "{}", "its adapter_config.json names no kind of adapter"),
        (
            "config.json",
            '{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}',
            r"is quantised \(awq\)",
        ),
        ("weights.gguf", "GGUF", "is a GGUF file"),
    ],
)
def test_what_is_no_model_to_train_is_refused_by_its_kind(file, content, words, tmp_path):
    """An adapter, a quantised model and a GGUF file each have a line of their own with the way out."""
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=rf"^model.path={tmp_path}: {words}"):
        hf.check(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "release"),
    [("gemma2", "5.20.0"), ("vaultgemma", "5.17.0"), ("gemma2", "5.21.1"), ("gemma3_text", "5.17.0")],
)
def test_a_softcap_that_transformers_leaves_out_is_refused(family, release, tmp_path, monkeypatch):
    """Before 5.21.1 sdpa ignored attn_logit_softcapping: any config that has one is refused, loaded or built."""
    config = AutoConfig.for_model(family, **SIZES | FAMILIES.get(family, {}), vocab_size=VOCABULARY)
    config.architectures = ["XForCausalLM"]
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(hf, "version", lambda _: release)
    dropped = config.attn_logit_softcapping and release != "5.21.1"
    for load in (lambda: hf.check(str(tmp_path)), lambda: hf.build(config, 0, torch.float32)):
        with pytest.raises(UserError, match="caps scores at 50 .*>=5.21.1") if dropped else nullcontext():
            load()


def test_the_language_model_of_a_multimodal_checkpoint_is_taken_out(tmp_path):
    """Gemma 3 4B's class is refused with a command, which writes a causal LM of the same logits."""
    text = {"vocab_size": VOCABULARY, "head_dim": 8, "pad_token_id": 0, **SIZES}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"image_token_index": 9, "boi_token_index": 8, "eoi_token_index": 7, "mm_tokens_per_image": 4}
    vision |= {"image_size": 28, "patch_size": 14}
    whole = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision, **tokens)).eval()
    whole.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="only the language model .* python -m rpo.model.language_model .* DIR"):
        hf.check(str(tmp_path / "whole"))
    language_model.take_out(str(tmp_path / "whole"), str(tmp_path / "text"))
    hf.check(str(tmp_path / "text"))
    lm = hf.load(str(tmp_path / "text"), None, torch.float32, saved=True)
    ids = torch.arange(10, 30)[None]
    torch.testing.assert_close(lm(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="is there already"):
        language_model.take_out(str(tmp_path / "whole"), str(tmp_path / "text"))


def test_a_language_model_that_the_library_loads_alone_is_taken_out(tmp_path, capsys):
    """Qwen3.5's class for text ignores the vision tower: it is written as it is, and what stays behind is told."""
    linear = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    text = SIZES | linear | {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "head_dim": 8, "pad_token_id": 0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "num_position_embeddings": 16}
    whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="python -m rpo.model.language_model .* DIR"):
        hf.check(str(tmp_path / "whole"))
    language_model.take_out(str(tmp_path / "whole"), str(tmp_path / "text"))
    num_vision = sum("visual" in name for name in load_file(tmp_path / "whole/model.safetensors"))
    assert f"without {num_vision} other tensors of {tmp_path}/whole (model.visual." in capsys.readouterr().out
    hf.check(str(tmp_path / "text"))
    lm, ids = hf.load(str(tmp_path / "text"), None, torch.float32, saved=True), torch.arange(10, 30)[None]
    torch.testing.assert_close(lm(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert "not loaded" not in capsys.readouterr().out


@pytest.mark.parametrize("asks", [True, False])
def test_a_router_loss_is_never_silently_absent(asks, tmp_path, group, capsys):
    """A mixture of experts whose config asks for the balancing loss is refused; one that has a coefficient gets a line."""
    make_lm("mixtral", num_local_experts=4, output_router_logits=asks).save_pretrained(tmp_path)
    hf.load(str(tmp_path), None, torch.float32)  # a reference has no loss
    if asks:
        with pytest.raises(UserError, match="asks for the router's balancing loss .*coefficient 0.001"):
            hf.load(str(tmp_path), None, torch.float32, saved=True)
        return
    hf.load(str(tmp_path), None, torch.float32, saved=True)
    assert "balancing loss (coefficient 0.001) is not trained on" in capsys.readouterr().out


# ---- gradients


GEMMA3N = {
    "head_dim": 8,
    "sliding_window": 128,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
    "altup_num_inputs": 2,
}


@pytest.mark.parametrize(
    ("family", "how", "right"),
    [
        ("llama", "full", True),
        ("llama", "selective", True),
        ("gemma3n_text", "full", True),
        ("gemma3n_text", "selective", False),
    ],
)
def test_recomputation_that_does_not_replay_shows(group, family, how, right):
    """Gemma 3n adds in place to what `selective` keeps: its gradient is off by a quarter and more, all others' by rounding."""
    lm = make_lm(family, **(GEMMA3N if family == "gemma3n_text" else {}))
    policy = prepared(lm, group, activation_checkpointing=how)
    rows = make_rows(LENGTHS, vocab_size=VOCABULARY)
    for layout in ("padded", *(["packed"] if family == "llama" else [])):
        gap = gradient_gap(policy, rows, np.arange(2), group, layout=layout)
        assert gap < 1e-5 if right else gap > 0.2
    assert all(param.grad is None for param in policy.parameters())


def test_build_is_a_function_of_the_seed():
    """Equal seeds give equal weights, others do not, and the caller's random state is untouched."""
    before = torch.get_rng_state()
    config = make_lm().config
    first, again, other = (hf.build(config, seed, torch.float64).lm_head.weight for seed in (0, 0, 1))
    assert first.dtype == torch.float64 and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family,embeddings", [("llama", 2), ("gemma2", 1)])
def test_sizes(family, embeddings):
    """Trunk, head and (untied) input embedding are all the parameters; attention's width is heads x head_dim."""
    lm = make_lm(family)
    size = hf.sizes(lm)
    assert size["head"] == VOCABULARY * 32
    assert size["trunk"] + embeddings * size["head"] == sum(p.numel() for p in lm.parameters())
    assert (size["layers"], size["attention_width"]) == (2, 32)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_a_model_in_several_files_of_half_the_size(family, tmp_path, group, monkeypatch):
    """Cut where it gets too large, in bfloat16: transformers reads each master rounded once, and rank 0 held one file at a time."""
    monkeypatch.setattr(saving, "FILE_BYTES", 12_000)
    held = []
    monkeypatch.setattr(
        saving,
        "_write_file",
        lambda *a, f=saving._write_file: (held.append(sum(t.nbytes for t in a[1].values())), f(*a)),
    )
    lm = make_lm(family, **({"num_local_experts": 4} if family == "mixtral" else {}))
    masters = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    saving.save(prepared(lm, group), make_tokenizer(), tmp_path / "model", "bfloat16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert again.dtype == torch.bfloat16 and len(held) > 1
    assert {name: t.tolist() for name, t in again.state_dict().items()} == {
        name: t.bfloat16().tolist() for name, t in masters.items()
    }
    layer = sum(t.numel() for name, t in masters.items() if ".0." in name)
    assert max(held) <= max(12_000, 2 * layer, 2 * masters["lm_head.weight"].numel() * 2 + 200)


def test_auto_is_the_type_of_the_files(tmp_path, group):
    """A model of bfloat16 files is trained in fp32 and saved as bfloat16; one of fp32 files as fp32."""
    for dtype in (torch.bfloat16, torch.float32):
        make_lm().to(dtype).save_pretrained(tmp_path / "a")
        lm = hf.load(str(tmp_path / "a"), None, torch.float32, saved=True)
        saving.save(prepared(lm, group), make_tokenizer(), tmp_path / "b")
        assert {tensor.dtype for tensor in load_file(tmp_path / "b/model.safetensors").values()} == {dtype}
