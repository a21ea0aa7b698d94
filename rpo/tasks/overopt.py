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

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rpo import dist, files
from rpo.config import EvalData
from rpo.data import dataset, schedule
from rpo.data import tokenizer as data_tokenizer
from rpo.data.batch import longest
from rpo.data.dataset import Rows
from rpo.data.formats import Messages
from rpo.errors import UserError
from rpo.evals.points import Points
from rpo.evals.settings import Eval
from rpo.model import divergence, hf, shard
from rpo.model import probe as model_probe
from rpo.model.policy import Policy
from rpo.model.sampling import Completion, Sampling, sample
from rpo.overopt import best_of_n as overopt_best_of_n
from rpo.overopt import rewards
from rpo.runs import catalog
from rpo.runs.catalog import Run
from rpo.stats import clustered_mean
from rpo.synthetic.task import SAMPLING, weights_of
from rpo.tasks import pairs
from rpo.text import redacted

MAX_NEW_TOKENS = 256  # where task.max_new_tokens=auto and the data is not the embedded task's
PROBED = 8  # pairs that the noise floor is measured on


@dataclass(frozen=True)
class Questions:
    """What the runs of one start, reference and data are asked, read before any model is loaded."""

    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]  # distinct
    said: list[str | Messages]  # the same as their rows say them
    places: list[str]
    rows: Rows | None  # held-out pairs
    gold: rewards.Gold | None
    sampling: Sampling
    stop_ids: list[int]
    positions: int  # that the models have
    digest: str  # of prompts, pairs and the source of gold

    def repeated(self, count: int) -> tuple[list[list[int]], list[str | Messages], np.ndarray]:
        """Each prompt `count` times in a row, as ids and as said, and the number of the prompt of each answer."""
        prompt_S = np.repeat(np.arange(len(self.prompts)), count)
        return [self.prompts[i] for i in prompt_S], [self.said[i] for i in prompt_S], prompt_S


@dataclass(frozen=True)
class Measured:
    """One policy's answers and pairs, free of beta."""

    answers: list[Completion]
    texts: list[str]
    table: dict[str, np.ndarray]  # per answer: drift.COLUMNS, gold, tokens, ended
    logps: dict[str, np.ndarray] | None  # of the held-out pairs


# ---- before a model is loaded


def questions(run: Run, cfg: Eval, source: rewards.Gold | None) -> Questions:
    """What `run` is asked; `source` is the gold that does not depend on the run, if any. Raises UserError."""
    task, trust = cfg.task, {"trust_remote_code": cfg.model.trust_remote_code}
    configs = {f"{run.folder}: model.path": hf.check(*run.start, **trust)}
    if run.reference != run.start:
        configs[f"{run.folder}: reference.path"] = hf.check(*run.reference, key="reference.path", **trust)
    tokenizer = catalog.tokenizer_of(run, **trust)
    spec = cfg.data.eval or run.data.eval
    if spec is None:
        raise UserError(f"{run.folder}: was trained with data.eval=null, so there are no prompts; give data.eval=FILE")
    read_as = replace(run.data, revision=cfg.data.revision) if cfg.data.eval else run.data
    found, said, places, _ = dataset.load_prompts(spec, read_as, tokenizer)
    first = {tuple(prompt): i for i, prompt in reversed(list(enumerate(found)))}  # a file of pairs repeats its prompts
    kept = sorted(first.values())[: task.limit]
    prompts = [found[i] for i in kept]
    weights = weights_of(run.settings["data"].get("train"))
    new, positions = task.max_new_tokens, hf.positions_of(configs)
    if new == "auto":
        new = SAMPLING.max_new_tokens if weights else MAX_NEW_TOKENS
    if new > (room := positions - max(map(len, prompts))):
        raise UserError(
            f"task.max_new_tokens={new}: beside a prompt of {max(map(len, prompts))} tokens the model of {run.folder} has "
            f"positions for {room}; set task.max_new_tokens={room} or less"
        )
    rows = _pairs(run, spec, read_as, cfg, tokenizer)
    hf.check_fit(configs, tokenizer, max([*map(len, prompts), *([longest(rows)] if rows else [])]))
    parts = [json.dumps([prompts, task.gold, str(weights)]).encode(), rewards.identity(task.gold, source)]
    return Questions(
        tokenizer,
        prompts,
        [said[i] for i in kept],
        [places[i] for i in kept],
        rows,
        rewards.embedded(tokenizer, weights) if weights and task.gold == "auto" else source,
        Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=new),
        data_tokenizer.stop_ids(tokenizer, run.data.template_date),
        positions,
        files.digest(*parts, *([rows.ids, rows.prompt, rows.chosen] if rows else [])),
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
        if run.beta is None:
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
    prompts, said, _ = asked.repeated(cfg.task.samples)
    made, texts = _answer(policy, prompts, asked, cfg, [cfg.seed], device)
    table = divergence.measure(policy, reference, prompts, made, device, budget=budget)
    if asked.gold is not None:
        table["gold"] = asked.gold(said, made, texts)
    table["tokens"] = np.array([len(answer.ids) for answer in made], dtype=np.float64)
    table["ended"] = np.array([answer.ended for answer in made], dtype=np.float64)
    if asked.rows is not None and logps is None:
        logps = pairs.score_rows(policy, None, asked.rows, device, tokens_per_microbatch=budget)
    return Measured(made, texts, table, logps)


def _answer(
    policy: Policy, prompts: list[list[int]], asked: Questions, cfg: Eval, seed: list[int], device: torch.device
) -> tuple[list[Completion], list[str]]:
    how = {"device": device, "seed": seed, "batch_size": cfg.task.batch_size, "reshard": True}
    made = sample(policy, prompts, asked.sampling, asked.stop_ids, **how)
    return made, asked.tokenizer.batch_decode([answer.text_ids for answer in made])


def point_of(made: Measured, asked: Questions, cfg: Eval, *, beta: float | None, noise_floor: float) -> dict[str, dict]:
    """{"metrics", "clusters"} of one policy; a metric is a value, its standard error clustered by prompt, and n.

        kl            Rao-Blackwellised KL(policy || reference), nats per answer; kl/k1: by log pi/ref (see `drift`)
        proxy         beta E_pi[log pi - log ref], the mean implicit reward, by k1: what training raises, and beta KL
        entropy       nats per token; entropy/top10, mass/top10: of the ten likeliest tokens (arXiv 2410.11677)
        distinct/n    different n-grams as a share of all, among the answers to one prompt; mean over prompts

    and of held-out pairs what `pairs.statistics` gives. `clusters` has gold and kl by prompt.
    """
    table, (*_, prompt_S) = made.table, asked.repeated(cfg.task.samples)
    shift_S = table["logp"] - table["ref_logp"]
    columns = {"gold": table["gold"]} if "gold" in table else {}
    columns |= {"proxy": beta * shift_S} if beta is not None else {}
    columns |= {"kl": table["kl"], "kl/k1": shift_S, "samples/length": table["tokens"], "samples/ended": table["ended"]}
    metrics = {name: clustered_mean(values, prompt_S) for name, values in columns.items()}
    for name, column in {"entropy": "entropy", "entropy/top10": "top_entropy", "mass/top10": "top_mass"}.items():
        metrics[name] = clustered_mean(table[column], prompt_S, table["tokens"])
    by_prompt = np.arange(len(made.answers)).reshape(len(asked.prompts), -1)
    for n in (1, 2, 3):
        shares = [overopt_best_of_n.distinct([made.answers[i].text_ids for i in members], n) for members in by_prompt]
        known = [share for share in shares if share is not None]
        metrics[f"distinct/{n}"] = clustered_mean(known, np.arange(len(known)))
    if made.logps is not None:
        metrics |= pairs.statistics(made.logps, asked.rows, beta=beta, noise_floor=noise_floor, seed=cfg.seed)
    sizes = [cfg.task.samples] * len(asked.prompts)
    clusters = {
        name: {"mean": table[name][by_prompt].mean(1).tolist(), "size": sizes}
        for name in ("gold", "kl")
        if name in table
    }
    return {"metrics": metrics, "clusters": clusters}


def samples_of(made: Measured, asked: Questions, cfg: Eval) -> list[dict]:
    """The first `task.written` answers to each prompt, as lines of samples.jsonl."""
    rendered, (*_, prompt_S) = asked.tokenizer.batch_decode(asked.prompts), asked.repeated(cfg.task.samples)
    names = [name for name in ("gold", "kl") if name in made.table]
    return [
        {"row": redacted(asked.places[prompt]), "prompt": rendered[prompt], "response": made.texts[i]}
        | {name: float(made.table[name][i]) for name in names}
        | {"tokens": len(made.answers[i].ids), "ended": made.answers[i].ended}
        for i, prompt in enumerate(prompt_S)
        if i % cfg.task.samples < cfg.task.written
    ]


# ---- what runs share


@dataclass(frozen=True)
class Drawn:
    """The reference's answers that best-of-n chooses from."""

    prompts: list[list[int]]
    answers: list[Completion]
    ref_logp: np.ndarray
    gold: np.ndarray


@dataclass(frozen=True)
class Baseline:
    """Questions whose pairs have the reference's log-probs, and what the weights that the runs began with make of them."""

    asked: Questions
    noise_floor: float
    first: Measured
    drawn: Drawn | None


def baseline(
    policy: catalog.Model, reference: catalog.Model, asked: Questions, cfg: Eval, device: torch.device
) -> Baseline:
    """`policy` still has the weights that the runs began with; where these are the reference's it is passed as both."""
    budget, rows, floor, logps = cfg.tokens_per_microbatch, asked.rows, 0.0, None
    if rows is not None:
        logps = pairs.score_rows(reference.policy, None, rows, device, tokens_per_microbatch=budget)
        asked = replace(asked, rows=replace(rows, ref_logps=np.stack([logps["chosen"], logps["rejected"]], axis=1)))
        logps |= {f"ref_{side}": logps[side] for side in ("chosen", "rejected")}
        probe = schedule.plan_step(rows, np.arange(min(PROBED, len(rows))), layout="padded", budget=budget)
        how = {"positions": asked.positions, "compute_dtype": reference.compute}
        floor = model_probe.noise_floor(reference.policy, rows, probe.microbatches[0][0], device, **how)
    same = policy is reference
    first = measure(policy.policy, reference.policy, asked, cfg, device, logps if same else None)
    drawn = None
    if cfg.task.bon and asked.gold is not None:
        prompts, said, _ = asked.repeated(cfg.task.bon_samples or max(cfg.task.bon))
        made, texts = _answer(reference.policy, prompts, asked, cfg, [cfg.seed, 1], device)
        ref_logp = divergence.logps(reference.policy, prompts, made, device, budget=budget)
        drawn = Drawn(prompts, made, ref_logp, asked.gold(said, made, texts))
    return Baseline(asked, dist.broadcast(floor), first, drawn)


def best_of_n(
    policy: Policy, drawn: Drawn, cfg: Eval, device: torch.device, *, prompts: int, beta: float
) -> list[dict]:
    """Gold of the best of n of the reference's answers by the policy's implicit reward, beta log(pi/ref); n in task.bon."""
    logp = divergence.logps(policy, drawn.prompts, drawn.answers, device, budget=cfg.tokens_per_microbatch)
    proxy_GK, gold_GK = (x.reshape(prompts, -1) for x in (beta * (logp - drawn.ref_logp), drawn.gold))
    return overopt_best_of_n.best_of_n(list(proxy_GK), list(gold_GK), cfg.task.bon)


# ---- all runs


def ask(found: Sequence[Run], cfg: Eval, device: torch.device) -> dict[str, Questions]:
    """What the runs are asked, by `data_key`. Raises UserError where data, models and lengths do not fit; of models only
    one of rewards is loaded."""
    source = None
    if cfg.task.gold != "auto":
        how = {"dtype": shard.compute_dtype(cfg.model.dtype, device), "date": cfg.data.template_date}
        source = rewards.source(cfg.task.gold, device=device, trust_remote_code=cfg.model.trust_remote_code, **how)
    asked: dict[str, Questions] = {}
    for run in found:
        if data_key(run) not in asked:
            asked[data_key(run)] = questions(run, cfg, source)
    if cfg.task.gold == "auto" and any(each.gold is None for each in asked.values()) and dist.is_main():
        print(
            "task.gold=auto: no gold for runs on other data than the embedded task's; give task.gold=DIR (a reward "
            "model) or task.gold=FILE.py:FUNCTION, or none",
            flush=True,
        )
    return asked


def data_key(run: Run) -> str:
    """Equal for runs with one start, reference and data."""
    return json.dumps(
        [run.start, run.reference, run.model.tokenizer, asdict(run.data), run.settings["data"].get("train")]
    )


def evaluate(
    found: Sequence[Run], asked: dict[str, Questions], cfg: Eval, device: torch.device, points: Points
) -> list[dict]:
    """For each run {"run", "settings", "prompts" (digests), "max_new_tokens", "curve", "bon"}, measured now or, where
    `points` knows it, by an earlier start.

    Raises UserError where weights or a checkpoint are not what the run had; what was measured until then is kept.
    """
    if dist.is_main():
        print(redacted(_plan(found, asked, cfg, points)), flush=True)
    families: dict[tuple, list[Run]] = {}
    for run in found:
        families.setdefault((run.start, run.reference, run.model.dtype), []).append(run)
    results: dict[Path, dict] = {}
    for family in families.values():  # models stay for all runs that share them, and then make room
        for run, curve, bon in _family(family, asked, cfg, device, points):
            of = asked[data_key(run)]
            prompts = [files.digest(json.dumps(prompt).encode()) for prompt in of.prompts]
            facts = {"settings": run.settings, "prompts": prompts, "max_new_tokens": of.sampling.max_new_tokens}
            results[run.folder] = {"run": str(run.folder), **facts, "curve": curve, "bon": bon}
        gc.collect()  # a sharded model is full of cycles
    return [results[run.folder] for run in found]


def _family(
    family: Sequence[Run], asked: dict[str, Questions], cfg: Eval, device: torch.device, points: Points
) -> Iterator[tuple[Run, list[dict], list[dict] | None]]:
    """(run, curve, best-of-n) of runs with one start and reference; nothing is loaded where all of it is known."""
    todo = {run.folder: _measurements(run, asked[data_key(run)], cfg) for run in family}
    missing = [run for run in family if any(points.get(of, **key) is None for key, of, _ in todo[run.folder])]
    baselines: dict[str, Baseline] = {}
    if missing:
        reference, policy = (_load(family[0], which, cfg, device) for which in ("reference", "model"))
        begun = reference if family[0].start == family[0].reference else policy
        for key in dict.fromkeys(map(data_key, missing)):  # before a checkpoint is laid over the policy
            baselines[key] = baseline(begun, reference, asked[key], cfg, device)
    for run in family:
        begin, found, laid = time.perf_counter(), [], None
        for key, of, folder in todo[run.folder]:
            point = points.get(of, **key)
            if point is None:
                base = baselines[data_key(run)]
                if folder is not None and folder != laid:
                    facts = {"model.path": policy.digest, "reference.path": reference.digest}
                    catalog.lay_over(
                        policy, folder, facts | {"model.tokenizer": catalog.identity_of(base.asked.tokenizer)}
                    )
                    laid = folder
                if "bon" in key:
                    how = {"prompts": len(base.asked.prompts), "beta": run.beta}
                    point = points.add(
                        of, {"best_of_n": best_of_n(policy.policy, base.drawn, cfg, device, **how)}, **key
                    )
                else:
                    made = base.first
                    if folder is not None:
                        made = measure(policy.policy, reference.policy, base.asked, cfg, device)
                    value = point_of(made, base.asked, cfg, beta=run.beta, noise_floor=base.noise_floor)
                    point = points.add(of, value, samples_of(made, base.asked, cfg), **key)
            found.append(point)
        curve = [{name: point[name] for name in ("step", "metrics", "clusters")} for point in found if "step" in point]
        if dist.is_main():
            print(redacted(_line(run, curve, time.perf_counter() - begin)), flush=True)
        yield run, curve, next((point["best_of_n"] for point in found if "bon" in point), None)


def _measurements(run: Run, asked: Questions, cfg: Eval) -> list[tuple[dict, str, Path | None]]:
    """(key, digest of what it is made of, checkpoint) of each point of the run's curve, and of its best-of-n."""

    def of(folder: Path | None) -> str:
        file = folder and folder / "manifest.json"
        return files.digest(file.read_bytes() if file and file.is_file() else b"", asked.digest.encode())

    name = str(run.folder)
    found = [({"run": name, "step": step}, of(folder), folder) for step, folder in {0: None, **run.checkpoints}.items()]
    if cfg.task.bon and asked.gold is not None and run.beta is not None:
        last = max(run.checkpoints)
        found.append(({"run": name, "bon": last}, of(run.checkpoints[last]), run.checkpoints[last]))
    return found


def _load(run: Run, which: str, cfg: Eval, device: torch.device) -> catalog.Model:
    source = {"reference": run.reference, "model": run.start}[which]
    how = {"dtype": run.model.dtype, "asked": cfg.model.dtype, "trust_remote_code": cfg.model.trust_remote_code}
    return catalog.load(source, f"{which}.path", device, **how)


def _plan(found: Sequence[Run], asked: dict[str, Questions], cfg: Eval, points: Points) -> str:
    """What is going to be measured, and how much of it is known already."""
    sizes = dict.fromkeys(
        f"{len(of.prompts)} prompts x {cfg.task.samples} answers and {len(of.rows) if of.rows else 0} pairs"
        for of in asked.values()
    )
    todo = [each for run in found for each in _measurements(run, asked[data_key(run)], cfg)]
    done = sum(points.get(of, **key) is not None for key, of, _ in todo)
    return (
        f"{len(found)} run{'s' * (len(found) > 1)}, at each checkpoint {' or '.join(sizes)}; {done} of {len(todo)} points are done; "
        f"to go on after a stop give run_dir={points.points.parent}"
    )


def _line(run: Run, curve: list[dict], seconds: float) -> str:
    parts = [f"{run.folder}: {len(curve) - 1} checkpoints"]
    for name in ("gold", "kl", "shift/chosen"):
        values = [point["metrics"][name]["value"] for point in (curve[0], curve[-1]) if name in point["metrics"]]
        parts += [f"{name} {values[0]:.3g} -> {values[1]:.3g}"] if len(values) == 2 else []
    return ", ".join(parts) + f" ({seconds:.1f} s)"
