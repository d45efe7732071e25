"""`python -m train.probe transfer`: an encoder on labelled images that it was not made for.

The linear layer on frozen features and the fine-tuned network in one table, with the
untrained encoder, pixels, and the network trained from scratch. Images of any size and
colour pass through the encoder's own preprocessing.

Rules:
    Everything is chosen and trained before a test image is read; each is read once, for the
    linear rows and the trained networks alike.
    Every row has every seed: its labels, and settings that the first seed chose.
    A linear layer on a bundle has the bundle's own readout; the options choose that of a run,
    and of the trained networks.

Source: Zbontar et al., arXiv 2103.03230, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np

from models.bundle import Json
from models.images import open_source
from train.errors import ExportError, RunError
from train.probe import linear as linear_probe
from train.probe.finetune import (
    Trained,
    describe_images,
    describe_settings,
    describe_split,
    labelled_images,
    train_arms,
)
from train.probe.opening import opened_on_device, refuse_readout
from train.probe.options import CommonOptions, LinearOptions, TransferOptions
from train.probe.report import ProbeReport, command_line, notes_of, score_classes, show
from train.run import describe_environment

if TYPE_CHECKING:
    from train.device import Compute
    from train.probe.labelled import LabelledSet
    from train.probe.linear_layers import Layers
    from train.probe.pretrained import Pretrained
    from train.probe.probed import Probed

BUNDLE_READOUT = "the bundle's own readout; --stages and --grid are of the trained networks alone"


def main(options: TransferOptions) -> None:
    """Measure, print and write."""
    where = options.encoder
    with opened_on_device(where, options, precision=options.precision) as (probed, compute):
        report = evaluate_transfer(options, probed, compute)
    show(report, as_json=options.json, out=options.out)


def evaluate_transfer(options: TransferOptions, probed: Probed, compute: Compute) -> ProbeReport:
    """Fit the linear layers and train the networks; then read the test images, and count.

    Raises:
        SourceError: a source is missing or damaged.
        TrainError: there are too few labels, more images than memory holds, or nothing trains.
        UsageError: a readout is chosen, and nothing has it.
    """
    from train.probe.arms import difference, score_arms
    from train.probe.few_labels import draw_labels
    from train.probe.labelled import count_labelled, record_classes, require_memory
    from train.probe.linear_layers import fit_seeds, measure_seeds, read_test, read_train

    test_source = open_source(options.test)  # a misspelt name ends it now, not at the end
    linear = _linear_options(options)
    pretrained, why_not = _find_pretrained(probed)
    if pretrained is None:
        refuse_readout(options.encoder, options)
    source = open_source(options.images)
    class_names, labels_N = record_classes(source)
    draw = draw_labels(labels_N, options)
    if pretrained is not None:  # the images of what is trained further are kept
        require_memory(
            probed.encoder.preprocessing,
            (source, len(draw.used)),
            (test_source, count_labelled(test_source)),
        )
    taught = np.unique(np.concatenate([*draw.by_seed.values()]))
    train = read_train(linear, probed, taught, class_names)
    layers = fit_seeds(linear, probed, train, draw.by_seed)
    trained = (
        None
        if pretrained is None
        else train_arms(options, probed, pretrained, compute, with_layers=False)
    )
    test = read_test(linear, probed, train, test_source, with_images=trained is not None)
    rows, scores_NC = measure_seeds(linear, layers, test)
    rows = [replace(row, name=f"linear, {row.name}") for row in rows]
    # The trained networks' images are all seeds' and those held out: the layers' are among them.
    gain, notes = None, notes_of(train if trained is None else trained.images, test)
    settings = linear_probe.describe_settings(linear)
    settings |= {"labels": options.labels, "balanced": options.balanced}
    if trained is None:
        notes.append(
            f"its network cannot be trained further: there is the linear layer alone ({why_not})"
        )
    else:
        arms, scores_NC = score_arms(trained.arms, labelled_images(test), compute)
        gain = difference(*arms) if len(arms) == 2 else None
        if probed.run is None:
            rows[0] = replace(rows[0], note=BUNDLE_READOUT)
        rows = [*arms, *rows]
        settings |= describe_settings(options, compute)
    return ProbeReport(
        kind="transfer",
        command=command_line(),
        encoder=probed.description,
        images=_describe_images(train, layers, options.seeds, trained),
        test={**test.describe()},
        split=_describe_split(options, linear, layers[0], trained),
        settings=settings,
        seeds=options.seeds,
        rows=rows,
        difference=gain,
        against=None if gain is None else rows[1].name,
        per_class=score_classes(scores_NC, test.labels_N, test.class_names),
        notes=notes,
        environment=describe_environment(),
    )


def _find_pretrained(probed: Probed) -> tuple[Pretrained | None, str]:
    """Find the network to train further, of a run or of a bundle that unfolds; or say why not."""
    from train.probe.pretrained import read_pretrained

    if probed.bundle is None:
        return probed.pretrained, "a server keeps its weights"
    try:
        return read_pretrained(probed.bundle), ""
    except (RunError, ExportError) as error:
        return None, str(error)


def _linear_options(options: TransferOptions) -> LinearOptions:
    """Give the linear probe what it shares with the transfer."""
    shared = {field.name: getattr(options, field.name) for field in fields(CommonOptions)}
    return LinearOptions(encoder=options.encoder, seed=options.seeds[0], **shared)


def _describe_images(
    train: LabelledSet, layers: Sequence[Layers], seeds: Sequence[int], trained: Trained | None
) -> dict[str, Json]:
    """Say which training images were read, and which of them the linear layers learned from."""
    counts = {str(seed): len(one.train) for seed, one in zip(seeds, layers, strict=True)}
    of_layers: dict[str, Json] = {**train.describe(), "labels_by_seed": {**counts}}
    if trained is None:
        return of_layers
    return {**describe_images(trained), "linear": of_layers}


def _describe_split(
    options: TransferOptions, linear: LinearOptions, layers: Layers,
    trained: Trained | None,
) -> dict[str, Json]:  # fmt: skip
    """Say what C, and the settings of the trained networks, were chosen on."""
    of_layers = linear_probe.describe_split(linear, layers.train)  # those of the first seed
    if trained is None:
        return of_layers
    of_arms = describe_split(options, trained)
    how = f"{of_arms['how']}, and C {of_layers['how']}"
    return {"how": how, "linear": of_layers, "trained": of_arms}
