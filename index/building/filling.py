"""Make the parts that a build lacks: here, in several processes, or on Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal

from index.building.part_set import Share
from index.building.parts import PartStore
from index.building.pipeline import Crew, make_parts
from index.building.processes import make_parts_in_processes
from index.building.ray_engine import make_parts_on_ray
from index.building.worker import Job
from index.errors import CollectionError
from models.command import counted, progress
from models.encoder import Encoder
from models.images import ImageSource

log = logging.getLogger("horace.index")


@dataclass(frozen=True, kw_only=True)
class Filling:
    """Who makes the parts.

    Attributes:
        images: the source, as `open_source` takes it: for other processes, to open it themselves.
        encoder: as `open_encoder` takes it, likewise.
        engine: this machine, or Ray.
        actors: on Ray.
        processes: on this machine.
        crew: how many batches are at work on this machine.
    """

    images: str
    encoder: str
    engine: Literal["local", "ray"]
    actors: int
    processes: int
    crew: Crew


def fill_store(
    store: PartStore, source: ImageSource, encoder: Encoder, how: Filling
) -> tuple[int, float]:
    """Make the parts that are missing, and settle which images are kept.

    Returns:
        The number of images in the parts that were there, and the seconds that the others took.

    Raises:
        CollectionError: not one image can be used, or the parts are of another source.
        HoraceError: source or encoder failed; what is in parts is kept.
        OSError: a part cannot be written.
    """
    kept = [part.start for part in store.finished]
    if kept:
        log.info(
            "reusing %s in %s of %s",
            counted(store.n_images, "image"), counted(len(kept), "finished part"), store.out,
        )  # fmt: skip
    key, start_s = store.key, time.monotonic()
    total = None if key.source_count is None else key.source_count - store.n_records
    with closing(_make(store, source, encoder, how)) as made:
        for _ in progress(made, what="embedding", total=total, size=int):
            pass
    embed_s = time.monotonic() - start_s
    store.settle()
    check_images(store)
    return sum(map(store.count_images, kept)), embed_s


def _make(
    store: PartStore, source: ImageSource, encoder: Encoder, how: Filling
) -> Generator[int, None, None]:
    """Make the missing parts; yield the number of records of each batch."""
    if how.engine == "ray":
        return make_parts_on_ray(source, how.encoder, store, actors=how.actors)
    if how.processes == 1:
        return make_parts(store.missing(source.records()), encoder, store, crew=how.crew)
    job = Job(
        images=how.images,
        encoder=how.encoder,
        directory=store.directory,
        key=store.key,
        share=Share(),
        crew=how.crew,
    )
    return make_parts_in_processes(job, store, processes=how.processes)


def check_images(store: PartStore) -> None:
    """Refuse a source without one good image."""
    if store.n_images == 0:
        rejects = store.rejects
        first = f", the first: {rejects[0].key}: {rejects[0].message}" if rejects else ""
        raise CollectionError(
            store.key.source,
            expected="at least one image that can be used",
            found=f"{len(rejects)} rejected{first}",
            mend="check the images",
        )


@contextmanager
def resumable(store: PartStore) -> Iterator[None]:
    """Tell who interrupts the build what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"{store.n_images} images are embedded and kept; the same command goes on from there"
        raise KeyboardInterrupt(*([kept] if store.n_images else [])) from None
