"""One token as text and as bytes: many are only a part of a character."""

from __future__ import annotations

import re
from functools import cache

from tokenizers import Tokenizer

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece writes a byte that is no character
BROKEN = "\ufffd"


def token_text(tokenizer: Tokenizer, id: int) -> tuple[str, bytes | None]:
    """A token by itself: its text, and its bytes where they are known."""
    text: str = tokenizer.decode([id], skip_special_tokens=False)
    if BROKEN not in text:
        return text, text.encode(errors="replace")
    written = tokenizer.id_to_token(id) or ""
    if match := BYTE.fullmatch(written):
        return text, bytes([int(match[1], 16)])
    letters = _letters()
    return text, bytes(letters[letter] for letter in written) if written and all(x in letters for x in written) else None


@cache
def _letters() -> dict[str, int]:
    """The letters that byte-level vocabularies write for bytes: those that are printable as they are, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + number): byte for number, byte in enumerate(rest)}
