"""What answers are worth: the embedded task's exact reward, a reward model, or a function of yours.

A `Gold` gives one number per answer, higher is better, the same on every rank. Letters: S answers, B texts of a batch,
T tokens.
"""

import importlib.util
import json
import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rpo import config, dist
from rpo.data.chat import Chat, render
from rpo.data.formats import Messages, RowError
from rpo.data.tokenizer import facts_of, load_tokenizer, tokenize, with_bos
from rpo.errors import UserError
from rpo.model import fingerprint
from rpo.model.sampling import Completion
from rpo.runs import catalog
from rpo.synthetic import task
from rpo.text import one_line

BATCH_SIZE = 16  # texts that a reward model reads at once
# (prompts as their rows have them, answers, the answers' texts) -> rewards_S
Gold = Callable[[Sequence[str | Messages], Sequence[Completion], Sequence[str]], np.ndarray]


def text_of(prompt: str | Messages) -> str:
    """A prompt as one text: itself, or what the last message says."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def source(spec: str, *, device: torch.device, dtype: torch.dtype, chat: Chat, trust_remote_code: bool) -> Gold | None:
    """What `task.gold` names, but for auto: none, a verifier FILE.py:FUNCTION, or a reward model.

    Raises UserError: no such file or function, or a model that gives no single number.
    """
    if spec == "none":
        return None
    file, _, name = spec.rpartition(":")
    if file.endswith(".py"):
        return verifier(Path(file).expanduser(), name)
    return RewardModel(spec, device=device, dtype=dtype, chat=chat, trust_remote_code=trust_remote_code)


def identity(spec: str, source: Gold | None) -> bytes:
    """What `task.gold` is, for a digest: a reward model's weights, config and tokenizer, the text of a verifier's file
    (of what it imports nothing), else the name. `source` is what `spec` was read as, None where nothing was."""
    if isinstance(source, RewardModel):
        return source.identity
    file, _, _ = spec.rpartition(":")
    return Path(file).expanduser().read_bytes() if file.endswith(".py") else spec.encode()


def embedded(tokenizer: PreTrainedTokenizerBase, weights: config.SyntheticTask) -> Gold:
    """The exact reward of the embedded task, of answers in its tokenizer's words."""

    def score(prompts: Sequence[str | Messages], answers: Sequence[Completion], texts: Sequence[str]) -> np.ndarray:
        return task.rewards(tokenizer, [text_of(prompt) for prompt in prompts], list(answers), weights)

    return score


def _shared(work: Callable[[slice], np.ndarray], count: int) -> np.ndarray:
    """`work` of all `count` items, each rank a share of them, on every rank; an error of one is raised on all."""
    world, values = dist.world_size(), np.empty(count)
    for rank, part in enumerate(dist.together(lambda: work(slice(dist.rank(), count, world)))):
        values[rank::world] = part
    return values


def _raised(error: BaseException, file: Path) -> str:
    """An error of the user's code in one line, with the line of `file` that it came through, if any."""
    frames, own = traceback.extract_tb(error.__traceback__), file.resolve()
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == own]
    return f"{type(error).__name__}: {one_line(error)}" + (f" ({file}:{lines[-1]})" if lines else "")


def verifier(file: Path, name: str) -> Gold:
    """The function `name` of a Python file of the user's: f(prompt, response) -> a finite number.

    `prompt` is the row's prompt, of a conversation its last message; `response` is the answer without its end-of-turn.
    Importing the file runs it. Raises UserError: no such file or function, an error in it, another return value.
    """
    key = f"task.gold={file}:{name}"
    if not file.is_file():
        raise UserError(f"{key}: no such file; expected FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UserError(f"{key}: importing it raised {_raised(error, file)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{key}: the file has no function {name}")

    def one(prompt: str, response: str) -> float:
        place = f"{key}: for the prompt {prompt[:60]!r}"
        try:
            value = function(prompt, response)
        except (Exception, SystemExit) as error:
            raise UserError(f"{place} it raised {_raised(error, file)}") from None
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"{place} it returned {repr(value)[:60]}; expected a finite number")
        return float(value)

    def score(prompts: Sequence[str | Messages], answers: Sequence[Completion], texts: Sequence[str]) -> np.ndarray:
        def work(part: slice) -> np.ndarray:
            pairs = zip(prompts[part], texts[part], strict=True)
            return np.array([one(text_of(prompt), text) for prompt, text in pairs])

        return _shared(work, len(texts))

    return score


class RewardModel:
    """A sequence classifier with one output, reading conversations by its own tokenizer and chat template.

    Whole on every rank, each scoring a share. A prompt that is a string is read with the answer after it, without a
    template. Raises UserError: no model there, one without such a head, none of its head's weights, no chat template
    for messages, a text longer than its positions.
    """

    def __init__(self, path: str, *, device: torch.device, dtype: torch.dtype, chat: Chat, trust_remote_code: bool):
        self.key, self.device, self.chat = f"task.gold={path}", device, chat
        expected = (
            "expected auto, none, FILE.py:FUNCTION, or a reward model (AutoModelForSequenceClassification, one label)"
        )
        try:
            hf_config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        except Exception as error:  # each config class checks itself in its own way
            raise UserError(f"{self.key}: cannot be read ({one_line(error)}); {expected}") from None
        names = hf_config.architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in names):
            kinds = ", ".join(names) or type(hf_config).__name__
            raise UserError(f"{self.key}: holds {kinds}, not a reward model; {expected}")
        if hf_config.num_labels != 1:
            raise UserError(f"{self.key}: has {hf_config.num_labels} labels, a reward is one number; {expected}")
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=dtype, weights_only=True, output_loading_info=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # files, the library and a model's own code: each its own type
            raise UserError(f"{self.key}: the weights could not be loaded ({one_line(error)})") from None
        if info["missing_keys"]:
            raise UserError(f"{self.key}: the checkpoint lacks {sorted(info['missing_keys'])[0]}; it is incomplete")
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        settings = fingerprint.computed(json.loads(hf_config.to_json_string(use_diff=False)))
        weights, reader = fingerprint.weights_digest(model), catalog.identity_of(self.tokenizer)
        self.identity = json.dumps([path, weights, type(model).__module__, settings, reader], sort_keys=True).encode()
        self.model = model.eval().requires_grad_(False).to(device)
        self.pad = hf_config.get_text_config().pad_token_id  # None: a decoder would not know where a short text ends
        self.positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None) or math.inf

    def _ids(self, prompt: str | Messages, response: str) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt + response).input_ids
        elif self.tokenizer.chat_template is None:
            raise UserError(f"{self.key}: its tokenizer has no chat template, and the prompts are messages")
        else:
            messages = [*prompt, {"role": "assistant", "content": response}]
            try:
                text = render(self.tokenizer, messages, self.chat, prompt=False)
            except RowError as error:
                raise UserError(f"{self.key}: {error}") from None
            ids = with_bos(tokenize(self.tokenizer, [text])[0], facts_of(self.tokenizer))
        if not 1 <= len(ids) <= self.positions:
            raise UserError(f"{self.key}: a conversation has {len(ids)} tokens, it reads 1 to {self.positions}")
        return ids

    @torch.no_grad()
    def _batch(self, texts: list[list[int]]) -> list[float]:
        width, pad = max(map(len, texts)), self.pad or 0
        ids_BT = torch.tensor([ids + [pad] * (width - len(ids)) for ids in texts], device=self.device)
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts], device=self.device)
        return self.model(input_ids=ids_BT, attention_mask=mask_BT).logits.flatten().tolist()

    def __call__(
        self, prompts: Sequence[str | Messages], answers: Sequence[Completion], texts: Sequence[str]
    ) -> np.ndarray:
        def work(part: slice) -> np.ndarray:
            read = [self._ids(prompt, text) for prompt, text in zip(prompts[part], texts[part], strict=True)]
            order = sorted(range(len(read)), key=lambda i: -len(read[i]))  # like lengths together: less padding
            rewards, size = np.empty(len(read)), BATCH_SIZE if self.pad is not None else 1
            for start in range(0, len(order), size):
                members = order[start : start + size]
                rewards[members] = self._batch([read[i] for i in members])
            if not np.isfinite(rewards).all():
                raise UserError(f"{self.key}: gave a reward that is not finite; try model.dtype=float32")
            return rewards

        return _shared(work, len(texts))
