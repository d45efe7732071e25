from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import onnxruntime as ort
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from models.bundle import ENCODER_FILE
from models.errors import HoraceError, UsageError
from models.wire import image_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.client import AsyncClient, Client
from serve.config import ServeOptions
from serve.errors import InternalError, StartError
from serve.front import native
from serve.server import Server, divide_threads
from serve.watchdog import WatchdogOptions

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
MUCH = 16 * MIB  # more than Linux holds for a connection (tcp_wmem)
Status = health_pb2.HealthCheckResponse


def refusal(kind: type[HoraceError] = HoraceError, **options: object) -> str:
    """The one line with which a server refuses to start."""

    async def start() -> None:
        await Server(ServeOptions(**options)).start()

    with pytest.raises(kind) as refused:
        asyncio.run(start())
    line = str(refused.value)
    assert "\n" not in line
    return line


def test_it_is_ready_and_says_where(start_server, make_bundle):
    """The ready line comes when a client can call, and names models and port."""
    server = start_server("--bundle", f"mine={make_bundle().path}")
    assert server.ready_line == (f"horace serving on {server.address} models=mine collections=none")
    with Client(server.address) as client:
        assert client.health()
        assert client.embed([np.zeros((28, 28), np.uint8)]).vectors.shape == (1, 16)
    assert server.stop() == 0


def test_importing_the_server_loads_nothing_heavy():
    """To serve a model alone, without --http.port, --metrics.port and --tracing.endpoint."""
    heavy = {"torch", "faiss", "pyarrow", "matplotlib", "scipy", "pandas"}
    heavy |= {"prometheus_client", "opentelemetry", "uvicorn", "starlette"}
    code = (
        "import sys, serve.__main__;"
        f"print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.strip() == "[]"


def test_a_front_end_that_gets_no_descriptors_is_one_line(monkeypatch):
    """Its library says so by an exception of its own."""

    def refuse(*_, **__):
        raise RuntimeError("tokio runtime: Too many open files (os error 24)")

    monkeypatch.setattr(native, "NativeGrpcFront", refuse)
    assert refusal(StartError, port=0, frontend="native") == (
        "--frontend native: expected descriptors and threads enough to serve, found tokio "
        "runtime: Too many open files (os error 24); allow this process more (ulimit -n, ulimit -u)"
    )


def test_a_temporary_directory_that_no_socket_fits_in_is_one_line(monkeypatch, tmp_path):
    """What the native front end has behind it listens on one, and the system bounds its path."""
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert refusal(StartError, port=0, frontend="native") == (
        "--frontend native: expected a temporary directory in which a socket can be, of a short "
        f"path, found {long}; name another by TMPDIR, or take --frontend grpcio"
    )
    assert list(long.iterdir()) == []


def test_sigterm_under_load_answers_every_accepted_call(start_server, make_bundle):
    """Calls are under way when the signal comes: they are answered, and the exit is clean."""
    server = start_server("--bundle", str(make_bundle().path))
    image = image_to_wire(np.zeros((28, 28, 1), np.uint8))
    request = pb.EmbedRequest(images=[image] * 64)
    outcomes: list[str] = []

    async def caller(stub: pb_grpc.HoraceStub, signalled: asyncio.Event) -> None:
        while True:
            try:
                reply = await stub.Embed(request, timeout=30)
            except grpc.aio.AioRpcError as error:
                outcomes.append(f"{error.code().name} {error.details()}")
                return
            outcomes.append(f"answered {reply.vectors.rows}")
            if len(outcomes) == 100:
                server.process.send_signal(signal.SIGTERM)
                signalled.set()

    async def main() -> None:
        signalled = asyncio.Event()
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = pb_grpc.HoraceStub(channel)
            await asyncio.gather(*[caller(stub, signalled) for _ in range(16)])
            assert signalled.is_set()

    asyncio.run(main())
    assert server.process.wait(120) == 0
    answered = [outcome for outcome in outcomes if outcome == "answered 64"]
    refused = [outcome for outcome in outcomes if outcome not in answered]
    assert len(answered) >= 100
    # CANCELLED is what gRPC calls a call that it has not looked at when it stops.
    assert {outcome.split()[0] for outcome in refused} <= {"UNAVAILABLE", "CANCELLED"}, refused


def test_a_drain_answers_exactly_what_was_accepted(serving, make_bundle):
    """Under load: as many calls are answered as the queue ever admitted."""
    request = pb.EmbedRequest(images=[image_to_wire(np.zeros((28, 28, 1), np.uint8))] * 64)

    async def caller(stub, answered):
        while True:
            try:
                answered.append((await stub.Embed(request)).vectors.rows)
            except grpc.aio.AioRpcError as error:
                return error.code().name

    async def main():
        answered = []
        async with (
            serving(bundle=(str(make_bundle().path),)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            engine = server.catalog.model("").engine
            callers = [asyncio.create_task(caller(stub, answered)) for _ in range(16)]
            while len(answered) < 50:
                await asyncio.wait(callers, timeout=0.01)
            assert await server.drain(limit_s=30) == 0
            await asyncio.gather(*callers)
            warm_up = 1
            assert len(answered) + warm_up == engine.statistics().admitted_requests
            assert set(answered) == {64}

    asyncio.run(main())


def test_a_second_signal_cuts_off_at_once(start_server, make_bundle):
    """Seconds of work hold the first drain, not the second."""
    server = start_server(
        "--bundle", str(make_bundle().path), "--max-batch-images", "1",
        "--max-queue-images", "100000",
    )  # fmt: skip

    async def main() -> list[object]:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = pb_grpc.HoraceStub(channel)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == Status.SERVING
            image = image_to_wire(np.zeros((28, 28, 1), np.uint8))
            request = pb.EmbedRequest(images=[image] * 1024)
            calls = [asyncio.ensure_future(stub.Embed(request)) for _ in range(40)]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            server.process.send_signal(signal.SIGTERM)
            assert (await watch.read()).status == Status.NOT_SERVING
            server.process.send_signal(signal.SIGINT)
            return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(main())
    assert any(isinstance(outcome, grpc.aio.AioRpcError) for outcome in outcomes)
    assert server.process.wait(120) == 1


def holds(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether a process has a signal blocked: see proc(5)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (blocked,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(int(blocked, 16) >> (number - 1) & 1)


def test_a_signal_ends_a_start_that_hangs():
    """The server of a remote model never answers: SIGTERM is heard all the same.

    And one that comes before there is who can handle it waits: SIGHUP would end the process.
    """
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(30)
        argv = [sys.executable, "-m", "serve", "--port", "0"]
        argv += ["--bundle", f"horace://127.0.0.1:{silent.getsockname()[1]}/m"]
        with subprocess.Popen(
            argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as server:
            while not holds(server, signal.SIGHUP):
                assert server.poll() is None
            server.send_signal(signal.SIGHUP)
            connection, _ = silent.accept()
            with connection:
                server.send_signal(signal.SIGTERM)
                out, log = server.communicate(timeout=20)
    assert (server.returncode, out) == (0, ""), log
    assert "stopping on SIGTERM, before the server was ready" in log
    assert "Traceback" not in log


def test_calls_and_streams_beyond_the_bound_are_refused_unread(serving, fake, image, eventually):
    """Both have one account: one more of either is told so, and later it is served."""

    async def main():
        async with (
            serving(fake, max_calls=2) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            request = pb.EmbedRequest(images=[image_to_wire(image(1))])
            stream = stub.EmbedStream()
            await stream.write(request)
            assert (await stream.read()).vectors.rows == 1
            fake.gate.clear()
            held = stub.Embed(request)
            await eventually(lambda: server.calls.active == 2)
            for refused in (stub.Embed(request), stub.EmbedStream(iter([request]))):
                assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            fake.gate.set()
            await held
            assert (await stub.Embed(request)).vectors.rows == 1
            stream.cancel()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("threads", "models", "instances", "each"),
    [(8, 1, 1, 8), (8, 3, 1, 2), (8, 2, 3, 2), (1, 4, 1, 1), (2, 1, 4, 1)],
)
def test_models_and_instances_share_one_cpu_budget(threads, models, instances, each):
    """With the threads that call them, encoders have the budget between them, or one each."""
    assert divide_threads(threads, models=models, instances=instances) == each


def test_every_model_is_opened_with_its_share(make_bundle):
    """Two bundles and a budget of six: three threads each."""

    async def main():
        bundles = tuple(str(make_bundle(name, seed=1).path) for name in ("one", "two"))
        server = Server(ServeOptions(port=0, bundle=bundles, cpu_budget=6))
        await server.start()
        try:
            return [model.encoder.threads for model in server.catalog.models.values()]
        finally:
            await server.kill()

    assert asyncio.run(main()) == [3, 3]


def test_a_drain_that_takes_too_long_cuts_off_and_says_so(serving, fake, image, eventually):
    """After the limit the number of calls that were cut off is known."""

    async def main():
        async with serving(fake) as server:
            fake.gate.clear()
            async with grpc.aio.insecure_channel(server.address) as channel:
                call = pb_grpc.HoraceStub(channel).Embed(
                    pb.EmbedRequest(images=[image_to_wire(image(1))])
                )
                await eventually(fake.entered.is_set)
                assert await server.drain(limit_s=0.1) == 1
                with pytest.raises(grpc.aio.AioRpcError):
                    await call

    asyncio.run(main())


@asynccontextmanager
async def reply_on_a_slow_link(server, eventually, size):
    """A call whose reply is of some size and on its way; it comes once the event is set."""
    flows, is_over = asyncio.Event(), asyncio.Event()
    flows.set()

    async def list_models():
        return pb.ListModelsResponse(models=[pb.Model(preprocessing_json="x" * size)])

    async def carry(reader, writer, is_held):
        while data := await reader.read(1 << 16):
            if is_held:
                await flows.wait()
            writer.write(data)

    async def connect(reader, writer):
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        narrow.connect(("127.0.0.1", server.port))
        there, back = await asyncio.open_connection(sock=narrow)
        ways = (carry(reader, back, False), carry(there, writer, True))
        tasks = list(map(asyncio.ensure_future, ways))
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        back.close()
        writer.close()
        is_over.set()

    server.services._list_models = list_models
    async with await asyncio.start_server(connect, "127.0.0.1", 0) as link:
        address = f"127.0.0.1:{link.sockets[0].getsockname()[1]}"
        any_size = [("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(address, options=any_size) as channel:
            await channel.channel_ready()
            flows.clear()
            call = pb_grpc.HoraceStub(channel).ListModels(pb.ListModelsRequest())
            await eventually(lambda: server.calls.accepted == 1 and not server.calls.active)
            yield call, flows
        flows.set()
        await is_over.wait()


@pytest.mark.parametrize(
    ("frontend", "size", "teller"),
    [("grpcio", MUCH, "front end"), ("grpcio", MIB, "system"), ("native", MIB, "system")],
)
def test_a_drain_waits_for_replies_that_are_being_sent(
    serving, fake, eventually, monkeypatch, size, teller
):
    """A handler is done with a call long before a slow link is, and so may the front end be."""
    monkeypatch.setattr("serve.server.LAST_REPLIES_S", 0.05)
    if teller == "front end":
        monkeypatch.setattr("serve.server.count_unsent", lambda _: 0)

    async def main():
        async with (
            serving(fake) as server,
            reply_on_a_slow_link(server, eventually, size) as (call, flows),
        ):
            draining = asyncio.create_task(server.drain(limit_s=60))
            await asyncio.wait([draining], timeout=0.5)
            assert not draining.done()
            flows.set()
            assert len((await call).models[0].preprocessing_json) == size
            assert await draining == 0

    asyncio.run(main())


@pytest.mark.parametrize("frontend", ["grpcio"])
@pytest.mark.parametrize("size", [MIB, MUCH])
def test_a_reply_that_does_not_leave_in_time_is_cut_off_and_counted(
    serving, fake, eventually, monkeypatch, size
):
    """After the limit, and after no less than the last replies always have.

    One that is stuck in gRPC holds the stop no longer than one that the system has.
    """
    monkeypatch.setattr("serve.server.LAST_REPLIES_S", 0.05)

    async def main():
        async with (
            serving(fake) as server,
            reply_on_a_slow_link(server, eventually, size),
        ):
            assert await asyncio.wait_for(server.drain(limit_s=0), 10) == 1

    asyncio.run(main())


def test_a_drain_without_a_descriptor_left_ends_all_the_same(serving, fake, out_of_descriptors):
    """What is on its way cannot be looked for then."""

    async def main():
        async with serving(fake) as server:
            with out_of_descriptors():
                return await server.drain(limit_s=5)

    assert asyncio.run(main()) == 0


def test_who_sends_nothing_does_not_hold_a_drain(serving, fake, monkeypatch):
    """A stream that no service counts, and connections that say nothing."""
    monkeypatch.setattr("serve.server.LAST_REPLIES_S", 0.05)

    async def main():
        async with (
            serving(fake) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stream = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            await stream.read()
            _, silent = await asyncio.open_connection("127.0.0.1", server.port)
            assert await asyncio.wait_for(server.drain(limit_s=60), 10) == 0
            silent.close()

    asyncio.run(main())


def test_health_is_known_by_service_and_changes_are_told(serving, fake, eventually):
    """Check and Watch, the overall name and each service's, a crash, and one watcher leaving."""

    async def main():
        async with (
            serving(fake) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", "horace.v1.Horace", "grpc.health.v1.Health"):
                reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert reply.status == Status.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await health.Check(health_pb2.HealthCheckRequest(service="cat"))
            assert error.value.code() is grpc.StatusCode.NOT_FOUND
            unknown = health.Watch(health_pb2.HealthCheckRequest(service="cat"))
            assert (await unknown.read()).status == Status.SERVICE_UNKNOWN
            watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
            for watch in watches:
                assert (await watch.read()).status == Status.SERVING
            watches[0].cancel()
            fake.failures.append(SystemExit("the worker dies"))
            async with AsyncClient(server.address) as client:
                with pytest.raises(Exception, match="lost a thread at these images"):
                    await client.embed([np.zeros((8, 8), np.uint8)])
            assert (await watches[1].read()).status == Status.NOT_SERVING
            assert (await watches[1].read()).status == Status.SERVING
            assert repr(server.recovery) == "<Recovery well, 1 so far>"

    asyncio.run(main())


@pytest.mark.usefixtures("vigilant")
def test_a_model_that_hangs_is_not_ready_until_an_image_goes_through_it(
    serving, fake, image, eventually
):
    """The caller is told, the server says so, and a thread that answers makes it ready again."""

    async def main():
        options = WatchdogOptions(stuck_s=0.5)
        async with serving(fake, watchdog=options) as server:
            fake.gate.clear()
            async with AsyncClient(server.address) as client:
                with pytest.raises(InternalError, match="lost a thread at these images"):
                    await client.embed([image(1)])
                await eventually(lambda: not server.health.serving)
                fake.gate.set()
                await eventually(lambda: server.health.serving)
                assert (await client.embed([image(2)])).vectors.shape == (1, 4)

    asyncio.run(main())


@pytest.mark.usefixtures("vigilant")
def test_a_search_thread_that_hangs_is_replaced(serving, fake, eventually):
    """What the watchdog is for: no pool of this server loses a thread for good."""
    hangs = threading.Event()

    async def main():
        options = WatchdogOptions(stuck_s=0.05)
        async with serving(fake, watchdog=options) as server:
            try:
                with pytest.raises(InternalError, match="lost a thread"):
                    await server._search_pool.run(lambda: hangs.wait(30))
                await eventually(lambda: "1 so far" in repr(server.recovery))
                await eventually(lambda: server.health.serving)
            finally:
                hangs.set()

    asyncio.run(main())


def test_a_watch_does_not_hold_a_drain(serving, fake):
    """Who watches hears that the server goes, and is let go when it has drained."""

    async def main():
        async with (
            serving(fake) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == Status.SERVING
            assert await asyncio.wait_for(server.drain(limit_s=60), 10) == 0
            assert (await watch.read()).status == Status.NOT_SERVING
            assert await watch.read() is grpc.aio.EOF

    asyncio.run(main())


def test_reflection_lists_the_services(serving, fake):
    """A tool that knows nothing of Horace finds its service."""

    async def main():
        async with (
            serving(fake) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            async for reply in stub.ServerReflectionInfo(iter([asked])):
                return {service.name for service in reply.list_services_response.service}

    assert {"horace.v1.Horace", "grpc.health.v1.Health"} <= asyncio.run(main())


def test_a_busy_port_is_one_line(make_bundle):
    """A port in use is refused, even one that was bound to be shared."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refusal(bundle=(str(make_bundle().path),), port=port)
    assert line == (
        f"port 127.0.0.1:{port}: expected a free port, found one in use; "
        "stop the process that listens there, or choose another with --port (0: any)"
    )


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_one_line(host):
    """The line says that the address is not here, and what to listen on."""
    line = refusal(host=host)
    assert line.startswith(f"port {host}:50051: expected a free port, found no ")
    assert "listen on 127.0.0.1 or 0.0.0.0 with --host" in line


def test_no_address_is_one_line():
    """An empty --host is no way to say every interface."""
    line = refusal(host="")
    assert line == (
        "--host: expected an address, found none; "
        "listen on 127.0.0.1 or 0.0.0.0 with --host, or on another --port"
    )


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
def test_it_serves_on_ipv6(fake, serving, image):
    """The address has its brackets, and a client can call it as it is printed."""

    async def main():
        async with serving(fake, host="::1") as server:
            assert server.address == f"[::1]:{server.port}"
            async with AsyncClient(server.address) as client:
                assert (await client.embed([image(1)])).statuses[0].ok

    asyncio.run(main())


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="it is offered here"
)
def test_a_provider_that_is_not_there_is_one_line(make_bundle):
    """Asked for CUDA where there is none, the server does not start, and says how it would."""
    line = refusal(port=0, bundle=(f"{make_bundle().path},provider=cuda",))
    assert " on cuda: expected an ONNX Runtime with CUDAExecutionProvider, found " in line
    assert "pip install -e '.[gpu]'; or ask for provider=cpu" in line


def test_a_missing_bundle_is_one_line(tmp_path):
    """It names the directory and the command that makes one; the exit status is 1."""
    argv = [sys.executable, "-m", "serve", "--port", "0", "--bundle", str(tmp_path / "none")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"python -m serve: {tmp_path / 'none'}: expected a bundle directory, found no such "
        "directory; make one with `python -m train.export RUN --out BUNDLE`\n"
    )


def test_a_damaged_bundle_is_one_line(make_bundle):
    """One flipped byte of the graph is noticed before anything is served."""
    bundle = make_bundle()
    graph = bundle.path / ENCODER_FILE
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    line = refusal(port=0, bundle=(str(bundle.path),))
    assert f"{graph}: expected SHA-256 {bundle.files[ENCODER_FILE]}, found " in line
    assert "the file is damaged" in line


def test_a_collection_of_another_encoder_is_one_line(make_bundle, tmp_path):
    """Equal dimension or not: the line names both encoders."""
    from index.build import BuildOptions, build

    made_by, served = make_bundle("one", seed=1), make_bundle("two", seed=2)
    images = tmp_path / "images"
    images.mkdir()
    Image.new("L", (28, 28), 7).save(images / "one.png")
    build(BuildOptions(images=str(images), encoder=str(made_by.path), out=tmp_path / "c"))
    line = refusal(port=0, bundle=(str(served.path),), collection=(f"things={tmp_path / 'c'}",))
    assert line == (
        f"--collection things: expected encoder {served.fingerprint} (two), "
        f"found encoder {made_by.fingerprint} ({made_by.path}); serve the bundle that made it, or "
        "build it again with `python -m index.build`"
    )


def test_two_bundles_of_one_name_are_refused_as_bad_use(make_bundle):
    """The mend names the option that gives one another name."""
    path = make_bundle().path
    line = refusal(UsageError, port=0, bundle=(str(path), str(path)))
    assert line.endswith("give it one: --bundle NAME=PATH")


def test_a_model_that_gives_no_numbers_does_not_become_ready(serving, fake):
    """Readiness needs a real inference; its failure is an error of the start."""

    async def main():
        fake.failures.append(RuntimeError("no kernel"))
        async with serving(fake):
            pass

    with pytest.raises(Exception, match="the encoder failed on these images"):
        asyncio.run(main())
    assert fake.closed
