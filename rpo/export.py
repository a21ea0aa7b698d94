"""A Hugging Face folder of a checkpoint, of several averaged, or of one moved towards another model; with a model card.

    python -m rpo.export RUN/checkpoints/best OUT
    python -m rpo.export RUN/checkpoints/step_00000200 RUN/checkpoints/step_00000400 OUT      # the mean of their weights
    python -m rpo.export RUN/model OUT --merge --toward BASE --weight .3                      # .7 x RUN's + .3 x BASE's
    python -m rpo.export RUN/model OUT --dtype bfloat16 --results EVAL --push-to-hub NAME

A SOURCE is a checkpoint, a run's model/, or any other model or adapter. Means are of whole weights, in float64: that of two adapters'
factors is not the mean of their products, so an adapter is merged into its base before.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rpo import config, dist
from rpo.data.tokenizer import load_tokenizer
from rpo.errors import UserError, require
from rpo.evals import results
from rpo.model import fingerprint, hf, lora, saving
from rpo.model.policy import Policy
from rpo.runs import catalog, checkpoint
from rpo.runs import folder as run_folder
from rpo.runs.state import tensors_of
from rpo.text import first_line, table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rpo.runs.catalog import Run, RunRecord

PREFERENCE = {
    "sigmoid": "-log sigmoid(beta D)",
    "ipo": "(D - 1 / (2 beta))^2",
    "hinge": "max(0, 1 - beta D)",
    "cdpo": "-(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)",
    "robust": "((1 - e) (-log sigmoid(beta D)) - e (-log sigmoid(-beta D))) / (1 - 2 e)",
    "dpop": "-log sigmoid(beta (D - lam max(0, logp_ref(chosen) - logp(chosen))))",
    "chi_po": "-log sigmoid(clip(beta phi(z(chosen)) - beta phi(z(rejected)))), z = p / p_ref, phi(z) = z + log z",
    "simpo": "-log sigmoid(beta (logp(chosen) / its tokens - logp(rejected) / its tokens) - gamma)",
    "cpo": "-log sigmoid(beta (logp(chosen) - logp(rejected)))",
    "orpo": "-beta log sigmoid(log odds(chosen) - log odds(rejected)) of exp(logp / tokens)",
    "none": "",
}
PAPERS = {
    "sigmoid": "2305.18290 (DPO)",
    "per_token": "2411.15124",
    "ipo": "2310.12036",
    "hinge": "2305.10425",
    "robust": "2403.00409",
    "dpop": "2402.13228",
    "chi_po": "2407.13399",
    "simpo": "2405.14734",
    "cpo": "2401.08417",
    "orpo": "2403.07691",
}
SFT = {
    "none": "",
    "sum": "eta beta (-logp(chosen))",
    "avg": "eta (-logp(chosen) / its tokens)",
    "token": "eta (the step's chosen NLL / the step's chosen tokens)",
}


@dataclass
class Source:
    """A model on the CPU with its masters; `record` and `run` are of the run that made it, where one is known."""

    name: str
    lm: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    step: int | None = None
    record: "RunRecord | None" = None
    run: "Run | None" = None

    @property
    def has_adapter(self) -> bool:
        return bool(lora.named(self.lm))

    def merged(self) -> "Source":
        if self.has_adapter:
            lora.merge(self.lm)
        return self


def open_source(name: str, trust_remote_code: bool) -> Source:
    """The checkpoint or model at `name`. Raises UserError: nothing there, damaged, of a run whose model has changed since."""
    path = Path(name).expanduser()
    if not (path / "manifest.json").is_file():
        inner = path / "checkpoints"
        require(not inner.is_dir(), f"{name}: is a run's folder; give one of {inner}/*, or {path / 'model'}")
        hf.check(name, key="SOURCE", trust_remote_code=trust_remote_code)
        lm = hf.load(name, None, torch.float32, key="SOURCE", trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        record = _record(path.parent) if path.name in ("model", "model_merged") else None
        step = record and run_folder.read_status(record.folder).get("model_step", record.step)
        return Source(name, lm, tokenizer, step, record, record and catalog.typed(record))
    saved = checkpoint.read(path.resolve())  # latest and best are links
    record = _record(saved.run_dir)
    require(
        record is not None, f"{name}: {saved.run_dir} has no config.yaml, which says what model it is a checkpoint of"
    )
    run = catalog.typed(record)
    tokenizer = catalog.tokenizer_of(run, trust_remote_code=trust_remote_code)
    master = torch.float64 if run.model.dtype == "float64" else torch.float32
    if run.model.path is None:
        lm = hf.build(hf.config_for(record.settings["model"]["architecture"], tokenizer), 0, master)
    else:
        lm = hf.load(
            run.model.path,
            run.model.revision,
            master,
            key=f"{name}: model.path",
            trust_remote_code=trust_remote_code,
            saved=True,
            adapter=run.model.lora,
        )
        digest = fingerprint.weights_digest(lm, adapter=run.model.lora.r is None)
        saved.check_same({"model.path": digest})
    if lora.named(lm) and master == torch.float32:
        lm.base_digest = fingerprint.weights_digest(lm, adapter=False)
    saved.lay_over(tensors_of(Policy(lm, compile_tiles=False)))
    return Source(name, lm, tokenizer, saved.state["step"], record, run)


def _record(folder: Path) -> "RunRecord | None":
    folder = folder.resolve()
    if not (folder / "config.yaml").is_file():
        return None
    of_folder = [record for record in catalog.walk([str(folder)]).runs if record.folder == folder]
    return of_folder[0] if of_folder and of_folder[0].settings else None


# ---- weights


def _weights(lm: "PreTrainedModel") -> dict[str, Tensor]:
    """Parameters and persistent buffers; of a tied one the first name."""
    seen: dict[int, str] = {}
    state = lm.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if seen.setdefault(id(tensor), name) == name}


@torch.no_grad()
def combine(sources: Sequence[Source], shares: Sequence[float]) -> Source:
    """The first source with `sum of share x weights` for its weights, in float64. Raises UserError unless all have the same."""
    first, *others = [source.merged() for source in sources]
    ours, *others_weights = [_weights(source.lm) for source in (first, *others)]
    for other, theirs in zip(others, others_weights, strict=True):
        differing = ours.keys() ^ theirs.keys() or {name for name in ours if ours[name].shape != theirs[name].shape}
        require(not differing, f"{other.name}: has other weights than {first.name} ({min(differing, default='')})")
        same = first.tokenizer.get_vocab() == other.tokenizer.get_vocab()
        require(same, f"{other.name}: its tokenizer maps tokens to other ids than that of {first.name}")
    for name, tensor in ours.items():
        if tensor.is_floating_point():
            parts = [tensor, *(theirs[name] for theirs in others_weights)]
            tensor.copy_(sum(share * part.double() for share, part in zip(shares, parts, strict=True)))
    return first


# ---- the card


def card(source: Source, how: str, evaluations: Sequence[str], *, combined: bool) -> str:
    """README.md of the exported folder: what was trained on what, with which loss, and what came out, errors included.

    Raises UserError for an evaluation of other weights than these.
    """
    run, record = source.run, source.record
    lines = [
        "---",
        f"library_name: {'peft' if source.has_adapter else 'transformers'}",
        "tags: [rpo, preference-optimization]",
    ]
    if run and run.model.path and not Path(run.model.path).expanduser().exists():
        lines.append(f"base_model: {run.model.path}")
    lines += ["---", "", "# Model card", "", how]
    if run:
        loss, settings = run.loss, record.settings
        per_token = "(logp(chosen) - logp_ref(chosen)) - (logp(rejected) - logp_ref(rejected))"
        per_token += ", each divided by its response's tokens" * loss.normalize
        kind = "cdpo" if loss.preference == "sigmoid" and loss.label_smoothing else loss.preference
        form = PREFERENCE.get(kind, kind)  # one that a user added has its name alone
        terms = [form, SFT[loss.sft] if loss.eta else ""]
        data = settings["data"]["train"]
        parts = [data] if isinstance(data, str) else [part if isinstance(part, str) else part["path"] for part in data]
        pairs = source.step and source.step * settings["batch_size"]
        lines += [
            "",
            f"- Loss, mean over pairs: `{' + '.join(filter(None, terms))}`, {', '.join(_numbers(loss))}; "
            "log-probs are sums over a response" + ("" if not loss.has_reference else f", D = {per_token}"),
            f"- Source: {_source(loss)}",
            f"- Start{' and reference' * loss.has_reference}: "
            + ", ".join(map(_name, (run.model.path, run.reference[0])[: 1 + loss.has_reference])),
            f"- Data: {', '.join(map(_name, parts))}; {pairs or '?'} pairs in {source.step} steps of {settings['batch_size']}",
            f"- Learning rate {settings['optim']['lr']:g}, {settings['optim']['schedule']}; seed {settings['seed']}",
        ]
        reference = settings["reference"]
        if reference["kind"] == "moving":
            lines.append(
                f"- The reference moved: every {reference['every']} updates it became {reference['alpha']:g} policy + "
                f"{1 - reference['alpha']:g} itself (arXiv 2404.09656); rewards and shifts are against the start"
            )
        lines += ["- The base was in 4 bits (NF4) in training"] * settings["model"].get("load_in_4bit", False)
        cfg = settings["model"].get("lora") or {}
        lines += [f"- LoRA of rank {cfg['r']}, alpha {cfg['alpha'] or 2 * cfg['r']}"] if cfg.get("r") else []
        lines += [] if combined else _held_out(source)
    for evaluation in evaluations:
        require(
            not combined, "--results: no evaluation is of weights that are made here; evaluate OUT, and add it by hand"
        )
        lines += _evaluated(evaluation, source)
    return "\n".join(lines) + "\n"


def _name(path: str | None) -> str:
    """A Hub name as it is, of a local file or folder the last part: where it lay is nobody's business."""
    return "random weights" if path is None else Path(path).name if Path(path).expanduser().exists() else path


def _numbers(loss: config.Loss) -> list[str]:
    """What stands for the letters of the formula."""
    has_e = loss.preference == "robust" or loss.label_smoothing
    values = {"beta": loss.beta, "eta": loss.eta, "e": loss.label_smoothing if has_e else None}
    values |= {"lam": loss.lam, "clip": loss.clip, "gamma": loss.gamma}
    return [f"{name} {value:g}" for name, value in values.items() if value is not None]


def _source(loss: config.Loss) -> str:
    """The paper of the preference term, and RPO's where DPO's stands beside an SFT term."""
    if loss.preference == "none":
        return "supervised fine-tuning"
    if loss.preference == "sigmoid" and loss.eta:
        return "Regularized Preference Optimization (RPO), arXiv 2405.16436"
    paper = PAPERS.get("per_token" if loss.preference == "sigmoid" and loss.normalize else loss.preference)
    return f"arXiv {paper}" if paper else "a loss that the published code does not have"


def _held_out(source: Source) -> list[str]:
    """The run's own evaluation at that step; the accuracy with its binomial standard error."""
    point = next((point for point in source.record.curve if point["step"] == source.step), None)
    if point is None:
        return []
    rows = [("held-out metric", "value")]
    for name in ("rewards/accuracies", "rewards/margins", "shift/chosen", "shift/rejected", "nll/chosen"):
        if name in point:
            error = ""
            if name == "rewards/accuracies" and source.record.pairs:
                error = f" +- {(point[name] * (1 - point[name]) / source.record.pairs) ** 0.5:.2g}"
            rows.append((name, f"{point[name]:.4g}{error}"))
    of = f" of {source.record.pairs} pairs" if source.record.pairs else ""
    return ["", f"The run's own evaluation{of} at step {source.step}:", "", "```", table(rows), "```"]


def _evaluated(folder: str, source: Source) -> list[str]:
    found = results.read(folder)
    own = [Path(source.name).expanduser()]
    if (
        source.record
        and run_folder.read_status(source.record.folder).get("model_step", source.record.step) == source.step
    ):
        own.append(source.record.folder / "model")  # the same weights as the checkpoint's
    own = [path.resolve() for path in own]
    cells = next((cells for model, cells in found.models.items() if Path(model).expanduser().resolve() in own), None)
    evaluated = ", ".join(found.models)
    require(
        cells is not None, f"--results {folder}: is of {evaluated}, not of {source.name}; give an evaluation of that"
    )
    weights = [file for path in own for file in path.glob("*.safetensors")]
    older = (found.folder / "results.json").stat().st_mtime < max(file.stat().st_mtime for file in weights)
    require(not older, f"--results {folder}: is older than the weights of {source.name}; evaluate them again")
    rows = [("metric", "value", "n")]
    for name, cell in cells.items():
        if cell.get("value") is not None:
            error = f" +- {cell['se']:.2g}" if cell.get("se") else ""
            rows.append((name, f"{cell['value']:.4g}{error}", str(cell.get("n", ""))))
    return ["", f"Evaluated by task={found.task}, with standard errors:", "", "```", table(rows), "```"]


# ---- the command


def export(args: argparse.Namespace) -> str:
    """Writes the folder, and pushes it where asked. Returns what was done in one line. Raises UserError."""
    out = Path(args.out).expanduser()
    require(not out.exists(), f"{out}: exists already; give a new folder")
    require((args.weight is None) == (args.toward is None), "--toward and --weight: give both, the model and its share")
    require(0 <= (args.weight or 0) <= 1, f"--weight {args.weight}: expected the share of --toward, 0 to 1")
    token = _check_hub(args.push_to_hub) if args.push_to_hub else None
    trust = args.trust_remote_code
    sources = [open_source(name, trust) for name in args.sources]
    shares = [1 / len(sources)] * len(sources)
    if args.toward is not None:
        sources.append(open_source(args.toward, trust))
        shares = [share * (1 - args.weight) for share in shares] + [args.weight]
    several = len(sources) > 1
    terms = [f"{share:.3g} x {_label(source)}" for share, source in zip(shares, sources, strict=True)]
    how = f"Weights: {' + '.join(terms)}." if several else f"Weights: {_label(sources[0])}."
    model = combine(sources, shares) if several else sources[0]
    if args.merge:
        model = model.merged()
    require(
        not model.has_adapter or args.dtype == "auto",
        f"--dtype {args.dtype} with an adapter, whose few weights stay float32; give --merge",
    )
    text = card(model, how, args.results, combined=several)
    if model.has_adapter:
        lora.write(model.lm, dict(lora.named(model.lm)), model.tokenizer, out, text)
    else:
        saving.write(model.lm, model.lm, model.tokenizer, out, args.dtype, "repeat the command", card=text)
    if args.push_to_hub:
        _push(out, args.push_to_hub, token, private=args.private)
    return f"{out}: {how}"


def _label(source: Source) -> str:
    if source.run is None:
        return _name(source.name)
    return f"{source.record.folder.name} at step {source.step}"


def _check_hub(name: str) -> str:
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {name}: {first_line(error)}") from None
    token = get_token()
    require(token is not None, f"--push-to-hub {name}: no token; run hf auth login, or set HF_TOKEN")
    return token


def _push(folder: Path, name: str, token: str, *, private: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # of the network, of rights, of the Hub: each its own type
        raise UserError(f"--push-to-hub {name}: {first_line(error)}; {folder} is written") from None


def parser() -> argparse.ArgumentParser:
    lines = __doc__.splitlines()
    described = argparse.ArgumentParser(
        "python -m rpo.export",
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawTextHelpFormatter,
    )
    described.add_argument("sources", nargs="+", metavar="SOURCE", help="checkpoints or models; of several the mean")
    described.add_argument("out", metavar="OUT", help="the folder to write; it must not exist")
    described.add_argument("--merge", action="store_true", help="add an adapter to its base")
    described.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: as the start's files"
    )
    described.add_argument("--toward", metavar="MODEL", help="a model to move towards, as the reference")
    described.add_argument(
        "--weight", type=float, help="the share of --toward: 0 leaves all as it is, 1 gives that model"
    )
    described.add_argument(
        "--results", action="append", default=[], metavar="EVAL", help="eval.py's folder, for the card"
    )
    described.add_argument("--push-to-hub", metavar="NAME", help="upload the folder under this name")
    described.add_argument("--private", action="store_true", help="where the Hub has no such repository yet")
    described.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    return described


def cli() -> None:
    """`rpo-export`, and this module."""
    try:
        dist.init()
        print(export(parser().parse_args()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    cli()
