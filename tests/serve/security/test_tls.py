"""TLS with certificates made for the test: who gets in, and what a new certificate changes."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import ssl
from functools import partial
from shutil import copy

import grpc
import numpy as np
import pytest
import trustme

from models.errors import UsageError
from models.wire import image_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.client import Client
from serve.client.connection import ClientTls
from serve.config import ServeOptions
from serve.errors import StartError
from serve.front.grpcio import GrpcioFront
from serve.security import security
from serve.security.files import RereadThread, UnreadableError
from serve.security.options import KeyOptions
from serve.security.ring import new_token, write_line
from serve.security.tls import Tls, TlsOptions, read_certificates
from serve.server import Server

PATIENCE_S = 120.0


@pytest.fixture
def frontend() -> str:
    """The only front end that has TLS."""
    return "grpcio"


async def get_in(channel) -> bool:
    """Whether a call gets an answer; False where the handshake is refused."""
    try:
        await pb_grpc.HoraceStub(channel).ListModels(pb.ListModelsRequest(), timeout=PATIENCE_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False
    return True


def test_who_trusts_the_authority_gets_in_and_nobody_in_the_clear(serving, fake, pki):
    """TLS alone: the server proves who it is; a plain connection gets nothing."""

    async def main():
        async with serving(fake, tls=pki.options) as server:
            async with pki.channel(server) as channel:
                assert await get_in(channel)
            async with pki.channel(server, trustme.CA()) as channel:
                assert not await get_in(channel)
            async with grpc.aio.insecure_channel(f"localhost:{server.port}") as channel:
                assert not await get_in(channel)

    asyncio.run(main())


def test_a_caller_goes_by_its_certificate(serving, fake, image, pki):
    """Queues, limits and logs know it by the subject that the authority signed."""
    request = pb.EmbedRequest(images=[image_to_wire(image(3))])

    async def main():
        async with (
            serving(fake, tls=pki.mutual) as server,
            pki.channel(server, client=pki.client_ca) as channel,
        ):
            seen = []
            engine = server.catalog.models["fake"].engine
            embed = engine.embed
            engine.embed = lambda *a, **k: seen.append(k["client"]) or embed(*a, **k)
            await pb_grpc.HoraceStub(channel).Embed(request)
            return seen

    (client,) = asyncio.run(main())
    assert client.startswith("CN=app one,")


def test_mtls_and_keys_ask_for_both(serving, fake, pki, tmp_path):
    """The certificate gets a caller as far as the key."""
    token = new_token()
    (tmp_path / "keys").write_text(write_line("app", token))

    async def main():
        async with (
            serving(fake, tls=pki.mutual, keys=KeyOptions(file=str(tmp_path / "keys"))) as server,
            pki.channel(server, client=pki.client_ca) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await stub.ListModels(pb.ListModelsRequest())
            assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
            await stub.ListModels(pb.ListModelsRequest(), metadata=[("x-api-key", token)])

    asyncio.run(main())


def test_a_new_certificate_holds_for_new_connections_and_disturbs_no_old_one(serving, fake, pki):
    """The old authority's callers who are in stay in; the next handshake is with the new."""
    other = trustme.CA()

    async def main():
        async with (
            serving(fake, tls=pki.options) as server,
            pki.channel(server) as old,
        ):
            assert await get_in(old)
            pki.issue(other)
            assert await server.reloads.run() == []
            async with pki.channel(server, other) as channel:
                assert await get_in(channel)
            async with pki.channel(server) as channel:
                assert not await get_in(channel)
            assert await get_in(old)

    asyncio.run(main())


def test_a_new_authority_of_callers_holds_too(serving, fake, pki):
    """Callers of the old one are out at their next handshake."""
    other = trustme.CA()

    async def main():
        async with serving(fake, tls=pki.mutual) as server:
            (pki.folder / "ca.pem").write_bytes(other.cert_pem.bytes())
            assert await server.reloads.run() == []
            async with pki.channel(server, client=other) as channel:
                assert await get_in(channel)
            async with pki.channel(server, client=pki.client_ca) as channel:
                assert not await get_in(channel)

    asyncio.run(main())


def test_a_broken_new_certificate_is_refused_and_the_old_goes_on(serving, fake, pki, caplog):
    """Half a file, and a key of another certificate: a line in the log, and no gap."""
    old_cert, old_key = (pki.folder / "cert.pem").read_bytes(), pki.folder / "key.pem"

    async def main():
        async with serving(fake, tls=pki.options) as server:
            (pki.folder / "cert.pem").write_bytes(old_cert[:200])
            assert await server.reloads.run() == ["TLS certificate"]
            async with pki.channel(server) as channel:
                assert await get_in(channel)
            (pki.folder / "cert.pem").write_bytes(old_cert)
            old_key.write_bytes(pki.server_ca.issue_cert("localhost").private_key_pem.bytes())
            assert await server.reloads.run() == ["TLS certificate"]
            async with pki.channel(server) as channel:
                assert await get_in(channel)

    asyncio.run(main())
    assert sum("found key values mismatch" in message for message in caplog.messages) == 1


def test_a_certificate_that_changes_on_disk_is_taken_by_itself(
    serving, fake, pki, eventually, monkeypatch
):
    """Nobody has to send a signal."""
    monkeypatch.setattr(security, "RereadThread", partial(RereadThread, every_s=0.01))

    async def main():
        async with serving(fake, tls=pki.options) as server:
            other = trustme.CA()
            before = server.security._tls.files.value
            pki.issue(other)
            await eventually(lambda: server.security._tls.files.value is not before)
            async with pki.channel(server, other) as channel:
                assert await get_in(channel)

    asyncio.run(main())


def test_a_certificate_that_cannot_be_read_for_a_moment_is_read_at_the_next_look(
    pki, out_of_descriptors
):
    """Without another change."""
    files = Tls(pki.mutual).files
    before = files.value
    pki.issue()
    with out_of_descriptors():
        for _ in range(3):
            files.look()
    assert files.value is before
    files.look()
    assert files.value.chain == (pki.folder / "cert.pem").read_bytes()


@pytest.mark.parametrize("name", ["load_cert_chain", "load_verify_locations"])
def test_what_openssl_could_not_open_is_tried_again(pki, monkeypatch, name):
    """That is no fault of the certificates; what they are not, stays told."""
    files = Tls(pki.mutual).files
    pki.issue()

    def refuse(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(ssl.SSLContext, name, refuse)
        with pytest.raises(UnreadableError, match="found too many open files"):
            files.reload()
    files.look()
    files.look()
    assert files.value.chain == (pki.folder / "cert.pem").read_bytes()
    (pki.folder / "cert.pem").write_text("-----BEGIN CERTIFICATE-----")
    with pytest.raises(StartError) as refusal:
        files.reload()
    assert not isinstance(refusal.value, UnreadableError)


def test_under_load_a_changing_certificate_fails_no_call(start_server, make_bundle, pki, tmp_path):
    """A real process, a signal a change, a new connection a call: none fails."""
    ca = tmp_path / "server-ca.pem"
    ca.write_bytes(pki.server_ca.cert_pem.bytes())
    server = start_server(
        "--bundle", str(make_bundle().path),
        "--tls.cert", pki.options.cert, "--tls.key", pki.options.key,
    )  # fmt: skip
    port = server.address.rpartition(":")[2]
    image = np.zeros((28, 28, 1), np.uint8)
    vectors = []
    for n in range(40):
        if n % 4 == 0:
            pki.issue()
            server.process.send_signal(signal.SIGHUP)
        with Client(f"localhost:{port}", tls=ClientTls(ca=ca)) as client:
            vectors += [client.embed([image]).vectors for _ in range(5)]
    assert len(vectors) == 200
    assert all((vector == vectors[0]).all() for vector in vectors)
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cert": "c"}, "--tls.key: expected a file beside the other of the two, found none"),
        ({"key": "k"}, "--tls.cert: expected a file beside the other of the two, found none"),
        ({"client_ca": "a"}, "--tls.client-ca: expected --tls.cert and --tls.key, found none"),
    ],
)
def test_half_of_tls_is_no_tls(given, message):
    """What belongs together is asked for together."""
    with pytest.raises(UsageError) as error:
        TlsOptions(**given)
    assert str(error.value) == message


def make_pipe(path):
    """Put a pipe, which nobody writes to, in a file's place."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "cert.pem").unlink(), "found No such file or directory"),
        (lambda f: (f / "cert.pem").write_text("text"), "found no certificate in the first"),
        (lambda f: (f / "key.pem").write_text(""), "found no private key in the second"),
        (lambda f: copy(f / "cert.pem", f / "key.pem"), "found no private key in the second"),
        (lambda f: (f / "ca.pem").write_text("text"), "expected certificates of authorities"),
        (lambda f: make_pipe(f / "cert.pem"), "tls.cert .*cert.pem: .* found no regular file"),
        (lambda f: make_pipe(f / "key.pem"), "tls.key .*key.pem: .* found no regular file"),
        (lambda f: make_pipe(f / "ca.pem"), "tls.client-ca .*ca.pem: .* found no regular file"),
    ],
)
@pytest.mark.timeout(60)
def test_what_is_wrong_at_the_start_is_a_line(pki, spoil, message):
    """A server with half a certificate does not start."""
    spoil(pki.folder)
    with pytest.raises(StartError, match=message):
        Server(ServeOptions(port=0, tls=pki.mutual))


def test_a_key_with_a_password_is_refused_and_nobody_is_asked(pki):
    """OpenSSL would ask on the terminal, for ever."""
    from cryptography.hazmat.primitives import serialization

    file = pki.folder / "key.pem"
    key = serialization.load_pem_private_key(file.read_bytes(), None)
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(StartError, match="found one with a password, or one that is damaged"):
        read_certificates(pki.mutual.cert, pki.mutual.key, None)


def test_certificates_do_not_show_their_key(pki):
    """What gets into a log is that there are some."""
    certificates = read_certificates(pki.mutual.cert, pki.mutual.key, pki.mutual.client_ca)
    assert repr(certificates) == "<Certificates with an authority for callers>"


def test_the_native_front_end_refuses_tls_by_name(pki):
    """It has none; what is asked for by name is not quietly something else."""

    async def main():
        server = Server(ServeOptions(port=0, tls=pki.options, frontend="native"))
        await server.start()

    with pytest.raises(StartError, match="--frontend native: expected no TLS, found TLS; take"):
        asyncio.run(main())


def test_auto_takes_the_front_end_that_has_tls(serving, fake, pki):
    """Native without, grpcio with."""

    async def main():
        async with serving(fake, tls=pki.options, frontend="auto") as server:
            return type(server._front)

    assert asyncio.run(main()) is GrpcioFront
