"""task=mbpp: prompts as the harness's, programs tried, pass@k by brute force, and the data set's own solutions."""

import ast
import importlib.util
import itertools
import json
import os
import re
from pathlib import Path

import jinja2
import pytest
import yaml

from rpo.errors import UserError
from rpo.evals.context import Answer
from rpo.sandbox import run
from rpo.sandbox.run import Outcome
from rpo.tasks import mbpp
from tests.helpers.contexts import StubContext
from tests.helpers.rows import write_jsonl
from tests.helpers.runs import ROOT, settings


def problem(task_id, name, factor):
    tests = [f"assert {name}({x}) == {factor * x}" for x in (1, 2, 5)]
    about = {"text": f"Write a function to multiply by {factor}.", "code": f"def {name}(x):\r\n  return {factor} * x"}
    return {"task_id": task_id, "test_list": tests, "test_setup_code": "", "challenge_test_list": [], **about}


PROBLEMS = [problem(i, f"times{i}", i) for i in (2, 3, 4, 11, 12, 13)]


WRONG = Outcome(False, "not so", None, "failed a test")


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "mbpp.jsonl.gz", PROBLEMS)


@pytest.fixture
def unsandboxed(monkeypatch):
    """Outcomes by what a program says of itself, for tests of what is made of them."""
    said = {"right": Outcome(True, None, None), "broken": Outcome(False, None, "no sandbox")}
    monkeypatch.setattr(run, "check", lambda limits: None)
    monkeypatch.setattr(run, "examine", lambda e, limits, jailer: said.get(e.program, WRONG))


def configured(data, *more):
    args = ["task=mbpp", f"task.data={data}", "task.allow_code_execution=true"]
    return settings(*args, *more, name="eval")


def possible():
    try:
        run.check(run.Limits(5, 0.5))
    except UserError as error:
        pytest.skip(str(error))


def test_answers_of_models(group, data, tmp_path):
    """Two models' answers are tried: who is right passes, whatever follows [DONE]; differences are paired by problem."""
    possible()
    solved = {"A": {11, 12}, "B": {12}}
    asked = []

    def answer(path, conversations, sampling):
        asked.append((path, len(conversations), sampling.temperature, sampling.max_new_tokens))
        texts = []
        for text in conversations:
            (number,) = re.findall(r"multiply by (\d+)", text.rpartition("You are an expert")[2])
            solution = PROBLEMS[[p["task_id"] for p in PROBLEMS].index(int(number))]["code"]
            texts.append((solution if int(number) in solved[path] else "def f(): pass") + "\n[DONE]\nwhile True: pass")
        return [Answer(text, 9, True) for text in texts]

    cfg = configured(data, "model.path=[A,B]", "baseline=B", "task.max_new_tokens=77")
    made = mbpp.run(cfg, StubContext(tmp_path, answer=answer))
    assert asked == [("A", 3, 0.0, 77), ("B", 3, 0.0, 77)]
    assert made.models["A"]["pass@1"]["value"] == pytest.approx(2 / 3) and made.models["A"]["pass@1"]["n"] == 3
    assert made.models["B"]["pass@1"]["value"] == pytest.approx(1 / 3)
    difference = made.models["A"]["difference/pass@1"]
    assert difference["value"] == pytest.approx(1 / 3)  # of 1, 0, 0
    assert difference["se"] == pytest.approx((sum((d - 1 / 3) ** 2 for d in (1, 0, 0)) / 2 / 3) ** 0.5)
    assert "difference/pass@1" not in made.models["B"]
    assert [s.id for s in made.items] == [f"mbpp/{i}" for i in (11, 12, 13)] * 2
    assert (
        made.items[2].details["programs"][0]["why"]
        == "assert times13(1) == 13: NameError: name 'times13' is not defined"
    )


def test_stored_programs(group, data, tmp_path, unsandboxed, monkeypatch):
    """Files of programs: pass@k of as many as there are, extra problems unread; what no sandbox tried is an error apart."""
    monkeypatch.setattr(mbpp, "CHUNK", 4)  # of 6 programs
    rows = [{"task_id": i, "program": text} for i in (11, 12, 13) for text in ("right", "wrong", "right" * (i == 13))]
    rows += [{"task_id": 600, "program": "right"}]
    first = write_jsonl(tmp_path / "first.jsonl", rows)
    second = write_jsonl(tmp_path / "second.jsonl", [{"task_id": i, "completion": "broken"} for i in (11, 12, 13)] * 2)
    cfg = configured(data, f"outputs=[{first},{second}]", "task.k=[1,2]")
    made = mbpp.run(cfg, StubContext(tmp_path))
    cells = made.models[str(first)]
    assert cells["pass@1"]["value"] == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)
    assert cells["pass@2"]["value"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    broken = made.models[str(second)]["pass@1"]
    assert broken["value"] is None and broken["n_error"] == 3
    assert made.items[-1].error == "no sandbox" and made.items[-1].scores == {}
    limited = mbpp.run(configured(data, f"outputs={first}", "task.limit=2"), StubContext(tmp_path))
    assert [s.details["task_id"] for s in limited.items] == [11, 12]
    assert limited.notes == [f"{first}: 4 of 6 programs failed (4 failed a test)"]
    assert made.notes[1] == f"{second}: 6 of 6 programs failed (6 not tried)"


def test_forms_of_others(tmp_path):
    """A row of sanitized-mbpp.json is the problem that the full file has; EvalPlus's samples are programs; text beats none."""
    row = PROBLEMS[3] | {"test_setup_code": "import math"}
    sanitized = {k: v for k, v in row.items() if k not in ("text", "test_setup_code")}
    sanitized |= {"prompt": row["text"], "test_imports": ["import math"], "source_file": "x"}
    asked = mbpp._problem(sanitized, "")
    assert asked == mbpp._problem(row, "")
    rows = [{"task_id": "Mbpp/11", "solution": "a"}, {"task_id": "11", "completion": "", "response": "b"}]
    rows += [{"task_id": 11, "program": ""}, {"task_id": "Mbpp/600", "solution": "c"}]
    assert mbpp.stored(str(write_jsonl(tmp_path / "o.jsonl", rows)), [asked], 1) == [["a", "b", ""]]


def test_a_row_of_two_programs_has_to_say_which_counts(tmp_path):
    """The data set's solution beside a model's reply is no program of the model's; two that are alike, or a `program`, are one."""
    asked = [mbpp._problem(PROBLEMS[3], "")]
    for row in (
        {"solution": "a", "response": "b"},
        {"completion": "b", "solution": "a"},
        {"response": "b", "output": "a"},
    ):
        file = write_jsonl(tmp_path / "two.jsonl", [{"task_id": 11} | row])
        with pytest.raises(
            UserError, match=r"two\.jsonl:1: has \w+ and \w+, which differ; keep the model's, or name it program"
        ):
            mbpp.stored(str(file), asked, 1)
    rows = [{"task_id": 11, "solution": "a", "completion": "a"}, {"task_id": 11, "program": "p", "response": "So: p"}]
    assert mbpp.stored(str(write_jsonl(tmp_path / "one.jsonl", rows)), asked, 1) == [["a", "p"]]


def test_what_was_tried_is_not_tried_again(group, data, tmp_path, unsandboxed, monkeypatch):
    """After a kill the outcomes on disk count, of these programs and limits alone; where no sandbox was made none does."""
    monkeypatch.setattr(mbpp, "CHUNK", 2)
    examine, seen = run.examine, []

    def killed_at(number):
        def counting(exam, limits, jailer):
            if len(seen) == number:
                raise KeyboardInterrupt
            seen.append(exam.program)
            return examine(exam, limits, jailer)

        return counting

    rows = [{"task_id": i, "program": text} for i, text in ((11, "right"), (12, "broken"), (13, "wrong"))]
    file = write_jsonl(tmp_path / "programs.jsonl", [*rows, *rows[:1], *rows[::2], rows[2]])
    cfg, whole = (
        configured(data, f"outputs={file}"),
        mbpp.run(configured(data, f"outputs={file}"), StubContext(tmp_path / "a")),
    )
    monkeypatch.setattr(run, "examine", killed_at(4))
    with pytest.raises(KeyboardInterrupt):
        mbpp.run(cfg, StubContext(tmp_path / "b"))
    monkeypatch.setattr(run, "examine", killed_at(-1))
    del seen[:]
    assert mbpp.run(cfg, StubContext(tmp_path / "b")) == whole
    assert "broken" in seen and 0 < len(seen) < 7
    del seen[:]
    mbpp.run(configured(data, f"outputs={file}", "task.seconds=6"), StubContext(tmp_path / "b"))
    assert len(seen) == 7


def test_fenced_programs_are_tried(group, data, tmp_path):
    """A fenced program in a file passes, one in fences that does not parse is a SyntaxError in the tally."""
    possible()
    rows = [{"task_id": i, "completion": f"So:\n```python\ndef times{i}(x): return {i} * x\n```"} for i in (11, 12)]
    file = write_jsonl(tmp_path / "outputs.jsonl", [*rows, {"task_id": 13, "completion": "```\ndef times13(\n```"}])
    made = mbpp.run(configured(data, f"outputs={file}"), StubContext(tmp_path))
    assert [s.scores["pass@1"] for s in made.items] == [1, 1, 0]
    assert made.notes == [f"{file}: 1 of 3 programs failed (1 SyntaxError)"]


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 1), (5, 3), (5, 5), (1, 1)])
def test_pass_at_k(n, c):
    """pass@k is the share of all choices of k programs that have one that passes."""
    for k in range(1, n + 1):
        chosen = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert mbpp.pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-12)


def test_prompt_is_the_harness_s(data):
    """The prompt equals what lm-evaluation-harness's own template and shown examples give, to the character."""
    if (found := importlib.util.find_spec("lm_eval")) is None:
        pytest.skip("lm_eval is not installed (pip install -e '.[eval]')")
    folder = Path(found.origin).parent / "tasks/mbpp"

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    task = yaml.load((folder / "mbpp.yaml").read_text(), Loader)
    (listed,) = [n for n in ast.walk(ast.parse((folder / "utils.py").read_text())) if isinstance(n, ast.FunctionDef)][
        -1:
    ]
    shown = ast.literal_eval(listed.body[-1].value)
    text, target = (jinja2.Template(task[key], keep_trailing_newline=True) for key in ("doc_to_text", "doc_to_target"))
    asked = PROBLEMS[3]
    expected = "\n\n".join([*(text.render(doc) + target.render(doc) for doc in shown), text.render(asked)])
    rows = [{**doc, "test_setup_code": ""} for doc in shown]
    problems = {row["task_id"]: mbpp._problem(row, "") for row in [*rows, asked]}
    assert mbpp.prompt(problems, problems[11]) == expected
    assert task["generation_kwargs"]["until"] == [mbpp.END] and task["num_fewshot"] == len(mbpp.SHOWN)


def test_names_that_tests_know():
    """The program's functions, also one that has a built-in's name; Python's own built-ins; imports that a test uses."""
    row = problem(1, "sum", 1) | {"code": "import sys, math\nclass P: pass\ndef sum(x): return x"}
    row["test_list"] = ["assert sum(1) == int('1')", "assert sys.getsizeof(sum(P())) == g"]
    read = mbpp._problem(row, "")
    assert read.names == ["P", "g", "sum"] and read.imports == ["import sys, math"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (PROBLEMS[:2], r"lacks task_id \[4\], which every prompt shows; give all of mbpp.jsonl"),
        (PROBLEMS[:3], "has no task_id from 11 to 510, the test; give all"),
        ([*PROBLEMS, PROBLEMS[3]], ":7: task_id 11 is there already, at .*:4"),
        ([{"task_id": "11"}], ":1: field task_id: expected an integer"),
        ([PROBLEMS[0] | {"test_list": []}], ":1: field test_list: expected statements"),
        ([PROBLEMS[0] | {"code": "def f("}], ":1: .*never closed"),
        ([PROBLEMS[0] | {"test_list": ["assert"]}], ":1: invalid syntax"),
        (["text"], ":1: expected an object with task_id"),
    ],
)
def test_bad_data(tmp_path, rows, said):
    """A file that is not MBPP's is refused in one line that names the line."""
    with pytest.raises(UserError, match=said) as caught:
        mbpp.read(str(write_jsonl(tmp_path / "mbpp.jsonl", rows)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"task_id": 11, "program": "x"}], r"2 of 3 problems have fewer than 1 programs \(task_id \[12, 13\]\)"),
        ([{"task_id": 11}], ":1: expected an object with task_id"),
        ([{"program": "x"}], ":1: expected an object with task_id"),
        (["x"], ":1: expected an object with task_id"),
    ],
)
def test_bad_outputs(group, tmp_path, data, unsandboxed, rows, said):
    """Stored programs that are missing or in another form are refused in one line."""
    file = write_jsonl(tmp_path / "outputs.jsonl", rows)
    with pytest.raises(UserError, match=said):
        mbpp.run(configured(data, f"outputs={file}"), StubContext(tmp_path))
    with pytest.raises(UserError, match="baseline=other: expected one of outputs"):
        mbpp.run(configured(data, f"outputs={file}", "baseline=other"), StubContext(tmp_path))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["task.allow_code_execution=false"], "allow_code_execution=false: task=mbpp runs programs"),
        (["task.data=null"], "task.data=null: give"),
        (["task.k=[1,2]"], r"task.k=\[1, 2\]: needs task.samples=2, not 1"),
        (["task.k=[]"], "expected numbers of programs"),
        (["task.k=[0]"], "expected numbers of programs"),
        (["task.samples=2"], "greedy programs are all the same; set task.temperature"),
        (["task.memory_gib=0.01"], "expected at least 0.125"),
        (["task.seconds=0"], "task.seconds=0: expected at least 1"),
        (["task.top_p=0"], "task.top_p=0: expected in"),
        (["task.temperature=-1"], "task.temperature=-1: expected >= 0"),
    ],
)
def test_bad_settings(data, more, said):
    """Settings that contradict each other are refused before anything is loaded; running programs is agreed to first."""
    with pytest.raises(UserError, match=said):
        configured(data, "model.path=A", *more)


@pytest.mark.skipif("RPO_TEST_DATA" not in os.environ, reason="RPO_TEST_DATA: no folder with mbpp/ given")
def test_documented_lines_pass(group, tmp_path):
    """The example lines of docs/EVALUATION.md and conf/task/mbpp.yaml are programs that pass their problem."""
    possible()
    problems, _ = mbpp.read(str(Path(os.environ["RPO_TEST_DATA"]) / "mbpp/mbpp.jsonl.gz"))
    for name in ("docs/EVALUATION.md", "conf/task/mbpp.yaml"):
        (line,) = re.findall(r'\{"task_id": \d+, "completion": ".*"\}', (ROOT / name).read_text())
        row = json.loads(line)
        outcome = run.examine(mbpp.exam_of(problems[row["task_id"]], row["completion"]), run.Limits(5, 1.0))
        assert outcome == Outcome(True, None, None), name


@pytest.mark.slow
@pytest.mark.skipif("RPO_TEST_DATA" not in os.environ, reason="RPO_TEST_DATA: no folder with mbpp/ given")
def test_reference_solutions_pass_and_stubs_fail(group, tmp_path):
    """All 974 of the data set's solutions pass, and of every fourth none whose functions return nothing."""
    possible()
    problems, _ = mbpp.read(str(Path(os.environ["RPO_TEST_DATA"]) / "mbpp/mbpp.jsonl.gz"))
    every = list(problems.values())
    assert len(every) == 974 and sum(i in problems for i in mbpp.TEST) == 500
    limits = run.Limits(20, 1.0)  # one takes 3 seconds on an idle machine, twice that on a busy one
    store = StubContext(tmp_path).store("points")
    solved = mbpp._scored("solutions", every, [[p.code] for p in every], [1], limits, store)
    assert [
        (s.details["task_id"], s.error, s.details["programs"][0]["why"]) for s in solved if s.scores != {"pass@1": 1.0}
    ] == []
    stubs = ["\n".join(f"def {name}(*a, **k): pass" for name in p.names) for p in every[::4]]
    failed = mbpp._scored("stubs", every[::4], [[stub] for stub in stubs], [1], limits, store)
    assert [s.details["task_id"] for s in failed if s.scores != {"pass@1": 0.0}] == []
