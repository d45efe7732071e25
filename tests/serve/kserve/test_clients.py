"""Triton's own clients, asyncio and blocking, unchanged: everything that they can ask for."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import uuid
from functools import partial

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.grpc import InferInput, InferRequestedOutput, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, shared_memory

from models.encoder import open_encoder
from models.errors import EncoderUnavailableError
from serve.kserve.options import KserveOptions
from serve.operation.options import MetricsOptions
from serve.security.options import KeyOptions
from serve.security.ring import new_token, write_line


def pixels(*values: int) -> InferInput:
    """The input of the fake model: images of one value each."""
    images = np.stack([np.full((8, 8, 1), value, np.uint8) for value in values])
    tensor = InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    return tensor


def ask(serving, fake, work, **options):
    """Serve the fake encoder and await `work` with a client."""

    async def scenario():
        async with (
            serving(fake, **options) as server,
            tritonclient.grpc.aio.InferenceServerClient(server.address) as client,
        ):
            return await work(client, server)

    return asyncio.run(scenario())


def ask_blocking(serving, fake, work, **options):
    """Serve the fake encoder and do `work` with a blocking client, on a thread."""

    async def scenario():
        async with serving(fake, **options) as server:

            def run():
                with tritonclient.grpc.InferenceServerClient(server.address) as client:
                    return work(client)

            return await asyncio.to_thread(run)

    return asyncio.run(scenario())


def test_health_and_descriptions(serving, fake):
    """What perf_analyzer and people ask before anything else."""

    async def work(client, server):
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("fake")
        assert await client.is_model_ready("fake", "1")
        assert not await client.is_model_ready("other")
        assert not await client.is_model_ready("fake", "9")
        about = await client.get_server_metadata()
        assert about.name == "horace"
        assert {"statistics", "system_shared_memory", "parameters"} <= set(about.extensions)
        metadata = await client.get_model_metadata("fake")
        assert (metadata.name, list(metadata.versions)) == ("fake", ["1"])
        assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
            ("images", "UINT8", [-1, 8, 8, 1])
        ]
        assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
            ("embeddings", "FP32", [-1, 4])
        ]
        config = (await client.get_model_config("fake")).config
        assert config.max_batch_size == 100
        assert list(config.input[0].dims) == [8, 8, 1]
        assert config.parameters["fingerprint"].string_value == fake.fingerprint
        assert "embeddings_int8" in config.parameters["optional_outputs"].string_value
        for question in (client.get_model_metadata, client.get_model_config):
            with pytest.raises(InferenceServerException, match="expected 'fake', found 'other'"):
                await question("other")

    ask(serving, fake, work, max_images_per_request=100)


def test_a_model_whose_servers_do_not_answer_is_not_ready_until_they_do(
    serving, fake, monkeypatch, eventually, caplog
):
    """The server is, and its other model; that it answers again is found out without callers."""
    caplog.set_level(logging.INFO, "horace.serve")
    monkeypatch.setattr("serve.server.REACH_EVERY_S", 0.01)
    away = threading.Event()
    remote = type(fake)(name="remote")
    encode = remote.encode

    def encode_there(images_NHWC):
        if away.is_set():
            raise EncoderUnavailableError("gpu1:8001 does not answer")
        return encode(images_NHWC)

    remote.encode = encode_there

    async def scenario():
        async with (
            serving(fake, remote) as server,
            tritonclient.grpc.aio.InferenceServerClient(server.address) as client,
        ):
            assert await client.is_model_ready("remote")
            away.set()
            with pytest.raises(InferenceServerException, match="found none that answers") as error:
                await client.infer("remote", [pixels(1)])
            assert error.value.status() == "StatusCode.UNAVAILABLE"
            assert not await client.is_model_ready("remote")
            assert await client.is_model_ready("fake")
            assert await client.is_server_ready()
            again = "remote models: all that are served answer"
            await eventually(lambda: "remote models: not ready yet" in caplog.text)
            assert not await client.is_model_ready("remote")
            away.clear()
            await eventually(lambda: again in caplog.text)
            assert await client.is_model_ready("remote")

    asyncio.run(scenario())
    assert caplog.text.count("gpu1:8001 does not answer") == 1


def test_readiness_ends_with_the_drain_and_before_it_calls_are_answered(serving, fake):
    """Health and readiness are one truth, and a call under way is counted."""

    async def work(client, server):
        fake.gate.clear()
        call = asyncio.create_task(client.infer("fake", [pixels(1)]))
        assert await asyncio.to_thread(fake.entered.wait, 120)
        draining = asyncio.create_task(server.drain(limit_s=30))
        async with asyncio.timeout(120):
            while await client.is_server_ready():
                pass
        assert await client.is_server_live()
        assert not await client.is_model_ready("fake")
        with pytest.raises(InferenceServerException, match="the server is stopping") as error:
            await client.infer("fake", [pixels(2)])
        assert error.value.status() == "StatusCode.UNAVAILABLE"
        fake.gate.set()
        assert (await call).as_numpy("embeddings")[0, 0] == 1
        assert await draining == 0

    ask(serving, fake, work)


def test_the_blocking_client(serving, fake):
    """Inference at once and by callback."""

    def work(client):
        assert client.infer("fake", [pixels(3)]).as_numpy("embeddings")[0, 0] == 3
        answers = queue.Queue()
        client.async_infer("fake", [pixels(4)], partial(_put, answers))
        result, error = answers.get(timeout=30)
        assert error is None
        assert result.as_numpy("embeddings")[0, 0] == 4

    ask_blocking(serving, fake, work)


def _put(answers, result, error):
    """Keep what a callback is given."""
    answers.put((result, error))


def test_a_stream_answers_in_order_and_goes_on_after_a_refusal(serving, fake):
    """Each with its id; the refusal says whose it is."""

    def work(client):
        answers = queue.Queue()
        client.start_stream(partial(_put, answers))
        for n in range(20):
            name = "other" if n == 7 else "fake"
            client.async_stream_infer(name, [pixels(n)], request_id=str(n))
        found = [answers.get(timeout=30) for _ in range(20)]
        client.stop_stream()
        for n, (result, error) in enumerate(found):
            if n == 7:
                assert "model: expected 'fake', found 'other'" in str(error)
            else:
                response = result.get_response()
                assert response.id == str(n)
                assert response.parameters["triton_final_response"].bool_param
                assert result.as_numpy("embeddings")[0, 0] == n

    ask_blocking(serving, fake, work)


def test_a_stream_of_more_than_the_queue_holds_waits(serving, fake):
    """What has no room is not read, and nothing is refused."""

    async def requests():
        for n in range(50):
            yield {"model_name": "fake", "inputs": [pixels(n)], "request_id": str(n)}

    async def work(client, server):
        found = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            found.append(result.as_numpy("embeddings")[0, 0])
        assert found == list(range(50))

    ask(serving, fake, work, max_queue_images=2, max_batch_images=1)


def test_a_refusal_in_a_stream_names_the_request(serving, fake):
    """Triton's client hides it, the message has it."""

    async def scenario():
        async with serving(fake) as server, grpc.aio.insecure_channel(server.address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = service_pb2.ModelInferRequest(model_name="other", id="mine")
            (reply,) = [reply async for reply in stub.ModelStreamInfer(iter([request]))]
            assert reply.error_message.startswith("model: expected 'fake'")
            assert (reply.infer_response.id, reply.infer_response.model_name) == ("mine", "other")

    asyncio.run(scenario())


@pytest.fixture
def memory():
    """A function that makes system shared memory with Triton's own tool; it ends with the test."""
    handles = []

    def make(byte_size: int):
        key = f"/horace-{uuid.uuid4().hex}"
        handles.append(shared_memory.create_shared_memory_region(key, key, byte_size))
        return key, handles[-1]

    yield make
    for handle in handles:
        shared_memory.destroy_shared_memory_region(handle)


def test_images_and_vectors_in_shared_memory(serving, fake, memory):
    """Nothing but their place crosses the wire."""
    images = np.stack([np.full((8, 8, 1), value, np.uint8) for value in (5, 6)])
    (given_key, given), (made_key, made) = memory(1000), memory(1000)
    shared_memory.set_shared_memory_region(given, [images], offset=100)

    async def work(client, server):
        await client.register_system_shared_memory("given", given_key, 900, offset=100)
        await client.register_system_shared_memory("made", made_key, 1000)
        status = await client.get_system_shared_memory_status(as_json=True)
        assert set(status["regions"]) == {"given", "made"}
        tensor = InferInput("images", [2, 8, 8, 1], "UINT8")
        tensor.set_shared_memory("given", 128)
        output = InferRequestedOutput("embeddings")
        output.set_shared_memory("made", 2 * 4 * 4, offset=64)
        reply = await client.infer("fake", [tensor], outputs=[output])
        assert list(reply.get_response().raw_output_contents) == [b""]
        found = reply.get_output("embeddings")
        assert found.parameters["shared_memory_region"].string_param == "made"
        assert found.parameters["shared_memory_byte_size"].int64_param == 32
        vectors = shared_memory.get_contents_as_numpy(made, np.float32, [2, 4], offset=64)
        assert vectors[:, 0].tolist() == [5, 6]
        await client.unregister_system_shared_memory("given")
        with pytest.raises(InferenceServerException, match="expected one that is registered"):
            await client.infer("fake", [tensor])
        await client.unregister_system_shared_memory()
        assert await client.get_system_shared_memory_status(as_json=True) == {}

    ask(serving, fake, work)


def test_shared_memory_is_held_to_its_bounds(serving, fake, memory):
    """Before anything is computed, and without a path in any message."""
    key, _ = memory(100)

    async def work(client, server):
        refused = partial(pytest.raises, InferenceServerException)
        with refused(match="expected a part of what its key names, found 101 bytes at 0 of 100"):
            await client.register_system_shared_memory("r", key, 101)
        with refused(match="expected a name, such as '/images', without other slashes"):
            await client.register_system_shared_memory("r", "/../etc/passwd", 1)
        await client.register_system_shared_memory("r", key, 100)
        tensor = InferInput("images", [1, 8, 8, 1], "UINT8")
        tensor.set_shared_memory("r", 64, offset=40)
        with refused(match="expected a part within its 100 bytes, found 64 bytes at 40"):
            await client.infer("fake", [tensor])
        tensor = InferInput("images", [1, 8, 8, 1], "UINT8")
        tensor.set_shared_memory("r", 63)
        with refused(match="expected 64 bytes, found 63"):
            await client.infer("fake", [tensor])
        output = InferRequestedOutput("embeddings")
        output.set_shared_memory("r", 15)
        with refused(match="expected room for 16 bytes, found 15"):
            await client.infer("fake", [pixels(1)], outputs=[output])
        assert fake.computed == []

    ask(serving, fake, work)


def test_shared_memory_may_be_switched_off(serving, fake, memory):
    """And CUDA's is not had here, though to unregister it does nothing."""
    key, _ = memory(100)

    async def work(client, server):
        with pytest.raises(InferenceServerException, match="found a server that has it switched"):
            await client.register_system_shared_memory("r", key, 100)
        await client.unregister_cuda_shared_memory()
        assert await client.get_cuda_shared_memory_status(as_json=True) == {}
        with pytest.raises(InferenceServerException, match="CUDA shared memory: expected system"):
            await client.register_cuda_shared_memory("r", b"aGFuZGxl", 0, 100)

    ask(serving, fake, work, kserve=KserveOptions(shared_memory="off"))


class Elsewhere:
    """The context of a call from another machine."""

    def __init__(self, peer: str) -> None:
        self.peer = lambda: peer

    def invocation_metadata(self):
        """Nothing came with it."""
        return ()

    def auth_context(self):
        """It is not encrypted."""
        return {}

    def time_remaining(self):
        """It has all the time."""
        return None

    async def abort(self, code, message, metadata=()):
        """End the call."""
        raise ConnectionAbortedError(f"{code.name}: {message}")


@pytest.mark.parametrize(
    "peer", ["ipv4:10.1.2.3:50000", "ipv6:%5B2001:db8::1%5D:50000", "ipv4:127.0.0.2:1", "", "x"]
)
@pytest.mark.parametrize("frontend", ["native"])  # it has no part in this
def test_shared_memory_is_for_this_machine(serving, fake, memory, peer):
    """Whoever calls from elsewhere cannot mean ours."""
    key, _ = memory(100)

    async def work(client, server):
        request = service_pb2.SystemSharedMemoryRegisterRequest(name="r", key=key, byte_size=100)
        with pytest.raises(
            ConnectionAbortedError, match=r"FAILED_PRECONDITION: .* found one elsew"
        ):
            await server.kserve.SystemSharedMemoryRegister(request, Elsewhere(peer))
        assert await client.get_system_shared_memory_status(as_json=True) == {}

    ask(serving, fake, work)


@pytest.mark.parametrize("frontend", ["native"])  # it has no part in this
def test_a_caller_elsewhere_reaches_no_region(serving, fake, memory):
    """Not to read it, nor to write it, nor to list or forget it, once another has made it."""
    (key, _), away = memory(1000), Elsewhere("ipv4:10.1.2.3:50000")
    own = Elsewhere("ipv4:127.0.0.1:50000")

    def request(*, given: bool):
        message = service_pb2.ModelInferRequest(model_name="fake")
        tensor = message.inputs.add(name="images", datatype="UINT8", shape=[1, 8, 8, 1])
        place = tensor if given else message.outputs.add(name="embeddings")
        place.parameters["shared_memory_region"].string_param = "r"
        place.parameters["shared_memory_byte_size"].int64_param = 64
        if not given:
            message.raw_input_contents.append(bytes(64))
        return message

    async def work(client, server):
        kserve = server.kserve
        await client.register_system_shared_memory("r", key, 1000)
        for given in (True, False):
            with pytest.raises(ConnectionAbortedError, match="FAILED_PRECONDITION: shared memory"):
                await kserve.ModelInfer(request(given=given), away)
        status = service_pb2.SystemSharedMemoryStatusRequest()
        assert not (await kserve.SystemSharedMemoryStatus(status, away)).regions
        everything = service_pb2.SystemSharedMemoryUnregisterRequest()
        await kserve.SystemSharedMemoryUnregister(everything, away)
        assert set((await kserve.SystemSharedMemoryStatus(status, own)).regions) == {"r"}
        assert fake.computed == []
        await kserve.ModelInfer(request(given=True), own)

    ask(serving, fake, work)


@pytest.mark.parametrize("frontend", ["native"])  # which hands streams on over such a socket
@pytest.mark.parametrize(("host", "is_refused"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_socket_of_this_machine_proves_nothing_where_others_may_call(
    serving, fake, memory, host, is_refused
):
    """Whose stream it is that comes over it, cannot be told."""
    key, _ = memory(1000)
    request = service_pb2.ModelInferRequest(model_name="fake")
    tensor = request.inputs.add(name="images", datatype="UINT8", shape=[1, 8, 8, 1])
    tensor.parameters["shared_memory_region"].string_param = "r"
    tensor.parameters["shared_memory_byte_size"].int64_param = 64

    async def work(client, server):
        await client.register_system_shared_memory("r", key, 1000)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            (reply,) = [reply async for reply in stub.ModelStreamInfer(iter([request]))]
        assert reply.error_message.startswith("shared memory: expected a caller") is is_refused
        assert bool(fake.computed) is not is_refused

    ask(serving, fake, work, host=host)


def test_regions_are_their_callers_own(serving, fake, memory, tmp_path):
    """Another key on this machine may use the same name for its own memory, and sees no other."""
    (one_key, _), (two_key, _) = memory(1000), memory(1000)
    tokens = {name: new_token() for name in ("one", "two")}
    file = tmp_path / "keys"
    file.write_text("".join(write_line(name, token) + "\n" for name, token in tokens.items()))
    one, two = ({"authorization": f"Bearer {token}"} for token in tokens.values())

    async def work(client, server):
        await client.register_system_shared_memory("r", one_key, 1000, headers=one)
        tensor = InferInput("images", [1, 8, 8, 1], "UINT8")
        tensor.set_shared_memory("r", 64)
        with pytest.raises(InferenceServerException, match="expected one that is registered"):
            await client.infer("fake", [tensor], headers=two)
        with pytest.raises(InferenceServerException, match="expected one that is registered"):
            await client.get_system_shared_memory_status("r", headers=two)
        await client.register_system_shared_memory("r", two_key, 500, headers=two)
        await client.unregister_system_shared_memory(headers=two)
        status = await client.get_system_shared_memory_status(headers=one, as_json=True)
        assert status["regions"]["r"]["key"] == one_key
        assert len((await client.infer("fake", [tensor], headers=one)).as_numpy("embeddings")) == 1

    ask(serving, fake, work, keys=KeyOptions(file=str(file)))


def test_shared_memory_is_read_once_there_is_room_and_never_too_much(
    serving, fake, memory, eventually
):
    """A part above a message's bound is not read; nor is one for which the queue has no room."""
    key, _ = memory(2 << 20)

    def encoded(byte_size: int) -> InferInput:
        tensor = InferInput("images", [1], "BYTES")
        tensor.set_shared_memory("r", byte_size)
        return tensor

    async def work(client, server):
        await client.register_system_shared_memory("r", key, 2 << 20)
        os.truncate(f"/dev/shm/{key}", 0)  # whoever reads it finds fewer bytes
        with pytest.raises(InferenceServerException) as refused:
            await client.infer("fake", [encoded(2 << 20)])
        assert refused.value.message() == (
            "images in shared memory: expected at most 1048576 bytes, found 2097152; "
            "split the request"
        )
        fake.gate.clear()
        held = asyncio.ensure_future(client.infer("fake", [pixels(1)]))
        await eventually(fake.entered.is_set)
        with pytest.raises(InferenceServerException, match="1 of 1 images"):
            await client.infer("fake", [encoded(100)])
        fake.gate.set()
        await held
        with pytest.raises(InferenceServerException, match="as it was registered, found fewer"):
            await client.infer("fake", [encoded(100)])

    ask(serving, fake, work, max_message_mib=1, max_queue_images=1)


def test_statistics_count_what_was_done(serving, fake):
    """Requests of every protocol, images, batches by size, failures."""

    async def work(client, server):
        await client.infer("fake", [pixels(1, 2, 3)])
        await client.infer("fake", [pixels(1)])
        fake.failures.append(RuntimeError("broken"))
        with pytest.raises(InferenceServerException, match="the encoder failed on these images"):
            await client.infer("fake", [pixels(1)])
        for name in ("fake", ""):
            reply = await client.get_inference_statistics(name)
            (found,) = reply.model_stats
            assert (found.name, found.version) == ("fake", "1")
            assert found.inference_count == 5  # and the image of the warm-up
            assert found.execution_count == 3
            assert found.inference_stats.success.count == 3
            assert found.inference_stats.success.ns >= found.inference_stats.compute_infer.ns > 0
            assert found.inference_stats.fail.count == 1
            assert [(b.batch_size, b.compute_infer.count) for b in found.batch_stats] == [
                (1, 2),
                (3, 1),
            ]
            assert found.last_inference > 1_700_000_000_000
        with pytest.raises(InferenceServerException, match="expected 'fake', found 'other'"):
            await client.get_inference_statistics("other")

    ask(serving, fake, work)


@pytest.mark.parametrize(("most", "labelled"), [(64, ("fake", "1")), (0, ("other", "other"))])
def test_statistics_and_metrics_are_one_account(serving, fake, monkeypatch, most, labelled):
    """They agree; a model beyond the metrics' bound has statistics of its own all the same."""
    monkeypatch.setattr("serve.operation.tally.MAX_MODELS", most)
    labels = 'model="{}",version="{}"'.format(*labelled)

    async def work(client, server):
        await client.infer("fake", [pixels(1, 2, 3)])
        fake.failures.append(RuntimeError("broken"))
        with pytest.raises(InferenceServerException, match="the encoder failed on these images"):
            await client.infer("fake", [pixels(1)])
        (found,) = (await client.get_inference_statistics("fake", "1")).model_stats
        of, lines = found.inference_stats, (await server.operation.metrics()).decode().splitlines()
        seen = dict(line.rsplit(" ", 1) for line in lines if line.startswith("nv_inference_"))
        for name, said in (
            ("count", found.inference_count),
            ("exec_count", found.execution_count),
            ("request_success", of.success.count),
            ("request_duration_us", of.success.ns / 1e3),
            ("queue_duration_us", of.queue.ns / 1e3),
            ("compute_input_duration_us", of.compute_input.ns / 1e3),
            ("compute_infer_duration_us", of.compute_infer.ns / 1e3),
            ("compute_output_duration_us", of.compute_output.ns / 1e3),
        ):
            shown = float(seen[f"nv_inference_{name}{{{labels}}}"])
            assert shown == pytest.approx(said, abs=1e-3), name
            assert said > 0
        failures = [float(n) for key, n in seen.items() if "request_failure{" in key]
        assert sum(failures) == of.fail.count == 1

    ask(serving, fake, work, metrics=MetricsOptions(port=0))


def test_models_are_loaded_and_unloaded_where_that_is_allowed(serving, make_bundle):
    """An unloaded model is listed and does not serve; it comes back as another version."""
    bundle = make_bundle("cats")

    async def scenario():
        async with (
            serving(bundle=(str(bundle.path),), model_control=True) as server,
            tritonclient.grpc.aio.InferenceServerClient(server.address) as client,
        ):
            await client.unload_model("cats")
            assert not await client.is_model_ready("cats")
            (listed,) = (await client.get_model_repository_index()).models
            assert (listed.name, listed.state, listed.reason) == ("cats", "UNAVAILABLE", "unloaded")
            await client.load_model("cats")
            assert await client.is_model_ready("cats")
            (listed,) = (await client.get_model_repository_index()).models
            assert (listed.name, listed.state) == ("cats", "READY")
            with pytest.raises(InferenceServerException, match="expected 'cats', found 'dogs'"):
                await client.load_model("dogs")
            with pytest.raises(InferenceServerException, match="expected a name alone: a model"):
                await client.load_model("cats", config="{}")

    asyncio.run(scenario())


def test_why_a_model_cannot_be_loaded_is_for_the_log(serving, make_bundle, caplog):
    """It says where things lie; callers hear that it cannot, in a reply and in the index."""
    bundle = make_bundle("cats", dim=16)

    async def scenario():
        async with (
            serving(bundle=(str(bundle.path),), model_control=True) as server,
            tritonclient.grpc.aio.InferenceServerClient(server.address) as client,
        ):
            (bundle.path / "bundle.json").write_text("{}")
            with pytest.raises(InferenceServerException) as error:
                await client.load_model("cats")
            assert error.value.status() == "StatusCode.FAILED_PRECONDITION"
            assert error.value.message() == (
                "model 'cats': expected one that can be loaded, found another; "
                "the server's log says why"
            )
            (listed,) = (await client.get_model_repository_index()).models
            assert (listed.state, listed.reason) == (
                "READY",
                "the last load was refused; the server's log says why",
            )
            assert str(bundle.path) in caplog.text

    asyncio.run(scenario())


def test_models_are_left_alone_where_it_is_not(serving, fake):
    """As in Triton, an operator has to allow it."""

    async def work(client, server):
        for change in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="--model-control") as error:
                await change("fake")
            assert error.value.status() == "StatusCode.FAILED_PRECONDITION"
        assert await client.is_model_ready("fake")

    ask(serving, fake, work)


def test_settings_are_told_and_not_changed(serving, fake):
    """They are the operator's."""

    async def work(client, server):
        assert (await client.get_trace_settings()).settings["trace_level"].value == ["OFF"]
        assert (await client.get_log_settings()).settings["log_error"].bool_param
        with pytest.raises(InferenceServerException, match="found a change of log_verbose_level"):
            await client.update_log_settings({"log_verbose_level": 3})
        with pytest.raises(InferenceServerException, match="found a change of trace_level"):
            await client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]})

    ask(serving, fake, work)


def test_this_server_is_a_fleet_for_another(serving, make_bundle):
    """`triton://` opens Horace as it opens Triton, and gives the same bits."""
    bundle = make_bundle("cats", dim=16)
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)

    async def scenario():
        async with serving(bundle=(str(bundle.path),)) as server:

            def embed():
                encoder = open_encoder(f"triton://{server.address}/cats")
                assert encoder.fingerprint == bundle.fingerprint
                try:
                    return encoder.encode(images)
                finally:
                    encoder.close()

            return await asyncio.to_thread(embed)

    expected = open_encoder(bundle.path, threads=1).encode(images)
    assert asyncio.run(scenario()).tobytes() == expected.tobytes()


def test_a_key_travels_as_triton_s_clients_send_headers(serving, fake, tmp_path):
    """Without it, nothing but health is answered."""
    token = new_token()
    file = tmp_path / "keys"
    file.write_text(write_line("app", token) + "\n")

    async def work(client, server):
        with pytest.raises(InferenceServerException) as error:
            await client.infer("fake", [pixels(1)])
        assert error.value.status() == "StatusCode.UNAUTHENTICATED"
        headers = {"authorization": f"Bearer {token}"}
        reply = await client.infer("fake", [pixels(1)], headers=headers)
        assert reply.as_numpy("embeddings")[0, 0] == 1

    ask(serving, fake, work, keys=KeyOptions(file=str(file)))
