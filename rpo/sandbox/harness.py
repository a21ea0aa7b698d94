"""Both sides of an exam: one process holds a program, another its tests. A script for `run.py`, standard library only.

    python -c "$(cat harness.py)" serve      the program's side: requests on stdin, replies on stdout, a JSON line each
    python -c "$(cat harness.py)" examine    the tests' side: the exam on stdin, the verdict on stdout, the program's
                                             side by two further file descriptors

In the same process as its tests a program could exit before they run, patch their comparisons, read expected values off a
frame or print what a pass prints. In another process it cannot: it receives arguments and returns values, and only the
tests' side, which runs no code of the program, compares them. Values are of Python's own types; anything else that a
function returns can only be passed back to the program, and equals nothing.
"""

import builtins
import contextlib
import json
import os
import sys
import types

LONGEST = 2**24  # bytes of one reply
_PLAIN = (bool, int, float, str)
_GROUPS = {"tuple": tuple, "list": list, "set": set, "frozenset": frozenset}


def encode(value: object, held: list | None = None) -> object:
    """A value in JSON, with its type's name where JSON has no such type; subclasses as their plain type.

    The program's side passes `held`: values without such a form are appended to it and sent as their number.
    """
    if value is None or type(value) in _PLAIN:
        return value
    for plain in _PLAIN:
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if hasattr(type(value), "as_integer_ratio"):  # Fraction, Decimal: equal to what they are worth
        return {"ratio": list(value.as_integer_ratio())}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(k, held), encode(v, held)] for k, v in value.items()]}
    for name, group in _GROUPS.items():
        if isinstance(value, group):
            return {name: [encode(item, held) for item in value]}
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return {"type": value.__name__}
    if isinstance(value, Remote):
        return {"name": value._name}
    if isinstance(value, Other):
        return {"held": value._number}
    held.append(value)
    return {"other": [type(value).__name__, len(held) - 1]}


def decode(value: object, names: dict | None = None, held: list | None = None) -> object:
    """The value that `encode` encoded. The program's side passes its own `names` and `held`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in _GROUPS:
        return _GROUPS[kind](decode(item, names, held) for item in content)
    match kind:
        case "dict":
            return {decode(k, names, held): decode(v, names, held) for k, v in content}
        case "complex":
            return complex(*content)
        case "ratio":
            from fractions import Fraction  # takes longer than most exams

            return Fraction(*content)
        case "bytes":
            return bytes.fromhex(content)
        case "type" if isinstance(own := getattr(builtins, content), type):
            return own
        case "name":
            return names[content]
        case "held":
            return held[content]
        case "other":
            return Other(*content)
    raise ValueError(kind)


class Other:
    """A value of the program that has none of Python's own types: it can be passed back, and equals nothing else."""

    def __init__(self, kind: str, number: int):
        self._kind, self._number = kind, number

    def __repr__(self) -> str:
        return f"<{self._kind}>"


class Remote:
    """A function of the program, or any other value with that name there."""

    def __init__(self, name: str, ask):
        self._name, self._ask = name, ask

    def __call__(self, *args, **kwargs):
        return self._ask({"call": self._name, "args": encode(args), "kwargs": encode(kwargs)})


class ProgramError(Exception):
    """The program's end, or a value that cannot be taken."""


class RaisedError(ProgramError):
    """An exception of the program; its name is the program's to choose."""


# ---- the program's side


def serve() -> None:
    """Runs the program, then each requested call."""
    builtins.exit = builtins.quit = sys.exit  # as where Python runs with its site module
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 0)  # the program's own input and output go nowhere
    os.dup2(2, 1)
    _send(replies, "ready")
    # In a module not named __main__, so that code for scripts does not run; dataclasses look their module up.
    sys.modules["program"] = types.ModuleType("program")
    names, held = vars(sys.modules["program"]), []
    for request in map(json.loads, requests):
        try:
            reply = json.dumps({"to": request["number"], "value": encode(_answer(request, names, held), held)})
        except BaseException as error:  # SystemExit too
            reply = json.dumps({"to": request["number"], "raised": f"{type(error).__name__}: {error}"[:300]})
        replies.write(reply.encode() + b"\n")
        replies.flush()


def _answer(request: dict, names: dict, held: list) -> object:
    if "run" in request:
        with contextlib.suppress(SystemExit):  # the end of a script, and its functions are there
            exec(compile(request["run"], "program", "exec"), names)
        return None
    function = eval(request["call"], names)
    return function(*decode(request["args"], names, held), **decode(request["kwargs"], names, held))


# ---- the tests' side


def examine(give: int, take: int) -> dict:
    """{"passed", "why", "kind"}, or {"error"} if the program's side did not start. Prints a failing verdict first."""
    exam = json.loads(sys.stdin.read())
    requests, replies = os.fdopen(give, "wb"), os.fdopen(take, "rb")

    def ask(request: dict) -> object:
        number = int.from_bytes(os.urandom(8))  # or what a program writes itself would count for a later request
        with contextlib.suppress(BrokenPipeError):
            _send(requests, request | {"number": number})
        line = replies.readline(LONGEST)
        if not line.endswith(b"\n"):
            raise ProgramError("a value too large" if line else "it ended")
        reply = json.loads(line)
        if not isinstance(reply, dict) or reply.get("to") != number:
            raise ProgramError("a reply out of turn")
        if "raised" in reply:
            raise RaisedError(str(reply["raised"]))
        return decode(reply["value"])

    if replies.readline(100) != b'"ready"\n':
        return {"error": "the program's side did not start"}
    stopped = {"passed": False, "why": "the tests' side was stopped at a limit", "kind": "tests stopped"}
    print(json.dumps(stopped), flush=True)  # counts unless another follows
    at = "the program"
    try:
        names = {name: Remote(name, ask) for name in exam["names"]}
        exec("\n".join(exam["imports"]), names)
        ask({"run": exam["program"]})
        ask({"run": exam["setup"]})
        for at in exam["tests"]:
            exec(compile(at, "test", "exec"), names)
    except Exception as error:
        name = {ProgramError: "", RaisedError: "", AssertionError: "not so"}.get(type(error), type(error).__name__)
        text = ": ".join(filter(None, (name, str(error))))
        if isinstance(error, AssertionError):
            kind = "failed a test"
        else:  # the program names its own exceptions, and none of ours
            kind = text if type(error) is ProgramError else f"raised {text.partition(':')[0]}"
        return {"passed": False, "why": f"{at}: {text}"[:500], "kind": kind[:100]}
    return {"passed": True, "why": None, "kind": None}


def _send(file, message: object) -> None:
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)  # CPU time has its own limit
    if sys.argv[1] == "serve":
        serve()
    else:
        print(json.dumps(examine(*map(int, sys.argv[2:]))))
