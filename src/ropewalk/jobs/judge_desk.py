"""Models that give marks to what a job writes: a socket of the server, which its training asks for as long as it runs.

reward of kind `judge` in the child -> one line of JSON -> the model, asked as the job's owner -> one line of JSON

The socket lies in a folder that only this user opens, and it asks the models that the job named and no other. Nothing secret is handed on.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from ropewalk.errors import BadInput, Overloaded, RateLimited, RopewalkError
from ropewalk.tenants.caller import Caller

PLACE = "ROPEWALK_JUDGES"  # where the child reads the socket's path
URL = "ropewalk:"  # stands in a reward's `url` for that socket
LINE_BYTES = 4 << 20
AT_ONCE = 16
PATIENCE_SECONDS = 100.0  # with a model that is being loaded; the reward itself waits 120 s

# A model's name, what it is asked, the least and the most mark -> its words
Asks = Callable[[Caller, str, str, float, float], Awaitable[str]]


class JudgeDesk:
    """The judges of one job."""

    def __init__(self, asks: Asks, owner: Caller, models: Sequence[str]) -> None:
        self._asks, self._owner, self._models = asks, owner, frozenset(models)
        self._room = asyncio.Semaphore(AT_ONCE)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Path]:
        """The path of the socket, which answers until the end."""
        folder = Path(tempfile.mkdtemp(prefix="ropewalk-"))  # a path of a socket has a hundred characters at most
        answering: set[asyncio.Task[None]] = set()

        def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._answer(reader, writer))
            answering.add(task)
            task.add_done_callback(answering.discard)

        try:
            server = await asyncio.start_unix_server(answer, folder / "judges", limit=LINE_BYTES)
            try:
                yield folder / "judges"
            finally:
                server.close()
                for task in answering:
                    task.cancel()
                await asyncio.gather(*answering, return_exceptions=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ValueError, ConnectionError):  # a line that is too long, or nobody there any more
                while line := await reader.readline():
                    writer.write(json.dumps(await self._said(line)).encode() + b"\n")
                    await writer.drain()
        finally:
            writer.close()

    async def _said(self, line: bytes) -> Mapping[str, Any]:
        try:
            asked = json.loads(line)
            model, words, least, most = str(asked["model"]), str(asked["words"]), float(asked["least"]), float(asked["most"])
            if model not in self._models:
                raise BadInput(f"'{model[:100]}' is no judge of this job; it has {', '.join(sorted(self._models))}")
            async with self._room:
                return {"text": await self._patiently(model, words, least, most)}
        except RopewalkError as error:
            return {"error": str(error)}
        except (KeyError, TypeError, ValueError):
            return {"error": "what was asked is not understood"}

    async def _patiently(self, model: str, words: str, least: float, most: float) -> str:
        late = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return await self._asks(self._owner, model, words, least, most)
            except (Overloaded, RateLimited) as error:
                if time.monotonic() + error.retry_after > late:
                    raise
                await asyncio.sleep(error.retry_after)
