"""Which endpoint a request goes to, by the clock of the test."""

from __future__ import annotations

import pytest

from models.endpoints import BASE_EJECTION_S, MAX_EJECTION_S, Endpoints


def take(endpoints: Endpoints, now_s: float = 0.0, count: int = 1) -> list[str]:
    """The addresses of the next requests, which all stay in flight."""
    return [endpoints.take(now_s).address for _ in range(count)]


def test_the_least_busy_endpoint_is_taken():
    """And among equals the one that was used least recently."""
    endpoints = Endpoints(["a", "b", "c"])
    assert take(endpoints, count=7) == ["a", "b", "c", "a", "b", "c", "a"]
    endpoints.succeeded(endpoints.all[1])
    endpoints.succeeded(endpoints.all[1])
    assert take(endpoints, count=2) == ["b", "b"]


def test_one_request_at_a_time_still_goes_around():
    """A fleet with little to do shares it."""
    endpoints = Endpoints(["a", "b"])
    seen = []
    for _ in range(4):
        endpoint = endpoints.take(0.0)
        seen.append(endpoint.address)
        endpoints.succeeded(endpoint)
    assert seen == ["a", "b", "a", "b"]


def test_what_fails_is_left_out_and_tried_by_one_request():
    """Its success brings it back."""
    endpoints = Endpoints(["a", "b"])
    broken = endpoints.take(0.0)
    assert endpoints.failed(broken, 0.0)
    assert take(endpoints, BASE_EJECTION_S / 2, count=3) == ["b", "b", "b"]
    trial = endpoints.take(BASE_EJECTION_S)
    assert trial is broken
    assert take(endpoints, BASE_EJECTION_S, count=2) == ["b", "b"], "one tries it, no more"
    endpoints.succeeded(trial)
    assert take(endpoints, BASE_EJECTION_S, count=2) == ["a", "a"]
    assert repr(broken) == "<Endpoint a well in_flight=2>"


@pytest.mark.parametrize(("failures", "factor"), [(1, 1), (2, 2), (3, 4)])
def test_ejection_grows_with_every_failure_in_a_row(failures, factor):
    """By a factor of two."""
    endpoints = Endpoints(["a"])
    now_s = 0.0
    for _ in range(failures):
        now_s += endpoints.wait_s(now_s)
        endpoints.failed(endpoints.take(now_s), now_s)
    assert endpoints.wait_s(now_s) == pytest.approx(factor * BASE_EJECTION_S)


def test_ejection_has_a_bound():
    """What is down for a day is back within a minute."""
    endpoints = Endpoints(["a"])
    now_s = 0.0
    for _ in range(100):
        now_s += endpoints.wait_s(now_s)
        endpoints.failed(endpoints.take(now_s), now_s)
    assert endpoints.wait_s(now_s) == pytest.approx(MAX_EJECTION_S)


def test_requests_that_fail_together_count_once():
    """A server that dies with ten requests is not left out for ten failures."""
    endpoints = Endpoints(["a"])
    together = [endpoints.take(0.0) for _ in range(10)]
    assert [endpoints.failed(endpoint, 0.0) for endpoint in together] == [True] + [False] * 9
    assert endpoints.wait_s(0.0) == BASE_EJECTION_S
    assert endpoints.all[0].in_flight == 0


def test_a_request_goes_elsewhere_after_a_failure():
    """Also where the failed endpoint is the least busy, until all have been tried."""
    endpoints = Endpoints(["a", "b"])
    take(endpoints, count=4)
    first = endpoints.take(0.0)
    endpoints.give_back(first)  # as one that has no room
    assert endpoints.take(0.0, tried={first}) is not first
    assert endpoints.take(0.0, tried=set(endpoints.all)) in endpoints.all


def test_where_all_are_left_out_the_first_to_return_is_tried():
    """An ejection refuses nothing."""
    endpoints = Endpoints(["a", "b"])
    for now_s in (0.0, 0.1):
        endpoints.failed(endpoints.take(now_s), now_s)
    assert endpoints.wait_s(0.2) == pytest.approx(BASE_EJECTION_S - 0.2)
    assert take(endpoints, 0.2) == ["a"]
