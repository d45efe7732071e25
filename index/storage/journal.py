"""The journal: what was written to a collection since its manifest, one record a write.

    file    = header {record}
    header  = MAGIC | id of the journal (16) | committed bytes (8) | records in them (8) | digest
    record  = head body
    head    = kind (8) | number (8) | bytes of the body (8) | digest of the body (16) | digest

Digests are BLAKE2b; that of a header or of a record's head covers the journal's id, too, and every
record its number, so that what belongs to another journal, or to another place of this one, is
never taken for a record. The header is rewritten in place.

Rules:
    A record is on the disk before the header counts it, and counted before its write is
    acknowledged. So within the committed bytes nothing may be wrong: what is, is damage, and
    refused, and so is a file that is shorter.
    Behind them lies what was not acknowledged, or what a power failure kept the header from
    counting. Whole records there are valid; a torn one ends the file, and the next writer
    cuts it off.
    No length is believed before its digest and the size of the file agree with it.
    After a write that failed or was broken off nothing is known of what the disk has: the
    journal takes no more.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from index.errors import CollectionError, mend_of
from index.storage.manifest import JournalEntry
from models.errors import reason_of
from models.files import open_regular

MAGIC = b"HORACEJ1"
_HEADER, _RECORD = struct.Struct("<8s16sQQ"), struct.Struct("<QQQ16s")
HEADER_BYTES = RECORD_HEAD_BYTES = 64
_HEAD_DIGEST_BYTES = HEADER_BYTES - _HEADER.size
assert _HEADER.size == _RECORD.size

READS_OF_HEADER = 100
"""A reader may meet a header while it is being written; a damaged one stays as it is."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place between two records.

    Attributes:
        end: bytes before it.
        n_records: records before it.
    """

    end: int = HEADER_BYTES
    n_records: int = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    """One write.

    Attributes:
        kind: what `body` is; see `index.storage.records`.
        body: its content.
        position: right after it.
    """

    kind: int
    body: bytes
    position: Position


class JournalFile:
    """An open journal, from which any number of processes read while one appends."""

    def __init__(self, directory: Path, entry: JournalEntry, *, writable: bool = False) -> None:
        """Open the journal of a collection.

        Args:
            directory: of the collection.
            entry: what the manifest says of it.
            writable: whether to append to it; one process at a time may.

        Raises:
            CollectionError: there is none.
        """
        self.file = directory / entry.name
        self._id = bytes.fromhex(entry.id)
        self._is_broken = False
        try:
            self._descriptor = open_regular(self.file, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            found = "none" if isinstance(error, FileNotFoundError) else str(error.strerror)
            raise self._damage("the journal that manifest.json names", found) from error

    def __del__(self) -> None:
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)

    def committed(self) -> Position:
        """Read how far writes were acknowledged.

        Raises:
            CollectionError: the header is damaged, or the file is shorter than it says.
        """
        committed = self._read_header()
        size = self.size_bytes()
        if size < committed.end:
            raise self._damage(f"at least {committed.end} bytes", f"{size} bytes")
        return committed

    def size_bytes(self) -> int:
        """Give the size of the file."""
        return os.fstat(self._descriptor).st_size

    def read(self, position: Position) -> Iterator[Record]:
        """Give the records from a position on, up to the end or to what is torn.

        Raises:
            CollectionError: what is wrong lies within what was acknowledged.
        """
        committed = self.committed()
        size = self.size_bytes()
        while position.end < size:
            found = self._read_record(position, size)
            is_committed = position.end < committed.end
            if isinstance(found, Record):
                is_sound = not is_committed or found.position.end <= committed.end
                fault = "one across the end of what was acknowledged"
            else:
                is_sound, fault = False, found
            if not is_sound and not is_committed:
                return
            if not is_sound or not isinstance(found, Record):
                raise self._damage(f"a sound record at byte {position.end}", fault)
            position = found.position
            if position.end == committed.end and position != committed:
                raise self._damage(f"{committed.n_records} records", f"{position.n_records}")
            yield found

    def append(self, kind: int, body: Sequence[bytes | memoryview], after: Position) -> Position:
        """Put a record on the disk; once it returns, nothing takes the record back.

        Args:
            kind: of the record.
            body: its content, in pieces.
            after: the end of the journal; what lies behind it is overwritten.

        Raises:
            CollectionError: the disk refuses; the journal takes no more records.
        """
        if self._is_broken:
            raise self._failed("an earlier write failed", "mend that")
        size, body_digest = 0, hashlib.blake2b(digest_size=16)
        for piece in body:
            size += len(piece)
            body_digest.update(piece)
        head = _RECORD.pack(kind, after.n_records, size, body_digest.digest())
        end = after.end
        try:
            for piece in (head + self._digest(head), *body):
                self._write(piece, end)
                end += len(piece)
            os.fdatasync(self._descriptor)
            position = Position(end=end, n_records=after.n_records + 1)
            self.commit(position)
        except BaseException as error:  # an interrupt, too, may leave a record that is counted
            self._is_broken = True
            if isinstance(error, OSError):
                raise self._failed(reason_of(error), mend_of(error)) from error
            raise
        return position

    def commit(self, position: Position) -> None:
        """Say in the header that everything before a position is acknowledged."""
        header = _HEADER.pack(MAGIC, self._id, position.end, position.n_records)
        self._write(header + self._digest(header), 0)

    def cut(self, position: Position) -> None:
        """Cut off what lies behind the last whole record, and acknowledge what lies before."""
        if self.size_bytes() > position.end:
            os.ftruncate(self._descriptor, position.end)
        if self._read_header() != position:
            self.commit(position)
        os.fsync(self._descriptor)

    def _read_header(self) -> Position:
        """Read the header, of which the digest says that it is this journal's."""
        for _ in range(READS_OF_HEADER):
            header = os.pread(self._descriptor, HEADER_BYTES, 0)
            if len(header) == HEADER_BYTES and self._is_sound(header):
                _, _, end, n_records = _HEADER.unpack_from(header)
                return Position(end=end, n_records=n_records)
        raise self._damage(f"the header of journal {self._id.hex()}", "another or a damaged one")

    def _read_record(self, position: Position, size: int) -> Record | str:
        """Read a record, or say what is wrong with it."""
        head = os.pread(self._descriptor, RECORD_HEAD_BYTES, position.end)
        if len(head) < RECORD_HEAD_BYTES or not self._is_sound(head):
            return "a head with another digest"
        kind, number, n_bytes, digest = _RECORD.unpack_from(head)
        start = position.end + RECORD_HEAD_BYTES
        if number != position.n_records:
            return f"record {number}"
        if n_bytes > size - start:
            return f"one of {n_bytes} bytes, where {size - start} are left"
        body = self._read(start, n_bytes)
        if hashlib.blake2b(body, digest_size=16).digest() != digest:
            return "a body with another digest"
        after = Position(end=start + n_bytes, n_records=number + 1)
        return Record(kind=kind, body=body, position=after)

    def _read(self, start: int, n_bytes: int) -> bytes:
        """Read so many bytes, or up to the end of the file."""
        pieces = []
        while piece := os.pread(self._descriptor, n_bytes, start):
            pieces.append(piece)
            start, n_bytes = start + len(piece), n_bytes - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _write(self, content: bytes | memoryview, start: int) -> None:
        """Write all of it: one call may write less than it was given."""
        view = memoryview(content)
        while len(view):
            written = os.pwrite(self._descriptor, view, start)
            view, start = view[written:], start + written

    def _digest(self, head: bytes) -> bytes:
        """Hash a head with the journal's id."""
        return hashlib.blake2b(head, key=self._id, digest_size=_HEAD_DIGEST_BYTES).digest()

    def _is_sound(self, head: bytes) -> bool:
        """Tell whether a head has its digest."""
        return self._digest(head[: _HEADER.size]) == head[_HEADER.size :]

    def _damage(self, expected: str, found: str) -> CollectionError:
        """Say what is wrong with the file."""
        mend = "the file is damaged: restore it, or build the collection again"
        return CollectionError(str(self.file), expected=expected, found=found, mend=mend)

    def _failed(self, found: str, first: str) -> CollectionError:
        """Say that a write did not come about, and what comes before another."""
        return CollectionError(
            str(self.file),
            expected="a write that reaches the disk",
            found=found,
            mend=f"{first}, then open the collection for writing again",
        )


def create_journal(directory: Path, name: str) -> JournalEntry:
    """Put an empty journal on the disk, for the next manifest to name.

    One of that name is what an attempt that failed has left: no manifest names it.
    """
    entry = JournalEntry(name=name, id=secrets.token_hex(16))
    (directory / name).write_bytes(b"")
    journal = JournalFile(directory, entry, writable=True)
    journal.commit(Position())
    os.fsync(journal._descriptor)
    return entry
