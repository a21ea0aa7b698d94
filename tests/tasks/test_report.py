"""eval.py task=report: a page of runs and evaluations as they are left behind, whole, broken and hostile ones."""

import copy
import json
import random
import re
import shutil
from dataclasses import replace

import pytest

import eval as evaluation
import train
from rpo import config, dist
from rpo.errors import UserError
from rpo.evals import results
from rpo.evals.results import Evaluation
from rpo.overopt import study
from rpo.reporting import batches, eval_verdicts, figures, gather, page, run_verdicts, sections, side_by_side
from rpo.runs import folder as run_folder
from rpo.stats import clustered_mean
from rpo.tasks import compare
from rpo.training import figures as training_figures
from tests.helpers.page_reader import NASTY, Reader
from tests.helpers.rows import write_jsonl
from tests.helpers.runs import settings, tiny_args

STEPS = (0, 10, 20, 30)


def report(run_dir, *more):
    """(the page read, results.json) of a report made by eval.py in this process; its Markdown holds the same verdicts."""
    try:
        assert evaluation.evaluate(settings("task=report", *more, f"run_dir={run_dir}", name="eval")) == "finished"
    finally:
        dist.shutdown()
    found = json.loads((run_dir / "results.json").read_text())
    text = (run_dir / "report.md").read_text()
    for group in found["groups"]:
        assert f"{group['verdict']}.**" in text
    for name in re.findall(r"\]\((report_figures/[^)]*)\)", text):
        assert (run_dir / name).is_file(), name
    return Reader((run_dir / "report.html").read_text()), found


def refused(run_dir, *more):
    """The one line that a report is refused with."""
    with pytest.raises(UserError) as error:
        report(run_dir, *more)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def base(tiny):
    """The settings of a run, as its config.yaml has them."""
    return config.to_dict(settings("data=files", *tiny_args(tiny), "loss=rpo_sum"))


def point(step, *, gold=None, shift=0.0, accuracy=0.6, kl=0.0):
    event = {"split": "eval", "step": step, "pairs": 8 * step, "time": 1.0, "shift/chosen": shift, "kl": kl}
    event |= {"rewards/accuracies": accuracy, "loss/preference": 0.66, "displacement_rate": 0.5, "samples/ended": 1.0}
    return event | ({} if gold is None else {"gold": gold})


def leave_run(folder, base, *, eta=0.0, seed=0, golds=None, state="finished", reason="", shift=-1.0):
    """A run's folder as a run leaves it, without its weights."""
    folder.mkdir(parents=True)
    made = copy.deepcopy(base)
    made["loss"]["eta"], made["seed"], made["run_dir"] = eta, seed, str(folder)
    (folder / "config.yaml").write_text(json.dumps(made))  # JSON is YAML
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


def leave_study(folder, runs):
    """An evaluation of `runs` by task=overopt, its numbers made up, its form and verdicts its own."""
    measured = []
    for run in runs:
        made = json.loads((run / "config.yaml").read_text())
        golds = [1.0, 3.0, 0.5] if not made["loss"]["eta"] else [1.0, 3.0, 2.9]
        curve = []
        for step, gold in zip((0, 10, 30), golds, strict=True):
            metrics = {"gold": clustered_mean([gold - 0.1, gold, gold + 0.1], [0, 1, 2])}
            metrics |= {
                "kl": clustered_mean([0.4 * step] * 3, [0, 1, 2]),
                "samples/ended": clustered_mean([1.0] * 3, [0, 1, 2]),
            }
            metrics |= {"shift/chosen": clustered_mean([-step, -step - 1], [0, 1])}
            clusters = {"gold": {"mean": [gold - 0.1, gold, gold + 0.1], "size": [1, 1, 1]}}
            curve.append({"step": step, "metrics": metrics, "clusters": clusters})
        measured.append(
            {"run": str(run), "settings": made, "prompts": [], "max_new_tokens": 48, "curve": curve, "bon": None}
        )
    of_runs, of_groups, _ = study.summarise(measured, 0)
    folder.mkdir(parents=True)
    facts = {"task": "overopt", "left_out": ["x/9 (failed: no room)"], "groups": of_groups, "runs": of_runs}
    run_folder.write_json(folder / "results.json", facts)
    (folder / "config.yaml").write_text("task: {kind: overopt}\n")
    run_folder.write_status(folder, "finished")
    write_jsonl(
        folder / "samples.jsonl",
        [
            {
                "run": str(run),
                "step": step,
                "row": "f:1",
                "prompt": "say it",
                "response": f"answer of {step}",
                "gold": gold,
            }
            for run in runs
            for step, gold in ((0, 1.0), (10, 9.0), (30, 0.5))
        ],
    )
    return folder


def leave_evaluation(folder, scores, *, task="pairs", text=None, errors=0, more=(), ids="q", facts=None):
    """An evaluation of models: `scores` of each, item by item."""
    folder.mkdir(parents=True)
    samples = [
        {"model": model, "id": f"{ids}{i}", "cluster": f"{ids}{i}", "scores": {"accuracy": score}, "error": None}
        | ({} if text is None else {"prompt": f"question {i}", "response": f"{text} {model} {i}"})
        for model, of in scores.items()
        for i, score in enumerate(of)
    ]
    samples += [
        {"model": model, "id": f"e{i}", "cluster": f"e{i}", "scores": {}, "error": "timed out"}
        for model in scores
        for i in range(errors)
    ]
    models = {
        m: {"accuracy": results.with_errors(clustered_mean(of, range(len(of))), errors)} for m, of in scores.items()
    }
    cfg = settings(f"task={task}", *(more or ["model.path=m"]), name="eval")
    try:
        results.write(folder, cfg, Evaluation(models, samples, {"data": "d.jsonl"} | (facts or {})))
    except UserError:
        assert errors
    (folder / "config.yaml").write_text(json.dumps({"task": {"kind": task}}))
    return folder


# ---- runs


def test_a_sweep_of_runs(base, tmp_path):
    """A verdict per group, a row per run under its group with what was swept, means, and charts; beside it the Markdown."""
    read, found = report(tmp_path / "out", f"runs={leave_sweep(tmp_path / 'sweep', base)}")
    assert [(g["label"], g["runs"], g["verdict"]) for g in found["groups"]] == [
        ("DPO beta 0.01", ["0", "1", "2"], "overoptimised"),
        ("RPO sum beta 0.01 eta 0.25", ["3", "4", "5"], "no overoptimisation seen"),
    ]
    assert "6 runs in 2 groups" in read.text and "Overoptimised: 1; no overoptimisation seen: 1." in read.text
    half = 4.3026527299 * 0.1 / 3**0.5  # of 3, 2.9 and 2.8
    told = f"eta 0.25 minus DPO beta 0.01: gold +2.9 (95% {2.9 - half:.4g} to {2.9 + half:.4g}, over 3 shared seeds, step 30): above."
    assert told in read.text and all(rule in read.text for rule in eval_verdicts.RULES)
    assert "loss.eta" in read.text and read.text.count("mean \u00b1 sd") == 2
    titles = [svg["aria-label"].split(".")[0] for svg in read.tags("svg") if svg.get("role") == "img"]
    assert "Gold reward against optimizer step" in titles[0] and any("against loss" in title for title in titles)
    assert all(rule in read.text for rule in run_verdicts.RULES)
    heads = ["Verdict", "Runs", "Figures", "Provenance"]
    assert [text for text in read.texts if text in heads] == heads
    assert (
        "train.py seed=0" in read.text
        and "abc123" in read.text
        and "With 500 pairs" in read.text.replace("with", "With")
    )


def test_what_did_not_finish_is_named(base, tmp_path):
    """Failed, interrupted, killed, half-written and never started runs are told by name; the verdict is on what finished."""
    sweep = leave_sweep(tmp_path / "sweep", base)
    run_folder.write_json(sweep / "sweep.json", [{"cell": i, "seed": str(i), "loss.eta": "0"} for i in range(8)])
    run_folder.write_status(sweep / "0", "failed", "UserError: no room", 7)
    run_folder.write_status(sweep / "1", "interrupted", "SIGTERM", 20)
    run_folder.write_status(sweep / "3", "running", "", 20)
    (sweep / "6").mkdir()
    run_folder.write_status(sweep / "6", "failed", "UserError: loss.beta=-1")
    with (sweep / "2" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(point(40) | {"gold": float("nan"), "kl": float("inf")}) + '\n{"split": "eval", "st')
    read, found = report(tmp_path / "out", f"runs={sweep}")
    for told in (
        "Run 0 failed at step 7: UserError: no room.",
        "Run 1 was interrupted at step 20: SIGTERM.",
        "Run 3 is running, or was killed at step 20.",
        "Run 6 failed: UserError: loss.beta=-1.",
        "sweep: cells of the sweep that were not started: 7",
        "Run 2: kl, gold at step 40 not finite, left out.",
        "Run 2: 1 line of metrics.jsonl not readable, left out.",
        "seed=6 loss.eta=0",
    ):
        assert told in read.text, told
    assert {g["label"]: g["verdict"] for g in found["groups"]}["seed=6 loss.eta=0"] == "no run finished"


def test_runs_with_one_setting_and_seed_stand_apart(base, tmp_path):
    """A copy of a run is no second seed: each of the two is judged by itself, and the page says so; other groups stay."""
    for name in "ab":
        leave_run(tmp_path / "runs" / name, base, shift=-3.0)
    for seed in (1, 2):
        leave_run(tmp_path / "runs" / f"c{seed}", base, eta=0.5, seed=seed)
    read, found = report(tmp_path / "out", f"runs={tmp_path / 'runs'}")
    assert [(g["label"], g["runs"]) for g in found["groups"]] == [
        ("RPO sum beta 0.01 eta 0.5", ["c1", "c2"]),
        ("DPO beta 0.01 (a)", ["a"]),
        ("DPO beta 0.01 (b)", ["b"]),
    ]
    assert "here each of them stands by itself" in read.text
    # Chosen fell 90 nats, or 30.
    assert {g["verdict"] for g in found["groups"]} == {"signs of overoptimisation"}


def test_settings_that_are_none(base, tmp_path):
    """A run whose config.yaml has something else where groups and labels are read stands by itself; nothing is raised."""
    odd = [("preference", "foo"), ("beta", "x"), ("beta", None), ("beta", float("nan")), ("eta", "x")]
    odd += [("label_smoothing", "x"), ("seed", "x"), ("seed", [1]), ("seed", float("nan"))]
    for i, (key, value) in enumerate(odd):
        file = leave_run(tmp_path / "runs" / str(i), base) / "config.yaml"
        made = json.loads(file.read_text())
        (made if key == "seed" else made["loss"])[key] = value
        file.write_text(json.dumps(made))
    leave_run(tmp_path / "runs" / "whole", base)
    _, found = report(tmp_path / "out", f"runs={tmp_path / 'runs'}")
    told = sum("not those of this version's runs; shown by itself" in note for note in found["notes"])
    assert told == len(odd) and len(found["groups"]) == len(odd) + 1


def test_a_run_of_another_version(base, tmp_path):
    """Settings without this version's loss, and an unreadable config.yaml, are told and stop nothing."""
    leave_run(tmp_path / "runs" / "a", base)
    old = leave_run(tmp_path / "runs" / "b", base)
    (old / "config.yaml").write_text("loss: {kind: dpo}\n")
    odd = tmp_path / "runs" / "c"
    odd.mkdir()
    (odd / "config.yaml").write_text("a: [")
    other = tmp_path / "runs" / "d"
    other.mkdir()
    (other / "config.yaml").write_text("learner: x\n")
    read, found = report(tmp_path / "out", f"runs={tmp_path / 'runs'}")
    assert len(found["groups"]) == 2
    assert "not those of this version's runs" in read.text and "is not the settings of a run" in read.text
    assert "its config.yaml is of another kind" in read.text


def test_what_was_swept_is_joined():
    """Ends against a swept key: what differs in it alone is joined by a grey line, each point in its group's style with the
    spread of its seeds; a group that nothing else is equal to is not drawn."""

    def group(label, style, beta, eta, *ends, form="sigmoid sum"):
        seeds = [[{"step": 0, "gold": 1.0}, {"step": 9, "gold": end}] for end in ends]
        return figures.Curves(label, style, seeds, {}, {"loss.beta": beta, "loss.eta": eta}, form)

    groups = [group("a", 0, 0.1, 0.0, 2.0, 4.0), group("b", 1, 0.1, 0.5, 3.0), group("c", 2, 0.3, 0.9, 5.0)]
    groups.append(group("d", 3, 0.1, 2.0, 9.0, form="ipo none"))
    (figure,) = figures.against_swept(groups, ["loss.eta", "loss.beta"])
    (chart,) = figure.charts
    joined, *ends = chart.lines
    assert joined.faint and joined.points == [(0.0, 3.0, None), (1.0, 3.0, None)]
    assert [(line.label, line.style, line.points) for line in ends] == [
        ("a", 0, [(0.0, 3.0, 1.0)]),  # sd of 2 and 4 over the root of 2
        ("b", 1, [(1.0, 3.0, None)]),
    ]
    assert chart.ticks == [(0.0, "0"), (1.0, "0.5")] and chart.x == "loss.eta"
    odd = [replace(each, swept={"../../x": each.swept["loss.eta"]}) for each in groups[:2]]
    assert figures.against_swept(odd, ["../../x"])[0].name == "swept_______x"  # a file's name


# ---- evaluations


def test_a_study_decides(base, tmp_path):
    """What task=overopt measured is the verdict, with its errors in the table, its charts and its worst answers."""
    sweep = leave_sweep(tmp_path / "sweep", base)
    left = leave_study(sweep / "study", [sweep / name for name in "01345"])
    read, found = report(tmp_path / "out", f"runs={sweep}")
    first, second = found["groups"]
    assert (
        first["says"].startswith("Overoptimised in 2 of 2 seeds: gold fell 2.5")
        and "KL at the end 12 nats" in first["says"]
    )
    assert second["says"].startswith("No overoptimisation seen in 3 of 3 seeds")
    assert "In 3 of 3 seeds: gold ended" in read.text and "No overoptimisation seen in 3 of" not in read.text
    assert "task=overopt measured 2 of 3; the verdict is on these." in first["notes"]
    theirs = json.loads((left / "results.json").read_text())["groups"]
    assert all(g["says"].startswith(own["verdict"]) for g, own in zip(found["groups"], theirs, strict=True))
    assert "left out x/9 (failed: no room)" in read.text
    assert "0.500 \u00b1\u00a00.058" in read.text  # of three prompts .1 apart
    assert "against sqrt(KL to the reference)" in " ".join(s.get("aria-label", "") for s in read.tags("svg"))
    assert "last checkpoint against the start, by gold: worse on 2 of 2 items, better on 0." in read.text
    assert read.text.count("answer of 30") == 5 and "answer of 10" not in read.text


def test_a_study_alone(base, tmp_path):
    """Results of runs that are gone are reported from what the study keeps."""
    sweep = leave_sweep(tmp_path / "sweep", base)
    made = leave_study(tmp_path / "study", [sweep / "0", sweep / "3"])
    shutil.rmtree(sweep)
    read, found = report(tmp_path / "out", f"task.results={made}", "task.title=Gone")
    assert [g["verdict"] for g in found["groups"]] == ["overoptimised", "no overoptimisation seen"]
    assert "Gone" in read.text and "evaluated" in read.text


def test_models_against_each_other(tmp_path):
    """Values with errors and intervals, a comparison as a forest with compare's own words, the worst items side by side."""
    good, bad = [1.0] * 9 + [0.0], [0.0] * 8 + [1.0, 1.0]
    first = leave_evaluation(tmp_path / "a", {"runs/old/model": good, "runs/new/model": bad}, text="said")
    cfg = settings("task=compare", f"task.results={first}", name="eval")
    made = compare.evaluate(cfg)
    (tmp_path / "c").mkdir()
    results.write(tmp_path / "c", cfg, made)
    read, _ = report(tmp_path / "out", f"task.results=[{first},{tmp_path / 'c'}]")
    assert "0.90 \u00b1\u00a00.10" in read.text and "new, by accuracy" not in read.text
    cell = made.models["runs/old/model - runs/new/model"]["accuracy"]
    assert compare.verdict(cell, "old", "new", 1) in read.text
    assert any("paired difference" in s.get("aria-label", "") for s in read.tags("svg"))
    assert "new against old, by accuracy: worse on 8 of 10 items, better on 1. The 5 worst:" in read.text
    assert "said runs/old/model 0" in read.text and "said runs/new/model 4" in read.text and "model 5" not in read.text


def test_unusable_and_other_data_are_said(tmp_path):
    """Results with too many errors are called unusable, results on other data not comparable; items in error are no items."""
    a = leave_evaluation(tmp_path / "a", {"m": [1.0, 0.0]}, errors=3)
    b = leave_evaluation(tmp_path / "b", {"m": [1.0, 1.0]}, more=["model.path=m", "data.eval=other.jsonl"])
    read, found = report(tmp_path / "out", f"task.results=[{a},{b}]")
    assert "3 of 5 items failed, 3 with: timed out" in read.text and "unusable" in read.text
    assert found["notes"] == []  # other settings, but the same items
    c = leave_evaluation(tmp_path / "c", {"m": [1.0, 1.0]}, ids="other")
    _, found = report(tmp_path / "out2", f"task.results=[{b},{c}]")
    assert found["notes"] == [f"{b} and {c}, of task=pairs, have no item in common: do not compare their numbers"]


def test_no_answers_are_paired_across_judges(tmp_path):
    """Scores by another judge are of no use side by side; the page says who judged, what was noted, and that they differ."""
    judges = [{"judge": {"model": name, "prompt": "own"}, "notes": [f"note of {name}"]} for name in ("j", "k")]
    one = leave_evaluation(tmp_path / "a", {"m": [1.0, 1.0]}, text="said", facts=judges[0])
    two = leave_evaluation(tmp_path / "b", {"n": [0.0, 0.0]}, text="said", facts=judges[1])
    read, found = report(tmp_path / "out", f"task.results=[{one},{two}]")
    assert "Where it got worse" not in read.text and "were not judged alike (judge j and k)" in found["notes"][0]
    for told in ("Judge: j; prompt own; verdict by text.", "Judge: k;", "note of j", "note of k"):
        assert told in read.text, told
    three = leave_evaluation(tmp_path / "c", {"o": [0.0, 0.0]}, text="said", facts=judges[0])
    assert (
        "o against m, by accuracy: worse on 2 of 2"
        in report(tmp_path / "out2", f"task.results=[{one},{three}]")[0].text
    )


def test_worst_pairs_one_opponent_or_each_other():
    """Items against different opponents do not stand side by side, those of two that met each other do."""

    def item(against):
        return {"q": side_by_side.Item("p", "t", {"win_rate": 1.0}, against)}

    assert side_by_side.alike(item("x"), item("x"), None) and side_by_side.alike(item("b"), item("a"), ("a", "b"))
    assert not side_by_side.alike(item("x"), item("y"), None) and not side_by_side.alike(item("b"), item("a"), None)
    assert not side_by_side.alike(item("x"), item("a"), ("a", "b")) and side_by_side.alike(item(None), item(None), None)


def test_worst_goes_by_the_metrics_direction():
    """Of a metric of which less is better a rise is worse; items without a common id or a score are left out; lengths are no metric."""
    samples = [
        {"model": m, "id": i, "scores": {"samples/length": 9, "kl": kl}, "response": f"{m}{i}"}
        for m, kls in (("a", (1.0, 1.0, 1.0)), ("b", (3.0, 0.5, 9.0)))
        for i, kl in enumerate(kls)
    ]
    samples += [{"model": "a", "id": 7, "scores": {"kl": 1.0}}, {"model": "b", "id": 2, "scores": {}, "error": "no"}]
    a, b = side_by_side.items_of(samples, "a"), side_by_side.items_of(samples, "b")
    head, *duels = side_by_side.compared("a", a, "b", b, 1)
    assert head.text == "b against a, by kl: worse on 2 of 3 items, better on 1. The 1 worst:"
    assert [duel.right[2] for duel in duels] == ["b2"]
    assert side_by_side.compared("a", a, "b", {}, 5) == [] and side_by_side.compared("a", a, "b", b, 0) == []


@pytest.mark.parametrize(
    ("task", "sample", "prompt", "answer"),
    [
        ("winrate", {"prompt": [{"role": "user", "content": "hi"}], "response": "yo", "judgments": []}, "hi", "yo"),
        ("alpaca_eval", {"prompt": "hi", "response": "yo", "baseline_response": "no"}, "hi", "yo"),
        ("lm_eval", {"prompt": "1 + 1?", "answer": "2", "target": "3", "logps": [0.1]}, "1 + 1?", "2"),
        (
            "mbpp",
            {"prompt": "p", "programs": [{"program": "x = 1\n", "why": "it ended"}, {"program": "y", "why": None}]},
            "p",
            "x = 1\n# it ended\n\ny\n# passed",
        ),
        ("mt_bench", {"question": 81, "judgment": "fine [[9]]"}, "q", "[judge] fine [[9]]"),
        (
            "mt_bench",
            {"question": 81, "judgments": [{"shown_first": "m", "score": 1.0, "reply": "[[A]]"}]},
            "q",
            "[judge, m shown first] [[A]]",
        ),
        ("judge_check", {"prompt": "hi", "chosen": "a", "rejected": "b", "reply": "[[B]]"}, "hi", "[judge] [[B]]"),
        ("pairs", {"row": "f:1", "tokens_chosen": 3}, "q", None),
    ],
)
def test_worst_has_the_words_of_every_task(task, sample, prompt, answer):
    """What was asked and said, in the form of each task's samples; where they keep no answer, what the judge said of it."""
    found = side_by_side.items_of([{"model": "m", "id": "q", "scores": {"score": 1.0}, "error": None} | sample], "m")
    assert found == {"q": side_by_side.Item(prompt, answer, {"score": 1.0})}


def test_worst_of_generated_answers_is_none():
    """Lengths and ends say nothing of which answer is better."""
    samples = [
        {"model": m, "id": 1, "scores": {"samples/length": n, "samples/ended": 1.0}} for m, n in (("a", 9), ("b", 1))
    ]
    assert (
        side_by_side.compared("a", side_by_side.items_of(samples, "a"), "b", side_by_side.items_of(samples, "b"), 5)
        == []
    )


def test_nothing_that_models_or_files_say_becomes_markup(base, tmp_path):
    """A folder's name, a reason, an answer and a model's name with tags in them are text on the page."""
    odd = "<img src=x onerror=alert(1)>"
    run = leave_run(tmp_path / "runs" / odd, base, state="failed", reason=f"{NASTY} {odd}")
    leave_run(tmp_path / "runs" / "b", base, seed=1)
    leave_evaluation(tmp_path / "runs" / "e", {odd: [1.0, 1.0], NASTY[:60]: [0.0, 0.0]}, text=NASTY)
    read, _ = report(tmp_path / "out", f"runs={run.parent}", f"task.title='{odd}'")
    assert read.text.count(odd) >= 4 and "</script><script>alert('x')" in read.text
    assert not [tag for tag, _ in read.seen if tag in ("img", "script")]


# ---- bad input


def test_bad_input(base, tmp_path):
    """Nothing to report on, no such folder, an empty one, results of another kind or none: one line each that names it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "results.json").write_text('{"task": "overopt", "left_out": [], "runs": [{"run": "x"}]}')
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "results.json").write_text('{"task": "pai')
    cases = {
        (): "runs=null, task.results=null with task=report",
        (f"runs={tmp_path / 'none'}",): "no such folder",
        (f"runs={tmp_path / 'empty'}",): "no run and no evaluation there",
        (f"task.results={tmp_path / 'empty'}",): "no evaluation can be read there",
        (f"task.results={tmp_path / 'odd'}",): "not in the form that task=overopt writes",
        (f"task.results={tmp_path / 'half'}",): "no evaluation can be read there",
        ("task.results=[]",): "task.results=[]: expected one or a list of them",
        (f"runs={tmp_path}", "task.worst=-1"): "task.worst=-1: expected at least 0",
    }
    for i, (more, told) in enumerate(cases.items()):
        assert told in refused(tmp_path / f"out{i}", *more)


def test_what_lies_about_is_passed_by(base, tmp_path):
    """Below runs an evaluation that left no results, one that can not be read and an earlier report stop nothing."""
    leave_run(tmp_path / "runs" / "a", base)
    for name, content in {"half": '{"task": "pai', "none": None}.items():
        folder = tmp_path / "runs" / name
        folder.mkdir()
        (folder / "config.yaml").write_text("task: {kind: pairs}\n")
        run_folder.write_status(folder, "failed", "UserError: no data")
        if content:
            (folder / "results.json").write_text(content)
    for i in range(4):
        (tmp_path / "more" / str(i)).mkdir(parents=True)
        (tmp_path / "more" / str(i) / "config.yaml").write_text("task: {kind: pairs}\n")
    read, found = report(tmp_path / "many", f"runs=[{tmp_path / 'runs'},{tmp_path / 'more'}]")
    assert len(found["notes"]) == 6 and "Left out, or to be read with care: 6 notes" in read.text
    report(tmp_path / "runs" / "report", f"runs={tmp_path / 'runs'}")
    read, found = report(tmp_path / "out", f"runs={tmp_path / 'runs'}")
    assert len(found["notes"]) == 2 and "task=pairs that left no results (failed: UserError: no data)" in read.text


def test_damaged_results_are_one_line_or_a_page(base, tmp_path):
    """A study's results with any one value replaced by another kind of thing give a UserError of one line, or a page."""
    sweep = leave_sweep(tmp_path / "sweep", base)
    file = leave_study(tmp_path / "study", [sweep / "0", sweep / "3"]) / "results.json"
    whole, found, rng = file.read_text(), gather.find([str(sweep)]), random.Random(0)
    told = 0
    for _ in range(40):
        facts, spots = json.loads(whole), []

        def walk(node, spots=spots):
            for key in node if isinstance(node, dict) else range(len(node)):
                spots.append((node, key))
                if isinstance(node[key], dict | list):
                    walk(node[key])

        walk(facts["runs"])
        node, key = rng.choice(spots)
        node[key] = rng.choice([None, -1, "x", [], {}, float("nan"), 1e308, True, {"value": "y"}])
        file.write_text(json.dumps(facts))
        try:
            gathered = batches.gather_all(found, [str(file)])
        except UserError as error:
            assert "\n" not in str(error) and str(file) in str(error)
            told += 1
        else:
            assert "<h2>Runs" in page.html(sections.layout(gathered, "t", ["x"], 5, {}))
    assert 3 < told < 37


# ---- a real one


def test_a_real_sweep_with_an_evaluation(tiny, tmp_path, monkeypatch):
    """Two runs trained here and their evaluation by task=pairs: the page's numbers are those of their files."""
    monkeypatch.setattr(training_figures, "draw_run", lambda *args: [])  # longer than all else
    where = tiny_args(tiny, "data=files", "max_steps=2", "eval_every=1", "batch_size=8", "log_every=1")
    for i, eta in enumerate((0.0, 0.5)):
        try:
            train.train(settings(*where, "loss=rpo_sum", f"loss.eta={eta}", f"run_dir={tmp_path / 'sweep' / str(i)}"))
        finally:
            dist.shutdown()
    models = ",".join(str(tmp_path / "sweep" / name / "model") for name in "01")
    more = ("task=pairs", f"model.path=[{models}]", f"run_dir={tmp_path / 'sweep' / 'pairs'}")
    try:
        evaluation.evaluate(settings(*more, name="eval"))
    finally:
        dist.shutdown()
    read, found = report(tmp_path / "out", f"runs={tmp_path / 'sweep'}")
    assert [g["runs"] for g in found["groups"]] == [["0"], ["1"]]
    last = json.loads((tmp_path / "sweep" / "1" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['rewards/accuracies']:.4g}" in read.text and "1/model" not in read.text
    assert "pairs: pairs" in read.text and "rewards/accuracies" in read.text
    assert "Not measured: what answers are worth" in read.text
