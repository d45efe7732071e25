"""Batches from memory: the same images whatever the ranks, and wherever a run goes on."""

from __future__ import annotations

from contextlib import closing
from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.data.batches import MemorySource, Plan, rank_slice

IMAGES_NHWC = np.arange(23 * 4, dtype=np.uint8).reshape(23, 2, 2, 1)
ROWS = np.arange(1, 23)


def make_source(*, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> MemorySource:
    """All images but the first, whose first pixels are four times their rows."""
    plan = Plan(rows=ROWS, batch_size=batch_size, seed=seed, rank=rank, world=world)
    return MemorySource(IMAGES_NHWC, plan)


def rows_of(source: MemorySource, first_step: int, total_steps: int) -> list[list[int]]:
    """The rows of some steps, by the images that were given."""
    rows = []
    with closing(source):
        for batch in source.batches(first_step, total_steps):
            assert batch.images_NHWC is not None
            rows.append((batch.images_NHWC[:, 0, 0, 0] // 4).tolist())
    return rows


@given(world=st.sampled_from([1, 2, 3, 6]), first=st.integers(0, 7), seed=st.integers(0, 9))
def test_ranks_share_each_batch_in_order(world: int, first: int, seed: int) -> None:
    """The slices of all ranks, one after the other, are the batch of one process."""
    whole = make_source(batch_size=6, seed=seed)
    slices = [make_source(batch_size=6, seed=seed, rank=rank, world=world) for rank in range(world)]
    shared = zip(*(rows_of(source, first, 8) for source in slices), strict=True)
    assert [list(chain(*parts)) for parts in shared] == rows_of(whole, first, 8)


@given(first=st.integers(0, 9))
def test_a_source_goes_on_from_any_step(first: int) -> None:
    """What comes from a step on does not depend on what was given before."""
    source = make_source(batch_size=5, seed=3)
    assert rows_of(source, first, 9) == rows_of(source, 0, 9)[first:]


def test_an_epoch_has_no_image_twice_and_drops_the_rest() -> None:
    """Of 22 rows in batches of 5, four batches an epoch, in another order each time."""
    source = make_source(batch_size=5, seed=0)
    assert source.steps_per_epoch == 4
    first, second = (list(chain(*rows_of(source, start, start + 4))) for start in (0, 4))
    assert len(set(first)) == len(set(second)) == 20
    assert set(first) <= set(ROWS.tolist())
    assert first != second


def test_a_batch_holds_the_pixels_of_its_rows() -> None:
    """Images, step and rows belong together."""
    plan = Plan(rows=ROWS, batch_size=4, seed=0)
    ((step, rows),) = plan.steps(2, 3)
    (batch,) = MemorySource(IMAGES_NHWC, plan).batches(2, 3)
    assert batch.step == step == 2
    assert batch.views is None
    np.testing.assert_array_equal(batch.images_NHWC, IMAGES_NHWC[rows])


def test_a_ranks_share_is_equal() -> None:
    """Three ranks have thirds."""
    assert [rank_slice(12, rank, 3) for rank in range(3)] == [
        slice(0, 4), slice(4, 8), slice(8, 12)
    ]  # fmt: skip
