"""Fixtures of the behavioural tests: a workspace of its own for each test, and a client of the SDK that is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from anthropic import Anthropic

try:
    from seeder_client import Seeder
except ImportError:  # imported from the tests' root, as our own suite does
    from sdk.seeder_client import Seeder


@pytest.fixture(scope="session")
def seeder() -> Seeder:
    return Seeder()


@pytest.fixture
def connect(seeder: Seeder) -> Iterator[Callable[..., Anthropic]]:
    """Makes clients, which are closed at the end; without retries, so that a failure is seen as it happens."""
    clients = []

    def make(secret: str, **options: Any) -> Anthropic:
        clients.append(Anthropic(base_url=seeder.server, api_key=secret, max_retries=0, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def workspace(seeder: Seeder) -> dict[str, Any]:
    return seeder.workspace()


@pytest.fixture
def client(workspace: dict[str, Any], connect: Callable[..., Anthropic]) -> Anthropic:
    return connect(workspace["secret"])
