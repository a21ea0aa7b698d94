"""What a judge says: many requests at once to a server that speaks OpenAI's API, each paid for once.

CACHE/DIGEST.jsonl    the replies of one server's model, one object a line: "key", a digest of all that the reply depends
                      on, and "reply". Lines are only ever added, each as soon as its reply is there.
"""

import hashlib
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist
from tqdm import tqdm

from rpo import dist
from rpo.errors import UserError
from rpo.judging.client import (
    KEPT,
    Account,
    FieldError,
    LastingError,
    PassingError,
    Reply,
    Request,
    Server,
    check,
    tokens_in,
    url_of,
)
from rpo.judging.settings import Judge
from rpo.text import redacted

FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0  # seconds before a request is tried again: doubled each time, and jittered
SILENT = ("unreachable", "broken", "timeout")  # kinds of failure in which the server said nothing
NEVER_REACHED = 3  # tries of a server that has not answered yet: its URL is wrong
IN_A_ROW = 10  # requests that fail for good, none answered between: the server is not well
GRACE = 5.0  # seconds that replies on their way, which are paid for, are waited for on Ctrl-C
LAST_WAIT = 60.0  # the same, where an error stops all
BEAT = 60.0  # seconds between signs of life to the other ranks, whose wait has a limit


def ask(requests: Sequence[Request], judge: Judge, cache: Path, account: Account | None = None) -> list[Reply]:
    """The replies, in the order of the requests, on all ranks: rank 0 asks. Those in the `cache` folder are free.

    A request that fails is tried again, judge.retries times; one that fails for good has Reply.error. Raises UserError
    where all would fail (no such model, no access, wrong URL, a server that does not come back) and where judge.max_cost
    is not enough; what was answered by then is in the cache. Calls with one `account` share max_cost.
    """
    account = account or Account()
    if not torch_dist.is_initialized() or dist.world_size() == 1:
        return _ask(requests, judge, cache, account, lambda: None)
    outcome: object = None
    if dist.is_main():
        try:
            outcome = _ask(requests, judge, cache, account, _beating())
        except Exception as error:
            outcome = error
        dist.broadcast(False)
    else:
        while dist.broadcast(None):
            pass
    return dist.on_main(_unwrapped, outcome)


def facts(requests: Sequence[Request], replies: Sequence[Reply], judge: Judge) -> dict:
    """Who was asked, who answered, how, and at what cost: "cost" is of all replies, "cost_now" of those not cached.

    Equal requests count once, the last of them. Costs are dollars at judge.price_in and price_out, null without them.
    """
    distinct = list({key_of(asked, judge): reply for asked, reply in zip(requests, replies, strict=True)}.values())
    now = [reply for reply in distinct if not reply.cached]
    made = {
        "model": judge.model,
        "served": sorted({reply.model for reply in distinct if reply.model}),
        "base_url": redacted(url_of(judge)),
        "temperature": judge.temperature,
        "max_tokens": judge.max_tokens,
        "requests": len(distinct),
        "cached": len(distinct) - len(now),
        "errors": sum(reply.error is not None for reply in distinct),
        "with_logprobs": sum(reply.top_logprobs is not None for reply in distinct),
        "finish_reasons": dict(Counter(str(reply.finish_reason) for reply in distinct if reply.error is None)),
    }
    for name, some in (("", distinct), ("_now", now)):
        tokens = [sum(getattr(reply, f"{way}_tokens") for reply in some) for way in ("input", "output")]
        if not name:
            made |= {"input_tokens": tokens[0], "output_tokens": tokens[1]}
        made[f"cost{name}"] = _cost(*tokens, judge)
    return made


def key_of(request: Request, judge: Judge) -> str:
    """SHA-256 of what a reply depends on: server, model, sampling, all messages and which repeat it is."""
    limits = [judge.temperature, request.max_tokens or judge.max_tokens, request.top_logprobs, request.repeat]
    return _digest([url_of(judge), judge.model, *limits, list(request.messages)])


def _digest(made_of: list) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _beating() -> Callable[[], None]:
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > BEAT:
            last = time.monotonic()
            dist.broadcast(True)

    return beat


def _unwrapped(outcome: Any) -> Any:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


# ---- cost


def _cost(tokens_in: int, tokens_out: int, judge: Judge) -> float | None:
    if judge.price_in is None or judge.price_out is None:
        return None
    return (tokens_in * judge.price_in + tokens_out * judge.price_out) / 1e6


def _most(request: Request, judge: Judge) -> float:
    """Dollars that one try can cost: a token is at least a byte, and a template adds some to each message."""
    size = sum(len(message["content"].encode(errors="replace")) + 16 for message in request.messages)
    return _cost(size, request.max_tokens or judge.max_tokens, judge) or 0.0


def _count(number: int) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.0f}k" if number >= 1e4 else str(number)


def _dollars(cost: float) -> str:
    return f"${cost:.2f}" if cost >= 0.1 else f"${cost:.1g}"


def _announce(num_cached: int, todo: Sequence[Request], judge: Judge, account: Account) -> None:
    """Prints what will be asked. Raises UserError where it may cost more than judge.max_cost leaves."""
    read, written = sum(map(tokens_in, todo)), sum(request.max_tokens or judge.max_tokens for request in todo)
    cost = _cost(read, written, judge)
    line = f"judge {judge.model}: {num_cached + len(todo)} requests, {num_cached} cached"
    if todo:
        line += f", about {_count(read)} tokens in, at most {_count(written)} out"
        line += "" if cost is None else f", about {_dollars(cost)} if all are that long"
    print(redacted(line), flush=True)
    if judge.max_cost is not None and account.spent + cost > judge.max_cost:
        before = f" beside the {_dollars(account.spent)} spent" if account.spent else ""
        raise UserError(
            f"judge.max_cost={judge.max_cost}: {len(todo)} requests may cost {_dollars(cost)}{before} (nothing was asked); raise "
            "it, or lower judge.max_tokens or task.limit"
        )


# ---- cache


def _read(file: Path) -> dict[str, Reply]:
    """The replies by key; a line that can not be read (a kill, a full disk) is left out, with a note."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes() if file.exists() else b""
        if content and not content.endswith(b"\n"):  # or the next reply would stand on the line that a kill cut off
            _append(file, b"\n")
    except OSError as error:
        raise UserError(f"{file}: can not be read or written ({error.strerror}); give another cache_dir") from None
    replies, damaged = {}, 0
    for line in filter(None, content.split(b"\n")):
        try:
            found = json.loads(line)
            replies[found["key"]] = Reply(**found["reply"], error=None, cached=True)
        except (ValueError, KeyError, TypeError):
            damaged += 1
    if damaged:
        print(f"note: {file}: {damaged} damaged line(s), their requests are asked for again", flush=True)
    return replies


def _append(file: Path, line: bytes) -> None:
    """One write to a file opened to append: lines of several processes do not mix."""
    with file.open("ab", buffering=0) as stream:
        written = stream.write(line)
    if written != len(line):
        raise OSError(None, "the disk is full")


def _line(key: str, reply: Reply) -> bytes:
    fields = asdict(reply)
    stored = {name: fields[name] for name in fields if name not in ("error", "cached")}
    return json.dumps({"key": key, "reply": stored}).encode() + b"\n"


# ---- all of them


def _ask(
    requests: Sequence[Request], judge: Judge, cache: Path, account: Account, beat: Callable[[], None]
) -> list[Reply]:
    keys = [key_of(request, judge) for request in requests]
    file = cache / f"{_digest([url_of(judge), judge.model])[:16]}.jsonl"
    known = _read(file)
    todo = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
    if todo:
        check(judge)
    _announce(len(set(keys)) - len(todo), list(todo.values()), judge, account)
    if todo:
        known |= _Work(todo, judge, file, account).done(beat)
    return [known[key] for key in keys]


class _Work:
    """Requests that threads take one by one; what they share is changed under one lock."""

    def __init__(self, todo: dict[str, Request], judge: Judge, file: Path, account: Account):
        self._judge, self._file, self._account, self._requests = judge, file, account, todo
        self._server = Server(judge, account)
        self._waiting = list(reversed(todo))
        self._replies: dict[str, Reply] = {}
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._reserved = 0.0  # dollars that the requests on their way may cost
        self._on_their_way, self._answered, self._failed_in_a_row = 0, 0, 0
        self._not_before = 0.0  # the time that a rate limit asked everybody to wait for
        self._note = ""

    def done(self, beat: Callable[[], None]) -> dict[str, Reply]:
        """All replies. Ctrl-C, or an error that is everybody's, waits a moment for those on their way."""
        count = min(self._judge.concurrency, len(self._requests))
        # Daemons: the interpreter would wait for others when it ends, as long as a request may take.
        threads = [threading.Thread(target=self._run, daemon=True, name=f"judge-{i}") for i in range(count)]
        interval = 0.2 if sys.stderr.isatty() else 30  # seconds; a log file gets few lines
        try:
            with tqdm(total=len(self._requests), desc="judge", unit="reply", mininterval=interval) as progress:
                for thread in threads:
                    thread.start()
                busy = True
                while busy and self._error is None:
                    with self._changed:
                        self._changed.wait(0.1)
                    busy = any(thread.is_alive() for thread in threads)
                    beat()
                    progress.set_postfix_str(self._note, refresh=False)
                    progress.update(len(self._replies) - progress.n)
        finally:
            self._stop.set()
            with self._changed:
                self._changed.notify_all()
            deadline = time.monotonic() + (GRACE if self._error is None else LAST_WAIT)
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - time.monotonic()))
        if self._error is not None:
            raise self._error
        self._server.close()
        return self._replies

    def _run(self) -> None:
        try:
            while (key := self._take()) is not None:
                reply = self._settled(self._requests[key])
                self._give(key, reply)
        except Exception as error:  # everybody's: a UserError, or a bug
            with self._changed:
                self._error = self._error or error
                self._stop.set()
                self._changed.notify_all()

    def _take(self) -> str | None:
        """The next request's key, its cost reserved, once there is money for it; None where nothing is left to do."""
        with self._changed:
            while self._waiting and not self._stop.is_set():
                most = _most(self._requests[self._waiting[-1]], self._judge)
                if self._affordable(most):
                    self._reserved += most
                    self._on_their_way += 1
                    return self._waiting.pop()
                if not self._on_their_way:
                    raise self._too_dear()
                self._changed.wait()  # a reply on its way costs less than was reserved for it, as a rule
            return None

    def _affordable(self, more: float) -> bool:
        limit = self._judge.max_cost
        return limit is None or self._account.spent + self._reserved + more <= limit

    def _too_dear(self) -> UserError:
        return UserError(
            f"judge.max_cost={self._judge.max_cost}: reached after {self._answered} of {len(self._requests)} requests "
            f"({_dollars(self._account.spent)} spent, and the next could pass it); raise it; {KEPT}"
        )

    def _give(self, key: str, reply: Reply | None) -> None:
        """Puts a reply on disk and among the others; None: it was not waited for."""
        if reply is not None and reply.error is None:
            try:
                _append(self._file, _line(key, reply))
            except OSError as error:
                raise UserError(f"{self._file}: can not be written ({error.strerror}); make room; {KEPT}") from None
        with self._changed:
            self._reserved -= _most(self._requests[key], self._judge)
            self._on_their_way -= 1
            if reply is not None:
                self._replies[key] = reply
                self._account.spent += _cost(reply.input_tokens, reply.output_tokens, self._judge) or 0.0
                self._answered += reply.error is None
            self._changed.notify_all()

    def _settled(self, request: Request) -> Reply | None:
        """The reply, or one with its error after the last try; None where all was stopped meanwhile."""
        tries, seen = 0, self._answered
        while self._is_turn():
            try:
                reply = self._server.reply(request)
            except FieldError as error:
                self._account.refused.add(str(error))
                continue
            except LastingError as error:
                return _failed(str(error)) if self._account.answered else self._given_up(error)
            except PassingError as error:
                if error.paid:
                    self._charge(request)
                if error.kind == "limited" and self._answered > seen:  # a slow queue moves, and is no failure
                    tries, seen = 0, self._answered
                if tries == self._judge.retries or self._is_wrong_url(error, tries):
                    return self._given_up(error)
                tries += 1
                self._back_off(error, tries)
                continue
            with self._changed:
                self._failed_in_a_row, self._note = 0, ""
            return reply
        return None

    def _is_wrong_url(self, error: PassingError, tries: int) -> bool:
        return error.kind in SILENT and not self._account.reached and tries + 1 >= NEVER_REACHED

    def _given_up(self, error: PassingError | LastingError) -> Reply:
        """The error of a request that was tried often enough. Raises UserError where it is the server's."""
        where = f"judge.base_url={redacted(url_of(self._judge))}"
        kind = getattr(error, "kind", None)
        if kind == "unreachable" or (kind in SILENT and not self._account.reached):
            what = "stopped answering" if self._account.reached else "can not be reached"
            raise UserError(f"{where}: {what} ({error}); mend the URL or start the server; {KEPT}")
        with self._changed:
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= IN_A_ROW:
                raise UserError(f"{where}: {IN_A_ROW} requests in a row failed, the last with: {error}; {KEPT}")
        return _failed(str(error))

    def _charge(self, request: Request) -> None:
        """Counts a try that came to nothing as paid. Raises UserError where there is no money for another."""
        with self._changed:
            self._account.spent += _most(request, self._judge)
            if not self._affordable(0.0):
                raise self._too_dear()

    def _back_off(self, error: PassingError, tries: int) -> None:
        longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1))
        wait = random.uniform(longest / 2, longest) if error.wait is None else error.wait
        with self._changed:
            self._note = f"waiting {wait:.0f} s: {error}"[:100]
            if error.wait is not None:  # what the server asks of one it means for all
                self._not_before = max(self._not_before, time.monotonic() + wait)
        # Those that waited together do not come back at the same moment.
        self._stop.wait(wait + (0.0 if error.wait is None else random.uniform(0, FIRST_WAIT)))

    def _is_turn(self) -> bool:
        """Waits as long as the server asked all to; False where all was stopped meanwhile."""
        while (left := self._not_before - time.monotonic()) > 0:
            self._stop.wait(left)
            if self._stop.is_set():
                break
        return not self._stop.is_set()


def _failed(why: str) -> Reply:
    return Reply("", None, None, 0, 0, None, why)
