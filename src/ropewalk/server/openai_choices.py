"""One choice of a chat completion or a completion, gathered from the events of its reply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ropewalk.chat.messages import (
    BlockEnded,
    BlockStarted,
    Delta,
    Ended,
    ReplyEvent,
    Sampled,
    Text,
    Thinking,
    Token,
    ToolUse,
)

FINISHED = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
JSON = dict[str, Any]


@dataclass
class Choice:
    """One reply on its way out."""

    index: int
    text: str = ""
    thought: str = ""
    calls: list[JSON] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    ended: Ended | None = None
    prompt: tuple[int, ...] = ()
    begun: bool = False  # whether a chunk of it has gone out
    unsent: list[Token] = field(default_factory=list)
    _inside: str = ""  # the kind of block at hand

    def take(self, event: ReplyEvent) -> JSON:
        """Adds an event -> what of it is new to the message; {} where nothing is."""
        match event:
            case Sampled(tokens):
                self.tokens += tokens
                self.unsent += tokens
            case BlockStarted(ToolUse(id, name)):
                self._inside = "call"
                self.calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": ""}})
                return {"tool_calls": [{"index": len(self.calls) - 1, **self.calls[-1], "function": dict(self._function)}]}
            case BlockStarted(Thinking(text)):
                self._inside = "thinking"
                return self._think(text)
            case BlockStarted(Text(text)):
                apart = "\n\n" if self.text and self._inside != "text" else ""  # a call stood between
                self._inside = "text"
                return self._say(apart + text)
            case Delta(text):
                if self._inside == "call":
                    return self._argue(text)
                return self._think(text) if self._inside == "thinking" else self._say(text)
            case BlockEnded() if self._inside == "call" and not self._function["arguments"]:
                return self._argue("{}")
            case Ended():
                self.ended = event
        return {}

    @property
    def finish_reason(self) -> str:
        assert self.ended is not None
        return FINISHED.get(self.ended.stop_reason, "stop")

    def told_tokens(self) -> list[Token]:
        """The tokens that no chunk has told yet."""
        unsent, self.unsent = self.unsent, []
        return unsent

    @property
    def _function(self) -> JSON:
        function: JSON = self.calls[-1]["function"]
        return function

    def _say(self, text: str) -> JSON:
        self.text += text
        return {"content": text} if text else {}

    def _think(self, text: str) -> JSON:
        self.thought += text
        return {"reasoning_content": text} if text else {}

    def _argue(self, text: str) -> JSON:
        self._function["arguments"] += text
        return {"tool_calls": [{"index": len(self.calls) - 1, "function": {"arguments": text}}]} if text else {}
