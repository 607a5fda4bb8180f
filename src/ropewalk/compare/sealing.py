"""Texts of a suite, its answers and what is said of them: sealed under the suite's key, whose end is theirs."""

from __future__ import annotations

import hashlib
import hmac

from ropewalk.vault import derive, unwrap, wrap


def seal(key: bytes, text: str, purpose: str) -> bytes:
    """The text, to be opened with the same key for the same purpose only, such as "output out_..."."""
    return wrap(key, text.encode("utf-8", "surrogatepass"), purpose)


def unseal(key: bytes, sealed: bytes, purpose: str) -> str:
    """The text that `seal` was given."""
    return unwrap(key, sealed, purpose).decode("utf-8", "surrogatepass")


def keyed_hash(key: bytes, text: str) -> str:
    """Equal for equal texts of one suite, and tells nothing without its key."""
    return hmac.new(derive(key, "hash"), text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]
