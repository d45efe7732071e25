"""Open a source of images by one line of text.

`fashion-mnist[:train|:test]`   the 60,000 or 10,000 images, see `models.fashion_mnist`
`folder:PATH`, or a folder      images below it, labelled by folder, see `models.image_folder`
`wds:PATTERN`, or `*.tar[.gz]`  tar shards: path, glob or range, see `models.webdataset`
`idx:IMAGES[,LABELS]`           IDX files, see `models.idx`

A path may start with `~`, which shells leave alone behind a colon.

What a source gives is in `models.image_source`; importing this module loads no torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from models.errors import SourceError
from models.fashion_mnist import open_fashion_mnist
from models.idx import open_idx
from models.image_folder import FolderSource, passed_over
from models.image_source import ImageData, ImageRecord, ImageSource
from models.webdataset import SHARD_NAME, TarSource

__all__ = [
    "ImageData",
    "ImageRecord",
    "ImageSource",
    "describe_ignored",
    "open_source",
]

KINDS = "fashion-mnist[:train|:test], folder:PATH, wds:PATTERN or idx:IMAGES[,LABELS]"


def open_source(spec: str) -> ImageSource:
    """Open the source that `spec` names.

    Args:
        spec: one of `KINDS`, or the path of a folder, or the path or pattern of tar shards.

    Raises:
        SourceError: nothing is named so, or it cannot be opened.
    """
    kind, _, rest = spec.partition(":")
    rest = ",".join(map(os.path.expanduser, rest.split(",")))
    if kind == "fashion-mnist":
        return open_fashion_mnist(rest or "train")
    if kind == "folder" and rest:
        return FolderSource(Path(rest))
    if kind == "wds" and rest:
        return TarSource(rest)
    if kind == "idx" and rest:
        images, _, labels = rest.partition(",")
        return open_idx(Path(images), Path(labels) if labels else None)
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        return FolderSource(Path(path))
    if SHARD_NAME.search(path):
        return TarSource(path)
    raise SourceError(
        f"images {spec!r}",
        expected=KINDS,
        found="a file" if os.path.exists(spec) else "nothing of that name",
        mend="check the path, or say what it is with one of these forms",
    )


def describe_ignored(source: ImageSource) -> str | None:
    """Say which files a source passes over, or None: `12 files passed over: 9 .heic, 3 .avif`.

    A folder alone has such files.

    Raises:
        SourceError: the folder cannot be listed, or holds no image.
    """
    counts = source.ignored_by_suffix if isinstance(source, FolderSource) else {}
    return passed_over(counts) if counts else None
