"""How good the shipped encoder is on Fashion-MNIST's test images, beside its baselines.

One table of seven rows: the encoder of a bundle; the same network untrained, once with the
bundle's readout (whitened by a fit of its own) and once with its last stage pooled plainly; the
trained network pooled plainly, which shows what the readout adds; and pixels, whitened, centred
and raw. What is pooled plainly are the graphs of the bundle, unfolded (`train.export.unfold`): no
row has other weights than the bundle's. Every row has two figures, made in the same way:

    kNN: the 20 nearest training images by cosine, found exactly, vote with exp(s / .07).
    Linear: multinomial logistic regression on centred features of one scale, as
    `python -m train.probe linear` has it by default: C is chosen on a tenth of the training
    images, then the layer is fitted on all of them.

Nothing is chosen by the test set: k and T are those that trainings are watched with, each row
has a C of its own from the training images, and means and whitenings are fitted on training
images without their labels. The test images are read once, when every layer is fitted.

Images go through `train.probe`'s reader, split and fits, so that figures agree with its own.
Run from the root:
`python -m benchmarks.fashion_mnist --out benchmarks/results/fashion_mnist.json`.

Shapes: N images, P pixels an image, D dimensions.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmarks.measuring import command_line
from index.evaluation.baselines import Whitening
from models.bundle import SHIPPED_BUNDLE, Bundle, Json, read_bundle
from models.command import progress, run_command
from models.cpu import cpu_budget
from models.encoder import Encoder
from models.errors import BundleError
from models.files import atomic_file, sha256_file
from models.images import open_source
from train.errors import writing
from train.monitor import KNN_K, KNN_TEMPERATURE, knn_accuracy
from train.option_groups import require
from train.probe.labelled import LabelledSet, read_labelled
from train.probe.linear import describe_settings, describe_split
from train.probe.linear_layers import Candidate, Layers, fit, measure
from train.probe.opening import opened_on_device
from train.probe.options import LinearOptions
from train.probe.pretrained import load_graph, read_pretrained
from train.probe.probed import RunEncoder
from train.probe.report import ProbeRow, notes_of
from train.run import describe_environment

TRAIN, TEST = "fashion-mnist:train", "fashion-mnist:test"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a bundle on Fashion-MNIST by kNN and a linear probe, beside its baselines."""

    bundle: tyro.conf.Positional[Path] = SHIPPED_BUNDLE
    """The bundle, with its untrained twin."""
    limit: int | None = None
    """Take only the first so many training and test images, for a trial."""
    threads: int | None = None
    """CPU threads; what affinity and cgroup leave where not given."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        # Of fewer images a class may be missing.
        require(self.limit is None or self.limit >= 100, "--limit", "at least 100", self.limit)
        require(self.threads is None or self.threads >= 1, "--threads", "at least 1", self.threads)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: what was measured.
        dim: of its features.
        knn_top1: share of the test images, 0 to 1.
        linear_top1: the same.
        linear: the chosen C, what else was tried, and how the fit ended.
        note: what a reader should know of it.
    """

    name: str
    dim: int
    knn_top1: float
    linear_top1: float
    linear: Mapping[str, Json]
    note: str


def main(options: Options) -> None:
    """Measure, print, and write the result."""
    start_s = time.monotonic()
    threads = options.threads or cpu_budget()
    bundle = read_bundle(options.bundle)
    require_twin(bundle)
    # The CPU is everywhere. The baselines are listed here, not by the probe.
    linear = LinearOptions(
        encoder=str(bundle.path),
        images=TRAIN,
        test=TEST,
        baselines=False,
        device="cpu",
        threads=threads,
    )
    train, test, rows = measure_all(bundle, options, linear)
    result: dict[str, Json] = {
        "command": command_line(),
        "limit": options.limit,
        "encoder": describe_encoder(bundle),
        "training": describe_training(bundle),
        "images": {**train.describe()},
        "test": {**test.describe()},
        "knn": {"k": KNN_K, "temperature": KNN_TEMPERATURE, "similarity": "cosine, exact"},
        "linear": {"split": describe_split(linear, train), "settings": describe_settings(linear)},
        "rows": json.loads(json.dumps([asdict(row) for row in rows], allow_nan=False)),
        "notes": [*notes_of(train, test)],
        "threads": threads,
        "total_s": round(time.monotonic() - start_s),
        "environment": {**describe_environment()},
    }
    print(as_text(bundle, train, test, rows))
    if options.out is not None:
        with writing(options.out, mend="choose another --out"), atomic_file(options.out) as file:
            file.write_text(json.dumps(result, indent=2) + "\n")


def require_twin(bundle: Bundle) -> None:
    """Refuse a bundle without an untrained twin.

    Raises:
        BundleError: it is one.
    """
    if bundle.random_path is None:
        raise BundleError(
            str(bundle.path),
            expected="a bundle with its untrained twin",
            found="no random.onnx",
            mend="export it without --no-random-twin",
        )


def pooled_plainly(bundle: Bundle) -> list[Encoder]:
    """Open the untrained and the trained network of a bundle with their last stage averaged.

    Raises:
        RunError, ExportError: its graphs do not unfold.
    """
    pretrained = read_pretrained(bundle.path)
    assert pretrained.untrained is not None, "require_twin saw one"
    return [
        RunEncoder(
            load_graph(file, pretrained.config),
            name=bundle.name,
            fingerprint=sha256_file(file),
            preprocessing=bundle.preprocessing,
            device=torch.device("cpu"),
        )
        for file in (pretrained.untrained, pretrained.trained)
    ]


def measure_all(
    bundle: Bundle, options: Options, linear: LinearOptions
) -> tuple[LabelledSet, LabelledSet, list[Row]]:
    """Fit every row's layer on the training images; then read the test images, and count.

    Returns:
        The training images, the test images, and the rows.
    """
    limited = None if options.limit is None else np.arange(options.limit)
    test_source = open_source(linear.test)  # a missing file ends it now, not at the end
    with opened_on_device(linear.encoder, linear, precision="fp32") as (of_bundle, _):
        assert of_bundle.twin is not None, "require_twin saw one"
        encoders = [of_bundle.encoder, of_bundle.twin, *pooled_plainly(bundle)]
        train = read_labelled(
            open_source(linear.images),
            encoders,
            preprocess_for=of_bundle.encoder,
            what="training images",
            rows=limited,
            with_pixels=True,
        )
        found = candidates(encoders, train)
        shown = progress(found, what="linear layers", total=len(found), unit="row")
        layers = Layers(train=train, fitted=[fit(one, train, linear) for one in shown])
        test = read_labelled(
            test_source,
            encoders,
            preprocess_for=of_bundle.encoder,
            what="test images",
            class_names=train.class_names,
            rows=limited,
            with_pixels=True,
        )
    probed, _ = measure(linear, layers, test)
    shown = progress(found, what="kNN", total=len(found), unit="row")
    scores = [knn_top1(candidate, train, test) for candidate in shown]
    return train, test, [make_row(*pair) for pair in zip(probed, scores, strict=True)]


def candidates(encoders: Sequence[Encoder], train: LabelledSet) -> list[Candidate]:
    """List what is measured, in the table's order.

    Args:
        encoders: the bundle's, its twin, and the untrained and the trained network pooled
            plainly, in the order in which `LabelledSet.features` has them.
        train: what whitening and mean are fitted on.
    """
    named = (
        ("encoder", "the bundle's encoder.onnx"),
        (
            "untrained, same readout",
            "the weights before the first step; a whitening is fitted anew",
        ),
        ("untrained, pooled plainly", "the same weights, the last stage averaged"),
        ("trained, pooled plainly", "the encoder's weights without its readout"),
    )
    found = [
        _candidate(name, encoder.dim, partial(embedded, number), note)
        for number, ((name, note), encoder) in enumerate(zip(named, encoders, strict=True))
    ]
    whitening = Whitening.fit(pixels_of(train))
    n_pixels, n_whitened = whitening.weights_PD.shape
    return [
        *found,
        _candidate(
            "whitened pixels",
            n_whitened,
            lambda images: whitening(pixels_of(images)),
            "PCA, fitted on the training images; then of unit length",
        ),
        _candidate(
            "centred pixels",
            n_pixels,
            lambda images: np.subtract(pixels_of(images), whitening.mean_P, dtype=np.float32),
            "less the mean training image; a linear layer, which centres, sees no difference",
        ),
        _candidate("raw pixels", n_pixels, lambda images: pixels_of(images).astype(np.float32), ""),
    ]


def embedded(number: int, images: LabelledSet) -> NDArray[np.float32]:
    """Give the (N, D) features of the encoder of that number."""
    return images.features[number]


def pixels_of(images: LabelledSet) -> NDArray[np.uint8]:
    """Give the pixels, (N, P)."""
    assert images.pixels_NP is not None, "pixels were asked for"
    return images.pixels_NP


def knn_top1(candidate: Candidate, train: LabelledSet, test: LabelledSet) -> float:
    """Let the training images vote on the test images; give the share that is right."""
    return knn_accuracy(
        candidate.features(train), train.labels_N, candidate.features(test), test.labels_N
    )


def make_row(probed: ProbeRow, knn: float) -> Row:
    """Put the two figures of a row together."""
    assert probed.dim is not None, "every row has features"
    assert probed.top1 is not None, "every row was measured"
    return Row(
        name=probed.name,
        dim=probed.dim,
        knn_top1=knn,
        linear_top1=probed.top1.mean,
        linear=probed.chosen,
        note=probed.note,
    )


def describe_encoder(bundle: Bundle) -> dict[str, Json]:
    """Say which encoder it is, how large, and how it reads the network out."""
    return {
        "name": bundle.name,
        "fingerprint": bundle.fingerprint,
        "dim": bundle.dim,
        "bytes": bundle.encoder_path.stat().st_size,
        "readout": bundle.provenance.get("readout"),
    }


def describe_training(bundle: Bundle) -> dict[str, Json]:
    """Say how its weights came about, as the bundle keeps it."""
    kept = bundle.provenance
    return {
        "command": kept["command"],
        "export_command": kept.get("export_command"),
        "seed": kept.get("seed"),
        "threads": _object(kept, "options").get("threads"),
        **_object(kept, "training"),  # with elapsed_s and hardware
        "data": kept["data"],
        "versions": kept.get("versions"),
    }


def as_text(bundle: Bundle, train: LabelledSet, test: LabelledSet, rows: Sequence[Row]) -> str:
    """Lay the table out for people."""
    training = describe_training(bundle)
    width = max(len(row.name) for row in rows)
    lines = [
        f"{len(test):,} images of {test.uri}, {len(train):,} of {train.uri}",
        f"  encoder {bundle.name}, {bundle.encoder_path.stat().st_size / 1e6:.2f} MB, "
        f"{bundle.fingerprint}",
        f"  trained in {training.get('elapsed_s')} s on {training.get('hardware')}, "
        f"{training['threads']} threads: {training['command']}",
        "",
        f"  {'':<{width}}{'dims':>7}{'kNN top-1 %':>14}{'linear top-1 %':>17}{'C':>9}",
    ]
    lines += [
        f"  {row.name:<{width}}{row.dim:>7}{100 * row.knn_top1:>14.2f}"
        f"{100 * row.linear_top1:>17.2f}{row.linear['C']:>9g}"
        for row in rows
    ]
    remarks = [f"{row.name}: {row.note}" for row in rows if row.note]
    return "\n".join([*lines, "", *(f"  - {one}" for one in [*remarks, *notes_of(train, test)])])


def _candidate(
    name: str, dim: int, features: Callable[[LabelledSet], NDArray[np.float32]], note: str
) -> Candidate:
    """Make a candidate whose features are the same in every epoch."""
    return Candidate(name=name, dim=dim, features=features, augmented=None, note=note)


def _object(document: Mapping[str, Json], name: str) -> dict[str, Json]:
    """Give an object of a JSON document; an empty one where it has none."""
    return cast(dict[str, Json], document.get(name) or {})


if __name__ == "__main__":
    sys.exit(run_command(Options, main, prog="python -m benchmarks.fashion_mnist"))
