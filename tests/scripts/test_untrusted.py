"""What comes from elsewhere (models, caches, run folders) runs no code, writes nowhere else, and no secret is written down."""

import ast
import builtins
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import train
from rpo import config, dist
from rpo.data import sources, tokenizer
from rpo.errors import UserError
from rpo.files import read_arrays, write_arrays
from rpo.model import hf
from rpo.runs import folder as run_folder
from rpo.text import redacted
from tests.helpers.models import make_lm
from tests.helpers.rows import make_tokenizer
from tests.helpers.runs import ROOT, command, script_env, settings, tiny_args

# ---- code that comes with a model


CODE = {
    "configuration_own": "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "modeling_own": "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
    "tokenization_own": "from transformers import PreTrainedTokenizerFast\n\n\n"
    "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n",
}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
OFF = "which is not run; read it, then set model.trust_remote_code=true"


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """(a folder with a model and a tokenizer that need code of their own, a file that names the code that was run)."""
    folder, ran = tmp_path / "own", tmp_path / "ran"
    make_lm().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for name, text in CODE.items():
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write('{name}\\n')\n{text}")
    change_json(folder / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=AUTO_MAP)
    named = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    change_json(folder / "tokenizer_config.json", **named)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on stdin"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder, ran


def run(*overrides):
    try:
        return train.train(settings(*overrides))
    finally:
        dist.shutdown()


def refusal(*overrides):
    with pytest.raises(UserError) as caught:
        run(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_code_of_a_model_is_not_run(tiny, own, tmp_path):
    """Model, reference or tokenizer with code of its own: one line that names the key, nothing asked, nothing run."""
    folder, ran = own
    args = tiny_args(tiny, f"run_dir={tmp_path / 'run'}", f"model.tokenizer={tiny / 'model'}")
    for key in ("model.path", "reference.path"):
        assert refusal(*args, f"{key}={folder}") == f"{key}={folder}: comes with code of its own, {OFF}"
        with pytest.raises(UserError, match=f"^{key}={folder}: comes with code of its own, {OFF}$"):
            hf.load(str(folder), None, torch.float32, key=key)
    found = refusal(*args, f"model.tokenizer={folder}")
    assert found == f"tokenizer {folder}: comes with code of its own, {OFF}, or give model.tokenizer"
    assert not ran.exists() and not (tmp_path / "run").exists()


def test_code_that_transformers_has_too_is_not_run(own):
    """A folder whose auto_map names code for a model that transformers has itself loads as transformers' own class."""
    folder, ran = own
    change_json(folder / "config.json", model_type="llama")
    hf.check(str(folder))
    assert type(hf.load(str(folder), None, torch.float32)) is LlamaForCausalLM
    assert not ran.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_the_hub_are_not_run(key, tiny, tmp_path):
    """A config that asks for attention code from the Hub is refused before anything is fetched."""
    make_lm().save_pretrained(tmp_path / "model")
    change_json(tmp_path / "model/config.json", **{key: "someone/kernel"})
    message = f"^model.path={tmp_path}/model: its attention is someone/kernel of the Hub, {OFF}$"
    with pytest.raises(UserError, match=message):
        hf.check(str(tmp_path / "model"))


def test_code_of_a_model_is_run_where_it_is_trusted(tiny, own, tmp_path):
    """With the key on it trains, and RUN/model holds the code: it is refused without the key, and loads with it."""
    folder, ran = own
    trusted = "model.trust_remote_code=true"
    args = tiny_args(tiny, f"model.path={folder}", "max_steps=1", "batch_size=8", "data.eval=null")
    args += [f"run_dir={tmp_path / 'run'}"]
    assert run(*args, trusted) == "finished"
    assert set(ran.read_text().split()) == set(CODE)

    made = tmp_path / "run/model"
    assert {path.stem for path in made.glob("*.py")} == set(CODE)
    again = [f"model.path={made}", f"reference.path={made}", f"run_dir={tmp_path / 'again'}"]
    assert refusal(*args, *again) == f"model.path={made}: comes with code of its own, {OFF}"
    lm = hf.load(str(made), None, torch.float32, trust_remote_code=True)
    assert type(lm).__name__ == "OwnForCausalLM"
    plain = LlamaForCausalLM.from_pretrained(made)  # the same weights under code that is not the folder's
    ids = torch.arange(20)[None]
    torch.testing.assert_close(lm(ids).logits, plain(ids).logits, rtol=0, atol=0)
    assert not torch.equal(plain.lm_head.weight, AutoModelForCausalLM.from_pretrained(tiny / "model").lm_head.weight)
    mine = tokenizer.load_tokenizer(made, trust_remote_code=True)
    assert mine("ba be").input_ids == make_tokenizer()("ba be").input_ids
    assert tokenizer.identity(mine) != tokenizer.identity(make_tokenizer())  # of the tokenised data's cache


# ---- pickles


MODULES = [*sorted((ROOT / "rpo").rglob("*.py")), ROOT / "train.py", ROOT / "eval.py"]
PICKLES = {"dill", "joblib", "cloudpickle", "marshal", "shelve"}


def unsafe(tree):
    """Lines of a module that would unpickle, run text as code, or load a model without saying whose code it may run."""
    for node in ast.walk(tree):
        imported = node.names if isinstance(node, ast.Import) else []
        source = node.module if isinstance(node, ast.ImportFrom) else None
        if PICKLES & {alias.name.split(".")[0] for alias in imported} or source in PICKLES | {"pickle"}:
            yield node.lineno
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr != "UnpicklingError":
            yield node.lineno
        if isinstance(node, ast.Name | ast.Attribute) and re.match(
            "FileSystem(Reader|Writer)", ast.unparse(node).split(".")[-1]
        ):
            yield node.lineno  # torch.distributed.checkpoint's default storage: its metadata is a pickle
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {kw.arg: ast.unparse(kw.value) for kw in node.keywords}
        if name in ("eval", "exec", "yaml.load") or given.get("allow_pickle", "False") != "False":
            yield node.lineno
        if name == "torch.load" and given.get("weights_only") != "True":
            yield node.lineno
        if name in ("dcp.load", "dcp.save") and not {"storage_reader", "storage_writer"} & set(given):
            yield node.lineno
        if given.get("trust_remote_code") == "True":
            yield node.lineno
        if name.endswith((".from_pretrained", ".from_config")) and not {"trust_remote_code", None} & set(given):
            yield node.lineno


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "from pickle import load",
        "import dill",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "dcp.load(state)",
        "dcp.FileSystemReader(f)",
        "exec(text)",
        "AutoConfig.from_pretrained(f)",
        "AutoConfig.from_pretrained(f, trust_remote_code=True)",
    ],
)
def test_the_scan_sees(line):
    """The scan below finds what it is for."""
    assert list(unsafe(ast.parse(line))) == [1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles(path):
    """No call in the project loads a pickle, or a model without saying whether its code may run."""
    if path.name == "harness.py":
        pytest.skip("it is what runs programs in a sandbox, and nothing imports it")
    assert list(unsafe(ast.parse(path.read_text()))) == []


def test_nothing_imports_the_harness():
    """What runs programs that models wrote is no part of any process but a sandbox's."""
    for path in MODULES:
        assert not re.search(r"(?m)^\s*(import|from)\b.*\bharness\b|rpo\.harness", path.read_text()), path


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def pickled(path):
    return pickle.dumps(Bomb(path))


def npy(path):
    file = io.BytesIO()
    np.save(file, np.array([Bomb(path)], dtype=object), allow_pickle=True)
    return file.getvalue()


def npz(path):
    file = io.BytesIO()
    np.savez(file, np.array([Bomb(path)], dtype=object), allow_pickle=True)
    return file.getvalue()


def test_the_bombs_go_off(tmp_path):
    """What the tests below plant does run where it is unpickled."""
    for name, make in (("a", pickled), ("b", npy)):
        loaded = io.BytesIO(make(tmp_path / name))
        pickle.load(loaded) if name == "a" else np.load(loaded, allow_pickle=True)
        assert (tmp_path / name).exists()


BOMBS = (npy, pickled, npz)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_poisoned_array_is_damage(bomb, tmp_path):
    """A pickle in the place of a cached array is not executed, and the cache is one to be made anew."""
    folder, array = tmp_path / "cache", np.arange(3)
    for poison in (False, True):
        write_arrays(folder, {"a": array}, {})
        assert np.array_equal(read_arrays(folder)[0]["a"], array)
        if poison:
            (folder / "a.npy").write_bytes(bomb(tmp_path / "ran"))
            assert read_arrays(folder) is None
    assert not (tmp_path / "ran").exists()


def test_a_poisoned_cache_is_not_executed(tiny, tmp_path):
    """A run over caches of tokens and log-probs that are full of pickles makes them anew and has the same numbers."""
    cache, first = tmp_path / "cache", {}
    args = tiny_args(
        tiny, "max_steps=1", "batch_size=8", "data.eval=null", f"cache_dir={cache}", f"reference.cache_dir={cache}"
    )
    for name in ("clean", "poisoned"):
        run(*args, f"run_dir={tmp_path / name}")
        event = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        first[name] = {key: value for key, value in event.items() if key != "time" and not key.startswith("perf/")}
        arrays = sorted([*(cache / "tokens").rglob("*.npy"), *(cache / "reference").rglob("*.npy")])
        assert {path.name for path in arrays} >= {"ids.npy", "logps.npy"}
        for i, path in enumerate(arrays):
            path.write_bytes(BOMBS[i % 3](tmp_path / "ran"))
    assert first["clean"] == first["poisoned"] and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("saved", ["zip", "bare"])
def test_a_poisoned_model_is_not_executed(saved, tiny, tmp_path):
    """Weights that are a pickle of more than tensors are refused in one line, and a plain *.bin of tensors is read."""
    folder = tmp_path / "model"
    lm = make_lm()
    lm.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(lm.state_dict(), folder / "pytorch_model.bin")
    loaded = hf.load(str(folder), None, torch.float32)
    assert torch.equal(loaded.lm_head.weight, lm.lm_head.weight)
    if saved == "zip":
        torch.save(lm.state_dict() | {"more": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    found = refusal(*tiny_args(tiny, f"model.path={folder}", f"model.tokenizer={tiny / 'model'}", "max_steps=1"),
                    f"run_dir={tmp_path / 'run'}")  # fmt: skip
    assert found.startswith(f"model.path={folder}: its *.bin is a pickle of more than tensors, which could run code")
    assert not (tmp_path / "ran").exists()


def test_a_poisoned_run_is_not_executed(tmp_path):
    """A config.yaml beside someone's model/ runs nothing and resolves nothing; one that is not a run's is not one."""
    (tmp_path / "model").mkdir()
    file = tmp_path / "config.yaml"
    file.write_text(f"loss: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n")
    with pytest.raises(UserError, match=f"^{file}: is not the settings of a run "):
        run_folder.settings_of(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()
    file.write_text("loss: {preference: '${oc.env:HOME}'}\n")
    assert run_folder.settings_of(str(tmp_path / "model")) == {"loss": {"preference": "${oc.env:HOME}"}}
    for text in ("[1, 2]", "loss: 3", "name: another tool's", ""):
        file.write_text(text)
        assert run_folder.settings_of(str(tmp_path / "model")) is None


# ---- secrets


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:pass@host.org:80/data", "https://***@host.org:80/data"),
        ("postgres://me:p@ss@host/db and s3://bucket/x@y", "postgres://***@host/db and s3://bucket/x@y"),
        ("hf_" + "aB3" * 12, "***"),
        ("token=hf_" + "aB3" * 12 + " next", "token=*** next"),
        ("sk-proj-" + "x1Y_" * 5 + "abcdefghij1234567890", "***"),
        ("ghp_" + "aB3" * 12, "***"),
        ("api_key=" + "0f" * 20, "api_key=***"),
        ('{"WANDB_API_KEY": "' + "0f" * 20 + '"}', '{"WANDB_API_KEY": "***"}'),
    ],
)
def test_secrets_are_known_by_their_form(text, clean):
    """Passwords in URLs and tokens of well-known forms become ***, the rest of the text stays."""
    assert redacted(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "HuggingFaceH4/ultrafeedback_binarized:train_prefs",
        "hf://datasets/someone/data@main/train.parquet",
        "git@github.com:someone/rpo",
        "http://localhost:6006/",
        "/data/hf_checkpoints_of_zephyr_7b_beta_20240101/model",
        "sk-learn-something-long-and-plain",
        "cache_key: " + "0f" * 32,
        "git_revision: " + "0f" * 20,
        "{{ bos_token }}{% if key == 'abcdefgh' %}",
        "tokens_per_microbatch=16384",
    ],
)
def test_what_is_no_secret_stays(text):
    """Paths, names, hashes and templates that merely look alike are left as they are."""
    assert redacted({"a": [text, (text,)]}) == {"a": [text, (text,)]}


def test_secrets_are_known_by_their_variable(monkeypatch):
    """Values of variables called KEY, TOKEN, SECRET or PASSWORD are hidden; short ones, other names and paths are not."""
    hidden = {
        "MY_API_KEY": "alpha-alpha",
        "HF_TOKEN": "bravo-bravo",
        "AWS_SECRET_ACCESS_KEY": "charlie/charlie",
        "PGPASSWORD": "delta delta",
        "client_secret": "echo-echo",
        "TLS_KEY": "-----BEGIN-----\nfoxtrot-foxtrot\n",
        "MY_API_KEY_2": "alpha-alpha-and-more",
    }
    shown = {
        "KEYBOARD": "training",
        "TOKENIZERS_PARALLELISM": "falsefalse",
        "MAX_TOKENS": "1638416384",
        "PIN_TOKEN": "1234567",
        "SSH_KEY": str(ROOT / "train.py"),
        "SSH_AUTH_SOCK": "/tmp/ssh-agent",
        "PRIMARY_KEYS": "chosen,rejected",
    }
    for name, value in (hidden | shown).items():
        monkeypatch.setenv(name, value)
    for value in hidden.values():
        for line in value.splitlines():
            assert redacted({f"a {line} b": [line, 1, None]}) == {"a *** b": ["***", 1, None]}
    for value in shown.values():
        assert redacted(f"a {value} b") == f"a {value} b"


def test_settings_are_written_as_they_are(tiny):
    """Without a secret config.yaml is what it was; with one it is still YAML, and a second reading changes nothing."""
    cfg = settings(*tiny_args(tiny))
    assert redacted(config.to_dict(cfg)) == config.to_dict(cfg)


PASSWORD, TOKEN, KEY = "open-sesame-97531", "hf_" + "Zz9" * 12, "sk-" + "a1B2c3D4" * 5


def with_secrets(tiny, tmp_path):
    """Overrides that hold a password in the data's path, a token as the wandb group and a key in a URL-like name."""
    folder = tmp_path / f"of-{PASSWORD}"
    folder.mkdir()
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl.gz").write_bytes((tiny / f"{name}.jsonl.gz").read_bytes())
    paths = [f"data.train={folder}/train.jsonl.gz", f"data.eval={folder}/eval.jsonl.gz"]
    return [
        *tiny_args(tiny, "max_steps=1", "batch_size=8", f"wandb.group=../../{TOKEN}", f"data.revision={KEY}"),
        *paths,
    ]


def assert_clean(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        for secret in (PASSWORD, TOKEN, KEY):
            assert secret.encode() not in path.read_bytes(), f"{path} holds {secret}"
    return {path.name for path in files}


def everything(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_a_run_writes_no_secret(tiny, tmp_path, monkeypatch):
    """No file of a run, wandb's own among them, holds a secret of the environment, the command line or a path.

    Nor is any file outside of it, whatever slashes and dots wandb's group has.
    """
    args = [*with_secrets(tiny, tmp_path), "wandb.mode=offline", f"run_dir={tmp_path / 'run'}"]
    monkeypatch.setenv("DATA_PASSWORD", PASSWORD)
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    before = everything(tmp_path)
    assert run(*args) == "finished"
    assert all(path.is_relative_to("run") for path in everything(tmp_path) - before)
    names = assert_clean(tmp_path / "run")
    assert {"config.yaml", "environment.json", "status.json", "data_report.json"} <= names
    (sent,) = (tmp_path / "run/wandb").rglob("*.wandb")
    assert b"wandb.group=../../***" in sent.read_bytes()  # the command line, which wandb looks up itself
    assert sys.argv == ["train.py", *args]
    written = config.read_yaml(tmp_path / "run/config.yaml")
    expected = config.to_dict(settings(*args))
    assert (written["wandb"]["group"], written["data"]["revision"]) == ("../../***", "***")
    assert written["data"].pop("train") == f"{tmp_path}/of-***/train.jsonl.gz" and written["data"].pop("eval")
    names = {"train": 0, "eval": 0, "revision": 0}
    assert written["data"] | names == expected["data"] | names
    assert "***" in (tmp_path / "run/environment.json").read_text()


@pytest.mark.slow
def test_scripts_print_no_secret(tiny, tmp_path):
    """Whether they finish, are refused or break off, the scripts print and write no secret."""
    args = with_secrets(tiny, tmp_path)
    env = script_env(DATA_PASSWORD=PASSWORD)

    def start(script, *more):
        done = subprocess.run(command(script, *more), env=env, cwd=tmp_path, capture_output=True, text=True)
        for secret in (PASSWORD, TOKEN, KEY):
            assert secret not in done.stdout + done.stderr
        return done

    assert start("train.py", *args, "run_dir=run").returncode == 0
    done = start("train.py", *args, f"data.train=of-{PASSWORD}/MISSING.jsonl", "run_dir=refused")
    assert done.returncode == 2 and done.stderr.startswith("error: of-***/MISSING.jsonl: no such file")
    done = start("train.py", *args, "optim.lr=1e30", "max_steps=5", "log_every=1", "run_dir=broken")
    assert done.returncode == 1 and "train.jsonl.gz" in done.stderr
    done = start("train.py", "-m", *args, "loss.beta=0.1,0.2", "run_dir=sweep")
    assert done.returncode == 0, done.stderr
    evaluated = ["task=pairs", "model.path=run/model", "task.beta=1", f"reference.path={tiny / 'model'}"]
    done = start("eval.py", *evaluated, f"data.eval=of-{PASSWORD}/eval.jsonl.gz", "run_dir=eval")
    assert done.returncode == 0, done.stderr
    for name in ("run", "broken", "sweep", "eval"):
        assert_clean(tmp_path / name)


# ---- paths


def test_names_in_a_cache_stay_in_it(tmp_path):
    """A report.json that names arrays outside its folder is a damaged cache, and none of them is read."""
    folder, array = tmp_path / "cache" / "x", np.arange(3)
    write_arrays(folder, {"a": array}, {})
    np.save(tmp_path / "outside.npy", array)
    report = json.loads((folder / "report.json").read_text())
    assert read_arrays(folder) is not None
    for name in ("../../outside", str(tmp_path / "outside"), "a/../../../outside", "..", "", None, 7, ["a"]):
        (folder / "report.json").write_text(json.dumps(report | {"arrays": [name]}))
        assert read_arrays(folder) is None, name
    for text in ("[" * 100_000, "[]", "null", "{}", '{"arrays": 3, "checksum": 3}'):
        (folder / "report.json").write_text(text)
        assert read_arrays(folder) is None, text[:40]


def test_names_in_a_tokenizer_stay_in_the_run(tiny, tmp_path):
    """A chat template called ../../x, which saving the tokenizer would write elsewhere, is refused; tool_use is kept."""
    folder = tmp_path / "model"
    make_lm().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    template = make_tokenizer().chat_template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    args = tiny_args(tiny, f"model.path={folder}", "max_steps=1", "batch_size=8", f"run_dir={tmp_path / 'run'}")
    for name in ("../../../x", "tool_use"):
        named = [{"name": each, "template": template} for each in ("default", name)]
        change_json(folder / "tokenizer_config.json", chat_template=named)
        if name != "tool_use":
            found = refusal(*args)
            assert found == f"tokenizer {folder}: has a chat template called {name!r}: expected a name without slashes"
    tokenizer.load_tokenizer(folder).save_pretrained(tmp_path / "again")
    assert set(tokenizer.load_tokenizer(tmp_path / "again").chat_template) == {"default", "tool_use"}


def test_a_rendezvous_id_is_a_name(group, monkeypatch):
    """torchrun's --rdzv-id names a folder in outputs/, not one elsewhere."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "../../x")
    with pytest.raises(UserError, match="^run_dir=null with --rdzv-id=../../x: not a folder's name; give run_dir$"):
        run_folder.choose(None, "sigmoid")
    assert run_folder.choose("here", "sigmoid") == Path("here")


def test_links_in_a_run_are_not_followed(tiny, tmp_path):
    """A run folder with a link that leads out of it (an unpacked archive) is refused; links within it, and to it, are not."""
    folder, outside = tmp_path / "run", tmp_path / "outside"
    args = tiny_args(tiny, "max_steps=1", "batch_size=8", "data.eval=null", f"run_dir={tmp_path / 'link'}")
    (folder / "wandb").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    (folder / "own").symlink_to("config.yaml")
    for name in ("checkpoints", "metrics.jsonl", "model.part", "wandb/resume.json"):
        for target in (outside, folder / ".." / "outside"):
            (folder / name).symlink_to(target)
            assert refusal(*args).startswith(f"run_dir={tmp_path / 'link'}: {name} is a link out of it")
            (folder / name).unlink()
    assert run(*args) == "finished" and not outside.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_of_a_dataset_is_not_run(tmp_path):
    """A folder of data with a script, or with pickles in its archive, is refused in one line and runs nothing."""
    (tmp_path / "script").mkdir()
    (tmp_path / "script/script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar/train.tar", "w") as archive:
        for ending in ("pickle", "pyd", "pth", "npy"):
            member = tarfile.TarInfo(f"0.{ending}")
            member.size = len(content := pickled(tmp_path / "ran"))
            archive.addfile(member, io.BytesIO(content))
    for name in ("script", "tar"):
        with pytest.raises(UserError, match=f"^{tmp_path}/{name}:train: ") as caught:
            (source,) = sources.open_sources(f"{tmp_path}/{name}:train", None)
            list(source.rows())
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
