"""The program in a model's reply: forms that models write, each with the program that a reader would take."""

import json
import time

import pytest

from rpo.sandbox.replies import LONGEST, program_of

CODE = "def f(x):\n    return 2 * x\n"
DRAFT = "def f(x):\n    return 3 * x\n"
INDENTED = CODE.replace("\n", "\n    ")
LONG = "def f(x):\n" + "    x = x\n" * 9 + "\n    return 2 * x\n"
CALL = {"name": "python", "arguments": {"code": CODE}}


def each_line(form, code=CODE):
    """The lines of `code`, each in the form {line} with its {number}."""
    return "\n".join(form.format(line=line, number=i) for i, line in enumerate(code.strip().split("\n"), 1))


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
    "a correction with a command in it": f"```python\n{DRAFT}```\nRight:\n```python\n!pip install x\n%timeit f(3)\n{CODE}```",
    "a correction in Python 2": f"```python\n{DRAFT}```\nRight:\n```python\n{CODE}print f(3)\n```",
    "a correction within try": f"```python\n{DRAFT}```\nRight:\n```python\ntry:\n    import math\nexcept ImportError:\n    pass\n"
    "if True:\n    def f(x):\n        return 2 * x\n```",
    "a correction by lambda": f"```python\n{DRAFT}```\nRight:\n```python\nf = lambda x: 2 * x\n```",
    "a correction by partial": f"```python\n{DRAFT}```\nRight:\n```python\nfrom functools import partial\n"
    "f = partial(lambda a, x: a * x, 2)\n```",
    "a correction as a method": f"```python\n{DRAFT}```\nRight:\n```python\nclass S:\n    def f(self, x):\n        return 2 * x\n"
    "f = S().f\n```",
    "a stub after it": f"```python\n{CODE}```\nIts form:\n```python\ndef f(x): ...\n```",
    "another stub after it": f"```python\n{CODE}```\nTo fill in:\n```python\ndef f(x):\n    # TODO\n    pass\n```",
    "drafts in thoughts": f"<think>\nTry:\n```python\n{DRAFT}```\nno\n</think>\n\n```python\n{CODE}```",
    "thoughts without a fence": f"<think>\nI need def f.\n{DRAFT}</think>\n{CODE}",
    "thoughts that the prompt opened": f"Let me see: {DRAFT}\n</think>\n\n{CODE}",
    "thoughts twice": f"<think>{DRAFT}</think>\n{CODE}<think>\n{DRAFT}</think>",
    "thoughts of Mistral": f"[THINK]{DRAFT}[/THINK]{CODE}",
    "channels": f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{CODE}<|return|>",
    "thoughts that end in a quote": f"<think>Not {DRAFT} but `f`</think>\n\n{CODE}",
    "thoughts that end in a comment": f"<think>\n{DRAFT}# that is it </think> Here it is:\n```python\n{CODE}```",
    "an end behind a string": "def f(x):\n    return 2 * x if x is not None else 'two'</s>",
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
    "a quoted fence": each_line("> {line}", f"```python\n{CODE}```"),
    "a quote within a quote": f"So:\n{each_line('> > {line}', f'```{chr(10)}{CODE}```')}\nOK?",
    "a quote without a fence": f"So:\n{each_line('> {line}')}\nIt doubles.",
    "a quoted draft": f"You have:\n{each_line('> {line}', DRAFT)}\nBetter:\n\n{CODE}",
    "a quoted draft at the end": f"Take:\n\n{CODE}\nYou had:\n{each_line('> {line}', DRAFT)}\n",
    "a tool call": f"I run it.\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
    "a tool call whose arguments are JSON": json.dumps({"name": "python", "arguments": json.dumps({"code": CODE})}),
    "a tool call after a token": f"<|python_tag|>{json.dumps(CALL)}",
    "code after a token": f"<|python_tag|>{CODE}<|eom_id|>",
    "a tool call of Mistral": f"[TOOL_CALLS] {json.dumps([CALL])}",
    "a tool call of Mistral, newer": f"[TOOL_CALLS]python[ARGS]{json.dumps(CALL['arguments'])}",
    "a tool call of Qwen3-Coder": f"<tool_call>\n<function=python>\n<parameter=code>\n{CODE}</parameter>\n</function>",
    "its parameters on one line": f"<function=run><parameter=lang>py</parameter><parameter=code>{CODE}</parameter></function>",
    "a tool call of GLM": f"<tool_call>run\n<arg_key>code</arg_key>\n<arg_value>{CODE}</arg_value>\n</tool_call>",
    "a tool call in attributes": f'<invoke name="run"><parameter name="code">{CODE}</parameter></invoke>',
    "a tool call of DeepSeek": f"<\uff5ctool\u2581sep\uff5c>python\n```json\n{json.dumps(CALL)}\n```<\uff5cend\uff5c>",
    "a tool call in a channel": f"<|channel|>analysis<|message|>{DRAFT}<|end|><|channel|>commentary to=python "
    f"code<|message|>{CODE}<|call|>",
    "a tool call in Python": f"[python(code={CODE!r})]",
    "a tool call in a fence": f"```tool_code\nprint(python.run(code={CODE!r}))\n```",
    "a tool call of a shell": json.dumps({"cmd": ["bash", "-lc", f"cat > f.py <<'EOF'\n{CODE}EOF\npython f.py"]}),
    "JSON of many lines": f'{{"code": "{CODE}"}}',
    "JSON amid prose": f"The answer is {json.dumps({'code': CODE})}, as asked.",
    "a dict of Python": str({"code": CODE}),
    "a string of Python": f"```python\nsolution = '''\n{CODE}'''\n```",
    "an answer that is called": f"final_answer({CODE!r})",
    "files": json.dumps({"files": {"f.py": CODE, "test_f.py": "from f import f\nassert f(2) == 4"}}),
    "a notebook": json.dumps({"cells": [{"source": CODE.splitlines(True)}, {"source": ["f(2)"]}]}),
    "a file that a shell writes": f"```bash\ncat > f.py << EOF\n{CODE}EOF\npython f.py\n```",
    **{
        f"lines numbered {form}": each_line(f"{form}{{line}}", LONG)
        for form in ("{number} ", "{number}: ", "{number:>4} | ")
    },
    **{
        f"lines numbered {form}": each_line(f"{form}{{line}}", LONG)
        for form in ("{number}\t", "{number}. ", "{number:<4}")
    },
    "numbered lines in a fence": f"```python\n{each_line('{number:>2}  {line}', LONG)}\n```",
    "numbered lines amid prose": f"So:\n{each_line('{number}: {line}', LONG)}\nOK?",
    "a draft of numbered lines": f"{each_line('{number}: {line}', DRAFT)}\n\nNo:\n```\n{CODE}```",
    "a numbered list": f"1. We take x.\n2. We double it.\n\n{CODE}",
    "a diff of added lines": f"```diff\n{each_line('+{line}')}\n```",
    "added lines": f"So:\n\n{each_line('+{line}')}\n\nOK?",
    "a diff": "```diff\n--- a/f.py\n+++ b/f.py\n@@ -1,3 +1,3 @@\n def f(x):\n     y = x\n-    return 3 * y\n+    return 2 * y\n```",
    "a diff without a head": "def f(x):\n     y = x\n-    return 3 * y\n+    return 2 * y\n".replace("def", " def"),
    "a diff after its old code": f"You have:\n```python\n{DRAFT}```\nSo:\n```diff\n{each_line('-{line}', DRAFT)}\n"
    f"{each_line('+{line}')}\n```",
    "IPython": "In [1]: def f(x):\n   ...:     return 2 * x\n   ...:\n\nIn [2]: f(2)\nOut[2]: 4",
    "a label": f"Thought: easy\nAction: python\nAction Input: {CODE}",
    "a bold label": f"**Answer:** {CODE}",
    "lines of HTML": "<pre><code>def f(x):<br>&nbsp;&nbsp;return 2 * x</code></pre>",
    "a word before": f"python\n{CODE}",
    "words after": f"{CODE}\nComplexity: O(n)\nDone\n",
    "a typographer's minus": "def f(x):\n    return x \u2212 (0 \u2212 x)\n",
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
    "a diff and numbers in a string": "DOC = '''\n+def f(x):\n1: def f(x): pass\n'''\n" + CODE,
    "terms on lines like a diff's": "x = (1\n-  2\n+  3)\n" + CODE,
    "a word and a shell's lines in a string": "DOC = '''\nDone\ncat << EOF\nEOF\n'''\n" + CODE,
    "tokens in strings": "A = ['<s>', '</s>', r'<think>.*?</think>', '</think>', '<|im_end|>']\n" + CODE,
    "tokens amid strings": "A = 'a <|endoftext|> b'\nB = ['x', f'y </think> z']\n" + CODE,
    "tags in a comment": "# strips </think> tags and <|im_end|> tokens\n" + CODE,
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


USES_STAR = "def f(x):\n    return 2 * floor(x)\n"


@pytest.mark.parametrize(
    "reply",
    [
        f"```python\nfrom math import *\n```\nand\n```python\n{USES_STAR}```",
        f"```python\n{USES_STAR}```\n```python\nfrom f import *\nfrom math import *\nassert f(floor(2.5)) == 0\n```",
        f"First:\n\nfrom math import *\n\nThen:\n\n{USES_STAR}\nThat is all.",
        f"First:\n\nfrom math import floor\n\nThen:\n\n{USES_STAR}\nThat is all.",
        "<code>from math import floor</code> and <code>def f(x): return 2 * floor(x)</code>",
        each_line("> {line}", "```\nimport math\n```\n```\ndef f(x): return 2 * math.floor(x)\n```"),
    ],
)
def test_imports_apart(reply):
    """An import in a block, tag or run of lines of its own is there, also one of everything in a module of Python's."""
    exec(program_of(reply, ["f"]), known := {})
    assert known["f"](2) == 4


def test_names_decide():
    """Of several blocks the one that has what the tests call; a class or an alias counts as a function does."""
    for other in ("def g(x): return x\n", "class g: pass\n", "g = abs\n"):
        reply = f"```python\n{CODE}```\nand\n```python\n{other}```"
        assert program_of(reply, ["f"]) == CODE and program_of(reply, ["g"]) == other


@pytest.mark.parametrize(
    "reply",
    [f"<|channel|>analysis<|message|>Try:\n```python\n{CODE}```", f"<|START_THINKING|>\n{CODE}"]
    + ["", "I can't help with that.", "<think>\nTry:\n" + CODE, "```\ndef f(\n```", "\0", "f(2)"],
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
    + ["def f(:\n", "lambda:", "not ", "[BEGIN]\n", "<think>", "&lt;"]
    + [
        "cat <<EOF\n",
        "-  a\n",
        "-  a\n+  a\n",
        "+def f(:\n",
        "1: def f(:\n",
        "1 def f(x): 0\n",
        '{"a": ',
        '["def f(x):",',
    ]
    + [
        "<tool_call>",
        "> ",
        ">",
        "In [1]: f\n",
        "a: def f(x)\n",
        "<|",
        "1\n",
        "<function=f><parameter=g>",
        "f('def f(')\n",
    ],
)
def test_replies_of_any_text_are_read_in_time(text):
    """Endless repetitions, deep nesting and half-open brackets cost no more than a moment and raise nothing."""
    before = time.process_time()
    assert isinstance(program_of("Here:\n" + text * (LONGEST // len(text) - 10), ["f"]), str)
    assert time.process_time() - before < 10
