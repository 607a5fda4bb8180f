"""What crash_files.py asks of a store after each kill: what was acknowledged is whole, what was deleted is gone, and all is counted."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sqlalchemy import func, select, text

from crash_work import LEASE, Begun, Known
from ropewalk.database import now
from ropewalk.errors import FileExpired, NotFound
from ropewalk.files import tables
from ropewalk.files.lifecycle import sweep
from ropewalk.files.store import Store
from ropewalk.tenants import quotas
from ropewalk.tenants import tables as tenants
from ropewalk.tenants.audit import verify as verify_audit
from ropewalk.tenants.caller import Caller
from ropewalk.vault import sealed_size
from sites import Site


@dataclass
class Report:
    """What the check found after one kill."""

    lost: list[str] = field(default_factory=list)
    ghosts: list[str] = field(default_factory=list)
    quota_errors: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    late: list[dict[str, Any]] = field(default_factory=list)  # committed, but the kill took the answer
    deleted: list[str] = field(default_factory=list)  # the same of deletions
    begun: list[Begun] = field(default_factory=list)  # uploads in several requests that are not yet a file


async def sweep_once(site: Site) -> None:
    """A sweep that may be killed on its way."""
    store = await Store.open(site.settings(LEASE))
    try:
        await _outlive_leases(store)
        await sweep(store)
    finally:
        await store.close()


async def check(
    site: Site, live: dict[str, Known], dead: list[str], begun: dict[str, Begun], flying: list[dict[str, Any]]
) -> Report:
    """Opens the store as a new process does, sweeps, and compares everything with what had been acknowledged."""
    store = await Store.open(site.settings(LEASE))
    try:
        await _outlive_leases(store)
        await sweep(store)
        report, found = Report(), {}
        for caller in {c.workspace_id: c for c in site.callers if c.user_id is None}.values():
            listing = await store.list(caller, 1000)
            assert not listing.more
            found.update({file.id: file for file in listing.files})
        uploads = {event["file"]["name"]: event["file"] for event in flying if event["operation"] in ("upload", "finish")}
        deletions = {event["id"] for event in flying if event["operation"] == "delete"}
        for id, known in live.items():
            if id in deletions and id not in found:
                report.deleted.append(id)
                await _expect_missing(store, site.callers[known.caller], id, report)
            else:
                await _expect_whole(store, site, known, report)
        for id in set(found) - set(live):
            file = found[id]
            if file.filename not in uploads:
                report.ghosts.append(f"{id} ({file.filename}) is visible, and no upload of it was acknowledged or in flight")
                continue
            late = Known(**uploads[file.filename])
            late.id, late.expires_at = id, file.expires_at
            await _expect_whole(store, site, late, report)
            report.late.append(asdict(late))
        for id in dead[-10:]:
            await _expect_missing(store, site.callers[0], id, report)
        report.ghosts += [f"{id} was deleted and is visible" for id in set(dead) & set(found)]
        await _compare_begun(store, begun, flying, report)
        await _compare_bytes(store, report)
        await _compare_usage(store, report)
        return report
    finally:
        await store.close()


async def verify_chains(site: Site) -> int:
    """The number of entries of the audit log, whose chain is whole."""
    store = await Store.open(site.settings(LEASE))
    try:
        found = await verify_audit(store.database)
        found.check()
        return found.entries
    finally:
        await store.close()


async def _outlive_leases(store: Store) -> None:
    """Waits for what was under way when the process was killed: PostgreSQL may still commit for it, and its uploads hold a lease."""
    if store.database.dialect == "postgresql":
        others = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
        async with store.database.reading() as connection:
            while (await connection.execute(others)).scalar_one():
                await connection.rollback()  # activity is one snapshot for a transaction
                await asyncio.sleep(0.01)
    async with store.database.reading() as connection:
        until = (await connection.execute(select(func.max(tables.uploads.c.lease_until)))).scalar()
    if until is not None and until >= now():
        await asyncio.sleep((until - now()) / 1_000_000 + 0.01)


async def _expect_whole(store: Store, site: Site, known: Known, report: Report) -> None:
    caller = site.callers[known.caller]
    try:
        file = await store.show(caller, known.id)
        told = (file.filename, file.size, file.sha256, file.user_id, file.key_id, file.expires_at)
        expected = (known.name, known.size, known.sha256, caller.user_id, caller.key_id, known.expires_at)
        if told != expected:
            report.lost.append(f"{known.id}: {told} is told of it, {expected} was acknowledged")
        hour_passed = known.expires_at is not None and known.expires_at <= now()
        data = await (await store.open_content(caller, known.id)).read()
        if hour_passed:
            report.ghosts.append(f"{known.id} can be read although its hour has passed")
        if (len(data), hashlib.sha256(data).hexdigest()) != (known.size, known.sha256):
            report.lost.append(f"{known.id}: its bytes are not those that were uploaded")
    except FileExpired:
        if known.expires_at is None or known.expires_at > now():
            report.lost.append(f"{known.id} is told to have expired, and has not")
    except Exception as error:
        report.lost.append(f"{known.id}: {type(error).__name__}: {error}")


async def _expect_missing(store: Store, caller: Caller, id: str, report: Report) -> None:
    try:
        await store.open_content(caller, id)
        report.ghosts.append(f"{id} was deleted and can be read")
    except NotFound:
        pass


async def _compare_begun(store: Store, begun: dict[str, Begun], flying: list[dict[str, Any]], report: Report) -> None:
    """Uploads in several requests have at least what was acknowledged of them, and none is there that nobody began."""
    async with store.database.reading() as connection:
        rows = {row.id: row for row in (await connection.execute(select(tables.resumables))).all()}
    creations = {event["file"]["name"]: event for event in flying if event["operation"] == "create"}
    finishing = {event["id"] for event in flying if event["operation"] == "finish"}
    for id, known in begun.items():
        row = rows.get(id)
        if row is None or row.received < known.received:
            report.lost.append(f"{id}: {known.received} bytes of it were acknowledged, and {row and row.received} are there")
        elif row.file_id is None:
            report.begun.append(replace(known, received=row.received))
        elif id not in finishing:
            report.ghosts.append(f"{id} has become a file that nobody asked for")
    for id, row in rows.items():
        if id not in begun and row.file_id is None:
            if row.filename in creations:
                event = creations[row.filename]
                report.begun.append(Begun(id, Known(**event["file"]), event["seed"], row.received))
            else:
                report.ghosts.append(f"the upload {id} is there, and nobody began it")


async def _compare_bytes(store: Store, report: Report) -> None:
    """Published names are exactly those of the rows; nothing is staged, reserved for an upload, or waiting to be erased."""
    async with store.database.reading() as connection:
        rows = (await connection.execute(select(tables.blobs))).all()
        held = select(tables.files.c.blob_id, func.count()).where(tables.files.c.blob_id.is_not(None))
        refs = dict((await connection.execute(held.group_by(tables.files.c.blob_id))).tuples().all())
        made = set((await connection.execute(select(tables.derived.c.stored))).scalars())
        parts = dict((await connection.execute(select(tables.parts.c.name, tables.parts.c.size))).tuples().all())
        waiting = [
            (await connection.execute(select(func.count()).select_from(table))).scalar_one()
            for table in (tables.uploads, tables.erasures)
        ]
    names = set(await asyncio.to_thread(lambda: set(store.blobs.names())))
    staged = await asyncio.to_thread(lambda: list(store.blobs.staged()))
    ids = {row.id for row in rows}
    made |= parts.keys()
    report.lost += [
        f"the part {name} was counted and is not there" for name, size in parts.items() if size and name not in names
    ]
    report.lost += [f"the bytes {name} have a row and are not there" for name in ids - names]
    report.orphans += [f"the bytes {name} have no row" for name in names - ids - made]
    # What is made from a file, or is part of an upload in several requests, has a row that says so, and is given up later.
    report.orphans += [f"the bytes {name} are staged by nobody" for name in staged if name not in made]
    report.orphans += [f"{count} rows of {what} are left" for count, what in zip(waiting, ("uploads", "erasures")) if count]
    for row in rows:
        if refs.get(row.id, 0) != row.refs:
            report.orphans.append(f"the bytes {row.id} count {row.refs} files, and {refs.get(row.id, 0)} hold them")
        if row.id in names and (size := await asyncio.to_thread(store.blobs.size, row.id)) != sealed_size(row.size):
            report.lost.append(f"the bytes {row.id} are {size} long and should be {sealed_size(row.size)}")


async def _compare_usage(store: Store, report: Report) -> None:
    """Every counter equals the sum over the rows; only uploads in several requests have anything reserved."""
    async with store.database.reading() as connection:
        query = select(tables.files, tenants.workspaces.c.organization_id)
        query = query.join(tenants.workspaces, tenants.workspaces.c.id == tables.files.c.workspace_id)
        rows = (await connection.execute(query.where(tables.files.c.expired_at.is_(None)))).all()
        counters = (await connection.execute(select(tenants.usage))).all()
        held = (await connection.execute(select(tables.resumables).where(tables.resumables.c.reserved))).all()
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    reserved: dict[tuple[str, str], tuple[int, int]] = {}
    for row in held:
        for scope in quotas.scopes(Caller(row.organization_id, row.workspace_id, row.key_id, row.user_id)):
            size, count = reserved.get(scope, (0, 0))
            reserved[scope] = size + row.length, count + 1
    for row in rows:
        for scope in quotas.scopes(Caller(row.organization_id, row.workspace_id, row.key_id, row.user_id)):
            used, count = sums.get(scope, (0, 0))
            sums[scope] = used + row.size, count + 1
    told = {(row.scope, row.id): (row.used_bytes, row.used_files) for row in counters}
    for scope in told.keys() | sums.keys():
        if told.get(scope, (0, 0)) != sums.get(scope, (0, 0)):
            report.quota_errors.append(f"{scope}: counted {told.get(scope)}, the rows hold {sums.get(scope)}")
    for row in counters:
        taken = (row.reserved_bytes, row.reserved_files)
        if taken != (expected := reserved.get((row.scope, row.id), (0, 0))):
            report.quota_errors.append(f"{row.scope} {row.id}: {taken} bytes and files reserved, should be {expected}")
