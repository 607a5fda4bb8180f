"""The seven states of a verdict; page, wire, badge and command line print these very words."""

from enum import StrEnum


class State(StrEnum):
    """What the evidence says about one candidate against what is served."""

    SHIP = "SHIP"  # better, nothing that must hold broke, and the price is within its limits
    SHIP_CHEAPER = "SHIP (cheaper)"  # the same within the margin, and at least a fifth cheaper or faster
    TIE = "TIE"  # the same within the margin: keep what is served
    SKIP = "SKIP"  # worse, or something that must hold broke
    NOT_ENOUGH = "NOT ENOUGH"  # the interval reaches both ways: about N more prompts would tell
    NO_VERDICT = "NO VERDICT"  # the run cannot carry a verdict, for a stated reason
    OPINION_ONLY = "OPINION ONLY"  # nothing was run

    @property
    def ships(self) -> bool:
        return self in (State.SHIP, State.SHIP_CHEAPER)

    @property
    def exit_code(self) -> int:
        """What `ropewalk compare show` exits with, for CI."""
        return EXIT_CODES[self]


EXIT_CODES = {
    State.SHIP: 0,
    State.SHIP_CHEAPER: 0,
    State.TIE: 10,
    State.SKIP: 20,
    State.NOT_ENOUGH: 30,
    State.NO_VERDICT: 40,
    State.OPINION_ONLY: 50,
}
