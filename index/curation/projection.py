"""Vectors in two dimensions: by PCA, or by PaCMAP where the extra `map` is installed.

Source of PaCMAP: Wang, Huang, Rudin and Shaposhnik, Understanding How Dimension Reduction Tools
Work (arXiv 2012.04456).

Shapes: N vectors, D dimensions, K neighbours, R rows of a sample.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from index.errors import CollectionError
from index.knn import EUCLIDEAN, knn_search

SAMPLE = 1000
FEWEST_FOR_PACMAP = 12
"""Of fewer vectors it has no neighbours and others to tell apart."""


def project(vectors_ND: NDArray[np.float32], method: str, *, seed: int) -> NDArray[np.float32]:
    """Give each vector a place, (N, 2) float32, with the larger spread across.

    Args:
        vectors_ND: (N, D) float32.
        method: `pca` or `pacmap`.
        seed: of what is drawn; PCA draws nothing.

    Raises:
        CollectionError: the method's extra is not installed.
    """
    if method == "pacmap" and len(vectors_ND) >= FEWEST_FOR_PACMAP:
        return _pacmap(vectors_ND, seed)
    return _pca(vectors_ND)


def _pca(vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Take the two directions of the largest variance; the larger end points right and up."""
    mean_D = vectors_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred_ND = vectors_ND - mean_D
    _, axes_DD = np.linalg.eigh((centred_ND.T @ centred_ND).astype(np.float64))
    axes_D2 = axes_DD[:, :-3:-1]
    largest = np.abs(axes_D2).argmax(axis=0)
    axes_D2 = axes_D2 * np.sign(axes_D2[largest, np.arange(axes_D2.shape[1])])
    places = np.zeros((len(vectors_ND), 2), np.float32)
    places[:, : axes_D2.shape[1]] = centred_ND @ axes_D2.astype(np.float32)
    return places


def _pacmap(vectors_ND: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Run PaCMAP, which begins with a PCA of its own."""
    try:
        import pacmap
    except ImportError as error:
        raise CollectionError(
            "--method pacmap",
            expected="the extra map",
            found=f"no module {error.name}",
            mend="pip install -e '.[map]', or take --method pca",
        ) from error
    neighbours = min(10, len(vectors_ND) // 4)
    reducer = pacmap.PaCMAP(n_components=2, n_neighbors=neighbours, random_state=seed % 2**31)
    return np.asarray(reducer.fit_transform(vectors_ND, init="pca"), np.float32)


def neighbours_kept(
    places_N2: NDArray[np.float32], vectors_ND: NDArray[np.float32], k: int, *, metric: str
) -> float:
    """Give the share of the nearest among the drawn that are as near on the map.

    Of an image's k nearest by the vectors, those among its k nearest on the map; both are looked
    for among the images that are drawn, by comparing. The mean over a sample.

    Args:
        places_N2: (N, 2) float32 places of the drawn images.
        vectors_ND: (N, D) float32, theirs.
        k: neighbours, below N.
        metric: by which the vectors are compared.
    """
    rows = np.unique(np.linspace(0, len(places_N2) - 1, min(SAMPLE, len(places_N2)), dtype=int))
    places_N2, vectors_ND = np.ascontiguousarray(places_N2), np.ascontiguousarray(vectors_ND)
    _, near_RK = knn_search(vectors_ND[rows], vectors_ND, k + 1, metric=metric)
    _, on_map_RK = knn_search(places_N2[rows], places_N2, k + 1, metric=EUCLIDEAN)
    shares = [
        np.isin(near[near != row][:k], on_map[on_map != row][:k]).mean()
        for row, near, on_map in zip(rows, near_RK, on_map_RK, strict=True)
    ]
    return float(np.mean(shares))
