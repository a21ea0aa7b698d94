"""Frozen token-id triples (prompt, chosen, rejected): what every system of a benchmark is given, pair by pair.

Three made distributions of 4,096 pairs, P + max(C, R) <= 2,048, with log-normal lengths of the medians and means that
public preference data have after tokenisation; C and R are drawn apart. Ids are uniform over the first 16,384 whatever
the model, BOS begins a prompt, EOS ends a response. Or real ids, of real files.
"""

import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rpo.data.dataset import Rows
from rpo.errors import UserError

# (median, sigma) of the prompt's and of a response's length in tokens; sigma = sqrt(2 log(mean / median)).
LENGTHS = {
    "hh": ((96, 0.83), (45, 0.78)),  # Anthropic HH: short, the prompt twice a response
    "uf": ((71, 0.98), (169, 0.85)),  # UltraFeedback: long responses
    "long": ((589, 0.58), (93, 0.68)),  # HelpSteer: long prompts
}
REAL = {
    "hh": "hh_rlhf_helpful_test/pairs.jsonl.gz",
    "uf": "ultrafeedback_binarized_1200/train.jsonl.gz",
    "long": "llamafactory_dpo_en_demo_300/pairs.jsonl.gz",
}
NUM_PAIRS, MAX_LENGTH, VOCABULARY, SEED = 4096, 2048, 16_384, 0
PAD, UNK, BOS, EOS = range(4)  # as rpo.synthetic.task.word_tokenizer numbers them


def made(lengths: str) -> Rows:
    """The 4,096 pairs of one of LENGTHS; a function of its name alone."""
    prompt_form, response_form = LENGTHS[lengths]
    rng = np.random.default_rng([SEED, *lengths.encode()])

    def draw(median: float, sigma: float, most: np.ndarray | int) -> np.ndarray:
        return np.clip(np.rint(rng.lognormal(np.log(median), sigma, NUM_PAIRS)), 2, most).astype(np.int32)

    prompt = draw(*prompt_form, MAX_LENGTH * 3 // 4)
    chosen, rejected = (draw(*response_form, MAX_LENGTH - prompt) for _ in range(2))
    sizes = np.stack([prompt, chosen, rejected], axis=1)
    ids = rng.integers(EOS + 1, VOCABULARY, sizes.sum(), dtype=np.int32)
    ends = sizes.cumsum().reshape(sizes.shape)
    ids[ends[:, 0] - prompt] = BOS
    ids[ends[:, 1:] - 1] = EOS
    parts = np.split(ids, ends.ravel()[:-1])
    return Rows.of(list(zip(parts[::3], parts[1::3], parts[2::3], strict=True)), f"{lengths} made from seed {SEED}")


def real(lengths: str) -> Rows:
    """Real pairs of the same character from the folder RPO_TEST_DATA, tokenised by a byte-level BPE trained on them.

    Turns are joined by line breaks, pairs longer than MAX_LENGTH dropped. Raises UserError: no folder, no such file.
    """
    if (folder := os.environ.get("RPO_TEST_DATA")) is None:
        raise UserError("--data real: RPO_TEST_DATA names no folder; set it to one that holds " + REAL[lengths])
    path = Path(folder) / REAL[lengths]
    if not path.is_file():
        raise UserError(f"--data real: {path} does not exist; RPO_TEST_DATA must name a folder that holds it")
    with gzip.open(path, "rt") as file:
        pairs = [json.loads(line) for line in file]
    texts = [
        (
            "\n\n".join(f"{m['role']}: {m['content']}" for m in p["prompt"]) + "\n\nassistant:",
            p["chosen"],
            p["rejected"],
        )
        for p in pairs
    ]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<unk>", "<bos>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for triple in texts for text in triple), trainer)

    triples = []
    for prompt, *responses in texts:
        encoded = [[BOS, *tokenizer.encode(prompt).ids], *([*tokenizer.encode(r).ids, EOS] for r in responses)]
        if len(encoded[0]) + max(map(len, encoded[1:])) <= MAX_LENGTH:
            triples.append(encoded)
    return Rows.of(triples, str(path))


def sha256(rows: Rows) -> str:
    """Of all lengths and ids."""
    digest = hashlib.sha256()
    for array in (rows.prompt, rows.chosen, rows.rejected, rows.ids):
        digest.update(array.astype("<i4").tobytes())
    return digest.hexdigest()


def describe(rows: Rows) -> str:
    unique = rows.prompt + rows.chosen + rows.rejected
    scored = rows.chosen + rows.rejected
    return (
        f"{len(rows):,} pairs of median {np.median(unique):.0f}, mean {unique.mean():.0f} unique tokens "
        f"({(unique + rows.prompt).mean():.0f} with the prompt twice; {scored.sum() / unique.sum():.0%} scored)"
    )


def first(rows: Rows, count: int) -> Rows:
    """The first `count` pairs, from the beginning again where there are fewer."""
    return Rows.of([rows.row(i % len(rows)) for i in range(count)], rows.files[0])
