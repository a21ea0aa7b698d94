"""Small charts as SVG text: lines with error bars, and intervals in rows. Pure functions, no library, no script.

Colours are CSS variables with a value to fall back on, so that a page may set others (in the dark) and a chart that stands
alone in a file has its own. All text is escaped.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rpo.text import redacted

# Told apart with any colour vision (Okabe and Ito), dark enough for a thin line on white; a line style and a marker too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B07D00", "#3A9BDC", "#333333", "#8C6D31")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_INK, _QUIET, _RULE = "var(--ink,#1c1c1a)", "var(--quiet,#5f5f58)", "var(--rule,#d9d8d2)"
_FONT = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 380, 260, 50, 12, 30, 40
_ROW = 26  # of a forest


@dataclass(frozen=True)
class Line:
    """`points`: (x, y, half length of the error bar or None) in the order of x; `style` is its number in every figure.

    A faint line has no markers, no bars and no entry in the legend: one seed of several.
    """

    label: str
    style: int
    points: Sequence[tuple[float, float, float | None]]
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """`ticks`: positions on the x axis with their words, where x is no number; `level`: a dotted line and its name."""

    title: str
    unit: str
    x: str
    lines: Sequence[Line]
    ticks: Sequence[tuple[float, str]] | None = None
    level: tuple[float, str] | None = None


@dataclass(frozen=True)
class Forest:
    """A row per interval: (name, value, low, high, what is written beside it), about the dotted `zero`."""

    title: str
    x: str
    rows: Sequence[tuple[str, float, float, float, str]]
    zero: float = 0.0


def text_of(value: object) -> str:
    """Escaped for HTML and SVG, secrets and what no text may hold taken out: see `visible`."""
    return html.escape(visible(redacted(str(value))), quote=True)


def visible(text: str) -> str:
    """Control characters as their pictures, lone surrogates and what Unicode has no character for as U+FFFD."""

    def shown(char: str) -> str:
        code = ord(char)
        if char in "\n\t" or 0x20 <= code < 0x7F:
            return char
        if code < 0x20 or code == 0x7F:
            return chr(0x2400 + code) if code < 0x20 else "\u2421"
        unsafe = code < 0xA0 or 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE
        return "\ufffd" if unsafe else char

    return "".join(map(shown, text.replace("\r\n", "\n")))


def number(x: float) -> str:
    """At most four significant digits, no exponent where it can be helped, a true minus sign."""
    if x and (abs(x) >= 1e5 or abs(x) < 1e-4):
        shown = f"{x:.2e}"
    else:
        shown = f"{x:.4g}"
    return shown.replace("-", "\u2212") if shown.startswith("-") else shown


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 x 10^k) within [low, high], `most` of them or fewer."""
    assert low < high, (low, high)
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * part for part in (1, 2, 2.5, 5, 10) if power * part >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def _span(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - room, high + room


def color(style: int) -> str:
    return f"var(--c{style % len(COLORS)},{COLORS[style % len(COLORS)]})"


def _marker(style: int, x: float, y: float, r: float = 3.4) -> str:
    """A shape whose area is about the same for all styles."""
    match (style + style // len(COLORS)) % 6:
        case 0:
            path = f"M{x - r:.1f},{y:.1f}a{r},{r} 0 1,0 {2 * r},0a{r},{r} 0 1,0 {-2 * r},0"
        case 1:
            path = f"M{x - r:.1f},{y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z"
        case 2:
            path = f"M{x:.1f},{y - 1.3 * r:.1f}l{1.3 * r:.1f},{2.3 * r:.1f}h{-2.6 * r:.1f}z"
        case 3:
            path = f"M{x:.1f},{y - 1.4 * r:.1f}l{1.4 * r:.1f},{1.4 * r:.1f}l{-1.4 * r:.1f},{1.4 * r:.1f}l{-1.4 * r:.1f},{-1.4 * r:.1f}z"
        case 4:
            path = f"M{x:.1f},{y + 1.3 * r:.1f}l{1.3 * r:.1f},{-2.3 * r:.1f}h{-2.6 * r:.1f}z"
        case _:
            path = f"M{x - r:.1f},{y - r:.1f}l{2 * r},{2 * r}m0,{-2 * r}l{-2 * r},{2 * r}"
    return f'<path d="{path}" style="fill:{color(style)};stroke:{color(style)};stroke-width:1.2"/>'


def _dash(style: int) -> str:
    dash = _DASHES[style // len(COLORS) % len(_DASHES)]
    return f";stroke-dasharray:{dash}" if dash else ""


def swatch(style: int) -> str:
    """A short piece of the line, for a legend; decoration beside its name."""
    line = f"stroke:{color(style)};stroke-width:2{_dash(style)}"
    drawn = f'<path d="M0,6H26" style="{line}"/>{_marker(style, 13, 6)}'
    return f'<svg class="swatch" width="26" height="12" viewBox="0 0 26 12" aria-hidden="true">{drawn}</svg>'


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 11, more: str = "") -> str:
    style = f"{_FONT};font-size:{size}px;fill:{_QUIET};{more}"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{text_of(words)}</text>'


def _frame(width: float, height: float, alt: str, drawn: Sequence[str], standalone: bool) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}"'
    if standalone:  # a viewer of its own may be dark: the paper comes along
        size += f' xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}"'
        drawn = [f'<rect width="{width:g}" height="{height:g}" style="fill:#ffffff"/>', *drawn]
    return f'<svg class="chart" {size} role="img" aria-label="{text_of(alt)}">{"".join(drawn)}</svg>'


def describe(drawing: Chart | Forest) -> str:
    """What a chart shows, in words, for those who can not see it."""
    if isinstance(drawing, Forest):
        rows = "; ".join(
            f"{name}: {number(v)} [{number(low)}, {number(high)}]" for name, v, low, high, _ in drawing.rows
        )
        return f"{drawing.title}, {drawing.x}. {rows}"
    ends = [
        f"{line.label} from {number(line.points[0][1])} to {number(line.points[-1][1])}"
        for line in drawing.lines
        if not line.faint
    ]
    unit = f" ({drawing.unit})" if drawing.unit else ""
    return f"{drawing.title}{unit} against {drawing.x}. {'; '.join(ends)}"


def draw(drawing: Chart | Forest, *, standalone: bool = False) -> str:
    """The SVG element; `standalone`: a whole file, with its legend and white paper."""
    return _forest(drawing, standalone) if isinstance(drawing, Forest) else _chart(drawing, standalone)


def _chart(chart: Chart, standalone: bool) -> str:
    points = [point for line in chart.lines for point in line.points]
    assert points and all(math.isfinite(v) for point in points for v in point if v is not None), chart.title
    level = [chart.level[0]] if chart.level else []
    y_low, y_high = _span([y + sign * (e or 0) for _, y, e in points for sign in (-1, 1)] + level)
    x_low, x_high = _span([x for x, *_ in points] + [x for x, _ in chart.ticks or ()], 0.04)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT)
        return across, bottom - (y - y_low) / (y_high - y_low) * (bottom - _TOP)

    drawn = [
        f'<text x="4" y="14" style="{_FONT};font-size:12.5px;fill:{_INK};font-weight:600">{text_of(chart.title)}'
        f'<tspan style="font-weight:400;font-size:11px;fill:{_QUIET}" dx="6">{text_of(chart.unit)}</tspan></text>'
    ]
    for y in ticks(y_low, y_high):
        _, down = at(x_low, y)
        drawn.append(f'<path d="M{_LEFT},{down:.1f}H{right}" style="stroke:{_RULE};stroke-width:.7"/>')
        drawn.append(_text(_LEFT - 6, down + 3.8, number(y), anchor="end"))
    for x, words in chart.ticks or [(x, number(x)) for x in ticks(x_low, x_high)]:
        across, _ = at(x, y_low)
        drawn.append(f'<path d="M{across:.1f},{bottom}v4" style="stroke:{_QUIET};stroke-width:.8"/>')
        drawn.append(_text(across, bottom + 16, words, anchor="middle"))
    drawn.append(f'<path d="M{_LEFT},{bottom}H{right}" style="stroke:{_QUIET};stroke-width:.8"/>')
    drawn.append(_text((_LEFT + right) / 2, bottom + 33, chart.x, anchor="middle"))
    if chart.level:
        _, down = at(x_low, chart.level[0])
        drawn.append(
            f'<path d="M{_LEFT},{down:.1f}H{right}" style="stroke:{_INK};stroke-width:1;stroke-dasharray:1.5 3"/>'
        )
        drawn.append(_text(right, down - 4, chart.level[1], anchor="end", size=10))
    for line in sorted(chart.lines, key=lambda line: not line.faint):  # faint ones below
        drawn += _curve(line, at)
    height = _HEIGHT
    if standalone:
        named = [line for line in chart.lines if not line.faint]
        for i, line in enumerate(named):
            y = _HEIGHT + 8 + 16 * i
            drawn.append(
                f'<path d="M{_LEFT},{y}h26" style="stroke:{color(line.style)};stroke-width:2{_dash(line.style)}"/>'
            )
            drawn += [_marker(line.style, _LEFT + 13, y), _text(_LEFT + 34, y + 4, line.label)]
        height += 16 * len(named) + 6
    return _frame(_WIDTH, height, describe(chart), drawn, standalone)


def _curve(line: Line, at) -> list[str]:
    where = [at(x, y) for x, y, _ in line.points]
    path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in where)
    how = "stroke-width:1;opacity:.35" if line.faint else "stroke-width:1.9"
    drawn = [f'<path d="{path}" style="fill:none;stroke:{color(line.style)};{how}{_dash(line.style)}"/>']
    if line.faint and len(where) > 1:
        return drawn
    for (x, y, error), (across, down) in zip(line.points, where, strict=True):
        said = f"{line.label}: {number(y)}" + (f" \u00b1 {number(error)}" if error else "") + f" at {number(x)}"
        marked = _marker(line.style, across, down, 2.2 if line.faint else 3.4)
        if error and not line.faint:
            (_, top), (_, low) = at(x, y + error), at(x, y - error)
            bar = f"M{across:.1f},{top:.1f}V{low:.1f}M{across - 3:.1f},{top:.1f}h6M{across - 3:.1f},{low:.1f}h6"
            marked += f'<path d="{bar}" style="fill:none;stroke:{color(line.style)};stroke-width:1"/>'
        drawn.append(f"<g><title>{text_of(said)}</title>{marked}</g>")
    return drawn


def _forest(forest: Forest, standalone: bool) -> str:
    left = 24 + min(280, max(6.6 * len(name) for name, *_ in forest.rows))
    width, right = 760, 590
    height = _TOP + _ROW * len(forest.rows) + _BOTTOM
    low, high = _span([v for _, *values, _ in forest.rows for v in values] + [forest.zero])
    bottom = height - _BOTTOM

    def at(x: float) -> float:
        return left + (x - low) / (high - low) * (right - left)

    bold = f"{_FONT};font-size:12.5px;fill:{_INK};font-weight:600"
    drawn = [f'<text x="4" y="14" style="{bold}">{text_of(forest.title)}</text>']
    for x in ticks(low, high):
        drawn.append(f'<path d="M{at(x):.1f},{_TOP - 4}V{bottom}" style="stroke:{_RULE};stroke-width:.7"/>')
        drawn.append(_text(at(x), bottom + 15, number(x), anchor="middle"))
    drawn.append(_text((left + right) / 2, bottom + 32, forest.x, anchor="middle"))
    zero = f"stroke:{_INK};stroke-width:1;stroke-dasharray:1.5 3"
    drawn.append(f'<path d="M{at(forest.zero):.1f},{_TOP - 4}V{bottom}" style="{zero}"/>')
    for i, (name, value, from_, to, said) in enumerate(forest.rows):
        y = _TOP + _ROW * (i + 0.5)
        shown = name if len(name) <= 48 else f"{name[:22]}\u2026{name[-25:]}"
        drawn.append(_text(left - 12, y + 4, shown, anchor="end", more=f"fill:{_INK}"))
        line = f"stroke:{color(0)};stroke-width:2"
        drawn.append(f'<path d="M{at(from_):.1f},{y}H{at(to):.1f}" style="{line}"/>{_marker(1, at(value), y, 3.6)}')
        drawn.append(_text(right + 12, y + 4, said))
    return _frame(width, height, describe(forest), drawn, standalone)
