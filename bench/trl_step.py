"""TRL's DPOTrainer on the same pairs, in its own training loop, which is held after each optimizer step.

TRL tokenises text itself, so it is given text whose words are our ids; that part is not timed, and the ids that it
ends up with are checked. Nothing of TRL is changed but for the row that says so.
"""

import os
import queue
import tempfile
import threading
import types
import warnings
from unittest import mock

import datasets
import numpy as np
import torch
import trl.trainer.utils as trl_utils
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

from bench import data
from bench.systems import BETA, LOG_EVERY, MAX_GRAD_NORM, Inspect, Work, build, timed
from rpo.synthetic.task import word_tokenizer

# What TRL 1.16 does when given only the task: pairs a step, precision (it would take bf16), length, learning rate.
DEFAULT = {"microbatch": 8, "precompute": False, "checkpointing": True, "grouped": False}
# The written grid that its best is taken from. `grouped`: a step's pairs sorted by length before they are divided.
GRID = [{"microbatch": m, "precompute": True, "checkpointing": False, "grouped": True} for m in (1, 2, 4, 8, 16, 32)]
GRID += [GRID[1] | {"precompute": False}, GRID[3] | {"checkpointing": True}]
COMPILED = {"microbatch": 8, "precompute": True, "checkpointing": False, "grouped": True, "torch_compile": True}

os.environ["TQDM_DISABLE"] = "1"
datasets.disable_progress_bars()
transformers_logging.set_verbosity_error()
warnings.filterwarnings("ignore", module=r"(transformers|trl|accelerate)\.")


class Trl:
    """DPOTrainer as a system; `eta` > 0 adds its "sft" loss. `ref_seconds`: its own precomputation, where asked for."""

    def __init__(
        self,
        work: Work,
        *,
        microbatch: int,
        precompute: bool,
        checkpointing: bool,
        grouped: bool,
        torch_compile: bool = False,
        patched: bool = False,
        beta: float = BETA,
        eta: float = 0.0,
    ):
        assert work.pairs % microbatch == 0, (work.pairs, microbatch)
        self.work = work
        self.order = np.concatenate([_grouped(work, k) if grouped else work.members(k) for k in range(work.steps)])
        # Model and reference by the same draw: TRL would read the reference from a file that this model has not.
        reference = None if precompute else build(work)
        self.folder = tempfile.TemporaryDirectory()
        args = DPOConfig(
            self.folder.name,
            beta=beta,
            loss_type=["sigmoid", "sft"] if eta else ["sigmoid"],
            loss_weights=[1.0, eta] if eta else None,
            per_device_train_batch_size=microbatch,
            gradient_accumulation_steps=work.pairs // microbatch,
            precompute_ref_log_probs=precompute,
            gradient_checkpointing=checkpointing,
            torch_compile=torch_compile,
            max_steps=work.steps,
            max_length=data.MAX_LENGTH,  # of the data already: nothing is cut
            learning_rate=work.lr,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            logging_steps=LOG_EVERY,
            bf16=work.dtype == torch.bfloat16,
            use_cpu=work.device.type == "cpu",
            dataloader_pin_memory=work.device.type == "cuda",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        self.losses: list[Tensor] = []
        self.ref_seconds, self.reference_passes = None, 0
        self.trainer = _Trainer(
            self,
            model=build(work),
            ref_model=reference,
            args=args,
            train_dataset=_dataset(work, self.order),
            processing_class=word_tokenizer([f"w{i}" for i in range(data.EOS + 1, data.VOCABULARY)], ""),
        )
        self.trainer.remove_callback(PrinterCallback)
        _check_ids(self.trainer.train_dataset, work, self.order)
        if patched:
            _patch(self.trainer.model)
        self.pace, self.thread = _Pace(), None
        self.trainer.add_callback(self.pace)

    def step(self, k: int, inspect: Inspect | None = None) -> Tensor:
        """Lets TRL's loop run on to the end of its next optimizer step: loader, collator and logging included."""
        self.losses.clear()
        self.pace.inspect = inspect
        if self.thread is None:
            self.thread = threading.Thread(target=self.pace.run, args=(self.trainer,), daemon=True)
            self.thread.start()
        else:
            self.pace.go.put(True)
        if (error := self.pace.done.get()) is not None:
            raise error
        return torch.stack(self.losses).mean()

    def logps(self, indices: np.ndarray) -> np.ndarray:
        """Summed log-probs (indices, 2) of chosen and rejected by the policy as it is, one pair at a time."""
        trainer, place = self.trainer, {int(i): at for at, i in enumerate(self.order)}
        rows = []
        for i in indices:
            batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[place[int(i)]]]))
            rows.append([x.item() for x in trainer.compute_ref_log_probs(trainer.model, batch)])
        return np.array(rows)

    def train(self) -> None:
        """All steps in one go, unpaced."""
        self.trainer.remove_callback(self.pace)
        self.trainer.train()

    def close(self) -> None:
        if self.thread is not None and self.thread.is_alive():
            self.pace.go.put(False)
            self.thread.join()
        self.folder.cleanup()


class _Trainer(DPOTrainer):
    """DPOTrainer that tells its losses, and how long its reference passes took."""

    def __init__(self, system: Trl, **kwargs):
        self.system = system
        super().__init__(**kwargs)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.system.losses.append(loss.detach())
        return loss

    def compute_ref_log_probs(self, *args):
        self.scored = True
        return super().compute_ref_log_probs(*args)

    def _precompute_ref_logps(self, *args):
        self.scored = False
        *self.system.ref_seconds, dataset = timed(
            self.args.device, lambda: super(_Trainer, self)._precompute_ref_logps(*args)
        )
        self.system.reference_passes += self.scored  # a hit of its cache scores nothing
        return dataset


class _Pace(TrainerCallback):
    """Hands over after each optimizer step, so that other systems can take their turns."""

    def __init__(self):
        self.go, self.done, self.inspect = queue.SimpleQueue(), queue.SimpleQueue(), None

    def run(self, trainer: DPOTrainer) -> None:
        try:
            trainer.train()
        except BaseException as error:
            self.done.put(error)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if self.inspect:
            named = ((name.removeprefix("_orig_mod."), p.grad) for name, p in model.named_parameters())
            self.inspect(named)

    def on_step_end(self, args, state, control, **_):
        self.done.put(None)
        control.should_training_stop |= not self.go.get()


def _grouped(work: Work, k: int) -> np.ndarray:
    members = work.members(k)
    prompt, chosen, rejected = work.lengths(k)
    return members[np.argsort(-(prompt + np.maximum(chosen, rejected)), kind="stable")]


def _dataset(work: Work, order: np.ndarray) -> datasets.Dataset:
    words = np.array(["<pad>", "<unk>", "<bos>", "<end>", *(f"w{i}" for i in range(data.EOS + 1, data.VOCABULARY))])

    def texts(i: int) -> dict[str, str]:
        prompt, chosen, rejected = (" ".join(words[part]) for part in work.rows.row(int(i)))
        return {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}

    return datasets.Dataset.from_list([texts(i) for i in order])


def _check_ids(dataset: datasets.Dataset, work: Work, order: np.ndarray) -> None:
    columns = zip(*(dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")), strict=True)
    for i, triple in zip(order, columns, strict=True):
        assert all(ours.tolist() == ids for ours, ids in zip(work.rows.row(int(i)), triple, strict=True)), i


def _patch(model: PreTrainedModel) -> None:
    """Not TRL as it is: no entropy, mean logits and top-1, and only scored tokens reach the head on any device.

    TRL sends all positions through the head where it has no Triton, that is on a CPU.
    """
    del model.forward  # the fused head that the trainer has hung before the library's own
    trl_utils.add_fused_lm_head(model, outputs=("log_probs",))
    fused = model.forward

    def forward(self, *args, **kwargs):
        with mock.patch.object(trl_utils, "_use_triton", lambda device: True):
            outputs = fused(*args, **kwargs)
        outputs.entropy = outputs.mean_logits = torch.zeros_like(outputs.log_probs)
        outputs.is_top1 = outputs.label_mask
        return outputs

    model.forward = types.MethodType(forward, model)
