"""rpo.synthetic.grammar, rpo.synthetic.task, rpo.synthetic.demo: the task's language and reward by hand, its labels, the demo's table."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
import torch

from rpo.config import SyntheticTask
from rpo.data.chat import Chat
from rpo.data.tokenizer import encode_prompt
from rpo.model.sampling import Completion, sample
from rpo.synthetic import demo, grammar, task
from tests.helpers.models import make_lm, prepared

CPU = torch.device("cpu")
SETTINGS = SyntheticTask(pairs=1, eval_pairs=1, flip=0.25, hidden_weight=1.5, length_weight=0.05, samples=1, seed=0)
EVEN = {"hidden_weight": 1.5, "length_weight": 0.0}


@pytest.fixture(scope="module")
def corpus():
    return [(prompt, answer.split()) for prompt, answer in grammar.sample_corpus(2000, np.random.default_rng(0))]


# ---- the language and its reward


def test_corpus_is_legal(corpus):
    """Every answer is a legal walk of 4 to 39 known words to a known prompt; short and long ones both come."""
    vocabulary = set(grammar.vocabulary())
    for prompt, words in corpus:
        assert prompt in grammar.prompts() and grammar.illegal_bigrams(words, ended=True) == 0
        assert 4 <= len(words) <= 39 and set(words) | set(prompt.split()) <= vocabulary
    lengths = [len(words) for _, words in corpus]
    assert min(lengths) < 6 and max(lengths) > 30
    assert {prompt for prompt, _ in corpus} == set(grammar.prompts())


def test_reward_by_hand():
    """On-topic words per ten words, less the weight of each illegal step, plus the length's: two answers counted out."""
    legal = "the grey wave rolls softly .".split()  # 3 of 6 on topic, all six steps and the end legal
    assert grammar.gold_reward("sea", legal, True, hidden_weight=1.5, length_weight=0.0) == pytest.approx(5)
    assert grammar.gold_reward("sea", legal, True, hidden_weight=1.5, length_weight=0.1) == pytest.approx(5.6)
    assert grammar.gold_reward("city", legal, True, hidden_weight=1.5, length_weight=0.0) == pytest.approx(0)
    babble = "wave wave boat gull".split()  # all on topic; the start, three steps and the missing end are illegal
    assert grammar.illegal_bigrams(babble, ended=False) == 5
    assert grammar.gold_reward("sea", babble, False, hidden_weight=1.5, length_weight=0.1) == pytest.approx(
        10 + 0.4 - 7.5
    )
    assert grammar.illegal_bigrams(babble, ended=True) == 5, "an end after a noun is as illegal as none"


def test_words_that_are_no_words():
    """Any text has a reward: an empty answer, and one of words that the grammar has never seen."""
    assert grammar.gold_reward("sea", [], True, **EVEN) == -1.5
    assert grammar.gold_reward("sea", ["tell", "<unk>"], True, **EVEN) == -4.5


def test_length_weight_is_a_knob(corpus):
    """Gold's correlation with length is near 0 at length_weight 0 and takes the weight's sign."""

    def correlation(length_weight):
        rewards = [
            grammar.gold_reward(grammar.topic_of(prompt), words, True, hidden_weight=1.5, length_weight=length_weight)
            for prompt, words in corpus
        ]
        return np.corrcoef(rewards, [len(words) for _, words in corpus])[0, 1]

    assert abs(correlation(0.0)) < 0.15
    assert correlation(0.1) > 0.3 and correlation(-0.1) < -0.3


# ---- its labels


@pytest.fixture(scope="module")
def word_tokenizer():
    return task.word_tokenizer(["<user>", "<assistant>", *grammar.vocabulary()], task.TEMPLATE)


def label(monkeypatch, tokenizer, corpus, flip):
    """1,500 labelled pairs out of legal answers that ignore the prompt."""
    texts = [" ".join(words) for _, words in corpus]

    def stub(_policy, prompts, _sampling, _stop_ids, *, seed, **_):
        picks = np.random.default_rng(seed).integers(len(texts), size=len(prompts))
        ids = tokenizer([texts[i] for i in picks], add_special_tokens=False).input_ids
        return [Completion([*row, tokenizer.eos_token_id], ended=True) for row in ids]

    monkeypatch.setattr(task, "sample", stub)
    settings = SyntheticTask(**{**vars(SETTINGS), "flip": flip})
    return task._label(None, tokenizer, 1500, seed=3, gold=settings, device=CPU)


@pytest.mark.parametrize("flip", [0.0, 0.25, 0.49])
def test_labels_are_bradley_terry_with_flips(monkeypatch, word_tokenizer, corpus, flip):
    """How often the better answer is chosen is sigmoid(reward gap), mixed with its opposite by `flip` (4 sigma)."""
    rows = label(monkeypatch, word_tokenizer, corpus, flip)
    weights = {"hidden_weight": SETTINGS.hidden_weight, "length_weight": SETTINGS.length_weight}
    gaps = []
    for row in rows:
        topic = grammar.topic_of(row["prompt"][0]["content"])
        chosen, rejected = (grammar.gold_reward(topic, row[s].split(), True, **weights) for s in ("chosen", "rejected"))
        gaps.append(chosen - rejected)
    better = 1 / (1 + np.exp(-np.abs(gaps)))
    prob = (1 - flip) * better + flip * (1 - better)
    wins = np.array(gaps) > 0
    decided = np.array(gaps) != 0
    assert abs((wins - prob)[decided].sum()) <= 4 * np.sqrt((prob * (1 - prob))[decided].sum())
    assert len(rows) == 1500 and all(row["chosen"] != row["rejected"] for row in rows)


# ---- its evaluation


def test_evaluate(group, word_tokenizer):
    """The means of gold, KL, length and ended share are those of the very answers that the policy's seed gives."""
    texts = grammar.prompts()[:6]
    prompts = [encode_prompt(word_tokenizer, [{"role": "user", "content": t}], Chat("2024-01-01", {})) for t in texts]
    policy, reference = (prepared(make_lm(vocab_size=len(word_tokenizer), seed=s), group) for s in (0, 1))
    placement = {"device": group, "reshard": False}
    stop_ids = [word_tokenizer.eos_token_id]
    values = task.evaluate(policy, reference, word_tokenizer, prompts, stop_ids, SETTINGS, seed=5, **placement)
    answers = sample(policy, prompts, task.SAMPLING, stop_ids, seed=[5], batch_size=task.BATCH_SIZE // 4, **placement)
    rewards = [
        grammar.gold_reward(
            grammar.topic_of(text),
            word_tokenizer.decode([id for id in answer.ids if id != stop_ids[0]]).split(),
            answer.ended,
            hidden_weight=1.5,
            length_weight=0.05,
        )
        for text, answer in zip(texts, answers, strict=True)
    ]
    assert values["gold"] == pytest.approx(np.mean(rewards))
    assert values["samples/length"] == np.mean([len(answer.ids) for answer in answers])
    assert values["samples/ended"] == np.mean([answer.ended for answer in answers])
    assert values["kl"] > 0


# ---- the demo's table


def curve(golds, kls, shifts):
    columns = zip(range(0, 50 * len(golds), 50), golds, kls, shifts, strict=True)
    return [{"split": "eval", "step": s, "gold": g, "kl": k, "shift/chosen": c} for s, g, k, c in columns]


CURVES = {
    0.0: [curve([3, 5, 1], [0, 4, 20], [0, -9, -40]), curve([3, 4, 2], [0, 4, 30], [0, -9, -60])],
    0.25: [curve([3, 4, 4.5], [0, 1, 2], [0, -1, -2])],
}


def test_demo_summary():
    """Peak is over the whole run (step 0 included), drop is peak minus end, the rest is the last evaluation."""
    assert demo.summarise(CURVES[0.0][0]) == {"peak": 5, "end": 1, "drop": 4, "kl": 20, "shift": -40}
    assert demo.summarise(curve([3, 2, 2.5], [0, 1, 2], [0, 1, 2]))["drop"] == 0.5


def test_demo_table():
    """One row for the SFT model and one per eta, means over seeds and the drop's standard deviation, by hand."""
    _, sft, dpo, rpo = demo.table(CURVES).splitlines()
    assert sft.split() == ["SFT", "3.00", "3.00", "-", "0.00", "0.00"]
    assert dpo.split() == ["DPO", "4.50", "1.50", "3.00", "+-", "1.41", "25.00", "-50.00", "2"]
    assert rpo.split() == ["RPO", "eta", "0.25", "4.50", "4.50", "0.00", "+-", "0.00", "2.00", "-2.00", "1"]


def test_demo_reads_a_sweep(tmp_path):
    """Cells of one sweep folder come back by eta, in the order of their seeds, evaluations only."""
    for number, (eta, seed) in enumerate([(0.25, 1), (0.0, 0), (0.25, 0)]):
        cell = tmp_path / str(number)
        cell.mkdir()
        (cell / "config.yaml").write_text(f"seed: {seed}\nloss: {{eta: {eta}}}\n")
        events = [{"split": "train", "step": 1}, *curve([seed], [0], [0])]
        (cell / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    curves = demo.read([tmp_path])
    assert list(curves) == [0.0, 0.25]
    assert [run[0]["gold"] for run in curves[0.25]] == [0, 1] and Counter(map(len, curves[0.25])) == {1: 2}


def test_demo_picture(tmp_path):
    """The picture is written."""
    demo.draw(CURVES, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_files_are_json_lines(tmp_path):
    """The task's files are gzip'd JSON lines as any user's."""
    rows = [{"prompt": "a", "chosen": "b"}, {"prompt": "c", "chosen": "d"}]
    task._write(tmp_path / "rows.jsonl.gz", rows)
    with gzip.open(tmp_path / "rows.jsonl.gz", "rt") as file:
        assert [json.loads(line) for line in file] == rows
