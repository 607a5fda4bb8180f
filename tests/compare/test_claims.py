from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.compare.claim_reader import claims_of
from ropewalk.compare.claims import Claim, ClaimStatus, status


def read(text: str, owner: str = "Quillmoor") -> list[Claim]:
    return list(claims_of(owner, {"description": text}))


@pytest.mark.parametrize(
    ("text", "value", "unit", "sense", "metric"),
    [
        ("It trains 15x faster.", 15, "x", "faster", "speed"),
        ("15 × faster", 15, "x", "faster", "speed"),
        ("15 times faster", 15, "x", "faster", "speed"),
        ("15x faster MoE training", 15, "x", "faster", "MoE training speed"),
        ("with 40x less memory", 40, "x", "less", "memory"),
        ("58% faster fine-tuning", 58, "%", "faster", "fine-tuning speed"),
        ("58 percent fewer tokens", 58, "%", "less", "tokens"),
        ("a 70% reduction in latency", 70, "%", "less", "latency"),
        ("3 times cheaper inference", 3, "x", "cheaper", "inference cost"),
        ("cuts memory use by 40%", 40, "%", "less", "memory use"),
        ("speeds up decoding by 2x", 2, "x", "faster", "decoding"),
        ("latency drops to 3 ms", 3, "ms", "", "time"),
        ("saves answers in 3 formats", 3, "formats", "", "formats"),
        ("accuracy of 92%", 92, "%", "", "accuracy"),
        ("92% accuracy", 92, "%", "", "accuracy"),
        ("fits a 30B on one GPU", 30e9, "parameters", "", "model size"),
        ("a 7.5B model", 7.5e9, "parameters", "", "model size"),
        ("costs $4 per month", 4, "USD per month", "", "price"),
        ("€1,200 a year", 1200, "EUR per year", "", "price"),
        ("9 USD/mo", 9, "USD per month", "", "price"),
        ("$0.30 per 1M tokens", 0.3, "USD per 1m tokens", "", "price"),
        ("10k stars", 10_000, "stars", "", "stars"),
        ("10K GitHub stars", 10_000, "GitHub stars", "", "stars"),
        ("1,234,567 downloads", 1_234_567, "downloads", "", "downloads"),
        ("10 000 stars", 10_000, "stars", "", "stars"),
        ("1'000 users", 1000, "users", "", "users"),
        ("1.234.567 users", 1_234_567, "users", "", "users"),
        ("1,5x slower", 1.5, "x", "slower", "speed"),
        ("throughput of 3,000 tokens/s", 3000, "tokens/s", "", "throughput"),
        ("4.5 GB less memory", 4.5, "GB", "less", "memory"),
        ("in 20 ms", 20, "ms", "", "time"),
    ],
)
def test_a_number_in_prose_becomes_a_claim(text: str, value: float, unit: str, sense: str, metric: str) -> None:
    (claim,) = read(text)
    assert (claim.value, claim.unit, claim.sense, claim.metric) == (value, unit, sense, metric)
    assert claim.text in text
    assert (claim.high, claim.negated, claim.source) == (None, False, "description")


@pytest.mark.parametrize(
    ("text", "value", "high", "unit"),
    [
        ("10-20x faster", 10, 20, "x"),
        ("10x–20x faster", 10, 20, "x"),
        ("10 to 20% better accuracy", 10, 20, "%"),
        ("between 10 and 20 ms", 10, 20, "ms"),
        ("$4–$9 per month", 4, 9, "USD per month"),
        ("10-20k stars", 10_000, 20_000, "stars"),
        ("900-2k stars", 900, 2000, "stars"),
    ],
)
def test_a_range_keeps_both_ends(text: str, value: float, high: float, unit: str) -> None:
    (claim,) = read(text)
    assert (claim.value, claim.high, claim.unit) == (value, high, unit)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("at least 15x faster", "at least"),
        ("more than 15x faster", "at least"),
        ("no less than 15x faster", "at least"),
        ("100+ models", "at least"),
        ("at most 24 GB", "at most"),
        ("no more than 24 GB", "at most"),
        ("below 20 ms", "at most"),
        ("up to 3x cheaper", "up to"),
        ("about 3x cheaper", "about"),
        ("~3x cheaper", "about"),
        ("from $9 per month", "at least"),
    ],
)
def test_a_bound_before_the_number_is_kept(text: str, bound: str) -> None:
    (claim,) = read(text)
    assert (claim.bound, claim.negated, claim.text) == (bound, False, text)


@pytest.mark.parametrize(
    ("text", "negated"),
    [
        ("not 15x faster", True),
        ("It isn't really 15x faster", True),
        ("never 15x faster", True),
        ("not just 15x faster", False),
        ("is not slow: 15x faster", False),
    ],
)
def test_a_denial_is_no_assertion(text: str, negated: bool) -> None:
    (claim,) = read(text)
    assert (claim.value, claim.negated) == (15, negated)


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("58% faster training on one GPU, they say", "on one GPU"),
        ("40x less memory than the stock loop. Nice.", "than the stock loop"),
        ("3x cheaper (batch 8)", "batch 8"),
        ("15x faster with v2.1 and 3 workers", "with v2.1"),
        ("15x faster!", ""),
    ],
)
def test_conditions_end_with_the_clause(text: str, conditions: str) -> None:
    assert read(text)[0].conditions == conditions


@pytest.mark.parametrize(
    "text",
    [
        "GPT-4 and v2.1.3",
        "since 2026",
        "on 2026-04-21",
        "3/4 of it",
        "at 12:30",
        "the 3rd",
        "4o",
        "5 of these",
        "10.0.0.1",
        "12",
        "1" * 500,
    ],
)
def test_names_dates_versions_and_bare_numbers_claim_nothing(text: str) -> None:
    assert read(text) == []


def test_the_number_of_a_tools_name_is_no_claim() -> None:
    assert read("Tidepool Notes 2 reads your files, unlike Python 3 scripts.", "Tidepool Notes 2") == []


def test_a_text_that_is_repeated_claims_once_and_ids_are_stable() -> None:
    claims = claims_of("Quillmoor", {"tagline": "15x faster", "description": "15x faster", "pricing": "15x faster today"})
    assert [claim.source for claim in claims] == ["tagline", "pricing"]
    assert claims == claims_of(
        "Quillmoor", {"tagline": "15x faster", "description": "15x faster", "pricing": "15x faster today"}
    )
    assert len({claim.id for claim in claims}) == 2


PIECES = [
    "15",
    "x",
    " faster",
    "%",
    " less",
    " memory",
    ",",
    ".",
    "-",
    " not ",
    "$",
    " per month",
    "(",
    ")",
    "k",
    "B",
    " on ",
    "\u202f",
    "0",
    "é",
    "\n",
]


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=300), st.lists(st.sampled_from(PIECES), max_size=60).map("".join)))
def test_any_text_is_read_and_a_claim_is_part_of_it(text: str) -> None:
    for claim in read(text):
        assert claim.text in text
        assert claim.conditions in text
        assert claim.value >= 0
        assert claim.high is None or claim.high > claim.value


@pytest.mark.parametrize(
    "piece", ["1", "1,", "1 ", "1x ", "10k stars ", "not ", "1-", "$1 per ", "15x faster than ", "1 000", "a.1", "(1x"]
)
def test_a_megabyte_of_one_piece_is_read_in_linear_time(piece: str) -> None:
    begin = time.process_time()
    read(piece * (1_000_000 // len(piece)))
    assert time.process_time() - begin < 2


def claim(value: float = 15, **more: object) -> Claim:
    return Claim("clm_1", "said", "speed", value, "x", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "low", "high", "expected"),
    [
        (claim(), 14, 16, "confirmed"),
        (claim(), 2.1, 2.5, "contradicted"),
        (claim(), 15.1, 20, "contradicted"),
        (claim(), 15, 15, "confirmed"),
        # a tenth of 15 is 1.5, so "about 15" reaches from 13.5 to 16.5
        (claim(bound="about"), 13, 13.6, "confirmed"),
        (claim(bound="about"), 12, 13.4, "contradicted"),
        (claim(bound="at least"), 15, 18, "confirmed"),
        (claim(bound="at least"), 14, 18, "untested"),
        (claim(bound="at least"), 12, 14, "contradicted"),
        (claim(bound="at most"), 12, 15, "confirmed"),
        (claim(bound="at most"), 12, 16, "untested"),
        (claim(bound="at most"), 16, 17, "contradicted"),
        (claim(bound="up to"), 14, 16, "confirmed"),
        (claim(bound="up to"), 2, 3, "untested"),
        (claim(10, high=20.0), 11, 19, "confirmed"),
        (claim(10, high=20.0), 9, 19, "untested"),
        (claim(10, high=20.0), 20, 22, "untested"),
        (claim(bound="up to"), 14, 15, "confirmed"),
        (claim(10, high=20.0), 21, 22, "contradicted"),
        (claim(negated=True), 2, 3, "confirmed"),
        (claim(negated=True), 14, 16, "untested"),
        (claim(bound="at least", negated=True), 16, 18, "contradicted"),
        (claim(bound="at least", negated=True), 12, 14, "confirmed"),
        (claim(10, high=20.0, negated=True), 11, 19, "contradicted"),
    ],
)
def test_a_claim_is_confirmed_only_by_an_interval_that_contains_it(made: Claim, low: float, high: float, expected: str) -> None:
    assert status(made, low, high) is ClaimStatus(expected)


def test_without_a_finite_measurement_a_claim_is_untested() -> None:
    assert status(claim()) is status(claim(), 1, None) is status(claim(), float("-inf"), 20) is ClaimStatus.UNTESTED
    assert status(claim(), float("nan"), 20) is ClaimStatus.UNTESTED


def test_an_interval_is_given_lower_end_first() -> None:
    with pytest.raises(ValueError, match="3 to 2"):
        status(claim(), 3, 2)
