"""Tiny things that many tests share: a process group of one, a word tokenizer, a model, preference files."""

import gzip
import json

import numpy as np
import torch

from rpo.config import EvalData
from rpo.data.chat import Chat
from rpo.data.dataset import Rows
from rpo.synthetic import task

WORDS = tuple(f"{first}{second}" for first in "bcdfg" for second in ("a", "e", "i", "o", "u", "an", "en", "in"))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def make_tokenizer():
    return task.word_tokenizer(["[user]", "[assistant]", "[system]", *WORDS], TEMPLATE)


def make_rows_json(num_rows, seed=0):
    """Preference rows over WORDS in the message form, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def text(low, high):
        count = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())

    return [
        {"prompt": [{"role": "user", "content": text(2, 12)}], "chosen": text(2, 20), "rejected": text(2, 20)}
        for _ in range(num_rows)
    ]


def write_jsonl(path, rows):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


DATE = "2021-03-04"
CHAT = Chat(DATE, {})
CFG = EvalData(
    eval=None,
    revision=None,
    chat_template=None,
    template_date=DATE,
    chat_template_kwargs=None,
    max_length=512,
    truncation="drop",
    on_bad_row="error",
)


def make_rows(lengths, seed=0, vocab_size=50):
    rng = np.random.default_rng(seed)
    prompt, chosen, rejected = (np.array(column, dtype=np.int32) for column in zip(*lengths, strict=True))
    ids = rng.integers(1, vocab_size, size=int((prompt + chosen + rejected).sum())).astype(np.int32)
    none = np.zeros(len(lengths), np.int32)
    return Rows(ids, prompt, chosen, rejected, none, none, ("made",))


LENGTHS = [(3, 2, 5), (1, 1, 1), (7, 4, 2), (2, 9, 3), (5, 5, 5)]
