"""Answers of models: the same as generate's own samples, in order, and never made twice."""

import pytest
import torch

from rpo.data.tokenizer import encode_prompt, stop_ids
from rpo.errors import UserError
from rpo.evals import context
from rpo.model import hf as model_hf
from rpo.model.sampling import Sampling
from tests.helpers.models import make_lm
from tests.helpers.rows import make_tokenizer
from tests.helpers.runs import settings

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=6)
WARM = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=4)


def said(*words):
    return [{"role": "user", "content": " ".join(words)}]


CONVERSATIONS = [
    said("ba", "ce"),
    said("du"),
    "fi ba ce",
    [*said("ba"), {"role": "assistant", "content": "ce"}, *said("go")],
]


@pytest.fixture
def model(tmp_path):
    make_lm().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def answerer(group, tmp_path):
    """Makes an Answerer of a folder, as often as it is called."""

    def make(folder="run", batch_size=2, **more):
        (tmp_path / folder).mkdir(exist_ok=True)
        cfg = settings(
            "task=winrate",
            "model.path=[x,y]",
            "data.eval=p",
            "judge.model=j",
            *[f"{k}={v}" for k, v in more.items()],
            name="eval",
        )
        return context.Answerer(cfg, tmp_path / folder, group, batch_size)

    return make


@torch.no_grad()
def greedy_by_hand(path, conversation):
    """The likeliest token, one at a time, by the model's own logits."""
    lm, tokenizer = make_lm(), make_tokenizer()
    ids = encode_prompt(tokenizer, conversation, "2024-07-26")
    made, stop = [], set(stop_ids(tokenizer, "2024-07-26"))
    while len(made) < GREEDY.max_new_tokens and not stop & set(made):
        made.append(int(lm(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return tokenizer.decode([id for id in made if id not in stop])


def test_answers_are_the_models_own_in_order(answerer, model):
    """Greedy answers equal a token-by-token argmax, for messages of one and three turns and a plain string."""
    made = answerer()(model, CONVERSATIONS, GREEDY)
    assert [answer.text for answer in made] == [greedy_by_hand(model, said) for said in CONVERSATIONS]


def test_sampling_by_conversation(answerer, model):
    """With a Sampling each, greedy conversations get what they get alone; each obeys its own length."""
    made = answerer()(model, CONVERSATIONS, [GREEDY, WARM, GREEDY, WARM])
    assert [made[i].text for i in (0, 2)] == [greedy_by_hand(model, CONVERSATIONS[i]) for i in (0, 2)]
    assert all(made[i].tokens <= WARM.max_new_tokens for i in (1, 3))


def test_goes_on_where_it_was_killed(answerer, model, tmp_path, monkeypatch):
    """After a kill, half a line included, what is on disk is not made again, and the rest is as it would have been."""
    monkeypatch.setattr(context, "CHUNK", 1)
    whole = answerer("whole")(model, CONVERSATIONS, WARM)
    file = tmp_path / "run" / "answers.jsonl"
    first = answerer()(model, CONVERSATIONS, WARM)
    text = file.read_text().splitlines(keepends=True)
    file.write_text("".join(text[:3]) + text[3][:20])
    loads = []
    again = answerer()
    monkeypatch.setattr(again, "_load", lambda load=again._load: (loads.append(1), load()))
    assert again(model, CONVERSATIONS, WARM) == first == whole
    assert len(loads) == 1  # the first chunk of two is whole, the second lost an answer


def test_nothing_is_loaded_where_all_is_there(answerer, model, monkeypatch):
    """A second start with all answers on disk loads no weights; another seed or length makes its own answers."""
    first = answerer()(model, CONVERSATIONS, WARM)
    monkeypatch.setattr(model_hf, "load", lambda *_, **__: pytest.fail("loaded"))
    assert answerer()(model, CONVERSATIONS, WARM) == first
    for other in ({"seed": 1}, {}):
        sampling = WARM if other else Sampling(1.0, 1.0, 0, 3)
        with pytest.raises(pytest.fail.Exception):
            answerer(**other)(model, CONVERSATIONS, sampling)


def test_a_model_that_changed_answers_anew(answerer, model, monkeypatch):
    """Weights written again under the same name are another model."""
    answerer()(model, CONVERSATIONS, GREEDY)
    make_lm(seed=5).save_pretrained(model)
    moved = answerer()(model, CONVERSATIONS, GREEDY)
    assert [answer.text for answer in moved] != [greedy_by_hand(model, said) for said in CONVERSATIONS]


def test_prompts_that_can_not_be_read_are_said(answerer, model, capsys):
    """Where the tokenizer does not know a prompt's words, a line says what share; where it knows them, none does."""
    answerer()(model, CONVERSATIONS, GREEDY)
    assert "does not know" not in capsys.readouterr().out
    answerer()(model, [said("ba", "aardvark")], GREEDY)  # <bos> [user] ba <unk> [assistant]
    assert "its tokenizer does not know 20% of the prompts' tokens" in capsys.readouterr().out


def test_no_room(answerer, model, monkeypatch):
    """An answer that would not fit beside its prompt is refused before a weight is loaded, with what would fit: the last
    prompt's, too, long before its turn."""
    monkeypatch.setattr(context, "CHUNK", 1)
    monkeypatch.setattr(model_hf, "load", lambda *_, **__: pytest.fail("loaded"))
    long = Sampling(0.0, 1.0, 0, 200)
    with pytest.raises(UserError, match="task.max_new_tokens=200"):
        answerer(batch_size=1)(model, CONVERSATIONS, [GREEDY, GREEDY, GREEDY, long])
    with pytest.raises(UserError, match=r"task.max_new_tokens=200: beside a prompt of \d+ tokens .* positions for \d+"):
        answerer()(model, CONVERSATIONS, Sampling(0.0, 1.0, 0, 200))
