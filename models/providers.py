"""Where ONNX Runtime computes: the CPU, CUDA or TensorRT; asked for, checked, never guessed.

Rules:
    A provider that this ONNX Runtime does not offer is refused in one line: what is asked,
    what is there, how to install it. One that it offers and then cannot load, such as for
    want of a CUDA library, is refused, too: ONNX Runtime itself would say a word on stderr
    and compute on the CPU.
    A TensorRT engine is a cache: its directory is named by the encoder's fingerprint, the
    GPU and TensorRT's version, so that none is ever loaded into another.
    INT8 encoders are for CPUs, and refused on a GPU: their activations are unsigned, where
    TensorRT takes symmetric ranges alone, and CUDA rounds otherwise, to other vectors.
    CUDA's libraries may be Python packages, which no loader finds by itself:
    `onnxruntime.preload_dlls` loads them before they are looked for.
    How CUDA is used is told in `models.sized_sessions`.

Source: ONNX Runtime's documentation of its CUDA and TensorRT execution providers.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

from models.bundle import Precision
from models.errors import EncoderError, UsageError
from models.sized_sessions import CUDA_OPTIONS, SIZES

Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)

EXECUTION_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

ENGINE_CACHE = "~/.cache/horace/engines"
"""Where TensorRT's engines are kept from one start to the next, unless HORACE_ENGINE_CACHE
names another directory."""

GPUS = Path("/proc/driver/nvidia/gpus")

TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
TENSORRT_LIBRARY = "libnvinfer.so.10"

INSTALL: dict[Provider, str] = {
    "cpu": "pip install -e '.[cpu]'",
    "cuda": "pip uninstall onnxruntime, then pip install -e '.[gpu]'",
    "tensorrt": "pip uninstall onnxruntime, then pip install -e '.[gpu,tensorrt]'",
}

INSTALL_AN_ENGINE = (
    "install ONNX Runtime and faiss by `pip install '.[cpu]'`, on NVIDIA GPUs by '.[gpu]'"
)

ProviderOptions = dict[str, str]


_OPTIONS = re.compile(r"(.+?)((?:,[a-z_]+=[^,/]*)+)", flags=re.DOTALL)

GPU_BATCHES = 2
"""Batches that are with a GPU at once: one is computed while another is copied."""


def engine_cache() -> Path:
    """Name the directory of TensorRT's engines; `~` is the user's."""
    return Path(os.environ.get("HORACE_ENGINE_CACHE", ENGINE_CACHE))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an encoder is to run.

    Attributes:
        provider: what computes.
        device: the number of the GPU; ignored by the CPU.
        engine_cache: directory of TensorRT's engines.
    """

    provider: Provider = "cpu"
    device: int = 0
    engine_cache: Path = field(default_factory=engine_cache)


ON_CPU = Placement()


def split_options(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Split `DIR,word=value,word=value`; what is a path as a whole, commas included, is one.

    Returns:
        The path or the URI, and the words with their values, in their order.
    """
    match = _OPTIONS.fullmatch(text)
    if match is None or os.path.exists(text):
        return text, []
    options = [option.split("=", 1) for option in match[2].split(",")[1:]]
    return match[1], [(word, value) for word, value in options]


def split_placement(encoder: str) -> tuple[str, Placement | None]:
    """Tell an encoder from where it is to run, in `DIR,provider=cuda,device=1`.

    Args:
        encoder: a bundle's path or a URI, with or without options.

    Returns:
        The path or the URI, and the placement; None where the text says nothing of it.

    Raises:
        UsageError: an option or its value is not one, or a server is told where to compute.
    """
    where, options = split_options(encoder)
    if not options:
        return where, None
    values = dict(options)
    provider, device = values.get("provider", "cpu"), values.get("device", "0")
    is_sound = (
        len(values) == len(options)
        and values.keys() <= {"provider", "device"}
        and provider in PROVIDERS
        and re.fullmatch(r"[0-9]{1,6}", device)
        and ("device" not in values or provider != "cpu")
    )
    if not is_sound or "://" in where:
        raise UsageError(
            f"encoder {encoder}",
            expected=f"a bundle's path, provider={'|'.join(PROVIDERS)}, and device=N of a GPU",
            found=", ".join("=".join(option) for option in options),
            mend="a server's models are placed where it is started" if "://" in where else None,
        )
    known = next(each for each in PROVIDERS if each == provider)
    return where, Placement(provider=known, device=int(device))


def sizes_to_plan(provider: Provider, largest: int) -> tuple[int, ...]:
    """Give the sizes of the batches after which a GPU has planned those of any, up to a largest.

    TensorRT's engine is for all sizes between those that it has seen; each new extreme builds
    another.
    """
    sizes = {"cpu": (), "cuda": SIZES, "tensorrt": (1,)}[provider]
    return (largest, *(size for size in reversed(sizes) if size < largest))


def require_provider(what: str, provider: Provider, offered: Sequence[str]) -> None:
    """Refuse a provider that ONNX Runtime does not offer here.

    Args:
        what: whose it is, for the message.
        provider: what is asked for.
        offered: `onnxruntime.get_available_providers()`.

    Raises:
        EncoderError: it is not offered.
    """
    name = EXECUTION_PROVIDERS[provider]
    if name not in offered:
        raise EncoderError(
            f"{what} on {provider}",
            expected=f"an ONNX Runtime with {name}",
            found=", ".join(offered),
            mend=f"install it with: {INSTALL[provider]}; or ask for provider=cpu",
        )


def require_loaded(what: str, provider: Provider, in_use: Sequence[str]) -> None:
    """Refuse a session that does not run where it was asked to.

    Args:
        what: whose it is, for the message.
        provider: what was asked for.
        in_use: the session's `get_providers()`, the preferred one first.

    Raises:
        EncoderError: ONNX Runtime has fallen back.
    """
    name = EXECUTION_PROVIDERS[provider]
    if not in_use or in_use[0] != name:
        raise EncoderError(
            f"{what} on {provider}",
            expected=f"a session on {name}",
            found=f"one on {', '.join(in_use) or 'nothing'}: {name} did not load",
            mend="install NVIDIA's driver, CUDA and cuDNN as this ONNX Runtime wants them (its "
            "log names the library that is missing), or ask for provider=cpu",
        )


def refuse_precision(precision: Precision, provider: Provider) -> None:
    """Refuse what a GPU computes otherwise, or not at all.

    Raises:
        UsageError: it is INT8 on a GPU.
    """
    if provider != "cpu" and precision == "int8":
        raise UsageError(
            f"provider {provider}",
            expected="precision fp32 or fp16",
            found="int8, whose unsigned activations are for CPUs",
            mend="export with --fp16, and take encoder.fp16.onnx or precision=fp16",
        )


def session_providers(
    placement: Placement, *, fingerprint: str
) -> list[tuple[str, ProviderOptions]]:
    """Give what ONNX Runtime is to use, the preferred one first.

    The CPU is always there for the few nodes that compute shapes; `require_loaded` sees to it
    that it is never all.

    Raises:
        EncoderError: there is no TensorRT, or its engines cannot be kept.
    """
    cpu: tuple[str, ProviderOptions] = (EXECUTION_PROVIDERS["cpu"], {})
    if placement.provider == "cpu":
        return [cpu]
    device = {"device_id": str(placement.device)}
    cuda = (EXECUTION_PROVIDERS["cuda"], device | CUDA_OPTIONS)
    if placement.provider == "cuda":
        return [cuda, cpu]
    cache = placement.engine_cache / engine_key(
        fingerprint, gpu=gpu_name(placement.device), tensorrt=tensorrt_version()
    )
    try:
        cache = cache.expanduser()
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the second of a user who has no home
        raise EncoderError(
            f"engine cache {cache}",
            expected="a directory that can be written",
            found=getattr(error, "strerror", None) or str(error),
            mend="name another with HORACE_ENGINE_CACHE",
        ) from error
    options = device | {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
    }
    return [(EXECUTION_PROVIDERS["tensorrt"], options), cuda, cpu]


def engine_key(fingerprint: str, *, gpu: str, tensorrt: str) -> str:
    """Name a directory of engines by everything that they depend on."""
    place = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return f"{fingerprint[:16]}.{place}.trt{tensorrt}"


def gpu_name(device: int, gpus: Path = GPUS) -> str:
    """Name a GPU as its driver does; by its number where the driver does not say."""
    names = gpu_names(gpus)
    return names[device] if device < len(names) else f"gpu-{device}"


def gpu_names(gpus: Path = GPUS) -> list[str]:
    """Name the machine's GPUs in the driver's order; none where there is no driver."""
    names = []
    for number, file in enumerate(sorted(gpus.glob("*/information"))):
        lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        names.append(lines.get("Model", f"gpu-{number}").strip())
    return names


def tensorrt_version() -> str:
    """Give the version of the TensorRT that ONNX Runtime will load.

    Raises:
        EncoderError: there is none.
    """
    for package in TENSORRT_PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    try:
        number = int(ctypes.CDLL(TENSORRT_LIBRARY).getInferLibVersion())
    except OSError as error:
        raise EncoderError(
            "provider tensorrt",
            expected="TensorRT 10",
            found=f"neither its Python package nor {TENSORRT_LIBRARY}",
            mend="pip install -e '.[tensorrt]'",
        ) from error
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
