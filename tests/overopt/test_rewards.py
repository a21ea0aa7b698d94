"""rpo.rewards: verifiers and reward models give what they say, and everything else is refused in one line."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from rpo.data.chat import Chat
from rpo.errors import UserError
from rpo.model.sampling import Completion
from rpo.overopt import rewards
from tests.helpers.models import SIZES
from tests.helpers.rows import make_rows_json, make_tokenizer

HOW = {
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "chat": Chat("2024-01-01", {}),
    "trust_remote_code": False,
}
PROMPTS = [row["prompt"] for row in make_rows_json(21, seed=3)]
TEXTS = [row["chosen"] for row in make_rows_json(21, seed=5)]
ANSWERS = [Completion([0], True)] * len(TEXTS)


def verifier(tmp_path, body, name="score"):
    path = tmp_path / "verify.py"
    path.write_text(body)
    return rewards.source(f"{path}:{name}", **HOW)


def make_reward_model(folder, template=True, family="llama", **more):
    """A random classifier, its head far from zero, with a tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template if template else None
    settings = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": 0, "num_labels": 1} | more
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **settings))
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.1 * torch.randn_like(param))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def test_verifier(group, tmp_path):
    """A function gets the last message's text (a string prompt as it is) and the answer, and its numbers come back."""
    body = "def score(prompt, response):\n    return len(prompt) + 100 * response.count('ba')\n"
    source = verifier(tmp_path, body)
    expected = [len(p[-1]["content"]) + 100 * t.count("ba") for p, t in zip(PROMPTS, TEXTS, strict=True)]
    assert source(PROMPTS, ANSWERS, TEXTS).tolist() == expected
    assert source(["abc"], ANSWERS[:1], ["ba"]).tolist() == [103]
    assert rewards.source("none", **HOW) is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def score(prompt, response):\n    return 'good'\n", "it returned 'good'; expected a finite number"),
        ("def score(prompt, response):\n    return None\n", "it returned None; expected a finite number"),
        ("def score(prompt, response):\n    return float('nan')\n", "it returned nan; expected a finite number"),
        ("def score(prompt, response):\n    return 1 / 0\n", "it raised ZeroDivisionError: division by zero (FILE:2)"),
        ("def score(prompt, response):\n    raise SystemExit(3)\n", "it raised SystemExit: 3 (FILE:2)"),
        ("def score(prompt):\n    return 1\n", "it raised TypeError: "),
    ],
    ids=["text", "none", "nan", "raises", "exits", "arguments"],
)
def test_a_verifier_that_gives_no_number(group, tmp_path, body, message):
    """One line names file, function, the prompt and what came back, or the line that raised."""
    source = verifier(tmp_path, body)
    with pytest.raises(UserError) as error:
        source(PROMPTS[:1], ANSWERS[:1], TEXTS[:1])
    said, message = PROMPTS[0][-1]["content"], message.replace("FILE", f"{tmp_path}/verify.py")
    assert str(error.value).startswith(f"task.gold={tmp_path}/verify.py:score: for the prompt {said[:60]!r} {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        ("score = 3\n", "score", "the file has no function score"),
        ("def score(p, r): return 1\n", "other", "the file has no function other"),
        ("import no_such_module\n", "score", "importing it raised ModuleNotFoundError"),
        ("def score(:\n", "score", "importing it raised SyntaxError"),
        ("import sys\nsys.exit('bye')\n", "score", r"importing it raised SystemExit: bye \(.*/verify.py:2\)$"),
        (None, "score", "no such file; expected FILE.py:FUNCTION"),
    ],
)
def test_a_file_that_is_no_verifier(tmp_path, body, name, message):
    """No file, an error in it, or no such function: one line each."""
    if body is None:
        with pytest.raises(UserError, match=f"^task.gold={tmp_path}/none.py:score: {message}"):
            rewards.source(f"{tmp_path}/none.py:score", **HOW)
        return
    with pytest.raises(UserError, match=f"^task.gold={tmp_path}/verify.py:{name}: {message}"):
        verifier(tmp_path, body, name)


@pytest.mark.parametrize("pad", [0, None])
def test_reward_model(group, tmp_path, pad):
    """Batches give what the classifier says of one conversation at a time, with a padding token and without one."""
    model = make_reward_model(tmp_path, pad_token_id=pad)
    source = rewards.source(str(tmp_path), **HOW)
    tokenizer = make_tokenizer()
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        ids = tokenizer(
            f"<bos> [user] {prompt[0]['content']} [assistant] {text} <end>", add_special_tokens=False
        ).input_ids
        with torch.no_grad():
            expected.append(model(input_ids=torch.tensor([ids])).logits.item())
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(source(PROMPTS, ANSWERS, TEXTS), expected, rtol=1e-4, atol=1e-5)
    strings = source(["ba be "], ANSWERS[:1], ["bi"])
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([tokenizer("ba be bi").input_ids])).logits.item()
    assert strings.tolist() == pytest.approx([whole], rel=1e-4)


def test_what_a_gold_is(group, tmp_path):
    """Weights, a config or a chat template changed in place are another gold, and so is a verifier's changed text; the
    same files are the same; a name alone stands for itself."""
    spec = str(tmp_path / "model")
    model = make_reward_model(spec)

    def identity():
        return rewards.identity(spec, rewards.source(spec, **HOW))

    seen = [identity()]
    assert identity() == seen[0]
    with torch.no_grad():
        model.score.weight[0, 0] += 1
    model.save_pretrained(spec)
    seen.append(identity())
    model.config.rms_norm_eps = 0.5
    model.save_pretrained(spec)
    seen.append(identity())
    tokenizer = make_tokenizer()
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(spec)
    seen.append(identity())
    for value in (1, 2):
        source = verifier(tmp_path, f"def score(p, r): return {value}\n")
        seen.append(rewards.identity(f"{tmp_path}/verify.py:score", source))
    assert len(set(seen)) == 6
    assert rewards.identity("auto", None) == b"auto"


def test_what_is_no_reward_model(group, tiny, tmp_path):
    """A causal LM, several labels, nothing there, no head, no template, too long a text: refused by name."""
    make_reward_model(tmp_path / "labels", num_labels=3)
    make_reward_model(tmp_path / "no_template", template=False)
    make_reward_model(tmp_path / "short", max_position_embeddings=8)
    for path, message in {
        tiny
        / "model": "holds LlamaForCausalLM, not a reward model; expected auto, none, FILE.py:FUNCTION, or a reward",
        tmp_path / "labels": "has 3 labels, a reward is one number",
        tmp_path / "nothing": "cannot be read ",
    }.items():
        with pytest.raises(UserError, match=f"^task.gold={path}: {message}") as error:
            rewards.source(str(path), **HOW)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no chat template, and the prompts are messages"):
        rewards.source(str(tmp_path / "no_template"), **HOW)(PROMPTS, ANSWERS, TEXTS)
    with pytest.raises(UserError, match=r"a conversation has \d+ tokens, it reads 1 to 8"):
        rewards.source(str(tmp_path / "short"), **HOW)(PROMPTS, ANSWERS, TEXTS)


def test_a_head_that_is_not_there(tmp_path):
    """A checkpoint without the head's weights would give random rewards, and is refused."""
    make_reward_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the checkpoint lacks score.weight; it is incomplete$"):
        rewards.source(str(tmp_path), **HOW)
