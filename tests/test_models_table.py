"""docs/MODELS.md: every class of causal LM trains as its own logits say, or is refused; none is silently wrong."""

import re

import pytest

from bench import models
from rpo import dist

KINDS = ("packed", "padded", "refused", "not tried")


def rows_of(page):
    """(trains, bfloat16, selective, neighbours) by type, without reasons."""
    found = re.findall(r"^\| ([\w-]+) \| \w+ \| (.*) \|$", page, re.M)
    cells = {kind: re.split(r" \| ", rest) for kind, rest in found if kind != "type"}
    return {kind: [re.split(r"[:(]", cell)[0].strip(" |") for cell in own] for kind, own in cells.items()}


def test_the_models_table_names_every_type():
    """The page has a row for each type that the installed transformers knows, none of them wrong."""
    page = models.PAGE.read_text()
    table = rows_of(page)
    assert table.keys() == models.CLASSES.keys()
    assert {cells[0] for cells in table.values()} == {*KINDS} and "wrong" not in page


@pytest.mark.parametrize("kind", ["llama", "gemma3n_text", "rwkv", "mamba2", "rembert", "gemma3"])
def test_the_models_table_is_what_comes_out(kind):
    """Of one type of each fate the row is made again, and is the page's."""
    try:
        (row,) = models.table([kind])
    finally:
        dist.shutdown()
    assert rows_of(models.page([row])) == {kind: rows_of(models.PAGE.read_text())[kind]}


@pytest.mark.slow
def test_the_whole_models_table():
    """All types, tried again: none is wrong, and none has another fate than the page says."""
    try:
        found = models.table(list(models.CLASSES))
    finally:
        dist.shutdown()
    assert [row for row in found if row.trains not in KINDS or "wrong" in f"{row.bfloat16} {row.neighbours}"] == []
    assert rows_of(models.page(found)) == rows_of(models.PAGE.read_text())


def test_a_wrong_class_would_show():
    """A policy whose log-probs or gradient are not the model's own is called wrong, by how much."""
    exact = ([-3.0, -4.0], models.torch.tensor([1.0, 2.0]))
    assert models.why_wrong(exact, exact) == ""
    assert models.why_wrong(([-3.0, -4.01], exact[1]), exact) == "log-probs off by 1.0e-02 nats"
    assert models.why_wrong((exact[0], models.torch.tensor([1.0, 2.1])), exact).startswith("gradient off by 4.5e-02")
