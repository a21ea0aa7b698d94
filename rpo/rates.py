"""How often one model's answers are preferred to another's, from its scores in two orders.

Letters: N judged items; a score is NaN where the judgment failed.
"""

from collections.abc import Sequence

import numpy as np

from rpo.results import with_errors
from rpo.stats import clustered_mean

LOW = 0.5  # agreement of the two orders below which most items go by the order, not by the answers


def cell(values_N: np.ndarray, clusters_N: Sequence[str], failed_N: np.ndarray) -> dict:
    """The clustered mean of what did not fail, with the number that did."""
    ok_N = ~failed_N
    return with_errors(clustered_mean(values_N[ok_N], np.asarray(clusters_N)[ok_N]), int(failed_N.sum()))


def rates(score_N: np.ndarray, clusters_N: Sequence[str]) -> dict[str, dict]:
    """The cells of one model by name, in shares.

    win_rate             mean score: (wins + ties / 2) / all where verdicts are in words
    wins, ties, losses   shares of scores above, at and below half; where the orders disagree the score is half
    """
    failed_N = np.isnan(score_N)
    columns = {"win_rate": score_N, "wins": score_N > 0.5, "ties": score_N == 0.5, "losses": score_N < 0.5}
    return {name: cell(values_N, clusters_N, failed_N) for name, values_N in columns.items()}


def of_orders(
    agree_N: np.ndarray, first_N: np.ndarray, clusters_N: Sequence[str], failed_N: np.ndarray
) -> dict[str, dict]:
    """The judge's cells by name, in shares, of items that it was asked about in both orders.

    order_consistency    share of items on which both orders say the same
    first_position       mean score of the answer that is shown first: .5 without a bias for a position
    """
    columns = {"order_consistency": agree_N, "first_position": first_N}
    return {name: cell(values_N, clusters_N, failed_N) for name, values_N in columns.items()}


def position_notes(cells: dict[str, dict], name: str) -> list[str]:
    """What to say of a judge whose two orders say the same (cell `name`) less often than not."""
    share = cells[name]["value"]
    if share is None or share >= LOW:
        return []
    return [
        f"{name} is {share:.0%}: on most items what this judge says changes with the order in which it sees the answers, so "
        "these rates say little of them"
    ]
