"""Programs that try to do harm, or to pass without being right, in the sandbox."""

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rpo.errors import UserError
from rpo.sandbox import jail, syscalls
from rpo.sandbox import run as sandbox_run
from rpo.sandbox.run import Exam, Limits, Outcome, check, examine, subprocess

LIMITS = Limits(seconds=2, memory_gib=0.5)
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
KEYCTL = {"x86_64": 250, "aarch64": 219}.get(os.uname().machine, 0)


@pytest.fixture(scope="module", autouse=True)
def possible():
    """Skips, with the reason, where no sandbox can be made."""
    try:
        check(LIMITS)
    except UserError as error:
        pytest.skip(str(error))


def tried(program, *tests, names=("f",), limits=LIMITS, **more):
    return examine(Exam(program, list(tests) or ["assert f(2) == 4"], list(names), **more), limits)


def test_right_and_wrong():
    """A program that is right passes; one that is wrong, raises or does not parse fails, with the test and the reason."""
    assert tried("def f(x): return 2 * x") == Outcome(True, None, None)
    assert tried("def f(x): return 3 * x") == Outcome(False, "assert f(2) == 4: not so", None, "failed a test")
    assert tried("def f(x): return x / 0").why == "assert f(2) == 4: ZeroDivisionError: division by zero"
    assert tried("g = 1").why == "assert f(2) == 4: NameError: name 'f' is not defined"
    assert tried("def f(x)").why.startswith("the program: SyntaxError")
    first_two = ("assert f(2) == 4", "assert f(3) == 6", "assert f(3) == 7")
    assert tried("def f(x): return 2 * x", *first_two).why == "assert f(3) == 7: not so"


@pytest.mark.parametrize(
    "value",
    [
        "None",
        "True",
        "-7",
        "2.5",
        r"'\u00e9\ud800'",
        "(1, (2, [3]))",
        "{1: 'a', (2, 3): {4}}",
        "{1, 2}",
        "frozenset({1})",
    ]
    + ["b'ab'", "1 + 2j", "float('inf')", "10 ** 40", "10 ** 5000", "int"],
)
def test_values_cross_whole(value):
    """What a function returns, and what it is given, arrives with its value and type."""
    program = f"def f(x):\n    y = {value}\n    assert x == y and type(x) is type(y)\n    return y"
    test = f"y = f({value})\nassert y == {value} and type(y) is type({value})"
    assert tried(program, test) == Outcome(True, None, None)


def test_objects_stay_with_the_program():
    """An object of the program's class can be made, handed back and used there; here it equals nothing but itself."""
    program = "class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return True\n"
    program += "def f(ps): return sum(p.x for p in ps)\nroot = P(5)"
    assert tried(program, "assert f([P(1), P(2), root]) == 8", names=("f", "P", "root")).passed
    assert not tried(program, "assert P(1) == 1", names=("P",)).passed  # though its __eq__ says so
    assert tried("class N: pass", "assert f(r) == 3", names=("f", "r"), setup="r = N()\nf = lambda r: 3").passed


def test_numbers_of_other_types_are_what_they_are_worth():
    """A Fraction or a Decimal equals the int or float that it equals in Python, and can be made an int."""
    for value in ("Fraction(7, 2)", "Decimal('3.5')"):
        program = f"from fractions import Fraction\nfrom decimal import Decimal\ndef f(x): return {value}"
        assert tried(program, "assert f(0) == 3.5 and int(f(0)) == 3").passed
        assert not tried(program, "assert f(0) == 3").passed


def test_a_program_is_a_module():
    """What looks for a class's module finds it: a dataclass whose annotations are text."""
    program = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\n"
    assert tried(f"{program}def f(x): return P(2 * x).x").passed


ORDINARY = """
import bisect, calendar, collections, copy, csv, ctypes, datetime, decimal, fractions, functools, glob, hashlib, heapq, io
import itertools, json, locale, logging, math, os, pathlib, random, re, secrets, select, shutil, signal, sqlite3, statistics
import string, struct, sys, tempfile, textwrap, threading, time, typing, unittest, uuid, zlib

def f():
    random.seed(1)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.txt"
        path.write_text("7\\n")
        shutil.copy2(path, path.with_suffix(".bak"))
        os.rename(path, path.with_suffix(".new"))
        os.symlink("a.new", path)
        with open(path, "a") as file:
            file.write("8\\n")
            file.flush()
            os.fsync(file.fileno())
        assert sorted(os.listdir(folder)) == ["a.bak", "a.new", "a.txt"] and glob.glob(f"{folder}/*.new")
        text = path.read_text()
    rang = []
    signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while not rang:
        time.sleep(0.001)
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    os.write(ends[1], b"x")
    assert select.select([ends[0]], [], [], 1)[0] and os.read(ends[0], 1) == b"x"
    lock, base = threading.Lock(), sqlite3.connect(":memory:")
    with lock:
        ((nine,),) = base.execute("select 4 + 5")
    assert len(os.urandom(8)) == 8 and secrets.token_hex(4) and uuid.uuid4() and os.cpu_count() and os.getpid()
    assert datetime.datetime.now().year > 2000 and not os.isatty(1) and hashlib.sha256(b"").hexdigest()[:4] == "e3b0"
    assert json.loads(json.dumps({"a": [1.5]})) == {"a": [1.5]} and re.sub(r"\\d", "", "a1") == "a"
    print("said", file=sys.stderr)
    return text, nine, math.isqrt(17), statistics.mean([1, 3])
exit()
"""


def test_what_programs_rightly_use():
    """The standard library's modules for text, numbers, time, chance, files and signals work; a script may end itself."""
    assert tried(ORDINARY, r"assert f() == ('7\n8\n', 9, 4, 2), f()").why is None
    for end in ("import sys\nsys.exit()", "import sys\nsys.exit('done')", "quit()", "raise SystemExit"):
        assert tried(f"def f(x): return 2 * x\n{end}").passed


PASS_WITHOUT_BEING_RIGHT = {
    "leaves before the tests": "import sys; sys.exit(0)",
    "leaves hard": "import os; os._exit(0)",
    "leaves in a test": "import os\ndef f(x): os._exit(0)",
    "prints a verdict": 'print(\'{"passed": true, "why": null}\', flush=True)\ndef f(x): return 5',
    "equals everything": "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()",
    "is an int that equals everything": "class E(int):\n    def __eq__(self, other): return True\ndef f(x): return E(5)",
    "patches what compares": "import builtins\nbuiltins.AssertionError = ZeroDivisionError\nimport json\n"
    "json.dumps = lambda *a, **k: '\"passed\"'\ndef f(x): return 5",
    "looks for its tests in memory": "import gc, sys\nlook = '4 =='\ndef f(x):\n    frame = sys._getframe()\n"
    "    found = [o for o in gc.get_objects() if look in str(o)[::-1]]\n    while frame:\n"
    "        found += [v for v in frame.f_locals.values() if look in str(v)[::-1]]\n        frame = frame.f_back\n"
    "    return 4 if found else 5",
    "writes values before it is asked": "import os\nfor fd in range(3, 32):\n    try: os.write(fd, "
    'b\'{"value": 4}\\n{"to": 1, "value": 4}\\n\' * 9)\n    except OSError: pass\ndef f(x): return 5',
    "writes no objects": "import os\nfor fd in range(3, 32):\n    try: os.write(fd, b'[4]\\n4\\n')\n    except OSError: pass\n"
    "def f(x): return 5",
    "writes a verdict to all it has open": "import os\nfor fd in range(3, 32):\n    try: os.write(fd, "
    'b\'{"passed": true, "why": null}\\n\')\n    except OSError: pass\ndef f(x): return 5',
}


@pytest.mark.parametrize("program", PASS_WITHOUT_BEING_RIGHT.values(), ids=PASS_WITHOUT_BEING_RIGHT)
def test_no_pass_without_the_value(program):
    """Only a value that is right passes: not an exit, a print, a patch, or a look at the harness."""
    outcome = tried(program)
    assert not outcome.passed and outcome.why and outcome.error is None


HARM = {
    "fork": ("import os\nwhile True: os.fork()", "BlockingIOError"),
    "threads": ("import threading\nwhile True: threading.Thread(target=print).start()", "RuntimeError"),
    "memory": ("x = bytearray(2**30)", "MemoryError"),
    "memory by and by": ("x = []\nwhile True: x.append(bytearray(2**20))", "MemoryError"),
    "much output": ("for _ in range(2000): print('x' * 10**5)", "NameError"),  # it goes nowhere; then there is no f
    "a large value": ("def f(x): return 'x' * 2**25", "a value too large"),
    "a deep value": ("def f(x):\n    for _ in range(10**5): x = [x]\n    return x", "RecursionError"),
    "a large file": ("open('x', 'wb').write(bytes(2**25))", "OSError"),
    "many small files": ("import os\nfor i in range(10**4): os.mkdir(str(i))", "OSError: [Errno 28]"),
    "shared memory": (f"{LIBC}assert libc.shmget(0, 4096, 0o1600) >= 0, 'refused'", "AssertionError: refused"),
    "memory in a file": (f"{LIBC}os.memfd_create('x')", "PermissionError"),
    "the user's keys": (f"{LIBC}assert libc.syscall({KEYCTL}, 0, -3, 0) >= 0, 'refused'", "AssertionError: refused"),
    "namespaces": (f"{LIBC}assert libc.unshare(0x10000000) == 0, 'refused'", "AssertionError: refused"),
    "many files": ("x = [open(f'{i}', 'w') for i in range(100)]", "OSError"),
    "outside scratch": ("open('/usr/written', 'w')", "OSError: [Errno 30] Read-only"),
    "at the root": ("open('/written', 'w')", "OSError: [Errno 30] Read-only"),
    "the user's files": ("import os; os.listdir(os.path.expanduser('~root'))", "FileNotFoundError"),
    "passwords": ("open('/etc/passwd')", "FileNotFoundError"),
    "processes": ("import os; os.listdir('/proc')", "FileNotFoundError"),
    "its parent": ("import os, signal; os.kill(os.getppid() or 2, signal.SIGKILL)", ""),
    "semaphores": (f"{LIBC}assert libc.semget(0, 32000, 0o1600) >= 0, 'refused'", "AssertionError: refused"),
    "message queues": (f"{LIBC}assert libc.msgget(0, 0o1600) >= 0, 'refused'", "AssertionError: refused"),
    "being traced": (f"{LIBC}assert libc.ptrace(0, 0, None, None) >= 0, 'refused'", "AssertionError: refused"),
    "outliving its parent": (f"{LIBC}assert libc.prctl(1, 0, 0, 0, 0) >= 0, 'refused'", "AssertionError: refused"),
    "the hypervisor": ("import socket\nsocket.socket(40, socket.SOCK_STREAM)", "OSError: [Errno 97]"),  # AF_VSOCK
    "a local socket": ("import socket\nsocket.socket(socket.AF_UNIX)", "OSError: [Errno 97]"),
    "a pair of sockets": ("import socket\nsocket.socketpair()", "OSError: [Errno 97]"),
    "locks on ranges": ("import fcntl\nfcntl.lockf(open('x', 'w'), fcntl.LOCK_EX)", "PermissionError"),
    "locks on the system's files": (
        "import fcntl, os\nfcntl.flock(open(os.__file__), fcntl.LOCK_EX)",
        "PermissionError",
    ),
    "a larger pipe": ("import fcntl, os\nfcntl.fcntl(os.pipe()[0], 1031, 2**20)", "PermissionError"),
    "typing into a terminal": ("import fcntl\nfcntl.ioctl(0, 0x5412, 'x')", "PermissionError"),  # TIOCSTI
    "queued signals": (
        "import os, signal\nsignal.pthread_sigmask(0, [40])\nfor _ in range(9): os.kill(1, 40)\n"
        "kept = 0\nwhile signal.sigtimedwait([40], 0): kept += 1\nassert kept == 9, kept",
        "AssertionError: 1",
    ),
    "programs of its own": ("import os, shutil, sys\nshutil.copy(sys.executable, 'x')\nos.execv('x', ['x'])", "Error"),
    "the machine's name": ("import os\nassert os.uname().nodename != 'sandbox'", "AssertionError"),
    "another program": ("import os\nos.execv('/usr/bin/env', ['env'])", "PermissionError"),
    "a program of the system": ("import subprocess; subprocess.run(['/usr/bin/env'])", "BlockingIOError"),
    "its input": ("input()", "EOFError"),
}


@pytest.mark.parametrize(("program", "why"), HARM.values(), ids=HARM)
def test_harm_is_refused(program, why):
    """What would burden or spy on the machine fails as an error of the program's own."""
    outcome = tried(program)
    assert not outcome.passed and outcome.error is None and why in outcome.why, outcome


# x86 instructions that enter the kernel as a 32-bit process does: number 20 there is getpid.
IA32 = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000cd80c3"))
def f(): return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
EVERY_CALL = f"""
{LIBC}
libc.syscall.restype = ctypes.c_long
def refused(numbers):
    found = {{}}
    for number in numbers:
        ctypes.set_errno(0)
        result = libc.syscall(number, 0, 0, 0, 0, 0, 0)
        found.setdefault(ctypes.get_errno() if result == -1 else 0, []).append(number)
    return found
""".replace("CDLL(None)", "CDLL(None, use_errno=True)")


def test_every_other_call_is_refused():
    """Of all the kernel's calls those that the table does not list do nothing, also by x86's two other ways in."""
    machine = os.uname().machine
    listed = set(syscalls.allowed(machine).values())
    none_left = set(syscalls.numbers(", ".join(syscalls._REFUSED.values()), machine).values())
    probes = (
        {335, 336} if machine == "x86_64" else set()
    )  # uretprobe, uprobe: a kernel kills who calls them from elsewhere
    known = sorted(set(range(syscalls.NEWER)) - listed - none_left - probes)
    newer = list(range(syscalls.NEWER, 600))
    tests = [
        f"assert refused({known}) == {{1: {known}}}, refused({known})",
        f"assert refused({newer}) == {{38: {newer}}}",
    ]
    if machine == "x86_64":
        x32 = [syscalls.X32 + number for number in range(600)]
        tests += [f"assert refused({x32}) == {{1: {x32}}}"]
    outcome = tried(EVERY_CALL, *tests, names=("refused",))
    assert outcome.passed, outcome
    if machine == "x86_64":
        outcome = tried(IA32, "assert f() == -1", names=("f",))  # or the kernel has no such entry
        assert outcome.passed or outcome.kind == "crashed", outcome


def test_signals_stay_inside():
    """A signal to the program's own process group reaches nothing outside, such as the process that keeps the time."""
    for name in ("SIGSTOP", "SIGKILL"):
        assert tried(f"import os, signal\ndef f(x):\n    os.kill(0, signal.{name})\n    return 4").passed


def test_scratch_is_there_and_empty():
    """A program may write into its folder, which holds nothing of another's."""
    for _ in range(2):
        program = (
            "import os\nbefore = os.listdir()\nopen('x', 'w').write('y')\ndef f(x): return before, open('x').read()"
        )
        assert tried(program, "assert f(0) == ([], 'y')").passed


def test_one_exam_leaves_nothing_to_the_next():
    """Of exams that one process holds, each begins as the first: no patch, file or descriptor of another's is there."""
    seen = """
import json, os, sys
def f():
    def is_open(fd):
        try: return os.fstat(fd)
        except OSError: return None
    more = [name for name in ("mine", "exam") if hasattr(json, name) or name in vars(sys.modules["__main__"])]
    return os.listdir(), more, len(list(filter(None, map(is_open, range(3, 1000))))), os.getpid()
"""
    leaves = f"{seen}json.mine = open('x', 'w')\nsys.modules['__main__'].exam = 1\n"
    with contextlib.closing(sandbox_run.Jailer(LIMITS)) as jailer:
        for _ in range(2):
            assert examine(Exam(leaves, ["assert f()[1] == ['mine', 'exam']"], ["f"]), LIMITS, jailer).passed
            fresh = examine(Exam(seen, ["assert f() == ([], [], 2, 1), f()"], ["f"]), LIMITS, jailer)
            assert fresh == Outcome(True, None, None)


def test_a_killed_process_of_jails_is_replaced():
    """Where what makes jails is killed, one exam has an error that says so, and the next is held."""
    exam = Exam("def f(x): return 4", ["assert f(2) == 4"], ["f"])
    with contextlib.closing(sandbox_run.Jailer(LIMITS)) as jailer:
        assert examine(exam, LIMITS, jailer).passed
        jailer._process.kill()
        assert examine(exam, LIMITS, jailer).error == "no sandbox can be made here (its process ended with status -9)"
        assert examine(exam, LIMITS, jailer).passed


def test_many_exams_keep_their_order():
    """Outcomes of exams that are held side by side come in the order of the exams."""
    programs = [f"def f(x): return {x}" for x in (4, 5, 4, 6, 4, 7)]
    outcomes = sandbox_run.examine_all([Exam(program, ["assert f(2) == 4"], ["f"]) for program in programs], LIMITS)
    assert [outcome.passed for outcome in outcomes] == [True, False] * 3


def test_environment_is_empty(monkeypatch):
    """No variable of ours, so no key, is there; the order of sets is the same each time."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    program = "import os\ndef f(): return 'secret' in str(os.environ), hash('a')"
    runs = [tried(program, f"assert f() == (False, {value})") for value in (0, 1)]
    assert not any(run.passed for run in runs)
    same = [tried("seen = list(set('abcdefgh'))\ndef f(): return seen", "assert f() == 0, f()").why for _ in range(2)]
    assert same[0] == same[1]


def test_no_network():
    """A server on this very machine cannot be reached, by the network or by a socket in a file."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        came = threading.Thread(target=lambda: socket.create_connection(("127.0.0.1", port)).close())
        came.start()  # it is there for us
        server.accept()[0].close()
        came.join()
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        assert "OSError" in tried(program).why
    assert "Errno" in tried("import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')").why


def test_builtins_and_imports_of_tests():
    """A built-in in a test is Python's, though the program has one of that name, unless `names` says it is the program's."""
    fooled = "sum = set = lambda *a: 0\ndef f(x): return [1, 2]"
    assert not tried(fooled, "assert set(f(0)) == set([5])").passed
    assert tried("def sum(a, b): return 10 * a + b", "assert sum(1, 2) == 12", names=("sum",)).passed
    assert tried("def f(x): return x", "assert math.isclose(f(1.0), 1)", imports=["import math"]).passed


@pytest.mark.slow
def test_time_is_limited():
    """An endless loop ends by its CPU time, in the program or in a call, and a sleep by the clock; many at once too."""
    with ThreadPoolExecutor(4) as pool:
        sources = ["while True: pass", "def f(x):\n    while True: pass", "import time; time.sleep(1000)"]
        sources += ["import os, signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"]
        busy, calls, asleep, stubborn = pool.map(lambda source: tried(source, limits=Limits(1, 0.5)), sources)
    assert busy.why == "the program: it ended, its CPU time over"
    assert calls.why == "assert f(2) == 4: it ended, its CPU time over"
    assert asleep.why == "the program: it ended, its wall time over"
    assert not stubborn.passed and stubborn.error is None
    assert {busy.kind, calls.kind, asleep.kind, stubborn.kind} == {"out of time"}


KINDS = {
    "def f(x): return 5": "failed a test",
    "def f(x)": "SyntaxError",
    "def f(x): return y": "NameError",
    "class Own(Exception): pass\ndef f(x): raise Own('x: y')": "another error",
    "x = []\nwhile True: x.append(bytearray(2**20))": "out of memory",
    "import os\ndef f(x): os._exit(0)": "left early",
    "def f(x): return 'x' * 2**25": "a value too large",
    f"{LIBC}def f(x): libc.strlen(1)": "crashed",
    "class crashed(Exception): pass\ndef f(x): raise crashed": "another error",
    "def f(x): raise type('it ended', (Exception,), {})": "another error",
}


@pytest.mark.parametrize(("program", "kind"), KINDS.items(), ids=KINDS.values())
def test_kind_of_failure(program, kind):
    """Why a program failed comes as one of a few kinds, whatever text the program puts into its errors."""
    assert tried(program).kind == kind


def changed(code):
    """What starts the process that makes jails with `code` run first; `own` are its names."""
    begin = f"import json, runpy, sys\nown = runpy.run_path({jail.__file__!r})['main'].__globals__\n"
    return lambda settings: ["-c", f"{begin}{code}\nown['main'](json.loads(sys.argv[1]))", settings]


def test_killed_from_outside_is_not_out_of_time(monkeypatch):
    """A kill long before the CPU time is over, as by a system short of memory, is reported apart from one at the limit."""
    killing = """
import os, time
fork, forks, depth = os.fork, 0, 0
def forked():
    global forks, depth
    forks += 1
    pid = fork()
    if not pid:
        depth += 1
    elif depth and forks == 2:  # in the first process that keeps a jail's time, the program's
        time.sleep(2)
        os.kill(pid, 9)
    return pid
os.fork = forked
"""
    monkeypatch.setattr(sandbox_run, "_jail_argv", changed(killing))
    outcome = tried("import time\ntime.sleep(100)")
    assert outcome.kind == "killed by the system" and "short of memory" in outcome.why, outcome


def test_nothing_is_left(tmp_path, monkeypatch):
    """Neither a mount nor a folder nor a process is left behind."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def children():
        """Of this process, those that wait to be reaped too."""
        stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
        return sum(int(fields[1]) == os.getpid() for fields in stats)

    with open("/proc/self/mounts") as mounts:
        before = mounts.read()
    others = children()  # tests that ran before may have left a helper of a library's
    assert tried("def f(x): return 4").passed and not tried("import os; os._exit(3)").passed
    with open("/proc/self/mounts") as mounts:
        assert mounts.read() == before
    assert not list(tmp_path.iterdir())
    assert children() == others


OUTLIVING = {
    "a stop that only a tracer sees": "l.prctl(1, 0, 0, 0, 0); l.ptrace(0, 0, 0, 0); os.kill(1, signal.SIGCHLD)",
    "two forks and a session": "os.fork() or (os.setsid(), os.fork() or time.sleep(99))",
    "a thread that sleeps": "threading.Thread(target=time.sleep, args=(99,)).start()",
    "a clone of its parent's": "l.syscall(56, 0x8000 | 17, 0, 0, 0, 0)",
    "a newer clone": "l.syscall(435, ctypes.byref((ctypes.c_ulong * 11)(0x8000, 0, 0, 0, 17)), 88)",
    "all signals blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))",
    "no signal heeded": "[signal.signal(n, signal.SIG_IGN) for n in range(1, 65) if n not in (9, 19, 32, 33)]",
    "all that it may signal": "os.kill(-1, signal.SIGKILL)",
    "a stop": "os.kill(0, signal.SIGSTOP)",
    "another program": "os.execv('/usr/bin/sleep', ['sleep', '1'])",
}


def outliving(end):
    """A program that is right, tries one of OUTLIVING, and stays for as long as it is let."""
    source = f"{LIBC.replace('libc', 'l')}import atexit, signal, threading, time\natexit.register(time.sleep, 99)\n"
    return f"{source}def f(x):\n    try: {end}\n    except Exception: pass\n    return 4"


def survivors(mark):
    """Processes that have `mark` as their limit of CPU seconds, or in their command line, as the one outside has."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            own = (folder / "cmdline").read_bytes() + (folder / "limits").read_bytes()
        except (OSError, ProcessLookupError):  # it ended
            continue
        if re.search(rf'"seconds": {mark}\b|cpu time +{mark}\b'.encode(), own):
            found.append(folder.name)
    return found


def test_nothing_outlives_its_sandbox():
    """Whatever a program tries, when its exam has ended no process of it is there, not even a dead one."""
    mark = 4000 + os.getpid() % 1000  # a limit that no other process has
    with ThreadPoolExecutor(len(OUTLIVING)) as pool:
        outcomes = pool.map(lambda end: tried(outliving(end), limits=Limits(mark, 0.5)), OUTLIVING.values())
    assert survivors(mark) == []
    assert all(outcome.passed for outcome in outcomes)


AS_A_USER = """
import json, os, sys
from concurrent.futures import ThreadPoolExecutor
from rpo.sandbox.run import Exam, Limits, check, examine
limits = Limits(int(sys.argv[1]), 0.5)
check(limits)
exams = [Exam(program, ["assert f(2) == 4"], ["f"]) for program in json.load(sys.stdin)]
with ThreadPoolExecutor(len(exams)) as pool:
    outcomes = list(pool.map(lambda exam: examine(exam, limits), exams))
print(os.getuid(), [outcome.passed for outcome in outcomes])
"""


def test_an_ordinary_user_s_sandbox(tmp_path):
    """By a user who is not root it holds as well: the self-test passes, and no program outlives its exam."""
    python = next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if fit(p)), None)
    if os.getuid() == 0 and python is None:
        pytest.skip("no Python 3.11 of the system's, which another user could run")
    root = Path(sandbox_run.__file__).parents[2]
    shutil.copytree(root / "rpo/sandbox", tmp_path / "rpo/sandbox")
    shutil.copy(root / "rpo/errors.py", tmp_path / "rpo")  # and not rpo/__init__.py, which asks for torch
    user = {"user": 12345, "group": 12345, "extra_groups": []} if os.getuid() == 0 else {}
    mark = 5000 + os.getpid() % 1000
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's are its user's own
        shutil.copytree(tmp_path, folder, dirs_exist_ok=True)
        os.chmod(folder, 0o755)
        done = subprocess.run(
            [python or sys.executable, "-c", AS_A_USER, str(mark)],
            input=json.dumps([outliving(end) for end in OUTLIVING.values()]),
            cwd=folder,
            env={"PATH": os.defpath},
            capture_output=True,
            text=True,
            **user,
        )
    if "no sandbox can be made here" in done.stderr:
        pytest.skip("users may not make namespaces here")
    assert done.returncode == 0, done.stderr
    assert survivors(mark) == []
    assert done.stdout.split(maxsplit=1)[1].strip() == str([True] * len(OUTLIVING))


def fit(python):
    """Whether that is a Python that can run the sandbox."""
    try:
        return subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode == 0
    except OSError:
        return False


def test_a_sandbox_ends_with_who_made_it(tmp_path):
    """A process that is killed while it tries a program leaves none behind, nor a folder; in its jail no capability is left."""
    mark = 6000 + os.getpid() % 1000
    code = f"from rpo.sandbox.run import *\nexamine(Exam('import time; time.sleep(999)', [], []), Limits({mark}, 0.5))"
    root = Path(sandbox_run.__file__).parents[2]
    maker = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        wait_until(lambda: len(survivors(mark)) >= 5)  # two jailed, two that keep their time, and what makes them
        time.sleep(1.5)  # until the program sleeps; before that they end as their pipes do
        status = [(Path("/proc") / pid / "status").read_text() for pid in survivors(mark)]
        jailed = [text for text in status if "Seccomp:\t2" in text]
        assert len(jailed) == 2 and all(re.search(r"CapEff:\t0{16}\nCapBnd", text) for text in jailed)
    finally:
        maker.kill()
        maker.wait()
    wait_until(lambda: not survivors(mark))
    assert not list(tmp_path.iterdir())


def wait_until(true):
    """Fails if that is not so within a while."""
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("not in time")


def test_a_system_that_is_short_of_something(monkeypatch):
    """Where no process can be started that is an error of the exam, and no file stays open."""

    def popen(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(subprocess, "Popen", popen)
    assert "Resource temporarily unavailable" in tried("def f(x): return 4").error
    assert os.listdir("/proc/self/fd") == before


def test_refuses_where_it_cannot_be_made(monkeypatch):
    """Without namespaces, on another system, or where the jail would leak, nothing is run and one line says why."""
    with monkeypatch.context() as patch:
        broken = "def separate(): raise OSError('unshare: no')\nown['separate'] = separate"
        patch.setattr(sandbox_run, "_jail_argv", changed(broken))
        with pytest.raises(
            UserError, match=r"no sandbox can be made here \(OSError: unshare: no\), and programs run only in one"
        ):
            check(LIMITS)
        assert tried("def f(x): return 4").error == "no sandbox can be made here (OSError: unshare: no)"
    with monkeypatch.context() as patch:
        patch.setattr(sandbox_run, "_jail_argv", changed("own['enter'] = lambda *_: None"))
        patch.setattr(
            sandbox_run, "_BREAK_OUT", "def escapes(): return [n for n in __import__('os').listdir('/') if n == 'etc']"
        )
        with pytest.raises(UserError, match=r"the sandbox does not hold here .*'etc'.*; nothing is run"):
            check(LIMITS)
    with monkeypatch.context() as patch:
        patch.setattr(sandbox_run, "_jail_argv", lambda settings: ["-c", "raise SystemExit(3)"])
        assert tried("def f(x): return 4").error == "no sandbox can be made here (its process ended with status 3)"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(UserError, match="the sandbox needs Linux's namespaces, this is darwin"):
            check(LIMITS)


def test_what_a_container_keeps_under_usr_is_not_seen():
    """The interpreter's libraries are, and no whole prefix: /usr/src/app may hold the answers and a key."""
    seen = sandbox_run._see(os.path.realpath(sys.executable))
    assert not {"/", "/usr", "/usr/local", "/usr/src"} & {*seen}
