"""From options to the arms of a comparison with few labels: data, recipes, classifiers.

Rules:
    All arms have the same network, readout, labels, held-out images, batch, augmentation
    and regularisation; each has its own learning rates and its own length, and what is
    chosen, is chosen alike. What learns from unlabelled images, too, is `train.probe.distil`.
    No test image is read here.

Shapes: N images, C classes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from models.bundle import Json
from models.encoder import Encoder
from models.images import ImageSource, open_source
from train.backbones import build_backbone
from train.config import options_from_json
from train.errors import TrainError
from train.export.graph import EncoderGraph
from train.export.readout import PooledReadout
from train.probe.arms import Arm, LabelBudget, LabelledImages, MakeClassifier
from train.probe.classifier import Classifier, Recipe
from train.probe.labelled import (
    LabelledSet,
    choose_labels,
    hold_out,
    read_labelled,
    record_classes,
    require_memory,
)
from train.probe.options import RECIPES, FewLabelsOptions, RecipeOptions
from train.probe.pretrained import Pretrained, load_to_train
from train.run import RunConfig

VALIDATION_SHARE = 0.2
"""Of the labels that may be used, held out while settings are chosen."""

SHARE_OF_OTHERS = 0.5
"""At most, of the other training images, to choose settings on."""

LAYER_C = (0.01, 0.1, 1.0)
"""C of a linear layer alone, where fine-tuning has none."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LabelDraw:
    """Which labels are used for what, as numbers of labelled records.

    Attributes:
        by_seed: of every seed.
        fitted, held_out: of the choice of settings.
        how: of the held-out images, in words.
    """

    by_seed: dict[int, NDArray[np.int64]]
    fitted: NDArray[np.int64]
    held_out: NDArray[np.int64]
    how: str

    @property
    def used(self) -> NDArray[np.int64]:
        """All of them, sorted."""
        return np.unique(np.concatenate([*self.by_seed.values(), self.fitted, self.held_out]))


def draw_labels(labels_N: NDArray[np.int64], options: FewLabelsOptions) -> LabelDraw:
    """Draw the labels of every seed, and what settings are chosen on.

    Raises:
        TrainError: the share of the labels is less than one a class.
    """
    n_classes = len(np.unique(labels_N))
    n = round(options.labels * len(labels_N))
    if n < 2 * n_classes:
        raise TrainError(
            "--labels",
            expected=f"a share that gives each of {n_classes} classes two labels or more",
            found=f"{options.labels:g}, which is {n} of {len(labels_N)}",
        )
    rows = np.arange(len(labels_N))
    if options.validation == "train":
        share = min(SHARE_OF_OTHERS, options.val_images / len(labels_N))
        rows, held = hold_out(labels_N, share=share, seed=options.seeds[0])
    by_seed = {
        seed: choose_labels(labels_N, rows, n=n, balanced=options.balanced, seed=seed)
        for seed in options.seeds
    }
    first = by_seed[options.seeds[0]]
    if options.validation == "train":
        how = f"on {len(held):,} other labelled training images"
        return LabelDraw(by_seed=by_seed, fitted=first, held_out=held, how=how)
    kept, held = hold_out(labels_N[first], share=VALIDATION_SHARE, seed=options.seeds[0])
    how = f"on {len(held):,} of the {len(first):,} labels of seed {options.seeds[0]}"
    return LabelDraw(by_seed=by_seed, fitted=first[kept], held_out=first[held], how=how)


def read_budget(
    options: FewLabelsOptions, encoder: Encoder, beside: Sequence[tuple[ImageSource, int]] = ()
) -> tuple[LabelBudget, LabelledSet, LabelDraw]:
    """Read the training images that are drawn, and no others.

    Args:
        options: which are drawn.
        encoder: whose preprocessing is applied.
        beside: so many of each source that have to fit in memory beside them.

    Raises:
        SourceError: the source is missing or damaged.
        TrainError: there are too few labels, or more images than memory holds.
    """
    source = open_source(options.images)
    class_names, labels_N = record_classes(source)
    draw = draw_labels(labels_N, options)
    require_memory(encoder.preprocessing, (source, len(draw.used)), *beside)
    images = read_labelled(
        source,
        [],
        preprocess_for=encoder,
        what="training images",
        class_names=class_names,
        rows=draw.used,
        with_images=True,
    )
    assert images.images_NHWC is not None, "images were asked for"
    everything = LabelledImages(pool_NHWC=images.images_NHWC, labels_N=images.labels_N)

    def of(rows: NDArray[np.int64]) -> LabelledImages:
        """Find records among the images; one that could not be used is not there."""
        usable = rows[np.isin(rows, images.rows_N)]
        return everything.take(np.searchsorted(images.rows_N, usable))

    budget = LabelBudget(
        by_seed={seed: of(rows) for seed, rows in draw.by_seed.items()},
        fitted=of(draw.fitted),
        held_out=of(draw.held_out),
    )
    return budget, images, draw


def make_arms(
    options: FewLabelsOptions,
    pretrained: Pretrained,
    n_classes: int,
    sample_NHWC: NDArray[np.uint8],
) -> list[Arm]:
    """Give the arm that is fine-tuned and, on request, the one from scratch.

    Args:
        options: of the recipes and the readout.
        pretrained: the network.
        n_classes: how many classes there are.
        sample_NHWC: images for the statistics of a network that has none.
    """
    graph = load_to_train(pretrained, sample_NHWC, stages=options.stages, grid=options.grid)
    finetuned = Arm(
        name="fine-tuned",
        make=_from_graph(graph, n_classes),
        recipes=finetune_recipes(resolve(options)),
        note="",
    )
    if not options.baselines:
        return [finetuned]
    scratch = Arm(
        name="from scratch",
        make=_from_scratch(pretrained.config, options, n_classes),
        recipes=scratch_recipes(resolve(options)),
        note="the same network, readout and labels; what is chosen, is chosen alike",
    )
    return [finetuned, scratch]


def make_layer_arms(
    options: FewLabelsOptions,
    pretrained: Pretrained,
    n_classes: int,
    sample_NHWC: NDArray[np.uint8],
) -> list[Arm]:
    """Give the arms of a linear layer alone: on the network after pretraining, and before.

    The arguments are those of `make_arms`.
    """
    notes = {"frozen": "as pretraining left it"}
    if pretrained.untrained is not None:
        notes["random"] = "as pretraining found it"
    arms = []
    for name, note in notes.items():
        graph = load_to_train(
            pretrained, sample_NHWC, stages=options.stages, grid=options.grid,
            is_trained=name == "frozen",
        )  # fmt: skip
        arms.append(
            Arm(
                name=f"{name}, linear layer",
                make=_from_graph(graph, n_classes),
                recipes=layer_recipes(resolve(options)),
                note=f"the network {note}",
            )
        )
    return arms


def resolve(options: FewLabelsOptions) -> RecipeOptions:
    """Complete what was given of the recipe by the preset's values."""
    preset, given = RECIPES[options.preset], options.recipe
    values = {
        field.name: _first(getattr(given, field.name), getattr(preset, field.name))
        for field in fields(RecipeOptions)
    }
    return RecipeOptions(**values)  # type: ignore[arg-type]  # each is of its own field


def finetune_recipes(recipe: RecipeOptions) -> tuple[Recipe, ...]:
    """List the recipes of fine-tuning: every combination of what is listed."""
    grid = itertools.product(
        _given(recipe.epochs),
        _given(recipe.lr_head),
        _given(recipe.lr_backbone),
        _given(recipe.head_c),
        _given(recipe.smallest_crop),
    )
    return tuple(
        _recipe(
            recipe,
            epochs=epochs,
            lr_head=lr_head,
            lr_backbone=lr_backbone,
            head_c=head_c or None,
            smallest_crop=crop,
            freezes_batch_norm=_given(recipe.freeze_batch_norm),
        )
        for epochs, lr_head, lr_backbone, head_c, crop in grid
    )


def layer_recipes(recipe: RecipeOptions) -> tuple[Recipe, ...]:
    """List the recipes of the linear layer alone: every C of the fit, and no step after it."""
    given = tuple(c for c in _given(recipe.head_c) if c > 0)
    return tuple(
        _recipe(
            recipe,
            epochs=0,
            lr_head=0.0,
            lr_backbone=0.0,
            head_c=c,
            smallest_crop=1.0,
            freezes_batch_norm=True,
        )
        for c in given or LAYER_C
    )


def scratch_recipes(recipe: RecipeOptions) -> tuple[Recipe, ...]:
    """List the recipes from scratch: every length, learning rate and size of crops."""
    grid = itertools.product(
        _given(recipe.scratch_epochs), _given(recipe.scratch_lr), _given(recipe.smallest_crop)
    )
    return tuple(
        _recipe(
            recipe,
            epochs=epochs,
            lr_head=lr,
            lr_backbone=lr,
            head_c=None,
            smallest_crop=crop,
            freezes_batch_norm=False,
        )
        for epochs, lr, crop in grid
    )


def describe_recipe(options: FewLabelsOptions) -> dict[str, Json]:
    """Say how both arms are trained; lists were chosen from."""
    recipe = resolve(options)
    settings: dict[str, Json] = {
        "preset": options.preset,
        "labels": options.labels,
        "balanced": options.balanced,
        "stages": list(options.stages),
        "grid": options.grid,
    }
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        settings[field.name] = list(value) if isinstance(value, tuple) else value
    return settings


def _recipe(
    recipe: RecipeOptions,
    *,
    epochs: int,
    lr_head: float,
    lr_backbone: float,
    head_c: float | None,
    smallest_crop: float,
    freezes_batch_norm: bool,
) -> Recipe:
    """Complete a recipe by what both arms share."""
    return Recipe(
        epochs=epochs,
        lr_head=lr_head,
        lr_backbone=lr_backbone,
        head_c=head_c,
        freezes_batch_norm=freezes_batch_norm,
        batch_size=_given(recipe.batch_size),
        optimizer=_given(recipe.optimizer),
        weight_decay=_given(recipe.weight_decay),
        schedule=_given(recipe.schedule),
        warmup_share=_given(recipe.warmup_share),
        label_smoothing=_given(recipe.label_smoothing),
        smallest_crop=smallest_crop,
        flip_probability=_given(recipe.flip_probability),
    )


def _from_graph(graph: EncoderGraph, n_classes: int) -> MakeClassifier:
    """Give a function that makes a classifier of a copy of a network."""
    return lambda _: Classifier(copy.deepcopy(graph), n_classes)


def _from_scratch(config: RunConfig, options: FewLabelsOptions, n_classes: int) -> MakeClassifier:
    """Give a function that makes a classifier of the same network with new random weights."""

    def make(seed: int) -> Classifier:
        pretrain = options_from_json(config.options)
        with torch.random.fork_rng(devices=[]):  # the network starts on the CPU
            torch.manual_seed(seed)
            backbone = build_backbone(pretrain.network, pretrain.channels, pretrain.image_size_px)
        readout = PooledReadout(backbone.stage_dims, stages=options.stages, grid=options.grid)
        graph = EncoderGraph(backbone, readout, config.channel_mean, config.channel_std)
        return Classifier(graph, n_classes)

    return make


def _first(given: object, otherwise: object) -> object:
    """Give the first that is not None."""
    return otherwise if given is None else given


def _given(value: T | None) -> T:
    """Give a value that the preset has seen to."""
    assert value is not None, "every preset is complete"
    return value
