"""Whose turn it is on a GPU: the engines of all server processes share it, and a job has it alone.

wanted.lock   held by the job that waits for the device, or has it
device.lock   shared by the servers whose engines may be loaded; held alone by a job, and by its child too

The kernel keeps these locks, so that after a crash nobody has a turn who is dead. Where there is no GPU, nobody waits for a turn.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from ropewalk.folders import make_folder

LOOK_SECONDS = 0.5

log = logging.getLogger("ropewalk.jobs")


class Engines(Protocol):
    """What has the device while no job does."""

    async def lend(self) -> None:
        """Answers what is being answered, and frees the device; until it is taken back, nothing is begun."""
        ...

    async def take_back(self) -> None:
        """Loads again what was loaded."""
        ...


class Device:
    """One process's part in the turns."""

    def __init__(self, folder: Path, engines: Engines) -> None:
        self._folder, self._engines = folder, engines
        self.lent = False

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[tuple[int, ...]]:
        """A job's turn. What is given are the locks, for its child to hold too: they are free when both have ended."""
        with _Lock(self._folder / "wanted.lock") as wanted, _Lock(self._folder / "device.lock") as device:
            await wanted.wait(fcntl.LOCK_EX)
            await device.wait(fcntl.LOCK_EX)
            yield wanted.number, device.number

    async def watch(self) -> None:
        """The engines' turn, for as long as no job wants the device; until it is cancelled."""
        with _Lock(self._folder / "device.lock") as device:
            while True:
                try:
                    await self._turn_over(device)
                except Exception as error:  # an engine that does not end, or does not come back: the next look tries again
                    log.error("the device cannot change hands: %r", error)
                await asyncio.sleep(LOOK_SECONDS)

    async def _turn_over(self, device: _Lock) -> None:
        wanted = await asyncio.to_thread(self._is_wanted)
        if wanted and not self.lent:
            log.info("a job wants the device: the engines make room")
            await self._engines.lend()
            device.free()
            self.lent = True
        elif not wanted and device.take(fcntl.LOCK_SH) and self.lent:
            log.info("the device is free again: the engines come back")
            await self._engines.take_back()
            self.lent = False

    def _is_wanted(self) -> bool:
        with _Lock(self._folder / "wanted.lock") as wanted:
            return not wanted.take(fcntl.LOCK_SH)


class _Lock:
    """A lock on a file, of whoever has opened it and of the children that it is given to."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self.number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.number)

    def take(self, kind: int) -> bool:
        try:
            fcntl.flock(self.number, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def free(self) -> None:
        fcntl.flock(self.number, fcntl.LOCK_UN)

    async def wait(self, kind: int) -> None:
        while not self.take(kind):
            await asyncio.sleep(LOOK_SECONDS / 2)


def has_gpu() -> bool:
    """Whether this machine has a GPU of NVIDIA's, as far as can be seen without loading anything."""
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()
