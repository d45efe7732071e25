from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.fair_queue import OVERTAKERS, FairQueue
from serve.tickets import Part, Ticket


def push(queue, images, *, client="", priority=2):
    """Let images of a new request wait."""
    ticket = Ticket(images=images, client=client, priority=priority)
    queue.push(Part(ticket, range(images), 0.0))
    return ticket


def taken(queue, rooms):
    """The clients of the images that batches of these sizes take, in order."""
    order = []
    for room in rooms:
        while room and queue.images:
            assert queue.head() is not None
            part = queue.take(room)
            order += [part.ticket.client] * len(part.positions)
            room -= len(part.positions)
    return "".join(order)


def test_one_client_is_served_in_its_order():
    """First come, first served; a part that does not fit is cut and stays the head."""
    queue = FairQueue(quantum_images=2)
    first, second = push(queue, 3), push(queue, 3)
    parts = [queue.take(room) for room in (2, 2, 2, 2)]
    assert [(part.ticket, list(part.positions)) for part in parts] == [
        (first, [0, 1]),
        (first, [2]),
        (second, [0, 1]),
        (second, [2]),
    ]
    assert queue.head() is None


def test_clients_take_turns_by_images():
    """A request of eight and eight requests of one come to the same."""
    queue = FairQueue(quantum_images=2)
    push(queue, 8, client="a")
    for _ in range(8):
        push(queue, 1, client="b")
    assert repr(queue) == "<FairQueue (0, 16, 0) images of 2 clients>"
    assert taken(queue, [16]) == "aabb" * 4


def test_a_turn_goes_on_in_the_next_batch():
    """Where a batch ends says nothing about whose turn it is."""
    queue = FairQueue(quantum_images=4)
    push(queue, 8, client="a")
    push(queue, 8, client="b")
    assert taken(queue, [3, 3, 3, 3, 3, 1]) == "aaaabbbb" * 2


def test_who_leaves_passes_the_turn_on_whole():
    """A client whose images are taken out leaves the next one a full turn."""
    queue = FairQueue(quantum_images=4)
    gone = push(queue, 8, client="a")
    push(queue, 4, client="b")
    push(queue, 4, client="c")
    part = queue.take(3)
    assert part.ticket is gone
    queue.remove(queue.head())
    assert taken(queue, [8]) == "bbbbcccc"


def test_a_priority_runs_before_the_next():
    """However long the lower one has waited, up to its share."""
    queue = FairQueue(quantum_images=4)
    for priority in (3, 2, 1):
        push(queue, 4, client=str(priority), priority=priority)
    assert taken(queue, [12]) == "1" * 4 + "2" * 4 + "3" * 4


@pytest.mark.parametrize("batch", [1, 5, 32])
def test_no_priority_starves(batch):
    """Under a flood of priority 1 each of the others still gets about a sixteenth."""
    queue = FairQueue(quantum_images=8)
    for priority in (1, 2, 3):
        push(queue, 2000, client=str(priority), priority=priority)
    order = taken(queue, [batch] * (1600 // batch))
    for lower in "23":
        assert order.count(lower) == pytest.approx(97, abs=5)
        places = [-1, *(n for n, client in enumerate(order) if client == lower)]
        gaps = [after - before for before, after in pairwise(places)]
        assert max(gaps) <= 2 * (OVERTAKERS + 1) + batch


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.integers(1, 3)), max_size=30
    ),
    batch=st.integers(1, 6),
)
def test_every_image_is_taken_once_and_in_its_clients_order(requests, batch):
    """Whatever waits: nothing is lost, nothing comes twice, and each client keeps its order."""
    queue = FairQueue(quantum_images=2)
    waiting = {}
    for client, images, priority in requests:
        ticket = push(queue, images, client=client, priority=priority)
        waiting.setdefault((priority, client), []).extend((ticket, n) for n in range(images))
    while queue.images:
        part = queue.take(batch)
        line = waiting[part.ticket.priority, part.ticket.client]
        for n in part.positions:
            assert line.pop(0) == (part.ticket, n)
    assert not any(waiting.values())
    assert queue.clients == 0


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=60),
    batch=st.integers(1, 6),
    quantum=st.integers(1, 4),
)
def test_clients_who_wait_get_the_same(sizes, batch, quantum):
    """While two clients wait, neither is ahead of the other by more than a turn."""
    queue = FairQueue(quantum_images=quantum)
    for n, images in enumerate(sizes):
        push(queue, images, client="abc"[n % 3])
    order = taken(queue, [batch] * sum(sizes))
    for one, other in ("ab", "bc", "ac"):
        last = min(order.rindex(one), order.rindex(other))
        for end in range(last):
            assert abs(order.count(one, 0, end) - order.count(other, 0, end)) <= quantum
