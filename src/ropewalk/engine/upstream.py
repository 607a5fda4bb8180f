"""Another server over HTTP: asked with its key, asked again only before it has begun to answer, its errors told in our own terms.

The key comes from the environment at every question; it is kept in no object, and blanked out of what the other server says.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from ropewalk.config.serving import Remote
from ropewalk.engine.event_stream import EventStream
from ropewalk.errors import (
    BadInput,
    OutputError,
    Overloaded,
    RateLimited,
    RopewalkError,
    TooLarge,
    UpstreamFailed,
    UpstreamTimedOut,
    UpstreamUnknown,
)

TRIES = 3
PAUSE_SECONDS = 0.5  # before the second try, twice as long before the third; who asks to wait longer is not asked again
AGAIN = frozenset({500, 502, 503, 529})
SILENCE_SECONDS = 600.0  # a long prompt is read without a word
CONNECT_SECONDS = 10.0
MOST_ERROR_BYTES = 65_536
MOST_TOLD = 500  # characters of what the other server says
MOST_ANSWER_BYTES = 32 << 20
FILE_ID = re.compile(r"[A-Za-z0-9_-]{1,256}")  # it becomes a part of an address


def http_client(silence: float = SILENCE_SECONDS) -> httpx.AsyncClient:
    """Connections that all remotes share; redirects are not followed, since they would carry the key elsewhere."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    timeout = httpx.Timeout(silence, connect=CONNECT_SECONDS)
    return httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False)


@dataclass(frozen=True)
class Upstream:
    """The server behind one name."""

    name: str  # of the model, here
    remote: Remote
    http: httpx.AsyncClient

    async def ask(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """A whole answer."""
        async with self._opened("POST", path, content=await _json(body)) as response:
            return await self._whole(response)

    async def get(self, path: str) -> Mapping[str, Any]:
        """A whole answer to a question without a body; a path that begins with / is of the server itself, not of its /v1."""
        async with self._opened("GET", path) as response:
            return await self._whole(response)

    async def ping(self, path: str) -> None:
        """Returns where it is answered with 200, once."""
        async with self._opened("GET", path, tries=1):
            return

    async def tell(self, path: str, body: Mapping[str, Any]) -> None:
        """Has something done that answers with nothing to be read; asked once."""
        async with self._opened("POST", path, content=await _json(body), tries=1):
            return

    async def upload(self, filename: str, data: bytes, media_type: str) -> str:
        """The id that the other server gives a file; asked once, since nobody knows whether a failed upload left one."""
        sent = {"file": (filename, data, media_type)}
        async with self._opened("POST", "files", files=sent, tries=1) as response:
            id = (await self._whole(response)).get("id")
        if not isinstance(id, str) or not FILE_ID.fullmatch(id):
            raise self.failed("took a file and gave no id for it")
        return id

    async def delete(self, id: str) -> None:
        """Deletes an uploaded file; nothing where it is not there any more."""
        try:
            async with self._opened("DELETE", f"files/{id}") as response:
                await self._whole(response)
        except UpstreamUnknown:
            pass

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
        """The data of the events of an answer; closing the iterator closes the connection."""
        events = EventStream()
        async with self._opened("POST", path, content=await _json(body)) as response:
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise self.failed("does not stream its answers, which is the only way it is asked here")
            async with self._told():
                async for chunk in response.aiter_bytes():
                    for data in events.feed(chunk):
                        yield data
            for data in events.finish():
                yield data

    def object(self, data: bytes) -> Mapping[str, Any]:
        """A JSON object."""
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self.failed("said what is no JSON object; its address or its api may be another than models.yml says")
        return found

    def refuse_error(self, answer: Mapping[str, Any]) -> None:
        """Raises the error that an answer is, if it is one: in the middle of a stream, its status was 200."""
        error = answer.get("error")
        if not error:
            return
        inner = error if isinstance(error, dict) else {}
        code = inner.get("code")
        status = KINDS.get(str(inner.get("type"))) or (code if isinstance(code, int) and 400 <= code < 600 else 500)
        raise self._error(status, _message(answer), None)

    def failed(self, what: str) -> UpstreamFailed:
        """The error that the other server did not do what it must."""
        return UpstreamFailed(f"the server behind '{self.name}' {what}")

    # -- HTTP

    async def _whole(self, response: httpx.Response) -> Mapping[str, Any]:
        async with self._told():
            answer = self.object(await _first_bytes(response, MOST_ANSWER_BYTES))
        self.refuse_error(answer)
        return answer

    @asynccontextmanager
    async def _opened(self, method: str, path: str, *, tries: int = TRIES, **body: Any) -> AsyncIterator[httpx.Response]:
        """`body`: as httpx takes it."""
        headers = self._headers() | ({"content-type": "application/json"} if "content" in body else {})
        for left in reversed(range(tries)):
            pause = PAUSE_SECONDS * 2.0 ** (tries - 1 - left)
            request = self.http.build_request(method, self._address(path), headers=headers, **body)
            try:
                async with self._told():
                    response = await self.http.send(request, stream=True)
            except UpstreamTimedOut:
                raise
            except UpstreamFailed:
                if not left:
                    raise
            else:
                if response.status_code == 200:
                    break
                try:
                    async with self._told():
                        said = await _first_bytes(response, MOST_ERROR_BYTES)
                finally:
                    await response.aclose()
                wait = retry_after(response.headers)
                if not left or response.status_code not in AGAIN or (wait or 0) > pause:
                    raise self._error(response.status_code, _message(said), wait)
            await asyncio.sleep(pause)
        try:
            yield response
        finally:
            await response.aclose()

    @asynccontextmanager
    async def _told(self) -> AsyncIterator[None]:
        """Failures of the connection, in our terms."""
        try:
            yield
        except httpx.ConnectTimeout:
            raise self.failed(f"cannot be reached: no connection within {CONNECT_SECONDS:g} seconds") from None
        except httpx.TimeoutException:
            raise UpstreamTimedOut(f"the server behind '{self.name}' was silent for too long") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            told = "cannot be reached" if isinstance(error, httpx.ConnectError) else "broke the connection off"
            raise self.failed(f"{told} ({type(error).__name__})") from None

    def _address(self, path: str) -> str:
        base = self.remote.url.rstrip("/")
        if path.startswith("/"):
            return base.removesuffix("/v1") + path
        versioned = base.endswith("/v1") if self.remote.api == "anthropic" else bool(urlsplit(base).path)
        return f"{base}/{path}" if versioned else f"{base}/v1/{path}"

    def _key(self) -> str:
        name = self.remote.key_env
        if not name:
            return ""
        key = os.environ.get(name, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise OutputError(
                f"the key of '{self.name}' is to come from the environment variable {name}, which holds none; set it and start anew"
            )
        return key

    def _headers(self) -> dict[str, str]:
        headers, key = {"user-agent": "ropewalk"}, self._key()
        if self.remote.api == "anthropic":
            headers["anthropic-version"] = "2023-06-01"
            if key:
                headers["x-api-key"] = key
        # Servers that are not Anthropic's speak its Messages and yet read keys as OpenAI's clients send them.
        if key and not (urlsplit(self.remote.url).hostname or "").endswith("anthropic.com"):
            headers["authorization"] = f"Bearer {key}"
        return headers

    # -- errors

    def _error(self, status: int, said: str, wait: float | None) -> RopewalkError:
        key = self._key()
        said = (said.replace(key, "[key]") if key else said)[:MOST_TOLD]
        told = f"the server behind '{self.name}' says: {said}" if said else f"the server behind '{self.name}' answered {status}"
        match status:
            case 401 | 402 | 403:  # whose key it is, is nothing to whoever asks
                return self.failed(f"refuses the key of this server ({self.remote.key_env or 'none is configured'})")
            case 429:
                return RateLimited(told, 1.0 if wait is None else wait)
            case 503 | 529:
                error = Overloaded(told)
                error.retry_after = error.retry_after if wait is None else wait
                return error
            case 400 | 422:
                return BadInput(told)
            case 413:
                return TooLarge(told)
            case 404 | 405 | 501:
                return UpstreamUnknown(told)
            case 408 | 504:
                return UpstreamTimedOut(told)
            case _:
                return UpstreamFailed(told if status >= 400 else f"{told}, which is no answer to a question")


KINDS = {  # of errors in the middle of a stream -> the status that they would have had
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, as a server asks for; None where it does not."""
    said, thousandth = headers.get("retry-after", ""), headers.get("retry-after-ms", "")
    for text, unit in ((thousandth, 0.001), (said, 1.0)):
        try:
            seconds = float(text) * unit
        except ValueError:
            continue
        if 0 <= seconds < 1e9:
            return seconds
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return None


async def _json(body: Mapping[str, Any]) -> bytes:
    return (await asyncio.to_thread(json.dumps, body)).encode()


async def _first_bytes(response: httpx.Response, most: int) -> bytes:
    found = b""
    async for chunk in response.aiter_bytes():
        found += chunk
        if len(found) > most:
            break
    return found[:most]


def _message(said: bytes | Mapping[str, Any]) -> str:
    """The sentence in an error's body; '' where there is none."""
    if isinstance(said, bytes):
        try:
            said = json.loads(said)
        except ValueError:
            return ""
    if not isinstance(said, Mapping):
        return ""
    error = said.get("error")
    found = [error.get("message")] if isinstance(error, dict) else [error]
    found += [said.get("message"), said.get("detail")]
    return next((text for text in found if isinstance(text, str)), "")
