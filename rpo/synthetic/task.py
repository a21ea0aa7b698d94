"""The embedded task (data=gold): built once into the cache by this project's own loop, and evaluated exactly.

    python -m rpo.synthetic.task model FOLDER     # the supervised model, by FOLDER/settings.json; `resolve` calls both
    python -m rpo.synthetic.task pairs FOLDER     # the preference pairs, into a copy of the former

A folder holds a word-level tokenizer, a corpus from the grammar, the supervised model that `train.py loss=sft` trained
on it, and preference pairs sampled from that model and labelled by the gold reward. Training reads them as any other
data. Tasks that differ only in their pairs share one supervised model.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import uuid
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rpo import dist
from rpo.config import SyntheticTask, Train
from rpo.data import tokenizer as data_tokenizer
from rpo.data.chat import Chat
from rpo.errors import UserError
from rpo.files import key_of, to_lines
from rpo.model import divergence
from rpo.model.policy import Policy, load_policy
from rpo.model.sampling import Completion, Sampling, sample
from rpo.model.shard import PLAIN
from rpo.synthetic import grammar
from rpo.text import in_quotes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def word_tokenizer(words: list[str], chat_template: str) -> PreTrainedTokenizerBase:
    """A tokenizer of exactly `words` (split at white space) and four special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<end>"}
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate([*special.values(), *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat_template, **special)


VERSION = 1  # raise it when the files' content changes: it is part of their key
CORPUS, CORPUS_EVAL = 20_000, 500
SFT = {  # settings of the supervised model; 99.4% of its word pairs are legal
    "max_steps": 400,
    "batch_size": 64,
    "optim.lr": 8e-3,
    "optim.warmup_ratio": 0.05,
    "optim.schedule": "linear",
    "optim.betas": [0.9, 0.999],
    "optim.max_grad_norm": 1.0,
    "optim.weight_decay": 0.0,
    "model.dtype": "float32",
    "tokens_per_microbatch": 16_384,
    "seed": 0,
}
CHAT = Chat("2024-01-01", {})
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=48)
BATCH_SIZE = 512  # prompts sampled at once
TOKENS = 4096  # rows x longest of one forward pass over answers
TEMPLATE = (  # with spaces between words, where the tokenizer splits
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


# ---- building it


@dist.main_first()
def resolve(cfg: Train) -> Train:
    """`cfg` with data.train, data.eval and (if null) model.path set to the task's files.

    Rank 0 builds the files on first use, in a subprocess; their folder is keyed by the settings that decide their content.
    """
    of_model = {"version": VERSION, "architecture": cfg.model.architecture, "sft": SFT}
    settings = of_model | {"gold": asdict(cfg.data.gold)}
    settings["gold"].pop("samples")  # an evaluation's size, no property of the files
    model = cfg.model
    if model.path is not None:
        tokenizer = data_tokenizer.load_tokenizer(
            model.tokenizer or model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        if missing := sorted(set(grammar.vocabulary()) - tokenizer.get_vocab().keys()):
            raise UserError(
                f"model.path={model.path} with data.train=gold: its tokenizer lacks the embedded task's words "
                f"({missing[0]}); give data.train=FILE of your own"
            )
    root = Path(cfg.cache_dir).expanduser().resolve() / "gold"
    folder = root / key_of(settings)
    if not folder.exists():
        sft = root / f"model-{key_of(of_model)}"
        if not sft.exists():
            print(f"building the embedded task in {root} (once; about a minute)", flush=True)
            _make_in_subprocess("model", sft, of_model)
        _make_in_subprocess("pairs", folder, settings, copy_of=sft)
    supervised = not cfg.loss.has_pairs
    files = ("corpus.jsonl.gz", "corpus_eval.jsonl.gz") if supervised else ("pairs.jsonl.gz", "pairs_eval.jsonl.gz")
    train, held_out = (str(folder / name) for name in files)
    if model.path is None and supervised:
        model = replace(model, tokenizer=str(folder / "tokenizer"))
    elif model.path is None:
        model = replace(model, path=str(folder / "sft" / "model"))
    return replace(cfg, model=model, data=replace(cfg.data, train=train, eval=cfg.data.eval and held_out))


def _make_in_subprocess(stage: str, folder: Path, settings: dict, copy_of: Path | None = None) -> None:
    part = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    if copy_of:
        shutil.copytree(copy_of, part)
    part.mkdir(parents=True, exist_ok=True)
    (part / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    try:
        _run("-m", "rpo.synthetic.task", stage, str(part))
        part.rename(folder)
    except OSError:
        if not folder.exists():  # else another run was first, with the same content
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _run(*args: str) -> None:
    """Runs this interpreter on `args` as a single process, without a launcher's variables."""
    root, pipe = Path(__file__).parents[2], subprocess.PIPE
    launcher = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "ROLE_",
        "MASTER_",
        "TORCHELASTIC_",
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    command = [sys.executable, *args]
    process = subprocess.run(command, cwd=root, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        raise UserError(f"data=gold: building the embedded task failed: {' '.join(process.stdout.splitlines()[-3:])}")


def make_model(folder: Path, settings: dict) -> None:
    """Writes tokenizer/, the corpus files and sft/ (a run of train.py) into `folder`."""
    tokenizer = word_tokenizer(["<user>", "<assistant>", *grammar.vocabulary()], TEMPLATE)
    tokenizer.save_pretrained(folder / "tokenizer")
    corpus = grammar.sample_corpus(CORPUS + CORPUS_EVAL, np.random.default_rng(SFT["seed"]))
    rows = [{"prompt": [{"role": "user", "content": prompt}], "chosen": answer} for prompt, answer in corpus]
    _write(folder / "corpus.jsonl.gz", rows[:CORPUS])
    _write(folder / "corpus_eval.jsonl.gz", rows[CORPUS:])

    architecture = ",".join(f"{key}:{value}" for key, value in settings["architecture"].items())
    overrides = {"loss": "sft", "model.tokenizer": folder / "tokenizer", "model.architecture": f"{{{architecture}}}"}
    overrides |= {"data.train": folder / "corpus.jsonl.gz", "data.eval": folder / "corpus_eval.jsonl.gz"}
    overrides |= {"run_dir": folder / "sft", "eval_every": 0, "wandb.mode": "disabled", "cache_dir": folder / "cache"}
    values = {key: in_quotes(str(value)) if isinstance(value, Path) else value for key, value in overrides.items()}
    _run("-m", "rpo.train", *(f"{key}={value}" for key, value in (values | SFT).items()))
    shutil.rmtree(folder / "cache")


def make_pairs(folder: Path, settings: dict) -> None:
    """Writes the pairs files into `folder`, sampled from its sft/model."""
    gold = SyntheticTask(**settings["gold"], samples=1)
    tokenizer = data_tokenizer.load_tokenizer(str(folder / "tokenizer"))
    device = dist.init()
    fsdp = replace(PLAIN, reshard_after_forward=False)
    policy = load_policy(str(folder / "sft" / "model"), device=device, dtype="float32", fsdp=fsdp).policy
    for name, count, seed in (("pairs", gold.pairs, 2 * gold.seed), ("pairs_eval", gold.eval_pairs, 2 * gold.seed + 1)):
        _write(folder / f"{name}.jsonl.gz", _label(policy, tokenizer, count, seed, gold, device))
    dist.shutdown()


def _label(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, count: int, seed: int, gold: SyntheticTask, device: torch.device
) -> list[dict]:
    """`count` pairs: two answers of the model to one prompt, ordered by Bradley-Terry on the gold reward, then flips."""
    rng = np.random.default_rng([seed, 7])
    texts = grammar.prompts()
    asked = [texts[i] for i in rng.integers(len(texts), size=count + count // 5 + 20)]  # some pairs come out identical
    messages = [[{"role": "user", "content": text}] for text in asked]
    prompts = [data_tokenizer.encode_prompt(tokenizer, m, CHAT) for m in messages]
    assert not any(tokenizer.unk_token_id in prompt for prompt in prompts), "a prompt has an unknown word"
    stop_ids = data_tokenizer.stop_ids(tokenizer, CHAT)
    draw = partial(sample, policy, prompts, SAMPLING, stop_ids, device=device, batch_size=BATCH_SIZE, reshard=False)
    sides = [draw(seed=[seed, side]) for side in range(2)]
    rows = []
    for text, prompt, *answers in zip(asked, messages, *sides, strict=True):
        words = [answer_words(tokenizer, answer) for answer in answers]
        if words[0] == words[1] or not all(words):
            continue
        first, second = (rewards(tokenizer, [text], [answer], gold)[0] for answer in answers)
        first_wins = rng.random() < 1 / (1 + np.exp(second - first))
        first_wins ^= rng.random() < gold.flip
        chosen, rejected = words if first_wins else words[::-1]
        rows.append({"prompt": prompt, "chosen": " ".join(chosen), "rejected": " ".join(rejected)})
    assert len(rows) >= count, (len(rows), count)
    return rows[:count]


def _write(path: Path, rows: list[dict]) -> None:
    with gzip.open(path, "wt") as file:
        file.write(to_lines(rows))


def weights_of(train: str | list[str]) -> SyntheticTask | None:
    """The reward's settings of the embedded task that the file `train` belongs to; None for other data."""
    file = Path(train).parent / "settings.json" if isinstance(train, str) else Path()
    if not file.is_file() or "gold" not in (settings := json.loads(file.read_text())):
        return None
    return SyntheticTask(**settings["gold"], samples=1)


# ---- evaluating on it


def answer_words(tokenizer: PreTrainedTokenizerBase, answer: Completion) -> list[str]:
    """The words of an answer, without its end-of-turn."""
    return tokenizer.decode(answer.text_ids).split()


def rewards(
    tokenizer: PreTrainedTokenizerBase, asked: list[str], answers: list[Completion], gold: SyntheticTask
) -> np.ndarray:
    """The exact gold reward of each answer to its text in `asked`. Raises UserError if that names no topic."""
    for text in asked:
        if not text.split() or grammar.topic_of(text) not in grammar.TOPICS:
            raise UserError(
                f"data.eval: the prompt {text[:60]!r} is none of the embedded task's, so its answers have no reward; use "
                "data.eval=null, or with task=overopt another task.gold"
            )
    weights = {"hidden_weight": gold.hidden_weight, "length_weight": gold.length_weight}
    rows = [
        (grammar.topic_of(text), answer_words(tokenizer, answer), answer.ended)
        for text, answer in zip(asked, answers, strict=True)
    ]
    return np.array([grammar.gold_reward(*row, **weights) for row in rows])


def measure(
    policy: Policy,
    reference: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    answers: list[Completion],
    gold: SyntheticTask,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Per answer: gold reward, KL to the reference in nats, tokens, and whether it ended (the same on every rank)."""
    asked = [_asked(text) for text in tokenizer.batch_decode(prompts)]
    return {
        "gold": rewards(tokenizer, asked, answers, gold),
        "kl": divergence.measure(policy, reference, prompts, answers, device, budget=TOKENS)["kl"],
        "samples/length": np.array([len(answer.ids) for answer in answers]),
        "samples/ended": np.array([answer.ended for answer in answers]),
    }


def evaluate(
    policy: Policy,
    reference: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    stop_ids: list[int],
    gold: SyntheticTask,
    *,
    device: torch.device,
    seed: int,
    reshard: bool,
) -> dict[str, float]:
    """Means of `measure` over one sampled answer per prompt, at temperature 1."""
    answers = sample(
        policy, prompts, SAMPLING, stop_ids, seed=[seed], device=device, batch_size=BATCH_SIZE // 4, reshard=reshard
    )
    table = measure(policy, reference, tokenizer, prompts, answers, gold, device)
    return {name: float(values.mean()) for name, values in table.items()}


def _asked(rendered: str) -> str:
    """The user's text in a prompt rendered by TEMPLATE; any other text as it is."""
    _, mark, rest = rendered.partition("<user>")
    return rest.partition("<assistant>")[0].strip() if mark else rendered


if __name__ == "__main__":
    stage, folder = sys.argv[1], Path(sys.argv[2])
    {"model": make_model, "pairs": make_pairs}[stage](folder, json.loads((folder / "settings.json").read_text()))
