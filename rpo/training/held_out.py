"""What is asked of held-out rows while a run trains: metrics, answers to read, and the embedded task's gold and KL."""

import numpy as np
import torch

from rpo import losses
from rpo.config import Train
from rpo.data.batch import make_batch
from rpo.data.chat import Chat
from rpo.data.dataset import Splits
from rpo.data.loader import own_share
from rpo.data.tokenizer import stop_ids
from rpo.model.policy import Policy, score, since_start
from rpo.model.sampling import Sampling, sample
from rpo.synthetic import task
from rpo.training.meter import Meter
from rpo.training.prepare import Prepared, starts_as_reference
from rpo.training.reference import Reference

NUM_SAMPLES = 4  # prompts answered every `sample_every` steps
MAX_NEW_TOKENS = 128  # of those answers, where the model's context has room for them
SHOWN = ("rewards/accuracies", "loss/preference", "shift/chosen", "nll/chosen", "gold", "kl")  # in the run's last line


class HeldOut:
    """data.eval under the policy as it is when asked. Made at the starting weights, whose answers it keeps beside later ones.

    A collective throughout. Without data.eval nothing is ever due.
    """

    def __init__(
        self,
        cfg: Train,
        data: Splits,
        policy: Prepared,
        reference: Reference,
        device: torch.device,
        *,
        layout: str,
        embedded: bool,
    ):
        self.cfg, self.policy, self.reference = cfg, policy.model, reference
        self.rows, self.tokenizer = data.eval, data.tokenizer
        self.layout, self.device = layout, device
        self.meter = Meter(cfg.loss, policy.noise_floor, device)
        self.gold = cfg.data.gold if embedded and reference.frozen is not None else None
        self.stop_ids = stop_ids(self.tokenizer, Chat.of(cfg.data))
        num_prompts = min(len(self.rows or []), cfg.data.gold.samples if embedded else NUM_SAMPLES)
        self.prompts = [self.rows.row(i)[0].tolist() for i in range(num_prompts)]
        self.context = policy.spec.positions
        self.columns: dict[str, list[str]] = {}  # of the samples: what does not change
        if cfg.sample_every and self.prompts:
            self.columns["prompt"] = self.tokenizer.batch_decode(self.prompts[:NUM_SAMPLES])
            if reference.weights and (reference.frozen or starts_as_reference(policy.spec, cfg.reference)):
                self.columns["reference"] = self._answers(reference.frozen or self.policy)

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether rows are evaluated after `step` updates: before the first, after the last, every eval_every."""
        return self.rows is not None and (step == 0 or last or is_every(self.cfg.eval_every, step))

    def samples_are_due(self, step: int, *, last: bool) -> bool:
        return bool(self.prompts and self.cfg.sample_every) and (last or is_every(self.cfg.sample_every, step))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The metrics of data.eval by name, with `gold` and `kl` of sampled answers on the embedded task."""
        every, budget = np.arange(len(self.rows)), self.cfg.tokens_per_microbatch
        plan = own_share(self.rows, every, layout=self.layout, budget=budget)
        for members, weight in plan.microbatches:
            batch = make_batch(self.rows, members, self.layout, weight=weight).to(self.device)
            pairs = score(self.policy, self.reference.live, batch)
            terms = losses.objective(self.cfg.loss, pairs, step_pairs=plan.pairs, step_chosen_tokens=plan.chosen_tokens)
            self.meter.add(since_start(pairs, batch), *terms, weight)
        scores = self.meter.read()
        if self.gold is not None:
            scores |= task.evaluate(
                self.policy,
                self.reference.frozen,
                self.tokenizer,
                self.prompts,
                self.stop_ids,
                self.gold,
                device=self.device,
                seed=self.cfg.seed,
                reshard=self.cfg.fsdp.reshard_after_forward,
            )
        return scores

    def samples(self) -> list[dict[str, str]]:
        """By prompt: its text, the reference's answer where that could be asked, the policy's answer now."""
        columns = self.columns | {"policy": self._answers(self.policy)}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _answers(self, model: Policy) -> list[str]:
        prompts = self.prompts[:NUM_SAMPLES]
        room = min(MAX_NEW_TOKENS, self.context - max(map(len, prompts)))
        completions = sample(
            model,
            prompts,
            Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=room),
            self.stop_ids,
            device=self.device,
            seed=[self.cfg.seed],
            batch_size=NUM_SAMPLES,
            reshard=self.cfg.fsdp.reshard_after_forward,
        )
        return self.tokenizer.batch_decode([completion.ids for completion in completions])


def in_words(events: list[dict], step: int) -> str:
    """The main metrics of the evaluation at `step`, of the lines of metrics.jsonl, in one line; empty where there was none."""
    found = next((event for event in reversed(events) if (event["split"], event["step"]) == ("eval", step)), {})
    return ", ".join(f"{name} {found[name]:.4g}" for name in SHOWN if found.get(name) is not None)


def is_every(every: int, step: int) -> bool:
    """Whether `step` is one of every `every`; 0 is never."""
    return every > 0 and step % every == 0
