"""What runs, and how long that and what waits will take: policy alone.

Rules:
    With lanes there are two manners, all threads or one, and each has its own forecast.
    Which of them images will have depends on all that waits and runs: `serve.lanes`.
    A batch that takes `PATIENCE` times as long as it should is overdue: it may hang. Nothing
    waits for it, and no forecast counts on its instance.
    What is not known takes no time: see `serve.latency`.

It does not know whose images these are, or what waits.
"""

from __future__ import annotations

import math
from typing import Generic

from serve.forecast import Pace
from serve.lanes import Share, next_share, takes_all
from serve.latency import BELIEVED_S, Lag, LatencyModel
from serve.tickets import Batch, TicketT

PATIENCE = 4.0
"""A batch that takes as many times its forecast is waited for no more. Without a forecast it is
given `BELIEVED_S` as many times."""


class RunningBatches(Generic[TicketT]):
    """The batches of one model that run. Not safe for threads."""

    def __init__(self, *, max_batch_images: int, instances: int, has_lanes: bool) -> None:
        """Run nothing, and know nothing; see `serve.batching.Batcher`."""
        self.instances = instances
        self.images = 0
        self.reply = Lag()
        self.latency = LatencyModel()  # with lanes: of batches on one thread
        self.on_all = LatencyModel()  # with lanes: of batches on all threads
        self._max_batch_images = max_batch_images
        self._has_lanes = has_lanes
        self._company_until_s = -math.inf  # with lanes: requests come beside others until then
        self._overdue_s: dict[Batch[TicketT], float] = {}  # from when each is

    def __repr__(self) -> str:
        return f"<RunningBatches {self.images} images in {len(self)}/{self.instances} batches>"

    def __len__(self) -> int:
        return len(self._overdue_s)

    @property
    def overdue_s(self) -> float:
        """When the first of them is overdue."""
        return min(self._overdue_s.values(), default=math.inf)

    def begin(self, batch: Batch[TicketT]) -> None:
        """Note that a batch runs."""
        usual_s = self.predict_s(batch.images, -math.inf, on_one_thread=batch.on_one_thread)
        self._overdue_s[batch] = batch.started_s + PATIENCE * (usual_s or BELIEVED_S)
        self.images += batch.images

    def end(self, batch: Batch[TicketT], now_s: float, *, failed: bool) -> None:
        """Note that a batch is back, and learn from one that was computed."""
        del self._overdue_s[batch]
        self.images -= batch.images
        if not failed:
            model = self._model_of(on_one_thread=batch.on_one_thread)
            model.observe(batch.images, now_s - batch.started_s, now_s)

    def note_company(self, now_s: float) -> None:
        """Note that a request has come beside others."""
        self._company_until_s = now_s + BELIEVED_S

    def next_share(self, waiting: int, now_s: float) -> Share | None:
        """Say what the next batch takes of so many; None where it waits for what runs."""
        if not self._has_lanes:
            return Share(self._max_batch_images, on_one_thread=False)
        return next_share(
            waiting=waiting,
            running=self.images,
            is_on_all=self._is_on_all,
            is_overdue=self.overdue_s <= now_s,
            lanes=self.instances,
            most=self._max_batch_images,
            image_s=self.latency.image_s(now_s),
            lone_s=self._lone_s(now_s),
        )

    def predict_s(self, images: int, now_s: float, *, on_one_thread: bool) -> float:
        """Say how long a batch takes; 0 where that is not known."""
        return self._model_of(on_one_thread=on_one_thread).predict_s(images, now_s)

    def longest_s(self, images: int, now_s: float) -> float:
        """Say how long images take at most, whatever waits and runs."""
        batch_s = self.latency.predict_s(self._max_batch_images, now_s)
        if self._has_lanes:
            batch_s = max(batch_s, self.on_all.predict_s(self.instances - 1, now_s))
        batches = images // self._max_batch_images + 2  # one not full, one that runs
        return batches * batch_s + self.reply.seconds

    def pace(self, now_s: float, *, on_all: bool) -> Pace:
        """Say how long what waits takes once an instance is idle.

        Args:
            now_s: the time.
            on_all: whether it runs on all lanes together.
        """
        if on_all:
            return Pace(self.on_all.speed(now_s), self._max_batch_images, 1, shares=False)
        overdue = sum(overdue_s <= now_s for overdue_s in self._overdue_s.values())
        instances = max(1, self.instances - overdue)
        speed = self.latency.speed(now_s)
        return Pace(speed, self._max_batch_images, instances, shares=self._has_lanes)

    def until_idle_s(self, waiting: int, now_s: float) -> float:
        """Say for how long no instance will take the first of so many images that wait."""
        is_overdue = self.overdue_s <= now_s
        waits = not is_overdue and (self._is_on_all or self.takes_all(waiting, now_s))
        if len(self) < self.instances and not waits:
            return 0.0
        ends_s = [
            batch.started_s + self.predict_s(batch.images, now_s, on_one_thread=batch.on_one_thread)
            for batch, overdue_s in self._overdue_s.items()
            if overdue_s > now_s
        ]
        return max(0.0, (max if waits else min)(ends_s, default=now_s) - now_s)

    def takes_all(self, waiting: int, now_s: float) -> bool:
        """Say whether so many images that wait will run on all lanes together."""
        images = waiting + (0 if self._is_on_all else self.images)
        return (
            self._has_lanes
            and self.overdue_s > now_s
            and takes_all(images, lanes=self.instances, lone_s=self._lone_s(now_s))
        )

    def _lone_s(self, now_s: float) -> float:
        """Say what an image takes on one thread, at most; 0 where requests come one by one."""
        if now_s >= self._company_until_s:
            return 0.0
        on_all_s = self.on_all.predict_s(1, now_s)
        return self.latency.predict_s(1, now_s) or on_all_s * self.instances

    @property
    def _is_on_all(self) -> bool:
        """Whether a batch runs that has all lanes."""
        return self._has_lanes and any(not batch.on_one_thread for batch in self._overdue_s)

    def _model_of(self, *, on_one_thread: bool) -> LatencyModel:
        """Give what is known of batches that are computed so."""
        return self.on_all if self._has_lanes and not on_one_thread else self.latency
