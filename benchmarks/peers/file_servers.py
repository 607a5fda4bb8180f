"""File servers to compare: each starts in a process of its own, with a folder of its own, and is spoken to through one `Server`."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import descendants
from peers.environments import OGX
from peers.lean_http import Answer, Connection, free_port, wait_for

ROOT_KEY = "cm9wZXdhbGsgYmVuY2htYXJrIHJvb3Qga2V5IDAwMDE="  # of throw-away data
KEY = "rope-benchmark-key-0123456789abcdef0123456789abcdef"

OGX_CONFIG = """\
version: 2
distro_name: files
apis: [files]
providers:
  files:
  - provider_id: files
    provider_type: inline::localfs
    config:
      storage_dir: {folder}/files
      metadata_store: {{table_name: files_metadata, backend: sql_default}}
storage:
  backends:
    kv_default: {{type: kv_sqlite, db_path: {folder}/kv.db}}
    sql_default: {{type: sql_sqlite, db_path: {folder}/sql.db}}
  stores:
    metadata: {{namespace: registry, backend: kv_default}}
server: {{port: {port}, host: 127.0.0.1}}
"""


@dataclass
class Server:
    """A server that runs, and how to speak to it."""

    name: str
    port: int
    folder: Path
    process: subprocess.Popen[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)  # beside the file in an upload

    def connect(self) -> Connection:
        return Connection(self.port, self.headers)

    def upload(self, file: Path) -> Answer:
        connection = self.connect()
        try:
            return connection.upload("/v1/files", file, self.fields)
        finally:
            connection.close()

    def download(self, id: str, into: bytearray | None = None, **headers: str) -> Answer:
        connection = self.connect()
        try:
            return connection.ask("GET", f"/v1/files/{id}/content", into=into, **headers)
        finally:
            connection.close()

    def delete(self, id: str) -> Answer:
        connection = self.connect()
        try:
            return connection.ask("DELETE", f"/v1/files/{id}")
        finally:
            connection.close()

    def idle_memory(self) -> int:
        """Resident bytes of the server and its children; its high-water mark starts anew."""
        pids = descendants(self.process.pid)
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        return sum(_status(pid, "VmRSS") for pid in pids)

    def peak_memory(self) -> int:
        """The most that has been resident since `idle_memory`."""
        return sum(_status(pid, "VmHWM") for pid in descendants(self.process.pid))


@contextmanager
def ropewalk(folder: Path, *options: str, **variables: str) -> Iterator[Server]:
    """`ropewalk serve` as anybody starts it: SQLite and a folder, encryption on; only the rate limit is lifted."""
    port = free_port()
    environment = {"ROPEWALK_ROOT_KEY": ROOT_KEY, **variables}
    if not folder.exists():
        asyncio.run(_with_a_key(folder))
    command = [sys.executable, "-m", "ropewalk", "serve", "--port", str(port), "--data", str(folder), *options]
    with running(command, folder, environment) as (process, log):
        wait_for(port, "/health", process, log)
        yield Server("Ropewalk", port, folder, process, {"x-api-key": KEY, "anthropic-version": "2023-06-01"})


async def _with_a_key(folder: Path) -> None:
    """A new store whose key we know, in a workspace whose rate limit is no obstacle."""
    from ropewalk.database import Database
    from ropewalk.files.settings import Settings
    from ropewalk.tenants.keys import create_key
    from ropewalk.tenants.workspaces import change_workspace, ensure_default
    from ropewalk.vault import Vault

    vault = Vault(base64.b64decode(ROOT_KEY))
    database = await Database.open(Settings(data=folder).database)
    workspace = await ensure_default(database, vault)
    await change_workspace(database, workspace.id, {"requests_per_minute": 1_000_000})
    await create_key(database, vault, workspace.id, "benchmark", secret=KEY)
    await database.close()


@contextmanager
def ogx(folder: Path, *, install: bool) -> Iterator[Server]:
    """OGX (once Llama Stack) with its files API alone, on the local disk."""
    version = OGX.ensure(install=install)["ogx"]
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(OGX_CONFIG.format(folder=folder, port=port))
    with running([OGX.program("ogx"), "run", str(config), "--insecure"], folder, OGX.variables) as (process, log):
        wait_for(port, "/v1/health", process, log)
        yield Server(f"OGX {version}", port, folder, process, fields={"purpose": "assistants"})


@contextmanager
def running(command: list[str], folder: Path, environment: Mapping[str, str]) -> Iterator[tuple[Any, Path]]:
    """A process in a session of its own, and its log; ended with all that it started."""
    log = folder.with_suffix(".log")
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | dict(environment), start_new_session=True
        )
    try:
        yield process, log
    finally:
        with suppress(ProcessLookupError):  # it was killed
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/status has no {name}")
