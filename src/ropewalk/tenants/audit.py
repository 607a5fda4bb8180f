"""The audit log: who did what to which id, each entry naming the digest of the one before it.

An entry is written in the transaction of the operation it tells of: neither is there without the other. It never holds a file's
name or content. The digests are plain SHA-256, so that an exported log can be checked with nothing else at hand:

    changed, removed, inserted or reordered entries      found by `verify`
    entries cut off at the end                           found by `verify`: the table `chains` knows the head
    a log rewritten whole, or cut off with its head      found by `verify` beside a signed head that was exported before

Only who has the root key can sign a head, so an exported one cannot be replaced by who can write to the database.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from sqlalchemy import RowMapping, bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import Database, now
from ropewalk.errors import VerificationFailed
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.signing import canonical, check_signature, sign
from ropewalk.tenants.tables import audit, chains

FIRST = bytes(32)  # the digest before the first entry's
BATCH = 1000
FAULTS = 20  # of a log that is broken everywhere, only so many are told
ACTIONS = frozenset(
    {
        "file_uploaded",
        "file_downloaded",
        "file_deleted",
        "file_expired",
        "denied",
        "key_created",
        "key_revoked",
        "workspace_created",
        "workspace_changed",
        "workspace_archived",
        "workspace_deleted",
        "limits_changed",
        "root_rotated",
        "alias_shipped",
        "alias_rolled_back",
        "job_created",
        "job_stopped",
        "job_resumed",
        "job_ended",
    }
)


# Put together once: every upload, download and deletion runs them.
HEAD = select(chains.c.seq, chains.c.head).where(chains.c.name == "audit").with_for_update()
ENTRY = insert(audit)
ADVANCE = update(chains).where(chains.c.name == "audit").values(seq=bindparam("to_seq"), head=bindparam("to_head"))


@dataclass(frozen=True)
class AuditReport:
    """What `verify` found."""

    entries: int
    sequence: int  # of the head
    head: str  # hex
    faults: tuple[str, ...]

    def check(self) -> None:
        """Raises VerificationFailed for a log that is not what was written."""
        if self.faults:
            raise VerificationFailed(f"the audit log is not what was written: {'; '.join(self.faults)}")


async def append(
    connection: AsyncConnection,
    caller: Caller | None,
    action: str,
    subject: str,
    outcome: str = "ok",
    request_id: str = "",
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Adds an entry to the transaction; best as its last statement, since the chain is locked from here to the commit."""
    assert action in ACTIONS, action
    head = (await connection.execute(HEAD)).one()
    entry = {
        "seq": head.seq + 1,
        "at": now(),
        "organization_id": caller.organization_id if caller else None,
        "workspace_id": caller.workspace_id if caller else None,
        "key_id": caller.key_id if caller else None,
        "user_id": caller.user_id if caller else None,
        "action": action,
        "subject": subject,
        "outcome": outcome,
        "request_id": request_id,
        "detail": canonical(detail or {}),
        "previous": head.head,
    }
    digest = entry_digest(_shown(entry))
    await connection.execute(ENTRY, {**entry, "digest": digest})
    await connection.execute(ADVANCE, {"to_seq": head.seq + 1, "to_head": digest})


async def start_chain(connection: AsyncConnection, database: Database) -> None:
    """The head of a log with no entries, where there is none."""
    await connection.execute(database.upsert(chains).values(name="audit", seq=0, head=FIRST).on_conflict_do_nothing())


def entry_digest(entry: Mapping[str, Any]) -> bytes:
    """SHA-256 of everything that an entry, as a JSON object, says; the digest of the one before it is part of that."""
    return hashlib.sha256(canonical({name: value for name, value in entry.items() if name != "digest"}).encode()).digest()


async def entries(
    database: Database,
    *,
    limit: int | None = None,
    after: int = 0,
    before: int | None = None,
    workspace_id: str | None = None,
    action: str | None = None,
    newest: bool = False,
) -> list[dict[str, Any]]:
    """Entries between two sequence numbers, as JSON objects; at most BATCH unless told otherwise."""
    query = select(audit).where(audit.c.seq > after).limit(limit or BATCH)
    if before is not None:
        query = query.where(audit.c.seq < before)
    if workspace_id is not None:
        query = query.where(audit.c.workspace_id == workspace_id)
    if action is not None:
        query = query.where(audit.c.action == action)
    async with database.reading() as connection:
        rows = await connection.execute(query.order_by(audit.c.seq.desc() if newest else audit.c.seq))
        return [_shown(row) for row in rows.mappings()]


async def verify(
    database: Database, heads: Iterable[Mapping[str, Any]] = (), public_key: Ed25519PublicKey | None = None
) -> AuditReport:
    """Reads the whole log; `heads` are signed heads exported before, which must lie on it."""
    known = _by_sequence(heads, public_key)
    async with database.reading() as connection:
        head = (await connection.execute(select(chains).where(chains.c.name == "audit"))).first()
    if head is None:
        return AuditReport(0, 0, FIRST.hex(), ("the chain has no head: the row 'audit' of the table 'chains' was removed",))
    chain = _Chain(known)
    # Entries are only added while this reads, so the log up to the head of a moment ago is one state of it.
    after = 0
    while found := await entries(database, after=after, before=head.seq + 1):
        for entry in found:
            chain.see(entry)
        after = found[-1]["seq"]
    chain.end(head.seq, head.head.hex())
    return AuditReport(chain.count, head.seq, head.head.hex(), tuple(chain.faults))


async def signed_head(database: Database, key: Ed25519PrivateKey) -> dict[str, Any]:
    """Where the log ends now, signed: kept elsewhere, it shows later whether entries were cut off or rewritten."""
    async with database.reading() as connection:
        head = (await connection.execute(select(chains).where(chains.c.name == "audit"))).one()
    return _signed(head.seq, head.head.hex(), key)


async def export(database: Database, key: Ed25519PrivateKey) -> AsyncIterator[dict[str, Any]]:
    """Every entry, oldest first, and last the signed head."""
    after, head = 0, FIRST.hex()
    while found := await entries(database, after=after):
        for entry in found:
            yield entry
        after, head = found[-1]["seq"], found[-1]["digest"]
    yield _signed(after, head, key)


def verify_export(lines: Iterable[Mapping[str, Any]], public_key: Ed25519PublicKey) -> AuditReport:
    """Checks an exported log offline: its chain, and that it ends with the head that the key signed."""
    chain, head = _Chain({}), None
    for line in lines:
        if head is not None:
            chain.fault("something follows the signed head")
        if line.get("type") == "audit_head":
            check_signature(line, public_key)
            head = line
        else:
            chain.see(line)
    if head is None:
        raise VerificationFailed("the exported log does not end with a signed head: it was cut off")
    chain.end(head["sequence"], head["head"])
    return AuditReport(chain.count, head["sequence"], head["head"], tuple(chain.faults))


class _Chain:
    """Entries as they come by, in the order of their sequence numbers."""

    def __init__(self, known: Mapping[int, str]) -> None:
        self.count, self.faults, self._known = 0, list[str](), dict(known)
        self._seq, self._digest = 0, FIRST.hex()

    def see(self, entry: Mapping[str, Any]) -> None:
        seq = entry["seq"]
        if seq != self._seq + 1:
            self.fault(
                f"entries {self._seq + 1} to {seq - 1} are missing" if seq > self._seq else f"entry {seq} is out of order"
            )
        elif entry["previous"] != self._digest:
            self.fault(f"entry {seq} does not follow entry {self._seq}: one of them was exchanged")
        if entry_digest(entry).hex() != entry["digest"]:
            self.fault(f"entry {seq} was changed")
        if self._known.pop(seq, entry["digest"]) != entry["digest"]:
            self.fault(f"entry {seq} is not the one whose digest was signed: the log was rewritten")
        self.count, self._seq, self._digest = self.count + 1, seq, entry["digest"]

    def end(self, seq: int, head: str) -> None:
        if self._seq < seq:
            self.fault(f"entries {self._seq + 1} to {seq} are missing at the end")
        elif (self._seq, self._digest) != (seq, head):
            self.fault(f"the log ends with another entry than its head, {seq}")
        for sequence, digest in sorted(self._known.items()):
            if (sequence, digest) != (0, FIRST.hex()):
                self.fault(f"entry {sequence} was signed as the log's head and is not there: the log was cut off or rewritten")

    def fault(self, message: str) -> None:
        if len(self.faults) < FAULTS:
            self.faults.append(message)


def _signed(sequence: int, head: str, key: Ed25519PrivateKey) -> dict[str, Any]:
    return sign({"type": "audit_head", "sequence": sequence, "head": head, "at": now()}, key)


def _by_sequence(heads: Iterable[Mapping[str, Any]], public_key: Ed25519PublicKey | None) -> dict[int, str]:
    known: dict[int, str] = {}
    for head in heads:
        assert public_key is not None
        check_signature(head, public_key)
        if known.setdefault(head["sequence"], head["head"]) != head["head"]:
            raise VerificationFailed(
                f"two signed heads name different entries {head['sequence']}: the log was rewritten between"
            )
    return known


def _shown(entry: Mapping[str, Any] | RowMapping) -> dict[str, Any]:
    shown = {name: value.hex() if isinstance(value, bytes) else value for name, value in entry.items()}
    return {**shown, "detail": json.loads(shown["detail"])}
