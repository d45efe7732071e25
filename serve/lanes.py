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
    So it is with fewer, too, where requests have come beside others of late and one thread needs
    less than `SOON_S` for an image: all of them could save it no more, and its company would wait.
    A share is worth its hand-over: it takes at least `SHARE_S`, as long as there are images.
    Nothing waits for a batch that is overdue: it may hang. Beside it there are shares alone, for
    the thread that it has may be at work yet.

It does not know what waits, and holds nothing.

See docs/decisions/0024-a-batch-a-thread.md.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE_S = 0.001
"""To hand a batch to a thread and its rows back costs a tenth of this."""

SOON_S = 0.004
"""Less than this a caller hardly sees; a forecast is twice the deviation above what is usual."""


@dataclass(frozen=True, slots=True)
class Share:
    """The next batch.

    Attributes:
        images: how many it takes at most.
        on_one_thread: whether it is computed on the calling thread alone.
    """

    images: int
    on_one_thread: bool


def takes_all(images: int, *, lanes: int, lone_s: float) -> bool:
    """Say whether so many images, and none beside them, run on all threads.

    Args:
        images: images that wait or run.
        lanes: threads of the encoder.
        lone_s: what a batch of one image takes on one thread, at most; 0 where that is not
            known, or requests come one by one.
    """
    return images < lanes and not 0 < lone_s < SOON_S


def next_share(
    *,
    waiting: int,
    running: int,
    is_on_all: bool,
    is_overdue: bool,
    lanes: int,
    most: int,
    image_s: float,
    lone_s: float,
) -> Share | None:
    """Say what an idle lane takes; None where it waits for what runs.

    Args:
        waiting: images that wait, at least one.
        running: images in batches that run.
        is_on_all: whether one of these is on all threads.
        is_overdue: whether one of these runs for far longer than it should.
        lanes: threads of the encoder.
        most: the largest batch.
        image_s: what an image more costs a batch on one thread; 0 where that is not known.
        lone_s: what a batch of one image takes there, as in `takes_all`.
    """
    if not is_overdue:
        if is_on_all:
            return None
        if takes_all(waiting + running, lanes=lanes, lone_s=lone_s):
            return None if running else Share(most, on_one_thread=False)
    fair = -(-(waiting + running) // lanes)
    least = int(SHARE_S / image_s) if image_s else 1
    return Share(min(most, max(fair, least)), on_one_thread=True)
