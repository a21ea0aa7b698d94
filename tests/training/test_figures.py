"""rpo.training.figures: what a sweep's picture says of each cell."""

import matplotlib.pyplot as plt
import pytest

from rpo.runs import folder as runs_folder
from rpo.training import figures, sweep

METRIC = "eval/gold"


@pytest.fixture
def drawn(monkeypatch):
    """Figures stay open once they are drawn, until the test is over."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    yield lambda: plt.figure(plt.get_fignums()[-1])
    monkeypatch.undo()
    plt.close("all")


def row(beta, eta, value=None, state="finished", **more):
    return {"loss.beta": beta, "loss.eta": eta, "state": state} | ({METRIC: value} if value is not None else {}) | more


def test_a_square_says_failed_only_where_its_cells_failed(drawn, tmp_path):
    """Means over finished seeds stand in their squares; failed and interrupted cells are called so, others are blank."""
    table = [row("0.1", "0", 1.0), row("0.1", "0", 2.0), row("0.1", "0", state="failed"), row("0.02", "0", 4.0)]
    table += [row("0.1", "1", state="failed"), row("10", "0", 7.0, state="interrupted")]
    figures.draw_heatmap(table, "loss.beta", "loss.eta", (METRIC, "train/gold"), tmp_path / "sweep.png")
    axes = drawn().axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.02", "0.1", "10"]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "4",
        (1, 0): "1.5",
        (1, 1): "failed",
        (2, 0): "interrupted",
    }
    assert (tmp_path / "sweep.png").stat().st_size


@pytest.mark.parametrize("num_losses", [2, 13])
def test_only_seeds_are_averaged(num_losses, drawn, tmp_path, monkeypatch, capsys):
    """Each setting of what is no axis has a panel of its own with its own means; where they are too many, one line says so."""
    cells = [(loss, beta, seed) for loss in range(num_losses) for beta in range(2) for seed in range(2)]
    table = [
        row(str(beta), "1", 100.0 * loss + 10 * beta + seed, cell=i, loss=str(loss), seed=str(seed))
        for i, (loss, beta, seed) in enumerate(cells)
    ]
    runs_folder.write_json(tmp_path / "sweep.json", table)
    monkeypatch.setattr(runs_folder, "read_status", lambda folder: {"state": "finished"})
    sweep.write_table(tmp_path)
    if num_losses == 13:
        assert "sweep.png: not drawn, loss have 13 settings" in capsys.readouterr().out
        assert not (tmp_path / "sweep.png").exists()
        return
    found = {axes.get_title(): axes.lines[0].get_ydata().tolist() for axes in drawn().axes}
    assert found == {f"{METRIC}\nloss=0": [0.5, 10.5], f"{METRIC}\nloss=1": [100.5, 110.5]}


def test_one_swept_key_is_a_line(drawn, tmp_path, monkeypatch):
    """Cells that differ in one key, and in seeds, become a line of means over it, with a gap where a cell failed."""
    table = [row("0.02", "1", 4.0, cell=0, seed="0"), row("0.02", "1", 2.0, cell=1, seed="1")]
    table += [
        row("10", "1", 9.0, cell=2, state="failed"),  # at step 0, before it failed
        row("0.1", "1", 1.0, cell=3),
        row("1", "1", cell=4, state="running"),
    ]
    runs_folder.write_json(tmp_path / "sweep.json", table)
    monkeypatch.setattr(runs_folder, "read_status", lambda folder: {"state": table[int(folder.name)]["state"]})
    assert sweep.write_table(tmp_path) == 1
    (axes,) = drawn().axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("loss.beta", "", METRIC)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.02", "0.1", "1", "10"]
    (line,) = axes.lines
    assert line.get_xdata().tolist() == [0, 1, 2, 3] and line.get_ydata().tolist() == pytest.approx(
        [3, 1, float("nan"), float("nan")], nan_ok=True
    )
    assert [text.get_text() for text in axes.texts] == ["3", "1", "", "failed"]
    inside = [axes.bbox.contains(*text.xycoords.transform(text.xy)) for text in axes.texts]
    assert all(inside), inside
