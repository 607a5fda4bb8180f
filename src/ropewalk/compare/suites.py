"""Suites: the prompts that candidates are compared on, from a stored file or from JSONL, and the half of them that is held back.

A suite has a key, wrapped by its workspace's; what its prompts say, what is answered and what is said of that are sealed under it.
A suite that was made of a file goes with the file, in the transaction that deletes it: see `suites_made_of` in tables.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sqlalchemy import ColumnElement, delete, insert, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.checks import CheckSpec, parse_check
from ropewalk.compare.sealing import unseal
from ropewalk.compare.suite_reading import PORTION, Reading
from ropewalk.compare.suite_rows import Message
from ropewalk.compare.tables import prompts as prompt_rows
from ropewalk.compare.tables import suites
from ropewalk.database import now
from ropewalk.errors import BadInput, NotFound
from ropewalk.files import catalog
from ropewalk.files.store import Store
from ropewalk.files.tables import derived
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import workspace_key
from ropewalk.vault import new_key, unwrap, wrap

Source: TypeAlias = str | bytes | Path | AsyncIterable[bytes]
Split: TypeAlias = Literal["main", "held"]
MADE_AS = "suite"  # the kind under which a file's deletion receipt names it
PAGE = 1000
DAY = 24 * 3600 * 1_000_000


@dataclass(frozen=True)
class Prompt:
    """One question of a suite, and how its answers are checked."""

    id: str
    suite_id: str
    number: int  # from 1, as they came
    group: str
    held: bool  # of the half that is kept back to confirm with
    messages: tuple[Message, ...]
    system: str = ""
    reference: str = ""
    must_pass: bool = False
    tags: tuple[str, ...] = ()
    checks: tuple[CheckSpec, ...] = ()
    style: bool = False
    text_hash: str = ""  # equal where what is asked is

    @property
    def judged(self) -> bool:
        """Whether its answers are left to judges, since no check scores them."""
        return all(spec.guardrail or spec.kind == "judge" for spec in self.checks)

    @property
    def text(self) -> str:
        """The last turn's text."""
        content = self.messages[-1]["content"]
        return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


@dataclass(frozen=True)
class Suite:
    """What is known about a suite. Times are microseconds."""

    id: str
    workspace_id: str
    user_id: str | None
    name: str
    file_id: str | None  # that it was made of
    digest: str  # of its prompts and settings
    n_prompts: int
    n_held: int
    n_groups: int
    hold: float
    margin: float
    created_at: int


OWN = [suites.c[field.name] for field in fields(Suite)]


async def add_suite(
    store: Store,
    caller: Caller,
    source: Source,
    *,
    name: str = "",
    group: str = "group",
    must_pass: str | None = None,
    hold: float = 0.5,
    margin: float = 0.03,
) -> Suite:
    """A suite of the prompts in a stored file (by its id), in bytes of JSONL, or in a file of this machine; all of them or none.

    `group` is the key that says which prompts hang together, `must_pass` a tag whose prompts must not fail. Which groups are held back
    is decided by each one's hash, so that it is the same in every suite.
    """
    caller.needs("write")
    if not 0 <= hold < 1:
        raise BadInput(f"hold is {hold}; expected a share from 0 to below 1 of the groups")
    if not 0 <= margin < 1:
        raise BadInput(f"margin is {margin}; expected a share from 0 to below 1, such as 0.03 for three points")
    file_id = source if isinstance(source, str) else None
    origin, chunks = await _opened(store, caller, source)
    id, key, moment = new_id("suite"), new_key(), now()
    reading = Reading(id, key, origin, group, must_pass, hold)
    async with store.database.reading() as connection:
        sealed = wrap(await workspace_key(connection, store.vault, caller.workspace_id), key, _purpose(id))
    row = {
        "id": id,
        "workspace_id": caller.workspace_id,
        "user_id": caller.user_id,
        "name": one_line(name) or one_line(origin),
        "made_as": MADE_AS,
        "file_id": file_id,
        "sealed_key": sealed,
        "complete": False,
        "digest": "",
        "n_prompts": 0,
        "n_held": 0,
        "n_groups": 0,
        "hold": hold,
        "margin": margin,
        "created_at": moment,
    }
    await forget_unfinished(store)
    async with store.database.writing() as connection:
        if file_id is not None:
            await store.keep_rows(connection, file_id, MADE_AS, id)
        await connection.execute(insert(suites).values(row))
    try:
        async for rows in reading.portions(chunks):
            async with store.database.writing() as connection:
                await connection.execute(insert(prompt_rows), rows)
        reading.check()
        whole = {
            "complete": True,
            "digest": reading.digest(margin),
            "n_prompts": reading.number,
            "n_held": reading.held,
            "n_groups": len(reading.groups),
        }
        async with store.database.writing() as connection:
            done = await connection.execute(update(suites).where(suites.c.id == id).values(whole))
            if not done.rowcount:
                raise catalog.missing(file_id or "")
    except BaseException as error:
        async with store.database.writing() as connection:
            await _drop(connection, [(id, file_id)])
        if isinstance(error, IntegrityError) and file_id is not None:  # deleted meanwhile, and its suite with it
            raise catalog.missing(file_id) from None
        raise
    return await get_suite(store, caller, id)


async def get_suite(store: Store, caller: Caller, id: str) -> Suite:
    """One suite; NotFound also for another's."""
    caller.needs("read")
    async with store.database.reading() as connection:
        return await _find(connection, caller, id)


async def list_suites(store: Store, caller: Caller, limit: int = 100, after: str | None = None) -> list[Suite]:
    """Up to `limit` suites, newest first, after one of them."""
    caller.needs("read")
    query = select(*OWN).where(visible(caller))
    async with store.database.reading() as connection:
        if after is not None:
            last = await _find(connection, caller, after)
            query = query.where(tuple_(suites.c.created_at, suites.c.id) < (last.created_at, last.id))
        rows = await connection.execute(query.order_by(suites.c.created_at.desc(), suites.c.id.desc()).limit(min(limit, PAGE)))
        return [Suite(**row._mapping) for row in rows]


async def delete_suite(store: Store, caller: Caller, id: str) -> None:
    """Forgets a suite with its prompts, answers and judgements, and destroys their key; verdicts and figures stay."""
    caller.needs("write")
    async with store.database.writing() as connection:
        found = await _find(connection, caller, id)
        await _drop(connection, [(found.id, found.file_id)])
    await store.database.forget()


async def stream_prompts(
    store: Store, caller: Caller, suite_id: str, split: Split | None = None
) -> AsyncIterator[Sequence[Prompt]]:
    """The prompts of a suite in order, in portions; the error comes with the first."""
    await get_suite(store, caller, suite_id)
    key, last = await suite_key(store, caller, suite_id), 0
    query = select(prompt_rows).where(prompt_rows.c.suite_id == suite_id)
    if split is not None:
        query = query.where(prompt_rows.c.held == (split == "held"))
    while True:
        async with store.database.reading() as connection:
            page = query.where(prompt_rows.c.number > last).order_by(prompt_rows.c.number).limit(PORTION)
            rows = (await connection.execute(page)).all()
        if not rows:
            return
        yield await asyncio.to_thread(_prompts, key, rows)
        last = rows[-1].number


async def prompts(store: Store, caller: Caller, suite_id: str, split: Split | None = None) -> list[Prompt]:
    """The prompts of a suite, or of one half of it, in order."""
    return [prompt async for portion in stream_prompts(store, caller, suite_id, split) for prompt in portion]


async def prompt(store: Store, caller: Caller, id: str) -> Prompt:
    """One prompt; NotFound also for another's."""
    caller.needs("read")
    missing = NotFound(f"Prompt `{id[:128]}` not found.")
    if not catalog.ID.fullmatch(id):
        raise missing
    async with store.database.reading() as connection:
        query = select(prompt_rows).join(suites, suites.c.id == prompt_rows.c.suite_id)
        row = (await connection.execute(query.where(prompt_rows.c.id == id, visible(caller)))).first()
    if row is None:
        raise missing
    return _prompt(await suite_key(store, caller, row.suite_id), row)


async def suite_key(store: Store, caller: Caller, id: str) -> bytes:
    """The key that seals what belongs to a suite."""
    caller.needs("read")
    async with store.database.reading() as connection:
        await _find(connection, caller, id)
        sealed = (await connection.execute(select(suites.c.sealed_key).where(suites.c.id == id))).scalar_one()
        return unwrap(await workspace_key(connection, store.vault, caller.workspace_id), sealed, _purpose(id))


async def forget_unfinished(store: Store) -> None:
    """Drops what a process that ended has left of suites."""
    lost = ~suites.c.complete & (suites.c.created_at <= now() - DAY)
    async with store.database.reading() as connection:
        rows = (await connection.execute(select(suites.c.id, suites.c.file_id).where(lost))).all()
    if rows:
        async with store.database.writing() as connection:
            await _drop(connection, [(row.id, row.file_id) for row in rows])


def visible(caller: Caller) -> ColumnElement[bool]:
    """Whole suites of the caller's workspace, and of its user if it stands for one."""
    mine = suites.c.complete & (suites.c.workspace_id == caller.workspace_id)
    return mine if caller.user_id is None else mine & (suites.c.user_id == caller.user_id)


def one_line(text: str, most: int = 200) -> str:
    """A name as lists show it, and as every database can keep it."""
    return "".join(character for character in text if character.isprintable()).strip()[:most]


async def _opened(store: Store, caller: Caller, source: Source) -> tuple[str, AsyncIterable[bytes]]:
    """What messages call it, and its bytes."""
    if isinstance(source, str):
        content = await store.open_content(caller, source)
        return content.file.filename, content.chunks()
    if isinstance(source, Path):
        if not source.is_file():
            raise NotFound(f"there is no file '{source}'")
        return source.name, _read(source)
    return "suite", _once(source) if isinstance(source, bytes) else source


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _read(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, 1 << 20):
            yield chunk


async def _find(connection: AsyncConnection, caller: Caller, id: str) -> Suite:
    row = None
    if catalog.ID.fullmatch(id):
        row = (await connection.execute(select(*OWN).where(suites.c.id == id, visible(caller)))).first()
    if row is None:
        raise NotFound(f"Suite `{id[:128]}` not found.")
    return Suite(**row._mapping)


async def _drop(connection: AsyncConnection, some: Sequence[tuple[str, str | None]]) -> None:
    """Suites, and what says of which file they were made; their prompts and all that is sealed with them go along."""
    ids = [id for id, _ in some]
    await connection.execute(delete(suites).where(suites.c.id.in_(ids)))
    await connection.execute(delete(derived).where(derived.c.kind == MADE_AS, derived.c.name.in_(ids)))


def _prompts(key: bytes, rows: Sequence[Any]) -> list[Prompt]:
    return [_prompt(key, row) for row in rows]


def _prompt(key: bytes, row: Any) -> Prompt:
    content: Mapping[str, Any] = json.loads(unseal(key, row.content, f"prompt {row.id}"))
    return Prompt(
        id=row.id,
        suite_id=row.suite_id,
        number=row.number,
        group=content["group"],
        held=row.held,
        messages=tuple(content["messages"]),
        system=content["system"],
        reference=content["reference"],
        must_pass=row.must_pass,
        tags=tuple(content["tags"]),
        checks=tuple(parse_check(spec) for spec in content["checks"]),
        style=content["style"],
        text_hash=row.text_hash,
    )


def _purpose(id: str) -> str:
    return f"suite {id}"
