"""One protocol for every way to run an encoder, and the function that opens one.

An encoder turns preprocessed images into vectors, and says by its fingerprint which
vectors may be compared with which. Where it runs, here under ONNX Runtime, behind another
Horace server or on a fleet of Tritons, is a matter of the URI alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from models.bundle import Precision
from models.errors import EncoderError
from models.preprocess import PreprocessSpec
from models.providers import ON_CPU, Placement, split_placement


class Encoder(Protocol):
    """Images to vectors. Safe to call from several threads."""

    @property
    def name(self) -> str:
        """A word for people."""

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits; equal fingerprints give comparable vectors."""

    @property
    def dim(self) -> int:
        """Length of a vector."""

    @property
    def preprocessing(self) -> PreprocessSpec:
        """How bytes become what `encode` takes."""

    def preprocess(self, data: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Decode and fit one image to (H, W, C) uint8.

        Raises:
            ImageError: this image cannot be used.
        """

    def encode(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed (N, H, W, C) uint8 as (N, D) float32, not normalised.

        Raises:
            EncoderError: the shape or dtype is wrong, or the runtime failed.
        """

    def close(self) -> None:
        """Give back threads, memory and connections; the encoder is not used after it."""


@runtime_checkable
class LaneEncoder(Encoder, Protocol):
    """An encoder that computes a batch on all of its threads, or several on one thread each."""

    @property
    def lanes(self) -> int:
        """How many batches `encode_in_lane` takes at once without waiting for a CPU."""

    def encode_in_lane(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed as `encode` does, to the same bits, on the calling thread alone.

        Raises:
            EncoderError: likewise.
        """


def open_encoder(
    path_or_uri: str | Path,
    *,
    threads: int | None = None,
    precision: Precision | None = None,
    placement: Placement = ON_CPU,
    with_lanes: bool = False,
) -> Encoder:
    """Open an encoder by bundle or URI.

    Args:
        path_or_uri: a bundle's directory, the file of one of its encoders, such as
            `artifacts/bundles/mine/encoder.int8.onnx`, or `horace://host:port/model` (by TLS:
            `horaces://`), or `triton://host:port,host2:port/model`. A bundle's may end in
            `,provider=cuda` and `,device=1`, which say where it computes.
        threads: CPU threads for inference; the CPU budget where None. A remote encoder
            has its own.
        precision: which of a bundle's encoders; the one that the path names where None. Not
            for a remote encoder: its server chooses.
        placement: where a bundle's encoder computes, unless its name says; of no meaning for a
            remote one.
        with_lanes: give a `LaneEncoder`, whose weights are in memory twice. Not for a remote one.

    Raises:
        BundleError: the directory holds no sound bundle, or not in that precision.
        EncoderError: the URI is of no known kind, its server does not answer, or it is given
            a precision; or the bundle's encoder cannot compute where asked to.
        UsageError: what follows its name is no placement.
    """
    text, said = split_placement(str(path_or_uri))
    scheme, separator, rest = text.partition("://")
    if not separator:
        from models.runtime import open_bundle  # the engine is an extra: import where used

        return open_bundle(
            Path(text),
            threads=threads,
            precision=precision,
            placement=said or placement,
            with_lanes=with_lanes,
        )
    if precision is not None:
        raise EncoderError(
            f"precision {precision} of {text}",
            expected="none: a server chooses it for its models",
            found=repr(precision),
        )
    if scheme in ("horace", "horaces"):
        from models.remote import RemoteEncoder  # only a remote encoder needs gRPC

        return RemoteEncoder(rest, tls=scheme == "horaces")
    if scheme == "triton":
        from models.triton import TritonEncoder  # likewise

        return TritonEncoder(rest)
    raise EncoderError(
        text,
        expected="a bundle directory, horace://host:port/model or triton://host:port/model",
        found=f"scheme {scheme!r}",
    )


def bundle_path(path_or_uri: str) -> Path | None:
    """Give the path of a bundle, without where it is to run; None for a remote encoder."""
    where, _ = split_placement(path_or_uri)
    return None if "://" in where else Path(where)


def absolute_uri(path_or_uri: str) -> str:
    """Name an encoder so that any working directory understands it, and any machine runs it."""
    path = bundle_path(path_or_uri)
    return path_or_uri if path is None else str(path.resolve())
