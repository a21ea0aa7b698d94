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
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

from rpo.data import batch as data_batch
from rpo.data import dataset, schedule
from rpo.data.batch import make_batch, packed_batch
from rpo.errors import UserError
from rpo.model import hf, logprobs
from rpo.model import policy as model_policy
from rpo.model.logprobs import response_sums
from rpo.model.policy import Head, Policy
from rpo.model.probe import probe, why_not_packed
from tests.helpers.models import FAMILIES, VOCABULARY, float64_throughout, make_lm, own_logps, prepared, ragged
from tests.helpers.rows import make_rows, make_tokenizer
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
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "differ by .* nats"),  # does without it
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
    hf.save(prepared(lm, group, activation_checkpointing="full"), make_tokenizer(), tmp_path / "model")

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(batch.input_ids_BT).logits, expected_BTV)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.generation_config.max_new_tokens == 77
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == make_tokenizer().chat_template and len(tokenizer) == VOCABULARY
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "something half-written stayed"


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


def test_check_fit():
    """Different vocabularies, a tokenizer too large and rows too long are each refused with the fix; a match passes."""
    tokenizer = make_tokenizer()
    configs = {"model.path": make_lm().config, "reference.path": make_lm(seed=1).config}
    hf.check_fit(configs, tokenizer, 128)
    with pytest.raises(UserError, match="a row of 129 tokens is left, model.path has 128 .*data.max_length=128"):
        hf.check_fit(configs, tokenizer, 129)
    small = {"model.path": make_lm(vocab_size=VOCABULARY - 1).config}
    with pytest.raises(UserError, match=f"tokenizer has {VOCABULARY} tokens, the model {VOCABULARY - 1}"):
        hf.check_fit(small, tokenizer, 8)
    with pytest.raises(UserError, match="different vocabularies"):
        hf.check_fit({**configs, **small}, tokenizer, 8)


def test_rotary_angles_that_depend_on_the_batch_are_refused():
    """longrope changes a whole batch's angles once one text exceeds the original length: such rows are refused, by key."""
    config = make_lm("phi3").config
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    hf.check_fit({"model.path": config}, make_tokenizer(), 64)
    with pytest.raises(UserError, match="a row of 65 tokens is left; .*set data.max_length=64"):
        hf.check_fit({"model.path": config}, make_tokenizer(), 65)


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
