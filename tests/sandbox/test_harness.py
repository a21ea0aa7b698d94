"""Values across the two sides of an exam: tests see of a program's value what they would in its own process."""

import builtins
import itertools

import pytest

from rpo.sandbox import harness

PROGRAM = """
import array, collections, datetime, enum, itertools, os
from decimal import Decimal
from fractions import Fraction
class Color(enum.Enum): RED = "red"; BLUE = "blue"
class Int(enum.IntEnum): ONE = 1
class Name(str, enum.Enum): RED = "red"
class Odd(int):
    def __int__(self): return 9
    def __str__(self): return "nine"
class Truth:
    def __init__(self, truth): self.truth = truth
    def __bool__(self): return self.truth
class Sized:
    def __init__(self, size): self.size = size
    def __len__(self): return self.size
class Old:
    def __getitem__(self, i): return [5, 6][i]
class Text:
    def __str__(self): return f"text {self.of}"
class Own(ValueError): pass
Point = collections.namedtuple("Point", "x y")
five = 5
calls = []
def count():
    calls.append(1)
def own(): raise Own("why")
"""

ALIKE = {
    "True": ["f()"],
    "Name.RED": ["f() == 'red'", "f() == 'Name.RED'"],
    "Odd(3)": ["f() == 3", "f() == 9"],
    "Truth(False)": ["not f()"],
    "Truth(True)": ["f()"],
    "Sized(0)": ["not f()", "len(f()) == 0"],
    "Sized(2)": ["f()", "len(f()) == 2"],
    "object()": ["f()", "f() != 1", "list(f())"],
    "{1: 2}.keys()": ["f() == {1}", "f() != [1]", "list(f()) == [1]", "set(f()) == {1}", "1 in f()"],
    "{1: 2}.values()": ["list(f()) == [2]", "f() != [2]", "len(f()) == 1", "2 in f()"],
    "{1: [2]}.items()": ["list(f()) == [(1, [2])]", "dict(f()) == {1: [2]}"],
    "collections.OrderedDict(a=1).items()": ["f() == {('a', 1)}"],
    "range(3)": ["f() == range(3)", "f() == [0, 1, 2]", "list(f()) == [0, 1, 2]", "f()[-1] == 2", "g(f()) == 'range'"],
    "collections.deque([1, 2])": ["f() == [1, 2]", "list(f()) == [1, 2]", "f()[0] == 1", "f().popleft() == 1", "f()"],
    "collections.deque()": ["not f()"],
    "collections.Counter('aab')": ["f() == {'a': 2, 'b': 1}", "f()['z'] == 0", "f().most_common(1) == [('a', 2)]"],
    "collections.OrderedDict(a=1)": ["f() == {'a': 1}", "list(f()) == ['a']", "f().move_to_end('a') is None"],
    "collections.defaultdict(list, a=1)": ["f() == {'a': 1}", "f()['b'] == []"],
    "collections.defaultdict(lambda: 7, a=1)": ["f() == {'a': 1}", "f()['b'] == 7", "g(f()) == 'defaultdict'"],
    "collections.UserList([1])": ["len(f()) == 1", "f()[0] == 1", "[x for x in f()] == [1]", "1 in f()"],
    "(i * i for i in range(3))": ["list(f()) == [0, 1, 4]", "f() == [0, 1, 4]", "sum(f()) == 5", "4 in f()", "f()"],
    "map(str, [1])": ["list(f()) == ['1']", "next(f()) == '1'", "next(f(), 2) == '1'"],
    "filter(None, [0])": ["list(f()) == []", "next(f(), 2) == 2", "next(f())"],
    "zip('a', 'b')": ["dict(f()) == {'a': 'b'}"],
    "reversed([1, 2])": ["list(f()) == [2, 1]", "max(f()) == 2", "f()[0] == 2"],
    "itertools.count(5)": ["next(f()) == 5", "any(x == 7 for x in f())"],
    "Old()": ["list(f()) == [5, 6]", "6 in f()", "7 in f()", "f()[2]"],
    "Point(1, 2)": ["f() == (1, 2)", "f().y == 2", "f()._asdict() == {'x': 1, 'y': 2}", "f().z", "g(f()) == 'Point'"]
    + ["str(f()) == 'Point(x=1, y=2)'", "repr(f()) == '(1, 2)'"],
    "[Point(1, 2)]": ["f() == [(1, 2)]", "f()[0].x == 1", "max(f(), key=lambda p: p.y).x == 1"],
    "Color.RED": [
        "f() == Color.RED",
        "f() == Color.BLUE",
        "f() == 'red'",
        "f().value == 'red'",
        "f() in {Color.RED: 1}",
    ],
    "Color": ["[c.name for c in f()] == ['RED', 'BLUE']", "f()('red') == Color.RED", "hasattr(f(), 'GREEN')"],
    "Int.ONE": ["f() == 1", "f().name == 'ONE'", "f() + 1 == 2"],
    "array.array('i', [1, 2])": ["f() == [1, 2]", "list(f()) == [1, 2]", "f()[1] == 2", "f().tolist() == [1, 2]"],
    "memoryview(b'ab')": ["f() == b'ab'", "list(f()) == [97, 98]"],
    "bytearray(b'ab')": ["f() == b'ab'", "g(f()) == 'bytearray'"],
    "None": ["f() is None", "f()"],
    "Fraction(7, 2)": ["f() == 3.5", "f().numerator == 7", "int(f()) == 3"],
    "Decimal('inf')": ["f() == float('inf')", "f() > 5"],
    "datetime.date(2020, 1, 2)": ["str(f()) == '2020-01-02'", "f().year == 2020", "f() == f()"],
    "datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.timezone.utc)": [
        "f().isoformat() == '2020-01-02T03:00:00+00:00'"
    ],
    "datetime.timedelta(hours=30)": ["f().days == 1"],
    "lambda x: x + 1": ["f()(2) == 3", "f()('a')", "callable(f())"],
    "Text()": ["setattr(x := f(), 'of', 5) or str(x) == f'{x}' == 'text 5'", "str(f())"],
    "1 / 0": ["f()"],
    "five": ["five == 5", "five + f() == 10", "six"],
    "count()": ["f() or len(calls) == 1"],
    "0": [
        "g(range(3)) == 'range'",
        "next(h(iter([4]))) == 4",
        "[h(i) for i in range(3)] == [0, 1, 2]",
        "h([1])[0] == 1",
    ],
}


def outcome(test, names):
    try:
        exec(f"assert {test}", names)
    except Exception as error:
        raised = harness.RaisedError in type(error).__mro__
        return error.text.partition(":")[0] if raised else type(error).__name__
    return "passed"


def across(program, f):
    """What tests know by name where the program is on the other side, without processes."""
    theirs, held, numbers = {}, {}, itertools.count()

    def ask(request):
        number = next(numbers)
        reply = harness._reply(harness.json.loads(harness.json.dumps(request | {"number": number})), theirs, held)
        return harness._taken(reply, number, ask)

    ask({"run": f"{program}\ndef f(): return {f}\ndef g(x): return type(x).__name__\ndef h(x): return x"})
    return harness.Names([*theirs, "six"], ask)


@pytest.mark.parametrize(("value", "test"), [(value, test) for value, tests in ALIKE.items() for test in tests])
def test_values_are_as_in_one_process(value, test):
    """A test of a value that the program returns passes, fails or raises as where both are in one process."""
    alone = {}
    exec(f"{PROGRAM}\ndef f(): return {value}\ndef g(x): return type(x).__name__\ndef h(x): return x", alone)
    assert outcome(test, across(PROGRAM, value)) == outcome(test, alone)


CHEAT = """
class E:
    def yes(self, *other): return True
    __eq__ = __contains__ = __lt__ = __gt__ = __le__ = __ge__ = yes
    def __ne__(self, other): return False
    def __hash__(self): return hash(4)
    def __sub__(self, other): return 0
    __rsub__ = __and__ = __or__ = __mod__ = __sub__
class L(list, E): __eq__ = E.yes
class I(int): __eq__, __ne__, __hash__ = E.yes, E.__ne__, E.__hash__
class T(tuple): __eq__, __ne__, __contains__ = E.yes, E.__ne__, E.yes
"""


@pytest.mark.parametrize("value", ["E()", "L()", "I(5)", "T()"])
@pytest.mark.parametrize(
    "test",
    [
        "f() == 4",
        "4 == f()",
        "not f() != 4",
        "4 in f()",
        "f() in [4]",
        "f() in {4}",
        "abs(f() - 4) < 1e-6",
        "4 <= f() <= 4",
    ]
    + ["[f()] == [4]", "{f(): 1} == {4: 1}", "(1, f()) == (1, 4)", "not (f() - 4)"],
)
def test_comparisons_are_the_tests_own(value, test):
    """A class that equals, contains or subtracts to whatever is expected passes no test: it is not asked."""
    assert outcome(test, across(CHEAT, value)) != "passed"


@pytest.mark.parametrize(
    "name", [n for n, c in vars(builtins).items() if isinstance(c, type) and issubclass(c, Exception)]
)
def test_built_in_exceptions(name):
    """Each of Python's exceptions arrives as itself, and can be told from one of the tests' own."""
    caught = harness._raised(f"{name}: why", name, "why")
    assert (str(caught), caught.text) == ("why", f"{name}: why") and isinstance(caught, harness.RaisedError)
    assert isinstance(caught, getattr(builtins, name)) or name == "ExceptionGroup"


def test_a_subclass_of_an_exception():
    """A test that expects an exception catches the program's own subclass of it, and reads what it says."""
    names = across(PROGRAM, "0")
    exec("try: own()\nexcept ValueError as error: caught = str(error)", names)
    assert names["caught"] == "why"


def test_what_cannot_be_passed():
    """A value of the tests' own that has no form is an error that says so."""
    with pytest.raises(TypeError, match="a test's function cannot be passed to the program"):
        harness.encode([lambda: 1])
