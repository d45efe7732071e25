"""What a GPU does in every step alike, recorded once and then started as one: a CUDA graph.

A step on small images is hundreds of kernels of some microseconds each, and Python takes longer
to start them than a GPU to run them.

Rules:
    The first steps run as they are: meanwhile libraries choose their algorithms and take their
    memory, which cannot be recorded. They run on the stream that is recorded later, for
    autograd remembers the stream that it first met a weight on.
    Recording runs nothing; the step that is recorded is replayed at once.
    A graph reads and writes the places that it was recorded with: inputs are copied there,
    what it gives is copied from there, and gradients are left in place.
    What waits for the GPU halfway cannot be recorded. It is computed as it is, and that is said.

Source: the notes on CUDA graphs in PyTorch's documentation, "whole-network capture".
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

STEPS_BEFORE = 3
"""Taken as they are before one is recorded."""

log = logging.getLogger("horace")

Tensors = tuple[Tensor, ...]


def recorded(compute: Callable[..., Tensors], device: torch.device) -> Callable[..., Tensors]:
    """Give a function that records and replays what it computes, on a GPU; else the function."""
    return Recorded(compute, device) if device.type == "cuda" else compute


class Recorded:
    """A function of CUDA tensors whose kernels are recorded and replayed.

    Args:
        compute: takes and gives tensors whose shapes never change; what else it reads or writes
            on the GPU stays where it is. It has no effect on the host that matters.
        device: a CUDA device.
    """

    def __init__(self, compute: Callable[..., Tensors], device: torch.device) -> None:
        self._compute = compute
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: Tensors = ()
        self._found: Tensors = ()

    def __call__(self, *given: Tensor) -> Tensors:
        """Compute; the results are the caller's own."""
        self._steps += 1
        if self._steps == STEPS_BEFORE + 1:
            self._record(given)
        if self._graph is None:
            return self._as_it_is(given)
        for place, tensor in zip(self._given, given, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return tuple(tensor.clone() for tensor in self._found)

    def _as_it_is(self, given: Tensors) -> Tensors:
        """Compute on the stream of the recording, and let the caller's wait for it."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            found = self._compute(*given)
        current.wait_stream(self._stream)  # whose next work waits for `current` in its turn
        return found

    def _record(self, given: Tensors) -> None:
        """Record what is computed; where that cannot be done, leave it at that."""
        places = tuple(tensor.clone() for tensor in given)
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._stream.device)
        # Only what this thread does would spoil the recording: others may read or save.
        recording = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(current), recording:  # a failed one leaves its own stream on
                found = self._compute(*places)
        except RuntimeError as error:
            log.warning(
                "the step cannot be recorded as a CUDA graph and is slower for it: %s",
                str(error.__context__ or error).splitlines()[0],
            )
            # torch takes the generator to be recording still, and would draw no more of it.
            generator = torch.cuda.default_generators[self._stream.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            return
        self._graph, self._given, self._found = graph, places, found
