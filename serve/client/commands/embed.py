"""`python -m serve.client embed`: files and folders to vectors.

Rules:
    Every image has a line, in order: its row, or why it has none.
    With `--out NAME.npy` the rows are there and the lines in NAME.jsonl beside it; otherwise a
    line carries its vector itself. Files are whole or absent.
    An image that fails, or that is not there, stops nothing; the exit status is 1 at the end.
    All vectors are of one encoder, or there is no file: where the server changes its model
    meanwhile, that is an error.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray
from tyro.conf import Positional

from models.command import progress
from models.errors import HoraceError, UsageError, reason_of
from models.files import atomic_file
from models.image_source import ImageData
from serve.client.commands.connecting import ServerOptions
from serve.client.commands.files import ImageFile, read_files, require_parent
from serve.client.requests import EmbedOptions
from serve.errors import FailedItemsError, PreconditionError

Line: TypeAlias = dict[str, str | int | NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class EmbedCommand(ServerOptions):
    """Embed image files, and folders with all images below them."""

    images: Positional[tuple[Path, ...]]
    """Files and folders."""
    out: Path | None = None
    """NAME.npy for an array with a row for each sound image, and NAME.jsonl beside it that
    says which; NAME.jsonl for lines with vectors. Those go to stdout where not given."""
    model: str | None = None
    """A served model; the server's default where not given."""
    dims: int | None = None
    """Keep the first dimensions, before the vectors are normalised."""
    normalize: bool = True
    """Give vectors unit length."""
    dtype: str = "fp32"
    """How vectors cross the wire: fp32, fp16 or int8."""
    in_flight: int = 8
    """Requests under way at once."""
    images_per_request: int = 32
    """Images of one request, at most."""

    def __post_init__(self) -> None:
        """Check what can be checked without a server.

        Raises:
            UsageError: a value makes no sense.
        """
        super().__post_init__()
        EmbedOptions(model=self.model, dims=self.dims, dtype=self.dtype)
        if not self.images:
            raise UsageError("images", expected="files or folders", found="none")
        if self.out is not None and self.out.suffix not in (".npy", ".jsonl"):
            expected = "a name that ends in .npy or .jsonl"
            raise UsageError("--out", expected=expected, found=str(self.out))


def main(options: EmbedCommand) -> None:
    """Embed, and write a line for each image.

    Raises:
        HoraceError: the server cannot be had, or, after the rest is written, an image failed.
    """
    rows: list[NDArray[np.float32]] = []
    failures: Counter[str] = Counter()
    examples: dict[str, str] = {}
    is_array = options.out is not None and options.out.suffix == ".npy"
    total = 0
    with _open_lines(options.out) as lines:
        for line, vector in progress(_embed(options), what="embedding"):
            total += 1
            if vector is None:
                cause = str(line["status"])
                failures[cause] += 1
                examples.setdefault(cause, f"{line['file']}: {line['message']}")
            elif is_array:
                line["row"] = len(rows)
                rows.append(vector)
            else:
                line["vector"] = vector
            print(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY).decode(), file=lines)
        if is_array and options.out is not None:
            with atomic_file(options.out) as temporary, temporary.open("wb") as file:
                np.save(file, np.stack(rows) if rows else np.empty((0, 0), np.float32))
    if failures.total() == 1:
        raise FailedItemsError(*examples.values())
    if failures:
        found = ", and ".join(
            f"{n} {cause}, as {examples[cause]}" for cause, n in failures.most_common()
        )
        raise FailedItemsError(
            f"{failures.total()} of {total} images", expected="a vector for each", found=found
        )


def _embed(options: EmbedCommand) -> Iterator[tuple[Line, NDArray[np.float32] | None]]:
    """Embed every image; give its line and its vector, in order.

    Raises:
        PreconditionError: the server has changed its model.
    """
    read: deque[ImageFile] = deque()

    def images() -> Iterator[ImageData]:
        for file in read_files(options.images):
            read.append(replace(file, data=None))
            yield b"" if file.data is None else file.data

    with options.connect() as client:
        items = client.embed_iter(
            images(),
            model=options.model,
            dims=options.dims,
            normalize=options.normalize,
            dtype=options.dtype,
            in_flight=options.in_flight,
            images_per_request=options.images_per_request,
        )
        encoder = ""
        for item in items:
            file = read.popleft()
            encoder = encoder or item.fingerprint
            if item.fingerprint not in ("", encoder):
                raise PreconditionError(
                    f"server {options.server}",
                    expected=f"one encoder for all images, {encoder}",
                    found=f"another from {file.name} on, {item.fingerprint}",
                    mend="the server has changed its model: embed again",
                )
            if file.error is not None:
                code, message = file.error.fault.value, file.reason
            else:
                code, message = item.status.code, item.status.message
            line: Line = {"file": file.name, "status": code}
            yield (line | {"message": message} if message else line), item.vector


@contextmanager
def _open_lines(out: Path | None) -> Iterator[IO[str]]:
    """Open what lines are written to.

    Raises:
        HoraceError: the file cannot be written; told before anything is sent where its directory
            is not there.
    """
    if out is None:
        yield sys.stdout
        return
    require_parent("--out", out)
    try:
        with atomic_file(out.with_suffix(".jsonl")) as path, path.open("w") as lines:
            yield lines
    except OSError as error:
        raise HoraceError(
            f"--out {out}",
            expected="a file that can be written",
            found=reason_of(error),
            mend="make room or choose another",
        ) from error
