"""Names for what is made here: random, so that nobody can guess one or learn from it when and how often things are made."""

from __future__ import annotations

import secrets
import string

ALPHABET = string.digits + string.ascii_letters
CHARACTERS = 24  # 142 bits


def new_id(kind: str) -> str:
    """A random id: file_..., wrkspc_..., msg_..."""
    return f"{kind}_{''.join(secrets.choice(ALPHABET) for _ in range(CHARACTERS))}"
