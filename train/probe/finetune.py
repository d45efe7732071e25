"""`python -m train.probe finetune`: few labels, pretrained against from scratch.

Rules:
    Each arm has chosen its settings, and every seed is trained, before a test image is read.

Source: Zbontar et al., arXiv 2103.03230, section 3.2, whose recipe is `--preset paper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.bundle import Json
from models.images import ImageSource, open_source
from train.probe.labelled import LabelledSet, count_labelled, pixel_digests, read_labelled
from train.probe.opening import opened_on_device, require_weights
from train.probe.options import FewLabelsOptions, FinetuneOptions
from train.probe.report import ProbeReport, command_line, notes_of, score_classes, show
from train.run import describe_environment

if TYPE_CHECKING:
    from train.device import Compute
    from train.probe.arms import LabelBudget, LabelledImages, TrainedArm
    from train.probe.few_labels import LabelDraw
    from train.probe.pretrained import Pretrained
    from train.probe.probed import Probed

FROM_SCRATCH = "from scratch"
STUDENTS = {
    "self-distilled": "frozen, linear layer",
    "from scratch, self-distilled": FROM_SCRATCH,
}
"""Teachers by student: what both have of the unlabelled images is the same."""

CROPS_OF = "the square that preprocessing cuts from the middle, not the whole photograph"
"""For the report; the paper crops the photograph."""

SAMPLE_IMAGES = 2_000
"""For the BatchNorm statistics of a bundle's network."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """All that there is before a test image is read.

    Attributes:
        arms: those that were trained, the first of them judged.
        budget: the labelled images of each seed, and those that settings were chosen on.
        images: all of them.
        draw: which labels are used for what.
        unlabelled_digests: a hash of the pixels of each unlabelled image; None without any.
    """

    arms: list[TrainedArm]
    budget: LabelBudget
    images: LabelledSet
    draw: LabelDraw
    unlabelled_digests: frozenset[bytes] | None = None


def main(options: FinetuneOptions) -> None:
    """Train all arms, measure, print and write."""
    require_weights(options.run)
    where = str(options.run)
    with opened_on_device(where, options, precision=options.precision) as (probed, compute):
        report = evaluate_finetune(options, probed, compute)
    show(report, as_json=options.json, out=options.out)


def evaluate_finetune(options: FinetuneOptions, probed: Probed, compute: Compute) -> ProbeReport:
    """Choose and train; then read the test images, and count.

    Raises:
        SourceError: a source is missing or damaged.
        TrainError: there are too few labels, more images than memory holds, or nothing trains.
    """
    from train.probe.arms import difference, score_arms
    from train.probe.pretrained import read_pretrained

    test_source = open_source(options.test)  # a misspelt name ends it now, not at the end
    beside, unlabelled = [(test_source, count_labelled(test_source))], None
    if options.unlabelled is not None:
        unlabelled = open_source(options.unlabelled)
        n = min(options.distil.images, sum(1 for _ in unlabelled.records()))
        beside.append((unlabelled, n))
    with_layers = options.baselines or unlabelled is not None  # one of them teaches
    pretrained = probed.pretrained or read_pretrained(options.run)
    trained = train_arms(
        options, probed, pretrained, compute, with_layers=with_layers, beside=beside
    )
    settings = describe_settings(options, compute)
    if unlabelled is not None:
        trained = train_students(options, probed, unlabelled, trained, compute)
        settings |= {"unlabelled": unlabelled.uri, "distil": {**asdict(options.distil)}}
    test = read_test(test_source, probed, trained.images)
    rows, scores_NC = score_arms(trained.arms, labelled_images(test), compute)
    against = next((row for row in rows if row.name == FROM_SCRATCH), None)
    return ProbeReport(
        kind="finetune",
        command=command_line(),
        encoder=probed.description,
        images=describe_images(trained),
        test={**test.describe()},
        split=describe_split(options, trained),
        settings=settings,
        seeds=options.seeds,
        rows=rows,
        difference=None if against is None else difference(rows[0], against),
        against=None if against is None else against.name,
        per_class=score_classes(scores_NC, test.labels_N, test.class_names),
        notes=notes_of(trained.images, test, trained.unlabelled_digests),
        environment=describe_environment(),
    )


def train_arms(
    options: FewLabelsOptions,
    probed: Probed,
    pretrained: Pretrained,
    compute: Compute,
    *,
    with_layers: bool,
    beside: Sequence[tuple[ImageSource, int]] = (),
) -> Trained:
    """Draw the labels, let each arm choose, and train it on every seed.

    `with_layers` adds those of a linear layer alone; `beside` are the images, so many of each
    source, that have to fit in memory beside the labelled ones.

    Raises:
        SourceError: the source is missing or damaged.
        TrainError: there are too few labels, more images than memory holds, or nothing trains.
    """
    from train.probe.arms import train_arm
    from train.probe.few_labels import make_arms, make_layer_arms, read_budget

    budget, images, draw = read_budget(options, probed.encoder, beside)
    given = options, pretrained, len(images.class_names), sample_of(images)
    arms = make_arms(*given)
    if with_layers:
        arms += make_layer_arms(*given)
    trained = [train_arm(arm, budget, compute) for arm in arms]
    return Trained(arms=trained, budget=budget, images=images, draw=draw)


def train_students(
    options: FinetuneOptions,
    probed: Probed,
    unlabelled: ImageSource,
    trained: Trained,
    compute: Compute,
) -> Trained:
    """Let the frozen network with its layer teach the network, and that from scratch itself.

    The first student becomes the first arm, the others the last.

    Raises:
        SourceError, TrainError: there are no unlabelled images.
    """
    from train.probe.distil import read_unlabelled, train_student

    unlabelled_NHWC = read_unlabelled(
        unlabelled,
        probed.encoder,
        limit=options.distil.images,
        without=trained.budget.held_out,
        seed=options.seeds[0],
    )
    teachers = {arm.arm.name: arm for arm in trained.arms}
    students = [
        train_student(
            student, teachers[teacher], trained.budget, unlabelled_NHWC, options.distil, compute
        )
        for student, teacher in STUDENTS.items()
        if teacher in teachers
    ]
    return replace(
        trained,
        arms=[students[0], *trained.arms, *students[1:]],
        unlabelled_digests=frozenset(pixel_digests(unlabelled_NHWC)),
    )


def sample_of(images: LabelledSet) -> NDArray[np.uint8]:
    """Give a sample of the images that were read, spread over them."""
    assert images.images_NHWC is not None, "images were asked for"
    rows = np.linspace(0, len(images) - 1, min(len(images), SAMPLE_IMAGES)).astype(np.int64)
    return images.images_NHWC[rows]


def read_test(source: ImageSource, probed: Probed, train: LabelledSet) -> LabelledSet:
    """Read the test images; not before everything is trained."""
    return read_labelled(
        source,
        [],
        preprocess_for=probed.encoder,
        what="test images",
        class_names=train.class_names,
        with_images=True,
    )


def describe_images(trained: Trained) -> dict[str, Json]:
    """Say which training images were read, and how many of them taught."""
    counts = {str(seed): len(images) for seed, images in trained.budget.by_seed.items()}
    return {**trained.images.describe(), "labels_by_seed": {**counts}}


def describe_split(options: FewLabelsOptions, trained: Trained) -> dict[str, Json]:
    """Say what settings were chosen on."""
    return {
        "how": trained.draw.how,
        "validation": options.validation,
        "seed": options.seeds[0],
        "fitted_on": len(trained.budget.fitted),
        "held_out": len(trained.budget.held_out),
    }


def describe_settings(options: FewLabelsOptions, compute: Compute) -> dict[str, Json]:
    """Say how all arms were trained, and in which arithmetic."""
    from train.probe.few_labels import describe_recipe

    return {
        **describe_recipe(options),
        "crops_of": CROPS_OF,
        "device": str(compute.device),
        "precision": compute.precision,
    }


def labelled_images(images: LabelledSet) -> LabelledImages:
    """Give images and labels alone."""
    from train.probe.arms import LabelledImages

    assert images.images_NHWC is not None, "images were asked for"
    return LabelledImages(pool_NHWC=images.images_NHWC, labels_N=images.labels_N)
