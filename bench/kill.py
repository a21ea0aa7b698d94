"""Does a run that is killed again and again, anywhere, end as one that was left alone?

    python bench/kill.py --kills 200 --seed 0
    python bench/kill.py --kills 20 --ranks 2 --lora

One run of a tiny Llama is started and killed (SIGKILL) until that has happened so often, then left to finish and compared
with an undisturbed run of the same command. Half of the kills come after a random time, half just before a random file
operation in the run's folder (Python's audit events): the windows between two files of a checkpoint are too short to be
hit by time alone. Of several ranks one dies first and the others up to 50 ms later, as their agent would have it. Every
start draws its own checkpoint.every (1 to 3), keep and blocking.

Starts are forked from a server that has imported everything: real processes, which cost 1 s and not 8.
"""

import argparse
import json
import math
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = ["train", "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto"]
EVENTS = ("open", "os.mkdir", "os.rename", "os.symlink", "os.truncate", "os.remove", "os.rmdir", "shutil.rmtree")
WORDS = [f"{first}{second}" for first in "bcdfg" for second in ("a", "e", "i", "o", "u", "an", "en", "in")]
DIE = partial(signal.raise_signal, signal.SIGKILL)
Act = tuple[str, int, Callable[[], object]]  # a path, the so-manieth file operation there, what to do before it
TEMPLATE = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] }}{{ eos_token if m['role'] == 'assistant' else ' ' }}"
TEMPLATE += "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"


# ---- starting a run


def spawn(args: list, log: Path, *, ranks: int = 1, at: Sequence[Act] = (), of: int = 0, **env: str) -> list[Process]:
    """The processes of `python train.py ARGS`, one per rank, started; they print to `log`.

    `at`: what rank `of` does to itself before its n-th file operation under a path.
    """
    # What the server is started with lasts: threads of a parent would not live on in a fork.
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of semaphores that those who were killed have left
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    processes = []
    for rank, group in enumerate(_groups(ranks)):
        how = [str(arg) for arg in args], str(log), group | env, list(at) if rank == of else []
        processes.append(server.Process(target=_play, args=how, daemon=True))
        processes[-1].start()
    return processes


def _groups(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each rank; nothing where there is one."""
    if ranks == 1:
        return [{}]
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _play(args: list[str], log: str, env: dict[str, str], at: list[Act]) -> None:
    os.environ |= env
    time.tzset()
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = [str(ROOT / "train.py"), *args]
    for act in at:
        sys.addaudithook(_Hook(*act))
    runpy.run_path(sys.argv[0], run_name="__main__")


class _Hook:
    """An audit hook that acts before the n-th file operation on `path` or under it."""

    def __init__(self, path: str, n: int, action: Callable[[], object]):
        self.path, self.left, self.action, self.tree = path, n, action, ""

    def __call__(self, event: str, args: tuple) -> None:
        if event not in EVENTS:
            return
        path = str(args[event == "os.symlink"])
        if event == "shutil.rmtree":
            self.tree = path
        if event in ("os.remove", "os.rmdir") and not path.startswith("/"):  # rmtree names them by their open folder
            path = f"{self.tree}/{path}"
        if f"{path}/".startswith(f"{self.path}/"):
            self.left -= 1
            if self.left == 0:
                os.write(2, f"\nbefore {event} {path}: {self.action}\n".encode())
                self.action()


# ---- looking at a run's folder


def events(path: Path) -> list[dict]:
    """The whole lines of a JSONL file, without what the clock and the machine decide."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in event.items() if k != "time" and not k.startswith("perf/")} for event in whole]


def steps(run_dir: Path) -> list[int]:
    """The steps that have a checkpoint, going by the folders' names."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*") if not path.suffix)


def reached(run_dir: Path) -> int:
    return max((event["step"] for event in events(run_dir / "metrics.jsonl")), default=0)


def landed(run_dir: Path, keep: int, began: float, printed: str) -> str:
    """What a run was about when it was killed, by what it has left behind since `began`."""
    folder, here = run_dir / "checkpoints", steps(run_dir)
    parts = {path.name: path for path in folder.glob("*.part") if path.lstat().st_mtime >= began}
    if any(name.endswith(".old.part") for name in parts):
        return "pruning: half deleted"
    if "latest.part" in parts:
        return "save: renamed, link in the making"
    if parts:
        files = {path.name for part in parts.values() for path in part.iterdir()}
        stage = next(
            (n for n in ("manifest.json", "state.json") if n in files), "tensors" if files else "an empty folder"
        )
        return f"save: {stage} begun"
    if "step/s" not in printed:  # of the loop's progress bar
        return "start-up"
    if here and (folder / "latest").resolve() != (folder / f"step_{here[-1]:08d}").resolve():
        return "save: renamed, not linked"
    if (run_dir / "model.part").exists() or (run_dir / "model").exists():
        return "the end: model/ and after"
    saved = here and (folder / f"step_{here[-1]:08d}").stat().st_mtime >= began
    return "pruning: not begun" if saved and len(here) > keep else "steps, evaluation, samples"


def differences(run_dir: Path, whole: Path) -> dict[str, float]:
    """max |difference| of all that two runs leave, infinite where it is not even of one shape: 0 throughout, if equal.

    Of checkpoints those that both have; the newest must be among them.
    """
    found = dict.fromkeys(("weight", "exp_avg", "exp_avg_sq", "step", "buffer", "counters, running sums, RNG"), 0.0)
    common = set(steps(run_dir)) & set(steps(whole))
    for step in common:
        folders = [folder / f"checkpoints/step_{step:08d}" for folder in (run_dir, whole)]
        tensors, states = [_tensors(folder) for folder in folders], [_state(folder) for folder in folders]
        for kind in list(found)[:-1]:
            of_kind = [{k: v for k, v in both.items() if k.split(":")[1].startswith(f"{kind}/")} for both in tensors]
            found[kind] = max(found[kind], _gap(*of_kind))
        if (
            states[0]["evaluated"] != states[1]["evaluated"]
        ):  # an interruption saved one of them, before the evaluation's lines
            states = [state | {"evaluated": None, "position": None} for state in states]
        if states[0] != states[1]:
            found["counters, running sums, RNG"] = math.inf
    links = [(folder / "checkpoints/latest").resolve().name for folder in (run_dir, whole)]
    newest = [f"step_{max(steps(folder), default=0):08d}" for folder in (run_dir, whole)]
    found["latest"] = 0.0 if common and len({*links, *newest}) == 1 else math.inf
    found["model/"] = _gap(*(_tensors(folder / "model") for folder in (run_dir, whole)))
    files = [
        {p.name: p.read_bytes() for p in (f / "model").iterdir() if p.suffix != ".safetensors"}
        for f in (run_dir, whole)
    ]
    found["model/'s other files"] = 0.0 if files[0] == files[1] else math.inf
    found["metrics"] = _gap(*(_flat(events(folder / "metrics.jsonl")) for folder in (run_dir, whole)))
    found["samples"] = 0.0 if events(run_dir / "samples.jsonl") == events(whole / "samples.jsonl") else math.inf
    return found


def _state(folder: Path) -> dict:
    """state.json without what may differ: the lines' times are of other lengths, the best is of other checkpoints."""
    state = json.loads((folder / "state.json").read_text())
    state["position"] = state["position"]["events"], state["position"]["samples.jsonl"]
    return {name: value for name, value in state.items() if name != "best"}


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return {f"{p.name}:{name}": t for p in folder.glob("*.safetensors") for name, t in load_file(p).items()}


def _flat(lines: list[dict]) -> dict[str, np.ndarray]:
    """Every number by line and name; what is not a number becomes part of the name."""
    flat = {}
    for i, line in enumerate(lines):
        flat |= {f"{i} {line['split']} {name}": np.array(value) for name, value in line.items() if name != "split"}
    return flat


def _gap(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        return math.inf
    gaps = [np.abs(a[k].astype(np.float64) - b[k].astype(np.float64)).max(initial=0.0) for k in a]
    return float(np.nan_to_num(max(gaps, default=0.0), nan=math.inf))


# ---- killing it


@dataclass
class Kill:
    """One start that was ended by SIGKILL."""

    first_step: int
    every: int
    keep: int
    blocking: bool
    by: str  # a time in seconds, or a folder and how many of the operations in it
    where: str = ""
    part: bool = False  # whether a folder of a save in hand was there
    last_step: int = 0
    lost: int = 0  # steps that the next start makes again


@dataclass
class Campaign:
    """What became of a run that was killed so often."""

    kills: list[Kill] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def lost(self, blocking: bool) -> int:
        return max((kill.lost for kill in self.kills if kill.blocking == blocking), default=0)


def until_done(args: list, log: Path, *, ranks: int = 1, timeout: int = 300) -> None:
    """Runs to the end, undisturbed. Raises RuntimeError with the log's end where that fails."""
    processes = spawn(args, log, ranks=ranks)
    for process in processes:
        process.join(timeout)
    if any(process.exitcode != 0 for process in processes):
        for process in processes:
            process.kill()
        raise RuntimeError(f"exit codes {[p.exitcode for p in processes]}: {log.read_text()[-3000:]}")


def campaign(args: list, folder: Path, kills: int, *, total: int, seed: int = 0, ranks: int = 1, say=print) -> Campaign:
    """Kills a run of `args` (which say neither run_dir nor max_steps) `kills` times in `folder`; it makes `total` steps.

    What is drawn keeps it at `total` x kills so far / 90% of all: where it is ahead it is killed at its start, which is so
    tested as well, and the last tenth falls into its end. A run that is done before gets fewer.
    """
    began, rng, done = time.monotonic(), np.random.default_rng(seed), Campaign()
    folder.mkdir(parents=True, exist_ok=True)
    run_dir, whole = folder / "killed", folder / "whole"
    args = [*args, f"max_steps={total}", "log_every=1"]
    until_done([*args, f"run_dir={whole}", f"cache_dir={folder / 'other cache'}"], folder / "whole.log", ranks=ranks)
    args += [f"run_dir={run_dir}", f"cache_dir={folder / 'cache'}"]
    patience = 2.0  # seconds of a start-up, as last seen
    wrote = (1, True)  # checkpoint.every and blocking of the start that made the last line
    while len(done.kills) < kills:
        first, at_most = max(steps(run_dir), default=0), total * len(done.kills) / (0.9 * kills)
        kill = Kill(first, int(rng.integers(1, 4)), int(rng.integers(1, 4)), bool(rng.integers(2)), "")
        near, early = first >= total - 8, first > at_most
        by_time = bool(rng.integers(2)) and not near  # near its end a run may be done before its time has come
        at, moment = None, float(rng.uniform())
        until = 0 if early or near else first + int(rng.integers(0, 9))  # a step, and a moment more
        if not by_time:
            under = "/model.part" if near else str(rng.choice(["", "", "/checkpoints"]))
            at = f"{run_dir}{under}", int(rng.integers(1, 8 if near else 40 if early else 150)), DIE
        kill.by = (
            f"{at[0]} {at[1]}" if at else f"{moment:.3f} after step {until}" if until else f"{moment:.3f} of its start"
        )
        how = [f"checkpoint.{name}={getattr(kill, name)}".lower() for name in ("every", "keep", "blocking")]
        log = folder / f"{len(done.kills):03d}.log"
        start, before = time.time(), _mtime(run_dir)
        processes = spawn([*args, *how], log, ranks=ranks, at=[at] if at else [])
        victim = processes[0 if at else int(rng.integers(ranks))]
        if until and not at:
            while (_mtime(run_dir) == before or reached(run_dir) < until) and victim.is_alive():
                time.sleep(0.003)
                if _mtime(run_dir) == before:
                    patience = time.time() - start
        seconds = 60 if at else moment * (0.06 if until else patience)
        victim.join(seconds)
        victim.kill()
        time.sleep(float(rng.uniform(0, 0.05)) if ranks > 1 else 0)
        for process in processes:
            process.kill()
            process.join()
        printed = log.read_text() if log.exists() else ""
        wrong = (
            "damaged",
            "lost",
            *(("error", "Traceback") if ranks == 1 else ()),
        )  # a rank whose peer is dead has both
        if any(word in printed for word in wrong):
            done.problems.append(f"{log}: {printed[-500:]}")
        if victim.exitcode == 0:  # a busy machine: the run was done before its moment had come
            break
        if victim.exitcode != -signal.SIGKILL:
            done.problems.append(f"{log}: ended with {victim.exitcode} before it was killed: {printed[-500:]}")
            break
        if _mtime(run_dir) != before:
            wrote = kill.every, kill.blocking
        kill.where, kill.part = (
            landed(run_dir, kill.keep, start, printed),
            any((run_dir / "checkpoints").glob("step_*.part")),
        )
        kill.last_step = reached(run_dir)
        kill.lost = max(0, kill.last_step - max(steps(run_dir), default=0))
        limit = wrote[0] * (1 if wrote[1] else 2)
        if kill.lost > limit:
            done.problems.append(f"{log}: lost {kill.lost} steps, checkpoint.every={wrote[0]}, blocking={wrote[1]}")
        kill.every, kill.blocking = wrote
        done.kills.append(kill)
        if len(done.kills) % 20 == 0:
            say(f"{len(done.kills)} kills, {max(steps(run_dir), default=0)} of {total} steps")
    until_done([*args, "checkpoint.every=1"], folder / "last.log", ranks=ranks)
    done.differences, done.seconds = differences(run_dir, whole), time.monotonic() - began
    done.problems += [f"left behind: {path}" for path in run_dir.rglob("*") if path.suffix in (".part", ".old")]
    return done


def _mtime(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


# ---- a task of its own


def make_task(folder: Path) -> list[str]:
    """Writes a tiny Llama with its tokenizer and some pairs; returns the overrides that train it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rpo.synthetic import task

    tokenizer = task.word_tokenizer(["[user]", "[assistant]", "[system]", *WORDS], TEMPLATE)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", max_position_embeddings=128, **sizes, **special)
    )
    for kept in (lm, tokenizer):
        kept.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for name, count in (("train", 120), ("eval", 12)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                prompt, chosen, rejected = (" ".join(rng.choice(WORDS, rng.integers(2, 16))) for _ in range(3))
                file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    args = [
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'eval.jsonl'}",
    ]
    args += [
        "loss=rpo_avg",
        "optim.lr=1e-3",
        "batch_size=16",
        "eval_every=10",
        "sample_every=25",
        "wandb.mode=disabled",
    ]
    return args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--lora", action="store_true", help="train an adapter")
    parser.add_argument("--keep", type=Path, help="leave the run's folder and logs here")
    parser.add_argument("--json", action="store_true", help="write raw results to bench/results/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        folder = args.keep or Path(folder)
        (folder / "task").mkdir(parents=True)
        total = max(30, 5 * args.kills // 2)
        command = make_task(folder / "task") + ["model.lora.r=4", "model.lora.dropout=0.1"] * args.lora
        done = campaign(command, folder, args.kills, total=total, seed=args.seed, ranks=args.ranks)
    for where, count in sorted(Counter(kill.where for kill in done.kills).items()):
        print(f"{count:5d}  {where}")
    in_save = sum(kill.part for kill in done.kills)
    print(
        f"{len(done.kills):5d}  kills of {args.ranks} ranks in {total} steps, {in_save} with a save in hand; {done.seconds:.0f} s"
    )
    lost = f"{done.lost(True)} with checkpoint.blocking (bound {3}), {done.lost(False)} without ({6})"
    print(f"steps lost at most: {lost}")
    for name, value in done.differences.items():
        print(f"max |difference| of {name}: {value:g}")
    print("\n".join(done.problems) or "no kill lost more than its start's bound, and none damaged a checkpoint")
    if args.json:
        import torch

        from bench import report

        report.write(f"cpu_kill_{args.ranks}_ranks", torch.device("cpu"), steps=total, **asdict(done))
    sys.exit(int(bool(done.problems) or any(done.differences.values())))


if __name__ == "__main__":
    main()
