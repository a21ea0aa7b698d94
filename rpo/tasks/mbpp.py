"""MBPP (arXiv 2108.07732): whether the programs that a model writes pass their tests, each tried in a sandbox.

The prompt is the paper's, with problems 2, 3 and 4 shown and solved; problems 11 to 510 are the test. It is a text to
continue, so no chat template is used. Which part of a reply is the program is said in `rpo.sandbox.replies`.
"""

import ast
import builtins
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from rpo import dist
from rpo.data.sources import check_new, open_sources, rows_of
from rpo.errors import UserError, require
from rpo.evals.context import Context, sampling_of
from rpo.evals.pairing import with_differences
from rpo.evals.results import Evaluation, Item, mean_of
from rpo.evals.settings import Answers, Eval, answerers, check_subjects, listed
from rpo.evals.store import Store
from rpo.fields import Count, Field, group, read_row
from rpo.files import short_hash
from rpo.sandbox import run as sandbox_run
from rpo.sandbox.replies import BEGIN, END, program_of
from rpo.text import one_line

SHOWN, TEST = (2, 3, 4), range(11, 511)  # task ids
CHUNK = 128  # programs that are tried between two writes, and while the other ranks wait, whose wait has a limit
_PROGRAM = ("program", "completion", "solution", "response", "output")  # in a row of outputs
_TASK = re.compile(r"(?:mbpp/)?([0-9]{1,9})", re.I)  # as others write it: "11", "Mbpp/11"


@group
class Settings(Answers):
    kind: Literal["mbpp"]
    data: str | None
    allow_code_execution: bool
    samples: Count
    k: Annotated[list[Count], Field(min_length=1, description="numbers of programs, each at least 1")]
    seconds: Count
    memory_gib: Annotated[float, Field(ge=0.125, description="at least 0.125, for Python itself")]


def check(cfg: Eval) -> None:
    task = cfg.task
    require(
        task.allow_code_execution,
        "task.allow_code_execution=false: task=mbpp runs programs that models wrote, in a sandbox; set it to true if they may",
    )
    require(task.data is not None, "task.data=null: give the data set's mbpp.jsonl")
    check_subjects(cfg, "model.path", "outputs", "baseline")
    names, key = answerers(cfg) or listed(cfg.outputs), "outputs" if cfg.outputs else "model.path"
    require(cfg.baseline in (None, *names), f"baseline={cfg.baseline}: expected one of {key} ({', '.join(names)})")
    if cfg.outputs is not None:
        return
    require(max(task.k) <= task.samples, f"task.k={task.k}: needs task.samples={max(task.k)}, not {task.samples}")
    require(
        task.samples == 1 or task.temperature > 0,
        f"task.samples={task.samples} with task.temperature=0: greedy programs are all the same; set task.temperature",
    )


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """pass@k of each model, or of each file of `outputs`; programs are run by rank 0.

    Raises UserError: no data, problems without a program, or a machine that cannot make a sandbox that holds.
    """
    task, limits = cfg.task, sandbox_run.Limits(cfg.task.seconds, cfg.task.memory_gib)
    dist.on_main(sandbox_run.check, limits)
    problems, digest = read(task.data)
    asked = [problems[i] for i in TEST if i in problems][: task.limit]
    names = answerers(cfg) or listed(cfg.outputs)
    if cfg.outputs is None:
        prompts = [prompt(problems, problem) for problem in asked for _ in range(task.samples)]
        texts = {name: [answer.text for answer in ctx.answer(name, prompts, sampling_of(task))] for name in names}
        starts = range(0, len(prompts), task.samples)
        tried = {name: [own[i : i + task.samples] for i in starts] for name, own in texts.items()}
    else:
        tried = {name: stored(name, asked, max(task.k)) for name in names}
    ctx.begin()
    store = ctx.store("points")
    of_model = {name: _scored(name, asked, programs, task.k, limits, store) for name, programs in tried.items()}
    items = [item for own in of_model.values() for item in own]
    models = {name: {f"pass@{k}": mean_of(own, f"pass@{k}") for k in task.k} for name, own in of_model.items()}
    models = with_differences(models, items, cfg.baseline)
    details = {"data": {"file": task.data, "digest": digest, "problems": len(asked)}, "shown": list(SHOWN)}
    return Evaluation(models, items, [_tally(name, own) for name, own in of_model.items()], details)


@group
class _Row:
    task_id: int
    text: str
    code: str
    test_list: Annotated[list[str], Field(min_length=1, description="statements")]
    test_setup_code: str


@group
class Problem(_Row):
    """A row of the data set, and what its tests know by name: the program's functions, and imports."""

    names: list[str]
    imports: list[str]


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n programs, of which c pass, have one that does (arXiv 2107.03374)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# ---- data


def read(data: str) -> tuple[dict[int, Problem], str]:
    """(problems by task id, digest of the file). Raises UserError where the file is none of MBPP's."""
    (source,) = open_sources(data, None)
    problems, places = {}, {}
    for line, row in source.rows():
        problem = _problem(row, place := f"task.data={data}:{line}")
        check_new(places, problem.task_id, place, f"task_id {problem.task_id}")
        problems[problem.task_id] = problem
    if missing := [i for i in SHOWN if i not in problems]:
        raise UserError(f"task.data={data}: lacks task_id {missing}, which every prompt shows; give all of mbpp.jsonl")
    if not any(i in problems for i in TEST):
        raise UserError(f"task.data={data}: has no task_id from 11 to 510, the test; give all of mbpp.jsonl")
    return problems, source.digest


def _problem(row: object, place: str) -> Problem:
    if isinstance(row, dict) and "text" not in row and isinstance(row.get("test_imports"), list):  # sanitized-mbpp.json
        row = row | {"text": row.get("prompt"), "test_setup_code": "\n".join(map(str, row["test_imports"]))}
    read = read_row(_Row, row, place)
    try:
        with warnings.catch_warnings(action="ignore"):  # of the data's own code: "\d" where r"\d" is meant
            body = [*ast.parse(read.code).body, *ast.parse(read.test_setup_code).body]
            tests = [ast.parse(test) for test in read.test_list]
    except SyntaxError as error:
        raise UserError(f"{place}: {one_line(error)}; give the data set's mbpp.jsonl") from None
    used = {node.id for test in tests for node in ast.walk(test) if isinstance(node, ast.Name)}
    imports, imported, defined = [], set(), set()
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound = {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            imported |= bound
            imports += [ast.unparse(node)] if bound & used else []
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
    # A built-in's name is the program's where the data set's solution has a function of that name (`sum`, in one).
    names = sorted(name for name in used if name in defined or not (name in imported or hasattr(builtins, name)))
    return Problem(**vars(read), names=names, imports=imports)


def prompt(problems: dict[int, Problem], problem: Problem) -> str:
    """The problem after three that are solved, as lm-evaluation-harness (mbpp, version 1) writes them."""
    shown = [f"{_question(problems[i])}{problems[i].code}\n{END}" for i in SHOWN]
    return "\n\n".join([*shown, _question(problem)])


def _question(problem: Problem) -> str:
    tests = "\n".join(problem.test_list[:3])
    return (
        f"You are an expert Python programmer, and here is your task: {problem.text} Your code should pass these "
        f"tests:\n\n{tests}\n{BEGIN}\n"
    )


def stored(file: str, asked: Sequence[Problem], least: int) -> list[list[str]]:
    """The programs of each problem in a file of rows with task_id (11, "11", "Mbpp/11") and a program by a name of _PROGRAM.

    Raises UserError: a row that has them not, or two that differ and neither is `program`; a problem with fewer than `least`.
    """
    by_task: dict[int, list[str]] = {problem.task_id: [] for problem in asked}
    for place, row in rows_of(file):
        texts = [row[name] for name in _PROGRAM if isinstance(row.get(name), str)] if isinstance(row, dict) else []
        number = _TASK.fullmatch(str(row.get("task_id"))) if texts else None
        if number is None:
            raise UserError(f"outputs={place}: expected an object with task_id (a number) and {_PROGRAM[0]}")
        written = list(dict.fromkeys(filter(str.strip, texts))) or texts
        if len(written) > 1 and row.get("program") != written[0]:  # the data set's own solution, say, and a model's
            there = " and ".join(name for name in _PROGRAM if row.get(name))
            raise UserError(f"outputs={place}: has {there}, which differ; keep the model's, or name it {_PROGRAM[0]}")
        if int(number[1]) in by_task:  # of the whole data set only the test is asked for
            by_task[int(number[1])].append(written[0])
    if few := [i for i, programs in by_task.items() if len(programs) < least]:
        raise UserError(
            f"outputs={file}: {len(few)} of {len(by_task)} problems have fewer than {least} programs (task_id {few[:5]}); "
            "add them, an empty one where a model gave none, or set task.limit or task.k"
        )
    return list(by_task.values())


# ---- scores


def _scored(
    name: str,
    asked: Sequence[Problem],
    programs: Sequence[Sequence[str]],
    ks: Sequence[int],
    limits: sandbox_run.Limits,
    store: Store,
) -> list[Item]:
    """One item per problem, its programs tried by rank 0, or earlier as `store` has it. A collective."""
    exams = [exam_of(problem, text) for problem, texts in zip(asked, programs, strict=True) for text in texts]
    outcomes = iter(_outcomes(exams, limits, store))
    items = []
    for problem, texts in zip(asked, programs, strict=True):
        own = [next(outcomes) for _ in texts]
        error = next((outcome.error for outcome in own if outcome.error), None)
        passed = sum(outcome.passed for outcome in own)
        of_programs = [
            {"program": text, "passed": outcome.passed, "why": outcome.why, "kind": outcome.kind}
            for text, outcome in zip(texts, own, strict=True)
        ]
        items.append(
            Item(
                model=name,
                id=f"mbpp/{problem.task_id}",
                cluster=f"mbpp/{problem.task_id}",
                prompt=problem.text,
                response=texts[0] if len(texts) == 1 else None,
                scores={} if error else {f"pass@{k}": pass_at_k(len(own), passed, k) for k in ks},
                error=error,
                details={"task_id": problem.task_id, "tests": problem.test_list, "programs": of_programs},
            )
        )
    return items


def _tally(name: str, items: Sequence[Item]) -> str:
    """How many of a model's programs failed, and of what."""
    programs = [program for item in items for program in item.details["programs"]]
    kinds = Counter(program["kind"] or "not tried" for program in programs if not program["passed"])
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{name}: {kinds.total()} of {len(programs)} programs failed" + (f" ({counts})" if counts else "")


def _outcomes(exams: Sequence[sandbox_run.Exam], limits: sandbox_run.Limits, store: Store) -> list[sandbox_run.Outcome]:
    """The outcome of each; what has been tried is in `store`, save for chunks in which a sandbox could not be made."""
    outcomes = []
    for start in range(0, len(exams), CHUNK):
        chunk = exams[start : start + CHUNK]
        key = short_hash([vars(exam) for exam in chunk], vars(limits))
        if (rows := store.get(key)) is None:
            rows = [vars(outcome) for outcome in dist.on_main(sandbox_run.examine_all, chunk, limits)]
            if not any(row["error"] for row in rows):
                store.add(key, rows)
        outcomes += [sandbox_run.Outcome(**row) for row in rows]
    return outcomes


def exam_of(problem: Problem, text: str) -> sandbox_run.Exam:
    """The problem's tests of the program in `text`."""
    known = problem.names, problem.test_setup_code, problem.imports
    return sandbox_run.Exam(program_of(text, problem.names), problem.test_list, *known)
