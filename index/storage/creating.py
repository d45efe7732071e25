"""Makes a collection without images, for a writer to fill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from index.ann.versions import library_versions
from index.knn import COSINE, EUCLIDEAN
from index.storage.manifest import Manifest, write_manifest
from models.bundle import Json
from models.errors import UsageError
from models.files import atomic_directory


def create_collection(
    path: Path,
    *,
    name: str,
    fingerprint: str,
    dim: int,
    encoder: str,
    preprocessing: Mapping[str, Json],
    metric: str,
) -> None:
    """Make an empty collection; see `CollectionWriter.create`.

    Raises:
        UsageError: the path exists, or dim or metric make no sense.
    """
    if metric not in (COSINE, EUCLIDEAN):
        raise UsageError("metric", expected=f"{COSINE} or {EUCLIDEAN}", found=metric)
    if dim < 1:
        raise UsageError("dim", expected="at least 1", found=str(dim))
    manifest = Manifest(
        name=name,
        fingerprint=fingerprint,
        dim=dim,
        encoder=encoder,
        preprocessing=preprocessing,
        sources={},
        segments=(),
        files={},
        versions=library_versions(),
        build={},
        metric=metric,
    )
    try:
        with atomic_directory(path) as directory:
            write_manifest(directory, manifest)
    except FileExistsError as error:
        raise UsageError(
            str(path),
            expected="a new directory",
            found="one that exists",
            mend="open it with CollectionWriter.open, or choose another name",
        ) from error
