"""A reply's text as content blocks, while it comes: thinking, text, calls of tools.

A parser is fed text in which control tokens still stand as they are written, and says what it brings; what might be the beginning
of a marker is held back until it is known. What each family writes is in dialects/; here is what all of them share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ropewalk.chat.messages import BlockEnded, BlockStarted, Delta, ReplyEvent, Text, Thinking, ToolUse
from ropewalk.ids import new_id


class Parser(Protocol):
    """What answers need of every family's parser."""

    @property
    def called(self) -> bool:
        """Whether the reply calls a tool."""

    def feed(self, text: str) -> list[ReplyEvent]:
        """More of the reply."""

    def finish(self) -> list[ReplyEvent]:
        """The reply is over: whatever was held back, and the end of the block at hand."""


class Call(Protocol):
    """One call of a tool while it is read: what follows the marker that opens it."""

    name: str  # of a tool that there is; empty as long as it is not known
    input: str  # JSON that has come and was not taken yet
    done: bool
    failed: bool  # it is no call, as a beginning of its text shows already
    rest: str  # what is behind it, once it is done

    def feed(self, text: str) -> None:
        """More of the text."""

    def finish(self) -> None:
        """The text is over: the call is done if nothing of its input is missing, and has failed otherwise."""

    def close(self) -> str:
        """What makes the input JSON, where it is cut off."""


class Blocks:
    """The blocks of a reply, one after another; blanks around them belong to none."""

    def __init__(self, *, shows_thinking: bool = True, goes_on: bool = False) -> None:
        """`goes_on`: the reply continues what the caller began, so that its first blanks are its own."""
        self._events: list[ReplyEvent] = []
        self._block: Text | Thinking | ToolUse | None = None
        self._blanks = ""
        self._shows_thinking, self._goes_on = shows_thinking, goes_on
        self.called = False

    def take(self) -> list[ReplyEvent]:
        """What has come since it was asked last."""
        events, self._events = self._events, []
        return events

    def text(self, text: str) -> None:
        self._say(text, Text(""))

    def thinking(self, text: str) -> None:
        if self._shows_thinking:
            self._say(text, Thinking(""))

    def call(self, name: str, id: str = "") -> None:
        """A call begins; without an id, it is given one."""
        self.end()
        self._begin(ToolUse(id or new_id("toolu"), name, {}))

    def input(self, text: str) -> None:
        if text:
            self._events.append(Delta(text))

    def end(self, *, over: bool = False) -> None:
        """The block at hand is whole; `over`: so is the reply, and what blanks it ends in are its own."""
        if self._block is not None:
            if over and self._blanks:
                self._events.append(Delta(self._blanks))
            self._events.append(BlockEnded())
        self._block, self._blanks, self._goes_on = None, "", False

    def _say(self, text: str, block: Text | Thinking) -> None:
        if type(self._block) is not type(block):
            if not self._goes_on:
                text = (self._blanks + text).lstrip() if self._block is None else text.lstrip()
            if not text:
                return
            self.end()
            self._begin(block)
        whole = self._blanks + text
        said = whole.rstrip()
        self._blanks = whole[len(said) :]
        self.input(said)

    def _begin(self, block: Text | Thinking | ToolUse) -> None:
        self._block, self._blanks = block, ""
        self._goes_on = False
        self._events.append(BlockStarted(block))


class Marked:
    """A parser that goes by markers: between two of them is thinking, one opens a call, and the rest is text."""

    def __init__(
        self,
        thinking: tuple[str, str] | None = ("<think>", "</think>"),
        calls: Mapping[str, Callable[[], Call]] | None = None,
        *,
        streams: bool = False,
        thinks_first: bool = False,
        shows_thinking: bool = True,
        goes_on: bool = False,
    ) -> None:
        """`calls`: by the marker that opens one. `streams`: what calls are made of is told as it comes, since a grammar keeps it whole.

        `thinks_first`: the prompt ends inside of thinking, so that the reply begins there.
        """
        self._blocks = Blocks(shows_thinking=shows_thinking, goes_on=goes_on)
        self._thinking, self._calls, self._streams = thinking, dict(calls or {}), streams
        self._held = ""
        self._inside = thinks_first and thinking is not None
        self._call: Call | None = None
        self._opener = self._body = ""  # of the call at hand

    @property
    def called(self) -> bool:
        """Whether the reply calls a tool."""
        return self._blocks.called

    def feed(self, text: str) -> list[ReplyEvent]:
        """More of the reply."""
        self._held += text
        while self._step():
            pass
        return self._blocks.take()

    def finish(self) -> list[ReplyEvent]:
        """What was held back, and the end of the block at hand."""
        while True:
            if self._call is not None:
                self._call.finish()
                self._listen(self._call)
            if not self._step() and self._call is None:
                break
        self._say(self._held)
        self._held = ""
        self._blocks.end(over=True)
        return self._blocks.take()

    def _step(self) -> bool:
        """Goes past one marker or one call; False where more text is needed."""
        if self._call is not None:
            text, self._held = self._held, ""
            self._body += text
            self._call.feed(text)
            return self._listen(self._call)
        markers = self._markers()
        found = [(place, marker) for marker in markers if (place := self._held.find(marker)) >= 0]
        if not found:
            kept = held_back(self._held, markers)
            self._say(self._held[: len(self._held) - kept])
            self._held = self._held[len(self._held) - kept :]
            return False
        # Of two that begin in one place, the longer.
        place, marker = min(found, key=lambda pair: (pair[0], -len(pair[1])))
        self._say(self._held[:place])
        self._held = self._held[place + len(marker) :]
        self._pass(marker)
        return True

    def _markers(self) -> list[str]:
        if self._inside and self._thinking is not None:
            return [self._thinking[1]]
        return [*([self._thinking[0]] if self._thinking is not None else []), *self._calls]

    def _pass(self, marker: str) -> None:
        if marker in self._calls and not self._inside:
            self._begin(marker)
        else:
            self._blocks.end()
            self._inside = not self._inside

    def _begin(self, marker: str) -> None:
        self._call, self._opener, self._body = self._calls[marker](), marker, ""

    def _listen(self, call: Call) -> bool:
        """Tells what has come of a call; whether it is over."""
        if call.failed:
            self._call = None
            if self._told:
                self._tell(call.close())
                self._ends(call)
            else:  # its opener was text, and what follows is looked at again
                self._blocks.text(self._opener)
                self._held = self._body + self._held
            return True
        if (call.name and self._streams) or call.done:
            if not self._told:
                self._blocks.call(call.name)
                self._told = True
            self._tell(call.input)
            call.input = ""
        if call.done:
            self._call = None
            self._blocks.called = True
            self._ends(call)
        return call.done

    def _tell(self, text: str) -> None:
        self._blocks.input(text)

    def _ends(self, call: Call) -> None:
        self._blocks.end()
        self._told = False
        self._held = call.rest + self._held

    _told = False  # the call at hand

    def _say(self, text: str) -> None:
        if self._inside:
            self._blocks.thinking(text)
        else:
            self._blocks.text(text)


def held_back(text: str, markers: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    longest = max(map(len, markers), default=0) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-count:]) for marker in markers):
            return count
    return 0
