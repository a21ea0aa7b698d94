"""Folders as runs, sweeps and evaluations leave them, for what reads such folders."""

import copy
import json

from rpo.evals.results import Item
from rpo.overopt import study
from rpo.runs import folder as run_folder
from rpo.stats import clustered_mean
from tests.helpers.rows import write_jsonl

STEPS = (0, 10, 20, 30)


def point(step, *, gold=None, shift=0.0, accuracy=0.6, kl=0.0):
    event = {"split": "eval", "step": step, "pairs": 8 * step, "time": 1.0, "shift/chosen": shift, "kl": kl}
    event |= {"rewards/accuracies": accuracy, "loss/preference": 0.66, "displacement_rate": 0.5, "samples/ended": 1.0}
    return event | ({} if gold is None else {"gold": gold})


def leave_run(folder, base, *, eta=0.0, seed=0, golds=None, state="finished", reason="", shift=-1.0):
    """A run's folder as a run leaves it, without its weights."""
    folder.mkdir(parents=True)
    own = copy.deepcopy(base)
    own["loss"]["eta"], own["seed"], own["run_dir"] = eta, seed, str(folder)
    (folder / "config.yaml").write_text(json.dumps(own))  # JSON is YAML
    golds = golds or [None] * len(STEPS)
    events = [point(s, gold=g, shift=shift * s, kl=0.1 * s) for s, g in zip(STEPS, golds, strict=True)]
    write_jsonl(folder / "metrics.jsonl", [events[0], {"split": "train", "step": 5, "loss": 0.6}, *events[1:]])
    run_folder.write_status(folder, state, reason, STEPS[-1])
    run_folder.write_json(folder / "data_report.json", {"eval": {"kept": 500}})
    run_folder.write_json(
        folder / "environment.json", {"command": ["train.py", f"seed={seed}"], "git_revision": "abc123"}
    )
    return folder


def leave_sweep(folder, base):
    """Two etas of three seeds, of which the first falls and the second holds."""
    for i, (eta, seed) in enumerate((eta, seed) for eta in (0.0, 0.25) for seed in range(3)):
        golds = [1.0, 3.0 + 0.1 * seed, 1.5, 0.2 * seed] if not eta else [1.0, 2.0, 2.9, 3.0 + 0.1 * seed]
        leave_run(folder / str(i), base, eta=eta, seed=seed, golds=golds)
    return folder


def leave(folder, task, models, samples=(), *, notes=(), details=None, config=None):
    """The folder of an evaluation in the form that all tasks write."""
    folder.mkdir(parents=True)
    content = {"task": task, "models": models, "notes": list(notes), "details": details or {}, "config": config or {}}
    run_folder.write_json(folder / "results.json", content | {"versions": {}})
    write_jsonl(folder / "samples.jsonl", list(samples))
    (folder / "config.yaml").write_text(json.dumps({"task": {"kind": task}}))
    run_folder.write_status(folder, "finished")
    return folder


def sample(model, id_, scores, **more):
    blank = {"prompt": None, "response": None, "error": None, "against": None, "details": {}}
    return {"model": model, "id": id_, "cluster": id_, "scores": scores} | blank | more


def items(model, scores, **more):
    """Items as read back, {id: scores}."""
    return [Item(**sample(model, id_, own, **more)) for id_, own in scores.items()]


def measure(runs):
    """(runs, groups) as task=overopt has them, numbers made up, form and verdicts its own."""
    measured = []
    for run in runs:
        own = json.loads((run / "config.yaml").read_text())
        curve = []
        for step, gold in zip((0, 10, 30), [1.0, 3.0, 2.9 if own["loss"]["eta"] else 0.5], strict=True):
            metrics = {"gold": clustered_mean([gold - 0.1, gold, gold + 0.1], [0, 1, 2])}
            metrics |= {"kl": clustered_mean([0.4 * step] * 3, [0, 1, 2])}
            metrics |= {"samples/ended": clustered_mean([1.0] * 3, [0, 1, 2])}
            metrics |= {"shift/chosen": clustered_mean([-step, -step - 1], [0, 1])}
            clusters = {"gold": {"mean": [gold - 0.1, gold, gold + 0.1], "size": [1, 1, 1]}}
            curve.append({"step": step, "metrics": metrics, "clusters": clusters})
        more = {"prompts": [], "max_new_tokens": 48, "curve": curve, "bon": None}
        measured.append({"run": str(run), "settings": own} | more)
    return study.summarise(measured, 0)[:2]


def leave_study(folder, runs):
    """An evaluation of `runs` by task=overopt."""
    of_runs, of_groups = measure(runs)
    models = {run["run"]: {name: {"value": value} for name, value in run["summary"].items()} for run in of_runs}
    samples = [
        sample(str(run), f"f:1@{step}", {"gold": gold}, prompt="say it", response=f"answer of {step}")
        | {"cluster": "f:1", "details": {"step": step}}
        for run in runs
        for step, gold in ((0, 1.0), (10, 9.0), (30, 0.5))
    ]
    details = {"groups": of_groups, "runs": of_runs, "left_out": ["x/9 (failed: no room)"]}
    return leave(folder, "overopt", models, samples, details=details)


def leave_evaluation(folder, scores, *, task="pairs", text=None, errors=0, ids="q", notes=(), details=None):
    """An evaluation of models: `scores` of each, item by item, and as many items in error."""
    samples = [
        sample(model, f"{ids}{i}", {"accuracy": score})
        | ({} if text is None else {"prompt": f"question {i}", "response": f"{text} {model} {i}"})
        for model, of in scores.items()
        for i, score in enumerate(of)
    ]
    samples += [sample(model, f"e{i}", {}, error="timed out") for model in scores for i in range(errors)]
    models = {m: {"accuracy": clustered_mean(of, range(len(of))) | {"n_error": errors}} for m, of in scores.items()}
    if errors:
        for cells in models.values():
            blank = dict.fromkeys(("value", "se", "interval"))
            cells["accuracy"] |= blank | {"unusable": f"{errors} items failed, {errors} with: timed out"}
    return leave(folder, task, models, samples, notes=notes, details=details)
