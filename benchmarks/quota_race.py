"""200 uploads at once at the edge of a quota: never above it, and nothing that was acknowledged is lost.

    python benchmarks/quota_race.py [--quick] [--json FILE] [--seed S]

Each race fills a store from nothing, with room for about a third of what is offered: once under a limit of bytes (uploads of any
size), once under a limit of files. The uploads run in one process, or in four that share one SQLite, or one PostgreSQL and S3.

    over    how often what was used and reserved was above the limit, watched all the while and summed over the rows at the end
    lost    acknowledged files that are not there whole, and uploads refused although there was room for them to the end

An upload of known size reserves exactly that and nothing is given back during a race, so one that would still fit at the end was
refused wrongly. Exits 1 unless both are 0.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from forks import Answer, forked
from measure import machine, table, write_json
from ropewalk.errors import QuotaExceeded
from ropewalk.files import tables
from ropewalk.files.store import Store
from ropewalk.tenants import quotas
from ropewalk.tenants.caller import Caller
from sites import BACKENDS, Site, sites

UPLOADS = 200
PROCESSES = (1, 4)
LEASE = 60.0


@dataclass(frozen=True)
class Limit:
    """The limit of a race."""

    bytes: int | None
    files: int | None


@dataclass(frozen=True)
class Racer:
    """What one process did."""

    acknowledged: list[tuple[str, bytes]]  # id, the bytes
    refused: list[int]  # sizes
    over: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="60 uploads instead of 200")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--backend", choices=BACKENDS, help="only there (default: both)")
    parser.add_argument("--seed", type=int, default=0, help="of the sizes (default: %(default)s)")
    arguments = parser.parse_args()
    uploads = 60 if arguments.quick else UPLOADS
    rng = random.Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    for backend in [arguments.backend] if arguments.backend else BACKENDS:
        with sites(backend) as new_site:
            for processes, what in itertools.product(PROCESSES, ("bytes", "files")):
                sizes = [rng.randrange(50_000) for _ in range(uploads)]
                limit = Limit(sum(sizes) // 3, None) if what == "bytes" else Limit(None, uploads // 3)
                row = {"backend": backend, "processes": processes, "limit": what}
                rows.append({**row, **race(new_site(), processes, sizes, limit)})
    shown = ("backend", "processes", "limit", "uploads", "acknowledged", "refused", "filled", "over", "lost", "seconds")
    print(table(shown, [[row[key] for key in shown] for row in rows]))
    over, lost = (sum(row[key] for row in rows) for key in ("over", "lost"))
    write_json(arguments.json, {"over": over, "lost": lost, "races": rows, "seed": arguments.seed, "machine": machine()})
    return int(bool(over or lost))


def race(place: Site, processes: int, sizes: list[int], limit: Limit) -> dict[str, Any]:
    """One race in a place of its own."""
    place = replace(place, callers=(forked(prepare, place, limit),))
    gc.freeze()
    start, go = os.pipe()
    begun = time.perf_counter()
    answers = [Answer(run, place, sizes[n::processes], limit, start) for n in range(processes)]
    os.write(go, bytes(processes))
    racers = [answer.wait() for answer in answers]
    seconds = time.perf_counter() - begun
    os.close(start)
    os.close(go)
    return {**forked(judge, place, limit, racers), "uploads": len(sizes), "seconds": round(seconds, 2)}


async def prepare(place: Site, limit: Limit) -> Caller:
    """A new store whose default workspace has the limit."""
    store = await Store.open(place.settings(LEASE))
    caller = replace(await store.local_caller(), key_id="key_a")
    async with store.database.writing() as connection:
        await quotas.set_limit(connection, "workspace", caller.workspace_id, limit.bytes, limit.files)
    await store.close()
    return caller


async def run(place: Site, sizes: list[int], limit: Limit, start: int) -> Racer:
    """All uploads of one process at once, when the start is given."""
    store = await Store.open(place.settings(LEASE))
    acknowledged: list[tuple[str, bytes]] = []
    refused: list[int] = []
    os.read(start, 1)

    async def upload(size: int) -> None:
        data = os.urandom(size)
        try:
            file = await store.put(place.callers[0], data, "x.bin")
        except QuotaExceeded:
            refused.append(size)
        else:
            acknowledged.append((file.id, data))

    watcher = asyncio.create_task(watch(store, place.callers[0], limit))
    await asyncio.gather(*(upload(size) for size in sizes))
    watcher.cancel()
    over = sum(await asyncio.gather(watcher))
    await store.close()
    return Racer(acknowledged, refused, over)


async def watch(store: Store, caller: Caller, limit: Limit) -> int:
    """How often more than the limit was taken, until cancelled."""
    over = 0
    try:
        while True:
            async with store.database.reading() as connection:
                over += is_over(await quotas.usage(connection, "workspace", caller.workspace_id), limit)
            await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        return over


def is_over(usage: quotas.Usage, limit: Limit) -> bool:
    used, files = usage.used_bytes + usage.reserved_bytes, usage.used_files + usage.reserved_files
    return (limit.bytes is not None and used > limit.bytes) or (limit.files is not None and files > limit.files)


async def judge(place: Site, limit: Limit, racers: list[Racer]) -> dict[str, Any]:
    """What the rows and the bytes say when all is over."""
    store = await Store.open(place.settings(LEASE))
    caller = place.callers[0]
    acknowledged = [found for racer in racers for found in racer.acknowledged]
    refused = [size for racer in racers for size in racer.refused]
    lost = 0
    for id, data in acknowledged:
        lost += await (await store.open_content(caller, id)).read() != data
    async with store.database.reading() as connection:
        used, files = (await connection.execute(select(func.sum(tables.files.c.size), func.count()))).one()
        usage = await quotas.usage(connection, "workspace", caller.workspace_id)
    await store.close()
    exact = (usage.used_bytes, usage.used_files, usage.reserved_bytes, usage.reserved_files) == (int(used), files, 0, 0)
    over = sum(racer.over for racer in racers) + is_over(quotas.Usage(int(used), 0, files), limit)
    lost += len(acknowledged) != files  # each acknowledged one has a row, and no row is of anything else
    lost += not exact
    if limit.bytes is not None:
        lost += sum(used + size <= limit.bytes for size in refused)
    if limit.files is not None:
        lost += limit.files - files if refused else 0
    filled = used / limit.bytes if limit.bytes is not None else files / (limit.files or 1)
    told = {"acknowledged": len(acknowledged), "refused": len(refused), "filled": round(float(filled), 4)}
    return {**told, "over": int(over), "lost": int(lost)}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that folders and servers are removed on the way out
    sys.exit(main())
