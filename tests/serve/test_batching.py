from __future__ import annotations

import pytest

from serve.batching import Batcher
from serve.errors import DeadlineError, QueueFullError, RequestError
from serve.latency import BELIEVED_S, MIN_BATCHES
from serve.running_batches import PATIENCE
from serve.tickets import Batch, Decision, Ticket, read_priority


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
    assert batcher.finish(running, 0.0) == [first]
    assert contents(batcher.decide(0.0).batch) == [(others[0], [0]), (others[1], [0, 1])]


def test_a_request_larger_than_a_batch_is_split_and_put_together_again():
    """Ten images go in batches of four; the request is answered after the last of them."""
    batcher = make_batcher()
    ticket = admitted(batcher, 10)
    seen = []
    for expected_answers in ([], [], [ticket]):
        batch = batcher.decide(0.0).batch
        seen += [n for _, positions in contents(batch) for n in positions]
        assert batcher.finish(batch, 0.0) == expected_answers
    assert seen == list(range(10))


def test_images_that_fail_before_the_queue_are_settled():
    """A request whose last image fails to decode is answered then, without a batch."""
    batcher = make_batcher()
    ticket = Ticket(images=3)
    batcher.admit(ticket)
    assert not batcher.settle(ticket, 1)
    batcher.ready(ticket, [1], 0.0)
    assert batcher.finish(batcher.decide(0.0).batch, 0.0) == []
    assert batcher.settle(ticket, 1)
    assert batcher.statistics().held_requests == 0


def test_images_of_a_caller_that_went_that_fail_before_the_queue_answer_nobody():
    """They are counted off what waits as it goes, and not again as they fail."""
    batcher = make_batcher()
    now_s = learnt(batcher, per_image_s=0.1)
    gone, other = (Ticket(images=n, arrived_s=now_s) for n in (4, 3))
    for ticket in (gone, other):
        batcher.admit(ticket)
    batcher.cancel(gone)
    assert not batcher.settle(gone, 4)
    with pytest.raises(DeadlineError, match="for 1 images with 3 before them"):
        batcher.admit(Ticket(images=1, arrived_s=now_s, deadline_s=now_s + 0.2))


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


def test_a_request_whose_time_is_up_as_it_gets_room_counts_as_late():
    """Nobody has heard yet that there was room; its caller has not gone."""
    batcher = make_batcher()
    first, late = admitted(batcher, 12), Ticket(images=1)
    batcher.admit(late, line_up=True)
    batcher.cancel(first)
    assert batcher.admit_line() == (late,)
    batcher.expire(late)
    batcher.cancel(late, unprepared=True)
    statistics = batcher.statistics()
    assert (statistics.expired_requests, statistics.cancelled_requests) == (1, 1)
    assert (statistics.held_requests, statistics.held_images) == (0, 0)


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
    assert batcher.finish(running, 0.0) == []
    assert batcher.statistics().cancelled_requests == 1
    assert batcher.statistics().held_requests == 0


def test_a_failed_batch_ends_its_requests_and_no_other():
    """What else waits of a failed request is dropped; the next request runs."""
    batcher = make_batcher()
    failed, other = admitted(batcher, 6), admitted(batcher, 1)
    assert batcher.finish(batcher.decide(0.0).batch, 0.0, failed=True) == [failed]
    assert contents(batcher.decide(0.0).batch) == [(other, [0])]


def test_a_failed_batch_teaches_nothing():
    """What an encoder refuses at once is no sign that it is fast."""
    batcher = make_batcher()
    now_s = learnt(batcher, per_image_s=0.1)
    before = batcher.statistics().latency
    admitted(batcher, 4, arrived_s=now_s)
    batcher.finish(batcher.decide(now_s).batch, now_s, failed=True)
    assert batcher.statistics().latency == before


def test_a_delay_counts_from_the_oldest_arrival():
    """With a delay an idle instance waits for company, until the oldest has waited enough."""
    batcher = make_batcher(max_delay_s=2.0)
    tickets = [admitted(batcher, 1, arrived_s=10.0), admitted(batcher, 1, arrived_s=11.5)]
    decision = batcher.decide(11.0)
    assert (decision.batch, decision.wake_at_s) == (None, 12.0)
    assert contents(batcher.decide(12.0).batch) == [(ticket, [0]) for ticket in tickets]


def test_a_delay_costs_nobody_their_deadline():
    """Company is waited for as long as what waits can still be done, whoever is first in line."""
    batcher = make_batcher(max_delay_s=5.0)
    admitted(batcher, 1)
    admitted(batcher, 1, client="b", deadline_s=3.0)
    assert batcher.decide(0.0).wake_at_s == 1.5  # half of its time: no forecast yet
    assert batcher.decide(1.5).batch is not None

    batcher = make_batcher(max_delay_s=5.0)
    now_s = learnt(batcher, per_image_s=0.1, delay_s=5.0)
    admitted(batcher, 1, arrived_s=now_s, deadline_s=now_s + 1.0)
    assert batcher.decide(now_s).wake_at_s == pytest.approx(now_s + 0.2)  # two batches of four


def test_a_full_batch_does_not_wait_for_the_delay():
    """Nothing is gained by waiting once a batch is full."""
    batcher = make_batcher(max_delay_s=2.0)
    admitted(batcher, 4)
    assert batcher.decide(0.0).batch is not None


def test_its_state_shows_in_its_repr():
    """A person in a debugger sees what waits, runs and is held."""
    batcher = make_batcher()
    admitted(batcher, 5, held_bytes=50)
    admitted(batcher, 2, client="b", priority=1)
    batcher.decide(0.0)
    batcher.admit(Ticket(images=9), line_up=True)
    assert repr(batcher) == (
        "<Batcher waiting=0+3+0 of 1 clients, running=4 images in 1/1 batches, "
        "held=7/12 images, 50/100 bytes, 1 in line>"
    )


def learnt(
    batcher: Batcher[Ticket],
    *,
    per_image_s: float,
    per_batch_s: float = 0.0,
    delay_s: float = 0.0,
) -> float:
    """Let a batcher see batches of one and of four images; the time afterwards."""
    now_s = 0.0
    for n in range(2 * MIN_BATCHES):
        images = 4 if n % 2 else 1
        ticket = Ticket(images=images, arrived_s=now_s)
        batcher.admit(ticket)
        batcher.ready(ticket, range(images), now_s)
        now_s += delay_s
        batches = []
        while (batch := batcher.decide(now_s).batch) is not None:
            batches.append(batch)
        now_s += per_image_s * images + per_batch_s
        assert [over for batch in batches for over in batcher.finish(batch, now_s)] == [ticket]
    return now_s


def test_a_deadline_that_cannot_be_met_is_refused_at_once():
    """Eight images at a tenth of a second each, before half a second is over: no."""
    batcher = make_batcher()
    now_s = learnt(batcher, per_image_s=0.1)
    admitted(batcher, 4, arrived_s=now_s)
    with pytest.raises(
        DeadlineError,
        match=r"^deadline: expected 800 ms from now, for 4 images with 4 before them, found 500 ms",
    ):
        batcher.admit(Ticket(images=4, arrived_s=now_s, deadline_s=now_s + 0.5))
    assert batcher.admit(Ticket(images=4, arrived_s=now_s, deadline_s=now_s + 0.9))
    assert batcher.statistics().unmeetable_requests == 1


def test_what_is_about_to_come_in_counts_against_a_deadline():
    """Forty images of the same call go before, though none of them is held yet."""
    batcher = make_batcher(max_held_images=200)
    now_s = learnt(batcher, per_image_s=0.1)
    ticket = Ticket(images=1, arrived_s=now_s, deadline_s=now_s + 1.5)
    batcher.check(ticket)
    with pytest.raises(DeadlineError, match="for 1 images with 40 before them"):
        batcher.check(ticket, before=40)


@pytest.mark.parametrize(("instances", "has_lanes"), [(1, False), (2, False), (2, True)])
def test_a_forecast_tells_what_it_would_be_with_more_before(instances, has_lanes):
    """As often as it is asked, what the batcher itself would say then."""
    batcher = make_batcher(
        max_held_images=200, max_held_bytes=1000, instances=instances, has_lanes=has_lanes
    )
    now_s = learnt(batcher, per_image_s=0.1, per_batch_s=0.03)
    admitted(batcher, 7, arrived_s=now_s)
    while batcher.decide(now_s).batch is not None:
        pass
    arrived_s = now_s + 0.01

    def ask(left_s, before=0):
        ticket = Ticket(images=2, arrived_s=arrived_s, deadline_s=arrived_s + left_s)
        with pytest.raises(DeadlineError) as refusal:
            batcher.check(ticket, before=before)
        return refusal.value.forecast

    forecast = ask(0.01)
    for more in range(40):
        assert ask(0.01, before=more).takes_s() == pytest.approx(forecast.takes_s(more))
    assert forecast.takes_s(40) > 2 * forecast.takes_s()
    enough = Ticket(
        images=2, arrived_s=arrived_s, deadline_s=arrived_s + 1.0001 * forecast.takes_s()
    )
    assert batcher.check(enough).takes_s() == forecast.takes_s()


def test_what_runs_already_counts_against_a_deadline():
    """A batch that has just started takes as long as one that waits."""
    batcher = make_batcher()
    now_s = learnt(batcher, per_image_s=0.1)
    admitted(batcher, 4, arrived_s=now_s)
    batcher.decide(now_s)
    with pytest.raises(DeadlineError):
        batcher.admit(Ticket(images=4, arrived_s=now_s, deadline_s=now_s + 0.7))
    later_s = now_s + 0.2
    assert batcher.admit(Ticket(images=4, arrived_s=later_s, deadline_s=later_s + 0.7))


def test_a_deadline_that_has_passed_is_refused_whatever_is_known():
    """A request that was too late before it came takes nobody's place."""
    batcher = make_batcher()
    with pytest.raises(DeadlineError, match="passed before the request was read"):
        batcher.admit(Ticket(images=1, arrived_s=5.0, deadline_s=5.0))


def test_nobody_is_refused_by_a_forecast_that_is_not_known():
    """Before there is data a request with any deadline is tried."""
    batcher = make_batcher()
    ticket = admitted(batcher, 12, deadline_s=0.001)
    assert contents(batcher.decide(0.0).batch) == [(ticket, [0, 1, 2, 3])]


def test_what_cannot_be_done_in_time_any_more_is_dropped_before_it_is_computed():
    """Its batch would end after its deadline; the shorter one behind it still runs."""
    batcher = make_batcher()
    now_s = learnt(batcher, per_image_s=0.1)
    late = admitted(batcher, 4, arrived_s=now_s, deadline_s=now_s + 0.5)
    punctual = admitted(batcher, 2, arrived_s=now_s, deadline_s=now_s + 1.0)
    decision = batcher.decide(now_s + 0.3)
    assert decision.expired == (late,)
    assert contents(decision.batch) == [(punctual, [0, 1])]
    assert batcher.statistics().expired_requests == 1


@pytest.mark.parametrize("ready", [12, 4])
def test_a_large_request_is_not_begun_that_would_not_be_ended(ready):
    """Three batches take longer than its deadline allows: not even the first is computed.

    Images that are being decoded count as well.
    """
    batcher = make_batcher()
    now_s = learnt(batcher, per_image_s=0.1)
    large = Ticket(images=12, arrived_s=now_s, deadline_s=now_s + 1.25)
    batcher.admit(large)
    batcher.ready(large, range(ready), now_s)
    assert batcher.decide(now_s + 0.2).expired == (large,)


def test_time_that_replies_take_counts_against_a_deadline():
    """A vector that leaves in time for nobody is not worth computing."""
    batcher = make_batcher()
    now_s = learnt(batcher, per_image_s=0.1)
    waiting = admitted(batcher, 4, arrived_s=now_s, deadline_s=now_s + 0.6)
    for _ in range(50):
        batcher.note_reply(0.3)
    assert batcher.decide(now_s).expired == (waiting,)
    with pytest.raises(DeadlineError):
        batcher.admit(Ticket(images=4, arrived_s=now_s, deadline_s=now_s + 0.6))


def test_a_refusal_says_when_there_will_be_room():
    """Six images too many, a tenth of a second each; nothing is made up without data."""
    batcher = make_batcher()
    now_s = learnt(batcher, per_image_s=0.1)
    admitted(batcher, 10, arrived_s=now_s)
    with pytest.raises(QueueFullError) as refused:
        batcher.admit(Ticket(images=8, arrived_s=now_s))
    assert refused.value.retry_after_s == pytest.approx(0.6, rel=0.05)
    unlearnt = make_batcher()
    admitted(unlearnt, 10)
    with pytest.raises(QueueFullError) as refused:
        unlearnt.admit(Ticket(images=8))
    assert refused.value.retry_after_s is None


def test_a_higher_priority_runs_first():
    """Who came later with priority 1 is in the next batch."""
    batcher = make_batcher()
    low, default, high = (admitted(batcher, 2, priority=p) for p in (3, 2, 1))
    assert contents(batcher.decide(0.0).batch) == [(high, [0, 1]), (default, [0, 1])]
    assert batcher.statistics().waiting_by_priority == (0, 0, 2)
    assert low.waiting == 2


def test_single_requests_do_not_wait_for_a_bulk_client():
    """Ten images of one client wait; one of another is in the next batch."""
    batcher = make_batcher(max_held_images=20)
    bulk = admitted(batcher, 10, client="bulk")
    single = admitted(batcher, 1, client="single")
    batcher.finish(batcher.decide(0.0).batch, 0.0)
    assert contents(batcher.decide(0.0).batch) == [(single, [0]), (bulk, [4, 5, 6])]


def test_what_ran_for_a_caller_that_went_meanwhile_is_counted():
    """Nobody can stop a batch that runs, but what it computed for nobody shows."""
    batcher = make_batcher()
    gone, late = admitted(batcher, 1), admitted(batcher, 1, deadline_s=2.0)
    batch = batcher.decide(0.0).batch
    batcher.cancel(gone)
    assert batcher.finish(batch, 3.0) == [late]
    assert batcher.statistics().abandoned_images == 2


@pytest.mark.parametrize(("asked", "read"), [(0, 2), (1, 1), (2, 2), (3, 3)])
def test_priorities_are_those_of_triton(asked, read):
    """Zero is the default, one the first."""
    assert read_priority(asked) == read


def test_a_priority_that_is_none_is_refused():
    """Not rounded to one that the caller did not mean."""
    with pytest.raises(
        RequestError, match=r"^priority: expected 0 to 3, 1 being the first, found 4$"
    ):
        read_priority(4)


def make_lanes(lanes: int, **changes: float) -> Batcher[Ticket]:
    """A batcher for an encoder with lanes."""
    return make_batcher(instances=lanes, has_lanes=True, **changes)


def test_a_lone_image_has_all_threads_and_company_has_lanes():
    """Those that come while one image is on all threads wait for it, and then have a lane each."""
    batcher = make_lanes(2)
    first = admitted(batcher, 1)
    alone = batcher.decide(0.0).batch
    assert contents(alone) == [(first, [0])]
    assert not alone.on_one_thread
    others = [admitted(batcher, 1), admitted(batcher, 1)]
    assert batcher.decide(0.0).batch is None
    batcher.finish(alone, 0.0)
    for other in others:
        batch = batcher.decide(0.0).batch
        assert contents(batch) == [(other, [0])]
        assert batch.on_one_thread


def test_lanes_share_a_request():
    """Six images go by halves to two lanes, and the request is answered after both."""
    batcher = make_lanes(2)
    ticket = admitted(batcher, 6)
    halves = [batcher.decide(0.0).batch for _ in range(2)]
    assert [half.images for half in halves] == [3, 3]
    assert batcher.decide(0.0).batch is None
    assert batcher.finish(halves[1], 0.0) == []
    assert batcher.finish(halves[0], 0.0) == [ticket]


def test_few_images_wait_for_those_on_all_threads():
    """On four threads a second image waits for the first, and then has all threads, too."""
    batcher = make_lanes(4)
    admitted(batcher, 1)
    first = batcher.decide(0.0).batch
    second = admitted(batcher, 1)
    assert batcher.decide(0.0).batch is None
    batcher.finish(first, 0.0)
    batch = batcher.decide(0.0).batch
    assert contents(batch) == [(second, [0])]
    assert not batch.on_one_thread


def learn_lanes(
    batcher: Batcher[Ticket], lanes: int = 2, *, alone_s: float, lane_s: float
) -> float:
    """Have both manners take so long an image; give the time then."""
    now_s = 0.0
    for _ in range(MIN_BATCHES + 1):
        admitted(batcher, 1, arrived_s=now_s)
        batch = batcher.decide(now_s).batch
        now_s += alone_s
        batcher.finish(batch, now_s)
        admitted(batcher, lanes, arrived_s=now_s)
        batches = [batcher.decide(now_s).batch for _ in range(lanes)]
        now_s += lane_s
        for batch in batches:
            batcher.finish(batch, now_s)
    return now_s


def test_a_forecast_knows_on_how_many_threads():
    """A lone image takes half as long as one in a lane, and is promised as much."""
    batcher = make_lanes(2)
    now_s = learn_lanes(batcher, alone_s=0.25, lane_s=0.5)
    batcher.admit(Ticket(images=1, arrived_s=now_s, deadline_s=now_s + 0.3))
    with pytest.raises(
        DeadlineError, match=r"expected 500 ms from now, for 2 images with 1 before"
    ):
        batcher.admit(Ticket(images=2, arrived_s=now_s, deadline_s=now_s + 0.3))


def test_images_that_are_soon_done_have_a_thread_each_once_requests_come_beside_others():
    """Neither waits for the other, or is promised less; after a moment one by one it is as ever."""
    batcher = make_lanes(2)
    now_s = learn_lanes(batcher, alone_s=0.0005, lane_s=0.001)
    admitted(batcher, 1, arrived_s=now_s)
    alone = batcher.decide(now_s).batch
    assert not alone.on_one_thread
    admitted(batcher, 1, arrived_s=now_s)
    assert batcher.decide(now_s).batch is None
    now_s += 0.0005
    batcher.finish(alone, now_s)
    first = batcher.decide(now_s).batch
    admitted(batcher, 1, arrived_s=now_s, deadline_s=now_s + 0.0015)
    second = batcher.decide(now_s).batch
    now_s += 0.001
    for batch in (first, second):
        assert batch.images == 1
        assert batch.on_one_thread
        batcher.finish(batch, now_s)
    now_s += BELIEVED_S
    admitted(batcher, 1, arrived_s=now_s)
    assert not batcher.decide(now_s).batch.on_one_thread


def test_a_forecast_counts_what_is_waited_for():
    """On four threads a second image is done once the first is, and it is."""
    batcher = make_lanes(4)
    now_s = 0.0
    for _ in range(MIN_BATCHES + 1):
        admitted(batcher, 1, arrived_s=now_s)
        batch = batcher.decide(now_s).batch
        now_s += 0.25
        batcher.finish(batch, now_s)
    admitted(batcher, 1, arrived_s=now_s)
    assert batcher.decide(now_s).batch is not None
    with pytest.raises(DeadlineError, match=r"expected 500 ms from now"):
        batcher.admit(Ticket(images=1, arrived_s=now_s, deadline_s=now_s + 0.4))
    batcher.admit(Ticket(images=1, arrived_s=now_s, deadline_s=now_s + 0.6))


@pytest.mark.parametrize("lane_s", [None, 0.1])
def test_a_lane_that_hangs_keeps_no_few_waiting(lane_s):
    """Past a few times its forecast they have a thread each; who is late is told meanwhile."""
    batcher = make_lanes(4)
    now_s = learn_lanes(batcher, 4, alone_s=0.05, lane_s=lane_s) if lane_s else 0.0
    admitted(batcher, 4, arrived_s=now_s)
    _, *others = [batcher.decide(now_s).batch for _ in range(4)]
    for batch in others:
        batcher.finish(batch, now_s + (lane_s or 0.0))
    late_s = now_s + 0.3
    overdue_s = now_s + PATIENCE * (lane_s or BELIEVED_S)
    late, other = admitted(batcher, 1, deadline_s=late_s), admitted(batcher, 1)
    assert batcher.decide(now_s + 0.2) == Decision(wake_at_s=late_s)
    told = batcher.decide(late_s)
    assert (told.batch, told.expired) == (None, (late,))
    assert told.wake_at_s == pytest.approx(overdue_s)
    batch = batcher.decide(told.wake_at_s).batch
    assert contents(batch) == [(other, [0])]
    assert batch.on_one_thread


def test_all_threads_that_hang_keep_nobody_waiting():
    """What waits for them is shared by the lanes once they are overdue."""
    batcher = make_lanes(4)
    admitted(batcher, 1)
    assert not batcher.decide(0.0).batch.on_one_thread
    admitted(batcher, 2)
    wake_at_s = batcher.decide(0.0).wake_at_s
    for _ in range(2):
        batch = batcher.decide(wake_at_s).batch
        assert (batch.images, batch.on_one_thread) == (1, True)


def test_what_is_late_counts_for_nothing_in_a_share():
    """Beside an image that is dropped a lone one has all threads."""
    batcher = make_lanes(2)
    late, lone = admitted(batcher, 1, deadline_s=1.0), admitted(batcher, 1)
    decision = batcher.decide(1.0)
    assert decision.expired == (late,)
    assert contents(decision.batch) == [(lone, [0])]
    assert not decision.batch.on_one_thread


def test_a_forecast_of_few_knows_what_runs_beside_them():
    """Three lanes run: an image that comes has the fourth, and takes as long as one thread does."""
    batcher = make_lanes(4)
    now_s = learn_lanes(batcher, 4, alone_s=0.1, lane_s=0.4)
    admitted(batcher, 4, arrived_s=now_s)
    batches = [batcher.decide(now_s).batch for _ in range(4)]
    batcher.finish(batches[0], now_s)
    with pytest.raises(DeadlineError, match=r"expected 4\d\d ms from now"):
        batcher.admit(Ticket(images=1, arrived_s=now_s, deadline_s=now_s + 0.2))


def test_a_forecast_of_the_first_knows_what_waits_behind_them():
    """Others wait for their lanes already: who passes them has a lane, not all threads."""
    batcher = make_lanes(4)
    now_s = learn_lanes(batcher, 4, alone_s=0.1, lane_s=0.4)
    admitted(batcher, 1, arrived_s=now_s)
    batcher.decide(now_s)
    admitted(batcher, 4, arrived_s=now_s, client="bulk", priority=3)
    with pytest.raises(DeadlineError, match=r"expected 500 ms from now, .* with 0 before"):
        batcher.admit(Ticket(images=1, arrived_s=now_s, deadline_s=now_s + 0.3, priority=1))


def test_a_forecast_takes_a_batch_for_as_full_as_it_will_be():
    """The first image of four that run together waits for all of them."""
    batcher = make_batcher(max_held_images=20)
    now_s = learnt(batcher, per_image_s=0.1)
    admitted(batcher, 12, arrived_s=now_s, client="bulk", priority=3)
    batcher.decide(now_s)
    first = {"images": 1, "arrived_s": now_s, "priority": 1}
    with pytest.raises(DeadlineError, match=r"expected 800 ms from now, .* with 0 before"):
        batcher.admit(Ticket(**first, deadline_s=now_s + 0.7))
    assert batcher.admit(Ticket(**first, deadline_s=now_s + 0.9))


def test_a_forecast_counts_on_no_instance_that_hangs():
    """Of two instances one is left, which must end what it is at first."""
    batcher = make_batcher(instances=2, max_held_images=20)
    now_s = learnt(batcher, per_image_s=0.1)
    admitted(batcher, 4, arrived_s=now_s)
    batcher.decide(now_s)
    for _ in range(5):  # of the other
        admitted(batcher, 4, arrived_s=now_s)
        batch = batcher.decide(now_s).batch
        now_s += 0.4
        batcher.finish(batch, now_s)
    admitted(batcher, 4, arrived_s=now_s)
    batcher.decide(now_s)
    with pytest.raises(DeadlineError, match=r"expected 1200 ms from now"):
        batcher.admit(Ticket(images=8, arrived_s=now_s, deadline_s=now_s + 0.9))


def test_what_one_thread_takes_is_bounded_by_what_all_take():
    """Two at a time never fill four lanes, but a quarter of a millisecond on all is soon done."""
    batcher = make_lanes(4)
    now_s = 0.0
    for _ in range(MIN_BATCHES + 1):
        admitted(batcher, 2, arrived_s=now_s)
        batch = batcher.decide(now_s).batch
        now_s += 0.0005
        batcher.finish(batch, now_s)
    for _ in range(2):
        admitted(batcher, 1, arrived_s=now_s)
    for _ in range(2):
        batch = batcher.decide(now_s).batch
        assert (batch.images, batch.on_one_thread) == (1, True)
