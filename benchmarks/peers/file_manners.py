"""What file servers do with the same five requests, observed from outside: on the wire, in their folder, in their system calls."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from peers.file_servers import KEY, Server

CANARY = b"canary-" + b"7Qd1x9" * 40
MB = 1_000_000


def manners(servers: list[Server], work: Path) -> dict[str, dict[str, str]]:
    """For each server, what was seen; words, since they go into a table."""
    return {server.name: observe(server, work / "manners.bin") for server in servers}


def observe(server: Server, file: Path) -> dict[str, str]:
    return {
        "upload by the official SDK (anthropic), unnamed bytes": sdk_upload(server),
        "a file of 400 MB": large(server, file),
        "fsync calls in an upload": syncs(server, file),
        "SHA-256 told": digest_told(server, file),
        "the same 5 MB twice take": twice(server, file),
        "content readable on the disk": readable(server, file),
        "range of a download": ranged(server, file),
        "a byte changed on the disk": damaged(server, file),
    }


def sdk_upload(server: Server) -> str:
    from anthropic import Anthropic, APIStatusError

    client = Anthropic(api_key=KEY, base_url=f"http://127.0.0.1:{server.port}", max_retries=0)
    try:
        server.delete(client.files.upload(file=b"a few bytes").id)
    except APIStatusError as error:
        return f"refused ({error.status_code})"
    return "works"


def large(server: Server, file: Path) -> str:
    with file.open("wb") as out:
        out.truncate(400 * MB)
    answer = server.upload(file)
    if answer.status != 200:
        return f"refused ({answer.status})"
    server.delete(answer.json()["id"])
    return "stored"


def syncs(server: Server, file: Path) -> str:
    """The calls between the request and its answer, of files and of folders alike."""
    if not shutil.which("strace"):
        return "not observed (no strace)"
    _write(file, os.urandom(MB))
    trace = file.with_suffix(".strace")
    tracer = subprocess.Popen(
        ["strace", "-f", "-o", str(trace), "-e", "trace=fsync,fdatasync", "-p", str(server.process.pid)],
        stderr=subprocess.PIPE,
    )
    assert tracer.stderr is not None
    first = tracer.stderr.readline()
    if b"attached" not in first:
        tracer.wait()
        return "not observed (no permission to trace)"
    time.sleep(0.3)  # every thread attached
    answer = server.upload(file)
    tracer.send_signal(signal.SIGINT)
    tracer.wait()
    server.delete(answer.json()["id"])
    return str(len(re.findall(r"(?:fsync|fdatasync)\(", trace.read_text())))


def digest_told(server: Server, file: Path) -> str:
    _write(file, CANARY)
    id = server.upload(file).json()["id"]
    digest = hashlib.sha256(CANARY).hexdigest().encode()
    connection = server.connect()
    told = [
        name
        for name, path in (("metadata", f"/v1/files/{id}"), ("details", f"/v1/files/{id}/details"))
        if digest in bytes(connection.ask("GET", path).body)
    ]
    connection.close()
    server.delete(id)
    return f"in {told[0]}" if told else "no"


def twice(server: Server, file: Path) -> str:
    _write(file, os.urandom(5 * MB))
    before = _size(server.folder)
    ids = [server.upload(file).json()["id"] for _ in range(2)]
    grown = _size(server.folder) - before
    for id in ids:
        server.delete(id)
    return f"{grown / MB:.0f} MB"


def readable(server: Server, file: Path) -> str:
    _write(file, CANARY)
    id = server.upload(file).json()["id"]
    found = any(CANARY in path.read_bytes() for path in _files(server.folder))
    server.delete(id)
    return "yes" if found else "no"


def ranged(server: Server, file: Path) -> str:
    _write(file, CANARY)
    id = server.upload(file).json()["id"]
    answer = server.download(id, range="bytes=2-5")
    server.delete(id)
    return "206" if answer.status == 206 and bytes(answer.body) == CANARY[2:6] else f"ignored ({answer.status})"


def damaged(server: Server, file: Path) -> str:
    content = os.urandom(3 * MB)
    _write(file, content)
    before = set(_files(server.folder))
    id = server.upload(file).json()["id"]
    stored = max(set(_files(server.folder)) - before, key=lambda path: path.stat().st_size)
    with stored.open("r+b") as out:
        out.seek(100)
        byte = out.read(1)
        out.seek(100)
        out.write(bytes([byte[0] ^ 1]))
    try:
        answer = server.download(id)
        told = bytes(answer.body) == content if answer.status == 200 else None
        seen = {None: f"refused ({answer.status})", True: "served right", False: "served wrong, 200"}[told]
    except ConnectionError:
        seen = "cut off"
    server.delete(id)
    return seen


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder) if ".db" not in path.name)
