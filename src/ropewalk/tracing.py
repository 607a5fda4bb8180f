"""Traces and metrics by OpenTelemetry, where the standard variables name an endpoint; otherwise nothing is imported and nothing is kept.

OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 ropewalk serve

Other OTEL_* variables (headers, sampler, service name, intervals) mean what OpenTelemetry says. Spans carry ids, routes and numbers; never
a file's name, a prompt or a reply.
"""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any, ParamSpec, TypeVar

from ropewalk.errors import BadInput, MissingExtra

P = ParamSpec("P")
T = TypeVar("T")
Values = Mapping[str, Any]  # attributes of a span; those that are None are left out

ENDPOINT, PROTOCOL = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL"
SCOPE = "ropewalk"

_tracer: Any = None
_seconds: Any = None
_closing: list[Callable[[], Any]] = []


def configure(families: Callable[[], Iterator[Any]]) -> bool:
    """Starts what the environment asks for, and says whether it does; `families` gives the metrics as prometheus_client collects them."""
    global _tracer, _seconds
    traces, metrics = _wanted("TRACES"), _wanted("METRICS")
    if not (traces or metrics):
        return False
    try:
        from opentelemetry.sdk.resources import Resource
    except ImportError:
        raise MissingExtra("opentelemetry-sdk", "otel", f"telemetry (${ENDPOINT})") from None
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME") or SCOPE})
    if traces:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        _tracer = tracers.get_tracer(SCOPE)
        _closing.append(tracers.shutdown)
    if metrics:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        _seconds = meters.get_meter(SCOPE).create_histogram("http.server.request.duration", "s")
        _observe(meters.get_meter(SCOPE), families)
        _closing.append(meters.shutdown)
    return True


def close() -> None:
    """Sends what is left, and measures nothing from here on."""
    global _tracer, _seconds
    _tracer = _seconds = None
    while _closing:
        _closing.pop()()


@contextmanager
def request_span(headers: Values, told: Values) -> Iterator[Callable[[Values], None]]:
    """A request that came over HTTP, as a part of its caller's trace if it says of which; takes what is known at its end."""
    if _tracer is None:
        yield _nothing
        return
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    method = str(told.get("http.request.method"))
    with _span(method, told, context=extract(headers), kind=SpanKind.SERVER) as span:
        yield lambda more: _finish(span, method, more)


def request_seconds(seconds: float, told: Values) -> None:
    """How long a request took."""
    if _seconds is not None:
        _seconds.record(seconds, _known(told))


def traced(
    name: str, told: Callable[..., Values]
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """A span around each call of a coroutine function; `told` is given its arguments."""

    def around(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(function)
        def call(*given: P.args, **named: P.kwargs) -> Coroutine[Any, Any, T]:
            return function(*given, **named) if _tracer is None else spanned(*given, **named)

        async def spanned(*given: P.args, **named: P.kwargs) -> T:
            with _span(name, told(*given, **named)):
                return await function(*given, **named)

        return call

    return around


def traced_stream(
    name: str, told: Callable[..., Values], noted: Callable[[Any], Values | None]
) -> Callable[[Callable[P, AsyncGenerator[T, None]]], Callable[P, AsyncGenerator[T, None]]]:
    """The same around an asynchronous generator, from its first item to its end; `noted` says what an item adds."""

    def around(function: Callable[P, AsyncGenerator[T, None]]) -> Callable[P, AsyncGenerator[T, None]]:
        @functools.wraps(function)
        def call(*given: P.args, **named: P.kwargs) -> AsyncGenerator[T, None]:
            return function(*given, **named) if _tracer is None else spanned(*given, **named)

        async def spanned(*given: P.args, **named: P.kwargs) -> AsyncGenerator[T, None]:
            # Never the current span: between two items other code runs in this context.
            span = _tracer.start_span(name, attributes=_known(told(*given, **named)))
            try:
                async with aclosing(function(*given, **named)) as items:
                    async for item in items:
                        span.set_attributes(_known(noted(item) or {}))
                        yield item
            except Exception as error:
                span.set_attribute("error.type", type(error).__name__)  # what it says may quote a request
                raise
            finally:
                span.end()

        return call

    return around


@contextmanager
def _span(name: str, told: Values, **more: Any) -> Iterator[Any]:
    from opentelemetry.trace import StatusCode

    more |= {"attributes": _known(told), "record_exception": False, "set_status_on_exception": False}
    with _tracer.start_as_current_span(name, **more) as span:
        try:
            yield span
        except Exception as error:  # told by its class alone: what it says may quote a request
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR)
            raise


def _wanted(signal: str) -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get(f"OTEL_{signal}_EXPORTER", "otlp") != "otlp":
        return False
    if not (os.environ.get(ENDPOINT) or os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")):
        return False
    protocol = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL") or os.environ.get(PROTOCOL) or "http/protobuf"
    if protocol != "http/protobuf":
        raise BadInput(f"${PROTOCOL} is '{protocol}'; expected http/protobuf, at a collector usually on port 4318")
    return True


def _observe(meter: Any, families: Callable[[], Iterator[Any]]) -> None:
    """Every counter and gauge that /metrics shows, under the same name."""
    from opentelemetry.metrics import Observation

    makers = {"counter": meter.create_observable_counter, "gauge": meter.create_observable_gauge}
    for family in families():
        if family.type in makers:

            def samples(options: Any, name: str = family.name) -> list[Any]:
                found = [sample for family in families() if family.name == name for sample in family.samples]
                return [Observation(s.value, s.labels) for s in found if not s.name.endswith("_created")]

            makers[family.type](family.name, [samples], description=family.documentation)


def _finish(span: Any, method: str, more: Values) -> None:
    from opentelemetry.trace import StatusCode

    span.update_name(f"{method} {more.get('http.route')}")
    span.set_attributes(_known(more))
    if int(more.get("http.response.status_code") or 0) >= 500:
        span.set_status(StatusCode.ERROR)


def _known(values: Values) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _nothing(values: Values) -> None:
    """What is told of a span that nobody keeps."""
