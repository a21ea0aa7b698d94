"""Two models' answers that a judge saw in both orders: an item of either model, its rates, and the judge's own cells."""

from collections.abc import Sequence
from typing import Any

from rpo.evals.results import Cells, Item, mean_of
from rpo.judging import verdicts
from rpo.stats import clustered_mean, with_errors

LOW = 0.5  # agreement of the two orders below which order decides most items


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
    masses: Sequence[float | None] = (),
    details: dict[str, Any] | None = None,
) -> list[Item]:
    """The item of either model. `scores` are the first's, where it was shown first and where second; None: an error.

    `replies` are the judge's in these orders, none where nobody was asked; `masses` of the letters, for verdicts by log-probs.
    """
    both = verdicts.two_orders(*scores)
    sides = []
    for m, model in enumerate(models):
        own = [score if score is None or m == 0 else 1 - score for score in (*scores, both and both[0])]
        judgments = [{"shown_first": models[k], "score": own[k], "reply": reply} for k, reply in enumerate(replies)]
        judgments = (
            [one | {"letter_mass": mass} for one, mass in zip(judgments, masses, strict=True)] if masses else judgments
        )
        agree = both[1] if both and replies else None
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


def rates(items: Sequence[Item]) -> Cells:
    """The cells of one model by name, in shares.

    win_rate             mean score; for verdicts in words (wins + ties / 2) / all
    wins, ties, losses   shares of scores above, at and below half; half if the orders disagree
    """
    parts = {"wins": lambda score: score > 0.5, "ties": lambda score: score == 0.5, "losses": lambda score: score < 0.5}
    cells = {
        name: mean_of(items, lambda item, is_in=is_in: is_in(item.scores["win_rate"])) for name, is_in in parts.items()
    }
    return {"win_rate": mean_of(items, "win_rate")} | cells


def of_orders(items: Sequence[Item]) -> Cells:
    """The judge's cells by name, in shares, over the items of `both_sides` that it was asked about.

    order_consistency    share of items on which both orders agree
    first_position       mean score of the answer shown first: .5 without position bias
    """
    asked = [item for item in items if item.details["judgments"]]
    agree = mean_of(asked, lambda item: item.details["orders_agree"])
    return {"order_consistency": agree, "first_position": mean_of(asked, _first_position)}


def of_masses(items: Sequence[Item]) -> tuple[Cells, list[float]]:
    """({"letter_mass": its cell}, the masses by reply) of the items of `both_sides`, failed ones too; ({}, []) for verdicts in
    words. It is the probability, 0 to 1, that the judge's first token is one of the two letters."""
    asked = [item for item in items if any("letter_mass" in one for one in item.details["judgments"])]
    if not asked:
        return {}, []
    known = [[one["letter_mass"] for one in item.details["judgments"]] for item in asked]
    whole = [(sum(both) / len(both), item.cluster) for both, item in zip(known, asked, strict=True) if None not in both]
    cell = clustered_mean([mass for mass, _ in whole], [cluster for _, cluster in whole])
    masses = [mass for both in known for mass in both if mass is not None]
    return {"letter_mass": with_errors(cell, len(asked) - len(whole))}, masses


def _first_position(item: Item) -> float:
    """The mean score of the answer shown first, over both orders."""
    score = {game["shown_first"] == item.model: game["score"] for game in item.details["judgments"]}
    return (score[True] + 1 - score[False]) / 2


def position_notes(cells: Cells, name: str) -> list[str]:
    """A note on a judge whose two orders agree (cell `name`) on fewer than half of the items."""
    share = cells[name]["value"]
    if share is None or share >= LOW:
        return []
    return [
        f"{name} is {share:.0%}: this judge's verdict on most items depends on their order; these rates mean little"
    ]
