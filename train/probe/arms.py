"""Arms of a comparison with few labels: each chooses its settings, then runs on every seed.

An arm is a way to get initial weights and a list of recipes. Every arm has the same labelled
images and the same held-out images to choose on; for each seed other labels, another start of
what starts at random, and another order are drawn, the same for every arm.

Rules:
    Settings are chosen with the labels of the first seed, on held-out images, by accuracy;
    of equals the first in the list. Then every seed trains with them on all of its labels.
    Nothing here sees a test image: `score_arms` gets what was trained, once all was chosen.

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from models.bundle import Json
from models.command import progress
from train.device import Compute
from train.errors import TrainError
from train.probe.classifier import Classifier, Recipe, predict, train_classifier
from train.probe.report import ProbeRow, Scores, Spread, score

MakeClassifier = Callable[[int], Classifier]
"""From a seed to an untrained classifier; the seed decides what starts at random."""


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images of a pool, and their classes; every part of a pool shares it.

    Attributes:
        pool_NHWC: uint8.
        labels_N: (N,) int64.
        rows_N: which images of the pool these are; all of it where None.
    """

    pool_NHWC: NDArray[np.uint8]
    labels_N: NDArray[np.int64]
    rows_N: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def images_NHWC(self) -> NDArray[np.uint8]:
        """The images, (N, H, W, C) uint8: a new copy, unless they are the whole pool."""
        return self.pool_NHWC if self.rows_N is None else self.pool_NHWC[self.rows_N]

    def take(self, rows: NDArray[np.int64]) -> LabelledImages:
        """Give some of them; no image is copied."""
        own = rows if self.rows_N is None else self.rows_N[rows]
        return LabelledImages(pool_NHWC=self.pool_NHWC, labels_N=self.labels_N[rows], rows_N=own)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: of its row.
        make: its classifier before training.
        recipes: to choose from.
        note: for the report.
    """

    name: str
    make: MakeClassifier
    recipes: tuple[Recipe, ...]
    note: str


@dataclass(frozen=True, kw_only=True)
class LabelBudget:
    """The labels that may be used.

    Attributes:
        by_seed: the labelled images of every seed.
        fitted: what recipes are tried on, with labels of the first seed alone.
        held_out: what they are judged on; none of them is in `fitted`.
    """

    by_seed: dict[int, LabelledImages]
    fitted: LabelledImages
    held_out: LabelledImages

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, the one that chooses first."""
        return tuple(self.by_seed)


@dataclass(frozen=True, kw_only=True)
class TrainedArm:
    """An arm that has chosen, with a classifier of every seed.

    Attributes:
        arm: which.
        chosen: its recipe.
        tried: held-out accuracy of every recipe, in their order.
        by_seed: trained on all the labels of a seed.
    """

    arm: Arm
    chosen: Recipe
    tried: tuple[float, ...]
    by_seed: dict[int, Classifier]


def train_arm(arm: Arm, budget: LabelBudget, compute: Compute) -> TrainedArm:
    """Choose a recipe where there are several, and train with it on every seed's labels.

    Raises:
        TrainError: no recipe gave finite outputs, or too few of the images could be used.
    """
    tried = choose_recipe(arm, budget, compute) if len(arm.recipes) > 1 else ()
    chosen = arm.recipes[int(np.argmax(tried))] if tried else arm.recipes[0]
    trained = {}
    for seed in progress(budget.seeds, what=arm.name, total=len(budget.seeds), unit="seed"):
        trained[seed] = _train(arm, chosen, seed, budget.by_seed[seed], compute)
    return TrainedArm(arm=arm, chosen=chosen, tried=tried, by_seed=trained)


def choose_recipe(arm: Arm, budget: LabelBudget, compute: Compute) -> tuple[float, ...]:
    """Give the held-out accuracy of every recipe; -1 for one that diverged.

    Raises:
        TrainError: all of them did, or too few of the images could be used.
    """
    _require_images(budget.held_out, "to choose settings on", least=1)
    found = []
    what = f"choosing for {arm.name}"
    for recipe in progress(arm.recipes, what=what, total=len(arm.recipes), unit="recipe"):
        classifier = _train(arm, recipe, budget.seeds[0], budget.fitted, compute)
        scores_NC = predict(classifier, budget.held_out.images_NHWC, compute)
        is_sound = bool(np.isfinite(scores_NC).all())
        found.append(score(scores_NC, budget.held_out.labels_N).top1 if is_sound else -1.0)
    if max(found) < 0:
        raise TrainError(
            f"recipes of {arm.name}",
            expected="one that trains",
            found="finite outputs of none",
            mend="lower the learning rates",
        )
    return tuple(found)


def score_arms(
    arms: Sequence[TrainedArm], test: LabelledImages, compute: Compute
) -> tuple[list[ProbeRow], NDArray[np.float64]]:
    """Count what every arm gets right of the test images, seed by seed.

    Returns:
        The rows, and the (N, C) scores of the first arm at the first seed.
    """
    rows, first = [], None
    for trained in arms:
        found: list[Scores] = []
        for classifier in trained.by_seed.values():
            scores_NC = predict(classifier, test.images_NHWC, compute)
            first = scores_NC if first is None else first
            found.append(score(scores_NC, test.labels_N))
        rows.append(
            ProbeRow(
                name=trained.arm.name,
                dim=None,
                top1=Spread.of([one.top1 for one in found]),
                top5=Spread.of([one.top5 for one in found]),
                chosen=_describe(trained),
                note=trained.arm.note,
            )
        )
    assert first is not None, "there is an arm and a seed"
    return rows, first


def difference(first: ProbeRow, second: ProbeRow) -> Spread:
    """Give the top-1 of one row less that of another, seed by seed."""
    assert first.top1 is not None, first.name
    assert second.top1 is not None, second.name
    pairs = zip(first.top1.values, second.top1.values, strict=True)
    return Spread.of([mine - other for mine, other in pairs])


def varied(recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """Name the settings in which recipes differ."""
    first = asdict(recipes[0])
    return tuple(name for name in first if any(asdict(one)[name] != first[name] for one in recipes))


def _train(
    arm: Arm, recipe: Recipe, seed: int, labelled: LabelledImages, compute: Compute
) -> Classifier:
    """Train one classifier."""
    _require_images(labelled, f"of seed {seed} to train on", least=2)
    classifier = arm.make(seed)
    train_classifier(
        classifier, labelled.images_NHWC, labelled.labels_N, recipe, seed=seed, compute=compute
    )
    return classifier


def _require_images(images: LabelledImages, what: str, *, least: int) -> None:
    """Refuse what damage has left too little of.

    Raises:
        TrainError: there are fewer than `least`.
    """
    if len(images) < least:
        raise TrainError(
            f"labelled images {what}",
            expected=f"at least {least} that can be used",
            found=f"{len(images)} of those that were drawn",
            mend="replace the damaged ones, or give more --labels",
        )


def _describe(trained: TrainedArm) -> dict[str, Json]:
    """Say what was chosen, of what, and how each of them did."""
    names = varied(trained.arm.recipes)

    def of(recipe: Recipe) -> dict[str, Json]:
        return {name: asdict(recipe)[name] for name in names}

    if not trained.tried:
        return {}
    tried: list[Json] = [
        {**of(recipe), "val_top1": top1}
        for recipe, top1 in zip(trained.arm.recipes, trained.tried, strict=True)
    ]
    return {**of(trained.chosen), "val_top1": max(trained.tried), "tried": tried}
