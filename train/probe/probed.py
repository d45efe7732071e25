"""Opens what a probe judges: a bundle, a run, or a served encoder, and its untrained twin.

Rules:
    Whatever is opened is frozen: in eval mode, so that BatchNorm's statistics neither drift
    nor depend on the batch.
    The twin has the same network and readout, with the weights before the first step.

A bundle's readout is part of its graph. Of a run it is chosen here, without whitening, which
is fitted at export: a linear layer can undo it, but for what its regularisation weighs.

Shapes: N images, H x W pixels, C channels, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from models.bundle import Json
from models.encoder import Encoder, open_encoder
from models.errors import UsageError
from models.files import sha256_file
from models.preprocess import PreprocessSpec, check_batch, preprocess
from models.providers import ON_CPU, split_placement
from models.runtime import open_random_twin
from train.export.graph import EncoderGraph, run_in_batches
from train.probe.pretrained import Pretrained, load_graph, read_pretrained, with_readout
from train.run import RunDirectory


class RunEncoder:
    """A run's network as an `Encoder`, frozen, on a device.

    Attributes:
        graph: normalisation, backbone and readout.
        fingerprint: SHA-256 of the file of weights; that of a bundle says more.
    """

    def __init__(
        self,
        graph: EncoderGraph,
        *,
        name: str,
        fingerprint: str,
        preprocessing: PreprocessSpec,
        device: torch.device,
    ) -> None:
        self.graph = graph.to(device).eval()
        self.name, self.fingerprint, self.preprocessing = name, fingerprint, preprocessing
        self.device = device

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return cast(int, self.graph.readout.dim)

    def preprocess(self, data: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Decode and fit one image to (H, W, C) uint8.

        Raises:
            ImageError: this image cannot be used.
        """
        return preprocess(data, self.preprocessing)

    def encode(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed (N, H, W, C) uint8 as (N, D) float32; N may be 0.

        Raises:
            EncoderError: the shape or dtype is wrong.
        """
        check_batch(images_NHWC, self.preprocessing)
        blocks = [np.empty((0, self.dim), np.float32)]
        for vectors_ND in run_in_batches(self.graph, self.graph, images_NHWC):
            blocks.append(vectors_ND.cpu().numpy())
        return np.concatenate(blocks)

    def close(self) -> None:
        """Drop the network."""
        del self.graph


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What is judged.

    Attributes:
        encoder: the trained one.
        twin: the untrained one; None where there is none.
        bundle: its directory, where it is one.
        run: the same, of a run.
        pretrained: of a run, the very weights that `encoder` has, to be trained further.
        description: what it is, for a report.
    """

    encoder: Encoder
    twin: Encoder | None
    bundle: Path | None
    run: RunDirectory | None
    pretrained: Pretrained | None
    description: dict[str, Json]

    def close(self) -> None:
        """Close both."""
        self.encoder.close()
        if self.twin is not None:
            self.twin.close()


def is_run(where: str) -> bool:
    """Say whether this names a run directory, and not a bundle or a server."""
    return "://" not in where and RunDirectory(path=Path(where)).config_file.is_file()


def open_probed(
    where: str, *, stages: Sequence[int] = (), grid: int = 1, device: torch.device, threads: int
) -> Probed:
    """Open a bundle's directory, a run's, or a URI.

    Args:
        where: any of them.
        stages: of a run's network, from 1; the last where empty.
        grid: cells a side that each stage's map of a run is pooled to.
        device: where a run's network computes.
        threads: of ONNX Runtime.

    Raises:
        BundleError, EncoderError: no sound bundle, or no answer.
        RunError: the run has no checkpoint, or is damaged.
        UsageError: the run's network has no such stage.
    """
    if is_run(where):
        return _open_run(RunDirectory(path=Path(where)), stages, grid, device)
    path, placement = split_placement(where)
    if is_run(path):
        raise UsageError(
            "encoder", expected=f"{path} alone, and --device", found=where.removeprefix(path)
        )
    bundle = None if "://" in path else Path(path)
    encoder = open_encoder(where, threads=threads)
    twin = None
    if bundle is not None:
        twin = open_random_twin(bundle, threads=threads, placement=placement or ON_CPU)
    description: dict[str, Json] = {
        "kind": "server" if bundle is None else "bundle",
        "name": encoder.name,
        "fingerprint": encoder.fingerprint,
        "dim": encoder.dim,
    }
    return Probed(
        encoder=encoder, twin=twin, bundle=bundle, run=None, pretrained=None,
        description=description,
    )  # fmt: skip


def _open_run(run: RunDirectory, stages: Sequence[int], grid: int, device: torch.device) -> Probed:
    """Open a run's last checkpoint, and its initial weights as the twin."""
    pretrained = read_pretrained(run.path)
    config, initial = pretrained.config, run.initial_file
    graphs = {
        pretrained.trained: with_readout(pretrained, stages=stages, grid=grid),
        initial: load_graph(initial, config, stages=stages, grid=grid),
    }
    encoder, twin = (
        RunEncoder(
            graph,
            name=run.path.resolve().name,
            fingerprint=sha256_file(file),
            preprocessing=config.preprocessing,
            device=device,
        )
        for file, graph in graphs.items()
    )
    description: dict[str, Json] = {
        "kind": "run",
        "name": encoder.name,
        "fingerprint": encoder.fingerprint,
        "checkpoint": pretrained.trained.name,
        "stages": list(stages),
        "grid": grid,
        "dim": encoder.dim,
    }
    return Probed(
        encoder=encoder, twin=twin, bundle=None, run=run, pretrained=pretrained,
        description=description,
    )  # fmt: skip
