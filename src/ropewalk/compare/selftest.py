"""The rule tried on candidates whose truth is known: how often it is wrong, and how often it sees what is there."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ropewalk.compare import planted
from ropewalk.compare.last_selftest import keep
from ropewalk.compare.planted import PROMPTS, Rng
from ropewalk.compare.rule import RULE_VERSION, SHIP_LEVEL
from ropewalk.compare.state import State
from ropewalk.compare.statistics import LEVEL
from ropewalk.compare.verdict import Verdict
from ropewalk.errors import BadInput, OutputError, VerificationFailed

DIFFERENT = (State.SHIP, State.SHIP_CHEAPER, State.SKIP)
STUBS = ("always_first", "longest", "prefers_family", "random", "says_yes")


@dataclass(frozen=True)
class Entry:
    """One planted fault: how often the rule fell for it, and the bound that it must stay below."""

    what: str
    rate: float
    bound: float

    @property
    def held(self) -> bool:
        return self.rate <= self.bound


@dataclass(frozen=True)
class Selftest:
    """How the rule did."""

    runs: int
    seed: int
    rule_version: str
    identical_shipped: float
    identical_different: float
    minus10_skipped: float
    plus8_shipped: float
    planted: dict[str, Entry]

    @property
    def failures(self) -> list[str]:
        """What is beyond its bound."""
        found = [
            ("identical_shipped", self.identical_shipped <= 0.01), ("identical_different", self.identical_different <= 0.05),
            ("minus10_skipped", self.minus10_skipped >= 0.95), ("plus8_shipped", self.plus8_shipped >= 0.88),
        ]  # fmt: skip
        return [name for name, held in found if not held] + [name for name, entry in self.planted.items() if not entry.held]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the planted faults beside the four rates."""
        flat = {k: v for k, v in asdict(self).items() if k != "planted"}
        return {**flat, **{name: {**asdict(entry), "held": entry.held} for name, entry in self.planted.items()}}


def different(rng: Rng, make: Callable[[Rng], Verdict]) -> bool:
    return make(rng).state in DIFFERENT


FAULTS: dict[str, tuple[str, float, Callable[[Rng], bool]]] = {
    "position": (
        "a judge prefers what it sees first; equal candidates called different",
        LEVEL,
        lambda rng: different(rng, lambda r: planted.judged(r, position=0.3)),
    ),
    "length": (
        "a judge likes length; an equal candidate, twice as long, shipped",
        2 * SHIP_LEVEL,
        lambda rng: planted.judged(rng, length=0.6).may_ship,
    ),
    "self_preference": (
        "a judge of the candidate's own family; an equal candidate shipped",
        0.0,
        lambda rng: planted.kin(rng).may_ship,
    ),
    "stuffed_ballots": (
        "one voter of thirteen casts twenty ballots; voters without a preference seem to have one",
        LEVEL,
        planted.stuffed,
    ),
    "best_of_8": (
        "the best of eight equal checkpoints may be shipped",
        0.01,
        lambda rng: planted.best_of(rng, 8).may_ship,
    ),
    "shared_documents": (
        "200 prompts of 20 documents; equal candidates called different",
        LEVEL,
        lambda rng: different(rng, lambda r: planted.said(planted.passes(r, 200, size=10, shared=0.8))),
    ),
    "peeking": (
        "looked at after every prompt; equal candidates called different",
        LEVEL,
        lambda rng: different(rng, planted.peeked),
    ),
}


def stub_fault(name: str) -> Callable[[Rng], bool]:
    def fooled(rng: Rng) -> bool:
        record, verdict = planted.stub(rng, name)
        return record.admitted or verdict.may_ship

    return fooled


def selftest(runs: int, seed: int = 7, progress: Callable[[float], None] = lambda share: None) -> Selftest:
    """Tries the rule so many times on each planted candidate; the progress goes from 0 to 1."""
    if runs < 1:
        raise BadInput(f"a self-test of {runs} runs tells nothing; ask for 1 or more, 2000 for the stated bounds")
    faults = {**FAULTS, **{f"judge_{name}": (f"a judge that is {name} is admitted", LEVEL, stub_fault(name)) for name in STUBS}}
    steps, done = 3 + len(faults), 0
    states: list[list[State]] = []
    for gain in (0.0, -0.10, 0.08):
        rng = np.random.default_rng([seed, done])
        states.append([planted.said(planted.passes(rng, PROMPTS, gain)).state for _ in range(runs)])
        done += 1
        progress(done / steps)
    entries = {}
    for name, (what, bound, fooled) in faults.items():
        rng = np.random.default_rng([seed, done])
        entries[name] = Entry(what, sum(fooled(rng) for _ in range(runs)) / runs, bound)
        done += 1
        progress(done / steps)
    same, worse, better = states
    return Selftest(
        runs, seed, RULE_VERSION, sum(s.ships for s in same) / runs, sum(s in DIFFERENT for s in same) / runs,
        worse.count(State.SKIP) / runs, better.count(State.SHIP) / runs, entries,
    )  # fmt: skip


def run_selftest(arguments: Namespace) -> None:
    """`ropewalk compare selftest`: a bar, a table, JSON, and an error where a bound does not hold; kept for the method page."""
    console = Console(highlight=False)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"{arguments.runs} runs of each", total=1.0)
        found = selftest(arguments.runs, getattr(arguments, "seed", 7), lambda share: bar.update(task, completed=share))
    console.print(table(found))
    if arguments.json:
        try:
            arguments.json.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {arguments.json}: {error.strerror or error}; name another file") from error
    if arguments.data is not None:
        keep(arguments.data, found.as_dict())
    if found.failures:
        raise VerificationFailed(f"beyond its bound in {found.runs} runs: {', '.join(found.failures)}")


def table(found: Selftest) -> Table:
    shown = Table(title=f"rule {found.rule_version}, {found.runs} runs of each, {PROMPTS} prompts", title_justify="left")
    for name in ("planted", "found", "bound"):
        shown.add_column(name, justify="left" if name == "planted" else "right")
    shown.add_row("identical candidates: SHIP", f"{found.identical_shipped:.2%}", "at most 1 %")
    shown.add_row("identical candidates: called different", f"{found.identical_different:.2%}", "at most 5 %")
    shown.add_row("10 points worse: SKIP", f"{found.minus10_skipped:.2%}", "at least 95 %")
    shown.add_row("8 points better: SHIP", f"{found.plus8_shipped:.2%}", "at least 88 %")
    for entry in found.planted.values():
        shown.add_row(entry.what, f"{entry.rate:.2%}", f"at most {100 * entry.bound:g} %")
    return shown
