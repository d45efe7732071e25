"""The monitor: right figures, and no trace left in what it watches."""

from __future__ import annotations

import numpy as np
import torch

from models.networks import BarlowTwins, ResNet
from train.monitor import COLLAPSE_SPREAD, FEATURE_BATCH, embed, knn_accuracy, pixels, spread
from train.views import Normaliser


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
    finally:
        torch.set_num_threads(before)


def test_pixels_are_rows_of_values() -> None:
    """The baseline's vectors are the images themselves."""
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    assert pixels(images, np.array([2])).tolist() == [[8, 9, 10, 11]]


def test_spread_tells_noise_from_collapse() -> None:
    """Isotropic features have 1, equal ones 0, whatever their scale."""
    noise = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert abs(spread(100 * noise) - 1) < 0.02
    assert spread(torch.ones(64, 8) + 1e-4 * noise[:64, :8]) < COLLAPSE_SPREAD
