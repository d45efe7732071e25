"""The images that were skipped while training: each counted once, kept in a file, and bounded.

Rules:
    An image is counted once, whichever thread and epoch meets it: by its row, as a shard may name
    two alike.
    Where more than half of the images cannot be used, the source is wrong, not an image, and
    the run ends, streamed or in memory. A source with fewer faults is never fatal.
    The file is written whole; what it held before is kept.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from index.embed import Reject, rejects_text
from models.errors import ImageError
from models.files import atomic_file
from models.images import ImageRecord
from train.errors import TrainError

LARGEST_SHARE = 0.5
"""Of the images that may be unusable."""

log = logging.getLogger("horace")


class Rejects:
    """The skipped images of one source, by row; safe to use from any thread.

    Args:
        uri: of the source.
        images: how many images it has.
        known: those of a source in memory, whose rows are of its other images: it adds no more.
    """

    def __init__(self, uri: str, images: int, known: Iterable[Reject] = ()) -> None:
        self.uri, self._images = uri, images
        self._lock = threading.Lock()
        self._by_row = dict(enumerate(known))

    def __contains__(self, row: int) -> bool:
        return row in self._by_row

    def __len__(self) -> int:
        return len(self._by_row)

    def __repr__(self) -> str:
        """Show how many there are, of how many."""
        return f"Rejects({self.uri!r}, {len(self)} of {self._images})"

    def add(self, row: int, reject: Reject) -> None:
        """Count the image of a row as unusable, and log the first of them.

        Raises:
            TrainError: more than half of the images are unusable.
        """
        with self._lock:
            if row in self._by_row:
                return
            self._by_row[row] = reject
            count = len(self._by_row)
        if count == 1:
            log.warning("%s: skipping %s: %s", self.uri, reject.key, reject.message)
        refuse_mostly_broken(self.uri, count, self._images, last=reject)

    def all(self) -> tuple[Reject, ...]:
        """Give those found so far, sorted by key."""
        with self._lock:
            return tuple(sorted(self._by_row.values(), key=lambda reject: reject.key))

    def faults(self) -> dict[str, int]:
        """Count them by fault."""
        return dict(sorted(Counter(reject.fault for reject in self.all()).items()))


def refuse_mostly_broken(uri: str, broken: int, images: int, *, last: Reject) -> None:
    """Refuse a source if more than half of some of its images cannot be used.

    Raises:
        TrainError: it is so.
    """
    if broken > LARGEST_SHARE * images:
        raise TrainError(
            uri,
            expected="at least half of its images to be usable",
            found=f"{broken} of {images} that are not; the last: {last.key}: {last.message}",
            mend="check that the path names whole images",
        )


def reject_of(record: ImageRecord, error: ImageError) -> Reject:
    """Say why an image was skipped."""
    return Reject.of(record.key, error)


def write_rejects(path: Path, rejects: Iterable[Reject]) -> int:
    """Bring a file of skipped images up to date, one JSON object a line.

    What it held before stays, so that a run that was resumed takes nothing away. Without any
    reject there is no file.

    Returns:
        How many the file holds.
    """
    kept = read_rejects(path)
    known = {reject.key for reject in kept}
    new = [reject for reject in rejects if reject.key not in known]
    if new:
        with atomic_file(path) as temporary:
            temporary.write_text(rejects_text((*kept, *new)))
    return len(kept) + len(new)


def read_rejects(path: Path) -> list[Reject]:
    """Read what `write_rejects` wrote; nothing where there is no file."""
    if not path.exists():
        return []
    return [Reject(**json.loads(line)) for line in path.read_text().splitlines()]
