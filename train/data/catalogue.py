"""The rows of a source that is read in any order: where each image lies, and its label.

Rules:
    Listing opens no image whose size the source knows. Of a tar only the headers and labels are
    read, once, front to back; from then on an image is one seek away.
    Only plain tars can be read in any order. A compressed shard is refused: pictures do not
    compress, and reading such shards in their order through a buffer would neither shuffle
    as well nor find its place again on resume without reading all that comes before.
    The hash covers key, label and encoded size of every image, not its pixels: what is
    replaced by another file of the same name and length is not noticed, but for a shard that
    is replaced while a run reads it.

Memory: some 400 bytes an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from models.command import progress
from models.errors import ImageError
from models.images import ImageRecord, ImageSource
from models.webdataset import TarSource
from train.data.memory import class_numbers
from train.data.reading import read_image
from train.errors import TrainError


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The images of a source by row.

    Attributes:
        records: N records, in the order of the source.
        labels_N: (N,) int64, an index into `class_names`, or -1.
        class_names: the labels that occur, sorted.
        sha256: of keys, labels and sizes.
    """

    records: Sequence[ImageRecord]
    labels_N: NDArray[np.int64]
    class_names: tuple[str, ...]
    sha256: str


def list_images(source: ImageSource, *, limit: int | None = None) -> Catalogue:
    """List the images of a source without reading them.

    Args:
        source: where the images are.
        limit: list only the first so many.

    Raises:
        SourceError: the source is missing or damaged.
        TrainError: its images cannot be read in any order, there are not two, or the storage
            fails.
    """
    if isinstance(source, TarSource):
        _refuse_compressed(source)
    digest = hashlib.sha256()
    records: list[ImageRecord] = []
    listed = islice(source.records(), limit)
    for record in progress(listed, what="listing", total=None):
        size_bytes = _size_of(record) if record.size_bytes is None else record.size_bytes
        digest.update(f"{record.key}\0{record.label}\0{size_bytes}\n".encode())
        records.append(record)
    if len(records) < 2:
        raise TrainError(
            source.uri, expected="at least 2 images", found=str(len(records)), mend="check the path"
        )
    labels_N, class_names = class_numbers([record.label for record in records])
    return Catalogue(
        records=records, labels_N=labels_N, class_names=class_names, sha256=digest.hexdigest()
    )


def _size_of(record: ImageRecord) -> int | None:
    """Read what has no size: where its storage fails for a moment, its size belongs to the hash.

    Returns:
        None where the file itself is to blame.

    Raises:
        TrainError: the storage goes on failing.
    """
    try:
        data = read_image(record)
    except ImageError:
        return None
    return len(data) if isinstance(data, bytes) else data.nbytes


def _refuse_compressed(source: TarSource) -> None:
    """Refuse shards that have no way back to an image."""
    compressed = [shard for shard in source.shards if shard.suffix != ".tar"]
    if compressed:
        raise TrainError(
            f"streaming {source.uri}",
            expected="plain .tar shards, which can be read at any place",
            found=f"{len(compressed)} compressed, such as {compressed[0].name}",
            mend="decompress them (pictures hardly shrink), or choose --data-in memory",
        )
