"""A Page as one HTML file that needs no network and no script, by report.html.j2.

Text comes from models, files and people: every value that the template prints is cleaned (`text.clean`) and escaped, save
SVG, which `figures` builds from text that it cleans itself.
"""

import itertools
import re
from pathlib import Path

from rpo.overopt.figures import COLORS
from rpo.reporting import figures, text
from rpo.reporting import run_verdicts as reporting_run_verdicts
from rpo.reporting.sections import Page
from rpo.reporting.text import clean

# Name: (light, dark). Tones are those of run_verdicts; c0, c1, ... the arms' colours.
_TONES = {
    "ink": ("#1a1a18", "#e9e7e1"),
    "quiet": ("#62625b", "#a5a39a"),
    "rule": ("#dddcd5", "#3a3936"),
    "paper": ("#ffffff", "#161614"),
    "wash": ("#f6f5f1", "#20201e"),
    "bad": ("#a83210", "#f59a76"),
    "doubt": ("#805a00", "#e6bb5c"),
    "good": ("#00664a", "#5ed1a8"),
    "unknown": ("#62625b", "#a5a39a"),
    "news": ("#00568a", "#7abff0"),
}
_MARKS = {
    "bad": "\u25bc",
    "doubt": "\u25c6",
    "good": "\u25b2",
    "unknown": "\u25cb",
    "news": "\u25a0",
}  # beside the colour


def html(page: Page) -> str:
    """The whole file."""
    import jinja2
    from markupsafe import Markup

    def printed(value: object) -> object:
        return value if isinstance(value, Markup) else clean(value)

    drawn = itertools.count()

    def unique(svg: str, prefix: str) -> Markup:
        """The element with ids that no other of the page has."""
        own = f"{prefix}{next(drawn)}-"
        return Markup(re.sub(rf'(["#]){prefix}-', rf"\g<1>{own}", svg))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=printed,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {
        "chart": lambda chart, wide: unique(figures.svg(chart, wide=wide), "chart"),
        "swatch": lambda style: unique(figures.swatch(style), "swatch"),
        "kind": lambda block: type(block).__name__,
        "thick": figures.thick,
        "beside": reporting_run_verdicts.beside,
        "typeset": text.typeset,
        "marks": _MARKS,
    }
    template = environment.get_template("report.html.j2")
    return template.render(page=page, light=_variables(0), dark=_variables(1)).lstrip()


def _variables(dark: int) -> dict[str, str]:
    """Colours of the page by name; those of arms are lightened for a dark page, and darkened a little where too pale for white."""
    colors = {name: pair[dark] for name, pair in _TONES.items()}
    for i, color in enumerate(COLORS):
        lightness = sum(int(color[j : j + 2], 16) * weight for j, weight in ((1, 0.3), (3, 0.59), (5, 0.11))) / 255
        share = 0.3 if dark else 0.15 * (lightness > 0.55)
        if lightness < 0.2:  # black: the ink of either page
            colors[f"c{i}"] = colors["ink"]
        else:
            colors[f"c{i}"] = _mixed(color, 255 if dark else 0, share)
    return colors


def _mixed(color: str, other: int, share: float) -> str:
    """A colour with a share of white (255) or black (0)."""
    parts = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part * (1 - share) + other * share):02x}" for part in parts)
