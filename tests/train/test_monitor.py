"""The monitor: right figures, and no trace left in what it watches."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.networks import BarlowTwins, ResNet
from train.data.training_data import WatchedImages
from train.diagnostics import embedding_diagnostics
from train.monitor import (
    FEATURE_BATCH,
    HealthWatch,
    embed,
    knn_accuracy,
    pixel_accuracy,
    pixels,
)
from train.views import Normaliser
from train.watch import Watch


def make_network() -> BarlowTwins:
    """A small network in training mode."""
    torch.manual_seed(0)
    return BarlowTwins(ResNet(layout="resnet10", width=4, in_channels=1), (8, 8)).train()


def test_embedding_leaves_the_training_as_it_was() -> None:
    """Mode, BatchNorm statistics and random numbers are untouched; features are of eval mode."""
    network = make_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    images = np.random.default_rng(0).integers(0, 256, (FEATURE_BATCH + 3, 8, 8, 1), dtype=np.uint8)
    normaliser = Normaliser(mean=torch.zeros(1, 1, 1), std=torch.ones(1, 1, 1))
    rows = np.arange(1, len(images))
    features = embed(network, images, rows, normaliser.to_input)
    assert network.training
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    with torch.inference_mode():
        alone = network.eval()(normaliser.to_input(torch.from_numpy(images[-1:])))[0]
    np.testing.assert_allclose(features[-1], alone[0], rtol=1e-4, atol=1e-5)
    assert features.shape == (len(rows), network.readout.dim)


def test_large_images_are_embedded_few_at_a_time() -> None:
    """Else they take more memory than the batches that are learnt from."""
    sizes: list[int] = []

    def to_input(images_NHWC: Tensor) -> Tensor:
        sizes.append(len(images_NHWC))
        return images_NHWC[:, :8, :8].permute(0, 3, 1, 2).float()

    images = np.broadcast_to(np.uint8(0), (5, 1500, 1500, 1))
    assert embed(make_network(), images, np.arange(5), to_input).shape == (5, 32)
    assert sizes == [1] * 5
    sizes.clear()
    embed(make_network(), images[:, :1024, :1024], np.arange(5), to_input)
    assert sizes == [4, 1]


def test_knn_accuracy_counts_the_right_ones() -> None:
    """Queries beside their class are right, one beside another class is wrong."""
    bank = np.repeat(np.eye(3, dtype=np.float32), 30, axis=0)
    labels = np.repeat(np.arange(3), 30)
    queries = np.array([[9, 1, 0], [0, 2, 0.1], [0, 0.1, 1], [1, 0, 0]], np.float32)
    assert knn_accuracy(bank, labels, queries, np.array([0, 1, 2, 2])) == 0.75


def test_knn_accuracy_takes_a_bank_of_less_than_twenty() -> None:
    """All of a small bank votes."""
    bank = np.array([[1, 0], [0, 1]], np.float32)
    assert knn_accuracy(bank, np.array([0, 1]), bank, np.array([0, 1])) == 1.0


def test_knn_leaves_torch_its_threads() -> None:
    """The search runs on torch's own thread count: faiss sets it for both."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        bank = np.eye(4, dtype=np.float32)
        knn_accuracy(bank, np.arange(4), bank, np.arange(4))
        assert torch.get_num_threads() == 1
        pixel_accuracy(bank.astype(np.uint8), np.arange(4), bank.astype(np.uint8), np.arange(4))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_pixels_are_rows_of_values() -> None:
    """The baseline's vectors are the images themselves, averaged down where they are large."""
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    assert pixels(images, np.array([2])).tolist() == [[8, 9, 10, 11]]
    large = np.full((FEATURE_BATCH + 1, 64, 96, 3), 7, np.uint8)
    reduced = pixels(large, np.arange(len(large)))
    assert (reduced.shape, reduced.dtype) == ((len(large), 32 * 32 * 3), np.uint8)
    assert (reduced == 7).all()


@pytest.mark.parametrize("side_px", [28, 32])
def test_small_images_are_compared_pixel_by_pixel(side_px: int) -> None:
    """Their figure is that of their own values as vectors."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, side_px, side_px, 1), dtype=np.uint8)
    labels = rng.integers(0, 3, 300)
    val, bank = np.arange(100), np.arange(100, 300)
    vectors = images.reshape(300, -1).astype(np.float32)
    expected = knn_accuracy(vectors[bank], labels[bank], vectors[val], labels[val])
    assert 0 < expected < 1
    assert expected == pixel_accuracy(
        pixels(images, bank), labels[bank], pixels(images, val), labels[val]
    )


class Brightness(nn.Module):
    """A backbone of one feature and a constant."""

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor]:
        """Give the mean of each image."""
        means_N = images_NCHW.mean(dim=(1, 2, 3))
        return (torch.stack([means_N, torch.ones_like(means_N)], dim=1),)


def test_the_baselines_of_large_images_are_bounded_in_memory() -> None:
    """Raw pixels take no multiple of the images that are watched."""
    images = np.random.default_rng(0).integers(0, 256, (60, 224, 224, 3), dtype=np.uint8)
    watched_images = WatchedImages(
        images_NHWC=images, labels_N=np.arange(60) % 2, val=np.arange(20), bank=np.arange(20, 60)
    )
    watch = Watch(watched_images, lambda x: x[:, :8, :8].permute(0, 3, 1, 2) / 255, every_epochs=1)
    tracemalloc.start()
    try:
        figures = watch.baselines(Brightness(), is_untrained=False)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert figures.keys() == {"knn_pixels", "knn_start"}
    assert peak_bytes < 2 * images.nbytes


HEALTHY = {"loss": 100.0, "spread": 0.6, "rankme": 40.0, "rankme_limit": 128.0}


def watched(records: Iterable[Mapping[str, float | None]]) -> list[str]:
    """All that a watch says of some records."""
    watch = HealthWatch()
    return [text for record in records for text in watch.warnings_in_words(record)]


def test_a_healthy_training_is_left_in_peace() -> None:
    """A falling loss, live features and records of other things give no word."""
    records = [HEALTHY | {"loss": 100.0 / (i + 1)} for i in range(30)]
    assert watched([{"knn_top1": 0.1}, *records, {"loss": None}]) == []


def test_collapse_is_said_at_once_and_once() -> None:
    """Features that are all alike give one line, with advice."""
    features, z = torch.ones(32, 4), torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    record = {"loss": 5.0} | embedding_diagnostics(features, z, z)
    first, *rest = watched([record] * 2)
    assert first.startswith("the features of all images are nearly equal (spread 0.0000")
    assert "the encoder has collapsed; lower --lr-peak or raise --batch-size" in first
    assert rest == []


def test_a_low_rank_is_said_when_it_stays() -> None:
    """One step may pass through a low rank; three records in a row are dimensional collapse."""
    low = HEALTHY | {"rankme": 3.0}
    assert watched([low, low, HEALTHY, low, low]) == []
    (text,) = watched([low] * 5)
    assert text.startswith("the features fill about 3.0 of 128 directions (RankMe)")
    assert "dimensional collapse; lower --lr-peak" in text
    (text,) = watched([{"loss": 1.0, "z_rankme": 4.0, "z_rankme_limit": 128.0}] * 4)
    assert text.startswith("the embeddings fill about 4.0 of 128 directions")
    assert "raise --loss.lambd" in text


def test_dead_dimensions_are_said() -> None:
    """Their share, and of what."""
    (text,) = watched([HEALTHY | {"dead_share": 0.25}] * 3)
    assert text.startswith("25% of the dimensions of the features are the same for all images")
    (text,) = watched([HEALTHY | {"z_dead_share": 0.5}] * 3)
    assert text.startswith("50% of the dimensions of the embeddings")


def test_a_loss_that_stands_is_said_after_twenty_records() -> None:
    """Noise around one height is no fall; a shorter history is left its time."""
    records = [{"loss": 100.0 + i % 5} for i in range(25)]
    assert watched(records[:19]) == []
    (text,) = watched(records)
    assert text.startswith("the loss does not fall: 102 after 20 records, 102 at first; raise")


def test_a_loss_that_rises_is_said() -> None:
    """A loss that doubles after its lowest has diverged."""
    losses = [100.0, 50, 30, *(20.0 for _ in range(17)), 30, 50, 60, 70, 80, 90]
    (text,) = watched([{"loss": loss} for loss in losses])
    assert text.startswith("the loss rises: ")
    assert "the training diverges; lower --lr-peak" in text


def test_a_loss_below_zero_is_judged_by_how_it_moves() -> None:
    """A cross-entropy falls through zero: that is no sign, but a rise or a standstill is."""
    falling = [{"loss": 4.0 - i} for i in range(40)]
    assert watched(falling) == []
    noisy = [{"loss": -10.0 - 0.3 * i + (-1) ** i} for i in range(40)]
    assert watched(noisy) == []
    rising = [{"loss": loss} for loss in (*np.linspace(-5, -20, 20), *np.linspace(-19, 0, 20))]
    (text,) = watched(rising)
    assert text.startswith("the loss rises: ")
    (text,) = watched([{"loss": -100.0 + i % 5} for i in range(25)])
    assert text.startswith("the loss does not fall: -98 after 20 records, -98 at first; raise")


def test_what_was_said_before_a_resume_is_not_said_again() -> None:
    """The records of earlier sittings are known."""
    low = HEALTHY | {"rankme": 3.0}
    assert HealthWatch([low] * 3).warnings_in_words(low) == []
    assert len(HealthWatch([low] * 2).warnings_in_words(low)) == 1
