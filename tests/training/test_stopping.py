"""Early stopping: when a run ends, that it resumes to the same end, and which weights become model/."""

import json
import shutil

import pytest
import torch

from rpo.config import Stop
from rpo.errors import UserError
from rpo.runs.process import Interrupt
from rpo.training.stopping import is_over
from tests.helpers.runs import run, settings, timeless, tiny_args, weights

NAN = float("nan")


@pytest.mark.parametrize(
    ("metric", "values", "patience", "min_delta", "over"),
    [
        ("max:a", [0.5, 0.6, 0.6, 0.6], 2, 0.0, True),  # equal is not better
        ("max:a", [0.5, 0.6, 0.6], 2, 0.0, False),
        ("max:a", [0.5, 0.4, 0.55, 0.5], 2, 0.0, False),  # a better one starts the count again
        ("max:a", [0.5, 0.55, 0.59], 2, 0.1, True),  # too little better, twice
        ("max:a", [0.5, 0.55, 0.61], 2, 0.1, False),  # against the best, not the last
        ("min:a", [3.0, 2.0, 2.5, 2.1], 2, 0.0, True),
        ("min:a", [3.0, 2.0, 1.0], 1, 0.0, False),
        ("max:a", [NAN, NAN], 2, 0.0, True),
        ("max:a", [NAN, -1e9], 2, 0.0, False),
        ("max:a", [], 1, 0.0, False),
        (None, [1.0, 0.0, 0.0], 1, 0.0, False),
    ],
)
def test_when_it_is_over(metric, values, patience, min_delta, over):
    """`patience` evaluations in a row, none better than the best before by more than min_delta."""
    assert is_over(values, Stop(metric, patience, min_delta)) == over


# A rate at which the held-out loss rises soon: the best comes early.
STOPPING = (
    *("optim.lr=0.05", "optim.schedule=constant", "optim.warmup_ratio=0", "max_steps=30", "eval_every=2", "loss=dpo"),
    *(
        "stop.metric=min:loss",
        "stop.patience=2",
        "checkpoint.every=2",
        "checkpoint.best=min:loss",
        "checkpoint.keep=all",
    ),
)


def test_a_run_stops_early_and_leaves_its_best(tiny, tmp_path, capsys):
    """It ends two evaluations after its best, which becomes model/; asked again it is finished; undisturbed or resumed, alike."""
    events = run(tiny, tmp_path / "a", *STOPPING, "model.save=best")
    losses = {event["step"]: event["loss"] for event in events if event["split"] == "eval"}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 4 < 30
    assert "stopped early by min:loss" in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "status.json").read_text()) == {
        "state": "finished",
        "reason": "stopped early",
        "step": best + 4,
        "model_step": best,
    }
    run(tiny, tmp_path / "a", *STOPPING, "model.save=best")
    assert "finished after" in capsys.readouterr().out
    # The same from the start to the best step alone.
    run(tiny, tmp_path / "b", *STOPPING[:3], f"max_steps={best}", "loss=dpo", "eval_every=2")
    assert all(torch.equal(weights(tmp_path / "a/model")[name], t) for name, t in weights(tmp_path / "b/model").items())
    # A kill before model/ was written: from the last checkpoint it ends at once, with the same model/.
    before = weights(tmp_path / "a/model")
    shutil.rmtree(tmp_path / "a" / "model")
    assert timeless(run(tiny, tmp_path / "a", *STOPPING, "model.save=best")) == timeless(events)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "a/model").items())


def test_an_interrupted_run_stops_where_it_would_have(tiny, tmp_path, monkeypatch):
    """What was seen of the metric is in the checkpoint: stopped by a signal in between it ends at the same step, with the same log."""
    whole = run(tiny, tmp_path / "whole", *STOPPING)
    seen = []
    monkeypatch.setattr(
        Interrupt, "received", property(lambda self: 15 if seen.append(1) or len(seen) == 3 else None), raising=False
    )
    import train
    from rpo import dist

    try:
        assert (
            train.train(
                settings(*tiny_args(tiny, "batch_size=8", "log_every=1", *STOPPING, f"run_dir={tmp_path / 'half'}"))
            )
            == "SIGTERM"
        )
    finally:
        dist.shutdown()
    monkeypatch.undo()
    assert timeless(run(tiny, tmp_path / "half", *STOPPING)) == timeless(whole)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("stop.metric=min:loss", "eval_every=0"), "nothing to stop by"),
        (
            ("stop.metric=max:accuracy", "eval_every=2"),
            "stop.metric=max:accuracy: no such metric of data.eval; there are",
        ),
        (("stop.metric=loss",), "stop.metric='loss': expected null or min:METRIC or max:METRIC"),
        (("model.save=best",), "model.save=best with checkpoint.best=null"),
    ],
)
def test_what_would_never_stop_is_refused(more, words, tiny, tmp_path):
    """A metric that no evaluation has, or none to look at."""
    with pytest.raises(UserError, match=words):
        run(tiny, tmp_path / "run", *more)
