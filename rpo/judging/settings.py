"""The settings of a judge: the group `judge` of an evaluation's settings."""

from typing import Annotated, Literal

from rpo.config import MAY_CHANGE, Count, Field, group, model_validator
from rpo.errors import require

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
    api_key_env: Annotated[str, MAY_CHANGE]
    temperature: Annotated[float, Field(ge=0, le=2, description="0 to 2")]
    max_tokens: Count
    verdict: Literal["auto", "logprobs", "text"]
    concurrency: Annotated[Count, MAY_CHANGE]
    timeout: Annotated[float, Field(gt=0, le=86400, description="seconds, above 0 and at most a day"), MAY_CHANGE]
    retries: Annotated[int, Field(ge=0, description="at least 0"), MAY_CHANGE]
    price_in: _Dollars
    price_out: _Dollars
    max_cost: _Dollars

    @model_validator(mode="after")
    def _check(self) -> "Judge":
        require(
            self.base_url is None or not self.base_url.rstrip("/").endswith("/completions"),
            f"judge.base_url={self.base_url}: expected the URL without /chat/completions (most end in /v1); remove that",
        )
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
