"""Concurrent requests to a judge, with a cache of replies and a limit on cost."""

import asyncio
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist
from tqdm import tqdm

from rpo import dist
from rpo.errors import UserError
from rpo.judging.cache import Cache, key_of
from rpo.judging.client import KEPT, Account, MalformedError, Reply, Request, Server, check, tokens_in, url_of
from rpo.judging.settings import Asked
from rpo.text import redacted

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds after a malformed reply: doubled each time, and jittered
MALFORMED = 10  # retries after a malformed reply at most, since each may be billed
GRACE = 5.0  # seconds that Ctrl-C waits for pending replies, which are paid for
LAST_WAIT = 60.0  # the same after a fatal error
WAIT = 0.5  # seconds between two looks at what another process that asks the same has got
BEAT = 60.0  # seconds between heartbeats to the other ranks, whose wait has a limit


def ask(requests: Sequence[Request], judge: Asked, cache: Path, account: Account | None = None) -> list[Reply]:
    """The replies, in the order of the requests, on all ranks; rank 0 sends those that are not in the `cache` folder, and
    waits for those that another process is asking for.

    A request that still fails after judge.retries has Reply.error. Raises UserError if all would fail (no such model, no
    access, wrong URL, a server that stays down) or judge.max_cost is too low; earlier replies are in the cache. Calls with
    the same `account` share max_cost.
    """
    account = account or Account()
    if not torch_dist.is_initialized() or dist.world_size() == 1:
        return _ask(requests, judge, cache, account, lambda: None)
    outcome = None
    if dist.is_main():
        try:
            outcome = _ask(requests, judge, cache, account, _heartbeat())
        except Exception as error:
            outcome = error
        dist.broadcast(False)
    else:
        while dist.broadcast(None):
            pass
    return dist.on_main(_unwrap, outcome)


def facts(requests: Sequence[Request], replies: Sequence[Reply], judge: Asked) -> dict:
    """The judge, its settings, and counts, tokens and dollars of the replies; "cost_now" is of those not cached.

    Equal requests count once, the last of them. Costs are at judge.price_in and price_out, null without them.
    """
    distinct = list({key_of(asked, judge): reply for asked, reply in zip(requests, replies, strict=True)}.values())
    now = [reply for reply in distinct if not reply.cached]
    read, written = _tokens(distinct)
    dropped = sorted({part for reply in distinct for part in reply.dropped})
    return {
        "model": judge.model,
        "served": sorted({reply.model for reply in distinct if reply.model}),
        "base_url": redacted(url_of(judge)),
        "servers": sorted({reply.base_url for reply in distinct if reply.base_url}),
        "temperature": None if "temperature" in dropped else judge.temperature,
        "max_tokens": judge.max_tokens,
        "extra_body": redacted(judge.extra_body),
        "dropped": dropped,
        "requests": len(distinct),
        "cached": len(distinct) - len(now),
        "errors": sum(reply.error is not None for reply in distinct),
        "finish_reasons": dict(Counter(str(reply.finish_reason) for reply in distinct if reply.error is None)),
        "input_tokens": read,
        "output_tokens": written,
        "cost": _cost(read, written, judge),
        "cost_now": _cost(*_tokens(now), judge),
    }


def notes(about: dict) -> list[str]:
    """What a reader of the numbers has to know of the judge, from its `facts`: several models' replies or another server's,
    a refused temperature."""
    named, served = f"judge.model={about['model']}", about["served"]
    earlier = set(about["servers"]) - {about["base_url"]}
    several = f"{named} was served as {' and as '.join(served)}: verdicts may be of several models"
    moved = f"{named} was asked at {', '.join(sorted(earlier))}: its replies were cached"
    temperature = "the judge's temperature was the server's own"
    return [several] * (len(served) > 1) + [moved] * bool(earlier) + [temperature] * ("temperature" in about["dropped"])


def _tokens(replies: Sequence[Reply]) -> tuple[int, int]:
    return sum(reply.input_tokens for reply in replies), sum(reply.output_tokens for reply in replies)


def _heartbeat() -> Callable[[], None]:
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > BEAT:
            last = time.monotonic()
            dist.broadcast(True)

    return beat


def _unwrap(outcome: Any) -> Any:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


# ---- cost


def _cost(tokens_in: int, tokens_out: int, judge: Asked) -> float | None:
    if judge.price_in is None or judge.price_out is None:
        return None
    return (tokens_in * judge.price_in + tokens_out * judge.price_out) / 1e6


def _ceiling(request: Request, judge: Asked) -> float:
    """Dollars that one try can cost at most: a token is at least a byte, and a template adds some to each message."""
    size = sum(len(message["content"].encode(errors="replace")) + 16 for message in request.messages)
    size += 4 * request.characters * (request.prompt is not None)
    return _cost(size, request.max_tokens or judge.max_tokens, judge) or 0.0


def _dollars(cost: float) -> str:
    return f"${cost:.2f}" if cost >= 0.1 else f"${cost:.1g}"


def _announce(num_cached: int, num_elsewhere: int, todo: Sequence[Request], judge: Asked, account: Account) -> None:
    """Prints the number of requests, and the cost of those `todo`. Raises UserError if they may exceed judge.max_cost."""
    read, written = sum(map(tokens_in, todo)), sum(request.max_tokens or judge.max_tokens for request in todo)
    cost = _cost(read, written, judge)
    line = f"{judge.KEY} {judge.model}: {num_cached + num_elsewhere + len(todo)} requests, {num_cached} cached"
    line += f", {num_elsewhere} asked by another process, which is waited for" if num_elsewhere else ""
    if todo:
        line += f", about {read:,} tokens in, at most {written:,} out"
        line += "" if cost is None else f", about {_dollars(cost)} if all are that long"
    print(redacted(line), flush=True)
    if judge.max_cost is not None and account.spent + cost > judge.max_cost:
        before = f" beside the {_dollars(account.spent)} spent" if account.spent else ""
        why = f"{len(todo)} requests may cost {_dollars(cost)}{before} (nothing was sent)"
        raise UserError(
            f"{judge.KEY}.max_cost={judge.max_cost}: {why}; raise it, or lower judge.max_tokens or task.limit"
        )


# ---- all of them


def _ask(
    requests: Sequence[Request], judge: Asked, folder: Path, account: Account, beat: Callable[[], None]
) -> list[Reply]:
    keys = [key_of(request, judge) for request in requests]
    cache, failed, is_announced = Cache(folder, judge), {}, False
    todo = {key: request for key, request in zip(keys, requests, strict=True) if key not in cache.replies}
    if todo:
        check(judge)
    while not is_announced or todo:
        with cache.claimed(todo) as free:
            todo = {key: request for key, request in todo.items() if key not in cache.replies}
            own = {key: request for key, request in todo.items() if key in free}
            if own or not is_announced:
                num_cached = len(set(keys)) - len(todo) - len(failed)
                _announce(num_cached, len(todo) - len(own), list(own.values()), judge, account)
                is_announced = True
            if own:
                failed |= _asked(own, judge, cache, account, beat)
        todo = {key: request for key, request in todo.items() if key not in own}
        if todo:  # another process asks, and may fail, or be killed
            time.sleep(WAIT)
            beat()
    replies = [failed.get(key) or cache.replies[key] for key in keys]
    _note(replies, judge, account)
    return replies


def _note(replies: Sequence[Reply], judge: Asked, account: Account) -> None:
    """Prints, once, what of the requests the server refused, and under which other name it serves the model."""
    named = f"{judge.KEY}.model={judge.model}"
    of = "judge" if judge.KEY == "judge" else "task"
    words = {
        "temperature": f"takes no {of}.temperature={judge.temperature}, and samples as it does by default",
        "logprobs": "gives no log-probs",
        **{name: f"takes no {name}" for name in ("top_p", "top_k", "seed")},
        "system": "takes no system message; what it says stands before the user's message",
    }
    notes = [f"{named} {words[part]}" for part in sorted({part for reply in replies for part in reply.dropped})]
    served = sorted({reply.model for reply in replies if reply.model})
    if served and served != [judge.model]:
        notes.append(f"{named} is served as {' and as '.join(served)}")
    if len(served) > 1 and judge.KEY == "judge":
        notes.append(f"{named}: if these are several models, judge.cache_as=NAME keeps the replies of each apart")
    url = redacted(url_of(judge))
    if earlier := Counter(reply.base_url for reply in replies if reply.base_url not in (None, url)):
        given = (
            f"{named}: {earlier.total()} of {len(replies)} replies were cached, given at {', '.join(sorted(earlier))}"
        )
        notes.append(f"{given}; if {url} serves another model by that name, judge.cache_as=NAME asks it")
    for note in notes:
        if note not in account.notes:
            account.notes.add(note)
            print(redacted(f"note: {note}"), flush=True)


def _asked(
    todo: dict[str, Request], judge: Asked, cache: Cache, account: Account, beat: Callable[[], None]
) -> dict[str, Reply]:
    """The replies that are errors; all others are in the cache.

    They come from tasks of one event loop: Ctrl-C can cancel these; threads would wait until their requests time out.
    """
    server, replies, queue = Server(judge, account), {}, iter(todo.items())
    limit = math.inf if judge.max_cost is None else judge.max_cost
    pending: list[float] = []  # ceilings of the requests being sent, in dollars

    async def work() -> None:
        for key, request in queue:  # shared: each request is taken once
            replies[key] = reply = await settled(request)
            if reply.error is None:
                cache.add(key, reply)

    async def settled(request: Request) -> Reply:
        ceiling, why = _ceiling(request, judge), ""
        for tries in range(min(judge.retries, MALFORMED) + 1):
            while pending and account.spent + sum(pending) + ceiling > limit:
                await asyncio.sleep(0.02)  # most pending requests cost less than their ceilings
            if account.spent + ceiling > limit:
                raise UserError(
                    f"{judge.KEY}.max_cost={judge.max_cost}: reached after {len(replies)} of {len(todo)} requests "
                    f"({_dollars(account.spent)} spent, and the next could exceed it); raise it; {KEPT}"
                )
            pending.append(ceiling)
            try:
                reply = await server.reply(request)
                account.spent += _cost(reply.input_tokens, reply.output_tokens, judge) or 0.0
                return reply
            except MalformedError as error:
                account.spent += ceiling
                why = str(error)
            finally:
                pending.remove(ceiling)
            await asyncio.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**tries) * random.uniform(0.5, 1))
        return server.failed(why)

    interval = 0.2 if sys.stderr.isatty() else 30  # seconds; a log file gets few lines
    with (
        asyncio.Runner() as runner,
        tqdm(total=len(todo), desc=judge.KEY, unit="reply", mininterval=interval) as progress,
    ):
        create = runner.get_loop().create_task
        busy = workers = {create(work()) for _ in range(min(judge.concurrency, len(todo)))}
        grace = GRACE
        try:
            while busy:
                done, busy = runner.run(asyncio.wait(busy, timeout=0.1, return_when=asyncio.FIRST_EXCEPTION))
                beat()
                progress.set_postfix_str(server.note, refresh=False)
                progress.update(len(replies) - progress.n)
                for worker in done:
                    worker.result()
        except Exception:
            grace = LAST_WAIT
            raise
        finally:
            server.stopped = True
            runner.run(_finish(workers, server, grace))
    return {key: reply for key, reply in replies.items() if reply.error is not None}


async def _finish(workers: set[asyncio.Task], server: Server, seconds: float) -> None:
    await asyncio.wait(workers, timeout=seconds)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    await server.close()
