"""Jobs on a real Ray cluster of this machine, with two workers: losses whole after a kill, stops, a driver that dies, what is left behind.

Workers train with gloo in the first test, and nothing (fake_train.py) in the others.
"""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

import backends
from jobs.test_jobs import OPEN, SECRET, child, quick, whole, yard  # noqa: F401
from ropewalk.cli import main
from ropewalk.config.cluster import RayCluster
from ropewalk.config.run import parse_run
from ropewalk.config.serving import read_serving
from ropewalk.errors import ConfigError
from ropewalk.jobs.ray_worker import Errand, Worker
from ropewalk.jobs.recipe import Asked
from ropewalk.quickstart import facts
from ropewalk.train.trainer import train

FAKE = (sys.executable, str(Path(__file__).parent / "fake_train_on_ray.py"))
PLAIN = (sys.executable, str(Path(__file__).parent / "fake_train.py"))
BASE = Path(facts.__file__).parent / "base"


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    with backends.ray(cpus=2, environment={"OMP_NUM_THREADS": "1"}) as found:
        yield found


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """On a busy machine a Python process takes a quarter of a minute to begin."""
    monkeypatch.setattr("jobs.test_jobs.PATIENCE", 240)


def on(cluster, workers=1):
    return RayCluster(cluster.address, workers)


def pids(word, parent=None):
    """Processes with a word in their command line, of a parent."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line, state = (path / "cmdline").read_bytes(), (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if word.encode() in line and state[0] != "Z" and parent in (None, int(state[1])):
            found.append(int(path.name))
    return found


def workers_of(cluster):
    """The actors of a run that train, each with the process that it has started."""
    found = {}
    for pid in pids("--granted"):
        try:
            if os.readlink(f"/proc/{pid}/cwd").startswith(str(cluster.scratch)):
                found[int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])] = pid
        except OSError:
            continue
    return found


def left(cluster):
    """Folders of workers."""
    return list(cluster.scratch.glob("ropewalk-workers-*/*"))


async def until(true):
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.02)


def test_a_worker_is_killed_and_the_run_goes_on_to_the_losses_of_one_process(tmp_path, cluster, monkeypatch):
    made = facts.questions(facts.split()[0], 6)[:60]
    rows = [{"messages": [{"role": "user", "content": o.prompt}, {"role": "assistant", "content": o.answer}]} for o in made]
    keys = {"sequence_len": 256, "lora_r": 2, "num_threads": 1, "bf16": False, "save_steps": 4, "max_steps": 24}

    async def body():
        async with yard(tmp_path / "data") as (here, me):
            here.registry.publish_base("base", BASE)
            ledger = here.ledger()
            content = "".join(json.dumps(row) + "\n" for row in rows)
            file = (await here.store.put(me, content.encode(), "rows.jsonl")).id
            options = {"command": (sys.executable, "-m", "ropewalk", "train"), "cluster": on(cluster, 2)}
            async with here.running(ledger, **options) as runner:
                asked = {**keys, "gradient_accumulation_steps": 4, "sample_packing": False}
                job = await ledger.submit(me, Asked("base", file, keys=asked, seed=1))
                runner.look()
                await here.at(me, ledger, job, lambda found: found.step >= 4)
                folder = runner.folder_of(job.id)
                await until(lambda: list((folder.run / "checkpoints").glob("step-*")))
                trained = workers_of(cluster)
                assert len(trained) == 2
                os.kill(sorted(trained)[-1], signal.SIGKILL)
                done = await here.ended(me, ledger, job)
            assert (done.state, done.tries, done.step) == ("succeeded", 1, 24), await ledger.error(done)
            told = [event.message for event in await ledger.since(job.id, 0)]
            assert [text for text in told if "was lost" in text and "goes on from step" in text]
            assert not [text for text in told if "goes on from step 0" in text]
            curve = await here.losses(ledger, job)
            assert sorted(curve) == list(range(1, 25))
            assert [one for one in folder.run.iterdir() if one.name.startswith(".copy")] == []
            assert (folder.run / "adapter" / "adapter_config.json").exists()
            assert here.registry.resolve(done.name).base == "base"
            return curve

    curve = asyncio.run(body())
    assert left(cluster) == []
    # The same run in one process, which takes all batches of a step one after another.
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"base_model": str(BASE), "datasets": [{"path": str(path), "type": "chat_template"}], "adapter": "lora", "seed": 1}
    values |= {**keys, "gradient_accumulation_steps": 4, "num_epochs": 3, "learning_rate": 2e-4}
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    train(parse_run(json.dumps({**values, "output_dir": str(tmp_path / "one")})), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "one" / "events.jsonl").read_text().splitlines()]
    assert curve == pytest.approx({one["step"]: one["loss"] for one in lines if one["event"] == "step"}, rel=1e-4)


def test_a_run_on_ray_is_paused_goes_on_and_is_cancelled_and_no_node_keeps_a_word_of_it(tmp_path, cluster):
    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()
            async with here.running(ledger, command=FAKE, cluster=on(cluster, 2)) as runner:
                job = await here.ask(me, ledger, await here.put(me), steps=2000)
                runner.look()
                await here.at(me, ledger, job, lambda found: found.step >= 3)
                words = [path for folder in left(cluster) for path in folder.rglob("*.bin")]
                assert words
                await ledger.want(me, job.id, "pause")
                paused = await here.at(me, ledger, job, lambda found: found.state == "paused")
                assert left(cluster) == []
                last = max(runner.folder_of(job.id).checkpoints())
                assert last == paused.step  # it was written when the run was asked to stop
                await ledger.resume(me, job.id)
                runner.look()
                await here.at(me, ledger, job, lambda found: found.step > last)
                assert "lost" not in " ".join(event.message for event in await ledger.since(job.id, 0))
                await ledger.want(me, job.id, "cancel")
                assert (await here.ended(me, ledger, job)).state == "cancelled"
                assert not runner.folder_of(job.id).run.exists()
            assert here.words() == []

    asyncio.run(body())
    assert left(cluster) == []
    assert workers_of(cluster) == {}


def test_a_driver_that_is_killed_takes_its_workers_along_and_the_next_goes_on(tmp_path, cluster):
    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()
            async with here.running(ledger, command=FAKE, cluster=on(cluster)) as runner:
                job = await here.ask(me, ledger, await here.put(me), steps=100)
                runner.look()
                await here.at(me, ledger, job, lambda found: found.step >= 6)
                driver = child(runner.folder_of(job.id))
                before = set(workers_of(cluster).values())
                assert len(before) == 1
                os.kill(driver, signal.SIGKILL)
                seen = [before]
                while (found := await ledger.show(me, job.id)).state in OPEN:
                    seen.append(set(workers_of(cluster).values()))
                    await asyncio.sleep(0.05)
                assert (found.state, found.tries, found.failures) == ("succeeded", 2, 1), await ledger.error(found)
                assert max(map(len, seen)) == 1  # never were two at work
                assert not seen[-1] & before
                assert await here.losses(ledger, job) == whole(100)

    asyncio.run(body())
    assert left(cluster) == []


def test_a_run_on_ray_says_why_it_fails_or_that_it_is_lost_again_and_again(tmp_path, cluster):
    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()
            wrong, crashing = await here.put(me, {"do": "fail"}), await here.put(me, {"do": "crash"})
            async with here.running(ledger, command=FAKE, cluster=on(cluster)) as runner:
                job = await here.ask(me, ledger, wrong)
                runner.look()
                failed = await here.ended(me, ledger, job)
                assert (failed.state, failed.error_code) == ("failed", "invalid_training_file")
                assert (await ledger.error(failed)).startswith("rows.jsonl:1: key 'messages': is missing")
                job = await here.ask(me, ledger, crashing)
                runner.look()
                failed = await here.ended(me, ledger, job)
            assert (failed.state, failed.error_code, failed.tries) == ("failed", "training_failed", 1)
            assert "3 times in a row a worker was lost; the last time: worker" in await ledger.error(failed)
            assert "signal 9" in await ledger.error(failed)

    asyncio.run(body())


def test_a_configuration_says_where_jobs_are_trained(tmp_path):
    def read(text):
        path = tmp_path / "serving.yml"
        path.write_text(text)
        return read_serving(path).jobs

    assert read("jobs: ray") == RayCluster()
    assert read("jobs: local") is None
    assert read("fetch_urls: true") is None
    asked = read('jobs: {ray: {address: "head:6379", workers: 4, resources_per_worker: {CPU: 2, GPU: 1}}}')
    assert asked == RayCluster("head:6379", 4, {"CPU": 2, "GPU": 1})
    for text, told in (
        ("jobs: slurm", "expected local, ray, or"),
        ("jobs: {ray: {wrokers: 2}}", "did you mean 'workers'"),
        ("jobs: {ray: {workers: 0}}", "workers is 0; expected 1 or more"),
        ("jobs: {ray: {resources_per_worker: {GPU: many}}}", "GPU is 'many'"),
        ("jobs: {ray: {address: 6379}}", "address is 6379"),
    ):
        with pytest.raises(ConfigError, match=told):
            read(text)


def test_workers_share_the_batches_of_a_step_and_never_change_how_many_there_are():
    four = RayCluster(workers=4, resources_per_worker={"GPU": 1})
    shared = [(keys["ray_num_workers"], keys["gradient_accumulation_steps"]) for keys in map(four.keys, (1, 2, 6, 8, 7))]
    assert shared == [(1, 1), (2, 1), (3, 2), (4, 2), (1, 7)]
    assert four.keys(8)["resources_per_worker"] == {"GPU": 1}
    assert RayCluster(workers=8).keys(8, 2)["gradient_accumulation_steps"] == 4  # a run that has begun with two keeps them


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    path = tmp_path / "run.yml"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    keys = f"base_model: {tmp_path}\nadapter: lora\noutput_dir: {tmp_path / 'run'}\ndatasets: [{{path: {rows}, type: chat_template}}]\n"
    path.write_text(keys + "use_ray: true\n")
    assert main(["train", str(path)]) == 2
    assert "a run on Ray needs the package 'ray'" in (said := capsys.readouterr().err)
    assert "pip install 'ropewalk[cluster]'" in said
    assert main(["train", str(path), "--processes", "2"]) == 2
    assert "ray_num_workers" in capsys.readouterr().err
    assert main(["train", str(path), "datasets.0.path=file_0123456789abcdefghijklmn"]) == 2
    assert "train it as a job of a server with `jobs: ray`" in capsys.readouterr().err


def test_a_worker_gives_what_its_process_writes_and_leaves_nothing(tmp_path):
    worker = Worker(str(tmp_path))
    worker.put("events.jsonl", 0, b"one")
    worker.put("events.jsonl", 3, b" two")
    assert worker.get("events.jsonl", 2) == b"e two"
    assert worker.files("") == [("events.jsonl", 7)]
    code = "import sys, time; print('begun', flush=True); sys.stdin.readline(); time.sleep(60)"
    worker.begin(Errand(("-c", code), b"granted\n", {"RANK": "0"}, "", str(tmp_path)))
    late = time.monotonic() + 30
    while not (seen := worker.look((0, 0, 0))).said:
        assert time.monotonic() < late
        time.sleep(0.01)
    assert (seen.said, seen.events, seen.anew, seen.code) == (b"begun\n", b"one two", True, None)
    again = worker.look(seen.mark)
    assert (again.said, again.events, again.anew) == (b"", b"", False)
    # Another one, of an actor that was killed: its lock is nobody's.
    dead = next(tmp_path.glob("ropewalk-workers-*")) / "run-dead"
    dead.mkdir()
    (dead / ".lock").touch()
    other = Worker(str(tmp_path))
    assert not dead.exists()
    worker.stop()
    while (seen := worker.look(seen.mark)).code is None:
        time.sleep(0.01)
    assert seen.code == -signal.SIGTERM
    worker.close()
    other.close()
    assert list(tmp_path.glob("ropewalk-workers-*/*")) == []
