from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.backlog import Backlog
from serve.latency import BELIEVED_S, MIN_BATCHES, Lag, LatencyModel
from serve.tickets import Holding, Ticket


def trained(a, b, *, batches=200, sizes=range(1, 33), noise=0.0, seed=0):
    """A model that has seen batches of a * n + b seconds at time 0."""
    model, rng = LatencyModel(), random.Random(seed)
    for _ in range(batches):
        n = rng.choice(sizes)
        model.observe(n, (a * n + b) * (1 + rng.uniform(-noise, noise)), 0.0)
    return model


def test_the_law_is_found():
    """Seconds an image and seconds a batch, apart, also with noise of a tenth."""
    for model in (trained(0.001, 0.005), trained(0.001, 0.005, noise=0.1)):
        found = model.statistics()
        assert found.per_image_s == pytest.approx(0.001, rel=0.15)
        assert found.per_batch_s == pytest.approx(0.005, rel=0.3)
        assert model.predict_s(32, 0.0) == pytest.approx(0.037, rel=0.15)


def test_nothing_is_said_before_there_is_data():
    """The first batches are slow, and zero is what refuses nobody."""
    model = trained(0.001, 0.0, batches=MIN_BATCHES)
    assert model.predict_s(32, 0.0) == 0.0
    assert repr(model) == f"<LatencyModel unknown, {MIN_BATCHES} batches>"
    model.observe(1, 0.001, 0.0)
    assert model.predict_s(32, 0.0) > 0
    assert "ms an image" in repr(model)


def test_nothing_is_said_of_what_was_long_ago():
    """A forecast that refuses everything would else never learn that it is wrong."""
    model = trained(0.001, 0.005)
    assert model.predict_s(32, BELIEVED_S) > 0
    assert model.predict_s(32, BELIEVED_S + 0.1) == 0.0
    slow = trained(0.1, 0.0, sizes=[32])
    assert slow.predict_s(32, 9.0) > 0, "three times as long as a batch takes"
    assert slow.predict_s(32, 9.7) == 0.0


def test_one_odd_batch_moves_nothing_much():
    """A pause of ten seconds in the middle of batches of 37 ms."""
    model = trained(0.001, 0.005, noise=0.05)
    before_s = model.predict_s(32, 0.0)
    model.observe(32, 10.0, 0.0)
    assert model.predict_s(32, 0.0) < 1.2 * before_s


def test_slow_first_batches_are_forgiven():
    """Two of the first eight take a second each, for caches are cold."""
    model = LatencyModel()
    for n in range(40):
        model.observe(4, 1.0 if n < 2 else 0.01, 0.0)
    assert model.predict_s(4, 0.0) < 0.02


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_change_that_stays_is_followed(factor):
    """Another program takes the cores, or gives them back."""
    model = trained(0.001, 0.005, noise=0.05)
    rng = random.Random(1)
    for _ in range(150):
        n = rng.randint(1, 32)
        model.observe(n, (0.001 * n + 0.005) * factor, 0.0)
    assert model.predict_s(16, 0.0) == pytest.approx(0.021 * factor, rel=0.25)


def test_while_all_batches_have_one_size_nothing_is_said_of_others():
    """A larger batch, never seen, is taken for no slower: it is tried, and then known."""
    model = trained(0.0, 0.01, sizes=[1])
    assert model.predict_s(32, 0.0) == pytest.approx(0.01, rel=0.1)
    for _ in range(60):
        model.observe(32, 0.1, 0.0)
    assert model.predict_s(32, 0.0) == pytest.approx(0.1, rel=0.25)


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(st.tuples(st.integers(1, 64), st.floats(0.0, 100.0)), max_size=80),
)
def test_a_forecast_is_never_negative_and_grows_with_the_batch(batches):
    """Whatever was measured, nonsense included."""
    model = LatencyModel()
    for images, seconds in batches:
        model.observe(images, seconds, 0.0)
    forecasts = [model.predict_s(images, 0.0) for images in (1, 8, 64)]
    assert 0 <= forecasts[0] <= forecasts[1] <= forecasts[2] < 1e4


def test_many_images_take_as_many_batches():
    """Seventy images in batches of 32, on one instance and on two."""
    model = trained(0.001, 0.0)
    alone_s = model.speed(0.0).of_batches(70, batch_images=32, instances=1)
    assert alone_s == pytest.approx(0.070, rel=0.1)
    shared_s = model.speed(0.0).of_batches(70, batch_images=32, instances=2)
    assert shared_s == pytest.approx(alone_s / 2)
    few_s = model.speed(0.0).of_batches(33, batch_images=32, instances=4)
    assert few_s >= model.predict_s(32, 0.0), "no request is done before its last batch"


def test_a_lag_is_allowed_for_with_its_spread():
    """A steady one comes near itself, a jumping one is allowed more than its mean."""
    steady, jumping = Lag(), Lag()
    for n in range(100):
        steady.observe(0.01)
        jumping.observe(0.02 * (n % 2))
    assert steady.seconds == pytest.approx(0.01, rel=0.01)
    assert jumping.seconds > 0.02


def pending(backlog, images, holdings, **fields):
    """Let images of a client pend; the request."""
    ticket = Ticket(images=images, **fields)
    ticket.holding = holdings.setdefault(ticket.client, Holding())
    backlog.add(ticket, images)
    return ticket


def ahead(backlog, holdings, **fields):
    """How many images run before one more."""
    newcomer = Ticket(**({"images": 1} | fields))
    return backlog.ahead_of(newcomer, holdings.get(newcomer.client), clients=len(holdings))


def test_the_backlog_counts_what_runs_before_a_newcomer():
    """Its own client's images, higher priorities, and as many turns of others as it takes."""
    backlog, holdings = Backlog(quantum_images=8), {}
    pending(backlog, 100, holdings, client="bulk")
    pending(backlog, 5, holdings, client="own")
    assert ahead(backlog, holdings, client="bulk") == 100 + 5
    assert ahead(backlog, holdings, client="own") == 5 + 8
    assert ahead(backlog, holdings, client="new") == 8 + 8, "two turns"
    assert ahead(backlog, holdings, client="new", priority=1) == 0
    high = pending(backlog, 50, holdings, client="bulk", priority=1)
    assert ahead(backlog, holdings, client="new", priority=3) == 50 + 105
    backlog.add(high, -50)
    assert ahead(backlog, holdings, client="new", priority=1) == 0
    assert repr(backlog) == "<Backlog (0, 105, 0) images>"


def test_the_backlog_counts_what_lower_priorities_are_owed():
    """Of sixteen images one may be of a lower priority."""
    backlog, holdings = Backlog(quantum_images=8), {}
    pending(backlog, 100, holdings, priority=3)
    assert ahead(backlog, holdings, images=29, priority=1) == 1
    assert ahead(backlog, holdings, images=30, priority=1) == 2
