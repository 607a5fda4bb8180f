"""The quickstart's last leg: what is asked about a file, and when its citations count."""

from ropewalk.chat.messages import Cited, Usage
from ropewalk.quickstart import facts
from ropewalk.quickstart.question import Dialogue, Told
from ropewalk.quickstart.run import two_questions

TEXT = "It is far. The capital is Oslo."


def told(text="The capital is Oslo.", start=11, seconds=0.1, usage=None):
    return Told(
        "?", "Oslo", (Cited("char_location", text, 0, None, "file_1", start, start + len(text)),), usage or Usage(), seconds
    )


def test_what_the_second_question_cost():
    dialogue = Dialogue(TEXT, (told(seconds=0.5), told(seconds=0.1, usage=Usage(20, 0, 120, 5))))
    assert dialogue.as_dict() == {
        "cache_read_input_tokens": 120,
        "input_tokens": 20,
        "ttft_ratio": 5.0,
        "citation_ok": True,
    }


def test_a_citation_that_is_missing_or_stands_elsewhere_does_not_count():
    for wrong in (told(start=10), told(text="The capital is Rome."), Told("?", "Oslo", (), Usage(), 0.1)):
        assert not wrong.stands_in(TEXT)
        assert not Dialogue(TEXT, (told(), wrong)).as_dict()["citation_ok"]


def test_two_different_questions_about_a_country_that_was_answered_right_about():
    _, held_out = facts.split()
    for per_country in (1, 2):
        asked = facts.questions(held_out[:4], per_country)
        answers = ["nothing"] * per_country + [q.answer for q in asked[per_country:]]
        country, questions = two_questions(asked, answers)
        assert country == held_out[1]
        assert len(set(questions)) == 2
        assert set(questions) >= {q.question for q in asked if q.country == country.name}
    assert two_questions(asked, ["nothing"] * len(asked))[0] == held_out[0]
