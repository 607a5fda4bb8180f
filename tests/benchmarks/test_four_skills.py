"""The benchmark "four skills": the curve of a short run rises, and what counts as learnt, caught and kept."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def four_skills():
    sys.path.insert(0, str(FOLDER))
    try:
        import four_skills

        yield four_skills
    finally:
        sys.path.remove(str(FOLDER))


def made(method="dapo", seed=0, planted="", heldout=0.99, curve=0.95, stopped="", evaluated=0.99, late=False):
    return {
        "method": method,
        "seed": seed,
        "planted": planted,
        "asynchronous": late,
        "heldout": heldout,
        "curve": curve,
        "evaluated": evaluated,
        "stopped": stopped,
        "cpu_s": 20.0 + seed,
        "first": 0.5,
    }


STARTS = {0: {"sampled": 0.2, "greedy": 0.25, "folder": "somewhere"}}


def test_of_a_method_its_worst_seed_counts(four_skills):
    runs = [made(), made(seed=1, heldout=0.9, curve=0.8), made("grpo"), made(late=True)]
    result = four_skills.summary(runs, STARTS)
    assert list(result["methods"]) == ["dapo", "grpo", "dapo, async 1"]
    assert result["methods"]["dapo"] | {"seeds": 0} == {"heldout": 0.9, "curve": 0.8, "cpu_s": 21.0, "seeds": 0}
    assert result["gates"]["methods"] == {"passed": True, "of": 3, "held": 3}
    worse = four_skills.summary([made(), made(seed=1, heldout=0.84)], STARTS)
    assert not worse["gates"]["methods"]["passed"]


def test_a_planted_bug_is_caught_by_its_curve_or_by_a_run_that_stops(four_skills):
    bugs = [made(planted="sign", curve=0.0), made(planted="shifted", curve=0.9, stopped="they disagree"), made(planted="stale")]
    result = four_skills.summary([made(), *bugs], STARTS)
    assert (result["planted"], result["planted_caught"]) == (3, 2)
    assert not result["gates"]["planted_caught"]["passed"]
    assert result["gates"]["methods"]["passed"]
    assert "planted: stale" in four_skills.report(result)


def test_a_warm_start_must_be_neither_right_nor_lost(four_skills):
    for sampled, greedy, passed in ((0.2, 0.3, True), (0.05, 0.3, False), (0.3, 0.9, False)):
        starts = {0: {"sampled": sampled, "greedy": greedy}}
        assert four_skills.summary([made()], starts)["gates"]["warm_starts"]["passed"] == passed


def test_what_a_file_holds_is_kept(four_skills, tmp_path):
    runs = [made(), made(seed=2), made(late=True), made(planted="sign", curve=0.0)]
    file = tmp_path / "result.json"
    assert four_skills.runs_in(file) == []
    file.write_text(json.dumps(four_skills.summary(runs, STARTS)))
    assert four_skills.runs_in(file) == runs


def test_a_short_run_learns_what_is_rewarded(four_skills, tmp_path, monkeypatch):
    """A quarter of the benchmark's steps from a third of its warm start."""
    monkeypatch.setitem(four_skills.WARM_UP, "max_steps", 250)
    four_skills.warm_up(tmp_path / "start", 0)
    start = json.loads((tmp_path / "start/found.json").read_text())
    assert start["sampled"] < 0.35
    four_skills.learn(four_skills.Job("dapo", 0, steps=30), tmp_path / "start/run/model", tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert sum(found["rewards"][:3]) / 3 < 0.4
    assert sum(found["rewards"][-5:]) / 5 > 0.6
    assert found["heldout"] == pytest.approx(found["evaluated"], abs=0.02)
    assert found["mismatch"] < 1e-4
