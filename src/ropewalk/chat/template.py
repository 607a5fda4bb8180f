"""The only owner of the chat template: messages in, token ids and the mask of what is trained out.

Reads a model folder without transformers: tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from ropewalk.chat.marks import Span
from ropewalk.chat.masking import Habits, Rules, everywhere, learn, trained_spans
from ropewalk.chat.rendering import Message, Program, in_parts, with_pictures, with_written_arguments
from ropewalk.chat.tokenizer import (
    SPECIAL_NAMES,
    add_missing,
    choose_source,
    own_source,
    read_json,
    read_tokenizer,
    special_tokens_of,
)
from ropewalk.errors import ConfigError, DataError, ModelError


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it, and which of its tokens are trained."""

    text: str
    ids: list[int]
    train_mask: list[bool]


class Template:
    """A tokenizer and its chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str | None,
        special: Mapping[str, str],
        *,
        stops: Sequence[str] = (),
        eot_tokens: Sequence[str] = (),
        variables: Mapping[str, Any] | None = None,
        origin: str = "",
    ) -> None:
        self.tokenizer, self.special, self.origin = tokenizer, dict(special), origin
        self._source, self._stops = source, tuple(stops)
        self.eot_tokens = tuple(eot_tokens)
        for token in self.eot_tokens:
            if tokenizer.token_to_id(token) is None:
                raise ConfigError(
                    f"eot_tokens: '{token}' is not a single token of this tokenizer; "
                    "name one that the chat template ends turns with, or add it under 'tokens'"
                )
        self.program = Program(source, {**self.special, **(variables or {})}) if source is not None else None
        self.variables = dict(variables or {})

    @classmethod
    def load(
        cls,
        folder: Path,
        chat_template: str | None = None,
        *,
        chat_template_jinja: str | None = None,
        special_tokens: Mapping[str, Any] | None = None,
        tokens: Sequence[str] = (),
        eot_tokens: Sequence[str] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> Template:
        """Read a model folder; `chat_template` is one of Axolotl's names, `jinja`, or nothing for the model's own."""
        folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        tokenizer = read_tokenizer(folder)
        given = dict(special_tokens or {})
        further = given.pop("additional_special_tokens", None) or ()
        special = {**special_tokens_of(folder, config), **{k: v for k, v in given.items() if v}}
        add_missing(tokenizer, config, [*(special[k] for k in SPECIAL_NAMES if k in special), *further], tokens)
        source = choose_source(chat_template, chat_template_jinja, own_source(folder, config), folder)
        stops = read_json(folder / "generation_config.json").get("eos_token_id") or ()
        named = [tokenizer.id_to_token(i) for i in ([stops] if isinstance(stops, int) else stops)]
        return cls(
            tokenizer,
            source,
            special,
            stops=[token for token in named if token],
            eot_tokens=eot_tokens,
            variables=variables,
            origin=str(folder),
        )

    def named(self, chat_template: str | None, chat_template_jinja: str | None) -> Template:
        """The same tokenizer with another chat template: a data set may name its own."""
        folder = Path(self.origin)
        own = own_source(folder, read_json(folder / "tokenizer_config.json"))
        source = choose_source(chat_template, chat_template_jinja, own, folder)
        return _rebuild(self.tokenizer, source, self.special, self._stops, self.eot_tokens, self.variables, self.origin)

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes get a template as what it was made of; compiled Jinja cannot be sent.
        return _rebuild, (self.tokenizer, self._source, self.special, self._stops, self.eot_tokens, self.variables, self.origin)

    @property
    def eos_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """The padding token, or end-of-sequence where a tokenizer has none: padding is never trained nor attended to."""
        pad = self._id("pad_token")
        return self.eos_id if pad is None else pad

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which a reply ends."""
        names = [self.special.get("eos_token"), *self._stops, *self.eot_tokens, self.habits.last_end if self.program else None]
        ids = (self.tokenizer.token_to_id(name) for name in names if name)
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @cached_property
    def vocabulary(self) -> int:
        """The number of ids, added tokens included."""
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the template shows no content that is a plain text, but does show a list of parts."""
        probe = [{"role": "user", "content": "271828182"}]

        def shows(messages: Sequence[Message]) -> bool:
            try:
                return "271828182" in self.needed.run(messages)
            except DataError:
                return False

        return not shows(probe) and shows(in_parts(probe))

    @cached_property
    def habits(self) -> Habits:
        """What the template writes around an assistant's turn."""
        added = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
        return learn(self._run, added, self.special.get("eos_token"), [*self.eot_tokens, *self._stops])

    @cached_property
    def digest(self) -> str:
        """A hash of all that decides how text becomes ids: the key of tokenised caches."""
        parts = [self.tokenizer.to_str(), self._source or "", sorted(self.special.items()), self.eot_tokens, self._stops]
        parts += [sorted(self.variables.items()), str(date.today()) if self.program and self.program.dated else ""]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def needed(self) -> Program:
        if self.program is None:
            raise ModelError(
                f"{self.origin or 'this model'} has no chat template: name one with 'chat_template' "
                "(chatml, llama3, gemma, ...) or write one in 'chat_template_jinja'"
            )
        return self.program

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_content(self, text: str) -> list[int]:
        """Ids of a text that is only content: what looks like a control token is the characters it is written with."""
        plain = self._content_tokenizer
        ids: list[int] = plain.encode(text, add_special_tokens=False).ids
        if self._controls.isdisjoint(ids):
            return ids
        # Some added tokens are no special ones to the tokenizer, and still steer the template: their first character stands alone.
        ids, start = [], 0
        for match in self._control_words.finditer(text):
            for part in (text[start : match.start() + 1], text[match.start() + 1 : match.end()]):
                ids += plain.encode(part, add_special_tokens=False).ids if part else []
            start = match.end()
        return ids + (plain.encode(text[start:], add_special_tokens=False).ids if text[start:] else [])

    def has_control_tokens(self, text: str) -> bool:
        """Whether the tokenizer would take some of this text for a control token."""
        return self._control_words.search(text) is not None

    def control_parts(self, text: str) -> list[str | int]:
        """A text cut at its control tokens: plain words, and the ids of the tokens."""
        parts: list[str | int] = []
        start = 0
        for match in self._control_words.finditer(text):
            id: Any = self.tokenizer.token_to_id(match[0])
            parts += [text[start : match.start()], id]
            start = match.end()
        return [part for part in [*parts, text[start:]] if part != ""]

    @cached_property
    def _content_tokenizer(self) -> Tokenizer:
        twin = Tokenizer.from_str(self.tokenizer.to_str())
        twin.encode_special_tokens = True
        return twin

    @cached_property
    def _controls(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    @cached_property
    def _control_words(self) -> re.Pattern[str]:
        words = sorted((t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.content.strip()), key=len)
        return re.compile("|".join(re.escape(word) for word in reversed(words)) or r"(?!)")

    def encode_document(self, text: str) -> list[int]:
        """Ids of a text with what the tokenizer itself puts around a document (a beginning token, for most)."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int] | Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        text: str = self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        return text

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        rules: Rules | None = None,
        variables: Mapping[str, Any] | None = None,
        pictured: bool = False,
    ) -> Rendered:
        """A conversation's ids; with `rules`, the mask of what is trained (else nothing is: a prompt).

        `pictured`: its texts hold PICTURE where pictures are shown, for each of which the template writes one token.
        """
        render = partial(self._run, tools=tools, variables=variables, pictured=pictured)
        messages, text = self._rendered(messages, render, add_generation_prompt)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        mask = [False] * len(encoding.ids)
        if rules is not None:
            for begin, end in self._spans(messages, text, rules, render):
                first, last = _tokens_of(encoding, text, begin, end)
                mask[first:last] = [True] * (last - first)
        return Rendered(text, encoding.ids, mask)

    def render_text(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as text, before it becomes ids."""
        return self._rendered(messages, partial(self._run, tools=tools, variables=variables), add_generation_prompt)[1]

    def save(self, folder: Path) -> None:
        """Write what `load` reads, so that an adapter carries its tokenizer and chat template."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {**self.special, "tokenizer_class": "PreTrainedTokenizerFast"}
        if self._source is not None:
            (folder / "chat_template.jinja").write_text(self._source, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")

    def _rendered(self, messages: Sequence[Message], render: Any, add_generation_prompt: bool) -> tuple[Sequence[Message], str]:
        try:
            return messages, render(messages, add_generation_prompt=add_generation_prompt)
        except DataError:
            written = with_written_arguments(messages)
            if written == list(messages):
                raise
            return written, render(written, add_generation_prompt=add_generation_prompt)

    def _run(self, messages: Sequence[Message], *, pictured: bool = False, **options: Any) -> str:
        messages = with_pictures(messages) if pictured else messages
        return self.needed.run(in_parts(messages) if self.wants_parts else messages, **options)

    def _spans(self, messages: Sequence[Message], text: str, rules: Rules, again: Any) -> list[Span]:
        habits = self.habits
        eot = [token for token in habits.ends if token != habits.eos]
        return [
            *trained_spans(habits, messages, text, rules, again),
            *everywhere(text, [habits.eos] if habits.eos else [], rules.train_on_eos),
            *everywhere(text, eot, rules.train_on_eot or rules.train_on_eos),
        ]

    def _id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self.tokenizer.token_to_id(token)


def _rebuild(
    tokenizer: Tokenizer,
    source: str | None,
    special: Mapping[str, str],
    stops: Sequence[str],
    eot_tokens: Sequence[str],
    variables: Mapping[str, Any],
    origin: str,
) -> Template:
    return Template(tokenizer, source, special, stops=stops, eot_tokens=eot_tokens, variables=variables, origin=origin)


def _tokens_of(encoding: Encoding, text: str, begin: int, end: int) -> tuple[int, int]:
    """The tokens within a span of the text; one that reaches outside is left out, unless it takes nothing but blanks there."""
    offsets = encoding.offsets
    first = bisect_left(offsets, begin, key=lambda span: span[0])
    last = bisect_right(offsets, end, key=lambda span: span[1])
    if last < len(offsets) and offsets[last][0] < end and text[end : offsets[last][1]].isspace():
        last += 1
    if first > 0 and offsets[first - 1][1] > begin:
        # A prompt that ends in a blank makes one token with the first word, which must not be lost.
        start, stop = offsets[first - 1]
        first -= text[start:begin].isspace() and not text[begin:stop].isspace() and stop <= end
    return first, max(first, last)
