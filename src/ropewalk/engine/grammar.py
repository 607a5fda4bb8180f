"""Replies of a given form: JSON by schema, a regular expression, or a grammar in Lark, kept to by llguidance at every id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

from ropewalk.engine.request import Grammar
from ropewalk.errors import BadInput

WHITESPACE: Any = {"whitespace_pattern": "[ ]?"}  # else a model may go on with blanks for ever


class Grammars:
    """Grammars over the ids of one tokenizer."""

    def __init__(self, tokenizer_file: Path, stop_ids: Sequence[int]) -> None:
        self._tokenizer = LLTokenizer(str(tokenizer_file), eos_token=list(stop_ids) or None)

    def begin(self, grammar: Grammar) -> Follower | Without:
        """A grammar at the beginning of a reply; BadInput for one that cannot be followed."""
        if grammar.kind == "without":
            return Without(grammar.after)
        try:
            if grammar.kind == "json_schema":
                source = LLMatcher.grammar_from_json_schema(json.loads(grammar.text), overrides=WHITESPACE)
            elif grammar.kind == "regex":
                source = LLMatcher.grammar_from_regex(grammar.text)
            else:
                source = LLMatcher.grammar_from_lark(grammar.text)
        except ValueError as error:
            raise BadInput(f"the form of the reply cannot be kept to: {_first_line(str(error))}") from error
        matcher = LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise BadInput(f"the form of the reply cannot be kept to: {_first_line(matcher.get_error())}")
        return Follower(matcher, self._tokenizer.vocab_size, grammar.after, grammar.again)


class Follower:
    """One reply that keeps to a grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, after: tuple[int, ...], again: bool) -> None:
        self._matcher, self._mask = matcher, allocate_token_bitmask(1, vocabulary)
        self._opener, self._again = after, again
        self._after, self._seen = after, tuple[int, ...]()

    @property
    def active(self) -> bool:
        """Whether the grammar is in force now."""
        return not self._after

    def mask(self, logits: Tensor) -> None:
        """Forbids, in place, every id [V] that may not come next."""
        if not self.active:
            return
        fill_next_token_bitmask(self._matcher, self._mask)
        if self._matcher.is_error():
            raise BadInput(f"the form of the reply cannot be kept to: {_first_line(self._matcher.get_error())}")
        words = torch.from_numpy(self._mask[0])
        allowed = ((words[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).reshape(-1).bool()[: logits.shape[0]]
        forbidden = torch.ones(logits.shape[0], dtype=torch.bool)
        forbidden[: allowed.shape[0]] = ~allowed
        logits.masked_fill_(forbidden.to(logits.device), float("-inf"))

    def take(self, id: int) -> bool:
        """Goes on by an id; whether the reply is now complete and nothing may follow."""
        if self._after:
            self._seen = (*self._seen, id)[-len(self._after) :]
            if self._seen == self._after:
                self._after = ()
            return False
        self._matcher.consume_token(id)
        if not self._matcher.is_stopped():
            return False
        if self._again and not self._matcher.is_error():
            self._matcher.reset()
            self._after, self._seen = self._opener, ()
            return False
        return True


class Without:
    """One reply in which some ids do not come."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)

    def mask(self, logits: Tensor) -> None:
        """Forbids them, in place."""
        logits[self._ids] = float("-inf")

    def take(self, id: int) -> bool:
        """Goes on by an id; such a reply is never complete by itself."""
        return False


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0][:300] if message.strip() else "it is not understood"
