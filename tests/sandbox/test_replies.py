"""The program in a model's reply: forms that models write, each with the program that a reader would take."""

import json
import time

import pytest

from rpo.sandbox.replies import LONGEST, program_of

CODE = "def f(x):\n    return 2 * x\n"
DRAFT = "def f(x):\n    return 3 * x\n"
INDENTED = CODE.replace("\n", "\n    ")

FORMS = {
    "as asked": f"{CODE}[DONE]\n",
    "nothing else": CODE,
    "all on its last line": f"Sure: [BEGIN]\n{CODE.strip()} [DONE]",
    "the next problem follows": f"{CODE}[DONE]\n```python\nother\n```",
    "echoed markers": f"[BEGIN]\n{CODE}[DONE]\nIt doubles.",
    "markers named in prose": f"I write it between [BEGIN] and [DONE].\n[BEGIN]\n{CODE}[DONE]",
    "cut before its end marker": f"[BEGIN]\n{CODE}",
    "an end marker on the last line": f"Sure: [BEGIN]\n{CODE.strip()} [DONE]",
    "fence": f"```python\n{CODE}```",
    "fence, prose, usage": f"Here it is:\n```\n{CODE}```\nIt doubles x:\n```python\nf(2)\n```\n",
    "a result of a usage": f"```python\n{CODE}```\n```python\nresult = f(2)\nprint(result)\n```\n",
    "tests in a fence first": f"It must pass:\n```\nassert f(2) == 4\n```\n[BEGIN]\n```python\n{CODE}```\n[DONE]",
    "marker within a fence": f"[BEGIN] follows.\n```py\n{CODE}[DONE]\n```",
    "a fence that is cut": f"```python\n{CODE}",
    "an empty [BEGIN]": f"```python\n{CODE}```\n\n[BEGIN]\nno fence here",
    "a fence in a list": "1. So:\n   ```python\n   def f(x):\n       return 2 * x\n   ```",
    "drafts in fences": f"First:\n```python\n{DRAFT}```\nNo, better:\n```python\n{CODE}```\nDone.",
    "tildes": f"~~~python\n{CODE}~~~",
    "four ticks": f"````python\n{CODE}````",
    "a title on the fence": f'```python title="f.py"\n{CODE}```',
    "braces on the fence": f"```{{python}}\n{CODE}```",
    "closed on the last line": f"```python\n{CODE.strip()}```",
    "opened in a sentence": f"So ```python\n{CODE}```",
    "code on the opening line": f"```python {CODE}```",
    "code on the opening line with more": "```python def f(x):\n    y = 2 * x\n    z = y\n    return z\n```",
    "code on the opening line without a language": f"```{CODE}```",
    "tags of Code Llama": f"[PYTHON]\n{CODE}[/PYTHON]\n[TESTS]\nassert f(2) == 4\n[/TESTS]",
    "tags that are cut": f"So:\n[PYTHON]\n{CODE}",
    "tags of XML": f"<answer>\n{CODE}</answer>",
    "a fence in tags": f"<answer>\n```python\n{CODE}```\n</answer>",
    "HTML": f"<pre><code>{CODE}</code></pre>",
    "HTML of an operator": "<pre><code>def f(x): return 2 * x &amp; ~0 if x &lt; 9 else x</code></pre>",
    "HTML with attributes": f'<code class="language-python">\n{CODE}</code>',
    "drafts in thoughts": f"<think>\nTry:\n```python\n{DRAFT}```\nno\n</think>\n\n```python\n{CODE}```",
    "thoughts without a fence": f"<think>\nI need def f.\n{DRAFT}</think>\n{CODE}",
    "thoughts that the prompt opened": f"Let me see: {DRAFT}\n</think>\n\n{CODE}",
    "thoughts twice": f"<think>{DRAFT}</think>\n{CODE}<think>\n{DRAFT}</think>",
    "thoughts of Mistral": f"[THINK]{DRAFT}[/THINK]{CODE}",
    "channels": f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{CODE}<|return|>",
    "a turn's end": f"{CODE}<|im_end|>\n<|im_start|>user\nwhat?",
    "JSON": json.dumps({"code": CODE, "why": "it doubles"}),
    "JSON in a fence": f"```json\n{json.dumps({'code': CODE})}\n```",
    "a fence in JSON": json.dumps({"answer": f"```python\n{CODE}```"}),
    "a JSON string": json.dumps(CODE),
    "doctest": "Like so:\n\n```\n>>> def f(x):\n...     return 2 * x\n...\n>>> f(2)\n4\n```",
    "prose before": f"Here is the code:\n\n{CODE}",
    "prose after": f"{CODE}\nThis function works as follows: it doubles.",
    "prose before and after": f"Here is the code:\n\n{CODE}\nIt's easy!",
    "indented amid prose": f"Here is the code:\n\n    {INDENTED}\nIt's easy!",
    "zero width": f"\u200b{CODE}",
    "a byte order mark in a fence": f"```python\n\ufeff{CODE}```",
    "curly quotes": "def f(x):\n    return {\u201ctwo\u201d: 2}[\u2018two\u2019] * x\n",
    "escaped lines": CODE.replace("\n", "\\n"),
    "in a sentence": "It is `def f(x): return 2 * x`, which gives `f(2)`.",
    "hard spaces": CODE.replace("    ", "\xa0" * 4),
    "CRLF": CODE.replace("\n", "\r\n"),
    "CRLF in a fence": f"```python\r\n{CODE}```".replace("\n", "\r\n"),
    "indented": f"    {INDENTED}",
}


@pytest.mark.parametrize("names", [(), ("f",)], ids=["names unknown", "names known"])
@pytest.mark.parametrize("reply", FORMS.values(), ids=FORMS)
def test_the_program_is_found(reply, names):
    """The function that a reader would take runs, and neither a draft nor a usage example stands in for it."""
    known = {}
    exec(program_of(reply, names), known)
    assert known["f"](2) == 4


WHOLE = {
    "the end marker in a string": "MARK = '[DONE]'\n" + CODE,
    "ticks in a string": "DOC = '''\n```\nexample\n```\n'''\n" + CODE,
    "a tag in a string": "TAG = '<code>def f(x): pass</code>'\n" + CODE,
}


@pytest.mark.parametrize("code", WHOLE.values(), ids=WHOLE)
def test_what_looks_like_a_marker_within_a_program(code):
    """A program with markers or fences in its strings is taken whole, plain and in a fence."""
    assert program_of(code, ["f"]) == code
    assert program_of(f"```python\n{code}```", ["f"]) == code


def test_blocks_that_need_each_other():
    """Imports and helpers that stand in blocks of their own are there; a usage example is not run."""
    blocks = ["import math", "def half(x): return math.floor(x / 2)", "def f(x): return 4 * half(x)", "print(f(1 / 0))"]
    reply = "\n".join(f"Step:\n```python\n{block}\n```" for block in blocks)
    exec(program_of(reply, ["f"]), known := {})
    assert known["f"](2) == 4


def test_names_decide():
    """Of several blocks the one that has what the tests call; a class or an alias counts as a function does."""
    for other in ("def g(x): return x\n", "class g: pass\n", "g = abs\n"):
        reply = f"```python\n{CODE}```\nand\n```python\n{other}```"
        assert program_of(reply, ["f"]) == CODE and program_of(reply, ["g"]) == other


@pytest.mark.parametrize(
    "reply", ["", "I can't help with that.", "<think>\nTry:\n" + CODE, "```\ndef f(\n```", "\0", "f(2)"]
)
def test_no_program(reply):
    """A reply without a program, or one cut amid its thoughts, gives a text that defines no f."""
    try:
        exec(program_of(reply, ["f"]), known := {})
    except (SyntaxError, ValueError, NameError):
        return
    assert "f" not in known


@pytest.mark.parametrize(
    "text",
    [
        "```python\nf(\n```\n",
        "```",
        "<code>",
        "(",
        "def f():\n",
        "[",
        "-",
        "a.",
        "x = ",
        "{",
        "'''\n",
        ">>> f\n",
        "if x:\n ",
        "\0",
    ]
    + ["def f(:\n", "lambda:", "not ", "[BEGIN]\n", "<think>", "&lt;"],
)
def test_replies_of_any_text_are_read_in_time(text):
    """Endless repetitions, deep nesting and half-open brackets cost no more than a moment and raise nothing."""
    before = time.process_time()
    assert isinstance(program_of("Here:\n" + text * (LONGEST // len(text) - 10), ["f"]), str)
    assert time.process_time() - before < 10
