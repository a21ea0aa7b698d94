"""Both sides of an exam: one process holds a program, another its tests. For `jail.py`, standard library only.

`serve` is the program's side: requests on its standard input, replies on its output, a JSON line each. `verdict` is the tests'
side: the exam on its input, the verdict on its output, the program's side by two further file descriptors.

In the same process as its tests a program could exit before they run, patch their comparisons, read expected values off a
frame or print what a pass prints. In another process it cannot: it receives arguments and returns values, and only the
tests' side, which runs no code of the program, compares them. Values of Python's own types cross whole, their subclasses as
that type. Any other stays with the program, and what tests do to it is done there (its truth, length, items, attributes,
calls), except for whatever takes a value to compare with (==, <, in, arithmetic): it equals nothing but itself.
"""

import builtins
import contextlib
import importlib
import json
import os
import sys
import types

LONGEST = 2**24  # bytes of one reply
LONGEST_SAID = 2**16  # characters of an exception's
# With what makes each of a subclass, whose own __str__ may say otherwise (an Enum's).
_PLAIN = {bool: bool, int: int.__int__, float: float.__float__, str: str.__str__}
_GROUPS = {"tuple": tuple, "list": list, "set": set, "frozenset": frozenset}
_VIEWS = {
    "dict_keys": lambda items: dict.fromkeys(items).keys(),
    "dict_values": lambda items: dict(enumerate(items)).values(),
    "dict_items": lambda items: dict(items).items(),
}
_MADE = (
    {  # type: its module, the arguments that make an equal one
        "complex": ("builtins", lambda v: [v.real, v.imag]),
        "range": ("builtins", lambda v: [v.start, v.stop, v.step]),
        "bytearray": ("builtins", lambda v: [bytes(v)]),
        "Fraction": ("fractions", lambda v: [v.numerator, v.denominator]),
        "Decimal": ("decimal", lambda v: [str(v)]),
        "array": ("array", lambda v: [v.typecode, v.tolist()]),
        "deque": ("collections", lambda v: [list(v), v.maxlen]),
        "Counter": ("collections", lambda v: [dict(v)]),
        "OrderedDict": ("collections", lambda v: [list(v.items())]),
        "defaultdict": ("collections", lambda v: [v.default_factory, dict(v)]),
        "timedelta": ("datetime", lambda v: [v.days, v.seconds, v.microseconds]),
        "timezone": ("datetime", lambda v: [v.utcoffset(None)]),
        "date": ("datetime", lambda v: [v.year, v.month, v.day]),
        "time": ("datetime", lambda v: [v.hour, v.minute, v.second, v.microsecond, v.tzinfo]),
        "datetime": ("datetime", lambda v: [*v.timetuple()[:6], v.microsecond, v.tzinfo]),
    }
    | {view: ("builtins", lambda v: [list(v)]) for view in _VIEWS}
)
# What tests may do to a value that stays with the program, where its type can: nothing that is given an expected value.
_DONE_THERE = [
    f"__{name}__"
    for name in "bool len iter next reversed getitem setitem delitem call int float index round abs neg str repr enter exit".split()
]


def encode(value: object, held: dict | None = None) -> object:
    """A value in JSON, with its type's name where JSON has no such type.

    The program's side passes `held`: values without such a form are kept there, by a number that is sent. Raises TypeError
    on the tests' side, where there is no such way.
    """
    if value is None or type(value) in _PLAIN:
        return value
    if held is None and hasattr(type(value), "_held"):
        return {"held": type(value)._held}
    for kind in type(value).__mro__:
        if (made := _MADE.get(kind.__name__)) and made[0] == kind.__module__:
            return {kind.__name__: encode(made[1](value), held)["list"]}
    if (
        isinstance(value, memoryview) and value.format == "B" and value.ndim == 1
    ):  # of others equality is by their items
        return {"bytes": value.hex()}
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return {"type": value.__name__}
    plain = _plain(value, held)
    if held is None:
        if hasattr(value, "__next__"):
            return {"iter": encode(list(value))}
        if plain is _NONE:
            raise TypeError(f"a test's {type(value).__name__} cannot be passed to the program")
        return plain
    if plain is not _NONE and (type(value) in _WHOLE or isinstance(value, list | set | dict)):
        return plain
    held[id(value)] = value  # kept, so no other has its number
    able = [name for name in _DONE_THERE if getattr(type(value), name, None) not in (None, getattr(object, name, None))]
    return {"other": [type(value).__name__, id(value), able, None if plain is _NONE else [plain]]}


_NONE = object()
_WHOLE = (*_PLAIN, bytes, *_GROUPS.values())


def _plain(value: object, held: dict | None) -> object:
    """A value of a built-in type or a subclass as that type in JSON, or _NONE."""
    for plain, made in _PLAIN.items():
        if isinstance(value, plain):
            return made(value)
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(k, held), encode(v, held)] for k, v in dict.items(value)]}
    for name, group in _GROUPS.items():
        if isinstance(value, group):
            return {name: [encode(item, held) for item in group.__iter__(value)]}
    return _NONE


def decode(value: object, held: dict | None = None, ask=None) -> object:
    """The value that `encode` encoded. The program's side passes what it has `held`, the tests' side how to `ask` it."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in _GROUPS:
        return _GROUPS[kind](decode(item, held, ask) for item in content)
    if kind in _MADE:
        make = _VIEWS.get(kind) or getattr(importlib.import_module(_MADE[kind][0]), kind)
        return make(*(decode(item, held, ask) for item in content))
    match kind:
        case "dict":
            return {decode(k, held, ask): decode(v, held, ask) for k, v in content}
        case "bytes":
            return bytes.fromhex(content)
        case "iter":
            return iter(decode(content, held, ask))
        case "type" if isinstance(own := getattr(builtins, content), type):
            return own
        case "held":
            return held[content]
        case "other":
            return _other(*content, ask)
    raise ValueError(kind)


class Other:
    """A value of the program that has none of Python's own types: equal only to itself, and used only there."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Other) and self._held == other._held

    def __hash__(self) -> int:
        return hash(self._held)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


def _other(kind: str, number: int, able: list[str], plain: list | None, ask) -> object:
    """The stand-in of a value that stays with the program: an `Other`, or where it has a `plain` form that with attributes."""

    def done_there(name: str):
        return lambda self, *args, **more: ask({"do": name, "on": number, "args": encode(args), "more": encode(more)})

    if plain is None:
        known = {name: done_there(name) for name in {*able} & {*_DONE_THERE}} | {
            "__setattr__": done_there("__setattr__")
        }
        return type(kind, (Other,), known | {"_held": number, "__getattr__": done_there("__getattr__")})()
    value = decode(plain[0], None, ask)
    known = {name: done_there(name) for name in {*able} & {"__str__", "__repr__"}}  # a namedtuple's own
    return type(kind, (type(value),), known | {"_held": number, "__getattr__": done_there("__getattr__")})(value)


class Names(dict):
    """What tests know by name: their own, and what the program has by `theirs` at that moment."""

    def __init__(self, theirs: list[str], ask):
        self._theirs, self._ask = theirs, ask

    def __missing__(self, name: str) -> object:
        if name not in self._theirs:
            raise KeyError(name)
        return self._ask({"get": name})


class ProgramError(Exception):
    """The program's end, or a value that cannot be taken."""


class RaisedError(ProgramError):
    """An exception of the program: `said` is its str(), `text` has its name, the program's to choose, before that."""

    def __init__(self, text: str, said: str):
        Exception.__init__(self, said)
        self.text = text

    def __str__(self) -> str:
        return self.args[0]


def _raised(text: str, kind: str, said: str) -> RaisedError:
    """That exception, of the built-in class `kind` too, for tests that expect one and for what ends an iteration."""
    own = getattr(builtins, kind, None)
    if not isinstance(own, type) or not issubclass(own, Exception) or issubclass(own, BaseExceptionGroup):
        return RaisedError(text, said)
    return type(kind, (RaisedError,) if own is Exception else (RaisedError, own), {})(text, said)


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
    names, held = vars(sys.modules["program"]), {}
    for request in map(json.loads, requests):
        replies.write(_reply(request, names, held).encode() + b"\n")
        replies.flush()


def _reply(request: dict, names: dict, held: dict) -> str:
    try:
        return json.dumps({"to": request["number"], "value": encode(_answer(request, names, held), held)})
    except BaseException as error:  # SystemExit too
        own = (kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
        name = type(error).__name__
        said = f"{name}: {error}"
        return json.dumps(
            {"to": request["number"], "raised": [said[:300], next(own), said[len(name) + 2 :][:LONGEST_SAID]]}
        )


def _answer(request: dict, names: dict, held: dict) -> object:
    if "run" in request:
        with contextlib.suppress(SystemExit):  # the end of a script, and its functions are there
            exec(compile(request["run"], "program", "exec"), names)
        return None
    if "get" in request:
        return eval(request["get"], names)
    value, action = held[request["on"]], request["do"]
    do = getattr if action == "__getattr__" else getattr(type(value), action)
    return do(value, *decode(request["args"], held), **decode(request["more"], held))


# ---- the tests' side


def verdict(give: int, take: int) -> None:
    """Reads an exam and writes the verdict: what `examine` returns."""
    with os.fdopen(os.dup(0), "rb") as exam, os.fdopen(os.dup(1), "wb") as verdicts:
        _send(verdicts, examine(json.load(exam), give, take, lambda early: _send(verdicts, early)))


def examine(exam: dict, give: int, take: int, say) -> dict:
    """{"passed", "why", "kind"}, or {"error"} if the program's side did not start. Says a failing verdict first."""
    requests, replies = os.fdopen(give, "wb"), os.fdopen(take, "rb")

    def ask(request: dict) -> object:
        number = int.from_bytes(os.urandom(8))  # or what a program writes itself would count for a later request
        with contextlib.suppress(BrokenPipeError):
            _send(requests, request | {"number": number})
        line = replies.readline(LONGEST)
        if not line.endswith(b"\n"):
            raise ProgramError("a value too large" if line else "it ended")
        return _taken(line, number, ask)

    if replies.readline(100) != b'"ready"\n':
        return {"error": "the program's side did not start"}
    stopped = {"passed": False, "why": "the tests' side was stopped at a limit", "kind": "tests stopped"}
    say(stopped)  # counts unless another follows
    at = "the program"
    try:
        names = Names(exam["names"], ask)
        exec("\n".join(exam["imports"]), names)
        ask({"run": exam["program"]})
        ask({"run": exam["setup"]})
        for at in exam["tests"]:
            exec(compile(at, "test", "exec"), names)
    except Exception as error:
        own = isinstance(error, ProgramError)
        name = "" if own else "not so" if isinstance(error, AssertionError) else type(error).__name__
        text = ": ".join(filter(None, (name, _text(error))))
        if isinstance(error, AssertionError) and not own:
            kind = "failed a test"
        else:  # the program names its own exceptions, and none of ours
            kind = text if type(error) is ProgramError else f"raised {text.partition(':')[0]}"
        return {"passed": False, "why": f"{at}: {text}"[:500], "kind": kind[:100]}
    return {"passed": True, "why": None, "kind": None}


def _taken(line: bytes | str, number: int, ask) -> object:
    """The value in a reply. Raises ProgramError: an exception there, or no reply to that request."""
    reply = json.loads(line)
    if not isinstance(reply, dict) or reply.get("to") != number:
        raise ProgramError("a reply out of turn")
    if "raised" in reply:
        raise _raised(*map(str, reply["raised"]))
    return decode(reply["value"], None, ask)


def _text(error: Exception) -> str:
    try:
        return error.text if isinstance(error, RaisedError) else str(error)
    except Exception:  # of a value that stays with the program, which may have ended
        return ""


def _send(file, message: object) -> None:
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()
