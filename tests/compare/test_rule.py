from __future__ import annotations

import pytest

from ropewalk.compare.evidence import (
    Evidence,
    Finding,
    Guardrail,
    JudgeRecord,
    Kind,
    Limits,
    Measured,
    Measurement,
    Metric,
    Row,
    Trouble,
)
from ropewalk.compare.rule import DEFAULT, decide
from ropewalk.compare.state import State
from ropewalk.compare.verdict import Verdict


def rows(both: int, fixed: int, broken: int, held: bool = False, **more: object) -> list[Row]:
    pairs = [(1.0, 1.0)] * both + [(0.0, 1.0)] * fixed + [(1.0, 0.0)] * broken
    name = "h" if held else "p"
    return [Row(f"{name}{i}", f"{name}{i}", old, new, held=held, **more) for i, (old, new) in enumerate(pairs)]  # type: ignore[arg-type]


def said(found: list[Row], limits: Limits = DEFAULT, **more: object) -> Verdict:
    return decide([Evidence("new", "old", found, **more)], limits)[0]  # type: ignore[arg-type]


def cost(new: float, old: float = 1.0, machine: str = "m") -> Measurement:
    return Measurement("cost", Metric.COST, "USD", Measured(old), Measured(new), "m", machine)


def judged(n: int, score: float, lengths: tuple[int, int] | None = None) -> list[Row]:
    return [Row(f"j{i}", f"j{i}", 1 - score, score, Kind.JUDGE, lengths=lengths) for i in range(n)]


@pytest.mark.parametrize(
    ("both", "fixed", "broken", "state"),
    [
        (280, 20, 0, State.SHIP),
        (280, 0, 20, State.SKIP),
        (300, 0, 0, State.TIE),
        (20, 2, 1, State.NOT_ENOUGH),
        (270, 18, 12, State.NOT_ENOUGH),
    ],
)
def test_the_state_follows_from_the_rows_that_differ(both: int, fixed: int, broken: int, state: State) -> None:
    assert said(rows(both, fixed, broken)).state is state


def test_not_enough_says_how_many_more() -> None:
    verdict = said(rows(270, 18, 12))
    assert verdict.n_more is not None
    assert f"about {verdict.n_more:,} more prompts" in verdict.reasons[0].sentence


def test_nothing_run_is_an_opinion_whatever_else_is_known() -> None:
    assert said([], ran=False).state is State.OPINION_ONLY


def test_what_makes_a_run_worthless_comes_before_its_numbers() -> None:
    leak = Trouble("t1", Finding.LEAKAGE, "3 prompts stand in the training file")
    verdict = said(rows(280, 20, 0), troubles=[leak])
    assert (verdict.state, verdict.interval, verdict.reasons[0].evidence) == (State.NO_VERDICT, None, ("t1",))
    told = said(rows(280, 20, 0), troubles=[Trouble("t2", Finding.LINEAGE, "rm refused", blocks=False)])
    assert told.state is State.SHIP
    assert any(reason.evidence == ("t2",) for reason in told.reasons)
    assert said([]).state is State.NO_VERDICT


def test_a_broken_guardrail_or_must_pass_prompt_outweighs_any_gain() -> None:
    assert said(rows(200, 90, 0), guardrails=[Guardrail("g1", "refuses too much", True)]).state is State.SKIP
    lost = Row("m", "m", 1, 0, must_pass=True)
    verdict = said([*rows(200, 90, 0), lost])
    assert verdict.state is State.SKIP
    assert verdict.reasons[0].evidence == ("m",)
    once = Row("m", "m", 1, 0, must_pass=True, repeated=False)
    never = Row("n", "n", 0, 0, must_pass=True)
    assert said([*rows(200, 90, 0), once, never]).state is State.SHIP


def test_a_slice_that_fell_is_named_though_the_whole_rose() -> None:
    fell = [Row(f"s{i}", f"s{i}", 1, 0, slices=("dates",)) for i in range(15)]
    verdict = said([*rows(100, 90, 0, slices=("names",)), *fell])
    assert verdict.state is State.SKIP
    assert verdict.worst is not None
    assert verdict.worst.name == "dates"
    assert "dates" in verdict.reasons[0].sentence


def test_the_same_ships_where_it_is_a_fifth_cheaper_on_the_same_machine() -> None:
    assert said(rows(300, 0, 0), measurements=[cost(0.7)]).state is State.SHIP_CHEAPER
    assert said(rows(300, 0, 0), measurements=[cost(0.9)]).state is State.TIE
    assert said(rows(300, 0, 0), measurements=[cost(0.7, machine="other")]).state is State.TIE


def test_readings_that_overlap_are_no_saving() -> None:
    old, new = Measured(1.0, 0.6, 1.4), Measured(0.7, 0.4, 1.0)
    noisy = Measurement("p95", Metric.LATENCY, "s", old, new, "m", "m")
    assert said(rows(300, 0, 0), measurements=[noisy]).state is State.TIE


def test_better_beyond_the_price_limit_is_not_shipped() -> None:
    assert said(rows(280, 20, 0), Limits(cost_ratio=2.0), measurements=[cost(3.0)]).state is State.SKIP
    assert said(rows(280, 20, 0), measurements=[cost(3.0)]).state is State.SHIP


def test_every_candidate_makes_the_others_harder_to_believe() -> None:
    # 8 to 0: mid-p 1/256 = .0039, alone enough; times 8 candidates .031, which is not
    one = Evidence("a", "old", rows(292, 8, 0))
    assert decide([one])[0].state is State.SHIP
    alike = [Evidence(f"c{i}", "old", rows(298, 1, 1)) for i in range(7)]
    verdict = decide([one, *alike])[0]
    assert verdict.p_adjusted == pytest.approx(8 / 256)
    assert verdict.state is not State.SHIP


def test_the_best_of_several_is_confirmed_on_what_was_held_back() -> None:
    unconfirmed = said(rows(280, 20, 0), chosen_from=8)
    assert (unconfirmed.state, unconfirmed.needs_confirmation, unconfirmed.may_ship) == (State.SHIP, True, False)
    lucky = said([*rows(280, 20, 0), *rows(280, 10, 10, held=True)], chosen_from=8)
    assert (lucky.state, lucky.confirmed, lucky.may_ship) == (State.SHIP, False, False)
    good = said([*rows(280, 20, 0), *rows(280, 20, 0, held=True)], chosen_from=8)
    assert (good.confirmed, good.may_ship, good.n_prompts) == (True, True, 300)
    assert said(rows(280, 20, 0)).may_ship


def test_few_judged_groups_are_read_and_not_counted() -> None:
    judge = JudgeRecord("j", True, True, 0.1, "judge j")
    assert said(judged(19, 1.0), judges=[judge]).state is State.NOT_ENOUGH
    assert said(judged(20, 1.0), judges=[judge]).state is State.SHIP
    assert said(judged(20, 1.0), judges=[JudgeRecord("j", False, True, 0.5, "it flips")]).state is State.NO_VERDICT
    assert said(judged(20, 1.0)).state is State.NO_VERDICT


def test_a_preference_that_length_explains_is_not_shipped() -> None:
    judge = JudgeRecord("j", True, True, 0.1, "judge j")
    # the longer answer always wins, and the new one is longer in 60 of 80
    taste = [
        Row(f"j{i}", f"j{i}", *((0, 1) if i % 4 else (1, 0)), Kind.JUDGE, lengths=(9, 19) if i % 4 else (19, 9))
        for i in range(80)
    ]
    verdict = said(taste, judges=[judge])
    assert verdict.state is State.NOT_ENOUGH
    assert "length" in verdict.reasons[0].sentence


def test_exit_codes_are_those_of_ci() -> None:
    assert [state.exit_code for state in State] == [0, 0, 10, 20, 30, 40, 50]
