"""Receipts of deletions: what was erased and when, signed with the server's Ed25519 key, each naming the one before it.

A receipt holds the SHA-256 of the file's id and never the id or the file's name, so that the log of receipts, which outlives the
files, tells a stranger nothing; the owner, who knows the id, can show which file a receipt is of. The commit that stores a
receipt is the one that destroys the data key, so the content cannot be read again even where its sealed bytes are erased later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from sqlalchemy import insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import now, timestamp
from ropewalk.errors import NotFound, VerificationFailed
from ropewalk.files.tables import deletions
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.signing import canonical, check_signature, key_id, public_pem, sign
from ropewalk.tenants.tables import chains

CHAIN = "receipts"
FIRST = "0" * 64  # the digest before the first receipt's

# erased: no other file held these bytes, their data key is destroyed; shared: other files of the workspace hold equal bytes, which
# stay for them; expired: the bytes had been erased when the file expired.
ContentFate: TypeAlias = Literal["erased", "shared", "expired"]


@dataclass(frozen=True)
class Receipt:
    """One deletion."""

    sequence: int
    previous: str  # digest of the receipt before this one
    file_id_sha256: str
    workspace_id: str
    sha256: str
    size_bytes: int
    created_at: str
    deleted_at: str
    content: ContentFate
    shared_with: int  # other files of the workspace that hold equal bytes
    derived: tuple[str, ...]  # kinds of what was made from the file and erased with it
    adapters: tuple[str, ...]  # published adapters trained on the file; what they learnt cannot be erased
    key_id: str
    signature: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The receipt as its JSON object."""
        return {"type": "deletion_receipt", **asdict(self), "derived": list(self.derived), "adapters": list(self.adapters)}

    def as_json(self) -> str:
        """The one text that stands for it: what is signed, chained and stored."""
        return canonical(self.as_dict())

    def sign(self, key: Ed25519PrivateKey) -> Receipt:
        """The same receipt with the key's id and signature."""
        unsigned = {name: value for name, value in self.as_dict().items() if name != "signature"}
        return parse(sign(unsigned, key))

    def digest(self) -> str:
        """What the next receipt names as its previous."""
        return hashlib.sha256(self.as_json().encode()).hexdigest()

    def is_of(self, file_id: str) -> bool:
        """Whether this is the receipt of that file."""
        return self.file_id_sha256 == id_digest(file_id)


async def issue(
    connection: AsyncConnection,
    key: Ed25519PrivateKey,
    *,
    file_id: str,
    workspace_id: str,
    sha256: str,
    size: int,
    created_at: int,
    content: ContentFate,
    shared_with: int = 0,
    derived: Iterable[str] = (),
    adapters: Iterable[str] = (),
    user_id: str | None = None,
) -> Receipt:
    """Appends a receipt to the chain, inside the transaction that deletes the file."""
    sequence, head = await _next_place(connection)
    deleted_at = now()
    receipt = Receipt(
        sequence=sequence,
        previous=head.hex(),
        file_id_sha256=id_digest(file_id),
        workspace_id=workspace_id,
        sha256=sha256,
        size_bytes=size,
        created_at=timestamp(created_at),
        deleted_at=timestamp(deleted_at),
        content=content,
        shared_with=shared_with,
        derived=tuple(sorted(set(derived))),
        adapters=tuple(sorted(set(adapters))),
        key_id="",
    ).sign(key)
    row = {
        "seq": sequence,
        "workspace_id": workspace_id,
        "receipt": receipt.as_json(),
        "created_at": deleted_at,
        "user_id": user_id,
    }
    await connection.execute(insert(deletions).values(row))
    await connection.execute(update(chains).where(chains.c.name == CHAIN).values(head=bytes.fromhex(receipt.digest())))
    return receipt


async def _next_place(connection: AsyncConnection) -> tuple[int, bytes]:
    """The next sequence number and the digest of the last receipt; whoever comes after waits until this transaction ends."""
    advance = update(chains).where(chains.c.name == CHAIN).values(seq=chains.c.seq + 1).returning(chains.c.seq, chains.c.head)
    row = (await connection.execute(advance)).one_or_none()
    if row is None:
        begin = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        first = begin(chains).values(name=CHAIN, seq=0, head=bytes.fromhex(FIRST)).on_conflict_do_nothing()
        await connection.execute(first)
        row = (await connection.execute(advance)).one()
    return row.seq, row.head


async def issued(connection: AsyncConnection, up_to: int) -> list[Receipt]:
    """The receipts up to a sequence number in order, as they were signed."""
    query = select(deletions.c.receipt).where(deletions.c.seq <= up_to)
    rows = await connection.execute(query.order_by(deletions.c.seq))
    return [parse(json.loads(text)) for text in rows.scalars()]


async def find(connection: AsyncConnection, caller: Caller, file_id: str, sequence: int) -> Receipt:
    """A receipt of a file that the caller could see, for who knows the file's id."""
    here = [deletions.c.seq == sequence, deletions.c.workspace_id == caller.workspace_id]
    if caller.user_id is not None:
        here.append(deletions.c.user_id == caller.user_id)
    text = (await connection.execute(select(deletions.c.receipt).where(*here))).scalar()
    receipt = None if text is None else parse(json.loads(text))
    if receipt is None or not receipt.is_of(file_id):
        raise NotFound(f"There is no receipt {sequence} of a file `{file_id}`.")
    return receipt


def key_as_dict(key: Ed25519PublicKey) -> dict[str, str]:
    """The public key that receipts are verified with, as a JSON object."""
    return {"type": "receipt_key", "algorithm": "Ed25519", "key_id": key_id(key), "public_key": public_pem(key)}


def id_digest(file_id: str) -> str:
    """How a receipt names a file."""
    return hashlib.sha256(file_id.encode()).hexdigest()


def verify(receipt: Mapping[str, Any], public_key: Ed25519PublicKey) -> Receipt:
    """The receipt, if the key signed exactly this."""
    check_signature(receipt, public_key)
    return parse(receipt)


def verify_chain(receipts: Sequence[Receipt], public_key: Ed25519PublicKey) -> None:
    """Every signature, and that each receipt follows the one before it; all receipts from the first on, in order."""
    previous = FIRST
    for number, receipt in enumerate(receipts, 1):
        verify(receipt.as_dict(), public_key)
        if (receipt.sequence, receipt.previous) != (number, previous):
            raise VerificationFailed(
                f"receipt {receipt.sequence} does not follow receipt {number - 1}: one was taken out or put in"
            )
        previous = receipt.digest()


def parse(receipt: Mapping[str, Any]) -> Receipt:
    """A JSON object as a receipt."""
    expected = {"type", *(field.name for field in fields(Receipt))}
    if set(receipt) != expected or receipt["type"] != "deletion_receipt":
        wrong = sorted(set(receipt) ^ expected) or [f"type '{receipt['type']}'"]
        raise VerificationFailed(f"this is no receipt of a deletion; missing or unknown: {', '.join(wrong)}")
    values: dict[str, Any] = {name: value for name, value in receipt.items() if name != "type"}
    for name in ("derived", "adapters"):
        values[name] = tuple(values[name])
    return Receipt(**values)


def read_receipt(path: Path) -> dict[str, Any]:
    """A receipt's file; two values under one key are refused, since only one of them would be looked at."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise NotFound(f"cannot read the receipt '{path}': {error.strerror or error}") from error
    except ValueError as error:  # malformed JSON or malformed UTF-8 too
        raise VerificationFailed(f"'{path}' is no receipt: {error}") from error
    if not isinstance(found, dict):
        raise VerificationFailed(f"'{path}' is no receipt: expected one JSON object")
    return found
