"""Installed, without the checkout: console commands, `python -m`, configs that come along."""

import shutil
import subprocess
import sys

import pytest

from tests.helpers.runs import ROOT, script_env


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what `pip install .` installs of this project alone, and the environment in which Python finds it first."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv*", "outputs", "build"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run([*command, str(folder / "site"), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(source)
    return folder / "site", script_env(PYTHONPATH=str(folder / "site"), WANDB_MODE="disabled")


def test_from_an_empty_folder_it_trains_and_evaluates(installed, tmp_path):
    """rpo-train and rpo-eval of one another, a pattern for the model as no shell expands it there."""
    site, env = installed
    for command, *args in (
        ("rpo-train", "max_steps=2", "eval_every=0", "data.gold.samples=8", "data.gold.eval_pairs=16"),
        ("rpo-eval", "task=pairs", "model.path=outputs/*/model", "task.limit=8"),
    ):
        done = subprocess.run(
            [sys.executable, site / "bin" / command, *args], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    found = {path.name.split("_")[2] for path in (tmp_path / "outputs").iterdir()}
    assert found == {"sigmoid", "eval"}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["bin/rpo-memory", "recipe=paper_beta", "gpus=8", "gib=79"], "fits 79 GiB"),
        (["bin/rpo-export", "--help"], "--push-to-hub"),
        (["-m", "rpo.train", "loss=rpo"], "did you mean loss=rpo_avg|rpo_sum|rpo_token?"),
        (["-m", "rpo.eval", "--cfg", "job"], "tokens_per_microbatch"),
    ],
)
def test_its_other_commands(command, words, installed, tmp_path):
    """Each answers from an empty folder."""
    site, env = installed
    command = [str(site / part) if part.startswith("bin/") else part for part in command]
    done = subprocess.run([sys.executable, *command], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_in_a_checkout_they_are_the_scripts_themselves():
    """What is installed is train.py, eval.py and conf/, once."""
    for name in ("train.py", "eval.py", "conf"):
        assert (ROOT / "rpo" / name).is_symlink() and (ROOT / "rpo" / name).resolve() == ROOT / name
