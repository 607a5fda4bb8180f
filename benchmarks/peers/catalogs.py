"""Servers whose catalogs hold one, ten thousand and a million files: what a metadata request costs in each."""

from __future__ import annotations

import random
import selectors
import sqlite3
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from measure import middle
from peers.file_servers import Server, ropewalk
from peers.lean_http import Connection

SIZES = (1, 10_000, 1_000_000)
CONNECTIONS = 8
ROUNDS = 5


def compare_catalogs(work: Path, *, requests: int) -> dict[str, Any]:
    """p50 and p99 of GET metadata and of a list page, one at a time; requests per second over eight connections."""
    work.mkdir()
    rng = random.Random(0)
    with ExitStack() as stack:
        servers, ids = [], []
        for size in SIZES:
            folder = work / str(size)
            with ropewalk(folder) as server:
                made = upload_one(server, work / "one.txt")
            ids.append(seed(folder / "ropewalk.db", made, size))
            servers.append(stack.enter_context(ropewalk(folder)))
        connections = [stack.enter_context(_Closing(server)).connection for server in servers]
        lists = [[f"/v1/files?limit=20&page={page}" for page in _pages(c)] or ["/v1/files?limit=20"] for c in connections]
        single = [[f"/v1/files/{id}" for id in known] for known in ids]
        latency(connections, single, 300, rng)  # warms
        metadata, good = latency(connections, single, requests, rng)
        latency(connections, lists, 30, rng)
        listing, fine = latency(connections, lists, requests // 10, rng)
        rates, all_answered = throughput(servers, single, rng)
    runs = [
        {
            "files": size,
            "p50_ms": _quantile(metadata[i], 0.5),
            "p99_ms": _quantile(metadata[i], 0.99),
            "list_p50_ms": _quantile(listing[i], 0.5),
            "list_p99_ms": _quantile(listing[i], 0.99),
            "requests_per_s": rates[i],
        }
        for i, size in enumerate(SIZES)
    ]
    return {
        "p99_ratio_1e6": runs[-1]["p99_ms"] / runs[0]["p99_ms"],
        "requests_per_s": runs[-1]["requests_per_s"],
        "requests": requests,
        "connections": CONNECTIONS,
        "answered": good and fine and all_answered,
        "runs": runs,
    }


class _Closing:
    def __init__(self, server: Server) -> None:
        self.connection = server.connect()

    def __enter__(self) -> _Closing:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def upload_one(server: Server, file: Path) -> str:
    """The row that the others are copies of."""
    file.write_text("a line of text\n")
    answer = server.upload(file)
    assert answer.status == 200, bytes(answer.body[:500])
    id: str = answer.json()["id"]
    return id


def seed(database: Path, id: str, size: int) -> list[str]:
    """Copies one file's row until the catalog holds `size`; some of the ids, drawn evenly. The copies share its content."""
    if size == 1:
        return [id]
    connection = sqlite3.connect(database)
    names = [row[1] for row in connection.execute("PRAGMA table_info(files)")]
    # One id in 2^96 collides; a microsecond apart, so that the newest page is always the same.
    made = {"id": f"'file_' || substr(lower(hex(randomblob(24))), 1, {len(id) - 5})", "created_at": "created_at - value"}
    columns = ", ".join(made.get(name, name) for name in names)
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute(
        f"WITH RECURSIVE n(value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM n WHERE value < {size - 1}) "
        f"INSERT INTO files ({', '.join(names)}) SELECT {columns} FROM n, files WHERE files.id = ?",
        (id,),
    )
    connection.execute("UPDATE blobs SET refs = ?", (size,))
    connection.execute("UPDATE usage SET used_files = ?, used_bytes = used_bytes * ?", (size, size))
    connection.commit()
    ids = [row[0] for row in connection.execute("SELECT id FROM files WHERE rowid % ? = 0", (max(1, size // 5000),))]
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return ids


def latency(
    connections: list[Connection], paths: list[list[str]], requests: int, rng: random.Random
) -> tuple[list[list[float]], bool]:
    """Milliseconds of each request; the servers take turns request by request, so that the machine's noise falls on all."""
    found: list[list[float]] = [[] for _ in connections]
    answered = True
    order = list(range(len(connections)))
    for _ in range(requests):
        rng.shuffle(order)
        for i in order:
            answer = connections[i].ask("GET", rng.choice(paths[i]))
            answered &= answer.status == 200
            found[i].append(answer.seconds * 1000)
    return found, answered


def throughput(servers: list[Server], paths: list[list[str]], rng: random.Random) -> tuple[list[float], bool]:
    """Metadata requests per second with several connections always waiting; the median of rounds in turns."""
    rates: list[list[float]] = [[] for _ in servers]
    answered = True
    for _ in range(ROUNDS):
        for i, server in enumerate(servers):
            rate, good = _rate(server, paths[i], rng, seconds=1.5)
            rates[i].append(rate)
            answered &= good
    return [round(middle(rate)) for rate in rates], answered


def _rate(server: Server, paths: list[str], rng: random.Random, seconds: float) -> tuple[float, bool]:
    connections = [server.connect() for _ in range(CONNECTIONS)]
    selector = selectors.DefaultSelector()
    done, good = 0, True
    answers: dict[Connection, bytes] = {}

    def send(connection: Connection) -> None:
        answers[connection] = b""
        connection.socket.sendall(f"GET {rng.choice(paths)} HTTP/1.1\r\n{connection.headers}\r\n".encode())

    for connection in connections:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        send(connection)
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for key, _ in selector.select():
            answers[key.data] += (got := key.data.socket.recv(1 << 16))
            if not got:
                return 0.0, False
            if answers[key.data].endswith(b"}"):  # of the JSON; no header ends so
                good &= answers[key.data].startswith(b"HTTP/1.1 200")
                done += 1
                send(key.data)
    rate = done / (time.perf_counter() - begun)
    for connection in connections:
        connection.close()
    return rate, good


def _pages(connection: Connection) -> list[str]:
    """Cursors down to twenty thousand files deep, as far as there are files."""
    found: list[str] = []
    page = ""
    for _ in range(20):
        answer = connection.ask("GET", "/v1/files?limit=1000" + (f"&page={page}" if page else ""))
        page = answer.json().get("next_page") or ""
        if not page:
            break
        found.append(page)
    return found


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * q))], 3)
