"""`python -m train.export RUN`: make a bundle of a run, or fail saying why it would not do.

The backbone of the last checkpoint becomes `encoder.onnx` and the backbone before the first
step `random.onnx`. The graph is then opened as a server would open it and compared with
torch on the run's own images; only a graph that passes becomes a bundle.

torch is imported after parsing, since it takes seconds to load and `--help` should not.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import tyro
from numpy.typing import NDArray

from models.bundle import ENCODER_FILE, RANDOM_FILE, Bundle, Json, OutputSpec, write_bundle
from models.command import run_command
from models.images import open_source
from train.errors import RunError
from train.run import RunConfig, RunDirectory, describe_environment

if TYPE_CHECKING:
    from train.checkpoint import Progress
    from train.graph import EncoderGraph
    from train.parity import Parity

PARITY_IMAGES = 512
"""Images that the graph is compared with torch on; all, where the run has fewer."""

INVARIANCE_IMAGES = 64
"""Images that are embedded alone and in batches of every size."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Export a run's encoder as a bundle, which serve and index read without torch."""

    run: tyro.conf.Positional[Path]
    """Run directory of `train.pretrain`."""

    out: Path | None = None
    """Bundle to write; artifacts/bundles/NAME after the run where not given."""

    name: str | None = None
    """What the bundle is called; the name of its directory where not given."""

    random_twin: bool = True
    """Also write the network before its first step, the baseline of evaluations."""

    replace: bool = False
    """Replace an existing bundle."""

    json: bool = False
    """Print the summary as JSON."""

    @property
    def bundle_path(self) -> Path:
        """The bundle to write."""
        return self.out or Path("artifacts/bundles") / self.run.resolve().name


def main(options: ExportOptions) -> None:
    """Export, check, write, and print what came of it."""
    bundle = export_run(
        RunDirectory(path=options.run),
        options.bundle_path,
        name=options.name or options.bundle_path.resolve().name,
        with_random_twin=options.random_twin,
        replace=options.replace,
    )
    summary = summarise(bundle)
    print(json.dumps(summary, indent=2) if options.json else _summary_text(summary))


def export_run(
    run: RunDirectory, out: Path, *, name: str, with_random_twin: bool = True, replace: bool = False
) -> Bundle:
    """Make a bundle of a run's last checkpoint.

    Args:
        run: a run with at least one checkpoint.
        out: the bundle's directory.
        name: what the bundle is called.
        with_random_twin: whether to add the untrained network.
        replace: whether an existing bundle may be replaced.

    Raises:
        RunError: the run is missing or damaged.
        SourceError: the run's images are not where they were.
        ExportError: the graph is not the network, or depends on the batch.
        BundleError: `out` exists and may not be replaced.
    """
    from train.graph import write_onnx

    config = run.read_config()
    images_NHWC = read_images(config)
    with tempfile.TemporaryDirectory() as folder:
        graph, progress = trained_graph(run, config)
        files = {ENCODER_FILE: Path(folder) / ENCODER_FILE}
        write_onnx(graph, config.preprocessing, files[ENCODER_FILE])
        if with_random_twin:
            files[RANDOM_FILE] = Path(folder) / RANDOM_FILE
            write_onnx(untrained_graph(run, config), config.preprocessing, files[RANDOM_FILE])
        parity = check_graph(files[ENCODER_FILE], graph, config, images_NHWC)
        return write_bundle(
            out,
            name=name,
            files=files,
            preprocessing=config.preprocessing,
            output=OutputSpec(dim=cast(int, graph.readout.dim)),
            provenance=describe_provenance(run, config, progress, parity),
            replace=replace,
        )


def check_graph(
    file: Path, graph: EncoderGraph, config: RunConfig, images_NHWC: NDArray[np.uint8]
) -> Parity:
    """Open a graph as a server would, and hold it against torch and against itself.

    Raises:
        ExportError: it falls short of a threshold of `train.parity`.
        EncoderError: ONNX Runtime refuses it.
    """
    from models.runtime import open_bundle
    from train.graph import embed_with_torch
    from train.parity import measure_parity, require_batch_invariance, require_parity

    with tempfile.TemporaryDirectory() as folder:
        draft = write_bundle(
            Path(folder) / "draft",
            name="draft",
            files={ENCODER_FILE: file},
            preprocessing=config.preprocessing,
            output=OutputSpec(dim=cast(int, graph.readout.dim)),
            provenance={},
        )
        encoder = open_bundle(draft.path)
        try:
            parity = measure_parity(
                embed_with_torch(graph, images_NHWC), encoder.encode(images_NHWC)
            )
            require_parity(parity)
            require_batch_invariance(encoder.encode, images_NHWC[:INVARIANCE_IMAGES])
            return parity
        finally:
            encoder.close()


def read_images(config: RunConfig) -> NDArray[np.uint8]:
    """Read the first images of the run's own data, as (N, H, W, C) uint8."""
    from train.data import load_images

    limit = cast(int | None, config.options["limit_images"]) or PARITY_IMAGES
    source = open_source(cast(str, config.data["uri"]))
    return load_images(source, config.preprocessing, limit=min(limit, PARITY_IMAGES)).images_NHWC


def trained_graph(run: RunDirectory, config: RunConfig) -> tuple[EncoderGraph, Progress]:
    """Build the graph of a run's last checkpoint.

    Raises:
        RunError: there is none, or it is damaged.
    """
    from train.checkpoint import list_checkpoints

    checkpoints = list_checkpoints(run.checkpoints)
    if not checkpoints:
        raise RunError(
            str(run.path),
            expected="a run with a checkpoint",
            found="none yet",
            mend="let it train on with `python -m train.pretrain SOURCE --resume`",
        )
    return _graph_of(checkpoints[-1], config)


def untrained_graph(run: RunDirectory, config: RunConfig) -> EncoderGraph:
    """Build the graph of a run before its first step."""
    return _graph_of(run.initial_file, config)[0]


def describe_provenance(
    run: RunDirectory, config: RunConfig, progress: Progress, parity: Parity
) -> dict[str, Json]:
    """Say where an encoder comes from, how it was checked, and how good it looked."""
    from train.checkpoint import list_checkpoints
    from train.log import read_log
    from train.monitor import KNN_K, KNN_TEMPERATURE

    options, data = config.options, config.data
    batch_size = cast(int, options["batch_size"])
    steps_per_epoch = cast(int, data["train_images"]) // batch_size
    training: dict[str, Json] = {
        "steps": progress.step,
        "epochs": progress.step / steps_per_epoch,
        "epochs_planned": options["epochs"],
        "images_seen": progress.step * batch_size,
        "elapsed_s": round(progress.elapsed_s, 1),
        "hardware": config.environment["hardware"],
        "checkpoint": list_checkpoints(run.checkpoints)[-1].name,
    }
    records = [r for r in read_log(run.log_file) if r["step"] <= progress.step]
    measured: dict[str, Json] = {}
    for record in records:
        measured |= {k: v for k, v in record.items() if k.startswith("knn_")}
    validation: dict[str, Json] = {
        "split": "held out of the training images; no test image was seen",
        "queries": data["val_images"],
        "bank": data["bank_images"],
        "k": KNN_K,
        "temperature": KNN_TEMPERATURE,
        **measured,
    }
    return {
        "command": config.command,
        "export_command": shlex.join(["python", "-m", "train.export", *sys.argv[1:]]),
        "seed": options["seed"],
        "data": dict(data),
        "options": dict(options),
        "training": training,
        "validation": validation if measured else None,
        "parity": cast(dict[str, Json], asdict(parity)),
        "versions": describe_environment()["versions"],
    }


def summarise(bundle: Bundle) -> dict[str, Json]:
    """Give what a person wants to know of a new bundle."""
    parity = cast(dict[str, Json], bundle.provenance["parity"])
    return {
        "bundle": str(bundle.path),
        "name": bundle.name,
        "dim": bundle.dim,
        "size_bytes": bundle.encoder_path.stat().st_size,
        "parity": parity,
        "fingerprint": bundle.fingerprint,
    }


def _graph_of(file: Path, config: RunConfig) -> tuple[EncoderGraph, Progress]:
    """Build the graph with the weights of one file."""
    from models.networks import GlobalPoolReadout, ResNet
    from train.checkpoint import load_backbone
    from train.graph import EncoderGraph

    options = config.options
    backbone = ResNet(
        layout=cast(str, options["network.layout"]),
        width=cast(int, options["network.width"]),
        in_channels=cast(int, options["channels"]),
        stem=cast(str, options["network.stem"]),
    )
    progress = load_backbone(file, backbone)
    readout = GlobalPoolReadout(backbone.stage_dims)
    return EncoderGraph(backbone, readout, config.channel_mean, config.channel_std), progress


def _summary_text(summary: Mapping[str, Json]) -> str:
    """Lay the summary out in lines."""
    parity = cast(dict[str, float], summary["parity"])
    lines = {
        "bundle": f"{summary['bundle']} ({summary['name']})",
        "dim": str(summary["dim"]),
        "size": f"{cast(int, summary['size_bytes']) / 1e6:.2f} MB",
        "parity": f"least cosine {parity['min_cosine']:.6f}, neighbour overlap "
        f"{parity['overlap']:.4f}, over {parity['images']} images",
        "fingerprint": str(summary["fingerprint"]),
    }
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())


if __name__ == "__main__":
    sys.exit(run_command(ExportOptions, main, prog="python -m train.export"))
