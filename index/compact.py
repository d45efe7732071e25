"""`python -m index.compact C`: merge small segments, drop deleted rows, give the space back.

What was written lately waits in the delta, and what was deleted is only marked; compaction
writes both into segments with an index. Segments that are large and have few dead rows stay as
they are, unless `--all` makes one of everything.

Rules:
    The collection can be searched meanwhile, and nothing of its content changes: the same
    living images before and after. The new segments take the old ones' place in one step.
    Who reads the old ones goes on reading them.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from index.milvus.connection import require_directory
from index.storage.manifest import content_bytes
from index.storage.writer import CollectionWriter
from models.command import counted, run_command


@dataclass(frozen=True, kw_only=True)
class CompactOptions:
    """Merge small segments of a collection and drop deleted rows."""

    collection: Positional[Path]
    """The collection's directory."""
    all: bool = False
    """Make one segment of everything."""
    json: bool = False
    """Print what was done as JSON."""


def main(options: CompactOptions) -> None:
    """Compact, and say what became of it.

    Raises:
        CollectionError: the collection cannot be read or written, or has another writer.
    """
    require_directory(options.collection)
    started_s = time.monotonic()
    with CollectionWriter.open(options.collection) as writer:
        before = writer.collection.manifest
        bytes_before = content_bytes(options.collection, before)
        writer.compact(all=options.all)
        after = writer.collection
        done = {
            "count": after.count,
            "segments_before": len(before.segments),
            "segments": len(after.manifest.segments),
            "bytes_before": bytes_before,
            "bytes": content_bytes(options.collection, after.manifest),
        }
    if options.json:
        print(json.dumps({**done, "seconds": time.monotonic() - started_s}, indent=2))
        return
    print(
        f"{options.collection}: {counted(after.count, 'image')}, {done['segments_before']} -> "
        f"{counted(len(after.manifest.segments), 'segment')}, {done['bytes_before']} -> "
        f"{done['bytes']} bytes"
    )


if __name__ == "__main__":
    sys.exit(run_command(CompactOptions, main, prog="python -m index.compact"))
