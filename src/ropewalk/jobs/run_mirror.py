"""The folder of a run that is trained elsewhere, on this machine: its events, its record, its checkpoints, and in the end its result.

A job's server sees here what it sees of a run on this machine, and the next try of the run starts from it. What workers say goes to this
process's error output, the lines of all but the leading one with their rank before them.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Protocol

from ropewalk.folders import sync_folder
from ropewalk.jobs.launch import Launch
from ropewalk.jobs.ray_worker import PIECE, Seen

SAID = "ropewalk: "  # begins the line in which a run says why it has failed
LOST = "lost another one"  # says a process that another has left: that is no reason of the run's own
RESULT = ("plots", "adapter", "run.json")  # which says that the run has finished, and comes last
GO_ON = ("run.json", "events.jsonl", "checkpoints")  # what a run starts from


class Source(Protocol):
    """The run's folder of the leading worker."""

    def files(self, folder: str) -> list[tuple[str, int]]:
        """What lies there below a folder, or is this file, with its bytes."""
        ...

    def get(self, path: str, start: int) -> bytes:
        """A piece of it."""
        ...


class Mirror:
    """What its workers tell, written down."""

    def __init__(self, launch: Launch) -> None:
        self.run, self.copies = launch.run, bool(launch.config)
        self.last = [""] * launch.workers  # lines of each
        self._why: dict[int, str] = {}
        self._rest = [b""] * launch.workers
        self._own: dict[str, bytes] = {}  # events of this process
        self._fetching: Thread | None = None

    @property
    def finished(self) -> bool:
        """Whether all of the run is here."""
        record = _read(self.run / "run.json")
        return self.copies and bool(record) and json.loads(record).get("state") == "finished"

    @property
    def checkpoints(self) -> tuple[str, ...]:
        return tuple(sorted(path.name for path in (self.run / "checkpoints").glob("step-*")))

    def pieces(self) -> Iterator[tuple[str, int, bytes]]:
        """What workers are given to start from: the path of a file, a place in it, and what stands there."""
        for top in GO_ON if self.copies else ():
            found = sorted((self.run / top).rglob("*")) if (self.run / top).is_dir() else [self.run / top]
            for path in found:
                if path.is_file():
                    with path.open("rb") as file:
                        start = 0
                        while (piece := file.read(PIECE)) or start == 0:
                            yield str(path.relative_to(self.run)), start, piece
                            start += max(1, len(piece))

    def take(self, rank: int, seen: Seen) -> None:
        """What a worker has to tell."""
        *lines, self._rest[rank] = (self._rest[rank] + seen.said).split(b"\n")
        if seen.code is not None and self._rest[rank]:
            lines, self._rest[rank] = [*lines, self._rest[rank]], b""
        for line in (line.decode(errors="replace") for line in lines):
            if line.strip():
                self.last[rank] = line
            if line.startswith(SAID) and LOST not in line:
                self._why[rank] = line.removeprefix(SAID)
            else:
                say(line if rank == 0 else f"[{rank}] {line}")
        if self.copies and rank == 0:
            self._take_events(seen)
            if seen.record and json.loads(seen.record).get("state") != "finished":  # not before the rest is here
                _replace(self.run / "run.json", seen.record)

    def take_checkpoints(self, seen: Seen, source: Source, *, wait: bool = False) -> None:
        """Copies those that are new, and drops those that the run has dropped; in a thread of its own, for they may be large."""
        if not self.copies:
            return
        if self._fetching is not None:
            self._fetching.join(None if wait else 0)
            if self._fetching.is_alive():
                return
        if seen.checkpoints != self.checkpoints:
            self._fetching = Thread(target=self._fetch, args=(seen.checkpoints, source), daemon=True)
            self._fetching.start()
            if wait:
                self._fetching.join()

    def take_result(self, source: Source) -> None:
        """Copies what has come of the run."""
        if not self.copies:
            return
        for name in RESULT:
            _copy(source, name, self.run)

    def why(self) -> tuple[int, str] | None:
        """Of a run that has said why it failed: who said it, and what."""
        return next(iter(sorted(self._why.items())), None)

    def tell_loss(self, why: str) -> None:
        """The event that a worker was lost; what is left of this try is forgotten."""
        if self._fetching is not None:
            self._fetching.join()
        step = int(self.checkpoints[-1].removeprefix("step-")) if self.checkpoints else 0
        say(f"{why}; the run goes on from step {step}")
        self._why, self._rest = {}, [b""] * len(self._rest)
        if self.copies:
            key = secrets.token_hex(4)
            self._own[key] = json.dumps({"event": "restart", "step": step, "key": key}).encode() + b"\n"
            known = _read(self.run / "events.jsonl")
            _replace(self.run / "events.jsonl", known[: known.rfind(b"\n") + 1] + self._own[key])

    def _take_events(self, seen: Seen) -> None:
        if seen.anew:  # which holds some of our own, where the run goes on from a checkpoint
            lacking = [line for key, line in self._own.items() if key.encode() not in seen.events]
            whole = not seen.events or seen.events.endswith(b"\n")
            _replace(self.run / "events.jsonl", seen.events + b"".join(lacking if whole else ()))
        elif seen.events:
            with (self.run / "events.jsonl").open("ab") as file:
                file.write(seen.events)

    def _fetch(self, names: tuple[str, ...], source: Source) -> None:
        folder = self.run / "checkpoints"
        folder.mkdir(exist_ok=True)
        with suppress(Exception):  # a worker that is lost, or a checkpoint that the run has dropped: the next look tells
            for name in names:
                if not (folder / name).exists():
                    _copy(source, f"checkpoints/{name}", self.run)
        for name in self.checkpoints:
            if name not in names:
                shutil.rmtree(folder / name)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _copy(source: Source, what: str, run: Path) -> None:
    """A file or folder of the run, whole or not at all."""
    fresh, final = run / f".copy-{Path(what).name}", run / what
    _remove(fresh)
    for path, size in source.files(what):
        target = fresh / Path(path).relative_to(what)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            while piece := source.get(path, file.tell()):
                file.write(piece)
            if file.tell() != size:
                raise OSError(f"{path} has gone while it was copied")
            file.flush()
            os.fsync(file.fileno())
    if fresh.exists():
        if fresh.is_dir():
            _remove(final)
        fresh.replace(final)
        sync_folder(final.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_bytes(data)
    fresh.replace(path)
