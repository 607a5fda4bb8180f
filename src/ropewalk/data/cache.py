"""Tokenised rows on disk, memory-mapped: built once per content, resumed where it was interrupted, never seen half-written.

FOLDER/<key>/           tokens.bin int32, mask.bin bool, lengths.bin, trained.bin, digests.bin, marks.bin, pictures.bin with the
                        bytes of each row in shown.bin, about.json
FOLDER/<key>.partial/   the same while it grows; state.json says how much of it is whole
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.pictures import Shown, read_kept
from ropewalk.data.tokenise import BadRow, Block
from ropewalk.errors import BadInput, OutputError
from ropewalk.folders import sync_folder

COLUMNS = ("tokens", "mask", "lengths", "trained", "digests", "marks", "pictures", "shown")
LISTED = 1000  # bad rows kept by name; all are counted
SECONDS = 1.0  # between two marks of progress on disk


class Tokens:
    """The tokenised rows of one source, opened."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.counts: Counter[str] = Counter(about["counts"])
        self.bad = [BadRow(**row) for row in about["bad"]]
        self.lengths: NDArray[np.int32] = np.fromfile(folder / "lengths.bin", np.int32)
        self.trained: NDArray[np.int32] = np.fromfile(folder / "trained.bin", np.int32)
        self.digests: NDArray[np.uint64] = np.fromfile(folder / "digests.bin", np.uint64).reshape(-1, 2)
        self.marks: NDArray[np.int32] = np.fromfile(folder / "marks.bin", np.int32)
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        self.shown: NDArray[np.int64] = np.fromfile(folder / "shown.bin", np.int64)  # bytes that tell of each row's pictures
        self._shown_ends = np.cumsum(self.shown)
        self._pictures = _mapped(folder / "pictures.bin", np.uint8)
        self._tokens, self._mask = _mapped(folder / "tokens.bin", np.int32), _mapped(folder / "mask.bin", np.bool_)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and mask of a row."""
        end = self._ends[number]
        begin = end - self.lengths[number]
        return np.asarray(self._tokens[begin:end]), np.asarray(self._mask[begin:end])

    def pictures(self, number: int) -> tuple[Shown, ...]:
        """The pictures that a row shows."""
        end = self._shown_ends[number]
        return read_kept(self._pictures[end - self.shown[number] : end].tobytes())


class Blocks(Protocol):
    """Where blocks come from: those of the source's chunks after the first `done`."""

    def __call__(self, done: int) -> Iterator[Block]: ...


def open_tokens(folder: Path, key: str, blocks: Blocks) -> Tokens:
    """The rows under a key; builds them, or goes on building them, if they are not there."""
    whole = folder / key
    if not (whole / "about.json").exists():
        with _locked(folder, key):
            if not (whole / "about.json").exists():
                _build(folder / f"{key}.partial", whole, blocks)
    return Tokens(whole)


class Growing:
    """Rows on their way to disk, with marks from which the work can go on."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._told = folder, monotonic()
        state: dict[str, Any] = {"chunks": 0, "sizes": {}, "counts": {}, "bad": []}
        if (folder / "state.json").exists():
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.chunks = int(state["chunks"])
        self._counts: Counter[str] = Counter(state["counts"])
        self._bad = list(state["bad"])
        self._files = {name: (folder / f"{name}.bin").open("ab") for name in COLUMNS}
        for name, file in self._files.items():
            # What was written after the last mark may be torn.
            file.truncate(state["sizes"].get(name, 0))
            file.seek(0, os.SEEK_END)

    def add(self, block: Block) -> None:
        """The rows of the next chunk."""
        pictures = np.frombuffer(b"".join(block.pictures), np.uint8)
        shown = np.fromiter(map(len, block.pictures), np.int64, len(block.pictures))
        columns: tuple[NDArray[Any], ...] = (block.ids, block.mask, block.lengths, block.trained, block.digests, block.marks)
        columns += (pictures, shown)
        for file, column in zip(self._files.values(), columns):
            file.write(column.tobytes())
        self._counts.update(block.counts)
        self._counts["bad"] += len(block.bad)
        self._bad += [asdict(row) for row in block.bad[: max(0, LISTED - len(self._bad))]]
        self.chunks += 1
        if monotonic() - self._told > SECONDS:
            self.mark("state.json")

    def mark(self, name: str) -> None:
        """Writes down that everything up to here is whole."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {column: file.tell() for column, file in self._files.items()}
        state: dict[str, Any] = {"chunks": self.chunks, "sizes": sizes, "counts": dict(self._counts), "bad": self._bad}
        _write_json(self.folder / name, state)
        self._told = monotonic()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _build(partial: Path, whole: Path, blocks: Blocks) -> None:
    with _written(partial):
        growing = Growing(partial)
    try:
        for block in blocks(growing.chunks):
            with _written(partial):
                growing.add(block)
        with _written(partial):
            growing.mark("about.json")
    except BadInput:
        # The data must change, and with it the key: nothing would ever go on from here.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        growing.close()
    with _written(partial):
        os.rename(partial, whole)
        sync_folder(whole.parent)


def _mapped(path: Path, kind: Any) -> NDArray[Any]:
    # A file of no bytes cannot be mapped.
    return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_suffix(".tmp")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


@contextmanager
def _locked(folder: Path, key: str) -> Iterator[None]:
    """One process builds, the others (ranks of one run, runs of one data set) wait for it."""
    with _written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{key}.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write tokenised data to '{path}': {error.strerror or error}; name another folder in dataset_prepared_path"
        ) from error
