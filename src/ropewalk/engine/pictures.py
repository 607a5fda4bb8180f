"""The pictures of a request, wherever they lie: their sizes for the prompt, and their pixels for an engine that has not seen them yet. No torch.

Sizes and pixels are told by a confined process. A picture is only decoded where its size is not known, or where the engine asks for it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ropewalk.chat.messages import Bytes, FileId, Image, Url
from ropewalk.chat.pictures import Pictured
from ropewalk.errors import BadInput, DocumentError
from ropewalk.files.fetch import Fetched
from ropewalk.files.pictures import LONGEST_SIDE, VERSION, Pixels, check_size, pixels_of
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

MOST = 100  # of a request
MANY, SIDE_OF_MANY = 20, 2_000  # more than so many may not be larger than this
MOST_PIXELS = 64_000_000  # of a request, as they are looked at
REMEMBERED_BYTES = 64 << 20  # of pixels
REMEMBERED_SIZES = 10_000


@dataclass(frozen=True)
class Found:
    """A picture whose size is known."""

    digest: str  # of its bytes
    about: Pixels  # without its rows
    file_id: str | None
    load: Callable[[], Awaitable[Pixels]] = field(repr=False)


class Pictures:
    """Finds pictures. What was decoded is remembered for a while: a conversation sends its pictures again with every turn."""

    def __init__(self, store: Store, fetch: Callable[[str], Awaitable[Fetched]] | None) -> None:
        """`fetch` None: addresses are refused."""
        self._store, self._fetch = store, fetch
        # By workspace, so that nobody learns from the time it takes what another has sent.
        self._sizes: OrderedDict[tuple[str, str], Pixels] = OrderedDict()
        self._decoded: OrderedDict[tuple[str, str], Pixels] = OrderedDict()
        self._bytes = 0

    async def find(self, caller: Caller, images: Sequence[Image]) -> list[Found]:
        """What is known of the pictures of a request; DocumentError for one that cannot be shown."""
        if len(images) > MOST:
            raise BadInput(f"image: {len(images)} pictures are more than the {MOST} of one request")
        found = [await self._find(caller, image) for image in images]
        for image, one in zip(images, found, strict=True):
            width, height = one.about.before
            if len(images) > MANY and max(width, height) > SIDE_OF_MANY:
                raise _too_large(width, height, SIDE_OF_MANY, f" where a request has more than {MANY} pictures")
            if one.about.scaled and not image.scaled:
                raise _too_large(width, height, LONGEST_SIDE, " where transformations.oversized_image is 'error'")
        total = sum(one.about.width * one.about.height for one in found)
        if total > MOST_PIXELS:
            raise BadInput(
                f"image: {total:,} pixels together are more than the {MOST_PIXELS:,} of one request; send smaller pictures"
            )
        return found

    async def _find(self, caller: Caller, image: Image) -> Found:
        match image.source:
            case FileId(id):
                content = await self._store.open_content(caller, id)
                check_size(content.file.size)
                digest, name, declared = content.file.sha256, content.file.filename, content.file.mime_type

                async def of_file() -> Pixels:
                    return await self._decode(caller, digest, content.chunks(), declared, name)

                return Found(digest, await self._known(caller, digest, of_file), id, of_file)
            case Url(url):
                if self._fetch is None:
                    raise BadInput(f"{url[:200]} is not fetched by this server; upload the file and send its file_id")
                fetched = await self._fetch(url)
                return await self._sent(caller, fetched.data, None, fetched.name)
            case Bytes(media_type, data):
                return await self._sent(caller, data, media_type, "image")
            case _:
                raise BadInput("image: a picture comes as base64, url or file")

    async def _sent(self, caller: Caller, data: bytes, declared: str | None, name: str) -> Found:
        check_size(len(data))
        digest = hashlib.sha256(data).hexdigest()

        async def of_bytes() -> Pixels:
            return await self._decode(caller, digest, data, declared, name)

        found = Found(digest, await self._known(caller, digest, of_bytes), None, of_bytes)
        if declared is not None and found.about.media_type != declared:
            raise BadInput(
                f"image: its bytes are {found.about.media_type}, and its media_type says {declared}; make them agree"
            )
        return found

    async def _known(self, caller: Caller, digest: str, load: Callable[[], Awaitable[Pixels]]) -> Pixels:
        """Its size, without its rows."""
        key = caller.workspace_id, digest
        if key not in self._sizes:
            await load()
        self._sizes.move_to_end(key)
        return self._sizes[key]

    async def _decode(
        self, caller: Caller, digest: str, data: bytes | AsyncIterable[bytes], declared: str | None, name: str
    ) -> Pixels:
        key = caller.workspace_id, digest
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        pixels = await pixels_of(data, declared, name)
        self._sizes[key] = replace(pixels, rows=b"")
        if len(self._sizes) > REMEMBERED_SIZES:
            self._sizes.popitem(last=False)
        if key not in self._decoded:
            self._decoded[key] = pixels
            self._bytes += len(pixels.rows)
        while self._bytes > REMEMBERED_BYTES and len(self._decoded) > 1:
            _, left = self._decoded.popitem(last=False)
            self._bytes -= len(left.rows)
        return pixels


@dataclass(frozen=True)
class Album:
    """The pictures of one request, as one model is shown them."""

    pictured: tuple[Pictured, ...] = ()
    token: str = ""  # what the chat template writes for one
    loads: tuple[Callable[[], Awaitable[Pixels]], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, found: Sequence[Found], ids: Sequence[tuple[int, ...]], token: str, sight: str) -> Album:
        """`ids`: what stands for each; `sight` names how the model looks at them."""
        pictured = [
            Pictured(
                its,
                hashlib.sha256(f"{VERSION} {sight} {one.digest}".encode()).hexdigest(),
                one.about.width,
                one.about.height,
                one.file_id,
            )
            for one, its in zip(found, ids, strict=True)
        ]
        return cls(tuple(pictured), token, tuple(one.load for one in found))

    async def pixels(self, digests: Iterable[str]) -> dict[str, bytes]:
        """The rows of those that the engine asks for."""
        loads = {picture.digest: load for picture, load in zip(self.pictured, self.loads, strict=True)}
        return {digest: (await loads[digest]()).rows for digest in dict.fromkeys(digests)}


def _too_large(width: int, height: int, most: int, where: str) -> DocumentError:
    return DocumentError(
        f"image: {width:,} by {height:,} pixels are more than {most:,} on a side, which is the most{where}; scale it down",
        "image_dimensions_too_large",
        max_side_length_pixels=most,
    )
