"""Evaluations that are killed and run again: nothing is computed twice, and the results are those of an undisturbed one."""

import json
import shutil
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

import eval as evaluation
from rpo.data.chat import Chat
from rpo.data.tokenizer import encode_prompt, stop_ids
from rpo.errors import UserError
from rpo.evals import context, preference
from rpo.evals.context import Context
from rpo.model import hf, sampling
from rpo.model import policy as model_policy
from rpo.model import sampling as model_sampling
from rpo.model.sampling import Sampling
from rpo.synthetic import task as synthetic_task
from tests.helpers.evaluations import evaluate, lines
from tests.helpers.models import make_lm
from tests.helpers.rows import make_tokenizer
from tests.helpers.runs import ROOT, script_env, settings

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
    """The `answer` of a new context on a folder, as often as it is called."""
    opened = ExitStack()

    def make(folder="run", batch_size=2, **more):
        opened.close()  # a folder's lock is held by one at a time
        cfg = settings(
            "task=winrate",
            "model.path=[x,y]",
            "data.eval=p",
            "judge.model=j",
            "judge.base_url=http://localhost:1/v1",
            f"task.batch_size={batch_size}",
            f"run_dir={tmp_path / folder}",
            *[f"{k}={v}" for k, v in more.items()],
            name="eval",
        )
        return opened.enter_context(Context(cfg, group)).answer

    yield make
    opened.close()


@torch.no_grad()
def greedy_by_hand(path, conversation):
    """The likeliest token, one at a time, by the model's own logits."""
    lm, tokenizer = make_lm(), make_tokenizer()
    ids = encode_prompt(tokenizer, conversation, Chat("2024-07-26", {}))
    made, stop = [], set(stop_ids(tokenizer, Chat("2024-07-26", {})))
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


def test_resumes_where_it_was_killed(answerer, model, tmp_path, monkeypatch):
    """After a kill, half a line included, what is on disk is not sampled again, and the rest is as it would have been."""
    monkeypatch.setattr(context, "CHUNK", 1)
    whole = answerer("whole")(model, CONVERSATIONS, WARM)
    file = tmp_path / "run" / "answers.jsonl"
    first = answerer()(model, CONVERSATIONS, WARM)
    text = file.read_text().splitlines(keepends=True)
    assert len(text) == 2  # chunks of two answers
    file.write_text(text[0] + text[1][:20])
    sampled, sample = [], model_sampling.sample
    monkeypatch.setattr(
        model_sampling,
        "sample",
        lambda policy, prompts, *a, **k: (sampled.append(len(prompts)), sample(policy, prompts, *a, **k))[1],
    )
    assert answerer()(model, CONVERSATIONS, WARM) == first == whole
    assert sampled == [2]
    assert answerer()(model, CONVERSATIONS, WARM) == first and sampled == [2]  # the line after the torn one is read


def test_nothing_is_loaded_where_all_is_there(answerer, model, monkeypatch):
    """A second start with all answers on disk loads no weights; another seed or length makes its own answers."""
    first = answerer()(model, CONVERSATIONS, WARM)
    monkeypatch.setattr(hf, "load", lambda *_, **__: pytest.fail("loaded"))
    assert answerer()(model, CONVERSATIONS, WARM) == first
    for folder, other in (("run", {}), ("other", {"seed": 1})):
        sampling = WARM if other else Sampling(1.0, 1.0, 0, 3)
        with pytest.raises(pytest.fail.Exception):
            answerer(folder, **other)(model, CONVERSATIONS, sampling)


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
    monkeypatch.setattr(hf, "load", lambda *_, **__: pytest.fail("loaded"))
    long = Sampling(0.0, 1.0, 0, 200)
    with pytest.raises(UserError, match="task.max_new_tokens=200"):
        answerer("single", batch_size=1)(model, CONVERSATIONS, [GREEDY, GREEDY, GREEDY, long])
    with pytest.raises(UserError, match=r"task.max_new_tokens=200: the longest prompt is \d+ tokens .* is \d+; set"):
        answerer()(model, CONVERSATIONS, Sampling(0.0, 1.0, 0, 200))


class Counted:
    """Counts the calls of a function, by what `name` says of their arguments; the `die_at`-th is a kill."""

    def __init__(self, monkeypatch, module, function, name, die_at=None):
        self.calls, self.die_at, self._name = [], die_at, name
        self._function = getattr(module, function)
        monkeypatch.setattr(module, function, self)

    def __call__(self, *args, **more):
        self.calls.append(self._name(*args, **more))
        if len(self.calls) == self.die_at:
            raise KeyboardInterrupt
        return self._function(*args, **more)


def killed_and_resumed(folder, counted, die_at, *args):
    """An evaluation killed in its `die_at`-th call of `counted`, then run again: (its results.json, its samples)."""
    begun = len(counted.calls)
    counted.die_at = begun + die_at
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, *args)
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    with next(folder.glob("[ap]*s.jsonl")).open("a") as file:
        file.write('{"key": "half a li')
    counted.die_at = None
    resumed = evaluate(folder, *args)
    calls = counted.calls[begun:]
    repeated = [call for call in calls if calls.count(call) > 1]
    assert len(calls) > die_at and repeated == [calls[die_at - 1]] * 2, "computed twice"
    done = len(counted.calls)
    assert evaluate(folder, *args) == resumed and len(counted.calls) == done, "computed again though all was known"
    return resumed, lines(folder / "samples.jsonl")


def assert_equal(found, undisturbed, folder):
    """But for the folder that each was written into."""
    results, samples = found
    expected = json.loads((folder / "results.json").read_text())
    assert results | {"config": None} == undisturbed | {"config": None} == expected | {"config": None}
    assert samples == lines(folder / "samples.jsonl")


def weights_of(policy):
    """Tells the models of a test apart."""
    weight = policy.lm.get_input_embeddings().weight.detach()
    return float(getattr(weight, "full_tensor", lambda: weight)().sum())


def copies_of(model, folder, *seeds):
    """model.path=... of models like the one in `model`, with weights of their own."""
    for seed in seeds:
        make_lm(seed=seed).save_pretrained(shutil.copytree(model, folder / f"seed_{seed}"))
    return f"model.path=[{','.join(str(folder / f'seed_{seed}') for seed in seeds)}]"


def test_generate_resumes(tiny, tmp_path, monkeypatch):
    """Chunks of two answers by two models: the one that the kill met is sampled again, no other."""
    monkeypatch.setattr(context, "CHUNK", 1)
    args = ["task=generate", copies_of(tiny / "model", tmp_path, 5, 6), "task.max_new_tokens=5", "task.batch_size=2"]
    args += [f"data.eval={tiny / 'eval.jsonl.gz'}", "task.limit=5"]
    undisturbed = evaluate(tmp_path / "whole", *args)
    sampled = Counted(
        monkeypatch, sampling, "sample", lambda policy, prompts, *_, **more: (weights_of(policy), str(prompts))
    )
    found = killed_and_resumed(tmp_path / "killed", sampled, 5, *args)
    assert len(set(sampled.calls)) == 6
    assert_equal(found, undisturbed, tmp_path / "whole")


def test_each_model_is_asked_by_its_own_template(tiny, tmp_path):
    """Of two models with one vocabulary and two templates each has its prompts, and its answer is what it gives alone."""
    args = [
        "task=generate",
        "task.max_new_tokens=5",
        "task.temperature=0",
        f"data.eval={tiny / 'eval.jsonl.gz'}",
        "task.limit=1",
    ]
    paths = [shutil.copytree(tiny / "model", tmp_path / name) for name in ("one", "two")]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} [user] {% endfor %}"
    tokenizer.save_pretrained(paths[1])
    evaluate(tmp_path / "both", *args, f"model.path=[{paths[0]},{paths[1]}]")
    evaluate(tmp_path / "alone", *args, f"model.path={paths[1]}")
    first, second = lines(tmp_path / "both/samples.jsonl")
    assert second["details"]["rendered"] == f"{first['prompt'][-1]['content']} [user]" != first["details"]["rendered"]
    assert [second] == lines(tmp_path / "alone/samples.jsonl")


def test_chunks_are_sampled_as_one_call_would(tiny, tmp_path, monkeypatch):
    """How much is written at once changes no answer."""
    args = ["task=generate", f"model.path={tiny / 'model'}", "task.max_new_tokens=5", "task.batch_size=2"]
    args += [f"data.eval={tiny / 'eval.jsonl.gz'}"]
    whole = evaluate(tmp_path / "whole", *args)
    monkeypatch.setattr(context, "CHUNK", 1)
    assert evaluate(tmp_path / "chunks", *args)["models"] == whole["models"]
    assert lines(tmp_path / "chunks/samples.jsonl") == lines(tmp_path / "whole/samples.jsonl")


def test_pairs_resumes(tiny, tmp_path, monkeypatch):
    """Micro-batches of the reference and two models: what was written is not scored again."""
    monkeypatch.setattr(preference, "WRITTEN", 1)
    args = ["task=pairs", copies_of(tiny / "model", tmp_path, 5, 6), f"reference.path={tiny / 'model'}"]
    args += [f"data.eval={tiny / 'eval.jsonl.gz'}", "task.beta=0.1", "tokens_per_microbatch=300"]
    undisturbed = evaluate(tmp_path / "whole", *args)
    scored = Counted(
        monkeypatch, model_policy, "score", lambda policy, _, batch: (weights_of(policy), str(batch.target_N.tolist()))
    )
    found = killed_and_resumed(tmp_path / "killed", scored, 5, *args)
    assert len({weights for weights, _ in scored.calls}) == 3
    assert_equal(found, undisturbed, tmp_path / "whole")


def test_gold_resumes(gold_sweep, tmp_path, monkeypatch):
    """Killed while it samples chunks of two answers, or while it measures them: no answer is sampled twice."""
    monkeypatch.setattr(context, "CHUNK", 1)
    args = ["task=gold", f"model.path={gold_sweep / 'sweep/0/model'}", "task.batch_size=2", "task.limit=8"]
    undisturbed = evaluate(tmp_path / "whole", *args)
    sampled = Counted(
        monkeypatch, sampling, "sample", lambda policy, prompts, *_, **more: (str(prompts), more["first"])
    )
    found = killed_and_resumed(tmp_path / "sampling", sampled, 3, *args)
    assert_equal(found, undisturbed, tmp_path / "whole")
    sampled.calls = []
    measured = Counted(monkeypatch, synthetic_task, "measure", lambda policy, *_: weights_of(policy))
    found = killed_and_resumed(tmp_path / "measuring", measured, 1, *args)
    assert len(set(sampled.calls)) == len(sampled.calls) == 4
    assert_equal(found, undisturbed, tmp_path / "whole")


def test_another_evaluation_in_its_folder(tiny, tmp_path):
    """Other settings are refused for every task, and what is there stays; how much is scored at once may change."""
    args = ["task=pairs", f"model.path={tiny / 'model'}", f"reference.path={tiny / 'model'}", "task.beta=0.1"]
    args += [f"data.eval={tiny / 'eval.jsonl.gz'}", "task.limit=3"]
    first = evaluate(tmp_path / "run", *args)
    with pytest.raises(UserError, match=r"holds an evaluation with other settings \(task.beta=0.1, here 0.2\)"):
        evaluate(tmp_path / "run", *args[:3], "task.beta=0.2", *args[4:])
    assert json.loads((tmp_path / "run/results.json").read_text()) == first
    assert evaluate(tmp_path / "run", *args, "tokens_per_microbatch=200")["models"].keys() == first["models"].keys()


def test_a_refused_evaluation_leaves_no_folder(tiny, tmp_path):
    """What settings or data are refused for is found before anything is written."""
    model = f"model.path={tiny / 'model'}"
    for args in (
        [
            "task=pairs",
            model,
            f"reference.path={tiny / 'model'}",
            "task.beta=1",
            f"data.eval={tmp_path / 'none.jsonl'}",
        ],
        ["task=generate", model, f"data.eval={tiny / 'eval.jsonl.gz'}", "task.max_new_tokens=1000"],
        ["task=compare", f"task.results={tmp_path}"],
        ["task=select", f"task.results={tmp_path}"],
    ):
        with pytest.raises(UserError):
            evaluate(tmp_path / "run", *args)
        assert not (tmp_path / "run").exists(), args


def test_imports_are_cheap():
    """A refused setting waits for no library that only models, data or figures need."""
    heavy = ("transformers", "tokenizers", "matplotlib", "datasets", "wandb", "openai", "scipy", "lm_eval")
    code = f"import eval, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=script_env(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_settings_are_built_from_their_yaml():
    """Each task's own group is its module's, and config.yaml holds all of it."""
    for kind, task in evaluation.TASKS.items():
        given = {"overopt": ["runs=R"], "report": ["runs=R"], "mbpp": ["task.data=F", "task.allow_code_execution=true"]}
        given |= dict.fromkeys(("select", "compare"), ["task.results=R"])
        given |= dict.fromkeys(("winrate", "mt_bench", "alpaca_eval", "judge_check"), ["annotations=F"])
        more = given.get(kind, ["model.path=M"]) + (["model.path=M"] if kind == "mbpp" else [])
        cfg = settings(f"task={kind}", *more, name="eval")
        assert type(cfg.task) is task.Settings and cfg.task.kind == kind
        assert callable(task.check) and callable(task.run)
