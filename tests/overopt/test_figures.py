"""rpo.overopt_plots: each figure that the data has is drawn, with the right numbers at the right places."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.image import imread

from rpo.overopt import best_of_n, figures
from rpo.runs.groups import Group

METRICS = ("gold", "proxy", "kl", "rewards/accuracies", "shift/chosen", "entropy", "entropy/top10", "mass/top10")
METRICS += ("samples/length", "samples/ended")
BEST = [{"n": n, "kl": best_of_n.best_of_n_kl(n), "gold": {"value": 1.0, "se": 0.1, "n": 9}} for n in (1, 4, 16)]


def make_group(label="DPO", beta=0.1, seeds=2, checkpoints=4, names=METRICS, se=0.1):
    runs = []
    for seed in range(seeds):
        values = {n: np.linspace(0, 1 + seed + i, checkpoints + 1) for i, n in enumerate(names)}
        points = [
            {n: {"value": float(v[i]), "se": se, "n": 9} for n, v in values.items()} for i in range(checkpoints + 1)
        ]
        runs.append({"settings": {}, "curve": [{"step": 50 * i, "metrics": p} for i, p in enumerate(points)]})
    return Group(f"{label} beta {beta:g}", {"beta": beta}, [(s, 0) for s in range(seeds)], runs)


def test_every_figure(tmp_path):
    """All five, with every option, are pictures of more than one colour, and no figure stays open."""
    groups = [make_group(label, beta) for label in ("DPO", "RPO sum eta 0.25") for beta in (0.02, 0.1)]
    paths = figures.draw_study(groups, tmp_path / "new" / "figures", BEST)
    assert [path.name for path in paths] == [
        "overoptimisation.png",
        "beta.png",
        "signals.png",
        "accuracy.png",
        "health.png",
    ]
    for path in paths:
        pixels = imread(path)[..., :3]
        assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels @ [1.0, 256.0, 65536.0])) > 20, path.name
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("kl", "proxy"), ["overoptimisation.png"]),
        (("gold",), []),
        (("gold", "rewards/accuracies"), ["signals.png", "accuracy.png"]),
        (("entropy",), ["health.png"]),
        ((), []),
    ],
)
def test_figures_of_what_was_measured(tmp_path, names, expected):
    """A metric that is missing leaves its panel or figure out; one beta makes no figure over beta."""
    assert [path.name for path in figures.draw_study([make_group(names=names)], tmp_path)] == expected


def test_a_group_without_a_metric_is_left_out_of_its_panel(tmp_path):
    """Gold that one checkpoint of one seed lacks is not drawn for its group, and the others are."""
    whole, part = make_group(beta=0.1), make_group(beta=0.2)
    part.runs[1]["curve"][2]["metrics"]["gold"]["value"] = None
    figure = figures._distance_figure([whole, part], figures._styles([whole, part]), ())
    drawn = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
    assert drawn == [["reference", "DPO beta 0.1"], ["DPO beta 0.1", "DPO beta 0.2"]]
    plt.close(figure)


@pytest.mark.parametrize("seeds", [1, 3])
def test_means_and_errors_by_hand(seeds):
    """Against sqrt(KL): means at the steps that all seeds have; one standard error over seeds, or a lone seed's own."""
    group = make_group(seeds=seeds)
    if seeds > 1:
        del group.runs[0]["curve"][-1]  # a seed that ended early
    figure = figures._distance_figure([group], figures._styles([group]), ())
    line, _, (bars,) = figure.axes[0].containers[0]
    curves = [run["curve"] for run in group.runs]
    count = min(map(len, curves))
    kl, gold = (np.array([[p["metrics"][n]["value"] for p in c[:count]] for c in curves]) for n in ("kl", "gold"))
    np.testing.assert_allclose(line.get_xdata(), np.sqrt(kl).mean(0))
    np.testing.assert_allclose(line.get_ydata(), gold.mean(0))
    low, high = np.array([segment[:, 1] for segment in bars.get_segments()]).T
    error = gold.std(0, ddof=1) / math.sqrt(seeds) if seeds > 1 else 0.1
    np.testing.assert_allclose(high - low, 2 * error * np.ones(count))
    plt.close(figure)


def test_final_gold_against_beta():
    """One line per form and eta over its betas, whatever their order; bars are the sd over seeds."""
    groups = [make_group("DPO", 0.1, seeds=3), make_group("DPO", 0.02, seeds=1), make_group("RPO sum", 0.1)]
    figure = figures._beta_figure(groups)
    dpo, rpo = figure.axes[0].containers
    assert (dpo.get_label(), rpo.get_label()) == ("DPO", "RPO sum")
    np.testing.assert_allclose(dpo[0].get_xdata(), [0.02, 0.1], rtol=0.05)
    np.testing.assert_allclose(dpo[0].get_ydata(), [1.0, 2.0])  # one seed ends at 1; three at 1, 2 and 3
    heights = [np.ptp(segment[:, 1]) / 2 for segment in dpo[2][0].get_segments()]
    np.testing.assert_allclose(heights, [0.0, 1.0])
    plt.close(figure)


def test_many_groups_stay_apart(tmp_path):
    """Twenty groups: no two have both colour and line alike, and the legend hides no axes."""
    groups = [make_group(f"RPO sum eta 0.{i:02d} optim.lr=0.0005", 0.02, seeds=1) for i in range(20)]
    styles = figures._styles(groups)
    assert len({(s["color"], s["ls"]) for s in styles.values()}) == 20
    figure = figures._distance_figure(groups, styles, ())
    figure.canvas.draw()
    (legend,) = figure.legends
    top = legend.get_window_extent().y1
    assert all(axes.get_window_extent().y0 > top and axes.get_window_extent().height > 150 for axes in figure.axes)
    assert legend.get_window_extent().x0 > 0 and legend.get_window_extent().x1 < figure.bbox.x1
    plt.close(figure)
