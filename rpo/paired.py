"""Differences between models on the same items: what both got wrong, or right, says nothing about which is better."""

from collections.abc import Sequence

from rpo.stats import clustered_mean


def differences(samples: Sequence[dict], baseline: str) -> dict[str, dict[str, dict]]:
    """{model: {"difference/METRIC": cell}} of every other model of `samples`: its mean score minus the baseline's.

    Items are paired by id. The standard error is that of the paired differences, by cluster (arXiv 2411.00640, section
    4.2); n_error counts items that only one of the two has a score for.
    """
    scores: dict[str, dict[str, dict]] = {}
    for sample in samples:
        scores.setdefault(sample["model"], {})[sample["id"]] = sample
    base = scores.pop(baseline)
    made: dict[str, dict[str, dict]] = {}
    for model, own in scores.items():
        names = dict.fromkeys(name for sample in own.values() for name in sample["scores"])
        made[model] = {f"difference/{name}": _difference(own, base, name) for name in names}
    return made


def _difference(own: dict[str, dict], base: dict[str, dict], name: str) -> dict:
    has = [{id for id, sample in items.items() if name in sample["scores"]} for items in (own, base)]
    both = [id for id in own if id in has[0] & has[1]]
    values = [own[id]["scores"][name] - base[id]["scores"][name] for id in both]
    return clustered_mean(values, [own[id]["cluster"] for id in both]) | {"n_error": len(has[0] ^ has[1])}
