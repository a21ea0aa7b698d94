"""Answers of models on a server that speaks OpenAI's API, asked as a judge is: concurrently, resumably, each request once."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpo.data.answers import key_of
from rpo.data.chat import Chat
from rpo.data.formats import Example
from rpo.data.tokenizer import load_tokenizer, prompt_ids
from rpo.errors import UserError
from rpo.evals.settings import Eval
from rpo.judging import judge
from rpo.judging.client import KEPT, Account, Request
from rpo.text import redacted

if TYPE_CHECKING:
    from rpo.data.formats import Messages
    from rpo.judging.client import Reply
    from rpo.model.sampling import Sampling


def ask(
    name: str,
    prompts: Sequence["str | Messages | Example"],
    samplings: Sequence["Sampling"],
    cfg: Eval,
    cache: Path,
    account: Account,
) -> list["Reply"]:
    """The replies of the model `name`, one per prompt, in order; equal prompts are asked again, with another seed.

    Raises UserError: a server that cannot be used, and where any request has failed for good: its model would have fewer
    answers than others.
    """
    seen: Counter = Counter()
    tokenizer = None
    if cfg.server.api == "completions" and cfg.model.tokenizer is not None:
        tokenizer = load_tokenizer(cfg.model.tokenizer, chat_template=cfg.data.chat_template)
    requests: dict[Any, list[tuple[int, Request]]] = {}
    for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        example = prompt if isinstance(prompt, Example) else Example(prompt, "", None)
        repeat = seen[key := (key_of(example.prompt), sampling)]
        seen[key] += 1
        requests.setdefault(sampling, []).append((i, _request(example, sampling, repeat, cfg, tokenizer)))
    replies: dict[int, Reply] = {}
    for sampling, numbered in requests.items():
        asked = cfg.server.asked(name, sampling.temperature, sampling.max_new_tokens)
        answered = judge.ask([request for _, request in numbered], asked, cache, account)
        replies |= zip((i for i, _ in numbered), answered, strict=True)
    if failed := [i for i, reply in replies.items() if reply.error is not None]:
        first = prompts[failed[0]]
        text = redacted(str(first.prompt if isinstance(first, Example) else first))
        raise UserError(
            f"server.model={name}: {len(failed)} of {len(replies)} requests failed, the first of {text!r:.80} "
            f"({replies[failed[0]].error}); {KEPT}: repeat the command with the same run_dir, or leave that prompt out"
        )
    return [replies[i] for i in range(len(prompts))]


def notes(name: str, replies: Sequence["Reply"]) -> list[str]:
    """What a reader of numbers has to know of the answers: guessed lengths, empty texts, ends that are neither a stop nor a cut."""
    named, count = f"server.model={name}", len(replies)
    guessed = sum(not reply.counted for reply in replies)
    empty = sum(not reply.text.strip() for reply in replies)
    ends = Counter(reply.finish_reason for reply in replies if reply.finish_reason not in ("stop", "length", None))
    found = [
        f"{named} counts no tokens: lengths of {guessed} of {count} answers are a quarter of their characters"
    ] * bool(guessed)
    found += [f"{named}: {empty} of {count} answers are empty"] * bool(empty)
    return found + [f"{named}: {n} of {count} answers ended by {reason}" for reason, n in sorted(ends.items())]


def _request(example: Example, sampling: "Sampling", repeat: int, cfg: Eval, tokenizer: Any) -> Request:
    fields: dict[str, Any] = {}
    if sampling.temperature > 0:
        fields["seed"] = cfg.seed + repeat
        fields |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
        fields |= {"top_k": sampling.top_k} if sampling.top_k else {}
    common = {"max_tokens": sampling.max_new_tokens, "repeat": repeat}
    if cfg.server.api == "completions":
        prompt = example.prompt
        if tokenizer is not None:
            prompt = tuple(prompt_ids(tokenizer, example, Chat.of(cfg.data)))
        elif not isinstance(prompt, str):
            raise UserError(
                "server.api=completions: the prompts are messages, and only a template makes text of them; give "
                "model.tokenizer, or set server.api=chat"
            )
        return Request((), prompt=prompt, sampling=tuple(fields.items()), **common)
    if example.tools:
        fields["tools"] = example.tools
    if kwargs := (cfg.data.chat_template_kwargs or {}) | (example.template_kwargs or {}):
        fields["chat_template_kwargs"] = kwargs
    text = example.prompt
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
    return Request(messages, sampling=tuple(fields.items()), **common)
