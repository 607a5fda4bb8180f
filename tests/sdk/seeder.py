"""Writes rows into the database of a running server, as a process of its own: `python seeder.py DATA_FOLDER URL_OF_THE_SERVER`.

The SDK's own tests take for granted that a key, a file, a model and a workspace of fixed names exist, and delete the file again and
again. The server knows nothing of that: the rows are put here, before each test, through the same store that the server uses.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from anthropic.resources.messages.messages import DEPRECATED_MODELS
from sqlalchemy import insert, select, update
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ropewalk.batches.tables import batches
from ropewalk.database import now
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.files.tables import files
from ropewalk.models.base import make_base
from ropewalk.registry import Registry
from ropewalk.tenants.keys import USUAL_RIGHTS, create_key
from ropewalk.tenants.secrets import workspace_purpose
from ropewalk.tenants.tables import workspaces
from ropewalk.tenants.workspaces import create_workspace
from ropewalk.vault import new_key

SECRET = "my-anthropic-api-key"
FILE = "file_id"
BATCH = "message_batch_id"
MODEL = "model_id"
ANSWERING = "claude-opus-5-5"  # asked for by name in the tests of messages; here a tiny base with random weights
WORKSPACE = "wrkspc_011CZkZaBF1tNoB5wlCeusgy"
PLENTY = 1_000_000  # requests per minute: no test is to meet the limit unless it asks for one
AT_ONCE = 8

Answer = dict[str, Any]


@dataclass
class Rows:
    """The store and what the tests ask to find in it."""

    store: Store
    data: Path
    server: str
    many_made: dict[int, Answer] = field(default_factory=dict)

    async def address(self) -> Answer:
        return {"url": self.server}

    async def rows(self) -> Answer:
        """The SDK's own rows, whatever the last test did to them."""
        await self._fixed_workspace()
        async with self.store.database.reading() as connection:
            there = (await connection.execute(select(files.c.id).where(files.c.id == FILE))).first()
        if there is None:
            made = await self.store.put(await self.store.local_caller(WORKSPACE), b"Example data", "example.txt")
            async with self.store.database.writing() as connection:
                await connection.execute(update(files).where(files.c.id == made.id).values(id=FILE))
        async with self.store.database.reading() as connection:
            there = (await connection.execute(select(batches.c.id).where(batches.c.id == BATCH))).first()
        if there is None:
            await self._ended_batch()
        return {}

    async def workspace(
        self,
        *,
        limit_bytes: int | None = None,
        limit_files: int | None = None,
        requests_per_minute: int = PLENTY,
        downloads: str = "owner",
    ) -> Answer:
        """A new workspace and a key of it."""
        made = await create_workspace(
            self.store.database,
            self.store.vault,
            f"test {uuid.uuid4().hex}",
            limit_bytes=limit_bytes,
            limit_files=limit_files,
            requests_per_minute=requests_per_minute,
            downloads=downloads,
        )
        return {"workspace_id": made.id, "organization_id": made.organization_id, **await self.key(workspace_id=made.id)}

    async def key(self, *, workspace_id: str, rights: list[str] | None = None) -> Answer:
        """One more key of a workspace."""
        key, secret = await create_key(
            self.store.database, self.store.vault, workspace_id, "test", rights=rights or USUAL_RIGHTS
        )
        return {"key_id": key.id, "secret": secret}

    async def expire(self, *, file_id: str) -> Answer:
        """The file's hour has just passed."""
        async with self.store.database.writing() as connection:
            await connection.execute(update(files).where(files.c.id == file_id).values(expires_at=now() - 1))
        return {}

    async def many(self, *, count: int) -> Answer:
        """A workspace with so many files, made once; their ids, newest first."""
        if count not in self.many_made:
            place = await self.workspace()
            caller = await self.store.local_caller(place["workspace_id"])
            made = []
            for first in range(0, count, AT_ONCE):  # they wait for the disk together
                numbers = range(first, min(first + AT_ONCE, count))
                made += await asyncio.gather(*(self.store.put(caller, b"%d" % (n % 7), f"{n}.txt") for n in numbers))
            made.sort(key=lambda file: (file.created_at, file.id), reverse=True)
            self.many_made[count] = {**place, "ids": [file.id for file in made]}
        return self.many_made[count]

    async def model(self, *, name: str) -> Answer:
        """A base of that name in the server's registry."""
        folder = self.data / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        Registry(self.data / "registry").publish_base(name, folder)
        return {}

    async def _ended_batch(self) -> None:
        """A batch that has ended, of no requests."""
        caller, moment = await self.store.local_caller(WORKSPACE), now()
        row = {"id": BATCH, "organization_id": caller.organization_id, "workspace_id": WORKSPACE, "rights": "", "version": ""}
        counts = dict.fromkeys(("total", "unanswered", "succeeded", "errored", "canceled", "expired"), 0)
        times = {"created_at": moment, "expires_at": moment, "ended_at": moment}
        async with self.store.database.writing() as connection:
            await connection.execute(insert(batches).values(**row, **counts, **times, complete=True))

    async def _fixed_workspace(self) -> None:
        async with self.store.database.reading() as connection:
            if (await connection.execute(select(workspaces.c.id).where(workspaces.c.id == WORKSPACE))).first():
                return
        default = await create_workspace(self.store.database, self.store.vault, "the SDK's own tests")
        row = {
            "id": WORKSPACE,
            "organization_id": default.organization_id,
            "name": "the SDK's own tests, under the id they name",
            "created_at": now(),
            "sealed_key": self.store.vault.wrap(new_key(), workspace_purpose(WORKSPACE)),
            "requests_per_minute": PLENTY,
        }
        async with self.store.database.writing() as connection:
            await connection.execute(insert(workspaces).values(row))
        await create_key(self.store.database, self.store.vault, WORKSPACE, "the SDK's own", secret=SECRET)
        await self.model(name=MODEL)
        await asyncio.to_thread(make_base, self.data / "models" / ANSWERING, "qwen3_moe", size="tiny", seed=1)
        registry = Registry(self.data / "registry")
        registry.publish_base(ANSWERING, self.data / "models" / ANSWERING)
        for name in DEPRECATED_MODELS:  # the SDK warns of them, and asks them all the same
            registry.ship(name, ANSWERING)


def app(data: Path, server: str) -> Starlette:
    """One POST per verb; the arguments are its JSON body."""

    @asynccontextmanager
    async def lifespan(application: Starlette) -> AsyncIterator[None]:
        store = await Store.open(Settings(data=data))
        application.state.rows = Rows(store, data, server)
        yield
        await store.close()

    def verb(name: str) -> Route:
        async def answer(request: Request) -> JSONResponse:
            call: Callable[..., Awaitable[Answer]] = getattr(request.app.state.rows, name)
            return JSONResponse(await call(**json.loads(await request.body() or b"{}")))

        return Route(f"/{'server' if name == 'address' else name}", answer, methods=["POST"])

    verbs = ("address", "rows", "workspace", "key", "expire", "many", "model")
    return Starlette(routes=[verb(name) for name in verbs], lifespan=lifespan)


def main() -> None:
    """Serves on the socket that was inherited as standard input, until it is told to end."""
    data, server = Path(sys.argv[1]), sys.argv[2]
    config = uvicorn.Config(app(data, server), fd=os.dup(0), log_level="warning")
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
