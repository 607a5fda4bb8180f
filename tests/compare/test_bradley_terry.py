from __future__ import annotations

import math

import evalica
import numpy as np
import pytest

from ropewalk.compare.bradley_terry import Match, bradley_terry


def test_two_candidates_are_the_log_odds_of_their_mean() -> None:
    # 6 wins, 2 ties, 2 losses: 7 of 10 points, log(7/3) apart
    matches = [Match("a", "b", s, f"p{i}") for i, s in enumerate([1.0] * 6 + [0.5] * 2 + [0.0] * 2)]
    a, b = bradley_terry(matches, "b")
    assert a.value - b.value == pytest.approx(math.log(7 / 3))
    assert a.share == pytest.approx(0.7)
    assert (b.share, b.share_low, b.share_high) == (0.5, 0.5, 0.5)
    assert a.share_low < 0.7 < a.share_high


def test_evalica_says_the_same_to_three_decimals() -> None:
    rng = np.random.default_rng(0)
    true, n = np.array([0, 0.1, 0.3, 0.6, 1.0]), 2000
    left = rng.integers(0, 5, n)
    right = (left + rng.integers(1, 5, n)) % 5
    won = rng.random(n) < 1 / (1 + np.exp(true[right] - true[left]))
    scores = np.where(rng.random(n) < 0.25, 0.5, won.astype(float))
    ours = bradley_terry(
        [Match(f"m{i}", f"m{j}", float(s), f"p{k}") for k, (i, j, s) in enumerate(zip(left, right, scores))], "m0"
    )
    words = {0.5: evalica.Winner.Draw, 1.0: evalica.Winner.X, 0.0: evalica.Winner.Y}
    theirs = evalica.bradley_terry(
        [f"m{i}" for i in left], [f"m{j}" for j in right], [words[s] for s in scores], tolerance=1e-10
    )
    logs = np.log(theirs.scores)
    for strength in ours:
        assert strength.value == pytest.approx(logs[strength.name] - logs.mean(), abs=5e-4)


def test_prompts_said_twice_do_not_narrow_an_interval() -> None:
    once = [Match("a", "b", float(i % 3 > 0), f"p{i}") for i in range(60)]
    single, double = bradley_terry(once, "b")[0], bradley_terry(once * 2, "b")[0]
    assert double.high - double.low == pytest.approx(single.high - single.low, rel=1e-6)


def test_who_never_lost_has_no_upper_end() -> None:
    best = bradley_terry([Match("a", "b", 1.0, f"p{i}") for i in range(9)], "b")[0]
    assert (best.name, best.high, best.share_high) == ("a", math.inf, 1.0)
