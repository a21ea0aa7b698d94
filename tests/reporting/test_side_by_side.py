"""The worst answers: which items may stand side by side, which is worse, what is shown of them."""

from rpo.reporting import side_by_side
from tests.helpers.left_behind import items


def test_one_opponent_or_each_other():
    """Items against different opponents do not stand side by side, those of two that met each other do."""

    def item(against):
        (own,) = items("m", {"q": {"win_rate": 1.0}}, against=against and {"model": against, "response": None})
        return {"q": own}

    comparable = side_by_side.comparable
    assert comparable(item("x"), item("x"), None) and comparable(item("b"), item("a"), ("a", "b"))
    assert not comparable(item("x"), item("y"), None) and not comparable(item("b"), item("a"), None)
    assert not comparable(item("x"), item("a"), ("a", "b")) and comparable(item(None), item(None), None)


def test_the_metric_s_direction():
    """Of a metric of which less is better a rise is worse; items in error, or without a score or a counterpart, are left out."""
    samples = [
        item
        for model, kls in (("a", (1.0, 1.0, 1.0)), ("b", (3.0, 0.5, 9.0)))
        for i, kl in enumerate(kls)
        for item in items(model, {str(i): {"samples/length": 9, "kl": kl}}, response=f"{model}{i}")
    ]
    samples += [*items("a", {"7": {"kl": 1.0}}), *items("b", {"8": {}}), *items("b", {"2": {}}, error="no")]
    a, b = side_by_side.items_of(samples, "a"), side_by_side.items_of(samples, "b")
    compared = side_by_side.worst("a", a, "b", b, 1)
    assert compared.summary == "b against a, by kl: worse on 2 of 3 items, better on 1."
    assert [duel.right.start for duel in compared.duels] == ["b2"]
    assert side_by_side.worst("a", a, "b", {}, 5) is None and side_by_side.worst("a", a, "b", b, 0) is None
    lengths = dict(enumerate(items("a", {"q": {"samples/length": 9, "samples/ended": 1.0}})))
    assert side_by_side.worst("a", lengths, "b", lengths, 5) is None  # lengths say nothing of which is better


def test_what_is_shown():
    """Messages with their roles, a lone one without; long answers in two parts, the rest counted; none is said to be none."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for prompt, text in ((turns, "user: hi\nassistant: yo"), (turns[:1], "hi"), (None, "q")):
        assert side_by_side.prompt_of(*items("m", {"q": {}}, prompt=prompt)) == text
    (good,) = items("a", {"q": {"s": 1.0}}, response="x" * 25_000)
    for response, start in {None: "(answer not kept)", "": "(empty)", "y" * 450: "y" * 450}.items():
        (bad,) = items("b", {"q": {"s": 0.0}}, response=response)
        (duel,) = side_by_side.worst("a", {"q": good}, "b", {"q": bad}, 5).duels
        assert duel.right.start == start and duel.right.rest == ""
    left = duel.left
    assert (len(left.start), len(left.rest), left.more) == (400, side_by_side.LONGEST - 400, 5_000)
