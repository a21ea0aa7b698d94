"""A page of prose, tables, charts and answers side by side, as one HTML file or as Markdown. Pure functions, no data logic.

A page is a title, facts beneath it and a list of blocks (the classes below). The HTML holds all it needs: no script, no
link, no request. Text comes from models, files and people, so that every piece of it is escaped here, in one place, with
secrets and control characters taken out; no block takes markup.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rpo.reporting import svg
from rpo.reporting.svg import COLORS, Chart, Forest, text_of, visible
from rpo.text import redacted

EXCERPT = 700  # characters of an answer that are shown at once
LONGEST = 20_000  # and at all


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Prose:
    text: str


@dataclass(frozen=True)
class Points:
    """A list; one item per entry."""

    items: Sequence[str]


@dataclass(frozen=True)
class Verdict:
    """`kind` in a word or two, `tone` bad | doubt | good | unknown | news, on `subject`; `style`: its line in the figures."""

    subject: str
    kind: str
    tone: str
    says: str
    notes: Sequence[str] = ()
    style: int | None = None


@dataclass(frozen=True)
class Section:
    """A row of a table that names those below it."""

    text: str
    style: int | None = None


@dataclass(frozen=True)
class Table:
    """The first cell of a row is its header. `note`: a line below."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str] | Section]
    note: str | None = None


@dataclass(frozen=True)
class Figure:
    """Charts beside one another and below them what they show and which line is whose."""

    name: str
    caption: str
    charts: Sequence[Chart | Forest]


@dataclass(frozen=True)
class Fold:
    """Blocks that show when their summary is opened, and in print."""

    summary: str
    blocks: Sequence["Block"]


@dataclass(frozen=True)
class Duel:
    """Two answers to one prompt; each side is (whose, its score, the answer)."""

    title: str
    prompt: str
    left: tuple[str, str, str]
    right: tuple[str, str, str]


@dataclass(frozen=True)
class Code:
    text: str


Block = Heading | Prose | Points | Verdict | Table | Figure | Fold | Duel | Code


@dataclass(frozen=True)
class Page:
    title: str
    facts: Sequence[str]
    blocks: Sequence[Block]


# ---- HTML


_DARK = ("#5AA9E6", "#F08A4B", "#3CC79A", "#E39BC3", "#E0B040", "#7CC4F5", "#D8D8D2", "#C2A36B")


def _variables(names: dict[str, str], colors: Sequence[str]) -> str:
    return "".join(f"--{k}:{v};" for k, v in (names | {f"c{i}": c for i, c in enumerate(colors)}).items())


_LIGHT_TONES = {"ink": "#1c1c1a", "quiet": "#5f5f58", "rule": "#d9d8d2", "paper": "#fdfdfb", "wash": "#f4f3ee"}
_LIGHT_TONES |= {"bad": "#a83210", "doubt": "#8a6100", "good": "#00684c", "unknown": "#5f5f58", "news": "#00588a"}
_DARK_TONES = {"ink": "#e8e6df", "quiet": "#a9a79d", "rule": "#3c3b37", "paper": "#191917", "wash": "#232320"}
_DARK_TONES |= {"bad": "#f5916b", "doubt": "#e2b64f", "good": "#58cfa4", "unknown": "#a9a79d", "news": "#6db8ee"}

_CSS = f"""
:root{{color-scheme:light dark;{_variables(_LIGHT_TONES, COLORS)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(_DARK_TONES, _DARK)}}}}}
""" + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:17px/1.55 Charter,"Bitstream Charter","Sitka Text",Cambria,Georgia,serif;
  -webkit-text-size-adjust:100%}
main{max-width:66rem;margin:0 auto;padding:3.2rem 1.5rem 5rem}
h1{font-size:2rem;line-height:1.2;font-weight:600;margin:0 0 .6rem;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.35rem;font-weight:600;margin:3.2rem 0 .8rem;padding-top:.9rem;border-top:1px solid var(--rule)}
h3{font-size:1.08rem;font-weight:600;margin:2rem 0 .5rem;overflow-wrap:anywhere}
p,ul{max-width:46rem;margin:.7rem 0;overflow-wrap:anywhere}
ul{padding-left:1.2rem}
li{margin:.25rem 0}
.facts{color:var(--quiet);font-size:.88rem;margin:0 0 2rem}
.facts p{margin:.1rem 0;max-width:none}
.verdict{border-left:4px solid var(--tone);padding:.15rem 0 .15rem 1rem;margin:1.3rem 0;max-width:48rem;break-inside:avoid}
.verdict h3{margin:0 0 .2rem}
.verdict p{margin:.2rem 0}
.kind{font:600 .78rem/1.4 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;letter-spacing:.03em;color:var(--tone);
  text-transform:uppercase}
.quiet,figcaption,caption,.note{color:var(--quiet);font-size:.88rem}
.scroll{overflow-x:auto;margin:1.1rem 0}
table{border-collapse:collapse;font:.84rem/1.4 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;
  font-variant-numeric:tabular-nums;min-width:min(100%,22rem);border-bottom:1.5px solid var(--ink)}
caption{text-align:left;padding:0 0 .5rem;caption-side:top;font-family:inherit}
thead th{border-top:1.5px solid var(--ink);border-bottom:1px solid var(--ink);vertical-align:bottom;font-weight:600}
th,td{padding:.3rem .7rem;text-align:left;vertical-align:top}
th:first-child,td:first-child{padding-left:.2rem}
tbody th{font-weight:400;min-width:min(8rem,26vw);overflow-wrap:anywhere;position:sticky;left:0;background:var(--paper)}
.n{text-align:right}td.n{white-space:nowrap}
.section th{font-weight:600;border-top:1px solid var(--rule);padding-top:.6rem}
tbody tr:hover>*{background:var(--wash)}
.note{margin:.4rem 0 0;max-width:46rem}
figure{margin:1.4rem 0 2rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(19.5rem,100%),1fr));gap:1.2rem 1rem}
.charts.wide{display:block;overflow-x:auto}
.chart{width:100%;max-width:29rem;height:auto;display:block}
.wide .chart{max-width:none;min-width:34rem}
.legend{display:flex;flex-wrap:wrap;gap:.15rem 1.3rem;list-style:none;padding:0;max-width:none;
  font:.82rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
.legend li{display:flex;align-items:center;gap:.45rem;margin:0}
.swatch{flex:none;vertical-align:middle}
figcaption{max-width:46rem;margin-top:.6rem}
details{margin:.9rem 0;max-width:100%}
summary{cursor:pointer;font-size:.92rem;color:var(--quiet)}
summary:hover{color:var(--ink)}
.duel{margin:1.6rem 0 2rem;break-inside:avoid}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:1rem;margin-top:.5rem}
.side{background:var(--wash);padding:.7rem .9rem;min-width:0;border-top:2px solid var(--rule)}
.side h4{margin:0 0 .4rem;font:600 .82rem/1.4 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;overflow-wrap:anywhere}
.side h4 span{font-weight:400;color:var(--quiet)}
.said{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font-size:.92rem;line-height:1.5;max-width:none}
.prompt{border-left:2px solid var(--rule);padding-left:.9rem;color:var(--quiet)}
pre{font:.8rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--wash);padding:.7rem .9rem;
  white-space:pre-wrap;overflow-wrap:anywhere;margin:.6rem 0}
@media (max-width:40rem){body{font-size:16px}main{padding:1.6rem 1rem 3rem}.sides{grid-template-columns:1fr}h1{font-size:1.6rem}
  th,td{padding:.3rem .5rem}}
@media print{@page{margin:16mm 14mm}:root{color-scheme:light;VARIABLES}body{font-size:10pt;background:none}
  main{padding:0;max-width:none}h2,h3,summary{break-after:avoid}tr,.side,.chart{break-inside:avoid}thead{display:table-header-group}
  .scroll{overflow:visible}table{font-size:7.5pt}th,td{padding:.2rem .35rem}td.n{white-space:normal}
  tbody th{position:static;background:none;min-width:3.5rem}.wide .chart{min-width:0}
  .charts{grid-template-columns:1fr 1fr}details::details-content{content-visibility:visible;display:block;height:auto}}
""".replace("VARIABLES", _variables(_LIGHT_TONES, COLORS))

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # a browser then runs and fetches nothing


def html(page: Page) -> str:
    """The whole file."""
    facts = "".join(f"<p>{text_of(fact)}</p>" for fact in page.facts)
    body = "\n".join(_html(block) for block in page.blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{text_of(page.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{text_of(page.title)}</h1><div class="facts">{facts}</div></header>\n{body}\n</main>\n</body>\n</html>\n'
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{text_of(block.text)}</h{block.level}>"
        case Prose():
            return f"<p>{text_of(block.text)}</p>"
        case Points():
            return f"<ul>{''.join(f'<li>{text_of(item)}</li>' for item in block.items)}</ul>"
        case Verdict():
            return _verdict_html(block)
        case Table():
            return _table_html(block)
        case Figure():
            return _figure_html(block)
        case Fold():
            inside = "\n".join(map(_html, block.blocks))
            return f"<details><summary>{text_of(block.summary)}</summary>\n{inside}\n</details>"
        case Duel():
            sides = "".join(
                f'<div class="side"><h4>{text_of(whose)} <span>{text_of(score)}</span></h4>{_said_html(answer)}</div>'
                for whose, score, answer in (block.left, block.right)
            )
            prompt = _said_html(block.prompt, "said prompt")
            return f'<section class="duel"><h3>{text_of(block.title)}</h3>{prompt}<div class="sides">{sides}</div></section>'
        case Code():
            return f"<pre>{text_of(block.text)}</pre>"
    raise AssertionError(block)


def _said_html(text: str, kind: str = "said") -> str:
    """What a model or a user said; dir=auto keeps its direction, and tricks with it, inside."""
    text = redacted(text)  # before it is cut: half a secret is not found
    shown, rest = _excerpt(text)
    if not shown.strip():
        return f'<p class="{kind}"><i>(empty)</i></p>'
    said = f'<p class="{kind}" dir="auto">{text_of(shown)}</p>'
    if not rest:
        return said
    whole, left_out = text[:LONGEST], len(text) - LONGEST
    more = f'<p class="note">{left_out:,} more characters are in samples.jsonl</p>' if left_out > 0 else ""
    said = f'<p class="{kind}" dir="auto">{text_of(shown)} \u2026</p>'
    whole = f'<p class="{kind}" dir="auto">{text_of(whole)}</p>'
    return f"{said}<details><summary>whole text, {len(text):,} characters</summary>{whole}{more}</details>"


def _excerpt(text: str) -> tuple[str, bool]:
    """What is shown at once, and whether there is more."""
    return (text, False) if len(text) <= EXCERPT * 1.2 else (text[:EXCERPT], True)


def _verdict_html(block: Verdict) -> str:
    drawn = "" if block.style is None else svg.swatch(block.style) + " "
    notes = "".join(f'<p class="quiet">{text_of(note)}</p>' for note in block.notes)
    return (
        f'<article class="verdict" style="--tone:var(--{block.tone})"><h3>{drawn}{text_of(block.subject)}</h3>'
        f'<p class="kind">{text_of(block.kind)}</p><p>{text_of(block.says)}</p>{notes}</article>'
    )


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"[-\u2212+]?\d.*|\[.*\]|-|", cell))


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers, and stand to the right."""
    rows = [row for row in table.rows if not isinstance(row, Section)]
    return [i > 0 and bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(table.head))]


def _table_html(table: Table) -> str:
    kinds = [' class="n"' if right else "" for right in _numeric(table)]
    head = "".join(
        f'<th scope="col"{kind}>{text_of(cell).replace("/", "/<wbr>")}</th>'
        for kind, cell in zip(kinds, table.head, strict=True)
    )
    lines = []
    for row in table.rows:
        if isinstance(row, Section):
            drawn = "" if row.style is None else svg.swatch(row.style) + " "
            span = f'colspan="{len(table.head)}" scope="colgroup"'
            lines.append(f'<tr class="section"><th {span}>{drawn}{text_of(row.text)}</th></tr>')
            continue
        first, *rest = row
        cells = "".join(f"<td{kind}>{text_of(cell)}</td>" for kind, cell in zip(kinds[1:], rest, strict=True))
        lines.append(f'<tr><th scope="row">{text_of(first)}</th>{cells}</tr>')
    note = f'<p class="note">{text_of(table.note)}</p>' if table.note else ""
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"
    where = f'class="scroll" role="region" tabindex="0" aria-label="{text_of(table.caption)}"'
    return f"<div {where}><table><caption>{text_of(table.caption)}</caption>{body}</table></div>{note}"


def _legend(figure: Figure) -> dict[str, int]:
    """Line -> style of all charts, in the order of styles."""
    lines = [line for chart in figure.charts if isinstance(chart, Chart) for line in chart.lines if not line.faint]
    return dict(sorted({line.label: line.style for line in lines}.items(), key=lambda item: item[1]))


def _figure_html(figure: Figure) -> str:
    wide = " wide" if any(isinstance(chart, Forest) for chart in figure.charts) else ""
    charts = "\n".join(map(svg.draw, figure.charts))
    entries = "".join(f"<li>{svg.swatch(style)}{text_of(label)}</li>" for label, style in _legend(figure).items())
    legend = f'<ul class="legend">{entries}</ul>' if entries else ""
    return (
        f'<figure><div class="charts{wide}">\n{charts}\n</div>{legend}'
        f"<figcaption>{text_of(figure.caption)}</figcaption></figure>"
    )


# ---- Markdown


def markdown(page: Page, folder: str) -> tuple[str, dict[str, str]]:
    """(the text, {file name: SVG} of the charts that it shows from `folder`)."""
    files: dict[str, str] = {}
    parts = [f"# {_escaped(page.title)}", "  \n".join(map(_escaped, page.facts))]
    parts += [_markdown(block, folder, files) for block in page.blocks]
    return "\n\n".join(part for part in parts if part) + "\n", files


def _escaped(value: object) -> str:
    """Text on one line that Markdown and the HTML in it leave alone."""
    text = " ".join(visible(redacted(str(value))).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word it is one of its letters
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)  # not a list, a heading or a rule
    return re.sub(r"^(?![+-]?\d)([#+=-])", r"\\\1", text)


def _fenced(text: str) -> str:
    """Text as it is, between fences longer than any in it."""
    text = visible(redacted(text))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _said_markdown(text: str) -> str:
    text = redacted(text)
    shown, rest = _excerpt(text)
    return _fenced(shown + (f"\n... {len(text) - len(shown):,} more characters" if rest else "")) if text else "(empty)"


def _markdown(block: Block, folder: str, files: dict[str, str]) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_escaped(block.text)}"
        case Prose():
            return _escaped(block.text)
        case Points():
            return "\n".join(f"- {_escaped(item)}" for item in block.items)
        case Verdict():
            notes = "".join(f"\n  - {_escaped(note)}" for note in block.notes)
            return f"- **{_escaped(block.subject)}: {_escaped(block.kind)}.** {_escaped(block.says)}{notes}"
        case Table():
            return _table_markdown(block)
        case Figure():
            shown = []
            for i, chart in enumerate(block.charts):
                name = f"{block.name}_{i + 1}.svg"
                files[name] = svg.draw(chart, standalone=True)
                shown.append(f"![{_escaped(svg.describe(chart))}]({folder}/{name})")
            return "\n".join(shown) + f"\n\n*{_escaped(block.caption)}*"
        case Fold():
            inside = [_markdown(inner, folder, files) for inner in block.blocks]
            return "\n\n".join([f"<details><summary>{_escaped(block.summary)}</summary>", *inside, "</details>"])
        case Duel():
            parts = [f"**{_escaped(block.title)}**", _said_markdown(block.prompt)]
            for whose, score, answer in (block.left, block.right):
                parts += [f"{_escaped(whose)} ({_escaped(score)}):", _said_markdown(answer)]
            return "\n\n".join(parts)
        case Code():
            return _fenced(block.text)
    raise AssertionError(block)


def _table_markdown(table: Table) -> str:
    rule = ["---:" if right else "---" for right in _numeric(table)]
    lines = [f"| {' | '.join(map(_escaped, table.head))} |", f"| {' | '.join(rule)} |"]
    for row in table.rows:
        cells = (
            [f"**{_escaped(row.text)}**", *[""] * (len(rule) - 1)] if isinstance(row, Section) else map(_escaped, row)
        )
        lines.append(f"| {' | '.join(cells)} |")
    note = f"\n\n{_escaped(table.note)}" if table.note else ""
    return f"{_escaped(table.caption)}\n\n" + "\n".join(lines) + note
