"""Gives a collection of any size an index of any kind, without measuring what it finds."""

from __future__ import annotations

import tempfile
from pathlib import Path

from index.ann.kinds import FLAT, default_parameters
from index.ann.making import build_index, write_index
from index.storage.writer import CollectionWriter


def give_index(writer: CollectionWriter, factory: str) -> None:
    """Make one segment of a collection, without dead rows, with an index of this kind.

    `index.tune` chooses one for collections that are used, and a compaction takes what was chosen.
    """
    with writer.whole() as whole, tempfile.TemporaryDirectory() as folder:
        file = None if factory == FLAT else Path(folder) / "index.faiss"
        if file is not None:
            metric = writer.collection.metric
            write_index(
                build_index(whole.segment.vectors_ND, factory, metric=metric), file, factory
            )
        writer.replace_index(
            whole, file, factory=factory, parameters=default_parameters(factory), tuning={}
        )
