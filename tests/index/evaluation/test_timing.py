import pytest

from index.evaluation.timing import time_searches


class Clock:
    """Time that only searches take: a millisecond a query, ten for the fourth."""

    def __init__(self):
        self.now_s, self.calls = 0.0, []

    def search(self, queries, k):
        """Let time pass."""
        self.calls.append((queries.tolist(), k))
        self.now_s += 1e-3 * sum(10 if query == 3 else 1 for query in queries.tolist())

    def __call__(self):
        """Tell the time, in seconds."""
        return self.now_s


def test_times_become_percentiles_and_rates():
    """20 queries, one slow: singles in all 29 ms, a batch as well."""
    clock = Clock()
    timing = time_searches(clock.search, 20, k=7, clock=clock)
    assert timing.latencies_ms == pytest.approx([1.0] * 19 + [10.0])
    assert (timing.p50_ms, timing.p95_ms) == pytest.approx((1.0, 1.45))
    assert timing.p99_ms == pytest.approx(1 + 0.81 * 9)
    assert timing.single_qps == pytest.approx(20 / 29e-3)
    assert timing.batched_qps == pytest.approx(20 / 29e-3)
    assert (timing.n_single, timing.n_batch, timing.k) == (20, 20, 7)


def test_the_first_calls_are_not_timed():
    """Ten to warm up, then every query alone, then three times all together."""
    clock = Clock()
    time_searches(clock.search, 12, clock=clock)
    singles = [[n] for n in range(12)]
    assert [queries for queries, _ in clock.calls] == [
        *singles[:10], *singles, *[list(range(12))] * 3
    ]  # fmt: skip


def test_of_many_queries_some_are_timed_alone():
    """Three hundred are enough for p99, and a thousand for a batch."""
    clock = Clock()
    timing = time_searches(clock.search, 5000, clock=clock)
    assert (timing.n_single, timing.n_batch) == (300, 1000)
