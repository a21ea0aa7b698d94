"""rpo.runs.process: what a signal does to a job, to what the job started, and to the sweep around it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from rpo.runs.process import Interrupt, outcome
from tests.helpers.runs import ROOT, script_env

JOB = """
import subprocess, sys
from rpo.runs import process
def job():
    subprocess.run([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"])
sys.exit(process.outcome(job)[0])
"""


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """Where the suite runs under nohup its SIGHUP is ignored, and a job's then is on purpose."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_what_a_job_started_ends_with_it(signum, tmp_path):
    """A signal to a job alone, while another process works for it (the embedded task's builder): neither is left, quietly."""
    job = subprocess.Popen(
        [sys.executable, "-c", JOB],
        env=script_env(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child = int(job.stdout.readline())
    job.send_signal(signum)
    assert job.wait(20) == 128 + signum
    assert job.stderr.read() == "interrupted; what was saved is kept\n"
    for _ in range(200):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("the job's own process runs on")


def test_one_interrupt_within_another_passes_on():
    """What comes while the inner defers reaches the outer; what came before it, and the handlers, are as they were."""
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    with Interrupt() as sweep:
        sweep.defer()
        with Interrupt() as cell:
            cell.defer()
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGUSR1)
            assert (cell.received, sweep.received) == (signal.SIGTERM, 0)
        assert sweep.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt) as caught, Interrupt():
            signal.raise_signal(signal.SIGHUP)
        assert caught.value.args == (signal.SIGHUP,) and sweep.received == signal.SIGTERM
        signal.raise_signal(signal.SIGUSR1)  # is deferred again
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == before
    assert Interrupt.innermost is None


def test_an_operator_that_is_not_deterministic_is_named(capsys):
    """What torch refuses under deterministic=true is a user's error in one line; another RuntimeError is not."""

    def job():
        torch.use_deterministic_algorithms(True)
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    try:
        assert outcome(job) == (2, "deterministic=true: put_ has no deterministic form here; set it to false")
    finally:
        torch.use_deterministic_algorithms(False)
    assert capsys.readouterr().err.count("\n") == 1
    assert outcome(lambda: torch.ones(2) @ torch.ones(3))[0] == 1
