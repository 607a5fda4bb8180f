"""The JSON of chat completions and completions on its way out: events of replies -> chunks, or one answer.

Choices are numbered over all prompts of a request: prompt * samples + sample.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ropewalk.chat.messages import Ended, Excerpt, Likely, ReplyEvent, Retrieved, Started, Token, Usage
from ropewalk.server.openai_choices import JSON, Choice
from ropewalk.server.openai_errors import error_of
from ropewalk.server.openai_sampling import Told

DONE = b"data: [DONE]\n\n"


@dataclass
class Writer:
    """All replies of one request; what a subclass adds is the shape of a choice."""

    id: str
    model: str
    told: Told
    samples: int  # of each prompt
    prompts: int = 1
    created: int = field(default_factory=lambda: int(time.time()))
    choices: list[Choice] = field(init=False)
    usages: dict[int, Usage] = field(default_factory=dict)  # by prompt
    excerpts: tuple[Excerpt, ...] = ()

    def __post_init__(self) -> None:
        self.choices = [Choice(index) for index in range(self.prompts * self.samples)]

    def take(self, index: int, event: ReplyEvent) -> tuple[Choice, JSON]:
        """Adds an event of a choice."""
        choice, prompt = self.choices[index], index // self.samples
        match event:
            case Retrieved(excerpts):
                self.excerpts = excerpts
            case Started(usage, ids):
                self.usages[prompt] = usage
                for own in self.choices[prompt * self.samples : (prompt + 1) * self.samples]:
                    own.prompt = ids
            case Ended():
                self.usages[prompt] = event.usage  # of what another server reads, only the end tells
        return choice, choice.take(event)

    def chunks(self, index: int, event: ReplyEvent) -> Iterator[bytes]:
        """What is sent of an event."""
        choice, delta = self.take(index, event)
        if isinstance(event, Started):
            first = index // self.samples * self.samples
            for own in self.choices[first : first + self.samples]:
                if opening := self.opening(own):
                    yield self._sent([opening], own)
                own.begun = True
        elif isinstance(event, Ended) or delta:
            yield self._sent([self.part(choice, delta)], choice)
            if all(own.ended is not None for own in self.choices) and self.told.usage:
                yield self._data({**self._head(self.chunk), "choices": [], "usage": self.usage()})

    def whole(self) -> JSON:
        """The answer, once all replies have ended."""
        return {
            **self._head(self.object),
            "choices": [self.choice(own) for own in self.choices],
            "usage": self.usage(),
            **self.beside(),
        }

    def headers(self) -> dict[str, str]:
        """What is told of a reply before it begins: FILE_ID=SHOWN/ALL chunks."""
        shown = [f"{excerpt.file_id}={excerpt.shown}/{excerpt.chunks} chunks" for excerpt in self.excerpts]
        return {"x-ropewalk-retrieval": ", ".join(shown)} if shown else {}

    def usage(self) -> JSON:
        """Tokens of all prompts, each read once, and of all replies."""
        ended = [own.ended.usage.output for own in self.choices if own.ended is not None]
        prompt = sum(usage.input + usage.cache_creation + usage.cache_read for usage in self.usages.values())
        thought = sum(
            # Which ids were thinking is known by their text alone: its share of all that was said.
            round(own.ended.usage.output * len(own.thought) / (len(own.thought) + len(own.text) + len(json.dumps(own.calls))))
            for own in self.choices
            if own.thought and own.ended is not None
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": sum(ended),
            "total_tokens": prompt + sum(ended),
            "prompt_tokens_details": {"cached_tokens": sum(usage.cache_read for usage in self.usages.values())},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }

    # -- what shapes differ in

    object = chunk = ""

    def opening(self, choice: Choice) -> JSON:
        """What is sent of a choice before anything has been said; {} for nothing."""
        raise NotImplementedError

    def part(self, choice: Choice, delta: JSON) -> JSON:
        """What is sent of a choice while it comes."""
        raise NotImplementedError

    def choice(self, choice: Choice) -> JSON:
        """A whole one."""
        raise NotImplementedError

    def beside(self) -> JSON:
        """What a whole answer has beside its choices."""
        return {}

    # -- parts

    def ids_of(self, tokens: Sequence[Token]) -> JSON:
        """Ids of a choice, and of what version of the adapter they are, where that was asked for."""
        if not self.told.token_ids:
            return {}
        return {"token_ids": [token.id for token in tokens], "token_versions": [token.version for token in tokens]}

    def named(self, token: Token | Likely) -> str:
        """The text of a token, as it was asked for."""
        return f"token_id:{token.id}" if self.told.tokens_as_ids else token.text

    def stopped(self, choice: Choice) -> JSON:
        """How a choice ended, and at which stop sequence."""
        if choice.ended is None:
            return {"finish_reason": None}
        return {"finish_reason": choice.finish_reason, "stop_reason": choice.ended.stop_sequence}

    def _head(self, kind: str) -> JSON:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": None}

    def _sent(self, choices: list[JSON], choice: Choice) -> bytes:
        first = self.beside() if not choice.begun and choice.index == 0 else {}
        return self._data(
            {**self._head(self.chunk), "choices": choices, **({"usage": None} if self.told.usage else {}), **first}
        )

    def _data(self, found: JSON) -> bytes:
        return b"data: " + json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n\n"


class ChatWriter(Writer):
    """Chat completions."""

    object, chunk = "chat.completion", "chat.completion.chunk"

    def opening(self, choice: Choice) -> JSON:
        return {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def part(self, choice: Choice, delta: JSON) -> JSON:
        tokens = choice.told_tokens()
        found = {"index": choice.index, "delta": delta, "logprobs": self._logprobs(tokens) if tokens else None}
        return found | self.stopped(choice) | (self.ids_of(tokens) if tokens else {})

    def choice(self, choice: Choice) -> JSON:
        message: JSON = {"role": "assistant", "content": choice.text or (None if choice.calls else ""), "refusal": None}
        message |= {"reasoning_content": choice.thought} if choice.thought else {}
        message |= {"tool_calls": choice.calls} if choice.calls else {}
        found = {"index": choice.index, "message": message, "logprobs": self._logprobs(choice.tokens)}
        return found | self.stopped(choice) | self.ids_of(choice.tokens)

    def beside(self) -> JSON:
        return {"prompt_token_ids": list(self.choices[0].prompt)} if self.told.token_ids else {}

    def _logprobs(self, tokens: Sequence[Token]) -> JSON | None:
        if not self.told.logprobs:
            return None
        content = [{**self._likely(token), "top_logprobs": [self._likely(other) for other in token.top]} for token in tokens]
        return {"content": content, "refusal": None}

    def _likely(self, token: Token | Likely) -> JSON:
        known = None if token.data is None else list(token.data)
        return {"token": self.named(token), "logprob": token.logprob, "bytes": known}


class CompletionWriter(Writer):
    """Completions."""

    object = chunk = "text_completion"

    def opening(self, choice: Choice) -> JSON:
        if not self.told.token_ids:
            return {}
        found = {"index": choice.index, "text": "", "logprobs": None, "finish_reason": None}
        return found | {"prompt_token_ids": list(choice.prompt)}

    def part(self, choice: Choice, delta: JSON) -> JSON:
        tokens = choice.told_tokens()
        found = {"index": choice.index, "text": delta.get("content", ""), "logprobs": self._logprobs(choice, tokens)}
        return found | self.stopped(choice) | (self.ids_of(tokens) if tokens else {})

    def choice(self, choice: Choice) -> JSON:
        found = {"index": choice.index, "text": choice.text, "logprobs": self._logprobs(choice, choice.tokens)}
        prompt = {"prompt_token_ids": list(choice.prompt)} if self.told.token_ids else {}
        return found | self.stopped(choice) | self.ids_of(choice.tokens) | prompt

    def _logprobs(self, choice: Choice, tokens: Sequence[Token]) -> JSON | None:
        if not self.told.logprobs:
            return None
        told = len(choice.tokens) - len(choice.unsent) - len(tokens) if tokens is not choice.tokens else 0
        place = sum(len(token.text) for token in choice.tokens[:told])
        offsets = []
        for token in tokens:
            offsets.append(place)
            place += len(token.text)
        return {
            "tokens": [self.named(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._tops(token) for token in tokens] if any(token.top for token in tokens) else None,
            "text_offset": offsets,
        }

    def _tops(self, token: Token) -> dict[str, float]:
        """The likeliest by their text, and the one that was chosen."""
        shown: tuple[Token | Likely, ...] = (*token.top, token)
        return {self.named(likely): likely.logprob for likely in shown}


def sent_error(error: BaseException) -> bytes:
    """An error in the middle of a stream."""
    return b"data: " + json.dumps(error_of(error), separators=(",", ":")).encode() + b"\n\n"
