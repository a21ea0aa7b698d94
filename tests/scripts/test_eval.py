"""eval.py against an independent computation: plain Hugging Face logits, one response at a time, and arithmetic by hand."""

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from rpo import dist
from rpo.errors import UserError
from rpo.evals import preference
from rpo.files import short_hash
from tests.helpers.evaluations import evaluate, lines
from tests.helpers.models import make_lm
from tests.helpers.rows import make_rows_json, make_tokenizer, write_jsonl
from tests.helpers.runs import settings, tiny_args

BETA = 0.3


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """moved/ (a model away from tiny's) and pairs.jsonl, in which two prompts come twice."""
    folder = tmp_path_factory.mktemp("eval")
    make_lm(seed=7).save_pretrained(folder / "moved")
    make_tokenizer().save_pretrained(folder / "moved")
    rows = make_rows_json(14, seed=4)
    rows[9]["prompt"], rows[12]["prompt"] = rows[1]["prompt"], rows[2]["prompt"]
    write_jsonl(folder / "pairs.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def result(tiny, folder):
    """task=pairs of moved/ and of the reference itself."""
    models = f"model.path=[{folder / 'moved'},{tiny / 'model'}]"
    more = ("task=pairs", models, f"reference.path={tiny / 'model'}", f"data.eval={folder / 'pairs.jsonl'}")
    return evaluate(folder / "run", *more, f"task.beta={BETA}", "tokens_per_microbatch=150")


@torch.no_grad()
def naive(model_path, rows):
    """(summed log-prob, scored tokens) of each row's chosen and rejected, by the model's own logits."""
    lm = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    table = []
    for row in rows:
        prompt = f"<bos> [user] {row['prompt'][0]['content']} [assistant]"
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        for side in ("chosen", "rejected"):
            text = f"{prompt} [assistant] {row[side]}".replace("[assistant] [assistant]", "[assistant]")
            ids = torch.tensor([tokenizer(f"{text} <end>", add_special_tokens=False).input_ids])
            logps = lm(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[start - 1 :, 0]
            table.append((logps.sum().item(), len(logps)))
    return np.array(table).reshape(len(rows), 2, 2).transpose(1, 2, 0)


def clustered(values, prompts):
    """The clustered standard error, written as a loop."""
    values = np.asarray(values, dtype=float)
    groups = {
        prompt: [v - values.mean() for v, p in zip(values, prompts, strict=True) if p == prompt] for prompt in prompts
    }
    total = sum(sum(group) ** 2 for group in groups.values())
    return math.sqrt(len(groups) / (len(groups) - 1) * total) / len(values)


def test_pairs_against_plain_logits(result, folder, tiny):
    """Every metric of task=pairs, with its standard error clustered by prompt, equals the naive computation."""
    rows = lines(folder / "pairs.jsonl")
    prompts = [row["prompt"][0]["content"] for row in rows]
    assert len(set(prompts)) == 12
    (chosen, n_chosen), (rejected, n_rejected) = naive(folder / "moved", rows)
    (ref_chosen, _), (ref_rejected, _) = naive(tiny / "model", rows)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    expected = {
        "rewards/accuracies": margin > 0,
        "rewards/chosen": BETA * (chosen - ref_chosen),
        "rewards/rejected": BETA * (rejected - ref_rejected),
        "rewards/margins": BETA * margin,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "shift/chosen": chosen - ref_chosen,
        "shift/rejected": rejected - ref_rejected,
        "displacement_rate": chosen < ref_chosen,
        "nll/preference": np.log1p(np.exp(-BETA * margin)),
        "brier": (1 - 1 / (1 + np.exp(-BETA * margin))) ** 2,
        "reference/accuracies": ref_chosen > ref_rejected,
    }
    found = result["models"][str(folder / "moved")]
    for name, values in expected.items():
        values = np.asarray(values, dtype=float)
        assert found[name]["value"] == pytest.approx(values.mean(), rel=1e-4, abs=1e-6), name
        assert found[name]["se"] == pytest.approx(clustered(values, prompts), rel=1e-4, abs=1e-6), name
        assert found[name]["n"] == 14
    per_token = {"nll/chosen": -chosen, "shift_per_token/chosen": chosen - ref_chosen}  # means over all chosen tokens
    for name, sums in per_token.items():
        ratio = sums.sum() / n_chosen.sum()
        residuals = (sums - ratio * n_chosen) / n_chosen.mean()  # the delta method
        assert found[name]["value"] == pytest.approx(ratio, rel=1e-4), name
        assert found[name]["se"] == pytest.approx(clustered(residuals, prompts), rel=1e-4), name
    parts = {"longer": n_chosen > n_rejected, "shorter": n_chosen < n_rejected}
    for name, part in {f"chosen_{k}": v for k, v in parts.items()}.items():
        cell = found[f"rewards/accuracies/{name}"]
        assert (cell["value"], cell["n"]) == (pytest.approx((margin > 0)[part].mean()), part.sum()), name
    same = found["rewards/accuracies/same_length"]
    assert same["n"] == (n_chosen == n_rejected).sum()
    assert set(found) == {
        *expected,
        *per_token,
        *(f"rewards/accuracies/{k}" for k in ("chosen_longer", "chosen_shorter")),
    } | {
        "rewards/accuracies/same_length",
        "calibration_error",
    }


def test_the_reference_knows_nothing_of_itself(result, tiny):
    """The policy that is its own reference ties every pair: accuracy 0.5, no shift, nobody displaced, NLL ln 2."""
    found = result["models"][str(tiny / "model")]
    assert (found["rewards/accuracies"]["value"], found["rewards/accuracies"]["se"]) == (0.5, 0)
    for name in ("shift/chosen", "shift/rejected", "rewards/margins", "displacement_rate", "calibration_error"):
        assert found[name]["value"] == pytest.approx(0, abs=1e-6) or name == "calibration_error"
    assert found["nll/preference"]["value"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["brier"]["value"] == pytest.approx(0.25, abs=1e-6)


def test_what_an_evaluation_leaves(result, folder, tiny, capsys):
    """results.json names task, reference, data, beta and models; samples.jsonl has each row's log-probs and place."""
    paths = [str(folder / "moved"), str(tiny / "model")]
    assert result["task"] == "pairs" and result["notes"] == []
    details = result["details"]
    assert {key: details[key] for key in ("reference", "data", "beta")} == {
        "reference": str(tiny / "model"),
        "data": {
            "files": str(folder / "pairs.jsonl"),
            "digest": short_hash([hashlib.sha256((folder / "pairs.jsonl").read_bytes()).hexdigest()]),
        },
        "beta": dict.fromkeys(paths, BETA),
    }
    assert list(result["models"]) == paths
    assert all(
        set(cell) == {"value", "se", "interval", "n", "n_error"}
        for found in result["models"].values()
        for cell in found.values()
    )
    run = folder / "run"
    files = {
        "config.yaml",
        "status.json",
        "environment.json",
        "data_report.json",
        "results.json",
        "samples.jsonl",
        "points.jsonl",
        "lock",
    }
    assert {path.name for path in run.iterdir()} == files
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    samples = lines(run / "samples.jsonl")
    assert [s["model"] for s in samples] == [paths[0]] * 14 + [paths[1]] * 14
    assert samples[13]["id"] == f"{folder / 'pairs.jsonl'}:14"
    moved = [s["details"]["chosen"] - s["details"]["ref_chosen"] for s in samples[:14]]
    assert np.mean(moved) == pytest.approx(result["models"][paths[0]]["shift/chosen"]["value"])


def test_calibration_by_hand():
    """The calibration error does not depend on the random order where bins are symmetric, and is |p - share right|."""

    def margin(p):
        return math.log(p / (1 - p))

    # 10 pairs said to be right with .75, of which the sign says: 7 are, 3 are not (margins of -.75's logit).
    overall = np.array([margin(0.75)] * 7 + [-margin(0.75)] * 3)
    first = np.random.default_rng(5).random(10) < 0.5
    shown = np.where(first, overall, -overall)  # as probability .75 or .25 that the first is chosen
    high, low = shown > 0, shown < 0
    expected = abs((0.75 - first[high]).sum()) + abs((0.25 - first[low]).sum())
    assert preference.calibration_error(overall, seed=5) == pytest.approx(expected / 10)
    # Sure and right is calibrated, sure and wrong is off by one, an even bet is as far off as the coin.
    assert preference.calibration_error(np.full(50, 30.0), seed=0) == pytest.approx(0, abs=1e-9)
    assert preference.calibration_error(np.full(50, -30.0), seed=0) == pytest.approx(1, abs=1e-9)
    labels = np.random.default_rng(2).random(400) < 0.5
    assert preference.calibration_error(np.zeros(400), seed=2) == pytest.approx(abs(labels.mean() - 0.5))
    # Honest probabilities are nearly calibrated.
    generator = np.random.default_rng(3)
    p = generator.uniform(0.5, 0.99, 20_000)
    honest = np.log(p / (1 - p)) * np.where(generator.random(20_000) < p, 1, -1)
    assert preference.calibration_error(honest, seed=0) < 0.015


def test_a_run_says_what_it_was_compared_with(tiny, tmp_path):
    """Of a run's model/, reference, data and beta come from its config.yaml; elsewhere they have to be given."""
    args = tiny_args(tiny, "loss=dpo", "loss.beta=0.07", "batch_size=8", "max_steps=2", f"run_dir={tmp_path / 'run'}")
    train.train(settings(*args))
    dist.shutdown()
    result = evaluate(tmp_path / "eval", "task=pairs", f"model.path={tmp_path / 'run/model'}")
    assert result["details"]["reference"] == str(tiny / "model") and result["details"]["data"]["files"] == str(
        tiny / "eval.jsonl.gz"
    )
    (found,) = result["models"].values()
    last = lines(tmp_path / "run/metrics.jsonl")[-1]
    assert last["split"] == "eval"
    for name in ("rewards/margins", "shift/chosen", "nll/chosen", "logps/rejected", "rewards/accuracies"):
        assert found[name]["value"] == pytest.approx(last[name], rel=1e-5, abs=1e-5)
    assert result["details"]["beta"] == {str(tmp_path / "run/model"): 0.07}

    other = [f"model.path={tiny / 'model'}"]
    for more, key in (([], "reference.path"), ([f"reference.path={tiny / 'model'}"], "data.eval")):
        with pytest.raises(
            UserError, match=f"^{key}=null: a model is not the model/ of a run, so there is none to take; give {key}="
        ):
            evaluate(tmp_path / "no", "task=pairs", *other, *more)
        other += more
    with pytest.raises(UserError, match="^task.beta=auto: .* has no run with a reference whose beta it could take"):
        evaluate(tmp_path / "no", "task=pairs", *other, f"data.eval={tiny / 'eval.jsonl.gz'}")
    with pytest.raises(UserError, match="^task=gold: no model.path is the model/ of a run with data=gold"):
        evaluate(tmp_path / "no", "task=gold", *other, f"data.eval={tiny / 'eval.jsonl.gz'}")
    with pytest.raises(UserError, match=f"^model.path={tmp_path}/none: no Hugging Face model"):
        more = [f"reference.path={tiny / 'model'}", "task.beta=1", f"data.eval={tiny / 'eval.jsonl.gz'}"]
        evaluate(tmp_path / "no", "task=pairs", f"model.path={tmp_path}/none", *more)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["cached", "live"])
def test_a_reference_that_was_replaced_is_refused(tiny, tmp_path, kind):
    """Other weights at the path that a run took for its reference: one line, unless that path is asked for by name, the
    run recorded nothing, or its weights were of another width, which makes digests differ.
    """
    start, run, asked = tmp_path / "start", tmp_path / "run", "task=pairs"
    shutil.copytree(tiny / "model", start)
    args = [f"reference={kind}", f"model.path={start}", "batch_size=8", "max_steps=1", f"run_dir={run}"]
    train.train(settings(*tiny_args(tiny, "loss=dpo", "checkpoint.every=0", *args)))
    dist.shutdown()
    model, only = f"model.path={run / 'model'}", "task.limit=2"
    evaluate(tmp_path / "before", asked, model, only)
    evaluate(tmp_path / "wider", asked, model, only, "model.dtype=float64")
    make_lm(seed=7).save_pretrained(start)
    message = f"^reference.path=null: the run of {run}/model was compared with {start} of digest .{{24}}, now it is "
    with pytest.raises(UserError, match=f"{message}.{{24}}; restore it, or give reference.path={start} to "):
        evaluate(tmp_path / "after", asked, model, only)
    evaluate(tmp_path / "asked", asked, model, only, f"reference.path={start}")
    for n, text in enumerate(("", "{}", '{"reference": {}}')):
        (run / "environment.json").write_text(text)
        evaluate(tmp_path / f"silent_{n}", asked, model, only)


def test_the_reference_of_a_run_is_of_the_runs_revision(tiny, tmp_path, monkeypatch):
    """A run that began at model.revision=v2 is compared with v2 and not with main, at any width: its own log's shift."""
    hub = tmp_path / "models--org--start"
    for name, seed in (("main", 1), ("v2", 2)):
        shutil.copytree(tiny / "model", hub / "snapshots" / (commit := str(seed) * 40))
        make_lm(seed=seed).save_pretrained(hub / "snapshots" / commit)
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it asks for a newer one, and waits
    args = ["model.path=org/start", "model.revision=v2", "batch_size=8", "max_steps=2", f"run_dir={tmp_path / 'run'}"]
    train.train(settings(*tiny_args(tiny, "loss=dpo", "checkpoint.every=0", *args)))
    dist.shutdown()
    logged = lines(tmp_path / "run/metrics.jsonl")[-1]["shift/chosen"]
    for dtype in ("auto", "float64"):
        found = evaluate(tmp_path / dtype, "task=pairs", f"model.path={tmp_path}/run/model", f"model.dtype={dtype}")
        (cells,) = found["models"].values()
        assert cells["shift/chosen"]["value"] == pytest.approx(logged, abs=1e-3)


def test_a_note_says_where_the_runs_data_had_a_revision(tiny, tmp_path, capsys):
    """data.eval taken from a run is read at the evaluation's data.revision, which is said where the run had another."""
    train.train(settings(*tiny_args(tiny, "loss=dpo", "checkpoint.every=0", "max_steps=1", f"run_dir={tmp_path}/run")))
    dist.shutdown()
    file = tmp_path / "run/config.yaml"
    head, data, rest = file.read_text().partition("\ndata:\n")
    file.write_text(head + data + rest.replace("revision: null", "revision: v2", 1))
    evaluate(tmp_path / "ev", "task=pairs", f"model.path={tmp_path}/run/model")
    assert f"note: data.revision=None, but the run of {tmp_path}/run/model had v2" in capsys.readouterr().out


def test_generate(tiny, tmp_path):
    """Answers to rows that hold only a prompt: greedy ones are the model's argmax and repeat; sampled ones vary by seed."""
    rows = [{"prompt": row["prompt"]} for row in make_rows_json(5, seed=8)]
    path = write_jsonl(tmp_path / "prompts.jsonl", [*rows, rows[0]])  # the last is a repeat, and not asked
    args = ["task=generate", f"model.path={tiny / 'model'}", f"data.eval={path}", "task.max_new_tokens=12"]
    greedy = [*args, "task.temperature=0", "task.batch_size=2"]
    result = evaluate(tmp_path / "greedy", *greedy)
    answers = lines(tmp_path / "greedy/samples.jsonl")
    evaluate(tmp_path / "again", *greedy[:-1], "seed=3")
    assert lines(tmp_path / "again/samples.jsonl") == answers

    assert [a["id"] for a in answers] == [f"{path}:{i}#0" for i in range(1, 6)]
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(tiny / "model"), make_tokenizer()
    for answer, row in zip(answers, rows, strict=True):
        assert answer["prompt"] == row["prompt"] and answer["error"] is answer["against"] is None
        text = f"<bos> [user] {row['prompt'][0]['content']} [assistant]"
        assert answer["details"]["rendered"] == text
        ids = tokenizer(text, add_special_tokens=False).input_ids
        new = []
        while len(new) < 12 and new[-1:] != [tokenizer.eos_token_id]:
            new.append(lm(torch.tensor([ids + new])).logits[0, -1].argmax().item())
        assert answer["details"]["ended"] == (new[-1] == tokenizer.eos_token_id)
        assert answer["scores"]["samples/length"] == len(new)
        assert answer["response"] == tokenizer.decode(new[:-1] if answer["details"]["ended"] else new)
    (found,) = result["models"].values()
    assert found["samples/length"]["value"] == np.mean([a["scores"]["samples/length"] for a in answers])
    assert found["samples/truncated"]["value"] == np.mean([not a["details"]["ended"] for a in answers])
    assert found["samples/ended"]["value"] + found["samples/truncated"]["value"] == 1
    assert result["task"] == "generate" and result["details"]["data"]["files"] == str(path)

    sampled = [evaluate(tmp_path / f"s{seed}", *args, "task.samples=3", f"seed={seed}") for seed in (0, 1)]
    first, second = (lines(tmp_path / f"s{seed}/samples.jsonl") for seed in (0, 1))
    assert len(first) == 15 and [a["cluster"] for a in first[:3]] == [f"{path}:1"] * 3
    assert [a["response"] for a in first] != [a["response"] for a in second]
    assert next(iter(sampled[0]["models"].values()))["samples/length"]["n"] == 15
