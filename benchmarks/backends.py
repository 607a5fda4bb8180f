"""A PostgreSQL, an S3 and a Ray cluster of our own on free ports of the loopback, gone with the process that asked for them.

Used by the tests and the benchmarks of what keeps its state there:

    with postgres() as server, s3() as bucket:
        server.new_database(), bucket.new_url(), bucket.environment

    with ray(cpus=2) as cluster:
        cluster.address

Each runs below a small Python process that ends it when its standard input closes, so that nothing is left behind even by a
SIGKILL. PostgreSQL comes from the wheel `pgserver` or from the system's package; it runs without fsync, since none of our tests
pulls the plug on it.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKET = "ropewalk"
RAY_TRIES = 3  # a node of Ray waits a quarter of a minute for its helpers, and gives up where the machine is too busy for them
NOBODY = 65534  # PostgreSQL refuses to run as root


@dataclass(frozen=True)
class Postgres:
    """A running server and where its programs lie."""

    port: int
    binaries: Path

    def new_database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{secrets.token_hex(6)}"
        command = [self.binaries / "createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", name]
        subprocess.run(command, check=True, env=_environment(self.binaries))
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self.port}/{name}"


@dataclass(frozen=True)
class Bucket:
    """A running server with one bucket."""

    endpoint: str

    def new_url(self) -> str:
        """A prefix of its own in the bucket."""
        return f"s3://{BUCKET}/{secrets.token_hex(6)}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to reach it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@dataclass(frozen=True)
class Ray:
    """A cluster of one node."""

    address: str
    scratch: Path  # where its workers keep what they work on


def postgres_binaries() -> Path | None:
    """Where PostgreSQL's programs lie: in the wheel, else in the newest package of the system."""
    wheel = importlib.util.find_spec("pgserver")
    inside = [Path(folder) / "pginstall" / "bin" for folder in (wheel.submodule_search_locations or [])] if wheel else []
    system = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    return next((folder for folder in inside + system if (folder / "initdb").exists()), None)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL for as long as the block runs."""
    with _served("postgres") as told:
        port, binaries = told.split(" ", 1)
        yield Postgres(int(port), Path(binaries))


@contextmanager
def s3() -> Iterator[Bucket]:
    """An S3 for as long as the block runs."""
    with _served("s3") as endpoint:
        yield Bucket(endpoint)


@contextmanager
def ray(cpus: int = 2, environment: dict[str, str] | None = None) -> Iterator[Ray]:
    """A Ray cluster for as long as the block runs; its workers see `environment` too."""
    with _served("ray", str(cpus), **(environment or {})) as told:
        address, scratch = told.split(" ", 1)
        yield Ray(address, Path(scratch))


@contextmanager
def _served(what: str, *more: str, **environment: str) -> Iterator[str]:
    command = [sys.executable, __file__, what, *more]
    keeper = subprocess.Popen(command, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        told = keeper.stdout.readline().strip()
        if not told:
            raise RuntimeError(f"no {what}: its keeper ended with code {keeper.wait()}")
        yield told
    finally:
        keeper.stdin.close()
        keeper.wait()
        keeper.stdout.close()


def _keep_s3() -> None:
    import logging

    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint, **keys).create_bucket(Bucket=BUCKET)
    print(endpoint, flush=True)
    sys.stdin.read()
    os._exit(0)  # its threads wait for open connections otherwise


def _keep_postgres() -> None:
    found = postgres_binaries()
    if found is None:
        raise SystemExit("no PostgreSQL: pip install pgserver, or apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="ropewalk-postgres-", ignore_cleanup_errors=True) as folder:
        user = NOBODY if os.getuid() == 0 else None
        data, binaries = Path(folder) / "data", _reachable(found, Path(folder), user)
        data.mkdir(mode=0o700)
        if user is not None:
            os.chmod(folder, 0o711)
            os.chown(data, user, user)
        as_user = {"user": user, "group": user, "extra_groups": [] if user is not None else None, "cwd": data}
        create = [
            binaries / "initdb",
            "-D",
            data,
            "-U",
            "postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-sync",
            "--no-locale",
        ]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL, env=_environment(binaries), **as_user)
        port = _free_port()
        serve = [binaries / "postgres", "-D", data, "-p", str(port), "-k", data, "-h", "127.0.0.1"]
        options = ["-c", "fsync=off", "-c", "max_connections=300", "-c", "log_min_messages=fatal"]
        server = subprocess.Popen([*serve, *options], env=_environment(binaries), **as_user)
        try:
            _wait_for(server, port, binaries)
            print(port, binaries, flush=True)
            sys.stdin.read()
        finally:
            server.terminate()  # SIGTERM waits for clients; SIGINT, after it, does not
            server.send_signal(signal.SIGINT)
            server.wait()


def _keep_ray() -> None:
    # A short path: it is the beginning of those of sockets, which may have a hundred characters.
    with tempfile.TemporaryDirectory(prefix="rw-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        os.environ |= {"TMPDIR": str(scratch), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        os.environ |= {"RAY_prestart_worker_first_driver": "0"}  # no worker before it is asked for
        for _ in range(RAY_TRIES - 1):
            with suppress(Exception):
                node = _ray_node(folder)
                break
        else:
            node = _ray_node(folder)
        try:
            print(node.gcs_address, scratch, flush=True)
            sys.stdin.read()
        finally:
            node.kill_all_processes(check_alive=False, allow_graceful=True)


def _ray_node(folder: str) -> Any:
    """What `ray start --head` starts, less what only people look at."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    # Ports that are given need not be waited for: on a busy machine the node's helpers take longer to tell theirs than it waits.
    ports = {f"{name}_port": _free_port() for name in ("metrics_agent", "metrics_export", "runtime_env_agent")}
    size = {"num_cpus": int(sys.argv[2]), "num_gpus": 0, "object_store_memory": 100_000_000}
    quiet = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    return Node(
        RayParams(temp_dir=folder, gcs_server_port=_free_port(), **size, **quiet, **ports), head=True, spawn_reaper=False
    )


def _reachable(binaries: Path, folder: Path, user: int | None) -> Path:
    """The programs themselves, or a copy where their user may not go (an environment below /root)."""
    if user is None or all(parent.stat().st_mode & 0o001 for parent in binaries.parents):
        return binaries
    wheel = binaries.parents[1]
    shutil.copytree(wheel, folder / wheel.name)
    libraries = wheel.with_name(f"{wheel.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, folder / libraries.name)
    return folder / wheel.name / "pginstall" / "bin"


def _environment(binaries: Path) -> dict[str, str]:
    """The wheel's programs find their libraries beside them; a client's own settings must not reach ours."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PG")} | {"LC_ALL": "C"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(server: subprocess.Popen[bytes], port: int, binaries: Path) -> None:
    """Until it takes connections: it listens a moment before that."""
    until = time.monotonic() + 60
    asks = [binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres"]
    while time.monotonic() < until and server.poll() is None:
        if subprocess.run(asks, env=_environment(binaries)).returncode == 0:
            return
        time.sleep(0.02)
    raise SystemExit(f"PostgreSQL did not answer on port {port}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that folders are removed on the way out
    {"s3": _keep_s3, "postgres": _keep_postgres, "ray": _keep_ray}[sys.argv[1]]()
