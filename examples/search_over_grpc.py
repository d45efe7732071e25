"""Start a server, embed and search with real test images over gRPC, stop the server.

What an application does, in one file: it needs the address of a server and nothing else.
One of the images is broken on purpose; it gets a status, and the others their vectors.

    python examples/search_over_grpc.py BUNDLE COLLECTION --grid grid.png
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro

from index.evaluation.plots import Tile, draw_grid
from models.command import run_command
from models.images import ImageData, ImageRecord, ImageSource, open_source
from serve.client import Client, Hit


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """Serve a bundle and a collection, and search them with one image of each class."""

    bundle: tyro.conf.Positional[Path]
    """The encoder, as `train.export` wrote it."""
    collection: tyro.conf.Positional[Path]
    """The images to search, as `index.build` wrote them."""
    images: str = "fashion-mnist:test"
    """Where the queries come from."""
    grid: Path | None = None
    """Draw queries and neighbours as PNG: of a data set with a name, such as fashion-mnist, since
    a hit says of a folder what it is called and not where it lies."""
    k: int = 8
    """Neighbours a query."""


def main(options: ExampleOptions) -> None:
    """Do it, and say what came of it."""
    queries = one_of_each_class(open_source(options.images))
    images = [record.read() for record in queries]
    with running_server(options.bundle, options.collection) as target, Client(target) as client:
        result = client.embed([*images, b"no image at all"])
        print(f"{target}: {len(result.vectors)} vectors of {result.vectors.shape[1]} dimensions")
        print(f"  encoder {result.fingerprint[:12]}, {result.timings.total_ms:.1f} ms in there")
        print(f"  the last image, broken on purpose: {result.statuses[-1].message}")
        found = client.search(vectors=result, k=options.k).raise_for_status()
    for record, hits in zip(queries, found.hits, strict=True):
        labels = ", ".join(f"{hit.label} {hit.score:.2f}" for hit in hits[:3])
        print(f"  {record.label:<12} -> {labels}")
    if options.grid is not None:
        draw(options.grid, queries, images, found.hits)
        print(f"queries and neighbours: {options.grid}")


def one_of_each_class(source: ImageSource) -> list[ImageRecord]:
    """Take the first image of each class, in the order of the class names."""
    first: dict[str, ImageRecord] = {}
    for record in source.records():
        first.setdefault(record.label or "", record)
    return [first[label] for label in sorted(first)]


@contextmanager
def running_server(bundle: Path, collection: Path) -> Iterator[str]:
    """Run `python -m serve` on a free port; give `host:port`; stop it by SIGTERM."""
    paths = ["--bundle", str(bundle), "--collection", str(collection)]
    server = subprocess.Popen(
        [sys.executable, "-m", "serve", "--port", "0", *paths],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    try:
        ready = server.stdout.readline()  # "horace serving on HOST:PORT ..."
        if not ready:
            sys.exit(f"the server did not start: run python -m serve --bundle {bundle}")
        yield ready.split()[3]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def draw(
    path: Path,
    queries: list[ImageRecord],
    images: list[ImageData],
    hits_of_queries: tuple[tuple[Hit, ...], ...],
) -> None:
    """Draw a row for each query; neighbours are read where the hits say they are."""
    uris = {hit.source for hits in hits_of_queries for hit in hits}
    sources = {uri: open_source(uri) for uri in uris}
    rows = []
    for record, image, hits in zip(queries, images, hits_of_queries, strict=True):
        tiles = [
            Tile(
                image=sources[hit.source].load(hit.key),
                caption=f"{hit.label}\n{hit.score:.3f}",
                is_match=hit.label == record.label,
            )
            for hit in hits
        ]
        rows.append((Tile(image=image, caption=record.label or ""), tiles))
    draw_grid(path, rows, title="Test images and their nearest training images")


if __name__ == "__main__":
    sys.exit(run_command(ExampleOptions, main, prog="python examples/search_over_grpc.py"))
