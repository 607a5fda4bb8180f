"""What a run shows while it goes (a live panel, or plain lines) and what it leaves: its event log and its plots."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from ropewalk.train.headlines import evaluation_line, failure_lines, panel_rows, step_line
from ropewalk.train.run_plots import plots_of
from ropewalk.train.samples_page import samples_page

Event = dict[str, Any]
MOST_TOLD = 20  # times that failures are said on the screen; the log has them all


class EventLog:
    """`events.jsonl`: one JSON object a line, each with `event` and, from the first step on, `step` (steps done so far).

    A resumed run drops what came after its checkpoint, so that the log reads as if nothing had happened.
    """

    def __init__(self, path: Path, *, keep_to_step: int | None = None) -> None:
        kept = [e for e in read_events(path) if e.get("step", 0) <= keep_to_step] if keep_to_step is not None else []
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
        fresh.replace(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps({"event": event, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> list[Event]:
    """Every whole line of an event log; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def write_plots(events: Path, folder: Path) -> None:
    """All plots of an event log, and beside the log `samples.html` where completions were logged."""
    folder.mkdir(exist_ok=True)
    log = read_events(events)
    for name, plot in plots_of(log).items():
        (folder / name).write_text(plot, encoding="utf-8")
    if page := samples_page(log, events.parent.name):
        events.with_name("samples.html").write_text(page, encoding="utf-8")


class Screen:
    """The run's face: a live panel in a terminal, a line every `every` steps elsewhere, nothing when quiet."""

    def __init__(self, title: str, total: int, *, every: int = 1, quiet: bool = False) -> None:
        self.title, self.total, self.every, self.quiet = title, total, max(1, every), quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = None if quiet or not self.console.is_terminal else Live(console=self.console, refresh_per_second=4)
        self._started, self._first_step = time.monotonic(), 0
        self._last: Mapping[str, Any] = {}
        self._evaluated: Mapping[str, Any] = {}
        self._failed: set[str] = set()  # rewards whose first failure has been shown
        self._failures = 0

    def __enter__(self) -> Screen:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live:
            self._live.__exit__(*error)

    def begin(self, step: int) -> None:
        """Training goes on from this step; the estimate of the time left counts from here."""
        self._started, self._first_step = time.monotonic(), step

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False)

    def suggest(self, *commands: str) -> None:
        """What a person may want to do next; said in a terminal only."""
        if self.console.is_terminal:
            self.say("next:\n" + "\n".join(f"  {command}" for command in commands))

    def step(self, values: Mapping[str, Any]) -> None:
        self._last = values
        if self._live:
            self._live.update(self._panel())
        elif values["step"] % self.every == 0 or values["step"] in (1, self.total):
            self.say(step_line(values, self.total, self._left()))

    def evaluated(self, values: Mapping[str, Any]) -> None:
        self._evaluated = values
        if self._live:
            self._live.update(self._panel())
        self.say(evaluation_line(values))

    def failed(self, values: Mapping[str, Any]) -> None:
        """What went wrong in rewards: a line, and of each reward its first traceback; after a while nothing but the log tells."""
        self._failures += 1
        new = set(values["failed"]) - self._failed
        if self._failures > MOST_TOLD and not new:
            return
        self._failed |= new
        for line in failure_lines(values, new):
            self.say(line)
        if self._failures == MOST_TOLD:
            self.say("further failures are written down in events.jsonl alone, and counted in every step as failed")

    def _left(self) -> str:
        done = self._last["step"] - self._first_step
        seconds = (time.monotonic() - self._started) / max(1, done) * (self.total - self._last["step"])
        return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"

    def _panel(self) -> Panel:
        if not self._last:
            return Panel("waiting for the first step", title=self.title)
        grid = Table.grid(padding=(0, 2))
        for row in panel_rows(self._last, self._evaluated, self.total, self._left()):
            grid.add_row(*row)
        whole = Table.grid()
        whole.add_row(grid)
        whole.add_row(ProgressBar(total=self.total, completed=self._last["step"], width=60))
        return Panel(whole, title=self.title, expand=False)
