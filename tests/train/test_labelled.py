"""Labelled images: what is read, hashed and left out, and how subsets are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.bundle import Bundle
from models.encoder import Encoder
from models.images import open_source
from models.runtime import open_bundle
from train.data import memory
from train.errors import TrainError
from train.probe.few_labels import read_budget
from train.probe.labelled import (
    choose_labels,
    hold_out,
    join,
    pixel_digests,
    read_labelled,
    record_classes,
)
from train.probe.options import FinetuneOptions

Labels = st.lists(st.integers(0, 4), min_size=1, max_size=200).map(np.array)


@pytest.fixture
def encoder(make_bundle: Callable[..., Bundle]) -> Encoder:
    """A tiny encoder of 28 x 28 grey images."""
    return open_bundle(make_bundle().path, threads=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine pictures of two classes, one that is none, and three without a label."""
    rng = np.random.default_rng(0)
    for n in range(9):
        path = tmp_path / "images" / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 30), np.uint8)).save(path)
    (tmp_path / "images/a/broken.png").write_bytes(b"no image")
    for n in range(3):
        Image.fromarray(rng.integers(0, 256, (30, 30), np.uint8)).save(
            tmp_path / "images" / f"{n}.png"
        )
    return tmp_path / "images"


def test_everything_is_taken_in_one_pass(encoder: Encoder, folder: Path) -> None:
    """Features, pixels and images agree; what has no label or is no image is counted."""
    read = read_labelled(
        open_source(str(folder)),
        [encoder, encoder],
        preprocess_for=encoder,
        what="images",
        with_pixels=True,
        with_images=True,
    )
    assert (len(read), read.n_rejects, read.n_unlabelled) == (9, 1, 3)
    assert read.class_names == ("a", "b")
    assert read.images_NHWC is not None
    assert read.pixels_NP is not None
    assert read.pixels_NP.shape == (9, 784)
    np.testing.assert_array_equal(read.features[0], encoder.encode(read.images_NHWC))
    np.testing.assert_array_equal(read.features[0], read.features[1])
    assert len(set(read.digests)) == 9


def test_rows_are_numbers_of_labelled_records(encoder: Encoder, folder: Path) -> None:
    """A part that is read is that part of the whole, also around an image that is none."""
    source = open_source(str(folder))
    whole = read_labelled(source, [encoder], preprocess_for=encoder, what="images")
    class_names, labels_N = record_classes(source)
    assert class_names == ["a", "b"]
    assert len(labels_N) == 10
    np.testing.assert_array_equal(labels_N[whole.rows_N], whole.labels_N)
    wanted = np.array([0, 5, 7, 9])
    part = read_labelled(source, [encoder], preprocess_for=encoder, what="images", rows=wanted)
    places = np.searchsorted(whole.rows_N, part.rows_N)
    assert set(part.rows_N) <= set(wanted)
    np.testing.assert_array_equal(part.features[0], whole.features[0][places])


def test_a_label_of_an_image_that_is_none_is_lost(encoder: Encoder, folder: Path) -> None:
    """The next image does not take its place: each is there once, with its own label."""
    options = FinetuneOptions(run=Path("r"), images=str(folder), test="t", labels=1.0, seeds=(0,))
    budget, images, draw = read_budget(options, encoder)
    assert len(draw.by_seed[0]) == 10
    assert images.rows_N.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    labelled = budget.by_seed[0]
    assert pixel_digests(labelled.images_NHWC) == images.digests
    assert labelled.labels_N.tolist() == [0] * 5 + [1] * 4
    chosen_on = [*pixel_digests(budget.fitted.images_NHWC),
                 *pixel_digests(budget.held_out.images_NHWC)]  # fmt: skip
    assert sorted(chosen_on) == sorted(images.digests)


def test_parts_of_the_labels_share_their_images(encoder: Encoder, folder: Path) -> None:
    """Seeds, and what settings are chosen on, hold rows of one array."""
    options = FinetuneOptions(run=Path("r"), images=str(folder), test="t", labels=0.8, seeds=(0, 1))
    budget, images, _ = read_budget(options, encoder)
    for part in (*budget.by_seed.values(), budget.fitted, budget.held_out):
        assert part.pool_NHWC is images.images_NHWC
        assert len(part.images_NHWC) == len(part) < len(images)


def test_what_does_not_fit_in_memory_is_refused_before_it_is_read(
    encoder: Encoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says how many images there are, how many fit, and what to change."""
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 10 * 28 * 28)
    options = FinetuneOptions(run=Path("r"), images=str(folder), test="t", labels=1.0)
    with pytest.raises(TrainError) as error:
        read_budget(options, encoder)
    assert str(error.value).endswith(
        "in memory: expected at most 4 images of 28x28 here, found 10 (7,840 bytes); free memory, "
        "name fewer images, or ask for fewer --labels or --seeds; a linear layer without "
        "--augment keeps no images"
    )


def test_a_part_is_what_reading_it_alone_gives(encoder: Encoder, folder: Path) -> None:
    """Its hash, too; the whole is not copied."""
    source = open_source(str(folder))
    rows = np.array([0, 2, 6, 9])
    whole, alone = (
        read_labelled(
            source, [encoder], preprocess_for=encoder, what="images", class_names=("a", "b"),
            rows=chosen, with_pixels=True, with_images=True,
        )
        for chosen in (None, rows)
    )  # fmt: skip
    part = whole.take(np.flatnonzero(np.isin(whole.rows_N, rows)))
    assert (part.sha256, part.digests, part.labels) == (alone.sha256, alone.digests, alone.labels)
    for mine, other in (
        (part.labels_N, alone.labels_N), (part.rows_N, alone.rows_N),
        (part.features[0], alone.features[0]), (part.pixels_NP, alone.pixels_NP),
        (part.images_NHWC, alone.images_NHWC),
    ):  # fmt: skip
        np.testing.assert_array_equal(mine, other)
    assert whole.take(np.arange(len(whole))) is whole


def test_blocks_are_joined_in_their_order() -> None:
    """And let go, block by block."""
    blocks = [np.full((n, 2), n, np.float32) for n in (3, 1, 2)]
    expected = np.concatenate(blocks)
    np.testing.assert_array_equal(join(blocks), expected)
    assert blocks == []


def test_the_hash_is_of_pixels_and_labels(
    encoder: Encoder, folder: Path, make_bundle: Callable[..., Bundle]
) -> None:
    """The same images give the same hash; another label, pixel or size gives another."""

    def hash_of(encoder: Encoder) -> str:
        return read_labelled(
            open_source(str(folder)), [], preprocess_for=encoder, what="images"
        ).sha256

    first = hash_of(encoder)
    assert hash_of(encoder) == first
    small = open_bundle(make_bundle("small", size=20).path, threads=1)
    assert hash_of(small) != first
    (folder / "a/0.png").rename(folder / "b/00.png")
    second = hash_of(encoder)
    assert second != first
    Image.new("L", (30, 30), 3).save(folder / "b/00.png")
    assert hash_of(encoder) not in (first, second)


def test_files_that_are_no_images_are_told_of(
    encoder: Encoder, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are passed over, and nothing else would say so."""
    (folder / "a/phone.heic").touch()
    read_labelled(open_source(str(folder)), [], preprocess_for=encoder, what="images")
    assert f"folder:{folder}: 1 file passed over: 1 .heic" in caplog.messages


def test_labels_that_training_lacks_are_no_class(encoder: Encoder, folder: Path) -> None:
    """With given classes every other label is -1."""
    read = read_labelled(
        open_source(str(folder)), [], preprocess_for=encoder, what="images", class_names=("b", "c")
    )
    assert Counter(read.labels_N.tolist()) == {-1: 5, 0: 4}


def test_a_source_without_labels_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    """Nothing to learn from, said before any image is decoded."""
    Image.new("L", (30, 30)).save(tmp_path / "0.png")
    source = open_source(str(tmp_path))
    with pytest.raises(TrainError, match="expected labelled images that can be decoded, found no"):
        read_labelled(source, [], preprocess_for=encoder, what="images")
    with pytest.raises(TrainError, match=r"labels of .*: expected two classes or more, found none"):
        record_classes(source)


@given(labels_N=Labels, share=st.floats(0.01, 0.99), seed=st.integers(0, 2**31))
def test_every_class_gives_its_share(labels_N: np.ndarray, share: float, seed: int) -> None:
    """Held out and kept part the rows; no class is lost to the held-out side."""
    kept, held = hold_out(labels_N, share=share, seed=seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels_N)))
    for number in np.unique(labels_N):
        n, n_held = int((labels_N == number).sum()), int((labels_N[held] == number).sum())
        assert n_held == min(max(1, round(share * n)), n - 1)
    again, _ = hold_out(labels_N, share=share, seed=seed)
    np.testing.assert_array_equal(kept, again)


@given(labels_N=Labels, data=st.data(), balanced=st.booleans(), seed=st.integers(0, 2**31))
def test_chosen_labels_are_balanced_where_asked(
    labels_N: np.ndarray, data: st.DataObject, balanced: bool, seed: int
) -> None:
    """So many rows, each once, of those that may be chosen; classes differ by one at most."""
    rows = np.flatnonzero(np.random.default_rng(seed).random(len(labels_N)) < 0.8)
    n = data.draw(st.integers(0, len(labels_N)))
    chosen = choose_labels(labels_N, rows, n=n, balanced=balanced, seed=seed)
    assert len(chosen) == len(np.unique(chosen)) == min(n, len(rows))
    assert set(chosen) <= set(rows)
    if balanced and len(chosen):
        available = np.bincount(labels_N[rows], minlength=5)
        counts = np.bincount(labels_N[chosen], minlength=5)
        assert all(
            count == have or count >= counts.max() - 1
            for count, have in zip(counts, available, strict=True)
        )
    again = choose_labels(labels_N, rows, n=n, balanced=balanced, seed=seed)
    np.testing.assert_array_equal(chosen, again)
