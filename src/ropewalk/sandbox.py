"""Call a function of ours in a fresh, confined process, so that what it is given cannot harm the process that asks.

    result = call("package.module:function", (1, "two"), seconds=10, memory_bytes=512 << 20)
    result = await call_async("package.module:function", data=chunks)

Each call has a process of its own, which ends with it. `data`, whatever its size, reaches the function as its first argument, as bytes;
other arguments are pickled. What comes back is bytes or JSON, since a pickle from a process that was taken over would take over this one.
docs/documents.md says what the confinement holds against and what not; confinement.py is how.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import pickle
import select
import signal
import site
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ropewalk import errors, sandbox_child
from ropewalk.errors import BadInput, Overloaded, RopewalkError, SandboxFailed

SECONDS = 60.0
MEMORY_BYTES = 1 << 30
RESULT_BYTES = 16 << 20
AT_ONCE = max(2, min(8, os.cpu_count() or 1))  # children of asynchronous calls; each may use a core and its memory
WAITING = 64  # calls that may wait for a child before the next is refused
MESSAGE_CHARACTERS = 1000  # of a child's error message that are passed on

# What interpreters, their libraries and the readers open while they run, beside the packages themselves.
SYSTEM_FILES = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/etc/localtime", "/dev/null"),
    *("/dev/urandom", "/usr/share/zoneinfo", "/usr/share/fonts", "/usr/local/share/fonts", "/etc/mime.types"),
)


def call(
    function: str,
    arguments: Sequence[Any] = (),
    *,
    data: bytes | None = None,
    seconds: float = SECONDS,
    cpu_seconds: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    result_bytes: int = RESULT_BYTES,
    task: str | None = None,
) -> Any:
    """What 'module:function' returns, from a confined process; its BadInput errors are raised here, its other ends are SandboxFailed.

    `seconds` go by the clock, `cpu_seconds` (as many, if not given) by what it used of a processor, whatever else the machine does.
    `task` is what the messages of errors call it.
    """
    with _memory_file("data") if data is not None else contextlib.nullcontext(-1) as file:
        if data is not None:
            _write(file, data)
            _seal(file)
        return _Child(function, arguments, file, seconds, cpu_seconds, memory_bytes, result_bytes, task or function).run()


async def call_async(
    function: str,
    arguments: Sequence[Any] = (),
    *,
    data: bytes | AsyncIterable[bytes] | None = None,
    seconds: float = SECONDS,
    cpu_seconds: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    result_bytes: int = RESULT_BYTES,
    task: str | None = None,
) -> Any:
    """As `call`, at most AT_ONCE at once; data may come in pieces, which are taken only once it is this call's turn."""
    async with _turn():
        with _memory_file("data") if data is not None else contextlib.nullcontext(-1) as file:
            if data is not None:
                async for piece in _pieces(data):
                    _write(file, piece)
                _seal(file)
            child = _Child(function, arguments, file, seconds, cpu_seconds, memory_bytes, result_bytes, task or function)
            running = asyncio.ensure_future(asyncio.to_thread(child.run))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                child.stop()
                with contextlib.suppress(Exception):
                    await running
                raise


def containment() -> dict[str, bool]:
    """Which means of confinement are in place on this system: 'seccomp' always is, 'landlock' and 'network namespace' may not be."""
    found = call("containment")
    assert isinstance(found, dict)
    return found


class _Child:
    """One process, one call."""

    def __init__(
        self,
        function: str,
        arguments: Sequence[Any],
        data: int,
        seconds: float,
        cpu_seconds: int | None,
        memory_bytes: int,
        result_bytes: int,
        task: str,
    ) -> None:
        self.function, self.arguments, self.data = function, tuple(arguments), data
        self.seconds, self.cpu_seconds = seconds, cpu_seconds or max(1, round(seconds + 0.5))
        self.memory_bytes, self.result_bytes, self.task = memory_bytes, result_bytes, task
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self.lock = threading.Lock()

    def run(self) -> Any:
        """Start, wait, read; the process is gone when this returns."""
        end = time.monotonic() + self.seconds
        reading, writing = os.pipe()
        with tempfile.TemporaryDirectory(prefix="ropewalk-") as folder, open(reading, "rb", buffering=0) as answers:
            try:
                with _memory_file("request") as request:
                    _write(request, pickle.dumps(self._request()))
                    self._start(request, writing, folder)
            finally:
                os.close(writing)
            try:
                return self._understand(self._read(answers.fileno(), end), end)
            finally:
                self.stop()

    def stop(self) -> None:
        """Kill the process, now or as soon as it starts."""
        with self.lock:
            self.stopped = True
            if self.process is not None:
                self.process.kill()
                self.process.wait()

    def _request(self) -> dict[str, Any]:
        limits = {"cpu_seconds": self.cpu_seconds, "memory_bytes": self.memory_bytes, **_visible()}
        said = {"function": self.function, "arguments": pickle.dumps(self.arguments), "limits": limits}
        return {**said, "path": _import_path(), "parent": os.getpid()}

    def _start(self, request: int, writing: int, folder: str) -> None:
        words = [
            sys.executable,
            "-I",
            "-S",
            "-B",
            "-X",
            "utf8",
            sandbox_child.__file__,
            str(request),
            str(writing),
            str(self.data),
        ]
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        environment = {**kept, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        inherited = tuple(file for file in (request, writing, self.data) if file >= 0)
        with self.lock:
            if self.stopped:
                raise SandboxFailed(f"{self.task} was stopped before it began", "killed")
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd=folder,
                pass_fds=inherited,
                start_new_session=True,
            )

    def _read(self, pipe: int, end: float) -> bytes:
        """All that the process sends, until it closes the pipe."""
        poll = select.poll()
        poll.register(pipe, select.POLLIN | select.POLLHUP)
        received = bytearray()
        while True:
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                raise self._out_of_time()
            piece = os.read(pipe, 1 << 20)
            if not piece:
                return bytes(received)
            received += piece
            if len(received) > self.result_bytes + sandbox_child.HEADER:
                raise SandboxFailed(f"{self.task} returned more than {self.result_bytes:,} bytes", "result")

    def _understand(self, sent: bytes, end: float) -> Any:
        """The value that was sent, or the error that it, or the way the process ended, stands for."""
        begun, kind, payload = sent[:1], sent[1:2], sent[sandbox_child.HEADER :]
        if len(sent) < sandbox_child.HEADER or struct.unpack(">Q", sent[2 : sandbox_child.HEADER])[0] != len(payload):
            raise self._end_without_answer(bool(begun), end)
        if kind == sandbox_child.BYTES:
            return payload
        if kind == sandbox_child.MEMORY:
            raise self._out_of_memory()
        if kind == sandbox_child.UNCONFINED:
            raise RopewalkError(f"this system cannot confine a process ({_text(payload)}), so nothing is run in one")
        if kind == sandbox_child.BROKEN:
            raise RuntimeError(f"{self.function} cannot be called in a sandbox: {_text(payload)}")
        try:
            value = json.loads(payload)
            if kind == sandbox_child.RESULT:
                return value
            raise _error(self.task, kind, value)
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise SandboxFailed(f"{self.task} sent an answer that cannot be read", "crash") from error

    def _end_without_answer(self, begun: bool, end: float) -> RopewalkError:
        assert self.process is not None
        try:
            code = self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return self._out_of_time()
        if self.stopped or code == -signal.SIGKILL:
            return SandboxFailed(f"{self.task} was killed from outside, most likely for memory; try again", "killed")
        if code == -signal.SIGXCPU:
            return SandboxFailed(f"{self.task} needed more than {self.cpu_seconds} seconds of a processor", "cpu")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not begun:  # nothing that was given to the function has been looked at
            return RopewalkError(f"a confined process could not start ({how}): {sys.executable} must find its standard library")
        return SandboxFailed(f"{self.task} crashed ({how})", "crash")

    def _out_of_time(self) -> SandboxFailed:
        return SandboxFailed(f"{self.task} took longer than {self.seconds:g} seconds", "time")

    def _out_of_memory(self) -> SandboxFailed:
        return SandboxFailed(f"{self.task} needed more than {self.memory_bytes >> 20:,} MiB of memory", "memory")


def _error(task: str, kind: bytes, said: dict[str, Any]) -> Exception:
    """An error by the name of its class, which must be one of ours for users: the child's word is not to be trusted with more."""
    message = str(said["message"])[:MESSAGE_CHARACTERS]
    if kind == sandbox_child.ERROR:
        made = getattr(errors, str(said["class"]), None)
        if isinstance(made, type) and issubclass(made, BadInput):
            error = made.__new__(made)
            Exception.__init__(error, message)
            error.__dict__.update({key: said[key] for key in ("error_code", "details") if key in said})
            return error
    return SandboxFailed(f"{task} failed: {str(said['class'])[:100]}: {message}", "failure")


def _text(payload: bytes) -> str:
    return payload[:MESSAGE_CHARACTERS].decode(errors="replace")


@contextlib.contextmanager
def _memory_file(name: str) -> Iterator[int]:
    """A file without a name or a place on disk, so that plain content never touches one; the process inherits it."""
    if sys.platform != "linux":
        raise RopewalkError(
            f"a process can be confined on Linux only, and this is {sys.platform}: run the server in a container"
        )
    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        yield file
    finally:
        os.close(file)


def _write(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _seal(file: int) -> None:
    """From here on nobody can change it."""
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)


async def _pieces(data: bytes | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(data, bytes):
        yield data
    else:
        async for piece in data:
            yield piece


@functools.cache
def _import_path() -> list[str]:
    """Where packages are installed, and where ours lies; not the current folder, nor others that happen to be on the path."""
    installed = {*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    names = [path for path in sys.path if path in installed or path.endswith(("site-packages", "dist-packages"))]
    return [str(_package().parent), *names]


@functools.cache
def _visible() -> dict[str, list[str]]:
    """The folders and files that a confined process may open, and the folder whose names it may list."""
    standard = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), str(Path(sys.base_prefix) / "lib")]
    return {
        "readable": [*_import_path()[1:], str(_package()), *standard, *SYSTEM_FILES],
        "listable": [str(_package().parent)],
    }


def _package() -> Path:
    return Path(sandbox_child.__file__).parent


class _Turns:
    """Who may run and who waits, in one event loop."""

    def __init__(self) -> None:
        self.free = asyncio.Semaphore(AT_ONCE)
        self.waiting = 0


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns] = WeakKeyDictionary()


@contextlib.asynccontextmanager
async def _turn() -> AsyncIterator[None]:
    turns = _turns.setdefault(asyncio.get_running_loop(), _Turns())
    if turns.waiting >= WAITING:
        raise Overloaded(f"{WAITING} calls wait for a sandboxed process already; try again in a moment")
    turns.waiting += 1
    try:
        await turns.free.acquire()
    finally:
        turns.waiting -= 1
    try:
        yield
    finally:
        turns.free.release()
