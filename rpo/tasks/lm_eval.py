"""Benchmarks by lm-evaluation-harness, with what it lacks: errors by question and differences paired by question.

The harness says what a question looks like, when an answer ends and what is right; the model is loaded as for any other
task here, and generates by the task's settings alone: what its generation_config.json says is left out.

RUN_DIR/lm_eval.jsonl    what is done, a line per model and task: a start after it resumes from there
"""

import difflib
import gc
import hashlib
import importlib.metadata
import importlib.util
import logging
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from rpo import dist
from rpo.errors import UserError, require
from rpo.evals.context import Context, identity_of, tokenizer_of
from rpo.evals.gsm8k import gsm8k_flexible, gsm8k_right, gsm8k_same, gsm8k_strict
from rpo.evals.pairing import with_differences
from rpo.evals.results import Cells, Evaluation, Item, mean_of
from rpo.evals.settings import Eval, Limit, check_subjects, listed
from rpo.fields import Count, Field, group
from rpo.files import short_hash
from rpo.text import one_line

BOOTSTRAP = 1000  # draws, where a metric is not the mean over questions (F1, perplexity); it is the harness that draws
STANDARD = {"gsm8k": 5, "arc_challenge": 25, "arc_easy": 25}  # of the other tasks the harness's own number
NORMALISED = "gsm8k/exact_match,normalised"  # our own rule's score, beside those of the harness's
# Files below task.data, and what in the harness's task is another name there.
_ARC = {"doc_to_target": "gold", "doc_to_choice": "choices", "validation_split": None}
LOCAL: dict[str, tuple[str, dict]] = {
    "gsm8k": ("gsm8k/{}.jsonl", {}),
    "arc_challenge": ("arc/arc_challenge_{}.jsonl", _ARC),
    "arc_easy": ("arc/arc_easy_{}.jsonl", _ARC),
}


@group
class Settings:
    kind: Literal["lm_eval"]
    tasks: Annotated[list[str], Field(min_length=1, description="names of lm-evaluation-harness's tasks")]
    shots: Annotated[int, Field(ge=0, description="standard, or 0 or more")] | Literal["standard"]
    data: str | None
    limit: Limit
    chat_template: bool
    batch_size: Count


def check(cfg: Eval) -> None:
    check_subjects(cfg, "model.path", "baseline")
    names, paths = cfg.task.tasks, listed(cfg.model.path)
    require(len(set(names)) == len(names), f"task.tasks={names}: one is there twice; leave it out")
    require(cfg.baseline in (None, *paths), f"baseline={cfg.baseline}: expected one of model.path ({', '.join(paths)})")


def run(cfg: Eval, ctx: Context) -> Evaluation:
    """The harness's metrics of each model on each task, as "TASK/METRIC" ("TASK/METRIC,FILTER" where it has filters).

    With `baseline`, one of the models: "difference/..." of each other. Raises UserError: harness not installed, more than
    one rank, a task or file that is not there, a model that cannot be loaded.
    """
    from rpo.model import hf

    task, paths, trust = cfg.task, listed(cfg.model.path), cfg.model.trust_remote_code
    if dist.world_size() > 1:
        raise UserError(f"task=lm_eval on {dist.world_size()} ranks: it runs on one; start it without torchrun")
    for path in paths:
        hf.check(path, cfg.model.revision, trust_remote_code=trust)
    datasets = Path(cfg.cache_dir).expanduser() / "datasets"
    # What is refused leaves no folder; one that is there already may need nothing of the harness.
    specs = {} if (ctx.run_dir / "lm_eval.jsonl").exists() else _specs(task, datasets)
    store = ctx.store("lm_eval")
    keys = {(path, name): _key(cfg, ctx, path, name) for path in paths for name in task.tasks}
    missing = [each for each, key in keys.items() if store.get(key) is None]
    specs = specs or (_specs(task, datasets) if missing else {})
    for path in dict.fromkeys(path for path, _ in missing):
        model = _model(cfg, path, ctx.device)
        for name in [name for of, name in missing if of == path]:
            store.add(keys[path, name], _measured(model, name, specs[name], cfg), model=path, task=name)
        del model
        gc.collect()  # the next one needs its memory
    done = {each: store.get(key) for each, key in keys.items()}
    cells: dict[str, Cells] = {path: {} for path in paths}
    items = []
    for (path, _), measured in done.items():
        own = [Item(model=path, **each) for each in measured["items"]]
        cells[path] |= _cells(own, measured["totals"])
        items += own
    cells = with_differences(cells, items, cfg.baseline)
    details = {name: done[paths[0], name]["facts"] for name in task.tasks}
    details = {"data": task.data or "Hub", "chat_template": task.chat_template, "tasks": details}
    return Evaluation(cells, items, details=details)


# ---- tasks


def _key(cfg: Eval, ctx: Context, path: str, name: str) -> str:
    """A digest of what a model's results on a task depend on and config.yaml does not hold: the contents of what it names."""
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("task=lm_eval: lm_eval is not installed; pip install -e '.[eval]'") from None
    files = _files(name, cfg.task).values() if cfg.task.data and name in LOCAL else ()
    digests = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    tokenizer = cfg.model.tokenizer and identity_of(cfg.model.tokenizer, cfg.model.revision)
    known = [tokenizer, tokenizer_of(cfg, path).chat_template if cfg.task.chat_template else None]
    return short_hash(ctx.identity(path), name, [version, digests, known])


def _specs(task: Settings, cache: Path) -> dict[str, str | dict]:
    """What the harness is given for each task: its name, or its own settings with the data's place changed.

    Raises UserError for what it does not know or cannot read, before a model is loaded.
    """
    for package in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"task=lm_eval: {package} is not installed; pip install -e '.[eval]'")
    manager = _manager()
    specs: dict[str, str | dict] = {}
    for name in task.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            raise UserError(
                f"task.tasks: lm-evaluation-harness has no {name}; "
                + (f"did you mean {' or '.join(near)}?" if near else "give names that `lm-eval ls tasks` lists")
            )
        specs[name] = name if task.data is None else _local(manager, name, task, cache)
        try:
            loaded = manager.load([specs[name]])
        except Exception as error:  # the network, files, a task's own code: each its own type
            raise UserError(
                f"task.tasks: {name} cannot be loaded ({one_line(error)}); without a network give task.data, and see "
                "that its files are whole"
            ) from None
        if unsafe := [leaf for leaf, own in loaded["tasks"].items() if getattr(own, "UNSAFE_CODE", False)]:
            raise UserError(f"task.tasks: {unsafe[0]} runs what models write, unprotected; leave it out (task=mbpp)")
    return specs


@lru_cache
def _manager() -> Any:
    """The harness's list of tasks, which takes it seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _local(manager: Any, name: str, task: Settings, cache: Path) -> dict:
    """The harness's settings of the task, its data from files of `task.data`."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if name not in LOCAL:
        raise UserError(f"task.data={task.data}: holds {', '.join(LOCAL)}, not {name}; leave it out")
    splits = {} if task.shots else {"training_split": None, "fewshot_split": None, "num_fewshot": 0}
    options = {"data_files": _files(name, task), "cache_dir": str(cache)}
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": options}
    return load_yaml(manager.task_index[name].yaml_path) | LOCAL[name][1] | splits | data


def _files(name: str, task: Settings) -> dict[str, str]:
    """The files of a task below task.data by split. Raises UserError where one is missing."""
    pattern, files = LOCAL[name][0], {}
    for split in ("train", "test") if task.shots else ("test",):
        stem = Path(task.data).expanduser() / pattern.format(split)
        existing = [path for path in (stem, stem.with_name(stem.name + ".gz")) if path.is_file()]
        if not existing:
            raise UserError(f"task.data={task.data}: has no {pattern.format(split)}(.gz); task.tasks={name} reads it")
        files[split] = str(existing[0].resolve())
    return files


# ---- models


def _model(cfg: Eval, path: str, device: torch.device) -> Any:
    """The harness's own wrapper around the model at `path`. Raises UserError as `hf.load` does."""
    from lm_eval.models.huggingface import HFLM

    from rpo.data import tokenizer as data_tokenizer
    from rpo.data.chat import Chat, render
    from rpo.model import hf, shard
    from rpo.model.sampling import with_listed

    given, trust = cfg.model, cfg.model.trust_remote_code
    compute = shard.compute_dtype(given.dtype, device)
    wide = torch.promote_types(compute, torch.float32)
    tokenizer = tokenizer_of(cfg, path)
    if cfg.task.chat_template and tokenizer.chat_template is None:
        raise UserError(f"task.chat_template=true: the tokenizer of {path} has none; give data.chat_template")
    lm = hf.load(path, given.revision, wide, trust_remote_code=trust).to(device, compute)
    stop_ids = with_listed(data_tokenizer.stop_ids(tokenizer, Chat.of(cfg.data)), lm)
    # A generation_config.json may ask for a repetition penalty, which "greedy" does not turn off.
    lm.generation_config = type(lm.generation_config)(eos_token_id=stop_ids, pad_token_id=stop_ids[0])
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of what happens to a model that is given whole, as this one is
    try:
        model = HFLM(pretrained=lm, tokenizer=tokenizer, batch_size=cfg.task.batch_size, softmax_dtype=wide)
    finally:
        logger.setLevel(level)

    def rendered(history: list[dict], add_generation_prompt: bool = True) -> str:  # its own would print today's date
        return render(tokenizer, history, Chat.of(cfg.data), prompt=add_generation_prompt)

    model.apply_chat_template = rendered
    return model


def _measured(model: Any, name: str, spec: str | dict, cfg: Eval) -> dict:
    """{"items", "totals", "facts"} of one model on one task, by the harness."""
    import lm_eval

    task, loaded = cfg.task, _manager().load([spec])
    shots = STANDARD.get(name) if task.shots == "standard" else task.shots
    for leaf in loaded["tasks"].values():
        if shots is not None and leaf.get_config("num_fewshot") != 0:  # 0: zero-shot by definition
            leaf.set_config(key="num_fewshot", value=shots)
        leaf.set_fewshot_seed(seed=cfg.seed)
    seeds = np.random.SeedSequence([cfg.seed]).generate_state(3)
    state = random.getstate(), np.random.get_state()
    random.seed(int(seeds[0])), np.random.seed(seeds[1])
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(int(seeds[2]))
            # Not its simple_evaluate, which calls pip and other programs to describe the machine: 20 seconds a task.
            outcome = lm_eval.evaluate(
                lm=model,
                task_dict=loaded,
                limit=task.limit,
                apply_chat_template=task.chat_template,
                fewshot_as_multiturn=True,
                bootstrap_iters=BOOTSTRAP,
            )
    except ValueError as error:
        raise UserError(f"task.tasks: {name} cannot be run ({one_line(error)}); leave it out") from None
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
    items = [item for leaf, logged in outcome["samples"].items() for item in _items(leaf, logged)]
    totals = {
        f"{leaf}/{_metric(*key.split(','))}": [float(value), _number(result.get(key.replace(",", "_stderr,", 1)))]
        for leaf, result in outcome["results"].items()
        for key, value in result.items()
        if "," in key and "_stderr," not in key and _number(value) is not None
    }
    facts = {key: outcome[key] for key in ("n-shot", "versions")} | {"lm_eval": importlib.metadata.version("lm_eval")}
    if name == "gsm8k":
        facts["scored_otherwise"] = _scored_otherwise(items)
        for item in items:
            right = gsm8k_right(item["response"], item["details"]["target"])
            item["scores"] |= {NORMALISED: float(right)}
        if items:
            totals[NORMALISED] = [float(np.mean([item["scores"][NORMALISED] for item in items])), None]
    return {"items": items, "totals": totals, "facts": facts}


def _metric(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric},{filtered}"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, bool | int | float | np.number) else None


def _items(task: str, logged: Sequence[dict]) -> list[dict]:
    """The fields of an item per question but for its model, the scores of all of the harness's filters together."""
    items: dict[int, dict] = {}
    seen: dict[str, int] = {}
    for line in logged:
        if line["doc_id"] not in items:
            name = f"{task}/{line['doc_hash'][:16]}"
            seen[name] = seen.get(name, 0) + 1
            again = f"#{seen[name]}" if seen[name] > 1 else ""  # the same question
            items[line["doc_id"]] = {"id": name + again, "cluster": name, "scores": {}} | _shown(task, line)
        scores = {_metric(name, line["filter"]): _number(line[name]) for name in line["metrics"]}
        items[line["doc_id"]]["scores"] |= {f"{task}/{key}": v for key, v in scores.items() if v is not None}
    return list(items.values())


def _shown(task: str, line: dict) -> dict:
    """What was asked and said: the text generated, or the choice found likeliest and the log-prob in nats of each."""
    asked, replies, target = line["arguments"], [answer[0] for answer in line["resps"]], line["target"]
    if isinstance(replies[0], str):
        response, details = replies[0], {"task": task, "target": str(target)}
    else:
        choices = [request[1] for request in asked]
        logps = [float(answer[0] if isinstance(answer, Sequence) else answer) for answer in replies]
        right = choices[target] if isinstance(target, int) and 0 <= target < len(choices) else str(target)
        response, details = choices[int(np.argmax(logps))], {"task": task, "target": right, "logps": logps}
    return {"prompt": asked[0][0], "response": response, "details": details}


def _scored_otherwise(items: Sequence[dict]) -> list[str]:
    """The ids of answers to GSM8K that our scorer judges otherwise than the harness: none, or its rules have changed."""
    differ = []
    for item in items:
        target = gsm8k_strict(item["details"]["target"]) or item["details"]["target"]
        rules = {"strict-match": gsm8k_strict, "flexible-extract": gsm8k_flexible}
        ours = {name: gsm8k_same(rule(item["response"]), target) for name, rule in rules.items()}
        theirs = {name: item["scores"].get(f"gsm8k/exact_match,{name}") for name in rules}
        differ += [item["id"]] * (ours != theirs)
    return differ


# ---- cells


def _cells(items: Sequence[Item], totals: dict[str, list]) -> Cells:
    """A cell for each of the harness's totals: our own where that is the mean over questions, else as it says."""
    cells = {}
    for name, (value, se) in totals.items():
        cells[name] = mean_of(items, name)
        ours = cells[name]["value"]
        if ours is None or abs(ours - value) > 1e-9:  # perplexity, F1 of a whole set, a group
            cells[name] |= {"value": value, "se": se, "interval": None}
    return cells
