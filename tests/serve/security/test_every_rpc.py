"""Every RPC of every service against no key, a wrong key and the right one, on both front ends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2 as kserve_pb2

from models.wire import image_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.errors import StartError
from serve.security import security
from serve.security.files import RereadThread
from serve.security.options import CallerLimits, KeyOptions
from serve.security.ring import new_token, write_line

PATIENCE_S = 120.0
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"


CLIENTS_OWN = "Internal error from Core"
"""What grpc.aio's client says now and then of a stream that was refused while it still wrote."""


@dataclass(frozen=True)
class Rpc:
    """One method, found in a descriptor."""

    service: str
    name: str
    request_streaming: bool
    response_streaming: bool

    def __str__(self) -> str:
        return f"{self.service}/{self.name}"

    async def call(self, channel, metadata=(), raw=b""):
        """Call it with one message; give the status that it ends with."""
        kinds = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }
        make = kinds[self.request_streaming, self.response_streaming]
        message = iter([raw]) if self.request_streaming else raw
        call = make(f"/{self}")(message, metadata=tuple(metadata), timeout=PATIENCE_S)
        try:
            if self.response_streaming:
                await call.read()
                return grpc.StatusCode.OK, ""
            await call
        except grpc.aio.AioRpcError:
            pass
        if await call.details() == CLIENTS_OWN:
            return await self.call(channel, metadata, raw)
        return await call.code(), await call.details()


def rpcs_of(*files) -> list[Rpc]:
    """Walk the services of some files."""
    return [
        Rpc(service.full_name, method.name, method.client_streaming, method.server_streaming)
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


RPCS = rpcs_of(pb, health_pb2, reflection_pb2, kserve_pb2)
CLOSED = [rpc for rpc in RPCS if rpc.service != HEALTH]
OPEN = [rpc for rpc in RPCS if rpc.service == HEALTH]


@pytest.fixture
def token() -> str:
    """A key that the server knows."""
    return new_token()


@pytest.fixture
def keys(token, tmp_path) -> KeyOptions:
    """A key file with that key."""
    file = tmp_path / "keys"
    file.write_text(write_line("app", token) + "\n")
    return KeyOptions(file=str(file))


@pytest.mark.parametrize("rpc", CLOSED, ids=str)
def test_an_rpc_wants_a_key_of_this_server(rpc, serving, fake, keys, token):
    """None and a wrong one are UNAUTHENTICATED; the right one gets an answer, in either header."""

    async def main():
        async with (
            serving(fake, keys=keys) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            refused = [
                await rpc.call(channel),
                await rpc.call(channel, [("authorization", f"Bearer {token[:-1]}x")]),
                await rpc.call(channel, [("x-api-key", new_token())]),
                await rpc.call(channel, [("authorization", token)]),
                await rpc.call(channel, raw=b"\xff" * 1000),
            ]
            for code, details in refused:
                assert code is grpc.StatusCode.UNAUTHENTICATED, details
                assert details.startswith("API key: expected a key of this server as metadata")
                assert token not in details
            for name, value in (("authorization", f"Bearer {token}"), ("x-api-key", token)):
                code, details = await rpc.call(channel, [(name, value)])
                assert code is not grpc.StatusCode.UNAUTHENTICATED, details
                assert code is not grpc.StatusCode.UNKNOWN, details
            assert fake.computed == []

    asyncio.run(main())


@pytest.mark.parametrize("rpc", OPEN, ids=str)
def test_health_is_for_everyone(rpc, serving, fake, keys):
    """A probe has no key."""

    async def main():
        async with (
            serving(fake, keys=keys) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            assert (await rpc.call(channel))[0] is grpc.StatusCode.OK
            wrong = await rpc.call(channel, [("x-api-key", "wrong")])
            assert wrong[0] is grpc.StatusCode.OK

    asyncio.run(main())


@pytest.mark.parametrize("frontend", ["grpcio"])  # the only one that has TLS
@pytest.mark.parametrize("rpc", RPCS, ids=str)
def test_no_rpc_without_a_certificate_of_the_authority(rpc, serving, fake, pki):
    """mTLS: none, and one of another authority, do not get past the handshake."""

    async def main():
        async with serving(fake, tls=pki.mutual) as server:
            for client in (None, trustme.CA()):
                async with pki.channel(server, client=client) as channel:
                    code, _ = await rpc.call(channel)
                    assert code is grpc.StatusCode.UNAVAILABLE
            async with pki.channel(server, client=pki.client_ca) as channel:
                code, details = await rpc.call(channel)
                refused = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED)
                assert code not in refused, details

    asyncio.run(main())


def test_no_service_of_the_server_is_missing_here(serving, fake):
    """What reflection lists is what the tests above walk."""

    async def main():
        async with (
            serving(fake) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            async for reply in stub.ServerReflectionInfo(iter([request])):
                return {service.name for service in reply.list_services_response.service}

    listed = asyncio.run(main())
    assert listed >= {"horace.v1.Horace", HEALTH, REFLECTION}
    assert listed <= {rpc.service for rpc in RPCS}


def test_methods_that_are_not_there_want_a_key_too(serving, fake, keys, token):
    """Without one nobody finds out what there is."""
    rpc = Rpc("horace.v1.Horace", "Delete", False, False)

    async def main():
        async with (
            serving(fake, keys=keys) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            assert (await rpc.call(channel))[0] is grpc.StatusCode.UNAUTHENTICATED
            code, _ = await rpc.call(channel, [("x-api-key", token)])
            assert code is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(main())


def test_reflection_may_be_open(serving, fake, keys):
    """Where it is asked for; the services themselves stay closed."""
    (rpc,) = [rpc for rpc in RPCS if rpc.service == REFLECTION]
    embed = Rpc("horace.v1.Horace", "Embed", False, False)
    raw = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()

    async def main():
        async with (
            serving(fake, keys=KeyOptions(file=keys.file, open_reflection=True)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            assert (await rpc.call(channel, raw=raw))[0] is grpc.StatusCode.OK
            assert (await embed.call(channel))[0] is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(main())


@pytest.mark.parametrize("rpc", RPCS, ids=str)
def test_bytes_that_are_no_message_are_the_callers_fault(rpc, serving, fake):
    """INVALID_ARGUMENT with what was expected, on both front ends, and no traceback."""

    async def main():
        async with (
            serving(fake) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            return await rpc.call(channel, raw=b"\x0a\xff\xff\xff\xff\x0f" * 3)

    code, details = asyncio.run(main())
    assert code is grpc.StatusCode.INVALID_ARGUMENT, details
    assert details.startswith("message: expected a ")
    assert details.endswith(" in protobuf's encoding, found 18 other bytes")


def test_a_key_is_taken_back_while_the_server_runs(serving, fake, keys, token, tmp_path):
    """The file without it, a reload: it opens nothing any more, and a new one does."""
    rpc = Rpc("horace.v1.Horace", "ListModels", False, False)
    new = new_token()

    async def main():
        async with (
            serving(fake, keys=keys) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            assert (await rpc.call(channel, [("x-api-key", token)]))[0] is grpc.StatusCode.OK
            (tmp_path / "keys").write_text(write_line("other", new))
            assert await server.reloads.run() == []
            code, _ = await rpc.call(channel, [("x-api-key", token)])
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert (await rpc.call(channel, [("x-api-key", new)]))[0] is grpc.StatusCode.OK
            (tmp_path / "keys").write_text("broken")
            assert await server.reloads.run() == ["API keys"]
            assert (await rpc.call(channel, [("x-api-key", new)]))[0] is grpc.StatusCode.OK
            (tmp_path / "keys").write_text("# the last was taken out\n")
            assert await server.reloads.run() == []
            code, _ = await rpc.call(channel, [("x-api-key", new)])
            assert code is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(main())


def test_a_server_does_not_start_with_keys_of_which_there_is_none(serving, fake, keys, tmp_path):
    """Nobody could get in."""
    (tmp_path / "keys").write_text("# none yet\n")

    async def main():
        async with serving(fake, keys=keys):
            pass

    with pytest.raises(StartError, match="expected at least one key, found none; add one with"):
        asyncio.run(main())


def test_a_key_file_that_changes_is_read_by_itself(
    serving, fake, keys, tmp_path, eventually, monkeypatch
):
    """Nobody has to send a signal."""
    new = new_token()
    monkeypatch.setattr(security, "RereadThread", partial(RereadThread, every_s=0.01))

    async def main():
        async with serving(fake, keys=keys) as server:
            (tmp_path / "keys").write_text("# changed\n" + write_line("other", new))
            await eventually(lambda: "other" in repr(server.security))

    asyncio.run(main())


LIMITED = CallerLimits(requests_per_s=0.001, images_per_s=0.001, burst_s=3000)


def test_a_caller_above_its_rate_is_told_when_to_come_back(serving, fake, image):
    """Three requests are its burst; the fourth is refused, with the time in its trailers."""
    request = pb.EmbedRequest(images=[image_to_wire(image(7))])

    async def main():
        async with (
            serving(fake, limits=LIMITED) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            for _ in range(3):
                assert (await stub.Embed(request, timeout=PATIENCE_S)).vectors.rows == 1
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await stub.Embed(request, timeout=PATIENCE_S)
            assert (await Rpc(HEALTH, "Check", False, False).call(channel))[0] is grpc.StatusCode.OK
            return refusal.value

    refusal = asyncio.run(main())
    assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "at most 0.001 requests and 0.001 images a second" in refusal.details()
    trailers = dict(refusal.trailing_metadata())
    assert int(trailers["retry-after-ms"]) == pytest.approx(1e6, rel=0.01)
    assert fake.computed == [7, 7, 7]


def test_a_stream_above_its_rate_is_held_back_and_loses_nothing(serving, fake, image):
    """Ten messages at a hundred a second and a burst of one: all are answered, in order."""
    limits = CallerLimits(requests_per_s=100, burst_s=0.01)
    requests = [
        pb.EmbedRequest(images=[image_to_wire(image(n))], request_id=str(n)) for n in range(10)
    ]

    async def main():
        async with (
            serving(fake, limits=limits) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stream = pb_grpc.HoraceStub(channel).EmbedStream(iter(requests))
            return [reply.request_id async for reply in stream if not reply.HasField("error")]

    assert asyncio.run(main()) == [str(n) for n in range(10)]


def test_calls_of_one_caller_are_bounded_and_free_again(serving, fake, image, eventually):
    """Streams and calls alike; one that is cancelled makes room for the next."""
    request = pb.EmbedRequest(images=[image_to_wire(image(1))])

    async def main():
        async with (
            serving(fake, limits=CallerLimits(calls_per_client=2)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            fake.gate.clear()
            held = [stub.Embed(request), stub.Embed(request)]
            await eventually(lambda: server.calls.active == 2)
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await stub.Embed(request, timeout=PATIENCE_S)
            assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "calls of this caller that are open at once" in refusal.value.details()
            assert dict(refusal.value.trailing_metadata())["retry-after-ms"] == "1000"
            held[0].cancel()
            fake.gate.set()
            await held[1]
            await eventually(lambda: "calls=0" in repr(server.security))
            assert (await stub.Embed(request, timeout=PATIENCE_S)).vectors.rows == 1

    asyncio.run(main())


def test_calls_of_one_connection_wait_for_their_turn(serving, fake, image, eventually):
    """Ten at once where three may be: no more than three reach us, and all are answered."""
    most = 0

    async def main():
        nonlocal most
        async with (
            serving(fake, limits=CallerLimits(calls_per_connection=3)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            await stub.ListModels(pb.ListModelsRequest())  # the server has said how many may be
            fake.gate.clear()
            held = [
                asyncio.ensure_future(stub.Embed(pb.EmbedRequest(images=[image_to_wire(image(n))])))
                for n in range(10)
            ]
            await eventually(lambda: server.calls.active == 3)
            most = server.calls.active
            fake.gate.set()
            replies = await asyncio.gather(*held)
            assert [reply.vectors.rows for reply in replies] == [1] * 10

    asyncio.run(main())
    assert most == 3
