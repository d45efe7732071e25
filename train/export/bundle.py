"""Makes a bundle of a run: graphs, precisions, scores and provenance, in one step or not at all.

Rules:
    Whether the bundle may and can be written is found out before the work.
    Only graphs that pass every check become a bundle.
    Weights are read before the images: a run that trains on deletes its older checkpoints.
"""

from __future__ import annotations

import logging
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from models.bundle import (
    ENCODER_FILE,
    RANDOM_FILE,
    Bundle,
    Json,
    OutputSpec,
    Precision,
    refuse_foreign_target,
    write_bundle,
)
from train.checkpoint import Progress
from train.data.training_data import TrainingData
from train.errors import writing
from train.export.images import load_run_images, spread_rows
from train.export.options import ReadoutOptions
from train.export.precisions import CALIBRATION_IMAGES, score_precisions, write_precisions
from train.export.provenance import describe_readout, describe_run, describe_validation
from train.export.readout_fit import warn_if_below
from train.export.run_graph import graph_of, last_checkpoint
from train.export.write_graph import PARITY_IMAGES, WrittenGraph, write_graph
from train.run import RunConfig, RunDirectory

log = logging.getLogger("horace")


def export_run(
    run: RunDirectory,
    out: Path,
    *,
    name: str,
    source: str | None = None,
    readout: ReadoutOptions | None = None,
    precisions: Sequence[Precision] = (),
    with_random_twin: bool = True,
    replace: bool = False,
) -> Bundle:
    """Make a bundle of a run's last checkpoint.

    Args:
        run: a run with at least one checkpoint.
        out: the bundle's directory.
        name: what the bundle is called.
        source: where the run's images are now; where they were if None.
        readout: how vectors are made; as usual for the run's preset where None.
        precisions: what else to write than fp32.
        with_random_twin: whether to add the untrained network.
        replace: whether an existing bundle may be replaced.

    Raises:
        RunError: the run is missing or damaged, its images have changed, or `out` cannot be
            written.
        SourceError: the run's images are not there.
        UsageError: the network has no such readout.
        ExportError: the graph is not the network, or depends on the batch.
        BundleError: `out` exists and may not be replaced.
    """
    config, checkpoint = run.read_config(), last_checkpoint(run)
    chosen = (readout or ReadoutOptions()).resolve(config.options)
    room = f"make room, in {tempfile.gettempdir()} (TMPDIR), too, or choose another --out"
    with writing(out, mend=room):
        check_target(out, replace=replace)
        networks = {ENCODER_FILE: graph_of(checkpoint, config)}
        warn_if_unfinished(run, config, networks[ENCODER_FILE][-1])
        if with_random_twin:
            networks[RANDOM_FILE] = graph_of(run.initial_file, config)
        data = load_run_images(run, config, source)
        with tempfile.TemporaryDirectory() as folder:
            graphs = {
                file_name: write_graph(network, config, chosen, data, Path(folder) / file_name)
                for file_name, network in networks.items()
            }
            if with_random_twin:
                warn_if_below(*(graph.fitted.hits_Q for graph in graphs.values()))
            files = {file_name: graph.file for file_name, graph in graphs.items()}
            scores: dict[str, Json] = {}
            if precisions:
                more, scores = add_precisions(graphs[ENCODER_FILE], precisions, config, data)
                files |= more
            return write_bundle(
                out,
                name=name,
                files=files,
                preprocessing=config.preprocessing,
                output=OutputSpec(dim=graphs[ENCODER_FILE].fitted.dim),
                provenance={
                    **describe_export(run, config, checkpoint, graphs),
                    "precisions": scores,
                },
                replace=replace,
            )


def add_precisions(
    graph: WrittenGraph, precisions: Sequence[Precision], config: RunConfig, data: TrainingData
) -> tuple[dict[str, Path], dict[str, Json]]:
    """Write an encoder in other precisions, and score them all.

    Returns:
        The files by their name in the bundle, and the scores by precision.

    Raises:
        ExportError: ONNX Runtime cannot quantise the graph, or what came of it depends on
            the batch.
    """
    spec = config.preprocessing
    calibration_NHWC = data.read(spread_rows(data.train, CALIBRATION_IMAGES), spec)
    files = write_precisions(graph.file, precisions, calibration_NHWC)
    with tempfile.TemporaryDirectory() as folder:
        draft = write_bundle(
            Path(folder) / "draft",
            name="draft",
            files={ENCODER_FILE: graph.file, **files},
            preprocessing=spec,
            output=OutputSpec(dim=graph.fitted.dim),
            provenance={},
        )
        compared_NHWC = data.read(spread_rows(data.train, PARITY_IMAGES), spec)
        return files, score_precisions(draft, data.watched, compared_NHWC)


def describe_export(
    run: RunDirectory,
    config: RunConfig,
    checkpoint: Path,
    graphs: Mapping[str, WrittenGraph],
) -> dict[str, Json]:
    """Say where the graphs come from, how they read the maps out, and how good they look."""
    trained, untrained = graphs[ENCODER_FILE], graphs.get(RANDOM_FILE)
    return {
        **describe_run(run, config, checkpoint.name, trained.progress),
        "readout": describe_readout(trained.fitted),
        "validation": describe_validation(
            run, config, trained.progress, trained.fitted, untrained.fitted if untrained else None
        ),
        "parity": cast(dict[str, Json], asdict(trained.parity)),
    }


def warn_if_unfinished(run: RunDirectory, config: RunConfig, progress: Progress) -> None:
    """Say so where the weights are not those of the run's last step."""
    if progress.step < config.total_steps:
        log.warning(
            "%s has taken %d of %d steps, and the encoder is what it was then: the way on is "
            "`python -m train.pretrain --resume --out %s`",
            run.path, progress.step, config.total_steps, shlex.quote(str(run.path)),
        )  # fmt: skip


def check_target(out: Path, *, replace: bool) -> None:
    """Find out before the work whether the bundle may and can be written.

    Raises:
        BundleError: what is there may not be replaced.
        OSError: nothing can be written there.
    """
    refuse_foreign_target(out, replace=replace)
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()
