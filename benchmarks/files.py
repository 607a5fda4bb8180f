"""The file store over loopback: bytes per second beside the bare disk and a peer, memory, and metadata in large catalogs.

    python benchmarks/files.py [--quick] [--json FILE] [--dir FOLDER]

Uploads are compared with `dd conv=fsync` of the same file to the same disk followed by its SHA-256; downloads with `dd` of that file
to /dev/null followed by its SHA-256; page caches are warm for both, contenders take turns, medians of five rounds (--quick: three).
The SHA-256 is OpenSSL's, the fastest here; the share of coreutils' `sha256sum`, which a person would type, is printed beside it. The
server is `ropewalk serve` with SQLite, a folder, and encryption on; every upload is of new content, so that nothing is answered
from what is there already. Clients throw a timed download away, as dd does; another one just before is compared, and warms the cache.
Exits 1 when bytes come back changed, or fewer than all requests are answered; never because of a speed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import machine, middle, table, write_json
from peers.catalogs import compare_catalogs
from peers.environments import FOLDER, NotInstalled
from peers.file_manners import manners
from peers.file_servers import KEY, Server, ogx, ropewalk

MB = 1_000_000
SIZE = 400 * MB
PEER_SIZE = 100 * MB  # OGX takes no file above 100 MiB
LARGEST = 500 * MB
ROUNDS, QUICK_ROUNDS = 5, 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three rounds, fewer requests, no installation of the peer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--dir", type=Path, default=FOLDER, help="a folder on the disk to measure (default: %(default)s)")
    arguments = parser.parse_args()
    at_start = machine("starlette", "uvicorn", "cryptography", "anthropic")
    arguments.dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="files-", dir=arguments.dir))
    try:
        result = measure(work, quick=arguments.quick)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = {"benchmark": "files", "quick": arguments.quick, "machine": at_start, **result}
    show(result)
    write_json(arguments.json, result)
    return 0 if result["correct"] else 1


def measure(work: Path, *, quick: bool) -> dict[str, Any]:
    """Everything, one server at a time but for the peer's, which sleeps while ours works."""
    source, rounds = Source(work / "source.bin"), QUICK_ROUNDS if quick else ROUNDS
    with ropewalk(work / "ours") as ours:
        memory = memory_of(ours, source.of(LARGEST))
        large = throughput(work, source.of(SIZE), [Contender(ours.name, ours), Sdk(ours)], rounds)
        peer: dict[str, Any] = {}
        try:
            with ogx(work / "peer", install=not quick) as other:
                small = source.of(PEER_SIZE)
                peer = {
                    "name": other.name,
                    "throughput": throughput(work, small, [Contender(ours.name, ours), Contender(other.name, other)], rounds),
                    "memory": {server.name: memory_of(server, small) for server in (ours, other)},
                    "manners": manners([ours, other], work),
                }
        except NotInstalled as reason:
            peer = {"name": "OGX", "missing": str(reason)}
    catalogs = compare_catalogs(work / "catalogs", requests=2_000 if quick else 6_000)
    bare, raw = large["runs"]["dd + sha256"], large["runs"][ours.name]
    return {
        "upload_share": raw["up"] / bare["up"],
        "download_share": raw["down"] / bare["down"],
        "server_rss_growth_mb_500mb": memory["upload_mb"],
        "p99_ratio_1e6": catalogs["p99_ratio_1e6"],
        "requests_per_s": catalogs["requests_per_s"],
        "correct": large["equal"] and peer.get("throughput", large)["equal"] and catalogs["answered"] and memory["equal"],
        "throughput": large,
        "memory": memory,
        "catalogs": catalogs,
        "peer": peer,
    }


class Source:
    """A file of random bytes whose beginning is new every time, so that no store has seen it before."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, size: int) -> Path:
        with self.path.open("wb") as file:
            for at in range(0, size, 16 * MB):
                file.write(os.urandom(min(16 * MB, size - at)))
        return self.path


def renew(path: Path) -> str:
    """New content; its digest. What was written before is on the disk, so that nobody pays for another's bytes."""
    with path.open("r+b") as file:
        file.write(os.urandom(64))
    os.sync()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Bare:
    """What the disk and the hash cost without a server, one after the other as in a shell."""

    name = "dd + sha256"

    def __init__(self, target: Path, digest: Callable[[Path], None], name: str = name) -> None:
        self.target, self.digest, self.name = target, digest, name

    def up(self, source: Path) -> float:
        self.target.unlink(missing_ok=True)
        return self._copy(source, self.target, "conv=fsync")

    def down(self, expected: str, into: bytearray) -> tuple[float, bool]:
        return self._copy(self.target, Path(os.devnull)), True

    def _copy(self, source: Path, target: Path, *more: str) -> float:
        begun = time.perf_counter()
        subprocess.run(["dd", f"if={source}", f"of={target}", "bs=1M", "status=none", *more], check=True)
        self.digest(source)
        return time.perf_counter() - begun


class Contender:
    """A server and the lean client: what is timed is the server, from the first byte sent to the last one received."""

    def __init__(self, name: str, server: Server) -> None:
        self.name, self.server, self.id, self.nowhere = name, server, "", bytearray(MB)

    def up(self, source: Path) -> float:
        if self.id:
            assert self.server.delete(self.id).status == 200
        answer = self.server.upload(source)
        assert answer.status == 200, bytes(answer.body[:500])
        self.id = answer.json()["id"]
        return answer.seconds

    def down(self, expected: str, into: bytearray) -> tuple[float, bool]:
        whole = self.server.download(self.id, into)  # to compare; the one that is timed is thrown away, as dd throws away
        answer = self.server.download(self.id, self.nowhere)
        good = whole.status == answer.status == 200 and hashlib.sha256(whole.body).hexdigest() == expected
        return answer.seconds, good


class Sdk(Contender):
    """The same server through the official Python SDK: a file by its path, and its content streamed."""

    def __init__(self, server: Server) -> None:
        from anthropic import Anthropic

        super().__init__("Ropewalk, by the SDK", server)
        self.client = Anthropic(api_key=KEY, base_url=f"http://127.0.0.1:{server.port}")

    def up(self, source: Path) -> float:
        if self.id:
            self.client.files.delete(self.id)
        begun = time.perf_counter()
        self.id = self.client.files.upload(file=source).id
        return time.perf_counter() - begun

    def down(self, expected: str, into: bytearray) -> tuple[float, bool]:
        digest = hashlib.sha256()
        with self.client.files.with_streaming_response.download(self.id) as answer:
            for chunk in answer.iter_bytes():
                digest.update(chunk)
        begun = time.perf_counter()
        with self.client.files.with_streaming_response.download(self.id) as answer:
            for _ in answer.iter_bytes():
                pass
        return time.perf_counter() - begun, digest.hexdigest() == expected


def throughput(work: Path, source: Path, servers: list[Contender], rounds: int) -> dict[str, Any]:
    """MB/s of everybody, in turns, whose order changes from round to round."""
    size = source.stat().st_size
    into = bytearray(size)
    contenders = [
        Bare(work / "dd.bin", digest_openssl),
        Bare(work / "dd.bin", digest_coreutils, "dd + sha256sum"),
        *servers,
    ]
    ups: dict[str, list[float]] = {c.name: [] for c in contenders}
    downs: dict[str, list[float]] = {c.name: [] for c in contenders}
    equal = True
    for turn in range(-1, rounds):  # the first one warms caches and counts for nobody
        for contender in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
            expected = renew(source)
            up = size / MB / contender.up(source)
            os.sync()
            seconds, same = contender.down(expected, into)
            equal &= same
            if turn >= 0:
                ups[contender.name].append(round(up, 1))
                downs[contender.name].append(round(size / MB / seconds, 1))
    runs = {n: {"up": middle(ups[n]), "down": middle(downs[n]), "ups": ups[n], "downs": downs[n]} for n in ups}
    return {"size": size, "rounds": rounds, "equal": equal, "runs": runs}


def digest_openssl(path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def digest_coreutils(path: Path) -> None:
    subprocess.run(["sha256sum", str(path)], check=True, stdout=subprocess.DEVNULL)


def memory_of(server: Server, source: Path) -> dict[str, Any]:
    """How far resident memory rises above idle, for one upload and then one download; all processes of the server."""
    expected = renew(source)
    idle = server.idle_memory()
    answer = server.upload(source)
    assert answer.status == 200, bytes(answer.body[:500])
    upload = server.peak_memory() - idle
    server.idle_memory()  # the mark of the highest starts anew
    content = server.download(answer.json()["id"])
    equal = hashlib.sha256(content.body).hexdigest() == expected
    download = server.peak_memory() - idle
    server.delete(answer.json()["id"])
    return {
        "size": source.stat().st_size,
        "idle_mb": round(idle / MB, 1),
        "upload_mb": round(upload / MB, 1),
        "download_mb": round(download / MB, 1),
        "equal": equal,
    }


def show(result: dict[str, Any]) -> None:
    """The tables."""
    for part in (result["throughput"], result["peer"].get("throughput")):
        if part:
            bare = part["runs"]["dd + sha256"]
            head = (f"{part['size'] // MB} MB", "up MB/s", "down MB/s", "share up", "share down")
            print(
                table(
                    head,
                    [[n, r["up"], r["down"], r["up"] / bare["up"], r["down"] / bare["down"]] for n, r in part["runs"].items()],
                )
            )
            print()
    memory = [("Ropewalk", result["memory"]), *result["peer"].get("memory", {}).items()]
    rows = [[n, m["size"] // MB, m["idle_mb"], m["upload_mb"], m["download_mb"]] for n, m in memory]
    print(table(("memory", "file MB", "idle MB", "more for an upload", "for a download"), rows), end="\n\n")
    catalogs = result["catalogs"]["runs"]
    rows = [[c["files"], c["p50_ms"], c["p99_ms"], c["list_p99_ms"], c["requests_per_s"]] for c in catalogs]
    print(table(("files in the catalog", "p50 ms", "p99 ms", "list page p99 ms", "requests/s"), rows), end="\n\n")
    if observed := result["peer"].get("manners"):
        names = list(observed)
        print(
            table(("observed", *names), [[what, *(observed[n][what] for n in names)] for what in observed[names[0]]]),
            end="\n\n",
        )
    elif missing := result["peer"].get("missing"):
        print(f"the peer took no part: {missing}\n")
    for name in ("upload_share", "download_share", "server_rss_growth_mb_500mb", "p99_ratio_1e6", "requests_per_s"):
        print(f"{name} {result[name]:.3g}")
    print("all bytes equal" if result["correct"] else "BYTES DIFFER")


if __name__ == "__main__":
    sys.exit(main())
