"""Fashion-MNIST by name: Debian's package, then the cache, then a checked download.

Rules:
    A download takes its place in the cache only if it is what Zalando published, by the
    SHA-256 of its decompressed content. Files that are there already are taken as they are.

Source: Xiao, Rasul and Vollgraf, Fashion-MNIST (arXiv 1708.07747), MIT licence;
https://github.com/zalandoresearch/fashion-mnist.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import logging
import os
import urllib.request
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from models.errors import SourceError
from models.files import atomic_file
from models.idx import ArraySource, read_idx

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
DOWNLOAD_TIMEOUT_S = 30.0
MAX_FILE_BYTES = 64 << 20
"""More than any of the four files takes, compressed or not."""

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}

SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "train-labels-idx1-ubyte.gz": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}
"""SHA-256 of each file's *decompressed* content: mirrors compress differently."""

log = logging.getLogger("horace")


def cache_folder() -> Path:
    """Say where downloads are kept: `$HORACE_CACHE`, or `horace` in the user's cache."""
    if own := os.environ.get("HORACE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "horace"


def open_fashion_mnist(
    split: str, *, folders: Sequence[Path] | None = None, url: str = DOWNLOAD_URL
) -> ArraySource:
    """Open a split of Fashion-MNIST, with class names as labels.

    Args:
        split: `train` (60,000 images of 28x28) or `test` (10,000).
        folders: where to look, in order; what is found nowhere is downloaded into the
            last. Debian's and the cache where None.
        url: where the files are downloaded from.

    Raises:
        SourceError: the split is unknown, a file is damaged, or the data cannot be had.
    """
    if split not in FILES:
        raise SourceError(
            f"fashion-mnist:{split}", expected="fashion-mnist:train or :test", found=repr(split)
        )
    if folders is None:
        folders = [DEBIAN_FOLDER]
        with suppress(RuntimeError):  # of a user who has no home
            folders.append(cache_folder() / "fashion-mnist")
    images, labels = (_find(name, folders, url) for name in FILES[split])
    classes = read_idx(labels, dimensions=(1,))
    if classes.max(initial=0) >= len(CLASS_NAMES):
        raise SourceError(
            f"IDX file {labels}",
            expected=f"classes 0 to {len(CLASS_NAMES) - 1}",
            found=str(classes.max()),
            mend="delete it, and it is fetched again",
        )
    names = [CLASS_NAMES[n] for n in classes]
    return ArraySource(f"fashion-mnist:{split}", split, read_idx(images, dimensions=(3,)), names)


def _find(name: str, folders: Sequence[Path], url: str) -> Path:
    """Find a file, gzipped or not, or download it into the last folder.

    Raises:
        SourceError: it is nowhere.
    """
    for folder in folders:
        for path in (folder / name, folder / name.removesuffix(".gz")):
            if path.is_file():
                return path
    target = folders[-1] / name
    try:
        _download(f"{url}/{name}", target, SHA256[name])
    except OSError as error:
        raise SourceError(
            f"fashion-mnist file {name}",
            expected=f"it in {' or '.join(map(str, folders))}, or a download from {url}",
            found=f"no file, and {error}",
            mend="run `apt-get install dataset-fashion-mnist`,"
            f" or put the four files in {folders[-1]}",
        ) from error
    return target


def _download(url: str, target: Path, sha256: str) -> None:
    """Fetch a gzipped file, check it, and put it in place in one step.

    Raises:
        OSError: it cannot be fetched or written, or is not the file it should be.
    """
    log.info("downloading %s to %s", url, target.parent)
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as reply:
            data = reply.read(MAX_FILE_BYTES)
    except http.client.HTTPException as error:
        raise OSError(f"{url} is answered by no whole HTTP ({error!r})") from error
    try:
        inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        found = hashlib.sha256(inflater.decompress(data, MAX_FILE_BYTES)).hexdigest()
    except zlib.error as error:
        raise gzip.BadGzipFile(f"{url} is not a gzip file") from error
    if found != sha256:
        raise OSError(f"{url} has SHA-256 {found}, not {sha256}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as partial:
        partial.write_bytes(data)
