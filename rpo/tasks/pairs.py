"""Held-out pairs: accuracy, margins, shifts in nats, displacement, NLL and calibration of each model against a reference."""

import hashlib
from typing import TYPE_CHECKING, Annotated, Literal

from rpo.config import WITHOUT_REFERENCE
from rpo.errors import UserError
from rpo.evals import preference
from rpo.evals.context import Context
from rpo.evals.results import Evaluation, Item
from rpo.evals.settings import Eval, Limit, check_subjects
from rpo.fields import Field, Positive, group
from rpo.files import short_hash
from rpo.runs.earlier import completed_loss

if TYPE_CHECKING:
    import numpy as np

    from rpo.data.dataset import Rows


@group
class Settings:
    kind: Literal["pairs"]
    beta: Literal["auto"] | Annotated[Positive, Field(description="auto or > 0")]
    limit: Limit


def check(cfg: Eval) -> None:
    check_subjects(cfg, "model.path", "reference.path")


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """The metrics of `preference.statistics`, and an item per pair."""
    reference, data = ctx.reference_path, ctx.data_facts
    betas = {path: _beta(cfg, run, path) for path, run in zip(ctx.paths, ctx.runs, strict=True)}
    rows, digest = ctx.pairs(cfg.task.limit)
    budget = cfg.tokens_per_microbatch
    of_reference = _scored(cfg, ctx, rows, digest, reference, "reference")
    models, items, floors = {}, [], {}
    for path in ctx.paths:
        logps = _scored(cfg, ctx, rows, digest, path, "model")
        logps |= {f"ref_{side}": values for side, values in of_reference.items()}
        floors[path] = ctx.store("points").once(
            _key(cfg, ctx, rows, digest, path, "noise_floor"),
            lambda path=path: preference.noise_floor(
                ctx.model(path), rows, ctx.device, positions=ctx.positions, tokens_per_microbatch=budget
            ),
        )
        models[path] = preference.statistics(logps, rows, beta=betas[path], noise_floor=floors[path], seed=cfg.seed)
        items += _items(path, rows, logps, betas[path])
    details = {"reference": reference, "data": data, "beta": betas, "noise_floor": floors}
    return Evaluation(models, items, details=details)


def _beta(cfg: Eval, run: dict | None, path: str) -> float:
    if cfg.task.beta != "auto":
        return cfg.task.beta
    if run is None or run["loss"]["preference"] in WITHOUT_REFERENCE:
        raise UserError(
            f"task.beta=auto: {path} has no run with a reference whose beta it could take; give task.beta=NUMBER"
        )
    if run["loss"]["preference"] == "sigmoid" and completed_loss(run["loss"])["normalize"]:
        raise UserError(
            f"task.beta=auto: {path} is of a loss per token, whose beta is none of sums; give task.beta=NUMBER"
        )
    return run["loss"]["beta"]


def _key(cfg: Eval, ctx: Context, rows: "Rows", digest: str, path: str, what: str) -> str:
    return short_hash(what, ctx.identity(path), digest, [len(rows), cfg.tokens_per_microbatch])


def _scored(cfg: Eval, ctx: Context, rows: "Rows", digest: str, path: str, what: str) -> "dict[str, np.ndarray]":
    """The log-probs of the rows by the model at `path`, which is loaded where some of them are not on disk yet."""
    points, of = ctx.store("points"), _key(cfg, ctx, rows, digest, path, what)
    return preference.score(
        lambda: (ctx.reference if what == "reference" else ctx.model(path)).policy,
        rows,
        ctx.device,
        tokens_per_microbatch=cfg.tokens_per_microbatch,
        once=lambda part, compute: points.once(short_hash(of, part), compute, model=path),
    )


def _items(path: str, rows: "Rows", logps: "dict[str, np.ndarray]", beta: float) -> list[Item]:
    margin_P = (logps["chosen"] - logps["ref_chosen"]) - (logps["rejected"] - logps["ref_rejected"])
    return [
        Item(
            model=path,
            id=rows.where(i),
            cluster=hashlib.sha256(rows.row(i)[0].tobytes()).hexdigest()[:16],
            scores={
                "rewards/accuracies": float(preference.won(margin_P[i])),
                "rewards/margins": beta * float(margin_P[i]),
            },
            details={"tokens_chosen": int(rows.chosen[i]), "tokens_rejected": int(rows.rejected[i])}
            | {side: float(values[i]) for side, values in logps.items()},
        )
        for i in range(len(rows))
    ]
