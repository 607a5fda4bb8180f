"""An HTTP client that costs next to nothing, so that what is timed is the server: one socket, bytes out by sendfile, bytes in by recv_into.

It knows what the benchmark's servers send and no more: HTTP/1.1, a content-length or chunks.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOUNDARY = "ropewalkbenchmark7d1e"
BUFFER = 1 << 20


@dataclass(frozen=True)
class Answer:
    """What came back; `seconds` from the first byte sent to the last byte received."""

    status: int
    headers: dict[str, str]
    body: memoryview
    seconds: float

    def json(self) -> Any:
        return json.loads(bytes(self.body))


class Connection:
    """One kept connection."""

    def __init__(self, port: int, headers: Mapping[str, str] | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=300)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.headers = "".join(f"{name}: {value}\r\n" for name, value in {"host": "localhost", **(headers or {})}.items())
        self.small = bytearray(BUFFER)

    def ask(self, method: str, path: str, body: bytes = b"", into: bytearray | None = None, **more: str) -> Answer:
        """One request; its body lands in `into` where given, over and over if that is smaller, as what nobody keeps does."""
        head = self._head(method, path, len(body), more)
        begun = time.perf_counter()
        self.socket.sendall(head + body)
        return self._answer(begun, into)

    def upload(self, path: str, file: Path, fields: Mapping[str, str] | None = None) -> Answer:
        """One file as multipart/form-data, straight from the page cache."""
        parts = "".join(
            f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in (fields or {}).items()
        )
        before = (
            f'{parts}--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="{file.name}"\r\n'
            "content-type: application/octet-stream\r\n\r\n"
        ).encode()
        after = f"\r\n--{BOUNDARY}--\r\n".encode()
        size = file.stat().st_size
        kind = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
        head = self._head("POST", path, len(before) + size + len(after), kind)
        with file.open("rb") as source:
            begun = time.perf_counter()
            try:
                self.socket.sendall(head + before)
                self.socket.sendfile(source)
                self.socket.sendall(after)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before the end: the answer is still there to read
            return self._answer(begun, None)

    def close(self) -> None:
        self.socket.close()

    def _head(self, method: str, path: str, length: int, more: Mapping[str, str]) -> bytes:
        rest = "".join(f"{name}: {value}\r\n" for name, value in more.items())
        return f"{method} {path} HTTP/1.1\r\n{self.headers}{rest}content-length: {length}\r\n\r\n".encode()

    def _answer(self, begun: float, into: bytearray | None) -> Answer:
        view = memoryview(self.small)
        have = 0
        while (end := self.small.find(b"\r\n\r\n", 0, have)) < 0:
            have += self._receive(view[have:])
        lines = bytes(view[:end]).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        rest = bytes(view[end + 4 : have])
        if headers.get("transfer-encoding") == "chunked":
            body = memoryview(self._chunks(rest))
        else:
            length = int(headers.get("content-length", 0))
            target = memoryview(into if into is not None else bytearray(length))[:length]
            target[: len(rest)] = rest[: len(target)]
            at = len(rest)
            while at < length:
                place = at % len(target)
                at += self._receive(target[place : place + length - at])
            body = target
        return Answer(int(lines[0].split()[1]), headers, body, time.perf_counter() - begun)

    def _receive(self, into: memoryview) -> int:
        if got := self.socket.recv_into(into, min(len(into), BUFFER)):
            return got
        raise ConnectionError("the server closed the connection before its answer was whole")

    def _chunks(self, data: bytes) -> bytes:
        buffer = bytearray(data)
        out = bytearray()
        at = 0
        while True:
            while (end := buffer.find(b"\r\n", at)) < 0:
                buffer += self.socket.recv(BUFFER)
            length = int(buffer[at:end].split(b";")[0], 16)
            while len(buffer) < end + 4 + length:
                buffer += self.socket.recv(BUFFER)
            if not length:
                return bytes(out)
            out += buffer[end + 2 : end + 2 + length]
            at = end + 4 + length


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def wait_for(port: int, path: str, process: Any, log: Path, seconds: float = 90) -> None:
    """Until the server answers 200 there."""
    late = time.monotonic() + seconds
    while time.monotonic() < late and process.poll() is None:
        try:
            connection = Connection(port)
            answer = connection.ask("GET", path)
            connection.close()
            if answer.status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"the server did not answer {path}:\n{log.read_text(errors='replace')[-2000:]}" + os.linesep)
