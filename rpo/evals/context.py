"""Answers of models to conversations, on disk as they are made, so that a killed evaluation goes on from there.

RUN_DIR/answers.jsonl    one object per answer: its key (a digest of what it was made of), model, text, tokens, ended
"""

import gc
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rpo import dist
from rpo.data import tokenizer as data_tokenizer
from rpo.data.formats import Messages
from rpo.errors import UserError
from rpo.evals.settings import Eval
from rpo.model import hf
from rpo.model.policy import Policy, prepare
from rpo.model.sampling import Sampling, sample
from rpo.model.shard import PLAIN, compute_dtype, mesh
from rpo.text import redacted

UNKNOWN = 0.01  # share of unknown tokens that is said: answers to prompts that can not be read look like any others
CHUNK = 8  # batches between two writes; not the number of ranks, or the samples would depend on it


@dataclass(frozen=True)
class Answer:
    """`text` without the stop token; `ended` where the model came to one, else it was cut at max_new_tokens."""

    text: str
    tokens: int
    ended: bool


class _Model(NamedTuple):
    path: str
    tokenizer: PreTrainedTokenizerBase
    positions: int
    identity: str


class Answerer:
    """Answers of one model after the other, as `cfg` says that models are loaded and templates filled. A collective."""

    def __init__(self, cfg: Eval, run_dir: Path, device: torch.device, batch_size: int):
        self._cfg, self._device, self._batch_size = cfg, device, batch_size
        self._file = run_dir / "answers.jsonl"
        self._known: dict[str, Answer] = dist.on_main(self._read)
        self._model: _Model | None = None
        self._policy: Policy | None = None  # loaded when the first answer is not known yet

    def __call__(
        self, path: str, conversations: Sequence[str | Messages], sampling: Sampling | Sequence[Sampling]
    ) -> list[Answer]:
        """One answer per conversation, in order. Messages end in a user turn and take the chat template; a string is
        tokenised as it is.

        Raises UserError: no such model, a template that refuses the messages, no room for the answer. Samples depend on
        cfg.seed, the conversations and the batch size, and neither on ranks nor on where an earlier start was killed.
        """
        self._open(path)
        cfg, model = self._cfg, self._model
        prompts = [
            data_tokenizer.encode_prompt(model.tokenizer, said, cfg.data.template_date) for said in conversations
        ]
        note_unknown(path, model.tokenizer, prompts)
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        self._check_room(prompts, each)  # of all, before the first is answered
        made: dict[int, Answer] = {}
        for group, how in enumerate(dict.fromkeys(each)):
            members = [i for i, own in enumerate(each) if own == how]
            for start in range(0, len(members), CHUNK * self._batch_size):
                chunk = members[start : start + CHUNK * self._batch_size]
                seed = [cfg.seed, group, start]
                made |= zip(chunk, self._chunk([prompts[i] for i in chunk], how, seed), strict=True)
        return [made[i] for i in range(len(prompts))]

    def _chunk(self, prompts: list[list[int]], how: Sampling, seed: list[int]) -> list[Answer]:
        """The answers to `prompts`: those on disk where all of them are, else made and written."""
        made_of = [self._model.identity, str(how), seed, self._batch_size, str(self._cfg.model.dtype), prompts]
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        keys = [f"{digest}:{i}" for i in range(len(prompts))]
        if all(key in self._known for key in keys):
            return [self._known[key] for key in keys]
        self._load()
        stop_ids = data_tokenizer.stop_ids(self._model.tokenizer, self._cfg.data.template_date)
        batches = {"device": self._device, "seed": seed, "batch_size": self._batch_size, "reshard": True}
        completions = sample(self._policy, prompts, how, stop_ids, **batches)
        texts = self._model.tokenizer.batch_decode([made.text_ids for made in completions])
        answers = [Answer(text, len(c.ids), c.ended) for text, c in zip(texts, completions, strict=True)]
        self._known |= zip(keys, answers, strict=True)
        dist.on_main(self._append, keys, answers)
        return answers

    def _check_room(self, prompts: list[list[int]], each: list[Sampling]) -> None:
        for prompt, how in zip(prompts, each, strict=True):
            room = self._model.positions - len(prompt)
            if how.max_new_tokens > room:
                raise UserError(
                    f"task.max_new_tokens={how.max_new_tokens}: beside a prompt of {len(prompt)} tokens "
                    f"{self._model.path} has positions for {max(room, 0)}; set it to that or less, or leave such prompts out"
                )

    def _open(self, path: str) -> None:
        """The tokenizer of `path` and what its weights are known by; the model before it is let go."""
        if self._model is not None and self._model.path == path:
            return
        self._policy = None
        gc.collect()  # a sharded model is full of cycles; the next one needs its memory
        given, trust = self._cfg.model, {"trust_remote_code": self._cfg.model.trust_remote_code}
        config = hf.check(path, given.revision, **trust)
        template = self._cfg.data.chat_template
        tokenizer = data_tokenizer.load_tokenizer(
            given.tokenizer or path, revision=given.revision, chat_template=template, **trust
        )
        hf.check_fit({f"model.path={path}": config}, tokenizer, 1)
        positions = hf.positions_of({path: config})
        identity = dist.on_main(identity_of, path, given.revision)
        self._model = _Model(path, tokenizer, positions, identity)

    def _load(self) -> None:
        if self._policy is not None:
            return
        given = self._cfg.model
        compute = compute_dtype(given.dtype, self._device)
        master = torch.promote_types(compute, torch.float32)
        lm = hf.load(self._model.path, given.revision, master, trust_remote_code=given.trust_remote_code)
        shard = {"mesh": mesh(self._device, PLAIN), "fsdp": PLAIN, "compute_dtype": compute}
        self._policy = prepare(lm, **shard, compile=False, trainable=False)

    def _read(self) -> dict[str, Answer]:
        known = {}
        text = self._file.read_text(errors="replace") if self._file.exists() else ""
        if text and not text.endswith("\n"):  # or the next answer would stand on the line that a kill cut off
            with self._file.open("a") as file:
                file.write("\n")
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a kill came while it was written
                found = json.loads(line)
                known[found["key"]] = Answer(found["text"], found["tokens"], found["ended"])
        return known

    def _append(self, keys: list[str], answers: list[Answer]) -> None:
        model = redacted(self._model.path)  # texts stay as they are, a path may hold a secret
        with self._file.open("a") as file:
            for key, answer in zip(keys, answers, strict=True):
                made = {"text": answer.text, "tokens": answer.tokens, "ended": answer.ended}
                file.write(json.dumps({"key": key, "model": model} | made) + "\n")


def note_unknown(path: str, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> None:
    """Says so where more than 1% of the prompts' tokens are unknown to the model's tokenizer."""
    if (share := data_tokenizer.unknown_share(tokenizer, prompts)) > UNKNOWN and dist.is_main():
        print(redacted(f"note: {path}: its tokenizer does not know {share:.0%} of the prompts' tokens"), flush=True)


def identity_of(path: str, revision: str | None) -> str:
    """What changes when the model at `path` does: a folder's files with sizes and times, or a Hub name and revision."""
    files = sorted(Path(path).expanduser().glob("*")) if Path(path).expanduser().is_dir() else []
    return json.dumps([path, revision, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)])
