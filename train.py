"""One RPO, DPO or SFT run, top to bottom.

    python train.py loss=rpo_sum                              # the embedded task, on whatever is here
    torchrun --nproc-per-node 8 train.py loss=rpo_avg model.path=DIR data.train=FILE data.eval=FILE
    python train.py -m loss=rpo_sum loss.beta=0.01,0.1 loss.eta=0,0.005

`train` builds in order (processes, data, models, optimizer) and then loops: evaluate, sample, stop?, one update, log.
"""

import sys
import time
from pathlib import Path

import hydra
import numpy as np
import torch
from tqdm import tqdm

from rpo import config, data, dist, gold, losses, metrics, models, optim, packing, plots, rundir, score, sweep, tokens
from rpo.config import Train, UserError
from rpo.generate import Sampling, sample

SHOWN = ("rewards/accuracies", "loss/preference", "shift/chosen", "nll/chosen", "gold", "kl")  # in the last line
NUM_SAMPLES = 4  # held-out prompts answered every `sample_every` steps
MAX_NEW_TOKENS = 128  # of those answers, where the model has positions for them


def train(cfg: Train) -> str:
    """Trains one model into its run folder; returns how it ended: finished, or interrupted by SIGINT.

    Raises UserError for what the user can mend: before a model is loaded, save for what only the weights can tell
    (damaged ones, a head that `probe` refuses, step 0). FloatingPointError where a loss or gradient was not finite;
    no update was made from it on.
    """
    # ---- all that can be refused before a model is loaded ----------------------------------------------------------
    device = dist.init()
    ranks = {"rank": dist.rank(), "world_size": dist.world_size()}
    metrics.wandb_mode(cfg.wandb)
    if cfg.batch_size < dist.world_size():
        raise UserError(f"batch_size={cfg.batch_size}: fewer pairs than the {dist.world_size()} ranks; raise it")
    if cfg.fsdp.cpu_offload and device.type == "cpu":
        raise UserError("fsdp.cpu_offload=true: there is no GPU to offload from; set it to false")
    run_dir = rundir.choose(cfg.run_dir, f"{cfg.loss.preference}_{cfg.loss.sft}")
    embedded = cfg.data.train == "gold"
    if embedded:
        with dist.main_first():  # rank 0 makes the task on first use
            cfg = gold.prepare(cfg)

    preference = cfg.loss.preference != "none"
    hf = models.check_paths(cfg.model, cfg.reference)
    tokenizer = tokens.load_tokenizer(
        cfg.model.tokenizer or cfg.model.path, revision=cfg.model.revision, chat_template=cfg.data.chat_template
    )
    if cfg.model.path is None:
        hf["model.architecture"] = models.config_for(cfg.model.architecture, tokenizer)
    read = {"cfg": cfg.data, "tokenizer": tokenizer, "pairs": preference, "cache_dir": Path(cfg.cache_dir).expanduser()}
    with dist.main_first():  # rank 0 tokenises into the cache, the others read it
        rows, report = data.load(cfg.data.train, **read)
        eval_rows, eval_report = data.load(cfg.data.eval, **read) if cfg.data.eval else (None, None)
    models.check_fit(hf, tokenizer, max(packing.longest(r) for r in (rows, eval_rows) if r))

    with (
        rundir.recording(run_dir) as status,
        rundir.Interrupt() as interrupt,
        metrics.Writer(run_dir, cfg.wandb, config.to_dict(cfg), enabled=dist.is_main()) as writer,
    ):
        if dist.is_main():
            (run_dir / "config.yaml").write_text(config.to_yaml(cfg))
            rundir.write_json(run_dir / "data_report.json", {"train": report, "eval": eval_report})
            read = [
                f"{name} {data.describe(made)}" for name, made in (("train", report), ("eval", eval_report)) if made
            ]
            print(f"{run_dir}: {', '.join(read)}", flush=True)

        # ---- models: load, then checkpoint, compile, shard ---------------------------------------------------------
        compute = models.compute_dtype(cfg.model.dtype, device)
        master = torch.promote_types(compute, torch.float32)
        if cfg.model.path is None:
            lm = models.build(hf["model.architecture"], cfg.seed, master)
        else:
            lm = models.load(cfg.model.path, cfg.model.revision, master)
        size = metrics.ModelSize(**models.sizes(lm))
        shard = {"mesh": dist.mesh(device), "fsdp": cfg.fsdp, "compute_dtype": compute, "compile": cfg.compile}
        policy = models.prepare(lm, **shard, trainable=True)
        optimizer = optim.adamw(policy, cfg.optim)
        reference = None
        if preference:  # read anew, not copied: a rank's host memory never holds two whole models
            path, revision = (cfg.reference.path, None) if cfg.reference.path else (cfg.model.path, cfg.model.revision)
            other = models.load(path, revision, master, key="reference.path")
            reference = models.prepare(other, **shard, trainable=False)

        # ---- what rounding alone does to these weights, and whether the run starts where it should -----------------
        probe = packing.plan_step(rows, data.step_rows(0, len(rows), 8, cfg.seed), budget=cfg.tokens_per_microbatch)
        probe_rows = probe.microbatches[0][0]
        positions = models.positions_of(hf)
        noise_floor = dist.broadcast(score.noise_floor(policy, rows, probe_rows, device, positions=positions))
        if preference and (path, revision) == (cfg.model.path, cfg.model.revision):
            gap = dist.broadcast(score.mean_gap(policy, reference, rows, probe_rows, device))
            if not gap <= 3 * noise_floor + 1e-6:
                raise UserError(
                    f"step 0: policy and reference are the same weights but differ by {gap:.1e} nats per token (rounding "
                    f"explains {noise_floor:.1e}); usual causes: dropout, or two ways of computing one model"
                )
        if dist.is_main():
            rundir.write_json(run_dir / "environment.json", rundir.environment(device, noise_floor=noise_floor))

        # ---- accumulators, and what the loop calls -----------------------------------------------------------------
        total_steps = cfg.max_steps or cfg.epochs * data.steps_per_epoch(len(rows), cfg.batch_size)
        meter_args = {"preference": preference, "beta": cfg.loss.beta, "noise_floor": noise_floor}
        meter, eval_meter = metrics.Meter(device, **meter_args), metrics.Meter(device, **meter_args)
        bad_step = torch.full((), -1, device=device)  # the first step that was not finite; sticky
        stop_ids = tokens.stop_ids(tokenizer, cfg.data.template_date)
        num_prompts = min(len(eval_rows or []), cfg.data.gold.samples if embedded else NUM_SAMPLES)
        prompts = [eval_rows.row(i)[0].tolist() for i in range(num_prompts)]

        @torch.no_grad()
        def evaluate() -> dict[str, float]:
            plan = packing.plan_step(eval_rows, np.arange(len(eval_rows)), budget=cfg.tokens_per_microbatch, **ranks)
            counts = {"step_pairs": plan.pairs, "step_chosen_tokens": plan.chosen_tokens}
            for members, weight in plan.microbatches:
                batch = packing.padded_batch(eval_rows, members, weight=weight).to(device)
                pairs = score.score(policy, reference, batch)
                eval_meter.add(pairs, *losses.objective(cfg.loss, pairs, **counts), weight)
            values = eval_meter.read()
            if embedded and preference:
                generation = {"device": device, "seed": cfg.seed, "reshard": cfg.fsdp.reshard_after_forward}
                values |= gold.evaluate(policy, reference, tokenizer, prompts, stop_ids, cfg.data.gold, **generation)
            return values

        def answers() -> list[dict[str, str]]:
            generation = {"device": device, "seed": [cfg.seed], "reshard": cfg.fsdp.reshard_after_forward}
            generation |= {"batch_size": NUM_SAMPLES}
            asked = prompts[:NUM_SAMPLES]
            room = min(MAX_NEW_TOKENS, positions - max(map(len, asked)))
            sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=room)
            columns = {
                "prompt": asked,
                "policy": [c.ids for c in sample(policy, asked, sampling, stop_ids, **generation)],
            }
            if preference:
                columns["reference"] = [c.ids for c in sample(reference, asked, sampling, stop_ids, **generation)]
            texts = {name: tokenizer.batch_decode(ids) for name, ids in columns.items()}
            return [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]

        # ---- the loop: evaluate, sample, stop?, one update, log ------------------------------------------------------
        vote, held_out = dist.Vote(), {}
        pairs_seen, busy, done = 0, 0.0, np.zeros(3)  # seconds in updates; pairs, tokens, FLOPs since the last line
        interval = 0.2 if sys.stderr.isatty() else 30  # seconds; a log file gets few lines
        progress = tqdm(total=total_steps, unit="step", disable=not dist.is_main(), mininterval=interval)
        for step in range(total_steps + 1):
            last = step == total_steps
            eval_now = step == 0 or last or (cfg.eval_every and step % cfg.eval_every == 0)
            sample_now = cfg.sample_every and (last or step % cfg.sample_every == 0)
            if done.any() and (eval_now or sample_now):  # updates still under way on the device belong to `busy`
                busy += metrics.wait(device)
            if eval_rows is not None and eval_now:
                held_out = evaluate()
                writer.log("eval", step, pairs_seen, held_out)
            if prompts and sample_now:
                writer.log_samples(step, pairs_seen, answers())
            if last:
                break

            # =============================================== one update ===============================================
            start = time.perf_counter()
            indices = data.step_rows(step, len(rows), cfg.batch_size, cfg.seed)
            plan = packing.plan_step(rows, indices, budget=cfg.tokens_per_microbatch, **ranks)
            counts = {"step_pairs": plan.pairs, "step_chosen_tokens": plan.chosen_tokens}
            for i, (members, weight) in enumerate(plan.microbatches, start=1):
                policy.set_requires_gradient_sync(i == len(plan.microbatches) or cfg.fsdp.accumulate == "sharded")
                batch = packing.padded_batch(rows, members, weight=weight).to(device)
                pairs = score.score(policy, reference, batch)
                preference_P, sft_P = losses.objective(cfg.loss, pairs, **counts)
                # Count first, then divide: by the global number of pairs, known before any backward pass.
                loss = (preference_P + sft_P).sum() * (weight / plan.pairs)
                # A loss that is not finite makes its gradients so, and the clipped norm tells all ranks at once.
                loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
                loss.backward()
                meter.add(pairs, preference_P.detach(), sft_P.detach(), weight)
            grad_norm = optim.clip_grad_norm(policy, cfg.optim.max_grad_norm)
            bad_step = torch.where((bad_step < 0) & ~grad_norm.isfinite(), step, bad_step)
            lr = optim.lr_at(step, total_steps, cfg.optim)
            optim.step_if_finite(optimizer, bad_step >= 0, lr)
            optimizer.zero_grad()
            # ==========================================================================================================

            pairs_seen += plan.pairs
            lengths = rows.prompt[indices], rows.chosen[indices], rows.rejected[indices]
            done += plan.pairs, plan.unique_tokens, size.step_flops(*lengths)
            status.state = "interrupted" if vote.cast(interrupt.received) else "finished"
            if status.state == "interrupted" or (step + 1) % cfg.log_every == 0 or step + 1 == total_steps:
                values = meter.read()  # the loop's only wait for the device
                if (bad := int(bad_step)) >= 0:
                    status.step = bad
                    models.save(policy, tokenizer, run_dir / "model")
                    raise FloatingPointError(_not_finite(bad, rows, cfg))
                busy += time.perf_counter() - start
                rate = dict(zip(("pairs_per_second", "tokens_per_second", "mfu"), done / busy, strict=True))
                values |= {"grad_norm": float(grad_norm), "lr": lr}
                values |= metrics.performance(rate, device, dist.world_size())
                writer.log("train", step + 1, pairs_seen, values)
                progress.set_postfix(loss=f"{values['loss']:.4f}", pairs_s=f"{rate['pairs_per_second']:.1f}")
                busy, done = 0.0, np.zeros(3)
            else:
                busy += time.perf_counter() - start
            progress.update()
            status.step = step + 1
            if status.state == "interrupted":
                break
        progress.close()

        # ---- what stays ------------------------------------------------------------------------------------------------
        models.save(policy, tokenizer, run_dir / "model")
        if dist.is_main():
            plots.draw_run(metrics.read_jsonl(run_dir / "metrics.jsonl"), run_dir / "plots")
            shown = ", ".join(f"{name} {held_out[name]:.4g}" for name in SHOWN if name in held_out)
            print(f"{run_dir}: {status.state} after {status.step} steps; model/ is written. {shown}", flush=True)
        return status.state


def _not_finite(step: int, rows: data.Rows, cfg: Train) -> str:
    indices = data.step_rows(step, len(rows), cfg.batch_size, cfg.seed)
    lines = {
        name: sorted(int(rows.line[i]) for i in indices if rows.files[rows.file[i]] == name) for name in rows.files
    }
    places = "; ".join(f"{name}:{','.join(map(str, numbers))}" for name, numbers in lines.items() if numbers)
    return (
        f"step {step}: the loss or its gradient is not finite; no update was made from it on, and model/ holds the "
        f"weights before it. Lower optim.lr, or look at the step's rows: {places}"
    )


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg) -> None:
    """One run, or one cell of a sweep; exit codes: 0 finished, 2 a user's error, 130 interrupted, 1 anything else."""
    sweep.run_job(lambda: train(sweep.placed(config.train_config(cfg))))


if __name__ == "__main__":
    main()
