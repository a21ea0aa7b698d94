"""A study's results from the curves of its runs: summaries, fits and verdicts, by run and by group of seeds."""

from collections.abc import Sequence

import numpy as np

from rpo import text
from rpo.evals.results import Cells
from rpo.overopt import curve as of_run
from rpo.overopt import scaling_laws
from rpo.runs.groups import Group, group
from rpo.runs.groups import summary as summary_of

# Columns of the printed table: heading, entry of the summaries, format.
_SHOWN = (
    ("gold start", "gold/reference", ".2f"),
    ("peak", "gold/peak", ".2f"),
    ("end", "gold/final", ".2f"),
    ("drop", "gold/drop", ".2f"),
    ("step of peak", "step/peak", ".0f"),
    ("KL", "kl/final", ".2f"),
    ("accuracy", "accuracy/final", ".3f"),
    ("shift/chosen", "shift/chosen", ".1f"),
)


def summarise(runs: Sequence[dict], seed: int) -> tuple[list[dict], list[dict], list[Group]]:
    """(runs with their summary, verdict and fits; a record per group of runs that differ in seeds alone; the groups).

    `runs` are {"run", "settings", "max_new_tokens", "curve", ...}. A group's fits pool its curves, with intervals over resampled runs
    (prompts, where there is one run); a run's have none.
    """
    judged = []
    for run in runs:
        summary = of_run.summarise(run["curve"])
        words = {"kind": of_run.kind(summary), "verdict": of_run.verdict(summary)}
        judged.append(run | {"summary": summary, "fits": _fits([run])} | words)
    groups = group(judged)
    labels = {run["run"]: g.label for g in groups for run in g.runs}
    records = [
        {
            "label": g.label,
            "loss": g.loss,
            "runs": [run["run"] for run in g.runs],
            "seeds": [list(seeds) for seeds in g.seeds],
            "verdict": of_run.group_verdict([run["summary"] for run in g.runs]),
            "cut": of_run.cut([run["curve"] for run in g.runs], max(run["max_new_tokens"] for run in g.runs)),
            "summary": summary_of(g),
            "fits": _fits(g.runs, over="runs" if len(g.runs) > 1 else "prompts", seed=seed),
        }
        for g in groups
    ]
    return [run | {"label": labels[run["run"]]} for run in judged], records, groups


def _fits(runs: Sequence[dict], *, over: str | None = None, seed: int = 0) -> list[dict]:
    """Both laws fitted to the curves; nothing where gold was not measured."""
    curves = [run["curve"] for run in runs]
    if any(of_run.value(point, "gold") is None for curve in curves for point in curve):
        return []
    return [scaling_laws.fit_curves(curves, form, over=over, seed=seed) for form in scaling_laws.FORMS]


def mean_best_of_n(runs: Sequence[dict]) -> list[dict]:
    """Best-of-n of the reference, averaged over the runs whose implicit rewards ranked its answers; [] where none did.

    Gold's `se` is the mean of theirs, each clustered by prompt: they rank the same answers to the same prompts, so that
    more runs make it no smaller. Null where a run has none.
    """
    curves = [run["bon"] for run in runs if run.get("bon")]
    mean = []
    for points in zip(*curves, strict=True):
        gold, errors = ([point["gold"][part] for point in points] for part in ("value", "se"))
        se = None if None in errors else float(np.mean(errors))
        cell = {"value": float(np.mean(gold)), "se": se, "n": len(gold)}
        mean.append({"n": points[0]["n"], "kl": points[0]["kl"], "gold": cell})
    return mean


def cells_of(run: dict) -> Cells:
    """The entries of a run's summary as cells: those read off one checkpoint have its error and n, a difference of two
    its paired one, and the rest the number of trained checkpoints for n."""
    summary, curve = run["summary"], run["curve"]
    points = {point["step"]: point["metrics"] for point in curve}
    at = {"reference": points[0], "final": points[summary["step/final"]], "peak": points.get(summary["step/peak"], {})}
    measured = {"gold": "gold", "kl": "kl", "accuracy": "rewards/accuracies"}
    cells = {}
    for entry, value in summary.items():
        if value is None or entry.endswith("_se"):
            continue
        kind, _, place = entry.partition("/")
        read_off = points[summary["step/final"]][entry] if entry == "shift/chosen" else None
        read_off = read_off or at.get(place, {}).get(measured.get(kind))
        se = summary.get(f"{entry}_se")
        n = summary["checkpoints"] if se is None else curve[-1]["metrics"]["gold"]["n"]
        cells[entry] = read_off or {"value": value, "se": se, "interval": None, "n": n}
    return cells


def lines(records: Sequence[dict]) -> str:
    """A row per group: means over seeds, with the drop's standard deviation; below it a sentence each, or two."""
    rows = [["", *(heading for heading, *_ in _SHOWN), "seeds"]]
    for record in records:
        row = [record["label"]]
        for _, entry, form in _SHOWN:
            over_seeds = record["summary"][entry]
            spread = f" +- {over_seeds['sd']:{form}}" if entry == "gold/drop" and over_seeds["sd"] is not None else ""
            row.append("-" if over_seeds["mean"] is None else f"{over_seeds['mean']:{form}}{spread}")
        rows.append([*row, str(len(record["runs"]))])
    sentences = [
        f"{record['label']}: {record[name]}" for record in records for name in ("verdict", "cut") if record[name]
    ]
    return "\n".join([text.table(rows, align=">"), *sentences])
