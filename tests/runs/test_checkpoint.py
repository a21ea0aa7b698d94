"""Checkpoints: exact resume, whole or not at all, and nothing but the same run goes on from one."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.torch_version import TorchVersion

import train
from rpo import config as config_module
from rpo import dist
from rpo.config import Checkpoint
from rpo.data import dataset as data_dataset
from rpo.data import schedule as data_schedule
from rpo.errors import UserError
from rpo.runs import checkpoint, log
from rpo.runs import folder as run_folder
from rpo.runs import state as runs_state
from rpo.runs.state import TrainState
from tests.helpers.models import make_lm
from tests.helpers.rows import make_rows_json, write_jsonl
from tests.helpers.runs import settings, timeless, tiny_args
from tests.helpers.wandb_file import history_of

# 40 pairs in steps of 8: 5 steps are an epoch, so 7 ends in the middle of the second.
RUN = (
    "loss=rpo_avg",
    "batch_size=8",
    "max_steps=12",
    "log_every=3",
    "eval_every=4",
    "sample_every=6",
    "checkpoint.every=2",
)


class Killed(BaseException):
    """What stands for a SIGKILL within this process: no handler of the run's knows it."""


def run(tiny, run_dir, *more, kill_at=None):
    """A run in this process; with `kill_at` it ends there as a killed one does, its next update just begun."""
    with pytest.MonkeyPatch.context() as patch:
        if kill_at is not None:
            step_rows = data_schedule.step_rows

            def or_die(step, *args):
                if step == kill_at:
                    raise Killed
                return step_rows(step, *args)

            patch.setattr(data_schedule, "step_rows", or_die)
        try:
            return train.train(settings(*tiny_args(tiny, *RUN, *more, f"run_dir={run_dir}")))
        except Killed:
            return "killed"
        finally:
            dist.shutdown()


def state_of(folder):
    """All of a checkpoint that an update depends on: tensors by name, and state.json without the clock."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    state = json.loads((folder / "state.json").read_text())
    del state["position"]["seconds"], state["position"]["metrics.jsonl"]  # the lines' times are of other lengths
    return tensors, state


def assert_equal_runs(ours, theirs):
    """Metrics (time and perf/ aside), samples, weights, moments, counters, RNG: all the same, bit for bit."""
    a, b = (timeless(log.read_jsonl(folder / "metrics.jsonl")) for folder in (ours, theirs))
    assert a == b
    a, b = (folder / "samples.jsonl" for folder in (ours, theirs))
    assert a.exists() == b.exists() and (not a.exists() or a.read_bytes() == b.read_bytes())
    steps = [sorted(path.name for path in (folder / "checkpoints").glob("step_*")) for folder in (ours, theirs)]
    assert steps[0] == steps[1] and steps[0]
    for name in steps[0]:
        (tensors, state), (other_tensors, other_state) = (state_of(f / "checkpoints" / name) for f in (ours, theirs))
        assert state == other_state
        assert tensors.keys() == other_tensors.keys()
        assert all(torch.equal(tensors[key], other_tensors[key]) for key in tensors)
    a, b = (load_file(folder / "model/model.safetensors") for folder in (ours, theirs))
    assert all(torch.equal(a[key], b[key]) for key in a | b)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(tiny, folder, "checkpoint.keep=all") == "finished"
    return folder


def copied(folder, tmp_path):
    """The run at `folder`, whose newest checkpoint is of step 10 and whose process then died."""
    mine = tmp_path / "run"
    shutil.copytree(folder, mine, symlinks=True)
    shutil.rmtree(mine / "model")
    shutil.rmtree(mine / "checkpoints/step_00000012")
    (mine / "checkpoints/latest").unlink()
    (mine / "checkpoints/latest").symlink_to("step_00000010")
    run_folder.write_status(mine, "running", step=0)
    return mine


# ---- exact


def test_what_a_checkpoint_holds(whole):
    """Weights and both moments of every parameter, under a manifest; latest is a link to the newest; no other files."""
    folder = whole / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", *(f"step_{i:08d}" for i in range(2, 13, 2))]
    assert (folder / "latest").resolve().name == "step_00000012"
    tensors, state = state_of(folder / "step_00000006")
    names = {key.removeprefix("weight/") for key in tensors if key.startswith("weight/")}
    assert names == {f"lm.{name}" for name, _ in make_lm().named_parameters()}
    for name in names:
        assert tensors[f"exp_avg/{name}"].shape == tensors[f"weight/{name}"].shape
        assert tensors[f"exp_avg_sq/{name}"].abs().max() > 0 and tensors[f"step/{name}"] == 6
    assert (state["step"], state["pairs"], state["evaluated"]) == (6, 48, True)
    assert {"data.train", "data.eval", "model.path", "model.tokenizer", "reference.path"} == state["facts"].keys()
    files = {path.name for path in (folder / "step_00000006").iterdir()}
    assert files == json.loads((folder / "step_00000006/manifest.json").read_text())["files"].keys() | {"manifest.json"}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="packed"),
        pytest.param(("layout=padded", "reference=live", "checkpoint.blocking=true"), id="padded"),
        pytest.param(
            ("tokens_per_microbatch=128", "fsdp.accumulate=sharded", "fsdp.activation_checkpointing=full"),
            id="accumulating",
            marks=pytest.mark.slow,
        ),
        pytest.param(("model.dtype=float64", "loss=sft"), id="float64", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_exactly(more, tiny, whole, tmp_path):
    """Killed between two checkpoints and two lines of the log, in the second epoch too: equal, bit for bit."""
    args = ("checkpoint.keep=all",)
    if more:
        args, whole = ("sample_every=0", *more), tmp_path / "whole"
        assert run(tiny, whole, *args) == "finished"
    else:
        assert run(tiny, tmp_path / "run", *args, kill_at=5) == "killed"
    assert run(tiny, tmp_path / "run", *args, kill_at=8) == "killed"
    assert run(tiny, tmp_path / "run", *args) == "finished"
    assert_equal_runs(tmp_path / "run", whole)


def test_the_reference_is_scored_by_the_starting_weights(tiny, whole, tmp_path):
    """With the cache gone a resumed run makes it anew from the weights it began with, and stays equal."""
    mine = copied(whole, tmp_path)
    assert run(tiny, mine, "checkpoint.keep=all", f"reference.cache_dir={tmp_path / 'cache'}") == "finished"
    assert_equal_runs(mine, whole)
    environment = json.loads((mine / "environment.json").read_text())
    assert environment["first_step"] == 10 and environment["reference"]["train"]["scored"] == 40
    assert [start["first_step"] for start in environment["before"]] == [0]


def test_a_changed_loss_may_use_the_global_generators(tmp_path):
    """torch's, numpy's and Python's random numbers go on where they were, through JSON."""
    state = json.loads(json.dumps(runs_state.rng_state()))

    def draw():
        return torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()

    first = draw()
    assert draw() != first
    runs_state.set_rng_state(state)
    assert draw() == first


def test_a_longer_run_goes_on_from_a_finished_one(tiny, tmp_path):
    """A finished run is left as it is by the same command, and goes on where max_steps was raised."""
    folder = tmp_path / "run"
    short = ("max_steps=4", "sample_every=0")
    assert run(tiny, folder, *short) == "finished"
    before = (folder / "model/model.safetensors").read_bytes(), (folder / "metrics.jsonl").read_bytes()
    assert run(tiny, folder, *short) == "finished"
    assert before == ((folder / "model/model.safetensors").read_bytes(), (folder / "metrics.jsonl").read_bytes())
    assert run(tiny, folder, *short, "max_steps=6", "log_every=1") == "finished"
    assert [e["step"] for e in log.read_jsonl(folder / "metrics.jsonl")] == [0, 3, 4, 4, 5, 6, 6]
    assert run_folder.read_status(folder) == {"state": "finished", "reason": "", "step": 6}
    with pytest.raises(UserError, match="max_steps: the run to resume has made 6 steps, of 2 that max_steps or epochs"):
        run(tiny, folder, "max_steps=2")


def test_a_longer_run_has_no_model_until_it_ends(tiny, tmp_path):
    """A finished run that is resumed and killed leaves its model/ as model.old: as model/ it would pass for the run's."""
    folder = tmp_path / "run"
    short = ("max_steps=4", "sample_every=0")
    run(tiny, folder, *short)
    before = (folder / "model/model.safetensors").read_bytes()
    assert run(tiny, folder, *short, "max_steps=8", kill_at=6) == "killed"
    assert not (folder / "model").exists() and (folder / "model.old/model.safetensors").read_bytes() == before
    assert run(tiny, folder, *short, "max_steps=8") == "finished"
    assert (folder / "model/model.safetensors").read_bytes() != before and not (folder / "model.old").exists()


def test_a_run_that_finished_with_other_data_is_not_the_same(tiny, tmp_path):
    """Without checkpoints too, the command of a finished run is refused once its data has changed, instead of called done."""
    data = write_jsonl(tmp_path / "train.jsonl", make_rows_json(16, seed=3))
    own = ("max_steps=2", "sample_every=0", "checkpoint.every=0", f"data.train={data}")
    assert run(tiny, tmp_path / "run", *own) == run(tiny, tmp_path / "run", *own) == "finished"
    write_jsonl(data, make_rows_json(16, seed=4))
    with pytest.raises(
        UserError, match=r"data.train: 16 rows of \d+ tokens, sha256 .*, but 16 rows .* when .*/run ran"
    ):
        run(tiny, tmp_path / "run", *own)


def test_a_copy_whose_links_became_folders_goes_on(tiny, whole, tmp_path):
    """scp -r and cp -L copy what checkpoints/latest and best lead to: such a copy resumes, and has links again."""
    mine = tmp_path / "run"
    shutil.copytree(whole, mine)
    assert not (mine / "checkpoints/latest").is_symlink()
    assert run(tiny, mine, "checkpoint.keep=all", "max_steps=14") == "finished"
    assert (mine / "checkpoints/latest").readlink() == Path("step_00000014")


@pytest.mark.slow
def test_a_fork_leaves_its_origin_alone(tiny, whole, tmp_path):
    """resume=PATH goes on in a folder of its own, from a run, one of its checkpoints or a link, and ends equal."""
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    for name, path in (
        ("old", whole / "checkpoints/step_00000004"),
        ("run", whole),
        ("link", whole / "checkpoints/latest"),
    ):
        assert run(tiny, tmp_path / name, f"resume={path}", "checkpoint.keep=all") == "finished"
        a, b = (timeless(log.read_jsonl(folder / "metrics.jsonl")) for folder in (tmp_path / name, whole))
        assert a == b and (tmp_path / name / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
        a, b = (load_file(folder / "model/model.safetensors") for folder in (tmp_path / name, whole))
        assert all(torch.equal(a[key], b[key]) for key in a | b)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    with pytest.raises(
        UserError, match=r"^resume=.*/nowhere: no whole checkpoint there; expected auto, never, a run's"
    ):
        run(tiny, tmp_path / "new", f"resume={tmp_path / 'nowhere'}")


@pytest.mark.slow
def test_wandb_goes_on_without_gap_or_duplicate(tiny, whole, tmp_path):
    """Two starts of one run are one wandb run, and together hold every event of metrics.jsonl once, in order."""
    import wandb  # a GPU machine may lack it

    folder, more = tmp_path / "run", ("wandb.mode=offline", "sample_every=4")
    assert (
        run(tiny, folder, *more, kill_at=5) == "killed"
    )  # line 3 and evaluation 4 are written, checkpoint 4 is the last
    assert run(tiny, folder, *more, "checkpoint.every=4", kill_at=7) == "killed"  # again from 4; line 6 is written
    assert run(tiny, folder, *more, "checkpoint.every=4") == "finished"
    wandb.teardown()
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    (name,) = {path.name for path in files}
    assert name == f"run-{json.loads((folder / 'wandb/resume.json').read_text())['id']}.wandb" and len(files) == 3
    told = [row for path in files for row in history_of(path)]
    events = log.read_jsonl(folder / "metrics.jsonl")
    lines = [row for row in told if "step" in row]
    assert [row["step"] for row in lines] == [event["step"] for event in events]
    for row, event in zip(lines, events, strict=True):
        assert row[f"{event['split']}/loss"] == event["loss"]
    assert sum("samples/_type" in row for row in told) == 4  # steps 0, 4, 8 and 12
    assert [row["_step"] for row in told] == list(range(len(told)))
    assert (
        run(tiny, tmp_path / "fork", *more, f"resume={folder / 'checkpoints/step_00000008'}", "log_every=1")
        == "finished"
    )
    wandb.teardown()
    (path,) = (tmp_path / "fork/wandb").glob("offline-run-*/*.wandb")
    assert [row["step"] for row in history_of(path) if "step" in row] == [9, 10, 11, 12, 12]


# ---- whole or not at all


def flip(path, generator):
    """One bit of a file, or its last bytes, are lost; which, the generator says."""
    content = bytearray(path.read_bytes())
    if generator.random() < 0.3:
        path.write_bytes(content[: int(generator.integers(len(content)))])
    else:
        content[int(generator.integers(len(content)))] ^= 1 << int(generator.integers(8))
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "state.json", "manifest.json"])
def test_a_damaged_one_is_skipped(name, whole, tmp_path, group, capsys):
    """A flipped bit, a cut or a missing file anywhere: the checkpoint is named and the one before it is taken."""
    mine = copied(whole, tmp_path)
    newest, expected = mine / "checkpoints/step_00000010", mine / "checkpoints/step_00000008"
    content, generator = (newest / name).read_bytes(), np.random.default_rng(0)
    assert checkpoint.find(mine, "auto").folder == newest
    for _ in range(60):
        flip(newest / name, generator)
        assert checkpoint.find(mine, "auto").folder == expected, (newest / name).read_bytes()[:200]
        (newest / name).write_bytes(content)
    capsys.readouterr()
    (newest / name).unlink()
    assert checkpoint.find(mine, "auto").folder == expected
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"checkpoint: {newest} is damaged ({name}") and line.endswith("and skipped")
    shutil.rmtree(mine / "checkpoints")
    assert checkpoint.find(mine, "auto") is None and checkpoint.find(mine, "never") is None


def test_a_run_goes_on_from_the_one_before_a_damaged_one(tiny, whole, tmp_path):
    """Later steps are then made again, the damaged folder is set aside, half-written ones are gone, and all is equal."""
    mine = copied(whole, tmp_path)
    (mine / "checkpoints/step_00000010/state.json").write_text("{")
    (mine / "checkpoints/step_00000012.part").mkdir()
    (mine / "checkpoints/step_00000002.old.part").mkdir()
    assert run(tiny, mine, "checkpoint.keep=all") == "finished"
    assert (mine / "checkpoints/step_00000010.damaged/state.json").read_text() == "{"
    shutil.rmtree(mine / "checkpoints/step_00000010.damaged")
    assert_equal_runs(mine, whole)
    assert not list((mine / "checkpoints").glob("*.part"))


def test_what_is_in_the_folder_is_what_the_manifest_names(whole, tmp_path, group):
    """One that reaches elsewhere or leaves the state out, or a file beside it that torch's reader would take, is damage."""
    mine = copied(whole, tmp_path)
    (tmp_path / "secret").write_text("x")
    newest = mine / "checkpoints/step_00000010"
    path = newest / "manifest.json"
    whole_text, files = path.read_text(), json.loads(path.read_text())["files"]
    entry = {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    without = {name: entry for name, entry in files.items() if name != "state.json"}
    for bad in (files | {"../../../secret": entry}, {"state.json": None}, {}, without):
        path.write_text(json.dumps({"files": bad}))
        assert checkpoint.find(mine, "auto").state["step"] == 8
    path.write_text(whole_text)
    assert checkpoint.find(mine, "auto").state["step"] == 10
    (shard,) = newest.glob("shard-*")
    shutil.copy(shard, newest / "shard-00002-model-00001-of-00001.safetensors")
    assert checkpoint.find(mine, "auto").state["step"] == 8


def test_a_disk_that_does_not_answer_is_not_damage(tiny, whole, tmp_path, monkeypatch):
    """Where a file cannot be read, or none is whole, the run is refused: its record would be cut back and made anew."""
    mine = copied(whole, tmp_path)
    before = (mine / "metrics.jsonl").read_bytes()

    def stale(_path):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sha256", stale)
        with pytest.raises(UserError, match=r"^.*/step_00000010: cannot be read \(Stale file handle\); check the disk"):
            run(tiny, mine)
    for folder in (mine / "checkpoints").glob("step_*"):
        (folder / "state.json").unlink()
    with pytest.raises(UserError, match=f"^run_dir={mine}: none of its checkpoints is whole; put one back, "):
        run(tiny, mine)
    assert (mine / "metrics.jsonl").read_bytes() == before and len(list((mine / "checkpoints").glob("step_*"))) == 5


def test_a_full_disk_costs_one_checkpoint(tiny, whole, tmp_path, monkeypatch, capsys):
    """Too little room, seen before writing, or a disk that fills up: a line, the run goes on, what was there stays whole."""
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    assert run(tiny, tmp_path / "run", "max_steps=4", "sample_every=0") == "finished"
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == []
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoint: ")]
    assert [line.split()[2] for line in said] == ["2", "4"]
    assert all("MiB are needed, 0.1 MiB are free); earlier ones are kept" in line for line in said)

    def full(*_):
        raise OSError(28, "No space left on device")

    mine = copied(whole, tmp_path / "second")
    monkeypatch.setattr(checkpoint, "write_atomic", full)
    assert run(tiny, mine, "checkpoint.keep=all") == "finished"
    assert (mine / "checkpoints/latest").resolve().name == "step_00000010"
    assert len(list((mine / "checkpoints").iterdir())) == 6
    assert "step 12 could not be written" in (out := capsys.readouterr().out) and "(No space left on device)" in out


# ---- which are kept


def test_the_newest_and_the_best_are_kept(tiny, tmp_path):
    """checkpoint.keep newest, and the best by checkpoint.best, which is the best of all that there were."""
    more = ("eval_every=2", "sample_every=0", "optim.lr=3e-2", "optim.schedule=constant", "checkpoint.keep=1")
    assert run(tiny, tmp_path / "run", *more, "checkpoint.best=min:loss", kill_at=7) == "killed"
    assert run(tiny, tmp_path / "run", *more, "checkpoint.best=min:loss") == "finished"
    events = log.read_jsonl(tmp_path / "run/metrics.jsonl")
    losses = {e["step"]: e["loss"] for e in events if e["split"] == "eval" and e["step"]}
    best = min(losses, key=losses.get)
    folder = tmp_path / "run/checkpoints"
    assert (folder / "best").resolve().name == f"step_{best:08d}" and best < 12
    assert {path.name for path in folder.glob("step_*")} == {f"step_{best:08d}", "step_00000012"}


def state_at(step, tensors):
    """A run's state after `step` updates."""
    return TrainState(tensors, torch.zeros(0), seed=0, total_steps=9, facts={}, step=step)


@pytest.fixture
def saved(tmp_path, group):
    """A function that saves a step's few numbers with a metric's value, as the loop would; and the folder."""
    folder = tmp_path / "run"

    def save(checkpoints, step, value):
        return checkpoints.save(state_at(step, {"weight/a": torch.ones(3)}), None, {"loss": value}, wait=True)

    def begin(best="min:loss", keep=1):
        return checkpoint.Checkpoints(
            folder, Checkpoint(1, keep, best, blocking=False, verify="full"), checkpoint.find(folder, "auto")
        )

    return folder / "checkpoints", begin, save


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_changes_after_save_is_not_saved(device, saved):
    """The background writes the numbers of the moment of `save`, however they change while it does."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    folder, begin, _ = saved
    tensors = {f"weight/{i}": torch.full((1000, 100), float(i), device=device) for i in range(20)}
    with begin() as checkpoints:
        for step in (1, 2):  # the second goes through the memory of the first
            assert checkpoints.save(state_at(step, tensors), None, {})
            for tensor in tensors.values():
                tensor += 100
    for tensor in tensors.values():
        tensor.zero_()
    checkpoint.find(folder.parent, "auto").load(tensors)
    assert all(torch.all(tensor == i + 100) for i, tensor in enumerate(tensors.values()))


def test_a_save_that_is_waited_for_makes_no_copy_on_a_cpu(saved, monkeypatch):
    """It writes the tensors themselves, whole."""
    folder, begin, _ = saved
    tensors = {f"weight/{i}": torch.randn(30, 100, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    with begin(keep="all") as checkpoints:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(type(checkpoints.stager), "stage", lambda *_: pytest.fail("copied"))
        assert checkpoints.save(state_at(1, tensors), None, {}, wait=True)
    (file,) = (folder / "latest").glob("*.safetensors")
    written = load_file(file)
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_a_stager_of_torch_2_11_is_used_once(saved, monkeypatch):
    """Where torch's stager closes itself after one use (before 2.13), later saves still succeed."""
    from torch.distributed.checkpoint.staging import DefaultStager

    def stage_once(self, *args, stage=DefaultStager._stage, **kwargs):
        staged = stage(self, *args, **kwargs)
        self._state_dict_stager._deepcopy_dispatch.clear()  # as `close` does there
        return staged

    monkeypatch.setattr(DefaultStager, "_stage", stage_once)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    folder, begin, save = saved
    with begin() as checkpoints:
        assert all(save(checkpoints, step, 1.0) for step in (1, 2, 3))
    assert (folder / "latest").resolve().name == "step_00000003"


def kept(folder):
    best = folder / "best"
    return [int(path.name[5:]) for path in sorted(folder.glob("step_*"))], best.exists() and int(
        best.resolve().name[5:]
    )


def test_a_best_that_could_not_be_written_is_not_the_best(saved, monkeypatch):
    """The one before stays best and stays; so it is with a value that is not a number."""
    folder, begin, save = saved
    with begin() as checkpoints:
        assert save(checkpoints, 1, 0.5)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.shutil, "disk_usage", lambda _path: SimpleNamespace(free=0))
            assert not save(checkpoints, 2, 0.1)
        assert save(checkpoints, 3, float("nan")) and save(checkpoints, 4, 0.6)
        assert kept(folder) == ([1, 4], 1)
        assert save(checkpoints, 5, 0.4)
        assert kept(folder) == ([5], 5)


def test_another_best_begins_anew(saved):
    """A score is compared with scores of the same metric alone; without one the old best is no longer kept."""
    folder, begin, save = saved
    with begin("max:loss") as checkpoints:
        assert save(checkpoints, 1, 0.9) and save(checkpoints, 2, 0.5)
    with begin("min:loss") as checkpoints:
        assert save(checkpoints, 3, 0.7) and save(checkpoints, 4, 0.8)
        assert kept(folder) == ([3, 4], 3)
    with begin(None) as checkpoints:
        assert save(checkpoints, 5, 0.1)
        assert kept(folder) == ([5], False)


# ---- nothing but the same run


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["loss.beta=0.3"],
            r"holds a run with other settings \(loss.beta=0.5, here 0.3\); within a run only cache_dir, checkpoint, ",
        ),
        (["seed=1", "optim.lr=1e-2"], r"other settings \(optim.lr=0.001, here 0.01; seed=0, here 1\)"),
        (["layout=padded"], r"layout.kind=auto, here padded"),
        (["resume=never"], r"already holds a run \(config.yaml\); use another folder or remove it"),
    ],
)
def test_other_settings_are_refused(more, message, tiny, whole, tmp_path):
    """The difference is printed, key by key, and the folder is left as it was."""
    mine = copied(whole, tmp_path)
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"^run_dir={mine}: .*{message}"):
        run(tiny, mine, *more)
    assert before == {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}


def test_other_data_tokenizer_or_weights_are_refused(tiny, tmp_path):
    """Files that changed under the same names are told by content, each by its key; put back, the run goes on."""
    mine = tmp_path / "tiny"
    shutil.copytree(tiny, mine)
    assert run(mine, tmp_path / "run", "max_steps=4", "sample_every=0", kill_at=3) == "killed"
    for name, key in (("train", "data.train"), ("eval", "data.eval")):
        write_jsonl(mine / f"{name}.jsonl.gz", make_rows_json(40, seed=5))
        with pytest.raises(
            UserError, match=rf"^{key}: 40 rows of \d+ tokens, sha256 \w+, but \d+ rows of .* when .*/run started"
        ):
            run(mine, tmp_path / "run", "max_steps=4", "sample_every=0")
        shutil.copy(tiny / f"{name}.jsonl.gz", mine)
    make_lm(seed=1).save_pretrained(mine / "model")
    with pytest.raises(UserError, match=r"^model.path: \w+, but \w+ when .*/run started; restore the file or folder"):
        run(mine, tmp_path / "run", "max_steps=4", "sample_every=0")
    shutil.copytree(tiny / "model", mine / "model", dirs_exist_ok=True)
    assert run(mine, tmp_path / "run", "max_steps=4", "sample_every=0") == "finished"


def test_the_checkpoint_of_another_model_is_refused(whole, group):
    """Shapes and dtypes are compared by name before anything is read."""
    found = checkpoint.find(whole, "auto")
    name = "weight/lm.model.norm.weight"
    for tensor in (torch.zeros(33), torch.zeros(32, dtype=torch.float64)):
        with pytest.raises(UserError, match=rf"holds \(32,\) torch.float32 for {name}, the model has .*another model"):
            found.load({name: tensor})
    with pytest.raises(UserError, match="holds nothing for weight/other"):
        found.load({"weight/other": torch.zeros(3)})


def test_a_model_without_a_checkpoint_is_not_overwritten(tiny, tmp_path):
    """Killed before its first checkpoint a run restarts; with a model/ and no checkpoint to resume from it is refused."""
    folder = tmp_path / "run"
    assert run(tiny, folder, "sample_every=0", "checkpoint.every=0", kill_at=4) == "killed"
    assert run(tiny, folder, "sample_every=0", "checkpoint.every=0", "max_steps=5") == "finished"
    assert [e["step"] for e in log.read_jsonl(folder / "metrics.jsonl")] == [0, 3, 4, 5, 5]
    with pytest.raises(UserError, match=f"run_dir={folder}: holds a model/ and no checkpoint to resume from"):
        run(tiny, folder, "sample_every=0", "checkpoint.every=0", "max_steps=6")


def test_one_process_at_a_time(tiny, tmp_path, group):
    """A folder in which a process is at work is refused to a second, and free again however the first ended."""
    with run_folder.recording(tmp_path / "run", "a: 1\n"):
        with (
            pytest.raises(UserError, match="another process is at work in it"),
            run_folder.recording(tmp_path / "run", "a: 2\n"),
        ):
            pass
        assert (tmp_path / "run/config.yaml").read_text() == "a: 1\n"
    seen = run_folder.stamp(tmp_path / "run")
    with run_folder.recording(tmp_path / "run", "a: 2\n", seen=seen):
        assert run_folder.read_status(tmp_path / "run")["state"] == "running"


def test_what_was_looked_up_before_another_process_came_is_not_used(tiny, whole, tmp_path, monkeypatch):
    """A folder that another process took and left, while this one still loaded its data, is refused and stays as it is."""
    mine, load = copied(whole, tmp_path), data_dataset.load

    def slowly(*args, **how):
        run_folder.write_status(mine, "interrupted", "SIGTERM", 12)
        return load(*args, **how)

    monkeypatch.setattr(data_dataset, "load", slowly)
    before = (mine / "metrics.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=f"^run_dir={mine}: another process was at work in it until just now; start again"
    ):
        run(tiny, mine)
    assert (mine / "metrics.jsonl").read_bytes() == before


def test_a_machine_that_died_while_it_wrote_is_no_obstacle(tiny, tmp_path):
    """An empty status.json, environment.json or wandb/resume.json, as a power cut leaves them, does not stop a start."""
    folder, more = tmp_path / "run", ("max_steps=4", "sample_every=0", "wandb.mode=offline")
    assert run(tiny, folder, *more, kill_at=3) == "killed"
    for name in ("status.json", "environment.json", "wandb/resume.json"):
        assert (folder / name).read_text()
        (folder / name).write_text("")
    assert run(tiny, folder, *more) == "finished"


def test_torchrun_without_a_name_is_not_restarted_into_another_folder(monkeypatch, group):
    """Where nothing says which folder was the run's, a restart is refused instead of beginning a second run."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="run_dir=null: torchrun restarted the run.*give run_dir or --rdzv-id"):
        run_folder.choose(None, "sigmoid_avg")
    assert run_folder.choose("here", "sigmoid_avg") == Path("here")


def test_sizes_alone_read_no_weights(tiny, tmp_path, monkeypatch):
    """checkpoint.verify=sizes opens no file of weights, and still names one that is cut, gone or not of the manifest."""
    run(tiny, tmp_path / "run", "checkpoint.every=2", "checkpoint.keep=all")
    earlier, newest = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-2:]
    hashed = []
    monkeypatch.setattr(
        checkpoint, "_sha256", lambda path, of=checkpoint._sha256: (hashed.append(path.name), of(path))[1]
    )
    dist.init()
    try:
        assert checkpoint.find(tmp_path / "run", "auto", "sizes").folder == newest
        assert set(hashed) == {"state.json"}
        file = next(newest.glob("*.safetensors"))
        with file.open("ab") as end:
            end.write(b"x")
        assert checkpoint.find(tmp_path / "run", "auto", "sizes").folder == earlier
    finally:
        dist.shutdown()


def test_a_run_of_before_its_keys_resumes(tiny, tmp_path):
    """Settings and checkpoints without the newest keys are as those keys' defaults; another value is refused as ever."""
    run(tiny, tmp_path / "run", "max_steps=2", "checkpoint.every=1")
    config = tmp_path / "run" / "config.yaml"
    old = config_module.read_yaml(config)
    del old["stop"], old["model"]["lora"], old["model"]["save"], old["model"]["save_dtype"], old["model"]["save_merged"]
    config.write_text(json.dumps(old))
    with pytest.raises(UserError, match="model.lora.r=null, here 2"):
        run(tiny, tmp_path / "run", "max_steps=3", "checkpoint.every=1", "model.lora.r=2")
    run(tiny, tmp_path / "run", "max_steps=3", "checkpoint.every=1")
