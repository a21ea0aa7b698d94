"""Settings of one evaluation, made from Hydra's composed YAML and checked for contradictions, before a model is loaded."""

import re
import typing
from dataclasses import replace
from typing import Any, Literal

from rpo import config
from rpo.config import EvalData, Seed, group, resolved
from rpo.errors import UserError, require


@group
class EvalModel:
    path: str | list[str] | None
    revision: str | None
    tokenizer: str | None
    trust_remote_code: bool
    dtype: Literal["auto", "bfloat16", "float32", "float64"]


@group
class EvalReference:
    path: str | None


@group
class PairsTask:
    kind: Literal["pairs"]
    beta: float | Literal["auto"]
    limit: int | None


@group
class GenerateTask:
    kind: Literal["generate"]
    limit: int | None
    samples: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    batch_size: int


@group
class GoldTask:
    kind: Literal["gold"]
    limit: int | None
    samples: int
    batch_size: int


@group
class OveroptTask:
    kind: Literal["overopt"]
    gold: str
    limit: int | None
    samples: int
    max_new_tokens: int | Literal["auto"]
    batch_size: int
    written: int
    pairs: int | None
    bon: list[int]
    bon_samples: int | None


@group
class SelectTask:
    kind: Literal["select"]
    results: str | None
    score: str
    split: bool
    max_kl: float | None
    entropy_falls: int | None
    max_displacement: float | None
    min_ended: float | None


@group
class WinrateTask:
    kind: Literal["winrate"]
    limit: int | None
    prompts: str | None
    bootstrap: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int


@group
class MtBenchTask:
    kind: Literal["mt_bench"]
    mode: Literal["single", "pairwise"]
    questions: str | None
    references: str | None
    prompts: str | None
    limit: int | None
    max_new_tokens: int
    batch_size: int


@group
class AlpacaEvalTask:
    kind: Literal["alpaca_eval"]
    limit: int | None
    prompts: str | None
    length_control: Literal["auto", "full", "no_gamed", "minimal", "none"]
    difficulty: str | None
    gamed: str | None
    weights: str | None
    compat: Literal["instruction", "row"]
    bootstrap: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int


@group
class JudgeCheckTask:
    kind: Literal["judge_check"]
    limit: int | None
    prompts: str | None
    repeats: int


@group
class LmEvalTask:
    kind: Literal["lm_eval"]
    tasks: list[str]
    shots: int | Literal["standard"]
    data: str | None
    limit: int | None
    chat_template: bool
    batch_size: int


@group
class MbppTask:
    kind: Literal["mbpp"]
    data: str | None
    limit: int | None
    allow_code_execution: bool
    samples: int
    k: list[int]
    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int
    seconds: int
    memory_gib: float


@group
class CompareTask:
    kind: Literal["compare"]
    results: str | list[str] | None
    metrics: str | list[str] | None
    draws: int


@group
class ReportTask:
    kind: Literal["report"]
    results: str | list[str] | None
    title: str | None
    worst: int


# A task's `kind` says which of these its settings are.
ModelTask = PairsTask | GenerateTask | GoldTask  # of models: model.path
RunTask = OveroptTask  # of runs' checkpoints: runs
JudgedTask = WinrateTask | MtBenchTask | AlpacaEvalTask | JudgeCheckTask  # of answers, by a judge or stored judgments
BenchmarkTask = LmEvalTask | MbppTask  # of models, against known answers
ResultsTask = SelectTask | CompareTask | ReportTask  # of what other evaluations wrote
Task = ModelTask | RunTask | JudgedTask | BenchmarkTask | ResultsTask


@group
class Judge:
    model: str | None
    base_url: str | None
    api_key_env: str
    temperature: float
    max_tokens: int
    verdict: Literal["auto", "logprobs", "text"]
    concurrency: int
    timeout: float
    retries: int
    price_in: float | None
    price_out: float | None
    max_cost: float | None


@group
class Eval:
    task: Task
    runs: str | list[str] | None
    outputs: str | list[str] | None
    baseline: str | None
    annotations: str | list[str] | None
    judge: Judge
    model: EvalModel
    reference: EvalReference
    data: EvalData
    seed: Seed
    tokens_per_microbatch: int
    run_dir: str | None
    cache_dir: str


# What may differ between two starts of one evaluation: how its judge is asked and what that may cost, and places.
EVAL_MAY_CHANGE = ("run_dir", "cache_dir", "tokens_per_microbatch")
EVAL_MAY_CHANGE += tuple(f"judge.{name}" for name in ("base_url", "concurrency", "timeout", "retries", "max_cost"))
EVAL_MAY_CHANGE += ("judge.price_in", "judge.price_out", "judge.api_key_env")


def _check_at_least(least: int, task: Task, *names: str) -> None:
    for name in names:
        value = getattr(task, name)
        require(value is None or value == "auto" or value >= least, f"task.{name}={value}: expected at least {least}")


def _check_sampling(task: Task) -> None:
    require(0 <= task.temperature < float("inf"), f"task.temperature={task.temperature}: expected >= 0 (0: greedy)")
    require(0 < task.top_p <= 1, f"task.top_p={task.top_p}: expected in (0, 1]")


def _check_bootstrap(task: Task) -> None:
    require(
        task.bootstrap == 0 or task.bootstrap >= 20,
        f"task.bootstrap={task.bootstrap}: expected 0 (no standard error) or at least 20 draws",
    )


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


def _check_compare(task: CompareTask) -> None:
    require(task.results is not None, "task.results=null: give the folders of evaluations by one task")
    for name in ("results", "metrics"):
        require(getattr(task, name) != [], f"task.{name}=[]: expected one or a list of them")
    _check_at_least(1000, task, "draws")


def _check_alpaca_eval(task: AlpacaEvalTask) -> None:
    _check_at_least(1, task, "limit", "max_new_tokens", "batch_size")
    _check_sampling(task)
    _check_bootstrap(task)
    form, given = task.length_control, {name for name in ("difficulty", "gamed", "weights") if getattr(task, name)}
    needs = {"full": {"difficulty", "gamed"}, "no_gamed": {"difficulty"}, "minimal": set(), "none": set()}
    asks = f"task.length_control={form}"
    if form == "auto":
        missing = {"difficulty"} - given if given else set()
        surplus = {"gamed"} & given if "weights" in given else set()
        asks = f"task.weights={task.weights}" if task.weights is not None else f"task.gamed={task.gamed}"
    else:
        missing, surplus = needs[form] - given, given - needs[form]
    require(not missing, f"{asks}: needs task.{' and task.'.join(sorted(missing))}; give the file")
    require(
        not surplus,
        f"task.{' and task.'.join(sorted(surplus))} with task.length_control={form}"
        f"{' and task.weights' if 'weights' in given - surplus else ''}: would not be read; leave it out",
    )
    require(
        task.compat == "instruction" or task.difficulty is not None,
        f"task.compat={task.compat} without task.difficulty: says how that is matched; give the file, or leave it out",
    )


def _check_lm_eval(task: LmEvalTask) -> None:
    _check_at_least(1, task, "limit", "batch_size")
    require(task.tasks != [], "task.tasks=[]: expected names of lm-evaluation-harness's tasks")
    require(len(set(task.tasks)) == len(task.tasks), f"task.tasks={task.tasks}: one is there twice; leave it out")
    require(task.shots == "standard" or task.shots >= 0, f"task.shots={task.shots}: expected standard, or 0 or more")


def _check_mbpp(task: MbppTask) -> None:
    require(
        task.allow_code_execution,
        "task.allow_code_execution=false: task=mbpp runs programs that models wrote, in a sandbox; set it to true if they may",
    )
    require(task.data is not None, "task.data=null: give the data set's mbpp.jsonl")
    _check_at_least(1, task, "limit", "samples", "max_new_tokens", "batch_size", "seconds")
    require(task.memory_gib >= 0.125, f"task.memory_gib={task.memory_gib}: expected at least 0.125, for Python itself")
    _check_sampling(task)
    require(bool(task.k) and min(task.k) >= 1, f"task.k={task.k}: expected numbers of programs, each at least 1")


def _check_mbpp_samples(task: MbppTask) -> None:
    """What holds where programs are sampled, not read from `outputs`."""
    require(
        max(task.k) <= task.samples,
        f"task.k={task.k} with task.samples={task.samples}: pass@k needs k programs; set task.samples={max(task.k)} or more",
    )
    require(
        task.samples == 1 or task.temperature > 0,
        f"task.samples={task.samples} with task.temperature=0: greedy programs are all the same; set task.temperature",
    )


def _check_task(task: Task) -> None:
    match task:
        case PairsTask():
            require(task.beta == "auto" or task.beta > 0, f"task.beta={task.beta}: expected auto or > 0")
            _check_at_least(1, task, "limit")
        case GenerateTask():
            _check_at_least(1, task, "limit", "samples", "max_new_tokens", "batch_size")
            _check_sampling(task)
            require(task.top_k >= 0, f"task.top_k={task.top_k}: expected 0 (off) or more")
        case GoldTask():
            _check_at_least(1, task, "limit", "samples", "batch_size")
        case OveroptTask():
            _check_overopt(task)
        case SelectTask():
            _check_select(task)
        case WinrateTask():
            _check_at_least(1, task, "limit", "max_new_tokens", "batch_size")
            _check_bootstrap(task)
            _check_sampling(task)
        case MtBenchTask():
            _check_at_least(1, task, "limit", "max_new_tokens", "batch_size")
        case AlpacaEvalTask():
            _check_alpaca_eval(task)
        case JudgeCheckTask():
            _check_at_least(1, task, "limit", "repeats")
        case LmEvalTask():
            _check_lm_eval(task)
        case MbppTask():
            _check_mbpp(task)
        case CompareTask():
            _check_compare(task)
        case ReportTask():
            require(task.results != [], "task.results=[]: expected one or a list of them")
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
    "compare": {"baseline"},
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
    if isinstance(cfg.task, MbppTask) and cfg.outputs is None:
        _check_mbpp_samples(cfg.task)
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


def _check_winrate(cfg: Eval) -> None:
    """Two models' answers, and one way to ask."""
    given = {"outputs": cfg.outputs, "model.path": cfg.model.path}
    for key, value in given.items():
        count = (1 if isinstance(value, str) else len(value or [])) + (cfg.baseline is not None and key == "outputs")
        require(
            value is None or count == 2 or (key == "outputs" and count == 1),
            f"{key}={value}, baseline={cfg.baseline} with task=winrate: expected two models: {key}=[A,B]"
            + (", outputs=A baseline=B, or outputs=FILE with the answers of both" if key == "outputs" else ""),
        )
    require(
        cfg.outputs is not None or cfg.baseline is None,
        f"baseline={cfg.baseline} with task=winrate: goes with outputs=FILE alone; leave it out, or give outputs",
    )
    require(
        cfg.model.path is None or cfg.data.eval is not None,
        "data.eval=null with task=winrate and model.path: give the prompts to be answered, data.eval=FILE",
    )
    _check_distinct_models(cfg)
    _check_pair_prompts(cfg)


def _check_distinct_models(cfg: Eval) -> None:
    paths = cfg.model.path if isinstance(cfg.model.path, list) else []
    require(len(set(paths)) == len(paths), f"model.path={paths}: one is there twice; give each model once")


def _check_judge_check(cfg: Eval) -> None:
    """Pairs, or what a judge said of them."""
    require(
        (cfg.annotations is None) != (cfg.data.eval is None),
        f"data.eval={cfg.data.eval}, annotations={cfg.annotations} with task=judge_check: judges labelled pairs "
        "(data.eval=FILE) or reads stored judgments, which hold their pairs (annotations); give one of them",
    )
    _check_pair_prompts(cfg)


def _check_pair_prompts(cfg: Eval) -> None:
    require(
        cfg.task.prompts is None or cfg.judge.verdict != "logprobs",
        f"judge.verdict=logprobs with task.prompts={cfg.task.prompts}: its templates ask for a verdict in words; set "
        "judge.verdict=text or task.prompts=null",
    )
    _check_stored(cfg, "prompts")


def _check_mt_bench(cfg: Eval) -> None:
    """Questions to go with answers, a baseline to go with pairs, verdicts in words."""
    task, stored = cfg.task, cfg.annotations is not None
    require(
        stored or task.questions is not None, "task.questions=null with task=mt_bench: give FastChat's question.jsonl"
    )
    require(
        stored or (cfg.baseline is not None) == (task.mode == "pairwise"),
        f"task.mode={task.mode}, baseline={cfg.baseline} with task=mt_bench: mode pairwise compares with a baseline's answers "
        "(baseline=FILE), single reads none; give both or neither",
    )
    require(
        not stored or cfg.baseline is None,
        f"baseline={cfg.baseline} with annotations: stored judgments name their models; leave it out",
    )
    require(
        cfg.judge.verdict != "logprobs",
        "judge.verdict=logprobs with task=mt_bench: its judges say ratings and verdicts in words; set judge.verdict=auto",
    )
    _check_distinct_models(cfg)
    _check_stored(cfg, "prompts", "references")


def _check_stored(cfg: Eval, *names: str) -> None:
    """With stored judgments nobody is asked anything."""
    for name in names:
        value = getattr(cfg.task, name)
        require(
            cfg.annotations is None or value is None,
            f"task.{name}={value} with annotations: is for asking a judge; leave it out",
        )


def _check_judge(judge: Judge) -> None:
    require(
        judge.base_url is None or re.fullmatch(r"https?://[^\s/]+\S*", judge.base_url) is not None,
        f"judge.base_url={judge.base_url}: expected http:// or https:// and a server, such as http://localhost:8000/v1",
    )
    require(
        judge.base_url is None or not judge.base_url.rstrip("/").endswith("/completions"),
        f"judge.base_url={judge.base_url}: expected the URL before /chat/completions (most end in /v1); leave that out",
    )
    # Not the value: it may be the key itself.
    require(
        re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", judge.api_key_env) is not None,
        "judge.api_key_env: expected the name of an environment variable, such as OPENAI_API_KEY; a key is never a setting",
    )
    require(0 <= judge.temperature <= 2, f"judge.temperature={judge.temperature}: expected 0 to 2")
    for name, least in {"max_tokens": 1, "concurrency": 1, "retries": 0}.items():
        value = getattr(judge, name)
        require(value >= least, f"judge.{name}={value}: expected at least {least}")
    require(0 < judge.timeout <= 86400, f"judge.timeout={judge.timeout}: expected seconds, above 0 and at most a day")
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
    match cfg.task:
        case WinrateTask():
            _check_winrate(cfg)
        case MtBenchTask():
            _check_mt_bench(cfg)
        case JudgeCheckTask():
            _check_judge_check(cfg)
        case ReportTask():
            require(
                bool(cfg.runs or cfg.task.results),
                "runs=null, task.results=null with task=report: nothing to report on; give runs=FOLDER or task.results=FOLDER",
            )
    _check_judge(cfg.judge)
    require(cfg.tokens_per_microbatch >= 1, f"tokens_per_microbatch={cfg.tokens_per_microbatch}: expected at least 1")


def eval_config(cfg: Any) -> Eval:
    """Checked settings of one evaluation. Raises UserError as `train_config` does."""
    node = config.plain(cfg)
    by_kind = {typing.get_args(typing.get_type_hints(cls)["kind"])[0]: cls for cls in typing.get_args(Task)}
    kind = node["task"].get("kind") if isinstance(node.get("task"), dict) else None
    if kind not in by_kind:
        raise UserError(f"task.kind={kind}: expected {', '.join(by_kind)}")
    made = config.build(Eval, node, task=config.build(by_kind[kind], node["task"], "task"))
    if isinstance(made.task, RunTask):  # config.yaml of an evaluation that goes on means the same from any folder
        made = replace(made, runs=resolved(made.runs))
    _check_eval(made)
    return made
