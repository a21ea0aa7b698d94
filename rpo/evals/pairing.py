"""Two models on the same items: what both got wrong, or right, says nothing about which is better (arXiv 2411.00640, 4.2).

Items are those of samples.jsonl by id. Letters: N items that both models have scores of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rpo import stats
from rpo.evals.results import Cells, Item, Results
from rpo.stats import clustered_mean, with_errors


@dataclass(frozen=True)
class Pairing:
    """One metric of two models: first - second by item, and what is not in it.

    clusters_N           the number of each item's cluster
    alike                whether both models have the same items in a cluster, be it under other names
    failed               items that both have, of which one failed or both
    num_first, _second   items with a score of one model alone, without failures
    """

    differences_N: list[float]
    clusters_N: list[int]
    alike: bool
    failed: int
    num_first: int
    num_second: int

    def cell(self) -> dict:
        """The mean difference with its clustered error; n_error counts what failed."""
        return with_errors(clustered_mean(self.differences_N, self.clusters_N), self.failed)


def shared(first: Mapping[str, Item], second: Mapping[str, Item]) -> list[tuple[Item, Item]]:
    """(the first's item, the second's) of the items that both have, in the order of the first."""
    return [(item, second[id]) for id, item in first.items() if id in second]


def met_alike(a: Item, b: Item) -> bool:
    """Whether two items were judged against the same answer of one model; where one is not known, against the model."""
    answers = [item.against and item.against.get("response") for item in (a, b)]
    return a.opponent == b.opponent and (None in answers or answers[0] == answers[1])


def pair(first: Mapping[str, Item], second: Mapping[str, Item], metric: str) -> Pairing:
    """The items of two models, each by id, paired by one metric."""
    both, failed = [], set()
    for a, b in shared(first, second):
        known, broken = [metric in item.scores for item in (a, b)], [bool(item.error) for item in (a, b)]
        if all(known):
            both.append((a, b))
        elif any(broken) and (any(known) or all(broken)):  # one that works has no such score: it is not of this metric
            failed.add(a.id)
    names = [(a.cluster, b.cluster) for a, b in both]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    scored = [{id for id, item in items.items() if metric in item.scores} for items in (first, second)]
    return Pairing(
        differences_N=[a.scores[metric] - b.scores[metric] for a, b in both],
        clusters_N=[number[name] for name in names],
        alike=len(number) == len({a for a, _ in number}) == len({b for _, b in number}),
        failed=len(failed),
        num_first=len(scored[0] - scored[1] - failed),
        num_second=len(scored[1] - scored[0] - failed),
    )


def with_differences(models: dict[str, Cells], items: Sequence[Item], baseline: str | None) -> dict[str, Cells]:
    """`models` with "difference/METRIC" of each but the `baseline`, if any: its mean score minus the baseline's, paired."""
    if baseline is None:
        return models
    by_model = {model: {item.id: item for item in items if item.model == model} for model in models}
    paired = {}
    for model, cells in models.items():
        own = by_model[model] if model != baseline else {}
        metrics = dict.fromkeys(metric for item in own.values() for metric in item.scores)
        differences = {f"difference/{name}": pair(own, by_model[baseline], name).cell() for name in metrics}
        paired[model] = cells | differences
    return paired


# ---- by whom


def judged_by(evaluation: Results) -> dict[str, str | None]:
    """Who gave an evaluation its scores: judge, served (its names), prompt, verdict, baseline; {} without a judge.

    None: not known, as of stored judgments that do not say. (Where the models are judges, task=judge_check, nobody
    judged them.)
    """
    details = evaluation.details
    judge, stored = details.get("judge"), details.get("annotations") is not None
    live = isinstance(judge, dict)
    if evaluation.task == "judge_check" or not (live or stored):
        return {}
    known = dict.fromkeys(("judge", "served", "prompt")) | {"verdict": details.get("verdict")}
    if live:
        of_task = evaluation.config.get("task")
        prompts = of_task.get("prompts") if isinstance(of_task, dict) else None
        known |= {"judge": judge.get("model"), "prompt": judge.get("prompt") or prompts or "own"}
        known["served"] = _names(judge.get("served"))
        known["verdict"] = known["verdict"] or "text"  # of mt_bench, which has no other
    else:
        known["judge"] = _names(details.get("judges"))
    return known | {"baseline": details.get("baseline") if evaluation.task == "alpaca_eval" else None}


def _names(listed: Any) -> str | None:
    return ", ".join(sorted(map(str, listed))) or None if isinstance(listed, list) else None


def judged_apart(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """What of two `judged_by` is known of both and not the same, in words; "" where nothing is."""
    return "; ".join(
        f"{key} {value} and {second[key]}"
        for key, value in first.items()
        if None not in (value, second.get(key)) and value != second[key]
    )


# ---- on what

_BY_PLACE = ("pairs", "generate")  # tasks whose ids are FILE:LINE, which another file's content would take over
_BY_NUMBER = ("mt_bench", "mbpp")  # tasks whose ids are the numbers of questions


def data_apart(first: Results, second: Results) -> bool:
    """Whether equal ids of two evaluations by a task that numbers lines or questions are of different data, where both say
    of which."""
    if first.task == second.task and first.task in _BY_NUMBER:
        asked, other = ({item.id: item.prompt for item in each.items if item.prompt} for each in (first, second))
        return any(other.get(id, prompt) != prompt for id, prompt in asked.items())
    digests = [each.details["data"]["digest"] for each in (first, second) if _has_digest(each.details.get("data"))]
    return first.task == second.task and first.task in _BY_PLACE and len({*digests}) == 2


def _has_digest(data: Any) -> bool:
    return isinstance(data, dict) and isinstance(data.get("digest"), str)


# ---- in words


def verdict(cell: dict, first: str, second: str, comparisons: int) -> str:
    """One plain sentence on one comparison: by its Holm-adjusted p at 5%; which way is better is for the reader to say.

    A difference that only its own p supports is said to be one of so many comparisons; where none is seen, how large
    one would have been seen; and where so few clusters have no p below 5%, that it is inconclusive.
    """
    value, (above, below) = cell["value"], (first, second) if cell["value"] > 0 else (second, first)
    ps = f"p {cell['p']:.2g}" + (f", Holm {cell['p_holm']:.2g}" if comparisons > 1 else "")
    one_sided = [(cell["n_first"], first), (cell["n_second"], second)]
    left = " and ".join(f"{count} that only {name} has" for count, name in one_sided if count)
    left = f"; left out: {left}" if left else ""
    left += f"; {cell['n_error']} failed" if cell["n_error"] else ""
    least = 2 / 2 ** cell["clusters"]
    if least > stats.ALPHA:
        return f"inconclusive: with {cell['clusters']} clusters the smallest possible p is {least:.2g}; use more prompts{left}"
    flat = f"nothing varied over {cell['clusters']} clusters, so there is no interval"
    if not value and not cell["se"]:
        return f"{first} and {second} have the same mean in each cluster: {flat}, nor a smallest difference to be seen{left}"
    if cell["interval"] is None:
        size = f"{number(abs(value))} ({flat}; {ps})"
    else:
        low, high = cell["interval"] if value > 0 else (-x for x in reversed(cell["interval"]))
        size = f"{number(abs(value))} (95% {number(low)} to {number(high)}; {ps})"
    if cell["p_holm"] <= stats.ALPHA:
        return f"{above} is above {below} by {size}{left}"
    if cell["p"] <= stats.ALPHA:
        return f"{above} is above {below} by {size}, which among {comparisons} comparisons may be luck{left}"
    seen = f"{above} is above by {size}" if value else f"it is {size}"
    power = ""
    if cell["detectable"] is not None:
        power = f"; a true difference of {number(cell['detectable'])} would be seen in 80% of such comparisons, a smaller one in fewer"
    return (
        f"no difference seen between {first} and {second}: {seen}{power}"
        + (f"; one as large as that seen needs about {cell['needed']} clusters" if cell["needed"] else "")
        + left
    )


def number(x: float) -> str:
    """Three significant digits."""
    return f"{x:.3g}"
