"""Where a store of a benchmark keeps its state: a folder, or a PostgreSQL and an S3 of our own."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from backends import postgres, s3
from ropewalk.files.settings import Settings
from ropewalk.tenants.caller import Caller

BACKENDS = ("local", "postgres-s3")


@dataclass(frozen=True)
class Site:
    """The place of one store, and who uses it."""

    data: str
    database_url: str | None = None
    blobs: str | None = None
    callers: tuple[Caller, ...] = ()

    def settings(self, lease_seconds: float) -> Settings:
        return Settings(data=Path(self.data), database_url=self.database_url, blobs=self.blobs, lease_seconds=lease_seconds)


@contextlib.contextmanager
def sites(backend: str) -> Iterator[Callable[[], Site]]:
    """Makes empty places for stores, all gone afterwards; with a root key of its own in the environment."""
    os.environ["ROPEWALK_ROOT_KEY"] = base64.b64encode(os.urandom(32)).decode()
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="ropewalk-site-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if backend == "local":
            yield lambda: Site(tempfile.mkdtemp(dir=folder))
        else:
            server, bucket = stack.enter_context(postgres()), stack.enter_context(s3())
            os.environ.update(bucket.environment)
            yield lambda: Site(tempfile.mkdtemp(dir=folder), server.new_database(), bucket.new_url())
