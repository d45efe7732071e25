"""What the network of a run makes of the images of its source: embeddings, C, neighbours.

Rules:
    Everything is computed in eval mode from the last checkpoint that can be read, on some of
    the images of the run's own source, held-out ones among them; no test set is looked at.
    The draws are the same at every call.
    C and the spectra are those of whole samples, not of one training batch: see
    `train.diagnostics` for the latter.

Shapes: N images of H x W pixels and C channels, V views of each, D dimensions, K singular
values, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from index.embed import Reject
from index.knn import knn_search
from models.command import progress
from models.images import ImageSource
from models.networks import BarlowTwins
from models.preprocess import PreprocessSpec
from models.vectors import finish_vectors
from train.backbones import build_network
from train.begin import make_worker_views
from train.checkpoint import checkpoint_file, last_whole_step, load_backbone, load_weights
from train.config import PretrainOptions
from train.data.catalogue import list_images
from train.data.memory import count_records, fit_record, load_images, pick_records
from train.device import images_at_once
from train.diagnostics import (
    correlation_summary,
    entropy_rank,
    singular_values,
    standardise,
)
from train.errors import RunError, TrainError
from train.report.facts import RunFacts
from train.run import RunDirectory
from train.trainer import view_recipes
from train.views import Normaliser, ViewRecipe, random_view
from train.views.picture import StreamViews, views_of_photographs

EMBED_BATCH = 128
SEED = 0

C_IMAGES = 1024
"""Images that C is computed from: chance correlations are then about .03."""

ZOOM_DIMS = 96
"""Dimensions of C that are shown one by one."""

WHOLE_PX = 128
"""Side at most of the picture of all of C."""

N_QUERIES = 6
N_NEIGHBOURS = 8


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some images of a run's source: (N, H, W, C) uint8, with labels (or None) and keys."""

    images_NHWC: NDArray[np.uint8]
    labels: list[str | None]
    keys: list[str]


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """The cross-correlation matrix of two views of N images.

    Attributes:
        zoom: its first rows and columns, at most `ZOOM_DIMS`, float32 in [-1, 1].
        whole: all of it, each entry the largest |C| of a block.
        diagonal_mean: of all of C.
        off_diagonal_rms: of all of C.
        images: N.
        dims: D.
    """

    zoom: NDArray[np.float32]
    whole: NDArray[np.float32]
    diagonal_mean: float
    off_diagonal_rms: float
    images: int
    dims: int


@dataclass(frozen=True, kw_only=True)
class Search:
    """An image, its nearest other images of the sample, best first, and their cosines."""

    query: int
    neighbours: list[int]
    cosines: list[float]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the network makes of the sample.

    Attributes:
        step: of the checkpoint.
        elapsed_s: training time up to it, in all sittings.
        spectra: singular values by what they are of, largest first.
        rankme: by what they are of.
        correlation: C of two random views.
        searches: by the backbone's features.
    """

    step: int
    elapsed_s: float
    spectra: dict[str, NDArray[np.float64]]
    rankme: dict[str, float]
    correlation: Correlation
    searches: list[Search]


def draw_sample(source: ImageSource, spec: PreprocessSpec, n: int, *, limit: int | None) -> Sample:
    """Read up to `n` usable images from all over a source.

    Raises:
        SourceError: the source is missing or damaged.
        TrainError: not two of the images can be used.
    """
    drawn = np.random.default_rng(SEED).permutation(count_records(source, limit=limit))
    rows = drawn[: max(n, 2)]
    images, labels, keys = [], [], []
    for record in progress(pick_records(source, rows), what="reading", total=len(rows)):
        outcome = fit_record(record, spec)
        if not isinstance(outcome, Reject):
            images.append(outcome)
            labels.append(record.label)
            keys.append(record.key)
    if len(images) < 2:
        raise TrainError(source.uri, expected="at least 2 usable images", found=str(len(images)))
    return Sample(images_NHWC=np.stack(images), labels=labels, keys=keys)


def are_others(source: ImageSource, facts: RunFacts, most: int) -> bool:
    """Say whether a source has other images than the run began with.

    Of images in memory the hash is of all pixels: where there are more than `most`, they are
    counted alone.

    Raises:
        SourceError: the source is missing or damaged.
    """
    limit, sha256 = facts.options.limit_images, facts.config.data["sha256"]
    if facts.options.data_in == "stream":
        return list_images(source, limit=limit).sha256 != sha256
    count = count_records(source, limit=limit)
    if count > most:
        return count != facts.count("images") + sum(facts.skipped.values())
    try:
        return load_images(source, facts.config.preprocessing, limit=limit).sha256 != sha256
    except TrainError:  # the run could read them
        return True


def find_out(run: RunDirectory, facts: RunFacts, sample: Sample, source: ImageSource) -> Findings:
    """Open the last checkpoint and look at the sample with it.

    Raises:
        RunError: there is no checkpoint that can be read.
        ImageError: an image of a stream has gone since it was drawn.
    """
    network, step, elapsed_s = open_network(run, facts)
    normaliser = Normaliser(
        mean=torch.tensor(facts.config.channel_mean).view(-1, 1, 1),
        std=torch.tensor(facts.config.channel_std).view(-1, 1, 1),
    )
    features_ND, z_ND = embed(network, sample.images_NHWC, normaliser.to_input, what="embedding")
    vectors = {"features": features_ND, "embeddings": z_ND}
    views = stream_views(facts.options, source, sample.keys[:C_IMAGES], seed=SEED)
    correlation = correlate(network, facts, sample.images_NHWC[:C_IMAGES], views, normaliser)
    if run.initial_file.is_file():
        load_backbone(run.initial_file, network.backbone)
        untrained_ND, _ = embed(network, sample.images_NHWC, normaliser.to_input, what="untrained")
        vectors["untrained features"] = untrained_ND
    spectra = {name: singular_values(x) for name, x in vectors.items()}
    return Findings(
        step=step,
        elapsed_s=elapsed_s,
        spectra={name: sigma_K.numpy() for name, sigma_K in spectra.items()},
        rankme={name: entropy_rank(sigma_K) for name, sigma_K in spectra.items()},
        correlation=correlation,
        searches=search(features_ND.numpy(), choose_queries(sample)),
    )


def open_network(run: RunDirectory, facts: RunFacts) -> tuple[BarlowTwins, int, float]:
    """Build the network of the last checkpoint that can be read; give its step and seconds, too.

    Raises:
        RunError: there is no checkpoint, or none can be read.
    """
    if not (step := last_whole_step(run.checkpoints)):
        raise RunError(str(run.path), expected="a checkpoint", found="none yet")
    path = checkpoint_file(run.checkpoints, step)
    state = load_weights(path)
    options = facts.options
    network = build_network(options.network, options.channels, options.image_size_px)
    try:
        network.load_state_dict(state["network"])
    except (KeyError, RuntimeError) as error:
        raise RunError(
            str(path), expected="a checkpoint of this run", found="another network's"
        ) from error
    return network.eval(), state["step"], state["elapsed_s"]


def embed(
    network: nn.Module,
    images_NHWC: NDArray[np.uint8],
    to_input: Callable[[Tensor], Tensor],
    *,
    what: str,
) -> tuple[Tensor, Tensor]:
    """Compute features and embeddings in eval mode, where a GPU is, there; float32 on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    features, embeddings = [], []
    with torch.inference_mode():
        for block in progress(_blocks(images_NHWC), what=what, total=len(images_NHWC), size=len):
            features_ND, z_ND = network(to_input(torch.from_numpy(block)).to(device))
            features.append(features_ND.float().cpu())
            embeddings.append(z_ND.float().cpu())
    return torch.cat(features), torch.cat(embeddings)


def stream_views(
    options: PretrainOptions, source: ImageSource, keys: Sequence[str], *, seed: int, each: int = 1
) -> StreamViews | None:
    """Make views of whole photographs, as the run's stream does; None where it had none.

    Raises:
        ImageError: an image cannot be read any more.
    """
    if options.data_in != "stream":
        return None
    whole = replace(options, views=replace(options.views, views_in="workers"))
    photographs = progress(map(source.load, keys), what="cutting views", total=len(keys))
    return views_of_photographs(photographs, make_worker_views(whole), seed, each=each)


def correlate(
    network: nn.Module,
    facts: RunFacts,
    images_NHWC: NDArray[np.uint8],
    views: StreamViews | None,
    normaliser: Normaliser,
) -> Correlation:
    """Compute C of two random views of some images: of the fitted ones where `views` is None."""
    generator = torch.Generator().manual_seed(SEED)

    def view_of(recipe: ViewRecipe) -> Callable[[Tensor], Tensor]:
        return lambda images: normaliser.normalise(
            random_view(normaliser.to_unit(images), recipe, generator)
        )

    if views is None:
        given = [(images_NHWC, view_of(recipe)) for recipe in view_recipes(facts.options.views)]
    else:
        given = [(view_NVHWC[:, 0], normaliser.to_input) for view_NVHWC in views]
    z1_ND, z2_ND = (
        embed(network, some_NHWC, to_input, what="embedding views")[1]
        for some_NHWC, to_input in given
    )
    return summarise_correlation(z1_ND, z2_ND)


def summarise_correlation(z1_ND: Tensor, z2_ND: Tensor) -> Correlation:
    """Compute C in blocks of rows, and keep what a picture needs of it."""
    a_ND, b_ND = standardise(z1_ND), standardise(z2_ND)
    n, dim = a_ND.shape
    side = -(-dim // WHOLE_PX)  # rows and columns of a block
    lines = []
    for start in range(0, dim, side):
        block = (a_ND[:, start : start + side].T @ b_ND / n).abs().amax(dim=0)
        padded = nn.functional.pad(block, (0, -dim % side))
        lines.append(padded.view(-1, side).amax(dim=1))
    diagonal_mean, off_diagonal_rms = correlation_summary(z1_ND, z2_ND)
    zoom = a_ND[:, :ZOOM_DIMS].T @ b_ND[:, :ZOOM_DIMS] / n
    return Correlation(
        zoom=zoom.clamp(-1, 1).numpy(),
        whole=torch.stack(lines).clamp(max=1).numpy(),
        diagonal_mean=diagonal_mean,
        off_diagonal_rms=off_diagonal_rms,
        images=n,
        dims=dim,
    )


def choose_queries(sample: Sample) -> list[int]:
    """Choose images to search for: of as many classes as there are, else any."""
    rows: dict[str | None, list[int]] = {}
    for row, label in enumerate(sample.labels):
        rows.setdefault(label, []).append(row)
    by_class = [rows[label] for label in sorted(rows, key=lambda label: label or "")]
    turns = zip_longest(*by_class)
    return [row for turn in turns for row in turn if row is not None][:N_QUERIES]


def search(features_ND: NDArray[np.float32], queries: list[int]) -> list[Search]:
    """Find each query's nearest others by cosine, exactly."""
    bank_ND = finish_vectors(features_ND)
    cosines_QK, rows_QK = knn_search(bank_ND[queries], bank_ND, min(N_NEIGHBOURS + 1, len(bank_ND)))
    searches = []
    for query, cosines, rows in zip(queries, cosines_QK, rows_QK, strict=True):
        others = [(int(r), float(c)) for r, c in zip(rows, cosines, strict=True) if r != query]
        kept = others[:N_NEIGHBOURS]
        searches.append(
            Search(query=query, neighbours=[r for r, _ in kept], cosines=[c for _, c in kept])
        )
    return searches


def _blocks(images_NHWC: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Cut the images into batches."""
    step = images_at_once(EMBED_BATCH, *images_NHWC.shape[1:3])
    for start in range(0, len(images_NHWC), step):
        yield images_NHWC[start : start + step]
