"""A multirun: cells checked first, one folder, a table of all cells, failures as rows; in one process and under torchrun."""

import csv
import gc
import json
import runpy
import subprocess

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from rpo import dist
from rpo.errors import UserError
from rpo.evals import context
from rpo.model import hf
from rpo.model.policy import Policy
from rpo.runs import log, process
from rpo.training import prepare
from rpo.training import sweep as sweep_module
from tests.helpers.runs import ROOT, command, run, script_env, timeless, tiny_args, weights

GRID = ("loss=rpo_sum", "sample_every=2", "data.max_length=512")
SHORT = ("batch_size=8", "max_steps=3", "log_every=1", "eval_every=0")


def sweep(tiny, tmp_path, *more, ranks=1, cache=None):
    """The finished process of a multirun into tmp_path/sweep, started in a folder of its own."""
    cwd = tmp_path / "cwd"
    cwd.mkdir(exist_ok=True)
    args = command("train.py", "-m", *tiny_args(tiny, *SHORT, f"run_dir={tmp_path / 'sweep'}", *more), ranks=ranks)
    env = script_env(**({"RPO_CACHE": str(cache)} if cache else {}))
    done = subprocess.run(args, env=env, cwd=cwd, capture_output=True, text=True, timeout=200)
    assert not list(cwd.iterdir()), "a run litters the folder that it is started in"
    return done


def rows(folder):
    """The table, read back from both files, which agree."""
    table = json.loads((folder / "sweep.json").read_text())
    with (folder / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    text = [{k: "" if v is None else str(v) for k, v in row.items()} for row in table]
    assert [{k: v for k, v in line.items() if k in row} for line, row in zip(lines, text, strict=True)] == text
    return table


@pytest.fixture(scope="module")
def grid(tiny, tmp_path_factory):
    """A 2 x 3 sweep over beta and eta from an empty cache: its folder's parent, and the finished process."""
    base = tmp_path_factory.mktemp("grid")
    return base, sweep(tiny, base, *GRID, "loss.beta=0.02,0.5", "loss.eta=0,0.02,0.5", cache=base / "cache")


def test_a_grid_becomes_a_table(grid):
    """beta x eta makes six numbered runs, a row each with its overrides and last evaluation, and a heat map."""
    base, done = grid
    assert done.returncode == 0, done.stderr[-2000:]
    folder = base / "sweep"
    table = rows(folder)
    cells = [(row["cell"], row["loss"], row["loss.beta"], row["loss.eta"], row["state"], row["step"]) for row in table]
    expected = [(beta, eta) for beta in ("0.02", "0.5") for eta in ("0", "0.02", "0.5")]
    assert cells == [(i, "rpo_sum", *expected[i], "finished", 3) for i in range(6)]
    for row in table:
        run = folder / str(row["cell"])
        last = log.read_jsonl(run / "metrics.jsonl")[-1]
        assert last["split"] == "eval" and row["eval/loss"] == last["loss"]
        assert row["eval/shift/chosen"] == last["shift/chosen"]
        assert (run / "model/model.safetensors").exists()
        assert f"beta: {row['loss.beta']}" in (run / "config.yaml").read_text()
    assert len({row["eval/loss"] for row in table}) == 6
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_cells_share_one_reference_pass_and_nothing_else(tiny, grid, tmp_path):
    """Six cells score the reference once; the last logs, samples and saves, bit for bit, what a process of its own does."""
    base, done = grid
    assert [line for line in done.stdout.splitlines() if line.startswith("reference:")] == [
        "reference: scored 40 of 40 train pairs, 0 from the cache",
        "reference: scored 12 of 12 eval pairs, 0 from the cache",
    ]
    alone = [*tiny_args(tiny, *SHORT, *GRID), "loss.beta=0.5", "loss.eta=0.5", f"run_dir={tmp_path / 'alone'}"]
    env = script_env(RPO_CACHE=str(base / "cache"))
    done = subprocess.run(command("train.py", *alone), env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "reference: all 40 train pairs from the cache" in done.stdout
    folders = base / "sweep/5", tmp_path / "alone"
    cell, fresh = ([facts(event) for event in log.read_jsonl(folder / "metrics.jsonl")] for folder in folders)
    assert cell == fresh and len(cell) == 5
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_what_a_failed_cell_leaves_is_not_kept(monkeypatch):
    """A cell that breaks off between micro-batches leaves gradients on the shared model: the next makes its own."""
    monkeypatch.setattr(sweep_module, "in_sweep", lambda: True)
    monkeypatch.setattr(sweep_module, "_record_failure", lambda reason: None)
    build = sweep_module.shared(lambda *_, **__: object())
    kept = build("key", more=1)
    assert build("key", more=1) is kept

    def breaks_off():
        raise RuntimeError("out of memory")

    sweep_module.run_job(breaks_off)
    again = build("key", more=1)
    assert again is not kept
    assert build("key", more=2) is not again  # every argument counts
    sweep_module._KEPT.clear()


def test_a_table_that_can_not_be_written_fails_the_sweep(tmp_path, capsys):
    """Hydra turns what a callback raises into a warning and exit code 0: here it is a line, and 1."""
    assert sweep_module._closed(tmp_path) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: the sweep's table could not be written: ")


def facts(event):
    """An event without what the clock says."""
    return {name: value for name, value in event.items() if name != "time" and not name.startswith("perf/")}


def test_a_folder_with_a_sweep_is_refused(tiny, grid):
    """A second sweep into the same folder ends before its first cell, and the first's table stays."""
    base, _ = grid
    folder = base / "sweep"
    table = rows(folder)
    again = sweep(tiny, base, "loss.beta=0.02,0.1")
    assert again.returncode == 2
    assert (
        again.stderr
        == f"error: run_dir={folder}: holds a sweep of other cells; give its command again, or another run_dir\n"
    )
    assert rows(folder) == table


def test_a_failed_cell_is_a_row(tiny, tmp_path):
    """A cell whose data is missing is a row with its reason; the others finish; the exit code is 1."""
    done = sweep(tiny, tmp_path, f"data.train={tmp_path / 'MISSING.jsonl'},{tiny / 'train.jsonl.gz'}", "data.eval=null")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    failed, finished = rows(tmp_path / "sweep")
    assert (failed["state"], finished["state"]) == ("failed", "finished")
    assert "MISSING.jsonl: no such file" in failed["reason"]
    assert finished["train/loss"] > 0  # without held-out data, the last training line
    status = json.loads((tmp_path / "sweep/0/status.json").read_text())
    assert status["state"] == "failed" and status["reason"] == failed["reason"]


@pytest.mark.parametrize(
    ("bad", "code", "message"),
    [
        ("loss.beta=0.02,-1", 2, r"error: loss.beta=-1: expected > 0"),
        ("loss=dpo,nosuch", 2, "error: loss=dpo,nosuch: conf/loss has no nosuch; there are chi_po"),
        ("seed=shuffle(1,2,3)", 2, "error: seed=shuffle(1,2,3): gives its values in another order each time"),
        ("seed=shuffle(range(0,9))", 2, "error: seed=shuffle(range(0,9)): gives its values in another order"),
        ("run_dir=A,B", 2, "error: run_dir=A,B: a cell's folder is its number"),
    ],
)
def test_a_bad_later_cell_stops_the_sweep_before_the_first(bad, code, message, tiny, tmp_path):
    """All cells are checked first: a bad value (ours: 2) or group (Hydra's: 1) in a later one leaves nothing behind.

    So do values that Hydra shuffles when it lists the cells, for the table would be labelled by another shuffle.
    """
    done = sweep(tiny, tmp_path, bad)
    assert done.returncode == code
    assert done.stderr.startswith(message) and "Warning" not in done.stderr
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_sweep_under_torchrun(tiny, tmp_path):
    """Two ranks agree on one folder and keep their group from cell to cell, past a cell whose data rank 0 refuses."""
    done = sweep(tiny, tmp_path, "loss=rpo_avg", "data.max_length=3,128", ranks=2)
    assert done.returncode == 1, done.stderr[-2000:]
    failed, finished = rows(tmp_path / "sweep")
    assert failed["state"] == "failed" and "data.max_length=3" in failed["reason"]
    assert (finished["state"], finished["step"]) == ("finished", 3)
    run = tmp_path / "sweep/1"
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert len(log.read_jsonl(run / "metrics.jsonl")) == 2 + 3
    assert (tmp_path / "sweep/sweep.png").exists()


def test_cells_leave_no_model_that_the_next_does_not_need(tiny, tmp_path, monkeypatch):
    """Before a cell loads weights none of an earlier one is alive, be it policy, live reference or in a key of what is kept."""
    for module in (sweep_module, prepare):
        monkeypatch.setattr(module, "in_sweep", lambda: True)
    alive, load = [], hf.load

    def policies():
        gc.collect()
        return sum(issubclass(type(each), Policy) for each in gc.get_objects())

    def counted(*args, **more):
        alive.append(policies() - others)
        return load(*args, **more)

    monkeypatch.setattr(hf, "load", counted)
    cells, others = [("reference=live",), (), ("seed=1",), ("loss=sft", "seed=2")], policies()  # of other tests
    try:
        for i, cell in enumerate(cells):
            run(tiny, tmp_path / str(i), "max_steps=1", "checkpoint.every=0", *cell)
    finally:
        sweep_module._KEPT.clear()
    assert alive == [0, 1, 0, 0]  # the second is the live reference, beside its policy


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Runs a script in this process up to its folder: (exit code, the run_dir of each run that it would have made)."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def stop(cfg):
        dist.init()
        seen.append(cfg.run_dir)
        raise UserError("stopped")

    monkeypatch.setattr(prepare, "check_machine", lambda cfg, device: stop(cfg))
    monkeypatch.setattr(context.Context, "__init__", lambda self, cfg, device: stop(cfg))

    def play(name, *args):
        seen.clear()
        monkeypatch.setattr("sys.argv", [str(ROOT / name), *args])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        HydraConfig.instance().cfg = None
        while process.Interrupt.innermost:
            process.Interrupt.innermost.__exit__()
        dist.shutdown()
        return left.value.code, list(seen)

    return play


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-m", "hydra.run.dir=X", "seed=0,1"), "hydra.run.dir=X: not used here, give run_dir; remove it"),
        (("hydra.sweep.dir=X",), "hydra.sweep.dir=X: not used here, give run_dir; remove it"),
        (("-m", "hydra.sweep.subdir=a_${hydra.job.num}", "seed=0,1"), "hydra.sweep.subdir=a_"),
        (("hydra.job.chdir=true",), "hydra.job.chdir=true: not used here, paths start from the folder of the command"),
        (
            ("hydra.run.dir=X", "run_dir=Y"),
            "hydra.run.dir=X with run_dir=Y: two names for one folder; give run_dir alone",
        ),
    ],
)
def test_hydras_own_folders_that_mean_nothing_here_are_refused(args, message, script, capsys):
    """In one line, before a model is loaded, and with exit code 2: never read over."""
    assert script("train.py", *args) == (2, [])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1, error


def test_hydras_own_names_of_the_folder_are_obeyed(script, tmp_path):
    """hydra.run.dir is a run's run_dir, of train.py and eval.py, and hydra.sweep.dir a sweep's, whose cells are its children."""
    assert script("train.py", "hydra.run.dir=one/${seed}", "seed=7") == (2, ["one/7"])
    assert script("eval.py", "hydra.run.dir=two", "model.path=M", "data.eval=F") == (2, ["two"])
    assert script("train.py", "-m", 'hydra.sweep.dir="it\'s"', "seed=0,1") == (1, ["it's/0", "it's/1"])
    assert (tmp_path / "it's/sweep.csv").exists()


@pytest.mark.slow
def test_joblib_makes_the_same_sweep(tiny, tmp_path):
    """Twelve cells by two of joblib's processes: the weights and numbers of the serial sweep bit for bit, one reference pass."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs pip install -e '.[launchers]'")
    grid = ("loss=rpo_sum", "loss.beta=0.02,0.05,0.1", "loss.eta=0,0.005,0.05,0.25")
    printed = {}
    for name, *more in (("serial",), ("joblib", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")):
        args = tiny_args(tiny, *SHORT, *grid, *more, f"run_dir={tmp_path / name}", f"cache_dir={tmp_path / name}_cache")
        done = subprocess.run(
            command("train.py", "-m", *args), env=script_env(), cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        printed[name] = done.stdout
    assert (
        printed["joblib"].count("reference: scored") == printed["serial"].count("reference: scored") == 2
    )  # train, eval
    serial, parallel = (rows(tmp_path / name) for name in printed)
    assert [row["state"] for row in parallel] == ["finished"] * 12
    assert (tmp_path / "joblib" / "sweep.png").exists()
    for cell in range(12):
        events = [timeless(log.read_jsonl(tmp_path / name / str(cell) / "metrics.jsonl")) for name in printed]
        theirs, ours = (weights(tmp_path / name / str(cell) / "model") for name in printed)
        assert events[0] == events[1] and all(torch.equal(theirs[key], ours[key]) for key in theirs)
