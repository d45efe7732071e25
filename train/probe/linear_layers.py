"""Linear layers on frozen features: the encoder's, its untrained twin's, and those of pixels.

Rules:
    The encoder is frozen and in eval mode; its features are computed once.
    C is chosen on images held out of the training images, then the layer is fitted on all of
    them; every candidate has a C of its own. Test images are read by `read_test`, which the
    caller calls when all layers are fitted.

Shapes: N images, D dimensions, C classes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from index.evaluation.baselines import Whitening
from models.bundle import Json
from models.encoder import Encoder
from models.images import ImageSource, open_source
from train.probe.augment import augmented_features
from train.probe.labelled import (
    LabelledSet,
    count_labelled,
    hold_out,
    read_labelled,
    record_classes,
    require_classes,
    require_memory,
    require_pair,
)
from train.probe.options import LinearOptions
from train.probe.probed import Probed, RunEncoder
from train.probe.report import ProbeRow, Spread, score
from train.probe.softmax import CChoice, SoftmaxModel, choose_c, counting, fit_softmax
from train.probe.softmax_sgd import fit_sgd

RANDOM_ROW = "random encoder"

AUGMENTED_AREA = (0.08, 1.0)
"""Of the crops that `--augment` makes: the paper's, which are torchvision's."""

log = logging.getLogger("horace")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to put a linear layer on.

    Attributes:
        name: of the row.
        dim: of the features.
        features: of a set of images, (N, D) float32.
        augmented: features of an epoch's random views of the training images; None where
            they are the same in every epoch.
        note: of the row.
    """

    name: str
    dim: int
    features: Callable[[LabelledSet], NDArray[np.float32]]
    augmented: Callable[[int], Tensor] | None
    note: str


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A candidate with its layer."""

    candidate: Candidate
    model: SoftmaxModel
    choice: CChoice | None
    fit_s: float


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of all candidates, and the images they learned from."""

    train: LabelledSet
    fitted: list[Fitted]


def fit_layers(
    options: LinearOptions,
    probed: Probed,
    rows: NDArray[np.int64] | None = None,
    class_names: Sequence[str] | None = None,
) -> Layers:
    """Read the training images, as `read_train` does, and fit every candidate's layer.

    Raises:
        SourceError: the source is missing or damaged.
        TrainError: what is read has not two classes, more images are to be kept than memory
            holds, or features are not finite.
    """
    return _fit_all(options, probed, read_train(options, probed, rows, class_names))


def fit_seeds(
    options: LinearOptions,
    probed: Probed,
    train: LabelledSet,
    rows_by_seed: Mapping[int, NDArray[np.int64]],
) -> list[Layers]:
    """Fit every candidate's layer on each seed's rows of what was read.

    Raises:
        TrainError: the rows of a seed have not two classes, or features are not finite.
    """
    made: list[Layers] = []
    for rows in rows_by_seed.values():
        part = train.take(np.flatnonzero(np.isin(train.rows_N, rows)))
        made.append(_fit_all(options, probed, part, first=made[0] if made else None))
    return made


def read_train(
    options: LinearOptions,
    probed: Probed,
    rows: NDArray[np.int64] | None = None,
    class_names: Sequence[str] | None = None,
) -> LabelledSet:
    """Read the training images, all or some rows of them.

    Without `class_names` the classes are those that occur in what is read.

    Raises:
        SourceError: the source is missing or damaged.
        TrainError: no image can be used, or more are to be kept than memory holds.
    """
    source = open_source(options.images)
    if rows is None and options.solver == "lbfgs":
        require_pair(options.images, record_classes(source)[1])
    if options.augment:
        n = count_labelled(source) if rows is None else len(rows)
        require_memory(probed.encoder.preprocessing, (source, n))
    return read_labelled(
        source,
        _encoders(options, probed),
        preprocess_for=probed.encoder,
        what="training images",
        class_names=class_names,
        rows=rows,
        with_pixels=options.baselines,
        with_images=options.augment,
    )


def read_test(
    options: LinearOptions,
    probed: Probed,
    train: LabelledSet,
    source: ImageSource,
    *,
    with_images: bool = False,
) -> LabelledSet:
    """Read the test images; not before every layer is fitted."""
    return read_labelled(
        source,
        _encoders(options, probed),
        preprocess_for=probed.encoder,
        what="test images",
        class_names=train.class_names,
        with_pixels=options.baselines,
        with_images=with_images,
    )


def measure(
    options: LinearOptions, layers: Layers, test: LabelledSet
) -> tuple[list[ProbeRow], NDArray[np.float64]]:
    """Count what each layer gets right.

    Returns:
        The rows, and the (N, C) scores of the first.
    """
    rows, first = [], None
    for one in layers.fitted:
        features_ND = torch.from_numpy(np.ascontiguousarray(one.candidate.features(test)))
        scores_NC = np.asarray(one.model.scores(features_ND).numpy())
        first = scores_NC if first is None else first
        rows.append(_row(one, scores_NC, test))
    if options.baselines and all(row.name != RANDOM_ROW for row in rows):
        note = "none: the bundle has no random.onnx, or the encoder is a server's"
        rows.append(ProbeRow(name=RANDOM_ROW, dim=None, top1=None, top5=None, chosen={}, note=note))
    assert first is not None, "the encoder is always a candidate"
    return rows, first


def measure_seeds(
    options: LinearOptions, layers: Sequence[Layers], test: LabelledSet
) -> tuple[list[ProbeRow], NDArray[np.float64]]:
    """Count what the layers of each seed get right.

    Returns:
        The rows, over seeds, with what was chosen at the first; and the (N, C) scores of the
        first row at the first seed.
    """
    by_seed = [measure(options, one, test) for one in layers]
    rows = []
    for same in zip(*(rows for rows, _ in by_seed), strict=True):
        top1, top5 = [row.top1 for row in same], [row.top5 for row in same]
        rows.append(replace(same[0], top1=_over_seeds(top1), top5=_over_seeds(top5)))
    return rows, by_seed[0][1]


def candidates(
    options: LinearOptions, encoders: list[Encoder], train: LabelledSet
) -> list[Candidate]:
    """List what is measured: the encoder, and the baselines on request."""
    notes = ("", "the same network and readout, untrained")
    found = []
    for i, (encoder, name) in enumerate(zip(encoders, ("encoder", RANDOM_ROW), strict=False)):
        augmented = _augmented(encoder, train, options.seed) if options.augment else None
        found.append(
            Candidate(
                name=name,
                dim=encoder.dim,
                features=lambda images, i=i: images.features[i],  # type: ignore[misc]  # bound now
                augmented=augmented,
                note=notes[i],
            )
        )
    if not options.baselines:
        return found
    assert train.pixels_NP is not None, "pixels were asked for"
    whitening = Whitening.fit(train.pixels_NP)
    return [
        *found,
        Candidate(
            name="whitened pixels",
            dim=whitening.weights_PD.shape[1],
            features=lambda images: whitening(_pixels(images)),
            augmented=None,
            note="PCA, fitted on the training images without their labels",
        ),
        Candidate(
            name="raw pixels",
            dim=train.pixels_NP.shape[1],
            features=lambda images: _pixels(images).astype(np.float32),
            augmented=None,
            note="",
        ),
    ]


def fit(
    candidate: Candidate,
    train: LabelledSet,
    options: LinearOptions,
    choice: CChoice | None = None,
) -> Fitted:
    """Choose C on held-out images, and fit on all; or follow the paper's recipe.

    A `choice` of C that was made before is kept.
    """
    start_s = time.monotonic()
    features_ND = torch.from_numpy(np.ascontiguousarray(candidate.features(train)))
    labels_N = torch.from_numpy(train.labels_N)
    n_classes = len(train.class_names)
    if options.solver == "lbfgs":
        if choice is None:
            kept, held = (torch.from_numpy(rows) for rows in split_of(options, train))
            choice = choose_c(
                features_ND[kept],
                labels_N[kept],
                features_ND[held],
                labels_N[held],
                n_classes=n_classes,
                grid=options.c,
                what=candidate.name,
            )
        log.info("fitting a layer on %s with C %g", candidate.name, choice.c)
        with counting(f"fitting a layer on {candidate.name}", unit="step") as count:
            model = fit_softmax(
                features_ND, labels_N, n_classes=n_classes, c=choice.c, after_step=lambda: count(1)
            )
    else:
        model = fit_sgd(
            candidate.augmented or (lambda epoch: features_ND),
            labels_N,
            n_classes=n_classes,
            epochs=options.sgd.epochs,
            lr=options.sgd.lr,
            batch_size=options.sgd.batch_size,
            weight_decay=options.sgd.weight_decay,
            seed=options.seed,
            what=candidate.name,
        )
    return Fitted(candidate=candidate, model=model, choice=choice, fit_s=time.monotonic() - start_s)


def split_of(
    options: LinearOptions, train: LabelledSet
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the training images into those fitted on while C is chosen, and those held out."""
    return hold_out(train.labels_N, share=options.val_share, seed=options.seed)


def _fit_all(
    options: LinearOptions, probed: Probed, train: LabelledSet, first: Layers | None = None
) -> Layers:
    """Fit every candidate's layer on all that is given, with the C of the first where there is one.

    Raises:
        TrainError: there are not two classes, or features are not finite.
    """
    require_classes(options.images, [train.class_names[n] for n in np.unique(train.labels_N)])
    if first is None and options.solver == "lbfgs":
        require_pair(options.images, train.labels_N)
    found = candidates(options, _encoders(options, probed), train)
    choices = [None] * len(found) if first is None else [one.choice for one in first.fitted]
    return Layers(
        train=train,
        fitted=[
            fit(candidate, train, options, choice)
            for candidate, choice in zip(found, choices, strict=True)
        ],
    )


def _over_seeds(spreads: Sequence[Spread | None]) -> Spread | None:
    """Make one figure of one a seed; None where it could not be had."""
    values = [value for spread in spreads if spread is not None for value in spread.values]
    return Spread.of(values) if values else None


def _augmented(encoder: Encoder, train: LabelledSet, seed: int) -> Callable[[int], Tensor]:
    """Give a function from an epoch to the features of that epoch's crops and flips."""
    assert isinstance(encoder, RunEncoder), "of others `--augment` is refused before"
    assert train.images_NHWC is not None, "images were asked for"
    return augmented_features(encoder, train.images_NHWC, crop_area=AUGMENTED_AREA, seed=seed)


def _pixels(images: LabelledSet) -> NDArray[np.uint8]:
    """Give the reduced pixels."""
    assert images.pixels_NP is not None, "pixels were asked for"
    return images.pixels_NP


def _encoders(options: LinearOptions, probed: Probed) -> list[Encoder]:
    """List what embeds the images: the encoder, and its twin where there is one."""
    if not options.baselines or probed.twin is None:
        return [probed.encoder]
    return [probed.encoder, probed.twin]


def _row(one: Fitted, scores_NC: NDArray[np.float64], test: LabelledSet) -> ProbeRow:
    """Make a row of the table."""
    found = score(scores_NC, test.labels_N)
    chosen: dict[str, Json] = {}
    if one.choice is not None:
        tried: list[Json] = [[c, top1] for c, top1 in one.choice.tried]
        chosen = {"C": one.choice.c, "val_top1": one.choice.top1, "tried": tried}
        chosen |= {"gradient": one.model.gradient_max}
    chosen |= {"iterations": one.model.iterations, "fit_s": round(one.fit_s, 1)}
    return ProbeRow(
        name=one.candidate.name,
        dim=one.candidate.dim,
        top1=Spread.of([found.top1]),
        top5=Spread.of([found.top5]),
        chosen=chosen,
        note=one.candidate.note,
    )
