"""Any order of events, for three clients at three priorities."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from serve.batching import Batcher
from serve.errors import DeadlineError, QueueFullError
from serve.lanes import SOON_S
from serve.latency import BELIEVED_S, MIN_BATCHES
from serve.tickets import Batch, Ticket

MAX_BATCH, MAX_HELD_IMAGES, MAX_HELD_BYTES, INSTANCES = 4, 12, 100, 2


class BatcherMachine(RuleBasedStateMachine):
    """Nothing lost, nothing twice, in order, within bounds, nothing for who has gone."""

    tickets = Bundle("tickets")
    batches = Bundle("batches")
    instances, has_lanes = INSTANCES, False

    def __init__(self) -> None:
        super().__init__()
        self.batcher: Batcher[Ticket] = Batcher(
            max_batch_images=MAX_BATCH,
            max_held_images=MAX_HELD_IMAGES,
            max_held_bytes=MAX_HELD_BYTES,
            instances=self.instances,
            has_lanes=self.has_lanes,
        )
        self.now_s = 0.0
        self.unprepared: dict[Ticket, list[int]] = {}
        self.queued: list[tuple[Ticket, int]] = []
        self.in_flight: list[Batch[Ticket]] = []
        self.unsettled: dict[Ticket, set[int]] = {}
        self.line: list[Ticket] = []
        self.gone: set[Ticket] = set()
        self.answered: set[Ticket] = set()
        self.company_until_s = -math.inf

    @initialize(seconds=st.sampled_from([None, 0.0, 0.001, 0.5, 2.0]))
    def learn(self, seconds):
        """It may know how long a batch takes, in each manner."""
        if seconds is None:
            return
        for n in range(2 * (MIN_BATCHES + 2)):
            images = self.instances if n % 2 else 2
            ticket = Ticket(images=images, arrived_s=self.now_s)
            self.batcher.admit(ticket)
            self.batcher.ready(ticket, range(images), self.now_s)
            batches = list(iter(lambda: self.batcher.decide(self.now_s).batch, None))
            self.now_s += seconds
            answered = [self.batcher.finish(batch, self.now_s) for batch in batches]
            assert answered == [*([] for _ in batches[1:]), [ticket]]

    @rule(
        target=tickets,
        images=st.integers(1, 2) | st.integers(1, 14),
        size=st.integers(0, 70),
        life=st.integers(1, 6),
        line_up=st.booleans(),
        client=st.sampled_from("abc"),
        priority=st.integers(1, 3),
        decoded=st.integers(0, 14),
    )
    def admit(self, images, size, life, line_up, client, priority, decoded):
        """A request comes, of which some is ready; it is let in, waits in line, or is refused."""
        ticket = Ticket(
            images=images,
            held_bytes=size,
            arrived_s=self.now_s,
            deadline_s=math.inf if life > 3 else self.now_s + life,
            client=client,
            priority=priority,
        )
        self.unprepared[ticket] = []
        self.unsettled[ticket] = set(range(images))
        certain = not self.line and self.fits(ticket) and self.holds_nothing(client)
        told, checked = None, None if line_up else self.check(ticket)
        has_company = self.batcher.statistics().held_requests > 0
        try:
            admitted = self.batcher.admit(ticket, line_up=line_up)
        except (QueueFullError, DeadlineError) as error:
            full, endless = isinstance(error, QueueFullError), ticket.deadline_s == math.inf
            assert not (certain and full), "there was room"
            assert full or not endless, "there was time"
            told = str(error)
            self.gone.add(ticket)
            self.unsettled[ticket] = set()
        else:
            assert admitted or line_up
            assert not (certain and not admitted)
            if admitted:
                assert client not in {other.client for other in self.line}, "it passed its own"
                self.unprepared[ticket] = list(range(images))
                self.note_company(ticket, has_company)
            else:
                self.line.append(ticket)
        assert line_up or told == checked, "what is checked is what is decided"
        self.ready(ticket, decoded)
        return ticket

    def check(self, ticket):
        """Why a newcomer would be refused, which holds nothing and changes no other's lot."""
        before = self.batcher.statistics()
        try:
            self.batcher.check(ticket)
        except (QueueFullError, DeadlineError) as error:
            return str(error)
        assert self.batcher.statistics() == before
        return None

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

    @rule(ticket=tickets, unprepared=st.booleans())
    def cancel(self, ticket, unprepared):
        """Its caller hangs up, perhaps before anything was done for it."""
        unprepared &= len(self.unprepared[ticket]) == ticket.images or ticket in self.line
        self.batcher.cancel(ticket, unprepared=unprepared)
        if unprepared:
            self.unprepared[ticket] = []
        if ticket not in self.answered:
            self.forget(ticket)
        self.admit_line()

    @rule(seconds=st.sampled_from([0.001, 0.003]) | st.floats(0.25, 2))
    def time_passes(self, seconds):
        """Deadlines come nearer."""
        self.now_s += seconds

    @rule(target=batches)
    def decide(self):
        """An instance asks for work."""
        decision = self.batcher.decide(self.now_s)
        for ticket in decision.expired:
            assert ticket.deadline_s < math.inf
            assert ticket not in self.gone
            self.forget(ticket)
        self.admit_line()
        if len(self.in_flight) == self.instances:
            assert decision.batch is None
            return None
        waits = self.waits()
        if decision.batch is None:
            assert not self.queued or waits, "an instance is idle while images wait"
            return None
        is_alone = not self.in_flight
        self.in_flight.append(decision.batch)
        taken = [(part.ticket, n) for part in decision.batch.parts for n in part.positions]
        assert decision.batch.images == len(taken)
        self.check_order(taken)
        for ticket, _ in taken:
            assert ticket not in self.gone, "computed for a caller that has gone"
            assert ticket.deadline_s > self.now_s, "computed for a caller that has gone"
        self.queued = [item for item in self.queued if item not in taken]
        full = len(taken) == MAX_BATCH or decision.batch.on_one_thread
        assert full or not self.queued, "a batch has room while images wait"
        assert is_alone or not self.has_lanes or decision.batch.on_one_thread
        assert decision.expired or not waits, "few begin beside what they wait for"
        soon = self.has_lanes and self.is_soon()
        assert decision.expired or not soon or decision.batch.on_one_thread
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
        assert self.batcher.finish(batch, self.now_s, failed=failed) == expected
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
        assert now.waiting_images == sum(now.waiting_by_priority) == len(self.queued)
        assert now.running_batches == len(self.in_flight) <= self.instances
        assert now.held_images <= MAX_HELD_IMAGES or now.held_requests == 1
        assert now.held_bytes <= MAX_HELD_BYTES or now.held_requests == 1
        assert (now.held_images == 0) == (now.held_requests == 0) == (now.clients == 0)
        assert now.lined_up_requests == len(self.line)
        assert now.lined_up_bytes == sum(ticket.held_bytes for ticket in self.line)
        held = {t for t in self.unsettled if not t.over}
        assert set(self.batcher.tickets) == held | set(self.line)
        assert now.held_requests or not self.line, "somebody waits for an empty room"
        assert now.held_images == sum(ticket.images for ticket in held)

    def teardown(self):
        """Let everything run to its end: nothing is left, and nobody was forgotten."""
        for _ in self.unsettled:  # each time round at least one in line is admitted
            for ticket in self.unprepared:
                self.ready(ticket, 99)
            for batch in list(self.in_flight):
                self.finish(batch, False)
            while self.queued:
                batch = self.decide()  # gives a batch, or drops what is late
                if batch is not None:
                    self.finish(batch, False)
        assert not self.batcher.tickets
        assert self.answered | self.gone == set(self.unsettled)
        assert self.batcher.statistics().held_bytes == 0
        assert repr(self.batcher._backlog) == "<Backlog (0, 0, 0) images>"

    def waits(self):
        """Whether images wait for those that all threads are at, or few for any that run."""
        if not self.has_lanes or not self.in_flight:
            return False
        if self.batcher._running.overdue_s <= self.now_s:
            return False
        running = sum(batch.images for batch in self.in_flight)
        few = len(self.queued) + running < self.instances and not self.is_soon()
        return few or any(not batch.on_one_thread for batch in self.in_flight)

    def is_soon(self):
        """Whether one thread is soon done with an image, and requests come beside others."""
        known = self.batcher._running
        on_all_s = known.on_all.predict_s(1, self.now_s)
        lone_s = known.latency.predict_s(1, self.now_s) or self.instances * on_all_s
        return self.now_s < self.company_until_s and 0 < lone_s < SOON_S

    def note_company(self, ticket, has_company):
        """A request has come in, perhaps beside others."""
        if has_company:
            self.company_until_s = ticket.arrived_s + BELIEVED_S

    def check_order(self, taken):
        """First come, first served within each client and priority."""
        for key in {(ticket.priority, ticket.client) for ticket, _ in taken}:
            mine = [item for item in taken if (item[0].priority, item[0].client) == key]
            line = [item for item in self.queued if (item[0].priority, item[0].client) == key]
            assert mine == line[: len(mine)], "not in the order in which they became ready"

    def fits(self, ticket):
        """Whether there is room for a request beside what is held."""
        held = self.batcher.statistics()
        return not held.held_requests or (
            held.held_images + ticket.images <= MAX_HELD_IMAGES
            and held.held_bytes + ticket.held_bytes <= MAX_HELD_BYTES
        )

    def holds_nothing(self, client):
        """Whether no request of a client is held."""
        return client not in {ticket.client for ticket in self.batcher.tickets}

    def admit_line(self):
        """Whatever has happened: those who may come in do, each client's in its order."""
        has_company = self.batcher.statistics().held_requests > 0
        for ticket in self.batcher.admit_line():
            own = [other for other in self.line if other.client == ticket.client]
            assert ticket is own[0], "a client's requests come in in their order"
            self.line.remove(ticket)
            self.unprepared[ticket] = list(range(ticket.images))
            self.note_company(ticket, has_company)
            has_company = True

    def forget(self, ticket):
        """Expect nothing more of a request."""
        self.gone.add(ticket)
        self.line = [other for other in self.line if other is not ticket]
        self.queued = [item for item in self.queued if item[0] is not ticket]


TestBatcher = BatcherMachine.TestCase
TestBatcher.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class LaneMachine(BatcherMachine):
    """The same where each instance is a lane."""

    instances, has_lanes = 3, True


def test_the_machine_comes_to_images_that_are_soon_done():
    """Two beside each other have a thread each there, and the second does not wait."""
    machine = LaneMachine()
    machine.learn(0.001)
    for client in "ab":
        machine.admit(1, 0, 6, False, client, 2, 1)
    assert machine.is_soon()
    assert all(machine.decide().on_one_thread for _ in range(2))
    machine.time_passes(0.001)
    machine.teardown()


TestLanes = LaneMachine.TestCase
TestLanes.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
