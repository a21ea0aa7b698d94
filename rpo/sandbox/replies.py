"""The program that a model's reply contains, in whichever form models write it.

Nothing is run: a text counts as a program where it parses as Python and binds the names that the tests call.
"""

import ast
import builtins
import contextlib
import html
import json
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence

BEGIN, END = "[BEGIN]", "[DONE]"
LONGEST = 50_000  # characters of a reply that is looked through; a longer one is a program as it stands
MOST = 64  # fences, and runs of lines, of one reply that are looked at; a loop of repetitions has many
_OPEN = r"<(?:think|thinking|thought|reasoning)>|\[THINK\]|<\|channel\|>analysis"
_CLOSE = r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]|<\|channel\|>final<\|message\|>"
_THOUGHT = re.compile(f"({_OPEN})|(?:{_CLOSE})", re.IGNORECASE)
_SPECIAL = re.compile(r"<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text|end_of_turn|end|return)\|>|<end_of_turn>|</s>")
# A marker is one where a line begins; within a program it is part of a string.
_BEGIN, _END = (re.compile(rf"^[ \t]*{re.escape(marker)}", re.MULTILINE) for marker in (BEGIN, END))
_FENCE = re.compile("`{3,}|~{3,}")
_TAGGED = re.compile(
    r"[<\[](python3?|py|code|pre|answer|solution|program)\b[^>\]\n]*[>\]](.*?)(?:[<\[]/\1[>\]]|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_CODE_LINE = re.compile(r"([ \t]*)(?:(?:def|class|import|from|async)\b|@|\w+[ \t]*=)")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_AS_TYPED = {
    **dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff")),
    **{0xA0: " ", 0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'"},
}


def program_of(reply: str, names: Sequence[str] = ()) -> str:
    """The program in `reply`, of which tests call `names`: the last text in it that parses and binds most of them.

    A reply that is itself a program is taken whole, up to a line [DONE]. Otherwise what is looked at are code in fences,
    of which the last may be cut, in tags ([PYTHON], <code>, ...), in a JSON string or behind >>>, and lines that parse
    amid prose; after a line [BEGIN] first. What a reasoning model thinks before it answers does not count. Where nothing
    binds a name, the last fenced code, or else the reply.
    """
    reply = _SPECIAL.split(_without_thoughts(reply).replace("\r\n", "\n"))[0]
    said = _END.split(reply)[0]
    if len(said) > LONGEST:
        return said
    amid_lines = said.partition(END)[0]
    regions = list(dict.fromkeys((_BEGIN.split(said)[-1], said, amid_lines.rpartition(BEGIN)[2], amid_lines)))
    best, most = None, 0
    for region, text in ((of, text) for of in regions for text in _candidates(of)):
        functions, others = _bound(text)
        if names:  # a function is worth more than an alias of it
            worth = 2 * len(functions.intersection(names)) + len(others.intersection(names))
        else:
            worth = min(len(functions), 1)
        if worth > most:
            best, most = (region, text), worth
        if functions.issuperset(names or functions) and most:
            break
    if best is not None:
        return _with_what_it_uses(*best)
    fenced = [code for region in regions for code in _fenced(region)]
    return textwrap.dedent(fenced[0]) if fenced else regions[-1]


def _without_thoughts(reply: str) -> str:
    """What is said aloud: not what stands in a thought, nor before the end of one that the prompt began, nor in one cut off."""
    aloud, at, thinking = [], 0, False
    for tag in _THOUGHT.finditer(reply):
        if not tag[1]:
            aloud, at, thinking = aloud if thinking else [], tag.end(), False
        elif not thinking:
            aloud.append(reply[at : tag.start()])
            thinking = True
    return "".join(aloud if thinking else [*aloud, reply[at:]])


def _with_what_it_uses(region: str, text: str) -> str:
    """The program `text` with, before it, the other fenced code of its reply that has names which it uses and lacks."""
    parts, lacking = [text], _lacking(text)
    for code in map(textwrap.dedent, _fenced(region)):
        if code.strip() not in text and lacking & set().union(*_bound(code)):
            parts.append(code)
            lacking = (lacking | _lacking(code)) - set().union(*_bound(code))
    return "\n".join(reversed(parts))


def _candidates(text: str) -> Iterator[str]:
    """All that may be the program, the likeliest first."""
    yield from _readings(text)
    for code in _fenced(text):
        yield from _readings(code)
    for code in _tagged(text):
        yield from _readings(code)
    yield from reversed(_INLINE.findall(text)[:MOST])
    yield from _runs(text)


def _readings(text: str) -> Iterator[str]:
    """`text` as it stands, and what it is with one layer taken off."""
    yield (plain := textwrap.dedent(text))
    if (typed := text.translate(_AS_TYPED)) != text:  # without zero-width characters, hard spaces and curly quotes
        yield textwrap.dedent(typed)
    if "\\n" in text and "\n" not in text.strip():
        yield text.replace("\\n", "\n")
    if ">>>" in text:
        yield "\n".join(line[4:] for line in plain.split("\n") if line[:4].rstrip() in (">>>", "..."))
    if text.lstrip()[:1] in ("{", "[", '"'):
        with contextlib.suppress(ValueError, RecursionError):
            for string in _strings(json.loads(text)):
                yield from map(textwrap.dedent, (string, *_fenced(string)))


def _strings(value: object) -> Iterator[str]:
    """The strings in a JSON value, the last first."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in reversed(list(value.values()) if isinstance(value, dict) else value):
            yield from _strings(item)


def _fenced(text: str) -> list[str]:
    """The code in fences of ``` or ~~~, the last first, each up to the fence with which it parses."""
    fences = list(_FENCE.finditer(text))[:MOST]
    blocks, at = [], 0
    while at < len(fences):
        opened = fences[at]
        closing = [(i, m) for i, m in enumerate(fences[at + 1 :], at + 1) if m[0] == opened[0]][:6]
        ends = [(i, m.start()) for i, m in closing] or [(len(fences), len(text))]
        blocks_here = (
            (code, i) for i, end in ends for code in _without_language(text[opened.end() : end]) if any(_bound(code))
        )
        if (block := next(blocks_here, None)) is None:  # no program: up to the first fence that begins a line
            lines = [(i, end) for i, end in ends if not text[text.rfind("\n", 0, end) + 1 : end].strip()]
            i, end = (lines or ends)[0]
            block = next(_without_language(text[opened.end() : end])), i
        blocks.append(block[0])
        at = block[1] + 1
    return blocks[::-1]


def _without_language(content: str) -> Iterator[str]:
    """What stands between fences, without the language on the first line, where code may begin too."""
    info, line_end, rest = content.partition("\n")
    if line_end:
        yield textwrap.dedent(rest)
    if info.strip():
        yield f"{info.strip().partition(' ')[2]}{line_end}{rest}"
        yield content.strip()
    elif not line_end:
        yield ""


def _tagged(text: str) -> Iterator[str]:
    """The code in tags, the last first, with and without one within it (<pre><code>)."""
    for tagged in list(_TAGGED.finditer(text))[:MOST][::-1]:
        for match in (_TAGGED.search(tagged[2]), tagged):
            if match:  # HTML's own tags hold HTML, where `&amp;` is an operator
                yield html.unescape(match[2]) if match[1].lower() in ("code", "pre") else match[2]


def _runs(text: str) -> list[str]:
    """The runs of lines that parse, the last first: code amid prose, indented or not."""
    lines, runs, at, tries = text.split("\n"), [], 0, 0
    while at < len(lines) and tries < 4 * MOST:
        if not (begun := _CODE_LINE.match(lines[at])):
            at += 1
            continue
        end = at + 1
        while end < len(lines) and (lines[end].startswith(begun[1]) or not lines[end].strip()):
            end += 1
        while end > at and (wrong := _error_at(code := textwrap.dedent("\n".join(lines[at:end])))):
            end, tries = max(at, min(end - 1, at + wrong - 1)), tries + 1  # without the line that does not parse
        if end > at:
            runs.append(code)
        at = max(end, at + 1)
    return runs[::-1]


# ---- Python's own reading of a text


_NO_PYTHON = (
    SyntaxError,
    ValueError,
    RecursionError,
    MemoryError,
)  # a null byte is a ValueError; the last two: deep nesting


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # "\d" where r"\d" is meant
        return ast.parse(text)


def _error_at(text: str) -> int:
    """The line of the first mistake in `text`, 0 if there is none."""
    try:
        _parse(text)
    except SyntaxError as error:
        return max(error.lineno or 1, 1)
    except _NO_PYTHON:
        return 1
    return 0


def _bound(text: str) -> tuple[set[str], set[str]]:
    """(names of the functions and classes that `text` defines, names that it assigns or imports); none if it is no Python."""
    functions, others = set(), set()
    try:
        body = _parse(text).body
    except _NO_PYTHON:
        return functions, others
    if (BEGIN in text or END in text) and {"BEGIN", "DONE"} & _lacking(text):
        return functions, others  # `x [DONE]` is Python too
    if any(isinstance(node, ast.Return) for node in body):
        return functions, others  # the lines below a `def` that was left behind
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                functions.add(node.name)
            case ast.Assign():
                others |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                others.add(name)
            case ast.Import() | ast.ImportFrom():
                others |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return functions, others


def _lacking(text: str) -> set[str]:
    """The names that a program uses and nowhere binds, Python's own left out."""
    used, bound = set(), set(dir(builtins))
    for node in ast.walk(_parse(text)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                bound.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.alias():
                bound.add((node.asname or node.name).partition(".")[0])
    return used - bound
