"""eval.py task=report: a page of runs and evaluations as they are left behind, from the command to the file."""

import json
import shutil
import subprocess
import sys

import pytest

import eval as evaluation
import train
from rpo import dist
from rpo.errors import UserError
from rpo.evals import pairing
from rpo.runs import folder as run_folder
from rpo.training import figures as training_figures
from tests.helpers.left_behind import leave, leave_evaluation, leave_run, leave_study, leave_sweep
from tests.helpers.page_reader import NASTY, Reader
from tests.helpers.runs import ROOT, settings, tiny_args


def report(run_dir, *more):
    """(the page read, results.json) of a report made by eval.py in this process."""
    try:
        assert evaluation.evaluate(settings("task=report", *more, f"run_dir={run_dir}", name="eval")) == "finished"
    finally:
        dist.shutdown()
    return Reader((run_dir / "report.html").read_text()), json.loads((run_dir / "results.json").read_text())


def test_a_sweep_of_runs(base, tmp_path, capsys):
    """Headline, table of arms and one figure first; verdicts, charts, runs, rules and versions folded below; printed in short."""
    read, results = report(tmp_path / "out", f"runs={leave_sweep(tmp_path / 'sweep', base)}")
    details = results["details"]
    assert [(g["label"], g["runs"], g["verdict"]) for g in details["groups"]] == [
        ("DPO beta 0.01", ["0", "1", "2"], "overoptimised"),
        ("RPO sum beta 0.01 eta 0.25", ["3", "4", "5"], "no overoptimisation seen"),
    ]
    # Gains 2, 2.1 and 2.2: two arms, so t at 1 - 5% / 4.
    half = 6.2053468170 * 0.1 / 3**0.5
    head = f"Better: RPO sum eta 0.25 gained 2.10 gold (95% {2.1 - half:.2f} to {2.1 + half:.2f}) and kept it; "
    assert details["headline"] == head + "1 of 2 arms is overoptimised."
    gold = results["models"]["RPO sum beta 0.01 eta 0.25"]["gold"]
    assert gold["value"] == pytest.approx(3.1) and gold["se"] == pytest.approx(0.1 / 3**0.5) and gold["n"] == 3
    half = 4.3026527299 * 0.1 / 3**0.5  # of 3, 2.9 and 2.8
    assert f"eta 0.25 minus DPO: gold +2.9 (95% {2.9 - half:.4g} to {2.9 + half:.4g}, over 3 shared" in read.text
    assert "All arms: beta 0.01." in read.text and "3.10 \u00b1\u00a00.06" in read.text
    for limit in ("at least 10% of what", "a drop of 50% of it", "exceeded 0.1 nats", "more than 20 nats or 0.3"):
        assert limit in read.text
    folded = ["Verdicts in words", "Along training", "Runs", "How verdicts are reached", "Provenance"]
    assert [text for text in read.texts if text in folded] == folded
    order = [tag for tag, attrs in read.seen if tag in ("table", "figure", "details")]
    assert order[:3] == ["table", "figure", "details"]
    charts = [svg["aria-label"] for svg in read.tags("svg") if svg.get("role") == "img"]
    assert "against \u221aKL" in charts[0] and any("against optimizer step" in chart for chart in charts)
    assert "train.py seed=0" in read.text and "abc123" in read.text and "on 500 pairs" in read.text
    printed = capsys.readouterr().out
    assert details["headline"] in printed and "DPO beta 0.01: overoptimised." in printed and "report.html" in printed


def test_a_study_decides(base, tmp_path):
    """What task=overopt measured is the verdict, with its errors in the table, its charts and its worst answers."""
    sweep = leave_sweep(tmp_path / "sweep", base)
    left = leave_study(sweep / "study", [sweep / name for name in "01345"])
    read, results = report(tmp_path / "out", f"runs={sweep}")
    first, second = results["details"]["groups"]
    assert first["says"].startswith("Overoptimised in 2 of 2 seeds: gold fell 2.5")
    assert "KL at the end 12 nats" in first["says"]
    assert second["says"].startswith("No overoptimisation seen in 3 of 3 seeds")
    assert "In 3 of 3 seeds: gold ended" in read.text and "No overoptimisation seen in 3 of" not in read.text
    theirs = json.loads((left / "results.json").read_text())["details"]["groups"]
    assert all(g["says"].startswith(own["verdict"]) for g, own in zip((first, second), theirs, strict=True))
    assert "left out x/9 (failed: no room)" in read.text
    assert "0.500 \u00b1\u00a00.058" in read.text  # of three prompts .1 apart
    assert "DPO, last checkpoint against the start, by gold: worse on 2 of 2 items, better on 0." in read.text
    assert read.text.count("answer of 30") == 5 and "answer of 10" not in read.text


def test_a_study_alone(base, tmp_path):
    """Results of runs that are gone are reported from what the study keeps."""
    sweep = leave_sweep(tmp_path / "sweep", base)
    study = leave_study(tmp_path / "study", [sweep / "0", sweep / "3"])
    shutil.rmtree(sweep)
    read, results = report(tmp_path / "out", f"task.results={study}", "task.title=Gone")
    assert [g["verdict"] for g in results["details"]["groups"]] == ["overoptimised", "no overoptimisation seen"]
    assert results["details"]["headline"].startswith("Better: RPO sum eta 0.25 gained 1.9 gold (95% 1.9")
    assert "Gone" in read.text and "evaluated" in read.text


def test_models_against_each_other(tmp_path):
    """Without runs: models in the table, intervals in the figure, a comparison in its own words, the worst items side by side."""
    good, bad = [1.0] * 9 + [0.0], [0.0] * 8 + [1.0, 1.0]
    models = {"runs/old/model": good, "runs/new/model": bad}
    first = leave_evaluation(tmp_path / "a", models, text="said")
    cell = {"value": 0.7, "se": 0.21, "interval": [0.22, 1.18], "n": 10, "n_error": 0, "clusters": 10, "needed": 5}
    cell |= {"n_first": 0, "n_second": 0, "p": 0.02, "p_holm": 0.02, "detectable": 0.6}
    pairs = {"pairs": [list(models)], "comparisons": 1}
    second = leave(tmp_path / "c", "compare", {" - ".join(models): {"accuracy": cell}}, details=pairs)
    read, results = report(tmp_path / "out", f"task.results=[{first},{second}]")
    verdict = f"accuracy: {pairing.verdict(cell, 'old', 'new', 1)}."
    assert results["details"]["headline"] == verdict and verdict in read.text
    assert "0.90 \u00b1\u00a00.10" in read.text and "old \u2212 new" in read.text and "0.22 to 1.18" in read.text
    charts = [svg["aria-label"] for svg in read.tags("svg") if svg.get("role") == "img"]
    assert charts == ["pairs: accuracy (95% interval). old: 0.9 [0.6738, 1.126]; new: 0.2 [\u22120.1016, 0.5016]"]
    assert "new against old, by accuracy: worse on 8 of 10 items, better on 1." in read.text
    assert "said runs/old/model 0" in read.text and "said runs/new/model 4" in read.text and "model 5" not in read.text


def test_no_answers_are_paired_across_judges(tmp_path):
    """Scores by another judge are of no use side by side; the page says who judged and what was noted."""
    judges = [{"details": {"judge": {"model": name, "prompt": "own"}}, "notes": [f"note of {name}"]} for name in "jk"]
    one = leave_evaluation(tmp_path / "a", {"m": [1.0, 1.0]}, text="said", **judges[0])
    two = leave_evaluation(tmp_path / "b", {"n": [0.0, 0.0]}, text="said", **judges[1])
    read, _ = report(tmp_path / "out", f"task.results=[{one},{two}]")
    for line in ("Judge: j; prompt own; verdict by text.", "Judge: k;", "note of j", "note of k"):
        assert line in read.text, line
    assert "by accuracy: worse" not in read.text
    three = leave_evaluation(tmp_path / "c", {"o": [0.0, 0.0]}, text="said", **judges[0])
    read, _ = report(tmp_path / "out2", f"task.results=[{one},{three}]")
    assert "o against m, by accuracy: worse on 2 of 2" in read.text


def test_nothing_that_models_or_files_say_becomes_markup(base, tmp_path):
    """A folder's name, a reason, an answer and a model's name with tags in them are text on the page."""
    odd = "<img src=x onerror=alert(1)>"
    run = leave_run(tmp_path / "runs" / odd, base, state="failed", reason=f"{NASTY} {odd}")
    leave_run(tmp_path / "runs" / "b", base, seed=1)
    leave_evaluation(tmp_path / "runs" / "e", {odd: [1.0, 1.0], NASTY[:60]: [0.0, 0.0]}, text=NASTY)
    read, _ = report(tmp_path / "out", f"runs={run.parent}", f"task.title='{odd}'")
    assert read.text.count(odd) >= 4 and "</script><script>alert('x')" in read.text
    assert not [tag for tag, _ in read.seen if tag in ("img", "script")]


def test_bad_input(base, tmp_path):
    """Nothing to report on, no such folder, an empty one, results of another kind or none: one line each that names it."""
    (tmp_path / "empty").mkdir()
    odd = leave(tmp_path / "odd", "overopt", {}, details={"left_out": [], "runs": [{"run": "x"}]})
    half = leave(tmp_path / "half", "pairs", {})
    (half / "results.json").write_text('{"task": "pai')
    cases = {
        (): "runs=null, task.results=null with task=report",
        (f"runs={tmp_path / 'none'}",): "no such folder",
        (f"runs={tmp_path / 'empty'}",): "holds no run and no evaluation",
        (f"task.results={tmp_path / 'empty'}",): "no evaluation can be read there",
        (f"task.results={odd}",): "is not what task=overopt writes",
        (f"task.results={half}",): "no evaluation can be read there",
        ("task.results=[]",): "task.results=[]: expected",
        (f"runs={tmp_path}", "task.worst=-1"): "task.worst=-1: expected",
    }
    for i, (more, line) in enumerate(cases.items()):
        with pytest.raises(UserError) as error:
            report(tmp_path / f"out{i}", *more)
        assert line in str(error.value) and "\n" not in str(error.value)


def test_what_lies_about_is_passed_by(base, tmp_path):
    """Below runs an evaluation that left no results, one that cannot be read and an earlier report stop nothing."""
    leave_run(tmp_path / "runs" / "a", base)
    half = leave(tmp_path / "runs" / "half", "pairs", {})
    (half / "results.json").write_text('{"task": "pai')
    none = leave(tmp_path / "runs" / "none", "pairs", {})
    (none / "results.json").unlink()
    run_folder.write_status(none, "failed", "UserError: no data")
    report(tmp_path / "runs" / "report", f"runs={tmp_path / 'runs'}")
    read, results = report(tmp_path / "out", f"runs={tmp_path / 'runs'}")
    assert len(results["notes"]) == 2 and "task=pairs without results (failed: UserError: no data)" in read.text
    assert "Left out, or to be read with care" in read.text and "2 notes" in read.text


def test_only_a_report_imports_what_draws_it():
    """The task's module costs other tasks neither jinja2 nor matplotlib."""
    code = "import torch, sys; before = set(sys.modules); import rpo.tasks.report\n"  # torch itself may import jinja2
    code += "assert not {'jinja2', 'matplotlib'} & (set(sys.modules) - before)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_real_sweep_with_an_evaluation(tiny, tmp_path, monkeypatch):
    """Two runs trained here and their evaluation by task=pairs: the page's numbers are those of their files."""
    monkeypatch.setattr(training_figures, "draw_run", lambda *args: [])  # longer than all else
    args = tiny_args(tiny, "data=files", "max_steps=2", "eval_every=1", "batch_size=8", "log_every=1")
    for i, eta in enumerate((0.0, 0.5)):
        try:
            train.train(settings(*args, "loss=rpo_sum", f"loss.eta={eta}", f"run_dir={tmp_path / 'sweep' / str(i)}"))
        finally:
            dist.shutdown()
    models = ",".join(str(tmp_path / "sweep" / name / "model") for name in "01")
    try:
        more = ("task=pairs", f"model.path=[{models}]", f"run_dir={tmp_path / 'sweep' / 'pairs'}")
        evaluation.evaluate(settings(*more, name="eval"))
    finally:
        dist.shutdown()
    read, results = report(tmp_path / "out", f"runs={tmp_path / 'sweep'}")
    assert [g["runs"] for g in results["details"]["groups"]] == [["0"], ["1"]]
    last = json.loads((tmp_path / "sweep" / "1" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['rewards/accuracies']:.3f}" in read.text and "1/model" not in read.text
    assert "rewards/accuracies: DPO" in read.text and "Not measured: the quality of answers" in read.text
