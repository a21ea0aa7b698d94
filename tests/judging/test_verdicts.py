"""What is read out of a judge's reply, against hand-made replies and closed forms."""

import gzip
import json
import math
import os
import time
from pathlib import Path

import pytest

from rpo.judging import verdicts

NOTHING = {"text": "", "top_logprobs": None, "finish_reason": "stop", "error": None}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A is better. [[A]]", "A"),
        ("[[B]]", "B"),
        ("Neither: [[C]].", "C"),
        ("I am to say [[A]], [[B]] or [[C]]. Final verdict: [[B]]", "B"),
        ("[A]", None),
        ("[[A>B]] and [[AB]]", None),
        ("[[ A ]]", "A"),
        ("[[**B**]]", "B"),
        ("The answer's x[[a]] fails.", None),
        (r"\[\[A\]\]", "A"),
        (r"The rules say [[A]]. Final verdict: \[\[B\]\]", "B"),
        ("[[Assistant A]]", "A"),
        ("Quoting [[A]] or [[B]]; I say [[Tie]]", "C"),
        ("[[tie]]", "C"),
        ("<think>[[A]]? No.</think>\n[[B]]", "B"),
        ("<think>[[A]] it may be", None),
        ("[[A]] I thought.</think>\n\n[[B]]", "B"),
        ("<Thinking>[[B]]</Thinking>Hm.", None),
        ("[THINK][[B]][/THINK][[A]]", "A"),
        ("Answer A opens with <think> and ends badly. [[B]]", "B"),
        ("<|channel|>analysis<|message|>[[B]]<|end|><|start|>assistant<|channel|>final<|message|>[[A]]<|return|>", "A"),
        ("<|channel|>analysis<|message|>[[B]] it may be", None),
        ("analysisWe see. [[B]]?assistantfinal[[A]]", "A"),
        ("<|START_THINKING|>maybe [[A]]<|END_THINKING|><|START_RESPONSE|>Both weak", None),
        ("<|begin_of_thought|>[[A]]<|end_of_thought|>\n[[B]]", "B"),
        ("[[B]]\n```r\ndf[[C]]\n```", "B"),
        ("Asked for is [[A]] if A is better.\n\u7efc\u5408\u6765\u770b\uff0c\u6700\u7ec8\u5224\u51b3\u662f[[B]]", "B"),
        ("e.g. [[A]]\nFinal verdict: __[[B]]__", "B"),
        ("A: [[A]]\uff0cB: [[B]]\u3002\u6211\u7684\u5224\u51b3\uff1a[[B]]", "B"),
        ("\uff3b\uff3bB\uff3d\uff3d", "B"),
        ('<think>[[B]]? It says "compare"</think>\n\n[[A]]', "A"),
        ("It would be [[B]], `B`</think>\nNo verdict.", None),
        ('<think>"Compare" they say: [[A]]', None),
        ('[[A]]: B left "<think>" and `</think>` in', "A"),
        ("I cannot judge this.", None),
        ("", None),
    ],
)
def test_letters(text, letter):
    """The last letter in double brackets, whatever was quoted before it; else none."""
    assert verdicts.pair_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Rating: [[7]]", 7.0),
        ("Rating: [[7.5]]", 7.5),
        ("[[10]]", 10.0),
        ("It says 'Rating: [[10]]' of itself. Rating: [[2]]", 2.0),
        ("as in [1] and [3]", None),
        ("As [2] says, and [3].", None),
        ("Rating: [8]", 8.0),
        ("See [1].\n\n[8]", 8.0),
        ("See [1].\n\n**Rating: [8]**", 8.0),
        ("The answer cites [1] correctly. Rating: 8/10", 8.0),
        ("It cites [1].\n\n**Final rating:** 7.5 / 10.", 7.5),
        ("It cites [1].\nScore (1-10): 9", 9.0),
        ("By [2]:\n### Rating: **8**/10\n\n[1] https://a.b", 8.0),
        ("Rating: 8/10\n\n[1]", 8.0),
        ("The matrix [[1,2],[3,4]] is right. Rating: [[9]]", 9.0),
        ("'Rating: 10' it says of itself, citing [2].", None),
        ("Rating: 85/100", None),
        ("[[10/10]]", 10.0),
        ("[[8 / 10]]", 8.0),
        ("[[3/5]]", None),
        ("[[8,5]]", 8.5),
        (r"\[\[7\]\]", 7.0),
        ("[[ 7 ]] or **[[8]]**", 8.0),
        ("[[Rating: 6]]", 6.0),
        ("Rating: [[8]]\n\nIt indexes x[[3]], which is fine.", 8.0),
        ('The format is "Rating: [[5]]", so:\n[[7]]', 7.0),
        ("Rating: [[4]]/5", None),
        ("Rating: 8\n\nSources: [[1]](https://x.org)", 8.0),
        ("See [[2]](https://x). **Score: 9/10**", 9.0),
        ("Rating: [[7]]-[[8]]", None),
        ("[[7]] or [[8]]", None),
        ("[[8]] out of 10", 8.0),
        ("**Score:** [[8]] / 10", 8.0),
        ("Rating: [4]/5", None),
        ("Rating: [8] out of 10.", 8.0),
        ("[8]/10", 8.0),
        ("<think>[[9]]? Too much.</think>Rating: [[4]]", 4.0),
        ("<think>Rating: [[9]]", None),
        ("by [3], so [[9]]", 9.0),
        ("\u6700\u7ec8\u8bc4\u5206\u4e3a[[3]]\u3002\n\uff08\u6ee1\u5206\u4e3a [[10]]\uff09", 3.0),
        ("Rating: __[[3]]__ (a perfect answer would be [[10]])", 3.0),
        ("I give it [[3]] (a perfect answer would be [[10]]).", 3.0),
        ("It is good ([[7]]).", 7.0),
        ("\u8bc4\u5206\u4e3a[[7]]", 7.0),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[-3]]", None),
        ("7/10", None),
        ("[[seven]]", None),
        ("[[٧]]", None),
    ],
)
def test_rating(text, value):
    """Double brackets come before single ones, the last number counts, and what is off the scale is no rating."""
    assert verdicts.rating(text) == value


def test_first_wins_is_the_softmax_of_two():
    """P(first) = e^a / (e^a + e^b); a token that is not there has no probability; without both there is no verdict."""
    a, b = -0.3, -1.7
    expected = math.exp(a) / (math.exp(a) + math.exp(b))
    assert verdicts.first_wins({"m": a, "M": b, "x": -0.1}, "m", "M") == pytest.approx(expected, abs=1e-15)
    assert verdicts.first_wins({"m": a, "M": b}, "M", "m") == pytest.approx(1 - expected, abs=1e-15)
    assert verdicts.first_wins({"m": -9.0}, "m", "M") == 1
    assert verdicts.first_wins({"M": -9.0}, "m", "M") == 0
    assert verdicts.first_wins({"x": -0.1}, "m", "M") is None
    assert verdicts.first_wins({"m": -9999.0, "M": -9999.0}, "m", "M") == 0.5  # e^-9999 is 0
    assert verdicts.first_wins({"m": -1.0, "M": -9999.0}, "m", "M") == 1


def logs(**shares):
    return {token: math.log(share) for token, share in shares.items()}


def test_all_tokens_that_spell_a_letter_count_together():
    """White space, brackets, quotes, markup and case make no other letter; a word and a grade are none. Of m and M the case is
    the difference."""
    spelled = ["A", " A", "\u2581A", "\u0120A", "A\n", "**A", "[[A", "(A)", '"A"', "A.", "a", "\uff21"]
    others = ["A+", "An", "AB", "Answer", "", " ", "[["]
    added = verdicts.by_letter({token: math.log(0.05) for token in [*spelled, *others, "B:"]})
    shares = {letter: math.exp(value) for letter, value in added.items()}
    assert shares == pytest.approx({"A": 0.05 * len(spelled), "B": 0.05})
    of_case = verdicts.by_letter(logs(m=0.2, M=0.3) | {" M": math.log(0.4)}, ("m", "M"))
    assert {letter: math.exp(value) for letter, value in of_case.items()} == pytest.approx({"m": 0.2, "M": 0.7})


def test_letters_need_their_mass():
    """What holds less than min_mass of the first token is no verdict, whichever letter is likelier; at min_mass it is one."""
    real = {"The": 0.2626, "[": 0.0954, "You": 0.0524, "A": 0.0422, "To": 0.0345}  # a model that was not asked rightly
    score, why = verdicts.letter_score(logs(**real))
    assert score is None and why == "A and B hold 4% of the judge's first token, less than judge.min_mass=0.5"
    assert verdicts.letter_mass(logs(**real)) == pytest.approx(0.0422)
    assert verdicts.letter_score(logs(**real), min_mass=0.04)[0] == 1.0
    assert verdicts.letter_score(logs(A=0.3, B=0.2)) == (pytest.approx(0.6), None)
    assert verdicts.letter_score(logs(A=0.3, B=0.19))[0] is None
    assert verdicts.letter_score(logs(A=0.2) | {" A": math.log(0.2), "B": math.log(0.2)}) == (
        pytest.approx(2 / 3),
        None,
    )
    assert verdicts.letter_score({}, min_mass=0.0)[0] is None and verdicts.letter_mass(None) is None


def test_position_is_a_function_of_instruction_and_seed():
    """AlpacaEval's draw: the same for the same text and seed, about half of all, another with another seed."""
    texts = [f"instruction {i}" for i in range(400)]
    drawn = [verdicts.switched(text) for text in texts]
    assert drawn == [verdicts.switched(text, 0) for text in texts]
    assert 150 < sum(drawn) < 250
    assert drawn != [verdicts.switched(text, 1) for text in texts]


@pytest.mark.parametrize(
    ("reply", "score", "why"),
    [
        ({"text": "[[A]]"}, 1.0, None),
        ({"text": "[[B]]"}, 0.0, None),
        ({"text": "[[C]]"}, 0.5, None),
        ({"text": "I cannot."}, None, "no [[A]], [[B]] or [[C]]"),
        ({"text": "were it [[A]], then", "finish_reason": "length"}, None, "cut"),
        ({"text": "[[A]]", "error": "HTTP 500"}, None, "HTTP 500"),
    ],
)
def test_first_score_in_words(reply, score, why):
    """A letter is a score; a refusal, a reply cut short and a failed request have none, and a reason."""
    first, reason = verdicts.first_score("text", NOTHING | reply)
    assert first == score
    assert reason is None if why is None else why in reason


def test_first_score_by_logprobs():
    """The probability of A over that of B; without log-probs or without either letter there is a reason."""
    reply = NOTHING | {"text": "A", "finish_reason": "length", "top_logprobs": {"A": math.log(0.6), "B": math.log(0.2)}}
    assert verdicts.first_score("logprobs", reply) == (pytest.approx(0.75), None)
    assert verdicts.first_score("logprobs", NOTHING)[1] == "no log-probs in the judge's reply"
    assert "neither A nor B" in verdicts.first_score("logprobs", NOTHING | {"top_logprobs": {"The": -0.1}})[1]


@pytest.mark.parametrize(
    ("first", "second", "score", "agree"),
    [
        (1, 1, 1, True),
        (0, 0, 0, True),
        (0.5, 0.5, 0.5, True),
        (1, 0, 0.5, False),
        (0, 1, 0.5, False),
        (1, 0.5, 0.5, False),
        (0.5, 0, 0.5, False),
        (0.9, 0.7, 0.8, True),
        (0.9, 0.2, 0.5, False),
    ],
)
def test_two_orders(first, second, score, agree):
    """Orders that agree give their mean, others half; the other model's score is one minus it."""
    assert verdicts.two_orders(first, second) == (pytest.approx(score), agree)
    assert verdicts.two_orders(1 - first, 1 - second) == (pytest.approx(1 - score), agree)


def test_an_error_in_either_order_is_no_score():
    """Half a judgment is none."""
    assert verdicts.two_orders(None, 1.0) is verdicts.two_orders(0.0, None) is verdicts.two_orders(None, None) is None


@pytest.mark.skipif("RPO_TEST_DATA" not in os.environ, reason="RPO_TEST_DATA names no folder with real data")
def test_letters_of_gpt4():
    """Our reading of 640 judgments by GPT-4 gives the winners that are stored with them."""
    folder = Path(os.environ["RPO_TEST_DATA"], "mt_bench", "rpo_repo_model_judgment")
    count = 0
    for file in sorted(folder.glob("gpt-4_pair_*.jsonl.gz")):
        for line in gzip.open(file, "rt"):
            row = json.loads(line)
            for game, names in (("g1", ("model_1", "model_2")), ("g2", ("model_2", "model_1"))):
                winner = {"A": names[0], "B": names[1], "C": "tie"}
                letter = verdicts.pair_letter(row[f"{game}_judgment"])
                assert winner[letter] == row[f"{game}_winner"], row["question_id"]
                count += 1
    assert count == 640


def test_reading_takes_a_moment_however_long_the_reply():
    """200 kB of white space, brackets, open tags or labels is read in under two seconds."""
    for part in (
        "\n",
        " ",
        "[[",
        "[1] ",
        "<think>x",
        "</think>",
        "Rating: ",
        "**Rating** (",
        "<|a|>",
        "\\",
        "1",
        "A. ",
    ):
        text = part * (200_000 // len(part))
        began = time.process_time()
        verdicts.pair_letter(text), verdicts.rating(text)
        assert time.process_time() - began < 2, part


@pytest.mark.parametrize(
    "text", ["My verdict: [[A]] is better than [[B]].", "I cannot choose [[A]] or [[B]]", "[[A]] > [[B]]"]
)
def test_a_sentence_of_two_letters_is_no_verdict(text):
    """Which of them is meant is not guessed."""
    assert verdicts.pair_letter(text) is None


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        *[(name, verdicts.CUT) for name in ("length", "model_length", "max_tokens", "FINISH_REASON_MAX_TOKENS")],
        *[(name, f"not finished (finish_reason '{name}')") for name in ("content_filter", "error", "abort", "SAFETY")],
        *[(name, f"not finished (finish_reason '{name}')") for name in ("incomplete", "pending")],
        *[(name, None) for name in ("stop", "FINISH_REASON_STOP", "FinishReason.STOP", "end", "end_turn", "EOS", "")],
        *[(name, None) for name in ("function_call", "tool_calls", "stop_token", "completed", "null", None, 3)],
    ],
)
def test_a_reply_that_was_cut_is_no_verdict_by_any_name(reason, why):
    """Servers have many names for it; a letter so far may be the one that is about to be rejected."""
    reply = {"text": "My prior is [[B]]", "top_logprobs": None, "finish_reason": reason, "error": None}
    score, said = verdicts.first_score("text", reply)
    assert (score, said) == (0.0, None) if why is None else (score is None and why in said)


def test_a_rating_in_parentheses_is_the_verdict_where_they_begin_with_its_name():
    """What a perfect answer would get is an aside, the final rating is not."""
    assert verdicts.rating("I first thought [[6]]. (Final rating: [[8]])") == 8
    assert verdicts.rating("Rating: [[7]] (a perfect answer's rating: [[10]])") == 7
    assert verdicts.rating("I give [[7]] (the rating would be [[10]] with sources)") == 7


def test_a_letter_that_was_not_listed_may_be_likely():
    """Where a server lists fewer tokens than asked, an absent letter has no probability only if the others have it all."""
    score, why = verdicts.letter_score(logs(A=0.55))
    assert score is None and why == "B is not among the judge's 1 first tokens, which hold 55%"
    assert verdicts.letter_score(logs(A=0.995))[0] == 1.0
    assert verdicts.letter_score(logs(A=0.55, a=0.01, x=0.1, y=0.1, z=0.1))[0] == 1.0
