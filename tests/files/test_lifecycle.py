"""What time does to files, and what the sweep sets right: on every place where they may be kept."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
import time_machine
from sqlalchemy import func, select, update

from ropewalk.errors import DamagedContent, FileExpired, NotFound, Overloaded
from ropewalk.files import incoming
from ropewalk.files.integrity import SCRUBBED_EVERY, scrub_step, verify
from ropewalk.files.lifecycle import SweepReport, expire, sweep
from ropewalk.files.local import LocalFiles
from ropewalk.files.store import Store
from ropewalk.files.tables import blobs, derived, erasures, files, uploads
from ropewalk.tenants import quotas
from ropewalk.tenants.caller import Caller
from ropewalk.vault import CHUNK

DAY = 24 * 3600


def later(seconds: float) -> time_machine.travel:
    return time_machine.travel(time.time() + seconds)


async def used(store: Store, caller: Caller) -> tuple[int, int, int, int]:
    async with store.database.reading() as connection:
        found = [await quotas.usage(connection, scope, id) for scope, id in quotas.scopes(caller)]
    counted = {(one.used_bytes, one.used_files, one.reserved_bytes, one.reserved_files) for one in found}
    assert len(counted) == 1, "every scope counts the same"
    return counted.pop()


async def count(store: Store, table) -> int:
    async with store.database.reading() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar_one()


def test_an_expired_file_gives_everything_back_and_is_known_for_thirty_days(opened: Callable) -> None:
    async def body(store, caller):
        file = await store.put(caller, b"for an hour", "a.txt", expires_in=3600)
        await store.keep_derived(file, "text", "", b"for an hour")
        with later(3599):
            assert await expire(store) == 0
            assert await (await store.open_content(caller, file.id)).read() == b"for an hour"
        with later(3600):
            with pytest.raises(FileExpired):
                await store.open_content(caller, file.id)
            assert await used(store, caller) == (11, 1, 0, 0)
            assert (await sweep(store)).expired == 1
            assert await used(store, caller) == (0, 0, 0, 0)
            assert list(store.blobs.names()) == []
            assert [await count(store, table) for table in (blobs, derived, erasures, files)] == [0, 0, 0, 1]
            known = await store.show(caller, file.id)
            assert (known.expired, known.sha256, known.filename) == (True, file.sha256, "a.txt")
            with pytest.raises(FileExpired):
                await store.open_content(caller, file.id)
        with later(3600 + 30 * DAY - 2):
            assert (await sweep(store)).purged == 0
            assert [found.id for found in (await store.list(caller, 10)).files] == [file.id]
        with later(3600 + 30 * DAY):
            assert (await sweep(store)).purged == 1
            with pytest.raises(NotFound):
                await store.show(caller, file.id)
            assert await sweep(store) == SweepReport()

    opened(body)


def test_deleting_an_expired_file_gives_nothing_back_twice(opened: Callable) -> None:
    async def body(store, caller):
        due, kept = await store.put(caller, b"due", "a.txt", expires_in=3600), await store.put(caller, b"kept", "b.txt")
        swept = await store.put(caller, b"swept", "c.txt", expires_in=3600)
        with later(3600):
            assert (await store.delete(caller, due.id)).content == "erased"
            await sweep(store)
            receipt = await store.delete(caller, swept.id)
            assert (receipt.content, receipt.shared_with) == ("expired", 0)
            assert await used(store, caller) == (4, 1, 0, 0)
            assert await (await store.open_content(caller, kept.id)).read() == b"kept"

    opened(body)


def test_expiry_leaves_equal_bytes_to_the_files_that_live(opened: Callable) -> None:
    async def body(store, caller):
        await store.put(caller, b"equal", "a.txt", expires_in=3600)
        await store.put(caller, b"equal", "b.txt", expires_in=3600)
        kept = await store.put(caller, b"equal", "c.txt")
        with later(3601):
            assert await expire(store) == 2
            assert await (await store.open_content(caller, kept.id)).read() == b"equal"
            assert await used(store, caller) == (5, 1, 0, 0)
            await store.delete(caller, kept.id)
            assert list(store.blobs.names()) == []

    opened(body)


def test_any_number_of_files_expires_at_once_whoever_sweeps(opened: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropewalk.files.lifecycle.BATCH", 7)

    async def body(store, caller):
        for number in range(20):
            await store.put(caller, b"%d" % (number // 2), f"{number}.txt", expires_in=3600)
        with later(3601):
            assert sum(await asyncio.gather(*(expire(store) for _ in range(3)))) == 20
            assert await used(store, caller) == (0, 0, 0, 0)
            assert list(store.blobs.names()) == []

    opened(body)


@pytest.mark.parametrize("more", [0, 40 << 20])
def test_an_upload_that_fell_silent_is_given_up_and_keeps_nothing(opened: Callable, more: int) -> None:
    async def body(store, caller):
        async def silent() -> None:
            async with store.incoming(caller) as upload:
                await upload.write(b"x" * (CHUNK + 1))
                with later(store.lease_seconds + 1):
                    assert (await sweep(store)).abandoned == 1
                await upload.write(b"x" * more)  # 40 MiB are more than was reserved
                await upload.finish("a.txt")

        with pytest.raises(Overloaded, match="silent"):
            await silent()
        assert await used(store, caller) == (0, 0, 0, 0)
        assert [*store.blobs.names(), *store.blobs.staged()] == []
        assert await count(store, uploads) == 0

    opened(body)


@pytest.mark.parametrize("moment", ["upload.staged", "upload.published", "upload.committed"])
def test_a_sweep_of_another_process_leaves_uploads_in_flight_alone(
    opened: Callable, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(store, caller):
        reports = list[SweepReport]()

        def sweep_now(name: str) -> None:
            def work() -> None:
                reports.append(LocalFiles(store.settings).run(lambda other, _: sweep(other)))

            if name == moment:
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()

        monkeypatch.setattr(incoming, "failpoint", sweep_now)
        data = b"x" * (CHUNK + 10)
        first, second = await store.put(caller, data, "a.bin"), await store.put(caller, data, "b.bin")
        # The second brings equal bytes, whose own copy is named for erasure in the commit: the sweep may be the one to do it.
        assert reports == [SweepReport(), SweepReport(erased=1 if moment == "upload.committed" else 0)]
        assert await (await store.open_content(caller, second.id)).read() == data
        assert list(store.blobs.names()) == [first.blob_id]
        assert await sweep(store) == SweepReport()

    opened(body)


def test_what_no_row_refers_to_is_erased_once(opened: Callable) -> None:
    async def body(store, caller):
        file = await store.put(caller, b"kept", "a.txt")
        await store.keep_derived(file, "text", "", b"kept too")
        left, half = store.blobs.stage("ab12"), store.blobs.stage("cd34")
        left.write(b"left by a crash")
        left.publish("ab12")
        half.write(b"half")
        report = await sweep(store)
        assert report == SweepReport(
            orphans=2 if "cd34" not in store.blobs.staged() and hasattr(half, "path") else report.orphans
        )
        assert await sweep(store) == SweepReport()
        half.discard()
        assert await store.derived(file, "text", "") == b"kept too"
        assert await (await store.open_content(caller, file.id)).read() == b"kept"
        assert "ab12" not in list(store.blobs.names())

    opened(body)


def test_a_row_whose_bytes_are_gone_is_marked_and_named(opened: Callable) -> None:
    async def body(store, caller):
        lost, whole = await store.put(caller, b"lost", "a.txt"), await store.put(caller, b"whole", "b.txt")
        store.blobs.erase(lost.blob_id)
        assert await sweep(store, thorough=False) == SweepReport()
        assert await sweep(store) == SweepReport(missing=1)
        assert await sweep(store) == SweepReport(), "known already"
        with pytest.raises(DamagedContent):
            await (await store.open_content(caller, lost.id)).read()
        report = await verify(store)
        assert (list(report.damaged), report.contents, report.whole) == ([lost.id], 2, False)
        await store.delete(caller, lost.id)
        assert (await verify(store)).whole
        assert await (await store.open_content(caller, whole.id)).read() == b"whole"

    opened(body)


def test_a_count_that_does_not_match_is_a_fault(opened: Callable) -> None:
    async def body(store, caller):
        await store.put(caller, b"counted", "a.txt")
        async with store.database.writing() as connection:
            await connection.execute(update(blobs).values(refs=2))
        (fault,) = (await verify(store)).faults
        assert "1 files refer to it, and 2 are counted" in fault

    opened(body)


def test_the_scrubber_reads_a_little_at_a_time_what_was_read_longest_ago(opened: Callable) -> None:
    async def body(store, caller):
        put = [await store.put(caller, bytes([number]) * 1000, f"{number}.bin") for number in range(5)]
        assert (await scrub_step(store, 10_000)).contents == 0, "just written"
        with later(SCRUBBED_EVERY / 1_000_000 + 1):
            assert (await scrub_step(store, 2500)).contents == 3
            store.blobs.erase(put[4].blob_id)
            report = await scrub_step(store, 10_000)
            assert (report.contents, report.size, list(report.damaged)) == (2, 2000, [put[4].id])
            assert (await scrub_step(store, 10_000)).contents == 0

    opened(body)


def test_uploads_deletions_expiry_and_sweeps_at_once_leave_quotas_exact(opened: Callable) -> None:
    async def body(store, caller):
        async def life(number: int) -> int:
            data = b"%d" % (number % 3) * 1000
            file = await store.put(caller, data, f"{number}.txt", expires_in=None if number % 2 else 0)
            if number % 4 == 1:
                await store.delete(caller, file.id)
            elif number % 2:
                assert await (await store.open_content(caller, file.id)).read() == data
                return len(data)
            return 0

        kept = await asyncio.gather(*(life(number) for number in range(40)), *(_swept(store) for _ in range(4)))
        await sweep(store)
        assert await used(store, caller) == (sum(kept), sum(1 for size in kept if size), 0, 0)
        assert len(list(store.blobs.names())) == await count(store, blobs)
        assert (await verify(store)).whole
        assert await sweep(store) == SweepReport()

    opened(body)


async def _swept(store: Store) -> int:
    await sweep(store)
    return 0
