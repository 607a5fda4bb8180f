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
from types import SimpleNamespace

import pytest

import backends
from jobs.test_jobs import OPEN, SECRET, child, quick, whole, yard  # noqa: F401
from ropewalk.cli import main
from ropewalk.config.cluster import RayCluster
from ropewalk.config.run import parse_run
from ropewalk.config.serving import Serving, read_serving
from ropewalk.errors import BadInput, ConfigError, MissingExtra, TrainingStopped
from ropewalk.jobs.cluster import Driver
from ropewalk.jobs.launch import Launch
from ropewalk.jobs.ray_worker import Errand, Seen, Worker
from ropewalk.jobs.recipe import Asked
from ropewalk.jobs.run_mirror import Mirror
from ropewalk.jobs.worker_group import Lost
from ropewalk.quickstart import facts
from ropewalk.server.fine_tuning import runner_of
from ropewalk.server.settings import ServerSettings
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
    keys = {"sequence_len": 256, "lora_r": 2, "num_threads": 1, "bf16": False, "save_steps": 3, "max_steps": 12}

    async def body():
        async with yard(tmp_path / "data") as (here, me):
            here.registry.publish_base("base", BASE)
            ledger = here.ledger()
            content = "".join(json.dumps(row) + "\n" for row in rows)
            file = (await here.store.put(me, content.encode(), "rows.jsonl")).id
            options = {"command": (sys.executable, "-m", "ropewalk", "train"), "cluster": RayCluster(cluster.address, 2)}
            async with here.running(ledger, **options) as runner:
                asked = {**keys, "gradient_accumulation_steps": 4, "sample_packing": False}
                job = await ledger.submit(me, Asked("base", file, keys=asked, seed=1))
                runner.look()
                await here.at(me, ledger, job, lambda found: found.step >= 3)
                folder = runner.folder_of(job.id)
                await until(lambda: list((folder.run / "checkpoints").glob("step-*")))
                trained = workers_of(cluster)
                assert len(trained) == 2
                os.kill(sorted(trained)[-1], signal.SIGKILL)
                done = await here.ended(me, ledger, job)
            assert (done.state, done.tries, done.step) == ("succeeded", 1, 12), await ledger.error(done)
            told = [event.message for event in await ledger.since(job.id, 0)]
            assert [text for text in told if "was lost" in text and "goes on from step" in text]
            assert not [text for text in told if "goes on from step 0" in text]
            curve = await here.losses(ledger, job)
            assert sorted(curve) == list(range(1, 13))
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


def test_a_run_on_ray_is_paused_and_its_driver_killed_and_no_node_keeps_a_word_of_it(tmp_path, cluster):
    async def body():
        async with yard(tmp_path / "data") as (here, me):
            ledger = here.ledger()
            async with here.running(ledger, command=FAKE, cluster=RayCluster(cluster.address)) as runner:
                job = await here.ask(me, ledger, await here.put(me), steps=2000)
                runner.look()
                await here.at(me, ledger, job, lambda found: found.step >= 3)
                assert [path for folder in left(cluster) for path in folder.rglob("*.bin")]  # words of the file
                await ledger.want(me, job.id, "pause")
                paused = await here.at(me, ledger, job, lambda found: found.state == "paused")
                assert (left(cluster), workers_of(cluster)) == ([], {})
                last = max(runner.folder_of(job.id).checkpoints())
                assert last == paused.step  # it was written when the run was asked to stop
                assert last in await runner.archive.steps(job.id)  # and lies in the blob store
                await ledger.resume(me, job.id)
                runner.look()
                await here.at(me, ledger, job, lambda found: found.step > last)
                before = set(workers_of(cluster).values())
                assert len(before) == 1
                os.kill(child(runner.folder_of(job.id)), signal.SIGKILL)
                seen = [before]
                while (found := await ledger.show(me, job.id)).tries < 3 or not seen[-1] - before:
                    assert found.state in OPEN
                    seen.append(set(workers_of(cluster).values()))
                    await asyncio.sleep(0.05)
                assert max(map(len, seen)) == 1  # never were two at work
                await here.at(me, ledger, job, lambda found: found.step > last + 5)
                curve = await here.losses(ledger, job)
                assert curve == whole(max(curve))
                assert "lost" not in " ".join(event.message for event in await ledger.since(job.id, 0))
                await ledger.want(me, job.id, "cancel")
                assert (await here.ended(me, ledger, job)).state == "cancelled"
                assert not runner.folder_of(job.id).run.exists()
            assert here.words() == []

    asyncio.run(body())
    assert (left(cluster), workers_of(cluster)) == ([], {})


class Scripted:
    """A group of workers that tells what a test has written down: looks one after another, or how it is lost."""

    def __init__(self, looks):
        self.looks, self.ready, self.stopped = list(looks), True, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def begin(self, mirror):
        pass

    def stop(self):
        self.stopped += 1

    def files(self, folder):
        return [(f"{folder}/adapter_config.json", 2)] if folder != "run.json" else [("run.json", 21)]

    def get(self, path, start):
        return (b'{"state": "finished"}' if path == "run.json" else b"{}")[start:]

    def look(self):
        found = self.looks.pop(0)
        if isinstance(found, str):
            raise Lost(found)
        return found


def told(code=None, said=b"", checkpoints=(), events=b"", anew=False):
    return Seen(code, said, events, anew, (0, 0, 0), b'{"state": "training"}', tuple(checkpoints))


@pytest.fixture
def driven(tmp_path, monkeypatch):
    """Runs a driver over scripted groups, one for each try."""
    monkeypatch.setattr("ropewalk.jobs.cluster.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("ropewalk.jobs.cluster.OTHERS_SECONDS", 0.05)

    def run(*tries, workers=2, asked=lambda: False):
        groups = [Scripted(looks) for looks in tries]
        left = iter(groups)
        monkeypatch.setattr("ropewalk.jobs.cluster.Group", lambda *_: next(left))
        launch = Launch("run-x", workers, None, (), tmp_path / "run", config="x")
        launch.run.mkdir(exist_ok=True)
        return Driver(None, launch, Mirror(launch), asked).run(), groups

    return run


def test_a_run_that_says_why_it_fails_is_not_tried_again_whoever_says_it(driven, capsys):
    lost = told(1, b"Traceback\nropewalk: process 0 of 2 lost another one, or waited\n")
    wrong = told(2, b" a line]\nropewalk: rows.jsonl:1: wrong")
    with pytest.raises(BadInput, match=r"rows\.jsonl:1: wrong"):
        driven([[told(), told(said=b"[half")], [told(), wrong], [lost, told(2)]])
    assert capsys.readouterr().err.splitlines()[0] == "[1] [half a line]"
    with pytest.raises(TrainingStopped, match="the loss is nan"):
        driven([[told(1, b"ropewalk: step 3: the loss is nan\n"), told()], [told(1), told(1, b"Traceback")]])


def test_a_run_that_is_lost_is_tried_again_as_long_as_it_comes_further(driven, tmp_path):
    steps = ["step-00000002", "step-00000004"]
    lost = told(1, b"ropewalk: process 1 of 2 lost another one\n", steps)
    killed = [told(-9, checkpoints=steps), lost]
    event = b'{"event": "step", "step": 2}\n'
    first = [[told(events=event, anew=True, checkpoints=steps[:1]), told()], "worker 1 is gone"]
    second = [[told(events=event, anew=True, checkpoints=steps), told()], killed, killed]
    done = [told(0, checkpoints=steps), told(0)]
    code, _ = driven(first, second, first[1:], [done])
    run = tmp_path / "run"
    assert code == 0
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "checkpoints", "events.jsonl", "plots", "run.json"]
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(one["event"], one["step"]) for one in lines[:2]] == [("step", 2), ("restart", 2)]
    with pytest.raises(TrainingStopped, match="3 times in a row a worker was lost; the last time: worker 0 ended by signal 9"):
        driven(["worker 1 is gone"], ["worker 0 is gone"], [killed] * 2)
    asked = iter([False, True, True, True])
    with pytest.raises(TrainingStopped, match="while a worker was lost"):
        driven([[told(), told()], [told(), told()], "gone"], asked=lambda: next(asked))


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
    keys = f"base_model: {tmp_path}\nadapter: lora\nlearning_rate: 1e-4\noutput_dir: {tmp_path / 'run'}\ndatasets: [{{path: {rows}, type: chat_template}}]\n"
    path.write_text(keys + "use_ray: true\n")
    assert main(["train", str(path)]) == 2
    assert "a run on Ray needs the package 'ray'" in (said := capsys.readouterr().err)
    assert "pip install 'ropewalk[cluster]'" in said
    assert main(["train", str(path), "--processes", "2"]) == 2
    assert "ray_num_workers" in capsys.readouterr().err
    assert main(["train", str(path), "datasets.0.path=file_0123456789abcdefghijklmn"]) == 2
    assert "train it as a job of a server with `jobs: ray`" in capsys.readouterr().err


def test_a_server_that_is_to_use_ray_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("ropewalk.server.fine_tuning.find_spec", lambda name: None)
    store = SimpleNamespace(settings=SimpleNamespace(data=tmp_path))
    app = SimpleNamespace(state=SimpleNamespace(settings=ServerSettings(serving=Serving(jobs=RayCluster())), store=store))
    with pytest.raises(MissingExtra, match=r"`jobs: ray` needs the package 'ray', .*'ropewalk\[cluster\]'"):
        runner_of(app)


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
