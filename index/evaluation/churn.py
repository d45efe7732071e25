"""A copy of a collection that images are deleted from and added back to.

Rules:
    The collection itself is only read; the copy is gone when the block ends.
    What is deleted is drawn by a seed, and comes back with the same rows and vectors.
    It is written as anybody writes: by a `CollectionWriter`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import numpy as np

from index.collection import Collection
from index.errors import EvaluationError
from index.storage.rows import held_or_null, take_rows
from index.storage.writer import CollectionWriter
from models.errors import reason_of

ADD_ROWS = 4096
"""Images that are added back in one write."""


def churned(
    collection: Collection, share: float, *, seed: int, scratch: Path | None, threads: int | None
) -> Generator[tuple[str, Collection], None, None]:
    """Copy a collection, and yield what it is after each step: deleted, and added back.

    What is yielded is to be used before the next is asked for.

    Args:
        collection: what is copied.
        share: of its images that are deleted, above 0 and below 1.
        seed: of the draw.
        scratch: where the copy goes, for as long as it is needed; the system's place where None.
        threads: CPU threads of a search.

    Raises:
        EvaluationError: there is no room for a copy.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="churn-") as folder:
        copy = Path(folder) / "collection"
        try:
            shutil.copytree(collection.path, copy)
        except OSError as error:
            raise EvaluationError(
                f"copy of collection {collection.name}",
                expected=f"room for it in {folder}",
                found=_first_reason(error),
                mend="name a larger place with --scratch, or leave it out with --churn 0",
            ) from error
        rng = np.random.default_rng(seed)
        n = min(collection.count - 1, max(1, round(share * collection.count)))
        places = np.sort(rng.choice(collection.count, n, replace=False))
        ids = collection.ids[places]
        with CollectionWriter.open(copy, verify=False, threads=threads) as writer:
            writer.delete(ids)
            yield f"{share:.0%} deleted", writer.collection
            rows = collection.table()
            for start in range(0, n, ADD_ROWS):
                block = slice(start, start + ADD_ROWS)
                writer.add(
                    held_or_null(take_rows(rows, places[block])),
                    collection.vectors(ids[block]),
                    fingerprint=collection.fingerprint,
                )
            yield "and added back", writer.collection


def _first_reason(error: OSError) -> str:
    """Say why a copy failed; `shutil` lists every file that it could not copy."""
    if not isinstance(error, shutil.Error):
        return reason_of(error)
    _, _, reason = error.args[0][0]
    return str(reason)
