"""Whatever a user can get wrong is one line that names the place and the fix, before a run folder exists."""

import gzip
import json
import re
import shutil
import subprocess

import pytest
import torch
from hydra.errors import HydraException
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import train
from rpo import dist
from rpo.errors import UserError
from rpo.runs import folder as run_folder
from rpo.training import reference
from tests.helpers.models import make_lm
from tests.helpers.rows import make_rows_json, make_tokenizer, write_jsonl
from tests.helpers.runs import command, script_env, settings, tiny_args

GOOD = {"prompt": [{"role": "user", "content": "ba be"}], "chosen": "bi bo", "rejected": "bu"}


def refusal(tiny, tmp_path, *more):
    """The one line with which train.py's `train` refuses; no run folder is left."""
    run_dir = tmp_path / "run"
    try:
        with pytest.raises(UserError) as caught:
            train.train(settings(*tiny_args(tiny, "batch_size=8", "max_steps=1", f"run_dir={run_dir}", *more)))
    finally:
        dist.shutdown()
    assert not run_dir.exists(), "something was written"
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.beta=0", "loss.beta=0: expected > 0"),
        ("loss.beta=-0.1", "loss.beta=-0.1: expected > 0"),
        ("loss.beta=nan", "loss.beta=nan: expected a finite number"),
        ("loss.beta=abc", "loss.beta='abc': expected a number"),
        ("loss.beta=true", "loss.beta=True: expected a number"),
        ("loss.eta=-0.1", "loss.eta=-0.1: expected >= 0"),
        ("loss.sft=none", "loss.eta=0.2 with loss.sft=none: eta would do nothing; set loss.sft="),
        (
            "loss.preference=kto",
            "loss.preference='kto': expected sigmoid|ipo|hinge|robust|dpop|chi_po|simpo|cpo|orpo|none",
        ),
        ("log.gradient_split=-1", "log.gradient_split=-1: expected 0 (off) or a number of steps"),
        ("log.gradient_split=15", "log.gradient_split=15 with log_every=10: what it finds stands in those lines; make"),
        ("loss.label_smoothing=0.5", "loss.label_smoothing=0.5: expected 0 <= e < 0.5"),
        ("batch_size=0", "batch_size=0: expected at least 1"),
        ("batch_size=8.5", "batch_size=8.5: expected an integer"),
        ("max_steps=0", "max_steps=0: expected null or at least 1"),
        ("optim.lr=fast", "optim.lr='fast': expected auto or > 0"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: expected two numbers"),
        ("model.dtype=float16", "model.dtype='float16': expected auto|bfloat16|float32|float64"),
        ("data.max_length=1", "data.max_length=1: expected at least 2"),
        ("data.truncation=left", "data.truncation='left': expected drop|prompt_left|response_right"),
        ("data.template_date=today", "data.template_date='today': expected a date as YYYY-MM-DD"),
        ("layout.kind=ragged", "layout.kind='ragged': expected auto|packed|padded"),
        ("layout.attention=flash", "layout.attention='flash': expected auto|varlen|flex|sdpa"),
        (
            "optim.schedule=constant optim.min_lr_ratio=0.1",
            "optim.min_lr_ratio=0.1 with optim.schedule=constant: only the others read it; set it to 0",
        ),
        ("optim.state_dtype=float16", "optim.state_dtype='float16': expected float32|bfloat16"),
        ("fsdp.reshard_after_forward=2", "fsdp.reshard_after_forward=2: expected true or false"),
        ("+loss.kappa=1", "loss.kappa: no such key; the keys here are beta"),
        ("data.eval=gold", "data.eval=gold with data.train="),
        ("data.train=gold", "data.eval="),
        ("seed=-1", "seed=-1: expected 0 or more"),
        ("seed=99999999999", "seed=99999999999: expected 0 or more"),
        ("data.train=[]", "data.train=[]: expected a file"),
        ("data.gold.samples=0", "data.gold.samples=0: expected at least 1"),
        ("data.train=???", "data.train: Missing mandatory value"),
        ("model.path=null", "model.path=null with data.train="),
    ],
)
def test_settings(override, message, tiny):
    """Each value out of its range, of another type or at odds with another key names the key and what was expected."""
    with pytest.raises(UserError) as caught:
        settings(*tiny_args(tiny, *override.split()))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["loss=nosuch", "nosuch=1", "loss.nosuch=1", "recipe=nosuch"])
def test_unknown_names_are_hydras_to_refuse(override, tiny):
    """An unknown group choice or key never reaches us."""
    with pytest.raises(HydraException):
        settings(*tiny_args(tiny, override))


FILES = {
    "empty.jsonl": (b"", "has no rows"),
    "list.jsonl": (json.dumps([GOOD]).encode(), ":1: expected a JSON object with named fields, got a list"),
    "prose.jsonl": (b"Once upon a time\n", ":1: expected one JSON object a line"),
    "prose.json": (b"Once upon a time\n", "expected one JSON list of rows"),
    "object.json": (json.dumps(GOOD).encode(), "expected a JSON list of rows, got an object"),
    "cut.jsonl.gz": (gzip.compress(json.dumps(GOOD).encode() * 50)[:60], "cannot be read"),
    "plain.jsonl.gz": (json.dumps(GOOD).encode(), "cannot be read"),
    "fields.jsonl": (b'{"question": "a", "answer": "b"}\n', ":1: field chosen: expected in every pair"),
    "latin.jsonl": (json.dumps(GOOD).encode() + b'\n{"prompt": "\xe9"}\n', ":2: byte 13 of the line: expected UTF-8"),
    "table.xlsx": (b"prompt,chosen,rejected\n", "expected a .jsonl, "),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_files(key, name, tiny, tmp_path):
    """A file that cannot be read as rows is named, with the line where there is one."""
    content, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    found = refusal(tiny, tmp_path, f"{key}={path}")
    assert found.startswith(str(path)) and message in found, found


def test_missing_file(tiny, tmp_path):
    """A path that does not exist is named with what may stand there, and so is a folder without data."""
    assert "MISSING.jsonl: no such file; give a" in refusal(tiny, tmp_path, f"data.train={tmp_path}/MISSING.jsonl")
    (tmp_path / "empty").mkdir()
    assert "no data file in this directory; give a" in refusal(tiny, tmp_path, f"data.train={tmp_path}/empty")


ROWS = {
    "missing field": ({"prompt": "ba", "chosen": "be"}, "field rejected: expected in every pair"),
    "wrong type": (GOOD | {"chosen": 7}, "field chosen: expected a non-empty list"),
    "string prompt, number": ({"prompt": "ba", "chosen": "be", "rejected": 7}, "field rejected: expected a string"),
    "wrong roles": (
        GOOD | {"prompt": [{"role": "assistant", "content": "ba"}]},
        "field prompt: expected a prompt that",
    ),
    "no prompt": ({"chosen": "be", "rejected": "bi"}, "field prompt: expected a string or a list of messages"),
    "half a character": (GOOD | {"chosen": "\ud800"}, "an escape like"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_malformed_rows(kind, tiny, tmp_path):
    """A malformed row is named by file and line under on_bad_row=error, and counted and left out under drop."""
    row, message = ROWS[kind]
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, row, GOOD])
    found = refusal(tiny, tmp_path, f"data.train={path}")
    assert found.startswith(f"{path}:2: {message}") and "data.on_bad_row=drop" in found, found
    run_dir = tmp_path / "dropped"
    args = tiny_args(tiny, "max_steps=1", f"data.train={path}", "data.on_bad_row=drop", "data.eval=null")
    try:
        train.train(settings(*args, f"run_dir={run_dir}"))
    finally:
        dist.shutdown()
    report = json.loads((run_dir / "data_report.json").read_text())["train"]
    assert (report["read"], report["kept"]) == (3, 2)
    (entry,) = report["dropped"].values()
    assert entry["count"] == 1 and entry["examples"][0].startswith(f"{path}:2: {message}")


def test_uninformative_rows(tiny, tmp_path):
    """More than 5% of rows that teach nothing stop the run, whatever on_bad_row says."""
    useless = [GOOD | {"chosen": "", "rejected": "ba"}, GOOD | {"chosen": "ba", "rejected": "ba"}]
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows_json(30) + useless)
    for policy in ("error", "drop"):
        found = refusal(tiny, tmp_path, f"data.train={path}", f"data.on_bad_row={policy}")
        assert found.startswith(f"{path}: 2 of 32 rows have an empty response or two equal ones"), found


def test_nothing_fits(tiny, tmp_path):
    """A max_length that keeps no pair is an error that says what dropped them."""
    found = refusal(tiny, tmp_path, "data.max_length=3")
    assert "none of 40 rows is left (40 too_long; data.max_length=3, data.truncation=drop)" in found


def tokenizer_folder(folder, change):
    """make_tokenizer() after `change`, saved."""
    tokenizer = make_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokenizers(tiny, tmp_path):
    """A tokenizer that is absent, without template, without EOS, or whose prompt is no prefix is refused by name."""
    found = refusal(tiny, tmp_path, f"model.tokenizer={tmp_path / 'nowhere'}")
    assert found.startswith(f"tokenizer {tmp_path / 'nowhere'}: cannot be loaded")

    bare = tokenizer_folder(tmp_path / "bare", lambda tok: setattr(tok, "chat_template", None))
    assert AutoTokenizer.from_pretrained(bare).chat_template is None
    found = refusal(tiny, tmp_path, f"model.tokenizer={bare}")
    assert found.startswith("data.chat_template=null: the data has messages, the tokenizer no chat template")

    endless = tokenizer_folder(tmp_path / "endless", lambda tok: setattr(tok, "eos_token", None))
    found = refusal(tiny, tmp_path, f"model.tokenizer={endless}")
    assert found.startswith(f"tokenizer {endless}: has no EOS token to end a response")

    shifting = "{{ 'ba' if messages | length == 1 else 'be' }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    (tmp_path / "shifting.jinja").write_text(shifting)
    found = refusal(tiny, tmp_path, f"data.chat_template={tmp_path / 'shifting.jinja'}")
    assert f"{tiny / 'train.jsonl.gz'}:1: field chosen: expected the prompt's tokens at the beginning" in found
    found = refusal(tiny, tmp_path, "data.chat_template=nowhere.jinja")
    assert found.startswith("data.chat_template=nowhere.jinja: no such file")


def test_a_model_larger_than_the_memory_is_refused_before_a_weight_is_read(tiny, tmp_path):
    """The line says 16 bytes for each of 2 x 10^12 parameters of embeddings alone; to read the file would be another error."""
    shutil.copytree(tiny / "model", tmp_path / "vast")
    config = json.loads((tmp_path / "vast/config.json").read_text())
    config |= {"vocab_size": 10**6, "hidden_size": 2 * 10**6, "intermediate_size": 8, "tie_word_embeddings": True}
    (tmp_path / "vast/config.json").write_text(json.dumps(config | {"head_dim": 8}))
    found = refusal(tiny, tmp_path, f"model.path={tmp_path / 'vast'}", f"model.tokenizer={tiny / 'model'}")
    assert re.search(
        r"vast: weights, gradients and moments take 29\d{3}\.\d GiB of each process, which has [\d.]+ GiB; ", found
    )


@pytest.mark.parametrize("key", ["model.path", "reference.path"])
def test_models(key, tiny, tmp_path):
    """A model that is not there, not a causal LM, or of a smaller vocabulary is refused by the key that names it."""
    tokenizer = f"model.tokenizer={tiny / 'model'}"
    found = refusal(tiny, tmp_path, tokenizer, f"{key}={tmp_path / 'nowhere'}")
    assert found.startswith(f"{key}={tmp_path / 'nowhere'}: no Hugging Face model there"), found

    sizes = {"vocab_size": 44, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertForSequenceClassification(BertConfig(**sizes, intermediate_size=8)).save_pretrained(tmp_path / "bert")
    found = refusal(tiny, tmp_path, tokenizer, f"{key}={tmp_path / 'bert'}")
    assert found.startswith(f"{key}={tmp_path / 'bert'}: holds BertForSequenceClassification, not a causal LM"), found

    make_lm(vocab_size=10).save_pretrained(tmp_path / "narrow")
    found = refusal(tiny, tmp_path, tokenizer, f"model.path={tmp_path / 'narrow'}")
    assert re.match(r"model.path: the data has a token of id \d+, the model 10 embeddings; ", found), found


def test_rows_longer_than_the_model(tiny, tmp_path):
    """A row with more tokens than the model has positions names max_length and its limit."""
    path = write_jsonl(tmp_path / "long.jsonl", [GOOD | {"chosen": "ba " * 200}])
    found = refusal(tiny, tmp_path, f"data.train={path}")
    assert found.startswith("data.max_length: a row of ") and found.endswith("set data.max_length=128 or less")


@pytest.mark.parametrize(("layout", "least"), [("auto", 46), ("packed", 46), ("padded", 64)])
def test_a_budget_below_the_largest_pair(layout, least, tiny, tmp_path):
    """tokens_per_microbatch names the pair that is largest in this layout, and its size."""
    found = refusal(tiny, tmp_path, f"layout={layout}", "data.eval=null", f"tokens_per_microbatch={least - 1}")
    line = re.fullmatch(
        rf"tokens_per_microbatch={least - 1}: the pair at {tiny / 'train.jsonl.gz'}:(\d+) has {least} tokens in "
        rf"layout={layout.replace('auto', 'packed')}; set it to {least} or more, or lower data.max_length", found,
    )  # fmt: skip
    assert line is not None, found
    row = make_rows_json(40)[int(line[1]) - 1]
    prompt, *responses = (len(text.split()) for text in (row["prompt"][0]["content"], row["chosen"], row["rejected"]))
    prompt, responses = prompt + 3, [words + 1 for words in responses]  # <bos> [user] ... [assistant], and <end>
    assert least == (2 * (prompt + max(responses)) if layout == "padded" else prompt + sum(responses))


def test_a_budget_of_the_largest_pair(tiny, tmp_path):
    """The least value for packed rows runs; where layout=auto comes to padded the same line comes with its value."""
    make_lm("stablelm").save_pretrained(tmp_path / "model")
    for name, path in (("packed", tiny / "model"), ("padded", tmp_path / "model")):
        more = (f"model.path={path}", f"model.tokenizer={tiny / 'model'}", f"run_dir={tmp_path / name}")
        cfg = settings(*tiny_args(tiny, "tokens_per_microbatch=46", "max_steps=1", "data.eval=null", *more))
        try:
            if name == "packed":
                assert train.train(cfg) == "finished"
            else:
                with pytest.raises(UserError, match="46: .* has 64 tokens in layout=padded; set it to 64 or more"):
                    train.train(cfg)
        finally:
            dist.shutdown()


def test_what_this_device_lacks(tiny, tmp_path, monkeypatch):
    """On a CPU CUDA's attention and bf16 moments are refused before the data is read; padded rows ask for neither."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("varlen", "flex"):
        found = refusal(tiny, tmp_path, f"layout.attention={name}", "data.train=MISSING.jsonl")
        needs = "needs a CUDA device, this one is cpu"
        assert found == f"layout.attention={name}: {needs}; use layout.attention=auto"
    found = refusal(tiny, tmp_path, "optim.state_dtype=bfloat16", "data.train=MISSING.jsonl")
    assert found == "optim.state_dtype=bfloat16: the CPU's fused AdamW has no such moments; use float32"
    found = refusal(tiny, tmp_path, "layout=padded", "layout.attention=varlen", "data.train=MISSING.jsonl")
    assert found.startswith("MISSING.jsonl: no such file")


def test_a_model_that_a_preference_run_made(tiny, tmp_path):
    """It is not silently its own reference: refused without reference.path, and trained with one, were it itself."""
    made, file = tmp_path / "first/model", tmp_path / "first/config.yaml"
    shutil.copytree(tiny / "model", made)
    file.write_text("loss: {preference: sigmoid}\n")
    found = refusal(tiny, tmp_path, f"model.path={made}")
    assert found.startswith(f"reference.path=null with model.path={made}: a preference run made it"), found
    assert "give reference.path, the run's own to continue it, or model.path again for a new round" in found
    for name, path in (("on", tiny / "model"), ("round", made)):
        more = (f"model.path={made}", f"reference.path={path}", "max_steps=1", f"run_dir={tmp_path / name}")
        try:
            assert train.train(settings(*tiny_args(tiny, *more))) == "finished"
        finally:
            dist.shutdown()
    file.write_text("loss: {preference: none}\n")
    run_folder.check_starting_model(str(made))  # what supervised training made is a start like any other


def test_a_reference_cache_that_can_not_be_written(tiny, tmp_path, monkeypatch):
    """reference.cache_dir is refused before the pass, with the room that is needed; the run's status says why."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(reference, "_fill", lambda *_: pytest.fail("the pass began"))
    key = f"reference.cache_dir={tmp_path / 'file'}"
    message = rf"{key}: cannot be written \(.*\), 0.1 MiB are needed; use another folder"
    try:
        with pytest.raises(UserError, match=f"^{message}$"):
            train.train(settings(*tiny_args(tiny, key, f"run_dir={tmp_path / 'run'}")))
    finally:
        dist.shutdown()
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 0) and re.search(message, status["reason"])


def test_where_it_runs(tiny, tmp_path, monkeypatch):
    """More ranks than pairs in a batch, and wandb online without a key, stop before the data is read."""
    found = refusal(tiny, tmp_path, "wandb.mode=online", "data.train=MISSING.jsonl")
    assert found.startswith("wandb.mode=online: no API key is configured")
    monkeypatch.setattr(dist, "world_size", lambda: 16)
    found = refusal(tiny, tmp_path, "data.train=MISSING.jsonl")
    assert found == "batch_size=8: fewer pairs than the 16 ranks; raise it"


@pytest.mark.parametrize("mark", ["config.yaml", "status.json", "metrics.jsonl", "results.json", "sweep.json"])
def test_a_folder_with_another_run_is_left_alone(mark, tiny, tmp_path):
    """A run folder that holds a run, an evaluation or a sweep is refused and not touched."""
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / mark).write_text("{}")
    try:
        with pytest.raises(UserError, match=f"run_dir={folder}: already holds a run"):
            train.train(settings(*tiny_args(tiny, f"run_dir={folder}")))
    finally:
        dist.shutdown()
    assert [path.name for path in folder.iterdir()] == [mark] and (folder / mark).read_text() == "{}"


@pytest.mark.parametrize(
    ("script", "more", "message"),
    [
        ("train.py", ["data.train=MISSING.jsonl"], "error: MISSING.jsonl: no such file"),
        ("eval.py", ["model.path=nowhere", "reference.path=nowhere", "data.eval=f", "task.beta=1"], "error: model."),
    ],
    ids=["file", "eval"],
)
def test_exit_codes(script, more, message, tiny, tmp_path):
    """A user's error is one line on stderr and exit code 2, and nothing is written."""
    args = [*(tiny_args(tiny) if script == "train.py" else []), f"run_dir={tmp_path / 'run'}", *more]
    done = subprocess.run(command(script, *args), env=script_env(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
