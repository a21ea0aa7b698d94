"""Settings of one evaluation, made from Hydra's composed YAML and checked for contradictions, before a model is loaded."""

from dataclasses import replace
from typing import Any

from rpo import config
from rpo.checks import check_date, check_seed, require, resolved
from rpo.eval_config import (
    AlpacaEvalTask,
    CompareTask,
    Eval,
    GenerateTask,
    GoldTask,
    Judge,
    JudgeCheckTask,
    JudgedTask,
    LmEvalTask,
    MbppTask,
    MtBenchTask,
    OveroptTask,
    PairsTask,
    ReportTask,
    RunTask,
    SelectTask,
    Task,
    WinrateTask,
)


def _check_at_least(least: int, task: Task, *names: str) -> None:
    for name in names:
        value = getattr(task, name)
        require(value is None or value == "auto" or value >= least, f"task.{name}={value}: expected at least {least}")


def _check_overopt(task: OveroptTask) -> None:
    _check_at_least(1, task, "limit", "samples", "max_new_tokens", "batch_size", "bon_samples")
    _check_at_least(0, task, "pairs", "written")
    require(all(n >= 1 for n in task.bon), f"task.bon={task.bon}: expected numbers of answers, each at least 1")
    drawn = task.bon_samples or max(task.bon, default=1)
    require(
        drawn >= max(task.bon, default=1),
        f"task.bon_samples={drawn} with task.bon={task.bon}: the best of n needs n answers; set it to {max(task.bon, default=1)} "
        "or more, or null",
    )


def _check_select(task: SelectTask) -> None:
    require(task.results is not None, "task.results=null: give the folder of an evaluation by task=overopt")
    require(
        task.score.startswith(("min:", "max:")),
        f"task.score={task.score}: expected min:METRIC or max:METRIC, one of those in the folder's results.json",
    )
    require(
        not task.split or task.score == "max:gold",
        f"task.split=true with task.score={task.score}: only gold is kept by prompt; set task.score=max:gold or "
        "task.split=false",
    )
    _check_at_least(0, task, "max_kl")
    _check_at_least(1, task, "entropy_falls")
    for name in ("max_displacement", "min_ended"):
        value = getattr(task, name)
        require(value is None or 0 <= value <= 1, f"task.{name}={value}: expected null or a share, 0 to 1")


def _check_task(task: Task) -> None:
    match task:
        case PairsTask():
            require(task.beta == "auto" or task.beta > 0, f"task.beta={task.beta}: expected auto or > 0")
            _check_at_least(1, task, "limit")
        case GenerateTask():
            _check_at_least(1, task, "limit", "samples", "max_new_tokens", "batch_size")
            require(task.temperature >= 0, f"task.temperature={task.temperature}: expected >= 0 (0: greedy)")
            require(0 < task.top_p <= 1, f"task.top_p={task.top_p}: expected in (0, 1]")
            require(task.top_k >= 0, f"task.top_k={task.top_k}: expected 0 (off) or more")
        case GoldTask():
            _check_at_least(1, task, "limit", "samples", "batch_size")
        case OveroptTask():
            _check_overopt(task)
        case SelectTask():
            _check_select(task)
        case WinrateTask() | MtBenchTask():
            _check_at_least(1, task, "limit", "max_new_tokens", "batch_size")
        case AlpacaEvalTask():
            _check_at_least(1, task, "limit", "max_new_tokens", "batch_size")
            _check_at_least(0, task, "bootstrap")
        case JudgeCheckTask():
            _check_at_least(1, task, "limit", "repeats")
        case LmEvalTask():
            _check_at_least(1, task, "limit", "batch_size")
        case MbppTask():
            _check_at_least(1, task, "limit", "samples", "max_new_tokens", "batch_size")
        case CompareTask():
            _check_at_least(1, task, "draws")
        case ReportTask():
            _check_at_least(0, task, "worst")


# What each task may be given of the keys that say what is evaluated.
_READS = {
    "pairs": {"model.path"},
    "generate": {"model.path"},
    "gold": {"model.path"},
    "overopt": {"runs"},
    "select": set(),
    "winrate": {"model.path", "outputs", "annotations", "baseline", "judge.model"},
    "mt_bench": {"model.path", "outputs", "annotations", "baseline", "judge.model"},
    "alpaca_eval": {"model.path", "outputs", "annotations", "baseline", "judge.model"},
    "judge_check": {"annotations", "judge.model"},
    "lm_eval": {"model.path", "baseline"},
    "mbpp": {"model.path", "outputs", "baseline"},
    "compare": set(),
    "report": {"runs"},
}


def _check_what(cfg: Eval) -> None:
    """Raises UserError unless what the task evaluates is given, once, and nothing that it does not read."""
    kind, reads = cfg.task.kind, _READS[cfg.task.kind]
    subjects = {
        "model.path": cfg.model.path,
        "outputs": cfg.outputs,
        "annotations": cfg.annotations,
        "runs": cfg.runs,
    }
    for key, value in (subjects | {"baseline": cfg.baseline, "judge.model": cfg.judge.model}).items():
        require(value != [], f"{key}=[]: expected one or a list of them")
        require(key in reads or value is None, f"{key}={value} with task={kind}: it reads none; leave it out")
    readable = [key for key in subjects if key in reads]
    found = [key for key in readable if subjects[key] is not None]
    optional = not readable or kind in ("report", "judge_check")
    require(optional or bool(found), f"{' or '.join(readable)}: missing; task={kind} evaluates what it names")
    require(len(found) <= 1, f"{' and '.join(found)} with task={kind}: give one of them")
    if isinstance(cfg.task, JudgedTask):
        require(
            (cfg.annotations is None) != (cfg.judge.model is None),
            f"judge.model={cfg.judge.model}, annotations={cfg.annotations}: task={kind} asks a judge (judge.model and "
            "judge.base_url) or reads stored judgments (annotations); give one of them",
        )
    own = {"model.revision": cfg.model.revision, "model.tokenizer": cfg.model.tokenizer}
    for key, value in own.items():
        require(
            cfg.model.path is not None or value is None,
            f"{key}={value} with task={kind} and no model.path: nothing to read it for; leave it out",
        )
    require(
        kind in ("pairs", "gold") or cfg.reference.path is None,
        f"reference.path={cfg.reference.path} with task={kind}: it reads none; leave it out",
    )
    require(cfg.data.eval != [], "data.eval=[]: expected a file, a list of files, or NAME:SPLIT; null: the runs' own")


def _check_judge(judge: Judge) -> None:
    require(0 <= judge.temperature <= 2, f"judge.temperature={judge.temperature}: expected 0 to 2")
    for name, least in {"max_tokens": 1, "concurrency": 1, "retries": 0}.items():
        value = getattr(judge, name)
        require(value >= least, f"judge.{name}={value}: expected at least {least}")
    require(judge.timeout > 0, f"judge.timeout={judge.timeout}: expected a number of seconds above 0")
    for name in ("price_in", "price_out", "max_cost"):
        value = getattr(judge, name)
        require(value is None or value >= 0, f"judge.{name}={value}: expected null or dollars, 0 or more")
    require(
        judge.max_cost is None or None not in (judge.price_in, judge.price_out),
        f"judge.max_cost={judge.max_cost} without judge.price_in and judge.price_out: cost can not be counted; give both",
    )


def _check_eval(cfg: Eval) -> None:
    _check_task(cfg.task)
    _check_what(cfg)
    _check_judge(cfg.judge)
    require(cfg.tokens_per_microbatch >= 1, f"tokens_per_microbatch={cfg.tokens_per_microbatch}: expected at least 1")
    check_date(cfg.data.template_date)
    check_seed("seed", cfg.seed)


def eval_config(cfg: Any) -> Eval:
    """Checked settings of one evaluation. Raises UserError as `train_config` does."""
    typed = config.typed(Eval, config.plain(cfg))
    if isinstance(typed.task, RunTask):  # config.yaml of an evaluation that goes on means the same from any folder
        typed = replace(typed, runs=resolved(typed.runs))
    _check_eval(typed)
    return typed
