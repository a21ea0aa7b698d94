"""What a report finds in folders: whole, broken and hostile runs and evaluations, in groups with verdicts and notes."""

import json
import random

from rpo.errors import UserError
from rpo.reporting import collect, render, sections, tables
from rpo.runs import folder as run_folder
from tests.helpers.left_behind import leave, leave_evaluation, leave_run, leave_study, leave_sweep, point, sample


def collected(runs=(), results=()):
    return collect.collect(list(map(str, runs)), list(map(str, results)))


def kinds(report):
    return {group.label: group.verdict.kind for group in report.groups}


# ---- runs


def test_groups_and_labels(base, tmp_path):
    """Runs that differ in seeds are one group; `short` leaves out what all labels say; means are of what the verdict is on."""
    sweep = leave_sweep(tmp_path / "sweep", base)
    report = collected([sweep])
    assert [(g.label, g.short, [m.name for m in g.members]) for g in report.groups] == [
        ("DPO beta 0.01", "DPO", ["0", "1", "2"]),
        ("RPO sum beta 0.01 eta 0.25", "RPO sum eta 0.25", ["3", "4", "5"]),
    ]
    assert list(kinds(report).values()) == ["overoptimised", "no overoptimisation seen"]
    assert collect.shortened(["A beta 1", "A beta 1 seed=2"]) == (["A", "A seed=2"], ["beta 1"])
    assert collect.shortened(["A beta 1", "A beta 1"]) == (["A beta 1", "A beta 1"], [])
    leave_study(sweep / "study", [sweep / name for name in "0135"])
    first, second = collected([sweep]).groups
    assert [m.name for m in first.judged] == ["0", "1"] and [m.name for m in second.judged] == ["3", "5"]
    assert "task=overopt measured 2 of 3; the verdict is on these." in first.verdict.notes


def test_what_did_not_finish_is_named(base, tmp_path):
    """Failed, interrupted, killed, half-written and never started runs are named; the verdict is on what finished."""
    sweep = leave_sweep(tmp_path / "sweep", base)
    run_folder.write_json(sweep / "sweep.json", [{"cell": i, "seed": str(i), "loss.eta": "0"} for i in range(8)])
    run_folder.write_status(sweep / "0", "failed", "UserError: no room", 7)
    run_folder.write_status(sweep / "1", "interrupted", "SIGTERM", 20)
    run_folder.write_status(sweep / "3", "running", "", 20)
    (sweep / "6").mkdir()
    run_folder.write_status(sweep / "6", "failed", "UserError: loss.beta=-1")
    with (sweep / "2" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(point(40) | {"gold": float("nan"), "kl": float("inf")}) + '\n{"split": "eval", "st')
    report = collected([sweep])
    assert [note for group in report.groups for note in group.verdict.notes if note.startswith("Run")] == [
        "Run 0 failed at step 7: UserError: no room.",
        "Run 1 was interrupted at step 20: SIGTERM.",
        "Run 2: 1 unreadable line of metrics.jsonl skipped.",
        "Run 2: kl, gold at step 40 not finite, skipped.",
        "Run 3 is running, or was killed at step 20.",
        "Run 6 failed: UserError: loss.beta=-1.",
    ]
    assert report.notes == [f"{sweep}: cells of the sweep that were not started: 7"]
    assert kinds(report)["seed=6 loss.eta=0"] == "no run finished"


def test_runs_with_one_setting_and_seed_stand_apart(base, tmp_path):
    """A copy of a run is no second seed: each of the two is judged by itself, with a note; other groups stay."""
    for name in "ab":
        leave_run(tmp_path / "runs" / name, base, shift=-3.0)
    for seed in (1, 2):
        leave_run(tmp_path / "runs" / f"c{seed}", base, eta=0.5, seed=seed)
    report = collected([tmp_path / "runs"])
    assert [(g.label, [m.name for m in g.members]) for g in report.groups] == [
        ("RPO sum beta 0.01 eta 0.5", ["c1", "c2"]),
        ("DPO beta 0.01 (a)", ["a"]),
        ("DPO beta 0.01 (b)", ["b"]),
    ]
    assert "each is shown by itself" in report.notes[0]
    assert set(kinds(report).values()) == {"signs of overoptimisation"}  # chosen fell 90 nats, or 30


def test_malformed_settings(base, tmp_path):
    """A run whose config.yaml has something else where groups and labels are read stands by itself; nothing is raised."""
    odd = [("preference", 7), ("beta", "x"), ("beta", None), ("beta", float("nan")), ("eta", "x")]
    odd += [("label_smoothing", "x"), ("seed", "x"), ("seed", [1]), ("seed", float("nan"))]
    for i, (key, value) in enumerate(odd):
        file = leave_run(tmp_path / "runs" / str(i), base) / "config.yaml"
        own = json.loads(file.read_text())
        (own if key == "seed" else own["loss"])[key] = value
        file.write_text(json.dumps(own))
    leave_run(tmp_path / "runs" / "whole", base)
    (leave_run(tmp_path / "runs" / "old", base) / "config.yaml").write_text("loss: {kind: dpo}\n")
    for name, text in {"broken": "a: [", "other": "learner: x\n"}.items():
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "config.yaml").write_text(text)
    report = collected([tmp_path / "runs"])
    alone = sum("settings of another version; shown by itself" in note for note in report.notes)
    assert alone == len(odd) + 1 and len(report.groups) == alone + 1
    assert any("is not the settings of a run" in note for note in report.notes)
    assert any("is not that of a run or an evaluation" in note for note in report.notes)
    render.html(sections.layout(report, "t", [], 5, {}))


def test_linked_runs_are_found(base, tmp_path):
    """A folder of links to runs that lie elsewhere is as good as the runs, each once, also where a link leads in a circle."""
    elsewhere = leave_sweep(tmp_path / "elsewhere", base)
    study = tmp_path / "study"
    leave_run(study / "own", base, seed=9)
    (study / "linked").symlink_to(elsewhere / "0")
    (study / "again").symlink_to(elsewhere / "0")
    (study / "circle").symlink_to(tmp_path)
    (study / "broken").symlink_to(tmp_path / "nowhere")
    found = {str(member.record.folder) for member in collected([study]).members}
    assert found == {str(study / "own"), *(str(elsewhere / str(i)) for i in range(6))}


def test_means_are_of_the_runs_that_the_verdict_is_on(base, tmp_path):
    """Where no run finished, one that failed is in no mean: its last evaluation is no end of training."""
    leave_run(tmp_path / "a", base, seed=0, shift=-1.0, state="interrupted")
    leave_run(tmp_path / "b", base, seed=1, shift=-99.0, state="failed")
    (arm,) = collected([tmp_path]).groups
    assert arm.end("shift/chosen") == (-30.0, None)
    run_folder.write_status(tmp_path / "a", "failed")
    (arm,) = collected([tmp_path]).groups
    assert arm.end("shift/chosen") is None and arm.verdict.kind == "no run finished"


def test_runs_on_other_data_under_one_name_are_noted(base, tmp_path):
    """Two seeds whose data.train was written anew between them are noted; a seed of other embedded data is not."""
    for seed, digest in enumerate(("one", "one", "two")):
        folder = leave_run(tmp_path / str(seed), base, seed=seed)
        run_folder.write_json(folder / "data_report.json", {"digests": {"data.train": digest, "data.eval": "same"}})
    (note,) = collected([tmp_path]).notes
    both = f"{tmp_path}/0 and {tmp_path}/2"
    assert note == f"{both} had other data under one name (data.train): do not compare or average their numbers"
    settings = json.loads((folder / "config.yaml").read_text())
    settings["data"]["gold"]["seed"] = 5
    (folder / "config.yaml").write_text(json.dumps(settings))
    assert collected([tmp_path]).notes == []


# ---- evaluations


def test_models_are_named_by_their_arm(base, tmp_path):
    """The model of a run has its arm's name, others their path without what all share."""
    sweep = leave_sweep(tmp_path / "sweep", base)
    models = [f"{sweep}/0/model", f"{sweep}/4", "hub/x"]
    (read,) = collected([sweep], [leave_evaluation(tmp_path / "e", {m: [1.0, 0.0] for m in models})]).evaluations
    assert [read.name(model) for model in models] == ["DPO (run 0)", "RPO sum eta 0.25 (run 4)", "hub/x"]
    assert read.name("elsewhere") == "elsewhere"


def test_win_rates_of_one_column_are_against_one_model(base, tmp_path):
    """Arms that were judged against another model, or by another judge, have no rate beside the first arm's."""
    sweep = leave_sweep(tmp_path / "sweep", base)
    first, second = (f"{sweep}/{i}/model" for i in (0, 3))

    def judged(name, met, value, judge="j"):
        """An evaluation of one model against the other."""
        own = [sample(met[0], "q", {"win_rate": value}, against={"model": met[1], "response": "x"})]
        cell = {"value": value, "se": 0.1, "interval": [value - 0.2, value + 0.2], "n": 9, "n_error": 0}
        return leave(tmp_path / name, "winrate", {met[0]: {"win_rate": cell}}, own, details={"judge": {"model": judge}})

    def column(*evaluations):
        table = tables.arms(collected([sweep], evaluations))
        at = table.head.index("Win rate")
        return [row[at].text for row in table.rows]

    one = judged("one", (first, "hub/x"), 0.75)
    assert column(one, judged("alike", (second, "hub/x"), 0.25)) == ["75%", "25%"]
    assert column(one, judged("other", (second, "hub/y"), 0.25)) == ["75%", "-"]
    assert column(one, judged("elsewhere", (second, "hub/x"), 0.25, judge="k")) == ["75%", "-"]


def test_results_that_do_not_compare(tmp_path):
    """Evaluations of one task without a common item, or by other judges, are noted; too many errors make a model unusable."""
    a = leave_evaluation(tmp_path / "a", {"m": [1.0, 0.0]}, errors=3)
    b = leave_evaluation(tmp_path / "b", {"m": [1.0, 1.0]})
    report = collected(results=[a, b])
    assert report.notes == [] and [each.unusable("m") for each in report.evaluations] == [
        "3 items failed, 3 with: timed out",
        None,
    ]
    c = leave_evaluation(tmp_path / "c", {"m": [1.0, 1.0]}, ids="other")
    (note,) = collected(results=[b, c]).notes
    assert note == f"{b} and {c}, of task=pairs, have no item in common: do not compare their numbers"
    judged = [
        leave_evaluation(tmp_path / name, {"m": [1.0]}, details={"judge": {"model": name, "prompt": "own"}})
        for name in ("j", "k")
    ]
    assert "had different judges (judge j and k)" in collected(results=judged).notes[0]


def test_torn_and_odd_samples(tmp_path):
    """Half a line and lines that hold no item are skipped, counted in a note; scores and cells that are no numbers are dropped."""
    folder = leave_evaluation(tmp_path / "e", {"m": [1.0]})
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"model": "m"}\n[1]\n' + json.dumps(sample("m", "x", {"a": float("nan"), "c": 2})) + "\n")
        file.write(json.dumps(sample("m", 7, {})) + '\n{"model": "m", "id"')
    content = json.loads((folder / "results.json").read_text())
    content["models"]["m"]["accuracy"] |= {"value": float("inf"), "se": "x", "interval": [0, None]}
    run_folder.write_json(folder / "results.json", content)
    (read,) = collected(results=[folder]).evaluations
    assert [(each.id, each.scores) for each in read.items] == [("q0", {"accuracy": 1.0}), ("x", {"c": 2})]
    assert read.notes == ["4 lines of samples.jsonl hold no item and were skipped."]
    cell = read.models["m"]["accuracy"]
    assert (cell["value"], cell["se"], cell["interval"], cell["n"]) == (None, None, None, 1)


def test_damaged_results_are_one_line_or_a_page(base, tmp_path):
    """A study's results with any one value replaced by another kind of thing give a UserError of one line, or a page."""
    runs = [leave_run(tmp_path / str(eta), base, eta=eta) for eta in (0.0, 0.25)]
    file = leave_study(tmp_path / "study", runs) / "results.json"
    whole, rng, refused = file.read_text(), random.Random(0), 0
    for _ in range(25):
        content, spots = json.loads(whole), []

        def walk(node, spots=spots):
            for key in node if isinstance(node, dict) else range(len(node)):
                spots.append((node, key))
                if isinstance(node[key], dict | list):
                    walk(node[key])

        walk(content["details"]["runs"])
        node, key = rng.choice(spots)
        node[key] = rng.choice([None, -1, "x", [], {}, float("nan"), 1e308, True, {"value": "y"}])
        file.write_text(json.dumps(content))
        try:
            report = collected(results=[file])
        except UserError as error:
            assert "\n" not in str(error) and str(file) in str(error)
            refused += 1
        else:
            page = sections.layout(report, "t", ["x"], 5, {})
            html = render.html(page | {"figure": None, "charts": []})  # drawing takes longest
            assert "<h2>Verdicts in words" in html
    assert 0 < refused < 25
