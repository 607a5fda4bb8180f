"""A real server on a free port, in a thread of this process: the store, the database and the sockets are all real."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
import uvloop
from playwright.sync_api import Browser
from starlette.applications import Starlette

from browser import chromium
from ropewalk.config.serving import EngineOptions, Serving
from ropewalk.engine import models
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.models.base import make_base
from ropewalk.server.app import create_app
from ropewalk.server.serve import Server, listen
from ropewalk.server.settings import ServerSettings
from ropewalk.tenants.caller import RIGHTS
from ropewalk.tenants.keys import create_key
from ropewalk.tenants.workspaces import Workspace, create_workspace

PATIENCE = 120  # seconds; a busy machine is no fault of a server


def wait_until(true: Callable[[], Any]) -> Any:
    """What is true, or not false or empty, at last."""
    late = time.monotonic() + PATIENCE
    while not (found := true()):
        if time.monotonic() > late:
            pytest.fail("it never came to be")
        time.sleep(0.05)
    return found


@dataclass
class Running:
    """A server that answers, with an admin's key."""

    url: str
    key: str
    app: Starlette
    store: Store
    loop: asyncio.AbstractEventLoop
    data: Path
    server: Server

    def stop(self) -> None:
        """What a signal to stop does."""
        self.loop.call_soon_threadsafe(self.server.stop)

    def run(self, coroutine: Any) -> Any:
        """What the coroutine returns, run in the server's own loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def workspace(self, name: str, **settings: Any) -> tuple[Workspace, str]:
        """A new workspace and a key to it."""
        made = self.run(create_workspace(self.store.database, self.store.vault, name, **settings))
        return made, self.new_key(made.id)

    def new_key(self, workspace_id: str | None, **settings: Any) -> str:
        """The secret of a new key."""
        _, secret = self.run(create_key(self.store.database, self.store.vault, workspace_id, "test", **settings))
        return secret

    def sdk(self, key: str | None = None, **settings: Any) -> anthropic.Anthropic:
        """The official client."""
        return anthropic.Anthropic(base_url=self.url, api_key=key or self.key, **{"max_retries": 0, **settings})

    def http(self, key: str | None = None, **headers: str) -> httpx.Client:
        """A plain client with a key."""
        return httpx.Client(base_url=self.url, headers={"x-api-key": key or self.key, **headers}, timeout=PATIENCE)


@contextmanager
def running(data: Path, store_settings: Settings | None = None, settings: ServerSettings | None = None) -> Iterator[Running]:
    """A server over a folder, for as long as the block lasts."""
    settings = replace(settings or ServerSettings(), port=0)
    listener = listen(settings)
    ready: list[Running | BaseException] = []
    started = threading.Event()

    async def main() -> None:
        store = await Store.open(store_settings or Settings(data=data))
        try:
            app = create_app(store, settings)
            _, key = await create_key(store.database, store.vault, None, "test", rights=RIGHTS)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            server = Server(app, settings)
            ready.append(Running(url, key, app, store, asyncio.get_running_loop(), data, server))
            started.set()
            await server._serve([listener])  # `serve` would take over signals, which only a main thread may
        finally:
            await store.close()

    def thread() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(main())
        except BaseException as error:
            ready.insert(0, error)
            started.set()
            raise

    worker = threading.Thread(target=thread, name="server")
    worker.start()
    started.wait(60)
    assert isinstance(ready[0], Running), ready
    try:
        yield ready[0]
    finally:
        if not ready[0].app.state.draining:  # twice would be at once
            ready[0].stop()
        worker.join(60)
        listener.close()
        assert not worker.is_alive()


@pytest.fixture(scope="session", autouse=True)
def patience() -> Iterator[None]:
    """A question waits as long as it takes for its model to be loaded; what happens to one that does not is a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "START_SECONDS", PATIENCE)
        yield


@pytest.fixture(scope="session")
def root_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A root key of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROPEWALK_ROOT_KEY_FILE", str(tmp_path_factory.mktemp("root") / "root.key"))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that is loaded in a moment; what it says makes no sense."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_base(folder, "qwen3_moe", size="tiny", seed=3)
    return folder


@pytest.fixture(scope="session")
def server(root_key: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The server that most tests share; each makes a workspace of its own where others' files would be in the way."""
    settings = ServerSettings(serving=Serving(engine=EngineOptions(threads=1)))
    with running(tmp_path_factory.mktemp("data"), settings=settings) as found:
        yield found


@pytest.fixture(scope="session")
def asked(server: Running, tiny: Path) -> Running:
    """The same server with one base, 'tiny', which the alias 'answers' points at: one engine for all tests that ask it."""
    server.app.state.registry.publish_base("tiny", tiny)
    server.app.state.registry.ship("answers", "tiny")
    return server


@pytest.fixture(scope="module")  # not of the session: while it runs, its thread can run no other loop
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def start(root_key: None, tmp_path: Path) -> Callable[..., Any]:
    """Starts a server with other settings: `with start(max_file_bytes=1000, settings=ServerSettings(...)) as found:`."""

    def begin(settings: ServerSettings | None = None, **of_store: Any) -> Any:
        return running(tmp_path / "data", Settings(data=tmp_path / "data", **of_store), settings)

    return begin
