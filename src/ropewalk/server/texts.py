"""How long the texts of files are, in tokens, roughly: counted when a text is first read, and kept beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sqlalchemy import select

from ropewalk.errors import BadInput, DamagedContent, NotFound, Overloaded, SandboxFailed
from ropewalk.files.catalog import File
from ropewalk.files.documents import document
from ropewalk.files.store import Store
from ropewalk.files.tables import derived
from ropewalk.tenants.caller import Caller

BYTES_PER_TOKEN = 4  # of English, with the tokenizers of current models; other languages and code have more tokens
KIND, NO_TEXT = "tokens", "none"  # the count is the name under which it is kept: one query tells those of a page of files
READ_UNASKED = 8_000_000  # bytes of a file that is read so that its count can be shown, before anybody opens it
AT_A_TIME = 6


async def tokens(store: Store, files: Sequence[File]) -> dict[str, int | None]:
    """By file id, about how many tokens each text has: None for a file without text, and no entry for one that nobody has read."""
    owners = [file.blob_id for file in files if file.blob_id is not None]
    async with store.database.reading() as connection:
        query = select(derived.c.owner, derived.c.name).where(derived.c.owner.in_(owners), derived.c.kind == KIND)
        kept = {row.owner: row.name for row in await connection.execute(query)}
    return {file.id: _count(kept[file.blob_id]) for file in files if file.blob_id in kept}


def unread(files: Sequence[File], known: dict[str, int | None]) -> list[File]:
    """Those of these files that nobody has read and that are small enough to be read unasked."""
    return [file for file in files if file.id not in known and not file.expired and file.size <= READ_UNASKED]


async def count_some(store: Store, caller: Caller, files: Sequence[File]) -> dict[str, int | None]:
    """Reads the first few of these files, side by side, and keeps their counts."""
    counted = await asyncio.gather(*(_read(store, caller, file) for file in files[:AT_A_TIME]))
    return {file.id: _count(name) for file, name in zip(files, counted) if name is not None}


async def _read(store: Store, caller: Caller, file: File) -> str | None:
    try:
        text = (await document(store, caller, file.id)).text
        name = str(-(-len(text.encode()) // BYTES_PER_TOKEN)) if text.strip() else NO_TEXT
    except BadInput as error:
        if isinstance(error, SandboxFailed) and error.reason in ("time", "killed"):  # the machine's fault, not the file's
            return None
        name = NO_TEXT
    except (Overloaded, DamagedContent, NotFound):  # the last: deleted meanwhile, or expired
        return None
    try:
        await store.keep_derived(file, KIND, name, b"")
    except NotFound:
        return None
    return name


def _count(name: str) -> int | None:
    return None if name == NO_TEXT else int(name)
