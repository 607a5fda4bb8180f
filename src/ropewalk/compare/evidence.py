"""What the rule is given about one candidate: plain, frozen data, gathered by runs, checks and judges.

runs, checks, judges -> Evidence -> rule -> Verdict -> pages, wire, command line, ship
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Who scored a prompt."""

    CHECK = "check"
    JUDGE = "judge"


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt that both answered, scored from 0 to 1.

    A check scores each answer alone. A judge prefers: `new` is the mean, over both orders and all its judges, of 1 (the
    candidate's answer is better), 0.5 (the same) and 0, and `old` is 1 - new; so new - old is a difference either way.
    """

    id: str  # the prompt
    group: str  # its source document, conversation or template: prompts of one group are not independent
    old: float  # what is served, or whatever else the candidate is compared with
    new: float  # the candidate
    kind: Kind = Kind.CHECK
    must_pass: bool = False
    held: bool = False  # of the half that is kept back to confirm with
    slices: tuple[str, ...] = ()  # tags by which the worst slice is looked for
    lengths: tuple[int, int] | None = None  # characters of both answers, old first; a judged row needs them
    repeated: bool = True  # a must-pass row that fails failed again when it was asked again


@dataclass(frozen=True)
class Measured:
    """One figure of one candidate, with its 95 % interval where several readings were taken."""

    value: float
    low: float | None = None
    high: float | None = None


class Metric(StrEnum):
    """What is measured; less is better in each."""

    COST = "cost per passing answer"
    LATENCY = "p95 latency"
    MEMORY = "peak memory"


@dataclass(frozen=True)
class Measurement:
    """The same figure of both, comparable only where both were taken on the same machine with the same software."""

    id: str
    metric: Metric
    unit: str
    old: Measured
    new: Measured
    old_fingerprint: str
    new_fingerprint: str

    @property
    def comparable(self) -> bool:
        return self.old_fingerprint == self.new_fingerprint

    @property
    def ratio(self) -> float | None:
        """The candidate's figure over the served one's; None where the two are not comparable."""
        return self.new.value / self.old.value if self.comparable and self.old.value > 0 else None


@dataclass(frozen=True)
class Guardrail:
    """Something that must hold whatever the score: format, refusals, safety, a cap on latency or memory."""

    id: str
    sentence: str  # what held, or what broke
    broken: bool


class Finding(StrEnum):
    """What keeps a run from carrying a verdict."""

    LEAKAGE = "leakage"  # prompts of the suite stand in a candidate's training files
    LINEAGE = "lineage"  # a judge is kin to a candidate
    MISMATCH = "mismatch"  # prompts, sampling, template or serving path differ between the two
    JUDGE = "judge"  # a judge was not admitted
    INCOMPLETE = "incomplete"  # prompts without an answer or a score


@dataclass(frozen=True)
class Trouble:
    """One finding; one that does not block is only told, such as a judge that was refused where others were left."""

    id: str
    finding: Finding
    sentence: str
    blocks: bool = True


@dataclass(frozen=True)
class JudgeRecord:
    """A judge whose preferences are in the rows, and whether it was fit to judge."""

    id: str
    admitted: bool
    calibrated: bool  # on 50 labels or more; one that is not is told as such
    flip_rate: float  # of its decided prompts, those on which swapping the answers swapped the preference
    sentence: str  # why it was admitted, or not


@dataclass(frozen=True)
class Evidence:
    """All that the rule may look at about one candidate against what is served."""

    candidate: str
    baseline: str
    rows: Sequence[Row] = ()
    measurements: Sequence[Measurement] = ()
    guardrails: Sequence[Guardrail] = ()
    troubles: Sequence[Trouble] = ()
    judges: Sequence[JudgeRecord] = ()
    chosen_from: int = 1  # checkpoints tried on these prompts, of which this is the best
    anytime: bool = False  # the run was looked at on its way and might have stopped early
    same_artifact: bool = False  # the two are the same bytes
    ran: bool = True  # False: a card, about which only opinions are known


@dataclass(frozen=True)
class Limits:
    """What the rule decides by; a suite may set others, and a verdict shows them."""

    margin: float = 0.03  # a difference this small, in either direction, is the same
    cheaper: float = 0.20  # the saving from which "the same" becomes worth shipping
    cost_ratio: float | None = None  # the most that a better candidate may cost per passing answer, over what is served
    latency_ratio: float | None = None
    memory_ratio: float | None = None
