"""Thinking within a budget: once it is spent, thinking is ended for the model, which goes on with its answer.

The reply is broken off, the words that end thinking are set behind it, and the model reads on from there: of what was read before,
only what it thought is read once more.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from ropewalk.chat.dialects.known import dialect_of
from ropewalk.chat.messages import MessagesRequest
from ropewalk.chat.template import Template
from ropewalk.engine.request import Event, Grammar, Request

# Tokens of thinking by output_config.effort, where the request names no budget of its own; `max`: as many as the model likes.
BUDGETS = {"low": 1024, "medium": 4096, "high": 16_384, "xhigh": 32_768}

Generate = Callable[[Request], AsyncGenerator[Event, None]]


@dataclass(frozen=True)
class Budget:
    """How long a reply may think, and what its thinking stands between."""

    tokens: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    after: tuple[int, ...]  # what models write behind it
    inside: bool  # the prompt has opened it


def budget_of(template: Template, request: MessagesRequest, tail: str, grammar: Grammar | None) -> Budget | None:
    """None: the reply thinks as long as the model likes, or not at all."""
    tokens = request.thinking_budget or BUDGETS.get(request.effort, 0)
    marks = dialect_of(template).thinking if template.program is not None else None
    # A grammar that begins before thinking ends has a say in where it does.
    held = grammar is not None and grammar.kind != "without" and not grammar.after
    if not request.thinking or not tokens or marks is None or held:
        return None
    opening, closing = (tuple(template.encode(mark)) for mark in marks)
    after = tuple(template.encode(dialect_of(template).after_thinking))
    inside = tail.rstrip().endswith(marks[0].rstrip())
    # An answer is to have room as well: the API holds a budget below max_tokens, an effort is none of the caller's numbers.
    return Budget(min(tokens, max(1, request.max_tokens * 3 // 4)), opening, closing, after, inside)


async def bounded(generate: Generate, sent: Request, budget: Budget | None) -> AsyncGenerator[Event, None]:
    """What a request brings, with thinking ended where its budget is."""
    produced: list[int] = []
    began = 0 if budget is not None and budget.inside else None  # where thinking begins
    ended = budget is None
    async with aclosing(generate(sent)) as events:
        async for event in events:
            yield event
            if budget is None or ended:
                continue
            new = len(produced)
            produced += event.ids
            if began is None:
                began = _behind(produced, budget.opening, new)
            if began is not None:
                ended = _behind(produced, budget.closing, max(began, new)) is not None
                if not ended and len(produced) - began >= budget.tokens and not event.finish:
                    break
        else:
            return
    assert budget is not None
    ending = budget.closing + budget.after
    left = sent.max_tokens - len(produced) - len(ending)
    yield Event(sent.id, 0, ending, finish="" if left > 0 else "length")
    if left > 0:
        rest = replace(sent, tail=(*sent.tail, *produced, *ending), max_tokens=left)
        async with aclosing(generate(rest)) as events:
            async for event in events:
                yield replace(event, read=None, created=None)  # the prompt's have been told


def _behind(ids: Sequence[int], wanted: tuple[int, ...], new: int) -> int | None:
    """The place behind the first of these ids in a row, of which at least one stands at `new` or later."""
    count = len(wanted)
    places = (i + count for i in range(max(0, new - count + 1), len(ids) - count + 1) if tuple(ids[i : i + count]) == wanted)
    return next(places, None)
