"""One request to a server that speaks OpenAI's API, and its outcome.

There are three: a reply; an error of this request alone (`Reply.error`); a server that cannot be used (UserError). The openai
library retries what may pass (408, 409, 429, 5xx, no connection, no answer), judge.retries times, and waits as Retry-After says.
"""

import asyncio
import json
import math
import os
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rpo.errors import UserError
from rpo.judging.settings import Judge
from rpo.text import redacted

if TYPE_CHECKING:
    import openai

VENDOR = "https://api.openai.com/v1"
PATIENCE = 120.0  # seconds of Retry-After that are waited; the library waits no longer either
JITTER = 1.0  # seconds over which requests that a rate limit held back are spread
CHARS = 4  # per token, in estimates
FIRST_RETRIES = 2  # of a server that never answered: its URL is wrong, however patient judge.retries is
IN_A_ROW = 10  # failed requests without a reply between them: the server is not well
KEPT = "replies so far are cached"


@dataclass(frozen=True)
class Request:
    """`messages` to the judge, with `top_logprobs` of the reply's first token (0: none). Equal requests are asked once, and
    again for each further `repeat`. `max_tokens` None: judge.max_tokens."""

    messages: Sequence[dict[str, str]]
    max_tokens: int | None = None
    top_logprobs: int = 0
    repeat: int = 0


@dataclass(frozen=True)
class Reply:
    """`top_logprobs` (nats) of the first token, None where the server gives none; `model`: its own name for itself;
    `error`: why there is no reply, after all retries. Tokens are the server's count, or estimated where it has none."""

    text: str
    top_logprobs: dict[str, float] | None
    finish_reason: str | None
    input_tokens: int
    output_tokens: int
    model: str | None
    error: str | None
    cached: bool = False


@dataclass
class Account:
    """What the calls of one evaluation share: dollars spent, whether the server was reached, how many replies it gave, and
    the fields that it refuses."""

    spent: float = 0.0
    reached: bool = False
    replies: int = 0
    refused: set[str] = field(default_factory=set)


class MalformedError(Exception):
    """HTTP 200 without a completion: another try may bring one, and this one may be billed."""


def check(judge: Judge) -> None:
    """Raises UserError where nothing could be asked: no library, no key for the vendor."""
    if find_spec("openai") is None:
        raise UserError("judge.model: asking a judge needs the openai library; pip install -e '.[eval]'")
    key = _key(judge)
    if judge.base_url is None and not key:
        raise UserError(
            f"judge.api_key_env={judge.api_key_env}: no such environment variable, and the vendor needs a key; set it, or "
            "give judge.base_url of a server that needs none"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"judge.api_key_env={judge.api_key_env}: the variable's value is not a key; set it to one")


def url_of(judge: Judge) -> str:
    """The server's URL; the vendor's if judge.base_url is null."""
    return (judge.base_url or VENDOR).rstrip("/")


def _key(judge: Judge) -> str:
    return os.environ.get(judge.api_key_env, "").strip()


def tokens_in(request: Request) -> int:
    """An estimate of the request's tokens: a quarter of its characters."""
    return math.ceil(sum(len(message["content"]) for message in request.messages) / CHARS)


class Server:
    """One server's model, asked from many tasks of one event loop. `stopped`: nothing more is sent; `note`: what is wrong."""

    def __init__(self, judge: Judge, account: Account):
        import openai  # takes a second, and a cache may have it all

        self._judge, self._account, self._openai, self._key = judge, account, openai, _key(judge)
        self._where = f"judge.base_url={redacted(url_of(judge))}"
        self._not_before, self._failed_in_a_row, self.stopped, self.note = 0.0, 0, False, ""
        hooks = {"request": [self._before_try], "response": [self._after_try]}
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none",  # the library insists on one
            base_url=url_of(judge),
            timeout=openai.Timeout(judge.timeout, connect=min(10.0, judge.timeout)),
            max_retries=judge.retries,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks),
        )
        self._first_client = self._client.with_options(max_retries=min(FIRST_RETRIES, judge.retries))

    async def close(self) -> None:
        await self._client.close()

    async def reply(self, request: Request) -> Reply:
        """The reply, or one with `error`. Raises MalformedError, and UserError where all requests would fail."""
        openai, account = self._openai, self._account
        while True:
            reached, replies, options = account.reached, account.replies, self._options(request)
            client = self._client if reached else self._first_client
            try:
                response = await client.chat.completions.with_raw_response.create(
                    model=self._judge.model,
                    messages=list(request.messages),
                    temperature=self._judge.temperature,
                    extra_body=options,
                )
                return self._parsed(request, response.http_response.text)
            except openai.APIStatusError as error:
                status, response = error.status_code, error.response
                if refused := _refused_field(response, options):
                    account.refused.add(refused)
                    continue
                if fatal := self._fatal(response):
                    raise UserError(f"{self._where}, judge.model={self._judge.model}: {fatal}; {KEPT}") from None
                passing = status in (408, 409, 429) or status >= 500
                # A slow queue, which gave others a reply meanwhile, is no failure.
                moved = not reached or (status == 429 and account.replies > replies)
                if not (passing and moved):
                    return self.failed(self._reason(response), of_request=not passing)
            except openai.APIConnectionError as error:
                if reached or not account.reached:  # else it has answered since, and gets all of judge.retries
                    return self._silence(error)
            except UnicodeEncodeError as error:
                return self.failed(f"the text cannot be sent ({self._line(str(error))})", of_request=True)

    def failed(self, why: str, of_request: bool = False) -> Reply:
        """The reply of a request that failed. Raises UserError after many in a row; what is wrong with the request itself
        does not count once the server has replied to others."""
        self._failed_in_a_row += not (of_request and self._account.replies)
        if self._failed_in_a_row >= IN_A_ROW:
            raise UserError(f"{self._where}: {IN_A_ROW} requests in a row failed, the last with: {why}; {KEPT}")
        return Reply("", None, None, 0, 0, None, error=why)

    # ---- every try, the library's retries too

    async def _before_try(self, _request: Any) -> None:
        """Waits as long as the server asked any request to: its limit is one for all."""
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
            if self._fatal(response):
                response.headers["x-should-retry"] = "false"  # the library obeys it
            else:
                self._not_before = max(self._not_before, time.monotonic() + _retry_after(response))

    # ---- what an outcome means

    def _options(self, request: Request) -> dict:
        """The fields of the request's body that not every server takes."""
        newer = self._judge.base_url is None or "max_tokens" in self._account.refused  # the vendor's later models
        options = {"max_completion_tokens" if newer else "max_tokens": request.max_tokens or self._judge.max_tokens}
        if request.top_logprobs and "logprobs" not in self._account.refused:
            options |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return options

    def _reason(self, response: Any) -> str:
        return f"HTTP {response.status_code}: {self._line(_message(response))}"

    def _fatal(self, response: Any) -> str | None:
        """Why every request would be refused, now or soon; None where that is not so."""
        status, reason, wait = response.status_code, self._reason(response), _retry_after(response)
        if status in (401, 403):
            name = self._judge.api_key_env
            key = f"the key in {name}" if self._key else f"no key: {name} is not set"
            return f"no access with {key} ({reason}); set one that may use the model"
        if status in (404, 405, 501) or self._is_about_model(response):
            return f"not found there ({reason}); fix the name, or the URL (most end in /v1)"
        if status == 402 or "insufficient_quota" in response.text:
            return f"out of credit ({reason}); add credit, or judge with another model"
        if wait > PATIENCE:
            return f"the server asks for a {wait:.0f} s wait ({reason}); retry later"
        return None

    def _is_about_model(self, response: Any) -> bool:
        """Whether the model as such is refused. One that ever replied is there, whatever the server says of a request."""
        if response.status_code not in (400, 422) or self._account.replies:
            return False
        text = _message(response).lower()
        about_request = any(word in text for word in ("token", "context", "logprob", "temperature"))
        about_model = "model" in text or str(self._judge.model).lower() in text
        return "model_not_found" in response.text or (about_model and not about_request)

    def _silence(self, error: "openai.APIConnectionError") -> Reply:
        """The failed reply where no whole response came. Raises UserError where no server is there."""
        cause, reached = error.__cause__ or error, self._account.reached
        sent = type(cause).__name__ not in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol", "ProxyError")
        while deeper := cause.__cause__ or cause.__context__:
            cause = deeper  # the system's reason, beneath those of three libraries
        why = self._line(f"{type(cause).__name__}: {cause}")
        if sent and isinstance(error, self._openai.APITimeoutError):
            why = f"no reply within judge.timeout={self._judge.timeout} seconds"
        if not sent or not reached:
            state = "stopped answering" if reached else "cannot be reached"
            raise UserError(f"{self._where}: {state} ({why}); fix the URL or start the server; {KEPT}")
        return self.failed(why)

    def _parsed(self, request: Request, content: str) -> Reply:
        """The reply in a body of HTTP 200. Raises MalformedError where there is none, UserError for a web page."""
        if _is_page(content):
            raise UserError(f"{self._where}: answers with a web page; give the API's URL (most end in /v1); {KEPT}")
        try:
            data = json.loads(content)
            choice = data["choices"][0]
            message, usage = choice["message"], data.get("usage") or {}
            # Null is the content of a judge that declines, and of one that thought until max_tokens was reached.
            text = message["content"] if message["content"] is not None else message.get("refusal") or ""
            if not isinstance(text, str):
                raise TypeError("content is not text")
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            why = self._line(f"{type(error).__name__}: {error}")
            raise MalformedError(f"a malformed reply ({why}): {self._line(content)[:100]}") from None
        self._account.replies += 1
        self._failed_in_a_row = 0
        known = [count if type(count) is int and count >= 0 else None for count in counts]
        reason, model = choice.get("finish_reason"), data.get("model")
        return Reply(
            text=text.replace(self._key, "***") if self._key else text,
            top_logprobs=_first_token(choice) if request.top_logprobs else None,
            finish_reason=reason if isinstance(reason, str) else None,
            input_tokens=tokens_in(request) if known[0] is None else known[0],
            output_tokens=math.ceil(len(text) / CHARS) if known[1] is None else known[1],
            model=model if isinstance(model, str) else None,
            error=None,
        )

    def _line(self, text: str) -> str:
        """The text on one line, short, without the key: servers repeat it in their messages."""
        text = text.replace(self._key, "***") if self._key else text
        return redacted(" ".join(text.split()))[:300]


def _refused_field(response: Any, options: dict) -> str | None:
    """The field that the server refuses and can do without, if that is what its error is about."""
    text = _message(response)
    if response.status_code in (400, 422) and "logprobs" in options and "logprob" in text.lower():
        return "logprobs"
    if response.status_code in (400, 422) and "max_tokens" in options and "max_completion_tokens" in text:
        return "max_tokens"
    return None


def _message(response: Any) -> str:
    """The reason in an error's body: {"error": {"message": ...}} of the vendor, other forms elsewhere."""
    text = response.text
    if _is_page(text):
        return "a web page"
    with suppress(ValueError, RecursionError, AttributeError):
        body = json.loads(text)
        body = body["error"] if isinstance(body.get("error"), dict) else body
        text = next((str(body[name]) for name in ("message", "detail", "error") if body.get(name)), text)
    return text or "no reason given"


def _is_page(text: str) -> bool:
    return text.lstrip()[:15].lower().startswith(("<!doctype html", "<html"))


def _retry_after(response: Any) -> float:
    """Seconds, from either form of Retry-After; 0 where it is absent or makes no sense."""
    value = response.headers.get("retry-after", "")
    for parse in (float, lambda date: parsedate_to_datetime(date).timestamp() - time.time()):
        with suppress(ValueError, TypeError):
            if math.isfinite(wait := parse(value)):
                return max(0.0, wait)
    return 0.0


def _first_token(choice: dict) -> dict[str, float] | None:
    """The first token's alternatives with their log-probs; None where the server left them out."""
    logprobs: dict[str, float] = {}
    with suppress(KeyError, TypeError, IndexError):
        for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
            token, logprob = entry["token"], entry["logprob"]
            if isinstance(token, str) and type(logprob) in (int, float) and math.isfinite(logprob):
                logprobs.setdefault(token, float(logprob))
    return logprobs or None
