"""A small dot plot as SVG text: one panel per quantity, one line per contender, a dot per run, a bar to the one that counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LINE, LEFT, WIDTH, PANEL_GAP, RIGHT = 22, 190, 560, 30, 70
OURS, PEER = "#2f6fde", "#868e96"


@dataclass(frozen=True)
class Panel:
    """One quantity of all contenders: (name, the value that counts, every value, whether it is ours)."""

    title: str
    rows: Sequence[tuple[str, float, Sequence[float], bool]]


def dot_plot(title: str, panels: Sequence[Panel]) -> str:
    """One SVG document with the panels below each other."""
    y, body = 48, []
    for panel in panels:
        body.append(f'<text x="16" y="{y}" class="h">{escape(panel.title)}</text>')
        y += 8
        most = max(max(values) for _, _, values, _ in panel.rows) or 1.0
        for name, value, values, ours in panel.rows:
            y += LINE
            body.append(_row(y, name, value, values, most, OURS if ours else PEER))
        y += PANEL_GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + RIGHT} {y - 8}" role="img" '
        f'aria-label="{escape(title)}"><style>text{{font:12px system-ui,sans-serif;fill:#495057}}.h{{font-weight:600}}'
        "@media(prefers-color-scheme:dark){text{fill:#ced4da}}</style>"
        f'<text x="16" y="22" style="font-weight:600;font-size:14px">{escape(title)}</text>{"".join(body)}</svg>\n'
    )


def _row(y: int, name: str, value: float, values: Sequence[float], most: float, colour: str) -> str:
    length = value / most * WIDTH
    dots = "".join(
        f'<circle cx="{LEFT + v / most * WIDTH:.1f}" cy="{y - 4}" r="3" fill="{colour}" stroke="#fff" stroke-width=".6"/>'
        for v in values
    )
    return (
        f'<text x="{LEFT - 8}" y="{y}" text-anchor="end">{escape(name)}</text>'
        f'<rect x="{LEFT}" y="{y - 9}" width="{length:.1f}" height="10" fill="{colour}" fill-opacity=".35"/>{dots}'
        f'<text x="{LEFT + max(values) / most * WIDTH + 8:.1f}" y="{y}">{value:,.4g}</text>'
    )
