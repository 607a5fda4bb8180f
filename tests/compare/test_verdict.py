from __future__ import annotations

import pytest

from ropewalk.compare.verdict import Verdict, compare, two_sided


def rows(both: int, only_new: int, only_old: int, neither: int) -> tuple[list[bool], list[bool]]:
    old = [True] * both + [False] * only_new + [True] * only_old + [False] * neither
    new = [True] * both + [True] * only_new + [False] * only_old + [False] * neither
    return old, new


def test_the_p_value_is_that_of_fair_coins() -> None:
    # 9 to 1: 2 * (C(10,0) + C(10,1)) / 2^10 = 22 / 1024
    assert two_sided(9, 1) == pytest.approx(22 / 1024)
    assert two_sided(1, 9) == two_sided(9, 1)
    # 6 to 0: 2 / 2^6
    assert two_sided(6, 0) == 0.03125
    assert two_sided(0, 0) == two_sided(3, 3) == two_sided(1, 0) == 1.0


def test_counts_are_of_pairs() -> None:
    outcome = compare(*rows(4, 9, 1, 6))
    assert (outcome.both, outcome.only_new, outcome.only_old, outcome.neither) == (4, 9, 1, 6)


@pytest.mark.parametrize(
    ("only_new", "only_old", "verdict"),
    [
        (9, 1, Verdict.SHIP),
        (1, 9, Verdict.SKIP),
        (5, 4, Verdict.TIE),
        (5, 0, Verdict.NOT_ENOUGH),
        (6, 0, Verdict.SHIP),
        (0, 0, Verdict.NOT_ENOUGH),
    ],
)
def test_the_verdict_follows_from_the_rows_that_differ(only_new: int, only_old: int, verdict: Verdict) -> None:
    assert compare(*rows(50, only_new, only_old, 50)).verdict is verdict


def test_candidates_that_answered_different_rows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        compare([True, False], [True])
