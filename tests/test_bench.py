"""The benchmark: its data are frozen, its ceiling's FLOPs are right, its systems run and agree."""

import dataclasses

import numpy as np
import pytest
import torch

from bench import data, report, step, systems
from rpo.config import UserError
from rpo.metrics import ModelSize

TINY = {"model_type": "llama", "vocab_size": data.VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("lengths", "digest"),
    [
        ("hh", "daeb4983795e1bbc6d640d1a12455b2876bb1322f9a8e9ee623375ebfe055df0"),
        ("uf", "525dbc5a1761dfeac7c29e6c3aac25f57c458452142937fb57be9a32649ce289"),
        ("long", "b22d078effe9ef2e870b9f70946b8af49399eca50428cb79faecb05b9f7fd6f3"),
    ],
)
def test_the_data_are_frozen(lengths, digest):
    """The same lengths and ids on every machine, so that numbers of different days compare."""
    rows = data.made(lengths)
    assert data.sha256(rows) == digest
    assert len(rows) == 4096 and (rows.prompt + np.maximum(rows.chosen, rows.rejected)).max() <= 2048
    prompt, chosen, rejected = rows.row(17)
    assert prompt[0] == data.BOS and chosen[-1] == rejected[-1] == data.EOS and prompt[1:].min() > data.EOS


def test_first_begins_again_where_the_data_end():
    """A benchmark may ask for more pairs than a small file has."""
    rows = data.first(data.made("hh"), 3)
    again = data.first(rows, 4)
    assert [part.tolist() for part in again.row(3)] == [part.tolist() for part in rows.row(0)]


def test_real_data_are_refused_in_one_line(monkeypatch):
    """Without RPO_TEST_DATA, `--data real` says what to set."""
    monkeypatch.delenv("RPO_TEST_DATA", raising=False)
    with pytest.raises(UserError, match="RPO_TEST_DATA"):
        data.real("hh")


def test_flops_of_the_ceiling_by_hand():
    """Two rows of 3 tokens: 6 (10 + 5) 6 for the products; 12 x 2 layers x width 3 x 12 visible pairs for attention."""
    size = ModelSize(trunk=10, head=5, layers=2, attention_width=3)
    assert systems.cross_entropy_flops(size, [(2, 3)]) == 540 + 864


def test_ratio_is_by_rounds():
    """The median of the rounds' ratios, so that a round that neighbours slowed for all counts as any other."""
    timed = [[2.0, 20.0, 2.0], [1.0, 10.0, 0.5]]
    a, b = ({"failed": None, "timed": {"seconds": [s], "flops": [1.0, 1.0, 1.0]}} for s in timed)
    assert report.ratio({"a": a, "b": b}, "b", "a") == 2.0
    assert report.ratio({"a": a, "b": dataclasses.asdict(report.Result(failed="out"))}, "b", "a") is None


def test_all_forms_run_and_agree(group, monkeypatch):
    """Two steps of four pairs: every form of ours passes the gates, and the ceiling sees the same unique tokens."""
    monkeypatch.setitem(systems.MODELS, "tiny", TINY)
    rows = data.first(data.made("hh"), 8)
    work = systems.Work(rows, 4, "tiny", group, torch.float32, 1024, "none", lr=1e-3)
    names = [name for name in step.SYSTEMS if not name.endswith("compile")]
    results = {name: report.Result() for name in names}
    gates = step.Gates(work, step.library_logps(work))
    step.visit({name: (lambda name=name: step.ours(name, work)) for name in names}, work, results, gates)
    for name in names[:-1]:
        assert results[name].failed is None and gates.judge(results[name], results[names[0]], noise=1e-5) is None, name
    rates = report.rates(step.CEILING, results[step.CEILING], work, warmup=1)
    unique = sum(map(np.sum, work.lengths(1)))
    tokens = sum(batch_BT.numel() for batch_BT in systems.dense_rows(work, 1))
    assert rates["pairs_per_second"] is None and tokens <= unique < tokens + 2
