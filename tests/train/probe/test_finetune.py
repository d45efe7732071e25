"""Few labels: pretrained beside from scratch, of a run or a bundle, and with unlabelled images."""

from __future__ import annotations

import re
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.bundle import Bundle
from tests.train.probe.probing import CPU, QUICK, Events, opened, top1
from train.errors import TrainError
from train.probe import finetune as finetune_probe
from train.probe import transfer as transfer_probe
from train.probe.options import DistilOptions, FinetuneOptions, TransferOptions
from train.probe.probed import Probed
from train.probe.report import as_text
from train.probe.transfer import BUNDLE_READOUT


@pytest.mark.parametrize("validation", ["labels", "train"])
def test_fine_tuning_stands_beside_the_same_network_from_scratch(
    finetune: FinetuneOptions, run: Probed, validation: str
) -> None:
    """Both arms have the same labels and held-out images, and say what they chose from what."""
    options = replace(finetune, validation=validation, val_images=50)
    report = finetune_probe.evaluate_finetune(options, run, CPU)
    tuned, scratch, *layers = report.rows
    assert (tuned.name, scratch.name) == ("fine-tuned", "from scratch")
    assert [row.name for row in layers] == ["frozen, linear layer", "random, linear layer"]
    for row, names in ((tuned, {"lr_backbone"}), (scratch, {"lr_head", "lr_backbone"})):
        tried = row.chosen["tried"]
        assert isinstance(tried, list)
        assert len(tried) == 2
        assert all(isinstance(one, dict) and one.keys() == {*names, "val_top1"} for one in tried)
        assert row.top1 is not None
        assert len(row.top1.values) == 2
    assert report.difference is not None
    assert report.difference.mean == pytest.approx(tuned.top1.mean - scratch.top1.mean)
    assert report.images["labels_by_seed"] == {"0": 100, "1": 100}
    read = report.images["images"]
    assert isinstance(read, int)
    if validation == "labels":
        assert (report.split["fitted_on"], report.split["held_out"]) == (80, 20)
        assert 100 < read <= 200
    else:
        assert (report.split["fitted_on"], report.split["held_out"]) == (100, 50)
        assert 150 < read <= 250
    text = as_text(report)
    assert f"trained on 100 labelled images a seed ({read} read) of {finetune.images}\n" in text
    assert "points of top-1 above from scratch, seeds 0, 1" in text
    assert re.search(r"  fine-tuned +- .* lr_backbone 0\.0+1\n", text)
    fewer = replace(report, images={**report.images, "labels_by_seed": {"0": 100, "1": 98}})
    assert "trained on 98 to 100 labelled images a seed" in as_text(fewer)


def test_fine_tuning_twice_gives_the_same_figures(finetune: FinetuneOptions, run: Probed) -> None:
    """Labels, initial weights, order and views are functions of the seed."""
    one, other = (
        finetune_probe.evaluate_finetune(replace(finetune, seeds=(3,)), run, CPU) for _ in range(2)
    )
    assert [row.top1 for row in one.rows] == [row.top1 for row in other.rows]
    assert [row.chosen for row in one.rows] == [row.chosen for row in other.rows]


def test_too_few_labels_are_refused(finetune: FinetuneOptions, run: Probed) -> None:
    """Each class needs two: one to learn from, one to choose by."""
    with pytest.raises(TrainError, match=r"each of 10 classes two labels .* found 0.01, which is"):
        finetune_probe.evaluate_finetune(replace(finetune, labels=0.01), run, CPU)


def test_a_bundle_is_trained_further_without_its_run(
    finetune: FinetuneOptions, bundle: Bundle, run: Probed
) -> None:
    """The network is had back from the graph: every row does about as that of the run does."""
    of_run = finetune_probe.evaluate_finetune(finetune, run, CPU)
    with closing(opened(bundle.path)) as probed:
        options = replace(finetune, run=bundle.path)
        of_bundle = finetune_probe.evaluate_finetune(options, probed, CPU)
        transfer = TransferOptions(
            encoder=str(bundle.path), images=finetune.images, test=finetune.test, labels=0.25,
            recipe=QUICK, baselines=False, stages=(2,), grid=2,
        )  # fmt: skip
        transferred = transfer_probe.evaluate_transfer(transfer, probed, CPU)
    assert [row.name for row in of_bundle.rows] == [row.name for row in of_run.rows]
    for row in of_bundle.rows:
        assert top1(of_bundle, row.name) == pytest.approx(top1(of_run, row.name), abs=0.05)
    assert [row.name for row in transferred.rows] == ["fine-tuned", "linear, encoder"]
    assert [row.note for row in transferred.rows] == ["", BUNDLE_READOUT]
    assert (transferred.settings["stages"], transferred.settings["grid"]) == ([2], 2)
    assert transferred.rows[1].dim == bundle.output.dim


def test_a_run_that_trains_on_may_delete_what_was_opened(
    finetune: FinetuneOptions, finished_run: Path, tmp_path: Path
) -> None:
    """The trained weights are read when the run is opened, for every arm, recipe and seed."""
    where = tmp_path / "run"
    shutil.copytree(finished_run, where)
    options = replace(finetune, run=where)
    with closing(opened(where)) as probed:
        for checkpoint in (where / "checkpoints").iterdir():
            checkpoint.unlink()
        report = finetune_probe.evaluate_finetune(options, probed, CPU)
    assert [row.name for row in report.rows][:1] == ["fine-tuned"]


def test_unlabelled_images_add_students_beside_their_teachers(
    finetune: FinetuneOptions, run: Probed, events: Events
) -> None:
    """The network pretrained and the one from scratch, both distilled, before a test image."""
    options = replace(
        finetune, unlabelled=finetune.images, validation="train", val_images=50,
        distil=DistilOptions(epochs=1, images=100, batch_size=32),
    )  # fmt: skip
    report = finetune_probe.evaluate_finetune(options, run, CPU)
    assert [row.name for row in report.rows] == [
        "self-distilled", "fine-tuned", "from scratch", "frozen, linear layer",
        "random, linear layer", "from scratch, self-distilled",
    ]  # fmt: skip
    assert events == ["arm trained"] * 4 + ["test image"] * 200
    assert report.difference is not None
    assert report.against == "from scratch"
    gain = top1(report, "self-distilled") - top1(report, "from scratch")
    assert report.difference.mean == pytest.approx(gain)
    notes = {row.name: row.note for row in report.rows}
    assert re.fullmatch(
        r"taught by 'frozen, linear layer' on (\d+) unlabelled images", notes["self-distilled"]
    )
    distil = report.settings["distil"]
    assert isinstance(distil, dict)
    assert distil["images"] == 100
    assert report.notes[:2] == [
        "0 test images are training images pixel for pixel",
        "0 test images are among the unlabelled ones pixel for pixel",
    ]
    alone = finetune_probe.evaluate_finetune(replace(options, baselines=False), run, CPU)
    assert "from scratch" not in [row.name for row in alone.rows]
    assert alone.rows[0].top1 == report.rows[0].top1
    assert alone.against is None


def test_test_images_that_were_learned_from_without_a_label_are_counted(
    finetune: FinetuneOptions, run: Probed
) -> None:
    """By their pixels; the student has seen them all the same."""
    recipe = replace(QUICK, epochs=(1,), lr_backbone=(1e-3,), scratch_epochs=(1,))
    options = replace(
        finetune, unlabelled=finetune.test, seeds=(0,), baselines=False, recipe=recipe,
        distil=DistilOptions(epochs=1, images=150),
    )  # fmt: skip
    report = finetune_probe.evaluate_finetune(options, run, CPU)
    assert "150 test images are among the unlabelled ones pixel for pixel" in report.notes
    assert "150 test images are among the unlabelled ones" in as_text(report)


def test_the_paper_recipe_is_the_papers() -> None:
    """20 epochs, .5 for the layer, .002 for the backbone, a fifth at epochs 12 and 16, no decay."""
    from train.probe.classifier import lr_share
    from train.probe.few_labels import finetune_recipes, resolve

    options = FinetuneOptions(run=Path("r"), images="a", test="b", preset="paper")
    (recipe,) = finetune_recipes(resolve(options))
    assert (recipe.epochs, recipe.lr_head, recipe.lr_backbone) == (20, 0.5, 0.002)
    assert (recipe.weight_decay, recipe.head_c, recipe.label_smoothing) == (0, None, 0)
    shares = [lr_share(recipe, step, 20) for step in range(20)]
    np.testing.assert_allclose(shares, [1.0] * 12 + [0.2] * 4 + [0.04] * 4)
