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

from ropewalk.train.plots import line_plot

Event = dict[str, Any]


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
    """`loss.svg`, `throughput.svg` and `rate.svg` from an event log."""
    folder.mkdir(exist_ok=True)
    log = read_events(events)
    steps = [e for e in log if e["event"] == "step"]
    evals = [e for e in log if e["event"] == "eval"]
    x = [e["step"] for e in steps]
    loss = [("training loss", x, [e["loss"] for e in steps])]
    if evals:
        loss.append(("evaluation loss", [e["step"] for e in evals], [e["loss"] for e in evals]))
    speed = [("tokens/s", x, [e["tokens_per_second"] for e in steps])]
    rate = [("learning rate", x, [e["learning_rate"] for e in steps])]
    compared = [name for name in ("rewards/chosen", "rewards/rejected", "rewards/margins") if steps and name in steps[0]]
    if compared:
        rewards = [(name.removeprefix("rewards/"), x, [e[name] for e in steps]) for name in compared]
        share = [("training", x, [e["rewards/accuracies"] for e in steps])]
        if evals:
            share.append(("evaluation", [e["step"] for e in evals], [e["rewards/accuracies"] for e in evals]))
        (folder / "rewards.svg").write_text(line_plot("Implicit rewards", "step", "reward", rewards), encoding="utf-8")
        (folder / "accuracy.svg").write_text(line_plot("Preferred rightly", "step", "share", share), encoding="utf-8")
    unit = "loss of a comparison" if compared else "nats per trained token"
    (folder / "loss.svg").write_text(line_plot("Loss", "step", unit, loss), encoding="utf-8")
    (folder / "throughput.svg").write_text(line_plot("Throughput", "step", "tokens per second", speed), encoding="utf-8")
    (folder / "rate.svg").write_text(line_plot("Learning rate", "step", "learning rate", rate), encoding="utf-8")


class Screen:
    """The run's face: a live panel in a terminal, a line every `every` steps elsewhere, nothing when quiet."""

    def __init__(self, title: str, total: int, *, every: int = 1, quiet: bool = False) -> None:
        self.title, self.total, self.every, self.quiet = title, total, max(1, every), quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = None if quiet or not self.console.is_terminal else Live(console=self.console, refresh_per_second=4)
        self._started, self._first_step = time.monotonic(), 0
        self._last: Mapping[str, Any] = {}
        self._evaluated: Mapping[str, Any] = {}

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
            self.say(
                f"step {values['step']}/{self.total}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
                f"{values['tokens_per_second']:.0f} tok/s  {values['memory'] / 1e6:.0f} MB  {self._left()} left{_compared(values)}"
            )

    def evaluated(self, values: Mapping[str, Any]) -> None:
        self._evaluated = values
        best = "  (best so far)" if values["best"] else ""
        if self._live:
            self._live.update(self._panel())
        self.say(
            f"step {values['step']}  evaluation loss {values['loss']:.4f} over {values['trained']} tokens{_compared(values)}{best}"
        )

    def _left(self) -> str:
        done = self._last["step"] - self._first_step
        seconds = (time.monotonic() - self._started) / max(1, done) * (self.total - self._last["step"])
        return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"

    def _panel(self) -> Panel:
        if not self._last:
            return Panel("waiting for the first step", title=self.title)
        values = self._last
        grid = Table.grid(padding=(0, 2))
        evaluation = f"{self._evaluated['loss']:.4f}" if self._evaluated else "-"
        grid.add_row("step", f"{values['step']} / {self.total}", "loss", f"{values['loss']:.4f}", "evaluation", evaluation)
        grid.add_row("epoch", f"{values['epoch']:.2f}", "learning rate", f"{values['learning_rate']:.2e}", "left", self._left())
        speed, memory = f"{values['tokens_per_second']:.0f}", f"{values['memory'] / 1e6:.0f} MB"
        if "rewards/margins" in values:
            margin, right = f"{values['rewards/margins']:.3f}", f"{values['rewards/accuracies']:.3f}"
            grid.add_row("margin", margin, "accuracy", right)
        grid.add_row("tokens/s", speed, "gradient norm", f"{values['gradient_norm']:.3f}", "memory", memory)
        whole = Table.grid()
        whole.add_row(grid)
        whole.add_row(ProgressBar(total=self.total, completed=values["step"], width=60))
        return Panel(whole, title=self.title, expand=False)


def _compared(values: Mapping[str, Any]) -> str:
    """What a line says of preferences, where there are any."""
    if "rewards/margins" not in values:
        return ""
    return f"  margin {values['rewards/margins']:.3f}  accuracy {values['rewards/accuracies']:.3f}"
