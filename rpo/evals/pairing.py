"""Two models on the same items: what both got wrong, or right, says nothing about which is better (arXiv 2411.00640, 4.2).

Items are those of samples.jsonl by id. Letters: N items that both models have scores of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rpo.stats import clustered_mean


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
        return clustered_mean(self.differences_N, self.clusters_N) | {"n_error": self.failed}


def shared(first: Mapping[str, dict], second: Mapping[str, dict]) -> list[tuple[str, dict, dict]]:
    """(id, the first's item, the second's) of the items that both have, in the order of the first."""
    return [(name, item, second[name]) for name, item in first.items() if name in second]


def pair(first: Mapping[str, dict], second: Mapping[str, dict], metric: str) -> Pairing:
    """The items of two models, each by id, paired by one metric."""
    both, failed = [], set()
    for name, a, b in shared(first, second):
        known, broken = [metric in item["scores"] for item in (a, b)], [bool(item.get("error")) for item in (a, b)]
        if all(known):
            both.append((a, b))
        elif any(broken) and (any(known) or all(broken)):  # one that works has no such score: it is not of this metric
            failed.add(name)
    names = [(a["cluster"], b["cluster"]) for a, b in both]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    scored = [{name for name, item in items.items() if metric in item["scores"]} for items in (first, second)]
    return Pairing(
        [a["scores"][metric] - b["scores"][metric] for a, b in both],
        [number[name] for name in names],
        len(number) == len({a for a, _ in number}) == len({b for _, b in number}),
        len(failed),
        len(scored[0] - scored[1] - failed),
        len(scored[1] - scored[0] - failed),
    )


def judged_by(task: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Who gave an evaluation its scores, and how: judge, served (its names), prompt, verdict, baseline; {} without a judge.

    None: not known, as of stored judgments that do not say. (task=judge_check judges the judges: they are its models.)
    """
    judge, stored = facts.get("judge"), facts.get("annotations") is not None
    live = isinstance(judge, dict)
    if task == "judge_check" or not (live or stored):
        return {}
    made = dict.fromkeys(("judge", "served", "prompt")) | {"verdict": facts.get("verdict")}
    if live:
        settings = facts.get("config")
        of_task = settings.get("task") if isinstance(settings, dict) else None
        prompts = of_task.get("prompts") if isinstance(of_task, dict) else None
        made |= {"judge": judge.get("model"), "prompt": judge.get("prompt") or prompts or "own"}
        made["served"] = _names(judge.get("served"))
        made["verdict"] = made["verdict"] or ("logprobs" if judge.get("with_logprobs") else "text")
    else:
        made["judge"] = _names(facts.get("judges"))
    return made | {"baseline": facts.get("baseline") if task == "alpaca_eval" else None}


def _names(listed: Any) -> str | None:
    return ", ".join(sorted(map(str, listed))) or None if isinstance(listed, list) else None


def judged_apart(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """What of two `judged_by` is known of both and not the same, in words; "" where nothing is."""
    return "; ".join(
        f"{key} {value} and {second[key]}"
        for key, value in first.items()
        if None not in (value, second.get(key)) and value != second[key]
    )


def differences(samples: Sequence[dict], baseline: str) -> dict[str, dict[str, dict]]:
    """{model: {"difference/METRIC": cell}} of every other model of `samples`: its mean score minus the baseline's."""
    items: dict[str, dict[str, dict]] = {}
    for sample in samples:
        items.setdefault(sample["model"], {})[sample["id"]] = sample
    base = items.pop(baseline)
    metrics = {
        model: dict.fromkeys(name for item in own.values() for name in item["scores"]) for model, own in items.items()
    }
    return {
        model: {f"difference/{name}": pair(own, base, name).cell() for name in metrics[model]}
        for model, own in items.items()
    }
