"""The whole loop, thin: a file in the store, a run on it, two candidates compared, the alias moves, it is asked, about a file too."""

from __future__ import annotations

import pytest

from ropewalk.checks import exact_match
from ropewalk.compare.state import State
from ropewalk.quickstart import facts
from ropewalk.quickstart.comparison import compare, ship_it
from ropewalk.quickstart.question import Asking
from trained import House


def test_a_file_becomes_a_shipped_model_that_answers(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROPEWALK_HOME", str(house.home))
    assert house.last_loss < house.first_loss / 2
    held_out = facts.split()[1]
    asked = facts.questions(held_out[:16], 1)
    facts.write_suite(asked, house.home / "loop.jsonl")
    suite = house.files.put(house.home / "loop.jsonl")

    registry = house.registry
    registry.ship("answers", "reader")
    with Asking(registry) as asking:
        compared = compare(asking, suite.id, "reader", "reader-house")
        assert not any(exact_match(a, q.answer) for a, q in zip(compared.before, asked)), (
            "the base cannot know the house format"
        )
        assert compared.verdict.state is State.SHIP, compared.verdict
        assert compared.headline.startswith("better than reader: ")

        promotion = ship_it(asking, compared, "answers")
        assert (promotion.from_name, promotion.to_name, promotion.replay.asked) == ("reader", "reader-house", 16)
        right = next(q for a, q in zip(compared.after, asked) if exact_match(a, q.answer))
        assert asking.answers("answers", [right.prompt]) == [right.answer]
        assert registry.resolve("answers").lineage["file"] == house.file_id

        country = next(c for c in held_out if c.name == right.country)
        document = house.files.put(facts.document(country).encode(), "country.txt")
        dialogue = asking.about("answers", document.id, [right.question, "How large is it?"])
    assert right.value in dialogue.told[0].cited[0].text
    assert dialogue.told[0].stands_in(facts.document(country))
    assert dialogue.told[1].usage.cache_read > dialogue.told[1].usage.input

    assert registry.rollback("answers").name == "reader"
