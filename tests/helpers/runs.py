"""Tiny things that many tests share: a process group of one, a word tokenizer, a model, preference files."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

import train
from rpo import config, dist
from rpo.runs import log

ROOT = Path(__file__).parents[2]


def settings(*overrides, name="train"):
    """The checked settings of a command line."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(name, overrides=[str(o) for o in overrides])
    if name == "eval":
        import eval as evaluation

        return evaluation.eval_config(cfg)
    return config.train_config(cfg)


def tiny_args(tiny, *more):
    """Overrides of a short, quiet run on the tiny folder."""
    return [
        f"model.path={tiny / 'model'}",
        f"data.train={tiny / 'train.jsonl.gz'}",
        f"data.eval={tiny / 'eval.jsonl.gz'}",
        "wandb.mode=disabled",
        "optim.lr=1e-3",
        *more,
    ]


def script_env(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


def command(script, *args, ranks=1):
    """The shell command that runs a script on so many ranks."""
    args = [str(arg) for arg in args]
    if ranks == 1:
        return [sys.executable, str(ROOT / script), *args]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        str(ROOT / script),
        *args,
    ]


SHORT = ("batch_size=8", "max_steps=4", "log_every=1", "eval_every=0")


def run(tiny, run_dir, *more, plots=False):
    """The events of a run made in this process; `plots` take longer than a tiny model's steps."""
    try:
        with nullcontext() if plots else patch("rpo.training.figures.draw_run"):
            assert train.train(settings(*tiny_args(tiny, *SHORT, *more, f"run_dir={run_dir}"))) == "finished"
    finally:
        dist.shutdown()
    return log.read_jsonl(run_dir / "metrics.jsonl")


def timeless(events):
    """The events without what the clock and the machine decide."""
    return [{k: v for k, v in e.items() if k != "time" and not k.startswith("perf/")} for e in events]


def weights(folder):
    return load_file(folder / "model.safetensors")
