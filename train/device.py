"""Where a training computes, in which arithmetic, and how batches get there.

Rules:
    What `auto` means is resolved once, when a run starts, and kept in its configuration: a
    run that goes on computes as it began, since other arithmetic gives other bits.
    Autocast covers the network's passes alone. Weights, their gradients and moments stay
    float32, and so does the loss.
    On the CPU equal seeds and threads give equal bits. On CUDA cuDNN is held to its
    deterministic algorithms and chooses none by timing, so that its convolutions repeat,
    too; kernels of others that add atomically may differ in the last bits.
    `fp32` on CUDA means float32: no TF32.

Source: Micikevicius et al., arXiv 1710.03740 (mixed precision, loss scaling); the CUDA notes
of PyTorch on pinned memory and streams.

Shapes: N images, H x W pixels, C channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, set_allocator
from train.data.batches import Batch
from train.errors import TrainError

DeviceName = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]

AUTOCAST: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

CPU_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""Linux's names of instructions that multiply bfloat16; without one it is emulated, slowly."""

CUDA_BF16_CAPABILITY = 8
"""The first compute capability (Ampere) that multiplies bfloat16."""

CPUINFO = Path("/proc/cpuinfo")

KEPT_BYTES = 1 << 30

HIDE_GPU = "free the GPU, or hide it with CUDA_VISIBLE_DEVICES="
"""What can be done where a command takes a GPU by itself, and the GPU is full."""

CPU_FULL = "DefaultCPUAllocator: "
"""What torch says before that the kernel gives no more memory; its class is of any fault."""

KERNEL_FAULTS = {700, 710, 714, 715, 716, 717, 718, 719}
"""CUDA's numbers of what a kernel did wrong, such as an address or an assertion: nobody else's
GPU is to blame."""

PIXELS_AT_ONCE = 1 << 22
"""Of images that a network looks at without learning from them, such as 83 of 224 x 224: more would
take more memory than a small batch of large images that is learnt from."""

SLOTS = 3
"""Batches on a GPU: the one in use, the next, and the one before, whose work may not be done."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """A device and the arithmetic of the network on it, both resolved."""

    device: torch.device
    precision: Precision

    @property
    def name(self) -> DeviceName:
        """What `--device` calls it."""
        return "cuda" if self.device.type == "cuda" else "cpu"

    def autocast(self) -> torch.autocast:
        """Give the context of the network's passes."""
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Make the scaler that keeps fp16 gradients from vanishing; else one that does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """A batch on the device: one (N, H, W, C) uint8 tensor of images, or two of views."""

    step: int
    pixels: tuple[Tensor, ...]


def resolve_compute(
    device: DeviceName | Literal["auto"],
    precision: Precision | Literal["auto"],
    *,
    local_rank: int = 0,
) -> Compute:
    """Find out what `auto` means here, and refuse a device that is not there.

    Args:
        device: `auto`, `cpu` or `cuda`.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        local_rank: which of the machine's GPUs.

    Raises:
        TrainError: there is no such CUDA device.
    """
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        found = torch.cuda.device_count()
        if local_rank >= found:
            raise TrainError(
                "CUDA devices of this machine",
                expected=f"at least {local_rank + 1}",
                found=str(found),
                mend="start at most one rank a GPU" if found else "leave out --device cuda",
            )
        place = torch.device("cuda", local_rank)
    else:
        place = torch.device("cpu")
    if precision == "auto":
        precision = "bf16" if has_native_bf16(place) else "fp32"
    return Compute(device=place, precision=precision)


def has_native_bf16(device: torch.device, cpuinfo: Path = CPUINFO) -> bool:
    """Say whether the device multiplies bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= CUDA_BF16_CAPABILITY
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    flags = next((x.partition(":")[2] for x in text.splitlines() if x.startswith("flags")), "")
    return not CPU_BF16_FLAGS.isdisjoint(flags.split())


def images_at_once(most: int, height: int, width: int) -> int:
    """Say how many images a network looks at at once: `most`, or fewer where they are large."""
    return min(most, max(1, PIXELS_AT_ONCE // (height * width)))


def prepare_device(compute: Compute, *, threads: int) -> None:
    """Set what lasts for the whole process: threads, memory, the GPU, and how it computes."""
    torch.set_num_threads(threads)
    if compute.device.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(compute.device)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        with warnings.catch_warnings():
            # Of torch 2.9: it would have its new settings, after which it refuses to read these.
            warnings.filterwarnings("ignore", "Please use the new API settings")
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next step, which needs as much.

    By default it goes back to the kernel and comes again page by page, cleared: 5,000 faults
    and 4% of the CPU time of a step of the preset `fashion-mnist`. Where the library is not
    glibc nothing is changed.
    """
    set_allocator({M_MMAP_THRESHOLD: KEPT_BYTES, M_TRIM_THRESHOLD: KEPT_BYTES})


@contextmanager
def gpu_faults(*, mend: str) -> Iterator[None]:
    """Say in one line that a GPU has no memory left, or the machine, or that a GPU cannot be used.

    Raises:
        TrainError: in place of what torch raises.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        found = ". ".join(str(error).split(". ")[1:3]) or str(error)
        raise TrainError(
            "memory of the GPU", expected="room for what is computed", found=found, mend=mend
        ) from error
    except torch.AcceleratorError as error:
        if getattr(error, "error_code", 0) in KERNEL_FAULTS:
            raise
        raise TrainError(
            "the GPU",
            expected="one that computes, and that nobody else has for himself",
            found=(str(error).splitlines() or [type(error).__name__])[0],
            mend=f"nvidia-smi shows how it is and who has it; {mend}",
        ) from error
    except RuntimeError as error:
        _, is_full, found = str(error).partition(CPU_FULL)
        if not is_full:
            raise
        raise TrainError(
            "memory of this machine",
            expected="room for what is computed",
            found=found.splitlines()[0],
            mend="free memory, or begin with a smaller network, image or batch",
        ) from error


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[DeviceBatch]:
    """Bring batches to the device; to a GPU one ahead, while it computes on the one before.

    On the CPU nothing is copied and nothing is read ahead. On a GPU a batch is the caller's
    until it asks for the next one; all have the shape of the first.
    """
    if device.type != "cuda":
        for batch in batches:
            yield DeviceBatch(step=batch.step, pixels=_tensors(batch))
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types
    slots: list[_Slot] = []
    ahead: tuple[int, _Slot] | None = None
    for number, coming in enumerate(chain(batches, [None])):
        filled = None
        if coming is not None:
            tensors = _tensors(coming)
            if number < SLOTS:
                slots.append(_Slot(tensors, device))
            filled = coming.step, slots[number % SLOTS]
            filled[1].fill(tensors, copying)
        if ahead is not None:
            step, slot = ahead
            torch.cuda.current_stream(device).wait_event(slot.copied)
            yield DeviceBatch(step=step, pixels=slot.pixels)
            slot.used.record(torch.cuda.current_stream(device))
        ahead = filled


class _Slot:
    """Room for one batch: pinned on the host, which takes milliseconds to get, and on the GPU."""

    def __init__(self, like: tuple[Tensor, ...], device: torch.device) -> None:
        self.pinned = tuple(torch.empty_like(tensor, pin_memory=True) for tensor in like)
        self.pixels = tuple(torch.empty_like(tensor, device=device) for tensor in like)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types
        self.used = torch.cuda.Event()  # type: ignore[no-untyped-call]  # as above
        # Memory that is new here may be in use there still: the first copy waits, too.
        self.used.record(torch.cuda.current_stream(device))

    def fill(self, tensors: tuple[Tensor, ...], copying: torch.cuda.Stream) -> None:
        """Start to copy a batch, when the one before it has been copied and used."""
        self.copied.synchronize()
        copying.wait_event(self.used)
        with torch.cuda.stream(copying):
            for tensor, pinned, pixels in zip(tensors, self.pinned, self.pixels, strict=True):
                pinned.copy_(tensor)
                pixels.copy_(pinned, non_blocking=True)
            self.copied.record(copying)


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    """Give the images, or both views, as tensors that share their memory."""
    arrays: tuple[NDArray[np.uint8], ...] | None = batch.views
    if arrays is None:
        assert batch.images_NHWC is not None
        arrays = (batch.images_NHWC,)
    return tuple(torch.from_numpy(array) for array in arrays)
