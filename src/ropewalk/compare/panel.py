"""Five personas who read the evidence: each asks one question and computes its score. An opinion; nothing here moves a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from ropewalk.compare.cards import NO_TAKE, PERSONAS
from ropewalk.errors import BadInput

SHIPS_FROM = 60.0  # a score of at least this ships; for the Founder that is a fifth cheaper than what is served
LEAST_CITED = 2  # a take rests on at least two pieces of evidence
FEWEST_VOTERS = 5  # below that a share of votes is not shown
GAIN = 0.03  # of pass rate: the margin within which two candidates are the same
ALIKE = 0.8  # how far five readings of one model agree beyond the evidence; five of them are worth 1.2 votes


@dataclass(frozen=True)
class Exhibit:
    """One number of the evidence, under the id by which a take cites it."""

    id: str
    value: float

    def __post_init__(self) -> None:
        if not self.id or not math.isfinite(self.value):
            raise ValueError(f"evidence has an id and a finite number, not '{self.id}' and {self.value}")


@dataclass(frozen=True)
class PanelEvidence:
    """What the panel may read about one candidate; shares are from 0 to 1, and what was not measured is None."""

    pass_rate_low: Exhibit | None = None  # lower bound of the share of checks that pass
    format_errors: Exhibit | None = None  # share of answers that break their format
    worst_slice: Exhibit | None = None  # pass rate of the slice that passes least
    regressions: Exhibit | None = None  # share of the prompts that the served model passes and the candidate does not
    flip_rate: Exhibit | None = None  # share of judgements that turn with the order
    leakage: Exhibit | None = None  # share of prompts that stand in the training files
    cost: Exhibit | None = None  # per passing answer
    served_cost: Exhibit | None = None  # per passing answer of what is served now, in the same money
    break_even: Exhibit | None = None  # answers until the training is paid for
    yearly_answers: Exhibit | None = None  # how many are asked for in a year
    slope: Exhibit | None = None  # pass rate gained from each checkpoint to the next
    headroom: Exhibit | None = None  # pass rate by which the best candidate is ahead
    votes: Exhibit | None = None  # share of blind votes won, one mean per voter
    voters: Exhibit | None = None  # how many voted
    style: Exhibit | None = None  # pass rate on style prompts

    def by_id(self) -> dict[str, Exhibit]:
        """Every exhibit under its id."""
        shown = (getattr(self, field.name) for field in fields(self))
        return {exhibit.id: exhibit for exhibit in shown if exhibit is not None}


@dataclass(frozen=True)
class PanelTake:
    """One persona's reading: a computed score with the evidence it cites, or no take."""

    persona: str
    score: float | None
    stance: str | None  # ship, skip
    text: str
    cited: tuple[str, ...]


Reading = tuple[float, str, tuple[Exhibit, ...]]  # score, sentence, what it rests on


def _clip(share: float) -> float:
    return min(1.0, max(0.0, share))


def builder(evidence: PanelEvidence) -> Reading | None:
    """Does it do the job? score = 100 * pass_rate_low * (1 - format_errors)."""
    passed, broken = evidence.pass_rate_low, evidence.format_errors
    if passed is None or broken is None:
        return None
    text = f"At least {passed.value:.1%} of the checks pass, and {broken.value:.1%} of the answers break their format."
    return 100 * _clip(passed.value) * (1 - _clip(broken.value)), text, (passed, broken)


def skeptic(evidence: PanelEvidence) -> Reading | None:
    """What breaks? score = 100 * worst_slice * (1 - regressions) * (1 - flip_rate) * (1 - leakage), the last two where measured."""
    worst, lost = evidence.worst_slice, evidence.regressions
    if worst is None or lost is None:
        return None
    score = 100 * _clip(worst.value) * (1 - _clip(lost.value))
    text = f"The worst slice passes {worst.value:.1%}, and {lost.value:.1%} of what passed before does no longer."
    cited = [worst, lost]
    if evidence.flip_rate:
        score *= 1 - _clip(evidence.flip_rate.value)
        text += f" The judge turns with the order in {evidence.flip_rate.value:.1%}."
        cited.append(evidence.flip_rate)
    if evidence.leakage:
        score *= 1 - _clip(evidence.leakage.value)
        text += f" {evidence.leakage.value:.1%} of the prompts stand in the training files."
        cited.append(evidence.leakage)
    return score, text, tuple(cited)


def founder(evidence: PanelEvidence) -> Reading | None:
    """Does it pay? score = 100 * (1 - cost / (2 * served_cost)) / (1 + break_even / yearly_answers), the divisor where both are known.

    The same cost is 50, a fifth cheaper 60, for nothing 100, twice the cost or more 0; a training that takes a year to pay for
    itself halves the score.
    """
    cost, served = evidence.cost, evidence.served_cost
    if cost is None or served is None or served.value <= 0 or cost.value < 0:
        return None
    score = 100 * _clip(1 - cost.value / (2 * served.value))
    text = f"A passing answer costs {cost.value:.4g}, and {served.value:.4g} from what is served."
    cited = [cost, served]
    if evidence.break_even and evidence.yearly_answers and evidence.yearly_answers.value > 0:
        years = max(0.0, evidence.break_even.value) / evidence.yearly_answers.value
        score /= 1 + years
        text += f" The training is paid for after {evidence.break_even.value:,.0f} answers, which is {years:.2g} years."
        cited += [evidence.break_even, evidence.yearly_answers]
    return score, text, tuple(cited)


def futurist(evidence: PanelEvidence) -> Reading | None:
    """Is it still climbing? score = 50 * (1 + climb) * (1 - headroom), with climb = slope / 0.03 held between -1 and 1."""
    slope, headroom = evidence.slope, evidence.headroom
    if slope is None or headroom is None:
        return None
    climb = min(1.0, max(-1.0, slope.value / GAIN))
    ahead = "no candidate is ahead" if headroom.value <= 0 else f"the best candidate is {100 * headroom.value:.1f} points ahead"
    text = f"From checkpoint to checkpoint it gains {100 * slope.value:+.1f} points, and {ahead}."
    return 50 * (1 + climb) * (1 - _clip(headroom.value)), text, (slope, headroom)


def creator(evidence: PanelEvidence) -> Reading | None:
    """Does it read well? score = 100 * (votes * voters + 2.5) / (voters + 5), averaged with 100 * style where there are style prompts.

    The five half votes added on either side keep a few voters from making an extreme; below five voters there is no take.
    """
    votes, voters = evidence.votes, evidence.voters
    if votes is None or voters is None or voters.value < FEWEST_VOTERS:
        return None
    score = 100 * (_clip(votes.value) * voters.value + 2.5) / (voters.value + 5)
    text = f"{voters.value:.0f} people who did not know which was which preferred it in {votes.value:.1%}."
    cited = [votes, voters]
    if evidence.style:
        score = (score + 100 * _clip(evidence.style.value)) / 2
        text += f" Of the style prompts {evidence.style.value:.1%} pass."
        cited.append(evidence.style)
    return score, text, tuple(cited)


LENSES: dict[str, Callable[[PanelEvidence], Reading | None]] = dict(
    zip(PERSONAS, (builder, skeptic, founder, futurist, creator), strict=True)
)


def panel(evidence: PanelEvidence) -> tuple[PanelTake, ...]:
    """The five takes, in order; "No panel take" where a persona's question has no evidence."""
    return tuple(_computed(persona, evidence) for persona in LENSES)


def _computed(persona: str, evidence: PanelEvidence) -> PanelTake:
    reading = LENSES[persona](evidence)
    if reading is None:
        return PanelTake(persona, None, None, NO_TAKE, ())
    score, text, exhibits = reading
    cited = tuple(dict.fromkeys(exhibit.id for exhibit in exhibits))
    if len(cited) < LEAST_CITED:
        return PanelTake(persona, None, None, NO_TAKE, ())
    return PanelTake(persona, score, "ship" if score >= SHIPS_FROM else "skip", text, cited)


def written(persona: str, evidence: PanelEvidence, text: str, cited: Iterable[str], known: Iterable[str] = ()) -> PanelTake:
    """A take in somebody's words beside the computed score: cites at least two pieces of evidence, each of which exists.

    `known` are further ids that may be cited, such as those of prompts and checks.
    """
    if persona not in LENSES:
        raise BadInput(f"'{persona}' is no persona of the panel; expected one of {', '.join(LENSES)}")
    ids = tuple(dict.fromkeys(cited))
    missing = [one for one in ids if one not in {*evidence.by_id(), *known}]
    if missing:
        raise BadInput(
            f"{persona}'s take cites {', '.join(missing)}, which is no evidence of this candidate; cite what the run recorded"
        )
    if len(ids) < LEAST_CITED:
        raise BadInput(f"{persona}'s take cites {len(ids)} pieces of evidence; expected at least {LEAST_CITED}")
    computed = _computed(persona, evidence)
    return computed if computed.score is None else PanelTake(persona, computed.score, computed.stance, text, ids)


def effective_votes(takes: int) -> float:
    """How many independent votes so many takes of one model are worth: n / (1 + (n - 1) * 0.8)."""
    return takes / (1 + (takes - 1) * ALIKE) if takes else 0.0


def summary(takes: Iterable[PanelTake]) -> str:
    """The panel in a line, with what it is worth."""
    stances = [take.stance for take in takes if take.stance]
    if not stances:
        return NO_TAKE
    worth = effective_votes(len(stances))
    return (
        f"{stances.count('ship')} of {len(stances)} lenses ship; they read one run, so they are worth about {worth:.1f} votes"
    )
