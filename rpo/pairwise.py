"""Asking a judge which of two answers is better, in the form of verdict that it can give."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rpo import judge, judge_prompts, verdicts
from rpo.eval_config import Judge
from rpo.judge import Reply, Request
from rpo.rows import Messages

TOP = 5  # log-probs asked for: the most that the vendor gives to all


class Shown(NamedTuple):
    """Two answers to a prompt as the judge sees them, and which repeat of this it is."""

    prompt: str | Messages
    first: str
    second: str
    repeat: int = 0


def judged(
    shown: Sequence[Shown], cfg: Judge, prompts: str | None, ask: Callable[[Sequence[Request]], list[Reply]]
) -> tuple[str, list[Reply], dict]:
    """(the form of verdict: "text" or "logprobs", a reply for each, facts about the judge), for `verdicts.first_score`.

    judge.verdict=auto tries log-probs on the first two; one form for all, since the two are not on one scale. The
    templates of a file (`prompts`) ask for a verdict in words.
    """
    templates = judge_prompts.OURS if prompts is None else judge_prompts.load(prompts, "pair")

    def requests(form: str, some: Sequence[Shown]) -> list[Request]:
        if form == "logprobs":
            letters = [judge_prompts.letter(one.prompt, one.first, one.second) for one in some]
            return [
                Request(messages, max_tokens=1, top_logprobs=TOP, repeat=one.repeat)
                for messages, one in zip(letters, some, strict=True)
            ]
        return [
            Request(judge_prompts.pair(one.prompt, one.first, one.second, templates=templates), repeat=one.repeat)
            for one in some
        ]

    form, trial, tried = cfg.verdict, [], []
    if form == "auto":
        trial = requests("logprobs", shown[:2]) if prompts is None else []
        tried = ask(trial) if trial else []
        given = bool(tried) and all(verdicts.first_score("logprobs", vars(reply))[0] is not None for reply in tried)
        form = "logprobs" if given else "text"
    asked = requests(form, shown)
    replies = ask(asked)
    facts = judge.facts([*asked, *trial], [*replies, *tried], cfg)  # the trial last: it was paid for, not cached
    return form, replies, facts | {"prompt": "rpo-letter" if form == "logprobs" else templates["pair", False, 1].name}
