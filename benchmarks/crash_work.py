"""What crash_files.py runs in processes of its own: mixed work on a store until it is killed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from ropewalk.errors import DamagedContent, FileExpired, OutputError, Overloaded, QuotaExceeded
from ropewalk.files import resumable
from ropewalk.files.lifecycle import expire, sweep
from ropewalk.files.store import Store
from ropewalk.tenants import quotas
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import create_workspace
from ropewalk.vault import CHUNK
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


def emitter(handle: int) -> Emit:
    """Writes events as lines, each by one system call, so that a kill cuts none in two."""

    def emit(event: dict[str, Any]) -> None:
        os.write(handle, json.dumps(event).encode() + b"\n")

    return emit
