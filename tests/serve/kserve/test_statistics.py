"""What is counted of models, by several threads, for as many versions as matter."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from serve.job import Embedded
from serve.kserve.statistics import KEPT_VERSIONS, ModelCounts, Statistics

EMBEDDED = Embedded(
    vectors_ND=np.ones((1, 4), np.float32),
    errors=[None],
    decode_s=0.25,
    queue_s=0.5,
    inference_s=1.0,
)


def test_nothing_is_lost_whatever_threads_tell():
    """And a reader sees whole sums."""
    counted = ModelCounts(clock=lambda: 12.0)

    def tell(_: int) -> None:
        counted.answered(EMBEDDED, 2.0)
        counted.failed(ValueError(), 3, 0.125)
        counted.computed(8, 1.0)
        counted.computed(8, 1.0, failed=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(tell, range(4000)))
    with counted.read() as counts:
        assert (counts.success.count, counts.success.total_s) == (4000, 8000.0)
        assert (counts.fail.count, counts.fail.total_s) == (4000, 500.0)
        assert (counts.decode.total_s, counts.queue.total_s) == (1000.0, 2000.0)
        assert (counts.inference.total_s, counts.output.total_s) == (4000.0, 1000.0)
        assert (counts.images, counts.batches[8].count) == (32000, 4000)
        assert counts.last_s == 12.0


def test_a_few_versions_of_each_model_are_remembered():
    """A server that reloads every second for a year does not grow."""
    statistics = Statistics(served=list)
    other = statistics.watch_model("other", "1")
    for version in range(1, 100):
        newest = statistics.watch_model("mine", str(version))
    assert statistics.find("mine", "99") is newest
    assert statistics.find("mine", "1") is None
    kept = [n for n in range(100) if statistics.find("mine", str(n)) is not None]
    assert len(kept) == KEPT_VERSIONS
    assert statistics.find("other", "1") is other


def test_a_version_that_runs_is_never_forgotten():
    """A server may keep more versions than are remembered of those that are gone."""
    served = [("mine", str(n)) for n in range(2 * KEPT_VERSIONS)]
    statistics = Statistics(served=lambda: served)
    counts = [statistics.watch_model(*pair) for pair in served]
    assert [statistics.find(*pair) for pair in served] == counts
    served.clear()
    assert statistics.watch_model("mine", "0") is counts[0]
    kept = [n for n in range(2 * KEPT_VERSIONS) if statistics.find("mine", str(n)) is not None]
    assert kept == [0, *range(KEPT_VERSIONS + 1, 2 * KEPT_VERSIONS)]
