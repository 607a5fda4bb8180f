"""Signatures of thinking: what a model thought comes back with the next turn, and is shown to it only as it was."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable, Iterator

from ropewalk.chat.messages import BlockEnded, BlockStarted, Delta, MessagesRequest, ReplyEvent, Thinking
from ropewalk.errors import BadInput


class Signatures:
    """Signs the thinking of one reply, and checks that of earlier ones."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._thought: str | None = None  # of the block at hand; None: it is no thinking

    def check(self, request: MessagesRequest) -> None:
        """Refuses thinking that was not signed here, or was changed since."""
        for turn in request.turns:
            for block in turn.blocks:
                if isinstance(block, Thinking) and not hmac.compare_digest(
                    block.signature.encode(errors="replace"), self._of(block.thinking).encode()
                ):
                    raise BadInput(
                        "messages: Invalid `signature` in `thinking` block; send the blocks of a reply back as they came, "
                        "or leave those of other servers out"
                    )

    def sign(self, events: Iterable[ReplyEvent]) -> Iterator[ReplyEvent]:
        """The same events; a block of thinking ends with its signature."""
        for event in events:
            match event:
                case BlockStarted(block):
                    self._thought = block.thinking if isinstance(block, Thinking) else None
                case Delta(text) if self._thought is not None:
                    self._thought += text
                case BlockEnded() if self._thought is not None:
                    event = BlockEnded(self._of(self._thought))
            yield event

    def _of(self, thinking: str) -> str:
        return base64.b64encode(hmac.digest(self._key, thinking.encode(errors="replace"), hashlib.sha256)).decode()
