"""What can be set for an evaluation: frozen dataclasses, one per task, filled as `config` fills those of a run.

Values live in `conf/eval.yaml` and `conf/task/*.yaml` alone: no dataclass here has a default.
"""

from dataclasses import dataclass
from typing import Literal

from rpo.config import EvalData


@dataclass(frozen=True)
class EvalModel:
    path: str | list[str] | None
    revision: str | None
    tokenizer: str | None
    trust_remote_code: bool
    dtype: Literal["auto", "bfloat16", "float32", "float64"]


@dataclass(frozen=True)
class EvalReference:
    path: str | None


@dataclass(frozen=True)
class PairsTask:
    kind: Literal["pairs"]
    beta: float | Literal["auto"]
    limit: int | None


@dataclass(frozen=True)
class GenerateTask:
    kind: Literal["generate"]
    limit: int | None
    samples: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class GoldTask:
    kind: Literal["gold"]
    limit: int | None
    samples: int
    batch_size: int


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class SelectTask:
    kind: Literal["select"]
    results: str | None
    score: str
    split: bool
    max_kl: float | None
    entropy_falls: int | None
    max_displacement: float | None
    min_ended: float | None


@dataclass(frozen=True)
class WinrateTask:
    kind: Literal["winrate"]
    limit: int | None
    prompts: str | None
    bootstrap: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class MtBenchTask:
    kind: Literal["mt_bench"]
    mode: Literal["single", "pairwise"]
    questions: str | None
    references: str | None
    prompts: str | None
    limit: int | None
    max_new_tokens: int
    batch_size: int


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class JudgeCheckTask:
    kind: Literal["judge_check"]
    limit: int | None
    prompts: str | None
    repeats: int


@dataclass(frozen=True)
class LmEvalTask:
    kind: Literal["lm_eval"]
    tasks: list[str]
    shots: int | Literal["standard"]
    data: str | None
    limit: int | None
    chat_template: bool
    batch_size: int


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class CompareTask:
    kind: Literal["compare"]
    results: str | list[str] | None
    metrics: str | list[str] | None
    draws: int


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
    seed: int
    tokens_per_microbatch: int
    run_dir: str | None
    cache_dir: str


# What may differ between two starts of one evaluation: how its judge is asked and what that may cost, and places.
EVAL_MAY_CHANGE = ("run_dir", "cache_dir", "tokens_per_microbatch")
EVAL_MAY_CHANGE += tuple(f"judge.{name}" for name in ("base_url", "concurrency", "timeout", "retries", "max_cost"))
EVAL_MAY_CHANGE += ("judge.price_in", "judge.price_out", "judge.api_key_env")
