"""Files of ours at an Anthropic upstream: uploaded for the first question about them, known by their ids there, deleted with ours.

    file -> its row among what is derived from it -> the id there -> source of a document block

The copy belongs to one file of one workspace. A PDF goes as it is, and everything else as its text, so that offsets mean the same here
and there. When the file goes, by deletion or because its hour has passed, its row is left among the erasures until the other server
says that the copy is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from weakref import WeakValueDictionary

from ropewalk.chat.citations import Citable
from ropewalk.engine.upstream import Upstream
from ropewalk.errors import RopewalkError
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

PLACE = "upstream"
PDF = "application/pdf"
MOST_PDF_BYTES = 32 << 20  # larger ones go as their text
ERASE_SECONDS = 10.0  # whoever deletes a file waits no longer; the sweep asks again

log = logging.getLogger("ropewalk.engine")


class RemoteFiles:
    """Where the copies are."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._uploading: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def copies(self, caller: Caller, upstream: Upstream, citables: Sequence[Citable]) -> dict[str, str]:
        """file -> its id there, for the files among these documents; uploads what is not there yet."""
        found: dict[str, str] = {}
        if upstream.remote.files == "upload":
            for citable in citables:
                id = citable.file_id
                if id is not None and citable.found_at is None and id not in found:
                    found[id] = await self._copy(caller, upstream, id, citable)
        return found

    async def forget(self, upstream: Upstream, copies: dict[str, str]) -> None:
        """Copies that the other server does not know any more."""
        for file_id, copy in copies.items():
            await self._store.forget_copy(file_id, _stored(upstream, copy))

    async def _copy(self, caller: Caller, upstream: Upstream, file_id: str, citable: Citable) -> str:
        name = _stored(upstream, "")
        lock = self._uploading.setdefault((file_id, name), asyncio.Lock())
        async with lock:
            kept = await self._store.copy_of(file_id, PLACE, name)
            if kept is None:
                content = await self._store.open_content(caller, file_id)
                if content.file.mime_type == PDF and content.file.size <= MOST_PDF_BYTES:
                    data, media_type = await content.read(), PDF
                else:
                    data, media_type = citable.text.encode(), "text/plain"
                own = _stored(
                    upstream, await upstream.upload(f"{file_id}{'.pdf' if media_type == PDF else '.txt'}", data, media_type)
                )
                try:
                    kept = await self._store.keep_copy(file_id, PLACE, name, own)
                except RopewalkError:  # deleted meanwhile
                    await erase(upstream, own)
                    raise
                if kept != own:  # another process was first
                    await erase(upstream, own)
        return kept[len(name) :]


async def erase(upstream: Upstream, stored: str) -> bool:
    """Deletes a copy, if it is one at this server; whether it is gone."""
    name = _stored(upstream, "")
    if not stored.startswith(name):
        return False
    try:
        async with asyncio.timeout(ERASE_SECONDS):
            await upstream.delete(stored[len(name) :])
    except (RopewalkError, TimeoutError) as error:
        log.warning("a copy of a deleted file is still at the server behind '%s': %s", upstream.name, type(error).__name__)
        return False
    return True


def _stored(upstream: Upstream, copy: str) -> str:
    """How a copy is written down: the server, the variable that holds the key, the id there."""
    return f"{upstream.remote.url.rstrip('/')} {upstream.remote.key_env or '-'} {copy}"
