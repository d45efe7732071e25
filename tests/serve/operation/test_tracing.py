from __future__ import annotations

import asyncio
import logging
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from models.errors import UsageError
from models.wire import image_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.operation.logs import RequestLog
from serve.operation.observer import Call, Observers
from serve.operation.options import LogOptions, TracingOptions
from serve.operation.tracing import Tracer

ROOT = Path(__file__).parents[3]
TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """A real OTLP collector, as far as it keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []

    def Export(self, request, context):
        """Keep the spans."""
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def spans(self):
        """All spans, in the order in which they came."""
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector():
    """A collector and its address."""
    servicer = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(None).wait()


def attributes(span) -> dict[str, object]:
    """A span's attributes by name."""
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes
    }


def service_names(collector) -> list[str]:
    """The name of the service in each message that was sent."""
    return [
        next(
            pair.value.string_value
            for pair in one.resource.attributes
            if pair.key == "service.name"
        )
        for request in collector.requests
        for one in request.resource_spans
    ]


def tracer_of(collector, ratio=1.0, **options) -> Tracer:
    """A tracer that sends to the collector."""
    return Tracer(TracingOptions(endpoint=collector.address, ratio=ratio), **options)


def call(*metadata: tuple[str, str], code=grpc.StatusCode.OK) -> Call:
    """A call that is over."""
    return Call(method="Embed", arrived_s=0, metadata=lambda: metadata, code=code)


def test_a_request_of_a_traced_caller_is_a_span_of_its_trace(serving, fake, image, collector):
    """Through a real server: the caller's trace goes on, stage by stage."""
    tracing = TracingOptions(endpoint=f"http://{collector.address}", ratio=0)
    request = pb.EmbedRequest(
        images=[image_to_wire(image(1)), pb.Image(encoded=b"none")], request_id="r-1"
    )

    async def main():
        async with (
            serving(fake, tracing=tracing) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            await stub.Embed(request, metadata=(("traceparent", f"00-{TRACE}-{SPAN}-01"),))
            await stub.Embed(request)  # nobody decided, and the ratio is 0

    asyncio.run(main())
    assert len(collector.requests) == 1
    assert service_names(collector) == ["horace"]
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"Embed", "decode", "queue", "inference"}
    whole = spans["Embed"]
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert whole.parent_span_id.hex() == SPAN
    assert whole.kind == whole.SPAN_KIND_SERVER
    found = attributes(whole)
    assert found.pop("horace.client")
    assert found == {
        "rpc.system": "grpc",
        "rpc.method": "Embed",
        "rpc.grpc.status_code": 0,
        "horace.outcome": "OK",
        "horace.request_id": "r-1",
        "horace.images": 2,
        "horace.failed_images": 1,
        "horace.model": "fake",
        "horace.model_version": "1",
    }
    for name in ("decode", "queue", "inference"):
        stage = spans[name]
        assert stage.parent_span_id == whole.span_id
        assert whole.start_time_unix_nano <= stage.start_time_unix_nano
        assert stage.start_time_unix_nano <= stage.end_time_unix_nano <= whole.end_time_unix_nano


@pytest.mark.parametrize(
    ("metadata", "drawn", "traced"),
    [
        ([], 0.3, False),
        ([], 0.2, True),
        ([("traceparent", f"00-{TRACE}-{SPAN}-01")], 0.9, True),
        ([("traceparent", f"00-{TRACE}-{SPAN}-00")], 0.0, False),
        ([("traceparent", f"00-{TRACE}-{SPAN}-02")], 0.0, False),
        ([("traceparent", f"00-{TRACE}-{SPAN}-03")], 0.9, True),
        ([("traceparent", "no trace at all")], 0.9, False),
        ([("traceparent", "no trace at all")], 0.1, True),
        ([("traceparent-bin", b"\x00")], 0.9, False),
    ],
)
def test_the_caller_decides_and_where_it_does_not_a_share_is_traced(
    collector, metadata, drawn, traced
):
    """W3C's flag is followed, beside level 2's; what is no traceparent is none."""
    tracer = tracer_of(collector, ratio=0.25, draw=lambda: drawn)
    tracer.answered(call(*metadata), 0.1)
    tracer.close()
    assert len(collector.spans) == traced


def test_a_tracestate_that_is_none_is_not_written_to_the_log(collector, caplog):
    """It is a caller's own metadata; the trace goes on without it."""
    tracer = tracer_of(collector)
    state = ("tracestate", "INFO all is well\x9b2J")
    tracer.answered(call(("traceparent", f"00-{TRACE}-{SPAN}-01"), state), 0.1)
    tracer.close()
    assert [span.trace_id.hex() for span in collector.spans] == [TRACE]
    assert caplog.text == ""


def test_the_log_and_the_trace_have_one_id_of_a_request_that_was_not_named(collector, caplog):
    """Or nobody finds the one by the other."""
    caplog.set_level(logging.INFO, "horace.request")
    failed, tracer = call(code=grpc.StatusCode.INTERNAL), tracer_of(collector)
    Observers([RequestLog(LogOptions()), tracer]).answered(failed, 0.1)
    tracer.close()
    ids = [attributes(span)["horace.request_id"] for span in collector.spans]
    assert ids == [record.fields["request_id"] for record in caplog.records]


def test_the_environment_names_the_service(collector, monkeypatch):
    """By OpenTelemetry's own variable, for which there is no option."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "images")
    tracer = tracer_of(collector)
    tracer.answered(call(), 0.1)
    tracer.close()
    assert service_names(collector) == ["images"]


def test_the_servers_faults_are_errors_of_the_span_and_the_callers_are_not(collector):
    """As OpenTelemetry has it for the server's side of a call."""
    tracer = tracer_of(collector)
    for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED):
        failed = call(code=code)
        failed.message = "it says why\nin two lines"
        tracer.answered(failed, 0.1)
    tracer.close()
    internal, full = collector.spans
    assert internal.status.code == internal.status.STATUS_CODE_ERROR
    assert internal.status.message == "it says why?in two lines"
    assert full.status.code == full.status.STATUS_CODE_UNSET
    assert attributes(full)["horace.outcome"] == "RESOURCE_EXHAUSTED"


def test_a_span_lasts_as_long_as_the_request(collector):
    """From the time that is given, whatever the clock of requests says."""
    tracer = tracer_of(collector, now_ns=lambda: 5_000_000_000)
    searched = call()
    searched.search_s = 0.5
    tracer.answered(searched, 2.0)
    tracer.close()
    search, whole = collector.spans
    assert (whole.start_time_unix_nano, whole.end_time_unix_nano) == (3 * 10**9, 5 * 10**9)
    assert search.name == "search"
    assert search.end_time_unix_nano - search.start_time_unix_nano == 5 * 10**8


def test_a_collector_that_is_not_there_holds_nothing_up(serving, fake, image, caplog):
    """Requests are answered, and the server stops in time."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        tracing = TracingOptions(endpoint=f"127.0.0.1:{nobody.getsockname()[1]}", ratio=1)

        async def main():
            async with (
                serving(fake, tracing=tracing) as server,
                grpc.aio.insecure_channel(server.address) as channel,
            ):
                stub = pb_grpc.HoraceStub(channel)
                for _ in range(50):
                    await stub.Embed(pb.EmbedRequest(images=[image_to_wire(image(1))]))
                await asyncio.wait_for(server.drain(limit_s=5), 30)

        asyncio.run(main())
    assert fake.computed == [1] * 50


def test_without_the_extra_the_start_is_refused_in_one_line(make_bundle):
    """No traceback: which extra, and how to install it."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import runpy; runpy.run_module('serve', run_name='__main__')"
    )
    argv = [sys.executable, "-c", code, "--port", "0", "--bundle", str(make_bundle().path)]
    argv += ["--tracing.endpoint", "localhost:4317"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.fullmatch(
        r"python -m serve: --tracing\.endpoint: expected OpenTelemetry, found no opentelemetry\S*; "
        r"pip install '\.\[otel\]', or leave it out\n",
        done.stderr,
    ), done.stderr


@pytest.mark.parametrize(
    "endpoint", ["collector", "ftp://c:1", "c:port", "http://c:4317/v1/traces"]
)
def test_an_address_that_is_none_is_refused(endpoint):
    """The options check themselves."""
    with pytest.raises(UsageError, match=r"expected \[http://\|https://\]HOST:PORT"):
        TracingOptions(endpoint=endpoint)
    for good in ("c:4317", "http://c:4317", "https://10.0.0.1:4317/", "[::1]:4317"):
        assert TracingOptions(endpoint=good).endpoint == good


@pytest.mark.parametrize("form", ["{}", "{}/", "http://{}", "http://{}/"])
def test_every_form_of_an_address_leads_to_the_collector(collector, form):
    """As the options allow it."""
    tracer = Tracer(TracingOptions(endpoint=form.format(collector.address), ratio=1))
    tracer.answered(call(), 0.1)
    tracer.close()
    assert len(collector.spans) == 1


def test_a_share_is_a_share():
    """Between none and all."""
    with pytest.raises(UsageError, match=r"--tracing\.ratio: expected 0 to 1, found 2"):
        TracingOptions(ratio=2)
