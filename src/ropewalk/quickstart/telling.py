"""What the quickstart says in the terminal: how far it is, its dialogue, its table, and what to do next."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ropewalk.quickstart.comparison import Compared, Tell
from ropewalk.quickstart.page import Score
from ropewalk.quickstart.question import Dialogue
from ropewalk.quickstart.rewarded import Improved


@contextmanager
def progress(console: Console) -> Iterator[Tell]:
    """How far a step is: a bar on a terminal, elsewhere a line for each thing that is done and each quarter of it."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda doing, share: bar.update(task, completed=share, description=doing)


class _Lines:
    """Progress as text."""

    def __init__(self, console: Console) -> None:
        self._console, self._told = console, dict[str, int]()

    def __call__(self, doing: str, share: float) -> None:
        quarter = int(4 * share)
        if self._told.get(doing, -1) < quarter < 4:  # that it is done, the next line says
            self._console.print(f"{doing}: {25 * quarter} %" if quarter else doing, markup=False)
            self._told[doing] = quarter


def tell(console: Console, dialogue: Dialogue) -> None:
    """Both answers with what they cite, and what the second cost."""
    for told in dialogue.told:
        console.print(f"asked: {told.question}\nsays:  {told.answer}", markup=False)
        for cited in told.cited:
            console.print(f'cites: "{cited.text}" (characters {cited.start} to {cited.end} of {cited.file_id})', markup=False)
        usage = told.usage
        console.print(f"read:  {usage.cache_creation + usage.input} tokens, {usage.cache_read} more from the cache")
    first, second = dialogue.told
    console.print(
        f"time to the first token: {1000 * first.seconds:.0f} ms, then {1000 * second.seconds:.0f} ms; the file is as short as its "
        "base is small, so the times are mostly the overhead of a request"
    )


def tell_improved(console: Console, improved: Improved) -> None:
    """What rewards alone have brought, or that they have brought nothing."""
    gained = improved.after - improved.before
    said = f"{100 * gained:+.1f} points" if gained > 0 else "no gain"
    console.print(
        f"from step {improved.begins} of the run on, by rewards alone: {improved.before:.1%} -> {improved.after:.1%} of "
        f"{improved.questions} held-out questions, greedily ({said}); sampled while training {improved.sampled_before:.0%} -> "
        f"{improved.sampled_after:.0%}; {improved.steps} steps in {improved.seconds:.0f} s"
    )
    console.print(f"completions with their rewards: {improved.adapter.parent / 'samples.html'}", soft_wrap=True)


def show(console: Console, scores: list[Score], compared: Compared, page: Path, folder: Path, seconds: float) -> None:
    """The table, where things are and, for a person at a terminal, what to do next."""
    table = Table(title="held-out countries, never seen in training", title_justify="left")
    table.add_column("who answers")
    table.add_column("score", justify="right")
    for s in scores:
        table.add_row(s.label, f"{s.value:.0%}", style="bold" if s.key in ("before", "after") else None)
    console.print()
    console.print(table)
    verdict = compared.verdict
    console.print(
        f"{verdict.state}: {compared.headline}; {len(verdict.fixed)} questions gained, {len(verdict.regressions)} lost"
    )
    console.print(f"Its page: {folder / 'comparison.html'}; {compared.url} once `ropewalk serve` runs", soft_wrap=True)
    console.print(
        f"{seconds:.0f} s in all. Page: {page}; adapter, events, plots: {folder / 'run'}; numbers: {folder / 'summary.json'}",
        soft_wrap=True,
    )
    if sys.stdout.isatty() and not os.environ.get("CI"):
        console.print("\nNext:", style="bold")
        console.print(f"  look    open {page}")
        console.print(f"  again   ropewalk train {folder / 'train.yml'} max_steps=200 output_dir={folder / 'longer'}")
        console.print(
            "  yours   put your chat rows in a JSONL file, `ropewalk files put rows.jsonl`, and name its id under `datasets`"
        )
        console.print(
            "  big     set base_model to a mixture of experts of the hub, such as Qwen/Qwen3-30B-A3B, and adapter to qlora"
        )
