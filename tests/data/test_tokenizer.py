"""What a row says is what its tokens say: where responses end, what templates leave out, columns, storage formats, ends of text."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rpo.data import dataset
from rpo.data.chat import Chat
from rpo.data.formats import parse, parse_prompt
from rpo.data.tokenizer import check_vocabulary, encode_prompt, load_tokenizer, stop_ids, tokenize, why_other_ids
from rpo.errors import UserError
from tests.helpers.rows import CFG

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if thinking is defined %}{{ '[' + thinking + ']' }}{% endif %}"
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + c.function.name + ' ' + (c.function.arguments | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make(template=None, special=IM, eos="<|im_end|>", bos=None, plain=(), prefix=()):
    """A tokenizer with one token a byte beside its special tokens; `plain` are added ones that are not special."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=0, special_tokens=[*special], initial_alphabet=alphabet)
    own.train_from_iterator([], trainer)
    if first := [*prefix] or ([bos] if bos else []):
        ids = [(token, own.token_to_id(token)) for token in first]
        own.post_processor = processors.TemplateProcessing(single=" ".join([*first, "$A"]), special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token=bos, eos_token=eos)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    tokenizer.chat_template = template
    return tokenizer


def load(folder: Path, tokenizer, *table, name="rows.jsonl", pairs=True, **settings):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in table))
    return of_file(folder / name, tokenizer, pairs=pairs, **settings)


def of_file(file, tokenizer, pairs=True, **settings):
    """(texts of prompt, chosen, rejected) of each row, and the report."""
    cfg = replace(CFG, **settings)
    rows, report = dataset.load(str(file), cfg, tokenizer, pairs=pairs, cache_dir=Path(file).parent / "cache")
    return [[tokenizer.decode(part) for part in rows.row(i)] for i in range(len(rows))], report


def user(text, **more):
    return {"role": "user", "content": text, **more}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(name, **arguments):
    return said(None, tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


# ---- where a response ends


@pytest.mark.parametrize(
    ("closing", "special", "text", "ids"),
    [
        ("<|im_end|>\n", (*IM, "</answer>"), "4</answer>", ["4", "</answer>", "<|im_end|>"]),
        ("<|im_end|>\n", (*IM, "</answer>"), "4</answer>\n", ["4", "</answer>", "\n", "<|im_end|>"]),
        ("<|im_end|>\n", IM, "4<|endoftext|>", ["4", "<|endoftext|>", "<|im_end|>"]),
        ("<|im_end|>\n", IM, "4<|im_end|>", ["4", "<|im_end|>"]),
        ("<|im_end|>\n", IM, "4<|im_end|>\n<|im_end|>", ["4", "<|im_end|>"]),
        ("<|end|>\n<|endoftext|>", (*IM, "<|end|>"), "4", ["4", "<|end|>"]),
        ("<|end|><|endoftext|>", (*IM, "<|end|>"), "4", ["4", "<|end|>", "<|endoftext|>"]),
        ("<|end|>\n<|endoftext|>", (*IM, "<|end|>", "</a>"), "4</a>", ["4", "</a>", "<|end|>"]),
        (" <|im_end|>", (*IM, "</a>"), "4</a>", ["4", "</a>", " ", "<|im_end|>"]),
        ("</a><|im_end|>\n", (*IM, "</a>"), "4", ["4", "</a>", "<|im_end|>"]),
        ("\n\n", (*IM, "</a>"), "4</a>", ["4", "</a>", "\n", "\n", "<|im_end|>"]),
        ("", (*IM, "</a>"), "4</a>", ["4", "</a>", "<|im_end|>"]),
        ("", IM, "4<|im_end|>", ["4", "<|im_end|>"]),
        ("<end>\n", IM, "4", ["4", "<end>"]),  # an added token that is not called special
    ],
)
def test_a_response_ends_where_the_template_ends_it(closing, special, text, ids, tmp_path):
    """Special tokens of a response are part of it; the end-of-turn is what the template closes with, and is there once."""
    tokenizer = make(CHATML.replace("<|im_end|>\n", closing), special, plain=["<end>"])
    asked = {"prompt": [user("2+2?")], "chosen": text, "rejected": "no"}
    ((_, chosen, _),), _ = load(tmp_path, tokenizer, asked)
    assert chosen == "".join(ids)
    rows, _ = dataset.load(str(tmp_path / "rows.jsonl"), CFG, tokenizer, pairs=True, cache_dir=tmp_path / "cache")
    assert rows.row(0)[1].tolist() == [tokenizer(part, add_special_tokens=False).input_ids[0] for part in ids]
    assert rows.row(0)[1][-1] in stop_ids(tokenizer, Chat("2024-01-01", {}))


def test_a_closing_that_depends_on_the_message_is_its_own(tmp_path):
    """A template that ends calls otherwise than answers (Llama 3.1) is followed in both."""
    template = TOOLS.replace("{{ '<|im_end|>\n' }}", "{{ '<|eom|>' if m.tool_calls else '<|im_end|>\n' }}")
    tokenizer = make(template, (*IM, "<|eom|>"))
    row = {"prompt": [user("weather?")], "chosen": [call("weather", city="Oslo")], "rejected": "no"}
    ((_, chosen, rejected),), _ = load(tmp_path, tokenizer, row)
    assert chosen.endswith("</tool_call><|eom|>") and rejected == "no<|im_end|>"


@pytest.mark.parametrize("end", ["</s>", ""])
def test_a_plain_row_has_one_eos_and_what_the_tokenizer_begins_with(end, tmp_path):
    """EOS that a text brings along is not doubled; all that the tokenizer puts first is there once, of several tokens too."""
    tokenizer = make(special=("<s>", "</s>", "<g>"), eos="</s>", bos="<s>", prefix=("<g>", "<s>"))
    row = {"prompt": "Q:", "chosen": f" 4{end}", "rejected": f" 5{end}"}
    given = row | {"prompt": "<g><s>Q:"}
    own, _ = load(tmp_path, tokenizer, row, given)
    assert own == [["<g><s>Q:", " 4</s>", " 5</s>"]] * 2
    (document,), _ = load(tmp_path, tokenizer, {"text": f"abc{end}"}, pairs=False)
    assert document[0] + document[1] == "<g><s>abc</s>"


# ---- what the template leaves out


@pytest.mark.parametrize(
    ("chosen", "part"),
    [
        ([call("weather", city="Oslo")], "weather"),
        ([said("", tool_calls=call("weather", city="Oslo")["tool_calls"])], "weather"),
        ([said("4", reasoning_content="two and two")], "two and two"),
        ([said("4", thinking="two and two")], "two and two"),
        ([said("one"), user("go on", reasoning="hm"), said("two")], "hm"),
    ],
)
def test_a_response_that_is_not_rendered_whole_is_refused(chosen, part, tmp_path):
    """Calls and reasoning that a template does not print are a bad row by name, never a response of its end-of-turn."""
    row = {"prompt": [user("2+2?")], "chosen": chosen, "rejected": "no"}
    template = CHATML.replace("m.content +", "(m.content or '') +")
    with pytest.raises(UserError, match=rf"rows.jsonl:1: field chosen: .* leaves out a part of the response \('{part}"):
        load(tmp_path, make(template), row)
    good = {"prompt": [user("2+2?")], "chosen": "4", "rejected": "no"}
    kept, report = load(tmp_path, make(template), row, good, on_bad_row="drop")
    assert len(kept) == 1 and report["dropped"]["not_rendered"]["count"] == 1


def test_one_of_several_calls_that_is_not_printed_is_refused(tmp_path):
    """A template that prints the first call alone leaves out the second, even where the first has all that it says."""
    calls = [{"function": {"name": "f", "arguments": {"a": a}}} for a in (11, 1)]
    row = {"prompt": [user("2+2?")], "chosen": [said(None, tool_calls=calls)], "rejected": "no"}
    assert len(load(tmp_path, make(TOOLS), row)[0]) == 1
    first = TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    with pytest.raises(UserError, match=r"rows.jsonl:1: field chosen: .* leaves out a part of the response \('f'"):
        load(tmp_path, make(first), row)


AS_TEXT = TOOLS.replace("(c.function.arguments | tojson)", "c.function.arguments")


@pytest.mark.parametrize("template", [TOOLS, AS_TEXT], ids=["printed", "added to a text"])
def test_arguments_as_json_are_those_as_an_object(tmp_path, template):
    """A call's arguments are printed alike whether a row has them as an object or, as OpenAI's API, as its JSON."""
    texts = []
    for arguments in ({"city": "Oslo"}, json.dumps({"city": "Oslo"})):
        calls = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
        row = {"prompt": [user("hot?")], "chosen": [said("", tool_calls=calls)], "rejected": "no"}
        texts.append(load(tmp_path, make(template), row)[0])
    assert texts[0] == texts[1] and '<tool_call>weather {"city": "Oslo"}</tool_call>' in texts[0][0][1]


def test_tools_that_only_the_user_names_are_not_printed(tmp_path):
    """A tool's name in what the user says does not stand for its definition."""
    tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
    row = {"prompt": [user("Please search for cats")], "chosen": "yes", "rejected": "no", "tools": tools}
    with pytest.raises(UserError, match="field tools: the chat template does not print the tool 'search'"):
        load(tmp_path, make(CHATML), row)
    assert len(load(tmp_path, make(TOOLS), row)[0]) == 1


KNOWN_ROLES = CHATML.replace("in messages %}", "in messages if m.role in ('user', 'assistant') %}")


@pytest.mark.parametrize("role", ["human", "User", "user"])
def test_other_names_of_the_user(tmp_path, role):
    """human and User are the user, whom templates know."""
    (row,), _ = load(
        tmp_path, make(KNOWN_ROLES), {"prompt": [{"role": role, "content": "2+2?"}], "chosen": "4", "rejected": "5"}
    )
    assert row[0] == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "messages", [[{"role": "developer", "content": "Be kind."}, user("2+2?")], [{"role": "asker", "content": "2+2?"}]]
)
def test_a_message_that_a_template_does_not_know_is_refused(tmp_path, messages):
    """A prompt of which a whole message is not printed is a bad row by name: the model would be asked nothing."""
    with pytest.raises(
        UserError, match="field prompt: the chat template leaves out the prompt's '(developer|asker)' message"
    ):
        load(tmp_path, make(KNOWN_ROLES), {"prompt": messages, "chosen": "4", "rejected": "5"})


def test_content_that_a_template_cuts_is_refused(tmp_path):
    """R1's template drops what stands before </think>: a response trained without it would not be the row's."""
    cutting = CHATML.replace("m.content +", "m.content.split('</think>')[-1] +")
    row = {"prompt": [user("2+2?")], "chosen": "<think>two and two</think>4", "rejected": "5"}
    with pytest.raises(UserError, match="field chosen: .* leaves out"):
        load(tmp_path, make(cutting), row)


def test_white_space_and_escapes_are_no_part(tmp_path):
    """A template may trim a text, and print arguments as JSON of any spelling."""
    tokenizer = make(TOOLS.replace("(m.content or '')", "(m.content or '') | trim"))
    argued = [said(None, tool_calls=[{"function": {"name": "say", "arguments": '{"text": "é\\n\\"a\\"", "n": 1}'}}])]
    row = {"prompt": [user("2+2?")], "chosen": " 4\n", "rejected": [call("say", text='é\n"a"', n=1)]}
    ((_, chosen, rejected),), _ = load(tmp_path, tokenizer, row)
    assert chosen == "4<|im_end|>" and "é" in rejected
    load(tmp_path, tokenizer, row | {"rejected": argued})


def test_what_a_prompt_loses_is_counted(tmp_path):
    """Templates drop the reasoning of earlier turns on purpose: a count with its place, no error."""
    history = [user("2+2?"), said("4", reasoning_content="two and two"), user("and 3?")]
    _, report = load(tmp_path, make(CHATML), {"prompt": history, "chosen": "7", "rejected": "8"})
    assert report["changed"]["left_out_of_prompt"]["count"] == 1


# ---- columns


def test_the_border_is_where_the_text_differs(tmp_path):
    """Keys that the template does not print do not move it; those that it prints do."""

    def conversation(answer, **more):
        return [user("q one"), said("a one", **more), user("q two"), said(answer)]

    def border(template, one, other):
        row = {"chosen": conversation("good", **one), "rejected": conversation("bad", **other)}
        ((prompt, chosen, _),), _ = load(tmp_path, make(template), row)
        return prompt.endswith("q two<|im_end|>\n<|im_start|>assistant\n") and chosen == "good<|im_end|>"

    for one, other in (({"id": 1}, {"id": 2}), ({"weight": 0}, {}), ({"name": "a"}, {"name": "b"})):
        assert border(CHATML, one, other)
    with pytest.raises(UserError, match="field chosen: expected the prompt's tokens"):  # of the first turn alone
        border(CHATML.replace("m.role +", "m.role + (m.name or '') +"), {"name": "a"}, {"name": "b"})


def test_columns_that_change_the_prompt_are_read(tmp_path):
    """tools (also as JSON text), system and chat_template_kwargs reach the template; other columns are named in the report."""
    weather = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    row = {"prompt": [user("weather?")], "chosen": "yes", "rejected": "no", "score": 3, "system": "Be brief."}
    row |= {"tools": [weather], "chat_template_kwargs": {"thinking": "off"}}
    tokenizer = make(TOOLS)
    for tools in ([weather], json.dumps([weather])):
        ((prompt, *_),), report = load(tmp_path, tokenizer, row | {"tools": tools})
        assert json.dumps(weather) in prompt and "system\nBe brief.<|im_end|>" in prompt and prompt.startswith("[off]")
        assert report["unread_columns"] == ["score"]
    ((prompt, *_),), _ = load(
        tmp_path,
        tokenizer,
        {"prompt": [user("a")], "chosen": "b", "rejected": "c"},
        chat_template_kwargs={"thinking": "off"},
    )
    assert prompt.startswith("[off]")
    assert encode_prompt(tokenizer, [user("a")], Chat("2024-01-01", {"thinking": "off"})) == tokenizer(prompt).input_ids


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"images": ["a.png"]}, "field images: expected a row of text alone"),
        ({"tools": "{"}, "field tools: expected a list, got text that is no JSON"),
        ({"tools": {"a": 1}}, "field tools: expected a list, got an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs: tokenize is not the template's"),
        ({"prompt": [{"role": "system", "content": "Other."}, user("a")], "system": "Be brief."}, "field system:"),
        ({"prompt": "plain", "system": "Be brief."}, "field system: expected a prompt of messages"),
        ({"chosen": [said([{"type": "image", "url": "a"}])]}, r"message 1 with a part that is no text \(image\)"),
        *[
            ({name: "a.png"}, f"field {name}: expected a row of text alone")
            for name in ("image_path", "image_url", "audio", "video_path", "videos", "audio_files")
        ],
        ({"chosen": [said("b", image_url="a.png")]}, "expected messages of text alone, got image_url"),
        (
            {"functions": '[{"name": "f"}]'},
            "field functions: expected the definitions of tools in a column called tools",
        ),
        ({"function_list": [{"name": "f"}]}, "field function_list: "),
        ({"system": "A", "system_prompt": "B"}, "fields system, system_prompt: expected one system message, got two"),
        ({"prompt": "plain", "system_prompt": "A"}, "field system_prompt: expected a prompt of messages"),
        (
            {"history": [["a", "b"]]},
            "field history: expected earlier turns in the prompt's messages, or beside an instr",
        ),
        ({"prompt": "plain", "history": [["a", "b"]]}, "field history: "),
        ({"prompt": None, "question": "a", "history": "before"}, "field history: expected a list"),
        (
            {"prompt": None, "question": "a", "history": [["b"]]},
            r"field history: expected a list of \[user, assistant\]",
        ),
        ({"prompt": None, "question": "a", "instruction": "b"}, "fields instruction, question: expected one of them"),
        ({"prompt": "Sum up:", "input": "a text"}, "fields prompt, input: expected the whole prompt in prompt"),
        ({"prompt": "Sum up:", "question": "What?"}, "fields prompt, question: "),
        ({"chosen": [said("b", weight=0)]}, "field chosen: expected a response that is scored whole, got .* weight 0"),
        ({"rejected": [said("b", train=False)]}, "field rejected: .*train False"),
    ],
)
def test_columns_that_cannot_be_obeyed_are_refused(more, words, tmp_path):
    """What changes a row's meaning and cannot be read, or can be read in two ways, stops the run: it is no unread column."""
    with pytest.raises(UserError, match=words):
        load(tmp_path, make(TOOLS), {"prompt": [user("a")], "chosen": "b", "rejected": "c"} | more)


def test_a_storage_format_changes_no_token(tmp_path):
    """.jsonl, .json, .parquet and a data set of the library give one text, though Arrow adds the nulls of other rows."""
    table = [
        {"prompt": [user("weather?")], "chosen": [call("weather", city="Oslo")], "rejected": [said("no")]},
        {"prompt": [user("sum?")], "chosen": [call("add", a=1, b=2)], "rejected": [said("no", name="x")]},
    ]
    tokenizer = make(TOOLS)
    expected, _ = load(tmp_path, tokenizer, *table)
    (tmp_path / "rows.json").write_text(json.dumps(table))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "rows.parquet")
    assert of_file(tmp_path / "rows.json", tokenizer)[0] == of_file(tmp_path / "rows.parquet", tokenizer)[0] == expected
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_list(table).to_parquet(folder / "train.parquet")
    assert of_file(f"{folder}:train", tokenizer)[0] == expected
    assert '{"city": "Oslo"}' in expected[0][1] and "null" not in str(expected)


# ---- forms


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "system", "content": "S"}, user("Q\n\nI")], "chosen": "A", "rejected": "B"},
        {"system": "S", "question": "Q", "input": "I", "chosen": "A", "rejected": "B"},
        {"system": "S", "instruction": "Q\n\nI", "input": "", "chosen": "A", "rejected": "B"},
        {"system_prompt": "S", "system": "", "input": "Q\n\nI", "chosen": "A", "rejected": "B", "history": []},
        {"system_message": "S", "instruction": "", "question": "Q", "input": "I", "chosen": "A", "rejected": "B"},
        {
            "system": "S",
            "instruction": "Q",
            "question": "Q",
            "input": "I",
            "chosen": "A",
            "rejected": "B",
            "images": "[]",
        },
        {"system": "S", "system_prompt": "S", "question": "Q", "input": "I", "chosen": "A", "rejected": "B"},
        {
            "system": "S",
            "conversations": [{"from": "human", "value": "Q\n\nI"}],
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": {"from": "gpt", "value": "B"},
        },
        {
            "chosen": [
                {"role": "system", "content": "S"},
                user([{"type": "text", "text": "Q\n"}, {"text": "\nI"}]),
                said("A"),
            ],
            "rejected": [{"role": "system", "content": "S"}, user("Q\n\nI"), said([{"type": "text", "text": "B"}])],
        },
    ],
)
def test_forms_of_one_pair(row, tmp_path):
    """Orca's and Alpaca's columns, ShareGPT's conversations and texts in parts are the chat that they say."""
    ((prompt, chosen, rejected),), report = load(tmp_path, make(CHATML), row)
    assert prompt == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ\n\nI<|im_end|>\n<|im_start|>assistant\n"
    assert (chosen, rejected, report["unread_columns"]) == ("A<|im_end|>", "B<|im_end|>", [])


@pytest.mark.parametrize(
    "history", [[["a", "b"], ["c", "d"]], '[["a", "b"], ["c", "d"]]', [user("a"), said("b"), user("c"), said("d")]]
)
def test_history_is_earlier_turns(history, tmp_path):
    """Alpaca's history comes before the instruction, behind the system message; in supervised rows too."""
    turns = [user("a"), said("b"), user("c"), said("d"), user("Q")]
    row = {"instruction": "Q", "history": history, "chosen": "A", "rejected": "B", "system": "S"}
    asked = parse(row, True).prompt
    assert asked == [{"role": "system", "content": "S"}, *turns]
    assert parse({"instruction": "Q", "history": history, "output": "A"}, False).prompt == turns
    assert parse_prompt({"instruction": "Q", "history": history}).prompt == turns


def test_what_a_prompt_repeats_is_no_second_text(tmp_path):
    """A string prompt made of an instruction, or with a system prompt that is empty, is read as ever."""
    row = {
        "prompt": "Do: sum up",
        "instruction": "sum up ",
        "input": "",
        "system_prompt": "",
        "chosen": "A",
        "rejected": "B",
    }
    assert parse(row, True)[:3] == ("Do: sum up", "A", "B")


def test_columns_that_are_not_read_are_on_screen(tmp_path):
    """The line with a run's rows names those of train and eval together, a few of many; none where all is read."""
    row, tokenizer = {"prompt": [user("a")], "chosen": "b", "rejected": "c"}, make(CHATML)

    def shown(*reports):
        splits = dataset.Splits(tokenizer, None, None, dict(zip(("train", "eval"), (*reports, None), strict=False)))
        return splits.summary

    _, plain = load(tmp_path, tokenizer, row)
    assert shown(plain) == "train 1 rows"
    reports = [load(tmp_path, tokenizer, row, row | {name: 1})[1] for name in ("score", "id")]
    assert (
        shown(*reports) == "train 2 rows (1 repeated_pair), eval 2 rows (1 repeated_pair); columns not read: id, score"
    )
    assert shown(plain | {"unread_columns": [str(i) for i in range(20)]}).endswith(" 15, 16, ...")


# ---- tokenizers


def test_a_tokenizer_is_what_its_file_says(tmp_path):
    """transformers puts Qwen2's pre-tokenizer, digits one by one, over a tokenizer.json that groups them: the file is obeyed."""
    own = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+|[^\p{L}\p{N}]+"), "isolated")
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*IM], initial_alphabet=alphabet, show_progress=False)
    own.train_from_iterator(["123 456 2024 1234 sun moon"] * 50, trainer)
    saved = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|im_end|>")
    saved.chat_template = CHATML
    saved.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    text = "in 2024 and 1234"
    with pytest.warns(UserWarning, match="transformers' Qwen2Tokenizer gives .* other ids than tokenizer.json"):
        tokenizer = load_tokenizer(tmp_path)
    assert tokenize(tokenizer, [text])[0] == own.encode(text).ids
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == CHATML


def test_a_class_that_composes_signs(tmp_path):
    """Qwen2's class composes letters and accents (NFC), the file beside it does not: the file decides."""
    own, text = Tokenizer(models.BPE()), "cafe\u0301 \u212b"
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[*IM], initial_alphabet=alphabet, show_progress=False)
    own.train_from_iterator([text] * 50, trainer)
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|im_end|>").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.warns(UserWarning, match="transformers' Qwen2Tokenizer gives .* other ids than tokenizer.json"):
        tokenizer = load_tokenizer(tmp_path)
    assert tokenize(tokenizer, [text])[0] == own.encode(text).ids


def test_vocabularies_are_compared_by_their_ids(tmp_path):
    """Equal sizes with other ids contradict each other, by the first token; more tokens at the end do not."""
    ours, more, other = make(CHATML), make(CHATML, plain=["<image>"]), make(CHATML)
    assert why_other_ids(ours, more) is why_other_ids(more, ours) is why_other_ids(ours, ours) is None
    state = json.loads(other.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>")
    assert why_other_ids(ours, other) == f"'a' is {vocabulary['b']} in one, {vocabulary['a']} in the other"
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^reference.path={tmp_path}: its tokenizer maps tokens to other ids"):
        check_vocabulary(ours, str(tmp_path), None, key="reference.path", trust=False)
    a, c = vocabulary["a"], vocabulary["c"]
    check_vocabulary(ours, str(tmp_path), None, key="reference.path", trust=False, used=[c])  # the data have no other
    with pytest.raises(UserError, match=rf"{a} is '\w' here, '\w' there"):
        check_vocabulary(ours, str(tmp_path), None, key="reference.path", trust=False, used=[a, c])
    with pytest.raises(UserError, match=r"is '<image>' here, None there"):
        check_vocabulary(more, str(tmp_path), None, key="reference.path", trust=False, used=[len(more) - 1])
    (tmp_path / "bare").mkdir()  # a model without a tokenizer of its own
    check_vocabulary(ours, str(tmp_path / "bare"), None, key="reference.path", trust=False)


def test_templates_by_name_without_a_default_are_one_line(tmp_path):
    """A tokenizer with a template for retrieval and one for chat, none the default: data.chat_template is asked for."""
    tokenizer = make({"chat": CHATML, "rag": CHATML})
    with pytest.raises(UserError, match="^data.chat_template=null: the tokenizer's chat templates have no default"):
        load(tmp_path, tokenizer, {"prompt": [user("a")], "chosen": "b", "rejected": "c"})


# ---- what a hostile review found


@pytest.mark.parametrize(
    ("template", "ids"),
    [
        # The generation prompt is always appended (the first Llama 3 release).
        (CHATML.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}"), ["4", "<|im_end|>"]),
        (
            CHATML.replace(
                "m.content + '<|im_end|>", "m.content + ('</a>\n' if m.role == 'assistant' else '') + '<|im_end|>"
            ),
            ["4", "</a>", "\n", "<|im_end|>"],
        ),
    ],
)
def test_a_turn_ends_as_the_templates_turns_do(template, ids, tmp_path):
    """What ends a user's turn ends an answer, whatever added tokens stand around it; it is the stop token too."""
    tokenizer = make(template, (*IM, "</a>"), eos="<|endoftext|>")
    ((_, chosen, _),), _ = load(tmp_path, tokenizer, {"prompt": [user("2+2?")], "chosen": "4", "rejected": "5"})
    assert chosen == "".join(ids)
    assert tokenizer.decode(stop_ids(tokenizer, Chat("2024-01-01", {}))) == "<|endoftext|><|im_end|>"


def test_calls_that_close_otherwise_are_whole(tmp_path):
    """Command-R ends actions and answers by two tokens, of which the first differ: both are trained to the last."""
    closing = "{{ '<|action|><|im_end|>' if m.tool_calls else '<|end|><|im_end|>' }}"
    tokenizer = make(TOOLS.replace("{{ '<|im_end|>\n' }}", closing), (*IM, "<|action|>", "<|end|>"))
    row = {
        "prompt": [user("weather?")],
        "chosen": [call("weather", city="Oslo")],
        "rejected": [call("weather", city="Rome")],
    }
    ((_, chosen, rejected),), _ = load(tmp_path, tokenizer, row)
    assert chosen == '<tool_call>weather {"city": "Oslo"}</tool_call><|action|><|im_end|>' and "Rome" in rejected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": [said("a", function_call={"name": "f", "arguments": "{}"})]}, "leaves out a part of the response"),
        ({"chosen": [said("a", thoughts="hmm")]}, "leaves out a part of the response"),
        ({"chosen": [said("a", reasoning_content=["hmm"])]}, "leaves out a part of the response"),
        ({"chosen": [said([{"type": "reasoning", "text": "hmm"}])]}, "a part that is no text"),
        ({"chosen": [said("a", images=["a.png"])]}, "messages of text alone, got images"),
        ({"tools": [{"function": {"name": "weather"}}]}, "does not print the tool 'weather'"),
        ({"chat_template_kwargs": {"enable_thinkin": False}}, "the template reads no enable_thinkin"),
        ({"prompt": [{"from": ["human"], "value": "x"}]}, "message 1 without a role"),
        ({"prompt": [{"from": "function_call", "value": "x"}]}, "got 'function_call' in message 1"),
    ],
)
def test_what_no_template_prints_is_refused(row, words, tmp_path):
    """Other fields of a message, tools and arguments that the template does not read, and names that are no roles."""
    with pytest.raises(UserError, match=words):
        load(tmp_path, make(CHATML), {"prompt": [user("q")], "chosen": "b", "rejected": "c"} | row)


def test_one_place_does_not_vouch_for_two_parts(tmp_path):
    """A template that prints the reasoning in place of the answer is found out, though the answer stands in the reasoning."""
    template = CHATML.replace("m.content +", "(m.reasoning_content or m.content) +")
    row = {"prompt": [user("2+2?")], "chosen": [said("4", reasoning_content="2+2 is 4")], "rejected": "5"}
    with pytest.raises(UserError, match="leaves out a part of the response"):
        load(tmp_path, make(template), row)
    numbers = TOOLS.replace("(c.function.arguments | tojson)", "(c.function.arguments.keys() | join(' '))")
    with pytest.raises(UserError, match=r"leaves out a part of the response \('7'"):
        load(tmp_path, make(numbers), row | {"chosen": [call("add", a=7)]})


def test_a_plain_text_with_a_line_end_behind_its_eos_has_one(tmp_path):
    """EOS and what is blank around it become one EOS."""
    tokenizer = make(special=("<s>", "</s>"), eos="</s>")
    own, _ = load(tmp_path, tokenizer, {"prompt": "Q:", "chosen": " yes</s>\n", "rejected": " no</s></s>"})
    assert own == [["Q:", " yes</s>", " no</s>"]]


def test_a_string_prompt_beside_messages_is_used_or_named(tmp_path):
    """It is the user's turn where the lists hold answers alone; one that says something else is named as not read."""
    tokenizer = make(CHATML)
    asked = {"prompt": "What?", "chosen": [said("a")], "rejected": [said("b")]}
    whole = {
        "prompt": "The cat is red. What?",
        "chosen": [user("What?"), said("a")],
        "rejected": [user("What?"), said("b")],
    }
    (first, second), report = load(tmp_path, tokenizer, asked, whole)
    assert first == second and report["unread_columns"] == ["prompt"]


def test_what_ends_a_conversation_ends_no_turn(tmp_path):
    """Phi-4 mini prints EOS behind the last turn, whoever has it: <|end|> alone ends an answer, and sampling stops there."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    )
    special = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer = make(template, special, eos="<|endoftext|>")
    ((_, chosen, _),), _ = load(tmp_path, tokenizer, {"prompt": [user("2+2?")], "chosen": "4", "rejected": "5"})
    assert chosen == "4<|end|>"
    assert tokenizer.decode(stop_ids(tokenizer, Chat("2024-01-01", {}))) == "<|endoftext|><|end|>"


@pytest.mark.parametrize("closing", ["<|end|>{{ eos_token }}", "<|end|>\n<|endoftext|>"])
def test_an_answer_ends_where_a_users_turn_does(closing, tmp_path):
    """Phi-3 and Phi-4 mini print EOS behind an answer's <|end|> alone: a model says <|end|>, and no more is scored."""
    template = CHATML.replace("<|im_end|>\n", "{{ '<|end|>' if m.role == 'user' else '" + closing + "' }}")
    template = template.replace("{{ eos_token }}", "<|endoftext|>").replace("+ m.content + '{{ ", "+ m.content }}{{ ")
    template = template.replace("' }}' }}", "' }}")
    tokenizer = make(template, (*IM, "<|end|>"), eos="<|endoftext|>")
    ((_, chosen, _),), _ = load(tmp_path, tokenizer, {"prompt": [user("2+2?")], "chosen": "4", "rejected": "5"})
    assert chosen == "4<|end|>"


PAIR = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
SAID = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    "text",
    [
        str(SAID),  # pandas' to_csv of a struct
        f"array([{SAID}], dtype=object)",
        str([{"weight": None} | SAID]),
        json.dumps([{"type": "text", "text": "4"}]),
        json.dumps(str([SAID])),
    ],
)
def test_messages_in_another_notation_are_no_answer(text):
    """What is no JSON of messages but was meant as them is refused: its braces would be learned."""
    with pytest.raises(UserError, match="field chosen: expected (messages as JSON|a text or messages)"):
        parse(PAIR | {"prompt": [user("2+2?")], "chosen": text}, True)


@pytest.mark.parametrize("text", [json.dumps(json.dumps([SAID])), json.dumps({"messages": [SAID]}), json.dumps(SAID)])
def test_messages_in_json_of_any_depth_are_read(text):
    """Twice encoded, or under their usual name."""
    assert parse(PAIR | {"prompt": [user("2+2?")], "chosen": text}, True).chosen == [SAID]


@pytest.mark.parametrize(
    "text", ["{'a': 1}", '{"role": "king", "content": "x"}', "{x | x > 2}", "array([1, 2])", '"4"', '"{x} is"', "[{]"]
)
def test_code_is_an_answer(text):
    """Braces alone are no messages."""
    assert parse(PAIR | {"chosen": text}, True).chosen == text


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_no_calls_are_none(key, tmp_path):
    """Exports write empty calls, for which templates that test for none alone print an opening."""
    template = CHATML.replace("m.content", f"(m.content if m.{key} is not defined else '[TOOL_CALLS] [')")
    row = {"prompt": [user("hi"), said("Bob", **{key: []}), user("name?")], "chosen": [said("Bob", **{key: []})]}
    ((prompt, chosen, _),), _ = load(tmp_path, make(template), row | {"rejected": "no"})
    assert "Bob<|im_end|>" in prompt and chosen == "Bob<|im_end|>" and "TOOL" not in prompt


@pytest.mark.parametrize("switch", ["/no_think", "/think"])
def test_a_switch_that_the_template_takes_out_is_no_loss(switch, tmp_path):
    """Qwen 3, SmolLM 3: the template obeys it, and prints the rest of the message."""
    template = CHATML.replace("m.content", f"(m.content | replace('{switch}', ''))")
    row = PAIR | {"prompt": [{"role": "system", "content": f"You are a pirate. {switch}"}, user("2+2?")]}
    ((prompt, _, _),), _ = load(tmp_path, make(template), row)
    assert "pirate" in prompt and switch not in prompt


@pytest.mark.parametrize(
    "row",
    [
        {"question": "2+2?", "chosen": [said("4")], "rejected": [said("5")]},
        {"question": "2+2?", "input": "2+2?", "chosen": "4", "rejected": "5"},
        {
            "prompt": [{"role": "prompter", "content": "2+2?"}],
            "chosen": [{"role": "model", "content": "4"}],
            "rejected": "5",
        },
        {"prompt": [user("2+2?")], "completion": [said("4")], "rejected": "5"},
    ],
)
def test_more_forms_of_one_row(row):
    """The user's question and the answer, once each, by whatever names."""
    found = parse(row, "completion" not in row)
    assert found[:2] == ([user("2+2?")], [said("4")]) and not found.unread - {"rejected"}


def test_a_blank_prompt_beside_transcripts_is_none():
    """HH's transcripts hold the prompt themselves."""
    sides = {name: f"\n\nHuman: hi\n\nAssistant: {text}" for name, text in (("chosen", "yo"), ("rejected", "no"))}
    assert parse({"prompt": "", **sides}, True) == parse(sides, True)._replace(unread=frozenset())


def test_prompts_are_what_both_sides_share():
    """Sides that differ before their last turn: an evaluation asks what training has as the prompt."""
    sides = {name: [user("q"), said(a), user("more"), said("x")] for name, a in (("chosen", "a"), ("rejected", "b"))}
    assert parse_prompt(sides).prompt == parse(sides, True).prompt == [user("q")]


def make_sentencepiece():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "\u2581abc\n"), ("ac", -6.0), ("\u2581c", -6.0)]
    own = Tokenizer(models.Unigram(pieces, 0))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    own.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(("prompt", "chosen"), [("ab ", "c"), ("ba", "c"), ("ab", "c"), ("ab", " c"), ("b\n", "\nc")])
def test_no_space_is_put_where_a_token_spans_the_border(prompt, chosen, tmp_path):
    """Prompt and response by SentencePiece say what the row says, though together they would share a token (Nectar's prompts
    end with a space)."""
    row, tokenizer = {"prompt": prompt, "chosen": chosen, "rejected": "b"}, make_sentencepiece()
    ids = load_ids(tmp_path, tokenizer, row)
    assert tokenizer.decode(ids[0] + ids[1][:-1]) == prompt + chosen
    assert ids[0] == tokenizer(prompt, add_special_tokens=False).input_ids


def test_a_long_prompt_is_no_part_of_a_response(tmp_path):
    """prompt_left keeps a row whose prompt is long and whose response is short, whatever the tokenizer begins a text with."""
    row = {"prompt": "ab" * 2000, "chosen": "c", "rejected": "b"}
    for tokenizer in (make(), make_sentencepiece()):
        kept, report = load(tmp_path, tokenizer, row, max_length=32, truncation="prompt_left")
        assert len(kept) == 1 and not report["dropped"]


def test_text_goes_on_where_the_prompt_ends(tmp_path):
    """SentencePiece puts a space before each text: between a prompt and its response would be one that nobody wrote."""
    tokenizer = make_sentencepiece()
    row = {"prompt": "ab\n", "chosen": "c", "rejected": " b"}
    rows = load_ids(tmp_path, tokenizer, row)
    for side, text in zip(rows[1:], ("c", " b"), strict=True):
        joint = tokenizer(row["prompt"] + text, add_special_tokens=False).input_ids
        assert [*rows[0], *side] == [*joint, tokenizer.eos_token_id]


def load_ids(folder, tokenizer, row):
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    rows, _ = dataset.load(str(folder / "rows.jsonl"), CFG, tokenizer, pairs=True, cache_dir=folder / "cache")
    return [part.tolist() for part in rows.row(0)]


def test_earlier_answers_are_counted(tmp_path):
    """Supervised rows: the last answer is scored, and a row with others says so."""
    rows = [{"messages": [user("a"), said("b")] * n} for n in (1, 2, 3)]
    _, report = load(tmp_path, make(CHATML), *rows, pairs=False)
    assert report["noticed"]["earlier_answers_not_scored"]["count"] == 2


def test_turns_of_others_in_a_response_are_counted(tmp_path):
    """Conversations that differ early have a user's words in what is scored, and a tool's result is one: the report says so."""
    rows = [
        {side: [user("q"), said(side), user("and?"), said(side)] for side in ("chosen", "rejected")},
        {"prompt": [user("q")], "chosen": [said("a"), {"role": "tool", "content": "r"}, said("c")], "rejected": "b"},
        {"prompt": [user("q"), said("a"), user("and?")], "chosen": [said("a"), said("c")], "rejected": "b"},
    ]
    texts, report = load(tmp_path, make(CHATML), *rows)
    assert ["<|im_start|>user" in chosen or "<|im_start|>tool" in chosen for _, chosen, _ in texts] == [
        True,
        True,
        False,
    ]
    assert report["noticed"]["other_turns_scored"]["count"] == 2


def test_an_answer_that_is_not_to_be_learned_is_refused(tmp_path):
    """KTO's rows with label false are what a model is to unlearn: supervised training takes none, or drops and counts them."""
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    with pytest.raises(UserError, match=":2: field label: expected an answer that is to be learned, got false"):
        load(tmp_path, make(), *rows, pairs=False)
    texts, report = load(tmp_path, make(), *rows, pairs=False, on_bad_row="drop")
    assert texts == [["q", "a<|im_end|>", ""]] and report["dropped"]["undesirable"]["count"] == 1


def test_what_splits_special_tokens_is_another_tokenizer(tmp_path):
    """Its ids are others, so the cache's are not its own."""
    row, found = {"prompt": [user("a")], "chosen": "b", "rejected": "c"}, []
    for split in (False, True):
        tokenizer = make(CHATML)
        tokenizer.split_special_tokens = split
        found.append(load(tmp_path, tokenizer, row)[1]["cache_key"])
    assert found[0] != found[1]
