"""Two models' answers that a judge saw in both orders: an item of either model, and the judge's own cells."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rpo.evals.results import Cells, Item
from rpo.judging import verdicts


def both_sides(
    models: Sequence[str],
    scores: Sequence[float | None],
    *,
    id: str,
    cluster: str,
    replies: Sequence[str | None],
    error: str | None,
    prompt: str | list[dict] | None = None,
    responses: Sequence[str | None] = (None, None),
    details: dict[str, Any] | None = None,
) -> list[Item]:
    """The item of either model. `scores` are the first's, where it was shown first and where second; None: an error.

    `replies` are the judge's in these orders; none where nobody was asked.
    """
    both = verdicts.two_orders(*scores)
    sides = []
    for m, model in enumerate(models):
        own = [score if score is None or m == 0 else 1 - score for score in (*scores, both and both.score)]
        judgments = [{"shown_first": models[k], "score": own[k], "reply": reply} for k, reply in enumerate(replies)]
        agree = both.agree if both and replies else None
        sides.append(
            Item(
                model=model,
                id=id,
                cluster=cluster,
                prompt=prompt,
                response=responses[m],
                scores={"win_rate": own[2]} if both else {},
                error=None if both else error,
                against={"model": models[1 - m], "response": responses[1 - m]},
                details=(details or {}) | {"orders_agree": agree, "judgments": judgments},
            )
        )
    return sides


def of_orders(items: Sequence[Item]) -> Cells:
    """`verdicts.of_orders` of the items of `both_sides` that the judge was asked about."""
    asked = [item for item in items if item.details["judgments"]]
    agree_N = np.array([bool(item.details["orders_agree"]) for item in asked])
    first_N = np.array([_first_position(item) for item in asked])
    failed_N = np.array([item.error is not None for item in asked], dtype=bool)
    return verdicts.of_orders(agree_N, first_N, [item.cluster for item in asked], failed_N)


def _first_position(item: Item) -> float:
    """The mean score of the answer shown first, over both orders; NaN where the judgment failed."""
    if item.error is not None:
        return np.nan
    score = {game["shown_first"] == item.model: game["score"] for game in item.details["judgments"]}
    return (score[True] + 1 - score[False]) / 2
