"""Models against each other on the same items: what other evaluations measured, paired, with the chance of it being luck.

Two models that answer the same questions share what makes a question hard, so that the difference item by item has a
smaller error than two means apart (arXiv 2411.00640).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Literal

from rpo import config, stats, text
from rpo.errors import UserError, require
from rpo.evals import pairing, results
from rpo.evals.context import Context
from rpo.evals.results import Evaluation, Item, Results
from rpo.evals.settings import Eval, Listed, check_subjects, listed
from rpo.fields import Field, group
from rpo.runs import groups

# What two evaluations that are compared differ in by nature: their subject, and how much of the data they took.
_SUBJECT = {"model.path", "model.revision", "outputs", "annotations", "runs", "task.limit"} | config.may_change(Eval)
# Details beside the settings in which they should not differ.
_ALIKE = ("data", "reference")


@group
class Settings:
    kind: Literal["compare"]
    results: Listed | None
    metrics: Listed | None
    draws: Annotated[int, Field(ge=1000, description="at least 1000")]


def check(cfg: Eval) -> None:
    require(cfg.task.results is not None, "task.results=null: give the folders of evaluations by one task")
    check_subjects(cfg, "baseline")


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """All pairs of models, or each against `baseline`: "A - B" -> metric -> cell; an item has an item's differences.

        value, se, interval    of the mean difference, by cluster (`stats.clustered_mean`), in the metric's unit
        n, clusters            items with scores of both models, and clusters of them
        n_error                items that both models have, of which one failed or both
        n_first, n_second      items with a score of one model alone, without failures: they are left out
        p, p_holm              of `stats.sign_flip_test` with task.draws; adjusted for all comparisons made (`stats.holm`)
        detectable             the smallest true difference that is seen in 80% of such comparisons (two-sided 5%, by t;
                               by p, which has few values, in fewer of them where there are under 10 clusters)
        needed                 clusters that one as large as the difference seen would take; null where there is none
                               (interval, detectable and needed are null where all clusters differ alike: se 0)

    Win rates against different opponents, or other answers of one, and scores by different judges, are not compared,
    which `notes` say. Of two models that were judged against each other, the second's win rate is 1 less the first's: what is
    tested is whether that is a half, on each item once.

    Raises UserError where the evaluations are not of one task, or of data whose rows are others now, or two models have
    no items in common.
    """
    evaluations = [results.read(folder) for folder in listed(cfg.task.results)]
    models = _models(evaluations)
    _check_data(evaluations)
    metrics = _metrics(models, listed(cfg.task.metrics))
    cells, items, pairs, notes = {}, [], [], _notes(evaluations)
    for first, second in _pairs(models, cfg.baseline):
        key = f"{first.name} - {second.name}"
        if reason := _why_left_out(first, second):
            notes.append(f"{key}: left out: {reason}")
            continue
        notes += _doubts(first, second)
        pairs.append((first, second))
        paired = {metric: _cell(first, second, metric, cfg) for metric in metrics}
        cells[key] = {metric: cell for metric, cell in paired.items() if cell is not None}
        if not cells[key]:
            raise UserError(
                f"{first.name} ({first.folder}) and {second.name} ({second.folder}): no item has scores of both by "
                f"{', '.join(metrics)}; their ids are like {next(iter(first.items))} and {next(iter(second.items))}"
            )
        notes += [f"{key}: no item has scores of both by {metric}" for metric in metrics if metric not in cells[key]]
        items += _items(key, first, second, metrics)
    if not cells:
        raise UserError(f"task.results: nothing to compare: {'; '.join(notes)}")
    every = [cell for by_metric in cells.values() for cell in by_metric.values()]
    for cell, p in zip(every, stats.holm([cell["p"] for cell in every]), strict=True):
        cell["p_holm"] = p
    many = max(cell["clusters"] for cell in every) > stats.ENUMERATED
    if many and len(every) > stats.ALPHA * (1 + cfg.task.draws):
        notes.append(
            f"of {len(every)} comparisons with task.draws={cfg.task.draws} none by more than {stats.ENUMERATED} clusters can "
            f"be detected above chance (Holm p at least {len(every) / (1 + cfg.task.draws):.2g}); raise task.draws, or give baseline"
        )
    details = {
        "results": [str(each.folder) for each in evaluations],
        "of_task": evaluations[0].task,
        "pairs": [[first.name, second.name] for first, second in pairs],  # in the order of models
        "comparisons": len(every),
    }
    return Evaluation(cells, items, list(dict.fromkeys(notes)), details)


def table(evaluation: Evaluation) -> str:
    """A row per comparison, metric by metric, and what each says in words."""
    pairs, number = evaluation.details["pairs"], pairing.number
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    short = dict(zip(names, groups.short(names), strict=True))
    columns = {
        "difference": lambda cell: number(cell["value"]),
        "95%": lambda cell: " to ".join(map(number, cell["interval"] or ())) or "-",
        "p": lambda cell: f"{cell['p']:.2g}",
        "Holm": lambda cell: f"{cell['p_holm']:.2g}",
        "n": lambda cell: str(cell["n"]),
        "clusters": lambda cell: str(cell["clusters"]),
        "errors": lambda cell: str(cell["n_error"]),
        "detectable": lambda cell: "-" if cell["detectable"] is None else number(cell["detectable"]),
    }
    cells = [cell for by_metric in evaluation.models.values() for cell in by_metric.values()]
    needed = {"Holm": len(cells) > 1, "clusters": any(cell["clusters"] != cell["n"] for cell in cells)}
    needed["errors"] = any(cell["n_error"] for cell in cells)
    shown = [name for name in columns if needed.get(name, True)]
    lines, sentences = [["metric", "model", "minus", *shown]], []
    for metric in dict.fromkeys(name for by_metric in evaluation.models.values() for name in by_metric):
        for by_metric, pair in zip(evaluation.models.values(), pairs, strict=True):
            if metric in by_metric:
                cell, (first, second) = by_metric[metric], (short[name] for name in pair)
                lines.append([metric, first, second, *(columns[name](cell) for name in shown)])
                sentences.append(f"{metric}: {pairing.verdict(cell, first, second, evaluation.details['comparisons'])}")
    return "\n".join([text.table(lines), *sentences])


# ---- what is compared


@dataclass(frozen=True)
class Model:
    """One model's items by id, as samples.jsonl has them; `name` tells it apart, `called` is what its folder calls it.

    `judged`: by whom (`pairing.judged_by`).
    """

    name: str
    called: str
    folder: str
    items: dict[str, Item]
    judged: dict[str, str | None]


def _models(evaluations: Sequence[Results]) -> list[Model]:
    """The models of all evaluations; the name of one that is in several has the folder. Raises UserError."""
    tasks = {each.task: each.folder for each in reversed(evaluations)}
    if len(tasks) > 1:
        of = ", ".join(f"{folder} (task={task})" for task, folder in reversed(tasks.items()))
        raise UserError(f"task.results: {of}; expected evaluations by one task: scores of different ones do not pair")
    if evaluations[0].task == "compare":
        raise UserError(f"task.results={evaluations[0].folder}: is a comparison; give the evaluations it is of")
    if evaluations[0].config.get("runs") is not None:
        raise UserError(f"task.results={evaluations[0].folder}: evaluates runs, not models; give evaluations of models")
    folders = [each.folder.resolve() for each in evaluations]
    if twice := [str(folder) for folder in folders if folders.count(folder) > 1]:
        raise UserError(f"task.results: {twice[0]} is given twice")
    names = [name for each in evaluations for name in each.models]
    ends = [folder.name for folder in folders]
    models = []
    for each, end in zip(evaluations, ends, strict=True):
        place = end if ends.count(end) == 1 else str(each.folder)
        for name, cells in each.models.items():
            for cell in cells.values():
                if "unusable" in cell:
                    raise UserError(f"{each.folder}: {name} is unusable ({cell['unusable']}); fix that first")
            items = _by_id([item for item in each.items if item.model == name], name, each)
            label = name if names.count(name) == 1 else f"{name} ({place})"
            models.append(Model(label, name, str(each.folder), items, pairing.judged_by(each)))
    if len(models) < 2:
        there = f"has one model, {models[0].name}" if models else "has no models"
        raise UserError(f"task.results={evaluations[0].folder}: {there}; give another folder of the same task")
    return models


def _by_id(own: Sequence[Item], name: str, of: Results) -> dict[str, Item]:
    """The items by id. Raises UserError where no score is there, an item is twice, or has a score that is no number."""
    items = {}
    for item in own:
        place = f"{of.folder}/samples.jsonl: {name}: id {item.id}"[:300]
        if item.id in items:
            raise UserError(f"{place} is there twice; expected each item once, to know which to pair")
        for metric, score in item.scores.items():
            if not math.isfinite(score):
                raise UserError(f"{place}: {metric}={score}: expected a finite number")
        items[item.id] = item
    if not any(item.scores for item in items.values()):
        raise UserError(f"{of.folder}: samples.jsonl has no scores of {name}; there is nothing to pair")
    return items


def _metrics(models: Sequence[Model], wanted: Sequence[str]) -> list[str]:
    there = list(dict.fromkeys(name for model in models for item in model.items.values() for name in item.scores))
    for name in wanted:
        if name not in there:
            raise UserError(f"task.metrics: no item has a score {name}; there are {', '.join(there)}")
    return list(wanted) or there


def _pairs(models: Sequence[Model], baseline: str | None) -> list[tuple[Model, Model]]:
    if baseline is None:
        return list(combinations(models, 2))
    against = [model for model in models if model.name == baseline]
    if not against:
        raise UserError(f"baseline={baseline}: expected one of {', '.join(model.name for model in models)}")
    return [(model, against[0]) for model in models if model is not against[0]]


def _notes(evaluations: Sequence[Results]) -> list[str]:
    """Where an evaluation was made otherwise than the first, so that a difference may not be the models'."""
    notes = []
    for other in evaluations[1:]:
        a, b = (
            {name: each.details.get(name) for name in _ALIKE} | {"versions": each.versions}
            for each in (evaluations[0], other)
        )
        if differing := config.differences(evaluations[0].config, other.config, _SUBJECT) + config.differences(a, b):
            notes.append(f"{evaluations[0].folder} and {other.folder} were not made alike: {'; '.join(differing)}")
    return notes


def _check_data(evaluations: Sequence[Results]) -> None:
    """Raises UserError where an id is another row in another evaluation."""
    for one, other in combinations(evaluations, 2):
        if pairing.data_apart(one, other):
            raise UserError(
                f"task.results: {one.folder} and {other.folder}: the data had another content (prompts in samples.jsonl, "
                "details.data.digest in results.json), so that an id names other rows; evaluate both on one"
            )


def _each_other(first: Model, second: Model) -> bool:
    """Whether the two were judged against each other."""
    met = [{item.opponent for item in model.items.values()} for model in (first, second)]
    return first.folder == second.folder and first.called in met[1] and second.called in met[0]


def _why_left_out(first: Model, second: Model) -> str | None:
    """Why two models' scores are not comparable: other judges, or other opponents or answers of theirs; None where they are."""
    if apart := pairing.judged_apart(first.judged, second.judged):
        return f"they were not judged alike: {apart}"
    shared = pairing.shared(first.items, second.items)
    if _each_other(first, second):  # one that met others, too, has its items once for each
        return None if shared else "they were judged against each other; their win rates say how that went"
    for a, b in shared:
        if a.opponent != b.opponent:
            return f"they were judged against {a.opponent} and {b.opponent}, not against one model"
    if others := sum(not pairing.met_alike(a, b) for a, b in shared):
        met = shared[0][0].opponent
        return (
            f"{met} gave other answers on {others} of {len(shared)} items; judge both against the same ones (outputs=)"
        )
    return None


def _doubts(first: Model, second: Model) -> list[str]:
    """What a reader has to know of two models that are compared."""
    if _each_other(first, second):
        both = f"{first.name} - {second.name}"
        return [f"{both}: they were judged against each other, so that win_rate is twice the first's, less 1"]
    if first.folder == second.folder or not (first.judged or second.judged):
        return []
    unknown = [model.folder for model in (first, second) if model.judged.get("judge") is None]
    return [f"{folder}: who judged is not said there; see that it is the judge of the others" for folder in unknown]


# ---- one comparison


def _cell(first: Model, second: Model, metric: str, cfg: Eval) -> dict | None:
    """The cell of one metric; None where no item has a score of both."""
    paired = pairing.pair(first.items, second.items, metric)
    if not paired.differences_N:
        return None
    if not paired.alike:
        raise UserError(
            f"{first.name} ({first.folder}) and {second.name} ({second.folder}): the items that belong together (cluster "
            "in samples.jsonl) are not the same ones, so neither are the questions; evaluate both on one file"
        )
    cell, num_clusters = paired.cell(), len(set(paired.clusters_N))
    value, se = cell["value"], cell["se"]
    is_seen = se and abs(value) > 1e-9 * se  # sums that cancel leave a rounding
    return cell | {
        "clusters": num_clusters,
        "n_first": paired.num_first,
        "n_second": paired.num_second,
        "p": stats.sign_flip_test(paired.differences_N, paired.clusters_N, cfg.seed, cfg.task.draws),
        "detectable": stats.detectable(se, num_clusters) if se else None,
        "needed": stats.clusters_needed(value, se, num_clusters) if is_seen else None,
    }


def _items(key: str, first: Model, second: Model, metrics: Sequence[str]) -> list[Item]:
    """The differences of every item that both have, with the scores they are of."""
    items = []
    for a, b in pairing.shared(first.items, second.items):
        failed = [f"{model.name}: {item.error}" for model, item in ((first, a), (second, b)) if item.error]
        both = [metric for metric in metrics if metric in a.scores and metric in b.scores]
        items.append(
            Item(
                model=key,
                id=a.id,
                cluster=a.cluster,
                prompt=a.prompt,
                scores={metric: a.scores[metric] - b.scores[metric] for metric in both},
                error="; ".join(failed) or None,
                details={"first": a.scores, "second": b.scores},
            )
        )
    return items
