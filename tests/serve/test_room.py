from __future__ import annotations

import pytest

from serve.room import Room
from serve.tickets import Ticket


def held(room, images, **fields):
    """A request that has come in."""
    ticket = Ticket(images=images, **fields)
    assert room.admits(ticket)
    room.hold(ticket)
    return ticket


def test_images_and_bytes_are_bounded_and_given_back():
    """What comes in counts until it is over."""
    room = Room(max_images=10, max_bytes=100)
    ticket = held(room, 4, held_bytes=60, client="a")
    assert not room.admits(Ticket(images=7, client="b"))
    assert not room.admits(Ticket(images=1, held_bytes=41, client="b"))
    assert repr(room) == "<Room 4/10 images, 60/100 bytes of 1 clients, 0 in line>"
    room.release(ticket)
    assert (room.images, room.bytes, room.clients) == (0, 0, 0)


def test_one_client_leaves_room_for_others():
    """Beside a bulk client a ninth of the room stays free; another client gets in."""
    room = Room(max_images=900, max_bytes=10**6)
    while room.admits(Ticket(images=10, client="bulk")):
        held(room, 10, client="bulk")
    assert room.images == 800
    held(room, 100, client="other")


def test_bytes_are_shared_as_images_are():
    """A client that sends few but large images is bounded, too."""
    room = Room(max_images=900, max_bytes=9000)
    while room.admits(Ticket(images=1, held_bytes=500, client="bulk")):
        held(room, 1, held_bytes=500, client="bulk")
    assert room.bytes == 8000


def test_who_is_over_its_share_holds_back_nobody_else_in_line():
    """The bulk client waits for its share; another's request behind it comes in."""
    room = Room(max_images=18, max_bytes=100)
    for _ in range(2):
        held(room, 8, client="bulk")
    bulk, other = Ticket(images=1, client="bulk"), Ticket(images=2, client="other")
    assert not room.admits(bulk)
    assert room.line_up(bulk)
    assert room.line_up(other)
    assert room.next_in_line() is other
    assert room.next_in_line() is None
    assert room.line == (bulk,)


def test_who_waits_for_room_is_passed_by_nobody():
    """A large request of a client that holds nothing has its turn before small ones."""
    room = Room(max_images=10, max_bytes=100)
    first = held(room, 5, client="a")
    large = Ticket(images=9, client="large")
    assert room.line_up(large)
    assert not room.admits(Ticket(images=1, client="small"))
    assert room.next_in_line() is None
    room.release(first)
    assert room.next_in_line() is large


def test_a_newcomer_passes_those_who_wait_for_their_own_share():
    """What a bulk client has in line is no reason to refuse another."""
    room = Room(max_images=18, max_bytes=100)
    for _ in range(2):
        held(room, 8, client="bulk")
    assert room.line_up(Ticket(images=1, client="bulk"))
    assert room.admits(Ticket(images=1, client="other"))
    assert not room.admits(Ticket(images=1, client="bulk"))


def test_clients_in_line_take_turns_and_keep_their_own_order():
    """Three requests of one and one of another: the other is second."""
    room = Room(max_images=100, max_bytes=1000)
    tickets = [Ticket(images=1, client=client) for client in "aaab"]
    for ticket in tickets:
        room.line_up(ticket)
    came_in = []
    while ticket := room.next_in_line():
        room.hold(ticket)
        came_in.append(ticket)
    assert came_in == [tickets[0], tickets[3], tickets[1], tickets[2]]
    assert room.lined_up == 0


def test_the_line_is_bounded_in_bytes():
    """Who waits holds memory; one may wait whatever its size, more only within the bound."""
    room = Room(max_images=1, max_bytes=100)
    held(room, 1)
    first = Ticket(images=1, held_bytes=150)
    assert room.line_up(first)
    assert not room.line_up(Ticket(images=1, held_bytes=1))
    assert room.leave_line(first)
    assert not room.leave_line(first)
    assert room.line_up(Ticket(images=1, held_bytes=1))
    assert room.lined_up_bytes == 1
    assert not room.line_up(Ticket(images=1, held_bytes=100))
    assert room.line_up(Ticket(images=1, held_bytes=99))


@pytest.mark.parametrize(
    ("asked", "images"),
    [
        ({"images": 5}, 1),  # its client's share alone is in its way
        ({"images": 8}, 4),
        ({"images": 1, "held_bytes": 60}, 4),  # half of the bytes that are held
    ],
)
def test_what_must_go_before_a_request_fits_is_counted_in_images(asked, images):
    """Bytes go with the images that they belong to."""
    room = Room(max_images=12, max_bytes=100)
    held(room, 8, held_bytes=80)
    assert room.lacking_images(Ticket(**asked)) == images
