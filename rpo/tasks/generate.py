"""Answers to the prompts of a file: JSON lines that other tools, and other tasks, read."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rpo.data.formats import Messages
from rpo.evals.settings import GenerateTask
from rpo.model.policy import Policy
from rpo.model.sampling import Sampling, sample
from rpo.stats import clustered_mean


def evaluate(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[list[int]],
    said: list[str | Messages],
    places: list[str],
    task: GenerateTask,
    stop_ids: list[int],
    *,
    device: torch.device,
    seed: int,
) -> tuple[dict, list[dict]]:
    """(length, ended and truncated shares with standard errors; one sample per answer).

    `task.samples` answers per prompt; stop tokens and template are those of training. An answer is truncated where
    max_new_tokens came before a stop token. `said` has the questions as their rows say them, for a judge to read.
    """
    sampling = Sampling(task.temperature, task.top_p, task.top_k, task.max_new_tokens)
    prompts = [question for question in questions for _ in range(task.samples)]
    answers = sample(
        policy, prompts, sampling, stop_ids, device=device, seed=[seed], batch_size=task.batch_size, reshard=True
    )
    texts = tokenizer.batch_decode([answer.text_ids for answer in answers])
    clusters = np.repeat(np.arange(len(questions)), task.samples)
    result = {
        "samples/length": clustered_mean([len(a.ids) for a in answers], clusters),
        "samples/ended": clustered_mean([a.ended for a in answers], clusters),
        "samples/truncated": clustered_mean([not a.ended for a in answers], clusters),
    }
    rendered = tokenizer.batch_decode(prompts)
    samples = [
        {
            "id": f"{places[row]}#{i % task.samples}",
            "cluster": places[row],
            "scores": {"samples/length": len(answer.ids), "samples/ended": float(answer.ended)},
            "row": places[row],
            "messages": [{"role": "user", "content": said[row]}] if isinstance(said[row], str) else said[row],
            "prompt": prompt,
            "response": text,
            "tokens": len(answer.ids),
            "ended": answer.ended,
        }
        for i, (row, prompt, text, answer) in enumerate(zip(clusters, rendered, texts, answers, strict=True))
    ]
    return result, samples
