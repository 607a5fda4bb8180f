"""A small hub on this machine: enough of the hub's HTTP interface to look a model up and fetch its files in ranges."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The models it offers, what it was asked for, and where it is told to hang up."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.licence = "apache-2.0"
        self.cut_after: int | None = None  # hang up after this many bytes of a large file
        self.asked: list[tuple[str, str | None]] = []  # (file, Range)
        self.url = ""

    def handle(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            name, _, revision = path.removeprefix("api/models/").partition("/revision/")
            return self._describe(request, name, revision or "main")
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        content = self.models.get(name, {}).get(file)
        if content is None or revision not in ("main", COMMIT):
            return _answer(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._file(request, file, content, body)

    def _describe(self, request: BaseHTTPRequestHandler, name: str, revision: str) -> None:
        if name not in self.models:
            return _answer(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return _answer(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for file, content in self.models[name].items():
            entry = {"rfilename": file, "size": len(content), "blobId": "0" * 40}
            if _large(file):
                entry["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
            siblings.append(entry)
        info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        info["cardData"] = {"license": self.licence}
        return _answer(request, 200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, request: BaseHTTPRequestHandler, file: str, content: bytes, body: bool) -> None:
        digest = hashlib.sha256(content) if _large(file) else hashlib.sha1(content)
        headers = {"ETag": f'"{digest.hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        span = request.headers.get("Range")
        start = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
        if not body:
            return _answer(request, 200, b"", {**headers, "Content-Length": str(len(content))})
        self.asked.append((file, span))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        rest = content[start:]
        headers["Content-Length"] = str(len(rest))
        if _large(file) and self.cut_after is not None:
            rest = rest[: self.cut_after]
        return _answer(request, 206 if start else 200, rest, headers)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port until the end of the context."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.handle(self, body=True)

        def do_HEAD(self) -> None:
            hub.handle(self, body=False)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _large(file: str) -> bool:
    return file.endswith((".safetensors", ".bin"))


def _answer(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)
    request.close_connection = True
