"""Models against each other on the same items: what other evaluations measured, paired, with the chance of it being luck.

Two models that answer the same questions share what makes a question hard, so that the difference item by item has a
smaller error than two means apart (arXiv 2411.00640).
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from rpo import config, stats
from rpo.errors import UserError
from rpo.evals import pairing as evals_pairing
from rpo.evals import results
from rpo.evals.results import Evaluation, Results
from rpo.evals.settings import EVAL_MAY_CHANGE, Eval

# What two evaluations that are compared differ in by nature: their subject, and how much of the data they took.
_SUBJECT = (*EVAL_MAY_CHANGE, "model.path", "model.revision", "outputs", "annotations", "runs", "task.limit")
# Facts beside the settings in which they should not differ.
_ALIKE = ("data", "reference", "versions")


@dataclass(frozen=True)
class Model:
    """One model's items by id, as samples.jsonl has them; `name` tells it apart, `called` is what its folder calls it.

    `judged`: by whom (`paired.judged_by`).
    """

    name: str
    called: str
    folder: str
    items: dict[str, dict]
    judged: dict[str, Any] = field(repr=False)

    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for item in self.items.values() for name in item["scores"]))


def evaluate(cfg: Eval) -> Evaluation:
    """All pairs of models, or each against `baseline`: "A - B" -> metric -> cell; a sample has an item's differences.

        value, se, interval    of the mean difference, by cluster (`stats.clustered_mean`), in the metric's unit
        n, clusters            items with scores of both models, and clusters of them
        n_error                items that both models have, of which one failed or both
        n_first, n_second      items with a score of one model alone, without failures: they are left out
        p, p_holm              of `stats.sign_flip_test` with task.draws; adjusted for all comparisons made (`stats.holm`)
        detectable             the smallest true difference that is seen in 80% of such comparisons (two-sided 5%, by t;
                               by p, which has few values, in fewer of them where there are under 10 clusters)
        needed                 clusters that one as large as the difference seen would take; null where there is none
                               (interval, detectable and needed are null where all clusters differ alike: se 0)

    Win rates against different opponents, and scores by different judges, are not compared, which `notes` say. Of two models that were judged against each
    other, the second's win rate is 1 less the first's: what is tested is whether that is a half, on each item once.

    Raises UserError where the evaluations are not of one task, or two models have no items in common.
    """
    given = [cfg.task.results] if isinstance(cfg.task.results, str) else cfg.task.results
    found = [results.read(folder) for folder in given]
    models = _models(found)
    names = _metrics(models, cfg.task.metrics)
    cells, samples, pairs, notes = {}, [], [], _notes(found)
    for first, second in _pairs(models, cfg.baseline):
        left_out, said = _judges(first, second)
        if not left_out:
            left_out, more = _opponents(first, second)
            said += more
        notes += said
        if left_out:
            continue
        pairs.append((first, second))
        key = f"{first.name} - {second.name}"
        made = {name: _cell(first, second, name, cfg) for name in names}
        cells[key] = {name: cell for name, cell in made.items() if cell is not None}
        if not cells[key]:
            raise UserError(
                f"{first.name} ({first.folder}) and {second.name} ({second.folder}): no item has scores of both by "
                f"{', '.join(names)}; their ids are like {next(iter(first.items))} and {next(iter(second.items))}"
            )
        notes += [f"{key}: no item has scores of both by {name}" for name in names if name not in cells[key]]
        samples += [{"model": key} | sample for sample in _samples(first, second, names)]
    if not cells:
        raise UserError(f"task.results: nothing to compare: {'; '.join(notes)}")
    made = [cell for by_metric in cells.values() for cell in by_metric.values()]
    for cell, p in zip(made, stats.holm([cell["p"] for cell in made]), strict=True):
        cell["p_holm"] = p
    many = max(cell["clusters"] for cell in made) > stats.ENUMERATED
    if many and len(made) > stats.ALPHA * (1 + cfg.task.draws):
        notes.append(
            f"of {len(made)} comparisons with task.draws={cfg.task.draws} none by more than {stats.ENUMERATED} clusters can "
            f"be told from chance (Holm p at least {len(made) / (1 + cfg.task.draws):.2g}); raise task.draws, or give baseline"
        )
    facts = {
        "results": [str(each.folder) for each in found],
        "of_task": found[0].task,
        "pairs": [[first.name, second.name] for first, second in pairs],  # in the order of models
        "comparisons": len(made),
        "notes": list(dict.fromkeys(notes)),
    }
    return Evaluation(cells, samples, facts)


# ---- what is compared


def _models(found: Sequence[Results]) -> list[Model]:
    """The models of all evaluations; one that is in several is told apart by the folder. Raises UserError."""
    tasks = {each.task: each.folder for each in reversed(found)}
    if len(tasks) > 1:
        of = ", ".join(f"{folder} (task={task})" for task, folder in reversed(tasks.items()))
        raise UserError(
            f"task.results: {of}; expected evaluations by one task, for scores of different ones do not pair"
        )
    if found[0].task == "compare":
        raise UserError(f"task.results={found[0].folder}: is a comparison itself; give the evaluations it was made of")
    folders = Counter(each.folder.resolve() for each in found)
    if twice := [str(folder) for folder, count in folders.items() if count > 1]:
        raise UserError(f"task.results: {twice[0]} is given twice")
    of_name = Counter(name for each in found for name in each.models)
    ends = Counter(each.folder.resolve().name for each in found)
    models = []
    for each in found:
        end = each.folder.resolve().name
        place = end if ends[end] == 1 else str(each.folder)
        for name, cells in each.models.items():
            for cell in cells.values():
                if isinstance(cell, dict) and "unusable" in cell:
                    raise UserError(
                        f"{each.folder}: the results of {name} are unusable ({cell['unusable']}); mend them first"
                    )
            own = [sample for sample in each.samples if sample.get("model") == name]
            label = name if of_name[name] == 1 else f"{name} ({place})"
            judged = evals_pairing.judged_by(each.task, each.facts)
            models.append(Model(label, name, str(each.folder), _by_id(own, name, each), judged))
    if len(models) < 2:
        there = f"has one model, {models[0].name}" if models else "has no models"
        raise UserError(f"task.results={found[0].folder}: {there}; give another folder of the same task beside it")
    return models


def _by_id(samples: Sequence[dict], name: str, of: Results) -> dict[str, dict]:
    """The items by id. Raises UserError where one is not as `results` has it, there twice, or has a score that is no number."""
    items = {}
    for sample in samples:
        if not {"id", "cluster", "scores"} <= sample.keys():
            raise UserError(
                f"{of.folder}: samples of task={of.task} have no id, cluster and scores, so there is nothing to pair"
            )
        place = f"{of.folder}/samples.jsonl: {name}: id {sample['id']}"
        texts = (sample["id"], sample["cluster"], sample.get("against", ""), sample.get("error") or "")
        if not all(isinstance(text, str) for text in texts) or not isinstance(sample["scores"], dict):
            raise UserError(
                f"{place[:300]}: expected text in id, cluster, against, error, and numbers by name in scores"
            )
        if sample["id"] in items:
            raise UserError(f"{place} is there twice; expected each item once, to know which to pair")
        for metric, score in sample["scores"].items():
            if not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
                raise UserError(f"{place}: {metric}={score!r:.40}: expected a finite number")
        items[sample["id"]] = sample
    if not any(item["scores"] for item in items.values()):
        raise UserError(f"{of.folder}: samples.jsonl has no scores of {name}; there is nothing to pair")
    return items


def _metrics(models: Sequence[Model], wanted: str | list[str] | None) -> list[str]:
    there = list(dict.fromkeys(name for model in models for name in model.metrics()))
    wanted = [wanted] if isinstance(wanted, str) else wanted
    for name in wanted or []:
        if name not in there:
            raise UserError(f"task.metrics: no item has a score {name}; there are {', '.join(there)}")
    return wanted or there


def _pairs(models: Sequence[Model], baseline: str | None) -> list[tuple[Model, Model]]:
    if baseline is None:
        return list(combinations(models, 2))
    against = [model for model in models if model.name == baseline]
    if not against:
        raise UserError(f"baseline={baseline}: expected one of {', '.join(model.name for model in models)}")
    return [(model, against[0]) for model in models if model is not against[0]]


def _notes(found: Sequence[Results]) -> list[str]:
    """Where an evaluation was made otherwise than the first, so that a difference may not be the models'."""
    notes = []
    for other in found[1:]:
        a, b = ({name: each.facts.get(name) for name in _ALIKE} for each in (found[0], other))
        settings = (each.facts.get("config", {}) for each in (found[0], other))
        if differing := config.differences(*settings, _SUBJECT) + config.differences(a, b, ()):
            notes.append(f"{found[0].folder} and {other.folder} were not made alike: {'; '.join(differing)}")
    return notes


def _judges(first: Model, second: Model) -> tuple[bool, list[str]]:
    """(whether the two are left out, notes), of models that judges scored who are not the same, or not known to be."""
    both, apart = f"{first.name} - {second.name}", evals_pairing.judged_apart(first.judged, second.judged)
    if apart:
        return True, [f"{both}: left out: they were not judged alike: {apart}"]
    if first.folder == second.folder or not (first.judged or second.judged):
        return False, []
    unknown = [model.folder for model in (first, second) if model.judged.get("judge") is None]
    return False, [
        f"{folder}: who judged is not said there; see that it is the judge of the others" for folder in unknown
    ]


def _opponents(first: Model, second: Model) -> tuple[bool, list[str]]:
    """(whether the two are left out, notes), of models that were judged against others, or against each other."""
    against = [{item.get("against") for item in model.items.values()} for model in (first, second)]
    both = f"{first.name} - {second.name}"
    both_have = evals_pairing.shared(first.items, second.items)
    if first.folder == second.folder and first.called in against[1] and second.called in against[0]:
        if not both_have:  # one met others, too, and has its items once for each
            return True, [f"{both}: left out: they were judged against each other; their win rates say how that went"]
        return False, [f"{both}: they were judged against each other, so that win_rate is twice the first's, less 1"]
    for _, a, b in both_have:
        met = [item.get("against") for item in (a, b)]
        if met[0] != met[1]:
            return True, [f"{both}: left out: they were judged against {met[0]} and {met[1]}, not against one model"]
    return False, []


# ---- one comparison


def _cell(first: Model, second: Model, metric: str, cfg: Eval) -> dict | None:
    """The cell of one metric; None where no item has a score of both."""
    pairing = evals_pairing.pair(first.items, second.items, metric)
    if not pairing.differences_N:
        return None
    if not pairing.alike:
        raise UserError(
            f"{first.name} ({first.folder}) and {second.name} ({second.folder}): the items that belong together (cluster "
            "in samples.jsonl) are not the same ones, so neither are the questions; evaluate both on one file"
        )
    cell, num_clusters = pairing.cell(), len(set(pairing.clusters_N))
    value, se = cell["value"], cell["se"]
    told = se and abs(value) > 1e-9 * se  # sums that cancel leave a rounding
    return cell | {
        "clusters": num_clusters,
        "n_first": pairing.num_first,
        "n_second": pairing.num_second,
        "p": stats.sign_flip_test(pairing.differences_N, pairing.clusters_N, cfg.seed, cfg.task.draws),
        "detectable": stats.detectable(se, num_clusters) if se else None,
        "needed": stats.clusters_needed(value, se, num_clusters) if told else None,
    }


def _samples(first: Model, second: Model, metrics: Sequence[str]) -> list[dict]:
    """The differences of every item that both have, with the scores they are of."""
    samples = []
    for name, a, b in evals_pairing.shared(first.items, second.items):
        failed = [f"{model.name}: {item['error']}" for model, item in ((first, a), (second, b)) if item.get("error")]
        both = [metric for metric in metrics if metric in a["scores"] and metric in b["scores"]]
        samples.append(
            {
                "id": name,
                "cluster": a["cluster"],
                "scores": {metric: a["scores"][metric] - b["scores"][metric] for metric in both},
                "error": "; ".join(failed) or None,
                "first": a["scores"],
                "second": b["scores"],
            }
        )
    return samples


# ---- in words


def lines(made: Evaluation) -> str:
    """A row per comparison, metric by metric, and what each says in words."""
    short = _short([name for pair in made.facts["pairs"] for name in pair])
    columns = {
        "difference": lambda cell: _number(cell["value"]),
        "95%": lambda cell: " to ".join(map(_number, cell["interval"] or ())) or "-",
        "p": lambda cell: f"{cell['p']:.2g}",
        "Holm": lambda cell: f"{cell['p_holm']:.2g}",
        "n": lambda cell: str(cell["n"]),
        "clusters": lambda cell: str(cell["clusters"]),
        "errors": lambda cell: str(cell["n_error"]),
        "detectable": lambda cell: "-" if cell["detectable"] is None else _number(cell["detectable"]),
    }
    cells = [cell for by_metric in made.models.values() for cell in by_metric.values()]
    told = {"Holm": len(cells) > 1, "clusters": any(cell["clusters"] != cell["n"] for cell in cells)}
    told["errors"] = any(cell["n_error"] for cell in cells)
    shown = [name for name in columns if told.get(name, True)]
    table, said = [["metric", "model", "minus", *shown]], []
    for metric in dict.fromkeys(name for by_metric in made.models.values() for name in by_metric):
        for by_metric, pair in zip(made.models.values(), made.facts["pairs"], strict=True):
            if metric in by_metric:
                cell, (first, second) = by_metric[metric], (short[name] for name in pair)
                table.append([metric, first, second, *(columns[name](cell) for name in shown)])
                said.append(f"{metric}: {verdict(cell, first, second, made.facts['comparisons'])}")
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    rows = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*rows, *said])


def _number(x: float) -> str:
    return f"{x:.3g}"


def _short(names: Sequence[str]) -> dict[str, str]:
    """Each name without the folders that all begin with and all end in: runs/a/model and runs/b/model are a and b."""
    parts = {name: name.split("/") for name in names}
    for end in (0, -1):
        while len({part[end] for part in parts.values()}) == 1 and min(map(len, parts.values())) > 1:
            for part in parts.values():
                del part[end]
    return {name: "/".join(part) for name, part in parts.items()}


def verdict(cell: dict, first: str, second: str, comparisons: int) -> str:
    """One plain sentence on one comparison: by its Holm-adjusted p at 5%; which way is better is for the reader to say.

    A difference that only its own p supports is said to be one of so many comparisons; where none is seen, how large
    one would have been seen; and where so few clusters have no p below 5%, that nothing can be told.
    """
    value, (above, below) = cell["value"], (first, second) if cell["value"] > 0 else (second, first)
    ps = f"p {cell['p']:.2g}" + (f", Holm {cell['p_holm']:.2g}" if comparisons > 1 else "")
    one_sided = [(cell["n_first"], first), (cell["n_second"], second)]
    left = " and ".join(f"{count} that only {name} has" for count, name in one_sided if count)
    left = f"; left out: {left}" if left else ""
    left += f"; {cell['n_error']} failed" if cell["n_error"] else ""
    least = 2 / 2 ** cell["clusters"]
    if least > stats.ALPHA:
        return f"can not tell: of {cell['clusters']} clusters no p can be below {least:.2g}; compare on more{left}"
    flat = f"nothing varied over {cell['clusters']} clusters, so there is no interval"
    if not value and not cell["se"]:
        return f"{first} and {second} have the same mean in each cluster: {flat}, nor a smallest difference to be seen{left}"
    if cell["interval"] is None:
        size = f"{_number(abs(value))} ({flat}; {ps})"
    else:
        low, high = cell["interval"] if value > 0 else (-x for x in reversed(cell["interval"]))
        size = f"{_number(abs(value))} (95% {_number(low)} to {_number(high)}; {ps})"
    if cell["p_holm"] <= stats.ALPHA:
        return f"{above} is above {below} by {size}{left}"
    if cell["p"] <= stats.ALPHA:
        return f"{above} is above {below} by {size}, which among {comparisons} comparisons may be luck{left}"
    seen = f"{above} is above by {size}" if value else f"it is {size}"
    power = ""
    if cell["detectable"] is not None:
        power = f"; a true difference of {_number(cell['detectable'])} would be seen in 80% of such comparisons, a smaller one in fewer"
    return (
        f"no difference seen between {first} and {second}: {seen}{power}"
        + (f"; one as large as that seen needs about {cell['needed']} clusters" if cell["needed"] else "")
        + left
    )
