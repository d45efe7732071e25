"""Engines of TensorRT: what is said where they cannot be built, and on a GPU that they agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import PRECISION_FILES, Bundle, write_bundle
from models.encoder import open_encoder
from models.errors import UsageError
from train.errors import ExportError
from train.export.tensorrt import TensorrtOptions, build_engine, engine_name

MakeBundle = Callable[..., Bundle]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_is_missing_is_one_line(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """It names all that is missing, where to run instead, and what the bundle needs."""
    with pytest.raises(ExportError) as error:
        build_engine(make_bundle().path, tmp_path / "engines")
    assert str(error.value).startswith(
        "a TensorRT engine: expected a CUDA device and the Python package tensorrt, found "
    )
    assert "no CUDA device; run this on the machine that will serve" in str(error.value)
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize("batches", [(0, 1, 2), (4, 2, 8), (1, 8, 4)])
def test_batches_must_rise(batches: tuple[int, int, int], tmp_path: Path) -> None:
    """A profile goes from the least batch to the most."""
    with pytest.raises(UsageError, match="--batches: expected 1 <= least <= usual <= most, found"):
        TensorrtOptions(bundle=tmp_path, batches=batches)


def test_the_int8_encoder_is_for_cpus(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """TensorRT takes symmetric ranges alone; the message says what to compile."""
    tiny = make_bundle()
    int8 = PRECISION_FILES["int8"]
    bundle = write_bundle(
        tmp_path / "both",
        name="both",
        files={"encoder.onnx": tiny.encoder_path, int8: tiny.encoder_path},
        preprocessing=tiny.preprocessing,
        output=tiny.output,
        provenance={},
    )
    with pytest.raises(UsageError, match=r"export with --fp16 and give encoder.fp16.onnx"):
        build_engine(bundle.path / int8, tmp_path / "engines")


def test_an_engine_is_named_by_all_that_it_depends_on(make_bundle: MakeBundle) -> None:
    """Encoder, GPU, version and batches."""
    bundle = make_bundle()
    name = engine_name(bundle, "fp32", "NVIDIA H100 80GB HBM3", "10.9.0", (1, 16, 64))
    assert name == f"{bundle.fingerprint[:16]}.nvidia-h100-80gb-hbm3.trt10.9.0.n1-16-64.plan"


@pytest.mark.gpu
def test_an_engine_gives_the_encoders_vectors(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """For the least, a usual and the largest batch; an engine that is there is kept."""
    trt = pytest.importorskip("tensorrt")
    bundle = make_bundle(dim=16)
    file = build_engine(bundle.path, tmp_path, batches=(1, 4, 8))
    written = file.stat().st_mtime_ns
    assert build_engine(bundle.path, tmp_path, batches=(1, 4, 8)) == file
    assert file.stat().st_mtime_ns == written
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(file.read_bytes())
    context = engine.create_execution_context()
    images = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 1), dtype=np.uint8)
    expected = open_encoder(bundle.path).encode(images)
    for n in (1, 5, 8):
        given = torch.from_numpy(images[:n]).cuda()
        made = torch.empty(n, 16, device="cuda")
        context.set_input_shape("images", tuple(given.shape))
        context.set_tensor_address("images", given.data_ptr())
        context.set_tensor_address("embeddings", made.data_ptr())
        assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        np.testing.assert_allclose(made.cpu().numpy(), expected[:n], rtol=1e-2, atol=1e-3)
