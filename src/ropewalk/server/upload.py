"""The form of an upload on its way in, and what may stand in its fields."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request

from ropewalk.errors import BadInput
from ropewalk.files.catalog import File
from ropewalk.files.incoming import Incoming, checked_expiry
from ropewalk.files.names import stored_name
from ropewalk.files.store import Store
from ropewalk.server import body
from ropewalk.server.auth import caller_of
from ropewalk.server.multipart import Begin, Data, End, Multipart
from ropewalk.server.wire import FILES_BETA, Dialect

MAX_FIELD_BYTES = 16_384
MAX_OVERHEAD_BYTES = 1 << 20  # of a body beyond its file: headers of parts, and fields
MAX_TAGS, MAX_TAG = 32, 64
TAG = re.compile(rf"[^\x00-\x1f\x7f\ud800-\udfff]{{1,{MAX_TAG}}}")
MEDIA_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,126}/[a-z0-9][a-z0-9!#$&^_.+-]{0,126}")


class UploadForm:
    """The form of one upload on its way in: fields are gathered, the file goes on to the store as it comes."""

    fields: tuple[str, ...] = ("file", "expires_in_seconds", "tags", "tags[]")

    def __init__(self, request: Request, spoken: Dialect, stack: AsyncExitStack) -> None:
        self._request, self._spoken, self._stack = request, spoken, stack
        self._store: Store = request.app.state.store
        self._caller = caller_of(request)
        self._caller.needs("write")
        self._multipart = Multipart(request.headers.get("content-type", ""))
        self._expected = body.content_length(request)
        self._received = 0
        self._check_size(self._expected or 0)
        self._fields: list[tuple[str, bytearray]] = []
        self._part: Begin | None = None
        self._file: Begin | None = None
        self._incoming: Incoming | None = None

    async def feed(self, chunk: bytes) -> None:
        """More of the body."""
        self._received += len(chunk)
        self._check_size(self._received)
        for event in self._multipart.feed(chunk):
            match event:
                case Begin():
                    self._part = event
                    if event.name == "file":
                        await self._begin_file(event)
                    else:
                        self._begin_field(event.name)
                case Data(data):
                    assert self._part is not None
                    if self._part.name == "file":
                        assert self._incoming is not None
                        await self._incoming.write(data)
                    else:
                        self._add(data)
                case End():
                    self._part = None

    async def finish(self) -> File:
        """The file, once the form is whole."""
        self._multipart.close()
        if self._incoming is None or self._file is None:
            raise BadInput("file: there is no such part in the form; it holds the bytes to upload")
        values = [(name, _decoded(name, value)) for name, value in self._fields]
        retried = bool(re.fullmatch(r"[1-9][0-9]*", self._request.headers.get("x-stainless-retry-count", "")))
        return await self._incoming.finish(self._file.filename, self._file.media_type, retried=retried, **self.about(values))

    def about(self, values: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """What the fields say of the file, as Incoming.finish takes it."""
        return {
            "expires_in": _expiry([value for name, value in values if name == "expires_in_seconds"]),
            "tags": checked_tags([value for name, value in values if name in ("tags", "tags[]")]),
        }

    async def _begin_file(self, part: Begin) -> None:
        if self._file is not None:
            raise BadInput("file: the form has two of them; one file is uploaded at a time")
        if part.media_type is None and not self._spoken.new_lists:
            raise BadInput(f"file: its part has no Content-Type, which anthropic-beta: {FILES_BETA} requires")
        if part.media_type is not None and not MEDIA_TYPE.fullmatch(part.media_type):
            raise BadInput(f"file: '{part.media_type[:100]}' is no media type; expected one such as application/pdf")
        stored_name(part.filename, "")  # a name that cannot be kept is told before the bytes come
        self._file = part
        incoming = self._store.incoming(self._caller, self._at_most(part), self._request.state.request_id)
        self._incoming = await self._stack.enter_async_context(incoming)

    def _at_most(self, part: Begin) -> int | None:
        """How many bytes the file has, if it is the last part, as it is when the SDK writes the form; else a little more."""
        if part.offset is None:
            return 0
        if self._expected is None:
            return None
        most = max(0, self._expected - part.offset - self._multipart.closing)
        # What exceeds the limit may still be fields that follow the file.
        limit = self._store.max_file_bytes
        return limit if limit < most <= limit + MAX_FIELD_BYTES else most

    def _begin_field(self, name: str) -> None:
        if name not in self.fields:
            known = ", ".join(field for field in self.fields if field != "tags[]")
            raise BadInput(f"{name[:100]}: this is no field of an upload; expected {known}")
        self._fields.append((name, bytearray()))

    def _add(self, data: bytes) -> None:
        name, value = self._fields[-1]
        value += data
        if len(value) > MAX_FIELD_BYTES:
            raise BadInput(f"{name}: more than {MAX_FIELD_BYTES:,} bytes")

    def _check_size(self, size: int) -> None:
        most = self._store.max_file_bytes
        if size > most + MAX_OVERHEAD_BYTES:
            raise body.too_large(
                self._request, f"the body is larger than a file of {most:,} bytes, the most that is taken here"
            )


def _decoded(name: str, value: bytearray) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{name}: its value is not UTF-8") from None


def _expiry(values: Sequence[str]) -> int | None:
    if not values:
        return None
    if len(values) > 1 or not re.fullmatch(r"-?[0-9]{1,12}", values[0]):
        raise BadInput(f"expires_in_seconds: {', '.join(values)[:100]!r} is not one whole number of seconds")
    return checked_expiry(int(values[0]))


def checked_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Each tag once, in the order given."""
    if len(tags) > MAX_TAGS:
        raise BadInput(f"tags: {len(tags)} of them; at most {MAX_TAGS} are kept")
    for tag in tags:
        if not TAG.fullmatch(tag):
            raise BadInput(f"tags: {tag[:100]!a} is no tag; expected 1 to {MAX_TAG} characters, no control characters")
    return tuple(dict.fromkeys(tags))
