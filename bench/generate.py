"""Tokens per second of greedy answers: ours, the library's generate in batches and one by one, its continuous batching.

    python bench/generate.py MODEL PROMPTS.jsonl      # a Hugging Face folder, rows with a `prompt` (a text or messages)

They take turns on the same prompts; the first round is not timed. Ours samples under FSDP as a run and `eval.py` do. An
answer counts as equal where its tokens are those of the library one prompt at a time.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from bench import report
from bench.systems import timed
from rpo import dist
from rpo.model import shard
from rpo.model.policy import prepare
from rpo.model.sampling import Sampling, sample, with_listed

Answers = list[list[int]]


def prompts_of(file: Path, tokenizer, count: int) -> Answers:
    rows = [json.loads(line)["prompt"] for line in file.read_text().splitlines()[:count]]
    chats = [[{"role": "user", "content": row}] if isinstance(row, str) else row for row in rows]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


def batched(lm: PreTrainedModel, prompts: Answers, config: GenerationConfig, size: int) -> Answers:
    """The library's generate on left-padded batches, cut at the first stop token."""
    made = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        width = max(map(len, batch))
        ids = torch.tensor([[config.pad_token_id] * (width - len(p)) + p for p in batch], device=lm.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=lm.device)
        output = lm.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        made += [cut(answer, config) for answer in output[:, width:].tolist()]
    return made


def cut(ids: list[int], config: GenerationConfig) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in config.eos_token_id), len(ids))
    return ids[: end + 1]


def systems(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Answers]]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = prompts_of(args.prompts, tokenizer, args.count)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    own = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    mesh = shard.mesh(device, shard.PLAIN)
    policy = prepare(own, mesh, shard.PLAIN, compute_dtype=dtype, compile=False, trainable=False, attention="sdpa")
    stops = with_listed([tokenizer.eos_token_id], lm)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=args.tokens, eos_token_id=stops, pad_token_id=tokenizer.eos_token_id
    )

    def ours() -> Answers:
        greedy = Sampling(0.0, 1.0, 0, max_new_tokens=args.tokens)
        how = {
            "device": device,
            "seed": [0],
            "batch_size": args.batch_size,
            "reshard": shard.PLAIN.reshard_after_forward,
        }
        return [completion.ids for completion in sample(policy, prompts, greedy, stops, **how)]

    def continuous() -> Answers:
        made = lm.generate_batch(prompts, generation_config=config, progress_bar=False)
        return [cut(made[f"req_{i}"].generated_tokens, config) for i in range(len(prompts))]

    return {
        "one at a time": lambda: batched(lm, prompts, config, 1),
        "the library's batches": lambda: batched(lm, prompts, config, args.batch_size),
        "ours": ours,
        "continuous batching": continuous,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--count", type=int, default=64, help="prompts")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = dist.init()
    made, seconds = {}, {}
    with torch.no_grad():
        ways = systems(args, device)
        for number in range(args.rounds + 1):
            for name, answer in ways.items():
                took, _, made[name] = timed(device, answer)
                seconds.setdefault(name, []).append(took)
                report.say(f"round {number}: {name} {took:.1f} s")
    exact, found = made["one at a time"], {}
    for name, answers in made.items():
        rate = sum(map(len, answers)) / statistics.median(seconds[name][1:])
        equal = sum(a == b for a, b in zip(answers, exact, strict=True)) / len(exact)
        found[name] = {"tokens_per_second": rate, "equal": equal, "seconds": seconds[name]}
    rows = [[name, f"{one['tokens_per_second']:.0f}", f"{one['equal']:.2f}"] for name, one in found.items()]
    report.print_table([["", "tokens/s", "equal"], *rows])
    arguments = {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}
    report.write(f"{device.type}_generate", device, arguments=arguments, systems=found)
    dist.shutdown()


if __name__ == "__main__":
    main()
