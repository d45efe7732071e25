"""A model for Triton: what is written, and what is refused.

That a real server serves it is in `tests/models/test_triton.py`.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from models import sized_sessions
from models.bundle import PRECISION_FILES, Bundle, write_bundle
from models.errors import UsageError
from models.sized_sessions import CUDA_OPTIONS, SIZES
from train.errors import ExportError
from train.export.triton import TritonOptions, check_model_target, write_model

MakeBundle = Callable[..., Bundle]


def read_config(model: Path) -> triton.ModelConfig:
    """Parse a model's configuration as Triton does."""
    return text_format.Parse((model / "config.pbtxt").read_text(), triton.ModelConfig())


def test_a_model_has_a_configuration_and_its_graph(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """Input, output, batching, instances, and who the encoder is."""
    bundle = make_bundle("cats", dim=16)
    options = TritonOptions(
        bundle=bundle.path, out=tmp_path / "repository", threads=2, instances=3,
        max_batch_size=32, queue_delay_us=500,
    )  # fmt: skip
    model = write_model(options)
    assert model == tmp_path / "repository" / "cats"
    assert (model / "1/model.onnx").read_bytes() == bundle.encoder_path.read_bytes()
    assert sorted(path.name for path in model.rglob("*")) == ["1", "config.pbtxt", "model.onnx"]
    config = read_config(model)
    assert (config.name, config.backend, config.max_batch_size) == ("cats", "onnxruntime", 32)
    given, made = config.input[0], config.output[0]
    assert (given.name, given.data_type, list(given.dims)) == (
        "images", triton.TYPE_UINT8, [28, 28, 1],
    )  # fmt: skip
    assert (made.name, made.data_type, list(made.dims)) == ("embeddings", triton.TYPE_FP32, [16])
    assert list(config.dynamic_batching.preferred_batch_size) == [32]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert config.instance_group[0].count == 3
    assert config.instance_group[0].kind == triton.ModelInstanceGroup.KIND_CPU
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert parameters["fingerprint"] == bundle.fingerprint
    assert parameters["intra_op_thread_count"] == "2"
    assert '"resize":28' in parameters["preprocessing"]


def test_tensorrt_is_asked_for_with_one_profile_and_a_warm_up(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    """The engine covers every batch, and is compiled before the first request."""
    options = TritonOptions(
        bundle=make_bundle("cats").path, out=tmp_path, device="gpu", tensorrt=True,
        max_batch_size=16,
    )  # fmt: skip
    config = read_config(write_model(options))
    assert config.instance_group[0].kind == triton.ModelInstanceGroup.KIND_GPU
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert dict(accelerator.parameters) == {
        "trt_profile_min_shapes": "images:1x28x28x1",
        "trt_profile_opt_shapes": "images:16x28x28x1",
        "trt_profile_max_shapes": "images:16x28x28x1",
    }
    assert config.model_warmup[0].batch_size == 16


def test_tensorrt_computes_in_the_precision_of_the_fingerprint(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    """Half precision for the FP16 encoder alone: a client takes the fingerprint's word for it."""
    tiny, fp16 = make_bundle(), PRECISION_FILES["fp16"]
    bundle = write_bundle(
        tmp_path / "both",
        name="both",
        files={"encoder.onnx": tiny.encoder_path, fp16: tiny.encoder_path},
        preprocessing=tiny.preprocessing,
        output=tiny.output,
        provenance={},
    )
    for given, mode in ((bundle.path, None), (bundle.path / fp16, "FP16")):
        options = TritonOptions(
            bundle=given, out=tmp_path / "r", device="gpu", tensorrt=True, replace=True
        )
        config = read_config(write_model(options))
        (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert accelerator.parameters.get("precision_mode") == mode
        expected = bundle.fingerprint_of(fp16 if mode else "encoder.onnx")
        assert config.parameters["fingerprint"].string_value == expected


def test_a_model_is_replaced_only_on_request(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """Models of a repository are left alone, and what is no model always."""
    first, second = make_bundle("cats", seed=1), make_bundle("cats", seed=2)
    write_model(TritonOptions(bundle=first.path, out=tmp_path / "r"))
    with pytest.raises(ExportError, match="expected no model of that name, found one; choose"):
        write_model(TritonOptions(bundle=second.path, out=tmp_path / "r"))
    model = write_model(TritonOptions(bundle=second.path, out=tmp_path / "r", replace=True))
    assert read_config(model).parameters["fingerprint"].string_value == second.fingerprint
    (tmp_path / "r/dogs").mkdir()
    with pytest.raises(ExportError, match="found something else"):
        write_model(
            TritonOptions(bundle=second.path, out=tmp_path / "r", name="dogs", replace=True)
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instances": 0}, "--instances: expected 1 to 2147483647, found 0"),
        (
            {"max_batch_size": 1 << 31},
            "--max-batch-size: expected 1 to 2147483647, found 2147483648",
        ),
        ({"queue_delay_us": -1}, "--queue-delay-us: expected 0 to 2147483647, found -1"),
        (
            {"tensorrt": True},
            "--tensorrt: expected --device gpu and --backend onnxruntime, found --device cpu and "
            "--backend onnxruntime",
        ),
        (
            {"site_packages": Path("/no/such")},
            "--site-packages: expected --backend python, found --backend onnxruntime",
        ),
        (
            {"site_packages": Path("/no/such"), "backend": "python"},
            "--site-packages: expected a directory, found /no/such",
        ),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    """Each says what it takes."""
    with pytest.raises(UsageError) as error:
        TritonOptions(bundle=tmp_path, out=tmp_path, **fields)  # type: ignore[arg-type]  # cases
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["../cats", "a/b", "..", ""])
def test_a_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    """A model is a directory of its repository."""
    with pytest.raises(UsageError, match="--name: expected one that a directory can have, found"):
        check_model_target(tmp_path, name, replace=False)


@pytest.mark.parametrize("tensorrt", [True, False])
def test_a_gpu_is_not_given_what_is_quantised_for_cpus(
    make_bundle: MakeBundle, tmp_path: Path, tensorrt: bool
) -> None:
    """It would fail in the server, long after, or give other vectors."""
    int8 = make_bundle("cats").path / "encoder.int8.onnx"
    options = TritonOptions(bundle=int8, out=tmp_path, device="gpu", tensorrt=tensorrt)
    with pytest.raises(UsageError, match="expected the fp32 or the fp16 encoder, found int8"):
        write_model(options)


def test_it_is_a_command_that_needs_no_torch(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """It lays out any bundle, and says how to serve it."""
    code = (
        "import sys; from train.export.triton import TritonOptions, main; from pathlib import "
        "Path; main(TritonOptions(bundle=Path(sys.argv[1]), out=Path(sys.argv[2]))); "
        "assert 'torch' not in sys.modules"
    )
    argv = [sys.executable, "-c", code, str(make_bundle("cats").path), str(tmp_path / "r")]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert done.stdout == (
        f"{tmp_path}/r/cats\nserve it with: tritonserver --model-repository {tmp_path}/r\n"
    )


@pytest.fixture
def triton_model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What becomes `model.py`, with a stand-in for the module that Triton alone has."""
    utils = ModuleType("triton_python_backend_utils")
    vars(utils)["TritonModelException"] = RuntimeError
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    monkeypatch.setitem(sys.modules, "horace_sized_sessions", sized_sessions)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "train.export.triton_model", raising=False)
    return importlib.import_module("train.export.triton_model")


@pytest.mark.parametrize("has_gpu", [True, False])
def test_an_instance_computes_on_its_own_gpu_or_not_at_all(
    triton_model: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_gpu: bool
) -> None:
    """Of two GPUs the second's takes the second; without one it fails, and takes no CPU instead."""
    opened: list[Any] = []

    class Session:
        get_inputs = get_outputs = None

        def __init__(self, graph: bytes, *, sess_options: object, providers: list[object]) -> None:
            opened.extend(providers)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"] * has_gpu + ["CPUExecutionProvider"]

    monkeypatch.setattr(triton_model.ort, "InferenceSession", Session)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").write_bytes(b"graph")
    arguments = {
        "model_config": '{"parameters": {"intra_op_thread_count": {"string_value": "1"}}}',
        "model_repository": str(tmp_path),
        "model_version": "1",
        "model_instance_kind": "GPU",
        "model_instance_device_id": "1",
    }
    with nullcontext() if has_gpu else pytest.raises(RuntimeError, match="cannot use the GPU"):
        triton_model.TritonPythonModel().initialize(arguments)
    name, chosen = opened[0]
    assert name == "CUDAExecutionProvider"
    assert chosen == CUDA_OPTIONS | {"device_id": "1"}
    assert opened.count((name, chosen)) == len(SIZES)


def test_a_gpu_plans_its_convolutions_by_a_heuristic(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    """To try the plans out takes most of a second, whenever a batch has a new size."""
    bundle = make_bundle("cats").path
    model = write_model(TritonOptions(bundle=bundle, out=tmp_path, device="gpu"))
    parameters = read_config(model).parameters
    assert parameters["cudnn_conv_algo_search"].string_value == "1"
