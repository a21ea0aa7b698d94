"""`python -m rpo.export`: folders of checkpoints, means and interpolations are what transformers and arithmetic say."""

import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpo import dist, export
from rpo.errors import UserError
from rpo.model import saving
from tests.helpers.runs import run, settings, weights


@pytest.fixture(scope="module")
def two_steps(tiny, tmp_path_factory):
    """Two runs with a checkpoint at steps 2 and 4: a full one, and one with an adapter."""
    folder = tmp_path_factory.mktemp("export")
    every = ("checkpoint.every=2", "checkpoint.keep=all", "loss=rpo_sum", "optim.lr=1e-2")
    run(tiny, folder / "full", *every)
    run(tiny, folder / "lora", *every, "model.lora.r=2")
    return folder


def exported(*args):
    dist.init()
    try:
        return export.export(export.parser().parse_args([str(arg) for arg in args]))
    finally:
        dist.shutdown()


def test_the_last_checkpoint_is_the_model(two_steps, tmp_path):
    """Of a full run and of an adapter, by step and by link: the very tensors and tokenizer of RUN/model, and a card."""
    for name, file in (("full", "model.safetensors"), ("lora", "adapter_model.safetensors")):
        for checkpoint in ("step_00000004", "latest"):
            exported(two_steps / name / "checkpoints" / checkpoint, tmp_path / name / checkpoint)
            assert (tmp_path / name / checkpoint / file).read_bytes() == (
                two_steps / name / "model" / file
            ).read_bytes()
        assert AutoTokenizer.from_pretrained(tmp_path / name / "latest").chat_template
    card = (tmp_path / "full" / "latest" / "README.md").read_text()
    last = json.loads((two_steps / "full" / "metrics.jsonl").read_text().splitlines()[-1])
    for part in (
        "2405.16436",
        "eta beta (-logp(chosen))",
        "beta 0.01, eta 0.005",
        "train.jsonl.gz",
        f"{last['nll/chosen']:.4g}",
    ):
        assert part in card
    assert str(two_steps) not in card


def test_means_and_moves_are_arithmetic(two_steps, tiny, tmp_path):
    """Each tensor is the mean of the steps', and moved towards the start by its share; 0 and 1 are the ends themselves."""
    steps = [two_steps / "full" / "checkpoints" / f"step_0000000{step}" for step in (2, 4)]
    for i, step in enumerate(steps):
        exported(step, tmp_path / str(i))
    exported(*steps, tmp_path / "mean", "--toward", tiny / "model", "--weight", "0.25")
    for share in (0, 1):
        exported(steps[1], tmp_path / f"end{share}", "--toward", tiny / "model", "--weight", share)
    start, first, last, mean = (
        weights(path) for path in (tiny / "model", tmp_path / "0", tmp_path / "1", tmp_path / "mean")
    )
    for name, tensor in mean.items():
        expected = 0.375 * (first[name].double() + last[name].double()) + 0.25 * start[name].double()
        assert torch.equal(tensor, expected.float())
    for ends, own in ((weights(tmp_path / "end0"), last), (weights(tmp_path / "end1"), start)):
        assert all(torch.equal(ends[name], own[name]) for name in own)


def test_an_adapter_is_merged_before_it_is_averaged(two_steps, tmp_path):
    """The mean of two adapters is that of the models they make, not of their factors."""
    steps = [two_steps / "lora" / "checkpoints" / f"step_0000000{step}" for step in (2, 4)]
    for i, step in enumerate(steps):
        exported(step, tmp_path / str(i), "--merge")
    exported(*steps, tmp_path / "mean", "--dtype", "bfloat16")
    first, last, mean = (weights(tmp_path / name) for name in ("0", "1", "mean"))
    for name, tensor in mean.items():
        assert torch.equal(tensor, ((first[name].double() + last[name].double()) / 2).float().bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mean", dtype="auto").dtype == torch.bfloat16


def test_mistakes_are_one_line_and_leave_nothing(two_steps, tiny, tmp_path, monkeypatch):
    """A run's folder, nothing, another model's start, a share without its model, a name, a token, a full disk."""
    (tmp_path / "there").mkdir()
    latest, out = two_steps / "full" / "checkpoints" / "latest", tmp_path / "out"
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for args, words in (
        ((latest, tmp_path / "there"), "there: exists already"),
        ((two_steps / "full", out), "is a run's folder; give one of"),
        ((tmp_path / "nowhere", out), "SOURCE=.*nowhere: no Hugging Face model there"),
        ((latest, out, "--toward", tiny / "model"), "--toward and --weight: give both"),
        ((latest, out, "--toward", tiny / "model", "--weight", "2"), "expected the share of --toward, 0 to 1"),
        ((two_steps / "lora" / "model", out, "--dtype", "bfloat16"), "give --merge"),
        ((latest, out, "--push-to-hub", "a/b"), "no token; run hf auth login"),
        ((latest, out, "--push-to-hub", "a b"), "--push-to-hub a b: "),
    ):
        with pytest.raises(UserError, match=words) as caught:
            exported(*args)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(
        saving, "_write_file", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match=r"out: cannot be written \(.*No space left"):
        exported(latest, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_results_are_of_the_weights_that_are_exported(two_steps, tmp_path):
    """On the card stand numbers of these weights alone: not of another step, of a mean, or older than the weights."""
    model, evaluation = two_steps / "full" / "model", tmp_path / "evaluation"
    evaluation.mkdir()
    cell = {"value": 0.25, "se": 0.1, "interval": None, "n": 12, "n_error": 0}
    whole = {"task": "pairs", "models": {str(model): {"rewards/accuracies": cell}}, "notes": [], "details": {}}
    (evaluation / "results.json").write_text(json.dumps(whole | {"config": {}, "versions": {}}))
    checkpoints = two_steps / "full" / "checkpoints"
    for i, source in enumerate((model, checkpoints / "latest")):
        exported(source, tmp_path / f"out{i}", "--results", evaluation)
        assert "0.25 +- 0.1" in (tmp_path / f"out{i}" / "README.md").read_text()
    for sources, words in (
        ((checkpoints / "step_00000002",), "is of .*, not of"),
        ((model, checkpoints / "step_00000002"), "no evaluation is of weights that are made here"),
    ):
        with pytest.raises(UserError, match=words):
            exported(*sources, tmp_path / "none", "--results", evaluation)
    os.utime(evaluation / "results.json", (0, 0))
    with pytest.raises(UserError, match="is older than the weights of"):
        exported(model, tmp_path / "none", "--results", evaluation)


def test_the_best_as_model_has_its_own_step_on_the_card(tiny, tmp_path, capsys):
    """model/ of an earlier step: the run's last line and the card have that step's numbers."""
    best = ("checkpoint.every=1", "eval_every=1", "checkpoint.best=min:shift/chosen", "model.save=best", "loss=rpo_sum")
    events = run(tiny, tmp_path / "run", *best, "optim.lr=2e-2")
    shifts = {event["step"]: event["shift/chosen"] for event in events if event["split"] == "eval" and event["step"]}
    step = min(shifts, key=shifts.get)
    assert f"shift/chosen {shifts[step]:.4g}" in capsys.readouterr().out
    exported(tmp_path / "run" / "model", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"at step {step}" in card and f"{shifts[step]:.4g}" in card


def test_the_start_of_a_checkpoint_must_be_what_it_was(two_steps, tiny, tmp_path):
    """A LoRA checkpoint has no base in it: one whose weights have changed since is refused by name."""
    lm = AutoModelForCausalLM.from_pretrained(tiny / "model")
    changed = tmp_path / "run"
    shutil.copytree(two_steps / "lora", changed, symlinks=True)
    with torch.no_grad():
        lm.model.norm.weight.add_(1)
    lm.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "base")
    text = (changed / "config.yaml").read_text().replace(str(tiny / "model"), str(tmp_path / "base"))
    (changed / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"model.path: .*, but .* when .* started"):
        exported(changed / "checkpoints" / "latest", tmp_path / "out")


def test_a_push_is_of_the_whole_folder(two_steps, tmp_path, monkeypatch):
    """The folder goes up as it is; a Hub that refuses is one line, and the folder stays."""
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, name, **more):
            calls.append((name, more))

        def upload_folder(self, *, repo_id, folder_path):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            if repo_id == "a/refused":
                raise RuntimeError("403: no rights\nat all")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    model = two_steps / "lora" / "model"
    exported(model, tmp_path / "out", "--push-to-hub", "a/b", "--private")
    assert calls[0] == "secret" and calls[1] == ("a/b", {"private": True, "exist_ok": True})
    assert calls[2] == ("a/b", sorted(path.name for path in (tmp_path / "out").iterdir()))
    with pytest.raises(UserError, match=r"--push-to-hub a/refused: .*403: no rights.*; .*other is written"):
        exported(model, tmp_path / "other", "--push-to-hub", "a/refused")
    assert (tmp_path / "other" / "README.md").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["loss=dpo"], "2305.18290"),
        (["loss=rpo_sum"], "2405.16436"),
        (["loss=dpo_norm"], "2411.15124"),
        (["loss=chi_po"], "2407.13399"),
        (["loss=sft"], "supervised"),
    ],
)
def test_a_card_names_the_paper_of_its_loss(given, words):
    """The source on the card is that of the loss that was trained; a user's own has none, and no error."""
    loss = settings(*given).loss
    assert words in export._source(loss)
    object.__setattr__(loss, "preference", "mine")
    assert export._source(loss) == "a loss that the published code does not have"
