"""Runs of a study by their settings: what differs in its seeds alone is one group, with a spread and a name.

A run is {"run": its folder, "settings": its config.yaml as nested dicts, "curve": see overopt, "summary":
overopt.summarise(curve)}.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rpo import stats
from rpo.errors import UserError
from rpo.runs.earlier import completed, completed_loss

SEEDS = ("seed", "data.gold.seed")
# What does not change what is learnt, or only its rounding; a key stands for everything below it.
IGNORED = SEEDS + tuple(
    "run_dir cache_dir reference.kind reference.cache_dir wandb checkpoint resume eval_every log log_every sample_every "
    "timeout tokens_per_microbatch fsdp layout compile deterministic data.gold.samples optim.state_dtype".split()
)
_EMBEDDED = re.compile(r"(^|/)gold/[0-9a-f]{16}/")  # where the embedded task's files lie
LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Group:
    """Runs equal but for their seeds, in the order of `seeds`: one (seed, data.gold.seed) per run."""

    label: str
    loss: dict
    seeds: list[tuple]
    runs: list[dict]


def flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, keys joined by dots."""
    found = {}
    for name, value in settings.items():
        nested = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def differing(settings: Sequence[dict]) -> list[str]:
    """The keys whose values are not the same in all of these settings, in the order that they first stand in."""
    flats = [flat(completed(each)) for each in settings]
    keys = dict.fromkeys(key for each in flats for key in each)
    return [key for key in keys if len({repr(_nameless(each.get(key))) for each in flats}) > 1]


def swept(settings: Sequence[dict]) -> list[str]:
    """Those that differ and change what is learnt; seeds among them."""
    return [key for key in differing(settings) if key in SEEDS or not _is_ignored(key)]


def _is_ignored(key: str) -> bool:
    return any(key == ignored or key.startswith(f"{ignored}.") for ignored in IGNORED)


def _nameless(value: Any) -> Any:
    """The files of the embedded task as one word, whatever their digest: data.gold says what is in them."""
    return "gold" if isinstance(value, str) and _EMBEDDED.search(value) else value


def objective(loss: dict) -> dict:
    """The keys of `loss` that its objective reads: one without SFT weight is the bare preference loss, and so on."""
    read = completed_loss(dict(loss))
    if read["sft"] == "none" or (not read["eta"] and read["preference"] != "none"):
        read |= {"sft": "none", "eta": 0.0}
    if read["preference"] not in ("ipo", "sigmoid"):
        read.pop("normalize", None)
    if read["preference"] not in ("sigmoid", "robust"):
        read.pop("label_smoothing", None)
    for own in ("lam", "clip", "gamma"):
        if read.get(own) is None:
            read.pop(own, None)
    if read["preference"] == "none" and read["sft"] != "sum":
        read.pop("beta", None)
    return read


def identity(settings: dict) -> tuple[dict[str, Any], tuple]:
    """(what makes two runs one group: every key but those ignored; the seeds of this one)."""
    known = flat(completed(settings) | {"loss": objective(settings["loss"])})
    kept = {key: _nameless(value) for key, value in known.items() if not _is_ignored(key)}
    return kept, tuple(known.get(seed) for seed in SEEDS)


def name(loss: dict) -> str:
    """The objective in the field's words: DPO beta 0.02; RPO sum beta 0.02 eta 0.25; IPO beta 0.1; SFT."""
    read = objective(loss)
    smoothing = read.get("label_smoothing", 0)
    normalized = " per token" * (read["preference"] == "sigmoid" and read.get("normalize", False))
    preference = {
        "sigmoid": f"{'cDPO' if smoothing else 'DPO'}{normalized}",
        "ipo": "IPO",
        "hinge": "SLiC",
        "robust": "robust DPO",
        "dpop": "DPOP",
        "chi_po": "chi-PO",
        "simpo": "SimPO",
        "cpo": "CPO",
        "orpo": "ORPO",
        "none": "SFT",
    }
    words = [preference.get(read["preference"], read["preference"])]  # one that a user added has its own name
    if read["sft"] != "none":
        if read["preference"] == "none":
            words = ["SFT"] if read["sft"] == "token" else ["SFT", read["sft"]]
        else:
            words = ["RPO" if words == ["DPO"] else f"{words[0]} + SFT", read["sft"]]
    if "beta" in read:
        words.append(f"beta {read['beta']:g}")
    if read["eta"] and (read["preference"] != "none" or read["eta"] != 1):
        words.append(f"eta {read['eta']:g}")
    words += [f"{own} {read[own]:g}" for own in ("lam", "clip", "gamma") if own in read]
    words += [f"smoothing {smoothing:g}"] * bool(smoothing)
    words += ["of sums"] * (read["preference"] == "ipo" and read.get("normalize") is False)
    return " ".join(words)


def short(names: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them begin with or end in; a lone one is its last part, or RUN of RUN/model."""
    if len(names) < 2:
        return [name.rstrip("/").removesuffix("/model").rpartition("/")[2] or name for name in names]
    parts = [name.split("/") for name in names]
    for end in (0, -1):
        while len({part[end] for part in parts}) == 1 and min(map(len, parts)) > 1:
            for part in parts:
                del part[end]
    return ["/".join(part) for part in parts]


def group(runs: Sequence[dict]) -> list[Group]:
    """The runs by settings, seeds and paths aside: by objective, then beta and eta. UserError on two runs of one seed.

    A label is `name` of the loss and key=value for every other key that differs between the groups.
    """
    identities: dict[str, dict] = {}
    members: dict[str, list[tuple[tuple, dict]]] = {}
    for run in runs:
        own, seeds = identity(run["settings"])
        key = repr(sorted(own.items()))
        identities[key] = own
        members.setdefault(key, []).append((seeds, run))
    shown = sorted(key for key in differing(list(identities.values())) if not key.startswith("loss."))
    kinds = ("none", "sigmoid", "ipo", "hinge", "robust", "dpop", "chi_po", "simpo", "cpo", "orpo")
    groups = []
    for key, own in identities.items():
        loss = objective(members[key][0][1]["settings"]["loss"])
        label = " ".join([name(loss), *(f"{k}={own.get(k)}" for k in shown)])
        by_seeds: dict[tuple, dict] = {}
        for seeds, run in members[key]:
            if seeds in by_seeds:
                both = " and ".join(each.get("run", "a run") for each in (by_seeds[seeds], run))
                raise UserError(
                    f"{label}: {both} both have seed={seeds[0]} data.gold.seed={seeds[1]}; give one of them"
                )
            by_seeds[seeds] = run
        order = sorted(by_seeds, key=lambda seeds: tuple(math.inf if seed is None else seed for seed in seeds))
        kind = kinds.index(loss["preference"]) if loss["preference"] in kinds else len(kinds)
        place = (kind, loss.get("normalize", False), loss["sft"] != "none", loss["sft"], loss.get("label_smoothing", 0))
        place += (loss.get("beta", 0), loss["eta"], label)
        groups.append((place, Group(label, loss, order, [by_seeds[seeds] for seeds in order])))
    return [group for _, group in sorted(groups, key=lambda each: each[0])]


def interval(values: Sequence[float], comparisons: int = 1) -> dict[str, Any]:
    """{"mean", "sd", "ci", "n"} over seeds: ci = mean +- t sd / sqrt(n) at 95%, Student's t with n - 1 degrees.

    Of several `comparisons` all intervals hold together with that chance (Bonferroni).

    sd and ci are None of one value, all three of none. Runs evaluated together share prompts and the random stream of
    their samples, so the ci is over training runs and not over prompts.
    """
    n, values = len(values), np.asarray(values, dtype=np.float64)
    mean, sd, ci = float(values.mean()) if n else None, None, None
    if n > 1:
        sd = float(values.std(ddof=1))
        half = stats.t_quantile(1 - (1 - LEVEL) / (2 * comparisons), n - 1) * sd / math.sqrt(n)
        ci = [mean - half, mean + half]
    return {"mean": mean, "sd": sd, "ci": ci, "n": n}


def summary(group: Group) -> dict[str, dict]:
    """Entry of the runs' summaries -> `interval` over the seeds that have it: n tells where some have not.

    An entry that a seed lacks (a KL never reached) is a mean over the others, which are not like it.
    """
    known = {entry: [run["summary"][entry] for run in group.runs] for entry in group.runs[0]["summary"]}
    return {entry: interval([value for value in values if value is not None]) for entry, values in known.items()}


def paired_difference(a: Group, b: Group, entry: str) -> dict[str, Any]:
    """`interval` of a's summary entry minus b's over the seeds that both have: same data, same order, same prompts.

    UserError where no seed, or none with the entry, is common.
    """
    of_b = dict(zip(b.seeds, b.runs, strict=True))
    shared = [(run, of_b[seeds]) for seeds, run in zip(a.seeds, a.runs, strict=True) if seeds in of_b]
    pairs = [(run["summary"][entry], other["summary"][entry]) for run, other in shared]
    known = [x - y for x, y in pairs if x is not None and y is not None]
    if not known:
        raise UserError(f"{a.label} and {b.label}: no seed with {entry} is common to both; run both on the same seeds")
    return interval(known)
