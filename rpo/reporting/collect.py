"""Runs and evaluations as they were left in their folders, in groups with verdicts: a Report.

Nothing is trusted: lines that are not JSON, numbers that are not finite and folders of other kinds become notes, not
errors. A path that the user named and that cannot be read raises UserError.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rpo import config
from rpo.errors import UserError
from rpo.evals import pairing
from rpo.overopt import curve as overopt_curve
from rpo.reporting import run_verdicts
from rpo.reporting.evaluations import Results, as_dict, finite, json_or_none, lines, read_results
from rpo.reporting.run_verdicts import Verdict
from rpo.runs import folder as run_folder
from rpo.runs import groups

_PASSED_BY = {"checkpoints", "model", "wandb", "plots", "__pycache__"}  # where no run has its folder


# ---- folders


@dataclass(frozen=True)
class RunRecord:
    """What a run left. `curve`: its evaluations by step, {"step", metric: finite number}; `pairs`: how many were held out."""

    folder: Path
    settings: dict[str, Any] | None  # None: it failed before it had any
    overrides: dict[str, str]  # what its sweep set
    state: str
    reason: str
    step: int | None
    curve: list[dict] = field(repr=False)
    pairs: int | None
    environment: dict[str, Any] = field(repr=False)
    flaws: list[str]  # of its metrics.jsonl


@dataclass(frozen=True)
class Found:
    """`evaluations`: folders with a results.json."""

    runs: list[RunRecord]
    evaluations: list[Path]
    notes: list[str]


def find(specs: Sequence[str]) -> Found:
    """What lies in the folders `specs` and below them, in the order of the folders, 2 before 10.

    Raises UserError: a folder that is not there, or with neither a run nor an evaluation in it.
    """
    runs, evaluations, notes = {}, {}, []
    for spec in specs:
        top = Path(spec).expanduser().resolve()
        if not top.is_dir():
            raise UserError(f"runs={spec}: no such folder; give the folder of a run or a sweep, or one above them")
        before = len(runs), len(evaluations), len(notes)
        for folder in sorted(_folders(top), key=_natural):
            _look(folder, runs, evaluations, notes)
        if (len(runs), len(evaluations), len(notes)) == before and top not in runs:
            raise UserError(
                f"runs={spec}: holds no run and no evaluation; a run's folder has a config.yaml with a loss"
            )
    return Found(list(runs.values()), list(evaluations), notes)


def _folders(top: Path) -> list[Path]:
    marked = []
    for folder, inner, files in os.walk(top):
        inner[:] = [name for name in inner if name not in _PASSED_BY and not name.startswith(".")]
        if {"config.yaml", "status.json", "sweep.json"} & set(files):
            marked.append(Path(folder))
    return marked


def _natural(folder: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(folder))]


def _look(folder: Path, runs: dict[Path, RunRecord], evaluations: dict[Path, None], notes: list[str]) -> None:
    """Enters what `folder` is; a note on what it should be and is not."""
    if (folder / "sweep.json").exists():
        absent = [str(i) for i in range(len(_sweep(folder))) if not (folder / str(i)).is_dir()]
        notes += [f"{folder}: cells of the sweep that were not started: {', '.join(absent)}"] if absent else []
    try:
        settings = config.read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
    except UserError as error:
        notes.append(str(error))
        return
    status = run_folder.read_status(folder)
    if isinstance(settings, dict) and isinstance(settings.get("loss"), dict):
        runs[folder] = _record(folder, settings, status)
    elif isinstance(settings, dict) and isinstance(settings.get("task"), dict):
        kind = settings["task"].get("kind")
        if kind != "report" and (folder / "results.json").is_file():
            evaluations[folder] = None
        elif kind != "report":
            why = f"{status['state']}: {status['reason']}".rstrip(": ")
            notes.append(f"{folder}: an evaluation by task={kind} without results ({why})")
    elif settings is None and status["state"] != "absent":
        runs[folder] = _record(folder, None, status)
    elif settings is not None:
        notes.append(f"{folder}: skipped, its config.yaml is not that of a run or an evaluation")


def _record(folder: Path, settings: dict | None, status: dict) -> RunRecord:
    events, broken = lines(folder / "metrics.jsonl")
    curve: dict[int, dict] = {}
    flaws = [f"{broken} unreadable line{'s' * (broken > 1)} of metrics.jsonl skipped."] if broken else []
    for event in events:
        if event.get("split") == "eval" and finite(event.get("step")):
            lost = [name for name, value in event.items() if isinstance(value, float) and not finite(value)]
            flaws += [f"{', '.join(lost)} at step {event['step']} not finite, skipped."] if lost else []
            # Of two evaluations of one step, one of them before an interruption, the later counts.
            curve[event["step"]] = {name: value for name, value in event.items() if finite(value)}
    row = _sweep(folder.parent)[int(folder.name) :][:1] if folder.name.isdecimal() else []
    overrides = {k: v for k, v in row[0].items() if isinstance(v, str) and "/" not in k} if row else {}
    pairs = as_dict(as_dict(json_or_none(folder / "data_report.json")).get("eval")).get("kept")
    return RunRecord(
        folder=folder,
        settings=settings,
        overrides={k: v for k, v in overrides.items() if k not in ("cell", "run_dir", "state", "reason")},
        state=str(status["state"]),
        reason=" ".join(str(status["reason"]).split()),
        step=status["step"] if finite(status["step"]) else None,
        curve=[curve[step] for step in sorted(curve)],
        pairs=pairs if finite(pairs) and pairs > 0 else None,
        environment=environment(folder),
        flaws=flaws,
    )


def _sweep(folder: Path) -> list[dict]:
    """The rows of the sweep in `folder`; [] where it is none."""
    table = json_or_none(folder / "sweep.json")
    return [row for row in table if isinstance(row, dict)] if isinstance(table, list) else []


def environment(folder: Path) -> dict[str, Any]:
    """What a run or an evaluation ran with; {} where it left nothing readable."""
    return as_dict(json_or_none(folder / "environment.json"))


# ---- groups


@dataclass(frozen=True)
class Member:
    """A run as the page knows it; `record` None: only results of task=overopt have it; `measured` None: none have."""

    name: str
    settings: dict[str, Any]
    record: RunRecord | None
    measured: dict | None

    @property
    def state(self) -> str:
        return "evaluated" if self.record is None else self.record.state

    @property
    def done(self) -> bool:
        return self.state in ("finished", "evaluated")

    @property
    def folder(self) -> str:
        return self.measured["run"] if self.record is None else str(self.record.folder)

    @property
    def curve(self) -> list[dict]:
        """Its evaluations: those of task=overopt, which are of more samples, before the run's own."""
        if self.measured is None:
            return self.record.curve
        return [
            {"step": p["step"]} | {_logged(k): c["value"] for k, c in p["metrics"].items()}
            for p in self.measured["curve"]
        ]

    def errors(self) -> dict[tuple[int, str], float]:
        """(step, metric) -> standard error, where task=overopt measured it."""
        points = self.measured["curve"] if self.measured else []
        cells = {(p["step"], _logged(name)): cell.get("se") for p in points for name, cell in p["metrics"].items()}
        return {key: se for key, se in cells.items() if finite(se)}

    def overrides(self) -> list[str]:
        return [f"{key}={value}" for key, value in (self.record.overrides if self.record else {}).items()]


def _logged(name: str) -> str:
    return "loss/preference" if name == "nll/preference" else name  # the log's word; equal without label smoothing


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
        """Those that the verdict and all means are of: that finished, or all with a curve; of these the measured, if any."""
        ran = [member for member in self.members if member.curve]
        done = [member for member in ran if member.done] or ran
        return [member for member in done if member.measured] or done


@dataclass(frozen=True)
class Report:
    """All that the page is about."""

    groups: list[Group]
    evaluations: list[Results]
    notes: list[str]

    @property
    def members(self) -> list[Member]:
        return [member for group in self.groups for member in group.members]


def collect(runs: Sequence[str], results: Sequence[str]) -> Report:
    """Runs below the folders `runs` in groups with verdicts, and the evaluations `results`, else those below `runs`.

    Raises UserError where there is nothing to report on, or a path given explicitly cannot be read.
    """
    below = find(runs) if runs else Found([], [], [])
    notes, evaluations = list(below.notes), []
    for path in results or below.evaluations:
        try:
            evaluations.append(read_results(path))
        except UserError as error:
            if results:
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
    grouped = _groups(below.runs, measured, notes)
    if not grouped and not evaluations:
        raise UserError("nothing to report on: " + ("; ".join(notes[:3]) or "give runs=FOLDER or task.results=FOLDER"))
    return Report(grouped, [replace(each, names=_names(each, grouped)) for each in evaluations], notes)


def _names(results: Results, arms: Sequence[Group]) -> dict[str, str]:
    """What the page calls each model: its arm and run where it is a run's, else its path without what all paths share."""
    pairs = results.details.get("pairs")
    compared = [str(m) for pair in pairs if isinstance(pair, list) for m in pair] if isinstance(pairs, list) else []
    models = list(dict.fromkeys(compared if results.task == "compare" else results.models))
    names = dict(zip(models, groups.short(models), strict=True))
    for model in models:
        for arm in arms:
            for member in arm.members:
                if model == member.folder or model.startswith(f"{member.folder}/"):
                    names[model] = f"{arm.short} (run {member.name})" if len(arm.members) > 1 else arm.short
    return names


def _not_comparable(evaluations: Sequence[Results]) -> list[str]:
    """Evaluations of one task that share no item with the first, or had another judge: their numbers do not compare."""
    notes: list[str] = []
    first: dict[str, tuple[Results, set[str]]] = {}
    for each in evaluations:
        ids = {str(sample["id"]) for sample in each.samples}
        other, theirs = first.setdefault(each.task, (each, ids))
        if other is each or each.task == "compare":
            continue
        why = ["have no item in common"] if ids and theirs and not ids & theirs else []
        judges = pairing.judged_apart(other.judged_by, each.judged_by)
        why += [f"had different judges ({judges})"] if judges else []
        if why:
            both = f"{other.folder} and {each.folder}, of task={each.task},"
            notes.append(f"{both} {' and '.join(why)}: do not compare their numbers")
    return notes


def _groups(runs: Sequence[RunRecord], measured: dict[str, dict], notes: list[str]) -> list[Group]:
    known = {str(run.folder): run for run in runs}
    folders = list(dict.fromkeys([*known, *measured]))
    names = dict(zip(folders, groups.short(folders), strict=True))
    members, apart, same = {}, [], {}
    for folder in folders:
        run = known.get(folder)
        settings = run.settings if run is not None else measured[folder]["settings"]
        members[folder] = Member(names[folder], settings or {}, run, measured.get(folder))
        if settings is not None and _is_whole(settings):
            own, seeds = groups.identity(settings)
            same.setdefault((repr(sorted(own.items())), seeds), []).append(folder)
            continue
        apart.append(folder)
        if settings is not None:
            notes.append(f"{folder}: settings of another version; shown by itself")
    once = [{"run": each[0], "settings": members[each[0]].settings} for each in same.values() if len(each) == 1]
    labelled = [(g.label, [members[run["run"]] for run in g.runs]) for g in groups.group(once)]
    for twice in [each for each in same.values() if len(each) > 1]:  # a copy is no second seed
        notes.append(f"{', '.join(twice)}: equal settings and seeds; each is shown by itself")
        labelled += [(f"{groups.name(members[f].settings['loss'])} ({names[f]})", [members[f]]) for f in twice]
    labelled += [(" ".join(members[folder].overrides()) or names[folder], [members[folder]]) for folder in apart]
    short, _ = shortened([label for label, _ in labelled])
    return [
        Group(label, name, i, own, _verdict(own))
        for i, (name, (label, own)) in enumerate(zip(short, labelled, strict=True))
    ]


def shortened(labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """(labels without the settings that all of them have, these settings): of "DPO beta 0.1" and the like."""
    settings = [re.findall(r" ((?:beta|eta|smoothing) \S+|\S+=\S+)", label) for label in labels]
    common = [part for part in settings[0] if all(part in own for own in settings)] if len(labels) > 1 else []
    short = list(labels)
    for part in common:
        short = [label.replace(f" {part}", "", 1) for label in short]
    return (short, common) if len(set(short)) == len(labels) else (list(labels), [])


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
    judged = [member for member in members if member.done] or [m for m in odd if m.state != "failed" and m.curve]
    notes = [_ending(member) for member in odd]
    notes += [f"Run {member.name}: {flaw}" for member in members if member.record for flaw in member.record.flaws]
    if not judged:
        return Verdict("no run finished", f"None of {len(members)} has an evaluation.", notes)
    if judged[0] in odd:
        notes.append("None finished: judged as far as they are.")
    measured = [member.measured for member in judged if member.measured]
    if 0 < len(measured) < len(judged):
        notes.append(f"task=overopt measured {len(measured)} of {len(judged)}; the verdict is on these.")
        judged = [member for member in judged if member.measured]
    loss, record = judged[0].settings.get("loss", {}), judged[0].record
    verdict = run_verdicts.judge(
        [member.curve for member in judged],
        [each["summary"] for each in measured],
        pairs=record.pairs if record else None,
        sigmoid=loss.get("preference") == "sigmoid",
    )
    if measured:
        cut = overopt_curve.cut([each["curve"] for each in measured], max(each["max_new_tokens"] for each in measured))
        notes += [f"{cut[0].upper()}{cut[1:]}."] if cut else []
    return Verdict(verdict.kind, verdict.says, [*verdict.notes, *notes])


def _ending(member: Member) -> str:
    at = "" if member.record.step is None else f" at step {member.record.step}"
    states = {"failed": "failed", "interrupted": "was interrupted", "running": "is running, or was killed"}
    reason = f": {member.record.reason[:300]}" if member.record.reason else ""
    return f"Run {member.name} {states.get(member.state, 'wrote nothing')}{at}{reason}."
