"""Threads that stop nobody."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from serve.front.threads import unhurried_threads


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """As far as this process knows."""
    monkeypatch.setattr("serve.front.threads.cpu_budget", lambda: 1)


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the policy is Linux's")


def policy_of_a_thread() -> int:
    """How a thread that begins now is scheduled."""
    found = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_that_begins_within_waits_and_its_maker_does_not():
    """Nor does one that begins later, or after a failure."""
    usual = os.sched_getscheduler(0)
    with unhurried_threads():
        assert policy_of_a_thread() == os.SCHED_BATCH
    assert policy_of_a_thread() == usual
    with pytest.raises(ValueError, match="a port"), unhurried_threads():
        raise ValueError("a port that cannot be had")
    assert os.sched_getscheduler(0) == usual


def test_on_several_cores_nothing_changes(monkeypatch):
    """Encoders keep them all busy, and a reader would wait too long."""
    monkeypatch.setattr("serve.front.threads.cpu_budget", lambda: 2)
    usual = os.sched_getscheduler(0)
    with unhurried_threads():
        assert policy_of_a_thread() == usual


def test_where_it_is_forbidden_nothing_changes(monkeypatch):
    """Such as in a container that filters system calls."""

    def forbid(*_):
        raise PermissionError

    usual = os.sched_getscheduler(0)
    monkeypatch.setattr(os, "sched_setscheduler", forbid)
    with unhurried_threads():
        assert policy_of_a_thread() == usual
    assert os.sched_getscheduler(0) == usual
