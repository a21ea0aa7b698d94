"""One evaluation task: a table on screen, results.json and what it is made of in its folder.

    python eval.py task=pairs    model.path=[RUN/model,OTHER] reference.path=DIR data.eval=FILE
    python eval.py task=generate model.path=RUN/model data.eval=PROMPTS.jsonl task.temperature=0
    python eval.py task=gold     model.path=RUN/model
    python eval.py task=overopt  runs=SWEEP run_dir=DIR
    python eval.py task=select   task.results=DIR

Where a model is a run's `model/`, what is not given (reference, data, beta) comes from that run's config.yaml. task=overopt
goes through the checkpoints of all runs below a folder, and goes on where it was killed.
"""

import gc
import json
from contextlib import suppress
from pathlib import Path

import hydra
import numpy as np
import torch

from rpo import (
    config,
    data,
    dist,
    eval_checks,
    models,
    overopt_plots,
    packing,
    rundir,
    runs,
    score,
    study,
    sweep,
    tokens,
)
from rpo import gold as embedded
from rpo.config import Gold, UserError
from rpo.eval_config import Eval, GenerateTask, GoldTask, OveroptTask, PairsTask, SelectTask
from rpo.points import Points
from rpo.redact import redacted
from rpo.reference import weights_digest
from rpo.tasks import generate, gold, overopt, pairs, select


def evaluate(cfg: Eval) -> str:
    """Runs the task; returns "finished". Raises UserError, for all that can be known by then before a model is loaded."""
    device = dist.init()
    match cfg.task:
        case SelectTask():
            _of_results(cfg, cfg.task)
        case OveroptTask():
            _of_runs(cfg, device)
        case _:
            _of_models(cfg, device)
    return "finished"


# ---- models


def _of_models(cfg: Eval, device: torch.device) -> None:
    """The task on every model, one after the other."""
    task = cfg.task
    run_dir = rundir.choose(cfg.run_dir, f"eval_{task.kind}")
    paths = [cfg.model.path] if isinstance(cfg.model.path, str) else cfg.model.path
    trust = {"trust_remote_code": cfg.model.trust_remote_code}
    hf = {f"model.path={path}": models.check(path, cfg.model.revision, **trust) for path in paths}
    made_by = [rundir.settings_of(path) for path in paths]
    compared = not isinstance(task, GenerateTask)
    reference_path = cfg.reference.path or _from_runs(made_by, "reference.path") if compared else None
    spec = cfg.data.eval or _from_runs(made_by, "data.eval")
    betas = {}
    if isinstance(task, PairsTask):
        betas = {path: _beta(task, run, path) for run, path in zip(made_by, paths, strict=True)}
    weights = _gold_weights(made_by) if isinstance(task, GoldTask) else None
    _note_other_settings(cfg, paths, made_by)

    if reference_path is not None:
        hf[f"reference.path={reference_path}"] = models.check(reference_path, key="reference.path", **trust)
    tokenizer = tokens.load_tokenizer(
        cfg.model.tokenizer or paths[0], revision=cfg.model.revision, chat_template=cfg.data.chat_template, **trust
    )
    if isinstance(task, PairsTask):
        with dist.main_first():  # rank 0 tokenises into the cache, the others read it
            rows, report = data.load(spec, cfg.data, tokenizer, pairs=True, cache_dir=Path(cfg.cache_dir).expanduser())
        rows = rows.head(task.limit or len(rows))
        longest = packing.longest(rows)
    else:
        prompts, _, places, report = data.load_prompts(spec, cfg.data, tokenizer)
        prompts, places = prompts[: task.limit], places[: task.limit]
        longest = max(map(len, prompts))
        new = task.max_new_tokens if isinstance(task, GenerateTask) else embedded.SAMPLING.max_new_tokens
        room = models.positions_of(hf) - longest
        if new > room:
            raise UserError(
                f"task.max_new_tokens={new}: beside a prompt of {longest} tokens the model has "
                f"positions for {room}; set task.max_new_tokens={room} or less"
            )
    models.check_fit(hf, tokenizer, longest)

    with rundir.recording(run_dir, config.to_yaml(cfg)):
        compute = models.compute_dtype(cfg.model.dtype, device)
        master = torch.promote_types(compute, torch.float32)
        shard = {
            "mesh": dist.mesh(device, dist.PLAIN),
            "fsdp": dist.PLAIN,
            "compute_dtype": compute,
            "compile": False,
            "trainable": False,
        }
        reference = None
        if reference_path is not None:
            lm = models.load(reference_path, None, master, key="reference.path", **trust)
            if cfg.reference.path is None:
                _check_reference(lm, reference_path, paths, made_by, device)
            reference = models.prepare(lm, **shard)
        stop_ids = tokens.stop_ids(tokenizer, cfg.data.template_date)
        where = {"device": device, "seed": cfg.seed}
        results, samples, noise_floors = {}, [], {}
        for path in paths:
            policy = models.prepare(models.load(path, cfg.model.revision, master, **trust), **shard)
            match task:
                case PairsTask():
                    budget = {"tokens_per_microbatch": cfg.tokens_per_microbatch}
                    probe = packing.plan_step(
                        rows, np.arange(min(8, len(rows))), layout="padded", budget=cfg.tokens_per_microbatch
                    )
                    how = {"positions": models.positions_of(hf), "compute_dtype": compute}
                    floor = score.noise_floor(policy, rows, probe.microbatches[0][0], device, **how)
                    noise_floors[path] = floor
                    result, made = pairs.evaluate(
                        policy, reference, rows, beta=betas[path], noise_floor=floor, **budget, **where
                    )
                case GenerateTask():
                    result, made = generate.evaluate(policy, tokenizer, prompts, places, task, stop_ids, **where)
                case GoldTask():
                    result, made = gold.evaluate(
                        policy, reference, tokenizer, prompts, task, weights, stop_ids, **where
                    )
            results[path] = result
            samples += [{"model": path} | sample for sample in made]
            del policy
            gc.collect()  # a sharded model is full of cycles; the next one needs its memory

        if dist.is_main():
            facts = {"reference": reference_path, "data": spec, "beta": betas, "noise_floor": noise_floors}
            _write(run_dir, {"task": task.kind, **facts, "models": results}, samples)
            rundir.write_environment(run_dir, device)
            rundir.write_json(run_dir / "data_report.json", report)


def _write(run_dir: Path, results: dict, samples: list[dict]) -> None:
    rundir.write_json(run_dir / "results.json", results)
    with (run_dir / "samples.jsonl").open("w") as file:
        for sample in samples:  # text of models and data stays as it is, paths may hold a secret
            file.write(json.dumps(sample | {k: redacted(sample[k]) for k in ("model", "row") if k in sample}) + "\n")
    print(
        redacted(_table(results["models"])), run_dir / "results.json", run_dir / "samples.jsonl", sep="\n", flush=True
    )


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
    lm: models.PreTrainedModel, path: str, model_paths: list[str], made_by: list[dict], device: torch.device
) -> None:
    """Raises UserError where the weights at `path` are not those that a model's run recorded. A collective."""
    now = weights_digest(lm)
    for model, run in zip(model_paths, made_by, strict=True):
        width = torch.promote_types(models.compute_dtype(run["model"]["dtype"], device), torch.float32)
        then = _recorded_reference(Path(model).parent / "environment.json")
        if lm.dtype == width and then not in (None, now):  # a digest is of weights as wide as the run's
            raise UserError(
                f"reference.path=null: the run of {model} was compared with {path} of digest {then[:24]}, now it is "
                f"{now[:24]}; put it back as it was, or give reference.path={path} to compare with its present weights"
            )


def _recorded_reference(environment: Path) -> str | None:
    """The digest of the weights that a run had for its reference; None where nothing says so."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return rundir.read_json(environment)["reference"]["train"]["weights"]
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


def _table(results: dict[str, dict]) -> str:
    """Metrics down, models across, each value +- its standard error."""
    names = list(dict.fromkeys(name for result in results.values() for name in result))
    lines = [["", *results]]
    for name in names:
        cells = [result[name] for result in results.values()]
        lines.append([name, *(_cell(cell) for cell in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def _cell(cell: dict) -> str:
    if cell["value"] is None:
        return "-"
    return f"{cell['value']:.4g}" + ("" if cell["se"] is None else f" +- {cell['se']:.2g}")


# ---- runs


def _of_runs(cfg: Eval, device: torch.device) -> None:
    """The checkpoints of all runs below `runs`; what the folder has of them already is not measured again."""
    begun = dist.on_main(lambda: _begun(cfg.run_dir))
    run_dir = rundir.choose(cfg.run_dir, f"eval_{cfg.task.kind}", continues=begun)
    seen = rundir.stamp(run_dir)
    dist.on_main(_check_goes_on, run_dir, cfg)
    found, left_out = dist.on_main(runs.find, [cfg.runs] if isinstance(cfg.runs, str) else cfg.runs)
    study.check([{"run": str(run.folder), "settings": run.settings} for run in found])
    unfinished = [f"{run.folder} ({run.state})" for run in found if run.state != "finished"]
    for what, named in (("left out", left_out), ("not finished, and evaluated as far as it is", unfinished)):
        if named and dist.is_main():
            print(f"{what}: {'; '.join(map(redacted, named))}", flush=True)
    asked = overopt.ask(found, cfg, device)
    with rundir.recording(run_dir, config.to_yaml(cfg), seen=seen):
        measured = overopt.evaluate(found, asked, cfg, device, Points(run_dir))
        if dist.is_main():
            of_runs, of_groups, groups = study.summarise(measured, cfg.seed)
            facts = {"task": cfg.task.kind, "left_out": left_out, "groups": of_groups, "runs": of_runs}
            rundir.write_json(run_dir / "results.json", facts)
            rundir.write_environment(run_dir, device)
            drawn = overopt_plots.draw_study(groups, run_dir / "plots", study.mean_best_of_n(of_runs))
            print(redacted(study.lines(of_groups)), run_dir / "results.json", *drawn, sep="\n", flush=True)


def _begun(run_dir: str | None) -> str:
    """The file by which `run_dir` would be known for an evaluation of runs: one that is done may find new ones to do."""
    done = run_dir is not None and (Path(run_dir).expanduser() / "results.json").exists()
    return "results.json" if done else "config.yaml"


def _check_goes_on(run_dir: Path, cfg: Eval) -> None:
    """Raises UserError where `run_dir` holds something else than a part of this very evaluation."""
    file = run_dir / "config.yaml"
    if not file.is_file() and not (run_dir / "results.json").exists():
        return
    there = config.read_yaml(file)
    if not isinstance(there, dict) or "task" not in there:
        raise UserError(f"run_dir={run_dir}: already holds a run (config.yaml) of another kind; give another folder")
    if differing := config.differences(there, redacted(config.to_dict(cfg))):
        raise UserError(
            f"run_dir={run_dir}: holds an evaluation with other settings ({'; '.join(differing[:5])}); give its "
            "settings, or another run_dir"
        )


# ---- results


def _of_results(cfg: Eval, task: SelectTask) -> None:
    """A choice among the checkpoints that an evaluation by task=overopt measured."""
    run_dir = rundir.choose(cfg.run_dir, f"eval_{task.kind}")
    made = select.evaluate(select.read(Path(task.results).expanduser()), task)
    with rundir.recording(run_dir, config.to_yaml(cfg)):
        if dist.is_main():
            rundir.write_json(run_dir / "results.json", {"task": task.kind, "results": task.results, "runs": made})
            print(redacted(select.lines(made, task)), run_dir / "results.json", sep="\n", flush=True)


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(cfg) -> None:
    """One evaluation; exit codes: 0 finished, 2 a user's error, 1 anything else."""
    sweep.run_job(lambda: evaluate(eval_checks.eval_config(cfg)))


if __name__ == "__main__":
    main()
