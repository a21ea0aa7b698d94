"""README, docs/ and the comments in conf/: every command, setting, path and link that they name exists; README's commands run."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch.distributed.run import get_args_parser

import eval as evaluation
import train
from rpo import dist
from tests.helpers.judge_server import JudgeServer
from tests.helpers.runs import ROOT, script_env, settings

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
CONF = ROOT / "conf"
SHELL = {"for", "done", "zcat", "export", "vllm"}  # what a page may use besides the programs that are checked
PROGRAMS = {"python", "torchrun", "make", "pip", "sbatch"}
# Top-level names of which a page may name a file or folder in `backticks`.
PLACES = r"(?:rpo|conf|docs|tests|bench)/[\w./*-]+|(?:train|eval)\.py|Makefile|constraints\.txt|pyproject\.toml"
of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


# ---- reading a page


def blocks(page):
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)


def ticked(page):
    """Every `text` outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M))


def commands(page):
    """The words of every command: a line of a bash block, continuation lines joined, or a program's name in backticks."""
    lines = "".join(text for language, text in blocks(page) if language == "bash").replace("\\\n", " ").splitlines()
    lines += [text for text in ticked(page) if text.split()[0] in PROGRAMS and len(text.split()) > 1]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # OMP_NUM_THREADS=2 python ...
            words = words[1:]
        if words:
            yield words


# ---- one command


def cells(args):
    """The overrides of each run: those of a sweep's cells, or `args` themselves."""
    overrides = [word for word in args if word not in ("-m", "--multirun")]
    if len(overrides) == len(args):
        return [overrides]
    (swept,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), max_batch_size=None)
    return [list(cell) for cell in swept]


def check_script(script, args):
    """A script of the repository exists, and takes these arguments."""
    assert (ROOT / script).is_file(), f"no such file: {script}"
    if script in ("train.py", "eval.py"):
        for overrides in cells(args):
            settings(*overrides, name=script.removesuffix(".py"))
    else:  # of bench/: its options stand in its source
        known = "".join(path.read_text() for path in (ROOT / "bench").glob("*.py"))
        assert all(f'"{word}"' in known for word in args if word.startswith("--")), args


def check_module(module, args):
    """`python -m MODULE` has something to run; what rpo.training.memory takes besides gpus= and gib= are train.py's settings."""
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"no such module: {module}"
    if module == "rpo.training.memory":
        settings(*[word for word in args if word.partition("=")[0] not in ("gpus", "gib")])


def check(words):
    """Raises where a command names something that does not exist."""
    match words:
        case ["python", "-m", module, *args]:
            check_module(module, args)
        case ["python", script, *args]:
            check_script(script, args)
        case ["torchrun", *args]:
            launch = get_args_parser().parse_args(args)  # a misspelt option exits
            check_script(launch.training_script, launch.training_script_args)
        case ["sbatch", script, *args]:
            assert (ROOT / script).is_file(), f"no such file: {script}"
            settings(*args)
        case ["make", *targets]:
            known = re.findall(r"^(?:([a-z-]+):.*##|([A-Z]+ )\?=)", (ROOT / "Makefile").read_text(), re.M)
            given = {target.split("=")[0] + " " if "=" in target else target for target in targets}
            assert given <= {target or variable for target, variable in known}, targets
        case ["pip", "install", *args]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            named = [extra for word in args for part in re.findall(r"\[(.*)\]", word) for extra in part.split(",")]
            assert set(named) <= set(extras), named
        case _:
            assert words[0] in SHELL, f"neither a program that this test checks nor a shell's word: {words[0]}"


@of_each_page
def test_every_command_is_accepted(page):
    """Each is known; settings compose and pass the checks in every cell, and files, modules, options and targets exist."""
    for words in commands(page):
        try:
            check(words)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}: {shlex.join(words)}: {error}") from error


@of_each_page
def test_no_command_escapes(page):
    """No other block, fenced or indented, has what looks like a command."""
    fenced = "".join(text for language, text in blocks(page) if language != "bash")
    indented = re.findall(r"(?<=\n\n) {4}.*", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M))
    lines = [*fenced.splitlines(), *indented]
    assert [line for line in lines if re.match(rf"\s*(?:\$ )?(?:{'|'.join(PROGRAMS)})\s", line)] == []


def test_commands_in_the_comments_of_conf_are_accepted():
    """The same of the comments in conf/, where a command ends with its line."""
    found = []
    for path in sorted(CONF.rglob("*.yaml")):
        for line in re.findall(r"python\s+(?:-m [\w.]+|(?:train|eval)\.py [^#\n]+)", path.read_text()):
            found.append(shlex.split(line))
            check(found[-1])
    assert len(found) >= 8


@pytest.mark.parametrize(
    "words",
    [
        "python train.py loss.bta=1",
        "python train.py loss=rpo",
        "python train.py -m loss.beta=0.1,-1",
        "torchrun --nproc-per-rank 8 train.py",
        "torchrun --nproc-per-node 8 trainer.py",
        "python eval.py task=pair model.path=M",
        "python bench/step.py --lenghts hh",
        "python -m rpo.nothing",
        "python -m rpo.training.memory recipe=paper",
        "make demos",
        "pip install -e '.[evals]'",
        "accelerate launch train.py",
    ],
)
def test_a_wrong_command_fails(words):
    """A misspelt key, choice, option, file, module, target or extra, a value out of range and an unknown program all fail."""
    with pytest.raises((Exception, SystemExit)):
        check(shlex.split(words))


# ---- settings, paths and links in prose


def keys():
    """Every setting's name, loss.beta or data.gold.flip, of all files of conf/."""

    def flat(node, prefix):
        for key, value in node.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")

    names = set()
    for path in CONF.rglob("*.yaml"):
        prefix = "" if path.parent == CONF or path.parent.name == "recipe" else f"{path.parent.name}."
        names |= set(flat(OmegaConf.to_container(OmegaConf.load(path)), prefix))
    return names


@of_each_page
def test_settings_in_prose_exist(page):
    """`loss.beta`, `optim.lr=1e-6` and `layout=auto` in backticks are settings, and choices of their group."""
    known, groups = keys(), {path.name for path in CONF.iterdir() if path.is_dir()}
    heads = {name.partition(".")[0] for name in known if "." in name} - {"hydra"}
    for text in ticked(page):
        for word in text.split():
            key, _, value = word.partition("=")
            if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key):
                continue
            if "." in key and key.split(".")[0] in heads:
                assert key in known, f"{page.name}: {word}"
            elif key in groups and re.fullmatch(r"\w+", value):
                assert (CONF / key / f"{value}.yaml").is_file(), f"{page.name}: {word}"


@of_each_page
def test_paths_in_prose_exist(page):
    """Files and folders of the repository in backticks are there."""
    missing = [text for text in ticked(page) if re.fullmatch(PLACES, text) and not [*ROOT.glob(text.rstrip("/"))]]
    assert missing == []


@of_each_page
def test_links_lead_somewhere(page):
    """Relative links and pictures are files of the repository, and what follows # is a heading there."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, link


def test_readme_fits_in_five_minutes():
    """README has at most 140 lines, says within 30 what was never run on a GPU, and links every page of docs/."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140
    assert "not run on a GPU" in "\n".join(text.splitlines()[:30])
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text] == []


# ---- README's commands, run as they stand in a folder that has what they name

TINY = ["max_steps=2", "batch_size=8", "log_every=1", "eval_every=0", "wandb.mode=disabled", "optim.lr=1e-3"]
PAIRS = ["model.path=MODEL", "data.train=TRAIN.jsonl", "data.eval=HELD_OUT.jsonl"]
SAMPLED = [
    "task.samples=2",
    "task.limit=4",
    "task.pairs=4",
    "task.bon=[]",
    "task.batch_size=8",
    "task.max_new_tokens=4",
]
SHORT = {  # of eval.py's tasks
    "pairs": ["run_dir=EVAL_A"],
    "generate": ["task.max_new_tokens=4"],
    "overopt": ["runs=SWEEP/1", *SAMPLED, "task.gold=gold.py:words", "run_dir=EVAL"],
    "select": ["task.min_ended=null"],
    "compare": [],
    "report": [],
}


def first_of(script, multirun=False):
    """README's first command of a script, a sweep's or a single run's."""
    named = [words for words in commands(ROOT / "README.md") if script in words and ("-m" in words) == multirun]
    return named[0]


def with_settings(words, *more):
    """The command with settings replaced by, or followed by, `more`."""
    replaced = {word.partition("=")[0] for word in more}
    return [*[word for word in words if word.partition("=")[0] not in replaced], *more]


def in_this_process(script, overrides, name):
    try:
        assert script(settings(*overrides, name=name)) == "finished"
    finally:
        dist.shutdown()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A folder with the repository's scripts, MODEL, SFT and files of rows, and what README's train and sweep commands left."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("train.py", "conf"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("MODEL", "SFT"):
        (folder / name).symlink_to(tiny / "model")
    for name, source in {"TRAIN": "train", "HELD_OUT": "eval", "PROMPTS": "eval"}.items():
        unpacked = subprocess.run(["zcat", tiny / f"{source}.jsonl.gz"], capture_output=True, check=True).stdout
        (folder / f"{name}.jsonl").write_bytes(unpacked)
    (folder / "gold.py").write_text("def words(prompt, response):\n    return float(len(response.split()))\n")
    words = with_settings(first_of("train.py"), *TINY, "run_dir=RUN")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        in_this_process(train.train, words[words.index("train.py") + 1 :], "train")
    env = script_env(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    sweep = with_settings(first_of("train.py", multirun=True), *TINY, *PAIRS, "loss.beta=0.1", "run_dir=SWEEP")
    done = subprocess.run(sweep, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{shlex.join(sweep)}: {done.stderr[-2000:]}"
    (folder / "RUN2").symlink_to(folder / "SWEEP" / "0")
    return folder


def test_train_and_sweep_commands_run(folder):
    """README's first train and sweep command leave models, checkpoints and the sweep's table."""
    assert (folder / "RUN/model/model.safetensors").is_file() and (folder / "RUN/checkpoints/step_00000002").is_dir()
    assert (folder / "SWEEP/sweep.png").is_file() and (folder / "SWEEP/1/model/model.safetensors").is_file()


def test_evaluation_commands_run(folder, monkeypatch):
    """README's evaluations, one after the other, but for those that need a judge or a benchmark's files."""
    monkeypatch.chdir(folder)
    asked = [words for words in commands(ROOT / "README.md") if "eval.py" in words]
    tasks = [next(word for word in words if word.startswith("task=")).removeprefix("task=") for words in asked]
    assert {*tasks} - {*SHORT} == {"winrate", "mt_bench", "alpaca_eval", "lm_eval", "mbpp"} and {*SHORT} <= {*tasks}

    def run(*overrides):
        in_this_process(evaluation.evaluate, overrides, "eval")

    held_out = (
        f"data.eval={folder}/HELD_OUT.jsonl"  # as RUN's config has it: an item's id is its file's path and a line
    )
    run("task=pairs", "model.path=SFT", "reference.path=MODEL", held_out, "task.beta=0.5", "run_dir=EVAL_B")
    with JudgeServer() as server:
        for task, words in zip(tasks, asked, strict=True):
            if task in SHORT:
                words = [word.replace("http://127.0.0.1:8000/v1", server.url) for word in words]
                run(*with_settings(words, *SHORT[task])[2:])
    assert (folder / "ANSWERS/samples.jsonl").is_file() and list(
        (folder / "outputs").glob("*_eval_report_*/report.html")
    )
