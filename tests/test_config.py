"""Every YAML composes and explains its keys; presets and recipes have the published values."""

import re
from typing import Annotated

import pytest
from omegaconf import OmegaConf

import eval as evaluation
from rpo import config, fields
from rpo.errors import UserError
from tests.helpers.runs import ROOT, settings

CONF = ROOT / "conf"
# loss= : preference, sft, beta, eta
PRESETS = {
    "dpo": ("sigmoid", "none", 0.1, 0.0),
    "rpo_sum": ("sigmoid", "sum", 0.01, 0.005),
    "rpo_avg": ("sigmoid", "avg", 0.5, 0.2),
    "rpo_token": ("sigmoid", "token", 0.1, 1.0),
    "ipo": ("ipo", "none", 0.1, 0.0),
    "hinge": ("hinge", "none", 0.1, 0.0),
    "sft": ("none", "token", None, 1.0),
    "dpo_norm": ("sigmoid", "none", 5.0, 0.0),
    "robust": ("robust", "none", 0.1, 0.0),
    "dpop": ("dpop", "none", 0.3, 0.0),
    "chi_po": ("chi_po", "none", 0.05, 0.0),
    "simpo": ("simpo", "none", 2.0, 0.0),
    "cpo": ("cpo", "token", 0.1, 1.0),
    "orpo": ("orpo", "avg", 0.1, 1.0),
}
OWN = {
    "ipo": {"normalize": True},
    "dpo_norm": {"normalize": True},
    "robust": {"label_smoothing": 0.1},
    "dpop": {"lam": 50.0},
    "chi_po": {"clip": 10.0},
    "simpo": {"gamma": 1.0},
}
# The published hyper-parameters: what the three runs share, and what sets each apart.
PAPER = {
    "batch_size": 128,
    "seed": 42,
    "optim.lr": 5e-7,
    "optim.schedule": "cosine",
    "optim.weight_decay": 0.0,
    "optim.max_grad_norm": 1.0,
    "loss.preference": "sigmoid",
    "loss.label_smoothing": 0.0,
    "reference.path": None,
    "max_steps": None,
}
GEMMA = {
    "model.path": "HuggingFaceH4/zephyr-7b-gemma-sft-v0.1",
    "data.train": "argilla/dpo-mix-7k:train",
    "data.eval": "argilla/dpo-mix-7k:test",
    "epochs": 2,
}
ADAM = {"optim.betas": [0.9, 0.999], "optim.min_lr_ratio": 0.0, "optim.warmup_ratio": 0.1, "eval_every": 100}
SUM = {"loss.sft": "sum", "loss.eta": 0.005}
RECIPES = {
    "paper_beta": PAPER
    | ADAM
    | SUM
    | {
        "loss.beta": 0.01,
        "model.path": "HuggingFaceH4/mistral-7b-sft-beta",
        "data.train": "HuggingFaceH4/ultrafeedback_binarized:train_prefs",
        "data.eval": "HuggingFaceH4/ultrafeedback_binarized:test_prefs",
        "epochs": 1,
    },
    "paper_gemma": PAPER | ADAM | SUM | GEMMA | {"loss.beta": 0.05},
    "paper_gemma_avg": PAPER
    | GEMMA
    | {
        "loss.sft": "avg",
        "loss.beta": 0.5,
        "loss.eta": 0.2,
        "optim.betas": [0.9, 0.95],
        "optim.warmup_ratio": 0.03,
        "optim.min_lr_ratio": 0.1,
    },
}


def flat(node, prefix=""):
    """{"a.b": value} of nested dicts, but for free-form ones."""
    items = {}
    for key, value in node.items():
        nested = isinstance(value, dict) and key != "architecture"
        items |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return items


def names(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


# What a file of a group needs before it composes: a path where there is no default.
NEEDS = {
    ("model", "hub"): ["model.path=DIR", "data=files", "data.train=FILE"],
    ("data", "files"): ["data.train=FILE", "model.path=DIR"],
    ("loss", "sft"): [],
}
TRAIN_FILES = [
    (group, name) for group in ("loss", "model", "data", "reference", "layout", "recipe") for name in names(group)
]


@pytest.mark.parametrize(("group", "name"), TRAIN_FILES, ids=lambda value: value)
def test_every_choice_is_accepted(group, name):
    """Each file of each group composes into settings that pass the checks, and config.yaml holds them all."""
    cfg = settings(f"{group}={name}", *NEEDS.get((group, name), []))
    again = config.train_config(OmegaConf.create(config.to_yaml(cfg)))
    assert again == cfg


# What a task evaluates; a model's reference, data and beta may come from its run.
TASK_NEEDS = {
    "overopt": "runs=RUNS",
    "select": "task.results=DIR",
    "compare": "task.results=DIR",
    "report": "runs=RUNS",
    "winrate": "annotations=FILE",
    "mt_bench": "annotations=FILE",
    "alpaca_eval": "annotations=FILE",
    "judge_check": "annotations=FILE",
    "mbpp": "model.path=RUN/model task.data=FILE task.allow_code_execution=true",
}


@pytest.mark.parametrize("name", names("task"))
def test_every_task_is_accepted(name):
    """eval.py's tasks compose with nothing but what they evaluate, and each file holds its own task's keys alone."""
    cfg = settings(f"task={name}", *TASK_NEEDS.get(name, "model.path=RUN/model").split(), name="eval")
    assert cfg.task.kind == name and cfg.data.eval is None
    assert evaluation.eval_config(OmegaConf.create(config.to_yaml(cfg))) == cfg


def test_judged_answers_are_sampled_alike():
    """Answers that task=generate writes for task=winrate are sampled as those that it makes of models itself."""
    generate = settings("task=generate", "model.path=M", name="eval").task
    winrate = settings("task=winrate", *TASK_NEEDS["winrate"].split(), name="eval").task
    for key in ("limit", "temperature", "top_p", "max_new_tokens", "batch_size"):
        assert getattr(generate, key) == getattr(winrate, key), key
    assert (generate.samples, generate.top_k) == (1, 0)


def test_groups_are_those_of_the_tests():
    """No group of conf/ escapes the two tests above."""
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert groups == {group for group, _ in TRAIN_FILES} | {"task"}


@pytest.mark.parametrize("name", names("loss"))
def test_loss_presets(name):
    """Each preset is the documented mix of preference form, SFT form, beta and eta."""
    loss = settings(f"loss={name}").loss
    preference, sft, beta, eta = PRESETS[name]
    assert (loss.preference, loss.sft, loss.eta) == (preference, sft, eta)
    assert beta is None or loss.beta == beta
    own = {"normalize": False, "label_smoothing": 0, "lam": None, "clip": None, "gamma": None} | OWN.get(name, {})
    assert {key: getattr(loss, key) for key in own} == own


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_paper_recipes(name):
    """The paper's recipes have every published hyper-parameter."""
    found = flat(config.to_dict(settings(f"recipe={name}")))
    assert {key: found[key] for key in RECIPES[name]} == RECIPES[name]


@pytest.mark.parametrize(
    "name", [name for name in names("recipe") if not name.endswith("_dpo") and name not in ("overopt", "real")]
)
def test_controls_differ_in_the_sft_term_alone(name):
    """Every recipe has a control that equals it, beta included, but for the SFT term: plain DPO (a study has its arms)."""
    ours, control = (flat(config.to_dict(settings(f"recipe={r}"))) for r in (name, f"{name}_dpo"))
    differing = {key for key in ours if ours[key] != control[key]}
    assert differing == {"loss.sft", "loss.eta"}
    assert (control["loss.preference"], control["loss.sft"], control["loss.eta"]) == ("sigmoid", "none", 0.0)


def test_auto_learning_rate():
    """optim.lr=auto becomes a number that config.yaml records; a number given stays."""
    files = ["data=files", "model=hub", "model.path=DIR", "data.train=FILE"]
    assert settings().optim.lr == 5e-4
    assert settings(*files).optim.lr == 5e-7
    assert settings(*files, "loss=sft").optim.lr == 2e-5
    assert settings("loss=sft").optim.lr == 3e-3
    assert settings("optim.lr=1e-6").optim.lr == 1e-6


KEY = re.compile(r"(\s*)(?:- )?(?:override )?/?(\w+):(.*)")


def undocumented(text, strict):
    """The lines with a value but no comment: beside it if `strict`, else there or above it since the last blank line.

    A comment beside a group's first key speaks for the group where it is Hydra's own or a model's architecture.
    """
    bad, above, whole_block = [], False, None
    for line in text.replace("# @package", "").splitlines():
        above = bool(line.strip()) and (above or "#" in line)
        if key := KEY.match(line):
            indent, name, value = key.groups()
            if whole_block is not None and len(indent) <= whole_block:
                whole_block = None
            if name in ("hydra", "architecture", "kind"):
                whole_block = len(indent)
            has_value = bool(value.split("#")[0].strip())
            if has_value and not ("#" in value or (above and (whole_block is not None or not strict))):
                bad.append(line)
    return bad


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_has_a_comment(path):
    """Each key is explained where it stands; a recipe, which sets keys explained elsewhere, gives its sources."""
    assert undocumented(path.read_text(), strict=path.parent.name != "recipe") == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], "f.jsonl:3: expected an object with name, share, turns, got ['a']; fix the row"),
        (ValueError("byte 7: expected UTF-8"), "f.jsonl:3: byte 7: expected UTF-8"),
        ({"share": 0.5, "turns": ["a", "b"]}, "f.jsonl:3: field name: expected a string, got None; fix the row"),
        ({"name": "a", "share": "x", "turns": []}, "f.jsonl:3: field share: expected a number, got 'x'; fix the row"),
        ({"name": "a", "share": True, "turns": []}, "f.jsonl:3: field share: expected a number, got True; fix the row"),
        (
            {"name": "a", "share": "nan", "turns": []},
            "f.jsonl:3: field share: expected a number, got 'nan'; fix the row",
        ),
        (
            {"name": "a", "share": "1e-3", "turns": ["a", 1]},
            "f.jsonl:3: field turns: expected 2 texts, got ['a', 1]; fix the row",
        ),
    ],
)
def test_rows_of_files(row, message):
    """The first field that is not what it should be, by its place; fields that are not asked for are ignored."""

    @fields.group
    class Row:
        name: str
        share: fields.Number
        turns: Annotated[list[str], fields.Field(min_length=2, max_length=2, description="2 texts")]

    good = fields.read_row(Row, {"name": "a", "share": "1e-3", "turns": ["a", "b"], "more": 1}, "f.jsonl:3")
    assert (good.name, good.share) == ("a", 0.001)
    with pytest.raises(UserError) as error:
        fields.read_row(Row, row, "f.jsonl:3")
    assert str(error.value) == message
