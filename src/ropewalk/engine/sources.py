"""What the documents of a request say, wherever they lie: in the store, in the request itself, or at an address."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ropewalk.chat.messages import Bytes, FileId, Pieces, Source, Url
from ropewalk.engine.pictures import Pictures
from ropewalk.errors import BadInput, DocumentError
from ropewalk.files.documents import Document, Section, document, document_of
from ropewalk.files.fetch import Fetched, fetch
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

REMEMBERED_CHARACTERS = 20_000_000
SEAM = "\n"  # between the blocks of a source in blocks


@dataclass(frozen=True)
class Read:
    """A document's text, with its pages, headed parts or blocks as sections."""

    document: Document
    file_id: str | None = None


class Sources:
    """Reads sources. What came with a request is remembered for a while: a conversation sends it again with every turn."""

    def __init__(self, store: Store, fetch: Callable[[str], Awaitable[Fetched]] | None = fetch) -> None:
        """`fetch` None: addresses are refused."""
        self._store, self._fetch = store, fetch
        self.pictures = Pictures(store, fetch)
        self._recent: OrderedDict[tuple[str, str], Document] = OrderedDict()
        self._characters = 0

    async def read(self, caller: Caller, source: Source) -> Read:
        """What the source says; DocumentError where it says nothing that can be read."""
        match source:
            case FileId(id):
                read = Read(await document(self._store, caller, id), id)
            case Pieces(texts):
                read = Read(_in_blocks(texts))
            case Bytes("text/plain", data):
                read = Read(Document("text/plain", data.decode(), (), ()))
            case Bytes(media_type, data):
                read = Read(await self._sent(caller, data, media_type, "document"))
            case Url(url):
                if self._fetch is None:
                    raise BadInput(f"{url[:200]} is not fetched by this server; upload the file and send its file_id")
                found = await self._fetch(url)
                read = Read(await self._sent(caller, found.data, found.media_type, found.name))
        if not read.document.text.strip():
            what = f"File `{read.file_id}`" if read.file_id else "a document"
            raise DocumentError(
                f"{what} holds no text that could be read; what is only a picture of text is not recognised here",
                "document_without_text",
            )
        return read

    async def _sent(self, caller: Caller, data: bytes, media_type: str, name: str) -> Document:
        # By workspace, so that nobody learns from the time it takes what another has sent.
        key = (caller.workspace_id, hashlib.sha256(f"{media_type} {name} ".encode() + data).hexdigest())
        found = self._recent.get(key)
        if found is None:
            found = await document_of(data, media_type or None, name)
            if key not in self._recent:
                self._recent[key] = found
                self._characters += len(found.text)
            while self._characters > REMEMBERED_CHARACTERS:
                _, left = self._recent.popitem(last=False)
                self._characters -= len(left.text)
        else:
            self._recent.move_to_end(key)
        return found


def _in_blocks(texts: tuple[str, ...]) -> Document:
    sections: list[Section] = []
    place = 0
    for number, text in enumerate(texts, 1):
        sections.append(Section("block", number, "", place, place + len(text)))
        place += len(text) + len(SEAM)
    return Document("text/plain", SEAM.join(texts), tuple(sections), ())
