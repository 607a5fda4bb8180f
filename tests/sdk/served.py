"""A real `ropewalk serve` in a folder of its own, with the seeder beside it; both end when the block ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Served:
    """Where the server and the seeder answer, and who they are."""

    url: str
    seeder_url: str
    data: Path
    process_id: int
    log: Path


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Served]:
    """Starts both in this folder. Nothing of the user's own state is read or written."""
    folder.mkdir(parents=True, exist_ok=True)
    data, port = folder / "data", _free_port()
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "ROPEWALK_HOME": str(data),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "ropewalk", "serve", "--port", str(port), "--data", str(data), *options]
    with (folder / "server.log").open("wb") as log, (folder / "seeder.log").open("wb") as seeder_log:
        server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(f"{url}/ready", server, folder / "server.log")
            with socket.create_server(("127.0.0.1", 0)) as listening:
                seeder_url = f"http://127.0.0.1:{listening.getsockname()[1]}"
                seeder = subprocess.Popen(
                    [sys.executable, str(HERE / "seeder.py"), str(data), url],
                    env=environment,
                    stdin=listening,
                    stdout=seeder_log,
                    stderr=subprocess.STDOUT,
                )
            try:
                yield Served(url, seeder_url, data, server.pid, folder / "server.log")
            finally:
                _end(seeder)
        finally:
            _end(server)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the server did not answer at {url}; it said:\n{log.read_text(encoding='utf-8', errors='replace')}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
