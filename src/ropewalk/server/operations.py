"""What whoever runs the server asks it: is it alive, is it ready, how much does it do."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from sqlalchemy import text
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ropewalk.files.store import Store
from ropewalk.server import logs
from ropewalk.server.openapi import STRING, operation, record
from ropewalk.server.wire import JSON

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
CHECK_SECONDS = 5.0


@dataclass
class Metrics:
    """Counters of one application; labels are routes and numbers, never tenants or names."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        labels = ("method", "route", "status")
        self.requests = Counter("ropewalk_requests", "Requests answered.", labels, registry=self.registry)
        self.seconds = Histogram(
            "ropewalk_request_seconds",
            "Seconds from first to last byte.",
            ("method", "route"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.received = Counter("ropewalk_received_bytes", "Bytes of bodies received.", ("route",), registry=self.registry)
        self.sent = Counter("ropewalk_sent_bytes", "Bytes of bodies sent.", ("route",), registry=self.registry)
        self.in_progress = Gauge("ropewalk_requests_in_progress", "Requests in progress.", registry=self.registry)
        self.draining = Gauge("ropewalk_draining", "1 once the server is stopping.", registry=self.registry)
        self.tokens = Counter("ropewalk_tokens", "Tokens of replies, by kind.", ("kind",), registry=self.registry)
        self.sweeps = Counter("ropewalk_sweeps", "Rounds of the sweep.", ("outcome",), registry=self.registry)
        ProcessCollector(registry=self.registry)


@operation(
    "the process answers; with a vLLM server behind it, whether that is well or out of reach",
    {200: record({"status": STRING, "vllm": STRING}, optional=["vllm"])},
    public=True,
)
async def health(request: Request) -> JSON:
    """GET /health"""
    # A vLLM server that is away takes no file from anybody: the process itself is well.
    well = await request.app.state.models.well()
    return JSON({"status": "ok"} | ({} if well is None else {"vllm": "well" if well else "out of reach"}))


@operation(
    "the database can be read, the blob store can be written, and the server is not stopping",
    {200: record({"status": STRING}), 503: record({"status": STRING, "reason": STRING})},
    public=True,
)
async def ready(request: Request) -> JSON:
    """GET /ready"""
    store: Store = request.app.state.store
    if request.app.state.draining:
        return JSON({"status": "not ready", "reason": "stopping"}, 503)
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            async with store.database.reading() as connection:
                await connection.execute(text("SELECT 1"))
    except Exception as error:  # whatever it is, the answer is the same, and the log has it
        return _not_ready("database", error)
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await asyncio.to_thread(store.blobs.check)
    except Exception as error:
        return _not_ready("blobs", error)
    return JSON({"status": "ready"})


@operation("counters for Prometheus", {200: STRING}, answer_media="text/plain", public=True)
async def metrics(request: Request) -> Response:
    """GET /metrics"""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _not_ready(what: str, error: Exception) -> JSON:
    logs.event("not_ready", logging.WARNING, error, reason=what)
    return JSON({"status": "not ready", "reason": what}, 503)


routes: list[BaseRoute] = [Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]
