"""Jobs of servers that share a database and a bucket, each with a data folder of its own; and what is kept of runs in any case."""

import asyncio
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from jobs.test_jobs import Yard, quick, whole, yard  # noqa: F401  (`quick` is for all tests here too)
from ropewalk.errors import OutputError
from ropewalk.files import archives
from ropewalk.files.closing import delete_workspace
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.jobs.archive import JobArchive
from ropewalk.jobs.closing import forgetting
from ropewalk.tenants import quotas
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import create_workspace


@pytest.fixture(autouse=True)
def looking(monkeypatch):
    monkeypatch.setattr("ropewalk.jobs.keeping.LOG_SECONDS", 0.1)


@asynccontextmanager
async def machine(data, url, bucket):
    store = await Store.open(Settings(data=data, database_url=url, blobs=bucket))
    found = Yard(store, data)
    try:
        yield found
    finally:
        found.registry.close()
        await store.close()


async def kept(here, job):
    return set(await here.store.archives.find(job.id))


async def used(here, caller):
    async with here.store.database.reading() as connection:
        return (await quotas.usage(connection, "workspace", caller.workspace_id)).used_bytes


def test_what_one_machine_has_begun_another_ends_and_both_serve(tmp_path, postgres_url, bucket_url):
    async def body():
        (tmp_path / "base").mkdir()
        a, b = machine(tmp_path / "a", postgres_url, bucket_url), machine(tmp_path / "b", postgres_url, bucket_url)
        async with a as first, b as second:
            me = await first.store.local_caller()
            first.registry.publish_base("base", tmp_path / "base")
            ledger = first.ledger()
            async with first.running(ledger) as runner:
                job = await first.ask(me, ledger, await first.put(me), steps=60)
                runner.look()
                await first.at(me, ledger, job, lambda found: found.step >= 5)
                async with asyncio.timeout(20):
                    while not any(name.startswith("resume") for name in await kept(second, job)):
                        await asyncio.sleep(0.05)
                    while "goes on from step 0" not in (await second.ledger().log(job) or ""):
                        await asyncio.sleep(0.05)
            left = await ledger.show(me, job.id)  # its server has stopped: the job waits
            assert left.state == "queued"
            steps = {int(name[5:]) for name in await kept(second, job) if name.startswith("step-")}
            assert left.step in steps  # the checkpoint with which it stopped
            async with second.running(second.ledger()) as runner:
                done = await second.ended(me, ledger, job)
            assert (done.state, done.tries, await first.losses(ledger, job)) == ("succeeded", 2, whole(60))
            assert await second.ledger().log(job) == f"goes on from step {left.step}"
            names = {f"step-{step:08d}" for step in {*range(2, 61, 2), *steps}}
            assert await kept(first, job) == {"adapter", *names}
            assert await used(first, me) > 30 * 10240
            for here in (first, second):
                entries = {entry.name: Path(entry.path) for entry in here.registry.entries()}
                assert entries[job.name] == here.data.resolve() / "jobs" / job.id / "run" / "adapter"
                assert len([name for name in entries if name.startswith(f"{job.name}:ckpt-step-")]) == len(names)
            # The first has a try of its own there, which is not what came of it.
            async with first.running(first.ledger(), at_once=0) as runner:
                path = Path(first.registry.resolve(job.name).path)
                await runner.bring(path)
                assert (path / "adapter_config.json").exists()
                older = Path(first.registry.resolve(f"{job.name}:ckpt-step-2").path)
                assert not older.exists()
                await runner.bring(older)
                assert [file.name for file in older.iterdir()] == ["adapter_config.json"]
                await runner.bring(tmp_path / "elsewhere")
                second.registry.ship("house", job.name)
                assert first.registry.resolve("house").path == str(path)
            assert first.words() == second.words() == []

    asyncio.run(body())


def test_a_file_that_goes_takes_along_what_a_run_goes_on_from(tmp_path):
    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()
            async with here.running(ledger):
                job = await here.ask(me, ledger, await here.put(me), steps=500)
                async with asyncio.timeout(20):
                    while not any(name.startswith("resume") for name in await kept(here, job)):
                        await asyncio.sleep(0.05)
                receipt = await here.store.delete(me, job.training_file)
                assert "job_state" in receipt.derived
                assert not any(name.startswith("resume") for name in await kept(here, job))
                await here.ended(me, ledger, job)
            assert (await kept(here, job), await used(here, me), list(here.store.blobs.names())) == (set(), 0, [])
            assert await ledger.log(job) is None

    asyncio.run(body())


def test_a_model_without_room_waits_until_there_is_some(tmp_path):
    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()

            async def limit(size):
                async with here.store.database.writing() as connection:
                    await quotas.set_limit(connection, "workspace", me.workspace_id, size, None)

            file = await here.put(me)
            await limit(20_000)
            async with here.running(ledger) as runner:
                job = await here.ask(me, ledger, file)
                paused = await here.at(me, ledger, job, lambda found: found.state == "paused")
                told = [event.message for event in await ledger.since(job.id, 0)]
                assert any("the workspace has no room for it. The run goes on" in one for one in told)
                assert "no room to keep it: delete files" in told[-1]
                assert (paused.step, await used(here, me) <= 20_000) == (6, True)
                await limit(None)
                await ledger.resume(me, job.id)
                runner.look()
                assert (await here.ended(me, ledger, job)).model == job.name
            assert await kept(here, job) == {"adapter", *(f"step-{step:08d}" for step in (2, 4, 6))}

    asyncio.run(body())


def test_while_the_bucket_is_gone_nothing_of_a_run_is_lost(tmp_path, monkeypatch):
    pack, refused = archives.packing.pack, []

    def sometimes(ticket, folder, paths):
        if "adapter" in paths and not refused:
            refused.append(paths)
            raise OutputError("the bucket refused")
        return pack(ticket, folder, paths)

    monkeypatch.setattr(archives.packing, "pack", sometimes)

    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()
            async with here.running(ledger):
                job = await here.ask(me, ledger, await here.put(me))
                done = await here.ended(me, ledger, job)
            told = [event.message for event in await ledger.since(job.id, 0)]
            assert (done.state, done.tries, refused) == ("succeeded", 2, [("adapter", "run.json")])
            assert "The store cannot be reached; the job goes on when it can" in told
            assert not any("refused" in one for one in told)

    asyncio.run(body())


def test_a_workspace_takes_its_jobs_and_their_models_along(tmp_path):
    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger(running=2)
            made = await create_workspace(here.store.database, here.store.vault, "other")
            other = Caller(made.organization_id, made.id, None)
            async with here.running(ledger, at_once=2) as runner:
                mine, theirs = [await here.ask(who, ledger, await here.put(who)) for who in (me, other)]
                for who, job in ((me, mine), (other, theirs)):
                    await here.ended(who, ledger, job)
                for alias in ("house", "theirs"):
                    here.registry.ship(alias, mine.name if alias == "house" else theirs.name)
                here.registry.ship("house", theirs.name)
                receipts = [one async for one in delete_workspace(here.store, "other", [forgetting(here.registry, here.data)])]
                assert theirs.name in receipts[0].adapters
                assert here.registry.aliases() == {"house": mine.name}
                assert {entry.lineage["job"] for entry in here.registry.entries() if entry.base} == {mine.id}
                assert (await kept(here, theirs), len(await kept(here, mine))) == (set(), 4)
                assert not runner.folder_of(theirs.id).path.exists()
                # On another machine its folder goes when that looks.
                runner.folder_of(theirs.id).run.mkdir(parents=True)
                await runner._tidy()
                assert not runner.folder_of(theirs.id).path.exists()
                assert runner.folder_of(mine.id).finished

    asyncio.run(body())


def test_after_a_restore_the_models_of_jobs_are_published_again(tmp_path):
    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()
            async with here.running(ledger):
                job = await here.ask(me, ledger, await here.put(me))
                await here.ended(me, ledger, job)
            before = here.registry.entries()
            here.registry.withdraw("workspace", me.workspace_id)  # a backup has neither this nor folders of runs
            shutil.rmtree(here.data / "jobs")
            async with here.running(ledger, at_once=0):
                async with asyncio.timeout(20):
                    while len(here.registry.entries()) < len(before):
                        await asyncio.sleep(0.05)
            again = here.registry.entries()
            for old, new in zip(before, again, strict=True):
                assert (old.name, old.path, old.lineage) == (new.name, new.path, new.lineage)
                assert old.kind == "base" or Path(new.path, "adapter_config.json").exists()

    asyncio.run(body())


def test_what_a_run_goes_on_from_is_kept_with_its_model_while_it_writes_and_removes_others(tmp_path, monkeypatch):
    pack, run = archives.packing.pack, tmp_path / "run"

    def checkpoint(step):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "optimizer.pt").write_text(str(step))

    def meanwhile(ticket, folder, paths):
        if not (run / "checkpoints" / "step-00000008").exists():
            checkpoint(8)
            shutil.rmtree(run / "checkpoints" / "step-00000002")
        return pack(ticket, folder, paths)

    monkeypatch.setattr(archives.packing, "pack", meanwhile)

    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()
            await here.ask(me, ledger, await here.put(me))
            job = await ledger.claim()
            for step in (2, 4, 6):
                checkpoint(step)
            archive = JobArchive(ledger)
            assert await archive.keep_checkpoints(job, run)
            assert await kept(here, job) == {"step-00000004", "step-00000006", "resume-00000006"}
            assert await archive.bring(job, tmp_path / "elsewhere")
            assert (tmp_path / "elsewhere" / "checkpoints" / "step-00000006" / "optimizer.pt").read_text() == "6"
            assert await archive.keep_checkpoints(job, run)
            assert await kept(here, job) == {"step-00000004", "step-00000006", "step-00000008", "resume-00000008"}

    asyncio.run(body())
