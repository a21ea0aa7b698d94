"""Several nodes, each an agent of torchrun, here on loopback with one file system: they train as one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.runs import ROOT, command, script_env, tiny_args

# Starts what follows its own options once per node, as srun does; with --kill-on-bad-exit one that fails ends the others.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do "$@" & tasks+=($!); done
echo "${tasks[@]}" > tasks
for task in "${tasks[@]}"; do wait -n || { code=1; kill -TERM "${tasks[@]}" 2> /dev/null; }; done
exit ${code:-0}
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> scontrol; fi
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def on_two_nodes(args, run_id, cwd):
    """Runs train.py by two agents of one process each, started in `cwd`, and returns what they printed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", f"--rdzv-id={run_id}"]
    agents = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={node}", str(ROOT / "train.py"), *args],
            cwd=cwd, env=script_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    printed = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    return printed


def logged(run_dir):
    """Every whole line of metrics.jsonl, without what a clock says."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in event.items() if k != "time" and not k.startswith("perf/")} for event in events]


def assert_same_run(one, other):
    """Two run folders have the same numbers in their logs and the same weights, bit for bit."""
    assert logged(one) == logged(other) != []
    weights = [load_file(folder / "model/model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_two_nodes_make_the_run_of_one(tiny, tmp_path, replicas):
    """Two agents with a c10d rendezvous log and save what one agent with two processes does, bit for bit.

    Sharded over both, and as a replica each (HSDP); where no run_dir is given, the rendezvous id names it.
    """
    args = tiny_args(tiny, "loss=rpo_avg", "batch_size=13", "max_steps=8", "log_every=1", "eval_every=4")
    args += ["tokens_per_microbatch=150", f"fsdp.replicate_degree={replicas}", "fsdp.accumulate=sharded"]
    one = [*args, f"run_dir={tmp_path / 'one'}", f"reference.cache_dir={tmp_path / 'cache1'}"]
    subprocess.run(command("train.py", *one, ranks=2), env=script_env(), check=True, capture_output=True, timeout=120)
    printed = on_two_nodes([*args, f"reference.cache_dir={tmp_path / 'cache2'}"], "a-run", tmp_path)
    assert sum("finished after 8 steps" in text for text in printed) == 1
    assert_same_run(tmp_path / "one", tmp_path / "outputs/a-run")


def cluster(folder, srun=SRUN):
    """A job's environment in `folder`: the two commands of SLURM, two nodes, and the repository to submit from."""
    for name, text in {"srun": srun, "scontrol": SCONTROL}.items():
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    for name in ("train.py", "conf"):
        (folder / name).symlink_to(ROOT / name)
    ports = range(20000 + os.getpid() % 9000, 30000)  # the script makes it of the job's number
    job = {
        "SLURM_JOB_ID": str(next(filter(is_free, ports)) - 20000),
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "here[1-2]",
    }
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return script_env(**job, PATH=path)


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0


def submit(folder, env, *args):
    script = ["bash", str(ROOT / "docs/slurm/train.sbatch"), *args]
    return subprocess.Popen(
        script, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(done, seconds=60):
    for _ in range(10 * seconds):
        if done():
            return
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} seconds")


@pytest.mark.slow
def test_a_job_is_requeued_until_the_run_is_finished(tiny, tmp_path):
    """SLURM's warning to the agents of two nodes has the script requeue the job; its second start, of which a worker is
    killed, finishes the same run: log and weights are an undisturbed run's, bit for bit.
    """
    args = tiny_args(tiny, "loss=rpo_avg", "batch_size=13", "max_steps=90", "log_every=1", "eval_every=7")
    args += ["tokens_per_microbatch=150", "fsdp.replicate_degree=2", f"reference.cache_dir={tmp_path / 'cache'}"]
    args += ["checkpoint.every=10"]
    env = cluster(tmp_path)
    run_dir = tmp_path / "outputs" / env["SLURM_JOB_ID"]

    def wait_for_step(step):
        wait_for(lambda: (events := logged(run_dir)) and events[-1]["step"] >= step)

    def agents():
        return [int(task) for task in (tmp_path / "tasks").read_text().split()]

    job = submit(tmp_path, env, *args)
    wait_for_step(5)
    for agent in agents():
        os.kill(agent, signal.SIGUSR1)
    printed = job.communicate(timeout=60)[0]
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("interrupted", "SIGUSR1"), (status, printed[-3000:])
    assert 0 < status["step"] < 60 and job.returncode == 0
    assert (tmp_path / "scontrol").read_text() == f"requeue {env['SLURM_JOB_ID']}\n"

    job = submit(tmp_path, env, *args)
    wait_for_step(status["step"] + 15)
    (worker,) = Path(f"/proc/{agents()[1]}/task/{agents()[1]}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    printed = job.communicate(timeout=180)[0]
    assert job.returncode == 0 and f"outputs/{run_dir.name}: finished" in printed, printed[-3000:]
    assert printed.count("resuming from") == 2, "once as it was requeued, once as its worker was killed"
    assert (tmp_path / "scontrol").read_text().count("requeue") == 1
    on_two_nodes(args, "undisturbed", tmp_path)
    assert_same_run(run_dir, tmp_path / "outputs/undisturbed")


@pytest.mark.parametrize(
    ("before", "after", "code", "requeued"),
    [
        (None, ("finished", ""), 0, False),
        (None, ("interrupted", "SIGUSR1"), 0, True),
        (("interrupted", "SIGUSR1"), ("interrupted", "SIGUSR1"), 0, True),
        (None, ("interrupted", "SIGTERM"), 1, False),
        (("interrupted", "SIGUSR1"), ("failed", "step 3: the loss is not finite"), 1, False),
        (("interrupted", "SIGUSR1"), None, 1, False),
        (None, None, 1, False),
    ],
)
def test_only_what_slurm_interrupted_is_requeued(tmp_path, before, after, code, requeued):
    """The script goes by the status that this attempt wrote, not by one of an earlier, and outlives a SIGTERM to itself."""

    def writing(status):
        state = json.dumps(dict(zip(("state", "reason", "step"), (*status, 3), strict=True)))
        return f"echo '{state}' > outputs/part && mv outputs/part outputs/$SLURM_JOB_ID/status.json"

    srun = (
        f"#!/bin/bash\nmkdir -p outputs/$SLURM_JOB_ID; kill -TERM $PPID; {writing(after) if after else ':'}; exit 1\n"
    )
    env = cluster(tmp_path, srun)
    if before:
        (tmp_path / "outputs" / env["SLURM_JOB_ID"]).mkdir(parents=True)
        subprocess.run(["bash", "-c", writing(before)], cwd=tmp_path, env=env, check=True)
    job = submit(tmp_path, env)
    printed = job.communicate(timeout=20)[0]
    assert (job.returncode, (tmp_path / "scontrol").exists()) == (code, requeued), printed
