from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ropewalk.compare import planted
from ropewalk.compare.anytime import confidence, p_value, stops
from ropewalk.compare.last_selftest import last
from ropewalk.compare.selftest import DIFFERENT, Entry, Selftest, run_selftest, selftest
from ropewalk.errors import BadInput


@pytest.fixture(scope="module")
def found() -> Selftest:
    return selftest(200)


def test_the_rule_is_seldom_wrong_and_sees_what_is_there(found: Selftest) -> None:
    # in 200 runs a rate of 1 % is seen as up to 3 %, one of 90 % as down to 83 %
    assert found.identical_shipped <= 0.03
    assert found.identical_different <= 0.08
    assert found.minus10_skipped >= 0.92
    assert found.plus8_shipped >= 0.83


def test_planted_faults_do_not_fool_it(found: Selftest) -> None:
    assert {name for name, entry in found.planted.items() if entry.rate > entry.bound + 0.04} == set()
    assert len(found.planted) == 12


def test_the_same_seed_gives_the_same_rates() -> None:
    assert selftest(5, seed=3) == selftest(5, seed=3)


def test_what_is_beyond_its_bound_is_told() -> None:
    bad = Selftest(10, 7, "1", 0.0, 0.06, 1.0, 1.0, {"position": Entry("p", 0.2, 0.05)})
    assert bad.failures == ["identical_different", "position"]
    with pytest.raises(BadInput, match="0 runs"):
        selftest(0)


def test_the_command_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Selftest(10, 7, "1", 0.0, 0.0, 1.0, 1.0, {"position": Entry("p", 0.02, 0.05)})
    monkeypatch.setattr("ropewalk.compare.selftest.selftest", lambda runs, seed, progress: good)
    run_selftest(Namespace(json=tmp_path / "s.json", runs=10, seed=7, data=tmp_path))
    written = json.loads((tmp_path / "s.json").read_text())
    assert (written["plus8_shipped"], written["position"]["held"]) == (1.0, True)
    kept = last(tmp_path)
    assert kept is not None
    assert kept.found == written


def test_a_bet_against_no_difference_wins_only_where_there_is_one() -> None:
    # 1 + stake at each of 40 wins, the mean over both ways of 20 stakes each
    assert p_value([1.0] * 40) < 1e-6
    assert p_value([1.0, -1.0] * 40) == 1.0
    assert (stops([1.0] * 40, 0.0125) or 99) < 20
    assert stops([0.0] * 40, 0.0125) is None


def test_an_interval_holds_whenever_one_looks() -> None:
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(60):
        draws = rng.choice([1.0, 0.0, -1.0], p=[0.2, 0.7, 0.1], size=200).tolist()
        seen = [confidence(draws[:n]) for n in (20, 200)]
        missed += any(not i.low <= 0.1 <= i.high for i in seen)
    assert missed <= 4  # of 60, at most 1 in 20 is meant


def test_the_planted_documents_would_fool_who_counts_prompts_one_by_one() -> None:
    rng, clustered, one_by_one = np.random.default_rng(2), 0, 0
    for _ in range(100):
        rows = planted.passes(rng, 200, size=10, shared=0.8)
        clustered += planted.said(rows).state in DIFFERENT
        one_by_one += planted.said([replace(row, group=row.id) for row in rows]).state in DIFFERENT
    assert clustered <= 5
    assert one_by_one >= 15
