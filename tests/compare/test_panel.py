from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ropewalk.compare
from ropewalk.compare.panel import (
    Exhibit,
    PanelEvidence,
    PanelTake,
    builder,
    creator,
    effective_votes,
    founder,
    futurist,
    panel,
    skeptic,
    summary,
    written,
)
from ropewalk.errors import BadInput

VALUES = {
    "pass_rate_low": 0.8,
    "format_errors": 0.05,
    "worst_slice": 0.75,
    "regressions": 0.02,
    "flip_rate": 0.1,
    "leakage": 0.0,
    "cost": 0.3,
    "served_cost": 0.4,
    "break_even": 5000,
    "yearly_answers": 10_000,
    "slope": 0.015,
    "headroom": 0.1,
    "votes": 0.6,
    "voters": 15,
    "style": 0.9,
}
WHOLE = PanelEvidence(**{name: Exhibit(f"e-{name}", value) for name, value in VALUES.items()})


def of(**values: float) -> PanelEvidence:
    return PanelEvidence(**{name: Exhibit(f"e-{name}", value) for name, value in values.items()})


def test_each_score_follows_its_formula() -> None:
    scores = {take.persona: take.score for take in panel(WHOLE)}
    # 100 * .8 * .95;  100 * .75 * .98 * .9 * 1;  100 * (1 - .3/.8) / 1.5;  50 * 1.5 * .9;  (100 * (9 + 2.5) / 20 + 90) / 2
    expected = {"Builder": 76.0, "Skeptic": 66.15, "Founder": 62.5 / 1.5, "Futurist": 67.5, "Creator": 73.75}
    assert scores == pytest.approx(expected)
    assert [take.stance for take in panel(WHOLE)] == ["ship", "ship", "skip", "ship", "ship"]


def test_a_take_cites_what_its_score_rests_on() -> None:
    cited = {take.persona: take.cited for take in panel(WHOLE)}
    assert cited["Skeptic"] == ("e-worst_slice", "e-regressions", "e-flip_rate", "e-leakage")
    assert cited["Founder"] == ("e-cost", "e-served_cost", "e-break_even", "e-yearly_answers")
    assert {one for ids in cited.values() for one in ids} == set(WHOLE.by_id())
    assert panel(WHOLE)[0].text == "At least 80.0% of the checks pass, and 5.0% of the answers break their format."


@pytest.mark.parametrize(
    ("cost", "served", "score"), [(0.4, 0.4, 50), (0.32, 0.4, 60), (0.0, 0.4, 100), (0.8, 0.4, 0), (2.0, 0.4, 0)]
)
def test_the_founder_compares_with_what_is_served(cost: float, served: float, score: float) -> None:
    reading = founder(of(cost=cost, served_cost=served))
    assert reading is not None
    assert reading[0] == pytest.approx(score)


@pytest.mark.parametrize(
    ("slope", "headroom", "score"), [(0, 0, 50), (0.03, 0, 100), (0.5, 0, 100), (-0.5, 0, 0), (0.03, 0.25, 75)]
)
def test_the_futurist_reads_slope_and_headroom(slope: float, headroom: float, score: float) -> None:
    reading = futurist(of(slope=slope, headroom=headroom))
    assert reading is not None
    assert reading[0] == pytest.approx(score)


def test_few_voters_do_not_make_an_extreme() -> None:
    assert creator(of(votes=1.0, voters=4)) is None
    few, many = creator(of(votes=1.0, voters=5)), creator(of(votes=1.0, voters=95))
    assert few is not None
    assert many is not None
    assert (few[0], many[0]) == pytest.approx((75.0, 97.5))  # (5 + 2.5) / 10 and (95 + 2.5) / 100


def test_no_evidence_is_no_panel_take() -> None:
    for take in panel(PanelEvidence()):
        assert (take.score, take.stance, take.text, take.cited) == (None, None, "No panel take", ())
    assert builder(of(pass_rate_low=0.9)) is skeptic(of(worst_slice=0.9)) is None
    assert founder(of(cost=1, served_cost=0)) is None
    assert founder(of(cost=1, served_cost=1, break_even=5, yearly_answers=0)) == founder(of(cost=1, served_cost=1))
    assert summary(panel(PanelEvidence())) == "No panel take"


def test_one_id_under_two_names_is_one_piece_of_evidence() -> None:
    same = PanelEvidence(pass_rate_low=Exhibit("m1", 0.9), format_errors=Exhibit("m1", 0.1))
    assert panel(same)[0].score is None


def test_a_written_take_keeps_the_computed_score() -> None:
    take = written("Builder", WHOLE, "It fits.", ["e-format_errors", "prompt-7"], known=["prompt-7"])
    assert take == PanelTake("Builder", pytest.approx(76.0), "ship", "It fits.", ("e-format_errors", "prompt-7"))
    assert written("Builder", of(cost=1, served_cost=1), "It fits.", ["e-cost", "e-served_cost"]).text == "No panel take"


@pytest.mark.parametrize(
    ("persona", "cited", "message"),
    [
        ("Builder", ["e-cost", "m99"], "cites m99, which is no evidence"),
        ("Builder", ["e-cost", "e-cost"], "cites 1 pieces of evidence; expected at least 2"),
        ("Builder", [], "at least 2"),
        ("Prophet", ["e-cost", "e-slope"], "'Prophet' is no persona"),
    ],
)
def test_a_take_that_cites_too_little_or_nothing_that_exists_is_refused(persona: str, cited: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        written(persona, WHOLE, "Trust me.", cited)


@given(st.fixed_dictionaries({}, optional={field.name: st.floats(-1e6, 1e6) for field in fields(PanelEvidence)}))
def test_every_score_is_of_a_hundred_and_cites_at_least_two(values: dict[str, float]) -> None:
    for take in panel(of(**values)):
        if take.score is None:
            assert take.cited == ()
        else:
            assert 0 <= take.score <= 100
            assert len(take.cited) >= 2
            assert take.stance == ("ship" if take.score >= 60 else "skip")


def test_evidence_has_an_id_and_a_finite_number() -> None:
    for exhibit in (("", 1.0), ("m1", float("nan")), ("m1", float("inf"))):
        with pytest.raises(ValueError, match="finite"):
            Exhibit(*exhibit)


def test_the_panels_line_says_what_it_is_worth() -> None:
    # 5 / (1 + 4 * .8) = 1.19
    assert summary(panel(WHOLE)) == "4 of 5 lenses ship; they read one run, so they are worth about 1.2 votes"
    assert (effective_votes(0), effective_votes(1)) == (0, 1)
    assert summary(panel(replace(WHOLE, cost=None))).startswith("4 of 4")


def test_nothing_that_makes_a_verdict_knows_the_panel() -> None:
    folder = Path(ropewalk.compare.__file__).parent
    decides = {"rule.py", "state.py", "evidence.py", "verdict.py", "statistics.py", "anytime.py", "bradley_terry.py"}
    for path in (path for path in folder.glob("*.py") if path.name in decides):
        named = [node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not {"ropewalk.compare.panel", "ropewalk.compare.cards"} & set(named), path
    assert (folder / "verdict.py").exists()
