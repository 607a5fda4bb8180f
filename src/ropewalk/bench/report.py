"""The comparison as a terminal shows it, and as one plot. No torch."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ropewalk.bench.bars import Panel, dot_plot
from ropewalk.bench.contenders import OURS, TITLES, Entrant
from ropewalk.bench.moe import Result, races

WIDTH = 28  # of a bar in characters, at most
BESIDE = 84  # what stands before it
PIPED = 120  # columns where the output is no terminal's
EIGHTHS = " ▏▎▍▌▋▊▉█"


def show(result: Result, console: Console) -> None:
    """A table for each race, with a bar for the time of each contender, and what it comes to in a sentence."""
    unit = "CPU ms" if result.plan.device == "cpu" else "ms"
    width = max(6, min(WIDTH, console.width - BESIDE))
    if result.errors:
        found = ", ".join(f"{TITLES[name]} {error:.0e}" for name, error in result.errors.items())
        console.print(f"gradients of a small model in float32, the largest relative difference from the plain model's: {found}")
    for name, why in result.failed.items():
        console.print(f"{TITLES[name]} did not compute them: {why}")
    for name, rows in races(result.rows).items():
        table = Table(title=name, title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        for column in (unit, "held MB", "peak MB", "of the ceiling", "error"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("time")
        most = max((row["ms"] for row in rows if row["ms"]), default=1.0)
        for row in rows:
            ours = row["contender"] == OURS
            table.add_row(
                Text(Entrant(row["contender"], row["policy"]).title, style="bold" if ours else ""),
                _number(row["ms"], 1), _number(row["held_mb"], 1), _number(row["peak_mb"], 1),
                "-" if not row["share_of_ceiling"] else f"{row['share_of_ceiling']:.0%}",
                "-" if row.get("max_error") is None else f"{row['max_error']:.0e}",
                Text(f"{bar((row['ms'] or 0) / most, width)} {row['note']}".rstrip(), style="cyan" if ours else ""),
            )  # fmt: skip
        console.print()
        console.print(table)
    for line in sentences(result):
        console.print(line)


def sentences(result: Result) -> list[str]:
    """What was found, in words; who is missing, and why."""
    lines = [""]
    for name, entry in result.ratios().items():
        parts = []
        for peer, times in entry["times_faster"].items():
            held = entry["held"].get(peer)
            parts.append(
                f"{times:.2f} times as fast as {TITLES[peer]}" + (f" holding {held:.2f} of its memory" if held else "")
            )
        lines.append(f"{name}: {'; '.join(parts)}")
        lean = entry.get("as_fast_and_leanest")
        if lean and lean["policy"] != "keep":
            lines.append(
                f"    keeping only what '{lean['policy']}' keeps, still {lean['times_faster']:.2f} times as fast as their "
                f"fastest, at {lean['peak']:.2f} of its peak"
            )
    lines += [f"{TITLES[name]} is left out: {why}" for name, why in result.missing.items()]
    if {"grouped", "eager"} & set(result.missing) and result.plan.device == "cpu":
        lines.append("for a comparison on a CPU: pip install peft")
    return lines


def plot(result: Result) -> str:
    """Time and memory of everybody in every race, as one SVG document."""
    unit = "CPU milliseconds of one thread" if result.plan.device == "cpu" else "milliseconds"
    panels = []
    for name, rows in races(result.rows).items():
        for key, what in (("ms", unit), ("held_mb", "MB held for the backward pass")):
            shown = [
                (Entrant(row["contender"], row["policy"]).title, float(row[key]), [float(row[key])], row["contender"] == OURS)
                for row in rows
                if row[key]
            ]
            if shown:
                panels.append(Panel(f"{name}: {what}", shown))
    return dot_plot("Mixture-of-experts LoRA, forward and backward", panels)


def screen() -> Console:
    """Where the comparison is shown; wide where nobody's window limits it."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPED)


def bar(share: float, width: int = WIDTH) -> str:
    """A bar of at most so many characters."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")


def _number(value: Any, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
