"""From the parts of a build to a collection in Milvus, which appears at once.

Rows go to a collection of a name of its own; when all are there, the name that people use, an
alias, is set to it in one step. What it stood for is dropped where it is replaced.

Rules:
    A build that was killed goes on: its rows are put where they are again, and no row is twice.
    A collection that is no alias was not made here, and is left alone.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import TYPE_CHECKING, Literal, cast

from index.building.metadata import Metadata, join_blocks
from index.building.part_file import PART_ROW_SCHEMA
from index.building.parts import PartStore
from index.building.summary import BuildSummary
from index.embed import rejects_text
from index.milvus.connection import MilvusAddress, connect, milvus_errors
from index.milvus.description import Description, read_description
from index.milvus.writer import MilvusWriter
from models.encoder import Encoder, absolute_uri
from models.errors import UsageError
from models.files import atomic_file

if TYPE_CHECKING:
    from pymilvus import MilvusClient

RUN_CHARACTERS = 12
"""Of a build's name that tell it from the others."""

log = logging.getLogger("horace.index")


def check_place(address: MilvusAddress, *, replace: bool) -> None:
    """Leave alone what stands at an address, unless it is Horace's and may be replaced.

    Raises:
        UsageError: it must stay.
        CollectionError: Milvus does not answer, or the collection is somebody else's.
    """
    with closing(connect(address.uri)) as client, milvus_errors(str(address)):
        if not client.has_collection(address.name):
            return
        described = client.describe_collection(address.name)
    read_description(address, described)
    if described["collection_name"] == address.name:
        raise UsageError(
            str(address),
            expected="a new name, or one that index.build made",
            found="another",
            mend="choose another name",
        )
    if not replace:
        raise UsageError(
            str(address),
            expected="a new name",
            found="a collection",
            mend="choose another name, or replace it with --replace",
        )


def publish(
    address: MilvusAddress,
    store: PartStore,
    encoder: Encoder,
    *,
    uri: str,
    index: Literal["auto", "flat", "hnsw"],
    metadata: Metadata | None,
    reused: int,
    embed_s: float,
) -> BuildSummary:
    """Give all rows of a build to Milvus, and then the address.

    Args:
        address: where people will find them.
        store: settled; its rejects go to a file beside it.
        encoder: what made the vectors.
        uri: of the encoder, or the path of its bundle.
        index: of the collection; `auto` is `hnsw` here.
        metadata: what is joined to the rows.
        reused: images whose vectors an earlier run had made.
        embed_s: seconds for embedding the others.

    Raises:
        CollectionError: Milvus does not answer, or refuses; the same build goes on.
    """
    start_s = time.monotonic()
    blocks = store.blocks() if metadata is None else join_blocks(metadata, store.blocks())
    description = Description(
        name=address.name,
        fingerprint=encoder.fingerprint,
        dim=encoder.dim,
        encoder=absolute_uri(uri),
        preprocessing=dict(encoder.preprocessing.to_json()),
        sources={store.key.source: store.n_images},
        columns=PART_ROW_SCHEMA,
        index="flat" if index == "flat" else "hnsw",
    )
    log.info("giving %d vectors to %s, index %s", store.n_images, address, description.index)
    own = MilvusAddress(uri=address.uri, name=f"{address.name}_{store.run_id[:RUN_CHARACTERS]}")
    with closing(_open(own, description)) as writer:
        for block in blocks:
            writer.upsert(block.rows, block.vectors_ND, fingerprint=description.fingerprint)
        writer.seal()
        summary = BuildSummary(
            collection=str(address),
            name=address.name,
            fingerprint=encoder.fingerprint,
            index=writer.collection.factory,
            images=writer.collection.count,
            rejects=len(store.rejects),
            reused=reused,
            embed_s=embed_s,
            index_s=time.monotonic() - start_s,
            metadata=None if metadata is None else metadata.report().to_json(),
            log=_write_rejects(store),
        )
    with closing(connect(address.uri)) as client, milvus_errors(str(address)):
        _give_name(client, address.name, own.name)
    return summary


def _write_rejects(store: PartStore) -> str:
    """Write which images could not be used, beside the parts; give the file."""
    file = store.directory.with_suffix(".rejects.jsonl")
    with atomic_file(file) as temporary:
        temporary.write_text(rejects_text(store.rejects))
    return str(file)


def _open(address: MilvusAddress, description: Description) -> MilvusWriter:
    """Make the collection, or open what an earlier run has made."""
    with closing(connect(address.uri)) as client, milvus_errors(str(address)):
        is_there = client.has_collection(address.name)
    if is_there:
        return MilvusWriter.open(str(address))
    return MilvusWriter.create(str(address), description)


def _give_name(client: MilvusClient, alias: str, name: str) -> None:
    """Set an alias, and drop the collection that had it."""
    if not client.has_collection(alias):
        client.create_alias(name, alias)
        return
    before = cast(str, client.describe_collection(alias)["collection_name"])
    if before != name:
        client.alter_alias(name, alias)
        client.drop_collection(before)
