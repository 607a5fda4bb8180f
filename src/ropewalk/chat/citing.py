"""A reply's events with its markers turned into citations, while it comes.

    BlockStarted, Delta "The rent is 900 [3]. It", ...  ->  BlockStarted, Delta "The rent is 900.", CitationAdded, BlockEnded, ...

Every cited claim is a text block of its own. The blocks' texts together are the reply without its markers, however it was cut. The
first sentence of a block goes out as it comes; one that follows a sentence without a citation is held back until it is known
whether a block has to begin before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ropewalk.chat.attribution import Attribution
from ropewalk.chat.citations import Citables
from ropewalk.chat.messages import BlockEnded, BlockStarted, CitationAdded, Cited, Delta, ReplyEvent, Text
from ropewalk.chat.sentences import ended

MOST_HELD = 2000  # characters of a sentence
AFTER_CLAIM = frozenset(".,;:!?)]\"'”’»。，、；：！？）」』")


@dataclass
class _Block:
    """The text block that is going out."""

    open: bool = False
    uncited: bool = False  # it holds a sentence without a citation
    statement: str = ""  # since the last sentence ended
    held: str = ""  # what of it has not gone out
    citations: list[Cited] = field(default_factory=list)
    claimed: bool = False  # a marker stands after the statement


class Citing:
    """Between a parser and whoever reads the reply."""

    def __init__(self, citables: Citables, question: str = "", *, marked: bool = True, steered: bool = False) -> None:
        """`question`: see Attribution. `marked`: the model has seen the pieces' numbers; `steered`: it is held to those."""
        self.form = citables.form if marked and steered else ""  # a regular expression to hold the reply to
        self._citables, self._markers = citables, marked
        letter = citables.letter
        entry = rf"{letter}\d{{1,7}}(?: ?[-–] ?{letter}\d{{1,7}})?"
        self.marker = re.compile(rf"[ \t]{{0,4}}\[ ?({entry}(?:[,;] ?{entry}){{0,20}}) ?\]")
        self._beginning = re.compile(rf"[ \t]{{0,4}}(?:\[[{letter}\d \-–,;]{{0,500}})?")
        self._attribution = Attribution([citables.text(piece) for piece in citables.pieces], question)
        self._inside = False  # of a text block of the parser's
        self._marked = False  # the model has written a marker that holds
        self._block = _Block()
        self._lexed = ""  # held back: it may be the beginning of a marker

    def feed(self, events: list[ReplyEvent]) -> list[ReplyEvent]:
        """More of the reply."""
        out: list[ReplyEvent] = []
        for event in events:
            match event:
                case BlockStarted(Text()):
                    self._inside = True
                case Delta(text) if self._inside:
                    self._lex(text, out)
                case BlockEnded() if self._inside:
                    self._finish(out)
                    self._inside = False
                case _:
                    out.append(event)
        return _joined(out)

    # -- characters and markers

    def _lex(self, text: str, out: list[ReplyEvent], *, last: bool = False) -> None:
        held, place = self._lexed + text, 0
        while place < len(held):
            if held[place] not in "[ \t" or not self._markers:
                self._take(held[place], out)
                place += 1
            elif found := self.marker.match(held, place):
                self._mark(found.group(1))
                place = found.end()
            elif not last and self._beginning.fullmatch(held, place):
                break
            else:
                self._take(held[place], out)
                place += 1
        self._lexed = held[place:]

    def _mark(self, entries: str) -> None:
        found: list[Cited] = []
        for entry in re.split(r"[,;]", entries):
            numbers = [int(number) for number in re.findall(r"\d+", entry)]
            cited = self._citables.cite(numbers[0], numbers[-1])
            if cited is not None:
                found.append(cited)
        self._block.citations += [cited for cited in found if cited not in self._block.citations]
        if found:
            self._marked = True
            self._block.claimed = self._block.claimed or bool(self._block.statement.strip())

    def _take(self, character: str, out: list[ReplyEvent]) -> None:
        blank = character.isspace()
        if self._block.claimed:
            if blank or (character in AFTER_CLAIM and not self._block.statement[-1].isspace()):
                self._say(character, out)
                return
            self._close(out)
        elif not blank and ended(self._block.statement, character):
            self._settle(out)
        self._say(character, out)

    # -- statements

    def _say(self, character: str, out: list[ReplyEvent]) -> None:
        self._block.statement += character
        if self._block.uncited and len(self._block.statement) < MOST_HELD:
            self._block.held += character
            return
        self._send(self._block.held + character, out)
        self._block.held = ""

    def _settle(self, out: list[ReplyEvent]) -> None:
        """A statement is whole and has no marker after it: by its words, or by one that stood before it, it may be cited."""
        if not self._marked and not self._block.citations:
            number = self._attribution.supporter(self._block.statement)
            cited = self._citables.cite(number + 1, number + 1) if number is not None else None
            self._block.citations = [cited] if cited is not None else []
        if self._block.citations:
            self._close(out)
            return
        self._send(self._block.held, out)
        self._block.held, self._block.statement = "", ""
        self._block.uncited = True

    def _close(self, out: list[ReplyEvent]) -> None:
        """Ends the block of a claim."""
        if self._block.uncited and self._block.held == self._block.statement and self._block.open:
            out.append(BlockEnded())
            self._block.open = False
        self._send(self._block.held, out)
        out += [CitationAdded(cited) for cited in self._block.citations]
        out.append(BlockEnded())
        self._block = _Block()

    def _finish(self, out: list[ReplyEvent]) -> None:
        self._lex("", out, last=True)
        if self._block.claimed:
            self._close(out)
        elif self._block.statement.strip():
            self._settle(out)
        else:
            self._send(self._block.held, out)
        if self._block.open:
            out.append(BlockEnded())
        self._block = _Block()

    def _send(self, text: str, out: list[ReplyEvent]) -> None:
        if not text:
            return
        if not self._block.open:
            out.append(BlockStarted(Text("")))
            self._block.open = True
        out.append(Delta(text))


def _joined(events: list[ReplyEvent]) -> list[ReplyEvent]:
    """Neighbouring deltas as one."""
    out: list[ReplyEvent] = []
    for event in events:
        if isinstance(event, Delta) and out and isinstance(out[-1], Delta):
            out[-1] = Delta(out[-1].text + event.text)
        else:
            out.append(event)
    return out
