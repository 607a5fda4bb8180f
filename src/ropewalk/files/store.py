"""Files of all workspaces: bytes in, an id out; the id gives them back until it is deleted or its hour has passed.

A transaction that changes several tables takes their rows in the order files, blobs, usage, receipts, audit, so that no two wait
for each other.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import delete, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.batches.ledger import drop as drop_batch
from ropewalk.database import Database, now
from ropewalk.errors import DamagedContent, FileExpired, NotDownloadable, NotFound, OutputError
from ropewalk.failpoints import failpoint
from ropewalk.files import archives, catalog
from ropewalk.files.blobs import Blobs, open_blobs
from ropewalk.files.catalog import File, Listing, Place
from ropewalk.files.content import Content
from ropewalk.files.incoming import Incoming
from ropewalk.files.receipts import Receipt, issue
from ropewalk.files.settings import Settings
from ropewalk.files.tables import ARCHIVES, BATCHES, FILES, blobs, derived, erasures, file_token_days, files
from ropewalk.tenants import quotas
from ropewalk.tenants.audit import append
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.secrets import open_secret, workspace_purpose
from ropewalk.tenants.tables import workspaces
from ropewalk.tenants.workspaces import ensure_default, find_workspace
from ropewalk.vault import CHUNK, TAG, Opener, Sealer, Vault, unwrap

Doomed = tuple[str, str]  # (place, stored): bytes that no row refers to any more
Files: TypeAlias = list[File]
AT_ONCE = 500  # ids of one query
ROWS = "rows"  # the place of what is rows of this database, which refer to theirs of `derived` and go with it

log = logging.getLogger("ropewalk.files")


@dataclass(frozen=True)
class Released:
    """What is left when a file has let go of its bytes."""

    kinds: tuple[str, ...]  # of what was made from it
    shared: int  # other files that hold the bytes
    doomed: tuple[Doomed, ...]  # to erase after the commit
    kept: tuple[archives.Gone, ...] = ()  # archives whose place under the quotas is yet to be given back


class Store:
    """The file store of one installation; several processes may have it open at once."""

    def __init__(self, database: Database, blobs: Blobs, vault: Vault, settings: Settings) -> None:
        self.database, self.blobs, self.vault, self.settings = database, blobs, vault, settings
        self.max_file_bytes = settings.max_file_bytes
        self.lease_seconds = settings.lease_seconds
        self.coalesce_seconds = settings.coalesce_seconds
        self.archives = archives.Archives(self)
        self.pepper = self.cursor_key = b""
        self.signing_key: Ed25519PrivateKey
        # Names of the published adapters that were trained on a file; the registry, which knows, lies above this room.
        self.adapters_of: Callable[[str], Iterable[str]] = lambda file_id: ()
        # Told of each file that was stored, after the commit.
        self.arrivals: list[Callable[[Caller, File], None]] = []
        # What lies neither in the blobs nor on this machine, by its place: erases it, and says whether it is gone.
        self.erasers: dict[str, Callable[[str], Awaitable[bool]]] = {}
        # Told of paths that are about to be erased, after the commit: what was read from files may lie in a model's memory too.
        self.forgetters: list[Callable[[Sequence[str]], Awaitable[None]]] = []

    @classmethod
    async def open(cls, settings: Settings | None = None) -> Store:
        """Opens the store, and makes it at the first start."""
        settings = settings or Settings()
        vault = Vault.open(settings.data)
        database = await Database.open(settings.database)
        try:
            store = cls(database, open_blobs(settings.blobs_at), vault, settings)
            await ensure_default(database, vault)
            async with database.reading() as connection:
                store.pepper = await open_secret(connection, vault, "pepper")
                store.cursor_key = await open_secret(connection, vault, "cursor")
                signing = await open_secret(connection, vault, "signing")
            store.signing_key = Ed25519PrivateKey.from_private_bytes(signing)
        except BaseException:
            await database.close()
            raise
        return store

    async def close(self) -> None:
        await self.database.close()

    async def local_caller(self, workspace: str = "default") -> Caller:
        """Whoever sits at the machine itself, in a workspace."""
        async with self.database.reading() as connection:
            found = await find_workspace(connection, workspace)
        return Caller(found.organization_id, found.id, None)

    # -- in and out

    def incoming(self, caller: Caller, at_most: int | None = None, request_id: str = "") -> Incoming:
        """An upload, as an async context; leaves nothing behind unless `finish` was reached."""
        caller.needs("write")
        return Incoming(self, caller, at_most, request_id)

    async def put(
        self,
        caller: Caller,
        data: bytes | AsyncIterator[bytes],
        filename: str | None,
        mime_type: str | None = None,
        **more: Any,
    ) -> File:
        """All the bytes as a file; `more` as of Incoming.finish."""
        async with self.incoming(caller, len(data) if isinstance(data, bytes) else None) as incoming:
            if isinstance(data, bytes):
                await incoming.write(data)
            else:
                async for piece in data:
                    await incoming.write(piece)
            return await incoming.finish(filename, mime_type, **more)

    async def show(self, caller: Caller, id: str) -> File:
        """One file; NotFound also for another's."""
        caller.needs("read")
        async with self.database.reading() as connection:
            return await catalog.find(connection, caller, id)

    async def list(
        self,
        caller: Caller,
        limit: int,
        after: Place | None = None,
        before: Place | None = None,
        tag: str | None = None,
        name: str | None = None,
        purpose: str | None = None,
    ) -> Listing:
        """A page of files, newest first; `name` is how the names begin, in either case."""
        caller.needs("read")
        async with self.database.reading() as connection:
            return await catalog.page(connection, caller, limit, after, before, tag, name, purpose)

    async def find(self, caller: Caller, ids: Sequence[str]) -> Files:
        """Those of these files that there are, newest first."""
        caller.needs("read")
        async with self.database.reading() as connection:
            return await catalog.find_all(connection, caller, ids)

    async def existing(self, ids: Sequence[str]) -> set[str]:
        """Those of these files that there are, in any workspace, and that have not expired."""
        found = set[str]()
        async with self.database.reading() as connection:
            for start in range(0, len(ids), AT_ONCE):
                alive = files.c.id.in_(ids[start : start + AT_ONCE]) & files.c.expired_at.is_(None)
                found |= set((await connection.execute(select(files.c.id).where(alive))).scalars())
        return found

    async def open_content(self, caller: Caller, id: str, *, download: bool = False, request_id: str = "") -> Content:
        """The way to a file's bytes; a download, unlike a use by this server, needs its right and is written down."""
        caller.needs("download" if download else "read")
        async with self.database.reading() as connection:
            found = await catalog.find_stored(connection, caller, id)
        if download:
            if not found.file.downloadable:
                raise NotDownloadable(f"File `{id}` is not downloadable: its workspace does not give uploads back.")
            async with self.database.writing() as connection:
                await append(connection, caller, "file_downloaded", id, request_id=request_id)
        return self._content(found)

    def _content(self, found: catalog.Stored) -> Content:
        file = found.file
        assert file.blob_id is not None
        workspace_key = self.vault.unwrap(found.sealed_workspace_key, workspace_purpose(file.workspace_id))
        return Content(file, self.blobs, file.blob_id, unwrap(workspace_key, found.sealed_data_key, f"data {file.blob_id}"))

    async def mark_damaged(self, blob_id: str) -> None:
        """Writes down that stored bytes are not what was stored, so that they are seen in `verify` and the metrics."""
        async with self.database.writing() as connection:
            await connection.execute(
                update(blobs).where(blobs.c.id == blob_id, blobs.c.damaged_at.is_(None)).values(damaged_at=now())
            )

    # -- out for good

    async def delete(self, caller: Caller, id: str, request_id: str = "") -> Receipt:
        """Forgets the file and all that was made from it, destroys the data key with the last reference, and says so, signed."""
        caller.needs("write")
        if not catalog.ID.fullmatch(id):
            raise catalog.missing(id)
        adapters = list(self.adapters_of(id))
        async with self.database.writing() as connection:
            # Locked first: a file that expires, or is deleted by another, between the look and the DELETE would be given back twice.
            await connection.execute(select(files.c.id).where(files.c.id == id, catalog.visible(caller)).with_for_update())
            file = await catalog.find(connection, caller, id)
            counted = await connection.execute(delete(file_token_days).where(file_token_days.c.file_id == id))
            if file.lineage is not None:  # those that it was made from need not take it along any more
                ties = derived.c.owner.in_(file.lineage["files"]) & (derived.c.place == FILES) & (derived.c.stored == id)
                await connection.execute(delete(derived).where(ties))
            gone = await connection.execute(delete(files).where(files.c.id == id))
            if not gone.rowcount:  # somebody else's DELETE was first
                raise catalog.missing(id)
            left = await self.release_content(connection, file)
            if file.expired_at is None:
                owner = Caller(caller.organization_id, file.workspace_id, file.key_id, file.user_id)
                await quotas.release(connection, owner, file.size)
            await archives.give_back(connection, left.kept)
            receipt = await issue(
                connection,
                self.signing_key,
                file_id=id,
                workspace_id=file.workspace_id,
                sha256=file.sha256,
                size=file.size,
                created_at=file.created_at,
                content="expired" if file.blob_id is None else "shared" if left.shared else "erased",
                shared_with=left.shared,
                derived=tuple(sorted({*left.kinds, *(("token_counts",) if counted.rowcount else ())})),
                adapters=adapters,
                user_id=file.user_id,
            )
            await append(connection, caller, "file_deleted", id, request_id=request_id, detail={"receipt": receipt.sequence})
        failpoint("delete.committed")
        await self.erase(left.doomed)
        failpoint("delete.erased")
        return receipt

    async def release_content(self, connection: AsyncConnection, file: File) -> Released:
        """Drops a file's hold on its bytes; with the last hold the data key's row goes, and the bytes can be read no more."""
        owners, shared = [file.id], 0
        if file.blob_id is not None:
            drop = update(blobs).where(blobs.c.id == file.blob_id).values(refs=blobs.c.refs - 1).returning(blobs.c.refs)
            shared = (await connection.execute(drop)).scalar_one()
            if not shared:
                owners.append(file.blob_id)
        made = (await connection.execute(select(derived).where(derived.c.owner.in_(owners)))).all()
        doomed = [(row.place, row.stored) for row in made if row.place not in (ROWS, ARCHIVES)]
        await connection.execute(delete(derived).where(derived.c.owner.in_(owners)))
        kept = await archives.forget(connection, [row.stored for row in made if row.place == ARCHIVES])
        doomed += [("blobs", id) for id, _, _ in kept]
        if file.blob_id is not None and not shared:
            doomed.append(("blobs", file.blob_id))
            # A file whose row stays, since it only expired, must not refer to what is gone.
            await connection.execute(update(files).where(files.c.blob_id == file.blob_id).values(blob_id=None))
            await connection.execute(delete(blobs).where(blobs.c.id == file.blob_id))
        if doomed:
            rows = [{"place": place, "stored": stored} for place, stored in doomed]
            await connection.execute(self.database.upsert(erasures).on_conflict_do_nothing(), rows)
        return Released(tuple(sorted({row.kind for row in made})), shared, tuple(doomed), tuple(kept))

    async def erase(self, doomed: Sequence[Doomed]) -> int:
        """Erases bytes that the table of erasures names, and then their names from it; how many that were."""
        done = []
        paths = [stored.partition(":")[2] for place, stored in doomed if place == "path"]
        for forget in self.forgetters if paths else ():
            await forget(paths)
        for place, stored in doomed:
            try:
                if place == "blobs":
                    await asyncio.to_thread(self.blobs.erase, stored)
                elif place == "path":
                    if not await asyncio.to_thread(_erase_path, stored):
                        continue  # it lies on another machine, whose own sweep will find its name in the table
                elif place == FILES:
                    await self._delete_made(stored)
                elif place == BATCHES:
                    await drop_batch(self.database, stored)
                elif place not in self.erasers or not await self.erasers[place](stored):
                    continue  # a server that knows how is to do it; the table keeps its name until then
                done.append((place, stored))
            except (OSError, OutputError) as error:  # the table still names them, and the sweep tries again
                log.warning("cannot erase bytes of a deleted file yet: %s", type(error).__name__)
        if done:
            async with self.database.writing() as connection:
                await connection.execute(delete(erasures).where(tuple_(erasures.c.place, erasures.c.stored).in_(done)))
        return len(done)

    async def _delete_made(self, id: str) -> None:
        """Deletes a file that was made from one that is no more, with a receipt of its own."""
        async with self.database.reading() as connection:
            query = select(files.c.workspace_id, workspaces.c.organization_id)
            query = query.join(workspaces, workspaces.c.id == files.c.workspace_id).where(files.c.id == id)
            row = (await connection.execute(query)).first()
        if row is not None:
            with suppress(NotFound):  # somebody else's DELETE was first
                await self.delete(Caller(row.organization_id, row.workspace_id, None), id)

    # -- what is made from files

    async def keep_derived(self, file: File, kind: str, name: str, data: bytes) -> None:
        """Keeps something made from a file's bytes, sealed under their data key; shared by all files of these bytes."""
        caller = Caller("", file.workspace_id, None)
        async with self.database.reading() as connection:
            found = await catalog.find_stored(connection, caller, file.id)
        content = self._content(found)
        stored = secrets.token_hex(16)
        row = {"owner": content.name, "kind": kind, "name": name, "place": "blobs", "stored": stored, "size": len(data)}
        # The row comes first: a row without bytes is only something not made yet, while bytes without a row would be swept.
        async with self.database.writing() as connection:
            # Locked, so that it is there until this is committed, and that those who make the same take turns.
            alive = select(blobs.c.id).where(blobs.c.id == content.name).with_for_update()
            if not (await connection.execute(alive)).scalar():
                raise catalog.missing(file.id)
            old = await self._replace_derived(connection, {**row, "created_at": now()})
        await asyncio.to_thread(self._publish_derived, content.key, stored, data)
        await self.erase(old)

    async def derived(self, file: File, kind: str, name: str) -> bytes | None:
        """What `keep_derived` was given, or None."""
        if file.blob_id is None:
            return None
        async with self.database.reading() as connection:
            query = select(derived).where(derived.c.owner == file.blob_id, derived.c.kind == kind, derived.c.name == name)
            row = (await connection.execute(query)).first()
            if row is None:
                return None
            try:
                found = await catalog.find_stored(connection, Caller("", file.workspace_id, None), file.id)
            except FileExpired:
                return None
        return await asyncio.to_thread(self._read_derived, self._content(found).key, row.stored, row.size)

    async def register_path(self, file_id: str, kind: str, path: Path) -> None:
        """A file or folder outside the store that was made from a file, to be erased with it."""
        stored = f"{platform.node()}:{path.resolve()}"
        row = {"owner": file_id, "kind": kind, "name": stored, "place": "path", "stored": stored, "size": 0}
        async with self.database.writing() as connection:
            alive = select(files.c.id).where(files.c.id == file_id).with_for_update()
            if not (await connection.execute(alive)).scalar():
                raise catalog.missing(file_id)
            await self._replace_derived(connection, {**row, "created_at": now()})

    async def keep_rows(self, connection: AsyncConnection, file_id: str, kind: str, name: str) -> None:
        """Rows that were made from a file: those that refer to (file_id, kind, name) of `derived` go with it, deleted or expired."""
        alive = select(files.c.id).where(files.c.id == file_id, files.c.expired_at.is_(None)).with_for_update()
        if not (await connection.execute(alive)).scalar():
            raise catalog.missing(file_id)
        row = {"owner": file_id, "kind": kind, "name": name, "place": ROWS, "stored": name, "size": 0, "created_at": now()}
        await connection.execute(insert(derived).values(row))

    async def copy_of(self, file_id: str, place: str, name: str) -> str | None:
        """What `keep_copy` was given, or None."""
        async with self.database.reading() as connection:
            same = (derived.c.owner == file_id, derived.c.kind == place, derived.c.name == name)
            return (await connection.execute(select(derived.c.stored).where(*same))).scalar()

    async def keep_copy(self, file_id: str, place: str, name: str, stored: str) -> str:
        """A copy of a file on another server, to be erased with it by the eraser of that place; the first one, if there was one."""
        row = {"owner": file_id, "kind": place, "name": name, "place": place, "stored": stored, "size": 0, "created_at": now()}
        async with self.database.writing() as connection:
            alive = select(files.c.id).where(files.c.id == file_id, files.c.expired_at.is_(None)).with_for_update()
            if not (await connection.execute(alive)).scalar():
                raise catalog.missing(file_id)
            await connection.execute(self.database.upsert(derived).on_conflict_do_nothing(), [row])
            same = (derived.c.owner == file_id, derived.c.kind == place, derived.c.name == name)
            return str((await connection.execute(select(derived.c.stored).where(*same))).scalar_one())

    async def forget_copy(self, file_id: str, stored: str) -> None:
        """A copy that is not there any more."""
        async with self.database.writing() as connection:
            await connection.execute(delete(derived).where(derived.c.owner == file_id, derived.c.stored == stored))

    async def _replace_derived(self, connection: AsyncConnection, row: dict[str, Any]) -> Sequence[Doomed]:
        same = (derived.c.owner == row["owner"], derived.c.kind == row["kind"], derived.c.name == row["name"])
        rows = await connection.execute(select(derived.c.place, derived.c.stored).where(*same))
        old = [(place, stored) for place, stored in rows if stored != row["stored"]]
        for place, stored in old:
            await connection.execute(insert(erasures).values(place=place, stored=stored))
        await connection.execute(delete(derived).where(*same))
        await connection.execute(insert(derived).values(row))
        return old

    def _publish_derived(self, key: bytes, stored: str, data: bytes) -> None:
        staged = self.blobs.stage(stored)
        try:
            sealer, view = Sealer(key, stored), memoryview(data)
            for start in range(0, max(1, len(data)), CHUNK):
                staged.write(sealer.seal(view[start : start + CHUNK], start + CHUNK >= len(data)))
            staged.publish(stored)
        finally:
            staged.discard()

    def _read_derived(self, key: bytes, stored: str, size: int) -> bytes | None:
        opener, count = Opener(key, stored), max(1, -(-size // CHUNK))
        try:
            sealed = [self.blobs.read(stored, index * (CHUNK + TAG), CHUNK + TAG) for index in range(count)]
            return b"".join(opener.open(part, index, index == count - 1) for index, part in enumerate(sealed))
        except (FileNotFoundError, DamagedContent):  # it can be made again
            return None


def _erase_path(stored: str) -> bool:
    """Erases MACHINE:PATH; False where it is neither here nor this machine's. Machines may change their names, so being here counts."""
    machine, _, name = stored.partition(":")
    path = Path(name)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        return True
    try:
        path.unlink()
        return True
    except (FileNotFoundError, NotADirectoryError):
        return machine == platform.node()
