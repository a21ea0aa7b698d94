"""What can be set for an evaluation, whatever its task: frozen groups, and the checks that tasks have in common.

A task's own settings stand in its file and are passed in: `build`. Values live in `conf/eval.yaml` and `conf/task/*.yaml`
alone: no group has a default.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Annotated, Any, Literal

from rpo import config, fields
from rpo.config import EvalData
from rpo.errors import UserError, require
from rpo.fields import MAY_CHANGE, AfterValidator, Count, Field, Seed, group
from rpo.judging.settings import Judge, Server
from rpo.paths import expanded, resolved

# Fields that several tasks have.
Limit = Count | None  # null: all
Listed = Annotated[str | list[str], Field(min_length=1, description="one or a list of them")]
Draws = Annotated[
    Literal[0] | Annotated[int, Field(ge=20)], Field(description="0 (no standard error) or at least 20 draws")
]


@group
class Answers:
    """How a task has models answer: a part of its settings."""

    limit: Limit
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False, description=">= 0 (0: greedy)")]
    top_p: Annotated[float, Field(gt=0, le=1, description="in (0, 1]")]
    max_new_tokens: Count
    batch_size: Count


@group
class EvalModel:
    path: Annotated[Listed | None, AfterValidator(expanded)]
    revision: str | None
    tokenizer: str | None
    trust_remote_code: bool
    dtype: Literal["auto", "bfloat16", "float32", "float64"]


@group
class EvalReference:
    path: str | None


@group
class Eval:
    task: Any  # the `Settings` of the task's module
    runs: Listed | None
    outputs: Listed | None
    baseline: str | None
    annotations: Listed | None
    judge: Judge
    server: Server
    model: EvalModel
    reference: EvalReference
    data: EvalData
    seed: Seed
    tokens_per_microbatch: Annotated[Count, MAY_CHANGE]
    run_dir: Annotated[str | None, MAY_CHANGE]
    cache_dir: Annotated[str, MAY_CHANGE]


def build(cfg: Any, tasks: Mapping[str, ModuleType]) -> Eval:
    """Checked settings of one evaluation, from Hydra's DictConfig; `tasks` are the modules by their `kind`.

    Raises UserError: a missing, unknown, mistyped or contradictory key, in one line with its value and the fix.
    """
    node = config.plain(cfg)
    kind = node["task"].get("kind") if isinstance(node.get("task"), dict) else None
    if not isinstance(kind, str) or kind not in tasks:
        raise UserError(f"task.kind={kind}: expected {', '.join(tasks)}")
    task = fields.build(tasks[kind].Settings, node["task"], "task")
    typed = fields.build(Eval, node, task=task)
    typed = replace(typed, runs=resolved(typed.runs))  # config.yaml means the same from any folder
    _check_server(typed)
    tasks[kind].check(typed)
    return typed


def _check_server(cfg: Eval) -> None:
    chat = cfg.server.model is not None and cfg.server.api == "chat"
    require(
        not (chat and cfg.data.chat_template is not None),
        "data.chat_template with server.api=chat: the server's own template is taken; give the server yours, or set "
        "server.api=completions and model.tokenizer",
    )
    require(
        not (chat and cfg.model.tokenizer is not None),
        "model.tokenizer with server.api=chat: the server tokenises; leave it out, or set server.api=completions",
    )


def answerers(cfg: Eval) -> list[str]:
    """The models that answer: those of a server by its names for them, else those at model.path."""
    return listed(cfg.server.model) or listed(cfg.model.path)


# ---- checks that tasks share


def listed(value: str | list[str] | None) -> list[str]:
    """One or several names as a list."""
    return [value] if isinstance(value, str) else list(value or [])


def check_subjects(cfg: Eval, *reads: str, optional: bool = False) -> None:
    """Raises UserError unless one thing to evaluate is given, and nothing that the task does not read.

    `reads` are keys among model.path, outputs, annotations and runs, of which one has to be given unless `optional`,
    and among baseline, judge.model and reference.path.
    """
    kind = cfg.task.kind
    served = cfg.server.model
    require(
        served is None or ("model.path" in reads and isinstance(cfg.task, Answers)),
        f"server.model={served} with task={kind}: it asks no model for answers; leave it out",
    )
    require(served is None or cfg.model.path is None, "server.model and model.path: give one of them")
    subjects = {
        "model.path": cfg.model.path or served,
        "outputs": cfg.outputs,
        "annotations": cfg.annotations,
        "runs": cfg.runs,
    }
    others = {"baseline": cfg.baseline, "judge.model": cfg.judge.model, "reference.path": cfg.reference.path}
    for key, value in (subjects | others).items():
        require(key in reads or value is None, f"{key}={value} with task={kind}: it reads none; leave it out")
    readable = [key for key in subjects if key in reads]
    given = [key for key in readable if subjects[key] is not None]
    require(optional or bool(given) or not readable, f"{' or '.join(readable)}: missing; task={kind} evaluates it")
    require(len(given) <= 1, f"{' and '.join(given)} with task={kind}: give one of them")
    for key, value in {"model.revision": cfg.model.revision, "model.tokenizer": cfg.model.tokenizer}.items():
        require(
            cfg.model.path is not None or value is None or (served is not None and key == "model.tokenizer"),
            f"{key}={value} with task={kind} and no model.path: nothing to read it for; leave it out",
        )
    names, key = answerers(cfg), "server.model" if served else "model.path"
    require(len(set(names)) == len(names), f"{key}={names}: one is there twice; give each model once")


def check_judged(cfg: Eval, *only_asking: str) -> None:
    """Raises UserError unless a judge or stored judgments are given, not both; stored ones leave no use for the keys
    `only_asking` of the task."""
    kind = cfg.task.kind
    require(
        (cfg.annotations is None) != (cfg.judge.model is None),
        f"judge.model={cfg.judge.model}, annotations={cfg.annotations}: task={kind} asks a judge (judge.model and "
        "judge.base_url) or reads stored judgments (annotations); give one of them",
    )
    for name in only_asking:
        value = getattr(cfg.task, name)
        require(cfg.annotations is None or value is None, f"task.{name}={value} with annotations: leave it out")


def check_words(cfg: Eval) -> None:
    """Raises UserError where the templates of task.prompts, which ask for words, meet verdicts by log-probs."""
    require(
        cfg.task.prompts is None or cfg.judge.verdict != "logprobs",
        f"judge.verdict=logprobs with task.prompts={cfg.task.prompts}: its templates ask for a verdict in words; set "
        "judge.verdict=text or task.prompts=null",
    )
