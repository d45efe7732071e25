from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import trustme

from models.encoder import open_encoder
from models.errors import EncoderError, EncoderUnavailableError, FingerprintMismatchError
from models.preprocess import PreprocessSpec
from models.remote import CHANNEL_OPTIONS, TIMEOUT_S, RemoteEncoder
from models.wire import vectors_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.errors import UnavailableError
from serve.security.options import KeyOptions
from serve.security.ring import hash_token
from serve.security.tls import TlsOptions
from serve.watchdog import WatchdogOptions
from tests.link import Link


def on_server(serving, bundles, work):
    """Run blocking `work(address)` beside a server of `bundles`."""

    async def main():
        async with serving(bundle=tuple(str(bundle.path) for bundle in bundles)) as server:
            return await asyncio.to_thread(work, server.address)

    return asyncio.run(main())


@pytest.mark.parametrize("address", ["host", "host:0", "host:65537/m", "host:x"])
def test_an_address_without_a_port_that_exists_is_refused(address):
    """Of a larger number gRPC takes the low bits, which are another server's."""
    with pytest.raises(EncoderError, match=r"expected HOST:PORT\[/MODEL\], a port of 1 to 65535"):
        open_encoder(f"horace://{address}")


def test_an_encoder_behind_a_server_is_the_encoder(serving, make_bundle):
    """Name, fingerprint, preprocessing and vectors, to the bit, also of no images."""
    bundle = make_bundle()
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 1), dtype=np.uint8)

    def work(address):
        remote = open_encoder(f"horace://{address}/tiny")
        local = open_encoder(bundle.path)
        assert (remote.name, remote.fingerprint, remote.dim) == ("tiny", bundle.fingerprint, 16)
        assert remote.preprocessing == bundle.preprocessing
        np.testing.assert_array_equal(remote.encode(images), local.encode(images))
        np.testing.assert_array_equal(remote.encode(images[:0]), local.encode(images[:0]))
        np.testing.assert_array_equal(remote.preprocess(images[0]), local.preprocess(images[0]))
        with pytest.raises(EncoderError, match=r"expected \(N, 28, 28, 1\) uint8"):
            remote.encode(images[:, :5])
        remote.close()

    on_server(serving, [bundle], work)


def test_more_images_than_a_request_may_hold_go_in_several(serving, make_bundle):
    """The server's limits on images and on bytes are kept."""

    async def main():
        path = str(make_bundle().path)
        limits = {"max_images_per_request": 7, "max_message_mib": 1}
        async with serving(bundle=(path,), **limits) as server:
            images = np.zeros((30, 28, 28, 1), np.uint8)
            remote = await asyncio.to_thread(open_encoder, f"horace://{server.address}")
            assert (await asyncio.to_thread(remote.encode, images)).shape == (30, 16)
            remote.close()
        async with serving(bundle=(path,), max_message_mib=1) as server:
            images = np.zeros((3000, 28, 28, 1), np.uint8)
            remote = await asyncio.to_thread(open_encoder, f"horace://{server.address}")
            assert (await asyncio.to_thread(remote.encode, images)).shape == (3000, 16)
            remote.close()

    asyncio.run(main())


def test_a_model_that_is_not_served_is_one_line(serving, make_bundle):
    """The line names what is."""

    def work(address):
        with pytest.raises(EncoderError, match="expected a model named 'cat', found one, two"):
            open_encoder(f"horace://{address}/cat")

    on_server(serving, [make_bundle("one"), make_bundle("two", seed=2)], work)


def test_no_server_is_one_line():
    """The line names the address and how to start one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(EncoderError) as error:
            open_encoder(f"horace://127.0.0.1:{port}")
    assert f"horace://127.0.0.1:{port}: expected a Horace server that answers" in str(error.value)
    assert "check that `python -m serve` runs there" in str(error.value)


class Answers(pb_grpc.HoraceServicer):
    """A server whose model takes one image a request, and ten seconds by its own clock."""

    def __init__(self, code=None, side=8):
        self.code, self.side, self.left_s, self.now_s = code, side, [], 0.0

    def ListModels(self, request, context):
        """Tell of it."""
        side = self.side
        preprocessing = PreprocessSpec(height=side, width=side, channels=1, resize=side)
        spec = json.dumps(preprocessing.to_json())
        model = pb.Model(name="m", fingerprint="f", dim=1, preprocessing_json=spec, is_default=True)
        model.max_images_per_request, model.max_request_bytes = 1, 1 << 20
        return pb.ListModelsResponse(models=[model])

    def Embed(self, request, context):
        """Give a vector, or the code."""
        self.left_s.append(context.time_remaining())
        self.now_s += 10
        if self.code:
            context.abort(self.code, "as the test wants it")
        vectors = vectors_to_wire(np.ones((1, 1), np.float32))
        return pb.EmbedResponse(vectors=vectors, statuses=[pb.ItemStatus()], fingerprint="f")


@contextlib.contextmanager
def listening(servicer):
    """The port of such a server."""
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_HoraceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait(30)


@contextlib.contextmanager
def answering(servicer, **options):
    """An encoder behind such a server."""
    with listening(servicer) as port:
        encoder = RemoteEncoder(f"127.0.0.1:{port}", clock=lambda: servicer.now_s, **options)
        with contextlib.closing(encoder):
            yield encoder


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, EncoderUnavailableError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, EncoderUnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, EncoderUnavailableError),
        (grpc.StatusCode.CANCELLED, EncoderUnavailableError),
        (grpc.StatusCode.INTERNAL, EncoderError),
    ],
)
def test_a_server_that_is_away_or_full_is_told_from_one_that_fails(code, error):
    """So that the callers of a server in front of it are told to try again."""
    with answering(Answers(code), timeout_s=3) as encoder:
        with pytest.raises(EncoderError, match=r"as the test wants it|Deadline") as raised:
            encoder.encode(np.zeros((1, 8, 8, 1), np.uint8))
        assert type(raised.value) is error


class Restarting(Answers):
    """One whose first answer is the code, and no other."""

    def Embed(self, request, context):
        """Answer as asked, and well from then on."""
        try:
            return super().Embed(request, context)
        finally:
            self.code = None


@pytest.mark.parametrize("side", [8, 1000])
def test_what_a_stopping_server_has_not_looked_at_is_asked_again(side):
    """It ends as CANCELLED on grpcio, and a build of hours must not end with it.

    Of a request of more than 256 KiB gRPC, left alone, keeps nothing to ask again with.
    """
    with answering(Restarting(grpc.StatusCode.CANCELLED, side)) as encoder:
        assert encoder.encode(np.zeros((1, side, side, 1), np.uint8)).tolist() == [[1]]


def test_a_connection_that_is_lost_without_a_word_costs_a_batch_time_and_no_more(monkeypatch):
    """It is noticed within the time that the batch has, which goes by another connection."""
    times = ("grpc.keepalive_time_ms", "grpc.http2.ping_timeout_ms")
    assert sum(ms for name, ms in CHANNEL_OPTIONS if name in times) < TIMEOUT_S * 1e3
    hasty = [(name, value // 100 if name in times else value) for name, value in CHANNEL_OPTIONS]
    monkeypatch.setattr("models.remote.CHANNEL_OPTIONS", hasty)
    image_NHWC = np.zeros((1, 8, 8, 1), np.uint8)
    with (
        listening(Answers()) as port,
        (link := Link(port)).listener,
        contextlib.closing(RemoteEncoder(link.address, timeout_s=5)) as encoder,
    ):
        assert encoder.encode(image_NHWC).tolist() == [[1]]
        link.lose()
        assert encoder.encode(image_NHWC).tolist() == [[1]]


def test_a_batch_of_many_requests_has_one_deadline():
    """Or its parts together would take longer than a server waits for a thread of its own."""
    servicer = Answers()
    with answering(servicer) as encoder:
        assert encoder.encode(np.zeros((3, 8, 8, 1), np.uint8)).shape == (3, 1)
    assert all(left_s <= most for left_s, most in zip(servicer.left_s, (31, 21, 11), strict=True))
    assert WatchdogOptions().stuck_s >= 1.5 * TIMEOUT_S


def test_a_server_that_changes_its_model_is_noticed(serving, make_bundle):
    """Vectors of another encoder are an error, never mixed with those before."""
    one, two = make_bundle("one"), make_bundle("two", seed=2)

    async def main():
        async with serving(bundle=(f"m={one.path}", f"n={two.path}")) as server:
            remote = await asyncio.to_thread(open_encoder, f"horace://{server.address}/m")
            server.catalog.models["m"] = server.catalog.models["n"]
            with pytest.raises(FingerprintMismatchError, match="has changed its model"):
                await asyncio.to_thread(remote.encode, np.zeros((1, 28, 28, 1), np.uint8))
            remote.close()

    asyncio.run(main())


def test_a_server_in_front_of_a_server(serving, make_bundle):
    """A remote encoder can be served like any other, with the same vectors."""
    image = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)

    async def main():
        from serve.client import AsyncClient

        async with (
            serving(bundle=(str(make_bundle().path),)) as behind,
            serving(bundle=(f"front=horace://{behind.address}",)) as front,
            AsyncClient(behind.address) as near,
            AsyncClient(front.address) as far,
        ):
            expected, found = await near.embed([image]), await far.embed([image])
            assert found.model == "front"
            assert found.fingerprint == expected.fingerprint
            np.testing.assert_array_equal(found.vectors, expected.vectors)

    asyncio.run(main())


def test_a_server_in_front_is_not_ready_until_it_has_read_what_changed_behind(
    serving, make_bundle, tmp_path, eventually
):
    """Its callers are told both fingerprints and the name that they know; SIGHUP mends it."""
    path = tmp_path / "m"
    image = np.zeros((28, 28), np.uint8)
    one = make_bundle(path=path)

    async def main():
        from serve.client import AsyncClient, RetryPolicy

        async with (
            serving(bundle=(f"m={path}",)) as behind,
            serving(bundle=(f"far=horace://{behind.address}/m",)) as front,
            AsyncClient(front.address, retry=RetryPolicy(attempts=1)) as client,
        ):
            assert (await client.embed([image])).fingerprint == one.fingerprint
            shutil.rmtree(path)
            two = make_bundle(seed=2, path=path)
            assert await behind.reloads.run() == []
            with pytest.raises(UnavailableError) as error:
                await client.embed([image])
            fingerprints = f"expected encoder {one.fingerprint}, found encoder {two.fingerprint}"
            assert f"model far: {fingerprints}" in str(error.value)
            await eventually(lambda: not front.health.serving)
            assert await front.reloads.run() == []
            await eventually(lambda: front.health.serving)
            assert (await client.embed([image])).fingerprint == two.fingerprint

    asyncio.run(main())


def test_a_collection_that_only_an_encoder_of_before_can_query_is_its_callers_trouble(
    serving, stored, make_bundle
):
    """The server behind has another encoder now: image queries fail, and all else is served."""
    image = np.zeros((28, 28), np.uint8)
    collection = {"collection": (f"c={stored.collection}",)}

    async def main():
        from serve.client import AsyncClient, RetryPolicy

        async with (
            serving(bundle=(f"m={stored.bundle}",)) as behind,
            serving(bundle=(f"m=horace://{behind.address}/m",), **collection) as front,
            AsyncClient(front.address, retry=RetryPolicy(attempts=1)) as client,
        ):
            assert (await client.search([image])).hits[0]
            shutil.rmtree(stored.bundle)
            two = make_bundle(seed=2, path=stored.bundle)
            assert await behind.reloads.run() == []
            assert await front.reloads.run() == []
            with pytest.raises(UnavailableError, match=f"found encoder {two.fingerprint}"):
                await client.search([image])
            assert repr(front.recovery) == "<Recovery well, 0 so far>"
            assert front.health.serving
            assert (await client.embed([image])).fingerprint == two.fingerprint

    asyncio.run(main())


def test_a_secured_server_is_reached_by_key_and_certificate(
    serving, make_bundle, tmp_path, monkeypatch
):
    """Out of the environment, which no URI that is written down repeats."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    (tmp_path / "cert.pem").write_bytes(certificate.cert_chain_pems[0].bytes())
    (tmp_path / "keys").write_text(f"alice:{hash_token('sesame').hex()}\n")
    secured = {
        "tls": TlsOptions(cert=str(tmp_path / "cert.pem"), key=str(tmp_path / "key.pem")),
        "keys": KeyOptions(file=str(tmp_path / "keys")),
    }
    monkeypatch.setenv("HORACE_TLS_CA", str(tmp_path / "ca.pem"))

    def work(address):
        with pytest.raises(
            EncoderError, match="UNAUTHENTICATED: API key: expected a key of this"
        ) as e:
            open_encoder(f"horaces://{address}")
        assert str(e.value).endswith("; give a key of that server in HORACE_API_KEY")
        monkeypatch.setenv("HORACE_API_KEY", "sesame")
        remote = open_encoder(f"horaces://{address}/tiny")
        assert remote.encode(np.zeros((2, 28, 28, 1), np.uint8)).shape == (2, 16)
        assert "sesame" not in repr(remote)
        remote.close()

    async def main():
        async with serving(bundle=(str(make_bundle().path),), **secured) as server:
            await asyncio.to_thread(work, server.address)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HORACE_API_KEY", "two words", "HORACE_API_KEY: expected visible ASCII without spaces"),
        ("HORACE_TLS_CA", "no.pem", "HORACE_TLS_CA no.pem: expected a PEM file of authorities"),
    ],
)
def test_variables_that_cannot_be_used_are_one_line(monkeypatch, name, value, message):
    """Before a server is asked; a key is not shown."""
    monkeypatch.setenv(name, value)
    with pytest.raises(EncoderError, match=message) as error:
        open_encoder("horaces://localhost:1")
    assert "two words" not in str(error.value)
