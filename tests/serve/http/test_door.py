from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import httpx
import pytest
import trustme

from models.errors import UsageError
from protos import horace_pb2 as pb
from serve.errors import StartError
from serve.http.options import HttpOptions
from serve.http.protocol import ACCEPTS, PatientProtocol
from serve.security.tls import TlsOptions

MUCH = 16 << 20
"""Bytes: more than Linux holds for a connection (tcp_wmem)."""


def files(*images):
    """Images as parts of a form."""
    return [("images", (f"{n}.png", data)) for n, data in enumerate(images)]


def with_tls(folder):
    """Options of a server with TLS, and what a caller trusts."""
    authority, context = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(context)
    pem = folder / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
    return {"tls": TlsOptions(cert=str(pem), key=str(pem))}, context


def test_draining_answers_what_is_under_way(http_serving, fake, png, eventually):
    """New requests are told to go elsewhere; the old ones get their vectors; then it closes."""

    async def main():
        async with http_serving(fake) as (server, http):
            fake.gate.clear()
            held = asyncio.create_task(http.post("/v1/embed", files=files(png(1))))
            await eventually(fake.entered.is_set)
            draining = asyncio.create_task(server.drain(limit_s=30))
            await eventually(lambda: not server.health.serving)
            late = await http.post("/v1/embed", files=files(png(2)))
            unready = await http.get("/readyz")
            fake.gate.set()
            assert await draining == 0
            with pytest.raises(httpx.ConnectError):
                await httpx.AsyncClient().get(server.http.url)
            return await held, late, unready

    held, late, unready = asyncio.run(main())
    assert (held.status_code, late.status_code, unready.status_code) == (200, 503, 503)
    assert "the server is stopping" in late.json()["error"]["message"]
    assert "retry-after" in late.headers
    assert held.headers["connection"] == late.headers["connection"] == "close"


def test_a_connection_that_no_descriptor_is_left_for_is_tried_few_times_a_turn(
    http_serving, fake, eventually, out_of_descriptors, caplog
):
    """Asyncio has a line with a traceback for each try, and would make thousands a second."""

    async def main():
        async with http_serving(fake) as (server, http):
            with socket.socket() as caller:
                caller.setblocking(False)
                with out_of_descriptors():
                    assert caller.connect_ex(("127.0.0.1", server.http._server.port)) != 0
                    await eventually(lambda: "accept() out of system resource" in caplog.text)
                tries = caplog.text.count("accept() out of system resource")
            assert (await http.get("/healthz")).status_code == 200
            return tries

    assert asyncio.run(main()) <= ACCEPTS


def test_a_connection_too_many_is_refused_and_no_other(http_serving, fake):
    """Though it says nothing, those that were there before are served."""

    async def main():
        async with http_serving(fake, max_calls=2) as (server, first):
            address, url = httpx.URL(server.http.url), server.http.url + "/readyz"
            statuses = [(await first.get(url)).status_code]
            async with httpx.AsyncClient() as second, httpx.AsyncClient() as third:
                statuses.append((await second.get(url)).status_code)
                _, silent = await asyncio.open_connection(address.host, address.port)
                statuses.append((await third.get(url)).status_code)
                statuses += [(await one.get(url)).status_code for one in (first, second)]
                silent.close()
            return statuses

    assert asyncio.run(main()) == [200, 200, 503, 200, 200]


def test_a_reply_is_sent_at_once(http_serving, fake, monkeypatch):
    """Nagle's algorithm would hold back its body until the head is acknowledged: 40 ms."""
    at_once, made = [], PatientProtocol.connection_made

    def look(protocol, transport):
        accepted = transport.get_extra_info("socket")
        at_once.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        made(protocol, transport)

    async def main():
        async with http_serving(fake) as (_, http):
            await http.get("/readyz")

    monkeypatch.setattr(PatientProtocol, "connection_made", look)
    asyncio.run(main())
    assert at_once == [1]


def test_a_request_whose_body_is_not_here_yet_is_under_way(http_serving, fake, png, eventually):
    """A drain waits for it, and answers it; it is accepted once, and counted once."""
    form = httpx.Request("POST", "http://any", files=files(png(1)))

    async def main():
        async with http_serving(fake) as (server, http):
            rest = asyncio.Event()

            async def body():
                yield form.read()[:50]
                await rest.wait()
                yield form.read()[50:]

            fake.gate.clear()
            headers = {"content-type": form.headers["content-type"]}
            sent = asyncio.create_task(http.post("/v1/embed", content=body(), headers=headers))
            await eventually(lambda: server.calls.active == 1)
            draining = asyncio.create_task(server.drain(limit_s=30))
            await eventually(lambda: not server.health.serving)
            rest.set()
            await eventually(fake.entered.is_set)
            assert (server.calls.active, server.calls.accepted) == (1, 1)
            fake.gate.set()
            return await sent, await draining

    reply, cut_off = asyncio.run(main())
    assert (reply.status_code, cut_off) == (200, 0)


@asynccontextmanager
async def reply_that_nobody_reads(server, context, eventually):
    """A caller whose reply is larger than what the system holds for it, and who reads none yet."""
    host, port = httpx.URL(server.http.url).host, httpx.URL(server.http.url).port

    async def list_models():
        return pb.ListModelsResponse(models=[pb.Model(preprocessing_json=f'"{"x" * MUCH}"')])

    server.services._list_models = list_models
    caller = socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    caller.connect((host, port))
    reader, writer = await asyncio.open_connection(
        sock=caller, ssl=context, server_hostname=context and "localhost"
    )
    writer.write(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    await eventually(lambda: server.calls.accepted == 1 and not server.calls.active)
    try:
        yield reader
    finally:
        writer.close()


@pytest.mark.parametrize("tls", [False, True])
def test_a_drain_waits_for_replies_that_are_being_sent(
    http_serving, fake, eventually, monkeypatch, tls, tmp_path
):
    """However little of one a caller has read when its handler is done."""
    monkeypatch.setattr("serve.http.server.STOP_S", 0.5)
    options, context = with_tls(tmp_path) if tls else ({}, None)

    async def main():
        async with (
            http_serving(fake, **options) as (server, _),
            reply_that_nobody_reads(server, context, eventually) as reader,
        ):
            draining = asyncio.create_task(server.drain(limit_s=60))
            await asyncio.wait([draining], timeout=1)
            assert not draining.done()
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head)[1])
            assert len(await reader.readexactly(length)) > MUCH
            assert await draining == 0

    asyncio.run(main())


def test_a_reply_that_does_not_leave_in_time_is_cut_off_and_counted(
    http_serving, fake, eventually, monkeypatch
):
    """Whoever stops the server is told."""
    monkeypatch.setattr("serve.server.LAST_REPLIES_S", 0.05)

    async def main():
        async with (
            http_serving(fake) as (server, _),
            reply_that_nobody_reads(server, None, eventually) as reader,
        ):
            assert await server.drain(limit_s=0) == 1
            with contextlib.suppress(ConnectionError):
                assert len(await reader.read()) < MUCH

    asyncio.run(main())


def test_a_caller_that_reads_nothing_of_its_reply_is_cut_off(
    http_serving, fake, eventually, monkeypatch
):
    """It would keep its place among the connections, and the reply in memory, for ever."""
    monkeypatch.setattr("serve.http.server.UNREAD_S", 0.1)

    async def main():
        async with (
            http_serving(fake) as (server, _),
            reply_that_nobody_reads(server, None, eventually),
        ):
            await eventually(lambda: not server.http._server._uvicorn.server_state.connections)

    asyncio.run(main())


def test_connections_that_say_nothing_do_not_hold_a_drain(
    http_serving, fake, tmp_path, monkeypatch
):
    """Also of a caller that does not answer the end of TLS: its program does not look."""
    monkeypatch.setattr("serve.http.server.STOP_S", 0.5)
    options, context = with_tls(tmp_path)

    def ask(url):
        plain = socket.create_connection((httpx.URL(url).host, httpx.URL(url).port), timeout=30)
        caller = context.wrap_socket(plain, server_hostname="localhost")
        caller.sendall(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert caller.recv(1 << 10).startswith(b"HTTP/1.1 200")
        return caller

    async def main():
        async with http_serving(fake, **options) as (server, _):
            with await asyncio.to_thread(ask, server.http.url):
                assert await asyncio.wait_for(server.drain(limit_s=60), 10) == 0

    asyncio.run(main())


def test_the_process_says_where_http_is(start_server):
    """The ready line has the address; SIGTERM ends it with status 0."""
    server = start_server("--http.port", "0")
    url = server.ready_line.rpartition("http=")[2]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(httpx.get, [url + "/v1/models"] * 4))
    assert [reply.status_code for reply in replies] == [200] * 4
    assert server.stop(signal.SIGTERM) == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "localhost"])
def test_every_address_of_a_host_is_listened_on(serving, fake, host):
    """`[::]` is every interface, of IPv4 too, as it is for gRPC."""

    async def main():
        async with serving(fake, http=HttpOptions(port=0, host=host)) as server:
            port = int(server.http.url.rpartition(":")[2])
            async with httpx.AsyncClient() as http:
                return await http.get(f"http://127.0.0.1:{port}/readyz")

    assert asyncio.run(main()).status_code == 200


def test_without_a_port_there_is_no_http(serving, fake):
    """Nothing listens that nobody asked for."""

    async def main():
        async with serving(fake) as server:
            assert server.http.url is None
            assert repr(server.http) == "<HttpDoor closed>"

    asyncio.run(main())


def test_a_port_in_use_is_one_line(serving, fake):
    """And nothing is left open."""

    async def main():
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(StartError, match=f"port 127.0.0.1:{port}: expected a free port"):
                async with serving(fake, http=HttpOptions(port=port)):
                    pass

    asyncio.run(main())
    assert fake.closed or not fake.batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, "--http.port: expected 0 to 65535, found 70000"),
        ({"host": "0.0.0.0"}, "--http.host: expected --http.port beside it, found none"),
        ({"timeout_s": 0}, "--http.timeout-s: expected above 0 to 3600, found 0"),
        ({"max_body_mib": 0}, "--http.max-body-mib: expected at least 1, found 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    """By the name that people type."""
    with pytest.raises(UsageError, match=re.escape(message)):
        HttpOptions(**options)
