"""Files that one process gives another the keys of: the bytes of these files can be read there, and nothing else of the store.

grant()    in the process that has the root key -> a line for the other's standard input
accept()   in the other: from then on `open_local` means these files, and when the input ends, this process ends

What is given are data keys, never the root key, and never a plain byte.
"""

from __future__ import annotations

import base64
import builtins
import io
import json
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from ropewalk.errors import BadInput, NotFound
from ropewalk.files import local
from ropewalk.files.blobs import open_blobs
from ropewalk.files.catalog import File
from ropewalk.files.content import Content
from ropewalk.files.local import LocalFiles, SealedFile
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller
from ropewalk.vault import CHUNK

T = TypeVar("T")


async def grant(store: Store, caller: Caller, ids: Sequence[str]) -> bytes:
    """What `accept` reads: the caller's files of these ids, and where their bytes lie."""
    granted = []
    for id in dict.fromkeys(ids):
        content = await store.open_content(caller, id)
        file = {field.name: getattr(content.file, field.name) for field in fields(File)}
        granted.append({"file": file, "name": content.name, "key": base64.b64encode(content.key).decode()})
    return json.dumps({"blobs": store.settings.blobs_at, "files": granted}).encode() + b"\n"


def accept(stream: BinaryIO) -> bytes:
    """Takes files from the first line of a stream, and gives that line; a thread waits for its end, which is the end of whoever holds
    its other side."""
    line = stream.readline()
    try:
        told = json.loads(line)
        contents = {}
        for one in told["files"]:
            file = File(**{**one["file"], "tags": tuple(one["file"]["tags"])})
            contents[file.id] = Content(file, open_blobs(told["blobs"]), one["name"], base64.b64decode(one["key"]))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            "the standard input holds no granted files; leave --granted to the server, which says what they are"
        ) from error
    local.granted = GrantedFiles(contents)
    threading.Thread(target=_end_with, args=(stream.fileno(),), name="parent", daemon=True).start()
    return line


class GrantedFiles(LocalFiles):
    """As the files of this machine, but only these, and only to be read."""

    def __init__(self, contents: dict[str, Content]) -> None:
        super().__init__()
        self._contents = contents

    def show(self, id: str) -> File:
        return self._content(id).file

    def list(self) -> builtins.list[File]:
        return [content.file for content in self._contents.values()]

    def open(self, id: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(SealedFile(self._content(id)), CHUNK))

    def register_path(self, id: str, kind: str, *paths: Path) -> None:
        """Whoever has granted the file has registered the folder that all of this is made in."""

    def run(self, work: Callable[[Store, Caller], Awaitable[T]]) -> T:
        raise NotFound("this process was given some files to read; it has no store")

    def _content(self, id: str) -> Content:
        if id not in self._contents:
            raise NotFound(f"File `{id[:128]}` not found.")
        return self._contents[id]


def _end_with(input: int) -> None:
    while os.read(input, 1):  # not through the stream, whose lock an ending interpreter would wait for
        pass
    if os.getpgid(0) == os.getpid():  # what this process has started reads the same files
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
