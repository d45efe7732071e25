"""`python -m train.export RUN`: make a bundle of a run, or fail saying why it would not do.

The backbone of the last checkpoint becomes `encoder.onnx` and the backbone before the first
step `random.onnx`. The graph is then opened as a server would open it and compared with
torch on the run's own images, the untrained one as well; only graphs that pass become a
bundle.

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
from typing import TYPE_CHECKING, Annotated, cast

import numpy as np
import tyro
from numpy.typing import NDArray

from models.bundle import (
    BUNDLE_FILE,
    ENCODER_FILE,
    RANDOM_FILE,
    Bundle,
    Json,
    OutputSpec,
    write_bundle,
)
from models.command import run_command
from models.errors import BundleError
from models.images import open_source
from train.config import options_from_json
from train.errors import RunError, training_packages, writing
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

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
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
    with training_packages():
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
        RunError: the run is missing or damaged, or `out` cannot be written.
        SourceError: the run's images are not where they were.
        ExportError: the graph is not the network, or depends on the batch.
        BundleError: `out` exists and may not be replaced.
    """
    from train.graph import write_onnx

    config, checkpoint = run.read_config(), last_checkpoint(run)
    with writing(out, mend="make room or choose another --out"):
        check_target(out, replace=replace)
        images_NHWC = read_images(config)
        with tempfile.TemporaryDirectory() as folder:
            graph, progress = graph_of(checkpoint, config)
            graphs = {ENCODER_FILE: graph}
            if with_random_twin:
                graphs[RANDOM_FILE] = graph_of(run.initial_file, config)[0]
            files = {name: Path(folder) / name for name in graphs}
            parities = {}
            for file_name, file in files.items():
                write_onnx(graphs[file_name], config.preprocessing, file)
                parities[file_name] = check_graph(file, graphs[file_name], config, images_NHWC)
            provenance = describe_provenance(run, config, checkpoint.name, progress)
            parity = cast(dict[str, Json], asdict(parities[ENCODER_FILE]))
            return write_bundle(
                out,
                name=name,
                files=files,
                preprocessing=config.preprocessing,
                output=OutputSpec(dim=cast(int, graph.readout.dim)),
                provenance={**provenance, "parity": parity},
                replace=replace,
            )


def check_target(out: Path, *, replace: bool) -> None:
    """Find out before the work whether the bundle may and can be written.

    Raises:
        BundleError: there is a bundle that may not be replaced.
        OSError: nothing can be written there.
    """
    if (out / BUNDLE_FILE).is_file() and not replace:
        raise BundleError(
            str(out),
            expected="a new directory",
            found="a bundle",
            mend="choose another name, or replace it with --replace",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()


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
    """Read images from all over the run's own data, as (N, H, W, C) uint8."""
    from train.data import sample_images

    limit = cast(int | None, config.options["limit_images"])
    source = open_source(cast(str, config.data["uri"]))
    return sample_images(source, config.preprocessing, PARITY_IMAGES, limit=limit)


def last_checkpoint(run: RunDirectory) -> Path:
    """Find a run's last checkpoint.

    Raises:
        RunError: there is none.
    """
    from train.checkpoint import list_checkpoints

    checkpoints = list_checkpoints(run.checkpoints)
    if not checkpoints:
        raise RunError(
            str(run.path),
            expected="a run with a checkpoint",
            found="none yet",
            mend=f"let it train on with `python -m train.pretrain --resume --out {run.path}`",
        )
    return checkpoints[-1]


def graph_of(file: Path, config: RunConfig) -> tuple[EncoderGraph, Progress]:
    """Build the graph of a run with the weights of one of its files.

    Raises:
        RunError: the file is missing or damaged.
    """
    from models.networks import GlobalPoolReadout
    from train.checkpoint import load_backbone
    from train.graph import EncoderGraph
    from train.trainer import build_backbone

    backbone = build_backbone(options_from_json(config.options))
    progress = load_backbone(file, backbone)
    readout = GlobalPoolReadout(backbone.stage_dims)
    return EncoderGraph(backbone, readout, config.channel_mean, config.channel_std), progress


def describe_provenance(
    run: RunDirectory, config: RunConfig, checkpoint: str, progress: Progress
) -> dict[str, Json]:
    """Say where the encoder of a checkpoint comes from, and how good it looked."""
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
        "checkpoint": checkpoint,
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
