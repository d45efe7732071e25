"""What a probe trains further: the network of a run, or that of a bundle, unfolded.

Rules:
    Nothing here asks for a bundle's run: its graph has the weights, and bundle.json the rest.
    An export leaves out what its readout does not read: a bundle's network ends with the
    deepest stage that is read.
    The trained weights are read once, at the start: a run that still trains deletes its
    older checkpoints meanwhile.
    A bundle's network computes what the bundle computes, before the readout, to rounding.

Shapes: N images, H x W pixels, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from models.bundle import BUNDLE_FILE, Json, read_bundle, split_precision
from models.networks import Backbone
from train.backbones import build_backbone
from train.config import options_from_json
from train.errors import RunError
from train.export.graph import EncoderGraph
from train.export.readout import PooledReadout
from train.export.run_graph import graph_of, last_checkpoint
from train.export.unfold import channel_statistics, restore_statistics, unfold_backbone
from train.probe.opening import require_weights
from train.run import RunConfig, RunDirectory

GRAPH_SUFFIX = ".onnx"


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A network that can be trained further.

    Attributes:
        config: what it was pretrained with.
        trained: the file of its weights: a checkpoint, or a bundle's graph.
        untrained: that of the weights before the first step; None of a bundle without.
        graph: what was read of `trained`, plainly pooled, on the CPU; never trained itself.
    """

    config: RunConfig
    trained: Path
    untrained: Path | None
    graph: EncoderGraph


def read_pretrained(where: Path) -> Pretrained:
    """Find the weights of a run, or of a bundle or its fp32 encoder, and read the trained ones.

    Raises:
        BundleError: the bundle is damaged.
        RunError: no run or bundle, a run without a checkpoint, or a bundle that does not say
            what its network is.
        ExportError: the bundle's graph does not unfold.
    """
    require_weights(where)
    path, _ = split_precision(where)
    if (path / BUNDLE_FILE).is_file():
        return _of_bundle(path)
    run = RunDirectory(path=where)
    config, trained = run.read_config(), last_checkpoint(run)
    return Pretrained(
        config=config,
        trained=trained,
        untrained=run.initial_file,
        graph=load_graph(trained, config),
    )


def load_graph(
    file: Path, config: RunConfig, *, stages: Sequence[int] = (), grid: int = 1
) -> EncoderGraph:
    """Build a network with the weights of a file and a pooled readout.

    Raises:
        RunError: the file is missing or damaged.
        ExportError: it is a graph that does not unfold.
        UsageError: the network has no such stage.
    """
    if file.suffix != GRAPH_SUFFIX:
        graph, stage_dims, _ = graph_of(file, config)
        graph.readout = PooledReadout(stage_dims, stages=stages, grid=grid)
        return graph
    options = options_from_json(config.options)
    backbone = build_backbone(options.network, options.channels, options.image_size_px)
    unfold_backbone(file, backbone, config.preprocessing)
    readout = PooledReadout(backbone.stage_dims, stages=stages, grid=grid)
    return EncoderGraph(backbone, readout, config.channel_mean, config.channel_std)


def with_readout(
    pretrained: Pretrained, *, stages: Sequence[int] = (), grid: int = 1
) -> EncoderGraph:
    """Copy the trained network that was read, and give the copy a pooled readout.

    Raises:
        UsageError: the network has no such stage.
    """
    graph = copy.deepcopy(pretrained.graph)
    stage_dims = cast(Backbone, graph.backbone).stage_dims
    graph.readout = PooledReadout(stage_dims, stages=stages, grid=grid)
    return graph


def load_to_train(
    pretrained: Pretrained,
    sample_NHWC: NDArray[np.uint8],
    *,
    stages: Sequence[int] = (),
    grid: int = 1,
    is_trained: bool = True,
) -> EncoderGraph:
    """Give a network that can be trained further, with its trained or its untrained weights.

    The sample of images gives an unfolded network its BatchNorm statistics back.

    Raises:
        RunError, ExportError: the untrained weights are missing or damaged.
        UsageError: the network has no such stage.
    """
    if is_trained:
        graph = with_readout(pretrained, stages=stages, grid=grid)
    else:
        assert pretrained.untrained is not None, "the caller asks for what there is"
        graph = load_graph(pretrained.untrained, pretrained.config, stages=stages, grid=grid)
    if pretrained.trained.suffix == GRAPH_SUFFIX:
        restore_statistics(graph, sample_NHWC)
    return graph


def _of_bundle(path: Path) -> Pretrained:
    """Read what a bundle's network was pretrained with from its provenance."""
    bundle = read_bundle(path)
    mean, std = channel_statistics(bundle.encoder_path)
    try:
        options = cast(Mapping[str, Json], bundle.provenance["options"])
        readout = cast(Mapping[str, list[int]], bundle.provenance["readout"])
        config = RunConfig(
            options={**options, "network.stages": max(readout["stages"])},
            data=cast(Mapping[str, Json], bundle.provenance["data"]),
            preprocessing=bundle.preprocessing,
            channel_mean=mean,
            channel_std=std,
            command=cast(str, bundle.provenance["command"]),
            environment={"versions": bundle.provenance["versions"]},
        )
    except KeyError as error:
        raise RunError(
            str(path),
            expected="a bundle that `train.export` wrote of a run",
            found=f"none of {error} in its provenance",
            mend="give the run that it was exported from",
        ) from error
    return Pretrained(
        config=config,
        trained=bundle.encoder_path,
        untrained=bundle.random_path,
        graph=load_graph(bundle.encoder_path, config),
    )
