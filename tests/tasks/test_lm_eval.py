"""task=lm_eval: the harness's scores against plain Hugging Face logits and arithmetic by hand, on local files."""

import json
import math
import os
import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from rpo.errors import UserError
from rpo.evals.context import identity_of
from rpo.evals.results import Item
from rpo.stats import clustered_mean
from rpo.tasks import lm_eval as task
from tests.helpers.contexts import StubContext
from tests.helpers.models import make_lm
from tests.helpers.rows import write_jsonl
from tests.helpers.runs import settings

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install -e '.[eval]')")
pytest.importorskip("accelerate", reason="accelerate is not installed (pip install -e '.[eval]')")

ARC = [
    {"question": f"What is {a} and {b}?", "choices": [f"{a * b}", f"the number {a + b}", "no"], "gold": (a + b) % 3}
    for a, b in [(1, 2), (3, 4), (5, 7), (2, 2), (9, 1), (4, 6), (8, 8)]
]
GSM8K = [{"question": f"{i} and {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>.\n#### {2 * i}"} for i in range(1, 4)]
TEMPLATE = (
    "{{ bos_token }}{{ strftime_now('%d %B %Y') }}{% for message in messages %}[{{ message['role'] }}] "
    "{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_tokenizer():
    """A tokenizer that knows any text, a token per byte."""
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<end>"}
    inner = Tokenizer(BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=list(special.values())))
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE, **special)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """first/ and second/ (models), data/ (three questions of GSM8K, seven of ARC, and as many to show)."""
    folder, tokenizer = tmp_path_factory.mktemp("lm_eval"), byte_tokenizer()
    for seed, name in enumerate(("first", "second")):
        lm = make_lm(vocab_size=len(tokenizer), seed=seed, max_position_embeddings=1024)
        lm.generation_config.repetition_penalty = 9.0  # which no benchmark asked for
        lm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for kind, rows in (("gsm8k/{}", GSM8K), ("arc/arc_challenge_{}", ARC), ("arc/arc_easy_{}", ARC[::-1])):
        (folder / "data" / kind).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / "data" / f"{kind.format('test')}.jsonl.gz", rows)
        write_jsonl(folder / "data" / f"{kind.format('train')}.jsonl", rows)
    return folder


def configured(folder, *more):
    args = ["task=lm_eval", f"model.path=[{folder / 'first'},{folder / 'second'}]", f"task.data={folder / 'data'}"]
    return settings(*args, f"cache_dir={folder / 'cache'}", *more, name="eval")


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """ARC and GSM8K of both models, in batches, the second the baseline; and the settings and folder."""
    from rpo import dist

    run_dir = tmp_path_factory.mktemp("run")
    cfg = configured(folder, "task.tasks=[arc_challenge,gsm8k]", f"baseline={folder / 'second'}", "task.batch_size=3")
    try:
        return task.run(cfg, StubContext(run_dir, device=dist.init())), cfg, run_dir
    finally:
        dist.shutdown()


def model_of(folder, name):
    return make_lm(vocab_size=len(byte_tokenizer()), seed=["first", "second"].index(name), max_position_embeddings=1024)


@torch.no_grad()
def logp(lm, tokenizer, prompt, text):
    """log P(text | prompt) in nats, from the model's own logits."""
    start, ids = (tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, prompt + text))
    logps = lm(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return sum(logps[i - 1, ids[i]].item() for i in range(len(start), len(ids)))


def of(made, path, name):
    return [s for s in made.items if s.model == str(path) and s.details["task"] == name]


def test_choices(made, folder):
    """acc is the likeliest choice by the sum of log-probs, acc_norm by their mean over characters; logps are kept."""
    evaluation, tokenizer = made[0], byte_tokenizer()
    for name in ("first", "second"):
        lm, right, right_norm = model_of(folder, name), [], []
        for row, sample in zip(ARC, of(evaluation, folder / name, "arc_challenge"), strict=True):
            prompt = f"Question: {row['question']}\nAnswer:"
            logps = [logp(lm, tokenizer, prompt, f" {choice}") for choice in row["choices"]]
            assert sample.prompt == prompt and sample.details["logps"] == pytest.approx(logps, abs=1e-3)
            assert sample.response == " " + row["choices"][logps.index(max(logps))]
            assert sample.details["target"] == " " + row["choices"][row["gold"]]
            by_length = [value / len(choice) for value, choice in zip(logps, row["choices"], strict=True)]
            right.append(logps.index(max(logps)) == row["gold"])
            right_norm.append(by_length.index(max(by_length)) == row["gold"])
            scores = {"arc_challenge/acc": right[-1], "arc_challenge/acc_norm": right_norm[-1]}
            assert sample.scores == scores
        cells = evaluation.models[str(folder / name)]
        mean = sum(right) / 7
        assert cells["arc_challenge/acc"]["value"] == pytest.approx(mean)
        assert cells["arc_challenge/acc"]["se"] == pytest.approx(math.sqrt(mean * (1 - mean) / 6))
        assert cells["arc_challenge/acc_norm"]["value"] == pytest.approx(sum(right_norm) / 7)


def test_generated_answers_are_greedy(made, folder):
    """GSM8K's answers are the model's argmax, whatever its generation_config.json asks for."""
    tokenizer, lm = byte_tokenizer(), model_of(folder, "first")
    for sample in of(made[0], folder / "first", "gsm8k")[:2]:
        ids = tokenizer(sample.prompt, add_special_tokens=False).input_ids
        start = len(ids)
        with torch.no_grad():
            for _ in range(30):
                ids.append(lm(torch.tensor([ids])).logits[0, -1].argmax().item())
        expected = tokenizer.decode(ids[start:]).lstrip().rstrip("\ufffd")  # a character of several bytes may be cut
        assert len(expected) > 5 and sample.response.lstrip().startswith(expected), (expected, sample.response)
        rules = ("strict-match", "flexible-extract", "normalised")
        assert set(sample.scores) == {f"gsm8k/exact_match,{rule}" for rule in rules}


def test_differences_are_paired(made, folder):
    """difference/METRIC is the mean of score minus the baseline's on the same question, with its own error."""
    evaluation = made[0]
    first, second = (of(evaluation, folder / name, "arc_challenge") for name in ("first", "second"))
    assert [s.id for s in first] == [s.id for s in second] and len({s.id for s in first}) == 7
    values = [a.scores["arc_challenge/acc"] - b.scores["arc_challenge/acc"] for a, b in zip(first, second, strict=True)]
    mean = sum(values) / 7
    cell = evaluation.models[str(folder / "first")]["difference/arc_challenge/acc"]
    assert cell["value"] == pytest.approx(mean) and cell["n"] == 7 and cell["n_error"] == 0
    assert cell["se"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 6 / 7))
    assert not any(name.startswith("difference") for name in evaluation.models[str(folder / "second")])


def test_facts(made):
    """What was run is said: shots, the harness's versions, and that our scorer of GSM8K agrees with it on every answer."""
    facts = made[0].details
    assert facts["tasks"]["gsm8k"]["n-shot"] == {"gsm8k": 0} and facts["tasks"]["gsm8k"]["versions"] == {"gsm8k": 3.0}
    assert facts["tasks"]["gsm8k"]["scored_otherwise"] == []


def test_goes_on(made, group, monkeypatch):
    """What is done is not done again: no model is loaded where all is there, and only what is missing is measured."""
    evaluation, cfg, run_dir = made
    with monkeypatch.context() as patch:
        patch.setattr(task, "_model", None)
        assert task.run(cfg, StubContext(run_dir, device=group)) == evaluation
    done = (run_dir / "lm_eval.jsonl").read_text().splitlines(keepends=True)
    assert len(done) == 4
    (run_dir / "lm_eval.jsonl").write_text("".join(line for line in done if line != done[0]))
    asked, measure = [], task._measured
    monkeypatch.setattr(
        task, "_measured", lambda model, name, *rest: (asked.append(name), measure(model, name, *rest))[1]
    )
    again = task.run(cfg, StubContext(run_dir, device=group))
    assert asked == ["arc_challenge"] and again.models == evaluation.models


def test_other_contents_of_the_files_named_are_measured_anew(folder, tmp_path):
    """Results are kept under the data's content and the template's text; the same ones under another time stay."""
    data, template, ctx = tmp_path / "gsm8k/test.jsonl", tmp_path / "t.jinja", StubContext(tmp_path)
    more = (f"task.data={tmp_path}", f"data.chat_template={template}", "task.chat_template=true", "task.tasks=[gsm8k]")
    data.parent.mkdir()

    def key(rows, text):
        write_jsonl(data, rows), template.write_text(text)
        return task._key(configured(folder, *more), ctx, str(folder / "first"), "gsm8k")

    keys = [key(GSM8K, "a {{ messages }}"), key(GSM8K[:1], "a {{ messages }}"), key(GSM8K, "b {{ messages }}")]
    assert len(set(keys)) == 3 and key(GSM8K, "a {{ messages }}") == keys[0]


def test_other_weights_are_another_model(folder, tmp_path):
    """A model that was trained on since is measured anew, though its folder's name is the same."""
    weights, names = tmp_path / "model/model.safetensors", set()
    weights.parent.mkdir()
    for time in (1, 2):
        weights.touch()
        os.utime(weights, (time, time))
        names.add(identity_of(str(weights.parent), None))
    assert len(names) == 2


def test_shots(folder, group, tmp_path):
    """Standard shots show as many solved questions of the train file; one seed shows the same; limit takes the first."""
    args = ("task.tasks=[arc_easy]", "task.limit=2", f"model.path={folder / 'first'}")
    standard = {}
    for seed in (0, 0, 1):
        folder_of_run = tmp_path / f"{len(standard)}{seed}"
        folder_of_run.mkdir(exist_ok=True)
        made = task.run(
            configured(folder, *args, "task.shots=3", f"seed={seed}"), StubContext(folder_of_run, device=group)
        )
        standard.setdefault(seed, [s.prompt for s in made.items])
        assert standard[seed] == [s.prompt for s in made.items] and len(made.items) == 2
    assert standard[0] != standard[1]
    assert all(text.count("Question:") == 4 and text.count("Answer: ") == 3 for text in standard[0])
    assert made.details["tasks"]["arc_easy"]["n-shot"] == {"arc_easy": 3}


@pytest.mark.parametrize(
    ("name", "shots", "own", "used"),
    [("gsm8k", "standard", 3, 5), ("arc_easy", "standard", None, 25), ("mmlu", "standard", 3, 3), ("mmlu", 7, 3, 7)]
    + [("gsm8k", 0, 5, 0), ("truthful", 4, 0, 0)],
)
def test_standard_shots(folder, monkeypatch, name, shots, own, used):
    """standard is 5 for GSM8K, 25 for ARC, else the harness's own; what it says is zero-shot by definition stays so."""
    config = {"num_fewshot": own}
    leaf = SimpleNamespace(
        get_config=config.get,
        set_config=lambda key, value: config.update({key: value}),
        set_fewshot_seed=lambda seed: config.update(seed=seed),
    )
    monkeypatch.setattr(task, "_manager", lambda: SimpleNamespace(load=lambda specs: {"tasks": {name: leaf}}))
    made, asked = {"samples": {}, "results": {}, "n-shot": {}, "versions": {}}, {}
    monkeypatch.setattr("lm_eval.evaluate", lambda **how: (asked.update(how), made)[1])
    random_before, torch_before = random.getstate(), torch.get_rng_state()
    task._measured(None, name, name, configured(folder, f"task.shots={shots}", "task.tasks=[arc_easy]", "seed=6"))
    assert config == {"num_fewshot": used, "seed": 6}
    assert asked["bootstrap_iters"] >= 1000  # of two draws an error would be noise
    assert random.getstate() == random_before and torch.equal(torch.get_rng_state(), torch_before)


def test_chat_template(folder, group, tmp_path):
    """The prompt is rendered by the model's template on the date of the settings, not today."""
    args = ("task.tasks=[gsm8k]", "task.limit=1", f"model.path={folder / 'first'}", "task.chat_template=true")
    (sample,) = task.run(configured(folder, *args), StubContext(tmp_path, device=group)).items
    assert sample.prompt == f"<bos>26 July 2024[user] Question: {GSM8K[0]['question']}\nAnswer: [assistant] "


def test_what_the_harness_warns_of(folder, caplog):
    """It says nothing of how a model was made, and later warnings, as of questions that are cut, still come."""
    from lm_eval.models import huggingface

    task._model(configured(folder), str(folder / "first"), torch.device("cpu"))
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]
    huggingface.eval_logger.warning("cut")
    assert caplog.messages[-1] == "cut"


def test_all_answers_wrong():
    """A metric that is 0 of every question has its cell from `stats.clustered_mean`, as every mean has."""
    items = [Item(model="m", id=i, cluster=i, scores={"t/acc": 0.0}) for i in "abc"]
    expected = clustered_mean([0.0] * 3, list("abc"))
    assert task._cells(items, {"t/acc": [0.0, 0.0]})["t/acc"] == expected | {"n_error": 0}


def test_totals_that_are_no_means():
    """A metric that is not the mean over questions keeps the harness's value and error."""
    items = [Item(model="m", id=f"{x}", cluster=f"{x}", scores={"t/acc": x, "t/ppl": x}) for x in (0.0, 1.0)]
    cells = task._cells(items, {"t/acc": [0.5, 0.1], "t/ppl": [1.7, 0.2], "group/acc": [0.4, None]})
    assert cells["t/acc"]["se"] == pytest.approx(0.5)
    assert cells["t/ppl"] == {"value": 1.7, "se": 0.2, "interval": None, "n": 2, "n_error": 0}
    assert cells["group/acc"]["value"] == 0.4 and cells["group/acc"]["n"] == 0


def test_other_rules_show():
    """An answer that the harness scores otherwise than GSM8K's rules is named."""
    scores = {"gsm8k/exact_match,strict-match": 1.0, "gsm8k/exact_match,flexible-extract": 1.0}

    def answer(name, response, target, scores):
        return {"id": name, "response": response, "scores": scores, "details": {"target": target}}

    good = answer("good", "#### 1,200", "#### 1200", scores)
    bad = answer("bad", "It is 1200", "#### 1200", scores)
    bare = answer("bare", "#### 5", "5", scores)  # a target that is a number alone
    unscored = answer("unscored", "#### 5", "#### 5", {})  # its metrics have other names
    assert task._scored_otherwise([good, bad, bare, unscored]) == ["bad", "unscored"]


def test_questions_that_repeat():
    """The same question twice has two ids and one cluster."""
    line = {"doc_hash": "a" * 64, "filter": "none", "metrics": ["acc"], "acc": 1, "target": 0}
    line |= {"arguments": [("q", " x"), ("q", " y")], "resps": [[(-1.0, True)], [(-2.0, False)]]}
    first, second = task._items("t", [line | {"doc_id": 0}, line | {"doc_id": 1}])
    assert first["id"] != second["id"] and first["cluster"] == second["cluster"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["task.tasks=[gsm9k]"], "has no gsm9k; did you mean gsm8k"),
        (["task.tasks=[qqqqqqqqq]"], "has no qqqqqqqqq; give names that"),
        (["task.tasks=[hellaswag]"], "holds gsm8k, arc_challenge, arc_easy, not hellaswag"),
        (["baseline=other"], "baseline=other: expected one of model.path"),
        (["model.path=/nowhere"], "model.path=/nowhere: no Hugging Face model there"),
        (["task.data=/nowhere"], r"task.data=/nowhere: has no gsm8k/test.jsonl\(.gz\)"),
    ],
)
def test_bad_input(folder, group, tmp_path, more, said):
    """What is not there is said in one line, before a model is loaded."""
    with pytest.raises(UserError, match=said) as caught:
        task.run(configured(folder, *more), StubContext(tmp_path, device=group))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["task.tasks=[]"], r"task.tasks=\[\]: expected names"),
        (["task.tasks=[gsm8k,gsm8k]"], "one is there twice"),
        (["task.shots=-1"], "task.shots=-1: expected standard, or 0 or more"),
        (["task.limit=0"], "task.limit=0: expected null or at least 1"),
    ],
)
def test_bad_settings(folder, more, said):
    """Settings out of range are refused in one line."""
    with pytest.raises(UserError, match=said):
        configured(folder, *more)


def test_refusals(folder, group, tmp_path, monkeypatch):
    """Several ranks, a harness that is not installed, a task that would run models' programs, a damaged file."""

    def refused(said, *more):
        with pytest.raises(UserError, match=said) as caught:
            task.run(configured(folder, *more), StubContext(tmp_path, device=group))
        assert "\n" not in str(caught.value)

    with monkeypatch.context() as patch:
        patch.setattr("rpo.dist.world_size", lambda: 2)
        refused("task=lm_eval on 2 ranks: it runs on one; start it without torchrun")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        refused(r"lm_eval is not installed; pip install -e '.\[eval\]'")
    with monkeypatch.context() as patch:
        unsafe = SimpleNamespace(all_tasks=["x"], load=lambda s: {"tasks": {"x": SimpleNamespace(UNSAFE_CODE=True)}})
        patch.setattr(task, "_manager", lambda: unsafe)
        refused("x runs what models write, unprotected; leave it out", "task.tasks=[x]", "task.data=null")
    with monkeypatch.context() as patch:

        def load(specs):
            raise ConnectionError("no route\nto the Hub")

        patch.setattr(task, "_manager", lambda: SimpleNamespace(all_tasks=["x"], load=load))
        more = ("task.tasks=[x]", "task.data=null")
        refused(r"x cannot be loaded \(no route to the Hub\); without a network give task.data", *more)
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_text(json.dumps(GSM8K[0])[:-5])
    refused("gsm8k cannot be loaded", "task.tasks=[gsm8k]", f"task.data={tmp_path}")
