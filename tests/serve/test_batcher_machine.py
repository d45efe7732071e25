"""Any order of events, for three clients at three priorities."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from serve.batching import Batcher
from serve.errors import DeadlineError, QueueFullError
from serve.latency import MIN_BATCHES
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

    @initialize(seconds=st.sampled_from([None, 0.0, 0.5, 2.0]))
    def learn(self, seconds):
        """It may know how long a batch takes."""
        if seconds is None:
            return
        for _ in range(MIN_BATCHES + 2):
            ticket = Ticket(images=2, arrived_s=self.now_s)
            self.batcher.admit(ticket)
            self.batcher.ready(ticket, [0, 1], self.now_s)
            batch = self.batcher.decide(self.now_s).batch
            self.now_s += seconds
            assert self.batcher.finish(batch, self.now_s) == [ticket]

    @rule(
        target=tickets,
        images=st.integers(1, 14),
        size=st.integers(0, 70),
        life=st.integers(1, 6),
        line_up=st.booleans(),
        client=st.sampled_from("abc"),
        priority=st.integers(1, 3),
    )
    def admit(self, images, size, life, line_up, client, priority):
        """A request comes; it comes in, waits in line, or is refused with a reason."""
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
            else:
                self.line.append(ticket)
        assert line_up or told == checked, "what is checked is what is decided"
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

    @rule(seconds=st.floats(0.25, 2))
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
        if decision.batch is None:
            assert not self.queued or self.waits(), "an instance is idle while images wait"
            return None
        taken = [(part.ticket, n) for part in decision.batch.parts for n in part.positions]
        assert decision.batch.images == len(taken)
        self.check_order(taken)
        for ticket, _ in taken:
            assert ticket not in self.gone, "computed for a caller that has gone"
            assert ticket.deadline_s > self.now_s, "computed for a caller that has gone"
        self.queued = [item for item in self.queued if item not in taken]
        full = len(taken) == MAX_BATCH or decision.batch.on_one_thread
        assert full or not self.queued, "a batch has room while images wait"
        assert not (self.has_lanes and self.in_flight) or decision.batch.on_one_thread
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
        running = sum(batch.images for batch in self.in_flight)
        few = running and len(self.queued) + running < self.instances
        is_on_all = any(not batch.on_one_thread for batch in self.in_flight)
        return self.has_lanes and (few or is_on_all)

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
        for ticket in self.batcher.admit_line():
            own = [other for other in self.line if other.client == ticket.client]
            assert ticket is own[0], "a client's requests come in in their order"
            self.line.remove(ticket)
            self.unprepared[ticket] = list(range(ticket.images))

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


TestLanes = LaneMachine.TestCase
TestLanes.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
