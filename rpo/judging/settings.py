"""The settings of a judge: the group `judge` of an evaluation's settings."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from rpo.errors import require
from rpo.fields import MAY_CHANGE, Count, Field, Share, group, model_validator

# Fields of a request's body that other keys fill, or that the client could not read the reply of.
_OWN_KEYS = {"model": "model", "temperature": "temperature", "max_tokens": "max_tokens"}
_OWN_KEYS |= {"max_completion_tokens": "max_tokens", "logprobs": "verdict", "top_logprobs": "verdict"}
_FIXED = ("messages", "stream", "stream_options", "n")
_Dollars = Annotated[Annotated[float, Field(ge=0)] | None, Field(description="null or dollars, 0 or more"), MAY_CHANGE]


@group
class Judge:
    model: str | None
    base_url: Annotated[
        str | None,
        Field(
            pattern=r"^https?://[^\s/]+\S*$",
            description="http:// or https:// and a server, such as http://localhost:8000/v1",
        ),
        MAY_CHANGE,
    ]
    cache_as: Annotated[str, Field(min_length=1)] | None
    api_key_env: Annotated[str, MAY_CHANGE]
    temperature: Annotated[Annotated[float, Field(ge=0, le=2)] | None, Field(description="null or 0 to 2")]
    max_tokens: Count
    system: Literal["system", "user"]
    extra_body: dict[str, Any] | None
    verdict: Literal["auto", "logprobs", "text"]
    min_mass: Share
    concurrency: Annotated[Count, MAY_CHANGE]
    timeout: Annotated[float, Field(gt=0, le=86400, description="seconds, above 0 and at most a day"), MAY_CHANGE]
    retries: Annotated[int, Field(ge=0, description="at least 0"), MAY_CHANGE]
    price_in: _Dollars
    price_out: _Dollars
    max_cost: _Dollars

    @model_validator(mode="after")
    def _check(self) -> "Judge":
        require(
            self.base_url is None or not urlsplit(self.base_url).path.rstrip("/").endswith("/completions"),
            f"judge.base_url={self.base_url}: expected the URL without /chat/completions (most end in /v1); remove that",
        )
        for name in self.extra_body or {}:
            key = f"judge.extra_body: {name}"
            require(name not in _OWN_KEYS, f"{key} is set by judge.{_OWN_KEYS.get(name)}; give that instead")
            require(name not in _FIXED, f"{key} is what this program sets itself; leave it out")
        # Not a pattern of the field: its error would quote the value, which may be the key itself.
        name = self.api_key_env
        require(
            name.isascii() and name.isidentifier(),
            "judge.api_key_env: expected a variable's name, such as OPENAI_API_KEY; set the key in that variable",
        )
        require(
            self.max_cost is None or None not in (self.price_in, self.price_out),
            f"judge.max_cost={self.max_cost}: needs judge.price_in and judge.price_out to count cost; give both",
        )
        return self
