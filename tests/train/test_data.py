"""Images in memory: what is read, skipped, hashed, split and shuffled."""

from __future__ import annotations

import logging
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.image_folder import FolderSource
from models.images import ImageSource, open_source
from models.preprocess import PreprocessSpec
from train.data import memory
from train.data.memory import (
    CHUNK_IMAGES,
    channel_statistics,
    epoch_order,
    load_images,
    sample_images,
    split_rows,
)
from train.errors import TrainError
from train.report.model import draw_sample

SPEC = PreprocessSpec(height=12, width=12, channels=1, resize=12)


def make_folder(folder: Path, *, broken: int) -> Path:
    """Write three good images a class, and some files that are none."""
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 16), (40 * i, 100, 7)).save(folder / label / f"{i}.png")
    for i in range(broken):
        (folder / "cat" / f"broken{i}.jpg").write_bytes(b"no picture")
    return folder


def test_a_source_becomes_one_array(mini_source: str) -> None:
    """Images are (N, H, W, C) uint8 in the source's order, labels are numbered by name."""
    images = load_images(open_source(mini_source), SPEC)
    assert images.images_NHWC.shape == (400, 12, 12, 1)
    assert images.images_NHWC.dtype == np.uint8
    assert images.class_names == tuple("0123456789")
    assert np.bincount(images.labels_N).tolist() == [40] * 10
    assert images.rejects == ()


def test_limit_takes_the_first_images(mini_source: str) -> None:
    """A limited set is the beginning of the whole one."""
    whole, some = (load_images(open_source(mini_source), SPEC, limit=n) for n in (None, 10))
    assert np.array_equal(some.images_NHWC, whole.images_NHWC[:10])
    assert some.sha256 != whole.sha256


def test_broken_images_are_counted_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder with broken files is brought to one size without them, and says so."""
    folder = make_folder(tmp_path / "pets", broken=2)
    with caplog.at_level(logging.WARNING, logger="horace"):
        images = load_images(open_source(f"folder:{folder}"), SPEC)
    assert len(images.images_NHWC) == 6
    assert images.class_names == ("cat", "dog")
    assert "skipped 2 images (2 " in caplog.text
    assert "the first: cat/broken0.jpg" in caplog.text
    assert [reject.key for reject in images.rejects] == ["cat/broken0.jpg", "cat/broken1.jpg"]


def test_a_source_without_usable_images_is_refused(tmp_path: Path) -> None:
    """Less than two images are nothing to learn from."""
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(TrainError, match="expected at least 2 images that can be decoded, found 0"):
        load_images(open_source(f"folder:{tmp_path}"), SPEC)


def test_what_does_not_fit_is_refused_before_it_is_read(
    mini_source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says how many images fit, how many there are, and what to change."""
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 100 * 144)
    with pytest.raises(TrainError) as error:
        load_images(open_source(mini_source), SPEC)
    assert str(error.value).endswith(
        "in memory: expected at most 40 images of 12x12 here, found 400 or more; "
        "free memory, or begin a new run with --data-in stream or a lower --image-size-px or "
        "--limit-images"
    )


def test_the_hash_knows_pixels_and_labels(tmp_path: Path) -> None:
    """Equal data have one hash; another label or pixel another."""
    hashes = []
    for name, colour, folder in (("a", 1, "x"), ("b", 1, "x"), ("c", 2, "x"), ("d", 1, "y")):
        for label, value in ((folder, colour), ("z", 9)):
            (tmp_path / name / label).mkdir(parents=True)
            Image.new("L", (12, 12), value).save(tmp_path / name / label / "0.png")
        hashes.append(load_images(open_source(f"folder:{tmp_path / name}"), SPEC).sha256)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_the_split_holds_images_out_of_training() -> None:
    """Val and train share nothing and make up all; the bank is labelled and of train."""
    labels = np.arange(1000) % 4 - 1
    split = split_rows(labels, val_images=50, bank_images=100, seed=3)
    assert len(split.val) == 50
    assert len(split.bank) == 100
    assert sorted([*split.train, *split.val]) == list(range(1000))
    assert set(split.bank) <= set(split.train)
    assert (labels[split.val] >= 0).all()
    assert (labels[split.bank] >= 0).all()
    again = split_rows(labels, val_images=50, bank_images=100, seed=3)
    other = split_rows(labels, val_images=50, bank_images=100, seed=4)
    assert np.array_equal(split.val, again.val)
    assert not np.array_equal(split.val, other.val)


def test_at_most_a_tenth_is_held_out() -> None:
    """A small set keeps nine tenths for training, whatever is asked."""
    split = split_rows(np.arange(100) % 2, val_images=5000, bank_images=5000, seed=0)
    assert (len(split.val), len(split.bank), len(split.train)) == (10, 90, 90)


@pytest.mark.parametrize("labels", [np.full(50, -1), np.zeros(50, np.int64)])
def test_without_two_classes_nothing_is_held_out(labels: np.ndarray) -> None:
    """There would be nothing to measure."""
    split = split_rows(labels, val_images=10, bank_images=10, seed=0)
    assert (len(split.val), len(split.bank), len(split.train)) == (0, 0, 50)


def test_channel_statistics_are_those_of_numpy() -> None:
    """Mean and deviation per channel over the chosen rows, beyond one chunk."""
    images = np.random.default_rng(0).integers(0, 256, (CHUNK_IMAGES + 5, 3, 2, 3), dtype=np.uint8)
    rows = np.arange(1, len(images))
    means, stds = channel_statistics(images, rows)
    assert means == pytest.approx((images[rows] / 255).mean(axis=(0, 1, 2)))
    assert stds == pytest.approx((images[rows] / 255).std(axis=(0, 1, 2)))


def test_a_channel_that_never_varies_has_a_deviation_to_divide_by() -> None:
    """One step of 255 stands in for zero."""
    _, stds = channel_statistics(np.full((4, 2, 2, 1), 9, np.uint8), np.arange(4))
    assert stds == [1 / 255]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    """Every epoch has all rows in an order of its own, the same on every call."""
    rows = np.arange(100, 200)
    first = epoch_order(rows, seed=1, epoch=0)
    assert sorted(first) == rows.tolist()
    assert np.array_equal(first, epoch_order(rows, seed=1, epoch=0))
    assert not np.array_equal(first, epoch_order(rows, seed=1, epoch=1))
    assert not np.array_equal(first, epoch_order(rows, seed=2, epoch=0))


def test_a_sample_comes_from_all_of_a_sorted_source(mini_source: str, tmp_path: Path) -> None:
    """It has no bias to the beginning, is the same each time, and goes round broken images."""
    source = open_source(mini_source)
    some, again = (sample_images(source, SPEC, 20) for _ in range(2))
    assert some.shape == (20, 12, 12, 1)
    assert np.array_equal(some, again)
    whole = load_images(source, SPEC).images_NHWC
    rows = np.sort(np.random.default_rng(0).permutation(400)[:20])
    assert np.array_equal(some, whole[rows])
    assert rows[-1] > 200
    folder = make_folder(tmp_path / "pets", broken=40)
    assert len(sample_images(open_source(f"folder:{folder}"), SPEC, 6)) == 6


def test_a_sample_of_what_is_no_picture_goes_through_the_source_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for every handful of its images, which a large folder would take hours for."""
    for i in range(100):
        (tmp_path / f"{i}.jpg").touch()
    walks, records = [], FolderSource.records
    monkeypatch.setattr(
        FolderSource, "records", lambda source: walks.append(source) or records(source)
    )
    with pytest.raises(TrainError, match="expected at least 2 images that can be decoded, found 0"):
        sample_images(open_source(f"folder:{tmp_path}"), SPEC, 4)
    assert len(walks) == 1 + 5, "to count, and for 4, 8, 16, 32 and the rest"


@pytest.mark.parametrize(
    "draw",
    [
        lambda source: sample_images(source, SPEC, 4),
        lambda source: draw_sample(source, SPEC, 4, limit=None).images_NHWC,
    ],
    ids=["views", "report"],
)
def test_a_sample_of_a_compressed_shard_leaves_the_rest_on_disk(
    draw: Callable[[ImageSource], np.ndarray], tmp_path: Path
) -> None:
    """Its records carry their bytes, so only those that are drawn are kept."""
    source, n_bytes = write_compressed(tmp_path)
    assert len(draw(source)) == 4  # what is loaded late is loaded
    assert peak_bytes(lambda: draw(source)) < n_bytes / 3


def test_a_compressed_shard_is_read_some_bytes_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand of its photographs would be gigabytes."""
    source, n_bytes = write_compressed(tmp_path)
    whole = load_images(source, SPEC)
    monkeypatch.setattr(memory, "CHUNK_BYTES", n_bytes // 10)
    assert peak_bytes(lambda: load_images(source, SPEC)) < n_bytes / 2
    assert load_images(source, SPEC).sha256 == whole.sha256


def write_compressed(folder: Path) -> tuple[ImageSource, int]:
    """Write 60 photographs as a compressed shard; give it, and how many bytes they have."""
    rng = np.random.default_rng(0)
    n_bytes = 0
    with tarfile.open(folder / "shard.tar.gz", "w:gz") as shard:
        for i in range(60):
            path = folder / f"{i:02d}.png"
            Image.fromarray(rng.integers(0, 256, (160, 160, 3), dtype=np.uint8)).save(path)
            shard.add(path, path.name)
            n_bytes += path.stat().st_size
    return open_source(f"wds:{folder / 'shard.tar.gz'}"), n_bytes


def peak_bytes(work: Callable[[], object]) -> int:
    """Give the most memory that Python had while it did something."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
