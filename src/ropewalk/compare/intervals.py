"""Intervals drawn one below the other as inline SVG, and the same facts as sentences.

The drawing takes its colour from the text around it, so that it follows light and dark, and it is as wide as a phone: names stand
above their intervals rather than beside them. Each row has the class better, worse or unclear, for a style sheet to colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ropewalk.compare.svg import escape, shorten, width

WIDE, EDGE, ROW, TOP, FOOT = 360, 12, 40, 6, 40
SMALL, TEXT = 11, 12
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class IntervalRow:
    """A mean with its interval; an end that is not bounded is infinite."""

    name: str
    low: float
    mean: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.low <= self.mean <= self.high):
            raise ValueError(
                f"'{self.name}': expected low <= mean <= high and a finite mean, not {self.low}, {self.mean}, {self.high}"
            )


def number(value: float, *, sign: bool = False) -> str:
    """A number as people write it: one place, a true minus, a plus where asked for."""
    if math.isinf(value):
        return "no upper bound" if value > 0 else "no lower bound"
    text = f"{abs(value):,.1f}" if abs(value) < 1e6 else f"{abs(value):.3g}"
    text = text.removesuffix(".0")
    if text == "0":
        return "0"
    return (MINUS if value < 0 else "+" if sign else "") + text


def reading(row: IntervalRow, zero: float = 0.0, *, higher_is_better: bool = True) -> str:
    """better, worse or unclear: on which side of `zero` the whole interval lies."""
    if row.low > zero or row.high < zero:
        return "better" if (row.low > zero) == higher_is_better else "worse"
    return "unclear"


def sentences(
    rows: Sequence[IntervalRow], *, unit: str = "points", zero: float = 0.0, higher_is_better: bool = True
) -> list[str]:
    """One sentence per row, with all that the drawing shows."""
    found = []
    for row in rows:
        said = reading(row, zero, higher_is_better=higher_is_better)
        told = "cannot be told apart" if said == "unclear" else said
        low, mean, high = (number(value, sign=zero == 0) for value in (row.low, row.mean, row.high))
        found.append(f"{row.name}: {mean} {unit}, 95% interval {low} to {high}: {told}.")
    return found


def plot(
    title: str,
    rows: Sequence[IntervalRow],
    *,
    key: str,
    unit: str = "points",
    zero: float = 0.0,
    zero_label: str = "no difference",
    higher_is_better: bool = True,
) -> str:
    """The drawing; `key` makes its ids its own among several on a page."""
    low, high = _span(rows, zero)
    height = TOP + ROW * len(rows) + FOOT
    base = TOP + ROW * len(rows)

    def x(value: float) -> float:
        return EDGE + (min(max(value, low), high) - low) / (high - low) * (WIDE - 2 * EDGE)

    key = escape(key)
    facts = " ".join(sentences(rows, unit=unit, zero=zero, higher_is_better=higher_is_better)) or "There is nothing to draw."
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="intervals" viewBox="0 0 {WIDE} {height}" width="100%" role="img" '
        f'aria-labelledby="{key}-title {key}-desc" font-family="system-ui, sans-serif" fill="currentColor" stroke="none">',
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(facts)}</desc>',
    ]
    for at, row in enumerate(rows):
        top = TOP + ROW * at + 18  # beside the interval only, not through the name
        parts.append(f'<path d="M{x(zero):.1f} {top}v{ROW - 18}" stroke="currentColor" stroke-dasharray="3 3"/>')
        parts.append(_row(row, TOP + ROW * at, x, reading(row, zero, higher_is_better=higher_is_better), sign=zero == 0))
    parts.append(f'<line x1="{EDGE}" x2="{WIDE - EDGE}" y1="{base}" y2="{base}" stroke="currentColor"/>')
    for tick in _ticks(low, high):
        label = number(tick, sign=zero == 0)
        half = width(label, SMALL) / 2
        place = min(max(x(tick), half), WIDE - half)
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{base}" y2="{base + 4}" stroke="currentColor"/>')
        parts.append(f'<text x="{place:.1f}" y="{base + 16}" font-size="{SMALL}" text-anchor="middle">{label}</text>')
    note = shorten(f"{unit}; dashed: {zero_label}", SMALL, WIDE - 2 * EDGE)
    parts.append(f'<text x="{WIDE / 2}" y="{base + 33}" font-size="{SMALL}" text-anchor="middle">{escape(note)}</text></svg>')
    return "".join(parts)


def _row(row: IntervalRow, top: int, x: Callable[[float], float], said: str, *, sign: bool) -> str:
    y = top + 28
    low, mean, high = (number(value, sign=sign) for value in (row.low, row.mean, row.high))
    figures = f"{mean} ({low} to {high})"
    name = shorten(row.name, TEXT, WIDE - 2 * EDGE - width(figures, SMALL) - 8)
    # An open mark is an interval that reaches both ways, so that the reading does not hang on colour.
    fill = "none" if said == "unclear" else "currentColor"
    parts = [
        f'<g class="{said}"><text x="{EDGE}" y="{top + 14}" font-size="{TEXT}" unicode-bidi="isolate">{escape(name)}</text>',
        f'<text x="{WIDE - EDGE}" y="{top + 14}" font-size="{SMALL}" text-anchor="end">{figures}</text>',
        f'<line x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y}" y2="{y}" stroke="currentColor" stroke-width="2"/>',
    ]
    for end, step in ((row.low, 5), (row.high, -5)):
        at = x(end)
        if math.isinf(end):  # an arrow: it goes on beyond the drawing
            arrow = f"M{at + step:.1f} {y - 4} L{at:.1f} {y} L{at + step:.1f} {y + 4}"
            parts.append(f'<path d="{arrow}" fill="none" stroke="currentColor" stroke-width="2"/>')
        else:
            parts.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y - 4}" y2="{y + 4}" stroke="currentColor" stroke-width="2"/>'
            )
    parts.append(f'<circle cx="{x(row.mean):.1f}" cy="{y}" r="4.5" fill="{fill}" stroke="currentColor" stroke-width="2"/></g>')
    return "".join(parts)


def _span(rows: Sequence[IntervalRow], zero: float) -> tuple[float, float]:
    """What the axis must hold: every finite end, and `zero`, with a little room."""
    ends = [zero, *(value for row in rows for value in (row.low, row.mean, row.high) if math.isfinite(value))]
    low, high = min(ends), max(ends)
    room = (high - low) * 0.05 or max(1.0, abs(zero) * 0.05)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """At most six round numbers within the axis."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step)
    ticks = [(first + n) * step for n in range(6)]
    return [tick for tick in ticks if low <= tick <= high]
