"""Runs a program against its tests in a sandbox.

Program and tests run in two processes (`harness`), each in a jail of its own (`jail`): namespaces without network or other
processes, a read-only root with only Python in it, 16 MiB of scratch in memory, an empty environment, hard limits on CPU
time, memory, files, processes (none) and wall time, and only those system calls that Python needs (`syscalls`). Isolation is
only as strong as the kernel's.
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
from rpo.sandbox.syscalls import filter_of, somewhere

WALL = 4  # seconds of wall time per second of CPU time, beside 10 seconds to start on a busy machine
_HERE = Path(__file__).parent
_ENDS = {  # exit status: why, and the kind of failure
    jail.WALL: (", its wall time over", "out of time"),
    jail.CPU: (", its CPU time over", "out of time"),
    128 + signal.SIGKILL: (", killed by the system, which may be short of memory", "killed by the system"),
} | {128 + getattr(signal, f"SIG{name}"): (", crashed", "crashed") for name in ("SEGV", "BUS", "ILL", "FPE", "ABRT")}


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

    Tests see `imports` (import statements), Python's builtins and what the program's functions `names` return.
    """

    program: str
    tests: list[str]
    names: list[str]
    setup: str = ""
    imports: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """`why` a program did not pass, and the `kind` of that failure; `error` if it could not be tested."""

    passed: bool
    why: str | None
    error: str | None
    kind: str | None = None


def examine(exam: Exam, limits: Limits) -> Outcome:
    """The outcome of one exam: passed only if every test holds for the values that the program returned.

    Never raises for what the program does; if the system refuses a sandbox, the outcome has an error.
    """
    try:
        return _examine(exam, limits)
    except OSError as error:
        return Outcome(False, None, f"no sandbox can be made here ({error})")


def _examine(exam: Exam, limits: Limits) -> Outcome:
    source = (_HERE / "harness.py").read_text()
    with contextlib.ExitStack() as stack:
        requests, replies = _pipe(stack), _pipe(stack)
        serve = _jailed([source, "serve"], limits, limits.wall, stdin=requests[0], stdout=replies[1])
        program = stack.enter_context(serve)
        ends, pipe = (requests[1].fileno(), replies[0].fileno()), subprocess.PIPE
        # The tests' side outlives the program's, whose end it reports.
        argv = [source, "examine", *map(str, ends)]
        tests = stack.enter_context(_jailed(argv, limits, limits.wall + 5, stdin=pipe, stdout=pipe, pass_fds=ends))
        for end in (*requests, *replies):  # or neither side would see the other end
            end.close()
        try:
            verdicts, _ = tests.process.communicate(json.dumps(vars(exam)).encode(), timeout=limits.wall + 60)
        except subprocess.TimeoutExpired:
            return Outcome(False, None, "the sandbox did not end in time")
        with contextlib.suppress(subprocess.TimeoutExpired):  # without more requests it ends
            program.process.wait(timeout=1)
    return _outcome(verdicts, program, tests)


def _outcome(verdicts: bytes, program: "_Jailed", tests: "_Jailed") -> Outcome:
    for jailed in (program, tests):
        if jailed.refusal:
            return Outcome(False, None, f"no sandbox can be made here ({jailed.refusal})")
    lines = verdicts.decode().split("\n")[:-1]  # a line that a kill cut off does not count
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


def _kind(reported: str) -> str:
    """The kind of failure to count. Of exceptions, which a program may name itself, only Python's own keep their names."""
    name = reported.removeprefix("raised ")
    if name == reported:
        return reported
    builtin = getattr(builtins, name, None)
    is_error = isinstance(builtin, type) and issubclass(builtin, BaseException)
    return "out of memory" if name == "MemoryError" else name if is_error else "another error"


def _pipe(stack: contextlib.ExitStack) -> list[io.FileIO]:
    """(end to read from, end to write to), both closed with `stack` at the latest."""
    ends = zip(os.pipe(), ("rb", "wb"), strict=True)
    return [stack.enter_context(open(end, mode, buffering=0)) for end, mode in ends]


# ---- jails


@dataclass
class _Jailed:
    """A process in a jail, and after its end the reason if no jail could be made."""

    process: subprocess.Popen
    refusal: str = ""


@contextlib.contextmanager
def _jailed(argv: list[str], limits: Limits, wall: int, *, pass_fds: tuple[int, ...] = (), **pipes):
    """`python -c argv...` in a jail, killed with all its processes when the block is left."""
    python = os.path.realpath(sys._base_executable)  # outside of any virtual environment
    path_at = somewhere(machine := os.uname().machine)
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
            "path_at": path_at,
            "filter": filter_of(machine, path_at).hex(),
            "parent": os.getpid(),
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
    prefixes = [*map(os.path.realpath, (sys.base_prefix, sys.base_exec_prefix)), "/usr", "/"]
    # Not the whole of a prefix: under /usr/src or /usr/local a container keeps its user's files, answers and keys among them.
    own = [os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib32", "lib64")]
    paths = [path for path in (*own, os.path.dirname(python)) if os.path.exists(path)]
    return [path for path in dict.fromkeys(paths) if not any(path.startswith(f"{other}/") for other in paths)]


# ---- self-test


_BREAK_OUT = """
import ctypes, os, resource, socket, threading
libc = ctypes.CDLL(None)
def escapes():
    found = []
    def attempt(what, action):
        try:
            if action() is not False:
                found.append(what)
        except Exception:
            pass
    attempt("write to its root", lambda: open("/written", "w"))
    attempt("write to the system", lambda: open("/usr/written", "w"))
    attempt("see /etc", lambda: os.listdir("/etc"))
    attempt("see /proc", lambda: os.listdir("/proc"))
    attempt("see /home", lambda: os.listdir("/home"))
    attempt("open a connection", lambda: socket.create_connection(("127.0.0.1", PORT), 1))
    attempt("start a process", os.fork)
    attempt("start a thread", threading.Thread(target=int).start)
    attempt("be root", lambda: os.setuid(0) or os.getuid() == 0)
    attempt("mount", lambda: libc.mount(b"x", b"/scratch", b"tmpfs", 0, None) == 0)
    attempt("make namespaces", lambda: libc.unshare(0x10000000) == 0)
    attempt("share memory", lambda: libc.shmget(0, 4096, 0o1600) != -1)
    attempt("share semaphores", lambda: libc.semget(0, 1, 0o1600) != -1)
    attempt("be traced", lambda: libc.ptrace(0, 0, None, None) != -1)
    attempt("outlive its parent", lambda: libc.prctl(1, 0, 0, 0, 0) != -1)
    attempt("make a local socket", socket.socketpair)
    attempt("make a hypervisor's socket", lambda: socket.socket(40, socket.SOCK_STREAM))
    attempt("signal those outside", lambda: os.getpgrp() != os.getpid())
    attempt("raise its limits", lambda: resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6)))
    attempt("read the environment", lambda: set(os.environ) - {"PYTHONHASHSEED", "LC_CTYPE"} != set())
    open("/scratch/x", "w").close()
    return found
"""


def check(limits: Limits) -> None:
    """Raises UserError unless a sandbox can be made here and holds a program that tries to escape."""
    key = "task.allow_code_execution=true"
    if sys.platform != "linux":
        raise UserError(f"{key}: the sandbox needs Linux's namespaces, this is {sys.platform}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = _BREAK_OUT.replace("PORT", str(server.getsockname()[1]))
        outcome = examine(Exam(program, ["found = escapes()", "assert not found, found"], ["escapes"]), limits)
    if outcome.error:
        raise UserError(
            f"{key}: {outcome.error}, and programs run only in one; run as a user who may make user namespaces (in a container: "
            "by its seccomp profile), or as root with CAP_SYS_ADMIN"
        )
    if not outcome.passed:
        raise UserError(f"{key}: the sandbox does not hold here ({outcome.why}); nothing is run")
