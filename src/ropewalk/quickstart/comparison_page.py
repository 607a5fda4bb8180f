"""The quickstart's comparison as one HTML page that needs no server: the verdict, its interval, slices, and every question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ropewalk.quickstart.comparison import Compared
from ropewalk.quickstart.facts import KINDS, Question
from ropewalk.quickstart.page import Sample
from ropewalk.server.compare_views import Drawing, ShownVerdict, change_look, drawing, shown_verdict
from ropewalk.standalone import environment


@dataclass(frozen=True)
class Slice:
    """The questions about one kind of fact: shares that were answered right, letter for letter."""

    name: str
    questions: int
    before: float
    after: float


@dataclass(frozen=True)
class Pair:
    """One question with both answers, and what became of it."""

    number: int
    change: str
    look: str
    sample: Sample


@dataclass(frozen=True)
class ComparisonPage:
    """All that the page shows."""

    title: str
    baseline: str
    url: str  # where a server shows it
    verdict: ShownVerdict
    drawing: Drawing | None
    slices: list[Slice]
    pairs: list[Pair]


def write_comparison(compared: Compared, asked: Sequence[Question], samples: Sequence[Sample], path: Path) -> Path:
    """Renders comparison.html.j2 into one file; the samples are all questions, as they were asked."""
    names = {one.id: one for one in (compared.baseline, compared.candidate)}
    numbers = {one.prompt.id: one.prompt.number for one in compared.outcomes}
    page = ComparisonPage(
        title=f"{compared.baseline.name} and {compared.candidate.name}",
        baseline=compared.baseline.name,
        url=compared.url,
        verdict=shown_verdict(compared.stored, names, numbers),
        drawing=drawing([compared.stored], names, compared.baseline),
        slices=slices(asked, samples),
        pairs=[
            Pair(one.prompt.number, one.change, change_look(one.change), samples[one.prompt.number - 1])
            for one in compared.outcomes
        ],
    )
    text = environment(Path(__file__).parent).get_template("comparison.html.j2").render(page=page)
    path.write_text(text, encoding="utf-8")
    return path


def slices(asked: Sequence[Question], samples: Sequence[Sample]) -> list[Slice]:
    """All questions, then those about each kind of fact."""

    def of(name: str, some: Sequence[Sample]) -> Slice:
        before, after = (sum(mark == "right" for mark in marks) / len(some) for marks in zip(*map(_marks, some)))
        return Slice(name, len(some), before, after)

    by_kind = {kind.house: [s for q, s in zip(asked, samples) if q.kind == kind.field] for kind in KINDS}
    return [of("all", samples), *(of(name, some) for name, some in by_kind.items() if some)]


def _marks(sample: Sample) -> tuple[str, str]:
    return sample.before_mark, sample.after_mark
