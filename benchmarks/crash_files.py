"""Kills a process that uploads, deletes and expires files, again and again, and checks the store after each kill.

    python benchmarks/crash_files.py [--kills N] [--backend local|postgres-s3] [--quick] [--json FILE] [--seed S]

A worker process does mixed work on a store through its public interface (uploads, in one request and in several, some given up;
deletions; expiry; what is derived from files; sweeps); after each call has returned it writes an
acknowledgement into a pipe. It dies by SIGKILL: two times of three at an injected point (the failpoints of the store, each at its
first to third pass), else at a random moment. Now and then a second worker shares the store and dies with it, or the sweep that
follows is killed as well. A new process then opens the store, sweeps, and compares:

    lost           a file that was acknowledged and is not there whole; bytes that a row refers to and that are gone or cut short
    ghosts         a file that is visible, or can be read, although its upload was not acknowledged, or its deletion was, or its hour has passed
    quota_errors   a counter of bytes or files, of an organization, workspace, key or user, that differs from the sum over the rows
    orphans        bytes without a row, published or staged; a wrong count of references

An operation that was in flight when the process died has one of two outcomes, wholly there or wholly absent, and the check
accepts either and holds the store to it from then on: the commit may have happened and the answer been lost (`late` counts
those). Where the worker did one thing at a time and died at a failpoint, the outcome is known, and only that one is accepted.
Exits 1 when anything is lost, visible that should not be, miscounted or left over.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crash_check import Report, check, sweep_once, verify_chains
from crash_work import Begun, Known, Share, emitter, prepare, work
from forks import fork, forked, reap
from measure import machine, table, write_json
from ropewalk.files import buckets
from sites import BACKENDS, Site, sites

PIECE = 400_000  # of a blob in a bucket, so that many blobs are several objects, and some are killed half copied
ABSENT = (  # an upload killed there is not there
    "upload.reserved",
    "blob.synced",
    "blob.copied",
    "blob.renamed",
    "upload.staged",
    "upload.published",
)
COMMITTED = ("upload.committed",)
DELETED = ("delete.committed", "delete.erased")
FAILPOINTS = (*ABSENT, *COMMITTED, *DELETED, "expire.committed", "resumable.published", "resumable.committed")
PATIENCE = {"local": 1.5, "postgres-s3": 3.0}  # seconds until a worker that did not reach its failpoint is killed where it is


@dataclass
class Totals:
    """What all kills together showed."""

    kills: int = 0
    late: int = 0
    acknowledged: int = 0
    faults: dict[str, list[str]] = field(default_factory=lambda: {k: [] for k in ("lost", "ghosts", "quota_errors", "orphans")})
    places: Counter[str] = field(default_factory=Counter)

    def add(self, report: Report) -> None:
        self.late += len(report.late)
        for kind, found in self.faults.items():
            found += getattr(report, kind)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=None, metavar="N", help="default: 1000, with --quick 100")
    parser.add_argument("--backend", choices=BACKENDS, default="local", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="100 kills")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--seed", type=int, default=0, help="of the work and the moments (default: %(default)s)")
    arguments = parser.parse_args()
    wanted = arguments.kills or (100 if arguments.quick else 1000)
    begun = time.perf_counter()
    with sites(arguments.backend) as new_site:
        buckets.PIECE = PIECE
        place = new_site()
        place = replace(place, callers=tuple(forked(prepare, place)))
        gc.freeze()  # what every forked process shares is not to be copied by its garbage collector
        totals = torture(place, wanted, random.Random(arguments.seed))
        entries = forked(verify_chains, place)
    result = summary(totals, arguments.backend, arguments.seed, entries, time.perf_counter() - begun)
    print(table(["killed at", "kills"], sorted(totals.places.items())), end="\n\n")
    shown = ("kills", "lost", "ghosts", "quota_errors", "orphans", "late", "acknowledged", "seconds")
    print(table(["backend", *shown], [[arguments.backend, *(result[key] for key in shown)]]))
    for kind, found in totals.faults.items():
        for text in found[:20]:
            print(f"{kind}: {text}")
    write_json(arguments.json, result)
    return int(any(totals.faults.values()))


def torture(place: Site, wanted: int, rng: random.Random) -> Totals:
    """Kill, check, kill again; the store and what is known of it go on from one to the next."""
    totals = Totals()
    live: dict[str, Known] = {}
    dead: list[str] = []
    begun: dict[str, Begun] = {}
    turns = itertools.cycle(name for name in FAILPOINTS if place.blobs or name != "blob.copied")
    while totals.kills < wanted and not any(totals.faults.values()):
        # Now and then two processes share the store, each with half of the files in its hands, and die together.
        together = 1 if rng.random() < 0.7 or wanted - totals.kills < 2 else 2
        callers = [(id, known.caller) for id, known in live.items()]
        shares = [Share(dict(callers[n::together]), list(begun.values())[n::together]) for n in range(together)]
        at_once = rng.choice([1, 4])
        failpoint = next(turns) if rng.random() < 2 / 3 else None
        first, *second = [Worker(place, rng, share, None if n else failpoint, at_once) for n, share in enumerate(shares)]
        died = [first.dies(), *(worker.killed() for worker in second)]
        for one in died:
            totals.kills += 1
            totals.places[one.at] += 1
            totals.acknowledged += remember(one.events, live, dead, begun)
            totals.faults["lost"] += [event["lost"] for event in one.events if "lost" in event]
        if rng.random() < 0.15 and totals.kills < wanted and kill_sweeper(place, rng):
            totals.kills += 1
            totals.places["sweep.erased, or within a sweep"] += 1
        flying = [event for one in died for event in in_flight(one.events)]
        report = forked(check, place, live, dead, begun, flying)
        if at_once == 1 and not second:
            demand(report, died[0].at, flying)
        totals.add(report)
        for file in report.late:
            live[file["id"]] = Known(**file)
        begun = {upload.id: upload for upload in report.begun}
        for id in report.deleted:
            del live[id]
            dead.append(id)
        if totals.kills % 50 < len(died):
            print(f"{totals.kills} kills, {len(live)} files", end="\r" if sys.stdout.isatty() else "\n", flush=True)
    return totals


def remember(events: list[dict[str, Any]], live: dict[str, Known], dead: list[str], begun: dict[str, Begun]) -> int:
    """Notes what was acknowledged, and returns how many operations were."""
    starts = {event["begin"]: event for event in events if "begin" in event}
    ended = [event for event in events if "end" in event]
    for event in ended:
        start = starts[event["end"]]
        operation = start["operation"]
        if event["result"] != "ok":
            continue
        if operation in ("upload", "finish"):
            live[event["id"]] = Known(**start["file"] | {"id": event["id"], "expires_at": event["expires_at"]})
        if operation == "create":
            begun[event["id"]] = Begun(event["id"], Known(**start["file"]), start["seed"])
        elif operation == "append":
            begun[start["id"]].received = event["received"]
        elif operation == "finish":
            del begun[start["id"]]
        elif operation == "delete":
            del live[start["id"]]
            dead.append(start["id"])
    return len(ended)


def in_flight(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What had begun and was not acknowledged."""
    ended = {event["end"] for event in events if "end" in event}
    return [event for event in events if "begin" in event and event["begin"] not in ended]


def demand(report: Report, died_at: str, flying: list[dict[str, Any]]) -> None:
    """Where one thing was done at a time, the failpoint says what must have become of it."""
    for event in flying:
        if event["operation"] in ("upload", "finish"):
            if died_at in ABSENT and report.late:
                report.ghosts.append(f"{event['file']['name']} is visible; its upload died at {died_at}, before its commit")
            if died_at in COMMITTED and not report.late:
                report.lost.append(f"{event['file']['name']} is absent; its upload died at {died_at}, after its commit")
        if event["operation"] == "delete" and died_at in DELETED and not report.deleted:
            report.ghosts.append(f"{event['id']} is visible; its deletion died at {died_at}, after its commit")


# -- processes


@dataclass(frozen=True)
class Died:
    """A worker's end: at a failpoint, or at a random moment; and what it had said until then."""

    at: str
    events: list[dict[str, Any]]


class Worker:
    """A process at work on the store, from its birth to its SIGKILL."""

    def __init__(self, place: Site, rng: random.Random, share: Share, failpoint: str | None, at_once: int) -> None:
        self.rng, self.failpoint = rng, failpoint
        self.patience = PATIENCE["postgres-s3" if place.blobs else "local"]
        seed, wanted = rng.getrandbits(60), f"{failpoint}:{rng.choice([1, 1, 2, 3])}"
        leaning = failpoint.partition(".")[0] if failpoint else ""
        self.handle, theirs = os.pipe()

        def run() -> None:
            if failpoint:
                os.environ["ROPEWALK_FAILPOINT"] = wanted
            asyncio.run(work(place, emitter(theirs), seed, share, at_once, leaning))

        self.child = fork(run)
        os.close(theirs)
        self.told = bytearray()

    def dies(self) -> Died:
        """Waits for its death at the failpoint, or brings it about at a random moment."""
        # One random life in four is measured from its birth, so that the moments of opening the store are met as well.
        if self.failpoint or self.rng.random() > 0.25:
            self.told += os.read(self.handle, 1 << 16)
        until = time.monotonic() + (self.patience if self.failpoint else self.rng.choice([0.1, 0.3, 0.6]) * self.rng.random())
        while (left := until - time.monotonic()) > 0 and select.select([self.handle], [], [], left)[0]:
            piece = os.read(self.handle, 1 << 16)
            if not piece:
                return self._end(self.failpoint or "")
            self.told += piece
        return self.killed()

    def killed(self) -> Died:
        """Kills it now."""
        os.kill(self.child, signal.SIGKILL)
        while piece := os.read(self.handle, 1 << 16):
            self.told += piece
        return self._end("a random moment")

    def _end(self, at: str) -> Died:
        os.close(self.handle)
        reap(self.child, killed=True)
        return Died(at, [json.loads(line) for line in self.told.splitlines()])


def kill_sweeper(place: Site, rng: random.Random) -> bool:
    """Starts a sweep that is to die at its work; whether it did."""

    def run() -> None:
        os.environ["ROPEWALK_FAILPOINT"] = f"sweep.erased:{rng.choice([1, 1, 2])}"
        asyncio.run(sweep_once(place))

    return reap(fork(run), killed=None)


def summary(totals: Totals, backend: str, seed: int, entries: int, seconds: float) -> dict[str, Any]:
    return {
        "kills": totals.kills,
        **{kind: len(found) for kind, found in totals.faults.items()},
        "late": totals.late,
        "acknowledged": totals.acknowledged,
        "audit_entries": entries,
        "backend": backend,
        "seed": seed,
        "seconds": round(seconds, 1),
        "places": dict(sorted(totals.places.items())),
        "faults": {kind: found[:20] for kind, found in totals.faults.items() if found},
        "machine": machine(),
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that folders and servers are removed on the way out
    sys.exit(main())
