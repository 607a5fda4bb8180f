"""The document of a stored file: read once, in a confined process, kept beside the file and erased with it.

    document = await document(store, caller, id)      its text in sections with exact offsets
    png = await page_image(store, caller, id, 3)      the picture of a page

docs/documents.md lists what can be read, with its limits. What is not here: recognition of characters in pictures, and whatever a
program would have to be run for (macros, formulas without a stored value, scripts of a page).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from ropewalk.errors import DamagedContent, DocumentError, RopewalkError, SandboxFailed
from ropewalk.files.reading import HEADER_BYTES, MAX_CHARACTERS, VERSION, Document, PageImage, Section, read_document
from ropewalk.sandbox import call_async, containment

if TYPE_CHECKING:
    from ropewalk.files.content import Content
    from ropewalk.files.store import Store
    from ropewalk.tenants.caller import Caller

__all__ = ["Document", "PageImage", "Section", "document", "document_of", "page_image", "read_document", "weakness"]

KEPT = bytes([VERSION])  # before all that is kept; of another version it is made again
MAX_BYTES = 128 << 20
DOCUMENT, ERROR = b"D", b"E"
CPU_SECONDS, DRAW_CPU_SECONDS = 30, 10
SECONDS = 120  # by the clock; met only on a machine that is busy with something else
MEMORY_BYTES = 1 << 30


async def document(store: Store, caller: Caller, id: str) -> Document:
    """The document of a stored file, or the error that reading it gave; either is kept until the file is erased."""
    content = await store.open_content(caller, id)
    kept = await _kept(store, content)
    if kept is None:
        async with _reading.setdefault((asyncio.get_running_loop(), content.name), asyncio.Lock()):
            kept = await _kept(store, content)  # by whoever held the lock
            if kept is None:
                kept = await _verdict(store, content)
                await store.keep_derived(content.file, "text", content.file.mime_type, KEPT + kept)
    if kept[:1] == ERROR:
        raise _error(kept[1:])
    try:
        return await asyncio.to_thread(Document.from_bytes, kept[1:])
    except (ValueError, KeyError, TypeError) as error:
        raise SandboxFailed("the process that read this file gave no document", "crash") from error


async def document_of(data: bytes, media_type: str | None, name: str) -> Document:
    """The document of bytes that are kept nowhere."""
    made = await confined(data, CPU_SECONDS, "read_serialised", media_type, name)
    try:
        return await asyncio.to_thread(Document.from_bytes, made)
    except (ValueError, KeyError, TypeError) as error:
        raise SandboxFailed("the process that read this document gave none", "crash") from error


async def page_image(store: Store, caller: Caller, id: str, number: int) -> bytes:
    """A page of a stored PDF, or a stored picture (number 1), as PNG; drawn anew each time, since pictures are large to keep."""
    shown = (await document(store, caller, id)).images
    if number not in (image.number for image in shown):
        raise DocumentError(f"there is no picture {number} of this file; it has {len(shown)}", "document_no_such_page")
    content = await store.open_content(caller, id)
    return await _call(store, content, DRAW_CPU_SECONDS, "render_page", number)


def weakness() -> str | None:
    """What whoever runs the server should know of how hostile documents are held on this machine; None if all is in place."""
    try:
        held = containment()
    except RopewalkError as error:
        return f"no document can be read here: {error}"
    if not held["landlock"]:
        return (
            "this kernel has no Landlock, so a process that a hostile document takes over can read what this user can: "
            "run the server as a user of its own, and keep the root key out of files"
        )
    return None


_reading: WeakValueDictionary[tuple[asyncio.AbstractEventLoop, str], asyncio.Lock] = WeakValueDictionary()


async def _kept(store: Store, content: Content) -> bytes | None:
    """What reading this content as this type gave before."""
    kept = await store.derived(content.file, "text", content.file.mime_type)
    return kept[1:] if kept is not None and kept[:1] == KEPT else None


async def _verdict(store: Store, content: Content) -> bytes:
    """The document, or an error that would be the same next time."""
    try:
        return DOCUMENT + await _call(store, content, CPU_SECONDS, "read_serialised")
    except DocumentError as error:
        said = {"reason": "", "message": str(error), "error_code": error.error_code, "details": error.details}
    except SandboxFailed as error:
        if error.reason in ("time", "killed"):  # the machine was busy, or out of memory; not the file's fault
            raise
        said = {"reason": error.reason, "message": str(error)}
    return ERROR + json.dumps(said).encode()


def _error(kept: bytes) -> DocumentError | SandboxFailed:
    said = json.loads(kept)
    if said["reason"]:
        return SandboxFailed(said["message"], said["reason"])
    return DocumentError(said["message"], said["error_code"], **said["details"])


async def _call(store: Store, content: Content, cpu_seconds: int, function: str, *arguments: int) -> bytes:
    """What a function of reading.py makes of this content."""
    file = content.file
    if file.size > MAX_BYTES:
        raise DocumentError(
            f"{file.size:,} bytes are more than the {MAX_BYTES:,} that can be read as a document", "document_too_large"
        )
    try:
        return await confined(content.chunks(), cpu_seconds, function, file.mime_type, file.filename, *arguments)
    except DamagedContent:
        await store.mark_damaged(content.name)
        raise


async def confined(
    data: bytes | AsyncIterable[bytes], cpu_seconds: int, function: str, media_type: str | None, name: str, *arguments: int
) -> bytes:
    """What a function of reading.py makes of these bytes, in a process of its own."""
    made = await call_async(
        f"ropewalk.files.reading:{function}",
        (media_type, name, *arguments),
        data=data,
        seconds=SECONDS,
        cpu_seconds=cpu_seconds,
        memory_bytes=MEMORY_BYTES,
        result_bytes=HEADER_BYTES + 4 * MAX_CHARACTERS,
        task=f"reading this {(media_type or '').partition(';')[0]} file",
    )
    if not isinstance(made, bytes):
        raise SandboxFailed("the process that read this file gave no document", "crash")
    return made
