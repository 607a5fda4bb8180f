"""Resumable uploads over HTTP: tus 1.0 (https://tus.io/protocols/resumable-upload), for what is too long for one request.

The upload's `Upload-Metadata` may name filename, filetype, expires_in_seconds and tags (separated by commas). Once every byte has come,
its answers carry the file's id as `ropewalk-file-id`; until then they do not.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ropewalk.errors import BadInput, ResumeFailed, TooLarge
from ropewalk.files import resumable
from ropewalk.files.incoming import checked_expiry
from ropewalk.files.parts import Resumable
from ropewalk.files.resumable import ALGORITHMS, Checksum
from ropewalk.files.store import Store
from ropewalk.server import body
from ropewalk.server.auth import caller_of
from ropewalk.server.openapi import STRING, header, operation
from ropewalk.server.upload import MEDIA_TYPE, checked_tags

VERSION = "1.0.0"
PATH = "/v1/files/resumable"
BYTES = "application/offset+octet-stream"
FILE_ID = "ropewalk-file-id"
KEYS = ("filename", "name", "filetype", "type", "expires_in_seconds", "tags")  # of Upload-Metadata; others are let pass
MAX_METADATA = 16_384
NUMBER = re.compile(r"[0-9]{1,18}")

TUS = header("tus-resumable", {"const": VERSION}, "the version of the protocol")
BODY = {BYTES: {"type": "string", "format": "binary"}}


@operation("what this server knows of tus", {204: None})
async def options(request: Request) -> Response:
    """OPTIONS /v1/files/resumable"""
    return _answer(
        204,
        {
            "tus-version": VERSION,
            "tus-extension": "creation,creation-with-upload,expiration,checksum,termination",
            "tus-max-size": str(_store(request).max_file_bytes),
            "tus-checksum-algorithm": ",".join(ALGORITHMS),
        },
    )


@operation(
    "begin a resumable upload; its address is in Location",
    {201: None},
    parameters=[
        TUS,
        header("upload-length", {"type": "integer", "minimum": 0}, "how many bytes the file has"),
        header("upload-metadata", STRING, "filename, filetype, expires_in_seconds, tags, each with its value in base64"),
    ],
    media=BODY,
)
async def create(request: Request) -> Response:
    """POST /v1/files/resumable"""
    _check_version(request)
    store, known = _store(request), _metadata(request)
    media_type = known.get("filetype") or known.get("type") or None
    if media_type is not None and not MEDIA_TYPE.fullmatch(media_type):
        raise BadInput(f"filetype: '{media_type[:100]}' is no media type; expected one such as application/pdf")
    expires_in = known.get("expires_in_seconds")
    if expires_in is not None and not NUMBER.fullmatch(expires_in):
        raise BadInput(f"expires_in_seconds: {expires_in[:40]!r} is not a whole number of seconds")
    upload = await resumable.create(
        store,
        caller_of(request),
        _number(request, "upload-length"),
        known.get("filename") or known.get("name"),
        media_type,
        expires_in=checked_expiry(int(expires_in)) if expires_in is not None else None,
        tags=checked_tags([tag.strip() for tag in known.get("tags", "").split(",") if tag.strip()]),
    )
    if request.headers.get("content-type") == BYTES:
        upload = await _append(request, upload.id, 0)
    upload = await resumable.finish(store, upload, request.state.request_id)
    return _answer(201, {"location": f"{PATH}/{upload.id}"}, upload)


@operation("how far an upload has come", {200: None}, parameters=[TUS])
async def head(request: Request) -> Response:
    """HEAD /v1/files/resumable/{upload_id}"""
    _check_version(request)
    upload = await resumable.show(_store(request), caller_of(request), _id(request))
    upload = await resumable.finish(_store(request), upload, request.state.request_id)  # if a crash came before
    return _answer(200, {"upload-length": str(upload.length), "cache-control": "no-store"}, upload)


@operation(
    "add bytes to an upload",
    {204: None},
    parameters=[
        TUS,
        header("upload-offset", {"type": "integer", "minimum": 0}, "where these bytes belong: how far the upload has come"),
        header("upload-checksum", STRING, f"{' or '.join(ALGORITHMS)}, and the digest in base64"),
    ],
    media=BODY,
)
async def patch(request: Request) -> Response:
    """PATCH /v1/files/resumable/{upload_id}"""
    _check_version(request)
    if request.headers.get("content-type") != BYTES:
        raise ResumeFailed(f"Content-Type is '{request.headers.get('content-type', '')[:100]}'; expected {BYTES}", 415)
    upload = await _append(request, _id(request), _number(request, "upload-offset"))
    return _answer(204, {}, await resumable.finish(_store(request), upload, request.state.request_id))


@operation("end an upload; a file that it has become stays", {204: None}, parameters=[TUS])
async def terminate(request: Request) -> Response:
    """DELETE /v1/files/resumable/{upload_id}"""
    _check_version(request)
    await resumable.terminate(_store(request), caller_of(request), _id(request))
    return _answer(204, {})


@operation("one of the other methods, named in a header, from where only GET and POST can be sent", {200: None, 204: None})
async def overridden(request: Request) -> Response:
    """POST /v1/files/resumable/{upload_id}, from where only GET and POST can be sent."""
    handlers: dict[str, Callable[[Request], Coroutine[Any, Any, Response]]] = {
        "PATCH": patch,
        "DELETE": terminate,
        "HEAD": head,
    }
    method = request.headers.get("x-http-method-override", "").upper()
    if method not in handlers:
        raise BadInput(f"X-HTTP-Method-Override: '{method[:40]}'; a POST here is expected to say PATCH, DELETE or HEAD")
    return await handlers[method](request)


async def _append(request: Request, id: str, offset: int) -> Resumable:
    store = _store(request)
    coming = body.content_length(request)
    if coming is not None and offset + coming > store.max_file_bytes:
        raise TooLarge(f"a file may have at most {store.max_file_bytes:,} bytes here")
    return await resumable.append(store, caller_of(request), id, offset, body.read(request), _checksum(request))


def _check_version(request: Request) -> None:
    if request.headers.get("tus-resumable") != VERSION:
        error = ResumeFailed(f"tus-resumable: '{request.headers.get('tus-resumable', '')[:40]}'; expected {VERSION}", 412)
        error.headers = {"tus-version": VERSION}
        raise error


def _checksum(request: Request) -> Checksum | None:
    text = request.headers.get("upload-checksum")
    if text is None:
        return None
    algorithm, _, encoded = text.partition(" ")
    digest = _decoded(encoded.strip(), "Upload-Checksum")
    if algorithm not in ALGORITHMS or len(digest) != hashlib.new(algorithm).digest_size:
        raise BadInput(
            f"Upload-Checksum: '{text[:100]}'; expected {' or '.join(ALGORITHMS)}, a space, and the digest in base64"
        )
    return algorithm, digest


def _metadata(request: Request) -> dict[str, str]:
    text = request.headers.get("upload-metadata", "")
    if len(text) > MAX_METADATA:
        raise BadInput(f"Upload-Metadata: more than {MAX_METADATA:,} characters")
    found = {}
    for pair in filter(None, (pair.strip() for pair in text.split(","))):
        key, _, value = pair.partition(" ")
        if key in found:
            raise BadInput(f"Upload-Metadata: '{key[:60]}' stands there twice")
        if key in KEYS:
            try:
                found[key] = _decoded(value, f"Upload-Metadata: {key}").decode("utf-8")
            except UnicodeDecodeError:
                raise BadInput(f"Upload-Metadata: the value of {key} is not UTF-8") from None
    return found


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadInput(f"{where}: '{text[:60]}' is not base64") from None


def _number(request: Request, name: str) -> int:
    text = request.headers.get(name, "")
    if not NUMBER.fullmatch(text):
        raise BadInput(f"{name}: '{text[:40]}' is not a whole number; it is required")
    return int(text)


def _answer(status: int, headers: Mapping[str, str], upload: Resumable | None = None) -> Response:
    more = {"tus-resumable": VERSION}
    if upload is not None:
        expires = format_datetime(datetime.fromtimestamp(upload.expires_at // 1_000_000, UTC), usegmt=True)
        more |= {"upload-offset": str(upload.received), "upload-expires": expires}
        if upload.file_id is not None:
            more[FILE_ID] = upload.file_id
    return Response(status_code=status, headers=more | dict(headers))


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _id(request: Request) -> str:
    id: str = request.path_params["upload_id"]
    return id


routes: list[BaseRoute] = [
    Route(PATH, options, methods=["OPTIONS"]),
    Route(PATH, create, methods=["POST"]),
    Route(f"{PATH}/{{upload_id}}", head, methods=["HEAD"]),
    Route(f"{PATH}/{{upload_id}}", patch, methods=["PATCH"]),
    Route(f"{PATH}/{{upload_id}}", terminate, methods=["DELETE"]),
    Route(f"{PATH}/{{upload_id}}", overridden, methods=["POST"]),
]
