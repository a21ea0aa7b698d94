"""The script as a whole: what a run leaves, where it starts, that it learns, repeats, and stops on bad numbers."""

import json
import math
import os
import re
import signal
import subprocess
import time
from functools import partialmethod

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train
from rpo import dist, losses
from rpo.data import batch as data_batch
from rpo.data import dataset, schedule
from rpo.errors import UserError
from rpo.model import hf
from rpo.model import policy as model_policy
from rpo.runs import log
from rpo.runs.checkpoint import Checkpoints
from rpo.training import meter, optim
from tests.helpers.models import make_lm
from tests.helpers.rows import make_rows_json, make_tokenizer, write_jsonl
from tests.helpers.runs import command, run, script_env, settings, timeless, tiny_args, weights


def split(events, name):
    return [event for event in events if event["split"] == name]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of 20 DPO steps with samples."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(tiny, folder, "loss=dpo", "max_steps=20", "eval_every=10", "sample_every=10", plots=True)
    return folder


def test_a_run_leaves_its_folder(finished):
    """A finished run's folder holds exactly the documented files, and each says what it should."""
    assert {path.name for path in finished.iterdir()} == {
        *("config.yaml", "status.json", "environment.json", "data_report.json", "metrics.jsonl", "samples.jsonl"),
        *("model", "plots", "checkpoints", "lock"),
    }
    assert json.loads((finished / "status.json").read_text()) == {"state": "finished", "reason": "", "step": 20}
    environment = json.loads((finished / "environment.json").read_text())
    assert 0 <= environment["noise_floor"] < 1e-5
    assert environment["versions"]["torch"] == torch.__version__ and environment["command"]
    assert {"git_revision", "git_dirty", "device", "world_size"} <= environment.keys()
    assert (environment["layout"], environment["attention"]) == ("packed", "sdpa")
    assert {name: found["pairs"] for name, found in environment["reference"].items()} == {"train": 40, "eval": 12}
    report = json.loads((finished / "data_report.json").read_text())
    assert (report["train"]["kept"], report["eval"]["kept"]) == (40, 12)
    pictures = list((finished / "plots").iterdir())
    assert {path.name for path in pictures} == {"loss.png", "rewards.png", "shift.png", "accuracy.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_the_model_folder_loads_with_transformers(finished, tiny):
    """model/ loads with from_pretrained: moved fp32 weights, the tokenizer, its template, a generation config."""
    lm, start = (AutoModelForCausalLM.from_pretrained(f / "model", dtype="auto") for f in (finished, tiny))
    moved = {k: (v - start.state_dict()[k]).abs().max() for k, v in lm.state_dict().items()}
    assert all(v.dtype == torch.float32 for v in lm.state_dict().values())
    assert all(0 < gap < 0.1 for gap in moved.values()), moved
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert (finished / "model" / "generation_config.json").exists()
    assert "rpo" not in (finished / "model" / "config.json").read_text(), "packed attention was saved with the model"


def test_samples_are_answers_of_both_models(finished):
    """samples.jsonl has the same held-out prompts at each interval, answered by policy and reference; equal at 0."""
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0] * 4 + [10] * 4 + [20] * 4
    assert all(set(s) == {"step", "prompt", "policy", "reference"} for s in samples)
    assert [s["prompt"] for s in samples[:4]] == [s["prompt"] for s in samples[8:]]
    assert all(s["policy"] == s["reference"] for s in samples[:4])
    assert any(s["policy"] != s["reference"] for s in samples[8:])


def test_step_zero_and_names(finished):
    """Before any update DPO's loss is ln 2 to 1e-5 and nothing is shifted; events carry exactly the documented names."""
    events = log.read_jsonl(finished / "metrics.jsonl")
    assert [e["step"] for e in split(events, "eval")] == [0, 10, 20]
    assert [(e["step"], e["pairs"]) for e in split(events, "train")] == [(i, 8 * i) for i in range(1, 21)]
    for first in (split(events, "eval")[0], split(events, "train")[0]):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert all(abs(first[name]) < 1e-5 for name in ("shift/chosen", "shift/rejected", "rewards/margins"))
        assert first["displacement_rate"] == 0
    both = {
        "split",
        "step",
        "pairs",
        "time",
        *meter.PER_PAIR_SUPERVISED,
        *meter.PER_PAIR_PREFERENCE,
        *meter.PER_PAIR_REFERENCE,
    }
    both |= set(meter.PER_CHOSEN_TOKEN)
    for event in events:
        more = set(meter.TRAIN_ONLY) - {"perf/mfu"} if event["split"] == "train" else set()
        assert set(event) == both | more
        assert all(math.isfinite(value) for value in event.values() if not isinstance(value, str))


def test_one_seed_makes_one_run(finished, tiny, tmp_path):
    """The same settings write the same metrics and weights, bit for bit; another seed reads other pairs."""
    expected = timeless(log.read_jsonl(finished / "metrics.jsonl"))
    again = ("loss=dpo", "max_steps=20", "eval_every=10", "sample_every=10")
    assert timeless(run(tiny, tmp_path / "same", *again)) == expected
    assert (tmp_path / "same/samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    theirs, ours = weights(tmp_path / "same/model"), weights(finished / "model")
    assert all(torch.equal(theirs[k], ours[k]) for k in ours)
    other = timeless(run(tiny, tmp_path / "other", *again, "seed=1"))
    assert other[1]["logps/chosen"] != expected[1]["logps/chosen"]
    assert other[0]["loss"] == expected[0]["loss"]  # the held-out pairs are the same


def test_deterministic_holds_for_its_run(tiny, tmp_path, monkeypatch):
    """deterministic=true trains by torch's deterministic algorithms, cuBLAS's too; the next run in the process does not."""
    seen, step_if_finite = [], optim.step_if_finite

    def noting(*args):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return step_if_finite(*args)

    monkeypatch.setattr(optim, "step_if_finite", noting)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")  # as it is afterwards too
    for value in ("true", "false"):
        run(tiny, tmp_path / value, "max_steps=1", f"deterministic={value}")
    assert seen[0] == (True, ":4096:8") and not seen[1][0]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("loss", ["dpo", "rpo_sum", "rpo_avg", "rpo_token", "ipo", "hinge"])
def test_every_preference_loss_learns_eight_pairs(loss, tiny, tmp_path):
    """Each loss falls on 8 pairs seen again and again, and every margin ends positive."""
    path = write_jsonl(tmp_path / "eight.jsonl", make_rows_json(8, seed=3))
    more = (f"loss={loss}", f"data.train={path}", "data.eval=null", "max_steps=25", "loss.beta=0.1", "optim.lr=5e-3")
    events = run(tiny, tmp_path / "run", *more)
    first, last = events[0], events[-1]
    assert last["loss"] < 0.7 * first["loss"]
    assert last["rewards/accuracies"] == 1
    assert last["loss"] == pytest.approx(last["loss/preference"] + last["loss/sft"], rel=1e-6)
    assert (last["loss/sft"] > 0) == loss.startswith("rpo")


def test_supervised_training_from_random_weights(tiny, tmp_path):
    """loss=sft cuts {text} rows into blocks and trains a model built from its architecture; no reference is read."""
    texts = [{"text": f"{row['chosen']} {row['rejected']}"} for row in make_rows_json(12)]
    path = write_jsonl(tmp_path / "text.jsonl", texts)
    args = [f"data.train={path}", "data.eval=null", "loss=sft", "model=tiny", f"model.tokenizer={tiny / 'model'}"]
    args += [
        "wandb.mode=disabled",
        "data.max_length=16",
        "max_steps=20",
        "batch_size=8",
        "optim.lr=1e-2",
        "log_every=1",
    ]
    for name in ("a", "b"):
        assert train.train(settings(*args, f"run_dir={tmp_path / name}")) == "finished"
        dist.shutdown()
    events = log.read_jsonl(tmp_path / "a" / "metrics.jsonl")
    documented = {*meter.PER_PAIR_SUPERVISED, "nll/chosen", *meter.TRAIN_ONLY, "split", "step", "pairs", "time"}
    assert set(events[0]) == documented - {"perf/mfu"}
    vocabulary = len(make_tokenizer())
    assert events[0]["nll/chosen"] == pytest.approx(math.log(vocabulary), abs=0.1)  # a new model knows nothing
    assert events[-1]["loss"] == pytest.approx(events[-1]["nll/chosen"], rel=1e-6) and events[-1]["loss"] < 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a/model").config.vocab_size == vocabulary
    assert timeless(events) == timeless(log.read_jsonl(tmp_path / "b" / "metrics.jsonl"))


def test_how_a_step_is_laid_out_and_cut_does_not_matter(tiny, tmp_path):
    """Packed and cached, in one row or in rows of 64 tokens, is padded and live, the specification, to 1e-5."""
    specification = ("layout=padded", "reference=live")
    cases = [specification, (*specification, "tokens_per_microbatch=64"), ("tokens_per_microbatch=64",), ()]
    cases += [("layout=packed", "reference=live")]
    runs = [run(tiny, tmp_path / str(i), "loss=rpo_token", *case) for i, case in enumerate(cases)]
    for case, events in zip(cases, runs, strict=True):
        for a, b in zip(events, runs[0], strict=True):
            for name in a.keys() & {"loss", "loss/preference", "loss/sft", "nll/chosen", "grad_norm"}:
                assert a[name] == pytest.approx(b[name], rel=1e-5), (case, a["step"], name)


@pytest.mark.parametrize(("key", "reference"), [("model.path", "cached"), ("reference.path", "live")])
def test_a_model_that_can_not_be_packed(key, reference, tiny, tmp_path, capsys):
    """layout=auto says so in one line and is layout=padded, number for number; layout=packed is refused by name."""
    make_lm("stablelm").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    args = ("loss=dpo", f"reference={reference}", f"{key}={tmp_path / 'model'}")
    auto = run(tiny, tmp_path / "auto", *args)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layout")]
    reason = r"cannot be packed: its code does not pass on .* \(attend\(\) missing .*\)"
    assert len(said) == 1 and re.fullmatch(f"layout=padded, because {key}={tmp_path / 'model'} {reason}", said[0]), said
    assert timeless(auto) == timeless(run(tiny, tmp_path / "padded", *args, "layout=padded"))
    assert json.loads((tmp_path / "auto/environment.json").read_text())["layout"] == "padded"
    refused = rf"^layout=packed: {key}={tmp_path / 'model'} cannot be packed \(.*\); use layout=padded or auto$"
    with pytest.raises(UserError, match=refused):
        run(tiny, tmp_path / "packed", *args, "layout=packed")


def test_a_window_shorter_than_the_longest_text_is_padded(tiny, tmp_path, capsys):
    """A Mistral whose window is shorter than the longest text is trained padded, one whose window is as long packed."""
    make_tokenizer().save_pretrained(tmp_path)
    longest = 32  # of tiny's rows
    for window, layout in ((longest - 1, "padded"), (longest, "packed")):
        make_lm("mistral", sliding_window=window).save_pretrained(tmp_path)
        run(tiny, tmp_path / str(window), f"model.path={tmp_path}", "max_steps=1")
        assert json.loads((tmp_path / str(window) / "environment.json").read_text())["layout"] == layout
    assert f"a layer sees {longest - 1} tokens back, the longest text has {longest}" in capsys.readouterr().out


def test_epochs_keep_their_last_short_step(tiny, tmp_path):
    """40 pairs in batches of 16 are 16, 16 and 8 an epoch; two epochs see each pair twice."""
    events = run(tiny, tmp_path / "run", "loss=dpo", "batch_size=16", "epochs=2", "max_steps=null", "data.eval=null")
    assert [e["pairs"] for e in events] == [16, 32, 40, 56, 72, 80]


def test_reference_by_path(tiny, tmp_path):
    """reference.path naming the policy's weights is reference.path=null; other weights give another start."""
    null = run(tiny, tmp_path / "null", "loss=dpo")
    same = run(tiny, tmp_path / "same", "loss=dpo", f"reference.path={tiny / 'model'}")
    assert timeless(same) == timeless(null)
    make_lm(seed=5).save_pretrained(tmp_path / "other")
    other = run(tiny, tmp_path / "elsewhere", "loss=dpo", f"reference.path={tmp_path / 'other'}")
    assert abs(other[0]["shift/chosen"]) > 0.1 and other[0]["logps/chosen"] == null[0]["logps/chosen"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("live", "step 0: policy and reference are the same weights but differ by .* nats"),
        ("cached", "reference.cache_dir: the log-probs in .* and the model's differ by .* nats per token"),
    ],
)
def test_a_start_away_from_the_reference_is_refused(reference, message, tiny, tmp_path, monkeypatch):
    """A policy that is not its reference at step 0, by 1e-4 per weight, stops the run before the first update."""
    args = ("loss=dpo", f"reference={reference}")
    run(tiny, tmp_path / "before", *args)
    prepare = model_policy.prepare

    def perturbed(lm, *args, trainable, **kwargs):
        if trainable:
            with torch.no_grad():
                for param in lm.parameters():
                    param += 1e-4
        return prepare(lm, *args, trainable=trainable, **kwargs)

    monkeypatch.setattr(model_policy, "prepare", perturbed)
    with pytest.raises(UserError, match=message):
        run(tiny, tmp_path / "run", *args)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed" and re.search(message, status["reason"]) and status["step"] == 0


def infinite_loss(preference_P, pairs):
    return preference_P * torch.inf


def finite_loss_without_gradient(preference_P, pairs):
    return preference_P + (0 * pairs.chosen_P).abs().sqrt()  # 0, with slope 0 * inf


@pytest.mark.parametrize("spoil", [infinite_loss, finite_loss_without_gradient])
def test_what_is_not_finite_never_reaches_the_weights(spoil, tiny, tmp_path, monkeypatch):
    """A bad micro-batch in step 3 stops the run at its next log line, naming the step's rows; model/ is that of step 2."""
    constant = ("loss=dpo", "optim.schedule=constant", "optim.warmup_ratio=0", "data.eval=null")
    constant += ("tokens_per_microbatch=150",)
    run(tiny, tmp_path / "before", *constant, "max_steps=3")
    objective, steps = losses.objective, []

    def spoiled(loss, pairs, **counts):
        preference_P, sft_P = objective(loss, pairs, **counts)
        steps.append(len(pairs.chosen_P))
        in_step_3 = 3 * 8 < sum(steps) <= 3 * 8 + steps[-1]  # its first micro-batch
        return spoil(preference_P, pairs) if in_step_3 else preference_P, sft_P

    monkeypatch.setattr(losses, "objective", spoiled)
    lines = sorted(i + 1 for i in schedule.step_rows(3, 40, 8, seed=0))
    with pytest.raises(FloatingPointError, match=f"^step 3: .*train.jsonl.gz:{','.join(map(str, lines))}$"):
        run(tiny, tmp_path / "run", *constant, "max_steps=20", "log_every=3")
    assert sum(steps) == 6 * 8  # it ran on, on the old weights, to the next line
    assert [e["step"] for e in log.read_jsonl(tmp_path / "run/metrics.jsonl")] == [3]
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 3) and "not finite" in status["reason"]
    kept, expected = weights(tmp_path / "run/model"), weights(tmp_path / "before/model")
    assert all(torch.equal(kept[k], expected[k]) for k in expected)


@pytest.mark.parametrize("more", [("max_steps=1",), ("max_steps=3", "log_every=3", "checkpoint.every=1")])
def test_an_update_that_breaks_the_weights_is_no_finished_run(more, tiny, tmp_path):
    """A finite loss and a huge rate: the run fails before a model/ or a checkpoint of infinite weights is written."""
    huge = ("optim.lr=1e39", "optim.warmup_ratio=0", "data.eval=null")
    with pytest.raises(FloatingPointError, match="^step 1: the weights are not finite"):
        run(tiny, tmp_path / "run", *huge, *more)
    assert not (tmp_path / "run/model").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"


def test_a_checkpoint_that_is_not_finite_is_refused(tiny, tmp_path):
    """A model with a NaN weight is refused when it is loaded."""
    lm = make_lm()
    with torch.no_grad():
        lm.model.norm.weight[0] = torch.nan
    lm.save_pretrained(tmp_path / "nan")
    make_tokenizer().save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="model.path=.*: model.norm.weight has NaN or infinite values"):
        run(tiny, tmp_path / "run", f"model.path={tmp_path / 'nan'}")


@pytest.mark.parametrize(("dtype", "saved"), [("bfloat16", torch.float32), ("float64", torch.float64)])
def test_compute_dtypes(dtype, saved, tiny, tmp_path):
    """bfloat16 computes on fp32 masters and starts at ln 2 within its noise floor; float64 is float64 throughout."""
    events = run(tiny, tmp_path / "run", "loss=dpo", f"model.dtype={dtype}")
    floor = json.loads((tmp_path / "run/environment.json").read_text())["noise_floor"]
    assert events[0]["loss"] == pytest.approx(math.log(2), abs=1e-12 if dtype == "float64" else 1e-5 + 2 * floor)
    assert floor < (1e-14 if dtype == "float64" else 0.1)
    exact = run(tiny, tmp_path / "fp32", "loss=dpo")
    if dtype == "bfloat16":  # it really computes in bfloat16: fp32 would agree to 1e-6
        assert events[0]["logps/chosen"] != pytest.approx(exact[0]["logps/chosen"], rel=1e-6)
    tolerance = 1e-6 if dtype == "float64" else 0.02
    assert events[-1]["nll/chosen"] == pytest.approx(exact[-1]["nll/chosen"], rel=tolerance)
    assert {v.dtype for v in weights(tmp_path / "run/model").values()} == {saved}


def test_sigint_ends_cleanly(tiny, tmp_path):
    """Without checkpoints SIGINT ends a run after the step in hand: exit code 130, its state, model/ and plots written."""
    args = tiny_args(
        tiny,
        "loss=dpo",
        "batch_size=8",
        "max_steps=1000000",
        "log_every=5",
        "checkpoint.every=0",
        f"run_dir={tmp_path / 'run'}",
    )
    process = subprocess.Popen(command("train.py", *args), env=script_env(), stderr=subprocess.PIPE, text=True)
    path = tmp_path / "run/metrics.jsonl"
    for _ in range(600):
        if process.poll() is not None or (path.exists() and '"train"' in path.read_text()):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr[-2000:]
    assert "Traceback" not in stderr
    status = json.loads((tmp_path / "run/status.json").read_text())
    events = log.read_jsonl(path)
    assert status == {"state": "interrupted", "reason": "SIGINT", "step": events[-1]["step"]}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/model") and (tmp_path / "run/plots/loss.png").exists()


@pytest.mark.slow
def test_compiled_run(tiny, tmp_path, monkeypatch):
    """compile=true trains the same run to 1e-4, with as many graphs after one step as after ten of other row lengths.

    Nor are there more of them for more layers, whose graphs run as they are: Inductor's code is compared once.
    """
    counters = torch._dynamo.utils.counters
    lengths, graphs = set(), []
    packed_batch, step_if_finite = data_batch.packed_batch, optim.step_if_finite

    def measured(*args, **kwargs):
        batch = packed_batch(*args, **kwargs)
        lengths.add(batch.input_ids_BT.numel())
        return batch

    def counted(*args):
        graphs.append(counters["stats"]["unique_graphs"])
        return step_if_finite(*args)

    make_tokenizer().save_pretrained(tmp_path)
    args = ("loss=rpo_avg", "layout=packed", "batch_size=3", "max_steps=10", f"model.path={tmp_path}")
    for layers in (2, 6):
        make_lm(num_hidden_layers=layers).save_pretrained(tmp_path)
        plain = run(tiny, tmp_path / f"plain{layers}", *args)
        torch._dynamo.reset()
        counters.clear()
        with monkeypatch.context() as patch:
            patch.setattr(data_batch, "packed_batch", measured)
            patch.setattr(optim, "step_if_finite", counted)
            if layers == 6:
                patch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
            compiled = run(tiny, tmp_path / f"compiled{layers}", *args, "compile=true")
        graphs.append(counters["stats"]["unique_graphs"])  # the last evaluation's too
        for a, b in zip(plain, compiled, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    assert len(lengths) >= 10 and len(graphs) == 2 * 11
    assert graphs[0] > 0 and len(set(graphs)) == 1, graphs


def test_positions_end_where_the_data_does(group, tmp_path):
    """A model with learned positions for just the longest row trains and answers: no probe or sample runs past them."""
    tokenizer = make_tokenizer()
    rows = make_rows_json(8)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    paths = [f"data.train={tmp_path / 'rows.jsonl'}", f"data.eval={tmp_path / 'rows.jsonl'}", "wandb.mode=disabled"]
    tokenizer.save_pretrained(tmp_path / "model")
    cfg = settings(*paths, f"model.path={tmp_path / 'model'}")
    read = {"cfg": cfg.data, "pairs": True, "cache_dir": tmp_path}
    longest = data_batch.longest(dataset.load(cfg.data.train, tokenizer=tokenizer, **read)[0])
    for positions in (longest, longest - 1):
        lm_config = AutoConfig.for_model(
            "gpt2", vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=positions, bos_token_id=2, eos_token_id=3
        )  # fmt: skip
        AutoModelForCausalLM.from_config(lm_config).save_pretrained(tmp_path / "model")
        args = [*paths, f"model.path={tmp_path / 'model'}", f"run_dir={tmp_path / str(positions)}", "max_steps=1"]
        if positions == longest:
            assert train.train(settings(*args, "sample_every=1")) == "finished"
        else:
            with pytest.raises(UserError, match=f"{positions} positions; set data.max_length={positions} or less"):
                train.train(settings(*args))


def test_a_revision_is_the_references_too(tiny, tmp_path, monkeypatch):
    """model.revision goes with model.path wherever the reference is read; a reference.path of its own has none."""
    read, load, check = [], hf.load, hf.check

    def seen(path, revision, master, *, key, **more):
        read.append((key, revision))
        return load(path, revision, master, key=key, **more)

    monkeypatch.setattr(hf, "load", seen)
    # As if the folder were of the Hub.
    monkeypatch.setattr(hf, "check", lambda path, _revision, **more: check(path, **more))
    run(tiny, tmp_path / "same", "loss=dpo", "reference=live", "model.revision=v1")
    assert read == [("model.path", "v1"), ("reference.path", "v1")]
    read.clear()
    run(tiny, tmp_path / "own", "loss=dpo", f"reference.path={tiny / 'model'}", "model.revision=v1")
    assert read == [("model.path", "v1"), ("reference.path", None)]


def test_rates_are_of_updates_alone(tiny, tmp_path, monkeypatch):
    """Saves of half a second each make no step look slow."""
    save = Checkpoints.save

    def slow(self, *args, **more):
        time.sleep(0.5)
        return save(self, *args, **more)

    monkeypatch.setattr(Checkpoints, "save", slow)
    events = run(tiny, tmp_path / "run", "checkpoint.every=1")
    seconds = [8 / event["perf/pairs_per_second"] for event in split(events, "train")]
    assert len(seconds) == 4 and sorted(seconds)[1] < 0.4, seconds


def test_a_refused_folder_costs_nothing(tmp_path):
    """Where run_dir holds another run the embedded task is not made for it first."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("loss: {beta: 7}\n")
    (tmp_path / "run/sweep.json").write_text("[]")
    with pytest.raises(UserError, match="already holds a run"):
        train.train(settings(f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}", "wandb.mode=disabled"))
    assert not (tmp_path / "cache").exists()
