"""Answers of a server: what is sent is what the task says, each request once, and a server that fails costs nothing."""

import json

import pytest

import eval as evaluation
from rpo import dist
from rpo.data.chat import Chat
from rpo.data.tokenizer import encode_prompt
from rpo.errors import UserError
from tests.helpers.judge_server import JudgeServer, status, text, wait_less
from tests.helpers.rows import make_tokenizer, write_jsonl
from tests.helpers.runs import settings

ROWS = [
    {
        "prompt": [{"role": "system", "content": "ba"}, {"role": "user", "content": "ba be"}],
        "chosen": "bi",
        "rejected": "bo",
    },
    {"prompt": "bo bu", "chosen": "ba", "rejected": "be"},
    {"messages": [{"role": "user", "content": "ca ce"}], "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"prompt": "bo bu", "chosen": "bi", "rejected": "be"},
]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A function that evaluates ROWS, or `rows`, on a server: its items, in a folder of their own."""
    wait_less(monkeypatch)
    monkeypatch.setenv("RPO_CACHE", str(tmp_path / "cache"))

    def evaluate(server, *more, rows=ROWS, run_dir="run", kind="generate"):
        file = write_jsonl(tmp_path / "rows.jsonl", rows)
        url = server if isinstance(server, str) else server.url
        args = (
            f"task={kind}",
            "server.model=m",
            f"server.base_url={url}",
            f"data.eval={file}",
            "task.max_new_tokens=9",
        )
        try:
            evaluation.evaluate(settings(*args, *more, f"run_dir={tmp_path / run_dir}", name="eval"))
        finally:
            dist.shutdown()
        return [json.loads(line) for line in (tmp_path / run_dir / "samples.jsonl").read_text().splitlines()]

    return evaluate


def echo(body):
    """What was asked, and with which seed."""
    said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return f"{said} {body.get('seed')}"


def test_what_is_sent_is_what_the_task_says(asked):
    """Messages, tools and template arguments as the row has them, a text as the user's; sampling by the task's keys; each once."""
    with JudgeServer(echo) as server:
        sampled = ("task.temperature=0.7", "task.top_p=0.9", "task.top_k=5", "task.samples=2", "seed=3")
        items = asked(
            server, *sampled, "data.chat_template_kwargs={enable_thinking: false}", "server.extra_body={min_p: 0.1}"
        )
    assert [item["response"] for item in items] == ["ba be 3", "ba be 4", "bo bu 3", "bo bu 4", "ca ce 3", "ca ce 4"]
    assert len(server.bodies) == 6
    body = next(body for body in server.bodies if len(body["messages"]) == 2)
    assert body["messages"] == ROWS[0]["prompt"]
    expected = {
        "model": "m",
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 9,
        "min_p": 0.1,
        "stream": False,
    }
    assert expected.items() <= body.items() and "tools" not in body
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in server.bodies)
    assert any(body.get("tools") == ROWS[2]["tools"] for body in server.bodies)
    assert [item["scores"]["samples/length"] for item in items] == [3] * 6  # the server's count


def test_token_prompts_are_those_of_training(asked, tmp_path):
    """server.api=completions with a tokenizer sends its ids, by its template; without one a text as it is, and no messages."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with JudgeServer(echo) as server:
        asked(server, "server.api=completions", f"model.tokenizer={tmp_path / 'tokenizer'}", rows=ROWS[:2])
        expected = [encode_prompt(tokenizer, row["prompt"], Chat("2024-07-26", {})) for row in ROWS[:2]]
        assert sorted(body["prompt"] for body in server.bodies) == sorted(expected)
        items = asked(server, "server.api=completions", rows=ROWS[1:2], run_dir="text")
        assert items[0]["response"].startswith("bo bu")
        with pytest.raises(UserError, match="the prompts are messages, and only a template makes text of them"):
            asked(server, "server.api=completions", run_dir="messages")


def test_a_server_that_dies_midway_costs_nothing(asked):
    """What it had answered stays; the same command with the server back asks for the rest alone; other settings are refused."""
    rows = [{"prompt": f"ba {i}", "chosen": "a", "rejected": "b"} for i in range(12)]
    server = JudgeServer(echo)

    def dying(number, body):
        if number == 5:
            server.die()

    server.mishap = dying
    with server, pytest.raises(UserError, match=r"^server.base_url=http://127.*stopped answering") as caught:
        asked(server, "server.concurrency=1", "server.retries=1", rows=rows)
    assert "\n" not in str(caught.value)
    before = len(server.delivered)
    server.mishap = lambda number, body: None
    with server:
        items = asked(server, "server.concurrency=1", "server.retries=1", rows=rows)
    assert 0 < before < 12 and set(server.delivered.values()) == {1} and len(items) == 12


@pytest.mark.parametrize(
    ("mishap", "words"),
    [
        (status(404, "The model `m` does not exist"), "server.model=m: not found there"),
        (
            status(400, "this prompt is too long"),
            r"server.model=m: 3 of 3 requests failed, the first of .*HTTP 400: this prompt",
        ),
    ],
)
def test_a_server_that_refuses_is_one_line(mishap, words, asked):
    """A name that it does not serve, prompts that it does not take: no model gets fewer answers than another in silence."""
    with JudgeServer(echo, lambda number, body: mishap) as server, pytest.raises(UserError, match=words) as caught:
        asked(server)
    assert "\n" not in str(caught.value)


def test_what_a_reader_of_answers_has_to_know_is_noted(asked, tmp_path):
    """Lengths without the server's count, empty answers, and ends that are neither a stop nor a cut."""

    def odd(number, body):
        choice = {
            "message": {"content": ["", "said"][number % 2]},
            "finish_reason": ["content_filter", "stop"][number % 2],
        }
        return text(json.dumps({"choices": [choice]}))

    with JudgeServer(echo, odd) as server:
        asked(
            server,
            "server.concurrency=1",
            rows=[{"prompt": f"ba {i}", "chosen": "a", "rejected": "b"} for i in range(4)],
        )
    notes = " ".join(json.loads((tmp_path / "run" / "results.json").read_text())["notes"])
    for words in (
        "counts no tokens: lengths of 4 of 4 answers",
        "2 of 4 answers are empty",
        "2 of 4 answers ended by content_filter",
    ):
        assert words in notes


def test_what_a_server_does_not_know_is_left_out(asked):
    """A seed or top_p that is refused is dropped at once, and said."""

    def refusing(number, body):
        return status(400, "Unsupported parameter: seed") if "seed" in body else None

    with JudgeServer(echo, refusing) as server:
        items = asked(server, "task.temperature=1", rows=ROWS[:1])
    assert items[0]["response"] == "ba be None"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("model.path=x",), "server.model and model.path: give one of them"),
        (("task=pairs",), "server.model=m with task=pairs: it asks no model for answers"),
        (("data.eval=null",), "data.eval=null with server.model: give the prompts"),
        (("server.base_url=null",), "server.model=m: where\\? give server.base_url"),
        (("model.tokenizer=x",), "model.tokenizer with server.api=chat"),
        (("data.chat_template=x",), "data.chat_template with server.api=chat"),
        (("server.extra_body={top_p: 1}",), "server.extra_body: top_p is set by the task's own keys"),
        (("server.model=[m,m]",), "server.model=.*: one is there twice"),
    ],
)
def test_contradictions_are_refused(more, words):
    """Two sources of answers, a task that asks for none, keys that a server would not be told of."""
    args = ("task=generate", "server.model=m", "server.base_url=http://localhost:1/v1", "data.eval=f.jsonl")
    with pytest.raises(UserError, match=words):
        settings(*args, *more, name="eval")
