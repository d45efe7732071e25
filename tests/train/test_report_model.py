"""What a report computes: C in blocks, the spectrum of eval mode, and honest neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.images import ImageData, ImageRecord
from models.preprocess import PreprocessSpec
from train.diagnostics import standardise
from train.errors import TrainError
from train.report.figures import correlation_colours
from train.report.model import (
    N_NEIGHBOURS,
    N_QUERIES,
    WHOLE_PX,
    ZOOM_DIMS,
    Sample,
    choose_queries,
    draw_sample,
    search,
    summarise_correlation,
)

SPEC = PreprocessSpec(height=8, width=8, channels=1, resize=8)


class Records:
    """A source of images that are their own number; every third is broken."""

    uri = "numbers"

    def __init__(self, n: int) -> None:
        self._n = n

    def count(self) -> int:
        """How many there are."""
        return self._n

    def records(self, start: int = 0) -> list[ImageRecord]:
        """All of them."""
        return [self._record(i) for i in range(start, self._n)]

    def load(self, key: str) -> ImageData:
        """One of them."""
        return self._record(int(key)).read()

    def _record(self, i: int) -> ImageRecord:
        data = b"broken" if i % 3 == 2 else np.full((8, 8), i, np.uint8)
        return ImageRecord(str(i), f"class {i % 2}", lambda: data)


@pytest.mark.parametrize("dim", [5, ZOOM_DIMS, 3 * WHOLE_PX - 7])
def test_c_is_that_of_the_whole_matrix(dim: int) -> None:
    """The zoom is its corner, and each pixel of the whole the largest |C| of a block."""
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(40, dim, generator=generator)
    z2 = z1 + torch.randn(40, dim, generator=generator)
    c = (standardise(z1).T @ standardise(z2) / 40).numpy()
    summary = summarise_correlation(z1, z2)
    assert (summary.images, summary.dims) == (40, dim)
    np.testing.assert_allclose(summary.zoom, c[:ZOOM_DIMS, :ZOOM_DIMS], atol=1e-5)
    side = -(-dim // WHOLE_PX)
    assert summary.whole.shape == (-(-dim // side),) * 2
    assert max(summary.whole.shape) <= WHOLE_PX
    assert summary.whole[0, 0] == pytest.approx(np.abs(c[:side, :side]).max(), rel=1e-4)
    start = (summary.whole.shape[0] - 1) * side
    assert summary.whole[-1, -1] == pytest.approx(np.abs(c[start:, start:]).max(), rel=1e-4)
    assert summary.diagonal_mean == pytest.approx(np.diag(c).mean(), rel=1e-4)


def test_a_search_finds_others_best_first() -> None:
    """An image is no neighbour of itself, not even where another is its equal."""
    features = np.array([[1, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    first, second = search(features, [0, 1])
    assert (first.query, first.neighbours) == (0, [1, 2, 3])
    assert second.neighbours == [0, 2, 3]
    np.testing.assert_allclose(first.cosines, [1, 0.5**0.5, 0], atol=1e-6)


def test_a_search_gives_so_many_at_most() -> None:
    """Of many images the nearest few."""
    features = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert {len(one.neighbours) for one in search(features, [3, 4])} == {N_NEIGHBOURS}


def test_queries_are_of_many_classes() -> None:
    """Every class has its turn before one comes again; without labels the first are taken."""
    images = np.zeros((20, 2, 2, 1), np.uint8)
    keys = [str(i) for i in range(20)]
    labels: list[str | None] = ["a"] * 10 + ["b"] * 8 + ["c"] * 2
    sample = Sample(images_NHWC=images, labels=labels, keys=keys)
    assert choose_queries(sample) == [0, 10, 18, 1, 11, 19]
    unlabelled = Sample(images_NHWC=images, labels=[None] * 20, keys=keys)
    assert choose_queries(unlabelled) == list(range(N_QUERIES))


def test_a_sample_is_always_the_same_and_leaves_out_what_is_broken() -> None:
    """Images keep their labels and keys, in the order of the source."""
    sample = draw_sample(Records(60), SPEC, 30, limit=None)
    again = draw_sample(Records(60), SPEC, 30, limit=None)
    rows = [int(key) for key in sample.keys]
    assert rows == sorted(rows)
    assert again.keys == sample.keys
    assert not any(row % 3 == 2 for row in rows)
    assert sample.images_NHWC[:, 0, 0, 0].tolist() == rows
    assert sample.labels == [f"class {row % 2}" for row in rows]
    limited = draw_sample(Records(60), SPEC, 30, limit=9)
    assert [int(key) for key in limited.keys] == [0, 1, 3, 4, 6, 7]


def test_a_source_without_images_is_refused() -> None:
    """One line says so."""
    with pytest.raises(TrainError) as error:
        draw_sample(Records(1), SPEC, 30, limit=None)
    assert str(error.value) == "numbers: expected at least 2 usable images, found 1"


def test_correlations_are_clear_at_zero_and_full_at_one() -> None:
    """The opacity is the size, the colour the sign, so that any ground shows through zeros."""
    colours = correlation_colours(np.array([[0.0, 1.0], [-1.0, -0.5]], np.float32))
    assert colours[..., 3].tolist() == [[0, 255], [255, 128]]
    assert (colours[0, 1, :3] != colours[1, 0, :3]).any()
    assert (colours[1, 0, :3] == colours[1, 1, :3]).all()


def test_correlations_of_a_diverged_run_are_clear() -> None:
    """NaN has no sign and no size, and is no reason for a warning."""
    assert correlation_colours(np.array([[np.nan, 1.0]], np.float32))[..., 3].tolist() == [[0, 255]]
