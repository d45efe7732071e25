import hashlib
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnxruntime
import pytest

from models.bundle import OutputSpec, write_bundle
from models.encoder import open_encoder
from models.errors import BundleError, EncoderError
from models.runtime import OnnxEncoder, open_random_twin
from models.sized_sessions import SIZES, SizedSessions


def images(n: int, size: int = 28, channels: int = 1) -> np.ndarray:
    """Random (n, size, size, channels) uint8."""
    shape = (n, size, size, channels)
    return np.random.default_rng(n).integers(0, 256, shape, dtype=np.uint8)


def test_a_bundle_opens_by_its_path(make_bundle):
    """The encoder says who it is and gives one float32 row an image."""
    bundle = make_bundle(dim=16)
    encoder = open_encoder(bundle.path, threads=1)
    assert (encoder.name, encoder.dim) == ("tiny", 16)
    assert encoder.fingerprint == bundle.fingerprint
    assert encoder.preprocessing == bundle.preprocessing
    vectors = encoder.encode(images(5))
    assert vectors.shape == (5, 16)
    assert vectors.dtype == np.float32
    assert repr(encoder) == (
        f"<OnnxEncoder tiny dim=16 threads=1 fingerprint={bundle.fingerprint[:12]}>"
    )
    encoder.close()


def test_preprocess_and_encode_fit_together(make_bundle):
    """What preprocess gives is what encode takes."""
    encoder = open_encoder(str(make_bundle(size=20, channels=3).path), threads=1)
    ready = encoder.preprocess(images(1, size=33, channels=3)[0])
    assert ready.shape == (20, 20, 3)
    assert encoder.encode(ready[None]).shape == (1, 16)


def test_a_vector_depends_neither_on_its_batch_nor_on_the_threads(make_bundle):
    """Alone or in any company, on one thread or two, or in a lane, it has the same bits."""
    path, batch = make_bundle(dim=32).path, images(33)
    single = open_encoder(path, threads=1)
    alone = np.concatenate([single.encode(batch[n : n + 1]) for n in range(33)])
    for threads in (1, 2):
        encoder = open_encoder(path, threads=threads)
        for size in (1, 2, 5, 8, 33):
            parts = [encoder.encode(batch[n : n + size]) for n in range(0, 33, size)]
            assert np.concatenate(parts).tobytes() == alone.tobytes()
    encoder = open_encoder(path, threads=2, with_lanes=True)
    assert encoder.encode_in_lane(batch).tobytes() == alone.tobytes()


def test_lanes_are_as_many_as_threads_where_asked_for(make_bundle):
    """One thread needs no second session; who asks for no lanes has none."""
    path = make_bundle().path
    for threads, with_lanes, lanes in ((2, True, 2), (1, True, 1), (2, False, 0)):
        encoder = open_encoder(path, threads=threads, with_lanes=with_lanes)
        assert encoder.lanes == lanes
        encoder.close()


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 31, 32, 33, 64, 65, 100])
def test_batches_of_fixed_sizes_give_the_same_vectors(make_bundle, count):
    """Padded or cut, on the CPU to the bit; and no session sees two sizes."""
    bundle = make_bundle()
    seen: list[set[int]] = []

    def load():
        session = onnxruntime.InferenceSession(str(bundle.path_of("fp32")))
        sizes: set[int] = set()
        seen.append(sizes)

        def run(outputs, feed):
            sizes.update(len(images) for images in feed.values())
            return session.run(outputs, feed)

        return SimpleNamespace(
            run=run,
            get_inputs=session.get_inputs,
            get_outputs=session.get_outputs,
            get_providers=session.get_providers,
        )

    sized = SizedSessions(load)
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)
    (found,) = sized.run([sized.get_outputs()[0].name], {sized.get_inputs()[0].name: images})
    np.testing.assert_array_equal(found, open_encoder(bundle.path, threads=1).encode(images))
    assert all(len(sizes) <= 1 for sizes in seen)
    assert set().union(*seen) <= set(SIZES)


class Watched:
    """A session on the CPU that passes for one on CUDA, and keeps account.

    Attributes:
        made: of all sessions, in their order; `libraries` where CUDA's were loaded.
    """

    made: ClassVar[list[object]] = []

    def __init__(self, content, *, sess_options, providers, enable_fallback):
        self.given = {
            "providers": providers,
            "threads": sess_options.intra_op_num_threads,
            "enable_fallback": enable_fallback,
        }
        self.sizes: set[int] = set()
        self.session = SESSION(content, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.session.get_inputs, self.session.get_outputs
        self.made.append(self)

    def get_providers(self):
        """Both, as ONNX Runtime says it."""
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def run(self, outputs, feed):
        """Compute, and note how many images there were."""
        self.sizes.update(map(len, feed.values()))
        return self.session.run(outputs, feed)


SESSION = onnxruntime.InferenceSession


def test_on_cuda_there_is_a_session_for_each_size(make_bundle, monkeypatch):
    """Each with one thread and its options, never falling back; libraries are loaded before."""
    bundle = make_bundle()
    monkeypatch.setattr(Watched, "made", made := [])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Watched)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: made.append("libraries"))
    monkeypatch.setattr("models.runtime.require_provider", lambda *_: made.append("required"))
    encoder = open_encoder(f"{bundle.path},provider=cuda,device=1", threads=4)
    assert made[:2] == ["libraries", "required"]
    sessions = made[2:]
    cuda = {
        "device_id": "1",
        "cudnn_conv_algo_search": "HEURISTIC",
        "prefer_nhwc": "1",
        "arena_extend_strategy": "kSameAsRequested",
    }
    for session in sessions:
        assert session.given == {
            "providers": [("CUDAExecutionProvider", cuda), ("CPUExecutionProvider", {})],
            "threads": 1,
            "enable_fallback": 0,
        }
    images = np.random.default_rng(0).integers(0, 256, (70, 28, 28, 1), dtype=np.uint8)
    monkeypatch.undo()
    expected = open_encoder(bundle.path, threads=1)
    for count in (1, 2, 8, 9, 32, 33, 70):
        found = encoder.encode(images[:count])
        np.testing.assert_array_equal(found, expected.encode(images[:count]))
    assert [session.sizes for session in sessions] == [{1}, {8}, {32}]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("... Invalid device ID: 7, must be between 0", "GPU 7, found none of that number"),
        ("CUDA failure 100: no CUDA-capable device is detected", "GPU 7, found none"),
        ("Failed to allocate memory for requested buffer", "memory on GPU 7 for this graph"),
        (
            "x.cc:1 CUDA failure 35: CUDA driver version is insufficient; GPU=0",
            "GPU 7, and a driver that this ONNX Runtime can use, found CUDA failure 35: CUDA d",
        ),
    ],
)
def test_a_gpu_at_fault_is_named_and_the_graph_is_not_blamed(
    make_bundle, monkeypatch, said, expected
):
    """By what ONNX Runtime says, which is of its own source's lines."""

    def fail(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr("models.runtime.require_provider", lambda *_: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(EncoderError, match=f"on cuda: expected {expected}"):
        open_encoder(f"{make_bundle().path},provider=cuda,device=7")


def test_a_cpu_without_memory_is_not_told_of_gpus(make_bundle, monkeypatch):
    """ONNX Runtime has the same words for both."""
    encoder = open_encoder(make_bundle().path)

    def fail(*_):
        raise RuntimeError("bfc_arena.cc:360 Failed to allocate memory for requested buffer")

    monkeypatch.setattr(encoder, "_session", SimpleNamespace(run=fail))
    with pytest.raises(EncoderError, match=r"expected memory for 2 images, found too little$"):
        encoder.encode(np.zeros((2, 28, 28, 1), np.uint8))


def test_no_images_give_no_vectors(make_bundle):
    """An empty batch is legal."""
    assert open_encoder(make_bundle().path).encode(images(0)).shape == (0, 16)


@pytest.mark.parametrize(
    "wrong", [images(2)[..., 0], images(2, size=27), images(2).astype(np.float32)]
)
def test_a_batch_of_another_shape_or_dtype_is_refused(make_bundle, wrong):
    """The message gives the shape that would have been right and the one that came."""
    encoder = open_encoder(make_bundle().path)
    with pytest.raises(EncoderError, match=r"expected \(N, 28, 28, 1\) uint8, found \("):
        encoder.encode(wrong)


def test_damaged_graph_is_not_run(make_bundle):
    """The bytes that are loaded are hashed."""
    bundle = make_bundle()
    content = bytearray(bundle.encoder_path.read_bytes())
    content[-1] ^= 1
    bundle.encoder_path.write_bytes(content)
    with pytest.raises(BundleError, match="the file is damaged"):
        open_encoder(bundle.path)


def test_a_graph_that_onnx_runtime_refuses_is_named(make_bundle, tmp_path):
    """A file that is no graph is one line, though its hash is the recorded one."""
    bundle = make_bundle()
    bundle.encoder_path.write_bytes(b"no graph")
    files = {"encoder.onnx": hashlib.sha256(b"no graph").hexdigest()}
    with pytest.raises(EncoderError, match="expected an ONNX graph that ONNX Runtime loads"):
        OnnxEncoder(replace(bundle, files=files), graph=bundle.encoder_path)


def test_a_graph_that_there_is_no_memory_for_is_not_blamed(make_bundle, monkeypatch):
    """What ONNX Runtime says of a short allocation is no fault of the bundle."""

    def refuse(*args, **kwargs):
        raise RuntimeError("Exception during initialization: std::bad_alloc")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(EncoderError) as caught:
        open_encoder(make_bundle().path)
    assert str(caught.value).endswith(
        "encoder.onnx: expected memory for this graph, found Exception during initialization: "
        "std::bad_alloc; give this process more memory"
    )


def test_a_graph_other_than_described_is_refused(make_bundle):
    """Input and output are held against the description."""
    bundle = make_bundle(dim=16)
    with pytest.raises(EncoderError, match=r"export it again"):
        OnnxEncoder(replace(bundle, output=OutputSpec(dim=17)), graph=bundle.encoder_path)


def test_the_random_twin_is_another_network(make_bundle):
    """The twin has the same shape and other vectors; without one there is None."""
    bundle = make_bundle(random_twin=True)
    twin, encoder = open_random_twin(bundle.path), open_encoder(bundle.path)
    assert twin is not None
    assert twin.encode(images(2)).shape == encoder.encode(images(2)).shape
    assert not np.array_equal(twin.encode(images(2)), encoder.encode(images(2)))
    assert twin.fingerprint != encoder.fingerprint
    assert open_random_twin(make_bundle(seed=5).path) is None


def test_a_precision_is_chosen_by_word_or_by_file(make_bundle, tmp_path):
    """Either way gives the same encoder, with its own fingerprint; a server chooses its own."""
    one, other = make_bundle(seed=1), make_bundle(seed=2)
    bundle = write_bundle(
        tmp_path / "both",
        name="both",
        files={"encoder.onnx": one.encoder_path, "encoder.int8.onnx": other.encoder_path},
        preprocessing=one.preprocessing,
        output=one.output,
        provenance={},
    )
    by_word = open_encoder(bundle.path, precision="int8")
    by_file = open_encoder(bundle.path / "encoder.int8.onnx")
    assert by_word.fingerprint == by_file.fingerprint == other.fingerprint
    assert open_encoder(bundle.path).fingerprint == one.fingerprint
    with pytest.raises(BundleError, match="expected fp32 or int8, found 'fp16'"):
        open_encoder(bundle.path, precision="fp16")
    with pytest.raises(EncoderError, match="expected none: a server chooses it for its models"):
        open_encoder("horace://host:1/x", precision="int8")


def test_unknown_schemes_are_refused():
    """The message lists what an encoder may be."""
    with pytest.raises(EncoderError) as caught:
        open_encoder("ftp://host/x")
    assert str(caught.value) == (
        "ftp://host/x: expected a bundle directory, horace://host:port/model or "
        "triton://host:port/model, found scheme 'ftp'"
    )
