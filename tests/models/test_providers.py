from __future__ import annotations

import gc
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from models.bundle import SHIPPED_BUNDLE, read_bundle, write_bundle
from models.encoder import open_encoder
from models.errors import EncoderError, UsageError
from models.providers import (
    Placement,
    engine_key,
    gpu_name,
    refuse_precision,
    require_loaded,
    require_provider,
    session_providers,
    sizes_to_plan,
    split_placement,
    tensorrt_version,
)

GPU_INFORMATION = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 36\n"


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="it is offered here"
)
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_one_clear_line(make_bundle, provider):
    """What is asked, what is there, how to install it; the CPU does not step in."""
    bundle = make_bundle()
    with pytest.raises(EncoderError) as error:
        open_encoder(bundle.path, placement=Placement(provider=provider))
    line = str(error.value)
    assert line.startswith(f"{bundle.path} on {provider}: expected an ONNX Runtime with ")
    assert "found " in line
    assert "CPUExecutionProvider" in line
    assert "install it with: pip uninstall onnxruntime, then pip install -e '.[gpu" in line
    assert "\n" not in line


def test_a_provider_that_is_offered_is_let_through():
    """The CPU's is always there."""
    require_provider("bundle", "cpu", ["AzureExecutionProvider", "CPUExecutionProvider"])
    require_loaded("bundle", "cpu", ["CPUExecutionProvider"])


def test_a_silent_fall_back_is_refused():
    """ONNX Runtime offered CUDA, could not load it, and would have computed on the CPU."""
    with pytest.raises(EncoderError) as error:
        require_loaded("bundle", "cuda", ["CPUExecutionProvider"])
    assert str(error.value).startswith(
        "bundle on cuda: expected a session on CUDAExecutionProvider, "
        "found one on CPUExecutionProvider: CUDAExecutionProvider did not load; install NVIDIA"
    )
    with pytest.raises(EncoderError, match="TensorrtExecutionProvider did not load"):
        require_loaded("bundle", "tensorrt", ["CUDAExecutionProvider", "CPUExecutionProvider"])


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_int8_on_a_gpu_is_refused_whatever_is_installed(provider):
    """The pair cannot work, or gives other vectors; the line says which can."""
    with pytest.raises(UsageError, match="expected precision fp32 or fp16, found int8"):
        refuse_precision("int8", provider)


def test_engines_are_kept_by_encoder_gpu_and_version(tmp_path, monkeypatch):
    """Three keys, and a change of any is another directory."""
    monkeypatch.setattr("models.providers.gpu_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("models.providers.tensorrt_version", lambda: "10.13.3")
    placement = Placement(provider="tensorrt", device=1, engine_cache=tmp_path / "engines")
    (tensorrt, options), (cuda, _), (cpu, _) = session_providers(placement, fingerprint="a" * 64)
    assert (tensorrt, cuda, cpu) == (
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    )
    cache = Path(options["trt_engine_cache_path"])
    assert cache == tmp_path / "engines" / f"{'a' * 16}.nvidia-h100-80gb-hbm3.trt10.13.3"
    assert cache.is_dir()
    assert options["trt_engine_cache_enable"] == "1"
    assert options["device_id"] == "1"
    keys = {
        engine_key("a" * 64, gpu="A", tensorrt="10.1"),
        engine_key("b" * 64, gpu="A", tensorrt="10.1"),
        engine_key("a" * 64, gpu="B", tensorrt="10.1"),
        engine_key("a" * 64, gpu="A", tensorrt="10.2"),
    }
    assert len(keys) == 4


def test_the_driver_names_its_gpus(tmp_path):
    """The number counts them in the driver's order; one that it does not know has a number."""
    folder = tmp_path / "0000:19:00.0"
    folder.mkdir()
    (folder / "information").write_text(GPU_INFORMATION)
    assert gpu_name(0, tmp_path) == "NVIDIA H100 80GB HBM3"
    assert gpu_name(1, tmp_path) == "gpu-1"
    assert gpu_name(0, tmp_path / "none") == "gpu-0"


def test_no_tensorrt_is_one_line(monkeypatch):
    """Neither the package nor the library: the line says what installs it."""
    monkeypatch.setattr("models.providers.TENSORRT_PACKAGES", ("no-such-package",))
    monkeypatch.setattr("models.providers.TENSORRT_LIBRARY", "libno-such.so")
    with pytest.raises(EncoderError, match=r"found neither .* nor libno-such.so; pip install"):
        tensorrt_version()


def test_the_cpu_computes_as_ever(make_bundle):
    """A placement on the CPU is the default."""
    encoder = open_encoder(make_bundle().path, threads=1, placement=Placement())
    assert encoder.placement.provider == "cpu"
    assert encoder.encode(np.zeros((1, 28, 28, 1), np.uint8)).shape == (1, 16)
    encoder.close()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    """A file stands where the directory should be: the line says how to name another."""
    monkeypatch.setattr("models.providers.tensorrt_version", lambda: "10.13.3")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HORACE_ENGINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(EncoderError, match="name another with HORACE_ENGINE_CACHE"):
        session_providers(Placement(provider="tensorrt"), fingerprint="a" * 64)


def test_who_has_no_home_needs_none_but_for_engines(monkeypatch):
    """A user without an entry in passwd runs encoders; TensorRT asks for a directory."""

    def nobody(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HORACE_ENGINE_CACHE", raising=False)
    monkeypatch.setattr("models.providers.tensorrt_version", lambda: "10.13.3")
    monkeypatch.setattr(Path, "expanduser", nobody)
    assert session_providers(Placement(), fingerprint="a" * 64) == [("CPUExecutionProvider", {})]
    with pytest.raises(EncoderError, match="name another with HORACE_ENGINE_CACHE"):
        session_providers(Placement(provider="tensorrt"), fingerprint="a" * 64)


def test_an_encoder_may_say_where_it_runs():
    """After its path, as the server's models do; commas that are none of it are the path's."""
    assert split_placement("a,b/bundle") == ("a,b/bundle", None)
    assert split_placement("b,provider=cuda") == ("b", Placement(provider="cuda"))
    assert split_placement("b,device=1,provider=tensorrt") == (
        "b",
        Placement(provider="tensorrt", device=1),
    )
    fleet = "triton://a:1,b:2/model"
    assert split_placement(fleet) == (fleet, None)


@pytest.mark.parametrize(
    "wrong",
    [
        "provider=tpu",
        "provider=cuda,device=first",
        "provider=cuda,device=-1",
        "provider=cuda,threads=2",
        "provider=cuda,provider=cpu",
        "device=1",
        "provider=cpu,device=1",
    ],
)
def test_a_place_that_is_none_is_one_line(wrong):
    """What may follow, and what does."""
    with pytest.raises(UsageError, match=r"provider=cpu\|cuda\|tensorrt, and device=N of a GPU, "):
        open_encoder(f"bundle,{wrong}")


def test_a_server_places_its_own_models():
    """It is asked for vectors, and not told how."""
    with pytest.raises(UsageError, match="a server's models are placed where it is started"):
        open_encoder("horace://localhost:1/model,provider=cuda")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="it is offered here"
)
def test_what_a_name_says_is_asked_for(make_bundle):
    """And is not there."""
    with pytest.raises(EncoderError, match="on cuda: expected an ONNX Runtime with CUDA"):
        open_encoder(f"{make_bundle().path},provider=cuda")


@pytest.mark.parametrize("path", ["a=1,b=2/bundle", "bundle,lr=0.1", "b,provider=cuda"])
def test_a_path_may_look_like_options(make_bundle, tmp_path, path):
    """What stands there is opened, on the CPU."""
    shutil.copytree(make_bundle().path, tmp_path / path)
    assert open_encoder(tmp_path / path).placement.provider == "cpu"


def test_what_lies_below_a_path_like_that_has_options_too():
    """They are at the end, where no path goes on."""
    assert split_placement("lr=1,b=2/b,provider=cuda") == ("lr=1,b=2/b", Placement(provider="cuda"))


def test_what_a_gpu_plans_it_sees_while_nobody_waits():
    """CUDA each size that there is; TensorRT the extremes, since each new one builds an engine."""
    assert sizes_to_plan("cuda", 32) == (32, 8, 1)
    assert sizes_to_plan("cuda", 100) == (100, 32, 8, 1)
    assert sizes_to_plan("cuda", 4) == (4, 1)
    assert sizes_to_plan("tensorrt", 32) == (32, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_cuda_computes_what_the_cpu_computes(tmp_path, precision):
    """To rounding, in batches of every size, with the encoder that ships."""
    path = SHIPPED_BUNDLE
    if precision == "fp16":
        quantise = pytest.importorskip("train.export.quantise")
        shipped = read_bundle(path)
        quantise.write_fp16(shipped.path_of("fp32"), tmp_path / "encoder.fp16.onnx")
        files = {"encoder.onnx": shipped.path_of("fp32")}
        files |= {"encoder.fp16.onnx": tmp_path / "encoder.fp16.onnx"}
        path = tmp_path / "bundle"
        write_bundle(
            path, name="b", files=files, preprocessing=shipped.preprocessing,
            output=shipped.output, provenance={},
        )  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, (100, 28, 28, 1), dtype=np.uint8)
    expected = unit(open_encoder(path, threads=1).encode(images))
    placement = Placement(provider="cuda")
    on_gpu = open_encoder(path, precision=precision, placement=placement)
    for size in (1, 2, 8, 9, 32, 33, 100):
        cosines = (unit(on_gpu.encode(images[:size])) * expected[:size]).sum(axis=1)
        assert cosines.min() > 1 - 1e-5


@pytest.mark.gpu
def test_a_closed_encoder_gives_its_memory_back(make_bundle):
    """A server that reloads its models all night must not fill the GPU."""
    torch = pytest.importorskip("torch")
    path, placement = make_bundle().path, Placement(provider="cuda")
    free = []
    for _ in range(4):
        encoder = open_encoder(path, placement=placement)
        encoder.encode(np.zeros((64, 28, 28, 1), np.uint8))
        encoder.close()
        gc.collect()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[0] - free[-1] < 1 << 20


@pytest.mark.gpu
def test_a_gpu_that_is_not_there_is_one_line(make_bundle):
    """It is named, and the graph is not blamed."""
    with pytest.raises(EncoderError, match="on cuda: expected GPU 99, found none of that number"):
        open_encoder(f"{make_bundle().path},provider=cuda,device=99")


@pytest.mark.gpu
def test_tensorrt_computes_what_the_cpu_computes(make_bundle, tmp_path):
    """To rounding; and its engine is kept where the next start looks for it."""
    pytest.importorskip("tensorrt")
    path = make_bundle().path
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
    placement = Placement(provider="tensorrt", engine_cache=tmp_path / "engines")
    on_cpu, on_gpu = open_encoder(path, threads=1), open_encoder(path, placement=placement)
    np.testing.assert_allclose(on_gpu.encode(images), on_cpu.encode(images), rtol=1e-2, atol=1e-2)
    assert list((tmp_path / "engines").glob("*/*.engine"))


def unit(vectors):
    """Of length one, in float64."""
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
