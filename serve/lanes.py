"""Decides how many images the next batch takes, and on how many threads: policy alone.

An encoder with lanes computes a batch on all of its threads, or on the calling thread alone, as
many batches side by side as it has threads.

Rules:
    Where there are fewer images than lanes they run together on all threads: that answers a lone
    image soonest. Nothing runs beside such a batch, and it begins beside nothing: it would wait
    at every layer for the thread whose CPU was taken.
    Where there are as many images or more, each lane takes its share of all that there are as a
    batch of its own. Threads that share one batch wait for one another after every layer;
    lanes never do, and a batch of one image costs an image there little more than a full one.
    A share is worth its hand-over: it takes at least `SHARE_S`, as long as there are images.

It does not know what waits, and holds nothing.

See docs/decisions/0024-a-batch-a-thread.md.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE_S = 0.001
"""To hand a batch to a thread and its rows back costs a tenth of this."""


@dataclass(frozen=True, slots=True)
class Share:
    """The next batch.

    Attributes:
        images: how many it takes at most.
        on_one_thread: whether it is computed on the calling thread alone.
    """

    images: int
    on_one_thread: bool


def next_share(
    *, waiting: int, running: int, is_on_all: bool, lanes: int, most: int, image_s: float
) -> Share | None:
    """Say what an idle lane takes; None where it waits for what runs.

    Args:
        waiting: images that wait, at least one.
        running: images in batches that run.
        is_on_all: whether one of these is on all threads.
        lanes: threads of the encoder.
        most: the largest batch.
        image_s: what an image takes on one thread; 0 where that is not known.
    """
    if is_on_all:
        return None
    if waiting + running < lanes:
        return None if running else Share(most, on_one_thread=False)
    fair = -(-(waiting + running) // lanes)
    least = int(SHARE_S / image_s) if image_s else 1
    return Share(min(most, max(fair, least)), on_one_thread=True)
