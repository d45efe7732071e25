"""How threads of Rust, which Python does not start, are scheduled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from models.cpu import cpu_budget


@contextmanager
def unhurried_threads() -> Iterator[None]:
    """Have the threads that begin within the context wait until a core is free.

    A thread that reads and writes for others is woken for every packet and every reply, and
    Linux stops whatever runs on its core for it: the encoder, or the event loop in the midst
    of a burst of replies, which then leave one by one. One of `SCHED_BATCH` stops nobody, and
    finds more to do when it is its turn, within milliseconds; on an idle core that is at once.

    Only where this process has one core: there it is measured to pay (decision 0007). On several,
    all of which encoders keep busy, such a thread was seen to wait too long.

    A thread has the policy of the one that starts it, so this one has it meanwhile. Where the
    system knows no such policy, or forbids it, nothing changes. Source: sched(7).
    """
    if cpu_budget() > 1:
        yield
        return
    try:
        policy = os.sched_getscheduler(0)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError):
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, policy, os.sched_param(0))
