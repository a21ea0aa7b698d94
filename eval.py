"""One evaluation task: a table on screen, results.json and what it is made of in its folder.

    python eval.py task=pairs       model.path=[RUN/model,OTHER] reference.path=DIR data.eval=FILE
    python eval.py task=generate    model.path=RUN/model data.eval=PROMPTS.jsonl task.temperature=0
    python eval.py task=gold        model.path=RUN/model
    python eval.py task=overopt     runs=SWEEP run_dir=DIR
    python eval.py task=select      task.results=DIR
    python eval.py task=winrate     outputs=[A.json,B.json] judge.model=NAME judge.base_url=URL
    python eval.py task=mt_bench    annotations=FILE
    python eval.py task=alpaca_eval outputs=FILE baseline=FILE judge.model=NAME
    python eval.py task=lm_eval     model.path=[RUN/model,OTHER] baseline=OTHER
    python eval.py task=compare     task.results=[DIR,DIR2]
    python eval.py task=report      runs=SWEEP

Where a model is a run's `model/`, what is not given (reference, data, beta) comes from that run's config.yaml. task=overopt
and those that ask a judge or run a benchmark go on where they were killed, given their run_dir.
"""

import gc
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import torch
from transformers import PreTrainedModel

from rpo import config, dist
from rpo.config import Gold
from rpo.data import batch as data_batch
from rpo.data import dataset, schedule
from rpo.data import tokenizer as data_tokenizer
from rpo.errors import UserError
from rpo.evals import results, settings
from rpo.evals.context import Answerer, note_unknown
from rpo.evals.points import Points
from rpo.evals.results import Evaluation
from rpo.evals.settings import (
    EVAL_MAY_CHANGE,
    AlpacaEvalTask,
    CompareTask,
    Eval,
    GenerateTask,
    GoldTask,
    JudgeCheckTask,
    LmEvalTask,
    MbppTask,
    MtBenchTask,
    OveroptTask,
    PairsTask,
    ReportTask,
    SelectTask,
    WinrateTask,
)
from rpo.judging import client, judge
from rpo.model.fingerprint import weights_digest
from rpo.model.hf import check, check_fit, load, positions_of
from rpo.model.policy import prepare
from rpo.model.probe import noise_floor
from rpo.model.shard import PLAIN, compute_dtype, mesh
from rpo.overopt import figures, study
from rpo.runs import catalog, process
from rpo.runs import folder as run_folder
from rpo.synthetic import task as embedded
from rpo.tasks import (
    alpaca_eval,
    compare,
    generate,
    gold,
    judge_check,
    lm_eval,
    mbpp,
    mt_bench,
    overopt,
    pairs,
    report,
    select,
    winrate,
)
from rpo.text import redacted
from rpo.training import sweep


def evaluate(cfg: Eval) -> str:
    """Runs the task; returns "finished". Raises UserError, for all that can be known by then before a model is loaded."""
    device = dist.init()
    with process.Interrupt():  # a scheduler's signals end it as Ctrl-C does
        match cfg.task:
            case PairsTask() | GenerateTask() | GoldTask():
                _of_models(cfg, device)
            case OveroptTask():
                _of_runs(cfg, device)
            case SelectTask() | CompareTask() | ReportTask():
                _of_results(cfg)
            case _:
                _of_answers(cfg, device)
    return "finished"


# ---- models


def _of_models(cfg: Eval, device: torch.device) -> None:
    """The task on every model, one after the other."""
    task = cfg.task
    run_dir = run_folder.choose(cfg.run_dir, f"eval_{task.kind}")
    paths = [cfg.model.path] if isinstance(cfg.model.path, str) else cfg.model.path
    trust = {"trust_remote_code": cfg.model.trust_remote_code}
    hf = {f"model.path={path}": check(path, cfg.model.revision, **trust) for path in paths}
    made_by = [run_folder.settings_of(path) for path in paths]
    compared = not isinstance(task, GenerateTask)
    reference_path = cfg.reference.path or _from_runs(made_by, "reference.path") if compared else None
    spec = cfg.data.eval or _from_runs(made_by, "data.eval")
    betas = {}
    if isinstance(task, PairsTask):
        betas = {path: _beta(task, run, path) for run, path in zip(made_by, paths, strict=True)}
    weights = _gold_weights(made_by) if isinstance(task, GoldTask) else None
    _note_other_settings(cfg, paths, made_by)

    if reference_path is not None:
        hf[f"reference.path={reference_path}"] = check(reference_path, key="reference.path", **trust)
    tokenizer = data_tokenizer.load_tokenizer(
        cfg.model.tokenizer or paths[0], revision=cfg.model.revision, chat_template=cfg.data.chat_template, **trust
    )
    if isinstance(task, PairsTask):
        with dist.main_first():  # rank 0 tokenises into the cache, the others read it
            rows, report = dataset.load(
                spec, cfg.data, tokenizer, pairs=True, cache_dir=Path(cfg.cache_dir).expanduser()
            )
        rows = rows.head(task.limit or len(rows))
        longest = data_batch.longest(rows)
    else:
        prompts, said, places, report = dataset.load_prompts(spec, cfg.data, tokenizer)
        prompts, said, places = prompts[: task.limit], said[: task.limit], places[: task.limit]
        longest = max(map(len, prompts))
        note_unknown(paths[0], tokenizer, prompts)
        new = task.max_new_tokens if isinstance(task, GenerateTask) else embedded.SAMPLING.max_new_tokens
        room = positions_of(hf) - longest
        if new > room:
            raise UserError(
                f"task.max_new_tokens={new}: beside a prompt of {longest} tokens the model has "
                f"positions for {room}; set task.max_new_tokens={room} or less"
            )
    check_fit(hf, tokenizer, longest)

    with run_folder.recording(run_dir, config.to_yaml(cfg)):
        compute = compute_dtype(cfg.model.dtype, device)
        master = torch.promote_types(compute, torch.float32)
        shard = {
            "mesh": mesh(device, PLAIN),
            "fsdp": PLAIN,
            "compute_dtype": compute,
            "compile": False,
            "trainable": False,
        }
        reference = None
        if reference_path is not None:
            lm = load(reference_path, None, master, key="reference.path", **trust)
            if cfg.reference.path is None:
                _check_reference(lm, reference_path, paths, made_by, device)
            reference = prepare(lm, **shard)
        stop_ids = data_tokenizer.stop_ids(tokenizer, cfg.data.template_date)
        where = {"device": device, "seed": cfg.seed}
        measured, samples, noise_floors = {}, [], {}
        for path in paths:
            policy = prepare(load(path, cfg.model.revision, master, **trust), **shard)
            match task:
                case PairsTask():
                    budget = {"tokens_per_microbatch": cfg.tokens_per_microbatch}
                    probe = schedule.plan_step(
                        rows, np.arange(min(8, len(rows))), layout="padded", budget=cfg.tokens_per_microbatch
                    )
                    how = {"positions": positions_of(hf), "compute_dtype": compute}
                    floor = noise_floor(policy, rows, probe.microbatches[0][0], device, **how)
                    noise_floors[path] = floor
                    result, made = pairs.evaluate(
                        policy, reference, rows, beta=betas[path], noise_floor=floor, **budget, **where
                    )
                case GenerateTask():
                    result, made = generate.evaluate(policy, tokenizer, prompts, said, places, task, stop_ids, **where)
                case GoldTask():
                    result, made = gold.evaluate(
                        policy, reference, tokenizer, prompts, task, weights, stop_ids, **where
                    )
            measured[path] = result
            samples += [{"model": path} | sample for sample in made]
            del policy
            gc.collect()  # a sharded model is full of cycles; the next one needs its memory

        if dist.is_main():
            facts = {"reference": reference_path, "data": spec, "beta": betas, "noise_floor": noise_floors}
            run_folder.write_environment(run_dir, device)
            run_folder.write_json(run_dir / "data_report.json", report)
            results.write(run_dir, cfg, Evaluation(measured, samples, facts))


def _from_runs(made_by: list[dict | None], key: str) -> str | list[str]:
    """What all the models' runs used for `key`; UserError where one has no run, or used nothing or something else."""
    group, name = key.split(".")
    if None in made_by:
        raise UserError(f"{key}=null: a model is not the model/ of a run, so there is none to take; give {key}=...")
    found = [run[group][name] for run in made_by]
    if key == "reference.path":  # a run without one was compared with its own starting weights
        found = [value or run["model"]["path"] for value, run in zip(found, made_by, strict=True)]
    if found[0] is None or any(value != found[0] for value in found):
        raise UserError(
            f"{key}=null: the models' runs used {' and '.join(sorted(set(map(str, found))))}; give {key}=..."
        )
    return found[0]


def _check_reference(
    lm: PreTrainedModel, path: str, model_paths: list[str], made_by: list[dict], device: torch.device
) -> None:
    """Raises UserError where the weights at `path` are not those that a model's run recorded. A collective."""
    now = weights_digest(lm)
    for model, run in zip(model_paths, made_by, strict=True):
        width = torch.promote_types(compute_dtype(run["model"]["dtype"], device), torch.float32)
        then = _recorded_reference(Path(model).parent / "environment.json")
        if lm.dtype == width and then not in (None, now):  # a digest is of weights as wide as the run's
            raise UserError(
                f"reference.path=null: the run of {model} was compared with {path} of digest {then[:24]}, now it is "
                f"{now[:24]}; put it back as it was, or give reference.path={path} to compare with its present weights"
            )


def _recorded_reference(environment: Path) -> str | None:
    """The digest of the weights that a run had for its reference; None where nothing says so."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return run_folder.read_json(environment)["reference"]["train"]["weights"]
    return None


def _beta(task: PairsTask, run: dict | None, path: str) -> float:
    if task.beta != "auto":
        return task.beta
    if run is None or run["loss"]["preference"] == "none":
        raise UserError(f"task.beta=auto: {path} has no preference run whose beta it could take; give task.beta=NUMBER")
    return run["loss"]["beta"]


def _gold_weights(made_by: list[dict | None]) -> Gold:
    for run in made_by:
        if run is not None and (weights := embedded.weights_of(run["data"]["train"])) is not None:
            return weights
    raise UserError("task=gold: no model.path is the model/ of a run with data=gold, so there is no reward to compute")


def _note_other_settings(cfg: Eval, paths: list[str], made_by: list[dict | None]) -> None:
    """Says where rows are read otherwise than in a model's own run, so that the numbers may differ from its own."""
    for path, run in zip(paths, made_by, strict=True):
        for name in ("max_length", "truncation", "template_date", "chat_template", "on_bad_row"):
            ours, theirs = getattr(cfg.data, name), run["data"][name] if run else None
            if run is not None and ours != theirs and dist.is_main():
                print(f"note: data.{name}={ours}, but the run of {path} had {theirs}", flush=True)


# ---- runs


def _of_runs(cfg: Eval, device: torch.device) -> None:
    """The checkpoints of all runs below `runs`; what the folder has of them already is not measured again."""
    run_dir, seen = _go_on(cfg)
    found, left_out = dist.on_main(catalog.find, [cfg.runs] if isinstance(cfg.runs, str) else cfg.runs)
    study.check([{"run": str(run.folder), "settings": run.settings} for run in found])
    unfinished = [f"{run.folder} ({run.state})" for run in found if run.state != "finished"]
    for what, named in (("left out", left_out), ("not finished, and evaluated as far as it is", unfinished)):
        if named and dist.is_main():
            print(f"{what}: {'; '.join(map(redacted, named))}", flush=True)
    asked = overopt.ask(found, cfg, device)
    with run_folder.recording(run_dir, config.to_yaml(cfg), seen=seen):
        measured = overopt.evaluate(found, asked, cfg, device, Points(run_dir))
        if dist.is_main():
            of_runs, of_groups, groups = study.summarise(measured, cfg.seed)
            facts = {"task": cfg.task.kind, "left_out": left_out, "groups": of_groups, "runs": of_runs}
            run_folder.write_json(run_dir / "results.json", facts)
            run_folder.write_environment(run_dir, device)
            drawn = figures.draw_study(groups, run_dir / "plots", study.mean_best_of_n(of_runs))
            print(redacted(study.lines(of_groups)), run_dir / "results.json", *drawn, sep="\n", flush=True)


# ---- answers


def _of_answers(cfg: Eval, device: torch.device) -> None:
    """The task on answers: a model's, a file's, or ones that a judge has seen; what the folder has is not made again."""
    task, (run_dir, seen) = cfg.task, _go_on(cfg)
    ask = None
    if cfg.judge.model is not None:
        client.check(cfg.judge)
        cache = Path(cfg.cache_dir).expanduser() / "judgments"
        ask = partial(judge.ask, judge=cfg.judge, cache=cache, account=client.Account())
    with run_folder.recording(run_dir, config.to_yaml(cfg), seen=seen):
        if dist.is_main():
            print(f"to go on after a stop give run_dir={redacted(str(run_dir))}", flush=True)
        answer = Answerer(cfg, run_dir, device, task.batch_size) if cfg.model.path is not None else None
        match task:
            case WinrateTask():
                made = winrate.evaluate(cfg, answer, ask, run_dir=run_dir)
            case MtBenchTask():
                made = mt_bench.evaluate(cfg, answer, ask, run_dir=run_dir)
            case AlpacaEvalTask():
                made = alpaca_eval.evaluate(cfg, answer, ask, run_dir=run_dir)
            case JudgeCheckTask():
                made = judge_check.evaluate(cfg, ask, run_dir=run_dir)
            case LmEvalTask():
                made = lm_eval.evaluate(cfg, device, run_dir=run_dir)
            case MbppTask():
                made = mbpp.evaluate(cfg, answer, run_dir=run_dir)
        if dist.is_main():
            run_folder.write_environment(run_dir, device)
        dist.on_main(results.write, run_dir, cfg, made)


def _go_on(cfg: Eval) -> tuple[Path, tuple[int, int] | None]:
    """The folder, which may hold a part of this very evaluation, and its stamp. Raises UserError where it holds another."""
    done = cfg.run_dir is not None and dist.on_main((Path(cfg.run_dir).expanduser() / "results.json").exists)
    run_dir = run_folder.choose(
        cfg.run_dir, f"eval_{cfg.task.kind}", continues="results.json" if done else "config.yaml"
    )
    seen = run_folder.stamp(run_dir)
    dist.on_main(_check_goes_on, run_dir, cfg)
    return run_dir, seen


def _check_goes_on(run_dir: Path, cfg: Eval) -> None:
    """Raises UserError where `run_dir` holds something else than a part of this very evaluation."""
    file = run_dir / "config.yaml"
    if not file.is_file() and not (run_dir / "results.json").exists():
        return
    there = config.read_yaml(file)
    if not isinstance(there, dict) or "task" not in there:
        raise UserError(f"run_dir={run_dir}: already holds a run (config.yaml) of another kind; give another folder")
    begun = {path.name for path in run_dir.iterdir()} - {"config.yaml", "status.json", "lock"}
    if begun and (differing := config.differences(there, redacted(config.to_dict(cfg)), EVAL_MAY_CHANGE)):
        raise UserError(
            f"run_dir={run_dir}: holds an evaluation with other settings ({'; '.join(differing[:5])}); give its "
            "settings, or another run_dir"
        )


# ---- results


def _of_results(cfg: Eval) -> None:
    """What can be said of other evaluations' results: a choice of checkpoints, a comparison, a page."""
    task = cfg.task
    run_dir = run_folder.choose(cfg.run_dir, f"eval_{task.kind}")
    if isinstance(task, SelectTask):
        made = select.evaluate(select.read(Path(task.results).expanduser()), task)
    elif isinstance(task, CompareTask):
        made = compare.evaluate(cfg)
    else:
        made = report.read(cfg)

    def finish() -> None:
        match task:
            case SelectTask():
                run_folder.write_json(
                    run_dir / "results.json", {"task": task.kind, "results": task.results, "runs": made}
                )
                print(redacted(select.lines(made, task)), run_dir / "results.json", sep="\n", flush=True)
            case CompareTask():
                results.write(run_dir, cfg, made, compare.lines(made))
            case ReportTask():
                print(*report.write(cfg, made, run_dir=run_dir), sep="\n", flush=True)

    with run_folder.recording(run_dir, config.to_yaml(cfg)):
        dist.on_main(finish)


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(cfg) -> None:
    """One evaluation; exit codes: 0 finished, 2 a user's error, 1 anything else."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a model's name may hold what the terminal can not show
    sweep.run_job(lambda: evaluate(settings.eval_config(cfg)))


if __name__ == "__main__":
    main()
