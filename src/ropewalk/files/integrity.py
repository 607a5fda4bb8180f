"""Whether what is stored is what was stored: every byte is read and hashed, at once or a little at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Row, func, select, update

from ropewalk.database import now
from ropewalk.errors import DamagedContent, VerificationFailed
from ropewalk.files import catalog, receipts
from ropewalk.files.catalog import File
from ropewalk.files.content import Content
from ropewalk.files.store import Store
from ropewalk.files.tables import archives, blobs, files
from ropewalk.tenants.secrets import workspace_purpose
from ropewalk.tenants.tables import chains, workspaces
from ropewalk.vault import unwrap

BATCH = 100
SCRUBBED_EVERY = 7 * 24 * 3600 * 1_000_000  # a content read since then is not read again by the scrubber

Progress = Callable[[int], None]  # plain bytes read since the last call


@dataclass
class VerifyReport:
    """What was read, and what is wrong with it."""

    contents: int = 0
    archives: int = 0
    size: int = 0
    receipts: int = 0
    damaged: dict[str, str] = field(default_factory=dict)  # a file's id, and the reason
    faults: list[str] = field(default_factory=list)  # what concerns no single file

    @property
    def whole(self) -> bool:
        return not self.damaged and not self.faults

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "whole": self.whole}


async def stored_bytes(store: Store) -> int:
    """How many plain bytes `verify` will read."""
    async with store.database.reading() as connection:
        sums = [select(func.coalesce(func.sum(column), 0)) for column in (blobs.c.size, archives.c.size)]
        return sum([int((await connection.execute(query)).scalar_one()) for query in sums])


async def verify(store: Store, progress: Progress | None = None) -> VerifyReport:
    """Reads every stored byte and the whole chain of receipts; what is damaged is marked so, and what is whole again is not."""
    report, last = VerifyReport(), ""
    while True:
        async with store.database.reading() as connection:
            query = select(blobs.c.id).where(blobs.c.id > last).order_by(blobs.c.id).limit(BATCH)
            ids = list((await connection.execute(query)).scalars())
        if not ids:
            break
        last = ids[-1]
        await _mark_whole(store, [id for id in ids if await _is_whole(store, id, report, progress)])
    report.archives, size, faults = await store.archives.verify()
    report.size, report.faults = report.size + size, [*report.faults, *faults]
    if progress:
        progress(size)
    await _verify_receipts(store, report)
    return report


async def scrub_step(store: Store, budget: int) -> VerifyReport:
    """Verifies what was not read for longest, until `budget` bytes are read or all was read not long ago."""
    report = VerifyReport()
    seen = func.coalesce(blobs.c.verified_at, blobs.c.created_at)
    due = (blobs.c.damaged_at.is_(None), seen < now() - SCRUBBED_EVERY)
    async with store.database.reading() as connection:
        query = select(blobs.c.id).where(*due).order_by(seen, blobs.c.id)
        ids = list((await connection.execute(query.limit(BATCH))).scalars())
    whole = list[str]()
    for id in ids:
        if report.size >= budget:
            break
        if await _is_whole(store, id, report, None):
            whole.append(id)
    await _mark_whole(store, whole)
    return report


async def _is_whole(store: Store, id: str, report: VerifyReport, progress: Progress | None) -> bool:
    """Reads one content and reports what is wrong with it, unless it is deleted meanwhile."""
    row, of = await _look(store, id)
    if row is None or (not of and row.counted):
        return False
    report.contents, report.size = report.contents + 1, report.size + row.size
    if row.counted != row.refs:
        report.faults.append(f"content {id}: {row.counted} files refer to it, and {row.refs} are counted")
    try:
        if len({(file.sha256, file.size) for file in of}) > 1:
            raise DamagedContent("the files of this content do not agree on its SHA-256")
        for file in of[:1]:
            async for chunk in _open(store, row, file).chunks():
                if progress:
                    progress(len(chunk))
        return True
    except DamagedContent as error:
        if (await _look(store, id))[0] is None:
            return False
        await store.mark_damaged(id)
        report.damaged |= {file.id: str(error) for file in of}
        return False


async def _look(store: Store, id: str) -> tuple[Row[Any] | None, list[File]]:
    """A content with its keys, and the files that refer to it."""
    # Counted in the same statement, which sees one moment of the database.
    counted = select(func.count()).select_from(files).where(files.c.blob_id == blobs.c.id).scalar_subquery()
    content = (
        select(blobs, workspaces.c.sealed_key.label("workspace_key"), counted.label("counted"))
        .join(workspaces, workspaces.c.id == blobs.c.workspace_id)
        .where(blobs.c.id == id)
    )
    async with store.database.reading() as connection:
        row = (await connection.execute(content)).first()
        return row, await catalog.sharing(connection, id)


def _open(store: Store, row: Row[Any], file: File) -> Content:
    if row.workspace_key is None:
        raise DamagedContent("the key of its workspace is gone")
    workspace_key = store.vault.unwrap(row.workspace_key, workspace_purpose(row.workspace_id))
    return Content(file, store.blobs, row.id, unwrap(workspace_key, row.sealed_key, f"data {row.id}"))


async def _mark_whole(store: Store, ids: list[str]) -> None:
    if ids:
        async with store.database.writing() as connection:
            await connection.execute(update(blobs).where(blobs.c.id.in_(ids)).values(verified_at=now(), damaged_at=None))


async def _verify_receipts(store: Store, report: VerifyReport) -> None:
    async with store.database.reading() as connection:
        query = select(chains.c.seq, chains.c.head).where(chains.c.name == receipts.CHAIN)
        head = (await connection.execute(query)).first()
        found = await receipts.issued(connection, head.seq) if head else []
    report.receipts = len(found)
    try:
        receipts.verify_chain(found, store.signing_key.public_key())
    except VerificationFailed as error:
        report.faults.append(str(error))
        return
    if head and (found[-1].digest() if found else receipts.FIRST) != head.head.hex():
        report.faults.append(f"the chain of receipts was cut off after receipt {len(found)}")
