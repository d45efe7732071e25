"""Training with labels: what moves, what stays, and what a recipe means."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.networks import ResNet
from train.device import Compute
from train.errors import TrainError
from train.export.graph import EncoderGraph
from train.export.readout import PooledReadout
from train.probe.arms import Arm, LabelBudget, LabelledImages, choose_recipe, train_arm, varied
from train.probe.classifier import Classifier, Recipe, lr_share, predict, train_classifier
from train.probe.few_labels import finetune_recipes, resolve, scratch_recipes
from train.probe.options import RECIPES, FinetuneOptions, RecipeOptions
from train.probe.softmax import Statistics, fit_softmax

CPU = Compute(device=torch.device("cpu"), precision="fp32")
RECIPE = Recipe(
    epochs=3, batch_size=8, optimizer="adamw", lr_head=1e-2, lr_backbone=1e-3, weight_decay=0.0,
    schedule="cosine", warmup_share=0.0, label_smoothing=0.0, smallest_crop=1.0,
    flip_probability=0.5, head_c=None, freezes_batch_norm=False,
)  # fmt: skip


def classifier_of(seed: int) -> Classifier:
    """Make a classifier of three classes with a very small network."""
    torch.manual_seed(seed)
    backbone = ResNet(layout="resnet10", width=8, in_channels=1, zero_init_residual=False)
    readout = PooledReadout(backbone.stage_dims, stages=(3, 4))
    return Classifier(EncoderGraph(backbone, readout, (0.5,), (0.25,)), 3)


def some_images(n: int, *, seed: int = 0) -> LabelledImages:
    """Draw 8 x 8 images whose class is where they are bright."""
    rng = np.random.default_rng(seed)
    labels_N = np.arange(n) % 3
    images_NHWC = rng.integers(0, 120, (n, 8, 8, 1)).astype(np.uint8)
    for number in range(3):
        images_NHWC[labels_N == number, 2 * number : 2 * number + 3] += 130
    return LabelledImages(pool_NHWC=images_NHWC, labels_N=labels_N)


def state_of(classifier: Classifier) -> dict[str, torch.Tensor]:
    """Copy all weights and statistics."""
    return {name: value.clone() for name, value in classifier.state_dict().items()}


def accuracy(scores_NC: NDArray[np.float64], images: LabelledImages) -> float:
    """Count what scores get right."""
    return float((scores_NC.argmax(axis=1) == images.labels_N).mean())


def train(classifier: Classifier, recipe: Recipe, images: LabelledImages, seed: int = 0) -> None:
    """Train on images, on the CPU."""
    train_classifier(
        classifier, images.images_NHWC, images.labels_N, recipe, seed=seed, compute=CPU
    )


def test_it_learns_and_generalises() -> None:
    """From chance to nearly all, on images that it has not seen."""
    classifier, test = classifier_of(0), some_images(60, seed=1)
    assert accuracy(predict(classifier, test.images_NHWC, CPU), test) == pytest.approx(1 / 3)
    train(classifier, replace(RECIPE, epochs=10), some_images(60))
    assert accuracy(predict(classifier, test.images_NHWC, CPU), test) > 0.8


def test_the_layer_can_start_at_its_optimum() -> None:
    """Without further training it is softmax regression on the images and their mirror images."""
    # Of this seed no feature that is nearly constant, where BatchNorm has its epsilon, weighs much.
    classifier, images = classifier_of(3), some_images(60)
    before = state_of(classifier)
    train(classifier, replace(RECIPE, epochs=0, head_c=0.1), images)
    after = state_of(classifier)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        "head.weight", "head.bias", "standardise.running_mean", "standardise.running_var"
    }  # fmt: skip
    seen = np.concatenate([images.images_NHWC, images.images_NHWC[:, :, ::-1]])
    with torch.inference_mode():
        features_ND = classifier.graph(torch.from_numpy(seen)).clone()
    labels_N = torch.from_numpy(np.tile(images.labels_N, 2))
    statistics = Statistics.of(features_ND, by_dimension=True)
    model = fit_softmax(
        features_ND, labels_N, n_classes=3, c=0.1, tolerance=1e-3, statistics=statistics
    )
    expected = model.scores(features_ND)[:60].numpy()
    found = predict(classifier, images.images_NHWC, CPU)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_statistics_stay_where_they_are_frozen(is_frozen: bool) -> None:
    """All of the network's BatchNorm statistics are those from before, or none is.

    Weights move either way.
    """
    classifier = classifier_of(0)
    before = state_of(classifier)
    train(classifier, replace(RECIPE, freezes_batch_norm=is_frozen), some_images(24))
    after = state_of(classifier)
    statistics = [
        name for name in before
        if name.startswith("graph.") and name.endswith(("running_mean", "running_var"))
    ]  # fmt: skip
    stayed = [torch.equal(before[name], after[name]) for name in statistics]
    assert len(stayed) > 10
    assert all(stayed) if is_frozen else not any(stayed)
    assert not torch.equal(before["graph.backbone.conv1.weight"],
                           after["graph.backbone.conv1.weight"])  # fmt: skip
    assert not classifier.training


def test_features_are_standardised_where_statistics_are_frozen() -> None:
    """A layer that starts at zero, too, is trained on features of mean 0 and variance 1.

    They are the features from before the first step, of the images and their mirror images.
    """
    classifier, images = classifier_of(0), some_images(60)
    seen = np.concatenate([images.images_NHWC, images.images_NHWC[:, :, ::-1]])
    with torch.inference_mode():
        features_ND = classifier.graph(torch.from_numpy(seen)).double()
    variance_D, mean_D = torch.var_mean(features_ND, dim=0, correction=0)
    train(classifier, replace(RECIPE, freezes_batch_norm=True), images)
    norm = classifier.standardise
    assert norm.running_mean is not None
    assert norm.running_var is not None
    np.testing.assert_allclose(norm.running_mean, mean_D, rtol=1e-4, atol=1e-6)
    scale_D = (norm.running_var + norm.eps).sqrt()
    varies_D = variance_D > norm.eps
    assert varies_D.sum() > 10
    np.testing.assert_allclose(scale_D[varies_D], variance_D[varies_D].sqrt(), rtol=1e-3)


def test_training_is_a_function_of_the_seed() -> None:
    """Equal seeds give equal weights to the bit; another order gives others."""
    images, states = some_images(24), []
    for seed in (5, 5, 6):
        classifier = classifier_of(0)
        train(classifier, replace(RECIPE, smallest_crop=0.6), images, seed)
        states.append(state_of(classifier))
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_learning_rates_are_functions_of_the_step() -> None:
    """Warm-up, cosine to nothing; or a fifth at 60% and again at 80%."""
    cosine = [lr_share(replace(RECIPE, warmup_share=0.2), step, 10) for step in range(10)]
    assert cosine[0] == pytest.approx(0.5)
    assert cosine[5] == pytest.approx(0.5)
    assert cosine[9] == pytest.approx(0.0245, abs=1e-3)
    drops = [lr_share(replace(RECIPE, schedule="drops"), step, 10) for step in range(10)]
    np.testing.assert_allclose(drops, [1.0] * 6 + [0.2] * 2 + [0.04] * 2)


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_both_arms_share_all_but_what_they_may_choose(preset: str) -> None:
    """Batch, optimiser, decay, schedule, augmentation and smoothing are one for both."""
    options = FinetuneOptions(run=Path("r"), images="a", test="b", preset=preset)  # type: ignore[arg-type]  # cases
    recipe = resolve(options)
    tuned, scratch = finetune_recipes(recipe), scratch_recipes(recipe)
    own = {"epochs", "lr_head", "lr_backbone", "head_c", "freezes_batch_norm", "smallest_crop"}
    for one in (*tuned, *scratch):
        assert {k: v for k, v in asdict(one).items() if k not in own} == {
            k: v for k, v in asdict(tuned[0]).items() if k not in own
        }
    crops = [{one.smallest_crop for one in recipes} for recipes in (tuned, scratch)]
    assert crops[0] == crops[1]
    assert len(scratch) >= len(tuned)


def test_what_is_given_replaces_the_presets() -> None:
    """Lists multiply; the rest comes from the preset."""
    given = RecipeOptions(lr_head=(1.0, 2.0), lr_backbone=(3.0,), epochs=(4, 5), head_c=(0.0,),
                          smallest_crop=(1.0,))  # fmt: skip
    options = FinetuneOptions(run=Path("r"), images="a", test="b", recipe=given)
    recipes = finetune_recipes(resolve(options))
    assert {(one.epochs, one.lr_head, one.head_c) for one in recipes} == {
        (4, 1.0, None), (4, 2.0, None), (5, 1.0, None), (5, 2.0, None)
    }  # fmt: skip
    assert recipes[0].batch_size == RECIPES["small"].batch_size
    assert varied(recipes) == ("epochs", "lr_head")


def a_budget() -> LabelBudget:
    """Give two seeds 24 labels each, and 30 images to choose on."""
    return LabelBudget(
        by_seed={0: some_images(24), 1: some_images(24, seed=1)},
        fitted=some_images(24),
        held_out=some_images(30, seed=2),
    )


def test_an_arm_takes_the_recipe_that_held_out_images_prefer() -> None:
    """One that learns nothing loses to one that learns; then every seed is trained with it."""
    idle = replace(RECIPE, lr_head=0.0, lr_backbone=0.0)
    good = replace(RECIPE, epochs=8)
    arm = Arm(name="arm", make=classifier_of, recipes=(idle, good, idle), note="")
    trained = train_arm(arm, a_budget(), CPU)
    assert trained.chosen == good
    assert trained.tried[0] == trained.tried[2] < trained.tried[1]
    assert list(trained.by_seed) == [0, 1]


def test_a_recipe_that_diverges_is_not_chosen() -> None:
    """Infinite outputs count as nothing; where all diverge, that is said."""
    wild = replace(RECIPE, lr_head=1e30, lr_backbone=1e30, optimizer="sgd")
    arm = Arm(name="arm", make=classifier_of, recipes=(wild, RECIPE), note="")
    tried = choose_recipe(arm, a_budget(), CPU)
    assert tried[0] == -1 < tried[1]
    with pytest.raises(TrainError, match="recipes of arm: expected one that trains, found finite"):
        choose_recipe(replace(arm, recipes=(wild, wild)), a_budget(), CPU)


def test_too_few_images_are_refused() -> None:
    """As where those that were drawn turn out to be damaged: nothing can be made of them."""
    arm = Arm(name="arm", make=classifier_of, recipes=(RECIPE, RECIPE), note="")
    with pytest.raises(TrainError) as error:
        choose_recipe(arm, replace(a_budget(), held_out=some_images(0)), CPU)
    assert str(error.value) == (
        "labelled images to choose settings on: expected at least 1 that can be used, found 0 of "
        "those that were drawn; replace the damaged ones, or give more --labels"
    )
    with pytest.raises(TrainError, match=r"of seed 0 to train on: expected at least 2 .* found 1"):
        choose_recipe(arm, replace(a_budget(), fitted=some_images(1)), CPU)
