"""rpo.model.divergence: KL against enumeration, every column against plain logits, chunks and memory, the log-probs of answers."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rpo.model import divergence
from rpo.model.sampling import Completion, Sampling, sample
from tests.helpers.models import make_lm, prepared

VOCABULARY, STOP, LONGEST, PROMPT = 6, 3, 3, [2, 4]
BUDGET = 4096


def every_answer():
    """All answers over 6 tokens that stop at token 3 or are cut at 3 tokens."""
    for length in range(1, LONGEST + 1):
        for ids in itertools.product(range(VOCABULARY), repeat=length):
            if STOP not in ids[:-1] and (ids[-1] == STOP or length == LONGEST):
                yield Completion(list(ids), ids[-1] == STOP)


def ragged_answers(count, vocab_size, seed=0):
    """Prompts and answers of 1 to 12 tokens each."""
    rng = np.random.default_rng(seed)
    prompts, answers = (
        [rng.integers(vocab_size, size=n).tolist() for n in rng.integers(1, 13, size=count)] for _ in range(2)
    )
    return prompts, [Completion(ids, True) for ids in answers]


@torch.no_grad()
def log_softmax_of(lm, prompt, answer):
    """The model's log-probs of every token at each of an answer's positions, one text at a time, float64."""
    logits_TV = lm(torch.tensor([prompt + answer.ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits_TV.double().log_softmax(-1)


def naive(lms, prompts, answers):
    """drift.measure's columns by loops over answers, positions and tokens."""
    table = {name: [] for name in divergence.COLUMNS}
    for prompt, answer in zip(prompts, answers, strict=True):
        logp_TV, ref_TV = (log_softmax_of(lm, prompt, answer).numpy() for lm in lms)
        sums = dict.fromkeys(table, 0.0)
        for logp_V, ref_V, token in zip(logp_TV, ref_TV, answer.ids, strict=True):
            prob_V = np.exp(logp_V)
            top = np.sort(prob_V)[-divergence.TOP :]
            sums["logp"] += logp_V[token]
            sums["ref_logp"] += ref_V[token]
            sums["kl"] += sum(p * (a - b) for p, a, b in zip(prob_V, logp_V, ref_V, strict=True))
            sums["entropy"] -= sum(p * np.log(p) for p in prob_V)
            sums["top_mass"] += top.sum()
            sums["top_entropy"] -= sum(p * np.log(p) for p in top / top.sum())
        for name, value in sums.items():
            table[name].append(value)
    return table


def test_kl_is_exact_in_expectation(group):
    """Weighted by the policy's probability of each answer, the estimator's mean is the enumerated KL; samples of the
    policy give the same mean within 4 standard errors, as does k1 = log pi(y)/ref(y), whose spread is larger."""
    lms = [make_lm(vocab_size=VOCABULARY, seed=seed, scale=2.0) for seed in (0, 1)]
    answers = list(every_answer())
    prompts = [PROMPT] * len(answers)
    positions = [torch.arange(len(answer.ids)) for answer in answers]
    full = [[log_softmax_of(lm, PROMPT, answer) for lm in lms] for answer in answers]
    logp, ref = (
        np.array([f[side][at, a.ids].sum().item() for f, at, a in zip(full, positions, answers, strict=True)])
        for side in (0, 1)
    )
    assert np.exp(logp).sum() == pytest.approx(1, abs=1e-5)
    exact = (np.exp(logp) * (logp - ref)).sum()
    assert exact > 0.1, "the models are too alike for the test to mean anything"

    policy, reference = (prepared(lm, group) for lm in lms)
    table = divergence.measure(policy, reference, prompts, answers, group, budget=BUDGET)
    assert (np.exp(logp) * table["kl"]).sum() == pytest.approx(exact, rel=1e-4)
    estimates = {"rb": table["kl"], "k1": table["logp"] - table["ref_logp"]}
    np.testing.assert_allclose(estimates["k1"], logp - ref, rtol=1e-4, atol=1e-5)

    count, sampling = 2000, Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=LONGEST)
    generation = {"device": group, "seed": [0], "batch_size": 1000, "reshard": False}
    number = {tuple(answer.ids): i for i, answer in enumerate(answers)}
    drawn = [number[tuple(a.ids)] for a in sample(policy, [PROMPT] * count, sampling, [STOP], **generation)]
    spread = {}
    for name, values in estimates.items():
        spread[name] = values[drawn].std() / count**0.5
        assert abs(values[drawn].mean() - exact) <= 4 * spread[name], name
    assert spread["rb"] < spread["k1"]


@pytest.mark.parametrize("vocab_size", [6, 40])
def test_columns_by_loops(group, vocab_size):
    """Each column equals a loop over plain float64 logits, where the vocabulary is less than ten tokens too."""
    lms = [make_lm(vocab_size=vocab_size, seed=seed) for seed in (0, 1)]
    prompts, answers = ragged_answers(9, vocab_size)
    policy, reference = (prepared(lm, group) for lm in lms)
    table = divergence.measure(policy, reference, prompts, answers, group, budget=60)
    expected = naive(lms, prompts, answers)
    assert set(table) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(table[name], values, rtol=1e-4, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(
        divergence.logps(policy, prompts, answers, group, budget=60), expected["logp"], rtol=1e-4
    )


def test_a_model_against_itself(group):
    """The KL is exactly zero for every answer, by one object and by two of the same weights (1e-6)."""
    prompts, answers = ragged_answers(20, VOCABULARY)
    policy, twin = (prepared(make_lm(vocab_size=VOCABULARY), group) for _ in range(2))
    table = divergence.measure(policy, policy, prompts, answers, group, budget=BUDGET)
    assert not table["kl"].any() and (table["logp"] == table["ref_logp"]).all()
    apart = divergence.measure(policy, twin, prompts, answers, group, budget=BUDGET)
    np.testing.assert_allclose(apart["kl"], 0, atol=1e-6)
    np.testing.assert_allclose(apart["logp"], table["logp"])


def test_masked_tokens():
    """A token that both models rule out (-inf) adds nothing; one that only the reference rules out makes KL infinite."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    columns = dict(zip(divergence.COLUMNS, divergence.of_tokens(logits, logits + 3, torch.tensor([1])), strict=True))
    p = 1 / (1 + np.e)
    assert columns["kl"].item() == pytest.approx(0, abs=1e-7)
    assert columns["entropy"].item() == pytest.approx(-p * np.log(p) - (1 - p) * np.log(1 - p), rel=1e-6)
    assert columns["top_entropy"].item() == pytest.approx(columns["entropy"].item(), rel=1e-6)
    ruled_out = torch.tensor([[-torch.inf, 1.0, 0.0]])
    assert divergence.of_tokens(logits, ruled_out, torch.tensor([1]))[2].item() == np.inf


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation gave."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.itemsize)
        return made


def test_chunks(group):
    """A large vocabulary's columns are the same in chunks of three tokens, and no tensor is then larger than the model's
    own (all tokens at once take ten times that)."""
    vocab_size = 3000
    policy, reference = (prepared(make_lm(vocab_size=vocab_size, seed=seed), group) for seed in (0, 1))
    prompts, answers = ragged_answers(60, vocab_size)
    tables, largest = [], []
    for chunk_bytes in (4 * vocab_size * 3, 2**30):
        with Largest() as watched:
            how = {"budget": BUDGET, "chunk_bytes": chunk_bytes}
            tables.append(divergence.measure(policy, reference, prompts, answers, group, **how))
        largest.append(watched.bytes)
    for name in divergence.COLUMNS:
        np.testing.assert_allclose(tables[0][name], tables[1][name], rtol=1e-5, atol=1e-5)
    weights = max(p.numel() * p.itemsize for p in policy.parameters())
    tokens = sum(len(answer.ids) for answer in answers)
    assert largest[0] <= weights < 10 * weights <= 4 * vocab_size * tokens <= largest[1]
