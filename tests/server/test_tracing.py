"""Telemetry: what a collector is sent, that it names nobody, and that without one nothing is imported."""

import asyncio
import subprocess
import sys
import threading
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client import CollectorRegistry, Counter

from ropewalk import tracing
from ropewalk.errors import BadInput

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """What was sent to a collector on this machine, as bytes by path."""

    def __init__(self):
        self.got, outer = {"/v1/traces": [], "/v1/metrics": []}, self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.got[self.path].append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def spans(self):
        parsed = [ExportTraceServiceRequest.FromString(body) for body in self.got["/v1/traces"]]
        return [span for one in parsed for each in one.resource_spans for scope in each.scope_spans for span in scope.spans]

    def metrics(self):
        parsed = [ExportMetricsServiceRequest.FromString(body) for body in self.got["/v1/metrics"]]
        found = [m for one in parsed for each in one.resource_metrics for scope in each.scope_metrics for m in scope.metrics]
        return {metric.name: metric for metric in found}


@pytest.fixture
def collector(monkeypatch):
    found = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{found.server.server_port}")
    yield found
    tracing.close()
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def registry():
    found = CollectorRegistry()
    Counter("ropewalk_tokens", "Tokens.", ("kind",), registry=found).labels("cache_read").inc(5)
    return found


def values(span):
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def test_a_request_a_reply_within_it_and_a_job_are_spans_of_ids_and_numbers(collector, registry):
    @tracing.traced_stream("reply", lambda model: {"model": model, "nothing": None}, lambda item: {"tokens": item})
    async def reply(model):
        yield 1
        yield 2

    @tracing.traced("job", lambda id: {"job.id": id})
    async def job(id):
        raise ValueError("secret words")

    async def work():
        with tracing.request_span({"traceparent": PARENT}, {"http.request.method": "POST"}) as end:
            async with aclosing(reply("house")) as items:
                assert [item async for item in items] == [1, 2]
            end({"http.route": "/v1/messages", "http.response.status_code": 500})
        with pytest.raises(ValueError, match="secret words"):
            await job("job_1")

    assert tracing.configure(registry.collect)
    asyncio.run(work())
    tracing.close()
    spans = {span.name: span for span in collector.spans()}
    request, inner, failed = spans["POST /v1/messages"], spans["reply"], spans["job"]
    assert request.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert (inner.trace_id, inner.parent_span_id) == (request.trace_id, request.span_id)
    assert values(request)["http.response.status_code"] == 500
    assert request.status.code == 2
    assert values(inner) == {"model": "house", "tokens": 2}
    assert values(failed) == {"job.id": "job_1", "error.type": "ValueError"}
    assert not any(b"secret" in body for body in collector.got["/v1/traces"])


def test_metrics_are_those_that_prometheus_is_shown(collector, registry):
    tracing.configure(registry.collect)
    tracing.request_seconds(0.5, {"http.route": "/v1/files"})
    tracing.close()
    [point] = collector.metrics()["ropewalk_tokens"].sum.data_points
    assert (point.as_double, point.attributes[0].value.string_value) == (5, "cache_read")
    [seconds] = collector.metrics()["http.server.request.duration"].histogram.data_points
    assert (seconds.count, seconds.sum) == (1, 0.5)


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "")]
)
def test_what_is_switched_off_sends_nothing(collector, registry, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    assert not tracing.configure(registry.collect)
    with tracing.request_span({}, {"http.request.method": "GET"}) as end:
        end({"http.route": "/"})
    tracing.close()
    assert collector.got == {"/v1/traces": [], "/v1/metrics": []}


def test_a_protocol_that_is_not_spoken_is_told(collector, registry, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(BadInput, match="'grpc'; expected http/protobuf"):
        tracing.configure(registry.collect)


def test_without_an_endpoint_the_server_imports_nothing_of_it():
    code = "import sys, ropewalk.server.serve; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_server_tells_of_its_requests(collector, start):
    with start() as found, found.http() as http:
        assert tracing.configure(found.app.state.metrics.registry.collect)
        http.post("/v1/files", files={"file": ("secret-name.txt", b"secret")})
        request_id = http.get("/v1/files/file_unknown").headers["request-id"]
        http.get("/health")  # answered after the spans of those before are ended
        tracing.close()
    spans = {span.name: span for span in collector.spans()}
    assert values(spans["GET /v1/files/{file_id}"]) == {
        "http.request.method": "GET",
        "http.route": "/v1/files/{file_id}",
        "http.response.status_code": 404,
        "ropewalk.request_id": request_id,
    }
    assert "POST /v1/files" in spans
    assert "ropewalk_requests" in collector.metrics()
    assert not any(b"secret" in body for bodies in collector.got.values() for body in bodies)


def test_a_reply_of_an_engine_is_a_span_within_its_request_and_its_tokens_are_counted(collector, asked):
    assert tracing.configure(asked.app.state.metrics.registry.collect)
    with asked.http() as http:
        body = {"model": "answers", "max_tokens": 4, "messages": [{"role": "user", "content": "secret words"}]}
        reply = http.post("/v1/messages", json=body, headers={"traceparent": PARENT}).json()
        http.get("/health")  # answered after the spans of those before are ended
    tracing.close()
    spans = {span.name: span for span in collector.spans()}
    request = spans["POST /v1/messages"]
    assert request.trace_id.hex() == PARENT.split("-")[1]
    within = {name: span for name, span in spans.items() if span.parent_span_id == request.span_id}
    [inner] = within.values()
    assert reply["usage"]["output_tokens"] in values(inner).values()
    assert {"ropewalk_tokens", "http.server.request.duration"} <= {*collector.metrics()}
    assert not any(b"secret" in body for bodies in collector.got.values() for body in bodies)
