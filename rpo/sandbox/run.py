"""Runs a program against its tests in a sandbox.

Program and tests run in two processes (`harness`), each in a jail of its own (`jail`), made by a process that makes many:
namespaces without network or other
processes, a read-only root with only Python in it, 16 MiB of scratch in memory, an empty environment, hard limits on CPU
time, memory, files, processes (none) and wall time, and only those system calls that Python needs (`syscalls`). Isolation is
only as strong as the kernel's.
"""

import builtins
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue

from rpo.errors import UserError
from rpo.sandbox import jail
from rpo.sandbox.syscalls import filter_of

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


def examine_all(exams: Sequence[Exam], limits: Limits) -> list[Outcome]:
    """The outcome of each, as many at once as there are processors."""
    workers = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(workers) as pool:  # threads that wait for processes
        free = SimpleQueue()
        for _ in range(workers):
            free.put(stack.enter_context(contextlib.closing(Jailer(limits))))

        def tried(exam: Exam) -> Outcome:
            jailer = free.get()
            try:
                return examine(exam, limits, jailer)
            finally:
                free.put(jailer)

        return list(pool.map(tried, exams))


def examine(exam: Exam, limits: Limits, jailer: "Jailer | None" = None) -> Outcome:
    """The outcome of one exam: passed only if every test holds for the values that the program returned.

    Never raises for what the program does; if the system refuses a sandbox, the outcome has an error.
    """
    if jailer is None:
        with contextlib.closing(Jailer(limits)) as own:
            return examine(exam, limits, own)
    try:
        return _outcome(*jailer.hold(exam))
    except TimeoutError:
        return Outcome(False, None, "the sandbox did not end in time")
    except OSError as error:
        return Outcome(False, None, f"no sandbox can be made here ({error})")


def _outcome(verdicts: str, ended: dict) -> Outcome:
    if ended["refused"]:
        return Outcome(False, None, f"no sandbox can be made here ({ended['refused']})")
    lines = verdicts.split("\n")[:-1]  # a line that a kill cut off does not count
    if not lines:
        return Outcome(False, None, f"the tests' side ended with status {ended['tests']}")
    verdict = json.loads(lines[-1])
    if "error" in verdict:
        return Outcome(False, None, f"{verdict['error']} (status {ended['program']})")
    why, kind = verdict["why"], verdict["kind"]
    if kind == "it ended":
        end, kind = _ENDS.get(ended["program"], ("", "left early"))
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


# ---- jails


class Jailer:
    """A process that makes sandboxes, one after another, from the first exam until `close`."""

    def __init__(self, limits: Limits):
        self.limits, self._process, self._wire = limits, None, None

    def hold(self, exam: Exam) -> tuple[str, dict]:
        """(verdicts, how the exam ended, as `jail` says). Raises OSError: no process can be made, or it did not end in time."""
        try:
            if self._process is None:
                self._start()
            with contextlib.ExitStack() as stack:
                paper = stack.enter_context(open(os.memfd_create("exam"), "w+b", buffering=0))
                paper.write(json.dumps(vars(exam)).encode())
                paper.seek(0)
                take, give = (stack.enter_context(open(end, mode)) for end, mode in zip(os.pipe(), "rw", strict=True))
                ended = b""
                with contextlib.suppress(ConnectionError):
                    socket.send_fds(self._wire, [b"."], [paper.fileno(), give.fileno()])
                    ended = self._wire.recv(2**16)
                give.close()
                if not ended:
                    raise OSError(f"its process ended with status {self._process.wait()}")
                verdicts, answer = take.read(), json.loads(ended)
            if answer["refused"]:
                self.close()
            return verdicts, answer
        except BaseException:  # what it was at is unknown
            self.close()
            raise

    def _start(self) -> None:
        python = os.path.realpath(sys._base_executable)  # outside of any virtual environment
        settings = {
            "harness": str(_HERE / "harness.py"),
            "see": _see(python),
            "seconds": self.limits.seconds,
            "wall": self.limits.wall,
            "memory": int(self.limits.memory_gib * 2**30),
            "filter": filter_of(os.uname().machine).hex(),
        }
        self._wire, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            self._wire.settimeout(self.limits.wall + 60)
            self._process = subprocess.Popen(
                [python, "-s", "-S", "-B", "-P", "-X", "utf8", *_jail_argv(json.dumps(settings))],
                env={"PYTHONHASHSEED": "0"},  # sets in the same order each time
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def close(self) -> None:
        """Ends it, and all that it holds."""
        if self._wire is not None:
            self._wire.close()
        if self._process is not None:
            self._process.wait()
        self._process = self._wire = None


def _jail_argv(settings: str) -> list[str]:
    return [jail.__file__, settings]


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
