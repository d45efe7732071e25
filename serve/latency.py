"""How long a batch will take, learnt from those that have run: policy alone.

Rules:
    A batch of n images takes a * n + b seconds; a and b follow the recent batches, of which
    each counts a little less than the next.
    One odd batch moves nothing much: what it is off by counts up to a few times of what is
    usual. A change that stays is followed, within some tens of batches.
    What is not known is not used against anybody: before enough batches have run, and after
    none has run for a moment, the forecast is zero, so nothing is refused by it. So a forecast
    that is wrong cannot refuse everybody for long: what it lets through then corrects it.
    While all batches have one size their slope is not known, and taken for what it was, or for
    zero.

It does not know what waits: that is `serve.backlog`.

Source: BentoML's predictor (latency = a * n + b, fitted online); the clipping of residuals is
Huber's (Robust Estimation of a Location Parameter, 1964), on least squares with exponential
forgetting (Ljung, System Identification, 1999, 11.2). `Lag` smooths as TCP does, RFC 6298.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from serve.forecast import UNKNOWN, Speed

MEMORY_BATCHES = 32
"""A batch counts half after some 22 others: about a second of full batches."""

MIN_BATCHES = 8
"""Nothing is said before so many: the first are slower, for memory and caches are cold."""

BELIEVED_S = 1.0
"""After so long without a batch, or three times as long as the last one took, the forecast is
not believed: what it refuses could not prove it wrong otherwise."""

CLIP_DEVIATIONS = 4.0
"""What a batch may be off by, in mean absolute deviations, before the rest is cut."""

LEAST_DEVIATION = 0.05
"""The least deviation, as a part of the forecast, so that steady batches do not stiffen it."""

SLOPE_WEIGHT = 0.5
"""How much the last slope weighs against the spread of sizes (in images squared a batch)."""


@dataclass(frozen=True, kw_only=True)
class LatencyStatistics:
    """What is known of a model's speed.

    Attributes:
        per_image_s: a, seconds an image.
        per_batch_s: b, seconds a batch.
    """

    per_image_s: float
    per_batch_s: float


class LatencyModel:
    """The speed of one model. Not safe for threads."""

    def __init__(self) -> None:
        """Know nothing."""
        self._a = self._b = self._deviation = 0.0
        self._first: list[tuple[int, float]] = []
        self._weight = self._n = self._t = self._nn = self._nt = 0.0
        self._batches = 0
        self._until_s = 0.0

    def __repr__(self) -> str:
        known = f"{self._a * 1e3:.3g} ms an image + {self._b * 1e3:.3g} ms a batch"
        return f"<LatencyModel {known if self._known else 'unknown'}, {self._batches} batches>"

    def statistics(self) -> LatencyStatistics:
        """Give what is known; zeros where nothing is."""
        return LatencyStatistics(per_image_s=self._a, per_batch_s=self._b)

    def observe(self, images: int, seconds: float, now_s: float) -> None:
        """Learn from a batch that has just run."""
        self._batches += 1
        self._until_s = now_s + max(BELIEVED_S, 3 * seconds)
        if not self._known:
            self._first.append((images, seconds))
        elif self._first:
            self._begin()
        if self._known and not self._first:
            self._learn(images, seconds)

    def predict_s(self, images: int, now_s: float) -> float:
        """Say how long a batch will take; 0 where that is not known."""
        return self.speed(now_s).of_batch(images)

    def speed(self, now_s: float) -> Speed:
        """Say what to reckon with."""
        if not self._known or now_s > self._until_s:
            return UNKNOWN
        return Speed(self._a, self._b + 2 * self._deviation)

    def image_s(self, now_s: float) -> float:
        """Say what an image more costs a batch; 0 where that is not known."""
        return self._a if self._known and now_s <= self._until_s else 0.0

    @property
    def _known(self) -> bool:
        """Whether enough has been seen."""
        return self._batches > MIN_BATCHES

    def _begin(self) -> None:
        """Start from the median slope and offset of the first batches (Theil and Sen)."""
        pairs = [(p, q) for p in self._first for q in self._first if p[0] < q[0]]
        if pairs:
            slope = statistics.median((q[1] - p[1]) / (q[0] - p[0]) for p, q in pairs)
            self._a = max(0.0, slope)
        self._b = max(0.0, statistics.median(t - self._a * n for n, t in self._first))
        misses = [abs(t - self._a * n - self._b) for n, t in self._first]
        self._deviation = statistics.median(misses)
        first, self._first = self._first, []
        for n, t in first:
            self._learn(n, t)

    def _learn(self, images: int, seconds: float) -> None:
        """Take one batch into the fit."""
        forecast_s = self._a * images + self._b
        usual_s = max(self._deviation, LEAST_DEVIATION * forecast_s)
        most_s = CLIP_DEVIATIONS * usual_s
        miss_s = min(max(seconds - forecast_s, -most_s), most_s) if usual_s else seconds
        self._deviation += (abs(miss_s) - self._deviation) / (MEMORY_BATCHES / 4)
        self._add(images, forecast_s + miss_s)
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        spread = self._nn / self._weight - mean_n * mean_n
        common = self._nt / self._weight - mean_n * mean_t
        self._a = max(0.0, (common + SLOPE_WEIGHT * self._a) / (spread + SLOPE_WEIGHT))
        self._b = mean_t - self._a * mean_n
        if self._b < 0:  # more than linear: the best line through the origin
            self._a, self._b = self._nt / self._nn, 0.0

    def _add(self, images: int, seconds: float) -> None:
        """Add a point to the sums, in which older ones fade."""
        keep = 1 - 1 / MEMORY_BATCHES
        self._weight = self._weight * keep + 1
        self._n = self._n * keep + images
        self._t = self._t * keep + seconds
        self._nn = self._nn * keep + images * images
        self._nt = self._nt * keep + images * seconds


class Lag:
    """How long something short takes of late: its smoothed value and deviation."""

    def __init__(self) -> None:
        """Know nothing, which counts as no time."""
        self._mean_s = self._deviation_s = 0.0

    def observe(self, seconds: float) -> None:
        """Learn from one more."""
        self._deviation_s += (abs(seconds - self._mean_s) - self._deviation_s) / 4
        self._mean_s += (seconds - self._mean_s) / 8

    @property
    def seconds(self) -> float:
        """What to allow for it."""
        return self._mean_s + 2 * self._deviation_s
