"""How well index.outliers finds images of another kind, and labels that are wrong.

Foreign images of five kinds are put, a group at a time, among training images of Fashion-MNIST, and
every score is judged by its AUROC: how often a foreign image is odder than one of the collection;
and by the share of the foreign ones that is among the oddest hundredth, where a person looks.
Groups differ in size, since an encoder that was trained on clothes puts a group of anything else
close together. The default was chosen by the kinds in `CHOSEN_BY`; the others are a check.

Labels: a share of them is replaced, by any other class or by the one that the image is most easily
confused with. The ranking of suspects is judged by average precision and by the precision of as
many as were replaced. Labels that Fashion-MNIST itself has wrong count against it.

Run from the root, after `apt-get install mate-backgrounds` and `python -m index.build --images
fashion-mnist --encoder models/shipped/fashion-mnist --out C`:
`python -m benchmarks.outliers C --out benchmarks/results/outliers.json`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.measuring import command_line
from benchmarks.photographs import DEBIAN_PHOTOS, cut_part, read_photos
from index.collection import Collection
from index.curation.outlying import SCORERS, TEMPERATURE, Surroundings, find_suspects
from index.knn import knn_search
from models.command import progress, run_command
from models.cpu import cpu_budget, cpu_name
from models.encoder import open_encoder
from models.fashion_mnist import open_fashion_mnist
from models.vectors import finish_vectors

SIDE = 28
CHOSEN_BY = ("digits", "photographs", "rotated")
LABEL_SHARE = 0.03


@dataclass(frozen=True, kw_only=True)
class OutlierBenchmarkOptions:
    """Judge the scores of index.outliers by foreign images and by wrong labels."""

    collection: tyro.conf.Positional[Path]
    """A collection of Fashion-MNIST's training images."""
    images: int = 20_000
    """So many of them, drawn by each seed."""
    sizes: tuple[int, ...] = (1, 10, 30)
    """Foreign images in a group; of groups of one there are twenty, of a kind, one at a time."""
    ks: tuple[int, ...] = (5, 20, 50, 100, 200)
    """Neighbours."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of what is drawn."""
    out: Path | None = None
    """JSON file for the result."""


Images = NDArray[np.uint8]
Garments = Callable[[int], Images]


def digits(n: int, rng: np.random.Generator, _: Garments) -> Images:
    """Handwritten digits of 8 x 8 (scikit-learn's), enlarged."""
    small = load_digits().images
    drawn = (small[rng.choice(len(small), n, replace=False)] * 15.9).astype(np.uint8)
    return np.stack([_resize(Image.fromarray(digit)) for digit in drawn])


def photographs(n: int, rng: np.random.Generator, _: Garments) -> Images:
    """Parts of landscapes, in grey."""
    photos = read_photos(DEBIAN_PHOTOS)
    parts = (cut_part(photos[rng.integers(len(photos))], rng) for _ in range(n))
    return np.stack([_resize(part.convert("L")) for part in parts])


def rotated(n: int, rng: np.random.Generator, garments: Garments) -> Images:
    """Clothes that lie on their side."""
    return np.stack([np.rot90(image, rng.choice([1, 3])) for image in garments(n)])


def letters(n: int, rng: np.random.Generator, _: Garments) -> Images:
    """Printed letters."""
    file = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"
    images = []
    for _number in range(n):
        image = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(image).text(
            (SIDE / 2, SIDE / 2), chr(rng.integers(65, 91)), fill=int(rng.integers(150, 256)),
            font=ImageFont.truetype(file, int(rng.integers(16, 27))), anchor="mm",
        )  # fmt: skip
        images.append(np.asarray(image))
    return np.stack(images)


def inverted(n: int, rng: np.random.Generator, garments: Garments) -> Images:
    """Clothes on white."""
    del rng
    return 255 - garments(n)


KINDS: Mapping[str, Callable[[int, np.random.Generator, Garments], Images]] = {
    "digits": digits,
    "photographs": photographs,
    "rotated": rotated,
    "letters": letters,
    "inverted": inverted,
}
SINGLES = 20
SHOWN = 0.01
"""The oddest of all images: what a person looks through."""


def main(options: OutlierBenchmarkOptions) -> None:
    """Measure, print, and write the result."""
    start_s = time.monotonic()
    results: dict[str, dict[str, list[float]]] = {"auroc": {}, "shown": {}}
    labels: dict[str, list[float]] = {}
    for seed in progress(options.seeds, what="seeds", total=len(options.seeds), unit="seed"):
        _measure(options, seed, results, labels)
    report = {
        "command": command_line(),
        "cpu": cpu_name(),
        "cpus": cpu_budget(),
        "versions": {
            name: version(name) for name in ("faiss-cpu", "numpy", "pillow", "scikit-learn")
        },
        "seconds": round(time.monotonic() - start_s),
        "images": options.images,
        "seeds": list(options.seeds),
        "chosen_by": list(CHOSEN_BY),
        **{
            what: {name: _spread(values) for name, values in sorted(rows.items())}
            for what, rows in results.items()
        },
        "means": {what: _means(rows) for what, rows in results.items()},
        "labels": {name: _spread(values) for name, values in sorted(labels.items())},
    }
    for what, means in report["means"].items():
        print(what)
        for name, value in means.items():
            print(f"{name:>16}  " + "  ".join(f"{k} {v:.3f}" for k, v in value.items()))
    print(json.dumps(report["labels"], indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def _measure(
    options: OutlierBenchmarkOptions,
    seed: int,
    results: dict[str, dict[str, list[float]]],
    labels: dict[str, list[float]],
) -> None:
    """Put every group among the images of a seed, and replace labels."""
    rng = np.random.default_rng(seed)
    with Collection.open(options.collection) as collection:
        drawn = np.sort(rng.permutation(collection.count)[: options.images])
        own_ND = collection.vectors(collection.ids[drawn])
        names = np.array(collection.labels())[drawn]
        encoder = open_encoder(collection.manifest.encoder)
    arrays = open_fashion_mnist("train")
    others = np.setdiff1d(np.arange(len(arrays.images)), drawn)

    def garments(n: int) -> Images:
        return arrays.images[rng.choice(others, n, replace=False)]

    k = max(options.ks)
    own_scores, own_places = knn_search(own_ND, own_ND, k + 1)
    own = (own_scores[:, 1:], own_places[:, 1:])
    for kind, draw in KINDS.items():
        images = np.ascontiguousarray(draw(max(max(options.sizes), SINGLES), rng, garments))
        foreign_FD = finish_vectors(encoder.encode(images[..., None]))
        for size in options.sizes:
            groups = [[n] for n in range(SINGLES)] if size == 1 else [range(size)]
            by_score: dict[str, list[tuple[float, float]]] = {}
            for group in groups:
                around = _surround(own_ND, own, foreign_FD[list(group)], k)
                for name, value in _judge(around, len(own_ND), options.ks).items():
                    by_score.setdefault(name, []).append(value)
            for name, values in by_score.items():
                for what, mean in zip(results, np.mean(values, axis=0), strict=True):
                    row = results[what].setdefault(f"{name}/{kind}/{size}", [])
                    row.append(float(mean))
    _judge_labels(own, names, options.ks, rng, labels)


def _surround(
    own_ND: NDArray[np.float32],
    own: tuple[NDArray[np.float32], NDArray[np.int64]],
    foreign_FD: NDArray[np.float32],
    k: int,
) -> Surroundings:
    """Find the neighbours of all, without searching again with those that were there."""
    everything_ND = np.concatenate([own_ND, foreign_FD])
    to_foreign_NF = own_ND @ foreign_FD.T
    places_F = np.arange(len(own_ND), len(everything_ND))
    scores_NC = np.concatenate([own[0], to_foreign_NF], axis=1)
    places_NC = np.concatenate([own[1], np.tile(places_F, (len(own_ND), 1))], axis=1)
    order_NK = np.argsort(-scores_NC, axis=1, kind="stable")[:, :k]
    found_scores, found_places = knn_search(foreign_FD, everything_ND, k + 1)
    scores_NK = np.concatenate([np.take_along_axis(scores_NC, order_NK, 1), found_scores[:, 1:]])
    places_NK = np.concatenate([np.take_along_axis(places_NC, order_NK, 1), found_places[:, 1:]])
    return _around(scores_NK, places_NK)


def _around(scores_NK: NDArray[np.float32], places_NK: NDArray[np.int64]) -> Surroundings:
    """Give neighbours their distances."""
    return Surroundings(
        ids=np.arange(len(scores_NK)),
        places_NK=places_NK,
        scores_NK=scores_NK,
        distances_NK=1 - scores_NK,
    )


def _judge(around: Surroundings, n_own: int, ks: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """Give the AUROC of every score with every k, and the share of the foreign that is shown."""
    is_foreign_N = np.arange(len(around.ids)) >= n_own
    found: dict[str, tuple[float, float]] = {}
    for k in ks:
        cut = _around(around.scores_NK[:, :k], around.places_NK[:, :k])
        for name, scorer in SCORERS.items():
            scores_N = scorer(cut)
            is_shown_N = np.zeros(len(scores_N), np.bool_)
            is_shown_N[np.argsort(-scores_N, kind="stable")[: round(SHOWN * len(scores_N))]] = True
            shown = float(is_shown_N[is_foreign_N].mean())
            found[f"{name} k={k}"] = (float(roc_auc_score(is_foreign_N, scores_N)), shown)
    return found


def _judge_labels(
    own: tuple[NDArray[np.float32], NDArray[np.int64]],
    names: NDArray[np.str_],
    ks: tuple[int, ...],
    rng: np.random.Generator,
    labels: dict[str, list[float]],
) -> None:
    """Replace labels, and see where they stand among the suspects."""
    classes, true_N = np.unique(names, return_inverse=True)
    confused_CC = np.zeros((len(classes), len(classes)))
    np.add.at(confused_CC, (np.repeat(true_N, 10), true_N[own[1][:, :10]].ravel()), 1)
    np.fill_diagonal(confused_CC, 0)
    is_wrong_N = rng.random(len(names)) < LABEL_SHARE
    shift_N = rng.integers(1, len(classes), len(names))
    replaced = {
        "any class": (true_N + shift_N) % len(classes),
        "the nearest class": confused_CC.argmax(axis=1)[true_N],
    }
    for how, wrong_N in replaced.items():
        given = classes[np.where(is_wrong_N, wrong_N, true_N)].tolist()
        for k in ks:
            around = _around(own[0][:, :k], own[1][:, :k])
            suspects = find_suspects(around, given, temperature=TEMPERATURE, voters=k)
            ranked = np.array([suspect.place for suspect in suspects])
            margins_N = np.full(len(names), -1.0)
            margins_N[ranked] = [suspect.margin for suspect in suspects]
            first = ranked[: int(is_wrong_N.sum())]
            row = f"{how} k={k}"
            for name, value in (
                ("average precision", average_precision_score(is_wrong_N, margins_N)),
                ("precision of as many", is_wrong_N[first].mean()),
                ("recall of all suspects", is_wrong_N[ranked].sum() / is_wrong_N.sum()),
            ):
                labels.setdefault(f"{row}, {name}", []).append(float(value))


def _means(results: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Give each score its mean over sizes and seeds, by the kinds chosen by and by the others."""
    means: dict[str, dict[str, float]] = {}
    for score in sorted({name.split("/")[0] for name in results}):
        row = {}
        for part, is_in in (("chosen by", True), ("check", False)):
            values = [
                np.mean(values)
                for name, values in results.items()
                if name.split("/")[0] == score and (name.split("/")[1] in CHOSEN_BY) == is_in
            ]
            row[part] = float(np.mean(values))
        means[score] = row
    return means


def _spread(values: list[float]) -> dict[str, float]:
    """Give the mean of the seeds and how far they lie apart."""
    return {
        "mean": round(float(np.mean(values)), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def _resize(image: Image.Image) -> Images:
    """Make an image the size of the collection's."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


if __name__ == "__main__":
    sys.exit(run_command(OutlierBenchmarkOptions, main, prog="python -m benchmarks.outliers"))
