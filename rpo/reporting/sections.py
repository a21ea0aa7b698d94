"""The blocks of a report's page, in the order in which it is read: verdicts, runs, figures, evaluations, answers, provenance."""

import datetime
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rpo.evals import pairing
from rpo.evals.results import Results
from rpo.reporting import eval_verdicts, figures, gather, run_verdicts, side_by_side
from rpo.reporting.batches import Batch, Gathered, Member, overrides
from rpo.reporting.page import Block, Code, Figure, Fold, Heading, Page, Points, Prose, Section, Table, Verdict
from rpo.reporting.svg import Forest, number
from rpo.runs import groups
from rpo.tasks import compare

_COLUMNS = 6  # of swept settings
_ROWS = 24  # of an evaluation's table; the rest is folded
_LINES = 10  # of a list of sentences
NOTES = 4  # more are one line that opens


def layout(gathered: Gathered, title: str, of: Sequence[str], most: int, environment: dict) -> Page:
    """The page; `environment` is this report's own."""
    num = len(gathered.evaluations) + len(gathered.studies) + len(gathered.choices)
    counted = [_count(n, what) for n, what in ((len(gathered.members), "run"), (num, "evaluation")) if n]
    facts = [
        f"{datetime.datetime.now():%Y-%m-%d %H:%M}, code {_revision(environment)}",
        f"On {' and '.join(counted)}: {', '.join(of)}",
    ]
    parts = [_verdicts(gathered), _runs(gathered.batches), _figures(gathered.batches), _evaluated(gathered)]
    parts += [_worst(gathered, most), _provenance(gathered)]
    return Page(title, facts, [block for part in parts for block in part])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _revision(environment: dict) -> str:
    revision = str(environment.get("git_revision") or "of no known revision")[:12]
    return revision + (" with uncommitted changes" if environment.get("git_dirty") else "")


def _verdicts(gathered: Gathered) -> list[Block]:
    blocks: list[Block] = [Heading("Verdict")]
    kinds = Counter(batch.finding.kind for batch in gathered.batches)
    if kinds:
        told = "; ".join(f"{kind}: {count}" for kind, count in kinds.items())
        of = f"{_count(len(gathered.members), 'run')} in {_count(len(gathered.batches), 'group')} that differ in more than their seeds"
        blocks.append(Prose(f"{of}. {told[0].upper()}{told[1:]}."))
    for batch in gathered.batches:
        found = batch.finding
        says = _typeset(run_verdicts.beside(found.kind, found.says))
        blocks.append(Verdict(_subject(batch), found.kind, found.tone, says, found.notes, batch.style))
    over_seeds = [_typeset(line) for line in eval_verdicts.over_seeds(gathered.batches)]
    compared = [sentence for each in gathered.evaluations if each.task == "compare" for sentence in differences(each)]
    told = [
        f"{each.task}, {each.folder.name}: {_typeset(line)}"
        for each in gathered.evaluations
        for line in eval_verdicts.of_evaluation(each)
    ]
    for title, lines in {
        "Groups on the same seeds": over_seeds,
        "Differences between models": compared,
        "Evaluations in a sentence": told,
    }.items():
        if lines:
            blocks += [Heading(title, 3), Points(lines[:_LINES])]
            more = lines[_LINES:]
            blocks += [Fold(f"{len(more)} more", [Points(more)])] if more else []
    if bad := [line for each in gathered.evaluations for line in _unusable(each)]:
        blocks += [Heading("Unusable", 3), Points(bad)]
    if gathered.notes:
        notes = Points(gathered.notes)
        many = len(gathered.notes) > NOTES
        blocks += [] if many else [Heading("Left out, or to be read with care", 3), notes]
        blocks += [Fold(f"Left out, or to be read with care: {len(gathered.notes)} notes", [notes])] if many else []
    rules = [*(run_verdicts.RULES if kinds else ()), *(eval_verdicts.RULES if told or over_seeds else ())]
    return [*blocks, Fold("How the verdicts are made", [Points(rules)])] if rules else blocks


def _typeset(says: str) -> str:
    return says.replace(" +- ", " \u00b1 ").replace(" -", " \u2212")


def _subject(batch: Batch) -> str:
    if len(batch.members) > 1:
        return f"{batch.label} ({len(batch.members)} seeds)"
    name = batch.members[0].name
    return batch.label if name in batch.label else f"{batch.label} (run {name})"


def differences(found: Results) -> list[str]:
    """What task=compare says, in its own words; adjusted p smallest first."""
    said = []
    for (first, second), metrics in zip(_compared(found), found.models.values(), strict=True):
        for name, cell in metrics.items():
            try:
                text = compare.verdict(cell, first, second, int(found.facts.get("comparisons") or 1))
                said.append((float(cell["p_holm"]), f"{name}: {text}."))
            except (KeyError, TypeError, ValueError):  # made by another version: its table stands below all the same
                continue
    return [text for _, text in sorted(said)]


def _compared(found: Results) -> list[list[str]]:
    """The two models of each comparison, without the folders that all share."""
    pairs = found.facts.get("pairs")
    whole = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    if not whole or len(pairs) != len(found.models):
        pairs = [(f"{name}, the first", "the second") for name in found.models]
    names = list(dict.fromkeys(str(name) for pair in pairs for name in pair))
    name_of = dict(zip(names, groups.short(names), strict=True))
    return [[name_of[str(name)] for name in pair] for pair in pairs]


def _unusable(found: Results) -> list[str]:
    why = {
        model: next((c["unusable"] for c in cells.values() if "unusable" in c), None)
        for model, cells in found.models.items()
    }
    return [f"{model} by task={found.task} ({found.folder}): {reason}" for model, reason in why.items() if reason]


# ---- runs


def _swept(members: Sequence[Member]) -> list[str]:
    """The keys that differ and mean something: not where a run lies or how it was carried out, nor what its label says."""
    keys = groups.differing([member.settings for member in members if member.settings])
    ignored = [key for key in groups.IGNORED if key not in groups.SEEDS] + ["loss.preference", "loss.sft"]
    kept = [key for key in keys if not any(key == no or key.startswith(f"{no}.") for no in ignored)]
    flats = [groups.flat(member.settings) for member in members if member.settings]
    if all(flat.get("data.gold.seed") == flat.get("seed") for flat in flats):
        kept = [key for key in kept if key != "data.gold.seed"]
    return kept


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


def _runs(batches: Sequence[Batch]) -> list[Block]:
    members = [member for batch in batches for member in batch.members]
    if not members:
        return []
    swept = _swept(members)
    names = [name for name in figures.SHOWN if any(name in m.curve[-1] for m in members if m.curve)]
    rows: list[list[str] | Section] = []
    for batch in batches:
        rows.append(Section(batch.label, batch.style))
        rows += [_run_row(member, swept[:_COLUMNS], names) for member in batch.members]
        ends = [member.curve[-1] for member in batch.members if member.curve and member.done]
        if len(ends) > 1:
            rows.append(["mean \u00b1 sd", *[""] * (len(swept[:_COLUMNS]) + 2), *(_spread(ends, n) for n in names)])
    more = f" Settings that differ besides: {', '.join(swept[_COLUMNS:])}." if swept[_COLUMNS:] else ""
    note = (
        "The last evaluation of each run. \u00b1 is one standard error, by prompt, where task=overopt measured it; a bare number is "
        f"the run's own, whose error is not known; in rows of means it is the standard deviation over seeds.{more}"
    )
    head = ["run", *swept[:_COLUMNS], "state", "step", *names]
    return [Heading("Runs"), Table("Runs by settings, seeds below one another", head, rows, note)]


def _run_row(member: Member, swept: Sequence[str], names: Sequence[str]) -> list[str]:
    settings, end, errors = groups.flat(member.settings), member.curve[-1] if member.curve else {}, member.errors()
    if not settings:
        settings = dict(override.split("=", 1) for override in overrides(member))
    step = member.run.step if member.run and member.run.step is not None else end.get("step")
    cells = [_pm(end[n], errors.get((end["step"], n))) if n in end else "-" for n in names]
    return [member.name, *(_value(settings.get(key)) for key in swept), member.state, _value(step), *cells]


def _pm(value: float, error: float | None) -> str:
    """As many decimals as the error's two digits have."""
    if not error:
        return number(value)
    decimals = min(max(0, 1 - math.floor(math.log10(abs(error)))), 12)
    return f"{value:.{decimals}f} \u00b1\u00a0{error:.{decimals}f}".replace("-", "\u2212")


def _spread(ends: Sequence[dict], name: str) -> str:
    found = groups.interval([end[name] for end in ends if name in end])
    return "-" if found["mean"] is None else _pm(found["mean"], found["sd"])


def _figures(batches: Sequence[Batch]) -> list[Block]:
    swept = _swept([member for batch in batches for member in batch.members])
    curves = []
    for batch in batches:
        ran = [member for member in batch.members if member.curve]
        ran = [member for member in ran if member.done] or ran
        settings = groups.flat(batch.members[0].settings)
        values = {key: settings[key] for key in swept if key in settings and key not in groups.SEEDS}
        values = {key: value if isinstance(value, int | float) else str(value) for key, value in values.items()}
        errors = ran[0].errors() if len(ran) == 1 else {}
        form = f"{settings.get('loss.preference')} {settings.get('loss.sft')}"
        seeds = [member.curve for member in ran]
        curves.append(figures.Curves(batch.label, batch.style, seeds, errors, values, form))
    numeric = [
        key
        for key in dict.fromkeys(key for each in curves for key in each.swept)
        if all(gather.finite(each.swept[key]) for each in curves if key in each.swept)
    ]
    drawn = [
        *figures.along(curves),
        *figures.against_distance(curves),
        *figures.against_swept(curves, numeric),
    ]
    return [Heading("Figures"), *drawn] if drawn else []


# ---- evaluations


def _evaluated(gathered: Gathered) -> list[Block]:
    blocks: list[Block] = []
    for i, each in enumerate(gathered.evaluations):
        blocks.append(Heading(f"{each.task}: {each.folder.name}", 3))
        said = eval_verdicts.context(each)
        blocks += [Points(said)] if said else []
        blocks += _comparisons(each, i) if each.task == "compare" else _table(each)
    for choice in gathered.choices:
        rows = [[run, label, _value(step), reason] for run, label, step, reason in choice.rows]
        blocks += [
            Heading(f"select: {choice.folder.name}", 3),
            Table("Checkpoints", ["run", "group", "step", "why"], rows),
        ]
    return [Heading("Evaluations"), *blocks] if blocks else []


def _cells(cell: dict) -> list[str]:
    if "unusable" in cell:
        return ["unusable", "-", _value(cell["n"]), _value(cell["n_error"])]
    value = "-" if cell["value"] is None else _pm(cell["value"], cell["se"])
    low_high = cell["interval"] and [_pm(bound, cell["se"]).split()[0] for bound in cell["interval"]]
    interval = f"[{', '.join(low_high)}]" if low_high else "-"
    return [value, interval, _value(cell["n"]), _value(cell["n_error"])]


def _table(found: Results) -> list[Block]:
    """A row per metric and model, metrics together; what is past _ROWS is folded."""
    models = dict(zip(found.models, groups.short(list(found.models)), strict=True))
    names = list(dict.fromkeys(name for cells in found.models.values() for name in cells))
    rows = [
        [name, models[m], *_cells(found.models[m][name])] for name in names for m in models if name in found.models[m]
    ]
    head = ["metric", "model", "value \u00b1 se", "95% interval", "n", "errors"]
    caption = f"{found.task}, {found.folder}"
    blocks: list[Block] = [Table(caption, head, rows[:_ROWS])] if rows else [Prose("It has no metrics.")]
    if rows[_ROWS:]:
        blocks.append(Fold(f"{len(rows) - _ROWS} more rows", [Table(f"{caption}, continued", head, rows[_ROWS:])]))
    notes = [
        f"{models[m]}: {name}: {cell['note']}."
        for m, cells in found.models.items()
        for name, cell in cells.items()
        if cell.get("note")
    ]
    return [*blocks, Points(notes)] if notes else blocks


def _comparisons(found: Results, i: int) -> list[Block]:
    """A forest per metric, and the table of all."""
    pairs = [" \u2212 ".join(pair) for pair in _compared(found)]
    forests, rows = {}, []
    for pair, metrics in zip(pairs, found.models.values(), strict=True):
        for name, cell in metrics.items():
            value, interval, *counts = _cells(cell)
            ps = [f"{cell[key]:.2g}" if gather.finite(cell.get(key)) else "-" for key in ("p", "p_holm", "detectable")]
            rows.append([name, pair, value, interval, *ps, *counts])
            if cell["value"] is not None and cell["interval"]:
                said = f"{number(cell['value'])} {interval}"
                forests.setdefault(name, []).append((pair, cell["value"], *cell["interval"], said))
    charts = [
        Forest(name, "paired difference, first minus second, 95% interval", lines) for name, lines in forests.items()
    ]
    head = [
        "metric",
        "first \u2212 second",
        "difference \u00b1 se",
        "95% interval",
        "p",
        "Holm p",
        "detectable",
        "n",
        "errors",
    ]
    note = "detectable: the smallest true difference that is seen in 80% of such comparisons."
    blocks: list[Block] = []
    if charts:
        caption = "Paired differences by item with 95% intervals; an interval on both sides of the dotted line tells no difference."
        blocks.append(Figure(f"differences_{i + 1}", caption, charts[:6]))
    return [*blocks, Table(f"compare, {found.folder}", head, rows, note)]


def _worst(gathered: Gathered, most: int) -> list[Block]:
    shown: list[list[Block]] = []
    sources = [each for each in gathered.evaluations if each.task != "compare" and not _unusable(each)]
    for task in dict.fromkeys(each.task for each in sources):
        models = [(m, each) for each in sources if each.task == task for m in each.models]
        twice = Counter(model for model, _ in models)
        name_of = dict(zip(twice, groups.short(list(twice)), strict=True))
        labels = [name_of[model] + (f" ({each.folder})" if twice[model] > 1 else "") for model, each in models]
        items = {label: side_by_side.items_of(each.samples, m) for label, (m, each) in zip(labels, models, strict=True)}
        judged = {label: pairing.judged_by(task, each.facts) for label, (_, each) in zip(labels, models, strict=True)}
        whose = {label: (m, each.folder) for label, (m, each) in zip(labels, models, strict=True)}
        config = [
            each.facts["config"] for each in sources if each.task == task and isinstance(each.facts.get("config"), dict)
        ]
        named = [i for i, (model, *_) in enumerate(models) if any(model == c.get("baseline") for c in config)]
        base = list(items)[named[0] if named else 0] if items else None
        for other in items:
            if other != base and not pairing.judged_apart(judged[base], judged[other]):
                duel = (whose[base][0], whose[other][0]) if whose[base][1] == whose[other][1] else None
                met = side_by_side.alike(items[base], items[other], duel)
                shown.append(side_by_side.compared(base, items[base], other, met, most))
    for study in gathered.studies:
        for batch in gathered.batches:
            runs = [run["run"] for run in study.runs if any(run is member.studied for member in batch.members)]
            before, after = side_by_side.study_items(study.samples, runs)
            shown.append(side_by_side.compared("the start", before, f"{batch.label}, last checkpoint", after, most))
    shown = [blocks for blocks in shown if blocks]
    return [Heading("Where it got worse"), *side_by_side.folded(shown)] if shown else []


# ---- provenance


def _provenance(gathered: Gathered) -> list[Block]:
    members = gathered.members
    blocks: list[Block] = [Heading("Provenance")]
    settings = {m.name: groups.flat(m.settings) for m in members if m.settings}
    rows = []
    for key in groups.differing([m.settings for m in members if m.settings]):
        having: dict[str, list[str]] = {}
        for name, flat in settings.items():
            having.setdefault(_value(flat.get(key)), []).append(name)
        told = [f"{value} ({_few(names)})" for value, names in having.items()]
        rows.append([key, "; ".join(told[:8]) + (f"; {len(told) - 8} more" if len(told) > 8 else "")])
    if rows:
        blocks.append(Fold("Settings that differ between runs", [Table("Settings", ["key", "value (runs)"], rows)]))
    environments = [("run", m.run.environment) for m in members if m.run and m.run.environment]
    folders = [each.folder for each in (*gathered.evaluations, *gathered.studies, *gathered.choices)]
    environments += [("evaluation", found) for folder in folders if (found := gather.environment(folder))]
    kinds = [
        ("code", _revision),
        ("device", lambda e: str(e.get("device"))),
        ("python", lambda e: str(e.get("python"))),
    ]
    packages = dict.fromkeys(p for _, e in environments if isinstance(e.get("versions"), dict) for p in e["versions"])
    kinds += [(name, lambda e, name=name: str((e.get("versions") or {}).get(name))) for name in packages]
    rows = []
    for what, read in kinds:
        counts = Counter(read(environment) for _, environment in environments)
        told = [
            value if len(counts) == 1 else f"{value} ({count} of {len(environments)})"
            for value, count in counts.items()
        ]
        rows += [[what, "; ".join(told)]] if told else []
    if rows:
        blocks.append(Table("What runs and evaluations were made with", ["what", "version"], rows))
    read = {"data.train": {}, "data.eval": {}, "model.path": {}}
    for flat in settings.values():
        for key, values in read.items():
            values[_value(flat.get(key))] = None
    rows = [[key, "; ".join(values)] for key, values in read.items() if values]
    blocks += [Table("What runs read", ["setting", "value"], rows)] if rows else []
    commands = dict.fromkeys(
        shlex.join(map(str, e["command"])) for _, e in environments if isinstance(e.get("command"), list)
    )
    if commands:
        blocks.append(Fold(f"Commands ({len(commands)})", [Code(command) for command in commands]))
    return blocks if len(blocks) > 1 else []


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
