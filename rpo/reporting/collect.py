"""Runs in groups with verdicts, and evaluations, as they were left in their folders: a Report.

Nothing is trusted: what `catalog.walk` and `results.read` could not use becomes notes, not errors. A path that the user
named and that cannot be read raises UserError.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rpo.errors import UserError
from rpo.evals import pairing, results
from rpo.overopt import curve as overopt_curve
from rpo.reporting import run_verdicts
from rpo.reporting.run_verdicts import Verdict
from rpo.runs import catalog, groups
from rpo.runs.catalog import RunRecord
from rpo.stats import finite

_THEIRS = {"loss/preference": "nll/preference"}  # task=overopt's word for the log's; equal without label smoothing


@dataclass(frozen=True)
class Member:
    """A run; where task=overopt `measured` it, of more samples than its own log, the record's curve is from there."""

    name: str
    record: RunRecord
    measured: dict | None

    @property
    def settings(self) -> dict[str, Any]:
        return self.record.settings or {}

    @property
    def curve(self) -> list[dict]:
        return self.record.curve

    @property
    def done(self) -> bool:
        return self.record.state in ("finished", "evaluated")

    def made(self, model: str) -> bool:
        """Whether the path of a model is in the run's folder."""
        return f"{model}/".startswith(f"{self.record.folder}/")

    def error(self, step: int, metric: str) -> float | None:
        """The standard error of a metric at a step, where task=overopt measured it."""
        points = self.measured["curve"] if self.measured else []
        errors = [p["metrics"].get(_THEIRS.get(metric, metric), {}).get("se") for p in points if p["step"] == step]
        return errors[0] if errors and finite(errors[0]) else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone: an arm of the page's table.

    `short`: its label without what all labels say; `style`: its number in every figure.
    """

    label: str
    short: str
    style: int
    members: list[Member]
    verdict: Verdict = field(repr=False)

    @property
    def judged(self) -> list[Member]:
        """Those that the verdict and all means are of: that finished, or where none did all with a curve that did not fail; of
        these the measured, if any."""
        ran = [member for member in self.members if member.curve and member.record.state != "failed"]
        done = [member for member in ran if member.done] or ran
        return [member for member in done if member.measured] or done

    def average(self, metric: str, points: Sequence[dict]) -> tuple[float, float | None]:
        """(mean, error) of one evaluation of each seed: the error over seeds, of one seed that of task=overopt, or None."""
        value, error = mean_and_error([point[metric] for point in points])
        return value, self.judged[0].error(points[0]["step"], metric) if len(points) == 1 else error

    def ends(self, metric: str) -> list[dict]:
        """The last evaluation of each judged run that has the metric."""
        return [member.curve[-1] for member in self.judged if metric in member.curve[-1]]

    def end(self, metric: str) -> tuple[float, float | None] | None:
        ends = self.ends(metric)
        return self.average(metric, ends) if ends else None


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, sd / sqrt(n); None of one value."""
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True)
class Results(results.Results):
    """An evaluation; `names`: what the page calls its models; `curves`: the runs of task=overopt, each
    {"run", "settings", "curve", "summary", "max_new_tokens"}."""

    names: dict[str, str] = field(default_factory=dict, repr=False)
    curves: list[dict] = field(default_factory=list, repr=False)

    def name(self, model: str) -> str:
        return self.names.get(model, model)

    @property
    def judged_by(self) -> dict[str, Any]:
        return pairing.judged_by(self)

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for cells in self.models.values() for name in cells))

    def unusable(self, model: str) -> str | None:
        """Why this model's results cannot be used; None where they can."""
        return next((str(cell["unusable"]) for cell in self.models[model].values() if "unusable" in cell), None)


@dataclass(frozen=True)
class Report:
    """All that the page is about."""

    groups: list[Group]
    evaluations: list[Results]
    notes: list[str]

    @property
    def members(self) -> list[Member]:
        return [member for group in self.groups for member in group.members]


def collect(runs: Sequence[str], specs: Sequence[str]) -> Report:
    """Runs below the folders `runs` in groups with verdicts, and the evaluations `specs`, else those below `runs`.

    Raises UserError where there is nothing to report on, or a path given explicitly cannot be read.
    """
    below = catalog.walk(runs)
    notes, evaluations = below.unreadable + below.notes, []
    if runs and not (below.runs or below.evaluations or notes):
        what = "holds no run and no evaluation; a run's folder has a config.yaml with a loss"
        raise UserError(f"runs={', '.join(runs)}: {what}")
    for path in specs or below.evaluations:
        try:
            read = results.read(path, strict=False)
            evaluations.append(Results(**vars(read), curves=_curves(read)))
        except UserError as error:
            if specs:
                raise
            notes.append(str(error))
    measured: dict[str, dict] = {}
    for each in evaluations:
        left_out = each.details.get("left_out") if each.task == "overopt" else None
        notes += [f"{each.folder}: left out {left}" for left in left_out] if isinstance(left_out, list) else []
        for run in each.curves:
            if run["run"] in measured:
                notes.append(f"{run['run']}: measured twice by task=overopt; {each.folder} is not used for it")
            measured.setdefault(run["run"], run)
    notes += _not_comparable(evaluations)
    arms = _groups(below.runs, measured, notes)
    if not arms and not evaluations:
        raise UserError("nothing to report on: " + ("; ".join(notes[:3]) or "give runs=FOLDER or task.results=FOLDER"))
    for each in evaluations:
        each.names.update(_names(each, arms))
    return Report(arms, evaluations, notes)


def _curves(read: results.Results) -> list[dict]:
    """The runs of task=overopt with the finite numbers of their curves, summarised again. UserError on what is malformed."""
    curves = []
    try:
        for run in read.details["runs"] if read.task == "overopt" else ():
            curve = [
                {"step": int(p["step"]), "clusters": dict(p.get("clusters") or {})}
                | {"metrics": {name: cell for name, cell in p["metrics"].items() if finite(cell["value"])}}
                for p in run["curve"]
            ]
            own = {"run": str(run["run"]), "settings": dict(run["settings"]), "curve": curve}
            own |= {"summary": overopt_curve.summarise(curve), "max_new_tokens": int(run["max_new_tokens"])}
            overopt_curve.verdict(own["summary"])
            own["settings"]["loss"].items()
            curves.append(own)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        file = read.folder / "results.json"
        raise UserError(f"{file}: is not what task=overopt writes ({what}); run it again") from None
    return curves


def compared(read: results.Results) -> list[tuple[str, str]]:
    """The two models of each comparison by task=compare."""
    pairs = read.details.get("pairs")
    whole = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    if not whole or len(pairs) != len(read.models):
        return [(f"{name}, the first", "the second") for name in read.models]
    return [(str(first), str(second)) for first, second in pairs]


def _names(read: Results, arms: Sequence[Group]) -> dict[str, str]:
    """What the page calls each model: its arm and run where it is a run's, else its path without what all paths share."""
    models = [model for pair in compared(read) for model in pair] if read.task == "compare" else read.models
    models = list(dict.fromkeys(models))
    names = dict(zip(models, groups.short(models), strict=True))
    for arm in arms:
        for member in arm.members:
            own = f"{arm.short} (run {member.name})" if len(arm.members) > 1 else arm.short
            names |= {model: own for model in models if member.made(model)}
    return names


def _not_comparable(evaluations: Sequence[Results]) -> list[str]:
    """Evaluations of one task that share no item with the first, or had another judge: their numbers do not compare."""
    notes: list[str] = []
    first: dict[str, tuple[Results, set[str]]] = {}
    for each in evaluations:
        ids = {item.id for item in each.items}
        other, theirs = first.setdefault(each.task, (each, ids))
        reasons = ["have no item in common"] if ids and theirs and not ids & theirs else []
        judges = pairing.judged_apart(other.judged_by, each.judged_by)
        reasons += [f"had different judges ({judges})"] if judges else []
        reasons += ["had other data under one name"] if pairing.data_apart(other, each) else []
        if reasons and each.task != "compare":
            both = f"{other.folder} and {each.folder}, of task={each.task},"
            notes.append(f"{both} {' and '.join(reasons)}: do not compare their numbers")
    return notes


# ---- groups


def _groups(runs: Sequence[RunRecord], measured: dict[str, dict], notes: list[str]) -> list[Group]:
    records = {str(run.folder): run for run in runs}
    for folder, own in measured.items():
        ours = {theirs: name for name, theirs in _THEIRS.items()}
        curve = [
            {"step": p["step"]} | {ours.get(name, name): cell["value"] for name, cell in p["metrics"].items()}
            for p in own["curve"]
        ]
        gone = RunRecord(Path(folder), settings=own["settings"], state="evaluated")
        records[folder] = replace(records.get(folder, gone), curve=curve)
    names = dict(zip(records, groups.short(list(records)), strict=True))
    members = {folder: Member(names[folder], record, measured.get(folder)) for folder, record in records.items()}
    apart, same = [], {}
    for folder, record in records.items():
        if record.settings is not None and _is_whole(record.settings):
            own, seeds = groups.identity(record.settings)
            same.setdefault((repr(sorted(own.items())), seeds), []).append(folder)
            continue
        apart.append(folder)
        if record.settings is not None:
            notes.append(f"{folder}: settings of another version; shown by itself")
    once = [{"run": each[0], "settings": members[each[0]].settings} for each in same.values() if len(each) == 1]
    labelled = [(g.label, [members[run["run"]] for run in g.runs]) for g in groups.group(once)]
    for twice in [each for each in same.values() if len(each) > 1]:  # a copy is no second seed
        notes.append(f"{', '.join(twice)}: equal settings and seeds; each is shown by itself")
        labelled += [(f"{groups.name(members[f].settings['loss'])} ({names[f]})", [members[f]]) for f in twice]
    for folder in apart:
        overrides = [f"{key}={value}" for key, value in records[folder].overrides.items()]
        labelled.append((" ".join(overrides) or names[folder], [members[folder]]))
    notes += _data_apart(list(records.values()))
    short, _ = shortened([label for label, _ in labelled])
    return [Group(label, short[i], i, own, _verdict(own)) for i, (label, own) in enumerate(labelled)]


def _data_apart(runs: Sequence[RunRecord]) -> list[str]:
    """Runs of one data by name whose rows were others, as of a file that was written anew between them."""
    first: dict[str, RunRecord] = {}
    notes = []
    for run in runs:
        if run.digests and run.settings:
            own = groups.flat(run.settings)
            named = {key: value for key, value in own.items() if key.startswith(("data.", "model."))}
            other = first.setdefault(repr((named, own.get("loss.preference") == "none")), run)
            keys = ("data.train", "data.eval")
            if differing := [key for key in keys if other.digests.get(key) != run.digests.get(key)]:
                both = f"{other.folder} and {run.folder} had other data under one name"
                notes.append(f"{both} ({', '.join(differing)}): do not compare or average their numbers")
    return notes


def shortened(labels: list[str]) -> tuple[list[str], list[str]]:
    """(labels without the settings that all of them have, these settings): of "DPO beta 0.1" and the like."""
    settings = [re.findall(r" ((?:beta|eta|smoothing|lam|clip|gamma) \S+|\S+=\S+)", label) for label in labels]
    common = [part for part in settings[0] if all(part in own for own in settings)] if len(labels) > 1 else []
    short = labels
    for part in common:
        short = [label.replace(f" {part}", "", 1) for label in short]
    return (short, common) if len(set(short)) == len(labels) else (labels, [])


def _is_whole(settings: dict) -> bool:
    """Whether the settings are those of this project's runs, as far as groups and their labels go by them."""
    seeds = [groups.flat(settings).get(key) for key in groups.SEEDS]
    try:
        name = groups.name(settings["loss"])
    except (KeyError, TypeError, ValueError):
        return False
    return "nan" not in name and all(seed is None or finite(seed) for seed in seeds)


def _verdict(members: Sequence[Member]) -> Verdict:
    """The verdict on what finished, or where nothing did on what there is. Notes name the runs that did not."""
    odd = [member for member in members if not member.done]
    judged = [member for member in members if member.done] or [m for m in odd if m.record.state != "failed" and m.curve]
    notes = [_ending(member) for member in odd]
    notes += [f"Run {member.name}: {flaw}" for member in members for flaw in member.record.flaws]
    if not judged:
        return Verdict("no run finished", f"None of {len(members)} has an evaluation.", notes)
    if judged[0] in odd:
        notes.append("None finished: judged as far as they are.")
    measured = [member.measured for member in judged if member.measured]
    if 0 < len(measured) < len(judged):
        notes.append(f"task=overopt measured {len(measured)} of {len(judged)}; the verdict is on these.")
        judged = [member for member in judged if member.measured]
    verdict = run_verdicts.judge(
        [member.curve for member in judged],
        [each["summary"] for each in measured],
        pairs=judged[0].record.pairs,
        sigmoid=judged[0].settings.get("loss", {}).get("preference") == "sigmoid",
    )
    if measured:
        cut = overopt_curve.cut([each["curve"] for each in measured], max(each["max_new_tokens"] for each in measured))
        notes += [f"{cut[0].upper()}{cut[1:]}."] if cut else []
    return Verdict(verdict.kind, verdict.says, [*verdict.notes, *notes])


def _ending(member: Member) -> str:
    run = member.record
    states = {"failed": "failed", "interrupted": "was interrupted", "running": "is running, or was killed"}
    at = "" if run.step is None else f" at step {run.step}"
    return f"Run {member.name} {states.get(run.state, 'wrote nothing')}{at}{run.reason and ': '}{run.reason[:300]}."
