"""One process of a run on a node of a Ray cluster: an actor that starts it as torchrun would, and ends with it.

    SCRATCH/run-TOKEN/run.yml, prepared/, home/, log.txt     of this process alone
    SCRATCH/run-TOKEN/run/                                   the run's folder: the leading process writes it, all read it

Whoever started the actor has to look at it now and then; when nobody does, because its machine is gone or cannot be reached, the actor
ends its process and itself. A folder that an actor left when it was killed is removed by the next one on that node.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO

from ropewalk.jobs.child import child_environment

ALONE_SECONDS = 90.0  # for which nobody has looked
PIECE = 16 << 20  # of a file that is carried from machine to machine
Mark = tuple[int, int, int]  # how far the log was read; the file of events, and how far it was


@dataclass(frozen=True)
class Place:
    """Where a worker is.  worker -> driver"""

    node: str
    address: str
    port: int  # that is free there
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Errand:
    """What a worker is to run.  driver -> worker"""

    arguments: tuple[str, ...]  # of Python
    granted: bytes = field(repr=False)  # for the process's standard input, which stays open
    environment: Mapping[str, str]  # its place among the others
    config: str  # what run.yml holds; '': the process works in `folder`, which all nodes see
    folder: str


@dataclass(frozen=True)
class Seen:
    """How far it is.  worker -> driver"""

    code: int | None  # its exit code, once it has ended and all that it has said is told
    said: bytes  # since the last look
    events: bytes  # of the run; from the beginning, where `anew`
    anew: bool
    mark: Mark  # to be given back at the next look
    record: bytes
    checkpoints: tuple[str, ...]  # that are whole


class Worker:
    """The actor."""

    def __init__(self, scratch: str = "") -> None:
        self._folder, self._lock = _fresh(Path(scratch or tempfile.gettempdir()) / f"ropewalk-workers-{os.getuid()}")
        self._run, self._log = self._folder / "run", self._folder / "log.txt"
        self._run.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self._heard, self._closed = time.monotonic(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def place(self) -> Place:
        """Where it is, and what is installed there."""
        import ray

        self._hear()
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        found = {name: version(name) for name in ("ropewalk", "torch", "transformers")}
        return Place(platform.node(), ray.util.get_node_ip_address(), port, {"python": platform.python_version(), **found})

    def put(self, path: str, start: int, piece: bytes) -> None:
        """A piece of a file of the run's folder."""
        self._hear()
        target = self._run / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.write(piece)

    def get(self, path: str, start: int) -> bytes:
        """The same the other way; nothing where the file ends."""
        self._hear()
        return _read(self._run / path, start, PIECE)

    def files(self, folder: str) -> list[tuple[str, int]]:
        """What lies in the run's folder below `folder`, or `folder` itself, if it is a file."""
        self._hear()
        top = self._run / folder
        found = [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.is_file())
        return [(str(path.relative_to(self._run)), path.stat().st_size) for path in found]

    def begin(self, errand: Errand) -> None:
        """Starts the process."""
        self._hear()
        # The training needs no way into the cluster.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
        folder = errand.folder
        if errand.config:
            environment, folder = child_environment(environment, self._folder / "home"), str(self._folder)
            (self._folder / "run.yml").write_text(errand.config, encoding="utf-8")
        with self._log.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, *errand.arguments],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                cwd=folder,
                env={**environment, **errand.environment},
                start_new_session=True,
            )
        assert self._process.stdin is not None
        self._process.stdin.write(
            errand.granted
        )  # and left open: when it ends, by the end of this actor too, so does the process
        self._process.stdin.flush()

    def look(self, mark: Mark) -> Seen:
        """What has happened since a mark; (0, 0, 0) is that of the beginning."""
        self._hear()
        assert self._process is not None, "begun before it is looked at"
        said_to, file, events_to = mark
        code = self._process.poll()  # before the rest is read, so that nothing is left unread
        said = _read(self._log, said_to, PIECE)
        events, anew, record = b"", False, b""
        try:
            with (self._run / "events.jsonl").open("rb") as found:
                now = os.fstat(found.fileno()).st_ino
                anew = now != file
                found.seek(0 if anew else events_to)
                events = found.read(PIECE)
                file, events_to = now, found.tell()
            record = (self._run / "run.json").read_bytes()
        except FileNotFoundError:  # not yet, or of a worker that does not lead
            pass
        done = code if max(len(said), len(events)) < PIECE else None  # else there is more to read
        checkpoints = tuple(sorted(path.name for path in (self._run / "checkpoints").glob("step-*") if path.is_dir()))
        return Seen(done, said, events, anew, (said_to + len(said), file, events_to), record, checkpoints)

    def stop(self) -> None:
        """Has the process finish its step and write a checkpoint."""
        self._hear()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Ends the process, and leaves nothing."""
        self._closed.set()
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def _hear(self) -> None:
        self._heard = time.monotonic()

    def _watch(self) -> None:
        while time.monotonic() < self._heard + ALONE_SECONDS:
            if self._closed.wait(1):
                return
        self.close()
        os._exit(1)


def _fresh(scratch: Path) -> tuple[Path, IO[str]]:
    """A new folder below `scratch`, held by a lock as long as this process lives; those that nobody holds any more are removed."""
    scratch.mkdir(mode=0o700, exist_ok=True)
    if scratch.stat().st_uid != os.getuid():
        raise PermissionError(f"{scratch} belongs to somebody else")
    for path in scratch.glob("run-*"):
        if _is_free(path / ".lock"):
            shutil.rmtree(path, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="new-", dir=scratch))  # looked at by nobody until it is locked
    lock = (folder / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder.rename(scratch / f"run-{folder.name[4:]}"), lock


def _is_free(path: Path) -> bool:
    try:
        with path.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True


def _read(path: Path, start: int, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)
    except FileNotFoundError:
        return b""
