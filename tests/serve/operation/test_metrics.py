from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import onnxruntime as ort
import pytest

from models.errors import UsageError
from models.wire import image_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.client import AsyncClient, Client, RetryPolicy
from serve.errors import UnauthenticatedError
from serve.http.options import HttpOptions
from serve.http.protocol import PatientProtocol
from serve.operation import endpoint
from serve.operation.endpoint import listen_on
from serve.operation.metrics import as_triton_types_it, count_threads, cpu_throttled_s
from serve.operation.options import MetricsOptions
from serve.operation.state import turns
from serve.security import keys
from serve.security.options import KeyOptions
from tests.ports import free_port

ROOT = Path(__file__).parents[3]

TRITON_NAMES = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_pending_request_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
}


def fetch(url: str) -> tuple[int, str]:
    """Status and text of a page."""
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def get(server, page: str) -> tuple[int, str]:
    """A page of a server's metrics port, asked for as Prometheus would."""
    return await asyncio.to_thread(fetch, f"http://{server.operation.address}{page}")


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Values by name and labels.

    The library's parser renames counters without `_total`, such as Triton's.
    """
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, labels, value = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line).groups()
            pairs = re.findall(r'(\w+)="([^"]*)"', labels or "")
            values[name, tuple(sorted(pairs))] = float(value)
    return values


def test_a_scrape_says_what_happened(serving, fake, image):
    """Over HTTP, without a key: requests, images, batches, times, by model and version."""

    async def main():
        async with (
            serving(fake, metrics=MetricsOptions(port=0)) as server,
            AsyncClient(server.address, retry=RetryPolicy(attempts=1)) as client,
        ):
            before = samples((await get(server, "/metrics"))[1])
            await client.embed([image(1), image(2)])
            await client.embed([image(3), b"no image"])
            fake.failures.append(RuntimeError("no kernel"))
            with pytest.raises(Exception, match="encoder failed"):
                await client.embed([image(4)])
            with pytest.raises(Exception, match="expected 'fake'"):
                await client.embed([image(4)], model="other")
            status, text = await get(server, "/metrics")
            return before, status, text

    before, status, text = asyncio.run(main())
    assert status == 200
    after = samples(text)
    version = (("model", "fake"), ("version", "1"))

    def gained(name, *labels):
        return after[name, labels] - before.get((name, labels), 0)

    assert gained("nv_inference_request_success", *version) == 2
    assert gained("nv_inference_count", *version) == 3
    assert gained("nv_inference_exec_count", *version) == 2
    failed = (("model", "fake"), ("reason", "BACKEND"), ("version", "1"))
    assert gained("nv_inference_request_failure", *failed) == 1
    assert after["nv_inference_pending_request_count", version] == 0
    assert gained("horace_batch_images_sum", ("model", "fake")) == 3
    assert gained("horace_embed_seconds_count", ("model", "fake")) == 2
    faults = (("fault", "unsupported_format"), ("model", "fake"))
    assert gained("horace_image_failures_total", *faults) == 1
    assert gained("horace_requests_total", ("code", "OK"), ("method", "Embed")) == 2
    assert gained("horace_requests_total", ("code", "INTERNAL"), ("method", "Embed")) == 1
    assert gained("horace_requests_total", ("code", "NOT_FOUND"), ("method", "Embed")) == 1
    assert gained("horace_request_seconds_count", ("method", "Embed")) == 2
    info = (("dim", "4"), ("fingerprint", "f" * 64), ("model", "fake"), ("version", "1"))
    assert after["horace_model_info", info] == 1
    assert after["horace_ready", ()] == 1
    assert after["process_threads", ()] > 3
    assert after["process_open_fds", ()] > 3
    assert after["process_resident_memory_bytes", ()] > 1 << 20


def test_names_and_types_are_tritons(serving, fake):
    """A dashboard made for Triton finds every name, and counters are counters."""

    async def main():
        async with serving(fake, metrics=MetricsOptions(port=0)) as server:
            return (await get(server, "/metrics"))[1]

    text = asyncio.run(main())
    types = dict(
        line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE nv_inference")
    )
    assert set(types) == TRITON_NAMES
    gauges = {"nv_inference_pending_request_count"}
    assert {name for name, kind in types.items() if kind == "gauge"} == gauges
    assert {name for name, kind in types.items() if kind == "counter"} == TRITON_NAMES - gauges


def test_what_callers_write_makes_no_series(serving, fake, image):
    """Names, ids and headers of a caller's own choosing, a thousand of each: not one more."""
    picture = image_to_wire(image(1))

    async def main():
        async with (
            serving(fake, metrics=MetricsOptions(port=0)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)

            async def ask(n: int) -> None:
                request = pb.EmbedRequest(
                    model=f"model-{n}" if n % 2 else "", images=[picture], request_id=f"id-{n}"
                )
                metadata = (("x-request-id", f"id-{n}"), (f"x-{n}", "x"))
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await stub.Embed(request, metadata=metadata)

            await asyncio.gather(*map(ask, range(2)))
            before = samples((await get(server, "/metrics"))[1])
            for start in range(0, 1000, 50):
                await asyncio.gather(*map(ask, range(start, start + 50)))
            return before, samples((await get(server, "/metrics"))[1])

    before, after = asyncio.run(main())
    assert set(after) == set(before)
    method = ("method", "Embed")
    assert after["horace_requests_total", (("code", "NOT_FOUND"), method)] == 501
    assert after["horace_requests_total", (("code", "OK"), method)] == 501


def test_no_series_is_there_twice(serving, fake):
    """Prometheus would drop one of two, and not say which."""

    async def main():
        async with serving(fake, metrics=MetricsOptions(port=0)) as server:
            return (await get(server, "/metrics"))[1]

    lines = asyncio.run(main()).splitlines()
    series = [line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series))
    families = [line for line in lines if line.startswith("# TYPE")]
    assert len(families) == len(set(families))


def test_only_tritons_names_are_retyped():
    """The type of another metric, or a value that looks like one, stays."""
    text = b'# TYPE nv_a untyped\nnv_a{x="# TYPE nv_b untyped"} 1\n# TYPE other untyped\n'
    assert as_triton_types_it(text) == text.replace(b"nv_a untyped", b"nv_a counter", 1)


def test_the_queue_is_seen_while_it_is_full(serving, fake, image, eventually):
    """Held, waiting and running images and calls under way are gauges."""

    async def main():
        async with (
            serving(fake, metrics=MetricsOptions(port=0), max_batch_images=1) as server,
            AsyncClient(server.address) as client,
        ):
            await client.embed([image(0)])  # the client knows the sizes now
            fake.gate.clear()
            call = asyncio.create_task(client.embed([image(1), image(2), image(3)]))
            engine = server.catalog.models["fake"].engine
            await eventually(lambda: engine.statistics().waiting_images == 2)
            text = (await get(server, "/metrics"))[1]
            fake.gate.set()
            await call
            return samples(text)

    seen = asyncio.run(main())
    version = (("model", "fake"), ("version", "1"))
    assert seen["horace_held_images", version] == 3
    assert seen["horace_waiting_images", version] == 2
    assert seen["horace_running_images", version] == 1
    assert seen["nv_inference_pending_request_count", version] == 1
    assert seen["horace_calls_active", ()] == 1


def test_lists_are_counted_and_drained_like_other_calls(serving, fake):
    """Over gRPC and HTTP: once each, and none more once the server drains."""

    async def main():
        async with (
            serving(fake, metrics=MetricsOptions(port=0), http=HttpOptions(port=0)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            calls = (
                lambda: stub.ListModels(pb.ListModelsRequest()),
                lambda: stub.ListCollections(pb.ListCollectionsRequest()),
            )
            for call, page in zip(calls, ("/v1/models", "/v1/collections"), strict=True):
                await call()
                assert (await asyncio.to_thread(fetch, server.http.url + page))[0] == 200
            server.calls.drain()
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError, match="the server is stopping"):
                    await call()
            return samples((await get(server, "/metrics"))[1])

    seen = asyncio.run(main())
    for method in ("ListModels", "ListCollections"):
        counts = {
            code: seen["horace_requests_total", (("code", code), ("method", method))]
            for code in ("OK", "UNAVAILABLE")
        }
        assert counts == {"OK": 2, "UNAVAILABLE": 1}


def test_two_servers_of_one_process_count_apart(serving, fake, image):
    """Nothing is global: a request to one is not seen by the other."""
    twin = type(fake)(name="twin")

    async def main():
        options = MetricsOptions(port=0)
        async with (
            serving(fake, metrics=options) as one,
            serving(twin, metrics=options) as other,
            AsyncClient(one.address) as client,
        ):
            await client.embed([image(1)])
            return [samples((await get(server, "/metrics"))[1]) for server in (one, other)]

    one, other = asyncio.run(main())
    embed = ("horace_requests_total", (("code", "OK"), ("method", "Embed")))
    assert one[embed] == 1
    assert embed not in other


def test_probes_follow_the_servers_life(serving, fake, image, eventually):
    """Ready while it serves, not while it drains; alive throughout."""

    async def main():
        async with (
            serving(fake, metrics=MetricsOptions(port=0)) as server,
            AsyncClient(server.address) as client,
        ):
            assert await get(server, "/readyz") == (200, "ready\n")
            assert await get(server, "/healthz") == (200, "alive\n")
            assert (await get(server, "/"))[0] == 404
            await client.embed([image(0)])  # the client knows the sizes now
            fake.gate.clear()
            fake.entered.clear()
            call = asyncio.create_task(client.embed([image(1)]))
            await eventually(fake.entered.is_set)
            draining = asyncio.create_task(server.drain(limit_s=30))
            await eventually(lambda: not server.health.serving)
            assert await get(server, "/readyz") == (503, "not ready\n")
            assert await get(server, "/healthz") == (200, "alive\n")
            fake.gate.set()
            await call
            assert await draining == 0
            with pytest.raises(OSError, match="refused"):
                await get(server, "/readyz")

    asyncio.run(main())


def test_a_server_whose_loop_hangs_is_neither_ready_nor_alive(serving, fake, monkeypatch):
    """Whoever sends it requests, or minds it, hears so from the port's own thread."""
    monkeypatch.setattr("serve.operation.operation.turns", partial(turns, within_s=0.05))

    async def main():
        async with serving(fake, metrics=MetricsOptions(port=0)) as server:
            with ThreadPoolExecutor(1) as callers:  # the loop stands still while it is waited for
                address = f"http://{server.operation.address}"
                assert callers.submit(fetch, f"{address}/readyz").result() == (503, "not ready\n")
                assert callers.submit(fetch, f"{address}/healthz").result() == (503, "not alive\n")
            monkeypatch.undo()
            assert await get(server, "/readyz") == (200, "ready\n")

    asyncio.run(main())


@pytest.mark.parametrize("frontend", ["native"])
def test_a_front_end_that_reads_no_more_is_not_alive(serving, fake, eventually, caplog):
    """Nothing else would say so: the loop turns, and no call comes that could fail."""

    async def main():
        async with serving(fake, metrics=MetricsOptions(port=0)) as server:
            assert await get(server, "/healthz") == (200, "alive\n")
            front = server._front

            def fail(*_):
                raise ValueError("a fault of ours")

            loop = asyncio.get_running_loop()
            native = SimpleNamespace(recv_batch_details=fail, close=lambda: None)
            front._receiver = threading.Thread(target=front._receive, args=(native, loop))
            front._receiver.start()
            await asyncio.to_thread(front._receiver.join, 30)
            assert await get(server, "/healthz") == (503, "not alive\n")

    asyncio.run(main())
    assert "calls are read no more" in caplog.text


@pytest.mark.parametrize("host", ["localhost", "[::]"])
def test_every_address_of_the_metrics_host_is_listened_on(host):
    """As of the other ports; `[::]` is every interface, of IPv4 too."""
    listeners = listen_on(host, 0)
    try:
        assert len({one.getsockname()[1] for one in listeners}) == 1
        found = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)
        assert [one.family for one in listeners] == [family for family, *_ in found]
        socket.create_connection(("127.0.0.1", listeners[0].getsockname()[1]), 10).close()
    finally:
        for one in listeners:
            one.close()


@pytest.mark.usefixtures("vigilant")
def test_a_metrics_port_whose_thread_died_answers_again(serving, fake, eventually, caplog):
    """On the same port; without it /healthz would say nothing and the process be killed."""

    async def main():
        async with serving(fake, metrics=MetricsOptions(port=0)) as server:
            server.operation._endpoint._server.should_exit = True  # nothing else ends it
            await eventually(lambda: "gets another" in caplog.text)
            assert await get(server, "/healthz") == (200, "alive\n")

    asyncio.run(main())


def test_connections_that_ask_for_nothing_do_not_keep_probes_out(
    serving, fake, eventually, monkeypatch
):
    """As many as are answered at once, and silent: they are closed."""
    monkeypatch.setattr(PatientProtocol, "head_s", 0.2)
    monkeypatch.setattr(endpoint._Protocol, "head_s", 0.2)

    async def main():
        async with serving(fake, metrics=MetricsOptions(port=0)) as server:
            host, _, port = server.operation.address.rpartition(":")
            with contextlib.ExitStack() as silent:
                for _ in range(endpoint.MAX_CONNECTIONS):
                    silent.enter_context(socket.create_connection((host, int(port)), timeout=30))
                answers = []
                deadline_s = time.monotonic() + 60
                while answers[-1:] != [(200, "alive\n")]:
                    assert time.monotonic() < deadline_s, answers[-1]
                    answers.append(await get(server, "/healthz"))

    asyncio.run(main())


def test_a_loop_that_is_stuck_is_not_alive():
    """What /healthz asks: whether the event loop still runs what it is given."""
    loop = asyncio.new_event_loop()
    stuck, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def hang() -> None:
        stuck.set()
        go_on.wait(30)

    assert asyncio.run(turns(loop, within_s=30))
    loop.call_soon_threadsafe(hang)
    stuck.wait(30)
    assert not asyncio.run(turns(loop, within_s=0.05))
    go_on.set()
    assert asyncio.run(turns(loop, within_s=30))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    assert not asyncio.run(turns(loop, within_s=0.05))


def test_a_metrics_port_in_use_is_one_line_before_anything_is_opened(start_server, make_bundle):
    """The second server says which port, and how to choose another."""
    bundle = str(make_bundle().path)
    first = start_server("--bundle", bundle, "--metrics.port", "0", "--log-format", "json")
    line = json.loads(first.log.read_text().splitlines()[0])
    port = line["message"].split(":")[2].split("/")[0]
    assert fetch(f"http://127.0.0.1:{port}/readyz")[0] == 200
    done = subprocess.run(
        [sys.executable, "-m", "serve", "--port", "0", "--bundle", bundle, "--metrics.port", port],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"python -m serve: --metrics.port {port} of 127.0.0.1: expected a free port, found "
        "one in use; choose others with --metrics.port and --metrics.host"
    )
    assert first.stop() == 0


def test_each_worker_has_a_port_and_counts_for_itself(start_server, make_bundle):
    """The second worker's metrics are on the next port; together they have every request."""
    port = free_port(neighbours=1)
    server = start_server(
        "--bundle", str(make_bundle().path), "--workers", "2", "--metrics.port", str(port)
    )
    for _ in range(10):  # a connection each: they land where the kernel puts them
        with Client(server.address) as client:
            client.embed([np.zeros((28, 28), np.uint8)])
    answered = 0.0
    for worker in (port, port + 1):
        assert fetch(f"http://127.0.0.1:{worker}/readyz") == (200, "ready\n")
        seen = samples(fetch(f"http://127.0.0.1:{worker}/metrics")[1])
        answered += seen.get(("horace_requests_total", (("code", "OK"), ("method", "Embed"))), 0)
    assert answered == 10
    assert server.stop() == 0


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port):
    """The options check themselves."""
    with pytest.raises(UsageError, match=r"--metrics\.port: expected 0 to 65535"):
        MetricsOptions(port=port)


@pytest.mark.parametrize(
    ("stat", "seconds"),
    [
        ("usage_usec 5\nnr_throttled 3\nthrottled_usec 2500000\n", 2.5),
        ("nr_throttled 3\nthrottled_time 2500000000\n", 2.5),
        ("usage_usec 5\n", None),
        (None, None),
    ],
)
def test_what_the_cpu_limit_takes_away_is_read_from_the_cgroup(tmp_path, stat, seconds):
    """Version 2, version 1, no limit, no cgroup."""
    self_cgroup = tmp_path / "self"
    self_cgroup.write_text("0::/pod\n")
    (tmp_path / "pod").mkdir()
    if stat is not None:
        (tmp_path / "pod" / "cpu.stat").write_text(stat)
    assert cpu_throttled_s(tmp_path, self_cgroup) == seconds


def test_threads_of_libraries_are_counted_too(make_bundle):
    """More than Python knows of: ONNX Runtime's own are among them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 32
    encoder, known = str(make_bundle().encoder_path), set(threading.enumerate())
    before = count_threads()
    session = ort.InferenceSession(encoder, options)
    assert count_threads() >= before + 16  # some of earlier tests may end meanwhile
    assert set(threading.enumerate()) <= known
    del session


def test_scrapes_under_load_agree_with_what_was_answered(serving, fake, image):
    """Counting and reading at once loses nothing: the last scrape has every request."""

    async def main():
        async with (
            serving(fake, metrics=MetricsOptions(port=0)) as server,
            AsyncClient(server.address) as client,
        ):

            async def load():
                for n in range(100):
                    await client.embed([image(n)])

            loads = [asyncio.create_task(load()) for _ in range(8)]
            scrapes = 0
            while not all(task.done() for task in loads):
                assert (await get(server, "/metrics"))[0] == 200
                scrapes += 1
            await asyncio.gather(*loads)
            return scrapes, samples((await get(server, "/metrics"))[1])

    scrapes, last = asyncio.run(main())
    assert scrapes > 0
    assert last["horace_requests_total", (("code", "OK"), ("method", "Embed"))] == 800
    assert last["horace_request_seconds_bucket", (("le", "+Inf"), ("method", "Embed"))] == 800
    buckets = [
        value
        for (name, labels), value in last.items()
        if name == "horace_embed_seconds_bucket" and ("model", "fake") in labels
    ]
    assert buckets == sorted(buckets)
    assert np.isfinite(list(last.values())).all()


def test_loads_and_reloads_are_counted_with_those_that_were_refused(serving, make_bundle):
    """How long a model took to load, and a reload that changed nothing."""
    bundle = make_bundle()

    async def main():
        async with serving(bundle=(f"m={bundle.path}",), metrics=MetricsOptions(port=0)) as server:
            before = samples((await get(server, "/metrics"))[1])
            (bundle.path / "bundle.json").write_text("{")
            assert await server.reloads.run() == ["models and collections"]
            return before, samples((await get(server, "/metrics"))[1])

    before, after = asyncio.run(main())
    model = (("kind", "model"), ("name", "m"))
    assert before["horace_loads_total", model] == 1
    assert before["horace_load_refusals_total", model] == 0
    assert before["nv_model_load_duration_secs", (("model", "m"),)] > 0
    assert before["horace_reloads_total", ()] == 0
    assert after["horace_loads_total", model] == 1
    assert after["horace_load_refusals_total", model] == 1
    assert after["horace_reloads_total", ()] == 1
    failed = (("what", "models and collections"),)
    assert after["horace_reload_failures_total", failed] == 1


def test_callers_are_counted_by_the_name_of_their_key_and_strangers_are_not_named(
    serving, fake, image, tmp_path, capsys
):
    """A call without a key is turned away and counted; the endpoint itself asks for none."""
    file = tmp_path / "keys"
    assert keys.run(["new", "team-a", "--file", str(file)]) == 0
    token = capsys.readouterr().out.strip()

    async def main():
        async with (
            serving(
                fake, metrics=MetricsOptions(port=0), keys=KeyOptions(file=str(file))
            ) as server,
            AsyncClient(server.address, api_key=token) as friend,
            AsyncClient(server.address, api_key="guess") as stranger,
        ):
            await friend.embed([image(1)])
            with pytest.raises(UnauthenticatedError):
                await stranger.embed([image(1)])
            return samples((await get(server, "/metrics"))[1])

    seen = asyncio.run(main())
    assert seen["horace_requests_by_key_total", (("code", "OK"), ("key", "team-a"))] >= 1
    assert seen["horace_turned_away_total", (("code", "UNAUTHENTICATED"),)] >= 1


def test_a_request_over_http_is_counted_as_one_over_grpc_is(serving, fake):
    """What a service answers by its method; what no service saw as turned away, once."""
    body = json.dumps({"images": ["bm8gaW1hZ2U="]}).encode()

    def post(url: str, data: bytes, kind: str) -> int:
        request = urllib.request.Request(url + "/v1/embed", data, {"content-type": kind})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    async def main():
        options = {"metrics": MetricsOptions(port=0), "http": HttpOptions(port=0)}
        async with serving(fake, **options) as server:
            posts = [(body, "application/json"), (b"{", "application/json"), (b"x", "text/plain")]
            answers = [await asyncio.to_thread(post, server.http.url, *each) for each in posts]
            return answers, samples((await get(server, "/metrics"))[1])

    answers, seen = asyncio.run(main())
    assert answers == [200, 400, 415]
    assert seen["horace_requests_total", (("code", "OK"), ("method", "Embed"))] == 1
    assert seen["horace_turned_away_total", (("code", "INVALID_ARGUMENT"),)] == 2
