"""`python -m train.export.triton BUNDLE --out DIR`: an encoder as Triton serves it.

Writes DIR/NAME with `config.pbtxt` and the ONNX file as version 1, ready for
`tritonserver --model-repository DIR`. Several encoders may share a repository.

Rules:
    The configuration is Triton's own message, printed: what is written parses.
    Triton batches; nothing is padded, since a vector does not depend on its batch.
    The configuration's parameters carry fingerprint and preprocessing, so that a client can
    refuse the vectors of another encoder and bring images to the right pixels.
    TensorRT computes in the precision whose fingerprint is given: FP16 for encoder.fp16.onnx
    alone. What is quantised for CPUs is refused on a GPU.
    A model appears whole or not at all.

Source: Triton's model configuration, and its onnxruntime and Python backends.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from models import sized_sessions
from models.bundle import Bundle, Precision, read_bundle, split_precision
from models.command import run_command
from models.cpu import cpu_budget
from models.errors import UsageError
from models.files import atomic_directory, canonical_json
from train.errors import ExportError, writing
from train.export.graph_names import INPUT_NAME, OUTPUT_NAME
from train.export.tensorrt import refuse_int8
from train.option_groups import require

CONFIG_FILE = "config.pbtxt"
GRAPH_FILE = "model.onnx"
MODEL_FILE = "model.py"
SESSIONS_FILE = "horace_sized_sessions.py"
SITE_PACKAGES = "site-packages"
MOST = (1 << 31) - 1
"""What a number of a model's configuration may be: most are int32."""

PYTHON_MODEL = Path(__file__).with_name("triton_model.py")

HEURISTIC = "1"
"""Of the onnxruntime backend's `cudnn_conv_algo_search`, which else tries plans out for every new
size of a batch."""

Backend = Literal["onnxruntime", "python"]


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """Lay an encoder out as a model of a Triton repository."""

    bundle: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="BUNDLE")]]
    """Bundle of `train.export`, or the file of one of its encoders, such as its INT8 one."""

    out: Path
    """Model repository; other models in it stay."""

    name: str | None = None
    """What Triton calls the model; the bundle's name where not given."""

    backend: Backend = "onnxruntime"
    """`python` runs ONNX Runtime in Triton's Python backend, for servers without the other."""

    site_packages: Path | None = None
    """Directory where the Python backend finds numpy and onnxruntime, if not by itself; the
    model has a link to it."""

    device: Literal["cpu", "gpu"] = "cpu"
    """Where instances run."""

    tensorrt: bool = False
    """Let the onnxruntime backend compile the graph with TensorRT, in half precision where the
    bundle's FP16 encoder is given; GPU only."""

    instances: int = 1
    """Copies of the encoder that run side by side, on each GPU or on the CPU."""

    threads: int | None = None
    """CPU threads of an instance; what affinity and cgroup leave, shared, where not given."""

    max_batch_size: int = 64
    """Most images that are computed at once."""

    queue_delay_us: int = 0
    """Microseconds that a request may wait for others to fill a batch."""

    replace: bool = False
    """Replace a model of that name."""

    def __post_init__(self) -> None:
        least = {"instances": 1, "threads": 1, "max_batch_size": 1, "queue_delay_us": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            fits = value is None or bound <= value <= MOST
            require(fits, option, f"{bound} to {MOST}", value)
        place = f"--device {self.device} and --backend {self.backend}"
        wanted = "--device gpu and --backend onnxruntime"
        require(not self.tensorrt or place == wanted, "--tensorrt", wanted, place)
        if (packages := self.site_packages) is not None:
            option, backend = "--site-packages", self.backend
            require(backend == "python", option, "--backend python", f"--backend {backend}")
            require(packages.is_dir(), option, "a directory", packages)


def main(options: TritonOptions) -> None:
    """Write the model, and say how to serve it."""
    model = write_model(options)
    print(f"{model}\nserve it with: tritonserver --model-repository {options.out}")


def write_model(options: TritonOptions) -> Path:
    """Write a model of a repository; give its directory.

    Raises:
        BundleError: the bundle is missing or damaged.
        ExportError: there is a model of that name.
        UsageError: the name is none for a directory, or TensorRT is given the INT8 encoder.
        RunError: the repository cannot be written.
    """
    bundle, precision = read_bundle(options.bundle), split_precision(options.bundle)[1]
    if options.device == "gpu":
        refuse_int8(precision)
    name = options.name or bundle.name
    target = check_model_target(options.out, name, replace=options.replace)
    config = model_config(bundle, precision, name, options)
    with (
        writing(options.out, mend="make room or choose another --out"),
        atomic_directory(target, replace=options.replace) as temporary,
    ):
        version = temporary / "1"
        version.mkdir()
        (temporary / CONFIG_FILE).write_text(text_format.MessageToString(config))
        shutil.copyfile(bundle.path_of(precision), version / GRAPH_FILE)
        if options.backend == "python":
            shutil.copyfile(PYTHON_MODEL, version / MODEL_FILE)
            shutil.copyfile(sized_sessions.__file__, version / SESSIONS_FILE)
            if options.site_packages is not None:
                link = version / SITE_PACKAGES
                link.symlink_to(options.site_packages.resolve(), target_is_directory=True)
    return target


def check_model_target(repository: Path, name: str, *, replace: bool) -> Path:
    """Give the directory of a model, where it may be written.

    Raises:
        UsageError: the name is none for a directory in the repository.
        ExportError: there is a model of that name that may not be replaced, or something else.
    """
    if name in ("", "..") or Path(name).name != name:
        raise UsageError(
            "the model's --name", expected="one that a directory can have", found=repr(name)
        )
    target = repository / name
    is_model = (target / CONFIG_FILE).is_file()
    if target.exists() and not (is_model and replace):
        raise ExportError(
            str(target),
            expected="no model of that name",
            found="one" if is_model else "something else",
            mend="choose another --name, or replace a model with --replace",
        )
    return target


def model_config(
    bundle: Bundle, precision: Precision, name: str, options: TritonOptions
) -> triton.ModelConfig:
    """Describe an encoder as Triton wants it described."""
    spec = bundle.preprocessing
    config = triton.ModelConfig(
        name=name,
        backend=options.backend,
        max_batch_size=options.max_batch_size,
        input=[
            triton.ModelInput(
                name=INPUT_NAME,
                data_type=triton.TYPE_UINT8,
                dims=[spec.height, spec.width, spec.channels],
            )
        ],
        output=[
            triton.ModelOutput(name=OUTPUT_NAME, data_type=triton.TYPE_FP32, dims=[bundle.dim])
        ],
        dynamic_batching=triton.ModelDynamicBatching(
            preferred_batch_size=[options.max_batch_size],
            max_queue_delay_microseconds=options.queue_delay_us,
        ),
        instance_group=[instance_group(options)],
    )
    parameters = {
        "fingerprint": bundle.fingerprint_of(bundle.path_of(precision).name),
        "preprocessing": canonical_json(spec.to_json()).decode(),
        "intra_op_thread_count": str(options.threads or max(1, cpu_budget() // options.instances)),
    }
    if options.device == "gpu":
        parameters["cudnn_conv_algo_search"] = HEURISTIC
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    if options.tensorrt:
        accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
        tensorrt = accelerators.add(name="tensorrt")
        tensorrt.parameters.update(tensorrt_parameters(bundle, precision, options))
        config.model_warmup.append(warmup(bundle, options))
    return config


def instance_group(options: TritonOptions) -> triton.ModelInstanceGroup:
    """Say how many copies of the encoder run, and where."""
    kinds = {"cpu": triton.ModelInstanceGroup.KIND_CPU, "gpu": triton.ModelInstanceGroup.KIND_GPU}
    return triton.ModelInstanceGroup(kind=kinds[options.device], count=options.instances)


def tensorrt_parameters(
    bundle: Bundle, precision: Precision, options: TritonOptions
) -> dict[str, str]:
    """Let one engine of TensorRT serve every batch, in the encoder's precision.

    Where `precision_mode` is left out, TensorRT computes in FP32.
    """
    spec = bundle.preprocessing
    image = f"{spec.height}x{spec.width}x{spec.channels}"
    sizes = {"min": 1, "opt": options.max_batch_size, "max": options.max_batch_size}
    shapes = {
        f"trt_profile_{name}_shapes": f"{INPUT_NAME}:{size}x{image}" for name, size in sizes.items()
    }
    return {"precision_mode": "FP16", **shapes} if precision == "fp16" else shapes


def warmup(bundle: Bundle, options: TritonOptions) -> triton.ModelWarmup:
    """Have the engine compiled while the server starts, not under the first request."""
    spec = bundle.preprocessing
    blank = triton.ModelWarmup.Input(
        data_type=triton.TYPE_UINT8,
        dims=[spec.height, spec.width, spec.channels],
        zero_data=True,
    )
    return triton.ModelWarmup(
        name="a full batch", batch_size=options.max_batch_size, inputs={INPUT_NAME: blank}
    )


if __name__ == "__main__":
    sys.exit(run_command(TritonOptions, main, prog="python -m train.export.triton"))
