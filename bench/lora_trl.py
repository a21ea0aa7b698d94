"""Ten steps of LoRA DPO by TRL and by train.py, from TRL's adapter, on the same pairs in the same order: how far apart?

python bench/lora_trl.py         # needs the extras bench and lora; a minute on one core
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from trl import DPOConfig, DPOTrainer

from rpo.data import schedule
from tests.helpers.models import make_lm
from tests.helpers.rows import make_rows_json, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH, RATE, BETA = 10, 8, 1e-2, 0.1


class InOrder(DPOTrainer):
    def _get_train_sampler(self, *_args: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def by_trl(folder: Path, rows: list[dict]) -> list[float]:
    """Its losses; start/ and end/ are its adapter before and after."""
    order = [int(i) for step in range(STEPS) for i in schedule.step_rows(step, len(rows), BATCH, 0)]
    cfg = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        logging_steps=1,
        beta=BETA,
        max_grad_norm=1.0,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
    )
    trainer = InOrder(
        model=make_lm(tie_word_embeddings=False),
        args=cfg,
        train_dataset=Dataset.from_list([rows[i] for i in order]),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.model.save_pretrained(folder / "start")
    config = json.loads((folder / "start/adapter_config.json").read_text())
    (folder / "start/adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(folder / "base")})
    )
    trainer.train()
    trainer.model.save_pretrained(folder / "end")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_train(folder: Path) -> list[float]:
    """Its losses; the adapter is in ours/model."""
    args = [
        "loss=dpo",
        f"loss.beta={BETA}",
        f"model.path={folder / 'start'}",
        f"reference.path={folder / 'base'}",
        f"data.train={folder / 'train.jsonl'}",
        "data.eval=null",
        f"max_steps={STEPS}",
        f"batch_size={BATCH}",
        "log_every=1",
        f"optim.lr={RATE}",
        "optim.schedule=constant",
        "optim.warmup_ratio=0",
        "wandb.mode=disabled",
        f"cache_dir={folder / 'cache'}",
        f"run_dir={folder / 'ours'}",
    ]
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *args], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    events = map(json.loads, (folder / "ours/metrics.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["split"] == "train"]


def main() -> None:
    rows = make_rows_json(STEPS * BATCH, seed=5)
    rows = [row | {"chosen": said(row["chosen"]), "rejected": said(row["rejected"])} for row in rows]
    with tempfile.TemporaryDirectory(prefix="lora-") as name:
        folder = Path(name)
        make_lm(tie_word_embeddings=False).save_pretrained(folder / "base")
        make_tokenizer().save_pretrained(folder / "base")
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        theirs, ours = by_trl(folder, rows), by_train(folder)
        end, model = (load_file(folder / path / "adapter_model.safetensors") for path in ("end", "ours/model"))
    print("TRL ", *(f"{loss:.7f}" for loss in theirs))
    print("ours", *(f"{loss:.7f}" for loss in ours))
    gap = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    apart = max((end[name] - model[name]).abs().max().item() for name in end)
    print(f"largest difference of a loss {gap:.1e}, of a weight {apart:.1e} (moved by up to {_moved(end):.1e})")


def _moved(end: dict[str, torch.Tensor]) -> float:
    return max(tensor.abs().max().item() for name, tensor in end.items() if "lora_B" in name)


if __name__ == "__main__":
    main()
