"""What has been read before: segments by key, in memory and on disk, each tier with a budget, the least recently used leaving first.

A key names all that a segment's numbers depend on: the model, the adapter, the scope and every id from the beginning of the prompt.
On disk a segment is one file, sealed under a key that dies with the documents it was read from; the numbers of a text reveal it. A file
that is damaged, or of another version, is a miss and is erased.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import mmap
import os
import secrets
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ropewalk.engine.cache import Layer, Layout, Segment, State
from ropewalk.engine.request import Keep
from ropewalk.errors import DamagedContent
from ropewalk.vault import CHUNK, TAG, Opener, Sealer

VERSION = "ropewalk segment 2"
SALT = 16
NAMES = 50_000  # of prompts' beginnings that are remembered before they are looked through
GIVE_BACK = 64 << 20  # bytes let go after which the allocator is asked to give memory back
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I8": torch.int8,
}
Format = Literal["exact", "int8"]

log = logging.getLogger("ropewalk.engine")


@dataclass
class Counts:
    """What the store did since it was opened."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    written: int = 0
    damaged: int = 0


class Prefixes:
    """Segments that may be used again."""

    def __init__(
        self,
        layout: Layout,
        context: str,
        *,
        memory_bytes: int,
        disk_bytes: int = 0,
        folder: Path | None = None,
        disk_format: Format = "exact",
        device: torch.device | str = "cpu",
    ) -> None:
        """`context` names the weights, their precision and the template; `folder` holds all files that `Keep` names."""
        self.layout, self.context, self.device, self.disk_format = layout, context, torch.device(device), disk_format
        self.memory_bytes, self.disk_bytes = memory_bytes, disk_bytes
        self.counts = Counts()
        self._memory: OrderedDict[str, Segment] = OrderedDict()
        self._used = self._let_go = 0
        self._paths: dict[str, str] = {}  # file -> key of the segment that lies there or will
        self._parents: dict[str, str] = {}
        self._crowded = NAMES
        self._files = _Files(folder, disk_bytes) if folder is not None and disk_bytes else None
        self._writer = ThreadPoolExecutor(1, "segments")
        self._writing: set[str] = set()

    def key(self, parent: str, adapter: str, scope: str, ids: Sequence[int], picture: str = "") -> str:
        """The name of the segment of these ids, or of the picture they stand for, after `parent` ('' at a prompt's beginning)."""
        digest = hashlib.sha256(json.dumps([VERSION, self.context, adapter, scope, parent, picture]).encode())
        digest.update(array("q", ids).tobytes())  # what is before it ends with its last bracket
        key = digest.hexdigest()
        if len(self._parents) >= self._crowded:
            self._forget_ends()
        self._parents.pop(key, None)
        self._parents[key] = parent  # the last of them: somebody is about to use it
        return key

    def find(self, key: str, keep: Keep | None) -> Segment | None:
        """The segment, from memory or from disk."""
        segment = self._memory.get(key)
        if segment is not None:
            self._memory.move_to_end(key)
            self.counts.memory_hits += 1
            if keep is not None and self._files is not None:
                self._files.touch(keep.path)
            return segment
        segment = self._read(key, keep) if keep is not None else None
        if segment is None:
            self.counts.misses += 1
            return None
        self.counts.disk_hits += 1
        self._remember(segment)
        return segment

    def put(self, segment: Segment, keep: Keep | None) -> None:
        """Keeps a segment that was just read; the disk is written behind."""
        self._remember(segment)
        if keep is None or self._files is None:
            return
        self._paths[keep.path] = segment.key
        if keep.path not in self._writing and not os.path.exists(keep.path):
            self._writing.add(keep.path)
            self._writer.submit(self._write, segment, keep)

    def forget(self, paths: Iterable[str]) -> None:
        """Drops the segments kept under these paths, and all that were read after them, from memory and from disk."""
        doomed = {self._paths[path] for path in paths if path in self._paths}
        grown = True
        while grown:
            more = {key for key, parent in self._parents.items() if parent in doomed} - doomed
            doomed |= more
            grown = bool(more)
        for key in doomed:
            self._parents.pop(key, None)
            segment = self._memory.pop(key, None)
            self._used -= segment.nbytes if segment else 0
        self.flush()  # what is being written would come after the erasing
        for path in [*paths, *(path for path, key in self._paths.items() if key in doomed)]:
            self._paths.pop(path, None)
            if self._files is not None:
                self._files.erase(path)

    def flush(self) -> None:
        """Returns when everything that was put is on disk."""
        self._writer.submit(lambda: None).result()

    def close(self) -> None:
        self._writer.shutdown()

    @property
    def memory_used(self) -> int:
        return self._used

    def _remember(self, segment: Segment) -> None:
        before = self._memory.pop(segment.key, None)
        self._memory[segment.key] = segment
        self._used += segment.nbytes - (before.nbytes if before else 0)
        while self._used > self.memory_bytes and len(self._memory) > 1:
            _, oldest = self._memory.popitem(last=False)
            self._used -= oldest.nbytes
            self._let_go += oldest.nbytes
        if self._let_go >= GIVE_BACK and self.device.type == "cpu":
            self._let_go = 0
            _give_back()

    def _forget_ends(self) -> None:
        """Keeps the ancestors of what there is and of what was named lately, and lets go of names that nothing came of."""
        files = self._files
        held = {path for path in self._paths if path in self._writing or (files is not None and files.holds(path))}
        self._paths = {path: key for path, key in self._paths.items() if path in held or key in self._memory}
        known: dict[str, str] = {}
        for key in (*self._memory, *self._paths.values(), *list(self._parents)[-NAMES // 5 :]):
            while key in self._parents and key not in known:
                known[key] = key = self._parents[key]
        self._parents = known
        self._crowded = max(NAMES, 2 * len(known))

    def _read(self, key: str, keep: Keep) -> Segment | None:
        if self._files is None:
            return None
        try:
            with _mapped(keep.path) as sealed:
                self._paths[keep.path] = key
                segment = unpack(_opened(sealed, keep.key, key), key, self.layout, self.device)
        except OSError:
            return None
        except (DamagedContent, ValueError, KeyError, IndexError) as error:
            self.counts.damaged += 1
            log.warning("a kept segment cannot be used and is read anew: %s", error)
            self._files.erase(keep.path)
            return None
        self._files.touch(keep.path)
        return segment

    def _write(self, segment: Segment, keep: Keep) -> None:
        try:
            assert self._files is not None
            self._files.write(keep.path, _sealed(pack(segment, self.disk_format), keep.key, segment.key))
            self.counts.written += 1
        except OSError as error:  # the disk is full, say: it stays in memory only
            log.warning("a segment could not be kept on disk: %s", error.strerror or error)
        finally:
            self._writing.discard(keep.path)


def _give_back() -> None:
    """Memory that was let go goes back to the system: the allocator keeps the holes between what is still in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


class _Files:
    """Files in one folder, together within a budget."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.Lock()
        found = []
        for path in folder.rglob("*"):
            if path.name.startswith(".new-"):  # left by a crash
                path.unlink(missing_ok=True)
            elif path.is_file():
                about = path.stat()
                found.append((about.st_mtime_ns, str(path), about.st_size))
        self._sizes: OrderedDict[str, int] = OrderedDict((path, size) for _, path, size in sorted(found))
        self._make_room(0)  # the budget may have been larger

    def holds(self, path: str) -> bool:
        with self._lock:
            return path in self._sizes

    def touch(self, path: str) -> None:
        with self._lock:
            if path in self._sizes:
                self._sizes.move_to_end(path)
                try:
                    os.utime(path)
                except FileNotFoundError:
                    del self._sizes[path]

    def write(self, path: str, content: Iterable[bytes]) -> None:
        """Whole or not at all, and within the budget."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = self.folder / f".new-{secrets.token_hex(8)}"
        try:
            with beside.open("wb") as file:
                size = sum(file.write(piece) for piece in content)
            with self._lock:
                self._make_room(size)
                os.replace(beside, place)
                self._sizes[path] = size
        finally:
            beside.unlink(missing_ok=True)

    def erase(self, path: str) -> None:
        with self._lock:
            self._sizes.pop(path, None)
            Path(path).unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        while self._sizes and sum(self._sizes.values()) + size > self.budget:
            oldest, _ = self._sizes.popitem(last=False)
            Path(oldest).unlink(missing_ok=True)


def pack(segment: Segment, disk_format: Format = "exact") -> bytes:
    """A segment as bytes, in the format of safetensors."""
    tensors: dict[str, Tensor] = {}
    kernel_sizes: dict[int, list[object]] = {}
    for number, layer in enumerate(segment.layers):
        if isinstance(layer, State):
            kernel_sizes[number] = list(layer.kernel_sizes)
            for name, states in (("convolution", layer.convolutions), ("recurrent", layer.recurrents)):
                tensors |= {f"{number}.{name}.{i}": state for i, state in enumerate(states) if state is not None}
        for name, tensor in zip(("keys", "values"), segment.pair(number) or ()):
            rounded = disk_format == "int8" and tensor.numel() > 0
            tensors |= _packed(f"{number}.{name}", tensor) if rounded else {f"{number}.{name}": tensor}
    about = {
        "version": VERSION,
        "key": segment.key,
        "start": segment.start,
        "shift": segment.shift,
        "kernel_sizes": kernel_sizes,
    }
    tensors["ids"] = torch.tensor(segment.ids, dtype=torch.int32)
    packed: bytes = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, {"about": json.dumps(about)})
    return packed


def unpack(packed: memoryview, key: str, layout: Layout, device: torch.device) -> Segment:
    """The segment that `pack` was given, its tensors in these very bytes; ValueError if they are others."""
    begin = 8 + int.from_bytes(packed[:8], "little")
    header = json.loads(bytes(packed[8:begin]))
    about = json.loads(header.pop("__metadata__")["about"])
    if (about["version"], about["key"]) != (VERSION, key):
        raise ValueError("it is of another version or another text")
    tensors = {name: _tensor(packed, begin, entry).to(device) for name, entry in header.items()}
    layers: list[Layer] = []
    for number, kind in enumerate(layout.kinds):
        pair = None
        if kind not in ("recurrent", "none"):
            pair = _unpacked(tensors, f"{number}.keys"), _unpacked(tensors, f"{number}.values")
        if layout.states[number]:
            sizes = about["kernel_sizes"][str(number)]

            def states(name: str, number: int = number, count: int = len(sizes)) -> tuple[Tensor | None, ...]:
                return tuple(tensors.get(f"{number}.{name}.{index}") for index in range(count))

            layers.append(State(states("convolution"), states("recurrent"), tuple(sizes), pair))
        else:
            layers.append(pair)
    return Segment(key, about["start"], tuple(tensors["ids"].tolist()), tuple(layers), about.get("shift", 0))


def _tensor(packed: memoryview, begin: int, entry: dict[str, Any]) -> Tensor:
    """One tensor of the safetensors format, as a view."""
    start, end = entry["data_offsets"]
    if end == start:
        return torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
    dtype = DTYPES[entry["dtype"]]
    flat = torch.frombuffer(packed, dtype=dtype, count=(end - start) // dtype.itemsize, offset=begin + start)
    return flat.reshape(entry["shape"])


def _packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """int8 per token and head: [.., T, D] -> values and scales [.., T, 1]."""
    scale = (tensor.float().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    rounded = (tensor.float() / scale).round().to(torch.int8)
    return {f"{name}.int8": rounded, f"{name}.scale": scale, f"{name}.like": tensor.new_empty(0)}


def _unpacked(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name]
    return (tensors[f"{name}.int8"].float() * tensors[f"{name}.scale"]).to(tensors[f"{name}.like"].dtype)


def _sealed(plain: bytes, key: bytes, name: str) -> Iterable[bytes]:
    # The same text may be read and sealed again, with numbers that differ in their last bit: never under the same name.
    salt = secrets.token_bytes(SALT)
    yield salt
    sealer, view = Sealer(key, f"{name} {salt.hex()}"), memoryview(plain)
    for start in range(0, len(plain), CHUNK):
        yield sealer.seal(view[start : start + CHUNK], start + CHUNK >= len(plain))


@contextmanager
def _mapped(path: str) -> Iterator[memoryview]:
    """A whole file, as the system holds it in memory."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            yield memoryview(b"")
            return
        with (
            mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | getattr(mmap, "MAP_POPULATE", 0), mmap.PROT_READ) as mapped,
            memoryview(mapped) as view,
        ):
            yield view


def _opened(sealed: memoryview, key: bytes, name: str) -> memoryview:
    step = CHUNK + TAG
    opener = Opener(key, f"{name} {bytes(sealed[:SALT]).hex()}")
    with sealed[SALT:] as view:
        count = -(-len(view) // step)
        out = np.empty(max(0, len(view) - count * TAG), np.uint8).data  # not filled with zeros first
        for index in range(count):
            with view[index * step : (index + 1) * step] as chunk:
                place = out[index * CHUNK : index * CHUNK + max(0, len(chunk) - TAG)]
                opener.open_into(chunk, place, index, index == count - 1)
    return out
