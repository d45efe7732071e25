"""Self-distillation: a classifier of few labels teaches its own network on unlabelled images.

Rules:
    The teacher is a trained arm, the student starts as a copy of it, of the same seed.
    The teacher says how likely each class is, of the image and its mirror image; that is
    smoothed over the nearest neighbours, sharpened by the temperature, and is the student's
    target. Labelled images are among them, with their label.
    The student sees random crops and mirror images alone, and no label elsewhere.
    Held-out images are never among the unlabelled ones.

Source: Chen et al., arXiv 2006.10029, section 2 (self-distillation); `train.probe.smoothing`.

Shapes: N images, H x W pixels, C channels or classes.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray

from index.embed import decode_batches
from models.command import progress
from models.encoder import Encoder
from models.images import ImageSource
from train.device import Compute
from train.errors import TrainError
from train.probe.arms import Arm, LabelBudget, LabelledImages, TrainedArm
from train.probe.classifier import Classifier, Recipe, predict, train_classifier
from train.probe.labelled import READ_BATCH, join, pixel_digests
from train.probe.options import DistilOptions
from train.probe.smoothing import smooth, whitened_vectors


def read_unlabelled(
    source: ImageSource, encoder: Encoder, *, limit: int, without: LabelledImages, seed: int
) -> NDArray[np.uint8]:
    """Read images and no labels, (N, H, W, C) uint8.

    Args:
        source: where they are.
        encoder: whose preprocessing is applied.
        limit: how many at most; which, is drawn.
        without: images that must not be among them.
        seed: of the draw.

    Raises:
        SourceError: the source is damaged.
        TrainError: none can be used.
    """
    total = sum(1 for _ in source.records())
    drawn = frozenset(np.random.default_rng(seed).permutation(total)[:limit].tolist())
    records = (record for number, record in enumerate(source.records()) if number in drawn)
    unwanted = set(pixel_digests(without.images_NHWC))
    kept = []
    batches = decode_batches(records, encoder, batch_size=READ_BATCH)
    for batch in progress(batches, what="unlabelled images", total=len(drawn), size=len):
        is_wanted = [digest not in unwanted for digest in pixel_digests(batch.images_NHWC)]
        kept.append(batch.images_NHWC[np.array(is_wanted, bool)])
    if not sum(map(len, kept)):
        raise TrainError(
            source.uri, expected="images beside those held out", found="none",
            mend="name another source as --unlabelled",
        )  # fmt: skip
    return join(kept)


def train_student(
    name: str,
    teacher: TrainedArm,
    budget: LabelBudget,
    unlabelled_NHWC: NDArray[np.uint8],
    options: DistilOptions,
    compute: Compute,
) -> TrainedArm:
    """Let a trained arm teach a copy of itself, for every seed.

    Raises:
        UsageError: the readout has more dimensions than can be whitened.
        ExportError: the teacher's features do not vary.
    """
    recipe = student_recipe(teacher.chosen, options)
    students = {}
    for seed, taught in progress(
        teacher.by_seed.items(), what=name, total=len(teacher.by_seed), unit="seed"
    ):
        labelled = budget.by_seed[seed]
        images_NHWC = np.concatenate([labelled.images_NHWC, unlabelled_NHWC])
        targets_NC = make_targets(
            taught, images_NHWC, labelled.labels_N, options, compute,
            is_mirrored=recipe.flip_probability > 0,
        )  # fmt: skip
        students[seed] = copy.deepcopy(taught)
        train_classifier(
            students[seed], images_NHWC, targets_NC, recipe, seed=seed, compute=compute
        )
    note = f"taught by '{teacher.arm.name}' on {len(unlabelled_NHWC):,} unlabelled images"
    arm = Arm(name=name, make=teacher.arm.make, recipes=(recipe,), note=note)
    return TrainedArm(arm=arm, chosen=recipe, tried=(), by_seed=students)


def make_targets(
    teacher: Classifier,
    images_NHWC: NDArray[np.uint8],
    labels_N: NDArray[np.int64],
    options: DistilOptions,
    compute: Compute,
    *,
    is_mirrored: bool,
) -> NDArray[np.float32]:
    """Say how likely each class is for every image, (N, C).

    Args:
        teacher: what says so.
        images_NHWC: the labelled ones first.
        labels_N: of the labelled ones.
        options: of smoothing and sharpening.
        compute: where the teacher computes.
        is_mirrored: whether it is asked for mirror images, too.
    """
    views = [images_NHWC, images_NHWC[:, :, ::-1]][: 1 + is_mirrored]
    said = (_softmax(predict(teacher, view, compute)) for view in views)
    chances_NC = np.mean(list(said), axis=0).astype(np.float32)
    chances_NC[: len(labels_N)] = np.eye(chances_NC.shape[1])[labels_N]
    smoothed_NC = smooth(
        chances_NC,
        whitened_vectors(teacher.graph, images_NHWC),
        neighbours=options.neighbours,
        share=options.smoothing,
    )
    likeliest_N1 = smoothed_NC.max(axis=1, keepdims=True)  # 1 stays 1 to any power
    sharp_NC = (np.maximum(smoothed_NC, 0) / likeliest_N1) ** (1 / options.temperature)
    sharp_NC[: len(labels_N)] = np.eye(chances_NC.shape[1])[labels_N]
    return np.asarray(sharp_NC / sharp_NC.sum(axis=1, keepdims=True), np.float32)


def student_recipe(taught: Recipe, options: DistilOptions) -> Recipe:
    """Give the student's recipe: augmentation and decay of its teacher's, the rest its own."""
    return Recipe(
        epochs=options.epochs,
        batch_size=options.batch_size,
        optimizer="adamw",
        lr_head=options.lr,
        lr_backbone=options.lr,
        weight_decay=taught.weight_decay,
        schedule="cosine",
        warmup_share=taught.warmup_share,
        label_smoothing=0.0,
        smallest_crop=options.smallest_crop,
        flip_probability=taught.flip_probability,
        head_c=None,
        freezes_batch_norm=False,
    )


def _softmax(scores_NC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn logits into probabilities."""
    return np.asarray(torch.softmax(torch.from_numpy(scores_NC), dim=1).numpy())
