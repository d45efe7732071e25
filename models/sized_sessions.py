"""An encoder on CUDA: a session for each of a few sizes of batch, and batches padded to them.

Rules:
    ONNX Runtime plans the convolutions of a session anew whenever a batch has another size than
    the one before it, which takes many times as long as the batch. A session that only ever
    sees one size plans once, at its first batch.
    A batch has zeros added up to the next size, and one beyond the largest is cut. The images
    of a batch do not mix, so that what was added changes no vector.
    The weights are on the GPU once for each size.
    cuDNN's heuristic plans a convolution, in the layout that tensor cores take; products are in
    TF32, as is usual for convolutions.
    Nothing here needs the rest of Horace: `train.export.triton` copies it into repositories.

Source: `docs/decisions/0026-a-session-a-size.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnxruntime as ort

CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",
    "prefer_nhwc": "1",
    "arena_extend_strategy": "kSameAsRequested",  # what is held is what a batch needs
}
"""Of ONNX Runtime's CUDA execution provider."""

SIZES = (1, 8, 32)
"""Images of a batch. Up to eight take a GPU hardly longer than one; of ResNet-50, thirty-two
keep it busy."""


class SizedSessions:
    """As much of `onnxruntime.InferenceSession` as an encoder needs; `run` is safe in threads."""

    def __init__(self, load: Callable[[], ort.InferenceSession]) -> None:
        """Load a session for each size.

        Args:
            load: makes a session; what it raises is raised.
        """
        self._sessions = {size: load() for size in SIZES}
        one = self._sessions[SIZES[0]]
        self.get_inputs, self.get_outputs = one.get_inputs, one.get_outputs
        self.get_providers = one.get_providers

    def run(
        self, outputs: Sequence[str], feed: Mapping[str, NDArray[np.uint8]]
    ) -> list[NDArray[np.float32]]:
        """Compute one output of one input, which has at least one image.

        Args:
            outputs: the name of the output.
            feed: the images (N, H, W, C) by the name of the input.

        Returns:
            The vectors (N, D).
        """
        ((name, images_NHWC),) = feed.items()
        largest = SIZES[-1]
        rows = [
            self._run_part(outputs, name, images_NHWC[start : start + largest])
            for start in range(0, len(images_NHWC), largest)
        ]
        return [rows[0] if len(rows) == 1 else np.concatenate(rows)]

    def _run_part(
        self, outputs: Sequence[str], name: str, images_NHWC: NDArray[np.uint8]
    ) -> NDArray[np.float32]:
        """Compute what fits into a batch."""
        count = len(images_NHWC)
        size = next(size for size in SIZES if size >= count)
        if count < size:
            padded_NHWC = np.zeros((size, *images_NHWC.shape[1:]), images_NHWC.dtype)
            padded_NHWC[:count] = images_NHWC
            images_NHWC = padded_NHWC
        (rows_ND,) = self._sessions[size].run(list(outputs), {name: images_NHWC})
        return np.asarray(rows_ND)[:count]
