"""Words that give away who answered: an answer that names a candidate, or says which model it is, is shown to no voter."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# Families and what their models call themselves and their makers.
MAKERS = {
    "claude": ("claude", "anthropic"),
    "command": ("command r", "cohere"),
    "deepseek": ("deepseek",),
    "gemma": ("gemma", "gemini", "google deepmind"),
    "gpt": ("gpt", "chatgpt", "openai"),
    "granite": ("granite", "ibm"),
    "grok": ("grok", "xai"),
    "llama": ("llama", "meta ai"),
    "mistral": ("mistral", "mixtral", "ministral", "mistral ai"),
    "olmo": ("olmo", "allen institute"),
    "phi": ("phi", "microsoft"),
    "qwen": ("qwen", "tongyi", "alibaba"),
}
WHOSE = sorted({word for words in MAKERS.values() for word in words})
SELF = r"(?:\bi\s?['’]?\s?a?m\b|\bmy name is\b|\bas an? ai\b|\b(?:trained|made|developed|created|built) by\b)[^.!?\n]{0,80}?"


class IdentityWords:
    """What the answers of one comparison must not say."""

    def __init__(self, names: Iterable[str], families: Iterable[str]) -> None:
        words = {part for name in names for part in (name, name.rpartition("/")[2]) if len(part) > 2}
        for family in filter(None, families):
            words |= {family, *MAKERS.get(family, ())}
        anywhere = "|".join(filter(None, (_spelt(word) for word in sorted(words, key=len, reverse=True))))
        themselves = "|".join(_spelt(word) for word in WHOSE)
        self._anywhere = re.compile(rf"(?<![^\W_])(?:{anywhere})(?![^\W_\d])") if anywhere else None
        self._themselves = re.compile(rf"{SELF}(?<![^\W_])(?:{themselves})(?![^\W_\d])")

    def in_(self, answer: str) -> bool:
        """Whether an answer tells who it is of."""
        plain = "".join(c for c in unicodedata.normalize("NFKC", answer) if unicodedata.category(c) != "Cf").casefold()
        return bool((self._anywhere and self._anywhere.search(plain)) or self._themselves.search(plain))


def _spelt(word: str) -> str:
    """The word with whatever may stand between its parts: Qwen3 0.6B for qwen3-0.6b."""
    parts = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", word).casefold())
    return r"[\W_]{0,3}".join(map(re.escape, parts))
