"""Traces: a span for a request, with spans for decoding, waiting, computing and searching.

Rules:
    OpenTelemetry is imported here and nowhere else, and this only where traces are asked for.
    The caller's decision is followed (W3C traceparent); where it made none, a share is traced.
    A request that is not traced costs a look at its metadata and a random number.
    Spans are made when the request is over, from the times that were measured anyway: its
    stages stand one after the other, though images of one request may overlap in them.
    A collector that does not answer costs spans and never a request: they are sent by a
    thread of the library's, from a bounded queue.
    No image, key or path is in a span.

Source: https://www.w3.org/TR/trace-context/ and OpenTelemetry's conventions for RPC.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator

import grpc

from serve.errors import StartError
from serve.operation.logs import printable, request_id_to_log
from serve.operation.observer import Call, Nobody
from serve.operation.options import TracingOptions

try:
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON
    from opentelemetry.trace import (
        Span,
        SpanKind,
        Status,
        StatusCode,
        get_current_span,
        set_span_in_context,
    )
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise StartError(
        "--tracing.endpoint",
        expected="OpenTelemetry",
        found=f"no {error.name}",
        mend="pip install '.[otel]', or leave it out",
    ) from error

SERVICE = "horace"
"""The service's name in the traces, unless the environment has `OTEL_SERVICE_NAME`."""

CLOSE_TIMEOUT_S = 2.0
"""How long the last spans may take to leave."""

PROPAGATED = ("traceparent", "tracestate")

TRACE_STATES = "opentelemetry.trace.span"
"""The logger whose warnings are of a tracestate that is none, with what the caller wrote in it."""

SERVER_FAULTS = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DATA_LOSS,
}
"""Codes that make a server's span one that failed, by OpenTelemetry's conventions."""


class Tracer(Nobody):
    """An observer that sends traces; `close` it."""

    def __init__(
        self,
        options: TracingOptions,
        *,
        draw: Callable[[], float] = random.random,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Send to the collector that `options` name; nothing is sent yet.

        Args:
            options: where to send, and how much.
            draw: gives numbers from 0 up to 1 to decide by.
            now_ns: nanoseconds since 1970.
        """
        assert options.endpoint is not None
        logging.getLogger(TRACE_STATES).setLevel(logging.ERROR)
        self._endpoint = endpoint = options.endpoint.removesuffix("/")
        self._ratio = options.ratio
        self._draw = draw
        self._now_ns = now_ns
        secure = endpoint.startswith("https://")
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not secure)
        resource = Resource.create({"service.name": SERVICE})
        resource = resource.merge(OTELResourceDetector().detect())  # the environment's name first
        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("horace.serve")
        self._propagator = TraceContextTextMapPropagator()

    def __repr__(self) -> str:
        return f"<Tracer {self._endpoint} ratio={self._ratio:g}>"

    def answered(self, call: Call, total_s: float) -> None:
        """Make the spans of a call, if it is to be traced."""
        parent = self._parent_of(call)
        if parent is None and self._draw() >= self._ratio:
            return
        if parent is not None and not _is_sampled(parent):
            return
        end_ns = self._now_ns()
        start_ns = end_ns - int(total_s * 1e9)
        span = self._tracer.start_span(
            call.method,
            context=parent or Context(),
            kind=SpanKind.SERVER,
            attributes=attributes_of(call),
            start_time=start_ns,
        )
        if call.code in SERVER_FAULTS:
            span.set_status(Status(StatusCode.ERROR, printable(call.message, most=300)))
        self._add_stages(span, call, start_ns, end_ns)
        span.end(end_ns)

    def close(self) -> None:
        """Send what there is, and end; a collector that does not answer is not waited for."""
        last = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        last.start()
        last.join(CLOSE_TIMEOUT_S)

    def _parent_of(self, call: Call) -> Context | None:
        """Read the caller's trace out of its metadata; None where it has none that is valid."""
        carrier = {
            key: value
            for key, value in call.metadata() or ()
            if key in PROPAGATED and isinstance(value, str)
        }
        if "traceparent" not in carrier:
            return None
        parent = self._propagator.extract(carrier, context=Context())
        return parent if get_current_span(parent).get_span_context().is_valid else None

    def _add_stages(self, span: Span, call: Call, start_ns: int, end_ns: int) -> None:
        """Add a span for each stage that took time, within the request's own."""
        context = set_span_in_context(span, Context())
        at_ns = start_ns
        for name, seconds in stages_of(call):
            until_ns = min(end_ns, at_ns + int(seconds * 1e9))
            stage = self._tracer.start_span(name, context=context, start_time=at_ns)
            if name == "inference":
                stage.set_attributes({"horace.model": call.model, "horace.images": call.images})
            stage.end(until_ns)
            at_ns = until_ns


def _is_sampled(parent: Context) -> bool:
    """Whether the caller traces its call; the other flags say nothing about that."""
    return get_current_span(parent).get_span_context().trace_flags.sampled


def attributes_of(call: Call) -> dict[str, str | int]:
    """Say what a call was."""
    attributes: dict[str, str | int] = {
        "rpc.system": "grpc",
        "rpc.method": call.method,
        "rpc.grpc.status_code": int(call.code.value[0]),
        "horace.outcome": call.code.name,
        "horace.request_id": request_id_to_log(call),
        "horace.images": call.images,
    }
    if call.model:
        attributes["horace.model"] = printable(call.model)
        attributes["horace.model_version"] = call.version
    if call.client:
        attributes["horace.client"] = printable(call.client)
    if call.embedded is not None:
        failed = len(call.embedded.errors) - len(call.embedded.vectors_ND)
        attributes["horace.failed_images"] = failed
    return attributes


def stages_of(call: Call) -> Iterator[tuple[str, float]]:
    """Name the stages that a call went through, and how long each took."""
    if (embedded := call.embedded) is not None:
        yield "decode", embedded.decode_s
        yield "queue", embedded.queue_s
        yield "inference", embedded.inference_s
    if call.search_s:
        yield "search", call.search_s
