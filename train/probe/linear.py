"""`python -m train.probe linear`: a linear layer on a frozen encoder, beside baselines.

Rules:
    The test images are read once, after everything has been chosen and fitted.
    Raw pixels, whitened pixels and the untrained encoder go the same way in the same run.

Source: Zbontar et al., arXiv 2103.03230, section 3.1 and appendix A.2 for `--solver sgd`;
there photographs are cropped and flipped anew every epoch, here only with `--augment`, which
crops the square that preprocessing cuts from their middle.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.bundle import Json, record_evaluation
from models.errors import UsageError
from models.images import open_source
from train.errors import writing
from train.probe.labelled import LabelledSet
from train.probe.opening import opened_on_device, refuse_readout
from train.probe.options import LinearOptions
from train.probe.report import ProbeReport, command_line, notes_of, score_classes, show
from train.run import describe_environment

if TYPE_CHECKING:
    from train.probe.probed import Probed

AUGMENTATION = (
    "flips, and crops of the square that preprocessing cuts from the middle, not of the whole "
    "photograph as the paper's"
)


def main(options: LinearOptions) -> None:
    """Measure, print, write and record."""
    with opened_on_device(options.encoder, options, precision="fp32") as (probed, _):
        if options.record and probed.bundle is None:
            raise UsageError(
                "--record", expected="an encoder that is a bundle here", found=options.encoder
            )
        report = evaluate_linear(options, probed)
    show(report, as_json=options.json, out=options.out)
    if options.record and probed.bundle is not None:
        record(probed.bundle, report)


def evaluate_linear(options: LinearOptions, probed: Probed) -> ProbeReport:
    """Choose and fit on the training images; then read the test images, and count.

    Raises:
        SourceError: a source is missing or damaged.
        TrainError: there are no labels, more images than memory holds, or features are not finite.
        UsageError: a readout is chosen for an encoder that has its own, or `--augment` for one
            that is not a run's.
    """
    from train.probe.linear_layers import fit_layers, measure, read_test

    if probed.run is None:
        refuse_readout(options.encoder, options)
        if options.augment:
            raise UsageError("--augment", expected="a run", found=f"encoder {probed.encoder.name}")
    test_source = open_source(options.test)  # a misspelt name ends it now, not at the end
    layers = fit_layers(options, probed)
    test = read_test(options, probed, layers.train, test_source)
    rows, scores_NC = measure(options, layers, test)
    return ProbeReport(
        kind="linear",
        command=command_line(),
        encoder=probed.description,
        images={**layers.train.describe()},
        test={**test.describe()},
        split=describe_split(options, layers.train),
        settings=describe_settings(options),
        seeds=(options.seed,),
        rows=rows,
        difference=None,
        against=None,
        per_class=score_classes(scores_NC, test.labels_N, test.class_names),
        notes=[*notes_of(layers.train, test), *_note_few(len(layers.train), rows[0].dim)],
        environment=describe_environment(),
    )


def _note_few(images: int, dim: int | None) -> list[str]:
    """Say where a linear layer is a poor judge: with fewer images than it has weights a class."""
    if dim is None or images >= dim:
        return []
    return [
        f"{images} labelled images are fewer than {dim} dimensions, too few for a linear layer: "
        "see also `index.evaluate knn`, and `train.probe finetune` with --unlabelled"
    ]


def record(bundle: Path, report: ProbeReport) -> None:
    """Keep a report in `bundle.json`.

    Raises:
        RunError: it cannot be written.
    """
    with writing(bundle, mend="make it writable, or keep the report elsewhere with --out"):
        record_evaluation(bundle, report.kind, report.to_json())


def describe_split(options: LinearOptions, train: LabelledSet) -> dict[str, Json]:
    """Say what C was chosen on."""
    from train.probe.linear_layers import split_of

    if options.solver == "sgd":
        return {"how": "beforehand: the paper's recipe; no image was held out"}
    kept, held = split_of(options, train)
    return {
        "how": f"on {len(held):,} held-out training images; then fitted on all {len(train):,}",
        "seed": options.seed,
        "share": options.val_share,
        "fitted_on": len(kept),
        "held_out": len(held),
    }


def describe_settings(options: LinearOptions) -> dict[str, Json]:
    """Say what was the same for every row."""
    settings: dict[str, Json] = {"solver": options.solver}
    if options.solver == "lbfgs":
        return settings | {"features": "centred, one scale", "c_grid": list(options.c)}
    return settings | {
        "features": "standardised",
        "epochs": options.sgd.epochs,
        "lr": options.sgd.lr,
        "batch_size": options.sgd.batch_size,
        "weight_decay": options.sgd.weight_decay,
        "augmentation": AUGMENTATION if options.augment else "none, unlike the paper's",
    }
