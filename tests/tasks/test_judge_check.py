"""task=judge_check: what it says of judges whose accuracy, bias and steadiness are known by their making."""

import json
import math
import threading
from dataclasses import asdict, replace

import pytest

from rpo.errors import UserError
from rpo.evals import results
from rpo.judging import judge
from rpo.judging.client import Reply
from rpo.tasks import judge_check
from tests.helpers.contexts import StubContext
from tests.helpers.judge_server import JudgeServer, slow, status, text, truncated, wait_less
from tests.helpers.rows import write_jsonl
from tests.helpers.runs import settings

PAIRS = [
    {
        "prompt": f"question {i % 8}",
        "chosen": f"good {i}" + " x" * (i % 3),
        "rejected": f"bad {i}" + " y" * ((i + 1) % 3),
    }
    for i in range(12)
]  # eight prompts; the chosen answer is longer for some, shorter for some
GAPS = [len(pair["chosen"]) - len(pair["rejected"]) for pair in PAIRS]


def said(text="", error=None, **more):
    values = {"top_logprobs": None, "finish_reason": "stop", "input_tokens": 9, "output_tokens": 2, "model": "it"}
    return Reply(text=text, error=error, **(values | more))


def first_is_good(request):
    content = request.messages[-1]["content"]
    return content.index("good ") < content.index("bad ")


def asker(letter):
    """A judge in words: `letter(request)` is its verdict, None for a reply without one."""

    def ask(requests):
        given = [letter(request) for request in requests]
        return [said("I can not tell." if given is None else f"So: [[{given}]]") for given in given]

    return ask


def right(request):
    return "A" if first_is_good(request) else "B"


@pytest.fixture
def cfg(tmp_path, group):
    """Settings with 12 pairs, a judge in words."""
    file = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    how = ("task=judge_check", "judge.model=it", "judge.base_url=http://127.0.0.1:9/v1", "judge.verdict=text")
    return settings(*how, f"data.eval={file}", name="eval")


def values(made, model="it"):
    return {name: cell["value"] for name, cell in made.models[model].items()}


def check(cfg, ask, tmp_path, **expected):
    made = judge_check.run(cfg, StubContext(tmp_path, ask=ask))
    found = values(made)
    assert {name: found[name.replace("__", "/")] for name in expected} == pytest.approx(expected)
    return made


def test_a_judge_that_is_right(cfg, tmp_path):
    """Accurate, steady, the same in both orders; the longer answer as often as it is the chosen one; 12 pairs x 2 orders x 2
    repeats in 8 clusters."""
    gaps = [gap for gap in GAPS if gap]
    share = sum(gap > 0 for gap in gaps) / len(gaps)
    perfect = {"accuracy": 1, "swap_agreement": 1, "stability": 1, "first_position": 0.5}
    perfect |= {"longer_preferred": share, "longer_chosen": share}
    made = check(cfg, asker(right), tmp_path, **perfect)
    cells = made.models["it"]
    assert (cells["accuracy"]["n"], cells["swap_agreement"]["n"], cells["stability"]["n"]) == (48, 24, 24)
    assert len({sample.id for sample in made.items}) == 48
    assert len({sample.cluster for sample in made.items}) == 8
    assert (cells["longer_preferred"]["n"], cells["longer_chosen"]["n"]) == (4 * len(gaps), len(gaps))
    assert made.notes == []
    assert (made.details["verdict"], made.details["judge"]["requests"]) == ("text", 48)
    assert json.loads((tmp_path / "data_report.json").read_text())["kept"] == 12


def test_a_judge_that_likes_the_first(cfg, tmp_path):
    """Always A: right half of the time, in no pair the same in both orders, wholly biased for the position."""
    biased = {"accuracy": 0.5, "swap_agreement": 0, "stability": 1, "first_position": 1, "longer_preferred": 0.5}
    made = check(cfg, asker(lambda _: "A"), tmp_path, **biased)
    assert made.notes[0].startswith(
        "it: swap_agreement is 0%: this judge's verdict on most items depends on their order"
    )


def test_a_judge_that_likes_length(cfg, tmp_path):
    """The longer answer wins: accuracy is 1 where the chosen one is longer, 0 where shorter."""

    def longer(request):
        pair = next(
            p
            for p in PAIRS
            if all(f"\n{p[side]}\n" in request.messages[-1]["content"] for side in ("chosen", "rejected"))
        )
        more = len(pair["chosen"]) - len(pair["rejected"])
        return "C" if not more else "A" if (more > 0) == first_is_good(request) else "B"

    assert any(gap > 0 for gap in GAPS) and any(gap < 0 for gap in GAPS)
    by_length = {"accuracy__chosen_longer": 1, "accuracy__chosen_shorter": 0, "swap_agreement": 1}
    check(cfg, asker(longer), tmp_path, **by_length, longer_preferred=1)


def test_a_judge_of_moods(cfg, tmp_path):
    """Right at first, a tie at the repeat: accuracy 3/4, never stable, yet both orders agree; ties prefer no length."""
    mood = asker(lambda request: right(request) if request.repeat == 0 else "C")
    share = sum(gap > 0 for gap in GAPS) / len(GAPS)
    expected = {"accuracy": 0.75, "stability": 0, "swap_agreement": 1, "first_position": 0.5, "longer_preferred": share}
    made = check(cfg, mood, tmp_path, **expected)
    assert made.models["it"]["longer_preferred"]["n"] == 24


def test_one_repeat_measures_no_stability(cfg, tmp_path):
    """task.repeats=1 asks 24 times and has no such metric; 3 repeats compare three pairs of them."""
    once = judge_check.run(replace(cfg, task=replace(cfg.task, repeats=1)), StubContext(tmp_path, ask=asker(right)))
    assert once.models["it"]["accuracy"]["n"] == 24 and "stability" not in once.models["it"]
    thrice = replace(cfg, task=replace(cfg.task, repeats=3))
    check(thrice, asker(lambda r: right(r) if r.repeat < 2 else "C"), tmp_path, stability=1 / 3)


def test_errors_are_counted_and_in_no_mean(cfg, tmp_path):
    """One reply without a verdict and one request that failed: two judgments, their two pairs of orders and repeats."""

    def ask(requests):
        replies = asker(right)(requests)
        replies[0], replies[7] = said("No."), said(error="HTTP 400: too long")
        return replies

    made = check(cfg, ask, tmp_path, accuracy=1)
    cells = made.models["it"]
    assert {
        name: (cells[name]["n"], cells[name]["n_error"]) for name in ("accuracy", "swap_agreement", "stability")
    } == {
        "accuracy": (46, 2),
        "swap_agreement": (22, 2),
        "stability": (22, 2),
    }
    failed = [sample for sample in made.items if sample.error]
    assert {sample.error for sample in failed} == {
        "no [[A]], [[B]] or [[C]] in the judge's reply",
        "HTTP 400: too long",
    }
    assert all(sample.scores == {} for sample in failed)


def test_a_judge_that_gives_log_probs(cfg, tmp_path):
    """verdict=auto finds them on the first pair; the first answer's probability is the score, a vote where above half."""
    seen = []

    def ask(requests):
        seen.append(len(requests))
        likely = {True: {"A": math.log(0.6), " B": math.log(0.2)}, False: {"A": math.log(0.45), "B": math.log(0.15)}}
        return [said("A", top_logprobs=likely[first_is_good(request)]) for request in requests]

    auto = replace(cfg, judge=replace(cfg.judge, verdict="auto"))
    made = check(auto, ask, tmp_path, accuracy=0.5, swap_agreement=0, first_position=0.75)
    assert made.details["verdict"] == "logprobs" and seen == [2, 48]
    assert made.models["it"]["letter_mass"]["value"] == pytest.approx(0.7)
    assert made.notes[-1] == (
        "it: letter_mass: A and B hold 70% of the judge's first token on average: the judge often begins with something else"
    )
    check(auto, asker(right), tmp_path, accuracy=1)  # a server without them


def test_log_probs_of_little_mass_are_no_verdicts(cfg, tmp_path, capsys):
    """A judge that would rather say something else: in words from the second request on with verdict=auto, errors with logprobs;
    the mass is in the samples, and what was stored reads the same."""
    little = {"The": math.log(0.26), "[": math.log(0.1), "A": math.log(0.04)}

    def ask(requests):
        return [said("The", top_logprobs=little) if r.top_logprobs else asker(right)([r])[0] for r in requests]

    auto = replace(cfg, judge=replace(cfg.judge, verdict="auto"))
    made = check(auto, ask, tmp_path, accuracy=1)
    assert made.details["verdict"] == "text" and "judge it: verdicts in words" in capsys.readouterr().out
    assert made.details["judge"]["letter_mass"] == pytest.approx(0.04) and "letter_mass" not in made.models["it"]
    assert made.notes == [
        "letter_mass: A and B hold 4% of the judge's first token on average, too little for verdicts by log-probs: all were asked "
        "for in words"
    ]
    forced = replace(cfg, judge=replace(cfg.judge, verdict="logprobs"))
    made = judge_check.run(forced, StubContext(tmp_path, ask=ask))
    cells = made.models["it"]
    assert (cells["accuracy"]["n"], cells["accuracy"]["n_error"], cells["letter_mass"]["n"]) == (0, 48, 48)
    assert "48 of 48 replies have less than judge.min_mass=0.5, and are no verdicts" in made.notes[0]
    assert [one.details["letter_mass"] for one in made.items] == pytest.approx([0.04] * 48)
    write_jsonl(tmp_path / "stored.jsonl", map(asdict, made.items))
    again = judge_check.run(replace(forced, annotations=str(tmp_path / "stored.jsonl")), StubContext(tmp_path))
    assert (again.models, again.items, again.notes) == (made.models, made.items, made.notes)


def test_a_few_replies_of_little_mass_are_errors_and_many_make_words(cfg, tmp_path):
    """After a trial that went well: up to 5% without the letters' mass are errors among verdicts by log-probs, with more all are
    asked again in words."""

    def ask_with(few):
        def ask(requests):
            low = {"The": -0.1, "B": math.log(0.05)}
            replies = []
            for i, request in enumerate(requests):
                likely = low if 2 <= i < 2 + few else {"A" if first_is_good(request) else "B": math.log(0.995)}
                replies.append(said("A", top_logprobs=likely) if request.top_logprobs else asker(right)([request])[0])
            return replies

        return ask

    auto = replace(cfg, judge=replace(cfg.judge, verdict="auto"))
    made = judge_check.run(auto, StubContext(tmp_path, ask=ask_with(2)))
    assert (made.details["verdict"], made.models["it"]["accuracy"]["n_error"]) == ("logprobs", 2)
    made = judge_check.run(auto, StubContext(tmp_path, ask=ask_with(3)))
    assert (made.details["verdict"], made.models["it"]["accuracy"]["n_error"]) == ("text", 0)
    assert made.details["judge"]["requests"] == 48 + 48


def test_stored_judgments_give_the_same_again(cfg, tmp_path, capsys):
    """annotations= of its own samples.jsonl: equal cells and samples, no judge; two judges are two columns."""
    noisy = asker(lambda request: None if "bad 5" in str(request.messages) and request.repeat else right(request))
    made = judge_check.run(cfg, StubContext(tmp_path, ask=noisy))
    results.write(tmp_path, cfg, made, results.table)
    stored = replace(cfg, annotations=str(tmp_path / "samples.jsonl"))
    again = judge_check.run(stored, StubContext(tmp_path))
    assert again.models == made.models and again.items == made.items
    other = tmp_path / "other.jsonl"
    other.write_text((tmp_path / "samples.jsonl").read_text().replace('"model": "it"', '"model": "other"'))
    both = judge_check.run(replace(stored, annotations=[stored.annotations, str(other)]), StubContext(tmp_path))
    assert both.models["other"] == both.models["it"] == made.models["it"]
    few = judge_check.run(replace(stored, task=replace(cfg.task, limit=3)), StubContext(tmp_path))
    assert few.models["it"]["accuracy"]["n"] == 12


def test_against_a_server(cfg, tmp_path):
    """From settings to samples over HTTP; the same judge again costs nothing."""
    with JudgeServer(answer=lambda body: "[[A]]" if "good" in body["messages"][-1]["content"] else "[[B]]") as host:
        how = replace(cfg.judge, base_url=host.url, concurrency=4)

        def ask(requests):
            return judge.ask(requests, how, tmp_path / "cache")

        first = judge_check.run(replace(cfg, judge=how), StubContext(tmp_path, ask=ask))
        assert host.tried == 48
        again = judge_check.run(replace(cfg, judge=how), StubContext(tmp_path, ask=ask))
        assert host.tried == 48
    assert values(first)["first_position"] == 1.0
    assert again.models == first.models and again.items == first.items
    assert (first.details["judge"]["cached"], again.details["judge"]["cached"]) == (0, 48)


def test_a_server_on_a_bad_day_changes_nothing(cfg, tmp_path, monkeypatch):
    """Errors of all kinds, and a death midway: the table is the undisturbed one, and no reply is paid for twice."""
    wait_less(monkeypatch)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    cfg = replace(cfg, task=replace(cfg.task, repeats=1))
    host = JudgeServer(logprobs=False).start()
    how = replace(cfg.judge, base_url=host.url, retries=100, verdict="auto", timeout=2.0)

    def measured(cache):
        asked = replace(cfg, judge=how)
        return judge_check.run(asked, StubContext(tmp_path, ask=lambda some: judge.ask(some, how, tmp_path / cache)))

    calm = measured("calm")
    host.delivered.clear()
    bad = [
        status(429),
        status(429, headers={"Retry-After": "0.02"}),
        status(500),
        status(503),
        slow(0.8),
        text("{"),
        truncated,
    ]
    start = host.tried

    def mishap(number, body):
        if number == start + 20:
            host.die()
            threading.Timer(0.3, host.start).start()
        if number == start + 10:
            return slow(20)
        return bad[number % 16] if number % 16 < len(bad) else None

    host.mishap = mishap
    stormy = measured("stormy")
    with host.lock:
        host.die()
    assert host.tried - start > 40
    assert (stormy.models, stormy.items) == (calm.models, calm.items)
    assert set(host.delivered.values()) == {1} and len(host.delivered) == 24 + 2  # and the trial of log-probs


def test_pairs_of_every_form(cfg, tmp_path):
    """Messages and transcripts are read as training reads them; repeats and empty answers are left out and counted."""
    rows = [
        {"prompt": [{"role": "user", "content": f"q {i}"}], "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(30)
    ]
    rows += [{"chosen": "\n\nHuman: h\n\nAssistant: good", "rejected": "\n\nHuman: h\n\nAssistant: bad"}]
    rows += [rows[0], {"prompt": "empty", "chosen": "good", "rejected": ""}]
    data = replace(cfg.data, eval=str(write_jsonl(tmp_path / "forms.jsonl", rows)))
    pairs, report = judge_check.labelled(data, None)
    assert len(pairs) == 31 and pairs[-1][1:] == ("good", "bad")
    assert {kind: entry["count"] for kind, entry in report["dropped"].items()} == {"repeated": 1, "uninformative": 1}


BAD = {
    "no pairs": ({"prompt": "p", "chosen": "c"}, r"bad.jsonl:1: field rejected"),
    "no object": ([1], r"bad.jsonl:1: expected a JSON object"),
    "calls": (
        {"prompt": "p", "chosen": [{"role": "assistant", "content": None, "tool_calls": [{}]}], "rejected": "r"},
        "bad.jsonl:1: ",
    ),
    "equal": ({"prompt": "p", "chosen": "same", "rejected": "same"}, "1 of 1 rows have an empty response or two equal"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pairs(cfg, tmp_path, name):
    """One line with file and line number; nobody is asked."""
    row, message = BAD[name]
    data = replace(cfg.data, eval=str(write_jsonl(tmp_path / "bad.jsonl", [row])))
    with pytest.raises(UserError, match=message):
        judge_check.run(replace(cfg, data=data), StubContext(tmp_path))


def test_bad_annotations(cfg, tmp_path):
    """Lines of another form, a judgment twice, and none at all."""
    made = judge_check.run(cfg, StubContext(tmp_path, ask=asker(right)))
    good = asdict(made.items[0])
    for rows, message in (
        ([], "no judgments there"),
        ([{"g1_winner": "x"}], "stored.jsonl:1: field model: expected a string"),
        ([good | {"details": good["details"] | {"score": 2}}], "field score: expected a share, 0 to 1, got 2"),
        ([good | {"details": good["details"] | {"score": None}}], "expected either a score or an error"),
        ([good | {"details": good["details"] | {"shown_first": "A"}}], "field shown_first: expected chosen.rejected"),
        ([good | {"details": None}], "field details: expected a mapping"),
        ([good, good], r"stored.jsonl:2: it's judgment .* is there already, at .*stored.jsonl:1"),
    ):
        stored = replace(cfg, annotations=str(write_jsonl(tmp_path / "stored.jsonl", rows)))
        with pytest.raises(UserError, match=message):
            judge_check.run(stored, StubContext(tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["judge.model=it"], "data.eval=None, annotations=None with task=judge_check"),
        (["annotations=a.jsonl", "data.eval=b.jsonl"], "data.eval=b.jsonl, annotations=a.jsonl"),
        (["annotations=a.jsonl", "task.prompts=p.jsonl"], "task.prompts=p.jsonl with annotations"),
        (["judge.model=it", "data.eval=b", "task.prompts=p", "judge.verdict=logprobs"], "judge.verdict=logprobs with"),
        (["judge.model=it", "data.eval=b", "task.repeats=0"], "task.repeats=0: expected at least 1"),
        (["judge.model=it", "data.eval=b", "judge.base_url=localhost:8000/v1"], "expected null or http:// or https://"),
        (["judge.model=it", "data.eval=b", "judge.base_url=http://a/v1/chat/completions"], "without /chat/completions"),
        (["judge.model=it", "data.eval=b", "judge.base_url='http://a/v1/chat/completions?x=1'"], "without /chat/compl"),
        (
            ["judge.model=it", "data.eval=b", "judge.extra_body={temperature: 1}"],
            "temperature is set by judge.temperature",
        ),
        (
            ["judge.model=it", "data.eval=b", "judge.extra_body={stream: true}"],
            "stream is what this program sets itself",
        ),
        (["judge.model=it", "data.eval=b", "judge.min_mass=2"], "judge.min_mass=2: expected a share, 0 to 1"),
        (["judge.model=it", "data.eval=b", "judge.temperature=3"], "judge.temperature=3: expected null or 0 to 2"),
        (["judge.model=it", "data.eval=b", "judge.timeout=inf"], "judge.timeout=inf"),
        (["judge.model=it", "data.eval=b", "judge.max_cost=1"], "judge.max_cost=1.0: needs judge.price_in"),
        (
            ["judge.model=it", "data.eval=b", "judge.api_key_env=sk-not-a-name"],
            "judge.api_key_env: expected a variable's name",
        ),
    ],
)
def test_settings_that_contradict_each_other(more, message):
    """One line names the keys; a key in the place of its variable's name is not shown."""
    with pytest.raises(UserError, match=message) as caught:
        settings("task=judge_check", *more, name="eval")
    assert "sk-not" not in str(caught.value)
