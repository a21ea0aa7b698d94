"""make demo and make overopt under real signals: whatever ends the command ends the runs that it started, quietly."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.runs import ROOT, script_env

# A python whose sweeps do not end by themselves: what a signal ends, an id in `ended` per sweep, as train.py would end.
PYTHON = """#!{python} -ES
import os, signal, sys, time
from pathlib import Path
if "-m" not in sys.argv or "recipe=demo" not in sys.argv:
    sys.exit(0)
folder = Path(__file__).parent
def end(signum, frame):
    (folder / f"ended_{{os.getpid()}}").touch()
    os._exit(128 + signum)
for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(signum, end)
(folder / f"started_{{os.getpid()}}").touch()
if os.environ.get("FAIL", "nowhere") in sys.argv[-1]:
    time.sleep(0.3)
    sys.exit(3)
time.sleep(60)
"""


def begin(tmp_path, **env):
    """make demo with that python, in a process group of its own, once both sweeps run."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").write_text(PYTHON.format(python=sys.executable))
    (venv / "bin/python").chmod(0o755)
    (venv / ".ready").touch()
    command = ["make", "-C", str(ROOT), "demo", f"VENV={venv}", f"DEMO={tmp_path / 'demo'}"]
    pipe = subprocess.PIPE
    make = subprocess.Popen(command, env=script_env(**env), stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    wait_until(lambda: len(ids(venv, "started")) == 2)
    return make, venv


def ids(venv, what):
    return sorted(path.name.partition("_")[2] for path in (venv / "bin").glob(f"{what}_*"))


def lines(path):
    return path.read_text().split() if path.exists() else []


def wait_until(done, seconds=10):
    for _ in range(50 * seconds):
        if done():
            return
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} seconds")


def is_alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("to_group", [False, True], ids=["to make", "to the terminal's group"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_both_sweeps_of_the_demo(signum, to_group, tmp_path):
    """SIGTERM (to make alone as well), Ctrl-C and a closed terminal: both sweeps are told, no shell dies of its own trap."""
    if not to_group and signum != signal.SIGTERM:
        pytest.skip("a terminal sends it to the whole group")
    make, venv = begin(tmp_path)
    (os.killpg if to_group else os.kill)(make.pid, signum)
    printed = "".join(make.communicate(timeout=20))
    wait_until(lambda: not any(map(is_alive, ids(venv, "started"))))
    assert ids(venv, "ended") == ids(venv, "started")
    assert make.returncode != 0
    assert [line for line in printed.splitlines() if not line.startswith("make")] in ([], ["Terminated"]), printed


def test_a_failed_sweep_ends_the_demo(tmp_path):
    """Its failure is make's, and the other sweep does not run on."""
    make, venv = begin(tmp_path, FAIL="demo/a")
    printed = "".join(make.communicate(timeout=20))
    assert make.returncode == 2, printed
    wait_until(lambda: not any(map(is_alive, ids(venv, "started"))))


STUDY = """
import subprocess, sys
from pathlib import Path
from rpo.overopt import experiment
folder = Path(sys.argv[1])
(folder / "train.py").write_text(
    "import os, time, signal; open(os.environ['LIST'], 'a').write(f'{os.getpid()}\\\\n'); time.sleep(60)")
experiment._command = lambda script: [sys.executable, str(folder / f"{script}.py")]
experiment.ARMS = {name: ("loss=dpo",) for name in ("dpo", "a", "b", "c")}
if len(sys.argv) > 2:
    def train(folder, arm, seeds, true=experiment._train):
        if arm != "dpo":
            true(folder, arm, seeds)
    experiment._train = train
    run = experiment._run
    experiment._run = lambda script, *args: run(script, *args) if script == "train" else None
sys.argv[1:] = [str(folder / "study")]
experiment.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["side by side"]], ids=["the first arm", "two arms side by side"])
def test_sigterm_ends_the_study(more, tmp_path):
    """make overopt: the arms that run are ended, no other is started, the exit code is 143."""
    started = tmp_path / "started"
    study = subprocess.Popen(
        [sys.executable, "-c", STUDY, str(tmp_path), *more], env=script_env(LIST=str(started)), stderr=subprocess.PIPE
    )
    wait_until(lambda: len(lines(started)) == 1 + len(more), 60)
    study.send_signal(signal.SIGTERM)
    printed = study.communicate(timeout=20)[1].decode()
    assert study.returncode == 143 and "Traceback" not in printed, printed
    assert len(lines(started)) == 1 + len(more) and not any(map(is_alive, lines(started)))
