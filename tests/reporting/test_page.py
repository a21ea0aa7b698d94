"""Pages and charts: whole HTML that fetches nothing, text that stays text whatever it holds, charts that say what they show."""

import re
import xml.etree.ElementTree as ET

import pytest

from rpo.reporting import page, svg
from rpo.reporting.page import Code, Duel, Figure, Fold, Heading, Page, Points, Prose, Section, Table, Verdict
from rpo.reporting.svg import Chart, Forest, Line
from tests.helpers.page_reader import NASTY, Reader


def chart(title="Gold", label="DPO", style=0):
    points = [(0, 2.5, None), (50, 3.5, 0.2), (100, -1.0, 0.4)]
    return Chart(
        title, "", "step", [Line(label, style, points), Line(label, style, points, faint=True)], level=(2.5, label)
    )


def every_block(text):
    """One of each block with `text` wherever text goes."""
    duel = Duel(text, text, (text, text, text), (text, text, ""))
    table = Table(text, [text, text], [Section(text, 1), [text, text], [text, "0.5 \u00b1 0.1"]], text)
    forest = Forest(text, text, [(text, 1.0, -1.0, 2.0, text)])
    blocks = [
        Heading(text),
        Prose(text),
        Points([text, text]),
        Verdict(text, text, "bad", text, [text], 3),
        table,
        duel,
    ]
    return [*blocks, Figure("f", text, [chart(text, text), forest]), Code(text), Fold(text, [Prose(text), duel])]


# ---- HTML


def test_a_page_is_whole_and_alone():
    """Every tag closes; nothing is fetched or run, and the page says so itself; the blocks stand in order, headers are headers."""
    made = page.html(Page("Title", ["a fact"], every_block("words")))
    read = Reader(made)
    assert read.tags("html") == [{"lang": "en"}] and read.text.startswith("\n")
    policy = next(meta["content"] for meta in read.tags("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy
    assert not re.search(r"https?://|//[a-z]", made.replace("</", ""))
    assert {th["scope"] for th in read.tags("th")} == {"col", "row", "colgroup"}
    assert all(drawn.get("aria-hidden") == "true" or drawn["aria-label"] for drawn in read.tags("svg"))
    assert "@media print" in made and "prefers-color-scheme:dark" in made and 'name="viewport"' in made
    order = [tag for tag, _ in read.seen if tag in ("h2", "article", "table", "figure", "pre", "details")]
    assert order == ["h2", "article", "table", "figure", "pre", "details"]


def test_text_stays_text():
    """Tags, quotes and entities in any text come back as that text; what no text may hold is shown as a sign."""
    made = page.html(Page(NASTY, [NASTY], every_block(NASTY)))
    read = Reader(made)
    shown = svg.visible(NASTY)
    assert read.text.count(shown) >= 25
    assert "\u2400" in shown and "\u241b" in shown and shown.count("\ufffd") == 3
    made.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", made)


def test_answers_that_are_long_are_folded():
    """Past the excerpt an answer is in a fold, past the longest its rest is only counted; an empty one is called empty."""
    read = Reader(page.html(Page("", [], [Duel("t", "p", ("a", "1", "x" * 25_000), ("b", "0", ""))])))
    assert read.text.count("x" * page.LONGEST) == 1 and "5,000 more characters" in read.text
    assert "whole text, 25,000 characters" in read.text and "(empty)" in read.text
    assert (
        "whole text" not in Reader(page.html(Page("", [], [Duel("t", "p", ("a", "", "x" * 700), ("", "", "y"))]))).text
    )


def test_numbers_stand_to_the_right():
    """A column of numbers, dashes and blanks is aligned right; one with a word in it is not; the first column names rows."""
    rows = [Section("all"), ["1", "0.5 \u00b1 0.1", "finished"], ["2", "-", "3"], ["3", "\u22121", "failed"]]
    read = Reader(page.html(Page("", [], [Table("c", ["run", "gold", "state"], rows)])))
    assert [td.get("class") for td in read.tags("td")] == ["n", None] * 3


def test_secrets_are_left_out(monkeypatch):
    """What redact knows as a secret is in neither form of the page."""
    monkeypatch.setenv("SOME_API_KEY", "hunter2hunter2")
    made = Page("a hunter2hunter2", ["b hunter2hunter2"], every_block("c hunter2hunter2 https://me:secretword@host"))
    text, files = page.markdown(made, "figures")
    for written in (page.html(made), text, *files.values()):
        assert "hunter2" not in written and "secretword" not in written and "***" in written


def test_half_a_secret_is_left_out(monkeypatch):
    """An answer is rid of secrets before it is cut: no part of one stands at the end of an excerpt."""
    monkeypatch.setenv("SOME_API_KEY", "hunter2hunter2")
    for at in (page.EXCERPT, page.LONGEST):
        text = "x" * (at - 7) + "hunter2hunter2" + "y" * page.LONGEST
        made = Page("", [], [Duel("", text, ("", "", text), ("", "", ""))])
        assert "hunter" not in page.html(made) + page.markdown(made, "")[0]


# ---- Markdown


def test_markdown_has_the_same_text():
    """Headings, tables and lists of Markdown; charts are files that it names; a fence is longer than any in the text."""
    text, files = page.markdown(Page("Title", ["fact"], [*every_block("words"), Code("```\nx\n````")]), "figures")
    assert text.startswith("# Title\n\nfact\n") and "\n## words\n" in text
    assert "| words | words |\n| --- | --- |\n| **words** |  |" in text
    assert set(files) == {"f_1.svg", "f_2.svg"} and all(f"](figures/{name})" in text for name in files)
    assert "`````text\n```\nx\n````\n`````" in text
    for drawn in files.values():
        assert ET.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"


def test_markdown_runs_no_html():
    """Outside of fences nothing of a text is markup: no tag, no link, no code, no row of a table; lines stay lines."""
    text, _ = page.markdown(Page(NASTY, [NASTY], every_block(NASTY + "\n# more\n| a |")), "figures")
    outside = re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", text)
    assert set(re.findall(r"<[^>]*>?", outside)) == {"<details>", "<summary>", "</summary>", "</details>"}
    assert not re.search(r"(?<!\\)[`*]\[a|(?<!\\)\]\(javascript", outside)
    assert not re.search(r"^# more", outside, re.M) and not re.search(r"^\| a \|", outside, re.M)
    text.encode("utf-8")


@pytest.mark.parametrize("text", ["# x", "- x", "+ x", "1. x", "2) x", "---", "===", "> x"])
def test_no_line_becomes_a_list_or_a_heading(text):
    """What would begin a block of Markdown is escaped; a number is left as it is."""
    made, _ = page.markdown(Page("t", [], [Prose(text), Prose("0.02"), Prose("-1.5"), Prose("rewards_x")]), "")
    line = made.split("\n\n")[1]
    assert "\\" in line or line.startswith("&gt;")
    assert made.endswith("0.02\n\n-1.5\n\nrewards_x\n")


# ---- charts


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1.37, 4.2), (0.0001, 0.00012), (-5e6, 3e6), (0.58, 0.62)])
def test_ticks_are_round_and_inside(low, high):
    """Between 2 and 6 of them, evenly spaced by 1, 2, 2.5 or 5 times a power of ten."""
    found = svg.ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= found[0] + 1e-9 and found[-1] <= high + 1e-9 * abs(high)
    step = found[1] - found[0]
    assert found == pytest.approx([found[0] + i * step for i in range(len(found))])
    assert float(f"{step:.3e}"[:5]) in (1, 2, 2.5, 5)


def places(drawn):
    """The corners of the first thick line."""
    path = next(p.get("d") for p in ET.fromstring(drawn).iter() if "stroke-width:1.9" in p.get("style", ""))
    return [tuple(map(float, pair.split(","))) for pair in path[1:].split("L")]


def test_a_line_is_where_its_numbers_are():
    """Points are an affine map of the numbers, larger values higher, all inside the frame, with error bars inside too."""
    (x0, y0), (x1, y1), (x2, y2) = places(svg.draw(chart()))
    assert (x1 - x0) == pytest.approx(x2 - x1, abs=0.2) and y1 < y0 < y2
    assert (y2 - y1) / (y0 - y1) == pytest.approx((3.5 + 1.0) / (3.5 - 2.5), rel=0.02)
    assert 0 < x0 and x2 < svg._WIDTH and 0 < y1 and y2 < svg._HEIGHT


@pytest.mark.parametrize(
    "points", [[(0, 1.0, None)], [(0, 0.0, None), (1, 0.0, None)], [(5, 1e9, 1e8), (6, -1e9, None)]]
)
def test_charts_of_little(points):
    """One point, a flat line and huge numbers are drawn, without a number that is none."""
    drawn = svg.draw(Chart("t", "u", "x", [Line("a", 9, points)]), standalone=True)
    assert "nan" not in drawn and "inf" not in drawn
    ET.fromstring(drawn)


def test_charts_speak():
    """A chart's words name its lines with where they begin and end, a forest's every interval; styles differ in more than colour."""
    assert svg.describe(chart()) == "Gold against step. DPO from 2.5 to \u22121"
    forest = Forest("accuracy", "difference", [("a - b", 0.5, -0.25, 1.25, "")])
    assert svg.describe(forest) == "accuracy, difference. a - b: 0.5 [\u22120.25, 1.25]"
    swatches = [re.sub(r"var\(.*?\)", "", svg.swatch(style)) for style in range(16)]
    assert len(set(swatches[:6])) == 6 and len({svg.swatch(style) for style in range(16)}) == 16
