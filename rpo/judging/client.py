"""One try at a judge: a request to a server that speaks OpenAI's API, and what its reply or its refusal means."""

import json
import math
import os
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
PATIENCE = 600.0  # seconds that a server may ask to be left alone
CHARS = 4  # per token, in estimates
KEPT = "what was answered is kept and not asked for again"


@dataclass(frozen=True)
class Request:
    """`messages` to the judge; `top_logprobs` of the reply's first token are wanted (0: none); equal requests are asked
    once, and again for each further `repeat`. `max_tokens` None: judge.max_tokens."""

    messages: Sequence[dict[str, str]]
    max_tokens: int | None = None
    top_logprobs: int = 0
    repeat: int = 0


@dataclass(frozen=True)
class Reply:
    """`top_logprobs` (nats) of the first token, None where the server gives none; `model`: its own name for itself;
    `error`: why there is no reply, after all tries. Tokens are the server's count, or estimated where it has none."""

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
    """What the calls of one evaluation share: dollars spent, whether the server was reached and ever gave a reply, and
    the fields that it refuses."""

    spent: float = 0.0
    reached: bool = False
    answered: bool = False
    refused: set[str] = field(default_factory=set)


def check(judge: Judge) -> None:
    """Raises UserError where nothing could be asked: no library, no key for the vendor."""
    if find_spec("openai") is None:
        raise UserError("judge.model: asking a judge needs the openai library; pip install -e '.[eval]'")
    key = _key(judge)
    if judge.base_url is None and not key:
        raise UserError(
            f"judge.api_key_env={judge.api_key_env}: no such environment variable, and the vendor wants a key; set it, or "
            "give judge.base_url of a server that needs none"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"judge.api_key_env={judge.api_key_env}: the variable's value is no key; set it anew")


def url_of(judge: Judge) -> str:
    """The server's URL, the vendor's where none is given."""
    return (judge.base_url or VENDOR).rstrip("/")


def _key(judge: Judge) -> str:
    return os.environ.get(judge.api_key_env, "").strip()


def tokens_in(request: Request) -> int:
    """An estimate of the request's tokens: a quarter of its characters."""
    return math.ceil(sum(len(message["content"]) for message in request.messages) / CHARS)


class PassingError(Exception):
    """A try that failed and may succeed later: `wait` seconds if the server said so, `paid` where it may be charged; `kind`:
    limited, timeout, unreachable (nothing was sent), broken (no whole reply came back) or another."""

    def __init__(self, why: str, *, wait: float | None = None, paid: bool = False, kind: str = ""):
        super().__init__(why)
        self.wait, self.paid, self.kind = wait, paid, kind


class LastingError(Exception):
    """A request that the server will not answer however often it is asked."""


class FieldError(Exception):
    """A field that the server does not take, and can do without."""


class Server:
    """One server's model, to be tried from many threads."""

    def __init__(self, judge: Judge, account: Account):
        import openai  # takes a second, and a cache may have it all

        self._judge, self._account, self._openai, self._key = judge, account, openai, _key(judge)
        limits = openai.Timeout(judge.timeout, connect=min(10.0, judge.timeout))
        # The library would try again by itself, unseen by the account; it wants some key.
        self._client = openai.OpenAI(api_key=self._key or "none", base_url=url_of(judge), timeout=limits, max_retries=0)

    def close(self) -> None:
        self._client.close()

    def line(self, text: str) -> str:
        """The text on one line, short, without the key: servers repeat it in what they say of it."""
        text = text.replace(self._key, "***") if self._key else text
        return redacted(" ".join(text.split()))[:300]

    def reply(self, request: Request) -> Reply:
        """The reply to one try. Raises PassingError, LastingError, FieldError, and UserError where all requests would fail."""
        body, openai = self._body(request), self._openai
        try:
            response = self._client.chat.completions.with_raw_response.create(**body)
        except openai.APIStatusError as error:
            self._account.reached = True
            raise self._of_status(error, body) from None
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__
            said = self.line(f"{error} {error.__cause__ or ''}")
            sent = cause not in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol", "ProxyError")
            timed_out = isinstance(error, openai.APITimeoutError) and sent
            why = f"no reply within judge.timeout={self._judge.timeout} seconds" if timed_out else said
            raise PassingError(
                why, paid=sent, kind="timeout" if timed_out else "broken" if sent else "unreachable"
            ) from None
        except UnicodeEncodeError as error:
            raise LastingError(f"the text can not be sent ({self.line(str(error))})") from None
        self._account.reached = True
        return self._parsed(request, response.http_response.text)

    def _body(self, request: Request) -> dict:
        judge, refused = self._judge, self._account.refused
        newer = judge.base_url is None or "max_tokens" in refused  # the vendor's later models take no max_tokens
        limit = {"max_completion_tokens" if newer else "max_tokens": request.max_tokens or judge.max_tokens}
        body = {"model": judge.model, "messages": list(request.messages), "temperature": judge.temperature, **limit}
        if request.top_logprobs and "logprobs" not in refused:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return body

    def _of_status(self, error: "openai.APIStatusError", body: dict) -> Exception:
        """What an HTTP error means, as the exception to raise."""
        judge, status, headers = self._judge, error.status_code, error.response.headers
        page = _is_page(error.response.text)
        said = "a web page" if page else self.line(_message(error.body) or error.response.text or "no reason given")
        reason = f"HTTP {status}: {said}"
        where = f"judge.base_url={redacted(url_of(judge))}, judge.model={judge.model}"
        if status in (401, 403):
            key = f"the key in {judge.api_key_env}" if self._key else f"no key: {judge.api_key_env} is not set"
            return UserError(f"{where}: no access with {key} ({reason}); set one that may use the model; {KEPT}")
        refusal = status in (400, 422)
        if status in (404, 405, 501) or (refusal and self._names_model(said, error.body)):
            return UserError(
                f"{where}: not found there ({reason}); mend the name, or the URL (most end in /v1); {KEPT}"
            )
        if status == 402 or (status == 429 and "insufficient_quota" in error.response.text):
            return UserError(f"{where}: out of credit ({reason}); {KEPT}")
        if status in (408, 409, 429) or status >= 500:
            wait = _retry_after(headers)
            if wait is not None and wait > PATIENCE:
                return UserError(f"{where}: asks to wait {wait:.0f} seconds ({reason}); start again then; {KEPT}")
            return PassingError(reason, wait=wait, kind="limited" if status == 429 else "")
        if refusal and "logprobs" in body and "logprob" in said.lower():
            return FieldError("logprobs")
        if refusal and "max_tokens" in body and "max_completion_tokens" in said:
            return FieldError("max_tokens")
        return LastingError(reason)

    def _names_model(self, said: str, body: object) -> bool:
        """Whether a refusal is of the model as such. One that ever answered is there, whatever it says of a request."""
        if self._account.answered:
            return False
        if isinstance(body, dict) and body.get("code") == "model_not_found":
            return True
        about_request = any(word in said.lower() for word in ("token", "context", "logprob", "temperature"))
        return not about_request and (str(self._judge.model) in said or "model" in said.lower())

    def _parsed(self, request: Request, content: str) -> Reply:
        """The reply in a body of HTTP 200. Raises PassingError where it is none, UserError where it is a web page."""
        if _is_page(content):
            raise UserError(
                f"judge.base_url={redacted(url_of(self._judge))}: answers with a web page; give the API's URL (most end in "
                f"/v1); {KEPT}"
            )
        try:
            data = json.loads(content)
            choice = data["choices"][0]
            message, usage = choice["message"], data.get("usage") or {}
            # Null is said by a judge that declines, and by one that thought until max_tokens was reached.
            text = message["content"] if message["content"] is not None else message.get("refusal") or ""
            if not isinstance(text, str):
                raise TypeError("content is no text")
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            why = self.line(f"{type(error).__name__}: {error}")
            raise PassingError(f"a malformed reply ({why}): {self.line(content)[:100]}", paid=True) from None
        self._account.answered = True
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


def _is_page(text: str) -> bool:
    return text.lstrip()[:15].lower().startswith(("<!doctype html", "<html"))


def _message(body: object) -> str:
    """What an error's body says: {"message": ...} of the vendor, other names elsewhere."""
    if not isinstance(body, dict):
        return ""
    return next((str(body[name]) for name in ("message", "detail", "error") if body.get(name)), "")


def _retry_after(headers: Any) -> float | None:
    """Seconds, from either form of Retry-After; None where it is absent or makes no sense."""
    value = headers.get("retry-after", "")
    wait = None
    with suppress(ValueError):
        wait = float(value)
    if wait is None:
        with suppress(ValueError, TypeError):
            wait = parsedate_to_datetime(value).timestamp() - time.time()
    return max(0.0, wait) if wait is not None and math.isfinite(wait) else None


def _first_token(choice: dict) -> dict[str, float] | None:
    """The first token's alternatives with their log-probs; None where the server left them out."""
    found: dict[str, float] = {}
    with suppress(KeyError, TypeError, IndexError):
        for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
            token, logprob = entry["token"], entry["logprob"]
            if isinstance(token, str) and type(logprob) in (int, float) and math.isfinite(logprob):
                found.setdefault(token, float(logprob))
    return found or None
