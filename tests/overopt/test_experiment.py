"""rpo.overopt.experiment: its arms are runs that can be started, and its tables say what the curves hold."""

import itertools
import json

import pytest

from rpo import config
from rpo.overopt import curve as overopt
from rpo.overopt import experiment
from rpo.runs import groups
from tests.helpers.runs import settings


def cells(arm):
    """The overrides of each of an arm's cells, as a sweep takes them apart."""
    return itertools.product(*([f"{key}={v}" for v in value.split(",")] for key, value in (o.split("=") for o in arm)))


@pytest.mark.parametrize("arm", experiment.ARMS)
def test_every_arm_composes(arm):
    """Each cell is accepted, keeps its checkpoints, and has pairs of its own seed."""
    for cell in cells(experiment.ARMS[arm]):
        cfg = settings("recipe=overopt", "seed=3", *cell)
        assert (cfg.checkpoint.every, cfg.checkpoint.keep, cfg.data.gold.seed) == (50, "all", 3)


def test_what_the_tables_name_is_there():
    """The losses that tables and figures pick out are those of arms that they read."""
    for title, (arms, losses) in experiment.TABLES.items():
        names = {
            groups.name(config.to_dict(settings("recipe=overopt", *cell).loss))
            for arm in arms
            for cell in cells(experiment.ARMS[arm])
        }
        assert set(losses) <= names, title
        assert title != "Losses" or set(experiment.DRAWN) <= names


def run(seed, golds, *overrides):
    """An evaluated run whose gold is `golds` at steps 0, 50, ..., KL 2 nats more at each, on two prompts."""
    curve = []
    for i, gold in enumerate(golds):
        values = {"gold": gold, "kl": 2.0 * i, "rewards/accuracies": 0.6, "shift/chosen": -1.0 * i}
        values["entropy/top10"] = (1.0, 1.1, 1.0, 0.9)[i]
        metrics = {name: {"value": value, "se": 0.1, "n": 2} for name, value in values.items()}
        metrics["samples/length"] = {"value": 10.0 + i, "se": 0.1, "n": 2}
        curve.append({"step": 50 * i, "metrics": metrics})
    cfg = settings("recipe=overopt", f"seed={seed}", *overrides)
    return {"settings": config.to_dict(cfg), "curve": curve, "summary": overopt.summarise(curve)}


def test_tables(tmp_path):
    """Means over seeds by hand: peak, end, drop, gold at equal KL, stopping by an oracle and by rules, differences."""
    rpo = ("loss=rpo_sum", "loss.beta=0.02", "loss.eta=0.25")
    arms = {
        "dpo": [run(seed, [1, 3 + seed, 2, 0], "loss=dpo", "loss.beta=0.02") for seed in (0, 1)],
        "rpo_sum": [run(seed, [1, 2, 2.5, 2.5], *rpo) for seed in (0, 1)],
    }
    head = {"task": "overopt", "notes": []} | dict.fromkeys(("models", "config", "versions"), {})
    for arm, runs in arms.items():
        (tmp_path / "eval" / arm).mkdir(parents=True)
        (tmp_path / "eval" / arm / "results.json").write_text(json.dumps(head | {"details": {"runs": runs}}))
    found = experiment.read(tmp_path, list(arms))
    dpo, rpo = experiment.table(found).splitlines()[2:]
    assert dpo == (  # gold at KL .5, in sqrt(KL) half the way to 2 from step 0's KL of 0: 1 + (3 or 4 - 1) / 2
        "| DPO beta 0.02 | 3.50 | 0.00 ± 0.00 | 3.50 ± 0.71 | 6.0 | -3.0 | 0.600 | 0.600 | 2.25 | 2.77 | 3.50 | 13.0 |"
    )
    assert rpo.startswith("| RPO sum beta 0.02 eta 0.25 | 2.50 | 2.50 ± 0.00 | 0.00 ± 0.00 |")
    # By the oracle at step 50; KL is 4 at step 100; the entropy falls at steps 100 and 150.
    assert experiment.stopping(found).splitlines()[2] == (
        "| DPO beta 0.02 | 0.00 ± 0.00 | 3.50 ± 0.71 | 50 | 2.00 ± 0.00 | 100 | 2.00 ± 0.00 | 100 |"
    )
    assert experiment.differences(found, experiment.RPO_NAME).splitlines()[2:] == [
        "| DPO beta 0.02 | -2.50 [-2.50, -2.50] | +3.50 [-2.85, +9.85] |"  # t with one degree: 12.706 x .5
    ]
