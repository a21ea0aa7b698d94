"""One RPO, DPO or SFT run, top to bottom.

    python train.py loss=rpo_sum                              # the embedded task, on whatever is here
    torchrun --nproc-per-node 8 train.py loss=rpo_avg model.path=DIR data.train=FILE data.eval=FILE
    python train.py -m loss=rpo_sum loss.beta=0.01,0.1 loss.eta=0,0.005

`train` builds in order (processes, data, models, optimizer) and then loops: evaluate, sample, stop?, one update, log.
"""

import gc
import json
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import torch
from tqdm import tqdm

from rpo import config, dist, losses
from rpo.config import Train
from rpo.data import batch as data_batch
from rpo.data import dataset, schedule
from rpo.data import tokenizer as data_tokenizer
from rpo.data.batch import Batch, check_budget, make_batch
from rpo.errors import UserError
from rpo.model import attention, hf, shard
from rpo.model import policy as model_policy
from rpo.model.sampling import Sampling, sample
from rpo.runs import checkpoint, log, process
from rpo.runs import folder as run_folder
from rpo.synthetic import task
from rpo.training import figures, gradients, guards, optim, sweep
from rpo.training import meter as training_meter
from rpo.training.prepare import Ready, check_step_0, ready, reference_logps, restore

SHOWN = ("rewards/accuracies", "loss/preference", "shift/chosen", "nll/chosen", "gold", "kl")  # in the last line
NUM_SAMPLES = 4  # held-out prompts answered every `sample_every` steps
MAX_NEW_TOKENS = 128  # of those answers, where the model has positions for them


def train(cfg: Train) -> str:
    """Trains one model into its run folder, or goes on where it was left; returns finished, or what interrupted it (SIGTERM).

    Raises UserError for what the user can mend: before a model is loaded, save for what only the weights can tell
    (damaged ones, a head that `probe` refuses, step 0, too little memory). FloatingPointError where a loss or gradient
    was not finite; no update was made from it on.
    """
    # ---- all that can be refused before a model is loaded ----------------------------------------------------------
    device = dist.init(cfg.timeout + dist.GRACE)
    ranks = {"rank": dist.rank(), "world_size": dist.world_size()}
    log.wandb_mode(cfg.wandb)
    if cfg.batch_size < dist.world_size():
        raise UserError(f"batch_size={cfg.batch_size}: fewer pairs than the {dist.world_size()} ranks; raise it")
    shard.mesh(device, cfg.fsdp)  # its degrees must fit the world size
    if cfg.fsdp.cpu_offload and device.type == "cpu":
        raise UserError("fsdp.cpu_offload=true: there is no GPU to offload from; set it to false")
    if cfg.optim.state_dtype == "bfloat16" and (device.type == "cpu" or cfg.fsdp.cpu_offload):
        raise UserError("optim.state_dtype=bfloat16: the CPU's fused AdamW has no such moments; use float32")
    if cfg.layout.kind != "padded" and cfg.layout.attention != "auto":
        attention.choose(cfg.layout.attention, device, shard.compute_dtype(cfg.model.dtype, device))
    continues = None if cfg.resume == "never" else "config.yaml"
    run_dir = run_folder.choose(cfg.run_dir, f"{cfg.loss.preference}_{cfg.loss.sft}", continues=continues)
    seen = run_folder.stamp(run_dir)
    embedded = cfg.data.train == "gold"
    if embedded:
        with dist.main_first():  # rank 0 makes the task on first use
            cfg = task.prepare(cfg)
    found = checkpoint.find(run_dir, cfg.resume)  # what this run goes on from, if anything
    run_folder.check_settings(run_dir, cfg)
    if found:
        run_folder.check_settings(found.run_dir, cfg, fork=found.run_dir != run_dir)

    preference = cfg.loss.preference != "none"
    cached = preference and cfg.reference.kind == "cached"
    training_meter.check_best(cfg.checkpoint.best, preference=preference, embedded=embedded)
    configs = hf.check_paths(cfg.model, cfg.reference)
    if preference and cfg.reference.path is None:
        run_folder.check_starting_model(cfg.model.path)
    data_key = [cfg.data, cfg.model.tokenizer or cfg.model.path, cfg.model.revision, preference, cfg.cache_dir]
    data_key += [cfg.model.trust_remote_code]
    loaded = sweep.once("data", data_key, lambda: _load_data(cfg, preference))
    tokenizer, (rows, report), (eval_rows, eval_report) = loaded
    if cfg.model.path is None:
        configs["model.architecture"] = hf.config_for(cfg.model.architecture, tokenizer)
    splits = {name: split for name, split in (("train", rows), ("eval", eval_rows)) if split is not None}
    longest = max(map(data_batch.longest, splits.values()))
    hf.check_fit(configs, tokenizer, longest)
    for split in splits.values():
        check_budget(split, "padded" if cfg.layout.kind == "padded" else "packed", cfg.tokens_per_microbatch)
    facts = {"model.tokenizer": checkpoint.digest(json.dumps(data_tokenizer.identity(tokenizer)).encode())}
    for name, split in splits.items():
        digest = checkpoint.digest(split.ids, split.prompt, split.chosen, split.rejected)
        facts[f"data.{name}"] = f"{len(split)} rows of {len(split.ids)} tokens, {digest}"
    if found:
        checkpoint.check_same(found, facts)
    total_steps = cfg.max_steps or cfg.epochs * schedule.steps_per_epoch(len(rows), cfg.batch_size)
    first_step = found.state["step"] if found else 0
    if run_folder.is_done(run_dir, total_steps, first_step):
        return "finished"

    position = (found.run_dir, found.state["position"]) if found else None
    with (
        run_folder.recording(run_dir, config.to_yaml(cfg), first_step, seen) as status,
        process.Interrupt() as interrupt,
        guards.watchdog(run_dir, cfg.timeout) as begin,
        log.Writer(run_dir, cfg.wandb, config.to_dict(cfg), enabled=dist.is_main(), after=position) as writer,
        checkpoint.Checkpoints(run_dir, cfg.checkpoint, found) as checkpoints,
        dist.thread() as worker,
        ExitStack() as later,
    ):
        if dist.is_main():
            run_folder.write_json(run_dir / "data_report.json", {"train": report, "eval": eval_report})
            made = [f"{name} {dataset.describe(r)}" for name, r in (("train", report), ("eval", eval_report)) if r]
            goes_on = ", begins anew: it has no checkpoint yet" if seen else ""
            if found:
                goes_on = f", goes on from {found.folder}"
                if found.state["total_steps"] != total_steps:
                    goes_on += f"; optim.schedule is now that of {total_steps} steps, not {found.state['total_steps']}"
            print(f"{run_dir}: {', '.join(made)}{goes_on}", flush=True)

        # ---- models, and what the reference says of the rows: before the optimizer takes its memory ----------------------
        model_key = [data_key, cfg.model, cfg.fsdp, cfg.layout, cfg.compile, cfg.tokens_per_microbatch, cfg.seed]
        model_key += [cfg.reference.path]  # its positions bound the probe's
        policy_source = cfg.model.path, cfg.model.revision
        reference_source = (cfg.reference.path, None) if cfg.reference.path else policy_source
        starts_as_reference = reference_source == policy_source
        load = partial(ready, cfg, configs, rows, device, longest=longest)
        how = {"trainable": True, "keep_state": sweep.in_sweep()}
        beginning = sweep.once("policy", [model_key, how], lambda: load("model.path", *policy_source, **how))
        if sweep.in_sweep():
            restore(beginning)

        def load_reference() -> Ready:
            return load("reference.path", *reference_source, trainable=False, keep_state=False)

        def look_up() -> dict[str, tuple[np.ndarray, dict]]:
            model = beginning if starts_as_reference else load_reference()
            return {name: reference_logps(cfg, model, split, name, device) for name, split in splits.items()}

        looked_up = {}
        if cached:
            looked_up = sweep.once("reference", [model_key, cfg.reference], look_up)
            splits = {name: replace(split, ref_logps=looked_up[name][0]) for name, split in splits.items()}
            rows, eval_rows = splits["train"], splits.get("eval")
            gc.collect()  # a reference with a path of its own was resident until here, and is full of cycles
        # The embedded task's KL needs more than log-probs of rows.
        resident = preference and (not cached or (embedded and eval_rows is not None))
        frozen = sweep.once(
            "frozen", [model_key, cfg.reference, resident], load_reference if resident else lambda: None
        )
        policy, noise_floor = beginning.policy, beginning.noise_floor
        live = frozen.policy if frozen and not cached else None
        layout = "padded" if live and frozen.layout == "padded" else beginning.layout
        for split in splits.values():  # again, because layout=auto may have come to padded
            check_budget(split, layout, cfg.tokens_per_microbatch)
        if live and starts_as_reference:  # with a cache, reading it has shown the same
            check_step_0(policy, live, rows, noise_floor, device, layout=layout, budget=cfg.tokens_per_microbatch)
        optimizer = optim.adamw(policy, cfg.optim)
        trained = checkpoint.tensors_of(policy, optimizer)  # before a forward pass leaves the root gathered
        facts["model.path"] = beginning.identity["weights"]
        if preference:
            facts["reference.path"] = looked_up["train"][1]["weights"] if cached else frozen.identity["weights"]
        if found:
            checkpoint.check_same(found, facts)
        if dist.is_main():
            measured = {"noise_floor": noise_floor, "layout": layout, "attention": policy.attention}
            measured |= {"reference": {name: report for name, (_, report) in looked_up.items()}}
            if live:
                measured["reference"]["train"] = {"weights": facts["reference.path"]}
            run_folder.write_environment(run_dir, device, first_step=first_step, **measured)

        # ---- accumulators, and what the loop calls -----------------------------------------------------------------
        meter_args = {"preference": preference, "beta": cfg.loss.beta, "noise_floor": noise_floor}
        meter, eval_meter = training_meter.Meter(device, **meter_args), training_meter.Meter(device, **meter_args)
        bad_step = torch.full((), -1, device=device)  # the first step that was not finite; sticky
        stop_ids = data_tokenizer.stop_ids(tokenizer, cfg.data.template_date)
        num_prompts = min(len(eval_rows or []), cfg.data.gold.samples if embedded else NUM_SAMPLES)
        prompts = [eval_rows.row(i)[0].tolist() for i in range(num_prompts)]
        generation = {"device": device, "reshard": cfg.fsdp.reshard_after_forward}
        divide = partial(schedule.plan_step, layout=layout, budget=cfg.tokens_per_microbatch, **ranks)
        plan_key = [data_key, cfg.batch_size, cfg.seed, layout, cfg.tokens_per_microbatch]
        plans: dict[int, schedule.StepPlan] = sweep.once("plans", plan_key, dict)

        def prepare(step: int) -> tuple[schedule.StepPlan, list[Batch]]:
            """A step's plan and this rank's batches; called off the main thread, one step ahead."""
            plan = plans.get(step) or divide(rows, schedule.step_rows(step, len(rows), cfg.batch_size, cfg.seed))
            if sweep.in_sweep():
                plans[step] = plan
            batches = [make_batch(rows, part, layout, weight=w) for part, w in plan.microbatches]
            return plan, [batch.pin() if device.type == "cuda" else batch for batch in batches]

        @torch.no_grad()
        def evaluate() -> dict[str, float]:
            plan = divide(eval_rows, np.arange(len(eval_rows)))
            counts = {"step_pairs": plan.pairs, "step_chosen_tokens": plan.chosen_tokens}
            for members, weight in plan.microbatches:
                batch = make_batch(eval_rows, members, layout, weight=weight).to(device)
                pairs = model_policy.score(policy, live, batch)
                eval_meter.add(pairs, *losses.objective(cfg.loss, pairs, **counts), weight)
            values = eval_meter.read()
            if embedded and preference:
                asked = prompts, stop_ids, cfg.data.gold
                values |= task.evaluate(policy, frozen.policy, tokenizer, *asked, seed=cfg.seed, **generation)
            return values

        def answers(model: model_policy.Policy) -> list[str]:
            asked = prompts[:NUM_SAMPLES]
            room = min(MAX_NEW_TOKENS, hf.positions_of(configs) - max(map(len, asked)))
            sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=room)
            where = {"seed": [cfg.seed], "batch_size": NUM_SAMPLES, **generation}
            return tokenizer.batch_decode([c.ids for c in sample(model, asked, sampling, stop_ids, **where)])

        def check_finite() -> None:
            """Raises FloatingPointError where a loss or gradient was not finite, model/ holding what was before."""
            if (bad := int(bad_step)) >= 0:
                status.step = bad
                hf.save(policy, tokenizer, run_dir / "model")
                raise FloatingPointError(_not_finite(bad, rows, cfg))

        def save(step: int, *, evaluated: bool, wait: bool = False) -> bool:
            check_finite()
            if dist.is_main():
                run_folder.write_status(run_dir, "running", step=step)
            state = {"total_steps": total_steps, "facts": facts, "pairs": pairs_seen, "evaluated": evaluated}
            state["position"] = writer.position()
            own = {"rng": checkpoint.rng_state(), "sums": meter.sums.tolist()}
            return checkpoints.save(step, trained, state, own, held_out=held_out if evaluated else {}, wait=wait)

        # ---- the loop: evaluate, sample, save, stop?, one update, log ------------------------------------------------
        vote, held_out, samples = dist.Vote(), {}, {}
        if cfg.sample_every and prompts:
            samples["prompt"] = tokenizer.batch_decode(prompts[:NUM_SAMPLES])
            if frozen or (preference and starts_as_reference):
                samples["reference"] = answers(frozen.policy if frozen else policy)
        busy, done = 0.0, np.zeros(3)  # seconds in updates; pairs, tokens, FLOPs since the last line
        pairs_seen, evaluated = 0, False  # and whether evaluation and samples of the first step are written already
        checkpoint.seed_rng(cfg.seed, dist.rank(), first_step)
        if found:
            own = checkpoint.load(found, trained)
            shard.reshard(policy)  # what a forward pass left gathered is of the starting weights
            meter.sums.copy_(torch.tensor(own["sums"], dtype=meter.sums.dtype))
            pairs_seen, evaluated = found.state["pairs"], found.state["evaluated"]
        interval = 0.2 if sys.stderr.isatty() else 30  # seconds; a log file gets few lines
        bar = {"unit": "step", "disable": not dist.is_main(), "mininterval": interval}
        progress = later.enter_context(
            tqdm(total=total_steps, initial=first_step, **bar)
        )  # or an error ends up in its line
        upcoming = worker.submit(prepare, first_step)
        interrupt.defer()
        for step in range(first_step, total_steps + 1):
            begin(f"the evaluation of step {step}")
            last, written = step == total_steps, evaluated and step == first_step
            eval_now = not written and (step == 0 or last or (cfg.eval_every and step % cfg.eval_every == 0))
            sample_now = not written and cfg.sample_every and (last or step % cfg.sample_every == 0)
            if done.any() and (eval_now or sample_now):  # updates still under way on the device belong to `busy`
                busy += training_meter.wait(device)
            if eval_rows is not None and eval_now:
                held_out = evaluate()
                writer.log("eval", step, pairs_seen, held_out)
            if prompts and sample_now:
                columns = samples | {"policy": answers(policy)}
                by_prompt = zip(*columns.values(), strict=True)
                writer.log_samples(step, pairs_seen, [dict(zip(columns, row, strict=True)) for row in by_prompt])
            if cfg.checkpoint.every and step and not written and (last or step % cfg.checkpoint.every == 0):
                if step > first_step:
                    save(step, evaluated=True)
                else:  # an interruption saved it, before it was evaluated
                    checkpoints.judge(step, held_out)
            if last:
                break

            # =============================================== one update ===============================================
            begin(f"step {step}")
            began = time.perf_counter()
            plan, batches = upcoming.result()
            if step + 1 < total_steps:
                upcoming = worker.submit(prepare, step + 1)
            pulls = {}
            if cfg.log.gradient_split and (step + 1) % cfg.log.gradient_split == 0:
                busy += (
                    time.perf_counter() - began + training_meter.wait(device)
                )  # what follows is no part of the update
                pulls = gradients.gradient_split(policy, live, rows, plan, batches, cfg, device)
                begin(f"step {step}")
                began = time.perf_counter()
            counts = {"step_pairs": plan.pairs, "step_chosen_tokens": plan.chosen_tokens}
            for i, batch in enumerate(batches, start=1):
                policy.set_requires_gradient_sync(i == len(batches) or cfg.fsdp.accumulate == "sharded")
                policy.set_requires_all_reduce(i == len(batches))  # over replicas, of which there may be one
                with guards.naming_memory(rows, plan.microbatches[i - 1][0], cfg):
                    pairs = model_policy.score(policy, live, batch.to(device))
                    preference_P, sft_P = losses.objective(cfg.loss, pairs, **counts)
                    # Count first, then divide: by the global number of pairs, known before any backward pass.
                    loss = (preference_P + sft_P).sum() * (batch.weight / plan.pairs)
                    # A loss that is not finite makes its gradients so, and the clipped norm tells all ranks at once.
                    loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
                    loss.backward()
                meter.add(pairs, preference_P.detach(), sft_P.detach(), batch.weight)
            grad_norm = optim.clip_grad_norm(policy, cfg.optim.max_grad_norm)
            bad_step = torch.where((bad_step < 0) & ~grad_norm.isfinite(), step, bad_step)
            lr = optim.lr_at(step, total_steps, cfg.optim)
            optim.step_if_finite(optimizer, bad_step >= 0, lr)
            optimizer.zero_grad()
            # ==========================================================================================================

            pairs_seen += plan.pairs
            done += plan.pairs, plan.unique_tokens, beginning.size.step_flops(*plan.lengths)
            stopped = vote.cast(interrupt.received)
            # Where a checkpoint keeps the sums, an interruption leaves no line that an undisturbed run has not.
            early = stopped and not cfg.checkpoint.every
            if early or (step + 1) % cfg.log_every == 0 or step + 1 == total_steps:
                values = meter.read()  # with a checkpoint's, the loop's only wait for the device
                check_finite()
                busy += time.perf_counter() - began
                rate = dict(zip(("pairs_per_second", "tokens_per_second", "mfu"), done / busy, strict=True))
                values |= {"grad_norm": float(grad_norm), "lr": lr} | pulls
                values |= training_meter.performance(rate, device, dist.world_size())
                writer.log("train", step + 1, pairs_seen, values)
                progress.set_postfix(loss=f"{values['loss']:.4f}", pairs_s=f"{rate['pairs_per_second']:.1f}")
                busy, done = 0.0, np.zeros(3)
            else:
                busy += time.perf_counter() - began
            progress.update()
            status.step = step + 1
            if stopped:
                status.state, status.reason = "interrupted", signal.Signals(stopped).name
                break
        progress.close()

        # ---- what stays ------------------------------------------------------------------------------------------------
        begin("writing what stays")
        left = "model/ is written"
        if status.state == "interrupted" and cfg.checkpoint.every:
            if not save(status.step, evaluated=False, wait=True):
                raise UserError(
                    f"run_dir={run_dir}: interrupted at step {status.step}, which could not be written; make room"
                )
            left = f"the same command with run_dir={run_dir} goes on from there"
        else:
            hf.save(policy, tokenizer, run_dir / "model")
            left += "" if checkpoints.wait() else ", its last checkpoint is not"
        if dist.is_main():
            figures.draw_run(log.read_jsonl(run_dir / "metrics.jsonl"), run_dir / "plots")
            # Interrupted, the last evaluation is of older weights.
            final = held_out if status.state == "finished" else {}
            shown = ", ".join(f"{name} {final[name]:.4g}" for name in SHOWN if name in final)
            print(f"{run_dir}: {status.state} after {status.step} steps; {left}. {shown}".rstrip(), flush=True)
        return status.reason or status.state


def _load_data(cfg: Train, preference: bool) -> tuple:
    """The tokenizer, and rows and report of data.train and of data.eval (None, None without)."""
    tokenizer = data_tokenizer.load_tokenizer(
        cfg.model.tokenizer or cfg.model.path,
        revision=cfg.model.revision,
        chat_template=cfg.data.chat_template,
        trust_remote_code=cfg.model.trust_remote_code,
    )
    how = {"cfg": cfg.data, "tokenizer": tokenizer, "pairs": preference, "cache_dir": Path(cfg.cache_dir).expanduser()}
    with dist.main_first():  # rank 0 tokenises into the cache, the others read it
        train = dataset.load(cfg.data.train, **how)
        held_out = dataset.load(cfg.data.eval, **how) if cfg.data.eval else (None, None)
    return tokenizer, train, held_out


def _not_finite(step: int, rows: dataset.Rows, cfg: Train) -> str:
    indices = schedule.step_rows(step, len(rows), cfg.batch_size, cfg.seed)
    lines = {
        name: sorted(int(rows.line[i]) for i in indices if rows.files[rows.file[i]] == name) for name in rows.files
    }
    places = "; ".join(f"{name}:{','.join(map(str, numbers))}" for name, numbers in lines.items() if numbers)
    return (
        f"step {step}: the loss or its gradient is not finite; no update was made from it on, and model/ holds the "
        f"weights before it. Begin another run with a lower optim.lr, or look at the step's rows: {places}"
    )


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg) -> None:
    """One run, or one cell of a sweep; exit codes: 0 finished, 2 a user's error, 128 + signal interrupted, 1 all else."""
    sweep.run_job(lambda: train(sweep.placed(config.train_config(cfg))))


if __name__ == "__main__":
    main()
