import numpy as np
import pytest
from scipy.stats import bootstrap

from index.evaluation import bootstrap as module
from index.evaluation.bootstrap import bootstrap_interval


def test_it_is_the_percentile_interval_of_scipy():
    """Another draw, so up to its noise: a tenth of the interval's width."""
    values = np.random.default_rng(0).beta(5, 2, (400, 1))
    low, high = bootstrap_interval(values, seed=1, resamples=4000)
    theirs = bootstrap(
        (values[:, 0],), np.mean, n_resamples=4000, method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert (low[0], high[0]) == pytest.approx((theirs.low, theirs.high), abs=0.1 * width)


def test_a_seed_is_an_interval_whatever_the_blocks(monkeypatch):
    """The same seed again, in blocks of one draw; another seed differs."""
    values = np.random.default_rng(0).random((50, 3))
    once = bootstrap_interval(values, seed=3)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    np.testing.assert_allclose(once, bootstrap_interval(values, seed=3), rtol=1e-12)
    assert not np.array_equal(once, bootstrap_interval(values, seed=4))


def test_queries_that_agree_leave_no_doubt():
    """All alike, or a single one: the interval is the mean."""
    for values in (np.full((9, 1), 0.25), np.array([[0.25]])):
        assert [end.tolist() for end in bootstrap_interval(values, seed=0)] == [[0.25], [0.25]]
