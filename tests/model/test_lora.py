"""LoRA: PEFT and plain transformers say the same; the base is untouched; what is saved is what PEFT reads."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rpo.config import Lora
from rpo.data.batch import packed_batch
from rpo.errors import UserError
from rpo.model import fingerprint, hf, lora, saving
from rpo.model.policy import Policy, load_policy
from rpo.model.stored import identity_of
from tests.helpers.models import float64_throughout, make_lm, own_logps, prepared, ragged
from tests.helpers.rows import LENGTHS, make_rows, make_tokenizer
from tests.helpers.runs import run, settings, timeless, tiny_args

peft = pytest.importorskip("peft", reason="peft is not installed (pip install -e '.[lora]')")

LORA = Lora(r=4, alpha=None, dropout=0.0, target="all-linear", dora=False, modules_to_save=None)
KINDS = {
    "lora": {},
    "dora": {"dora": True},
    "head": {"target": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
}
ON = ("model.lora.r=4", "optim.lr=2e-2")


def of(**changed):
    return Lora(**{name: getattr(LORA, name) for name in Lora.__dataclass_fields__} | changed)


def untied(family="llama", **sizes):
    return make_lm(family, tie_word_embeddings=False, **sizes)


def stir(lm, seed=3):
    """An adapter that has been trained: no part of it is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, param in lora.named(lm):
            param.add_(0.2 * torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype))
    return lm


def adapted(lm, cfg=LORA):
    lora.add(lm, cfg, "base", None, seed=0, where="model.path=base")
    return stir(lm)


def peft_own(lm, cfg, state):
    """PEFT's own model around `lm`, with the same weights in its adapter."""
    own = peft.get_peft_model(
        lm,
        peft.LoraConfig(
            r=cfg.r,
            lora_alpha=2 * cfg.r,
            target_modules=cfg.target,
            use_dora=cfg.dora,
            modules_to_save=cfg.modules_to_save,
            task_type="CAUSAL_LM",
        ),
    ).to(lm.dtype)
    for name, param in own.base_model.model.named_parameters():
        if name in state:
            param.data = state[name].clone()
    return own


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "phi3"])
def test_values_and_gradients_are_pefts(family, kind):
    """In float64, packed and padded: log-probs by PEFT around plain transformers, one text at a time, and the adapter's gradient."""
    if kind == "head" and family in ("gemma2", "gpt_neox", "phi3"):
        pytest.skip("has other names")
    cfg = of(**KINDS[kind])
    with float64_throughout():
        base = untied(family).double()
        policy = Policy(adapted(copy.deepcopy(base), cfg), compile_tiles=False)
        own = peft_own(base, cfg, {name: param.data for name, param in lora.named(policy.lm)})
        padded, alone = ragged(len(make_tokenizer()))
        rows = make_rows(LENGTHS, vocab_size=len(make_tokenizer()))
        expected_N = own_logps(own, alone)
        weight_N = torch.linspace(-1, 1, len(expected_N), dtype=torch.float64)
        (expected_N * weight_N).sum().backward()
        grads = {n: p.grad for n, p in own.base_model.model.named_parameters() if p.grad is not None}
        assert grads.keys() == {name for name, _ in lora.named(policy.lm)}
        for batch in (padded, packed_batch(rows, np.arange(len(LENGTHS)))):
            logps_N = policy(batch)
            assert (logps_N - expected_N).abs().max() < 1e-12 * expected_N.abs().max()
            policy.zero_grad()
            (logps_N * weight_N).sum().backward()
            for name, param in lora.named(policy.lm):
                assert (param.grad - grads[name]).norm() <= 1e-12 * grads[name].norm(), name
            assert all(p.grad is None for n, p in policy.lm.named_parameters() if n not in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_off_it_is_the_base(kind, group):
    """With the adapter off the sharded model is its base bit for bit, and gradients flow as if nothing had been in between."""
    base = untied()
    batch, _ = ragged(len(make_tokenizer()))
    expected_N = prepared(copy.deepcopy(base), group)(batch).detach()
    digest = fingerprint.weights_digest(base)
    lm = adapted(base, of(**KINDS[kind]))
    assert fingerprint.weights_digest(lm, adapter=False) == digest != fingerprint.weights_digest(lm)
    policy = prepared(lm, group)
    policy(batch).sum().backward()
    plain = [p.grad.to_local() for _, p in lora.named(policy)]
    policy.zero_grad()
    with torch.no_grad():
        assert torch.equal(lora.Base(policy)(batch), expected_N)
        assert torch.equal(
            lora.Base(policy).logits_of(policy.hidden(batch)), policy.logits_of(policy.hidden(batch))
        ) == (kind != "head")
    policy(batch).sum().backward()
    assert all(torch.equal(a, p.grad.to_local()) for a, (_, p) in zip(plain, lora.named(policy), strict=True))


def test_the_base_is_stored_in_the_compute_dtype(group):
    """In bfloat16 the base takes two bytes and the adapter four, and off it computes what a full run's reference does."""
    from rpo.model.policy import prepare
    from rpo.model.shard import PLAIN, mesh

    base, (batch, _) = untied(), ragged(len(make_tokenizer()))
    how = {"compute_dtype": torch.bfloat16, "compile": False, "trainable": True}
    full = prepare(copy.deepcopy(base), mesh(group, PLAIN), PLAIN, **how)
    policy = prepare(adapted(base), mesh(group, PLAIN), PLAIN, **how)
    kinds = {(param.dtype, name in dict(lora.named(policy))) for name, param in policy.named_parameters()}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    with torch.no_grad():
        assert torch.equal(lora.Base(policy)(batch), full(batch))
    policy(batch).sum().backward()
    assert {param.grad.dtype for _, param in lora.named(policy)} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_peft_reads(kind, group, tmp_path):
    """RUN/model of an adapter: PEFT's own loader on the base gives the trained log-probs, and so does ours."""
    base = untied()
    base.save_pretrained(tmp_path / "base")
    batch, alone = ragged(len(make_tokenizer()))
    lm = copy.deepcopy(base)
    lora.add(lm, of(**KINDS[kind]), str(tmp_path / "base"), None, seed=0, where="model.path")
    policy = prepared(stir(lm), group)
    saving.save(policy, make_tokenizer(), tmp_path / "model")
    expected_N = policy(batch).detach()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "model")
    assert (own_logps(theirs, alone) - expected_N).abs().max() < 1e-5 * expected_N.abs().max()
    ours = load_policy(str(tmp_path / "model"), device=group, dtype="float32")
    assert torch.equal(ours.policy(batch), expected_N)
    assert ours.digest != load_policy(str(tmp_path / "base"), device=group, dtype="float32").digest
    written = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(written["target_modules"])
    assert all("." not in name for name in written["target_modules"])  # as servers expect them
    known = identity_of(str(tmp_path / "model"), None)
    (tmp_path / "base" / "config.json").touch()
    assert identity_of(str(tmp_path / "model"), None) != known  # an answer of it depends on its base


@pytest.mark.parametrize(
    ("cfg", "tied", "words"),
    [
        (
            {"target": ["q_proj", "v_porj"]},
            False,
            "model.lora.target: LlamaForCausalLM has no module v_porj; it has down_proj",
        ),
        ({"target": "nothing"}, False, "Target modules nothing not found"),
        ({"target": ["input_layernorm"]}, False, "model.lora.target: Target module LlamaRMSNorm"),
        ({"target": ["lm_head"]}, False, "the head cannot have LoRA here"),
        ({"target": ["embed_tokens", "q_proj"]}, True, "embedding and head of LlamaForCausalLM are one weight"),
        ({"modules_to_save": ["lm_head"]}, True, "embedding and head of LlamaForCausalLM are one weight"),
        ({"modules_to_save": ["lm_haed"]}, False, "model.lora.modules_to_save: LlamaForCausalLM has no module lm_haed"),
    ],
)
def test_what_can_not_be_adapted_is_refused(cfg, tied, words):
    """A name that is not there, alone or beside one that is; a head whose weight is read past its adapter, or is two."""
    lm = make_lm(tie_word_embeddings=tied)
    with pytest.raises(UserError, match=words):
        lora.add(lm, of(**cfg), "base", None, seed=0, where="model.path=base")


def test_a_weight_that_is_read_past_its_adapter_is_refused(monkeypatch):
    """A class that multiplies with the weight itself would train nothing there, and nobody would see it."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x):
        return torch.nn.functional.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(UserError, match="LlamaForCausalLM does not call down_proj but reads its weight"):
        lora.add(untied(), LORA, "base", None, seed=0, where="model.path=base")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"peft_type": "IA3"}, "is an adapter of kind IA3"),
        ({"bias": "all"}, "its adapter has bias='all', which is not supported"),
        ({"init_lora_weights": "pissa"}, "its adapter has init_lora_weights='pissa'"),
        ({"layer_replication": [[0, 2]]}, "its adapter has layer_replication"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere"}, "base_model_name_or_path=/nowhere: no Hugging Face model there"),
        (
            {"base_model_name_or_path": "other"},
            r"does not fit its base .*lora_A.weight is \(2, 32\), there it would be \(2, 48\)",
        ),
        ({"target_modules": ["q_proj", "k_proj", "up_proj"]}, "lacks .*up_proj.lora_A.weight"),
        ({"target_modules": ["q_proj"]}, "has .*k_proj.*, for which its base .* has no place"),
        ({"base_model_name_or_path": "model"}, "base_model_name_or_path=.*: is an adapter itself"),
        (None, "its adapter_config.json cannot be read"),
    ],
)
def test_a_folder_that_is_no_adapter_of_its_base_is_refused(spoil, words, tmp_path):
    """Other kinds of adapters, parts that would be passed over in silence, another base, weights that do not fit."""
    untied().save_pretrained(tmp_path / "base")
    untied(hidden_size=48).save_pretrained(tmp_path / "other")
    cfg = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
    cfg.base_model_name_or_path = str(tmp_path / "base")
    peft.get_peft_model(untied(), cfg).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "adapter_config.json"
    if spoil is None:
        file.write_text("{")
    else:
        spoil = {k: str(tmp_path / v) if v in ("other", "model") else v for k, v in spoil.items()}
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")} | spoil)
        )
    with pytest.raises(UserError, match=words):
        hf.check(str(tmp_path / "model"))
        hf.load(str(tmp_path / "model"), None, torch.float32)


# ---- runs


@pytest.fixture(scope="module")
def full_and_lora(tiny, tmp_path_factory):
    """Folders of a full run and of a LoRA run on the same pairs with one cache, and their events."""
    folder = tmp_path_factory.mktemp("lora")
    cache = f"cache_dir={folder / 'cache'}"
    return (
        folder,
        run(tiny, folder / "full", cache, "loss=rpo_sum"),
        run(tiny, folder / "lora", cache, "loss=rpo_sum", *ON),
    )


def test_a_lora_run_starts_at_its_reference(full_and_lora):
    """Step 0 is that of the full run, to the last digit; then the adapter alone learns; the full run's reference is hit."""
    folder, full, own = full_and_lora
    for name in ("loss", "logps/chosen", "shift/chosen"):
        assert own[0][name] == full[0][name]
    assert own[0]["rewards/margins"] == 0 != own[-1]["rewards/margins"]
    environment = json.loads((folder / "lora" / "environment.json").read_text())
    assert {split: report["scored"] for split, report in environment["reference"].items()} == {"train": 0, "eval": 0}
    assert (folder / "lora" / "model" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("more", [("reference=live",), ("layout=padded", "tokens_per_microbatch=256")])
def test_how_a_lora_run_is_computed_does_not_matter(more, full_and_lora, tiny, tmp_path):
    """A live reference is the adapter switched off; rows padded and cut otherwise: the same numbers to rounding."""
    _, _, own = full_and_lora
    other = run(tiny, tmp_path / "run", "loss=rpo_sum", *ON, *more)
    for a, b in zip(own, other, strict=True):
        assert all(
            b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4)
            for name in ("loss", "rewards/margins", "shift/chosen")
        )


def own_weights(folder):
    return load_file(folder / "model" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "more", [("model.lora.dora=true", "model.lora.dropout=0.2"), ("fsdp.activation_checkpointing=full",)]
)
def test_a_resumed_lora_run_is_the_same_to_the_bit(more, tiny, tmp_path):
    """Two steps and two more equal four, with dropout too, though a checkpoint has the adapter alone."""
    more = ("checkpoint.every=2", "optim.schedule=constant", "optim.warmup_ratio=0", *ON, *more)
    whole = run(tiny, tmp_path / "whole", *more)
    run(tiny, tmp_path / "half", *more, "max_steps=2")
    resumed = run(tiny, tmp_path / "half", *more)
    a, b = (own_weights(tmp_path / name) for name in ("whole", "half"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert timeless(resumed)[-1] == timeless(whole)[-1]
    saved = [load_file(file) for file in (tmp_path / "half" / "checkpoints" / "step_00000004").glob("*.safetensors")]
    assert all(".lora_" in name or name.startswith("buffer/") for tensors in saved for name in tensors)


def test_dropout_is_of_updates_alone(tiny, tmp_path):
    """With dropout the evaluation before the first update, and the reference, are those without; the updates are not."""
    plain, dropped = (
        run(tiny, tmp_path / name, *ON, f"model.lora.dropout={p}", "max_steps=2") for name, p in (("a", 0), ("b", 0.5))
    )
    assert dropped[0]["logps/chosen"] == plain[0]["logps/chosen"]
    assert dropped[-1]["logps/chosen"] != plain[-1]["logps/chosen"]


def test_an_adapter_is_continued(full_and_lora, tiny, tmp_path):
    """A PEFT folder as model.path: trained on, against the base or against itself as it came; which of them is asked."""
    folder, _, own = full_and_lora
    start, base = folder / "lora" / "model", tiny / "model"
    args = (f"model.path={start}", "loss=rpo_sum", "optim.lr=1e-2")
    with pytest.raises(UserError, match=r"reference.path=null with model.path"):
        run(tiny, tmp_path / "a", *args)
    with pytest.raises(UserError, match=r"model.lora.r=4: .* is an adapter already"):
        run(tiny, tmp_path / "a", *args, "model.lora.r=4", f"reference.path={base}")
    on_base = run(tiny, tmp_path / "base", *args, f"reference.path={base}")
    assert on_base[0]["shift/chosen"] == pytest.approx(own[-1]["shift/chosen"], rel=1e-5)
    on_itself = run(tiny, tmp_path / "itself", *args, f"reference.path={start}")
    assert on_itself[0]["shift/chosen"] == 0 != on_itself[-1]["shift/chosen"]
    live = run(tiny, tmp_path / "live", *args, f"reference.path={start}", "reference=live")
    assert live[-1]["shift/chosen"] == pytest.approx(on_itself[-1]["shift/chosen"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_a_model_of_its_own(kind, group, tmp_path):
    """Base and adapter added up in fp32 and loaded by transformers alone: the log-probs of the two, to rounding."""
    base = untied()
    base.save_pretrained(tmp_path / "base")
    batch, alone = ragged(len(make_tokenizer()))
    lora.add(base, of(**KINDS[kind]), str(tmp_path / "base"), None, seed=0, where="model.path")
    policy = prepared(stir(base), group)
    expected_N = policy(batch).detach()
    saving.save(policy, make_tokenizer(), tmp_path / "model")
    saving.merge(tmp_path / "model", make_tokenizer(), tmp_path / "merged", "auto", False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(plain, "peft_config")
    assert (own_logps(plain, alone) - expected_N).abs().max() < 2e-5 * expected_N.abs().max()


def test_experts_of_one_tensor_are_refused():
    """PEFT's all-linear would adapt them by other means, which neither model/ nor a merge could read back."""
    lm = make_lm("mixtral", num_local_experts=4, tie_word_embeddings=False)
    with pytest.raises(
        UserError, match=r"the experts of MixtralForCausalLM are one tensor .*model.lora.target: it has .*q_proj"
    ):
        lora.add(lm, LORA, "base", None, seed=0, where="model.path=base")
    lm = make_lm("mixtral", num_local_experts=4, tie_word_embeddings=False)
    lora.add(lm, of(target=["q_proj", "v_proj"]), "base", None, seed=0, where="model.path=base")
    assert lora.targets(lm) == "q_proj, v_proj"


def test_an_embedding_beside_its_adapter_is_compared(tmp_path):
    """PEFT writes the embedding that it adapts too: the base's own is read, a changed one refused."""
    base = untied()
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    cfg = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    own = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), cfg)
    stir(own)
    own.save_pretrained(tmp_path / "model", save_embedding_layers=True)
    file = tmp_path / "model" / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("base_layer.weight")]
    batch, alone = ragged(len(make_tokenizer()))
    lm = hf.load(str(tmp_path / "model"), None, torch.float32)
    with torch.no_grad():
        assert (Policy(lm, compile_tiles=False)(batch) - own_logps(own, alone)).abs().max() < 1e-4
    save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="embed_tokens.* is not that of its base .*resized or changed"):
        hf.load(str(tmp_path / "model"), None, torch.float32)


def test_a_base_that_has_changed_is_refused(full_and_lora, tiny, tmp_path):
    """RUN/model of an adapter remembers the weights that it was trained on."""
    folder, *_ = full_and_lora
    shutil.copytree(folder / "lora" / "model", tmp_path / "model")
    lm = AutoModelForCausalLM.from_pretrained(tiny / "model")
    with torch.no_grad():
        lm.model.norm.weight.add_(1)
    lm.save_pretrained(tmp_path / "base")
    config = tmp_path / "model" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.raises(UserError, match=r"had weights of digest \w+ when it was trained, now \w+; restore them"):
        hf.load(str(tmp_path / "model"), None, torch.float32)


def test_rates_and_types_of_an_adapter(full_and_lora, tiny, tmp_path):
    """optim.lr=auto is an adapter's for a continued one too; a type that an adapter is not saved in is refused."""
    folder, *_ = full_and_lora
    start = f"model.path={folder / 'lora' / 'model'}"
    for args in ((start,), (f"model.path={tiny / 'model'}", "model.lora.r=2")):
        assert settings("data=files", *tiny_args(tiny, *args, "optim.lr=auto", "loss=dpo")).optim.lr == 5e-6
    assert settings("data=files", *tiny_args(tiny, "optim.lr=auto", "loss=dpo")).optim.lr == 5e-7
    with pytest.raises(UserError, match="model.save_dtype=bfloat16 with an adapter, whose few weights stay float32"):
        run(tiny, tmp_path / "run", *ON, "model.save_dtype=bfloat16")


def test_a_model_with_an_adapter_beside_it_is_refused(tmp_path):
    """transformers would read the adapter's base, whoever made the folder may mean its own weights: neither is taken."""
    untied().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(UserError, match="holds both a whole model and an adapter"):
        hf.check(str(tmp_path))
