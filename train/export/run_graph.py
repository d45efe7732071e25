"""The network of a run, trained or untrained, as the graph that is exported and probed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TypeAlias

import torch

from train.backbones import build_backbone
from train.checkpoint import Progress, checkpoint_file, last_whole_step, load_backbone
from train.config import options_from_json
from train.errors import RunError
from train.export.graph import EncoderGraph
from train.export.readout import PooledReadout
from train.run import RunConfig, RunDirectory

RunGraph: TypeAlias = tuple[EncoderGraph, tuple[int, ...], Progress]
"""A graph, the channels of its backbone's stages, and how far the run was."""


def last_checkpoint(run: RunDirectory) -> Path:
    """Find a run's last checkpoint that can be read.

    Raises:
        RunError: there is none.
    """
    if not (step := last_whole_step(run.checkpoints)):
        raise RunError(
            str(run.path),
            expected="a run with a checkpoint",
            found="none yet",
            mend="let it train on with `python -m train.pretrain --resume --out "
            f"{shlex.quote(str(run.path))}`",
        )
    return checkpoint_file(run.checkpoints, step)


def graph_of(file: Path, config: RunConfig) -> RunGraph:
    """Build the plainly pooled graph of a run with the weights of one of its files.

    Raises:
        RunError: the file is missing or damaged.
    """
    options = options_from_json(config.options)
    backbone = build_backbone(options.network, options.channels, options.image_size_px)
    progress = load_backbone(file, backbone)
    stage_dims = tuple(backbone.stage_dims)
    graph = EncoderGraph(
        backbone, PooledReadout(stage_dims), config.channel_mean, config.channel_std
    )
    return graph.to(memory_format=torch.channels_last), stage_dims, progress
