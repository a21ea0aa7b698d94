"""The page: whole HTML that fetches nothing, text that stays text whatever it holds, figures that say what they show."""

import re
import xml.etree.ElementTree as ET

import pytest

from rpo.reporting import figures, render, side_by_side
from rpo.reporting.collect import Group
from rpo.reporting.figures import Chart, Forest, Line
from rpo.reporting.run_verdicts import Verdict
from rpo.reporting.side_by_side import Answer, Comparison, Duel
from rpo.reporting.tables import Cell, Table
from rpo.text import clean, decimals, fixed, number, typeset
from tests.helpers.left_behind import items
from tests.helpers.page_reader import NASTY, Reader


def chart(label="DPO", level=None):
    points = [(0, 2.5, None), (50, 3.5, 0.2), (100, -1.0, 0.4)]
    lines = [Line(label, 0, points), Line(label, 0, points, faint=True)]
    return Chart(label, label, label, lines, level=level)


def page(text, table=None, comparisons=None):
    """A page of all there can be with `text` wherever text goes."""
    rows = [[Cell(text, style=1)], [Cell(text), Cell(text, text, "bad")]]
    table = table or Table(text, [text, text], rows, frozenset({1}), text, 1)
    duel = Duel(text, Answer(text, text, text, text, 5), Answer(text, text, text, "", 0))
    return dict(
        title=text,
        facts=[text],
        headline=text,
        asides=[text],
        arms=table,
        figure=Forest(text, text, [(text, 1.0, -1.0, 2.0)]),
        groups=[Group(text, text, 0, [], Verdict("overoptimised", text, [text]))],
        over_seeds=[text],
        charts=[chart(text, (2.5, text))],
        runs=table,
        states=text,
        evaluations=[{"title": text, "lines": [text], "table": table}],
        comparisons=[Comparison(text, [duel, duel])] if comparisons is None else comparisons,
        notes=[text],
        sources=table,
        commands=[text],
    )


def test_a_page_is_whole_and_alone():
    """Every tag closes; nothing is fetched or run, and the page says so itself; ids are unique and all that is referred to is there."""
    html = render.html(page("words"))
    read = Reader(html)
    assert read.tags("html") == [{"lang": "en"}] and html.startswith("<!DOCTYPE html>")
    policy = next(meta["content"] for meta in read.tags("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy
    assert not re.search(r"https?://|//[a-z]", html.replace("</", ""))
    assert {th["scope"] for th in read.tags("th")} == {"col", "row", "colgroup"}
    assert all(drawn.get("aria-hidden") == "true" or drawn["aria-label"] for drawn in read.tags("svg"))
    assert "@media print" in html and "prefers-color-scheme:dark" in html and 'name="viewport"' in html
    ids = [attrs["id"] for _, attrs in read.seen if "id" in attrs]
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="|url\()#([^")]+)', html)) == set(ids)
    assert not re.search(r"#(0072b2|000000|d55e00)", re.sub(r"(?s)<style>.*</style>", "", html))  # the page's colours
    for tone in ("bad", "doubt", "good", "unknown", "news"):  # not by colour alone
        assert tone in render._MARKS
    assert len(set(render._MARKS.values())) == 5


def test_text_stays_text():
    """Tags, quotes, entities and a template's marks in any text come back as that text; what no text may hold is shown as a sign."""
    html = render.html(page(NASTY))
    read = Reader(html)
    shown = clean(NASTY)
    assert read.text.count(shown) >= 25
    assert "\u2400" in shown and "\u241b" in shown and shown.count("\ufffd") == 3
    html.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)


def test_secrets_are_left_out(monkeypatch):
    """What redact knows as a secret is nowhere on the page, in figures neither."""
    monkeypatch.setenv("SOME_API_KEY", "hunter2hunter2")
    html = render.html(page("c hunter2hunter2 https://me:secretword@host"))
    assert "hunter2" not in html and "secretword" not in html and "***" in html


def test_half_a_secret_is_left_out(monkeypatch):
    """An answer is rid of secrets before it is cut: no part of one stands at the end of an excerpt."""
    monkeypatch.setenv("SOME_API_KEY", "hunter2hunter2")
    for at in (side_by_side.EXCERPT, side_by_side.LONGEST):
        text = "x" * (at - 7) + "hunter2hunter2" + "y" * side_by_side.LONGEST
        good, bad = items("m", {"q": {"s": 1.0}, "r": {"s": 0.0}}, prompt=text, response=text)
        compared = side_by_side.worst("a", {"q": good}, "b", {"q": bad}, 1)
        assert "hunter" not in render.html(page("", comparisons=[compared]))


def test_numbers_stand_to_the_right_and_line_up():
    """Columns named as numbers are aligned right; decimals follow the middle or smallest error; minus signs are true ones."""
    rows = [[Cell("all")], [Cell("1"), Cell("0.5", "\u00b1 0.1"), Cell("finished")]]
    read = Reader(render.html(page("", Table("c", ["run", "gold", "state"], rows, frozenset({1})))))
    assert [td.get("class") for td in read.tags("td")][-2:] == ["n", None]
    assert decimals([None, 0.5, 0.012, 3.0]) == 2 and decimals([0.012, 3.0], of_smallest=True) == 3
    assert decimals([None, 0]) is None
    assert (fixed(-1.234, 2), fixed(12345.6, None), number(-1e-7)) == ("\u22121.23", "1.235e+04", "\u22121.00e\u221207")
    assert typeset("a +- b -1 (-2)") == "a \u00b1 b \u22121 (\u22122)"


@pytest.mark.parametrize(
    "points", [[(0, 1.0, None)], [(0, 0.0, None), (1, 0.0, None)], [(5, 1e9, 1e8), (6, -1e9, None)]]
)
def test_charts_of_little(points):
    """One point, a flat line and huge numbers are drawn, without a number that is none."""
    drawn = figures.svg(Chart("t", "u", "x", [Line("a", 9, points)]))
    assert "nan" not in drawn and "inf" not in drawn
    ET.fromstring(drawn)


def places(drawn, color):
    """The corners of the thick line of a colour."""
    paths = [
        p.get("d")
        for p in ET.fromstring(drawn).iter("path")
        if f"stroke: {color}; stroke-width: 1.8" in p.get("style", "")
    ]
    return [tuple(map(float, at)) for at in re.findall(r"([\d.]+) ([\d.]+)", max(paths, key=len))]


def test_a_line_is_where_its_numbers_are():
    """Points are an affine map of the numbers, larger values higher."""
    (x0, y0), (x1, y1), (x2, y2) = places(figures.svg(chart()), "var(--c0)")[:3]
    assert (x1 - x0) == pytest.approx(x2 - x1, abs=0.2) and y1 < y0 < y2
    assert (y2 - y1) / (y0 - y1) == pytest.approx((3.5 + 1.0) / (3.5 - 2.5), rel=0.02)


def test_charts_speak():
    """A chart's words name its lines with where they begin and end, a forest's every interval; styles differ in more than colour."""
    assert figures.describe(chart()) == "DPO (DPO) against DPO. DPO from 2.5 to \u22121"
    forest = Forest("accuracy", "difference", [("a - b", 0.5, -0.25, 1.25)])
    assert figures.describe(forest) == "accuracy (difference). a - b: 0.5 [\u22120.25, 1.25]"
    swatches = [re.sub(r"var\(.*?\)", "", figures.swatch(style)) for style in range(16)]
    assert len(set(swatches[:8])) == 8 and len({figures.swatch(style) for style in range(16)}) == 16
