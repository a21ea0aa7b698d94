"""A small formal language: prompts that name a topic, a corpus of answers, and an exact reward.

An answer is a walk on a sparse graph of words ("the grey wave rolls softly . a gull waits as the moon glows ."): each
word allows about four successors (an article eight or twelve), so every bigram is either legal or not. The reward counts
on-topic words and charges for illegal bigrams, which are rare in answers sampled from a model of the corpus: pairs of
such answers show the first part and hide the second.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

# Per topic: nouns, adjectives, verbs.
_TOPIC_CLASSES = {
    "sea": (("wave", "gull", "boat"), ("grey", "salty"), ("rolls", "drifts")),
    "forest": (("fox", "pine", "deer"), ("green", "mossy"), ("hides", "rustles")),
    "city": (("tram", "tower", "street"), ("busy", "loud"), ("hums", "glitters")),
    "night": (("moon", "star", "bat"), ("pale", "dark"), ("glows", "waits")),
}
TOPICS = {topic: tuple(word for words in classes for word in words) for topic, classes in _TOPIC_CLASSES.items()}
PROMPTS = ("tell me about the {}", "say something about the {}", "describe the {}", "what happens in the {}")
START, END = "<start>", "<end>"  # of an answer; neither is a word
MIN_WORDS, MAX_WORDS = 4, 39

_TOPIC_WEIGHT, _STOP_WEIGHT, _END_WEIGHT = 3.0, 2.0, 3.0  # of a successor on topic, of "." and of END; others 1


def _successors() -> dict[str, tuple[str, ...]]:
    classes = list(_TOPIC_CLASSES.values())
    articles, clause_ends = ("the", "a"), ("as", "and", ".")
    graph = {
        START: articles,
        "the": tuple(w for nouns, adjectives, _ in classes for w in (nouns[0], nouns[2], adjectives[0])),
        "a": tuple(w for nouns, adjectives, _ in classes for w in (nouns[1], adjectives[1])),
        "softly": clause_ends,
        "slowly": clause_ends,
        "as": articles,
        "and": articles,
        ".": (*articles, END),
    }
    # Each topic shares edges with the next one, so that a legal answer can wander off its topic and back.
    for (nouns, adjectives, verbs), (next_nouns, _, next_verbs) in zip(classes, classes[1:] + classes[:1], strict=True):
        for i, adjective in enumerate(adjectives):
            graph[adjective] = (*nouns, next_nouns[i], next_nouns[2])
        for i, noun in enumerate(nouns):
            graph[noun] = (*verbs, next_verbs[i % 2])
        for i, verb in enumerate(verbs):
            graph[verb] = (("softly", "slowly")[i], *clause_ends)
    return graph


SUCCESSORS = _successors()
WORDS = tuple(word for word in SUCCESSORS if word != START)


def prompts() -> list[str]:
    """Every user text, topics varying fastest."""
    return [template.format(topic) for template in PROMPTS for topic in TOPICS]


def topic_of(prompt: str) -> str:
    """The topic that a text of `prompts()` asks for: its last word."""
    return prompt.split()[-1]


def vocabulary() -> tuple[str, ...]:
    """Every word of prompts and answers, once each, in a fixed order."""
    return tuple(dict.fromkeys([*WORDS, *(word for prompt in prompts() for word in prompt.split())]))


def sample_corpus(n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """`n` rows (prompt, answer): prompts uniform, answers legal walks of MIN_WORDS to MAX_WORDS words."""
    texts = prompts()
    tables = {topic: _walk_table(topic) for topic in TOPICS}
    rows = []
    while len(rows) < n:
        prompt = texts[rng.integers(len(texts))]
        words, word = [], START
        while word != END and len(words) <= MAX_WORDS:
            followers, cumulative = tables[topic_of(prompt)][word]
            word = followers[np.searchsorted(cumulative, rng.random(), side="right")]
            words.append(word)
        if word == END and len(words) - 1 >= MIN_WORDS:
            rows.append((prompt, " ".join(words[:-1])))
    return rows


def _walk_table(topic: str) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    weight = {word: _TOPIC_WEIGHT for word in TOPICS[topic]} | {".": _STOP_WEIGHT, END: _END_WEIGHT}
    table = {}
    for word, followers in SUCCESSORS.items():
        weights = np.array([weight.get(follower, 1.0) for follower in followers])
        table[word] = followers, np.cumsum(weights / weights.sum())
    return table


def illegal_bigrams(words: Sequence[str], ended: bool) -> int:
    """The number of illegal steps of the walk START, *words, END; an answer that was cut off has one more."""
    path = [START, *words, *([END] if ended else [])]
    return sum(b not in SUCCESSORS.get(a, ()) for a, b in pairwise(path)) + (not ended)


def gold_reward(topic: str, words: Sequence[str], ended: bool, *, hidden_weight: float, length_weight: float) -> float:
    """Exact reward of an answer, in on-topic words per ten words.

    gold = 10 * on_topic / len(words) + length_weight * len(words) - hidden_weight * illegal_bigrams

    On the corpus, gold's correlation with length is about 0 at length_weight 0 and .45 at .1. `words` may be any words
    (empty: the first term is 0); `ended` is True if the answer closed its turn, False if it was cut off.
    """
    on_topic_share = sum(word in TOPICS[topic] for word in words) / max(len(words), 1)
    return 10 * on_topic_share + length_weight * len(words) - hidden_weight * illegal_bigrams(words, ended)
