"""What is found about an installation, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

State: TypeAlias = Literal[
    "ok", "note", "broken"
]  # note: something that works only in part, or is not there and was not asked for
MARKS: dict[State, str] = {"ok": "ok", "note": "--", "broken": "FAIL"}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and the way out where there is something to do."""

    part: str
    name: str
    state: State
    text: str
    fix: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """As it is shown; what to do stands below."""
        head = f"  {MARKS[self.state]:>4}  {self.name:<18} {self.text}"
        return head + (f"\n{'':27}{self.fix}" if self.fix else "")


class Looking:
    """Collects findings of one part; what raises is a finding, and the looking goes on."""

    def __init__(self, part: str) -> None:
        self.part, self.found = part, list[Finding]()

    def say(self, name: str, state: State, text: str, fix: str | None = None) -> None:
        self.found.append(Finding(self.part, name, state, text, fix))

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Whatever goes wrong within is what was found."""
        try:
            yield
        except Exception as error:  # a doctor that dies of the illness tells nobody which it is
            self.say(name, "broken", reason(error))


def reason(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split()) or "no message"
    return text if type(error).__module__.startswith("ropewalk") else f"{type(error).__name__}: {text[:400]}"


def broken(findings: Sequence[Finding]) -> bool:
    """Whether something that is asked for does not work."""
    return any(finding.state == "broken" for finding in findings)
