"""Thinking is ended where its budget is, and the model goes on from what it thought."""

import asyncio
from dataclasses import replace

import pytest

from ropewalk.chat.messages import MessagesRequest, Text, Turn
from ropewalk.chat.template import Template
from ropewalk.engine.request import Event, Grammar, Request, Span
from ropewalk.engine.thinking import BUDGETS, Budget, bounded, budget_of

OPEN, CLOSE = (7, 8), (9, 8)
SENT = Request("r", (Span((1, 2)),), (3,), 50)


class Thinker:
    """A model that thinks `length` ids long, closes, and answers with the number of ids it has read."""

    def __init__(self, length, opening=()):
        self.script = [*opening, *[5] * length, *CLOSE]
        self.asked = []

    async def generate(self, request, pixels=None, over=()):
        self.asked.append(request)
        said = list(request.tail[1:])  # of the reply so far
        yield Event(request.id, 0, read=2, created=0)
        for count in range(request.max_tokens):
            done = tuple(said[-2:]) == CLOSE or tuple(said[-3:-1]) == CLOSE
            next_id = 40 + len(said) if done else self.script[len(said)]
            said.append(next_id)
            last = next_id >= 40
            yield Event(
                request.id, 0, (next_id,), finish="stop" if last else "length" if count + 1 == request.max_tokens else ""
            )
            if last:
                return


def told(model, budget, sent=SENT):
    async def whole():
        return [event async for event in bounded(model.generate, sent, budget)]

    return asyncio.run(whole())


def ids(events):
    return [id for event in events for id in event.ids]


def test_a_thought_within_the_budget_is_left_alone():
    model = Thinker(4)
    assert ids(told(model, Budget(6, OPEN, CLOSE, (), inside=True))) == [5, 5, 5, 5, 9, 8, 46]
    assert len(model.asked) == 1


@pytest.mark.parametrize("opening", [(), OPEN])
def test_a_thought_beyond_it_is_ended_and_what_follows_was_read_with_it(opening):
    model = Thinker(30, opening)
    events = told(model, Budget(6, OPEN, CLOSE, (4,), inside=not opening))
    assert ids(events) == [*opening, 5, 5, 5, 5, 5, 5, 9, 8, 4, 49 + len(opening)]
    assert model.asked[1].tail == (3, *opening, 5, 5, 5, 5, 5, 5, 9, 8, 4)
    assert model.asked[1].max_tokens == 50 - 9 - len(opening)
    assert [event.read for event in events if event.read is not None] == [2]  # what was read again is not told again
    assert [event.finish for event in events if event.finish] == ["stop"]


def test_a_reply_that_does_not_think_is_none_of_its_business():
    assert len(ids(told(Thinker(30), Budget(6, OPEN, CLOSE, (), inside=False)))) == 33
    assert len(ids(told(Thinker(30), None))) == 33


def test_where_no_room_is_left_the_reply_ends_with_the_thought():
    events = told(Thinker(30), Budget(6, OPEN, CLOSE, (4,), inside=True), replace(SENT, max_tokens=8))
    assert ids(events) == [5, 5, 5, 5, 5, 5, 9, 8, 4]
    assert events[-1].finish == "length"


def test_budgets_come_from_the_request_or_from_its_effort(tokenizer_folder):
    template = Template.load(tokenizer_folder, "qwen3")

    def found(grammar=None, tail="", **more):
        asked = {"max_tokens": 100_000, "thinking": True, **more}
        request = MessagesRequest("m", turns=(Turn("user", (Text("?"),)),), **asked)
        return budget_of(template, request, tail, grammar)

    assert found() is None
    assert found(thinking=False, effort="low") is None
    assert found(thinking_budget=2000, effort="low").tokens == 2000
    assert found(effort="max") is None
    assert [found(effort=effort).tokens for effort in BUDGETS] == [1024, 4096, 16_384, 32_768]
    assert found(effort="low", max_tokens=100).tokens == 75
    assert found(effort="low", tail="<|im_start|>assistant\n<think>\n").inside
    assert template.decode(found(effort="low").closing, skip_special_tokens=False) == "</think>"
    assert found(Grammar("lark", "start: x"), effort="low") is None
    assert found(Grammar("lark", "start: x", (5,)), effort="low") is not None
