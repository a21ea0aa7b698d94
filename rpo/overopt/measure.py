"""Runs along their checkpoints: gold reward, proxy, KL and what else moves, where it peaks and how far it falls.

Every checkpoint answers the same prompts from the same seeds at temperature 1, where the KL estimators hold, and scores
the same held-out pairs. Step 0 is the weights that the run started from, measured once for all runs that share them.

Letters: S answers, G prompts, K answers to one prompt.
"""

import gc
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rpo import dist, files
from rpo.config import NO_ADAPTER, EvalData
from rpo.data import dataset
from rpo.data import tokenizer as data_tokenizer
from rpo.data.batch import longest
from rpo.data.chat import Chat
from rpo.data.dataset import Rows
from rpo.data.formats import Messages
from rpo.errors import UserError
from rpo.evals import preference
from rpo.evals.context import Context, check_room, print_main
from rpo.evals.results import Item
from rpo.evals.settings import Eval
from rpo.files import short_hash
from rpo.model import divergence, hf, shard
from rpo.model.policy import Loaded, Policy, load_policy
from rpo.model.sampling import Completion, Sampling, sample
from rpo.overopt import best_of_n, rewards
from rpo.runs import catalog, checkpoint
from rpo.runs.catalog import Run
from rpo.runs.state import tensors_of
from rpo.stats import clustered_mean
from rpo.synthetic.task import SAMPLING, weights_of
from rpo.text import counted, redacted

MAX_NEW_TOKENS = 256  # where task.max_new_tokens=auto and the data is not the embedded task's


@dataclass(frozen=True)
class Questions:
    """What the runs of one start, reference and data are asked, read before any model is loaded."""

    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]  # distinct
    texts: list[str | Messages]  # the same as their rows have them
    places: list[str]
    rows: Rows | None  # held-out pairs
    gold: rewards.Gold | None
    sampling: Sampling
    stop_ids: list[int]
    positions: int  # that the models have
    digest: str  # of prompts, pairs and the source of gold

    def repeated(self, count: int) -> tuple[list[list[int]], list[str | Messages], np.ndarray]:
        """Each prompt `count` times in a row, as ids and as text, and the number of the prompt of each answer."""
        prompt_S = np.repeat(np.arange(len(self.prompts)), count)
        return [self.prompts[i] for i in prompt_S], [self.texts[i] for i in prompt_S], prompt_S


@dataclass(frozen=True)
class Measured:
    """One policy's answers and pairs, free of beta."""

    answers: list[Completion]
    texts: list[str]
    table: dict[str, np.ndarray]  # per answer: those of `divergence.measure`, gold, tokens, ended
    logps: dict[str, np.ndarray] | None  # of the held-out pairs


# ---- before a model is loaded


def questions(run: Run, cfg: Eval, source: rewards.Gold | None) -> Questions:
    """What `run` is asked; `source` is the gold that does not depend on the run, if any. Raises UserError."""
    task, trust = cfg.task, cfg.model.trust_remote_code
    configs = {f"{run.folder}: model.path": hf.check(*run.start, trust_remote_code=trust)}
    if run.reference != run.start:
        key = f"{run.folder}: reference.path"
        configs[key] = hf.check(*run.reference, key="reference.path", trust_remote_code=trust)
    tokenizer = catalog.tokenizer_of(run, trust_remote_code=trust)
    spec = cfg.data.eval or run.data.eval
    if spec is None:
        raise UserError(f"{run.folder}: was trained with data.eval=null, so there are no prompts; give data.eval=FILE")
    read_as = replace(run.data, revision=cfg.data.revision) if cfg.data.eval else run.data
    every, texts, places, _ = dataset.load_prompts(spec, read_as, tokenizer)
    first = {tuple(prompt): i for i, prompt in reversed(list(enumerate(every)))}  # a file of pairs repeats its prompts
    kept = sorted(first.values())[: task.limit]
    prompts = [every[i] for i in kept]
    longest_prompt, positions = max(map(len, prompts)), hf.positions_of(configs)
    weights = weights_of(run.settings["data"].get("train"))
    max_new_tokens = task.max_new_tokens
    if max_new_tokens == "auto":
        max_new_tokens = SAMPLING.max_new_tokens if weights else MAX_NEW_TOKENS
    check_room(positions, longest_prompt, max_new_tokens, f" of {run.folder}")
    rows = _pairs(run, spec, read_as, cfg, tokenizer)
    longest_row, largest_id = (longest(rows), int(rows.ids.max())) if rows else (0, 0)
    largest_id = max(largest_id, *map(max, prompts))
    hf.check_fit(configs, max(longest_prompt, longest_row), largest_id, distributions=True)
    parts = [json.dumps([prompts, task.gold, str(weights)]).encode(), rewards.identity(task.gold, source)]
    return Questions(
        tokenizer=tokenizer,
        prompts=prompts,
        texts=[texts[i] for i in kept],
        places=[places[i] for i in kept],
        rows=rows,
        gold=rewards.embedded(tokenizer, weights) if weights and task.gold == "auto" else source,
        sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=max_new_tokens),
        stop_ids=data_tokenizer.stop_ids(tokenizer, Chat.of(run.data)),
        positions=positions,
        digest=files.digest(*parts, *([rows.ids, rows.prompt, rows.chosen] if rows else [])),
    )


def _pairs(
    run: Run, spec: str | list[str], read_as: EvalData, cfg: Eval, tokenizer: PreTrainedTokenizerBase
) -> Rows | None:
    """The held-out pairs; None where none are asked for, or where a run that was trained on answers alone has none."""
    if cfg.task.pairs == 0:
        return None
    try:
        with dist.main_first():  # rank 0 tokenises into the cache, the others read it
            rows, _ = dataset.load(spec, read_as, tokenizer, pairs=True, cache_dir=Path(cfg.cache_dir).expanduser())
    except UserError as error:
        if not run.loss.has_pairs:
            return None
        raise UserError(f"{error}; task.pairs=0 leaves held-out pairs out") from None
    return rows.head(cfg.task.pairs or len(rows))


# ---- one policy


def measure(
    policy: Policy,
    reference: Policy,
    asked: Questions,
    cfg: Eval,
    device: torch.device,
    logps: dict[str, np.ndarray] | None = None,
) -> Measured:
    """`task.samples` answers per prompt with their columns, and the pairs' log-probs unless `logps` has them."""
    budget = cfg.tokens_per_microbatch
    prompts, drawn = _sampled(policy, asked, cfg, cfg.task.samples, [cfg.seed], device)
    table = drawn.table | divergence.measure(policy, reference, prompts, drawn.answers, device, budget=budget)
    table["tokens"] = np.array([len(answer.ids) for answer in drawn.answers], dtype=np.float64)
    table["ended"] = np.array([answer.ended for answer in drawn.answers], dtype=np.float64)
    if asked.rows is not None and logps is None:
        logps = preference.score(lambda: policy, asked.rows, device, tokens_per_microbatch=budget)
    return replace(drawn, table=table, logps=logps)


def _sampled(
    policy: Policy, asked: Questions, cfg: Eval, count: int, seed: list[int], device: torch.device
) -> tuple[list[list[int]], Measured]:
    """(prompts, each `count` times; an answer to each, with gold)."""
    prompts, conversations, _ = asked.repeated(count)
    size, stop_ids = cfg.task.batch_size, asked.stop_ids
    answers = sample(policy, prompts, asked.sampling, stop_ids, device=device, seed=seed, batch_size=size, reshard=True)
    texts = asked.tokenizer.batch_decode([answer.text_ids for answer in answers])
    table = {} if asked.gold is None else {"gold": asked.gold(conversations, answers, texts)}
    return prompts, Measured(answers, texts, table, logps=None)


def point_of(
    measured: Measured,
    asked: Questions,
    cfg: Eval,
    *,
    beta: float | None,
    noise_floor: float,
    ref_logps: dict[str, np.ndarray] | None,
) -> dict[str, dict]:
    """{"metrics", "clusters"} of one policy; a metric is a value, its standard error clustered by prompt, and n.

        kl            Rao-Blackwellised KL(policy || reference), nats per answer; kl/k1: by log pi/ref (`divergence`)
        proxy         beta E_pi[log pi - log ref], the mean implicit reward, by k1: what training raises, and beta KL
        entropy       nats per token; entropy/top10, mass/top10: of the ten likeliest tokens (arXiv 2410.11677)
        distinct/n    different n-grams as a share of all, among the answers to one prompt; mean over prompts

    and of held-out pairs what `preference.statistics` gives of their log-probs and the reference's, `ref_logps`.
    `clusters` has gold and kl by prompt.
    """
    table, (*_, prompt_S) = measured.table, asked.repeated(cfg.task.samples)
    shift_S = table["logp"] - table["ref_logp"]
    columns = {"gold": table.get("gold"), "proxy": None if beta is None else beta * shift_S, "kl": table["kl"]}
    columns |= {"kl/k1": shift_S, "samples/length": table["tokens"], "samples/ended": table["ended"]}
    metrics = {name: clustered_mean(column, prompt_S) for name, column in columns.items() if column is not None}
    for name, column in {"entropy": "entropy", "entropy/top10": "top_entropy", "mass/top10": "top_mass"}.items():
        metrics[name] = clustered_mean(table[column], prompt_S, table["tokens"])
    by_prompt = np.arange(len(measured.answers)).reshape(len(asked.prompts), -1)
    for n in (1, 2, 3):
        shares = [best_of_n.distinct([measured.answers[i].text_ids for i in members], n) for members in by_prompt]
        known = [share for share in shares if share is not None]
        metrics[f"distinct/{n}"] = clustered_mean(known, np.arange(len(known)))
    if measured.logps is not None:
        logps = measured.logps | {f"ref_{side}": values for side, values in ref_logps.items()}
        metrics |= preference.statistics(logps, asked.rows, beta=beta, noise_floor=noise_floor, seed=cfg.seed)
    sizes, kept = [cfg.task.samples] * len(asked.prompts), [name for name in ("gold", "kl") if name in table]
    clusters = {name: {"mean": table[name][by_prompt].mean(1).tolist(), "size": sizes} for name in kept}
    return {"metrics": metrics, "clusters": clusters}


def items_of(measured: Measured, asked: Questions, cfg: Eval, run: str, step: int) -> list[Item]:
    """The first `task.written` answers to each prompt."""
    rendered, (*_, prompt_S) = asked.tokenizer.batch_decode(asked.prompts), asked.repeated(cfg.task.samples)
    scores = [name for name in ("gold", "kl") if name in measured.table]
    return [
        Item(
            model=run,
            id=f"{redacted(asked.places[prompt])}#{i % cfg.task.samples}@{step}",
            cluster=rendered[prompt],
            prompt=rendered[prompt],
            response=measured.texts[i],
            scores={name: float(measured.table[name][i]) for name in scores},
            details={"step": step, "tokens": len(measured.answers[i].ids), "ended": measured.answers[i].ended},
        )
        for i, prompt in enumerate(prompt_S)
        if i % cfg.task.samples < cfg.task.written
    ]


# ---- what runs share


@dataclass(frozen=True)
class Baseline:
    """What the reference, and the weights that the runs started from, make of the questions."""

    asked: Questions
    ref_logps: dict[str, np.ndarray] | None  # the reference's, of the held-out pairs
    noise_floor: float
    first: Measured
    drawn: Measured | None  # the reference's answers that best-of-n chooses from, with gold and ref_logp


def baseline(policy: Loaded, reference: Loaded, asked: Questions, cfg: Eval, device: torch.device) -> Baseline:
    """`policy` still has the weights that the runs started from; where these are the reference's it is passed as both."""
    budget, rows, floor, logps = cfg.tokens_per_microbatch, asked.rows, 0.0, None
    if rows is not None:
        logps = preference.score(lambda: reference.policy, rows, device, tokens_per_microbatch=budget)
        floor = preference.noise_floor(reference, rows, device, positions=asked.positions, tokens_per_microbatch=budget)
    first = measure(policy.policy, reference.policy, asked, cfg, device, logps if policy is reference else None)
    drawn = None
    if cfg.task.bon and asked.gold is not None:
        count = cfg.task.bon_samples or max(cfg.task.bon)
        prompts, drawn = _sampled(reference.policy, asked, cfg, count, [cfg.seed, 1], device)
        drawn.table["ref_logp"] = divergence.logps(reference.policy, prompts, drawn.answers, device, budget=budget)
    return Baseline(asked, logps, floor, first, drawn)


# ---- all runs


def ask(runs: Sequence[Run], cfg: Eval, device: torch.device) -> dict[str, Questions]:
    """What the runs are asked, by `data_key`. Raises UserError where data, models and lengths do not fit; of models only
    one of rewards is loaded."""
    source = None
    if cfg.task.gold != "auto":
        source = rewards.source(
            cfg.task.gold,
            device=device,
            dtype=shard.compute_dtype(cfg.model.dtype, device),
            chat=Chat.of(cfg.data),
            trust_remote_code=cfg.model.trust_remote_code,
        )
    asked: dict[str, Questions] = {}
    for run in runs:
        if data_key(run) not in asked:
            asked[data_key(run)] = questions(run, cfg, source)
    if cfg.task.gold == "auto" and any(each.gold is None for each in asked.values()):
        print_main(
            "task.gold=auto: no gold for runs on other data than the embedded task's; give task.gold=DIR (a reward model) "
            "or task.gold=FILE.py:FUNCTION, or none"
        )
    return asked


def data_key(run: Run) -> str:
    """Equal for runs with one start, reference and data."""
    data = [asdict(run.data), run.settings["data"].get("train")]
    return json.dumps([run.start, run.reference, run.model.tokenizer, *data])


@dataclass(frozen=True)
class Point:
    """A measurement of a run: at a checkpoint (None: the weights that it started from), or best-of-n by the last one."""

    key: str  # in the store: a digest of the run, the measurement and all that it is made of
    about: dict[str, Any]  # run, and step or bon
    checkpoint: Path | None


def points_of(run: Run, asked: Questions, cfg: Eval) -> list[Point]:
    """Those of the run's curve, then its best-of-n."""

    def point(folder: Path | None, **about: Any) -> Point:
        file = folder and folder / "manifest.json"
        manifest = file.read_bytes() if file and file.is_file() else b""
        about = {"run": str(run.folder), **about}
        return Point(short_hash(json.dumps(about), manifest, asked.digest), about, folder)

    points = [point(folder, step=step) for step, folder in {0: None, **run.checkpoints}.items()]
    if cfg.task.bon and asked.gold is not None and run.beta is not None:
        last = max(run.checkpoints)
        points.append(point(run.checkpoints[last], bon=last))
    return points


def measure_all(runs: Sequence[Run], asked: dict[str, Questions], ctx: Context) -> tuple[list[dict], list[Item]]:
    """(for each run {"run", "settings", "prompts" (digests), "max_new_tokens", "curve", "bon"}; items), measured now or by
    an earlier start.

    Raises UserError where weights or a checkpoint are not what the run had; what was measured until then is kept.
    """
    store = ctx.store("points")
    todo = {run.folder: points_of(run, asked[data_key(run)], ctx.cfg) for run in runs}
    every = [point for points in todo.values() for point in points]
    done = sum(store.get(point.key) is not None for point in every)
    print_main(_plan(runs, asked, ctx.cfg, done, len(every)))
    families: dict[tuple, list[Run]] = {}
    for run in runs:
        families.setdefault(
            (run.start, run.reference, run.model.dtype, str(run.model.lora), run.model.load_in_4bit), []
        ).append(run)
    values: dict[Path, list[dict]] = {}
    for family in families.values():  # models stay for all runs that share them, and then make room
        values |= _family(family, todo, asked, ctx)
        gc.collect()  # a sharded model is full of cycles
    results, items = [], []
    for run in runs:
        own, questions = values[run.folder], asked[data_key(run)]
        about = {"run": str(run.folder), "settings": run.settings}
        about["prompts"] = [files.digest(json.dumps(prompt).encode()) for prompt in questions.prompts]
        about["max_new_tokens"] = questions.sampling.max_new_tokens
        about["curve"] = [{k: value[k] for k in ("step", "metrics", "clusters")} for value in own if "step" in value]
        about["bon"] = next((value["best_of_n"] for value in own if "best_of_n" in value), None)
        results.append(about)
        items += [Item(**item | {"model": about["run"]}) for value in own for item in value.get("items", [])]
    return results, items


def _family(
    family: Sequence[Run], todo: dict[Path, list[Point]], asked: dict[str, Questions], ctx: Context
) -> Iterator[tuple[Path, list[dict]]]:
    """(folder, values of its points) of runs with one start and reference; nothing is loaded where all of it is known."""
    store, cfg, device = ctx.store("points"), ctx.cfg, ctx.device
    missing = [run for run in family if any(store.get(point.key) is None for point in todo[run.folder])]
    baselines: dict[str, Baseline] = {}
    if missing:
        reference, policy = (
            load_policy(
                *source,
                device=device,
                dtype=family[0].model.dtype,
                compute=cfg.model.dtype,
                key=key,
                trust_remote_code=cfg.model.trust_remote_code,
                adapter=adapter,
                load_in_4bit=family[0].model.load_in_4bit,
            )
            for key, source, adapter in (
                ("reference.path", family[0].reference, NO_ADAPTER),
                ("model.path", family[0].start, family[0].model.lora),
            )
        )
        start = reference if family[0].start == family[0].reference else policy
        for key in dict.fromkeys(map(data_key, missing)):  # before a checkpoint is laid over the policy
            baselines[key] = baseline(start, reference, asked[key], cfg, device)
    for run in family:
        start_time, values, laid = time.perf_counter(), [], None
        for point in todo[run.folder]:
            value = store.get(point.key)
            if value is None:
                base = baselines[data_key(run)]
                if point.checkpoint not in (None, laid):
                    facts = {"model.path": policy.digest, "reference.path": reference.digest}
                    facts["model.tokenizer"] = catalog.identity_of(base.asked.tokenizer)
                    lay_over(policy.policy, point.checkpoint, facts)
                    laid = point.checkpoint
                value = _value(point, run, policy.policy, reference.policy, base, cfg, device)
                store.add(point.key, value, **point.about)
            values.append(value)
        print_main(_line(run, values, time.perf_counter() - start_time))
        yield run.folder, values


def _value(
    point: Point, run: Run, policy: Policy, reference: Policy, base: Baseline, cfg: Eval, device: torch.device
) -> dict:
    """What is measured of the policy, which has the point's weights: {"step", "metrics", "clusters", "items"} or
    {"best_of_n"}."""
    if "bon" in point.about:  # gold of the best of the reference's answers by the policy's implicit reward
        drawn, num_prompts = base.drawn, len(base.asked.prompts)
        prompts, *_ = base.asked.repeated(len(drawn.answers) // num_prompts)
        logp = divergence.logps(policy, prompts, drawn.answers, device, budget=cfg.tokens_per_microbatch)
        proxy_S = run.beta * (logp - drawn.table["ref_logp"])
        proxy_GK, gold_GK = (x.reshape(num_prompts, -1) for x in (proxy_S, drawn.table["gold"]))
        return {"best_of_n": best_of_n.best_of_n(list(proxy_GK), list(gold_GK), cfg.task.bon)}
    step, measured = point.about["step"], base.first
    if point.checkpoint is not None:
        measured = measure(policy, reference, base.asked, cfg, device)
    value = point_of(measured, base.asked, cfg, beta=run.beta, noise_floor=base.noise_floor, ref_logps=base.ref_logps)
    items = items_of(measured, base.asked, cfg, redacted(str(run.folder)), step)
    return {"step": step, **value, "items": [asdict(item) for item in items]}


def lay_over(policy: Policy, folder: Path, facts: dict[str, str | None]) -> None:
    """Gives `policy` the weights of the checkpoint in `folder`.

    `facts` are digests, as they are now, of what the checkpoint's run started with (model.path, reference.path,
    model.tokenizer). Raises UserError: a damaged checkpoint, one of another model, or a fact that differs.
    """
    saved = checkpoint.read(folder)
    for key, now in facts.items():
        then = saved.state["facts"].get(key)
        if then is not None and then != now:
            raise UserError(f"{folder}: its run started with {key} of {then[:24]}, now it is {now[:24]}; restore it")
    shard.reshard(policy)
    saved.lay_over(tensors_of(policy))


def _plan(runs: Sequence[Run], asked: dict[str, Questions], cfg: Eval, done: int, every: int) -> str:
    """What is going to be measured, and how much of it is known already."""
    sizes = dict.fromkeys(
        f"{len(of.prompts)} prompts x {cfg.task.samples} answers and {len(of.rows) if of.rows else 0} pairs"
        for of in asked.values()
    )
    return f"{counted(len(runs), 'run')}, at each checkpoint {' or '.join(sizes)}; {done} of {every} points are done"


def _line(run: Run, values: Sequence[dict], seconds: float) -> str:
    curve = [value["metrics"] for value in values if "step" in value]
    parts = [f"{run.folder}: {len(curve) - 1} checkpoints"]
    for name in ("gold", "kl", "shift/chosen"):
        ends = [metrics[name]["value"] for metrics in (curve[0], curve[-1]) if name in metrics]
        parts += [f"{name} {ends[0]:.3g} -> {ends[1]:.3g}"] if len(ends) == 2 else []
    return ", ".join(parts) + f" ({seconds:.1f} s)"
