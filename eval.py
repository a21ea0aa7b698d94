"""One evaluation task against one or more models: a table on screen, results.json and samples.jsonl in its folder.

    python eval.py task=pairs    model.path=[RUN/model,OTHER] reference.path=DIR data.eval=FILE
    python eval.py task=generate model.path=RUN/model data.eval=PROMPTS.jsonl task.temperature=0
    python eval.py task=gold     model.path=RUN/model

Where a model is a run's `model/`, what is not given (reference, data, beta) comes from that run's config.yaml.
"""

import gc
import json
from pathlib import Path

import hydra
import numpy as np
import torch

from rpo import checks, config, data, dist, models, packing, rundir, score, sweep, tokens
from rpo import gold as embedded
from rpo.config import Eval, Gold, UserError
from rpo.redact import redacted
from rpo.tasks import generate, gold, pairs


def evaluate(cfg: Eval) -> str:
    """Runs the task on every model; returns "finished". Raises UserError before the first model is loaded."""
    device = dist.init()
    run_dir = rundir.choose(cfg.run_dir, f"eval_{cfg.task.kind}")
    paths = [cfg.model.path] if isinstance(cfg.model.path, str) else cfg.model.path
    trust = {"trust_remote_code": cfg.model.trust_remote_code}
    hf = {f"model.path={path}": models.check(path, cfg.model.revision, **trust) for path in paths}
    runs = [rundir.settings_of(path) for path in paths]
    on_pairs, on_gold = cfg.task.kind == "pairs", cfg.task.kind == "gold"
    reference_path = cfg.reference.path or _from_runs(runs, "reference.path") if on_pairs or on_gold else None
    spec = cfg.data.eval or _from_runs(runs, "data.eval")
    betas = {path: _beta(cfg, run, path) for run, path in zip(runs, paths, strict=True) if on_pairs}
    weights = _gold_weights(runs) if on_gold else None
    _note_other_settings(cfg, paths, runs)

    if reference_path is not None:
        hf[f"reference.path={reference_path}"] = models.check(reference_path, key="reference.path", **trust)
    tokenizer = tokens.load_tokenizer(
        cfg.model.tokenizer or paths[0], revision=cfg.model.revision, chat_template=cfg.data.chat_template, **trust
    )
    if on_pairs:
        with dist.main_first():  # rank 0 tokenises into the cache, the others read it
            rows, report = data.load(spec, cfg.data, tokenizer, pairs=True, cache_dir=Path(cfg.cache_dir).expanduser())
        rows = rows.head(cfg.task.limit or len(rows))
        longest = packing.longest(rows)
    else:
        prompts, places, report = data.load_prompts(spec, cfg.data, tokenizer)
        prompts, places = prompts[: cfg.task.limit], places[: cfg.task.limit]
        longest = max(map(len, prompts))
        room = models.positions_of(hf) - longest
        if cfg.task.max_new_tokens > room:
            raise UserError(
                f"task.max_new_tokens={cfg.task.max_new_tokens}: beside a prompt of {longest} tokens the model has "
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
            reference = models.prepare(
                models.load(reference_path, None, master, key="reference.path", **trust), **shard
            )
        stop_ids = tokens.stop_ids(tokenizer, cfg.data.template_date)
        where = {"device": device, "seed": cfg.seed}
        results, samples, noise_floors = {}, [], {}
        for path in paths:
            policy = models.prepare(models.load(path, cfg.model.revision, master, **trust), **shard)
            match cfg.task.kind:
                case "pairs":
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
                case "generate":
                    result, made = generate.evaluate(policy, tokenizer, prompts, places, cfg.task, stop_ids, **where)
                case "gold":
                    result, made = gold.evaluate(
                        policy, reference, tokenizer, prompts, cfg.task, weights, stop_ids, **where
                    )
            results[path] = result
            samples += [{"model": path} | sample for sample in made]
            del policy
            gc.collect()  # a sharded model is full of cycles; the next one needs its memory

        if dist.is_main():
            facts = {"reference": reference_path, "data": spec, "beta": betas, "noise_floor": noise_floors}
            _write(run_dir, cfg, {"task": cfg.task.kind, **facts, "models": results}, samples)
            rundir.write_environment(run_dir, device)
            rundir.write_json(run_dir / "data_report.json", report)
    return "finished"


def _write(run_dir: Path, cfg: Eval, results: dict, samples: list[dict]) -> None:
    rundir.write_json(run_dir / "results.json", results)
    with (run_dir / "samples.jsonl").open("w") as file:
        for sample in samples:  # text of models and data stays as it is, paths may hold a secret
            file.write(json.dumps(sample | {k: redacted(sample[k]) for k in ("model", "row") if k in sample}) + "\n")
    print(
        redacted(_table(results["models"])), run_dir / "results.json", run_dir / "samples.jsonl", sep="\n", flush=True
    )


def _from_runs(runs: list[dict | None], key: str) -> str | list[str]:
    """What all the models' runs used for `key`; UserError where one has no run, or used nothing or something else."""
    group, name = key.split(".")
    if None in runs:
        raise UserError(f"{key}=null: a model is not the model/ of a run, so there is none to take; give {key}=...")
    found = [run[group][name] for run in runs]
    if key == "reference.path":  # a run without one was compared with its own starting weights
        found = [value or run["model"]["path"] for value, run in zip(found, runs, strict=True)]
    if found[0] is None or any(value != found[0] for value in found):
        raise UserError(
            f"{key}=null: the models' runs used {' and '.join(sorted(set(map(str, found))))}; give {key}=..."
        )
    return found[0]


def _beta(cfg: Eval, run: dict | None, path: str) -> float:
    if cfg.task.beta != "auto":
        return cfg.task.beta
    if run is None or run["loss"]["preference"] == "none":
        raise UserError(f"task.beta=auto: {path} has no preference run whose beta it could take; give task.beta=NUMBER")
    return run["loss"]["beta"]


def _gold_weights(runs: list[dict | None]) -> Gold:
    for run in runs:
        if run is not None and (weights := embedded.weights_of(run["data"]["train"])) is not None:
            return weights
    raise UserError("task=gold: no model.path is the model/ of a run with data=gold, so there is no reward to compute")


def _note_other_settings(cfg: Eval, paths: list[str], runs: list[dict | None]) -> None:
    """Says where rows are read otherwise than in a model's own run, so that the numbers may differ from its own."""
    for path, run in zip(paths, runs, strict=True):
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


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(cfg) -> None:
    """One evaluation; exit codes: 0 finished, 2 a user's error, 1 anything else."""
    sweep.run_job(lambda: evaluate(checks.eval_config(cfg)))


if __name__ == "__main__":
    main()
