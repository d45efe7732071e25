"""A folder of JPEGs such as people train on, cut from a few large photographs.

Rules:
    The same photographs, number and seed give the same files. What is there already is taken
    as it is.
    Each file is a random part of a random photograph, 500 to 2,000 pixels wide, brought to
    500 x 375 and saved at a quality of 85 to 90 with 4:2:0 colour: the size and weight of
    ImageNet's median image. What the pictures show is of no use for learning; what they cost
    to decode and to change is that of real ones.

Source of the photographs: Debian's `mate-backgrounds` (`apt-get install mate-backgrounds`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from models.command import progress
from models.errors import SourceError
from models.files import atomic_directory

DEBIAN_PHOTOS = Path("/usr/share/backgrounds/mate/nature")
SIZE_PX = (500, 375)
LARGEST_PART_PX = 2000
LEAST_WIDTH_PX = 1600
QUALITIES = (85, 90)


def make_jpegs(folder: Path, count: int, *, photos: Path = DEBIAN_PHOTOS, seed: int = 0) -> Path:
    """Write `count` JPEGs into `folder`, unless it is there.

    Raises:
        SourceError: there are no photographs, or the folder holds another number of files.
    """
    if folder.exists():
        found = len(list(folder.glob("*.jpg")))
        if found != count:
            raise SourceError(
                str(folder), expected=f"{count} JPEGs", found=str(found), mend="delete it"
            )
        return folder
    originals = read_photos(photos)
    rng = np.random.default_rng(seed)
    with atomic_directory(folder) as temporary:
        for i in progress(range(count), what="cutting photographs", total=count):
            part = cut_part(originals[rng.integers(len(originals))], rng)
            quality = int(rng.integers(QUALITIES[0], QUALITIES[1] + 1))
            part.save(temporary / f"{i:05d}.jpg", quality=quality, subsampling="4:2:0")
    return folder


def read_photos(folder: Path, least_width_px: int = LEAST_WIDTH_PX) -> list[Image.Image]:
    """Load the photographs of a folder that are so wide.

    Raises:
        SourceError: there are none.
    """
    photos = []
    for path in sorted(folder.glob("*.jp*g")):
        with Image.open(path) as image:
            if image.width >= least_width_px:
                photos.append(image.convert("RGB"))
    if not photos:
        raise SourceError(
            f"photographs in {folder}",
            expected=f"JPEGs at least {least_width_px} pixels wide",
            found="none",
            mend="run `apt-get install mate-backgrounds`, or name a folder with --photos",
        )
    return photos


def cut_part(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Give a random part of a photograph at `SIZE_PX`."""
    aspect = SIZE_PX[1] / SIZE_PX[0]
    widest = min(photo.width, LARGEST_PART_PX, int(photo.height / aspect))
    width = int(rng.integers(SIZE_PX[0], widest + 1))
    height = round(width * aspect)
    left = int(rng.integers(photo.width - width + 1))
    top = int(rng.integers(photo.height - height + 1))
    box = (left, top, left + width, top + height)
    return photo.resize(SIZE_PX, Image.Resampling.LANCZOS, box=box)
