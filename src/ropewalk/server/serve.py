"""`ropewalk serve`: one process that answers until it is told to stop, and then lets what is in progress finish."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
import uvloop
from starlette.applications import Starlette

from ropewalk import tracing
from ropewalk.errors import BadInput
from ropewalk.files.documents import weakness
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.server import logs
from ropewalk.server.app import create_app
from ropewalk.server.protocol import BoundedProtocol
from ropewalk.server.settings import ServerSettings
from ropewalk.tenants.caller import RIGHTS
from ropewalk.tenants.keys import create_key, list_keys

UNDO_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection: none is closed while a request is on its way


def serve(store_settings: Settings, settings: ServerSettings, tell: Callable[[str], None] = print) -> int:
    """Answers until SIGINT or SIGTERM."""
    _check(store_settings, settings)
    logs.configure()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(store_settings, settings, tell))
    return 0


async def _serve(store_settings: Settings, settings: ServerSettings, tell: Callable[[str], None]) -> None:
    with listen(settings) as listener:
        store = await Store.open(store_settings)
        try:
            app = create_app(store, settings)
            if tracing.configure(app.state.metrics.registry.collect):
                logs.event("telemetry")
            port = listener.getsockname()[1]
            await _greet(store, settings, f"{settings.url.rpartition(':')[0]}:{port}", tell)
            await Server(app, settings).serve(sockets=[listener])
        finally:
            await store.close()
            await asyncio.to_thread(tracing.close)  # waits for the collector
    logs.event("stopped")


def listen(settings: ServerSettings) -> socket.socket:
    """The socket that requests come to; port 0 is any free one."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(
            f"cannot listen on {settings.host} port {settings.port}: {reason}; choose another with --host and --port"
        ) from error


class Server(uvicorn.Server):
    """uvicorn, stopped in two steps: /ready says no first, and what is in progress then has its time."""

    def __init__(self, app: Starlette, settings: ServerSettings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=settings.connections,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
                ssl_certfile=settings.tls_cert,
                ssl_keyfile=settings.tls_key,
            )
        )
        self._app, self._notice = app, settings.drain_notice_seconds

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stops at a signal; uvicorn's own way would end the process by the same signal before the store is closed."""
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for name in signals:
            loop.add_signal_handler(name, self.stop)
        try:
            yield
        finally:
            for name in signals:
                loop.remove_signal_handler(name)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; and what it has cut short may still undo what it had begun, before the store is closed."""
        await super().shutdown(sockets)
        if tasks := [*self.server_state.tasks]:
            if self.force_exit:  # then uvicorn has not
                for task in tasks:
                    task.cancel()
            await asyncio.wait(tasks, timeout=UNDO_SECONDS)

    def stop(self) -> None:
        """The first time, gently; the second, at once."""
        if self._app.state.draining:
            self.should_exit = self.force_exit = True
            return
        self._app.state.draining = True
        self._app.state.metrics.draining.set(1)
        logs.event("stopping")
        asyncio.get_running_loop().call_later(self._notice, setattr, self, "should_exit", True)


async def _greet(store: Store, settings: ServerSettings, url: str, tell: Callable[[str], None]) -> None:
    """Says where the server is, and gives the first key to whoever sits before it."""
    logs.event("listening", url=url)
    if not settings.tls_cert and not _is_loopback(settings.host):
        logs.event(
            "no TLS on an address that others reach: keys and files can be read on their way; "
            "give --tls-cert and --tls-key, or put a proxy with TLS in front",
            logging.WARNING,
            url=url,
        )
    if lacking := await asyncio.to_thread(weakness):
        logs.event(lacking, logging.WARNING)
    if sys.stdout.isatty():
        tell(f"\nPages and API: {url}    (another key: ropewalk keys create --name NAME)")
    if (await list_keys(store.database, limit=1)).items:
        return
    if not sys.stdout.isatty():  # a secret does not belong in a log
        logs.event(
            "nobody has a key yet: make one with `ropewalk keys create --name NAME`, and the same --data or --database-url",
            logging.WARNING,
        )
        return
    _, secret = await create_key(store.database, store.vault, None, "first", rights=RIGHTS)
    tell(f"\nThe first key, for everything. It is shown this once:\n\n    {secret}\n")
    tell(f"Try it:\n\n    curl {shlex.quote(url + '/v1/files')} -H 'x-api-key: {secret}' -F file=@README.md\n")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(store_settings: Settings, settings: ServerSettings) -> None:
    for option, value in (
        ("--max-file-mb", store_settings.max_file_bytes),
        ("--requests-per-minute", settings.requests_per_minute),
        ("--drain-seconds", settings.drain_seconds),
    ):
        if value is not None and value <= 0:
            raise BadInput(f"{option} is {value:g}; expected more than nothing")
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise BadInput("TLS needs both --tls-cert and --tls-key")
    for path in (settings.tls_cert, settings.tls_key):
        if path is not None and not path.is_file():
            raise BadInput(f"there is no file '{path}'; TLS needs a certificate and its key in PEM")
