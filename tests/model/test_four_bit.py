"""Bases of four bits: bitsandbytes' own loader and PEFT say the same; the reference is the same base; the planner counts it.

The runs are of a CPU, where bitsandbytes computes too and the command refuses it: `check` steps aside.
"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rpo.config import Lora
from rpo.errors import UserError
from rpo.model import four_bit, lora
from rpo.model.policy import Policy, load_policy
from rpo.runs.log import read_jsonl
from rpo.training import memory
from tests.helpers.models import make_lm, own_logps, ragged
from tests.helpers.runs import ROOT, SHORT, run, script_env, settings, timeless, tiny_args

peft = pytest.importorskip("peft", reason="peft is not installed (pip install -e '.[lora]')")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install -e '.[4bit]')")

ON = ("model.lora.r=4", "optim.lr=2e-2", "model.load_in_4bit=true")
CPU = torch.device("cpu")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("qwen2", "float32"), ("gpt_neox", "bfloat16")])
def test_values_and_gradients_are_those_of_the_libraries(family, dtype, dora, tmp_path):
    """Logits bit for bit those of transformers' own quantised model; with PEFT around that, log-probs and adapter gradients."""
    dtype = getattr(torch, dtype)
    make_lm(family, tie_word_embeddings=False, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, dtype=dtype).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    batch, alone = ragged()
    ids = batch.input_ids_BT
    copy = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    four_bit.quantise(copy, dtype, CPU)
    with torch.no_grad():
        logits, unlike = theirs(ids).logits, plain(ids).logits
        assert torch.equal(copy(ids).logits, logits) and not torch.equal(logits, unlike)

    cfg = Lora(r=4, alpha=None, dropout=0.0, target="all-linear", dora=dora, modules_to_save=None)
    lora.add(plain, cfg, "base", None, seed=0, where="model.path")
    four_bit.quantise(plain, dtype, CPU)
    own = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(0)
    adapter = dict(own.base_model.model.named_parameters())
    for name, param in lora.named(plain):
        if "magnitude" not in name:
            param.data = 0.3 * torch.randn(param.shape, generator=generator)
        adapter[name].data = param.data = param.data.float()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    logps_N, expected_N = Policy(plain, compile_tiles=False)(batch), own_logps(own, alone).float()
    assert (logps_N - expected_N).abs().mean() < tolerance * expected_N.abs().mean()
    logps_N.sum().backward()
    expected_N.sum().backward()
    for name, param in lora.named(plain):
        gap = (param.grad.float() - adapter[name].grad.float()).norm()
        assert 0 < param.grad.norm() and gap < 10 * tolerance * param.grad.norm(), name


def test_without_data_it_has_the_same_places():
    """What other ranks make on the meta device is what rank 0 fills, also where blocks do not divide."""
    linear = torch.nn.Linear(33, 67)
    whole, empty = (four_bit.Linear4bit(each, torch.float32, CPU) for each in (linear, linear.to("meta")))
    there, here = ({name: (b.shape, b.dtype) for name, b in module.named_buffers()} for module in (whole, empty))
    assert there == here
    stored = sum(buffer.nbytes for name, buffer in whole.named_buffers() if "code" not in name and name != "offset")
    assert stored == pytest.approx(four_bit.BYTES * linear.weight.numel(), rel=0.01)


@pytest.fixture
def allowed(monkeypatch):
    monkeypatch.setattr(four_bit, "check", lambda device: None)


def test_rewards_are_0_at_step_0(tiny, tmp_path, allowed):
    """The reference has the same four bits, cached (never in the entries of a 16-bit run) or live; both train alike."""
    cache = f"cache_dir={tmp_path / 'cache'}"
    whole = run(tiny, tmp_path / "whole", cache, "model.lora.r=4")
    cached = run(tiny, tmp_path / "cached", cache, *ON)
    live = run(tiny, tmp_path / "live", "reference=live", *ON)
    assert cached[0]["rewards/margins"] == 0 != cached[-1]["rewards/margins"]
    assert cached[0]["logps/chosen"] != whole[0]["logps/chosen"]
    reports = json.loads((tmp_path / "cached" / "environment.json").read_text())["reference"]
    assert all(report["scored"] for report in reports.values())
    assert [e["loss"] for e in live] == pytest.approx([e["loss"] for e in cached], rel=1e-5)


@pytest.mark.parametrize("more", [(), ("fsdp.activation_checkpointing=full", "model.lora.dora=true")])
def test_resumed_it_is_the_same_to_the_bit(more, tiny, tmp_path, allowed):
    """A checkpoint has the adapter alone; the base is put into four bits again."""
    more = ("checkpoint.every=2", "optim.schedule=constant", "optim.warmup_ratio=0", *ON, *more)
    whole = run(tiny, tmp_path / "whole", *more)
    run(tiny, tmp_path / "half", *more, "max_steps=2")
    assert timeless(run(tiny, tmp_path / "half", *more))[-1] == timeless(whole)[-1]


@pytest.mark.slow
def test_two_ranks_are_one(tiny, tmp_path, allowed):
    """Rank 0 quantises and sends; both ranks hold all of the base; the run is that of one process to rounding."""
    script = tmp_path / "allowed.py"
    script.write_text(
        "import runpy\nfrom rpo.model import four_bit\nfour_bit.check = lambda device: None\n"
        f"runpy.run_path('{ROOT / 'train.py'}', run_name='__main__')\n"
    )
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    args = tiny_args(tiny, *SHORT, *ON, f"run_dir={tmp_path / 'two'}")
    subprocess.run([sys.executable, *ranks, *args], check=True, env=script_env(), cwd=ROOT)
    one, two = run(tiny, tmp_path / "one", *ON), read_jsonl(tmp_path / "two" / "metrics.jsonl")
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], rel=1e-5)


def test_what_cannot_be_is_refused(tiny, tmp_path, monkeypatch):
    """One line: a CPU, no bitsandbytes, no adapter, float64, a class without linear layers."""
    with pytest.raises(UserError, match="model.load_in_4bit=true on a CPU: its kernels are CUDA's; set it to false"):
        run(tiny, tmp_path / "run", *ON)
    with monkeypatch.context() as patch:
        patch.setattr(four_bit, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"needs bitsandbytes; pip install -e '.\[lora,4bit\]'"):
            four_bit.check(torch.device("cuda"))
    monkeypatch.setattr(four_bit, "check", lambda device: None)
    with pytest.raises(
        UserError, match="weights of four bits cannot be trained, only an adapter on them; give model.lora.r"
    ):
        run(tiny, tmp_path / "run", "model.load_in_4bit=true")
    with pytest.raises(UserError, match="model.load_in_4bit=true with model.dtype=float64"):
        run(tiny, tmp_path / "run", *ON, "model.dtype=float64")
    with pytest.raises(UserError, match="GPT2LMHeadModel has no linear layers"):
        four_bit.quantise(make_lm("gpt2"), torch.float32, CPU)


def test_an_evaluation_on_a_cpu_is_refused_too(tiny):
    """A run's own base in four bits is asked for where its checkpoints are evaluated."""
    with pytest.raises(UserError, match="model.load_in_4bit=true on a CPU"):
        load_policy(str(tiny / "model"), device=CPU, dtype="float32", load_in_4bit=True)


def test_the_planner_counts_four_bits():
    """A 7B base: 0.52 bytes for each weight in a linear layer, the rest in the compute dtype; and one matrix is unpacked at a time."""
    asked = ("recipe=paper_beta", "model.lora.r=16", "tokens_per_microbatch=2048", "data.max_length=1024")
    found = {}
    for on in ("false", "true"):
        cfg = settings(*asked, f"model.load_in_4bit={on}")
        place = memory.place_of(cfg, memory.model_of(cfg, [])[0], 1)
        found[on] = place.sizes, memory.peak(cfg, place)[1]
    (_, whole), (sizes, packed) = found.values()
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert sizes.four_bit == linear and sizes.largest == 4096 * 14336
    assert whole["weights"] - packed["weights"] == pytest.approx((2 - four_bit.BYTES) * linear)
    assert packed["working"] - whole["working"] == 2 * 4096 * 14336
