"""eval.py task=overopt and task=select: curves against plain logits and the other tasks, bad input, resuming, choosing."""

import json
import math
import shutil
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rpo import dist, files, stats
from rpo.data import batch as data_batch
from rpo.data import dataset
from rpo.data.tokenizer import load_tokenizer
from rpo.errors import UserError
from rpo.evals import results as evals_results
from rpo.evals.store import Store
from rpo.model import policy as model_policy
from rpo.model.sampling import Sampling, sample
from rpo.model.shard import PLAIN, mesh, reshard
from rpo.overopt import best_of_n, figures, measure, selection, study
from rpo.overopt import curve as overopt
from rpo.runs import catalog
from rpo.runs import folder as run_folder
from rpo.runs.state import tensors_of
from rpo.synthetic import task
from tests.helpers.evaluations import evaluate, lines
from tests.helpers.gold_runs import BETA, STEPS, trained
from tests.helpers.models import make_lm
from tests.helpers.rows import make_rows_json, write_jsonl
from tests.helpers.runs import command, script_env, settings, tiny_args

SAMPLES = 4
ASKED = (f"task.samples={SAMPLES}", f"task.written={SAMPLES}", "task.batch_size=8", "tokens_per_microbatch=600")
ASKED += ("task.bon=[1,4]",)


def overopt_of(found, run_dir, *more):
    """The details of results.json: runs with their curves, groups, what was left out."""
    return evaluate(run_dir, "task=overopt", f"runs={found}", *ASKED, *more)["details"]


def refused(found, run_dir, *more):
    """The one line that an evaluation is refused with."""
    with pytest.raises(UserError) as error:
        overopt_of(found, run_dir, *more)
    assert "\n" not in str(error.value)
    return str(error.value)


def values(point):
    return {name: cell["value"] for name, cell in point["metrics"].items()}


@pytest.fixture(scope="module")
def results(gold_sweep):
    return overopt_of(gold_sweep / "sweep", gold_sweep / "results")


@pytest.fixture(autouse=True)
def no_plots(results, monkeypatch):
    """Figures are drawn once, for `results`: they take longer than all else."""
    monkeypatch.setattr(figures, "draw_study", lambda *args: [])


# ---- what is measured


def test_what_an_evaluation_leaves(gold_sweep, results, capsys):
    """results.json has a curve, a summary, fits and a verdict per run, one record per group, and what was left out;
    points.jsonl every measurement, samples.jsonl every answer, plots/ the figures."""
    first, second = results["runs"]
    assert [run["run"] for run in results["runs"]] == [str(gold_sweep / "sweep" / name) for name in "01"]
    assert [run["label"] for run in results["runs"]] == [f"DPO beta {BETA}", f"RPO sum beta {BETA} eta 0.5"]
    assert [point["step"] for point in first["curve"]] == list(range(STEPS + 1))
    assert first["summary"] == overopt.summarise(first["curve"]) and first["verdict"] and first["kind"]
    assert [fit["form"] for fit in second["fits"]] == ["bon", "rl"]
    assert [group["runs"] for group in results["groups"]] == [[first["run"]], [second["run"]]]
    assert results["groups"][0]["summary"]["gold/final"]["mean"] == values(first["curve"][-1])["gold"]
    failed, empty = results["left_out"]
    assert failed == f"{gold_sweep / 'sweep' / '2'} (failed: UserError: no room)"
    assert empty == f"{gold_sweep / 'sweep' / '10'} (no checkpoints; checkpoint.every=N keeps them)"
    folder = gold_sweep / "results"
    assert {"overoptimisation.png", "signals.png"} <= {path.name for path in (folder / "plots").iterdir()}
    assert len(lines(folder / "points.jsonl")) == 2 * (STEPS + 2)
    assert len(lines(folder / "samples.jsonl")) == 2 * (STEPS + 1) * 6 * SAMPLES
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert set(first["curve"][0]["clusters"]) == {"gold", "kl"} and len(first["prompts"]) == 6


def test_each_run_is_a_model_of_the_one_form(gold_sweep, results):
    """results.json has each run's summary as cells, with the errors of what they are read off; samples are its items."""
    found = evals_results.read(gold_sweep / "results")
    assert list(found.models) == [run["run"] for run in results["runs"]] and found.task == "overopt"
    for run in results["runs"]:
        cells, summary, last = found.models[run["run"]], run["summary"], run["curve"][-1]["metrics"]
        assert {name: cell["value"] for name, cell in cells.items()} == {
            name: value for name, value in summary.items() if value is not None and not name.endswith("_se")
        }
        for name, metric in {"gold/final": "gold", "kl/final": "kl", "accuracy/final": "rewards/accuracies"}.items():
            assert cells[name] == last[metric] | {"n_error": 0}, name
        assert (cells["gold/drop"]["se"], cells["gold/drop"]["n"]) == (summary["gold/drop_se"], last["gold"]["n"])
        assert (cells["step/final"]["value"], cells["step/final"]["se"]) == (STEPS, None)
    item = found.items[-1]
    assert item.cluster == item.prompt and item.scores.keys() == {"gold", "kl"} and item.details["step"] == STEPS
    assert len({(item.model, item.id) for item in found.items}) == len(found.items)


@torch.no_grad()
def test_samples_against_plain_logits(gold_sweep, results):
    """Every metric of the last checkpoint's samples, by loops over RUN/model's own logits at each position of the answers
    in samples.jsonl, with standard errors clustered by prompt."""
    run = gold_sweep / "sweep" / "1"
    point = results["runs"][1]["curve"][-1]
    lms = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (run / "model", gold_sweep / "model")
    ]
    tokenizer = load_tokenizer(gold_sweep / "model")
    mine = [
        s | s["details"] | s["scores"]
        for s in lines(gold_sweep / "results/samples.jsonl")
        if s["model"] == str(run) and s["details"]["step"] == STEPS
    ]
    table, clusters, texts = [], [], {}
    for line in mine:
        prompt = tokenizer(line["prompt"], add_special_tokens=False).input_ids
        said = tokenizer(line["response"], add_special_tokens=False).input_ids
        ids = said + [tokenizer.eos_token_id] * line["ended"]
        assert len(ids) == line["tokens"]
        logp, ref = (
            lm(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1).numpy() for lm in lms
        )
        p, at = np.exp(logp), np.arange(len(ids))
        top = np.sort(p, axis=1)[:, -10:]
        share = top / top.sum(1, keepdims=True)
        row = {"gold": line["gold"], "kl": (p * (logp - ref)).sum(), "kl/k1": (logp[at, ids] - ref[at, ids]).sum()}
        row |= {"entropy": -(p * logp).sum(), "entropy/top10": -(share * np.log(share)).sum(), "mass/top10": top.sum()}
        table.append(row | {"samples/length": len(ids), "samples/ended": line["ended"], "proxy": BETA * row["kl/k1"]})
        clusters.append(line["prompt"])
        texts.setdefault(line["prompt"], []).append(said)
    number = [list(texts).index(prompt) for prompt in clusters]
    sizes = [row["samples/length"] for row in table]
    for name in table[0]:
        per_token = name in ("entropy", "entropy/top10", "mass/top10")
        expected = stats.clustered_mean([row[name] for row in table], number, sizes if per_token else None)
        assert point["metrics"][name]["value"] == pytest.approx(expected["value"], rel=1e-4), name
        assert point["metrics"][name]["se"] == pytest.approx(expected["se"], rel=1e-3, abs=1e-6), name
    for n in (1, 2, 3):
        expected = np.mean([best_of_n.distinct(group, n) for group in texts.values()])
        assert values(point)[f"distinct/{n}"] == pytest.approx(expected)
    by_prompt = [[row["gold"] for row, i in zip(table, number, strict=True) if i == g] for g in range(6)]
    np.testing.assert_allclose(point["clusters"]["gold"]["mean"], np.mean(by_prompt, axis=1))
    assert point["clusters"]["gold"]["size"] == [SAMPLES] * 6


def test_last_checkpoint_is_the_model(gold_sweep, results, tmp_path):
    """The last point equals task=gold and task=pairs of RUN/model on the same prompts and pairs, errors included."""
    run = gold_sweep / "sweep" / "0"
    found = {tuple(r["prompt"][0].items()): r for r in reversed(lines(gold_sweep / "eval.jsonl"))}
    order = [r for r in lines(gold_sweep / "eval.jsonl") if any(r is not None and r == kept for kept in found.values())]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in order])
    on_gold = [f"data.eval={prompts}", f"task.samples={SAMPLES}", "task.batch_size=8", f"model.path={run / 'model'}"]
    on_pairs = ["task=pairs", f"model.path={run / 'model'}", "tokens_per_microbatch=600"]
    point = results["runs"][0]["curve"][-1]["metrics"]
    for name, result in (
        ("gold", evaluate(tmp_path / "gold", "task=gold", *on_gold)),
        ("pairs", evaluate(tmp_path / "pairs", *on_pairs)),
    ):
        (expected,) = result["models"].values()
        assert len(expected) >= 4, name
        for metric, cell in expected.items():
            assert point[metric]["n"] == cell["n"], metric
            for part in ("value", "se"):
                near = cell[part] if cell[part] is None else pytest.approx(cell[part], rel=1e-4, abs=1e-6)
                assert point[metric][part] == near, (metric, part)


def test_step_0_is_the_reference(results):
    """Before training nothing has moved: KL, proxy and shifts exactly 0, accuracy a half, NLL ln 2; one for all runs."""
    first, second = (run["curve"][0] for run in results["runs"])
    for name in ("kl", "kl/k1", "proxy", "shift/chosen", "rewards/margins", "displacement_rate"):
        assert first["metrics"][name]["value"] == 0, name
    assert values(first)["rewards/accuracies"] == 0.5
    assert values(first)["nll/preference"] == pytest.approx(math.log(2))
    assert first == second
    assert values(results["runs"][0]["curve"][-1])["kl"] > 0.1


@torch.no_grad()
def test_best_of_n(gold_sweep, results, group):
    """Of four answers to a prompt that the reference gives to the next seed, the one with the largest log pi/ref by plain
    logits of the last checkpoint's model is the best of 4; the best of 1 is their mean. task.bon=[] leaves it out."""
    run = gold_sweep / "sweep" / "0"
    ((found,), _) = catalog.find([str(run)])
    cfg = settings("task=overopt", f"runs={run}", *ASKED, name="eval")
    (asked,) = measure.ask([found], cfg, group).values()
    reference = model_policy.load_policy(*found.start, device=group, dtype="auto")
    questions, said, _ = asked.repeated(4)
    how = {"device": group, "seed": [0, 1], "batch_size": 8, "reshard": True}
    drawn = sample(reference.policy, questions, task.SAMPLING, [3], **how)
    texts = asked.tokenizer.batch_decode([answer.text_ids for answer in drawn])
    rewards_GK = asked.gold(said, drawn, texts).reshape(6, 4)
    lms = [AutoModelForCausalLM.from_pretrained(path) for path in (run / "model", gold_sweep / "model")]
    shift = []
    for prompt, answer in zip(questions, drawn, strict=True):
        ids = torch.tensor([prompt + answer.ids])
        logps = [lm(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for lm in lms]
        shift.append(sum((pi - ref)[t, token].item() for t, token in enumerate(answer.ids) for pi, ref in [logps]))
    shift_GK = np.reshape(shift, (6, 4))
    one, four = results["runs"][0]["bon"]
    assert (one["n"], four["n"]) == (1, 4) and one["gold"]["n"] == 6
    assert one["gold"]["value"] == pytest.approx(rewards_GK.mean())
    assert four["gold"]["value"] == pytest.approx(rewards_GK[np.arange(6), shift_GK.argmax(1)].mean())
    assert four["proxy"]["value"] == pytest.approx(BETA * shift_GK.max(1).mean(), rel=1e-4)
    dist.shutdown()
    off = overopt_of(run, gold_sweep / "bon", "task.bon=[]")["runs"][0]
    assert off["bon"] is None and off["curve"] == results["runs"][0]["curve"]


def test_every_checkpoint_is_laid_over(gold_sweep, group):
    """In any order, and after the model was used, the weights are those of the checkpoint's file, bit for bit."""
    run = gold_sweep / "sweep" / "0"
    ((found,), _) = catalog.find([str(run)])
    model = model_policy.load_policy(*found.start, device=group, dtype="auto")
    facts = {"model.path": model.digest}
    rows = dataset.load(
        str(gold_sweep / "eval.jsonl"),
        found.data,
        load_tokenizer(gold_sweep / "model"),
        pairs=True,
        cache_dir=gold_sweep,
    )
    for step in (3, 1, 2, 3):
        measure.lay_over(model.policy, found.checkpoints[step], facts)
        with torch.no_grad():
            model.policy(data_batch.padded_batch(rows[0], np.arange(4)))  # leaves the root gathered
        reshard(model.policy)
        stored = load_file(next(found.checkpoints[step].glob("*.safetensors")))
        assert all(
            torch.equal(tensor.full_tensor(), stored[name])
            for name, tensor in tensors_of(model.policy).items()
            if name.startswith("weight/")
        )
    assert {name.split("/")[0] for name in stored} > {"weight", "exp_avg"}


def test_all_of_the_vocabulary_is_sampled(group):
    """A uniform model over 200 tokens says over 50 different first words: sampling is not the library's top 50."""
    lm = make_lm(vocab_size=200)
    with torch.no_grad():
        lm.lm_head.weight.zero_()
    policy = model_policy.prepare(
        lm, mesh(group, PLAIN), PLAIN, compute_dtype=torch.float32, compile=False, trainable=False
    )
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=1)
    tokenizer = task.word_tokenizer([f"w{i}" for i in range(196)], "")
    asked = measure.Questions(tokenizer, [[5]], ["w1"], ["here:1"], None, None, sampling, [3], 128, "")
    cfg = settings("task=overopt", "runs=R", "task.samples=1000", name="eval")
    gold_sweep = measure.measure(policy, policy, asked, cfg, group)
    assert len({answer.ids[0] for answer in gold_sweep.answers}) > 150
    point = measure.point_of(gold_sweep, asked, cfg, beta=None, noise_floor=0.0, ref_logps=None)
    assert values(point)["entropy"] == pytest.approx(math.log(200), rel=1e-5)
    assert values(point)["entropy/top10"] == pytest.approx(math.log(10), rel=1e-5)
    assert values(point)["mass/top10"] == pytest.approx(0.05, rel=1e-5)
    assert "proxy" not in point["metrics"] and "gold" not in point["metrics"]


def test_sources_of_gold(gold_sweep, tmp_path):
    """A verifier's numbers are the gold; with none there is no gold, no best-of-n, and a verdict that says so."""
    (tmp_path / "v.py").write_text("def words(prompt, response):\n    return float(len(response.split()))\n")
    run = overopt_of(
        gold_sweep / "sweep/0",
        tmp_path / "v",
        f"task.gold={tmp_path}/v.py:words",
        "task.limit=5",
        "task.pairs=0",
        "task.max_new_tokens=9",
    )
    samples = lines(tmp_path / "v/samples.jsonl")
    assert all(s["scores"]["gold"] == s["details"]["tokens"] - s["details"]["ended"] for s in samples)
    assert len({s["prompt"] for s in samples}) == 5
    assert "shift/chosen" not in run["runs"][0]["curve"][0]["metrics"]
    (run,) = overopt_of(gold_sweep / "sweep/0", tmp_path / "none", "task.gold=none")["runs"]
    assert "gold" not in run["curve"][0]["metrics"] and run["bon"] is None and run["fits"] == []
    assert run["verdict"] == "Inconclusive: no gold reward was measured."


def test_supervised_run(tiny, tmp_path, capsys):
    """A run of loss=sft has a KL and, where its held-out rows are pairs, shifts; nothing that needs a beta."""
    args = [a for a in tiny_args(tiny) if not a.startswith("optim")]
    trained(tmp_path / "run", "loss=sft", *args)
    (run,) = overopt_of(tmp_path / "run", tmp_path / "eval", "task.max_new_tokens=8")["runs"]
    names = set(run["curve"][-1]["metrics"])
    assert {"kl", "shift/chosen", "rewards/accuracies", "nll/chosen"} <= names
    assert not {"proxy", "rewards/chosen", "rewards/margins", "nll/preference", "brier", "calibration_error"} & names
    assert run["label"] == "SFT" and run["bon"] is None
    said = capsys.readouterr().out
    assert (
        said.count("task.gold=auto: no gold for runs on other data than the embedded task's; give task.gold=DIR") == 1
    )
    assert ("SFT: up to " in said) == any(values(point)["samples/ended"] < 0.9 for point in run["curve"])
    answers_only = [{"prompt": r["prompt"], "chosen": r["chosen"]} for r in make_rows_json(5)]
    path = write_jsonl(tmp_path / "answers.jsonl", answers_only)
    more = (f"data.eval={path}", "task.max_new_tokens=8")
    (run,) = overopt_of(tmp_path / "run", tmp_path / "again", *more)["runs"]
    assert "shift/chosen" not in run["curve"][-1]["metrics"] and "kl" in run["curve"][-1]["metrics"]


def test_a_reference_of_its_own(gold_sweep, tmp_path):
    """With reference.path the KL is to that model, at step 0 too, where the policy is the starting weights, and Gao's laws,
    which begin at the reference, are not fitted."""
    vocab_size = AutoModelForCausalLM.from_pretrained(gold_sweep / "model").config.vocab_size
    make_lm(vocab_size=vocab_size, seed=5).save_pretrained(tmp_path / "other")
    where = [f"model.path={gold_sweep / 'model'}", f"reference.path={tmp_path / 'other'}"]
    where += [f"data.{name}={gold_sweep / name}.jsonl" for name in ("train", "eval")]
    trained(tmp_path / "run", "loss=dpo", *where)
    (run,) = overopt_of(tmp_path / "run", tmp_path / "eval")["runs"]
    first = lines(tmp_path / "run/metrics.jsonl")[0]
    assert first["step"] == 0 and first["split"] == "eval"
    for name in ("shift/chosen", "rewards/margins", "nll/chosen"):
        assert values(run["curve"][0])[name] == pytest.approx(first[name], rel=1e-4), name
    assert (kl := values(run["curve"][0])["kl"]) > 1
    assert [fit["reason"] for fit in run["fits"]] == [f"step 0 is {kl:.3g} nats from the reference"] * 2


def test_best_of_n_of_runs_that_share_the_answers():
    """Means over runs; the error is the mean of the runs' own, as one run's is, and no smaller for there being more."""
    point = {"n": 4, "kl": 0.6, "proxy": {}}
    runs_made = [
        {"bon": [point | {"gold": {"value": gold, "se": se, "n": 9}}]} for gold, se in ((1.0, 0.1), (3.0, 0.3))
    ]
    (one,), (both,) = study.mean_best_of_n(runs_made[:1]), study.mean_best_of_n([*runs_made, {"bon": None}])
    assert one["gold"] == {"value": 1.0, "se": 0.1, "n": 1}
    assert both["gold"] == {"value": 2.0, "se": pytest.approx(0.2), "n": 2}
    runs_made[0]["bon"][0]["gold"]["se"] = None
    assert study.mean_best_of_n(runs_made)[0]["gold"]["se"] is None and study.mean_best_of_n([{"bon": None}]) == []


# ---- what is refused


def copied(gold_sweep, tmp_path):
    return shutil.copytree(gold_sweep / "sweep" / "0", tmp_path / "run", symlinks=True)


def test_folders_without_runs(gold_sweep, tmp_path):
    """Nothing there, no run in it, none with checkpoints, one that failed: one line, and nothing is written."""
    for name in ("empty", "odd"):
        (tmp_path / name).mkdir()
    (tmp_path / "odd/status.json").write_text("[]")
    sweep = gold_sweep / "sweep"
    for found, message in {
        tmp_path / "odd": f"runs={tmp_path}/odd: no run with checkpoints there;",
        tmp_path / "nowhere": f"runs={tmp_path}/nowhere: no such folder; give a run's, or a sweep's",
        tmp_path / "empty": f"runs={tmp_path}/empty: no run with checkpoints there; a run's folder has a config.yaml",
        sweep / "10": f"runs={sweep}/10: no run with checkpoints there: {sweep}/10 (no checkpoints;",
        sweep / "2": f"runs={sweep}/2: no run with checkpoints there: {sweep}/2 (failed: UserError: no room)",
        gold_sweep / "results": f"runs={gold_sweep}/results: no run with checkpoints there;",
    }.items():
        assert refused(found, tmp_path / "eval").startswith(message)
    assert not (tmp_path / "eval").exists()


def test_one_run_twice(gold_sweep, tmp_path):
    """Two folders of one run would be taken for two seeds: refused before a model is loaded."""
    twin = copied(gold_sweep, tmp_path)
    message = refused(f"[{gold_sweep / 'sweep' / '0'},{twin}]", tmp_path / "eval")
    assert f"{twin} both have seed=0" in message and not (tmp_path / "eval").exists()


def damage(folder):
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")


def test_a_damaged_checkpoint(gold_sweep, tmp_path):
    """The checkpoint and its file are named; the points before it are kept."""
    run = copied(gold_sweep, tmp_path)
    damage(run / "checkpoints/step_00000002")
    message = refused(run, tmp_path / "eval")
    assert message.startswith(f"{run}/checkpoints/step_00000002: is damaged (shard-")
    assert message.endswith("not the bytes that were written); put it back or remove it")
    assert [point["value"]["step"] for point in lines(tmp_path / "eval/points.jsonl")] == [0, 1]


def test_checkpoints_of_another_model(gold_sweep, tmp_path):
    """Other starting weights than the run recorded, and weights of another shape, are named."""
    run = copied(gold_sweep, tmp_path)
    model = shutil.copytree(gold_sweep / "model", tmp_path / "model")
    config = (run / "config.yaml").read_text().replace(f"path: {gold_sweep / 'model'}", f"path: {model}")
    (run / "config.yaml").write_text(config)
    vocab_size = AutoModelForCausalLM.from_pretrained(model).config.vocab_size
    make_lm(vocab_size=vocab_size, seed=9).save_pretrained(model)
    first = run / "checkpoints/step_00000001"
    assert refused(run, tmp_path / "a").startswith(f"{first}: its run started with model.path of ")
    ((found,), _) = catalog.find([str(run)])
    larger = make_lm(vocab_size=vocab_size, intermediate_size=64)
    deeper = make_lm(vocab_size=vocab_size, num_hidden_layers=1)
    for lm, message in (
        (larger, "holds .* the model has .*; it is the checkpoint"),
        (deeper, "which the model has not"),
    ):
        lm.save_pretrained(model)
        device = dist.init()
        loaded = model_policy.load_policy(*found.start, device=device, dtype="auto")
        with pytest.raises(UserError, match=f"^{first}: .*{message}"):
            measure.lay_over(loaded.policy, first, {})
        dist.shutdown()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["task.gold=MODEL"], "task.gold=MODEL: holds LlamaForCausalLM, not a reward model"),
        (["task.max_new_tokens=500"], "task.max_new_tokens=500: the longest prompt is"),
        (["model.dtype=float64"], "model.dtype=float64: the run's weights are float32"),
        (["data.eval=PROMPTS"], "PROMPTS:1: field chosen"),
        (["data.eval=OTHER", "task.pairs=0"], "data.eval: the prompt 'hi there' is none of the embedded task's"),
        (["data.eval=EMPTY", "task.pairs=0"], "data.eval: the prompt ' ' is none of the embedded task's"),
        (
            ["task.bon=[1,8]", "task.bon_samples=4"],
            "task.bon_samples=4 with task.bon=[1, 8]: the best of n needs n answers",
        ),
        (["task.bon=[0]"], "task.bon=[0]: expected numbers of answers, each at least 1"),
        (["model.path=X"], "model.path=X with task=overopt: it reads none; leave it out"),
        (["reference.path=X"], "reference.path=X with task=overopt: it reads none; leave it out"),
        (["task.samples=0"], "task.samples=0: expected at least 1"),
        (["runs=null"], "runs: missing; task=overopt evaluates it"),
        (["task.kind=overfit"], "task.kind=overfit: expected pairs, generate, gold, overopt, winrate"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit(gold_sweep, tmp_path, more, message):
    """Each in one line with the key, its value and what was expected."""
    prompts = write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in lines(gold_sweep / "eval.jsonl")]
    )
    names = {"MODEL": str(gold_sweep / "model"), "PROMPTS": str(prompts)}
    for name, text in (("OTHER", "hi there"), ("EMPTY", " ")):
        row = {"prompt": [{"role": "user", "content": text}]}
        names[name] = str(write_jsonl(tmp_path / f"{name}.jsonl", [row]))
    for name, path in names.items():
        more, message = [arg.replace(name, path) for arg in more], message.replace(name, path)
    assert refused(gold_sweep / "sweep" / "0", tmp_path / "eval", *more).startswith(message)


# ---- going on


def test_a_killed_evaluation_resumes(gold_sweep, results, tmp_path, monkeypatch, capsys):
    """Killed at its sixth measurement with a line half written, the same command measures the rest and leaves the same
    results.json, points and samples as an undisturbed one; once more, nothing is measured."""
    measured = []
    point_of = measure.point_of

    def or_die(*args, **more):
        measured.append(len(measured))
        if len(measured) == 6:
            raise KeyboardInterrupt
        return point_of(*args, **more)

    monkeypatch.setattr(measure, "point_of", or_die)
    folder = tmp_path / "eval"
    with pytest.raises(KeyboardInterrupt):
        overopt_of(gold_sweep / "sweep", folder)
    kept = lines(folder / "points.jsonl")
    assert len(kept) == 6  # five points, and the best-of-n of the first run
    with (folder / "points.jsonl").open("a") as file:
        file.write('{"run": "half a li')
    monkeypatch.setattr(measure, "point_of", point_of)
    capsys.readouterr()
    again = overopt_of(gold_sweep / "sweep", folder)
    assert again | {"figures": []} == results | {"figures": []}
    assert (
        f"2 runs, at each checkpoint 6 prompts x {SAMPLES} answers and 16 pairs; 6 of {2 * (STEPS + 2)} points are done\n"
    ) in capsys.readouterr().out
    for name in ("points.jsonl", "samples.jsonl"):
        whole = [line for line in (folder / name).read_text().splitlines() if line.endswith("}")]
        assert list(map(json.loads, whole)) == lines(gold_sweep / "results" / name), name

    monkeypatch.setattr(measure, "load_policy", lambda *a, **k: pytest.fail("a model was loaded though all was known"))
    assert overopt_of(gold_sweep / "sweep", folder) == again


def test_settings_within_one_evaluation(gold_sweep, results, tmp_path):
    """Another setting, a folder of something else, or a file in its place is refused and not touched."""
    folder = shutil.copytree(gold_sweep / "results", tmp_path / "eval")
    before = (folder / "points.jsonl").read_bytes()
    message = refused(gold_sweep / "sweep", folder, "seed=5")
    assert message.startswith(
        f"run_dir={folder}: holds an evaluation with other settings (seed=0, here 5); use another"
    )
    assert (folder / "points.jsonl").read_bytes() == before
    assert "already contains a different kind of run" in refused(gold_sweep / "sweep/0", gold_sweep / "sweep/1")
    assert "cannot be written (" in refused(gold_sweep / "sweep/0", folder / "results.json")


def test_what_a_store_keeps(group, tmp_path):
    """A value counts for its key alone; of two with one key the later one stands. A torn line costs no other."""
    store = Store(tmp_path / "points.jsonl")
    assert store.once("a", lambda: {"metrics": 1}) == {"metrics": 1} and store.get("b") is None
    assert store.once("a", lambda: pytest.fail("computed twice")) == {"metrics": 1}
    store.add("a", {"metrics": 2}, run="r", step=1)
    with store.file.open("ab") as file:
        file.write(b'{"torn \xff')
    again = Store(store.file)
    assert again.get("a") == {"metrics": 2}
    again.add("c", {"metrics": 3})
    assert [Store(store.file).get(key) for key in "ac"] == [{"metrics": 2}, {"metrics": 3}]
    assert json.loads(store.file.read_bytes().splitlines()[1]) == {
        "key": "a",
        "run": "r",
        "step": 1,
        "value": {"metrics": 2},
    }


def test_a_new_checkpoint_is_measured(gold_sweep, tmp_path, capsys):
    """A run that goes on after it was evaluated has its new checkpoint added, the others stay; that it was not finished
    is said."""
    run = copied(gold_sweep, tmp_path)
    run_folder.write_status(run, "interrupted", "SIGTERM", 2)
    held_back = shutil.move(run / "checkpoints/step_00000003", tmp_path / "later")
    assert len(overopt_of(run, tmp_path / "eval")["runs"][0]["curve"]) == STEPS
    assert f"not finished, and evaluated as far as it is: {run} (interrupted)\n" in capsys.readouterr().out
    run_folder.write_status(run, "finished", "", 3)
    shutil.move(held_back, run / "checkpoints/step_00000003")
    (found,) = overopt_of(run, tmp_path / "eval")["runs"]
    assert "not finished" not in capsys.readouterr().out
    assert [point["step"] for point in found["curve"]] == [0, 1, 2, 3]
    steps = [point.get("step") for point in lines(tmp_path / "eval/points.jsonl")]
    assert sorted(step for step in steps if step is not None) == [0, 1, 2, 3]


# ---- selecting


def test_select(gold_sweep, results, tmp_path, capsys):
    """Per run the rule's choice with its folder, and that of the limits alone; no model is loaded."""
    more = ("task=select", f"task.results={gold_sweep / 'results'}", "task.min_ended=0", "task.max_kl=1000")
    whole = evaluate(tmp_path / "select", *more)
    made_by = whole["details"]
    for run in results["runs"]:
        (chosen,) = [other["chosen"] for other in made_by["runs"] if other["run"] == run["run"]]
        (point,) = [point for point in run["curve"] if point["step"] == chosen["step"]]
        assert whole["models"][run["run"]]["gold"] == point["metrics"]["gold"] | {"n_error": 0}
    assert [run["run"] for run in made_by["runs"]] == [run["run"] for run in results["runs"]]
    for run in made_by["runs"]:
        chosen = run["chosen"]
        assert chosen["checkpoint"] == f"{run['run']}/checkpoints/step_{chosen['step']:08d}" and "report" not in chosen
        assert run["label_free"]["step"] == STEPS and "none fails" in run["label_free"]["reason"]
    said, chosen = capsys.readouterr().out, made_by["runs"][0]["chosen"]
    assert f"max:gold: step {chosen['step']}, " in said and f"\n    {chosen['checkpoint']}\n" in said
    assert "  limits alone: step " in said
    file = ("task=select", f"task.results={gold_sweep / 'results/results.json'}", "task.min_ended=null")
    unlimited = evaluate(tmp_path / "file", *file)["details"]
    assert [run["chosen"]["step"] for run in unlimited["runs"]] == [run["chosen"]["step"] for run in made_by["runs"]]
    assert "limits alone" not in capsys.readouterr().out
    least = evaluate(tmp_path / "kl", *more[:3], "task.score=min:kl", "task.max_kl=null")["details"]
    assert all(run["chosen"]["step"] == 1 for run in least["runs"])
    none = evaluate(tmp_path / "none", *more[:3], "task.max_kl=1e-9")["details"]
    assert none["runs"][0]["chosen"]["step"] is None
    assert none["runs"][0]["chosen"]["reason"].startswith("no checkpoint is feasible: step 1 has kl")
    said = capsys.readouterr().out
    assert "max:gold: no checkpoint is feasible: step 1 has kl" in said and "step None" not in said


def planted(golds, prompts=8):
    """A curve whose gold is the same for every prompt but for a shift: 1 more on half of them."""
    curve = []
    for step, value in enumerate(golds):
        mean = [value + (g % 2) for g in range(prompts)]
        gold_cell = stats.clustered_mean(np.repeat(mean, 2), np.repeat(np.arange(prompts), 2))
        ended = {"value": 1.0, "se": 0.0, "n": 2 * prompts}
        clusters = {"gold": {"mean": mean, "size": [2] * prompts}}
        curve.append({"step": step, "metrics": {"gold": gold_cell, "samples/ended": ended}, "clusters": clusters})
    return curve


def test_split_halves():
    """The halves part the prompts whatever their order; the choice is gold_sweep on one and gold reported of the other."""
    names = [f"sha256 {i:016x}" for i in (5, 3, 8, 1, 9, 2, 7, 4)]
    first, second = selection.halves(names)
    assert sorted(first + second) == list(range(8)) and len(first) == 4
    turned = names[::-1]
    again, _ = selection.halves(turned)
    assert {turned[i] for i in again} == {names[i] for i in first}

    curve = planted([1.0, 3.0, 2.0])
    part = selection.part_of(curve, [1, 3, 5, 7])
    assert part[1]["metrics"]["gold"] == {"value": 4.0, "se": 0.0, "interval": None, "n": 4}
    limits = selection.Limits(max_kl=None, entropy_falls=None, max_displacement=None, min_ended=0.99)
    run = {"run": "R", "label": "DPO", "prompts": [f"{g:02d}" for g in range(8)], "curve": curve}
    (gold_sweep,) = selection.choose([run], limits, score="max:gold", split=True)
    # In the order of their names the first half has the even prompts, the second the odd ones.
    assert gold_sweep["chosen"]["step"] == 1 and gold_sweep["chosen"]["checkpoints"][1]["score"] == 3.0
    assert gold_sweep["chosen"]["report"]["gold"]["value"] == 4.0
    assert gold_sweep["chosen"]["report"]["over_reference"]["value"] == pytest.approx(2.0)
    with pytest.raises(UserError, match="^task.split=true: 6 prompts; two halves need 8: set task.split=false$"):
        selection.halves(names[:6])


def test_what_can_not_be_selected_from(gold_sweep, results, tmp_path):
    """No results, results of another task, a score that was not measured: one line each."""
    head = {"task": "pairs"} | dict.fromkeys(("models", "details", "config", "versions"), {}) | {"notes": []}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/results.json").write_text(json.dumps(head))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/results.json").write_text('{"task": ')
    for more, message in {
        (f"task.results={tmp_path}/none",): f"{tmp_path}/none: no evaluation can be read there",
        (f"task.results={tmp_path}/other",): f"task.results={tmp_path}/other: is of task=pairs",
        (f"task.results={tmp_path}/torn",): f"{tmp_path}/torn: no evaluation can be read there",
        (): "task.results=null: give the folder of an evaluation by task=overopt",
        (f"task.results={gold_sweep}/results", "task.score=max:win_rate"): "task.score=max:win_rate: ",
        (
            f"task.results={gold_sweep}/results",
            "task.score=gold",
        ): "task.score='gold': expected min:METRIC or max:METRIC",
        (
            f"task.results={gold_sweep}/results",
            "task.score=min:kl",
            "task.split=true",
        ): "task.split=true with task.score=min:kl",
        (
            f"task.results={gold_sweep}/results",
            "task.min_ended=2",
        ): "task.min_ended=2: expected null or a share, 0 to 1",
        (f"task.results={gold_sweep}/results", "task.max_kl=-1"): "task.max_kl=-1: expected ",
        (f"task.results={gold_sweep}/results", "task.entropy_falls=0"): "task.entropy_falls=0: expected ",
        (f"task.results={gold_sweep}/results", "runs=x"): "runs=x with task=select: it reads none; leave it out",
    }.items():
        with pytest.raises(UserError) as error:
            evaluate(tmp_path / "select", "task=select", *more)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not (tmp_path / "select").exists()


# ---- two processes


@pytest.mark.slow
def test_two_ranks(gold_sweep, results, tmp_path):
    """On two ranks the curves are those of one process, up to rounding."""
    args = ["task=overopt", f"runs={gold_sweep / 'sweep'}", *ASKED, f"run_dir={tmp_path / 'eval'}"]
    done = subprocess.run(
        command("eval.py", *args, ranks=2), env=script_env(), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    there = json.loads((tmp_path / "eval/results.json").read_text())["details"]
    for ours, theirs in zip(results["runs"], there["runs"], strict=True):
        assert ours["run"] == theirs["run"]
        for a, b in zip(ours["curve"], theirs["curve"], strict=True):
            for name, cell in a["metrics"].items():
                if cell["value"] is not None:
                    assert b["metrics"][name]["value"] == pytest.approx(cell["value"], rel=1e-4, abs=1e-4), name
        for a, b in zip(ours["bon"], theirs["bon"], strict=True):
            assert b["gold"]["value"] == pytest.approx(a["gold"]["value"], rel=1e-4)


def test_digest_of_a_checkpoint_is_its_manifests(gold_sweep):
    """What a point was gold_sweep of changes with any byte of the checkpoint: its manifest has their hashes."""
    ((found,), _) = catalog.find([str(gold_sweep / "sweep" / "0")])
    manifests = {step: (folder / "manifest.json").read_bytes() for step, folder in found.checkpoints.items()}
    assert len({files.digest(text) for text in manifests.values()}) == STEPS
