"""What a source holds now: its keys and the digest of each image, with little reading.

Rules:
    A file whose stamp is that of an earlier run is not read; its digest is the one it had then.
    A stamp is taken before the file is read: what is written in between is seen the next time.
    A file that is no image is believed only where it was left alone, before and since.
    Where nothing of the source is stored yet no digest is of use: nothing is read.
    Memory holds a few images while they are hashed, and some hundred bytes a record.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from index.building.sync_plan import Seen
from index.building.sync_state import Stamp
from index.embed import Reject, split
from models.cpu import cpu_budget
from models.errors import ImageError
from models.image_folder import FolderSource
from models.image_source import ImageRecord, ImageSource, digest_of

CHUNK = 32
"""Records that a thread reads and hashes at a time."""


@dataclass(kw_only=True)
class Scan:
    """What was found so far.

    Attributes:
        seen: the records, in the source's order.
        stamps: of the files that can be known by theirs the next time, by key.
        n_read: images that were read.
    """

    seen: list[Seen] = field(default_factory=list)
    stamps: dict[str, Stamp] = field(default_factory=dict)
    n_read: int = 0

    def is_settled(self, source: ImageSource, key: str) -> bool:
        """Tell whether a file was left alone before it was looked at, and since until now."""
        if not isinstance(source, FolderSource):
            return True
        stamp = self.stamps.get(key)
        return stamp is not None and stamp == Stamp.of(source.file_of(key))


@dataclass(frozen=True, slots=True)
class _Unread:
    """A record whose bytes nobody has looked at."""

    record: ImageRecord


def scan_source(
    source: ImageSource,
    scan: Scan,
    known: Mapping[str, tuple[Stamp, str]],
    *,
    need_digests: bool,
) -> Generator[int, None, None]:
    """List a source; yield how many records were looked at after every chunk.

    Args:
        source: what to look at.
        scan: what takes up the records.
        known: stamps and digests of an earlier run; files that have theirs still are not read.
        need_digests: whether the others are read and hashed; else their digest is None.

    Raises:
        SourceError: the source is damaged.
    """
    threads = cpu_budget()
    waiting: deque[Future[list[Seen]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="hash")
    try:
        for chunk in split(source.records(), CHUNK):
            looked = [_look(source, record, known, scan.stamps) for record in chunk]
            waiting.append(pool.submit(_hash, source, looked, scan, need_digests))
            scan.n_read += need_digests * sum(isinstance(one, _Unread) for one in looked)
            if len(waiting) > 2 * threads:
                yield _take_up(scan, waiting.popleft())
        while waiting:
            yield _take_up(scan, waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _take_up(scan: Scan, task: Future[list[Seen]]) -> int:
    """Wait for a chunk and add it; give how many records it has."""
    seen = task.result()
    scan.seen += seen
    return len(seen)


def _look(
    source: ImageSource,
    record: ImageRecord,
    known: Mapping[str, tuple[Stamp, str]],
    stamps: dict[str, Stamp],
) -> Seen | _Unread:
    """Recognise a file by its stamp, or leave it to be read."""
    if not isinstance(source, FolderSource):
        return _Unread(record)
    stamp = Stamp.of(source.file_of(record.key))
    if stamp is None:
        return _Unread(record)
    if stamp.is_settled(time.time_ns()):
        stamps[record.key] = stamp
    was, digest = known.get(record.key, (None, ""))
    return Seen(record.key, record.label, digest) if was == stamp else _Unread(record)


def _hash(
    source: ImageSource, looked: Iterable[Seen | _Unread], scan: Scan, need_digests: bool
) -> list[Seen]:
    """Read and hash what must be; runs in the pool."""
    seen = []
    for one in looked:
        if isinstance(one, Seen):
            seen.append(one)
            continue
        record, digest, reject = one.record, None, None
        if need_digests:
            try:
                digest = digest_of(record.read())
            except ImageError as error:
                reject = Reject.of(record.key, error)
        is_settled = not need_digests or scan.is_settled(source, record.key)
        seen.append(Seen(record.key, record.label, digest, reject, is_settled))
    return seen
