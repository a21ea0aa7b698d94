"""The embedded task's exact gold reward and KL to the reference, of samples."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rpo.config import Gold
from rpo.evals.settings import GoldTask
from rpo.model.policy import Policy
from rpo.model.sampling import sample
from rpo.stats import clustered_mean
from rpo.synthetic.task import SAMPLING, measure


def evaluate(
    policy: Policy,
    reference: Policy,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[list[int]],
    task: GoldTask,
    weights: Gold,
    stop_ids: list[int],
    *,
    device: torch.device,
    seed: int,
) -> tuple[dict, list[dict]]:
    """(gold, kl, length and ended share with standard errors; one sample per answer), at temperature 1.

    The KL is nats per response, Rao-Blackwellised; its estimator needs samples of the policy itself.
    """
    prompts = [question for question in questions for _ in range(task.samples)]
    generation = {"device": device, "seed": [seed], "batch_size": task.batch_size, "reshard": True}
    answers = sample(policy, prompts, SAMPLING, stop_ids, **generation)
    table = measure(policy, reference, tokenizer, prompts, answers, weights, device)
    # Prompts repeat in this task (a topic has few wordings), and answers to one prompt are not independent questions.
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    clusters = np.array([number[tuple(prompt)] for prompt in prompts])
    result = {name: clustered_mean(values, clusters) for name, values in table.items()}
    texts = tokenizer.batch_decode([answer.text_ids for answer in answers])
    samples = []
    for i, (prompt, text) in enumerate(zip(tokenizer.batch_decode(prompts), texts, strict=True)):
        scores = {name: float(values[i]) for name, values in table.items()}
        same = {"id": f"{prompt}#{i}", "cluster": prompt, "scores": scores}
        samples.append(same | {"prompt": prompt, "response": text} | scores)
    return result, samples
