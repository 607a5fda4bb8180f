"""The document of a stored file: read once, in a confined process, kept beside the file and erased with it.

    document = await document(store, caller, id)      its text in sections with exact offsets
    png = await page_image(store, caller, id, 3)      the picture of a page

docs/documents.md lists what can be read, with its limits. What is not here: recognition of characters in pictures, and whatever a
program would have to be run for (macros, formulas without a stored value, scripts of a page).
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from ropewalk.errors import DamagedContent, DocumentError, SandboxFailed
from ropewalk.files.reading import HEADER_BYTES, MAX_CHARACTERS, VERSION, Document, PageImage, Section, read_document
from ropewalk.sandbox import call_async

if TYPE_CHECKING:
    from ropewalk.files.content import Content
    from ropewalk.files.store import Store
    from ropewalk.tenants.caller import Caller

__all__ = ["Document", "PageImage", "Section", "document", "page_image", "read_document"]

KEPT = bytes([VERSION])  # before all that is kept; of another version it is made again
MAX_BYTES = 128 << 20
CPU_SECONDS, SECONDS = 30, 120  # the second, by the clock, is met only on a machine that is busy with something else
MEMORY_BYTES = 1 << 30


async def document(store: Store, caller: Caller, id: str) -> Document:
    """The document of a stored file, or the error that reading it gave; either is kept until the file is erased."""
    content = await store.open_content(caller, id)
    read = await _kept(store, content, "text", content.file.mime_type, "read_serialised")
    try:
        return await asyncio.to_thread(Document.from_bytes, read)
    except (ValueError, KeyError, TypeError) as error:
        raise SandboxFailed("the process that read this file gave no document", "crash") from error


async def page_image(store: Store, caller: Caller, id: str, number: int) -> bytes:
    """A page of a stored PDF, or a stored picture (number 1), as PNG; kept until the file is erased."""
    content = await store.open_content(caller, id)
    return await _kept(store, content, "image", f"{number} {content.file.mime_type}", "render_page", number)


_reading: WeakValueDictionary[tuple[asyncio.AbstractEventLoop, str, str, str], asyncio.Lock] = WeakValueDictionary()


async def _kept(store: Store, content: Content, kind: str, name: str, function: str, *arguments: int) -> bytes:
    """What was made of this content before, or is made now: once, however many ask; a verdict on it counts as made."""
    file = content.file
    made = await store.derived(file, kind, name)
    if made is None or made[:1] != KEPT:
        key = (asyncio.get_running_loop(), content.name, kind, name)
        async with _reading.setdefault(key, asyncio.Lock()):
            made = await store.derived(file, kind, name)
            if made is None or made[:1] != KEPT:
                made = KEPT + await _make(store, content, function, *arguments)
                await store.keep_derived(file, kind, name, made)
    if made[1:2] == b"E":
        said = json.loads(made[2:])
        if said["reason"]:
            raise SandboxFailed(said["message"], said["reason"])
        raise DocumentError(said["message"], said["error_code"], **said["details"])
    return made[2:]


async def _make(store: Store, content: Content, function: str, *arguments: int) -> bytes:
    """b'R' and what the function returned, or b'E' and an error that would be the same next time."""
    file = content.file
    try:
        if file.size > MAX_BYTES:
            raise DocumentError(
                f"{file.size:,} bytes are more than the {MAX_BYTES:,} that can be read as a document", "document_too_large"
            )
        made = await call_async(
            f"ropewalk.files.reading:{function}",
            (file.mime_type, file.filename, *arguments),
            data=content.chunks(),
            seconds=SECONDS,
            cpu_seconds=CPU_SECONDS,
            memory_bytes=MEMORY_BYTES,
            result_bytes=HEADER_BYTES + 4 * MAX_CHARACTERS,
            task=f"reading this {file.mime_type.partition(';')[0]} file",
        )
        if not isinstance(made, bytes):
            raise SandboxFailed("the process that read this file gave no document", "crash")
        return b"R" + made
    except DamagedContent:
        await store.mark_damaged(content.name)
        raise
    except DocumentError as error:
        said = {"reason": "", "message": str(error), "error_code": error.error_code, "details": error.details}
    except SandboxFailed as error:
        if error.reason in ("time", "killed"):  # the machine was busy, or out of memory; not the file's fault
            raise
        said = {"reason": error.reason, "message": str(error)}
    return b"E" + json.dumps(said).encode()
