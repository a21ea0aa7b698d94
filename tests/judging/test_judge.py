"""The judge's client against a local server: all that befalls a server changes no reply, and none is paid for twice."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from email.utils import formatdate

import pytest
import torch
from openai import _base_client

from rpo.errors import UserError
from rpo.judging import cache, client, judge
from rpo.judging.client import Account, Reply, Request
from rpo.synthetic import task
from tests.helpers import judge_server as server
from tests.helpers.judge_server import JudgeServer, completion, expected, requests, settings, texts, verdict
from tests.helpers.models import make_lm
from tests.helpers.rows import TEMPLATE, WORDS
from tests.helpers.runs import script_env

SECRET = "judge-key-that-must-not-be-seen"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits of a hundredth of a second, a key that can be looked for, no key of the user's, no proxy."""
    server.wait_less(monkeypatch)
    monkeypatch.setenv("TEST_JUDGE_CREDENTIAL", SECRET)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def check_paid_once(host, asked):
    assert sorted(host.delivered.values()) == [1] * len(asked), host.delivered


def run(tmp_path, asked, mishap=lambda number, body: None, account=None, **more):
    """(replies, server) of one call."""
    with JudgeServer(mishap=mishap) as host:
        return judge.ask(asked, settings(base_url=host.url, **more), tmp_path / "cache", account), host


# ---- an ordinary day


def test_replies_come_in_order_and_say_what_the_server_says(tmp_path, capsys):
    """Text, log-probs of the first token, finish reason, the server's token counts and its name for the model."""
    asked = requests(9, top_logprobs=2, max_tokens=5)
    replies, host = run(tmp_path, asked)
    assert texts(replies) == expected(asked)
    assert all(reply.top_logprobs == {"A": -0.25, "B": -1.5} for reply in replies)
    first = replies[0]
    assert (first.finish_reason, first.input_tokens, first.output_tokens) == ("stop", 7, 3)
    assert (first.model, first.error, first.cached) == ("gpt-test-0613", None, False)
    body = host.bodies[0]
    assert (body["temperature"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (0.0, 5, True, 2)
    assert host.keys == {f"Bearer {SECRET}"}
    assert "9 requests, 0 cached, about 54 tokens in, at most 45 out\n" in capsys.readouterr().out


def test_a_second_run_costs_nothing(tmp_path, capsys):
    """With the same cache the same requests reach no server, which may be gone; the replies are equal but for `cached`."""
    asked = requests(5, top_logprobs=1)
    with JudgeServer() as host:
        settings_of = settings(base_url=host.url)
        first = judge.ask(asked, settings_of, tmp_path)
    again = judge.ask(asked, settings_of, tmp_path)
    assert again == [replace(reply, cached=True) for reply in first]
    assert "5 requests, 5 cached\n" in capsys.readouterr().out


def test_what_a_reply_depends_on_is_in_its_key():
    """Model, temperature, tokens, system, further fields, log-probs, messages and repeat change the key; the URL and concurrency do
    not."""
    asked, base = requests(1)[0], settings(base_url="http://a/v1")
    other = [
        judge.key_of(asked, replace(base, **change))
        for change in (
            {"model": "m"},
            {"temperature": 1.0},
            {"temperature": None},
            {"max_tokens": 9},
            {"system": "user"},
            {"extra_body": {"reasoning_effort": "low"}},
        )
    ]
    other += [judge.key_of(replace(asked, **change), base) for change in ({"top_logprobs": 1}, {"repeat": 1})]
    other += [judge.key_of(requests(2)[1], base), judge.key_of(asked, base)]
    assert len(set(other)) == len(other)
    priced = {"price_in": 1.0, "price_out": 1.0, "max_cost": 1.0}
    same = replace(base, concurrency=1, retries=1, base_url="http://b/v1/", extra_body={}, min_mass=0.1, **priced)
    assert judge.key_of(asked, same) == judge.key_of(asked, base)
    named = replace(base, model="m", cache_as="gpt-test")
    assert judge.key_of(asked, named) == judge.key_of(asked, base)


def test_equal_requests_are_asked_once_and_repeats_again(tmp_path):
    """Six requests of which two are distinct, and one repeat, are three replies to pay for."""
    asked = requests(2) * 3 + requests(1, repeat=1)
    replies, host = run(tmp_path, asked)
    assert texts(replies) == expected(asked)
    assert host.tried == 3


def test_facts_count_tokens_and_dollars_once(tmp_path):
    """7 tokens in at $30 and 3 out at $60 a million; equal requests once; what was cached cost nothing now."""
    with JudgeServer() as host:
        priced = settings(base_url=host.url, price_in=30.0, price_out=60.0)
        judge.ask(requests(2), priced, tmp_path)
        asked = requests(5) + requests(5)
        summary = judge.facts(asked, judge.ask(asked, priced, tmp_path), priced)
    each = (7 * 30 + 3 * 60) / 1e6
    assert (summary["requests"], summary["cached"], summary["errors"], summary["served"]) == (
        5,
        2,
        0,
        ["gpt-test-0613"],
    )
    assert (summary["input_tokens"], summary["output_tokens"], summary["finish_reasons"]) == (35, 15, {"stop": 5})
    assert summary["cost"] == pytest.approx(5 * each) and summary["cost_now"] == pytest.approx(3 * each)
    assert judge.facts(asked[:1], [Reply("", None, None, 0, 0, None, "why")], settings())["cost"] is None


def test_tokens_are_estimated_where_the_server_counts_none(tmp_path):
    """Four characters are a token (24 in, 12 out) where usage is missing or makes no sense."""

    def bare(number, body):
        answer = completion(body, "[[B]] it is") | {
            "usage": [None, {"prompt_tokens": -1, "completion_tokens": "3"}][number % 2]
        }
        return server.text(json.dumps(answer))

    replies, _ = run(tmp_path, requests(2), bare)
    assert [(reply.input_tokens, reply.output_tokens) for reply in replies] == [(6, 3), (6, 3)]


# ---- bad days


def seldom(mishap, every=3):
    """The mishap befalls every third try."""
    return lambda number, body: mishap if number % every == 0 else None


MISHAPS = {
    "429": server.status(429),
    "429, wait": server.status(429, headers={"Retry-After": "0.03"}),
    "429, wait until": server.status(429, headers={"Retry-After": formatdate(0, usegmt=True)}),
    "429, wait nonsense": server.status(429, headers={"Retry-After": "a while"}),
    "429, wait nan": server.status(429, headers={"Retry-After": "nan"}),
    "408": server.status(408),
    "409": server.status(409),
    "500": server.status(500),
    "502 of a proxy": server.text("<html>Bad Gateway</html>", {"Content-Type": "text/html"}, code=502),
    "503": server.status(503, headers={"Retry-After": "0"}),
    "malformed": server.text('{"choices": [{"message": {"content": "[[A'),
    "not JSON": server.text("busy"),
    "null": server.text("null"),
    "empty": server.text(""),
    "no choices": server.text('{"choices": []}'),
    "no content": server.text('{"choices": [{"message": {"role": "assistant"}}]}'),
    "content of parts": server.text('{"choices": [{"message": {"content": [{"type": "text"}]}}]}'),
    "error in a 200": server.text('{"error": {"message": "overloaded"}}'),
    "truncated": server.truncated,
    "closed": lambda handler: handler.drop(),
}


@pytest.mark.parametrize("name", MISHAPS)
def test_what_passes_changes_no_reply(tmp_path, name):
    """Every third try ends so: the replies are the undisturbed ones, and each is delivered once."""
    asked = requests(12)
    replies, host = run(tmp_path, asked, seldom(MISHAPS[name]))
    assert texts(replies) == expected(asked)
    assert host.tried > len(asked)
    check_paid_once(host, asked)


def test_a_reply_that_does_not_come_is_asked_for_again(tmp_path):
    """Two tries hang beyond the timeout; all replies come."""
    asked = requests(6)
    replies, host = run(tmp_path, asked, lambda n, _: server.slow(20) if n in (2, 3) else None, timeout=2.0)
    assert texts(replies) == expected(asked)
    check_paid_once(host, asked)


def test_a_rate_limit_is_waited_out_by_all(tmp_path):
    """After a 429 with Retry-After nobody asks before the time is over: neither who got it nor the three others."""
    times = []

    def late(handler, body):
        time.sleep(0.6)  # the 429 has long come
        handler.deliver(body, completion(body, verdict(body)))

    def limited(number, body):
        times.append(time.monotonic())
        if number == 0:
            return server.status(429, headers={"Retry-After": "1.2"})
        return (lambda handler: late(handler, body)) if number < 4 else None

    asked = requests(8)
    replies, _ = run(tmp_path, asked, limited, concurrency=4)
    assert texts(replies) == expected(asked)
    assert len(times) == 9 and times[4] - times[0] >= 1.2


def test_a_slow_queue_is_no_failure(tmp_path):
    """Where seven of eight tries are over the limit, requests outlast their number of retries as long as others succeed."""
    asked = requests(12)
    replies, host = run(tmp_path, asked, lambda n, _: server.status(429) if n < 64 and n % 8 < 7 else None, retries=6)
    assert texts(replies) == expected(asked)
    check_paid_once(host, asked)


def test_a_server_dies_and_comes_back(tmp_path):
    """Gone for a moment after a third of the replies: the end is the undisturbed one, nothing is paid for twice."""
    asked = requests(30)
    host = JudgeServer().start()
    died = threading.Event()

    def die(number, body):
        if number == 10:
            host.die()
            died.set()
        return None

    host.mishap = die
    threading.Thread(target=lambda: (died.wait(), time.sleep(0.3), host.start()), daemon=True).start()
    replies = judge.ask(asked, settings(base_url=host.url, retries=100), tmp_path)
    with host.lock:
        host.die()
    assert texts(replies) == expected(asked)
    assert host.tried > len(asked)
    check_paid_once(host, asked)


def test_a_server_that_stays_away_ends_it_and_the_rest_is_asked_later(tmp_path):
    """One line says that it is gone; a later start asks for the missing replies alone."""
    asked = requests(12)
    with JudgeServer() as host:

        def die(number, body):
            if number == 7:
                host.die()

        host.mishap = die
        cfg = settings(base_url=host.url, retries=2)
        with pytest.raises(
            UserError, match=r"stopped answering \(.*Refused.*start the server; replies so far are cached"
        ):
            judge.ask(asked, cfg, tmp_path)
        host.mishap = lambda number, body: None
        host.start()
        assert texts(judge.ask(asked, cfg, tmp_path)) == expected(asked)
        check_paid_once(host, asked)


SCRIPT = """
import sys
from pathlib import Path
from rpo.judging import judge
from tests.helpers.judge_server import requests, settings
judge.ask(requests(40), settings(base_url=sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_written(tmp_path):
    """kill -9 midway: what the cache holds is not asked for again, the rest is, and the end is the undisturbed one."""
    asked = requests(40)

    def steady(body):
        time.sleep(0.05)
        return verdict(body)

    with JudgeServer(answer=steady) as host:
        env = script_env(TEST_JUDGE_CREDENTIAL=SECRET)
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, host.url, str(tmp_path)], env=env, stderr=-3)
        while sum(host.delivered.values()) < 15 and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        (file,) = tmp_path.glob("*.jsonl")
        kept = file.read_bytes().count(b"\n")
        assert 5 <= kept < 40
        file.write_bytes(file.read_bytes() + b'{"key": "half a li')
        replies = judge.ask(asked, settings(base_url=host.url), tmp_path)
        assert texts(replies) == expected(asked)
        assert sum(reply.cached for reply in replies) == kept
        assert sum(host.delivered.values()) - 40 <= settings().concurrency  # those on their way when it was killed
        assert len(file.read_bytes().splitlines()) == 41


def test_damaged_lines_cost_their_own_replies_alone(tmp_path, capsys):
    """A cut last line and lines of another form are left out; the next reply does not stand on the cut one."""
    asked = requests(4)
    with JudgeServer() as host:
        cfg = settings(base_url=host.url)
        judge.ask(asked, cfg, tmp_path)
        (file,) = tmp_path.glob("*.jsonl")
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(
            b"".join([lines[0], b"[]\n", b'{"key": "x", "reply": {}}\n', b"\xff\n", lines[1], lines[2][:40]])
        )
        assert texts(judge.ask(asked, cfg, tmp_path)) == expected(asked)
        assert sum(host.delivered.values()) == 6
        assert "skipping a damaged reply" in capsys.readouterr().out
        assert all(reply.cached for reply in judge.ask(asked, cfg, tmp_path))


def test_a_server_that_moved_is_paid_once(tmp_path):
    """On another port, at the vendor's URL and behind a query the replies are found again; under another name too, by cache_as."""
    asked = requests(5, top_logprobs=2)
    with JudgeServer() as host:
        first = judge.ask(asked, settings(base_url=host.url), tmp_path)
    again = [replace(reply, cached=True) for reply in first]
    for more in (
        {"base_url": "http://127.0.0.1:9/v1?api-version=1"},
        {"base_url": None},
        {"model": "org/gpt-test", "cache_as": "gpt-test", "base_url": "http://127.0.0.1:9/v1"},
    ):
        assert judge.ask(asked, settings(**more), tmp_path) == again
    with JudgeServer() as host:
        apart = judge.ask(asked, settings(base_url=host.url, cache_as="the other"), tmp_path)
    assert not any(reply.cached for reply in apart) and host.tried == 5


def test_one_name_for_two_models_is_noted(tmp_path, capsys):
    """Replies in the cache that another model gave under the same name: both names are shown, with the way to keep them apart."""
    with JudgeServer() as host:
        cfg = settings(base_url=host.url)
        judge.ask(requests(3), cfg, tmp_path)
        assert "judge.model=gpt-test is served as gpt-test-0613\n" in capsys.readouterr().out
        host.mishap = lambda n, body: server.text(json.dumps(completion(body, verdict(body)) | {"model": "llama"}))
        replies = judge.ask(requests(6), cfg, tmp_path)
    (note,) = judge.notes(judge.facts(requests(6), replies, cfg))
    assert note.startswith(
        "judge.model=gpt-test was served as gpt-test-0613 and as llama: verdicts may be of several models"
    )
    out = capsys.readouterr().out
    assert (
        "is served as gpt-test-0613 and as llama" in out
        and "judge.cache_as=NAME keeps the replies of each apart" in out
    )


def test_replies_of_another_server_are_noted(tmp_path, capsys):
    """Cached replies that came from another URL, where another model may be served by the same name: on screen, and in the notes."""
    with JudgeServer() as host:
        judge.ask(requests(2), settings(base_url=host.url), tmp_path)
        here = judge.ask(requests(2), settings(base_url=host.url), tmp_path)
        assert judge.notes(judge.facts(requests(2), here, settings(base_url=host.url))) == []
        assert "cached, given at" not in capsys.readouterr().out
        old = host.url
    with JudgeServer() as host:
        cfg = settings(base_url=host.url)
        replies = judge.ask(requests(3), cfg, tmp_path)
    (note,) = judge.notes(judge.facts(requests(3), replies, cfg))
    assert note == f"judge.model=gpt-test was asked at {old}: its replies were cached"
    given = (
        f"2 of 3 replies were cached, given at {old}; if {host.url} serves another model by that name, judge.cache_as"
    )
    assert given in capsys.readouterr().out


def test_an_error_that_quotes_a_request_changes_no_other(tmp_path):
    """A filter's refusal that repeats a prompt's words (temperature, system message) fails that request; the rest are sent whole."""
    words = "The prompt was flagged: 'the system message says that temperature is not supported'"

    def flagged(_number, body):
        if body["messages"][-1]["content"] == requests(3)[1].messages[-1]["content"]:
            return server.status(400, words)
        return None

    replies, host = run(tmp_path, requests(6), flagged, concurrency=1)
    assert [reply.error is None for reply in replies] == [True, False, True, True, True, True]
    assert "flagged" in replies[1].error and not any(reply.dropped for reply in replies if reply.error is None)
    assert all("temperature" in body for body in host.bodies[4:])


@pytest.mark.parametrize("status", [400, 403])
def test_a_text_that_a_server_moderates_fails_alone(tmp_path, status):
    """A refusal of what one request says, by 403 too, is that request's error."""
    words = "Content violates usage guidelines. Failed check: SAFETY_CHECK"
    replies, _ = run(
        tmp_path, requests(4), lambda n, body: server.status(status, words) if n == 1 else None, concurrency=1
    )
    assert [reply.error is None for reply in replies] == [True, False, True, True] and words in replies[1].error


def test_an_error_in_a_choice_is_asked_again(tmp_path):
    """HTTP 200 whose choice holds the error of a server behind the router is no reply: it is not kept."""

    def routed(number, body):
        broken = completion(body, "")
        broken["choices"][0] |= {"finish_reason": "error", "error": {"code": 502, "message": "Upstream"}}
        return server.text(json.dumps(broken)) if number == 1 else None

    replies, host = run(tmp_path, requests(3), routed, concurrency=1)
    assert texts(replies) == expected(requests(3)) and host.tried == 4


def test_a_key_of_one_sign_hides_nothing(tmp_path, monkeypatch):
    """Servers that need no key get a dummy one, which is in any text: replies keep it."""
    monkeypatch.setenv("TEST_JUDGE_CREDENTIAL", "0")
    with JudgeServer(answer=lambda body: "Rating: [[10]]") as host:
        (reply,) = judge.ask(requests(1), settings(base_url=host.url), tmp_path)
    assert reply.text == "Rating: [[10]]"


def test_two_that_ask_the_same_at_once_pay_once(tmp_path):
    """Two clients with overlapping requests over one cache: each reply is delivered once, both have all of theirs."""

    def steady(body):
        time.sleep(0.05)
        return verdict(body)

    with JudgeServer(answer=steady) as host:
        cfg, found = settings(base_url=host.url), {}

        def ask(name, asked):
            found[name] = judge.ask(asked, cfg, tmp_path)

        parts = {"first": requests(30)[:20], "second": requests(30)[10:], "third": requests(30)[5:15]}
        threads = [threading.Thread(target=ask, args=each) for each in parts.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check_paid_once(host, requests(30))
    assert all(texts(found[name]) == expected(asked) for name, asked in parts.items())
    assert not list(tmp_path.glob("*.asking"))


def test_what_another_process_could_not_get_is_asked_again(tmp_path):
    """Where the process that asked fails on a request, or is killed, the one that waits asks itself."""
    asked, cfg = requests(3), settings(base_url="http://127.0.0.1:9/v1")
    keys = [judge.key_of(request, cfg) for request in asked]
    other, waiting, got = cache.Cache(tmp_path, cfg), threading.Event(), []
    with JudgeServer() as host:
        how = replace(cfg, base_url=host.url)
        with other.claimed(keys[:2]) as mine:
            assert mine == set(keys[:2])
            thread = threading.Thread(target=lambda: (waiting.set(), got.extend(judge.ask(asked, how, tmp_path))))
            thread.start()
            waiting.wait()
            while host.tried < 1:
                time.sleep(0.01)
            time.sleep(0.1)
            assert host.tried == 1  # the third alone
            other.add(keys[0], Reply("theirs", None, "stop", 1, 1, "gpt-test", None))
        thread.join()
        assert texts(got) == ["theirs", *expected(asked)[1:]] and host.tried == 3 - 1
    (tmp_path / f"{next(tmp_path.glob('*.jsonl')).stem}.1-dead.asking").write_text(
        "\n".join(keys)
    )  # nobody holds its lock
    with cache.Cache(tmp_path / "..", cfg).claimed([]) as nothing:
        assert nothing == set()
    key = judge.key_of(requests(4)[3], cfg)
    (left,) = tmp_path.glob("*.asking")
    left.write_text(key)
    with other.claimed([key]) as mine:
        assert mine == {key} and not left.exists()


def test_two_processes_may_add_to_one_cache(tmp_path):
    """Two clients at once over one folder: every line is whole, each finds its own replies."""
    with JudgeServer() as host:
        cfg, parts = settings(base_url=host.url), (requests(40)[:20], requests(40)[20:])
        threads = [threading.Thread(target=judge.ask, args=(part, cfg, tmp_path)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        replies = judge.ask(requests(40), cfg, tmp_path)
    assert all(reply.cached for reply in replies) and texts(replies) == expected(requests(40))


# ---- items in error


def test_one_that_fails_for_good_is_an_error_and_not_cached(tmp_path):
    """A reply that stays malformed is that item's error; a later start asks for it again."""

    def bad(number, body):
        return server.text("{") if body["messages"][0]["content"] == "which is better, pair 3?" else None

    with JudgeServer(mishap=bad) as host:
        cfg = settings(base_url=host.url, retries=2)
        replies = judge.ask(requests(6), cfg, tmp_path)
        assert [reply.error is None for reply in replies] == [True] * 3 + [False] + [True] * 2
        assert "a malformed reply" in replies[3].error and "\n" not in replies[3].error
        assert host.tried == 5 + 3
        host.mishap = lambda number, body: None
        assert texts(judge.ask(requests(6), cfg, tmp_path)) == expected(requests(6))
        check_paid_once(host, requests(6))


def test_a_request_that_the_server_cannot_take_is_not_tried_again(tmp_path):
    """A prompt beyond the context, and text that is no Unicode, are errors at once."""
    too_long = server.status(400, "This model's maximum context length is 8192 tokens.")
    asked = [*requests(2), Request(({"role": "user", "content": "half a pair: \ud83d"},))]
    replies, host = run(tmp_path, asked, lambda n, body: too_long if "pair 1" in str(body) else None)
    assert replies[0].error is None and host.tried == 2
    assert replies[1].error == "HTTP 400: This model's maximum context length is 8192 tokens."
    assert replies[2].error.startswith("the text cannot be sent")


@pytest.mark.parametrize(
    ("given", "max_tokens", "reason"),
    [(None, 3, "length"), ("", 3, "length"), (None, 4, None), ({"type": "length"}, 4, "length"), ("stop", 3, "stop")],
)
def test_a_reply_of_as_many_tokens_as_allowed_was_cut(tmp_path, given, max_tokens, reason):
    """Where the server does not say why a reply of 3 tokens ended, its count does; an object's type is its word."""

    def silent(number, body):
        answer = completion(body, "I say")
        answer["choices"][0]["finish_reason"] = given
        return server.text(json.dumps(answer))

    (reply,), _ = run(tmp_path, requests(1, max_tokens=max_tokens), silent)
    assert (reply.output_tokens, reply.finish_reason) == (3, reason)


def test_a_judge_that_says_nothing_has_said_so(tmp_path):
    """Null content is a reply: a refusal is its text; one cut while it thought is empty, without the field too, and was paid for."""

    def mute(number, body):
        answer = completion(body, None)
        if "pair 0" in str(body):
            answer["choices"][0]["message"]["refusal"] = "I will not judge this."
        else:
            answer["choices"][0]["finish_reason"] = "length"
        if "pair 2" in str(body):
            del answer["choices"][0]["message"]["content"]
        return server.text(json.dumps(answer))

    replies, host = run(tmp_path, requests(3), mute)
    assert texts(replies) == ["I will not judge this.", "", ""] and replies[2].finish_reason == "length"
    assert host.tried == 3


def test_a_server_that_is_not_well_ends_it(tmp_path):
    """Where one request after the other fails, ten are enough to say so."""
    with pytest.raises(UserError, match="10 requests in a row failed, the last with: HTTP 500: out of memory"):
        run(tmp_path, requests(50), lambda n, _: server.status(500, "out of\nmemory"), retries=0)


# ---- log-probs


def test_log_probs_that_the_server_leaves_out_are_none(tmp_path):
    """A server that ignores the fields gives text alone."""
    with JudgeServer(logprobs=False) as host:
        replies = judge.ask(requests(3, top_logprobs=5), settings(base_url=host.url), tmp_path)
    assert [reply.top_logprobs for reply in replies] == [None] * 3


@pytest.mark.parametrize("code", [400, 422])
def test_log_probs_that_the_server_refuses_are_found_out_once(tmp_path, code):
    """After the first refusal no request asks for them, in this call and the next of the same account."""
    refusal = server.status(code, "Unsupported fields in the request: {'logprobs', 'top_logprobs'}")
    account = Account()
    with JudgeServer(mishap=lambda n, body: refusal if "logprobs" in body else None) as host:
        cfg = settings(base_url=host.url, concurrency=1)
        for asked in (requests(4, top_logprobs=5), requests(6, top_logprobs=5)):
            replies = judge.ask(asked, cfg, tmp_path, account)
            assert [reply.top_logprobs for reply in replies] == [None] * len(asked)
            assert texts(replies) == expected(asked)
        assert host.tried == 6 + 1


def test_log_probs_that_make_no_sense_are_left_out():
    """NaN and infinite ones, tokens that are none; equal texts add up, one that is listed twice does not; nothing left is None."""

    def first(*entries):
        tops = [{"token": token, "logprob": logprob} for token, logprob in entries]
        return client._first_token({"logprobs": {"content": [{"top_logprobs": tops}]}})

    assert first(("A", -1), ("A", -1), ("B", math.nan), ("C", -math.inf), (None, -1.0), ("D", True)) == {"A": -1.0}
    assert first(("A", math.log(0.2)), ("A", math.log(0.3))) == {"A": pytest.approx(math.log(0.5))}
    assert first() is None
    for other in ({}, {"logprobs": None}, {"logprobs": {"content": []}}, {"logprobs": {"content": "x"}}):
        assert client._first_token(other) is None


def test_a_model_that_takes_no_max_tokens_is_given_the_other_name(tmp_path):
    """The vendor's later models want max_completion_tokens; found out once."""
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    refuse = lambda n, body: server.status(400, message) if "max_tokens" in body else None  # noqa: E731
    replies, host = run(tmp_path, requests(4), refuse, concurrency=1)
    assert texts(replies) == expected(requests(4))
    assert host.tried == 5 and host.bodies[-1]["max_completion_tokens"] == 100


# ---- servers as they are


REFUSALS = {
    "temperature": (
        400,
        "Unsupported value: 'temperature' does not support 0 with this model.",
        "temperature",
        "temperature",
    ),
    "by param": (400, "Unsupported parameter.", "temperature", "temperature"),
    "thinking": (422, "`temperature` may only be set to 1 when thinking is enabled", None, "temperature"),
    "fails": (500, "temperature is not supported by this backend", None, "temperature"),
    "o-series": (400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", None, "max_tokens"),
    "403": (403, "You are not allowed to request logprobs from this model.", None, "logprobs"),
    "404": (404, "logprobs: no such field", None, "logprobs"),
    "429": (429, "logprobs cannot be had now", None, "logprobs"),
    "500": (500, "logprobs broke the sampler", None, "logprobs"),
    "501": (501, "top_logprobs: not implemented", None, "logprobs"),
    "503": (503, "log probs are off", None, "logprobs"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_field_that_is_refused_is_left_out_at_once(tmp_path, name, capsys):
    """The first refusal, whatever its status, is the only one: without retries or waits the rest goes without the field, and what
    that changes is said."""
    status, message, param, field = REFUSALS[name]
    refuse = server.status(status, message, headers={"Retry-After": "60"}, param=param)
    asked = requests(4, top_logprobs=5)
    began = time.monotonic()
    replies, host = run(tmp_path, asked, lambda n, body: refuse if field in body else None, concurrency=1)
    assert texts(replies) == expected(asked) and host.tried == 5 and time.monotonic() - began < 5
    dropped = () if field == "max_tokens" else (field,)
    assert {reply.dropped for reply in replies} == {dropped}
    noted = {"temperature": "takes no judge.temperature=0.0", "logprobs": "gives no log-probs", "max_tokens": ""}
    assert noted[field] in capsys.readouterr().out
    summary = judge.facts(asked, replies, settings(base_url=host.url))
    own = ["the judge's temperature was the server's own"]
    assert judge.notes(summary) == (own if field == "temperature" else [])
    assert summary["dropped"] == list(dropped) and summary["temperature"] == (None if field == "temperature" else 0.0)
    assert [reply.dropped for reply in judge.ask(asked, settings(), tmp_path / "cache")] == [dropped] * 4


def test_a_refusal_in_a_200_is_one(tmp_path):
    """Some proxies answer 200 with the error inside."""
    refuse = server.text('{"error": {"message": "logprobs are not supported", "code": 400}}')
    replies, host = run(
        tmp_path, requests(3, top_logprobs=5), lambda n, b: refuse if "logprobs" in b else None, concurrency=1
    )
    assert texts(replies) == expected(requests(3)) and host.tried == 4


def test_all_refusals_one_after_the_other(tmp_path):
    """A server that takes nothing but messages names one field at a time, then two at once."""

    def refuse(number, body):
        if body["messages"][0]["role"] == "system":
            return server.status(
                400, "Unsupported value: 'messages[0].role' does not support 'system' with this model."
            )
        if "max_tokens" in body:
            return server.status(400, "Use 'max_completion_tokens' instead of 'max_tokens'.")
        return (
            server.status(400, "Unsupported: logprobs, temperature")
            if {"temperature", "logprobs"} & set(body)
            else None
        )

    asked = [Request(({"role": "system", "content": "Judge."}, *one.messages), None, 5) for one in requests(3)]
    replies, host = run(tmp_path, asked, refuse, concurrency=1)
    assert [reply.error for reply in replies] == [None] * 3 and host.tried == 3 + 3
    assert replies[0].dropped == ("temperature", "logprobs", "system")
    assert host.bodies[-1] == {
        "model": "gpt-test",
        "messages": [{"role": "user", "content": "Judge.\n\nwhich is better, pair 2?"}],
        "stream": False,
        "max_completion_tokens": 100,
    }


SYSTEM = [
    (400, "System role not supported"),
    (500, "Jinja Exception: System role not supported"),
    (400, "Conversation roles must alternate user/assistant/user/assistant/..."),
    (400, "Developer instruction is not enabled for models/gemma-3-27b-it"),
    (400, "Only user and assistant roles are supported!"),
    (422, "messages.0.role: Input should be 'user' or 'assistant'"),
    (400, 'messages: Unexpected role "system".'),
]


@pytest.mark.parametrize(("status", "message"), SYSTEM)
def test_a_server_that_takes_no_system_message(tmp_path, status, message):
    """Its text goes before the user's from the first refusal on; with judge.system=user from the start."""
    refuse = server.status(status, message)
    asked = [Request(({"role": "system", "content": "Judge."}, *one.messages)) for one in requests(3)]
    mishap = lambda n, body: refuse if body["messages"][0]["role"] == "system" else None  # noqa: E731
    replies, host = run(tmp_path, asked, mishap, concurrency=1)
    assert [reply.dropped for reply in replies] == [("system",)] * 3 and host.tried == 4
    asked_as_user, host = run(tmp_path, asked, mishap, system="user", concurrency=1)
    assert texts(asked_as_user) == texts(replies) and host.tried == 3 and asked_as_user[0].dropped == ()
    assert host.bodies[0]["messages"] == [{"role": "user", "content": "Judge.\n\nwhich is better, pair 0?"}]


def test_errors_that_only_repeat_the_request_change_nothing(tmp_path):
    """A 500 with the request in it, and a prompt beyond the context, are no refusals of a field."""
    echo = server.status(500, "worker died on {'temperature': 0.0, 'max_completion_tokens': None}")
    replies, host = run(tmp_path / "a", requests(4), seldom(echo))
    assert texts(replies) == expected(requests(4)) and all("temperature" in body for body in host.bodies)
    long = server.status(400, "'max_tokens' or 'max_completion_tokens' is too large: 100. Context length: 90.")
    replies, host = run(tmp_path / "b", requests(1), lambda n, _: long)
    assert replies[0].error.startswith("HTTP 400") and host.tried == 1


def test_what_is_sent(tmp_path):
    """stream is false; temperature=null is not sent; extra_body goes with each request."""
    body = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    _, host = run(tmp_path, requests(1), temperature=None, extra_body=body)
    sent = {"model": "gpt-test", "messages": list(requests(1)[0].messages), "stream": False, "max_tokens": 100}
    assert host.bodies == [sent | body]


def test_a_query_in_the_url_is_kept(tmp_path, monkeypatch):
    """Azure's form: the path goes on before the query, which comes with each request, and the key in its header too."""
    with JudgeServer() as host:
        url = f"{host.url}/?api-version=2024-06-01&x=a%20b"
        replies = judge.ask(requests(2), settings(base_url=url), tmp_path)
        assert texts(replies) == expected(requests(2))
        assert host.queries == {"api-version=2024-06-01&x=a+b"} and host.api_keys == {SECRET}


CONTENTS = {
    "parts": ({"content": [{"type": "text", "text": "[["}, {"type": "text", "text": "A]]"}]}, "[[A]]"),
    "thinking": ({"content": [{"type": "thinking", "thinking": "[[B]]"}, {"type": "text", "text": "[[A]]"}]}, "[[A]]"),
    "strings": ({"content": ["[[A]]"]}, "[[A]]"),
    "no parts": ({"content": []}, ""),
    "reasoning alone": ({"role": "assistant", "reasoning_content": "[[B]]"}, ""),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_content_in_other_forms(tmp_path, name):
    """A list of parts is their text without the thinking; a message of reasoning alone has said nothing."""
    message, text = CONTENTS[name]

    def other(number, body):
        answer = completion(body, "")
        answer["choices"][0]["message"] = message
        return server.text(json.dumps(answer))

    replies, host = run(tmp_path, requests(1), other)
    assert texts(replies) == [text] and host.tried == 1


# ---- everybody's errors


FATAL = {
    "401": (
        server.status(401, f"Incorrect API key provided: {SECRET}"),
        r"no access with the key in TEST_JUDGE_CRED.*\*\*\*",
    ),
    "403": (server.status(403, "no"), "no access .*HTTP 403"),
    "404": (
        server.status(404, "The model `gpt-test` does not exist."),
        r"judge.model=gpt-test: not found there \(HTTP 404",
    ),
    "501": (server.status(501, "Unsupported method"), "not found there"),
    "page": (server.text("<!doctype html><p>Hello", {"Content-Type": "text/html"}), "a web page; give the API's URL"),
    "404 page": (server.text("<html>no</html>", {"Content-Type": "text/html"}, code=404), "HTTP 404: a web page"),
    "quota": (server.status(429, "You exceeded your quota", code="insufficient_quota"), "out of credit"),
    "402": (server.status(402, "Insufficient Balance"), "out of credit"),
    "tomorrow": (server.status(429, headers={"Retry-After": "86400"}), "asks for a 86400 s wait"),
}


@pytest.mark.parametrize("name", FATAL)
def test_what_no_request_would_survive_ends_it_at_once(tmp_path, name):
    """One line without the key; what was answered before is kept."""
    mishap, message = FATAL[name]
    asked = requests(20)
    with JudgeServer(mishap=lambda n, _: mishap if n >= 3 else None) as host:
        cfg = settings(base_url=host.url, concurrency=2)
        with pytest.raises(UserError, match=message) as caught:
            judge.ask(asked, cfg, tmp_path)
        assert host.tried <= 5
        line = str(caught.value)
        assert "\n" not in line and SECRET not in line and "replies so far are cached" in line
        host.mishap = lambda number, body: None
        assert texts(judge.ask(asked, cfg, tmp_path)) == expected(asked)
        check_paid_once(host, asked)


UNKNOWN = {
    "code": server.status(400, "no", code="model_not_found"),
    "words": server.status(400, "Invalid model name passed in model=gpt-test"),
    "detail": server.text("{\"detail\": \"Server is pinned to 'other'; requested 'gpt-test'.\"}", code=400),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_model_ends_it_soon(tmp_path, name):
    """Servers that answer 400 for an unknown model: one line has their reason; the vendor's code ends it at once."""
    message, most = ("not found there", 3) if name == "code" else ("10 requests in a row failed, the last with", 11)
    with JudgeServer(mishap=lambda n, _: UNKNOWN[name]) as host:
        with pytest.raises(UserError, match=rf"{message}.*HTTP 400: .*{'no' if name == 'code' else 'gpt-test'}"):
            judge.ask(requests(20), settings(base_url=host.url, concurrency=2), tmp_path)
        assert host.tried <= most


def test_settings_that_the_server_refuses_end_it_soon(tmp_path):
    """Where the server refuses whatever is asked ten refusals are enough."""
    refuse = server.status(400, "Unsupported value: 'temperature' does not support 0 with this model.")
    with pytest.raises(UserError, match="10 requests in a row failed, the last with: HTTP 400: Unsupported value"):
        run(tmp_path, requests(50), lambda n, _: refuse)


def test_nobody_at_the_url(tmp_path):
    """A port where nobody ever listened is a wrong URL after a few tries, however patient the settings are."""
    host = JudgeServer().start()
    host.die()
    with pytest.raises(UserError, match=r"judge.base_url=.*: cannot be reached \(.*Refused"):
        judge.ask(requests(3), settings(base_url=host.url, retries=1000), tmp_path)


def test_a_server_that_never_says_a_word(tmp_path):
    """One that takes requests and lets all of them hang is given up after a few tries, however patient the settings are."""
    with pytest.raises(
        UserError, match=r"cannot be reached \(no (reply within judge.timeout=0.3 seconds|connection in time)\)"
    ):
        run(tmp_path, requests(9), lambda n, _: server.slow(30), timeout=0.3, retries=1000)


def test_the_vendor_wants_a_key(tmp_path):
    """Without base_url a key must be set, and none but a key; a local server needs none."""
    with pytest.raises(UserError, match="judge.api_key_env=OPENAI_API_KEY: no such environment variable"):
        judge.ask(requests(1), settings(api_key_env="OPENAI_API_KEY"), tmp_path)
    with JudgeServer() as host:
        (reply,) = judge.ask(requests(1), settings(base_url=host.url, api_key_env="OPENAI_API_KEY"), tmp_path)
    assert reply.error is None and SECRET not in str(host.keys)


def test_a_key_that_is_none(tmp_path, monkeypatch):
    """A variable with two lines in it stops before anything is sent, and its value is not shown."""
    monkeypatch.setenv("TEST_JUDGE_CREDENTIAL", f"{SECRET}\nmore")
    with pytest.raises(UserError, match="the variable's value is not a key") as caught:
        judge.ask(requests(1), settings(base_url="http://127.0.0.1:9/v1"), tmp_path)
    assert SECRET not in str(caught.value)


def test_no_library(tmp_path, monkeypatch):
    """Where openai is not installed one line says what to install."""
    monkeypatch.setattr(client, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[eval\]'"):
        judge.ask(requests(1), settings(base_url="http://127.0.0.1:9/v1"), tmp_path)


def test_keys_are_in_no_file(tmp_path, capfd):
    """A server that repeats the key in replies and errors: neither the cache, nor a reply, nor what is printed has it."""
    leak = server.status(400, f"bad request of {SECRET}")
    with JudgeServer(answer=lambda body: f"[[A]] {SECRET}", mishap=seldom(leak, 2)) as host:
        replies = judge.ask(requests(6), settings(base_url=host.url), tmp_path)
    assert {reply.error for reply in replies} == {None, "HTTP 400: bad request of ***"}
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert written and SECRET.encode() not in written
    assert SECRET not in str(replies) + "".join(capfd.readouterr())


def test_a_cache_that_cannot_be_written(tmp_path):
    """A file in the place of the folder is one line."""
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="use another cache_dir"):
        judge.ask(requests(1), settings(base_url="http://127.0.0.1:9/v1"), tmp_path / "cache")


# ---- cost


def test_an_estimate_above_max_cost_is_refused(tmp_path, capsys):
    """4 requests of 6 tokens and 100 out at $30 and $60 a million may cost $0.025: more than a cent, and nothing is asked."""
    with JudgeServer() as host:
        cfg = settings(base_url=host.url, price_in=30.0, price_out=60.0, max_cost=0.01)
        with pytest.raises(UserError, match=r"judge.max_cost=0.01: 4 requests may cost \$0.02.*raise it"):
            judge.ask(requests(4), cfg, tmp_path)
        assert host.tried == 0
    assert "about 24 tokens in, at most 400 out, about $0.02 if all are that long" in capsys.readouterr().out


def test_it_stops_before_max_cost_is_passed(tmp_path):
    """A server that counts ten times the tokens of the estimate: whatever the concurrency, what it bills stays below
    max_cost; the cache has all that was paid for, and a higher max_cost resumes from there."""

    def dear(number, body):
        answer = completion(body, verdict(body)) | {"usage": {"prompt_tokens": 40, "completion_tokens": 100}}
        return lambda handler: handler.deliver(body, answer)

    each = (40 * 30 + 100 * 60) / 1e6
    asked = requests(40)
    with JudgeServer(mishap=dear) as host:
        cfg = settings(base_url=host.url, price_in=30.0, price_out=60.0, max_cost=0.26, concurrency=16)
        with pytest.raises(UserError, match=r"judge.max_cost=0.26: reached after \d+ of 40 requests"):
            judge.ask(asked, cfg, tmp_path)
        paid = sum(host.delivered.values())
        assert 0.26 - 2 * each < paid * each <= 0.26
        assert texts(judge.ask(asked, replace(cfg, max_cost=10.0), tmp_path)) == expected(asked)
        check_paid_once(host, asked)


def test_calls_of_one_account_share_max_cost(tmp_path):
    """What the first call spent is not there for the second."""
    account = Account()
    with JudgeServer() as host:
        cfg = settings(base_url=host.url, price_in=0.0, price_out=100.0, max_cost=0.0405)
        judge.ask(requests(4), cfg, tmp_path, account)
        assert account.spent == pytest.approx(4 * 3 * 100 / 1e6)
        with pytest.raises(UserError, match=r"4 requests may cost \$0.04 beside the \$0.001 spent"):
            judge.ask(requests(8), cfg, tmp_path, account)


def test_tries_that_came_to_nothing_count_as_paid(tmp_path):
    """Malformed replies were billed, it must be feared: tries end where max_cost could be passed."""
    cfg = {"price_in": 0.0, "price_out": 100.0, "max_cost": 0.055, "concurrency": 1, "retries": 1000}
    with JudgeServer(mishap=lambda n, _: server.text("{")) as host:
        with pytest.raises(UserError, match="judge.max_cost=0.055: reached after 0 of 1"):
            judge.ask(requests(1), settings(base_url=host.url, **cfg), tmp_path)
        assert host.tried == 5  # $0.01 each


# ---- Ctrl-C and ranks


INTERRUPTED = """
import signal, sys, time
from pathlib import Path
from rpo.judging import judge
from tests.helpers.judge_server import requests, settings
judge.GRACE = 0.5
try:
    judge.ask(requests(40), settings(base_url=sys.argv[1]), Path(sys.argv[2]))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_paid_for(tmp_path):
    """Ctrl-C while the server hangs: the process ends long before the requests' timeout, with all replies on disk."""

    def hang(number, body):
        return server.slow(60) if number >= 10 else None

    with JudgeServer(mishap=hang) as host:
        env = script_env(TEST_JUDGE_CREDENTIAL=SECRET)
        arguments = [host.url, str(tmp_path)]
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, *arguments], env=env, stdout=-1, stderr=-3, text=True
        )
        while host.tried < 14 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        message, _ = process.communicate(timeout=30)
        assert message.endswith("interrupted\n") and process.returncode == 0
        (file,) = tmp_path.glob("*.jsonl")
        assert file.read_bytes().count(b"\n") == sum(host.delivered.values()) == 10


RANKS = """
import sys, time
from pathlib import Path
from rpo import dist
from rpo.errors import UserError
from rpo.judging import judge
from tests.helpers.judge_server import expected, requests, settings, texts
judge.BEAT = 0.05
dist.init()
how = settings(base_url=sys.argv[1])
replies = judge.ask(requests(12), how, Path(sys.argv[2]))
assert texts(replies) == expected(requests(12)), replies
try:
    judge.ask(requests(13), settings(base_url=sys.argv[1] + "/wrong"), Path(sys.argv[2]))
except UserError as error:
    assert "not found there" in str(error)
    Path(sys.argv[2], f"rank{dist.rank()}").touch()
dist.leave(0)
"""


@pytest.mark.slow
def test_rank_0_asks_for_all(tmp_path):
    """Two ranks have the same replies, each request was tried once; an error is on both. Signs of life do no harm."""

    def steady(body):
        time.sleep(0.1)
        return verdict(body)

    (tmp_path / "script.py").write_text(RANKS)
    with JudgeServer(answer=steady) as host:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [str(tmp_path / "script.py"), host.url, str(tmp_path / "cache")]
        subprocess.run(
            command, env=script_env(TEST_JUDGE_CREDENTIAL=SECRET), check=True, capture_output=True, timeout=120
        )
        check_paid_once(host, requests(12))
    assert (tmp_path / "cache" / "rank0").exists() and (tmp_path / "cache" / "rank1").exists()


# ---- a real server


def save_judge(folder):
    """A Llama that says [[A]] to every prompt: with layers that add nothing each token alone decides what follows it."""
    tokenizer = task.word_tokenizer(["[user]", "[assistant]", "[system]", "[[A]]", *WORDS], TEMPLATE)
    lm = make_lm(vocab_size=len(tokenizer), hidden_size=64, max_position_embeddings=4096)
    after = {"[assistant]": "[[A]]", "[[A]]": tokenizer.eos_token}
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        lm.model.norm.weight.fill_(1)
        lm.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), 64))
        lm.lm_head.weight.zero_()
        for one, following in after.items():
            lm.lm_head.weight[tokenizer.convert_tokens_to_ids(following), tokenizer.convert_tokens_to_ids(one)] = 1
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def served(folder, port):
    """transformers' own server with the model in `folder`, once it answers."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen([*command, "--device", "cpu"], env=script_env(), stdout=-3, stderr=-3)
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended"
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_real_server_with_a_real_model(tmp_path, monkeypatch):
    """`transformers serve` with a tiny Llama: verdicts in words, no log-probs, an unknown model in one line; killed midway
    and started again on its port, it has answered all in the end."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="transformers[serving] is not installed")
    save_judge(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cfg = settings(model=str(tmp_path / "model"), base_url=f"http://127.0.0.1:{port}/v1", timeout=60.0, concurrency=2)
    asked = requests(60, top_logprobs=2)
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.2)
    monkeypatch.setattr(_base_client, "MAX_RETRY_DELAY", 20.0)  # seconds: the server takes several to start
    with served(tmp_path / "model", port) as process:
        with pytest.raises(UserError, match=r"(not found there|in a row failed).*HTTP 40"):
            judge.ask(asked, replace(cfg, model="elsewhere"), tmp_path / "cache")
        done = []
        thread = threading.Thread(target=lambda: done.extend(judge.ask(asked, cfg, tmp_path / "cache")))
        thread.start()
        while sum(path.read_bytes().count(b"\n") for path in (tmp_path / "cache").iterdir()) < 10:
            time.sleep(0.01)
        process.kill()
    time.sleep(1)
    assert thread.is_alive()
    with served(tmp_path / "model", port):
        thread.join(120)
    assert texts(done) == ["[[A]]"] * 60
    assert {reply.top_logprobs for reply in done} == {None} and {reply.finish_reason for reply in done} == {"stop"}
    assert all(reply.input_tokens > 0 and reply.output_tokens > 0 for reply in done)
