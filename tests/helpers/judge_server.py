"""A local server that speaks OpenAI's chat completions, and what can befall one: a judge for tests, in threads.

A mishap is a function of the handler that answers in the server's place. A reply is delivered, and so paid for, when all
of it is written; `delivered` counts these by the request's body, `tried` all that came.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rpo.judging import client, judge
from rpo.judging.client import Request
from rpo.judging.settings import Judge

JSON = {"Content-Type": "application/json"}


def settings(**more):
    """A judge's settings: quick, patient, unpriced."""
    values = {
        "model": "gpt-test",
        "base_url": None,
        "cache_as": None,
        "api_key_env": "TEST_JUDGE_CREDENTIAL",
        "temperature": 0.0,
        "max_tokens": 100,
        "system": "system",
        "extra_body": None,
        "verdict": "auto",
        "min_mass": 0.5,
        "concurrency": 4,
        "timeout": 5.0,
        "retries": 8,
        "price_in": None,
        "price_out": None,
        "max_cost": None,
    }
    return Judge(**(values | more))


def wait_less(monkeypatch):
    """Retries after a hundredth of a second, the library's and ours."""
    from openai import _base_client

    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(_base_client, "MAX_RETRY_DELAY", 0.08)
    monkeypatch.setattr(client, "JITTER", 0.01)
    monkeypatch.setattr(judge, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(judge, "LONGEST_WAIT", 0.08)
    monkeypatch.setattr(judge, "GRACE", 1.0)


def requests(count, **more):
    """So many requests, each 24 characters or a few more."""
    return [Request(({"role": "user", "content": f"which is better, pair {i}?"},), **more) for i in range(count)]


def expected(asked):
    """What the server says to each."""
    return [verdict({"messages": list(request.messages)}) for request in asked]


def texts(replies):
    return [reply.text for reply in replies]


def verdict(body):
    """A, B or C by the messages alone, whatever the order of requests."""
    digest = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()
    return f"They differ. [[{'ABC'[digest[0] % 3]}]]"


def completion(body, text, logprobs=True):
    """What the vendor answers; the first token's log-probs only where they were asked for."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if body.get("logprobs") and logprobs:
        first = [{"token": "A", "logprob": -0.25, "bytes": [65]}, {"token": "B", "logprob": -1.5, "bytes": [66]}]
        choice["logprobs"] = {"content": [first[0] | {"top_logprobs": first[: body["top_logprobs"]]}]}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return {"object": "chat.completion", "model": f"{body['model']}-0613", "choices": [choice], "usage": usage}


class JudgeServer:
    """Answers at `url` until stopped; `mishap(try number from 0, body)` gives a mishap or None."""

    def __init__(self, answer=verdict, mishap=lambda number, body: None, logprobs=True):
        self.answer, self.mishap, self.logprobs = answer, mishap, logprobs
        self.tried, self._delivered, self.bodies, self.keys = 0, Counter(), [], set()
        self.queries, self.api_keys = set(), set()
        self.lock = threading.RLock()
        self.port, self.server = 0, None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def delivered(self):
        """Counts by body, when no reply is half written: the client may have one before it is counted."""
        with self.lock:
            return self._delivered

    def start(self):
        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        server.daemon_threads, server.block_on_close, server.judge, server.dead = True, False, self, False
        self.server, self.port = server, server.server_port
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def die(self):
        """No reply is begun any more, none is cut; nobody listens at the port until `start`."""
        self.server.dead = True
        self.server.socket.close()  # at once: shutdown() waits for the loop
        threading.Thread(target=self.server.shutdown, daemon=True).start()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        with self.lock:
            self.die()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):  # noqa: N802  http.server's name
        judge = self.server.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            number = judge.tried
            judge.tried += 1
            judge.bodies.append(body)
            judge.keys.add(self.headers["Authorization"])
            mishap = judge.mishap(number, body)
        path, _, query = self.path.partition("?")
        judge.queries.add(query)
        judge.api_keys.add(self.headers["api-key"])
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return self.send(404, {"error": {"message": "no such path"}})
        if mishap is not None:
            return mishap(self)
        content = completion(body, judge.answer(body), judge.logprobs)
        if path == "/v1/completions":
            content["choices"][0]["text"] = content["choices"][0].pop("message")["content"]
        self.deliver(body, content)

    def deliver(self, body, content):
        with self.server.judge.lock:  # or a server that dies would cut it
            if self.server.dead:
                return self.drop()
            self.send(200, content)
            self.server.judge.delivered[json.dumps(body.get("messages", body.get("prompt")))] += 1

    def send(self, status, content, headers=JSON):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (JSON | headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def drop(self):
        self.close_connection = True

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client that does not wait
            super().handle()

    def log_message(self, *_):
        pass


# ---- mishaps


def status(number, message="no", headers=JSON, **error):
    return lambda handler: handler.send(number, {"error": {"message": message} | error}, headers)


def text(content, headers=JSON, code=200):
    """A body as it is: malformed JSON, a web page."""
    return lambda handler: handler.send(code, content, headers)


def slow(seconds):
    """Nothing comes for so long, then nothing at all."""

    def wait(handler):
        time.sleep(seconds)
        handler.drop()

    return wait


def truncated(handler):
    """The head promises more than comes."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"message": {"content": "[[A]]')
    handler.drop()
