"""rpo.model.sampling: samples of the model's own distribution, whatever the library's and the checkpoint's defaults."""

import copy

import numpy as np
import pytest
import torch

from rpo.model.sampling import Sampling, sample
from tests.helpers.like_cuda import compile_by
from tests.helpers.models import make_lm, prepared

PROMPTS = [
    [2, 5, 6],
    [2, 7],
    [2, 8, 9, 10, 11],
    [2, 12, 13, 14, 15, 16, 17, 18],
    [2, 19],
    [2, 20, 21],
    [2, 22],
    [2, 23],
]
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=10)
PLAIN = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=10)
NEVER = [3]  # a stop token that the peaked models below do not reach for


def ask(policy, prompts, sampling, stop_ids=NEVER, seed=0, batch_size=4):
    generation = {"device": torch.device("cpu"), "seed": [seed], "batch_size": batch_size, "reshard": True}
    return sample(policy, prompts, sampling, stop_ids, **generation)


@torch.no_grad()
def argmax_loop(lm, prompt, stop_ids, max_new_tokens):
    """The likeliest next token again and again, the whole text read anew each time: (ids, ended)."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(int(lm(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stop_ids:
            return ids[len(prompt) :], True
    return ids[len(prompt) :], False


def test_samples_follow_the_models_distribution(group):
    """At temperature 1 all of 200 tokens come, each as often as the softmax says (5 sigma): no top-50, no top-p."""
    lm = make_lm(vocab_size=200, scale=0.2)
    prompt, count = PROMPTS[0], 3000
    with torch.no_grad():
        probs_V = lm(torch.tensor([prompt])).logits[0, -1].softmax(-1).double().numpy()
    one_token = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=1)
    answers = ask(prepared(lm, group), [prompt] * count, one_token, batch_size=1500)
    counts_V = np.bincount([answer.ids[0] for answer in answers], minlength=200)
    assert (counts_V > 0).sum() > 150
    assert (abs(counts_V - count * probs_V) <= 5 * np.sqrt(count * probs_V) + 1).all()


def test_top_k_and_top_p_are_obeyed(group):
    """top_k=3 leaves three tokens, and a top_p below the likeliest token's share leaves that one."""
    lm = make_lm(vocab_size=200, scale=0.2)
    with torch.no_grad():
        order = lm(torch.tensor([PROMPTS[0]])).logits[0, -1].argsort(descending=True).tolist()
    policy = prepared(lm, group)
    for sampling, support in ((Sampling(1.0, 1.0, 3, 1), 3), (Sampling(1.0, 1e-3, 0, 1), 1)):
        drawn = {answer.ids[0] for answer in ask(policy, [PROMPTS[0]] * 100, sampling, batch_size=100)}
        assert drawn == set(order[:support])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_greedy_is_an_argmax_loop(group, family):
    """Left-padded batches with a cache give what a loop over single unpadded texts gives, stops and cuts included."""
    lm = make_lm(family)
    free = [argmax_loop(lm, prompt, [], 10)[0] for prompt in PROMPTS]
    halving = min(set().union(*free), key=lambda token: abs(sum(token in ids for ids in free) - len(free) / 2))
    stop_ids = [3, halving]
    expected = [argmax_loop(lm, prompt, stop_ids, 10) for prompt in PROMPTS]
    policy = prepared(lm, group)
    for batch_size in (1, 3, 8):
        answers = ask(policy, PROMPTS, GREEDY, stop_ids, batch_size=batch_size)
        assert [(answer.ids, answer.ended) for answer in answers] == expected
    assert {ended for _, ended in expected} == {True, False}, "the prompts show one kind of end only"
    for ids, ended in expected:
        assert (ids[-1] in stop_ids) == ended and not set(ids[:-1]) & set(stop_ids) and len(ids) <= 10


def test_samples_are_a_function_of_the_seed(group):
    """Equal seeds give equal samples, others do not, and the caller's random state is as it was."""
    policy = prepared(make_lm(scale=0.2), group)
    before = torch.get_rng_state()
    first, again, other = (ask(policy, PROMPTS, PLAIN, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again and first != other


def test_batches_do_not_see_each_other(group):
    """A batch's samples hang on its own prompts, seed and number; equal prompts in two batches are drawn apart."""
    policy = prepared(make_lm(scale=0.2), group)
    both = ask(policy, PROMPTS, PLAIN)
    assert ask(policy, [[2, 24, 25, 26]] * 4 + PROMPTS[4:], PLAIN)[4:] == both[4:]
    assert ask(policy, PROMPTS[:4], PLAIN) == both[:4]
    twice = ask(policy, PROMPTS[:4] * 2, PLAIN)
    assert twice[:4] != twice[4:]


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN])
def test_the_checkpoints_generation_config_is_ignored(group, sampling):
    """Temperature, penalties and limits of the model's own config change nothing, and it is put back."""
    lm = make_lm(scale=0.5)
    policy = prepared(lm, group)
    expected = ask(policy, PROMPTS, sampling)
    own = lm.generation_config
    own.update(do_sample=True, temperature=0.01, top_k=2, top_p=0.1, repetition_penalty=5.0)
    own.update(max_new_tokens=2, suppress_tokens=[5, 6], min_length=9, no_repeat_ngram_size=1)
    assert ask(policy, PROMPTS, sampling) == expected
    assert lm.generation_config is own and own.repetition_penalty == 5.0


def test_the_stop_tokens_that_a_model_lists_are_stops(group):
    """Answers end at those of its generation config too, as transformers' own do."""
    lm = make_lm()
    free = argmax_loop(lm, PROMPTS[0], [], 10)[0]
    policy = prepared(lm, group)
    lm.generation_config.eos_token_id = [48, free[3]]
    assert ask(policy, PROMPTS[:1], GREEDY)[0].ids == free[: free.index(free[3]) + 1]


def test_answers_compile_nothing(group, monkeypatch):
    """Sampling from a compiled policy makes no graph, of which torch allows a layer's code a few only."""
    compile_by(monkeypatch, "aot_eager")
    lm = make_lm()
    eager, policy = prepared(copy.deepcopy(lm), group), prepared(lm, group, compile=True)
    assert ask(policy, PROMPTS, PLAIN) == ask(eager, PROMPTS, PLAIN)
    assert not torch._dynamo.utils.counters["stats"]


@pytest.mark.parametrize(("family", "kind"), [("llama", "any"), ("mamba", "any"), ("rwkv", "none")])
def test_neighbours_in_a_batch_change_no_answer(group, family, kind):
    """Greedy answers are those of each prompt by itself, also of classes that read padding, or a batch, as text."""
    policy = prepared(make_lm(family, scale=0.5), group)
    together = ask(policy, PROMPTS, GREEDY, batch_size=len(PROMPTS))
    assert together == [ask(policy, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert policy.neighbours == kind
