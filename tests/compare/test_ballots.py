from __future__ import annotations

import pytest

from ropewalk.compare.ballots import Ballot, tally


def votes(voter: str, choices: str, repeat: bool = False) -> list[Ballot]:
    words = {"n": "new", "o": "old", "s": "same", "b": "both bad"}
    return [Ballot(voter, f"p{i}", words[c], repeat) for i, c in enumerate(choices)]


def test_one_voter_is_one_mean_however_many_ballots() -> None:
    # shares 1, .5, .5, .5, .5: mean .6, though 24 of 32 points were for the new one
    found = tally([*votes("loud", "n" * 20), *(b for v in "abcd" for b in votes(v, "nos"))])
    assert found.share == pytest.approx(0.6)
    assert found.low is not None
    assert found.low < 0.5


def test_below_five_voters_there_is_no_percentage() -> None:
    found = tally([b for v in "abcd" for b in votes(v, "nb")])
    assert (found.share, found.n_ballots, found.both_bad) == (None, 8, 4)
    assert tally([]).share is None


def test_repeats_count_for_consistency_only() -> None:
    found = tally([*votes("a", "nnoo"), *votes("a", "no", repeat=True)]).voters[0]
    assert (found.n_ballots, found.consistency) == (4, 0.5)


def test_who_votes_unlike_everybody_is_named() -> None:
    found = tally([*(b for v in "abcdef" for b in votes(v, "nono")), *votes("stuffer", "n" * 30)])
    assert [voter.name for voter in found.voters if voter.odd] == ["stuffer"]
