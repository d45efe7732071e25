"""One face for images in memory and streamed: choice, split, statistics, damage, a whole run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.images import ImageData, open_source
from models.preprocess import PreprocessSpec, preprocess
from train.config import PretrainOptions
from train.data import memory, training_data
from train.data.batches import Pixels
from train.data.catalogue import list_images
from train.data.memory import split_rows
from train.data.training_data import (
    TrainingData,
    choose_data_in,
    open_training_data,
    watched_counts,
)
from train.errors import TrainError
from train.views.crops import CutCrops

SPEC = PreprocessSpec(height=12, width=12, channels=3, resize=12)
CROPS = CutCrops(((0.5, 1.0), (0.5, 1.0)), height=12, width=12, channels=3)


def write_photographs(folder: Path, *, broken: int = 0) -> Path:
    """Write 60 noisy PNGs of two classes, of which the first so many are damaged."""
    rng = np.random.default_rng(0)
    for i in range(60):
        path = folder / ("cat" if i % 2 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 4 * i + 10, (20, 16 + i % 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        if i < broken:
            path.write_bytes(path.read_bytes()[:100])
    return folder


def opened(folder: Path, **changes: object) -> TrainingData:
    """Open a folder for training."""
    values: dict[str, object] = {
        "data_in": "auto", "limit_images": None, "val_images": 5, "bank_images": 20, "seed": 1
    }  # fmt: skip
    source = open_source(f"folder:{folder}")
    return open_training_data(source, SPEC, **(values | changes))  # type: ignore[arg-type]  # cases


def test_what_fits_is_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what does not is streamed, where it is left to Horace."""
    write_photographs(tmp_path)
    assert opened(tmp_path).data_in == "memory"
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 20 * 12 * 12 * 3)
    assert opened(tmp_path).data_in == "stream"
    assert opened(tmp_path, limit_images=8).data_in == "memory"
    source = open_source(f"folder:{tmp_path}")
    assert choose_data_in(source, SPEC, 8, processes=2) == "stream", "each holds its own"
    with pytest.raises(TrainError, match="found 60 or more; free memory, or begin a new run"):
        opened(tmp_path, data_in="memory")


def test_both_ways_split_and_watch_alike(tmp_path: Path) -> None:
    """Rows, labels and pixels of what is watched are the same, and the statistics."""
    write_photographs(tmp_path)
    memory, stream = (opened(tmp_path, data_in=where) for where in ("memory", "stream"))
    assert np.array_equal(memory.train, stream.train)
    assert memory.class_names == stream.class_names == ("cat", "dog")
    assert memory.images == stream.images == 60
    for part in ("val", "bank"):
        rows, others = getattr(memory.watched, part), getattr(stream.watched, part)
        assert len(rows) == {"val": 5, "bank": 20}[part]
        for name in ("images_NHWC", "labels_N"):
            one, other = getattr(memory.watched, name), getattr(stream.watched, name)
            assert np.array_equal(one[rows], other[others])
    assert stream.channel_mean == pytest.approx(memory.channel_mean)
    assert stream.channel_std == pytest.approx(memory.channel_std)
    assert memory.sha256 != stream.sha256
    rows = stream.train[[3, 1]]
    assert np.array_equal(memory.read(rows, SPEC), stream.read(rows, SPEC))


def test_each_gives_its_batches(tmp_path: Path) -> None:
    """Images in memory, views from a stream; of the same rows."""

    def whole(data: ImageData, generator: np.random.Generator) -> tuple[Pixels, Pixels]:
        fitted = preprocess(data, SPEC)
        return fitted, 255 - fitted

    write_photographs(tmp_path)
    batches = []
    for where in ("memory", "stream"):
        source = opened(tmp_path, data_in=where).batch_source(
            whole, batch_size=10, seed=4, workers=2
        )
        with closing(source):
            assert source.steps_per_epoch == 5
            (batch,) = source.batches(7, 8)
            batches.append(batch)
    memory, stream = batches
    assert memory.images_NHWC is not None
    assert memory.images_NHWC.shape == (10, 12, 12, 3)
    assert stream.views is not None
    assert np.array_equal(stream.views[0], memory.images_NHWC)
    assert np.array_equal(stream.views[1], 255 - memory.images_NHWC)


def test_less_than_a_batch_is_refused(tmp_path: Path) -> None:
    """With what there is."""
    data = opened(write_photographs(tmp_path), data_in="stream")
    with pytest.raises(TrainError, match="expected at least one batch of 56, found 55; lower"):
        data.batch_source(CROPS, batch_size=56, seed=0, workers=1)


def test_damaged_images_are_not_watched(tmp_path: Path) -> None:
    """They are counted where they are met, and the others keep their labels."""
    write_photographs(tmp_path, broken=20)
    data = opened(tmp_path, data_in="stream")
    assert data.rejects.faults() == {"corrupt": 20}  # the sample for statistics is everything
    watched = data.watched
    assert 20 > len(watched.bank) > 5
    assert len(watched.labels_N) == len(watched.images_NHWC) == len(watched.val) + len(watched.bank)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
    pictures = {}
    for name in names:
        if int(Path(name).stem) >= 20:
            pictures[preprocess((tmp_path / name).read_bytes(), SPEC).tobytes()] = name[:3]
    for image, label in zip(watched.images_NHWC, watched.labels_N, strict=True):
        assert pictures[image.tobytes()] == data.class_names[label]


@pytest.mark.parametrize(("broken", "last"), [(60, "cat/59.png"), (45, "dog/12.png")])
def test_a_source_of_damaged_images_is_refused_at_the_start(
    tmp_path: Path, broken: int, last: str
) -> None:
    """As soon as more than half are known, by the sample that the statistics are taken of."""
    write_photographs(tmp_path, broken=broken)
    with pytest.raises(TrainError) as error:
        opened(tmp_path, data_in="stream")
    assert str(error.value).startswith(
        f"folder:{tmp_path}: expected at least half of its images to be usable, "
        f"found 28 of 55 that are not; the last: {last}: PNG image: expected a whole one, found "
    )
    assert str(error.value).endswith("; check that the path names whole images")


@pytest.mark.parametrize("data_in", ["memory", "stream"])
def test_half_of_a_source_may_be_damaged_and_no_more(tmp_path: Path, data_in: str) -> None:
    """However its images are held."""
    unlabelled = {"data_in": data_in, "val_images": 0}
    half = opened(write_photographs(tmp_path / "half", broken=30), **unlabelled)
    assert len(half.rejects) == 30
    with pytest.raises(
        TrainError, match="at least half of its images to be usable, found 31 of 60 that are not"
    ):
        opened(write_photographs(tmp_path / "more", broken=31), **unlabelled)


def test_without_a_bank_nothing_is_watched(tmp_path: Path) -> None:
    """Where the images that held-out ones are compared with are all damaged."""
    catalogue = list_images(open_source(f"folder:{write_photographs(tmp_path)}"))
    split = split_rows(catalogue.labels_N, val_images=5, bank_images=1, seed=1)
    (in_bank,) = split.bank
    (tmp_path / catalogue.records[in_bank].key).write_bytes(b"damaged")
    watched = opened(tmp_path, data_in="stream", bank_images=1).watched
    assert (len(watched.val), len(watched.bank)) == (0, 0)


def test_damage_in_one_place_is_judged_by_the_whole_source(tmp_path: Path) -> None:
    """An export reads a stream in chunks: one may be of a damaged folder, or of one image."""
    data = opened(write_photographs(tmp_path, broken=20), data_in="stream", val_images=0)
    assert len(data.read(np.arange(15), SPEC)) == 5, "the first ten cats are damaged"
    assert data.read(np.arange(1), SPEC).shape == (0, 12, 12, 3)


def test_one_image_is_no_data_set(tmp_path: Path) -> None:
    """There would be nothing to tell apart."""
    with pytest.raises(TrainError, match="expected at least 2 images, found 1; check the path"):
        opened(write_photographs(tmp_path), data_in="stream", limit_images=1)


def test_what_is_watched_is_bounded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of the memory for images held out; what fits is left as it is asked for."""
    monkeypatch.setattr(training_data, "MONITOR_BYTES", 300 * 12 * 12 * 3)
    with caplog.at_level(logging.INFO, logger="horace"):
        assert watched_counts(SPEC, 80, 220) == (80, 220)
        assert not caplog.text
        assert watched_counts(SPEC, 5000, 10_000) == (100, 200)
    assert "kNN accuracy is measured on 100 images against 200" in caplog.text


def test_a_run_on_a_stream_keeps_what_it_skipped(
    tmp_path: Path, run_options: Callable[..., PretrainOptions]
) -> None:
    """From the files to the last checkpoint, with the images that were left out beside it."""
    from train.loop import pretrain

    source = f"folder:{write_photographs(tmp_path / 'photographs', broken=7)}"
    out = tmp_path / "run"
    pretrain(
        run_options(
            out, source=source, channels=3, epochs=2, batch_size=16, data_in="stream", workers=2
        )
    )
    assert list((out / "checkpoints").iterdir())
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [reject["fault"] for reject in rejects] == ["corrupt"] * 7
    assert json.loads((out / "config.json").read_text())["options"]["data_in"] == "stream"
