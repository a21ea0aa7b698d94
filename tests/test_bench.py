"""The benchmark: its data are frozen, its ceiling's FLOPs are right, its systems run and agree."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from bench import data, generate, gpu, logprobs, report, step, systems
from rpo.errors import UserError
from rpo.model.logprobs import token_logps_naive
from rpo.training.meter import ModelSize
from tests.helpers import like_cuda
from tests.helpers.models import make_lm
from tests.helpers.rows import make_tokenizer, write_jsonl
from tests.helpers.runs import ROOT, script_env

TINY = {"model_type": "llama", "vocab_size": data.VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("lengths", "digest"),
    [
        ("hh", "daeb4983795e1bbc6d640d1a12455b2876bb1322f9a8e9ee623375ebfe055df0"),
        ("uf", "525dbc5a1761dfeac7c29e6c3aac25f57c458452142937fb57be9a32649ce289"),
        ("long", "b22d078effe9ef2e870b9f70946b8af49399eca50428cb79faecb05b9f7fd6f3"),
    ],
)
def test_the_data_are_frozen(lengths, digest):
    """The same lengths and ids on every machine, so that numbers of different days compare."""
    rows = data.made(lengths)
    assert data.sha256(rows) == digest
    assert len(rows) == 4096 and (rows.prompt + np.maximum(rows.chosen, rows.rejected)).max() <= 2048
    prompt, chosen, rejected = rows.row(17)
    assert prompt[0] == data.BOS and chosen[-1] == rejected[-1] == data.EOS and prompt[1:].min() > data.EOS


def test_first_begins_again_where_the_data_end():
    """A benchmark may ask for more pairs than a small file has."""
    rows = data.first(data.made("hh"), 3)
    again = data.first(rows, 4)
    assert [part.tolist() for part in again.row(3)] == [part.tolist() for part in rows.row(0)]


def test_real_data_are_refused_in_one_line(monkeypatch):
    """Without RPO_TEST_DATA, `--data real` says what to set."""
    monkeypatch.delenv("RPO_TEST_DATA", raising=False)
    with pytest.raises(UserError, match="RPO_TEST_DATA"):
        data.real("hh")


def test_flops_of_the_ceiling_by_hand():
    """Two rows of 3 tokens: 6 (10 + 5) 6 for the products; 12 x 2 layers x width 3 x 12 visible pairs for attention."""
    size = ModelSize(trunk=10, head=5, layers=2, attention_width=3)
    assert systems.cross_entropy_flops(size, [(2, 3)]) == 540 + 864


def test_ratio_is_by_rounds():
    """The median of the rounds' ratios, so that a round that neighbours slowed for all counts as any other."""
    timed = [[2.0, 20.0, 2.0], [1.0, 10.0, 0.5]]
    a, b = ({"failed": None, "timed": {"seconds": [s], "flops": [1.0, 1.0, 1.0]}} for s in timed)
    assert report.ratio({"a": a, "b": b}, "b", "a") == 2.0
    assert report.ratio({"a": a, "b": dataclasses.asdict(report.Result(failed="out"))}, "b", "a") is None


@pytest.mark.slow
def test_all_forms_run_and_agree(group, monkeypatch):
    """Two steps of four pairs: every form of ours passes the gates, and the ceiling sees the same unique tokens."""
    monkeypatch.setitem(systems.MODELS, "tiny", TINY)
    rows = data.first(data.made("hh"), 8)
    work = systems.Work(rows, 4, "tiny", group, torch.float32, 1024, "none", lr=1e-3)
    names = [name for name in step.SYSTEMS if not name.endswith("compile")]
    results = {name: report.Result() for name in names}
    gates = step.Gates(work, step.library_logps(work))
    step.visit({name: (lambda name=name: step.ours(name, work)) for name in names}, work, results, gates)
    for name in names:
        if not name.startswith(report.CEILING):
            dtype = step.dtype_of(name, work)
            noise = 1e-5 if dtype == torch.float32 else 1e-2
            assert (
                results[name].failed is None and gates.judge(results[name], results[names[0]], noise, dtype) is None
            ), name
    assert 1e-5 < results[f"{report.BEST}+bf16"].logps_error  # it did compute in bf16
    rates = report.rates(report.CEILING, results[report.CEILING], work, warmup=1)
    unique = sum(map(np.sum, work.lengths(1)))
    tokens = sum(batch_BT.numel() for batch_BT in systems.dense_rows(work, 1))
    assert rates["pairs_per_second"] is None and tokens <= unique < tokens + 2


def test_packed_rows_are_timed_by_cudas_backend(group, monkeypatch):
    """A packed system takes the backend that `attention.choose` picks for a device with varlen, not the CPU's loop."""
    monkeypatch.setitem(systems.MODELS, "tiny", TINY)
    like_cuda.admit(monkeypatch, "varlen")
    work = systems.Work(data.first(data.made("hh"), 2), 2, "tiny", group, torch.float32, 1024, "none", lr=1e-3)
    system = systems.Ours(work, layout="packed", cached=False, compile=False)
    assert system.policy.attention == system.live.attention == "varlen"
    system.step(0)
    assert like_cuda.CALLS == {"forward": 4, "backward": 2}
    system.close()


def test_cosine_with_the_twins_gradient(group):
    """The first gradient is the twin's: 1 with itself; a later one by hand."""
    gates = step.Gates(None, None)
    twin = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([4.0])}
    assert gates.cosine(iter(twin.items())) == 1
    twin["a"].zero_()  # the optimizer's, and gone by then
    assert gates.cosine(iter({"a": torch.tensor([[1.0, 1.0]]), "b": torch.ones(1)}.items())) == pytest.approx(
        7 / (5 * 3**0.5)
    )


# (300, 16, 4000): large enough for our tiles, a million logits.
HEAD_SHAPE = (300, 16, 4000)


def test_exact_log_probs_in_blocks():
    """The truth that heads are held to, made block by block, is one float64 pass of log_softmax."""
    problem = logprobs.make_problem(HEAD_SHAPE, torch.bfloat16, torch.device("cpu"))
    hidden_ND, head_VD = (x.detach().double().requires_grad_() for x in problem[:2])
    logps_N = (hidden_ND @ head_VD.T).log_softmax(1)[range(300), problem.target_N]
    whole = logps_N, *torch.autograd.grad(logps_N, (hidden_ND, head_VD), problem.upstream_N.double())
    for block, truth in zip(logprobs.exact(problem, rows=77), whole, strict=True):
        torch.testing.assert_close(block, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_every_head_is_the_same_function(dtype):
    """Ours and peers' log-probs and both gradients are float64's, up to what their products' dtype rounds."""
    found, absent = logprobs.heads(torch.device("cpu"), dtype, HEAD_SHAPE)
    del found["ours, compiled"]  # takes long; tests/model/test_logprobs.py compiles
    problem = logprobs.make_problem(HEAD_SHAPE, dtype, torch.device("cpu"))
    results, failed = logprobs.measure(found, problem, rounds=1)
    assert not failed and results.keys() == found.keys() and any(line.startswith("Liger") for line in absent)
    logp, grad = (1e-4, 1e-5) if dtype == torch.float32 else (0.2, 2**-6)
    for name, r in results.items():
        assert r.logp_error_mean <= r.logp_error_max <= logp, name
        assert r.hidden_grad_error <= grad and r.head_grad_error <= grad, name
        assert r.seconds and r.cpu_seconds, name
    matrix = 4 * HEAD_SHAPE[0] * HEAD_SHAPE[2]
    assert results["naive"].peak_bytes > 2 * matrix > results["ours, keeping logits"].peak_bytes >= matrix


def test_wrong_and_broken_heads_show():
    """A gradient of twice the size is an error of 1, a shifted log-prob its shift, and one that raises is named."""

    def twice(*inputs):
        logps_N = token_logps_naive(*inputs)
        return 2 * logps_N - logps_N.detach() - 0.5

    def broken(*inputs):
        raise ValueError("no kernel for this device")

    problem = logprobs.make_problem(HEAD_SHAPE, torch.float32, torch.device("cpu"))
    found = {"naive": token_logps_naive, "twice": twice, "broken": broken}
    results, failed = logprobs.measure(found, problem, rounds=1)
    assert failed == ["broken: ValueError: no kernel for this device"] and list(results) == ["naive", "twice"]
    r = results["twice"]
    assert [r.hidden_grad_error, r.head_grad_error] == pytest.approx([1, 1], abs=1e-4)
    assert [r.logp_error_max, r.logp_error_mean] == pytest.approx([0.5, 0.5], abs=1e-4)


def test_peak_of_memory_by_hand():
    """Two MiB at once and then one: a peak of two."""

    def function():
        a = torch.empty(2**18)
        b = torch.empty(2**18)
        del a, b
        return torch.empty(2**18)

    assert logprobs.peak_bytes(torch.device("cpu"), function) == 2 * 2**20


BARE = """
import runpy, sys
sys.modules.update(dict.fromkeys("hydra omegaconf antlr4 wandb datasets pydantic trl liger_kernel openai lm_eval".split()))
sys.argv = ["bench/gpu.py", "--dry", "--stages", sys.argv[2], "--out", sys.argv[1]]
runpy.run_path("bench/gpu.py", run_name="__main__")
"""


@pytest.mark.slow
def test_the_quarter_hour_on_a_gpu_is_rehearsed(tmp_path):
    """bench/gpu.py --dry on a machine that has torch and transformers alone: every stage notes something, none fails."""
    stages = [stage.__name__ for stage in gpu.STAGES if stage is not gpu.tests]
    command = [sys.executable, "-c", BARE, str(tmp_path), ",".join(stages)]
    done = subprocess.run(command, cwd=ROOT, env=script_env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line for line in lines if "failed" in line] == []
    noted = {line["stage"] for line in lines}
    assert noted >= {"env", "head", "packed and padded", "attention", "step", "synchronisations", "profile", "generate"}
    assert [line["skipped"] for line in lines if "skipped" in line] == [
        "hydra and pydantic are needed: pip install hydra-core pydantic, or carry their wheels"
    ]
    for line in lines:
        if line["stage"] == "packed and padded":
            assert line["nats_per_token"] <= line["noise_floor"] and line["gradient_cosine"] > 1 - 1e-6
        if line["stage"] == "head":
            assert max(line["relative_l2"].values()) < (2**-8 if line["dtype"] == "torch.bfloat16" else 1e-6)
    assert {line["form"] for line in lines if line["stage"] == "step"} == {"0.5b", "1b", "7b", "cross-entropy"}


@pytest.mark.slow
def test_answers_are_those_of_the_library(tmp_path, monkeypatch):
    """bench/generate.py on a tiny model: the same tokens each way; without continuous batching, which takes half a minute."""
    make_lm(vocab_size=len(tokenizer := make_tokenizer())).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("ba be", "bi", "bo bu ba", "ba")])
    written = {}
    monkeypatch.setattr(report, "write", lambda name, device, **measured: written.update(measured))
    ways = generate.systems
    without = lambda *args: {name: way for name, way in ways(*args).items() if name != "continuous batching"}  # noqa: E731
    monkeypatch.setattr(generate, "systems", without)
    few = ["--count", "4", "--tokens", "6", "--batch-size", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["generate.py", str(tmp_path), str(prompts), *few])
    generate.main()
    assert len(written["systems"]) == 3
    assert all(one["equal"] == 1 and one["tokens_per_second"] > 0 for one in written["systems"].values())
