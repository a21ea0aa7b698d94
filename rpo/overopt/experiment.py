"""The study of overoptimisation: every arm trained and evaluated over paired seeds, then one table and its figures.

    python -m rpo.overopt.experiment FOLDER      # make overopt; the same command resumes it

An arm is one `train.py -m recipe=overopt` over all seeds and its own grid, and one `eval.py task=overopt` of its runs.
A seed decides pairs, labels and order, so arms of one task are compared on the same data, step for step.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from rpo import config
from rpo.overopt import selection
from rpo.overopt.curve import gold_at, value
from rpo.overopt.figures import draw_study
from rpo.overopt.selection import Limits
from rpo.runs import groups
from rpo.runs.groups import Group
from rpo.runs.process import Interrupt
from rpo.text import in_quotes

WORKERS = 2  # arms at once, one thread each: the model is too small for more
DPO, RPO = ("loss=dpo", "loss.beta=0.02"), ("loss=rpo_sum", "loss.beta=0.02", "loss.eta=0.25")
AVG = ("loss=rpo_avg", "loss.beta=0.02", "loss.eta=0.1")
ARMS = {
    "dpo": ("loss=dpo", "loss.beta=0.02,0.05,0.1,0.3"),
    "dpo_beta": ("loss=dpo", "loss.beta=1,3"),
    "rpo_sum": ("loss=rpo_sum", "loss.beta=0.02", "loss.eta=0.005,0.05,0.25"),
    "rpo_sum_beta": ("loss=rpo_sum", "loss.beta=0.05,0.1,0.3", "loss.eta=0.25"),
    "rpo_avg": AVG,
    "rpo_avg_beta": ("loss=rpo_avg", "loss.beta=0.1,0.5", "loss.eta=0.2"),  # beta .5 is the preset
    "ipo": ("loss=ipo", "loss.beta=0.1,1"),
    "hinge": ("loss=hinge", "loss.beta=0.02"),
    "cdpo": (*DPO, "loss.label_smoothing=0.25"),  # the true share of flips
    # Controls.
    "sft": ("loss=sft",),  # on the chosen answers: what imitation alone gains
    "dpo_lr": (*DPO, "optim.lr=1e-4"),
    "noise_dpo": (*DPO, "data.gold.flip=0,0.1,0.4"),
    "noise_rpo": (*RPO, "data.gold.flip=0,0.1,0.4"),
    "open_dpo": (*DPO, "data.gold.hidden_weight=0"),  # nothing in the reward is hidden from the pairs
    "open_rpo": (*RPO, "data.gold.hidden_weight=0"),
    "length_dpo": (*DPO, "data.gold.length_weight=0.1"),
    "length_rpo": (*RPO, "data.gold.length_weight=0.1"),
    "length_avg": (*AVG, "data.gold.length_weight=0.1"),
}
DPO_NAME, RPO_NAME, AVG_NAME = "DPO beta 0.02", "RPO sum beta 0.02 eta 0.25", "RPO avg beta 0.02 eta 0.1"
PLAIN = ("dpo", "rpo_sum", "rpo_avg")
# Tables of the page: arms, and of their losses those shown (none: all).
TABLES = {
    "Losses": ((*PLAIN, "dpo_beta", "rpo_sum_beta", "rpo_avg_beta", "ipo", "hinge", "cdpo", "sft"), ()),
    "Learning rate": (("dpo", "dpo_lr"), (DPO_NAME,)),
    "Label noise": ((*PLAIN, "noise_dpo", "noise_rpo"), (DPO_NAME, RPO_NAME)),
    "Nothing hidden": ((*PLAIN, "open_dpo", "open_rpo"), (DPO_NAME, RPO_NAME)),
    "Length pays": ((*PLAIN, "length_dpo", "length_rpo", "length_avg"), (DPO_NAME, RPO_NAME, AVG_NAME)),
}
DRAWN = (DPO_NAME, "DPO beta 0.1", "DPO beta 0.3", "DPO beta 1")
DRAWN += ("RPO sum beta 0.02 eta 0.005", "RPO sum beta 0.02 eta 0.05", RPO_NAME, AVG_NAME)
# Where a run would have been stopped without gold: within a KL, or before the top-10 entropy fell twice in a row, a
# warning sign of arXiv 2410.11677. Both were picked with results in view, the same for all arms.
STOPS = {
    "KL within 4 nats": Limits(max_kl=4, entropy_falls=None, max_displacement=None, min_ended=None),
    "entropy": Limits(max_kl=None, entropy_falls=2, max_displacement=None, min_ended=None),
}
KL_LEVELS = (0.5, 1.0, 2.0)  # nats at which runs are compared


# ---- training and evaluating


_CHILDREN: set[subprocess.Popen] = set()  # that run now


def _command(script: str) -> list[str]:
    return [sys.executable, "-m", f"rpo.{script}"]


def _run(script: str, *args: str) -> None:
    """`train` or `eval` in a process of one thread; its output goes to our own. Raises where it fails."""
    print(f"rpo-{script}", *args, flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*_command(script), *args], env=env) as child:
        _CHILDREN.add(child)
        code = child.wait()
    _CHILDREN.remove(child)
    if code:
        raise subprocess.CalledProcessError(code, child.args)


def _at(key: str, path: str | Path) -> str:
    return f"{key}={in_quotes(str(path))}"


def _train(folder: Path, arm: str, seeds: list[int]) -> None:
    overrides = ["recipe=overopt", *ARMS[arm]]
    if arm != "sft":
        # The seed is the outer loop: a sweep keeps model, data and reference from one cell to the next.
        return _run("train", "-m", f"seed={','.join(map(str, seeds))}", *overrides, _at("run_dir", folder / arm))
    # data=gold with loss=sft would read the corpus: here it is the chosen answers of the pairs.
    paired = {run["seed"]: run for run in map(config.read_yaml, sorted((folder / "dpo").glob("*/config.yaml")))}
    for seed in seeds:
        files = [_at(f"data.{split}", paired[seed]["data"][split]) for split in ("train", "eval")]
        model = _at("model.path", paired[seed]["model"]["path"])
        _run("train", f"seed={seed}", *overrides, *files, model, _at("run_dir", folder / arm / str(seed)))


def make(folder: Path, seeds: list[int]) -> None:
    """Trains and evaluates every arm into `folder`, WORKERS at a time; what is there already is kept."""

    def one(arm: str) -> None:
        _train(folder, arm, seeds)
        _run("eval", "task=overopt", _at("runs", folder / arm), _at("run_dir", folder / "eval" / arm))

    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            one("dpo")  # first: it makes the pairs' files
            list(pool.map(one, [arm for arm in ARMS if arm != "dpo"]))
        except BaseException:  # a failed arm, or a signal: neither starts another arm, nor leaves one running
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(_CHILDREN):
                child.terminate()
            raise


# ---- what came out


def read(folder: Path, arms: Sequence[str]) -> list[Group]:
    """The evaluated runs of `arms`, grouped over seeds."""
    return groups.group([run for arm in arms for run in selection.read(str(folder / "eval" / arm))])


def stopped(run: dict, limits: Limits | None) -> tuple[float, float]:
    """(step, gold) of a run at the last checkpoint before the first that violates `limits`, which may be step 0.

    None: where gold peaks, as an oracle would; such a maximum of noisy numbers is flattered by the choice.
    """
    if limits is None:
        return run["summary"]["step/peak"], run["summary"]["gold/peak"]
    failed = selection.violations(run["curve"], limits)
    first = next((i for i, reasons in enumerate(failed) if reasons), len(failed))
    point = run["curve"][max(first - 1, 0)]
    return point["step"], value(point, "gold")


def _cell(values: Sequence[float | None], digits: int = 2, spread: bool = False) -> str:
    """Mean over seeds, with standard deviation where `spread`; a dash where a seed lacks it."""
    if None in values:
        return "-"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if spread and len(values) > 1 else "")


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def table(shown: Sequence[Group]) -> str:
    """A line per group: means over seeds, with standard deviations where they decide."""
    columns = {
        "gold: peak": ("gold/peak", 2, False),
        "end": ("gold/final", 2, True),
        "drop": ("gold/drop", 2, True),
        "KL at the end": ("kl/final", 1, False),
        "shift/chosen": ("shift/chosen", 1, False),
        "accuracy: at the peak": ("accuracy/peak", 3, False),
        "at the end": ("accuracy/final", 3, False),
    }
    lines = []
    for group in shown:
        cells = [_cell([run["summary"][name] for run in group.runs], *form) for name, *form in columns.values()]
        cells += [_cell([gold_at(run["curve"], level) for run in group.runs]) for level in KL_LEVELS]
        tokens = [value(run["curve"][-1], "samples/length") for run in group.runs]
        lines.append([group.label, *cells, _cell(tokens, 1)])
    return _markdown(["", *columns, *(f"gold at KL {level:g}" for level in KL_LEVELS), "tokens"], lines)


def stopping(shown: Sequence[Group]) -> str:
    """Gold at the end, and gold and step where an oracle and the rules of STOPS would have stopped."""
    rules, lines = {"at its peak": None} | STOPS, []
    for group in shown:
        cells = [_cell([run["summary"]["gold/final"] for run in group.runs], spread=True)]
        for limits in rules.values():
            steps, golds = zip(*(stopped(run, limits) for run in group.runs), strict=True)
            cells += [_cell(golds, spread=True), _cell(steps, 0)]
        lines.append([group.label, *cells])
    return _markdown(["gold", "at the end", *(cell for rule in rules for cell in (rule, "step"))], lines)


def differences(shown: Sequence[Group], against: str) -> str:
    """Gold at the end and its drop, each group minus `against` on the same seeds, with 95% intervals."""
    base, lines = next(group for group in shown if group.label == against), []
    for group in shown:
        if group is not base:
            gaps = [groups.paired_difference(group, base, entry) for entry in ("gold/final", "gold/drop")]
            ends = [" [{:+.2f}, {:+.2f}]".format(*gap["ci"]) if gap["ci"] else "" for gap in gaps]
            lines.append([group.label, *(f"{gap['mean']:+.2f}{end}" for gap, end in zip(gaps, ends, strict=True))])
    return _markdown([f"minus {against}", "gold at the end", "drop"], lines)


def report(folder: Path) -> str:
    """The page's tables as Markdown, written to FOLDER/overoptimisation.md beside plots/."""
    parts = []
    for title, (arms, losses) in TABLES.items():
        shown = [group for group in read(folder, arms) if not losses or groups.name(group.loss) in losses]
        parts += [f"## {title}", table(shown)]
        if title == "Losses":
            parts += ["## Differences on the same seeds", differences(shown, RPO_NAME), "## Stopping", stopping(shown)]
            draw_study([group for group in shown if group.label in DRAWN], folder / "plots")
            draw_study(shown, folder / "plots" / "all")
    page = "\n\n".join(parts)
    (folder / "overoptimisation.md").write_text(page + "\n")
    return page


def main() -> None:
    parser = argparse.ArgumentParser("python -m rpo.overopt.experiment", description="The study of overoptimisation.")
    parser.add_argument("folder", type=Path, help="of its runs and results; the same folder again resumes it")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5); a task of its own for each")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.seeds < 1:
        sys.exit(f"error: --seeds={args.seeds}: expected at least 1")
    try:
        with Interrupt():
            make(folder, list(range(args.seeds)))
    except KeyboardInterrupt as stop:
        sys.exit(128 + stop.args[0])
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(f"error: python {' '.join(error.cmd[1:])}: exit code {error.returncode}")
    print(report(folder), (folder / "overoptimisation.md").resolve(), sep="\n")


if __name__ == "__main__":
    main()
