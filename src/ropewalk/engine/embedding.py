"""How near chunks of files are to a question in meaning: vectors of an encoder, kept sealed beside each file, and gone with it.

texts -> Encoder (a process of its own, or another server) -> vectors of length 1 -> nearness
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np

from ropewalk.chat.retrieval import chunks
from ropewalk.config.serving import Embeddings
from ropewalk.engine import child
from ropewalk.engine.upstream import Upstream
from ropewalk.errors import EngineDied
from ropewalk.files.reading import Document
from ropewalk.files.store import Store
from ropewalk.models.identity import weights_digest
from ropewalk.tenants.caller import Caller

KIND = "vectors"  # of what is kept beside a file
AT_ONCE = 32  # texts of one call: a question waits for no more of another file's
Vectors = np.ndarray[Any, np.dtype[np.float32]]  # texts, dimensions


@dataclass(frozen=True)
class Encoded:
    """What was made of some texts."""

    vectors: Vectors
    tokens: int = 0  # that were read; 0 where another server does not say
    cut: tuple[int, ...] = ()  # texts that were longer than the encoder reads


class Encoder(Protocol):
    """What makes vectors of texts."""

    async def name(self) -> str:
        """Names the encoder's content: vectors of one name can be compared."""

    async def encode(self, texts: Sequence[str]) -> Encoded:
        """A vector for each text; AT_ONCE of them at most."""

    async def close(self) -> None: ...


class LocalEncoder:
    """An encoder of this machine, in a process of its own, which starts with the first text."""

    def __init__(self, folder: Path, pooling: str = "", threads: int = 0) -> None:
        self._folder, self._settings = folder, {"folder": str(folder), "pooling": pooling, "threads": threads}
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._name = ""

    async def name(self) -> str:
        if not self._name:
            digest = await asyncio.to_thread(weights_digest, self._folder)
            self._name = f"{digest} {self._settings['pooling']}"
        return self._name

    async def encode(self, texts: Sequence[str]) -> Encoded:
        async with self._turn:
            process = await self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps({"texts": list(texts)}).encode() + b"\n")
                answer = _told(await process.stdout.readline())
            except BaseException:  # what it still says would be taken for the next answer
                self._process = None
                if process.returncode is None:
                    process.kill()
                await process.wait()
                raise
        data = np.frombuffer(base64.b64decode(answer["vectors"]), "<f2").astype(np.float32)
        return Encoded(data.reshape(len(texts), -1), answer["tokens"], tuple(answer["cut"]))

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await child.end(process)

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        process, first = await child.start("ropewalk.engine.embedding_worker", self._settings)
        try:
            _told(first)
        except BaseException:
            await child.end(process)
            raise
        self._process = process
        return process


class RemoteEncoder:
    """Another server's /v1/embeddings."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def name(self) -> str:
        return f"{self._upstream.remote.url} {self._upstream.remote.model}"

    async def encode(self, texts: Sequence[str]) -> Encoded:
        asked = {"model": self._upstream.remote.model, "input": list(texts), "encoding_format": "float"}
        answer = await self._upstream.ask("embeddings", asked)
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            found = np.array([row["embedding"] for row in rows], np.float32)
        except (KeyError, TypeError, ValueError):
            found = np.empty((0, 0), np.float32)
        if found.ndim != 2 or len(found) != len(texts) or not np.isfinite(found).all():
            raise self._upstream.failed("answered with no vector for each text")
        lengths = np.linalg.norm(found, axis=1, keepdims=True).astype(np.float32)
        told = answer.get("usage")
        tokens = told.get("prompt_tokens") if isinstance(told, Mapping) else None
        return Encoded(found / np.maximum(lengths, np.float32(1e-12)), tokens if isinstance(tokens, int) else 0)

    async def close(self) -> None:
        return


class Meanings:
    """Compares files with questions."""

    def __init__(self, store: Store, encoder: Encoder, options: Embeddings) -> None:
        self._store, self._encoder, self._options = store, encoder, options
        self._busy = WeakValueDictionary[tuple[str, str], asyncio.Lock]()  # so that two who ask at once read a file once

    async def nearness(
        self, caller: Caller, asked: Sequence[tuple[str, Document]], size: int, question: str
    ) -> list[list[float]]:
        """For each of these files, how near each of its chunks of `size` characters is to the question."""
        wanted = (await self._encoder.encode([self._options.query + question])).vectors[0]
        return [(await self._of_file(caller, id, document, size) @ wanted).tolist() for id, document in asked]

    async def prepare(self, caller: Caller, read: Sequence[tuple[str, Document]], size: int) -> None:
        """Makes the vectors of these files ahead of the first question about them."""
        for id, document in read:
            await self._of_file(caller, id, document, size)

    async def encoded(self, texts: Sequence[str]) -> Encoded:
        """The vectors of any number of texts, as they stand."""
        parts = [await self._encoder.encode(texts[start : start + AT_ONCE]) for start in range(0, len(texts), AT_ONCE)]
        cut = [place * AT_ONCE + i for place, part in enumerate(parts) for i in part.cut]
        return Encoded(np.concatenate([part.vectors for part in parts]), sum(part.tokens for part in parts), tuple(cut))

    async def close(self) -> None:
        await self._encoder.close()

    async def _of_file(self, caller: Caller, id: str, document: Document, size: int) -> Vectors:
        file = await self._store.show(caller, id)
        identity = f"{await self._encoder.name()} {self._options.passage}"
        name = f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}-{size}"
        lock = self._busy.setdefault((file.blob_id or id, name), asyncio.Lock())
        async with lock:
            texts = [document.text[chunk.begin : chunk.end] for chunk in await asyncio.to_thread(chunks, document, size)]
            kept = await self._store.derived(file, KIND, name)
            if kept is not None and len(texts) and len(kept) % (2 * len(texts)) == 0:
                return np.frombuffer(kept, "<f2").astype(np.float32).reshape(len(texts), -1)
            found = (await self.encoded([self._options.passage + text for text in texts])).vectors
            await self._store.keep_derived(file, KIND, name, found.astype("<f2").tobytes())
            return found


def _told(line: bytes) -> dict[str, Any]:
    if not line:
        raise EngineDied("the encoder of embeddings stopped; its messages are on the error stream. Ask again")
    found: dict[str, Any] = json.loads(line)
    if "error" in found:
        raise child.raised(found["error"], found["message"])
    return found
