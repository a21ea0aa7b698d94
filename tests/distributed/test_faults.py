"""What befalls real runs: signals, kills, damaged files, full disks, a rank that is lost. They go on as if nothing had been.

Starts are forked from a server that has imported everything (bench/kill.py), and a signal or a full disk comes just before
a named file operation of theirs: real processes and real signals, and no race with the clock.
"""

import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import kill
from rpo.model import policy as model_policy
from rpo.runs import checkpoint
from rpo.runs import folder as run_folder
from rpo.training import optim
from tests.helpers.runs import ROOT, command, script_env, tiny_args

pytestmark = pytest.mark.slow

# 40 pairs in steps of 8: an epoch is 5 steps. The log's sums and the samples are of other steps than the checkpoints.
RUN = ("loss=rpo_avg", "batch_size=8", "max_steps=24", "log_every=3", "eval_every=4", "sample_every=6")
RUN += ("checkpoint.every=4", "checkpoint.keep=all")
NOLIMIT = resource.RLIM_INFINITY


# ---- starting, ending, comparing


def start(tiny, run_dir, *more, at=(), log=None, **how):
    """The run's processes; `at` says what they do to themselves, by paths within run_dir."""
    at = [(os.path.normpath(f"{run_dir}/{path}"), n, action) for path, n, action in at]
    args = {arg.partition("=")[0]: arg for arg in [*more[:1], *tiny_args(tiny, *RUN), f"run_dir={run_dir}", *more]}
    log = log or run_dir.with_suffix(".log")
    log.unlink(missing_ok=True)
    return kill.spawn([*args.values()], log, at=at, RPO_CACHE=os.environ["RPO_CACHE"], **how)


def codes(processes, seconds=120):
    """Exit codes, negative for a signal that killed."""
    for process in processes:
        process.join(seconds)
    result = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return result


def play(tiny, run_dir, *more, log=None, **how):
    """Runs to its end; returns the exit code, which all ranks share, and what it printed."""
    found = codes(start(tiny, run_dir, *more, log=log, **how))
    printed = (log or run_dir.with_suffix(".log")).read_text()
    assert len(set(found)) == 1, (found, printed[-3000:])
    return found[0], printed


def assert_equal(run_dir, whole):
    """Every parameter, moment, logged metric, sample and file of model/ is the undisturbed run's; nothing is left over."""
    assert {name: value for name, value in kill.differences(run_dir, whole).items() if value} == {}
    assert [path for path in run_dir.rglob("*") if path.suffix in (".part", ".old")] == []
    assert run_folder.read_status(run_dir) == run_folder.read_status(whole)


def wait_for(done, seconds=60):
    for _ in range(100 * seconds):
        if done():
            return
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} seconds")


def stopped(process):
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].startswith("T")


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def send(signum):
    return partial(signal.raise_signal, signum)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of an undisturbed run, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, printed = play(tiny, folder)
    assert code == 0, printed
    return folder


@pytest.fixture(scope="module")
def whole_on_two(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole2") / "run"
    code, printed = play(tiny, folder, ranks=2)
    assert code == 0, printed
    return folder


def died(whole, tmp_path, *, after=24):
    """A copy of the run as if its process had died some steps later than its checkpoint `after`."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir, symlinks=True)
    shutil.rmtree(run_dir / "model")
    for step in kill.steps(run_dir):
        if step > after:
            shutil.rmtree(run_dir / f"checkpoints/step_{step:08d}")
    (run_dir / "checkpoints/latest").unlink()
    (run_dir / "checkpoints/latest").symlink_to(f"step_{after:08d}")
    run_folder.write_status(run_dir, "running", step=0)
    return run_dir


# ---- kills


@pytest.mark.parametrize(
    ("ranks", "kills", "total", "more"), [(1, 20, 40, ()), (2, 4, 20, ("model.lora.r=2", "model.lora.dropout=0.1"))]
)
def test_killed_anywhere_again_and_again(ranks, kills, total, more, tiny, tmp_path):
    """SIGKILL at random moments and file operations: equal at the end, and no more lost than checkpoint.every allows.

    Of a whole model, and of an adapter with dropout.
    """
    args = tiny_args(tiny, "loss=rpo_avg", "batch_size=8", "eval_every=5", "sample_every=10", *more)
    done = kill.campaign(args, tmp_path, kills, total=total, seed=ranks, ranks=ranks)
    assert done.problems == [] and len(done.kills) >= 0.8 * kills
    assert set(done.differences.values()) == {0.0}, done.differences
    assert done.lost(blocking=True) <= 3 and done.lost(blocking=False) <= 6
    assert ranks > 1 or any(one.part for one in done.kills), "none came while a checkpoint was being written"


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_brings_back_a_run_whose_rank_was_killed(rank, tiny, whole_on_two, tmp_path):
    """With --max-restarts one command and one killed rank end as the undisturbed run; the rendezvous id names the folder."""
    torchrun = command("train.py", *tiny_args(tiny, *RUN), ranks=2)
    torchrun[4:4] = ["--max-restarts=1", "--rdzv-id=again", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    torchrun.remove("--standalone")
    agent = subprocess.Popen(torchrun, cwd=tmp_path, env=script_env(), stderr=subprocess.PIPE, text=True)
    run_dir = tmp_path / "outputs/again"
    wait_for(lambda: kill.steps(run_dir))
    os.kill(children(agent.pid)[rank], signal.SIGKILL)
    printed = agent.communicate(timeout=180)[1]
    assert agent.returncode == 0, printed[-3000:]
    assert_equal(run_dir, whole_on_two)


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on(ranks, tiny, whole, whole_on_two, tmp_path):
    """Killed on one rank and resumed on two, and the other way: the same data in the same order, equal within rounding."""
    first, second = ranks
    run_dir, undisturbed = tmp_path / "run", whole if first == 1 else whole_on_two
    start_them = start(tiny, run_dir, ranks=first, at=[("metrics.jsonl", 16, send(signal.SIGKILL))])
    wait_for(lambda: any(process.exitcode is not None for process in start_them))
    for process in start_them:
        process.kill()
    assert -signal.SIGKILL in codes(start_them)
    code, printed = play(tiny, run_dir, ranks=second)
    assert code == 0 and "resuming from" in printed, printed
    ours, theirs = (kill.events(folder / "metrics.jsonl") for folder in (run_dir, undisturbed))
    assert [event["step"] for event in ours] == [event["step"] for event in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and a["pairs"] == b["pairs"]
        assert a.pop("split") == b.pop("split")
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    a, b = (kill._tensors(folder / "model") for folder in (run_dir, undisturbed))
    assert all(np.abs(a[name] - b[name]).max() < 1e-5 for name in b)


# ---- signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_step_in_hand_and_leaves(signum, tiny, whole, tmp_path):
    """Exit code 128 + signal, status.json says which, the step is on disk, and the same command goes on without a gap."""
    run_dir = tmp_path / "run"
    code, printed = play(tiny, run_dir, at=[("metrics.jsonl", 5, send(signum))])
    status = run_folder.read_status(run_dir)
    assert (code, status["state"], status["reason"]) == (128 + signum, "interrupted", signum.name), printed
    assert status["step"] == max(kill.steps(run_dir)) == 7 and "to resume, repeat the command" in printed
    assert not (run_dir / "model").exists()
    assert play(tiny, run_dir)[0] == 0
    assert_equal(run_dir, whole)


def test_a_signal_before_the_loop_leaves_at_once(tiny, whole, tmp_path):
    """While a run starts there is nothing to save: it goes, and what was saved earlier is as it was."""
    run_dir = died(whole, tmp_path, after=16)
    for n in (3, 9, 15, 21):
        code, printed = play(tiny, run_dir, at=[(".", n, send(signal.SIGTERM))])
        assert code in (143, -signal.SIGTERM), printed  # the second where no handler is there yet
        assert "Traceback" not in printed and kill.steps(run_dir) == [4, 8, 12, 16]
    assert play(tiny, run_dir)[0] == 0
    assert_equal(run_dir, whole)


def test_signals_in_a_save_and_at_the_end(tiny, whole, tmp_path):
    """One that comes while a checkpoint is written waits for it; one that comes after the last step changes nothing."""
    run_dir = tmp_path / "run"
    code, printed = play(tiny, run_dir, at=[("checkpoints/step_00000008.part", 3, send(signal.SIGTERM))])
    assert code == 143 and run_folder.read_status(run_dir)["step"] in (8, 9, 10), printed
    assert {4, 8} <= set(kill.steps(run_dir))
    code, printed = play(tiny, run_dir, at=[("model.part", 2, send(signal.SIGTERM))])
    assert code == 0, printed
    assert_equal(run_dir, whole)


def test_ctrl_c_twice_quits_at_once(tiny, whole, tmp_path):
    """The second SIGINT does not wait for a step or a save: 130, and the checkpoint before is resumed from."""
    run_dir = tmp_path / "run"
    at = [("metrics.jsonl", 3, send(signal.SIGINT)), ("metrics.jsonl", 4, send(signal.SIGINT))]
    code, printed = play(tiny, run_dir, at=at)
    assert (code, kill.steps(run_dir)) == (130, []), printed
    assert run_folder.read_status(run_dir) == {"state": "interrupted", "reason": "SIGINT", "step": 4}
    assert "Traceback" not in printed
    assert play(tiny, run_dir)[0] == 0
    assert_equal(run_dir, whole)


def test_the_best_is_found_by_an_interrupted_run_too(tiny, tmp_path):
    """Interrupted right where a checkpoint is due, before its evaluation: the best is the undisturbed run's."""
    more = ("log_every=1", "checkpoint.best=min:nll/chosen", "checkpoint.keep=1")
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert play(tiny, whole, *more)[0] == 0
    for step, n in ((8, 10), (24, 24)):  # as the line of the step before is written
        code, printed = play(tiny, run_dir, *more, at=[("metrics.jsonl", n, send(signal.SIGTERM))])
        assert code == 143 and run_folder.read_status(run_dir)["step"] == step, printed
    assert play(tiny, run_dir, *more)[0] == 0
    assert_equal(run_dir, whole)
    assert [(folder / "checkpoints/best").resolve().name for folder in (whole, run_dir)] == ["step_00000008"] * 2


def test_sigterm_to_torchrun(tiny, whole_on_two, tmp_path):
    """The agent passes it on; all ranks save one step together, status.json says so, and the run goes on equal."""
    run_dir = tmp_path / "run"
    torchrun = command("train.py", *tiny_args(tiny, *RUN, f"run_dir={run_dir}"), ranks=2)
    agent = subprocess.Popen(torchrun, env=script_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: kill.events(run_dir / "metrics.jsonl"))
    agent.send_signal(signal.SIGTERM)
    printed = agent.communicate(timeout=120)[0]
    status = run_folder.read_status(run_dir)
    assert (status["state"], status["reason"]) == ("interrupted", "SIGTERM"), printed[-3000:]
    assert agent.returncode != 0 and [status["step"]] == kill.steps(run_dir)[-1:]
    assert play(tiny, run_dir, ranks=2)[0] == 0
    assert_equal(run_dir, whole_on_two)


# ---- damaged files


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def cut(path, rng):
    os.truncate(path, rng.integers(path.stat().st_size))


DAMAGE = [(flip, "shard-*"), (cut, "shard-*"), (flip, "state.json"), (cut, "manifest.json"), (flip, "manifest.json")]


def test_damaged_checkpoints_are_named_and_skipped(tiny, whole, tmp_path):
    """Five damaged ones of all kinds in a row: each is named, the one before them is resumed from, the end is equal."""
    run_dir, rng = died(whole, tmp_path), np.random.default_rng(0)
    names = []
    for step, (damage, pattern) in zip((24, 20, 16, 12, 8), DAMAGE, strict=True):
        (path,) = (run_dir / f"checkpoints/step_{step:08d}").glob(pattern)
        damage(path, rng)
        names.append(f"checkpoint: {path.parent} is damaged (")
    code, printed = play(tiny, run_dir)
    assert code == 0 and all(name in printed for name in names), printed
    assert f"resuming from {run_dir / 'checkpoints/step_00000004'}" in printed
    assert_equal(run_dir, whole)


def test_the_newest_whole_checkpoint_outlives_damaged_newer_ones(tiny, whole, tmp_path):
    """keep=1 keeps one that can be gone on from: damaged ones do not count, whenever the run dies again."""
    run_dir, rng = died(whole, tmp_path), np.random.default_rng(1)
    for step in (12, 16, 20, 24):
        flip(run_dir / f"checkpoints/step_{step:08d}/state.json", rng)
    for step, before in ((12, 8), (20, 16)):
        at = [(f"checkpoints/step_{step:08d}.part", 4, send(signal.SIGKILL))]
        code, printed = play(tiny, run_dir, "checkpoint.keep=1", "checkpoint.blocking=true", at=at)
        assert code == -signal.SIGKILL, printed
        assert (run_dir / "checkpoints/latest").resolve().name == f"step_{before:08d}"
        assert kill.steps(run_dir)[-1] == before
    code, printed = play(tiny, run_dir, "checkpoint.keep=1")
    assert code == 0 and "step_00000016" in printed, printed
    assert kill.steps(run_dir) == [24]
    assert_equal(run_dir, whole)


def test_nothing_whole_is_refused(tiny, whole, tmp_path):
    """Where all are damaged the run does not begin anew over what it has: one line, nothing touched."""
    run_dir, rng = died(whole, tmp_path), np.random.default_rng(2)
    for path in (run_dir / "checkpoints").glob("step_*/state.json"):
        flip(path, rng)
    before = {path: path.lstat().st_mtime_ns for path in run_dir.rglob("*")}
    code, printed = play(tiny, run_dir)
    assert code == 2 and printed.count("is damaged") == 6 and "Traceback" not in printed, printed
    assert f"error: run_dir={run_dir}: none of its checkpoints is whole; put one back, give another run_dir" in printed
    assert before == {path: path.lstat().st_mtime_ns for path in run_dir.rglob("*")}


def test_any_flipped_bit_is_noticed(whole, tmp_path, group):
    """300 copies, each with one bit of one file flipped, or cut: skipped as damaged, or (in a blank) read as it was."""
    folder, rng = tmp_path / "checkpoints/step_00000004", np.random.default_rng(3)
    shutil.copytree(whole / "checkpoints/step_00000004", folder)
    expected = checkpoint._newest([folder], "full")
    for i in range(300):
        path = sorted(folder.iterdir())[i % 3]
        before = path.read_bytes()
        (flip if rng.random() < 0.7 else cut)(path, rng)
        found = checkpoint._newest([folder], "full")
        assert found is None or (found == expected and path.name == "manifest.json")
        path.write_bytes(before)
    assert checkpoint._newest([folder], "full") == expected


# ---- disks


def full(limit):
    """From now on no file of this process can grow past so many bytes; what a full disk's OSError is by another number."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, NOLIMIT))


@pytest.mark.parametrize("blocking", [True, False])
def test_a_save_that_fails_costs_nothing(blocking, tiny, whole, tmp_path):
    """It is said, the run goes on, earlier checkpoints stay, no part is left, and later saves work again."""
    run_dir = tmp_path / "run"
    at = [("checkpoints/step_00000008.part", 1, full(30_000)), ("checkpoints/step_00000016.part", 1, full(NOLIMIT))]
    code, printed = play(tiny, run_dir, f"checkpoint.blocking={blocking}".lower(), at=at)
    assert code == 0 and kill.steps(run_dir) == [4, 16, 20, 24], printed
    for step in (8, 12):
        assert re.search(
            f"checkpoint: step {step} could not be written to .*; earlier ones are kept, the run continues", printed
        )
    assert_equal(run_dir, whole)


def test_a_signal_on_a_full_disk(tiny, whole, tmp_path):
    """The last save fails: the error says so in one line, exit code 2, and the checkpoint before is resumed from."""
    run_dir = tmp_path / "run"
    at = [("metrics.jsonl", 5, full(30_000)), ("metrics.jsonl", 5, send(signal.SIGTERM))]
    code, printed = play(tiny, run_dir, at=at)
    assert code == 2 and "error: " in printed and "free some space" in printed and "Traceback" not in printed, printed
    assert kill.steps(run_dir) == [4]
    assert play(tiny, run_dir)[0] == 0
    assert_equal(run_dir, whole)


def test_a_log_that_can_not_grow_ends_the_run(tiny, whole, tmp_path):
    """metrics.jsonl on a full disk: one line, exit code 2, nothing lost but the steps since the last checkpoint."""
    run_dir = tmp_path / "run"
    code, printed = play(tiny, run_dir, at=[("metrics.jsonl", 8, full(3_000))])
    assert code == 2 and "Traceback" not in printed and "metrics.jsonl" in printed, printed
    assert run_folder.read_status(run_dir)["state"] == "failed"
    assert play(tiny, run_dir)[0] == 0
    assert_equal(run_dir, whole)


def in_namespace(what, tmp_path, tiny, mount):
    """Runs a function of this module where `mount`, shell commands, has been done, which no one else sees."""
    call = f"from tests.distributed import test_faults as t; t.{what}(t.Path({str(tmp_path)!r}), t.Path({str(tiny)!r}))"
    inner = f"set -e; cd {tmp_path}; mkdir -p disk; {mount}; cd {ROOT}; exec {sys.executable} -c {shlex.quote(call)}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", f"set -e; cd {tmp_path}; mkdir -p disk; {mount}"]).returncode:
        pytest.skip("no mounts in a user namespace here")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inner], env=script_env(), capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-4000:])


def on_a_small_disk(folder, tiny):
    """What the next test does within its mount: 1 MiB, filled up by and by."""
    whole, run_dir, ballast = folder / "whole", folder / "disk/run", folder / "disk/ballast"
    assert play(tiny, whole, "checkpoint.keep=2")[0] == 0
    for n in (2, 3, 5, 7):  # before several of a save's operations
        shutil.rmtree(run_dir, ignore_errors=True)
        at = [("checkpoints/step_00000008.part", n, partial(fill, ballast)), ("metrics.jsonl", 14, ballast.unlink)]
        code, printed = play(
            tiny, run_dir, "checkpoint.keep=2", "checkpoint.blocking=true", log=folder / "run.log", at=at
        )
        assert code == 0, printed
        assert re.search("step (8|12) could not be written", printed), (n, printed)
        assert_equal(run_dir, whole)


def fill(ballast):
    """Leaves 100 kB of a disk: enough for lines of the log, too little for a checkpoint."""
    free = shutil.disk_usage(ballast.parent).free
    ballast.write_bytes(bytes(free - 100_000))


def test_a_disk_that_fills_up(tiny, tmp_path):
    """A small tmpfs that is full before one operation of a save or another: said, nothing lost, and the end is equal."""
    in_namespace("on_a_small_disk", tmp_path, tiny, "mount -t tmpfs -o size=1400k none disk")


def on_a_read_only_folder(folder, tiny):
    code, printed = play(tiny, folder / "disk/run", log=folder / "run.log")
    assert code == 2 and "Traceback" not in printed, printed
    assert f"error: run_dir={folder / 'disk/run'}: cannot be written (Read-only file system); use another" in printed
    code, printed = play(tiny, folder / "disk/old", log=folder / "run.log")
    assert code == 2 and "Traceback" not in printed and "cannot be written (Read-only file system)" in printed, printed


def test_a_read_only_folder_is_refused(tiny, whole, tmp_path):
    """In one line, before a model is loaded; one that holds a run as well as a new one."""
    shutil.move(died(whole, tmp_path, after=8), tmp_path / "disk/old")
    mount = "mount --bind disk disk; mount -o remount,bind,ro disk"
    in_namespace("on_a_read_only_folder", tmp_path, tiny, mount)


# ---- who else is there, and where


def test_two_runs_on_one_folder(tiny, whole, tmp_path):
    """The second is refused in one line; the first does not notice."""
    run_dir = tmp_path / "run"
    first = start(tiny, run_dir, at=[("metrics.jsonl", 8, send(signal.SIGSTOP))])
    wait_for(lambda: stopped(first[0]))
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    code, printed = play(tiny, tmp_path / "second", f"run_dir={run_dir}")
    assert code == 2, printed
    assert printed.strip().endswith(
        f"error: run_dir={run_dir}: another process is at work in it; wait for it, or give another"
    )
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    os.kill(first[0].pid, signal.SIGCONT)
    assert codes(first) == [0]
    assert_equal(run_dir, whole)


def test_another_environment_goes_on(tiny, whole, tmp_path):
    """Files' times turned round and in the future, another zone, language, hash seed, folder, host: all the same numbers."""
    run_dir = tmp_path / "run"
    assert play(tiny, run_dir, at=[("metrics.jsonl", 12, send(signal.SIGKILL))], TZ="UTC")[0] == -signal.SIGKILL
    for path in run_dir.rglob("*"):
        os.utime(path, (2e9, 4e9 - path.stat().st_mtime), follow_symlinks=False)
    renamed = ["unshare", "-ru", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh"]
    if subprocess.run([*renamed, "true"], capture_output=True).returncode:
        renamed = []
    (tmp_path / "elsewhere").mkdir()
    env = script_env(TZ="Pacific/Kiritimati", LANG="tr_TR.UTF-8", LC_ALL="C", PYTHONHASHSEED="7", HOME=str(tmp_path))
    args = [*renamed, *command("train.py", *tiny_args(tiny, *RUN, "run_dir=../run"))]
    done = subprocess.run(args, env=env, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr
    assert_equal(run_dir, whole)


def test_forks_go_on_from_a_run_a_checkpoint_and_a_link(tiny, whole, tmp_path):
    """resume=PATH ends equal in a folder of its own, killed or not, and its origin is not touched."""
    origin = died(whole, tmp_path, after=16)
    before = {path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in origin.rglob("*")}
    for i, path in enumerate([origin, origin / "checkpoints/step_00000008", origin / "checkpoints/latest"]):
        run_dir, resume = tmp_path / f"fork{i}", f"resume={path}"
        code, printed = play(tiny, run_dir, resume, at=[("metrics.jsonl", 8, send(signal.SIGKILL))])
        assert code == -signal.SIGKILL and f"resuming from {path.resolve()}" in printed, printed
        assert play(tiny, run_dir, resume)[0] == 0
        assert_equal(run_dir, whole)
    after = {path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in origin.rglob("*")}
    assert before == after


# ---- what a step may meet


def stop_in_an_update():
    """Stops this process as it is about to make its next update, the step's collectives behind it."""
    true = optim.step_if_finite

    def stopping(*args):
        signal.raise_signal(signal.SIGSTOP)
        true(*args)

    optim.step_if_finite = stopping


@pytest.mark.parametrize("where", ["anywhere", "in an update"])
def test_a_rank_that_hangs_is_named(where, tiny, tmp_path):
    """One of two ranks stops: the other ends after timeout= seconds with exit code 1; stderr and status.json say where."""
    run_dir = tmp_path / "run"
    at = [("checkpoints", 3, stop_in_an_update)] if where == "in an update" else []
    often = ("log_every=1",) if where == "anywhere" else ("log_every=1000", "eval_every=0", "sample_every=0")
    both = start(tiny, run_dir, "max_steps=5000", "timeout=10", *often, ranks=2, at=at, of=1)
    if not at:
        wait_for(lambda: kill.reached(run_dir) >= 7)
        os.kill(both[1].pid, signal.SIGSTOP)
    both[0].join(60)
    printed, status = run_dir.with_suffix(".log").read_text(), run_folder.read_status(run_dir)
    assert both[0].exitcode == 1 and stopped(both[1]), printed[-3000:]
    named = r"(step|the evaluation of step) \d+ on rank 0 \(.*\) took over timeout=10 seconds: a rank is lost"
    assert re.search(f"error: {named}", printed), printed[-3000:]
    assert status["state"] == "failed" and re.match(named, status["reason"]), status


def no_memory():
    """From now on scoring asks this machine's allocator for more than it can have."""
    model_policy.score = lambda *_: torch.empty(2**50)


def no_memory_on_the_device():
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model_policy.score = refuse


@pytest.mark.parametrize("refuse", [no_memory, no_memory_on_the_device])
def test_out_of_memory_names_the_row_and_the_key(refuse, tiny, whole, tmp_path):
    """One line with rank, file:line of the longest row and what to lower; exit code 2; with less the run goes on."""
    run_dir = tmp_path / "run"
    code, printed = play(tiny, run_dir, at=[("metrics.jsonl", 5, refuse)])
    line = next(line for line in printed.splitlines() if line.startswith("error: "))
    assert code == 2 and "Traceback" not in printed, printed
    assert re.match(
        r"error: out of memory on rank 0 in a micro-batch of 8 pairs and \d+ tokens, the longest .*/train.jsonl.gz:\d+ with "
        r"\d+: lower tokens_per_microbatch=16384, or set fsdp.activation_checkpointing=full$", line
    ), line  # fmt: skip
    assert run_folder.read_status(run_dir)["state"] == "failed"
    assert play(tiny, run_dir)[0] == 0
    assert_equal(run_dir, whole)


def poison():
    """From now on every loss is infinite."""
    true = model_policy.score

    def poisoned(*args):
        pairs = true(*args)
        return replace(pairs, chosen_P=pairs.chosen_P * torch.inf)

    model_policy.score = poisoned


def test_a_loss_that_is_not_finite_leaves_the_good_checkpoints(tiny, whole, tmp_path):
    """It stops with exit code 1 before the update; the newest checkpoint and model/ are of the weights before."""
    run_dir = tmp_path / "run"
    code, printed = play(tiny, run_dir, "log_every=1", at=[("metrics.jsonl", 12, poison)])
    status = run_folder.read_status(run_dir)
    assert code == 1 and "Traceback" not in printed, printed
    assert status["state"] == "failed" and re.match(
        r"FloatingPointError: step (8|9): .* is not finite", status["reason"]
    )
    assert kill.steps(run_dir) == [4, 8] and status["step"] == 8
    saved = kill._tensors(run_dir / "checkpoints/step_00000008")
    assert all(np.isfinite(tensor).all() for tensor in saved.values())
    model = kill._tensors(run_dir / "model")
    assert all((tensor == saved[f"shard-00001-model-00001-of-00001.safetensors:weight/lm.{name.split(':')[1]}"]).all()
               for name, tensor in model.items())  # fmt: skip
    assert play(tiny, run_dir)[0] == 0  # the machine was at fault, say
    assert kill.differences(run_dir, whole)["weight"] == 0.0


@pytest.mark.parametrize(
    ("path", "n", "signum"),
    [
        ("0/model.part", 1, signal.SIGTERM),  # the end of a cell, while its model is saved
        ("multirun.yaml", 3, signal.SIGHUP),  # between two cells
        ("1/lock", 1, signal.SIGINT),  # before the next one's loop
    ],
)
def test_a_signal_between_cells_ends_the_sweep(path, n, signum, tiny, tmp_path):
    """Whenever it comes no other cell begins, the table is written, the code says which; the command given again goes on."""
    folder, args = tmp_path / "sweep", ("-m", "loss.beta=0.1,0.2", "max_steps=3", "checkpoint.every=0", "eval_every=0")
    code, printed = play(tiny, folder, *args, at=[(path, n, send(signum))])
    assert code == 128 + signum and "Traceback" not in printed, printed
    states = [row["state"] for row in run_folder.read_json(folder / "sweep.json")]
    assert states == ["finished", "absent"], printed
    assert not (folder / "1/model").exists() and (folder / "sweep.csv").exists()
    if path == "multirun.yaml":
        code, printed = play(tiny, folder, *args)
        assert code == 0 and f"{folder / '0'}: finished after 3 steps already" in printed, printed


def test_a_signal_to_one_rank_between_cells_ends_the_sweep_on_all(tiny, tmp_path):
    """Ranks agree before each cell: one that alone was told takes the other along."""
    folder, args = tmp_path / "sweep", ("-m", "loss.beta=0.1,0.2", "max_steps=3", "checkpoint.every=0", "eval_every=0")
    code, printed = play(tiny, folder, *args, ranks=2, at=[("0/plots", 1, send(signal.SIGTERM))])
    assert code == 143, printed
    assert [row["state"] for row in run_folder.read_json(folder / "sweep.json")] == ["finished", "absent"]


def test_a_sweep_goes_on(tiny, tmp_path):
    """Killed in its second cell: the same command repeats neither the finished cell nor a step before a checkpoint."""
    whole, folder = tmp_path / "whole", tmp_path / "sweep"
    args = ("-m", "loss.beta=0.1,0.2,0.3", "max_steps=8")
    assert play(tiny, whole, *args)[0] == 0
    code, printed = play(tiny, folder, *args, at=[("1/metrics.jsonl", 6, send(signal.SIGKILL))])
    assert code == -signal.SIGKILL, printed
    before = {path: path.stat().st_mtime_ns for path in (folder / "0").rglob("*")}
    second = start(tiny, folder, *args, at=[("1/metrics.jsonl", 4, send(signal.SIGSTOP))])
    wait_for(lambda: stopped(second[0]))
    before |= {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, printed = play(tiny, tmp_path / "other", *args, f"run_dir={folder}")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert code == 2 and "another process is at work in it" in printed, printed
    os.kill(second[0].pid, signal.SIGCONT)
    assert codes(second) == [0]
    printed = folder.with_suffix(".log").read_text()
    assert f"{folder / '0'}: finished after 8 steps already" in printed
    assert (
        f"{folder / '1'}: train 40 rows, eval 12 rows, resuming from {folder / '1/checkpoints/step_00000004'}"
        in printed
    )
    assert all(path.stat().st_mtime_ns == before[path] for path in (folder / "0").rglob("*"))
    for cell in "012":
        assert_equal(folder / cell, whole / cell)
    tables = [
        [
            {k: v for k, v in row.items() if "perf/" not in k and k != "run_dir"}
            for row in run_folder.read_json(f / "sweep.json")
        ]
        for f in (folder, whole)
    ]
    assert tables[0] == tables[1]
