"""Where files are kept, and how large they may be."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from ropewalk.home import home


@dataclass(frozen=True)
class Settings:
    """The state of one installation: a folder with SQLite in it, unless URLs move parts of it elsewhere."""

    data: Path = field(default_factory=home)
    database_url: str | None = field(default_factory=lambda: os.environ.get("ROPEWALK_DATABASE_URL"))
    # postgresql+asyncpg://...; default: SQLite in the data folder
    blobs: str | None = field(default_factory=lambda: os.environ.get("ROPEWALK_BLOBS"))
    # s3://bucket/prefix, gs://, az://; default: the data folder
    max_file_bytes: int = 500_000_000
    lease_seconds: float = 120.0  # an upload not heard of for so long is dead
    keep_metadata_days: int = 30  # of expired files
    coalesce_seconds: float = 600.0  # within which a retried upload of the same file is the same file; 0: never

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.data.expanduser().resolve() / 'ropewalk.db'}"

    @property
    def blobs_at(self) -> str:
        return self.blobs or str(self.data.expanduser().resolve() / "files")
