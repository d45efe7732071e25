"""Bring any image to the pixels that an encoder takes.

Rules:
    One road for serving, index building and evaluation: decode (`models.decode`), resize
    the shorter side with antialiasing, cut the centre out, and nothing after that: mean,
    standard deviation and layout are inside the ONNX graph.
    An image that is already as large as it should be is not resampled: its pixels pass.
    `REVISION` goes up whenever the same image and spec would give other pixels; it is part
    of the encoder's fingerprint, so that old collections then refuse new vectors.
    Only the window that is kept is computed, so that a strip of 1 x 100,000 costs no more
    than a square.

Shapes: H, W, C as the spec has them; h, w of the image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.decode import decode, flatten, to_mode
from models.errors import BundleError, EncoderError, ImageError, ImageFault, UsageError
from models.picture import DEFAULT_LIMITS, ImageLimits, Picture, Pixels

__all__ = [
    "DEFAULT_LIMITS",
    "INTERPOLATIONS",
    "ImageLimits",
    "PreprocessSpec",
    "check_batch",
    "preprocess",
    "recolour",
]

REVISION = 1

MAX_SIDE = 4096
"""No encoder takes a larger side; a spec that says so is damaged."""

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """What an encoder's input looks like, and how it is made.

    Attributes:
        height: of the input, in pixels.
        width: of the input, in pixels.
        channels: 1 (BT.601 luma) or 3 (RGB).
        resize: length of the shorter side before the centre is cut out, in pixels.
        interpolation: one of `INTERPOLATIONS`, always antialiased.
        revision: of this code; see `REVISION`.

    Raises:
        UsageError: a value makes no sense.
    """

    height: int
    width: int
    channels: int
    resize: int
    interpolation: str = "bilinear"
    revision: int = REVISION

    def __post_init__(self) -> None:
        """Check every value."""
        side = f"1 to {MAX_SIDE}"
        _require("height", self.height, 1 <= self.height <= MAX_SIDE, side)
        _require("width", self.width, 1 <= self.width <= MAX_SIDE, side)
        _require("channels", self.channels, self.channels in (1, 3), "1 or 3")
        least = max(self.height, self.width)
        _require(
            "resize",
            self.resize,
            least <= self.resize <= MAX_SIDE,
            f"{least} (the larger of height and width) to {MAX_SIDE}",
        )
        _require(
            "interpolation",
            self.interpolation,
            self.interpolation in INTERPOLATIONS,
            " or ".join(INTERPOLATIONS),
        )
        _require(
            "revision",
            self.revision,
            self.revision == REVISION,
            f"{REVISION}, the one of this version of Horace",
        )

    def to_json(self) -> dict[str, int | str]:
        """Give the values as JSON has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> PreprocessSpec:
        """Read what `to_json` gave.

        Raises:
            BundleError: a value is missing, unknown, or of the wrong type.
            UsageError: a value makes no sense.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            found = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else repr(value)
            raise BundleError(
                "preprocessing", expected=", ".join(sorted(names)), found=found or "nothing"
            )
        for name, item in value.items():
            kind = str if name == "interpolation" else int
            if type(item) is not kind:
                raise BundleError(
                    f"preprocessing.{name}",
                    expected=f"of type {kind.__name__}",
                    found=type(item).__name__,
                )
        return cls(**value)


def preprocess(
    data: bytes | Pixels, spec: PreprocessSpec, limits: ImageLimits = DEFAULT_LIMITS
) -> Pixels:
    """Bring one image to an encoder's input.

    Args:
        data: an encoded image, or uint8 pixels of shape (h, w), (h, w, 1), (h, w, 3) or
            (h, w, 4), the last with alpha.
        spec: the encoder's input.
        limits: what the image may cost.

    Returns:
        (H, W, C) uint8, C-contiguous. It may share memory with `data`: do not write to it.

    Raises:
        ImageError: why the image cannot be used.
    """
    if is_ready(data, spec):
        limits.check_pixels(spec.height, spec.width, "pixels")
        return np.ascontiguousarray(data)
    grey = spec.channels == 1
    if isinstance(data, bytes):
        picture = decode(data, limits=limits, grey=grey, shorter_side=spec.resize)
    else:
        picture = Picture.whole(recolour(data, limits, grey))
    window = _cut_centre(picture, spec)
    return np.ascontiguousarray(window.reshape(spec.height, spec.width, spec.channels))


def is_ready(data: bytes | Pixels, spec: PreprocessSpec) -> TypeGuard[Pixels]:
    """Whether these are the encoder's pixels already, to be neither resized nor recoloured."""
    return (
        not isinstance(data, bytes)
        and data.shape == (spec.height, spec.width, spec.channels)
        and data.dtype == np.uint8
        and spec.resize == min(spec.height, spec.width)
    )


def recolour(pixels: Pixels, limits: ImageLimits, grey: bool) -> Pixels:
    """Bring raw uint8 pixels, with or without channels, to (h, w) if `grey`, else (h, w, 3).

    Raises:
        ImageError: WRONG_SHAPE, EMPTY or TOO_MANY_PIXELS.
    """
    shape = pixels.shape
    channels = shape[2] if len(shape) == 3 else 1
    if pixels.dtype != np.uint8 or len(shape) not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(
            ImageFault.WRONG_SHAPE,
            "pixels",
            expected="uint8 of shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4)",
            found=f"{pixels.dtype} of shape {shape}",
        )
    if pixels.size == 0:
        raise ImageError(ImageFault.EMPTY, "pixels", expected="an image", found=f"shape {shape}")
    limits.check_pixels(shape[0], shape[1], "pixels")
    if channels == 1:
        flat = pixels.reshape(shape[:2])
        return flat if grey else np.repeat(flat[..., None], 3, axis=2)
    if channels == 3 and not grey:
        return pixels
    opaque = flatten(Image.fromarray(np.ascontiguousarray(pixels)))
    return np.asarray(to_mode(opaque, "L" if grey else "RGB"))


def _cut_centre(picture: Picture, spec: PreprocessSpec) -> Pixels:
    """Resize the shorter side to `spec.resize` and give the central H x W, in one step."""
    pixels = picture.pixels
    h, w = pixels.shape[:2]
    scale = spec.resize / min(picture.height, picture.width)
    if scale == 1:
        top, left = (h - spec.height) // 2, (w - spec.width) // 2
        return pixels[top : top + spec.height, left : left + spec.width]
    window_h, window_w = spec.height / scale, spec.width / scale
    middle_y = picture.top + picture.height / 2
    middle_x = picture.left + picture.width / 2
    box = (  # rounding may lead out of the image by 1e-13 pixels, which Pillow refuses
        max(0.0, middle_x - window_w / 2),
        max(0.0, middle_y - window_h / 2),
        min(float(w), middle_x + window_w / 2),
        min(float(h), middle_y + window_h / 2),
    )
    filter_ = INTERPOLATIONS[spec.interpolation]
    resized = Image.fromarray(pixels).resize((spec.width, spec.height), filter_, box=box)
    return np.asarray(resized)


def check_batch(images_NHWC: NDArray[np.uint8], spec: PreprocessSpec) -> None:
    """Refuse a batch that is not (N, H, W, C) uint8 as `spec` says.

    Raises:
        EncoderError: it is not.
    """
    shape = (spec.height, spec.width, spec.channels)
    right = images_NHWC.ndim == 4 and images_NHWC.shape[1:] == shape
    if not right or images_NHWC.dtype != np.uint8:
        raise EncoderError(
            "images to encode",
            expected=f"(N, {spec.height}, {spec.width}, {spec.channels}) uint8",
            found=f"{images_NHWC.shape} {images_NHWC.dtype}",
        )


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise `UsageError` unless a value of the spec holds."""
    if not holds:
        raise UsageError(f"preprocessing.{name}", expected=expected, found=repr(value))
