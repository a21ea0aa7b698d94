"""One RPO, DPO or SFT run, top to bottom.

    python train.py loss=rpo_sum                              # the embedded task, on whatever is here
    torchrun --nproc-per-node 8 train.py loss=rpo_avg model.path=DIR data.train=FILE data.eval=FILE
    python train.py -m loss=rpo_sum loss.beta=0.01,0.1 loss.eta=0,0.005

`train` prepares in order (processes, data, models, optimizer) and then loops: evaluate, sample, save, one update, log, stop?
"""

import signal
import sys
from contextlib import ExitStack

import hydra
import torch
from tqdm import tqdm

from rpo import config, dist, losses
from rpo.config import Train
from rpo.data.loader import load_steps
from rpo.data.schedule import Plan
from rpo.errors import UserError
from rpo.model import policy as model_policy
from rpo.model import saving, shard
from rpo.runs.checkpoint import Checkpoints
from rpo.runs.folder import EARLY, RunFolder
from rpo.runs.log import RunLog, read_jsonl
from rpo.runs.process import Interrupt
from rpo.runs.state import TrainState, tensors_of
from rpo.synthetic import task
from rpo.training import command_line, gradients, guards, optim, prepare, sweep
from rpo.training.held_out import HeldOut, in_words, is_every
from rpo.training.meter import Meter, Throughput
from rpo.training.stopping import is_over


def train(cfg: Train) -> str:
    """Trains one model into its run folder, or resumes it; returns "finished", or the signal that interrupted it.

    Raises UserError for what the user can fix: before a model is loaded, save for what only the weights can tell (damaged
    ones, a head that the probe refuses, step 0, too little memory). FloatingPointError where a loss or gradient was not
    finite; no update was made from it on.
    """
    # ---- 1. before a model is loaded: every mistake that can be seen without weights ---------------------------------
    device = dist.init(cfg.timeout + dist.GRACE, deterministic=cfg.deterministic)
    prepare.check_machine(cfg, device)
    embedded = cfg.data.train == "gold"
    run = RunFolder.open(cfg)
    cfg = task.resolve(cfg) if embedded else cfg  # data=gold becomes files, made on first use
    run.check_settings(cfg)
    configs = prepare.model_configs(cfg)
    data = prepare.load_splits(cfg.data, cfg.model, pairs=cfg.loss.has_pairs, cache_dir=cfg.cache_dir)
    configs = prepare.check_fit(cfg, configs, data, device, embedded=embedded)
    plan = Plan(len(data.train), cfg.batch_size, cfg.seed, cfg.epochs, cfg.max_steps)
    if run.resume:
        run.resume.check_same(data.facts)
    if run.is_finished(plan.total_steps, data):
        return "finished"

    with (
        Interrupt() as interrupt,  # outermost: status.json says how the run ended whatever arrives meanwhile
        run.recording(cfg, plan.total_steps, data) as status,
        guards.watchdog(run.path, cfg.timeout) as watch,
        RunLog(run.path, cfg, enabled=dist.is_main(), after=run.log_position) as log,
        Checkpoints(run.path, cfg.checkpoint, run.resume) as checkpoints,
        ExitStack() as later,
    ):
        # ---- 2. models: the reference is scored before the optimizer takes its memory --------------------------------
        policy = prepare.policy(prepare.Spec.of_policy(cfg, configs), data, device)
        reference = prepare.reference(cfg, policy, data, device, embedded=embedded)
        data = data.with_reference(reference.logps)
        layout = "padded" if "padded" in (policy.layout, reference.layout) else "packed"
        prepare.check_budgets(data, layout, cfg.tokens_per_microbatch)  # again: layout=auto may have come to padded
        optimizer = optim.adamw(policy.model, cfg.optim)
        meter = Meter(cfg.loss, policy.noise_floor, device)
        facts = data.facts | {"model.path": policy.identity["weights"]}
        facts |= {"reference.path": reference.weights} if cfg.loss.has_reference else {}
        tensors = tensors_of(policy.model, optimizer, moving=reference.live if reference.every else None)
        state = TrainState(tensors, meter.sums, seed=cfg.seed, total_steps=plan.total_steps, facts=facts)
        if run.resume:
            run.resume.check_same(facts)
        run.write_environment(
            device,
            noise_floor=policy.noise_floor,
            layout=layout,
            attention=policy.model.attention,
            reference=reference.reports,
        )
        held_out = HeldOut(cfg, data, policy, reference, device, layout=layout, embedded=embedded)
        state.begin(run.resume)
        shard.reshard(policy.model)  # what a forward pass left gathered is of the starting weights

        # ---- 3. what the loop reads from and writes to -----------------------------------------------------------
        first = status.step = state.step
        budget = cfg.tokens_per_microbatch
        loader = load_steps(data.train, plan, layout=layout, budget=budget, device=device, start=first)
        later.callback(loader.close)
        clock, vote = Throughput(policy.size, device, policy.model), dist.Vote()
        interval = 0.2 if sys.stderr.isatty() else 30  # seconds; a log file gets few lines
        bar = tqdm(total=plan.total_steps, initial=first, unit="step", mininterval=interval, disable=not dist.is_main())
        later.enter_context(bar)  # or an error ends up in its line

        def raise_if_bad(*, weights: bool) -> None:
            """Where a loss or gradient was not finite, and model/ holds the weights before it; or where `weights` are not."""
            bad = int(state.first_bad)  # waits for the device
            if (weights or bad >= 0) and not state.weights_are_finite():
                raise FloatingPointError(guards.broken(state.step))
            if bad >= 0:
                status.step = bad
                saving.save(policy.model, data.tokenizer, run.path / "model", cfg.model.save_dtype)
                raise FloatingPointError(guards.not_finite(bad, data.train, plan))

        interrupt.defer()

        # ---- 4. the loop: evaluate, sample, save, one update, log, stop? ----------------------------------------------
        for step in range(first, plan.total_steps + 1):
            watch(f"the evaluation of step {step}")
            last = step == plan.total_steps
            if not state.evaluated:  # else the run that this one resumes had done it
                scores = {}
                if held_out.is_due(step, last=last):
                    with clock.paused():
                        scores = held_out.evaluate()
                        log.metrics("eval", step, state.pairs, scores)
                    if cfg.stop.metric:
                        state.watched.append(scores[cfg.stop.metric[4:]])
                    last = last or is_over(state.watched, cfg.stop)
                if held_out.samples_are_due(step, last=last):
                    with clock.paused():
                        log.samples(step, state.pairs, held_out.samples())
                state.evaluated = True
                if checkpoints.is_due(step, last=last) and step == first:  # its interruption saved it already
                    checkpoints.judge(step, scores)
                elif checkpoints.is_due(step, last=last):
                    raise_if_bad(weights=True)
                    with clock.paused():
                        run.write_running(step)
                        checkpoints.save(state, log.position(), scores)
            if last or is_over(state.watched, cfg.stop):  # a resumed run may begin where it has to end
                status.reason = "" if step == plan.total_steps else EARLY
                break

            # =============================================== one update ===============================================
            watch(f"step {step}")
            share, batches = next(loader)  # of this rank; with the counts of the whole step
            split = {}
            if is_every(cfg.log.gradient_split, step + 1):
                with clock.paused():
                    split = gradients.gradient_split(
                        policy.model, reference.live, data.train, share, batches, cfg, device
                    )
                watch(f"step {step}")
            for i, batch in enumerate(batches, start=1):
                shard.sync_gradients(policy.model, last=i == len(batches), fsdp=cfg.fsdp)
                with guards.naming_memory(data.train, share.microbatches[i - 1][0], cfg):
                    pairs = model_policy.score(policy.model, reference.live, batch.to(device))
                    preference_P, sft_P = losses.objective(
                        cfg.loss, pairs, step_pairs=share.pairs, step_chosen_tokens=share.chosen_tokens
                    )
                    # Count first, then divide: by the global number of pairs, known before any backward pass.
                    loss = (preference_P + sft_P).sum() * (batch.weight / share.pairs)
                    # A loss that is not finite makes its gradients so, and the clipped norm tells all ranks at once.
                    (loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)).backward()
                pairs = model_policy.since_start(pairs, batch)  # what a moving reference would hide
                meter.add(pairs, preference_P.detach(), sft_P.detach(), batch.weight)
            grad_norm = optim.clip_grad_norm(policy.model, cfg.optim.max_grad_norm)
            state.note_bad(grad_norm)
            lr = optim.lr_at(step, plan.total_steps, cfg.optim)
            optim.step_if_finite(optimizer, state.is_bad, lr)
            optimizer.zero_grad()
            reference.follow(policy.model, step + 1)
            # ==========================================================================================================

            state.step = status.step = step + 1
            state.pairs += share.pairs
            state.evaluated = False
            clock.count(share)
            stopped = vote.cast(interrupt.received)
            # Where a checkpoint keeps the sums, an interruption leaves no line that an undisturbed run has not.
            early = stopped and not cfg.checkpoint.every
            if early or is_every(cfg.log_every, step + 1) or step + 1 == plan.total_steps:
                values = meter.read()  # with a checkpoint's, the loop's only wait for the device
                raise_if_bad(weights=early or step + 1 == plan.total_steps)
                values |= {"grad_norm": float(grad_norm), "lr": lr} | split | clock.read()
                with clock.paused():
                    log.metrics("train", step + 1, state.pairs, values)
                bar.set_postfix(loss=f"{values['loss']:.4f}", pairs_s=f"{values['perf/pairs_per_second']:.1f}")
            bar.update()
            if stopped:
                status.state, status.reason = "interrupted", signal.Signals(stopped).name
                break

        # ---- 5. what is left behind --------------------------------------------------------------------------------
        bar.close()
        watch("saving")
        if status.state == "interrupted" and cfg.checkpoint.every:
            raise_if_bad(weights=True)
            if not checkpoints.save(state, log.position(), {}, wait=True):
                raise UserError(
                    f"run_dir={run.path}: interrupted at step {state.step}, which could not be saved; free some space"
                )
            log.alert(f"interrupted by {status.reason} at step {state.step}; its checkpoint is saved")
            left = f"to resume, repeat the command with run_dir={run.path}"
        else:
            best = checkpoints.lay_best_over(policy.model) if cfg.model.save == "best" else None
            status.model_step = best
            saving.save_run(policy.model, data.tokenizer, run.path, cfg.model)
            left = "model/ is written" + ("" if best is None else f", of step {best}, the best")
            left += "" if checkpoints.wait() else ", its last checkpoint is not"
        if dist.is_main():
            from rpo.training import figures  # matplotlib takes a second

            events = read_jsonl(run.path / "metrics.jsonl")
            figures.draw_run(events, run.path / "plots")
            of_model = state.step if status.model_step is None else status.model_step
            final = in_words(events, of_model) if status.state == "finished" else ""  # else it is of older weights
            early = f" ({EARLY} by {cfg.stop.metric})" if status.reason == EARLY else ""
            print(f"{run.path}: {status.state} after {state.step} steps{early}; {left}. {final}".rstrip(), flush=True)
        return status.reason if status.state == "interrupted" else status.state


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg) -> None:
    """One run, or one cell of a sweep; exit codes: 0 finished, 2 a user's error, 128 + signal interrupted, 1 all else."""
    sweep.run_job(lambda: train(sweep.placed(config.train_config(cfg))))


def cli() -> None:
    """`rpo-train`, and this file."""
    command_line.run(main, Train)


if __name__ == "__main__":
    cli()
