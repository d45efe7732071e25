from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from serve.batching import Batcher
from serve.errors import QueueFullError
from serve.tickets import Batch, Ticket

MAX_BATCH, MAX_HELD_IMAGES, MAX_HELD_BYTES, INSTANCES = 4, 12, 100, 2


def make_batcher(**changes: float) -> Batcher[Ticket]:
    """A batcher with small bounds."""
    bounds = {"max_batch_images": 4, "max_held_images": 12, "max_held_bytes": 100}
    return Batcher(**(bounds | changes))


def admitted(batcher: Batcher[Ticket], images: int, **fields: float) -> Ticket:
    """A ticket with all of its images ready at time 0."""
    ticket = Ticket(images=images, **fields)
    batcher.admit(ticket)
    batcher.ready(ticket, range(images), 0.0)
    return ticket


def contents(batch: Batch[Ticket] | None) -> list[tuple[Ticket, list[int]]]:
    """What a batch holds, in its order."""
    assert batch is not None
    return [(part.ticket, list(part.positions)) for part in batch.parts]


def test_an_idle_instance_gets_a_single_image_at_once():
    """Nothing waits for company while an instance is idle."""
    batcher = make_batcher()
    ticket = admitted(batcher, 1)
    assert contents(batcher.decide(0.0).batch) == [(ticket, [0])]


def test_batches_grow_while_every_instance_is_busy():
    """Images of several requests that came meanwhile run together, in order."""
    batcher = make_batcher()
    first = admitted(batcher, 1)
    running = batcher.decide(0.0).batch
    others = [admitted(batcher, 1), admitted(batcher, 2)]
    assert batcher.decide(0.0).batch is None
    assert batcher.finish(running) == [first]
    assert contents(batcher.decide(0.0).batch) == [(others[0], [0]), (others[1], [0, 1])]


def test_a_request_larger_than_a_batch_is_split_and_put_together_again():
    """Ten images go in batches of four; the request is answered after the last of them."""
    batcher = make_batcher()
    ticket = admitted(batcher, 10)
    seen = []
    for expected_answers in ([], [], [ticket]):
        batch = batcher.decide(0.0).batch
        seen += [n for _, positions in contents(batch) for n in positions]
        assert batcher.finish(batch) == expected_answers
    assert seen == list(range(10))


def test_images_that_fail_before_the_queue_are_settled():
    """A request whose last image fails to decode is answered then, without a batch."""
    batcher = make_batcher()
    ticket = Ticket(images=3)
    batcher.admit(ticket)
    assert not batcher.settle(ticket, 1)
    batcher.ready(ticket, [1], 0.0)
    assert batcher.finish(batcher.decide(0.0).batch) == []
    assert batcher.settle(ticket, 1)
    assert batcher.statistics().held_requests == 0


@pytest.mark.parametrize(("images", "held_bytes"), [(9, 0), (1, 61)])
def test_a_full_queue_refuses_at_once_and_says_what_is_taken(images, held_bytes):
    """Images and bytes are both bounded; the refusal names the bound and what is taken."""
    batcher = make_batcher()
    admitted(batcher, 4, held_bytes=40)
    with pytest.raises(QueueFullError, match="4 of 12 images and 40 of 100 bytes taken"):
        batcher.admit(Ticket(images=images, held_bytes=held_bytes))
    assert batcher.statistics().refused_requests == 1


def test_an_empty_batcher_admits_a_request_beyond_its_bounds():
    """What could never be admitted beside others is admitted alone, not refused forever."""
    batcher = make_batcher()
    ticket = admitted(batcher, 50)
    assert ticket.waiting == 50


def test_who_waits_for_room_is_served_in_turn():
    """A newcomer that would fit is not admitted past a large request that waits."""
    batcher = make_batcher()
    first = admitted(batcher, 8)
    large, small = Ticket(images=10), Ticket(images=1)
    assert not batcher.admit(large, line_up=True)
    assert not batcher.admit(small, line_up=True)
    with pytest.raises(QueueFullError, match=r"8 of 12 images .* 2 requests in line"):
        batcher.admit(Ticket(images=1))
    assert batcher.admit_line() == ()
    batcher.cancel(first)
    assert batcher.admit_line() == (large, small)
    assert batcher.statistics().lined_up_requests == 0


def test_a_request_that_leaves_the_line_lets_the_next_one_in():
    """A head that is cancelled blocks nobody behind it."""
    batcher = make_batcher()
    admitted(batcher, 8)
    large, small = Ticket(images=10), Ticket(images=1)
    batcher.admit(large, line_up=True)
    batcher.admit(small, line_up=True)
    batcher.cancel(large)
    assert batcher.admit_line() == (small,)
    assert set(batcher.tickets) >= {small}


def test_a_request_cancelled_before_it_was_prepared_holds_nothing():
    """Its images will never be accounted for, and its place is free at once."""
    batcher = make_batcher()
    batcher.admit(ticket := Ticket(images=12))
    batcher.cancel(ticket, unprepared=True)
    batcher.cancel(ticket, unprepared=True)
    assert batcher.statistics().held_images == 0
    assert batcher.statistics().cancelled_requests == 1


def test_an_expired_request_is_dropped_before_it_is_computed():
    """A request whose deadline has come is reported, and its place is free again."""
    batcher = make_batcher()
    late, punctual = admitted(batcher, 2, deadline_s=5.0), admitted(batcher, 1, deadline_s=9.0)
    decision = batcher.decide(5.0)
    assert decision.expired == (late,)
    assert contents(decision.batch) == [(punctual, [0])]
    assert batcher.statistics().held_images == 1


def test_what_expires_behind_others_does_not_run_beside_them():
    """A batch is filled with images that somebody still waits for."""
    batcher = make_batcher()
    first, late, last = (admitted(batcher, 1, deadline_s=s) for s in (9.0, 5.0, 9.0))
    decision = batcher.decide(5.0)
    assert decision.expired == (late,)
    assert contents(decision.batch) == [(first, [0]), (last, [0])]


def test_a_cancelled_request_is_computed_no_further():
    """Images that wait are forgotten; those that run are not answered."""
    batcher = make_batcher()
    ticket = admitted(batcher, 6)
    running = batcher.decide(0.0).batch
    batcher.cancel(ticket)
    batcher.cancel(ticket)
    assert batcher.waiting_images == 0
    assert batcher.finish(running) == []
    assert batcher.statistics().cancelled_requests == 1
    assert batcher.statistics().held_requests == 0


def test_a_failed_batch_ends_its_requests_and_no_other():
    """What else waits of a failed request is dropped; the next request runs."""
    batcher = make_batcher()
    failed, other = admitted(batcher, 6), admitted(batcher, 1)
    assert batcher.finish(batcher.decide(0.0).batch, failed=True) == [failed]
    assert contents(batcher.decide(0.0).batch) == [(other, [0])]


def test_a_delay_counts_from_the_oldest_arrival():
    """With a delay an idle instance waits for company, until the oldest has waited enough."""
    batcher = make_batcher(max_delay_s=2.0)
    tickets = [admitted(batcher, 1, arrived_s=10.0), admitted(batcher, 1, arrived_s=11.5)]
    decision = batcher.decide(11.0)
    assert (decision.batch, decision.wake_at_s) == (None, 12.0)
    assert contents(batcher.decide(12.0).batch) == [(ticket, [0]) for ticket in tickets]


def test_a_full_batch_does_not_wait_for_the_delay():
    """Nothing is gained by waiting once a batch is full."""
    batcher = make_batcher(max_delay_s=2.0)
    admitted(batcher, 4)
    assert batcher.decide(0.0).batch is not None


def test_its_state_shows_in_its_repr():
    """A person in a debugger sees what waits, runs and is held."""
    batcher = make_batcher()
    admitted(batcher, 5, held_bytes=50)
    batcher.decide(0.0)
    assert repr(batcher) == (
        "<Batcher waiting=1 running=4 images in 1/1 batches, held=5/12 images, 50/100 bytes>"
    )


class BatcherMachine(RuleBasedStateMachine):
    """Any order of events: nothing lost, nothing twice, in order, within bounds."""

    tickets = Bundle("tickets")
    batches = Bundle("batches")

    def __init__(self) -> None:
        super().__init__()
        self.batcher: Batcher[Ticket] = Batcher(
            max_batch_images=MAX_BATCH,
            max_held_images=MAX_HELD_IMAGES,
            max_held_bytes=MAX_HELD_BYTES,
            instances=INSTANCES,
        )
        self.now_s = 0.0
        self.unprepared: dict[Ticket, list[int]] = {}
        self.queued: list[tuple[Ticket, int]] = []
        self.in_flight: list[Batch[Ticket]] = []
        self.unsettled: dict[Ticket, set[int]] = {}
        self.line: list[Ticket] = []
        self.gone: set[Ticket] = set()
        self.answered: set[Ticket] = set()

    @rule(
        target=tickets,
        images=st.integers(1, 14),
        size=st.integers(0, 70),
        life=st.integers(1, 4),
        line_up=st.booleans(),
    )
    def admit(self, images, size, life, line_up):
        """A request comes; it is refused, or waits, only where others wait or it does not fit."""
        ticket = Ticket(
            images=images,
            held_bytes=size,
            arrived_s=self.now_s,
            deadline_s=math.inf if life == 4 else self.now_s + life,
        )
        self.unprepared[ticket] = []
        self.unsettled[ticket] = set(range(images))
        fits = not self.line and self.fits(ticket)
        try:
            admitted = self.batcher.admit(ticket, line_up=line_up)
        except QueueFullError:
            assert not fits
            assert not line_up
            self.gone.add(ticket)
            self.unsettled[ticket] = set()
        else:
            assert admitted == fits
            if admitted:
                self.unprepared[ticket] = list(range(images))
            else:
                self.line.append(ticket)
        return ticket

    @rule(ticket=tickets, count=st.integers(1, 8))
    def ready(self, ticket, count):
        """Some of its images are decoded."""
        positions, rest = self.unprepared[ticket][:count], self.unprepared[ticket][count:]
        if positions:
            self.unprepared[ticket] = rest
            self.batcher.ready(ticket, positions, self.now_s)
            if ticket not in self.gone:
                self.queued += [(ticket, n) for n in positions]
            self.admit_line()

    @rule(ticket=tickets, count=st.integers(1, 8))
    def fail_to_decode(self, ticket, count):
        """Some of its images are no images."""
        positions, rest = self.unprepared[ticket][:count], self.unprepared[ticket][count:]
        if positions:
            self.unprepared[ticket] = rest
            self.unsettled[ticket] -= set(positions)
            complete = not self.unsettled[ticket] and ticket not in self.gone
            assert self.batcher.settle(ticket, len(positions)) == complete
            self.answered |= {ticket} if complete else set()
            self.admit_line()

    @rule(ticket=tickets)
    def cancel(self, ticket):
        """Its caller hangs up."""
        self.batcher.cancel(ticket)
        if ticket not in self.answered:
            self.forget(ticket)
        self.admit_line()

    @rule(ticket=tickets)
    def cancel_unprepared(self, ticket):
        """Its caller hangs up before anything was done for it."""
        if len(self.unprepared[ticket]) == ticket.images or ticket in self.line:
            self.batcher.cancel(ticket, unprepared=True)
            self.unprepared[ticket] = []
            self.forget(ticket)
            self.admit_line()

    @rule(seconds=st.integers(1, 2))
    def time_passes(self, seconds):
        """Deadlines come nearer."""
        self.now_s += seconds

    @rule(target=batches)
    def decide(self):
        """An instance asks for work."""
        decision = self.batcher.decide(self.now_s)
        for ticket in decision.expired:
            assert ticket.deadline_s <= self.now_s
            assert ticket not in self.gone
            self.forget(ticket)
        self.admit_line()
        alive = [item for item in self.queued if item[0].deadline_s > self.now_s]
        if len(self.in_flight) == INSTANCES:
            assert decision.batch is None
            return None
        if decision.batch is None:
            assert not alive, "an instance is idle while images wait"
            return None
        taken = [(part.ticket, n) for part in decision.batch.parts for n in part.positions]
        assert taken == alive[:MAX_BATCH], "images run in the order in which they became ready"
        assert decision.batch.images == len(taken)
        self.queued = [item for item in self.queued if item not in taken]
        self.in_flight.append(decision.batch)
        return decision.batch

    @rule(batch=consumes(batches), failed=st.booleans())
    def finish(self, batch, failed):
        """A batch comes back."""
        if batch is None:
            return
        self.in_flight.remove(batch)
        expected = []
        for part in batch.parts:
            ticket = part.ticket
            self.unsettled[ticket] -= set(part.positions)
            if ticket in self.gone or ticket in expected:
                continue
            if failed or not self.unsettled[ticket]:
                expected.append(ticket)
        assert self.batcher.finish(batch, failed=failed) == expected
        assert self.answered.isdisjoint(expected), "no request is answered twice"
        for ticket in expected:
            if failed:
                self.forget(ticket)
            self.answered.add(ticket)
        self.admit_line()

    @invariant()
    def counts_agree(self):
        """What the batcher says of itself is what happened."""
        now = self.batcher.statistics()
        assert now.waiting_images == len(self.queued)
        assert now.running_batches == len(self.in_flight) <= INSTANCES
        assert now.held_images <= MAX_HELD_IMAGES or now.held_requests == 1
        assert now.held_bytes <= MAX_HELD_BYTES or now.held_requests == 1
        assert (now.held_images == 0) == (now.held_requests == 0)
        assert now.lined_up_requests == len(self.line)
        held = {t for t in self.unsettled if not t.over}
        assert set(self.batcher.tickets) == held | set(self.line)
        assert not (self.line and self.fits(self.line[0])), "the head waits beside room for it"

    def teardown(self):
        """Let everything run to its end: nothing is left, and nobody was forgotten."""
        for _ in self.unsettled:  # each time round at least the head of the line is admitted
            for ticket in self.unprepared:
                self.ready(ticket, 99)
            for batch in list(self.in_flight):
                self.finish(batch, False)
            while self.queued:
                batch = self.decide()  # gives a batch, or drops what has expired
                if batch is not None:
                    self.finish(batch, False)
        assert not self.batcher.tickets
        assert self.answered | self.gone == set(self.unsettled)
        assert self.batcher.statistics().held_bytes == 0

    def fits(self, ticket):
        """Whether there is room for a request beside what is held."""
        held = self.batcher.statistics()
        return not held.held_requests or (
            held.held_images + ticket.images <= MAX_HELD_IMAGES
            and held.held_bytes + ticket.held_bytes <= MAX_HELD_BYTES
        )

    def admit_line(self):
        """Whatever has happened: those at the head of the line who fit now are let in."""
        for ticket in self.batcher.admit_line():
            assert ticket is self.line.pop(0), "the line is first come, first served"
            self.unprepared[ticket] = list(range(ticket.images))

    def forget(self, ticket):
        """Expect nothing more of a request."""
        self.gone.add(ticket)
        self.line = [other for other in self.line if other is not ticket]
        self.queued = [item for item in self.queued if item[0] is not ticket]


TestBatcher = BatcherMachine.TestCase
TestBatcher.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
