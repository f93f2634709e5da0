"""Spans of requests for OpenTelemetry, if asked for: ``prefixstore[otel]``.

Off unless an endpoint is given by option or by ``OTEL_EXPORTER_OTLP_ENDPOINT``. A span of a request
is a child of the one its ``traceparent`` names. What must hold: spans are dropped, never waited
for; without an endpoint nothing of OpenTelemetry is imported, and a request costs one comparison.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from aiohttp import web

from prefixstore.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

logger = logging.getLogger("prefixstore")
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PATH = "/v1/traces"
SPAN = web.RequestKey("span", object)
Attribute = str | int


class Tracing:
    """Makes and exports spans, or does nothing."""

    def __init__(self, endpoint: str | None, processor: SpanProcessor | None = None) -> None:
        self._provider = self._tracer = None
        if processor is None:
            if endpoint is None and not any(os.environ.get(v) for v in ENDPOINT_VARIABLES):
                return
            processor = _exporting(endpoint)
            if processor is None:
                return
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider

        name = os.environ.get("OTEL_SERVICE_NAME", "prefixstore")
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("prefixstore")

    def begin(self, method: str, route: str, headers: Mapping[str, str]) -> Span | None:
        """A span of a request, if spans are wanted; of probes and pages there are none."""
        if self._tracer is None or not route.startswith("/v1/"):
            return None
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        parent = TraceContextTextMapPropagator().extract(carrier)
        return self._tracer.start_span(
            f"{method} {route}",
            parent,
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route},
        )

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        if self._provider is not None:
            self._provider.shutdown()


def end(span: Span, status: int, attributes: Mapping[str, Attribute]) -> None:
    """The request has been answered."""
    from opentelemetry.trace import StatusCode

    span.set_attribute("http.response.status_code", status)
    for name, value in attributes.items():
        span.set_attribute(name, value)
    if status >= 500:
        span.set_status(StatusCode.ERROR)
    span.end()


def describe(request: web.Request, **attributes: Attribute) -> None:
    """Say more of a request in its span, if it has one."""
    span = request.get(SPAN)
    if span is not None:
        for name, value in attributes.items():
            span.set_attribute(f"prefixstore.{name}", value)


def _exporting(endpoint: str | None) -> SpanProcessor | None:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        if endpoint is not None:
            raise ConfigError(
                f"--otlp needs OpenTelemetry: {error}", "pip install 'prefixstore[otel]'"
            ) from error
        logger.warning("no spans, though the environment names an endpoint: %s", error)
        return None
    if endpoint is not None and not endpoint.endswith(PATH):
        endpoint = endpoint.rstrip("/") + PATH
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))
