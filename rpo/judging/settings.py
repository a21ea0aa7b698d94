"""What is asked over OpenAI's API: a judge (the group `judge` of an evaluation's settings), or models that answer (`server`)."""

from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from rpo.errors import require
from rpo.fields import MAY_CHANGE, Count, Field, Share, group, model_validator

# Fields of a request's body that other keys fill, or that the client could not read the reply of.
_OWN_KEYS = {"model": "model", "temperature": "temperature", "max_tokens": "max_tokens"}
_OWN_KEYS |= {"max_completion_tokens": "max_tokens", "logprobs": "verdict", "top_logprobs": "verdict"}
_OF_TASKS = ("top_p", "top_k", "seed")  # where a model answers
_FIXED = ("messages", "prompt", "stream", "stream_options", "n")
_Dollars = Annotated[Annotated[float, Field(ge=0)] | None, Field(description="null or dollars, 0 or more"), MAY_CHANGE]


def check_server(server: Any, key: str) -> None:
    """Raises UserError for a URL, a variable's name or fields of the body that no request can have; `key` is the group's name."""
    require(
        server.base_url is None or not urlsplit(server.base_url).path.rstrip("/").endswith("/completions"),
        f"{key}.base_url={server.base_url}: expected the URL without /chat/completions (most end in /v1); remove that",
    )
    for name in server.extra_body or {}:
        where = f"{key}.extra_body: {name}"
        require(name not in _OWN_KEYS, f"{where} is set by {key}.{_OWN_KEYS.get(name)}; give that instead")
        require(key == "judge" or name not in _OF_TASKS, f"{where} is set by the task's own keys; give those instead")
        require(name not in _FIXED, f"{where} is what this program sets itself; leave it out")
    # Not a pattern of the field: its error would quote the value, which may be the key itself.
    name = server.api_key_env
    require(
        name.isascii() and name.isidentifier(),
        f"{key}.api_key_env: expected a variable's name, such as OPENAI_API_KEY; set the key in that variable",
    )


_Url = Annotated[
    str | None,
    Field(
        pattern=r"^https?://[^\s/]+\S*$",
        description="http:// or https:// and a server, such as http://localhost:8000/v1",
    ),
    MAY_CHANGE,
]


@group
class Asked:
    """A model on a server, and how it is asked."""

    KEY: ClassVar[str] = "judge"  # the group that says so, for errors

    model: str | None
    base_url: _Url
    cache_as: Annotated[str, Field(min_length=1)] | None
    api_key_env: Annotated[str, MAY_CHANGE]
    temperature: Annotated[Annotated[float, Field(ge=0, le=2)] | None, Field(description="null or 0 to 2")]
    max_tokens: Count
    system: Literal["system", "user"]
    extra_body: dict[str, Any] | None
    concurrency: Annotated[Count, MAY_CHANGE]
    timeout: Annotated[float, Field(gt=0, le=86400, description="seconds, above 0 and at most a day"), MAY_CHANGE]
    retries: Annotated[int, Field(ge=0, description="at least 0"), MAY_CHANGE]
    price_in: _Dollars
    price_out: _Dollars
    max_cost: _Dollars

    @model_validator(mode="after")
    def _check(self) -> "Asked":
        check_server(self, self.KEY)
        require(
            self.max_cost is None or None not in (self.price_in, self.price_out),
            f"judge.max_cost={self.max_cost}: needs judge.price_in and judge.price_out to count cost; give both",
        )
        return self


@group
class Judge(Asked):
    verdict: Literal["auto", "logprobs", "text"]
    min_mass: Share


class Answering(Asked):
    """A model that answers prompts."""

    KEY: ClassVar[str] = "server"


@group
class Server:
    """Models that answer, in place of those at model.path: sampling is the task's."""

    model: Annotated[str | list[str], Field(min_length=1, description="one or a list of them")] | None
    base_url: _Url
    api: Literal["chat", "completions"]
    api_key_env: Annotated[str, MAY_CHANGE]
    system: Literal["system", "user"]
    extra_body: dict[str, Any] | None
    concurrency: Annotated[Count, MAY_CHANGE]
    timeout: Annotated[float, Field(gt=0, le=86400, description="seconds, above 0 and at most a day"), MAY_CHANGE]
    retries: Annotated[int, Field(ge=0, description="at least 0"), MAY_CHANGE]

    @model_validator(mode="after")
    def _check(self) -> "Server":
        check_server(self, "server")
        require(
            self.model is None or self.base_url is not None, f"server.model={self.model}: where? give server.base_url"
        )
        return self

    def asked(self, model: str, temperature: float, max_tokens: int) -> Answering:
        """How one of the models is asked."""
        return Answering(
            model=model,
            base_url=self.base_url,
            cache_as=None,
            api_key_env=self.api_key_env,
            temperature=temperature,
            max_tokens=max_tokens,
            system=self.system,
            extra_body=self.extra_body,
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
            price_in=None,
            price_out=None,
            max_cost=None,
        )
