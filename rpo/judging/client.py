"""One request to a server with OpenAI's API.

Its outcome is a reply, an error of this request alone (`Reply.error`), or a server that cannot be used (UserError). The openai
library retries transient failures (408, 409, 429, 5xx, no connection, no answer) judge.retries times and obeys Retry-After.
"""

import asyncio
import json
import math
import os
import random
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from rpo.errors import UserError
from rpo.judging.settings import Asked
from rpo.text import LEAST, redacted

if TYPE_CHECKING:
    import openai

VENDOR = "https://api.openai.com/v1"
PATIENCE = 120.0  # seconds: a longer Retry-After is an error
JITTER = 1.0  # seconds over which requests that a rate limit held back are spread
CHARS = 4  # per token, in estimates
FIRST_RETRIES = 2  # until the server has answered once: the URL may be wrong
IN_A_ROW = 10  # failed requests without a reply between them that end the evaluation
KEPT = "replies so far are cached"
# What a server may refuse of a request, by the words of its error. The request is then sent without it: without log-probs,
# at the server's own temperature, with max_completion_tokens for max_tokens, the system message before the user's.
_REFUSALS = {
    "logprobs": re.compile(r"log[ _-]?prob"),
    "max_tokens": re.compile(r"max_completion_tokens"),
    "temperature": re.compile(r"temperature"),
    "top_p": re.compile(r"top_p"),
    "top_k": re.compile(r"top_k"),
    "seed": re.compile(r"\bseed\b"),
    "system": re.compile(
        r"system[\W_]{0,3}(role|message|prompt|instruction)|system\W.{0,30}\brole|role.{0,30}\Wsystem|support\W+(the )?system"
        r"|developer (role|message|instruction)|roles must alternate|only user\b.*\broles|'user'\W+(or )?'assistant'"
    ),
}
_REFUSING = re.compile(
    r"support|not (allowed|enabled|permitted|implemented)|unknown|unrecognized|deprecated|roles must"
)
_MODERATED = re.compile(r"moderat|flagged|guidelines|content.{0,20}(policy|filter|violat)|safety", re.I)
_TOO_LONG = re.compile(r"too large|too long|context (length|window|size)|exceed")  # of a value, or of the text


@dataclass(frozen=True)
class Request:
    """`messages` to the model, with `top_logprobs` of the reply's first token (0: none); or a `prompt`, text or token ids, to be
    completed. Equal requests are sent once, and again for each further `repeat`. `max_tokens` None: judge.max_tokens. `sampling`
    are further fields of this request's body: top_p, seed."""

    messages: Sequence[dict[str, str]]
    max_tokens: int | None = None
    top_logprobs: int = 0
    repeat: int = 0
    prompt: str | tuple[int, ...] | None = None
    sampling: tuple[tuple[str, float | int], ...] = ()

    @property
    def characters(self) -> int:
        if self.prompt is not None:
            return len(self.prompt) * (1 if isinstance(self.prompt, str) else CHARS)
        return sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class Reply:
    """The judge's `text`, or `error`: why there is none after all retries. `top_logprobs` (nats) are of the first token, None if
    the server gives none; `model` is the server's name for it. Tokens are the server's count, else an estimate. `dropped`
    are the parts of the request that the server refused: logprobs, temperature, system; `base_url` is where it came from."""

    text: str
    top_logprobs: dict[str, float] | None
    finish_reason: str | None
    input_tokens: int
    output_tokens: int
    model: str | None
    error: str | None
    cached: bool = False
    dropped: tuple[str, ...] = ()
    base_url: str | None = None
    counted: bool = True  # whether output_tokens is the server's count


@dataclass
class Account:
    """The state that the calls of one evaluation share: dollars spent, whether the server has answered, its number of replies,
    the parts of a request that it refuses, and the notes that were printed."""

    spent: float = 0.0
    reached: bool = False
    replies: int = 0
    refused: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)


class MalformedError(Exception):
    """HTTP 200 without a completion: worth a retry, and possibly billed."""


def check(judge: Asked) -> None:
    """Raises UserError if no request could be sent: no library, no key for the vendor."""
    if find_spec("openai") is None:
        raise UserError(f"{judge.KEY}.model: asking a server needs the openai library; pip install -e '.[eval]'")
    key, name = _key(judge), f"{judge.KEY}.api_key_env={judge.api_key_env}"
    if judge.base_url is None and not key:
        fix = f"set it, or give {judge.KEY}.base_url of a server that needs none"
        raise UserError(f"{name}: no such environment variable, and the vendor needs a key; {fix}")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{name}: the variable's value is not a key; set it to one")


def url_of(judge: Asked) -> str:
    """The server's URL without a query; the vendor's if judge.base_url is null."""
    return urlsplit(judge.base_url or VENDOR)._replace(query="", fragment="").geturl().rstrip("/")


def _key(judge: Asked) -> str:
    return os.environ.get(judge.api_key_env, "").strip()


def tokens_in(request: Request) -> int:
    """An estimate of the request's tokens: a quarter of its characters."""
    return math.ceil(request.characters / CHARS)


class Server:
    """A client of one server, for many tasks of one event loop. `stopped`: send nothing more; `note`: the last HTTP error."""

    def __init__(self, judge: Asked, account: Account):
        import openai  # takes a second, and a cache may have it all

        self._judge, self._account, self._openai, self._key = judge, account, openai, _key(judge)
        self._name = f"{judge.KEY}.base_url={redacted(url_of(judge))}"
        self._not_before, self._failed_in_a_row, self.stopped, self.note = 0.0, 0, False, ""
        hooks = {"request": [self._before_try], "response": [self._after_try]}
        query = dict(parse_qsl(urlsplit(judge.base_url or "").query, keep_blank_values=True))
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none",  # the library insists on one
            base_url=url_of(judge),
            default_query=query,
            default_headers={"api-key": self._key} if self._key and "api-version" in query else {},  # as Azure wants it
            timeout=openai.Timeout(judge.timeout, connect=min(10.0, judge.timeout)),
            max_retries=judge.retries,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks),
        )
        self._first_client = self._client.with_options(max_retries=min(FIRST_RETRIES, judge.retries))
        self.close = self._client.close

    async def reply(self, request: Request) -> Reply:
        """The reply, or one with `error`. Raises MalformedError, and UserError if all requests would fail."""
        openai, account, refused = self._openai, self._account, set()
        while True:
            reached, replies = account.reached, account.replies
            messages, options, dropped = self._parts(request, account.refused | refused)
            client = self._client if reached else self._first_client
            try:
                api, what = client.chat.completions, {"messages": messages}
                if request.prompt is not None:
                    own = request.prompt
                    api, what = client.completions, {"prompt": own if isinstance(own, str) else list(own)}
                response = await api.with_raw_response.create(
                    model=self._judge.model, **what, stream=False, extra_body=options
                )
                if more := _refused(response.http_response):
                    refused |= more
                    continue
                reply = self._parsed(request, response.http_response.text, dropped)
                account.refused |= refused  # only now: an error may quote the words of this request alone
                return reply
            except openai.APIStatusError as error:
                status, response = error.status_code, error.response
                if more := _refused(response):
                    refused |= more
                    continue
                if fatal := self._fatal(response):
                    raise UserError(
                        f"{self._name}, {self._judge.KEY}.model={self._judge.model}: {fatal}; {KEPT}"
                    ) from None
                transient = status in (408, 409, 429) or status >= 500
                # A slow queue, which meanwhile replied to others, is no failure.
                again = not reached or (status == 429 and account.replies > replies)
                if not (transient and again):
                    return self.failed(self._reason(response), of_request=not transient)
            except openai.APIConnectionError as error:
                if reached or not account.reached:  # else it has answered since, and gets all of judge.retries
                    return self._unanswered(error)
            except UnicodeEncodeError as error:
                return self.failed(f"the text cannot be sent ({self._line(str(error))})", of_request=True)

    def failed(self, why: str, of_request: bool = False) -> Reply:
        """The reply of a failed request. Raises UserError after IN_A_ROW of them; errors of the request itself
        (`of_request`) do not count once the server has replied to others."""
        self._failed_in_a_row += not (of_request and self._account.replies)
        if self._failed_in_a_row >= IN_A_ROW:
            raise UserError(f"{self._name}: {IN_A_ROW} requests in a row failed, the last with: {why}; {KEPT}")
        return Reply("", None, None, 0, 0, None, error=why)

    # ---- hooks around every try, including the library's retries

    async def _before_try(self, _request: Any) -> None:
        """Waits until the latest Retry-After of any request: a rate limit holds for all."""
        spread = random.uniform(0, JITTER)
        while time.monotonic() < self._not_before + spread and not self.stopped:
            await asyncio.sleep(0.1)
        if self.stopped:
            raise asyncio.CancelledError

    async def _after_try(self, response: Any) -> None:
        self._account.reached, self.note = True, ""
        if response.status_code >= 400:
            await response.aread()
            self.note = f"HTTP {response.status_code}"
            if _refused(response) or self._fatal(response):
                response.headers["x-should-retry"] = "false"  # the library obeys it
            else:
                self._not_before = max(self._not_before, time.monotonic() + _retry_after(response))

    # ---- outcomes

    def _parts(self, request: Request, refused: set[str]) -> tuple[list[dict[str, str]], dict, tuple[str, ...]]:
        """(messages, the other fields of the body that depend on the judge, what of the request is left out as `refused`)."""
        judge, dropped = self._judge, []
        messages, fields = list(request.messages), dict(judge.extra_body or {})
        for name, value in request.sampling:
            fields |= {} if name in refused else {name: value}
            dropped += [name] * (name in refused)
        newer = judge.base_url is None or "max_tokens" in refused  # the vendor's later models
        fields["max_completion_tokens" if newer else "max_tokens"] = request.max_tokens or judge.max_tokens
        if judge.temperature is not None:
            wanted = {"temperature": judge.temperature}
            fields |= {} if "temperature" in refused else wanted
            dropped += ["temperature"] * ("temperature" in refused)
        if request.top_logprobs:
            wanted = {"logprobs": True, "top_logprobs": request.top_logprobs}
            fields |= {} if "logprobs" in refused else wanted
            dropped += ["logprobs"] * ("logprobs" in refused)
        if messages and (judge.system == "user" or "system" in refused):
            messages, folded = without_system(messages), messages
            dropped += ["system"] * (judge.system == "system" and messages != folded)
        return messages, fields, tuple(dropped)

    def _reason(self, response: Any) -> str:
        return f"HTTP {response.status_code}: {self._line(_message(response))}"

    def _fatal(self, response: Any) -> str | None:
        """The reason, if every request would be refused like this one, else None."""
        status, reason, wait = response.status_code, self._reason(response), _retry_after(response)
        if status == 403 and _MODERATED.search(reason):
            return None
        if status in (401, 403):
            name = self._judge.api_key_env
            key = f"the key in {name}" if self._key else f"no key: {name} is not set"
            return f"no access with {key} ({reason}); set one that may use the model"
        if status in (404, 405, 501) or "model_not_found" in response.text:
            return f"not found there ({reason}); fix the name, or the URL (most end in /v1)"
        if status == 402 or "insufficient_quota" in response.text:
            return f"out of credit ({reason}); add credit, or ask another model"
        if wait > PATIENCE:
            return f"the server asks for a {wait:.0f} s wait ({reason}); retry later"
        return None

    def _unanswered(self, error: "openai.APIConnectionError") -> Reply:
        """The failed reply of a request without a whole response. Raises UserError if there is no server."""
        cause, reached = error.__cause__ or error, self._account.reached
        sent = type(cause).__name__ not in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol", "ProxyError")
        while deeper := cause.__cause__ or cause.__context__:
            cause = deeper  # the system's reason, beneath those of three libraries
        why = self._line(f"{type(cause).__name__}: {cause}")
        if isinstance(error, self._openai.APITimeoutError):
            why = (
                f"no reply within {self._judge.KEY}.timeout={self._judge.timeout} seconds"
                if sent
                else "no connection in time"
            )
        if not sent or not reached:
            state = "stopped answering" if reached else "cannot be reached"
            raise UserError(f"{self._name}: {state} ({why}); fix the URL or start the server; {KEPT}")
        return self.failed(why)

    def _parsed(self, request: Request, content: str, dropped: tuple[str, ...]) -> Reply:
        """The reply in a body of HTTP 200. Raises MalformedError if there is none, UserError for a web page."""
        if _is_page(content):
            raise UserError(f"{self._name}: answers with a web page; give the API's URL (most end in /v1); {KEPT}")
        try:
            data = json.loads(content)
            choice = data["choices"][0]
            if choice.get("error") or choice.get("finish_reason") == "error":  # of the server behind a router
                raise ValueError(str(choice.get("error") or data.get("error") or "finish_reason: error"))
            usage = data.get("usage") or {}
            text = choice["text"] if request.prompt is not None else _text(choice["message"], _reason_of(choice))
            if not isinstance(text, str):
                raise TypeError("the completion is not text")
            read, written = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            why = self._line(f"{type(error).__name__}: {error}")
            raise MalformedError(f"a malformed reply ({why}): {self._line(content)[:100]}") from None
        self._account.replies += 1
        self._failed_in_a_row = 0
        model, limit = data.get("model"), request.max_tokens or self._judge.max_tokens
        return Reply(
            text=self._without_key(text),
            top_logprobs=_first_token(choice) if request.top_logprobs else None,
            finish_reason=_reason_of(choice) or ("length" if written is not None and written >= limit else None),
            input_tokens=tokens_in(request) if read is None else read,
            output_tokens=math.ceil(len(text) / CHARS) if written is None else written,
            model=model if isinstance(model, str) else None,
            error=None,
            dropped=dropped,
            base_url=redacted(url_of(self._judge)),
            counted=written is not None,
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= LEAST else text  # a shorter one is in any text

    def _line(self, text: str) -> str:
        """The text on one line, short, without the key: servers repeat it in their messages."""
        return redacted(" ".join(self._without_key(text).split()))[:300]


def without_system(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The messages with those of the system before the first of the user, in its own message."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    text = "\n\n".join([*system, *(message["content"] for message in others[:1])])
    return [{"role": "user", "content": text}, *others[1:]]


def _refused(response: Any) -> set[str]:
    """The parts of its request that a server's error says it does not take, whatever the status."""
    if response.status_code < 400 and '"choices"' in response.text:
        return set()
    reason, body = _message(response).lower(), json.loads(response.request.content or "{}")  # empty after a redirect
    sent = {name for name in _REFUSALS if name in body}
    sent |= {"system"} if any(message["role"] == "system" for message in body.get("messages", ())) else set()
    named = {name for name in sent if _REFUSALS[name].search(reason)}
    if _TOO_LONG.search(reason):
        named -= {"max_tokens", "system"}
    # An error that may pass can repeat the request's fields; log-probs are not worth waiting for, nor is what it refuses.
    transient = response.status_code in (408, 409, 429) or response.status_code >= 500
    return named & {"logprobs"} if transient and not _REFUSING.search(reason) else named


def _text(message: dict, reason: str | None) -> str:
    """The text of a reply's message: its content, or that of its parts; a judge's thinking is no part of it.

    Null, or none beside other fields or such a `reason`, is the content of a judge that declines and of one that reasoned
    until max_tokens. Raises KeyError, TypeError for another form.
    """
    content, others = message.get("content"), {"content", "refusal", "reasoning", "reasoning_content"}
    if content is None and (others & set(message) or reason in ("length", "content_filter")):
        return message.get("refusal") or ""
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        content = "".join(part["text"] for part in parts if part["type"] in ("text", "output_text"))
    if not isinstance(content, str):
        raise TypeError("content is not text")
    return content


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _message(response: Any) -> str:
    """The reason in an error's body: {"error": {"message": ...}} of the vendor, {"detail": ...} of others, or text."""
    text = response.text
    if _is_page(text):
        return "a web page"
    with suppress(ValueError, RecursionError, AttributeError):
        body = json.loads(text)
        body = body["error"] if isinstance(body.get("error"), dict) else body
        words = [str(body[name]) for name in ("message", "detail", "error") if body.get(name)]
        text = " ".join([*words[:1], *([f"(param: {body['param']})"] if body.get("param") else [])]) or text
    return text or "no reason given"


def _is_page(text: str) -> bool:
    return text.lstrip()[:15].lower().startswith(("<!doctype html", "<html"))


def _retry_after(response: Any) -> float:
    """The seconds of Retry-After; 0 if it is absent or not a number (the library itself waits until a date)."""
    with suppress(ValueError):
        wait = float(response.headers.get("retry-after", ""))
        return wait if math.isfinite(wait) else 0.0
    return 0.0


def _reason_of(choice: dict) -> str | None:
    """Why the reply ended, by the server's word, which may be an object's `type`."""
    reason = choice.get("finish_reason")
    reason = reason.get("type") if isinstance(reason, dict) else reason
    return reason if isinstance(reason, str) and reason.strip().lower() not in ("", "none", "null") else None


def _first_token(choice: dict) -> dict[str, float] | None:
    """The first token's alternatives with their log-probs, those of one text added up; None if the server left them out."""
    logprobs: dict[str, set[float]] = {}
    with suppress(KeyError, TypeError, IndexError):
        for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
            token, logprob = entry["token"], entry["logprob"]
            if isinstance(token, str) and type(logprob) in (int, float) and math.isfinite(logprob):
                logprobs.setdefault(token, set()).add(float(logprob))  # a token that is listed twice counts once
    if any(one > 1e-3 for each in logprobs.values() for one in each):  # probabilities, or percents: no log-probs
        return None
    return {token: log_sum(each) for token, each in logprobs.items()} or None


def log_sum(logprobs: Iterable[float]) -> float:
    """log(sum of exp), -inf of none."""
    logprobs = list(logprobs)
    top = max(logprobs, default=-math.inf)
    return top + math.log(sum(math.exp(one - top) for one in logprobs)) if logprobs and top > -math.inf else -math.inf
