"""Text to token ids: tokenizers, chat templates, BOS and end-of-turn; where the prompt ends and a response begins.

A response's tokens end with exactly one end-of-turn, which is scored; what a template renders after it is dropped. What is in
a response's messages and not in its text is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rpo.data.chat import Chat, closing, left_out, lost_call, render, unheard, unnamed
from rpo.data.formats import Example, Messages, RowError
from rpo.errors import UserError
from rpo.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or Hub name, with `chat_template` (jinja text or a file of it) if given.

    Raises UserError where the tokenizer cannot be loaded, needs code of its own without `trust_remote_code` or has no
    EOS token, and where the template's file does not exist.
    """
    from transformers import AutoTokenizer

    path, revision = _home(path, revision)
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
    tokenizer = _as_its_file_says(tokenizer, str(path), revision)
    if tokenizer.is_fast and getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        tokenizer.backend_tokenizer.model.dropout = None  # BPE dropout: other ids each time
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if outside := [name for name in named if name != Path(name).name]:  # saved, each becomes a file of its name
        raise UserError(f"tokenizer {path}: has a chat template called {outside[0]!r}: expected a name without slashes")
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
    return tokenizer


def _home(path: str | Path, revision: str | None) -> tuple[str | Path, str | None]:
    """Where the tokenizer of the model at `path` is: there, or with its base where it is an adapter's folder without one."""
    folder = Path(path).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        with suppress(OSError, ValueError, AttributeError):
            adapter = json.loads((folder / "adapter_config.json").read_text())
            return adapter.get("base_model_name_or_path") or path, adapter.get("revision")
    return path, revision


# Digits of all scripts, spaces, contractions, composed signs, code and line ends: where normalizers and pre-tokenizers differ.
_PROBES = (
    "in 2024 and 1,234.5",
    "I'll  don't\tDON'T",
    "naïve Übung 東京 हिन्दी 🙂",
    "cafe\u0301 \u212b \ufb01 a\u00a0b \uff21",
    "१२३ ٣٤٥ ５６７ x२३",
    "x_1 = [0]; // a\n\n  b\r\n",
    " a",
    "",
)


def _as_its_file_says(tokenizer: PreTrainedTokenizerBase, path: str, revision: str | None) -> PreTrainedTokenizerBase:
    """`tokenizer`, or its tokenizer.json read as it is where transformers' class for the model gives other ids; it says so."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    if not tokenizer.is_fast or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(path, "tokenizer.json", revision=revision or "main", **quiet)
    if file is None:
        return tokenizer
    own = Tokenizer.from_file(file)
    texts = [*_PROBES, *(f"{token} a" for token in tokenizer.all_special_tokens)]
    if tokenize(tokenizer, texts) == [encoding.ids for encoding in own.encode_batch(texts, add_special_tokens=False)]:
        return tokenizer
    # The generic class obeys tokenizer_config.json too, and adds nothing to either.
    plain = PreTrainedTokenizerFast.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    differing = [text for text in texts if tokenize(tokenizer, [text]) != tokenize(plain, [text])]
    if not differing:
        return tokenizer
    name = type(tokenizer).__name__
    what = f"transformers' {name} gives {differing[0]!r} other ids than tokenizer.json, which is obeyed"
    warnings.warn(f"tokenizer {path}: {what}", stacklevel=3)
    return plain


def why_other_ids(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first token or id that means something else in the other vocabulary; None where neither contradicts the other."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    names = {id: token for token, id in theirs.items()}
    for token, id in sorted(ours.items(), key=lambda entry: entry[1]):
        if theirs.get(token, id) != id:
            return f"{token!r} is {id} in one, {theirs[token]} in the other"
        if names.get(id, token) != token:
            return f"{id} is {token!r} in one, {names[id]!r} in the other"
    return None


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    revision: str | None,
    *,
    key: str,
    trust: bool,
    used: Iterable[int] | None = None,
) -> None:
    """Raises UserError where the model at `path` comes with a tokenizer that contradicts `tokenizer`: equal size is not enough.

    With `used`, the ids of the data, where one of these is another token in it, or none; other tokens do not matter.
    """
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in files):
        return
    other = load_tokenizer(path, revision=revision, trust_remote_code=trust)
    if used is None:
        why = why_other_ids(tokenizer, other)
    else:
        ours, theirs = ({id: token for token, id in each.get_vocab().items()} for each in (tokenizer, other))
        differing = next((int(id) for id in used if ours.get(int(id)) != theirs.get(int(id))), None)
        why = differing is not None and f"{differing} is {ours.get(differing)!r} here, {theirs.get(differing)!r} there"
    if why:
        raise UserError(f"{key}={path}: its tokenizer maps tokens to other ids ({why}); give a model of one vocabulary")


def _template_text(chat_template: str) -> str:
    if any(mark in chat_template for mark in ("{{", "{%", "\n")):
        return chat_template
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise UserError(f"data.chat_template={chat_template}: no such file; give jinja text or a file that holds it")
    return path.read_text(encoding="utf-8-sig")


class Facts(NamedTuple):
    """A tokenizer and its special tokens, looked up once for all rows."""

    tokenizer: PreTrainedTokenizerBase
    bos: int | None
    prefix: list[int]  # what the tokenizer itself begins a text with
    eos: int
    special: frozenset[int]  # without the unknown token, which may stand for a response's last word
    added: frozenset[int]  # these, and tokens that were added to the vocabulary without being called special


def facts_of(tokenizer: PreTrainedTokenizerBase) -> Facts:
    bos = tokenizer.bos_token_id
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    own, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    border = next((i for i in range(len(own)) if own[i : i + len(bare)] == bare), 0) if bare else own[:1] == [bos]
    eos = tokenizer.eos_token_id
    special = (special | set(tokenizer.all_special_ids)) - ({tokenizer.unk_token_id} - {eos})  # GPT-2: one token
    return Facts(
        tokenizer, bos, own[:border], eos, frozenset(special), frozenset(special | {*tokenizer.added_tokens_decoder})
    )


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def with_bos(ids: list[int], tok: Facts) -> list[int]:
    """The ids behind what the tokenizer begins a text with, BOS or more, unless they have it."""
    num = len(tok.prefix)
    if ids[:num] == tok.prefix:
        return ids
    return tok.prefix + (ids[1:] if ids[:1] == tok.prefix[:1] == [tok.bos] else ids)


def with_eos(ids: list[int], tok: Facts) -> list[int]:
    """The ids with one EOS at their end, in place of a run of them and blank tokens."""
    end = None
    for i in range(len(ids) - 1, -1, -1):
        if ids[i] == tok.eos:
            end = i
        elif not _is_blank(ids[i], tok):
            break
    return [*ids, tok.eos] if end is None else ids[: end + 1]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, chat: Chat) -> list[int]:
    """The ids that training uses for `prompt`, before truncation: messages with the generation prompt, a string as it is.

    Raises RowError if the template refuses the messages, UserError if there is none.
    """
    return prompt_ids(tokenizer, Example(prompt, "", None), chat)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example, chat: Chat) -> list[int]:
    """The ids of an example's prompt, before truncation. Raises RowError if the template refuses the messages."""
    text = texts_of(tokenizer, example._replace(chosen="", rejected=None), chat)[0]
    return with_bos(tokenize(tokenizer, [text])[0], facts_of(tokenizer))


def check_unicode(text: str) -> None:
    """Raises RowError for a lone surrogate, which JSON can hold and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        reason = "an escape like \\ud800 is half a character: expected Unicode text; fix the row"
        raise RowError("invalid_utf8", reason) from None


def stop_ids(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    """The ids that end a response: EOS, then the chat template's end-of-turn where that is another token."""
    tok = facts_of(tokenizer)
    if tokenizer.chat_template is None:
        return [tok.eos]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = render(tokenizer, messages, chat, prompt=False)
    return list(dict.fromkeys([tok.eos, close(tokenize(tokenizer, [text])[0], tok, closing(tokenizer, chat))[-1]]))


def unknown_share(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> float:
    """The share of unknown tokens in the prompts; 0 for a byte-level tokenizer."""
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.eos_token_id, tokenizer.bos_token_id):  # GPT-2: one token for all three
        return 0.0
    return sum(ids.count(unknown) for ids in prompts) / sum(map(len, prompts))


# ---- where a response ends


def close(ids: list[int], tok: Facts, closing: str | None) -> list[int]:
    """The response up to its end-of-turn, which is there once: the first token in the template's `closing` that ends turns.

    These are EOS and what follows a user's text, with more where both have it: of Phi-3's <|end|> newline <|endoftext|> the
    first. Else any added token, and those that follow it directly. EOS is appended where the closing has none. Where `ids` do not end with
    it, the first special token of their trailing run of special and blank ones counts.
    """
    tail = () if closing is None else _tail(tok.tokenizer, closing)
    added = next((i for i, id in enumerate(tail) if id in tok.added), None)
    if closing is not None and added is None:
        return with_eos(ids, tok)
    if added is not None and ids[added - len(tail) :] == tail[added:]:
        turn = _after_a_user(tok.tokenizer)
        enders = {tok.eos, *turn[:1]} & {*tail} or tok.added
        first = next(i for i, id in enumerate(tail) if id in enders)
        run = next((i for i, id in enumerate(tail[first:]) if id not in tok.added), len(tail) - first)
        if enders is not tok.added:
            run = max(1, min(run, len(os.path.commonprefix([turn, list(tail[first:])]))))
        end = len(ids) - len(tail) + first + run
    else:
        end = _first_of_run(ids, tok)
        if end is None:
            return [*ids, tok.eos]
    once = end
    for i in range(end - 2, -1, -1):  # a text that brings the end-of-turn along
        if ids[i] == ids[end - 1]:
            once = i + 1
        elif not _is_blank(ids[i], tok):
            break
    return ids[:once]


@lru_cache(maxsize=8)
def _after_a_user(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the template puts after a user's text, from the first added token on."""
    tok, asked = facts_of(tokenizer), Example([], [{"role": "user", "content": ""}], None)
    # With the answer's beginning: what a template prints at a conversation's end, whoever has the last word, ends no turn.
    after = _tail(tokenizer, closing(tokenizer, Chat("2024-01-01", {}), asked, prompt=True) or "")
    return after[next((i for i, id in enumerate(after) if id in tok.added), len(after)) :]


@lru_cache(maxsize=8)
def _tail(tokenizer: PreTrainedTokenizerBase, closing: str) -> list[int]:
    return tokenize(tokenizer, [closing])[0]


def _is_blank(id: int, tok: Facts) -> bool:
    return not tok.tokenizer.decode([id]).strip()


def _first_of_run(ids: list[int], tok: Facts) -> int | None:
    """One past the first special token of the trailing run of special and blank ones, if there is one."""
    end = None
    for i in range(len(ids) - 1, -1, -1):
        if ids[i] in tok.special:
            end = i + 1
        elif not _is_blank(ids[i], tok):
            break
    return end


# ---- where the prompt ends and a response begins


class Encoded(NamedTuple):
    """The token ids of a row; those of the responses are scored, those of the prompt are not."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def texts_of(tokenizer: PreTrainedTokenizerBase, example: Example, chat: Chat) -> list[str]:
    """The texts to tokenise: the prompt, and prompt with response for each side (chat), or the parts apart (strings; to a
    SentencePiece tokenizer, which would put a space before a response, it is given behind a line end).

    Raises RowError where the template refuses the messages, or leaves out a part of a response.
    """
    sides = {"chosen": example.chosen, "rejected": example.rejected}
    responses = {field: side for field, side in sides.items() if side not in (None, "")}
    if isinstance(example.prompt, list):
        more = {"tools": example.tools, "kwargs": example.template_kwargs}
        texts = [render(tokenizer, example.prompt, chat, prompt=True, **more)]
        lost = unnamed(example.tools, texts[0])
        if example.tools and not lost:  # or the name is in what the user says
            without = render(tokenizer, example.prompt, chat, prompt=True, kwargs=example.template_kwargs)
            lost = unnamed(example.tools, "") if without == texts[0] else None
        if lost:
            why = f"the chat template does not print the tool {lost!r}"
            raise RowError("not_rendered", f"field tools: {why}; give a data.chat_template that does")
        if role := unheard(example.prompt, texts[0]):
            why = f"the chat template leaves out the prompt's {role[:40]!r} message"
            raise RowError(
                "not_rendered", f"field prompt: {why}; rename the role, or give a data.chat_template that prints it"
            )
        for field, side in responses.items():
            text = render(tokenizer, example.prompt + side, chat, prompt=False, **more)
            if part := left_out(side, text.removeprefix(texts[0])) or lost_call(tokenizer, chat, example, side):
                why = f"the chat template leaves out a part of the response ({part[:60]!r})"
                raise RowError("not_rendered", f"field {field}: {why}; give a data.chat_template that prints it")
            texts.append(text)
    else:
        prompt = [] if example.prompt is None else [example.prompt]
        before = "\n" if example.prompt and _spaces_its_texts(tokenizer) else ""
        texts = [*prompt, *(before + response for response in responses.values())]
    for text in texts:
        check_unicode(text)
    return texts


@lru_cache(maxsize=8)
def _spaces_its_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text begins with a space of the tokenizer's own, as SentencePiece's do: it would stand in mid-sentence."""
    alone, behind = tokenize(tokenizer, ["a", "\na"])
    return behind[-len(alone) :] != alone


def encode(
    tok: Facts, example: Example, texts: list[str], ids: list[list[int]], chat: Chat, plain: str | None
) -> Encoded:
    """Ids of a pair or a supervised row from the ids of its `texts_of`; `plain` is the `closing` of plain exchanges.

    Raises RowError.
    """
    prompt = with_bos(ids[0], tok)
    if not prompt:
        raise RowError("no_prompt", "field prompt: expected at least one token before the response; add text")
    if isinstance(example.prompt, str):
        sides = ids[1:]
        if example.prompt and _spaces_its_texts(tok.tokenizer):
            line, *alone = tokenize(tok.tokenizer, ["\n", *(text[1:] for text in texts[1:])])
            pairs = zip(ids[1:], alone, strict=True)  # one that begins with a line end may share a token with ours
            sides = [side[len(line) :] if side[: len(line)] == line else own for side, own in pairs]
        return Encoded(prompt, *[with_eos(side, tok) for side in sides], *[[]] * (3 - len(ids)))
    responses = []
    sides = (("chosen", example.chosen), ("rejected", example.rejected))
    for (field, messages), text, side in zip(sides, texts[1:], ids[1:], strict=False):
        full = with_bos(side, tok)
        if full[: len(prompt)] != prompt:
            why = _why_not_a_prefix(tok.tokenizer, field, prompt, full, text.startswith(texts[0]))
            raise RowError("not_a_prefix", why)
        closes = plain
        if plain is None or not text.endswith(plain):
            closes = closing(tok.tokenizer, chat, example._replace(chosen=messages))
        responses.append(close(full[len(prompt) :], tok, closes))
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
        facts_of(tokenizer).prefix,
        bool(getattr(tokenizer, "split_special_tokens", False)),
        *([] if module.startswith("transformers.") else [module]),
    ]
