from __future__ import annotations

import asyncio
import os
import threading
from functools import partial

import pytest

from serve.errors import StartError
from serve.reloading import Reloads
from serve.security.files import Reloadable, RereadThread, UnreadableError, read_file
from serve.security.ring import new_token, read_ring, write_line


def read_number(path):
    """Read a file that should hold a number."""
    text = path.read_text()
    if not text.isdigit():
        raise StartError(f"number {path}", expected="digits", found="others")
    return int(text)


@pytest.fixture
def file(tmp_path):
    """A file with a number."""
    path = tmp_path / "number"
    path.write_text("1")
    return path


def reloadable(path):
    """The number of a file, reloadable."""
    return Reloadable("number", [str(path)], lambda: read_number(path))


def write(path, text):
    """Change a file so that its time of change does, too, however coarse the clock."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(before + 1_000_000, before + 1_000_000))


def test_a_change_is_taken_once_the_file_is_still(file, caplog):
    """Seen at one look, taken at the next, and said once."""
    caplog.set_level("INFO", "horace.serve")
    number = reloadable(file)
    write(file, "2")
    number.look()
    assert number.value == 1
    number.look()
    assert number.value == 2
    number.look()
    assert caplog.messages == ["number: read again"]


def test_a_file_that_is_being_written_is_left_alone(file):
    """As long as every look finds another, none is taken."""
    number = reloadable(file)
    for n in range(2, 6):
        write(file, str(n))
        number.look()
        assert number.value == 1
    number.look()
    assert number.value == 5


@pytest.mark.parametrize("broken", ["none", None])
def test_what_is_broken_is_refused_once_and_the_old_goes_on(file, caplog, broken):
    """One line a change, and what is mended later is taken."""
    caplog.set_level("INFO", "horace.serve")
    number = reloadable(file)
    if broken is None:
        file.rename(file.with_suffix(".gone"))
        number._read = lambda: read_number(file) if file.exists() else _refuse()
    else:
        write(file, broken)
    for _ in range(5):
        number.look()
    assert number.value == 1
    (line,) = caplog.messages
    assert line.startswith("number: not taken, the old goes on: ")
    write(file, "3")
    number.look()
    number.look()
    assert number.value == 3


def _refuse():
    raise StartError("number", expected="a file", found="none")


def test_a_link_that_is_turned_is_a_change(tmp_path):
    """Kubernetes changes secrets so: the file's own name stays a link."""
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "number").write_text(str(n))
    (tmp_path / "data").symlink_to("1")
    file = tmp_path / "number"
    file.symlink_to("data/number")
    number = reloadable(file)
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").replace(tmp_path / "data")
    number.look()
    number.look()
    assert number.value == 2


def test_a_reload_reads_at_once_and_raises(file):
    """What an operator asks for is done now, and its failure is theirs to hear."""
    number = reloadable(file)
    write(file, "7")
    number.reload()
    assert number.value == 7
    write(file, "none")
    with pytest.raises(StartError, match="expected digits"):
        number.reload()
    assert number.value == 7


def test_what_is_wrong_at_the_start_is_an_error(file):
    """There is no old value to go on with."""
    write(file, "none")
    with pytest.raises(StartError, match="expected digits"):
        reloadable(file)


def test_rereading_goes_on_after_a_failure_and_ends(caplog):
    """Our own bugs are logged with their traceback; the next file is looked at."""
    looked = threading.Event()

    class Bad:
        def look(self):
            """Fail."""
            raise RuntimeError("a bug")

    class Good:
        def look(self):
            """Note it."""
            looked.set()

    watcher = RereadThread([Bad(), Good()], every_s=0.001)
    assert looked.wait(30)
    looked.clear()
    assert looked.wait(30)
    watcher.close()
    assert not watcher._thread.is_alive()
    assert "looking failed; it goes on" in caplog.messages[0]


def test_what_may_be_read_again_is_taken_and_refusals_are_counted(file):
    """A change of modes is one of the file; both looks and reloads show in the counts."""
    number, may_read = reloadable(file), False
    number._read = lambda: read_number(file) if may_read else _refuse()
    reloads = Reloads()
    reloads.register(number.what, partial(asyncio.to_thread, number.reload), number.refusals)
    assert reloads.statistics().failures == {"number": 0}
    write(file, "2")
    for _ in range(3):
        number.look()
    assert (number.value, reloads.statistics().failures) == (1, {"number": 1})
    assert asyncio.run(reloads.run()) == ["number"]
    assert reloads.statistics().failures == {"number": 2}
    may_read, before = True, file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        file.chmod(0o600)
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    number.look()
    number.look()
    assert number.value == 2


def test_a_key_file_that_cannot_be_read_for_a_moment_is_read_at_the_next_look(
    tmp_path, out_of_descriptors, caplog
):
    """A key that was taken back does not stay for want of a descriptor; it is told once."""
    caplog.set_level("INFO", "horace.serve")
    file, kept, revoked = tmp_path / "keys", new_token(), new_token()
    file.write_text(f"{write_line('kept', kept)}\n{write_line('revoked', revoked)}\n")
    ring = Reloadable("API keys", [str(file)], lambda: read_ring(file))
    write(file, write_line("kept", kept))
    with out_of_descriptors():
        for _ in range(5):
            ring.look()
    assert ring.value.find(revoked) is not None
    assert caplog.messages == [
        f"API keys: not taken, the old goes on: key file {file}: expected a file that can be "
        "read, found Too many open files"
    ]
    assert ring.refusals() == 1
    ring.look()
    assert ring.value.names == ["kept"]
    assert caplog.messages[1:] == ["API keys: read again"]


def test_a_reload_that_could_read_nothing_is_made_good_at_the_next_look(
    tmp_path, out_of_descriptors
):
    """An operator's signal that came at a bad moment is not the last word."""
    file = tmp_path / "keys"
    file.write_text(write_line("old", new_token()))
    ring = Reloadable("API keys", [str(file)], lambda: read_ring(file))
    write(file, write_line("new", new_token()))
    ring.look()
    with out_of_descriptors(), pytest.raises(UnreadableError, match=r"found Too many open files$"):
        ring.reload()
    ring.look()
    assert ring.value.names == ["new"]


def test_each_fault_of_the_system_is_told_once_a_change(file, caplog):
    """However they alternate; the same fault is told again of another change."""
    number, faults = reloadable(file), ["one", "other", "one", "other"]

    def read():
        raise UnreadableError("number", expected="a file", found=faults.pop(0))

    number._read = read
    for _ in range(2):
        write(file, "2")
        faults[:] = ["one", "other", "one", "other"]
        for _ in range(5):
            number.look()
        assert not faults
    assert [line.rpartition(" ")[2] for line in caplog.messages] == ["one", "other"] * 2
    assert number.refusals() == 4


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(tmp_path):
    """It is refused, and the file that comes after it is read."""
    file, pipe = tmp_path / "keys", tmp_path / "pipe"
    file.write_text(write_line("old", new_token()))
    ring = Reloadable("API keys", [str(file)], lambda: read_ring(file))
    os.mkfifo(pipe)
    pipe.replace(file)
    with pytest.raises(StartError, match="expected a file that can be read, found no regular file"):
        ring.reload()
    file.unlink()
    file.write_text(write_line("new", new_token()))
    ring.look()
    ring.look()
    assert ring.value.names == ["new"]


def test_what_is_too_large_to_be_meant_is_not_read(tmp_path):
    """Such as a disk image in the place of a certificate: 64 GB, of which none are written."""
    file = tmp_path / "large"
    with file.open("wb") as made:
        made.truncate(1 << 36)
    with pytest.raises(StartError, match=r"^large: expected at most 16777216 bytes, found more$"):
        read_file("large", file)
