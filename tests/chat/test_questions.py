"""Questions out of a document: what the model is shown, and which of its rows are kept."""

import json

from jsonschema import Draft202012Validator

from ropewalk.chat.questions import Passage, Rows, Wanted, asked, lineage, name_of, passages, schema
from ropewalk.config.run import parse_run
from ropewalk.data.formats import reader_of
from ropewalk.files.reading import Document, Section

PASSAGE = Passage(3, "The lighthouse of Pellworm was\nbuilt in 1907. It is 41 metres high.", "Towers")


def row(question, answer="In 1907.", quote="built in 1907"):
    return {"question": question, "answer": answer, "quote": quote}


def added(*replies):
    rows = Rows("file_1")
    for reply in replies:
        rows.add(PASSAGE, reply)
    return rows


def test_a_row_is_kept_whose_quote_stands_in_the_passage():
    reply = json.dumps({"rows": [row("When was it built?", quote="pellworm  was built IN 1907"), row("Who?", quote="by Ann")]})
    rows = added(reply)
    [kept] = rows.rows
    assert kept["messages"] == [
        {"role": "user", "content": "When was it built?"},
        {"role": "assistant", "content": "In 1907."},
    ]
    assert kept["source"] == {"file": "file_1", "chunk": 3, "quote": "pellworm  was built IN 1907"}
    assert rows.dropped == 1
    assert json.loads(rows.lines()) == kept


def test_what_is_cut_off_empty_too_short_or_was_asked_before_is_left_out():
    whole = {"rows": [row("When?"), row("WHEN? "), row("", "a"), row("How?", ""), row("Why?", quote="it is"), "no row"]}
    rows = added('{"rows": [{"question": "Wh', json.dumps([1]), json.dumps(whole))
    assert [kept["messages"][0]["content"] for kept in rows.rows] == ["When?"]
    assert rows.dropped == 2 + 5


def test_a_longer_document_than_may_be_shown_is_shown_evenly():
    text = "".join(f"This is sentence number {number}. " for number in range(100))
    document = Document("text/plain", text, (Section("heading", 1, "Counting", 0, len(text)),), ())
    every = passages(document, Wanted("m", size=100))
    some = passages(document, Wanted("m", size=100, most=5))
    assert [found.number for found in every] == list(range(1, len(every) + 1))
    assert len(some) == 5
    assert [found.number for found in some] == [1 + place * len(every) // 5 for place in range(5)]
    assert {found.title for found in some} == {"Counting"}
    assert passages(Document("text/plain", " \n ", (), ()), Wanted("m")) == []


def test_a_request_shows_the_passage_and_keeps_the_reply_to_its_form():
    wanted = Wanted("house", each=2)
    found = asked(PASSAGE, wanted)
    assert PASSAGE.text in found["messages"][0]["content"]
    assert "From: Towers" in found["messages"][0]["content"]
    form = found["output_config"]["format"]["schema"]
    assert form == schema(2)
    assert Draft202012Validator(form).is_valid({"rows": [row("When?")]})
    assert not Draft202012Validator(form).is_valid({"rows": [row("When?")] * 3})


def test_a_lineage_names_the_model_the_words_and_the_counts():
    rows = added(json.dumps({"rows": [row("When?"), row("Who?", quote="nobody knows")]}))
    told = lineage(Wanted("house", each=2), "house-3", "house, now house-3", rows, [PASSAGE])
    assert told == {
        "generator": "questions",
        "prompt": "questions-1",
        "data_generator": ["house-3"],
        "model": "house",
        "answered_by": "house, now house-3",
        "each": 2,
        "size": 3000,
        "most": 500,
        "chunks": 1,
        "rows": 1,
        "dropped": 1,
    }
    assert name_of("a.b.pdf") == "a.b-questions.jsonl"
    assert name_of("notes") == "notes-questions.jsonl"


def test_a_row_is_a_conversation_to_train_on():
    [kept] = added(json.dumps({"rows": [row("When?")]})).rows
    source = {"path": "rows.jsonl", "type": "chat_template"}
    run = parse_run(json.dumps({"base_model": "x", "learning_rate": 0.1, "datasets": [source]}))
    assert reader_of(run.datasets[0], run)(kept).messages == kept["messages"]
