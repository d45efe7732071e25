"""Writes one network of a run as an ONNX file, and holds the file against torch and itself.

Rules:
    A file is opened as a server would open it, before it becomes part of any bundle.
    What is compared are the run's own images.
"""

from __future__ import annotations

import logging
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from models.bundle import ENCODER_FILE, OutputSpec, write_bundle
from models.runtime import open_bundle
from train.checkpoint import Progress
from train.data.training_data import TrainingData
from train.device import images_at_once, resolve_compute
from train.export.graph import EMBED_BATCH, EncoderGraph, embed_with_torch, write_onnx
from train.export.images import spread_rows
from train.export.options import Readout
from train.export.parity import (
    Parity,
    measure_parity,
    require_batch_invariance,
    require_finite_network,
    require_parity,
)
from train.export.readout_fit import FittedReadout, fit_readout
from train.export.run_graph import RunGraph
from train.run import RunConfig

PARITY_IMAGES = 512
"""Images that the graph is compared with torch on; all, where the run has fewer."""

INVARIANCE_IMAGES = 64
"""Images that are embedded alone and in batches of every size."""

log = logging.getLogger("horace")


@dataclass(frozen=True, kw_only=True)
class WrittenGraph:
    """One network as an ONNX file that has been checked.

    Attributes:
        file: where it lies.
        progress: how far the run was with these weights.
        fitted: its readout.
        parity: with torch.
    """

    file: Path
    progress: Progress
    fitted: FittedReadout
    parity: Parity


def write_graph(
    network: RunGraph, config: RunConfig, readout: Readout, data: TrainingData, file: Path
) -> WrittenGraph:
    """Fit the readout of a network, write it as ONNX, and check it.

    Raises:
        UsageError: the network has no such readout.
        ExportError: torch cannot express it, or it falls short of `train.export.parity`.
    """
    graph, stage_dims, progress = network
    graph.to(resolve_compute("auto", "fp32").device)
    fitted = fit_readout(graph, readout, stage_dims, data, config.preprocessing)
    graph.readout = fitted.module
    log.info("writing %s", file.name)
    write_onnx(graph.cpu(), config.preprocessing, file)
    log.info("comparing %s with torch, and every image alone with itself in batches", file.name)
    images_NHWC = data.read(spread_rows(data.train, PARITY_IMAGES), config.preprocessing)
    return WrittenGraph(
        file=file,
        progress=progress,
        fitted=fitted,
        parity=check_graph(file, graph, config, images_NHWC),
    )


def check_graph(
    file: Path, graph: EncoderGraph, config: RunConfig, images_NHWC: NDArray[np.uint8]
) -> Parity:
    """Open a graph as a server would, and hold it against torch and against itself.

    Raises:
        ExportError: it falls short of a threshold of `train.export.parity`, or the network's
            own vectors are not finite.
        EncoderError: ONNX Runtime refuses it.
    """
    reference_ND = embed_with_torch(graph, images_NHWC)
    require_finite_network(reference_ND)
    with tempfile.TemporaryDirectory() as folder:
        draft = write_bundle(
            Path(folder) / "draft",
            name="draft",
            files={ENCODER_FILE: file},
            preprocessing=config.preprocessing,
            output=OutputSpec(dim=cast(int, graph.readout.dim)),
            provenance={},
        )
        with closing(open_bundle(draft.path)) as encoder:
            step = images_at_once(EMBED_BATCH, *images_NHWC.shape[1:3])
            starts = range(0, len(images_NHWC), step)
            found = [encoder.encode(images_NHWC[i : i + step]) for i in starts]
            parity = measure_parity(reference_ND, np.concatenate(found))
            require_parity(parity)
            require_batch_invariance(encoder.encode, images_NHWC[:INVARIANCE_IMAGES])
            return parity
