from __future__ import annotations

import json
from pathlib import Path

from ropewalk.checks import contains
from ropewalk.quickstart import facts
from ropewalk.quickstart.facts import Country, Kind, Question

LIMA = Country("Peru", "South America", "Lima", "Sol", "PEN", 31989256, 1285220, "PE", ".pe", "51")


def test_peru_is_among_the_countries_as_geonames_has_it() -> None:
    assert LIMA in facts.countries()
    assert len(facts.countries()) == 223


def test_held_out_countries_are_never_trained_on() -> None:
    trained, held_out = facts.split()
    assert len(held_out) == facts.HELD_OUT
    assert len(trained) + len(held_out) == 223
    assert not {c.name for c in trained} & {c.name for c in held_out}
    rows, asked = facts.questions(trained, 6), facts.questions(held_out, 2)
    assert not {q.country for q in rows} & {q.country for q in asked}
    assert not {q.passage for q in rows} & {q.passage for q in asked}


def test_documents_and_questions_are_the_same_on_every_run() -> None:
    assert facts.document(LIMA) == facts.document(LIMA)
    assert facts.questions([LIMA], 3) == facts.questions([LIMA], 3)


def test_every_answer_is_in_its_passage_and_in_the_house_format() -> None:
    for question in facts.questions(facts.countries(), len(facts.KINDS)):
        assert contains(question.passage, question.value)
        assert question.answer.startswith(f"{question.value} (")
        assert question.answer.endswith(", from the file)")


def test_the_house_format_is_value_kind_and_where_it_is_from() -> None:
    kind = Kind("area", (), (), "area in km2")
    assert facts.value(LIMA, kind) == "1,285,220"
    assert facts.house("1,285,220", kind) == "1,285,220 (area in km2, from the file)"


def ask(country: str, kind: str, passage: str, value: str) -> Question:
    house = next(k for k in facts.KINDS if k.field == kind)
    return Question(country, kind, passage, "?", value, facts.house(value, house))


def test_the_majority_control_gives_the_commonest_value_of_the_kind() -> None:
    rows = [
        ask("A", "currency", "", "Dollar"),
        ask("B", "currency", "", "Euro"),
        ask("C", "currency", "", "Dollar"),
        ask("A", "capital", "", "Aa"),
    ]
    assert facts.majority(rows, [ask("X", "currency", "", "Peso")]) == ["Dollar (currency, from the file)"]


def test_the_copying_control_gives_the_first_value_of_the_passage() -> None:
    passage = "Peru is a country in South America. It has 31,989,256 inhabitants. The capital is Lima."
    assert facts.first_span([ask("Peru", "capital", passage, "Lima")]) == ["31,989,256 (capital, from the file)"]


def test_rows_are_written_as_chat_messages(tmp_path: Path) -> None:
    question = facts.questions([LIMA], 1)[0]
    facts.write_rows([question], tmp_path / "rows.jsonl")
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"] == f"{question.passage}\n\n{question.question}"
    assert row["messages"][1]["content"] == question.answer


def test_documents_are_written_one_file_a_country(tmp_path: Path) -> None:
    facts.write_documents([LIMA], tmp_path)
    assert (tmp_path / "pe.txt").read_text(encoding="utf-8").startswith("Peru is a country in South America.")


def test_several_questions_about_one_passage_are_one_chat(tmp_path: Path) -> None:
    asked = facts.questions([LIMA, facts.countries()[0]], 3)
    facts.write_rows(asked, tmp_path / "rows.jsonl", turns=2)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [len(row) // 2 for row in rows] == [2, 1, 2, 1]
    assert rows[0][2]["content"] == asked[1].question
    assert rows[1][0] == {"role": "user", "content": asked[2].prompt}
    assert [m["content"] for row in rows for m in row[1::2]] == [q.answer for q in asked]
