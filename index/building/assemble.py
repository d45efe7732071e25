"""From finished parts to the files of a collection."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pyarrow as pa

from index.ann.kinds import FLAT_MAX_COUNT, parse_kind
from index.ann.memory import as_size, build_bytes
from index.ann.versions import library_versions
from index.building.metadata import Metadata, join_blocks
from index.building.part_file import PART_ROW_SCHEMA
from index.building.parts import PartStore
from index.embed import rejects_text
from index.storage.manifest import REJECTS_FILE, Manifest, SegmentEntry, hash_files
from index.storage.rows import check_row_sizes
from index.storage.segment import EF_SEARCH, FLAT, HNSW, Block, write_segment
from models.encoder import Encoder, absolute_uri
from models.errors import UsageError
from models.memory import free_memory_bytes, memory_bytes

log = logging.getLogger("horace.index")


def choose_factory(index: Literal["auto", "flat", "hnsw"], count: int) -> str:
    """Turn the option and the number of images into a FAISS factory string."""
    if index == "auto":
        index = "flat" if count <= FLAT_MAX_COUNT else "hnsw"
    return FLAT if index == "flat" else HNSW


def check_memory(factory: str, count: int, dim: int) -> None:
    """Refuse an index that this machine can never build, and warn of one that it could not now.

    Raises:
        UsageError: building it holds more than all the memory.
    """
    needed = 0 if factory == FLAT else build_bytes(parse_kind(factory, dim), count, dim)
    all_bytes, free_bytes = memory_bytes(), free_memory_bytes()
    error = UsageError(
        f"memory for index {factory} over {count} x {dim}",
        expected=f"at least {as_size(needed)} to build it",
        found=f"{as_size(all_bytes)}, {as_size(free_bytes)} of it free",
        mend="take --index flat; or, without --index and --sync, --recall .99 --memory-budget 2GB, "
        "which chooses one that fits",
    )
    if needed > all_bytes:
        raise error
    if needed > free_bytes:
        log.warning("%s", error)


def write_collection(
    directory: Path,
    store: PartStore,
    encoder: Encoder,
    *,
    name: str,
    uri: str,
    factory: str,
    metadata: Metadata | None,
) -> Manifest:
    """Write every file of the collection but the manifest, which is returned.

    Args:
        directory: of the collection.
        store: settled, see `PartSet.settle`.
        encoder: what made the vectors.
        name: of the collection.
        uri: of the encoder, or the path of its bundle.
        factory: of the index.
        metadata: what is joined to the rows.

    Raises:
        UsageError: a row is larger than any file may have.
    """
    entry = SegmentEntry(
        name="000000",
        count=store.n_images,
        factory=factory,
        parameters={} if factory == FLAT else {"efSearch": EF_SEARCH},
    )
    log.info("writing %d vectors, index %s", entry.count, factory)
    blocks, schema = store.blocks(), PART_ROW_SCHEMA
    if metadata is not None:
        blocks = join_blocks(metadata, blocks)
        schema = pa.schema([*schema, *metadata.columns])
    names = write_segment(directory, entry, _checked(blocks), encoder.dim, schema=schema)
    (directory / REJECTS_FILE).write_text(rejects_text(store.rejects))
    return Manifest(
        name=name,
        fingerprint=encoder.fingerprint,
        dim=encoder.dim,
        encoder=absolute_uri(uri),
        preprocessing=dict(encoder.preprocessing.to_json()),
        sources={store.key.source: entry.count},
        segments=(entry,),
        files=hash_files(directory, [*names, REJECTS_FILE]),
        versions=library_versions(),
        build={
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "run_id": store.run_id,
            "run": store.key.to_json(),
            "rejects": len(store.rejects),
            "metadata": None if metadata is None else metadata.report().to_json(),
        },
    )


def _checked(blocks: Iterator[Block]) -> Iterator[Block]:
    """Refuse rows that are too large, before they are written."""
    for block in blocks:
        check_row_sizes(block.rows)
        yield block
