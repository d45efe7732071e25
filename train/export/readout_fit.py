"""Makes the readout of one network: pools, fits the whitening, scores what each step gains.

Rules:
    Whitening is fitted on training images, never on the held-out ones that it is scored on,
    and without labels.
    The untrained twin has its own fit: it is a baseline only with the same readout.
    Scores are kNN on the run's own held-out images against its own bank, as its log has them.

Shapes: N images, D features, Q held-out images.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.command import progress
from models.preprocess import PreprocessSpec
from train.data.training_data import TrainingData, WatchedImages
from train.export.graph import EncoderGraph, run_in_batches
from train.export.held_out import is_worse
from train.export.images import read_in_chunks, spread_rows
from train.export.options import Readout
from train.export.readout import PooledReadout, WhitenedReadout
from train.export.whitening import FeatureMoments, Whitening
from train.monitor import knn_hits

log = logging.getLogger("horace")


@dataclass(frozen=True, kw_only=True)
class ReadoutScores:
    """kNN accuracy on held-out training images, 0 to 1.

    Attributes:
        plain: of the last stage, pooled whole.
        pooled: of the chosen stages and grid.
        whitened: of the same, whitened; None where nothing was.
    """

    plain: float
    pooled: float
    whitened: float | None


@dataclass(frozen=True, kw_only=True)
class FittedReadout:
    """A readout that is ready to be exported, and how it does.

    Attributes:
        module: from the stages' maps to vectors.
        dim: length of a vector.
        pooled: the part of it that comes first.
        whitening: what was fitted; None where nothing was.
        scores: None where the run held no labelled images out.
        hits_Q: (Q,) which held-out images the vectors, as they are exported, get right; None
            where there are none.
    """

    module: nn.Module
    dim: int
    pooled: PooledReadout
    whitening: Whitening | None
    scores: ReadoutScores | None
    hits_Q: NDArray[np.bool_] | None


def fit_readout(
    graph: EncoderGraph,
    readout: Readout,
    stage_dims: tuple[int, ...],
    data: TrainingData,
    spec: PreprocessSpec,
) -> FittedReadout:
    """Make and score a readout of a network, on the device that the network is on.

    Args:
        graph: the network, with any readout; its own is not used.
        readout: what to make.
        stage_dims: channels of each stage.
        data: the run's images, to fit on and to score with.
        spec: how images become the graph's input.

    Raises:
        UsageError: the network has no such stage, map or number of dimensions.
        ExportError: the features do not vary.
    """
    pooled = PooledReadout(stage_dims, stages=readout.stages, grid=readout.grid)
    blank_NHWC = np.zeros((1, spec.height, spec.width, spec.channels), np.uint8)
    next(run_in_batches(graph, lambda x: pooled(graph.maps(x)), blank_NHWC))  # are maps that large?
    whitening = None
    if readout.dim is not None:
        whitening = fit_whitening(graph, pooled, readout, data, spec)
    scores, hits_Q = None, None
    if len(data.watched.val):
        scores, hits_Q = score_readouts(
            graph, PooledReadout(stage_dims), pooled, whitening, data.watched
        )
    module = pooled if whitening is None else WhitenedReadout(pooled, whitening)
    return FittedReadout(
        module=module, dim=module.dim, pooled=pooled, whitening=whitening, scores=scores,
        hits_Q=hits_Q,
    )  # fmt: skip


def warn_if_below(
    trained_Q: NDArray[np.bool_] | None, untrained_Q: NDArray[np.bool_] | None
) -> None:
    """Say so where training has cost the encoder accuracy, and what to try.

    Args:
        trained_Q: which held-out images the trained network gets right; None without labels.
        untrained_Q: which the untrained one does.
    """
    if trained_Q is None or untrained_Q is None or not is_worse(trained_Q, untrained_Q):
        return
    log.warning(
        "kNN %.2f%% on %d held-out images is less than the %.2f%% of the untrained network: train "
        "for more --epochs, or export another readout by --readout.stages, --readout.grid "
        "and --readout.dim",
        100 * trained_Q.mean(), len(trained_Q), 100 * untrained_Q.mean(),
    )  # fmt: skip


def fit_whitening(
    graph: EncoderGraph,
    pooled: PooledReadout,
    readout: Readout,
    data: TrainingData,
    spec: PreprocessSpec,
) -> Whitening:
    """Fit the whitening of training images' pooled features, batch by batch.

    Raises:
        UsageError: there are too many features, or fewer than dimensions wanted.
        ExportError: the features do not vary.
    """
    assert readout.dim is not None
    moments = FeatureMoments(pooled.dim)
    rows = spread_rows(data.train, readout.fit_images)
    batches = (
        features_ND
        for images_NHWC in read_in_chunks(data, rows, spec)
        for features_ND in run_in_batches(graph, lambda x: pooled(graph.maps(x)), images_NHWC)
    )
    for features_ND in progress(batches, what="whitening", total=len(rows), size=len):
        moments.add(features_ND)
    log.info("finding the principal axes of %d features", pooled.dim)
    return Whitening.fit(moments, dim=readout.dim, shrinkage=readout.shrinkage)


def score_readouts(
    graph: EncoderGraph,
    plain: PooledReadout,
    pooled: PooledReadout,
    whitening: Whitening | None,
    watched: WatchedImages,
) -> tuple[ReadoutScores, NDArray[np.bool_]]:
    """Score plain pooling, the chosen pooling and its whitening on held-out images.

    Returns:
        The scores, and (Q,) which images the last of them gets right.
    """

    def both(images_NHWC: Tensor) -> tuple[Tensor, Tensor]:
        maps = graph.maps(images_NHWC)
        return plain(maps).cpu(), pooled(maps).cpu()

    def embed(rows: NDArray[np.int64], what: str) -> list[NDArray[np.float32]]:
        batches = run_in_batches(graph, both, watched.images_NHWC, rows)
        shown = progress(batches, what=what, total=len(rows), size=lambda pair: len(pair[0]))
        return [torch.cat(parts).numpy() for parts in zip(*shown, strict=True)]

    bank, queries = embed(watched.bank, "bank"), embed(watched.val, "held-out images")
    bank_labels, labels = (watched.labels_N[rows] for rows in (watched.bank, watched.val))

    def hits(bank_ND: NDArray[np.float32], queries_QD: NDArray[np.float32]) -> NDArray[np.bool_]:
        return knn_hits(bank_ND, bank_labels, queries_QD, labels)

    plain_Q, pooled_Q = (hits(*pair) for pair in zip(bank, queries, strict=True))
    whitened_Q = None if whitening is None else hits(whitening(bank[1]), whitening(queries[1]))
    scores = ReadoutScores(
        plain=float(plain_Q.mean()),
        pooled=float(pooled_Q.mean()),
        whitened=None if whitened_Q is None else float(whitened_Q.mean()),
    )
    return scores, pooled_Q if whitened_Q is None else whitened_Q
