"""What is measured, what it costs, and what that says of claims."""

from __future__ import annotations

import pytest

from ropewalk.compare.claim_measures import reading
from ropewalk.compare.claims import Claim
from ropewalk.compare.evidence import Measured, Measurement, Metric
from ropewalk.compare.measures import figures, percentile, wilson
from ropewalk.compare.prices import Tariff
from ropewalk.compare.runs import CheckResult, Output

TOKENS = Tariff(1e-6, 5e-7, 2e-6, None, "2026-11-22", "list")
HOURLY = Tariff(hour=3.6)  # a thousandth of a dollar a second


def output(number, passed, total_ms=1000.0, retries=0, error=None):
    checks = () if passed is None else (CheckResult(0, "exact", False, passed, ""),)
    text = None if error else "text"
    return Output(
        f"o{number}", "run", f"p{number}", 0, "", text, "end_turn", 100, 20, 10, 50.0, total_ms, retries, error, None, 0, None, checks
    )  # fmt: skip


def by_metric(*outputs, tariff=TOKENS, at_once=1, peak=None):
    return {one.metric: one for one in figures(outputs, tariff, at_once, peak)}


def test_what_a_passing_answer_costs_counts_the_failing_ones_and_retries():
    # one answer: 100 at 1 + 20 at 0.5 + 10 at 2 millionths = 130; five calls (one tried twice), two of which pass
    found = by_metric(output(1, True), output(2, True), output(3, False), output(4, False, retries=1))
    assert found["cost per passing answer"].measured.value == pytest.approx(5 * 130e-6 / 2)
    assert found["cost per passing answer"].unit == "USD"
    assert found["retries"].measured.value == 1
    assert found["pass rate"].measured.value == 0.5


def test_an_hour_of_this_machine_is_shared_by_those_who_are_answered_side_by_side():
    found = by_metric(output(1, True), output(2, True), tariff=HOURLY, at_once=4)
    assert found["cost per passing answer"].measured.value == pytest.approx(0.001 / 4)
    seconds = by_metric(output(1, True), output(2, True), tariff=Tariff(), at_once=4)["cost per passing answer"]
    assert (seconds.measured.value, seconds.unit) == (0.25, "s of this machine")


def test_times_that_were_taken_elsewhere_are_left_out():
    elsewhere = Output("o", "run", "p", 0, "", "text", None, 9, 0, 9, None, None, 0, None, "out_1", 0, None, ())
    found = by_metric(elsewhere, tariff=HOURLY)
    assert "p95 latency" not in found
    assert "cost per passing answer" not in found
    assert "cost per passing answer" in by_metric(elsewhere), "what is paid by the token costs the same everywhere"


def test_where_nothing_passes_there_is_no_cost_of_a_passing_answer():
    assert "cost per passing answer" not in by_metric(output(1, False))
    without_checks = by_metric(output(1, None), output(2, None, error="down"))
    assert without_checks["cost per passing answer"].measured.value == pytest.approx(2 * 130e-6)
    assert without_checks["errors"].measured.value == 1
    assert "pass rate" not in without_checks


def test_a_percentile_has_an_interval_that_narrows():
    few, many = (percentile([float(n % 100) for n in range(count)], 95) for count in (40, 4000))
    assert many.low <= many.value <= many.high
    assert many.high - many.low < few.high - few.low
    assert percentile([3.0], 95) == Measured(3.0)


def test_a_share_has_wilsons_interval():
    # 8 of 10: 0.4902 to 0.9433 (Wilson 1927)
    found = wilson(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        (Claim("c", "2x faster", "speed", 2.0, "x", "faster"), (2000 / 1250, 2200 / 800)),
        (Claim("c", "50% faster", "speed", 50.0, "%", "faster"), (60.0, 175.0)),
        (Claim("c", "half the memory", "memory", 50.0, "%", "less"), (75.0, 75.0)),
        (Claim("c", "2x faster on a phone", "speed", 2.0, "x", "faster", "on a phone"), None),
        (Claim("c", "2x slower", "speed", 2.0, "x", "slower"), None),
        (Claim("c", "41k stars", "stars", 41000.0, "stars"), None),
        (Claim("c", "2x cheaper", "cost", 2.0, "x", "cheaper"), None),
    ],
)
def test_a_claim_is_held_against_what_was_measured_of_it(claim, expected):
    latency = Measurement("m1", Metric.LATENCY, "ms", Measured(2100, 2000, 2200), Measured(1000, 800, 1250), "a", "a")
    memory = Measurement("m2", Metric.MEMORY, "MB", Measured(400), Measured(100), "a", "a")
    elsewhere = Measurement("m3", Metric.COST, "USD", Measured(2), Measured(1), "a", "b")
    found = reading(claim, [latency, memory, elsewhere])
    assert (None if found is None else pytest.approx(found[1:])) == expected
