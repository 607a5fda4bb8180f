"""Kills a server while it trains, again and again, and checks that every job ends once, with its loss curve whole.

    python benchmarks/crash_jobs.py [--kills N] [--quick] [--json FILE] [--seed S]

The server dies by SIGKILL: half of the times at an injected point (before and after each commit, and between what a job leaves on disk
and what is written down of it), else at a random moment of the training. Then it is started anew. A job is killed up to four times,
and then has to end. A first job, which nobody disturbs, says what the losses are.

    lost      jobs that were acknowledged and do not end, or end otherwise than as a model that is published
    twice     jobs that ended twice, that were trained by two processes at the same time, or whose steps are told twice
    torn      jobs whose loss curve is not that of the undisturbed one

Exits 1 when any of them is not 0.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from measure import machine, table, write_json
from peers.file_servers import KEY, ROOT_KEY, Server, _with_a_key, running
from peers.lean_http import free_port, wait_for

FAILPOINTS = (
    *("job.submitted", "job.claimed", "job.started", "archive.published", "job.trained", "job.kept", "job.published"),
    *("archive.dropped", "job.ending", "job.ended"),
)
STEPS, SAVES = 24, 4
AT_MOST = 4  # kills of one job
WHILE_TRAINED = (1.0, 9.0)  # seconds after a job was sent, or its server started anew
PATIENCE = 240.0
FAILPOINT_SECONDS = 60.0  # a server that did not reach its failpoint by then is killed where it is
LEASE_SECONDS = 2.0


@dataclass
class Totals:
    """What all kills together showed."""

    kills: int = 0
    jobs: int = 0
    tries: int = 0
    faults: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in ("lost", "twice", "torn")})
    places: Counter[str] = field(default_factory=Counter)


def main() -> int:
    if sys.argv[1:2] == ["serve"]:  # as this script starts it, with a short lease
        return _serve(Path(sys.argv[2]), int(sys.argv[3]))
    arguments = _arguments()
    begun, totals = time.perf_counter(), Totals()
    with tempfile.TemporaryDirectory(prefix="ropewalk-jobs-") as folder:
        rounds = Rounds(Path(folder) / "data", random.Random(arguments.seed), totals)
        rounds.undisturbed()
        while totals.kills < arguments.kills and not any(totals.faults.values()):
            rounds.one(arguments.kills - totals.kills)
        rounds.asked()
    result = {
        "kills": totals.kills,
        "jobs": totals.jobs,
        **{kind: len(found) for kind, found in totals.faults.items()},
        "tries": totals.tries,
        "seconds": round(time.perf_counter() - begun, 1),
        "places": dict(sorted(totals.places.items())),
        "seed": arguments.seed,
        "machine": machine(),
    }
    print(table(["killed at", "kills"], sorted(totals.places.items())), end="\n\n")
    shown = ("kills", "jobs", "lost", "twice", "torn", "tries", "seconds")
    print(table(shown, [[result[key] for key in shown]]))
    for kind, found in totals.faults.items():
        for text in found[:10]:
            print(f"{kind}: {text}")
    write_json(arguments.json, result)
    return int(any(totals.faults.values()))


class Rounds:
    """One job after the other, each killed some times and then trained to its end."""

    def __init__(self, data: Path, rng: random.Random, totals: Totals) -> None:
        self.data, self.rng, self.totals = data, rng, totals
        self.file = ""
        self.curve: dict[int, float] = {}
        self.models: list[str] = []
        self._known: set[str] = set()
        self._turns = itertools.cycle(rng.sample(FAILPOINTS, len(FAILPOINTS)))

    def undisturbed(self) -> None:
        """What a job's losses are."""
        with self._served(None) as (_, client):
            rows = "".join(json.dumps(row) + "\n" for row in _rows())
            self.file = client.post("/v1/files", files={"file": ("rows.jsonl", rows)}).raise_for_status().json()["id"]
            id = self._create(client)
            assert id is not None
            self._known.add(id)
            self._ends(client, id)
            self.curve = self._losses(client, id)
        if sorted(self.curve) != list(range(1, STEPS + 1)):
            self.totals.faults["torn"].append(f"the undisturbed job has steps {sorted(self.curve)}")

    def one(self, most: int) -> None:
        self.totals.jobs += 1
        id: str | None = None
        for _ in range(min(most, self.rng.randint(1, AT_MOST))):
            failpoint = next(self._turns) if self.rng.random() < 0.5 else None
            if id and failpoint == "job.submitted":
                failpoint = None
            with self._served(failpoint) as (server, client):
                id = id or self._create(client)
                self._dies(server, failpoint)
        with self._served(None) as (_, client), self._watched() as seen:
            fresh = [job["id"] for job in client.get("/v1/fine_tuning/jobs").json()["data"] if job["id"] not in self._known]
            if len(fresh) > 1 or (id is not None and id not in fresh):
                self.totals.faults["lost"].append(f"{id} was acknowledged, and {fresh} is there")
            for one in fresh:
                self._known.add(one)
                self._ends(client, one)
                self._judge(client, one)
        if seen:
            self.totals.faults["twice"].append(f"{id}: trained by {max(seen)} processes at once")

    def asked(self) -> None:
        """The last model answers."""
        with self._served(None) as (_, client):
            asked = {"model": self.models[-1], "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
            late = time.monotonic() + PATIENCE
            while (answer := client.post("/v1/messages", json=asked)).status_code == 529 and time.monotonic() < late:
                time.sleep(1)
            if answer.status_code != 200:
                self.totals.faults["lost"].append(f"{self.models[-1]} does not answer: {answer.text}")

    def _create(self, client: httpx.Client) -> str | None:
        keys = {"max_steps": STEPS, "save_steps": SAVES, "sequence_len": 256, "lora_r": 4, "num_threads": 1, "bf16": False}
        body = {"model": "base", "training_file": self.file, "seed": 1, "ropewalk": keys}
        try:
            return str(client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"])
        except httpx.TransportError:
            return None  # it died; the job is there, or not

    def _dies(self, server: Server, failpoint: str | None) -> None:
        """Waits for the server's death at the failpoint, or brings it about at a random moment."""
        try:
            server.process.wait(FAILPOINT_SECONDS if failpoint else self.rng.uniform(*WHILE_TRAINED))
        except subprocess.TimeoutExpired:
            failpoint = None
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        self.totals.kills += 1
        self.totals.places[failpoint or "a random moment"] += 1

    def _ends(self, client: httpx.Client, id: str) -> None:
        late = time.monotonic() + PATIENCE
        while (job := client.get(f"/v1/fine_tuning/jobs/{id}").json())["status"] not in ("succeeded", "failed", "cancelled"):
            if time.monotonic() > late:
                break
            time.sleep(0.2)
        served = [model["id"] for model in client.get("/v1/models?limit=1000").json()["data"]]
        if job["status"] != "succeeded" or job["fine_tuned_model"] not in served:
            self.totals.faults["lost"].append(f"{id}: {job}")
        else:
            self.models.append(job["fine_tuned_model"])

    def _judge(self, client: httpx.Client, id: str) -> None:
        told = client.get(f"/v1/fine_tuning/jobs/{id}/events?limit=1000").json()["data"]
        messages = Counter(event["message"] for event in told)
        self.totals.tries += messages["The job goes on"] + 1
        again = [text for text, count in messages.items() if count > 1 and ("Step" in text or "completed" in text)]
        if again:
            self.totals.faults["twice"].append(f"{id}: {again[:3]}")
        if (curve := self._losses(client, id)) != self.curve:
            wrong = {step: (curve.get(step), loss) for step, loss in self.curve.items() if curve.get(step) != loss}
            self.totals.faults["torn"].append(f"{id}: {wrong or sorted(curve)}")

    def _losses(self, client: httpx.Client, id: str) -> dict[int, float]:
        told = client.get(f"/v1/fine_tuning/jobs/{id}/events?limit=1000").json()["data"]
        return {event["data"]["step"]: event["data"]["train_loss"] for event in told if "train_loss" in event["data"]}

    @contextmanager
    def _watched(self) -> Iterator[list[int]]:
        """How many processes train into one folder, whenever that is more than one."""
        done, seen = threading.Event(), list[int]()

        def look() -> None:
            while not done.wait(0.3):
                count = max(Counter(_trained()).values(), default=0)
                if count > 1:
                    seen.append(count)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield seen
        finally:
            done.set()
            thread.join()

    @contextmanager
    def _served(self, failpoint: str | None) -> Iterator[tuple[Server, httpx.Client]]:
        if not self.data.exists():
            asyncio.run(_with_a_key(self.data))
            _publish(self.data)
        environment = {"ROPEWALK_ROOT_KEY": ROOT_KEY, "OMP_NUM_THREADS": "1"}
        if failpoint:
            environment["ROPEWALK_FAILPOINT"] = f"{failpoint}:1"
        port = free_port()
        command = [sys.executable, str(Path(__file__).resolve()), "serve", str(self.data), str(port)]
        with running(command, self.data, environment) as (process, log), self._watched() as seen:
            try:
                wait_for(port, "/health", process, log)
            except Exception:
                if not failpoint:  # with one, what was left to do is done at the start, and the server may die so early
                    raise
            server = Server("Ropewalk", port, self.data, process, {"x-api-key": KEY})
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=server.headers, timeout=PATIENCE) as client:
                yield server, client
        if seen:
            self.totals.faults["twice"].append(f"a job was trained by {max(seen)} processes at once")


def _trained() -> list[str]:
    """The folders that processes train into, one for each process that is alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"--granted" in words and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(os.readlink(path / "cwd"))
        except OSError:
            continue
    return found


def _rows() -> list[dict[str, Any]]:
    from ropewalk.quickstart import facts

    made = facts.questions(facts.split()[0], 6)[:120]
    return [
        {"messages": [{"role": "user", "content": one.prompt}, {"role": "assistant", "content": one.answer}]} for one in made
    ]


def _publish(data: Path) -> None:
    from importlib.resources import files

    from ropewalk.registry import Registry

    Registry(data / "registry").publish_base("base", Path(str(files("ropewalk") / "quickstart" / "base")))


def _serve(data: Path, port: int) -> int:
    from ropewalk.config.serving import EngineOptions, Serving
    from ropewalk.files.settings import Settings
    from ropewalk.server.serve import serve
    from ropewalk.server.settings import ServerSettings

    serving = Serving(engine=EngineOptions(threads=1, memory_gb=0.25, disk_gb=1))
    return serve(Settings(data=data), ServerSettings(port=port, job_lease_seconds=LEASE_SECONDS, serving=serving))


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=None, metavar="N", help="default: 10, with --quick 4")
    parser.add_argument("--quick", action="store_true", help="4 kills; under three minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.kills = arguments.kills or (4 if arguments.quick else 10)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
