"""The quickstart's result as one HTML page that needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ropewalk.files.catalog import File
from ropewalk.quickstart.comparison import Compared
from ropewalk.quickstart.question import Dialogue
from ropewalk.quickstart.rewarded import Improved
from ropewalk.standalone import environment


@dataclass(frozen=True)
class Score:
    """One line of the result: a share between 0 and 1."""

    key: str
    label: str
    value: float


Mark = Literal["right", "value", "wrong"]  # letter for letter; the value but not the format; neither


@dataclass(frozen=True)
class Sample:
    """One held-out question with both answers."""

    passage: str
    question: str
    expected: str
    before: str
    before_mark: Mark
    after: str
    after_mark: Mark


@dataclass(frozen=True)
class Page:
    """All that the page shows."""

    scores: list[Score]
    compared: Compared
    samples: list[Sample]
    plot: str  # SVG, ours
    training: str
    questions: int
    file: File
    dialogue: Dialogue
    improved: Improved | None
    seconds: int
    fast: bool

    @property
    def by_key(self) -> dict[str, float]:
        return {score.key: score.value for score in self.scores}


def write_page(page: Page, path: Path) -> Path:
    """Renders page.html.j2 into one file."""
    path.write_text(environment(Path(__file__).parent).get_template("page.html.j2").render(page=page), encoding="utf-8")
    return path
