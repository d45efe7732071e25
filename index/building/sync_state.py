"""What a sync remembers of a source: which files it need not read again, and its rejects.

Files, under `sync/` of the collection, named by a hash of the source's URI:
    NAME.stamps   of files in a folder: key, size, times and digest when they were read; a
                  Parquet table, and 32 bytes of its SHA-256.
    NAME.jsonl    the images that could not be used, as in `rejects.jsonl`; the last line has the
                  SHA-256 of those before it.

Rules:
    Nothing depends on them: where they are missing or damaged, files are read and hashed, and
    rejects are tried again. They are no part of what the manifest lists, but `index.verify`
    holds each against its own hash.
    A file is taken for unchanged where it is the same file of the same size, its time of
    modification and its time of change, which no program can set, are as they were, and both
    were some seconds past when it was read: what is written again within the grain of a file
    system's clock is not missed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from index.embed import Reject, rejects_text
from models.files import atomic_file

SYNC_FOLDER = "sync"
STAMPS, REJECTS = ".stamps", ".jsonl"
HASH_BYTES = 32

SETTLED_S = 3.0
"""Seconds that a file must have been left alone before it was read: the coarsest clock of a file
system in use, FAT's, ticks every two."""

_FIELDS: dict[str, pa.DataType] = {
    "key": pa.string(),
    "size": pa.int64(),
    "modified_ns": pa.int64(),
    "changed_ns": pa.int64(),
    "inode": pa.int64(),
    "digest": pa.string(),
}
_STAMPS = pa.schema(_FIELDS)


@dataclass(frozen=True, slots=True)
class Stamp:
    """By what a file is known without reading it.

    Attributes:
        size: in bytes.
        modified_ns: when its content was written, as its owner says.
        changed_ns: when the file system last saw it change.
        inode: which file it is: another may be given its name, with times that it kept.
    """

    size: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> Stamp | None:
        """Read the stamp of a file; None where it cannot be had."""
        try:
            info = os.stat(file)
        except OSError:
            return None
        inode = info.st_ino & ((1 << 63) - 1)
        return cls(info.st_size, info.st_mtime_ns, info.st_ctime_ns, inode)

    def is_settled(self, now_ns: int) -> bool:
        """Tell whether the file was left alone for a while.

        An owner may say that it was written in the future, as of a camera whose clock is wrong; the
        file system's own time says then when that was said.
        """
        while_ns = int(SETTLED_S * 1e9)
        return self.changed_ns < now_ns - while_ns and abs(now_ns - self.modified_ns) > while_ns


@dataclass(frozen=True, kw_only=True)
class SyncState:
    """What an earlier run has left.

    Attributes:
        stamps: of files by key, and the digests that they had then.
        rejects: the images that could not be used, by key.
    """

    stamps: Mapping[str, tuple[Stamp, str]]
    rejects: Mapping[str, Reject]


def read_state(collection: Path, source: str) -> SyncState:
    """Read what is remembered of a source; nothing where there is nothing sound."""
    return SyncState(
        stamps=_read_stamps(_file(collection, source, STAMPS)),
        rejects=_parse_rejects(_read_sealed(rejects_file(collection, source))),
    )


def write_state(
    collection: Path,
    source: str,
    stamps: Mapping[str, tuple[Stamp, str]],
    rejects: Iterable[Reject],
) -> None:
    """Remember a source, in the place of what was remembered."""
    text = rejects_text(rejects).encode()
    with atomic_file(rejects_file(collection, source)) as temporary:
        temporary.write_bytes(text + _last_line(text))
    columns = {
        "key": list(stamps),
        "size": [stamp.size for stamp, _ in stamps.values()],
        "modified_ns": [stamp.modified_ns for stamp, _ in stamps.values()],
        "changed_ns": [stamp.changed_ns for stamp, _ in stamps.values()],
        "inode": [stamp.inode for stamp, _ in stamps.values()],
        "digest": [digest for _, digest in stamps.values()],
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_STAMPS), sink, compression="zstd")
    with atomic_file(_file(collection, source, STAMPS)) as temporary:
        temporary.write_bytes(sink.getvalue() + hashlib.sha256(sink.getvalue()).digest())


def rejects_file(collection: Path, source: str) -> Path:
    """Name the log of the images of a source that could not be used."""
    return _file(collection, source, REJECTS)


def read_rejects(file: Path) -> dict[str, Reject]:
    """Read a log of rejects, by key; none where it is missing or damaged."""
    try:
        return _parse_rejects(file.read_bytes()) if file.is_file() else {}
    except OSError:
        return {}


def is_state(file: Path) -> bool:
    """Tell by its name whether a file under `sync/` is one that a sync has written."""
    return file.suffix in (STAMPS, REJECTS) and not file.name.startswith(".")


def is_sound(file: Path) -> bool:
    """Tell whether such a file has the content that was written."""
    return _read_sealed(file) is not None


def _read_sealed(file: Path) -> bytes | None:
    """Read what a file holds before its hash; None where that is another, or there is no file."""
    try:
        whole = file.read_bytes() if file.is_file() else b""  # a pipe would keep us waiting
    except OSError:
        return None
    if file.suffix == STAMPS:
        content, seal = whole[:-HASH_BYTES], whole[-HASH_BYTES:]
        return content if hashlib.sha256(content).digest() == seal else None
    content = whole[: whole.rfind(b"\n", 0, -1) + 1]
    return content if whole == content + _last_line(content) else None


def _last_line(text: bytes) -> bytes:
    """Write the hash of a log as its last line."""
    return (json.dumps({"sha256": hashlib.sha256(text).hexdigest()}) + "\n").encode()


def _parse_rejects(text: bytes | None) -> dict[str, Reject]:
    """Read the lines of a log."""
    try:
        rejects = [Reject(**json.loads(line)) for line in (text or b"").splitlines()]
        return {reject.key: reject for reject in rejects}
    except (ValueError, TypeError):
        return {}


def _read_stamps(file: Path) -> dict[str, tuple[Stamp, str]]:
    """Read the stamps; none where they are missing or damaged."""
    content = _read_sealed(file)
    if content is None:
        return {}
    try:
        table = pq.read_table(io.BytesIO(content))
        if not table.schema.equals(_STAMPS):
            return {}
    except (pa.ArrowException, OSError, ValueError):
        return {}
    columns = [column.to_pylist() for column in table.columns]
    return {
        str(key): (Stamp(size, modified, changed, inode), digest)
        for key, size, modified, changed, inode, digest in zip(*columns, strict=True)
    }


def _file(collection: Path, source: str, suffix: str) -> Path:
    """Name a file of a source."""
    digest = hashlib.blake2b(source.encode("utf-8", "surrogateescape"), digest_size=8)
    return collection / SYNC_FOLDER / f"{digest.hexdigest()}{suffix}"
