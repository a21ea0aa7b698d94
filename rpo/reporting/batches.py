"""Runs as a report tells of them: in groups that differ in their seeds alone, each with its verdict, beside evaluations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rpo.errors import UserError
from rpo.evals import pairing
from rpo.evals.results import Results
from rpo.overopt import curve as overopt_curve
from rpo.reporting import gather, run_verdicts
from rpo.reporting.gather import Chosen, Run, Study
from rpo.runs import groups


@dataclass(frozen=True)
class Member:
    """A run as the page knows it; `run` None: only a study's results tell of it; `studied` None: no study does."""

    name: str
    settings: dict[str, Any]
    run: Run | None
    studied: dict | None

    @property
    def state(self) -> str:
        return "evaluated" if self.run is None else self.run.state

    @property
    def done(self) -> bool:
        return self.state in ("finished", "evaluated")

    @property
    def curve(self) -> list[dict]:
        """Its evaluations: a study's, which are of more samples, before the run's own."""
        if self.studied is None:
            return self.run.curve
        return [
            {"step": p["step"]} | {_logged(k): c["value"] for k, c in p["metrics"].items()}
            for p in self.studied["curve"]
        ]

    def errors(self) -> dict[tuple[int, str], float]:
        """(step, metric) -> standard error, where a study knows it."""
        points = self.studied["curve"] if self.studied else []
        cells = {(p["step"], _logged(name)): cell.get("se") for p in points for name, cell in p["metrics"].items()}
        return {key: se for key, se in cells.items() if gather.finite(se)}


def _logged(name: str) -> str:
    return "loss/preference" if name == "nll/preference" else name  # the log's word; equal without label smoothing


@dataclass(frozen=True)
class Batch:
    """Runs that differ in their seeds alone."""

    label: str
    style: int
    members: list[Member]
    finding: run_verdicts.Finding = field(repr=False)


@dataclass(frozen=True)
class Gathered:
    """All that the page is about."""

    batches: list[Batch]
    evaluations: list[Results]
    studies: list[Study]
    choices: list[Chosen]
    notes: list[str]

    @property
    def members(self) -> list[Member]:
        return [member for batch in self.batches for member in batch.members]


def gather_all(found: gather.Found, given: Sequence[str]) -> Gathered:
    """Runs in groups with their verdicts, and evaluations by kind: those `given`, else those `found` below the runs."""
    notes, read = list(found.notes), []
    for path in given or found.evaluations:
        try:
            read.append(gather.evaluation(path))
        except UserError as error:
            if given:
                raise
            notes.append(str(error))
    kinds = {kind: [each for each in read if isinstance(each, kind)] for kind in (Results, Study, Chosen)}
    studied: dict[str, dict] = {}
    for study in kinds[Study]:
        notes += [f"{study.folder}: left out {left}" for left in study.left_out]
        for run in study.runs:
            if run["run"] in studied:
                notes.append(f"{run['run']}: evaluated twice by task=overopt; {study.folder} is not used for it")
            studied.setdefault(run["run"], run)
    notes += _apart(kinds[Results])
    batches = _batches(found.runs, studied, notes)
    if not batches and not read:
        raise UserError("nothing to report on: " + ("; ".join(notes[:3]) or "give runs=FOLDER or task.results=FOLDER"))
    return Gathered(batches, kinds[Results], kinds[Study], kinds[Chosen], notes)


def _apart(evaluations: Sequence[Results]) -> list[str]:
    """Evaluations of one task that share no item with the first, or were judged otherwise: numbers that do not compare."""
    notes: list[str] = []
    first: dict[str, tuple[Results, set[str]]] = {}
    for each in evaluations:
        ids = {str(sample["id"]) for sample in each.samples if "id" in sample}
        other, theirs = first.setdefault(each.task, (each, ids))
        if other is each or each.task == "compare":
            continue
        why = ["have no item in common"] if ids and theirs and not ids & theirs else []
        judges = pairing.judged_apart(*(pairing.judged_by(one.task, one.facts) for one in (other, each)))
        why += [f"were not judged alike ({judges})"] if judges else []
        if why:
            both = f"{other.folder} and {each.folder}, of task={each.task},"
            notes.append(f"{both} {' and '.join(why)}: do not compare their numbers")
    return notes


def _batches(runs: Sequence[Run], studied: dict[str, dict], notes: list[str]) -> list[Batch]:
    known = {str(run.folder): run for run in runs}
    folders = list(dict.fromkeys([*known, *studied]))
    names = dict(zip(folders, groups.short(folders), strict=True))
    members, apart = {}, []
    for folder in folders:
        run = known.get(folder)
        settings = run.settings if run is not None else studied[folder]["settings"]
        member = Member(names[folder], settings or {}, run, studied.get(folder))
        whole = settings is not None and _is_whole(settings)
        if settings is not None and not whole:
            notes.append(f"{folder}: its settings are not those of this version's runs; shown by itself")
        members[folder] = member
        apart += [] if whole else [folder]
    same: dict[tuple, list[str]] = {}
    for folder in folders:
        if folder not in apart:
            own, seeds = groups.identity(members[folder].settings)
            same.setdefault((repr(sorted(own.items())), seeds), []).append(folder)
    asked = [{"run": each[0], "settings": members[each[0]].settings} for each in same.values() if len(each) == 1]
    found = [(g.label, [members[run["run"]] for run in g.runs]) for g in groups.group(asked)]
    for twice in [each for each in same.values() if len(each) > 1]:  # a copy, or made again: no second seed
        notes.append(f"{', '.join(twice)}: the same settings and seeds; here each of them stands by itself")
        found += [(f"{groups.name(members[f].settings['loss'])} ({names[f]})", [members[f]]) for f in twice]
    found += [(" ".join(overrides(members[folder])) or names[folder], [members[folder]]) for folder in apart]
    return [Batch(label, i, batch, _finding(batch)) for i, (label, batch) in enumerate(found)]


def _is_whole(settings: dict) -> bool:
    """Whether the settings are those of this project's runs, as far as groups and their labels go by them."""
    seeds = [groups.flat(settings).get(key) for key in groups.SEEDS]
    try:
        name = groups.name(settings["loss"])
    except (KeyError, TypeError, ValueError):
        return False
    return "nan" not in name and all(seed is None or gather.finite(seed) for seed in seeds)


def overrides(member: Member) -> list[str]:
    return [f"{key}={value}" for key, value in (member.run.overrides if member.run else {}).items()]


def _finding(members: Sequence[Member]) -> run_verdicts.Finding:
    """The verdict on what finished; where nothing did, on what there is. Runs that did not are named in its notes."""
    odd = [member for member in members if not member.done]
    judged = [member for member in members if member not in odd] or [m for m in odd if m.state != "failed" and m.curve]
    notes = [_how_ended(member) for member in odd]
    notes += [f"Run {member.name}: {flaw}" for member in members if member.run for flaw in member.run.flaws]
    if not judged:
        return run_verdicts.Finding("no run finished", f"None of {len(members)} left an evaluation to judge.", notes)
    if judged[0] in odd:
        notes.append("None finished: judged as far as they are.")
    studied = [member.studied for member in judged if member.studied]
    if 0 < len(studied) < len(judged):
        notes.append(f"task=overopt measured {len(studied)} of {len(judged)}; the verdict is on these.")
        judged = [member for member in judged if member.studied]
    loss, run = judged[0].settings.get("loss", {}), judged[0].run
    found = run_verdicts.judge(
        [member.curve for member in judged],
        [each["summary"] for each in studied],
        pairs=run.pairs if run else None,
        sigmoid=loss.get("preference") == "sigmoid",
    )
    if studied:
        cut = overopt_curve.cut([each["curve"] for each in studied], max(each["max_new_tokens"] for each in studied))
        notes += [f"{cut[0].upper()}{cut[1:]}."] if cut else []
    return run_verdicts.Finding(found.kind, found.says, [*found.notes, *notes])


def _how_ended(member: Member) -> str:
    at = "" if member.run.step is None else f" at step {member.run.step}"
    how = {"failed": "failed", "interrupted": "was interrupted", "running": "is running, or was killed"}
    reason = f": {member.run.reason[:300]}" if member.run.reason else ""
    return f"Run {member.name} {how.get(member.state, 'never began to write')}{at}{reason}."
