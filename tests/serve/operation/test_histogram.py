import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Reference

from serve.operation.histogram import FOLD_EVERY, SECONDS, SIZES, Histogram, Notes

seconds = st.floats(0, 100) | st.sampled_from(SECONDS)


@given(st.lists(st.lists(seconds, max_size=20), max_size=5))
def test_it_counts_as_the_librarys_own_histogram_does(chunks):
    """Whatever is observed, in whatever portions: the same buckets, count and sum."""
    ours = Histogram(SECONDS)
    reference = Reference("t", "t", buckets=SECONDS, registry=CollectorRegistry())
    for chunk in chunks:
        ours.add(chunk)
        for value in chunk:
            reference.observe(value)
    samples = reference.collect()[0].samples
    expected = [s.value for s in samples if s.name == "t_bucket"]
    assert [count for _, count in ours.cumulative()] == expected
    (total,) = [s.value for s in samples if s.name == "t_sum"]
    assert ours.sum == pytest.approx(total)
    assert ours.count == sum(map(len, chunks))


@pytest.mark.parametrize("bounds", [SECONDS, SIZES])
def test_buckets_grow_by_at_most_a_half_or_one_image(bounds):
    """Fine enough to read a quantile from: neighbours differ by a factor of 2 at most."""
    assert list(bounds) == sorted(set(bounds))
    ratios = np.array(bounds[1:]) / np.array(bounds[:-1])
    assert ratios.max() <= 2
    assert SECONDS[0] < 0.001
    assert SECONDS[-1] > 20


def test_what_many_threads_note_is_counted_once():
    """Eight threads note while another folds all the time: nothing is lost or doubled."""
    counted: list[int] = []
    lock = threading.Lock()
    notes: Notes[int] = Notes(counted.extend, lock)
    done = threading.Event()

    def note(start: int) -> None:
        for n in range(start, start + 5000):
            notes.add(n)

    def read() -> None:
        while not done.is_set():
            with lock:
                notes.fold()

    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=note, args=(n * 5000,)) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    with lock:
        notes.fold()
    assert sorted(counted) == list(range(40_000))


def test_who_notes_never_waits_for_who_reads():
    """While a scrape holds the lock, notes gather; the next one folds them."""
    counted: list[int] = []
    lock = threading.Lock()
    notes: Notes[int] = Notes(counted.extend, lock)
    with lock:
        for n in range(FOLD_EVERY + 10):
            notes.add(n)
        assert counted == []
    notes.add(-1)
    assert len(counted) == FOLD_EVERY + 11
    assert repr(notes) == "<Notes 0 to fold>"
