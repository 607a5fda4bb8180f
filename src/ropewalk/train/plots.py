"""Line plots as SVG text: small, sharp, no plotting library to install, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 36, 40
COLOURS = ("#2f6fde", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#a61e4d", "#5c940d", "#868e96")
Series = tuple[str, Sequence[float], Sequence[float]]  # name, x, y


def line_plot(title: str, x_name: str, y_name: str, series: Sequence[Series]) -> str:
    """One SVG document with a curve per series; values that are not finite are left out."""
    curves = [(name, [(x, y) for x, y in zip(xs, ys) if math.isfinite(x) and math.isfinite(y)]) for name, xs, ys in series]
    points = [p for _, curve in curves for p in curve] or [(0.0, 0.0)]
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = _ticks(min(y for _, y in points), max(y for _, y in points))
    place = _Scale(x_ticks, y_ticks)
    body, names = [_axes(place, x_ticks, y_ticks, x_name, y_name)], []
    for number, (name, curve) in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in curve)
        body.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>')
        names.append(f'<tspan style="fill:{colour}">{escape(name)}</tspan>')
    if len(curves) > 1:  # beside the title, where no curve runs
        body.append(f'<text x="{WIDTH - RIGHT}" y="20" text-anchor="end">{" &#160; ".join(names)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        "<style>text{font:12px system-ui,sans-serif;fill:#495057}.g{stroke:#adb5bd;stroke-opacity:.45}"
        "@media(prefers-color-scheme:dark){text{fill:#ced4da}}</style>"
        f'<text x="{LEFT}" y="20" style="font-weight:600;font-size:14px">{escape(title)}</text>{"".join(body)}</svg>\n'
    )


def stacked(plots: Sequence[str]) -> str:
    """Several plots as one document, one below the other."""
    if len(plots) == 1:
        return plots[0]
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    body = "".join(plot.replace("<svg ", f'<svg y="{HEIGHT * number}" {size} ', 1) for number, plot in enumerate(plots))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * len(plots)}">{body}</svg>\n'


class _Scale:
    """Values to pixels."""

    def __init__(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        self.x0, self.x1, self.y0, self.y1 = x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1]

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def _axes(place: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_name: str, y_name: str) -> str:
    out = []
    for y in y_ticks:
        out.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place.y(y):.1f}" y2="{place.y(y):.1f}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{place.y(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    for x in x_ticks:
        out.append(f'<text x="{place.x(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:.6g}</text>')
    out.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_name)}</text>')
    out.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">{escape(y_name)}</text>')
    return "".join(out)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span low..high."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / about
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]
