"""The kNN accuracy that a training is watched by: when it is measured, and beside what.

Rules:
    The images are held in memory as they will be served: no random view, no stream.
    Queries were held out from training; the images that they are compared with were not.
    Raw pixels, the baseline, are those of images averaged down to 32 px a side.
    Features are computed in eval mode and float32, whatever arithmetic trains.
    Without labels of two classes, or switched off, there is nothing to watch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor, nn

from train import monitor
from train.data.training_data import WatchedImages

log = logging.getLogger("horace")


class Watch:
    """Measures the backbone on some images; false where there is nothing to measure on.

    Args:
        images: the bank and the queries.
        to_input: from (N, H, W, C) uint8 on the host to what the network takes, on its device.
        every_epochs: epochs between two measurements; 0 for none.
    """

    def __init__(
        self, images: WatchedImages, to_input: Callable[[Tensor], Tensor], *, every_epochs: int
    ) -> None:
        self._images, self._to_input, self._every_epochs = images, to_input, every_epochs

    def __bool__(self) -> bool:
        return len(self._images.val) > 0 and self._every_epochs > 0

    def is_due(self, steps_done: int, *, steps_per_epoch: int, total_steps: int) -> bool:
        """Say whether to measure after so many steps: at the end of some epochs and the run."""
        epoch, rest = divmod(steps_done, steps_per_epoch)
        if not self or rest != 0:
            return False
        return epoch % self._every_epochs == 0 or steps_done == total_steps

    def baselines(self, network: nn.Module, *, is_untrained: bool) -> dict[str, float]:
        """Measure what a trained encoder has to beat: raw pixels and what it starts from."""
        pixels, start = self._pixels_top1(), self.knn_top1(network)
        log.info(
            "kNN on %d held-out training images, before training: raw pixels %.2f%%, %s %.2f%%",
            len(self._images.val),
            100 * pixels,
            "untrained encoder" if is_untrained else "the weights it starts from",
            100 * start,
        )
        return {"knn_pixels": pixels, "knn_random" if is_untrained else "knn_start": start}

    def knn_top1(self, network: nn.Module) -> float:
        """Measure the features that `network` gives first; its mode is restored."""
        images, labels = self._images.images_NHWC, self._images.labels_N
        bank, val = self._images.bank, self._images.val
        return monitor.knn_accuracy(
            monitor.embed(network, images, bank, self._to_input),
            labels[bank],
            monitor.embed(network, images, val, self._to_input),
            labels[val],
        )

    def _pixels_top1(self) -> float:
        """Measure raw pixels."""
        images, labels = self._images.images_NHWC, self._images.labels_N
        bank, val = self._images.bank, self._images.val
        return monitor.pixel_accuracy(
            monitor.pixels(images, bank), labels[bank], monitor.pixels(images, val), labels[val]
        )
