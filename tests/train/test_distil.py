"""Self-distillation: what the student is told, what it never sees, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.images import open_source
from models.networks import ResNet
from models.preprocess import PreprocessSpec
from train.device import Compute
from train.errors import TrainError
from train.export.graph import EncoderGraph
from train.export.readout import PooledReadout
from train.probe.arms import Arm, LabelBudget, LabelledImages, train_arm
from train.probe.classifier import Classifier, Recipe, predict
from train.probe.distil import make_targets, read_unlabelled, student_recipe, train_student
from train.probe.options import DistilOptions
from train.probe.probed import RunEncoder

CPU = Compute(device=torch.device("cpu"), precision="fp32")
RECIPE = Recipe(
    epochs=4, batch_size=4, optimizer="adamw", lr_head=1e-2, lr_backbone=1e-3, weight_decay=0.0,
    schedule="cosine", warmup_share=0.1, label_smoothing=0.0, smallest_crop=1.0,
    flip_probability=0.5, head_c=None, freezes_batch_norm=False,
)  # fmt: skip
QUICK = DistilOptions(epochs=4, batch_size=16, neighbours=4, lr=3e-3, smallest_crop=1.0)


def classifier_of(seed: int) -> Classifier:
    """Make a classifier of three classes with a very small network."""
    torch.manual_seed(seed)
    backbone = ResNet(layout="resnet10", width=8, in_channels=1, zero_init_residual=False)
    readout = PooledReadout(backbone.stage_dims, stages=(3, 4))
    return Classifier(EncoderGraph(backbone, readout, (0.5,), (0.25,)), 3)


def some_images(n: int, *, seed: int) -> LabelledImages:
    """Draw 8 x 8 images whose class is where they are bright."""
    rng = np.random.default_rng(seed)
    labels_N = np.arange(n) % 3
    images_NHWC = rng.integers(0, 120, (n, 8, 8, 1)).astype(np.uint8)
    for number in range(3):
        images_NHWC[labels_N == number, 2 * number : 2 * number + 3] += 130
    return LabelledImages(pool_NHWC=images_NHWC, labels_N=labels_N)


def accuracy(classifier: Classifier, images: LabelledImages) -> float:
    """Count what it gets right."""
    scores_NC = predict(classifier, images.images_NHWC, CPU)
    return float((scores_NC.argmax(axis=1) == images.labels_N).mean())


def targets_of(
    images: LabelledImages, n_labelled: int, options: DistilOptions
) -> NDArray[np.float32]:
    """Let a new classifier say what images are, the first of which are labelled."""
    return make_targets(
        classifier_of(0), images.images_NHWC, images.labels_N[:n_labelled], options, CPU,
        is_mirrored=True,
    )  # fmt: skip


def test_a_student_learns_from_images_without_labels() -> None:
    """Six labels teach little; 240 images without one bring the rest, and the teacher stays."""
    labelled, unlabelled = some_images(6, seed=0), some_images(240, seed=1)
    test = some_images(300, seed=2)
    budget = LabelBudget(by_seed={0: labelled, 1: labelled}, fitted=labelled, held_out=labelled)
    arm = Arm(name="teacher", make=classifier_of, recipes=(RECIPE,), note="")
    teacher = train_arm(arm, budget, CPU)
    before = {name: value.clone() for name, value in teacher.by_seed[0].state_dict().items()}
    student = train_student("student", teacher, budget, unlabelled.images_NHWC, QUICK, CPU)
    assert list(student.by_seed) == [0, 1]
    assert student.arm.note == "taught by 'teacher' on 240 unlabelled images"
    for name, value in teacher.by_seed[0].state_dict().items():
        assert torch.equal(value, before[name]), name
    taught, learnt = (
        np.mean([accuracy(one, test) for one in arm.by_seed.values()]) for arm in (teacher, student)
    )
    assert learnt > taught + 0.05


def test_targets_are_labels_where_there_are_some() -> None:
    """And probabilities elsewhere, which a lower temperature sharpens."""
    images = some_images(30, seed=0)
    soft_NC = targets_of(images, 5, replace(QUICK, temperature=1.0))
    np.testing.assert_array_equal(soft_NC[:5], np.eye(3)[images.labels_N[:5]])
    np.testing.assert_allclose(soft_NC.sum(axis=1), 1, rtol=1e-5)
    sharp_NC = targets_of(images, 5, replace(QUICK, temperature=0.5))
    np.testing.assert_allclose(sharp_NC.sum(axis=1), 1, rtol=1e-5)
    assert (sharp_NC.argmax(axis=1) == soft_NC.argmax(axis=1)).all()
    assert sharp_NC[5:].max(axis=1).mean() > soft_NC[5:].max(axis=1).mean()


def test_the_coldest_targets_are_the_likeliest_classes() -> None:
    """A power that float32 cannot hold leaves no row of zeros behind, and no NaN."""
    images = some_images(30, seed=0)
    warm_NC = targets_of(images, 5, replace(QUICK, smoothing=0.9))
    cold_NC = targets_of(images, 5, replace(QUICK, smoothing=0.9, temperature=1e-4))
    assert np.isfinite(cold_NC).all()
    np.testing.assert_allclose(cold_NC.sum(axis=1), 1, rtol=1e-5)
    assert (cold_NC[np.arange(30), warm_NC.argmax(axis=1)] == cold_NC.max(axis=1)).all()


def test_labels_spread_to_neighbours() -> None:
    """A teacher that knows nothing (its layer is zero) leaves the labels' word."""
    images = some_images(60, seed=0)
    targets_NC = targets_of(images, 30, replace(QUICK, smoothing=0.9))
    rest = slice(30, None)
    assert (targets_NC[rest].argmax(axis=1) == images.labels_N[rest]).mean() > 0.5
    alone_NC = targets_of(images, 30, replace(QUICK, smoothing=0.0))
    np.testing.assert_allclose(alone_NC[rest], 1 / 3, rtol=1e-5)


def test_the_student_has_its_teachers_decay_and_flips() -> None:
    """What is its own comes from the options."""
    taught = replace(RECIPE, weight_decay=0.3, flip_probability=0.0, label_smoothing=0.1)
    recipe = student_recipe(taught, QUICK)
    assert (recipe.weight_decay, recipe.flip_probability) == (0.3, 0.0)
    assert (recipe.epochs, recipe.lr_head, recipe.lr_backbone) == (4, 3e-3, 3e-3)
    assert (recipe.label_smoothing, recipe.head_c) == (0.0, None)


@pytest.fixture
def encoder() -> RunEncoder:
    """What brings images to 28 x 28."""
    spec = PreprocessSpec(height=28, width=28, channels=1, resize=28)
    return RunEncoder(
        classifier_of(0).graph, name="x", fingerprint="x", preprocessing=spec, device=CPU.device
    )


def test_held_out_images_are_never_among_the_unlabelled(
    encoder: RunEncoder, mini_source: str, tmp_path: Path
) -> None:
    """Not by their names but by their pixels; the rest is a function of the seed."""
    source = open_source(mini_source)

    def read(n: int, without: NDArray[np.uint8], seed: int = 0) -> NDArray[np.uint8]:
        held = LabelledImages(pool_NHWC=without, labels_N=np.zeros(len(without), np.int64))
        return read_unlabelled(source, encoder, limit=n, without=held, seed=seed)

    nothing = np.empty((0, 28, 28, 1), np.uint8)
    everything = read(1000, nothing)
    assert everything.shape == (400, 28, 28, 1)
    held = everything[100:150]
    rest = read(1000, held)
    assert len(rest) == 350
    assert not {image.tobytes() for image in held} & {image.tobytes() for image in rest}
    assert len(read(40, nothing)) == 40
    np.testing.assert_array_equal(read(40, nothing), read(40, nothing))
    assert not np.array_equal(read(40, nothing), read(40, nothing, seed=1))
    with pytest.raises(TrainError, match="expected images beside those held out, found none; name"):
        read(1000, everything)
