"""What is timed: our step in all its forms, and a plain cross-entropy step of the same model as the ceiling.

A system is made from a `Work` and has `step(k)`, one optimizer update, which returns its loss, and `ref_seconds`, (wall,
CPU) of its reference pass; those that train on pairs have `logps(indices)`. Letters: B rows, T tokens of a row, S responses.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench import data
from rpo import losses
from rpo.config import Loss, Optim
from rpo.data import schedule
from rpo.data.batch import Batch, make_batch
from rpo.data.dataset import Rows
from rpo.model import fingerprint, hf, shard
from rpo.model.logprobs import response_sums
from rpo.model.policy import layers_of, prepare, score
from rpo.training import meter, optim, reference

MODELS = {  # an 11M Llama for CPUs; the shapes of SmolLM2-135M, Qwen2.5-0.5B, Llama-3.2-1B, Mistral-7B and Qwen2.5-7B
    "11m": {"model_type": "llama", "vocab_size": data.VOCABULARY, "hidden_size": 256, "intermediate_size": 688}
    | {"num_hidden_layers": 4, "num_attention_heads": 4},
    "smollm2": {"model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536}
    | {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "0.5b": {"model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864}
    | {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1b": {"model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192}
    | {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "mistral": {"model_type": "llama", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "7b": {"model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944}
    | {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
}
BETA, MAX_GRAD_NORM, LOG_EVERY = 0.1, 1.0, 10
DPO = Loss("sigmoid", "none", BETA, 0.0, 0.0, normalize=False, lam=None, clip=None, gamma=None)

# Is given the clipped gradient, parameter by parameter, before the optimizer's step.
Inspect = Callable[[Iterator[tuple[str, Tensor]]], None]


@dataclass(frozen=True)
class Work:
    """The same for every system: step k trains on rows [k x pairs, (k + 1) x pairs)."""

    rows: Rows
    pairs: int
    model: str
    device: torch.device
    dtype: torch.dtype  # of compute; weights, gradients and moments are fp32
    tokens_per_microbatch: int
    activation_checkpointing: str
    lr: float
    seed: int = 0

    @property
    def steps(self) -> int:
        return len(self.rows) // self.pairs

    def members(self, k: int) -> np.ndarray:
        return np.arange(k * self.pairs, (k + 1) * self.pairs)

    def lengths(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """P, C and R of step k's pairs."""
        members = self.members(k)
        return self.rows.prompt[members], self.rows.chosen[members], self.rows.rejected[members]


def timed(device: torch.device, function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds until the device has done `function`, the process's CPU seconds, and what it returned."""
    meter.wait(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    value = function()
    meter.wait(device)
    return time.perf_counter() - start, time.process_time() - cpu_start, value


def build(work: Work) -> PreTrainedModel:
    """The model in fp32 on the device, its random weights a function of `work.seed`."""
    tokens = {"pad_token_id": data.PAD, "bos_token_id": data.BOS, "eos_token_id": data.EOS}
    config = AutoConfig.for_model(**MODELS[work.model], **tokens, max_position_embeddings=4096)
    with torch.random.fork_rng(), work.device:
        torch.manual_seed(work.seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def size_of(work: Work) -> meter.ModelSize:
    return meter.ModelSize(**hf.sizes(build(replace(work, device=torch.device("meta")))))


def _sharding(work: Work, compile: bool) -> dict:
    options = {"activation_checkpointing": work.activation_checkpointing, "reshard_after_forward": False}
    fsdp = replace(shard.PLAIN, **options)
    return {"mesh": shard.mesh(work.device, fsdp), "fsdp": fsdp, "compute_dtype": work.dtype, "compile": compile}


def _adamw(module: nn.Module, work: Work) -> torch.optim.AdamW:
    fixed = {"warmup_ratio": 0.0, "schedule": "constant", "min_lr_ratio": 0.0, "weight_decay": 0.0}
    settings = Optim(lr=work.lr, betas=[0.9, 0.999], max_grad_norm=MAX_GRAD_NORM, state_dtype="float32", **fixed)
    return optim.adamw(module, settings)


class Ours:
    """train.py's update at degree 1, the next step's batches prepared by a thread meanwhile."""

    def __init__(self, work: Work, *, layout: str, cached: bool, compile: bool):
        self.work, self.layout, self.rows = work, layout, work.rows
        lm = build(work)
        weights = fingerprint.weights_digest(lm.cpu()) if cached else None
        sharding = _sharding(work, compile)
        self.fsdp, self.policy = sharding["fsdp"], prepare(lm, **sharding, trainable=True)
        self.live = None if cached else prepare(build(work), **_sharding(work, compile), trainable=False)
        self.ref_seconds = None
        if cached:
            self.logps(work.members(0))  # compiles
            *self.ref_seconds, logps = timed(work.device, lambda: self._reference_logps(weights))
            self.rows = replace(work.rows, ref_logps=logps)
        self.worker = ThreadPoolExecutor(1)
        self.begin(DPO)

    def _reference_logps(self, weights: str) -> np.ndarray:
        how = {"layout": self.layout, "device": self.work.device}
        facts = fingerprint.identity(weights, self.policy, compute_dtype=self.work.dtype, **how)
        with tempfile.TemporaryDirectory() as folder:  # empty: nothing can be hit
            how |= {"cache_dir": Path(folder), "budget": self.work.tokens_per_microbatch}
            how["noise_floor"] = 1e-5 if self.work.dtype == torch.float32 else 5e-2
            return reference.score_rows(self.policy, self.work.rows, facts, **how, name="bench")[0]

    def begin(self, loss: Loss) -> None:
        """A run of that loss from the weights as they are."""
        self.loss = loss
        shard.reshard(self.policy)  # a gathered parameter would be updated in vain
        self.optimizer = _adamw(self.policy, self.work)
        self.meter = meter.Meter(loss, 0.0, self.work.device)
        self.bad_step = torch.full((), -1, device=self.work.device)
        self.prepared = self.worker.submit(self._prepare, 0)

    def weights(self) -> list[Tensor]:
        """The policy's own storage."""
        shard.reshard(self.policy)
        return [param.to_local().detach() for param in self.policy.parameters()]

    def _plan(self, members: np.ndarray) -> schedule.StepPlan:
        return schedule.plan_step(self.rows, members, layout=self.layout, budget=self.work.tokens_per_microbatch)

    def _prepare(self, k: int) -> tuple[schedule.StepPlan, list[Batch]]:
        plan = self._plan(self.work.members(k % self.work.steps))
        batches = [make_batch(self.rows, members, layout=self.layout) for members, _ in plan.microbatches]
        return plan, [batch.pin() for batch in batches] if self.work.device.type == "cuda" else batches

    def step(self, k: int, inspect: Inspect | None = None) -> Tensor:
        plan, batches = self.prepared.result()
        self.prepared = self.worker.submit(self._prepare, k + 1)
        counts = {"step_pairs": plan.pairs, "step_chosen_tokens": plan.chosen_tokens}
        total = torch.zeros((), device=self.work.device)
        for i, batch in enumerate(batches, start=1):
            shard.sync_gradients(self.policy, last=i == len(batches), fsdp=self.fsdp)
            pairs = score(self.policy, self.live, batch.to(self.work.device))
            preference_P, sft_P = losses.objective(self.loss, pairs, **counts)
            loss = (preference_P + sft_P).sum() / plan.pairs
            loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
            loss.backward()
            self.meter.add(pairs, preference_P.detach(), sft_P.detach(), batch.weight)
            total += loss.detach()
        grad_norm = optim.clip_grad_norm(self.policy, MAX_GRAD_NORM)
        if inspect:
            inspect(self._gradient())
        self.bad_step = torch.where((self.bad_step < 0) & ~grad_norm.isfinite(), k, self.bad_step)
        optim.step_if_finite(self.optimizer, self.bad_step >= 0, self.work.lr)
        self.optimizer.zero_grad()
        if (k + 1) % LOG_EVERY == 0:
            self.meter.read()
        return total

    def _gradient(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in self.policy.named_parameters():
            yield name.removeprefix("lm.").replace("_checkpoint_wrapped_module.", ""), param.grad.to_local()

    @torch.no_grad()
    def logps(self, indices: np.ndarray) -> np.ndarray:
        """Summed log-probs (indices, 2) of chosen and rejected by the policy as it is."""
        result, place = np.empty((len(indices), 2)), {int(i): at for at, i in enumerate(indices)}
        for members, _ in self._plan(indices).microbatches:
            batch = make_batch(self.rows, members, layout=self.layout).to(self.work.device)
            sums_S = response_sums(self.policy(batch), batch.length_S)
            result[[place[int(i)] for i in members]] = sums_S.view(2, -1).T.double().cpu().numpy()
        return result

    def close(self) -> None:
        self.worker.shutdown()


class _Causal(nn.Module):
    """An FSDP root whose forward is the library's own loss of a causal LM over all tokens."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        return self.lm(input_ids=input_ids_BT, labels=input_ids_BT, use_cache=False).loss


class CrossEntropy:
    """Plain causal-LM training on `dense_rows`: no pair, no padding, full logits of all tokens.

    What the same model, optimizer and sharding reach when nothing is asked of them that DPO adds.
    """

    ref_seconds = None

    def __init__(self, work: Work, *, compile: bool):
        self.work = work
        lm = build(work)
        self.root, sharding = _Causal(lm), _sharding(work, compile)
        self.fsdp = sharding.pop("fsdp")
        shard.shard(self.root, layers_of(lm), sharding.pop("mesh"), self.fsdp, **sharding)
        self.optimizer = _adamw(self.root, work)

    def step(self, k: int, inspect: Inspect | None = None) -> Tensor:
        batches = dense_rows(self.work, k)
        rows = sum(map(len, batches))
        total = torch.zeros((), device=self.work.device)
        for i, batch_BT in enumerate(batches, start=1):
            shard.sync_gradients(self.root, last=i == len(batches), fsdp=self.fsdp)
            loss = self.root(batch_BT.to(self.work.device)) * (len(batch_BT) / rows)
            loss.backward()
            total += loss.detach()
        optim.clip_grad_norm(self.root, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def close(self) -> None:
        pass


def dense_rows(work: Work, k: int) -> list[Tensor]:
    """The unique tokens of step k's pairs end to end, in equal rows of at most 2,048, cut by tokens_per_microbatch."""
    stream = np.concatenate([part for i in work.members(k) for part in work.rows.row(int(i))])
    rows = -(-len(stream) // data.MAX_LENGTH)
    width = len(stream) // rows  # drops fewer tokens than there are rows
    ids_BT = torch.from_numpy(stream[: rows * width].reshape(rows, width).astype(np.int64))
    return list(ids_BT.split(max(1, work.tokens_per_microbatch // width)))


def cross_entropy_flops(size: meter.ModelSize, shapes: list[tuple[int, int]]) -> float:
    """FLOPs of a causal-LM step over batches of these (rows, tokens of a row), by the rule of ModelSize.step_flops.

    6 (trunk + head) x tokens + 12 x layers x attention width x query-key pairs, T (T + 1) / 2 of them per row.
    """
    tokens = sum(b * t for b, t in shapes)
    visible = sum(b * (t * (t + 1) // 2) for b, t in shapes)
    return float(6 * (size.trunk + size.head) * tokens + 12 * size.layers * size.attention_width * visible)
