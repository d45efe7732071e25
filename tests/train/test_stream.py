"""Streamed batches: the same whatever the threads, ranks and starts; full in spite of damage."""

from __future__ import annotations

import errno
import os
import tarfile
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from index.embed import Reject
from models.errors import ImageError, ImageFault
from models.images import ImageData, ImageRecord, open_source
from train.data import reading
from train.data.batches import Batch, Pixels, Plan
from train.data.catalogue import Catalogue, list_images
from train.data.rejects import Rejects
from train.data.stream import PREFETCH_BATCHES, MakeViews, StreamSource
from train.errors import TrainError
from train.views.crops import CutCrops

CROPS = CutCrops(((0.3, 1.0), (0.3, 1.0)), height=8, width=8, channels=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 40 noisy JPEGs."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 256, (20 + i % 5, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.jpg")
    return folder


def numbered(n: int, broken: Iterable[int] = ()) -> Catalogue:
    """Make a catalogue of images that are their own row's number, some of which are damaged."""

    def reader(row: int) -> ImageData:
        if row in broken:
            raise ImageError(ImageFault.CORRUPT, f"image {row}")
        return np.full((2, 2), row, np.uint8)

    records = [ImageRecord(f"{i:03d}", None, lambda i=i: reader(i)) for i in range(n)]
    return Catalogue(records=records, labels_N=np.full(n, -1), class_names=(), sha256="")


def as_it_is(data: ImageData, generator: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Give the image as view 1, and its random numbers as view 2."""
    assert not isinstance(data, bytes)
    return data, generator.integers(0, 256, (2, 2), dtype=np.uint8)


def streamed(
    catalogue: Catalogue,
    make_views: MakeViews = as_it_is,
    *,
    rows: Sequence[int] | None = None,
    rejects: Rejects | None = None,
    first_step: int = 0,
    total_steps: int = 12,
    batch_size: int = 8,
    workers: int = 2,
    rank: int = 0,
    world: int = 1,
) -> list[Batch]:
    """Give the batches of a stream."""
    n = len(catalogue.records)
    plan = Plan(
        rows=np.arange(n) if rows is None else np.array(rows),
        batch_size=batch_size,
        seed=3,
        rank=rank,
        world=world,
    )
    rejects = Rejects("x", n) if rejects is None else rejects
    with closing(StreamSource(catalogue, plan, make_views, rejects, workers=workers)) as source:
        return list(source.batches(first_step, total_steps))


def rows_of(batch: Batch) -> list[int]:
    """Which of the `numbered` images are in a batch, by view 1."""
    assert batch.views is not None
    rows: list[int] = batch.views[0][:, 0, 0].tolist()
    return rows


def same(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    """Compare batches to the bit."""
    return len(one) == len(other) and all(
        a.step == b.step and np.array_equal(np.stack(a.views or ()), np.stack(b.views or ()))
        for a, b in zip(one, other, strict=True)
    )


def test_batches_do_not_depend_on_the_threads(folder: Path) -> None:
    """Real photographs, one thread and five: equal to the bit."""
    catalogue = list_images(open_source(f"folder:{folder}"))
    one, five = (streamed(catalogue, CROPS, workers=n) for n in (1, 5))
    assert same(one, five)
    assert [batch.step for batch in one] == list(range(12))
    views = one[0].views
    assert views is not None
    assert views[0].shape == (8, 8, 8, 3)
    assert views[0].dtype == np.uint8
    assert not np.array_equal(*views)
    assert one[0].images_NHWC is None


@pytest.mark.parametrize("broken", [(), (4, 5, 17)])
def test_a_stream_goes_on_from_any_step(broken: tuple[int, ...]) -> None:
    """Also over the end of an epoch, and without knowing yet what is damaged."""
    whole = streamed(numbered(40, broken))
    for first_step in (1, 4, 5, 11, 12):
        part = streamed(numbered(40, broken), first_step=first_step)
        assert same(part, whole[first_step:])


def test_an_epoch_takes_each_image_once() -> None:
    """But for those that fill no batch; the next epoch has another order and other views."""
    batches = streamed(numbered(43), batch_size=8, total_steps=10)
    rows = [rows_of(batch) for batch in batches]
    first, second = list(chain(*rows[:5])), list(chain(*rows[5:]))
    assert len(set(first)) == len(set(second)) == 40
    assert first != second
    random = np.concatenate([batch.views[1].reshape(8, 4) for batch in batches if batch.views])
    assert len(np.unique(random, axis=0)) == 80


def test_the_ranks_share_the_batch_of_one_process() -> None:
    """In the order of the ranks, damaged images and all."""
    whole = streamed(numbered(40, (7, 8)))
    parts = [streamed(numbered(40, (7, 8)), rank=rank, world=4) for rank in range(4)]
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        for view in (0, 1):
            joined = np.concatenate([s.views[view] for s in shares if s.views])
            assert batch.views is not None
            assert np.array_equal(batch.views[view], joined)


def test_the_next_usable_image_stands_in_for_a_damaged_one() -> None:
    """Of those to learn from, with views of its own; the damaged one is counted once."""
    rejects = Rejects("x", 40)
    rows = [row for row in range(40) if row != 6]  # which is held out
    batches = streamed(numbered(40, (5, 39)), rows=rows, rejects=rejects, batch_size=39)
    sound = streamed(numbered(40), rows=rows, batch_size=39)
    assert [reject.key for reject in rejects.all()] == ["005", "039"]
    for batch, wanted in zip(batches, sound, strict=True):
        stand_ins = {5: 7, 39: 0}
        assert rows_of(batch) == [stand_ins.get(row, row) for row in rows_of(wanted)]
        assert batch.views is not None
        assert wanted.views is not None
        assert np.array_equal(batch.views[1], wanted.views[1])
        doubles = batch.views[1][np.array(rows_of(batch)) == 7]
        assert len(doubles) == 2
        assert not np.array_equal(*doubles)


def test_a_sound_image_outlives_a_damaged_one_of_its_name() -> None:
    """A shard may name two alike: what a batch holds depends on no other that was read before."""
    alike = of_one_name(numbered(40, broken=(5,)))
    whole = streamed(alike)
    for first_step in (3, 11):
        assert same(streamed(alike, first_step=first_step), whole[first_step:])


def of_one_name(catalogue: Catalogue) -> Catalogue:
    """Call all images alike."""
    records = [replace(record, key="same") for record in catalogue.records]
    return replace(catalogue, records=records)


def test_damaged_images_of_one_name_are_counted_each() -> None:
    """Else a source of which most are damaged would not be refused, as it is in memory."""
    with pytest.raises(TrainError, match="found 21 of 40 that are not; the last: same"):
        streamed(of_one_name(numbered(40, range(21))))


def test_what_was_found_damaged_before_is_not_read_again() -> None:
    """As by a stream's first sample, which reads images as they will be served."""
    rejects = Rejects("x", 40)
    rejects.add(5, Reject(key="005", fault="corrupt", message="damaged"))
    (batch, *_) = streamed(numbered(40), rejects=rejects, batch_size=40)
    assert 5 not in rows_of(batch)
    assert len(rejects) == 1


def test_a_stream_of_mostly_damaged_images_is_refused() -> None:
    """As soon as that is known, from whichever thread."""
    with pytest.raises(TrainError, match="found 21 of 40 that are not; the last: 0"):
        streamed(numbered(40, range(21)))


class Storage:
    """Opens files, but for the first so many times: then it gives an error.

    Args:
        monkeypatch: puts it in the place of `Path.open`.
        fault: the number of the error.
        times: how often it fails; always where None.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: int, times: int | None) -> None:
        self.fault, self.opened, self.failures = fault, Path.open, times
        monkeypatch.setattr(Path, "open", lambda *args, **more: self.open(*args, **more))

    def open(self, path: Path, *args: object, **more: object) -> object:
        """Fail, or open the file."""
        if self.failures is None or self.failures > 0:
            if self.failures is not None:
                self.failures -= 1
            raise OSError(self.fault, os.strerror(self.fault), str(path))
        return self.opened(path, *args, **more)  # type: ignore[call-overload]  # as it came


def pictures(folder: Path, tmp_path: Path, kind: str) -> Catalogue:
    """List the JPEGs of a folder, there or in a tar."""
    if kind == "folder":
        return list_images(open_source(f"folder:{folder}"))
    with tarfile.open(tmp_path / "photographs.tar", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    return list_images(open_source(f"wds:{tmp_path / 'photographs.tar'}"))


@pytest.mark.parametrize("kind", ["folder", "wds"])
def test_storage_that_fails_for_a_moment_changes_no_batch(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image is read at the second try, in this epoch, and is there in the next."""
    catalogue = pictures(folder, tmp_path, kind)
    sound = streamed(catalogue, CROPS)
    monkeypatch.setattr(reading, "WAITS_S", (0.0,))
    storage = Storage(monkeypatch, errno.EIO, times=1)
    rejects = Rejects("x", 40)
    assert same(streamed(catalogue, CROPS, rejects=rejects), sound)
    assert storage.failures == 0
    assert len(rejects) == 0


@pytest.mark.parametrize("kind", ["folder", "wds"])
def test_storage_that_goes_on_failing_ends_the_run(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it said; no image is to blame."""
    catalogue = pictures(folder, tmp_path, kind)
    monkeypatch.setattr(reading, "WAITS_S", (0.0, 0.0))
    Storage(monkeypatch, errno.ESTALE, times=None)
    rejects = Rejects("x", 40)
    with pytest.raises(
        TrainError, match=r"jpg: expected storage that works, found Stale file handle, 3 times in 0"
    ):
        streamed(catalogue, CROPS, rejects=rejects)
    assert len(rejects) == 0


def test_a_file_that_is_gone_is_not_waited_for(folder: Path, tmp_path: Path) -> None:
    """It is the image that is missing, not the storage."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    catalogue = list_images(open_source(f"folder:{tmp_path}"))
    (tmp_path / "07.jpg").unlink()
    rejects = Rejects("x", 40)
    streamed(catalogue, CROPS, rejects=rejects)
    assert [reject.key for reject in rejects.all()] == ["07.jpg"]


def test_no_more_than_some_batches_are_read_ahead() -> None:
    """And none before the first is asked for; closing leaves no thread behind."""
    begun = threading.Semaphore(0)
    count = 0
    lock = threading.Lock()

    def count_views(data: ImageData, generator: np.random.Generator) -> tuple[Pixels, Pixels]:
        nonlocal count
        with lock:
            count += 1
        begun.release()
        return as_it_is(data, generator)

    before = set(threading.enumerate())
    plan = Plan(rows=np.arange(80), batch_size=8, seed=0)
    source = StreamSource(numbered(80), plan, count_views, Rejects("x", 80), workers=3)
    with closing(source):
        batches = source.batches(0, 1000)
        assert count == 0
        next(batches)
        for _ in range((1 + PREFETCH_BATCHES) * 8):
            assert begun.acquire(timeout=20)
        next(batches)
        for _ in range(8):
            assert begun.acquire(timeout=20)
        assert count == (2 + PREFETCH_BATCHES) * 8
    assert not set(threading.enumerate()) - before
