"""Runs on a small copy of the embedded task, trained in seconds."""

import json
import shutil

import numpy as np

import train
from rpo import dist
from rpo.runs import folder as run_folder
from rpo.synthetic import grammar, task
from tests.helpers.models import make_lm
from tests.helpers.rows import write_jsonl
from tests.helpers.runs import settings

BETA, STEPS = 0.3, 3
TRAINING = (f"max_steps={STEPS}", "batch_size=8", "checkpoint.every=1", "checkpoint.keep=all", "eval_every=0")
TRAINING += ("optim.lr=1e-2", "optim.warmup_ratio=0", "wandb.mode=disabled", f"loss.beta={BETA}")


def trained(run_dir, *more):
    try:
        assert train.train(settings("data=files", *TRAINING, *more, f"run_dir={run_dir}")) == "finished"
    finally:
        dist.shutdown()
    return run_dir


def make_gold_sweep(folder):
    """A folder that the embedded task could have made (its tokenizer and reward, a random model, pairs of 6 prompts),
    and sweep/ with a DPO run, an RPO run, a failed cell and one without checkpoints."""
    # With a word b, which stop_ids tries the template on: an unknown word is a special token, and would end turns too.
    tokenizer = task.word_tokenizer(["<user>", "<assistant>", *grammar.vocabulary(), "b"], task.TEMPLATE)
    make_lm(vocab_size=len(tokenizer), scale=0.5).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    weights = {"pairs": 24, "eval_pairs": 16, "flip": 0.0, "hidden_weight": 0.5, "length_weight": 0.05, "seed": 0}
    (folder / "settings.json").write_text(json.dumps({"gold": weights}))
    corpus = [row for row in grammar.sample_corpus(600, np.random.default_rng(1)) if row[0] in grammar.prompts()[:6]]
    rows = [
        {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}
        for (prompt, chosen), (_, rejected) in zip(corpus[:40], corpus[40:80], strict=True)
    ]
    files = [write_jsonl(folder / name, part) for name, part in (("train.jsonl", rows[:24]), ("eval.jsonl", rows[24:]))]
    where = [f"model.path={folder / 'model'}", f"data.train={files[0]}", f"data.eval={files[1]}"]
    trained(folder / "sweep" / "0", "loss=dpo", *where)
    trained(folder / "sweep" / "1", "loss=rpo_sum", "loss.eta=0.5", *where)
    (folder / "sweep" / "2").mkdir()
    run_folder.write_status(folder / "sweep" / "2", "failed", "UserError: no room")
    shutil.copytree(folder / "sweep" / "0", folder / "sweep" / "10", ignore=shutil.ignore_patterns("checkpoints"))
    return folder
