"""The program that a model's reply contains, in whichever form models write it.

Nothing is run: a text counts as a program where it parses as Python and binds the names that the tests call.
"""

import ast
import builtins
import contextlib
import html
import json
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence

from rpo.text import spoken

BEGIN, END = "[BEGIN]", "[DONE]"
LONGEST = 50_000  # characters of a reply that is looked through; a longer one is a program as it stands
MOST = 64  # fences, and runs of lines, of one reply that are looked at; a loop of repetitions has many
_TOKEN = r"(?:<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text|end_of_turn|end|return|call)\|>|<end_of_turn>|</s>)"
_SPECIAL = re.compile(rf"{_TOKEN}(?=[\s<]|\Z)|(?<!['\"]){_TOKEN}(?!['\"])")  # not within a string, but behind one
# Where a tag or a special token is the program's: in a string on one line, or a comment that goes on behind it.
_LITERAL = re.compile(
    r"(?:[=(,\[{:+%]|\breturn|\bin)\s{0,9}[rbfuRBFU]{0,2}(['\"])[^'\"\n]{0,300}\1"
    r"|(?<![#\w&])#[ \t][^\n]{0,300}>(?=[ \t]{1,9}\w)"
)
_MASK = "\ue000"  # of no program's
_NOTEBOOK = re.compile(r"^(?:[!%]{1,2}\w|print [^(=\n]).*\n?", re.MULTILINE)  # of IPython, and of Python 2
# A marker is one where a line begins; within a program it is part of a string.
_BEGIN, _END = (re.compile(rf"^[ \t]*{re.escape(marker)}", re.MULTILINE) for marker in (BEGIN, END))
_FENCE = re.compile("`{3,}|~{3,}")
_TAGGED = re.compile(
    r"[<\[](python3?|py|code|pre|answer|solution|program|tool_call|function|invoke|parameter|arg_value)\b[^>\]\n]*[>\]](.*?)"
    r"(?:[<\[]/\1[>\]]|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_HEREDOC = re.compile(r"^[ \t$]*(?:cat|tee|python3?)\b[^\n]*<<-?[ \t]*[\"']?(\w+)[\"']?[^\n]*\n", re.MULTILINE)
# What stands before code: a token of a chat format, or a label on the same line.
_MARK = re.compile(
    r"<[|\uff5c][^<>\n]{1,60}?[|\uff5c]>|\[(?:TOOL_CALLS|ARGS)\]|<!\[CDATA\[|\]\]>"
    r"|^[^\n]{0,80}?\w:\**[ \t]+(?=(?:async )?def \w+\(|class \w+[(:]|from [\w.]+ import |import \w)",
    re.MULTILINE,
)
_QUOTE = re.compile(r"^ {0,3}(?:>{1,2}(?!>) ?)+", re.MULTILINE)
_FENCE_LINE = re.compile(r"(^[ \t>]*(?:`{3}|~{3})[^\n]*(?:\n|\Z))", re.MULTILINE)
_DIFF = re.compile(
    r"^\+[ \t]*(?:@\w|(?:def|class|import|from|async) )|^@@ -\d|^-[ \t]{2,}\S.*\n\+[ \t]{2,}\S", re.MULTILINE
)
_NOT_ADDED = re.compile(r"^(?:-|@@ |\+\+\+ |diff --git |index |\\ No newline).*\n?|^[+ ]", re.MULTILINE)
_NUMBERED = re.compile(r"[ \t]*(\d+)(?:[ \t]*[:|)\u2502]|\.?(?=[ \t]|$))")
_OBJECT = re.compile(r"\A\s*\"|[{\[](?=\s*[\"{\[])")
_CODE_LINE = re.compile(r"([ \t]*)(?:(?:def|class|import|from|async)\b|@|\w+[ \t]*=)")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_AS_TYPED = {
    **dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff")),
    **{0xA0: " ", 0x2212: "-", 0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'"},
}


def program_of(reply: str, names: Sequence[str] = ()) -> str:
    """The program in `reply`, of which tests call `names`: the last text in it that parses and binds most of them.

    A reply that is itself a program is taken whole, up to a line [DONE]. Otherwise what is looked at are code in fences,
    of which the last may be cut, in tags ([PYTHON], <code>, ...), in the strings of a tool call, of JSON or of Python, behind
    >>> or line numbers, as a diff or a quote, and lines that parse amid prose; after a line [BEGIN] first. What a reasoning
    model thinks before it answers does not count. Where nothing binds a name, the last fenced code, or else the reply.
    """
    masked = _LITERAL.sub(lambda match: match[0].replace("<", _MASK), reply := reply.replace("\r\n", "\n"))
    # Nothing is said where what ends the thoughts was masked: `# done </think> Here it is`.
    reply = _SPECIAL.split(spoken(masked) or spoken(reply))[0].replace(_MASK, "<")
    said = _END.split(reply)[0]
    if len(said) > LONGEST:
        return said
    amid_lines = said.partition(END)[0]
    regions = list(dict.fromkeys((_BEGIN.split(said)[-1], said, amid_lines.rpartition(BEGIN)[2], amid_lines)))
    best, most = None, 0
    for within, text in (found for region in regions for found in _candidates(region)):
        functions, others = _bound(text)
        if names:  # a function is worth more than an alias of it
            worth = 2 * len(functions.intersection(names)) + len(others.intersection(names))
        else:
            worth = min(len(functions), 1)
        if worth > most:
            best, most = (within, text), worth
        if functions.issuperset(names or functions) and most:
            break
    if best is not None:
        return _without_words(_with_what_it_uses(*best))
    fenced = [code for region in regions for code in _fenced(region)]
    return textwrap.dedent(fenced[0]) if fenced else regions[-1]


def _with_what_it_uses(within: str, text: str) -> str:
    """The program `text` with, before it, the other code of its reply that has names which it uses and lacks."""
    parts, lacking = [text], _lacking(text)
    if not lacking or text == textwrap.dedent(within):
        return text
    others = [textwrap.dedent(code) for code in (*_fenced(within), *_tagged(within), *_runs(within))]
    for code in others:
        if code.strip() not in text and lacking & set().union(*_bound(code)):
            parts.append(code)
            lacking = (lacking | _lacking(code)) - set().union(*_bound(code))
    stars = dict.fromkeys(star for code in others if lacking for star in _stars(code) if star not in text)
    return "\n".join([*stars, *reversed(parts)])


def _without_words(text: str) -> str:
    """A program without the lines that are a word of prose or of a shell: `Done`, `EOF`, `Complexity: O(n)`."""
    lines, lacking = text.split("\n"), _lacking(text)
    for node in _parse(text).body if lacking else ():
        match node:
            case ast.Expr(value=ast.Name()) | ast.AnnAssign(value=None):
                if lacking & {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}:
                    lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


def _candidates(text: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """(text, what may be the program in it), the likeliest first."""
    if not _HEREDOC.match(text):  # a shell's command may be Python too
        yield text, textwrap.dedent(text)
    text = _plain(text)
    marked = _MARK.sub("\n", text)
    texts = list(dict.fromkeys((text, marked, _QUOTE.sub("", marked))))
    inner = list(_quoted(marked))[:MOST] if depth < 3 else []
    whole = text.lstrip()[:1] in ("{", "[", '"')
    for one in texts:
        yield from ((one, code) for code in _heredocs(one))
        yield from ((one, code) for code in _readings(one))
        if whole:
            yield from (found for string in inner for found in _candidates(string, depth + 1))
        for code in (*_fenced(one), *_tagged(one)):
            yield from ((one, reading) for reading in _readings(code))
        yield from ((one, code) for code in reversed(_INLINE.findall(one)[:MOST]))
        whole = False
    yield from (found for string in inner for found in _candidates(string, depth + 1))
    for one in texts:
        yield from ((one, code) for code in _runs(one))


def _readings(text: str) -> Iterator[str]:
    """`text` as it stands, and what it is with one layer taken off."""
    yield (plain := textwrap.dedent(text))
    if (typed := text.translate(_AS_TYPED)) != text:  # without zero-width characters, hard spaces and curly quotes
        yield textwrap.dedent(typed)
    if "\\n" in text and "\n" not in text.strip():
        yield text.replace("\\n", "\n")
    if _NOTEBOOK.search(plain):
        yield _NOTEBOOK.sub("", plain)
    typed_in = re.sub(r"^\s*\.\.\.: ?", "... ", re.sub(r"^In \[\d+\]: ?", ">>> ", plain, flags=re.M), flags=re.M)
    if ">>>" in typed_in:
        yield "\n".join(line[4:] for line in typed_in.split("\n") if line[:4].rstrip() in (">>>", "..."))


def _plain(text: str) -> str:
    """`text` with each diff in it as the lines that it leaves, and numbered lines of code without their numbers."""
    parts = _FENCE_LINE.split(text)  # text between fences, a fence, and so on
    for i in range(0, len(parts), 2):
        if any(_bound(textwrap.dedent(parts[i]))):
            continue
        if _DIFF.search(parts[i]) or (i and re.search("(?:diff|patch)\\s*$", parts[i - 1])):
            parts[i] = _NOT_ADDED.sub("", parts[i])
        parts[i] = _unnumbered(parts[i])
    return "".join(parts)


def _unnumbered(text: str) -> str:
    """`text` without the numbers before lines that are code without them."""
    lines, at, tries = text.split("\n"), 0, 0
    while at < len(lines) and tries < MOST:
        end, first = at, _NUMBERED.match(lines[at])
        while first and end < len(lines) and (number := _NUMBERED.match(lines[end])):
            if int(number[1][:9]) != int(first[1][:9]) + end - at:
                break
            end += 1
        tries += end > at
        for blank in ("", " ") if end > at else ():
            block = [_NUMBERED.sub(lambda m, blank=blank: blank * len(m[0]), line, count=1) for line in lines[at:end]]
            if any(_bound(code := textwrap.dedent("\n".join(block)))):
                lines[at:end] = code.split("\n")
                break
        at = max(end, at + 1)
    return "\n".join(lines)


def _heredocs(text: str) -> Iterator[str]:
    """What a shell's command writes to a file, or has Python run."""
    for begun in list(_HEREDOC.finditer(text))[:MOST]:
        if ended := re.compile(rf"^[ \t]*{begun[1]}\b", re.MULTILINE).search(text, begun.end()):
            yield text[begun.end() : ended.start()]


def _quoted(text: str) -> Iterator[str]:
    """The strings of JSON in `text`, then of Python where it or code in fences in it is that, the last first."""
    values, at = [], 0
    for begun in list(_OBJECT.finditer(text))[:MOST]:
        if begun.start() >= at:
            with contextlib.suppress(ValueError, RecursionError):  # strict: without \n escaped, as models write it
                value, at = json.JSONDecoder(strict=False).raw_decode(text, begun.end() - 1)
                values.append(value)
    yield from (string for string in _strings(values) if string != text)
    for code in (text, *_fenced(text)):
        with contextlib.suppress(*_NO_PYTHON):
            constants = [node.value for node in ast.walk(_parse(code)) if isinstance(node, ast.Constant)]
            yield from reversed([value for value in constants if isinstance(value, str) and value != text])


def _strings(value: object) -> Iterator[str]:
    """The strings in a JSON value that can be code, the last first; a list of them also as one (a notebook's lines)."""
    if isinstance(value, str):
        if re.search(r"def |class |import |lambda|=", value):
            yield value
    elif isinstance(value, dict | list):
        if isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) for item in value):
            yield from _strings("".join(value))
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


def _tagged(text: str, depth: int = 0) -> Iterator[str]:
    """The code in tags, the last first, before it that in tags within it (<pre><code>)."""
    for tagged in list(_TAGGED.finditer(text))[:MOST][::-1]:
        if depth < 3:
            yield from _tagged(tagged[2], depth + 1)
        is_html = tagged[1].lower() in ("code", "pre")  # where `&amp;` is an operator
        yield html.unescape(re.sub(r"<br\s*/?>", "\n", tagged[2])) if is_html else tagged[2]


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
    for node in _statements(body):
        match node:
            case ast.FunctionDef() if all(map(_says_nothing, node.body)):
                others.add(node.name)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                functions.add(node.name)
            case ast.Assign(targets=targets, value=value):
                named = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
                makes = isinstance(value, ast.Lambda | ast.Attribute) or "partial" in ast.dump(
                    getattr(value, "func", value)
                )
                (functions if makes else others).update(named)
            case ast.AnnAssign(target=ast.Name(id=name)):
                others.add(name)
            case ast.Import() | ast.ImportFrom():
                others |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return functions, others


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the program does: those in its `if`, `try`, `with` and loops too."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for field in ("body", "handlers", "orelse", "finalbody"):
                yield from _statements(getattr(node, field, None) or [])


def _says_nothing(node: ast.stmt) -> bool:
    """Whether it is what a stub's body has: pass, ..., a docstring, raise NotImplementedError."""
    match node:
        case ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError"))):
            return True
    return False


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


def _stars(text: str) -> list[str]:
    """The imports of everything in a module of Python's own."""
    try:
        found = [node for node in _parse(text).body if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    except _NO_PYTHON:
        return []
    return [ast.unparse(node) for node in found if (node.module or "").partition(".")[0] in sys.stdlib_module_names]
