"""What a judge is shown: every text in its place and unharmed, by our wording and by a file's."""

import gzip
import json
import os
from itertools import product
from pathlib import Path

import pytest

from rpo.errors import UserError
from rpo.judging import mt_bench_files, prompts, verdicts
from rpo.judging.prompts import OURS
from tests.helpers.rows import write_jsonl

NASTY = "{answer_b} {question} {0} {{}} }{ \\1 \\g<0> [[A]] %s"
NAMES = {
    mode: [f"{name}{turns}" for name in names for turns in ("", "-multi-turn")]
    for mode, names in {"pair": ("pair-v2", "pair-math-v1"), "single": ("single-v1", "single-math-v1")}.items()
}


def file_of(path, mode, **changed):
    """A file of the four templates of a mode, by FastChat's names, with changes to rows by name."""
    rows = []
    for kind, name in zip(product([mode], (False, True), (1, 2)), NAMES[mode], strict=True):
        rows.append(
            {
                "name": name,
                "type": mode,
                "system_prompt": f"system of {name}",
                "prompt_template": OURS[kind].prompt_template,
            }
        )
    rows = [row | changed.get(row["name"].replace("-", "_"), {}) for row in rows]
    write_jsonl(path, rows)
    return str(path)


@pytest.mark.parametrize(("reference", "turns"), list(product((False, True), (1, 2))))
def test_texts_are_in_place(reference, turns):
    """Questions, answers and references are all shown, each answer after its own title; nothing is shown that is not asked for."""
    ask, ref = [f"<ask{i}>" for i in range(turns)], [f"<ref{i}>" for i in range(turns)]
    shown_ref = ref if reference else None
    a, b = [f"<a{i}>" for i in range(turns)], [f"<b{i}>" for i in range(turns)]
    shown = prompts.filled(OURS["pair", reference, turns], ask, [a, b], shown_ref)
    text = shown[1]["content"]
    assert [message["role"] for message in shown] == ["system", "user"]
    assert all(part in text for part in [*ask, *a, *b])
    assert all((part in text) == reference for part in ref)
    assert max(map(text.index, a)) < min(map(text.index, b))
    single = prompts.filled(OURS["single", reference, turns], ask, [a], shown_ref)[1]["content"]
    assert all(part in single for part in [*ask, *a]) and not any(part in single for part in b)
    assert all((part in single) == reference for part in ref)


def test_text_is_put_in_as_it_is():
    """Braces, backslashes, fields' names and verdicts in a text stay in it; swapping the answers swaps them alone."""
    a, b, reference = ([NASTY + number] for number in "123")
    template = OURS["pair", True, 1]
    text = prompts.filled(template, [NASTY], [a, b], reference)[1]["content"]
    assert text.count(NASTY) == 4
    other = prompts.filled(template, [NASTY], [b, a], reference)[1]["content"]
    assert len(other) == len(text) and other != text
    assert prompts.pair(NASTY, "", "")[1]["content"].count(NASTY) == 1


def test_a_letter_alone_is_asked_for():
    """The letter form shows the same texts and does not mention verdicts in brackets, which the other form does."""
    words, letter = prompts.pair("q", "a", "b"), prompts.letter("q", "a", "b")
    assert words[1] == letter[1]
    assert all(verdict in words[0]["content"] for verdict in ("[[A]]", "[[B]]", "[[C]]"))
    assert verdicts.pair_letter(letter[0]["content"]) is None
    assert "single letter" in letter[0]["content"]


def test_conversations_are_shown_with_speakers():
    """A lone user message is its text; of more turns, each is shown in order with who said it."""
    conversation = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    assert prompts.transcript(conversation[1:2]) == prompts.transcript("hi") == "hi"
    assert prompts.transcript(conversation) == "System: be kind\n\nUser: hi\n\nAssistant: hello\n\nUser: bye"
    assert prompts.transcript(conversation) in prompts.pair(conversation, "a", "b")[1]["content"]


def test_templates_of_a_file(tmp_path):
    """A file's templates are used by FastChat's names; doubled braces are single ones, as str.format has it."""
    text = "{{json}} {question} / {answer_a} / {answer_b}"
    path = file_of(tmp_path / "p.jsonl", "pair", pair_v2={"prompt_template": text})
    templates = prompts.load(path, "pair")
    asked = prompts.pair("q{x}", "{{a}}", "b", templates=templates)
    assert asked[0]["content"] == "system of pair-v2"
    assert (
        asked[1]["content"]
        == "{json} q{x} / {{a}} / b"
        == text.replace("{answer_a}", "{{{{a}}}}").format(question="q{x}", answer_b="b")
    )
    assert templates["pair", True, 2].name == "pair-math-v1-multi-turn"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pair_v2": {"name": "other"}}, "has no template pair-v2;"),
        ({"pair_v2": {"name": "pair-math-v1"}}, "template pair-math-v1 is there already, at"),
        ({"pair_v2": {"prompt_template": "{question} {answer_a}"}}, "pair-v2 lacks {answer_b}"),
        ({"pair_v2": {"prompt_template": "{question} {answer_a} {answer_b} {style}"}}, "has unknown {style}"),
        ({"pair_v2": {"system_prompt": None}}, "field system_prompt: expected a string, got None"),
    ],
)
def test_bad_templates(tmp_path, changed, message):
    """One line with the file, the template and what is wrong with it."""
    with pytest.raises(UserError) as error:
        prompts.load(file_of(tmp_path / "bad.jsonl", "pair", **changed), "pair")
    assert message in str(error.value) and "\n" not in str(error.value) and "bad.jsonl" in str(error.value)


def test_templates_of_the_other_mode_are_not_asked_for(tmp_path):
    """A file with the single templates alone does for ratings, and is one line for pairs."""
    path = file_of(tmp_path / "single.jsonl", "single")
    assert prompts.load(path, "single")["single", True, 1].name == "single-math-v1"
    with pytest.raises(UserError, match="has no template pair-v2"):
        prompts.load(path, "pair")


@pytest.mark.skipif("RPO_TEST_DATA" not in os.environ, reason="RPO_TEST_DATA names no folder with real data")
def test_prompts_that_gpt4_was_shown():
    """FastChat's templates filled by us are, byte for byte, the 640 prompts that were stored with GPT-4's judgments.

    The answers are cut out of the prompts themselves, at the templates' own marks.
    """
    folder = Path(os.environ["RPO_TEST_DATA"], "mt_bench")
    templates = prompts.load(str(folder / "judge_prompts.jsonl"), "pair")
    asked = {question.question_id: question for question in mt_bench_files.questions(str(folder / "question.jsonl"))}
    references = mt_bench_files.answers(str(folder / "reference_answer_gpt-4.jsonl")).turns
    count = 0
    for file in sorted((folder / "rpo_repo_model_judgment").glob("gpt-4_pair_*.jsonl.gz")):
        for line in gzip.open(file, "rt"):
            row = json.loads(line)
            number, turn = row["question_id"], row["turn"]
            questions = asked[number].turns[:turn]
            refs = references[number][:turn] if asked[number].category in ("math", "reasoning", "coding") else None
            template = templates["pair", refs is not None, turn]
            assert row["judge"][1] == template.name
            for game in ("g1_user_prompt", "g2_user_prompt"):
                both = [_answers(row[game], who, questions) for who in "AB"]
                messages = prompts.filled(template, questions, both, refs)
                assert messages[1]["content"] == row[game], (number, turn, game)
                count += 1
    assert count == 640


def _answers(prompt, who, questions):
    """The answers of assistant `who` in a prompt that FastChat made."""
    if len(questions) == 1:
        start, end = (f"[The {edge} of Assistant {who}'s Answer]" for edge in ("Start", "End"))
        return [prompt.partition(f"{start}\n")[2].partition(f"\n{end}")[0]]
    start, end = (f"<|The {edge} of Assistant {who}'s Conversation with User|>" for edge in ("Start", "End"))
    own = prompt.partition(start)[2].partition(f"\n\n{end}")[0]
    asked = [f"\n\n### User:\n{text}\n\n### Assistant {who}:\n" for text in questions]
    first, second = own.removeprefix(asked[0]).split(asked[1])
    return [first, second]
