"""`triton://`: against a real tritonserver, and against servers whose faults can be chosen."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from models.bundle import Bundle
from models.encoder import open_encoder
from models.endpoints import BASE_EJECTION_S
from models.errors import EncoderError, EncoderUnavailableError, FingerprintMismatchError
from models.preprocess import PreprocessSpec
from models.triton import BUSY_PAUSE_S, RECHECK_S, TritonEncoder
from tests.ports import free_port
from tests.tritonserver import SITE_PACKAGES, tritonserver
from train.export.triton import TritonOptions, write_model

MakeBundle = Callable[..., Bundle]
SPEC = PreprocessSpec(height=2, width=2, channels=1, resize=2)
IMAGES = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)


def test_a_real_tritonserver_gives_the_encoders_bits(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    """From the repository that the export wrote, to Horace's client and to Triton's own."""
    bundle = make_bundle("cats", dim=16)
    write_model(
        TritonOptions(
            bundle=bundle.path, out=tmp_path / "repository", backend="python", threads=1,
            site_packages=SITE_PACKAGES, max_batch_size=4,
        )
    )  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, (9, 28, 28, 1), dtype=np.uint8)
    with closing(open_encoder(bundle.path, threads=1)) as local:
        expected = local.encode(images).tobytes()
    with tritonserver(tmp_path / "repository", tmp_path) as server:
        encoder = open_encoder(f"triton://{server.address}/cats")
        assert (encoder.name, encoder.dim) == ("cats", 16)
        assert encoder.fingerprint == bundle.fingerprint
        assert encoder.preprocessing == bundle.preprocessing
        found = encoder.encode(images)  # more than a batch of that server
        assert found.tobytes() == expected
        assert encoder.encode(images[:0]).shape == (0, 16)
        with pytest.raises(EncoderError, match="NOT_FOUND: Request for unknown model: 'dogs'"):
            open_encoder(f"triton://{server.address}/dogs")
        encoder.close()
        with tritonclient.grpc.InferenceServerClient(server.address) as client:
            assert client.is_model_ready("cats")
            parts = [infer(client, part) for part in np.split(images, [1, 5])]
        assert np.concatenate(parts).tobytes() == expected


def infer(
    client: tritonclient.grpc.InferenceServerClient, images: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Embed images with Triton's own client."""
    given = tritonclient.grpc.InferInput("images", list(images.shape), "UINT8")
    given.set_data_from_numpy(images)
    made = client.infer("cats", [given]).as_numpy("embeddings")
    assert made is not None
    return made


def config(fingerprint: str = "f" * 64, **changes: object) -> model_config_pb2.ModelConfig:
    """A model's configuration, as the export writes it."""
    written = model_config_pb2.ModelConfig(name="m", max_batch_size=2)
    written.input.add(name="images", data_type=model_config_pb2.TYPE_UINT8, dims=[2, 2, 1])
    written.output.add(name="embeddings", data_type=model_config_pb2.TYPE_FP32, dims=[1])
    written.parameters["fingerprint"].string_value = fingerprint
    spec = '{"channels":1,"height":2,"interpolation":"bilinear","resize":2,"revision":1,"width":2}'
    written.parameters["preprocessing"].string_value = spec
    for name, value in changes.items():
        if name in ("fingerprint", "preprocessing"):
            written.parameters[name].string_value = str(value)
        elif name == "dim":
            written.output[0].dims[:] = [value]
        else:
            setattr(written, name, value)
    return written


class Fake(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton whose every answer can be chosen: a vector is the sum of its pixels.

    Attributes:
        config: what it says of its model.
        changes: of the tensor in its replies.
        faults: given, one a request, instead of vectors; None for vectors.
        always: given whenever there is no fault.
        gate: requests wait here; open unless a test closes it.
        requests: how many it has had.
        said: the fingerprint in its replies; none where empty.
        on_request: hears of each, with the seconds that it has.
    """

    def __init__(self) -> None:
        self.config = config()
        self.changes: dict[str, object] = {}
        self.faults: list[grpc.StatusCode | None] = []
        self.always: grpc.StatusCode | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.requests = 0
        self.said = ""
        self.on_request: Callable[[float], object] = lambda _: None
        self.address = ""

    def ModelConfig(self, request, context):
        """Tell the configuration."""
        return service_pb2.ModelConfigResponse(config=self.config)

    def ModelInfer(self, request, context):
        """Give vectors, or the next fault."""
        self.requests += 1
        self.on_request(context.time_remaining())
        self.gate.wait(30)
        if fault := (self.faults.pop(0) if self.faults else self.always):
            context.abort(fault, "as the test wants it")
        shape = tuple(request.inputs[0].shape)
        if shape[0] > (most := self.config.max_batch_size):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"batch-size must be <= {most}")
        images = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(shape)
        sums = images.sum(axis=(1, 2, 3), dtype=np.float32)[:, None]
        reply = service_pb2.ModelInferResponse(raw_output_contents=[sums.tobytes()])
        told = {"name": "embeddings", "datatype": "FP32", "shape": sums.shape} | self.changes
        reply.outputs.add(**told)
        if self.said:
            reply.parameters["fingerprint"].string_param = self.said
        return reply


@contextmanager
def serve(fake: Fake, port: int = 0) -> Iterator[Fake]:
    """Serve a fake Triton."""
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    fake.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield fake
    finally:
        fake.gate.set()
        server.stop(None).wait()


@pytest.fixture
def two() -> Iterator[tuple[Fake, Fake]]:
    """Two fake Tritons."""
    with serve(Fake()) as a, serve(Fake()) as b:
        yield a, b


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for what other threads do."""
    deadline_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.001)


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        """Tell it."""
        return self.now_s


@contextmanager
def opened(*fakes: Fake, **arguments) -> Iterator[TritonEncoder]:
    """An encoder over some endpoints."""
    addresses = ",".join(fake.address for fake in fakes)
    encoder = TritonEncoder(f"{addresses}/m", **arguments)
    try:
        yield encoder
    finally:
        encoder.close()


SUMS = IMAGES.sum(axis=(1, 2, 3), dtype=np.float32)[:, None]


def test_batches_are_cut_to_what_the_model_takes(two):
    """And go to the endpoints by turns."""
    with opened(*two) as encoder:
        assert encoder.encode(IMAGES).tolist() == SUMS.tolist()
        assert [fake.requests for fake in two] == [1, 1]
        with pytest.raises(EncoderError, match=r"expected \(N, 2, 2, 1\) uint8, found"):
            encoder.encode(IMAGES[:, :1])


@pytest.mark.parametrize("fault", ["UNAVAILABLE", "INTERNAL", "RESOURCE_EXHAUSTED", "UNKNOWN"])
def test_what_fails_on_one_endpoint_is_done_by_another(two, fault):
    """The caller does not hear of it."""
    two[0].always = grpc.StatusCode[fault]
    with opened(*two) as encoder:
        for _ in range(4):
            assert encoder.encode(IMAGES[:1]).tolist() == SUMS[:1].tolist()
        assert two[1].requests == 4


def test_an_endpoint_that_fails_is_left_out_and_comes_back(two):
    """For a while it is asked nothing; then one request tries it."""
    clock = Clock()
    two[0].faults = [grpc.StatusCode.UNAVAILABLE]
    with opened(*two, clock=clock) as encoder:
        for _ in range(5):
            encoder.encode(IMAGES[:1])
        assert [fake.requests for fake in two] == [1, 5]
        clock.now_s += BASE_EJECTION_S
        for _ in range(4):
            encoder.encode(IMAGES[:1])
        assert [fake.requests for fake in two] == [3, 7]


def test_a_request_that_is_itself_wrong_is_asked_once(two):
    """Another endpoint would say the same, and none is at fault."""
    two[0].faults = [grpc.StatusCode.INVALID_ARGUMENT]
    with opened(*two) as encoder:
        with pytest.raises(EncoderError, match="INVALID_ARGUMENT: as the test wants it"):
            encoder.encode(IMAGES[:1])
        assert [fake.requests for fake in two] == [1, 0]
        assert "failed" not in repr(encoder)


def test_what_fails_everywhere_for_good_is_told_at_once(two):
    """An encoder that fails on a batch is not asked again until the deadline."""
    for fake in two:
        fake.always = grpc.StatusCode.INTERNAL
    with opened(*two) as encoder, pytest.raises(EncoderError, match="INTERNAL: as the test"):
        encoder.encode(IMAGES[:1])
    assert [fake.requests for fake in two] == [1, 1]


def test_a_fleet_that_is_down_for_a_moment_is_waited_for(two):
    """Within the time of the call."""
    for fake in two:
        fake.faults = [grpc.StatusCode.UNAVAILABLE]
    with opened(*two) as encoder:
        assert encoder.encode(IMAGES[:1]).tolist() == SUMS[:1].tolist()


def test_a_fleet_that_stays_down_is_an_error_after_the_time_of_the_call(two):
    """Which names an endpoint, what it said, and what to do."""
    for fake in two:
        fake.always = grpc.StatusCode.UNAVAILABLE
    with (
        opened(*two, timeout_s=0.5) as encoder,
        pytest.raises(
            EncoderUnavailableError, match=r"triton://127.*/m: expected a Triton that serves this"
        ),
    ):
        encoder.encode(IMAGES[:1])


def test_a_batch_of_many_requests_has_one_deadline(two):
    """Or its parts together would take longer than a server waits for a thread of its own."""
    clock = Clock()
    left: list[float] = []

    def note(left_s: float) -> None:
        left.append(left_s)
        clock.now_s += 10

    two[0].on_request = note
    with opened(two[0], clock=clock, timeout_s=30, attempt_timeout_s=30) as encoder:
        assert encoder.encode(IMAGES).tolist() == SUMS.tolist()
    assert all(left_s <= most for left_s, most in zip(left, (31, 21), strict=True))


def test_an_endpoint_without_room_is_not_hammered(two):
    """Also where the other is left out: it is asked again at intervals, not in a loop."""
    two[0].always = grpc.StatusCode.RESOURCE_EXHAUSTED
    two[1].always = grpc.StatusCode.UNAVAILABLE
    with opened(*two, timeout_s=0.6) as encoder, pytest.raises(EncoderError):
        encoder.encode(IMAGES[:1])
    assert two[0].requests <= 2 * 0.6 / BUSY_PAUSE_S  # a loop makes thousands


def test_an_endpoint_that_hangs_costs_one_attempt(two):
    """Not the whole time of the call."""
    two[0].gate.clear()
    with opened(*two, attempt_timeout_s=2.0) as encoder:
        for _ in range(3):
            assert encoder.encode(IMAGES[:1]).tolist() == SUMS[:1].tolist()
        assert [fake.requests for fake in two] == [1, 3]


def test_threads_keep_every_endpoint_busy(two):
    """As many calls at once as there are callers, spread by what is in flight."""
    for fake in two:
        fake.gate.clear()
    with opened(*two) as encoder, ThreadPoolExecutor(4) as pool:
        calls: list[Future] = [pool.submit(encoder.encode, IMAGES[:1]) for _ in range(4)]
        wait_until(lambda: sum(fake.requests for fake in two) >= 4)
        assert [fake.requests for fake in two] == [2, 2]
        for fake in two:
            fake.gate.set()
        assert all(call.result().tolist() == SUMS[:1].tolist() for call in calls)


def test_endpoints_of_different_encoders_are_refused(two):
    """Their vectors could not be compared."""
    two[1].config = config("e" * 64)
    with (
        pytest.raises(
            FingerprintMismatchError, match=f"expected encoder {'f' * 64}, found encoder {'e' * 64}"
        ),
        opened(*two),
    ):
        pass


def test_an_endpoint_that_comes_back_with_another_encoder_is_not_used(two):
    """It is asked who it is after every failure."""
    clock = Clock()
    two[0].faults = [grpc.StatusCode.UNAVAILABLE]
    with opened(*two, clock=clock) as encoder:
        encoder.encode(IMAGES[:1])
        two[0].config = config("e" * 64)
        for _ in range(4):
            clock.now_s += BASE_EJECTION_S * 8
            assert encoder.encode(IMAGES[:1]).tolist() == SUMS[:1].tolist()
        assert two[0].requests == 1


def test_an_encoder_that_is_changed_in_place_is_noticed(two):
    """Every few seconds an endpoint is asked who it is."""
    clock = Clock()
    with opened(two[0], clock=clock) as encoder:
        encoder.encode(IMAGES[:1])
        two[0].config = config("e" * 64)
        clock.now_s += RECHECK_S
        with pytest.raises(FingerprintMismatchError, match="have every endpoint serve one enc"):
            encoder.encode(IMAGES[:1])


def test_a_reply_that_says_whose_it_is_is_held_to_it(two):
    """As Horace's do: not even one vector of another encoder is taken."""
    two[0].said = "e" * 64
    with opened(*two) as encoder:
        for _ in range(3):
            assert encoder.encode(IMAGES[:1]).tolist() == SUMS[:1].tolist()
        assert two[1].requests == 3
    with opened(two[0]) as encoder, pytest.raises(FingerprintMismatchError, match="e" * 64):
        encoder.encode(IMAGES[:1])


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"shape": (1, 2)}, r"found \[1, 2\] in 4 bytes"),
        ({"shape": (2, 1)}, r"found \[2, 1\] in 4 bytes"),
        ({"datatype": "FP16"}, "found none"),
        ({"name": "other"}, "found none"),
    ],
)
def test_a_reply_of_another_shape_is_an_error(two, changes, found):
    """And never somebody's vectors."""
    two[0].changes = changes
    with opened(two[0]) as encoder, pytest.raises(EncoderError, match=found):
        encoder.encode(IMAGES[:1])


def test_a_closed_encoder_waits_for_nothing(two):
    """Who waits to try again gives up at once."""
    for fake in two:
        fake.always = grpc.StatusCode.UNAVAILABLE
    with opened(*two, timeout_s=600) as encoder, ThreadPoolExecutor(1) as pool:
        call = pool.submit(encoder.encode, IMAGES[:1])
        wait_until(lambda: sum(fake.requests for fake in two) >= 4)
        encoder.close()
        with pytest.raises(EncoderError):
            call.result(timeout=30)


def test_an_endpoint_that_is_down_at_the_start_joins_later(two):
    """One that answers is enough to open."""
    clock = Clock()
    late = Fake()
    late.address = f"127.0.0.1:{free_port()}"
    with opened(late, two[1], clock=clock) as encoder:
        encoder.encode(IMAGES[:1])
        with serve(late, int(late.address.rpartition(":")[2])):
            deadline_s = time.monotonic() + 60
            while not late.requests:
                assert time.monotonic() < deadline_s, encoder
                clock.now_s += 60
                encoder.encode(IMAGES[:1])


def test_an_endpoint_that_comes_later_is_sent_no_more_than_it_takes():
    """It could not be asked on opening, and would refuse as wrong what the other takes."""
    clock = Clock()
    late = Fake()
    late.address, late.config = f"127.0.0.1:{free_port()}", config(max_batch_size=1)
    port = int(late.address.rpartition(":")[2])
    with serve(Fake()) as early, opened(late, early, clock=clock) as encoder, serve(late, port):
        deadline_s = time.monotonic() + 60
        while not late.requests:
            assert time.monotonic() < deadline_s, encoder
            clock.now_s += 60
            assert encoder.encode(IMAGES).tolist() == SUMS.tolist()


def test_nobody_there_is_an_error_at_once():
    """With the address and what to do."""
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(EncoderError, match=f"triton://{address}/m: expected a Triton that serves"):
        open_encoder(f"triton://{address}/m")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"fingerprint": ""}, "expected the parameters fingerprint and preprocessing, found no fi"),
        ({"preprocessing": ""}, "found no preprocessing; lay the model out with `python -m train"),
        ({"preprocessing": "{"}, "expected one that this version of Horace can do, found no JSON"),
        (
            {"preprocessing": config().parameters["preprocessing"].string_value.replace("1", "9")},
            "expected one that this version of Horace can do, found preprocessing",
        ),
        ({"max_batch_size": 0}, r"expected batches of images UINT8 \[2, 2, 1\] in, embeddings FP3"),
        (
            {"dim": -1},
            r"found inputs \['images'\], outputs \['embeddings \[-1\]'\], max_batch_size 2",
        ),
    ],
)
def test_a_model_that_does_not_say_what_it_is_is_refused(two, changes, line):
    """Its vectors could be anybody's."""
    two[0].config = config(**changes)
    with pytest.raises(EncoderError, match=line), opened(two[0]):
        pass


@pytest.mark.parametrize(
    "target", ["", "host:1", "host/m", "host:1,/m", "h:1,h:1/m", "h:x/m", "h:65537/m"]
)
def test_a_target_that_cannot_be_meant_is_refused(target):
    """With the form that can."""
    with pytest.raises(EncoderError, match=r"expected triton://HOST:PORT\[,HOST2:PORT\.\.\.\]/M"):
        open_encoder(f"triton://{target}")
