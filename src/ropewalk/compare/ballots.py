"""What people's blind votes say: one voter, one mean, however many ballots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from scipy.special import bdtr

from ropewalk.compare.statistics import holm, of_means

VOTERS = 5  # below it no percentage is told
ODD = 0.01  # Holm over voters: whose ballots differ this much from the others' is named


@dataclass(frozen=True, slots=True)
class Ballot:
    """One vote on one prompt, already turned to the candidate's side."""

    voter: str
    prompt: str
    choice: str  # "new", "old", "same" or "both bad"
    repeat: bool = False  # the same pair again, sides swapped: it counts for consistency only


@dataclass(frozen=True)
class Voter:
    """One person's ballots."""

    name: str
    n_ballots: int
    share: float  # for the candidate, a tie being half
    consistency: float | None  # how many repeats said the same again; None without repeats
    odd: bool  # votes unlike everybody else, beyond chance; told, not left out


@dataclass(frozen=True)
class Tally:
    """All voters together; an opinion, which never moves a verdict."""

    voters: tuple[Voter, ...]
    n_ballots: int
    both_bad: int
    share: float | None  # the mean over voters; None below five of them
    low: float | None
    high: float | None


SCORES = {"new": 1.0, "old": 0.0, "same": 0.5, "both bad": 0.5}


def tally(ballots: Sequence[Ballot]) -> Tally:
    """The mean over voters with a t-interval over voters: twenty ballots of one person are one opinion."""
    counted = [ballot for ballot in ballots if not ballot.repeat]
    by_voter: dict[str, list[Ballot]] = {}
    for ballot in counted:
        by_voter.setdefault(ballot.voter, []).append(ballot)
    odd = odd_voters(by_voter)
    voters = tuple(
        Voter(name, len(own), share_of(own), consistency(name, own, ballots), name in odd) for name, own in by_voter.items()
    )
    found = of_means([2 * voter.share - 1 for voter in voters], len(counted)) if len(voters) >= VOTERS else None
    shares = (
        [(1 + edge) / 2 for edge in (found.interval.effect, found.interval.low, found.interval.high)] if found else [None] * 3
    )
    return Tally(voters, len(counted), sum(b.choice == "both bad" for b in counted), *shares)


def share_of(ballots: Sequence[Ballot]) -> float:
    return mean(SCORES[ballot.choice] for ballot in ballots)


def consistency(name: str, own: Sequence[Ballot], ballots: Sequence[Ballot]) -> float | None:
    """How often one voter said the same of a pair that came back."""
    first = {ballot.prompt: ballot.choice for ballot in own}
    again = [first[b.prompt] == b.choice for b in ballots if b.repeat and b.voter == name and b.prompt in first]
    return mean(again) if again else None


def odd_voters(by_voter: dict[str, list[Ballot]]) -> set[str]:
    """Voters with five decided ballots or more whose share would be rare if they voted as the others together do."""
    wins = {
        name: (sum(b.choice == "new" for b in own), sum(b.choice in ("new", "old") for b in own))
        for name, own in by_voter.items()
    }
    won, decided = sum(w for w, _ in wins.values()), sum(d for _, d in wins.values())
    tested = {name: pair for name, pair in wins.items() if pair[1] >= VOTERS and decided > pair[1]}
    chances = []
    for own_won, own_decided in tested.values():
        others = (won - own_won + 1) / (decided - own_decided + 2)  # one made-up ballot for either side
        below = float(bdtr(own_won, own_decided, others))
        above = 1 - (float(bdtr(own_won - 1, own_decided, others)) if own_won else 0.0)
        chances.append(min(1.0, 2 * min(below, above)))
    return {name for name, chance in zip(tested, holm(chances)) if chance <= ODD}
