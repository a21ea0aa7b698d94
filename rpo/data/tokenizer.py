"""Text to token ids: tokenizers, chat templates, BOS and end-of-turn; where the prompt ends and a response begins.

A response's tokens end with exactly one end-of-turn, which is scored; what a template renders after it is dropped.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rpo.data.formats import Example, Messages, RowError
from rpo.errors import UserError
from rpo.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    path: str | Path,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or Hub name, with `chat_template` (jinja text or a file of it) if given.

    Raises UserError where the tokenizer cannot be loaded, needs code of its own without `trust_remote_code` or has no
    EOS token, and where the template's file does not exist.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a missing folder, name, network, file or library: each its own type
        if "trust_remote_code" in str(error):
            fix = "read it, then set model.trust_remote_code=true, or give model.tokenizer"
            raise UserError(f"tokenizer {path}: comes with code of its own, which is not run; {fix}") from None
        raise UserError(f"tokenizer {path}: cannot be loaded ({one_line(error)}); give a folder or Hub name") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {path}: has no EOS token to end a response; set eos_token in tokenizer_config.json")
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if outside := [name for name in named if name != Path(name).name]:  # saved, each becomes a file of its name
        raise UserError(f"tokenizer {path}: has a chat template called {outside[0]!r}: expected a name without slashes")
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
    return tokenizer


def _template_text(chat_template: str) -> str:
    if any(mark in chat_template for mark in ("{{", "{%", "\n")):
        return chat_template
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise UserError(f"data.chat_template={chat_template}: no such file; give jinja text or a file that holds it")
    return path.read_text(encoding="utf-8")


class Facts(NamedTuple):
    """A tokenizer and its special tokens, looked up once for all rows."""

    tokenizer: PreTrainedTokenizerBase
    bos: int | None
    adds_bos: bool  # whether the tokenizer itself begins a text with it
    eos: int
    special: frozenset[int]  # without the unknown token, which may stand for a response's last word


def facts_of(tokenizer: PreTrainedTokenizerBase) -> Facts:
    bos = tokenizer.bos_token_id
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    eos = tokenizer.eos_token_id
    special = (special | set(tokenizer.all_special_ids)) - ({tokenizer.unk_token_id} - {eos})  # GPT-2: one token
    return Facts(tokenizer, bos, adds_bos, eos, frozenset(special))


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def with_bos(ids: list[int], tok: Facts) -> list[int]:
    return [tok.bos, *ids] if tok.adds_bos and ids[:1] != [tok.bos] else ids


@lru_cache
def _fix_date(template: str, template_date: str) -> str:
    """The template with a macro `strftime_now` that returns `template_date` at midnight in place of the clock.

    A macro, because apply_chat_template turns a function among its arguments into text.
    """
    if "strftime_now" not in template:
        return template
    day = datetime.fromisoformat(template_date)
    directives = [f"%{c}" for c in "aAwdbBmyYHIMSfpjUWcxXGuVeFTDR"] + [f"%-{c}" for c in "dmyHIMSj"]
    filters = "".join(f"|replace({d!r}, {day.strftime(d)!r})" for d in directives)
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n" + template


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, template_date: str, *, prompt: bool) -> str:
    if tokenizer.chat_template is None:
        why = "the data has messages, the tokenizer no chat template"
        raise UserError(f"data.chat_template=null: {why}; give jinja text or a file")
    template = _fix_date(tokenizer.get_chat_template(), template_date)
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
        )
    except Exception as error:  # the template is a program of the user's and may raise anything
        text = f"the chat template refuses the messages ({one_line(error)}); fix them or data.chat_template"
        raise RowError("template_error", text) from None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, template_date: str) -> list[int]:
    """The ids that training uses for `prompt`, before truncation: messages with the generation prompt, a string as it is.

    Raises UserError if the template refuses the messages or there is none.
    """
    try:
        return prompt_ids(tokenizer, prompt, template_date)
    except RowError as error:
        raise UserError(str(error)) from None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, template_date: str) -> list[int]:
    """As `encode_prompt`, but raises RowError if the template refuses the messages."""
    text = prompt if isinstance(prompt, str) else render(tokenizer, prompt, template_date, prompt=True)
    check_unicode(text)
    return with_bos(tokenize(tokenizer, [text])[0], facts_of(tokenizer))


def check_unicode(text: str) -> None:
    """Raises RowError for a lone surrogate, which JSON can hold and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        reason = "an escape like \\ud800 is half a character: expected Unicode text; fix the row"
        raise RowError("invalid_utf8", reason) from None


def stop_ids(tokenizer: PreTrainedTokenizerBase, template_date: str) -> list[int]:
    """The ids that end a response: EOS, then the chat template's end-of-turn where that is another token."""
    tok = facts_of(tokenizer)
    if tokenizer.chat_template is None:
        return [tok.eos]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = render(tokenizer, messages, template_date, prompt=False)
    except RowError as error:
        raise UserError(str(error)) from None
    return list(dict.fromkeys([tok.eos, close(tokenize(tokenizer, [text])[0], tok)[-1]]))


def unknown_share(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> float:
    """The share of unknown tokens in the prompts; 0 for a byte-level tokenizer."""
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.eos_token_id, tokenizer.bos_token_id):  # GPT-2: one token for all three
        return 0.0
    return sum(ids.count(unknown) for ids in prompts) / sum(map(len, prompts))


def close(ids: list[int], tok: Facts) -> list[int]:
    """The response up to its end-of-turn: the first special token of the trailing run of special and blank ones.

    First, because Phi-3 renders <|end|> newline <|endoftext|>. Where the run has none, EOS is appended.
    """
    end = None
    for i in range(len(ids) - 1, -1, -1):
        if ids[i] in tok.special:
            end = i
        elif tok.tokenizer.decode([ids[i]]).strip():
            break
    return [*ids, tok.eos] if end is None else ids[: end + 1]


# ---- where the prompt ends and a response begins


class Encoded(NamedTuple):
    """The token ids of a row; those of the responses are scored, those of the prompt are not."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def texts_of(tokenizer: PreTrainedTokenizerBase, example: Example, template_date: str) -> list[str]:
    """The texts to tokenise: the prompt, and prompt with response for each side (chat), or the parts apart (strings)."""
    responses = [side for side in (example.chosen, example.rejected) if side is not None]
    if isinstance(example.prompt, list):
        texts = [render(tokenizer, example.prompt, template_date, prompt=True)]
        texts += [render(tokenizer, example.prompt + side, template_date, prompt=False) for side in responses]
    else:
        texts = responses if example.prompt is None else [example.prompt, *responses]
    for text in texts:
        check_unicode(text)
    return texts


def encode(tok: Facts, example: Example, texts: list[str], ids: list[list[int]]) -> Encoded:
    """Ids of a pair or a supervised row from the ids of its `texts_of`. Raises RowError."""
    prompt = with_bos(ids[0], tok)
    if not prompt:
        raise RowError("no_prompt", "field prompt: expected at least one token before the response; add text")
    if isinstance(example.prompt, str):
        return Encoded(prompt, *[[*side, tok.eos] for side in ids[1:]], *[[]] * (3 - len(ids)))
    responses = []
    for field, text, side in zip(("chosen", "rejected"), texts[1:], ids[1:], strict=False):
        full = with_bos(side, tok)
        if full[: len(prompt)] != prompt:
            why = _why_not_a_prefix(tok.tokenizer, field, prompt, full, text.startswith(texts[0]))
            raise RowError("not_a_prefix", why)
        responses.append(close(full[len(prompt) :], tok))
    return Encoded(prompt, *responses, *[[]] * (2 - len(responses)))


def _why_not_a_prefix(
    tokenizer: PreTrainedTokenizerBase, field: str, prompt: list[int], full: list[int], same_text: bool
) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    shown = [repr(tokenizer.decode(ids[at : at + 1])) if at < len(ids) else "the end" for ids in (prompt, full)]
    reason = (
        "a token spans the border; end the template's generation prompt, or begin the response, where a token ends"
        if same_text
        else "the template renders the prompt differently once an answer follows; use a template that does not"
    )
    return (
        f"field {field}: expected the prompt's tokens at the beginning; token {at} is {shown[0]} in the "
        f"prompt, {shown[1]} with the response: {reason}"
    )


def identity(tokenizer: PreTrainedTokenizerBase) -> list:
    """Everything in a tokenizer that decides its ids, JSON-able and free of paths."""
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        model.pop("padding"), model.pop("truncation")  # state of the last call
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_vocabulary(folder)
            model = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())]
    added = {id: (token.content, token.special) for id, token in tokenizer.added_tokens_decoder.items()}
    names = tokenizer.special_tokens_map
    module = type(tokenizer).__module__  # of a tokenizer's own code: it names a hash or commit of the files
    return [
        type(tokenizer).__name__,
        model,
        sorted(added.items()),
        sorted(names.items()),
        tokenizer.chat_template,
        facts_of(tokenizer).adds_bos,
        *([] if module.startswith("transformers.") else [module]),
    ]
