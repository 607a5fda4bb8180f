from __future__ import annotations

import re

from ropewalk.quickstart import facts
from ropewalk.quickstart.invented import FILLER, Inventor


def test_the_same_seed_invents_the_same() -> None:
    assert [Inventor(3).conversation(4, 3) for _ in range(2)] == [Inventor(3).conversation(4, 3) for _ in range(2)]
    assert Inventor(3).conversation(4, 3) != Inventor(4).conversation(4, 3)


def test_every_answer_can_be_copied_from_the_passage() -> None:
    inventor = Inventor(0)
    for _ in range(300):
        messages = inventor.conversation(5, 4)
        passage = messages[0]["content"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(m["content"] in passage for m in messages[1::2])


def test_no_real_entity_is_invented() -> None:
    """Capitalised words of invented passages, less the words the templates share with English, are none of the real names' words."""
    names = (
        {c.name for c in facts.countries()} | {c.capital for c in facts.countries()} | {c.currency for c in facts.countries()}
    )
    inventor, drawn = Inventor(1, facts.words()), set()
    for _ in range(3000):
        drawn |= {inventor.name(), inventor.word(), inventor.person(), inventor.capitals(2), "." + inventor.capitals(2).lower()}
    assert not drawn & names
    assert not drawn & {text for c in facts.countries() for text in (c.code, c.currency_code, c.domain)}


def test_no_row_of_the_quickstart_is_in_the_corpus() -> None:
    inventor = Inventor(2, facts.words())
    corpus = " ".join(message["content"] for _ in range(1500) for message in inventor.conversation(5, 4))
    for country in facts.countries():
        assert facts.document(country) not in corpus
        assert not re.search(rf"\b{re.escape(country.capital)}\b", corpus), country.capital


def test_a_forbidden_word_is_never_drawn() -> None:
    first = Inventor(5).word()
    assert Inventor(5, [first]).word() != first


def test_passages_differ_in_layout() -> None:
    inventor = Inventor(6)
    passages = [inventor.passage("Abc", "town", inventor.facts(4)) for _ in range(200)]
    assert any("\n- " in p for p in passages)
    assert any("| " in p for p in passages)
    assert any(filler in p for p in passages for filler in FILLER)
