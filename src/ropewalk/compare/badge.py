"""A badge: a candidate's name beside its verdict, as a picture for other pages."""

from __future__ import annotations

from ropewalk.compare.state import State
from ropewalk.compare.svg import escape, shorten, width

HIGH, SIZE, PAD, MOST = 20, 11, 7, 260
LEFT = "#3a3f45"
COLOURS = {  # with white text, each at least 4.5 to 1
    State.SHIP: "#1a7f37",
    State.SHIP_CHEAPER: "#1a7f37",
    State.TIE: "#57606a",
    State.SKIP: "#b42318",
    State.NOT_ENOUGH: "#8a5a00",
    State.NO_VERDICT: "#57606a",
    State.OPINION_ONLY: "#6e40c9",
}


def badge(label: str, state: State, detail: str = "") -> str:
    """The badge as an SVG that stands alone; `detail` follows the state, such as the interval in points."""
    said = f"{state} {detail}".strip()
    left, right = shorten(label, SIZE, MOST), shorten(said, SIZE, MOST)
    a, b = round(width(left, SIZE)) + 2 * PAD, round(width(right, SIZE)) + 2 * PAD
    name = escape(f"{label}: {said}")
    text = 'y="14" text-anchor="middle" lengthAdjust="spacingAndGlyphs" unicode-bidi="isolate"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{a + b}" height="{HIGH}" role="img" aria-label="{name}"><title>{name}</title>'
        f'<rect width="{a + b}" height="{HIGH}" rx="3" fill="{COLOURS[state]}"/>'
        f'<path d="M3 0h{a - 3}v{HIGH}h-{a - 3}a3 3 0 0 1-3-3v-{HIGH - 6}a3 3 0 0 1 3-3z" fill="{LEFT}"/>'
        f'<g fill="#fff" font-family="Verdana, DejaVu Sans, sans-serif" font-size="{SIZE}">'
        f'<text x="{a / 2:g}" {text} textLength="{a - 2 * PAD}">{escape(left)}</text>'
        f'<text x="{a + b / 2:g}" {text} textLength="{b - 2 * PAD}">{escape(right)}</text></g></svg>'
    )
