from __future__ import annotations

import pytest

from ropewalk.compare.cards import Card, Take, WarningKind
from ropewalk.compare.claim_reader import claims_of
from ropewalk.compare.contradictions import conflicts, recomputed, warnings_of

FIVE = ("Builder", "Skeptic", "Founder", "Futurist", "Creator")


def takes(*stances: str) -> tuple[Take, ...]:
    return tuple(Take(persona, 80 if stance == "ship" else 20, stance, "x") for persona, stance in zip(FIVE, stances))


def found(card: Card) -> list[str]:
    return [warning.kind.value for warning in warnings_of(card) if warning.kind is not WarningKind.MISSING_TAKE]


@pytest.mark.parametrize(
    ("label", "pricing", "expected"),
    [
        ("Paid", "Open Source", ["price"]),
        ("Paid", "open-source (MIT)", ["price"]),
        ("Paid", "Free", ["price"]),
        ("Paid", "Free trial, then $4 per month", []),
        ("Paid", "Free trial", []),
        ("Paid", "Open source, paid cloud", []),
        ("Free", "$4 per month", ["price"]),
        ("Free", "Free, or $4 per month", []),
        ("Free", None, []),
        (None, "Open Source", []),
    ],
)
def test_a_price_label_and_the_pricing_must_agree(label: str | None, pricing: str | None, expected: list[str]) -> None:
    assert found(Card("x", entry_label=label, pricing=pricing)) == expected


@pytest.mark.parametrize(
    ("printed", "counts", "stances", "expected"),
    [
        (75, (3, 1), ("ship", "ship", "ship", "skip"), []),
        # 2 of 3 are 66.67%: 67 and 66.7 are that, rounded; 66 is not
        (67, (2, 1), ("ship", "ship", "skip"), []),
        (66.7, (2, 1), ("ship", "ship", "skip"), []),
        (66, (2, 1), ("ship", "ship", "skip"), ["percent", "percent"]),
        (75, (3, 1), ("ship", "ship"), ["percent", "percent"]),
        (100, (3, 0), ("ship", "ship", "skip"), ["percent", "percent"]),
        (75, None, ("ship", "skip"), ["percent"]),
        (50, None, (), []),
        (60, (1, 1), (), ["percent"]),
        (None, (1, 1), ("ship", "skip"), []),
        (120, None, (), ["score"]),
    ],
)
def test_a_percentage_must_follow_from_counts_and_takes(
    printed: float | None, counts: tuple[int, int] | None, stances: tuple[str, ...], expected: list[str]
) -> None:
    ships, skips = counts or (None, None)
    assert found(Card("x", panel_percent=printed, panel_ships=ships, panel_skips=skips, takes=takes(*stances))) == expected


def test_the_share_is_recomputed_from_takes_then_from_counts() -> None:
    assert recomputed(Card("x", panel_ships=1, panel_skips=3, takes=takes("ship", "ship", "skip", "ship"))) == 75
    assert recomputed(Card("x", panel_ships=2, panel_skips=6)) == 25
    assert recomputed(Card("x", panel_ships=0, panel_skips=0)) is recomputed(Card("x")) is None


def test_chip_and_table_and_scorecard_must_agree() -> None:
    assert found(Card("x", chip="Ship", panel_verdict="Skip")) == ["chip"]
    assert found(Card("x", chip="Ship", takes=takes("skip", "skip", "ship"))) == ["chip"]
    assert found(Card("x", panel_verdict="Skip", takes=takes("ship", "ship", "skip"))) == ["chip"]
    assert found(Card("x", chip="Ship", takes=takes("ship", "skip"))) == []


def test_a_score_goes_with_its_stance_and_its_scale() -> None:
    assert found(Card("x", takes=(Take("Builder", 45, "ship"),))) == ["stance"]
    assert found(Card("x", takes=(Take("Builder", 74, "skip"),))) == ["stance"]
    assert found(Card("x", takes=(Take("Builder", 60, "skip"), Take("Skeptic", 60, "ship")))) == []
    assert found(Card("x", takes=(Take("Builder", 101, "ship"),))) == ["score"]


def test_missing_takes_are_named() -> None:
    card = Card("x", takes=(Take("Builder", 80, "ship", "x"), Take("Skeptic"), Take("Operator", 70, "ship")))
    assert [w.text for w in warnings_of(card)] == ["no panel take from Skeptic, Founder, Futurist, Creator"]
    assert warnings_of(Card("x")) == ()


def test_best_for_that_repeats_the_tagline_and_two_vote_shares_are_seen() -> None:
    assert found(Card("x", tagline="Fast  notes.", best_for="fast notes")) == ["best for"]
    assert found(Card("x", tagline="Fast notes", best_for="teams")) == []
    assert found(Card("x", community_share="64%", community="60% of 12 votes")) == ["community"]
    assert found(Card("x", community_share="64%", community="64,0 % of 12 votes")) == []


def test_two_values_for_one_claim_are_seen() -> None:
    def card(text: str) -> Card:
        return Card("x", claims=claims_of("x", {"description": text}))

    assert found(card("It has 10k stars. By now 12k stars.")) == ["claim"]
    assert found(card("15x faster. It is not 15x faster.")) == ["claim"]
    assert found(card("15x faster. It is not 20x faster.")) == []
    assert found(card("15x faster on A. 20x faster on B.")) == []


def test_one_tool_twice_with_different_facts_is_seen() -> None:
    def card(name: str, label: str, stars: str, home: str | None = None) -> Card:
        return Card(name, entry_label=label, home_url=home, claims=claims_of(name, {"tagline": f"{stars} stars"}))

    cards = [card("Wren Code", "Free", "72k"), card("Other", "Free", "1k"), card("wren-code", "Paid", "100K")]
    assert [warning.text for warning in conflicts(cards)] == [
        "'Wren Code' is on two cards: entry label is 'Free' and 'Paid'",
        "'Wren Code' is on two cards: it has '72k stars' and '100K stars'",
    ]
    assert conflicts(cards[:2]) == conflicts([cards[0], cards[0]]) == ()
    homes = [
        card("Wren", "Free", "1k", "https://a.example"),
        card("Wren", "Paid", "1k", "https://b.example"),
        card("Wren", "Paid", "1k"),
    ]
    # The two with different home pages are two tools; the one without a page is compared with the first.
    assert [warning.text for warning in conflicts(homes)] == ["'Wren' is on two cards: entry label is 'Free' and 'Paid'"]
