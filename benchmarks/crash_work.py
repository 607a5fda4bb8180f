"""What crash_files.py runs in processes of its own: mixed work on a store until it is killed, and the check afterwards."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sqlalchemy import func, select, text

from ropewalk.database import now
from ropewalk.errors import DamagedContent, FileExpired, NotFound, OutputError, Overloaded, QuotaExceeded
from ropewalk.files import resumable, tables
from ropewalk.files.lifecycle import expire, sweep
from ropewalk.files.store import Store
from ropewalk.tenants import quotas
from ropewalk.tenants import tables as tenants
from ropewalk.tenants.audit import verify as verify_audit
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import create_workspace
from ropewalk.vault import CHUNK, sealed_size
from sites import Site

LEASE = 0.15  # seconds; an upload that its process took with it is given up after so long
SIZES = [0, 1, 700, 5_000, 70_000, CHUNK - 1, CHUNK, CHUNK + 1, 2_500_000]
LIKELY = [1, 1, 6, 6, 4, 1, 1, 1, 1]
SHARED = 6  # contents that are uploaded again and again, so that bytes are shared
FEW = 5
ENOUGH = 25  # files; beyond this the work deletes more than it uploads
MIX = {"upload": 36, "resume": 10, "delete": 22, "abandon": 8, "derive": 8, "read": 6, "expire": 4, "sweep": 4}
LEANINGS = {
    "delete": {"delete": 30},
    "expire": {"expire": 30},
    "resumable": {"resume": 60},
}  # by the failpoint that is aimed at

Emit = Callable[[dict[str, Any]], None]


@dataclass
class Known:
    """A file that the store has acknowledged, or the upload of one."""

    name: str
    size: int
    sha256: str
    caller: int
    expires_in: int | None = None
    id: str = ""
    expires_at: int | None = None


@dataclass
class Begun:
    """An upload in several requests that the store has acknowledged, and how much of it."""

    id: str
    file: Known
    seed: int
    received: int = 0


@dataclass(frozen=True)
class Share:
    """What one worker may lay its hands on."""

    live: dict[str, int]  # id of a file -> its caller
    begun: list[Begun]


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


async def prepare(site: Site) -> list[Caller]:
    """A new store with two workspaces, three keys, two users, one of whom is short of room."""
    store = await Store.open(site.settings(LEASE))
    try:
        home = await store.local_caller()
        other = await create_workspace(store.database, store.vault, "other")
        organization = home.organization_id
        callers = [
            Caller(organization, home.workspace_id, "key_a"),
            Caller(organization, home.workspace_id, "key_a", "ann"),
            Caller(organization, home.workspace_id, "key_b", "bob"),
            Caller(organization, other.id, "key_c"),
        ]
        async with store.database.writing() as connection:
            await quotas.set_limit(connection, "user", f"{home.workspace_id}/ann", 3_000_000, 8)
        return callers
    finally:
        await store.close()


# -- the work


class Work:
    """Operations through the store's public interface, each announced before and acknowledged after."""

    def __init__(self, store: Store, site: Site, emit: Emit, rng: random.Random, share: Share, leaning: str) -> None:
        self.store, self.site, self.emit, self.rng = store, site, emit, rng
        self.live, self.begun = dict(share.live), list(share.begun)
        self.weights = MIX | LEANINGS.get(leaning, {})
        self.number = 0
        self.soon = 0.5 if leaning == "expire" else 0.15  # share of uploads that expire

    async def run_forever(self) -> None:
        while True:
            await self.step()

    async def step(self) -> None:
        weights = dict(self.weights)
        if len(self.live) > ENOUGH:
            weights["delete"] *= 4
        name = self.rng.choices(list(weights), list(weights.values()))[0]
        if name in ("delete", "derive", "read") and len(self.live) < FEW:
            name = "upload"  # so that every kill has files to lose
        operations: dict[str, Callable[[int], Awaitable[None]]] = {
            "upload": self.upload,
            "delete": self.delete,
            "resume": self.resume,
            "abandon": self.abandon,
            "derive": self.derive,
            "read": self.read,
            "expire": self.expire,
            "sweep": self.sweep,
        }
        await operations[name](self.next())

    def next(self) -> int:
        self.number += 1
        return self.number

    def begin(self, number: int, operation: str, **more: Any) -> None:
        self.emit({"begin": number, "operation": operation, **more})

    def end(self, number: int, result: str = "ok", **more: Any) -> None:
        self.emit({"end": number, "result": result, **more})

    def invent(self) -> tuple[Known, int]:
        """A file to upload, and what its bytes are made from."""
        seed = self.rng.randrange(SHARED) if self.rng.random() < 0.4 else self.rng.getrandbits(60)
        data = contents(seed)
        expires_in = self.rng.choice([0, 1]) if self.rng.random() < self.soon else None
        caller = self.rng.randrange(len(self.site.callers))
        known = Known(f"{secrets.token_hex(8)}.bin", len(data), hashlib.sha256(data).hexdigest(), caller, expires_in)
        return known, seed

    async def upload(self, number: int) -> None:
        known, seed = self.invent()
        data = contents(seed)
        self.begin(number, "upload", file=asdict(known))
        announced = len(data) if self.rng.random() < 0.5 else None
        try:
            async with self.store.incoming(self.site.callers[known.caller], announced) as incoming:
                for start in range(0, len(data), 300_000):
                    await incoming.write(data[start : start + 300_000])
                file = await incoming.finish(known.name, "application/octet-stream", expires_in=known.expires_in)
        except (QuotaExceeded, Overloaded, OutputError) as error:
            self._is_expected(error)
            self.end(number, type(error).__name__)
        else:
            self.end(number, id=file.id, expires_at=file.expires_at)
            self.live[file.id] = known.caller

    async def resume(self, number: int) -> None:
        """The next request of an upload in several; the last makes the file."""
        if self.begun and self.rng.random() < 0.8:
            begun = self.begun.pop(self.rng.randrange(len(self.begun)))
        else:
            known, seed = self.invent()
            self.begin(number, "create", file=asdict(known), seed=seed)
            try:
                made = await resumable.create(
                    self.store, self.site.callers[known.caller], known.size, known.name, expires_in=known.expires_in
                )
            except QuotaExceeded as error:
                self.end(number, type(error).__name__)
                return
            self.end(number, id=made.id)
            begun, number = Begun(made.id, known, seed), self.next()
        caller, data = self.site.callers[begun.file.caller], contents(begun.seed)
        upload = await resumable.show(self.store, caller, begun.id)
        if upload.received < upload.length:
            until = min(len(data), upload.received + max(1, len(data) // self.rng.choice([1, 2, 3])))
            self.begin(number, "append", id=begun.id)
            upload = await resumable.append(
                self.store, caller, begun.id, upload.received, in_pieces(data[upload.received : until])
            )
            self.end(number, received=upload.received)
            number = self.next()
        if upload.received == upload.length:
            self.begin(number, "finish", id=begun.id, file=asdict(begun.file))
            try:
                upload = await resumable.finish(self.store, upload)
            except (QuotaExceeded, Overloaded, OutputError) as error:
                self._is_expected(error)
                self.end(number, type(error).__name__)
            else:
                assert upload.file_id is not None
                file = await self.store.show(caller, upload.file_id)
                self.end(number, id=file.id, expires_at=file.expires_at)
                self.live[file.id] = begun.file.caller
                return
        self.begun.append(begun)

    async def abandon(self, number: int) -> None:
        known, seed = self.invent()
        data = contents(seed)
        self.begin(number, "abandon", file=asdict(known))
        try:
            async with self.store.incoming(self.site.callers[known.caller], None) as incoming:
                await incoming.write(data)
                raise ConnectionResetError("the client went away")
        except (ConnectionResetError, QuotaExceeded, Overloaded, OutputError):
            self.end(number, "abandoned")

    async def delete(self, number: int) -> None:
        id, caller = self._take()
        self.begin(number, "delete", id=id)
        await self.store.delete(self.site.callers[caller], id)
        self.end(number)

    async def derive(self, number: int) -> None:
        id, caller = self._take()
        self.begin(number, "derive", id=id)
        try:
            file = await self.store.show(self.site.callers[caller], id)
            await self.store.keep_derived(file, "text", "plain", self.rng.randbytes(3000))
        except (FileExpired, OutputError) as error:
            self._is_expected(error)
        self.live[id] = caller
        self.end(number)

    async def read(self, number: int) -> None:
        id, caller = self._take()
        self.begin(number, "read", id=id)
        try:
            content = await self.store.open_content(self.site.callers[caller], id)
            data = await content.read()
            assert hashlib.sha256(data).hexdigest() == content.file.sha256
        except FileExpired:
            pass
        except DamagedContent as error:
            self.emit({"lost": f"{id}: {error}"})
        self.live[id] = caller
        self.end(number)

    async def expire(self, number: int) -> None:
        self.begin(number, "expire")
        await expire(self.store)
        self.end(number)

    async def sweep(self, number: int) -> None:
        self.begin(number, "sweep")
        await sweep(self.store)
        self.end(number)

    def _take(self) -> tuple[str, int]:
        """A file that no other operation of this process has in hand."""
        id = self.rng.choice(list(self.live))
        return id, self.live.pop(id)

    def _is_expected(self, error: Exception) -> None:
        # A sweep may take an upload that was silent for longer than the lease; its staged bytes are then not there any more.
        if isinstance(error, OutputError) and not isinstance(error.__cause__, FileNotFoundError):
            raise error


def contents(seed: int) -> bytes:
    """The bytes that are made from a number."""
    return random.Random(seed).randbytes(random.Random(seed).choices(SIZES, LIKELY)[0])


async def in_pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 300_000):
        yield data[start : start + 300_000]


async def work(site: Site, emit: Emit, seed: int, share: Share, at_once: int, leaning: str) -> None:
    """Works until the process is killed."""
    store = await Store.open(site.settings(LEASE))
    emit({"ready": True})
    busy = Work(store, site, emit, random.Random(seed), share, leaning)
    await asyncio.gather(*(busy.run_forever() for _ in range(at_once)))


async def sweep_once(site: Site) -> None:
    """A sweep that may be killed on its way."""
    store = await Store.open(site.settings(LEASE))
    try:
        await _outlive_leases(store)
        await sweep(store)
    finally:
        await store.close()


# -- the check


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


def emitter(handle: int) -> Emit:
    """Writes events as lines, each by one system call, so that a kill cuts none in two."""

    def emit(event: dict[str, Any]) -> None:
        os.write(handle, json.dumps(event).encode() + b"\n")

    return emit
