"""rpo.runs.groups: what is one group, what it is called, and means over its seeds."""

import math
from dataclasses import replace

import numpy as np
import pytest

from rpo.config import to_dict
from rpo.errors import UserError
from rpo.runs import groups
from tests.helpers.runs import settings

DPO = {"preference": "sigmoid", "sft": "none", "beta": 0.02, "eta": 0.0, "label_smoothing": 0.0, "normalize": True}


def make_run(seed=0, data_seed=0, loss=None, summary=None, **keys):
    """A run whose settings have a few keys; `keys` may add or replace top-level ones."""
    settings = {
        "loss": DPO | (loss or {}),
        "data": {
            "train": f"/cache/gold/{data_seed:016x}/pairs.jsonl.gz",
            "eval": f"/cache/gold/{data_seed:016x}/pairs_eval.jsonl.gz",
            "gold": {"flip": 0.25, "samples": 512, "seed": data_seed},
        },
        "model": {"path": f"/cache/gold/{data_seed:016x}/sft/model", "architecture": {}},
        "reference": {"kind": "cached", "path": None, "cache_dir": f"/cache/{seed}"},
        "optim": {"lr": 5e-4},
        "seed": seed,
        "run_dir": f"/runs/{seed}",
    }
    return {"run": f"/runs/{seed}/{data_seed}", "settings": settings | keys, "curve": [], "summary": summary or {}}


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({}, "DPO beta 0.02"),
        ({"label_smoothing": 0.1}, "cDPO beta 0.02 smoothing 0.1"),
        ({"sft": "sum", "eta": 0.25}, "RPO sum beta 0.02 eta 0.25"),
        ({"sft": "avg", "eta": 0.005, "beta": 0.5}, "RPO avg beta 0.5 eta 0.005"),
        ({"sft": "token", "eta": 1.0}, "RPO token beta 0.02 eta 1"),
        ({"sft": "sum", "eta": 0.0}, "DPO beta 0.02"),
        ({"preference": "ipo", "beta": 0.1}, "IPO beta 0.1"),
        ({"preference": "ipo", "beta": 0.1, "normalize": False}, "IPO beta 0.1 of sums"),
        ({"preference": "ipo", "sft": "sum", "eta": 0.1}, "IPO + SFT sum beta 0.02 eta 0.1"),
        ({"preference": "hinge", "beta": 1.0}, "SLiC beta 1"),
        ({"preference": "square", "sft": "sum", "eta": 0.1}, "square + SFT sum beta 0.02 eta 0.1"),  # a user's own
        ({"preference": "none", "sft": "token", "eta": 1.0}, "SFT"),
        ({"preference": "none", "sft": "sum", "eta": 0.5}, "SFT sum beta 0.02 eta 0.5"),
    ],
)
def test_names(loss, expected):
    """The objective in the field's words, without the keys that it does not read."""
    assert groups.name(DPO | loss) == expected


def test_seeds_and_paths_make_one_group():
    """Runs that differ in seeds, in the embedded task's files and in what only costs time or space, in order of seeds."""
    runs = [
        make_run(2, 1),
        make_run(1, 1, tokens_per_microbatch=64, wandb={"mode": "offline"}, layout={"kind": "padded"}),
        make_run(
            1, 0, loss={"sft": "sum", "label_smoothing": 0.0}, checkpoint={"every": 5}, log={"gradient_split": 10}
        ),
    ]
    (group,) = groups.group(runs)
    assert group.label == "DPO beta 0.02" and group.seeds == [(1, 0), (1, 1), (2, 1)]
    assert group.runs == [runs[2], runs[1], runs[0]]


def test_a_run_of_an_earlier_version_is_one_of_the_group():
    """Keys that came later are taken as they then were: seeds of one study that outlived an update stay one arm."""
    now = {"lam": None, "clip": None, "gamma": None, "normalize": False}
    new = make_run(1, loss=now, model=make_run(1)["settings"]["model"] | {"load_in_4bit": False})
    new["settings"]["reference"] |= {"alpha": None, "every": None}
    (group,) = groups.group([make_run(0), new])
    assert group.label == "DPO beta 0.02" and len(group.runs) == 2
    assert groups.swept([make_run(0)["settings"], new["settings"]]) == ["seed"]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"preference": "dpop", "lam": 5.0}, "DPOP beta 0.02 lam 5"),
        ({"preference": "chi_po", "clip": 10.0}, "chi-PO beta 0.02 clip 10"),
        ({"preference": "simpo", "gamma": 1.0, "beta": 2.0}, "SimPO beta 2 gamma 1"),
        ({"preference": "robust", "label_smoothing": 0.25}, "robust DPO beta 0.02 smoothing 0.25"),
        ({"normalize": True, "beta": 5.0}, "DPO per token beta 5"),
        ({"normalize": True, "sft": "avg", "eta": 0.1}, "DPO per token + SFT avg beta 0.02 eta 0.1"),
    ],
)
def test_names_of_baselines(loss, expected):
    """Each baseline by its name and its own number."""
    now = {"lam": None, "clip": None, "gamma": None, "normalize": False}
    assert groups.name(DPO | now | loss) == expected


def test_what_differs_is_in_the_label():
    """By objective, then beta and eta as numbers; other keys that differ as key=value, on every label."""
    runs = [make_run(loss={"beta": beta, "sft": "sum", "eta": eta}) for beta in (0.1, 0.02) for eta in (0.25, 0.05, 0)]
    runs += [make_run(loss={"preference": "ipo", "beta": 0.1})]
    assert [group.label for group in groups.group(runs)] == [
        "DPO beta 0.02",
        "DPO beta 0.1",
        "RPO sum beta 0.02 eta 0.05",
        "RPO sum beta 0.02 eta 0.25",
        "RPO sum beta 0.1 eta 0.05",
        "RPO sum beta 0.1 eta 0.25",
        "IPO beta 0.1",
    ]
    other = make_run(optim={"lr": 1e-4})
    clean = make_run(seed=1)
    clean["settings"]["data"]["gold"]["flip"] = 0.0
    labels = [group.label for group in groups.group([make_run(), other, clean])]
    assert labels == [
        "DPO beta 0.02 data.gold.flip=0.0 optim.lr=0.0005",
        "DPO beta 0.02 data.gold.flip=0.25 optim.lr=0.0001",
        "DPO beta 0.02 data.gold.flip=0.25 optim.lr=0.0005",
    ]


def test_files_of_ones_own_are_compared():
    """Two data sets or two models that are not the embedded task's are two groups, whatever their seeds."""
    runs = [make_run(seed) for seed in range(3)]
    runs[1]["settings"]["model"]["path"] = "/models/gemma"
    runs[2]["settings"]["data"]["train"] = ["/data/a.jsonl", "/data/b.jsonl"]
    labels = [group.label for group in groups.group(runs)]
    assert len(labels) == 3 and all("model.path=" in label and "data.train=" in label for label in labels)


def test_a_real_runs_settings():
    """All that conf/train.yaml has: seeds and paths part no group, beta and the learning rate do."""

    commands = [[f"seed={seed}", f"data.gold.seed={seed}", f"run_dir=/runs/{seed}"] for seed in range(2)]
    commands += [["loss=rpo_sum", "loss.eta=0.25"], ["optim.lr=1e-3"]]
    runs = [to_dict(settings(*overrides)) for overrides in commands]
    found = groups.group([{"run": "r", "settings": s, "curve": [], "summary": {}} for s in runs])
    assert sorted(len(group.runs) for group in found) == [1, 1, 2]
    assert all("optim.lr=" in group.label and "seed" not in group.label for group in found)


def test_one_seed_twice_is_refused():
    """A run given twice, or two of one seed, would count as two."""
    runs = [make_run(3, 4), make_run(3, 4, run_dir="/elsewhere")]
    message = "DPO beta 0.02: /runs/3/4 and /runs/3/4 both have seed=3 data.gold.seed=4; give one of them"
    with pytest.raises(UserError, match=message):
        groups.group(runs)


def test_interval_by_hand():
    """1, 2, 6: mean 3, sd sqrt(7), t of two degrees 4.30265; one value has no spread, none no mean."""
    found = groups.interval([1.0, 2.0, 6.0])
    half = 4.30265 * math.sqrt(7) / math.sqrt(3)
    assert found["n"] == 3 and found["mean"] == 3 and found["sd"] == pytest.approx(math.sqrt(7))
    np.testing.assert_allclose(found["ci"], [3 - half, 3 + half], rtol=1e-5)
    assert groups.interval([2.0]) == {"mean": 2.0, "sd": None, "ci": None, "n": 1}
    assert groups.interval([]) == {"mean": None, "sd": None, "ci": None, "n": 0}


def test_interval_covers():
    """Of 1,000 samples of four normal numbers 95% have the mean inside."""
    rng = np.random.default_rng(0)
    found = [groups.interval(rng.normal(1.0, 2.0, size=4))["ci"] for _ in range(1000)]
    assert 0.93 < np.mean([low <= 1 <= high for low, high in found]) < 0.97


def test_summary_and_paired_difference():
    """Means over the seeds that have an entry; differences over the seeds that both groups have."""
    first = [
        make_run(seed, summary={"gold/final": 10.0 * seed, "gold/at_8": None if seed else 1.0}) for seed in (0, 1, 2)
    ]
    second = [
        make_run(seed, loss={"beta": 0.1}, summary={"gold/final": 10.0 * seed + gain, "gold/at_8": None})
        for seed, gain in ((2, 3.0), (1, 1.0), (5, 99.0))
    ]
    a, b = groups.group(first + second)
    assert groups.summary(a)["gold/final"] == groups.interval([0.0, 10.0, 20.0])
    assert groups.summary(a)["gold/at_8"] == {"mean": 1.0, "sd": None, "ci": None, "n": 1}
    assert groups.summary(b)["gold/at_8"]["n"] == 0
    assert groups.paired_difference(b, a, "gold/final") == groups.interval([1.0, 3.0])
    with pytest.raises(UserError, match="no seed with gold/at_8 is common to both"):
        groups.paired_difference(a, b, "gold/at_8")
    with pytest.raises(UserError, match="is common to both"):
        groups.paired_difference(a, replace(b, seeds=[(7, 0)], runs=b.runs[:1]), "gold/final")
