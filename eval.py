"""One evaluation task: a table on screen, and results.json with samples.jsonl in its folder, in one form for all tasks.

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

Where a model is a run's `model/`, what is omitted (reference, data, beta) is read from that run's config.yaml. An
evaluation that was interrupted resumes when its command is repeated with the same run_dir, whatever its task.
"""

import sys
from typing import Any

import hydra

from rpo import dist
from rpo.evals import results, settings
from rpo.evals.context import Context
from rpo.evals.settings import Eval
from rpo.runs import folder as run_folder
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
from rpo.training import command_line

# The one place where a task is added. Of each module: Settings, check(cfg), run(cfg, ctx) and, where cells are not all
# that it shows, table(evaluation).
_MODULES = (pairs, generate, gold, overopt, winrate, mt_bench, alpaca_eval, judge_check, lm_eval, mbpp, select)
_MODULES += (compare, report)
TASKS = {module.__name__.rpartition(".")[2]: module for module in _MODULES}


def eval_config(cfg: Any) -> Eval:
    """Checked settings of one evaluation, from Hydra's DictConfig. Raises UserError in one line, before a model is loaded."""
    return settings.build(cfg, TASKS)


def evaluate(cfg: Eval) -> str:
    """Runs the task, or resumes it; returns "finished". Raises UserError."""
    task = TASKS[cfg.task.kind]
    with Context(cfg, dist.init()) as ctx:
        evaluation = task.run(cfg, ctx)
        ctx.begin()
        if dist.is_main():
            run_folder.write_environment(ctx.run_dir, ctx.device)
        table = getattr(task, "table", results.table)
        dist.on_main(results.write, ctx.run_dir, cfg, evaluation, table)
    return "finished"


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(cfg) -> None:
    """One evaluation; exit codes: 0 finished, 2 a user's error, 1 anything else."""
    from rpo.training import sweep

    sys.stdout.reconfigure(errors="backslashreplace")  # a model's name may hold what the terminal cannot show
    sweep.run_job(lambda: evaluate(sweep.placed(eval_config(cfg))))


def cli() -> None:
    """`rpo-eval`, and this file."""
    command_line.run(main, Eval)


if __name__ == "__main__":
    cli()
