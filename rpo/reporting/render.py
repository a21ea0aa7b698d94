"""A page of `sections` as one HTML file that needs no network and no script, by report.html.j2.

Text comes from models, files and people: every value that the template prints is cleaned (`text.clean`) and escaped, save
SVG, which `figures` builds from text that it cleans itself.
"""

import itertools
import re
from pathlib import Path
from typing import Any

from rpo import text
from rpo.overopt import curve
from rpo.overopt.figures import COLORS
from rpo.reporting import figures, run_verdicts
from rpo.text import clean

# Name: (light, dark). Tones are those of run_verdicts; c0, c1, ... the arms' colours.
_COLORS = {
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


def html(page: dict[str, Any]) -> str:
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
        "thick": figures.thick,
        "beside": run_verdicts.beside,
        "typeset": text.typeset,
        "counted": text.counted,
        "marks": _MARKS,
        "signs": run_verdicts,  # whose thresholds the rules state
        "gold": curve,
    }
    template = environment.get_template("report.html.j2")
    return template.render(page=page, light=_variables(0), dark=_variables(1)).lstrip()


def _variables(dark: int) -> dict[str, str]:
    """Colours of the page by name; those of arms are lightened for a dark page, and darkened a little where too pale for white."""
    colors = {name: pair[dark] for name, pair in _COLORS.items()}
    for i, color in enumerate(COLORS):
        red, green, blue = (int(color[j : j + 2], 16) for j in (1, 3, 5))
        lightness = (0.3 * red + 0.59 * green + 0.11 * blue) / 255
        share = 0.3 if dark else 0.15 * (lightness > 0.55)  # of white, of black
        mixed = (round(part * (1 - share) + 255 * dark * share) for part in (red, green, blue))
        colors[f"c{i}"] = colors["ink"] if lightness < 0.2 else "#" + "".join(f"{part:02x}" for part in mixed)
    return colors
