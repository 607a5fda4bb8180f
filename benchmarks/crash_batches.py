"""Kills a server that takes in and answers batches, again and again, and checks that every request has one result, and one only.

    python benchmarks/crash_batches.py [--kills N] [--quick] [--json FILE] [--seed S]

The server dies by SIGKILL: two times of three at an injected point (before and after each commit), else at a random moment; twice for
each batch at most, since a request that its process has not survived three times is given up. Then it is started anew and the batch has
to end. The model is another server's (one of this script's), which notes how often it is asked.

    lost      requests of an ended batch without a result, or with another than succeeded
    twice     requests with more than one result, whose result changed, or that were asked again after their result was written down
    partial   batches whose creation was cut off, and that are there in part
    stuck     batches that do not end

Exits 1 when any of them is not 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from measure import machine, table, write_json
from peers.file_servers import Server, ropewalk

FAILPOINTS = ("batch.begun", "batch.portion", "batch.complete", "batch.claimed", "batch.answering", "batch.answered")
WHILE_CREATED = FAILPOINTS[:3]
REQUESTS = 30  # of a batch
AT_MOST = 2  # kills of one batch
ANSWER_SECONDS = 0.1
PATIENCE = 90.0
FAILPOINT_SECONDS = 5.0  # a server that did not reach its failpoint by then is killed where it is
QUESTION = re.compile(r"question [0-9]+-[0-9]+")


@dataclass
class Totals:
    """What all kills together showed."""

    kills: int = 0
    batches: int = 0
    results: int = 0
    faults: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in ("lost", "twice", "partial", "stuck")})
    places: Counter[str] = field(default_factory=Counter)


def main() -> int:
    arguments = _arguments()
    begun, totals = time.perf_counter(), Totals()
    with tempfile.TemporaryDirectory(prefix="ropewalk-batches-") as folder, Model() as model:
        models = Path(folder) / "models.yml"
        models.write_text(f"models:\n  counted: {{remote: openai, url: 'http://127.0.0.1:{model.port}'}}\n")
        rounds = Rounds(Path(folder) / "data", models, model, random.Random(arguments.seed), totals)
        while totals.kills < arguments.kills and not any(totals.faults.values()):
            rounds.one()
    result = {
        "kills": totals.kills,
        "batches": totals.batches,
        "results": totals.results,
        **{kind: len(found) for kind, found in totals.faults.items()},
        "asked": sum(model.asked.values()),
        "seconds": round(time.perf_counter() - begun, 1),
        "places": dict(sorted(totals.places.items())),
        "seed": arguments.seed,
        "machine": machine(),
    }
    print(table(["killed at", "kills"], sorted(totals.places.items())), end="\n\n")
    shown = ("kills", "batches", "results", "lost", "twice", "partial", "stuck", "asked", "seconds")
    print(table(shown, [[result[key] for key in shown]]))
    for kind, found in totals.faults.items():
        for text in found[:10]:
            print(f"{kind}: {text}")
    write_json(arguments.json, result)
    return int(any(totals.faults.values()))


class Rounds:
    """One batch after the other, each killed once or twice and then answered to its end."""

    def __init__(self, data: Path, models: Path, model: Model, rng: random.Random, totals: Totals) -> None:
        self.data, self.models, self.model, self.rng, self.totals = data, models, model, rng, totals
        self._turns = itertools.cycle(FAILPOINTS)
        self._known: set[str] = set()  # ids of batches that were seen

    def one(self) -> None:
        number, ids = self.totals.batches, list[str]()
        self.totals.batches += 1
        for kill in range(self.rng.randint(1, AT_MOST)):
            failpoint = next(self._turns) if self.rng.random() < 2 / 3 else None
            if kill and failpoint in WHILE_CREATED:
                failpoint = "batch.answered"
            before = self._written()
            with self._served(failpoint) as (server, client):
                if not kill:  # asked for once: what was cut off may be there too, and asked again there would be two
                    ids = self._create(client, number)
                self._dies(server, failpoint)
            self._unchanged(before)
        answered = {
            id: self.model.asked[f"question {number}-{id[1:]}"] for batch, id in self._written() if batch not in self._known
        }
        before = self._written()
        with self._served(None) as (_, client):
            found = [batch["id"] for batch in client.get("/v1/messages/batches?limit=1000").json()["data"]]
            fresh = [id for id in found if id not in self._known]
            self._known |= set(fresh)
            if len(fresh) > 1 or set(ids) - set(fresh):
                self.totals.faults["lost"].append(f"of batch {number}, {ids} was acknowledged, and {fresh} is there")
            for id in fresh:
                self._ends(client, id)
        self._unchanged(before)
        for id, times in answered.items():
            if self.model.asked[f"question {number}-{id[1:]}"] != times:
                self.totals.faults["twice"].append(f"{id} of batch {number} was asked again after it was answered")

    def _create(self, client: httpx.Client, number: int) -> list[str]:
        params = {"model": "counted", "max_tokens": 9}
        asked = [
            {"custom_id": f"q{n}", "params": {**params, "messages": [{"role": "user", "content": f"question {number}-{n}"}]}}
            for n in range(REQUESTS)
        ]
        try:
            return [client.post("/v1/messages/batches", json={"requests": asked}).raise_for_status().json()["id"]]
        except httpx.TransportError:
            return []  # it died; the batch is there as a whole, or not at all

    def _dies(self, server: Server, failpoint: str | None) -> None:
        """Waits for the server's death at the failpoint, or brings it about at a random moment."""
        try:
            server.process.wait(FAILPOINT_SECONDS if failpoint else self.rng.random() * 0.8)
        except subprocess.TimeoutExpired:
            failpoint = None
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        self.totals.kills += 1
        self.totals.places[failpoint or "a random moment"] += 1

    def _ends(self, client: httpx.Client, id: str) -> None:
        late = time.monotonic() + PATIENCE
        while (batch := client.get(f"/v1/messages/batches/{id}").json())["processing_status"] != "ended":
            if time.monotonic() > late:
                self.totals.faults["stuck"].append(f"{id}: {batch}")
                return
            time.sleep(0.1)
        lines = [json.loads(line) for line in client.get(f"/v1/messages/batches/{id}/results").text.splitlines()]
        found = Counter(line["custom_id"] for line in lines)
        self.totals.results += len(lines)
        counted = sum(batch["request_counts"].values())
        if counted != REQUESTS or len(found) != REQUESTS:
            self.totals.faults["partial"].append(f"{id}: {counted} requests are counted, {len(found)} have results")
        self.totals.faults["twice"] += [f"{id}: {name} has {count} results" for name, count in found.items() if count > 1]
        self.totals.faults["lost"] += [f"{id}: {line}" for line in lines if line["result"]["type"] != "succeeded"]

    def _written(self) -> dict[tuple[str, str], bytes]:
        """Results as they lie in the database, by batch and custom id."""
        if not (self.data / "ropewalk.db").exists():
            return {}
        with sqlite3.connect(self.data / "ropewalk.db") as rows:
            query = "SELECT batch_id, custom_id, result FROM batch_items WHERE outcome IS NOT NULL"
            return {(batch, id): result for batch, id, result in rows.execute(query)}

    def _unchanged(self, before: dict[tuple[str, str], bytes]) -> None:
        after = self._written()
        for key, result in before.items():
            if after.get(key) != result:
                self.totals.faults["twice"].append(f"the result of {key} is not what it was")

    @contextmanager
    def _served(self, failpoint: str | None) -> Iterator[tuple[Server, httpx.Client]]:
        variables = {"ROPEWALK_FAILPOINT": f"{failpoint}:{self.rng.choice([1, 1, 2, 5])}"} if failpoint else {}
        if failpoint in WHILE_CREATED:
            variables = {"ROPEWALK_FAILPOINT": f"{failpoint}:1"}
        with ropewalk(self.data, "--models", str(self.models), **variables) as server:
            url = f"http://127.0.0.1:{server.port}"
            with httpx.Client(base_url=url, headers=server.headers, timeout=PATIENCE) as client:
                yield server, client


class Model:
    """Another server's model, which says OK and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["content-length"])).decode()
                found = QUESTION.search(text)
                assert found is not None, text
                with model._lock:
                    model.asked[found[0]] += 1
                time.sleep(ANSWER_SECONDS)
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                choices = ({"delta": {"content": "OK"}}, {"delta": {}, "finish_reason": "stop"})
                told = [json.dumps({"choices": [{"index": 0, **choice}]}) for choice in choices]
                with suppress(ConnectionError):  # whoever asked is dead
                    self.wfile.write("".join(f"data: {event}\n\n" for event in (*told, "[DONE]")).encode())

            def log_message(self, format: str, *arguments: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]

    def __enter__(self) -> Model:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=None, metavar="N", help="default: 60, with --quick 8")
    parser.add_argument("--quick", action="store_true", help="8 kills; under three minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.kills = arguments.kills or (8 if arguments.quick else 60)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
