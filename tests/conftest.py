"""Tiny things that many tests share: a process group of one, a word tokenizer, a model, preference files."""

import os
import signal

import pytest

from rpo import config, dist
from tests.helpers.gold_runs import make_gold_sweep
from tests.helpers.models import make_lm
from tests.helpers.rows import make_rows_json, make_tokenizer, write_jsonl
from tests.helpers.runs import settings, tiny_args


def pytest_configure(config):
    """Slow tests stay out of a run that names neither a file nor -m: a file that is named runs whole."""
    if not config.option.markexpr and config.args_source is not config.ArgsSource.ARGS:
        config.option.markexpr = "not slow"


@pytest.fixture(scope="session", autouse=True)
def signals_as_in_a_terminal():
    """Under nohup or behind `&` a shell has SIGHUP or SIGINT ignored, and every process that a test starts would too."""
    ignored = [signum for signum in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(signum) == signal.SIG_IGN]
    for signum in ignored:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def quiet_environment(tmp_path_factory):
    """No test reads the user's cache or key, reaches a network, or leaves threads to fight over two cores."""
    os.environ |= {"RPO_CACHE": str(tmp_path_factory.mktemp("cache")), "HF_HUB_OFFLINE": "1", "WANDB_SILENT": "true"}
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        os.environ.pop(name, None)
    os.environ["NETRC"] = os.devnull


@pytest.fixture
def group():
    """A process group of one, destroyed afterwards; the value is the device."""
    yield dist.init()
    dist.shutdown()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with model/ (Llama and its tokenizer), train.jsonl.gz (40 pairs) and eval.jsonl.gz (12 pairs)."""
    folder = tmp_path_factory.mktemp("tiny")
    make_lm().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "train.jsonl.gz", make_rows_json(40))
    write_jsonl(folder / "eval.jsonl.gz", make_rows_json(12, seed=1))
    return folder


@pytest.fixture(scope="session")
def base(tiny):
    """The settings of a run, as its config.yaml has them."""
    return config.to_dict(settings("data=files", *tiny_args(tiny), "loss=rpo_sum"))


@pytest.fixture(scope="module")
def gold_sweep(tmp_path_factory):
    """A folder that the embedded task could have made, and sweep/ with runs on it: see `make_gold_sweep`."""
    return make_gold_sweep(tmp_path_factory.mktemp("gold_sweep"))
