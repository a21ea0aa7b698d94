"""rpo.training.meter: means against plain numpy, FLOPs by hand, wandb's mode and file, and names as docs/METRICS.md has them."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb

from rpo import config
from rpo.config import Loss, SyntheticTask
from rpo.data.chat import Chat
from rpo.data.tokenizer import encode_prompt
from rpo.errors import UserError
from rpo.evals import preference
from rpo.evals.context import Answer
from rpo.losses import PairLogps
from rpo.model import divergence
from rpo.model.sampling import Completion
from rpo.overopt import measure
from rpo.runs import log
from rpo.synthetic import grammar, task
from rpo.tasks import generate
from rpo.training import meter as meter_module
from rpo.training.meter import (
    GOLD,
    GRADIENT_SPLIT,
    PER_CHOSEN_TOKEN,
    PER_PAIR_PREFERENCE,
    PER_PAIR_REFERENCE,
    PER_PAIR_SUPERVISED,
    TRAIN_ONLY,
    Meter,
    ModelSize,
    Throughput,
    performance,
)
from tests.helpers.models import make_lm, prepared
from tests.helpers.rows import LENGTHS, make_rows, make_tokenizer
from tests.helpers.runs import ROOT, run, script_env, settings, tiny_args
from tests.helpers.wandb_file import history_of, key_of, read_wandb
from train import train

BETA, FLOOR = 0.3, 0.01
ALWAYS = {*PER_PAIR_SUPERVISED, *PER_PAIR_PREFERENCE, *PER_PAIR_REFERENCE, *PER_CHOSEN_TOKEN}


# ---- the meter


def random_pairs(count, seed):
    """Pairs with exact ties, and falls of the chosen response on both sides of the noise floor."""
    rng = np.random.default_rng(seed)
    tokens_chosen, tokens_rejected = rng.integers(1, 30, size=(2, count))
    ref_chosen, ref_rejected = -rng.exponential(20, size=(2, count))
    shift, shift_rejected = rng.normal(size=(2, count))
    shift[::5] = -0.5 * FLOOR * tokens_chosen[::5]  # a fall within rounding
    shift[1::5] = -2 * FLOOR * tokens_chosen[1::5]  # one beyond
    columns = [ref_chosen + shift, ref_rejected + shift_rejected, ref_chosen, ref_rejected]
    for column in columns:
        column[2::5] = -8.0  # ties at zero
    return PairLogps(*map(torch.from_numpy, [*columns, tokens_chosen, tokens_rejected])), rng.random((2, count))


def loss_of(preference, beta):
    return Loss(preference, "avg", beta, 1.0, label_smoothing=0.0, normalize=False, lam=None, clip=None, gamma=None)


def test_preference_means(group):
    """Every metric over three batches, one of them of weight 0, equals plain numpy on the other two; reading empties."""
    meter = Meter(loss_of("sigmoid", BETA), FLOOR, group)
    batches = [random_pairs(count, seed) for seed, count in enumerate((5, 20, 11))]
    for (batch, terms), weight in zip(batches, (1.0, 0.0, 1.0), strict=True):
        meter.add(batch, *map(torch.from_numpy, terms), weight)
    values = meter.read()

    counted = [batches[0], batches[2]]
    preference, sft = np.concatenate([terms for _, terms in counted], axis=1)
    names = ("chosen_P", "rejected_P", "ref_chosen_P", "ref_rejected_P", "tokens_chosen_P")
    chosen, rejected, ref_chosen, ref_rejected, num_tokens = (
        np.concatenate([getattr(batch, name).numpy() for batch, _ in counted]) for name in names
    )
    shift, shift_rejected = chosen - ref_chosen, rejected - ref_rejected
    margin = shift - shift_rejected
    assert (margin == 0).any()
    expected = {
        "loss": preference.mean() + sft.mean(),
        "loss/preference": preference.mean(),
        "loss/sft": sft.mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "rewards/chosen": BETA * shift.mean(),
        "rewards/rejected": BETA * shift_rejected.mean(),
        "rewards/margins": BETA * margin.mean(),
        "rewards/accuracies": np.where(margin == 0, 0.5, margin > 0).mean(),
        "shift/chosen": shift.mean(),
        "shift/rejected": shift_rejected.mean(),
        "displacement_rate": np.mean([s / n < -FLOOR for s, n in zip(shift, num_tokens, strict=True)]),
        "nll/chosen": -chosen.sum() / num_tokens.sum(),
        "shift_per_token/chosen": shift.sum() / num_tokens.sum(),
    }
    assert values == pytest.approx(expected, rel=1e-12)
    with pytest.raises(AssertionError, match="without a pair"):
        meter.read()


def test_a_fall_within_rounding_is_no_displacement(group):
    """At zero noise floor every fall counts, at a larger one only those beyond it per token."""
    batch = PairLogps(
        *(torch.tensor(x) for x in ([-1.0, -1.2, -0.9], [-1.0] * 3, [-1.0] * 3, [-1.0] * 3, [4] * 3, [4] * 3))
    )
    for floor, share in ((0.0, 1 / 3), (0.04, 1 / 3), (0.06, 0.0)):
        meter = Meter(loss_of("sigmoid", 1.0), floor, group)
        meter.add(batch, torch.zeros(3), torch.zeros(3))
        assert meter.read()["displacement_rate"] == pytest.approx(share)


def test_supervised_means(group):
    """Rows without a rejected side have the losses, the chosen log-prob and its NLL per token, and nothing else."""
    batch, (preference, sft) = random_pairs(9, seed=3)
    alone = replace(batch, rejected_P=None, ref_chosen_P=None, ref_rejected_P=None, tokens_rejected_P=None)
    meter = Meter(loss_of("none", BETA), FLOOR, group)
    meter.add(alone, torch.zeros(9, dtype=torch.float64), torch.from_numpy(sft))
    chosen, num_tokens = batch.chosen_P.numpy(), batch.tokens_chosen_P.numpy()
    expected = {"loss": sft.mean(), "loss/preference": 0, "loss/sft": sft.mean(), "logps/chosen": chosen.mean()}
    assert meter.read() == pytest.approx(expected | {"nll/chosen": -chosen.sum() / num_tokens.sum()})


# ---- speed


def test_step_flops_by_hand():
    """Two pairs (P, C, R) = (3, 2, 4) and (1, 1, 1): unique 12, scored 8, visible 37 + 5 query-key pairs."""
    size = ModelSize(trunk=10, head=7, layers=2, attention_width=5)
    lengths = [np.array(column, dtype=np.int32) for column in ((3, 1), (2, 1), (4, 1))]
    assert size.step_flops(*lengths) == 6 * (10 * 12 + 7 * 8) + 12 * 2 * 5 * 42
    frozen = dataclasses.replace(size, frozen_trunk=9, frozen_head=7)  # of 10 and 7: nothing is worked out for them
    assert frozen.step_flops(*lengths) == 6 * 12 + 4 * (9 * 12 + 7 * 8) + 12 * 2 * 5 * 42


def test_step_flops_counts_visible_tokens():
    """Without trunk and head, FLOPs are 12 per layer, unit of width and entry of a mask drawn out entry by entry."""
    P, C, R = 4, 3, 5
    owner = [0] * P + [1] * C + [2] * R  # prompt, chosen, rejected
    seen = sum(owner[k] in (0, owner[q]) for q in range(P + C + R) for k in range(q + 1))
    size = ModelSize(trunk=0, head=0, layers=1, attention_width=1)
    assert size.step_flops(np.array([P]), np.array([C]), np.array([R])) == 12 * seen


def test_throughput_counts_the_time_of_updates_alone(group, monkeypatch):
    """Two steps in 4 seconds of which 1 is a pause: two thirds of a step's pairs and tokens a second; then from zero."""
    now = [100.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])
    policy = SimpleNamespace(compile_tiles=False, compiled_layers=0)
    clock = Throughput(ModelSize(trunk=10, head=7, layers=2, attention_width=5), group, policy)
    plan = SimpleNamespace(pairs=6, unique_tokens=90, lengths=[np.array([3]), np.array([2]), np.array([1])])
    clock.count(plan)
    now[0] += 1.5
    with clock.paused():
        now[0] += 1.0
    clock.count(plan)
    now[0] += 1.5
    values = clock.read()
    assert (values["perf/pairs_per_second"], values["perf/tokens_per_second"]) == (4.0, 60.0)
    clock.count(plan)
    now[0] += 2.0
    assert clock.read()["perf/pairs_per_second"] == 3.0


def test_compiled_layers_are_said_once(group, capsys):
    """A run that compiles prints how many layers do, at first and when that changes; one that does not prints nothing."""
    size, policy = ModelSize(1, 1, layers=9, attention_width=1), SimpleNamespace(compile_tiles=True, compiled_layers=0)
    clock, read = Throughput(size, group, policy), []
    for policy.compiled_layers in (0, 0, 9):
        read.append(clock.read()["perf/compiled_layers"])
    assert read == [0, 0, 9]
    none, all_of_them = capsys.readouterr().out.splitlines()
    assert none.startswith("compile: 0 of 9 layers run compiled; TORCH_LOGS=")
    assert all_of_them == "compile: 9 of 9 layers run compiled"
    policy.compile_tiles = False
    assert Throughput(size, group, policy).read()["perf/compiled_layers"] == 9 and not capsys.readouterr().out


def test_performance_on_a_cpu():
    """Rates by their names, no MFU (a CPU has no known peak), and this process's peak memory in GiB."""
    rates = {"pairs_per_second": 3.0, "tokens_per_second": 4.0, "mfu": 1e9}
    values = performance(rates, torch.device("cpu"), 1)
    assert 0.1 < values.pop("perf/memory_gib") < 100
    assert values == {"perf/pairs_per_second": 3.0, "perf/tokens_per_second": 4.0}


# ---- wandb


def wandb_of(mode):
    return settings(f"wandb.mode={mode}").wandb


def log_of(mode, *more):
    return settings(f"wandb.mode={mode}", *more)


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_wandb_mode_is_taken_at_its_word(mode, monkeypatch):
    """disabled and offline are what they say, with a key or without."""
    assert log.wandb_mode(wandb_of(mode)) == mode
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert log.wandb_mode(wandb_of(mode)) == mode


def test_wandb_mode_without_a_key():
    """auto is offline and never asks; online is one line that names the fix."""
    assert log.wandb_mode(wandb_of("auto")) == "offline"
    with pytest.raises(UserError, match="wandb.mode=online: no API key .*wandb.mode=offline"):
        log.wandb_mode(wandb_of("online"))


@pytest.mark.parametrize("named", ["dryrun", "run", "offline", "online", "shared", "disabled"])
def test_wandb_mode_of_the_environment_is_what_wandb_takes_it_for(named, monkeypatch):
    """With a key, WANDB_MODE by any of wandb's names sends something exactly where wandb's own settings would."""
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", named)
    theirs = wandb.Settings(mode=named)
    assert (log.wandb_mode(wandb_of("auto")) == "online") == (not theirs._offline and theirs.mode != "disabled")
    assert log.wandb_mode(wandb_of("disabled")) == "disabled"


def test_a_wandb_mode_of_the_environment_that_is_none_is_refused(monkeypatch):
    """WANDB_MODE=OFFLINE, which wandb does not know, is one line, not a run that is sent."""
    monkeypatch.setenv("WANDB_MODE", "OFFLINE")
    with pytest.raises(UserError, match="WANDB_MODE=OFFLINE: expected online, offline or disabled"):
        log.wandb_mode(wandb_of("auto"))
    assert log.wandb_mode(wandb_of("offline")) == "offline"


def test_wandb_mode_with_a_key(monkeypatch, tmp_path):
    """A key in the environment or in netrc, for the very host, makes auto online."""
    wandb.teardown()  # its settings are read once
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    (tmp_path / "other").write_text(f"machine example.org login user password {'k' * 40}\n")
    for name, value, expected in (
        ("WANDB_API_KEY", "k" * 40, "online"),
        ("NETRC", str(tmp_path / "netrc"), "online"),
        ("NETRC", str(tmp_path / "other"), "offline"),
        ("NETRC", str(tmp_path / "absent"), "offline"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert log.wandb_mode(wandb_of("auto")) == expected, (name, value)
            wandb.teardown()
    monkeypatch.setenv("NETRC", str(tmp_path / "other"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://example.org/wandb")
    wandb.teardown()
    assert log.wandb_mode(wandb_of("online")) == "online"
    monkeypatch.undo()
    wandb.teardown()


@pytest.mark.parametrize("server", [None, "https://wandb.example.org"])
def test_what_wandb_login_writes_is_found(server, tmp_path):
    """After wandb's own login, to its default server or another that it remembers, auto is online in a new process."""
    env = {name: value for name, value in script_env(HOME=str(tmp_path)).items() if name != "NETRC"}
    login = f"import wandb; wandb.login(key='{'k' * 40}', host={server!r}, verify=False, relogin=True)"
    ask = "from rpo.runs import log; from tests.helpers.runs import settings; print(log.wandb_mode(settings().wandb))"
    printed = []
    for code in (ask, login, ask):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, text=True)
        printed.append(done.stdout.strip().splitlines()[-1:])
    assert (printed[0], printed[2]) == (["offline"], ["online"]), (tmp_path / ".netrc").read_text()


def test_under_an_agent_the_runs_id_is_the_agents(monkeypatch, tmp_path):
    """resume.json holds the id that wandb took, and a log that an agent restarts under another id is sent from there on."""
    kept = tmp_path / "wandb/resume.json"
    for agent in ("agent001", "agent002"):
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep001")
        monkeypatch.setenv("WANDB_RUN_ID", agent)
        wandb.teardown()
        position = {"events": 1, "seconds": 0.0, "metrics.jsonl": 0, "samples.jsonl": 0}
        after = None if agent == "agent001" else (tmp_path, position)
        with log.RunLog(tmp_path, log_of("offline"), enabled=True, after=after) as writer:
            assert json.loads(kept.read_text()) == {"id": agent, "sent": 0 if after is None else 1}
            for step in (1, 2, 3):
                writer.metrics("train", step, 8, {"loss": 1.0})
        (path,) = (tmp_path / "wandb").glob(f"offline-run-*-{agent}/*.wandb")
        wandb.teardown()
        assert [row["step"] for row in history_of(path)] == [1, 2, 3]


def tensorboard_of(folder):
    """The numbers of TensorBoard's event files by (name, step), as TensorBoard reads them, to their last digit."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install -e '.[tensorboard]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    read = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return {
        (tag, event.step): make_ndarray(event.tensor_proto).item()
        for tag in read.Tags()["tensors"]
        for event in read.Tensors(tag)
    }


def test_tensorboard_of_a_resumed_run_has_each_number_once(tiny, tmp_path):
    """What a run wrote after its last checkpoint gives way to what the resumed one writes: the numbers are those of the files."""
    args = ("log.tensorboard=true", "checkpoint.every=2", "optim.schedule=constant", "optim.warmup_ratio=0")
    run(tiny, tmp_path, *args, "max_steps=3")
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000003")
    (tmp_path / "checkpoints" / "latest").unlink()
    run(tiny, tmp_path, *args, "max_steps=5")
    events = log.read_jsonl(tmp_path / "metrics.jsonl")
    losses = {(f"{event['split']}/loss", event["step"]): event["loss"] for event in events}
    assert len(losses) == len(events)
    assert {key: value for key, value in tensorboard_of(tmp_path / "tensorboard").items() if key in losses} == losses


def test_without_tensorboard_its_key_is_refused(monkeypatch):
    """One line with the command that installs it."""
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log.tensorboard=true: needs tensorboard; pip install -e '.\[tensorboard\]'"):
        log.check_tensorboard(settings("log.tensorboard=true").log)


def test_an_alert_says_how_a_run_ended(tmp_path, monkeypatch):
    """A loss that is not finite, or any other error that ends a run, is an alert in wandb; a run that ends well sends none."""
    said = []
    with log.RunLog(tmp_path, log_of("offline"), enabled=True) as writer:
        monkeypatch.setattr(writer.run, "alert", lambda title, text: said.append((title, text)))
        writer.metrics("train", 1, 8, {"loss": 1.0})
    assert not said
    with pytest.raises(FloatingPointError), log.RunLog(tmp_path, log_of("offline"), enabled=True) as writer:
        monkeypatch.setattr(writer.run, "alert", lambda title, text: said.append((title, text)))
        raise FloatingPointError("the loss of step 2 is not finite")
    assert said == [(tmp_path.name, "ended by FloatingPointError: the loss of step 2 is not finite")]


def test_offline_run_is_all_there(tiny, tmp_path):
    """A run's .wandb file has every event of metrics.jsonl under its split's prefix, the pairs axis, group and config."""
    run_dir = tmp_path / "run"
    args = ["wandb.mode=offline", "wandb.group=sweep-7", "loss=rpo_sum", "batch_size=8", "max_steps=3", "log_every=1"]
    args += ["log.tensorboard=true", "wandb.entity=team", "wandb.tags=[a,b]", "wandb.notes=why", "wandb.job_type=cell"]
    cfg = settings(*tiny_args(tiny), *args, "eval_every=2", "sample_every=3", f"run_dir={run_dir}")
    train(cfg)
    wandb.teardown()  # waits until the file is written
    (path,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    records, history = list(read_wandb(path)), history_of(path)
    events = log.read_jsonl(run_dir / "metrics.jsonl")
    names = {split: set() for split in ("train", "eval")}
    for event in events:
        split, step, num_pairs = (event.pop(key) for key in ("split", "step", "pairs"))
        event.pop("time")
        names[split] |= set(event)
        expected = {"pairs": num_pairs, "step": step} | {f"{split}/{name}": value for name, value in event.items()}
        assert any(expected.items() <= row.items() for row in history), (split, step)
    scalars = tensorboard_of(run_dir / "tensorboard")
    of_files = {
        (f"{e['split']}/{name}", e["step"]): value
        for e in log.read_jsonl(run_dir / "metrics.jsonl")
        for name, value in e.items()
        if name not in ("split", "step", "pairs", "time")
    }
    assert scalars == of_files
    assert names["eval"] == ALWAYS
    assert names["train"] == ALWAYS | set(TRAIN_ONLY) - {"perf/mfu"}
    assert sum(row.get("samples/_type") == "table-file" for row in history) == 2, "tables at step 0 and at the end"

    axes = {r.metric.name or r.metric.glob_name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert axes == {"pairs": "", "*": "pairs"} | dict.fromkeys(log.BEST, "pairs")
    assert set(log.BEST) <= {f"eval/{name}" for name in {*ALWAYS, *GOLD}}
    (recorded,) = (record.run for record in records if record.HasField("run"))
    assert (recorded.project, recorded.run_group, recorded.display_name) == ("rpo", "sweep-7", "sweep-7/run")
    assert (recorded.entity, recorded.job_type, [*recorded.tags], recorded.notes) == ("team", "cell", ["a", "b"], "why")
    stored = {key_of(item): json.loads(item.value_json) for item in recorded.config.update}
    resolved = config.to_dict(cfg)
    assert {key: stored[key] for key in resolved} == resolved
    assert stored["loss"]["eta"] == cfg.loss.eta and math.isclose(stored["optim"]["lr"], 1e-3)


# ---- the two lists of names


def documented(text):
    """The names in the first columns of a page's tables."""
    return re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)


def test_docs_and_code_have_the_same_names(group):
    """docs/METRICS.md's tables have, once each, exactly what the loop, the gold evaluation and eval.py's tasks report."""
    page = (ROOT / "docs" / "METRICS.md").read_text()
    training, evaluation = page.split("\n## `eval.py`\n")
    of_training = ALWAYS | {*TRAIN_ONLY, *GRADIENT_SPLIT, *GOLD}
    assert sorted(documented(training)) == sorted(of_training)

    policy = prepared(make_lm(), group)
    rows = make_rows(LENGTHS, vocab_size=40)
    logps = preference.score(lambda: policy, rows, group, tokens_per_microbatch=999)
    both = logps | {f"ref_{side}": values for side, values in logps.items()}
    on_pairs = preference.statistics(both, rows, beta=0.1, noise_floor=0.0, seed=0)
    of_answers = generate.metrics([Answer("ba", 3, True)], np.zeros(1))
    asked = measure.Questions(make_tokenizer(), [[2, 5]], ["b"], ["here"], None, None, None, [3], 128, "")
    columns = {name: np.ones(1) for name in (*divergence.COLUMNS, "gold", "tokens", "ended")}
    answered = measure.Measured([Completion([5, 6, 7], True)], ["ba"], columns, None)
    cfg = settings("task=overopt", "runs=R", "task.samples=1", name="eval")
    along = measure.point_of(answered, asked, cfg, beta=1.0, noise_floor=0.0, ref_logps=None)["metrics"]
    of_eval = set(on_pairs) | set(of_answers) | set(along)
    assert sorted(documented(evaluation)) == sorted(of_eval - of_training)
    shared = of_eval & of_training
    assert shared <= set(re.findall(r"`([^`]+)`", evaluation)), "eval.py's part does not name all that it gives"


def test_gold_names(group):
    """What an evaluation of the embedded task measures is the list that the code and the page have."""
    tokenizer = task.word_tokenizer(["<user>", "<assistant>", *grammar.vocabulary()], task.TEMPLATE)
    policy = prepared(make_lm(vocab_size=len(tokenizer)), group)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": grammar.prompts()[0]}], Chat("2024-01-01", {}))
    weights = SyntheticTask(pairs=1, eval_pairs=1, flip=0.0, hidden_weight=1.0, length_weight=0.0, samples=1, seed=0)
    where = {"device": group, "seed": 0, "reshard": False}
    values = task.evaluate(policy, policy, tokenizer, [prompt], [tokenizer.eos_token_id], weights, **where)
    assert tuple(values) == GOLD


def test_a_model_against_itself(group):
    """No shift, accuracy one half by the tie rule, NLL ln 2, Brier 1/4, nothing displaced; the error is not zero."""
    policy = prepared(make_lm(), group)
    rows = make_rows(LENGTHS, vocab_size=40)
    logps = preference.score(lambda: policy, rows, group, tokens_per_microbatch=999)
    logps |= {f"ref_{side}": values for side, values in logps.items()}
    result = preference.statistics(logps, rows, beta=0.1, noise_floor=0.0, seed=0)
    values = {name: cell["value"] for name, cell in result.items()}
    assert values["rewards/accuracies"] == 0.5 and values["displacement_rate"] == values["shift/chosen"] == 0
    assert values["nll/preference"] == pytest.approx(math.log(2)) and values["brier"] == 0.25
    parts = [result[f"rewards/accuracies/{part}"]["n"] for part in ("chosen_longer", "chosen_shorter", "same_length")]
    assert parts == [
        sum(c > r for _, c, r in LENGTHS),
        sum(c < r for _, c, r in LENGTHS),
        sum(c == r for _, c, r in LENGTHS),
    ]
    assert len(logps["chosen"]) == len(LENGTHS)


def test_calibration_error():
    """Small for margins whose labels follow them, large for the same margins times five; certain and right is 0."""
    rng = np.random.default_rng(0)
    margin = rng.normal(scale=1.5, size=20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-np.abs(margin)))
    observed = np.where(right, np.abs(margin), -np.abs(margin))
    assert preference.calibration_error(observed, 0) < 0.02
    assert preference.calibration_error(5 * observed, 0) > 0.1
    assert preference.calibration_error(np.full(100, 50.0), 0) < 1e-12


def test_read_jsonl_keeps_order(tmp_path):
    """Events come back in the order in which they were logged, with split, step, pairs and a time that never falls."""
    with log.RunLog(tmp_path, log_of("disabled"), enabled=True) as writer:
        for step in range(3):
            writer.metrics("train", step, 8 * step, {"loss": 1.0 / (step + 1)})
    events = log.read_jsonl(tmp_path / "metrics.jsonl")
    assert [(e["split"], e["step"], e["pairs"], e["loss"]) for e in events] == [
        ("train", 0, 0, 1.0),
        ("train", 1, 8, 0.5),
        ("train", 2, 16, 1 / 3),
    ]
    assert all(a["time"] <= b["time"] for a, b in pairwise(events))


def test_an_unreachable_server_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    """auto goes on offline with one line where the server does not answer; online, asked for by name, is refused."""
    started, init = [], wandb.init

    def no_server(*args, mode, **kwargs):
        started.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("Timed out after 20.0s")
        return init(*args, mode="disabled", **kwargs)

    monkeypatch.setattr(wandb, "init", no_server)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with log.RunLog(tmp_path, log_of("auto"), enabled=True) as writer:
        writer.metrics("train", 1, 8, {"loss": 1.0})
    assert started == ["online", "offline"] and "this run is offline" in capsys.readouterr().out
    with pytest.raises(UserError, match="wandb.mode=online: Timed out"):
        log.RunLog(tmp_path, log_of("online"), enabled=True)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert log.wandb_mode(wandb_of("auto")) == "disabled"
