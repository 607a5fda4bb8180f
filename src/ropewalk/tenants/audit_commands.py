"""The verbs of the audit log: list it, check it here or anywhere, take it out of the store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ropewalk.database import Database, timestamp
from ropewalk.errors import BadInput, NotFound, OutputError
from ropewalk.tenants import audit, workspaces
from ropewalk.tenants.commands import Place
from ropewalk.tenants.secrets import signing_key
from ropewalk.tenants.signing import read_public_key
from ropewalk.vault import Vault


def list_entries(place: Place, workspace: str | None, action: str | None, limit: int, before: int | None, as_json: bool) -> int:
    """Prints entries, newest first."""

    async def work(database: Database, _: Vault) -> list[dict[str, Any]]:
        workspace_id = None
        if workspace is not None:
            async with database.reading() as connection:
                workspace_id = (await workspaces.find_workspace(connection, workspace)).id
        return await audit.entries(database, limit=limit, before=before, workspace_id=workspace_id, action=action, newest=True)

    found = place.run(work)
    if as_json:
        print(json.dumps({"data": found}))
        return 0
    for entry in found:
        who = entry["key_id"] or "-"
        user = f" for {entry['user_id']}" if entry["user_id"] else ""
        detail = f"  {json.dumps(entry['detail'])}" if entry["detail"] else ""
        print(
            f"{entry['seq']:>6}  {timestamp(entry['at'])}  {entry['action']:18}  {entry['outcome']:13}  {entry['subject']}  {who}{user}{detail}"
        )
    return 0


def verify(place: Place, heads: Sequence[Path], public_key: Path | None, save_head: Path | None, as_json: bool) -> int:
    """Checks the log from its first entry, beside the signed heads that were saved before; fails if anything is amiss."""
    given = read_public_key(public_key) if public_key else None
    known = [head for path in heads for head in read_heads(path)]

    async def work(database: Database, vault: Vault) -> tuple[audit.AuditReport, dict[str, Any]]:
        async with database.reading() as connection:
            key = await signing_key(connection, vault)
        report = await audit.verify(database, known, given or key.public_key())
        return report, await audit.signed_head(database, key)

    report, head = place.run(work)
    _report(report, as_json, head)
    if save_head is not None:
        _write(save_head, [head])
    return 0


def verify_export(place: Place, path: Path, public_key: Path | None, as_json: bool) -> int:
    """Checks an exported log; with the public key, without the store that it is of."""
    key = read_public_key(public_key) if public_key else store_public_key(place)
    _report(audit.verify_export(_lines(path), key), as_json)
    return 0


def export(place: Place, out: Path | None) -> int:
    """Prints or writes the whole log, one JSON object a line, and last its signed head."""

    async def work(database: Database, vault: Vault) -> None:
        async with database.reading() as connection:
            key = await signing_key(connection, vault)
        if out is None:
            async for line in audit.export(database, key):
                print(json.dumps(line))
            return
        try:
            with out.open("w", encoding="ascii") as file:
                async for line in audit.export(database, key):
                    file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write '{out}': {error.strerror or error}") from error

    place.run(work)
    return 0


def store_public_key(place: Place) -> Ed25519PublicKey:
    """The key by which this store's signatures are checked."""

    async def work(database: Database, vault: Vault) -> Ed25519PublicKey:
        async with database.reading() as connection:
            return (await signing_key(connection, vault)).public_key()

    return place.run(work)


def read_heads(path: Path) -> list[dict[str, Any]]:
    """The signed heads in a file: what `--save-head` wrote, or the last line of an exported log."""
    found = [line for line in _lines(path) if line.get("type") == "audit_head"]
    if not found:
        raise BadInput(f"'{path}' holds no signed head; expected what `ropewalk audit verify --save-head` or `export` wrote")
    return found


def _report(report: audit.AuditReport, as_json: bool, head: dict[str, Any] | None = None) -> None:
    told = {
        "entries": report.entries,
        "faults": list(report.faults),
        "head": head or {"sequence": report.sequence, "head": report.head},
    }
    if as_json:
        print(json.dumps(told))
    report.check()
    if not as_json:
        print(f"{report.entries:,} entries, every one as it was written; the last is {report.sequence}, {report.head}")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                found = json.loads(line)
                if not isinstance(found, dict):
                    raise ValueError(f"line {number} is no JSON object")
                yield found
    except OSError as error:
        raise NotFound(f"cannot read '{path}': {error.strerror or error}") from error
    except ValueError as error:  # malformed JSON or malformed UTF-8 too
        raise BadInput(f"'{path}' is no exported audit log: {error}") from error


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    try:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="ascii")
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror or error}") from error
