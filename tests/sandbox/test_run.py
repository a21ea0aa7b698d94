"""Programs that try to do harm, or to pass without being right, in the sandbox."""

import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rpo.errors import UserError
from rpo.sandbox import jail
from rpo.sandbox import run as sandbox_run
from rpo.sandbox.run import Exam, Limits, Outcome, check, examine, subprocess

LIMITS = Limits(seconds=2, memory_gib=0.5)
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
KEYCTL = jail.MACHINES.get(os.uname().machine, (0, [0] * 8))[1][6]


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
    "a program of the system": ("import subprocess; subprocess.run(['/usr/bin/env'])", "BlockingIOError"),
    "its input": ("input()", "EOFError"),
}


@pytest.mark.parametrize(("program", "why"), HARM.values(), ids=HARM)
def test_harm_is_refused(program, why):
    """What would burden or spy on the machine fails as an error of the program's own."""
    outcome = tried(program)
    assert not outcome.passed and outcome.error is None and why in outcome.why, outcome


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
    f"{LIBC}libc.prctl(4, 0)\ndef f(x): libc.strlen(1)": "crashed",
}


@pytest.mark.parametrize(("program", "kind"), KINDS.items(), ids=KINDS.values())
def test_kind_of_failure(program, kind):
    """Why a program failed comes as one of a few kinds, whatever text the program puts into its errors."""
    assert tried(program).kind == kind


def test_killed_from_outside_is_not_out_of_time(monkeypatch):
    """A kill long before the CPU time is over, as by a system short of memory, is reported apart from one at the limit."""
    killing = (
        f"import json, os, runpy, sys, time\nmain, fork = runpy.run_path({jail.__file__!r})['main'], os.fork\n"
        "def forked():\n    pid = fork()\n    if pid and sys.argv[1].count('\"serve\"'):\n        time.sleep(2)\n"
        "        os.kill(pid, 9)\n    return pid\n"
        "os.fork = forked\nsys.exit(main(json.loads(sys.argv[1])))"
    )
    monkeypatch.setattr(
        sandbox_run, "_jail_argv", lambda settings: [sys.executable, "-I", "-S", "-c", killing, settings]
    )
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
    broken = "import os, sys, json\nos.write(json.loads(sys.argv[1])['report'], b'OSError: unshare: no'); sys.exit(125)"
    with monkeypatch.context() as patch:
        patch.setattr(sandbox_run, "_jail_argv", lambda settings: [sys.executable, "-c", broken, settings])
        with pytest.raises(
            UserError, match=r"no sandbox can be made here \(OSError: unshare: no\), and programs run only in one"
        ):
            check(LIMITS)
        assert tried("def f(x): return 4").error == "no sandbox can be made here (OSError: unshare: no)"
    leaky = (
        "import json, os, sys\ns = json.loads(sys.argv[1])\nos.close(s['report'])\nos.execv(s['argv'][0], s['argv'])"
    )
    with monkeypatch.context() as patch:
        patch.setattr(sandbox_run, "_jail_argv", lambda settings: [sys.executable, "-c", leaky, settings])
        patch.setattr(
            sandbox_run, "_BREAK_OUT", "def escapes(): return [n for n in __import__('os').listdir('/') if n == 'etc']"
        )
        with pytest.raises(UserError, match=r"the sandbox does not hold here .*'etc'.*; nothing is run"):
            check(LIMITS)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(UserError, match="the sandbox needs Linux's namespaces, this is darwin"):
            check(LIMITS)
