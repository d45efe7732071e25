"""Smoothing over neighbours: against the sums written out, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from index.knn import knn_search
from models.networks import ResNet
from models.vectors import finish_vectors
from train.export.graph import EncoderGraph
from train.export.readout import PooledReadout
from train.probe.smoothing import STEPS, smooth, whitened_vectors


def test_it_is_the_mean_over_neighbours_again_and_again() -> None:
    """Against a matrix that has 1/J where one image is a neighbour of another."""
    rng = np.random.default_rng(0)
    vectors_NK = finish_vectors(rng.normal(size=(30, 5)).astype(np.float32))
    scores_NC = rng.dirichlet((1, 1, 1), 30).astype(np.float32)
    similarities_NN = vectors_NK @ vectors_NK.T
    np.fill_diagonal(similarities_NN, -2)
    mean_NN = np.zeros((30, 30))
    np.put_along_axis(mean_NN, np.argsort(-similarities_NN, axis=1)[:, :4], 0.25, axis=1)
    expected_NC = scores_NC.astype(np.float64)
    for _ in range(STEPS):
        expected_NC = 0.6 * mean_NN @ expected_NC + 0.4 * scores_NC
    found_NC = smooth(scores_NC, vectors_NK, neighbours=4, share=0.6)
    np.testing.assert_allclose(found_NC, expected_NC, rtol=1e-5)
    np.testing.assert_allclose(found_NC.sum(axis=1), 1, rtol=1e-5)


def test_an_error_among_those_who_know_better_is_outvoted() -> None:
    """Two groups: whoever contradicts its own group is corrected."""
    rng = np.random.default_rng(0)
    truth_N = np.arange(60) % 2
    vectors_NK = finish_vectors((np.eye(2)[truth_N] + rng.normal(0, 0.1, (60, 2))).astype("f4"))
    said_NC = np.where(np.eye(2)[truth_N], 0.7, 0.3).astype(np.float32)
    said_NC[:6] = said_NC[:6, ::-1]
    assert (said_NC.argmax(axis=1) == truth_N).mean() == 0.9
    smoothed_NC = smooth(said_NC, vectors_NK, neighbours=8, share=0.7)
    assert (smoothed_NC.argmax(axis=1) == truth_N).all()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_equal_images_and_few_of_them_are_no_trouble(n: int) -> None:
    """Where an image is crowded out of its own neighbours, or has none, all still sums to 1."""
    vectors_NK = np.ones((n, 1), np.float32)
    _, rows_NJ = knn_search(vectors_NK, vectors_NK, 2)
    assert n < 3 or (rows_NJ[-1] != n - 1).all()  # crowded out
    scores_NC = np.tile(np.float32([0.25, 0.75]), (n, 1))
    np.testing.assert_allclose(smooth(scores_NC, vectors_NK, neighbours=1, share=0.9), scores_NC)
    assert smooth(scores_NC, vectors_NK, neighbours=1, share=0) is scores_NC


def test_vectors_are_whitened_and_of_unit_length() -> None:
    """As many as images, of the network in eval mode, without its mean."""
    torch.manual_seed(0)
    backbone = ResNet(layout="resnet10", width=8, in_channels=1, zero_init_residual=False)
    graph = EncoderGraph(backbone, PooledReadout(backbone.stage_dims), (0.5,), (0.25,))
    images_NHWC = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1)).astype(np.uint8)
    vectors_NK = whitened_vectors(graph, images_NHWC)
    assert vectors_NK.shape == (300, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors_NK, axis=1), 1, rtol=1e-5)
    assert np.abs(vectors_NK.mean(axis=0)).max() < 0.05
