"""Which checkpoint of each run to take: `selection`'s rules on the curves that task=overopt left in a results.json."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rpo.errors import UserError
from rpo.evals.settings import SelectTask
from rpo.overopt import selection
from rpo.overopt.curve import difference
from rpo.runs import folder as run_folder
from rpo.stats import clustered_mean

LEAST = 4  # prompts in a half: fewer have no standard error to speak of


def read(folder: Path) -> dict:
    """The results.json of task=overopt in `folder`, or that file itself. Raises UserError where there is none."""
    file = folder if folder.name == "results.json" and folder.is_file() else folder / "results.json"
    if not file.is_file():
        raise UserError(
            f"task.results={folder}: has no results.json; give the run_dir of an evaluation by task=overopt that is done"
        )
    try:
        found = run_folder.read_json(file)
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error})") from None
    if not isinstance(found, dict) or found.get("task") != "overopt":
        raise UserError(f"{file}: is not of task=overopt; give the folder of such an evaluation")
    return found


def evaluate(results: dict, task: SelectTask) -> list[dict]:
    """For each run {"run", "label", "chosen", "label_free"}: by `task.score`, and by the limits alone.

    `chosen` is `selection.select` with the checkpoint's folder, or {"step": null, "reason"} where nothing is feasible. With
    task.split its score is of one half of the prompts, by hash, and "report" has the other half's: gold there, and its
    difference from the reference's, which the choice does not flatter. Raises UserError where the score was not measured.
    """
    direction, _, score = task.score.partition(":")
    limits = selection.Limits(task.max_kl, task.entropy_falls, task.max_displacement, task.min_ended)
    made = []
    for run in results["runs"]:
        names = sorted({name for point in run["curve"] for name in point["metrics"]})
        if score not in names:
            raise UserError(f"task.score={task.score}: {run['run']} has no {score}; there are {', '.join(names)}")
        curve, report = run["curve"], None
        if task.split:
            chosen_by, reported = halves(run["prompts"])
            curve, report = part_of(run["curve"], chosen_by), part_of(run["curve"], reported)
        chosen = _selected(run, curve, limits, score=score, direction=direction)
        if report is not None and chosen["step"] is not None:
            chosen["report"] = reported_on(report, chosen["step"])
        made.append(
            {
                "run": run["run"],
                "label": run["label"],
                "chosen": chosen,
                "label_free": _selected(run, run["curve"], limits),
            }
        )
    return made


def _selected(run: dict, curve: Sequence[dict], limits: selection.Limits, **how: str) -> dict:
    try:
        chosen = selection.select(curve, limits, **how)
    except UserError as error:
        if not str(error).startswith("no checkpoint is feasible"):
            raise UserError(f"{run['run']}: {error}") from None
        return {"step": None, "checkpoint": None, "reason": str(error)}
    return chosen | {"checkpoint": f"{run['run']}/checkpoints/step_{chosen['step']:08d}"}


def halves(prompts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of the prompts to select on and of those to report on, by the order of their digests: a function of the set.

    Raises UserError where a half would have fewer than LEAST.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    if len(order) < 2 * LEAST:
        raise UserError(f"task.split=true: {len(order)} prompts; two halves need {2 * LEAST}: set task.split=false")
    return sorted(order[::2]), sorted(order[1::2])


def part_of(curve: Sequence[dict], prompts: Sequence[int]) -> list[dict]:
    """The curve with gold of these prompts alone; what else there is stays of all."""
    part = []
    for point in curve:
        whole = point["clusters"]["gold"]
        mean_G, size_G = (np.asarray(whole[name], dtype=np.float64)[list(prompts)] for name in ("mean", "size"))
        gold = clustered_mean(mean_G * size_G, np.arange(len(mean_G)), size_G)
        clusters = {"gold": {"mean": mean_G.tolist(), "size": size_G.tolist()}}
        part.append(point | {"metrics": point["metrics"] | {"gold": gold}, "clusters": clusters})
    return part


def reported_on(curve: Sequence[dict], step: int) -> dict:
    """Gold at `step` and its paired difference from step 0's, on the prompts of `curve`."""
    point = next(point for point in curve if point["step"] == step)
    return {"gold": point["metrics"]["gold"], "over_reference": difference(point, curve[0], "gold")}


def lines(made: Sequence[dict], task: SelectTask) -> str:
    """For each run the step that either rule takes, why, and its folder; the second rule where there is a limit."""
    limited = any(x is not None for x in (task.max_kl, task.entropy_falls, task.max_displacement, task.min_ended))
    shown = []
    for run in made:
        chosen = run["chosen"]
        report = ""
        if "report" in chosen:
            gold, over = chosen["report"]["gold"], chosen["report"]["over_reference"]
            report = f"; on the other half of the prompts gold {gold['value']:.3g}, {over['value']:+.2g} +- {over['se']:.2g} over the reference"
        shown.append(f"{run['run']} ({run['label']})")
        rules = {task.score: chosen} | ({"limits alone": run["label_free"]} if limited else {})
        for name, taken in rules.items():
            step = "" if taken["step"] is None else f"step {taken['step']}, "
            shown.append(f"  {name}: {step}{taken['reason']}{report if taken is chosen else ''}")
            shown += [f"    {taken['checkpoint']}"] * (taken["step"] is not None)
    return "\n".join(shown)
