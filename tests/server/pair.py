"""Two servers of one installation, in processes and data folders of their own, behind one address that gives them turns."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2

from ropewalk.config.serving import EngineOptions, Serving
from ropewalk.files.settings import Settings
from ropewalk.server.settings import ServerSettings
from server.conftest import PATIENCE, Running, running, wait_until

EACH_ANEW = httpx.Limits(max_keepalive_connections=0)  # every request is a connection, and so the other server's turn


@dataclass
class Pair(Running):
    """Both of them: the first, whose insides are at hand, runs in a thread; the second is a process."""

    urls: tuple[str, str] = ("", "")
    second: subprocess.Popen[bytes] = field(kw_only=True)

    def only(self, number: int) -> Pair:
        """One of them."""
        return replace(self, url=self.urls[number])

    def sdk(self, key: str | None = None, **settings: Any) -> anthropic.Anthropic:
        return super().sdk(
            key, http_client=anthropic.DefaultHttpxClient(limits=httpx2.Limits(max_keepalive_connections=0)), **settings
        )

    def http(self, key: str | None = None, **headers: str) -> httpx.Client:
        found = {"x-api-key": key or self.key, **headers}
        return httpx.Client(base_url=self.url, headers=found, timeout=PATIENCE, limits=EACH_ANEW)


@contextmanager
def pair(folder: Path, database_url: str, blobs: str) -> Iterator[Pair]:
    """Two servers for as long as the block lasts."""
    settings = ServerSettings(serving=Serving(engine=EngineOptions(threads=1)), job_lease_seconds=2.0, batch_lease_seconds=2.0)
    store = Settings(data=folder / "one", database_url=database_url, blobs=blobs)
    with (
        running(folder / "one", store, settings) as first,
        _second(folder / "two", database_url, blobs) as (url, process),
        _balanced([first.url, url]) as address,
    ):
        told = {name: getattr(first, name) for name in ("key", "app", "store", "loop", "server")}
        yield Pair(url=address, data=folder, urls=(first.url, url), second=process, **told)


@contextmanager
def _second(data: Path, database_url: str, blobs: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = Path(__file__).with_name("second_server.py")
    data.mkdir()
    with (data / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(data), database_url, blobs, str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (data / "server.log").read_text()
        with suppress(httpx.TransportError):
            return httpx.get(f"{url}/ready").status_code == 200
        return False

    try:
        wait_until(answers)
        yield url, process
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def _balanced(urls: list[str]) -> Iterator[str]:
    """An address whose connections go to these in turns."""
    ports, ends = itertools.cycle(int(url.rpartition(":")[2]) for url in urls), list[threading.Thread]()

    def carry(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def connected(near: socket.socket, port: int) -> None:
        with near, suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)) as far:
            back = threading.Thread(target=carry, args=(far, near))
            back.start()
            carry(near, far)
            back.join()

    def accept() -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                near, _ = listener.accept()
                ends.append(threading.Thread(target=connected, args=(near, next(ports)), daemon=True))
                ends[-1].start()

    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        accepting = threading.Thread(target=accept, name="balancer")
        accepting.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
    for end in ends:
        end.join(10)
