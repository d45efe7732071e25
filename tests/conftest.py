"""Fixtures that several packages' tests share: tiny real bundles, made without torch."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# One matrix on several BLAS threads that share a busy core waits for them at every step: the
# eigenvectors of 432 x 432 take a fraction of a second on one thread, and many times that on two.
# NumPy reads this once, when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, settings
from onnx import TensorProto, helper, numpy_helper

from models.bundle import Bundle, OutputSpec, write_bundle
from models.preprocess import PreprocessSpec

MakeBundle = Callable[..., Bundle]

# How long an example takes is the machine's matter: no test fails because others run beside it.
settings.register_profile("horace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("horace")

# A shell that starts the suite in the background has it ignore Ctrl-C, and with it every process
# that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A process that a test starts, and that aborts, says where it was.
os.environ.setdefault("PYTHONFAULTHANDLER", "1")


def write_tiny_graph(path: Path, *, spec: PreprocessSpec, dim: int, seed: int) -> None:
    """Write a real ONNX encoder: scale, NHWC to NCHW, 3x3 convolution, ReLU, mean pooling."""
    weights = np.random.default_rng(seed).normal(size=(dim, spec.channels, 3, 3))
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "weights"], ["conv"], strides=[2, 2]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embeddings"]),
    ]
    shape = ["N", spec.height, spec.width, spec.channels]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["N", dim])],
        [
            numpy_helper.from_array(np.float32(1 / 255), "scale"),
            numpy_helper.from_array(weights.astype(np.float32), "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What is asked of the disk, in its order: `sync` of a file, `write` to it, a `name` given."""
    asked: list[tuple[str, Path]] = []

    def watch(call: str, event: str, path_of: Callable[..., Path]) -> None:
        real = getattr(os, call)

        def watched(*args: object) -> object:
            asked.append((event, path_of(*args)))
            return real(*args)

        monkeypatch.setattr(os, call, watched)

    def open_file(descriptor: int, *_: object) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))

    for call, event in (("fsync", "sync"), ("fdatasync", "sync"), ("pwrite", "write")):
        watch(call, event, open_file)
    for call in ("replace", "rename"):
        watch(call, "name", lambda _, new: Path(new))
    return asked


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Keep Python from looking for cycles of garbage, as it may at any moment, until the end."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Give a function that writes a tiny bundle; another `seed` makes another encoder."""

    def make(
        name: str = "tiny",
        *,
        seed: int = 0,
        dim: int = 16,
        size: int = 28,
        channels: int = 1,
        random_twin: bool = False,
        path: Path | None = None,
    ) -> Bundle:
        spec = PreprocessSpec(height=size, width=size, channels=channels, resize=size)
        files = {"encoder.onnx": tmp_path / f"{name}-{seed}.onnx"}
        write_tiny_graph(files["encoder.onnx"], spec=spec, dim=dim, seed=seed)
        if random_twin:
            files["random.onnx"] = tmp_path / f"{name}-{seed}-random.onnx"
            write_tiny_graph(files["random.onnx"], spec=spec, dim=dim, seed=seed + 1000)
        return write_bundle(
            path or tmp_path / f"bundle-{name}-{seed}",
            name=name,
            files=files,
            preprocessing=spec,
            output=OutputSpec(dim=dim),
            provenance={"command": "tests"},
        )

    return make
