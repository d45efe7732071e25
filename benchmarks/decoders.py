"""Compare JPEG decoders on real photographs: speed, reduced-scale decoding, agreement.

Photographs are cropped to 3:2 (and 4:3) and resized to 3000 x 2000 and 500 x 375, saved as
JPEG of quality 90 with 4:2:0 colour in memory, and brought to a square of 224 and of 64
pixels by every candidate: decode, resize the shorter side with antialiasing, cut the centre.
Candidates take turns within every repeat, so that a noisy moment hits all of them; each
repeat works through all photographs once and gives one figure, milliseconds of CPU time an
image: all run on one thread, and other programs' load should not count.

Agreement is measured against one reference for all: the full decode by libjpeg-turbo,
resized by Pillow's antialiased bilinear filter in one step.

By default the photographs are those of Debian's `mate-backgrounds`
(`apt-get install mate-backgrounds`); any folder of large JPEGs will do.

Run from the root: `python -m benchmarks.decoders --out benchmarks/results/decoders.json`.
"""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, features

from benchmarks.measuring import command_line, turns
from benchmarks.photographs import DEBIAN_PHOTOS, read_photos
from models.command import progress, run_command
from models.cpu import cpu_name
from models.errors import UsageError
from models.jpeg import reduction
from models.preprocess import PreprocessSpec, preprocess

try:
    import cv2
except ModuleNotFoundError:
    cv2 = None  # `main` says so in one line

Pixels = NDArray[np.uint8]
Candidate = Callable[[bytes, int], Pixels]

LEAST_WIDTH_PX = 2000
SIZES = ((3000, 2000), (500, 375))
TARGETS = (224, 64)
QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare Pillow, simplejpeg and OpenCV as the decoder of JPEGs."""

    photos: Path = DEBIAN_PHOTOS
    """Folder of photographs, of which those at least 2000 pixels wide are taken."""

    repeats: int = 15
    """How often every candidate works through all photographs."""

    out: Path | None = None
    """Where to write the figures as JSON."""


def centre_box(width: float, height: float) -> tuple[float, float, float, float]:
    """Give the central square of an image."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def pillow_resize(
    image: Image.Image,
    target: int,
    *,
    size: tuple[float, float] | None = None,
    gap: float | None = None,
) -> Pixels:
    """Resize the central square with Pillow's antialiased bilinear filter.

    `size` is how much of the image a reduced picture fills: 187.5 of 188 rows.
    """
    box = centre_box(*(size or image.size))
    bilinear = Image.Resampling.BILINEAR
    return np.asarray(image.resize((target, target), bilinear, box=box, reducing_gap=gap))


def cv2_resize(pixels: Pixels, target: int) -> Pixels:
    """Resize the central square by averaging areas, OpenCV's antialiased way down."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    return np.asarray(cv2.resize(square, (target, target), interpolation=cv2.INTER_AREA), np.uint8)


def pillow_full(data: bytes, target: int) -> Pixels:
    """Pillow."""
    return pillow_resize(Image.open(io.BytesIO(data)).convert("RGB"), target)


def pillow_draft(data: bytes, target: int) -> Pixels:
    """Pillow, decoding at 1/2, 1/4 or 1/8 by `draft`."""
    image = Image.open(io.BytesIO(data))
    drafted = image.draft("RGB", (target * 2, target * 2))
    size = None if drafted is None else drafted[1][2:]
    return pillow_resize(image.convert("RGB"), target, size=size)


def simplejpeg_full(data: bytes, target: int) -> Pixels:
    """libjpeg-turbo through simplejpeg, and Pillow's filter."""
    return pillow_resize(Image.fromarray(simplejpeg.decode_jpeg(data)), target)


def simplejpeg_full_gap(data: bytes, target: int) -> Pixels:
    """The same with Pillow's two-step `reducing_gap=2`."""
    return pillow_resize(Image.fromarray(simplejpeg.decode_jpeg(data)), target, gap=2.0)


def simplejpeg_reduced(data: bytes, target: int) -> Pixels:
    """libjpeg-turbo through simplejpeg, decoding at 1/2, 1/4 or 1/8."""
    pixels, size = decode_reduced(data, target)
    return pillow_resize(Image.fromarray(pixels), target, size=size)


def simplejpeg_reduced_rounded(data: bytes, target: int) -> Pixels:
    """The same, taking the reduced picture to fill its last row and column."""
    return pillow_resize(Image.fromarray(decode_reduced(data, target)[0]), target)


def simplejpeg_reduced_area(data: bytes, target: int) -> Pixels:
    """The same, resized by OpenCV's INTER_AREA, which works on whole pixels."""
    pixels, _ = decode_reduced(data, target)
    return cv2_resize(pixels, target)


def decode_reduced(data: bytes, target: int) -> tuple[Pixels, tuple[float, float]]:
    """Decode at the scale that `models.jpeg` chooses; also what width and height it fills."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    n = reduction(min(height, width), target)
    size = {"min_height": -(-height // n), "min_width": -(-width // n)} if n > 1 else {}
    return simplejpeg.decode_jpeg(data, **size), (width / n, height / n)


def opencv_full(data: bytes, target: int) -> Pixels:
    """OpenCV, with INTER_AREA."""
    return cv2_resize(opencv_decode(data, cv2.IMREAD_COLOR_RGB), target)


def opencv_reduced(data: bytes, target: int) -> Pixels:
    """OpenCV, decoding at 1/2, 1/4 or 1/8, with INTER_AREA."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)  # OpenCV cannot tell beforehand
    n = reduction(min(height, width), target)
    flags = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }
    return cv2_resize(opencv_decode(data, flags[n])[..., ::-1], target)


def opencv_decode(data: bytes, flags: int) -> Pixels:
    """Decode with OpenCV."""
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), flags), np.uint8)


def horace(data: bytes, target: int) -> Pixels:
    """`models.preprocess` as it is, with its checks, limits and Exif."""
    spec = PreprocessSpec(height=target, width=target, channels=3, resize=target)
    return preprocess(data, spec)


WHOLE_ROAD: dict[str, Candidate] = {
    "Pillow": pillow_full,
    "Pillow, draft": pillow_draft,
    "simplejpeg + Pillow resize": simplejpeg_full,
    "simplejpeg + Pillow resize, reducing_gap=2": simplejpeg_full_gap,
    "simplejpeg reduced + Pillow resize": simplejpeg_reduced,
    "simplejpeg reduced + Pillow resize, rounded": simplejpeg_reduced_rounded,
    "simplejpeg reduced + OpenCV INTER_AREA": simplejpeg_reduced_area,
    "OpenCV": opencv_full,
    "OpenCV, IMREAD_REDUCED": opencv_reduced,
    "models.preprocess": horace,
}


def pillow_decode(data: bytes) -> Pixels:
    """Decode with Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def simplejpeg_decode(data: bytes) -> Pixels:
    """Decode with simplejpeg, which is strict by default."""
    return np.asarray(simplejpeg.decode_jpeg(data), np.uint8)


DECODERS: dict[str, Callable[[bytes], Pixels]] = {
    "Pillow": pillow_decode,
    "simplejpeg": simplejpeg_decode,
    "OpenCV": lambda data: opencv_decode(data, cv2.IMREAD_COLOR_RGB),
}


def make_jpegs(photos: Sequence[Image.Image], size: tuple[int, int]) -> list[bytes]:
    """Bring every photograph to one size and encode it."""
    jpegs = []
    for photo in photos:
        file = io.BytesIO()
        fitted = ImageOps.fit(photo, size, Image.Resampling.LANCZOS)
        fitted.save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
        jpegs.append(file.getvalue())
    return jpegs


def _without_target(decode: Callable[[bytes], Pixels]) -> Candidate:
    """Let a decoder stand where a whole road is expected."""
    return lambda data, _: decode(data)


def time_in_turns(
    candidates: dict[str, Candidate], jpegs: Sequence[bytes], target: int, repeats: int
) -> dict[str, list[float]]:
    """Give each candidate's CPU milliseconds an image, one figure a repeat, the first left out."""
    figures: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, candidate in turns(candidates.items(), repeat):
            start_s = time.process_time()
            for data in jpegs:
                candidate(data, target)
            if repeat:
                figures[name].append((time.process_time() - start_s) / len(jpegs) * 1e3)
    return figures


def summarise(figures: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Give median, quartiles and the speed against `reference`, the median of paired ratios."""
    rows = {}
    for name, values in figures.items():
        quarter, median, three_quarters = statistics.quantiles(values, n=4)
        ratios = [base / own for base, own in zip(figures[reference], values, strict=True)]
        rows[name] = {
            "cpu_ms_median": round(median, 3),
            "cpu_ms_quartile_1": round(quarter, 3),
            "cpu_ms_quartile_3": round(three_quarters, 3),
            "times_as_fast": round(statistics.median(ratios), 2),
        }
    return rows


def disagreement(candidate: Candidate, jpegs: Sequence[bytes], target: int) -> dict[str, float]:
    """Compare a candidate's pixels with the full decode and one antialiased step."""
    differences = [
        np.abs(candidate(data, target).astype(int) - simplejpeg_full(data, target))
        for data in jpegs
    ]
    return {
        "mean_difference": round(float(np.mean(differences)), 3),
        "p99_difference": float(np.percentile(differences, 99)),
    }


def undetected_damage(jpegs: Sequence[bytes]) -> dict[str, dict[str, float]]:
    """Say what part of damaged files each decoder gives out as images, by kind of damage.

    A file is cut to half its length, or 32 bytes in the middle of its pixels are zeroed.
    """
    kinds = {
        "cut in half": [data[: len(data) // 2] for data in jpegs],
        "32 bytes zeroed": [
            data[:middle] + bytes(32) + data[middle + 32 :]
            for data in jpegs
            for middle in range(len(data) // 3, len(data) * 2 // 3, len(data) // 30)
        ],
    }
    return {
        name: {
            kind: round(statistics.mean(map(decodes(decode), files)), 3)
            for kind, files in kinds.items()
        }
        for name, decode in DECODERS.items()
    }


def decodes(decode: Callable[[bytes], Pixels]) -> Callable[[bytes], bool]:
    """Make a test of whether a decoder accepts a file."""

    def accepts(data: bytes) -> bool:
        """Decode, and see whether anything comes of it."""
        try:
            return decode(data).ndim == 3
        except Exception:  # each library has errors of its own; only that there is one counts
            return False

    return accepts


def main(options: Options) -> None:
    """Measure, print tables and write the figures.

    Raises:
        UsageError: OpenCV is missing.
    """
    if cv2 is None:
        raise UsageError(
            "OpenCV", expected="it installed", found="none", mend="pip install -e '.[bench]'"
        )
    cv2.setNumThreads(1)  # one image is one thread's work in a server
    photos = read_photos(options.photos, LEAST_WIDTH_PX)
    report: dict[str, object] = {
        "command": command_line(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": 1,
        "load_average_before": round(os.getloadavg()[0], 1),
        "versions": {
            **{name: version(name) for name in ("pillow", "simplejpeg", "numpy")},
            "opencv": cv2.__version__,
            "python": platform.python_version(),
            "libjpeg_turbo of Pillow": features.version("libjpeg_turbo"),
        },
        "photos": len(photos),
        "repeats": options.repeats,
        "quality": QUALITY,
    }
    jpegs = {size: make_jpegs(photos, size) for size in SIZES}
    cases = [(size, target) for size in SIZES for target in (None, *TARGETS)]
    alone = {name: _without_target(decode) for name, decode in DECODERS.items()}
    for i in progress(range(len(cases)), what="measuring", total=len(cases), unit="case"):
        size, target = cases[i]
        candidates = alone if target is None else WHOLE_ROAD
        figures = time_in_turns(candidates, jpegs[size], target or 0, options.repeats)
        rows = summarise(figures, "Pillow")
        if target is not None:
            for name, candidate in candidates.items():
                rows[name] |= disagreement(candidate, jpegs[size], target)
        title = f"{size[0]}x{size[1]} " + ("decode" if target is None else f"to {target}")
        report[title] = rows
        print(table(title, rows))
    report["damage_undetected"] = undetected_damage(jpegs[SIZES[1]])
    print(f"\ndamage undetected: {report['damage_undetected']}")
    report["mean_bytes"] = {
        f"{w}x{h}": round(statistics.mean(map(len, jpegs[w, h]))) for w, h in SIZES
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def table(title: str, rows: dict[str, dict[str, float]]) -> str:
    """Lay out one case for people."""
    lines = [f"\n{title:44} {'CPU ms (quartiles)':>24} {'speed':>7} {'diff':>6} {'p99':>4}"]
    for name, row in rows.items():
        quartiles = f"{row['cpu_ms_quartile_1']:.2f}-{row['cpu_ms_quartile_3']:.2f}"
        spread = f"{row['cpu_ms_median']:.2f} ({quartiles})"
        pixels = ""
        if "mean_difference" in row:
            pixels = f"{row['mean_difference']:6.2f} {row['p99_difference']:4.0f}"
        lines.append(f"{name:44} {spread:>24} {row['times_as_fast']:6.2f}x {pixels}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(Options, main, prog="python -m benchmarks.decoders"))
