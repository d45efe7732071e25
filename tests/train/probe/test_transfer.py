"""A transfer: its images, its seeds, and bundles that have the linear layer alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from models.bundle import Bundle
from tests.train.probe.probing import CPU, QUICK, opened
from train.probe import transfer as transfer_probe
from train.probe.few_labels import read_budget
from train.probe.options import FinetuneOptions, LinearOptions, TransferOptions
from train.probe.probed import Probed
from train.probe.report import as_text


def test_a_transfer_names_all_images_that_it_learned_from(
    finetune: FinetuneOptions, run: Probed
) -> None:
    """Those of every seed and those held out are hashed, and looked for in the test images."""
    transfer = TransferOptions(
        encoder=str(finetune.run), images=finetune.images, test=finetune.images, labels=0.25,
        seeds=(0, 1), validation="train", val_images=50, recipe=QUICK, baselines=False,
    )  # fmt: skip
    report = transfer_probe.evaluate_transfer(transfer, run, CPU)
    _, images, draw = read_budget(transfer, run.encoder)
    assert len(draw.used) > 150
    assert report.images["sha256"] == images.sha256
    assert report.images["labels_by_seed"] == {"0": 100, "1": 100}
    of_layers = report.images["linear"]
    assert isinstance(of_layers, dict)
    taught = np.union1d(draw.by_seed[0], draw.by_seed[1])
    assert 100 < len(taught) == of_layers["images"]
    assert of_layers["labels_by_seed"] == {"0": 100, "1": 100}
    assert of_layers["sha256"] != images.sha256
    assert report.notes == [f"{len(draw.used)} test images are training images pixel for pixel"]
    text = as_text(report)
    assert f"trained on 100 labelled images a seed ({len(draw.used)} read) of" in text


def test_every_row_of_a_transfer_is_over_all_seeds(finetune: FinetuneOptions, run: Probed) -> None:
    """Linear layers, too, are fitted on the labels of each; the first seed's C is every seed's."""
    transfer = TransferOptions(
        encoder=str(finetune.run), images=finetune.images, test=finetune.test, labels=0.25,
        seeds=(0, 1),
        recipe=replace(
            QUICK, epochs=(1,), lr_backbone=(1e-3,), scratch_epochs=(1,), scratch_lr=(1e-3,)
        ),
    )  # fmt: skip
    report = transfer_probe.evaluate_transfer(transfer, run, CPU)
    assert len(report.rows) == 6
    for row in report.rows:
        assert row.top1 is not None
        assert row.top5 is not None
        assert len(row.top1.values) == len(row.top5.values) == 2, row.name
    alone = transfer_probe.evaluate_transfer(replace(transfer, seeds=(0,)), run, CPU)
    for row, first in zip(report.rows[2:], alone.rows[2:], strict=True):
        assert row.top1 is not None
        assert first.top1 is not None
        assert row.top1.values[0] == first.top1.mean
        assert row.chosen["C"] == first.chosen["C"]


def test_a_bundle_of_another_maker_has_the_linear_layer_alone(
    linear: LinearOptions, make_bundle: Callable[..., Bundle]
) -> None:
    """Transfer leaves the networks out and says so."""
    encoder = str(make_bundle().path)
    options = TransferOptions(
        encoder=encoder, images=linear.images, test=linear.test, labels=0.25, baselines=False
    )
    with closing(opened(Path(encoder))) as probed:
        report = transfer_probe.evaluate_transfer(options, probed, CPU)
    assert [row.name for row in report.rows] == ["linear, encoder"]
    assert report.notes[-1] == (
        "its network cannot be trained further: there is the linear layer alone (weights of "
        f"{encoder}/encoder.onnx: expected a network of convolutions that each have a BatchNorm, "
        "found no normalisation of pixels; give the run that it was exported from)"
    )
    assert report.settings.keys() == {"solver", "features", "c_grid", "labels", "balanced"}
