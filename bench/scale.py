"""What fits where, by the planner: the table of docs/SCALE.md.

    python bench/scale.py            # about ten minutes on two cores; reads no weights, needs no GPU

Of each model, whole or with an adapter of rank 16, on 1, 8 and 64 GPUs: the most tokens of one pair (prompt once, both
responses) with which a step fits 79 GiB (an H100) and 139 GiB (an H200), with what saves most: activations recomputed in
full, gradients sharded, a cached reference, one pair per micro-batch.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra import compose, initialize_config_dir
from transformers import AutoConfig

from rpo import config
from rpo.training import memory

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 5e5}
QWEN = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072}


def of(common: dict, hidden: int, inner: int, layers: int, heads: int, kv: int, *, tied: bool = False) -> dict:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "tie_word_embeddings": tied,
    }
    return common | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv}


MODELS = {
    "Llama 3.2 1B": of(LLAMA | {"head_dim": 64}, 2048, 8192, 16, 32, 8, tied=True),
    "Llama 3.1 8B": of(LLAMA, 4096, 14336, 32, 32, 8),
    "Qwen2.5 32B": of(QWEN, 5120, 27648, 64, 40, 8),
    "Llama 3.1 70B": of(LLAMA, 8192, 28672, 80, 64, 8),
}
TOKENS = (4096, 16384, 65536)
GPUS = (1, 8, 64)
CARDS = {"H100": 79, "H200": 139}  # GiB
WAYS = {"whole": [], "LoRA r 16": ["model.lora.r=16"]}


def gib(model: dict, tokens: int, gpus: int, more: list[str]) -> float:
    """GiB of each GPU at the fullest moment of a step with one pair of so many tokens."""
    overrides = [
        "data=files",
        "data.train=FILE",
        "model=hub",
        "model.path=DIR",
        "loss=rpo_sum",
        f"data.max_length={tokens // 2}",
        f"tokens_per_microbatch={tokens}",
        f"batch_size={max(64, 2 * gpus)}",
        "fsdp.activation_checkpointing=full",
        "fsdp.accumulate=sharded",
        *more,
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = config.train_config(compose("train", overrides=overrides))
    known = AutoConfig.for_model(**model)
    key = str(model), tokens, str(more)
    if key not in _PLACES:
        _PLACES[key] = memory.place_of(cfg, known, gpus)
    return memory.total(cfg, memory.replace(_PLACES[key], gpus=gpus), []) / memory.GIB


_PLACES: dict = {}


def main() -> None:
    heads = [f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS]
    print(f"| model | trained | {' | '.join(heads)} |")
    print("|---|---|" + "---|" * len(GPUS))
    for name, model in MODELS.items():
        for way, more in WAYS.items():
            cells = []
            for gpus in GPUS:
                needed = {tokens: gib(model, tokens, gpus, more) for tokens in TOKENS}
                most = [max((t for t, g in needed.items() if g <= 0.95 * card), default=0) for card in CARDS.values()]
                words = [f"{t // 1024}k" if t else "-" for t in most]
                cells.append(f"{', '.join(words)} ({', '.join(f'{g:.0f}' for g in needed.values())})")
            print(f"| {name} | {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
