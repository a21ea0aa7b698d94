"""Overrides that Hydra would misread: the error's own advice, typed into a shell, reads back as what was meant."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from rpo.config import Train
from rpo.errors import UserError
from rpo.text import in_quotes
from rpo.training import command_line, misspelt
from tests.helpers.runs import ROOT, command, script_env, settings


def value_of(text):
    return OverridesParser.create().parse_override(text).value()


def advice(*overrides, multirun=False):
    """The override that the error says to write, as a shell would hand it on."""
    with pytest.raises(UserError) as caught:
        command_line.check(overrides, Train, multirun=multirun)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{overrides[-1]}: "), message
    (word,) = shlex.split(message.rpartition("write ")[2])
    return word


@pytest.mark.parametrize(
    "value",
    ["/a/b=c.jsonl", "a,b.jsonl", "/a/(1).jsonl", "/a/#1.jsonl", "/données/x.jsonl", "/a/it's.jsonl", "/a/{x}", "a!b",
     '/a/6".jsonl', "/a=b, c/d.jsonl", "/a/x;y&z", "C:\\a,b\\"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["data.train", "model.path", "run_dir", "+model.architecture.x"])
def test_the_advice_reads_back(key, value):
    """For =, commas, brackets, quotes, letters beyond ASCII: what the error says to write is the value that was typed."""
    word = advice(f"{key}={value}")
    assert word.partition("=")[0] == key and value_of(word) == value
    command_line.check([word], Train, multirun=False)


def test_advice_for_lists_spaces_and_sweeps(tmp_path):
    """Elements of a list are quoted one by one; a value that the shell split is joined; a file is not swept over."""
    assert value_of(advice("data.train=[/a/b=c.jsonl,/d/e.jsonl]")) == ["/a/b=c.jsonl", "/d/e.jsonl"]
    with pytest.raises(UserError, match=r"write 'data.train=\"/my data/a.jsonl\"'"):
        command_line.check(["loss=dpo", "data.train=/my", "data/a.jsonl"], Train, multirun=False)
    with pytest.raises(UserError, match=r"^loss.beta=0.1,0.2: several values make a sweep: add -m"):
        command_line.check(["loss.beta=0.1,0.2"], Train, multirun=False)
    (tmp_path / "a,b.jsonl").touch()
    assert value_of(advice(f"data.train={tmp_path}/a,b.jsonl", multirun=True)) == f"{tmp_path}/a,b.jsonl"
    texts = ["loss.beta=0.1,0.2", "data.train=[a,b]", "~optim", "data.train=/my data/a.jsonl"]
    command_line.check(texts, Train, multirun=True)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("[{path: a=b.jsonl}]", [{"path": "a=b.jsonl"}]),
        ("[{path: a,b=c.jsonl, weight: 2},d=e.jsonl]", [{"path": "a,b=c.jsonl", "weight": 2}, "d=e.jsonl"]),
        ('["a,b", /c/{x}.jsonl, {weight: .5, path: d (1).csv}]', ["a,b", "/c/{x}.jsonl", {"weight": 0.5, "path": "d (1).csv"}]),
        ("[{path: a,b.jsonl}]", [{"path": "a,b.jsonl"}]),
        ("[hub/name:tr=ain]", ["hub/name:tr=ain"]),
        ("[2024_11_30,{path: 1e3, weight: 1e1}]", ["2024_11_30", {"path": "1e3", "weight": 10.0}]),
    ],
)  # fmt: skip
def test_the_advice_for_mixtures_reads_back(value, meant):
    """Within braces and lists each value that needs quotes has them; weights stay numbers."""
    word = advice(f"data.train={value}")
    assert value_of(word) == meant
    command_line.check([word], Train, multirun=False)


def test_brackets_that_the_shell_split_are_joined():
    """A space in braces ends the argument: the error shows the whole, quoted."""
    split = ["data.train=[{path:", "my", "data/a=b.jsonl,", "weight:", "2}]", "seed=1"]
    with pytest.raises(UserError, match=r"^data.train=\[{path:: special .*write ") as caught:
        command_line.check(split, Train, multirun=False)
    (word,) = shlex.split(str(caught.value).rpartition("write ")[2])
    assert value_of(word) == [{"path": "my data/a=b.jsonl", "weight": 2}]


@pytest.mark.parametrize("value", ["2024_11_30", "1e3", "true", "1_0.5", "nan", "inf", ".5", "2024"])
@pytest.mark.parametrize("key", ["run_dir", "wandb.group", "model.path", "data.train", "cache_dir", "+run_dir"])
def test_a_text_that_reads_as_a_number_keeps_its_letters(key, value):
    """The error says how to write the very text that was typed, underscores and exponents as they are."""
    word = advice(f"{key}={value}")
    assert value_of(word) == value
    command_line.check([word], Train, multirun=False)


@pytest.mark.parametrize(
    "text", ["run_dir=on", "run_dir=007", "run_dir=null", "run_dir=2024-11-30", "seed=1_0", "optim.lr=1e-6", "compile=true",
             "checkpoint.keep=3", "epochs=2", "data.chat_template_kwargs={x: 1}", "+model.architecture.x=1e3", "data.train=[a]"],
)  # fmt: skip
def test_what_hydra_reads_as_it_is_meant_is_accepted(text):
    command_line.check([text], Train, multirun=False)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=12))
def test_in_quotes_reads_back(text):
    """Any text, backslashes and quotes too, comes back from Hydra's quoted form."""
    assert value_of(f"key={in_quotes(text)}") == text or "${" in text


@pytest.mark.parametrize(("key", "value"), [("run_dir", "2024"), ("wandb.group", "1.5"), ("model.revision", "1e3")])
def test_digits_where_a_text_is_expected(key, value):
    """The error says how to write a folder or name that looks like a number, and that is accepted."""
    with pytest.raises(UserError) as caught:
        settings(f"{key}={value}")
    (word,) = shlex.split(re.search("quotes within quotes: (.*)$", str(caught.value))[1])
    group, _, name = key.rpartition(".")
    cfg = settings(word)
    assert float(getattr(getattr(cfg, group) if group else cfg, name)) == float(value)


def test_scripts_say_it(tmp_path):
    """train.py, eval.py and the memory estimate: exit code 2, one line on stderr."""
    commands = [command(script, "data.eval=/a/b=c.jsonl") for script in ("train.py", "eval.py")]
    commands += [[sys.executable, "-m", "rpo.training.memory", "data.eval=/a/b=c.jsonl", "gpus=1", "gib=80"]]
    for args in commands:
        done = subprocess.run(args, env=script_env(), cwd=tmp_path, capture_output=True, text=True)
        line = "error: data.eval=/a/b=c.jsonl: special characters need quotes within quotes: write "
        assert (done.returncode, done.stderr) == (2, line + "'data.eval=\"/a/b=c.jsonl\"'\n"), done.stderr
    assert os.listdir(tmp_path) == [] and ROOT.is_dir()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr=1e-6", "lr=1e-6: no such key; did you mean optim.lr?"),
        ("+lr=1e-6", "did you mean optim.lr?"),  # what Hydra advises
        ("beta=.1", "did you mean loss.beta?"),
        ("optim.learning_rate=1", "did you mean optim.lr?"),
        ("loss.normalise=true", "did you mean loss.normalize?"),
        ("wandb.projct=x", "did you mean wandb.project?"),
        ("model.lora.rank=8", "no such key"),
        ("output_dir=x", "did you mean run_dir?"),
        ("nonsense=1", "nonsense=1: no such key; the keys here are loss, model, data"),
        ("loss=rpo", "conf/loss has no rpo; did you mean loss=rpo_avg|rpo_sum|rpo_token?"),
        ("loss=dpo,rp", "conf/loss has no rp; did you mean loss=rpo_avg"),
        ("data=fils", "did you mean data=files?"),
        ("reference=zzz", "conf/reference has no zzz; there are cached, live, moving"),
        ("recipe=paper", "did you mean recipe=paper_beta|"),
        ("loss=null", "loss=null: expected one of conf/loss: chi_po, cpo"),
    ],
)
def test_what_is_misspelt_is_refused_with_what_was_meant(text, words):
    """One line with the nearest real keys or choices, before Hydra prints six and advises +lr."""
    with pytest.raises(UserError) as caught:
        command_line.check([text], Train, multirun=True)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "loss=dpo,ipo",
            "loss.beta=0.1",
            "optim.betas=[0.9,0.95]",
            "+model.architecture.vocab_size=9",
            "~model.architecture",
        ),
        *(
            "hydra.sweep.dir=x",
            "hydra/launcher=basic",
            "+experiment=mine",
            "+recipe=demo",
            "data.chat_template_kwargs.a=1",
        ),
        *("data.train=[{path: a.jsonl, weight: 2}]", "loss=${oc.env:LOSS}", "optim.lr=choice(1e-6,1e-5)"),
    ],
)
def test_what_hydra_allows_is_let_through(text):
    """Groups, open mappings, Hydra's own keys, what is taken away, a user's own group."""
    command_line.check([text], Train, multirun=True)


def test_a_list_is_asked_for_in_brackets():
    """A comma in what takes only lists is no sweep that was meant."""
    with pytest.raises(UserError, match=r"wandb.tags=a,b: expected a list; write wandb.tags=\[a,b\]"):
        command_line.check(["wandb.tags=a,b"], Train, multirun=False)


def test_every_key_elsewhere_is_one_here():
    """The table of other trainers' names leads to keys and groups that are there."""
    known = misspelt.keys(Train)
    assert all(key in known for key in misspelt.ELSEWHERE.values())
    assert not misspelt.ELSEWHERE.keys() & set(known)
    assert all(misspelt.nearest(key.rpartition(".")[2], known) for key in known)
