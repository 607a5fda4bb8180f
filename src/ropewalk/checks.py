"""How an answer is held against what was expected; the same checks serve evaluation, suites and rewards."""

from __future__ import annotations

import unicodedata


def normalise(text: str) -> str:
    """Composed Unicode, single spaces, nothing around: what two equal answers have in common on every machine."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(answer: str, expected: str) -> bool:
    """The answer is the expected text, letter for letter, up to white space and Unicode composition."""
    return normalise(answer) == normalise(expected)


def contains(answer: str, expected: str) -> bool:
    """The expected text stands somewhere in the answer as whole words: right whatever the phrasing; right in value, not in format."""
    answer, expected = normalise(answer), normalise(expected)
    start = answer.find(expected)
    while start >= 0:
        end = start + len(expected)
        before, after = answer[start - 1 : start], answer[end : end + 1]
        if not (before.isalnum() and expected[:1].isalnum()) and not (after.isalnum() and expected[-1:].isalnum()):
            return bool(expected)
        start = answer.find(expected, start + 1)
    return False
