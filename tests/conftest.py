"""Tiny things that many tests share: a process group of one, a word tokenizer, a model, preference files."""

import gzip
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from transformers import AutoConfig, AutoModelForCausalLM

from rpo import checks, dist, eval_checks, tokens

ROOT = Path(__file__).parent.parent
WORDS = tuple(f"{first}{second}" for first in "bcdfg" for second in ("a", "e", "i", "o", "u", "an", "en", "in"))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# Families that are proven, as tiny configs: model_type -> what differs from the common sizes.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GEMMA = {"head_dim": 8}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": GEMMA,
    "gemma2": GEMMA | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 0.05},
    "gemma3_text": GEMMA | {"query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
}


def pytest_configure(config):
    """Slow tests stay out of a run that names neither a file nor -m: a file that is named runs whole."""
    if not config.option.markexpr and config.args_source is not config.ArgsSource.ARGS:
        config.option.markexpr = "not slow"


@pytest.fixture(scope="session", autouse=True)
def quiet_environment(tmp_path_factory):
    """No test reads the user's cache or key, reaches a network, or leaves threads to fight over two cores."""
    os.environ |= {"RPO_CACHE": str(tmp_path_factory.mktemp("cache")), "HF_HUB_OFFLINE": "1", "WANDB_SILENT": "true"}
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        os.environ.pop(name, None)
    os.environ["NETRC"] = os.devnull


@pytest.fixture
def group():
    """A process group of one, destroyed afterwards; the value is the device."""
    yield dist.init()
    dist.shutdown()


def make_tokenizer():
    return tokens.word_tokenizer(["[user]", "[assistant]", "[system]", *WORDS], TEMPLATE)


@contextmanager
def float64_throughout():
    """Float64 stays float64 where transformers' norms, rotary angles and soft-capped attention compute in fp32.

    They round a prompt's gradient once where it is packed, twice where it is padded: 6e-8, which would hide the rest.
    """

    def widened(function):
        def call(x, *args, **kwargs):
            if x.dtype == torch.float64:
                args = [torch.float64 if arg is torch.float32 else arg for arg in args]
                kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
            return function(x, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:  # not a TorchFunctionMode: backward recomputes layers outside of one
        patch.setattr(torch.Tensor, "to", widened(torch.Tensor.to))
        patch.setattr(torch.Tensor, "float", lambda x: x.to(torch.float32))
        patch.setattr(F, "softmax", widened(F.softmax))
        yield


def make_lm(family="llama", vocab_size=None, seed=0, scale=1.0, **sizes):
    """A random model whose logits are far from uniform, so that a wrong number shows."""
    tokens = {
        "vocab_size": vocab_size or len(make_tokenizer()),
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    sizes = ({} if family == "gpt2" else SIZES) | FAMILIES.get(family, {}) | sizes
    lm_config = AutoConfig.for_model(family, **tokens, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(lm_config, dtype=torch.float32)
        with torch.no_grad():
            for param in lm.parameters():
                param.add_(0.1 * scale * torch.randn_like(param))
    return lm.eval()


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with model/ (Llama and its tokenizer), train.jsonl.gz (40 pairs) and eval.jsonl.gz (12 pairs)."""
    folder = tmp_path_factory.mktemp("tiny")
    make_lm().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "train.jsonl.gz", make_rows_json(40))
    write_jsonl(folder / "eval.jsonl.gz", make_rows_json(12, seed=1))
    return folder


def settings(*overrides, name="train"):
    """The checked settings of a command line."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(name, overrides=[str(o) for o in overrides])
    return {"train": checks.train_config, "eval": eval_checks.eval_config}[name](cfg)


def tiny_args(tiny, *more):
    """Overrides of a short, quiet run on the tiny folder."""
    return [
        f"model.path={tiny / 'model'}",
        f"data.train={tiny / 'train.jsonl.gz'}",
        f"data.eval={tiny / 'eval.jsonl.gz'}",
        "wandb.mode=disabled",
        "optim.lr=1e-3",
        *more,
    ]


def script_env(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


def command(script, *args, ranks=1):
    """The shell command that runs a script on so many ranks."""
    args = [str(arg) for arg in args]
    if ranks == 1:
        return [sys.executable, str(ROOT / script), *args]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        str(ROOT / script),
        *args,
    ]
