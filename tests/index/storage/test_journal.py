import errno
import fcntl
import os

import pytest

from index.errors import CollectionError
from index.storage.journal import (
    HEADER_BYTES,
    RECORD_HEAD_BYTES,
    JournalFile,
    Position,
    create_journal,
)


@pytest.fixture
def entry(tmp_path):
    """An empty journal."""
    return create_journal(tmp_path, "journal-000001")


@pytest.fixture
def journal(tmp_path, entry):
    """The same, open for writing."""
    return JournalFile(tmp_path, entry, writable=True)


def write(journal, *bodies):
    """Append a record for each body; give the end."""
    position = Position()
    for n, body in enumerate(bodies):
        position = journal.append(n + 1, [body], position)
    return position


def read(tmp_path, entry):
    """Read everything from the file."""
    return [(record.kind, record.body) for record in JournalFile(tmp_path, entry).read(Position())]


def test_what_was_appended_is_read(tmp_path, entry, journal):
    """In order, from any record on, by whoever has the file open."""
    reader = JournalFile(tmp_path, entry)
    end = write(journal, b"one", b"", b"three" * 1000)
    records = list(reader.read(Position()))
    assert [(r.kind, r.body) for r in records] == [(1, b"one"), (2, b""), (3, b"three" * 1000)]
    assert [r.kind for r in reader.read(records[0].position)] == [2, 3]
    assert records[-1].position == end == reader.committed()
    assert list(reader.read(end)) == []


def test_a_record_is_on_the_disk_before_it_is_counted(journal, disk):
    """A power failure leaves no header that promises what the file does not have."""
    write(journal, b"one")
    assert [event for event, _ in disk] == ["write", "write", "sync", "write"]


def test_a_write_may_take_less_than_it_was_given(tmp_path, entry, journal, monkeypatch):
    """The rest follows."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:7], at))
    write(journal, b"more than seven bytes")
    assert read(tmp_path, entry) == [(1, b"more than seven bytes")]


def test_every_flipped_byte_is_found(tmp_path, entry, journal):
    """Every one of the file: header, heads and bodies."""
    write(journal, b"one", b"", b"three")
    content = journal.file.read_bytes()
    assert len(content) == HEADER_BYTES + 3 * RECORD_HEAD_BYTES + 8
    for at in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[at] ^= flip
            journal.file.write_bytes(damaged)
            with pytest.raises(CollectionError, match=f"{journal.file}: expected "):
                read(tmp_path, entry)


def test_every_truncation_is_found(tmp_path, entry, journal):
    """A file that is shorter than what was acknowledged is refused, however short."""
    write(journal, b"one", b"two")
    content = journal.file.read_bytes()
    for size in range(len(content)):
        journal.file.write_bytes(content[:size])
        with pytest.raises(CollectionError, match=f"{journal.file}: expected "):
            read(tmp_path, entry)
    journal.file.unlink()
    with pytest.raises(CollectionError, match=r"expected the journal that manifest.json names"):
        read(tmp_path, entry)


def test_a_torn_write_is_cut_off_and_a_whole_one_is_taken(tmp_path, entry, journal):
    """What lies behind the acknowledged bytes counts as far as it is whole."""
    after_one = write(journal, b"one")
    header = journal.file.read_bytes()[:HEADER_BYTES]
    journal.append(2, [b"two"], after_one)
    content = header + journal.file.read_bytes()[HEADER_BYTES:]  # killed before it was counted
    for size in range(after_one.end, len(content) + 1):
        journal.file.write_bytes(content[:size])
        whole = [(1, b"one"), (2, b"two")] if size == len(content) else [(1, b"one")]
        assert read(tmp_path, entry) == whole
        again = JournalFile(tmp_path, entry, writable=True)
        (*_, last) = again.read(Position())
        again.cut(last.position)
        assert again.size_bytes() == last.position.end
        assert again.committed() == last.position
    again.append(3, [b"three"], after_one)
    assert read(tmp_path, entry) == [(1, b"one"), (3, b"three")]


def test_records_of_another_journal_or_place_are_refused(tmp_path, entry, journal):
    """Though each of them is whole."""
    end = write(journal, b"one", b"two")
    content = journal.file.read_bytes()
    size = RECORD_HEAD_BYTES + 3
    first, second = content[HEADER_BYTES:][:size], content[HEADER_BYTES:][size:]
    journal.file.write_bytes(content[:HEADER_BYTES] + second + first)
    with pytest.raises(CollectionError, match="expected a sound record at byte 64, found"):
        read(tmp_path, entry)
    other = create_journal(tmp_path, "other")
    write(JournalFile(tmp_path, other, writable=True), b"one", b"two")
    foreign = (tmp_path / "other").read_bytes()
    journal.file.write_bytes(foreign)
    with pytest.raises(CollectionError, match=f"expected the header of journal {entry.id}, found"):
        read(tmp_path, entry)
    journal.file.write_bytes(content[:HEADER_BYTES] + foreign[HEADER_BYTES:])
    with pytest.raises(CollectionError, match="found a head with another digest"):
        read(tmp_path, entry)
    assert len(content) == end.end


def test_a_header_that_is_being_written_is_read_again(tmp_path, entry, journal, monkeypatch):
    """Half of it is the one before."""
    before = journal.file.read_bytes()
    end = write(journal, b"one")
    pread, heads = os.pread, [before[:40] + journal.file.read_bytes()[40:HEADER_BYTES]] * 3
    monkeypatch.setattr(os, "pread", lambda *asked: heads.pop() if heads else pread(*asked))
    assert JournalFile(tmp_path, entry).committed() == end
    assert heads == []


def test_a_header_of_other_records_is_refused(tmp_path, entry, journal):
    """Though its digest is right: it ends within a record, or counts more than there are."""
    end = write(journal, b"one")
    for end_, n_records, message in [
        (end.end - 1, 1, "found one across the end of what was acknowledged"),
        (end.end, 2, "expected 2 records, found 1"),
    ]:
        journal.commit(Position(end=end_, n_records=n_records))
        with pytest.raises(CollectionError, match=message):
            read(tmp_path, entry)


def test_who_reads_asks_for_no_right_to_write(tmp_path, entry):
    """A collection may lie where nobody may write."""
    reader = JournalFile(tmp_path, entry)
    assert fcntl.fcntl(reader._descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_a_forged_length_is_refused_unread(tmp_path, entry, journal):
    """Its digest is right, but no file is so long: nothing of that size is allocated."""
    from index.storage.journal import _RECORD

    write(journal, b"one")
    head = _RECORD.pack(1, 0, 1 << 60, bytes(16))
    content = journal.file.read_bytes()
    forged = head + journal._digest(head)
    journal.file.write_bytes(content[:HEADER_BYTES] + forged + content[-3:])
    with pytest.raises(CollectionError, match=f"found one of {1 << 60} bytes, where 3 are left"):
        read(tmp_path, entry)


@pytest.mark.parametrize(
    ("number", "mend"), [(errno.ENOSPC, "make room"), (errno.EIO, "mend that")]
)
def test_after_a_failed_write_nothing_more_is_taken(
    tmp_path, entry, journal, monkeypatch, number, mend
):
    """What the disk has then is not known; what was acknowledged is still there."""
    end = write(journal, b"one")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(CollectionError, match=f"found {os.strerror(number)}; {mend}, then open"):
        journal.append(2, [b"two"], end)
    monkeypatch.undo()
    with pytest.raises(CollectionError, match="found an earlier write failed; mend that"):
        journal.append(2, [b"two"], end)
    again = JournalFile(tmp_path, entry, writable=True)
    again.cut(end)
    assert read(tmp_path, entry) == [(1, b"one")]
