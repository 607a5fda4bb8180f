"""Statements signed with the store's Ed25519 key: anybody who has the public key can check them offline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from ropewalk.errors import BadInput, NotFound, VerificationFailed


def canonical(value: Mapping[str, Any]) -> str:
    """JSON in its one form: sorted keys, no blanks, ASCII; values are texts, whole numbers, booleans, null, and lists of them."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def key_id(key: Ed25519PublicKey) -> str:
    """A short name for a public key: the beginning of its SHA-256."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def sign(statement: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """The statement with the key's id and its signature over everything else."""
    named = {**statement, "key_id": key_id(key.public_key())}
    return {**named, "signature": key.sign(canonical(named).encode()).hex()}


def check_signature(statement: Mapping[str, Any], public_key: Ed25519PublicKey) -> None:
    """Raises VerificationFailed unless the key signed exactly this."""
    named = statement.get("key_id")
    if named != key_id(public_key):
        raise VerificationFailed(f"the statement names the key '{named}', and the key at hand is '{key_id(public_key)}'")
    unsigned = {name: value for name, value in statement.items() if name != "signature"}
    try:
        signature = bytes.fromhex(str(statement.get("signature")))
        if signature.hex() != statement.get("signature"):  # one form only, so that any changed letter shows
            raise ValueError("not as written")
        public_key.verify(signature, canonical(unsigned).encode())
    except (ValueError, InvalidSignature):
        raise VerificationFailed("the signature does not match: the statement was changed, or another key made it") from None


def public_pem(key: Ed25519PublicKey) -> str:
    """A public key as text, as `ropewalk files receipt-key` prints it."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def read_public_key(path: Path) -> Ed25519PublicKey:
    """The public key that `ropewalk files receipt-key` printed."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise NotFound(f"cannot read the key '{path}': {error.strerror or error}") from error
    except ValueError as error:
        raise BadInput(f"'{path}' holds no public key in PEM; `ropewalk files receipt-key` prints one") from error
    if not isinstance(key, Ed25519PublicKey):
        raise BadInput(f"the key in '{path}' is no Ed25519 key; `ropewalk files receipt-key` prints the one to use")
    return key
