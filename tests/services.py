"""Fixtures for what keeps its state elsewhere: a fresh database of a real PostgreSQL, a fresh prefix in a bucket that speaks S3."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("backends", Path(__file__).parents[1] / "benchmarks" / "backends.py")
backends = sys.modules.setdefault("backends", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(backends)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[backends.Postgres]:
    """A PostgreSQL for the whole session; about half a second."""
    if backends.postgres_binaries() is None:
        pytest.skip("no PostgreSQL here: pip install pgserver, or apt-get install postgresql")
    with backends.postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: backends.Postgres) -> str:
    """A new, empty database: postgresql+asyncpg://..."""
    return postgres_server.new_database()


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[backends.Bucket]:
    """An S3 for the whole session; about half a second."""
    with backends.s3() as server:
        yield server


@pytest.fixture
def bucket_url(bucket_server: backends.Bucket, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new prefix in the bucket, s3://..., which the environment says how to reach."""
    for name, value in bucket_server.environment.items():
        monkeypatch.setenv(name, value)
    return bucket_server.new_url()
