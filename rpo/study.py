"""The study of overoptimisation: every arm trained and evaluated over paired seeds, then one table and its figures.

    python -m rpo.study FOLDER [SEEDS]      # make overopt; begun again, it goes on where it was

An arm is one `train.py -m recipe=overopt` over all seeds and its own grid, and one `eval.py task=overopt` of its runs.
A seed decides pairs, labels and order, so arms of one task are compared on the same data, step for step.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rpo import config

ROOT = Path(__file__).parent.parent
WORKERS = 2  # arms at once, one thread each: the model is too small for more
DPO, RPO = ("loss=dpo", "loss.beta=0.02"), ("loss=rpo_sum", "loss.beta=0.02", "loss.eta=0.25")
AVG = ("loss=rpo_avg", "loss.beta=0.02", "loss.eta=0.1")
ARMS = {
    "dpo": ("loss=dpo", "loss.beta=0.02,0.05,0.1,0.3"),
    "rpo_sum": ("loss=rpo_sum", "loss.beta=0.02", "loss.eta=0.005,0.05,0.25"),
    "rpo_sum_beta": ("loss=rpo_sum", "loss.beta=0.05,0.1,0.3", "loss.eta=0.25"),
    "rpo_avg": AVG,
    "rpo_avg_beta": ("loss=rpo_avg", "loss.beta=0.1,0.5", "loss.eta=0.2"),  # beta .5 is the preset
    "ipo": ("loss=ipo", "loss.beta=0.1,1"),
    "hinge": ("loss=hinge", "loss.beta=0.02"),
    "cdpo": (*DPO, "loss.label_smoothing=0.25"),  # the true share of flips
    # Controls.
    "sft": ("loss=sft",),  # on the chosen answers: what imitation alone gains
    "dpo_lr": (*DPO, "optim.lr=1e-4"),
    "noise_dpo": (*DPO, "data.gold.flip=0,0.1,0.4"),
    "noise_rpo": (*RPO, "data.gold.flip=0,0.1,0.4"),
    "open_dpo": (*DPO, "data.gold.hidden_weight=0"),  # nothing in the reward is hidden from the pairs
    "open_rpo": (*RPO, "data.gold.hidden_weight=0"),
    "length_dpo": (*DPO, "data.gold.length_weight=0.1"),
    "length_rpo": (*RPO, "data.gold.length_weight=0.1"),
    "length_avg": (*AVG, "data.gold.length_weight=0.1"),
}


# ---- training and evaluating


def _run(script: str, *args: str) -> None:
    """A script of this project in a process of one thread; its output goes to our own. Raises where it fails."""
    print("python", script, *args, flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(ROOT / script), *args], check=True, env=env)


def _train(folder: Path, arm: str, seeds: list[int]) -> None:
    if arm != "sft":
        # The seed is the outer loop: a sweep keeps model, data and reference from one cell to the next.
        return _run(
            "train.py",
            "-m",
            "recipe=overopt",
            f"seed={','.join(map(str, seeds))}",
            *ARMS[arm],
            f"run_dir={folder / arm}",
        )
    for seed in seeds:  # the files of the pairs, which data=gold with loss=sft would not read
        pairs = config.read_yaml(
            next(
                path
                for path in sorted((folder / "dpo").glob("*/config.yaml"))
                if config.read_yaml(path)["seed"] == seed
            )
        )
        files = (f"data.train={pairs['data']['train']}", f"data.eval={pairs['data']['eval']}")
        _run(
            "train.py",
            "recipe=overopt",
            f"seed={seed}",
            *ARMS[arm],
            *files,
            f"model.path={pairs['model']['path']}",
            f"run_dir={folder / arm / str(seed)}",
        )


def make(folder: Path, seeds: list[int]) -> None:
    """Trains and evaluates every arm into `folder`, WORKERS at a time; what is there already is gone on with."""

    def one(arm: str) -> None:
        _train(folder, arm, seeds)
        _run("eval.py", "task=overopt", f"runs={folder / arm}", f"run_dir={folder / 'eval' / arm}")

    one("dpo")  # first: it makes the pairs' files
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(one, [arm for arm in ARMS if arm != "dpo"]))
