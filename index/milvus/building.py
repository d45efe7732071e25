"""From the parts of a build to a collection in Milvus, which appears at once.

Rows go to a collection of a name of its own; when all are there, the name that people use, an
alias, is set to it in one step. What it stood for is dropped where it is replaced.

Rules:
    A build that was killed goes on: what it wrote is dropped, and written again; where it had the
    name already, its rows are put where they are, and what had the name before is dropped.
    What `--restart` gives up is dropped, too.
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
from models.command import counted
from models.encoder import Encoder, absolute_uri
from models.errors import UsageError
from models.files import atomic_file

if TYPE_CHECKING:
    from pymilvus import MilvusClient

RUN_CHARACTERS = 12
"""Of a build's name that tell it from the others."""

REPLACES = "horace.replaces"
"""Property of a collection: which one had its name before, and is to be dropped."""

log = logging.getLogger("horace.index")


def check_place(
    address: MilvusAddress,
    run_id: str | None,
    *,
    index: Literal["auto", "flat", "hnsw"],
    replace: bool,
) -> None:
    """Leave alone what stands at an address, unless it is Horace's and may be replaced.

    Args:
        address: where people will find the build.
        run_id: the name of the run that goes on, which may have been killed when it was done.
        index: what is asked for; what that run made has its index already.
        replace: whether another build may be there.

    Raises:
        UsageError: it must stay, or is this run's, of another index.
        CollectionError: Milvus does not answer, or the collection is somebody else's.
    """
    with closing(connect(address.uri)) as client, milvus_errors(str(address)):
        if not client.has_collection(address.name):
            return
        described = client.describe_collection(address.name)
    description = read_description(address, described)
    standing = described["collection_name"]
    if standing == address.name:
        raise UsageError(
            str(address),
            expected="a new name, or one that index.build made",
            found="another",
            mend="choose another name",
        )
    if run_id is not None and standing == _own(address, run_id).name:
        if description.index != _kind(index):
            raise UsageError(
                "--index",
                expected=f"{description.index}, of which this build has made {address}",
                found=_kind(index),
                mend="finish it with that, or begin anew with --restart --replace",
            )
    elif not replace:
        raise _taken(address)


def drop_unnamed(address: MilvusAddress, run_id: str) -> None:
    """Drop what a run that was killed has written, unless people find it at the address.

    Raises:
        CollectionError: Milvus does not answer.
    """
    own = _own(address, run_id).name
    with closing(connect(address.uri)) as client, milvus_errors(str(address)):
        if _standing(client, address.name) != own and client.has_collection(own):
            client.drop_collection(own)


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
    replace: bool,
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
        replace: whether another build may have the address.

    Raises:
        CollectionError: Milvus does not answer, or refuses; the same build goes on.
        UsageError: another build has come first.
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
        index=_kind(index),
    )
    vectors = counted(store.n_images, "vector")
    log.info("giving %s to %s, index %s", vectors, address, description.index)
    drop_unnamed(address, store.run_id)  # it may be of another index, or have other columns
    own = _own(address, store.run_id)
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
        _give_name(client, address, own.name, replace=replace)
    return summary


def _kind(index: Literal["auto", "flat", "hnsw"]) -> str:
    """Say which index of Milvus an option means."""
    return "flat" if index == "flat" else "hnsw"


def _own(address: MilvusAddress, run_id: str) -> MilvusAddress:
    """Say where a run writes to."""
    name = f"{address.name}_{run_id[:RUN_CHARACTERS]}"
    return MilvusAddress(uri=address.uri, name=name)


def _taken(address: MilvusAddress) -> UsageError:
    """Make the error for an address that another build has."""
    return UsageError(
        str(address),
        expected="a new name",
        found="a collection",
        mend="choose another name, or replace it with --replace",
    )


def _write_rejects(store: PartStore) -> str:
    """Write which images could not be used, beside the parts; give the file."""
    file = store.directory.with_suffix(".rejects.jsonl")
    with atomic_file(file) as temporary:
        temporary.write_text(rejects_text(store.rejects))
    return str(file)


def _open(address: MilvusAddress, description: Description) -> MilvusWriter:
    """Make the collection, or open that of a run that was killed when it was done."""
    with closing(connect(address.uri)) as client, milvus_errors(str(address)):
        is_there = client.has_collection(address.name)
    if is_there:
        return MilvusWriter.open(str(address))
    return MilvusWriter.create(str(address), description)


def _give_name(client: MilvusClient, address: MilvusAddress, name: str, *, replace: bool) -> None:
    """Set an alias, and drop the collection that had it.

    Which one that is stands in a property before, so that it also goes where a build is killed
    between the two.
    """
    before = _standing(client, address.name)
    if before is None:
        client.create_alias(name, address.name)
    elif before != name:
        if not replace:
            raise _taken(address)
        client.alter_collection_properties(name, {REPLACES: before})
        client.alter_alias(name, address.name)
    left: list[str] = []
    old = _replaced(client, name)
    # A run that goes on after another replaced it has replaced that one, and been replaced by it.
    while old is not None and old not in (name, *left) and client.has_collection(old):
        left.append(old)
        old = _replaced(client, old)
    for old in reversed(left):  # the one that names another goes after it
        client.drop_collection(old)


def _standing(client: MilvusClient, alias: str) -> str | None:
    """Name the collection that an alias stands for; None where it is none."""
    if not client.has_collection(alias):
        return None
    return cast(str, client.describe_collection(alias)["collection_name"])


def _replaced(client: MilvusClient, name: str) -> str | None:
    """Name the collection that had the alias of this one before; None where there was none."""
    properties = client.describe_collection(name).get("properties") or {}
    return cast("str | None", properties.get(REPLACES))
