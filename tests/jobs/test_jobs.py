"""The queue of jobs and the worker that runs them, with a child that trains nothing: leases, crashes, stops, limits, files that go."""

import asyncio
import json
import os
import signal
import sqlite3
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import select, update

from ropewalk.cli import main
from ropewalk.errors import BadInput, NotFound, QuotaExceeded
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.jobs.account import trained
from ropewalk.jobs.device import Device
from ropewalk.jobs.ledger import OPEN, Ledger, Limits
from ropewalk.jobs.recipe import Asked
from ropewalk.jobs.runner import JobRunner, Options
from ropewalk.jobs.tables import job_errors, jobs
from ropewalk.shared_registry import open_registry
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.quotas import usage
from ropewalk.tenants.tables import audit
from ropewalk.tenants.token_report import Trained
from ropewalk.tenants.workspaces import change_workspace, create_workspace

FAKE = (sys.executable, str(Path(__file__).parent / "fake_train.py"))
SECRET = "the lighthouse of Pellworm"
ROW = {"messages": [{"role": "user", "content": SECRET}, {"role": "assistant", "content": "1907"}]}
PATIENCE = 60


class Yard:
    """A store with a published base, and servers over it, as far as jobs are concerned."""

    def __init__(self, store, data):
        self.store, self.data = store, data
        self.registry = open_registry(data, store.settings.database_url)
        store.adapters_of = self.registry.trained_on

    def ledger(self, lease=20.0, **limits):
        return Ledger(self.store, Limits(**limits), lease)

    @asynccontextmanager
    async def running(self, ledger=None, device=None, **options):
        """A server's worker, for as long as the block lasts."""
        options = {"command": FAKE, "grace_seconds": 20.0, **options}
        runner = JobRunner(ledger or self.ledger(), self.registry, self.data / "jobs", Options(**options), device)
        task = asyncio.create_task(runner.run())
        try:
            yield runner
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def put(self, caller, *rows):
        content = "".join(json.dumps(row) + "\n" for row in (ROW, *rows))
        return (await self.store.put(caller, content.encode(), "rows.jsonl")).id

    async def ask(self, caller, ledger, file, steps=6, **more):
        return await ledger.submit(caller, Asked("base", file, keys={"max_steps": steps}, **more))

    async def at(self, caller, ledger, job, true):
        """The job, once this holds of it."""
        async with asyncio.timeout(PATIENCE):
            while not true(found := await ledger.show(caller, job.id)):
                await asyncio.sleep(0.02)
        return found

    async def ended(self, caller, ledger, job):
        return await self.at(caller, ledger, job, lambda found: found.state not in OPEN)

    async def losses(self, ledger, job):
        return {step: one["train_loss"] for step, one in (await ledger.steps(job.id)).items() if "train_loss" in one}

    def words(self):
        """Where the secret stands in the clear."""
        return [path for path in self.data.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@asynccontextmanager
async def yard(data, **place):
    store = await Store.open(Settings(data=data, **place))
    found = Yard(store, data)
    try:
        (data / "base").mkdir(parents=True)
        found.registry.publish_base("base", data / "base")
        yield found, await store.local_caller()
    finally:
        found.registry.close()
        await store.close()


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """A root key of the test's own, and nobody waits long before he looks again."""
    monkeypatch.setattr("ropewalk.jobs.runner.LOOK_SECONDS", 0.05)
    monkeypatch.setattr("ropewalk.jobs.runner.POLL_SECONDS", 0.2)
    monkeypatch.setattr("ropewalk.jobs.runner.AGAIN_SECONDS", 0.05)
    monkeypatch.setattr("ropewalk.jobs.runner.MOST_FAILURES", 2)
    monkeypatch.setenv("ROPEWALK_ROOT_KEY_FILE", str(tmp_path / "root.key"))


@pytest.fixture(params=["here", "elsewhere"])
def place(request):
    """SQLite and a folder; PostgreSQL and a bucket."""
    if request.param == "here":
        return {}
    return {"database_url": request.getfixturevalue("postgres_url"), "blobs": request.getfixturevalue("bucket_url")}


def whole(steps):
    return {step: 1 / step for step in range(1, steps + 1)}


def test_a_job_becomes_a_model_and_leaves_nothing_of_its_file_in_the_clear(tmp_path):
    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()
            file = await here.put(me)
            async with here.running(ledger) as runner:
                job = await here.ask(me, ledger, file, suffix="house", seed=3)
                runner.look()
                done = await here.ended(me, ledger, job)
            assert (done.state, done.model, done.step, done.steps, done.trained_tokens) == ("succeeded", done.name, 6, 6, 60)
            assert done.name == f"ft:base:house:{job.id[-8:]}"
            assert await here.losses(ledger, job) == whole(6)
            entry = here.registry.resolve(done.name)
            told = {key: entry.lineage[key] for key in ("file", "job", "config", "workspace", "versions")}
            assert told == {
                "file": file,
                "job": job.id,
                "config": job.config_digest,
                "workspace": me.workspace_id,
                "versions": "fake=1",
            }
            assert (entry.base, Path(entry.path, "adapter_config.json").exists()) == ("base", True)
            assert [one.name for one in here.registry.entries() if "ckpt" in one.name] == [
                f"{done.name}:ckpt-step-{step}" for step in (2, 4, 6)
            ]
            assert here.words() == []
            async with here.store.database.reading() as connection:
                written = (await connection.execute(select(audit.c.action).where(audit.c.subject == job.id))).scalars().all()
            assert written == ["job_created", "job_ended"]
            receipt = await here.store.delete(me, file)
            assert {"job", "job_tokens", "job_log", "job_events"} <= set(receipt.derived)
            assert done.name in receipt.adapters
            assert not runner.folder_of(job.id).events.exists()

    asyncio.run(body())


def test_of_two_servers_one_runs_a_job_and_a_crash_of_it_loses_none(tmp_path, place):
    async def body():
        async with yard(tmp_path / "data", **place) as (here, me):
            file = await here.put(me)
            first, second = here.ledger(lease=1.0, running=9), here.ledger(lease=1.0, running=9)
            asked = [await here.ask(me, first, file, steps=30) for _ in range(2)]
            claimed = [
                job for job in await asyncio.gather(*(ledger.claim() for ledger in (first, second, first, second))) if job
            ]
            assert sorted(job.id for job in claimed) == sorted(job.id for job in asked)
            assert {job.tries for job in claimed} == {1}
            # Nobody renews these leases: both processes are as good as dead, and others take over when they run out.
            async with here.running(here.ledger(running=9), at_once=2), here.running(here.ledger(running=9)):
                done = [await here.ended(me, first, job) for job in asked]
            assert {(job.state, job.tries) for job in done} == {("succeeded", 2)}
            for job in asked:
                assert await here.losses(first, job) == whole(30)
            # Who comes back late learns that it is not his any more.
            assert await first.order(claimed[0]) == "lost"
            assert not await first.tell(claimed[0], [])

    asyncio.run(body())


def test_a_child_that_dies_goes_on_from_its_checkpoint_but_not_for_ever(tmp_path):
    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()
            good, bad = await here.put(me), await here.put(me, {"do": "crash"})
            async with here.running(ledger) as runner:
                job = await here.ask(me, ledger, good, steps=40)
                runner.look()
                await here.at(me, ledger, job, lambda found: found.step >= 3)
                pid = child(runner.folder_of(job.id))
                os.kill(pid, signal.SIGKILL)
                done = await here.ended(me, ledger, job)
                assert (done.state, done.tries, done.failures) == ("succeeded", 2, 1)
                assert await here.losses(ledger, job) == whole(40)
                job = await here.ask(me, ledger, bad)
                runner.look()
                failed = await here.ended(me, ledger, job)
            # Its checkpoint of step 2 is gone on from each time.
            assert (failed.state, failed.tries, failed.error_code) == ("failed", 2, "run_crashed")
            assert "signal 9" in await ledger.error(failed)

    asyncio.run(body())


def child(folder):
    """The process that trains into a folder."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (
                path.joinpath("cwd").resolve() == folder.path.resolve()
                and b"--granted" in path.joinpath("cmdline").read_bytes()
            ):
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"nobody trains into {folder.path}")


def test_a_failed_job_is_resumed_from_its_checkpoint_as_long_as_it_is_kept(tmp_path):
    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger, archives = here.ledger(running=3), here.store.archives

            async def failed(file=None):
                job = await here.ask(me, ledger, file or await here.put(me, {"do": "short"}))
                return await here.ended(me, ledger, job)

            async def used():
                async with here.store.database.reading() as connection:
                    return (await usage(connection, "workspace", me.workspace_id)).used_bytes

            async with here.running(ledger, at_once=3) as runner:
                first = await failed()
                assert (first.state, first.error_code, first.step, first.resumable) == ("failed", "training_failed", 3, True)
                assert first.kept_until - first.finished_at == pytest.approx(7 * 86_400e6, abs=60e6)
                assert set(await archives.find(first.id)) == {"step-00000002", "resume-00000002"}
                file = await here.store.show(me, first.training_file)
                assert await used() == file.size + sum(one.size for one in (await archives.find(first.id)).values())
                assert not runner.folder_of(first.id).prepared.exists()
                with pytest.raises(QuotaExceeded, match="0 jobs that have not ended, of 0"):  # as any other that is begun
                    await here.ledger(queued=0).resume(me, first.id)
                again = await ledger.resume(me, first.id)
                assert (again.state, again.error_code, again.finished_at, again.resumable) == ("queued", None, None, False)
                assert await ledger.error(again) is None
                done = await here.ended(me, ledger, again)
                assert (done.state, done.tries, await here.losses(ledger, done)) == ("succeeded", 2, whole(6))
                assert "goes on from step 2" in await ledger.log(done)
                assert done.device_time > first.device_time >= 3 * 30_000  # three steps of 0.03 s

                second, third = await failed(), await failed()
                await here.store.delete(me, second.training_file)
                third = await ledger.want(me, third.id, "cancel")
                for job in (second, third):
                    gone = await here.at(me, ledger, job, lambda found: found.kept_until is None)
                    assert (gone.state, gone.error_code) == ("failed", "training_failed")
                    async with asyncio.timeout(PATIENCE):
                        while runner.folder_of(job.id).run.exists() or await archives.find(job.id):
                            await asyncio.sleep(0.02)
                    with pytest.raises(BadInput, match="only a paused one can be resumed, and for 7 days a failed one"):
                        await ledger.resume(me, job.id)
                ledger.keep = 0
                fourth = await failed()
                assert (await here.at(me, ledger, fourth, lambda found: found.kept_until is None)).state == "failed"

    asyncio.run(body())


def test_a_server_that_stops_gives_its_job_back_and_the_next_goes_on(tmp_path, place):
    async def body():
        async with yard(tmp_path / "data", **place) as (here, me):
            ledger = here.ledger()
            async with here.running(ledger):
                job = await here.ask(me, ledger, await here.put(me), steps=60)
                await here.at(me, ledger, job, lambda found: found.step >= 3)
            left = await ledger.show(me, job.id)
            assert (left.state, left.holder) == ("queued", None)
            async with here.running(ledger):
                done = await here.ended(me, ledger, job)
            assert (done.state, done.tries, await here.losses(ledger, job)) == ("succeeded", 2, whole(60))

    asyncio.run(body())


def test_a_job_is_paused_resumed_and_cancelled(tmp_path, place):
    async def body():
        async with yard(tmp_path / "data", **place) as (here, me):
            ledger = here.ledger()
            async with here.running(ledger) as runner:
                job = await here.ask(me, ledger, await here.put(me), steps=500)
                await here.at(me, ledger, job, lambda found: found.step >= 3)
                assert (await ledger.want(me, job.id, "pause")).state == "running"
                paused = await here.at(me, ledger, job, lambda found: found.state == "paused")
                assert runner.folder_of(job.id).checkpoints()
                with pytest.raises(BadInput, match="it cannot be paused"):
                    await ledger.want(me, job.id, "pause")
                await ledger.resume(me, job.id)
                runner.look()
                await here.at(me, ledger, job, lambda found: found.step > paused.step)
                with pytest.raises(BadInput, match="only a paused one"):
                    await ledger.resume(me, job.id)
                await ledger.want(me, job.id, "cancel")
                ended = await here.ended(me, ledger, job)
                assert (ended.state, ended.tries, ended.model) == ("cancelled", 2, None)
                told = [event.message for event in await ledger.since(job.id, 0)]
                assert told.count("The job has been cancelled") == 1
                assert not runner.folder_of(job.id).run.exists()
                with pytest.raises(BadInput, match="cannot be cancelled"):
                    await ledger.want(me, job.id, "cancel")

    asyncio.run(body())


def test_a_run_that_does_not_stop_is_killed(tmp_path):
    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()
            async with here.running(ledger, grace_seconds=0.2) as runner:
                job = await here.ask(me, ledger, await here.put(me), steps=500)
                await here.at(me, ledger, job, lambda found: found.step >= 1)
                os.kill(child(runner.folder_of(job.id)), signal.SIGSTOP)
                await ledger.want(me, job.id, "cancel")
                assert (await here.ended(me, ledger, job)).state == "cancelled"

    asyncio.run(body())


def test_the_device_time_of_a_silent_run_is_written_down_while_it_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.jobs.runner.COUNT_SECONDS", 0.1)

    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()
            async with here.running(ledger, grace_seconds=0.1) as runner:
                job = await here.ask(me, ledger, await here.put(me), steps=500)
                await here.at(me, ledger, job, lambda found: found.step >= 1)
                os.kill(child(runner.folder_of(job.id)), signal.SIGSTOP)
                await asyncio.sleep(0.2)  # its last words are taken down
                silent = await ledger.show(me, job.id)
                later = await here.at(me, ledger, job, lambda found: found.device_time >= silent.device_time + 300_000)
                assert (later.state, later.step) == ("running", silent.step)
                await ledger.want(me, job.id, "cancel")
                ended = await here.ended(me, ledger, job)
                assert ended.device_time > later.device_time

    asyncio.run(body())


def test_a_job_ends_with_the_file_that_it_learns_from(tmp_path, place):
    async def body():
        async with yard(tmp_path / "data", **place) as (here, me):
            ledger = here.ledger(running=1)
            file, other = await here.put(me), await here.put(me, ROW)
            async with here.running(ledger) as runner:
                running = await here.ask(me, ledger, file, steps=500)
                waiting = await here.ask(me, ledger, other, validation_file=file)
                await here.at(me, ledger, running, lambda found: found.step >= 1)
                await here.store.delete(me, file)
                for job in (running, waiting):
                    assert (await here.ended(me, ledger, job)).state == "cancelled"
                    assert "was deleted" in [event.message for event in await ledger.since(job.id, 0)][-1]
                assert not runner.folder_of(running.id).run.exists()
                assert here.words() == []
            with pytest.raises(NotFound):
                await here.ask(me, ledger, file)

    asyncio.run(body())


def test_why_a_job_failed_is_sealed_and_dies_with_the_file_it_quotes(tmp_path, place):
    async def body():
        async with yard(tmp_path / "data", **place) as (here, me):
            ledger = here.ledger()
            file = await here.put(me, {"do": "fail"})
            async with here.running(ledger):
                job = await here.ask(me, ledger, file)
                failed = await here.ended(me, ledger, job)
            assert (failed.state, failed.error_code) == ("failed", "invalid_training_file")
            assert "a secret word" in await ledger.error(failed)
            async with here.store.database.reading() as connection:
                assert b"secret" not in (await connection.execute(select(job_errors.c.sealed))).scalar_one()
            assert not [one for one in await ledger.since(job.id, 0) if "secret" in one.message]
            await here.store.delete(me, file)
            assert await ledger.error(failed) is None

    asyncio.run(body())


def test_a_workspace_has_its_limits_and_no_other_waits_for_it(tmp_path, place):
    async def body():
        async with yard(tmp_path / "data", **place) as (here, me):
            ledger = here.ledger(running=1, queued=3, file_bytes=1000)
            made = await create_workspace(here.store.database, here.store.vault, "other")
            other = Caller(made.organization_id, made.id, None)
            mine = [await here.ask(me, ledger, await here.put(me), metadata={"n": str(n)}) for n in range(3)]
            assert [job.id for job in (await ledger.list(me, 9, metadata={"n": "1"})).jobs] == [mine[1].id]
            assert (await ledger.list(me, 9, metadata={"n": "1", "m": "1"})).jobs == ()
            theirs = await here.ask(other, ledger, await here.put(other))
            with pytest.raises(QuotaExceeded, match="3 jobs that have not ended, of 3"):
                await here.ask(me, ledger, await here.put(me))
            with pytest.raises(QuotaExceeded, match="bytes"):
                await here.ask(other, ledger, await here.put(other, *[ROW] * 9))
            claimed = [job for job in [await ledger.claim() for _ in range(4)] if job]
            assert {job.id for job in claimed} == {mine[0].id, theirs.id}
            with pytest.raises(NotFound):
                await ledger.show(other, mine[0].id)
            for act in (lambda id: ledger.want(other, id, "cancel"), lambda id: ledger.resume(other, id)):
                with pytest.raises(NotFound):
                    await act(mine[1].id)
            with pytest.raises(NotFound):
                await here.ask(other, ledger, mine[0].training_file)
            for name, value in {"jobs_queued": 4, "jobs_running": 2, "jobs_file_bytes": 10**6}.items():  # limits of its own
                await change_workspace(here.store.database, me.workspace_id, {name: value})
            mine.append(await here.ask(me, ledger, await here.put(me, *[ROW] * 9)))
            with pytest.raises(QuotaExceeded, match="4 jobs that have not ended, of 4"):
                await here.ask(me, ledger, await here.put(me))
            assert [(await ledger.claim()).id, await ledger.claim()] == [mine[1].id, None]
            assert [job.id for job in (await ledger.list(me, 2)).jobs] == [mine[3].id, mine[2].id]
            assert (await ledger.list(me, 10, mine[1].id)).jobs[0].id == mine[0].id
            async with here.store.database.writing() as connection:
                day = {"finished_at": 86_400_000_000 * 2 - 1, "trained_tokens": 70, "device_time": 2_500_000}
                await connection.execute(update(jobs).where(jobs.c.id == theirs.id).values(day))
            counted = await trained(here.store.database, "1970-01-02", None, None)
            assert counted[0] == Trained("1970-01-02", "base", other.workspace_id, 1, 70, 2.5)
            assert [(one.workspace_id, one.jobs, one.tokens) for one in counted[1:]] == [(me.workspace_id, 2, 0)]  # begun
            assert await trained(here.store.database, "1970-01-02", me.workspace_id, "ann") == []
            assert len(await trained(here.store.database, "1970-01-03", None, None)) == 1
            assert {job.id for job in await ledger.belonging(me, {mine[0].id, theirs.id})} == {job.id for job in mine}

    asyncio.run(body())


def test_what_was_to_stop_when_its_server_died_stops_with_the_next(tmp_path, place):
    async def body():
        async with yard(tmp_path / "data", **place) as (here, me):
            ledger = here.ledger()
            held = [await here.ask(me, ledger, await here.put(me)) for _ in range(2)]
            async with here.store.database.writing() as connection:
                for job, wanted in zip(held, ("cancel", "pause")):
                    dead = (
                        update(jobs).where(jobs.c.id == job.id).values(state="running", wanted=wanted, holder="gone", tries=1)
                    )
                    await connection.execute(dead)
            assert len(await ledger.settle()) == 2
            assert [(await ledger.show(me, job.id)).state for job in held] == ["cancelled", "paused"]
            assert await ledger.settle() == []

    asyncio.run(body())


class Engines:
    """What has the device while no job does."""

    def __init__(self, fails=0):
        self.did, self.answering, self.fails = [], asyncio.Event(), fails
        self.answering.set()

    async def lend(self):
        if self.fails:
            self.fails -= 1
            raise OSError("it does not end")
        self.did.append("drain")
        await self.answering.wait()
        self.did.append("free")

    async def take_back(self):
        self.did.append("back")


def test_on_one_device_a_job_and_the_engines_of_all_servers_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.jobs.device.LOOK_SECONDS", 0.02)

    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger, ours, theirs = here.ledger(), Engines(fails=1), Engines()
            beside = asyncio.create_task(Device(tmp_path / "device", theirs).watch())  # of another server
            theirs.answering.clear()
            async with here.running(ledger, Device(tmp_path / "device", ours)):
                job = await here.ask(me, ledger, await here.put(me))
                async with asyncio.timeout(PATIENCE):
                    while ours.did != ["drain", "free"]:
                        await asyncio.sleep(0.02)
                await asyncio.sleep(0.3)
                # Somebody is still being answered there: the device is not free, and the job has not begun.
                assert (theirs.did, (await ledger.show(me, job.id)).step) == (["drain"], 0)
                theirs.answering.set()
                assert (await here.ended(me, ledger, job)).state == "succeeded"
                async with asyncio.timeout(PATIENCE):
                    while "back" not in ours.did or "back" not in theirs.did:
                        await asyncio.sleep(0.02)
            assert ours.did == theirs.did == ["drain", "free", "back"]
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)

    asyncio.run(body())


def test_the_command_line_lists_shows_and_cancels_jobs(tmp_path, capsys):
    data = tmp_path / "data"

    async def body():
        async with yard(data) as (here, me):
            ledger = here.ledger()
            async with here.running(ledger):
                done = await here.ended(me, ledger, await here.ask(me, ledger, await here.put(me)))
            return done, await here.ask(me, ledger, await here.put(me))

    done, waiting = asyncio.run(body())
    assert main(["jobs", "list", "--data", str(data), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["data"]
    assert [(job["id"], job["state"]) for job in told] == [(waiting.id, "queued"), (done.id, "succeeded")]
    assert main(["jobs", "list", "--data", str(data)]) == 0
    assert f"step 6 of 6  {done.name}" in capsys.readouterr().out
    assert main(["jobs", "show", done.id, "--data", str(data)]) == 0
    assert "Step 6/6: training loss=0.1667" in capsys.readouterr().out
    assert main(["jobs", "logs", done.id, "--data", str(data)]) == 0
    (data / "jobs" / done.id / "log.txt").unlink()  # as on another machine
    assert main(["jobs", "logs", done.id, "--data", str(data)]) == 0
    assert capsys.readouterr().out == "goes on from step 0\n" * 2
    assert main(["jobs", "cancel", waiting.id, "--data", str(data)]) == 0
    assert capsys.readouterr().out == f"{waiting.id} is cancelled\n"
    with sqlite3.connect(data / "ropewalk.db") as database:
        database.execute("update jobs set state = 'paused' where id = ?", (waiting.id,))
    assert main(["jobs", "resume", waiting.id, "--data", str(data)]) == 0
    assert capsys.readouterr().out == f"{waiting.id} is queued again\n"
    for refused in (["resume", done.id], ["cancel", done.id], ["logs", waiting.id], ["show", "ftjob_none"]):
        assert main(["jobs", *refused, "--data", str(data)]) == 2
    assert main(["jobs", "list", "--limit", "0", "--data", str(data)]) == 2
