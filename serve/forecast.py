"""What is said about how long a request will take: policy alone, and numbers that do not change.

Rules:
    A forecast can be asked what it would be with more images before the request, so that who
    has it need not ask again for each that comes. It knows no more than when it was made: not
    that images which are few now would run in another manner were they many (`serve.lanes`).
    What is not known takes no time: see `serve.latency`, which learns a `Speed`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speed:
    """How long batches of one model take on one instance.

    Attributes:
        image_s: seconds for each image of a batch.
        batch_s: seconds for the batch itself.
    """

    image_s: float
    batch_s: float

    def of_batch(self, images: int) -> float:
        """Say how long a batch takes."""
        return self.image_s * images + self.batch_s

    def of_batches(self, images: int, *, batch_images: int, instances: int) -> float:
        """Say how long many images take in full batches."""
        if images <= batch_images:
            return self.of_batch(images)
        whole, rest = divmod(images, batch_images)
        batch_s = self.of_batch(batch_images)
        batches_s = whole * batch_s
        if rest:
            batches_s += self.of_batch(rest)
        return max(batches_s / instances, batch_s)


UNKNOWN = Speed(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long what waits takes once an instance is idle.

    Attributes:
        speed: of each instance.
        batch_images: the largest batch.
        instances: how many batches run at once.
        shares: whether they divide what waits among them.
    """

    speed: Speed
    batch_images: int
    instances: int
    shares: bool

    def seconds(self, images: int, *, ready: int = 0) -> float:
        """Say how long images take; 0 where that is not known.

        Args:
            images: the first of those that wait.
            ready: with those behind them that could be in the same batch.
        """
        batch_images = self.batch_images
        if self.shares:
            batch_images = min(batch_images, -(-max(1, images, ready) // self.instances))
        full = -(-images // batch_images) * batch_images
        return self.speed.of_batches(
            max(images, min(full, ready)), batch_images=batch_images, instances=self.instances
        )


@dataclass(frozen=True, slots=True)
class Forecast:
    """How long one request will take.

    Attributes:
        pace: of what waits.
        images: its own, and those before them.
        ready: with those behind them that could be in the same batch.
        around_s: seconds before and after: until an instance is idle, and for the reply.
    """

    pace: Pace
    images: int
    ready: int
    around_s: float

    def takes_s(self, more: int = 0) -> float:
        """Say how many seconds, were so many images more before it; 0 where that is not known."""
        paced_s = self.pace.seconds(self.images + more, ready=self.ready + more)
        return paced_s + self.around_s if paced_s else 0.0
