from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import pytest
import trustme

from models.errors import UsageError
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.client import AsyncClient, Client, ClientTls, RetryPolicy
from serve.client.connection import CHANNEL_OPTIONS, Connection
from serve.errors import QueueFullError, UnavailableError
from serve.security.options import CallerLimits
from tests.link import Link


class Servicer(pb_grpc.HoraceServicer):
    """Notes what it is called with, and refuses as often as it is told to."""

    def __init__(self, refusals=0, push_back=()):
        self.metadata = []
        self.refusals = refusals
        self.push_back = push_back

    def ListCollections(self, request, context):
        """Answer, or refuse with a push-back."""
        self.metadata.append(dict(context.invocation_metadata()))
        if self.refusals:
            self.refusals -= 1
            context.set_trailing_metadata(self.push_back)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue: full")
        return pb.ListCollectionsResponse()


@contextmanager
def running(servicer, credentials=None):
    """A bare gRPC server of this servicer; gives its port."""
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        pb_grpc.add_HoraceServicer_to_server(servicer, server)
        if credentials is None:
            port = server.add_insecure_port("localhost:0")
        else:
            port = server.add_secure_port("localhost:0", credentials)
        server.start()
        try:
            yield port
        finally:
            server.stop(None).wait()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate authority, its files and those of a client."""
    ca = trustme.CA()
    folder = tmp_path_factory.mktemp("tls")
    ca.cert_pem.write_to_path(folder / "ca.pem")
    client = ca.issue_cert("client@example.org")
    client.private_key_pem.write_to_path(folder / "client.key")
    for blob in client.cert_chain_pems:
        blob.write_to_path(folder / "client.pem", append=True)
    return ca, folder


def credentials_of(ca, *, name="localhost", mutual=False):
    """A server's credentials, for a name."""
    cert = ca.issue_cert(name)
    chain = b"".join(blob.bytes() for blob in cert.cert_chain_pems)
    return grpc.ssl_server_credentials(
        [(cert.private_key_pem.bytes(), chain)],
        root_certificates=ca.cert_pem.bytes() if mutual else None,
        require_client_auth=mutual,
    )


@pytest.mark.parametrize("mutual", [False, True])
def test_both_clients_speak_tls(authority, mutual):
    """With the authority that vouches for the server, and a certificate where one is asked."""
    ca, folder = authority
    own = {"cert": folder / "client.pem", "key": folder / "client.key"} if mutual else {}
    tls = ClientTls(ca=folder / "ca.pem", **own)

    async def unblocking(port):
        async with AsyncClient(f"localhost:{port}", tls=tls) as client:
            return await client.list_collections()

    with running(Servicer(), credentials_of(ca, mutual=mutual)) as port:
        with Client(f"localhost:{port}", tls=tls) as client:
            assert client.list_collections() == []
        assert asyncio.run(unblocking(port)) == []


def test_a_name_that_is_not_the_addresss_can_be_given(authority):
    """A server reached by another name than its certificate's, and refused without it."""
    ca, folder = authority
    once = RetryPolicy(attempts=1)
    with running(Servicer(), credentials_of(ca, name="horace.example")) as port:
        tls = ClientTls(ca=folder / "ca.pem", server_name="horace.example")
        with Client(f"localhost:{port}", tls=tls) as client:
            assert client.list_collections() == []
        tls = ClientTls(ca=folder / "ca.pem")
        with (
            Client(f"localhost:{port}", tls=tls, retry=once) as client,
            pytest.raises(UnavailableError, match="expected a Horace server that answers"),
        ):
            client.list_collections()


@pytest.mark.parametrize(
    ("server", "client", "mend"),
    [
        ({}, None, "the server may want TLS: --tls or --tls-ca FILE"),
        ({}, {}, "its certificate is not trusted: --tls-ca FILE"),
        ({"name": "another"}, {"ca": "ca.pem"}, "its certificate is for another name: --tls-name"),
        ({"mutual": True}, {"ca": "ca.pem"}, "the server may want a certificate of yours"),
        (None, {"ca": "ca.pem"}, "the server may speak no TLS"),
    ],
)
def test_a_handshake_that_fails_says_what_would_do(authority, monkeypatch, server, client, mend):
    """A server that is there is not said to be down."""
    ca, folder = authority
    monkeypatch.chdir(folder)
    tls = None if client is None else ClientTls(**client)
    credentials = None if server is None else credentials_of(ca, **server)
    once = RetryPolicy(attempts=1)
    with (
        running(Servicer(), credentials) as port,
        Client(f"localhost:{port}", tls=tls, retry=once) as connected,
        pytest.raises(UnavailableError, match=mend),
    ):
        connected.list_collections()


def test_a_port_of_http_is_told_from_a_server_that_is_down():
    """It answers, and not in gRPC."""

    def answer(web):
        connection, _ = web.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 404 Not Found\r\n\r\n")
            connection.recv(1 << 16)

    once = RetryPolicy(attempts=1)
    with socket.create_server(("127.0.0.1", 0)) as web, ThreadPoolExecutor(1) as pool:
        pool.submit(answer, web)
        with (
            Client(f"127.0.0.1:{web.getsockname()[1]}", retry=once) as client,
            pytest.raises(UnavailableError, match="that is a port of HTTP: call the one of gRPC"),
        ):
            client.list_collections()


@pytest.mark.parametrize("blocking", [True, False])
def test_calls_go_to_every_server_of_a_target(blocking):
    """In turns, as behind a headless Service; one that stops is left to the others."""
    first, second = Servicer(), Servicer()

    async def call_both(client, leave):
        async def call():
            answer = client.list_collections()
            assert (answer if blocking else await answer) == []

        for _ in range(1000):  # one may still be connecting
            await call()
            if first.metadata and second.metadata:
                break
        assert first.metadata
        assert second.metadata
        leave()
        before = len(first.metadata), len(second.metadata)
        for _ in range(10):
            await call()
        assert (len(first.metadata), len(second.metadata)) == (before[0], before[1] + 10)

    async def main(target, leave):
        if blocking:
            with Client(target) as client:
                await call_both(client, leave)
        else:
            async with AsyncClient(target) as client:
                await call_both(client, leave)

    with running(second) as other, ExitStack() as stack:
        port = stack.enter_context(running(first))
        asyncio.run(main(f"ipv4:127.0.0.1:{port},127.0.0.1:{other}", stack.close))


@pytest.mark.parametrize(
    ("given", "expected", "found"),
    [
        ({"ca": "nowhere.pem"}, "ca nowhere.pem: expected a PEM file", "No such file"),
        ({"ca": "client.key"}, "PEM file with a CERTIFICATE", "none in there"),
        ({"cert": "client.pem"}, "expected cert and key", "found cert alone"),
        ({"key": "client.key"}, "expected cert and key", "found key alone"),
        ({"cert": "client.key", "key": "client.key"}, "cert client.key", "none in there"),
    ],
)
def test_files_that_are_no_certificates_are_refused_at_once(
    authority, monkeypatch, given, expected, found
):
    """In one line, when the client is made."""
    monkeypatch.chdir(authority[1])
    with pytest.raises(UsageError) as error:
        Client("localhost:1", tls=ClientTls(**given))
    assert expected in str(error.value)
    assert found in str(error.value)


def test_what_is_no_tls_is_refused():
    """Such as the flag of a command."""
    with pytest.raises(UsageError, match=r"^tls: expected a ClientTls, or None, found True$"):
        Client("localhost:1", tls=True)


def test_a_connection_that_is_lost_without_a_word_is_given_up(monkeypatch):
    """It is noticed within the time that a call has, which goes by another connection."""
    times = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    hasty = [(name, value // 100 if name in times else value) for name, value in CHANNEL_OPTIONS]
    monkeypatch.setattr("serve.client.connection.CHANNEL_OPTIONS", tuple(hasty))
    with (
        running(Servicer()) as port,
        (link := Link(port)).listener,
        Client(link.address, timeout_s=5) as client,
    ):
        assert client.list_collections() == []
        link.lose()
        assert client.list_collections() == []


def test_key_and_request_id_go_with_every_call():
    """As the headers that the server reads; the key is in no repr."""
    servicer = Servicer()
    with running(servicer) as port, Client(f"localhost:{port}", api_key="s3cret") as client:
        client.list_collections()
        assert "s3cret" not in repr(client)
    assert servicer.metadata[0]["authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(Connection(target="a:1", api_key="s3cret"))


@pytest.mark.parametrize("key", ["", "two words", "line\n", "käse", b"bytes"])
def test_a_key_that_no_header_carries_is_refused(key):
    """Without showing it."""
    with pytest.raises(UsageError, match="expected visible ASCII without spaces") as error:
        Client("localhost:1", api_key=key)
    assert str(key) not in str(error.value) or not key


@pytest.mark.parametrize(
    "target", ["http://localhost:1", "localhost", "a:1/model", "a\udcff:1", "a:\u0665", "", None]
)
def test_a_target_without_a_port_is_refused(target):
    """GRPC takes it for a host whose port is 443."""
    with pytest.raises(
        UsageError, match=r"^target: expected (HOST:PORT|text that UTF-8 can write)"
    ):
        Client(target)


@pytest.mark.parametrize(
    ("target", "port"),
    [
        ("127.0.0.1:97447", "97447"),
        ("localhost:65536", "65536"),
        ("localhost:0", "0"),
        ("[::1]:97447", "97447"),
        ("dns:a:97447", "97447"),
        ("dns:///a:97447", "97447"),
        ("dns://8.8.8.8:53/a:123456789", "123456789"),
    ],
)
def test_a_port_that_does_not_exist_is_refused(target, port):
    """GRPC takes its lowest 16 bits, which are the port of somebody else."""
    message = f"^port of target: expected an integer, 1 to 65535, found {port}$"
    with pytest.raises(UsageError, match=message):
        Client(target)


@pytest.mark.parametrize(
    "target",
    [
        "a.b-c:65535",
        "dns:///a",
        "dns:///fe80::0",
        "unix:/a:97447",
        "unix:97447",
        "unixes:1",
        "a.b-c:1",
        "127.0.0.1:1",
        "[::1]:1",
        "dns:///a:1",
        "ipv4:1.2.3.4:1,1.2.3.5:1",
        "unix:/a",
    ],
)
def test_names_of_grpc_are_targets(target):
    """And `host:port` is one."""
    assert Connection(target=target).target == target


def test_an_async_client_is_made_in_a_loop():
    """A module that is imported has none."""
    with pytest.raises(UsageError) as error:
        AsyncClient("localhost:1")
    assert str(error.value) == (
        "AsyncClient: expected a running event loop, found none; "
        "make it inside the coroutine that uses it, one client for each loop"
    )


def test_an_async_client_of_another_loop_says_so():
    """Whether its own runs beside, or has ended; its own is not disturbed."""
    other = (
        "AsyncClient: expected the event loop that it was made in, found another; "
        "make it inside the coroutine that uses it, one client for each loop"
    )

    async def call(client):
        assert await client.list_collections() == []

    async def iterate(client):
        return [item async for item in client.embed_iter([b"1"])]

    def refuse(client):
        for use in (call, iterate):
            with pytest.raises(UsageError) as error:
                asyncio.run(use(client))
            assert str(error.value) == other

    async def main(port):
        client = AsyncClient(f"localhost:{port}")
        await asyncio.to_thread(refuse, client)
        await call(client)
        await asyncio.to_thread(refuse, client)
        await call(client)
        return client

    with running(Servicer()) as port:
        client = asyncio.run(main(port))
        refuse(client)
        asyncio.run(client.close())


@pytest.mark.parametrize("name", ["retry-after-ms", "grpc-retry-pushback-ms"])
def test_a_server_that_says_when_is_obeyed(name):
    """Both clients wait at least as long as it asks for; then it has room."""
    pauses = []

    async def pause(seconds):
        pauses.append(seconds)

    async def unblocking(port):
        async with AsyncClient(f"localhost:{port}", sleep=pause) as client:
            return await client.list_collections()

    with (
        running(Servicer(1, ((name, "1500"),))) as port,
        Client(f"localhost:{port}", sleep=pauses.append) as client,
    ):
        assert client.list_collections() == []
    with running(Servicer(1, ((name, "1500"),))) as port:
        assert asyncio.run(unblocking(port)) == []
    assert len(pauses) == 2
    assert all(1.5 <= seconds <= 1.6 for seconds in pauses)


def test_a_server_that_wants_no_more_calls_gets_none():
    """A negative push-back ends the attempts, and the error says what it was."""
    servicer = Servicer(9, (("grpc-retry-pushback-ms", "-1"),))
    with (
        running(servicer) as port,
        Client(f"localhost:{port}") as client,
        pytest.raises(QueueFullError) as error,
    ):
        client.list_collections()
    assert error.value.retry_after_s == -0.001
    assert len(servicer.metadata) == 1


def test_every_front_end_says_when_to_come_back(serving, fake, image):
    """What the server knows reaches the caller as a number of the error."""
    limits = CallerLimits(requests_per_s=0.001)

    async def main():
        once = RetryPolicy(attempts=1)
        async with (
            serving(fake, limits=limits) as server,
            AsyncClient(server.address, retry=once) as client,
        ):
            await client.list_models()
            with pytest.raises(QueueFullError, match="rate of this caller") as error:
                await client.embed([image(1)])
            return error.value.retry_after_s

    assert 900 < asyncio.run(main()) <= 1000
