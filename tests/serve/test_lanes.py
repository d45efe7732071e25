from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.lanes import Share, next_share


def share(waiting, running, *, is_on_all=False, is_overdue=False, **changes):
    """What an idle lane takes."""
    usual = {"lanes": 4, "most": 32, "image_s": 0.0, "lone_s": 0.0}
    return next_share(
        waiting=waiting, running=running, is_on_all=is_on_all, is_overdue=is_overdue,
        **(usual | changes),
    )  # fmt: skip


def test_fewer_images_than_lanes_run_together_on_all_threads():
    """A lone image is answered soonest so, and so are three."""
    assert share(1, 0) == share(3, 0) == Share(32, on_one_thread=False)


def test_what_all_threads_are_at_is_waited_for():
    """However many wait: a batch beside it would take a CPU that its layers wait for."""
    assert share(1, 1, is_on_all=True) is None
    assert share(32, 1, is_on_all=True) is None


def test_few_images_wait_for_lanes_that_run():
    """They have all threads soon."""
    assert share(1, 1) is None
    assert share(2, 1) is None


def test_as_many_images_as_lanes_go_each_to_its_lane():
    """What runs already counts: with it there is work for every lane."""
    assert share(4, 0) == share(3, 1) == share(1, 3) == Share(1, on_one_thread=True)


@pytest.mark.parametrize(
    ("waiting", "running", "images"), [(64, 0, 16), (48, 16, 16), (16, 48, 16), (5, 0, 2)]
)
def test_lanes_have_equal_shares_of_all_that_there_is(waiting, running, images):
    """The last lane takes as much as the first, so that all are done at about the same time."""
    assert share(waiting, running) == Share(images, on_one_thread=True)


def test_a_share_is_worth_its_hand_over():
    """Images of 50 us go by twenty, those of 2 ms one by one."""
    assert share(4, 0, image_s=50e-6) == Share(20, on_one_thread=True)
    assert share(4, 0, image_s=2e-3) == Share(1, on_one_thread=True)


def test_an_image_that_is_soon_done_has_one_thread():
    """All of them would save its caller little, and keep others waiting."""
    assert share(1, 0, lone_s=1e-3) == share(1, 1, lone_s=1e-3) == Share(1, on_one_thread=True)
    assert share(1, 0, lone_s=50e-3) == Share(32, on_one_thread=False)
    assert share(1, 1, lone_s=50e-3) is None


def test_nothing_waits_for_what_is_overdue():
    """Beside it images have a thread each, however few."""
    assert share(1, 1, is_overdue=True) == Share(1, on_one_thread=True)
    assert share(1, 3, is_on_all=True, is_overdue=True) == Share(1, on_one_thread=True)


def test_one_lane_takes_what_there_is():
    """With one thread there is one manner."""
    assert share(5, 0, lanes=1) == Share(5, on_one_thread=True)


@given(
    waiting=st.integers(1, 200),
    running=st.integers(0, 200),
    lanes=st.integers(1, 64),
    image_s=st.sampled_from([0.0, 1e-5, 1e-3, 1.0]),
    lone_s=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_images_never_wait_for_nothing(waiting, running, lanes, image_s, lone_s):
    """An idle lane takes something within bounds, unless something runs that it waits for."""
    taken = share(waiting, running, lanes=lanes, image_s=image_s, lone_s=lone_s)
    assert (taken is not None and 1 <= taken.images <= 32) or running
