"""The store beside a model of it that is a dictionary: whatever happens in whatever order, both hold the same."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import pytest
import time_machine
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import func, select

from ropewalk.errors import FileExpired, NotFound, QuotaExceeded
from ropewalk.files import incoming, lifecycle
from ropewalk.files import store as store_module
from ropewalk.files.integrity import verify
from ropewalk.files.lifecycle import expire, sweep
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.files.tables import blobs, derived, erasures, files, uploads
from ropewalk.tenants import quotas
from ropewalk.tenants.workspaces import create_workspace
from ropewalk.vault import CHUNK

T = TypeVar("T")
HOUR, DAY = 3600, 24 * 3600
LIMIT_BYTES, LIMIT_FILES = 4 * CHUNK, 6
CONTENTS = [b"", b"a", b"b" * 1000, b"c" * CHUNK, b"d" * (CHUNK + 1)]
WORKSPACES = ["default", "second"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing is tidied up after it."""


@contextmanager
def killed(module: ModuleType, point: str) -> Iterator[None]:
    """Within, the work that passes this point of this module gets no further."""

    def die(name: str) -> None:
        if name == point:
            raise Killed

    async def nothing(self: incoming.Incoming) -> None:
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "failpoint", die)
        patch.setattr(incoming.Incoming, "_abandon", nothing)
        yield


@dataclass
class Known:
    """What the model knows of a file."""

    workspace: str
    data: bytes
    expires_at: float | None
    given_back: bool = False


@dataclass
class Stalled:
    """An upload whose process died."""

    workspace: str
    reserved: int
    lease_until: float
    left_bytes: bool


class Model(RuleBasedStateMachine):
    """Random uploads, dedupes, deletions, crashes, restarts and hours that pass."""

    empty: Path  # a data folder with nothing in it yet, which is copied, since making one takes long

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        shutil.copytree(self.empty, self.folder / "data")
        self.loop, self.ended = asyncio.new_event_loop(), 0.0
        self.clock = time_machine.travel(time.time())
        self.moved = self.clock.start()
        self.known: dict[str, Known] = {}
        self.deleted: list[str] = []
        self.receipts = 0
        self.stalled: list[Stalled] = []
        self.open()

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.run(self.store.close())
            self.clock.stop()
            self.loop.close()
            shutil.rmtree(self.folder)

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(work)

    def open(self) -> None:
        self.store = self.run(Store.open(Settings(data=self.folder / "data")))
        self.callers = {name: self.run(self.store.local_caller(name)) for name in WORKSPACES}

    # -- what can happen

    @rule(data=st.sampled_from(CONTENTS), workspace=st.sampled_from(WORKSPACES), hours=st.sampled_from([None, 1, 2, 48]))
    def put(self, data: bytes, workspace: str, hours: int | None) -> None:
        fits = self.fits(workspace, len(data))
        if not fits:  # the store then looks for what has expired
            self.give_back()
            fits = self.fits(workspace, len(data))
        try:
            file = self.run(self.store.put(self.callers[workspace], data, "a.bin", expires_in=hours and hours * HOUR))
        except QuotaExceeded:
            assert not fits
            return
        assert fits
        self.known[file.id] = Known(workspace, data, hours and file.expires_at / 1e6)

    @rule(data=st.sampled_from(CONTENTS), workspace=st.sampled_from(WORKSPACES))
    def break_off(self, data: bytes, workspace: str) -> None:
        async def half() -> None:
            async with self.store.incoming(self.callers[workspace], len(data)) as upload:
                await upload.write(data)
                raise ConnectionError

        if self.fits(workspace, len(data)):
            with pytest.raises(ConnectionError):
                self.run(half())

    @rule(
        data=st.sampled_from(CONTENTS),
        workspace=st.sampled_from(WORKSPACES),
        point=st.sampled_from(["upload.reserved", "upload.staged", "upload.published"]),
    )
    def die_within_an_upload(self, data: bytes, workspace: str, point: str) -> None:
        if self.fits(workspace, len(data)):
            with pytest.raises(Killed), killed(incoming, point):
                self.run(self.store.put(self.callers[workspace], data, "a.bin"))
            self.stalled.append(
                Stalled(workspace, len(data), time.time() + self.store.lease_seconds, point != "upload.reserved")
            )

    @precondition(lambda self: self.known)
    @rule(pick=st.integers(0, 1 << 30))
    def die_within_a_deletion(self, pick: int) -> None:
        id = sorted(self.known)[pick % len(self.known)]
        with pytest.raises(Killed), killed(store_module, "delete.committed"):
            self.run(self.store.delete(self.callers[self.known.pop(id).workspace], id))
        self.deleted.append(id)
        self.receipts += 1

    @rule()
    def die_within_expiry(self) -> None:
        due = any(not one.given_back and not self.lives(one) for one in self.known.values())
        with killed(lifecycle, "expire.committed"):
            if due:
                with pytest.raises(Killed):
                    self.run(expire(self.store))
            else:
                self.run(expire(self.store))
        self.give_back()

    @precondition(lambda self: self.known)
    @rule(pick=st.integers(0, 1 << 30))
    def delete(self, pick: int) -> None:
        id = sorted(self.known)[pick % len(self.known)]
        gone = self.known.pop(id)
        same = sum(
            (one.workspace, one.data) == (gone.workspace, gone.data) for one in self.known.values() if not one.given_back
        )
        receipt = self.run(self.store.delete(self.callers[gone.workspace], id))
        self.deleted.append(id)
        self.receipts += 1
        assert receipt.sequence == self.receipts
        assert receipt.is_of(id)
        assert receipt.content == ("expired" if gone.given_back else "shared" if same else "erased")
        assert receipt.shared_with == (0 if gone.given_back else same)

    @precondition(lambda self: self.known)
    @rule(pick=st.integers(0, 1 << 30))
    def derive(self, pick: int) -> None:
        id = sorted(self.known)[pick % len(self.known)]
        one = self.known[id]
        file = self.run(self.store.show(self.callers[one.workspace], id))
        if self.lives(one):
            self.run(self.store.keep_derived(file, "text", "", one.data[::-1]))
            assert self.run(self.store.derived(file, "text", "")) == one.data[::-1]

    @rule(seconds=st.sampled_from([60, HOUR, DAY, 31 * DAY]))
    def wait(self, seconds: int) -> None:
        self.moved.shift(seconds)

    @rule()
    def expire(self) -> None:
        self.run(expire(self.store))
        self.give_back()

    @rule()
    def sweep(self) -> None:
        report = self.run(sweep(self.store))
        self.give_back()
        late = [one for one in self.stalled if one.lease_until < time.time()]
        assert report.abandoned == len(late)
        self.stalled = [one for one in self.stalled if one not in late]
        purged = [id for id, one in self.known.items() if one.given_back and time.time() >= one.expires_at + 30 * DAY]
        assert report.purged == len(purged)
        for id in purged:
            del self.known[id]
            self.deleted.append(id)
        self.nothing_is_left_over()
        assert not any(self.run(sweep(self.store)).as_dict().values()), "a second sweep finds nothing"

    @rule()
    def restart(self) -> None:
        self.run(self.store.close())
        self.open()

    # -- what must hold

    @invariant()
    def quotas_are_exact(self) -> None:
        if not hasattr(self, "loop"):
            return
        for name, caller in self.callers.items():
            mine = [one for one in self.known.values() if one.workspace == name and not one.given_back]
            held = [one.reserved for one in self.stalled if one.workspace == name]
            found = self.usage("workspace", caller.workspace_id)
            assert (found.used_bytes, found.used_files) == (sum(len(one.data) for one in mine), len(mine))
            assert (found.reserved_bytes, found.reserved_files) == (sum(held), len(held))
            assert found.used_bytes + found.reserved_bytes <= LIMIT_BYTES
            assert found.used_files + found.reserved_files <= LIMIT_FILES
        whole = self.usage("organization", self.callers["default"].organization_id)
        assert whole.used_files == sum(not one.given_back for one in self.known.values())

    @invariant()
    def every_file_is_what_it_was(self) -> None:
        if not hasattr(self, "loop"):
            return
        for name, caller in self.callers.items():
            listed = [file.id for file in self.run(self.store.list(caller, 1000)).files]
            assert sorted(listed) == sorted(id for id, one in self.known.items() if one.workspace == name)
        for id, one in self.known.items():
            caller = self.callers[one.workspace]
            if self.lives(one):
                assert self.run(self.read(caller, id)) == one.data
            else:
                with pytest.raises(FileExpired):
                    self.run(self.read(caller, id))
            with pytest.raises(NotFound, match="not found"):
                self.run(self.read(self.callers["second" if one.workspace == "default" else "default"], id))
        for id in self.deleted[-3:]:
            with pytest.raises(NotFound, match="not found"):
                self.run(self.read(self.callers["default"], id))

    def nothing_is_left_over(self) -> None:
        living = {(one.workspace, one.data) for one in self.known.values() if not one.given_back}
        assert self.count(blobs) == len(living)
        assert (self.count(erasures), self.count(uploads)) == (0, len(self.stalled))
        assert self.count(files) == len(self.known)
        stored = [*self.store.blobs.names(), *self.store.blobs.staged()]
        assert len(stored) == len(living) + self.count(derived) + sum(one.left_bytes for one in self.stalled)
        report = self.run(verify(self.store))
        assert report.whole, report
        assert (report.contents, report.receipts) == (len(living), self.receipts)

    # -- how the model sees it

    def lives(self, one: Known) -> bool:
        return not one.given_back and (one.expires_at is None or one.expires_at > time.time())

    def give_back(self) -> None:
        for one in self.known.values():
            one.given_back |= not self.lives(one)

    def fits(self, workspace: str, size: int) -> bool:
        mine = [len(one.data) for one in self.known.values() if one.workspace == workspace and not one.given_back]
        mine += [one.reserved for one in self.stalled if one.workspace == workspace]
        return sum(mine) + size <= LIMIT_BYTES and len(mine) < LIMIT_FILES

    def usage(self, scope: str, id: str) -> quotas.Usage:
        async def look() -> quotas.Usage:
            async with self.store.database.reading() as connection:
                return await quotas.usage(connection, scope, id)

        return self.run(look())

    def count(self, table) -> int:
        async def look() -> int:
            async with self.store.database.reading() as connection:
                return (await connection.execute(select(func.count()).select_from(table))).scalar_one()

        return self.run(look())

    async def read(self, caller, id: str) -> bytes:
        return await (await self.store.open_content(caller, id)).read()


async def prepare(folder: Path) -> None:
    """A store with two workspaces and their limits."""
    store = await Store.open(Settings(data=folder))
    await create_workspace(store.database, store.vault, "second")
    for name in WORKSPACES:
        caller = await store.local_caller(name)
        async with store.database.writing() as connection:
            await quotas.set_limit(connection, "workspace", caller.workspace_id, LIMIT_BYTES, LIMIT_FILES)
    await store.close()


def test_the_store_is_what_its_model_is(tmp_path: Path) -> None:
    Model.empty = tmp_path / "empty"
    asyncio.run(prepare(Model.empty))
    run = Model.TestCase()
    run.settings = settings(max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    run.runTest()
