"""Devices and precisions: what auto means, what autocast covers, how batches get there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from train.data.batches import Batch, MemorySource, Plan
from train.device import (
    Compute,
    Precision,
    gpu_faults,
    has_native_bf16,
    on_device,
    resolve_compute,
)
from train.errors import TrainError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "is_native"),
    [("fpu avx2 avx512f", False), ("fpu avx512_bf16 x", True), ("amx_bf16", True), ("", False)],
)
def test_bf16_is_native_where_the_cpu_says_so(tmp_path: Path, flags: str, is_native: bool) -> None:
    """Either of two instruction sets will do; no flag, no bf16."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\nbogomips : 1\n")
    assert has_native_bf16(CPU, cpuinfo) == is_native


def test_a_machine_without_cpuinfo_has_no_bf16(tmp_path: Path) -> None:
    """What cannot be known is not taken for granted."""
    assert not has_native_bf16(CPU, tmp_path / "none")


def test_auto_precision_is_what_the_machine_does_natively() -> None:
    """A resolved precision is never `auto`, and a given one is kept."""
    native: Precision = "bf16" if has_native_bf16(CPU) else "fp32"
    assert resolve_compute("cpu", "auto") == Compute(device=CPU, precision=native)
    assert resolve_compute("cpu", "fp16").precision == "fp16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_said_in_one_line() -> None:
    """--device cuda without one names what is there and what to do."""
    with pytest.raises(TrainError) as error:
        resolve_compute("cuda", "auto")
    assert str(error.value) == (
        "CUDA devices of this machine: expected at least 1, found 0; leave out --device cuda"
    )
    assert resolve_compute("auto", "fp32").name == "cpu"


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are some, it is the ranks that are too many."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TrainError, match=r"at least 2, found 1; start at most one rank a GPU$"):
        resolve_compute("cuda", "auto", local_rank=1)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
                "79.11 GiB of which 1.50 GiB is free. Of the allocated memory 77 GiB is ..."
            ),
            "memory of the GPU: expected room for what is computed, found Tried to allocate "
            "2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.50 GiB is free; wait",
        ),
        (
            torch.AcceleratorError("CUDA error: all devices are busy\nCUDA kernel errors might"),
            "the GPU: expected one that computes, and that nobody else has for himself, found "
            "CUDA error: all devices are busy; nvidia-smi shows how it is and who has it; wait",
        ),
    ],
    ids=["full", "busy"],
)
def test_a_gpu_that_fails_is_said_in_one_line(error: RuntimeError, line: str) -> None:
    """Of torch's paragraphs what matters is kept; other errors pass as they are."""
    with pytest.raises(TrainError) as found, gpu_faults(mend="wait"):
        raise error
    assert str(found.value) == line
    fault = torch.AcceleratorError("CUDA error: device-side assert triggered")
    fault.error_code = 710
    with pytest.raises(torch.AcceleratorError), gpu_faults(mend="wait"):
        raise fault
    with pytest.raises(RuntimeError, match=r"^a bug$"), gpu_faults(mend="wait"):
        raise RuntimeError("a bug")


def test_memory_that_no_machine_has_is_said_in_one_line() -> None:
    """As of a projector of some million dimensions."""
    with pytest.raises(TrainError) as found, gpu_faults(mend="wait"):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert str(found.value).startswith(
        "memory of this machine: expected room for what is computed, found can't allocate memory: "
        "you tried to allocate 1152921504606846976 bytes."
    )
    assert str(found.value).endswith(
        "; free memory, or begin with a smaller network, image or batch"
    )


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast_computes_products_in_the_precision(
    precision: Precision, dtype: torch.dtype
) -> None:
    """Weights stay float32; only fp16 has a scaler that scales."""
    compute = Compute(device=CPU, precision=precision)
    layer = torch.nn.Linear(4, 4)
    with compute.autocast():
        assert layer(torch.ones(2, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32
    assert compute.grad_scaler().is_enabled() == (precision == "fp16")


def make_source() -> MemorySource:
    """Five batches of two images."""
    images_NHWC = np.arange(10 * 4, dtype=np.uint8).reshape(10, 2, 2, 1)
    return MemorySource(images_NHWC, Plan(rows=np.arange(10), batch_size=2, seed=0))


def test_images_and_views_arrive_as_they_are() -> None:
    """One tensor of images, or two of views, in the order of the steps."""
    source = make_source()
    arrived = list(on_device(source.batches(1, 5), CPU))
    assert [batch.step for batch in arrived] == [1, 2, 3, 4]
    for batch, sent in zip(arrived, source.batches(1, 5), strict=True):
        (images,) = batch.pixels
        np.testing.assert_array_equal(images.numpy(), sent.images_NHWC)
    zeros, ones = np.zeros((1, 2, 2, 3), np.uint8), np.ones((1, 2, 2, 3), np.uint8)
    two = Batch(step=0, views=(zeros, ones))
    (batch,) = on_device(iter([two]), CPU)
    assert [int(view.max()) for view in batch.pixels] == [0, 1]


@pytest.mark.gpu
def test_prefetched_batches_arrive_whole() -> None:
    """Copies on a second stream are waited for: the GPU sees what was sent."""
    device = torch.device("cuda", 0)
    source = make_source()
    arrived = [batch.pixels[0].clone() for batch in on_device(source.batches(0, 5), device)]
    for images, sent in zip(arrived, source.batches(0, 5), strict=True):
        assert images.device == device
        np.testing.assert_array_equal(images.cpu().numpy(), sent.images_NHWC)


FAULTS = """
import resource, torch
from train.device import Compute, prepare_device

def work():
    for _ in range(8):
        several = [torch.ones(1 << 20) for _ in range(8)]
        del several

prepare_device(Compute(device=torch.device("cpu"), precision="fp32"), threads=1)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Counts the page faults of writing 256 MiB, 65,536 pages, 32 MiB at a time."""


def test_memory_that_a_step_frees_serves_the_next() -> None:
    """It is not given back to the kernel, which would clear each of its pages anew."""
    ended = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True)
    assert int(ended.stdout) < 1000
