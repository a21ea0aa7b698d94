"""Whether a program passes its tests, found out where it can do no harm.

Program and tests run in two processes (`harness`), each in a jail of its own (`jail`): namespaces without network or other
processes, a read-only root with nothing but Python in it, 16 MiB of scratch in memory, an empty environment, hard limits on
CPU time, memory, files, processes (none) and time on the clock, and a filter of system calls. The kernel is the wall: a hole
in it is one in this.
"""

import builtins
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from rpo.errors import UserError
from rpo.sandbox import jail

WALL = 4  # time on the clock for each second of CPU time that a program has, and 10 seconds to start on a busy machine
_HERE = Path(__file__).parent
_ENDS = {  # exit status: why, and the kind of failure
    jail.WALL: (", its time on the clock over", "out of time"),
    jail.CPU: (", its CPU time over", "out of time"),
    128 + signal.SIGKILL: (
        ", killed before a limit of its own, as by a system short of memory",
        "killed by the system",
    ),
    128 + signal.SIGSEGV: (", crashed", "crashed"),
    128 + signal.SIGABRT: (", crashed", "crashed"),
}


@dataclass(frozen=True)
class Limits:
    """CPU seconds and GiB of address space of one program."""

    seconds: int
    memory_gib: float

    @property
    def wall(self) -> int:
        return 10 + WALL * self.seconds


@dataclass(frozen=True)
class Exam:
    """`program` is run, then `setup` in its names, then each of `tests`, statements that fail by raising.

    Tests know `imports` (import statements), Python's builtins, and the program's functions by `names`; they see of
    the program what those return.
    """

    program: str
    tests: list[str]
    names: list[str]
    setup: str = ""
    imports: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """`why` a program did not pass, and of what `kind` that is; `error` where there was no finding out."""

    passed: bool
    why: str | None
    error: str | None
    kind: str | None = None


def examine(exam: Exam, limits: Limits) -> Outcome:
    """The outcome of one exam: passed only where every test was true of values that the program sent.

    Never raises for what the program does; what the system refuses is an outcome with an error.
    """
    try:
        return _examine(exam, limits)
    except OSError as error:
        return Outcome(False, None, f"no sandbox can be made here ({error})")


def _examine(exam: Exam, limits: Limits) -> Outcome:
    source = (_HERE / "harness.py").read_text()
    with contextlib.ExitStack() as stack:
        requests, replies = _pipe(stack), _pipe(stack)
        program = stack.enter_context(
            _jailed([source, "serve"], limits, limits.wall, stdin=requests[0], stdout=replies[1])
        )
        ends = requests[1].fileno(), replies[0].fileno()
        # The tests' side outlives the program's, whose end it reports.
        tests = stack.enter_context(
            _jailed(
                [source, "examine", *map(str, ends)],
                limits,
                limits.wall + 5,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=ends,
            )
        )
        for end in (*requests, *replies):  # or neither side would see the other end
            end.close()
        given = json.dumps(vars(exam)).encode()
        try:
            said, _ = tests.process.communicate(given, timeout=limits.wall + 60)
        except subprocess.TimeoutExpired:
            return Outcome(False, None, "the sandbox did not end in time")
        with contextlib.suppress(subprocess.TimeoutExpired):  # no more is asked of it, so it ends
            program.process.wait(timeout=1)
    return _outcome(said, program, tests)


def _outcome(said: bytes, program: "_Jailed", tests: "_Jailed") -> Outcome:
    for jailed in (program, tests):
        if jailed.refusal:
            return Outcome(False, None, f"no sandbox can be made here ({jailed.refusal})")
    lines = said.decode().split("\n")[:-1]  # what a kill cut off is none
    if not lines:
        return Outcome(False, None, f"the tests' side ended with status {tests.process.returncode}")
    verdict = json.loads(lines[-1])
    if "error" in verdict:
        return Outcome(False, None, f"{verdict['error']} (status {program.process.returncode})")
    why, kind = verdict["why"], verdict["kind"]
    if kind == "it ended":
        end, kind = _ENDS.get(program.process.returncode, ("", "left early"))
        why += end
    return Outcome(verdict["passed"], why, None, None if why is None else _kind(kind))


def _kind(said: str) -> str:
    """What to count a failure as. A program names its own exceptions: of those only Python's keep their names."""
    known = {kind for _, kind in _ENDS.values()} | {"failed a test", "left early", "a value too large", "tests stopped"}
    if said == "MemoryError":
        return "out of memory"
    found = getattr(builtins, said, None)
    named = isinstance(found, type) and issubclass(found, BaseException)
    return said if said in known or named else "another error"


def _pipe(stack: contextlib.ExitStack) -> list[io.FileIO]:
    """(where to read, where to write), both closed with `stack` at the latest."""
    return [
        stack.enter_context(open(end, mode, buffering=0)) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
    ]


# ---- jails


@dataclass
class _Jailed:
    """A process in a jail, and after it has ended why there was no jail for it, if so."""

    process: subprocess.Popen
    refusal: str = ""


@contextlib.contextmanager
def _jailed(argv: list[str], limits: Limits, wall: int, *, pass_fds: tuple[int, ...] = (), **pipes):
    """`python -c argv...` in a jail, killed with all it started when the block is left."""
    python = os.path.realpath(sys._base_executable)  # outside of any virtual environment
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        report, writer = _pipe(stack)
        settings = {
            "root": root,
            "see": _see(python),
            "argv": [python, "-s", "-S", "-B", "-P", "-X", "utf8", "-c", *argv],
            "env": {"PYTHONHASHSEED": "0"},  # sets in the same order each time
            "seconds": limits.seconds,
            "wall": wall,
            "memory": int(limits.memory_gib * 2**30),
            "report": writer.fileno(),
        }
        process = subprocess.Popen(
            _jail_argv(json.dumps(settings)),
            env={},
            pass_fds=(*pass_fds, writer.fileno()),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **pipes,
        )
        writer.close()
        jailed = _Jailed(process)
        try:
            yield jailed
        finally:
            process.terminate()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
            jailed.refusal = report.read().decode(errors="replace")


def _jail_argv(settings: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-B", jail.__file__, settings]


@lru_cache
def _see(python: str) -> list[str]:
    """The folders that the interpreter needs: its own, and the system's libraries."""
    own = [*map(os.path.realpath, (sys.base_prefix, sys.base_exec_prefix)), os.path.dirname(python)]
    found = [path for path in ("/usr", "/lib", "/lib32", "/lib64", *own) if os.path.exists(path)]
    return [path for path in dict.fromkeys(found) if not any(path.startswith(f"{other}/") for other in found)]


# ---- proof


_BREAK_OUT = """
import ctypes, os, resource, socket, threading
libc = ctypes.CDLL(None)
def escapes():
    found = []
    def tried(what, action):
        try:
            if action() is not False:
                found.append(what)
        except Exception:
            pass
    tried("write to its root", lambda: open("/written", "w"))
    tried("write to the system", lambda: open("/usr/written", "w"))
    tried("see /etc", lambda: os.listdir("/etc"))
    tried("see /proc", lambda: os.listdir("/proc"))
    tried("see /home", lambda: os.listdir("/home"))
    tried("open a connection", lambda: socket.create_connection(("127.0.0.1", PORT), 1))
    tried("start a process", os.fork)
    tried("start a thread", threading.Thread(target=int).start)
    tried("be root", lambda: os.setuid(0) or os.getuid() == 0)
    tried("mount", lambda: libc.mount(b"x", b"/scratch", b"tmpfs", 0, None) == 0)
    tried("make namespaces", lambda: libc.unshare(0x10000000) == 0)
    tried("share memory", lambda: libc.shmget(0, 4096, 0o1600) != -1)
    tried("signal those outside", lambda: os.getpgrp() != os.getpid())
    tried("raise its limits", lambda: resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6)))
    tried("read the environment", lambda: set(os.environ) - {"PYTHONHASHSEED", "LC_CTYPE"} != set())
    open("/scratch/x", "w").close()
    return found
"""


def check(limits: Limits) -> None:
    """Raises UserError unless a sandbox can be made here and holds: a program that tries to get out of it fails to."""
    if sys.platform != "linux":
        raise UserError(
            f"task.allow_code_execution=true: the sandbox is made of Linux's namespaces, this is {sys.platform}"
        )
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = _BREAK_OUT.replace("PORT", str(server.getsockname()[1]))
        outcome = examine(Exam(program, ["found = escapes()", "assert not found, found"], ["escapes"]), limits)
    if outcome.error:
        raise UserError(
            f"task.allow_code_execution=true: {outcome.error}; programs are not run without it. It takes a user who may make "
            "user namespaces (in a container: by its seccomp profile), or root with CAP_SYS_ADMIN"
        )
    if not outcome.passed:
        raise UserError(
            f"task.allow_code_execution=true: the sandbox does not hold here ({outcome.why}); nothing is run"
        )
